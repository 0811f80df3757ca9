"""
The quickstart: evaluate a tiny base model, let it teach itself with OPSD, evaluate it again, write report and plot.

    bash scripts/quickstart.sh [--device cpu] [--seed 0] [--steps 100] [--controls] [--baselines]
    bash scripts/quickstart.sh --ablations [--seed 0] [--steps 100] [--only NAME ...]

Everything runs through the programs that real runs use: training in a process of its own, and vLLM through
`eval/evaluate_math.py`. All models answer the same held-out problems with the same sampling seeds, whatever `--seed`
is.

`--ablations` trains a base model of its own in many ways, a minute or two each, and writes OUTPUT_DIR/seed_S for each
seed. A method that is in the report.json there with the same settings is not trained again, so the same command
resumes a killed one. Seeds may run at the same time, as commands of one seed each; a command with all of them then
makes the summary.
"""

import argparse
import hashlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.trainer_utils import sort_checkpoints

from eval.benchmarks import find_benchmark, load_questions
from eval.engine import Sampling, start_engine
from eval.evaluate_math import evaluate
from opsd.grading import GradingPool
from opsd.run.flags import SWITCH
from opsd.vllm_engine import stop_engine
from quickstart import addition
from quickstart.base_model import BaseModelConfig, ablation_base, build_base_model
from quickstart.methods import ABLATION_CURVES, ABLATIONS, BASELINES, CONTROLS, CURVES, OPSD, Method, choose_methods
from quickstart.report import LABELS, ablation_table, markdown_table, plot_accuracy, plot_tokens, summary_table

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = dict(os.environ)  # as it is before vLLM's engine adds to it
LOGGED = ("clip_ratio/wrong_way_tokens", "clip_ratio/mass", "num_rationale_tokens")  # kept of the last log, if there


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
    if torch.cuda.is_available():  # in 16 bits, as vLLM's LoRA kernels for GPUs
        command += ["--use_cpu", "false", "--dtype", "bfloat16", "--bf16", "true"]
    if method.program != "sft_train.py":
        command += ["--answer_column", "answer", "--use_vllm", use_vllm]
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT, env=ENVIRONMENT)


def checkpoints(run_dir: Path) -> dict[int, Path]:
    """Step -> adapter folder of a run, in the order of the steps."""
    folders = [Path(folder) for folder in sort_checkpoints(run_dir)]
    return {int(folder.name.removeprefix("checkpoint-")): folder for folder in folders}


