"""On-policy self-distillation: one model samples as student and teaches itself as teacher (arXiv 2601.18734)."""

import copy
import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, send_to_device, set_seed
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl.experimental.gold import GOLDTrainer
from trl.models.utils import _ForwardRedirection, unwrap_model_for_generation
from trl.trainer.utils import (
    global_then_local_main_first,
    maybe_gather_lm_head_ctx,
    pad,
    split_tensor_dict,
)

from checkpoints import CompleteCheckpoints
from curriculum import Curriculum
from data_collator import SelfDistillationDataCollator, unpad_prompts
from frozen_weights import FrozenWeights
from lessons import Lessons
from opsd.losses import (
    HeadSettings,
    Objective,
    TokenLosses,
    TokenStatistics,
    dense_token_losses,
    fused_token_losses,
    read_head_settings,
)
from opsd_config import OPSDConfig
from rationalization import RationalizationCache, Rationalizer
from rollouts import OnPolicyGeneration, check_servable
from sharded_weights import local_part
from teacher_weights import TeacherWeights

logger = logging.getLogger(__name__)

NUM_FIRST_TOKENS = 4  # of a completion, whose divergence is logged by itself: roles in different forms disagree there


class _NoTeacherModel(nn.Module):
    """Takes the place of the second model that GOLD's constructor asks for, with the one weight that ZeRO-3 asks for."""

    config = PreTrainedConfig()

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1), requires_grad=False)

    def resize_token_embeddings(self, *args: Any) -> None:
        pass


class _BetweenSteps(TrainerCallback):
    """When teacher and curriculum start or go on, and when they follow the student."""

    def __init__(self, trainer: "OPSDTrainer"):
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._start_teacher()
        self.trainer._start_curriculum()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._update_teacher()
        self.trainer._update_curriculum()


def _causal_lm(policy: nn.Module) -> PreTrainedModel:
    """The language model itself, whose modules an adapter, if there is one, has been put into."""
    return policy.get_base_model() if isinstance(policy, PeftModel) else policy


