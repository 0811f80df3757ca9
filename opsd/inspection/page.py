"""The page itself: one file that needs nothing else, made from the runs by a template."""

import logging
import math
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from opsd.inspection.definitions import PAGE, Definition, read_definitions
from opsd.inspection.runs import Completion, Run, is_number, settings_to_show
from opsd.inspection.tokens import KINDS, describe, kind_name, summarize

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).resolve().parent
MAX_BYTES = 5_000_000
MAX_RUNS = 6
MAX_TOKENS = 24_000  # with their statistics, over all runs
MAX_COMPLETION_TOKENS = 1_500
MAX_POINTS = 400  # of a curve
MAX_TEXT = 6_000  # characters of a prompt or rollout
NUM_ROLLOUTS = 6  # of the first step and of the last one
SETTINGS = (
    "model_name_or_path", "dataset_name", "learning_rate", "max_steps", "effective_batch_size",
    "per_device_train_batch_size", "max_completion_length", "temperature", "beta", "jsd_token_clip", "jsd_clip_mode",
    "fixed_teacher", "use_tinker_loss", "student_thinking", "teacher_thinking", "seed",
)  # fmt: skip
END_OF_RUN = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "train_loss")
VERDICTS = {"True": "right", "False": "wrong"}
NEWLINES = {"\n": "↵\n", "\t": "⇥\t", "\r": "␍"}
OTHERS = "Others, which docs/metrics.md does not define"


def visible(text: str) -> str:
    """Show characters that steer the display by their code: no text may turn its neighbours round or hide itself."""
    if text.isprintable() and text.isascii():
        return text
    shown = []
    for character in text:
        if character in "\n\t":
            shown.append(character)
        elif unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
            shown.append(f"⟨U+{ord(character):04X}⟩")
        else:
            shown.append(character)
    return "".join(shown)


def visible_token(text: str) -> str:
    """The same for a token by itself: line breaks have a mark, and so have spaces at its ends."""
    marked = visible(text)
    inner = marked.strip(" ")
    start = len(marked) - len(marked.lstrip(" ")) if inner else len(marked)
    end = len(marked) - start - len(inner)
    marked = "␣" * start + inner + "␣" * end
    return marked.replace("\n", "↵").replace("\t", "⇥") or "∅"


def cut(text: Any, limit: int = MAX_TEXT) -> str:
    """Return a text for the page, without what goes beyond the limit."""
    text = visible("" if text is None else str(text))
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} more characters)"


def number(value: float | None, digits: int = 3) -> str:
    """Write a number with some significant digits."""
    if value is None:
        return ""
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.{digits - 1}e}"
    if float(value).is_integer() or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


# Curves


def find_curves(runs: Sequence[Run]) -> dict[str, list[dict[str, list[list[float]]]]]:
    """
    Return metric -> for each run {"train": points, "eval": points}, each point [step, value].

    A metric of an evaluation stands with the one of the training. More than `MAX_POINTS` are thinned evenly.
    """
    curves: dict[str, list[dict[str, list[list[float]]]]] = {}
    for index, run in enumerate(runs):
        for row in run.logs:
            for name, value in row.items():
                if name == "step" or name in END_OF_RUN or not is_number(value):
                    continue
                base, kind = (name.removeprefix("eval_"), "eval") if name.startswith("eval_") else (name, "train")
                points = curves.setdefault(base, [{"train": [], "eval": []} for _ in runs])[index][kind]
                points.append([row["step"], float(f"{value:.6g}")])
    for parts in curves.values():
        for part in parts:
            for kind, points in part.items():
                part[kind] = thin(points)
    return curves


def thin(points: list[list[float]]) -> list[list[float]]:
    """Keep at most about `MAX_POINTS` points, with the first and the last."""
    stride = math.ceil(len(points) / MAX_POINTS)
    return points if stride <= 1 else points[:-1:stride] + points[-1:]


