"""The dense objectives against values written out by hand, finite differences and invariances."""

import itertools
import math

import pytest
import torch
from opsd_loss import TOP_K_OF, generalized_jsd, policy_gradient_loss, sampled_token_loss
from torch.testing import assert_close

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


# The teacher's two most probable entries of four are 1 and 3, the student's 0 and 1.
FOUR_OF_STUDENT = torch.tensor([[0.5, 0.25, 0.15, 0.1]], dtype=torch.float64).log()
FOUR_OF_TEACHER = torch.tensor([[0.1, 0.6, 0.05, 0.25]], dtype=torch.float64).log()


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize(
    ("top_k", "top_k_of", "tail", "student", "teacher"),
    [
        (2, "teacher", False, (5 / 7, 2 / 7), (12 / 17, 5 / 17)),  # (0.25, 0.1) and (0.6, 0.25), renormalized
        (2, "student", False, (2 / 3, 1 / 3), (1 / 7, 6 / 7)),  # (0.5, 0.25) and (0.1, 0.6)
        (2, "both", False, (10 / 17, 5 / 17, 2 / 17), (2 / 19, 12 / 19, 5 / 19)),  # entries 0, 1, 3: 0.85 and 0.95
        (2, "teacher", True, (0.25, 0.1, 0.65), (0.6, 0.25, 0.15)),
        (2, "student", True, (0.5, 0.25, 0.25), (0.1, 0.6, 0.3)),
        (1, "both", True, (0.5, 0.25, 0.25), (0.1, 0.6, 0.3)),
        (2, "both", True, (0.5, 0.25, 0.15, 0.1), (0.1, 0.6, 0.05, 0.25)),  # only entry 2 is left for the tail
    ],
)
def test_top_k_by_hand(top_k, top_k_of, tail, student, teacher):
    settings = {"top_k": top_k, "top_k_of": top_k_of, "tail": tail}
    forward, reverse, symmetric = (
        generalized_jsd(FOUR_OF_STUDENT, FOUR_OF_TEACHER, beta=beta, **settings).item() for beta in (0.0, 1.0, 0.5)
    )
    assert_close(forward, kl(teacher, student))
    assert_close(reverse, kl(student, teacher))
    mixture = [(a + b) / 2 for a, b in zip(student, teacher, strict=True)]
    assert_close(symmetric, (kl(teacher, mixture) + kl(student, mixture)) / 2)


def test_gradient_of_the_tail_by_hand():
    # d/dz_j KL = p_S,j - p_T,j for the kept entries 1 and 3; 0 and 2 share 0.65 - 0.15 as 0.5 : 0.15.
    logits = FOUR_OF_STUDENT.clone().requires_grad_()
    generalized_jsd(logits, FOUR_OF_TEACHER, beta=0.0, top_k=2, tail=True).sum().backward()
    expected = [0.5 * 0.5 / 0.65, 0.25 - 0.6, 0.5 * 0.15 / 0.65, 0.1 - 0.25]
    assert_close(logits.grad, torch.tensor([expected], dtype=torch.float64))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("top_k_of", TOP_K_OF)
def test_with_a_tail_no_divergence_is_above_the_full_one(beta, top_k_of):
    student, teacher = random_logits(50, 12)
    full = generalized_jsd(student, teacher, beta=beta)
    last = torch.zeros_like(full)
    for top_k in (1, 3, 6, 11):
        coarse = generalized_jsd(student, teacher, beta=beta, top_k=top_k, top_k_of=top_k_of, tail=True)
        assert (coarse >= last - 1e-12).all()  # finer with each k
        assert (coarse <= full + 1e-12).all()
        last = coarse
    assert_close(last, full)  # a tail of one entry, or none
    for tail, top_k in itertools.product((False, True), (12, 99)):
        settings = {"top_k": top_k, "top_k_of": top_k_of, "tail": tail}
        assert torch.equal(generalized_jsd(student, teacher, beta=beta, **settings), full)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tail", [False, True])
