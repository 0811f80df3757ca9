"""
Time and memory of the training part of an optimizer step: micro-batches padded, padded after sorting, and packed.

    python benchmarks/step.py --output benchmarks/step.md

The rollouts are given, with random tokens, so that all three forms learn from the same. The training part is the
teacher's and the student's forward pass, the loss and the backward pass of all micro-batches. The three forms take
turns, and each time is the median over the rounds. On a CPU it is in processor seconds, which other programs on the
machine do not lengthen. The model is a Qwen3 with random weights, with LoRA on all linear layers; without the adapter
it teaches. Its head has the share of the model's operations that it has in Qwen3-1.7B.

Lengths, before they are divided by --scale:
  equal      prompts of 150 and 750 tokens, completions of 1,024
  AIME-like  prompts of 60 to 250 tokens; solutions of about 600, up to 4,000; a quarter of the completions end early
  one long   as AIME-like, but one solution has 16,000 tokens
"""

import argparse
import logging
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from common import aime_lengths, random_qwen3, reset_peak, resident_bytes
from datasets import Dataset
from peft import LoraConfig

from data_collator import MicroBatch, Rollout
from opsd.packing import divide_evenly
from opsd_trainer import OPSDConfig, OPSDTrainer
from quickstart.addition import training_problems
from quickstart.base_model import BaseModelConfig, train_tokenizer

DISTRIBUTIONS = ("equal", "AIME-like", "one long")
FORMS = ("padded", "sorted", "packed")


def make_rollouts(distribution: str, arguments: argparse.Namespace) -> list[Rollout]:
    """Make the rollouts of a step, with the lengths of a distribution."""
    generator = torch.Generator().manual_seed(arguments.seed)

    def tokens(length: float) -> list[int]:
        length = max(2, round(length / arguments.scale))
        return torch.randint(10, arguments.vocab_size, (length,), generator=generator).tolist()

    rollouts = []
    for row in range(arguments.batch_size * arguments.accumulation_steps):
        prompt, completion, solution = aime_lengths(generator) if distribution != "equal" else (150.0, 1024.0, 600.0)
        if distribution == "one long" and row == 1:
            solution = 16_000
        prompt_ids = tokens(prompt)
        rollouts.append(Rollout(row, "", prompt_ids, prompt_ids + tokens(solution), completion_ids=tokens(completion)))
    return rollouts


def make_trainer(folder: str, arguments: argparse.Namespace) -> OPSDTrainer:
    """Make a trainer of a random Qwen3."""
    use_cuda = torch.cuda.is_available()
    tokenizer = train_tokenizer(BaseModelConfig())
    model = random_qwen3(tokenizer, arguments.hidden_size, arguments.vocab_size, arguments.num_layers)
    config = OPSDConfig(
        output_dir=folder,
        use_cpu=not use_cuda,
        bf16=use_cuda,
        gradient_checkpointing=arguments.gradient_checkpointing,
        per_device_train_batch_size=arguments.batch_size,
        gradient_accumulation_steps=arguments.accumulation_steps,
        max_steps=1,
        fixed_teacher=True,
        beta=0.0,
        jsd_token_clip=0.05,
        disable_tqdm=True,
    )
    trainer = OPSDTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(training_problems(0, arguments.batch_size * arguments.accumulation_steps)),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False),
    )
    if not use_cuda:
        trainer.metrics._now = time.process_time
    trainer._check_packing()
    if not trainer._is_packed:
        raise RuntimeError("the model does not keep packed sequences apart")
    return trainer


def make_batches(trainer: OPSDTrainer, rollouts: list[Rollout], form: str) -> list[MicroBatch]:
    """Divide the rollouts over the micro-batches of a step."""
    size, num_batches = trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps
    if form == "packed":
        parts = divide_evenly(rollouts, num_batches)
    else:
        if form == "sorted":
            rollouts = sorted(rollouts, key=lambda r: len(r.teacher_prompt_ids) + len(r.completion_ids))
        parts = [rollouts[start : start + size] for start in range(0, len(rollouts), size)]
    return [trainer.collator(part).to(trainer.accelerator.device) for part in parts]


def num_computed(batches: list[MicroBatch], form: str) -> int:
    """Number of tokens, padding included, that both roles' forward passes compute."""
    if form == "packed":
        return sum(batch.packed(role).input_ids.numel() for batch in batches for role in ("student", "teacher"))
    return sum(batch.model_inputs(role)["input_ids"].numel() for batch in batches for role in ("student", "teacher"))


