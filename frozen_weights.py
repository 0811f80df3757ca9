"""Whether the weights that are not trained, among them the fixed teacher's, are still what they were."""

import hashlib

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sharded_weights import is_sharded, local_part

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the size of an entry in bytes


class FrozenWeights:
    """
    Sums of the weights' bit patterns as integers, as they are now, to compare with later ones.

    The sums are those of the parts that this process holds, so that no weight has to be gathered under ZeRO-3 or FSDP.

    Args:
        model: the model in training, with the weights that its launcher has given it.
        accelerator: its accelerator.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator):
        self.accelerator = accelerator
        self._weights = {name: weight for name, weight in model.named_parameters() if not weight.requires_grad}
        self._at_start = self._sums()

    def _sums(self) -> Tensor:
        sums = torch.zeros(len(self._weights), dtype=torch.int64, device=self.accelerator.device)
        for i, weight in enumerate(self._weights.values()):
            part = local_part(weight)
            sums[i] = part.view(INTEGERS[part.dtype.itemsize]).sum(dtype=torch.int64)
        return sums

    def checksum(self) -> str:
        """Of the weights at the start: the same for any number of processes, whole weights or sharded ones."""
        has_parts = is_sharded(list(self._weights.values()))
        sums = self.accelerator.reduce(self._at_start, "sum") if has_parts else self._at_start
        return hashlib.sha256(sums.cpu().numpy().tobytes()).hexdigest()

    def check(self) -> None:
        """Raise `RuntimeError`, on all processes together, if a weight has changed on any of them."""
        changed = self._sums() != self._at_start
        if self.accelerator.reduce(changed.any().float(), "sum").item() > 0:
            names = [name for name, is_changed in zip(self._weights, changed.tolist(), strict=True) if is_changed]
            raise RuntimeError(
                f"frozen weights have changed during the training, so that --fixed_teacher is no longer the initial policy: "
                f"{len(names)} of {len(self._weights)} on this process, {names[:3]}. Something writes to the base model "
                "(merging the adapter does); earlier checkpoints are not affected"
            )
