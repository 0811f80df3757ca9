"""The curriculum: weights written out by hand, frequencies of draws, its state in a checkpoint, and whole runs."""

import math
from collections import Counter

import pytest
import torch
from helpers import Recorder, is_right, perturb_student, saved_rollouts, script_rollouts, teacher_logits, work_out
from torch.testing import assert_close

from opsd.curriculum import CURRICULA, Curriculum
from opsd.losses import generalized_jsd


def assert_weights(curriculum, expected):
    assert_close(curriculum.weights(), torch.tensor(expected, dtype=torch.float64))


def test_divergence_weights_by_hand():
    curriculum = Curriculum("divergence", 5, seed=0)
    assert_weights(curriculum, [1.0] * 5)
    curriculum.update([0, 1], [0.3, 0.1], [1, 1])
    assert_weights(curriculum, [0.3, 0.1, 0.2, 0.2, 0.2])  # not seen yet: the mean
    curriculum.update([0], [0.6], [1])  # (0.3 / 2 + 0.6) / (1 / 2 + 1) = 0.5
    assert_weights(curriculum, [0.5, 0.1, 0.3, 0.3, 0.3])
    curriculum.update([2, 3], [0.0, -7.0], [1, 1])  # mean (0.5 + 0.1 + 0 + 0) / 4, of which the floor is a tenth
    assert_weights(curriculum, [0.5, 0.1, 0.015, 0.015, 0.15])


def test_divergences_of_zero_leave_something_to_draw():
    curriculum = Curriculum("divergence", 3, seed=0)
    curriculum.update([0, 1], [0.0, 0.0], [1, 1])
    assert_weights(curriculum, [0.1, 0.1, 1.0])
    curriculum.update([2], [0.0], [1])
    assert_weights(curriculum, [0.1, 0.1, 0.1])
    assert sorted(curriculum.draw(0, 3)) == [0, 1, 2]


def test_pass_rate_weights_by_hand():
    curriculum = Curriculum("pass_rate", 4, seed=0)
    assert_weights(curriculum, [1.0] * 4)
    curriculum.update([0, 1, 2], [0.5, 1.0, 0.0], [2, 8, 1])
    # p = (1 + 0.5) / 3, (8 + 0.5) / 9, 0.5 / 2
    assert_weights(curriculum, [1.0, 4 * 8.5 * 0.5 / 81, 0.75, 1.0])
    curriculum.update([1], [0.25], [8])  # sum 4 + 2, count 4 + 8: p = 6.5 / 13
    assert_weights(curriculum, [1.0, 1.0, 0.75, 1.0])
    for _ in range(50):  # sum and count go to 16: 4 p (1 - p) = 4 16.5 0.5 / 17^2 = 0.114
        curriculum.update([1], [1.0], [8])
    assert_weights(curriculum, [1.0, 4 * 16.5 * 0.5 / 289, 0.75, 1.0])
    curriculum.update([1], [1.0], [100])  # below the floor
    assert_weights(curriculum, [1.0, 0.1, 0.75, 1.0])


@pytest.mark.parametrize("kind", CURRICULA)
def test_update_of_repeated_rows_and_values_that_are_not_finite(kind):
    together, apart = (Curriculum(kind, 3, seed=0) for _ in range(2))
    together.update([2, 0, 2, 1], [0.25, math.nan, 0.5, math.inf], [3, 1, 2, 1])
    apart.update([2], [0.25], [3])
    apart.update([2], [0.5], [2])
    assert torch.equal(together.weights(), apart.weights())
    assert together.metrics()["curriculum/seen_ratio"] == pytest.approx(1 / 3)


