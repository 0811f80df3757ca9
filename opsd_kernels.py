"""The element-wise part of the fused objectives: from the logits of a chunk of tokens to values and their gradient."""

from typing import NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # comes with PyTorch's CUDA builds; nothing else needs it
    triton = None

NUM_STATISTICS = 7  # those of `TokenStatistics`, in its order
ABSENT = -1e30  # log-probability of what is not there; finite, so that its summands are 0 and not infinity - infinity


class Objective(NamedTuple):
    """What to compute from the logits of both roles; see `fused_linear_jsd` and `fused_linear_sampled_token_loss`."""

    beta: float
    temperature: float
    clip: float | None
    clip_mode: str
    top_k: int | None
    logit_scale: float
    logit_softcap: float | None
    sampled: bool  # the sampled-token loss, where `clip` bounds the advantage, and `beta` is that of the statistics
    statistics: bool
    top_k_of: str = "teacher"
    tail: bool = False


# Top-k, for the dense form too


def kept_entries(s: Tensor, t: Tensor, top_k: int, top_k_of: str) -> tuple[Tensor, Tensor | None]:
    """
    The entries that `top_k` keeps of (..., V) log-probabilities s = log p_S and t = log p_T.

    Returns:
        Their indices, (..., k), or for "both" (..., 2 k), the teacher's and then the student's; and for "both" which of
        them occur for the second time, (..., 2 k), boolean, else `None`.
    """
    if top_k_of != "both":
        return (t if top_k_of == "teacher" else s).topk(top_k, dim=-1).indices, None
    of_teacher, of_student = (role.topk(top_k, dim=-1).indices for role in (t, s))
    in_teachers = torch.zeros_like(t, dtype=torch.bool).scatter_(-1, of_teacher, True)
    repeated = torch.cat([torch.zeros_like(of_teacher, dtype=torch.bool), in_teachers.gather(-1, of_student)], dim=-1)
    return torch.cat([of_teacher, of_student], dim=-1), repeated


def restricted(log_probs: Tensor, indices: Tensor, repeated: Tensor | None, tail: bool) -> Tensor:
    """
    Log-probabilities (..., K) of the kept entries: renormalized, or with `tail` as they are, and (..., K + 1) with that
    of all others together as the last. Repeated entries, and a tail that is empty, are `ABSENT`.

    The tail's is a logsumexp over the complement, where nothing cancels, be it small or almost everything; its gradient
    is the softmax over the complement.
    """
    kept = log_probs.gather(-1, indices)
    if repeated is not None:
        kept = kept.masked_fill(repeated, ABSENT)
    if not tail:
        return kept.log_softmax(-1)
    rest = log_probs.scatter(-1, indices, ABSENT).logsumexp(-1, keepdim=True)
    return torch.cat([kept, rest], dim=-1)


# Objectives


