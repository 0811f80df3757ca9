"""The objectives of OPSD from hidden states: the logits exist for one chunk of tokens at a time."""

from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from trl.trainer.utils import maybe_gather_lm_head_ctx

from opsd.losses.divergence import Objective, TokenLosses, TokenStatistics, TopLogprobs
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


def _dtypes(hidden: Tensor, weight: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """
    Choose the dtype of the logits, at least float32, and of the factors: CUDA multiplies 16-bit ones into float32.

    Autocast's dtype is that of the factors in place of float32, whose products are many times slower.
    """
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    has_autocast = torch.is_autocast_enabled("cuda") and weight.dtype == torch.float32
    operand_dtype = torch.get_autocast_dtype("cuda") if has_autocast else weight.dtype
    return dtype, operand_dtype if hidden.is_cuda and operand_dtype.itemsize == 2 else dtype


def _head_blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of the head in `dtype`, a few thousand at a time if they have to be converted."""
    size = len(weight) if weight.dtype == dtype else 8192
    for start in range(0, len(weight), size):
        rows = slice(start, start + size)
        yield rows, weight[rows].to(dtype)


def _project(hidden: Tensor, weight: Tensor, operand_dtype: torch.dtype, logits: Tensor) -> None:
    """Write hidden weight^T into `logits`."""
    hidden = hidden.to(operand_dtype)
    for columns, block in _head_blocks(weight, operand_dtype):
        torch.mm(hidden, block.T, out=logits[:, columns], **_out_dtype(hidden, logits))


def _write_teacher_logits(
    values: Tensor, weight: Tensor, rows: slice, head: HeadSettings, operand_dtype: torch.dtype, logits: Tensor
) -> None:
    """Write the output of the teacher's head for some tokens: from hidden states, or from `TopLogprobs`."""
    if weight.dtype == torch.int64:  # ids of log-probabilities
        TopLogprobs(values[rows], weight[rows]).fill(logits).div_(head.logit_scale)
    else:
        _project(values[rows], weight, operand_dtype, logits)


def _automatic_chunk_size(bytes_per_token: int, device: torch.device) -> int:
    """
    Return the number of tokens whose buffers take 320 MiB or, on a GPU, 1.125 GiB, in whole tiles of a matrix product.

    It does not depend on the free memory: other shapes are other rounding errors, and a run could not be repeated.
    """
    chunk_size = (1152 if device.type == "cuda" else 320) * 2**20 // bytes_per_token
    return max(1, chunk_size if chunk_size < 128 else chunk_size // 128 * 128)


# Chunks and autograd


def _over_chunks(
    settings: tuple[Objective, HeadSettings, int | None, tuple[torch.dtype, torch.dtype]],
    trained: tuple[bool, bool],
    student_hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_ids: Tensor,
    token_weights: Tensor | None,
    advantages: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """
    Compute the losses chunk by chunk: those of the objective times the token weights, plus the policy gradient's.

    Returns:
        Losses (N,); statistics of the objective alone, (7, N); the gradient of the losses' sum with respect to
        `student_hidden` (N, H) and to `weight` (V, H), each `None` if it is not `trained`.
    """
    objective, head, chunk_size, (dtype, operand_dtype) = settings
    hidden_gradient, weight_gradient = trained
    num_tokens, vocab_size, device = len(student_hidden), len(weight), student_hidden.device
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
    statistics = torch.empty(len(TokenStatistics._fields), num_tokens, dtype=dtype, device=device)
    d_hidden = torch.empty_like(student_hidden) if hidden_gradient else None
    d_weight = torch.zeros_like(weight, dtype=dtype) if weight_gradient else None
    scale = head.logit_scale / objective.temperature

    with torch.autocast(device.type, enabled=False):
        for start in range(0, num_tokens, chunk_size):
            rows = slice(start, min(start + chunk_size, num_tokens))
            size, ids = rows.stop - start, token_ids[rows]
            student_logits, teacher_logits, gradient = buffers[0, :size], buffers[1, :size], gradient_buffer[:size]
            _project(student_hidden[rows], weight, operand_dtype, student_logits)
            if advantages is not None and policy_gradient_buffer is not None:
                # Now, since the student's logits are still unchanged and the teacher's buffer is free as scratch
                policy_gradient = policy_gradient_buffer[:size]
                policy_gradient_losses = chunk_policy_gradient(
                    student_logits, ids, advantages[rows], objective, head, teacher_logits, policy_gradient
                )
            _write_teacher_logits(teacher_hidden, teacher_weight, rows, head, operand_dtype, teacher_logits)
            use_triton = HAS_TRITON and is_supported(student_logits, objective)
            losses[rows], statistics[:, rows] = (chunk_losses_triton if use_triton else chunk_losses)(
                student_logits, teacher_logits, ids, objective, head, gradient if needs_gradient else None
            )
            if token_weights is not None:
                losses[rows].mul_(token_weights[rows])
                if needs_gradient:
                    gradient.mul_(token_weights[rows].unsqueeze(-1))
            if advantages is not None:
                losses[rows].add_(policy_gradient_losses)
                if needs_gradient:
                    gradient.add_(policy_gradient)
            if d_hidden is not None:
                d_rows = torch.zeros_like(student_hidden[rows], dtype=dtype)
                for columns, block in _head_blocks(weight, operand_dtype):
                    torch.addmm(d_rows, gradient[:, columns], block, out=d_rows, **_out_dtype(block, d_rows))
                d_hidden[rows] = d_rows.mul_(scale)
            if d_weight is not None:
                hidden = student_hidden[rows].to(operand_dtype)
                torch.addmm(d_weight, gradient.T, hidden, out=d_weight, **_out_dtype(hidden, d_weight))
    return losses, statistics, d_hidden, None if d_weight is None else d_weight.mul_(scale).to(weight.dtype)


class _FusedLosses(torch.autograd.Function):
    """
    Computes the gradient in the forward pass, while the logits exist.

    Each loss depends only on its own token's hidden state, so forward() stores dHidden and backward() rescales its
    rows. The head's gradient is stored too, and rescaled if the incoming gradient is the same for all tokens, as after
    a sum or mean. Otherwise backward() goes over the chunks again, with the incoming gradient as token weights.
    """

    @staticmethod
    def forward(ctx, settings, *inputs):
        losses, statistics, d_hidden, d_weight = _over_chunks(settings, ctx.needs_input_grad[1:3], *inputs)
        ctx.save_for_backward(d_hidden, d_weight, *(() if d_weight is None else inputs))
        ctx.settings = settings
        ctx.mark_non_differentiable(statistics)
        return losses, statistics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_losses, _):
        d_hidden, d_weight, *inputs = ctx.saved_tensors
        # After a sum all are one number in memory: known without a GPU that has to be waited for
        if d_weight is not None and (grad_losses.stride() == (0,) or (grad_losses == grad_losses[:1]).all()):
            d_weight = torch.mul(d_weight, grad_losses[:1].sum(), out=torch.empty_like(d_weight))
        elif d_weight is not None:
            *inputs, weights, advantages = inputs
            weights = grad_losses if weights is None else grad_losses * weights
            advantages = None if advantages is None else grad_losses * advantages
            *_, d_weight = _over_chunks(ctx.settings, (False, True), *inputs, weights, advantages)
        if d_hidden is not None:
            d_hidden = torch.mul(d_hidden, grad_losses.unsqueeze(-1), out=torch.empty_like(d_hidden))
        return None, d_hidden, d_weight, None, None, None, None, None


# Losses


@torch.no_grad()
def _logprobs(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, temperature: float, head: HeadSettings, chunk_size: int | None
) -> Tensor:
    """Log-probabilities of given tokens, (N,), nats, of the dtype of the losses, without the full logits."""
    dtype, operand_dtype = _dtypes(hidden, weight)
    if chunk_size is None:
        chunk_size = _automatic_chunk_size(2 * len(weight) * dtype.itemsize, hidden.device)
    buffer = torch.empty(min(chunk_size, len(hidden)), len(weight), dtype=dtype, device=hidden.device)
    logprobs = []
    with torch.autocast(hidden.device.type, enabled=False):
        for rows, ids in zip(hidden.split(chunk_size), token_ids.split(chunk_size), strict=True):
            logits = buffer[: len(rows)]
            _project(rows, weight, operand_dtype, logits)
            logits.mul_(head.logit_scale)
            if head.logit_softcap is not None:
                logits.div_(head.logit_softcap).tanh_().mul_(head.logit_softcap)
            logits.div_(temperature)
            logprobs.append(logits.gather(1, ids.unsqueeze(1)).squeeze(1) - logits.logsumexp(1))
    return torch.cat(logprobs)


def fused_token_losses(
    student_hidden: Tensor,
    teacher_hidden: Tensor | TopLogprobs,
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
    Compute `dense_token_losses` of the logits of a language model's head, `chunk_size` tokens at a time.

    Values and gradients equal the dense form's, whatever reduction follows. Gradients reach `student_hidden` and, if
    it requires them, `lm_head_weight` in its role as the student's head; the teacher gets none.

    It costs three products of the size (N, H) x (H, V), one more if the head is trained, and one more with
    `sampler_logprobs`. It holds two buffers (chunk_size, V), one more if dtypes differ, and one more with
    `advantages`. If the head is trained and the losses are not all weighted alike afterwards, the backward pass
    computes the chunks again: leave the inputs unchanged, and pass `weights` here.

    Logits are float32 even if hidden states and weight are not, and under autocast. On CUDA with a 16-bit weight, or
    under autocast, hidden states, weight and the gradient of the logits are rounded to 16 bits for their products. On
    CUDA a Triton kernel does the element-wise part, except for `top_k` and `advantages`, which use slower PyTorch
    operations.

    Args:
        student_hidden, teacher_hidden: (N, H), the head's input, of any floating dtype. In the teacher's place may be
            its `TopLogprobs`, (N, k) each, for `top_k` k with `top_k_add_tail`, at temperature 1.
        lm_head_weight: (V, H). The head has no bias.
        teacher_lm_head_weight: (V, H), if the teacher has another head; its H may differ from the student's.
        head: how the logits follow from the head's output.
        chunk_size: number of tokens at a time; `None` chooses it from V, the dtypes and the kind of device.
        token_ids, objective, weights, advantages, sampler_logprobs: as for `dense_token_losses`.

    Returns:
        As `dense_token_losses`; float32, or float64 if an input is.

    Raises:
        ValueError: for shapes that do not fit, for a `chunk_size` below 1, if the importance sampling correction lacks
            `sampler_logprobs`, and for `TopLogprobs` beside a head with `logit_softcap`.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, or None to choose it, got {chunk_size}")
    if is_top := isinstance(teacher_hidden, TopLogprobs):
        teacher_values, teacher_weight = teacher_hidden.logprobs, teacher_hidden.ids
        if head.logit_softcap is not None:
            raise ValueError("the teacher's TopLogprobs do not go with capped logits: take dense_token_losses")
    else:
        teacher_values = teacher_hidden
        teacher_weight = lm_head_weight if teacher_lm_head_weight is None else teacher_lm_head_weight
    of_tokens = (token_ids, weights, advantages, sampler_logprobs)
    tensors = (student_hidden, teacher_values, lm_head_weight, teacher_weight, *of_tokens)
    shapes = [tuple(tensor.shape) for tensor in tensors if tensor is not None]
    n, h, teacher_h, v = shapes[0][0], shapes[0][-1], shapes[1][-1], shapes[2][0]
    if shapes != [(n, h), (n, teacher_h), (v, h), (n if is_top else v, teacher_h)] + [(n,)] * (len(shapes) - 4):
        raise ValueError(
            "expected student and teacher hidden states (N, H), heads (V, H), token ids, weights, advantages and "
            f"sampler_logprobs (N,), got {', '.join(map(str, shapes))}"
        )

    logprobs = None
    if sampler_logprobs is not None:
        temperature = objective.sampler_logprob_temperature
        logprobs = _logprobs(student_hidden, lm_head_weight, token_ids, temperature, head, chunk_size)
    advantages, importance_weights = objective.policy_gradient_factors(advantages, logprobs, sampler_logprobs)
    if objective.sampled_token and importance_weights is not None:
        weights = importance_weights if weights is None else weights * importance_weights
    inputs = (student_hidden, lm_head_weight, teacher_values, teacher_weight, token_ids, weights, advantages)
    num_trained = 2 if torch.is_grad_enabled() else 0  # student_hidden and lm_head_weight
    constants = [None if tensor is None else tensor.detach() for tensor in inputs[num_trained:]]
    settings = (objective, head, chunk_size, _dtypes(student_hidden, lm_head_weight))
    losses, statistics = _FusedLosses.apply(settings, *inputs[:num_trained], *constants)
    return TokenLosses(losses, TokenStatistics(*statistics), logprobs)


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
) -> Tensor:
    """
    Compute `generalized_jsd` of the logits of a language model's head, (N,), nats, float32, or float64 if an input is.

    Tensors, `head`, `chunk_size`, costs and errors are as for `fused_token_losses`, settings as for `generalized_jsd`.
    """
    return fused_token_losses(
        student_hidden,
        teacher_hidden,
        lm_head_weight,
        torch.zeros(len(student_hidden), dtype=torch.int64, device=student_hidden.device),  # not used
        Objective(beta, temperature, clip, clip_mode, top_k, top_k_support, top_k_add_tail),
        teacher_lm_head_weight=teacher_lm_head_weight,
        head=head,
        chunk_size=chunk_size,
    ).loss


def fused_linear_sampled_token_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    lm_head_weight: Tensor,
    token_ids: Tensor,
    *,
    teacher_lm_head_weight: Tensor | None = None,
    temperature: float = 1.0,
    clip: float | None = None,
    head: HeadSettings = PLAIN_HEAD,
    chunk_size: int | None = None,
) -> Tensor:
    """
    Compute `sampled_token_loss` of the logits of a language model's head, (N,), float32, or float64 if an input is.

    `temperature` and `clip` are as for `sampled_token_loss`, all else as for `fused_token_losses`.
    """
    return fused_token_losses(
        student_hidden,
        teacher_hidden,
        lm_head_weight,
        token_ids,
        Objective(temperature=temperature, sampled_token=True, sampled_token_clip=clip),
        teacher_lm_head_weight=teacher_lm_head_weight,
        head=head,
        chunk_size=chunk_size,
    ).loss


@torch.no_grad()
def check_head(model: PreTrainedModel, input_ids: Tensor, head: HeadSettings, precision: float) -> None:
    """
    Compare the logits of a model with those that the fused losses compute from its hidden states.

    Args:
        model: model, inside the forward pass of its wrapper if it has one.
        input_ids: (1, T), a few tokens.
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
    weight = model.get_output_embeddings().weight  # gathered now: under ZeRO-3 the forward pass releases a tied weight
    with maybe_gather_lm_head_ctx(weight), torch.autocast(logits.device.type, enabled=False):
        weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
        expected = head.logit_scale * (kept[0][0].to(weight.dtype) @ weight.T).float()
    if head.logit_softcap is not None:
        expected = head.logit_softcap * torch.tanh(expected / head.logit_softcap)
    error = (logits - expected).norm()
    if not error <= precision * expected.norm():
        raise ValueError(
            f"--loss_implementation fused: the logits of {type(model).__name__} do not follow from its hidden states "
            f"as expected (relative error {error / expected.norm():.1e}); choose --loss_implementation dense"
        )
