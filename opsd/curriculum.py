"""Draws the problems of each optimizer step by what their rollouts showed before."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

CURRICULA = ("divergence", "pass_rate")
DECAY = 0.5  # of what earlier visits of a problem count, at each visit
FLOOR = 0.1  # smallest weight, as a share of the mean (divergence) or of the largest possible (pass_rate)


class Curriculum:
    """
    Draws those problems more often from which there is more to learn now, as the scores of their last rollouts tell:

        divergence: how much the teacher, who sees the solution, would change: the mean divergence per token.
        pass_rate: 4 p (1 - p) of the share p of right answers: what is solved always or never teaches least.

    A score says nothing before a problem's first visit, so that it can help only where problems come again: in several
    epochs, or with fewer problems than the run draws. Each visit halves the weight of earlier ones, so that a score
    follows the student. No problem's weight falls to zero.

    Every process has a copy, and all draw alike as long as they are updated alike.

    Args:
        kind: one of `CURRICULA`.
        num_problems: rows of the data set.
        seed: of the draws.

    Raises:
        ValueError: for another kind.
    """

    def __init__(self, kind: str, num_problems: int, seed: int):
        if kind not in CURRICULA:
            raise ValueError(f"kind must be one of {', '.join(CURRICULA)}, got {kind!r}")
        self.kind, self.num_problems, self.seed = kind, num_problems, seed
        self._sums, self._counts = torch.zeros(2, num_problems, dtype=torch.float64)  # of the values, decayed

    def draw(self, step: int, size: int) -> list[int]:
        """
        `size` different rows, drawn one after the other in proportion to `weights` without replacement. The same for the
        same seed, step and updates before.

        By the Gumbel-top-k trick (Kool et al. 2019, arXiv 1903.06059): the largest of log w + Gumbel noise.

        Raises:
            ValueError: if there are fewer problems than `size`.
        """
        if size > self.num_problems:
            raise ValueError(f"cannot draw {size} different problems of {self.num_problems}")
        digest = hashlib.sha256(json.dumps([self.seed, step]).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
        noise = -(-torch.rand(self.num_problems, dtype=torch.float64, generator=generator).log()).log()
        return (self.weights().log() + noise).topk(size).indices.tolist()

    def update(self, rows: Sequence[int], values: Sequence[float], numbers: Sequence[float]) -> None:
        """
        Take in what the rollouts of a step showed, one value for each visit of a problem; a row may occur repeatedly.

        Args:
            rows: row numbers of the problems.
            values: "divergence": mean over the tokens in nats, where a negative one, as a cap can make it, counts as 0;
                "pass_rate": share of right answers. Those that are not finite are left out.
            numbers: what a value is the mean of: tokens or rollouts.
        """
        for row, value, number in zip(rows, values, numbers, strict=True):
            if math.isfinite(value):
                value = max(value, 0.0) if self.kind == "divergence" else value
                self._sums[row] = DECAY * self._sums[row] + number * value
                self._counts[row] = DECAY * self._counts[row] + number

    def weights(self) -> Tensor:
        """
        (num_problems,), float64, positive: what the probabilities of a draw are proportional to.

        divergence: the decayed mean of a problem's values, of one not seen yet the mean over those that are (1 where that
        is 0 or there are none), at least `FLOOR` times that mean.
        pass_rate: 4 p (1 - p) of p = (sum + 0.5) / (count + 1), thus 1 of a problem not seen yet, at least `FLOOR`.
        """
        if self.kind == "pass_rate":
            p = (self._sums + 0.5) / (self._counts + 1)
            return (4 * p * (1 - p)).clamp(min=FLOOR)
        seen = self._counts > 0
        means = self._sums / self._counts  # NaN where not seen
        mean = means[seen].mean().item() if self._sums.any() else 1.0
        return torch.where(seen, means, mean).clamp(min=FLOOR * mean)

    def metrics(self) -> dict[str, float]:
        """
        "curriculum/seen_ratio": share of the problems seen so far. "curriculum/effective_ratio": perplexity of the draws'
        distribution over the number of problems, 1 where all are equally likely.
        """
        probs = self.weights() / self.weights().sum()
        entropy = -(probs * probs.log()).sum()
        return {
            "curriculum/seen_ratio": (self._counts > 0).double().mean().item(),
            "curriculum/effective_ratio": entropy.exp().item() / self.num_problems,
        }

    @property
    def _metadata(self) -> dict[str, str]:
        return {"kind": self.kind, "num_problems": str(self.num_problems)}

    def _file(self, folder: str | Path) -> Path:
        return Path(folder, "curriculum.safetensors")

    def save(self, folder: str | Path) -> None:
        """Write the scores into a checkpoint's folder."""
        save_file({"sums": self._sums, "counts": self._counts}, self._file(folder), self._metadata)

    def load(self, folder: str | Path) -> None:
        """
        Take the scores from a checkpoint's folder.

        Raises:
            ValueError: if it has none, or those of another kind or number of problems.
        """
        file = self._file(folder)
        if not file.exists():
            raise ValueError(
                f"--resume_from_checkpoint {folder}: {file.name} is missing. Resume without the curriculum, as the "
                "checkpoint was trained, or start anew"
            )
        with safe_open(file, framework="pt") as saved:
            if saved.metadata() != self._metadata:
                raise ValueError(
                    f"--resume_from_checkpoint {folder}: {file.name} is of {saved.metadata()}, and this run's curriculum "
                    f"of {self._metadata}. Go on with the same curriculum and data set as before"
                )
            self._sums, self._counts = saved.get_tensor("sums"), saved.get_tensor("counts")
