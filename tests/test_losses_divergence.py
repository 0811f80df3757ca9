"""The objectives, dense and fused, against values written out by hand, finite differences and invariances."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from opsd.losses import (
    CLIP_MODES,
    TOP_K_SUPPORTS,
    Objective,
    dense_token_losses,
    fused_linear_jsd,
    fused_linear_sampled_token_loss,
    fused_token_losses,
    generalized_jsd,
    policy_gradient_loss,
    sampled_token_loss,
)

# p_S = (1/2, 1/4, 1/4), p_T = (1/4, 1/4, 1/2)
STUDENT = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
TEACHER = torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64).log()
LOG2 = math.log(2.0)


def fused_jsd(student_logits, teacher_logits, **settings):
    """`generalized_jsd` through the fused form: hidden states are the logits, and the head is the identity."""
    head = torch.eye(student_logits.shape[-1], dtype=student_logits.dtype)
    return fused_linear_jsd(student_logits, teacher_logits, head, **settings)


def fused_sampled(student_logits, teacher_logits, token_ids, **settings):
    head = torch.eye(student_logits.shape[-1], dtype=student_logits.dtype)
    return fused_linear_sampled_token_loss(student_logits, teacher_logits, head, token_ids, **settings)


def fused_losses(student_logits, teacher_logits, token_ids, objective, **of_tokens):
    head = torch.eye(student_logits.shape[-1], dtype=student_logits.dtype)
    return fused_token_losses(student_logits, teacher_logits, head, token_ids, objective, **of_tokens)


def fused_policy_gradient(student_logits, token_ids, advantages, **settings):
    """The divergence of the student from itself, which is zero, plus the policy gradient."""
    objective = Objective(beta=0.0, policy_gradient_weight=1.0, **settings)
    return fused_losses(student_logits, student_logits.detach(), token_ids, objective, advantages=advantages).loss


@pytest.fixture(params=["dense", "fused"])
def form(request):
    return request.param


@pytest.fixture
def jsd(form):
    return {"dense": generalized_jsd, "fused": fused_jsd}[form]


@pytest.fixture
def sampled(form):
    return {"dense": sampled_token_loss, "fused": fused_sampled}[form]


@pytest.fixture
def policy_gradient(form):
    return {"dense": policy_gradient_loss, "fused": fused_policy_gradient}[form]


@pytest.fixture
def token_losses(form):
    return {"dense": dense_token_losses, "fused": fused_losses}[form]


@pytest.fixture
def measure(token_losses):
    """Divergence and `TokenStatistics` of logits (N, V)."""

    def divergence_and_statistics(student_logits, teacher_logits, **settings):
        token_ids = torch.zeros(len(student_logits), dtype=torch.int64)  # not used
        return token_losses(student_logits, teacher_logits, token_ids, Objective(**settings))[:2]

    return divergence_and_statistics


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
def test_values_by_hand(jsd, beta, expected):
    assert_close(jsd(STUDENT, TEACHER, beta=beta), torch.tensor([expected], dtype=torch.float64))


def test_forward_and_reverse_are_not_mixed_up(jsd):
    student = torch.tensor([[0.9, 0.1]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    forward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)  # KL(teacher || student)
    reverse = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)  # KL(student || teacher)
    assert_close(jsd(student, teacher, beta=0.0).item(), forward)
    assert_close(jsd(student, teacher, beta=1.0).item(), reverse)


def test_clip_by_hand(jsd, measure):
    # Summands of the forward KL: 1/4 log(1/2) = -0.173, 0, 1/2 log 2 = 0.347. The cap leaves the negative one.
    pointwise, statistics = measure(STUDENT, TEACHER, beta=0.0, clip=0.1)
    assert_close(pointwise.item(), -0.25 * LOG2 + 0.1)
    assert statistics.clipped_entries.item() == 1
    assert_close(statistics.clipped_mass.item(), 0.5 * LOG2 - 0.1)
    assert_close(statistics.positive_mass.item(), 0.5 * LOG2)
    assert_close(statistics.divergence.item(), 0.25 * LOG2)
    assert_close(statistics.student_entropy.item(), 1.5 * LOG2)  # 1/2 log 2 + 2 * 1/4 log 4

    token, statistics = measure(STUDENT, TEACHER, beta=0.0, clip=0.1, clip_mode="token")
    assert_close(token.item(), 0.1)
    assert statistics.clipped_entries.item() == 1
    assert_close(statistics.clipped_mass.item(), 0.25 * LOG2 - 0.1)
    assert jsd(STUDENT, TEACHER, beta=0.0, clip=0.05).item() < 0.0


def test_clipped_summands_have_no_gradient(jsd):
    # beta 0, logit j: (g_j - p_S,j sum g) with g_i = -p_T,i where not capped; the last entry is capped.
    logits = STUDENT.clone().requires_grad_()
    jsd(logits, TEACHER, beta=0.0, clip=0.1).sum().backward()
    g = torch.tensor([-0.25, -0.25, 0.0], dtype=torch.float64)
    assert_close(logits.grad[0], g - STUDENT[0].exp() * g.sum())

    logits = STUDENT.clone().requires_grad_()
    jsd(logits, TEACHER, beta=0.0, clip=0.1, clip_mode="token").sum().backward()
    assert_close(logits.grad, torch.zeros_like(logits))


def test_temperature_divides_both_logits(jsd):
    student, teacher = random_logits(3, 7)
    for beta in (0.0, 0.3, 1.0):
        assert_close(
            jsd(student, teacher, beta=beta, temperature=1.7),
            jsd(student / 1.7, teacher / 1.7, beta=beta),
        )


def test_top_k_keeps_the_teachers_entries_and_renormalizes(jsd):
    student = torch.tensor([[0.5, 0.2, 0.2, 0.1]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.1, 0.6, 0.2, 0.1]], dtype=torch.float64).log()
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)  # teacher (.75, .25), student (.5, .5)
    assert_close(jsd(student, teacher, beta=0.0, top_k=2).item(), expected)
    full = jsd(student, teacher, beta=0.0)
    assert_close(jsd(student, teacher, beta=0.0, top_k=4), full)
    assert_close(jsd(student, teacher, beta=0.0, top_k=99), full)


# The teacher's two most probable entries of four are 1 and 3, the student's 0 and 1.
FOUR_OF_STUDENT = torch.tensor([[0.5, 0.25, 0.15, 0.1]], dtype=torch.float64).log()
FOUR_OF_TEACHER = torch.tensor([[0.1, 0.6, 0.05, 0.25]], dtype=torch.float64).log()


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize(
    ("top_k", "top_k_support", "tail", "student", "teacher"),
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
def test_top_k_by_hand(jsd, top_k, top_k_support, tail, student, teacher):
    settings = {"top_k": top_k, "top_k_support": top_k_support, "top_k_add_tail": tail}
    forward, reverse, symmetric = (
        jsd(FOUR_OF_STUDENT, FOUR_OF_TEACHER, beta=beta, **settings).item() for beta in (0.0, 1.0, 0.5)
    )
    assert_close(forward, kl(teacher, student))
    assert_close(reverse, kl(student, teacher))
    mixture = [(a + b) / 2 for a, b in zip(student, teacher, strict=True)]
    assert_close(symmetric, (kl(teacher, mixture) + kl(student, mixture)) / 2)


def test_gradient_of_the_tail_by_hand(jsd):
    # d/dz_j KL = p_S,j - p_T,j for the kept entries 1 and 3; 0 and 2 share 0.65 - 0.15 as 0.5 : 0.15.
    logits = FOUR_OF_STUDENT.clone().requires_grad_()
    jsd(logits, FOUR_OF_TEACHER, beta=0.0, top_k=2, top_k_add_tail=True).sum().backward()
    expected = [0.5 * 0.5 / 0.65, 0.25 - 0.6, 0.5 * 0.15 / 0.65, 0.1 - 0.25]
    assert_close(logits.grad, torch.tensor([expected], dtype=torch.float64))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("top_k_support", TOP_K_SUPPORTS)
def test_with_a_tail_no_divergence_is_above_the_full_one(jsd, beta, top_k_support):
    student, teacher = random_logits(50, 12)
    full = jsd(student, teacher, beta=beta)
    last = torch.zeros_like(full)
    for top_k in (1, 3, 6, 11):
        coarse = jsd(student, teacher, beta=beta, top_k=top_k, top_k_support=top_k_support, top_k_add_tail=True)
        assert (coarse >= last - 1e-12).all()  # finer with each k
        assert (coarse <= full + 1e-12).all()
        last = coarse
    assert_close(last, full)  # a tail of one entry, or none
    for tail, top_k in itertools.product((False, True), (12, 99)):
        settings = {"top_k": top_k, "top_k_support": top_k_support, "top_k_add_tail": tail}
        assert torch.equal(jsd(student, teacher, beta=beta, **settings), full)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tail", [False, True])
def test_both_sets_may_make_up_the_whole_vocabulary(jsd, beta, tail):
    student = torch.tensor([[3.0, 2.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.0, 0.5, 2.0, 3.0]], dtype=torch.float64)
    divergence = jsd(student, teacher, beta=beta, top_k=2, top_k_support="both", top_k_add_tail=tail)
    full = jsd(student, teacher, beta=beta)
    assert_close(divergence, full)
    assert_close(torch.autograd.grad(divergence.sum(), student), torch.autograd.grad(full.sum(), student))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tails", [(28.0, 28.0), (28.0, 5.0), (5.0, 28.0), (28.0, 26.0), (200.0, 28.0)])
def test_tails_of_next_to_nothing(jsd, beta, tails):
    # exp(-28) = 7e-13: in float32 the sum of the kept entries is 1, and 1 minus it 0.
    student, teacher = (
        torch.tensor([[1.0 - sign, sign, -below - 0.3, -below, -below - 1.0]])
        for sign, below in zip((0.3, -0.2), tails, strict=True)
    )
    coarse = [
        torch.cat([logits[:, :2], logits[:, 2:].logsumexp(-1, keepdim=True)], dim=-1)
        for logits in (student.double().requires_grad_(), teacher.double())
    ]
    expected = jsd(*coarse, beta=beta)
    (of_coarse,) = torch.autograd.grad(expected.sum(), coarse[0])
    expected_gradient = torch.cat([of_coarse[:, :2], of_coarse[:, 2:] * student[:, 2:].double().softmax(-1)], dim=-1)

    student.requires_grad_()
    divergence = jsd(student, teacher, beta=beta, top_k=2, top_k_add_tail=True)
    assert_close(divergence.double(), expected, rtol=1e-5, atol=1e-7)
    (gradient,) = torch.autograd.grad(divergence.sum(), student)
    assert_close(gradient[:, :2].double(), expected_gradient[:, :2], rtol=1e-5, atol=1e-7)
    # Relative, down to what float32 can hold of the cancelling sum of g over the entries times p_S
    tail_mass = coarse[0].softmax(-1)[:, 2:].item()
    assert_close(gradient[:, 2:].double(), expected_gradient[:, 2:], rtol=1e-4, atol=1e-6 * tail_mass + 1e-40)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("clip", [None, 0.02])
@pytest.mark.parametrize(
    ("top_k_support", "tail"),
    [("teacher", True), ("student", False), ("student", True), ("both", False), ("both", True)],
)
def test_gradient_of_top_k_against_finite_differences(jsd, beta, clip, top_k_support, tail):
    student, teacher = random_logits(2, 9)
    settings = {
        "beta": beta,
        "temperature": 1.3,
        "clip": clip,
        "top_k": 3,
        "top_k_support": top_k_support,
        "top_k_add_tail": tail,
    }
    assert torch.autograd.gradcheck(
        lambda logits: jsd(logits, teacher, **settings), student.requires_grad_(), eps=1e-6, atol=1e-7
    )


def test_scale_by_hand(jsd, measure):
    # D = 1/4 log 2 = 0.173, with the gradient p_S - p_T
    logits = STUDENT.clone().requires_grad_()
    settings = {"beta": 0.0, "clip": 0.1, "clip_mode": "scale"}
    value, statistics = measure(logits, TEACHER, **settings)
    assert_close(value.item(), 0.1)
    value.sum().backward()
    assert_close(logits.grad, 0.1 / (0.25 * LOG2) * (STUDENT.exp() - TEACHER.exp()))
    of_token = measure(STUDENT, TEACHER, beta=0.0, clip=0.1, clip_mode="token")[1]
    assert_close(tuple(statistics), tuple(of_token))
    assert_close(jsd(STUDENT, TEACHER, beta=0.0, clip=0.2, clip_mode="scale").item(), 0.25 * LOG2)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("top_k", [None, 4])
def test_scale_bounds_the_value_and_keeps_the_direction(jsd, beta, top_k):
    student, teacher = random_logits(6, 9)
    student.requires_grad_()
    settings = {"beta": beta, "temperature": 1.3, "top_k": top_k, "top_k_add_tail": top_k is not None}
    full = jsd(student, teacher, **settings)
    clip = full.mean().item()
    assert 0 < (full > clip).sum() < len(full)
    scaled = jsd(student, teacher, clip=clip, clip_mode="scale", **settings)
    assert_close(scaled, full.clamp(max=clip))
    (gradient,) = torch.autograd.grad(scaled.sum(), student)
    (direction,) = torch.autograd.grad(full.sum(), student, retain_graph=True)
    assert_close(gradient, direction * (clip / full).clamp(max=1).unsqueeze(-1))

    # It is the gradient of D up to the cap and of clip (1 + log(D / clip)) above.
    def potential(logits):
        divergence = jsd(logits, teacher, **settings)
        return torch.where(divergence <= clip, divergence, clip * (1 + (divergence / clip).log())).sum()

    with torch.no_grad():
        for index in itertools.product(range(6), range(9)):
            step = torch.zeros_like(student)
            step[index] = 1e-6
            difference = (potential(student + step) - potential(student - step)) / 2e-6
            assert_close(difference.item(), gradient[index].item(), rtol=1e-6, atol=1e-8)


def test_wrong_way_by_hand(measure):
    # As in `test_clipped_summands_have_no_gradient`: the summand of the teacher's most probable token is capped. The
    # gradient of its logit is -p_S,2 (g_0 + g_1) = 1/4 * 1/2 > 0, although p_T = 1/2 > 1/4 = p_S.
    logits = STUDENT.clone().requires_grad_()
    value, statistics = measure(logits, TEACHER, beta=0.0, clip=0.1)
    value.sum().backward()
    assert_close(logits.grad[0, 2].item(), 0.125)
    assert statistics.wrong_way.item() == 1.0
    for settings in (
        {"clip": None},
        {"clip": 0.4},  # above the largest summand
        {"clip": 0.1, "clip_mode": "token"},
        {"clip": 0.1, "clip_mode": "scale"},
    ):
        assert measure(STUDENT, TEACHER, beta=0.0, **settings)[1].wrong_way.item() == 0
    # The other way round it is right that the logit goes down.
    student = torch.tensor([[0.1, 0.8, 0.1]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.45, 0.5, 0.05]], dtype=torch.float64).log()
    assert measure(student, teacher, beta=0.0, clip=0.1)[1].wrong_way.item() == 0


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("clip", "clip_mode"), [(None, "pointwise"), (0.02, "pointwise"), (0.1, "token"), (0.1, "scale")]
)
def test_wrong_way_is_what_the_gradient_does(measure, beta, clip, clip_mode):
    student, teacher = random_logits(200, 9)
    student.requires_grad_()
    value, statistics = measure(student, teacher, beta=beta, clip=clip, clip_mode=clip_mode)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    top = teacher.argmax(-1, keepdim=True)
    should_rise = teacher.log_softmax(-1).gather(-1, top) > student.log_softmax(-1).gather(-1, top)
    expected = (should_rise & (gradient.gather(-1, top) > 0)).squeeze(-1)
    assert torch.equal(statistics.wrong_way.bool(), expected)
    assert expected.any() == (clip_mode == "pointwise" and clip is not None)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("clip_mode", [None, "pointwise", "token"])
@pytest.mark.parametrize("top_k", [None, 4])
def test_gradient_against_finite_differences(jsd, measure, beta, clip_mode, top_k):
    student, teacher = random_logits(4, 9)
    clip = None
    if clip_mode == "pointwise":
        clip = 0.02
    elif clip_mode == "token":
        clip = jsd(student, teacher, beta=beta, temperature=1.3, top_k=top_k).mean().item()
    settings = {"beta": beta, "temperature": 1.3, "clip": clip, "clip_mode": clip_mode or "pointwise", "top_k": top_k}
    if clip is not None:  # the cap bites, and not everywhere
        _, statistics = measure(student, teacher, **settings)
        assert 0 < statistics.clipped_entries.sum() < (4 if clip_mode == "token" else 4 * (top_k or 9))

    def objective(logits):
        return jsd(logits, teacher, **settings)

    assert torch.autograd.gradcheck(objective, student.requires_grad_(), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("clip_mode", ["pointwise", "token"])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_equal_logits_give_exactly_zero(jsd, beta, clip, clip_mode):
    student = random_logits(5, 1000)[0].float().requires_grad_()
    divergence = jsd(student, student.detach().clone(), beta=beta, clip=clip, clip_mode=clip_mode)
    divergence.sum().backward()
    assert torch.count_nonzero(divergence) == 0
    assert torch.count_nonzero(student.grad) == 0


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 1.0])
def test_extreme_logits_stay_finite(measure, beta):
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, 1e4], [1e4, -1e4, 1e4]])
    divergence, statistics = measure(student, teacher, beta=beta)
    divergence.sum().backward()
    assert torch.isfinite(divergence).all()
    assert torch.isfinite(student.grad).all()
    assert all(torch.isfinite(value).all() for value in statistics)
    if beta == 0.5:
        assert_close(divergence[0].item(), LOG2)  # disjoint distributions


def test_float32_near_equality_keeps_its_digits(jsd):
    student, noise = random_logits(64, 500)
    teacher = student + 1e-3 * noise
    for beta in (0.0, 0.5, 1.0):
        reference = student.clone().requires_grad_()
        jsd(reference, teacher, beta=beta).sum().backward()
        logits = student.float().requires_grad_()
        jsd(logits, teacher.float(), beta=beta).sum().backward()
        error = (logits.grad - reference.grad).norm() / reference.grad.norm()
        assert error < 2e-3, (beta, error)  # the inputs' own rounding: 1e-7 of logits that differ by 1e-3


def test_mask_removes_value_and_gradient():
    student, teacher = random_logits(2, 3, 11)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    student.requires_grad_()
    settings = {"beta": 0.0, "clip": 0.05}
    token_ids, advantages = torch.arange(6).view(2, 3), torch.ones(2, 3)
    losses = {
        generalized_jsd(student, teacher, mask, **settings): generalized_jsd(student, teacher, **settings),
        sampled_token_loss(student, teacher, token_ids, mask): sampled_token_loss(student, teacher, token_ids),
        policy_gradient_loss(student, token_ids, advantages, mask.int()): policy_gradient_loss(
            student, token_ids, advantages
        ),
    }
    for loss, expected in losses.items():
        assert torch.equal(loss, expected * mask)
        assert loss[mask].all()
        (gradient,) = torch.autograd.grad(loss.sum(), student, retain_graph=True)
        assert torch.equal(gradient.any(-1), mask)


def test_values_do_not_depend_on_the_batch(jsd):
    student, teacher = random_logits(6, 13)
    together = jsd(student, teacher, beta=0.0, clip=0.05)
    apart = torch.cat([jsd(s[None], t[None], beta=0.0, clip=0.05) for s, t in zip(student, teacher, strict=True)])
    assert_close(together, apart)


def test_half_precision_logits_are_computed_in_float32():
    student, teacher = (logits.bfloat16() for logits in random_logits(3, 50))
    divergence = generalized_jsd(student, teacher, beta=0.0)
    assert divergence.dtype == torch.float32
    assert_close(divergence, generalized_jsd(student.float(), teacher.float(), beta=0.0), rtol=0, atol=0)


def test_no_gradient_reaches_the_teacher(jsd):
    student, teacher = random_logits(2, 5)
    teacher.requires_grad_()
    (jsd(student.requires_grad_(), teacher, beta=0.5)).sum().backward()
    assert teacher.grad is None


def test_sampled_token_loss_by_hand(sampled):
    logits = STUDENT.clone().requires_grad_()
    loss = sampled(logits, TEACHER, torch.tensor([2]))
    assert_close(loss.item(), -LOG2 * math.log(0.25))  # A = log(1/2) - log(1/4) = log 2
    loss.sum().backward()
    onehot = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    assert_close(logits.grad[0], -LOG2 * (onehot - STUDENT[0].exp()))  # the advantage is a constant
    assert_close(sampled(STUDENT, TEACHER, torch.tensor([0]), clip=0.3).item(), 0.3 * math.log(0.5))


def test_weights_of_the_sampled_tokens_by_hand(token_losses):
    # A = (log(1/2) - log(1/4), log(1/4) - log(1/2)) = (log 2, -log 2), the second clipped to -0.5
    logits = STUDENT.expand(2, -1).clone().requires_grad_()
    weights = torch.tensor([0.5, 3.0], dtype=torch.float64, requires_grad=True)
    objective = Objective(sampled_token=True, sampled_token_clip=0.5)
    loss, *_ = token_losses(logits, TEACHER.expand(2, -1), torch.tensor([2, 0]), objective, weights=weights)
    assert_close(loss[0].item(), -0.5 * 0.5 * math.log(0.25))
    assert_close(loss[1].item(), 3 * 0.5 * math.log(0.5))
    loss.sum().backward()
    expected = [[0.25 * 0.5, 0.25 * 0.25, -0.25 * 0.75], [1.5 * 0.5, -1.5 * 0.25, -1.5 * 0.25]]
    assert_close(logits.grad, torch.tensor(expected, dtype=torch.float64))
    assert weights.grad is None


def test_importance_weights_undo_what_the_sampler_left_out(token_losses):
    # E_{y ~ q}[-(p_S / q) A grad log p_S(y)] = grad KL(p_S || p_T) for any q
    student, teacher = random_logits(1, 6)
    expected = student.clone().requires_grad_()
    generalized_jsd(expected, teacher, beta=1.0).sum().backward()
    logits = student.clone().requires_grad_()
    sampler = torch.tensor([0.3, 0.1, 0.1, 0.2, 0.2, 0.1], dtype=torch.float64)
    weights = student.softmax(-1)[0] / sampler
    objective = Objective(sampled_token=True)
    losses, *_ = token_losses(logits.expand(6, -1), teacher.expand(6, -1), torch.arange(6), objective, weights=weights)
    (losses * sampler).sum().backward()
    assert_close(logits.grad, expected.grad)


def test_sampled_token_loss_is_the_reverse_kl_in_expectation(sampled):
    # E_{y ~ p_S}[-A grad log p_S(y)] = grad KL(p_S || p_T)
    student, teacher = random_logits(1, 6)
    expected = student.clone().requires_grad_()
    generalized_jsd(expected, teacher, beta=1.0).sum().backward()
    logits = student.clone().requires_grad_()
    tokens = torch.arange(6)
    losses = sampled(logits.expand(6, -1), teacher.expand(6, -1), tokens)
    (losses * student.softmax(-1)[0]).sum().backward()
    assert_close(logits.grad, expected.grad)


def test_policy_gradient_loss_by_hand(policy_gradient):
    # p_S = (3/4, 1/4), at temperature 2 that of twice the logits: -A log p_S(y), and A (p_S - onehot(y)) / temperature
    logits = 2 * torch.tensor([[0.75, 0.25]] * 2, dtype=torch.float64).log()
    logits.requires_grad_()
    advantages = torch.tensor([2.0, -0.5], requires_grad=True)
    loss = policy_gradient(logits, torch.tensor([1, 0]), advantages, temperature=2.0)
    assert_close(loss, torch.tensor([-2 * math.log(0.25), 0.5 * math.log(0.75)], dtype=torch.float64))
    loss.sum().backward()
    expected = [[2 * 0.75 / 2, -2 * 0.75 / 2], [0.5 * 0.25 / 2, -0.5 * 0.25 / 2]]
    assert_close(logits.grad, torch.tensor(expected, dtype=torch.float64))
    assert advantages.grad is None


def test_policy_gradient_loss_with_the_teachers_advantage_is_the_sampled_token_loss():
    student, teacher = random_logits(2, 3, 7)
    token_ids = torch.arange(6).view(2, 3)
    advantages = (teacher.log_softmax(-1) - student.log_softmax(-1)).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    assert_close(policy_gradient_loss(student, token_ids, advantages), sampled_token_loss(student, teacher, token_ids))


def test_gradient_of_the_policy_gradient_loss_against_finite_differences(policy_gradient):
    logits, _ = random_logits(4, 5)
    token_ids, advantages = torch.tensor([0, 4, 2, 2]), torch.tensor([1.5, -2.0, 0.0, 0.3], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda logits: policy_gradient(logits, token_ids, advantages, temperature=1.3), logits.requires_grad_()
    )


# Losses of tokens, as the trainer calls them


TOKEN_IDS = torch.tensor([3, 0, 7, 1])


def test_token_losses_are_the_divergence(token_losses):
    student, teacher = random_logits(4, 9)
    settings = {"temperature": 1.3, "clip": 0.02, "top_k": 5, "top_k_support": "both", "top_k_add_tail": True}
    objective = Objective(beta=0.3, **settings)
    loss, statistics, logprobs = token_losses(student, teacher, TOKEN_IDS, objective)
    expected, expected_statistics, _ = dense_token_losses(student, teacher, TOKEN_IDS, objective)
    assert_close(loss, expected)
    assert_close(tuple(statistics), tuple(expected_statistics))
    assert logprobs is None


def test_token_losses_of_the_sampled_token_log_the_divergence(token_losses):
    student, teacher = random_logits(4, 9)
    for clip_mode in CLIP_MODES:
        objective = Objective(
            beta=0.3, clip=1e-3, clip_mode=clip_mode, top_k=2, sampled_token=True, sampled_token_clip=0.5
        )
        loss, statistics, _ = token_losses(student, teacher, TOKEN_IDS, objective)
        assert_close(loss, sampled_token_loss(student, teacher, TOKEN_IDS, clip=0.5))
        _, expected, _ = dense_token_losses(student, teacher, TOKEN_IDS, Objective(beta=0.3))  # full, without a cap
        assert_close(tuple(statistics), tuple(expected))


@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("sampled_token", [False, True])
def test_weights_and_advantages_by_hand(token_losses, sampled_token, correction):
    # loss = weight L - r A log p_S(y), and L = -r log(p_T / p_S) log p_S(y) for the sampled token; r = p_S / p_sampler
    student, teacher = random_logits(4, 9)
    student.requires_grad_()
    weights = torch.tensor([1.0, 0.0, 0.5, 2.0], dtype=torch.float64)
    advantages = torch.tensor([0.0, -1.0, 2.0, 0.5], dtype=torch.float64)
    sampler_logprobs = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64).log()
    objective = Objective(
        beta=0.3,
        temperature=1.3,
        sampled_token=sampled_token,
        policy_gradient_weight=0.5,  # a switch: the advantages include it
        importance_sampling_correction=correction,
    )
    loss, _, logprobs = token_losses(
        student,
        teacher,
        TOKEN_IDS,
        objective,
        weights=weights,
        advantages=advantages,
        sampler_logprobs=sampler_logprobs,
    )
    s, t = (
        (logits / 1.3).log_softmax(-1).gather(-1, TOKEN_IDS.unsqueeze(-1)).squeeze(-1) for logits in (student, teacher)
    )
    ratio = s.detach().exp() / sampler_logprobs.exp() if correction else torch.ones(4, dtype=torch.float64)
    divergence = generalized_jsd(student, teacher, beta=0.3, temperature=1.3)
    expected = weights * (-ratio * (t - s).detach() * s if sampled_token else divergence) - ratio * advantages * s
    # The dense form takes log p_S for the ratio in float32: with an error of a few 1e-7, which the ratio shares
    float32 = {"rtol": 1e-5, "atol": 1e-6}
    assert_close(loss, expected, **float32)
    (gradient,), (expected_gradient,) = (torch.autograd.grad(form.sum(), student) for form in (loss, expected))
    assert_close(gradient, expected_gradient, **float32)

    assert not logprobs.requires_grad
    at_one = student.detach().log_softmax(-1).gather(-1, TOKEN_IDS.unsqueeze(-1)).squeeze(-1)
    assert_close(logprobs.double(), s.detach() if correction else at_one, **float32)


@pytest.mark.parametrize("sampled_token", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_one_and_advantages_of_zero_change_nothing(token_losses, sampled_token, dtype):
    student, teacher = (logits.to(dtype) for logits in random_logits(4, 9))
    student.requires_grad_()
    neutral = {"weights": torch.ones(4), "advantages": torch.zeros(4)}
    ignored = {"advantages": torch.tensor([1.0, -1.0, 2.0, 0.5])}  # the policy gradient is off
    for policy_gradient_weight, of_tokens in ((1.0, neutral), (0.0, neutral | ignored)):
        objective = Objective(beta=0.5, sampled_token=sampled_token, policy_gradient_weight=policy_gradient_weight)
        results = []
        for more in ({}, of_tokens):
            loss, statistics, _ = token_losses(student, teacher, TOKEN_IDS, objective, **more)
            results.append((loss, *statistics, *torch.autograd.grad(loss.square().sum(), student)))
        for value, expected in zip(*results, strict=True):
            assert torch.equal(value, expected)


def test_importance_sampling_correction_needs_the_samplers_logprobs(token_losses):
    student, teacher = random_logits(4, 9)
    with pytest.raises(ValueError, match="needs sampler_logprobs"):
        token_losses(student, teacher, TOKEN_IDS, Objective(sampled_token=True, importance_sampling_correction=True))


def test_no_tokens(token_losses):
    student, teacher = (logits.requires_grad_() for logits in random_logits(0, 9))
    objective = Objective(policy_gradient_weight=1.0)
    of_tokens = dict.fromkeys(("weights", "advantages", "sampler_logprobs"), torch.empty(0))
    loss, statistics, logprobs = token_losses(student, teacher, TOKEN_IDS[:0], objective, **of_tokens)
    assert loss.shape == statistics.divergence.shape == logprobs.shape == (0,)
    assert torch.autograd.grad(loss.sum(), student)[0].shape == (0, 9)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 100),
        ({"clip_mode": "token"}, 1),
        ({"top_k": 5}, 5),
        ({"top_k": 5, "top_k_support": "both", "top_k_add_tail": True}, 11),
        ({"top_k": 5, "sampled_token": True}, 100),
    ],
)
def test_num_summands(settings, expected):
    assert Objective(**settings).num_summands(100) == expected


def test_temperature_of_the_samplers_logprobs():
    assert Objective(temperature=1.3).sampler_logprob_temperature == 1.0
    assert Objective(temperature=1.3, importance_sampling_correction=True).sampler_logprob_temperature == 1.3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": math.inf}, "temperature"),
        ({"sampled_token_clip": 0.0}, "sampled_token_clip"),
        ({"policy_gradient_weight": -1.0}, "policy_gradient_weight"),
    ],
)
def test_objective_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Objective(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 1.5}, "beta"),
        ({"beta": -0.1}, "beta"),
        ({"beta": 0.5, "temperature": 0.0}, "temperature"),
        ({"beta": 0.5, "clip": -0.1}, "clip"),
        ({"beta": 0.5, "clip_mode": "row"}, "clip_mode"),
        ({"beta": 0.5, "top_k": 0}, "top_k"),
        ({"beta": 0.5, "top_k": 2, "top_k_support": "model"}, "top_k_support"),
    ],
)
def test_settings_out_of_range(jsd, settings, message):
    with pytest.raises(ValueError, match=message):
        jsd(STUDENT, TEACHER, **settings)


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