def test_both_sets_may_make_up_the_whole_vocabulary(beta, tail):
    student = torch.tensor([[3.0, 2.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.0, 0.5, 2.0, 3.0]], dtype=torch.float64)
    divergence = generalized_jsd(student, teacher, beta=beta, top_k=2, top_k_of="both", tail=tail)
    full = generalized_jsd(student, teacher, beta=beta)
    assert_close(divergence, full)
    assert_close(torch.autograd.grad(divergence.sum(), student), torch.autograd.grad(full.sum(), student))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tails", [(28.0, 28.0), (28.0, 5.0), (5.0, 28.0), (28.0, 26.0), (200.0, 28.0)])
def test_tails_of_next_to_nothing(beta, tails):
    # exp(-28) = 7e-13: in float32 the sum of the kept entries is 1, and 1 minus it 0.
    student, teacher = (
        torch.tensor([[1.0 - sign, sign, -below - 0.3, -below, -below - 1.0]])
        for sign, below in zip((0.3, -0.2), tails, strict=True)
    )
    coarse = [
        torch.cat([logits[:, :2], logits[:, 2:].logsumexp(-1, keepdim=True)], dim=-1)
        for logits in (student.double().requires_grad_(), teacher.double())
    ]
    expected = generalized_jsd(*coarse, beta=beta)
    (of_coarse,) = torch.autograd.grad(expected.sum(), coarse[0])
    expected_gradient = torch.cat([of_coarse[:, :2], of_coarse[:, 2:] * student[:, 2:].double().softmax(-1)], dim=-1)

    student.requires_grad_()
    divergence = generalized_jsd(student, teacher, beta=beta, top_k=2, tail=True)
    assert_close(divergence.double(), expected, rtol=1e-5, atol=1e-7)
    (gradient,) = torch.autograd.grad(divergence.sum(), student)
    assert_close(gradient[:, :2].double(), expected_gradient[:, :2], rtol=1e-5, atol=1e-7)
    # Relative, down to what float32 can hold of the cancelling sum of g over the entries times p_S
    tail_mass = coarse[0].softmax(-1)[:, 2:].item()
    assert_close(gradient[:, 2:].double(), expected_gradient[:, 2:], rtol=1e-4, atol=1e-6 * tail_mass + 1e-40)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("clip", [None, 0.02])
@pytest.mark.parametrize(
    ("top_k_of", "tail"),
    [("teacher", True), ("student", False), ("student", True), ("both", False), ("both", True)],
)
def test_gradient_of_top_k_against_finite_differences(beta, clip, top_k_of, tail):
    student, teacher = random_logits(2, 9)
    settings = {"beta": beta, "temperature": 1.3, "clip": clip, "top_k": 3, "top_k_of": top_k_of, "tail": tail}
    assert torch.autograd.gradcheck(
        lambda logits: generalized_jsd(logits, teacher, **settings), student.requires_grad_(), eps=1e-6, atol=1e-7
    )


def test_scale_by_hand():
    # D = 1/4 log 2 = 0.173, with the gradient p_S - p_T
    logits = STUDENT.clone().requires_grad_()
    settings = {"beta": 0.0, "clip": 0.1, "clip_mode": "scale"}
    value, statistics = generalized_jsd(logits, TEACHER, **settings, return_statistics=True)
    assert_close(value.item(), 0.1)
    value.sum().backward()
    assert_close(logits.grad, 0.1 / (0.25 * LOG2) * (STUDENT.exp() - TEACHER.exp()))
    of_token = generalized_jsd(STUDENT, TEACHER, beta=0.0, clip=0.1, clip_mode="token", return_statistics=True)[1]
    assert_close(tuple(statistics), tuple(of_token))
    assert_close(generalized_jsd(STUDENT, TEACHER, beta=0.0, clip=0.2, clip_mode="scale").item(), 0.25 * LOG2)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("top_k", [None, 4])
