"""Weights as one process holds them under any launcher: whole, or under ZeRO-3 and FSDP2 its part of each."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def local_part(weight: nn.Parameter) -> Tensor:
    """What this process holds of a weight, detached; writing to it writes to the weight."""
    part = getattr(weight, "ds_tensor", weight).detach()  # ZeRO-3 leaves an empty weight and keeps its part there
    return part.to_local() if isinstance(part, DTensor) else part


def is_sharded(weights: Sequence[nn.Parameter]) -> bool:
    """Whether processes hold different parts of them."""
    return any(hasattr(weight, "ds_tensor") or isinstance(weight, DTensor) for weight in weights)


@contextmanager
def writable_parts(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    """
    Inside the block the `local_part`s of some weights of `model`, the wrapped one; what is written to them counts in
    the next forward pass. All processes enter the block together.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # or the next forward would go on with the gathered weights of the last one
    yield [local_part(weight) for weight in weights]
    # ZeRO-3 keeps small weights gathered, beside their parts
    gathered = [weight for weight in weights if hasattr(weight, "ds_tensor") and weight.numel() > 0]
    if gathered:
        gathered[0].partition(gathered)
        gathered[0].all_gather(gathered)
