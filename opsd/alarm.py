"""Signs that a run is collapsing, read from what it logs: each is a rule with a threshold (docs/metrics.md)."""

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback

from data_collator import PLACEHOLDER, TRANSITION_PROMPT
from opsd.config import OPSDConfig

logger = logging.getLogger(__name__)

# A block is so many steps in a row, at least, that it has so many steps and rollouts. The first one is the start.
BLOCK_STEPS, BLOCK_ROLLOUTS = 5, 128
NUM_ERRORS = 3.0  # standard errors by which a share has to differ, beside its threshold
TRUNCATED_RISE = 0.2  # of the share of rollouts
LENGTH_BAND = (0.5, 2.0)  # times the length at the start
ENTROPY_FALL = 0.2  # times that at the start, of the student and of the teacher, whichever is lower
ENTROPY_RISE, ENTROPY_MARGIN = 3.0, 0.1  # times that at the start, and so many nats above it
ACCURACY_FALL = 0.15  # of the share of right rollouts, from the best block so far
BEST_ERRORS = 4.0  # in place of `NUM_ERRORS`, since of many blocks the best one is partly so by chance
LEAK_RISE = 0.05  # of the share of rollouts
GAIN = "_accuracy_gain"  # end of the name under which the held-out accuracy's change is logged

PHRASE_WORDS = 3
NUM_ORDINARY_ROWS = 1000  # whose texts say which of the teacher's phrases are ordinary
WORD = re.compile(r"[^\W_]+")


class Sign(NamedTuple):
    """A sign of a collapse."""

    step: int  # at which it was found
    since: int  # first step of those that show it
    finding: str
    advice: str

    def __str__(self) -> str:
        return f"sign of a collapse since step {self.since}: {self.finding}. What to try: {self.advice}"


@dataclass
class Block:
    """Means of the metrics over some steps in a row, weighted by the rollouts of each log."""

    first_step: int
    group_size: int  # rollouts of each problem in a step
    num_steps: int = 0
    num_rollouts: float = 0.0
    sums: dict[str, list[float]] = field(default_factory=dict)  # metric -> [sum, weight]

    def add(self, logs: Mapping[str, Any], num_steps: int, num_rollouts: float) -> None:
        self.num_steps, self.num_rollouts = self.num_steps + num_steps, self.num_rollouts + num_rollouts
        for name, value in logs.items():
            if isinstance(value, int | float) and math.isfinite(value):
                total = self.sums.setdefault(name, [0.0, 0.0])
                total[0], total[1] = total[0] + value * num_rollouts, total[1] + num_rollouts

    def mean(self, name: str) -> float | None:
        """Return the mean of a metric; `None` if it was not logged."""
        total, weight = self.sums.get(name, (0.0, 0.0))
        return total / weight if weight else None


class Rule(NamedTuple):
    """A sign that a metric of the training gives."""

    metric: str
    find: Callable[[float, float, Block, Block], str | None]  # (before, now, and their blocks) -> finding
    advice: str
    from_best: bool = False  # compare with the block of the highest value so far, in place of the first one


def _find_share(
    change: float, what: str, num_errors: float = NUM_ERRORS
) -> Callable[[float, float, Block, Block], str | None]:
    """Make a rule for a share of the rollouts that changes by `change`, up or down, and by `num_errors`."""

    def find(before: float, now: float, start: Block, block: Block) -> str | None:
        groups = [one.num_rollouts / one.group_size for one in (start, block)]
        share = (before * groups[0] + now * groups[1]) / sum(groups)
        error = math.sqrt(max(share * (1.0 - share), 0.0) * (1.0 / groups[0] + 1.0 / groups[1]))
        if (now - before) * math.copysign(1.0, change) < max(abs(change), num_errors * error):
            return None
        when = "at the start" if start.first_step == 1 else f"from step {start.first_step} on"
        return f"{what}: {100 * before:.0f} % {when}, {100 * now:.0f} % now"

    return find


