"""
The quickstart: evaluate a tiny base model, let it teach itself with OPSD, evaluate it again, write a report and a plot.

    bash scripts/quickstart.sh [--seed 0] [--steps 100] [--controls]

Everything runs through the programs that real runs use: `opsd_train.py` in a process of its own, and vLLM through
`eval/evaluate_math.py`. All models answer the same held-out problems with the same sampling seeds, whatever `--seed` is.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from transformers import AutoTokenizer
from transformers.trainer_utils import sort_checkpoints

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root

from eval.benchmarks import find_benchmark, load_questions
from eval.engine import Sampling, start_engine
from eval.evaluate_math import evaluate
from eval.grading import GradingPool
from quickstart import addition, base_model

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = dict(os.environ)  # as it is before vLLM's engine adds to it

# name -> (training file, further flags)
METHODS = {
    "opsd": ("train.jsonl", []),
    "no_privilege": ("train.jsonl", ["--teacher_sees_solution", "false"]),
    "shuffled_solutions": ("train_shuffled.jsonl", []),
}
LABELS = {
    "base": "base",
    "teacher": "teacher: base that sees the solution",
    "opsd": "OPSD",
    "no_privilege": "control: teacher sees no solution",
    "shuffled_solutions": "control: teacher sees another problem's solution",
}


@contextmanager
def phase(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Announce a phase and keep how long it took."""
    logger.info("\n== %s ==", name)
    start = time.perf_counter()
    yield
    seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - start, 1)


