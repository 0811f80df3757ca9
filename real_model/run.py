"""
SmolLM2-135M-Instruct teaches itself word problems: prepare it, measure it, train it in several ways, measure again.

    bash scripts/run_smollm2.sh [--only opsd sft ...] [--steps 36] [--seed 0]

Each phase is a program that real runs use. What is finished is not done again, and a training that was killed goes on
from its last checkpoint, so the same command resumes. `--only` with one method may run beside another such command.
OUTPUT_DIR has results.md with the table and some completions, results.png, and the files behind them.
"""

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure

from data_collator import TEACHER_PROMPT
from eval.report import markdown, percent
from eval.run_files import replace_file
from quickstart.methods import Method
from quickstart.report import STYLES
from quickstart.run import ROOT, checkpoints, training_results
from real_model.model import SOURCES, prepare_model
from real_model.word_problems import TEST_SIZE, write_data

logger = logging.getLogger(__name__)


class RealMethod(Method):
    """A way to train the model, with the settings of its program's YAML file in this folder unless `flags` say so."""

    @property
    def settings(self) -> Path:
        return Path("real_model", self.program.replace("_train.py", ".yaml"))


METHODS = {
    "opsd": RealMethod(has_curve=True),
    "donor": RealMethod(training_file="train_donor.jsonl"),
    "sft": RealMethod("sft_train.py"),
    "grpo": RealMethod("grpo_train.py", has_curve=True),
    "sampled_token": RealMethod(flags=("--use_tinker_loss",)),
    # the default prompt, since one for a teacher that sees nothing is refused
    "no_privilege": RealMethod(flags=("--teacher_context", "none", "--teacher_prompt", TEACHER_PROMPT)),
}
LABELS = {
    "base": "base",
    "teacher": "teacher: base that sees the solution",
    "opsd": "**OPSD**",
    "sampled_token": "OPSD, sampled token only",
    "grpo": "GRPO",
    "sft": "SFT on the solutions",
    "donor": "control: teacher sees another problem's solution",
    "no_privilege": "control: teacher sees no solution",
}
CURVES = ("opsd", "grpo")
COST = {"opsd_train.py": 10, "grpo_train.py": 8, "sft_train.py": 4, "eval": 3}  # of phases, relative
SHOWN = 8  # problems whose completions stand in results.md


class Progress:
    """Announces phases, with the time left as the cost of the phases so far suggests it."""

    def __init__(self, costs: Sequence[int]):
        self.left, self.done, self.start = list(costs), 0, time.perf_counter()

    def announce(self, name: str) -> None:
        seconds = time.perf_counter() - self.start
        remaining = f"; about {seconds * sum(self.left) / self.done / 60:.0f} minutes left" if self.done else ""
        logger.info("\n== %s (%d phases to go%s) ==", name, len(self.left), remaining)
        self.done += self.left.pop(0)


