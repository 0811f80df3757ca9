"""
OPSD here and in TRL's own trainers for self-distillation, side by side: time of a step, memory, accuracy.

    python benchmarks/peers.py --steps 30 --seeds 0 1 --output benchmarks/peers.md
    python benchmarks/peers.py --lengths aime --steps 3 --output benchmarks/peers.md

Each trainer has a process of its own, and they take their steps in turn. All start from one model, with the same LoRA
adapter, optimizer, schedule, prompts (compared token by token), batches and sampling with transformers, in float32 on
one thread. They learn the Jensen-Shannon divergence over the whole vocabulary, against the model without adapter.

Times are processor seconds, the system's for the process included, so that other programs on the machine count little.
The phases are told apart from outside, by what the trainer calls:
  sampling     the model's `generate`
  preparation  the rest of `_prepare_inputs`
  teacher      forward passes without gradient; in TRL's trainers with the head, here without (the fused loss has it)
  student      the rest of `training_step`: forward pass, loss and backward pass
  rest         the rest of the step: optimizer, log, data

The quickstart's task has its base model of seed 0, 32 rollouts in a micro-batch. With --lengths aime the model is a
small random Qwen3 with the vocabulary of --vocab_size, and the completions are given, at the lengths of
`benchmarks/step.py` divided by --scale. Each call adds its setting to the file of results beside --output.
"""

import argparse
import copy
import json
import logging
import multiprocessing
import os
import platform
import re
import statistics
import sys
import tempfile
import time
import zlib
from collections import defaultdict
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import torch
import transformers
import trl
from common import aime_lengths, random_qwen3, reset_peak, resident_bytes
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Trainer, TrainerCallback
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from data_collator import STUDENT_PROMPT, TEACHER_PROMPT, encode_chat_prompt, fill_template
from opsd.grading import extract_answer
from opsd_trainer import OPSDConfig, OPSDTrainer
from quickstart.addition import held_out_problems, training_problems

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("sampling", "preparation", "teacher", "student", "rest")
TRAINERS = {"opsd": "this project", "sdft": "SDFTTrainer", "sdpo": "SDPOTrainer", "gold": "GOLDTrainer"}
# From the sources of TRL
DIFFERENCES = """\
| | this project | SDFTTrainer | SDPOTrainer | GOLDTrainer |
|---|---|---|---|---|
| teacher sees the solution | yes | yes | as feedback, or another rollout | no: the student's prompt |
| thinking mode | of each role | one for both | one for both | of the data |
| clip of a token's divergence | yes | no | no | no |
| LoRA to vLLM | as an adapter | merged into the base | merged into the base | merged into the base |
| sequences of a micro-batch | end to end | padded as the step's longest | padded as the step's longest | padded |
"""


