"""The fused linear losses against the dense ones: values, gradients, memory, and the Triton kernel."""

import itertools
import os
import subprocess
import sys
from importlib.util import find_spec

import opsd_kernels
import opsd_loss
import pytest
import torch
from opsd_kernels import Objective
from opsd_loss import (
    TOP_K_OF,
    fused_linear_jsd,
    fused_linear_sampled_token_loss,
    generalized_jsd,
    policy_gradient_loss,
    sampled_token_loss,
)
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

NUM_TOKENS, HIDDEN_SIZE, VOCAB_SIZE = 13, 16, 211
TOP_K = [(None, "teacher", False), *itertools.product([16], TOP_K_OF, (False, True))]
CLIPS = [(None, "pointwise")] + list(itertools.product((0.05, 1e-3, 1e-6), ("pointwise", "token")))


def random_inputs(num_tokens=NUM_TOKENS, seed=0, difference=1.0):
    """Hidden states of both roles, (N, H), and a head, (V, H), float64; logits have a standard deviation of 2."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(num_tokens, HIDDEN_SIZE, dtype=torch.float64, generator=generator)
    teacher = student + difference * torch.randn(student.shape, dtype=torch.float64, generator=generator)
    weight = 0.5 * torch.randn(VOCAB_SIZE, HIDDEN_SIZE, dtype=torch.float64, generator=generator)
    return student, teacher, weight


def relative_error(value, reference):
    if not reference.any():
        return value.norm().item()
    return ((value.double() - reference).norm() / reference.norm()).item()


def gradients(loss, *tensors, row_weights=None):
    loss = loss.sum() if row_weights is None else (row_weights.to(loss.dtype) * loss).sum()
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("top_k", [None, 16])
@pytest.mark.parametrize("temperature", [1.0, 1.1])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_equal_to_the_dense_form(beta, temperature, top_k, dtype):
    row_weights = torch.rand(NUM_TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for (clip, clip_mode), num_tokens in itertools.product(CLIPS, (NUM_TOKENS, 4)):
        settings = {"beta": beta, "temperature": temperature, "clip": clip, "clip_mode": clip_mode, "top_k": top_k}
        settings["return_statistics"] = True
        # float32 inputs, so that both compute from the same numbers
        student, teacher, weight = (tensor.float().double() for tensor in random_inputs(num_tokens))
        if clip_mode == "token" and clip == 0.05:
            teacher[: num_tokens // 2].lerp_(student[: num_tokens // 2], 0.95)  # a divergence below the cap
        student.requires_grad_()
        weight.requires_grad_()
        expected, expected_statistics = generalized_jsd(student @ weight.T, teacher @ weight.detach().T, **settings)
        expected_d_student, expected_d_weight = gradients(
            expected, student, weight, row_weights=row_weights[:num_tokens]
        )
        if clip is not None:  # it bites
            assert expected_statistics.clipped_entries.sum() > 0

        inputs = [tensor.detach().to(dtype) for tensor in (student, teacher, weight)]
        inputs[0].requires_grad_()
        inputs[2].requires_grad_()
        for chunk_size in (5, 13, None):
            loss, statistics = fused_linear_jsd(*inputs, chunk_size=chunk_size, **settings)
            d_student, d_weight = gradients(loss, inputs[0], inputs[2], row_weights=row_weights[:num_tokens])
            case = (clip, clip_mode, num_tokens, chunk_size)
            tolerance = 1e-11 if dtype == torch.float64 else 1e-3 if clip == 1e-6 else 1e-4
            assert relative_error(d_student, expected_d_student) <= tolerance, case
            assert relative_error(d_weight, expected_d_weight) <= tolerance, case
            # Relative to the divergence without cap, or in nats: what a cap leaves keeps the rounding errors of the whole
            error = (loss - expected).abs() / expected_statistics.divergence.clamp(min=1)
            assert error.max() <= (1e-13 if dtype == torch.float64 else 1e-6), case
            for name, value, reference in zip(statistics._fields, statistics, expected_statistics, strict=True):
                assert not value.requires_grad
                assert_close(value.double(), reference, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("top_k", "top_k_of", "tail"), TOP_K)
@pytest.mark.parametrize(("clip", "clip_mode"), [(0.005, "pointwise"), (0.03, "scale")])
def test_top_k_and_scale_are_equal_to_the_dense_form(top_k, top_k_of, tail, clip, clip_mode, dtype):
    row_weights = torch.rand(NUM_TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for beta, logit_softcap in itertools.product((0.0, 0.3, 1.0), (None, 5.0)):
        settings = {"beta": beta, "temperature": 1.1, "clip": clip, "clip_mode": clip_mode}
        settings |= {"top_k": top_k, "top_k_of": top_k_of, "tail": tail, "return_statistics": True}
        student, teacher, weight = (tensor.float().double() for tensor in random_inputs())
        teacher[:4].lerp_(student[:4], 0.999)  # below the cap
        student.requires_grad_()
        weight.requires_grad_()
        logits = [0.9 * student @ weight.T, 0.9 * teacher @ weight.detach().T]
        if logit_softcap is not None:
            logits = [logit_softcap * torch.tanh(role / logit_softcap) for role in logits]
        expected, expected_statistics = generalized_jsd(*logits, **settings)
        expected_gradients = gradients(expected, student, weight, row_weights=row_weights)
        assert 0 < (expected_statistics.clipped_entries > 0).sum() < NUM_TOKENS

        inputs = [tensor.detach().to(dtype) for tensor in (student, teacher, weight)]
        inputs[0].requires_grad_()
        inputs[2].requires_grad_()
        for chunk_size in (5, None):
            loss, statistics = fused_linear_jsd(
                *inputs, logit_scale=0.9, logit_softcap=logit_softcap, chunk_size=chunk_size, **settings
            )
            result = gradients(loss, inputs[0], inputs[2], row_weights=row_weights)
            case = (beta, logit_softcap, chunk_size)
            for value, reference in zip(result, expected_gradients, strict=True):
                assert relative_error(value, reference) <= (1e-11 if dtype == torch.float64 else 1e-4), case
            error = (loss - expected).abs() / expected_statistics.divergence.clamp(min=1)
            assert error.max() <= (1e-13 if dtype == torch.float64 else 1e-6), case
            for name, value, reference in zip(statistics._fields, statistics, expected_statistics, strict=True):
                assert_close(value.double(), reference, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("top_k_of", "tail"), [("teacher", True), ("student", False), ("both", False), ("both", True)]
)
@pytest.mark.parametrize("clip", [None, 0.01])
def test_gradient_of_top_k_against_finite_differences(beta, top_k_of, tail, clip):
    generator = torch.Generator().manual_seed(0)
    student, teacher, weight = (torch.randn(rows, 3, dtype=torch.float64, generator=generator) for rows in (4, 4, 9))
    settings = {"temperature": 1.3, "clip": clip, "top_k": 3, "top_k_of": top_k_of, "tail": tail, "logit_softcap": 3.0}

    def objective(student, weight):
        return fused_linear_jsd(
            student, teacher, weight, teacher_lm_head_weight=fixed_weight, beta=beta, chunk_size=3, **settings
        )

    fixed_weight = weight.clone()
    assert torch.autograd.gradcheck(objective, (student.requires_grad_(), weight.requires_grad_()), atol=1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_tails_of_next_to_nothing(beta):
    # exp(-28) = 7e-13 and exp(-200) = 0 in float32
    student = torch.tensor([[0.7, 0.3, -28.3, -28.0], [0.7, 0.3, -28.3, -28.0], [0.7, 0.3, -200.0, -201.0]])
    teacher = torch.tensor([[1.2, -0.2, -28.0, -29.0], [1.2, -0.2, -5.3, -5.0], [1.2, -0.2, -28.3, -28.0]])
    settings = {"beta": beta, "top_k": 2, "tail": True}
    reference = student.double().requires_grad_()
    expected = generalized_jsd(reference, teacher.double(), **settings)
    (expected_gradient,) = gradients(expected, reference)
    loss = fused_linear_jsd(student.requires_grad_(), teacher, torch.eye(4), **settings)
    (gradient,) = gradients(loss, student)
    assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    assert_close(gradient[:, :2].double(), expected_gradient[:, :2], rtol=1e-5, atol=1e-7)
    tail_mass = reference.detach().softmax(-1)[:, 2:].sum(-1, keepdim=True)
    error = (gradient[:, 2:] - expected_gradient[:, 2:]).abs()
    assert (error <= 1e-4 * expected_gradient[:, 2:].abs() + 1e-6 * tail_mass + 1e-40).all()


@pytest.mark.parametrize("vocab_size", [1, 3, 1024, 1025, 4096, 5000])
def test_argmax_in_blocks(vocab_size):
    values = torch.rand(5, vocab_size, generator=torch.Generator().manual_seed(0))
    values[0, -1] = values[1, 0] = 2.0
    assert torch.equal(opsd_kernels._argmax(values).squeeze(-1), values.argmax(-1))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("top_k", [None, 16])
def test_statistics_do_not_depend_on_the_gradient(beta, top_k):
    student, teacher, weight = random_inputs(40)
    settings = {"beta": beta, "clip": 5e-3, "top_k": top_k, "return_statistics": True}
    with torch.no_grad():
        loss, statistics = fused_linear_jsd(student, teacher, weight, **settings)
    expected_loss, expected = fused_linear_jsd(student.requires_grad_(), teacher, weight, **settings)
    assert torch.equal(loss, expected_loss)
    for value, reference in zip(statistics, expected, strict=True):
        assert torch.equal(value, reference)
    assert 0 < statistics.reversed.sum() < 40


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("clip", "clip_mode"), [(None, "pointwise"), (0.01, "pointwise"), (0.5, "token")])
@pytest.mark.parametrize("logit_softcap", [None, 3.0])
def test_gradient_against_finite_differences(beta, clip, clip_mode, logit_softcap):
    generator = torch.Generator().manual_seed(0)
    student, teacher, weight = (torch.randn(rows, 3, dtype=torch.float64, generator=generator) for rows in (4, 4, 9))

    def objective(student, weight):
        settings = {"temperature": 1.3, "clip": clip, "clip_mode": clip_mode, "logit_softcap": logit_softcap}
        return fused_linear_jsd(
            student, teacher, weight, teacher_lm_head_weight=fixed_weight, beta=beta, chunk_size=3, **settings
        )

    fixed_weight = weight.clone()
    assert torch.autograd.gradcheck(objective, (student.requires_grad_(), weight.requires_grad_()), atol=1e-7)


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 1.1])
def test_sampled_token_loss_is_equal_to_the_dense_form(temperature, clip):
    student, teacher, weight = random_inputs()
    token_ids = torch.randint(VOCAB_SIZE, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1))
    student.requires_grad_()
    weight.requires_grad_()
    logits = student @ weight.T, teacher @ weight.detach().T
    expected = sampled_token_loss(*logits, token_ids, temperature=temperature, clip=clip)
    settings = {"temperature": temperature, "clip": clip, "chunk_size": 5}
    loss, statistics = fused_linear_sampled_token_loss(
        student, teacher, weight, token_ids, beta=0.5, return_statistics=True, **settings
    )
    assert_close(loss, expected)
    assert_close(fused_linear_sampled_token_loss(student, teacher, weight, token_ids, **settings), expected)
    assert_close(gradients(loss, student, weight), gradients(expected, student, weight), rtol=1e-11, atol=1e-13)
    _, expected_statistics = generalized_jsd(*logits, beta=0.5, temperature=temperature, return_statistics=True)
    assert_close(tuple(statistics), tuple(value.detach() for value in expected_statistics))


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("logit_softcap", [None, 5.0])
def test_importance_weights_are_equal_to_the_dense_form(clip, logit_softcap):
    student, teacher, weight = random_inputs()
    generator = torch.Generator().manual_seed(1)
    token_ids = torch.randint(VOCAB_SIZE, (NUM_TOKENS,), generator=generator)
    weights = torch.empty(NUM_TOKENS, dtype=torch.float64).uniform_(0, 2, generator=generator).requires_grad_()
    student.requires_grad_()
    weight.requires_grad_()
    logits = [student @ weight.T, teacher @ weight.detach().T]
    if logit_softcap is not None:
        logits = [logit_softcap * torch.tanh(role / logit_softcap) for role in logits]
    settings = {"temperature": 1.1, "clip": clip, "importance_weights": weights}
    expected = sampled_token_loss(*logits, token_ids, **settings)
    settings |= {"logit_softcap": logit_softcap, "chunk_size": 5}
    loss = fused_linear_sampled_token_loss(student, teacher, weight, token_ids, **settings)
    assert_close(loss, expected)
    for row_weights in (torch.ones(NUM_TOKENS), torch.linspace(0, 1, NUM_TOKENS)):
        result, reference = (
            torch.autograd.grad((row_weights.double() * form).sum(), (student, weight), retain_graph=True)
            for form in (loss, expected)
        )
        assert_close(result, reference, rtol=1e-11, atol=1e-13)
    products = CountingMode("aten::mm", "aten::addmm")
    with products:
        fused_linear_sampled_token_loss(
            student, teacher, weight, token_ids, **settings | {"chunk_size": 13}
        ).mean().backward()
    assert (
        products.count == 4
    )  # the head's gradient is known after the forward pass, though the tokens' weights differ
    assert weights.grad is None


def of_tokens(num_tokens=NUM_TOKENS):
    """Token ids, weights (some are zero) and advantages of both signs (one is zero), (N,) each."""
    generator = torch.Generator().manual_seed(2)
    token_ids = torch.randint(VOCAB_SIZE, (num_tokens,), generator=generator)
    weights = torch.empty(num_tokens, dtype=torch.float64).uniform_(0, 2, generator=generator)
    weights[::3] = 0
    advantages = torch.randn(num_tokens, dtype=torch.float64, generator=generator)
    advantages[1] = 0
    return token_ids, weights, advantages


@pytest.mark.parametrize("logit_softcap", [None, 5.0])
@pytest.mark.parametrize(
    ("beta", "clip", "clip_mode", "top_k"),
    [
        *((beta, clip, "pointwise", None) for beta in (0.0, 0.5, 1.0, "sampled") for clip in (None, 0.01)),
        (0.0, 0.5, "token", None),
        (1.0, 0.5, "scale", None),
        (0.5, 0.01, "pointwise", 16),
    ],
)
def test_token_weights_and_advantages_are_equal_to_the_dense_form(beta, clip, clip_mode, top_k, logit_softcap):
    student, teacher, weight = random_inputs()
    student.requires_grad_()
    weight.requires_grad_()
    token_ids, token_weights, advantages = of_tokens()
    head_settings = {"logit_scale": 0.9, "logit_softcap": logit_softcap}
    logits = [0.9 * student @ weight.T, 0.9 * teacher @ weight.detach().T]
    if logit_softcap is not None:
        logits = [logit_softcap * torch.tanh(role / logit_softcap) for role in logits]
    policy_gradient = policy_gradient_loss(logits[0], token_ids, advantages, temperature=1.1)
    statistics_settings = {"beta": 0.5 if beta == "sampled" else beta, "temperature": 1.1, "return_statistics": True}
    if beta == "sampled":
        settings = {"temperature": 1.1, "clip": clip, "importance_weights": torch.linspace(2, 0.5, NUM_TOKENS)}
        expected = sampled_token_loss(*logits, token_ids, **settings)
        _, expected_statistics = generalized_jsd(*logits, **statistics_settings)
        fused = fused_linear_sampled_token_loss
    else:
        settings = {"clip": clip, "clip_mode": clip_mode, "top_k": top_k}
        expected, expected_statistics = generalized_jsd(*logits, **statistics_settings, **settings)
        fused = fused_linear_jsd
        assert clip is None or expected_statistics.clipped_entries.any()

    for with_weights, with_advantages, chunk_size in itertools.product((True, False), (True, False), (1, 5, 13)):
        more = {"token_weights": token_weights} if with_weights else {}
        more |= {"advantages": advantages} if with_advantages else {}
        loss, statistics = fused(
            student, teacher, weight, token_ids=token_ids, chunk_size=chunk_size,
            **statistics_settings | settings | head_settings | more,
        )  # fmt: skip
        total = expected * token_weights if with_weights else expected
        total = total + policy_gradient if with_advantages else total
        assert_close(loss, total)
        assert_close(tuple(statistics), tuple(value.detach() for value in expected_statistics))
        # Alike, which the forward pass has foreseen, and not alike, where the backward pass goes over the chunks again
        for reduction in (torch.mean, lambda values: (values * torch.linspace(0, 1, NUM_TOKENS)).sum()):
            result, reference = (
                torch.autograd.grad(reduction(form), (student, weight), retain_graph=True) for form in (loss, total)
            )
            assert_close(result, reference, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("fused", [fused_linear_jsd, fused_linear_sampled_token_loss])
def test_weights_of_one_and_advantages_of_zero_change_nothing(fused):
    student, teacher, weight = (tensor.float() for tensor in random_inputs())
    student.requires_grad_()
    weight.requires_grad_()
    token_ids, _, _ = of_tokens()
    settings = {"token_ids": token_ids, "beta": 0.5, "chunk_size": 5}
    expected = fused(student, teacher, weight, **settings)
    neutral = {"token_weights": torch.ones(NUM_TOKENS), "advantages": torch.zeros(NUM_TOKENS)}
    loss = fused(student, teacher, weight, **settings, **neutral)
    assert torch.equal(loss, expected)
    for result, reference in zip(gradients(loss, student, weight), gradients(expected, student, weight), strict=True):
        assert torch.equal(result, reference)


@pytest.mark.parametrize("logit_softcap", [None, 3.0])
def test_gradient_of_advantages_against_finite_differences(logit_softcap):
    generator = torch.Generator().manual_seed(0)
    student, teacher, weight = (torch.randn(rows, 3, dtype=torch.float64, generator=generator) for rows in (4, 4, 9))
    of_each_token = {
        "token_ids": torch.tensor([0, 8, 3, 3]),
        "token_weights": torch.tensor([0.0, 1.0, 0.5, 2.0], dtype=torch.float64),
        "advantages": torch.tensor([1.5, -2.0, 0.0, 0.3], dtype=torch.float64),
    }

    def objective(student, weight):
        settings = {"teacher_lm_head_weight": fixed_weight, "temperature": 1.3, "logit_softcap": logit_softcap}
        return fused_linear_jsd(student, teacher, weight, beta=0.5, chunk_size=3, **settings, **of_each_token)

    fixed_weight = weight.clone()
    assert torch.autograd.gradcheck(objective, (student.requires_grad_(), weight.requires_grad_()), atol=1e-7)


def test_advantages_without_gradient():
    student, teacher, weight = random_inputs()
    token_ids, token_weights, advantages = of_tokens()
    settings = {"token_ids": token_ids, "token_weights": token_weights, "advantages": advantages}
    expected = fused_linear_jsd(student.requires_grad_(), teacher, weight, beta=0.5, logit_softcap=5.0, **settings)
    with torch.no_grad():
        loss = fused_linear_jsd(student, teacher, weight, beta=0.5, logit_softcap=5.0, **settings)
    assert torch.equal(loss, expected)


def test_advantages_need_no_further_product_and_one_more_buffer(monkeypatch):
    student, teacher, weight = random_inputs(40)
    student.requires_grad_()
    weight.requires_grad_()
    token_ids, token_weights, advantages = of_tokens(40)
    bytes_per_token = []
    monkeypatch.setattr(opsd_loss, "_automatic_chunk_size", lambda size, _: bytes_per_token.append(size) or 10)
    num_buffers = []
    for more in ({}, {"token_weights": token_weights}, {"token_weights": token_weights, "advantages": advantages}):
        products, buffers = CountingMode("aten::mm", "aten::addmm"), CountingMode("aten::empty", "aten::empty_like")
        with products, buffers:
            fused_linear_jsd(student, teacher, weight, beta=0.5, token_ids=token_ids, **more).mean().backward()
        assert products.count == 4 * 4  # the head's gradient is known after the forward pass
        assert products.largest <= 3 * 10 * VOCAB_SIZE  # the scratch of the element-wise part
        num_buffers.append(buffers.count)
    assert bytes_per_token == [2 * 8 * VOCAB_SIZE, 2 * 8 * VOCAB_SIZE, 3 * 8 * VOCAB_SIZE]
    assert num_buffers == [num_buffers[0], num_buffers[0], num_buffers[0] + 1]


@pytest.mark.parametrize("sampled", [False, True])
def test_logit_scale_and_softcap(sampled):
    student, teacher, weight = random_inputs()
    student.requires_grad_()
    token_ids = torch.arange(NUM_TOKENS)
    scale, softcap = 0.7, 2.5
    for cap in (None, softcap):
        logits = [scale * hidden @ weight.T for hidden in (student, teacher)]
        if cap is not None:
            logits = [cap * torch.tanh(role / cap) for role in logits]
        settings = {"logit_scale": scale, "logit_softcap": cap, "temperature": 1.1, "chunk_size": 4}
        if sampled:
            expected = sampled_token_loss(*logits, token_ids, temperature=1.1)
            loss = fused_linear_sampled_token_loss(student, teacher, weight, token_ids, **settings)
        else:
            expected = generalized_jsd(*logits, beta=0.3, clip=0.01, temperature=1.1)
            loss = fused_linear_jsd(student, teacher, weight, beta=0.3, clip=0.01, **settings)
        assert_close(loss, expected)
        assert_close(gradients(loss, student), gradients(expected, student), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(("clip", "clip_mode"), [(None, "pointwise"), (0.05, "pointwise"), (0.05, "token")])
@pytest.mark.parametrize("top_k", [None, 16])
def test_identical_inputs_give_exactly_zero(beta, clip, clip_mode, top_k):
    for dtype in (torch.float32, torch.bfloat16):
        student, _, weight = (tensor.to(dtype) for tensor in random_inputs())
        student.requires_grad_()
        weight.requires_grad_()
        settings = {"temperature": 1.1, "clip": clip, "clip_mode": clip_mode, "top_k": top_k, "chunk_size": 5}
        loss = fused_linear_jsd(student, student.detach().clone(), weight, beta=beta, **settings)
        for tensor in (loss, *gradients(loss, student, weight)):
            assert torch.count_nonzero(tensor) == 0


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_extreme_logits_stay_finite(beta, clip):
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, 1e4], [1e4, -1e4, 1e4]])
    loss, statistics = fused_linear_jsd(student, teacher, torch.eye(3), beta=beta, clip=clip, return_statistics=True)
    for tensor in (loss, *statistics, *gradients(loss, student)):
        assert torch.isfinite(tensor).all()
    assert_close(loss, generalized_jsd(student, teacher, beta=beta, clip=clip))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("top_k", "top_k_of", "tail"), TOP_K)
def test_identical_inputs_give_exactly_zero_with_top_k_and_scale(beta, top_k, top_k_of, tail):
    student, _, weight = (tensor.float() for tensor in random_inputs())
    student.requires_grad_()
    weight.requires_grad_()
    settings = {"top_k": top_k, "top_k_of": top_k_of, "tail": tail, "clip": 0.05, "clip_mode": "scale"}
    loss = fused_linear_jsd(student, student.detach().clone(), weight, beta=beta, temperature=1.1, **settings)
    dense = generalized_jsd(student @ weight.T, student.detach() @ weight.detach().T, beta=beta, **settings)
    for tensor in (loss, *gradients(loss, student, weight), dense, *gradients(dense, student)):
        assert torch.count_nonzero(tensor) == 0


def test_any_reduction_and_repeated_backward():
    student, teacher, weight = random_inputs()
    student.requires_grad_()
    weight.requires_grad_()
    expected = generalized_jsd(student @ weight.T, teacher @ weight.detach().T, beta=0.5)
    loss = fused_linear_jsd(student, teacher, weight, beta=0.5, chunk_size=4)
    for reduction in (torch.mean, lambda loss: 3 * loss.sum(), lambda loss: loss.square().sum(), lambda loss: loss[2]):
        result = torch.autograd.grad(reduction(loss), (student, weight), retain_graph=True)
        reference = torch.autograd.grad(reduction(expected), (student, weight), retain_graph=True)
        assert_close(result, reference, rtol=1e-11, atol=1e-13)


def test_weight_that_is_tied_to_the_embedding():
    _, teacher, weight = random_inputs()
    weight.requires_grad_()
    token_ids = torch.arange(NUM_TOKENS)

    def hidden():
        return torch.tanh(torch.nn.functional.embedding(token_ids, weight))

    expected = generalized_jsd(hidden() @ weight.T, teacher @ weight.detach().T, beta=0.0, clip=0.05)
    loss = fused_linear_jsd(hidden(), teacher, weight, beta=0.0, clip=0.05, chunk_size=4)
    assert_close(gradients(loss, weight), gradients(expected, weight), rtol=1e-11, atol=1e-13)


def test_teacher_with_a_head_of_its_own():
    student, teacher, weight = random_inputs()
    teacher, teacher_weight = teacher[:, :5].clone().requires_grad_(), weight[:, 3:8].clone().requires_grad_()
    student.requires_grad_()
    loss = fused_linear_jsd(student, teacher, weight, teacher_lm_head_weight=teacher_weight, beta=0.5, chunk_size=4)
    expected = generalized_jsd(student @ weight.T, teacher @ teacher_weight.T, beta=0.5)
    loss.sum().backward()
    assert_close(student.grad, gradients(expected, student)[0], rtol=1e-11, atol=1e-13)
    assert teacher.grad is None
    assert teacher_weight.grad is None


def test_no_tokens_give_an_empty_loss_connected_to_the_graph():
    student, teacher, weight = random_inputs(0)
    student.requires_grad_()
    weight.requires_grad_()
    loss, statistics = fused_linear_jsd(student, teacher, weight, beta=0.0, return_statistics=True)
    assert loss.shape == statistics.divergence.shape == (0,)
    d_student, d_weight = gradients(loss, student, weight)
    assert d_student.shape == student.shape
    assert torch.equal(d_weight, torch.zeros_like(weight))
    loss = fused_linear_sampled_token_loss(student, teacher, weight, torch.empty(0, dtype=torch.int64))
    assert gradients(loss, student)[0].shape == student.shape


def test_autocast_changes_nothing():
    student, teacher, weight = (tensor.float() for tensor in random_inputs())
    student.requires_grad_()
    weight.requires_grad_()
    row_weights = torch.linspace(0, 1, NUM_TOKENS)
    plain = fused_linear_jsd(student, teacher, weight, beta=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fused_linear_jsd(student, teacher, weight, beta=0.5)
        result = gradients(loss, student, weight, row_weights=row_weights)  # the chunks again, for the weight
    assert loss.dtype == torch.float32
    assert torch.equal(loss, plain)
    assert_close(result, gradients(plain, student, weight, row_weights=row_weights), rtol=0, atol=0)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_sixteen_bits_in_but_not_between(weight_dtype):
    student, teacher, weight = (tensor.bfloat16() for tensor in random_inputs(difference=0.05))
    weight = weight.to(weight_dtype)
    reference = [tensor.double() for tensor in (student, teacher, weight)]
    for tensor in (student, weight, reference[0], reference[2]):
        tensor.requires_grad_()
    settings = {"beta": 0.0, "clip": 1e-4}
    expected = generalized_jsd(reference[0] @ reference[2].T, reference[1] @ reference[2].detach().T, **settings)
    loss = fused_linear_jsd(student, teacher, weight, chunk_size=5, **settings)
    assert loss.dtype == torch.float32
    assert (loss - expected).abs().max() < 1e-6
    result = gradients(loss, student, weight)
    for gradient, tensor, value in zip(
        result, (student, weight), gradients(expected, reference[0], reference[2]), strict=True
    ):
        assert gradient.dtype == tensor.dtype
        assert relative_error(gradient, value) < 4e-3  # the rounding of the result itself, 2^-9 at most


def test_without_gradient_there_is_no_work_for_it():
    student, teacher, weight = random_inputs()
    expected = fused_linear_jsd(student.requires_grad_(), teacher, weight, beta=0.5)
    products = CountingMode("aten::mm", "aten::addmm")
    with torch.no_grad(), products:
        loss = fused_linear_jsd(student, teacher, weight, beta=0.5)
    assert torch.equal(loss, expected)
    assert not loss.requires_grad
    assert products.count == 2
    for trained_head, number in ((False, 3), (True, 4)):
        products = CountingMode("aten::mm", "aten::addmm")
        with products:
            loss = fused_linear_jsd(student, teacher, weight.requires_grad_(trained_head), beta=0.5)
            loss.mean().backward()
        assert products.count == number


class CountingMode(TorchDispatchMode):
    """Counts the calls of operations and keeps the size of the largest tensor that any operation returned."""

    def __init__(self, *operations):
        super().__init__()
        self.operations, self.count, self.largest = operations, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += func.name().split(".")[0] in self.operations
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_no_tensor_of_the_size_of_the_logits(beta):
    student, teacher, weight = random_inputs(400)
    student.requires_grad_()
    sizes = CountingMode()
    with sizes:
        loss = fused_linear_jsd(student, teacher, weight, beta=beta, clip=0.05, chunk_size=10, return_statistics=True)
        loss[0].mean().backward()
    assert sizes.largest <= max(2 * 10 * VOCAB_SIZE + 10 * VOCAB_SIZE, student.numel())  # both roles' chunks, scratch


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 2.0}, "beta"),
        ({"clip_mode": "row"}, "clip_mode"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"lm_head_weight": torch.zeros(7, 3)}, "hidden states"),
        ({"teacher_lm_head_weight": torch.zeros(8, HIDDEN_SIZE)}, "hidden states"),
        ({"teacher_hidden": torch.zeros(2, HIDDEN_SIZE)}, "hidden states"),
        ({"token_weights": torch.ones(1)}, "weights"),
        ({"advantages": torch.ones(1), "token_ids": torch.zeros(NUM_TOKENS, dtype=torch.int64)}, "advantages"),
        ({"advantages": torch.ones(NUM_TOKENS)}, "token_ids"),
    ],
)
def test_settings_out_of_range(change, message):
    student, teacher, weight = random_inputs()
    arguments = {"student_hidden": student, "teacher_hidden": teacher, "lm_head_weight": weight, "beta": 0.5}
    with pytest.raises(ValueError, match=message):
        fused_linear_jsd(**arguments | change)


def check_kernel(device, vocab_size):
    """The Triton kernel against the eager form in float64, over what it can do; `device` "cpu" is its interpreter."""
    generator = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(4, vocab_size, generator=generator)
    teacher = student + 0.7 * torch.randn(student.shape, generator=generator)
    teacher[1] = student[1]
    student[2] *= 3e3
    token_ids = torch.randint(vocab_size, (4,), generator=generator).to(device)
    student, teacher = student.to(device), teacher.to(device)
    cases = [
        (beta, clip, clip_mode, None, False)
        for beta in (0.0, 0.3, 1.0)
        for clip, clip_mode in ((None, "pointwise"), (1e-3, "pointwise"), (0.6, "token"), (0.6, "scale"))
    ] + [
        (0.5, 1e-3, "pointwise", 5.0, False),
        (0.0, None, "pointwise", 5.0, False),
        (1.0, 0.4, "pointwise", None, True),
        (0.5, None, "pointwise", 5.0, True),
    ]
    num_reversed = 0.0
    for beta, clip, clip_mode, softcap, sampled in cases:
        objective = Objective(beta, 1.1, clip, clip_mode, None, 0.9, softcap, sampled, True)
        expected_gradient = torch.empty(student.shape, dtype=torch.float64, device=device)
        expected, expected_statistics = opsd_kernels._elementwise_eager(
            student.double(), teacher.double(), token_ids, objective, expected_gradient
        )
        gradient = student.clone()  # written in place
        values, statistics = opsd_kernels._elementwise_triton(gradient, teacher, token_ids, objective, gradient)
        for result, reference in ((values, expected), *zip(statistics, expected_statistics, strict=True)):
            assert_close(result.double(), reference, rtol=1e-4, atol=2e-6)
        num_reversed += statistics[-1].sum().item()
        assert torch.count_nonzero(gradient[1]) == 0, objective
        assert torch.isfinite(gradient[2]).all(), objective  # logits of 1e4, whose last digits are lost
        for row in (0, 3):
            assert relative_error(gradient[row], expected_gradient[row]) < 1e-4, (objective, row)
        without = objective._replace(statistics=False)
        assert torch.equal(opsd_kernels._elementwise_triton(student, teacher, token_ids, without, None)[0], values)
    assert num_reversed > 0


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("mode", ["POINTWISE", "SAMPLED"])
def test_triton_kernel_compiles(mode, tmp_path, monkeypatch):
    """For an H100, which need not be there. The interpreter accepts what the compiler does not."""
    import triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = opsd_kernels._elementwise_kernel
    constants = dict.fromkeys(("POINTWISE", "TOKEN", "SCALE", "SAMPLED"), False)
    constants |= {mode: True, "BETA": 0.5, "SOFTCAP": True, "GRADIENT": True, "STATISTICS": True, "BLOCK": 2048}
    signature = {name: "constexpr" if name in constants else "fp32" for name in kernel.arg_names}
    signature |= {name: "*fp32" for name in signature if name.endswith("_ptr")}
    signature |= {"token_ids_ptr": "*i64", "gradient_ptr": "*bf16", "vocab_size": "i32", "num_tokens": "i32"}
    source = triton.compiler.ASTSource(kernel, signature, constants)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    options = {"num_warps": 8, "enable_fp_fusion": False}
    assert "ptx" in triton.compile(source, target=target, options=options).asm


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_triton_kernel_in_its_interpreter():
    # In a process of its own, since the interpreter must be chosen before triton is imported
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            "from tests.test_fused_loss import check_kernel; check_kernel('cpu', 2500)",
        ],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=root,
        check=True,
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_triton_kernel_on_a_gpu():
    check_kernel("cuda", 151936)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("top_k", [None, 16])
@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("with_advantages", [False, True])
def test_bfloat16_on_a_gpu(beta, top_k, trained_head, with_advantages):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(300, 256, generator=generator)
    teacher = student + 0.03 * torch.randn(student.shape, generator=generator)
    weight = 0.1 * torch.randn(5000, 256, generator=generator)
    student, teacher, weight = (tensor.cuda().bfloat16() for tensor in (student, teacher, weight))
    reference = student.double().requires_grad_(), weight.double().requires_grad_()
    settings = {"beta": beta, "clip": 1e-5, "temperature": 1.1, "top_k": top_k}
    logits = reference[0] @ reference[1].T
    expected = generalized_jsd(logits, teacher.double() @ weight.double().T, **settings)
    if with_advantages:
        settings["token_ids"] = torch.randint(5000, (300,), generator=generator).cuda()
        settings["advantages"] = torch.randn(300, generator=generator).cuda()
        expected = expected + policy_gradient_loss(
            logits, settings["token_ids"], settings["advantages"], temperature=1.1
        )
    tensors = (student.requires_grad_(), weight.requires_grad_())[: 1 + trained_head]
    row_weights = torch.linspace(0, 1, 300, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = fused_linear_jsd(student, teacher, weight, chunk_size=128, **settings)
        results = gradients(loss, *tensors, row_weights=row_weights)
    assert ((loss - expected).abs() < 1e-5 * expected.abs().clamp(min=1)).all()
    expected_gradients = gradients(expected, *reference[: 1 + trained_head], row_weights=row_weights)
    for result, value in zip(results, expected_gradients, strict=True):
        assert relative_error(result, value) <= 5e-3
