"""
The quickstart: evaluate a tiny base model, let it teach itself with OPSD, evaluate it again, write a report and a plot.

    bash scripts/quickstart.sh [--seed 0] [--steps 100] [--controls] [--baselines]

Everything runs through the programs that real runs use: training in a process of its own, and vLLM through
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.trainer_utils import sort_checkpoints

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root

from eval.benchmarks import find_benchmark, load_questions
from eval.engine import Sampling, start_engine
from eval.evaluate_math import evaluate
from eval.grading import GradingPool
from quickstart import addition, base_model
from quickstart.report import LABELS, markdown_table, plot_accuracy, plot_tokens, summary_table
from vllm_engine import stop_engine

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = dict(os.environ)  # as it is before vLLM's engine adds to it


@dataclass(frozen=True)
class Method:
    """A way to train the base model."""

    program: str = "opsd_train.py"
    training_file: str = "train.jsonl"
    flags: tuple[str, ...] = ()
    factor: int = 1  # steps, relative to --steps
    has_curve: bool = False  # whether its checkpoints are evaluated too

    @property
    def settings(self) -> Path:
        return Path("quickstart", self.program.replace("_train.py", ".yaml"))


OPSD = {"opsd": Method(has_curve=True)}
CONTROLS = {
    "no_privilege": Method(flags=("--teacher_sees_solution", "false")),
    "shuffled_solutions": Method(training_file="train_shuffled.jsonl"),
}
BASELINES = {
    "sampled_token": Method(flags=("--use_tinker_loss",), has_curve=True),
    "grpo": Method("grpo_train.py", factor=3, has_curve=True),
    "sft": Method("sft_train.py"),
}


@contextmanager
def phase(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Announce a phase and keep how long it took."""
    logger.info("\n== %s ==", name)
    start = time.perf_counter()
    yield
    seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - start, 1)


def train(method: Method, model: Path, data_dir: Path, run_dir: Path, steps: int, seed: int, use_vllm: bool) -> None:
    """Run the method's program, with a checkpoint at each fifth of `steps`."""
    command = [sys.executable, method.program, "--config", method.settings, "--overwrite_output_dir"]
    command += ["--model_name_or_path", model, "--dataset_name", data_dir / method.training_file]
    command += ["--output_dir", run_dir, "--seed", seed]
    command += ["--max_steps", method.factor * steps, "--save_steps", max(1, steps // 5), *method.flags]
    if method.program != "sft_train.py":
        command += ["--answer_column", "answer", "--use_vllm", use_vllm]
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT, env=ENVIRONMENT)


def checkpoints(run_dir: Path) -> dict[int, Path]:
    """Step -> adapter folder of a run, in the order of the steps."""
    folders = [Path(folder) for folder in sort_checkpoints(run_dir)]
    return {int(folder.name.removeprefix("checkpoint-")): folder for folder in folders}


def generated_tokens(checkpoint: Path) -> int:
    """How many tokens the training had sampled when it saved a checkpoint."""
    saved = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]
    return sum(state.get("num_generated_tokens", 0) for state in saved.values())


