"""The flags of the programs: what `--help` shows, what is said of a wrong name, and how booleans are given."""

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from trl import GRPOConfig, SFTConfig

import grpo_train
import opsd_train
import sft_train
from grpo_train import GRPOArguments
from opsd.config import FIXED, UNUSED, OPSDConfig
from opsd.run.arguments import ModelArguments, parse_arguments
from opsd.run.flags import GROUPS, UNREAD, check_flags, help_text, read_flags
from opsd_train import OPSDArguments
from sft_train import SFTArguments

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = {
    "opsd_train": (OPSDArguments, OPSDConfig),
    "sft_train": (SFTArguments, SFTConfig),
    "grpo_train": (GRPOArguments, GRPOConfig),
}
REFUSED = {
    "opsd_train": {*FIXED, *(flag for flags in UNUSED.values() for flag in flags)},
    "sft_train": {flag for flags in sft_train.UNUSED.values() for flag in flags},
    "grpo_train": {flag for flags in grpo_train.UNUSED.values() for flag in flags},
}


def read(program):
    return read_flags(program, *(kind.__name__ for kind in PROGRAMS[program]))


def shown(program, show_all=False):
    lines = help_text(program, read(program), show_all).splitlines()
    return [line.split()[0].removeprefix("--") for line in lines if line.startswith("  --")]


@pytest.fixture(scope="module", params=PROGRAMS)
def helped(request) -> tuple[str, str, set[str]]:
    """A program, what it prints for `--help`, and the modules that are imported then."""
    program = ROOT / f"{request.param}.py"
    code = "import runpy, sys\ntry: runpy.run_path(sys.argv[1], run_name='__main__')\n"
    code += "finally: print('MODULES', *sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    command = [sys.executable, "-c", code, program, "--help"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    text, _, modules = run.stdout.partition("MODULES")
    return request.param, text, set(modules.split())


def test_help_imports_no_library_that_takes_long(helped):
    _, _, modules = helped
    assert "opsd.run.flags" in modules
    assert not modules & {
        "torch",
        "transformers",
        "trl",
        "peft",
        "vllm",
        "datasets",
        "trl.experimental.gold.gold_trainer",
    }


def test_help_shows_ours_in_groups(helped):
    program, text, _ = helped
    titles = [title for title, names in GROUPS.items() if set(names) & set(shown(program))]
    positions = [text.index(f"\n{title}:\n") for title in titles]
    assert positions == sorted(positions)
    assert "others of" not in text  # each flag of ours is in a group
    names = shown(program)
    own = [name for name, flag in read(program).known.items() if flag.is_ours]
    assert set(own) - REFUSED[program] <= set(names)
    assert {"learning_rate", "max_steps", "save_steps", "logging_steps", "lora_r", "report_to"} <= set(names)
    assert {"adam_beta1", "hub_token"} & set(names) == set()
    assert len(text.splitlines()) < 330


@pytest.mark.parametrize("program", PROGRAMS)
def test_refused_flags_are_not_listed(program):
    everything = shown(program, show_all=True)
    assert len(everything) == len(set(everything))
    known = {setting.name for kind in (*PROGRAMS[program], ModelArguments) for setting in fields(kind) if setting.init}
    assert set(everything) == {"config", *known} - REFUSED[program] - {*UNREAD}


@pytest.mark.parametrize("program", PROGRAMS)
def test_source_says_what_the_classes_say(program):
    flags = read(program).known
    defaults = getattr(sys.modules[program], "DEFAULTS", {})
    for kind in (*PROGRAMS[program], ModelArguments):
        for setting in fields(kind):
            flag = flags[setting.name]
            assert flag.help == setting.metadata.get("help", ""), setting.name
            assert list(flag.choices) == list(setting.metadata.get("choices", ())) or setting.name.startswith(
                "log_level"
            )
            expected = defaults.get(setting.name, setting.default)
            if isinstance(expected, str | int | float) and not isinstance(flag.default, str):
                assert flag.default == expected, setting.name


def test_table_of_groups_has_no_flag_twice():
    names = [name for names in GROUPS.values() for name in names]
    assert len(names) == len(set(names))
    known = {name for program in PROGRAMS for name in read(program).known}
    assert set(names) - known <= {"system_prompt"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--learnig_rate 1e-3", "unknown flag --learnig_rate: did you mean --learning_rate?"),
        ("--learning_rat 1e-3", "unknown flag --learning_rat: did you mean --learning_rate"),  # no short forms
        ("--fixed-techer", "unknown flag --fixed-techer: did you mean --fixed_teacher?"),
        (
            "--jsd_token_clp=0.1 --xyzzy",
            "mean --jsd_token_clip.*; unknown flag --xyzzy: --help lists the flags",
        ),
        ("--no_save_completions", "unknown flag --no_save_completions: say --save_completions false"),
        ("--no-bf16", "unknown flag --no-bf16: say --bf16 false"),
        ("trial", "trial: stands behind no flag"),
        ("--lora 5", "unknown flag --lora: did you mean --lora_r"),
    ],
)
def test_unknown_flag_names_the_one_that_is_meant(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_flags("opsd_train", "OPSDArguments", "OPSDConfig", arguments.split())
    with pytest.raises(SystemExit, match=message):
        opsd_train.main(arguments.split())


def test_refused_flag_is_not_proposed():
    with pytest.raises(ValueError, match=r"--lmbdas: (?!.*--lmbda)"):
        check_flags("opsd_train", "OPSDArguments", "OPSDConfig", ["--lmbdas", "1"])


def test_unknown_name_in_a_file_of_flags(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("env: {A: b}\nbeta: 0.5\nmax_step: 5\n")
    with pytest.raises(ValueError, match="unknown flag --max_step: did you mean --max_steps"):
        check_flags("opsd_train", "OPSDArguments", "OPSDConfig", ["--config", str(file)])
    file.write_text("- beta\n")
    with pytest.raises(ValueError, match="--config .*run.yaml: must be a YAML mapping"):
        check_flags("opsd_train", "OPSDArguments", "OPSDConfig", ["--config", str(file)])


def test_typo_ends_at_once():
    """Before anything that takes long is imported, and with one line."""
    command = [sys.executable, "-X", "importtime", ROOT / "opsd_train.py", "--learnig_rate", "5"]
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    *imports, error = run.stderr.splitlines()
    assert (run.returncode, run.stdout) == (1, "")
    assert error == "opsd_train.py: error: unknown flag --learnig_rate: did you mean --learning_rate?"
    imported = {line.rpartition("|")[2].strip() for line in imports}
    assert "yaml" in imported and not imported & {"torch", "transformers", "trl"}


@pytest.mark.parametrize("name", ["bf16", "fixed_teacher", "save_completions", "use_cpu", "gradient_checkpointing"])
def test_one_way_of_booleans(name):
    """Also for those that have no default of their own, and for those that are on."""

    def parse(*given):
        other = [] if name == "use_cpu" else ["--use_cpu"]
        other += [] if name == "bf16" else ["--bf16", "false"]
        _, settings, _ = parse_arguments(OPSDArguments, OPSDConfig, ["--model_name_or_path", "m", *other, *given])
        return getattr(settings, name)

    if name != "use_cpu":
        assert parse(f"--{name}", "false") is False
    assert parse(f"--{name}") is parse(f"--{name}", "true") is True


def test_bad_value_is_said_in_one_line():
    with pytest.raises(SystemExit, match=r"^opsd_train.py: error: argument --beta: invalid float value: 'half'$"):
        opsd_train.main(["--beta", "half"])
