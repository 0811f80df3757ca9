"""The losses of a chunk and their gradient as one Triton kernel, equal to `opsd.losses.elementwise.chunk_losses`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from opsd.losses.divergence import Objective, TokenStatistics
from opsd.losses.elementwise import HeadSettings


def is_supported(logits: Tensor, objective: Objective) -> bool:
    """True if the kernel can compute the objective: not in float64, and not with top-k."""
    return logits.is_cuda and logits.dtype == torch.float32 and objective.divergence.top_k is None


def chunk_losses_triton(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor,
    objective: Objective,
    head: HeadSettings,
    gradient: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as for `chunk_losses`. The teacher's logits are left unchanged."""
    num_tokens, vocab_size = student_logits.shape
    losses = student_logits.new_empty(num_tokens)
    statistics = student_logits.new_empty(len(TokenStatistics._fields), num_tokens)
    scale, cap = head.factors(objective.temperature)
    clip = objective.sampled_token_clip if objective.sampled_token else objective.clip
    clip_mode = None if objective.sampled_token or clip is None else objective.clip_mode
    with torch.cuda.device_of(student_logits):
        token_losses_kernel[(num_tokens,)](
            student_logits,
            teacher_logits,
            student_logits if gradient is None else gradient,
            token_ids,
            losses,
            statistics,
            vocab_size,
            num_tokens,
            scale,
            1.0 if cap is None else cap,
            0.0 if clip is None else clip,
            BETA=objective.beta,
            POINTWISE=clip_mode == "pointwise",
            TOKEN=clip_mode == "token",
            SCALE=clip_mode == "scale",
            SAMPLED=objective.sampled_token,
            SOFTCAP=cap is not None,
            GRADIENT=gradient is not None,
            BLOCK=2048,
            num_warps=8,
            enable_fp_fusion=False,  # both roles rounded alike, so that equal logits give exactly zero
        )
    return losses, statistics


