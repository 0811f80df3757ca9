"""
Dry runs of every launch script: its arguments pass the real parsers, and are those of the paper and of the release.
The files that set up environment, checks and packages agree.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from packaging.requirements import Requirement

from eval import evaluate_math

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"

# From the sources, not from the scripts: the paper (v1: Tables 4 and 6, sections 4.1 and 8.1) and the settings of the
# release of March 18, 2026. Names of settings as in the programs' configuration.

LORA = {
    "use_peft": True,
    "lora_r": 64,
    "lora_alpha": 128,
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
PRECISION = {"dtype": "bfloat16", "bf16": True, "gradient_checkpointing": True, "attn_implementation": None}
DATA = {"dataset_name": "siyanzhao/Openthoughts_math_30k_opsd", "dataset_split": "train"}
COLOCATED = {
    "use_vllm": True,
    "vllm_mode": "colocate",
    "vllm_gpu_memory_utilization": 0.6,
    "vllm_tensor_parallel_size": 1,
}
OPSD = LORA | PRECISION | DATA | COLOCATED
OPSD |= {"problem_column": "problem", "solution_column": "solution", "max_length": 20000}
OPSD |= {
    "fixed_teacher": True,
    "use_ema_teacher": False,
    "use_tinker_loss": False,
    "top_k_loss": 0,
}
OPSD |= {"num_generations": 1, "lmbda": 1.0, "min_p": 0.0, "presence_penalty": 0.0, "effective_batch_size": 32}
OPSD |= {"preflight": True, "save_steps": 25, "logging_steps": 2}

RELEASE = OPSD | {"learning_rate": 5e-6, "max_grad_norm": 0.1, "beta": 0.0, "jsd_token_clip": 0.05}
RELEASE |= {
    "jsd_clip_mode": "pointwise",
    "temperature": 1.1,
    "top_p": 0.95,
    "top_k": 20,
    "max_completion_length": 1024,
}
RELEASE |= {"student_thinking": False, "teacher_thinking": True}
RELEASE_1B = RELEASE | {"model_name_or_path": "Qwen/Qwen3-1.7B", "per_device_train_batch_size": 4, "max_steps": 100}
RELEASE_4B = RELEASE | {"model_name_or_path": "Qwen/Qwen3-4B", "per_device_train_batch_size": 4}
RELEASE_8B = RELEASE | {"model_name_or_path": "Qwen/Qwen3-8B", "per_device_train_batch_size": 2}
RELEASE_8B |= {"jsd_token_clip": 0.06}
NONTHINKING = {"teacher_thinking": False}

COSINE = {"lr_scheduler_type": "cosine", "warmup_steps": 0.1}
TABLE_6 = {"learning_rate": 2e-5, "temperature": 1.2, "top_p": 1.0, "top_k": 0}
TABLE_6 |= {"effective_batch_size": 32, "per_device_train_batch_size": 1}
PAPER_V1 = OPSD | COSINE | TABLE_6 | {"model_name_or_path": "Qwen/Qwen3-4B", "beta": 0.5, "jsd_token_clip": 0.0}
PAPER_V1 |= {"max_completion_length": 2048}

GRPO = LORA | PRECISION | DATA | COLOCATED | COSINE | TABLE_6
GRPO |= {"problem_column": "Question", "answer_column": "Answer", "num_generations": 8, "beta": 0.0}
GRPO |= {"max_completion_length": 16000, "max_prompt_length": 2048, "scale_rewards": "group", "reward": "math"}
GRPO |= {"generation_batch_size": 32, "cast_lm_head_to_fp32": True}

SFT = LORA | PRECISION | DATA | COSINE | {"learning_rate": 2e-5, "max_length": 16000, "num_train_epochs": 4}
SFT |= {"problem_column": "Question", "solution_column": "solution", "completion_only_loss": True}
SFT |= {"effective_batch_size": 64, "per_device_train_batch_size": 2, "max_steps": -1}


class Recipe(NamedTuple):
    program: str
    num_processes: int
    accumulation: int  # steps of it with so many processes
    settings: dict[str, Any]


RECIPES = {
    "run_opsd_1b": Recipe("opsd_train", 4, 2, RELEASE_1B),
    "run_opsd_4b": Recipe("opsd_train", 8, 1, RELEASE_4B),
    "run_opsd_8b": Recipe("opsd_train", 8, 2, RELEASE_8B),
    "run_opsd_4b_nonthink": Recipe(
        "opsd_train", 8, 1, RELEASE_4B | NONTHINKING | {"jsd_token_clip": 1e-6, "max_steps": 150}
    ),
    "run_opsd_8b_nonthink": Recipe("opsd_train", 8, 2, RELEASE_8B | NONTHINKING | {"jsd_token_clip": 1e-7}),
    "run_opsd_answers": Recipe(
        "opsd_train",
        4,
        2,
        RELEASE_1B | {"teacher_context": "rollout", "num_generations": 4, "answer_column": "Answer"},
    ),
    "run_opsd_ema": Recipe(
        "opsd_train", 4, 2, RELEASE_1B | {"fixed_teacher": False, "use_ema_teacher": True, "ema_decay": 0.999}
    ),
    "run_opd_1b": Recipe(
        "opsd_train",
        4,
        2,
        RELEASE_1B
        | {"teacher_model_name_or_path": "Qwen/Qwen3-8B", "fixed_teacher": False, "teacher_context": "none"}
        | {"vllm_gpu_memory_utilization": 0.4},
    ),
    "run_opsd_topkloss": Recipe("opsd_train", 4, 2, RELEASE_1B | {"top_k_loss": 100}),
    "run_opsd_tinker": Recipe("opsd_train", 8, 4, PAPER_V1 | {"use_tinker_loss": True}),
    "run_opsd_paper_v1": Recipe("opsd_train", 8, 4, PAPER_V1),
    "run_opsd": Recipe("opsd_train", 4, 2, RELEASE_1B),
    "run_sft": Recipe("sft_train", 8, 4, SFT | {"model_name_or_path": "Qwen/Qwen3-1.7B"}),
    "run_grpo": Recipe("grpo_train", 8, 4, GRPO | {"model_name_or_path": "Qwen/Qwen3-1.7B"}),
}
WHOLE = {"run_opsd", "run_opsd_1b", "run_opsd_paper_v1", "run_sft", "run_grpo"}
# Settings for which the recipes give a reason of their own, and settings that follow from others
OURS = {"lora_dropout", "lr_scheduler_type", "warmup_steps", "max_grad_norm", "max_steps"}
OURS |= {"save_steps", "logging_steps", "thinking"}
FOLLOWING = {"run_name", "output_dir", "dry_run", "gradient_accumulation_steps", "generation_batch_size"}
FOLLOWING |= {"steps_per_generation", "loss_temperature", "verify_rollouts"}
FOLDERS = ("opsd", "eval", "quickstart", "real_model", "benchmarks", "examples")
EVALUATIONS = [("run_eval.sh", "Qwen/Qwen3-1.7B", True), ("run_eval_nonthink.sh", "Qwen/Qwen3-8B", False)]
READ_BY_SCRIPTS = {"MODEL", "DATASET", "OUTPUT_DIR", "CHECKPOINTS", "NUM_PROCESSES", "NUM_MACHINES", "PORT"}
READ_BY_SCRIPTS |= {
    "TEACHER",
    "ACCELERATE_CONFIG",
    "MACHINE_RANK",
    "SEED",
    "SEEDS",
    "EVALUATION",
    "CUDA_VISIBLE_DEVICES",
}


def dry_run(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """The finished script, of which nothing but the dry run is asked."""
    inherited = {name: value for name, value in os.environ.items() if name not in READ_BY_SCRIPTS}
    inherited = {name: value for name, value in inherited.items() if not name.startswith("SLURM_")}
    environment = {"DRY_RUN": "1", "HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run(
        ["bash", script, *arguments], env=inherited | environment, capture_output=True, text=True, timeout=300
    )


class Started(NamedTuple):
    """What a script would launch, as `accelerate` reads it; and what it has checked by the dry run instead."""

    words: list[str]
    launch: argparse.Namespace
    checked: list[str]


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> Callable[..., list[list[str]]]:
    """
    Make a dry run of a script with a `python` that prints its arguments. Returns the words of each printed line.

    The programs themselves are called in this process, since starting one takes ten seconds. The scripts run in a copy
    of the project, where no .venv brings its own `python`.
    """
    project = tmp_path_factory.mktemp("project")
    for folder in ("scripts", "eval"):
        shutil.copytree(ROOT / folder, project / folder)
    for file in (ROOT / "accelerate.yaml", *ROOT.glob("*_train.py")):
        shutil.copy(file, project)
    (project / "bin").mkdir()
    (project / "bin" / "python").write_text("#!/usr/bin/env bash\nprintf '%q ' \"$@\" && echo\n")
    (project / "bin" / "python").chmod(0o755)

    def printed(script: str, *arguments: str, **environment: str) -> list[list[str]]:
        environment["PATH"] = f"{project / 'bin'}:{os.environ['PATH']}"
        run = dry_run(project / script, *arguments, **environment)
        assert run.returncode == 0, run.stderr
        return [shlex.split(line) for line in run.stdout.splitlines()]

    return printed


@pytest.fixture
def start(printed) -> Callable[..., Started]:
    """A function that makes a dry run of a launch script."""

    def start(script: str, *arguments: str, **environment: str) -> Started:
        words, checked = printed(f"scripts/{script}", *arguments, **environment)
        launch = launch_command_parser().parse_args(words[words.index("launch") + 1 :])
        return Started(words, launch, checked)

    return start


@pytest.fixture
def resolve(tmp_path) -> Callable[..., dict[str, Any]]:
    """A function that has a program resolve a command line: all its settings, of script, trainer and model."""

    def resolve(program: str, *arguments: str) -> dict[str, Any]:
        # The project's own output folders may hold checkpoints, which a run from the beginning refuses
        import_module(program.removesuffix(".py")).main([*arguments, "--output_dir", str(tmp_path / "run")])
        configuration = json.loads((tmp_path / "run" / "dry_run.json").read_text())
        return configuration["script"] | configuration["training"] | configuration["model"]

    return resolve


def assert_equal(settings: dict[str, Any], expected: dict[str, Any]) -> None:
    assert {name: settings.get(name) for name in expected} == expected


def test_table_is_complete():
    published = {file.stem for file in SCRIPTS.glob("run_*.sh")} - {"run_smollm2"}  # tests/test_real_model.py
    assert published == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_has_the_published_settings(name, start, resolve):
    recipe = RECIPES[name]
    words, launch, checked = start(f"{name}.sh", "--seed", "7")
    assert words[:2] == ["accelerate", "launch"]
    assert launch.num_processes == recipe.num_processes
    assert launch.training_script == f"{recipe.program}.py" and (ROOT / launch.training_script).is_file()
    assert launch.config_file == "accelerate.yaml" and (ROOT / launch.config_file).is_file()
    assert checked == [launch.training_script, *launch.training_script_args, "--dry_run", str(recipe.num_processes)]
    assert f"outputs/{name.removeprefix('run_')}" in checked  # without OUTPUT_DIR

    settings = resolve(*checked)
    assert_equal(settings, recipe.settings)
    assert settings["gradient_accumulation_steps"] == recipe.accumulation
    assert settings["run_name"] == name.removeprefix("run_")
    assert settings["seed"] == 7  # given to the script: the last one wins


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_has_no_other_settings(name, start, resolve):
    """A setting that is neither in the table of sources nor among those of ours has the program's default."""
    recipe = RECIPES[name]
    program, *arguments = start(f"{name}.sh").checked
    default = resolve(program, "--model_name_or_path", "any/model", "--dry_run", str(recipe.num_processes))
    settings = resolve(program, *arguments)
    assert settings.keys() == default.keys()
    differing = {key for key, value in settings.items() if value != default[key]}
    assert differing - recipe.settings.keys() - OURS - FOLLOWING == set()


