"""
The objectives of OPSD from the logits of both roles: one value per token, the reference for `opsd.losses.fused`.

In the code, s = log p_S are the student's log-probabilities and t = log p_T the teacher's.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MODES = ("pointwise", "token", "scale")
TOP_K_SUPPORTS = ("teacher", "student", "both")
MASKED = -1e30  # log-probability of a masked entry; finite, so that its summand is 0 and not infinity - infinity


@dataclass(frozen=True)
class Objective:
    """Settings of the loss of a token. A value outside its range raises a ValueError."""

    # The divergence (paper eq. 7), as for `generalized_jsd`
    beta: float = 0.0
    temperature: float = 1.0
    clip: float | None = None
    clip_mode: str = "pointwise"
    top_k: int | None = None
    top_k_support: str = "teacher"
    top_k_add_tail: bool = False
    # Minimize `sampled_token_loss` (eq. 9) in its place. The divergence with `beta` is then computed for the
    # statistics only, over the full vocabulary and without a cap.
    sampled_token: bool = False
    sampled_token_clip: float | None = None  # bound on the absolute value of that loss's advantage, nats
    # If positive, `policy_gradient_loss` is added. Only its sign matters here: the caller scales the advantages.
    policy_gradient_weight: float = 0.0
    # Multiply both policy gradients, of `sampled_token` and of the advantages, by the sampled token's p_S / p_sampler.
    importance_sampling_correction: bool = False

    def __post_init__(self) -> None:
        no_clip = "positive, or None for no clip"
        for name, is_valid, expected in (
            ("beta", 0.0 <= self.beta <= 1.0, "in [0, 1]"),
            ("temperature", 0.0 < self.temperature < math.inf, "positive and finite"),
            ("clip", self.clip is None or self.clip > 0.0, no_clip),
            ("clip_mode", self.clip_mode in CLIP_MODES, f"one of {', '.join(CLIP_MODES)}"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or None for the full vocabulary"),
            ("top_k_support", self.top_k_support in TOP_K_SUPPORTS, f"one of {', '.join(TOP_K_SUPPORTS)}"),
            ("sampled_token_clip", self.sampled_token_clip is None or self.sampled_token_clip > 0.0, no_clip),
            ("policy_gradient_weight", 0.0 <= self.policy_gradient_weight < math.inf, "finite and not negative"),
        ):
            if not is_valid:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

    @property
    def divergence(self) -> "Objective":
        """Settings of the divergence that is minimized or, with `sampled_token`, only measured."""
        if not self.sampled_token:
            return self
        return replace(self, sampled_token=False, clip=None, clip_mode="pointwise", top_k=None)

    @property
    def sampler_logprob_temperature(self) -> float:
        """Temperature at which the sampler reports log-probabilities."""
        return self.temperature if self.importance_sampling_correction else 1.0

    def num_summands(self, vocab_size: int) -> int:
        """Count the values of a token that the cap applies to. An upper bound where two top-k sets are united."""
        divergence = self.divergence
        if divergence.clip_mode != "pointwise":
            return 1
        if divergence.top_k is None:
            return vocab_size
        return divergence.top_k * (2 if self.top_k_support == "both" else 1) + self.top_k_add_tail

    def policy_gradient_factors(
        self, advantages: Tensor | None, logprobs: Tensor | None, sampler_logprobs: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """
        Advantages and importance weights to use, (N,) each, `None` for what the objective has no use for.

        The importance weights p_S / p_sampler come from the two (N,) log-probabilities of the sampled tokens. They are
        multiplied into the advantages.
        """
        if self.policy_gradient_weight == 0.0:
            advantages = None
        if not self.importance_sampling_correction:
            return advantages, None
        if sampler_logprobs is None:
            raise ValueError("importance_sampling_correction needs sampler_logprobs, the sampler's log-probabilities")
        importance_weights = (logprobs - sampler_logprobs).exp()
        return None if advantages is None else advantages * importance_weights, importance_weights


class TokenStatistics(NamedTuple):
    """Statistics of each token's divergence. Detached, of the shape and dtype of the divergence."""

    divergence: Tensor  # before the clip, nats
    clipped_entries: Tensor  # number of summands (pointwise) or tokens (token, scale) above the cap
    clipped_mass: Tensor  # removed by the cap, nats
    positive_mass: Tensor  # sum of the positive values that the cap applies to, nats; `clipped_mass` is a part of it
    student_entropy: Tensor  # over the full vocabulary, nats
    teacher_entropy: Tensor
    # 1 where a step on the loss lowers the logit of the teacher's most probable token although p_T > p_S there.
    # Only the pointwise cap can cause it. With `top_k`, both probabilities are those among the kept entries.
    wrong_way: Tensor


