"""The quickstart as a newcomer runs it, and the properties of its task that its claims rest on."""

import json
import random
import re
import subprocess
import sys

import pytest
from helpers import ROOT, saved_rollouts
from transformers import AutoTokenizer
from trl import GRPOConfig

from data_collator import REASONING_PROMPT, STUDENT_PROMPT, TEACHER_PROMPT, TRANSITION_PROMPT, fill_template
from grpo_train import GRPOArguments
from opsd.grading import extract_answer
from opsd.run.arguments import parse_arguments
from opsd_train import OPSDArguments
from opsd_trainer import OPSDConfig
from quickstart import addition
from quickstart import run as quickstart
from quickstart.base_model import BaseModelConfig, ablation_base, draw_batches, fingerprint, train_tokenizer
from quickstart.methods import ABLATIONS, OPSD, choose_methods
from quickstart.report import LABELS, ablation_table, markdown_table, summary_table


@pytest.mark.multiprocess
@pytest.mark.vllm
def test_quickstart_teaches_the_model(tiny_model_dir, tmp_path):
    """
    The whole program, shorter than by default: the builder of the model, real training, real vLLM, held-out problems.

    With 100 steps, over three seeds and two kinds of processors, it gave 0.50 to 0.51 for the base, 0.995 for the
    teacher and 0.98 to 1.00 for OPSD; with 60 steps 0.97.
    """
    subprocess.run(
        [sys.executable, ROOT / "quickstart" / "run.py", "--output_dir", tmp_path, "--steps", "40"],
        check=True,
        timeout=1200,
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert 0.35 <= report["base"]["avg_at_4"] <= 0.65
    assert report["teacher"]["avg_at_4"] >= 0.95
    assert report["opsd"]["avg_at_4"] >= max(0.85, report["base"]["avg_at_4"] + 0.30)
    assert [point["step"] for point in report["curve"]] == [0, 8, 16, 24, 32, 40]
    assert report["curve"][0]["avg_at_4"] == report["base"]["avg_at_4"]
    assert report["curve"][-1]["avg_at_4"] == report["opsd"]["avg_at_4"]
    assert report["opsd"]["steps"] == 40
    rollouts = saved_rollouts(tmp_path / "opsd")
    assert len(rollouts) == 1280
    assert report["opsd"]["generated_tokens"] == sum(rollout["num_tokens"] for rollout in rollouts)
    for plot in ("accuracy.png", "tokens.png"):
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")
    test_problems = {row["problem"] for row in addition.held_out_problems()}
    assert not any(problem + "\n" in rollout["prompt"] for rollout in rollouts for problem in test_problems)


@pytest.mark.multiprocess
@pytest.mark.vllm
@pytest.mark.slow
def test_baselines_and_controls(tmp_path):
    """Two steps each, to see that all of it runs and is reported; `docs/first_run.md` has what a hundred give."""
    command = [sys.executable, ROOT / "quickstart" / "run.py", "--output_dir", tmp_path, "--steps", "2"]
    subprocess.run([*command, "--baselines", "--controls", "--use_vllm", "false"], check=True, timeout=1800)
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(LABELS) - {"group_self_distillation"} <= set(report)
    assert report["grpo"]["steps"] == 2 and report["grpo_3x"]["steps"] == 6
    assert report["grpo_3x"]["generated_tokens"] > report["grpo"]["generated_tokens"] > 0
    assert report["sft"]["generated_tokens"] == 0
    assert report["no_privilege"]["avg_at_4"] == report["base"]["avg_at_4"]
    assert [point["step"] for point in report["curves"]["grpo"]] == [0, 1, 2, 3, 4, 5, 6]
    assert (tmp_path / "tokens.png").read_bytes().startswith(b"\x89PNG")


def make_report(seed, base, opsd, tokens):
    result = {"standard_error": 0.02, "greedy": 0.5, "generated_tokens": tokens, "steps": 2, "train_seconds": 30.4}
    curve = [{"step": i, "avg_at_4": a, "generated_tokens": i * tokens // 2} for i, a in enumerate((base, opsd, opsd))]
    report = {
        "seed": seed,
        "base": {"avg_at_4": base, "standard_error": 0.02, "greedy": 0.5},
        "curves": {"opsd": curve},
    }
    return report | {"opsd": result | {"avg_at_4": opsd}, "curve": curve}


def test_tables():
    reports = [make_report(0, 0.5, 0.9, 1000), make_report(1, 0.4, 1.0, 3000)]
    assert markdown_table(reports[0]).splitlines()[2:] == [
        "| base | 50.0 | 2.0 | 50.0 |  |  |",
        "| OPSD | 90.0 | 2.0 | 50.0 | 1,000 | 30 |",
    ]
    head, _, *rows = summary_table(reports).splitlines()
    assert head.startswith("| | seed 0 | seed 1 | mean Avg@4")
    assert rows == ["| base | 50.0 | 40.0 | 45.0 ± 5.0 |  |  |", "| OPSD | 90.0 | 100.0 | 95.0 ± 5.0 | 2,000 | 30 |"]


def test_ablation_table():
    base = {"avg_at_4": 0.5}
    opsd = {"avg_at_4": 1.0, "generated_tokens": 1000, "train_seconds": 30.4, "clip_ratio/mass": 0.0}
    clipped = opsd | {"avg_at_4": 0.75, "clip_ratio/mass": 0.5, "clip_ratio/wrong_way_tokens": 0.125}
    report = {"seed": 0, "base": base, "teacher": base, "opsd": opsd, "beta_0_pointwise_clip": clipped}
    other = report | {"seed": 1, "beta_0_pointwise_clip": clipped | {"avg_at_4": 0.25}}
    flags = {"Teachers": {"opsd": ""}, "Objectives": {"beta_0_pointwise_clip": "--beta 0 --jsd_token_clip 0.05"}}
    head, _, *rows = ablation_table([report, other], flags).splitlines()
    assert head.startswith("| | seed 0 | seed 1 | mean Avg@4")
    assert rows[0] == "| base | 50.0 | 50.0 | 50.0 ± 0.0 |  |  |  |  |"
    assert rows[2:] == [
        "| **Teachers** | | | | | | | |",
        "| `opsd`: OPSD | 100.0 | 100.0 | 100.0 ± 0.0 | 1,000 | 30 |  |  |",
        "| **Objectives** | | | | | | | |",
        "| `beta_0_pointwise_clip`: `--beta 0 --jsd_token_clip 0.05` "
        "| 75.0 | 25.0 | 50.0 ± 25.0 | 1,000 | 30 | 12.5 | 50.0 |",
    ]
    assert ablation_table([report], flags).splitlines()[4] == "| **Teachers** | | | | | | |"
    assert "| 75.0 | 75.0 | 1,000 | 30 | 12.5 | 50.0 |" in ablation_table([report], flags)


def test_ablations_are_chosen_by_name():
    assert choose_methods(ABLATIONS, None) == ABLATIONS
    assert next(iter(next(iter(ABLATIONS.values())))) == "opsd"
    chosen = choose_methods(ABLATIONS, ["grpo", "beta_0", "ema"])
    assert {heading: list(methods) for heading, methods in chosen.items()} == {
        "Teachers": ["ema"],
        "Objectives": ["beta_0"],
        "Beyond the paper": ["grpo"],
    }
    with pytest.raises(ValueError, match="--only nothing nowhere: there is no such method; there are answer, beta_0,"):
        choose_methods(ABLATIONS, ["ema", "nothing", "nowhere"])


def test_settings_of_the_ablations_are_valid(tmp_path):
    methods = {name: method for chosen in ABLATIONS.values() for name, method in chosen.items()}
    assert len(methods) == sum(map(len, ABLATIONS.values()))
    for name, method in methods.items():
        command = [
            "--config",
            str(ROOT / method.settings),
            "--model_name_or_path",
            "m",
            "--dataset_name",
            "d",
            *method.flags,
        ]
        command += ["--output_dir", str(tmp_path / name), "--answer_column", "answer"]
        classes = (GRPOArguments, GRPOConfig) if method.program == "grpo_train.py" else (OPSDArguments, OPSDConfig)
        _, settings, _ = parse_arguments(*classes, command)
        assert settings.per_device_train_batch_size == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ablations", "--only", "nothing"], "--only nothing: there is no such method"),
        (["--device", "gpu"], "--device gpu: this Python's torch"),
        (["--only", "ema"], "--only: chooses among the --ablations"),
        (["--ablations", "--controls"], "leave them out"),
    ],
)
def test_bad_choices_are_refused(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    with pytest.raises(SystemExit):
        quickstart.main()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("has_gpu", [False, True])
def test_on_a_gpu_it_trains_in_16_bits(monkeypatch, tmp_path, has_gpu):
    """Float32 adapters do not exist in vLLM's kernels for GPUs; the flags replace those of the configuration."""
    commands = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    monkeypatch.setattr(quickstart.subprocess, "run", lambda command, **_: commands.append(command))
    quickstart.train(OPSD["opsd"], tmp_path, tmp_path, tmp_path / "run", steps=5, seed=0, use_vllm=True)
    monkeypatch.undo()
    _, program, *flags = commands[0]
    *_, settings, model = parse_arguments(OPSDArguments, OPSDConfig, [*flags, "--dry_run", "1", "--use_cpu", "true"])
    assert program == "opsd_train.py"
    assert (settings.bf16, model.dtype) == ((True, "bfloat16") if has_gpu else (False, "float32"))
    assert ("--use_cpu" in flags and flags[flags.index("--use_cpu") + 1] == "false") == has_gpu


def test_a_method_with_a_result_is_not_trained_again(monkeypatch, tmp_path):
    """The last run's steps, flags, and base model must be the same. What needs an engine here fails."""

    def run(methods, steps=2, base="seed0-abc"):
        monkeypatch.setattr(quickstart, "build_base_model", lambda *_: tmp_path / base)
        return quickstart.run_seed(0, methods, steps, False, tmp_path / "seed_0", BaseModelConfig(), resume=True)

    def fail(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(quickstart.AutoTokenizer, "from_pretrained", fail)  # the first thing that a measurement needs
    methods = {"ema": ABLATIONS["Teachers"]["ema"], "beta_0": ABLATIONS["Objectives"]["beta_0"]}
    results = {name: {"settings": quickstart.method_settings(method, 2, False)} for name, method in methods.items()}
    (tmp_path / "seed_0").mkdir()
    file = tmp_path / "seed_0" / "report.json"
    file.write_text(json.dumps({"model": "seed0-abc"} | results))
    assert run(methods)["ema"] == results["ema"]
    for changed in (
        {"methods": methods, "steps": 4},
        {"methods": methods, "base": "seed0-def"},
        {"methods": methods | {"beta_0": ABLATIONS["Objectives"]["beta_1"]}},
        {"methods": methods | {"beta_1": ABLATIONS["Objectives"]["beta_1"]}},
    ):
        with pytest.raises(NotImplementedError):
            run(**changed)
    assert json.loads(file.read_text()) == {"model": "seed0-abc"} | results


def test_data_files(tmp_path):
    addition.write_data(tmp_path, 0, train_size=8, test_size=4)
    rows = {file.stem: [json.loads(line) for line in file.open()] for file in tmp_path.iterdir()}
    assert {name: len(file_rows) for name, file_rows in rows.items()} == {
        "train": 8,
        "train_shuffled": 8,
        "train_answers": 8,
        "test": 4,
    }
    assert rows["train_answers"] == [{"problem": r["problem"], "answer": r["answer"]} for r in rows["train"]]


def test_arithmetic():
    for a, b in ((358, 647), (999, 999), (100, 100), (905, 95 + 100), (123, 877)):
        totals = addition.column_totals(a, b)
        assert addition.final_answer(totals) == str(a + b)
        for text in (addition.response_text(a, b, totals), addition.reference_text(totals)):
            assert extract_answer(text) == str(a + b)
    assert addition.final_answer(addition.column_totals(358, 647, keep_carry=lambda digit_sum: False)) == "995"


@pytest.mark.parametrize("seed", [0, 1])
def test_no_held_out_problem_is_trained_on(seed):
    held_out = {row["problem"] for row in addition.held_out_problems()}
    training = {row["problem"] for row in addition.training_problems(seed)}
    assert len(held_out) == 256 and not held_out & training
    rng = random.Random(seed)
    for _ in range(2000):
        assert not addition.is_held_out(*addition.draw_operands(rng))


def test_shuffled_solutions_belong_to_other_problems():
    rows = addition.training_problems(0, 200)
    shuffled = addition.shuffle_solutions(rows, 0)
    assert [row["problem"] for row in shuffled] == [row["problem"] for row in rows]
    assert sorted(row["solution"] for row in shuffled) == sorted(row["solution"] for row in rows)
    assert all(new["solution"] != old["solution"] for new, old in zip(shuffled, rows, strict=True))


def test_tokenizer_is_lossless_and_short(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    for text in ("Let $x \\in \\mathbb{R}$; né à 3π/4 — 证明 🙂\n\ttab", STUDENT_PROMPT, TEACHER_PROMPT):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(TEACHER_PROMPT)) < 40
    assert all(len(tokenizer.encode(token)) == 1 for token in [*"0123456789+{}", "<think>", "</think>", "<|im_end|>"])


def counted_parts(tokenizer, example):
    """The texts of the runs of tokens that count in the loss, and the text of the whole example."""
    runs, before = [], False
    for token_id, counts in zip(*example, strict=True):
        if counts and not before:
            runs.append([])
        if counts:
            runs[-1].append(token_id)
        before = counts
    return [tokenizer.decode(ids) for ids in runs], tokenizer.decode(example[0])


HEADER = "<|im_end|>\n<|im_start|>assistant\n"
NO_THOUGHT = "<think>\n\n</think>\n\n"
RESPONSE = r"ones: \d\+\d gives \d+\. tens: \d\+\d gives \d+\. hundreds: \d\+\d gives \d+\. So \\boxed\{\d+\}"
TERSE = r"We get ones \d+, tens \d+, hundreds \d+, hence \\boxed\{\d+\}\."


def test_further_examples_of_the_ablations_base():
    """They are what a trainer makes of the same problems and references, and slipped references are followed."""
    config = BaseModelConfig(
        problem_only_examples=0,
        reference_examples=0,
        own_style_examples=40,
        rationale_examples=40,
        thinking_examples=80,
    )
    tokenizer = train_tokenizer(config)
    batches = [
        [counted_parts(tokenizer, example) for example in batch]
        for batch in draw_batches(tokenizer, config, random.Random(0))
    ]
    own_style, rationalized, student_thinks, teacher_thinks = batches

    def user_turn(template, **fields):
        return f"<|im_start|>user\n{fill_template(template, **fields)}"

    def problem(text):
        return text.partition("Problem: ")[2].partition("\n")[0]

    def slips(batch):  # how many final answers are wrong
        return sum(eval(problem(text)) != int(extract_answer(text)) for _, text in batch)

    for parts, text in own_style:
        response = parts[0].removesuffix("<|im_end|>")
        assert re.fullmatch(RESPONSE, response)
        prompt = user_turn(TEACHER_PROMPT, problem=problem(text), solution=response)
        assert parts == [response + "<|im_end|>"] and text == prompt + HEADER + NO_THOUGHT + parts[0]

    for parts, text in rationalized:
        own, end = parts[0].removesuffix("<|im_end|>"), parts[0]
        reference = text.partition("begins ---\n")[2].partition("\n---")[0]
        assert re.fullmatch(RESPONSE, own) and (reference == own or re.fullmatch(TERSE, reference))
        assert extract_answer(reference) == extract_answer(own)
        prompt = user_turn(REASONING_PROMPT, problem=problem(text), solution=reference)
        assert parts == [end, end]
        assert (
            text
            == prompt + HEADER + NO_THOUGHT + end + "\n" + user_turn(TRANSITION_PROMPT) + HEADER + NO_THOUGHT + end
        )
    assert 10 < sum("We get" in text for _, text in rationalized) < 30

    for batch, template in ((student_thinks, STUDENT_PROMPT), (teacher_thinks, TEACHER_PROMPT)):
        assert len(batch) == 40
        for parts, text in batch:
            matched = re.fullmatch(f"<think>\n({TERSE})\n</think>\n\n({RESPONSE})<\\|im_end\\|>", parts[0])
            thought, response = matched.groups()
            prompt = user_turn(template, problem=problem(text), solution=thought)
            assert len(parts) == 1 and text == prompt + HEADER + parts[0]
            assert extract_answer(thought) == extract_answer(response)
    assert all(10 < slips(batch) < 30 for batch in batches)


def test_the_ablations_base_is_another_one():
    assert fingerprint(ablation_base(0)) not in (fingerprint(BaseModelConfig()), fingerprint(ablation_base(1)))
    tokenizer = train_tokenizer(ablation_base(0))
    assert (
        len(tokenizer.encode(REASONING_PROMPT)) < 40 < len(train_tokenizer(BaseModelConfig()).encode(REASONING_PROMPT))
    )
