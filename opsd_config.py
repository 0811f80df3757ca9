"""The settings of OPSD, on top of those of TRL's GOLD trainer, checked alone and against each other."""

import math
from dataclasses import dataclass, field

from trl.experimental.gold import GOLDConfig
from trl.import_utils import is_vllm_available

from curriculum import CURRICULA
from data_collator import REASONING_PROMPT, STUDENT_PROMPT, TEACHER_PROMPT, TRANSITION_PROMPT, check_template
from opsd.losses import CLIP_MODES, TOP_K_SUPPORTS

LOSS_IMPLEMENTATIONS = ("fused", "dense")
TEACHER_REFERENCES = ("solution", "rollout")
NO_CORRECT_ROLLOUT = ("skip", "solution", "answer")


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
    reason_first: bool = field(
        default=False,
        metadata={
            "help": "The teacher first writes a rationalization of the reference, with its own weights; it stands in the "
            "teacher's prompt as a turn of its own, token by token as it was sampled. Where it is empty, the prompt has none."
        },
    )
    max_reasoning_length: int = field(
        default=1024, metadata={"help": "Tokens of a rationalization at most; a longer one is used as far as it goes."}
    )
    reasoning_temperature: float = field(default=0.7, metadata={"help": "Temperature of the rationalizations."})
    reasoning_top_p: float = field(default=0.8, metadata={"help": "Nucleus of the rationalizations; 1: off."})
    reasoning_top_k: int = field(default=20, metadata={"help": "Top-k of the rationalizations; 0: off."})
    reasoning_thinking: bool = field(
        default=False, metadata={"help": "Thinking mode in the prompt for the rationalization."}
    )
    reasoning_prompt: str = field(
        default=REASONING_PROMPT,
        metadata={"help": "Template of the prompt for the rationalization, with {problem} and {solution}."},
    )
    transition_prompt: str = field(
        default=TRANSITION_PROMPT,
        metadata={"help": "What the teacher is asked behind its rationalization; no placeholders."},
    )
    reasoning_cache: str | None = field(
        default=None,
        metadata={
            "help": "With --reason_first and a teacher that is the base: folder in which rationalizations are kept, one for each "
            "prompt, model and setting, also for later runs. Without it each is sampled anew at each step."
        },
    )
    teacher_reference: str = field(
        default="solution",
        metadata={
            "help": "What the teacher sees. solution: that of the data set. rollout: another rollout of the same problem in the same "
            "step (--num_generations) whose answer is right, so that answers are all that the data set needs.",
            "choices": TEACHER_REFERENCES,
        },
    )
    no_correct_rollout: str = field(
        default="skip",
        metadata={
            "help": "With --teacher_reference rollout, where no other rollout is right. skip: the rollout does not count. solution: "
            "that of the data set. answer: the right answer alone.",
            "choices": NO_CORRECT_ROLLOUT,
        },
    )
    verify_rollouts: bool = field(
        default=False,
        metadata={
            "help": "Grade the rollouts against --answer_column, as the evaluator does, and log how many are right. Settings "
            "that need it switch it on."
        },
    )
    weight_of_correct: float = field(
        default=1.0,
        metadata={"help": "Weight of the tokens of rollouts whose answer is right; 0: they are not learned from."},
    )
    weight_of_failed: float = field(
        default=1.0,
        metadata={"help": "Weight of the tokens of rollouts whose answer is wrong; 0: they are not learned from."},
    )
    reward_weight: float = field(
        default=0.0,
        metadata={
            "help": "Adds so many times GRPO's loss, on-policy, with the reward 1 for a right answer and 0 otherwise, and "
            "advantages normalized within the --num_generations rollouts of a problem."
        },
    )
    curriculum: str = field(
        default="none",
        metadata={
            "help": "Draw problems again more often the more there is to learn from them. divergence: by that of student and "
            "teacher on their last rollouts. pass_rate: by p (1 - p) of the share p of right answers. none: in random order.",
            "choices": ("none", *CURRICULA),
        },
    )
    importance_correction: bool = field(
        default=False,
        metadata={
            "help": "With --use_vllm, and --use_tinker_loss or --reward_weight: weigh each token's policy gradient with its "
            "probability under the student over that which it was sampled with (temperature, top-p, top-k, min-p, penalty)."
        },
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
        metadata={
            "help": "With --top_k_loss: whose most probable entries; both: the union.",
            "choices": TOP_K_SUPPORTS,
        },
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
            ("temperature", self.temperature <= 2.0 or not self.use_vllm, "be 2 at most with --use_vllm"),
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
            ("max_reasoning_length", self.max_reasoning_length >= 1, "be at least 1"),
            ("reasoning_temperature", 0.0 < self.reasoning_temperature <= 2.0, "lie in (0, 2]"),
            ("reasoning_top_p", 0.0 < self.reasoning_top_p <= 1.0, "lie in (0, 1]; 1 switches it off"),
            ("reasoning_top_k", self.reasoning_top_k >= 0, "not be negative; 0 switches it off"),
            (
                "reason_first",
                self.teacher_sees_solution or not self.reason_first,
                "be left out with --teacher_sees_solution false: there is nothing to rationalize",
            ),
            (
                "reasoning_cache",
                self.reasoning_cache is None
                or (self.reason_first and self.fixed_teacher and self.teacher_reference == "solution"),
                "go with --reason_first, --fixed_teacher and --teacher_reference solution: else no prompt of the same teacher "
                "comes twice",
            ),
            (
                "teacher_reference",
                self.teacher_reference in TEACHER_REFERENCES,
                f"be one of {', '.join(TEACHER_REFERENCES)}",
            ),
            (
                "teacher_reference",
                self.teacher_reference == "solution" or self.num_generations > 1,
                "go with --num_generations of at least 2: the teacher sees another rollout of the same problem",
            ),
            (
                "teacher_reference",
                self.teacher_reference == "solution" or self.teacher_sees_solution,
                "be left out with --teacher_sees_solution false",
            ),
            (
                "teacher_reference",
                self.teacher_reference == "solution" or self.max_length is not None,
                "go with --max_length, which bounds the teacher's prompt",
            ),
            (
                "eval_strategy",
                self.teacher_reference == "solution"
                or (str(getattr(self.eval_strategy, "value", self.eval_strategy)) == "no" and not self.eval_on_start),
                "be no, and --eval_on_start off, with --teacher_reference rollout, since in an evaluation each problem has one "
                "rollout; evaluate the checkpoints with eval/evaluate_math.py",
            ),
            (
                "no_correct_rollout",
                self.no_correct_rollout in NO_CORRECT_ROLLOUT,
                f"be one of {', '.join(NO_CORRECT_ROLLOUT)}",
            ),
            (
                "no_correct_rollout",
                self.no_correct_rollout == "skip" or self.teacher_reference == "rollout",
                "go with --teacher_reference rollout",
            ),
            ("weight_of_correct", 0.0 <= self.weight_of_correct < math.inf, "be finite and not negative"),
            ("weight_of_failed", 0.0 <= self.weight_of_failed < math.inf, "be finite and not negative"),
            ("reward_weight", 0.0 <= self.reward_weight < math.inf, "be finite and not negative; 0: no reward"),
            (
                "weight_of_failed",
                self.weight_of_correct + self.weight_of_failed + self.reward_weight > 0.0,
                "be positive where --weight_of_correct and --reward_weight are 0",
            ),
            (
                "reward_weight",
                self.reward_weight == 0.0 or self.num_generations > 1,
                "go with --num_generations of at least 2, whose mean is the baseline",
            ),
            ("curriculum", self.curriculum in ("none", *CURRICULA), f"be one of none, {', '.join(CURRICULA)}"),
            (
                "importance_correction",
                not self.importance_correction
                or (self.use_vllm and (self.use_tinker_loss or self.reward_weight > 0.0)),
                "go with --use_vllm, which says with what probability it sampled, and with a policy gradient: --use_tinker_loss "
                "or --reward_weight",
            ),
            (
                "importance_correction",
                not self.importance_correction or self.vllm_mode == "colocate",
                "go with --vllm_mode colocate: a server may give probabilities before or after its truncation, and does not "
                "say which",
            ),
            (
                "num_generations",
                self.num_generations >= 1
                and self.per_device_train_batch_size * self.gradient_accumulation_steps % self.num_generations == 0,
                "divide --per_device_train_batch_size x --gradient_accumulation_steps "
                f"({self.per_device_train_batch_size} x {self.gradient_accumulation_steps}): a problem's rollouts stay together",
            ),
            ("jsd_token_clip", self.jsd_token_clip >= 0.0, "not be negative; 0 switches the cap off"),
            ("jsd_clip_mode", self.jsd_clip_mode in CLIP_MODES, f"be one of {', '.join(CLIP_MODES)}"),
            ("top_k_loss", self.top_k_loss >= 0, "not be negative; 0 takes the full vocabulary"),
            ("top_k_loss_of", self.top_k_loss_of in TOP_K_SUPPORTS, f"be one of {', '.join(TOP_K_SUPPORTS)}"),
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
        check_template("reasoning_prompt", self.reasoning_prompt, {"problem", "solution"})
        check_template("transition_prompt", self.transition_prompt, set())
        if self.loss_temperature is None:
            self.loss_temperature = self.temperature
        super().__post_init__()

    @property
    def needs_answers(self) -> bool:
        """Whether rollouts are graded."""
        return (
            self.verify_rollouts
            or self.teacher_reference == "rollout"
            or self.weight_of_correct != 1.0
            or self.weight_of_failed != 1.0
            or self.reward_weight > 0.0
            or self.curriculum == "pass_rate"
        )

    @property
    def needs_solutions(self) -> bool:
        """Whether the data set has to have reference solutions."""
        return self.teacher_sees_solution and (
            self.teacher_reference == "solution" or self.no_correct_rollout == "solution"
        )
