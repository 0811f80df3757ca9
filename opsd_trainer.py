"""On-policy self-distillation: one model samples as student and teaches itself as teacher (arXiv 2601.18734)."""

import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl.import_utils import is_vllm_available
from trl.models.utils import _ForwardRedirection
from trl.trainer.utils import (
    global_then_local_main_first,
    maybe_gather_lm_head_ctx,
    pad,
    split_tensor_dict,
)

from checkpoints import CompleteCheckpoints
from data_collator import STUDENT_PROMPT, TEACHER_PROMPT, SelfDistillationDataCollator, check_template
from frozen_weights import FrozenWeights
from opsd_loss import (
    CLIP_MODES,
    TOP_K_OF,
    TokenStatistics,
    fused_linear_jsd,
    fused_linear_logprobs,
    fused_linear_sampled_token_loss,
    generalized_jsd,
    sampled_token_loss,
)
from rollouts import OnPolicyGeneration, check_servable
from sharded_weights import local_part
from teacher_weights import TeacherWeights

logger = logging.getLogger(__name__)

LOSS_IMPLEMENTATIONS = ("fused", "dense")
NUM_FIRST_TOKENS = 4  # of a completion, whose divergence is logged by itself: roles in different forms disagree there


@dataclass
class OPSDConfig(GOLDConfig):
    """
    Settings of `OPSDTrainer`, on top of those of TRL's `GOLDConfig`. Those of sampling and loss default to the release's.

    Raises:
        ValueError: for settings outside their range or against each other, naming the flags and the way out.
    """

    output_dir: str | None = field(default="outputs", metadata={"help": "Folder of the run, or of the runs."})
    learning_rate: float = field(default=5e-6, metadata={"help": "Initial learning rate of AdamW."})
    max_grad_norm: float = field(default=0.1, metadata={"help": "Maximum norm of the gradient."})
    lmbda: float = field(default=1.0, metadata={"help": "Share of on-policy rollouts. OPSD is on-policy: always 1."})
    beta: float = field(
        default=0.0,
        metadata={
            "help": "0: KL(teacher||student), 1: KL(student||teacher), between: generalized JSD (0.5 in paper v1)."
        },
    )
    temperature: float = field(
        default=1.1,
        metadata={"help": "Temperature of the rollouts and, unless --loss_temperature says otherwise, of the loss."},
    )
    loss_temperature: float | None = field(
        default=None, metadata={"help": "Temperature of both softmaxes in the loss; by default --temperature."}
    )
    top_p: float = field(default=0.95, metadata={"help": "Nucleus of the rollouts; 1 switches it off."})
    top_k: int = field(default=20, metadata={"help": "Top-k of the rollouts; 0 switches it off."})
    min_p: float = field(
        default=0.0, metadata={"help": "Least probability of a token, relative to the most probable one; 0: off."}
    )
    presence_penalty: float = field(
        default=0.0, metadata={"help": "Of the rollouts, with --use_vllm: taken off tokens that came before; 0: off."}
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.6, metadata={"help": "Share of a GPU's memory for the colocated vLLM engine."}
    )
    vllm_adapter_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder through which adapters reach vLLM; by default in memory. With --vllm_mode server on another "
            "machine: one that both see."
        },
    )
    max_length: int | None = field(
        default=20000,
        metadata={"help": "Prompt and completion together, in tokens. Longer solutions are cut in their middle."},
    )
    max_completion_length: int = field(default=1024, metadata={"help": "Tokens of a rollout at most."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave off: the collator picks its columns."})

    fixed_teacher: bool = field(
        default=False,
        metadata={
            "help": "The teacher is the initial policy: the same model with its LoRA adapter off or, without --use_peft "
            "and for an adapter that is trained already, a copy of the weights. Otherwise it is the current policy."
        },
    )
    use_ema_teacher: bool = field(
        default=False,
        metadata={
            "help": "The teacher is an exponential moving average of the trained weights from their start, kept in float32; "
            "under LoRA of both factors, each by itself."
        },
    )
    ema_decay: float = field(
        default=0.999,
        metadata={
            "help": "With --use_ema_teacher: teacher = decay x teacher + (1 - decay) x student, at each update."
        },
    )
    ema_update_steps: int = field(
        default=1,
        metadata={
            "help": "With --use_ema_teacher: optimizer steps between two updates. With --ema_decay 0 the teacher is the "
            "student as it was at the last of them."
        },
    )
    teacher_sees_solution: bool = field(
        default=True,
        metadata={"help": "False gives the teacher the student's prompt: a control that must not learn anything."},
    )
    student_thinking: bool = field(default=False, metadata={"help": "Thinking mode in the student's prompt."})
    teacher_thinking: bool = field(default=True, metadata={"help": "Thinking mode in the teacher's prompt."})
    teacher_prefill: str = field(
        default="",
        metadata={
            "help": "Text at the end of the teacher's prompt, behind the assistant's header, such as '<think>\\n' for a thinking "
            "teacher of a student without thinking mode: the completion then counts as its thoughts."
        },
    )
    num_loss_tokens_to_skip: int = field(
        default=0,
        metadata={"help": "First tokens of each completion that do not count: there thinking modes differ in form."},
    )
    student_prompt: str = field(
        default=STUDENT_PROMPT, metadata={"help": "Template of the student's prompt, with {problem}."}
    )
    teacher_prompt: str = field(
        default=TEACHER_PROMPT, metadata={"help": "Template of the teacher's prompt, with {problem} and {solution}."}
    )
    jsd_token_clip: float = field(
        default=0.05,
        metadata={"help": "Cap on each (token, vocabulary entry) summand of the divergence, in nats; 0: no cap."},
    )
    jsd_clip_mode: str = field(
        default="pointwise",
        metadata={
            "help": "pointwise: cap each summand, as the release does. token: cap each token's sum; beyond it there is no "
            "gradient. scale: the same value, with the gradient scaled down and not cut off.",
            "choices": CLIP_MODES,
        },
    )
    top_k_loss: int = field(
        default=0, metadata={"help": "Divergence over the teacher's k most probable entries only; 0: full vocabulary."}
    )
    top_k_loss_of: str = field(
        default="teacher",
        metadata={"help": "With --top_k_loss: whose most probable entries; both: the union.", "choices": TOP_K_OF},
    )
    top_k_loss_tail: bool = field(
        default=False,
        metadata={
            "help": "With --top_k_loss: one more entry for all the others, in place of renormalizing: a true divergence."
        },
    )
    sampled_token_clip: float = field(
        default=0.0,
        metadata={"help": "With --use_tinker_loss: cap on the advantage |log p_teacher - log p_student|; 0: none."},
    )
    loss_implementation: str = field(
        default="fused",
        metadata={
            "help": "fused: the loss straight from the hidden states, without the full logits. dense: the reference.",
            "choices": LOSS_IMPLEMENTATIONS,
        },
    )
    loss_chunk_size: int | None = field(
        default=None, metadata={"help": "Tokens at a time in the fused loss; by default chosen from the free memory."}
    )
    use_tinker_loss: bool = field(
        default=False,
        metadata={
            "help": "Policy gradient on the sampled tokens (paper eq. 9) in place of the full divergence; beta, clip and "
            "top_k_loss then shape what is logged only."
        },
    )
    max_nonfinite_steps: int = field(
        default=3,
        metadata={
            "help": "Stop after so many steps in a row with a loss or gradient that was not finite; each is skipped."
        },
    )
    log_completions_steps: int = field(
        default=10, metadata={"help": "With --log_completions: show rollouts at logging steps that this divides."}
    )
    num_completions_to_print: int | None = field(
        default=4, metadata={"help": "With --log_completions: how many rollouts to show."}
    )
    save_completions: bool = field(
        default=True, metadata={"help": "Keep the rollouts: OUTPUT_DIR/completions/completions_STEP.jsonl."}
    )

    def __post_init__(self):
        for flag, valid, requirement in (
            ("lmbda", self.lmbda == 1.0, "be 1: OPSD learns from the student's own rollouts only"),
            ("beta", 0.0 <= self.beta <= 1.0, "lie in [0, 1]: 0 forward KL, 1 reverse KL, 0.5 JSD"),
            ("temperature", self.temperature > 0.0, "be positive, since it also divides the logits in the loss"),
            (
                "loss_temperature",
                self.loss_temperature is None or self.loss_temperature > 0.0,
                "be positive, since it divides the logits",
            ),
            (
                "num_loss_tokens_to_skip",
                0 <= self.num_loss_tokens_to_skip < self.max_completion_length,
                f"lie in [0, {self.max_completion_length}), --max_completion_length",
            ),
            ("top_p", 0.0 < self.top_p <= 1.0, "lie in (0, 1]; 1 switches it off"),
            ("top_k", self.top_k >= 0, "not be negative; 0 switches it off"),
            ("min_p", 0.0 <= self.min_p < 1.0, "lie in [0, 1); 0 switches it off"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "lie in [-2, 2]; 0 switches it off"),
            (
                "presence_penalty",
                self.use_vllm or self.presence_penalty == 0.0,
                "be 0 without --use_vllm: transformers has no presence penalty",
            ),
            (
                "use_vllm",
                not self.use_vllm or is_vllm_available(),
                "be left out: there is no vLLM of a version that TRL supports; scripts/setup_env.sh installs one",
            ),
            ("vllm_mode", self.vllm_mode in ("colocate", "server"), "be colocate or server"),
            (
                "vllm_sync_frequency",
                self.vllm_sync_frequency == 1,
                "be 1: each rollout comes from the present student",
            ),
            ("vllm_structured_outputs_regex", self.vllm_structured_outputs_regex is None, "stay unset"),
            (
                "use_ema_teacher",
                not (self.use_ema_teacher and self.fixed_teacher),
                "be left out with --fixed_teacher: choose one teacher",
            ),
            ("ema_decay", 0.0 <= self.ema_decay < 1.0, "lie in [0, 1); for a teacher that stays, --fixed_teacher"),
            ("ema_update_steps", self.ema_update_steps >= 1, "be at least 1"),
            ("max_nonfinite_steps", self.max_nonfinite_steps >= 1, "be at least 1"),
            ("jsd_token_clip", self.jsd_token_clip >= 0.0, "not be negative; 0 switches the cap off"),
            ("jsd_clip_mode", self.jsd_clip_mode in CLIP_MODES, f"be one of {', '.join(CLIP_MODES)}"),
            ("top_k_loss", self.top_k_loss >= 0, "not be negative; 0 takes the full vocabulary"),
            ("top_k_loss_of", self.top_k_loss_of in TOP_K_OF, f"be one of {', '.join(TOP_K_OF)}"),
            ("top_k_loss_tail", self.top_k_loss > 0 or not self.top_k_loss_tail, "go with --top_k_loss"),
            ("sampled_token_clip", self.sampled_token_clip >= 0.0, "not be negative; 0 switches the cap off"),
            (
                "loss_implementation",
                self.loss_implementation in LOSS_IMPLEMENTATIONS,
                f"be one of {', '.join(LOSS_IMPLEMENTATIONS)}",
            ),
            ("loss_chunk_size", self.loss_chunk_size is None or self.loss_chunk_size >= 1, "be at least 1"),
            ("max_completion_length", self.max_completion_length >= 1, "be at least 1"),
            ("seq_kd", not self.seq_kd, "stay off: there is no off-policy part"),
            ("use_uld_loss", not self.use_uld_loss, "stay off: both roles share one tokenizer"),
            ("remove_unused_columns", not self.remove_unused_columns, "stay off: the collator picks its columns"),
            (
                "teacher_model_name_or_path",
                self.teacher_model_name_or_path is None,
                "stay unset: the model is its own teacher",
            ),
        ):
            if not valid:
                raise ValueError(f"--{flag} {getattr(self, flag)}: must {requirement}")
        if self.max_length is not None and self.max_completion_length >= self.max_length:
            raise ValueError(
                f"--max_completion_length {self.max_completion_length} leaves no room for a prompt in --max_length "
                f"{self.max_length}; lower the first or raise the second"
            )
        check_template("student_prompt", self.student_prompt, {"problem"})
        check_template("teacher_prompt", self.teacher_prompt, {"problem", "solution"})
        if self.loss_temperature is None:
            self.loss_temperature = self.temperature
        super().__post_init__()


class _NoTeacherModel(nn.Module):
    """Takes the place of the second model that GOLD's constructor asks for, with the one weight that ZeRO-3 asks for."""

    config = PreTrainedConfig()

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1), requires_grad=False)

    def resize_token_embeddings(self, *args: Any) -> None:
        pass