def _find_length(before: float, now: float, start: Block, block: Block) -> str | None:
    if LENGTH_BAND[0] * before <= now <= LENGTH_BAND[1] * before:
        return None
    return f"the rollouts' mean length is {now:.0f} tokens, {before:.0f} at the start"


def _find_entropy(before: float, now: float, start: Block, block: Block) -> str | None:
    teacher = start.mean("entropy/teacher")  # a student that learns comes down to it
    if now < ENTROPY_FALL * (before if teacher is None else min(before, teacher)):
        return f"the student's entropy falls: {before:.3g} nats per token at the start, {now:.3g} now"
    if now > ENTROPY_RISE * before and now > before + ENTROPY_MARGIN:
        return f"the student's entropy explodes: {before:.3g} nats per token at the start, {now:.3g} now"
    return None


HOLD_TEACHER = "hold the teacher with --fixed_teacher or --use_ema_teacher"
EARLIER = "take a checkpoint from before"
RULES = (
    Rule(
        "completions/clipped_ratio",
        _find_share(TRUNCATED_RISE, "more rollouts reach --max_completion_length"),
        f"{EARLIER}, {HOLD_TEACHER}, or lower --learning_rate",
    ),
    Rule("completions/mean_length", _find_length, f"read the rollouts, {EARLIER}, or lower --learning_rate"),
    Rule("entropy", _find_entropy, f"{EARLIER}, lower --learning_rate, or {HOLD_TEACHER}"),
    Rule(
        "rewards/accuracy/mean",
        _find_share(-ACCURACY_FALL, "fewer rollouts are right", BEST_ERRORS),
        f"check that each row of --solution_column solves its own problem, {HOLD_TEACHER}, or {EARLIER}",
        from_best=True,
    ),
    Rule(
        "completions/leaked_ratio",
        _find_share(LEAK_RISE, "rollouts with words of the teacher's prompt"),
        f"another --teacher_prompt that speaks less of the reference, --num_loss_tokens_to_skip, or {EARLIER}",
    ),
)
HELD_OUT_ADVICE = (
    f"{EARLIER}, as --load_best_model_at_end with --metric_for_best_model eval_accuracy does, or lower --learning_rate"
)


class Alarm:
    """
    Reads the logs of a run in their order and finds signs of a collapse, each sign once.

    It compares blocks of steps with the first or the best block. A sign has to stand in two blocks in a row. What it
    finds follows from the logs alone, so that a resumed run, or metrics.jsonl read afterwards, gives the same.

    Args:
        group_size: rollouts of each problem in a step. They count as one where the error of a share is taken.
    """

    def __init__(self, group_size: int = 1):
        self._start = self._block = Block(1, group_size)
        self._best: dict[str, Block] = {}  # metric -> finished block of its highest value
        self._last_step, self._last_tokens = 0, 0
        self._suspected: dict[str, int] = {}  # metric -> first step of the block before, if it showed the sign
        self._found: set[str] = set()

    def read(self, logs: Mapping[str, Any]) -> list[Sign]:
        """Take in what was logged at a step (`step`, and name -> value), and return the signs that it completes."""
        step = logs["step"]
        signs = self._read_evaluation(step, logs)
        tokens, length = logs.get("num_generated_tokens"), logs.get("completions/mean_length")
        if tokens is None or not length or step <= self._last_step:
            return signs
        num_rollouts = (tokens - self._last_tokens) / length
        self._block.add(logs, step - self._last_step, num_rollouts)
        self._last_step, self._last_tokens = step, tokens
        if self._block.num_steps >= BLOCK_STEPS and self._block.num_rollouts >= BLOCK_ROLLOUTS:
            if self._block is not self._start:
                signs += self._compare(step, self._block)
            self._block = Block(step + 1, self._start.group_size)
        return signs

    def _compare(self, step: int, block: Block) -> list[Sign]:
        """Compare a finished block with those before it."""
        signs, suspected = [], {}
        for metric, find, advice, from_best in RULES:
            start = self._best.get(metric, self._start) if from_best else self._start
            before, now = start.mean(metric), block.mean(metric)
            if before is None or now is None:
                continue
            if from_best and now > before:
                self._best[metric] = block
            if (finding := find(before, now, start, block)) is None:
                continue
            suspected[metric] = self._suspected.get(metric, block.first_step)
            if metric in self._suspected and metric not in self._found:
                self._found.add(metric)
                signs.append(Sign(step, suspected[metric], finding, advice))
        self._suspected = suspected
        return signs

    def _read_evaluation(self, step: int, logs: Mapping[str, Any]) -> list[Sign]:
        """Compare the held-out accuracy with that of the first evaluation, paired by problem."""
        signs = []
        for name in logs:
            error = logs.get(f"{name}_standard_error")
            if not name.endswith(GAIN) or name in self._found or error is None:
                continue
            if (gain := logs[name]) < -NUM_ERRORS * error:
                self._found.add(name)
                finding = f"the held-out accuracy is {-100 * gain:.1f} ± {100 * error:.1f} points below its start"
                signs.append(Sign(step, step, finding, HELD_OUT_ADVICE))
        return signs


