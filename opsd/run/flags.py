"""
The flags of a training program, read from the source of its dataclasses: for `--help`, and to refuse a wrong name.

To import these classes, which are TRL's and transformers', takes longer than anybody waits who has mistyped a name: it
imports torch and PEFT.
"""

import argparse
import ast
import difflib
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml

OURS = ("opsd", "opsd_train", "sft_train", "grpo_train")  # first parts of the names of our modules

# Group -> flags, in the order of --help. What is in no group comes last: ours always, all others with --help_all.
GROUPS = {
    "data": (
        "dataset_name", "dataset_config", "dataset_revision", "dataset_split", "problem_column", "solution_column",
        "answer_column", "max_length", "max_prompt_length", "eval_dataset_name", "eval_dataset_split",
    ),
    "model and adapter": (
        "model_name_or_path", "model_revision", "dtype", "attn_implementation", "use_peft", "lora_r", "lora_alpha",
        "lora_dropout", "lora_target_modules", "adapter_name_or_path",
    ),
    "prompts": (
        "system_prompt", "teacher_system_prompt", "thinking", "student_prompt", "student_thinking", "teacher_prompt",
        "teacher_thinking", "teacher_prefill",
    ),
    "teacher": (
        "fixed_teacher", "use_ema_teacher", "ema_decay", "ema_update_steps", "teacher_model_name_or_path",
        "teacher_model_revision", "teacher_model_server_url", "teacher_context", "reference_fallback", "reason_first",
        "max_reasoning_length", "reasoning_prompt", "reasoning_generation_kwargs",
    ),
    "objective": (
        "reward", "beta", "jsd_token_clip", "jsd_clip_mode", "loss_temperature", "top_k_loss", "top_k_loss_support",
        "top_k_loss_add_tail", "num_loss_tokens_to_skip", "token_weights", "use_tinker_loss", "sampled_token_clip",
        "correct_weight", "incorrect_weight", "policy_gradient_weight", "vllm_importance_sampling_correction",
        "scale_rewards", "loss_type", "loss_implementation", "loss_chunk_size",
    ),
    "rollouts": (
        "max_completion_length", "num_generations", "temperature", "top_p", "top_k", "min_p", "presence_penalty",
        "verify_rollouts", "verifier", "extract", "curriculum", "use_vllm", "vllm_mode",
        "vllm_gpu_memory_utilization", "vllm_tensor_parallel_size", "vllm_enable_sleep_mode", "vllm_server_host",
        "vllm_server_port", "vllm_adapter_dir", "max_staleness", "log_completions", "log_completions_steps",
        "num_completions_to_print", "save_completions", "save_token_statistics", "token_statistics_steps",
    ),
    "optimization": (
        "learning_rate", "lr_scheduler_type", "warmup_steps", "max_grad_norm", "effective_batch_size",
        "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "bf16",
        "packing", "max_tokens_per_micro_batch", "gradient_checkpointing", "use_cpu", "seed", "max_nonfinite_steps",
    ),
    "run": (
        "config", "output_dir", "run_config", "run_name", "overwrite_output_dir", "resume_from_checkpoint",
        "save_strategy", "save_steps", "save_total_limit", "eval_strategy", "eval_steps", "eval_accuracy_samples",
        "stop_on_collapse", "logging_steps", "report_to", "wandb_project", "wandb_entity", "profile_steps",
        "preflight", "dry_run", "dry_run_file",
    ),
}  # fmt: skip
# In place of what TRL and transformers say
HELP = {
    "model_name_or_path": "Folder or Hub id of the model. Must be given.",
    "teacher_model_name_or_path": "Folder or Hub id of another model that teaches, usually a larger one, with the "
    "student's tokenizer (on-policy distillation). It stays what it is. With --teacher_context none it sees what the "
    "student sees.",
    "teacher_model_revision": "Its branch, tag or commit on the Hub.",
    "use_peft": "Train a LoRA adapter and leave the model's weights as they are.",
    "lora_target_modules": "Names of the modules that get an adapter; all-linear for all of them.",
    "num_generations": "Rollouts of each problem in a step.",
    "use_vllm": "Sample the rollouts with vLLM; otherwise with transformers.",
    "vllm_mode": "colocate: in the training processes. server: from scripts/serve_vllm.sh.",
    "max_steps": "Optimizer steps; where positive, in place of --num_train_epochs.",
    "resume_from_checkpoint": "true: go on from the last complete checkpoint of the run. Or the folder of one.",
    "save_steps": "Steps between two checkpoints.",
    "logging_steps": "Steps between two logs.",
    "report_to": "Trackers: wandb, tensorboard, ... or none.",
}
# Of transformers, for scripts that read them: no program here does
UNREAD = ("do_train", "do_eval", "do_predict")


class Flag(NamedTuple):
    """A flag as its dataclass declares it."""

    kind: str  # annotation
    default: Any
    help: str
    choices: Sequence[str]
    aliases: Sequence[str]
    is_ours: bool


