"""The dense objectives against values written out by hand, finite differences and invariances."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from opsd_loss import generalized_jsd, sampled_token_loss

# p_S = (1/2, 1/4, 1/4), p_T = (1/4, 1/4, 1/2)
STUDENT = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
TEACHER = torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64).log()
LOG2 = math.log(2.0)


def random_logits(*shape, scale=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(scale * torch.randn(*shape, dtype=torch.float64, generator=generator) for _ in range(2))


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0.0, 0.25 * LOG2),  # 1/4 log(1/2) + 1/2 log 2
        (1.0, 0.25 * LOG2),  # 1/2 log 2 + 1/4 log(1/2)
        # m = (3/8, 1/4, 3/8): 1/2 [1/4 log(2/3) + 1/2 log(4/3)] + 1/2 [1/2 log(4/3) + 1/4 log(2/3)]
        (0.5, 0.25 * math.log(2 / 3) + 0.5 * math.log(4 / 3)),
        # m = 1/4 p_T + 3/4 p_S = (7/16, 1/4, 5/16)
        (
            0.25,
            0.25 * (0.25 * math.log(4 / 7) + 0.5 * math.log(8 / 5))
            + 0.75 * (0.5 * math.log(8 / 7) + 0.25 * math.log(4 / 5)),
        ),
    ],
)
def test_values_by_hand(beta, expected):
    assert_close(generalized_jsd(STUDENT, TEACHER, beta=beta), torch.tensor([expected], dtype=torch.float64))


def test_forward_and_reverse_are_not_mixed_up():
    student = torch.tensor([[0.9, 0.1]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    forward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)  # KL(teacher || student)
    reverse = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)  # KL(student || teacher)
    assert_close(generalized_jsd(student, teacher, beta=0.0).item(), forward)
    assert_close(generalized_jsd(student, teacher, beta=1.0).item(), reverse)


def test_clip_by_hand():
    # Summands of the forward KL: 1/4 log(1/2) = -0.173, 0, 1/2 log 2 = 0.347. The pointwise cap leaves the negative one.
    pointwise, statistics = generalized_jsd(STUDENT, TEACHER, beta=0.0, clip=0.1, return_statistics=True)
    assert_close(pointwise.item(), -0.25 * LOG2 + 0.1)
    assert statistics.clipped_entries.item() == 1
    assert_close(statistics.clipped_mass.item(), 0.5 * LOG2 - 0.1)
    assert_close(statistics.positive_mass.item(), 0.5 * LOG2)
    assert_close(statistics.divergence.item(), 0.25 * LOG2)
    assert_close(statistics.student_entropy.item(), 1.5 * LOG2)  # 1/2 log 2 + 2 * 1/4 log 4

    token, statistics = generalized_jsd(
        STUDENT, TEACHER, beta=0.0, clip=0.1, clip_mode="token", return_statistics=True
    )
    assert_close(token.item(), 0.1)
    assert statistics.clipped_entries.item() == 1
    assert_close(statistics.clipped_mass.item(), 0.25 * LOG2 - 0.1)
    assert generalized_jsd(STUDENT, TEACHER, beta=0.0, clip=0.05).item() < 0.0


def test_clipped_summands_have_no_gradient():
    # beta 0, logit j: (g_j - p_S,j sum g) with g_i = -p_T,i where not capped; the last entry is capped.
    logits = STUDENT.clone().requires_grad_()
    generalized_jsd(logits, TEACHER, beta=0.0, clip=0.1).sum().backward()
    g = torch.tensor([-0.25, -0.25, 0.0], dtype=torch.float64)
    assert_close(logits.grad[0], g - STUDENT[0].exp() * g.sum())

    logits = STUDENT.clone().requires_grad_()
    generalized_jsd(logits, TEACHER, beta=0.0, clip=0.1, clip_mode="token").sum().backward()
    assert_close(logits.grad, torch.zeros_like(logits))


def test_temperature_divides_both_logits():
    student, teacher = random_logits(3, 7)
    for beta in (0.0, 0.3, 1.0):
        assert_close(
            generalized_jsd(student, teacher, beta=beta, temperature=1.7),
            generalized_jsd(student / 1.7, teacher / 1.7, beta=beta),
        )


def test_top_k_keeps_the_teachers_entries_and_renormalizes():
    student = torch.tensor([[0.5, 0.2, 0.2, 0.1]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.1, 0.6, 0.2, 0.1]], dtype=torch.float64).log()
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)  # teacher (.75, .25), student (.5, .5)
    assert_close(generalized_jsd(student, teacher, beta=0.0, top_k=2).item(), expected)
    full = generalized_jsd(student, teacher, beta=0.0)
    assert_close(generalized_jsd(student, teacher, beta=0.0, top_k=4), full)
    assert_close(generalized_jsd(student, teacher, beta=0.0, top_k=99), full)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("clip_mode", [None, "pointwise", "token"])
@pytest.mark.parametrize("top_k", [None, 4])
def test_gradient_against_finite_differences(beta, clip_mode, top_k):
    student, teacher = random_logits(4, 9)
    clip = None
    if clip_mode == "pointwise":
        clip = 0.02
    elif clip_mode == "token":
        clip = generalized_jsd(student, teacher, beta=beta, temperature=1.3, top_k=top_k).mean().item()
    settings = {"beta": beta, "temperature": 1.3, "clip": clip, "clip_mode": clip_mode or "pointwise", "top_k": top_k}
    if clip is not None:  # the cap bites, and not everywhere
        _, statistics = generalized_jsd(student, teacher, **settings, return_statistics=True)
        assert 0 < statistics.clipped_entries.sum() < (4 if clip_mode == "token" else 4 * (top_k or 9))

    def objective(logits):
        return generalized_jsd(logits, teacher, **settings)

    assert torch.autograd.gradcheck(objective, student.requires_grad_(), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("clip_mode", ["pointwise", "token"])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_equal_logits_give_exactly_zero(beta, clip, clip_mode):
    student = random_logits(5, 1000)[0].float().requires_grad_()
    divergence = generalized_jsd(student, student.detach().clone(), beta=beta, clip=clip, clip_mode=clip_mode)
    divergence.sum().backward()
    assert torch.count_nonzero(divergence) == 0
    assert torch.count_nonzero(student.grad) == 0


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 1.0])
def test_extreme_logits_stay_finite(beta):
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, 1e4], [1e4, -1e4, 1e4]])
    divergence, statistics = generalized_jsd(student, teacher, beta=beta, return_statistics=True)
    divergence.sum().backward()
    assert torch.isfinite(divergence).all()
    assert torch.isfinite(student.grad).all()
    assert all(torch.isfinite(value).all() for value in statistics)
    if beta == 0.5:
        assert_close(divergence[0].item(), LOG2)  # disjoint distributions


def test_float32_near_equality_keeps_its_digits():
    student, noise = random_logits(64, 500)
    teacher = student + 1e-3 * noise
    for beta in (0.0, 0.5, 1.0):
        reference = student.clone().requires_grad_()
        generalized_jsd(reference, teacher, beta=beta).sum().backward()
        logits = student.float().requires_grad_()
        generalized_jsd(logits, teacher.float(), beta=beta).sum().backward()
        error = (logits.grad - reference.grad).norm() / reference.grad.norm()
        assert error < 2e-3, (beta, error)  # the inputs' own rounding: 1e-7 of logits that differ by 1e-3


def test_mask_removes_value_gradient_and_statistics():
    student, teacher = random_logits(2, 3, 11)
    mask = torch.tensor([[1, 0, 1], [0, 0, 0]])
    student.requires_grad_()
    divergence, statistics = generalized_jsd(student, teacher, mask, beta=0.5, return_statistics=True)
    assert_close(divergence[0, [0, 2]], generalized_jsd(student, teacher, beta=0.5)[0, [0, 2]])
    divergence.sum().backward()
    for value in (divergence, *statistics, student.grad.abs().sum(-1)):
        assert torch.count_nonzero(value[~mask.bool()]) == 0
        if value is not statistics.clipped_entries and value is not statistics.clipped_mass:
            assert torch.count_nonzero(value[mask.bool()]) == 2


def test_values_do_not_depend_on_the_batch():
    student, teacher = random_logits(6, 13)
    together = generalized_jsd(student, teacher, beta=0.0, clip=0.05)
    apart = torch.cat(
        [generalized_jsd(s[None], t[None], beta=0.0, clip=0.05) for s, t in zip(student, teacher, strict=True)]
    )
    assert_close(together, apart)


def test_half_precision_logits_are_computed_in_float32():
    student, teacher = (logits.bfloat16() for logits in random_logits(3, 50))
    divergence = generalized_jsd(student, teacher, beta=0.0)
    assert divergence.dtype == torch.float32
    assert_close(divergence, generalized_jsd(student.float(), teacher.float(), beta=0.0), rtol=0, atol=0)


def test_no_gradient_reaches_the_teacher():
    student, teacher = random_logits(2, 5)
    teacher.requires_grad_()
    (generalized_jsd(student.requires_grad_(), teacher, beta=0.5)).sum().backward()
    assert teacher.grad is None


def test_sampled_token_loss_by_hand():
    logits = STUDENT.clone().requires_grad_()
    loss = sampled_token_loss(logits, TEACHER, torch.tensor([2]))
    assert_close(loss.item(), -LOG2 * math.log(0.25))  # A = log(1/2) - log(1/4) = log 2
    loss.sum().backward()
    onehot = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    assert_close(logits.grad[0], -LOG2 * (onehot - STUDENT[0].exp()))  # the advantage is a constant
    assert_close(sampled_token_loss(STUDENT, TEACHER, torch.tensor([0]), clip=0.3).item(), 0.3 * math.log(0.5))
    assert sampled_token_loss(STUDENT, TEACHER, torch.tensor([2]), torch.tensor([0])).item() == 0.0


def test_sampled_token_loss_is_the_reverse_kl_in_expectation():
    # E_{y ~ p_S}[-A grad log p_S(y)] = grad KL(p_S || p_T)
    student, teacher = random_logits(1, 6)
    expected = student.clone().requires_grad_()
    generalized_jsd(expected, teacher, beta=1.0).sum().backward()
    logits = student.clone().requires_grad_()
    tokens = torch.arange(6)
    losses = sampled_token_loss(logits.expand(6, -1), teacher.expand(6, -1), tokens)
    (losses * student.softmax(-1)[0]).sum().backward()
    assert_close(logits.grad, expected.grad)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 1.5}, "beta"),
        ({"beta": -0.1}, "beta"),
        ({"beta": 0.5, "temperature": 0.0}, "temperature"),
        ({"beta": 0.5, "clip": -0.1}, "clip"),
        ({"beta": 0.5, "clip_mode": "row"}, "clip_mode"),
        ({"beta": 0.5, "top_k": 0}, "top_k"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        generalized_jsd(STUDENT, TEACHER, **settings)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shape"):
        generalized_jsd(STUDENT, TEACHER[:, :2], beta=0.0)


def test_agrees_with_trl_without_clip():
    from trl.experimental.gold import GOLDTrainer

    student, teacher = random_logits(2, 3, 17)
    for beta, temperature in itertools.product((0.0, 0.2, 0.5, 1.0), (1.0, 1.1)):
        theirs = GOLDTrainer.generalized_jsd_loss(
            student, teacher, beta=beta, temperature=temperature, reduction="none"
        ).sum(-1)
        assert_close(generalized_jsd(student, teacher, beta=beta, temperature=temperature), theirs)
