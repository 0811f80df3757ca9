"""Checkpoints that are complete or are not used, leaving a run with one, and steps that are not finite."""

import json
import logging
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints, sort_checkpoints
from trl.trainer.utils import RepeatSampler

if TYPE_CHECKING:
    from transformers import Trainer as Base  # what the mixin is put in front of
else:
    Base = object

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint_files.json"


def write_manifest(checkpoint: Path) -> None:
    """Note in a checkpoint the names and sizes, in bytes, of its files, once all of them are on the disk."""
    sizes = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            sizes[path.relative_to(checkpoint).as_posix()] = path.stat().st_size
    temporary = checkpoint / f"{MANIFEST}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(sizes, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(checkpoint / MANIFEST)


def find_fault(checkpoint: Path) -> str | None:
    """Say why training cannot go on from a folder; `None` for a complete checkpoint."""
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return f"it has no readable {MANIFEST}, which is written last"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    if "trainer_state.json" not in sizes or not any(name.startswith("rng_state") for name in sizes):
        return "it lacks the trainer's state or the random state, which --save_only_model leaves out"
    return None


def find_last_complete(output_dir: str | Path) -> Path | None:
    """The complete checkpoint of the highest step in a run's folder, if there is one."""
    for checkpoint in reversed(sort_checkpoints(output_dir)):
        fault = find_fault(Path(checkpoint))
        if fault is None:
            return Path(checkpoint)
        logger.warning("passing over %s: %s", checkpoint, fault)
    return None


def find_checkpoint(output_dir: str, resume: str | None, overwrite: bool) -> str | None:
    """
    The checkpoint to continue from, or `None` to start from the beginning.

    Args:
        output_dir: folder of the run.
        resume: `--resume_from_checkpoint`: a checkpoint's folder, `true` for the last complete one, or nothing.
        overwrite: whether checkpoints may be in the way.

    Raises:
        ValueError: checkpoints in the way, or none that is complete where one is asked for.
    """
    if resume is None or resume.lower() in ("false", "none", ""):
        checkpoints = sort_checkpoints(output_dir)
        if checkpoints and not overwrite:
            raise ValueError(
                f"--output_dir {output_dir} holds {Path(checkpoints[-1]).name}: continue with "
                "--resume_from_checkpoint true, start anew with --overwrite_output_dir, or choose another folder"
            )
        return None
    if resume.lower() in ("true", "latest"):
        checkpoint = find_last_complete(output_dir)
        if checkpoint is None:
            raise ValueError(f"--resume_from_checkpoint {resume}: there is no complete checkpoint in {output_dir}")
        return str(checkpoint)
    fault = find_fault(Path(resume))
    if fault is not None:
        raise ValueError(
            f"--resume_from_checkpoint {resume}: not a complete checkpoint: {fault}. Say true for the last complete "
            "one of the output folder"
        )
    return resume


