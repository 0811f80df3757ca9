r"""
Train a model with GRPO on verifiable answers: the reinforcement-learning baseline of the paper (Table 6).

    accelerate launch grpo_train.py --model_name_or_path Qwen/Qwen3-1.7B --dtype bfloat16 --use_vllm \
        --dataset_name siyanzhao/Openthoughts_math_30k_opsd --problem_column Question --answer_column Answer \
        --use_peft --lora_target_modules all-linear --num_generations 8 --per_device_train_batch_size 8

The model sees the prompt that the evaluator asks with. All flags: `python grpo_train.py --help`.
"""

import logging
import re
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from opsd.run.flags import check_flags, exit_on_invalid_input

if __name__ == "__main__":  # before torch and TRL are imported
    with exit_on_invalid_input("grpo_train.py"):
        check_flags("grpo_train", "GRPOArguments", "GRPOConfig")

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig, get_peft_config

from data_collator import (
    STUDENT_PROMPT,
    control_tokens,
    encode_chat_prompt,
    fill_template,
    placeholders,
    texts_of,
)
from opsd.config import check_unused
from opsd.grading import find_rule
from opsd.rewards import REWARDS, make_reward
from opsd.run.arguments import BaselineArguments, parse_arguments
from opsd.run.problem_data import drop_long_rows
from opsd.run.run import Run
from opsd.thinking import check_thinking_mode

PROMPTS = {"prompt": "model sees"}  # column -> heading
UNUSED = {
    "the policy would have noise that its rollouts do not have": ("neftune_noise_alpha",),
    "there is one reward": ("reward_weights", "multi_objective_aggregation"),
    "there are neither tools nor images": ("max_tool_calling_iterations", "log_multimodal"),
}

logger = logging.getLogger(__name__)


