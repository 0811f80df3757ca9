r"""
Train a model with on-policy self-distillation (OPSD).

    accelerate launch opsd_train.py --model_name_or_path Qwen/Qwen3-1.7B --dtype bfloat16 \
        --dataset_name siyanzhao/Openthoughts_math_30k_opsd --use_peft --lora_target_modules all-linear --fixed_teacher

All flags: `python opsd_train.py --help`. They may also stand in a YAML file: `--config FILE`.
"""

import logging
from dataclasses import dataclass, field
from functools import partial

from opsd.run.flags import check_flags, exit_on_invalid_input

if __name__ == "__main__":  # before torch and TRL are imported
    with exit_on_invalid_input("opsd_train.py"):
        check_flags("opsd_train", "OPSDArguments", "OPSDConfig")

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl import get_peft_config
from trl.trainer.utils import create_model_from_path

from data_collator import SelfDistillationDataCollator
from opsd.adapters import Adapter, check_vllm_lora_support
from opsd.config import OPSDConfig
from opsd.contexts import CONTEXTS
from opsd.held_out import check_answers
from opsd.losses import read_head_settings
from opsd.run.arguments import ModelArguments, RunArguments, parse_arguments
from opsd.run.run import Run
from opsd.run.summary import ReversedClipCallback
from opsd.teacher_model import check_teacher_model
from opsd.thinking import check_thinking_mode

logger = logging.getLogger(__name__)

# Settings of a LoRA adapter that flags describe too
ADAPTER_SETTINGS = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_rslora", "use_dora",
)  # fmt: skip


@dataclass
class OPSDArguments(RunArguments):
    """Data of OPSD, where it starts, and the check before it."""

    answer_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the final answer, text or number. With it the rollouts are graded, as the evaluator "
            "does, and the share of right ones is logged."
        },
    )
    adapter_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder of a LoRA adapter to go on training, with its own rank and modules; --fixed_teacher is "
            "then the model with it as it is now."
        },
    )
    preflight: bool = field(
        default=False,
        metadata={"help": "Check the claims of the method before the first step; do not train if one does not hold."},
    )


HARMLESS = ("--verify_rollouts False", "--curriculum divergence") + tuple(
    f"--teacher_context {name}" for name, context in CONTEXTS.items() if context.of_group is None
)


def needed_columns(
    script_args: OPSDArguments, training_args: OPSDConfig
) -> tuple[dict[str, str], dict[str, str | None]]:
    """
    Return flag -> column, for the texts that each example has to have, and for those that it may have.

    Raises:
        ValueError: for settings that need answers, without a column of them.
    """
    columns = {
        "problem_column": script_args.problem_column,
        "solution_column": script_args.solution_column,
        "answer_column": script_args.answer_column or "answer",
    }
    texts = training_args.needed_texts
    needed = {flag: column for flag, column in columns.items() if flag.removesuffix("_column") in texts}
    needed |= {name: name for name in sorted(texts - {"problem", "solution", "answer"})}
    is_graded = training_args.grades_rollouts or training_args.verifier != "math"
    if is_graded and script_args.answer_column is None:
        flags = ["verify_rollouts", "verifier", "teacher_context", "correct_weight", "incorrect_weight"]
        flags += ["policy_gradient_weight", "curriculum", "eval_accuracy_samples"]
        given = [
            f"--{f} {getattr(training_args, f)}" for f in flags if getattr(training_args, f) != getattr(OPSDConfig, f)
        ]
        given = [text for text in given if text not in HARMLESS]
        raise ValueError(
            f"{', '.join(given)}: rollouts are graded against answers; name their column: --answer_column"
        )
    if training_args.needs_answers and script_args.answer_column is not None:
        needed["answer_column"] = script_args.answer_column
    return needed, {} if "answer_column" in needed else {"answer_column": script_args.answer_column}


