"""Weights of tokens: each against its formula written out, in the loss and the gradient, and what is logged."""

import re

import pytest
import torch
from helpers import (
    Recorder,
    gradient_of_one_step,
    perturb_student,
    rollout,
    script_rollouts,
    work_out,
)
from torch.testing import assert_close

from opsd.losses import generalized_jsd
from opsd.token_weights import NAMES, TOKEN_WEIGHTS
from opsd_trainer import OPSDConfig


def write(problem, occurrence):
    """Rollouts of different lengths: some without the last words."""
    text = work_out(problem, is_right=int(problem[0]) % 2 == 0)
    return text if int(problem[2]) % 3 else text.split(" hundreds")[0] + "<|im_end|>"


def top_fifth(values):
    """1 for the fifth of the values that is largest, rounded up."""
    chosen = sorted(range(len(values)), key=lambda i: -values[i])[: -(-len(values) // 5)]
    return torch.tensor([float(i in chosen) for i in range(len(values))])


def entropy(logits):
    p = logits.softmax(-1)
    return -(p * p.log()).sum(-1)


# name -> weights of a completion's tokens, from the logits of student and teacher (L, V) and the divergences (L,)
FORMULAS = {
    "growing": lambda student, teacher, divergences: torch.tensor(
        [(2 * n - 1) / len(divergences) for n in range(1, len(divergences) + 1)], dtype=torch.float64
    ),
    "falling": lambda student, teacher, divergences: torch.tensor(
        [2 - (2 * n - 1) / len(divergences) for n in range(1, len(divergences) + 1)], dtype=torch.float64
    ),
    "student_entropy": lambda student, teacher, divergences: 1 - (-entropy(student)).exp(),
    "teacher_certainty": lambda student, teacher, divergences: (-entropy(teacher)).exp(),
    "top_entropy": lambda student, teacher, divergences: top_fifth(entropy(student).tolist()),
    "top_divergence": lambda student, teacher, divergences: top_fifth(divergences.tolist()),
}


def test_each_weight_has_a_formula_here():
    assert ["none", *FORMULAS] == ["none", *TOKEN_WEIGHTS] == list(NAMES)


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "trained head"])
@pytest.mark.parametrize("name", FORMULAS)
def test_loss_and_gradient_are_those_of_the_formula(make_trainer, name, lora):
    """In float64. The first two tokens of each completion are skipped, and wrong rollouts weigh half."""
    results = []
    for implementation in ("formula", "dense", "fused"):
        trainer = make_trainer(
            lora=lora,
            token_weights=name,
            loss_implementation="fused" if implementation == "fused" else "dense",
            num_loss_tokens_to_skip=2,
            incorrect_weight=0.5,
            per_device_train_batch_size=8,
        )
        trainer.model.double()
        perturb_student(trainer)
        script_rollouts(trainer, write)
        (inputs,) = rollout(trainer, size=8)
        assert len(set(inputs.completion_mask.sum(1).tolist())) > 1 and len(set(inputs.weights.tolist())) == 2
        if implementation == "formula":
            loss = loss_by_formula(trainer, inputs, name)
        else:
            loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad])
        results.append((loss.detach(), gradient))
    (expected_loss, expected), *others = results
    assert expected.norm() > 1e-4
    for loss, gradient in others:
        assert_close(loss, expected_loss, rtol=1e-8, atol=0)
        # On its way back the gradient passes the model's norms, which round to float32 (6e-8 relative).
        assert (gradient - expected).norm() <= 2e-7 * expected.norm()


def loss_by_formula(trainer, inputs, name):
    """sum_i r_i sum_n w_n D_n / sum_i r_i L_i over completions i of weight r_i, with L_i tokens in the loss."""
    with torch.no_grad(), trainer.teacher.active(trainer.model) as network:
        teacher = trainer.completion_logits(network, inputs, "teacher")
    student = trainer.completion_logits(trainer.model, inputs, "student")
    lengths = inputs.loss_mask.sum(1).tolist()
    total, num_tokens = 0.0, 0.0
    parts = zip(student.split(lengths), teacher.split(lengths), inputs.weights.tolist(), strict=True)
    for of_student, of_teacher, rollout_weight in parts:
        divergences = generalized_jsd(of_student, of_teacher, beta=0.5)
        weights = FORMULAS[name](of_student.detach(), of_teacher, divergences.detach())
        total = total + rollout_weight * (weights * divergences).sum()
        num_tokens += rollout_weight * len(divergences)
    return total / num_tokens


@pytest.mark.parametrize("name", ["growing", "student_entropy", "top_divergence"])
def test_gradient_does_not_depend_on_accumulation(make_trainer, name):
    whole, *_ = gradient_of_one_step(make_trainer, accumulation=1, token_weights=name)
    for packing in (True, False):
        parts, *_ = gradient_of_one_step(make_trainer, accumulation=4, token_weights=name, packing=packing)
        assert (parts - whole).norm() <= 1e-4 * whole.norm()


@pytest.mark.parametrize("name", ["none", "falling", "teacher_certainty", "top_entropy"])
def test_what_is_logged(make_trainer, name):
    """Over both micro-batches of a step, against the weights that the losses were multiplied with."""
    recorder = Recorder()
    trainer = make_trainer(
        token_weights=name,
        gradient_accumulation_steps=2,
        max_steps=1,
        callbacks=[recorder],
        incorrect_weight=0.0,
        packing=False,
    )
    script_rollouts(trainer, write)
    seen, apply = [], trainer.token_weights.apply

    def keep(batch, losses):
        weighed = apply(batch, losses)
        counts = batch.of_tokens(batch.weights) > 0
        if name != "none":
            seen.append(trainer.token_weights.compute(batch, losses.statistics)[counts])
        return weighed

    trainer.token_weights.apply = keep
    trainer.train()
    logged = {key: value for key, value in recorder.logs[0].items() if key.startswith("token_weights/")}
    if name == "none":
        assert logged == {}
        return
    assert len(seen) == 2
    weights = torch.cat(seen).double()
    assert logged["token_weights/mean"] == pytest.approx(weights.mean().item())
    share = weights.sum() ** 2 / (len(weights) * weights.square().sum())
    assert logged["token_weights/effective_share"] == pytest.approx(share.item())
    if name == "falling":
        assert logged["token_weights/mean"] == pytest.approx(1.0)


def test_refused_with_a_reward():
    settings = {"use_cpu": True, "bf16": False, "policy_gradient_weight": 0.1, "num_generations": 2}
    with pytest.raises(ValueError, match=re.escape("--token_weights growing: must be none with --policy_gradient_we")):
        OPSDConfig(**settings, token_weights="growing")
    with pytest.raises(ValueError, match="--token_weights rising: must be one of none, growing"):
        OPSDConfig(use_cpu=True, bf16=False, token_weights="rising")
