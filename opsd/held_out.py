"""Accuracy on held-out problems at each evaluation of the trainer, before the first step too."""

import hashlib
import json
import logging
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from accelerate.utils import gather_object
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from data_collator import texts_of
from opsd.grading import RIGHT
from opsd.rollouts import Completion, own_randomness, sample_apart
from opsd.thinking import decode_response

if TYPE_CHECKING:
    from trl.experimental.gold import GOLDTrainer as Base  # what the mixin is put in front of
else:
    Base = object

logger = logging.getLogger(__name__)

STARTS = "held_out_start"  # in the state of the run: shares right at the first evaluation, to pair the later ones with
# After the prefix of the evaluation, which is `eval`
METRICS = ("accuracy", "accuracy_standard_error", "accuracy_gain", "accuracy_gain_standard_error")


def check_answers(dataset: Dataset | None) -> None:
    """Raise `ValueError` for held-out problems of which none has an answer."""
    if dataset is not None and not any((answer or "").strip() for answer in dataset["answer"]):
        raise ValueError(
            "--eval_accuracy_samples: no row of --eval_dataset_name has an answer to grade against; name their column "
            "(--answer_column), or leave the flag out"
        )


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean of values, one for each problem, and its standard error, which a single one does not have."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.fmean(values), error


class HeldOutSamples(NamedTuple):
    """The completions of an evaluation."""

    rows: Dataset  # of this process
    completions: list[Completion]  # `eval_accuracy_samples` of each of its rows
    firsts: dict[tuple[int, ...], Completion]  # prompt -> its first completion, of all processes


class HeldOutAccuracy(Base):
    """
    Mixin for `OPSDTrainer`, in front of it among the bases: `--eval_accuracy_samples` completions of each held-out
    problem at each evaluation.

    They are sampled as the rollouts are, with the same seeds at each evaluation, and graded as the rollouts are. So
    two evaluations differ by the weights alone, and their difference is paired by problem. Each process takes its
    share of the problems. An evaluation leaves the random state of the training as it was. Its loss is that of the
    first completion of each problem.
    """

    # Of the running evaluation, if it measures the accuracy
    _held_out: Dataset | None = None
    _samples: HeldOutSamples | None = None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as the base class does, always with the same random numbers, which the training does not see."""
        with own_randomness(self.args.seed, self.accelerator):
            return super().evaluate(*args, **kwargs)

    def _evaluate(self, *args: Any, skip_scheduler: bool = False, **kwargs: Any) -> dict[str, float]:
        if skip_scheduler and self.state.global_step > 0:  # --eval_on_start, in a run that goes on
            return {}
        return super()._evaluate(*args, skip_scheduler=skip_scheduler, **kwargs)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self._held_out, self._samples = (dataloader.dataset if self.args.eval_accuracy_samples else None), None
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._held_out is not None:
            measured = self._measure_accuracy(self._held_out, metric_key_prefix)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in measured.items()})
        self._held_out = self._samples = None
        return output

    def take_held_out(self, prompts: list[list[int]]) -> list[Completion] | None:
        """
        Return the first completion of each prompt of a batch of the evaluation; `None` if it measures no accuracy.

        All processes call it together. The first batch samples the completions of all problems.
        """
        if self._held_out is None:
            return None
        firsts = self._sample_held_out(self._held_out).firsts
        return [firsts[tuple(prompt)] for prompt in prompts]

    def _sample_held_out(self, dataset: Dataset) -> HeldOutSamples:
        """Sample the completions of this process's share of the problems, once in an evaluation."""
        if self._samples is None:
            number = self.args.eval_accuracy_samples
            rows = dataset.select(range(self.accelerator.process_index, len(dataset), self.accelerator.num_processes))
            prompts = [ids for ids in rows["student_prompt_ids"] for _ in range(number)]
            with own_randomness(self.args.seed, self.accelerator):
                completions = sample_apart(self.sampler, prompts, self.state.global_step)
            firsts: dict[tuple[int, ...], Completion] = {}
            for prompt, completion in gather_object(list(zip(prompts[::number], completions[::number], strict=True))):
                firsts.setdefault(tuple(prompt), completion)
            self._samples = HeldOutSamples(rows, completions, firsts)
        return self._samples

    def _measure_accuracy(self, dataset: Dataset, prefix: str) -> dict[str, float]:
        """
        Return accuracy and gain over the first evaluation, each with its standard error over the problems.

        All processes call it together. Problems without an answer do not count. The first evaluation has no gain.
        """
        check_answers(dataset)
        shares = self._shares_right(dataset)
        accuracy, error = mean_and_error(list(shares.values()))
        measured = {"accuracy": accuracy, "accuracy_standard_error": error}
        problems = dataset.select_columns(["student_prompt_ids", "answer"]).select(list(shares))[:]
        digest = hashlib.sha256(json.dumps(problems).encode()).hexdigest()
        starts = self._run_state.setdefault(STARTS, {})
        if prefix in starts and starts[prefix]["problems"] != digest:
            logger.warning("--eval_dataset_name: other problems than before; the gain in accuracy starts anew")
            del starts[prefix]
        if prefix in starts:
            gains = [now - before for now, before in zip(shares.values(), starts[prefix]["shares"], strict=True)]
            measured["accuracy_gain"], measured["accuracy_gain_standard_error"] = mean_and_error(gains)
        else:
            starts[prefix] = {"problems": digest, "shares": list(shares.values())}
        return {name: value for name, value in measured.items() if value is not None}

    def _shares_right(self, dataset: Dataset) -> dict[int, float]:
        """Sample, grade, and return row -> share of right completions, over all processes and in the rows' order."""
        process, num_samples = self.accelerator.process_index, self.args.eval_accuracy_samples
        own, completions, _ = self._sample_held_out(dataset)
        answers = [answer for answer in own["answer"] for _ in range(num_samples)]
        texts = [decode_response(self.processing_class, completion.ids) for completion in completions]
        rows = [texts_of(row) for row in own.remove_columns("student_prompt_ids") for _ in range(num_samples)]
        scores = self.teacher_context.verifier(texts, answers, rows)
        shares = []
        for place in range(len(own)):
            of_problem = scores[place * num_samples : (place + 1) * num_samples]
            if None not in of_problem:
                share = sum(score >= RIGHT for score in of_problem) / num_samples
                shares.append((process + place * self.accelerator.num_processes, share))
        return dict(sorted(gather_object(shares)))
