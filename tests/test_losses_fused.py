"""The fused linear losses against the dense ones: values, gradients, memory, and the Triton kernel."""

import itertools
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from opsd.losses import (
    TOP_K_SUPPORTS,
    HeadSettings,
    Objective,
    dense_token_losses,
    divergence,
    elementwise,
    fused,
    fused_linear_jsd,
    fused_linear_sampled_token_loss,
    fused_token_losses,
    generalized_jsd,
    policy_gradient_loss,
    sampled_token_loss,
)

NUM_TOKENS, HIDDEN_SIZE, VOCAB_SIZE = 13, 16, 211
TOP_K = [(None, "teacher", False), *itertools.product([16], TOP_K_SUPPORTS, (False, True))]
NO_IDS = torch.zeros(NUM_TOKENS, dtype=torch.int64)  # for a divergence, which has no use for them
HEADS = [HeadSettings(), HeadSettings(logit_scale=0.9, logit_softcap=5.0)]
# Two float64 forms of one formula: rounding errors of 2e-16 in sums of a few thousand terms of size one
FLOAT64 = {"rtol": 1e-11, "atol": 1e-13}


def random_inputs(num_tokens=NUM_TOKENS, seed=0, difference=1.0):
    """Hidden states of both roles, (N, H), and a head, (V, H), float64; logits have a standard deviation of 2."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(num_tokens, HIDDEN_SIZE, dtype=torch.float64, generator=generator)
    teacher = student + difference * torch.randn(student.shape, dtype=torch.float64, generator=generator)
    weight = 0.5 * torch.randn(VOCAB_SIZE, HIDDEN_SIZE, dtype=torch.float64, generator=generator)
    return student, teacher, weight


def from_head(output, head):
    """The model's logits from the output of its head."""
    output = head.logit_scale * output
    return output if head.logit_softcap is None else head.logit_softcap * torch.tanh(output / head.logit_softcap)


def logits_of(student, teacher, weight, head=HEADS[0]):
    """Logits of both roles, (N, V), in full."""
    return from_head(student @ weight.T, head), from_head(teacher @ weight.detach().T, head)


def capped_values(
    student_logits, teacher_logits, *, beta, temperature, clip_mode, top_k=None, support=None, tail=False
):
    """Float64 values that the cap applies to: summands or, for "token" and "scale", their sums."""
    s, t = (
        torch.log_softmax(logits.detach().double() / temperature, -1) for logits in (student_logits, teacher_logits)
    )
    if top_k is not None:
        indices, repeated = divergence.top_k_indices(s, t, top_k, support)
        s, t = (divergence.renormalize_top_k(role, indices, repeated, tail) for role in (s, t))
    summands = divergence._summands(s, t, beta)
    return summands if clip_mode == "pointwise" else summands.sum(-1)


