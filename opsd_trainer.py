"""On-policy self-distillation: one model samples as student and teaches itself as teacher (arXiv 2601.18734)."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl.experimental.gold import GOLDTrainer
from trl.models.utils import _ForwardRedirection
from trl.trainer.utils import maybe_gather_lm_head_ctx

from data_collator import MicroBatch, PackedRole, Rollout, SelfDistillationDataCollator, start_rollouts
from opsd.adapters import AdapterTraining, check_vllm_lora_support
from opsd.alarm import CollapseAlarm, LeakDetector
from opsd.config import OPSDConfig
from opsd.curriculum import Curriculum
from opsd.held_out import HeldOutAccuracy
from opsd.losses import (
    HeadSettings,
    TokenLosses,
    TopLogprobs,
    check_head,
    dense_token_losses,
    fused_token_losses,
    read_head_settings,
)
from opsd.metrics import Metrics
from opsd.packing import check_attention, divide, packed_inputs, reason_against_packing, say_padded, sum_losses
from opsd.rollouts import Sampler, TransformersSampler, make_vllm_sampler
from opsd.run.checkpoints import CompleteCheckpoints
from opsd.run.report import append_lines, drop_later_steps
from opsd.saved_statistics import SavedStatistics, check_number
from opsd.stale_rollouts import RolloutsAhead
from opsd.teacher import Teacher
from opsd.teacher_context import TeacherContext
from opsd.throughput import Throughput
from opsd.token_statistics import TokenMetrics, problem_divergences
from opsd.token_weights import TokenWeights, effective_share

__all__ = ["OPSDConfig", "OPSDTrainer"]

logger = logging.getLogger(__name__)

COMPLETIONS = "completions.jsonl"  # in the output folder


class _NoTeacherModel(nn.Module):
    """Stands in for the second model that GOLD's constructor asks for. ZeRO-3 asks for at least one weight."""

    config = PreTrainedConfig()

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1), requires_grad=False)

    def resize_token_embeddings(self, *args: Any) -> None:
        pass


class StepCallback(TrainerCallback):
    """Starts the teacher and the curriculum with the training, and moves them on after each optimizer step."""

    def __init__(self, trainer: "OPSDTrainer"):
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer.args.loss_implementation == "fused":
            with torch.no_grad():
                for network in trainer.teacher.networks(trainer.model_wrapped):
                    trainer._in_forward(network, trainer._check_head)
        trainer._check_packing()
        trainer.teacher.start(trainer.model_wrapped, trainer._run_state, trainer._resumed_from)
        trainer._start_curriculum()
        trainer.rollouts_ahead.start(trainer._resumed_from)
        if trainer.accelerator.is_main_process:
            drop_later_steps(Path(trainer.args.output_dir, COMPLETIONS), trainer.state.global_step)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if not self.trainer.last_step_was_skipped:
            self.trainer.teacher.update(self.trainer.state.global_step)
        self.trainer._update_curriculum()


