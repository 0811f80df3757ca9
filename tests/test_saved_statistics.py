"""Token statistics that a run saves: what they are, that nothing notices them, that they go on after a kill."""

import copy
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import (
    SEED,
    Recorder,
    perturb_student,
    saved_rollouts,
    script_rollouts,
    work_out,
)
from statistics_files import make_row, score
from tokenizers import Tokenizer, decoders, models
from torch.testing import assert_close
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from opsd import saved_statistics
from opsd.inspection import runs
from opsd.inspection.page import make_page
from opsd.losses import Objective, generalized_jsd
from opsd.saved_statistics import FOLDER, NUM_TOP, SCHEMA, SavedStatistics, TokenTexts, score_tokens
from opsd_trainer import OPSDConfig


def read_files(run: Path) -> dict[int, list[dict]]:
    """Step -> rows, in the order of the steps."""
    files = sorted((run / FOLDER).iterdir())
    return {int(file.stem.removeprefix("step_")): pq.read_table(file).to_pylist() for file in files}


def test_page_reads_what_the_run_writes():
    assert (runs.STATISTICS, runs.NUM_TOP) == (FOLDER, NUM_TOP)
    assert {*runs.TEXTS, *runs.TOKENS, *runs.TOPS} <= set(SCHEMA.names)
    assert make_row(1, ["a"], [0.0]).keys() == set(SCHEMA.names)


# Nothing notices them


def generator_states():
    return torch.get_rng_state().tolist(), random.getstate(), [part.tolist() for part in np.random.get_state()[1:2]]


def train_recorded(make_trainer, run, **settings):
    """Train, and return losses, rollouts and the states of the generators."""
    trainer = make_trainer(callbacks=[recorder := Recorder()], **settings)
    trainer.train()
    trainer.sampler.close()
    return recorder, saved_rollouts(run), generator_states()


NOTICES = [
    {},
    {"packing": False, "gradient_accumulation_steps": 2, "num_loss_tokens_to_skip": 3},
    {"lora": False, "fixed_teacher": False, "use_ema_teacher": True, "ema_decay": 0.5, "learning_rate": 1e-3},
    {"teacher_context": "rollout", "num_generations": 2, "reference_fallback": "answer", "correct_weight": 0.5},
    {"reason_first": True, "max_reasoning_length": 12, "curriculum": "divergence"},
    pytest.param({"use_vllm": True}, marks=pytest.mark.vllm),
]


@pytest.mark.parametrize("settings", NOTICES, ids=lambda settings: next(iter(settings), "default"))
def test_nothing_notices_them(make_trainer, tmp_path, settings):
    """Losses, rollouts and random numbers are those of a run without them, bit for bit."""
    settings = {"max_steps": 3, "learning_rate": 1e-2} | settings
    without, rollouts, states = train_recorded(make_trainer, tmp_path / "run", **settings)
    assert not (tmp_path / "run" / FOLDER).exists()
    (tmp_path / "run" / "completions.jsonl").unlink()
    saving = {"save_token_statistics": 3, "token_statistics_steps": 2}
    recorder, saved, own_states = train_recorded(make_trainer, tmp_path / "run", **settings, **saving)
    assert saved == rollouts
    unequal = ("seconds/", "step_share/", "tokens_per_second/", "train_")
    assert len(recorder.logs) == len(without.logs) == 4
    for logs, other in zip(recorder.logs, without.logs, strict=True):
        assert {n: v for n, v in logs.items() if not n.startswith(unequal)} == {
            n: v for n, v in other.items() if not n.startswith(unequal)
        }
    assert own_states == states
    files = read_files(tmp_path / "run")
    assert list(files) == [1, 3] and all(len(rows) == 3 for rows in files.values())


# What they are


@pytest.mark.parametrize("packing", [True, False])
def test_scores_are_those_of_plain_forward_passes(make_trainer, problems, tmp_path, packing):
    """Divergence, entropies and top tokens of given completions, against one model and one sequence at a time."""
    trainer = make_trainer(save_token_statistics=5, max_steps=1, learning_rate=0.0, packing=packing)
    perturb_student(trainer)
    script_rollouts(trainer, lambda problem, _: work_out(problem, is_right=False))
    trainer.train()
    ((step, rows),) = read_files(tmp_path / "run").items()
    assert step == 1 and [row["index"] for row in rows] == list(range(5))
    assert len({row["row"] for row in rows}) == 5

    def teacher(input_ids):
        with trainer.model.disable_adapter():
            return trainer.model(input_ids)

    tokenizer = trainer.processing_class
    examples = [problems[row["row"]] for row in rows]
    completions = [tokenizer.encode(work_out(example["problem"], is_right=False)) for example in examples]
    trainer.model.eval()
    for row, other in zip(rows, score(trainer.model, teacher, tokenizer, examples, completions), strict=True):
        size = len(row["token_ids"])
        for name in ("problem", "reference", "answer", "student_prompt", "teacher_prompt", "completion", "token_ids"):
            assert row[name] == other[name], name
        assert "".join(row["tokens"]) == row["completion"] == work_out(row["problem"], is_right=False)
        for name in ("divergence", "student_logprob", "teacher_logprob", "student_entropy", "teacher_entropy"):
            assert_close(torch.tensor(row[name]), torch.tensor(other[name]), rtol=1e-3, atol=1e-4, msg=name)
        for role in ("student", "teacher"):
            logs, others = (torch.tensor(r[f"{role}_top_logprobs"]).view(size, NUM_TOP) for r in (row, other))
            assert_close(logs, others, rtol=1e-3, atol=1e-3)
            ids = torch.tensor(row[f"{role}_top_ids"])
            assert row[f"{role}_top_tokens"] == [tokenizer.decode([i]) for i in ids.tolist()]
        assert max(row["divergence"]) > 1e-2 and row["weight"] == [1.0] * size and not any(row["clipped"])
        assert len(row["kinds"]) == len(row["epistemic"]) == len(row["top_overlap"]) == size
        assert row["truncated"] is False and row["correct"] is None


