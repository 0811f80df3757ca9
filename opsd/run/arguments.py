"""Flags of the training programs: the data set, the run and the model, and how a command line is read."""

import logging
import os
import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import transformers
from transformers import TrainingArguments
from trl import ModelConfig, TrlParser
from trl.scripts._hf_argparser import string_to_bool

from data_collator import STUDENT_PROMPT, check_template, placeholders
from opsd.run.flags import check_flags
from opsd.run.profiling import parse_steps

OUTPUT_DIR = "outputs"


@dataclass
class RunArguments:
    """Data set, name and end of a run. Each program adds its own."""

    dataset_name: str = field(
        default="siyanzhao/Openthoughts_math_30k_opsd",
        metadata={"help": "Hub id, or a local csv, tsv, json, jsonl or parquet file, or a folder of them."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a folder or Hub data set."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of a Hub data set."})
    dataset_split: str = field(
        default="train", metadata={"help": "Split to train on.", "aliases": ["--dataset_train_split"]}
    )
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Data set for --eval_strategy, likewise."})
    eval_dataset_split: str = field(default="test", metadata={"help": "Split of a Hub data set to evaluate on."})
    problem_column: str = field(
        default="problem",
        metadata={
            "help": "Column of the problem. One of conversations, such as messages: their last user turn is the "
            "problem, and what comes before stays in the prompts."
        },
    )
    solution_column: str = field(
        default="solution",
        metadata={
            "help": "Column of the reference solution. Of conversations it is the assistant's turn after the problem; "
            "without a column solution that of --problem_column."
        },
    )
    answer_column: str | None = field(default=None, metadata={"help": "Column of the final answer: text or number."})
    system_prompt: str | None = field(
        default=None,
        metadata={
            "help": "System turn of all prompts; by default that of the conversations, or none.",
            "aliases": ["--student_system_prompt"],
        },
    )
    effective_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Sequences per optimizer step, over all processes and accumulation steps; sets "
            "--gradient_accumulation_steps."
        },
    )
    max_nonfinite_steps: int = field(
        default=3,
        metadata={
            "help": "Stop after so many steps in a row with a loss or gradient that was not finite; each is skipped."
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
    profile_steps: str | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps, such as 3-4, of which PyTorch's profiler writes a trace into the output folder."
        },
    )
    dry_run: int | None = field(
        default=None,
        metadata={
            "help": "Check settings and local data for a run of so many processes, show what it would do, and leave."
        },
    )
    dry_run_file: str | None = field(
        default=None,
        metadata={"help": "With --dry_run: file for all settings as JSON; by default dry_run.json in --output_dir."},
    )

    def __post_init__(self):
        if self.max_nonfinite_steps < 1:
            raise ValueError(f"--max_nonfinite_steps {self.max_nonfinite_steps}: must be at least 1")
        if self.profile_steps is not None:
            parse_steps(self.profile_steps)


@dataclass
class BaselineArguments(RunArguments):
    """The prompt of the baselines: that of the evaluation."""

    student_prompt: str = field(
        default=STUDENT_PROMPT,
        metadata={
            "help": "Template of the prompt, with {problem}, and with {name} of any other column of texts; as in the "
            "evaluation."
        },
    )
    thinking: bool = field(default=False, metadata={"help": "Thinking mode of the prompt; as in the evaluation."})

    def __post_init__(self):
        super().__post_init__()
        check_template("student_prompt", self.student_prompt, {"problem"}, refused={"solution", "answer"})

    @property
    def template_columns(self) -> dict[str, str]:
        """Columns that the prompt shows beside the problem, each under its own name."""
        return {name: name for name in sorted(placeholders(self.student_prompt) - {"problem"})}


@dataclass
class ModelArguments(ModelConfig):
    """TRL's model arguments, with the release's spelling of the dtype."""

    dtype: str | None = field(
        default="float32",
        metadata={
            "help": "Data type in which the weights are loaded. bfloat16 goes with --use_peft, whose adapters stay in "
            "float32 (under DeepSpeed its optimizer keeps them in float32); without an adapter the optimizer needs "
            "float32.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
            "aliases": ["--torch_dtype"],
        },
    )

    def __post_init__(self):
        super().__post_init__()
        target = self.lora_target_modules  # TRL takes one word for a regular expression of whole names
        if isinstance(target, str) and target != "all-linear" and re.fullmatch(r"[\w.]+", target):
            self.lora_target_modules = [target]


RunArgumentsT = TypeVar("RunArgumentsT", bound=RunArguments)
ConfigT = TypeVar("ConfigT", bound=TrainingArguments)


