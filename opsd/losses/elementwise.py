"""
From the logits of a chunk of tokens to the losses and their gradient, with PyTorch operations that work in place.

The gradient is always the one with respect to the scaled head output a = logit_scale / temperature * hidden W^T.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from opsd.losses.divergence import MASKED, Objective, renormalize_top_k, top_k_indices


@dataclass(frozen=True)
class HeadSettings:
    """Transformation of the head's output x to the model's logits: c tanh(scale x / c), or scale x without c."""

    logit_scale: float = 1.0
    logit_softcap: float | None = None  # c

    def factors(self, temperature: float) -> tuple[float, float | None]:
        """Scale and cap with which logits / temperature are cap * tanh(scale * x), or scale * x without a cap."""
        if self.logit_softcap is None:
            return self.logit_scale / temperature, None
        return self.logit_scale / self.logit_softcap, self.logit_softcap / temperature


def chunk_losses(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor,
    objective: Objective,
    head: HeadSettings,
    gradient: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """
    Compute the losses of a chunk of n tokens, their statistics and their gradient.

    Works on a few rows at a time, so that its many passes stay within a CPU's cache and need little memory.

    Args:
        student_logits, teacher_logits: (n, V), the head's output, contiguous, float32 or float64; overwritten.
        token_ids: (n,), int64; used with `objective.sampled_token`.
        gradient: (n, V) of any floating dtype, may be `student_logits`: receives the gradient of each token's loss.
            `None` if it is not needed.

    Returns:
        Losses (n,) and statistics (7, n), in the order of `TokenStatistics`; of the logits' dtype.
    """
    num_tokens, vocab_size = student_logits.shape
    block_size = max(1, (2**20 if student_logits.device.type == "cpu" else 2**24) // vocab_size)
    scratch = student_logits.new_empty(3, min(block_size, num_tokens), vocab_size)
    tensors = (student_logits, teacher_logits, token_ids)
    of_blocks = [
        _losses_in_place(student, teacher, ids, scratch[:, : len(ids)], objective, head, gradient is not None)
        for student, teacher, ids in zip(*(tensor.split(block_size) for tensor in tensors), strict=True)
    ]
    if gradient is not None and gradient.data_ptr() != student_logits.data_ptr():
        gradient.copy_(student_logits)
    of_chunk = torch.cat(of_blocks, dim=1)
    return of_chunk[0], of_chunk[1:]


def chunk_policy_gradient(
    student_logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    objective: Objective,
    head: HeadSettings,
    scratch: Tensor,
    gradient: Tensor,
) -> Tensor:
    """
    Compute `policy_gradient_loss`, (n,), of a chunk of n tokens.

    Reads the head's output `student_logits`, (n, V), overwrites `scratch`, (n, V), and writes the gradient of each
    token's loss into `gradient`, (n, V). Token ids and advantages are (n,).
    """
    scale, cap = head.factors(objective.temperature)
    z = torch.mul(student_logits, scale, out=scratch)
    if cap is not None:
        z.tanh_().mul_(cap)
    index = token_ids.unsqueeze(-1)  # (n, 1)
    log_probs = torch.log_softmax(z, -1, out=gradient).gather(-1, index)  # (n, 1)
    # A (p_S - onehot(y)), where p_S(y) - 1 = expm1(log p_S(y)) keeps its digits at probabilities close to 1
    gradient.exp_().scatter_(-1, index, log_probs.expm1()).mul_(advantages.unsqueeze(-1))
    if head.logit_softcap is not None:  # d tanh = 1 - tanh^2
        gradient.mul_(z.mul_(objective.temperature / head.logit_softcap).square_().neg_().add_(1))
    return -advantages * log_probs.squeeze(-1)


def _losses_in_place(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor,
    scratch: Tensor,
    objective: Objective,
    head: HeadSettings,
    needs_gradient: bool,
) -> Tensor:
    """
    Losses and statistics, (8, R), of a block of logits (R, V).

    Overwrites the logits of both roles and `scratch`, (3, R, V). With `needs_gradient` the student's logits become the
    gradient of the losses.
    """
    scale, cap = head.factors(objective.temperature)
    slope = None  # d tanh of the student's logits
    for logits in (teacher_logits, student_logits):
        if cap is not None:
            logits.mul_(scale).tanh_()
            slope = 1 - logits.square() if needs_gradient else None  # the student comes last
            logits.mul_(cap)
        elif scale != 1.0:
            logits.mul_(scale)
    s = torch.log_softmax(student_logits, -1, out=scratch[0])
    t = torch.log_softmax(teacher_logits, -1, out=scratch[1])
    p_s, p_t, free = torch.exp(s, out=student_logits), torch.exp(t, out=teacher_logits), scratch[2]
    entropies = [-torch.mul(p, x, out=free).sum(-1) for p, x in ((p_s, s), (p_t, t))]

    divergence, top_k, add_tail = objective.divergence, objective.top_k, objective.top_k_add_tail
    if objective.sampled_token:
        index = token_ids.unsqueeze(-1)  # (R, 1)
        log_probs = s.gather(-1, index)
        advantages = t.gather(-1, index) - log_probs
        if objective.sampled_token_clip is not None:
            advantages.clamp_(-objective.sampled_token_clip, objective.sampled_token_clip)
        losses = (-advantages * log_probs).squeeze(-1)
        _, statistics = _divergence_in_place(p_s, p_t, s, t, free, divergence, needs_gradient=False)
        if needs_gradient:
            p_s.mul_(advantages).scatter_add_(-1, index, -advantages)
    elif top_k is not None and top_k < t.shape[-1]:
        indices, repeated = top_k_indices(s, t, top_k, objective.top_k_support)
        s_k, t_k = (renormalize_top_k(role, indices, repeated, add_tail) for role in (s, t))  # (R, K) or (R, K + 1)
        p_s_k = s_k.exp()
        losses, statistics = _divergence_in_place(
            p_s_k, t_k.exp(), s_k, t_k, torch.empty_like(s_k), divergence, needs_gradient, last_is_tail=add_tail
        )
        if needs_gradient and add_tail:  # the tail's entries share its gradient in proportion to their probability
            torch.softmax(s.scatter_(-1, indices, MASKED), -1, out=p_s).mul_(p_s_k[:, -1:])
            p_s.scatter_add_(-1, indices, p_s_k[:, :-1])
        elif needs_gradient:
            p_s.zero_().scatter_add_(-1, indices, p_s_k)
    else:
        losses, statistics = _divergence_in_place(p_s, p_t, s, t, free, divergence, needs_gradient)
    if slope is not None:
        student_logits.mul_(slope)
    return torch.stack([losses, *statistics[:4], *entropies, statistics[4]])


def _divergence_in_place(
    p_s: Tensor,
    p_t: Tensor,
    s: Tensor,
    t: Tensor,
    scratch: Tensor,
    objective: Objective,
    needs_gradient: bool,
    last_is_tail: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """
    `generalized_jsd` of (R, V) probabilities and their logarithms, in few passes and without further memory.

    Overwrites all tensors. With `needs_gradient`, `p_s` becomes the gradient of the divergence with respect to
    z = logits / temperature: g_j - p_S,j sum_i g_i, where g is the derivative of the summands with respect to s.

    Returns:
        Divergence (R,), and the first four and the last of `TokenStatistics`, (R,) each.
    """
    beta, clip = objective.beta, objective.clip
    delta = t.sub_(s)
    if beta == 0.0:
        summands, g = torch.mul(p_t, delta, out=scratch), torch.neg(p_t, out=s)
    elif beta == 1.0:  # g - p_S in place of g: the gradient stays, and is exactly zero for equal distributions
        summands = torch.mul(p_s, delta, out=scratch).neg_()
        g = s.copy_(summands)
    else:  # the mixture as in `opsd.losses.divergence`
        decay = torch.abs(delta, out=scratch).neg_().expm1_()
        share = torch.gt(delta, 0, out=s).mul_(1 - 2 * beta).add_(beta)  # of the smaller side: 1 - beta or beta
        mixture_to_larger = decay.mul_(share).log1p_()
        g = torch.clamp(delta, min=0, out=s).add_(mixture_to_larger).mul_(p_s).mul_(beta - 1)
        teacher_part = mixture_to_larger.sub_(delta.clamp_(max=0)).mul_(p_t)
        summands = torch.sub(g, teacher_part, alpha=beta, out=scratch)
    total = summands.sum(-1)  # (R,)

    pointwise = clip is not None and objective.clip_mode == "pointwise"
    if pointwise:
        below = torch.le(summands, clip, out=t)  # 1.0 where the cap does not bite
        num_below = below.sum(-1)
        top = argmax_in_blocks(p_t[:, :-1] if last_is_tail else p_t)  # (R, 1)
        should_rise = p_t.gather(-1, top) > p_s.gather(-1, top)
    if needs_gradient or pointwise:
        if pointwise:
            g.mul_(below)
            if beta == 1.0:
                g.addcmul_(p_s, below.neg_().add_(1), value=-1)
        if beta != 0.0 or pointwise:
            g_sum = g.sum(-1)
            if beta == 0.0:  # exactly -1 where no summand is capped, so that equal distributions leave p_S - p_T = 0
                g_sum.masked_fill_(num_below == g.shape[-1], -1)
            p_s.mul_(-g_sum.unsqueeze(-1))
        p_s.add_(g)
        if clip is not None and objective.clip_mode == "token":
            p_s.mul_((total <= clip).unsqueeze(-1))
        elif clip is not None and objective.clip_mode == "scale":
            p_s.mul_((clip / total.clamp(min=clip)).unsqueeze(-1))

    capped_values, free = (summands, s) if objective.clip_mode == "pointwise" else (total.unsqueeze(-1), None)
    clipped_entries = clipped_mass = wrong_way = torch.zeros_like(total)
    if clip is not None:
        clipped_entries = summands.shape[-1] - num_below if pointwise else (total > clip).to(total.dtype)
        clipped_mass = torch.sub(capped_values, clip, out=free).clamp_(min=0).sum(-1)
    positive_mass = torch.clamp(capped_values, min=0, out=free).sum(-1)
    if pointwise:  # needs a summand above the cap; without one, a positive gradient is a rounding error
        wrong_way = (should_rise & (p_s.gather(-1, top) > 0)).squeeze(-1) & (clipped_entries > 0)
    statistics = [total, clipped_entries, clipped_mass, positive_mass, wrong_way.to(total.dtype)]
    if clip is None:
        return total, statistics
    return summands.clamp_(max=clip).sum(-1) if pointwise else total.clamp(max=clip), statistics


def argmax_in_blocks(values: Tensor) -> Tensor:
    """Argmax of each row, (R, V) -> (R, 1). On a CPU, PyTorch's is ten times slower than `amax`: it gets one block."""
    vocab_size, size = values.shape[-1], 1024
    if vocab_size <= size:
        return values.argmax(-1, keepdim=True)
    num_blocks = vocab_size // size  # and one more that ends with the row
    maxima = values[:, : num_blocks * size].unflatten(-1, (num_blocks, size)).amax(-1)
    best = torch.cat([maxima, values[:, -size:].amax(-1, keepdim=True)], dim=-1).argmax(-1, keepdim=True)
    columns = (best * size).clamp_(max=vocab_size - size) + torch.arange(size, device=values.device)  # (R, size)
    return columns.gather(-1, values.gather(-1, columns).argmax(-1, keepdim=True))