def step(
    trainer: OPSDTrainer, batches: list[MicroBatch], form: str
) -> tuple[dict[str, float], int, float, torch.Tensor]:
    """Run the training part; returns seconds by phase, peak memory in bytes, the loss, and the gradient."""
    device = trainer.accelerator.device
    trainer._is_packed = form == "packed"
    trainer._loss_denominator = torch.tensor(float(sum(batch.loss_mask.sum() for batch in batches)), device=device)
    trainer.model.zero_grad(set_to_none=True)
    trainer.model.train()
    trainer.metrics.pop_seconds()
    seconds, loss = defaultdict(float), 0.0
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak()
    before = resident_bytes("VmRSS")
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start = clock()
    for batch in batches:
        with trainer.metrics.timed("student"), trainer.accelerator.autocast():
            part = trainer.compute_loss(trainer.model, batch)
        with trainer.metrics.timed("backward"):
            part.backward()
        loss += part.item()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds["whole"] = clock() - start
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident_bytes("VmHWM") - before
    values, _ = trainer.metrics.pop_seconds()
    seconds |= {phase: values[phase] for phase in ("teacher", "student", "backward")}
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    return seconds, peak, loss, gradient


def measure(distribution: str, trainer: OPSDTrainer, arguments: argparse.Namespace) -> list[str]:
    """Measure one distribution; returns a line of the table for each form."""
    rollouts = make_rollouts(distribution, arguments)
    num_real = sum(len(r.prompt_ids) + len(r.teacher_prompt_ids) + 2 * len(r.completion_ids) for r in rollouts)
    batches = {form: make_batches(trainer, rollouts, form) for form in FORMS}
    times: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
    losses, gradients, peaks = {}, {}, dict.fromkeys(FORMS, 0)
    for _ in range(arguments.rounds):
        for form in FORMS:
            seconds, peak, losses[form], gradients[form] = step(trainer, batches[form], form)
            times[form].append(seconds)
            peaks[form] = max(peaks[form], peak)
    # Each sequence by itself, without any padding
    alone = [trainer.collator([rollout]).to(trainer.accelerator.device) for rollout in rollouts]
    *_, loss, gradient = step(trainer, alone, "padded")
    lines = []
    for form in FORMS:
        median = {phase: statistics.median(t[phase] for t in times[form]) for phase in times[form][0]}
        ratio = median["whole"] / statistics.median(t["whole"] for t in times["padded"])
        loss_error = abs(losses[form] - loss) / abs(loss)
        gradient_error = ((gradients[form] - gradient).norm() / gradient.norm()).item()
        lines.append(
            f"| {distribution} | {form} | {num_computed(batches[form], form) / num_real:.2f} "
            f"| {median['teacher']:.2f} | {median['student']:.2f} | {median['backward']:.2f} | {median['whole']:.2f} "
            f"| {ratio:.2f} | {num_real / median['whole']:,.0f} | {peaks[form] / 2**30:.2f} | {loss_error:.0e} "
            f"| {gradient_error:.0e} |"
        )
        logging.info("%s", lines[-1])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab_size", type=int, default=12_288)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--num_layers", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=4, help="rollouts in a micro-batch")
    parser.add_argument("--accumulation_steps", type=int, default=4)
    parser.add_argument("--scale", type=float, default=4.0, help="divides all lengths")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--distributions", nargs="+", choices=DISTRIBUTIONS, default=DISTRIBUTIONS)
    parser.add_argument("--output", type=Path, help="Markdown file; default: standard output only")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, arguments)
        lines = [
            line for distribution in arguments.distributions for line in measure(distribution, trainer, arguments)
        ]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    report = "\n".join(
        [
            "# The training part of an optimizer step",
            "",
            f"`python benchmarks/step.py {' '.join(sys.argv[1:])}`, {time.strftime('%Y-%m-%d')}",
            "",
            f"{device}, PyTorch {torch.__version__}. Qwen3 of {arguments.num_layers} layers, hidden size "
            f"{arguments.hidden_size}, V = {arguments.vocab_size:,}; {arguments.accumulation_steps} micro-batches of "
            f"{arguments.batch_size} rollouts; lengths divided by {arguments.scale:g}; median of {arguments.rounds} "
            "rounds, the forms in turn.",
            "",
            "Seconds of the teacher's forward pass, of the student's with the loss, of the backward pass, and of the "
            "whole; on a CPU the processor's. The peak is what PyTorch held on a GPU, on a CPU the growth of the "
            "process. The last two columns are relative differences from each sequence alone.",
            "",
            "| lengths | micro-batches | computed / real tokens | teacher | student | backward | whole | ratio | "
            "tokens/s | peak, GiB | loss | gradient |",
            "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
            *lines,
        ]
    )
    sys.stdout.write(report + "\n")
    if arguments.output is not None:
        arguments.output.write_text(report + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