class _TeacherCallback(TrainerCallback):
    """When the teacher gets its weights, and when it follows the student."""

    def __init__(self, trainer: "OPSDTrainer"):
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._start_teacher()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._update_teacher()


def _causal_lm(policy: nn.Module) -> PreTrainedModel:
    """The language model itself, whose modules an adapter, if there is one, has been put into."""
    return policy.get_base_model() if isinstance(policy, PeftModel) else policy


def read_head_settings(causal_lm: PreTrainedModel) -> dict[str, float | None]:
    """
    What the model does to its head's output on the way to the logits, as arguments of the fused losses.

    Raises:
        ValueError: for a head that the fused losses cannot do.
    """
    head = causal_lm.get_output_embeddings()
    config = causal_lm.config.get_text_config()
    if type(head) is not nn.Linear or head.bias is not None:
        raise ValueError(
            f"--loss_implementation fused needs a plain linear head without bias, not {type(head).__name__} (an adapter "
            "on it, --lora_modules_to_save lm_head, a bias?); choose --loss_implementation dense"
        )
    factors = [getattr(config, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")]
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        factors.append(divisor if config.model_type == "hyperclovax" else 1.0 / divisor)
    scale = next((factor for factor in factors if factor is not None), 1.0)
    return {"logit_scale": scale, "logit_softcap": getattr(config, "final_logit_softcapping", None)}


class OPSDTrainer(CompleteCheckpoints, GOLDTrainer):
    """
    Trains a model to match itself: the student's distribution, given the problem, follows the teacher's, which is
    also given the reference solution, at every token that the student samples.

    What differs from GOLD: there is no second model, the teacher has a prompt of its own, the loss has a clip and the
    denominator of the whole optimizer step. Sampling order, the rollout buffer and generation are inherited.

    Args:
        model: model, or its path or Hub id.
        args: settings.
        train_dataset, eval_dataset: rows with the texts `problem` and `solution`. Evaluation is on-policy too.
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
        self._head_settings: dict[str, float | None] = {}
        if args.loss_implementation == "fused":
            self._head_settings = read_head_settings(_causal_lm(self.accelerator.unwrap_model(self.model)))
        self._num_loss_tokens: Tensor | None = None  # of the running optimizer step, over all processes
        self._frozen_weights: FrozenWeights | None = None  # as they were when training began
        # Whether the teacher is the model with its adapter off, as at the start an adapter is that was not trained yet.
        self.teacher_is_base = args.fixed_teacher and isinstance(self.model, PeftModel) and not self._is_trained()
        self._teacher_weights: TeacherWeights | None = None  # of a teacher that is neither the base nor the student
        self._resumed_from: str | None = None
        self.add_callback(_TeacherCallback(self))
        self._nonfinite_losses: dict[int, Tensor] = {}  # of the running step, by micro-batch: the loss of each token
        self._num_skipped_in_a_row = 0
        # Since the last log, or in the running evaluation
        self._token_sums = {mode: self._zero_sums() for mode in ("train", "eval")}
        self._max_logprob_gap = {mode: torch.zeros((), device=self.accelerator.device) for mode in ("train", "eval")}
        self._lengths: dict[str, list[int]] = {"train": [], "eval": []}  # of the completions of all processes, tokens
        self._truncated: dict[str, list[bool]] = {"train": [], "eval": []}
        self._seconds: dict[str, float] = defaultdict(float)
        self.rollouts = self._start_rollouts() if use_vllm else None
        self._synced_step: int | None = None  # at which vLLM got its weights
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
        )

    def _prepare_dataset(self, dataset: Dataset, processing_class, args, packing, formatting_func, dataset_name: str):
        """Encode the prompts of both roles once; leave out what does not fit and say how much that is."""
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

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._resumed_from = checkpoint

    @contextmanager
    def _as_teacher(self, model: nn.Module) -> Iterator[None]:
        """Inside the block the model is the teacher: with its adapter off, with weights of its own, or as it is."""
        policy = self.accelerator.unwrap_model(model)
        trained = [weight for weight in policy.parameters() if weight.requires_grad]
        teacher = nullcontext()
        if self.teacher_is_base:
            teacher = policy.disable_adapter()
        elif self._teacher_weights is not None:
            teacher = self._teacher_weights.applied()
        with torch.no_grad(), self._timed("teacher"), teacher:
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
        if args.vllm_max_model_length is not None and args.vllm_max_model_length < longest:
            raise ValueError(
                f"--vllm_max_model_length {args.vllm_max_model_length}: the longest prompt needs {longest} tokens with "
                f"its completion; leave the flag out, or lower --max_length to drop long problems"
            )
        end_ids = self.generation_config.eos_token_id
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
                "stop_token_ids": [end_ids] if isinstance(end_ids, int) else end_ids,
            },
            seed=args.seed,
            adapter_dir=args.vllm_adapter_dir,
            engine_arguments={key: model_arguments[key] for key in ("revision",) if key in model_arguments},
        )

    def _fill_buffer(self, generation_batch: dict[str, Tensor], buffer_steps: int) -> None:
        """Sample the completions of a whole optimizer step and count its tokens over all processes."""
        with self._timed("rollout"):
            if self.rollouts is not None:
                self._sample_with_vllm(generation_batch, buffer_steps)
            else:
                with self._rollout_settings():
                    super()._fill_buffer(generation_batch, buffer_steps)
                self._buffered_inputs = [
                    self._pair_completions(rollout, self._completions_of(rollout)) for rollout in self._buffered_inputs
                ]
        lengths = torch.cat([inputs["completion_mask"].sum(1) for inputs in self._buffered_inputs])  # (rollouts,)
        truncated = torch.cat([self._is_truncated(inputs) for inputs in self._buffered_inputs])  # (rollouts,)
        counted = torch.cat([inputs["loss_mask"].sum(1) for inputs in self._buffered_inputs])  # (rollouts,)
        all_lengths, all_truncated, all_counted = self.accelerator.gather((lengths, truncated, counted))
        self._num_loss_tokens = all_counted.sum()

        mode = "train" if self.model.training else "eval"
        self._lengths[mode] += all_lengths.tolist()
        self._truncated[mode] += all_truncated.tolist()
        if mode == "train":
            self._count("num_generated_tokens", all_lengths.sum().item())
            if self.args.save_completions:
                self._save_completions(lengths.tolist(), truncated.tolist())

    @property
    def _saved(self) -> dict[str, Any]:
        """What checkpoints hold of the run beside the trainer's own state, so that a resumed run goes on from there."""
        return self.state.stateful_callbacks.setdefault("OPSDTrainer", {})

    def _count(self, name: str, number: int) -> None:
        self._saved[name] = self._saved.get(name, 0) + number

    def _sample_with_vllm(self, generation_batch: dict[str, Tensor], buffer_steps: int) -> None:
        """One call for the whole optimizer step, from the weights as they are now."""
        batches = split_tensor_dict(generation_batch, buffer_steps)
        prompts = [
            prompt[mask.bool()].tolist()
            for prompt, mask in zip(
                generation_batch["prompts"], generation_batch["prompt_attention_mask"], strict=True
            )
        ]
        if self.model.training or self._synced_step != self.state.global_step:
            self.rollouts.sync_weights()
            self._synced_step = self.state.global_step
        self.rollouts.step = self.state.global_step
        _, completions, logprobs, _ = self.rollouts.generate(prompts)
        device = generation_batch["prompts"].device
        completions = [torch.tensor(ids, dtype=torch.long, device=device) for ids in completions]
        # vLLM's NaN arrives as None
        logprobs = [
            torch.tensor([math.nan if value is None else value for (value,) in values], device=device)
            for values in logprobs
        ]
        decode = self.processing_class.batch_decode
        texts = list(zip(decode(prompts), decode(completions), strict=True))
        size = len(prompts) // buffer_steps
        self._buffered_inputs, self._buffered_text_logs = [], []
        self._buffered_on_policy = [True] * buffer_steps
        for start, batch in zip(range(0, len(prompts), size), batches, strict=True):
            rows = slice(start, start + size)
            self._buffered_inputs.append(self._pair_completions(batch, completions[rows], logprobs[rows]))
            self._buffered_text_logs.append(tuple(map(list, zip(*texts[rows], strict=True))))

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
            completion); `answer`, a list.
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
        return inputs

    def _is_truncated(self, inputs: dict[str, Tensor]) -> Tensor:
        """(batch,), true where a completion has tokens, and no end-of-sequence token among them."""
        completion_ids, mask = inputs["completion_ids"], inputs["completion_mask"]
        end_ids = torch.as_tensor(self.generation_config.eos_token_id, device=completion_ids.device)
        return mask.any(1) & ~(torch.isin(completion_ids, end_ids) & mask).any(1)

    def _save_completions(self, lengths: list[int], truncated: list[bool]) -> None:
        """Write the step's rollouts of all processes; a resumed run writes the steps that it repeats anew."""
        step = self.state.global_step + 1
        texts = [text for logs in self._buffered_text_logs for text in zip(*logs, strict=True)]
        answers = [answer for inputs in self._buffered_inputs for answer in inputs["answer"]]
        columns = ("prompt", "completion", "num_tokens", "truncated", "answer")
        records = gather_object(
            [
                {"step": step} | dict(zip(columns, (*text, *values), strict=True))
                for text, *values in zip(texts, lengths, truncated, answers, strict=True)
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

    def _dense_loss(
        self, model: nn.Module, inputs: dict[str, Tensor]
    ) -> tuple[Tensor, TokenStatistics, Tensor | None]:
        """
        The reference, from the full logits of both roles.

        Returns:
            Loss of each token (N,), its statistics and, where the sampler says what it gave it, the student's
            log-probability of it at temperature 1 (N,).
        """
        with self._as_teacher(model):
            teacher_logits = self._completion_logits(model, inputs, "teacher_")  # (N, V)
        student_logits = self._completion_logits(model, inputs, "")  # (N, V)
        per_token, statistics = generalized_jsd(
            student_logits, teacher_logits, **self._objective, return_statistics=True
        )
        token_ids = inputs["completion_ids"][inputs["loss_mask"]]
        if self.args.use_tinker_loss:
            per_token = sampled_token_loss(
                student_logits,
                teacher_logits,
                token_ids,
                temperature=self.args.loss_temperature,
                clip=self.args.sampled_token_clip or None,
            )
        logprobs = None
        if "rollout_logprobs" in inputs:
            logprobs = -cross_entropy(student_logits.detach().float(), token_ids, reduction="none")
        return per_token, statistics, logprobs

    def _fused_loss(
        self, model: nn.Module, inputs: dict[str, Tensor]
    ) -> tuple[Tensor, TokenStatistics, Tensor | None]:
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
    ) -> tuple[Tensor, TokenStatistics, Tensor | None]:
        student_hidden = self._completion_hidden_states(policy, inputs, "")  # (N, H)
        token_ids = inputs["completion_ids"][inputs["loss_mask"]]  # (N,)
        weight = _causal_lm(policy).get_output_embeddings().weight  # (V, H)
        with maybe_gather_lm_head_ctx(weight):
            weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
            settings = self._head_settings | {"chunk_size": self.args.loss_chunk_size}
            logprobs = None
            if "rollout_logprobs" in inputs:
                logprobs = fused_linear_logprobs(student_hidden, weight, token_ids, **settings)
            settings |= {"teacher_lm_head_weight": teacher_weight, "return_statistics": True}
            if self.args.use_tinker_loss:
                per_token, statistics = fused_linear_sampled_token_loss(
                    student_hidden, teacher_hidden, weight, token_ids,
                    beta=self.beta, temperature=self.args.loss_temperature, clip=self.args.sampled_token_clip or None,
                    **settings,
                )  # fmt: skip
            else:
                per_token, statistics = fused_linear_jsd(
                    student_hidden, teacher_hidden, weight, **self._objective, **settings
                )
        return per_token, statistics, logprobs

    @property
    def _objective(self) -> dict[str, Any]:
        """Settings of the divergence. With `use_tinker_loss` it is only logged, and has no cap."""
        return {
            "beta": self.beta,
            "temperature": self.args.loss_temperature,
            "clip": None if self.args.use_tinker_loss else self.args.jsd_token_clip or None,
            "clip_mode": self.args.jsd_clip_mode,
            "top_k": None if self.args.use_tinker_loss else self.args.top_k_loss or None,
            "top_k_of": self.args.top_k_loss_of,
            "tail": self.args.top_k_loss_tail,
        }

    @property
    def _num_summands(self) -> int:
        """How many summands of a token's divergence the cap applies to; where two sets are united, at most."""
        if self.args.jsd_clip_mode != "pointwise":
            return 1
        top_k, is_union = self._objective["top_k"], self.args.top_k_loss_of == "both"
        if top_k is None:
            return self.model.config.get_text_config().vocab_size
        return top_k * (2 if is_union else 1) + self.args.top_k_loss_tail

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch=None
    ) -> Tensor:
        """The micro-batch's share of the loss: its sum over the mean's denominator, the tokens of the optimizer step."""
        loss_of_tokens = self._fused_loss if self.args.loss_implementation == "fused" else self._dense_loss
        per_token, statistics, logprobs = loss_of_tokens(model, inputs)  # (N,)
        # DDP, ZeRO and FSDP average the gradients of the processes
        loss = per_token.sum() * self.accelerator.num_processes / self._num_loss_tokens.clamp(min=1)
        if self.model.training and not loss.isfinite():
            micro_batch = (self._step - 1) % self.args.gradient_accumulation_steps
            self._nonfinite_losses[micro_batch] = per_token.detach()
            return loss * math.nan  # an infinite loss may have a finite gradient; `_get_grad_norm` must see this one

        mode = "train" if self.model.training else "eval"
        num_tokens = per_token.numel()
        gap = per_token.new_zeros(1)
        if logprobs is not None:
            gap = torch.cat([gap, (logprobs - inputs["rollout_logprobs"][inputs["loss_mask"]]).abs()])
        mask = inputs["loss_mask"]
        is_first = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)[mask] < NUM_FIRST_TOKENS  # (N,)
        sums = self._token_sums[mode]
        sums[:2] += sums.new_tensor([num_tokens, num_tokens * self._num_summands])
        values = (is_first, statistics.divergence * is_first, gap, *statistics)
        sums[2:] += torch.stack([value.sum(dtype=torch.float64) for value in values])
        self._max_logprob_gap[mode] = torch.maximum(self._max_logprob_gap[mode], gap.max())
        return loss

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch=None) -> Tensor:
        with self._timed("step"):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            seconds, self._seconds = self._seconds, defaultdict(float)
            for phase in ("rollout", "teacher"):
                self._metrics["train"][f"seconds/{phase}"].append(seconds[phase])
            student_seconds = seconds["step"] - seconds["rollout"] - seconds["teacher"]  # forward, loss and backward
            self._metrics["train"]["seconds/student"].append(student_seconds)
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

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Add the seconds that the block takes on this process, what it started on the accelerator included."""
        start = time.perf_counter()
        yield
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)
        if self.model.training:
            self._seconds[phase] += time.perf_counter() - start

    def _zero_sums(self) -> Tensor:
        """
        Sums over tokens: their number, that of the summands that the cap applies to, the number and the divergence of the
        first ones of completions, the distance of vLLM from the student, and `TokenStatistics`.
        """
        return torch.zeros(5 + len(TokenStatistics._fields), dtype=torch.float64, device=self.accelerator.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was summed up since the last log, over all processes, to what is logged."""
        mode = "train" if self.model.training else "eval"
        self._on_policy_step_equiv = 0.0  # GOLD would repeat the loss under a second name
        if lengths := self._lengths[mode]:
            sums = self.accelerator.reduce(self._token_sums[mode], "sum")
            num_tokens, num_entries = sums[:2].clamp(min=1).tolist()
            num_first, first_divergence, gap = sums[2:5].tolist()
            total = TokenStatistics(*sums[5:].tolist())
            values = {
                "divergence": total.divergence / num_tokens,
                "clip/entries_ratio": total.clipped_entries / num_entries,
                "clip/mass_ratio": total.clipped_mass / total.positive_mass if total.positive_mass else 0.0,
                "clip/reversed_ratio": total.reversed / num_tokens,
                "entropy/student": total.student_entropy / num_tokens,
                "entropy/teacher": total.teacher_entropy / num_tokens,
                "completions/mean_length": sum(lengths) / len(lengths),
                "completions/min_length": min(lengths),
                "completions/max_length": max(lengths),
                "completions/truncated_ratio": sum(self._truncated[mode]) / len(lengths),
            }
            if num_first > 0:
                values["divergence/first_tokens"] = first_divergence / num_first
            if self.rollouts is not None:
                values["rollout_logprob_gap"] = gap / num_tokens
                values["rollout_logprob_gap_max"] = self.accelerator.gather(self._max_logprob_gap[mode]).max().item()
                self._max_logprob_gap[mode].zero_()
            if mode == "train":
                values |= {name: self._saved.get(name, 0) for name in ("num_generated_tokens", "num_nonfinite_steps")}
            self._metrics[mode].update({name: [value] for name, value in values.items()})
            self._token_sums[mode], self._lengths[mode], self._truncated[mode] = self._zero_sums(), [], []
        super().log(logs, start_time)