def run(*command: Any) -> float:
    """Run a program of this project; returns the seconds of processor time that it took."""
    before = os.times()
    subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def training_command(name: str, folder: Path, steps: int, seed: int) -> list[Any]:
    """Return program and flags of a method's training, with a checkpoint at each third."""
    method = METHODS[name]
    command = [method.program, "--config", method.settings, "--model_name_or_path", folder / "model"]
    command += ["--dataset_name", folder / "data" / method.training_file, "--output_dir", folder / name]
    command += ["--seed", seed, "--max_steps", steps, "--save_steps", max(1, steps // 3), *method.flags]
    if not torch.cuda.is_available():
        command += ["--use_cpu", True]
    if method.program != "sft_train.py":
        command += ["--answer_column", "answer"]
    return command


def train(name: str, folder: Path, steps: int, seed: int) -> None:
    """Run or resume a method's training; keeps its time unless it was resumed."""
    command, run_dir = training_command(name, folder, steps, seed), folder / name
    resumed = bool(checkpoints(run_dir)) if run_dir.is_dir() else False
    seconds = run(*command, *(["--resume_from_checkpoint", True] if resumed else ["--overwrite_output_dir"]))
    replace_file(run_dir / "seconds.json", json.dumps(None if resumed else round(seconds)).encode())


def evaluate(folder: Path, name: str, adapters: Sequence[Path], *flags: Any) -> None:
    """Let `eval/evaluate_math.py` answer the held-out problems greedily; it goes on where it stopped."""
    prompts = yaml.safe_load((ROOT / "real_model" / "opsd.yaml").read_text())
    command = ["eval/evaluate_math.py", "--base_model", folder / "model", "--dataset", folder / "data" / "test.jsonl"]
    role = "teacher_prompt" if "--privileged" in flags else "student_prompt"  # the evaluator refuses the other one
    command += [f"--{role}", prompts[role]]
    command += ["--enable_thinking", "false", "--temperature", 0, "--val_n", 1, "--max_new_tokens", 64]
    command += ["--extract", "last_number", "--num_samples", TEST_SIZE, "--gpu_memory_utilization", 0.5]
    command += ["--output_file", folder / "eval" / f"{name}.json", *flags]
    run(*command, *(["--checkpoint_dir", *adapters] if adapters else []))


def load_samples(folder: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    """Return of an evaluation: model -> samples, in the order of the problems."""
    samples: dict[str, list[dict[str, Any]]] = {}
    for line in (folder / "eval" / f"{name}.jsonl").read_text().splitlines():
        sample = json.loads(line)
        if sample["problem_id"] < TEST_SIZE:
            samples.setdefault(sample["model"], []).append(sample)
    return {model: sorted(own, key=lambda sample: sample["problem_id"]) for model, own in samples.items()}


def is_well_formed(sample: dict[str, Any]) -> bool:
    """True for a response that ends by itself, with a number in it: it can be graded, whether right or wrong."""
    return sample["finish_reason"] == "stop" and re.search(r"\d", sample["text"]) is not None


def results_table(rows: dict[str, dict[str, Any]]) -> str:
    """The table of the accuracies, in percent, with standard errors over the problems."""
    kinds = list(next(iter(rows.values()))["kinds"])
    header = ["", "right", "±", "less base", "±", "the other number", "well-formed", *kinds]
    header += ["tokens of a response", "generated tokens", "seconds of training"]
    lines = []
    for name, label in LABELS.items():
        if (row := rows.get(name)) is None:
            continue
        cells = [label, percent(row["accuracy"]), percent(row["standard_error"])]
        cells += [f"{100 * row['difference']:+.1f}", percent(row["difference_error"])] if name != "base" else ["", ""]
        cells += [percent(row["other_number"]), percent(row["well_formed"])]
        cells += [percent(row["kinds"][kind]) for kind in kinds]
        cells += [f"{row['mean_tokens']:.0f}"]
        cells += ["" if row.get(key) is None else f"{row[key]:,.0f}" for key in ("generated_tokens", "seconds")]
        lines.append(cells)
    return markdown(header, lines)


def gives_other_number(sample: dict[str, Any], problem: dict[str, str]) -> bool:
    """True for a response whose answer is a number of the problem, but not the one that is asked for."""
    return not sample["correct"] and sample["extracted"] in re.findall(r"\d+", problem["problem"])


def summarize(
    samples: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]], problems: Sequence[dict[str, str]]
) -> dict:
    """Accuracy, its paired difference from the base model's and form, over the same problems; shares in [0, 1]."""
    correct = torch.tensor([float(sample["correct"]) for sample in samples])
    difference = correct - torch.tensor([float(sample["correct"]) for sample in base])
    kinds = [problem["kind"] for problem in problems]
    of_kind = {
        kind: correct[[i for i, own in enumerate(kinds) if own == kind]].mean().item() for kind in dict.fromkeys(kinds)
    }
    error = len(correct) ** -0.5
    return {
        "accuracy": correct.mean().item(),
        "standard_error": correct.std().item() * error,
        "difference": difference.mean().item(),
        "difference_error": difference.std().item() * error,
        "other_number": sum(map(gives_other_number, samples, problems)) / len(samples),
        "well_formed": sum(map(is_well_formed, samples)) / len(samples),
        "mean_tokens": sum(sample["num_tokens"] for sample in samples) / len(samples),
        "kinds": of_kind,
    }


def show_completions(samples: dict[str, list[dict[str, Any]]], names: Sequence[str]) -> str:
    """The completions of the first problems before and after, right or wrong, as they are."""
    header = ["problem", *(LABELS[name] for name in names)]
    lines = []
    for index in range(SHOWN):
        cells = [samples["base"][index]["problem"]]
        for name in names:
            sample = samples[name][index]
            text = sample["text"].strip().replace("\n", "<br>").replace("|", r"\|")
            cells.append(f"{text} ({'right' if sample['correct'] else 'wrong'})")
        lines.append(cells)
    return markdown(header, lines)


def plot(rows: dict[str, dict[str, Any]], curves: dict[str, list[tuple[int, float]]], file: Path) -> None:
    """Plot accuracy over optimizer steps, with the levels of what has one figure only."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for name, row in rows.items():
        label = LABELS[name].strip("*")
        style = STYLES["shuffled_solutions" if name == "donor" else name]
        if name in curves:
            axes.plot(*zip((0, rows["base"]["accuracy"]), *curves[name], strict=True), label=label, **style)
        else:
            axes.axhline(row["accuracy"], label=label, **{"linestyle": "-."} | style | {"marker": ""})
    title = "SmolLM2-135M teaches itself word problems"
    axes.set(xlabel="optimizer steps of 16", ylabel="right, held-out problems", ylim=(-0.02, 1.02), title=title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(file, dpi=150)


def write_results(folder: Path, weights: str) -> str:
    """Write results.json, results.md and results.png of what has been evaluated; returns the table."""
    held_out = [json.loads(line) for line in (folder / "data" / "test.jsonl").read_text().splitlines()[:TEST_SIZE]]
    by_model = load_samples(folder, "student")
    samples = {"base": by_model["base"], "teacher": load_samples(folder, "teacher")["base"]}
    curves: dict[str, list[tuple[int, float]]] = {}
    rows = {name: summarize(own, samples["base"], held_out) for name, own in samples.items()}
    for name, method in METHODS.items():
        run_dir = folder / name
        evaluated = {step: str(path) for step, path in checkpoints(run_dir).items()} if run_dir.is_dir() else {}
        evaluated = {step: path for step, path in evaluated.items() if len(by_model.get(path, [])) == len(held_out)}
        if not evaluated:
            continue
        samples[name] = by_model[evaluated[max(evaluated)]]
        rows[name] = summarize(samples[name], samples["base"], held_out) | {"steps": max(evaluated)}
        rows[name] |= training_results(Path(evaluated[max(evaluated)]))
        if (time_file := run_dir / "seconds.json").is_file():
            rows[name]["seconds"] = json.loads(time_file.read_text())
        if method.has_curve:
            steps = [(step, summarize(by_model[path], samples["base"], held_out)) for step, path in evaluated.items()]
            curves[name] = [(step, row["accuracy"]) for step, row in steps]
    table = results_table(rows)
    shown = [name for name in ("base", "opsd", "donor") if name in samples]
    text = f"Weights: {weights}. {len(held_out)} held-out problems, greedy responses.\n\n{table}"
    text += f"\nThe first {SHOWN} held-out problems:\n\n{show_completions(samples, shown)}"
    replace_file(folder / "results.json", json.dumps({"rows": rows, "curves": curves}, indent=1).encode())
    replace_file(folder / "results.md", text.encode())
    plot(rows, curves, folder / "results.png")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", choices=METHODS, default=list(METHODS), help="methods to train (default: all)")
    add("--steps", type=int, default=36, help="optimizer steps of 16 sequences (default: %(default)s)")
    add("--seed", type=int, default=0, help="of training problems, adapter and rollouts (default: %(default)s)")
    add("--source", choices=SOURCES, default="auto", help="of the weights (default: the Hub, else the package)")
    add("--output_dir", type=Path, default=Path("outputs/smollm2"), help="default: %(default)s")
    args = parser.parse_args()
    if args.steps < 3:
        parser.error(f"--steps {args.steps}: give at least 3")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = args.output_dir
    try:
        weights = prepare_model(ROOT / folder / "model", args.source)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    os.chdir(ROOT)
    if not (folder / "data" / "test.jsonl").is_file():
        write_data(folder / "data", args.seed)

    missing = [name for name in args.only if not (folder / name / "seconds.json").is_file()]
    measured = [(folder / "eval" / f"{name}.json").is_file() for name in ("student", "teacher")]
    costs = [COST["eval"]] * (2 - sum(measured)) + [COST[METHODS[name].program] for name in missing] + [COST["eval"]]
    progress = Progress(costs)
    if not measured[0]:
        progress.announce("evaluate the base model")
        evaluate(folder, "student", [])
    if not measured[1]:
        progress.announce("evaluate the base model with the solution in its prompt")
        evaluate(folder, "teacher", [], "--privileged")
    for name in missing:
        progress.announce(f"train: {LABELS[name].strip('*')}")
        train(name, folder, args.steps, args.seed)
    progress.announce("evaluate what was trained")
    adapters = []
    for name in METHODS:
        saved = list(checkpoints(folder / name).values()) if (folder / name / "seconds.json").is_file() else []
        adapters += saved if METHODS[name].has_curve else saved[-1:]
    evaluate(folder, "student", adapters)
    logger.info("\n%s\n%s", write_results(folder, weights), folder / "results.md")


if __name__ == "__main__":
    main()
