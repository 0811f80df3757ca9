"""
Peak memory of a whole optimizer step of OPSD, rollouts included, on a shallow Qwen3 with the real vocabulary.

    python benchmarks/optimizer_step.py --output benchmarks/optimizer_step.md

Each case is a fresh process that trains one step with `OPSDTrainer`: LoRA on all linear layers, adapter-off teacher,
random weights, so that nearly all completions run to their limit. What is reported is the growth of the process above
what it held before the step: of the resident set on a CPU (its peak is reset through /proc), of what PyTorch has
allocated on a GPU.
"""

import argparse
import json
import logging
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import random_qwen3, reset_peak, resident_bytes
from datasets import Dataset
from peft import LoraConfig

from opsd_trainer import OPSDConfig, OPSDTrainer
from quickstart.addition import training_problems
from quickstart.base_model import BaseModelConfig, train_tokenizer

MIB = 2**20
CASES = {
    "full vocabulary, fused": {"loss_implementation": "fused"},
    "sampled token, fused": {"loss_implementation": "fused", "use_tinker_loss": True},
    "full vocabulary, dense": {"loss_implementation": "dense"},
    "sampled token, dense": {"loss_implementation": "dense", "use_tinker_loss": True},
}


def step_growth(case: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Train one step; returns the peak above the start in MiB, and the number of completion tokens."""
    use_cuda = torch.cuda.is_available()
    tokenizer = train_tokenizer(BaseModelConfig())
    sizes = {"intermediate_size": 2 * arguments.hidden_size, "num_key_value_heads": 2}
    model = random_qwen3(tokenizer, arguments.hidden_size, arguments.vocab_size, arguments.num_layers, **sizes)
    with tempfile.TemporaryDirectory() as folder:
        config = OPSDConfig(
            output_dir=folder,
            use_cpu=not use_cuda,
            bf16=use_cuda,
            gradient_checkpointing=False,
            per_device_train_batch_size=arguments.batch_size,
            max_completion_length=arguments.completion_length,
            max_steps=1,
            save_strategy="no",
            fixed_teacher=True,
            teacher_thinking=False,
            beta=arguments.beta,
            disable_tqdm=True,
            **CASES[case],
        )
        trainer = OPSDTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(training_problems(0, arguments.batch_size)),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        if use_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            reset_peak()
            before = resident_bytes("VmRSS")
        trainer.train()
        peak = torch.cuda.max_memory_allocated() if use_cuda else resident_bytes("VmHWM")
        num_tokens = trainer.state.stateful_callbacks["run_state"]["num_generated_tokens"]
    return {"growth": (peak - before) / MIB, "num_tokens": num_tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab_size", type=int, default=151_936)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--num_layers", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--completion_length", type=int, default=256)
    parser.add_argument("--beta", type=float, default=0.5)
    parser.add_argument("--output", type=Path, help="Markdown file; default: standard output only")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        sys.stdout.write("\n" + json.dumps(step_growth(arguments.case, arguments)))
        return

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    results = {}
    for case in CASES:
        logging.info("measuring: %s", case)
        command = [sys.executable, __file__, *sys.argv[1:], "--case", case]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[case] = json.loads(output.splitlines()[-1])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, float32"
    lines = [
        "# Peak memory of an optimizer step",
        "",
        f"`python benchmarks/optimizer_step.py {' '.join(sys.argv[1:])}`",
        "",
        f"{device}, PyTorch {torch.__version__}, Qwen3 with V = {arguments.vocab_size:,}, "
        f"H = {arguments.hidden_size}, {arguments.num_layers} layers, beta {arguments.beta}; {arguments.batch_size} "
        f"rollouts of up to {arguments.completion_length} tokens; above what the process held before the step.",
        "",
        "| objective and loss implementation | completion tokens | peak, MiB |",
        "|---|--:|--:|",
        *(f"| {case} | {result['num_tokens']:,} | {result['growth']:,.0f} |" for case, result in results.items()),
    ]
    report = "\n".join(lines) + "\n"
    sys.stdout.write(report)
    if arguments.output is not None:
        arguments.output.write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