def cap_in_a_gap(values, share):
    """
    A cap with about `share` of the positive values above it, in the middle of the widest gap nearby.

    The gradient jumps where a value crosses the cap, so none may lie where a rounding error moves it across.
    """
    ordered = values[values > 0].sort().values
    middle, radius = round((1 - share) * len(ordered)), max(2, len(ordered) // 20)
    window = ordered[max(middle - radius, 0) : middle + radius]
    widest = (window[1:] / window[:-1]).argmax()
    return (window[widest] * window[widest + 1]).sqrt().item()


def relative_error(value, reference, scale=None):
    """Norm of the error over that of the reference (or of `scale`); where this is zero, the error itself."""
    norm = (reference if scale is None else scale).norm().item()
    return (value.double() - reference).norm().item() / (norm or 1.0)


def assert_as_accurate(result, eager, reference, scale=None, factor=10.0, case=None):
    """
    Check that the error of `result` is at most `factor` times that of `eager`, or that many roundings.

    `eager` is the dense form in float32; both are compared with the float64 `reference`. For a float64 `result` the
    bound is smaller by the ratio of the machine epsilons. Over six seeds the largest factor seen was 4.4.
    """
    eps = torch.finfo(torch.float32).eps
    bound = factor * max(relative_error(eager, reference, scale), eps) * torch.finfo(result.dtype).eps / eps
    error = relative_error(result, reference, scale)
    assert error <= bound, (case, error, bound)


def gradients(loss, *tensors, row_weights=None):
    loss = loss.sum() if row_weights is None else (row_weights.to(loss.dtype) * loss).sum()
    return torch.autograd.grad(loss, tensors)


def leaves(*tensors, dtype=torch.float64):
    """Student, teacher and head; the first and the last with gradient."""
    return [tensor.detach().to(dtype).requires_grad_(i != 1) for i, tensor in enumerate(tensors)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("top_k", "support", "tail"), TOP_K)
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("head", HEADS, ids=["plain", "soft-capped"])
def test_equal_to_the_dense_form(head, beta, top_k, support, tail, dtype):
    inputs = [tensor.float() for tensor in random_inputs()]  # so that all dtypes compute from the same numbers
    row_weights = torch.rand(NUM_TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    # The gap between neighbours shrinks with the cap: deep caps in float64 only
    shares = (0.02, 0.2) if dtype == torch.float32 else (0.02, 0.95)
    caps = [("pointwise", None), *(("pointwise", share) for share in shares), ("token", 0.5), ("scale", 0.5)]
    for (clip_mode, share), temperature in itertools.product(caps, (1.0, 1.1)):
        settings = {"beta": beta, "temperature": temperature, "clip_mode": clip_mode}
        kept = {"top_k": top_k, "top_k_support": support, "top_k_add_tail": tail}
        tensors = leaves(*inputs)
        logits = logits_of(*tensors, head)
        uncapped, _, _ = dense_token_losses(*logits, NO_IDS, Objective(**settings, **kept))
        uncapped_gradients = gradients(uncapped, tensors[0], tensors[2], row_weights=row_weights)
        if share is not None:
            values = capped_values(*logits, **settings, top_k=top_k, support=support, tail=tail)
            settings["clip"] = cap_in_a_gap(values, share)
        objective = Objective(**settings, **kept)
        dense = {}
        for dense_dtype in (torch.float64, torch.float32):
            tensors = leaves(*inputs, dtype=dense_dtype)
            loss, statistics, _ = dense_token_losses(*logits_of(*tensors, head), NO_IDS, objective)
            dense[dense_dtype] = loss, statistics, gradients(loss, tensors[0], tensors[2], row_weights=row_weights)
        expected, expected_statistics, expected_gradients = dense[torch.float64]
        eager, eager_statistics, eager_gradients = dense[torch.float32]
        assert (
            share is None
            or 0
            < expected_statistics.clipped_entries.sum()
            < expected_statistics.divergence.numel() * (1 if clip_mode != "pointwise" else VOCAB_SIZE)
        )

        tensors = leaves(*inputs, dtype=dtype)
        for chunk_size in (5, NUM_TOKENS, None):
            case = (clip_mode, share, temperature, chunk_size)
            loss, statistics, _ = fused_token_losses(*tensors, NO_IDS, objective, head=head, chunk_size=chunk_size)
            # Relative to what would be there without the cap, whose rounding errors stay while it may leave little
            assert_as_accurate(loss, eager, expected, scale=uncapped, case=case)
            results = gradients(loss, tensors[0], tensors[2], row_weights=row_weights)
            for *values, scale in zip(results, eager_gradients, expected_gradients, uncapped_gradients, strict=True):
                assert_as_accurate(*values, scale=scale, case=case)
            for name, *values in zip(
                statistics._fields, statistics, eager_statistics, expected_statistics, strict=True
            ):
                assert not values[0].requires_grad
                if name in ("clipped_entries", "wrong_way"):
                    assert torch.equal(values[0].double(), values[2]), (case, name)
                else:
                    assert_as_accurate(*values, scale=expected_statistics.positive_mass, case=(*case, name))


@pytest.mark.parametrize("vocab_size", [1, 3, 1024, 1025, 4096, 5000])
def test_argmax_in_blocks(vocab_size):
    values = torch.rand(5, vocab_size, generator=torch.Generator().manual_seed(0))
    values[0, -1] = values[1, 0] = 2.0
    assert torch.equal(elementwise.argmax_in_blocks(values).squeeze(-1), values.argmax(-1))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("top_k", [None, 16])
def test_statistics_do_not_depend_on_the_gradient(beta, top_k):
    student, teacher, weight = random_inputs(40)
    values = {"temperature": 1.0, "clip_mode": "pointwise", "top_k": top_k, "support": "teacher"}
    clip = cap_in_a_gap(capped_values(*logits_of(student, teacher, weight), beta=beta, **values), share=0.2)
    arguments = teacher, weight, torch.zeros(40, dtype=torch.int64), Objective(beta=beta, clip=clip, top_k=top_k)
    with torch.no_grad():
        loss, statistics, _ = fused_token_losses(student, *arguments)
    expected_loss, expected, _ = fused_token_losses(student.requires_grad_(), *arguments)
    assert torch.equal(loss, expected_loss)
    for value, reference in zip(statistics, expected, strict=True):
        assert torch.equal(value, reference)
    if beta == 0.0:  # the summand of the teacher's most probable token is among the largest fifth in most rows
        assert statistics.wrong_way.any()


def of_tokens(num_tokens=NUM_TOKENS):
    """Token ids, weights (some are zero) and advantages of both signs (one is zero), (N,) each."""
    generator = torch.Generator().manual_seed(2)
    token_ids = torch.randint(VOCAB_SIZE, (num_tokens,), generator=generator)
    weights = torch.empty(num_tokens, dtype=torch.float64).uniform_(0, 2, generator=generator)
    weights[::3] = 0
    advantages = torch.randn(num_tokens, dtype=torch.float64, generator=generator)
    advantages[1] = 0
    return token_ids, weights, advantages


@pytest.mark.parametrize("head", HEADS, ids=["plain", "soft-capped"])
@pytest.mark.parametrize(
    ("beta", "clip", "clip_mode", "top_k"),
    [
        *((beta, clip, "pointwise", None) for beta in (0.0, 0.5, 1.0, "sampled") for clip in (None, 0.01)),
        (0.0, 0.5, "token", None),
        (1.0, 0.5, "scale", None),
        (0.5, 0.01, "pointwise", 16),
    ],
)
def test_token_weights_and_advantages_are_equal_to_the_dense_form(beta, clip, clip_mode, top_k, head):
    student, teacher, weight = leaves(*random_inputs())
    token_ids, token_weights, advantages = of_tokens()
    logits = logits_of(student, teacher, weight, head)
    settings = {"beta": 0.5 if beta == "sampled" else beta, "temperature": 1.1}
    ratio, sampler_logprobs = torch.ones(NUM_TOKENS, dtype=torch.float64), None
    if beta == "sampled":
        objective = Objective(
            **settings, sampled_token=True, sampled_token_clip=clip, policy_gradient_weight=1.0,
            importance_sampling_correction=True,
        )  # fmt: skip
        ratio = torch.linspace(2, 0.5, NUM_TOKENS, dtype=torch.float64)
        s = (logits[0].detach() / 1.1).log_softmax(-1)[torch.arange(NUM_TOKENS), token_ids]
        sampler_logprobs = s - ratio.log()
        expected = ratio * sampled_token_loss(*logits, token_ids, temperature=1.1, clip=clip)
    else:
        settings |= {"clip": clip, "clip_mode": clip_mode, "top_k": top_k}
        objective = Objective(**settings, policy_gradient_weight=1.0)
        expected = generalized_jsd(*logits, **settings)
    _, expected_statistics, _ = dense_token_losses(*logits, token_ids, Objective(**settings))
    assert clip is None or beta == "sampled" or expected_statistics.clipped_entries.any()
    policy_gradient = policy_gradient_loss(logits[0], token_ids, ratio * advantages, temperature=1.1)

    for with_weights, with_advantages, chunk_size in itertools.product((True, False), (True, False), (1, 5, 13)):
        more = {"weights": token_weights} if with_weights else {}
        more |= {"advantages": advantages} if with_advantages else {}
        loss, statistics, _ = fused_token_losses(
            student, teacher, weight, token_ids, objective, head=head, chunk_size=chunk_size,
            sampler_logprobs=sampler_logprobs, **more,
        )  # fmt: skip
        total = expected * token_weights if with_weights else expected
        total = total + policy_gradient if with_advantages else total
        assert_close(loss, total)
        assert_close(tuple(statistics), tuple(value.detach() for value in expected_statistics))
        # Tokens weighted alike, as the forward pass assumes, or not: the backward pass then repeats the chunks
        for reduction in (torch.mean, lambda values: (values * torch.linspace(0, 1, NUM_TOKENS)).sum()):
            result, reference = (
                torch.autograd.grad(reduction(value), (student, weight), retain_graph=True) for value in (loss, total)
            )
            assert_close(result, reference, **FLOAT64)


def test_advantages_without_gradient():
    student, teacher, weight = random_inputs()
    token_ids, token_weights, advantages = of_tokens()
    arguments = teacher, weight, token_ids, Objective(beta=0.5, policy_gradient_weight=1.0)
    settings = {"weights": token_weights, "advantages": advantages, "head": HEADS[1]}
    expected = fused_token_losses(student.requires_grad_(), *arguments, **settings)
    with torch.no_grad():
        losses = fused_token_losses(student, *arguments, **settings)
    assert torch.equal(losses.loss, expected.loss)


def test_advantages_need_no_further_product_and_one_more_buffer(monkeypatch):
    student, teacher, weight = random_inputs(40)
    student.requires_grad_()
    weight.requires_grad_()
    token_ids, token_weights, advantages = of_tokens(40)
    bytes_per_token = []
    monkeypatch.setattr(fused, "_automatic_chunk_size", lambda size, _: bytes_per_token.append(size) or 10)
    num_buffers = []
    objective = Objective(beta=0.5, policy_gradient_weight=1.0)
    for more in ({}, {"weights": token_weights}, {"weights": token_weights, "advantages": advantages}):
        products, buffers = CountingMode("aten::mm", "aten::addmm"), CountingMode("aten::empty", "aten::empty_like")
        with products, buffers:
            fused_token_losses(student, teacher, weight, token_ids, objective, **more).loss.mean().backward()
        assert products.count == 4 * 4  # the head's gradient is known after the forward pass
        assert products.largest <= 3 * 10 * VOCAB_SIZE  # the scratch of the element-wise part
        num_buffers.append(buffers.count)
    assert bytes_per_token == [2 * 8 * VOCAB_SIZE, 2 * 8 * VOCAB_SIZE, 3 * 8 * VOCAB_SIZE]
    assert num_buffers == [num_buffers[0], num_buffers[0], num_buffers[0] + 1]


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("clip_mode", [None, "pointwise", "token", "scale"])
@pytest.mark.parametrize(("top_k", "support", "tail"), TOP_K)
def test_identical_inputs_give_exactly_zero(beta, clip_mode, top_k, support, tail):
    settings = {"beta": beta, "temperature": 1.1, "clip": clip_mode and 0.05, "clip_mode": clip_mode or "pointwise"}
    settings |= {"top_k": top_k, "top_k_support": support, "top_k_add_tail": tail}
    for dtype in (torch.float32, torch.bfloat16):
        student, _, weight = leaves(*random_inputs(), dtype=dtype)
        loss = fused_linear_jsd(student, student.detach().clone(), weight, chunk_size=5, **settings)
        dense = generalized_jsd(*logits_of(student, student.detach(), weight), **settings)
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
        assert_close(result, reference, **FLOAT64)


def test_weight_that_is_tied_to_the_embedding():
    _, teacher, weight = random_inputs()
    weight.requires_grad_()
    token_ids = torch.arange(NUM_TOKENS)

    def hidden():
        return torch.tanh(torch.nn.functional.embedding(token_ids, weight))

    expected = generalized_jsd(hidden() @ weight.T, teacher @ weight.detach().T, beta=0.0, clip=0.05)
    loss = fused_linear_jsd(hidden(), teacher, weight, beta=0.0, clip=0.05, chunk_size=4)
    assert_close(gradients(loss, weight), gradients(expected, weight), **FLOAT64)


def test_teacher_with_a_head_of_its_own():
    student, teacher, weight = random_inputs()
    teacher, teacher_weight = teacher[:, :5].clone().requires_grad_(), weight[:, 3:8].clone().requires_grad_()
    student.requires_grad_()
    loss = fused_linear_jsd(student, teacher, weight, teacher_lm_head_weight=teacher_weight, beta=0.5, chunk_size=4)
    expected = generalized_jsd(student @ weight.T, teacher @ teacher_weight.T, beta=0.5)
    loss.sum().backward()
    assert_close(student.grad, gradients(expected, student)[0], **FLOAT64)
    assert teacher.grad is None
    assert teacher_weight.grad is None


def test_no_tokens_give_an_empty_loss_connected_to_the_graph():
    student, teacher, weight = random_inputs(0)
    student.requires_grad_()
    weight.requires_grad_()
    loss, statistics, _ = fused_token_losses(student, teacher, weight, NO_IDS[:0], Objective(beta=0.0))
    assert loss.shape == statistics.divergence.shape == (0,)
    d_student, d_weight = gradients(loss, student, weight)
    assert d_student.shape == student.shape
    assert torch.equal(d_weight, torch.zeros_like(weight))
    loss = fused_linear_sampled_token_loss(student, teacher, weight, NO_IDS[:0])
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
    dense, settings = [], {"beta": 0.0, "temperature": 1.0, "clip_mode": "pointwise"}
    for dtype in (torch.float64, torch.float32):
        tensors = leaves(student, teacher, weight, dtype=dtype)
        logits = logits_of(*tensors)
        if not dense:
            clip = cap_in_a_gap(capped_values(*logits, **settings), share=0.1)
        dense.append((generalized_jsd(*logits, **settings, clip=clip), tensors))
    (expected, tensors), (eager, _) = dense
    student.requires_grad_()
    weight.requires_grad_()
    loss = fused_linear_jsd(student, teacher, weight, chunk_size=5, **settings, clip=clip)
    assert loss.dtype == torch.float32
    assert_as_accurate(loss, eager, expected)
    results, references = gradients(loss, student, weight), gradients(expected, tensors[0], tensors[2])
    for result, tensor, reference in zip(results, (student, weight), references, strict=True):
        assert result.dtype == tensor.dtype
        # The result itself is rounded to bfloat16, by 2^-9 at most; the rest of the error is of the size of float32's
        assert relative_error(result, reference) < 2**-9 + 1e-4


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
        loss = fused_linear_jsd(student, teacher, weight, beta=beta, clip=0.05, chunk_size=10)
        loss.mean().backward()
    assert sizes.largest <= max(2 * 10 * VOCAB_SIZE + 10 * VOCAB_SIZE, student.numel())  # both roles' chunks, scratch


@pytest.mark.parametrize("head", HEADS, ids=["plain", "soft-capped"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logprobs_are_those_of_the_dense_form(head, dtype):
    student, teacher, weight = (tensor.float() for tensor in random_inputs())
    token_ids, _, _ = of_tokens()
    expected, eager = (
        (logits_of(*leaves(student, teacher, weight, dtype=precision), head)[0] / 1.1).log_softmax(-1)[
            torch.arange(NUM_TOKENS), token_ids
        ]
        for precision in (torch.float64, torch.float32)
    )
    objective = Objective(temperature=1.1, importance_sampling_correction=True)
    for chunk_size in (5, None):
        student, teacher, weight = (tensor.to(dtype).requires_grad_() for tensor in (student, teacher, weight))
        *_, logprobs = fused_token_losses(
            student, teacher, weight, token_ids, objective, head=head, chunk_size=chunk_size,
            sampler_logprobs=torch.zeros(NUM_TOKENS),
        )  # fmt: skip
        assert not logprobs.requires_grad
        assert_as_accurate(logprobs, eager, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 2.0}, "beta"),
        ({"clip_mode": "row"}, "clip_mode"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"lm_head_weight": torch.zeros(7, 3)}, "hidden states"),
        ({"teacher_lm_head_weight": torch.zeros(8, HIDDEN_SIZE)}, "hidden states"),
        ({"teacher_hidden": torch.zeros(2, HIDDEN_SIZE)}, "hidden states"),
    ],
)
def test_settings_out_of_range(change, message):
    student, teacher, weight = random_inputs()
    arguments = {"student_hidden": student, "teacher_hidden": teacher, "lm_head_weight": weight, "beta": 0.5}
    with pytest.raises(ValueError, match=message):
        fused_linear_jsd(**arguments | change)