def write_report(report: dict[str, Any], output_dir: Path) -> None:
    """Write `report.json` and the plots of what is in it so far."""
    report["curve"] = [{"step": point["step"], "avg_at_4": point["avg_at_4"]} for point in report["curves"]["opsd"]]
    (output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    plot_accuracy(report, output_dir / "accuracy.png")
    plot_tokens([report], output_dir / "tokens.png")


def run_seed(seed: int, methods: dict[str, Method], steps: int, use_vllm: bool, output_dir: Path) -> dict[str, Any]:
    """Build the base model of a seed, train it with each method, evaluate all; returns the report and writes it."""
    data_dir = output_dir / "data"
    seconds: dict[str, float] = {}
    with phase("build the base model (cached afterwards)", seconds):
        addition.write_data(data_dir, seed)
        config = base_model.BaseModelConfig(seed=seed)
        model = base_model.build_base_model(ROOT / "outputs" / "quickstart" / "base", config)
        link = output_dir / "model"  # a name to find it by
        link.unlink(missing_ok=True)
        link.symlink_to(model)

    with phase("evaluate the base model, without and with the solution in its prompt", seconds):
        tokenizer = AutoTokenizer.from_pretrained(model)
        held_out = find_benchmark(str(data_dir / "test.jsonl"))
        questions = load_questions(held_out, tokenizer, thinking=False)
        privileged = load_questions(held_out, tokenizer, thinking=False, privileged=True)
        engine = start_engine(str(model), lora_rank=16, max_model_len=512, gpu_memory_utilization=0.2)
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

        report: dict[str, Any] = {"task": "3-digit addition in words", "seed": seed, "seconds": seconds}
        report["base"] = measure(questions)
        report["teacher"] = measure(privileged)
        report["curves"] = {}
    logger.info("\n%s\n", markdown_table(report))

    for name, method in methods.items():
        run_dir, training = output_dir / name, f"train: {LABELS[name]}"
        with phase(training, seconds):
            train(method, model, data_dir, run_dir, steps, seed, use_vllm)
        with phase(f"evaluate: {LABELS[name]}", seconds):
            saved = checkpoints(run_dir)
            chosen = saved if method.has_curve else {steps: saved[steps]}
            measured = {
                step: measure(questions, checkpoint) | {"generated_tokens": generated_tokens(checkpoint)}
                for step, checkpoint in chosen.items()
            }
        ends = {name: steps} | ({f"{name}_{method.factor}x": method.factor * steps} if method.factor > 1 else {})
        for label, end in ends.items():
            report[label] = measured[end] | {
                "steps": end,
                "train_seconds": round(seconds[training] * end / (method.factor * steps), 1),
            }
        if method.has_curve:
            start = report["base"] | {"generated_tokens": 0}
            report["curves"][name] = [{"step": step} | result for step, result in ({0: start} | measured).items()]
        write_report(report, output_dir)
    stop_engine(engine)
    pool.close()

    seconds["total"] = round(sum(seconds.values()), 1)
    write_report(report, output_dir)
    logger.info("\n%s\n", markdown_table(report))
    logger.info("%.0f seconds; report.json and plots are in %s", seconds["total"], os.path.relpath(output_dir))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--seed",
        type=int,
        nargs="+",
        default=[0],
        help="of the base model, the training data and the rollouts; several give a summary over them (default: 0)",
    )
    add("--steps", type=int, default=100, help="optimizer steps of 32 rollouts (default: %(default)s)")
    add(
        "--use_vllm",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="sample the rollouts of the training with vLLM; otherwise with transformers (default: %(default)s)",
    )
    add("--controls", action="store_true", help="train against a teacher without, and with wrong, solutions too")
    add("--baselines", action="store_true", help="train with GRPO, SFT and the sampled-token objective too")
    add("--output_dir", type=Path, default=ROOT / "outputs" / "quickstart", help="default: outputs/quickstart")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: give at least 1")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    output_dir = args.output_dir.resolve()
    methods = OPSD | (BASELINES if args.baselines else {}) | (CONTROLS if args.controls else {})
    seeds = list(dict.fromkeys(args.seed))
    if len(seeds) == 1:
        run_seed(seeds[0], methods, args.steps, args.use_vllm, output_dir)
        return
    reports = [run_seed(s, methods, args.steps, args.use_vllm, output_dir / f"seed_{s}") for s in seeds]
    (output_dir / "summary.md").write_text(summary_table(reports) + "\n")
    plot_tokens(reports, output_dir / "tokens.png")
    logger.info("\n%s\n\nsummary.md and tokens.png are in %s", summary_table(reports), os.path.relpath(output_dir))


if __name__ == "__main__":
    main()