@contextmanager
def _explain_failure(target: Path, run_dir: Path) -> Iterator[None]:
    """Say of a failed attempt to write `target` what it means for the run, and the way out."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
        raise RuntimeError(
            f"{target} could not be written: {error}\nThe file system has "
            f"{shutil.disk_usage(run_dir).free / 2**20:,.0f} MiB free. The last complete checkpoint is "
            f"{find_last_complete(run_dir)}. Make room (--save_total_limit keeps fewer checkpoints), then go on from "
            "it with --resume_from_checkpoint true"
        ) from error


class CompleteCheckpoints(Base):
    """
    Mixin for a transformers `Trainer`, in front of it among the bases.

    - A checkpoint gets a manifest when all processes have written their part, and older ones are deleted
      (`--save_total_limit`) only after that. So there is a complete one at any time after the first.
    - A resumed run goes on in the data order of the interrupted one, in later epochs too.
    - On SIGTERM or SIGINT (Ctrl-C) the running step is finished, a checkpoint is saved, and `train` returns with
      `stop_signal` set. The processes agree on it: it is enough if one of them gets the signal. A SIGINT after that
      ends the process at once, with status 130 and without saving.
    - A step with a loss or gradient that is not finite is skipped, on all processes: weights and moments stay as they
      are. Its batch is kept in OUTPUT_DIR/nonfinite. After `max_nonfinite_steps` of them in a row `train` raises
      `FloatingPointError`. In float16 the loss scaler skips such steps itself, and meets them all the time.

    A trainer with a `compute_loss` of its own calls `mark_nonfinite` in it, once for each micro-batch.

    transformers' `--enable_jit_checkpoint` is no substitute: its processes do not agree, so that those that got the
    signal later, or not at all, wait for ever; and it saves before the optimizer's step, after a timer of 3 seconds.
    """

    max_nonfinite_steps = 3
    logged_counts: tuple[str, ...] = ("num_nonfinite_steps",)  # what is counted (`_count`) and logged with each loss
    stop_signal: signal.Signals | None = None  # that ended the training before its last step
    stop_reason: str | None = None  # what else did
    last_complete: Path | None = None  # checkpoint that this run has written or goes on from
    write_card: Callable[[], None] | None = None  # writes the README.md of the run, in place of TRL's

    def __init__(self, *args: Any, **kwargs: Any):
        self._losses_of_step: list[tuple[Tensor, Tensor]] = []  # of each micro-batch: whether finite, and losses
        self._inputs_of_step: list[Any] = []  # of each micro-batch
        self._num_skipped_in_a_row = 0
        self._got_signal: signal.Signals | None = None
        super().__init__(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self.stop_signal = self._got_signal = self.stop_reason = None
        if isinstance(checkpoint := kwargs.get("resume_from_checkpoint"), str):
            self.last_complete = Path(checkpoint)
        previous = {number: signal.signal(number, self._note_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            return super().train(*args, **kwargs)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note_signal(self, number: int, _: Any) -> None:
        """Remember the signal; after a first one, leave at once on Ctrl-C. What is printed here waits for no lock."""
        is_second = self._got_signal is not None and number == signal.SIGINT
        if self.args.process_index == 0 and (is_second or self._got_signal is None):
            what = f"finishing step {self.state.global_step + 1} and saving a checkpoint; Ctrl-C ends it at once"
            complete = "no checkpoint is" if self.last_complete is None else f"{self.last_complete} is"
            text = f"{signal.Signals(number).name}: {'leaving at once' if is_second else what}; {complete} complete"
            os.write(2, f"\n{text}\n".encode())
        if is_second:
            os._exit(128 + number)  # an exception would first go through whatever runs, such as vLLM's engine
        self._got_signal = self._got_signal or signal.Signals(number)

    # State of the run

    @property
    def _run_state(self) -> dict[str, Any]:
        """What checkpoints hold beside the trainer's own state, so that a resumed run goes on from there."""
        return self.state.stateful_callbacks.setdefault("run_state", {})

    def _count(self, name: str, number: int) -> None:
        self._run_state[name] = self._run_state.get(name, 0) + number

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= {name: self._run_state.get(name, 0) for name in self.logged_counts}
        super().log(logs, *args, **kwargs)

    # Steps that are not finite

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if return_outputs or not self.model.training:
            return loss
        self._inputs_of_step.append(inputs)
        return self.mark_nonfinite(loss)

    def mark_nonfinite(self, loss: Tensor, per_token: Tensor | None = None) -> Tensor:
        """
        Return the loss of a micro-batch, (), or NaN if it is not finite: then the gradient's norm is NaN, too, on all
        processes. An infinite loss may have a finite gradient.

        Args:
            per_token: losses of its tokens, for the file that is kept; `None`: the file gets `loss` alone.
        """
        if not self.model.training:
            return loss
        # Read in `_keep_batch` alone: a GPU would wait for it
        self._losses_of_step.append((loss.isfinite(), (loss if per_token is None else per_token).detach()))
        return loss * torch.where(loss.isfinite(), 1.0, math.nan)

    @property
    def last_step_was_skipped(self) -> bool:
        """True after an optimizer step that was skipped, until the next one."""
        return self._num_skipped_in_a_row > 0

    def _batch_to_keep(self) -> Any:
        """What the file of a skipped step holds as `inputs`: those of its micro-batches on this process."""
        return self._inputs_of_step

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float:
        """The gradient's norm over all processes; right before the optimizer's step, which it skips if not finite."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if math.isfinite(grad_norm) or self.accelerator.mixed_precision == "fp16":
            self._num_skipped_in_a_row = 0
        else:
            model.zero_grad()  # without a gradient nothing changes; DeepSpeed has left weights and moments by itself
            self._num_skipped_in_a_row += 1
            self._count("num_nonfinite_steps", 1)
            self._keep_batch()
        self._losses_of_step, self._inputs_of_step = [], []
        return grad_norm

    def _keep_batch(self) -> None:
        step = self.state.global_step + 1
        path = Path(self.args.output_dir, "nonfinite", f"step_{step:05d}_process_{self.accelerator.process_index}.pt")
        path.parent.mkdir(parents=True, exist_ok=True)
        losses = {place: loss for place, (is_finite, loss) in enumerate(self._losses_of_step) if not is_finite}
        torch.save({"step": step, "inputs": self._batch_to_keep(), "losses": losses}, path)
        logger.error("step %d: loss or gradient not finite; the step is skipped, its batch kept in %s", step, path)
        if self._num_skipped_in_a_row >= self.max_nonfinite_steps:
            raise FloatingPointError(
                f"loss or gradient not finite in {self._num_skipped_in_a_row} steps in a row, up to step {step}; "
                f"their batches are in {path.parent}. Look at them, lower --learning_rate, or raise "
                "--max_nonfinite_steps; --resume_from_checkpoint true goes on from the last complete checkpoint"
            )

    # Optimizer of a resumed run

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        groups = getattr(optimizer, "param_groups", [])
        self._optimizer_settings = [{name: group[name] for name in group if name != "params"} for group in groups]
        self._group_is_used = [bool(group["params"]) for group in groups]
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load their state, but keep this start's learning rate, weight decay and the like."""
        super()._load_optimizer_and_scheduler(checkpoint)
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        if checkpoint is None or not isinstance(scheduler, LambdaLR):
            return
        factor = scheduler.lr_lambdas[0](scheduler.last_epoch)  # the same for all groups
        groups, all_settings = self.optimizer.param_groups, self._optimizer_settings
        if len(groups) < len(all_settings):  # DeepSpeed leaves out groups without weights
            all_settings = list(compress(all_settings, self._group_is_used))
        for group, settings in zip(groups, all_settings, strict=True):
            group.update(settings, initial_lr=settings["lr"], lr=settings["lr"] * factor)
        scheduler.base_lrs = [group["initial_lr"] for group in scheduler.optimizer.param_groups]
        scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]  # which is logged

    # Data order, signal, checkpoints

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler | None:
        self._train_sampler = super()._get_train_sampler(*args, **kwargs)
        return self._train_sampler

    @property
    def data_seed(self) -> int:
        """Seed of the order of the data."""
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        if isinstance(self._train_sampler, RepeatSampler):
            # It draws an epoch's order from where the last one left its generator, which a resumed run does not know.
            self._train_sampler.generator.manual_seed(self.data_seed + epoch)
        if self.state.global_step >= self.state.max_steps:  # resumed at the end: transformers would do one step more
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self._got_signal is not None:
            self.accelerator.set_trigger()
        is_over = self.stop_signal is not None or self.state.global_step >= self.state.max_steps
        if self.accelerator.check_trigger() and not is_over:
            self.stop_signal = self._got_signal or signal.SIGTERM  # in a process that did not get it
            self.args.save_only_model = False
            self.control.should_evaluate = False
            self.control.should_log = self.control.should_save = self.control.should_training_stop = True
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        checkpoint = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save and checkpoint.exists():  # torn, or its manifest would go on to vouch for it
            shutil.rmtree(checkpoint)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with _explain_failure(checkpoint, run_dir):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            with _explain_failure(checkpoint, run_dir):
                write_manifest(checkpoint)
            rotate_checkpoints(str(run_dir), limit, self.state.best_model_checkpoint, use_mtime=True)
        self.accelerator.wait_for_everyone()
        self.last_complete = checkpoint
        if self.write_card is not None:
            self.create_model_card()

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        if self.write_card is None:  # else the run uploads what it wants to show, once all of it is there
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self.write_card is None:
            super()._push_from_checkpoint(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        if self.write_card is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            self.write_card()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        # safetensors writes beside the file and renames: a failure leaves the weights of an earlier run whole.
        run_dir = Path(self.args.output_dir)
        with _explain_failure(Path(output_dir or run_dir), run_dir):
            super().save_model(output_dir)
