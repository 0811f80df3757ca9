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


@dataclass(frozen=True)
class Spread:
    """
    A mean over trainings and problems, or a difference of two, and how far it may be off.

    Attributes:
        deviation: standard deviation of one training's mean; `None` with one training.
        error_of_trainings: standard error of the mean for other trainings on these problems; `None` with one training.
        error_of_problems: standard error for other problems and these trainings; `None` with one problem.
        error: standard error for other trainings and other problems; `None` unless there are two of both.
        interval: `mean` plus and minus `error` times Student's t at `LEVEL`.
    """

    mean: float
    deviation: float | None
    error_of_trainings: float | None
    error_of_problems: float | None
    error: float | None
    interval: tuple[float, float] | None


def spread(values: Sequence[Sequence[float]], minus: Sequence[Sequence[float]] | None = None) -> Spread:
    """
    Mean over trainings and problems, both taken as sampled, with the errors of the crossed random-effects model.

    There are T trainings on the same P problems. A is the variance of the trainings' means, B that of the problems'
    means, and R the mean square of what neither explains. The mean's variance is A / T + B / P - R / (T P), since A
    and B each hold R once. It is at least A / T and B / P. The interval's degrees of freedom are Satterthwaite's.

    Args:
        values: (T, P), a training's share of right samples of a problem.
        minus: (U, P), what is subtracted: other trainings on the same problems, in the same order. One row adds no
            error of trainings: the base model.
    """
    parts = [np.asarray(part, dtype=np.float64) for part in (values, minus) if part is not None]
    size = parts[0].shape[1]
    column_means = [part.mean(axis=0) for part in parts]
    per_problem = column_means[0] - (column_means[1] if minus is not None else 0)  # (P,)
    mean = float(per_problem.mean())
    sampled = [part for part in parts if len(part) > 1]
    known = len(parts[0]) > 1
    deviation = float(parts[0].mean(axis=1).std(ddof=1)) if known else None
    of_trainings = [(part.mean(axis=1).var(ddof=1) / len(part), len(part) - 1) for part in sampled]
    a = sum(variance for variance, _ in of_trainings)
    if size < 2:
        return Spread(mean, deviation, math.sqrt(a) if known else None, None, None, None)
    b = per_problem.var(ddof=1) / size
    shared = 0.0
    for part in sampled:
        rest = part - part.mean(axis=0) - part.mean(axis=1, keepdims=True) + part.mean()
        shared += (rest**2).sum() / ((len(part) - 1) * (size - 1)) / part.size
    if not known:
        return Spread(mean, None, None, math.sqrt(b), None, None)
    variance = max(a + b - shared, a, b)
    below = sum(part**2 / degrees for part, degrees in [*of_trainings, (b, size - 1)])
    reach = student_t(variance**2 / below) * math.sqrt(variance) if variance > 0 else 0.0
    return Spread(
        mean, deviation, math.sqrt(a), math.sqrt(b), math.sqrt(variance), (float(mean - reach), float(mean + reach))
    )


def student_t(degrees: float) -> float:
    """Quantile of Student's t distribution that leaves (1 - `LEVEL`) / 2 above, to three digits; `degrees` >= 1."""
    x = np.linspace(0, 50, 25_001)
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    density = scale * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
    below = 0.5 + np.cumsum((density[1:] + density[:-1]) / 2) * (x[1] - x[0])
    return float(x[1:][np.searchsorted(below, (1 + LEVEL) / 2)])


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that of `k` samples drawn without replacement from `n`, of which `c` are right, one is right."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


BUDGETS = (8192, 16384, 32768, 38912)  # tokens


def budgets(max_new_tokens: int) -> list[int]:
    """Those of `BUDGETS` up to `max_new_tokens`; below the first of them its quarter, its half and itself."""
    known = [budget for budget in BUDGETS if budget < max_new_tokens]
    return [*known, max_new_tokens] if known else sorted({max(1, max_new_tokens // part) for part in (4, 2, 1)})


def accuracy_within(verdicts: Sequence[Sequence[bool]], lengths: Sequence[Sequence[int]], budget: int) -> float:
    """
    Mean over problems of the share of samples that are right and not longer than `budget`, in [0, 1].

    It is the Avg@k of a sampling with this limit, except for samples that it would have cut off after their answer.

    Args:
        verdicts: of each sample of each problem.
        lengths: its tokens.
        budget: tokens.
    """
    return float(
        np.mean(
            [
                np.mean([right and length <= budget for right, length in zip(*problem, strict=True)])
                for problem in zip(verdicts, lengths, strict=True)
            ]
        )
    )


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
