"""The objectives of OPSD from hidden states: the logits exist for one chunk of tokens at a time."""

import math
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opsd.losses.divergence import Objective, TokenLosses, TokenStatistics
from opsd.losses.elementwise import HeadSettings, chunk_losses, chunk_policy_gradient

HAS_TRITON = find_spec("triton") is not None  # it comes with PyTorch's CUDA builds
if HAS_TRITON:
    from opsd.losses.triton_kernel import chunk_losses_triton, is_supported

PLAIN_HEAD = HeadSettings()


def read_head_settings(model: PreTrainedModel) -> HeadSettings:
    """
    Read from a model's configuration how its logits follow from the output of its head.

    Raises:
        ValueError: for a head that the fused losses do not support.
    """
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    if type(head) is not nn.Linear or head.bias is not None:
        raise ValueError(
            f"--loss_implementation fused needs a plain linear head without bias, not {type(head).__name__} (an "
            "adapter on it, --lora_modules_to_save lm_head, a bias?); choose --loss_implementation dense"
        )
    factors = [getattr(config, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")]
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        factors.append(divisor if config.model_type == "hyperclovax" else 1.0 / divisor)
    scale = next((factor for factor in factors if factor is not None), 1.0)
    return HeadSettings(logit_scale=scale, logit_softcap=getattr(config, "final_logit_softcapping", None))


# Matrix products


def _out_dtype(operand: Tensor, result: Tensor) -> dict[str, torch.dtype]:
    """Argument of `torch.mm` and `torch.addmm` that keeps the product of 16-bit operands in float32 (CUDA only)."""
    return {} if operand.dtype == result.dtype else {"out_dtype": result.dtype}


def _result_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Dtype of logits and losses: at least float32."""
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def _operand_dtype(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Dtype of the factors: CUDA multiplies 16-bit ones into float32. Elsewhere they are converted to `dtype`."""
    return weight.dtype if hidden.is_cuda and weight.dtype.itemsize == 2 else dtype


def _block_size(weight: Tensor, operand_dtype: torch.dtype) -> int:
    """Number of rows of the head to convert at a time."""
    return len(weight) if weight.dtype == operand_dtype else 8192


def _project(hidden: Tensor, weight: Tensor, operand_dtype: torch.dtype, logits: Tensor) -> None:
    """Write hidden weight^T into `logits`."""
    hidden, size = hidden.to(operand_dtype), _block_size(weight, operand_dtype)
    for block, columns in zip(weight.split(size), logits.split(size, dim=1), strict=True):
        torch.mm(hidden, block.to(operand_dtype).T, out=columns, **_out_dtype(hidden, logits))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    torch.addmm(total, a, b, out=total, **_out_dtype(a, total))


def _automatic_chunk_size(bytes_per_token: int, device: torch.device) -> int:
    """Number of tokens whose buffers take 320 MiB or, on a GPU, 1 GiB but at most half of the free memory."""
    budget = 320 * 2**20
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        budget = min(2**30, free // 2)
    chunk_size = budget // bytes_per_token
    return max(1, chunk_size if chunk_size < 64 else chunk_size // 64 * 64)


# Chunks and autograd


class _Inputs(NamedTuple):
    student_hidden: Tensor  # (N, H)
    teacher_hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H), the student's head
    teacher_weight: Tensor  # (V, H)
    token_ids: Tensor | None  # (N,)
    token_weights: Tensor | None  # (N,)
    advantages: Tensor | None  # (N,)


class _Settings(NamedTuple):
    objective: Objective
    head: HeadSettings
    chunk_size: int | None
    with_statistics: bool


def _over_chunks(
    inputs: _Inputs, settings: _Settings, *, hidden_gradient: bool, weight_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """
    Compute the losses chunk by chunk: those of the objective times the token weights, plus the policy gradient's.

    Returns:
        Losses (N,); statistics of the objective alone, (7, N), or (0, N) if not asked for; the gradient of the losses'
        sum with respect to `student_hidden` (N, H) and to `weight` (V, H), each `None` if not asked for.
    """
    student_hidden, teacher_hidden, weight, teacher_weight, token_ids, token_weights, advantages = inputs
    objective, head, chunk_size, with_statistics = settings
    (num_tokens, _), (vocab_size, _), device = student_hidden.shape, weight.shape, student_hidden.device
    dtype = _result_dtype(student_hidden, weight)
    operand_dtype = _operand_dtype(student_hidden, weight, dtype)
    block_size = _block_size(weight, operand_dtype)
    needs_gradient = hidden_gradient or weight_gradient
    if chunk_size is None:
        itemsize = (2 if advantages is None else 3) * dtype.itemsize
        bytes_per_token = vocab_size * (itemsize + (operand_dtype.itemsize if operand_dtype != dtype else 0))
        chunk_size = _automatic_chunk_size(bytes_per_token, device)
    chunk_size = min(chunk_size, max(num_tokens, 1))

    buffers = torch.empty(2, chunk_size, vocab_size, dtype=dtype, device=device)
    gradient_buffer = buffers[0] if operand_dtype == dtype else torch.empty_like(buffers[0], dtype=operand_dtype)
    policy_gradient_buffer = None if advantages is None else torch.empty_like(buffers[0])
    losses = torch.empty(num_tokens, dtype=dtype, device=device)
    num_statistics = len(TokenStatistics._fields) if with_statistics else 0
    statistics = torch.empty(num_statistics, num_tokens, dtype=dtype, device=device)
    d_hidden = torch.empty_like(student_hidden) if hidden_gradient else None
    d_weight = torch.zeros_like(weight, dtype=dtype) if weight_gradient else None
    scale = head.logit_scale / objective.temperature

    with torch.autocast(device.type, enabled=False):
        for start in range(0, num_tokens, chunk_size):
            rows = slice(start, min(start + chunk_size, num_tokens))
            size = rows.stop - start
            student_logits, teacher_logits, gradient = buffers[0, :size], buffers[1, :size], gradient_buffer[:size]
            _project(student_hidden[rows], weight, operand_dtype, student_logits)
            if advantages is not None:
                # Now, since the student's logits are still unchanged and the teacher's buffer is free as scratch
                policy_gradient = policy_gradient_buffer[:size]
                policy_gradient_losses = chunk_policy_gradient(
                    student_logits,
                    token_ids[rows],
                    advantages[rows],
                    objective.temperature,
                    head,
                    scratch=teacher_logits,
                    gradient=policy_gradient,
                    needs_gradient=needs_gradient,
                )
            _project(teacher_hidden[rows], teacher_weight, operand_dtype, teacher_logits)
            use_triton = HAS_TRITON and is_supported(student_logits, objective)
            losses[rows], statistics[:, rows] = (chunk_losses_triton if use_triton else chunk_losses)(
                student_logits,
                teacher_logits,
                None if token_ids is None else token_ids[rows],
                objective,
                head,
                gradient if needs_gradient else None,
                with_statistics,
            )
            if token_weights is not None:
                losses[rows].mul_(token_weights[rows])
                if needs_gradient:
                    gradient.mul_(token_weights[rows].unsqueeze(-1))
            if advantages is not None:
                losses[rows].add_(policy_gradient_losses)
                if needs_gradient:
                    gradient.add_(policy_gradient)
            if hidden_gradient:
                d_rows = torch.zeros_like(student_hidden[rows], dtype=dtype)
                for block, columns in zip(weight.split(block_size), gradient.split(block_size, dim=1), strict=True):
                    _add_product(d_rows, columns, block.to(operand_dtype))
                d_hidden[rows] = d_rows.mul_(scale)
            if weight_gradient:
                _add_product(d_weight, gradient.T, student_hidden[rows].to(operand_dtype))
    return losses, statistics, d_hidden, d_weight.mul_(scale).to(weight.dtype) if weight_gradient else None


class _FusedLinearLoss(torch.autograd.Function):
    """
    Computes the gradient in the forward pass, while the logits exist.

    Each loss depends only on its own token's hidden state, so forward() stores dHidden and backward() rescales its
    rows. The head's gradient is stored too, and rescaled if the incoming gradient is the same for all tokens, as after
    a sum or mean. Otherwise backward() goes over the chunks again, with the incoming gradient as token weights.
    """

    @staticmethod
    def forward(ctx, settings, *inputs):
        inputs = _Inputs(*inputs)
        hidden_gradient, weight_gradient = (
            ctx.needs_input_grad[1 + inputs._fields.index(name)] for name in ("student_hidden", "weight")
        )
        losses, statistics, d_hidden, d_weight = _over_chunks(
            inputs, settings, hidden_gradient=hidden_gradient, weight_gradient=weight_gradient
        )
        ctx.save_for_backward(d_hidden, d_weight, *(inputs if weight_gradient else ()))
        ctx.settings = settings._replace(with_statistics=False)
        ctx.mark_non_differentiable(statistics)
        return losses, statistics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_losses, _):
        d_hidden, d_weight, *inputs = ctx.saved_tensors
        if d_weight is not None and (grad_losses == grad_losses[:1]).all():
            d_weight = torch.mul(d_weight, grad_losses[:1].sum(), out=torch.empty_like(d_weight))
        elif d_weight is not None:
            inputs = _Inputs(*inputs)
            token_weights, advantages = inputs.token_weights, inputs.advantages
            inputs = inputs._replace(
                token_weights=grad_losses if token_weights is None else grad_losses * token_weights,
                advantages=None if advantages is None else grad_losses * advantages,
            )
            d_weight = _over_chunks(inputs, ctx.settings, hidden_gradient=False, weight_gradient=True)[3]
        if d_hidden is not None:
            d_hidden = torch.mul(d_hidden, grad_losses.unsqueeze(-1), out=torch.empty_like(d_hidden))
        return None, *_Inputs(d_hidden, None, d_weight, None, None, None, None)


def _fused_linear_loss(
    inputs: _Inputs, settings: _Settings, importance_weights: Tensor | None = None
) -> tuple[Tensor, TokenStatistics | None]:
    """Check the arguments, and apply `_FusedLinearLoss`. Token and importance weights are multiplied."""
    if settings.chunk_size is not None and settings.chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, or None to choose it, got {settings.chunk_size}")
    if inputs.advantages is not None and inputs.token_ids is None:
        raise ValueError("advantages need token_ids, the sampled tokens that they belong to")
    if inputs.teacher_weight is None:
        inputs = inputs._replace(teacher_weight=inputs.weight)
    shapes = [tuple(tensor.shape) for tensor in inputs[:4]]
    of_tokens = [tensor for tensor in (*inputs[4:], importance_weights) if tensor is not None]
    student, teacher, head, teacher_head = shapes
    if (
        any(len(shape) != 2 for shape in shapes)
        or (student[0], head[0]) != (teacher[0], teacher_head[0])
        or (student[1], teacher[1]) != (head[1], teacher_head[1])
        or any(tensor.shape != student[:1] for tensor in of_tokens)
    ):
        raise ValueError(
            "expected student and teacher hidden states (N, H), heads (V, H), token ids, weights and advantages (N,), "
            f"got {', '.join(map(str, shapes + [tuple(tensor.shape) for tensor in of_tokens]))}"
        )
    weights = [tensor for tensor in (inputs.token_weights, importance_weights) if tensor is not None]
    inputs = inputs._replace(token_weights=math.prod(weights) if weights else None)
    has_gradient = ("student_hidden", "weight") if torch.is_grad_enabled() else ()
    losses, statistics = _FusedLinearLoss.apply(
        settings,
        *(
            tensor if tensor is None or name in has_gradient else tensor.detach()
            for name, tensor in inputs._asdict().items()
        ),
    )
    return losses, TokenStatistics(*statistics) if settings.with_statistics else None


# Losses


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
    top_k_support: str = "teacher",
    top_k_add_tail: bool = False,
    head: HeadSettings = PLAIN_HEAD,
    chunk_size: int | None = None,
    return_statistics: bool = False,
    token_weights: Tensor | None = None,
    advantages: Tensor | None = None,
    token_ids: Tensor | None = None,
) -> Tensor | tuple[Tensor, TokenStatistics]:
    """
    Compute `generalized_jsd` of the logits of a language model's head, `chunk_size` tokens at a time.

    Values and gradients equal the dense form's, whatever reduction follows. Gradients reach `student_hidden` and, if
    it requires them, `lm_head_weight` in its role as the student's head; the teacher gets none.

    It costs three products of the size (N, H) x (H, V), and one more if the head is trained. It holds two buffers
    (chunk_size, V), one more if dtypes differ, and one more with `advantages`. If the head is trained and the losses
    are not all weighted alike afterwards, the backward pass computes the chunks again: leave the inputs unchanged.

    Logits are float32 even if hidden states and weight are not, and under autocast. On CUDA with a 16-bit weight, the
    gradient of the logits is rounded to 16 bits for its product. On CUDA a Triton kernel does the element-wise part,
    except for `top_k` and `advantages`, which use slower PyTorch operations.

    Args:
        student_hidden, teacher_hidden: (N, H), the head's input, of any floating dtype.
        lm_head_weight: (V, H). The head has no bias.
        teacher_lm_head_weight: (V, H), if the teacher has another head; its H may differ from the student's.
        beta, temperature, clip, clip_mode, top_k, top_k_support, top_k_add_tail, return_statistics: as for
            `generalized_jsd`.
        head: how the logits follow from the head's output.
        chunk_size: number of tokens at a time; `None` chooses it from V, the dtypes and the free memory.
        token_weights: (N,), constants that multiply each token's divergence, but not its statistics. Unlike weights
            that are multiplied in later, they do not make the backward pass compute the chunks again.
        advantages: (N,), A_n: adds `policy_gradient_loss`, which `token_weights` do not multiply.
        token_ids: (N,), int64, the sampled tokens; needed for the advantages only.

    Returns:
        (N,), nats, float32, or float64 if an input is.

    Raises:
        ValueError: for settings outside their range, for shapes that do not fit, and for advantages without token ids.
    """
    objective = Objective(
        beta=beta,
        temperature=temperature,
        clip=clip,
        clip_mode=clip_mode,
        top_k=top_k,
        top_k_support=top_k_support,
        top_k_add_tail=top_k_add_tail,
    )
    inputs = _Inputs(
        student_hidden, teacher_hidden, lm_head_weight, teacher_lm_head_weight, token_ids, token_weights, advantages
    )
    divergence, statistics = _fused_linear_loss(inputs, _Settings(objective, head, chunk_size, return_statistics))
    return (divergence, statistics) if return_statistics else divergence


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
    head: HeadSettings = PLAIN_HEAD,
    chunk_size: int | None = None,
    return_statistics: bool = False,
    beta: float = 1.0,
    token_weights: Tensor | None = None,
    advantages: Tensor | None = None,
) -> Tensor | tuple[Tensor, TokenStatistics]:
    """
    Compute `sampled_token_loss` of the logits of a language model's head.

    Arguments that are not listed here are as for `fused_linear_jsd`, and so are costs and errors.

    Args:
        token_ids: (N,), int64, the sampled tokens.
        clip: bound on the advantage's absolute value in nats, or `None`.
        importance_weights: (N,), as for `sampled_token_loss`.
        return_statistics: return (loss, `TokenStatistics`), those of the divergence with `beta`, without cap and
            weights. `wrong_way` is then 0, since the sign of one sample's gradient says nothing.
        beta: of the statistics only. The loss has the gradient of beta = 1 in expectation.
        token_weights: (N,), constants that multiply each token's loss, together with `importance_weights`.
        advantages: (N,), further advantages of the sampled tokens, which neither weights nor `clip` change.

    Returns:
        (N,), float32 or float64.
    """
    objective = Objective(beta=beta, temperature=temperature, sampled_token=True, sampled_token_clip=clip)
    inputs = _Inputs(
        student_hidden, teacher_hidden, lm_head_weight, teacher_lm_head_weight, token_ids, token_weights, advantages
    )
    settings = _Settings(objective, head, chunk_size, return_statistics)
    loss, statistics = _fused_linear_loss(inputs, settings, importance_weights)
    return (loss, statistics) if return_statistics else loss


@torch.no_grad()
def fused_linear_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    head: HeadSettings = PLAIN_HEAD,
    chunk_size: int | None = None,
) -> Tensor:
    """
    Compute the log-probabilities of given tokens, without gradient and without the full logits.

    Args:
        hidden: (N, H), the head's input.
        lm_head_weight: (V, H).
        token_ids: (N,), int64.
        temperature: of the softmax.
        head, chunk_size: as for `fused_linear_jsd`.

    Returns:
        (N,), nats, float32, or float64 if an input is.
    """
    dtype = _result_dtype(hidden, lm_head_weight)
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
            logits.mul_(head.logit_scale)
            if head.logit_softcap is not None:
                logits.div_(head.logit_softcap).tanh_().mul_(head.logit_softcap)
            logits.div_(temperature)
            logprobs[rows] = logits.gather(1, token_ids[rows, None]).squeeze(1) - logits.logsumexp(1)
    return logprobs