CONFIG = Flag("str", None, "YAML file with flags, without their dashes. The command line wins.", (), (), True)


def switch(text: str) -> bool:
    """Return what "true" or "false" says."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


# Of `add_argument`, for a flag that is on or off: --flag, --flag true, --flag false
SWITCH: dict[str, Any] = {"type": switch, "nargs": "?", "const": True, "default": False, "metavar": "true|false"}


@contextmanager
def exit_on_invalid_input(program: str) -> Iterator[None]:
    """Say what is wrong with the input in one line, once for all processes, and leave with status 1."""
    try:
        yield
    except (ValueError, TypeError, OSError, yaml.YAMLError) as error:  # OSError: no file, no connection, no such model
        sys.exit(f"{program}: error: {error}" if os.environ.get("RANK", "0") == "0" else 1)


# Reading the source


@cache
def _read(module: str) -> tuple[str | None, dict[str, ast.AST | tuple[str, str]]]:
    """Return a module's docstring, and name -> what it is bound to: (module, name) if it is imported."""
    root, *inner = module.split(".")
    spec = find_spec(root)
    if spec is None or spec.origin is None:
        raise KeyError(module)
    path = Path(spec.origin).parent.joinpath(*inner) if inner else Path(spec.origin)
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    bound: dict[str, ast.AST | tuple[str, str]] = {}
    statements = list(tree.body)
    for statement in statements:
        if isinstance(statement, ast.If | ast.With):  # a lazy package names what it has for type checkers
            statements += statement.body
        elif isinstance(statement, ast.ImportFrom):
            above = package[: len(package) - statement.level + 1] if statement.level else []
            source = ".".join(above + ([statement.module] if statement.module else []))
            bound |= {alias.asname or alias.name: (source, alias.name) for alias in statement.names}
        elif isinstance(statement, ast.ClassDef):
            bound[statement.name] = statement
        elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            bound[statement.targets[0].id] = statement.value
    return ast.get_docstring(tree), bound


def _find(module: str, name: str) -> tuple[str, ast.AST]:
    """Return the class or expression that a name in a module means, and the module of it; `KeyError` for none."""
    found = _read(module)[1][name]
    return _find(*found) if isinstance(found, tuple) else (module, found)


class _Names(dict[str, Any]):
    """The constants of a module, by name."""

    def __init__(self, module: str):
        self.module = module

    def __missing__(self, name: str) -> Any:
        module, expression = _find(self.module, name)
        if not isinstance(expression, ast.expr):
            raise KeyError(name)
        return _evaluate(module, expression)


def _evaluate(module: str, expression: ast.expr) -> Any:
    """Return the value of an expression of constants, or its source text."""
    try:
        return eval(compile(ast.Expression(expression), module, "eval"), {}, _Names(module))
    except (NameError, AttributeError, TypeError):  # not of constants alone
        return ast.unparse(expression)


def _read_class(module: str, name: str) -> dict[str, Flag]:
    """Return the flags of a dataclass and its bases; of a class that is not in a source, none."""
    try:
        module, node = _find(module, name)
    except KeyError:
        return {}
    assert isinstance(node, ast.ClassDef)
    flags: dict[str, Flag] = {}
    for base in reversed(node.bases):
        flags |= _read_class(module, ast.unparse(base))
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            call = statement.value
            parts = {word.arg: word.value for word in call.keywords} if isinstance(call, ast.Call) else {}
            default = parts.get("default", parts.get("default_factory"))
            described = parts.get("metadata", ast.Dict([], []))
            assert isinstance(described, ast.Dict)
            metadata = {
                ast.literal_eval(key): _evaluate(module, value)
                for key, value in zip(described.keys, described.values, strict=True)
                if key is not None
            }
            choices, aliases = metadata.get("choices", ()), metadata.get("aliases", ())
            flags[statement.target.id] = Flag(
                kind=ast.unparse(statement.annotation),
                default=None if default is None else _evaluate(module, default),
                help=metadata.get("help", ""),
                choices=() if isinstance(choices, str) else choices,  # the text of an expression
                aliases=[aliases] if isinstance(aliases, str) else aliases,
                is_ours=module.split(".")[0] in OURS,
            )
    return flags


class Flags(NamedTuple):
    """The flags of a program, by name, and those of them that it refuses or does not read."""

    known: dict[str, Flag]
    hidden: set[str]


