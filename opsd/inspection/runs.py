"""
The files of a run's output folder, as far as they can be read.

A run that was killed, or that is still going, leaves half-written files. What cannot be read is left out and noted.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# In the output folder
METRICS, COMPLETIONS, RECORD, STATISTICS = "metrics.jsonl", "completions.jsonl", "run_config.json", "token_statistics"
STEPS_TO_READ = 4  # early ones, late ones and some between them, at most
NUM_TOP = 5  # entries of either role at each token

# Lists with an entry for each token, and those with NUM_TOP
TOKENS = (
    "token_ids", "tokens", "kinds", "epistemic", "divergence", "student_logprob", "teacher_logprob",
    "student_entropy", "teacher_entropy", "clipped", "wrong_way",
)  # fmt: skip
TOPS = ("student_top_tokens", "teacher_top_tokens", "student_top_logprobs", "teacher_top_logprobs")
TEXTS = ("step", "problem", "reference", "answer", "student_prompt", "teacher_prompt", "truncated", "correct")
STRINGS = ("tokens", "student_top_tokens", "teacher_top_tokens")


@dataclass
class Completion:
    """
    A completion with its token statistics.

    `columns` has those of `TOKENS`, (n,), and of `TOPS`, (n, 5). Texts are lists, numbers arrays. Divergences and
    entropies are in nats, log-probabilities natural. A share or sum of the divergence takes `positive`.
    """

    step: int
    problem: str
    occurrence: int  # of the problem, among the completions of the step
    texts: dict[str, Any]
    columns: dict[str, Any]

    def __len__(self) -> int:
        return len(self.columns["tokens"])

    @property
    def positive(self) -> np.ndarray:
        """Return the divergence with 0 in place of negative values, (n,): a clip and sampled tokens have such."""
        return np.maximum(self.columns["divergence"], 0.0)


@dataclass
class Run:
    """What is known of a run."""

    name: str
    folder: Path
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    logs: list[dict[str, Any]] = field(default_factory=list)
    rollouts: list[dict[str, Any]] = field(default_factory=list)  # of the first and of the last step
    steps: list[int] = field(default_factory=list)  # that have token statistics
    completions: list[Completion] = field(default_factory=list)  # of the steps that were read
    notes: list[str] = field(default_factory=list)

    @property
    def early(self) -> list[int]:
        """The first quarter of the steps with token statistics: at least one, at most `STEPS_TO_READ`."""
        return self.steps[: _quarter(self.steps)]

    @property
    def late(self) -> list[int]:
        """The last quarter of them, less the early ones."""
        return [step for step in self.steps[-_quarter(self.steps) :] if step not in self.early]

    def of_steps(self, steps: Sequence[int]) -> list[Completion]:
        return [completion for completion in self.completions if completion.step in steps]


def _quarter(steps: Sequence[int]) -> int:
    return max(1, min(STEPS_TO_READ, len(steps) // 4))


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """
    Read the runs in the given output folders.

    Raises:
        ValueError: naming a folder that is not there, that is given twice, or that holds nothing of a run.
    """
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"OUTPUT_DIR {' '.join(map(str, folders))}: name each run once")
    return [read_run(folder) for folder in folders]


def read_run(folder: Path) -> Run:
    """Read a run; see `read_runs`."""
    if not folder.is_dir():
        raise ValueError(f"OUTPUT_DIR {folder}: there is no such folder; give the --output_dir of a training")
    if not any((folder / name).exists() for name in (METRICS, COMPLETIONS, STATISTICS)):
        raise ValueError(
            f"OUTPUT_DIR {folder}: it has neither {METRICS} nor {COMPLETIONS} nor {STATISTICS}/; give the "
            "--output_dir of a training that has logged at least once"
        )
    run = Run(name=os.path.normpath(folder), folder=folder)
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        run.settings = {group: values for group, values in record.items() if isinstance(values, dict)}
    except (OSError, ValueError, AttributeError) as error:
        run.notes.append(f"{RECORD} could not be read ({_say(error)}); the settings are left out")
    run.logs = [row for row in _read_lines(run, METRICS) if any(map(is_number, row.values()))]
    run.rollouts = _ends(_read_lines(run, COMPLETIONS))
    _read_statistics(run)
    return run


def is_number(value: Any) -> bool:
    """Whether a value of a log can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _say(error: Exception) -> str:
    return str(error).partition("\n")[0][:200] or type(error).__name__


