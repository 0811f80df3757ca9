"""What the training programs share: arguments of data set and model, and how a run is checked, named, recorded and ended."""

import dataclasses
import json
import logging
import os
import shutil
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
import yaml
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import is_flash_attn_2_available
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config
from trl.import_utils import is_vllm_available

from checkpoints import find_checkpoint
from opsd.grading import answer_text
from problem_data import check_columns, find_local, keep_usable, load_problems
from rollouts import check_servable

logger = logging.getLogger(__name__)

OUTPUT_DIR = "outputs"


@dataclass
class RunArguments:
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
    effective_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Sequences per optimizer step, over all processes and accumulation steps; sets "
            "--gradient_accumulation_steps."
        },
    )
    run_config: str | None = field(
        default=None, metadata={"help": "Name of the run: W&B run name and subfolder of --output_dir."}
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Start anew and delete the checkpoints and rollouts that are in the output folder."},
    )
    wandb_project: str | None = field(default=None, metadata={"help": "W&B project (with --report_to wandb)."})
    wandb_entity: str | None = field(default=None, metadata={"help": "W&B entity (with --report_to wandb)."})
    dry_run: int | None = field(
        default=None,
        metadata={"help": "Check all settings for a run of so many processes, print them as JSON, and leave."},
    )


@dataclass
class ModelArguments(ModelConfig):
    """TRL's model arguments, with the release's spelling of the dtype."""

    dtype: str | None = field(
        default="float32",
        metadata={
            "help": "Data type in which the weights are loaded. bfloat16 goes with --use_peft, whose adapters stay in "
            "float32 (under DeepSpeed its optimizer keeps them in float32); without an adapter the optimizer needs float32.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
            "aliases": ["--torch_dtype"],
        },
    )


class _RunParser(TrlParser):
    """A parser that looks at the flags together before it makes settings of them."""

    def parse_args_into_dataclasses(self, args: Sequence[str], **kwargs: Any) -> tuple:
        given, _ = self.parse_known_args(args)
        args = [*args, *self._use_peft(args, given), *self._accumulation(given)]
        if given.dry_run is None:
            return super().parse_args_into_dataclasses(args=args, **kwargs)
        if not torch.cuda.is_available():
            args += ["--use_cpu", "true"]  # settings for a GPU can be checked where there is none
        with mock.patch.object(TrainingArguments, "world_size", given.dry_run):
            return super().parse_args_into_dataclasses(args=args, **kwargs)

    @staticmethod
    def _use_peft(args: Sequence[str], given: Namespace) -> list[str]:
        if given.use_peft is not None:
            return []
        names = [name for name in vars(given) if name.startswith("lora_") or name in ("use_rslora", "use_dora")]
        words = {word.split("=")[0].lstrip("-").replace("-", "_") for word in args if word.startswith("--")}
        flags = [f"--{n}" for n in names if n in words or getattr(given, n) != getattr(ModelArguments, n)]
        if flags:
            raise ValueError(
                f"{', '.join(flags)} without --use_peft: the whole model would be trained. Add --use_peft, or say "
                "--use_peft false"
            )
        return ["--use_peft", "false"]

    @staticmethod
    def _accumulation(given: Namespace) -> list[str]:
        """The accumulation steps have to be known when the settings are made, of which some depend on them."""
        if given.effective_batch_size is None:
            return []
        num_processes = given.dry_run or int(os.environ.get("WORLD_SIZE", "1"))
        steps, rest = divmod(given.effective_batch_size, num_processes * given.per_device_train_batch_size)
        if rest or steps == 0:
            raise ValueError(
                f"--effective_batch_size {given.effective_batch_size}: is not a multiple of {num_processes} processes x "
                f"--per_device_train_batch_size {given.per_device_train_batch_size}; change one of the three"
            )
        if given.gradient_accumulation_steps not in (1, steps):
            raise ValueError(
                f"--gradient_accumulation_steps {given.gradient_accumulation_steps}: --effective_batch_size "
                f"{given.effective_batch_size} asks for {steps}; leave one of the two out"
            )
        return ["--gradient_accumulation_steps", str(steps)]


def parse_arguments(
    run_class: type[RunArguments],
    config_class: type[TrainingArguments],
    arguments: list[str] | None = None,
    **defaults: Any,
) -> tuple[RunArguments, TrainingArguments, ModelArguments]:
    """
    Read a command line, and the YAML file that `--config` names in it.

    Args:
        run_class, config_class: of a program's own arguments and of its trainer's.
        arguments: command line; `None` for that of the process.
        defaults: other defaults than those of the classes.

    Raises:
        ValueError: for a setting that cannot be, an unknown one, and a batch that does not come out.
    """
    parser = _RunParser((run_class, config_class, ModelArguments))
    parser.set_defaults(output_dir=OUTPUT_DIR, use_peft=None, **defaults)  # None tells "not said" from "false"
    run_args, training_args, model_args = parser.parse_args_and_config(arguments)
    logging.basicConfig(
        level=logging.INFO if training_args.process_index == 0 else logging.ERROR, format="%(name)s: %(message)s"
    )
    transformers.logging.disable_default_handler()  # its messages reach the root logger anyway
    return run_args, training_args, model_args


