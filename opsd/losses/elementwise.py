"""
From the logits of a chunk of tokens to the losses and their gradient, with PyTorch operations that work in place.

The gradient is always the one with respect to the scaled head output a = logit_scale / temperature * hidden W^T.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from opsd.losses.divergence import MASKED, Objective, TokenStatistics, renormalize_top_k, top_k_indices


@dataclass(frozen=True)
class HeadSettings:
    """
    Transformation of the head's output h W^T to the model's logits: c tanh(scale h W^T / c), or scale h W^T without c.

    Args:
        logit_scale: factor of the head's output.
        logit_softcap: the soft cap c, or `None`.
    """

    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def factors(self, temperature: float) -> tuple[float, float | None]:
        """Scale and cap with which logits / temperature are cap * tanh(scale * x), or scale * x without a cap."""
        if self.logit_softcap is None:
            return self.logit_scale / temperature, None
        return self.logit_scale / self.logit_softcap, self.logit_softcap / temperature


def chunk_losses(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor | None,
    objective: Objective,
    head: HeadSettings,
    gradient: Tensor | None,
    with_statistics: bool,
) -> tuple[Tensor, Tensor]:
    """
    Compute the losses of a chunk of n tokens, their statistics and their gradient.

    Works on a few rows at a time, so that its many passes stay within a CPU's cache and need little memory.

    Args:
        student_logits, teacher_logits: (n, V), the head's output, contiguous, float32 or float64; overwritten.
        token_ids: (n,), int64; needed for `objective.sampled_token`.
        objective: settings of the loss.
        head: settings of the head.
        gradient: (n, V) of any floating dtype, may be `student_logits`: receives the gradient of each token's loss.
            `None` if it is not needed.
        with_statistics: compute the statistics too.

    Returns:
        Losses (n,) and statistics (7, n), in the order of `TokenStatistics`, or (0, n); of the logits' dtype.
    """
    num_tokens, vocab_size = student_logits.shape
    block_entries = 2**20 if student_logits.device.type == "cpu" else 2**24
    block_size = max(1, block_entries // vocab_size)
    scratch = student_logits.new_empty(3, min(block_size, num_tokens), vocab_size)
    losses = student_logits.new_empty(num_tokens)
    statistics = student_logits.new_empty(len(TokenStatistics._fields) if with_statistics else 0, num_tokens)
    for start in range(0, num_tokens, block_size):
        rows = slice(start, min(start + block_size, num_tokens))
        losses[rows], block_statistics = _losses_in_place(
            student_logits[rows],
            teacher_logits[rows],
            scratch[:, : rows.stop - start],
            token_ids[rows] if objective.sampled_token else None,
            objective,
            head,
            needs_gradient=gradient is not None,
            with_statistics=with_statistics,
        )
        for all_rows, statistic in zip(statistics, block_statistics, strict=True):
            all_rows[rows] = statistic
    if gradient is not None and gradient.data_ptr() != student_logits.data_ptr():
        gradient.copy_(student_logits)
    return losses, statistics


def chunk_policy_gradient(
    student_logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    temperature: float,
    head: HeadSettings,
    scratch: Tensor,
    gradient: Tensor,
    needs_gradient: bool,
) -> Tensor:
    """
    Compute `policy_gradient_loss`, (n,), of a chunk of n tokens.

    Args:
        student_logits: (n, V), the head's output, left unchanged.
        token_ids, advantages: (n,).
        temperature: of the softmax.
        head: settings of the head.
        scratch: (n, V), overwritten.
        gradient: (n, V), overwritten; holds the gradient of each token's loss if `needs_gradient`.
    """
    scale, cap = head.factors(temperature)
    z = torch.mul(student_logits, scale, out=scratch)
    if cap is not None:
        z.tanh_().mul_(cap)
    index = token_ids.unsqueeze(-1)  # (n, 1)
    log_probs = torch.log_softmax(z, -1, out=gradient).gather(-1, index)  # (n, 1)
    if needs_gradient:
        # A (p_S - onehot(y)), where p_S(y) - 1 = expm1(log p_S(y)) keeps its digits at probabilities close to 1
        gradient.exp_().scatter_(-1, index, log_probs.expm1()).mul_(advantages.unsqueeze(-1))
        if cap is not None:  # d tanh = 1 - tanh^2
            gradient.mul_(z.mul_(temperature / head.logit_softcap).square_().neg_().add_(1))
    return -advantages * log_probs.squeeze(-1)


def _losses_in_place(
    student_logits: Tensor,
    teacher_logits: Tensor,
    scratch: Tensor,
    token_ids: Tensor | None,
    objective: Objective,
    head: HeadSettings,
    *,
    needs_gradient: bool,
    with_statistics: bool,
) -> tuple[Tensor, list[Tensor]]:
    """
    Losses and statistics, (R,) each, of a block of logits (R, V).

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
    entropies = [-torch.mul(p, x, out=free).sum(-1) for p, x in ((p_s, s), (p_t, t)) if with_statistics]

    divergence, top_k, add_tail = objective.divergence, objective.top_k, objective.top_k_add_tail
    if objective.sampled_token:
        index = token_ids.unsqueeze(-1)  # (R, 1)
        log_probs = s.gather(-1, index)
        advantages = t.gather(-1, index) - log_probs
        if objective.sampled_token_clip is not None:
            advantages.clamp_(-objective.sampled_token_clip, objective.sampled_token_clip)
        losses, statistics = (-advantages * log_probs).squeeze(-1), []
        if with_statistics:
            _, statistics = _divergence_in_place(p_s, p_t, s, t, free, divergence, False, True)
        if needs_gradient:
            p_s.mul_(advantages).scatter_add_(-1, index, -advantages)
    elif top_k is not None and top_k < t.shape[-1]:
        indices, repeated = top_k_indices(s, t, top_k, objective.top_k_support)
        s_k, t_k = (renormalize_top_k(role, indices, repeated, add_tail) for role in (s, t))  # (R, K) or (R, K + 1)
        p_s_k = s_k.exp()
        losses, statistics = _divergence_in_place(
            p_s_k,
            t_k.exp(),
            s_k,
            t_k,
            torch.empty_like(s_k),
            divergence,
            needs_gradient,
            with_statistics,
            last_is_tail=add_tail,
        )
        if needs_gradient and add_tail:  # the tail's entries share its gradient in proportion to their probability
            torch.softmax(s.scatter_(-1, indices, MASKED), -1, out=p_s).mul_(p_s_k[:, -1:])
            p_s.scatter_add_(-1, indices, p_s_k[:, :-1])
        elif needs_gradient:
            p_s.zero_().scatter_add_(-1, indices, p_s_k)
    else:
        losses, statistics = _divergence_in_place(p_s, p_t, s, t, free, divergence, needs_gradient, with_statistics)
    if slope is not None:
        student_logits.mul_(slope)
    return losses, statistics[:4] + entropies + statistics[4:]


