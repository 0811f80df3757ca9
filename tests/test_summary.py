"""What a run says before it starts: its summary, the dry run and its file, prompts, and risky settings."""

import json
import logging
import re
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, TrainerControl, TrainerState
from trl import GRPOConfig, SFTConfig

import grpo_train
import opsd_train
import sft_train
from opsd.config import OPSDConfig
from opsd.run.arguments import parse_arguments
from opsd.run.summary import (
    REVERSED,
    ReversedClipCallback,
    count_steps,
    describe_prompts,
    describe_run,
    find_risks,
    render,
)
from opsd_train import OPSDArguments

CPU = {"use_cpu": True, "bf16": False}
OPSD_LINES = ["teacher", "objective", "rollouts", "output", "student sees"]
SAFE = {"fixed_teacher": True, "beta": 0.5}


def opsd(**settings):
    return OPSDConfig(**CPU | {"per_device_train_batch_size": 4} | settings)


def describe(num_rows=40, **settings):
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    arguments = ["--use_cpu", "--bf16", "false", "--model_name_or_path", "m", *flags]
    return dict(describe_run(*parse_arguments(OPSDArguments, OPSDConfig, arguments), num_rows=num_rows))


@pytest.fixture
def train_file(tmp_path, problems):
    problems.select(range(40)).to_json(tmp_path / "train.jsonl")
    return str(tmp_path / "train.jsonl")


# The summary


@pytest.mark.parametrize(
    ("settings", "teacher"),
    [
        ({}, "the current policy: it moves with the student, and nothing holds the two; it sees the solution"),
        ({"fixed_teacher": True}, "the initial policy (a copy of the weights at the start): it stays what it is"),
        ({"fixed_teacher": True, "use_peft": True}, "the initial policy (the model with its adapter off): it stays"),
        (
            {"fixed_teacher": True, "use_peft": True, "adapter_name_or_path": "a"},
            "the initial policy (a copy of the weights at the start): it stays",
        ),
        ({"use_ema_teacher": True, "ema_decay": 0.9}, "an average of the student's weights, decay 0.9 each 1 step:"),
        ({"teacher_context": "none"}, "it sees what the student sees (a control)"),
        ({"teacher_context": "donor"}, "it sees another problem's solution (a control)"),
        ({"teacher_prompt": "Be brief. {problem}"}, "it sees its own template without a solution"),
        ({"reason_first": True}, "it sees the solution and writes a rationale for it first"),
        ({"teacher_model_name_or_path": "big"}, "big, another model: it stays what it is; it sees the solution"),
        ({"teacher_model_name_or_path": "big", "teacher_context": "none"}, "; it sees what the student sees"),
        (
            {"teacher_context": "rollout", "num_generations": 2},
            "it sees another rollout that is right (without one: left out of the loss)",
        ),
    ],
)
def test_teacher_in_words(settings, teacher):
    assert teacher in describe(**settings)["teacher"]


@pytest.mark.parametrize(
    ("settings", "objective"),
    [
        ({}, "KL(teacher||student) over the full vocabulary; each summand at most 0.05 nats; temperature 1.1"),
        (
            {"beta": 0.5, "jsd_token_clip": 0, "loss_temperature": 2},
            "Jensen-Shannon divergence, beta 0.5 over the full vocabulary; temperature 2",
        ),
        (
            {"beta": 1, "jsd_clip_mode": "scale", "top_k_loss": 5, "top_k_loss_add_tail": True},
            "KL(student||teacher) over the 5 most probable entries of the teacher and one for all others; each "
            "token's sum at most 0.05 nats, its gradient scaled down; temperature 1.1",
        ),
        ({"use_tinker_loss": True, "sampled_token_clip": 3}, "policy gradient on the sampled tokens, advantage"),
        ({"correct_weight": 0}, "right rollouts weigh 0, wrong ones 1"),
        ({"policy_gradient_weight": 0.1, "num_generations": 2}, "plus 0.1 x GRPO"),
        ({"token_weights": "student_entropy"}, "; tokens weigh 1 - exp(-entropy of the student)"),
    ],
)
def test_objective_in_words(settings, objective):
    assert objective in describe(**settings)["objective"]


