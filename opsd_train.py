"""
Train a model with on-policy self-distillation (OPSD).

    accelerate launch opsd_train.py --model_name_or_path Qwen/Qwen3-1.7B --dtype bfloat16 \
        --dataset_name siyanzhao/Openthoughts_math_30k_opsd --use_peft --lora_target_modules all-linear --fixed_teacher

All flags: `python opsd_train.py --help`. They may also stand in a YAML file: `--config FILE`.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from trl import get_peft_config
from trl.trainer.utils import create_model_from_path

from opsd.preflight import Preflight
from opsd.run.arguments import ModelArguments, RunArguments, parse_arguments
from opsd.run.run import Run, exit_on_invalid_input
from opsd.thinking import check_thinking_mode
from opsd_trainer import OPSDConfig, OPSDTrainer

logger = logging.getLogger(__name__)


@dataclass
class OPSDArguments(RunArguments):
    """Data of OPSD, where it starts, and the check before it."""

    solution_column: str = field(
        default="solution",
        metadata={
            "help": "Column of the reference solution; not read where no setting needs it (--teacher_reference "
            "rollout)."
        },
    )
    answer_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the final answer, text or number: for settings that grade rollouts, and beside the "
            "saved ones."
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


def needed_columns(
    script_args: OPSDArguments, training_args: OPSDConfig
) -> tuple[dict[str, str], dict[str, str | None]]:
    """
    Return flag -> column, for the texts that each example has to have, and for those that it may have.

    Raises:
        ValueError: for settings that need answers, without a column of them.
    """
    needed = {"problem_column": script_args.problem_column}
    if training_args.needs_solutions:
        needed["solution_column"] = script_args.solution_column
    if not training_args.needs_answers:
        return needed, {"answer_column": script_args.answer_column}
    if script_args.answer_column is None:
        flags = ["verify_rollouts", "teacher_reference", "correct_weight", "incorrect_weight"]
        flags += ["policy_gradient_weight", "curriculum"]
        given = [f for f in flags if getattr(training_args, f) != getattr(OPSDConfig, f)]
        given = [f"--{flag} {getattr(training_args, flag)}" for flag in given]
        raise ValueError(
            f"{', '.join(given)}: rollouts are graded against answers; name their column: --answer_column"
        )
    return needed | {"answer_column": script_args.answer_column}, {}


def check_adapter(folder: str, model_args: ModelArguments) -> None:
    """Raise `ValueError`, naming the flag, for an adapter to start from that is not there or was not asked for."""
    missing = [name for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME) if not Path(folder, name).is_file()]
    if missing:
        raise ValueError(
            f"--adapter_name_or_path {folder}: has no {' and no '.join(missing)}; name the folder of a LoRA adapter"
        )
    if not model_args.use_peft:
        raise ValueError(f"--adapter_name_or_path {folder}: trains an adapter, not the model; add --use_peft")
    config = PeftConfig.from_pretrained(folder)
    if not isinstance(config, LoraConfig):
        raise ValueError(f"--adapter_name_or_path {folder}: is not a LoRA adapter but {config.peft_type}")
    if config.base_model_name_or_path != model_args.model_name_or_path:
        logger.warning(
            "--adapter_name_or_path %s: was trained on %s, and --model_name_or_path is %s",
            folder, config.base_model_name_or_path, model_args.model_name_or_path,
        )  # fmt: skip


def load_with_adapter(model: str, folder: str, training_args: OPSDConfig) -> PeftModel:
    """The base model with an adapter to go on training."""
    base = create_model_from_path(model, **training_args.model_init_kwargs)
    plugin = training_args.deepspeed_plugin
    is_zero3 = plugin is not None and plugin.zero_stage == 3  # which wants one dtype, also where TRL makes the adapter
    return PeftModel.from_pretrained(base, folder, is_trainable=True, autocast_adapter_dtype=not is_zero3)


def main(arguments: list[str] | None = None) -> None:
    """Run the program with the given command line (default: that of the process)."""
    with exit_on_invalid_input("opsd_train.py"):
        script_args, training_args, model_args = parse_arguments(OPSDArguments, OPSDConfig, arguments)
        run = Run("opsd", script_args, training_args, model_args)
        run.check(num_tokens=training_args.max_completion_length)
        if script_args.adapter_name_or_path is not None:
            check_adapter(script_args.adapter_name_or_path, model_args)
        columns = needed_columns(script_args, training_args)
        if script_args.dry_run is not None:
            run.print_settings()
            return
        train_dataset, eval_dataset = run.load_data(*columns)
        OPSDTrainer.check_size(len(train_dataset), training_args)
        tokenizer = run.load_tokenizer()
        if training_args.student_thinking:
            check_thinking_mode(tokenizer, "student_thinking")

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
    if script_args.preflight:
        trainer.add_callback(Preflight(trainer))
    run.train(trainer, trainer.sampler)


if __name__ == "__main__":
    main()
