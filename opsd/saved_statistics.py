"""
What a run saves about single tokens, for the page of `inspect_run.py`: OUTPUT_DIR/token_statistics/step_*.parquet.

A fixed set of training problems is sampled every few steps, apart from the rollouts, and scored by both roles. So the
same problem can be seen early and late. Neither loss nor rollouts notice it.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback

from data_collator import MicroBatch, Rollout, start_rollouts
from opsd.config import OPSDConfig
from opsd.losses import Objective, dense_token_losses
from opsd.metrics import Metrics
from opsd.rollouts import own_randomness, sample_apart
from opsd.teacher_context import TeacherContext

FOLDER = "token_statistics"  # in the output folder
NUM_TOP = 5  # most probable tokens of each role
ENTRIES_AT_ONCE = 2**24  # of logits, with about ten tensors of this size

LISTS = {
    "token_ids": pa.int32(), "tokens": pa.string(), "kinds": pa.int8(), "epistemic": pa.bool_(),
    "divergence": pa.float32(), "weight": pa.float32(), "student_logprob": pa.float32(),
    "teacher_logprob": pa.float32(), "student_entropy": pa.float32(), "teacher_entropy": pa.float32(),
    "clipped": pa.float32(), "wrong_way": pa.bool_(), "student_top_ids": pa.int32(), "teacher_top_ids": pa.int32(),
    "student_top_tokens": pa.string(), "teacher_top_tokens": pa.string(), "student_top_logprobs": pa.float32(),
    "teacher_top_logprobs": pa.float32(), "top_overlap": pa.float32(),
}  # fmt: skip
SINGLE = {
    "step": pa.int32(), "index": pa.int32(), "row": pa.int64(), "problem": pa.string(), "reference": pa.string(),
    "answer": pa.string(), "student_prompt": pa.string(), "teacher_prompt": pa.string(), "completion": pa.string(),
    "truncated": pa.bool_(), "correct": pa.bool_(),
}  # fmt: skip
SCHEMA = pa.schema([*SINGLE.items(), *((name, pa.list_(kind)) for name, kind in LISTS.items())])


def check_number(args: OPSDConfig, num_examples: int) -> None:
    """Raise `ValueError` if there are fewer problems than completions to save."""
    if args.save_token_statistics > num_examples:
        raise ValueError(
            f"--save_token_statistics {args.save_token_statistics}: the train dataset has {num_examples} usable "
            "examples, each of which is sampled once; give at most so many"
        )


class TokenTexts:
    """
    Decodes single tokens, with their whitespace. Bytes that are no text by themselves become U+FFFD.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def __call__(self, token_ids: Sequence[int]) -> list[str]:
        """Return the text of each token."""
        return [self._text(token_id) for token_id in token_ids]

    def _text(self, token_id: int) -> str:
        if token_id not in self._texts:
            text = self.tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
            token = self.tokenizer.convert_ids_to_tokens(token_id)
            if isinstance(token, str) and token.startswith("▁") and not text.startswith(" "):
                text = f" {text}"  # SentencePiece leaves it out at the beginning of a text
            self._texts[token_id] = text
        return self._texts[token_id]