def elementwise(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor | None,
    objective: Objective,
    gradient: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """
    Values of a chunk of n tokens, their statistics and their gradient.

    Args:
        student_logits, teacher_logits: (n, V), contiguous, float32 or float64; overwritten.
        token_ids: (n,), int64, for the sampled-token loss.
        objective: what to compute.
        gradient: (n, V) of any floating dtype, may be `student_logits`: receives the derivative of each value with
            respect to logits * logit_scale / temperature. `None` if there is no need for it.

    Returns:
        (n,) and (7, n), or (0, n) if the objective has no statistics, of the logits' dtype.
    """
    if triton is not None and student_logits.is_cuda and student_logits.dtype == torch.float32 and not objective.top_k:
        return _elementwise_triton(student_logits, teacher_logits, token_ids, objective, gradient)
    return _elementwise_eager(student_logits, teacher_logits, token_ids, objective, gradient)


def _elementwise_eager(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor | None,
    objective: Objective,
    gradient: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A few rows at a time, so that what the many passes read and write stays in a CPU's cache and needs no memory."""
    num_tokens, vocab_size = student_logits.shape
    block_entries = 2**20 if student_logits.device.type == "cpu" else 2**24
    block_size = max(1, block_entries // vocab_size)
    scratch = student_logits.new_empty(3, min(block_size, num_tokens), vocab_size)
    values = student_logits.new_empty(num_tokens)
    statistics = student_logits.new_empty(NUM_STATISTICS if objective.statistics else 0, num_tokens)
    for start in range(0, num_tokens, block_size):
        rows = slice(start, min(start + block_size, num_tokens))
        values[rows], block_statistics = _rows_in_place(
            student_logits[rows],
            teacher_logits[rows],
            scratch[:, : rows.stop - start],
            token_ids[rows] if objective.sampled else None,
            objective,
            gradient is not None,
        )
        for all_rows, statistic in zip(statistics, block_statistics, strict=True):
            all_rows[rows] = statistic
    if gradient is not None and gradient.data_ptr() != student_logits.data_ptr():
        gradient.copy_(student_logits)
    return values, statistics


def _argmax(values: Tensor) -> Tensor:
    """(R, V) -> (R, 1). PyTorch's own reads at a tenth of the speed of `amax` on a CPU, so that it gets a block only."""
    vocab_size, size = values.shape[-1], 1024
    if vocab_size <= size:
        return values.argmax(-1, keepdim=True)
    num_blocks = vocab_size // size  # and one more that ends with the row
    maxima = values[:, : num_blocks * size].unflatten(-1, (num_blocks, size)).amax(-1)
    best = torch.cat([maxima, values[:, -size:].amax(-1, keepdim=True)], dim=-1).argmax(-1, keepdim=True)
    columns = (best * size).clamp_(max=vocab_size - size) + torch.arange(size, device=values.device)  # (R, size)
    return columns.gather(-1, values.gather(-1, columns).argmax(-1, keepdim=True))


def _divergence_in_place(
    p_s: Tensor,
    p_t: Tensor,
    s: Tensor,
    t: Tensor,
    scratch: Tensor,
    objective: Objective,
    gradient: bool,
    last_is_tail: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """
    `generalized_jsd` of (R, V) probabilities and their logarithms, in few passes and without further memory.

    Overwrites all tensors. With `gradient`, `p_s` becomes the derivative of the values with respect to
    z = logits / temperature: g_j - p_S,j sum_i g_i, where g is the summands' derivative with respect to s.

    Returns:
        Values and the first four and the last of `TokenStatistics` (none if not asked for), (R,) each.
    """
    beta, clip = objective.beta, objective.clip
    delta = t.sub_(s)
    if beta == 0.0:
        summands, g = torch.mul(p_t, delta, out=scratch), torch.neg(p_t, out=s)
    elif beta == 1.0:  # g less p_S, which changes nothing, and the rest is zero for equal distributions
        summands = torch.mul(p_s, delta, out=scratch).neg_()
        g = s.copy_(summands)
    else:  # as in `_summands`
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
    may_reverse = pointwise and objective.statistics
    if may_reverse:
        top = _argmax(p_t[:, :-1] if last_is_tail else p_t)  # (R, 1)
        should_rise = p_t.gather(-1, top) > p_s.gather(-1, top)
    if gradient or may_reverse:
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
    if objective.statistics:
        capped_values, free = (summands, s) if objective.clip_mode == "pointwise" else (total.unsqueeze(-1), None)
        clipped_entries = clipped_mass = is_reversed = torch.zeros_like(total)
        if clip is not None:
            clipped_entries = summands.shape[-1] - num_below if pointwise else (total > clip).to(total.dtype)
            clipped_mass = torch.sub(capped_values, clip, out=free).clamp_(min=0).sum(-1)
        positive_mass = torch.clamp(capped_values, min=0, out=free).sum(-1)
        if may_reverse:  # only a cap that bites can do it; else what looks like it is rounding
            is_reversed = (should_rise & (p_s.gather(-1, top) > 0)).squeeze(-1) & (clipped_entries > 0)
        statistics = [total, clipped_entries, clipped_mass, positive_mass, is_reversed]
    if clip is None:
        return total, statistics
    return summands.clamp_(max=clip).sum(-1) if pointwise else total.clamp(max=clip), statistics


def _rows_in_place(
    student_logits: Tensor,
    teacher_logits: Tensor,
    scratch: Tensor,
    token_ids: Tensor | None,
    objective: Objective,
    gradient: bool,
) -> tuple[Tensor, list[Tensor]]:
    """
    Values and statistics, (R,) each, of (R, V) logits; with `gradient`, the student's become the derivative of the
    values with respect to logits * logit_scale / temperature. Overwrites both roles' logits and `scratch`, (3, R, V).
    """
    softcap, slope = objective.logit_softcap, None
    for logits in (teacher_logits, student_logits):
        if softcap is not None:
            logits.mul_(objective.logit_scale / softcap).tanh_()
            slope = 1 - logits.square() if gradient else None  # the student's, who comes last
            logits.mul_(softcap / objective.temperature)
        elif objective.logit_scale != objective.temperature:
            logits.mul_(objective.logit_scale / objective.temperature)
    s = torch.log_softmax(student_logits, -1, out=scratch[0])
    t = torch.log_softmax(teacher_logits, -1, out=scratch[1])
    p_s, p_t, free = torch.exp(s, out=student_logits), torch.exp(t, out=teacher_logits), scratch[2]
    entropies = [-torch.mul(p, x, out=free).sum(-1) for p, x in ((p_s, s), (p_t, t)) if objective.statistics]

    if objective.sampled:
        index = token_ids.unsqueeze(-1)  # (R, 1)
        log_prob = s.gather(-1, index)
        advantage = t.gather(-1, index) - log_prob
        if objective.clip is not None:
            advantage.clamp_(-objective.clip, objective.clip)
        values, statistics = (-advantage * log_prob).squeeze(-1), []
        if objective.statistics:
            _, statistics = _divergence_in_place(p_s, p_t, s, t, free, objective._replace(clip=None), gradient=False)
        if gradient:
            p_s.mul_(advantage).scatter_add_(-1, index, -advantage)
    elif objective.top_k is not None and objective.top_k < t.shape[-1]:
        indices, repeated = kept_entries(s, t, objective.top_k, objective.top_k_of)
        s_k, t_k = (restricted(role, indices, repeated, objective.tail) for role in (s, t))  # (R, K) or (R, K + 1)
        p_s_k = s_k.exp()
        values, statistics = _divergence_in_place(
            p_s_k, t_k.exp(), s_k, t_k, torch.empty_like(s_k), objective, gradient, last_is_tail=objective.tail
        )
        if gradient and objective.tail:  # the tail's entries share its gradient in proportion to their probability
            torch.softmax(s.scatter_(-1, indices, ABSENT), -1, out=p_s).mul_(p_s_k[:, -1:])
            p_s.scatter_add_(-1, indices, p_s_k[:, :-1])
        elif gradient:
            p_s.zero_().scatter_add_(-1, indices, p_s_k)
    else:
        values, statistics = _divergence_in_place(p_s, p_t, s, t, free, objective, gradient)
    if slope is not None:
        student_logits.mul_(slope)
    return values, statistics[:4] + entropies + statistics[4:]


if triton is not None:

    @triton.jit
    def _scaled(logits, mask, scale, softcap, SOFTCAP: tl.constexpr):
        """z = logits * logit_scale / temperature, or the soft-capped one, and dz / d(logits * logit_scale / temperature)."""
        z = logits * scale
        slope = 1.0
        if SOFTCAP:
            tanh = 1 - 2 / (tl.exp(2 * z) + 1)
            z = tanh * softcap
            slope = 1 - tanh * tanh
        return tl.where(mask, z, -float("inf")), slope

    @triton.jit
    def _expm1(x):
        """Of x <= 0; by its series where exp(x) - 1 would cancel."""
        series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
        return tl.where(x > -0.35, series, tl.exp(x) - 1)

    @triton.jit
    def _log1p(x):
        """Of -1 < x <= 0; by the series of 2 artanh(x / (2 + x)) where rounding 1 + x would cost digits."""
        r = x / (2 + x)
        q = r * r
        series = 2 * r * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q / 9))))
        return tl.where(x > -0.25, series, tl.log(1 + x))

    @triton.jit
    def _summands(s, t, mask, BETA: tl.constexpr):
        """p_S, p_T, the divergence's terms f and their derivative g, as in `_divergence_in_place`; 0 outside the mask."""
        p_s = tl.where(mask, tl.exp(s), 0.0)
        p_t = tl.where(mask, tl.exp(t), 0.0)
        delta = tl.where(mask, t - s, 0.0)
        if BETA == 0.0:
            f = p_t * delta
            g = -p_t
        elif BETA == 1.0:
            f = -p_s * delta
            g = f
        else:
            share = tl.where(delta > 0, 1 - BETA, BETA)
            mixture_to_larger = _log1p(share * _expm1(-tl.abs(delta)))
            g = (BETA - 1) * p_s * (mixture_to_larger + tl.maximum(delta, 0.0))
            f = g - BETA * p_t * (mixture_to_larger - tl.minimum(delta, 0.0))
        return p_s, p_t, f, g

    @triton.jit
    def _elementwise_kernel(
        student_ptr,  # (n, V)
        teacher_ptr,  # (n, V)
        gradient_ptr,  # (n, V)
        token_ids_ptr,  # (n,)
        values_ptr,  # (n,)
        statistics_ptr,  # (7, n)
        vocab_size,
        num_tokens,
        scale,
        softcap,
        clip,
        BETA: tl.constexpr,
        POINTWISE: tl.constexpr,  # cap on each summand
        TOKEN: tl.constexpr,  # cap on each token's sum
        SCALE: tl.constexpr,  # the same, but the gradient is scaled and not cut off; none of the three: no cap
        SAMPLED: tl.constexpr,
        SOFTCAP: tl.constexpr,
        GRADIENT: tl.constexpr,
        STATISTICS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        # One program per token. The logits are read twice, or three times where the gradient of an entry depends on all
        # summands of its row; the gradient may overwrite the student's.
        row = tl.program_id(0)
        student_ptr += row.to(tl.int64) * vocab_size
        teacher_ptr += row.to(tl.int64) * vocab_size
        gradient_ptr += row.to(tl.int64) * vocab_size
        zeros = tl.zeros((BLOCK,), tl.float32)

        # Normalizers
        s_max = -float("inf")
        t_max = -float("inf")
        s_sum = 0.0
        t_sum = 0.0
        for start in range(0, vocab_size, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            mask = columns < vocab_size
            z_s, _ = _scaled(tl.load(student_ptr + columns, mask=mask, other=0.0), mask, scale, softcap, SOFTCAP)
            z_t, _ = _scaled(tl.load(teacher_ptr + columns, mask=mask, other=0.0), mask, scale, softcap, SOFTCAP)
            new_max = tl.maximum(s_max, tl.max(z_s, 0))
            s_sum = s_sum * tl.exp(s_max - new_max) + tl.sum(tl.exp(z_s - new_max), 0)
            s_max = new_max
            new_max = tl.maximum(t_max, tl.max(z_t, 0))
            t_sum = t_sum * tl.exp(t_max - new_max) + tl.sum(tl.exp(z_t - new_max), 0)
            t_max = new_max
        s_log_sum = tl.log(s_sum)
        t_log_sum = tl.log(t_sum)

        advantage = 0.0
        if SAMPLED:
            token_id = tl.load(token_ids_ptr + row)
            # Names of their own: a loop below that assigns a block to a name of a scalar does not compile
            student_logit, student_slope = _scaled(tl.load(student_ptr + token_id), True, scale, softcap, SOFTCAP)
            teacher_logit, teacher_slope = _scaled(tl.load(teacher_ptr + token_id), True, scale, softcap, SOFTCAP)
            log_prob = student_logit - s_max - s_log_sum
            advantage = teacher_logit - t_max - t_log_sum - log_prob
            if clip > 0:
                advantage = tl.minimum(tl.maximum(advantage, -clip), clip)
            tl.store(values_ptr + row, -advantage * log_prob)

        # Sums over the row; the gradient too where it does not depend on them
        GRADIENT_NOW: tl.constexpr = SAMPLED or (BETA == 0.0 and not POINTWISE and not TOKEN and not SCALE)
        total = zeros
        capped_total = zeros
        num_capped = zeros
        positive_mass = zeros
        g_sum = zeros
        s_entropy = zeros
        t_entropy = zeros
        top_column = tl.zeros((BLOCK,), tl.int32)  # of the teacher's most probable token
        for start in range(0, vocab_size, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            mask = columns < vocab_size
            z_s, slope = _scaled(tl.load(student_ptr + columns, mask=mask, other=0.0), mask, scale, softcap, SOFTCAP)
            z_t, _ = _scaled(tl.load(teacher_ptr + columns, mask=mask, other=0.0), mask, scale, softcap, SOFTCAP)
            s = z_s - s_max - s_log_sum
            t = z_t - t_max - t_log_sum
            p_s, p_t, f, g = _summands(s, t, mask, BETA)
            total += f
            if POINTWISE:
                capped_total += tl.minimum(f, clip)
                num_capped += tl.where(f > clip, 1.0, 0.0)
                g = tl.where(f > clip, -p_s if BETA == 1.0 else 0.0, g)
                if STATISTICS:
                    top_column = tl.maximum(top_column, tl.where(z_t == t_max, columns, 0))
            g_sum += g
            if STATISTICS:
                positive_mass += tl.maximum(f, 0.0)
                s_entropy -= tl.where(mask, p_s * s, 0.0)
                t_entropy -= tl.where(mask, p_t * t, 0.0)
            if GRADIENT and GRADIENT_NOW:
                gradient = p_s + g
                if SAMPLED:
                    gradient = advantage * (p_s - tl.where(columns == token_id, 1.0, 0.0))
                tl.store(gradient_ptr + columns, gradient * slope, mask=mask)
        divergence = tl.sum(total, 0)
        value = divergence
        clipped_entries = tl.sum(num_capped, 0)
        positive = tl.sum(positive_mass, 0)
        if POINTWISE:
            value = tl.sum(capped_total, 0)
        elif TOKEN or SCALE:
            value = tl.minimum(divergence, clip)
            clipped_entries = tl.where(divergence > clip, 1.0, 0.0)
            positive = tl.maximum(divergence, 0.0)
        if not SAMPLED:
            tl.store(values_ptr + row, value)
        if STATISTICS:
            tl.store(statistics_ptr + row, divergence)
            tl.store(statistics_ptr + num_tokens + row, clipped_entries)
            tl.store(statistics_ptr + 2 * num_tokens + row, divergence - value)
            tl.store(statistics_ptr + 3 * num_tokens + row, positive)
            tl.store(statistics_ptr + 4 * num_tokens + row, tl.sum(s_entropy, 0))
            tl.store(statistics_ptr + 5 * num_tokens + row, tl.sum(t_entropy, 0))
            is_reversed = 0.0
            if POINTWISE:
                column = tl.max(top_column, 0)
                top_student, student_slope = _scaled(tl.load(student_ptr + column), True, scale, softcap, SOFTCAP)
                top_teacher, teacher_slope = _scaled(tl.load(teacher_ptr + column), True, scale, softcap, SOFTCAP)
                top_p_s, top_p_t, top_f, top_g = _summands(
                    top_student - s_max - s_log_sum, top_teacher - t_max - t_log_sum, True, BETA
                )
                top_g = tl.where(top_f > clip, -top_p_s if BETA == 1.0 else 0.0, top_g)
                should_rise = (top_p_t > top_p_s) & (clipped_entries > 0)
                is_reversed = tl.where(should_rise & (top_g - top_p_s * tl.sum(g_sum, 0) > 0), 1.0, 0.0)
            tl.store(statistics_ptr + 6 * num_tokens + row, is_reversed)

        if GRADIENT and not GRADIENT_NOW:
            factor = -tl.sum(g_sum, 0)
            if BETA == 0.0:
                factor = tl.where(clipped_entries == 0, 1.0, factor) if POINTWISE else 1.0
            keep = 1.0
            if TOKEN:
                keep = tl.where(divergence > clip, 0.0, 1.0)
            elif SCALE:
                keep = tl.where(divergence > clip, clip / divergence, 1.0)
            for start in range(0, vocab_size, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                mask = columns < vocab_size
                z_s, slope = _scaled(
                    tl.load(student_ptr + columns, mask=mask, other=0.0), mask, scale, softcap, SOFTCAP
                )
                z_t, _ = _scaled(tl.load(teacher_ptr + columns, mask=mask, other=0.0), mask, scale, softcap, SOFTCAP)
                p_s, p_t, f, g = _summands(z_s - s_max - s_log_sum, z_t - t_max - t_log_sum, mask, BETA)
                if POINTWISE:
                    g = tl.where(f > clip, -p_s if BETA == 1.0 else 0.0, g)
                tl.store(gradient_ptr + columns, (p_s * factor + g) * slope * keep, mask=mask)

    def _elementwise_triton(
        student_logits: Tensor,
        teacher_logits: Tensor,
        token_ids: Tensor | None,
        objective: Objective,
        gradient: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        num_tokens, vocab_size = student_logits.shape
        values = student_logits.new_empty(num_tokens)
        statistics = student_logits.new_empty(NUM_STATISTICS if objective.statistics else 0, num_tokens)
        softcap, clip = objective.logit_softcap, objective.clip
        capped = clip is not None and not objective.sampled
        with torch.cuda.device_of(student_logits):
            _elementwise_kernel[(num_tokens,)](
                student_logits,
                teacher_logits,
                student_logits if gradient is None else gradient,
                values if token_ids is None else token_ids,
                values,
                statistics,
                vocab_size,
                num_tokens,
                objective.logit_scale / (objective.temperature if softcap is None else softcap),
                1.0 if softcap is None else softcap / objective.temperature,
                0.0 if clip is None else clip,
                BETA=objective.beta,
                POINTWISE=capped and objective.clip_mode == "pointwise",
                TOKEN=capped and objective.clip_mode == "token",
                SCALE=capped and objective.clip_mode == "scale",
                SAMPLED=objective.sampled,
                SOFTCAP=softcap is not None,
                GRADIENT=gradient is not None,
                STATISTICS=objective.statistics,
                BLOCK=2048,
                num_warps=8,
                enable_fp_fusion=False,  # both roles rounded alike, so that equal logits give exactly zero
            )
        return values, statistics
