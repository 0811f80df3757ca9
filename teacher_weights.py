"""A teacher with weights of its own: the start policy where no adapter can be switched off, or an average of the student."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sharded_weights import is_sharded, writable_parts


class TeacherWeights:
    """
    Copies of the trained weights as they are now, in float32 if they are to be averaged; `applied` puts them in the
    student's place. Each process keeps those of the parts that it holds: under ZeRO-3 and FSDP2 they are sharded too.

    With decay d, the teacher after k updates is d^k start + (1 - d) sum_i d^(k - i) student_i, i = 1 .. k.

    Args:
        model: in training, as its launcher has wrapped it.
        accelerator: its accelerator.
        decay: of the exponential moving average; 0 takes the student as it is at each update; `None` for a teacher that
            is never updated.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator, decay: float | None):
        self.model, self.accelerator, self.decay = model, accelerator, decay
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._names, self._weights = list(trained), list(trained.values())
        with writable_parts(model, self._weights) as parts:
            self._copies = [part.to(dtype=part.dtype if decay is None else torch.float32, copy=True) for part in parts]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the model has the teacher's weights; after it the student's again, bit for bit."""
        with writable_parts(self.model, self._weights) as parts:
            students = [part.clone() for part in parts]
            for part, copy in zip(parts, self._copies, strict=True):
                part.copy_(copy)
        try:
            yield
        finally:
            with writable_parts(self.model, self._weights) as parts:
                for part, student in zip(parts, students, strict=True):
                    part.copy_(student)

    def update(self) -> None:
        """Move the teacher towards the student: teacher = d teacher + (1 - d) student."""
        if self.decay is not None:
            with writable_parts(self.model, self._weights) as parts:
                for copy, part in zip(self._copies, parts, strict=True):
                    copy.lerp_(part.to(copy.dtype), 1.0 - self.decay)

    def _file(self, folder: str | Path) -> Path:
        rank = self.accelerator.process_index if is_sharded(self._weights) else 0
        return Path(folder, f"teacher_weights_{rank}.safetensors")

    def save(self, folder: str | Path) -> None:
        """Write them into a checkpoint's folder: once, or where they are sharded each process its own."""
        if is_sharded(self._weights) or self.accelerator.is_main_process:
            copies = dict(zip(self._names, self._copies, strict=True))
            save_file({name: copy.contiguous() for name, copy in copies.items()}, self._file(folder))

    def load(self, folder: str | Path) -> None:
        """
        Take them from a checkpoint's folder.

        Raises:
            ValueError: if it has none, or those of another model, launcher or number of processes.
        """
        file = self._file(folder)
        saved: dict[str, Tensor] = load_file(file) if file.exists() else {}
        sizes = {name: (copy.shape, copy.dtype) for name, copy in zip(self._names, self._copies, strict=True)}
        if {name: (copy.shape, copy.dtype) for name, copy in saved.items()} != sizes:
            raise ValueError(
                f"--resume_from_checkpoint {folder}: {file.name} is missing or has not the teacher's weights of this run. Go on "
                "with the same teacher, model, launcher and number of processes as before"
            )
        for name, copy in zip(self._names, self._copies, strict=True):
            copy.copy_(saved[name])
