"""
Train a model with GRPO on verifiable answers: the reinforcement-learning baseline of the paper (Table 6).

    accelerate launch grpo_train.py --model_name_or_path Qwen/Qwen3-1.7B --dtype bfloat16 --use_vllm \
        --dataset_name siyanzhao/Openthoughts_math_30k_opsd --problem_column Question --answer_column Answer \
        --use_peft --lora_target_modules all-linear --num_generations 8 --per_device_train_batch_size 8

The model sees the prompt that the evaluator asks with. All flags: `python grpo_train.py --help`.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer, get_peft_config
from trl.trainer import grpo_trainer

from checkpoints import CompleteCheckpoints
from data_collator import STUDENT_PROMPT, encode_chat_prompt, fill_template
from opsd.grading import extract_answer
from rollouts import OnPolicyGeneration
from run_setup import (
    RunArguments,
    check_model,
    load_data,
    load_tokenizer,
    model_options,
    parse_arguments,
    print_dry_run,
    refuse_bad_input,
    run_training,
    settle_run,
)
from verification import Verifier

logger = logging.getLogger(__name__)

REWARDS = ("math", "exact_match")


@dataclass
class GRPOArguments(RunArguments):
    """What GRPO reads of the data, its prompt and its reward."""

    problem_column: str = field(default="problem", metadata={"help": "Column of the problem."})
    answer_column: str = field(default="answer", metadata={"help": "Column of the final answer: text or number."})
    thinking: bool = field(default=False, metadata={"help": "Thinking mode of the prompt; as in the evaluation."})
    max_prompt_length: int | None = field(
        default=2048, metadata={"help": "Problems with a longer prompt, in tokens, are left out."}
    )
    vllm_adapter_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder through which adapters reach vLLM; by default in memory. With --vllm_mode server on another "
            "machine: one that both see."
        },
    )
    reward: str = field(
        default="math",
        metadata={
            "help": "1 for a right final answer, else 0. math: by value, as the evaluator grades. exact_match: the last box "
            "has the very text of the answer, as in the release.",
            "choices": REWARDS,
        },
    )


class OnPolicyGRPOTrainer(CompleteCheckpoints, GRPOTrainer):
    """
    TRL's `GRPOTrainer` with this project's rollouts (vLLM serves the adapter natively, each sample has a seed of its
    own), with complete checkpoints, and with a count of the generated tokens, `num_generated_tokens`.
    """

    def __init__(self, model: Any, args: GRPOConfig, vllm_adapter_dir: str | None = None, **kwargs: Any):
        revision = (args.model_init_kwargs or {}).get("revision")
        generation = partial(
            OnPolicyGeneration,
            seed=args.seed,
            adapter_dir=vllm_adapter_dir,
            logprobs_mode="processed_logprobs",  # at the sampling temperature: what TRL's importance ratio compares with
            engine_arguments={"revision": revision},
        )
        with mock.patch.object(grpo_trainer, "VLLMGeneration", generation):
            super().__init__(model=model, args=args, **kwargs)
        self.rollouts: OnPolicyGeneration | None = self.vllm_generation if self.use_vllm else None

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> tuple[list[list[int]], list[list[float]] | None]:
        if self.rollouts is not None:
            self.rollouts.step = self.state.global_step
        completion_ids, logprobs = super()._generate_single_turn(*args, **kwargs)
        if self.model.training:
            saved = self.state.stateful_callbacks.setdefault("OnPolicyGRPOTrainer", {"num_generated_tokens": 0})
            saved["num_generated_tokens"] += sum(gather_object([sum(map(len, completion_ids))]))
            self._metrics["train"]["num_generated_tokens"] = [saved["num_generated_tokens"]]
        return completion_ids, logprobs


def make_reward(name: str, thinking: bool) -> Callable[..., list[float]]:
    """
    A reward function for TRL.

    Args:
        name: one of `REWARDS`.
        thinking: responses without a `</think>` were cut off before they came to an answer (for `math`).
    """

    def exact_match(completions: Sequence, answer: Sequence[str], **_: Any) -> list[float]:
        boxed = [extract_answer(message["content"], method="release") for (message,) in completions]
        return [float(text == gold) for text, gold in zip(boxed, answer, strict=True)]

    if name == "exact_match":
        return exact_match
    verifier = Verifier(thinking)

    def math(completions: Sequence, answer: Sequence[str], **_: Any) -> list[float]:
        correct = verifier([message["content"] for (message,) in completions], answer)
        return [float(is_correct is True) for is_correct in correct]

    return math


def prepare(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, thinking: bool, max_prompt_length: int | None
) -> Dataset:
    """Rows of `prompt`, a conversation of one turn, and `answer`; those with a longer prompt are left out and counted."""

    def converse(row: dict[str, str]) -> dict[str, Any]:
        content = fill_template(STUDENT_PROMPT, problem=row["problem"])
        num_tokens = len(encode_chat_prompt(tokenizer, content, thinking))
        return {"prompt": [{"role": "user", "content": content}], "num_tokens": num_tokens}

    rows = dataset.map(converse, remove_columns="problem", desc="Making prompts")
    fitting = rows.filter(
        lambda length: max_prompt_length is None or length <= max_prompt_length, input_columns="num_tokens"
    )
    if len(fitting) < len(rows):
        logger.warning(
            "%d of %d problems left out: their prompts have more than %d tokens (--max_prompt_length)",
            len(rows) - len(fitting), len(rows), max_prompt_length,
        )  # fmt: skip
    return fitting.remove_columns("num_tokens")


def main(arguments: list[str] | None = None) -> None:
    """Run the program with the given command line (default: that of the process)."""
    with refuse_bad_input("grpo_train.py"):
        try:
            script_args, training_args, model_args = parse_arguments(GRPOArguments, GRPOConfig, arguments)
        except ValueError as error:
            if "num_generations" not in str(error):
                raise
            raise ValueError(
                f"{error} The batch is --effective_batch_size, or processes x --per_device_train_batch_size x "
                "--gradient_accumulation_steps: make it a multiple of --num_generations"
            ) from error
        settings = (script_args, training_args, model_args)
        check_model(model_args, training_args.use_vllm)
        checkpoint = settle_run("grpo", training_args.max_completion_length, *settings)
        if script_args.dry_run is not None:
            print_dry_run(*settings)
            return
        columns = {"problem_column": script_args.problem_column, "answer_column": script_args.answer_column}
        datasets = load_data(script_args, columns)
        tokenizer = load_tokenizer(model_args, training_args)
        train_dataset, eval_dataset = (
            None
            if dataset is None
            else prepare(dataset, tokenizer, script_args.thinking, script_args.max_prompt_length)
            for dataset in datasets
        )
        needed = training_args.generation_batch_size // training_args.num_generations
        if len(train_dataset) < needed:
            raise ValueError(
                f"--dataset_name {script_args.dataset_name}: {len(train_dataset)} usable problems are fewer than one step "
                f"takes ({needed}); lower --per_device_train_batch_size, or raise --max_prompt_length"
            )

    training_args.model_init_kwargs = model_options(model_args, training_args)
    training_args.chat_template_kwargs = (training_args.chat_template_kwargs or {}) | {
        "enable_thinking": script_args.thinking
    }
    if training_args.vllm_max_model_length is None and script_args.max_prompt_length is not None:
        # The engine's cache has to hold one sequence of this length: less than the model's own limit
        training_args.vllm_max_model_length = script_args.max_prompt_length + training_args.max_completion_length
    trainer = OnPolicyGRPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        reward_funcs=make_reward(script_args.reward, script_args.thinking),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        vllm_adapter_dir=script_args.vllm_adapter_dir,
    )
    run_training(trainer, script_args, model_args, checkpoint, trainer.rollouts)


if __name__ == "__main__":
    main()
