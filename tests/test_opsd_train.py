"""The entry point: what it says of bad input before a model is loaded, and whole runs on the tiny model."""

import json
import os
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoTokenizer

import opsd_train

AIME = Path(__file__).parents[2] / "shared" / "data" / "eval" / "aime24"


@pytest.fixture
def train_file(tmp_path, problems):
    file = tmp_path / "train.jsonl"
    problems.to_json(file)
    return file


@pytest.fixture
def run(tiny_model_dir, train_file, tmp_path):
    """A function that runs the program on the tiny model; arguments replace and add to the ones below."""

    def run(*arguments):
        opsd_train.main(
            [
                *("--model_name_or_path", str(tiny_model_dir), "--dataset_name", str(train_file)),
                *("--config", str(Path(opsd_train.__file__).with_name("quickstart") / "opsd.yaml")),
                *("--output_dir", str(tmp_path / "out"), "--per_device_train_batch_size", "4", "--max_steps", "2"),
                *("--save_steps", "1", "--logging_steps", "1", "--disable_tqdm", "true", "--use_vllm", "false"),
                *arguments,
            ]
        )
        return tmp_path / "out"

    return run


@pytest.fixture
def no_model(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a model would have been loaded")

    monkeypatch.setattr(opsd_train.OPSDTrainer, "__init__", fail)


def write(file, *lines):
    file.write_text("".join(line + "\n" for line in lines))
    return str(file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--use_ema_teacher"], "--use_ema_teacher True: must be left out with --fixed_teacher"),
        (["--ema_decay", "1"], "--ema_decay 1.0: must lie in [0, 1)"),
        (["--beta", "1.5"], "--beta 1.5: must lie in [0, 1]"),
        (["--jsd_token_clip", "-1"], "--jsd_token_clip -1.0: must lie in"),
        (["--temperature", "0"], "--temperature 0.0: must lie in"),
        (["--lmbda", "0.5"], "--lmbda 0.5: must be 1"),
        (["--max_completion_length", "1024"], "--max_completion_length 1024: must be below"),
        (["--teacher_prompt", "{problem}"], "--teacher_prompt lacks the placeholder {solution}"),
        (["--dataset_name", "missing/train.jsonl"], "--dataset_name missing/train.jsonl: no such file"),
        (["--solution_column", "proof"], "--solution_column proof: the data set has no such column; it has problem"),
        (["--answer_column", "key"], "--answer_column key: the data set has no such column"),
        (["--resume_from_checkpoint", "true"], "there is no complete checkpoint in"),
        (["--resume_from_checkpoint", "nowhere"], "--resume_from_checkpoint nowhere: not a complete checkpoint"),
        (["--per_device_train_batch_size", "128"], "64 usable examples, fewer than one step takes (128)"),
        (["--eval_strategy", "steps"], "--eval_dataset_name and --eval_strategy need each other"),
        (["--use_vllm", "true", "--use_peft", "--use_dora"], "--use_dora True: vLLM does not serve such an adapter"),
        (["--use_vllm", "true", "--use_peft", "--load_in_4bit"], "leave out --load_in_4bit"),
        (["--presence_penalty", "1"], "--presence_penalty 1.0: must be 0 without --use_vllm"),
        (
            ["--adapter_name_or_path", "nowhere"],
            "--adapter_name_or_path nowhere: has no adapter_config.json and no adapter_model",
        ),
        (["--max_nonfinite_steps", "0"], "--max_nonfinite_steps 0: must be at least 1"),
        (["--loss_temperature", "0"], "--loss_temperature 0.0: must lie in"),
        (
            ["--num_loss_tokens_to_skip", "64"],
            "--num_loss_tokens_to_skip 64: must be below --max_completion_length 64",
        ),
        (["--model_name_or_path", "./nowhere"], "--model_name_or_path ./nowhere: no such folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_before_a_model_is_loaded(run, no_model, arguments, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        run(*arguments)


def test_missing_model_name(no_model):
    with pytest.raises(SystemExit, match="--model_name_or_path is missing"):
        opsd_train.main(["--use_cpu", "--bf16", "false"])


def test_bad_data_is_refused_before_a_model_is_loaded(run, no_model, tmp_path):
    blank = write(
        tmp_path / "blank.jsonl", '{"problem": "1+1", "solution": ""}', '{"problem": "2+2", "solution": " "}'
    )
    with pytest.raises(SystemExit, match="the column 'solution' is empty in all of them"):
        run("--dataset_name", blank)
    with pytest.raises(SystemExit, match="empty.jsonl: no rows in it"):
        run("--dataset_name", write(tmp_path / "empty.jsonl"))
    broken = write(tmp_path / "broken.jsonl", '{"problem": "1+1", "solution": "2"}', '{"problem": "2+2", ')
    with pytest.raises(SystemExit, match=r"broken.jsonl, line 2: not JSON"):
        run("--dataset_name", broken)


def test_tokenizer_without_chat_template(run, no_model, tiny_model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "config.json").write_text((tiny_model_dir / "config.json").read_text())
    with pytest.raises(SystemExit, match="has no chat template"):
        run("--model_name_or_path", str(tmp_path / "bare"))


def test_run_stops_resumes_and_starts_anew(run, tmp_path, problems):
    kept = tmp_path / "out" / "completions" / "completions_00099.jsonl"
    kept.parent.mkdir(parents=True)
    kept.touch()
    (tmp_path / "out" / "checkpoint-best").mkdir()  # somebody's own, not a step
    out = run("--answer_column", "answer")
    assert kept.exists()  # nothing is deleted unless asked for
    assert {"adapter_model.safetensors", "tokenizer.json", "run_config.json", "checkpoint-1", "checkpoint-2"} <= set(
        os.listdir(out)
    )
    configuration = json.loads((out / "run_config.json").read_text())
    assert configuration["training"]["beta"] == 0.5 and configuration["training"]["max_completion_length"] == 64
    assert configuration["model"]["lora_r"] == 16 and configuration["script"]["problem_column"] == "problem"
    assert {"torch", "transformers", "trl"} <= set(configuration["versions"])
    (first, *_) = [json.loads(line) for line in (out / "completions" / "completions_00001.jsonl").open()]
    assert first["answer"] in problems["answer"][:]

    with pytest.raises(SystemExit, match="holds checkpoint-2: continue with --resume_from_checkpoint true"):
        run()
    (out / "checkpoint-4").mkdir()  # torn: the newest complete one is taken
    run("--resume_from_checkpoint", "true", "--max_steps", "3", "--save_only_model", "true")
    state = json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3]
    with pytest.raises(SystemExit, match="not a complete checkpoint: it lacks .* which --save_only_model leaves out"):
        run("--resume_from_checkpoint", str(out / "checkpoint-3"))

    run("--overwrite_output_dir", "--max_steps", "1")
    assert not (out / "checkpoint-3").exists() and (out / "checkpoint-1").exists()
    assert [file.name for file in (out / "completions").iterdir()] == ["completions_00001.jsonl"]
    assert (out / "checkpoint-best").exists()


def test_training_goes_on_from_a_finished_adapter(run, tmp_path):
    first = run("--max_steps", "1")
    second = tmp_path / "second"
    run("--adapter_name_or_path", str(first), "--output_dir", str(second), "--max_steps", "1")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert before.keys() == after.keys() and not all(before[name].equal(after[name]) for name in before)
    # The teacher of the second run is the policy that the first one ended with, and not the base
    teacher = load_file(second / "checkpoint-1" / "teacher_weights_0.safetensors")
    assert len(teacher) == len(before)
    for name, weight in before.items():
        assert_close(teacher[".".join(name.split(".")[:-1]) + ".default.weight"], weight, rtol=0, atol=0)


def test_wandb_offline(run, monkeypatch, tmp_path):
    for variable, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", str(tmp_path)), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(variable, value)
    for variable in ("WANDB_PROJECT", "WANDB_ENTITY"):
        monkeypatch.setenv(variable, "replaced below")
    run("--report_to", "wandb", "--wandb_project", "project", "--wandb_entity", "entity", "--run_name", "named")
    import wandb

    assert wandb.run is not None and wandb.run.settings.mode == "offline"
    assert (wandb.run.project, wandb.run.entity, wandb.run.name) == ("project", "entity", "named")
    assert wandb.run.summary["train/divergence"] > 0.0 and wandb.run.summary["train/num_generated_tokens"] > 0
    wandb.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.skipif(not AIME.exists(), reason="the AIME 2024 problems are not beside the project")
def test_real_mathematics(run):
    out = run(
        *("--dataset_name", str(AIME), "--max_length", "4096", "--max_completion_length", "16", "--max_steps", "2"),
        *("--teacher_thinking", "true", "--beta", "0", "--jsd_token_clip", "0.05"),
    )
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    assert all(entry["divergence"] > 0.0 for entry in state["log_history"] if "divergence" in entry)