@cache
def read_flags(program: str, run_class: str, config_class: str) -> Flags:
    """
    Read the flags of a program.

    Its module may have `DEFAULTS`, other defaults than those of the classes. It, or the module of a class, may have
    `FIXED` and `UNUSED`, the flags that are refused.

    Args:
        program: its module.
        run_class, config_class: its own arguments and those of its trainer, as the module names them.
    """
    classes = [(program, run_class), (program, config_class), ("opsd.run.arguments", "ModelArguments")]
    known = {"config": CONFIG}
    for place in classes:
        known |= _read_class(*place)
    for name, default in _constant(program, "DEFAULTS").items():
        known[name] = known[name]._replace(default=default)
    hidden = set(UNREAD)
    for module in {program, *(_find(*place)[0] for place in classes)}:
        hidden.update(_constant(module, "FIXED"))
        hidden.update(name for names in _constant(module, "UNUSED").values() for name in names)
    return Flags(known, hidden & known.keys())


def _constant(module: str, name: str) -> Mapping[str, Any]:
    return _Names(module)[name] if name in _read(module)[1] else {}


# Help, and names that do not exist


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def check_flags(program: str, run_class: str, config_class: str, arguments: Sequence[str] | None = None) -> None:
    """
    Refuse flags that do not exist, on the command line and in the file of `--config`, or show the help and leave.

    Args:
        program, run_class, config_class: as for `read_flags`.
        arguments: command line; `None` for that of the process.

    Raises:
        ValueError: for an unknown flag, with those that may be meant.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    flags = read_flags(program, run_class, config_class)
    parser = _Parser(add_help=False, allow_abbrev=False)
    for name, flag in flags.known.items():
        parser.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}", *flag.aliases)), nargs="*")
    for name in ("--help", "-h", "--help_all", "--help-all"):
        parser.add_argument(name, action="store_true")
    given, unknown = parser.parse_known_args(arguments)
    if given.help or given.h or given.help_all:
        sys.stdout.write(help_text(program, flags, show_all=given.help_all) + "\n")
        sys.exit()
    if given.config:
        config = yaml.safe_load(Path(given.config[0]).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"--config {given.config[0]}: must be a YAML mapping of flags to values")
        unknown += [f"--{name}" for name in config if name != "env" and name not in flags.known]
    if unknown:
        words = [word for word in unknown if word.startswith("-")]  # without the values behind them
        if not words:
            raise ValueError(f"{' '.join(unknown)}: stands behind no flag")
        raise ValueError("; ".join(_did_you_mean(word, flags) for word in words))


def _did_you_mean(word: str, flags: Flags) -> str:
    """Say of a word that is no flag which one may be meant."""
    name = word.lstrip("-").partition("=")[0].replace("-", "_")
    if name.startswith("no_") and "bool" in flags.known.get(name[3:], CONFIG).kind:
        return f"unknown flag {word}: say --{name[3:]} false"
    close = difflib.get_close_matches(name, flags.known.keys() - flags.hidden)
    meant = f"did you mean {' or '.join('--' + other for other in close)}?" if close else "--help lists the flags"
    return f"unknown flag {word}: {meant}"


def help_text(program: str, flags: Flags, show_all: bool) -> str:
    """Return the help of a program: ours and the most used flags of others in groups; with `show_all` all others."""
    rest = [name for name in flags.known if name not in {name for names in GROUPS.values() for name in names}]
    groups: dict[str, Sequence[str]] = GROUPS | {
        "others of ours": [name for name in rest if flags.known[name].is_ours]
    }
    if show_all:
        groups |= {"others of TRL and transformers": [name for name in rest if not flags.known[name].is_ours]}
    parser = argparse.ArgumentParser(
        prog=f"{program}.py",
        usage="%(prog)s [--config FILE] --FLAG VALUE ...",
        description=_read(program)[0],
        epilog="A flag that is on or off: --FLAG, --FLAG true, --FLAG false.\n"
        "--help shows our flags and the most used ones of TRL and transformers; --help_all shows all of them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    for title, names in groups.items():
        group = parser.add_argument_group(title)
        for name in names:
            if name in flags.known and name not in flags.hidden:
                flag = flags.known[name]
                group.add_argument(
                    f"--{name}", metavar=_metavar(flag), help=_describe(name, flag, show_all).replace("%", "%%")
                )
    return parser.format_help()


def _metavar(flag: Flag) -> str:
    """Return what stands for the value of a flag in the help."""
    if flag.choices:
        return "{" + ",".join(map(str, flag.choices)) + "}"
    kinds = {"bool": "true|false", "int": "N", "float": "X"}
    return next((value for kind, value in kinds.items() if re.search(rf"\b{kind}\b", flag.kind)), "TEXT")


def _describe(name: str, flag: Flag, is_whole: bool) -> str:
    """Return the help of a flag with its default. Of others' flags the first sentence will do, unless `is_whole`."""
    text = " ".join((flag.help if flag.is_ours else HELP.get(name, flag.help)).split())
    if not (flag.is_ours or is_whole or name in HELP):
        text = re.split(r"(?<=[a-z)`])\. ", text)[0].rstrip(".") + "."
    if flag.default is None or flag.default == "":
        return text
    default = str(flag.default).lower() if isinstance(flag.default, bool) else str(flag.default)
    return f"{text} Default: {textwrap.shorten(default, 60)}"
