"""The settings of OPSD, on top of those of TRL's GOLD trainer, checked alone and against each other."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from data_collator import (
    REASONING_PROMPT,
    REFERENCE_ONLY_PROMPT,
    STUDENT_PROMPT,
    TEACHER_PROMPT,
    check_templates,
    placeholders,
)
from opsd.contexts import CONTEXTS, FALLBACKS, TEACHER_CONTEXTS, Context
from opsd.curriculum import CURRICULA
from opsd.grading import EXTRACT_METHODS, find_rule
from opsd.losses import CLIP_MODES, TOP_K_SUPPORTS, Objective
from opsd.token_weights import NAMES as TOKEN_WEIGHTS


@contextmanager
def _bare_package(name: str) -> Iterator[None]:
    """Put an empty package in the place of one of TRL, whose trainer and vLLM shall not be imported with a module."""
    if name in sys.modules:
        yield
        return
    root, *inner = name.split(".")
    sys.modules[name] = package = ModuleType(name)
    package.__path__ = [str(Path(import_module(root).__path__[0], *inner))]
    yield
    del sys.modules[name]


with _bare_package("trl.experimental.gold"):
    from trl.experimental.gold.gold_config import GOLDConfig

LOSS_IMPLEMENTATIONS = ("fused", "dense")
REASONING_GENERATION = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}  # Qwen3's own, without thinking mode

# flag -> its only value, and the reason
FIXED = {
    "lmbda": (1.0, "OPSD learns from the student's own rollouts only"),
    "seq_kd": (False, "there is no off-policy part"),
    "use_uld_loss": (False, "both roles share one tokenizer"),
    "remove_unused_columns": (False, "the collator picks its columns"),
    "vllm_sync_frequency": (1, "each rollout comes from the present student"),
    "vllm_structured_outputs_regex": (None, "rollouts are free text"),
}
# reason -> flags of TRL and transformers that must keep their default, since they would do nothing or harm
UNUSED = {
    "rollouts are not cut, and packed in one way (--packing)": (
        "packing_strategy", "eval_packing", "padding_free", "pad_to_multiple_of", "truncation_mode",
        "shuffle_dataset", "train_sampling_strategy", "length_column_name",
    ),
    "the collator makes the prompts, with the tokenizer of the model's folder": (
        "chat_template_path", "eos_token", "pad_token", "dataset_text_field", "dataset_kwargs",
        "completion_only_loss", "assistant_only_loss",
    ),
    "OPSD has a loss of its own": (
        "loss_type", "label_smoothing_factor", "router_aux_loss_coef", "use_liger_kernel", "liger_kernel_config",
    ),
    "noise would reach the teacher too": ("neftune_noise_alpha", "disable_dropout"),
    "OPSD calls parts of the model by themselves": (
        "torch_compile", "torch_compile_backend", "torch_compile_mode", "activation_offloading",
    ),
    "there is no second tokenizer, and a teacher model is loaded as the student is": (
        "teacher_model_init_kwargs", "teacher_tokenizer_name_or_path", "use_extended_uld",
        "uld_token_merge_strategy", "uld_use_hybrid_loss", "uld_hybrid_matched_weight", "uld_hybrid_unmatched_weight",
        "uld_crossentropy_weight", "uld_distillation_weight", "uld_student_temperature", "uld_teacher_temperature",
        "uld_skip_student_eos", "uld_skip_teacher_eos",
    ),
    "the batch would change in the middle of the run": ("auto_find_batch_size",),
    "the evaluation is the loss on rollouts, which have no labels": (
        "label_names", "batch_eval_metrics",
    ),
}  # fmt: skip
# flag -> its interval, and the meaning of an end point
INTERVALS = {
    "beta": ("[0, 1]", ": 0 forward KL, 1 reverse KL, 0.5 JSD"),
    "temperature": ("(0, inf)", ", since it also divides the logits in the loss"),
    "loss_temperature": ("(0, inf)", ", since it divides the logits"),
    "top_p": ("(0, 1]", "; 1 switches it off"),
    "top_k": ("[0, inf)", "; 0 switches it off"),
    "min_p": ("[0, 1)", "; 0 switches it off"),
    "presence_penalty": ("[-2, 2]", "; 0 switches it off"),
    "max_completion_length": ("[1, inf)", ""),
    "max_staleness": ("[0, 1]", ": rollouts are asked for at most one optimizer step ahead"),
    "ema_decay": ("[0, 1)", "; for a teacher that stays, --fixed_teacher"),
    "ema_update_steps": ("[1, inf)", ""),
    "max_reasoning_length": ("[1, inf)", ""),
    "correct_weight": ("[0, inf)", ""),
    "incorrect_weight": ("[0, inf)", ""),
    "policy_gradient_weight": ("[0, inf)", "; 0: no reward"),
    "jsd_token_clip": ("[0, inf)", "; 0 switches the cap off"),
    "sampled_token_clip": ("[0, inf)", "; 0 switches the cap off"),
    "top_k_loss": ("[0, inf)", "; 0 takes the full vocabulary"),
    "num_loss_tokens_to_skip": ("[0, inf)", ""),
    "loss_chunk_size": ("[1, inf)", ""),
    "max_tokens_per_micro_batch": ("[1, inf)", ""),
    "save_token_statistics": ("[0, inf)", "; 0 saves none"),
    "token_statistics_steps": ("[1, inf)", ""),
    "eval_accuracy_samples": ("[0, inf)", "; 0: none"),
}


def check_unused(settings: Any, unused: Mapping[str, Sequence[str]]) -> None:
    """Raise `ValueError` for settings of a dataclass that are not at their defaults. `unused`: reason -> names."""
    defaults = {setting.name: setting.default for setting in fields(settings)}
    for reason, flags in unused.items():
        for flag in flags:
            if (value := getattr(settings, flag)) != defaults[flag]:
                raise ValueError(f"--{flag} {value}: must be {defaults[flag]}: {reason}")


def _lies_in(value: float, interval: str) -> bool:
    """Return whether a value lies in an interval such as "[0, 1)"."""
    low, high = map(float, interval[1:-1].split(","))
    return (low < value or (low == value and interval[0] == "[")) and (
        value < high or (value == high and interval[-1] == "]")
    )


@dataclass
class OPSDConfig(GOLDConfig):
    """
    Settings of `OPSDTrainer`, on top of those of TRL's `GOLDConfig`. Those of sampling and loss default to the
    release's.

    Raises:
        ValueError: for settings outside their range or against each other, naming the flags and the way out.
    """

    _VALID_DICT_FIELDS = GOLDConfig._VALID_DICT_FIELDS + ["reasoning_generation_kwargs"]

    # Run and optimizer
    output_dir: str | None = field(default="outputs", metadata={"help": "Folder of the run, or of the runs."})
    learning_rate: float = field(default=5e-6, metadata={"help": "Initial learning rate of AdamW."})
    max_grad_norm: float = field(default=0.1, metadata={"help": "Maximum norm of the gradient."})
    log_completions_steps: int = field(
        default=10, metadata={"help": "With --log_completions: show rollouts at logging steps that this divides."}
    )
    num_completions_to_print: int | None = field(
        default=4, metadata={"help": "With --log_completions: number of rollouts to show."}
    )
    save_completions: bool = field(
        default=True, metadata={"help": "Keep the rollouts in OUTPUT_DIR/completions.jsonl."}
    )
    save_token_statistics: int = field(
        default=0,
        metadata={
            "help": "Number of training problems to sample apart from the rollouts, and to keep with the divergence "
            "of each token in OUTPUT_DIR/token_statistics, for inspect_run.py; 0: none."
        },
    )
    token_statistics_steps: int = field(
        default=10,
        metadata={"help": "With --save_token_statistics: number of optimizer steps between two such samples."},
    )
    eval_accuracy_samples: int = field(
        default=0,
        metadata={
            "help": "At each evaluation (--eval_strategy, --eval_dataset_name) and before the first step: completions "
            "of each held-out problem, sampled and graded as the rollouts are; 0: none. For the best checkpoint: "
            "--metric_for_best_model eval_accuracy --load_best_model_at_end."
        },
    )
    stop_on_collapse: bool = field(
        default=False,
        metadata={"help": "Save a checkpoint and end the run at the first sign of a collapse, which else only warns."},
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off."})
    lmbda: float = field(default=1.0, metadata={"help": "Share of on-policy rollouts. Must be 1: OPSD is on-policy."})

    # Rollouts
    temperature: float = field(
        default=1.1,
        metadata={"help": "Temperature of the rollouts. Also of the loss, unless --loss_temperature is given."},
    )
    top_p: float = field(default=0.95, metadata={"help": "Nucleus of the rollouts; 1 switches it off."})
    top_k: int = field(default=20, metadata={"help": "Top-k of the rollouts; 0 switches it off."})
    min_p: float = field(
        default=0.0,
        metadata={"help": "Smallest probability of a token, relative to the most probable one; 0 switches it off."},
    )
    presence_penalty: float = field(
        default=0.0,
        metadata={
            "help": "With --use_vllm: subtracted from the logits of tokens that came before; 0 switches it off."
        },
    )
    max_length: int | None = field(
        default=20000,
        metadata={"help": "Tokens of prompt and completion together. Longer solutions are cut in their middle."},
    )
    max_completion_length: int = field(default=1024, metadata={"help": "Maximum number of tokens of a rollout."})
    max_staleness: int = field(
        default=0,
        metadata={
            "help": "Optimizer steps by which the sampling weights may be older than those in training. 0: strictly "
            "on-policy. 1: with --vllm_mode server, which samples the next step's rollouts while the present step "
            "trains; for --beta 0, and for a policy gradient with importance weights."
        },
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.6, metadata={"help": "Share of a GPU's memory for the colocated vLLM engine."}
    )
    vllm_adapter_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder through which adapters reach a server (--vllm_mode server); by default in memory. For a "
            "server on another machine: a folder that both see."
        },
    )

    # Teacher
    fixed_teacher: bool = field(
        default=False,
        metadata={
            "help": "The teacher is the initial policy. With a fresh adapter that is the same model with its adapter "
            "off. Without --use_peft, and with --adapter_name_or_path, it is a copy of the weights. Without this flag "
            "the teacher is the current policy."
        },
    )
    use_ema_teacher: bool = field(
        default=False,
        metadata={
            "help": "The teacher is an exponential moving average of the trained weights, kept in float32. With LoRA "
            "both factors are averaged separately."
        },
    )
    ema_decay: float = field(
        default=0.999,
        metadata={"help": "With --use_ema_teacher: at each update, teacher = decay teacher + (1 - decay) student."},
    )
    ema_update_steps: int = field(
        default=1,
        metadata={
            "help": "With --use_ema_teacher: number of optimizer steps between two updates. With --ema_decay 0 the "
            "teacher is the student as it was at the last update."
        },
    )
    teacher_model_server_url: str | None = field(
        default=None,
        metadata={
            "help": "URL of a vLLM server of --teacher_model_name_or_path, such as http://host:8001. It scores the "
            "rollouts, and the model is not loaded here. It tells the --top_k_loss largest log-probabilities of each "
            "token; --top_k_loss_add_tail takes the others together."
        },
    )

    # Prompts
    student_prompt: str = field(
        default=STUDENT_PROMPT,
        metadata={
            "help": "Template of the student's prompt, with {problem}, and with {name} of any other column of texts."
        },
    )
    teacher_prompt: str = field(
        default=TEACHER_PROMPT,
        metadata={
            "help": "Template of the teacher's prompt, with {problem}, and with {solution} or {name} of any other "
            "column of texts."
        },
    )
    teacher_system_prompt: str | None = field(
        default=None,
        metadata={"help": "System turn of the teacher's prompt alone; by default that of the student's. Empty: none."},
    )
    student_thinking: bool = field(default=False, metadata={"help": "Thinking mode in the student's prompt."})
    teacher_thinking: bool = field(default=True, metadata={"help": "Thinking mode in the teacher's prompt."})
    teacher_prefill: str = field(
        default="",
        metadata={
            "help": "Text at the end of the teacher's prompt, after the assistant's header. With '<think>\\n' a "
            "thinking teacher reads the completion as its thoughts."
        },
    )
    teacher_context: str = field(
        default="solution",
        metadata={
            "help": "What the teacher sees as {solution}. solution: that of the data set. answer: the final answer "
            "alone. rollout, shortest_rollout: another rollout of the same problem and step (--num_generations) that "
            "is right; the data set then needs answers only. Controls: wrong_hint, another rollout that is wrong; "
            "donor, another problem's solution; reference_only, the solution without the problem; none, the "
            "student's prompt.",
            "choices": TEACHER_CONTEXTS,
        },
    )
    reason_first: bool = field(
        default=False,
        metadata={
            "help": "The teacher first writes a rationale for the reference, with its own weights. It stands in the "
            "teacher's prompt as a turn of its own. An empty rationale is left out."
        },
    )
    max_reasoning_length: int = field(
        default=1024, metadata={"help": "Maximum number of tokens of a rationale. A longer one is cut and used."}
    )
    reasoning_prompt: str = field(
        default=REASONING_PROMPT,
        metadata={"help": "Template of the prompt that asks for a rationale, with {problem} and {solution}."},
    )
    reasoning_generation_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Sampling of the rationales as JSON: temperature, top_p, top_k. Default: "
            '{"temperature": 0.7, "top_p": 0.8, "top_k": 20}.'
        },
    )

    # References and weights of graded rollouts
    verify_rollouts: bool | None = field(
        default=None,
        metadata={
            "help": "Grade the rollouts against their answers, as the evaluator does, and log the share of right "
            "ones. By default where --answer_column is given; settings that need grades switch it on."
        },
    )
    extract: str = field(
        default="final",
        metadata={
            "help": "How the answers of rollouts are found, as by the evaluator: final, the last box; release, the "
            "last box as the release reads it; last_number, the last number, without a box.",
            "choices": EXTRACT_METHODS,
        },
    )
    verifier: str = field(
        default="math",
        metadata={
            "help": "What judges the rollouts, as in the evaluator: math, exact_match, multiple_choice, python_tests, "
            "or MODULE:FUNCTION of your own, from the working directory, with (completion, answer, row) -> number in "
            "[0, 1] or None. Right is 1."
        },
    )
    reference_fallback: str = field(
        default="skip",
        metadata={
            "help": "With --teacher_context rollout or shortest_rollout, where no other rollout is right. skip: leave "
            "the rollout out of the loss. solution: that of the data set. answer: the right answer alone.",
            "choices": FALLBACKS,
        },
    )
    correct_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the tokens of right rollouts; 0 leaves them out of the loss."},
    )
    incorrect_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the tokens of wrong rollouts; 0 leaves them out of the loss."},
    )
    policy_gradient_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of GRPO's loss, which is added. The reward is what --verifier says, by default 1 for a "
            "right answer and 0 otherwise; advantages are normalized within the --num_generations rollouts of a "
            "problem."
        },
    )
    curriculum: str = field(
        default="none",
        metadata={
            "help": "Draw problems more often if there is more to learn from them. divergence: by the divergence on "
            "their last rollouts. pass_rate: by p (1 - p) of their share p of right answers. none: random order.",
            "choices": ("none", *CURRICULA),
        },
    )

    # Loss
    beta: float = field(
        default=0.0,
        metadata={
            "help": "0: KL(teacher||student), 1: KL(student||teacher), between: generalized JSD (0.5 in paper v1)."
        },
    )
    loss_temperature: float | None = field(
        default=None, metadata={"help": "Temperature of both softmaxes in the loss; by default --temperature."}
    )
    jsd_token_clip: float = field(
        default=0.05,
        metadata={"help": "Cap on each (token, vocabulary entry) summand of the divergence, in nats; 0: no cap."},
    )
    jsd_clip_mode: str = field(
        default="pointwise",
        metadata={
            "help": "pointwise: cap each summand, as the release does. token: cap each token's sum, which has no "
            "gradient above the cap. scale: the same value, with the gradient scaled down instead.",
            "choices": CLIP_MODES,
        },
    )
    top_k_loss: int = field(
        default=0, metadata={"help": "Divergence over the k most probable entries only; 0: full vocabulary."}
    )
    top_k_loss_support: str = field(
        default="teacher",
        metadata={
            "help": "With --top_k_loss: the role whose most probable entries are kept; both: the union.",
            "choices": TOP_K_SUPPORTS,
        },
    )
    top_k_loss_add_tail: bool = field(
        default=False,
        metadata={
            "help": "With --top_k_loss: add one entry for all the others together, in place of renormalizing. The "
            "result is a true divergence."
        },
    )
    num_loss_tokens_to_skip: int = field(
        default=0,
        metadata={
            "help": "Number of first tokens of each completion that are left out of the loss: there thinking modes "
            "differ in form."
        },
    )
    token_weights: str = field(
        default="none",
        metadata={
            "help": "Weight of each token's loss. growing, falling: by its place in the completion. student_entropy: "
            "1 - exp(-entropy of the student). teacher_certainty: exp(-entropy of the teacher). top_entropy, "
            "top_divergence: 1 for the fifth of a completion's tokens at which the student's entropy, or the "
            "divergence, is largest, and 0 for the others. none: all alike.",
            "choices": TOKEN_WEIGHTS,
        },
    )
    use_tinker_loss: bool = field(
        default=False,
        metadata={
            "help": "Policy gradient on the sampled tokens (paper eq. 9) in place of the full divergence. The "
            "divergence is still logged."
        },
    )
    sampled_token_clip: float = field(
        default=0.0,
        metadata={"help": "With --use_tinker_loss: cap on the advantage |log p_teacher - log p_student|; 0: none."},
    )
    vllm_importance_sampling_correction: bool = field(
        default=False,
        metadata={
            "help": "Multiply each token's policy gradient (--use_tinker_loss, --policy_gradient_weight) by its "
            "probability under the student over that of vLLM's sampling distribution."
        },
    )
    loss_implementation: str = field(
        default="fused",
        metadata={
            "help": "fused: the loss from the hidden states, without the full logits. dense: the reference.",
            "choices": LOSS_IMPLEMENTATIONS,
        },
    )
    packing: bool = field(
        default=True,
        metadata={
            "help": "Lay the sequences of a micro-batch end to end instead of padding them, where the model and its "
            "attention keep them apart. The micro-batches of a step then have about equal numbers of tokens."
        },
    )
    max_tokens_per_micro_batch: int | None = field(
        default=None,
        metadata={
            "help": "With --packing: maximum number of tokens of both roles in a forward and backward pass. Where it "
            "would be more, the micro-batch is divided, which changes memory and not the loss. A longer rollout goes "
            "alone. Default: no limit."
        },
    )
    loss_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Number of tokens at a time in the fused loss; by default so many that their buffers take 1.1 GiB "
            "on a GPU."
        },
    )

    def __post_init__(self):
        for flag, (value, reason) in FIXED.items():
            if getattr(self, flag) != value:
                raise ValueError(f"--{flag} {getattr(self, flag)}: must be {value}: {reason}")
        check_unused(self, UNUSED)
        for flag, (interval, note) in INTERVALS.items():
            if (value := getattr(self, flag)) is not None and not _lies_in(value, interval):
                raise ValueError(f"--{flag} {value}: must lie in {interval}{note}")
        for setting in fields(self):
            choices, value = setting.metadata.get("choices"), getattr(self, setting.name)
            if choices is not None and value is not None and value not in choices:
                raise ValueError(f"--{setting.name} {value}: must be one of {', '.join(map(str, choices))}")
        find_rule(self.verifier)
        if self.verifier != "math" and self.extract != "final":
            self._refuse("extract", f"be final with --verifier {self.verifier}, which reads the whole response")
        if self.teacher_context == "reference_only" and self.teacher_prompt == TEACHER_PROMPT:
            self.teacher_prompt = REFERENCE_ONLY_PROMPT
        self._check_combinations()
        self._check_context()
        hides_problem = self.teacher_context == "reference_only"
        check_templates(self.student_prompt, self.teacher_prompt, self.reasoning_prompt, hides_problem)
        if self.loss_temperature is None:
            self.loss_temperature = self.temperature
        super().__post_init__()
        self._check_rationale_sampling()
        self.eval_on_start = self.eval_on_start or self.eval_accuracy_samples > 0

    def _refuse(self, flag: str, requirement: str) -> None:
        raise ValueError(f"--{flag} {getattr(self, flag)}: must {requirement}")

    def _check_combinations(self) -> None:
        """Raise `ValueError` for settings against each other."""
        if self.vllm_mode not in ("colocate", "server"):
            self._refuse("vllm_mode", "be colocate or server")
        if self.use_vllm and self.temperature > 2.0:
            self._refuse("temperature", "be 2 at most with --use_vllm")
        if self.presence_penalty != 0.0 and not self.use_vllm:
            self._refuse("presence_penalty", "be 0 without --use_vllm: transformers has no presence penalty")
        if self.max_length is not None and self.max_completion_length >= self.max_length:
            self._refuse(
                "max_completion_length", f"be below --max_length {self.max_length}, to leave room for a prompt"
            )
        if self.num_loss_tokens_to_skip >= self.max_completion_length:
            self._refuse("num_loss_tokens_to_skip", f"be below --max_completion_length {self.max_completion_length}")
        batch = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if self.num_generations < 1 or batch % self.num_generations:
            product = f"--per_device_train_batch_size x --gradient_accumulation_steps ({batch})"
            self._refuse("num_generations", f"divide {product}: a problem's rollouts stay together")
        if self.use_ema_teacher and self.fixed_teacher:
            self._refuse("use_ema_teacher", "be left out with --fixed_teacher: choose one teacher")
        self._check_teacher_model()
        self._check_staleness()
        if self.top_k_loss_add_tail and not self.top_k_loss:
            self._refuse("top_k_loss_add_tail", "go with --top_k_loss")

        if self.eval_accuracy_samples and getattr(self.eval_strategy, "value", self.eval_strategy) == "no":
            self._refuse(
                "eval_accuracy_samples", "go with --eval_strategy and --eval_dataset_name: it is a part of evaluation"
            )

        needs_group = "go with --num_generations of at least 2"
        if self.max_tokens_per_micro_batch is not None and not self.packing:
            self._refuse("max_tokens_per_micro_batch", "be left out with --packing false: it counts packed tokens")
        has_reward = self.policy_gradient_weight > 0.0
        if has_reward and self.num_generations < 2:
            self._refuse("policy_gradient_weight", f"{needs_group}, whose mean is the baseline")
        if has_reward and self.token_weights != "none":
            self._refuse("token_weights", "be none with --policy_gradient_weight, whose mean is over all tokens alike")
        if self.correct_weight == self.incorrect_weight == 0.0 and not has_reward:
            self._refuse("incorrect_weight", "be positive where --correct_weight and --policy_gradient_weight are 0")
        if self.vllm_importance_sampling_correction and not (self.use_vllm and (self.use_tinker_loss or has_reward)):
            self._refuse(
                "vllm_importance_sampling_correction",
                "go with --use_vllm, which reports its probabilities, and with a policy gradient: "
                "--use_tinker_loss or --policy_gradient_weight",
            )

    def _check_staleness(self) -> None:
        """Raise `ValueError` for what does not go with rollouts from weights that are one step old."""
        if not self.max_staleness:
            return
        has_policy_gradient = self.use_tinker_loss or self.policy_gradient_weight > 0.0
        if not (self.use_vllm and self.vllm_mode == "server"):
            self._refuse("max_staleness", "be 0 without --use_vllm and --vllm_mode server, which samples meanwhile")
        if self.beta > 0.0 and not self.use_tinker_loss:
            self._refuse("beta", "be 0 with --max_staleness 1: reverse and mixed divergences need on-policy rollouts")
        if has_policy_gradient and not self.vllm_importance_sampling_correction:
            self._refuse(
                "vllm_importance_sampling_correction",
                "be true with --max_staleness 1 and a policy gradient: its weights stand for the older policy",
            )
        if self.curriculum != "none":
            self._refuse("curriculum", "be none with --max_staleness 1: it draws by the scores of the step before")
        if self.ignore_data_skip:
            self._refuse("ignore_data_skip", "be false with --max_staleness 1: the next prompts follow from the step")

    def _check_teacher_model(self) -> None:
        """Raise `ValueError` for what does not go with a second model as teacher, or without one."""
        name = self.teacher_model_name_or_path
        if name is None:
            for flag in ("teacher_model_revision", "teacher_model_server_url"):
                if getattr(self, flag) is not None:
                    self._refuse(flag, "go with --teacher_model_name_or_path")
            return
        for flag in ("fixed_teacher", "use_ema_teacher"):
            if getattr(self, flag):
                self._refuse(flag, f"be false with --teacher_model_name_or_path {name}, which teaches and stays")
        if self.reason_first:
            self._refuse("reason_first", "be false with --teacher_model_name_or_path: no sampler has that model")
        if self.teacher_model_server_url is not None:
            self._check_teacher_server()

    def _check_teacher_server(self) -> None:
        """Raise `ValueError` for what needs more than the largest log-probabilities of the teacher."""
        why = "with --teacher_model_server_url, which tells the k largest log-probabilities of a token"
        if self.use_tinker_loss:
            self._refuse("use_tinker_loss", f"be false {why}")
        if not (self.top_k_loss and self.top_k_loss_add_tail):
            self._refuse("top_k_loss", f"be given, and --top_k_loss_add_tail, {why}; 100, for example")
        if self.top_k_loss_support != "teacher":
            self._refuse("top_k_loss_support", f"be teacher {why}")
        if (self.temperature if self.loss_temperature is None else self.loss_temperature) != 1.0:
            self._refuse("loss_temperature", f"be given as 1 (by default it is --temperature) {why}")
        if self.token_weights == "teacher_certainty":
            self._refuse("token_weights", f"be another {why}: the teacher's entropy is not known")
        if self.save_token_statistics:
            self._refuse("save_token_statistics", f"be 0 {why}, and not that of each sampled token")

    def _check_context(self) -> None:
        """Raise `ValueError` for what does not go with the teacher's context."""
        name = self.teacher_context
        if self.context.of_group is not None:
            if self.num_generations < 2:
                self._refuse(
                    "teacher_context", "go with --num_generations of at least 2: the teacher sees another one"
                )
            if self.max_length is None:
                self._refuse("teacher_context", "go with --max_length, which bounds the teacher's prompt")
            if self.eval_on_start or getattr(self.eval_strategy, "value", self.eval_strategy) != "no":
                self._refuse(
                    "eval_strategy",
                    f"be no, and --eval_on_start off, with --teacher_context {name}: in an evaluation each problem "
                    "has one rollout. Evaluate the checkpoints with eval/evaluate_math.py",
                )
        if self.reference_fallback != "skip" and name not in ("rollout", "shortest_rollout"):
            self._refuse("reference_fallback", "go with --teacher_context rollout or shortest_rollout")
        if self.reason_first and name in ("none", "reference_only"):
            self._refuse("reason_first", f"be left out with --teacher_context {name}: it shows problem and reference")
        if name == "none":
            for flag, default in (("teacher_prompt", TEACHER_PROMPT), ("teacher_system_prompt", None)):
                if getattr(self, flag) != default:
                    self._refuse(flag, "be left out with --teacher_context none: the teacher has the student's prompt")
        shown = placeholders(self.teacher_prompt)
        if name == "reference_only" and "problem" in shown:
            self._refuse("teacher_prompt", "leave out {problem} with --teacher_context reference_only")
        if name not in ("solution", "none") and "solution" not in shown:
            self._refuse("teacher_prompt", f"hold {{solution}}, where --teacher_context {name} puts the reference")

    def _check_rationale_sampling(self) -> None:
        """Raise `ValueError` for what is no dictionary, for an unknown setting, and for one out of range."""
        given, kwargs = self.reasoning_generation_kwargs, self.rationale_sampling
        if not isinstance(given, dict | None):
            raise ValueError(f'--reasoning_generation_kwargs {given}: must be a JSON object, such as {{"top_k": 20}}')
        if unknown := (given or {}).keys() - REASONING_GENERATION.keys():
            raise ValueError(
                f"--reasoning_generation_kwargs: unknown setting {min(unknown)!r}; there are "
                f"{', '.join(REASONING_GENERATION)}"
            )
        for name, interval in (("temperature", "(0, 2]"), ("top_p", "(0, 1]"), ("top_k", "[0, inf)")):
            if not _lies_in(kwargs[name], interval):
                raise ValueError(f"--reasoning_generation_kwargs: {name} {kwargs[name]} must lie in {interval}")

    @property
    def rationale_sampling(self) -> dict[str, Any]:
        """Sampling settings of the rationales, under vLLM's names."""
        given = self.reasoning_generation_kwargs
        kwargs = REASONING_GENERATION | (given if isinstance(given, dict) else {})
        return kwargs | {"max_tokens": self.max_reasoning_length}

    @property
    def max_prompt_length(self) -> int | None:
        """Maximum number of tokens of a prompt, for each role; `None` for no limit."""
        return None if self.max_length is None else self.max_length - self.max_completion_length

    @property
    def collator_settings(self) -> dict[str, Any]:
        """Arguments of `SelfDistillationDataCollator`."""
        names = (
            "student_prompt",
            "teacher_prompt",
            "teacher_system_prompt",
            "student_thinking",
            "teacher_thinking",
            "teacher_prefill",
            "max_prompt_length",
            "num_loss_tokens_to_skip",
            "reason_first",
            "reasoning_prompt",
            "max_reasoning_length",
        )
        of_data, name = self.context.of_data, self.teacher_context
        return {setting: getattr(self, setting) for setting in names} | {
            "sees_more": name != "none",
            "sees_problem": name != "reference_only",
            "references": None if of_data is None else partial(of_data, self.seed),
        }

    @property
    def context(self) -> Context:
        """Where the reference in the teacher's prompt comes from."""
        return CONTEXTS[self.teacher_context]

    @property
    def objective(self) -> Objective:
        """The loss of a token."""
        return Objective(
            beta=self.beta,
            temperature=self.loss_temperature or self.temperature,
            clip=self.jsd_token_clip or None,
            clip_mode=self.jsd_clip_mode,
            top_k=self.top_k_loss or None,
            top_k_support=self.top_k_loss_support,
            top_k_add_tail=self.top_k_loss_add_tail,
            sampled_token=self.use_tinker_loss,
            sampled_token_clip=self.sampled_token_clip or None,
            policy_gradient_weight=self.policy_gradient_weight,
            importance_sampling_correction=self.vllm_importance_sampling_correction,
        )

    @property
    def grades_rollouts(self) -> bool:
        """True if rollouts with an answer are graded."""
        return bool(self.verify_rollouts) or self.needs_answers or self.eval_accuracy_samples > 0

    @property
    def needs_answers(self) -> bool:
        """True if the loss depends on the grades of rollouts: each problem must have an answer."""
        return (
            self.context.of_group is not None
            or self.correct_weight != 1.0
            or self.incorrect_weight != 1.0
            or self.policy_gradient_weight > 0.0
            or self.curriculum == "pass_rate"
        )

    @property
    def needed_texts(self) -> set[str]:
        """Columns of which each example must have a text."""
        templates = [self.student_prompt]
        if self.teacher_context != "none":
            templates += [self.teacher_prompt] + [self.reasoning_prompt] * self.reason_first
        shown = placeholders(*templates)
        needed = shown - {"solution"} | (set(self.context.columns) if "solution" in shown else set())
        return needed | ({"solution"} if self.reference_fallback == "solution" else set())
