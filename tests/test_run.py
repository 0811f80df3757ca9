"""What the training programs share: batches, names, old spellings, the choice of the attention, dry runs."""

import json
import os

import pytest
from trl import GRPOConfig

from grpo_train import GRPOArguments
from opsd.run import run as run_module
from opsd.run.arguments import parse_arguments
from opsd.run.record import check_resumed_settings, read_record, write_record
from opsd.run.run import Run, choose_attention
from opsd_train import OPSDArguments
from opsd_trainer import OPSDConfig

CPU = ["--use_cpu", "--bf16", "false", "--model_name_or_path", "Qwen/Qwen3-1.7B"]


def parse(*arguments):
    return parse_arguments(OPSDArguments, OPSDConfig, [*CPU, *arguments])


def test_names_of_runs():
    def name(*arguments):
        batch = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
        run, training, model = parse(*batch, *arguments)
        Run("opsd", run, training, model).check(training.max_completion_length)
        return training.run_name, training.output_dir

    composed = "opsd_Qwen3-1.7B_lr5e-06_bs8_tok1024"
    assert name() == (composed, os.path.join("outputs", composed))
    assert name("--run_config", "trial") == ("trial", os.path.join("outputs", "trial"))
    assert name("--output_dir", "here") == (composed, "here")
    assert name("--output_dir", "here", "--run_config", "trial") == ("trial", os.path.join("here", "trial"))
    assert name("--run_name", "mine", "--run_config", "trial") == ("mine", os.path.join("outputs", "trial"))


def test_released_spellings():
    run, _, model = parse("--torch_dtype", "bfloat16", "--dataset_train_split", "all")
    assert (model.dtype, run.dataset_split) == ("bfloat16", "all")


@pytest.mark.parametrize(("num_processes", "per_device", "steps"), [(1, 4, 8), (2, 4, 4), (4, 4, 2), (8, 2, 2)])
def test_effective_batch_stays_whatever_the_number_of_processes(num_processes, per_device, steps):
    batch = ["--effective_batch_size", "32", "--per_device_train_batch_size", str(per_device)]
    _, training, _ = parse(*batch, "--dry_run", str(num_processes))
    assert training.gradient_accumulation_steps == steps
    assert parse(*batch, "--dry_run", str(num_processes), "--gradient_accumulation_steps", str(steps))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--per_device_train_batch_size 4 --dry_run 3",
            "--effective_batch_size 32: is not a multiple of 3 processes x --per_device_train_batch_size 4. One of "
            "these would do: --effective_batch_size 24 or 36; NUM_PROCESSES 1 or 2 or 4 or 8",
        ),
        (
            "--per_device_train_batch_size 64",
            "--effective_batch_size 32: is not a multiple of 1 processes x --per_device_train_batch_size 64. One of "
            "these would do: --effective_batch_size 64; --per_device_train_batch_size 1 or 2 or 4 or 8 or 16 or 32",
        ),
        (
            "--per_device_train_batch_size 4 --dry_run 8 --gradient_accumulation_steps 2",
            "--gradient_accumulation_steps 2: --effective_batch_size 32 asks for 1; leave one of the two out",
        ),
    ],
)
def test_batches_that_do_not_come_out_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse("--effective_batch_size", "32", *arguments.split())


def test_accumulation_reaches_what_depends_on_it():
    """Groups of 8 rollouts on 8 processes with one each: GRPO refuses settings in which a group is not whole."""
    batch = ["--effective_batch_size", "32", "--per_device_train_batch_size", "1", "--dry_run", "8"]
    _, training, _ = parse_arguments(GRPOArguments, GRPOConfig, [*CPU, *batch, "--num_generations", "8"])
    assert (training.gradient_accumulation_steps, training.generation_batch_size) == (4, 32)