def _divergence_in_place(
    p_s: Tensor,
    p_t: Tensor,
    s: Tensor,
    t: Tensor,
    scratch: Tensor,
    objective: Objective,
    needs_gradient: bool,
    with_statistics: bool,
    last_is_tail: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """
    `generalized_jsd` of (R, V) probabilities and their logarithms, in few passes and without further memory.

    Overwrites all tensors. With `needs_gradient`, `p_s` becomes the gradient of the divergence with respect to
    z = logits / temperature: g_j - p_S,j sum_i g_i, where g is the derivative of the summands with respect to s.

    Returns:
        Divergence (R,), and the first four and the last of `TokenStatistics`, (R,) each, if asked for.
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
    below = torch.le(summands, clip, out=t) if pointwise else None  # 1.0 where the cap does not bite
    num_below = below.sum(-1) if pointwise else None
    may_move_wrong_way = pointwise and with_statistics
    if may_move_wrong_way:
        top = argmax_in_blocks(p_t[:, :-1] if last_is_tail else p_t)  # (R, 1)
        should_rise = p_t.gather(-1, top) > p_s.gather(-1, top)
    if needs_gradient or may_move_wrong_way:
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

    statistics = []
    if with_statistics:
        capped_values, free = (summands, s) if objective.clip_mode == "pointwise" else (total.unsqueeze(-1), None)
        clipped_entries = clipped_mass = wrong_way = torch.zeros_like(total)
        if clip is not None:
            clipped_entries = summands.shape[-1] - num_below if pointwise else (total > clip).to(total.dtype)
            clipped_mass = torch.sub(capped_values, clip, out=free).clamp_(min=0).sum(-1)
        positive_mass = torch.clamp(capped_values, min=0, out=free).sum(-1)
        if may_move_wrong_way:  # needs a summand above the cap; without one, a positive gradient is a rounding error
            wrong_way = (should_rise & (p_s.gather(-1, top) > 0)).squeeze(-1) & (clipped_entries > 0)
        statistics = [total, clipped_entries, clipped_mass, positive_mass, wrong_way]
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