def test_draws_follow_the_weights():
    curriculum = Curriculum("divergence", 4, seed=3)
    curriculum.update(range(4), [0.1, 0.2, 0.3, 0.4], [1] * 4)
    num_draws = 4000
    counts = torch.zeros(4, dtype=torch.float64)
    second_after_last = torch.zeros(4, dtype=torch.float64)
    for step in range(num_draws):
        first, second = curriculum.draw(step, 2)
        counts[first] += 1
        if first == 3:
            second_after_last[second] += 1
    # Four standard deviations of a binomial share are at most 4 sqrt(0.25 / n)
    expected = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    assert_close(counts / num_draws, expected, rtol=0, atol=2 / math.sqrt(num_draws))
    # Without replacement: of what is left, in proportion again
    expected = torch.tensor([1 / 6, 2 / 6, 3 / 6, 0], dtype=torch.float64)
    assert_close(second_after_last / counts[3], expected, rtol=0, atol=2 / math.sqrt(0.35 * num_draws))


def test_draws_are_different_rows_and_depend_on_seed_step_and_state_alone():
    curriculum = Curriculum("pass_rate", 100, seed=0)
    rows = curriculum.draw(5, 40)
    assert len(set(rows)) == 40
    assert set(rows) <= set(range(100))
    assert sorted(curriculum.draw(5, 100)) == list(range(100))
    torch.manual_seed(1)
    curriculum.draw(6, 10)
    assert curriculum.draw(5, 40) == rows == Curriculum("pass_rate", 100, seed=0).draw(5, 40)
    assert curriculum.draw(6, 40) != rows
    assert Curriculum("pass_rate", 100, seed=1).draw(5, 40) != rows
    for _ in range(3):
        curriculum.update(rows, [1.0] * 40, [1] * 40)
    assert curriculum.draw(5, 40) != rows


def test_metrics_by_hand():
    curriculum = Curriculum("divergence", 4, seed=0)
    assert curriculum.metrics() == pytest.approx({"curriculum/seen_ratio": 0.0, "curriculum/effective_ratio": 1.0})
    curriculum.update([0, 1], [0.5, 0.1], [1, 1])  # weights 0.5, 0.1, 0.3, 0.3
    entropy = -sum(p * math.log(p) for p in (0.5 / 1.2, 0.1 / 1.2, 0.25, 0.25))
    assert curriculum.metrics() == pytest.approx(
        {"curriculum/seen_ratio": 0.5, "curriculum/effective_ratio": math.exp(entropy) / 4}
    )


@pytest.mark.parametrize("kind", CURRICULA)
def test_saved_and_loaded_it_draws_the_same(kind, tmp_path):
    curriculum, resumed = (Curriculum(kind, 50, seed=7) for _ in range(2))
    for step in range(10):
        rows = curriculum.draw(step, 8)
        curriculum.update(rows, [row / 50 for row in rows], [4] * 8)
    curriculum.save(tmp_path)
    assert resumed.draw(10, 20) != curriculum.draw(10, 20)
    resumed.load(tmp_path)
    for step in range(10, 15):
        rows = curriculum.draw(step, 20)
        assert resumed.draw(step, 20) == rows
        for role in (curriculum, resumed):
            role.update(rows, [row / 50 for row in rows], [4] * 20)


@pytest.mark.parametrize(
    ("kind", "num_problems", "message"), [("pass_rate", 5, "divergence.*pass_rate"), ("divergence", 6, "5.*6")]
)
def test_scores_of_another_run_do_not_load(kind, num_problems, message, tmp_path):
    Curriculum("divergence", 5, seed=0).save(tmp_path)
    with pytest.raises(ValueError, match=f"--resume_from_checkpoint {tmp_path}: .*{message}"):
        Curriculum(kind, num_problems, seed=0).load(tmp_path)


def test_missing_scores_do_not_load(tmp_path):
    with pytest.raises(ValueError, match=f"--resume_from_checkpoint {tmp_path}: curriculum.safetensors is missing"):
        Curriculum("divergence", 5, seed=0).load(tmp_path)


def test_what_cannot_be_drawn():
    with pytest.raises(ValueError, match="cannot draw 4 different problems of 3"):
        Curriculum("divergence", 3, seed=0).draw(0, 4)
    with pytest.raises(ValueError, match="kind"):
        Curriculum("entropy", 3, seed=0)


# In training


CURRICULUM = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 2}


def write_rate(problem, occurrence):
    """Of two rollouts of a problem, the last digit of the problem says how many are right: none, one or both."""
    return work_out(problem, is_right=occurrence < int(problem[-1]) % 3)