def test_batch_steps_rollouts_and_output():
    lines = describe(
        effective_batch_size=32, per_device_train_batch_size=4, dry_run=2, output_dir="here", max_steps=20
    )
    assert lines["batch"] == "32 sequences a step: 2 processes x 4 accumulation steps x 4"
    assert lines["steps"] == "20, 20 epochs: 40 examples, 1 step an epoch, 8 left out of each (each time others)"
    assert lines["rollouts"].startswith("transformers; up to 1,024 tokens, temperature 1.1, top-p 0.95, top-k 20")
    assert lines["output"] == "here; a checkpoint each 500 steps"
    assert "all its weights are trained" in lines["model"]
    drawn = describe(per_device_train_batch_size=16, curriculum="divergence")
    assert drawn["steps"] == "6, 3 epochs: 40 examples, 2 steps an epoch, drawn by divergence"
    held_out = describe(eval_dataset_name="held_out.csv", eval_strategy="steps", eval_steps=5)
    assert "evaluation" not in lines and held_out["evaluation"] == "held_out.csv, each 5 steps"
    sampled = describe(
        eval_dataset_name="held_out.csv", eval_strategy="epoch", eval_accuracy_samples=4, answer_column="answer"
    )
    assert sampled["evaluation"] == "held_out.csv, each epoch; 4 graded completions of each problem"
    unknown = describe(num_rows=None, max_steps=50)
    assert (unknown["steps"], unknown["data"].rpartition(": ")[2]) == ("50", "not loaded here")


@pytest.mark.parametrize(("size", "batch", "generations"), [(20, 8, 1), (24, 8, 1), (9, 4, 1), (9, 8, 4)])
def test_steps_are_those_of_the_trainer(make_trainer, problems, size, batch, generations):
    trainer = make_trainer(
        problems.select(range(size)), per_device_train_batch_size=batch // 2, gradient_accumulation_steps=2,
        num_generations=generations, max_steps=-1,
    )  # fmt: skip
    order = trainer._get_train_sampler(trainer.train_dataset)
    steps, left_out = count_steps(trainer.args, size)
    assert left_out == order.num_samples % order.batch_size
    assert steps == len(trainer.get_train_dataloader()) // 2


def test_steps_of_the_baselines():
    grpo = GRPOConfig(per_device_train_batch_size=16, num_generations=4, **CPU)
    assert count_steps(grpo, 8) == (2, 0)  # as in `test_grpo_rewards_right_answers_on_policy_and_resumes`
    assert count_steps(grpo, 11) == (2, 3)
    more = GRPOConfig(
        per_device_train_batch_size=4, steps_per_generation=4, num_iterations=2, num_generations=4, **CPU
    )
    assert count_steps(more, 8) == (16, 0)
    sft = SFTConfig(per_device_train_batch_size=4, gradient_accumulation_steps=2, **CPU)
    assert count_steps(sft, 17) == (3, 0)  # 5 batches
    with pytest.raises(ValueError, match=r"3 usable examples are fewer than one step takes \(4\)"):
        count_steps(grpo, 3)


def test_lines_stand_below_each_other():
    assert render([("model", "m"), ("objective", "KL")]) == "model      m\nobjective  KL"


def test_prompts_are_shortened(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    ids = tokenizer(["1+1", "12+34 " * 200], add_special_tokens=False).input_ids
    mean = round(sum(map(len, ids)) / 2)
    (line,) = describe_prompts(Dataset.from_dict({"ids": ids[::-1]}), {"ids": "model sees"}, tokenizer)
    assert line[0] == "model sees" and line[1].startswith(f"{mean} tokens on average, such as: 12+34 12+34")
    assert "[...]" in line[1] and len(line[1]) < 300
    turns = [{"role": "user", "content": "1+1?\nNow"}]
    (line,) = describe_prompts(Dataset.from_dict({"prompt": [turns]}), {"prompt": "model sees"}, tokenizer)
    assert "1+1?\\nNow" in line[1] and "\n" not in line[1] and "assistant" in line[1]


# The dry run


@pytest.mark.parametrize(
    ("program", "flags", "headings"),
    [
        (opsd_train, "--fixed_teacher", [*OPSD_LINES, "teacher sees"]),
        (opsd_train, "--teacher_context rollout --num_generations 2 --answer_column answer",
         OPSD_LINES),
        (sft_train, "--max_length 500", ["objective", "output", "model learns"]),
        (grpo_train, "--max_completion_length 40", ["objective", "rollouts", "output", "model sees"]),
    ],
)  # fmt: skip
def test_dry_run(program, flags, headings, tiny_model_dir, train_file, tmp_path, capsys):
    arguments = ["--model_name_or_path", str(tiny_model_dir), "--dataset_name", train_file, "--dry_run", "2"]
    arguments += ["--output_dir", str(tmp_path / "out"), *flags.split()]
    program.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    expected = ["model", "data", "batch", "steps", "optimizer", *headings, "settings"]
    assert [line.split("  ")[0] for line in lines] == expected
    assert f"{train_file}: 40 usable examples" in lines[1]
    assert [line for line in lines if "sees" in line[:13] or "learns" in line[:13]][0].count("Problem: ") == 1
    file = tmp_path / "out" / "dry_run.json"
    assert lines[-1].endswith(f"all in {file}")
    settings = json.loads(file.read_text())
    assert settings["model"]["model_name_or_path"] == str(tiny_model_dir) and settings["script"]["dry_run"] == 2

    program.main([*arguments, "--dry_run_file", str(tmp_path / "elsewhere" / "all.json")])
    elsewhere = json.loads((tmp_path / "elsewhere" / "all.json").read_text())
    assert elsewhere["training"].keys() == settings["training"].keys()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--problem_column question", "--problem_column question: the data set has no such column"),
        ("--dataset_name ./nowhere.jsonl", "--dataset_name ./nowhere.jsonl: no such file or folder"),
        ("--per_device_train_batch_size 32", r"40 usable examples are fewer than one step takes \(64\)"),
    ],
)
def test_dry_run_checks_the_data(flags, message, tiny_model_dir, train_file, tmp_path):
    arguments = ["--model_name_or_path", str(tiny_model_dir), "--dataset_name", train_file, "--dry_run", "2"]
    with pytest.raises(SystemExit, match=message):
        opsd_train.main([*arguments, "--output_dir", str(tmp_path / "out"), *flags.split()])


