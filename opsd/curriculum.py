"""The choice of the problems of each optimizer step, by the scores of their earlier rollouts."""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
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
    Draws a problem more often if its last rollouts show that there is more to learn from it. The score is

        divergence: the mean divergence per token.
        pass_rate: 4 p (1 - p) of the share p of right answers. It is smallest for what is solved always or never.

    A problem has no score before its first visit. So a curriculum helps only if problems come again. Each visit halves
    the weight of earlier ones, so that a score follows the student. No problem's weight falls to zero.

    Every process has a copy. All copies draw the same problems if they get the same updates.

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
        Draw `size` different rows, one after the other, in proportion to `weights`, without replacement.

        The draw follows from the seed, the step and the updates before. It uses the Gumbel-top-k trick (Kool et al.
        2019, arXiv 1903.06059): the largest of log w + Gumbel noise.

        Raises:
            ValueError: if there are fewer problems than `size`.
        """
        if size > self.num_problems:
            raise ValueError(f"cannot draw {size} different problems of {self.num_problems}")
        digest = hashlib.sha256(json.dumps([self.seed, step]).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
        noise = -(-torch.rand(self.num_problems, dtype=torch.float64, generator=generator).log()).log()
        return (self.weights().log() + noise).topk(size).indices.tolist()

    def update(self, rows: Sequence[int], values: Sequence[float], counts: Sequence[float]) -> None:
        """
        Take in the rollouts of a step, one value for each visit of a problem. A row may occur repeatedly.

        Args:
            rows: row numbers of the problems.
            values: "divergence": mean over the tokens in nats; a negative one counts as 0. "pass_rate": share of right
                answers. Values that are not finite are left out.
            counts: number of tokens or rollouts behind each value.
        """
        for row, value, count in zip(rows, values, counts, strict=True):
            if math.isfinite(value):
                value = max(value, 0.0) if self.kind == "divergence" else value
                self._sums[row] = DECAY * self._sums[row] + count * value
                self._counts[row] = DECAY * self._counts[row] + count

    def add_scores(self, scores: Iterable[tuple[int, float, float]]) -> None:
        """Take in the parts of a step's values: (row, sum of values, number of values), repeated rows added up."""
        sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for row, total, count in scores:
            sums[row][0] += total
            sums[row][1] += count
        counts = [count for _, count in sums.values()]
        self.update(list(sums), [total / count for total, count in sums.values()], counts)

    def weights(self) -> Tensor:
        """
        Return the weights of the draw, (num_problems,), float64, positive.

        divergence: the decayed mean of a problem's values, at least `FLOOR` times the mean over all seen problems.
        That mean, or 1 if it is 0, is also the weight of problems not seen yet.
        pass_rate: 4 p (1 - p) of p = (sum + 0.5) / (count + 1), at least `FLOOR`. A problem not seen yet has 1.
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
        Return "curriculum/seen_ratio", the share of problems seen so far, and "curriculum/effective_ratio", the
        perplexity of the draws' distribution over the number of problems: 1 if all are equally likely.
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
                    f"--resume_from_checkpoint {folder}: {file.name} is of {saved.metadata()}, and this run's "
                    f"curriculum of {self._metadata}. Go on with the same curriculum and data set as before"
                )
            self._sums, self._counts = saved.get_tensor("sums"), saved.get_tensor("counts")
