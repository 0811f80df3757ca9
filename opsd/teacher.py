"""The teacher: whose weights it has, how they are put in place, and the proof that they stay."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import maybe_gather_lm_head_ctx

from opsd.config import OPSDConfig
from opsd.teacher_model import check_teacher_model, load_teacher_model
from opsd.teacher_server import TeacherServer

# Integer types by the size of an entry in bytes
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Entries: PyTorch first copies what it sums to int64, which is four times the size of 16-bit weights
NUM_SUMMED_AT_ONCE = 2**22


class Teacher:
    """
    The model in the teacher's role.

    Its kind follows from the settings:

    - "base": the model with its adapter off (`fixed_teacher` and a fresh adapter).
    - "start policy": a copy of the trained weights as they were at the start (`fixed_teacher` without an adapter, or
      with one that was trained before).
    - "average": an exponential moving average of the trained weights (`use_ema_teacher`).
    - "other model": a second model (`teacher_model_name_or_path`), which is loaded here and stays as it is.
    - "server": a second model on a vLLM server (`teacher_model_server_url`), which scores the rollouts.
    - "student": the current policy.

    Args:
        args: settings.
        model: the model in training, before or after its launcher wraps it.
        accelerator: the trainer's accelerator.
        tokenizer: of the model.

    Raises:
        ConnectionError: for a server that does not answer.
        ValueError: for a second model that does not fit the first.
    """

    def __init__(
        self, args: OPSDConfig, model: nn.Module, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase
    ):
        self.args, self.model, self.accelerator = args, model, accelerator
        self.other: nn.Module | None = None  # a second model, as its launcher has wrapped it
        self.server: TeacherServer | None = None  # that has a second model
        self.vocab_size: int = model.config.get_text_config().vocab_size  # entries of a distribution in the loss
        # A fresh adapter is a no-op, so the base model is the initial policy.
        if args.teacher_model_name_or_path is not None:
            self.kind = "other model" if args.teacher_model_server_url is None else "server"
            student: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
            self.vocab_size = check_teacher_model(args, tokenizer, student)
            if self.kind == "server":
                self.server = TeacherServer(args)
            else:
                self.other = load_teacher_model(args, student, accelerator)
        elif args.use_ema_teacher:
            self.kind = "average"
        elif not args.fixed_teacher:
            self.kind = "student"
        else:
            self.kind = "base" if isinstance(model, PeftModel) and not self._has_trained_adapter() else "start policy"
        self.weights: TeacherWeights | None = None  # of its own: made by `start`
        self._frozen_weights: FrozenWeights | None = None  # as they were when training began

    @property
    def is_base(self) -> bool:
        """True if the teacher is the base model (adapter disabled)."""
        return self.kind == "base"

    def _has_trained_adapter(self) -> bool:
        """Return whether the adapter changes the model: the B factors of a fresh one are zero."""
        factors = [weight for name, weight in self.model.named_parameters() if "lora_B" in name]
        num_nonzero = sum(local_shard(weight).count_nonzero() for weight in factors)
        num_nonzero = torch.as_tensor(num_nonzero, device=self.accelerator.device)
        return self.accelerator.reduce(num_nonzero, "sum").item() > 0

    def start(self, wrapped_model: nn.Module, run_state: dict[str, Any], checkpoint: str | None) -> None:
        """
        Copy the weights that the teacher starts from or, in a resumed run, read those of the checkpoint.

        Args:
            wrapped_model: the model as its launcher has wrapped it.
            run_state: the part of the checkpoints in which the kind is kept.
            checkpoint: folder that the run is resumed from, if it is.

        Raises:
            ValueError: for a checkpoint with another kind of teacher.
        """
        if (before := run_state.setdefault("teacher", self.kind)) != self.kind:
            raise ValueError(
                f"--resume_from_checkpoint {checkpoint}: its teacher is the {before}, and with these flags it would "
                f"be the {self.kind}; give --fixed_teacher, --use_ema_teacher, --teacher_model_name_or_path, "
                "--teacher_model_server_url, --use_peft and --adapter_name_or_path as at the first start"
            )
        if self.kind not in ("start policy", "average"):
            return
        decay = self.args.ema_decay if self.kind == "average" else None
        self.weights = TeacherWeights(wrapped_model, self.accelerator, decay)
        if checkpoint is not None:
            self.weights.load(checkpoint)

    def update(self, step: int) -> None:
        """Move an average towards the student after optimizer step `step`, if due. A start policy stays."""
        if self.weights is not None and step % self.args.ema_update_steps == 0:
            self.weights.update()

    def networks(self, model: nn.Module) -> list[nn.Module]:
        """Return the student, `model`, and the second model if there is one."""
        return [model] if self.other is None else [model, self.other]

    @contextmanager
    def active(self, model: nn.Module) -> Iterator[nn.Module]:
        """
        Put the teacher in the place of `model` (wrapped or not) inside the block, which computes no gradients.

        Yields:
            The module to call as the teacher: `model`, or the second one.
        """
        if self.other is not None:
            with torch.no_grad():
                yield self.other
            reshard(self.other)  # FSDP2 leaves the head gathered, for a backward pass that does not come
            return
        policy = self.accelerator.unwrap_model(model)
        trained = [weight for weight in policy.parameters() if weight.requires_grad]
        if self.is_base:
            teacher = policy.disable_adapter()
        elif self.weights is not None:
            teacher = self.weights.applied()
        else:
            teacher = nullcontext()
        with torch.no_grad(), teacher:
            # `disable_adapter` clears requires_grad. FSDP2 reads it in its first forward pass, which is the teacher's,
            # to choose the dtype in which gradients are reduced.
            for weight in trained:
                weight.requires_grad_(True)
            yield model

    def head(self, weight: nn.Parameter) -> Tensor | None:
        """
        Return the teacher's head, (V, H), or `None` if it is the student's.

        It is called where the teacher is `active`, inside its forward, with the weight of the head as it is there.
        """
        if self.other is None and (self.weights is None or not weight.requires_grad):
            return None
        with maybe_gather_lm_head_ctx(weight):
            if isinstance(weight, DTensor):
                return self.common(weight.full_tensor())
            head = self.common(weight.detach())
            stays = self.other is not None and not is_sharded(list(self.other.parameters()))
            return head if stays else head.clone()

    def common(self, entries: Tensor, dim: int = 0) -> Tensor:
        """Leave out the entries of a dimension, of the vocabulary, that only one of the two heads has."""
        has_more = entries.shape[dim] > self.vocab_size
        return entries.narrow(dim, 0, self.vocab_size) if has_more else entries

    def check_ids(self, sampled: Sequence[Sequence[int]]) -> None:
        """Raise `ValueError` for a sampled token that a second model's head does not have."""
        if self.other is not None and (largest := max(map(max, filter(None, sampled)), default=0)) >= self.vocab_size:
            raise ValueError(
                f"--teacher_model_name_or_path {self.args.teacher_model_name_or_path}: the student has sampled token "
                f"{largest}, beyond the tokenizer, and the teacher's head has {self.vocab_size} entries; lower "
                "--top_p or --top_k, or take a teacher with as many entries as the student"
            )

    def check_frozen_weights(self, run_state: dict[str, Any]) -> None:
        """
        Check that the weights that are not trained are those of the start or, in a resumed run, of the checkpoint.

        Raises:
            RuntimeError: on all processes together, if they are not.
        """
        if self._frozen_weights is not None:
            self._frozen_weights.check()
            return
        self._frozen_weights = FrozenWeights(self.model, self.accelerator)
        checksum = self._frozen_weights.checksum()
        if run_state.setdefault("frozen_weights", checksum) != checksum:
            raise RuntimeError(
                "the frozen weights are not those that the checkpoint was trained with: is --model_name_or_path "
                "another model or revision, or --dtype another one? Resume with the model of the first start"
            )