def test_documented_teacher_on_a_server(start, resolve):
    page = (ROOT / "docs" / "baselines.md").read_text().replace("\\\n", " ")
    (flags,) = re.findall(r"bash scripts/run_opd_1b\.sh (--teacher_model_server_url .*)", page)
    settings = resolve(*start("run_opd_1b.sh", *flags.split(), TEACHER="Qwen/Qwen3-32B").checked)
    expected = {"teacher_model_name_or_path": "Qwen/Qwen3-32B", "top_k_loss": 100, "top_k_loss_add_tail": True}
    assert_equal(settings, expected | {"teacher_model_server_url": "http://localhost:8001"})


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in WHOLE])
def test_variant_shows_its_difference(name):
    """Any other recipe is a short command that calls a whole one."""
    lines = (SCRIPTS / f"{name}.sh").read_text().splitlines()
    command = [line for line in lines if not line.startswith("#")]
    called = re.fullmatch(r'exec bash scripts/(\w+)\.sh .*"\$@"', command[-1])
    assert called is not None and called[1] in WHOLE
    assert len(command) < 15 and len(lines) < 32


@pytest.mark.parametrize("name", RECIPES)
def test_batch_does_not_depend_on_the_number_of_processes(name, start, resolve):
    expected = RECIPES[name].settings["effective_batch_size"]
    for num_processes in (1, 2, 8):
        settings = resolve(*start(f"{name}.sh", NUM_PROCESSES=str(num_processes)).checked)
        per_step = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] * num_processes
        assert per_step == settings["effective_batch_size"] == expected
    with pytest.raises(SystemExit, match=f"--effective_batch_size {expected}: .* 3 processes"):
        resolve(*start(f"{name}.sh", NUM_PROCESSES="3").checked)


