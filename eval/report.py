"""Tables and plot of an evaluation's results."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

LISTED = 20  # samples of a warning
STEP = re.compile(r"checkpoint-(\d+)")  # as TRL names its checkpoint folders


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def report_tables(results: Sequence[Mapping[str, Any]], differences: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, in percent: models by data sets, then the statistics of each pair, then the paired differences."""
    cells = {(result["model"], result["dataset"]): result for result in results}
    models, datasets = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))

    def cell(model: str, dataset: str) -> str:
        result = cells[model, dataset]
        error = "" if result["standard_error"] is None else f" ± {percent(result['standard_error'])}"
        return percent(result["avg_at_k"]) + error

    k = results[0]["val_n"]
    largest = [int(size) for size in results[0]["pass_at_k"]][1:]
    rows = [[model, *(cell(model, dataset) for dataset in datasets)] for model in models]
    sections = [f"Avg@{k} ± standard error clustered by problem\n\n" + markdown(["model", *datasets], rows)]

    header = ["data set, model", f"Avg@{k}", "95 % interval", *(f"pass@{size}" for size in largest), f"maj@{k}"]
    header += ["greedy", "truncated", "unclosed thinking", "tokens", "tokens/s", "ungraded problems"]
    rows = []
    for dataset in datasets:
        for model in models:
            result = cells[model, dataset]
            rows.append([f"{dataset}, {model}", percent(result["avg_at_k"]), interval_text(result["interval"])])
            rows[-1] += [percent(result["pass_at_k"].get(str(size))) for size in largest]
            rows[-1] += [percent(result[name]) for name in ("majority_at_k", "greedy", "truncated")]
            speed = "" if result["tokens_per_second"] is None else f"{result['tokens_per_second']:,.0f}"
            rows[-1] += [percent(result["unclosed_thinking"]), f"{result['mean_tokens']:.0f}", speed]
            rows[-1].append(f"{result['num_ungraded']} of {result['num_problems']}")
    sections.append(markdown(header, rows))

    if limits := next((result["avg_within"] for result in results if result.get("avg_within")), None):
        rows = [
            [f"{dataset}, {model}", *(percent(cells[model, dataset]["avg_within"].get(limit)) for limit in limits)]
            for dataset in datasets
            for model in models
        ]
        sections.append(f"Avg@{k} within a budget of tokens\n\n" + markdown(["data set, model", *limits], rows))

    warnings = []
    for name, text in (("missed", "the reference answer is in a box or the last line, and was not taken"),
                       ("cut_off", "cut off at the length limit")):  # fmt: skip
        for (model, dataset), result in cells.items():
            if places := result.get(name):
                listed = ", ".join(f"{problem}/{sample}" for problem, sample in places[:LISTED])
                rest = "" if len(places) <= LISTED else f" and {len(places) - LISTED} more, in the JSON file"
                warnings.append(
                    f"- {dataset}, {model}: {len(places)} samples: {text} (problem/sample): {listed}{rest}\n"
                )
    if warnings:
        sections.append("Look at these samples\n\n" + "".join(warnings))

    if differences:
        rows = []
        for result in differences:
            rows.append([f"{result['dataset']}, {result['model']} - {result['reference']}"])
            rows[-1] += [f"{100 * result['difference']:+.1f}", percent(result["standard_error"])]
            rows[-1].append(interval_text(result["interval"]))
        sections.append(markdown(["paired difference", "points", "±", "95 % interval"], rows))
    return "\n".join(sections)


def interval_text(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{percent(interval[0])} to {percent(interval[1])}"


def plot_accuracy(results: Sequence[Mapping[str, Any]], file: Path) -> bool:
    """
    Plot accuracy over checkpoint steps as a PNG: a panel for each data set, a line for each run, the base at step 0.

    Returns:
        Whether there was something to plot: a checkpoint whose folder is named `checkpoint-STEP`.
    """
    datasets: dict[str, dict[Path | None, list[tuple[int, Mapping[str, Any]]]]] = {}
    for result in results:
        if result["avg_at_k"] is None:
            continue
        runs = datasets.setdefault(result["dataset"], {})
        folder = Path(result["model"])
        if result["model"] == "base":
            runs.setdefault(None, []).append((0, result))
        elif step := STEP.fullmatch(folder.name):
            runs.setdefault(folder.parent, []).append((int(step[1]), result))
    datasets = {dataset: runs for dataset, runs in datasets.items() if set(runs) - {None}}
    if not datasets:
        return False
    figure = Figure(figsize=(5 * len(datasets), 4), layout="constrained")
    panels = figure.subplots(1, len(datasets), squeeze=False)[0]
    for axes, (dataset, runs) in zip(panels, datasets.items(), strict=True):
        base = runs.pop(None, [])
        for run, points in runs.items():
            steps, shown = zip(*base, *sorted(points, key=lambda point: point[0]), strict=True)
            errors = [100 * (result["standard_error"] or 0) for result in shown]
            accuracies = [100 * result["avg_at_k"] for result in shown]
            axes.errorbar(steps, accuracies, yerr=errors, marker="o", capsize=3, label=str(run))
        axes.set(title=dataset, xlabel="step", ylabel=f"Avg@{shown[0]['val_n']}, %")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(file, dpi=150)
    return True


def plot_budgets(results: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Plot for each data set the accuracy within budgets of tokens, and below it pass@k over k; a line per model."""
    results = [result for result in results if result["avg_within"]]
    datasets = list(dict.fromkeys(result["dataset"] for result in results))
    if not datasets:
        return
    figure = Figure(figsize=(5 * len(datasets), 7), layout="constrained")
    panels = figure.subplots(2, len(datasets), squeeze=False)
    for column, dataset in enumerate(datasets):
        for row, (name, label) in enumerate((("avg_within", "budget, tokens"), ("pass_at_k", "k of pass@k"))):
            axes = panels[row][column]
            for result in (result for result in results if result["dataset"] == dataset):
                x, y = [int(key) for key in result[name]], [100 * value for value in result[name].values()]
                axes.plot(x, y, marker="o", label=result["model"])
            axes.set(title=dataset, xlabel=label, ylabel="%")
            axes.set_xscale("log", base=2)
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
    figure.savefig(file, dpi=150)