@contextmanager
def refuse_bad_input(program: str) -> Iterator[None]:
    """Say what is wrong with the input in one line, once for all processes, and leave with status 1."""
    try:
        yield
    except (ValueError, TypeError, OSError, yaml.YAMLError) as error:  # OSError: no file, no connection, no such model
        sys.exit(f"{program}: error: {error}" if os.environ.get("RANK", "0") == "0" else 1)


# Checks before a model is loaded


def check_model(model_args: ModelArguments, use_vllm: bool = False) -> None:
    """Raise `ValueError` for a model that is not there, and for what vLLM cannot serve."""
    path = model_args.model_name_or_path
    if path is None:
        raise ValueError("--model_name_or_path is missing: name a model's folder or Hub id")
    if path.startswith((".", "/", "~")) and not os.path.isdir(os.path.expanduser(path)):
        raise ValueError(f"--model_name_or_path {path}: no such folder; give a model's folder or Hub id")
    if use_vllm and not is_vllm_available():
        raise ValueError(
            "--use_vllm: there is no vLLM of a version that TRL supports; scripts/setup_env.sh installs one"
        )
    if use_vllm and model_args.use_peft:
        check_servable(get_peft_config(model_args))
    if use_vllm and (model_args.load_in_4bit or model_args.load_in_8bit):
        raise ValueError(
            "--use_vllm: vLLM would sample from the base as it is published, not from the quantized one; leave out "
            "--load_in_4bit and --load_in_8bit, or sample without --use_vllm"
        )


def settle_run(
    method: str,
    num_tokens: int | None,
    run_args: RunArguments,
    training_args: TrainingArguments,
    model_args: ModelArguments,
) -> str | None:
    """
    Settle the run's name and folder, from --run_config or composed of what tells runs apart, and where it starts.

    Args:
        method: as names of runs begin.
        num_tokens: of a sequence, for the name.

    Returns:
        The checkpoint to continue from, or `None` for a run from the beginning.

    Raises:
        ValueError: checkpoints in the way, none to continue from, or an evaluation without data.
    """
    model_name = Path(model_args.model_name_or_path).name
    num_processes = run_args.dry_run or training_args.world_size
    batch = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps * num_processes
    composed = f"{method}_{model_name}_lr{training_args.learning_rate:g}_bs{batch}_tok{num_tokens}"
    name = run_args.run_config or composed
    training_args.run_name = training_args.run_name or name
    if run_args.run_config or os.path.normpath(training_args.output_dir) == OUTPUT_DIR:
        training_args.output_dir = os.path.join(training_args.output_dir, name)
    for variable, value in (("WANDB_PROJECT", run_args.wandb_project), ("WANDB_ENTITY", run_args.wandb_entity)):
        if value is not None:
            os.environ[variable] = value
    if (run_args.eval_dataset_name is None) != (training_args.eval_strategy == "no"):
        raise ValueError("--eval_dataset_name and --eval_strategy need each other: give both, or none of them")
    return find_checkpoint(
        training_args.output_dir, training_args.resume_from_checkpoint, run_args.overwrite_output_dir
    )


def load_data(
    run_args: RunArguments, columns: dict[str, str], further_columns: dict[str, str | None] | None = None
) -> tuple[Dataset, Dataset | None]:
    """
    The data to train on and to evaluate on: rows of texts.

    Args:
        columns: flag -> column name, as in `{"problem_column": "Question"}`, which the rows will have as `problem`. Rows
            without one of these texts are left out. Answers may also be numbers.
        further_columns: likewise, of columns that may be empty in a row; `None` for those that nobody asked for.

    Raises:
        FileNotFoundError, ValueError: for data that cannot be used, naming the flag and the way out.
    """
    further = {flag: column for flag, column in (further_columns or {}).items() if column is not None}

    def load(name: str, split: str) -> Dataset:
        dataset = load_problems(name, split, config=run_args.dataset_config, revision=run_args.dataset_revision)
        check_columns(dataset, **columns, **further)
        if "answer_column" in columns:
            column = columns["answer_column"]
            try:
                answers = [answer_text(value) for value in dataset[column]]
            except TypeError as error:
                raise ValueError(f"--answer_column {column}: {error}") from error
            dataset = dataset.remove_columns(column).add_column(column, answers)
        dataset = keep_usable(dataset, **columns)
        chosen = {flag.removesuffix("_column"): dataset[column][:] for flag, column in (columns | further).items()}
        return Dataset.from_dict(chosen)

    train_dataset = load(run_args.dataset_name, run_args.dataset_split)
    if run_args.eval_dataset_name is None:
        return train_dataset, None
    return train_dataset, load(run_args.eval_dataset_name, run_args.eval_dataset_split)


