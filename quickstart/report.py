"""What the quickstart reports: tables and plots, of one seed and over several."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

# name in the report -> name in tables and plots, in their order
LABELS = {
    "base": "base",
    "teacher": "teacher: base that sees the solution",
    "opsd": "OPSD",
    "sampled_token": "OPSD, sampled token only",
    "grpo": "GRPO",
    "grpo_3x": "GRPO, three times the rollouts",
    "group_self_distillation": "OPSD, the reference a right rollout",
    "sft": "SFT on the reference solutions",
    "no_privilege": "control: teacher sees no solution",
    "shuffled_solutions": "control: teacher sees another problem's solution",
}
STYLES = {
    "opsd": {"color": "tab:blue", "marker": "o"},
    "group_self_distillation": {"color": "tab:olive", "marker": "D"},
    "sampled_token": {"color": "tab:cyan", "marker": "v"},
    "grpo": {"color": "tab:orange", "marker": "s"},
    "sft": {"color": "tab:purple", "linestyle": "-."},
    "teacher": {"color": "tab:green", "linestyle": "--"},
    "base": {"color": "gray", "linestyle": ":"},
    "no_privilege": {"color": "tab:red", "marker": "s"},
    "shuffled_solutions": {"color": "tab:red", "marker": "x"},
}


def markdown_table(report: dict[str, Any]) -> str:
    """One seed: accuracies in percent, with their standard errors clustered by problem."""
    lines = [
        "| | Avg@4 | ± | greedy | generated tokens | seconds of training |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, label in LABELS.items():
        if name in report:
            result = report[name]
            lines.append(
                f"| {label} | {100 * result['avg_at_4']:.1f} | {100 * result['standard_error']:.1f} "
                f"| {100 * result['greedy']:.1f} | {_count(result.get('generated_tokens'))} "
                f"| {_count(result.get('train_seconds'))} |"
            )
    return "\n".join(lines)


def summary_table(reports: Sequence[dict[str, Any]]) -> str:
    """Several seeds: each one's Avg@4 in percent, and the mean with its standard error over the seeds."""
    seeds = " | ".join(f"seed {report['seed']}" for report in reports)
    lines = [
        f"| | {seeds} | mean Avg@4 ± standard error over seeds | generated tokens | seconds of training |",
        "|---|" + "--:|" * (len(reports) + 3),
    ]
    for name, label in LABELS.items():
        if all(name in report for report in reports):
            results = [report[name] for report in reports]
            accuracies = [100 * result["avg_at_4"] for result in results]
            error = statistics.stdev(accuracies) / len(accuracies) ** 0.5
            cells = [f"{accuracy:.1f}" for accuracy in accuracies]
            cells.append(f"{statistics.mean(accuracies):.1f} ± {error:.1f}")
            for key in ("generated_tokens", "train_seconds"):
                values = [result[key] for result in results if key in result]
                cells.append(_count(statistics.mean(values) if values else None))
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ablation_table(reports: Sequence[dict[str, Any]], flags: Mapping[str, Mapping[str, str]]) -> str:
    """
    One seed or several, with the methods under headings: `flags` has heading -> name -> what tells a method from OPSD.

    The last two columns are of the methods with a clip, over their last steps: the share of the tokens at which it
    reverses the step for the teacher's most probable token, and the share of the divergence that it removes.
    """
    seeds = " | ".join(f"seed {report['seed']}" for report in reports)
    lines = [
        f"| | {seeds} | mean Avg@4 ± standard error over seeds | generated tokens | seconds of training "
        "| clip: reversed tokens, % | clip: removed, % |",
        "|---|" + "--:|" * (len(reports) + 5),
    ]
    lines += [_ablation_row(LABELS[name], [report[name] for report in reports]) for name in ("base", "teacher")]
    for heading, methods in flags.items():
        lines.append(f"| **{heading}** |" + " |" * (len(reports) + 5))
        for name, text in methods.items():
            label = f"`{name}`: " + (f"`{text}`" if text else LABELS[name])
            lines.append(_ablation_row(label, [report[name] for report in reports]))
    return "\n".join(lines)


def _ablation_row(label: str, results: Sequence[dict[str, Any]]) -> str:
    accuracies = [100 * result["avg_at_4"] for result in results]
    mean = f"{statistics.mean(accuracies):.1f}"
    if len(accuracies) > 1:
        mean += f" ± {statistics.stdev(accuracies) / len(accuracies) ** 0.5:.1f}"

    def average(key: str) -> float | None:
        values = [result[key] for result in results if key in result]
        return statistics.mean(values) if values else None

    cells = [label, *(f"{accuracy:.1f}" for accuracy in accuracies), mean]
    cells += [_count(average(key)) for key in ("generated_tokens", "train_seconds")]
    clipped = average("clip_ratio/mass")
    for share in (average("clip_ratio/wrong_way_tokens"), clipped):
        cells.append(f"{100 * share:.1f}" if clipped and share is not None else "")
    return f"| {' | '.join(cells)} |"


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def plot_accuracy(report: dict[str, Any], file: Path) -> None:
    """One seed: accuracy over training steps, with the teacher's level and the controls."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    steps, accuracies = zip(*((point["step"], point["avg_at_4"]) for point in report["curve"]), strict=True)
    axes.plot(steps, accuracies, label=LABELS["opsd"], **STYLES["opsd"])
    for name in ("teacher", "base"):
        axes.axhline(report[name]["avg_at_4"], label=LABELS[name], **STYLES[name])
    for name in ("no_privilege", "shuffled_solutions"):
        if name in report:
            point = report[name]
            axes.plot(
                point["steps"], point["avg_at_4"], linestyle="", clip_on=False, label=LABELS[name], **STYLES[name]
            )
    _finish(axes, "optimizer steps of 32 rollouts", "A tiny model teaches itself to carry (3-digit addition)")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(file, dpi=150)


def plot_tokens(reports: Sequence[dict[str, Any]], file: Path, names: Sequence[str]) -> None:
    """Plot accuracy over generated tokens, as the paper's Figure 3: the mean over the seeds, their range as a band."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for name in names:
        curves = [report["curves"][name] for report in reports if name in report["curves"]]
        if not curves:
            continue
        tokens = [
            statistics.mean(point["generated_tokens"] for point in points) for points in zip(*curves, strict=True)
        ]
        accuracies = [[point["avg_at_4"] for point in points] for points in zip(*curves, strict=True)]
        axes.plot(tokens, list(map(statistics.mean, accuracies)), label=LABELS[name], **STYLES[name])
        axes.fill_between(
            tokens, list(map(min, accuracies)), list(map(max, accuracies)), alpha=0.15, color=STYLES[name]["color"]
        )
    for name in ("teacher", "base", "sft"):  # which generate nothing
        levels = [report[name]["avg_at_4"] for report in reports if name in report]
        if levels:
            axes.axhline(statistics.mean(levels), label=LABELS[name], **STYLES[name])
    _finish(axes, "generated tokens", "Accuracy for generated tokens (3-digit addition)")
    axes.xaxis.set_major_formatter(lambda value, position: f"{value / 1000:.0f}k")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(file, dpi=150)


def _finish(axes: Any, x_label: str, title: str) -> None:
    axes.set(xlabel=x_label, ylabel="Avg@4, held-out problems", ylim=(-0.02, 1.02), title=title)
    axes.grid(alpha=0.3)