def test_weights_and_verdicts(make_trainer, tmp_path):
    settings = {"verify_rollouts": True, "correct_weight": 0.5, "incorrect_weight": 0.0, "num_loss_tokens_to_skip": 2}
    trainer = make_trainer(save_token_statistics=6, max_steps=1, **settings)
    script_rollouts(trainer, lambda problem, _: work_out(problem, is_right=int(problem[0]) % 2 == 0))
    trainer.train()
    (rows,) = read_files(tmp_path / "run").values()
    assert {row["correct"] for row in rows} == {True, False}
    for row in rows:
        assert row["correct"] == (int(row["problem"][0]) % 2 == 0)
        size = len(row["tokens"])
        assert row["weight"] == [0.0] * 2 + [0.5 if row["correct"] else 0.0] * (size - 2)
        assert len(row["divergence"]) == size > 20  # all of them are scored, whatever counts


def test_truncated_completions_and_the_reference_of_a_peer(make_trainer, tmp_path):
    settings = {"teacher_context": "rollout", "num_generations": 2, "verify_rollouts": True}
    trainer = make_trainer(save_token_statistics=4, max_steps=1, max_completion_length=12, **settings)
    script_rollouts(trainer, lambda problem, n: r"So \boxed{" + str(eval(problem)) + "}<|im_end|>" if n else "7" * 30)
    trainer.train()
    (rows,) = read_files(tmp_path / "run").values()
    assert len(rows) == 4
    for row in rows:
        assert row["truncated"] is True and row["completion"] == "7" * 12 and row["correct"] is False
        assert f"boxed{{{row['answer']}}}" in row["reference"] and row["reference"] in row["teacher_prompt"]


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.0, "temperature": 1.3, "clip": 0.05},
        {"beta": 0.5, "clip": 0.2, "clip_mode": "token"},
        {"beta": 1.0, "temperature": 0.7, "top_k": 4},
    ],
    ids=str,
)
def test_scores_by_definition(monkeypatch, settings):
    """Of random logits, in chunks of 3 tokens: divergence after the clip, the share that it cuts, and the rest."""
    generator = torch.Generator().manual_seed(SEED)
    student, teacher = (3 * torch.randn(10, 11, generator=generator) for _ in range(2))
    ids = torch.randint(11, (10,), generator=generator)
    monkeypatch.setattr(saved_statistics, "ENTRIES_AT_ONCE", 3 * 11)
    scores = score_tokens(student, teacher, ids, Objective(**settings))
    divergence = generalized_jsd(student, teacher, **settings)
    assert_close(scores["divergence"], divergence)
    temperature = settings.get("temperature", 1.0)
    s, t = ((logits / temperature).log_softmax(-1) for logits in (student, teacher))
    assert_close(scores["student_logprob"], s[torch.arange(10), ids])
    assert_close(scores["teacher_entropy"], -(t.exp() * t).sum(-1))
    for role, logs in (("student", s), ("teacher", t)):
        assert_close(scores[f"{role}_top_logprobs"], logs.sort(descending=True).values[:, :NUM_TOP])
    shared = [
        len(set(of_student) & set(of_teacher)) / NUM_TOP
        for of_student, of_teacher in zip(
            scores["student_top_ids"].tolist(), scores["teacher_top_ids"].tolist(), strict=True
        )
    ]
    assert_close(scores["top_overlap"], torch.tensor(shared))
    if settings["beta"] == 0.0:
        summands = t.exp() * (t - s)
        positive = summands.clamp(min=0).sum(-1)
        assert_close(scores["clipped"], (summands - 0.05).clamp(min=0).sum(-1) / positive)
    elif "clip" in settings:
        full = generalized_jsd(student, teacher, beta=0.5)
        assert_close(scores["clipped"], (full - 0.2).clamp(min=0) / full)
    else:
        assert not scores["clipped"].any()