@pytest.mark.parametrize("name", RECIPES)
def test_environment_means_the_same_in_all_recipes(name, start):
    names = {"MODEL": "some/model", "DATASET": "some/data", "OUTPUT_DIR": "there", "SEED": "7"}
    started = start(f"{name}.sh", CUDA_VISIBLE_DEVICES="4,5", **names)
    assert started.launch.num_processes == 2
    given = dict(zip(started.checked[1:], started.checked[2:], strict=False))
    flags = ("--model_name_or_path", "--dataset_name", "--output_dir", "--seed")
    assert [given[flag] for flag in flags] == list(names.values())
    assert start(f"{name}.sh", CUDA_VISIBLE_DEVICES="4,5", NUM_PROCESSES="1").launch.num_processes == 1


@pytest.mark.parametrize("name", [name for name, *_ in EVALUATIONS])
def test_environment_of_an_evaluation(name, printed, tmp_path):
    """Results stand beside the run; without other words its checkpoints are evaluated."""

    def evaluate(**environment):
        ((_, *arguments),) = printed(f"eval/{name}", **environment)
        return evaluate_math.build_parser().parse_args(arguments)

    checkpoints = [str(tmp_path / "run" / f"checkpoint-{step}") for step in (1, 2)]
    for folder in checkpoints:
        Path(folder).mkdir(parents=True)
    args = evaluate(
        OUTPUT_DIR=str(tmp_path / "run"), DATASET="one two", SEED="7", CUDA_VISIBLE_DEVICES="2,3", MODEL="some/model"
    )
    assert (args.checkpoint_dir, args.dataset, args.seed) == (checkpoints, ["one", "two"], 7)
    assert (args.base_model, args.data_parallel) == ("some/model", 2)
    for given in (f"{tmp_path}/run/checkpoint-*", f"{tmp_path}/run"):
        assert (
            evaluate(CHECKPOINTS=given).output_file.parent == args.output_file.parent == tmp_path / "run" / "results"
        )
    alone = evaluate()
    assert (alone.checkpoint_dir, alone.data_parallel) == ([], 1)
    assert alone.output_file.parent == Path("outputs/base/results")
    # A run without checkpoints is refused by the evaluator, not passed over
    assert evaluate(OUTPUT_DIR="nowhere").checkpoint_dir == ["nowhere/checkpoint-*"]