def group_curves(
    curves: Mapping[str, Sequence[Any]], definitions: Mapping[str, Definition], runs: Sequence[Run]
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return heading -> panels, in the order of the definitions; each panel has its numbers as a table."""
    order = [name for name in definitions if name in curves] + sorted(
        name for name in curves if name not in definitions
    )
    groups: dict[str, list[dict[str, Any]]] = {}
    for name in order:
        rows = []
        for index, part in enumerate(curves[name]):
            for kind, points in part.items():
                if points:
                    values = [value for _, value in points]
                    rows.append(
                        {
                            "run": index,
                            "kind": kind,
                            "values": [number(v) for v in (values[0], values[-1], min(values), max(values))],
                        }
                    )
        definition = definitions.get(name)
        heading = definition.section if definition else OTHERS
        groups.setdefault(heading, []).append({"name": name, "definition": definition, "rows": rows})
    return list(groups.items())


# Completions


def choose_completions(run: Run, max_tokens: int) -> list[Completion]:
    """
    Choose completions within a number of tokens: each problem's first and last one, then those between.

    The first problem is always there.
    """
    by_problem: dict[tuple[str, int], list[Completion]] = {}
    for completion in run.completions:
        by_problem.setdefault((completion.problem, completion.occurrence), []).append(completion)
    ends = [c for chosen in by_problem.values() for c in (chosen[0], *chosen[1:][-1:])]
    between = [c for chosen in by_problem.values() for c in chosen[1:-1]]
    kept, size = [], 0
    for index, completion in enumerate(ends + between):
        size += min(len(completion), MAX_COMPLETION_TOKENS)
        if size > max_tokens and index >= 2:
            break
        kept.append(completion)
    order = list(by_problem)
    return sorted(kept, key=lambda c: (order.index((c.problem, c.occurrence)), c.step))


class Vocabulary:
    """The different tokens on the page, each once."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def encode(self, texts: Sequence[str]) -> list[int]:
        return [self.numbers.setdefault(text, len(self.numbers)) for text in texts]


def encode_completion(completion: Completion, run: int, vocabulary: Vocabulary) -> dict[str, Any]:
    """Return a completion for the script of the page: numbers are rounded, tokens stand by number."""
    shown = min(len(completion), MAX_COMPLETION_TOKENS)
    columns = {name: values[:shown] for name, values in completion.columns.items()}

    def rounded(name: str, digits: int) -> list[float]:
        return [int(v) if v == int(v) else v for v in np.round(columns[name].ravel(), digits).tolist()]

    def top_tokens(name: str) -> list[int]:
        return vocabulary.encode([text for row in columns[name] for text in row])

    return {
        "run": run,
        "step": completion.step,
        "correct": completion.texts["correct"],
        "truncated": bool(completion.texts["truncated"]),
        "total": len(completion),
        "mean": float(completion.columns["divergence"].mean()),
        "tokens": vocabulary.encode(columns["tokens"]),
        "kinds": columns["kinds"].astype(int).tolist(),
        "epistemic": columns["epistemic"].astype(int).tolist(),
        "wrong": columns["wrong_way"].astype(int).tolist(),
        "divergence": rounded("divergence", 4),
        "clipped": rounded("clipped", 3),
        "student": rounded("student_logprob", 3),
        "teacher": rounded("teacher_logprob", 3),
        "studentEntropy": rounded("student_entropy", 3),
        "teacherEntropy": rounded("teacher_entropy", 3),
        "studentTop": top_tokens("student_top_tokens"),
        "teacherTop": top_tokens("teacher_top_tokens"),
        "studentTopLog": rounded("student_top_logprobs", 3),
        "teacherTopLog": rounded("teacher_top_logprobs", 3),
    }


def page_data(runs: Sequence[Run], curves: Mapping[str, Any], max_tokens: int) -> dict[str, Any]:
    """Return what the script of the page draws."""
    vocabulary, left_out = Vocabulary(), 0
    problems: dict[tuple[str, int], dict[str, Any]] = {}
    completions: list[dict[str, Any]] = []
    for index, run in enumerate(runs):
        chosen = choose_completions(run, max_tokens // len(runs))
        left_out += len(run.completions) - len(chosen)
        for completion in chosen:
            texts = completion.texts
            problem = problems.setdefault(
                (completion.problem, completion.occurrence),
                {
                    "problem": cut(completion.problem),
                    "occurrence": completion.occurrence,
                    "reference": cut(texts["reference"]),
                    "answer": cut(texts["answer"]),
                    "studentPrompt": cut(texts["student_prompt"]),
                    "teacherPrompt": cut(texts["teacher_prompt"]),
                    "completions": [],
                },
            )
            problem["completions"].append(len(completions))
            completions.append(encode_completion(completion, index, vocabulary))
    values = [c.positive for run in runs for c in run.completions]
    scale = float(np.quantile(np.concatenate(values), 0.995)) if values else 0.0
    return {
        "runs": [run.name for run in runs],
        "curves": curves,
        "vocabulary": [[visible_token(text), _in_text(text)] for text in vocabulary.numbers],
        "kinds": [kind_name(kind) for kind in range(len(KINDS))],
        "problems": list(problems.values()),
        "completions": completions,
        "scale": max(scale, 1e-9),
        "leftOut": left_out,
    }


def _in_text(token: str) -> str:
    """A token as it stands in the running text: line breaks have a mark and break."""
    shown = visible(token)
    return "".join(NEWLINES.get(character, character) for character in shown)


def choose_rollouts(run: Run) -> list[dict[str, Any]]:
    """Return a few rollouts of the first step and of the last one, with their texts cut."""
    chosen: list[dict[str, Any]] = []
    for step in dict.fromkeys(row["step"] for row in run.rollouts):
        for row in [row for row in run.rollouts if row["step"] == step][:NUM_ROLLOUTS]:
            texts = {name: cut(row.get(name)) for name in ("prompt", "completion", "answer", "rationale")}
            verdict = VERDICTS.get(str(row.get("correct")), "not graded")
            size = row.get("num_tokens")
            chosen.append(texts | {"step": step, "verdict": verdict, "num_tokens": size, "cut": row.get("truncated")})
    return chosen


# The page


def make_page(runs: Sequence[Run]) -> str:
    """
    Return the page of the runs as HTML, below `MAX_BYTES`: with fewer completions if need be.

    Raises:
        ValueError: for more than `MAX_RUNS` runs, or if even few completions make it too large.
    """
    if len(runs) > MAX_RUNS:
        raise ValueError(f"OUTPUT_DIR: {len(runs)} runs; give at most {MAX_RUNS}")
    notes = []
    try:
        definitions = read_definitions()
    except (OSError, ValueError) as error:
        definitions = {}
        notes.append(f"{PAGE} could not be read ({error}); the definitions of the metrics are left out")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"number": number, "percent": percent, "token": visible_token, "text": visible, "cut": cut}
    curves = find_curves(runs)
    context = {
        "runs": runs,
        "notes": notes,
        "settings": settings_to_show(runs, lambda name: name in SETTINGS),
        "groups": group_curves(curves, definitions, runs),
        "spans": [
            [
                (name, describe(steps), summarize(run.of_steps(steps), steps))
                for name, steps in (("early", run.early), ("late", run.late))
                if steps
            ]
            for run in runs
        ],
        "rollouts": [choose_rollouts(run) for run in runs],
        "style": (FOLDER / "report.css").read_text(encoding="utf-8"),
        "script": (FOLDER / "report.js").read_text(encoding="utf-8"),
    }
    template = environment.get_template("report.html")
    max_tokens = MAX_TOKENS
    while True:
        html = template.render(context | {"data": page_data(runs, curves, max_tokens)})
        if len(html.encode()) < MAX_BYTES:
            return html
        max_tokens //= 2
        if max_tokens < 100:
            raise ValueError(f"the page would have {len(html.encode()):,} bytes; give fewer runs")