class TokenLosses(NamedTuple):
    """Loss of each token, and what is logged about it."""

    loss: Tensor  # (N,), float32 or float64
    statistics: TokenStatistics  # (N,) each, of the divergence alone
    logprobs: Tensor | None  # (N,), log p_S of the sampled tokens at `sampler_logprob_temperature`, detached


class TopLogprobs(NamedTuple):
    """The largest log-probabilities of each token, of a teacher that does not tell the others."""

    logprobs: Tensor  # (..., k), nats
    ids: Tensor  # (..., k), int64: the entries of the vocabulary that they belong to, each once

    def fill(self, logits: Tensor) -> Tensor:
        """
        Write logits (N, V), for k at most V, whose softmax has these probabilities.

        The other entries share the rest equally. So the distribution of the k entries and one for all others is that
        of the teacher, and its entropy over the full vocabulary is an upper bound.
        """
        num_others = logits.shape[-1] - self.ids.shape[-1]
        if num_others:
            rest = 1 - self.logprobs.double().exp().sum(-1, keepdim=True)
            # Rounding errors hide a rest that is smaller
            share = rest.clamp(min=torch.finfo(self.logprobs.dtype).eps).log() - math.log(num_others)
            # Below all that are known, or it would be among the top k
            smallest = self.logprobs.min(-1, keepdim=True).values
            logits.copy_(torch.minimum(share, smallest - 1e-5).to(logits.dtype).expand_as(logits))
        return logits.scatter_(-1, self.ids, self.logprobs.to(logits.dtype))


def top_k_indices(s: Tensor, t: Tensor, top_k: int, support: str) -> tuple[Tensor, Tensor | None]:
    """
    Select the entries that `top_k` keeps of the log-probabilities s and t, (..., V).

    Returns:
        Their indices, (..., k), and `None`. For "both" the teacher's indices and then the student's, (..., 2 k), and a
        boolean mask (..., 2 k) of those that occur for the second time.
    """
    if support != "both":
        return (t if support == "teacher" else s).topk(top_k, dim=-1).indices, None
    of_teacher, of_student = (role.topk(top_k, dim=-1).indices for role in (t, s))
    in_teachers = torch.zeros_like(t, dtype=torch.bool).scatter_(-1, of_teacher, True)
    repeated = torch.cat([torch.zeros_like(of_teacher, dtype=torch.bool), in_teachers.gather(-1, of_student)], dim=-1)
    return torch.cat([of_teacher, of_student], dim=-1), repeated


def renormalize_top_k(log_probs: Tensor, indices: Tensor, repeated: Tensor | None, add_tail: bool) -> Tensor:
    """
    Restrict log-probabilities (..., V) to the kept entries (..., K), so that they sum to one again.

    Without `add_tail` the kept entries are renormalized. With it they stay as they are, and one more entry, the last
    of (..., K + 1), holds the probability of all others together. Repeated entries and an empty tail are `MASKED`.

    The tail is a logsumexp over the complement, in which nothing cancels whether it is small or almost everything.
    """
    kept = log_probs.gather(-1, indices)
    if repeated is not None:
        kept = kept.masked_fill(repeated, MASKED)
    if not add_tail:
        return kept.log_softmax(-1)
    tail = log_probs.scatter(-1, indices, MASKED).logsumexp(-1, keepdim=True)
    return torch.cat([kept, tail], dim=-1)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=-1)


