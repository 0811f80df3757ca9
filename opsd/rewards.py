"""Grading of rollouts, and what follows from it: GRPO's reward, advantages within a group."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from opsd.grading import Answer, GradingPool, answer_text, extract_answer
from opsd.thinking import after_thought, decode_response

REWARDS = ("math", "exact_match", "last_number")
GRADE_WORKERS = 4  # for each training process


class Verifier:
    """
    Grades completions by their final answers, as the evaluator does, in worker processes.

    Args:
        thinking: completions without the end of a thought were cut off before they came to an answer.
        method: how answers are found, one of `opsd.grading.EXTRACT_METHODS`.
    """

    def __init__(self, thinking: bool, method: str = "final"):
        self.thinking = thinking
        self.method = method
        self._pool = GradingPool(workers=GRADE_WORKERS)

    def __call__(self, completions: Sequence[str], answers: Sequence[Answer]) -> list[bool | None]:
        """True for each completion whose answer is right; `None` for problems without an answer."""
        extracted = [extract_answer(completion, self.thinking, self.method) for completion in completions]
        golds = [answer_text(answer) for answer in answers]
        verdicts = self._pool.grade_all(zip(extracted, golds, strict=True))
        return [
            verdict.equal if gold is not None and gold.strip() else None
            for verdict, gold in zip(verdicts, golds, strict=True)
        ]


def make_reward(name: str, thinking: bool, tokenizer: PreTrainedTokenizerBase) -> Callable[..., list[float]]:
    """
    Make a reward function for TRL: 1 for a right final answer, else 0.

    Args:
        name: one of `REWARDS`. "math" compares values, as the evaluator does. "exact_match" wants the very text of the
            answer in the last box, as the release does. "last_number" is "math" of the last number of the response.
        thinking: responses without the end of a thought were cut off before an answer (not for "exact_match").
        tokenizer: decodes the responses. TRL's texts lack special tokens, which the marks of a thought may be.
    """

    def exact_match(completions: Sequence, answer: Sequence[str], **_: Any) -> list[float]:
        boxed = [extract_answer(message["content"], method="release") for (message,) in completions]
        return [float(text == gold) for text, gold in zip(boxed, answer, strict=True)]

    if name == "exact_match":
        return exact_match
    verifier = Verifier(thinking, "last_number" if name == "last_number" else "final")

    def math(completion_ids: Sequence[list[int]], answer: Sequence[str], **_: Any) -> list[float]:
        correct = verifier([decode_response(tokenizer, ids) for ids in completion_ids], answer)
        return [float(is_correct is True) for is_correct in correct]

    return math


def group_advantages(correct: Sequence[bool | None], group_size: int) -> list[float]:
    """
    Compute GRPO's advantages: (reward - mean) / (standard deviation + 1e-4) within each group, with reward 1 for a
    right answer and 0 for a wrong one.

    Groups in which all is right or all wrong have none; what could not be graded is left out of its group.

    Args:
        correct: of rollouts, of which each `group_size` in a row belong to one problem.
    """
    advantages = []
    for start in range(0, len(correct), group_size):
        group = correct[start : start + group_size]
        rewards = [float(value) for value in group if value is not None]
        if len(rewards) < 2:
            advantages += [0.0] * group_size
            continue
        mean, deviation = statistics.fmean(rewards), statistics.stdev(rewards)
        advantages += [0.0 if value is None else (float(value) - mean) / (deviation + 1e-4) for value in group]
    return advantages


def as_reference(completion: str) -> str:
    """Return what a completion shows as a reference solution: what follows its thoughts."""
    answer = after_thought(completion)
    return (completion if answer is None else answer).strip()