@pytest.mark.parametrize("name", ["weights", "advantages", "sampler_logprobs"])
def test_shapes_of_what_belongs_to_a_token(name):
    with pytest.raises(ValueError, match=name):
        fused_token_losses(*random_inputs(), NO_IDS, Objective(), **{name: torch.ones(1)})


def check_kernel(device, vocab_size):
    """Compare the Triton kernel with the eager form in float64, over all that it can do; "cpu": in its interpreter."""
    from opsd.losses.triton_kernel import chunk_losses_triton

    generator = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(4, vocab_size, generator=generator)
    teacher = student + 0.7 * torch.randn(student.shape, generator=generator)
    teacher[1] = student[1]
    student[2] *= 3e3  # logits of 1e4, whose last digits are lost
    token_ids = torch.randint(vocab_size, (4,), generator=generator).to(device)
    student, teacher = student.to(device), teacher.to(device)
    scaled, soft_capped = HeadSettings(0.9), HeadSettings(0.9, 5.0)
    cases = [
        (scaled, Objective(beta=beta, temperature=1.1, clip=clip and 1.0, clip_mode=clip or "pointwise"))
        for beta in (0.0, 0.3, 1.0)
        for clip in (None, "pointwise", "token", "scale")
    ] + [
        (soft_capped, Objective(beta=0.5, temperature=1.1, clip=1.0)),
        (soft_capped, Objective(beta=0.0, temperature=1.1)),
        (scaled, Objective(beta=1.0, temperature=1.1, sampled_token=True, sampled_token_clip=0.4)),
        (soft_capped, Objective(beta=0.5, temperature=1.1, sampled_token=True)),
    ]
    num_wrong_way = 0.0
    for head, objective in cases:
        if objective.clip is not None:  # away from the values of rows 0 and 3; those of row 1 are zero
            settings = {"beta": objective.beta, "temperature": 1.1, "clip_mode": objective.clip_mode}
            values = capped_values(*(from_head(role[::3].double(), head) for role in (student, teacher)), **settings)
            share = 0.01 if objective.clip_mode == "pointwise" else 0.5
            objective = replace(objective, clip=cap_in_a_gap(values, share))
        references = []
        for dtype in (torch.float64, torch.float32):
            d_logits, overwritten = student.to(dtype, copy=True), teacher.to(dtype, copy=True)
            of_rows = elementwise.chunk_losses(d_logits, overwritten, token_ids, objective, head, d_logits)
            references.append((d_logits, *of_rows))
        (d_expected, expected_losses, expected), (d_eager, eager_losses, eager) = references
        gradient = student.clone()  # written in place
        losses, statistics = chunk_losses_triton(gradient, teacher, token_ids, objective, head, gradient)
        rows = [0, 1, 3]
        assert torch.equal(statistics[[1, 6]][:, rows].double(), expected[[1, 6]][:, rows]), objective
        scale = expected[3, rows]  # of the positive summands, from which the negative ones are subtracted
        for values in zip((losses, *statistics), (eager_losses, *eager), (expected_losses, *expected), strict=True):
            assert_as_accurate(*(value[rows] for value in values), scale=scale, case=objective)
        # The advantage is a difference of two log-probabilities of about -8: where it is about 0.4 or less, it has
        # more than 20 times their rounding errors, of which the eager form may happen to make none.
        factor = 40.0 if objective.sampled_token else 10.0
        for row in (0, 3):
            assert_as_accurate(gradient[row], d_eager[row], d_expected[row], factor=factor, case=(objective, row))
        num_wrong_way += statistics[-1].sum().item()
        assert torch.count_nonzero(gradient[1]) == 0, objective
        assert torch.isfinite(gradient[2]).all(), objective
        without = chunk_losses_triton(student.clone(), teacher, token_ids, objective, head, None)
        assert torch.equal(without[0], losses)
    assert num_wrong_way > 0


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which brings NVIDIA's assembler")
@pytest.mark.parametrize("capability", [80, 90], ids=["A100", "H100"])
@pytest.mark.parametrize(
    ("beta", "modes"), [(0.0, ["POINTWISE"]), (0.5, ["POINTWISE"]), (0.5, ["TOKEN"]), (0.5, ["SAMPLED", "SOFTCAP"])]
)
def test_triton_kernel_compiles(beta, modes, capability, tmp_path, monkeypatch):
    """For GPUs that need not be there, two programs at a time on a multiprocessor, and without spilled registers."""
    import triton

    from opsd.losses.triton_kernel import token_losses_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {mode: mode in modes for mode in ("POINTWISE", "TOKEN", "SCALE", "SAMPLED", "SOFTCAP")}
    constants |= {"BETA": beta, "GRADIENT": True, "BLOCK": 2048}
    names = token_losses_kernel.arg_names
    signature = {name: "constexpr" if name in constants else "fp32" for name in names}
    signature |= {name: "*fp32" for name in signature if name.endswith("_ptr")}
    signature |= {"token_ids_ptr": "*i64", "gradient_ptr": "*bf16", "vocab_size": "i32", "num_tokens": "i32"}
    # As the launcher finds them: addresses of tensors, and Qwen3's vocabulary size
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in names if n.endswith("_ptr") or n == "vocab_size"}
    source = triton.compiler.ASTSource(token_losses_kernel, signature, constants, aligned)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": 8, "enable_fp_fusion": False})
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [tool, "--dump-resource-usage", tmp_path / "kernel.cubin"]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    assert usage["STACK"] + usage["LOCAL"] <= 16  # bytes of a thread, where spilled registers would go
    assert 2 * 8 * 32 * usage["REG"] <= 65_536  # registers of a multiprocessor


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_triton_kernel_in_its_interpreter():
    # In a process of its own, since the interpreter must be chosen before triton is imported
    code = "from tests.test_losses_fused import check_kernel; check_kernel('cpu', 2500)"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[1],
        check=True,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_triton_kernel_on_a_gpu():
    check_kernel("cuda", 151936)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("top_k", [None, 16])