@triton.jit
def _scaled_logits(logits, mask, scale, softcap, SOFTCAP: tl.constexpr):
    """z = logits / temperature from the head's output x, and dz / da for a = logit_scale / temperature * x."""
    z = logits * scale
    slope = 1.0
    if SOFTCAP:
        tanh = 1 - 2 / (tl.exp(2 * z) + 1)
        z = tanh * softcap
        slope = 1 - tanh * tanh
    return tl.where(mask, z, -float("inf")), slope


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0, by its series where the difference would cancel."""
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return tl.where(x > -0.35, series, tl.exp(x) - 1)


@triton.jit
def _log1p(x):
    """log(1 + x) for -1 < x <= 0, by the series of 2 artanh(x / (2 + x)) where rounding 1 + x would cost digits."""
    r = x / (2 + x)
    q = r * r
    series = 2 * r * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q / 9))))
    return tl.where(x > -0.25, series, tl.log(1 + x))


@triton.jit
def _summands(s, t, mask, BETA: tl.constexpr):
    """p_S, p_T, the summands f and their derivative g, as in `_divergence_in_place`; 0 outside the mask."""
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
def token_losses_kernel(
    student_ptr,  # (n, V)
    teacher_ptr,  # (n, V)
    gradient_ptr,  # (n, V)
    token_ids_ptr,  # (n,)
    losses_ptr,  # (n,)
    statistics_ptr,  # (7, n)
    vocab_size,
    num_tokens,
    scale,
    softcap,
    clip,
    BETA: tl.constexpr,
    POINTWISE: tl.constexpr,  # cap on each summand
    TOKEN: tl.constexpr,  # cap on each token's sum
    SCALE: tl.constexpr,  # cap on each token's sum, which scales its gradient; none of the three: no cap
    SAMPLED: tl.constexpr,  # the sampled-token loss, where `clip` bounds the advantage (0: no bound)
    SOFTCAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program per token. It reads the logits twice, or three times where the gradient of an entry depends on sums
    # over the whole row. The gradient may overwrite the student's logits.
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
        z_s, _ = _scaled_logits(tl.load(student_ptr + columns, mask=mask, other=0.0), mask, scale, softcap, SOFTCAP)
        z_t, _ = _scaled_logits(tl.load(teacher_ptr + columns, mask=mask, other=0.0), mask, scale, softcap, SOFTCAP)
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
        # These names appear nowhere else: a loop that assigns a block to the name of a scalar does not compile
        student_logit, student_slope = _scaled_logits(tl.load(student_ptr + token_id), True, scale, softcap, SOFTCAP)
        teacher_logit, teacher_slope = _scaled_logits(tl.load(teacher_ptr + token_id), True, scale, softcap, SOFTCAP)
        log_prob = student_logit - s_max - s_log_sum
        advantage = teacher_logit - t_max - t_log_sum - log_prob
        if clip > 0:
            advantage = tl.minimum(tl.maximum(advantage, -clip), clip)
        tl.store(losses_ptr + row, -advantage * log_prob)

    # Sums over the row, and the gradient where it does not depend on them
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
        z_s, slope = _scaled_logits(
            tl.load(student_ptr + columns, mask=mask, other=0.0), mask, scale, softcap, SOFTCAP
        )
        z_t, _ = _scaled_logits(tl.load(teacher_ptr + columns, mask=mask, other=0.0), mask, scale, softcap, SOFTCAP)
        s = z_s - s_max - s_log_sum
        t = z_t - t_max - t_log_sum
        p_s, p_t, f, g = _summands(s, t, mask, BETA)
        total += f
        if POINTWISE:
            capped_total += tl.minimum(f, clip)
            num_capped += tl.where(f > clip, 1.0, 0.0)
            g = tl.where(f > clip, -p_s if BETA == 1.0 else 0.0, g)
            top_column = tl.maximum(top_column, tl.where(z_t == t_max, columns, 0))
        g_sum += g
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
        tl.store(losses_ptr + row, value)
    tl.store(statistics_ptr + row, divergence)
    tl.store(statistics_ptr + num_tokens + row, clipped_entries)
    tl.store(statistics_ptr + 2 * num_tokens + row, divergence - value)
    tl.store(statistics_ptr + 3 * num_tokens + row, positive)
    tl.store(statistics_ptr + 4 * num_tokens + row, tl.sum(s_entropy, 0))
    tl.store(statistics_ptr + 5 * num_tokens + row, tl.sum(t_entropy, 0))
    wrong_way = 0.0
    if POINTWISE:
        column = tl.max(top_column, 0)
        top_student, student_slope = _scaled_logits(tl.load(student_ptr + column), True, scale, softcap, SOFTCAP)
        top_teacher, teacher_slope = _scaled_logits(tl.load(teacher_ptr + column), True, scale, softcap, SOFTCAP)
        top_p_s, top_p_t, top_f, top_g = _summands(
            top_student - s_max - s_log_sum, top_teacher - t_max - t_log_sum, True, BETA
        )
        top_g = tl.where(top_f > clip, -top_p_s if BETA == 1.0 else 0.0, top_g)
        should_rise = (top_p_t > top_p_s) & (clipped_entries > 0)
        wrong_way = tl.where(should_rise & (top_g - top_p_s * tl.sum(g_sum, 0) > 0), 1.0, 0.0)
    tl.store(statistics_ptr + 6 * num_tokens + row, wrong_way)

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
            z_s, slope = _scaled_logits(
                tl.load(student_ptr + columns, mask=mask, other=0.0), mask, scale, softcap, SOFTCAP
            )
            z_t, _ = _scaled_logits(
                tl.load(teacher_ptr + columns, mask=mask, other=0.0), mask, scale, softcap, SOFTCAP
            )
            p_s, p_t, f, g = _summands(z_s - s_max - s_log_sum, z_t - t_max - t_log_sum, mask, BETA)
            if POINTWISE:
                g = tl.where(f > clip, -p_s if BETA == 1.0 else 0.0, g)
            tl.store(gradient_ptr + columns, (p_s * factor + g) * slope * keep, mask=mask)