def training_results(checkpoint: Path) -> dict[str, float]:
    """How many tokens the training had sampled when it saved a checkpoint, and its last `LOGGED` metrics."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    tokens = sum(saved.get("num_generated_tokens", 0) for saved in state["stateful_callbacks"].values())
    logged = {key: value for entry in state["log_history"] for key, value in entry.items()}  # the last of each
    kept = {key: logged[key] for key in LOGGED if key in logged}
    return {"generated_tokens": tokens} | kept


def write_report(report: dict[str, Any], output_dir: Path, curves: Sequence[str]) -> None:
    """Write `report.json` and the plots of what is in it so far."""
    if "opsd" in report["curves"]:
        report["curve"] = [
            {"step": point["step"], "avg_at_4": point["avg_at_4"]} for point in report["curves"]["opsd"]
        ]
        plot_accuracy(report, output_dir / "accuracy.png")
    partial = output_dir / "report.json.partial"
    partial.write_text(json.dumps(report, indent=2) + "\n")
    partial.replace(output_dir / "report.json")
    plot_tokens([report], output_dir / "tokens.png", curves)


def stored_report(output_dir: Path, model: Path) -> dict[str, Any]:
    """The report of an earlier run on the same base model, or an empty one."""
    file = output_dir / "report.json"
    report = json.loads(file.read_text()) if file.is_file() else {}
    return report if report.get("model") == model.name else {}


def method_settings(method: Method, steps: int, use_vllm: bool) -> dict[str, Any]:
    """What decides about the result of a training of a given base model, as it stands in the report."""
    return {
        "program": method.program,
        "training_file": method.training_file,
        "flags": list(method.flags),
        "steps": method.factor * steps,
        "use_vllm": use_vllm,
        "config": hashlib.sha256((ROOT / method.settings).read_bytes()).hexdigest()[:12],
    }


def run_seed(
    seed: int,
    methods: dict[str, Method],
    steps: int,
    use_vllm: bool,
    output_dir: Path,
    config: BaseModelConfig,
    resume: bool = False,
    curves: Sequence[str] = CURVES,
) -> dict[str, Any]:
    """
    Build the base model of a seed, train it with each method, evaluate all; returns the report and writes it.

    With `resume` what is in the report already, with the same settings, is left as it is. `curves` are those to plot.
    """
    data_dir = output_dir / "data"
    seconds: dict[str, float] = {}
    with phase("build the base model (cached afterwards)", seconds):
        addition.write_data(data_dir, seed)
        model = build_base_model(ROOT / "outputs" / "quickstart" / "base", config)
        link = output_dir / "model"  # a name to find it by
        link.unlink(missing_ok=True)
        link.symlink_to(model)

    report = stored_report(output_dir, model) if resume else {}
    settings = {name: method_settings(method, steps, use_vllm) for name, method in methods.items()}
    done = [name for name in methods if report.get(name, {}).get("settings") == settings[name]]
    methods = {name: method for name, method in methods.items() if name not in done}
    if done:
        logger.info("in %s already: %s", os.path.relpath(output_dir / "report.json"), ", ".join(done))
    if report and not methods:
        return report

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

        if not report:
            report = {"task": "3-digit addition in words", "seed": seed, "model": model.name}
            report["base"] = measure(questions)
            report["teacher"] = measure(privileged)
            report["curves"] = {}
        report["seconds"] = seconds  # of this run
    logger.info("\n%s\n", markdown_table(report))

    for name, method in methods.items():
        run_dir, label = output_dir / name, LABELS.get(name, name)
        with phase(f"train: {label}", seconds):
            train(method, model, data_dir, run_dir, steps, seed, use_vllm)
        with phase(f"evaluate: {label}", seconds):
            saved = checkpoints(run_dir)
            chosen = saved if method.has_curve else {steps: saved[steps]}
            measured = {
                step: measure(questions, checkpoint) | training_results(checkpoint)
                for step, checkpoint in chosen.items()
            }
        ends = {name: steps} | ({f"{name}_{method.factor}x": method.factor * steps} if method.factor > 1 else {})
        for end_name, end in ends.items():
            report[end_name] = measured[end] | {
                "steps": end,
                "train_seconds": round(seconds[f"train: {label}"] * end / (method.factor * steps), 1),
                "settings": settings[name],
            }
        if method.has_curve:
            start = report["base"] | {"generated_tokens": 0}
            report["curves"][name] = [{"step": step} | result for step, result in ({0: start} | measured).items()]
        write_report(report, output_dir, curves)
    stop_engine(engine)
    pool.close()

    seconds["total"] = round(sum(seconds.values()), 1)
    write_report(report, output_dir, curves)
    logger.info("\n%s\n", markdown_table(report))
    logger.info("%.0f seconds; report.json and plots are in %s", seconds["total"], os.path.relpath(output_dir))
    return report


def run_ablations(
    seeds: Sequence[int], groups: Mapping[str, Mapping[str, Method]], steps: int, use_vllm: bool, output_dir: Path
) -> None:
    """
    Train the ablations' base model of each seed with the methods under each heading.

    The summary is in `output_dir`, or in the folder of the seed if there is but one, so that several may run at once.
    """
    methods = {name: method for chosen in groups.values() for name, method in chosen.items()}
    curves = [name for name in ABLATION_CURVES if name in methods]
    folders = [output_dir / f"seed_{seed}" for seed in seeds]
    reports = [
        run_seed(seed, methods, steps, use_vllm, folder, ablation_base(seed), resume=True, curves=curves)
        for seed, folder in zip(seeds, folders, strict=True)
    ]
    flags = {heading: {name: " ".join(m.flags) for name, m in chosen.items()} for heading, chosen in groups.items()}
    write_summary(ablation_table(reports, flags), reports, output_dir if len(seeds) > 1 else folders[0], curves)


def write_summary(
    table: str, reports: Sequence[dict[str, Any]], output_dir: Path, curves: Sequence[str] = CURVES
) -> None:
    """Write `summary.md` and `tokens.png`, and show the table."""
    (output_dir / "summary.md").write_text(table + "\n")
    plot_tokens(reports, output_dir / "tokens.png", curves)
    logger.info("\n%s\n\nsummary.md and tokens.png are in %s", table, os.path.relpath(output_dir))


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
        **SWITCH | {"default": True},
        help="sample the training's rollouts with vLLM (default: true)",
    )
    add(
        "--device",
        choices=["cpu", "gpu"],
        default="cpu",
        help="environment that scripts/quickstart.sh takes: .venv, or .venv-gpu, which computes in bfloat16 (default: "
        "%(default)s)",
    )
    add("--controls", **SWITCH, help="train against a teacher without, and with wrong, solutions too")
    add("--baselines", **SWITCH, help="train with GRPO, SFT and the sampled-token objective too")
    add("--ablations", **SWITCH, help="train the ablations' base model in many ways; goes on where it stopped")
    add("--only", nargs="+", metavar="NAME", help="of the ablations, these")
    add("--output_dir", type=Path, help="default: outputs/quickstart, with --ablations outputs/quickstart/ablations")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: give at least 1")
    if torch.cuda.is_available() != (args.device == "gpu"):
        parser.error(f"--device {args.device}: this Python's torch {torch.__version__} would run on the other device")
    if args.only and not args.ablations:
        parser.error("--only: chooses among the --ablations")
    if args.ablations and (args.controls or args.baselines):
        parser.error("--ablations: has what --controls and --baselines have, on another base model; leave them out")
    try:
        groups = choose_methods(ABLATIONS, args.only)
    except ValueError as error:
        parser.error(str(error))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    default_dir = ROOT / "outputs" / "quickstart" / ("ablations" if args.ablations else "")
    output_dir = (args.output_dir or default_dir).resolve()
    seeds = list(dict.fromkeys(args.seed))
    if args.ablations:
        run_ablations(seeds, groups, args.steps, args.use_vllm, output_dir)
        return
    methods = OPSD | (BASELINES if args.baselines else {}) | (CONTROLS if args.controls else {})
    reports = []
    for seed in seeds:
        folder = output_dir if len(seeds) == 1 else output_dir / f"seed_{seed}"
        reports.append(run_seed(seed, methods, args.steps, args.use_vllm, folder, BaseModelConfig(seed=seed)))
    if len(seeds) > 1:
        write_summary(summary_table(reports), reports, output_dir)


if __name__ == "__main__":
    main()
