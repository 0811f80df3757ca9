"""Sequences laid end to end in one row, without padding: the attention that keeps them apart, and its check."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from data_collator import MicroBatch, PackedRole, Rollout

logger = logging.getLogger(__name__)

FLASH_ATTENTION = ("flash_attention_2", "flash_attention_3")
LAYER_TYPES = {"full_attention", "sliding_attention"}


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """Mask of a sliding window over earlier tokens, (length, length), bool."""
    places = torch.arange(length, device=device)
    distances = places[:, None] - places[None, :]
    return (distances >= 0) & (distances < window)


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sequence_lengths: Sequence[int] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """
    PyTorch's attention, for rows of one sequence or, with `sequence_lengths`, for one row of several.

    Each sequence of a packed row is attended to by itself, so that no mask over the whole row is needed.

    Args:
        module: attention layer.
        query, key, value: (B, heads, T, head size); B is 1 with `sequence_lengths`, which sum to T.
        attention_mask: as transformers gives it; not used with `sequence_lengths`.
        sequence_lengths: of the row, one after the other.
        sliding_window: of the layer. Without `sequence_lengths` it is in the mask already.
        kwargs: further arguments of transformers' attention.

    Returns:
        Values (B, T, heads, head size), and no attention weights.
    """
    if sequence_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    outputs = []
    for part in zip(*(states.split(list(sequence_lengths), dim=2) for states in (query, key, value)), strict=True):
        length, mask = part[0].shape[2], None
        if sliding_window is not None and length > sliding_window:
            mask = _window_mask(length, sliding_window, query.device)
        outputs.append(sdpa_attention_forward(module, *part, mask, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


AttentionInterface.register("sdpa", packed_sdpa)


def packed_inputs(role: PackedRole, config: PreTrainedConfig) -> dict[str, Any]:
    """
    Return the model's inputs for all sequences of a role in one row.

    Raises:
        ValueError: for an attention that cannot keep the sequences apart.
    """
    inputs: dict[str, Any] = {"input_ids": role.input_ids, "position_ids": role.position_ids}
    if config._attn_implementation in FLASH_ATTENTION:
        bounds, longest = role.bounds, max(role.lengths)
        inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
        return inputs | {"attention_mask": None}
    if config._attn_implementation != "sdpa":
        raise ValueError(f"attention {config._attn_implementation!r} does not keep packed sequences apart")
    # A mask of four dimensions goes through the model as it is. `packed_sdpa` does not need the one of the row.
    passed_on = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=role.input_ids.device)
    return inputs | {"attention_mask": passed_on, "sequence_lengths": role.lengths}


def check_attention(config: PreTrainedConfig) -> None:
    """Raise `ValueError` for a model whose attention would leave out the cap on its logits."""
    if getattr(config, "attn_logit_softcapping", None) is not None and config._attn_implementation == "sdpa":
        raise ValueError(
            "attn_implementation='sdpa' leaves out the cap on the attention's logits that this model has, so that "
            "rollouts come from another policy; load it with 'eager' or 'flash_attention_2'"
        )


def reason_against_packing(model: PreTrainedModel) -> str | None:
    """
    Return why the sequences of a row would mix in this model, or `None` if they stay apart.

    Compares the hidden states of two sequences in one row with those of each alone, so that it holds for models that
    no rule here knows. It runs inside the wrapped model's forward, on all processes.
    """
    config = model.config.get_text_config()
    if config._attn_implementation not in (*FLASH_ATTENTION, "sdpa"):
        return f"--attn_implementation {config._attn_implementation} has no form for several sequences in a row"
    if unknown := set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES:
        return f"it has layers of the kind {', '.join(sorted(unknown))}"
    parameter = next(model.parameters())
    ids = torch.arange(12, device=parameter.device) % config.vocab_size
    role = PackedRole.of_sequences([ids[:7].tolist(), ids[7:].tolist()]).to(parameter.device)
    backbone = model.base_model
    try:
        packed = backbone(**packed_inputs(role, config), use_cache=False).last_hidden_state[0]
    except TypeError as error:
        return f"its forward does not take the lengths of sequences ({error})"
    parts = [backbone(input_ids=part[None], use_cache=False).last_hidden_state[0] for part in (ids[:7], ids[7:])]
    alone = torch.cat(parts)
    difference = (packed - alone).abs().mean() / alone.abs().mean()
    limit = 1e-4 if packed.dtype == torch.float32 and not torch.is_autocast_enabled(packed.device.type) else 0.03
    return None if difference < limit else f"its layers mix sequences: hidden states differ by {difference:.1g}"


def say_padded(reason: str | None, max_tokens: int | None) -> None:
    """
    Say why micro-batches are padded; `None` if they are packed.

    Raises:
        ValueError: with a limit on the tokens of a micro-batch, which counts those of packed ones.
    """
    if reason is None:
        return
    if max_tokens is not None:
        raise ValueError(
            f"--max_tokens_per_micro_batch {max_tokens}: the model cannot pack sequences ({reason}); leave the flag "
            "out, and lower --per_device_train_batch_size"
        )
    logger.warning("micro-batches are padded, since the model cannot pack them: %s", reason)


def cost(rollout: Rollout) -> int:
    """Count the tokens of a rollout that are computed here, in both roles unless the teacher is on a server."""
    num_tokens = len(rollout.prompt_ids) + len(rollout.completion_ids)
    if rollout.teacher_top is None:
        num_tokens += len(rollout.teacher_prompt_ids) + len(rollout.completion_ids)
    return num_tokens


def divide_evenly(rollouts: Sequence[Rollout], num_batches: int) -> list[list[Rollout]]:
    """
    Divide rollouts over micro-batches of about equal numbers of tokens, both roles together.

    The longest rollout left goes to the micro-batch with the fewest tokens so far. Each gets at least one.

    Args:
        rollouts: at least as many as micro-batches.
        num_batches: number of micro-batches.
    """
    costs = list(map(cost, rollouts))
    batches: list[list[int]] = [[] for _ in range(num_batches)]
    totals = [0] * num_batches
    for place in sorted(range(len(rollouts)), key=lambda place: -costs[place]):
        lightest = min(range(num_batches), key=lambda batch: (totals[batch], batch))
        batches[lightest].append(place)
        totals[lightest] += costs[place]
    return [[rollouts[place] for place in sorted(batch)] for batch in batches]


def divide(
    rollouts: Sequence[Rollout], num_batches: int, is_packed: bool, max_tokens: int | None = None
) -> list[list[Rollout]]:
    """
    Divide the rollouts of a step over micro-batches. With `max_tokens` all processes call it together.

    Args:
        rollouts: of this process, as many as on the others.
        num_batches: number of micro-batches; it divides the number of rollouts.
        is_packed: whether they are packed, and divided by their numbers of tokens, or stay in their order.
        max_tokens: of both roles in a packed micro-batch. Where it would be more, there are more micro-batches, as
            many on all processes. A rollout above it is alone in its micro-batch.
    """
    if not is_packed:
        size = len(rollouts) // num_batches
        return [list(rollouts[start : start + size]) for start in range(0, len(rollouts), size)]
    if max_tokens is not None:

        def fits(number: int) -> bool:
            parts = divide_evenly(rollouts, number)
            return all(len(part) == 1 or sum(map(cost, part)) <= max_tokens for part in parts)

        # With more micro-batches the fullest never gets fuller, so that what fits here fits with any larger number
        num_batches = max(gather_object([next(filter(fits, range(num_batches, len(rollouts) + 1)))]))
    return divide_evenly(rollouts, num_batches)


@contextmanager
def _without_exchange(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Keep the processes from exchanging gradients in a backward pass that is not the last of the optimizer step."""
    if not accelerator.sync_gradients:  # the training loop sees to it
        yield
        return
    is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    accelerator.gradient_state._set_sync_gradients(False)  # from which `backward` tells DeepSpeed that more will come
    try:
        with nullcontext() if is_deepspeed else accelerator.no_sync(model):
            yield
    finally:
        accelerator.gradient_state._set_sync_gradients(True)


def sum_losses(
    accelerator: Accelerator,
    model: nn.Module,
    parts: MicroBatch | Sequence[MicroBatch],
    compute: Callable[[nn.Module, MicroBatch], Tensor],
) -> Tensor:
    """
    Compute the loss of a micro-batch of the training loop, which may lie in several parts.

    The gradients of all parts but the last are taken on the way, so that the activations of one part are held at a
    time. The caller takes those of the last.

    Args:
        accelerator: the trainer's accelerator.
        model: the student, as its launcher has wrapped it.
        parts: as many on all processes.
        compute: the loss of a part, ().

    Returns:
        Sum over the parts, (). Its gradient is that of the last part.
    """
    *earlier, last = [parts] if isinstance(parts, MicroBatch) else parts
    options = {"scale_wrt_gas": False} if accelerator.distributed_type == DistributedType.DEEPSPEED else {}
    losses = []
    for part in earlier:
        if not torch.is_grad_enabled():  # an evaluation
            losses.append(compute(model, part))
            continue
        with _without_exchange(accelerator, model):
            loss = compute(model, part)
            accelerator.backward(loss, **options)
        losses.append(loss.detach())
    return sum(losses, start=compute(model, last))