def fused_token_losses(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    lm_head_weight: Tensor,
    token_ids: Tensor,
    objective: Objective,
    *,
    teacher_lm_head_weight: Tensor | None = None,
    head: HeadSettings = PLAIN_HEAD,
    chunk_size: int | None = None,
    weights: Tensor | None = None,
    advantages: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
) -> TokenLosses:
    """
    Compute `dense_token_losses` from hidden states.

    Args:
        student_hidden, teacher_hidden, lm_head_weight, teacher_lm_head_weight, head, chunk_size: as for
            `fused_linear_jsd`.
        token_ids, objective, weights, advantages, sampler_logprobs: as for `dense_token_losses`.

    Returns:
        As `dense_token_losses`.

    Raises:
        ValueError: for shapes that do not fit, and if the importance sampling correction lacks `sampler_logprobs`.
    """
    logprobs = None
    if sampler_logprobs is not None:
        logprobs = fused_linear_logprobs(
            student_hidden,
            lm_head_weight,
            token_ids,
            temperature=objective.sampler_logprob_temperature,
            head=head,
            chunk_size=chunk_size,
        )
    advantages, importance_weights = objective.policy_gradient_factors(advantages, logprobs, sampler_logprobs)
    if weights is not None and (weights == 1).all():
        weights = None  # saves a pass over the gradient of the logits
    inputs = _Inputs(
        student_hidden, teacher_hidden, lm_head_weight, teacher_lm_head_weight, token_ids, weights, advantages
    )
    loss, statistics = _fused_linear_loss(
        inputs,
        _Settings(objective, head, chunk_size, with_statistics=True),
        importance_weights if objective.sampled_token else None,
    )
    return TokenLosses(loss, statistics, logprobs)