@pytest.mark.parametrize("name", RECIPES)
def test_unknown_flag_is_refused(name, start, resolve):
    with pytest.raises(SystemExit, match="--no_such_flag"):
        resolve(*start(f"{name}.sh", "--no_such_flag", "1").checked)


@pytest.mark.parametrize("nodes", [1, 2])
def test_recipe_on_several_nodes(nodes, start, resolve):
    words, launch, checked = start(
        *("train_multi_node.sh", "scripts/run_opsd_8b.sh", "--seed", "7"),
        OUTPUT_DIR="mine",
        SLURM_JOB_NUM_NODES=str(nodes),
    )
    assert words[:2] == ["accelerate", "launch"]
    assert (launch.num_machines, launch.num_processes, launch.rdzv_backend) == (nodes, 8 * nodes, "c10d")
    assert launch.machine_rank == 0
    assert launch.main_process_ip == "HEAD_NODE" and launch.main_process_port is not None
    assert (ROOT / launch.config_file).name == "multi_node.yaml" and (ROOT / launch.config_file).is_file()
    assert checked == [launch.training_script, *launch.training_script_args, "--dry_run", str(8 * nodes)]
    assert "mine" in checked
    settings = resolve(*checked)
    assert_equal(settings, RELEASE_8B)
    assert settings["gradient_accumulation_steps"] == 2 // nodes and settings["seed"] == 7


