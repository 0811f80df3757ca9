"""Held-out accuracy: figures, the same seeds at each evaluation, resume, best checkpoint, several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import Recorder, saved_rollouts, script_rollouts, work_out
from safetensors.torch import load_file

from opsd.held_out import METRICS, check_answers, mean_and_error
from opsd_trainer import OPSDConfig

EVALUATION = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}


def script_shares(trainer, problems, shares_of_step, num_samples):
    """Let each held-out problem have its share of right completions at each step, in `num_samples`."""
    places = {problem: place for place, problem in enumerate(problems["problem"])}

    def write(problem, occurrence):
        if problem not in places:
            return work_out(problem)
        share = shares_of_step[trainer.state.global_step][places[problem]]
        return work_out(problem, is_right=occurrence < share * num_samples)

    script_rollouts(trainer, write)


def test_mean_and_error_by_hand():
    assert mean_and_error([1.0, 0.5, 0.0]) == pytest.approx((0.5, 0.5 / 3**0.5))
    assert mean_and_error([0.25]) == (0.25, None)


def test_accuracy_and_gain_by_hand(make_trainer, problems):
    """Three samples of four problems, two of them with `None` or without an answer beside them."""
    held_out = problems.select(range(40, 46)).to_list()
    held_out[4]["answer"], held_out[5]["answer"] = None, " "
    held_out = type(problems).from_list(held_out)
    shares = {0: [1, 2 / 3, 1 / 3, 0, 0, 1], 1: [1, 1, 2 / 3, 1 / 3, 0, 0], 2: [0, 0, 0, 0, 1, 1]}
    recorder = Recorder()
    trainer = make_trainer(callbacks=[recorder], eval_dataset=held_out, eval_accuracy_samples=3, **EVALUATION)
    script_shares(trainer, held_out, shares, 3)
    trainer.train()
    logged = {name: recorder.values(f"eval_{name}") for name in METRICS}
    assert logged["accuracy"] == pytest.approx([0.5, 0.75, 0.0])
    assert logged["accuracy_standard_error"] == pytest.approx([(5 / 27) ** 0.5 / 2, (11 / 108) ** 0.5 / 2, 0.0])
    assert logged["accuracy_gain"] == pytest.approx([0.25, -0.5])
    assert logged["accuracy_gain_standard_error"] == pytest.approx([1 / 12, (5 / 27) ** 0.5 / 2])
    assert [logs["epoch"] for logs in recorder.logs if "eval_accuracy" in logs][0] == 0


def test_an_evaluation_samples_once_and_its_loss_is_of_the_first_completions(make_trainer, problems):
    """With a problem that is there twice, and a last batch that is not full."""
    held_out = problems.select([40, 41, 40, 42, 43])
    trainer = make_trainer(eval_dataset=held_out, eval_accuracy_samples=2, **EVALUATION)
    sampled, is_training, scored, sample = [], [], [], trainer.sampler.sample

    def keep(prompts, **settings):
        is_training.append(trainer.model_wrapped.training)
        sampled.append(list(zip(map(tuple, prompts), sample(prompts, **settings), strict=True)))
        return [completion for _, completion in sampled[-1]]

    trainer.sampler.sample = keep
    collate = trainer.collator

    class Collator(type(collate)):
        def __call__(self, rollouts):
            scored.extend(rollouts)
            return super().__call__(rollouts)

    collate.__class__ = Collator
    for _ in range(2):
        sampled.clear(), scored.clear()
        trainer.evaluate()
        assert [len(prompts) for prompts in sampled] == [10] and not any(is_training)
        firsts = dict(reversed(sampled[0]))  # prompt -> its first
        assert [rollout.prompt_ids for rollout in scored] == trainer.eval_dataset["student_prompt_ids"][:]
        assert all(r.completion_ids == firsts[tuple(r.prompt_ids)].ids for r in scored)
    assert trainer._samples is None and trainer.take_held_out([[1]]) is None


def keep_samples(trainer):
    """A list that gets what the sampler returns, call by call."""
    kept, sample = [], trainer.sampler.sample

    def keep(prompts, **settings):
        completions = sample(prompts, **settings)
        kept.append([completion.ids for completion in completions])
        return completions

    trainer.sampler.sample = keep
    return kept


def check_paired_seeds(make_trainer, problems, **settings):
    """Weights that stay: each evaluation gives the same completions, and several of a problem are not all alike."""
    recorder = Recorder()
    trainer = make_trainer(
        callbacks=[recorder],
        eval_dataset=problems.select(range(40, 44)),
        eval_accuracy_samples=8,
        learning_rate=0.0,
        temperature=2.0,
        **EVALUATION | settings,
    )
    kept = keep_samples(trainer)
    trainer.train()
    trainer.sampler.close()
    held_out = [samples for samples in kept if len(samples) == 32]
    assert len(held_out) == 3 and held_out[0] == held_out[1] == held_out[2]
    assert all(len(set(map(tuple, held_out[0][start : start + 8]))) > 1 for start in range(0, 32, 8))
    assert recorder.values("eval_accuracy_gain") == recorder.values("eval_accuracy_gain_standard_error") == [0.0, 0.0]


def test_same_seeds_at_each_evaluation(make_trainer, problems):
    check_paired_seeds(make_trainer, problems)


@pytest.mark.vllm
def test_same_seeds_at_each_evaluation_with_vllm(make_trainer, problems):
    check_paired_seeds(make_trainer, problems, use_vllm=True)


def test_training_does_not_see_the_evaluations(make_trainer, problems, tmp_path):
    """Losses and rollouts are those of a run without evaluations."""
    results = []
    for name, settings in (
        ("without", {}),
        ("with", EVALUATION | {"eval_dataset": problems.select(range(40, 44)), "eval_accuracy_samples": 2}),
    ):
        recorder, run = Recorder(), tmp_path / name
        settings |= {"output_dir": str(run), "max_steps": 3, "verify_rollouts": True}
        make_trainer(callbacks=[recorder], **settings).train()
        results.append((recorder.values("loss"), recorder.values("grad_norm"), saved_rollouts(run)))
    assert results[0] == results[1] and len(results[0][0]) == 3


def test_resumed_run_measures_nothing_twice_and_keeps_its_start(make_trainer, problems, tmp_path):
    settings = EVALUATION | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_accuracy_samples": 2}
    settings |= {"eval_dataset": problems.select(range(40, 46)), "learning_rate": 1e-2}
    whole, resumed = Recorder(), Recorder()
    make_trainer(callbacks=[whole], **settings).train()
    trainer = make_trainer(callbacks=[resumed], **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert len(whole.values("eval_accuracy")) == 5 and len(whole.values("eval_accuracy_gain")) == 4
    for name in METRICS:
        assert resumed.values(f"eval_{name}") == pytest.approx(whole.values(f"eval_{name}")[-2:]), name


def test_other_held_out_problems_start_anew(make_trainer, problems, tmp_path, caplog):
    settings = EVALUATION | {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "eval_accuracy_samples": 1}
    make_trainer(eval_dataset=problems.select(range(40, 44)), **settings | {"max_steps": 1}).train()
    recorder = Recorder()
    trainer = make_trainer(callbacks=[recorder], eval_dataset=problems.select(range(44, 48)), **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert "other problems than before" in caplog.text
    assert len(recorder.values("eval_accuracy")) == 2 and len(recorder.values("eval_accuracy_gain")) == 1


def test_best_checkpoint_is_that_of_the_highest_accuracy(make_trainer, problems, tmp_path):
    held_out = problems.select(range(40, 44))
    trainer = make_trainer(
        eval_dataset=held_out,
        eval_accuracy_samples=1,
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_accuracy",
        **EVALUATION,
    )
    script_shares(trainer, held_out, {0: [1, 1, 1, 1], 1: [1, 0, 0, 0], 2: [1, 1, 1, 0], 3: [1, 1, 0, 0]}, 1)
    trainer.train()
    best = tmp_path / "run" / "checkpoint-2"
    assert (trainer.state.best_model_checkpoint, trainer.state.best_metric) == (str(best), 0.75)
    saved = {n: w for n, w in load_file(best / "adapter_model.safetensors").items() if "lora_B" in n}
    now = {n.replace(".default", ""): w for n, w in trainer.model.named_parameters() if "lora_B" in n}
    assert saved.keys() == now.keys() and all(torch.equal(now[name], saved[name]) for name in saved)
    last = load_file(tmp_path / "run" / "checkpoint-3" / "adapter_model.safetensors")
    assert any(not torch.equal(last[name], saved[name]) for name in saved)


def test_it_needs_an_evaluation_and_answers(problems):
    with pytest.raises(
        ValueError, match=r"--eval_accuracy_samples 2: must go with --eval_strategy and --eval_dataset"
    ):
        OPSDConfig(use_cpu=True, bf16=False, eval_accuracy_samples=2)
    with pytest.raises(ValueError, match=r"--eval_accuracy_samples -1: must lie in \[0, inf\); 0: none"):
        OPSDConfig(use_cpu=True, bf16=False, eval_accuracy_samples=-1)
    settings = OPSDConfig(use_cpu=True, bf16=False, eval_accuracy_samples=2, eval_strategy="epoch")
    assert settings.grades_rollouts and settings.eval_on_start
    check_answers(problems)
    with pytest.raises(ValueError, match="no row of --eval_dataset_name has an answer to grade against"):
        check_answers(problems.remove_columns("answer").add_column("answer", [None] * (len(problems) - 1) + [" "]))


@pytest.mark.multiprocess
def test_several_processes_measure_together(tmp_path):
    result, worker = tmp_path / "measured.json", Path(__file__).with_name("held_out_worker.py")
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", worker, result],
        check=True,
        timeout=600,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(worker.parents[1])},
    )
    measured = json.loads(result.read_text())
    assert measured["world_size"] == 2 and measured["num_samples"] == [6, 4]  # two of each problem
    # The third of five problems is wrong, then the first and the second, too
    assert measured["eval_accuracy"] == pytest.approx([0.8, 0.4])
    assert measured["eval_accuracy_standard_error"] == pytest.approx([0.2, 0.06**0.5])
    assert measured["eval_accuracy_gain"] == pytest.approx([-0.4])
    assert measured["eval_accuracy_gain_standard_error"] == pytest.approx([0.06**0.5])
