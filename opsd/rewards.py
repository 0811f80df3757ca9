"""Grading of rollouts, and what follows from it: GRPO's reward, advantages within a group."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from opsd.grading import RIGHT, Answer, GradingPool, Row, answer_text, extract, extract_answer
from opsd.thinking import after_thought, decode_response

REWARDS = ("math", "exact_match", "last_number")
GRADE_WORKERS = 4  # for each training process


class Verifier:
    """
    Grades completions by their final answers, as the evaluator does, in worker processes.

    Args:
        thinking: completions without the end of a thought were cut off before they came to an answer.
        method: how answers are found, one of `opsd.grading.EXTRACT_METHODS`; for the verifier `math`.
        name: whose judgement is asked: `--verifier`.
    """

    def __init__(self, thinking: bool, method: str = "final", name: str = "math"):
        self.thinking = thinking
        self.method = method
        self.name = name
        self._pool = GradingPool(workers=GRADE_WORKERS)

    def __call__(
        self, completions: Sequence[str], answers: Sequence[Answer], rows: Sequence[Row]
    ) -> list[float | None]:
        """Score each completion, in [0, 1]: 1 is right. `None` without an answer, and for what cannot be judged."""
        golds = [answer_text(answer) for answer in answers]
        verdicts = [
            self._pool.submit(extract(text, self.name, self.thinking, self.method), gold, verifier=self.name, row=row)
            for text, gold, row in zip(completions, golds, rows, strict=True)
        ]
        return [
            verdict.result().score if gold is not None and gold.strip() else None
            for verdict, gold in zip(verdicts, golds, strict=True)
        ]


def make_reward(
    name: str, thinking: bool, tokenizer: PreTrainedTokenizerBase, verifier: str = "math"
) -> Callable[..., list[float]]:
    """
    Make a reward function for TRL: 1 for a right final answer, else 0; or what another verifier says.

    Args:
        name: one of `REWARDS`. "math" compares values, as the evaluator does. "exact_match" wants the very text of the
            answer in the last box, as the release does. "last_number" is "math" of the last number of the response.
        thinking: responses without the end of a thought were cut off before an answer (not for "exact_match").
        tokenizer: decodes the responses. TRL's texts lack special tokens, which the marks of a thought may be.
        verifier: `--verifier`; another one than "math" goes with the name "math". What it cannot judge gets 0.
    """

    def exact_match(completions: Sequence, answer: Sequence[str], **_: Any) -> list[float]:
        boxed = [extract_answer(message["content"], method="release") for (message,) in completions]
        return [float(text == gold) for text, gold in zip(boxed, answer, strict=True)]

    if name == "exact_match":
        return exact_match
    grade = Verifier(thinking, "last_number" if name == "last_number" else "final", verifier)

    def math(
        completion_ids: Sequence[list[int]],
        answer: Sequence[str],
        row: Sequence[Row],
        log_metric: Callable[[str, float], None],
        **_: Any,
    ) -> list[float]:
        scores = grade([decode_response(tokenizer, ids) for ids in completion_ids], answer, row)
        if verifier != "math":  # whose mean reward is the share of right ones
            judged = [score for score in scores if score is not None]
            log_metric("rewards/ungraded_ratio", 1 - len(judged) / len(scores))
            if judged:
                log_metric("rewards/accuracy/mean", statistics.fmean(score >= RIGHT for score in judged))
        return [score or 0.0 for score in scores]

    math.__name__ = verifier.rpartition(":")[2]  # in the metrics
    return math


def group_advantages(scores: Sequence[float | None], group_size: int) -> list[float]:
    """
    Compute GRPO's advantages: (reward - mean) / (standard deviation + 1e-4) within each group.

    Groups of equal rewards have none; what could not be graded is left out of its group.

    Args:
        scores: rewards of rollouts, of which each `group_size` in a row belong to one problem.
    """
    advantages = []
    for start in range(0, len(scores), group_size):
        group = scores[start : start + group_size]
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