def _read_lines(run: Run, name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file that have a step, and note how many lines are none."""
    broken = []
    try:
        with (run.folder / name).open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    yield row
                elif line.strip():
                    broken.append(number)
    except OSError as error:
        run.notes.append(f"{name} could not be read ({_say(error)})")
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        run.notes.append(f"{name}: line {broken[0]}{more} is not a row with a step, or half-written; left out")


def _ends(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the first step and of the last one."""
    first: list[dict[str, Any]] = []
    last: list[dict[str, Any]] = []
    for row in rows:
        if not first or row["step"] == first[0]["step"]:
            first.append(row)
        elif not last or row["step"] == last[0]["step"]:
            last.append(row)
        else:
            last = [row]
    return first + last


def _read_statistics(run: Run) -> None:
    """Read the token statistics of the early and of the late steps, and of some between them."""
    files: dict[int, Path] = {}
    for file in sorted((run.folder / STATISTICS).glob("step_*.parquet")):
        if (number := file.stem.removeprefix("step_")).isdecimal():
            files[int(number)] = file
    rows: dict[int, list[Completion]] = {}

    def read_first(numbers: Sequence[int]) -> None:
        """Read files until one is whole."""
        for step in numbers:
            if step not in rows:
                rows[step] = _read_file(run, step, files[step])
            if rows[step]:
                return

    steps = sorted(files)
    read_first(steps)
    read_first(steps[::-1])
    broken = {step for step, completions in rows.items() if not completions}
    run.steps = [step for step in steps if step not in broken]
    between = [step for step in run.steps if step not in run.early + run.late]
    chosen = between[:: max(1, -(-len(between) // STEPS_TO_READ))]
    for step in run.early + run.late + chosen:
        if step not in rows:
            rows[step] = _read_file(run, step, files[step])
    run.steps = [step for step in run.steps if rows.get(step, True)]
    run.completions = [completion for step in sorted(rows) for completion in rows[step]]


def _read_file(run: Run, step: int, file: Path) -> list[Completion]:
    """Return the completions of a step; those that are not whole are noted."""
    name = f"{STATISTICS}/{file.name}"
    try:
        table = pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        run.notes.append(f"{name} could not be read, perhaps half-written ({_say(error)}); left out")
        return []
    if missing := [column for column in (*TEXTS, *TOKENS, *TOPS) if column not in table.column_names]:
        run.notes.append(f"{name} has no column {', '.join(missing)}; left out")
        return []
    completions: list[Completion] = []
    seen: dict[str, int] = {}
    for number, row in enumerate(table.to_pylist()):
        try:
            completion = _completion(row, step, seen)
        except (TypeError, ValueError) as error:
            run.notes.append(f"{name}, row {number}: {_say(error)}; left out")
            continue
        if len(completion):
            completions.append(completion)
    if not completions:
        run.notes.append(f"{name} has no completion with a token; left out")
    return completions


def _completion(row: dict[str, Any], step: int, seen: dict[str, int]) -> Completion:
    """Check a row. Raise `ValueError` if its lists differ in length or hold numbers that are not finite."""
    size = len(row["tokens"])
    columns: dict[str, Any] = {}
    shapes: list[tuple[Sequence[str], tuple[int, ...]]] = [(TOKENS, (size,)), (TOPS, (size, NUM_TOP))]
    for names, shape in shapes:
        for name in names:
            values = row[name]
            if values is None or len(values) != math.prod(shape):
                found = "no" if values is None else len(values)
                raise ValueError(f"{name} has {found} entries in place of {math.prod(shape)}")
            if name in STRINGS:
                texts = [str(value) for value in values]
                columns[name] = (
                    texts if len(shape) == 1 else [texts[i : i + NUM_TOP] for i in range(0, len(texts), NUM_TOP)]
                )
                continue
            array = np.asarray(values, dtype=np.float64).reshape(shape)
            if name.endswith("logprob") or name.endswith("logprobs"):
                array = np.maximum(array, -1e4)  # a token that its role cannot sample has minus infinity
            if not np.isfinite(array).all():
                raise ValueError(f"{name} has a value that is not finite")
            columns[name] = array
    problem = str(row["problem"])
    occurrence = seen[problem] = seen.get(problem, -1) + 1
    return Completion(step, problem, occurrence, {name: row[name] for name in TEXTS}, columns)


def settings_to_show(runs: Sequence[Run], is_wanted: Callable[[str], bool]) -> list[tuple[str, list[str]]]:
    """Return the settings that differ between the runs, or for a single run those that are wanted, as texts."""
    tables = [
        {
            name: value
            for group in ("script", "model", "training")
            for name, value in run.settings.get(group, {}).items()
        }
        for run in runs
    ]
    rows = []
    for name in dict.fromkeys(name for table in tables for name in table):
        values = ["" if name not in table or table[name] is None else str(table[name]) for table in tables]
        differ = len(set(values)) > 1 and name not in ("output_dir", "logging_dir", "run_name")
        if differ if len(runs) > 1 else is_wanted(name) and values[0]:
            rows.append((name, values))
    return rows
