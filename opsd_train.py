"""
Train a model with on-policy self-distillation (OPSD).

    accelerate launch opsd_train.py --model_name_or_path Qwen/Qwen3-1.7B --dtype bfloat16 \
        --dataset_name siyanzhao/Openthoughts_math_30k_opsd --use_peft --lora_target_modules all-linear --fixed_teacher

All flags: `python opsd_train.py --help`. They may also stand in a YAML file: `--config FILE`.
"""

from dataclasses import dataclass, field

from trl import get_peft_config

from opsd_trainer import OPSDConfig, OPSDTrainer
from preflight import Preflight
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


@dataclass
class OPSDArguments(RunArguments):
    """What OPSD reads of the data, and the check before it."""

    problem_column: str = field(default="problem", metadata={"help": "Column of the problem."})
    solution_column: str = field(default="solution", metadata={"help": "Column of the reference solution."})
    answer_column: str | None = field(
        default=None, metadata={"help": "Column of the final answer, kept beside the saved rollouts."}
    )
    preflight: bool = field(
        default=False,
        metadata={"help": "Check the claims of the method before the first step; do not train if one does not hold."},
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the program with the given command line (default: that of the process)."""
    with refuse_bad_input("opsd_train.py"):
        script_args, training_args, model_args = parse_arguments(OPSDArguments, OPSDConfig, arguments)
        settings = (script_args, training_args, model_args)
        check_model(model_args, training_args.use_vllm)
        checkpoint = settle_run("opsd", training_args.max_completion_length, *settings)
        if script_args.dry_run is not None:
            print_dry_run(*settings)
            return
        train_dataset, eval_dataset = load_data(
            script_args,
            {"problem_column": script_args.problem_column, "solution_column": script_args.solution_column},
            {"answer_column": script_args.answer_column},
        )
        OPSDTrainer.check_size(len(train_dataset), training_args)
        tokenizer = load_tokenizer(model_args, training_args)

    training_args.model_init_kwargs = model_options(model_args, training_args)
    trainer = OPSDTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    if script_args.preflight:
        trainer.add_callback(Preflight(trainer))
    run_training(trainer, script_args, model_args, checkpoint, trainer.rollouts)


if __name__ == "__main__":
    main()