def train(model: Path, dataset: Path, run_dir: Path, steps: int, seed: int, flags: list[str]) -> dict[str, Any]:
    """Run `opsd_train.py`; returns its number of steps and of generated tokens."""
    command = [sys.executable, "opsd_train.py", "--config", "quickstart/opsd.yaml", "--overwrite_output_dir"]
    command += ["--model_name_or_path", model, "--dataset_name", dataset, "--answer_column", "answer"]
    command += ["--output_dir", run_dir, "--seed", seed, "--max_steps", steps, "--save_steps", max(1, steps // 5)]
    subprocess.run([str(part) for part in [*command, *flags]], check=True, cwd=ROOT, env=ENVIRONMENT)
    state = json.loads((run_dir / f"checkpoint-{steps}" / "trainer_state.json").read_text())
    return {"steps": steps, "generated_tokens": state["stateful_callbacks"]["OPSDTrainer"]["num_generated_tokens"]}


def checkpoints(run_dir: Path) -> dict[int, Path]:
    """Step -> adapter folder of a run, in the order of the steps."""
    folders = [Path(folder) for folder in sort_checkpoints(run_dir)]
    return {int(folder.name.removeprefix("checkpoint-")): folder for folder in folders}


def markdown_table(report: dict[str, Any]) -> str:
    """The report's accuracies in percent, with their standard errors clustered by problem."""
    lines = ["| | Avg@4 | ± | greedy | generated tokens |", "|---|--:|--:|--:|--:|"]
    for name, label in LABELS.items():
        if name in report:
            result = report[name]
            lines.append(
                f"| {label} | {100 * result['avg_at_4']:.1f} | {100 * result['standard_error']:.1f} "
                f"| {100 * result['greedy']:.1f} | {result.get('generated_tokens', '')} |"
            )
    return "\n".join(lines)


def plot_accuracy(report: dict[str, Any], file: Path) -> None:
    """Accuracy over training steps as a PNG: base, OPSD's curve, the teacher's level, controls where there are any."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    steps, accuracies = zip(*((point["step"], point["avg_at_4"]) for point in report["curve"]), strict=True)
    axes.plot(steps, accuracies, marker="o", color="tab:blue", label=LABELS["opsd"])
    axes.axhline(report["teacher"]["avg_at_4"], linestyle="--", color="tab:green", label=LABELS["teacher"])
    axes.axhline(report["base"]["avg_at_4"], linestyle=":", color="gray", label=LABELS["base"])
    for name, marker in (("no_privilege", "s"), ("shuffled_solutions", "x")):
        if name in report:
            point = report[name]
            axes.plot(point["steps"], point["avg_at_4"], marker, color="tab:red", label=LABELS[name], clip_on=False)
    axes.set(xlabel="optimizer steps of 32 rollouts", ylabel="Avg@4, held-out problems", ylim=(-0.02, 1.02))
    axes.set_title("A tiny model teaches itself to carry (3-digit addition)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of the base model, the training data and the rollouts")
    add("--steps", type=int, default=100, help="optimizer steps of 32 rollouts (default: %(default)s)")
    add(
        "--use_vllm",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="sample the rollouts of the training with vLLM; otherwise with transformers (default: %(default)s)",
    )
    add("--controls", action="store_true", help="train against a teacher without, and with wrong, solutions too")
    add("--output_dir", type=Path, default=ROOT / "outputs" / "quickstart", help="default: outputs/quickstart")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: give at least 1")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    output_dir = args.output_dir.resolve()
    data_dir = output_dir / "data"
    seconds: dict[str, float] = {}

    with phase("build the base model (cached afterwards)", seconds):
        addition.write_data(data_dir, args.seed)
        config = base_model.BaseModelConfig(seed=args.seed)
        model = base_model.build_base_model(ROOT / "outputs" / "quickstart" / "base", config)
        link = output_dir / "model"  # a name to find it by
        link.unlink(missing_ok=True)
        link.symlink_to(model)

    with phase("evaluate the base model, without and with the solution in its prompt", seconds):
        tokenizer = AutoTokenizer.from_pretrained(model)
        held_out = find_benchmark(str(data_dir / "test.jsonl"))
        questions = load_questions(held_out, tokenizer, thinking=False)
        privileged = load_questions(held_out, tokenizer, thinking=False, privileged=True)
        engine = start_engine(str(model), lora_rank=16, max_model_len=512)
        sampling = Sampling(val_n=4, max_new_tokens=64, greedy=True)
        pool = GradingPool()

        def measure(questions, checkpoint: Path | None = None) -> dict[str, float]:
            adapter = None if checkpoint is None else os.path.relpath(checkpoint)
            result, _ = evaluate(engine, questions, sampling, pool, thinking=False, checkpoint=adapter)
            return {
                "avg_at_4": result["avg_at_k"],
                "standard_error": result["standard_error"],
                "greedy": result["greedy"],
            }

        report: dict[str, Any] = {"task": "3-digit addition in words", "seed": args.seed, "seconds": seconds}
        report["base"] = measure(questions)
        report["teacher"] = measure(privileged)
    logger.info("\n%s\n", markdown_table(report))

    for name in METHODS if args.controls else ["opsd"]:
        training_file, flags = METHODS[name]
        run_dir = output_dir / name
        with phase(f"train: {LABELS[name]}", seconds):
            flags = [*flags, "--use_vllm", args.use_vllm]
            training = train(model, data_dir / training_file, run_dir, args.steps, args.seed, flags)
        with phase(f"evaluate: {LABELS[name]}", seconds):
            curve = checkpoints(run_dir)
            if name == "opsd":
                measured = {step: measure(questions, checkpoint) for step, checkpoint in curve.items()}
                report["curve"] = [{"step": 0, "avg_at_4": report["base"]["avg_at_4"]}]
                report["curve"] += [{"step": step, "avg_at_4": m["avg_at_4"]} for step, m in measured.items()]
                report[name] = measured[args.steps] | training
            else:
                report[name] = measure(questions, curve[args.steps]) | training

    report["seconds"]["total"] = round(sum(seconds.values()), 1)
    (output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    plot_accuracy(report, output_dir / "accuracy.png")
    logger.info("\n%s\n", markdown_table(report))
    logger.info("%.0f seconds; report.json and accuracy.png are in %s", seconds["total"], os.path.relpath(output_dir))


if __name__ == "__main__":
    main()
