"""
Measure the divergence at a completion's first tokens and after them, for all pairs of thinking modes of the roles.

    python benchmarks/first_tokens.py --output benchmarks/first_tokens.md

The model is the quickstart's base model for ablations, which knows both modes (built once, in minutes). For each pair
of modes the student samples completions for training problems, at temperature 1, and both roles score them, as in the
first step of a training. Without thinking the header of the assistant's turn closes an empty think block; in thinking
mode the completion opens one. So where the modes differ, the first tokens tell of form and not of the problem.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from data_collator import MicroBatch, SelfDistillationDataCollator, start_rollouts
from opsd.losses import generalized_jsd
from quickstart.addition import training_problems
from quickstart.base_model import ablation_base, build_base_model

ROOT = Path(__file__).resolve().parent.parent
MAX_NEW_TOKENS = 96
NUM_FIRST_TOKENS = 4
DIVERGENCES = {"JSD (beta 0.5)": 0.5, "KL(teacher‖student) (beta 0)": 0.0}
CASES = [  # student's mode, teacher's mode, --teacher_prefill
    (False, False, ""),
    (True, True, ""),
    (True, False, ""),
    (False, True, ""),
    (False, True, "<think>\n"),
    (False, True, "<think>\n\n</think>\n\n"),
]


@torch.no_grad()
def sample(model: PreTrainedModel, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Completions of the student's prompts, and the mask of their tokens, the end of turn included: (B, C)."""
    torch.manual_seed(0)
    sequences = model.generate(
        input_ids=batch.prompt_ids,
        attention_mask=batch.prompt_mask,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
    )
    completions = sequences[:, batch.prompt_ids.shape[1] :]
    return completions, (completions != model.generation_config.pad_token_id).long()


@torch.no_grad()
def completion_logits(model: PreTrainedModel, prompts: Tensor, prompt_mask: Tensor, completions: Tensor) -> Tensor:
    """Return (B, C, V): the logits of one role at each token of the completions, after its own left-padded prompts."""
    mask = torch.cat([prompt_mask, torch.ones_like(completions)], dim=1)  # the padding after a completion is not read
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(torch.cat([prompts, completions], dim=1), attention_mask=mask, position_ids=position_ids).logits
    return logits[:, prompts.shape[1] - 1 : -1]


def by_position(divergence: Tensor, mask: Tensor) -> list[float]:
    """Return the mean at each first token, the mean of all later tokens, and the share of the first ones."""
    divergence = divergence * mask  # (B, C)
    sums, counts = divergence.sum(0), mask.sum(0)  # (C,)
    first, rest = slice(None, NUM_FIRST_TOKENS), slice(NUM_FIRST_TOKENS, None)
    means = sums[first] / counts[first]
    others = sums[rest].sum() / counts[rest].sum()
    share = sums[first].sum() / sums.sum()
    return [*means.tolist(), others.item(), share.item()]


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[dict[str, Any]], case: tuple
) -> dict[str, list[float]]:
    """`by_position` of each divergence between the roles in the given modes."""
    student_thinking, teacher_thinking, prefill = case
    collator = SelfDistillationDataCollator(
        tokenizer, student_thinking=student_thinking, teacher_thinking=teacher_thinking, teacher_prefill=prefill
    )
    batch = collator(start_rollouts([problem | collator.encode(problem) for problem in problems]))
    completions, mask = sample(model, batch)
    student = completion_logits(model, batch.prompt_ids, batch.prompt_mask, completions)
    teacher = completion_logits(model, batch.teacher_prompt_ids, batch.teacher_prompt_mask, completions)
    return {
        name: by_position(generalized_jsd(student, teacher, beta=beta), mask) for name, beta in DIVERGENCES.items()
    }


def table(measured: Sequence[dict[str, list[float]]]) -> str:
    """One row for each pair of modes, one table for each divergence."""
    modes = {False: "off", True: "on"}
    lines = []
    for name in DIVERGENCES:
        positions = " | ".join(f"token {i}" for i in range(NUM_FIRST_TOKENS))
        lines += [
            f"{name}, nats per token:",
            "",
            f"| student thinks | teacher thinks | `--teacher_prefill` | {positions} | others "
            f"| share of the first {NUM_FIRST_TOKENS} |",
            "|---|---|---|" + "--:|" * (NUM_FIRST_TOKENS + 2),
        ]
        for (student, teacher, prefill), results in zip(CASES, measured, strict=True):
            *values, share = results[name]
            text = f"`{prefill!r}`" if prefill else ""
            cells = [
                modes[student],
                modes[teacher],
                text,
                *(f"{value:.3f}" for value in values),
                f"{100 * share:.0f} %",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the base model and the problems (default: 0)")
    parser.add_argument("--num_problems", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="Markdown file; default: standard output only")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)  # the fastest for a tiny model

    folder = build_base_model(ROOT / "outputs" / "quickstart" / "base", ablation_base(arguments.seed))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    problems = training_problems(arguments.seed, arguments.num_problems)
    measured = [measure(model, tokenizer, problems, case) for case in CASES]

    command = " ".join(["python benchmarks/first_tokens.py", *sys.argv[1:]])
    text = (
        f"# Divergence at the first tokens of a completion\n\n`{command}`\n\n"
        f"The quickstart's base model for ablations, seed {arguments.seed}; {arguments.num_problems} completions of "
        "the student for each pair of modes, temperature 1. Means over the completions that have the token; of "
        "`others`, over their tokens. The share is that of the sum over all tokens.\n\n"
        f"{table(measured)}"
    )
    sys.stdout.write(text)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
