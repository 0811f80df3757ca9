"""The objectives of OPSD as pure tensor functions: divergences between student and teacher, one value per token."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from opsd_kernels import Objective, elementwise, kept_entries, restricted

CLIP_MODES = ("pointwise", "token", "scale")
TOP_K_OF = ("teacher", "student", "both")


class TokenStatistics(NamedTuple):
    """What the divergence of each token is made of. Detached, of the shape and dtype of the divergence."""

    divergence: Tensor  # before the clip, nats
    clipped_entries: Tensor  # how many summands (pointwise) or tokens (token, scale) lay above the cap
    clipped_mass: Tensor  # what the cap took away, nats
    positive_mass: Tensor  # sum of what the cap applies to, where positive: the whole of `clipped_mass`, nats
    student_entropy: Tensor  # over the full vocabulary, nats
    teacher_entropy: Tensor
    # 1 where a step on the loss pushes down the logit of the teacher's most probable token though p_T > p_S there. Only
    # the pointwise cap can do it; both as the loss compares them, with `top_k` among the entries that it keeps.
    reversed: Tensor


def check_objective(
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
    clip: float | None,
    clip_mode: str = "pointwise",
    top_k: int | None = None,
    top_k_of: str = "teacher",
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
    if top_k_of not in TOP_K_OF:
        raise ValueError(f"top_k_of must be one of {', '.join(TOP_K_OF)}, got {top_k_of!r}")


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


def _reversed(summands: Tensor, s: Tensor, t: Tensor, beta: float, clip: float, last_is_tail: bool) -> Tensor:
    """`TokenStatistics.reversed`, boolean (R,), of (R, V) summands under a pointwise cap that bites in every row."""
    p_s, p_t = s.exp(), t.exp()
    if beta == 0.0:
        g = -p_t
    elif beta == 1.0:
        g = summands + p_s
    else:
        mixture = torch.logaddexp(t + math.log(beta), s + math.log(1 - beta))
        g = (1 - beta) * p_s * (s - mixture)
    g = torch.where(summands <= clip, g, 0)  # derivative of the capped summand i with respect to s_i
    gradient = g - p_s * g.sum(-1, keepdim=True)  # with respect to logits / temperature
    top = (p_t[:, :-1] if last_is_tail else p_t).argmax(-1, keepdim=True)
    return ((p_t.gather(-1, top) > p_s.gather(-1, top)) & (gradient.gather(-1, top) > 0)).squeeze(-1)


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
    top_k_of: str = "teacher",
    tail: bool = False,
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
        clip: cap in nats, or `None`. What is capped has no gradient, other than with "scale".
        clip_mode: "pointwise" caps each (token, vocabulary entry) summand from above before the sum, as the release
            does, whose sum can then be negative; "token" caps a token's sum D; "scale" has the same value min(D, clip),
            but keeps the gradient's direction: that of D times min(1, clip / D), so that a token counts as if its
            divergence were `clip` at most.
        top_k: restrict both distributions to k entries at each token. The choice is a constant for the gradient.
        top_k_of: whose most probable entries: "teacher", "student", or "both" for the union, 2 k at most.
        tail: what becomes of the others. False: both distributions are renormalized over the kept entries. True: the
            kept ones stay as they are, and all others form one more entry, whose probability is theirs together. That
            is the divergence of coarser distributions, which is never above the full one.
        return_statistics: return (divergence, `TokenStatistics`) instead.

    Returns:
        (...), nats, float32 or float64.

    Raises:
        ValueError: for settings outside their range and for logits of different shapes.
    """
    check_objective(beta=beta, temperature=temperature, clip=clip, clip_mode=clip_mode, top_k=top_k, top_k_of=top_k_of)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student and teacher logits differ in shape: {tuple(student_logits.shape)}, {tuple(teacher_logits.shape)}"
        )
    s = _log_softmax(student_logits, temperature)  # (..., V)
    t = _log_softmax(teacher_logits.detach(), temperature)  # (..., V)
    student_entropy, teacher_entropy = _entropy(s.detach()), _entropy(t)  # (...)
    is_restricted = top_k is not None and top_k < t.shape[-1]
    if is_restricted:
        indices, repeated = kept_entries(s.detach(), t, top_k, top_k_of)
        s, t = (restricted(role, indices, repeated, tail) for role in (s, t))  # (..., K) or (..., K + 1)

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
    elif clip is not None and clip_mode == "scale":
        divergence = divergence * (clip / divergence.detach().clamp(min=clip))
    if mask is not None:
        divergence = torch.where(mask.bool(), divergence, 0)
    if not return_statistics:
        return divergence

    with torch.no_grad():
        capped_values = (
            summands if clip_mode == "pointwise" else summands.sum(-1, keepdim=True)
        )  # (..., V) or (..., 1)
        above = (capped_values - (math.inf if clip is None else clip)).clamp(min=0)
        clipped_entries = (above > 0).sum(-1).to(s.dtype)
        is_reversed = torch.zeros_like(clipped_entries)
        if clip is not None and clip_mode == "pointwise":
            rows = clipped_entries > 0
            is_reversed[rows] = _reversed(
                summands[rows], s[rows], t[rows], beta, clip, last_is_tail=is_restricted and tail
            ).to(s.dtype)
        statistics = TokenStatistics(
            divergence=summands.sum(-1),
            clipped_entries=clipped_entries,
            clipped_mass=above.sum(-1),
            positive_mass=capped_values.clamp(min=0).sum(-1),
            student_entropy=student_entropy,
            teacher_entropy=teacher_entropy,
            reversed=is_reversed,
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
    importance_weights: Tensor | None = None,
) -> Tensor:
    """
    Policy-gradient loss of the sampled tokens alone (paper eq. 9): -A_n log p_S(y_n), A_n = log p_T(y_n) - log p_S(y_n).

    The advantage A_n is a constant for the gradient. `clip` bounds it to [-clip, clip]. With importance weights w_n, for
    tokens that were not drawn from p_S, the loss is -w_n A_n log p_S(y_n). The paper has neither.

    Args:
        student_logits, teacher_logits: (..., V).
        token_ids: (...), int64, the sampled tokens y_n.
        mask: (...), true or non-zero at tokens that count.
        temperature: of both softmaxes.
        clip: bound on the advantage's absolute value in nats, or `None`.
        importance_weights: (...), constants for the gradient: p_S(y_n) over the probability that y_n was drawn with,
            where that is not p_S. `None` for 1.

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
    if importance_weights is not None:
        advantage = advantage * importance_weights.detach().to(s.dtype)
    loss = -advantage * s
    return loss if mask is None else torch.where(mask.bool(), loss, 0)


def policy_gradient_loss(
    student_logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """
    Policy-gradient loss of the sampled tokens with given advantages: -A_n log p_S(y_n), A_n constant for the gradient.

    This is REINFORCE's term, and has the gradient of GRPO's where the tokens are drawn from p_S itself: its ratio of new
    to old policy is then 1, and its clip without effect. Tokens of another sampler need their importance weights in A_n.

    Args:
        student_logits: (..., V).
        token_ids: (...), int64, the sampled tokens y_n.
        advantages: (...), A_n.
        mask: (...), true or non-zero at tokens that count; the others get the value 0 and no gradient.
        temperature: of the softmax.

    Returns:
        (...), float32 or float64. Only its gradient has a meaning.

    Raises:
        ValueError: for a temperature that is not positive.
    """
    check_objective(temperature=temperature, clip=None)
    s = _log_softmax(student_logits, temperature).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)  # (...)
    loss = -advantages.detach().to(s.dtype) * s
    return loss if mask is None else torch.where(mask.bool(), loss, 0)


def _out_dtype(operand: Tensor, result: Tensor) -> dict[str, torch.dtype]:
    """Argument of `torch.mm` and `torch.addmm` that keeps the product of 16-bit operands in float32 (CUDA only)."""
    return {} if operand.dtype == result.dtype else {"out_dtype": result.dtype}


def _operand_dtype(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """CUDA multiplies 16-bit operands into float32 results. Elsewhere the operands are converted to `dtype`."""
    return weight.dtype if hidden.is_cuda and weight.dtype.itemsize == 2 else dtype


def _block_size(weight: Tensor, operand_dtype: torch.dtype) -> int:
    """Rows of the head to convert at a time."""
    return len(weight) if weight.dtype == operand_dtype else 8192


def _project(hidden: Tensor, weight: Tensor, operand_dtype: torch.dtype, logits: Tensor) -> None:
    """logits = hidden weight^T."""
    hidden, size = hidden.to(operand_dtype), _block_size(weight, operand_dtype)
    for block, columns in zip(weight.split(size), logits.split(size, dim=1), strict=True):
        torch.mm(hidden, block.to(operand_dtype).T, out=columns, **_out_dtype(hidden, logits))


def _policy_gradient(
    student_logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    objective: Objective,
    scratch: Tensor,
    gradient: Tensor,
    needs_gradient: bool,
) -> Tensor:
    """
    `policy_gradient_loss`, (n,), of a chunk's logits (n, V), which stay as they are; overwrites `scratch` and `gradient`,
    (n, V) each. The latter becomes the derivative with respect to logits * logit_scale / temperature if there is a need.
    """
    softcap, temperature = objective.logit_softcap, objective.temperature
    z = torch.mul(student_logits, objective.logit_scale / (temperature if softcap is None else softcap), out=scratch)
    if softcap is not None:
        z.tanh_().mul_(softcap / temperature)
    index = token_ids.unsqueeze(-1)  # (n, 1)
    log_probs = torch.log_softmax(z, -1, out=gradient).gather(-1, index)  # (n, 1)
    if needs_gradient:
        # A (p_S - onehot(y)), where p_S(y) - 1 = expm1(log p_S(y)) keeps its digits at probabilities close to 1
        gradient.exp_().scatter_(-1, index, log_probs.expm1()).mul_(advantages.unsqueeze(-1))
        if softcap is not None:  # the slope is 1 - tanh^2
            gradient.mul_(z.mul_(temperature / softcap).square_().neg_().add_(1))
    return -advantages * log_probs.squeeze(-1)


def _over_chunks(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    teacher_weight: Tensor,
    token_ids: Tensor | None,
    objective: Objective,
    chunk_size: int | None,
    *,
    hidden_gradient: bool,
    weight_gradient: bool,
    row_weights: Tensor | None = None,
    advantages: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """
    Values (N,), the objective's times `row_weights` plus the policy gradient's with `advantages`; statistics (7, N) or
    (0, N) of the objective alone; and if asked for the derivatives of values.sum(): with respect to `student_hidden`
    (N, H), and to `weight` (V, H) as the student's head.
    """
    (num_tokens, _), (vocab_size, _), device = student_hidden.shape, weight.shape, student_hidden.device
    dtype = torch.promote_types(torch.promote_types(student_hidden.dtype, weight.dtype), torch.float32)
    operand_dtype = _operand_dtype(student_hidden, weight, dtype)
    block_size = _block_size(weight, operand_dtype)

    def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
        torch.addmm(total, a, b, out=total, **_out_dtype(a, total))

    needs_gradient = hidden_gradient or weight_gradient
    if chunk_size is None:
        itemsize = (2 if advantages is None else 3) * dtype.itemsize
        bytes_per_token = vocab_size * (itemsize + (operand_dtype.itemsize if operand_dtype != dtype else 0))
        chunk_size = _automatic_chunk_size(bytes_per_token, device)
    chunk_size = min(chunk_size, max(num_tokens, 1))
    buffers = torch.empty(2, chunk_size, vocab_size, dtype=dtype, device=device)
    gradient_buffer = buffers[0] if operand_dtype == dtype else torch.empty_like(buffers[0], dtype=operand_dtype)
    policy_gradient_buffer = None if advantages is None else torch.empty_like(buffers[0])
    values = torch.empty(num_tokens, dtype=dtype, device=device)
    statistics = torch.empty(
        len(TokenStatistics._fields) if objective.statistics else 0, num_tokens, dtype=dtype, device=device
    )
    d_hidden = torch.empty_like(student_hidden) if hidden_gradient else None
    d_weight = torch.zeros_like(weight, dtype=dtype) if weight_gradient else None
    scale = objective.logit_scale / objective.temperature

    with torch.autocast(device.type, enabled=False):
        for start in range(0, num_tokens, chunk_size):
            rows = slice(start, min(start + chunk_size, num_tokens))
            student_logits, teacher_logits, gradient = (
                buffer[: rows.stop - start] for buffer in (*buffers, gradient_buffer)
            )
            _project(student_hidden[rows], weight, operand_dtype, student_logits)
            if advantages is not None:  # now, while the student's logits are there and the teacher's buffer is free
                policy_gradient = policy_gradient_buffer[: rows.stop - start]
                policy_gradient_values = _policy_gradient(
                    student_logits,
                    token_ids[rows],
                    advantages[rows],
                    objective,
                    teacher_logits,
                    policy_gradient,
                    needs_gradient,
                )
            _project(teacher_hidden[rows], teacher_weight, operand_dtype, teacher_logits)
            values[rows], statistics[:, rows] = elementwise(
                student_logits,
                teacher_logits,
                None if token_ids is None else token_ids[rows],
                objective,
                gradient if needs_gradient else None,
            )
            if row_weights is not None:
                values[rows].mul_(row_weights[rows])
                if needs_gradient:
                    gradient.mul_(row_weights[rows].unsqueeze(-1))
            if advantages is not None:
                values[rows].add_(policy_gradient_values)
                if needs_gradient:
                    gradient.add_(policy_gradient)
            if hidden_gradient:
                d_rows = torch.zeros_like(student_hidden[rows], dtype=dtype)
                for block, columns in zip(weight.split(block_size), gradient.split(block_size, dim=1), strict=True):
                    add_product(d_rows, columns, block.to(operand_dtype))
                d_hidden[rows] = d_rows.mul_(scale)
            if weight_gradient:
                add_product(d_weight, gradient.T, student_hidden[rows].to(operand_dtype))
    return values, statistics, d_hidden, d_weight.mul_(scale).to(weight.dtype) if weight_gradient else None


def _automatic_chunk_size(bytes_per_token: int, device: torch.device) -> int:
    """Tokens whose buffers of vocabulary size fill 1 GiB of a GPU, or half of what it has left, or 320 MiB elsewhere."""
    budget = 320 * 2**20
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        budget = min(2**30, free // 2)
    chunk_size = budget // bytes_per_token
    return max(1, chunk_size if chunk_size < 64 else chunk_size // 64 * 64)


class _FusedLinearLoss(torch.autograd.Function):
    """
    Takes the gradient along in the forward pass, where the logits are, and keeps dHidden: each value depends on the
    hidden state of its own token only, so that the backward pass has but to scale the rows, whatever comes after.
    The same goes for the weight's gradient where all values weigh the same, as in a sum or a mean. Else the backward
    pass goes over the chunks again with the weights that it then knows. `row_weights` and `advantages`, (N,), are known
    beforehand.
    """

    @staticmethod
    def forward(
        ctx,
        student_hidden,
        weight,
        teacher_hidden,
        teacher_weight,
        token_ids,
        row_weights,
        advantages,
        objective,
        chunk_size,
    ):
        inputs = (student_hidden, teacher_hidden, weight, teacher_weight, token_ids)
        hidden_gradient, weight_gradient = ctx.needs_input_grad[:2]
        values, statistics, d_hidden, d_weight = _over_chunks(
            *inputs,
            objective,
            chunk_size,
            hidden_gradient=hidden_gradient,
            weight_gradient=weight_gradient,
            row_weights=row_weights,
            advantages=advantages,
        )
        ctx.save_for_backward(d_hidden, d_weight, *((row_weights, advantages, *inputs) if weight_gradient else ()))
        ctx.settings = (objective._replace(statistics=False), chunk_size)
        ctx.mark_non_differentiable(statistics)
        return values, statistics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_values, _):
        d_hidden, d_weight, *inputs = ctx.saved_tensors
        if d_weight is not None:
            row_weights, advantages, *inputs = inputs
            if (grad_values == grad_values[:1]).all():
                d_weight = torch.mul(d_weight, grad_values[:1].sum(), out=torch.empty_like(d_weight))
            else:
                d_weight = _over_chunks(
                    *inputs,
                    *ctx.settings,
                    hidden_gradient=False,
                    weight_gradient=True,
                    row_weights=grad_values if row_weights is None else grad_values * row_weights,
                    advantages=None if advantages is None else grad_values * advantages,
                )[3]
        if d_hidden is not None:
            d_hidden = torch.mul(d_hidden, grad_values.unsqueeze(-1), out=torch.empty_like(d_hidden))
        return d_hidden, d_weight, None, None, None, None, None, None, None


def _fused_linear_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    teacher_weight: Tensor | None,
    token_ids: Tensor | None,
    objective: Objective,
    chunk_size: int | None,
    *,
    token_weights: Tensor | None,
    advantages: Tensor | None,
    importance_weights: Tensor | None = None,
) -> Tensor | tuple[Tensor, TokenStatistics]:
    check_objective(
        beta=objective.beta,
        temperature=objective.temperature,
        clip=objective.clip,
        clip_mode=objective.clip_mode,
        top_k=objective.top_k,
        top_k_of=objective.top_k_of,
    )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, or None to choose it, got {chunk_size}")
    teacher_weight = weight if teacher_weight is None else teacher_weight
    shapes = [tuple(tensor.shape) for tensor in (student_hidden, teacher_hidden, weight, teacher_weight)]
    of_tokens = (token_ids, token_weights, importance_weights, advantages)
    of_tokens = [tensor for tensor in of_tokens if tensor is not None]
    if (
        any(len(shape) != 2 for shape in shapes)
        or (shapes[0][0], shapes[2][0]) != (shapes[1][0], shapes[3][0])
        or (shapes[0][1], shapes[1][1]) != (shapes[2][1], shapes[3][1])
        or any(tensor.shape != student_hidden.shape[:1] for tensor in of_tokens)
    ):
        raise ValueError(
            "expected student and teacher hidden states (N, H), heads (V, H), token ids, weights and advantages (N,), got "
            f"{', '.join(map(str, shapes + [tuple(tensor.shape) for tensor in of_tokens]))}"
        )
    if not torch.is_grad_enabled():
        student_hidden, weight = student_hidden.detach(), weight.detach()
    weights = [tensor.detach() for tensor in (token_weights, importance_weights) if tensor is not None]
    values, statistics = _FusedLinearLoss.apply(
        student_hidden,
        weight,
        teacher_hidden.detach(),
        teacher_weight.detach(),
        token_ids,
        math.prod(weights) if weights else None,
        None if advantages is None else advantages.detach(),
        objective,
        chunk_size,
    )
    return (values, TokenStatistics(*statistics)) if objective.statistics else values


def fused_linear_jsd(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    lm_head_weight: Tensor,
    *,
    teacher_lm_head_weight: Tensor | None = None,
    beta: float,
    temperature: float = 1.0,
    clip: float | None = None,
    clip_mode: str = "pointwise",
    top_k: int | None = None,
    top_k_of: str = "teacher",
    tail: bool = False,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_size: int | None = None,
    return_statistics: bool = False,
    token_weights: Tensor | None = None,
    advantages: Tensor | None = None,
    token_ids: Tensor | None = None,
) -> Tensor | tuple[Tensor, TokenStatistics]:
    """
    `generalized_jsd` of the logits of a language model's head, which never exist for more than `chunk_size` tokens.

        logits = c tanh(a / c) with the soft cap c, else a, where a = logit_scale * hidden lm_head_weight^T

    It costs three products of the size (N, H) x (H, V), one more for the gradient of a head that is trained, and two
    or, where dtypes differ, three buffers (chunk_size, V); with `advantages` one more. Equal to the dense form whatever
    reduction follows. Logits are float32 also where hidden states and weight are not, under autocast too; on CUDA, where
    the weight has 16 bits, the gradient of the logits is rounded to them for its product. Gradients reach
    `student_hidden` and, as far as they want one, `lm_head_weight`, in their role as the student's; the teacher has
    none. The Triton kernel, on CUDA, does everything but `top_k` and `advantages`, whose element-wise part is PyTorch
    operations, for `top_k` on a few tokens at a time, and slower.

    Args:
        student_hidden, teacher_hidden: (N, H), what enters the head, of any floating dtype.
        lm_head_weight: (V, H). The head has no bias.
        teacher_lm_head_weight: (V, H), where the teacher has another head; its H may differ from the student's.
        beta, temperature, clip, clip_mode, top_k, top_k_of, tail, return_statistics: as for `generalized_jsd`.
        logit_scale, logit_softcap: as in the model's configuration.
        chunk_size: tokens at a time; `None` chooses it from V, the dtypes and the memory that is free.
        token_weights: (N,), constants that multiply each token's divergence, not its statistics. A trained head's
            gradient is then known after the forward pass, other than with weights that are multiplied in later.
        advantages: (N,), A_n: adds `policy_gradient_loss`, which `token_weights` do not weigh, without a further product.
        token_ids: (N,), int64, the sampled tokens; for the advantages alone.

    Returns:
        (N,), nats, float32, or float64 if an input is. If the head is trained and the values are not all weighted alike,
        the backward pass computes the chunks again, and needs the inputs unchanged.

    Raises:
        ValueError: for settings outside their range, for shapes that do not fit, and for advantages without token ids.
    """
    if advantages is not None and token_ids is None:
        raise ValueError("advantages need token_ids, the sampled tokens that they belong to")
    objective = Objective(
        beta,
        temperature,
        clip,
        clip_mode,
        top_k,
        logit_scale,
        logit_softcap,
        sampled=False,
        statistics=return_statistics,
        top_k_of=top_k_of,
        tail=tail,
    )
    return _fused_linear_loss(
        student_hidden,
        teacher_hidden,
        lm_head_weight,
        teacher_lm_head_weight,
        token_ids,
        objective,
        chunk_size,
        token_weights=token_weights,
        advantages=advantages,
    )


def fused_linear_sampled_token_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    lm_head_weight: Tensor,
    token_ids: Tensor,
    *,
    teacher_lm_head_weight: Tensor | None = None,
    temperature: float = 1.0,
    clip: float | None = None,
    importance_weights: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_size: int | None = None,
    return_statistics: bool = False,
    beta: float = 1.0,
    token_weights: Tensor | None = None,
    advantages: Tensor | None = None,
) -> Tensor | tuple[Tensor, TokenStatistics]:
    """
    `sampled_token_loss` of the logits of a language model's head; what is not said here is as in `fused_linear_jsd`.

    Args:
        token_ids: (N,), int64, the sampled tokens.
        clip: bound on the advantage's absolute value in nats, or `None`.
        importance_weights: (N,), as for `sampled_token_loss`.
        return_statistics: return (loss, `TokenStatistics`), those of the divergence with `beta`, without a cap or
            weights; `reversed` is thus 0, since the sign of one sample's gradient says nothing.
        beta: of the statistics. The loss follows the gradient of beta = 1 on average.
        token_weights: (N,), constants that multiply each token's loss, with `importance_weights` their product.
        advantages: (N,), further advantages of the sampled tokens, which neither weights nor `clip` concern.

    Returns:
        (N,), float32 or float64.
    """
    objective = Objective(
        beta, temperature, clip, "pointwise", None, logit_scale, logit_softcap, True, return_statistics
    )
    return _fused_linear_loss(
        student_hidden,
        teacher_hidden,
        lm_head_weight,
        teacher_lm_head_weight,
        token_ids,
        objective,
        chunk_size,
        token_weights=token_weights,
        advantages=advantages,
        importance_weights=importance_weights,
    )


@torch.no_grad()
def fused_linear_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """
    Log-probabilities of given tokens, without gradient and without the full logits.

    Args:
        hidden: (N, H), what enters the head.
        lm_head_weight: (V, H).
        token_ids: (N,), int64.
        temperature: of the softmax.
        logit_scale, logit_softcap, chunk_size: as for `fused_linear_jsd`.

    Returns:
        (N,), nats, float32, or float64 if an input is.
    """
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, lm_head_weight.dtype), torch.float32)
    operand_dtype = _operand_dtype(hidden, lm_head_weight, dtype)
    num_tokens, vocab_size = len(hidden), len(lm_head_weight)
    if chunk_size is None:
        chunk_size = _automatic_chunk_size(2 * vocab_size * dtype.itemsize, hidden.device)
    buffer = torch.empty(min(chunk_size, num_tokens), vocab_size, dtype=dtype, device=hidden.device)
    logprobs = torch.empty(num_tokens, dtype=dtype, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, num_tokens, chunk_size):
            rows = slice(start, min(start + chunk_size, num_tokens))
            logits = buffer[: rows.stop - start]
            _project(hidden[rows], lm_head_weight, operand_dtype, logits)
            logits.mul_(logit_scale)
            if logit_softcap is not None:
                logits.div_(logit_softcap).tanh_().mul_(logit_softcap)
            logits.div_(temperature)
            logprobs[rows] = logits.gather(1, token_ids[rows, None]).squeeze(1) - logits.logsumexp(1)
    return logprobs