def read_adapter(folder: str, model_args: ModelArguments) -> Adapter:
    """
    Read the adapter to start from, and give the flags that it decides its values.

    Raises:
        ValueError: if it is not there, not asked for, or not the one that the flags describe.
    """
    adapter, default = Adapter.read(folder, "adapter_name_or_path"), ModelArguments()
    if not model_args.use_peft:
        raise ValueError(f"{adapter.name}: trains an adapter, not the model; add --use_peft")
    for name in ADAPTER_SETTINGS:
        flag = name if name.startswith("use_") else f"lora_{name.removeprefix('lora_')}"
        given, own = getattr(model_args, flag), getattr(adapter.config, name)
        own = sorted(own) if isinstance(own, set | list) else own
        given = sorted(given) if isinstance(given, list) else given
        if given not in (getattr(default, flag), own, "all-linear"):
            raise ValueError(f"--{flag} {given}: {adapter.name} has {own}, and keeps it; leave the flag out")
        if given != own:
            logger.info("%s: --%s is that of the adapter, %s", adapter.name, flag, own)
        setattr(model_args, flag, own)
    return adapter


def load_with_adapter(model: str, folder: str, training_args: OPSDConfig) -> PeftModel:
    """The base model with an adapter to go on training."""
    base = create_model_from_path(model, **training_args.model_init_kwargs)
    plugin = training_args.deepspeed_plugin
    is_zero3 = plugin is not None and plugin.zero_stage == 3  # which wants one dtype, also where TRL makes the adapter
    return PeftModel.from_pretrained(base, folder, is_trainable=True, autocast_adapter_dtype=not is_zero3)


def encode_prompts(args: OPSDConfig, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Encode the prompts of both roles, as the trainer does."""
    return SelfDistillationDataCollator(tokenizer, **args.collator_settings).encode_dataset(dataset, "train")


def main(arguments: list[str] | None = None) -> None:
    """Run the program with the given command line (default: that of the process)."""
    with exit_on_invalid_input("opsd_train.py"):
        script_args, training_args, model_args = parse_arguments(OPSDArguments, OPSDConfig, arguments)
        run = Run("opsd", script_args, training_args, model_args)
        run.check(num_tokens=training_args.max_completion_length)
        adapter = None
        if script_args.adapter_name_or_path is not None:
            adapter = read_adapter(script_args.adapter_name_or_path, model_args)
            if training_args.use_vllm:
                check_vllm_lora_support(adapter.config)
        if model_args.lora_dropout > 0.0 and model_args.use_peft:
            logger.info("--lora_dropout %g: taken as 0, since it would reach the teacher", model_args.lora_dropout)
            model_args.lora_dropout = 0.0
        columns = needed_columns(script_args, training_args)
        if training_args.verify_rollouts is None:
            training_args.verify_rollouts = script_args.answer_column is not None
        prompts = {"student_prompt_ids": "student sees"}  # column -> heading
        if training_args.context.of_group is None:  # else it is a rollout, which is not there yet
            prompts["teacher_prompt_ids"] = "teacher sees"
        if script_args.dry_run is not None:
            run.dry_run(columns, partial(encode_prompts, training_args), prompts)
            return

        from opsd_trainer import OPSDTrainer  # the dry run needs no trainer

        train_dataset, eval_dataset = run.load_data(*columns)
        OPSDTrainer.check_size(len(train_dataset), training_args)
        if training_args.eval_accuracy_samples:
            check_answers(eval_dataset)
        tokenizer = run.load_tokenizer()
        check_thinking_mode(
            tokenizer, training_args.student_thinking, "student_thinking true", "student_thinking false"
        )
        skeleton = run.make_skeleton(adapter)
        if training_args.loss_implementation == "fused":
            read_head_settings(skeleton)
        if training_args.teacher_model_name_or_path is not None:
            check_teacher_model(training_args, tokenizer, skeleton)
        run.check_resumed_settings()

    training_args.model_init_kwargs = run.model_options()
    model, peft_config = model_args.model_name_or_path, get_peft_config(model_args)
    if script_args.adapter_name_or_path is not None:
        model, peft_config = load_with_adapter(model, script_args.adapter_name_or_path, training_args), None
    trainer = OPSDTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.add_callback(ReversedClipCallback())
    run.introduce(trainer, prompts)
    if script_args.preflight:
        from opsd.preflight import Preflight

        trainer.add_callback(Preflight(trainer))
    run.train(trainer, trainer.sampler)


if __name__ == "__main__":
    main()