class OPSDTrainer(CompleteCheckpoints, GOLDTrainer):
    """
    Trains a model to match itself: the student's distribution, given the problem, follows the teacher's, which is
    also given the reference solution, at every token that the student samples.

    What differs from GOLD: there is no second model, the teacher has a prompt of its own, the loss has a clip and the
    denominator of the whole optimizer step. Sampling order, the rollout buffer and generation are inherited.

    Args:
        model: model, or its path or Hub id.
        args: settings.
        train_dataset, eval_dataset: rows with the texts `problem`, `solution` and `answer`, of which the settings may need
            only one of the last two. Evaluation is on-policy too.
        processing_class: the model's tokenizer.
        peft_config: LoRA configuration; `None` trains the model itself, or its adapter if it is a PEFT model.
        kwargs: further arguments of `GOLDTrainer`.

    Raises:
        ValueError: for an adapter that moves the teacher or that vLLM does not serve, a tokenizer without chat template,
            or too few examples.
    """

    _tag_names = ["trl", "opsd"]
    _name = "OPSD"
    _paper = {
        "title": "Self-Distilled Reasoner: On-Policy Self-Distillation for Large Language Models",
        "id": "2601.18734",
    }
    _MODEL_INPUT_RESERVED_KEYS = GOLDTrainer._MODEL_INPUT_RESERVED_KEYS | {
        "teacher_prompts",
        "teacher_prompt_attention_mask",
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
        if args.fixed_teacher and getattr(peft_config, "bias", "none") != "none":
            raise ValueError(
                f"bias={peft_config.bias!r} in the LoRA configuration trains weights that stay when the adapter is "
                "off, so that --fixed_teacher would move; use bias='none'"
            )
        if args.use_vllm and peft_config is not None:
            check_servable(peft_config)
        if processing_class.pad_token is None:
            processing_class.pad_token = processing_class.eos_token
        self.data_collator = self.make_collator(processing_class, args)
        use_vllm, args.use_vllm = args.use_vllm, False  # GOLD would start an engine that gets its weights by merging
        super().__init__(
            model,
            teacher_model=_NoTeacherModel(),
            args=args,
            data_collator=self.data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            **kwargs,
        )
        args.use_vllm = use_vllm
        del self.teacher_model
        if self.generation_config.eos_token_id is None:
            self.generation_config.eos_token_id = processing_class.eos_token_id
        self.generation_config.min_p = args.min_p or None
        self._forward_redirection = _ForwardRedirection()
        self._head_settings = HeadSettings()
        if args.loss_implementation == "fused":
            self._head_settings = read_head_settings(_causal_lm(self.accelerator.unwrap_model(self.model)))
        # Of the running optimizer step, over all processes: its tokens, each times its weight
        self._loss_denominator: Tensor | None = None
        self._frozen_weights: FrozenWeights | None = None  # as they were when training began
        # Whether the teacher is the model with its adapter off, as at the start an adapter is that was not trained yet.
        self.teacher_is_base = args.fixed_teacher and isinstance(self.model, PeftModel) and not self._is_trained()
        if args.reasoning_cache is not None and not self.teacher_is_base:
            raise ValueError(
                f"--reasoning_cache {args.reasoning_cache}: is for a teacher that is the base model, with its adapter off; "
                "leave it out with --start_adapter and without --use_peft"
            )
        if args.reasoning_cache is not None:
            try:
                Path(args.reasoning_cache).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(
                    f"--reasoning_cache {args.reasoning_cache}: {error}; name a folder to write to"
                ) from error
        self._teacher_weights: TeacherWeights | None = None  # of a teacher that is neither the base nor the student
        self._resumed_from: str | None = None
        self.add_callback(_BetweenSteps(self))
        self._nonfinite_losses: dict[int, Tensor] = {}  # of the running step, by micro-batch: the loss of each token
        self._num_skipped_in_a_row = 0
        # Since the last log, or in the running evaluation
        self._sums: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}  # of this process
        self._max_logprob_gap = {mode: torch.zeros((), device=self.accelerator.device) for mode in ("train", "eval")}
        self._lengths: dict[str, list[int]] = {"train": [], "eval": []}  # of the completions of all processes, tokens
        self._truncated: dict[str, list[bool]] = {"train": [], "eval": []}
        self._seconds: dict[str, float] = defaultdict(float)
        self.rollouts = self._start_rollouts() if use_vllm else None
        self._synced_step: int | None = None  # at which vLLM got the student's weights; None: it holds others
        # Made with the first rollouts: the key of its cache needs the weights as the launcher has given them
        self._lessons: Lessons | None = None
        self.curriculum: Curriculum | None = None
        # (problem, sum, number) of each rollout of the running step, until the curriculum is told
        self._shown: list[tuple[int, float, float]] = []
        # Different noise in each process, or all of them would draw their rollouts with the same random numbers.
        set_seed(args.seed, device_specific=True)

    # Data

    @staticmethod
    def make_collator(tokenizer: PreTrainedTokenizerBase, args: OPSDConfig) -> SelfDistillationDataCollator:
        """The collator with the prompts and the prompt budget of `args`; raises `ValueError` as it does."""
        return SelfDistillationDataCollator(
            tokenizer,
            student_prompt=args.student_prompt,
            teacher_prompt=args.teacher_prompt,
            student_thinking=args.student_thinking,
            teacher_thinking=args.teacher_thinking,
            teacher_prefill=args.teacher_prefill,
            teacher_sees_solution=args.teacher_sees_solution,
            max_prompt_length=None if args.max_length is None else args.max_length - args.max_completion_length,
            reason_first=args.reason_first,
            reasoning_prompt=args.reasoning_prompt,
            transition_prompt=args.transition_prompt,
            reasoning_thinking=args.reasoning_thinking,
            max_reasoning_length=args.max_reasoning_length,
        )

    def _prepare_dataset(self, dataset: Dataset, processing_class, args, packing, formatting_func, dataset_name: str):
        """Encode the prompts of both roles once; leave out what does not fit and say how much that is."""
        for column, is_needed in (
            ("problem", True),
            ("solution", args.needs_solutions),
            ("answer", args.needs_answers),
        ):
            if is_needed and column not in dataset.column_names:
                raise ValueError(
                    f"the {dataset_name} dataset has no column {column!r}, which these settings need; it has "
                    f"{', '.join(dataset.column_names)}"
                )
            if is_needed and column != "answer" and None in dataset[column]:
                raise ValueError(f"the {dataset_name} dataset has rows without {column!r}: leave them out")
        with global_then_local_main_first():
            dataset = dataset.map(
                self.data_collator.encode,
                num_proc=args.dataset_num_proc,
                desc=f"Encoding the prompts of the {dataset_name} dataset",
            )
            status = dataset["length_status"]
            dataset = dataset.filter(lambda status: status != "dropped", input_columns="length_status")
        dropped, shortened = status[:].count("dropped"), status[:].count("shortened")
        if dropped or shortened:
            logger.warning(
                "%s dataset, prompts over %d tokens (--max_length less --max_completion_length): %d of %d examples left "
                "out as too long, %d solutions cut in their middle",
                dataset_name, self.data_collator.max_prompt_length, dropped, len(status), shortened,
            )  # fmt: skip
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
                "--per_device_train_batch_size or --gradient_accumulation_steps, or raise --max_length"
            )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self._check_frozen_weights()
        super()._run_epoch(*args, **kwargs)
        self._check_frozen_weights()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_frozen_weights()
        super()._save_checkpoint(model, trial)

    # Teacher

    def _is_trained(self) -> bool:
        """Whether the adapter changes the model: its second factors are zero before the first step."""
        factors = [weight for name, weight in self.model.named_parameters() if "lora_B" in name]
        num_changed = sum(local_part(weight).count_nonzero() for weight in factors)
        return self.accelerator.reduce(torch.as_tensor(num_changed, device=self.accelerator.device), "sum").item() > 0

    def _start_teacher(self) -> None:
        """Copy the weights that the teacher starts from or, after a resume, read those that it had."""
        has_own_weights = self.args.use_ema_teacher or (self.args.fixed_teacher and not self.teacher_is_base)
        kind = "base" if self.teacher_is_base else "student"
        if has_own_weights:
            kind = "average" if self.args.use_ema_teacher else "start policy"
        if (before := self._saved.setdefault("teacher", kind)) != kind:
            raise ValueError(
                f"--resume_from_checkpoint {self._resumed_from}: its teacher is the {before}, and with these flags it would be "
                f"the {kind}; give --fixed_teacher, --use_ema_teacher, --use_peft and --start_adapter as at the first start"
            )
        if not has_own_weights:
            return
        decay = None if self.args.fixed_teacher else self.args.ema_decay
        self._teacher_weights = TeacherWeights(self.model_wrapped, self.accelerator, decay)
        if self._resumed_from is not None:
            self._teacher_weights.load(self._resumed_from)

    def _update_teacher(self) -> None:
        is_due = self.state.global_step % self.args.ema_update_steps == 0 and self._num_skipped_in_a_row == 0
        if self._teacher_weights is not None and is_due:
            self._teacher_weights.update()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._teacher_weights is not None:
            self._teacher_weights.save(output_dir)
        if self.curriculum is not None and self.accelerator.is_main_process:
            self.curriculum.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._resumed_from = checkpoint

    @contextmanager
    def _as_teacher(self, model: nn.Module, phase: str = "teacher") -> Iterator[None]:
        """Inside the block the model is the teacher: with its adapter off, with weights of its own, or as it is."""
        policy = self.accelerator.unwrap_model(model)
        trained = [weight for weight in policy.parameters() if weight.requires_grad]
        teacher = nullcontext()
        if self.teacher_is_base:
            teacher = policy.disable_adapter()
        elif self._teacher_weights is not None:
            teacher = self._teacher_weights.applied()
        with torch.no_grad(), self._timed(phase), teacher:
            # PEFT takes the flags away with the adapter; FSDP2 looks at them in its first forward, which is the
            # teacher's, to learn in what dtype gradients are reduced.
            for weight in trained:
                weight.requires_grad_(True)
            yield

    def _check_frozen_weights(self) -> None:
        """Raise `RuntimeError` if they are not those of the start or, after a resume, of the checkpoint."""
        if self._frozen_weights is not None:
            self._frozen_weights.check()
            return
        self._frozen_weights = FrozenWeights(self.model, self.accelerator)
        checksum = self._frozen_weights.checksum()
        if self._saved.setdefault("frozen_weights", checksum) != checksum:
            raise RuntimeError(
                "the frozen weights are not those that the checkpoint was trained with: is --model_name_or_path another "
                "model or revision, or --dtype another one? Resume with the model of the first start"
            )

    # Curriculum

    def _start_curriculum(self) -> None:
        if (before := self._saved.setdefault("curriculum", self.args.curriculum)) != self.args.curriculum:
            raise ValueError(
                f"--curriculum {self.args.curriculum}: --resume_from_checkpoint {self._resumed_from} was trained with {before}; "
                "give the same, or start anew"
            )
        if self.args.curriculum == "none":
            return
        self.curriculum = Curriculum(self.args.curriculum, len(self.train_dataset), self.args.seed)
        if self._resumed_from is not None:
            self.curriculum.load(self._resumed_from)

    def _draw_problems(self) -> dict[str, Any]:
        """This process's batch, in place of the data loader's, which fetches a step ahead and so draws too early."""
        num_problems, num_processes = self.args.generation_batch_size, self.accelerator.num_processes
        drawn = self.curriculum.draw(self.state.global_step, num_problems * num_processes)
        before = self.accelerator.process_index * num_problems
        rows = [row for row in drawn[before : before + num_problems] for _ in range(self.num_generations)]
        batch = self.data_collator([self.train_dataset[row] for row in rows])
        return send_to_device(batch, self.accelerator.device) | {"rows": rows}

    def _update_curriculum(self) -> None:
        """Tell it what the step's rollouts of each problem showed, over all processes."""
        if self.curriculum is None:
            return
        totals: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for row, total, number in gather_object(self._shown):
            totals[row][0] += total
            totals[row][1] += number
        self._shown = []
        numbers = [number for _, number in totals.values()]
        self.curriculum.update(list(totals), [total / number for total, number in totals.values()], numbers)

    # Rollout

    def _prepare_inputs(self, generation_batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.model.training:
            return super()._prepare_inputs(generation_batch)
        self._fill_buffer(generation_batch, 1)
        (inputs,), self._buffered_inputs = self._buffered_inputs, None
        return inputs

    def _start_rollouts(self) -> OnPolicyGeneration:
        args = self.args
        datasets = [self.train_dataset]
        if self.eval_dataset is not None:
            datasets += self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        longest = max(len(prompt_ids) for dataset in datasets for prompt_ids in dataset["student_prompt_ids"])
        longest += args.max_completion_length
        if args.reason_first and args.teacher_reference == "rollout":
            longest = max(longest, args.max_length - args.max_completion_length)
        elif args.reason_first:
            prompts = [prompt for dataset in datasets for prompt in dataset["reasoning_prompt_ids"]]
            longest = max(longest, max(map(len, prompts)) + args.max_reasoning_length)
        if args.vllm_max_model_length is not None and args.vllm_max_model_length < longest:
            raise ValueError(
                f"--vllm_max_model_length {args.vllm_max_model_length}: the longest prompt needs {longest} tokens with "
                f"what is sampled behind it; leave the flag out, or lower --max_length to drop long problems"
            )
        model_arguments = args.model_init_kwargs or {}
        return OnPolicyGeneration(
            model=self.model,
            accelerator=self.accelerator,
            processing_class=self.processing_class,
            mode=args.vllm_mode,
            server_base_url=args.vllm_server_base_url,
            server_host=args.vllm_server_host,
            server_port=args.vllm_server_port,
            server_timeout=args.vllm_server_timeout,
            group_port=args.vllm_group_port,
            tensor_parallel_size=args.vllm_tensor_parallel_size,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            max_model_length=args.vllm_max_model_length or longest,
            max_num_seqs=args.per_device_train_batch_size
            * args.gradient_accumulation_steps
            * args.vllm_tensor_parallel_size,
            enable_sleep_mode=args.vllm_enable_sleep_mode,
            model_impl=args.vllm_model_impl,
            trust_remote_code=args.trust_remote_code,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            min_p=args.min_p,
            max_completion_length=args.max_completion_length,
            generation_kwargs={
                "presence_penalty": args.presence_penalty,
                "stop_token_ids": self._end_ids,
            },
            seed=args.seed,
            adapter_dir=args.vllm_adapter_dir,
            logprobs_mode="processed_logprobs" if args.importance_correction else "raw_logprobs",
            engine_arguments={key: model_arguments[key] for key in ("revision",) if key in model_arguments},
        )

    def _fill_buffer(self, generation_batch: dict[str, Any], buffer_steps: int) -> None:
        """
        Sample the completions of a whole optimizer step, settle what each is learned from, and count the tokens over all
        processes.
        """
        mode = "train" if self.model.training else "eval"
        if self.curriculum is not None and mode == "train":
            generation_batch = self._draw_problems()
        with self._timed("rollout"):
            sample = self._sample_with_transformers if self.rollouts is None else self._sample_with_vllm
            completions, logprobs = sample(generation_batch, buffer_steps)
            if self._has_lessons:
                generation_batch = self._choose_lessons(generation_batch, completions)
        lengths = torch.tensor([len(ids) for ids in completions], device=self.accelerator.device)  # (rollouts,)
        truncated = torch.tensor([self._is_truncated(ids) for ids in completions], device=self.accelerator.device)
        size = len(completions) // buffer_steps
        self._buffered_inputs = [
            self._pair_completions(
                batch, completions[start : start + size], None if logprobs is None else logprobs[start : start + size]
            )
            for start, batch in zip(
                range(0, len(completions), size), split_tensor_dict(generation_batch, buffer_steps), strict=True
            )
        ]
        self._weigh_tokens()
        all_lengths, all_truncated = self.accelerator.gather((lengths, truncated))
        self._lengths[mode] += all_lengths.tolist()
        self._truncated[mode] += all_truncated.tolist()
        if mode == "train":
            self._count("num_generated_tokens", all_lengths.sum().item())
            if self.args.save_completions:
                self._save_completions(lengths.tolist(), truncated.tolist())

    def _sample_with_transformers(
        self, generation_batch: dict[str, Any], buffer_steps: int
    ) -> tuple[list[Tensor], None]:
        """As GOLD does it, a micro-batch at a time."""
        with self._rollout_settings():
            super()._fill_buffer(generation_batch, buffer_steps)
        return [ids for rollout in self._buffered_inputs for ids in self._completions_of(rollout)], None

    def _sample_with_vllm(
        self, generation_batch: dict[str, Any], buffer_steps: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """One call for the whole optimizer step, from the weights as they are now."""
        prompts = unpad_prompts(generation_batch["prompts"], generation_batch["prompt_attention_mask"])
        if self.model.training or self._synced_step != self.state.global_step:
            self.rollouts.sync_weights()
            self._synced_step = self.state.global_step
        self.rollouts.step = self.state.global_step
        _, completions, logprobs, _ = self.rollouts.generate(prompts)
        decode = self.processing_class.batch_decode
        texts = list(zip(decode(prompts), decode(completions), strict=True))
        size = len(prompts) // buffer_steps
        self._buffered_text_logs = [
            tuple(map(list, zip(*texts[start : start + size], strict=True))) for start in range(0, len(texts), size)
        ]
        self._buffered_on_policy = [True] * buffer_steps
        device = generation_batch["prompts"].device
        return (
            [torch.tensor(ids, dtype=torch.long, device=device) for ids in completions],
            # vLLM's NaN arrives as None
            [
                torch.tensor([math.nan if value is None else value for (value,) in values], device=device)
                for values in logprobs
            ],
        )

    @contextmanager
    def _rollout_settings(self) -> Iterator[None]:
        """Sample in training's precision, and with none of the sampling settings that the model was published with."""
        policy = _causal_lm(self.accelerator.unwrap_model(self.model))
        published, policy.generation_config = policy.generation_config, self.generation_config
        try:
            with self.accelerator.autocast():
                yield
        finally:
            policy.generation_config = published

    @staticmethod
    def _completions_of(rollout: dict[str, Tensor]) -> list[Tensor]:
        """The token ids that transformers sampled, without padding."""
        start = rollout["prompts"].shape[1]
        is_sampled = rollout["labels"][:, start:] != -100
        return [ids[mask] for ids, mask in zip(rollout["input_ids"][:, start:], is_sampled, strict=True)]

    @property
    def _end_ids(self) -> list[int]:
        end_ids = self.generation_config.eos_token_id
        return [end_ids] if isinstance(end_ids, int) else end_ids

    def _is_truncated(self, completion: Tensor) -> bool:
        """Whether it has tokens, and no end-of-sequence token among them."""
        return len(completion) > 0 and not set(self._end_ids) & set(completion.tolist())

    @property
    def _has_lessons(self) -> bool:
        """Whether rollouts are graded or the teacher's prompts depend on them."""
        return self.args.needs_answers or self.args.reason_first

    def _choose_lessons(self, batch: dict[str, Any], completions: list[Tensor]) -> dict[str, Any]:
        """What `Lessons` makes of the rollouts; what it counts is logged, what it says of problems the curriculum gets."""
        mode = "train" if self.model.training else "eval"
        if self._lessons is None:
            self._lessons = self._start_lessons()
        ids = [completion.tolist() for completion in completions]
        batch = self._lessons(batch, ids, self.num_generations if mode == "train" else 1)
        if (rationalizer := self._lessons.rationalizer) is not None:
            number, rationalizer.num_tokens = sum(gather_object([rationalizer.num_tokens])), 0
            if mode == "train":
                self._count("num_rationalization_tokens", number)
        for name, (total, number) in self._lessons.sums.items():
            self._add(mode, **{name: total, f"{name}/number": number})
        self._lessons.sums.clear()
        if self.curriculum is not None and self.args.curriculum == "pass_rate" and mode == "train":
            self._shown += [
                (row, float(is_correct), 1.0)
                for row, is_correct in zip(batch["rows"], batch["correct"], strict=True)
                if is_correct is not None
            ]
        return batch

    def _start_lessons(self) -> Lessons:
        args, rationalizer = self.args, None
        if args.reason_first:
            cache = None
            if args.reasoning_cache is not None:
                self._check_frozen_weights()
                base = [self._saved["frozen_weights"], str(self.model.dtype), self.accelerator.mixed_precision]
                cache = RationalizationCache(args.reasoning_cache, [*base, self._reasoning_settings])
            rationalizer = Rationalizer(self._sample_as_teacher, self._end_ids, cache)
        return Lessons(args, self.data_collator, self._end_ids, rationalizer)

    @property
    def _reasoning_settings(self) -> dict[str, float]:
        """Of rationalizations, under vLLM's names."""
        return {
            "temperature": self.args.reasoning_temperature,
            "top_p": self.args.reasoning_top_p,
            "top_k": self.args.reasoning_top_k,
            "min_p": 0.0,
            "presence_penalty": 0.0,
            "max_tokens": self.args.max_reasoning_length,
        }

    def _sample_as_teacher(self, prompts: list[list[int]]) -> list[list[int]]:
        """Completions of a process's prompts from the teacher's weights. All processes call it together."""
        with self._timed("rationalization"):
            if self.rollouts is None:
                return self._sample_as_teacher_with_transformers(prompts)
            if self._teacher_weights is not None:
                with self._as_teacher(self.model_wrapped, "rationalization"):
                    self.rollouts.sync_weights()
                self._synced_step = None  # the student's are to come again
            return self.rollouts.generate(prompts, base=self.teacher_is_base, **self._reasoning_settings)[1]

    def _sample_as_teacher_with_transformers(self, prompts: list[list[int]]) -> list[list[int]]:
        settings = self._reasoning_settings
        config = copy.deepcopy(self.generation_config)
        config.update(
            max_new_tokens=settings["max_tokens"],
            min_p=None,
            **{k: settings[k] for k in ("temperature", "top_p", "top_k")},
        )
        size, completions, device = self.args.per_device_train_batch_size, [], self.accelerator.device
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            self._as_teacher(self.model_wrapped, "rationalization"),
            self._rollout_settings(),
            unwrap_model_for_generation(
                self.model,
                self.accelerator,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
        ):
            # Not from the generator of the rollouts, which are not to depend on what the cache had
            torch.manual_seed(hash((self.args.seed, self.state.global_step, self.accelerator.process_index)) % 2**63)
            # Under ZeRO-3 and FSDP each call takes all processes: those with fewer prompts repeat something short.
            num_calls = max(gather_object([math.ceil(len(prompts) / size)]))
            for start in range(0, num_calls * size, size):
                ids, mask = self.data_collator.pad_prompts(prompts[start : start + size] or [self._end_ids[:1]])
                inputs = send_to_device({"prompts": ids, "prompt_attention_mask": mask}, device)
                token_ids, _, labels, *_ = self.generate_on_policy_outputs(model, inputs, config)
                completions += self._completions_of(inputs | {"input_ids": token_ids, "labels": labels})
        return [completion.tolist() for completion in completions[: len(prompts)]]

    def _pair_completions(
        self, batch: dict[str, Any], completions: list[Tensor], logprobs: list[Tensor] | None = None
    ) -> dict[str, Any]:
        """
        Put the sampled token ids beside the prompts of both roles, without the padding that all rows share.

        Args:
            batch: from the collator.
            completions: token ids of each row, (tokens,).
            logprobs: what the sampler gave them, (tokens,), where it says so.

        Returns:
            `prompts`, `teacher_prompts` and their `_attention_mask`s, left-padded; `completion_ids`, `completion_mask`,
            `loss_mask` (the tokens that count) and, with `logprobs`, `rollout_logprobs`, right-padded, (batch, longest
            completion); `answer`, a list; and what `Lessons` and `_draw_problems` have put into the batch.
        """
        inputs: dict[str, Any] = {}
        for role in ("", "teacher_"):
            mask = batch[f"{role}prompt_attention_mask"]
            width = mask.sum(1).max()
            inputs[f"{role}prompts"] = batch[f"{role}prompts"][:, -width:]
            inputs[f"{role}prompt_attention_mask"] = mask[:, -width:]
        inputs["completion_ids"] = pad(completions, padding_value=self.processing_class.pad_token_id)
        inputs["completion_mask"] = pad([torch.ones_like(ids, dtype=torch.bool) for ids in completions], False)
        inputs["loss_mask"] = inputs["completion_mask"].clone()
        inputs["loss_mask"][:, : self.args.num_loss_tokens_to_skip] = False
        if logprobs is not None:
            inputs["rollout_logprobs"] = pad(logprobs, padding_value=0.0)
        inputs["answer"] = batch.get("answer", [None] * len(completions))
        further = ("weights", "advantages", "correct", "rationalization", "rows")
        return inputs | {name: batch[name] for name in further if name in batch}

    def _weigh_tokens(self) -> None:
        """
        The mean's denominator: the number of tokens of the optimizer step over all processes, each times its weight. The
        reward's mean is over all tokens. What has neither weight nor advantage is taken out of the loss.
        """
        counts = [inputs["loss_mask"].sum(1) for inputs in self._buffered_inputs]  # (batch,) each
        weighted = [
            (number * inputs["weights"]).sum() if "weights" in inputs else number.sum()
            for number, inputs in zip(counts, self._buffered_inputs, strict=True)
        ]
        totals = torch.stack([sum(number.sum() for number in counts), sum(weighted)]).float()
        totals = self.accelerator.gather(totals.unsqueeze(0)).sum(0)
        if totals[1] == 0.0:
            logger.warning(
                "step %d: no token counts in the divergence (see references/none_ratio and rollouts/correct_ratio)",
                self.state.global_step + 1,
            )
        num_tokens, self._loss_denominator = torch.where(totals > 0.0, totals, 1.0)
        for inputs in self._buffered_inputs:
            if "weights" not in inputs:
                continue
            counts_at_all = inputs["weights"] > 0.0
            if "advantages" in inputs:
                inputs["advantages"] *= self.args.reward_weight * self._loss_denominator / num_tokens
                counts_at_all |= inputs["advantages"] != 0.0
            inputs["loss_mask"] &= counts_at_all.unsqueeze(1)

    def _save_completions(self, lengths: list[int], truncated: list[bool]) -> None:
        """Write the step's rollouts of all processes; a resumed run writes the steps that it repeats anew."""
        step = self.state.global_step + 1
        texts = [text for logs in self._buffered_text_logs for text in zip(*logs, strict=True)]
        of_lessons = [name for name in ("correct", "rationalization") if name in self._buffered_inputs[0]]
        columns = ("prompt", "completion", "num_tokens", "truncated", "answer", *of_lessons)
        listed = [
            [value for inputs in self._buffered_inputs for value in inputs[name]] for name in ("answer", *of_lessons)
        ]
        records = gather_object(
            [
                {"step": step} | dict(zip(columns, (*text, *values), strict=True))
                for text, *values in zip(texts, lengths, truncated, *listed, strict=True)
            ]
        )
        if self.accelerator.is_main_process:
            path = Path(self.args.output_dir, "completions", f"completions_{step:05d}.jsonl")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")

    # Loss

    def _model_inputs(self, inputs: dict[str, Tensor], role: str) -> dict[str, Tensor]:
        """The completions behind the prompts of one role: "" for the student, "teacher_" for the teacher."""
        attention_mask = torch.cat([inputs[f"{role}prompt_attention_mask"], inputs["completion_mask"].long()], dim=1)
        return {
            "input_ids": torch.cat([inputs[f"{role}prompts"], inputs["completion_ids"]], dim=1),
            "attention_mask": attention_mask,
            "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),  # as without the padding on the left
        }

    def _completion_logits(self, model: nn.Module, inputs: dict[str, Tensor], role: str) -> Tensor:
        """(N, V): logits that predict the tokens that count (`loss_mask`), in the same order for both roles."""
        keep = inputs["completion_ids"].shape[1] + 1
        outputs = model(**self._model_inputs(inputs, role), logits_to_keep=keep, use_cache=False)
        return outputs.logits[:, :-1][inputs["loss_mask"]]

    def _completion_hidden_states(self, policy: nn.Module, inputs: dict[str, Tensor], role: str) -> Tensor:
        """(N, H): what the language model's head turns into `_completion_logits`; call it inside the wrapped forward."""
        with self.accelerator.autocast():
            backbone = _causal_lm(policy).base_model
            hidden_states = backbone(**self._model_inputs(inputs, role), use_cache=False).last_hidden_state
        return hidden_states[:, -inputs["completion_ids"].shape[1] - 1 : -1][inputs["loss_mask"]]

    def _dense_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> TokenLosses:
        """The reference, from the full logits of both roles."""
        with self._as_teacher(model):
            teacher_logits = self._completion_logits(model, inputs, "teacher_")  # (N, V)
        student_logits = self._completion_logits(model, inputs, "")  # (N, V)
        token_ids = inputs["completion_ids"][inputs["loss_mask"]]
        return dense_token_losses(
            student_logits, teacher_logits, token_ids, self._objective, **self._token_weights(inputs)
        )

    def _fused_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> TokenLosses:
        """
        The same from the hidden states of both roles.

        Both passes go through the wrapped model's forward, so that DDP, ZeRO and FSDP do there what they have to.
        """
        policy = self.accelerator.unwrap_model(model)
        with self._as_teacher(model):
            teacher = self._forward_redirection(model, policy, self._teacher_hidden_states, policy, inputs)
        return self._forward_redirection(model, policy, self._fused_student_loss, policy, inputs, *teacher)

    def _teacher_hidden_states(self, policy: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """(N, H), and the teacher's head (V, H) where it is another one than the student's."""
        hidden_states = self._completion_hidden_states(policy, inputs, "teacher_")
        weight = _causal_lm(policy).get_output_embeddings().weight
        if self._teacher_weights is None or not weight.requires_grad:
            return hidden_states, None
        with maybe_gather_lm_head_ctx(weight):
            return hidden_states, weight.full_tensor() if isinstance(weight, DTensor) else weight.detach().clone()

    def _fused_student_loss(
        self, policy: nn.Module, inputs: dict[str, Tensor], teacher_hidden: Tensor, teacher_weight: Tensor | None
    ) -> TokenLosses:
        student_hidden = self._completion_hidden_states(policy, inputs, "")  # (N, H)
        token_ids = inputs["completion_ids"][inputs["loss_mask"]]  # (N,)
        weight = _causal_lm(policy).get_output_embeddings().weight  # (V, H)
        with maybe_gather_lm_head_ctx(weight):
            return fused_token_losses(
                student_hidden,
                teacher_hidden,
                weight.full_tensor() if isinstance(weight, DTensor) else weight,
                token_ids,
                self._objective,
                teacher_lm_head_weight=teacher_weight,
                head=self._head_settings,
                chunk_size=self.args.loss_chunk_size,
                **self._token_weights(inputs),
            )

    def _token_weights(self, inputs: dict[str, Tensor]) -> dict[str, Tensor | None]:
        mask = inputs["loss_mask"]
        weights, advantages = (
            inputs[name].unsqueeze(1).expand_as(mask)[mask] if name in inputs else None
            for name in ("weights", "advantages")
        )
        sampler_logprobs = inputs["rollout_logprobs"][mask] if "rollout_logprobs" in inputs else None
        return {"weights": weights, "advantages": advantages, "sampler_logprobs": sampler_logprobs}

    @property
    def _objective(self) -> Objective:
        return Objective(
            beta=self.beta,
            temperature=self.args.loss_temperature,
            clip=self.args.jsd_token_clip or None,
            clip_mode=self.args.jsd_clip_mode,
            top_k=self.args.top_k_loss or None,
            top_k_support=self.args.top_k_loss_of,
            top_k_add_tail=self.args.top_k_loss_tail,
            sampled_token=self.args.use_tinker_loss,
            sampled_token_clip=self.args.sampled_token_clip or None,
            policy_gradient_weight=self.args.reward_weight,
            importance_sampling_correction=self.args.importance_correction,
        )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch=None
    ) -> Tensor:
        """The micro-batch's share of the loss: its sum over the denominator of the optimizer step's weighted mean."""
        loss_of_tokens = self._fused_loss if self.args.loss_implementation == "fused" else self._dense_loss
        per_token, statistics, logprobs = loss_of_tokens(model, inputs)  # (N,)
        # DDP, ZeRO and FSDP average the gradients of the processes
        loss = per_token.sum() * self.accelerator.num_processes / self._loss_denominator
        if self.model.training and not loss.isfinite():
            micro_batch = (self._step - 1) % self.args.gradient_accumulation_steps
            self._nonfinite_losses[micro_batch] = per_token.detach()
            return loss * math.nan  # an infinite loss may have a finite gradient; `_get_grad_norm` must see this one

        self._record_tokens(inputs, statistics, logprobs)
        return loss

    def _record_tokens(self, inputs: dict[str, Tensor], statistics: TokenStatistics, logprobs: Tensor | None) -> None:
        """Add a micro-batch to what is logged, and to what the curriculum is told."""
        mode = "train" if self.model.training else "eval"
        mask = inputs["loss_mask"]
        counts = torch.ones_like(statistics.divergence, dtype=torch.bool)  # (N,)
        if "weights" in inputs:  # not what counts for the reward alone
            counts = (inputs["weights"] > 0.0).unsqueeze(1).expand_as(mask)[mask]
        is_first = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)[mask] < NUM_FIRST_TOKENS
        is_first &= counts
        sums = {name: value[counts].sum(dtype=torch.float64) for name, value in statistics._asdict().items()}
        vocab_size = self.model.config.get_text_config().vocab_size
        sums |= {"num_tokens": counts.sum(), "num_summands": counts.sum() * self._objective.num_summands(vocab_size)}
        sums["num_first"] = is_first.sum()
        sums["first_divergence"] = statistics.divergence[is_first].sum(dtype=torch.float64)
        if logprobs is not None and len(logprobs) > 0:
            gap = logprobs - inputs["rollout_logprobs"][mask]
            sums["num_sampled"] = mask.sum()
            if self.args.importance_correction:
                ratios = gap.double().exp()
                sums |= {"ratio": ratios.sum(), "squared_ratio": ratios.square().sum()}
            else:
                sums["gap"] = gap.abs().sum(dtype=torch.float64)
                self._max_logprob_gap[mode] = torch.maximum(self._max_logprob_gap[mode], gap.abs().max())
        self._add(mode, **sums)
        if self.curriculum is not None and self.args.curriculum == "divergence" and mode == "train":
            row_of_token = mask.nonzero()[counts, 0]
            numbers = torch.bincount(row_of_token, minlength=len(mask))
            divergences = torch.bincount(row_of_token, statistics.divergence[counts].double(), len(mask))
            values = zip(inputs["rows"], divergences.tolist(), numbers.tolist(), strict=True)
            self._shown += [value for value in values if value[2] > 0]

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch=None) -> Tensor:
        with self._timed("step"):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            seconds, self._seconds = self._seconds, defaultdict(float)
            seconds["student"] = seconds.pop("step")  # what is left of it: forward, loss and backward
            for phase in ("rollout", "teacher", "student") + ("rationalization",) * self.args.reason_first:
                self._metrics["train"][f"seconds/{phase}"].append(seconds[phase])
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float:
        """
        The gradient's norm over all processes, right before the optimizer's step, which is skipped if it is not finite.

        Raises:
            FloatingPointError: for the `max_nonfinite_steps`th such step in a row.
        """
        grad_norm = super()._get_grad_norm(model, grad_norm)
        losses, self._nonfinite_losses = self._nonfinite_losses, {}
        # In float16 the loss scaler skips such steps itself, and meets them all the time.
        if math.isfinite(grad_norm) or self.accelerator.mixed_precision == "fp16":
            self._num_skipped_in_a_row = 0
            return grad_norm
        model.zero_grad()  # without a gradient, weights and moments stay as they are; DeepSpeed has left them by itself
        step = self.state.global_step + 1
        path = Path(self.args.output_dir, "nonfinite", f"step_{step:05d}_process_{self.accelerator.process_index}.pt")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"step": step, "inputs": self._buffered_inputs, "loss_of_tokens": losses}, path)
        logger.error("step %d: loss or gradient not finite; the step is skipped, its batch kept in %s", step, path)
        self._count("num_nonfinite_steps", 1)
        self._num_skipped_in_a_row += 1
        if self._num_skipped_in_a_row >= self.args.max_nonfinite_steps:
            raise FloatingPointError(
                f"loss or gradient not finite in {self._num_skipped_in_a_row} steps in a row, up to step {step}; their "
                f"batches are in {path.parent}. Look at them, lower --learning_rate, or raise --max_nonfinite_steps; "
                "--resume_from_checkpoint true goes on from the last complete checkpoint"
            )
        return grad_norm

    # Logging

    @property
    def _saved(self) -> dict[str, Any]:
        """What checkpoints hold of the run beside the trainer's own state, so that a resumed run goes on from there."""
        return self.state.stateful_callbacks.setdefault("OPSDTrainer", {})

    def _count(self, name: str, number: int) -> None:
        self._saved[name] = self._saved.get(name, 0) + number

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """
        Add the seconds that the block takes on this process, what it started on the accelerator included; those of phases
        within it are theirs.
        """
        start, of_others = time.perf_counter(), sum(self._seconds.values())
        yield
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)
        if self.model.training:
            of_others -= sum(self._seconds.values())
            self._seconds[phase] += time.perf_counter() - start + of_others

    def _add(self, mode: str, **values: Tensor | float) -> None:
        """Add to the sums that are logged."""
        sums = self._sums[mode]
        for name, value in values.items():
            sums[name] = sums.get(name, 0) + value

    def _take_sums(self, mode: str) -> dict[str, float]:
        """The sums since they were last taken, over all processes; 0 for what nobody added to."""
        totals: dict[str, float] = defaultdict(float)
        for sums in gather_object([{name: float(value) for name, value in self._sums[mode].items()}]):
            for name, value in sums.items():
                totals[name] += value
        self._sums[mode] = {}
        return totals

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was summed up since the last log, over all processes, to what is logged."""
        mode = "train" if self.model.training else "eval"
        self._on_policy_step_equiv = 0.0  # GOLD would repeat the loss under a second name
        if lengths := self._lengths[mode]:
            sums = self._take_sums(mode)
            num_tokens = max(sums["num_tokens"], 1.0)
            values = {
                "divergence": sums["divergence"] / num_tokens,
                "clip/entries_ratio": sums["clipped_entries"] / max(sums["num_summands"], 1.0),
                "clip/mass_ratio": sums["clipped_mass"] / sums["positive_mass"] if sums["positive_mass"] else 0.0,
                "clip/reversed_ratio": sums["wrong_way"] / num_tokens,
                "entropy/student": sums["student_entropy"] / num_tokens,
                "entropy/teacher": sums["teacher_entropy"] / num_tokens,
                "completions/mean_length": sum(lengths) / len(lengths),
                "completions/min_length": min(lengths),
                "completions/max_length": max(lengths),
                "completions/truncated_ratio": sum(self._truncated[mode]) / len(lengths),
            }
            if sums["num_first"] > 0:
                values["divergence/first_tokens"] = sums["first_divergence"] / sums["num_first"]
            if self.args.importance_correction:
                mean = sums["ratio"] / max(sums["num_sampled"], 1.0)
                values |= {
                    "importance/mean": mean,
                    "importance/variance": max(sums["squared_ratio"] / max(sums["num_sampled"], 1.0) - mean**2, 0.0),
                }
            elif self.rollouts is not None:
                values["rollout_logprob_gap"] = sums["gap"] / max(sums["num_sampled"], 1.0)
                values["rollout_logprob_gap_max"] = self.accelerator.gather(self._max_logprob_gap[mode]).max().item()
                self._max_logprob_gap[mode].zero_()
            numbers = {name.removesuffix("/number"): value for name, value in sums.items() if name.endswith("/number")}
            values |= {name: sums[name] / number for name, number in numbers.items() if number}
            if self.curriculum is not None and mode == "train":
                values |= self.curriculum.metrics()
            if mode == "train":
                counts = ("num_generated_tokens", "num_nonfinite_steps")
                counts += ("num_rationalization_tokens",) * self.args.reason_first
                values |= {name: self._saved.get(name, 0) for name in counts}
            self._metrics[mode].update({name: [value] for name, value in values.items()})
            self._lengths[mode], self._truncated[mode] = [], []
        super().log(logs, start_time)
