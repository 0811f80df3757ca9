"""Statistics of graded samples, as pure functions of verdicts and votes."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over problems, its standard error, and its bootstrap interval at `LEVEL`; errors need two problems."""

    mean: float | None = None
    standard_error: float | None = None
    interval: tuple[float, float] | None = None


def estimate(values: Sequence[float], seed: int = 0) -> Estimate:
    """
    Mean over problems, with errors that take the problems as the sampled units.

    Problems are independent, the samples of one problem are not. With one value for each problem (its share of right
    samples) the deviation of these values gives the standard error clustered by problem, and the percentile bootstrap
    resamples whole problems.

    Args:
        values: one for each problem, (P,).
        seed: of the bootstrap's `RESAMPLES` resamples.
    """
    array = np.asarray(values, dtype=np.float64)
    size = len(array)
    if size < 2:
        return Estimate(float(array.mean()))
    generator = np.random.default_rng(seed)
    draws = (generator.integers(size, size=(100, size)) for _ in range(RESAMPLES // 100))  # bounds the memory
    means = np.concatenate([array[drawn].mean(axis=1) for drawn in draws])  # (RESAMPLES,)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(array.mean()), float(array.std(ddof=1) / math.sqrt(size)), (float(low), float(high)))


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that of `k` samples drawn without replacement from `n`, of which `c` are right, one is right."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def pass_sizes(n: int) -> list[int]:
    """The k of pass@k: the powers of two below `n`, and `n`."""
    return [*(2**power for power in range((n - 1).bit_length())), n]


def vote_classes(answers: Sequence[str | None], equal: Callable[[str, str], bool]) -> list[int | None]:
    """
    Sort answers into classes of equal ones.

    Args:
        answers: of the samples of a problem, in their order; `None` where there is none.
        equal: whether the second of two different answers means the same as the first. It is asked for the first
            answer of each class, in order.

    Returns:
        For each sample the number of its class, in the order in which the classes appear; `None` without an answer.
    """
    numbers: dict[str, int] = {}
    first: list[str] = []  # of each class
    for answer in answers:
        if answer is not None and answer not in numbers:
            numbers[answer] = next((i for i, known in enumerate(first) if equal(known, answer)), len(first))
            if numbers[answer] == len(first):
                first.append(answer)
    return [None if answer is None else numbers[answer] for answer in answers]


def elect(classes: Sequence[int | None]) -> int | None:
    """
    Majority vote: the index of the first sample of the largest class; `None` if no sample has an answer.

    Of classes of the same size, the one that appears first in the order of the samples wins.
    """
    votes = Counter(number for number in classes if number is not None)  # most_common keeps the order of appearance
    return classes.index(votes.most_common(1)[0][0]) if votes else None
