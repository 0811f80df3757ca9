"""Rollouts of the next optimizer step, which a vLLM server samples while the present one trains."""

import json
import logging
from concurrent.futures import Future, wait
from copy import copy
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from trl.trainer.utils import RepeatSampler

from opsd.rollouts import Completion, Requests

logger = logging.getLogger(__name__)

FILE = "rollouts_ahead.json"  # in a checkpoint
REPLY = ("completion_ids", "logprobs")


def rows_of_step(sampler: RepeatSampler, seed: int, step: int) -> list[int]:
    """
    Return the rows of the training data of an optimizer step, of all processes in their order.

    Args:
        sampler: of the training, left as it is. Each epoch's order follows from `seed` plus its number.
        seed: of the order of the data.
        step: number of optimizer steps before it.
    """
    num_rollouts = sampler.batch_size * sampler.mini_repeat_count
    window = num_rollouts * sampler.repeat_count  # each micro-batch of a step repeats its rows
    epoch, place = divmod(step, len(sampler) // window)
    sampler = copy(sampler)
    sampler.generator = torch.Generator().manual_seed(seed + epoch)
    return list(islice(sampler, place * window, place * window + num_rollouts))


class RolloutsAhead:
    """
    Asks for the rollouts of the next step before the present one trains, and hands them out in the next step.

    They come from weights that are one optimizer step old (`--max_staleness 1`). A checkpoint holds those that wait.

    Args:
        trainer: an `OPSDTrainer`. With `--max_staleness 0` it does not ask.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._waiting: tuple[int, Requests] | None = None  # number of steps before the one that trains on them

    def ask(self) -> None:
        """Ask for the next step's rollouts, from the student as it is now. After the last step there are none."""
        trainer, step = self.trainer, self.trainer.state.global_step
        if step + 1 >= trainer.state.max_steps:
            return
        trainer.sampler.sync(step, reuse=True)  # in the place of a teacher that has written rationales
        rows = rows_of_step(trainer._train_sampler, trainer.data_seed, step + 1)
        number, process = len(rows) // trainer.accelerator.num_processes, trainer.accelerator.process_index
        own = rows[process * number : (process + 1) * number]
        prompts = [trainer.train_dataset[row]["student_prompt_ids"] for row in own]
        self._waiting = step + 1, trainer.sampler.ask(prompts, step + 1)

    def take(self, prompts: list[list[int]]) -> list[Completion] | None:
        """
        Return the rollouts of the present step, once they are there; `None` if they were not asked for.

        Args:
            prompts: token ids of this process.

        Raises:
            RuntimeError: if others were asked for.
            ConnectionError: if the server has failed.
        """
        if self._waiting is None:
            return None
        (step, requests), self._waiting = self._waiting, None
        if (step, requests.prompts[requests.own]) != (self.trainer.state.global_step, prompts):
            raise RuntimeError(
                f"--max_staleness 1: step {self.trainer.state.global_step + 1} has other prompts than were asked for "
                "ahead: the data come in another order than GOLD's sampler gives; train with --max_staleness 0"
            )
        return self.trainer.sampler.collect(requests)

    def save(self, folder: str | Path) -> None:
        """Write the rollouts that wait into a checkpoint's folder, once they are there. For the main process."""
        if self._waiting is None:
            return
        step, requests = self._waiting
        wait(requests.replies)
        if any(reply.exception() for reply in requests.replies):  # the next step says so
            logger.warning("the server failed: %s has no rollouts of the next step", folder)
            return
        replies = [{name: reply.result()[name] for name in REPLY} for reply in requests.replies]
        content = {"step": step, "prompts": requests.prompts, "replies": replies}
        Path(folder, FILE).write_text(json.dumps(content), encoding="utf-8")

    def start(self, folder: str | Path | None) -> None:
        """Take the rollouts that waited from a checkpoint's folder, if there is one and it has some."""
        self._waiting = None
        if folder is None or not self.trainer.args.max_staleness or not Path(folder, FILE).exists():
            return
        content = json.loads(Path(folder, FILE).read_text(encoding="utf-8"))
        number = len(content["prompts"]) // self.trainer.accelerator.num_processes
        before = self.trainer.accelerator.process_index * number
        replies: list[Future] = [Future() for _ in content["replies"]]
        for reply, value in zip(replies, content["replies"], strict=True):
            reply.set_result(value)
        self._waiting = content["step"], Requests(content["prompts"], slice(before, before + number), replies)