# Risks


@pytest.mark.parametrize(
    ("settings", "risk"),
    [
        ({"beta": 0.5}, "no --fixed_teacher: .* 2.5 ± 2.5 % right, against 97.3 ± 0.6 %.*Add --fixed_teacher"),
        ({"fixed_teacher": True}, r"--beta 0 with --jsd_token_clip 0.05 \(pointwise\): .*35.5 ± 1.8 % .*scale"),
        ({"fixed_teacher": True, "jsd_clip_mode": "token"}, r"\(token\): .*33.1 ± 1.1 %"),
        (
            SAFE | {"teacher_context": "answer"},
            "--teacher_context answer: .*6.5 ± 4.0 % right.*Watch rewards/accuracy",
        ),
        (SAFE | {"student_thinking": True}, "--student_thinking with --teacher_thinking: .*project page"),
    ],
)
def test_risky_settings_are_named_with_the_experiment(settings, risk):
    (found,) = find_risks(opsd(**settings))
    assert re.search(risk, found), found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta": 0.0, "jsd_clip_mode": "scale"},
        {"beta": 0.0, "jsd_token_clip": 0.0},
        {"fixed_teacher": False, "use_ema_teacher": True},
        {"fixed_teacher": False, "teacher_model_name_or_path": "big"},
        {"student_thinking": True, "teacher_thinking": False},
    ],
)
def test_other_settings_are_no_risk(settings):
    assert find_risks(opsd(**SAFE | settings)) == []


def test_clip_that_reverses_the_lesson_is_named_once(caplog):
    callback, state, control = ReversedClipCallback(), TrainerState(global_step=20), TrainerControl()
    with caplog.at_level(logging.WARNING):
        for ratio in (0.02, None, 0.26, 0.3):
            callback.on_log(None, state, control, logs={} if ratio is None else {REVERSED: ratio})
    (warning,) = [record.getMessage() for record in caplog.records]
    assert f"step 20, {REVERSED}: at 26.0 % of the tokens" in warning and "--jsd_clip_mode scale" in warning


def test_risks_name_figures_of_the_ablations():
    """The figures in the messages are those of the table."""
    table = Path(__file__).resolve().parents[1].joinpath("quickstart", "ablations.md").read_text()
    for flags, figure in (
        ("`--fixed_teacher false`", "2.5 ± 2.5"),
        ("OPSD |", "97.3 ± 0.6"),
        ("`--beta 0`", "94.9 ± 0.2"),
        ("`--beta 0 --jsd_token_clip 0.05`", "35.5 ± 1.8"),
        ("`--beta 0 --jsd_token_clip 0.05 --jsd_clip_mode token`", "33.1 ± 1.1"),
        ("`--beta 0 --jsd_token_clip 0.05 --jsd_clip_mode scale`", "98.3 ± 0.4"),
    ):
        assert any(flags in row and f"| {figure} |" in row for row in table.splitlines()), flags
        every = [opsd(beta=0.5), opsd(fixed_teacher=True), opsd(fixed_teacher=True, jsd_clip_mode="token")]
        assert figure in " ".join(risk for settings in every for risk in find_risks(settings))
