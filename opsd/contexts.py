"""What the teacher sees in the place of `{solution}`: a registry of references, and how each is found."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from datasets import Dataset

TEACHER_CONTEXTS = (
    "solution",
    "answer",
    "rollout",
    "shortest_rollout",
    "wrong_hint",
    "donor",
    "reference_only",
    "none",
)
FALLBACKS = ("skip", "solution", "answer")


def boxed(answer: str) -> str:
    """Return what an answer alone shows as a reference."""
    return rf"\boxed{{{answer}}}"


def boxed_answers(seed: int, rows: Dataset) -> list[str]:
    """Return the answer of each row alone."""
    return [boxed(answer) for answer in rows["answer"]]


def donated_solutions(seed: int, rows: Dataset) -> list[str]:
    """
    Return for each row the solution of another one, with another problem: the next such row in a seeded random order.

    Raises:
        ValueError: if a row has no such other one.
    """
    problems, solutions = rows["problem"][:], rows["solution"][:]
    order = random.Random(seed).sample(range(len(problems)), len(problems))
    donated = [""] * len(order)
    for place, row in enumerate(order):
        others = (order[(place + distance) % len(order)] for distance in range(1, len(order)))
        donor = next((i for i in others if problems[i] != problems[row] and solutions[i] != solutions[row]), None)
        if donor is None:
            raise ValueError(
                f"--teacher_context donor: no other row has another problem and solution than {problems[row][:80]!r}"
            )
        donated[row] = solutions[donor]
    return donated


class Peer(NamedTuple):
    """A rollout as a reference for the others of its group."""

    is_correct: bool | None
    is_complete: bool  # with an end-of-sequence token
    length: int  # tokens


def _pick(usable: Sequence[bool], group_size: int, key: Callable[[int], Any] = lambda i: 0) -> list[int | None]:
    """
    Return for each rollout the index of another usable one of its group, `None` if there is none.

    It is the one with the least `key`, and of equal ones the next in a circle: so what is picked is a random rollout.
    """
    peers: list[int | None] = []
    for i in range(len(usable)):
        start, place = i - i % group_size, i % group_size
        circle = [start + (place + distance) % group_size for distance in range(1, group_size)]
        peers.append(min((j for j in circle if usable[j]), key=key, default=None))
    return peers


def right_peers(rollouts: Sequence[Peer], group_size: int) -> list[int | None]:
    """Return for each rollout another one of its group that is right and complete, if there is one."""
    return _pick([bool(peer.is_correct) and peer.is_complete for peer in rollouts], group_size)


def shortest_right_peers(rollouts: Sequence[Peer], group_size: int) -> list[int | None]:
    """Return for each rollout the shortest other one of its group that is right and complete, if there is one."""
    usable = [bool(peer.is_correct) and peer.is_complete for peer in rollouts]
    return _pick(usable, group_size, key=lambda i: rollouts[i].length)


def wrong_peers(rollouts: Sequence[Peer], group_size: int) -> list[int | None]:
    """Return for each rollout another one of its group that is wrong and complete, if there is one."""
    return _pick([peer.is_correct is False and peer.is_complete for peer in rollouts], group_size)


class Context(NamedTuple):
    """Where the reference in the teacher's prompt comes from."""

    meaning: str  # for the summary of a run
    columns: Sequence[str] = ()  # of which each row needs a text
    of_data: Callable[[int, Dataset], list[str]] | None = None  # (seed, rows) -> references, in place of the solutions
    of_group: Callable[[Sequence[Peer], int], list[int | None]] | None = None  # (rollouts, group size) -> their peers


# Registry of --teacher_context
CONTEXTS: Mapping[str, Context] = {
    "solution": Context("the solution", ("solution",)),
    "answer": Context("the final answer alone", ("answer",), of_data=boxed_answers),
    "rollout": Context("another rollout that is right", of_group=right_peers),
    "shortest_rollout": Context("the shortest other rollout that is right", of_group=shortest_right_peers),
    "wrong_hint": Context("another rollout that is wrong (a control)", of_group=wrong_peers),
    "donor": Context("another problem's solution (a control)", ("solution",), of_data=donated_solutions),
    "reference_only": Context("the solution, and not the problem (a control)", ("solution",)),
    "none": Context("what the student sees (a control)"),
}
