"""
The paper's figures from runs on the quickstart's task, each by a command, beside the published values.

    python quickstart/figures.py clip --seed 0
    python quickstart/figures.py tokens --seed 0 1 2
    python quickstart/figures.py page

A figure trains and evaluates what it needs (`quickstart/run.py`). It leaves out what OUTPUT_DIR/seed_S/report.json has
already with the same settings: the same command goes on after a kill. Each command ends with the page of all figures,
OUTPUT_DIR/figures.md, where what has not been run is marked. `kinds` samples without training.
"""

import argparse
import json
import logging
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Plot

from opsd.inspection.runs import METRICS, read_run
from opsd.inspection.tokens import summarize
from opsd.run.flags import SWITCH
from quickstart.methods import ABLATIONS, BASELINES, Method, opsd

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
NOT_RUN = "not run yet"
SCALE = (
    "Toy scale: 0.5 M parameters, one skill, completions of about 27 tokens. It can show what a setting does to the "
    "lesson; it cannot say how much a large model gains."
)


@dataclass(frozen=True)
class Figure:
    """A figure or table of the paper: the methods that it compares, and what was published."""

    title: str
    methods: Mapping[str, tuple[str, Method]]  # name -> label, method
    published: str
    x: str = "step"  # or generated_tokens
    limits: str = ""  # what the toy task cannot say of it


def curves_of(**methods: tuple[str, Method]) -> dict[str, tuple[str, Method]]:
    """The methods with their checkpoints evaluated."""
    return {name: (label, replace(method, has_curve=True)) for name, (label, method) in methods.items()}


def known(name: str) -> Method:
    """The method of the ablations with this name."""
    return next(methods[name] for methods in ABLATIONS.values() if name in methods)


OURS = ("OPSD (JSD, beta 0.5)", known("opsd"))
FIGURES = {
    "tokens": Figure(
        "Accuracy over generated tokens (v3, Figure 3)",
        curves_of(opsd=OURS, grpo=("GRPO", BASELINES["grpo"])),
        "v3: 8 to 12 times fewer generated tokens than GRPO for the same accuracy (v1: 4 to 8 times, Qwen3-4B). In "
        "GRPO more than half of the batches have no reward deviation within 100 steps.",
        x="generated_tokens",
        limits="Completions of both methods are equally long here; in the paper GRPO's are eight times as long.",
    ),
    "clip": Figure(
        "Effect of the clip (v3, Figure 4)",
        curves_of(
            beta_0=("no clip", known("beta_0")),
            beta_0_pointwise_clip=("pointwise clip 0.05", known("beta_0_pointwise_clip")),
            beta_0_scale_clip=("scale clip 0.05, of this project", known("beta_0_scale_clip")),
        ),
        "v3, Qwen3-1.7B, AIME24 in 100 steps: from 51.5 to about 49 without the clip, to about 57 with it.",
        limits="The lesson sits in few tokens with a large divergence here, which the clip cuts; in a large model it "
        "cuts style.",
    ),
    "length": Figure(
        "Completion length (v3, Figure 5)",
        curves_of(
            completion_10=("10 tokens", known("completion_10")),
            completion_20=("20 tokens", opsd("--max_completion_length 20")),
            opsd=("64 tokens: all of it", known("opsd")),
        ),
        "v3: 1k to 4k tokens bring no stable gain. v1 said the opposite (its Figure 4).",
        limits="10 tokens end before the first carry, and there is nothing beyond 30.",
    ),
    "vocabulary": Figure(
        "Full vocabulary against the sampled token (v3, Table 4)",
        curves_of(opsd=("full vocabulary", known("opsd")), sampled_token=("sampled token", known("sampled_token"))),
        "v3, Qwen3-4B, pass@8: full vocabulary 84.1 (AIME25) and 60.0 (HMMT25), sampled token 82.1 and 57.3.",
        limits="Avg@4 on additions, not pass@8.",
    ),
    "divergences": Figure(
        "Forward KL, reverse KL and JSD (v3, Table 3)",
        curves_of(
            beta_0=("forward KL (beta 0)", known("beta_0")),
            beta_1=("reverse KL (beta 1)", known("beta_1")),
            opsd=("JSD (beta 0.5)", known("opsd")),
        ),
        "v3, Qwen3-1.7B, AIME25, base / step 50 / step 100: forward KL 36.7 / 43.9 / 41.1, reverse KL 36.7 / 37.5 / "
        "35.0, JSD 36.7 / 36.9 / 39.0.",
        limits="The teacher is nearly always right here, so that seeking its mode costs nothing.",
    ),
}
KINDS = "Divergence by token kind and thinking modes (v3, Table 5)"
KINDS_PUBLISHED = (
    "v3, mean KL of style / mathematics / other tokens, student without and teacher with thinking: 1.7B .85 / .14 / "
    ".25, 4B .92 / .10 / .29, 8B .79 / .06 / .25."
)
KINDS_LIMITS = (
    "The toy model has hardly any style tokens: its lesson is the carry, which is mathematics. The lists of words are "
    "this project's own."
)
MODES = [(False, False), (False, True), (True, False), (True, True)]  # student thinks, teacher thinks


