"""What a run shows and leaves behind: lines of the terminal, metrics, curves, records of settings, the model card."""

import json
import logging
import math
import re
import shlex
import warnings
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers import ROOT
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.evaluate_math import build_parser
from opsd.run import terminal
from opsd.run.arguments import parse_arguments
from opsd.run.card import render_card
from opsd.run.quiet import MESSAGES
from opsd.run.record import compare, find_finished_step, mark_finished, write_record
from opsd.run.report import (
    ReportCallback,
    append_lines,
    describe_learning,
    drop_later_steps,
    evaluation_command,
    plot_curves,
)
from opsd.run.run import Run
from opsd.run.terminal import TerminalCallback, duration, format_log
from opsd_train import OPSDArguments
from opsd_trainer import OPSDConfig
from sft_train import SFTArguments, SFTConfig

LOGS = [
    {"loss": 0.5, "divergence": 0.25, "rewards/accuracy/mean": 0.4, "completions/mean_length": 40.0, "step": 10},
    {"eval_loss": 0.4, "eval_divergence": 0.2, "step": 10},
    {"loss": 0.0123, "divergence": 0.011, "rewards/accuracy/mean": 0.634, "completions/mean_length": 41.4, "step": 20},
    {"train_runtime": 9.0, "train_loss": 0.2, "step": 20},
]


# Terminal


@pytest.mark.parametrize(
    ("logs", "further", "line"),
    [
        (
            LOGS[2],
            (812.3, 80.0),
            "step  20/100  loss 0.0123  divergence 0.011  right 63 %  length 41  tok/s 812  left 1m20s",
        ),
        (LOGS[1], (), "step  20/100  evaluation  loss 0.4  divergence 0.2"),
        (
            LOGS[1]
            | {"eval_accuracy": 0.635, "eval_accuracy_standard_error": 0.021, "eval_rewards/accuracy/mean": 0.6},
            (),
            "step  20/100  evaluation  loss 0.4  divergence 0.2  held-out 63.5 ± 2.1 %",
        ),
        (LOGS[3], (), None),
        ({"loss": 2.0, "mean_token_accuracy": 0.5}, (None, 0.0), "step  20/100  loss 2  left 0s"),
        ({"loss": 0.0, "rewards/math/mean": 0.25}, (), "step  20/100  loss 0  right 25 %"),
    ],
    ids=["opsd", "evaluation", "held out", "end", "sft", "grpo"],
)
def test_line_of_a_log(logs, further, line):
    assert format_log(20, 100, logs, *further) == line


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (80, "1m20s"), (3599.9, "1h00m"), (7500, "2h05m")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_tokens_a_second_and_time_left_of_a_resumed_run(monkeypatch, caplog):
    """From step 10 and 1,000 tokens on: 400 tokens and 2 steps in 4 s, 2 s of evaluation, then 200 and 1 in 4 s."""
    clock = iter((100.0, 104.0, 106.0, 110.0))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    state = SimpleNamespace(
        global_step=10, max_steps=20, is_world_process_zero=True, log_history=[{"num_generated_tokens": 1000}]
    )
    callback = TerminalCallback()
    caplog.set_level(logging.INFO)
    callback.on_train_begin(None, state, None)
    for state.global_step, logs in (
        (12, {"loss": 1.0, "num_generated_tokens": 1400}),
        (12, {"eval_loss": 2.0, "eval_runtime": 2.0}),
        (13, {"loss": 1.0, "num_generated_tokens": 1600}),
    ):
        callback.on_log(None, state, None, logs)
    assert caplog.messages == [
        "step 12/20  loss 1  tok/s 100  left 16s",
        "step 12/20  evaluation  loss 2",
        "step 13/20  loss 1  tok/s 50  left 23s",
    ]


@pytest.mark.parametrize(
    ("name", "level", "line"),
    [
        ("opsd.run.run", logging.INFO, "said"),
        ("opsd_trainer", logging.WARNING, "WARNING: said"),
        ("transformers.trainer", logging.WARNING, "transformers.trainer: said"),
    ],
)
def test_warnings_of_this_project_stand_out(name, level, line):
    record = logging.LogRecord(name, level, "file.py", 1, "said", (), None)
    assert terminal._Formatter(in_color=False).format(record) == line
    is_marked = terminal._Formatter(in_color=True).format(record) != line
    assert is_marked == line.startswith("WARNING")


