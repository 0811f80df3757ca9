"""The objectives of OPSD as pure tensor functions: divergences between student and teacher, one value per token."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MODES = ("pointwise", "token")


class TokenStatistics(NamedTuple):
    """What the divergence of each token is made of. Detached, of the shape and dtype of the divergence."""

    divergence: Tensor  # before the clip, nats
    clipped_entries: Tensor  # how many summands (pointwise) or tokens (token) lay above the cap
    clipped_mass: Tensor  # what the cap took away, nats
    positive_mass: Tensor  # sum of what the cap applies to, where positive: the whole of `clipped_mass`, nats
    student_entropy: Tensor  # over the full vocabulary, nats
    teacher_entropy: Tensor


def check_objective(
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
    clip: float | None,
    clip_mode: str = "pointwise",
    top_k: int | None = None,
) -> None:
    """Raise `ValueError` for settings that no objective here is defined for."""
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must lie in [0, 1], got {beta}")
    if not (temperature > 0.0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive, got {temperature}")
    if clip is not None and not clip > 0.0:
        raise ValueError(f"clip must be positive, or None for no clip, got {clip}")
    if clip_mode not in CLIP_MODES:
        raise ValueError(f"clip_mode must be one of {', '.join(CLIP_MODES)}, got {clip_mode!r}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, or None for the full vocabulary, got {top_k}")


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=-1)


def _entropy(log_probs: Tensor) -> Tensor:
    return -(log_probs.exp() * log_probs).sum(-1)


def _summands(s: Tensor, t: Tensor, beta: float) -> Tensor:
    """
    The divergence's terms, one for each vocabulary entry, from the log-probabilities s = log p_S and t = log p_T.

    Each carries in its gradient with respect to s what is left of it when the terms that cancel on paper are left
    out, so that equal distributions give a gradient of exactly zero (see `generalized_jsd`).
    """
    p_s, p_t = s.exp(), t.exp()
    if beta == 0.0:
        return p_t * (t - s)  # KL(p_T || p_S)
    if beta == 1.0:
        return p_s * (s - t)  # KL(p_S || p_T)
    # log p_m - s and log p_m - t, from their difference alone and from the larger side, where nothing cancels or
    # overflows. The gradient through log p_m is zero: that of beta p_T (t - log p_m) + (1 - beta) p_S (s - log p_m) is
    # (1 - beta) p_S (s - log p_m) + (1 - beta) p_S - (beta p_T + (1 - beta) p_S) d(log p_m)/ds, and the last two cancel.
    delta = (t - s).detach()
    decay = torch.expm1(-delta.abs())
    mixture_to_larger = torch.where(delta > 0, torch.log1p((1 - beta) * decay), torch.log1p(beta * decay))
    mixture_to_s = mixture_to_larger + delta.clamp(min=0)
    mixture_to_t = mixture_to_larger - delta.clamp(max=0)
    return -beta * p_t * mixture_to_t - (1 - beta) * p_s * mixture_to_s


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
    return_statistics: bool = False,
) -> Tensor | tuple[Tensor, TokenStatistics]:
    """
    Generalized Jensen-Shannon divergence between teacher and student at each token (paper eq. 7).

        D = beta KL(p_T || m) + (1 - beta) KL(p_S || m),  m = beta p_T + (1 - beta) p_S,  for 0 < beta < 1,
        D = KL(p_T || p_S) for beta = 0 (forward),  D = KL(p_S || p_T) for beta = 1 (reverse),

    where p = softmax(logits / temperature). The end points are not limits of the mixture form, which vanishes there.
    Gradients reach the student only. This is the dense reference: it holds several tensors of the size of the logits.

    Args:
        student_logits, teacher_logits: (..., V), any floating dtype; computed in float32, or in float64 if they are.
        mask: (...), true or non-zero at tokens that count; the others get the value 0 and no gradient.
        beta: in [0, 1].
        temperature: of both softmaxes.
        clip: cap in nats; a capped term has no gradient. `None` for no cap.
        clip_mode: "pointwise" caps each (token, vocabulary entry) summand from above before the sum, as the release
            does, whose sum can then be negative; "token" caps a token's sum.
        top_k: restrict both distributions to the teacher's k most probable entries, renormalized.
        return_statistics: return (divergence, `TokenStatistics`) instead.

    Returns:
        (...), nats, float32 or float64.

    Raises:
        ValueError: for settings outside their range and for logits of different shapes.
    """
    check_objective(beta=beta, temperature=temperature, clip=clip, clip_mode=clip_mode, top_k=top_k)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student and teacher logits differ in shape: {tuple(student_logits.shape)}, {tuple(teacher_logits.shape)}"
        )
    s = _log_softmax(student_logits, temperature)  # (..., V)
    t = _log_softmax(teacher_logits.detach(), temperature)  # (..., V)
    student_entropy, teacher_entropy = _entropy(s.detach()), _entropy(t)  # (...)
    if top_k is not None and top_k < t.shape[-1]:
        t, indices = t.topk(top_k, dim=-1)  # (..., k)
        s = s.gather(-1, indices).log_softmax(-1)
        t = t.log_softmax(-1)

    summands = _summands(s, t, beta)  # (..., V)
    clipped = summands.clamp(max=clip) if clip is not None and clip_mode == "pointwise" else summands
    if beta in (0.0, 1.0):
        # The sum of p_S is 1, so that adding a multiple of it to the sum changes neither value nor gradient; with this
        # multiple the two parts of the gradient cancel entry by entry, and not only after rounding.
        p_s = s.exp()
        clipped = clipped + (1 - 2 * beta) * (p_s - p_s.detach())
    divergence = clipped.sum(-1)  # (...)
    if clip is not None and clip_mode == "token":
        divergence = divergence.clamp(max=clip)
    if mask is not None:
        divergence = torch.where(mask.bool(), divergence, 0)
    if not return_statistics:
        return divergence

    with torch.no_grad():
        capped_values = (
            summands if clip_mode == "pointwise" else summands.sum(-1, keepdim=True)
        )  # (..., V) or (..., 1)
        above = (capped_values - (math.inf if clip is None else clip)).clamp(min=0)
        statistics = TokenStatistics(
            divergence=summands.sum(-1),
            clipped_entries=(above > 0).sum(-1).to(s.dtype),
            clipped_mass=above.sum(-1),
            positive_mass=capped_values.clamp(min=0).sum(-1),
            student_entropy=student_entropy,
            teacher_entropy=teacher_entropy,
        )
        if mask is not None:
            statistics = TokenStatistics(*(torch.where(mask.bool(), value, 0) for value in statistics))
    return divergence, statistics


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
    Policy-gradient loss of the sampled tokens alone (paper eq. 9): -A_n log p_S(y_n), A_n = log p_T(y_n) - log p_S(y_n).

    The advantage A_n is a constant for the gradient. `clip` bounds it to [-clip, clip].

    Args:
        student_logits, teacher_logits: (..., V).
        token_ids: (...), int64, the sampled tokens y_n.
        mask: (...), true or non-zero at tokens that count.
        temperature: of both softmaxes.
        clip: bound on the advantage's absolute value in nats, or `None`.

    Returns:
        (...), float32 or float64. Its value is no divergence; only its gradient has a meaning.

    Raises:
        ValueError: for a temperature or clip that is not positive.
    """
    check_objective(temperature=temperature, clip=clip)
    index = token_ids.unsqueeze(-1)
    s = _log_softmax(student_logits, temperature).gather(-1, index).squeeze(-1)  # (...)
    t = _log_softmax(teacher_logits.detach(), temperature).gather(-1, index).squeeze(-1)  # (...)
    advantage = (t - s).detach()
    if clip is not None:
        advantage = advantage.clamp(-clip, clip)
    loss = -advantage * s
    return loss if mask is None else torch.where(mask.bool(), loss, 0)