def _sampled_log_softmax(logits: Tensor, token_ids: Tensor, temperature: float) -> Tensor:
    """(..., V), (...) -> (...). TRL's `selective_log_softmax` subtracts a logsumexp, with other rounding errors."""
    return _log_softmax(logits, temperature).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)


def _summands(s: Tensor, t: Tensor, beta: float) -> Tensor:
    """
    Compute the divergence's summands (..., V), one for each vocabulary entry.

    Terms of their gradient that cancel in the sum on paper are left out, so that equal distributions give a gradient
    of exactly zero (see `_divergence`).
    """
    p_s, p_t = s.exp(), t.exp()
    if beta == 0.0:
        return p_t * (t - s)  # KL(p_T || p_S)
    if beta == 1.0:
        return p_s * (s - t)  # KL(p_S || p_T)
    # log p_m - s and log p_m - t come from t - s alone, measured from the larger side: nothing cancels or overflows.
    # log p_m is a constant for the gradient: that of beta p_T (t - log p_m) + (1 - beta) p_S (s - log p_m) is
    # (1 - beta) p_S (s - log p_m) + (1 - beta) p_S - (beta p_T + (1 - beta) p_S) d(log p_m)/ds, whose last two terms
    # cancel.
    delta = (t - s).detach()
    decay = torch.expm1(-delta.abs())
    mixture_to_larger = torch.where(delta > 0, torch.log1p((1 - beta) * decay), torch.log1p(beta * decay))
    mixture_to_s = mixture_to_larger + delta.clamp(min=0)
    mixture_to_t = mixture_to_larger - delta.clamp(max=0)
    return -beta * p_t * mixture_to_t - (1 - beta) * p_s * mixture_to_s


def _moves_wrong_way(s: Tensor, t: Tensor, beta: float, clip: float, last_is_tail: bool) -> Tensor:
    """`TokenStatistics.wrong_way`, boolean (R,), for (R, V) entries with a pointwise cap that bites in every row."""
    with torch.enable_grad():
        s = s.detach().requires_grad_()
        (g,) = torch.autograd.grad(_summands(s, t, beta).clamp(max=clip).sum(), s)
    p_s, p_t = s.detach().exp(), t.exp()
    gradient = g - p_s * g.sum(-1, keepdim=True)  # with respect to logits / temperature
    top = (p_t[:, :-1] if last_is_tail else p_t).argmax(-1, keepdim=True)
    return ((p_t.gather(-1, top) > p_s.gather(-1, top)) & (gradient.gather(-1, top) > 0)).squeeze(-1)


def _divergence(
    student_logits: Tensor, teacher_logits: Tensor, objective: Objective
) -> tuple[Tensor, TokenStatistics]:
    """`generalized_jsd` with the settings of `objective`, without a mask, and its statistics."""
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student and teacher logits differ in shape: {tuple(student_logits.shape)}, {tuple(teacher_logits.shape)}"
        )
    beta, clip, clip_mode = objective.beta, objective.clip, objective.clip_mode
    top_k, add_tail = objective.top_k, objective.top_k_add_tail
    s = _log_softmax(student_logits, objective.temperature)  # (..., V)
    t = _log_softmax(teacher_logits.detach(), objective.temperature)  # (..., V)
    student_entropy, teacher_entropy = (-(role.exp() * role).sum(-1) for role in (s.detach(), t))  # (...)
    has_tail = False
    if top_k is not None and top_k < t.shape[-1]:
        indices, repeated = top_k_indices(s.detach(), t, top_k, objective.top_k_support)
        s, t = (renormalize_top_k(role, indices, repeated, add_tail) for role in (s, t))  # (..., K) or (..., K + 1)
        has_tail = add_tail

    summands = _summands(s, t, beta)  # (..., V)
    clipped = summands.clamp(max=clip) if clip is not None and clip_mode == "pointwise" else summands
    if beta in (0.0, 1.0):
        # p_S sums to 1, so adding a multiple of it to the sum changes neither value nor gradient. With this multiple
        # the two parts of the gradient cancel entry by entry, and not only up to rounding.
        p_s = s.exp()
        clipped = clipped + (1 - 2 * beta) * (p_s - p_s.detach())
    divergence = clipped.sum(-1)  # (...)
    if clip is not None and clip_mode == "token":
        divergence = divergence.clamp(max=clip)
    elif clip is not None and clip_mode == "scale":
        divergence = divergence * (clip / divergence.detach().clamp(min=clip))

    with torch.no_grad():
        capped_values = summands if clip_mode == "pointwise" else summands.sum(-1, keepdim=True)  # (..., V or 1)
        excess = (capped_values - (math.inf if clip is None else clip)).clamp(min=0)
        clipped_entries = (excess > 0).sum(-1).to(s.dtype)
        wrong_way = torch.zeros_like(clipped_entries)
        if clip is not None and clip_mode == "pointwise":
            rows = clipped_entries > 0
            wrong_way[rows] = _moves_wrong_way(s[rows], t[rows], beta, clip, has_tail).to(s.dtype)
        sums = (summands.sum(-1), clipped_entries, excess.sum(-1), capped_values.clamp(min=0).sum(-1))
    return divergence, TokenStatistics(*sums, student_entropy, teacher_entropy, wrong_way)


