"""What is logged about the tokens of the loss: their divergence, entropies, clip and log-probabilities."""

import torch
from torch import Tensor

from data_collator import MicroBatch
from opsd.losses import Objective, TokenLosses
from opsd.metrics import Metrics

NUM_FIRST_TOKENS = 4  # of a completion: logged by themselves, since thinking modes differ there in form


class TokenMetrics:
    """
    Logs the statistics of the tokens with a weight in the divergence. Tokens with only a reward are left out.

    Args:
        metrics: where they are collected.
        objective: of the loss.
        vocab_size: number of logits of a token.
    """

    def __init__(self, metrics: Metrics, objective: Objective, vocab_size: int):
        self.metrics, self.objective, self.vocab_size = metrics, objective, vocab_size

    def add(self, batch: MicroBatch, losses: TokenLosses) -> None:
        """Add the tokens of a micro-batch. Nothing is read from the accelerator, which would have to be waited for."""
        counts = batch.of_tokens(batch.weights) > 0.0  # (N,)
        # Not indexed with `counts`: a GPU would stop to count them
        statistics = type(losses.statistics)(*(value.where(counts, 0.0) for value in losses.statistics))
        num_tokens = counts.sum()
        sums = {name: value.sum(dtype=torch.float64) for name, value in statistics._asdict().items()}
        num_summands = self.objective.num_summands(self.vocab_size)
        for name, total, count in (
            ("divergence", sums["divergence"], num_tokens),
            ("entropy", sums["student_entropy"], num_tokens),
            ("entropy/teacher", sums["teacher_entropy"], num_tokens),
            ("clip_ratio/entries", sums["clipped_entries"], num_tokens * num_summands),
            ("clip_ratio/mass", sums["clipped_mass"], sums["positive_mass"]),
            ("clip_ratio/wrong_way_tokens", sums["wrong_way"], num_tokens),
        ):
            self.metrics.add(name, total, count)
        is_first = batch.token_places()[1] < NUM_FIRST_TOKENS
        first_divergence = statistics.divergence.where(is_first, 0.0).sum(dtype=torch.float64)
        self.metrics.add("divergence/first_tokens", first_divergence, (counts & is_first).sum())
        if losses.logprobs is not None and len(losses.logprobs) > 0:
            self._add_sampler_logprobs(losses.logprobs - batch.of_tokens(batch.sampler_logprobs))

    def _add_sampler_logprobs(self, differences: Tensor) -> None:
        """Log, under TRL's names, how far the student's log-probabilities (N,) are from the sampler's."""
        if self.objective.importance_sampling_correction:
            name, values = "sampling/importance_sampling_ratio", differences.double().exp()
            self.metrics.add_extreme(f"{name}/min", min, [values.min()])
        else:
            name, values = "sampling/sampling_logp_difference", differences.abs()
        self.metrics.add(f"{name}/mean", values.sum(dtype=torch.float64), len(values))
        self.metrics.add_extreme(f"{name}/max", max, [values.max()])


def problem_divergences(batch: MicroBatch, losses: TokenLosses) -> list[tuple[int, float, float]]:
    """Sum the divergence by problem, for the curriculum: (row of the training data, sum in nats, tokens)."""
    counts = batch.of_tokens(batch.weights) > 0.0  # (N,)
    places = batch.token_places()[0]
    num_tokens = torch.bincount(places, counts.double(), len(batch.rows)).tolist()
    divergence = losses.statistics.divergence.where(counts, 0.0).double()
    divergences = torch.bincount(places, divergence, len(batch.rows)).tolist()
    scores = zip(batch.rows, divergences, num_tokens, strict=True)
    return [score for score in scores if score[2] > 0]
