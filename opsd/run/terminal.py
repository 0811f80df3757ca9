"""What a run shows on the terminal: a line for each log, and warnings of this project that stand out."""

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

import datasets
import transformers
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

logger = logging.getLogger(__name__)

PROJECT = ("opsd", "opsd_train", "opsd_trainer", "sft_train", "grpo_train", "data_collator", "__main__")


def set_up_terminal() -> None:
    """Let warnings of this project stand out; show no progress bars where no terminal is. May be called again."""
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:  # of the terminal, not of whoever derives from it
            handler.setFormatter(_Formatter(in_color=sys.stderr.isatty()))
    sys.excepthook = _say_interrupted
    if not sys.stderr.isatty():  # a bar would leave a line in the file for each of its states
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def _say_interrupted(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    """Say in one line that Ctrl-C came outside of the training, which handles it itself."""
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("interrupted outside of the training\n")  # logging may not be set up yet
    else:
        sys.__excepthook__(kind, error, traceback)


class _Formatter(logging.Formatter):
    """Messages of this project without their logger, its warnings marked; those of others with their logger."""

    def __init__(self, in_color: bool):
        super().__init__()
        self.in_color = in_color

    def formatMessage(self, record: logging.LogRecord) -> str:
        if record.name.split(".")[0] not in PROJECT:
            return f"{record.name}: {record.message}"
        if record.levelno < logging.WARNING:
            return record.message
        text = f"{record.levelname}: {record.message}"
        return f"\033[1;33m{text}\033[0m" if self.in_color else text


def share_right(logs: Mapping[str, Any]) -> float | None:
    """The share of graded rollouts that are right, under the name of OPSD or of one of GRPO's rewards."""
    names = ["rewards/accuracy/mean", *(n for n in logs if n.startswith("rewards/") and n.endswith("/mean"))]
    return next((logs[name] for name in names if name in logs), None)


def count_tokens(logs: Mapping[str, Any]) -> int | None:
    """The tokens so far: those that were sampled, and in SFT those that were read."""
    return logs.get("num_generated_tokens", logs.get("num_tokens"))


def duration(seconds: float) -> str:
    """Seconds as in 2h05m, 1m20s or 7s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_of_hour = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes_of_hour:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def format_values(logs: Mapping[str, Any]) -> list[str]:
    """What is shown of a log: loss, divergence, share right (held-out accuracy) and length, as far as it has them."""
    parts = [f"{name} {logs[name]:.3g}" for name in ("loss", "divergence") if name in logs]
    if "accuracy" in logs:  # of an evaluation, with `--eval_accuracy_samples`
        parts.append(f"held-out {100 * logs['accuracy']:.1f}")
        if "accuracy_standard_error" in logs:
            parts[-1] += f" ± {100 * logs['accuracy_standard_error']:.1f}"
        parts[-1] += " %"
    elif (right := share_right(logs)) is not None:
        parts.append(f"right {100 * right:.0f} %")
    if "completions/mean_length" in logs:
        parts.append(f"length {logs['completions/mean_length']:.0f}")
    return parts


def format_log(
    step: int,
    max_steps: int,
    logs: Mapping[str, Any],
    tokens_per_second: float | None = None,
    seconds_left: float | None = None,
) -> str | None:
    """
    The line of a log of training or evaluation; `None` for one without a loss.

    Args:
        step, max_steps: optimizer steps done, and of the whole run.
        logs: name -> value; those of an evaluation begin with `eval_`.
        tokens_per_second, seconds_left: `None` where they are not known.
    """
    parts = [f"step {step:{len(str(max_steps))}}/{max_steps}"]
    if "eval_loss" in logs:
        parts.append("evaluation")
        logs = {name.removeprefix("eval_"): value for name, value in logs.items()}
    if "loss" not in logs:
        return None
    parts += format_values(logs)
    if tokens_per_second is not None:
        parts.append(f"tok/s {tokens_per_second:.0f}")
    if seconds_left is not None:
        parts.append(f"left {duration(seconds_left)}")
    return "  ".join(parts)


class TerminalCallback(TrainerCallback):
    """Says a line for each log, in place of the bar and the dictionaries of transformers."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.start = self.last_log = time.monotonic()
        self.first_step = state.global_step
        self.tokens = next((n for logs in reversed(state.log_history) if (n := count_tokens(logs)) is not None), 0)

    def on_log(self, args, state, control, logs, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        now, speed, left = time.monotonic(), None, None
        self.last_log += logs.get("eval_runtime", 0.0)  # in which no tokens are trained on
        if "loss" in logs:
            if (tokens := count_tokens(logs)) is not None:
                speed = (tokens - self.tokens) / (now - self.last_log)
                self.tokens = tokens
            self.last_log = now
            left = (now - self.start) * (state.max_steps - state.global_step) / (state.global_step - self.first_step)
        if line := format_log(state.global_step, state.max_steps, logs, speed, left):
            logger.info("%s", line)


def replace_progress(trainer: Trainer) -> None:
    """Put the line for each log in the place of the progress bar."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(TerminalCallback())