def generalized_jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    beta: float,
    temperature: float = 1.0,
    clip: float | None = None,
    clip_mode: str = "pointwise",
    top_k: int | None = None,
    top_k_support: str = "teacher",
    top_k_add_tail: bool = False,
) -> Tensor:
    """
    Compute the generalized Jensen-Shannon divergence between teacher and student at each token (paper eq. 7).

        D = beta KL(p_T || m) + (1 - beta) KL(p_S || m),  m = beta p_T + (1 - beta) p_S,  for 0 < beta < 1,
        D = KL(p_T || p_S) for beta = 0 (forward),  D = KL(p_S || p_T) for beta = 1 (reverse),

    where p = softmax(logits / temperature). The end points are not limits of the mixture form, which vanishes there.
    Gradients reach the student only. This is the dense reference: it holds several tensors of the size of the logits.

    Args:
        student_logits, teacher_logits: (..., V), any floating dtype; computed in float32, or in float64 if they are.
        mask: (...), true or non-zero at tokens that count; the others get the value 0 and no gradient.
        beta: in [0, 1].
        temperature: of both softmaxes.
        clip: cap in nats, or `None`. A capped value has no gradient, except with "scale".
        clip_mode: "pointwise" caps each (token, vocabulary entry) summand from above before the sum, as the release
            does; the sum can then be negative. "token" caps a token's sum D. "scale" has the same value min(D, clip),
            but its gradient is that of D times min(1, clip / D): the direction stays, and the length is bounded.
        top_k: restrict both distributions to k entries at each token. The choice is a constant for the gradient.
        top_k_support: whose k most probable entries: "teacher", "student", or "both" for the union, of up to 2 k.
        top_k_add_tail: treatment of the other entries. False: leave them out and renormalize both distributions. True:
            add one entry that holds their total probability. The result is then the divergence of coarser
            distributions, which is never above the full one.

    Returns:
        (...), nats, float32 or float64.

    Raises:
        ValueError: for settings outside their range and for logits of different shapes.
    """
    objective = Objective(beta, temperature, clip, clip_mode, top_k, top_k_support, top_k_add_tail)
    divergence, _ = _divergence(student_logits, teacher_logits, objective)
    return divergence if mask is None else torch.where(mask.bool(), divergence, 0)


def _teacher_advantages(
    student_logits: Tensor, teacher_logits: Tensor, token_ids: Tensor, temperature: float, clip: float | None
) -> Tensor:
    """Advantages A_n of `sampled_token_loss`, (...), detached."""
    s = _sampled_log_softmax(student_logits.detach(), token_ids, temperature)
    t = _sampled_log_softmax(teacher_logits.detach(), token_ids, temperature)
    return t - s if clip is None else (t - s).clamp(-clip, clip)


