"""
Train a model with on-policy self-distillation (OPSD).

    accelerate launch opsd_train.py --model_name_or_path Qwen/Qwen3-1.7B --dtype bfloat16 \
        --dataset_name siyanzhao/Openthoughts_math_30k_opsd --use_peft --lora_target_modules all-linear --fixed_teacher

All flags: `python opsd_train.py --help`. They may also stand in a YAML file: `--config FILE`.
"""

import dataclasses
import json
import logging
import os
import shutil
import signal
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import transformers
import yaml
from datasets import Dataset
from transformers import AutoTokenizer
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import is_flash_attn_2_available
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from checkpoints import find_checkpoint
from opsd_trainer import OPSDConfig, OPSDTrainer
from preflight import Preflight
from problem_data import keep_usable, load_problems
from rollouts import check_servable

logger = logging.getLogger(__name__)


@dataclass
class ScriptArguments:
    """The data set and the run's names."""

    dataset_name: str = field(
        default="siyanzhao/Openthoughts_math_30k_opsd",
        metadata={"help": "Hub id, or a local json, jsonl or parquet file, or a folder of them."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of a Hub data set."})
    dataset_split: str = field(
        default="train", metadata={"help": "Split to train on.", "aliases": ["--dataset_train_split"]}
    )
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Data set for --eval_strategy, likewise."})
    eval_dataset_split: str = field(default="test", metadata={"help": "Split of a Hub data set to evaluate on."})
    problem_column: str = field(default="problem", metadata={"help": "Column of the problem."})
    solution_column: str = field(default="solution", metadata={"help": "Column of the reference solution."})
    answer_column: str | None = field(
        default=None, metadata={"help": "Column of the final answer, kept beside the saved rollouts."}
    )
    run_config: str | None = field(
        default=None, metadata={"help": "Name of the run: W&B run name and subfolder of --output_dir."}
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Start anew and delete the checkpoints and rollouts that are in the output folder."},
    )
    preflight: bool = field(
        default=False,
        metadata={"help": "Check the claims of the method before the first step; do not train if one does not hold."},
    )
    wandb_project: str | None = field(default=None, metadata={"help": "W&B project (with --report_to wandb)."})
    wandb_entity: str | None = field(default=None, metadata={"help": "W&B entity (with --report_to wandb)."})


@dataclass
class ModelArguments(ModelConfig):
    """TRL's model arguments, with the release's spelling of the dtype."""

    dtype: str | None = field(
        default="float32",
        metadata={
            "help": "Data type in which the weights are loaded. bfloat16 goes with --use_peft, whose adapters stay in "
            "float32; without an adapter the optimizer needs float32.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
            "aliases": ["--torch_dtype"],
        },
    )


def name_run(script_args: ScriptArguments, training_args: OPSDConfig, model_args: ModelArguments) -> None:
    """Settle the run's name and its folder: from --run_config, or composed of what tells runs apart."""
    model_name = Path(model_args.model_name_or_path).name
    batch = (
        training_args.per_device_train_batch_size
        * training_args.gradient_accumulation_steps
        * training_args.world_size
    )
    composed = (
        f"opsd_{model_name}_lr{training_args.learning_rate:g}_bs{batch}_tok{training_args.max_completion_length}"
    )
    name = script_args.run_config or composed
    training_args.run_name = training_args.run_name or name
    if script_args.run_config or os.path.normpath(training_args.output_dir) == OPSDConfig.output_dir:
        training_args.output_dir = os.path.join(training_args.output_dir, name)
    for variable, value in (("WANDB_PROJECT", script_args.wandb_project), ("WANDB_ENTITY", script_args.wandb_entity)):
        if value is not None:
            os.environ[variable] = value


def load_training_data(name: str, split: str, script_args: ScriptArguments) -> Dataset:
    """Rows of the texts `problem` and `solution` (and `answer`, where --answer_column is given)."""
    dataset = load_problems(name, split, config=script_args.dataset_config, revision=script_args.dataset_revision)
    columns = {"problem_column": script_args.problem_column, "solution_column": script_args.solution_column}
    dataset = keep_usable(dataset, **columns)
    columns = {column: flag.removesuffix("_column") for flag, column in columns.items()}
    if script_args.answer_column is not None:
        if script_args.answer_column not in dataset.column_names:
            raise ValueError(
                f"--answer_column {script_args.answer_column}: the data set has no such column; it has "
                + ", ".join(dataset.column_names)
            )
        columns[script_args.answer_column] = "answer"
    return dataset.select_columns(list(columns)).rename_columns(columns)


def choose_attention(requested: str | None, dtype: str, training_args: OPSDConfig) -> str:
    """FlashAttention 2 where it is installed and can run, unless another one is requested; else PyTorch's, and say so."""
    if requested not in (None, "flash_attention_2"):
        return requested
    half_precision = training_args.bf16 or training_args.fp16 or dtype in ("bfloat16", "float16")
    if is_flash_attn_2_available() and half_precision and not training_args.use_cpu:
        return "flash_attention_2"
    logger.info("attention: sdpa; flash_attention_2 needs flash-attn, a GPU and half precision")
    return "sdpa"


def save_run_configuration(path: Path, **parts: object) -> None:
    """Write all settings of the run, and the versions that it ran with, as JSON."""
    configuration = {
        name: part.to_dict() if hasattr(part, "to_dict") else dataclasses.asdict(part) for name, part in parts.items()
    }
    configuration["versions"] = {
        package: version(package) for package in ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(configuration, indent=2, default=str) + "\n", encoding="utf-8")


def finish(trainer: OPSDTrainer) -> None:
    """Leave the process group, once all are done: the engine before the training, which it shares the group with."""
    trainer.accelerator.wait_for_everyone()
    if trainer.rollouts is not None:
        trainer.rollouts.close()
    trainer.accelerator.end_training()


def main(arguments: list[str] | None = None) -> None:
    """Run the program with the given command line (default: that of the process)."""
    try:
        parser = TrlParser((ScriptArguments, OPSDConfig, ModelArguments))
        script_args, training_args, model_args = parser.parse_args_and_config(arguments)
        logging.basicConfig(
            level=logging.INFO if training_args.process_index == 0 else logging.ERROR, format="%(name)s: %(message)s"
        )
        transformers.logging.disable_default_handler()  # its messages reach the root logger anyway
        if model_args.model_name_or_path is None:
            raise ValueError("--model_name_or_path is missing: name a model's folder or Hub id")
        OPSDTrainer.check_teacher(training_args, has_adapter=model_args.use_peft)
        is_fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
        if is_fsdp and model_args.use_peft and model_args.dtype != "float32":
            raise ValueError(
                f"--dtype {model_args.dtype}: FSDP2 shards weights of one dtype only, and the adapter's is float32; say --dtype "
                "float32, or launch with ZeRO-3"
            )
        if training_args.use_vllm and model_args.use_peft:
            check_servable(get_peft_config(model_args))
        if training_args.use_vllm and (model_args.load_in_4bit or model_args.load_in_8bit):
            raise ValueError(
                "--use_vllm: vLLM would sample from the base as it is published, not from the quantized one; leave out "
                "--load_in_4bit and --load_in_8bit, or sample without --use_vllm"
            )
        name_run(script_args, training_args, model_args)
        checkpoint = find_checkpoint(
            training_args.output_dir, training_args.resume_from_checkpoint, script_args.overwrite_output_dir
        )
        train_dataset = load_training_data(script_args.dataset_name, script_args.dataset_split, script_args)
        OPSDTrainer.check_size(len(train_dataset), training_args)
        eval_dataset = None
        if (script_args.eval_dataset_name is None) != (training_args.eval_strategy == "no"):
            raise ValueError("--eval_dataset_name and --eval_strategy need each other: give both, or none of them")
        if script_args.eval_dataset_name is not None:
            eval_dataset = load_training_data(
                script_args.eval_dataset_name, script_args.eval_dataset_split, script_args
            )
        model_path = model_args.model_name_or_path
        if model_path.startswith((".", "/", "~")) and not os.path.isdir(os.path.expanduser(model_path)):
            raise ValueError(f"--model_name_or_path {model_path}: no such folder; give a model's folder or Hub id")
        tokenizer = AutoTokenizer.from_pretrained(
            model_args.model_name_or_path,
            revision=model_args.model_revision,
            trust_remote_code=training_args.trust_remote_code,
        )
        OPSDTrainer.make_collator(tokenizer, training_args)  # checks the chat template before a model is loaded
    except (ValueError, TypeError, OSError, yaml.YAMLError) as error:  # OSError: no file, no connection, no such model
        sys.exit(f"opsd_train.py: error: {error}" if os.environ.get("RANK", "0") == "0" else 1)

    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "dtype": model_args.dtype,
        "attn_implementation": choose_attention(model_args.attn_implementation, model_args.dtype, training_args),
    }
    if (quantization_config := get_quantization_config(model_args)) is not None:
        training_args.model_init_kwargs["quantization_config"] = quantization_config

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
    output_dir = Path(training_args.output_dir)
    if trainer.accelerator.is_main_process:
        if checkpoint is None and script_args.overwrite_output_dir:
            for old in (*sort_checkpoints(output_dir), *output_dir.glob("completions"), *output_dir.glob("nonfinite")):
                shutil.rmtree(old)
                logger.info("--overwrite_output_dir: deleted %s", old)
        save_run_configuration(
            output_dir / "run_config.json", script=script_args, training=training_args, model=model_args
        )
    trainer.accelerator.wait_for_everyone()
    if checkpoint is not None:
        logger.info("going on from %s", checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.stopped_by_signal:
        trainer.accelerator.print("stopped by SIGTERM before the end; go on with --resume_from_checkpoint true")
        finish(trainer)
        sys.exit(128 + signal.SIGTERM)
    trainer.save_model()  # the adapter, or the whole model without --use_peft; and the tokenizer
    trainer.accelerator.print(f"saved to {output_dir}")
    finish(trainer)


if __name__ == "__main__":
    main()