def test_scale_bounds_the_value_and_keeps_the_direction(beta, top_k):
    student, teacher = random_logits(6, 9)
    student.requires_grad_()
    settings = {"beta": beta, "temperature": 1.3, "top_k": top_k, "tail": top_k is not None}
    full = generalized_jsd(student, teacher, **settings)
    clip = full.mean().item()
    assert 0 < (full > clip).sum() < len(full)
    scaled = generalized_jsd(student, teacher, clip=clip, clip_mode="scale", **settings)
    assert_close(scaled, full.clamp(max=clip))
    (gradient,) = torch.autograd.grad(scaled.sum(), student)
    (direction,) = torch.autograd.grad(full.sum(), student, retain_graph=True)
    assert_close(gradient, direction * (clip / full).clamp(max=1).unsqueeze(-1))

    # It is the gradient of D up to the cap and of clip (1 + log(D / clip)) above.
    def potential(logits):
        divergence = generalized_jsd(logits, teacher, **settings)
        return torch.where(divergence <= clip, divergence, clip * (1 + (divergence / clip).log())).sum()

    with torch.no_grad():
        for index in itertools.product(range(6), range(9)):
            step = torch.zeros_like(student)
            step[index] = 1e-6
            difference = (potential(student + step) - potential(student - step)) / 2e-6
            assert_close(difference.item(), gradient[index].item(), rtol=1e-6, atol=1e-8)


def test_reversed_by_hand():
    # As in `test_clipped_summands_have_no_gradient`: the teacher's favourite keeps no gradient of its own, and that on its
    # logit is -p_S,2 (g_0 + g_1) = 1/4 * 1/2 > 0, although p_T = 1/2 > 1/4 = p_S.
    logits = STUDENT.clone().requires_grad_()
    value, statistics = generalized_jsd(logits, TEACHER, beta=0.0, clip=0.1, return_statistics=True)
    value.sum().backward()
    assert_close(logits.grad[0, 2].item(), 0.125)
    assert statistics.reversed.item() == 1.0
    mask = torch.tensor([0])
    assert generalized_jsd(STUDENT, TEACHER, mask, beta=0.0, clip=0.1, return_statistics=True)[1].reversed.item() == 0
    for settings in (
        {"clip": None},
        {"clip": 0.4},  # above the largest summand
        {"clip": 0.1, "clip_mode": "token"},
        {"clip": 0.1, "clip_mode": "scale"},
    ):
        assert generalized_jsd(STUDENT, TEACHER, beta=0.0, return_statistics=True, **settings)[1].reversed.item() == 0
    # The other way round it is right that the logit goes down.
    student = torch.tensor([[0.1, 0.8, 0.1]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.45, 0.5, 0.05]], dtype=torch.float64).log()
    assert generalized_jsd(student, teacher, beta=0.0, clip=0.1, return_statistics=True)[1].reversed.item() == 0


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("clip", "clip_mode"), [(None, "pointwise"), (0.02, "pointwise"), (0.1, "token"), (0.1, "scale")]
)
def test_reversed_is_what_the_gradient_does(beta, clip, clip_mode):
    student, teacher = random_logits(200, 9)
    student.requires_grad_()
    value, statistics = generalized_jsd(
        student, teacher, beta=beta, clip=clip, clip_mode=clip_mode, return_statistics=True
    )
    (gradient,) = torch.autograd.grad(value.sum(), student)
    top = teacher.argmax(-1, keepdim=True)
    should_rise = teacher.log_softmax(-1).gather(-1, top) > student.log_softmax(-1).gather(-1, top)
    expected = (should_rise & (gradient.gather(-1, top) > 0)).squeeze(-1)
    assert torch.equal(statistics.reversed.bool(), expected)
    assert expected.any() == (clip_mode == "pointwise" and clip is not None)


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
        if not any(
            value is zero for zero in (statistics.clipped_entries, statistics.clipped_mass, statistics.reversed)
        ):
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