def train_figure(figure: Figure, folder: Path, seed: int, steps: int, use_vllm: bool) -> None:
    """Train and evaluate what a figure needs and the folder of the seed has not."""
    from quickstart.base_model import BaseModelConfig
    from quickstart.report import LABELS, STYLES
    from quickstart.run import run_seed  # imports vLLM, which the page does without

    methods = {name: method for name, (_, method) in figure.methods.items()}
    curves = [name for name in methods if name in LABELS and name in STYLES]
    run_seed(seed, methods, steps, use_vllm, folder, BaseModelConfig(seed=seed), resume=True, curves=curves)


def sample_kinds(folder: Path, seed: int, num_problems: int = 128) -> None:
    """Save the token statistics of the first step, KL of the teacher against the student, for each pair of modes."""
    from quickstart import addition
    from quickstart.base_model import ablation_base, build_base_model

    addition.write_data(folder / "data", seed)
    model = build_base_model(ROOT / "outputs" / "quickstart" / "base", ablation_base(seed))
    for student, teacher in MODES:
        run_dir = kinds_folder(folder, student, teacher)
        if read_kinds(run_dir):
            continue
        command = [sys.executable, "opsd_train.py", "--config", "quickstart/opsd.yaml", "--overwrite_output_dir"]
        command += ["--model_name_or_path", model, "--dataset_name", folder / "data" / "train.jsonl"]
        command += ["--output_dir", run_dir, "--max_steps", 1, "--beta", 0, "--use_vllm", "false", "--seed", seed]
        command += ["--student_thinking", student, "--teacher_thinking", teacher, "--max_completion_length", 96]
        command += ["--save_token_statistics", num_problems]
        subprocess.run([str(part) for part in command], check=True, cwd=ROOT)


def kinds_folder(folder: Path, student: bool, teacher: bool) -> Path:
    return folder / "kinds" / f"student_{'on' if student else 'off'}_teacher_{'on' if teacher else 'off'}"


def read_kinds(run_dir: Path) -> dict[str, tuple[float, int]]:
    """Return kind -> mean divergence in nats and number of tokens at the first step; empty if there are none."""
    if not (run_dir / "token_statistics").is_dir():
        return {}
    run = read_run(run_dir)
    summary = summarize(run.of_steps(run.steps[:1]), run.steps[:1])
    return {} if summary is None else {bar.label: (bar.mean, bar.count) for bar in summary.kinds}


def read_reports(output_dir: Path) -> list[dict[str, Any]]:
    """The reports of all seeds that are there, in the order of the seeds."""
    files = output_dir.glob("seed_*/report.json")
    return sorted((json.loads(file.read_text(encoding="utf-8")) for file in files), key=lambda report: report["seed"])


def mean_and_error(values: Sequence[float]) -> str:
    """Percent; the standard error is over the seeds."""
    text = f"{100 * statistics.mean(values):.1f}"
    return f"{text} ± {100 * statistics.stdev(values) / len(values) ** 0.5:.1f}" if len(values) > 1 else text