@dataclass
class GRPOArguments(BaselineArguments):
    """Data, prompt and reward of GRPO."""

    answer_column: str = field(default="answer", metadata={"help": "Column of the final answer: text or number."})
    max_prompt_length: int | None = field(
        default=2048, metadata={"help": "Problems with a longer prompt, in tokens, are left out."}
    )
    vllm_adapter_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder through which adapters reach a server (--vllm_mode server); by default in memory. For a "
            "server on another machine: a folder that both see."
        },
    )
    reward: str = field(
        default="math",
        metadata={
            "help": "1 for a right final answer, else 0. math: by value, as the evaluator grades. exact_match: the "
            "last box has the very text of the answer, as in the release. last_number: the last number of the "
            "response, without a box.",
            "choices": REWARDS,
        },
    )
    verifier: str = field(
        default="math",
        metadata={
            "help": "What gives the reward, as in the evaluator: math, exact_match, multiple_choice, python_tests, or "
            "MODULE:FUNCTION of your own, from the working directory, with (completion, answer, row) -> number in "
            "[0, 1] or None. Goes with --reward math."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        find_rule(self.verifier)
        if self.verifier != "math" and self.reward != "math":
            raise ValueError(f"--reward {self.reward}: leave it out with --verifier {self.verifier}, the reward then")


def prepare(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    thinking: bool,
    max_prompt_length: int | None,
    student_prompt: str = STUDENT_PROMPT,
) -> Dataset:
    """
    Make rows of `prompt`, the turns up to the problem, of `answer`, and of `row`, the texts that a verifier sees; drop
    long prompts and control tokens.
    """

    def converse(row: dict[str, Any]) -> dict[str, Any]:
        content, history = fill_template(student_prompt, **texts_of(row)), row.get("history") or []
        prompt = [*history, {"role": "user", "content": content}]
        num_tokens = len(encode_chat_prompt(tokenizer, content, thinking, history))
        return {"prompt": prompt, "row": texts_of(row), "num_tokens": num_tokens}

    used = [name for name in ("history", *placeholders(student_prompt)) if name in dataset.column_names]
    rows = dataset.map(converse, remove_columns=used, desc="Making prompts")
    rows = drop_long_rows(rows, max_prompt_length, "max_prompt_length")
    controls = re.compile(control_tokens(tokenizer))  # TRL, which encodes the prompts, would take them for its own
    plain = rows.filter(
        lambda prompt: not any(controls.search(turn["content"]) for turn in prompt), input_columns="prompt"
    )
    if dropped := len(rows) - len(plain):
        logger.warning("%d of %d examples left out, with control tokens in the prompt", dropped, len(rows))
    return plain


def check_settings(training_args: GRPOConfig) -> None:
    """Raise `ValueError` for a loss that TRL refuses with vLLM."""
    modes = ("token_truncate", "token_mask")
    has_ratio = training_args.use_vllm and training_args.vllm_importance_sampling_correction
    if training_args.loss_type == "vespo" and has_ratio and training_args.vllm_importance_sampling_mode not in modes:
        raise ValueError(
            f"--vllm_importance_sampling_mode {training_args.vllm_importance_sampling_mode}: must be one of "
            f"{', '.join(modes)} with --loss_type vespo"
        )


def main(arguments: list[str] | None = None) -> None:
    """Run the program with the given command line (default: that of the process)."""
    with exit_on_invalid_input("grpo_train.py"):
        try:
            script_args, training_args, model_args = parse_arguments(GRPOArguments, GRPOConfig, arguments)
        except ValueError as error:
            if "num_generations" not in str(error):
                raise
            raise ValueError(
                f"{error} The batch is --effective_batch_size, or processes x --per_device_train_batch_size x "
                "--gradient_accumulation_steps: make it a multiple of --num_generations"
            ) from error
        check_unused(training_args, UNUSED)
        run = Run("grpo", script_args, training_args, model_args)
        run.check(num_tokens=training_args.max_completion_length)
        check_settings(training_args)
        columns = {"problem_column": script_args.problem_column, "answer_column": script_args.answer_column}
        columns |= script_args.template_columns
        prepare_rows = partial(
            prepare,
            thinking=script_args.thinking,
            max_prompt_length=script_args.max_prompt_length,
            student_prompt=script_args.student_prompt,
        )
        if script_args.dry_run is not None:
            run.dry_run((columns, {}), prepare_rows, PROMPTS)
            return

        from opsd.grpo import OnPolicyGRPOTrainer  # the dry run needs no trainer

        datasets = run.load_data(columns)
        tokenizer = run.load_tokenizer()
        check_thinking_mode(tokenizer, script_args.thinking, "thinking true", "thinking false")
        run.make_skeleton()
        run.check_resumed_settings()
        train_dataset, eval_dataset = (
            None if dataset is None else prepare_rows(dataset, tokenizer) for dataset in datasets
        )
        needed = training_args.generation_batch_size // training_args.num_generations
        if train_dataset is not None and len(train_dataset) < needed:
            raise ValueError(
                f"--dataset_name {script_args.dataset_name}: {len(train_dataset)} usable problems are fewer than one "
                f"step takes ({needed}); lower --per_device_train_batch_size, or raise --max_prompt_length"
            )

    training_args.model_init_kwargs = run.model_options()
    training_args.chat_template_kwargs = (training_args.chat_template_kwargs or {}) | {
        "enable_thinking": script_args.thinking
    }
    if training_args.vllm_max_model_length is None and script_args.max_prompt_length is not None:
        # The engine's cache has to hold one sequence of this length: less than the model's own limit
        training_args.vllm_max_model_length = script_args.max_prompt_length + training_args.max_completion_length
    trainer = OnPolicyGRPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        reward_funcs=make_reward(script_args.reward, script_args.thinking, tokenizer, script_args.verifier),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        vllm_adapter_dir=script_args.vllm_adapter_dir,
    )
    run.introduce(trainer, PROMPTS)
    run.train(trainer, trainer.sampler)


if __name__ == "__main__":
    main()