@torch.no_grad()
def score_tokens(
    student_logits: Tensor, teacher_logits: Tensor, token_ids: Tensor, objective: Objective
) -> dict[str, Tensor]:
    """
    Compute what is saved about tokens from the logits of both roles, some of them at a time.

    Args:
        student_logits, teacher_logits: (N, V).
        token_ids: (N,), int64, the sampled tokens.
        objective: of the loss. Of a sampled-token loss it is the divergence that is only measured.

    Returns:
        Columns of `LISTS` on the CPU, (N,) or, for those of the top tokens, (N, `NUM_TOP`). Nats, natural logarithms.
    """
    divergence = replace(objective, policy_gradient_weight=0.0, importance_sampling_correction=False).divergence
    size = max(1, ENTRIES_AT_ONCE // student_logits.shape[-1])
    parts = []
    for student, teacher, ids in zip(
        student_logits.split(size), teacher_logits.split(size), token_ids.split(size), strict=True
    ):
        losses = dense_token_losses(student, teacher, ids, divergence)
        statistics = losses.statistics
        columns = {
            "token_ids": ids,
            "divergence": losses.loss,
            "student_entropy": statistics.student_entropy,
            "teacher_entropy": statistics.teacher_entropy,
            "clipped": statistics.clipped_mass / statistics.positive_mass.clamp(min=torch.finfo(torch.float32).tiny),
            "wrong_way": statistics.wrong_way.bool(),
        }
        for role, logits in (("student", student), ("teacher", teacher)):
            logs = (logits.float() / objective.temperature).log_softmax(-1)
            columns[f"{role}_logprob"] = logs.gather(-1, ids[:, None])[:, 0]
            columns[f"{role}_top_logprobs"], columns[f"{role}_top_ids"] = logs.topk(NUM_TOP)
        shared = columns["student_top_ids"][:, :, None] == columns["teacher_top_ids"][:, None, :]
        columns["top_overlap"] = shared.any(-1).float().mean(-1)
        parts.append({name: values.cpu() for name, values in columns.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class SavedStatistics(TrainerCallback):
    """
    Samples and scores `save_token_statistics` training problems before each `token_statistics_steps`-th step.

    Args:
        trainer: an `OPSDTrainer`, whose policy is sampled and whose roles score.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.args: OPSDConfig = trainer.args
        self.folder = Path(str(self.args.output_dir), FOLDER)
        self._texts = TokenTexts(trainer.processing_class)
        self._context: TeacherContext | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Leave out the files of later steps, which a run that goes on from here writes again."""
        if state.is_world_process_zero and self.folder.is_dir():
            for file in self.folder.glob("step_*"):
                number = file.name.split(".")[0].removeprefix("step_")
                if file.suffix == ".partial" or (number.isdecimal() and int(number) > state.global_step):
                    file.unlink()

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if self.args.save_token_statistics and state.global_step % self.args.token_statistics_steps == 0:
            rows = self._score(state.global_step)
            self.trainer.metrics.start_step()  # the time until here is no part of a step
            if state.is_world_process_zero:
                self._write(state.global_step + 1, rows)

    def _write(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Write the file of a step, which appears under its name when it is complete."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"step_{step:06d}.parquet"
        partial = file.with_name(f"{file.name}.partial")
        table = pa.Table.from_pylist([row | {"step": step} for row in rows], schema=SCHEMA)
        pq.write_table(table, partial, compression="zstd")
        partial.replace(file)

    def _score(self, num_steps: int) -> list[dict[str, Any]]:
        """Sample and score the problems after `num_steps` steps, each process its share; rows of all processes."""
        accelerator = self.trainer.accelerator
        chosen = random.Random(self.args.seed).sample(
            range(len(self.trainer.train_dataset)), self.args.save_token_statistics
        )
        number, first = accelerator.num_processes, accelerator.process_index
        # All processes take part in each forward pass: what is left over is filled up, and dropped in the end
        places = [place % len(chosen) for place in range(first, -(-len(chosen) // number) * number, number)]
        with own_randomness(self.args.seed, accelerator):
            rollouts = self._sample([chosen[place] for place in places], num_steps)
            rows = [self._row(rollout) | {"index": place} for rollout, place in zip(rollouts, places, strict=True)]
        by_index = {row["index"]: row for row in gather_object(rows)}
        return [by_index[index] for index in sorted(by_index)]

    def _sample(self, chosen: Sequence[int], num_steps: int) -> list[Rollout]:
        """Sample a completion of each row of the training data, and settle its lesson as in a step."""
        trainer, context = self.trainer, self._own_context()
        # Where another rollout of the problem is the reference, as many as in a step; the first one is kept
        size = self.args.num_generations if self.args.context.of_group is not None else 1
        rows = [row for row in chosen for _ in range(size)]
        rollouts = start_rollouts([trainer.train_dataset[row] for row in rows])
        end_ids = set(trainer.end_ids)
        completions = sample_apart(trainer.sampler, [rollout.prompt_ids for rollout in rollouts], num_steps)
        for rollout, row, completion in zip(rollouts, rows, completions, strict=True):
            rollout.row, rollout.completion_ids = row, completion.ids
            rollout.is_truncated = len(completion.ids) > 0 and end_ids.isdisjoint(completion.ids)
        context.build(rollouts, size, trainer.model_wrapped)
        return rollouts[::size]

    def _own_context(self) -> TeacherContext:
        """Return the trainer's context with metrics that are not logged."""
        trainer = self.trainer
        if self._context is None:
            self._context = TeacherContext(
                self.args, trainer.collator, trainer.sampler, trainer.teacher, trainer.metrics, trainer.end_ids
            )
            self._context.verifier = trainer.teacher_context.verifier  # and its processes
        self._context.metrics = Metrics(trainer.accelerator)
        return self._context

    def _batch(self, rollout: Rollout) -> MicroBatch:
        """Make a micro-batch of one rollout in which all tokens are scored, whatever they count for in the loss."""
        batch = self.trainer.collator([rollout])
        batch.loss_mask = batch.completion_mask
        return batch.to(self.trainer.accelerator.device)

    @torch.no_grad()
    def _row(self, rollout: Rollout) -> dict[str, Any]:
        """Score a rollout alone, so that the logits of one completion are held at a time."""
        trainer, model = self.trainer, self.trainer.model_wrapped
        batch = self._batch(rollout)
        with trainer.teacher.active(model) as network:
            teacher_logits = trainer.teacher.common(trainer.completion_logits(network, batch, "teacher"), dim=-1)
        student_logits = trainer.teacher.common(trainer.completion_logits(model, batch, "student"), dim=-1)
        token_ids = batch.of_tokens(batch.completion_ids)
        scores = score_tokens(student_logits, teacher_logits, token_ids, trainer.objective)
        scores |= {name: values[token_ids] for name, values in trainer.token_metrics.kinds._asdict().items()}
        columns: dict[str, Any] = {name: values.flatten().tolist() for name, values in scores.items()}
        columns["tokens"] = self._texts(columns["token_ids"])
        for role in ("student", "teacher"):
            columns[f"{role}_top_tokens"] = self._texts(columns[f"{role}_top_ids"])
        skipped = self.args.num_loss_tokens_to_skip
        # That of the completion; --token_weights come on top of it
        columns["weight"] = [0.0 if place < skipped else rollout.weight for place in range(len(token_ids))]
        decode: Callable[[list[int]], str] = trainer.processing_class.decode
        return columns | {
            "row": rollout.row,
            "problem": rollout.problem,
            "reference": rollout.reference or "",
            "answer": rollout.answer,
            "student_prompt": decode(rollout.prompt_ids),
            "teacher_prompt": decode(rollout.teacher_prompt_ids),
            "completion": decode(rollout.completion_ids),
            "truncated": rollout.is_truncated,
            "correct": rollout.is_correct,
        }