def figure_table(figure: Figure, reports: Sequence[dict[str, Any]]) -> list[str]:
    """Avg@4 in percent at the beginning, at a step between and at the end; and the tokens until then."""
    lines = ["| | seeds | start | between | end | generated tokens |", "|---|---|--:|--:|--:|--:|"]
    for name, (label, _) in figure.methods.items():
        found = [report for report in reports if name in report.get("curves", {})]
        if not found:
            lines.append(f"| {label} | {NOT_RUN} | | | | |")
            continue
        curves = [report["curves"][name] for report in found]
        cells = [
            mean_and_error([curve[at(len(curve))]["avg_at_4"] for curve in curves])
            for at in (lambda n: 0, lambda n: n // 2, lambda n: n - 1)
        ]
        cells[1] += f" (step {curves[0][len(curves[0]) // 2]['step']})"
        tokens = statistics.mean(curve[-1]["generated_tokens"] for curve in curves)
        seeds = ", ".join(str(report["seed"]) for report in found)
        lines.append(f"| {label} | {seeds} | {' | '.join(cells)} | {tokens:,.0f} |")
    return lines


def kinds_table(output_dir: Path) -> list[str]:
    """Mean KL of each kind for each pair of modes, in nats, over the seeds that are there."""
    names = ("style", "mathematics", "other")
    lines = ["| student thinks | teacher thinks | style | mathematics | other |", "|---|---|--:|--:|--:|"]
    folders = sorted(output_dir.glob("seed_*"))
    for student, teacher in MODES:
        found = [kinds for folder in folders if (kinds := read_kinds(kinds_folder(folder, student, teacher)))]
        cells = [NOT_RUN, "", ""]
        if found:
            means = [[kinds[name][0] for kinds in found if kinds[name][1]] for name in names]
            cells = [f"{statistics.mean(values):.3f}" if values else "no token" for values in means]
        modes = ("on" if student else "off", "on" if teacher else "off")
        lines.append(f"| {' | '.join((*modes, *cells))} |")
    return lines


def zero_deviation(output_dir: Path) -> list[tuple[int, float]]:
    """(step, mean over the seeds of the share of GRPO's groups without reward deviation)."""
    shares: dict[int, list[float]] = {}
    for file in sorted(output_dir.glob(f"seed_*/grpo/{METRICS}")):
        for row in read_run(file.parent).logs:
            if "frac_reward_zero_std" in row:
                shares.setdefault(row["step"], []).append(row["frac_reward_zero_std"])
    return [(step, statistics.mean(values)) for step, values in sorted(shares.items())]


def plot_figure(name: str, reports: Sequence[dict[str, Any]], output_dir: Path) -> Path | None:
    """Plot the mean over the seeds with their range, and for `tokens` GRPO's groups; `None` if nothing is there."""
    figure = FIGURES[name]
    shares = zero_deviation(output_dir) if name == "tokens" else []
    plot = Plot(figsize=(7 if not shares else 10, 4.2), layout="constrained")
    axes, *others = plot.subplots(1, 2 if shares else 1, squeeze=False)[0]
    markers = iter("osvD")
    for method, (label, _) in figure.methods.items():
        curves = [report["curves"][method] for report in reports if method in report.get("curves", {})]
        if not curves:
            continue
        x = [statistics.mean(point[figure.x] for point in points) for points in zip(*curves, strict=True)]
        y = [[100 * point["avg_at_4"] for point in points] for points in zip(*curves, strict=True)]
        (line,) = axes.plot(x, list(map(statistics.mean, y)), marker=next(markers), label=f"{label} (n={len(curves)})")
        axes.fill_between(x, list(map(min, y)), list(map(max, y)), alpha=0.15, color=line.get_color())
    if not axes.lines:
        return None
    axes.set(xlabel=figure.x.replace("_", " "), ylabel="Avg@4, held-out additions, %", ylim=(-2, 102))
    axes.set_title(figure.title, fontsize="medium")
    axes.legend(fontsize="small")
    for other in others:
        other.plot(*zip(*shares, strict=True), color="tab:orange")
        other.set(xlabel="step", ylabel="GRPO: groups without reward deviation", ylim=(-0.02, 1.02))
    for every in plot.axes:
        every.grid(alpha=0.3)
    file = output_dir / f"figure_{name}.png"
    plot.savefig(file, dpi=110)
    return file


def write_page(output_dir: Path) -> str:
    """Write and return figures.md, with the plots beside it: all figures, published values, what has not been run."""
    reports = read_reports(output_dir)
    lines = ["# The paper's figures on the quickstart's task", "", SCALE, ""]
    lines += ["Avg@4 on 256 held-out additions in percent, mean ± standard error over the seeds.", ""]
    for name, figure in FIGURES.items():
        lines += [f"## {figure.title}", "", f"`python quickstart/figures.py {name} --seed 0 1 2`", ""]
        lines += [*figure_table(figure, reports), ""]
        if file := plot_figure(name, reports, output_dir):
            lines += [f"![{figure.title}]({file.name})", ""]
        lines += [f"*Published, not measured here:* {figure.published}", "", f"*Limits:* {figure.limits}", ""]
    lines += [f"## {KINDS}", "", "`python quickstart/figures.py kinds --seed 0 1 2`", "", *kinds_table(output_dir), ""]
    lines += [f"*Published, not measured here:* {KINDS_PUBLISHED}", "", f"*Limits:* {KINDS_LIMITS}", ""]
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "figures.md").write_text("\n".join(lines), encoding="utf-8")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("figure", choices=[*FIGURES, "kinds", "page"], help="what to run; `page` runs nothing")
    add("--seed", type=int, nargs="+", default=[0], help="of base model, data and rollouts (default: 0)")
    add("--steps", type=int, default=100, help="optimizer steps of 32 rollouts (default: %(default)s)")
    add("--use_vllm", **SWITCH | {"default": True}, help="sample the rollouts with vLLM (default: true)")
    add("--output_dir", type=Path, default=ROOT / "outputs" / "quickstart" / "figures", help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.steps < 5:
        parser.error(f"--steps {arguments.steps}: give at least 5, since a run is evaluated at each fifth")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    output_dir = arguments.output_dir.resolve()
    run: Callable[[Path, int], None] = sample_kinds
    if arguments.figure in FIGURES:

        def run(folder: Path, seed: int) -> None:
            train_figure(FIGURES[arguments.figure], folder, seed, arguments.steps, arguments.use_vllm)

    for seed in dict.fromkeys(arguments.seed) if arguments.figure != "page" else ():
        run(output_dir / f"seed_{seed}", seed)
    logger.info("\n%s\nfigures.md and its plots are in %s", write_page(output_dir), output_dir)


if __name__ == "__main__":
    main()
