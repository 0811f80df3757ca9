"""Which rollouts are right, and what follows from it within the group of rollouts of one problem."""

import statistics
from collections.abc import Sequence

from opsd.grading import Answer, GradingPool, answer_text, extract_answer

GRADE_WORKERS = 4  # for each training process
THINK_END = "</think>"


class Verifier:
    """
    Grades completions by their final answers, as the evaluator does, in worker processes.

    Args:
        thinking: completions without a `</think>` were cut off before they came to an answer.
    """

    def __init__(self, thinking: bool):
        self.thinking = thinking
        self._pool = GradingPool(workers=GRADE_WORKERS)

    def __call__(self, completions: Sequence[str], answers: Sequence[Answer]) -> list[bool | None]:
        """Whether each completion's answer is right; `None` for problems without an answer."""
        extracted = [extract_answer(completion, self.thinking) for completion in completions]
        golds = [answer_text(answer) for answer in answers]
        verdicts = self._pool.grade_all(zip(extracted, golds, strict=True))
        return [
            verdict.equal if gold is not None and gold.strip() else None
            for verdict, gold in zip(verdicts, golds, strict=True)
        ]

    def close(self) -> None:
        self._pool.close()


def as_reference(completion: str) -> str:
    """What a completion has to show as a reference solution: all of it but thoughts that have ended."""
    return completion.rpartition(THINK_END)[2].strip()


def pick_siblings(usable: Sequence[bool], group_size: int) -> list[int | None]:
    """
    For each rollout the index of another one of its group that is usable, the next one in a circle; `None` without one.

    Args:
        usable: rollouts, of which each `group_size` in a row belong to one problem.
    """
    siblings: list[int | None] = []
    for i in range(len(usable)):
        start, place = i - i % group_size, i % group_size
        circle = [start + (place + distance) % group_size for distance in range(1, group_size)]
        siblings.append(next((j for j in circle if usable[j]), None))
    return siblings


def group_advantages(correct: Sequence[bool | None], group_size: int) -> list[float]:
    """
    Rewards, 1 for what is right and 0 otherwise, less their group's mean, over its standard deviation (+ 1e-4), as in GRPO.

    Groups in which all is right or all wrong have none; what could not be graded is left out of its group.
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
