"""What a run leaves behind: its metrics line by line, their curves, what was learned and how to evaluate it."""

import json
import math
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from opsd.run.terminal import share_right

ROOT = Path(__file__).resolve().parents[2]
METRICS, CURVES = "metrics.jsonl", "training.png"

# title of a panel -> metrics in it
PANELS = {
    "loss": ("loss",),
    "divergence (nats per token)": ("divergence",),
    "share right": ("share right",),
    "held-out accuracy": ("accuracy",),
    "length (tokens)": ("completions/mean_length",),
    "entropy (nats per token)": ("entropy", "entropy/teacher"),
}


def append_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write each row as a line of JSON after those that are there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write("".join(json.dumps(row) + "\n" for row in rows))


def drop_later_steps(file: Path, step: int) -> None:
    """Leave out the lines after `step`, which a run that goes on from there writes again."""
    if not file.is_file():
        return
    partial = file.with_name(f"{file.name}.partial")
    with file.open(encoding="utf-8") as lines, partial.open("w", encoding="utf-8") as kept:
        for line in lines:
            try:
                is_later = json.loads(line)["step"] > step
            except json.JSONDecodeError:  # the last line of a killed run
                break
            if is_later:
                break
            kept.write(line)
    partial.replace(file)


def metrics_row(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of transformers' `log_history` with its step first; numbers that JSON does not have become null."""
    values = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in entry.items()
    }
    return {"step": values.pop("step")} | values


class ReportCallback(TrainerCallback):
    """Writes metrics.jsonl with each log, and training.png with each checkpoint."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Begin the file with the logs before the checkpoint from which training goes on."""
        if state.is_world_process_zero:
            (file := Path(args.output_dir, METRICS)).unlink(missing_ok=True)
            append_lines(file, map(metrics_row, state.log_history))

    def on_log(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            append_lines(Path(args.output_dir, METRICS), [metrics_row(state.log_history[-1])])

    def on_save(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            plot_curves(state.log_history, Path(args.output_dir, CURVES))


def curve(logs: Sequence[Mapping[str, Any]], name: str, prefix: str = "") -> list[tuple[int, float]]:
    """(step, value) of a metric; `share right` stands for the one that the program grades with."""
    points = []
    for entry in logs:
        values = {key.removeprefix(prefix): value for key, value in entry.items() if key.startswith(prefix)}
        value = share_right(values) if name == "share right" else values.get(name)
        if value is not None:
            points.append((entry["step"], value))
    return points


def plot_curves(logs: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Plot the metrics of `PANELS` that were logged over the steps, those of evaluations with dots and error bars."""
    from matplotlib.figure import Figure  # here, since no flag is read slower for it

    panels: dict[str, list[tuple[str, str, list[tuple[int, float]], dict[int, float]]]] = {}
    for title, names in PANELS.items():
        for name in names:
            for prefix, style in (("", "-"), ("eval_", "o--")):
                if points := curve(logs, name, prefix):
                    errors = dict(curve(logs, f"{name}_standard_error", prefix))
                    panels.setdefault(title, []).append((f"{prefix}{name}", style, points, errors))
    if not panels:
        return
    figure = Figure(figsize=(3.2 * len(panels), 3), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for label, style, points, errors in curves:
            bars = [errors.get(step, 0.0) for step, _ in points] if errors else None
            axes.errorbar(*zip(*points, strict=True), bars, fmt=style, markersize=3, linewidth=1.2, label=label)
        axes.set(title=title, xlabel="optimizer steps")
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend(fontsize="small")
    figure.savefig(file, dpi=120)


def describe_learning(logs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Loss, divergence and shares right: `NAME FIRST -> LAST` of the first and the last log, `NAME VALUE` of one."""
    described = []
    for name, metric, prefix in (
        ("loss", "loss", ""),
        ("divergence", "divergence", ""),
        ("share right", "share right", ""),
        ("held-out accuracy", "accuracy", "eval_"),
    ):
        if points := curve(logs, metric, prefix):
            is_share = name in ("share right", "held-out accuracy")
            values = [f"{100 * y:.0f} %" if is_share else f"{y:.3g}" for _, y in (points[0], points[-1])]
            described.append(f"{name} {' -> '.join(values[: len(points)])}")
    return described


def evaluation_command(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """
    The command that compares the trained model with its base.

    On the data that the run was evaluated on, else on local training data with answers, as it was asked in training;
    else on the paper's benchmarks.

    Args:
        settings: as in the record of the run (run_config.json).
    """
    script, training, model = settings["script"], settings["training"], settings["model"]
    program = os.path.relpath(ROOT / "eval" / "evaluate_math.py")
    run_dir, base = str(training["output_dir"]), str(model["model_name_or_path"])
    words = ["python", program, "--base_model", base]
    if model["use_peft"]:
        words += ["--checkpoint_dir", run_dir]
    else:
        words[-1] = run_dir
    data = script["eval_dataset_name"] or script["dataset_name"]
    answer_column = script.get("answer_column")
    if answer_column is not None and os.path.exists(os.path.expanduser(data)):
        words += ["--dataset", data]
        columns = {"problem": script["problem_column"], "answer": answer_column}
        for name, column in columns.items():
            words += [f"--{name}_column", column] if column != name else []
        if (verifier := training.get("verifier", script.get("verifier", "math"))) != "math":
            words += ["--verifier", verifier]
        thinking = script.get("thinking", training.get("student_thinking"))
        words += ["--enable_thinking", str(bool(thinking)).lower()]
        words += ["--max_new_tokens", str(training.get("max_completion_length") or training["max_length"])]
        if script["eval_dataset_name"] is None:
            words += ["--num_samples", "200"]
    else:
        words += ["--dataset", "aime24", "aime25", "hmmt25"]
    return shlex.join([*words, "--output_file", os.path.join(run_dir, "results", "evaluation.json")])