def test_program_on_several_nodes_goes_on_from_its_checkpoint(start, tmp_path):
    command = ("train_multi_node.sh", "opsd_train.py", "--max_steps", "3")
    assert start(*command, OUTPUT_DIR=str(tmp_path)).launch.training_script_args == [
        *("--output_dir", str(tmp_path), "--max_steps", "3")
    ]
    (tmp_path / "checkpoint-2").mkdir()  # torn: there is nothing to go on from, and it shall not be in the way
    assert "--overwrite_output_dir" in start(*command, OUTPUT_DIR=str(tmp_path)).words
    (tmp_path / "checkpoint-2" / "checkpoint_files.json").touch()
    assert start(*command, OUTPUT_DIR=str(tmp_path)).launch.training_script_args == [
        *("--output_dir", str(tmp_path), "--resume_from_checkpoint", "true", "--max_steps", "3")
    ]


STAND_IN = """#!/usr/bin/env python3
# A program that trains 4 steps with a checkpoint at each second one, or evaluates; it notes what it does.
import json, os, sys
from pathlib import Path
words = sys.argv[1:]
given = {name: value for name, value in zip(words, words[1:], strict=False)}  # the last one wins
notes = open("notes.txt", "a")
if "eval/aggregate.py" in words:
    print("TABLE", *[word for word in words if word.endswith("run_eval.json")])
elif "eval/evaluate_math.py" in words:
    assert "SEEDS" not in os.environ and given["--seed"] == "0", words
    file = Path(given["--output_file"])
    models = [*([] if "--skip_base" in words else ["base"]), *sorted(w for w in words if "/checkpoint-" in w)]
    done = file.read_text() if file.exists() else ""
    for model in models:
        if model not in done:
            print("sampled", model, file=notes)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"complete": True, "models": models}))
else:
    run = Path(given["--output_dir"])
    steps = [int(file.parent.name[11:]) for file in run.glob("checkpoint-*/checkpoint_files.json")]
    assert bool(steps) == (given.get("--resume_from_checkpoint") == "true"), words
    for step in range(max(steps, default=0) + 1, 5):
        if os.environ.get("KILL_AT") == f"{given['--seed']} {step}":
            notes.flush()
            os.kill(os.getpid(), 9)
        print("trained", given["--seed"], step, file=notes)
        folder = run / f"checkpoint-{step}"
        if step % 2 == 0:
            folder.mkdir(parents=True, exist_ok="--overwrite_output_dir" in words)
            (folder / "checkpoint_files.json").touch()
"""