def test_an_interrupt_outside_of_the_training_is_one_line(capsys):
    terminal._say_interrupted(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == "interrupted outside of the training\n"
    terminal._say_interrupted(ValueError, ValueError("wrong"), None)
    assert capsys.readouterr().err.endswith("ValueError: wrong\n")


def test_only_the_named_messages_of_libraries_are_kept_out():
    for name, message in MESSAGES.items():
        for text, is_shown in ((f"{message}, and more", False), (f"another {message}", True)):
            record = logging.LogRecord(name, logging.WARNING, "", 0, text, (), None)
            assert bool(logging.getLogger(name).filter(record)) == is_shown
    with warnings.catch_warnings(record=True) as shown:
        for text in ("`torch.distributed.reduce_op` is deprecated, please", "`torch.other` is deprecated"):
            warnings.warn(text, FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in shown][-1:] == ["`torch.other` is deprecated"]


# Metrics


def test_metrics_of_a_resumed_run_are_neither_doubled_nor_lost(tmp_path):
    """Logs at steps 1 to 3, a checkpoint at 2; the logs before it come back with the state."""
    callback, file = ReportCallback(), tmp_path / "metrics.jsonl"
    args = SimpleNamespace(output_dir=str(tmp_path))

    def train(log_history, steps):
        state = SimpleNamespace(is_world_process_zero=True, log_history=log_history)
        callback.on_train_begin(args, state, None)
        for step in steps:
            log_history.append({"loss": 1.0 / step, "grad_norm": math.nan, "step": step})
            callback.on_log(args, state, None)

    train([], (1, 2, 3))
    first = file.read_text()
    assert first.splitlines()[1] == '{"step": 2, "loss": 0.5, "grad_norm": null}'
    train([{"loss": 1.0 / step, "grad_norm": math.nan, "step": step} for step in (1, 2)], (3,))
    assert file.read_text() == first


def test_lines_of_later_steps_are_dropped(tmp_path):
    file = tmp_path / "there" / "completions.jsonl"
    drop_later_steps(file, 2)
    assert not file.exists()
    append_lines(file, [{"step": step, "text": "…"} for step in (1, 2, 2, 3)])
    whole = file.read_text()
    with file.open("a") as torn:
        torn.write('{"step": 4, "te')
    drop_later_steps(file, 3)
    assert file.read_text() == whole
    drop_later_steps(file, 2)
    assert file.read_text().splitlines() == whole.splitlines()[:3]


def test_curves_and_what_was_learned(tmp_path):
    assert describe_learning(LOGS) == ["loss 0.5 -> 0.0123", "divergence 0.25 -> 0.011", "share right 40 % -> 63 %"]
    plot_curves(LOGS, tmp_path / "training.png")
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    held_out = [{"step": step, "eval_accuracy": step / 20, "eval_accuracy_standard_error": 0.1} for step in (0, 10)]
    assert describe_learning(LOGS + held_out)[3:] == ["held-out accuracy 0 % -> 50 %"]
    plot_curves(LOGS + held_out, tmp_path / "held_out.png")
    width = [int.from_bytes((tmp_path / name).read_bytes()[16:20]) for name in ("training.png", "held_out.png")]
    assert width[1] == width[0] * 5 / 4  # a panel more
    assert describe_learning(LOGS[:1]) == ["loss 0.5", "divergence 0.25", "share right 40 %"]
    assert describe_learning(LOGS[-1:]) == []
    plot_curves(LOGS[-1:], tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()


# Settings


@pytest.fixture
def settings_of(tmp_path):
    """A function that returns the record of a run with the given flags."""

    def settings_of(*arguments, method="opsd"):
        classes = {"opsd": (OPSDArguments, OPSDConfig), "sft": (SFTArguments, SFTConfig)}[method]
        common = ["--use_cpu", "--bf16", "false", "--output_dir", str(tmp_path / "run")]
        run = Run(method, *parse_arguments(*classes, [*common, *arguments]))
        return json.loads(json.dumps(run.settings(), default=str))

    return settings_of


def test_records_say_what_changed(tmp_path, settings_of):
    run, first = tmp_path / "run", settings_of("--model_name_or_path", "some/model", "--max_steps", "4")
    write_record(run, first, starts_anew=False)
    (run / "checkpoint-2").mkdir()
    second = settings_of("--model_name_or_path", "some/model", "--max_steps", "9", "--learning_rate", "1e-3")
    write_record(run, second, starts_anew=False, step=2)
    records = [json.loads((run / name).read_text()) for name in ("run_config_1.json", "run_config.json")]
    assert [record["first_step"] for record in records] == [1, 3]
    assert records[0]["changes"] == {}
    changes = records[1]["changes"]["training"]
    assert changes["max_steps"] == {"before": 4, "now": 9} and changes["learning_rate"]["now"] == 1e-3
    assert changes == compare(first["training"], second["training"]) and records[1]["changes"].keys() == {"training"}


def test_finished_runs_are_known(tmp_path, settings_of):
    assert find_finished_step(tmp_path, 4, 3.0) is None
    for steps, longer, same in ((["--max_steps", "4"], (5, 3.0), (4, 3.0)), ([], (-1, 4.0), (-1, 3.0))):
        write_record(tmp_path, settings_of("--model_name_or_path", "some/model", *steps), starts_anew=True)
        assert find_finished_step(tmp_path, *same) is None
        mark_finished(tmp_path, 4)
        assert find_finished_step(tmp_path, *same) == 4
        assert find_finished_step(tmp_path, *longer) is None


# How to evaluate, and the model card


def parse_evaluation(command):
    program, *words = shlex.split(command)[1:]
    assert (ROOT / "eval" / "evaluate_math.py").samefile(program)
    return build_parser().parse_args(words)


def test_evaluation_command(tmp_path, settings_of, monkeypatch):
    monkeypatch.chdir(ROOT)
    train, test = (str(tmp_path / f"{name} data.jsonl") for name in ("train", "test"))
    for file in (train, test):
        Dataset.from_list([{"question": "1+1", "solution": "2", "gold": "2"}]).to_json(file)
    data = ["--dataset_name", train, "--problem_column", "question", "--answer_column", "gold"]
    args = parse_evaluation(evaluation_command(settings_of("--model_name_or_path", "a/b", "--use_peft", *data)))
    assert (args.base_model, args.checkpoint_dir, args.dataset) == ("a/b", [str(tmp_path / "run")], [train])
    assert (args.problem_column, args.answer_column, args.thinking) == ("question", "gold", False)
    assert (args.max_new_tokens, args.num_samples) == (1024, 200)
    assert args.output_file == tmp_path / "run" / "results" / "evaluation.json"

    held_out = ["--eval_dataset_name", test, "--eval_strategy", "epoch", "--student_thinking", "true"]
    args = parse_evaluation(evaluation_command(settings_of("--model_name_or_path", "a/b", *data, *held_out)))
    assert (args.base_model, args.checkpoint_dir) == (str(tmp_path / "run"), [])  # the whole model was trained
    assert (args.dataset, args.num_samples, args.thinking) == ([test], None, True)

    args = parse_evaluation(evaluation_command(settings_of("--model_name_or_path", "a/b", method="sft")))
    assert args.dataset == ["aime24", "aime25", "hmmt25"]


def code_of(card, language):
    return re.findall(rf"```{language}\n(.*?)\n```", card, re.S)


def test_model_card_of_an_adapter(tmp_path, settings_of, tiny_model_dir):
    """Its code loads and merges the adapter."""
    run, weights = tmp_path / "run", ["--use_peft", "--lora_r", "16", "--lora_target_modules", "q_proj"]
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    lora = LoraConfig(r=16, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(model, lora)
    adapted.save_pretrained(run)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(run)
    settings = settings_of("--model_name_or_path", str(tiny_model_dir), *weights, "--beta", "0.5")
    card = render_card("opsd", settings, LOGS, step=20, num_examples=1234)
    (run / "README.md").write_text(card)

    metadata = ModelCard.load(run / "README.md").data
    assert metadata.base_model is None  # which would have to be a Hub id
    assert (metadata.datasets, metadata.library_name) == ([settings["script"]["dataset_name"]], "peft")
    assert f"- Base model: `{tiny_model_dir}`\n" in card and "arXiv 2601.18734" in card
    assert "split train, 1,234 examples" in card and "| `beta` | 0.5 |" in card and "adapter of rank 16" in card
    assert "First log against the last one: loss 0.5 -> 0.0123, divergence 0.25 -> 0.011, share right 40 %" in card

    load, merge = code_of(card, "python")
    names = {}
    exec(load + "\n" + merge, names)
    merged, expected = load_file(run / "merged" / "model.safetensors"), adapted.merge_and_unload().state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in merged.items())
    serve = code_of(card, "bash")[1]
    assert serve.startswith(f"vllm serve {tiny_model_dir} --enable-lora --max-lora-rank 16 --lora-modules run={run}\n")
    assert json.loads(shlex.split(serve)[-1])["model"] == "run"
    assert [len(code.splitlines()) for code in (merge, serve)] == [3, 3]


def test_model_card_of_a_whole_model(settings_of, tmp_path):
    card = render_card("sft", settings_of("--model_name_or_path", "some/model", method="sft"), [], 5, 10)
    assert "base_model: some/model" in card and "[some/model](https://huggingface.co/some/model)" in card
    assert "- What it is: the whole model" in card and "Nothing was logged." in card and "None" not in card
    assert "library_name: transformers" in card and f"vllm serve {tmp_path / 'run'}\n" in card