class _RunParser(TrlParser):
    """A parser that looks at the flags together before it makes settings of them."""

    def __init__(self, dataclass_types: Sequence[type]):
        super().__init__(dataclass_types, add_help=False)  # `check_flags` has shown it
        for action in self._actions:
            if action.type is string_to_bool:  # those without a default would need a value
                action.nargs, action.const = "?", True

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def parse_args_into_dataclasses(self, args: Sequence[str], **kwargs: Any) -> tuple:
        self.dataclass_types: list[type]
        given, _ = self.parse_known_args(args)
        if given.use_cpu:  # else "cpu:0" in a run of several processes, where torch.load can put nothing
            os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
        args = [*args, *self._use_peft(args, given), *self._accumulation(given)]
        if given.dry_run is not None:
            if not torch.cuda.is_available():
                args += ["--use_cpu", "true"]  # settings for a GPU can be checked where there is none
            self.dataclass_types = [_with_world_size(kind, given.dry_run) for kind in self.dataclass_types]
        return super().parse_args_into_dataclasses(args=args, **kwargs)

    @staticmethod
    def _use_peft(args: Sequence[str], given: Namespace) -> list[str]:
        """Refuse settings of an adapter without --use_peft; where nobody says, there is no adapter."""
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
        """The accumulation steps of --effective_batch_size. Some settings depend on them as soon as they are made."""
        if given.effective_batch_size is None:
            return []
        num_processes = given.dry_run or int(os.environ.get("WORLD_SIZE", "1"))
        batch, per_device = given.effective_batch_size, given.per_device_train_batch_size
        steps, rest = divmod(batch, num_processes * per_device)
        if rest or steps == 0:
            raise ValueError(
                f"--effective_batch_size {batch}: is not a multiple of {num_processes} processes x "
                f"--per_device_train_batch_size {per_device}. One of these would do: "
                + "; ".join(_batches_that_divide(batch, num_processes, per_device))
            )
        if given.gradient_accumulation_steps not in (1, steps):
            raise ValueError(
                f"--gradient_accumulation_steps {given.gradient_accumulation_steps}: --effective_batch_size "
                f"{given.effective_batch_size} asks for {steps}; leave one of the two out"
            )
        return ["--gradient_accumulation_steps", str(steps)]


def _batches_that_divide(batch: int, num_processes: int, per_device: int) -> list[str]:
    """What can be said in place of each of three numbers of which the first is no multiple of the others' product."""
    product, of_process = num_processes * per_device, batch // num_processes
    batches = [number for number in (batch // product * product, (batch // product + 1) * product) if number > 0]
    numbers = {
        "--effective_batch_size": batches,
        "--per_device_train_batch_size": [
            n for n in range(1, of_process + 1) if batch % num_processes == 0 and of_process % n == 0
        ],
        "NUM_PROCESSES": [n for n in range(1, batch + 1) if batch % (n * per_device) == 0],
    }
    return [f"{name} {' or '.join(map(str, choices))}" for name, choices in numbers.items() if choices]


def _with_world_size(settings_class: type, num_processes: int) -> type:
    """The class of a trainer's settings as in a run of so many processes; other classes as they are."""
    if not issubclass(settings_class, TrainingArguments):
        return settings_class
    return type(settings_class.__name__, (settings_class,), {"world_size": num_processes})


def parse_arguments(
    run_class: type[RunArgumentsT],
    config_class: type[ConfigT],
    arguments: list[str] | None = None,
    **defaults: Any,
) -> tuple[RunArgumentsT, ConfigT, ModelArguments]:
    """
    Read a command line, and the YAML file that `--config` names in it.

    Args:
        run_class, config_class: of a program's own arguments and of its trainer's.
        arguments: command line; `None` for that of the process.
        defaults: other defaults than those of the classes.

    Raises:
        ValueError: for a setting that cannot be, an unknown one, and a batch that does not come out.
    """
    program = Path(str(sys.modules[run_class.__module__].__file__)).stem
    check_flags(program, run_class.__name__, config_class.__name__, arguments)
    parser = _RunParser((run_class, config_class, ModelArguments))
    parser.set_defaults(output_dir=OUTPUT_DIR, use_peft=None, **defaults)  # None tells "not said" from "false"
    run_args, training_args, model_args = parser.parse_args_and_config(arguments)
    logging.basicConfig(
        level=logging.INFO if training_args.process_index == 0 else logging.ERROR, format="%(name)s: %(message)s"
    )
    transformers.logging.disable_default_handler()  # its messages reach the root logger anyway
    return run_args, training_args, model_args