class TeacherWeights:
    """
    Copies of the trained weights as they are now, kept in float32 if they are to be averaged.

    Each process keeps those of its own shards: under ZeRO-3 and FSDP2 the copies are sharded too. With decay d, the
    teacher after k updates is d^k start + (1 - d) sum_i d^(k - i) student_i, i = 1 .. k.

    Args:
        model: in training, as its launcher has wrapped it.
        accelerator: its accelerator.
        decay: of the exponential moving average; 0 takes the student as it is at each update; `None` for a teacher
            that is never updated.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator, decay: float | None):
        self.model, self.accelerator, self.decay = model, accelerator, decay
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._names, self._weights = list(trained), list(trained.values())
        with edit_local_shards(model, self._weights) as shards:
            self._copies = [
                shard.to(dtype=shard.dtype if decay is None else torch.float32, copy=True) for shard in shards
            ]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the teacher's weights inside the block, and the student's again after it, bit for bit."""
        with edit_local_shards(self.model, self._weights) as shards:
            students = [shard.clone() for shard in shards]
            for shard, copy in zip(shards, self._copies, strict=True):
                shard.copy_(copy)
        try:
            yield
        finally:
            with edit_local_shards(self.model, self._weights) as shards:
                for shard, student in zip(shards, students, strict=True):
                    shard.copy_(student)

    def update(self) -> None:
        """Move the teacher towards the student: teacher = d teacher + (1 - d) student."""
        if self.decay is not None:
            with edit_local_shards(self.model, self._weights) as shards:
                for copy, shard in zip(self._copies, shards, strict=True):
                    copy.lerp_(shard.to(copy.dtype), 1.0 - self.decay)

    def _file(self, folder: str | Path) -> Path:
        rank = self.accelerator.process_index if is_sharded(self._weights) else 0
        return Path(folder, f"teacher_weights_{rank}.safetensors")

    def save(self, folder: str | Path) -> None:
        """Write the copies into a checkpoint's folder: once, or where they are sharded each process its own."""
        if is_sharded(self._weights) or self.accelerator.is_main_process:
            copies = dict(zip(self._names, self._copies, strict=True))
            save_file({name: copy.contiguous() for name, copy in copies.items()}, self._file(folder))

    def load(self, folder: str | Path) -> None:
        """
        Read the copies from a checkpoint's folder.

        Raises:
            ValueError: if it has none, or those of another model, launcher or number of processes.
        """
        file = self._file(folder)
        saved: dict[str, Tensor] = load_file(file) if file.exists() else {}
        sizes = {name: (copy.shape, copy.dtype) for name, copy in zip(self._names, self._copies, strict=True)}
        if {name: (copy.shape, copy.dtype) for name, copy in saved.items()} != sizes:
            raise ValueError(
                f"--resume_from_checkpoint {folder}: {file.name} is missing or does not hold the teacher's weights of "
                "this run. Resume with the same teacher, model, launcher and number of processes as before"
            )
        for name, copy in zip(self._names, self._copies, strict=True):
            copy.copy_(saved[name])