def test_importance_weights_by_hand():
    # A = (log(1/2) - log(1/4), log(1/4) - log(1/2)) = (log 2, -log 2), the second clipped to -0.5
    logits = STUDENT.expand(2, -1).clone().requires_grad_()
    weights = torch.tensor([0.5, 3.0], dtype=torch.float64, requires_grad=True)
    settings = {"clip": 0.5, "importance_weights": weights}
    loss = sampled_token_loss(logits, TEACHER.expand(2, -1), torch.tensor([2, 0]), **settings)
    assert_close(loss[0].item(), -0.5 * 0.5 * math.log(0.25))
    assert_close(loss[1].item(), 3 * 0.5 * math.log(0.5))
    loss.sum().backward()
    expected = [[0.25 * 0.5, 0.25 * 0.25, -0.25 * 0.75], [1.5 * 0.5, -1.5 * 0.25, -1.5 * 0.25]]
    assert_close(logits.grad, torch.tensor(expected, dtype=torch.float64))
    assert weights.grad is None


def test_importance_weights_undo_what_the_sampler_left_out():
    # E_{y ~ q}[-(p_S / q) A grad log p_S(y)] = grad KL(p_S || p_T) for any q
    student, teacher = random_logits(1, 6)
    expected = student.clone().requires_grad_()
    generalized_jsd(expected, teacher, beta=1.0).sum().backward()
    logits = student.clone().requires_grad_()
    sampler = torch.tensor([0.3, 0.1, 0.1, 0.2, 0.2, 0.1], dtype=torch.float64)
    weights = student.softmax(-1)[0] / sampler
    losses = sampled_token_loss(
        logits.expand(6, -1), teacher.expand(6, -1), torch.arange(6), importance_weights=weights
    )
    (losses * sampler).sum().backward()
    assert_close(logits.grad, expected.grad)


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


def test_policy_gradient_loss_by_hand():
    # p_S = (3/4, 1/4), at temperature 2 that of twice the logits: -A log p_S(y), and A (p_S - onehot(y)) / temperature
    logits = 2 * torch.tensor([[0.75, 0.25]] * 3, dtype=torch.float64).log()
    logits.requires_grad_()
    advantages = torch.tensor([2.0, -0.5, 3.0], requires_grad=True)
    loss = policy_gradient_loss(logits, torch.tensor([1, 0, 1]), advantages, torch.tensor([1, 1, 0]), temperature=2.0)
    assert_close(loss, torch.tensor([-2 * math.log(0.25), 0.5 * math.log(0.75), 0.0], dtype=torch.float64))
    loss.sum().backward()
    expected = [[2 * 0.75 / 2, -2 * 0.75 / 2], [0.5 * 0.25 / 2, -0.5 * 0.25 / 2], [0.0, 0.0]]
    assert_close(logits.grad, torch.tensor(expected, dtype=torch.float64))
    assert advantages.grad is None


def test_policy_gradient_loss_with_the_teachers_advantage_is_the_sampled_token_loss():
    student, teacher = random_logits(2, 3, 7)
    token_ids = torch.arange(6).view(2, 3)
    advantages = (teacher.log_softmax(-1) - student.log_softmax(-1)).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    assert_close(policy_gradient_loss(student, token_ids, advantages), sampled_token_loss(student, teacher, token_ids))


def test_gradient_of_the_policy_gradient_loss_against_finite_differences():
    logits, _ = random_logits(4, 5)
    token_ids, advantages = torch.tensor([0, 4, 2, 2]), torch.tensor([1.5, -2.0, 0.0, 0.3], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda logits: policy_gradient_loss(logits, token_ids, advantages, temperature=1.3), logits.requires_grad_()
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 1.5}, "beta"),
        ({"beta": -0.1}, "beta"),
        ({"beta": 0.5, "temperature": 0.0}, "temperature"),
        ({"beta": 0.5, "clip": -0.1}, "clip"),
        ({"beta": 0.5, "clip_mode": "row"}, "clip_mode"),
        ({"beta": 0.5, "top_k": 0}, "top_k"),
        ({"beta": 0.5, "top_k": 2, "top_k_of": "model"}, "top_k_of"),
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
