"""How much each token counts in the divergence: a registry of weights, by place, entropy or divergence."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from data_collator import MicroBatch
from opsd.losses import TokenLosses, TokenStatistics
from opsd.metrics import Metrics

NAMES = ("none", "growing", "falling", "student_entropy", "teacher_certainty", "top_entropy", "top_divergence")
TOP_ONE_IN = 5  # of a completion's tokens, so many times fewer are its top ones


class Places(NamedTuple):
    """Where the N tokens of the loss stand: among those of their own completion, which lies in one micro-batch."""

    rows: Tensor  # (N,), int64, row of the micro-batch
    places: Tensor  # (N,), int64, from 0
    lengths: Tensor  # (N,), int64, number of the completion's tokens that are in the loss


def find_places(batch: MicroBatch) -> Places:
    """Number the tokens of the loss within each completion. Reads nothing from the accelerator."""
    rows = batch.token_places()[0]
    counts = batch.loss_mask.sum(1)  # (B,)
    starts = counts.cumsum(0) - counts  # (B,), `rows` is sorted
    return Places(rows, torch.arange(len(rows), device=rows.device) - starts[rows], counts[rows])


def top_tokens(values: Tensor, places: Places) -> Tensor:
    """Mark the fifth, rounded up, of each completion's tokens with the largest values, both (N,)."""
    order = values.argsort(descending=True, stable=True)
    order = order[places.rows[order].argsort(stable=True)]  # completion by completion, each from its largest
    numbers = torch.arange(len(order), device=order.device)
    ranks = torch.empty_like(order).scatter_(0, order, numbers) - (numbers - places.places)  # within the completion
    return ranks < (places.lengths + TOP_ONE_IN - 1) // TOP_ONE_IN


class Weights(NamedTuple):
    """A kind of token weights."""

    meaning: str  # for the summary of a run
    compute: Callable[[TokenStatistics, Places], Tensor]  # -> (N,)


# Registry of --token_weights. Each weight depends on its token or on its completion alone, so that it is the same in
# any micro-batch. Those by place have the mean 1 in each completion, all others lie in [0, 1].
TOKEN_WEIGHTS: Mapping[str, Weights] = {
    "growing": Weights(
        "growing with the place in the completion, from 0 to 2",
        lambda statistics, places: (2 * places.places + 1).to(statistics.divergence.dtype) / places.lengths,
    ),
    "falling": Weights(
        "falling with the place in the completion, from 2 to 0",
        lambda statistics, places: 2 - (2 * places.places + 1).to(statistics.divergence.dtype) / places.lengths,
    ),
    "student_entropy": Weights(
        "1 - exp(-entropy of the student)", lambda statistics, places: -torch.expm1(-statistics.student_entropy)
    ),
    "teacher_certainty": Weights(
        "exp(-entropy of the teacher)", lambda statistics, places: (-statistics.teacher_entropy).exp()
    ),
    "top_entropy": Weights(
        "1 for the fifth of a completion's tokens at which the student's entropy is largest, 0 for the others",
        lambda statistics, places: top_tokens(statistics.student_entropy, places).to(statistics.divergence.dtype),
    ),
    "top_divergence": Weights(
        "1 for the fifth of a completion's tokens at which the divergence is largest, 0 for the others",
        lambda statistics, places: top_tokens(statistics.divergence, places).to(statistics.divergence.dtype),
    ),
}


class TokenWeights:
    """
    Multiplies each token's loss by its weight, a constant for the gradient, and logs the weights.

    The denominator of the loss stays the number of tokens (times the weights of their rollouts). With weights by place
    that is the sum of all weights too. With the others it is not: the sum would be known only after all forward passes
    of an optimizer step. The loss is then `token_weights/mean` times the weighted mean.

    Args:
        name: key of `TOKEN_WEIGHTS`, or "none".
        metrics: where they are logged.
    """

    def __init__(self, name: str, metrics: Metrics):
        self.name, self.metrics = name, metrics

    def compute(self, batch: MicroBatch, statistics: TokenStatistics) -> Tensor:
        """Return the weights of the tokens of the loss, (N,), detached."""
        return TOKEN_WEIGHTS[self.name].compute(statistics, find_places(batch))

    def apply(self, batch: MicroBatch, losses: TokenLosses) -> TokenLosses:
        """Weigh the losses of a micro-batch, whose statistics stay as they are."""
        if self.name == "none":
            return losses
        weights = self.compute(batch, losses.statistics)
        counts = batch.of_tokens(batch.weights) > 0.0
        counted, num_tokens = weights.double().where(counts, 0.0), counts.sum()
        self.metrics.add("token_weights/mean", counted.sum(), num_tokens)
        self.metrics.add("token_weights/mean_square", counted.square().sum(), num_tokens)
        return losses._replace(loss=losses.loss * weights)


def effective_share(values: dict[str, float]) -> dict[str, float]:
    """
    Return the effective share of the tokens, (sum w)^2 / (n sum w^2), to log it beside `values`, which has the means.

    With equal weights it is 1. So many of the n tokens, weighed alike, would count as much.
    """
    if not values.get("token_weights/mean_square"):
        return {}
    return {"token_weights/effective_share": values["token_weights/mean"] ** 2 / values["token_weights/mean_square"]}
