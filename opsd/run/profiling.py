"""A trace of chosen optimizer steps by PyTorch's profiler."""

import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback, TrainerState

logger = logging.getLogger(__name__)


def parse_steps(text: str) -> tuple[int, int]:
    """
    Return the first and last of the optimizer steps that --profile_steps names, counted from 1.

    Raises:
        ValueError: for another form, or an empty range.
    """
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(f"--profile_steps {text}: must be a step or a range of steps, counted from 1, such as 3-4")
    return first, last


class ProfileCallback(TrainerCallback):
    """
    Writes OUTPUT_DIR/profile/steps_FIRST-LAST.json.gz, from the main process, for Perfetto or chrome://tracing.

    In it the phases of the log are ranges with names such as `opsd/teacher`.

    Args:
        steps: as in `parse_steps`.
        output_dir: folder of the run.
    """

    def __init__(self, steps: str, output_dir: Path):
        self.first, self.last = parse_steps(steps)
        self.file = output_dir / "profile" / f"steps_{self.first}-{self.last}.json.gz"
        self._profile: profile | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if not state.global_step < self.first <= self.last <= state.max_steps:
            raise ValueError(
                f"--profile_steps {self.first}-{self.last}: the run does the steps {state.global_step + 1} to "
                f"{state.max_steps}; name some of them"
            )

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.first and state.is_world_process_zero:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profile = profile(activities=activities, profile_memory=True)
            self._profile.start()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._profile is not None and state.global_step == self.last:
            self._write()

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._profile is not None:  # the run was stopped before
            self._write()

    def _write(self) -> None:
        assert self._profile is not None
        self._profile.stop()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self.file))
        self._profile = None
        logger.info("the profile is in %s", self.file)
