"""The statistics against enumeration, hand-computed values and simulation."""

import itertools

import numpy as np
import pytest

from eval.scores import elect, estimate, pass_at_k, pass_sizes, vote_classes
from opsd.grading import GradingPool


def test_pass_at_k_equals_enumeration():
    for n in range(1, 13):
        for k in range(1, n + 1):
            draws = list(itertools.combinations(range(n), k))
            for c in range(n + 1):  # the samples below c are right
                passed = sum(draw[0] < c for draw in draws) / len(draws)
                assert pass_at_k(n, c, k) == pytest.approx(passed, abs=1e-12)


def test_pass_sizes():
    assert [pass_sizes(n) for n in (1, 2, 3, 4, 12)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 8, 12]]


def test_estimate_by_hand():
    result = estimate([1.0, 0.5, 0.0])
    assert (result.mean, result.standard_error) == (0.5, pytest.approx(0.5 / 3**0.5))
    # Resamples of three: the mean is 0 or 1 with probability 1/27 each, which both lie beyond 2.5 %.
    assert result.interval == (0.0, 1.0)
    assert estimate([0.25] * 5).interval == (0.25, 0.25)
    alone = estimate([0.25])
    assert (alone.mean, alone.standard_error, alone.interval) == (0.25, None, None)


def test_intervals_cover_the_truth():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        rates = generator.beta(1, 1, size=30)  # problems of different difficulty, mean 1/2
        low, high = estimate(generator.binomial(12, rates) / 12).interval
        covered += low <= 0.5 <= high
    assert 180 <= covered <= 198  # 95 % of 200, less what a percentile bootstrap of 30 problems falls short


def test_estimate_is_the_same_each_time():
    values = np.random.default_rng(0).random(50)
    assert estimate(values) == estimate(values)
    assert estimate(values, seed=1).interval != estimate(values).interval


def test_majority_counts_equal_answers_together():
    answers = ["0.5", r"\frac12", r"\frac{1}{2}", "3", "3"]
    with GradingPool(workers=1) as pool:
        classes = vote_classes(answers, lambda known, answer: pool.submit(answer, known).result().equal is True)
    assert classes == [0, 0, 0, 1, 1]
    assert answers[elect(classes)] == "0.5"


def test_majority_rules():
    assert elect([0, 1, 1, 0]) == 0  # a tie: the class that appears first
    assert elect([None, None, None, 2, 1, 1]) == 4  # samples without an answer do not vote
    assert elect([None, None]) is None


def test_each_different_answer_is_compared_with_the_first_of_each_class():
    asked = []

    def equal(known, answer):
        asked.append((known, answer))
        return known[0] == answer[0]

    assert vote_classes(["a1", "b1", None, "a2", "a2", "b2", "a1"], equal) == [0, 1, None, 0, 0, 1, 0]
    assert asked == [("a1", "b1"), ("a1", "a2"), ("a1", "b2"), ("b1", "b2")]