@torch.no_grad()
def check_head(
    model: PreTrainedModel, input_ids: Tensor, weight: Tensor, head: HeadSettings, precision: float
) -> None:
    """
    Compare the logits of a model with those that the fused losses compute from its hidden states.

    Args:
        model: model, inside the forward pass of its wrapper if it has one.
        input_ids: (1, T), a few tokens.
        weight: (V, H), the whole weight of the model's head.
        head: settings to check.
        precision: relative error that rounding may leave.

    Raises:
        ValueError: if they differ.
    """
    kept = []
    hook = model.base_model.register_forward_hook(lambda module, inputs, output: kept.append(output[0]))
    try:
        logits = model.forward(input_ids=input_ids, use_cache=False).logits[0].float()
    finally:
        hook.remove()
    with torch.autocast(logits.device.type, enabled=False):
        expected = head.logit_scale * (kept[0][0].to(weight.dtype) @ weight.T).float()
    if head.logit_softcap is not None:
        expected = head.logit_softcap * torch.tanh(expected / head.logit_softcap)
    error = (logits - expected).norm()
    if not error <= precision * expected.norm():
        raise ValueError(
            f"--loss_implementation fused: the logits of {type(model).__name__} do not follow from its hidden states "
            f"as expected (relative error {error / expected.norm():.1e}); choose --loss_implementation dense"
        )