def sampled_token_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    clip: float | None = None,
) -> Tensor:
    """
    Compute the policy-gradient loss of the sampled tokens with the teacher's advantage (paper eq. 9).

        L_n = -A_n log p_S(y_n),  A_n = log p_T(y_n) - log p_S(y_n)

    The advantage is a constant for the gradient. The paper has no clip.

    Args:
        student_logits, teacher_logits, mask, temperature: as for `generalized_jsd`.
        token_ids: (...), int64, the sampled tokens y_n.
        clip: bound on the advantage's absolute value in nats, or `None`.

    Returns:
        (...), float32 or float64. The value is no divergence; only the gradient has a meaning.

    Raises:
        ValueError: for a temperature or clip that is not positive.
    """
    Objective(temperature=temperature, sampled_token_clip=clip)
    advantages = _teacher_advantages(student_logits, teacher_logits, token_ids, temperature, clip)
    return policy_gradient_loss(student_logits, token_ids, advantages, mask, temperature=temperature)


def policy_gradient_loss(
    student_logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """
    Compute the policy-gradient loss of the sampled tokens with given advantages: -A_n log p_S(y_n) (REINFORCE).

    The advantages, (...), are constants for the gradient. Where the tokens are drawn from p_S itself, the gradient is
    that of GRPO: its ratio of new to old policy is then 1 and its clip inactive. For tokens of another sampler,
    multiply their importance weights into A_n. Other arguments, result and errors are as for `sampled_token_loss`.
    """
    Objective(temperature=temperature)
    s = _sampled_log_softmax(student_logits, token_ids, temperature)  # (...)
    loss = -advantages.detach().to(s.dtype) * s
    return loss if mask is None else torch.where(mask.bool(), loss, 0)


def dense_token_losses(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor,
    objective: Objective,
    *,
    weights: Tensor | None = None,
    advantages: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
) -> TokenLosses:
    """
    Compute the loss of each token from the logits of both roles.

        loss_n = weights_n L_n - r_n advantages_n log p_S(y_n)

    L_n is the divergence or, with `objective.sampled_token`, r_n times the sampled-token loss. r_n is the importance
    weight p_S(y_n) / p_sampler(y_n) with `objective.importance_sampling_correction`, else 1. The second term is there
    if `objective.policy_gradient_weight` is positive.

    Args:
        student_logits, teacher_logits: (N, V). Gradients reach the student only.
        token_ids: (N,), int64, the sampled tokens y_n.
        weights: (N,), constants; `None` for ones.
        advantages: (N,), constants, which already include `policy_gradient_weight`; `None` for zeros.
        sampler_logprobs: (N,), log p_sampler(y_n) at `objective.sampler_logprob_temperature`, if the sampler reports
            it.

    Returns:
        Loss, statistics and, if `sampler_logprobs` are given, the student's log-probabilities to compare them with.

    Raises:
        ValueError: for logits of different shapes, and if the importance sampling correction lacks `sampler_logprobs`.
    """
    logprobs = None
    if sampler_logprobs is not None:
        temperature = objective.sampler_logprob_temperature
        logprobs = _sampled_log_softmax(student_logits.detach().float(), token_ids, temperature)
    advantages, importance_weights = objective.policy_gradient_factors(advantages, logprobs, sampler_logprobs)

    with torch.set_grad_enabled(torch.is_grad_enabled() and not objective.sampled_token):
        loss, statistics = _divergence(student_logits, teacher_logits, objective.divergence)
    temperature, clip = objective.temperature, objective.sampled_token_clip
    if objective.sampled_token:
        of_teacher = _teacher_advantages(student_logits, teacher_logits, token_ids, temperature, clip)
        if importance_weights is not None:
            of_teacher = of_teacher * importance_weights.to(of_teacher.dtype)
        loss = policy_gradient_loss(student_logits, token_ids, of_teacher, temperature=temperature)
    if weights is not None:
        loss = loss * weights.detach()
    if advantages is not None:
        loss = loss + policy_gradient_loss(student_logits, token_ids, advantages, temperature=temperature)
    return TokenLosses(loss, statistics, logprobs)