class FrozenWeights:
    """
    Checksums of the weights that are not trained, as they are now, to compare with later ones.

    A checksum is the sum of a weight's bit patterns as integers. Each process sums its own shards, so that no weight
    has to be gathered under ZeRO-3 or FSDP2.

    Args:
        model: the model in training, with the weights that its launcher has given it.
        accelerator: its accelerator.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator):
        self.accelerator = accelerator
        reshard(model)  # or the weights that a forward pass has gathered would be taken for those that stay
        self._weights = {name: weight for name, weight in model.named_parameters() if not weight.requires_grad}
        self._sums_at_start = self._sums()

    def _sums(self) -> Tensor:
        sums = torch.zeros(len(self._weights), dtype=torch.int64, device=self.accelerator.device)
        for i, weight in enumerate(self._weights.values()):
            shard = local_shard(weight)
            for bits in shard.view(INTEGERS[shard.dtype.itemsize]).flatten().split(NUM_SUMMED_AT_ONCE):
                sums[i] += bits.sum(dtype=torch.int64)
        return sums

    def checksum(self) -> str:
        """Return a hash of the sums at the start. It is the same for any number of processes, sharded or not."""
        has_shards = is_sharded(list(self._weights.values()))
        sums = self.accelerator.reduce(self._sums_at_start, "sum") if has_shards else self._sums_at_start
        return hashlib.sha256(sums.cpu().numpy().tobytes()).hexdigest()

    def check(self) -> None:
        """Raise `RuntimeError`, on all processes together, if a weight has changed on any of them."""
        changed = self._sums() != self._sums_at_start
        if self.accelerator.reduce(changed.any().float(), "sum").item() > 0:
            names = [name for name, is_changed in zip(self._weights, changed.tolist(), strict=True) if is_changed]
            raise RuntimeError(
                "frozen weights have changed in training, so that the base model that --fixed_teacher needs "
                f"is no longer that of the start: {len(names)} of {len(self._weights)} on this process, {names[:3]}. "
                "Something writes to the base model (merging the adapter does); earlier checkpoints are not affected"
            )


# Each process holds a weight whole or, under ZeRO-3 and FSDP2, one shard of it.


def local_shard(weight: nn.Parameter) -> Tensor:
    """Return this process's shard of a weight, detached. Writing to it writes to the weight."""
    shard = getattr(weight, "ds_tensor", weight).detach()  # ZeRO-3 empties the weight and keeps the shard there
    return shard.to_local() if isinstance(shard, DTensor) else shard


def is_sharded(weights: Sequence[nn.Parameter]) -> bool:
    """Return whether processes hold different shards of the weights."""
    return any(hasattr(weight, "ds_tensor") or isinstance(weight, DTensor) for weight in weights)


def reshard(model: nn.Module) -> None:
    """Give the modules that FSDP2 wraps their shards back, in place of the weights gathered for a forward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def edit_local_shards(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    """
    Give write access to the local shards of some weights of `model`, the wrapped one.

    The next forward pass uses what the block has written. All processes enter the block together.
    """
    reshard(model)  # or the next forward pass would use the weights that were gathered before
    yield [local_shard(weight) for weight in weights]
    # ZeRO-3 keeps small weights gathered, beside their shards.
    gathered = [weight for weight in weights if hasattr(weight, "ds_tensor") and weight.numel() > 0]
    if gathered:
        gathered[0].partition(gathered)
        gathered[0].all_gather(gathered)
