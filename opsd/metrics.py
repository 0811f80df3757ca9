"""Metrics between two logs: weighted means over all processes, extremes, and the seconds of each phase."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.profiler import record_function

STEP = "step"  # name of the time of a whole optimizer step, beside those of its phases


class Metrics:
    """
    Collects what is logged. Values on the accelerator are read when they are popped, so that adding does not wait.

    Training and evaluation have metrics of their own; `mode` ("train" or "eval") selects them.

    Args:
        accelerator: the trainer's accelerator.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.mode = "train"
        self._means: dict[str, dict[str, list[Tensor | float]]] = {"train": {}, "eval": {}}  # name -> [sum, count]
        self._extremes: dict[str, dict[tuple[str, Callable], list]] = {"train": {}, "eval": {}}
        self._open_phases: list[str] = []
        self._spans: list[tuple] = []  # (phase, the phase around it or None, start, end) since the last log
        self._step_start: float | torch.cuda.Event | None = None

    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Add to a mean: a sum of values, and the number (or the weight) of these values."""
        mean = self._means[self.mode].setdefault(name, [0.0, 0.0])
        mean[0], mean[1] = mean[0] + total, mean[1] + count

    def add_values(self, name: str, values: Sequence[float | bool]) -> None:
        """Add single values to a mean."""
        self.add(name, float(sum(values)), float(len(values)))

    def add_extreme(
        self, name: str, extreme: Callable[[list[float]], float], values: Sequence[Tensor | float]
    ) -> None:
        """Add values of which only the extreme is logged: `extreme` is `min` or `max`."""
        self._extremes[self.mode].setdefault((name, extreme), []).extend(values)

    def pop(self) -> dict[str, float]:
        """
        Return means and extremes over all processes since the last call. All processes call it together.

        A mean of nothing is left out.
        """
        means, extremes = self._means[self.mode], self._extremes[self.mode]
        self._means[self.mode], self._extremes[self.mode] = {}, {}
        own_means = {name: (float(total), float(count)) for name, (total, count) in means.items()}
        own_extremes = {key: key[1](map(float, values)) for key, values in extremes.items() if values}

        totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        candidates: dict[tuple[str, Callable], list[float]] = defaultdict(list)
        for process_means, process_extremes in gather_object([(own_means, own_extremes)]):
            for name, (total, count) in process_means.items():
                totals[name][0] += total
                totals[name][1] += count
            for key, value in process_extremes.items():
                candidates[key].append(value)
        popped = {name: total / count for name, (total, count) in totals.items() if count}
        return popped | {name: extreme(values) for (name, extreme), values in candidates.items()}

    # Time

    def _now(self) -> "float | torch.cuda.Event":
        """Read the clock of the device: an event in CUDA's stream, so that nobody waits for it."""
        if self.accelerator.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Time the block on this process. Nested phases are subtracted. Evaluation is not timed."""
        around = self._open_phases[-1] if self._open_phases else None
        self._open_phases.append(phase)
        start = self._now()
        try:
            with record_function(f"opsd/{phase}"):  # for --profile_steps
                yield
        finally:
            self._open_phases.pop()
            if self.mode == "train":
                self._spans.append((phase, around, start, self._now()))

    def start_step(self) -> None:
        """Let the next optimizer step's time begin."""
        self._step_start = self._now()

    def end_step(self) -> None:
        """Let the time of an optimizer step end and that of the next one begin."""
        end = self._now()
        if self._step_start is not None:
            self._spans.append((STEP, None, self._step_start, end))
        self._step_start = end

    def pop_seconds(self) -> tuple[dict[str, float], int]:
        """
        Return the seconds of each phase, and of all together (`STEP`), in the optimizer steps since the last call.

        Their means for a step are logged. A GPU's clock is read here alone, so that a step does not wait for it.

        Returns:
            Phase -> seconds on this process, and the number of steps.
        """
        seconds: dict[str, float] = defaultdict(float)
        for phase, around, start, end in self._spans:
            if isinstance(start, float):
                duration = end - start
            else:
                end.synchronize()
                duration = start.elapsed_time(end) / 1000.0
            seconds[phase] += duration
            if around is not None:
                seconds[around] -= duration
        num_steps = sum(phase == STEP for phase, *_ in self._spans)
        self._spans = []
        for phase, value in seconds.items():
            self.add(f"seconds/{phase}", value, num_steps)
        return dict(seconds), num_steps
