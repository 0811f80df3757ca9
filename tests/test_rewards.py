"""Grades of rollouts by hand, and what follows from them: correct peers, advantages, references."""

import numpy as np
import pytest

from opsd.contexts import Peer, right_peers, wrong_peers
from opsd.rewards import Verifier, as_reference, group_advantages


def test_verifier():
    completions = [r"so \boxed{46}", r"so \boxed{47}", "so 46", r"\boxed{46.0}", r"\boxed{46}", r"\boxed{46}"]
    verifier = Verifier(thinking=False)
    answers = ["46", "46", "46", "46", None, " "]
    assert verifier(completions, answers, [{}] * 6) == [True, False, False, True, None, None]


def test_verifier_of_last_numbers():
    verifier = Verifier(thinking=False, method="last_number")
    assert verifier(["so 46", "46 or 47", "1,046"], ["46", "46", "1046"], [{}] * 3) == [True, False, True]


@pytest.mark.parametrize(("thinking", "unfinished"), [(False, True), (True, False)])
def test_thoughts_that_have_not_ended_have_no_answer_in_thinking_mode(thinking, unfinished):
    verifier = Verifier(thinking)
    completions = [r"\boxed{46}", r"\boxed{47}</think>\boxed{46}", r"\boxed{46}</think>\boxed{47}"]
    assert verifier(completions, ["46"] * 3, [{}] * 3) == [unfinished, True, False]


@pytest.mark.parametrize(
    ("usable", "group_size", "expected"),
    [
        ([True, True, True], 3, [1, 2, 0]),  # the next one, and round the circle
        ([True, False, False, True], 4, [3, 3, 3, 0]),
        ([False, True, False], 3, [1, None, 1]),  # never itself
        ([False, False], 2, [None, None]),
        ([True, False, False, True], 2, [None, 0, 3, None]),  # not beyond the group
        ([True], 1, [None]),
        ([], 4, []),
    ],
)
def test_correct_peers(usable, group_size, expected):
    rollouts = [Peer(is_correct=is_usable, is_complete=True, length=1) for is_usable in usable]
    assert right_peers(rollouts, group_size) == expected
    assert wrong_peers([peer._replace(is_correct=not peer.is_correct) for peer in rollouts], group_size) == expected
    assert right_peers([peer._replace(is_complete=False) for peer in rollouts], group_size) == [None] * len(usable)


def test_advantages_against_numpy():
    correct = [True, False, False, True, True, True, True, False, True, True, True, True, False, False, False, False]
    rewards = np.array(correct, dtype=float).reshape(4, 4)
    expected = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)
    advantages = group_advantages(correct, 4)
    assert advantages == pytest.approx(expected.ravel().tolist())
    assert advantages[0] > 0.0 > advantages[1]
    assert advantages[8:] == [0.0] * 8  # all right, all wrong


def test_ungraded_rollouts_are_left_out_of_the_advantages():
    with_gaps = group_advantages([True, None, False, False], 4)
    assert with_gaps[1] == 0.0
    assert [with_gaps[i] for i in (0, 2, 3)] == pytest.approx(group_advantages([True, False, False], 3))
    assert group_advantages([None, True, None, None], 2) == [0.0] * 4


@pytest.mark.parametrize(
    ("completion", "reference"),
    [
        ("So \\boxed{5}", "So \\boxed{5}"),
        ("<think>\nWell.\n</think>\n\nSo \\boxed{5} ", "So \\boxed{5}"),
        ("<think>a</think>b</think>\nc", "c"),
        ("<think>\nnever ends", "<think>\nnever ends"),
    ],
)
def test_reference_of_a_completion(completion, reference):
    assert as_reference(completion) == reference