def load_tokenizer(model_args: ModelArguments, training_args: TrainingArguments) -> PreTrainedTokenizerBase:
    """The model's tokenizer; raises `ValueError` if it has no chat template, which all prompts need."""
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )
    if tokenizer.chat_template is None:
        raise ValueError(
            f"--model_name_or_path {model_args.model_name_or_path}: its tokenizer has no chat template, which the prompts "
            "need; use an instruction-tuned model"
        )
    return tokenizer


def model_options(model_args: ModelArguments, training_args: TrainingArguments) -> dict[str, Any]:
    """`model_init_kwargs` of TRL's trainers: revision, dtype, attention and, where asked for, quantization."""
    options = {
        "revision": model_args.model_revision,
        "dtype": model_args.dtype,
        "attn_implementation": choose_attention(model_args.attn_implementation, model_args.dtype, training_args),
        "trust_remote_code": training_args.trust_remote_code,
        "device_map": None,  # where TRL says "auto", one process would spread the model over all GPUs that it sees
    }
    if (quantization_config := get_quantization_config(model_args)) is not None:
        options["quantization_config"] = quantization_config
    return options


def choose_attention(requested: str | None, dtype: str, training_args: TrainingArguments) -> str:
    """FlashAttention 2 where it is installed and can run, unless another one is requested; else PyTorch's, and say so."""
    if requested not in (None, "flash_attention_2"):
        return requested
    half_precision = training_args.bf16 or training_args.fp16 or dtype in ("bfloat16", "float16")
    if is_flash_attn_2_available() and half_precision and not training_args.use_cpu:
        return "flash_attention_2"
    logger.info("attention: sdpa; flash_attention_2 needs flash-attn, a GPU and half precision")
    return "sdpa"


# The run


def configuration(
    run_args: RunArguments, training_args: TrainingArguments, model_args: ModelArguments
) -> dict[str, Any]:
    """All settings of a run, and the versions that it runs with."""
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
    return {
        "script": dataclasses.asdict(run_args),
        "training": training_args.to_dict(),
        "model": dataclasses.asdict(model_args),
        "versions": {package: version(package) for package in packages},
    }


def print_dry_run(run_args: RunArguments, training_args: TrainingArguments, model_args: ModelArguments) -> None:
    """Print what a run with these settings would be; raise `FileNotFoundError` for a local data set that is not there."""
    for flag in ("dataset_name", "eval_dataset_name"):
        if getattr(run_args, flag) is not None:
            find_local(getattr(run_args, flag), flag)
    print(json.dumps(configuration(run_args, training_args, model_args), indent=2, default=str))  # noqa: T201


class _Beginning(TrainerCallback):
    """When training begins, and not before all checks have passed: old files are deleted, the settings are recorded."""

    def __init__(self, output_dir: Path, settings: dict[str, Any], starts_anew: bool):
        self.output_dir, self.settings, self.starts_anew = output_dir, settings, starts_anew

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        if self.starts_anew:
            folders = [self.output_dir / name for name in ("completions", "nonfinite")]
            for old in (*sort_checkpoints(self.output_dir), *filter(Path.exists, folders)):
                shutil.rmtree(old)
                logger.info("--overwrite_output_dir: deleted %s", old)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.settings, indent=2, default=str)
        (self.output_dir / "run_config.json").write_text(text + "\n", encoding="utf-8")


def run_training(
    trainer: Trainer,
    run_args: RunArguments,
    model_args: ModelArguments,
    checkpoint: str | None,
    rollouts: Any = None,
) -> None:
    """
    Train from the beginning or from a checkpoint, save the model, and leave the process group.

    On SIGTERM there is a checkpoint and no final model, and the process leaves with status 143.

    Args:
        trainer: with `CompleteCheckpoints` among its bases.
        rollouts: an `OnPolicyGeneration` to close at the end.
    """
    training_args, accelerator = trainer.args, trainer.accelerator
    starts_anew = checkpoint is None and run_args.overwrite_output_dir
    settings = configuration(run_args, training_args, model_args)
    trainer.add_callback(_Beginning(Path(training_args.output_dir), settings, starts_anew))
    if checkpoint is not None:
        logger.info("going on from %s", checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.stopped_by_signal:
        accelerator.print("stopped by SIGTERM before the end; go on with --resume_from_checkpoint true")
    else:
        trainer.save_model()  # the adapter, or the whole model without --use_peft; and the tokenizer
        accelerator.print(f"saved to {training_args.output_dir}")
    finish(trainer, rollouts)
    if trainer.stopped_by_signal:
        sys.exit(128 + signal.SIGTERM)


def finish(trainer: Trainer, rollouts: Any = None) -> None:
    """Leave the process group, once all are done: the engine before the training, which it shares the group with."""
    trainer.accelerator.wait_for_everyone()
    if rollouts is not None:
        rollouts.close()
    trainer.accelerator.end_training()
