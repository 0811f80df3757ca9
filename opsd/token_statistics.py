"""What is logged about the tokens of the loss: their divergence, entropies, kinds, clip and log-probabilities."""

from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data_collator import MicroBatch
from opsd.losses import Objective, TokenLosses, TokenStatistics
from opsd.metrics import Metrics
from opsd.token_kinds import MATHEMATICS, OTHER, STYLE, TokenKinds, make_token_kinds
from opsd.token_weights import find_places, top_tokens

NUM_FIRST_TOKENS = 4  # of a completion: logged by themselves, since thinking modes differ there in form


class TokenMetrics:
    """
    Logs the statistics of the tokens with a weight in the divergence. Tokens with only a reward are left out.

    Args:
        metrics: where they are collected.
        objective: of the loss.
        vocab_size: number of logits of a token.
        tokenizer: of the model; tells the kinds of tokens.
    """

    def __init__(self, metrics: Metrics, objective: Objective, vocab_size: int, tokenizer: PreTrainedTokenizerBase):
        self.metrics, self.objective, self.vocab_size, self.tokenizer = metrics, objective, vocab_size, tokenizer

    @cached_property
    def kinds(self) -> TokenKinds:
        """The kinds of the vocabulary, made at the first use: a second for 150,000 entries."""
        return make_token_kinds(self.tokenizer, self.vocab_size, self.metrics.accelerator.device)

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
        self._add_classes(batch, counts, statistics, num_tokens)
        if losses.logprobs is not None and len(losses.logprobs) > 0:
            self._add_sampler_logprobs(losses.logprobs - batch.of_tokens(batch.sampler_logprobs))

    def _add_classes(self, batch: MicroBatch, counts: Tensor, statistics: TokenStatistics, num_tokens: Tensor) -> None:
        """Log the divergence of classes of tokens, which may overlap, and how many tokens some of them have."""
        token_ids, (rows, columns) = batch.of_tokens(batch.completion_ids), batch.token_places()
        kinds, epistemic = self.kinds.kinds[token_ids], self.kinds.epistemic[token_ids]  # (N,) each
        quarters = 4 * columns // batch.completion_mask.sum(1)[rows]
        for name, members in (
            ("style", kinds == STYLE),
            ("mathematics", kinds == MATHEMATICS),
            ("other", kinds == OTHER),
            ("epistemic", epistemic),
            ("forks", top_tokens(statistics.student_entropy, find_places(batch))),
            ("first_tokens", columns < NUM_FIRST_TOKENS),
            ("quarter_1", quarters == 0),
            ("quarter_2", quarters == 1),
            ("quarter_3", quarters == 2),
            ("quarter_4", quarters == 3),
        ):
            total = statistics.divergence.where(members, 0.0).sum(dtype=torch.float64)
            self.metrics.add(f"divergence/{name}", total, (counts & members).sum())
        is_clipped = statistics.clipped_entries > 0
        for kind, members in (
            ("style", kinds == STYLE),
            ("mathematics", kinds == MATHEMATICS),
            ("other", kinds == OTHER),
            ("epistemic", epistemic),
        ):
            size = (counts & members).sum()
            self.metrics.add(f"token_share/{kind}", size, num_tokens)
            self.metrics.add(f"clip_ratio/{kind}_tokens", (is_clipped & members).sum(), size)

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
