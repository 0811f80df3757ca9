"""The quickstart as a newcomer runs it, and the properties of its task that its claims rest on."""

import json
import random
import subprocess
import sys

import pytest
from conftest import ROOT
from transformers import AutoTokenizer

from data_collator import STUDENT_PROMPT, TEACHER_PROMPT
from eval.grading import extract_answer
from quickstart import addition
from quickstart.report import LABELS, markdown_table, summary_table


def test_quickstart_teaches_the_model(tiny_model_dir, tmp_path):
    """The whole program, shorter than by default: real training, real vLLM, held-out problems."""
    subprocess.run(
        [sys.executable, ROOT / "quickstart" / "run.py", "--output_dir", tmp_path, "--steps", "60"],
        check=True,
        timeout=1200,
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert 0.35 <= report["base"]["avg_at_4"] <= 0.65
    assert report["teacher"]["avg_at_4"] >= 0.95
    assert report["opsd"]["avg_at_4"] >= max(0.90, report["base"]["avg_at_4"] + 0.30)
    assert [point["step"] for point in report["curve"]] == [0, 12, 24, 36, 48, 60]
    assert report["curve"][0]["avg_at_4"] == report["base"]["avg_at_4"]
    assert report["curve"][-1]["avg_at_4"] == report["opsd"]["avg_at_4"]
    assert report["opsd"]["steps"] == 60
    rollouts = [json.loads(line) for file in (tmp_path / "opsd" / "completions").iterdir() for line in file.open()]
    assert len(rollouts) == 1920
    assert report["opsd"]["generated_tokens"] == sum(rollout["num_tokens"] for rollout in rollouts)
    for plot in ("accuracy.png", "tokens.png"):
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")
    test_problems = {row["problem"] for row in addition.held_out_problems()}
    assert not any(problem + "\n" in rollout["prompt"] for rollout in rollouts for problem in test_problems)


@pytest.mark.slow
def test_baselines_and_controls(tmp_path):
    """Two steps each, to see that all of it runs and is reported; `README.md` has what comes out of a hundred."""
    command = [sys.executable, ROOT / "quickstart" / "run.py", "--output_dir", tmp_path, "--steps", "2"]
    subprocess.run([*command, "--baselines", "--controls", "--no-use_vllm"], check=True, timeout=1800)
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(LABELS) <= set(report)
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
