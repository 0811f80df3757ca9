"""Where the divergence lies: by token, by place, by position in the completion and by kind of token."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from opsd.inspection.runs import Completion

KINDS = ("other", "style", "mathematics")  # by their numbers in the files
EPISTEMIC = "epistemic words"
FIRST_TOKENS = 4
CONTEXT = (10, 3)  # tokens before and after a place
NUM_ROWS = 12


@dataclass
class Place:
    """A token of a completion in its context, and what the teacher would have said."""

    step: int
    problem: str
    before: str
    token: str
    after: str
    wanted: str
    divergence: float  # nats
    share: float
    position: int  # from 0


@dataclass
class TokenRow:
    """All occurrences of a sampled token."""

    token: str
    token_id: int
    kind: str
    share: float
    count: int
    mean: float  # nats
    wanted: list[str]  # the teacher's most probable other tokens there, by their divergence
    place: Place  # the one with the largest divergence


@dataclass
class Bar:
    """A class of tokens."""

    label: str
    count: int
    mean: float  # nats
    share: float
    clipped: float  # mean of the share that the clip cuts


@dataclass
class Summary:
    """The completions of some steps."""

    steps: list[int]
    num_completions: int
    num_tokens: int
    mean: float  # nats per token, after the clip
    num_negative: int
    tokens: list[TokenRow] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    positions: list[Bar] = field(default_factory=list)
    kinds: list[Bar] = field(default_factory=list)


def describe(steps: Sequence[int]) -> str:
    """Say which steps: `step 1`, `steps 1, 11`."""
    return f"step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps))}"


def summarize(completions: Sequence[Completion], steps: list[int]) -> Summary | None:
    """Return where the divergence of the completions lies, `None` if there are none."""
    if not completions:
        return None
    divergence = np.concatenate([completion.columns["divergence"] for completion in completions])  # (N,)
    total = np.maximum(divergence, 0.0).sum()
    places = _largest_places(completions, total)
    summary = Summary(
        steps, len(completions), len(divergence), float(divergence.mean()), int((divergence < 0).sum()), places=places
    )
    if total > 0:
        summary.tokens = _largest_tokens(completions, total)
    summary.positions = _bars(completions, total, _position_classes)
    summary.kinds = _bars(completions, total, _kind_classes)
    return summary


def _share(value: float, total: float) -> float:
    return float(value / total) if total > 0 else 0.0


def _wanted(completion: Completion, position: int) -> str:
    """The teacher's most probable token, or the next one where that is the token itself."""
    token, tops = completion.columns["tokens"][position], completion.columns["teacher_top_tokens"][position]
    return next((top for top in tops if top != token), tops[0])


def make_place(completion: Completion, position: int, total: float) -> Place:
    """Return a token in its context."""
    tokens, (before, after) = completion.columns["tokens"], CONTEXT
    value = float(completion.positive[position])
    return Place(
        completion.step,
        completion.problem,
        "".join(tokens[max(0, position - before) : position]),
        tokens[position],
        "".join(tokens[position + 1 : position + 1 + after]),
        _wanted(completion, position),
        value,
        _share(value, total),
        position,
    )


def _largest_places(completions: Sequence[Completion], total: float) -> list[Place]:
    found = []
    for completion in completions:
        values = completion.positive
        for position in np.argsort(-values, kind="stable")[:NUM_ROWS]:
            if values[position] > 0:
                found.append((float(values[position]), completion, int(position)))
    found.sort(key=lambda entry: -entry[0])
    return [make_place(completion, position, total) for _, completion, position in found[:NUM_ROWS]]


def _largest_tokens(completions: Sequence[Completion], total: float) -> list[TokenRow]:
    sums: dict[int, float] = defaultdict(float)
    counts: Counter[int] = Counter()
    largest: dict[int, tuple[float, Completion, int]] = {}
    wanted: dict[int, Counter[str]] = defaultdict(Counter)
    for completion in completions:
        ids, values = completion.columns["token_ids"].astype(int).tolist(), completion.positive.tolist()
        for position, (token_id, value) in enumerate(zip(ids, values, strict=True)):
            sums[token_id] += value
            counts[token_id] += 1
            wanted[token_id][_wanted(completion, position)] += value
            if token_id not in largest or value > largest[token_id][0]:
                largest[token_id] = (value, completion, position)
    rows = []
    for token_id in sorted(sums, key=lambda token_id: -sums[token_id])[:NUM_ROWS]:
        if sums[token_id] <= 0:
            break
        _, completion, position = largest[token_id]
        rows.append(
            TokenRow(
                token=completion.columns["tokens"][position],
                token_id=token_id,
                kind=kind_name(completion.columns["kinds"][position]),
                share=_share(sums[token_id], total),
                count=counts[token_id],
                mean=sums[token_id] / counts[token_id],
                wanted=[text for text, value in wanted[token_id].most_common(3) if value > 0],
                place=make_place(completion, position, total),
            )
        )
    return rows


def kind_name(kind: float) -> str:
    """Return the name of a kind, also of one that this page does not know."""
    number = int(kind)
    return KINDS[number] if 0 <= number < len(KINDS) else f"kind {number}"


def _position_classes(completion: Completion) -> dict[str, np.ndarray]:
    """The first tokens, and the quarters of the completion."""
    size = len(completion)
    quarter = np.arange(size) * 4 // size
    classes = {f"first {FIRST_TOKENS} tokens": np.arange(size) < FIRST_TOKENS}
    return classes | {f"quarter {number + 1}": quarter == number for number in range(4)}


def _kind_classes(completion: Completion) -> dict[str, np.ndarray]:
    kinds = completion.columns["kinds"]
    known = {kind_name(number): kinds == number for number in (1, 2, 0)}
    others = {kind_name(number): kinds == number for number in np.unique(kinds) if number not in (0, 1, 2)}
    return known | others | {EPISTEMIC: completion.columns["epistemic"].astype(bool)}


def _bars(completions: Sequence[Completion], total: float, classes) -> list[Bar]:
    """Return a bar for each class of tokens; classes may overlap."""
    parts: dict[str, list[np.ndarray]] = defaultdict(list)
    for completion in completions:
        values = np.stack([completion.columns["divergence"], completion.positive, completion.columns["clipped"]])
        for label, chosen in classes(completion).items():
            parts[label].append(values[:, chosen])
    bars = []
    for label, arrays in parts.items():
        divergence, positive, clipped = np.concatenate(arrays, axis=1)  # (N,) each
        size = len(divergence)
        mean, cut = (float(divergence.mean()), float(clipped.mean())) if size else (0.0, 0.0)
        bars.append(Bar(label, size, mean, _share(positive.sum(), total), cut))
    return bars
