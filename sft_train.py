"""
Fine-tune a model on reference solutions (SFT): the off-policy baseline of the paper (Table 4).

    accelerate launch sft_train.py --model_name_or_path Qwen/Qwen3-1.7B --dtype bfloat16 \
        --dataset_name siyanzhao/Openthoughts_math_30k_opsd --use_peft --lora_target_modules all-linear

The model sees the prompt that the evaluator asks with. All flags: `python sft_train.py --help`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer, get_peft_config

from data_collator import STUDENT_PROMPT, check_template, control_tokens, encode_chat_prompt, fill_template
from opsd.run.arguments import RunArguments, parse_arguments
from opsd.run.checkpoints import CompleteCheckpoints
from opsd.run.problem_data import drop_long_rows
from opsd.run.run import Run, exit_on_invalid_input
from opsd.thinking import check_thinking_mode


@dataclass
class SFTArguments(RunArguments):
    """Data and prompt of SFT."""

    solution_column: str = field(default="solution", metadata={"help": "Column of the solution, which is learned."})
    student_prompt: str = field(
        default=STUDENT_PROMPT, metadata={"help": "Template of the prompt, with {problem}; as in the evaluation."}
    )
    thinking: bool = field(default=False, metadata={"help": "Thinking mode of the prompt; as in the evaluation."})


class CompleteSFTTrainer(CompleteCheckpoints, SFTTrainer):
    """TRL's `SFTTrainer`, whose checkpoints are complete or not used, and which skips steps that are not finite."""


def encode(
    row: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, thinking: bool, student_prompt: str = STUDENT_PROMPT
) -> dict[str, list[int] | int]:
    """
    Return the token ids of prompt, solution and end of turn, their number, and 1 for each that is to be learned.

    TRL would render the whole conversation with the chat template, which in many models differs from the prompt that
    they are asked with: the empty think block of the non-thinking mode is in one and not in the other.
    """
    content = fill_template(student_prompt, problem=row["problem"])
    prompt_ids = encode_chat_prompt(tokenizer, content, thinking)
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
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, script_args: SFTArguments, args: SFTConfig
) -> Dataset:
    """Encode all rows and drop those that are too long: a solution without its end teaches not to end."""
    encoded = dataset.map(
        encode,
        fn_kwargs={
            "tokenizer": tokenizer,
            "thinking": script_args.thinking,
            "student_prompt": script_args.student_prompt,
        },
        remove_columns=dataset.column_names,
        num_proc=args.dataset_num_proc,
        desc="Encoding prompts and solutions",
    )
    return drop_long_rows(encoded, args.max_length, "max_length")


def main(arguments: list[str] | None = None) -> None:
    """Run the program with the given command line (default: that of the process)."""
    with exit_on_invalid_input("sft_train.py"):
        script_args, training_args, model_args = parse_arguments(
            SFTArguments,
            SFTConfig,
            arguments,
            max_length=16_000,  # paper Table 4; TRL would cut at 1,024
            completion_only_loss=True,
        )
        run = Run("sft", script_args, training_args, model_args)
        run.check(num_tokens=training_args.max_length)
        check_template("student_prompt", script_args.student_prompt, {"problem"})
        for flag in ("chat_template_path", "eos_token"):
            if (value := getattr(training_args, flag)) is not None:
                raise ValueError(
                    f"--{flag} {value}: would act after the prompts are encoded; change the tokenizer in the model's "
                    "folder"
                )
        if script_args.dry_run is not None:
            run.print_settings()
            return
        datasets = run.load_data(
            {"problem_column": script_args.problem_column, "solution_column": script_args.solution_column}
        )
        tokenizer = run.load_tokenizer()
        if script_args.thinking:
            check_thinking_mode(tokenizer, "thinking")
        run.make_skeleton()
        run.check_resumed_settings()
        train_dataset, eval_dataset = (
            None if dataset is None else prepare(dataset, tokenizer, script_args, training_args)
            for dataset in datasets
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
    run.train(trainer)


if __name__ == "__main__":
    main()