@pytest.fixture
def seeds(tmp_path):
    """A function that runs a recipe with stand-ins for its programs; one that gives their notes; the project."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("python", "accelerate"):
        (folder / name).write_text(STAND_IN.replace("python3", sys.executable, 1).replace("/usr/bin/env ", ""))
        (folder / name).chmod(0o755)
    for name in ("scripts", "eval"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for file in (ROOT / "accelerate.yaml", *ROOT.glob("*_train.py")):
        shutil.copy(file, tmp_path)

    def run(recipe="run_opsd_1b", **environment):
        environment = {"SEEDS": "0 1 2", "DRY_RUN": "0", "MODEL": "m", "OUTPUT_DIR": "out", "NUM_PROCESSES": "1"} | (
            environment | {"PATH": f"{folder}:{os.environ['PATH']}"}
        )
        return dry_run(tmp_path / "scripts" / f"{recipe}.sh", **environment)

    def notes():
        return (tmp_path / "notes.txt").read_text().splitlines()

    return run, notes, tmp_path


CHECKPOINTS_OF_A_SEED = ("checkpoint-2", "checkpoint-4")


def test_seeds_are_trained_and_evaluated_once_each(seeds):
    run, notes, _ = seeds
    killed = run(KILL_AT="1 3")
    assert killed.returncode != 0 and "TABLE" not in killed.stdout
    assert notes()[-1] == "trained 1 2"
    again = run()
    assert again.returncode == 0, again.stderr
    expected = []
    for seed in range(3):
        expected += [f"trained {seed} {step}" for step in range(1, 5)]
        expected += ["sampled base"] * (seed == 0)
        expected += [f"sampled out/seed_{seed}/{checkpoint}" for checkpoint in CHECKPOINTS_OF_A_SEED]
    assert notes() == expected  # in this order, and nothing twice
    table = "TABLE " + " ".join(f"out/seed_{seed}/results/run_eval.json" for seed in range(3))
    assert again.stdout.splitlines()[-1] == table
    assert run().stdout.splitlines()[-1] == table and notes() == expected


def test_seeds_as_an_array_of_jobs(seeds):
    run, notes, project = seeds
    last = run("run_opsd_4b_nonthink", SLURM_ARRAY_TASK_ID="2")
    assert last.returncode == 0 and "no table yet: out/seed_0/results/run_eval_nonthink.json" in last.stdout
    assert {line.split()[1] for line in notes() if line.startswith("trained")} == {"2"}
    assert "sampled base" not in notes()
    assert (project / "out" / "seed_2" / "results" / "run_eval_nonthink.json").is_file()
    outside = run(SLURM_ARRAY_TASK_ID="3")
    assert outside.returncode != 0 and "no seed for this task of the array" in outside.stderr


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SEEDS": "0 a"}, "SEEDS 0 a: a is no whole number"),
        ({"SEEDS": "0 1 0"}, "SEEDS 0 1 0: a seed comes twice"),
        ({"EVALUATION": "eval/none.sh --val_n 1"}, "EVALUATION eval/none.sh: no such script"),
    ],
)
def test_seeds_that_cannot_be_are_refused(seeds, environment, message):
    run, _, project = seeds
    refused = run(**environment)
    assert refused.returncode == 1 and message in refused.stderr
    assert not (project / "notes.txt").exists()


def test_seeds_on_several_nodes(start):
    command = ("train_multi_node.sh", "scripts/run_opsd_8b.sh")
    started = start(*command, OUTPUT_DIR="mine", SEEDS="5 6", SLURM_ARRAY_TASK_ID="1")
    given = dict(zip(started.checked, started.checked[1:], strict=False))
    assert (given["--output_dir"], given["--seed"]) == ("mine/seed_6", "6")
    refused = dry_run(SCRIPTS / command[0], command[1], OUTPUT_DIR="mine", SEEDS="5 6")
    assert refused.returncode != 0 and "sbatch --array 0-1" in refused.stderr


@pytest.mark.parametrize(("name", "model", "thinking"), EVALUATIONS)
def test_evaluation_has_the_published_settings(name, model, thinking, printed):
    """What `test_evaluate_math.py` leaves open, which has the scripts evaluate a model of its own."""
    ((program, *arguments),) = printed(f"eval/{name}")
    assert (ROOT / program).is_file()
    settings = evaluate_math.build_parser().parse_args(arguments)
    assert (settings.base_model, settings.thinking, settings.val_n) == (model, thinking, 12)
    assert settings.dataset == ["aime24", "aime25", "hmmt25"] and settings.dry_run


def test_real_dry_run(tmp_path):
    """Of `run_opsd.sh`, which people start with, with their own model, data and launcher."""
    data = tmp_path / "train.jsonl"
    data.write_text('{"problem": "1+1?", "solution": "2"}\n' * 40)
    environment = {"MODEL": "some/model", "DATASET": str(data), "NUM_PROCESSES": "2", "OUTPUT_DIR": str(tmp_path)}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    run = dry_run(SCRIPTS / "run_opsd.sh", ACCELERATE_CONFIG="scripts/accelerate/zero3.yaml", **environment)
    assert run.returncode == 0, run.stderr
    command, *summary = run.stdout.splitlines()
    words = shlex.split(command)
    assert words[2:6] == ["--config_file", "scripts/accelerate/zero3.yaml", "--num_processes", "2"]
    headings = ["model", "data", "batch", "steps", "optimizer", "teacher", "objective", "rollouts", "output"]
    assert [line.split()[0] for line in summary] == [*headings, "settings"]
    assert f"{data}: 40 usable examples" in summary[1] and "8 left out of each" in summary[3]
    configuration = json.loads((tmp_path / "dry_run.json").read_text())
    assert configuration["model"]["model_name_or_path"] == "some/model"
    assert (configuration["script"]["dataset_name"], configuration["script"]["dry_run"]) == (str(data), 2)
    training = configuration["training"]
    assert (training["output_dir"], training["gradient_accumulation_steps"]) == (str(tmp_path), 4)

    missing = dry_run(SCRIPTS / "run_opsd.sh", ACCELERATE_CONFIG="missing.yaml")
    assert (missing.returncode, missing.stdout) == (1, "") and "missing.yaml: no such file" in missing.stderr


@pytest.mark.parametrize(
    "file", sorted([*SCRIPTS.glob("*.sh"), *(ROOT / "eval").glob("*.sh")]), ids=lambda file: file.name
)
def test_script_fits_every_machine(file):
    shebang, *lines = file.read_text().splitlines()
    assert shebang == "#!/usr/bin/env bash" and lines[0].startswith("# ")
    for line in lines:
        assert len(line) <= 119, line
        assert re.search(r"""(^|[\s='"])[/~](?!path/to/)\w""", line) is None, line
        assert "--gradient_accumulation_steps" not in line, line


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_lock_has_what_is_asked_for(device):
    def read(name: str) -> list[Requirement]:
        lines = (ROOT / "requirements" / name).read_text().splitlines()
        return [Requirement(line) for line in lines if not line.startswith(("#", "-r"))]

    locked = {requirement.name: next(iter(requirement.specifier)).version for requirement in read(f"{device}.txt")}
    asked = read("base.in") + read(f"{device}.in")
    assert [str(want) for want in asked if not want.specifier.contains(locked.get(want.name, "0"))] == []
    assert {want.name for want in asked} <= locked.keys()


def test_setup_files_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    setup, dockerfile = (SCRIPTS / "setup_env.sh").read_text(), (ROOT / "Dockerfile").read_text()

    # Python
    assert project["project"]["requires-python"] == ">=3.11,<3.13"
    assert "(3, 11) <= sys.version_info[:2] <= (3, 12)" in setup
    assert "python=3.12" in conda["dependencies"] and "PYTHON=python3.12" in dockerfile
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
    assert project["tool"]["ruff"]["target-version"] == "py311" and project["tool"]["mypy"]["python_version"] == "3.11"

    # Packages: one list, the locks, and the project itself
    assert project["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": "requirements/base.in"}
    assert conda["dependencies"][-1]["pip"] == ["-r requirements/gpu.txt", "-e ."]
    assert "--no-deps" in setup and "install --no-build-isolation --offline --editable ." in setup
    assert dockerfile.index("COPY pyproject.toml") < dockerfile.index("setup_env.sh gpu")
    flash_attention = re.findall(r"flash-attn==[\w.]+", setup + (ROOT / "environment.yml").read_text())
    assert len(flash_attention) == 2 and len(set(flash_attention)) == 1

    # Modules
    assert project["tool"]["setuptools"]["py-modules"] == sorted(file.stem for file in ROOT.glob("*.py"))
    assert not any(part.get("ignore_errors") for part in project["tool"]["mypy"]["overrides"])


def test_habits_agree():
    test = (SCRIPTS / "test.sh").read_text()
    (hooks,) = [part["hooks"] for part in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]]
    assert [hook["entry"].split(" --")[0] for hook in hooks] == ["ruff check", "ruff format", "mypy"]
    for hook in hooks:
        assert hook["language"] == "system" and f"\n{hook['entry'].split(' --')[0]}" in test
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"].values()
    assert job["steps"][-1] == {"run": "bash .ci/run"}
    assert "\nbash scripts/test.sh\n" in (ROOT / ".ci" / "run").read_text()

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert f"\n## [{project['version']}] - {citation['date-released']}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert citation["preferred-citation"]["url"].endswith("2601.18734")


def test_program_of_another_clone_is_refused(tmp_path):
    """An environment whose editable install is this clone must not run the modules of this clone for another one."""
    for folder in ("opsd", "eval"):
        (tmp_path / folder).mkdir()
        shutil.copy(ROOT / folder / "__init__.py", tmp_path / folder)
    program = tmp_path / "eval" / "program.py"
    program.write_text("import eval, opsd; print(eval.__file__, opsd.__file__)")

    def run(path: Path) -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": str(path)}
        return subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)

    refused = run(ROOT)
    assert refused.returncode == 1 and f"{program} would import the modules of {ROOT}" in refused.stderr
    assert f"PYTHONPATH={tmp_path}" in refused.stderr
    own = run(tmp_path)
    assert own.stdout.split() == [str(tmp_path / folder / "__init__.py") for folder in ("eval", "opsd")], own.stderr


def test_program_is_found_from_any_folder(tmp_path):
    """
    Programs change no paths: what they import comes from the editable install, or from PYTHONPATH.

    A verifier of the user's alone is found from the working directory.
    """
    programs = [*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))]
    assert [file for file in programs if "sys.path" in file.read_text()] == [ROOT / "opsd/grading/verifiers.py"]
    installed = [sys.executable, ROOT / "quickstart" / "base_model.py", "--help"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(installed, cwd=tmp_path, env=environment, check=True, capture_output=True)
