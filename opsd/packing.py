"""Sequences laid end to end in one row, without padding: the attention that keeps them apart, and its check."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from data_collator import PackedRole, Rollout

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


def divide_evenly(rollouts: Sequence[Rollout], num_batches: int) -> list[list[Rollout]]:
    """
    Divide rollouts over micro-batches of about equal numbers of tokens, both roles together.

    The longest rollout left goes to the micro-batch with the fewest tokens so far. Each gets at least one.

    Args:
        rollouts: at least as many as micro-batches.
        num_batches: number of micro-batches.
    """
    costs = [len(r.prompt_ids) + len(r.teacher_prompt_ids) + 2 * len(r.completion_ids) for r in rollouts]
    batches: list[list[int]] = [[] for _ in range(num_batches)]
    totals = [0] * num_batches
    for place in sorted(range(len(rollouts)), key=lambda place: -costs[place]):
        lightest = min(range(num_batches), key=lambda batch: (totals[batch], batch))
        batches[lightest].append(place)
        totals[lightest] += costs[place]
    return [[rollouts[place] for place in sorted(batch)] for batch in batches]
