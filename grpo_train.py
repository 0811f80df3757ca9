"""
Train a model with GRPO on verifiable answers: the reinforcement-learning baseline of the paper (Table 6).

    accelerate launch grpo_train.py --model_name_or_path Qwen/Qwen3-1.7B --dtype bfloat16 --use_vllm \
        --dataset_name siyanzhao/Openthoughts_math_30k_opsd --problem_column Question --answer_column Answer \
        --use_peft --lora_target_modules all-linear --num_generations 8 --per_device_train_batch_size 8

The model sees the prompt that the evaluator asks with. All flags: `python grpo_train.py --help`.
"""

import logging
import re
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer, get_peft_config

from data_collator import STUDENT_PROMPT, check_template, control_tokens, encode_chat_prompt, fill_template
from opsd.rewards import REWARDS, make_reward
from opsd.rollouts import VLLMSampler
from opsd.run.arguments import RunArguments, parse_arguments
from opsd.run.checkpoints import CompleteCheckpoints
from opsd.run.problem_data import drop_long_rows
from opsd.run.run import Run, exit_on_invalid_input
from opsd.thinking import check_thinking_mode

logger = logging.getLogger(__name__)


@dataclass
class GRPOArguments(RunArguments):
    """Data, prompt and reward of GRPO."""

    answer_column: str = field(default="answer", metadata={"help": "Column of the final answer: text or number."})
    student_prompt: str = field(
        default=STUDENT_PROMPT, metadata={"help": "Template of the prompt, with {problem}; as in the evaluation."}
    )
    thinking: bool = field(default=False, metadata={"help": "Thinking mode of the prompt; as in the evaluation."})
    max_prompt_length: int | None = field(
        default=2048, metadata={"help": "Problems with a longer prompt, in tokens, are left out."}
    )
    vllm_adapter_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder through which adapters reach vLLM; by default in memory. With --vllm_mode server on "
            "another machine: one that both see."
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


class OnPolicyGRPOTrainer(CompleteCheckpoints, GRPOTrainer):
    """
    TRL's `GRPOTrainer` with this project's rollouts: vLLM serves the adapter natively, each sample has its own seed.

    Checkpoints are complete or not used, steps that are not finite are skipped, generated tokens are counted.
    """

    logged_counts = (*CompleteCheckpoints.logged_counts, "num_generated_tokens")

    def __init__(self, model: Any, args: GRPOConfig, vllm_adapter_dir: str | None = None, **kwargs: Any):
        use_vllm, args.use_vllm = args.use_vllm, False  # TRL would start an engine that gets its weights by merging
        super().__init__(model=model, args=args, **kwargs)
        self.use_vllm = args.use_vllm = use_vllm
        self.sampler = self.vllm_generation = self._start_sampler(vllm_adapter_dir) if use_vllm else None

    def _start_sampler(self, adapter_dir: str | None) -> VLLMSampler:
        """Start the sampler with the settings that `GRPOTrainer.__init__` gives its own one."""
        args = self.args
        sampler = VLLMSampler.from_config(
            args,
            self.model,
            self.accelerator,
            self.processing_class,
            max_num_seqs=args.per_device_train_batch_size * args.vllm_tensor_parallel_size * args.steps_per_generation,
            structured_outputs_regex=args.vllm_structured_outputs_regex,
            repetition_penalty=args.repetition_penalty,
            generation_kwargs=args.generation_kwargs,
            adapter_dir=adapter_dir,
            logprobs_mode="processed_logprobs",  # at the sampling temperature: what TRL's importance ratio takes
        )
        self._last_loaded_step = -1  # no step: the engine has not got the adapter yet
        if sampler.mode == "server" and args.vllm_importance_sampling_correction and self.accelerator.is_main_process:
            logprobs_mode = sampler.vllm_client.get_server_info()["model_config"]["logprobs_mode"]
            if logprobs_mode != "processed_logprobs":
                logger.warning(
                    "the vLLM server runs with --logprobs-mode %s, which biases the importance ratio: restart it with "
                    "--logprobs-mode processed_logprobs, or say --vllm_importance_sampling_correction false",
                    logprobs_mode,
                )
        return sampler

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> tuple[list[list[int]], list[list[float]] | None]:
        if self.sampler is not None:
            self.sampler.step = self.state.global_step
        completion_ids, logprobs = super()._generate_single_turn(*args, **kwargs)
        if self.model.training:
            self._count("num_generated_tokens", sum(gather_object([sum(map(len, completion_ids))])))
        return completion_ids, logprobs


def prepare(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, script_args: GRPOArguments) -> Dataset:
    """Make rows of `prompt`, a conversation of one turn, and `answer`; drop long prompts and control tokens."""

    def converse(row: dict[str, str]) -> dict[str, Any]:
        content = fill_template(script_args.student_prompt, problem=row["problem"])
        num_tokens = len(encode_chat_prompt(tokenizer, content, script_args.thinking))
        return {"prompt": [{"role": "user", "content": content}], "num_tokens": num_tokens}

    rows = dataset.map(converse, remove_columns="problem", desc="Making prompts")
    rows = drop_long_rows(rows, script_args.max_prompt_length, "max_prompt_length")
    controls = re.compile(control_tokens(tokenizer))  # TRL, which encodes the prompts, would take them for its own
    plain = rows.filter(lambda prompt: controls.search(prompt[0]["content"]) is None, input_columns="prompt")
    if dropped := len(rows) - len(plain):
        logger.warning("%d of %d examples left out, with control tokens in the problem", dropped, len(rows))
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
        run = Run("grpo", script_args, training_args, model_args)
        run.check(num_tokens=training_args.max_completion_length)
        if training_args.neftune_noise_alpha is not None:
            raise ValueError(
                f"--neftune_noise_alpha {training_args.neftune_noise_alpha}: must be left out: the policy would have "
                "noise that its rollouts do not have"
            )
        check_template("student_prompt", script_args.student_prompt, {"problem"})
        check_settings(training_args)
        if script_args.dry_run is not None:
            run.print_settings()
            return
        datasets = run.load_data(
            {"problem_column": script_args.problem_column, "answer_column": script_args.answer_column}
        )
        tokenizer = run.load_tokenizer()
        if script_args.thinking:
            check_thinking_mode(tokenizer, "thinking")
        run.make_skeleton()
        run.check_resumed_settings()
        train_dataset, eval_dataset = (
            None if dataset is None else prepare(dataset, tokenizer, script_args) for dataset in datasets
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
        reward_funcs=make_reward(script_args.reward, script_args.thinking, tokenizer),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        vllm_adapter_dir=script_args.vllm_adapter_dir,
    )
    run.train(trainer, trainer.sampler)


if __name__ == "__main__":
    main()