def test_a_sampled_token_loss_is_saved_with_its_divergence():
    student, teacher = torch.tensor([[1.0, 2.0, 0.0, 0.0, 1.0]]), torch.tensor([[2.0, 0.0, 1.0, 0.0, 0.5]])
    objective = Objective(
        beta=1.0, sampled_token=True, policy_gradient_weight=0.5, importance_sampling_correction=True
    )
    scores = score_tokens(student, teacher, torch.tensor([1]), objective)
    assert_close(scores["divergence"], generalized_jsd(student, teacher, beta=1.0))


def test_texts_of_tokens(tiny_model_dir):
    """Bytes without a character, and the whitespace that SentencePiece leaves out at the beginning."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    ids = tokenizer.encode("a é gives ")
    texts = TokenTexts(tokenizer)(ids)
    assert "\ufffd" in texts and " gives " in texts and len(texts) == len(ids)
    plain = Tokenizer(models.WordLevel({"▁so": 0, "so": 1, "<unk>": 2}, unk_token="<unk>"))
    plain.decoder = decoders.Metaspace()
    assert TokenTexts(PreTrainedTokenizerFast(tokenizer_object=plain))([0, 1, 0]) == [" so", "so", " so"]


# Files


def test_resumed_run_saves_the_same(make_trainer, tmp_path):
    """Files of steps after the checkpoint are dropped, with one that a killed run left half-written."""
    run, settings = tmp_path / "run", {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    settings |= {"save_token_statistics": 2, "token_statistics_steps": 2, "learning_rate": 1e-2}
    make_trainer(**settings).train()
    whole = read_files(run)
    assert list(whole) == [1, 3, 5]
    for name in ("step_000005.parquet", "step_000007.parquet", "step_000003.parquet.partial"):
        (run / FOLDER / name).write_bytes(b"half")
    make_trainer(**settings).train(resume_from_checkpoint=str(run / "checkpoint-3"))
    assert read_files(run) == whole
    make_trainer(max_steps=1).train()  # a new run in the folder, which saves none
    assert read_files(run) == {}


def test_the_page_shows_them(make_trainer, tmp_path):
    make_trainer(save_token_statistics=2, token_statistics_steps=1).train()
    (found,) = runs.read_runs([tmp_path / "run"])
    assert not [note for note in found.notes if FOLDER in note]
    assert found.steps == [1, 2] and len(found.completions) == 4
    assert len({completion.problem for completion in found.completions}) == 2  # the same ones at both steps
    assert "has no token statistics" not in make_page([found])


def test_bad_settings(make_trainer):
    for settings in ({"save_token_statistics": -1}, {"token_statistics_steps": 0}):
        with pytest.raises(ValueError, match=f"--{next(iter(settings))}"):
            OPSDConfig(use_cpu=True, bf16=False, **settings)
    with pytest.raises(ValueError, match="--save_token_statistics 65: the train dataset has 64 usable examples"):
        make_trainer(save_token_statistics=65)


def assert_same_rows(rows, expected):
    assert [row["index"] for row in rows] == list(range(len(expected)))
    for row, other in zip(rows, expected, strict=True):
        for name, value in other.items():
            if isinstance(value, list) and value and isinstance(value[0], float):
                assert np.allclose(row[name], value, rtol=1e-3, atol=1e-3), name
            elif "top" not in name:  # of equal probabilities either may come first
                assert row[name] == value, name
        assert math.isfinite(sum(row["divergence"]))


@pytest.mark.parametrize("number", [2, 3])
def test_each_process_takes_its_share(make_trainer, monkeypatch, number):
    """As many forward passes in each, and together the rows of one process."""
    trainer = make_trainer(save_token_statistics=5)
    script_rollouts(trainer)
    expected = SavedStatistics(trainer)._score(0)
    shares = []
    monkeypatch.setattr(saved_statistics, "gather_object", lambda rows: shares.append(rows) or rows)
    for index in range(number):
        process = copy.copy(trainer)
        process.accelerator = SimpleNamespace(num_processes=number, process_index=index, device=torch.device("cpu"))
        SavedStatistics(process)._score(0)
    assert [len(rows) for rows in shares] == [-(-5 // number)] * number
    by_index = {row["index"]: row for rows in shares for row in rows}
    assert_same_rows([by_index[index] for index in sorted(by_index)], expected)


@pytest.mark.multiprocess
def test_processes_share_them(make_trainer, tmp_path):
    """Two processes, the second of which has one problem less: the same rows as those of one process."""
    trainer = make_trainer(save_token_statistics=5, max_steps=1)
    script_rollouts(trainer)
    trainer.train()
    (expected,) = read_files(tmp_path / "run").values()
    worker, folder = Path(__file__).with_name("statistics_worker.py"), tmp_path / "two"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            worker,
            folder,
        ],
        check=True,
        timeout=600,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(worker.parents[1])},
    )
    (rows,) = read_files(folder / "run").values()
    assert_same_rows(rows, expected)
