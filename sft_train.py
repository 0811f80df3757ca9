r"""
Fine-tune a model on reference solutions (SFT): the off-policy baseline of the paper (Table 4).

    accelerate launch sft_train.py --model_name_or_path Qwen/Qwen3-1.7B --dtype bfloat16 \
        --dataset_name siyanzhao/Openthoughts_math_30k_opsd --use_peft --lora_target_modules all-linear

The model sees the prompt that the evaluator asks with. All flags: `python sft_train.py --help`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from opsd.run.flags import check_flags, exit_on_invalid_input

if __name__ == "__main__":  # before torch and TRL are imported
    with exit_on_invalid_input("sft_train.py"):
        check_flags("sft_train", "SFTArguments", "SFTConfig")

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, get_peft_config

from data_collator import STUDENT_PROMPT, control_tokens, encode_chat_prompt, fill_template, texts_of
from opsd.config import check_unused
from opsd.run.arguments import BaselineArguments, parse_arguments
from opsd.run.problem_data import drop_long_rows
from opsd.run.run import Run
from opsd.thinking import check_thinking_mode

DEFAULTS = {
    "max_length": 16_000,  # paper Table 4; TRL would cut at 1,024
    "completion_only_loss": True,
}
PROMPTS = {"input_ids": "model learns"}  # column -> heading
UNUSED = {
    "the prompts are encoded with the tokenizer of the model's folder before the trainer gets them": (
        "chat_template_path", "eos_token", "dataset_text_field", "assistant_only_loss",
    ),
    "what is longer than --max_length is left out, not cut": ("truncation_mode",),
}  # fmt: skip


@dataclass
class SFTArguments(BaselineArguments):
    """Data and prompt of SFT."""

    solution_column: str = field(
        default="solution",
        metadata={
            "help": "Column of the solution, which is learned. Of conversations it is the assistant's turn after the "
            "problem; without a column solution that of --problem_column."
        },
    )


def encode(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, thinking: bool, student_prompt: str = STUDENT_PROMPT
) -> dict[str, list[int] | int]:
    """
    Return the token ids of prompt, solution and end of turn, their number, and 1 for each that is to be learned.

    TRL would render the whole conversation with the chat template, which in many models differs from the prompt that
    they are asked with: the empty think block of the non-thinking mode is in one and not in the other.
    """
    content = fill_template(student_prompt, **texts_of(row))
    prompt_ids = encode_chat_prompt(tokenizer, content, thinking, row.get("history") or ())
    # One end of turn, where the solution brings one too; control tokens inside it are text
    solution = re.sub(rf"(?:\s*(?:{control_tokens(tokenizer)}))+\s*$", "", row["solution"])
    completion_ids = tokenizer(solution, add_special_tokens=False, split_special_tokens=True).input_ids
    completion_ids.append(tokenizer.eos_token_id)
    return {
        "input_ids": prompt_ids + completion_ids,
        "completion_mask": [0] * len(prompt_ids) + [1] * len(completion_ids),
        "num_tokens": len(prompt_ids) + len(completion_ids),
    }


def prepare(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    thinking: bool,
    args: SFTConfig,
    student_prompt: str = STUDENT_PROMPT,
) -> Dataset:
    """Encode all rows and drop those that are too long: a solution without its end teaches not to end."""
    encoded = dataset.map(
        encode,
        fn_kwargs={"tokenizer": tokenizer, "thinking": thinking, "student_prompt": student_prompt},
        remove_columns=dataset.column_names,
        num_proc=args.dataset_num_proc,
        desc="Encoding prompts and solutions",
    )
    return drop_long_rows(encoded, args.max_length, "max_length")


def main(arguments: list[str] | None = None) -> None:
    """Run the program with the given command line (default: that of the process)."""
    with exit_on_invalid_input("sft_train.py"):
        script_args, training_args, model_args = parse_arguments(SFTArguments, SFTConfig, arguments, **DEFAULTS)
        check_unused(training_args, UNUSED)
        run = Run("sft", script_args, training_args, model_args)
        run.check(num_tokens=training_args.max_length)
        columns = {"problem_column": script_args.problem_column, "solution_column": script_args.solution_column}
        columns |= script_args.template_columns
        prepare_rows = partial(
            prepare, thinking=script_args.thinking, args=training_args, student_prompt=script_args.student_prompt
        )
        if script_args.dry_run is not None:
            run.dry_run((columns, {}), prepare_rows, PROMPTS)
            return

        from opsd.sft import CompleteSFTTrainer  # the dry run needs no trainer

        datasets = run.load_data(columns)
        tokenizer = run.load_tokenizer()
        check_thinking_mode(tokenizer, script_args.thinking, "thinking true", "thinking false")
        run.make_skeleton()
        run.check_resumed_settings()
        train_dataset, eval_dataset = (
            None if dataset is None else prepare_rows(dataset, tokenizer) for dataset in datasets
        )

    training_args.model_init_kwargs = run.model_options()
    trainer = CompleteSFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    run.introduce(trainer, PROMPTS)
    run.train(trainer)


if __name__ == "__main__":
    main()