class OPSDTrainer(HeldOutAccuracy, CompleteCheckpoints, AdapterTraining, GOLDTrainer):
    """
    Trains a model to match itself: at every token that the student samples, its distribution is pulled towards the
    teacher's, which also sees the reference solution.

    An optimizer step is `prepare_step` (sample, build the teacher's context, make micro-batches), then `compute_loss`
    for each micro-batch. The order of the data, the buffer of micro-batches and the training loop are GOLD's. Unlike
    GOLD, there is no second model unless the settings name one, the teacher has its own prompt, and the loss has a
    clip. Its denominator covers the whole optimizer step.

    Args:
        model: model, or its path or Hub id.
        args: settings.
        train_dataset, eval_dataset: rows with the texts `problem`, `solution` and `answer`; the settings may need only
            one of the last two. A `history`, turns with `role` and `content`, comes before the problem in all prompts.
            Evaluation is on-policy too.
        processing_class: the model's tokenizer.
        peft_config: LoRA configuration; `None` trains the model itself, or its adapter if it is a PEFT model.
        kwargs: further arguments of `GOLDTrainer`.

    Raises:
        ValueError: for an adapter that moves the teacher or that vLLM does not serve, a tokenizer without chat
            template, or too few examples.
    """

    _tag_names = ["trl", "opsd"]
    _name = "OPSD"
    _paper = {
        "title": "Self-Distilled Reasoner: On-Policy Self-Distillation for Large Language Models",
        "id": "2601.18734",
    }
    loss_is_scaled_for_ga = True  # the denominator covers the optimizer step: no division by accumulation steps

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | str,
        args: OPSDConfig,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        if args.fixed_teacher and (bias := getattr(peft_config, "bias", "none")) != "none":
            raise ValueError(
                f"bias={bias!r} in the LoRA configuration trains biases that remain active when the "
                "adapter is off, so that the fixed teacher would change; use bias='none'"
            )
        if args.use_vllm and peft_config is not None:
            check_vllm_lora_support(peft_config)
        if processing_class.pad_token is None:
            processing_class.pad_token = processing_class.eos_token
        self.collator = SelfDistillationDataCollator(processing_class, **args.collator_settings)
        use_vllm, args.use_vllm = args.use_vllm, False  # GOLD would start an engine that gets its weights by merging
        packing, args.packing = args.packing, False  # SFT would lay examples end to end, before there are rollouts
        super().__init__(
            model,
            teacher_model=_NoTeacherModel(),
            args=args,
            data_collator=start_rollouts,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            **kwargs,
        )
        args.use_vllm, args.packing = use_vllm, packing
        del self.teacher_model
        self._keep_precision()
        config = self.model.config.get_text_config()
        if getattr(config, "output_router_logits", False):
            config.output_router_logits = False  # for a loss that OPSD does not have, and that `generate` fails at
        check_attention(config)
        if self.generation_config.eos_token_id is None:
            self.generation_config.eos_token_id = processing_class.eos_token_id
        self.generation_config.min_p = args.min_p or None

        self.objective = args.objective
        self.metrics = Metrics(self.accelerator)
        self.teacher = Teacher(args, self.model, self.accelerator, processing_class)
        self.token_metrics = TokenMetrics(self.metrics, args.objective, self.teacher.vocab_size, processing_class)
        self.token_weights = TokenWeights(args.token_weights, self.metrics)
        self.throughput = Throughput(self.metrics, *self.teacher.networks(self.model))
        self.logged_counts += ("num_generated_tokens",) + ("num_rationale_tokens",) * args.reason_first
        self.sampler = self._make_sampler(use_vllm)
        self.rollouts_ahead = RolloutsAhead(self)
        self.teacher_context = TeacherContext(
            args, self.collator, self.sampler, self.teacher, self.metrics, self.end_ids
        )
        self._forward_redirection = _ForwardRedirection()
        self._head_settings = HeadSettings()
        if args.loss_implementation == "fused":
            self._head_settings = read_head_settings(self._causal_lm(self.accelerator.unwrap_model(self.model)))
        self._is_packed = False  # until the model is checked, before the first step
        self._loss_denominator: Tensor | None = None  # of the running optimizer step, over all processes
        self._resumed_from: str | None = None
        self.curriculum: Curriculum | None = None
        self._problem_scores: list[tuple[int, float, float]] = []  # of the running step: (row, sum, count)
        self.find_leaks = LeakDetector(args, processing_class, self.train_dataset)
        self.add_callback(StepCallback(self))
        self.add_callback(CollapseAlarm(self))
        self.add_callback(self.throughput)
        self.add_callback(SavedStatistics(self))
        # Different noise in each process, or all of them would draw their rollouts with the same random numbers.
        set_seed(args.seed, device_specific=True)

    def _keep_precision(self) -> None:
        """Let FSDP2 leave the dtype of a forward's results: accelerate would have it round the losses to 16 bits."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)

    @property
    def end_ids(self) -> list[int]:
        """End-of-sequence tokens."""
        end_ids = self.generation_config.eos_token_id
        return [end_ids] if isinstance(end_ids, int) else end_ids

    @staticmethod
    def _causal_lm(policy: nn.Module) -> PreTrainedModel:
        """Return the language model itself, into whose modules PEFT has put the adapter, if there is one."""
        return policy.get_base_model() if isinstance(policy, PeftModel) else policy

    def _make_sampler(self, use_vllm: bool) -> Sampler:
        if not use_vllm:
            return TransformersSampler(
                self.model,
                self.accelerator,
                self.generation_config,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            )
        datasets = [self.train_dataset]
        if self.eval_dataset is not None:
            datasets += self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        return make_vllm_sampler(
            self.args, self.model, self.accelerator, self.processing_class, self.end_ids, datasets
        )

    # Data

    def _prepare_dataset(self, dataset: Dataset, processing_class, args, packing, formatting_func, dataset_name: str):
        optional = {"answer"} - args.needed_texts if args.grades_rollouts else ()
        self.collator.check_columns(dataset, dataset_name, sorted(args.needed_texts), optional)
        dataset = self.collator.encode_dataset(dataset, dataset_name, args.dataset_num_proc)
        if dataset_name == "train":
            self.check_size(len(dataset), args)
        return dataset

    @staticmethod
    def check_size(num_examples: int, args: OPSDConfig) -> None:
        """Raise `ValueError` if there are fewer examples than one optimizer step takes over all processes."""
        needed = args.generation_batch_size * args.world_size
        if num_examples < needed:
            raise ValueError(
                f"the train dataset has {num_examples} usable examples, fewer than one step takes ({needed}); lower "
                "--effective_batch_size, or --per_device_train_batch_size and --gradient_accumulation_steps; if "
                "examples were left out as too long, raise --max_length"
            )
        check_number(args, num_examples)

    # Step

    def _prepare_inputs(self, rollouts: list[Rollout]) -> list[MicroBatch]:
        if self.model.training:
            return super()._prepare_inputs(rollouts)  # the next micro-batch; at the first one calls `_fill_buffer`
        return self.prepare_step(rollouts, 1)

    def _fill_buffer(self, rollouts: list[Rollout], buffer_steps: int) -> None:
        with self.metrics.timed("preparation"):
            batches = self.prepare_step(rollouts, buffer_steps)
        self._buffered_inputs = [batches[start::buffer_steps] for start in range(buffer_steps)]  # see `compute_loss`
        self._buffered_on_policy = [True] * buffer_steps

    def prepare_step(self, rollouts: list[Rollout], num_batches: int) -> list[MicroBatch]:
        """
        Complete the rollouts of an optimizer step (in evaluation: of a batch) and make its micro-batches.

        All processes call it together, each with its own rollouts.

        Args:
            rollouts: with prompts only.
            num_batches: number of micro-batches, at least; it divides the number of rollouts.
        """
        is_training = self.model.training
        self.metrics.mode = "train" if is_training else "eval"
        if self.curriculum is not None and is_training:
            rollouts = self._draw_problems(self.curriculum)
        with self.metrics.timed("rollout"):
            self._sample(rollouts)
        with self.metrics.timed("context"):
            self.teacher_context.build(rollouts, self.num_generations if is_training else 1, self.model_wrapped)
        if is_training and self.args.max_staleness:
            with self.metrics.timed("rollout"):
                self.rollouts_ahead.ask()
        advantage_scale = self._count_tokens(rollouts)
        parts = divide(rollouts, num_batches, self._is_packed, self.args.max_tokens_per_micro_batch)
        batches = [self.collator(part).to(self.accelerator.device) for part in parts]
        for batch in batches:
            batch.advantages *= advantage_scale
        self._record_rollouts(rollouts, num_batches)
        self.throughput.count(rollouts, batches, self._is_packed)
        return batches

    def _draw_problems(self, curriculum: Curriculum) -> list[Rollout]:
        """Draw this process's problems. The data loader fetches a step ahead, which is before the scores are known."""
        num_problems, num_processes = self.args.generation_batch_size, self.accelerator.num_processes
        drawn = curriculum.draw(self.state.global_step, num_problems * num_processes)
        before = self.accelerator.process_index * num_problems
        rows = [row for row in drawn[before : before + num_problems] for _ in range(self.num_generations)]
        rollouts = start_rollouts([self.train_dataset[row] for row in rows])
        for rollout, row in zip(rollouts, rows, strict=True):
            rollout.row = row
        return rollouts

    def _sample(self, rollouts: list[Rollout]) -> None:
        """Sample the completions from the student as it is now, or take those that are there already."""
        prompts, is_training = [rollout.prompt_ids for rollout in rollouts], self.model.training
        completions = self.rollouts_ahead.take(prompts) if is_training else self.take_held_out(prompts)
        self.sampler.sync(self.state.global_step, reuse=not is_training)
        if completions is None:
            completions = self.sampler.sample(prompts)
        self.teacher.check_ids([completion.ids for completion in completions])
        end_ids = set(self.end_ids)
        for rollout, completion in zip(rollouts, completions, strict=True):
            rollout.completion_ids, rollout.sampler_logprobs = completion
            rollout.is_truncated = len(completion.ids) > 0 and end_ids.isdisjoint(completion.ids)

    def _count_tokens(self, rollouts: list[Rollout]) -> Tensor | float:
        """
        Set the divergence's denominator: the sum of the token weights of this optimizer step over all processes.

        Returns:
            policy_gradient_weight x (this denominator) / (number of tokens). Multiplied into the advantages, it makes
            the policy gradient a mean over all tokens.
        """
        skipped = self.args.num_loss_tokens_to_skip
        counts = [max(len(rollout.completion_ids) - skipped, 0) for rollout in rollouts]
        weighted = [count * rollout.weight for count, rollout in zip(counts, rollouts, strict=True)]
        num_generated = sum(len(rollout.completion_ids) for rollout in rollouts)
        num_rationale = self.teacher_context.num_rationale_tokens
        totals = torch.tensor(
            [sum(counts), sum(weighted), num_generated, num_rationale], device=self.accelerator.device
        )
        totals = self.accelerator.reduce(totals, "sum")
        if totals[1] == 0.0:
            logger.warning(
                "step %d: the divergence has no tokens to learn from (see references/none_ratio and "
                "rewards/accuracy/mean)",
                self.state.global_step + 1,
            )
        if self.model.training:
            self._count("num_generated_tokens", int(totals[2]))
            if self.args.reason_first:
                self._count("num_rationale_tokens", int(totals[3]))
        num_tokens, self._loss_denominator = torch.where(totals[:2] > 0.0, totals[:2], 1.0)
        return self.args.policy_gradient_weight * self._loss_denominator / num_tokens

    def _record_rollouts(self, rollouts: list[Rollout], num_batches: int) -> None:
        """Log lengths, note for the curriculum which rollouts are right, keep the texts."""
        lengths = [len(rollout.completion_ids) for rollout in rollouts]
        self.metrics.add_values("completions/mean_length", lengths)
        self.metrics.add_extreme("completions/min_length", min, lengths)
        self.metrics.add_extreme("completions/max_length", max, lengths)
        self.metrics.add_values("completions/clipped_ratio", [rollout.is_truncated for rollout in rollouts])
        self.metrics.add_values(
            "completions/leaked_ratio", self.find_leaks([rollout.completion_ids for rollout in rollouts])
        )
        self._buffered_text_logs = None
        if not self.model.training:
            return
        if self.args.curriculum == "pass_rate":
            self._problem_scores += [
                (rollout.row, float(rollout.is_correct), 1.0) for rollout in rollouts if rollout.is_correct is not None
            ]
        if not (self.log_completions or self.args.save_completions):
            return
        prompts = self.processing_class.batch_decode([rollout.prompt_ids for rollout in rollouts])
        completions = self.processing_class.batch_decode([rollout.completion_ids for rollout in rollouts])
        if self.log_completions:
            size = len(rollouts) // num_batches
            starts = range(0, len(rollouts), size)
            self._buffered_text_logs = [(prompts[i : i + size], completions[i : i + size]) for i in starts]
        if self.args.save_completions:
            self._save_completions(rollouts, prompts, completions)

    def _save_completions(self, rollouts: list[Rollout], prompts: list[str], completions: list[str]) -> None:
        """Add the step's rollouts of all processes to the file."""
        step, records = self.state.global_step + 1, []
        for rollout, prompt, completion in zip(rollouts, prompts, completions, strict=True):
            record = {"step": step, "prompt": prompt, "completion": completion}
            record |= {"num_tokens": len(rollout.completion_ids), "truncated": rollout.is_truncated}
            record["answer"] = rollout.answer
            if self.args.grades_rollouts:
                record["correct"] = rollout.is_correct
            if self.args.reason_first:
                record["rationale"] = self.processing_class.decode(rollout.rationale_ids or [])
            records.append(record)
        records = gather_object(records)
        if self.accelerator.is_main_process:
            append_lines(Path(self.args.output_dir, COMPLETIONS), records)

    # Loss

    def compute_loss(
        self, model: nn.Module, inputs: list[MicroBatch], return_outputs: bool = False, num_items_in_batch=None
    ) -> Tensor:
        """Return the micro-batches' share of the loss, and take the gradients of all but the last on the way."""
        return sum_losses(self.accelerator, model, inputs, self._share_of_loss)

    def _share_of_loss(self, model: nn.Module, inputs: MicroBatch) -> Tensor:
        """Return the sum of a micro-batch's losses over the denominator of the optimizer step."""
        losses = self.token_weights.apply(inputs, self.token_losses(model, inputs))
        # DDP, ZeRO and FSDP average the gradients of the processes.
        loss = losses.loss.sum() * self.accelerator.num_processes / self._loss_denominator
        self.token_metrics.add(inputs, losses)
        if self.args.curriculum == "divergence" and self.model.training:
            self._problem_scores += problem_divergences(inputs, losses)
        return self.mark_nonfinite(loss, losses.loss)

    def token_losses(self, model: nn.Module, batch: MicroBatch, implementation: str | None = None) -> TokenLosses:
        """
        Compute the loss of each token, (N,) in the order of `MicroBatch.of_tokens`, and its statistics.

        Args:
            model: the student, as its launcher has wrapped it.
            batch: micro-batch.
            implementation: "fused" or "dense"; by default that of the settings.
        """
        if (implementation or self.args.loss_implementation) == "dense":
            with self.metrics.timed("teacher"), self.teacher.active(model) as network:
                teacher_logits = self.teacher.common(self.completion_logits(network, batch, "teacher"), dim=-1)
            student_logits = self.teacher.common(self.completion_logits(model, batch, "student"), dim=-1)
            return dense_token_losses(student_logits, teacher_logits, **self._loss_arguments(batch))
        if batch.teacher_top is not None:
            return self._in_forward(model, self._student_losses, batch, TopLogprobs(*batch.teacher_top), None)
        with self.metrics.timed("teacher"), self.teacher.active(model) as network:
            teacher_hidden, teacher_head = self._in_forward(network, self._teacher_outputs, batch)
        return self._in_forward(model, self._student_losses, batch, teacher_hidden, teacher_head)

    def _loss_arguments(self, batch: MicroBatch) -> dict[str, Any]:
        """Return the arguments that both loss implementations share, (N,) each."""
        logprobs = batch.sampler_logprobs
        return {
            "token_ids": batch.of_tokens(batch.completion_ids),
            "objective": self.objective,
            "weights": batch.of_tokens(batch.weights) if self.args.needs_answers else None,  # else all are 1
            "advantages": batch.of_tokens(batch.advantages),
            "sampler_logprobs": None if logprobs is None else batch.of_tokens(logprobs),
        }

    def completion_logits(self, model: nn.Module, batch: MicroBatch, role: str) -> Tensor:
        """
        Compute the logits (N, V) from which `role` predicts the tokens of the loss, with the model as it is.

        Those of a teacher on a server come from what it told (`TopLogprobs`).
        """
        if role == "teacher" and batch.teacher_top is not None:
            top = TopLogprobs(*batch.teacher_top)
            return top.fill(top.logprobs.new_empty(len(top.logprobs), self.teacher.vocab_size))
        if self._is_packed:
            config = self.accelerator.unwrap_model(model).config.get_text_config()
            inputs = packed_inputs(batch.packed(role), config)
            return model(**inputs, logits_to_keep=batch.predictors(role), use_cache=False).logits[0]
        num_logits = batch.completion_ids.shape[1] + 1
        outputs = model(**batch.model_inputs(role), logits_to_keep=num_logits, use_cache=False)
        return batch.of_tokens(outputs.logits[:, :-1])

    def _in_forward(self, model: nn.Module, method: Callable, *args: Any) -> Any:
        """
        Call a method inside the wrapped model's forward, where DDP, ZeRO and FSDP have their hooks.

        The wrapper does not see the arguments: FSDP2 would cast them to the dtype of the weights.
        """
        policy = self.accelerator.unwrap_model(model)
        return self._forward_redirection(model, policy, lambda module: method(module, *args), policy)

    def _check_head(self, policy: nn.Module) -> None:
        """Raise `ValueError` if the model's logits for a token are not those that the fused losses compute."""
        model = self._causal_lm(policy)
        weight = model.get_output_embeddings().weight
        input_ids = torch.tensor([self.train_dataset[0]["student_prompt_ids"][:1]], device=self.accelerator.device)
        is_half = weight.dtype.itemsize == 2 or self.accelerator.mixed_precision != "no"
        with self.accelerator.autocast():
            check_head(model, input_ids, self._head_settings, precision=0.03 if is_half else 1e-4)

    def _check_packing(self) -> None:
        """Lay the sequences of micro-batches end to end, where the model keeps them apart."""
        if not self.args.packing:
            return
        with torch.no_grad(), self.accelerator.autocast():
            reasons = [
                self._in_forward(network, lambda policy: reason_against_packing(self._causal_lm(policy)))
                for network in self.teacher.networks(self.model_wrapped)
            ]
        reason = next(filter(None, reasons), None)
        self._is_packed = reason is None
        say_padded(reason, self.args.max_tokens_per_micro_batch)

    def _hidden_states(self, policy: nn.Module, batch: MicroBatch, role: str) -> Tensor:
        """Compute the hidden states (N, H) that the head turns into `completion_logits`."""
        with self.accelerator.autocast():
            backbone = self._causal_lm(policy).base_model
            if self._is_packed:
                inputs = packed_inputs(batch.packed(role), backbone.config.get_text_config())
                return backbone(**inputs, use_cache=False).last_hidden_state[0, batch.predictors(role)]
            hidden_states = backbone(**batch.model_inputs(role), use_cache=False).last_hidden_state
        return batch.of_tokens(hidden_states[:, -batch.completion_ids.shape[1] - 1 : -1])

    def _teacher_outputs(self, policy: nn.Module, batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
        """Return hidden states (N, H), and the teacher's head (V, H) if it is not the student's."""
        hidden_states = self._hidden_states(policy, batch, "teacher")
        return hidden_states, self.teacher.head(self._causal_lm(policy).get_output_embeddings().weight)

    def _student_losses(
        self,
        policy: nn.Module,
        batch: MicroBatch,
        teacher_hidden: Tensor | TopLogprobs,
        teacher_head: Tensor | None,
    ) -> TokenLosses:
        student_hidden = self._hidden_states(policy, batch, "student")
        weight = self._causal_lm(policy).get_output_embeddings().weight  # (V, H)
        with maybe_gather_lm_head_ctx(weight), self.accelerator.autocast():
            return fused_token_losses(
                student_hidden,
                teacher_hidden,
                self.teacher.common(weight.full_tensor() if isinstance(weight, DTensor) else weight),
                teacher_lm_head_weight=teacher_head,
                head=self._head_settings,
                chunk_size=self.args.loss_chunk_size,
                **self._loss_arguments(batch),
            )

    # Optimizer step and log

    def training_step(self, model: nn.Module, inputs: list[Rollout], num_items_in_batch=None) -> Tensor:
        with self.metrics.timed("student"):  # without the phases timed inside it: forward pass, loss and backward pass
            return super().training_step(model, inputs, num_items_in_batch)

    def _batch_to_keep(self) -> Any:
        return [
            {name: value for name, value in vars(batch).items() if not isinstance(value, PackedRole | tuple)}
            for batch in sum(self._buffered_inputs, [])
        ]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last log, over all processes."""
        mode = "train" if self.model.training else "eval"
        self._on_policy_step_equiv = 0.0  # GOLD would repeat the loss under a second name
        self.metrics.mode = mode
        self.throughput.record()
        values = self.metrics.pop()
        values |= effective_share(values)
        if self.curriculum is not None and mode == "train" and values:
            values |= self.curriculum.metrics()
        self._metrics[mode].update({name: [value] for name, value in values.items()})
        super().log(logs, start_time)

    # Curriculum

    def _start_curriculum(self) -> None:
        if (before := self._run_state.setdefault("curriculum", self.args.curriculum)) != self.args.curriculum:
            raise ValueError(
                f"--curriculum {self.args.curriculum}: --resume_from_checkpoint {self._resumed_from} was trained with "
                f"{before}; give the same, or start anew"
            )
        if self.args.curriculum == "none":
            return
        self.curriculum = Curriculum(self.args.curriculum, len(self.train_dataset), self.data_seed)
        if self._resumed_from is not None:
            self.curriculum.load(self._resumed_from)

    def _update_curriculum(self) -> None:
        """Tell the curriculum what the step's rollouts of each problem showed, over all processes."""
        if self.curriculum is None:
            return
        self.curriculum.add_scores(gather_object(self._problem_scores))
        self._problem_scores = []

    # Checkpoints

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self.teacher.check_frozen_weights(self._run_state)
        super()._run_epoch(*args, **kwargs)
        self.teacher.check_frozen_weights(self._run_state)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.teacher.check_frozen_weights(self._run_state)
        super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.teacher.weights is not None:
            self.teacher.weights.save(output_dir)
        if self.accelerator.is_main_process:
            self.rollouts_ahead.save(output_dir)
            if self.curriculum is not None:
                self.curriculum.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._resumed_from = checkpoint