class CollapseAlarm(TrainerCallback):
    """
    Warns of each sign of a collapse; with `--stop_on_collapse` saves a checkpoint and ends the training at the first.

    Args:
        trainer: with `stop_reason`, which says why the training ended early.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.alarm = Alarm(trainer.args.num_generations)  # of an evaluation without a training

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.alarm = Alarm(args.num_generations)
        for logs in state.log_history:  # of the steps before a resume, whose signs have been told
            self.alarm.read(logs)

    def on_log(self, args, state, control, **kwargs) -> None:
        signs = self.alarm.read(state.log_history[-1])
        for sign in signs:
            logger.warning("step %d: %s", sign.step, sign)
        if signs and args.stop_on_collapse:
            control.should_save = control.should_training_stop = True
            findings = "; ".join(sign.finding for sign in signs)
            self.trainer.stop_reason = f"--stop_on_collapse at step {state.global_step}: {findings}"


# Words of the teacher's prompt


def _phrases(text: str) -> set[tuple[str, ...]]:
    """Return each `PHRASE_WORDS` words in a row, in lower case."""
    words = WORD.findall(text.lower())
    return set(zip(*(words[start:] for start in range(PHRASE_WORDS)), strict=False))


def teacher_phrases(args: OPSDConfig, rows: Iterable[Mapping[str, Any]]) -> set[tuple[str, ...]]:
    """
    Return the phrases that only the teacher's templates have.

    Args:
        args: settings.
        rows: examples; a phrase that their texts have is an ordinary one.
    """
    if args.teacher_context == "none":
        return set()
    teacher = [args.teacher_prompt, args.teacher_system_prompt or ""]
    teacher += [args.reasoning_prompt, TRANSITION_PROMPT] if args.reason_first else []
    found = set().union(*(_phrases(part) for text in teacher for part in PLACEHOLDER.split(text)[::2]))
    found -= _phrases(args.student_prompt)
    for row in islice(rows, NUM_ORDINARY_ROWS):
        texts = [value for value in row.values() if isinstance(value, str)]
        for text in texts + [turn["content"] for turn in row.get("history") or ()]:
            found -= _phrases(text)
    return found


class LeakDetector:
    """
    Finds words of the teacher's prompt in completions, which the student has never been shown.

    Args:
        args: settings.
        tokenizer: decodes completions.
        dataset: to train on.
    """

    def __init__(self, args: OPSDConfig, tokenizer: PreTrainedTokenizerBase, dataset: Dataset):
        self.tokenizer = tokenizer
        self.phrases = teacher_phrases(args, dataset)

    def __call__(self, completions: Sequence[list[int]]) -> list[bool]:
        """Return for each completion whether it has a phrase of the teacher's; an empty list if there are none."""
        if not self.phrases:
            return []
        texts = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        return [not self.phrases.isdisjoint(_phrases(text)) for text in texts]