@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("with_advantages", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])  # float32 is rounded under autocast
def test_bfloat16_on_a_gpu(beta, top_k, trained_head, with_advantages, dtype):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(300, 256, generator=generator)
    teacher = student + 0.03 * torch.randn(student.shape, generator=generator)
    weight = 0.1 * torch.randn(5000, 256, generator=generator)
    student, teacher, weight = (tensor.cuda().bfloat16().to(dtype) for tensor in (student, teacher, weight))
    reference = student.double().requires_grad_(), weight.double().requires_grad_()
    settings = {"beta": beta, "clip": 1e-5, "temperature": 1.1, "top_k": top_k}
    logits = reference[0] @ reference[1].T
    expected = generalized_jsd(logits, teacher.double() @ weight.double().T, **settings)
    token_ids = torch.randint(5000, (300,), generator=generator).cuda()
    advantages = torch.randn(300, generator=generator).cuda() if with_advantages else None
    if advantages is not None:
        expected = expected + policy_gradient_loss(logits, token_ids, advantages, temperature=1.1)
    objective = Objective(**settings, policy_gradient_weight=1.0)
    tensors = (student.requires_grad_(), weight.requires_grad_())[: 1 + trained_head]
    row_weights = torch.linspace(0, 1, 300, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss, *_ = fused_token_losses(
            student, teacher, weight, token_ids, objective, chunk_size=128, advantages=advantages
        )
        results = gradients(loss, *tensors, row_weights=row_weights)
    assert ((loss - expected).abs() < 1e-5 * expected.abs().clamp(min=1)).all()
    expected_gradients = gradients(expected, *reference[: 1 + trained_head], row_weights=row_weights)
    for result, value in zip(results, expected_gradients, strict=True):
        assert relative_error(result, value) <= 5e-3