def write_problems(path, size=3):
    rows = [{"problem": f"{i}+1", "solution": str(i + 1), "answer": i + 1} for i in range(size)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_configuration_and_revision_are_those_of_the_training_data(tmp_path):
    """And of data to evaluate on that comes from the same place, or from the Hub."""
    train, other = (write_problems(tmp_path / name) for name in ("train.jsonl", "other.jsonl"))
    columns, optional = {"problem_column": "problem"}, {"answer_column": "answer", "solution_column": None}

    def load(*arguments):
        return Run("opsd", *parse("--dataset_name", train, *arguments)).load_data(columns, optional)

    rows, evaluation = load("--eval_dataset_name", other, "--eval_strategy", "epoch")
    assert rows.to_list() == evaluation.to_list() == [{"problem": f"{i}+1", "answer": str(i + 1)} for i in range(3)]
    assert load()[1] is None
    with pytest.raises(ValueError, match="--dataset_config main: the local --dataset_name .*train.jsonl has none"):
        load("--dataset_config", "main")
    (tmp_path / "set").mkdir()
    write_problems(tmp_path / "set" / "train.jsonl", 2)
    (tmp_path / "set" / "README.md").write_text("---\nconfigs:\n- config_name: main\n  data_files: train.jsonl\n---\n")
    given = ["--dataset_name", str(tmp_path / "set"), "--dataset_config", "main"]
    assert [len(part) for part in load(*given, "--eval_dataset_name", other, "--eval_strategy", "epoch")] == [2, 3]


def test_model_is_not_spread_over_all_gpus_of_the_machine():
    assert Run("opsd", *parse()).model_options()["device_map"] is None


def test_attention_falls_back_and_says_so(caplog):
    config = OPSDConfig(use_cpu=True, bf16=False)
    with caplog.at_level("INFO"):
        assert choose_attention("flash_attention_2", "bfloat16", config) == "sdpa"
        assert choose_attention(None, "bfloat16", config) == "sdpa"
    assert caplog.text.count("attention: sdpa") == 2
    assert choose_attention("eager", "bfloat16", config) == "eager"
    assert choose_attention(None, "float32", config, caps_attention=True) == "eager"


def test_attention_where_flash_attention_is_installed(monkeypatch):
    monkeypatch.setattr(run_module, "is_flash_attn_2_available", lambda: True)
    config = OPSDConfig(use_cpu=True, bf16=False)
    assert choose_attention(None, "bfloat16", config) == "sdpa"
    config.use_cpu = False
    assert choose_attention(None, "float32", config) == "sdpa"
    assert choose_attention(None, "bfloat16", config) == "flash_attention_2"
    config.bf16 = True
    assert choose_attention(None, "float32", config) == "flash_attention_2"


def test_lora_flags_need_an_adapter_or_a_word():
    with pytest.raises(
        ValueError, match="--lora_r, --lora_alpha without --use_peft: the whole model would be trained"
    ):
        parse("--lora_r", "64", "--lora_alpha", "128")
    with pytest.raises(ValueError, match="--lora_r without --use_peft"):
        parse("--lora-r", "16")  # the default, too
    assert parse("--lora_r", "64", "--use_peft")[2].use_peft is True
    assert parse("--lora_r", "64", "--use_peft", "false")[2].use_peft is False
    assert parse()[2].use_peft is False


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["q_proj"], ["q_proj"]),
        (["self_attn.q_proj"], ["self_attn.q_proj"]),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (["all-linear"], "all-linear"),
        ([r".*\.[qv]_proj"], r".*\.[qv]_proj"),
    ],
)
def test_one_target_module_is_a_name(given, expected):
    assert parse("--use_peft", "--lora_target_modules", *given)[2].lora_target_modules == expected


def test_hub_that_is_switched_off(monkeypatch):
    monkeypatch.setattr(run_module, "is_offline_mode", lambda: True)
    with pytest.raises(ValueError, match="--push_to_hub: the Hub is switched off by HF_HUB_OFFLINE"):
        Run("opsd", *parse("--push_to_hub")).check(None)


def test_checkpoints_are_not_uploaded(monkeypatch):
    monkeypatch.setattr(run_module, "is_offline_mode", lambda: False)
    with pytest.raises(ValueError, match="--hub_strategy all_checkpoints: checkpoints are not uploaded"):
        Run("opsd", *parse("--push_to_hub", "--hub_strategy", "all_checkpoints")).check(None)
    Run("opsd", *parse("--push_to_hub")).check(None)


@pytest.mark.parametrize("text", ['{"training": {', "{}", "[]", '{"training": 1}'])
def test_a_record_that_is_none(tmp_path, text):
    (tmp_path / "run_config.json").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}/run_config.json: not the record of a run .*; move it away"):
        read_record(tmp_path)


def test_records_of_earlier_starts_stay(tmp_path):
    for start, has_checkpoint in enumerate((False, True, True)):
        (tmp_path / f"checkpoint-{start}").mkdir() if has_checkpoint else None
        write_record(tmp_path, {"start": start}, starts_anew=False)
    records = {file.name: json.loads(file.read_text())["start"] for file in tmp_path.glob("*.json")}
    assert records == {"run_config_1.json": 0, "run_config_2.json": 1, "run_config.json": 2}
    write_record(tmp_path, {"start": 3}, starts_anew=True)
    assert [file.name for file in tmp_path.glob("*.json")] == ["run_config.json"]


def test_a_new_learning_rate_that_its_scheduler_would_not_take(tmp_path):
    """ReduceLROnPlateau keeps the rate in the optimizer's state."""
    settings = {"script": {}, "model": {}, "data": {}, "training": {"lr_scheduler_type": "reduce_lr_on_plateau"}}
    settings["training"]["learning_rate"] = 1e-3
    write_record(tmp_path, settings, starts_anew=False)
    check_resumed_settings(tmp_path, settings)
    settings["training"] = settings["training"] | {"learning_rate": 1e-4}
    with pytest.raises(ValueError, match=r"learning_rate: 0.001 -> 0.0001"):
        check_resumed_settings(tmp_path, settings)