class Clock(TrainerCallback):
    """Takes steps in turn with the other trainers, and keeps the processor seconds of each phase of each step."""

    def __init__(self, trainer: Trainer, connection: Connection):
        self.connection = connection
        self.steps: list[dict[str, float]] = []
        self.seconds: dict[str, float] = {}
        self.open = ["rest"]
        self.mark = self.start = 0.0
        self.wrap(trainer, "training_step", "student")
        self.wrap(trainer, "_prepare_inputs", "preparation")
        self.wrap(trainer.model, "generate", "sampling")
        causal_lm = trainer.model.get_base_model()
        models = [causal_lm, causal_lm.base_model]  # of the first, the trainer here calls the second alone
        if isinstance(teacher := getattr(trainer, "teacher_model", None), torch.nn.Module):
            models += [teacher] * (teacher is not trainer.model)
        for model in models:
            model.register_forward_pre_hook(self.before_forward)
            model.register_forward_hook(self.after_forward)

    def switch(self) -> None:
        now = time.process_time()
        self.seconds[self.open[-1]] = self.seconds.get(self.open[-1], 0.0) + now - self.mark
        self.mark = now

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            self.switch()
            self.open.append(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch()
                self.open.pop()

        setattr(owner, name, timed)

    def before_forward(self, *args: Any) -> None:
        self.switch()
        is_teacher = self.open[-1] in ("student", "teacher") and not torch.is_grad_enabled()
        self.open.append("teacher" if is_teacher else self.open[-1])

    def after_forward(self, *args: Any) -> None:
        self.switch()
        self.open.pop()

    def end_step(self) -> None:
        self.switch()
        self.steps.append({phase: self.seconds.get(phase, 0.0) for phase in PHASES})
        self.steps[-1]["wall"] = time.perf_counter() - self.start
        self.connection.send(None)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.start:
            self.end_step()  # here, so that what follows on a step is in it
        self.connection.recv()
        self.seconds = {}
        self.mark, self.start = time.process_time(), time.perf_counter()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.end_step()


def make_problems(arguments: argparse.Namespace) -> list[dict[str, str]]:
    """Make the training problems: the quickstart's, or digits without a meaning, of AIME-like lengths."""
    if arguments.lengths == "quickstart":
        return training_problems(0, max(1024, arguments.steps * arguments.batch_size * arguments.accumulation_steps))
    generator = torch.Generator().manual_seed(0)

    def digits(length: float) -> str:
        number = max(2, round(length / arguments.scale))
        return "".join(map(str, torch.randint(10, (number,), generator=generator).tolist()))

    lengths = [aime_lengths(generator) for _ in range(arguments.batch_size * arguments.accumulation_steps)]
    return [{"problem": digits(problem), "solution": digits(solution)} for problem, _, solution in lengths]


def prompts_of(problem: dict[str, str]) -> dict[str, str]:
    """Return what the user says to each role."""
    templates = {"student": STUDENT_PROMPT, "teacher": TEACHER_PROMPT}
    return {role: fill_template(template, **problem) for role, template in templates.items()}


def make_trainer(name: str, model: Path, seed: int, folder: str, arguments: argparse.Namespace) -> Trainer:
    """Make a trainer for the same job."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    problems = make_problems(arguments)
    texts = [prompts_of(problem) for problem in problems]
    settings = {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": arguments.batch_size,
        "gradient_accumulation_steps": arguments.accumulation_steps,
        "max_completion_length": arguments.max_completion_length,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "max_steps": arguments.steps,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
    }
    common = {
        "processing_class": tokenizer,
        "peft_config": LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    }
    student = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if name == "opsd":
        settings |= {"max_length": 8192, "beta": 0.5, "jsd_token_clip": 0.0, "fixed_teacher": True}
        settings |= {"teacher_thinking": False, "student_thinking": False}
        return OPSDTrainer(student, OPSDConfig(**settings), Dataset.from_list(problems), **common)
    if name == "gold":
        settings |= {"max_length": 8192, "beta": 0.5, "lmbda": 1.0}
        chat = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text["student"]}],
                add_generation_prompt=True,
                tokenize=False,
                enable_thinking=False,
            )
            for text in texts
        ]
        rows = [{"prompt": prompt, "completion": p["solution"]} for prompt, p in zip(chat, problems, strict=True)]
        return GOLDTrainer(
            student,
            copy.deepcopy(student),
            args=GOLDConfig(**settings),
            train_dataset=Dataset.from_list(rows),
            **common,
        )
    rows = [
        {"prompt": [{"role": "user", "content": text["student"]}], "privileged_context": text["teacher"]}
        for text in texts
    ]
    settings |= {"distillation_mode": "full_logits", "distillation_alpha": 0.5, "teacher_model_kind": "base"}
    settings |= {"num_generations": 1, "max_prompt_length": None, "chat_template_kwargs": {"enable_thinking": False}}
    if name == "sdft":
        config = SDFTConfig(**settings)
        config.teacher_prompt_template = "{privileged_context}"  # it asks for the student's whole prompt in it
        return SDFTTrainer(student, config, Dataset.from_list(rows), **common)
    settings |= {"use_successful_as_teacher": False, "include_environment_feedback": True}
    settings |= {"reprompt_template": "{feedback}", "feedback_template": "{feedback_raw}"}

    def no_reward(completions: list, **kwargs: Any) -> list[float]:
        return [0.0] * len(completions)

    return SDPOTrainer(student, no_reward, SDPOConfig(**settings), Dataset.from_list(rows), **common)


def give_completions(trainer: Trainer, arguments: argparse.Namespace) -> None:
    """Let `generate` return given tokens of AIME-like lengths, the same in all trainers."""
    tokenizer = trainer.processing_class

    def generate(input_ids, attention_mask, generation_config, return_dict_in_generate=False, **kwargs):
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            key = zlib.crc32(json.dumps(ids[mask.bool()].tolist()).encode())
            generator = torch.Generator().manual_seed(key)
            length = round(aime_lengths(generator)[1] / arguments.scale)
            tokens = torch.randint(10, len(tokenizer) - 10, (length,), generator=generator)
            if length < generation_config.max_new_tokens:
                tokens[-1] = tokenizer.eos_token_id
            rows.append(tokens)
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
        sequences = torch.cat([input_ids, padded], dim=1)
        return SimpleNamespace(sequences=sequences) if return_dict_in_generate else sequences

    trainer.model.generate = generate


def accuracy(trainer: Trainer, seed: int, num_samples: int) -> float:
    """Return the share of right samples in percent on the quickstart's held-out problems, without thinking."""
    tokenizer, problems = trainer.processing_class, held_out_problems()
    prompts = [encode_chat_prompt(tokenizer, prompts_of(problem)["student"], thinking=False) for problem in problems]
    inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt", padding_side="left")
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    trainer.model.eval()
    torch.manual_seed(seed)
    width, num_right = inputs["input_ids"].shape[1], 0
    for _ in range(num_samples):
        sequences = trainer.model.generate(**inputs, generation_config=config)
        for sequence, problem in zip(sequences[:, width:], problems, strict=True):
            answer = extract_answer(tokenizer.decode(sequence, skip_special_tokens=True))
            num_right += answer == problem["answer"]
    return 100 * num_right / (num_samples * len(problems))


def prompts_seen(trainer: Trainer) -> dict[str, list[int]]:
    """Return the first prompt of each role as a trainer's own code encodes it."""
    if isinstance(trainer, OPSDTrainer):
        return {role: trainer.train_dataset[0][f"{role}_prompt_ids"] for role in ("student", "teacher")}
    row = trainer.train_dataset[0]
    if isinstance(trainer, GOLDTrainer):
        return {"student": row["input_ids"][: row["completion_mask"].index(1)]}
    teacher = [{"role": "user", "content": row["privileged_context"]}]
    student, teacher = trainer._tokenize_prompts([row["prompt"], teacher])
    return {"student": student, "teacher": teacher}


def work(name: str, model: Path, seed: int, arguments: argparse.Namespace, connection: Connection) -> None:
    """Train with one trainer, in a process of its own; send its results."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(name, model, seed, folder, arguments)
        if arguments.lengths == "aime":
            give_completions(trainer, arguments)
        prompts = prompts_seen(trainer)
        num_tokens = defaultdict(int)
        generate = trainer.model.generate

        def count(input_ids, *args, **kwargs):
            outputs = generate(input_ids, *args, **kwargs)
            new = getattr(outputs, "sequences", outputs)[:, input_ids.shape[1] :]
            num_tokens["generated"] += int((new != trainer.processing_class.pad_token_id).sum())
            return outputs

        trainer.model.generate = count
        trainer.add_callback(clock := Clock(trainer, connection))
        reset_peak()
        before = resident_bytes("VmRSS")
        trainer.train()
        result = {"steps": clock.steps, "peak": resident_bytes("VmHWM") - before, "prompts": prompts}
        result["generated_tokens"] = num_tokens["generated"]
        if arguments.lengths == "quickstart":
            trainer.model.generate = generate
            result["accuracy"] = accuracy(trainer, seed, arguments.num_samples)
        connection.send(result)


def run(model: Path, seed: int, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Train with all trainers, a step of each in turn."""
    context, workers = multiprocessing.get_context("fork"), {}
    for name in arguments.trainers:
        here, there = context.Pipe()
        process = context.Process(target=work, args=(name, model, seed, arguments, there), daemon=True)
        process.start()
        there.close()
        workers[name] = here
    for _ in range(arguments.steps):
        for connection in workers.values():
            connection.send(None)
            connection.recv()
    results = {name: connection.recv() for name, connection in workers.items()}
    expected = results[arguments.trainers[0]]["prompts"]
    for name, result in results.items():
        for role, ids in result.pop("prompts").items():
            if ids != expected.get(role, ids):
                raise RuntimeError(f"{name}: the {role}'s prompt differs")
    return results


def summarize(runs: list[dict[str, Any]], num_first: int) -> dict[str, Any]:
    """Summarize a trainer's runs: medians over the steps of all but the first ones, sums and means over the runs."""
    steps = [step for run in runs for step in run["steps"][num_first:]]
    summary: dict[str, Any] = {phase: statistics.median(step[phase] for step in steps) for phase in (*PHASES, "wall")}
    summary["training"] = statistics.median(step["teacher"] + step["student"] for step in steps)
    summary["step"] = statistics.median(sum(step[phase] for phase in PHASES) for step in steps)
    summary["peak_mib"] = max(run["peak"] for run in runs) / 2**20
    summary["generated_tokens"] = statistics.mean(run["generated_tokens"] for run in runs)
    if "accuracy" in runs[0]:
        summary["accuracy"] = [run["accuracy"] for run in runs]
    return summary


def table(results: dict[str, Any]) -> list[str]:
    """Return the lines of a setting's table."""
    lines = [
        "| | " + " | ".join(PHASES) + " | whole step | training part | ratio | peak, MiB | tokens | right, % |",
        "|---|" + "--:|" * (len(PHASES) + 6),
    ]
    for name, result in results.items():
        ratio = results["opsd"]["training"] / result["training"] if "opsd" in results else float("nan")
        scores = " / ".join(f"{score:.1f}" for score in result.get("accuracy", ())) or "-"
        cells = [f"{result[phase]:.3f}" for phase in (*PHASES, "step", "training")]
        cells += [f"{ratio:.2f}", f"{result['peak_mib']:,.0f}", f"{result['generated_tokens']:,.0f}", scores]
        lines.append(f"| {TRAINERS[name]} | " + " | ".join(cells) + " |")
    return lines


def report(settings: dict[str, Any]) -> str:
    """Return the page of all settings that were measured."""
    lines = ["# OPSD here and in TRL's trainers", ""]
    for heading, setting in settings.items():
        lines += [f"## {heading}", "", f"`{setting['command']}`, {setting['date']}", "", setting["machine"], ""]
        lines += [*table(setting["results"]), ""]
    lines += [
        "Processor seconds of an optimizer step, median over the steps; `benchmarks/peers.py` says what the phases "
        "are. The training part is teacher and student: both forward passes, loss and backward pass. The ratio is "
        "this project's training part over that trainer's. The peak is the growth of the process's memory over "
        "training. Tokens are those sampled. Right are samples on 256 held-out problems after training, of each seed.",
        "",
        "## Where they differ",
        "",
        DIFFERENCES,
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", choices=("quickstart", "aime"), default="quickstart")
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--num_samples", type=int, default=4, help="of each held-out problem (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, help="of a micro-batch; default: 32, with --lengths aime 4")
    parser.add_argument("--accumulation_steps", type=int, help="default: 1, with --lengths aime 2")
    parser.add_argument("--vocab_size", type=int, default=151_936, help="with --lengths aime")
    parser.add_argument("--hidden_size", type=int, default=256, help="with --lengths aime")
    parser.add_argument("--num_layers", type=int, default=8, help="with --lengths aime")
    parser.add_argument("--scale", type=float, default=8.0, help="with --lengths aime: divides all lengths")
    parser.add_argument("--output", type=Path, help="Markdown file; default: standard output only")
    arguments = parser.parse_args()
    is_aime = arguments.lengths == "aime"
    arguments.batch_size = arguments.batch_size or (4 if is_aime else 32)
    arguments.accumulation_steps = arguments.accumulation_steps or (2 if is_aime else 1)
    arguments.max_completion_length = round(1024 / arguments.scale) if is_aime else 64
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()

    runs: dict[str, list] = {name: [] for name in arguments.trainers}
    with tempfile.TemporaryDirectory() as folder:
        model = ROOT / "tests" / "tiny_model"
        if is_aime:
            tokenizer = AutoTokenizer.from_pretrained(model)
            model = Path(folder)
            sizes = (arguments.hidden_size, arguments.vocab_size, arguments.num_layers)
            random_qwen3(tokenizer, *sizes).save_pretrained(model)
            tokenizer.save_pretrained(model)
        for seed in arguments.seeds:
            for name, result in run(model, seed, arguments).items():
                runs[name].append(result)
    processors = Path("/proc/cpuinfo").read_text()
    processor = re.search(r"model name\s*: (.*)", processors)
    heading = "The quickstart's task"
    if is_aime:
        heading = f"AIME-like lengths, V = {arguments.vocab_size:,}"
    sizes = f"{arguments.accumulation_steps} x {arguments.batch_size} rollouts a step, {arguments.steps} steps"
    if is_aime:
        sizes += f", {arguments.num_layers} layers, hidden size {arguments.hidden_size}, lengths / {arguments.scale:g}"
    setting = {
        "command": f"python benchmarks/peers.py {' '.join(sys.argv[1:])}".strip(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{processor[1] if processor else platform.machine()}, 1 thread, float32. PyTorch "
        f"{torch.__version__}, transformers {transformers.__version__}, TRL {trl.__version__}. {sizes}.",
        "results": {name: summarize(of_trainer, 2 if arguments.steps > 4 else 1) for name, of_trainer in runs.items()},
    }
    settings = {heading: setting}
    if arguments.output is not None:
        kept = arguments.output.with_suffix(".json")
        settings = (json.loads(kept.read_text()) if kept.is_file() else {}) | settings
        kept.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        arguments.output.write_text(report(settings), encoding="utf-8")
    sys.stdout.write(report(settings))


if __name__ == "__main__":
    main()