@pytest.mark.parametrize("kind", ["divergence", "pass_rate"])
def test_scores_are_those_of_the_steps_rollouts(make_trainer, kind):
    trainer = make_trainer(
        curriculum=kind, max_steps=1, learning_rate=0.0, callbacks=[recorder := Recorder()], **CURRICULUM
    )
    perturb_student(trainer)
    script_rollouts(trainer, write_rate)
    trainer.train()
    trainer.model.train()
    row_of_prompt = {tuple(ids): row for row, ids in enumerate(trainer.train_dataset["student_prompt_ids"])}
    sums, counts = torch.zeros(2, 64, dtype=torch.float64)
    for (inputs,) in trainer._buffered_inputs:
        student = trainer.completion_logits(trainer.model, inputs, "student").detach()
        divergences = generalized_jsd(student, teacher_logits(trainer, inputs), beta=0.5)
        rows_of_tokens = inputs.completion_mask.nonzero()[:, 0]
        prompts = zip(inputs.prompt_ids, inputs.prompt_mask, strict=True)
        for place, (prompt, mask) in enumerate(prompts):
            row = row_of_prompt[tuple(prompt[mask.bool()].tolist())]
            of_rollout = divergences[rows_of_tokens == place]
            sums[row] += of_rollout.sum().item() if kind == "divergence" else is_right(trainer, inputs)[place]
            counts[row] += len(of_rollout) if kind == "divergence" else 1
    assert (counts > 0).sum() == 4 and sums.sum() > 0.0
    assert_close(trainer.curriculum._counts, counts, rtol=0, atol=0)
    assert_close(trainer.curriculum._sums, sums, rtol=1e-4, atol=1e-6)
    assert recorder.values("curriculum/seen_ratio") == [4 / 64]
    assert 0.0 < recorder.values("curriculum/effective_ratio")[0] < 1.0


@pytest.mark.parametrize("kind", ["divergence", "pass_rate"])
def test_resumed_curriculum_goes_on(make_trainer, problems, tmp_path, kind):
    """Six of eight problems a step, so that problems come again and their scores matter."""
    settings = {"dataset": problems.select(range(8)), "curriculum": kind, "max_steps": 5, "num_generations": 2}
    settings |= {"per_device_train_batch_size": 6, "save_strategy": "steps", "save_steps": 2}
    whole, resumed = Recorder(), Recorder()
    first = make_trainer(callbacks=[whole], **settings)
    script_rollouts(first, write_rate)
    first.train()
    run = tmp_path / "run"
    rollouts = saved_rollouts(run)
    second = make_trainer(callbacks=[resumed], **settings)
    script_rollouts(second, write_rate)
    second.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    for name in ("loss", "grad_norm", "num_generated_tokens", "curriculum/seen_ratio", "curriculum/effective_ratio"):
        assert resumed.values(name) == pytest.approx(whole.values(name)[2:], rel=1e-6, abs=1e-9), name
    assert saved_rollouts(run) == rollouts
    assert torch.equal(second.curriculum.weights(), first.curriculum.weights())
    assert len(set(second.curriculum.weights().tolist())) > 2


def test_resuming_with_another_curriculum_is_refused(make_trainer):
    trainer = make_trainer(curriculum="divergence")
    trainer._run_state["curriculum"] = "none"
    with pytest.raises(ValueError, match="--curriculum divergence: .* was trained with none"):
        trainer._start_curriculum()


def test_without_a_curriculum_each_problem_comes_once_an_epoch(make_trainer, problems, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4, "callbacks": [recorder := Recorder()]}
    trainer = make_trainer(problems.select(range(8)), **settings)
    trainer.train()
    assert trainer.curriculum is None and not any("curriculum" in name for logs in recorder.logs for name in logs)
    run = tmp_path / "run"
    assert not list(run.rglob("curriculum.safetensors"))
    records = saved_rollouts(run)
    prompts = [record["prompt"] for record in records]
    assert set(Counter(prompts[:8]).values()) == set(Counter(prompts[8:]).values()) == {1}
    assert "correct" not in records[0]
