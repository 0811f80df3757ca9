"""What a run will do, in about a dozen lines, and which of its settings an experiment has shown to be risky."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from trl import GRPOConfig

from data_collator import placeholders
from opsd.config import OPSDConfig
from opsd.run.arguments import ModelArguments, RunArguments
from opsd.token_weights import TOKEN_WEIGHTS

logger = logging.getLogger(__name__)

REVERSED = "clip_ratio/wrong_way_tokens"  # share of the tokens at which the clip reverses the lesson
MAX_REVERSED = 0.02
ABLATIONS = "docs/experiments.md"
NUM_SAMPLES = 100  # examples whose prompts are measured

Lines = list[tuple[str, str]]  # (heading, text)


def render(lines: Lines) -> str:
    """Return the lines with their texts below each other."""
    width = max(len(heading) for heading, _ in lines) + 2
    return "\n".join(f"{heading:<{width}}{text}" for heading, text in lines)


def describe_run(
    args: RunArguments,
    training_args: TrainingArguments,
    model_args: ModelArguments,
    num_rows: int | None,
    checkpoint: str | None = None,
) -> Lines:
    """
    Say what a run will do.

    Args:
        args, training_args, model_args: from `parse_arguments`.
        num_rows: number of usable examples; `None` if the data set has not been loaded.
        checkpoint: that it goes on from.

    Raises:
        ValueError: for fewer examples than a step takes.
    """
    rows = "not loaded here" if num_rows is None else f"{num_rows:,} usable examples"
    lines = [
        ("model", _model(args, model_args)),
        ("data", f"{args.dataset_name}: {rows}"),
        ("batch", _batch(training_args)),
        ("steps", _steps(training_args, num_rows)),
        ("optimizer", _optimizer(training_args)),
    ]
    if isinstance(training_args, OPSDConfig):
        starts_fresh = model_args.use_peft and getattr(args, "adapter_name_or_path", None) is None
        lines += [("teacher", _teacher(training_args, starts_fresh)), ("objective", _objective(training_args))]
    elif isinstance(training_args, GRPOConfig):
        reward = f"reward 1 for a right answer ({getattr(args, 'reward', None)})"
        if (verifier := getattr(args, "verifier", "math")) != "math":
            reward = f"reward by {verifier}"
        text = f"GRPO ({training_args.loss_type} loss), {reward}, KL coefficient {training_args.beta:g}"
        lines.append(("objective", text))
    else:
        learned = "the solution" if getattr(training_args, "completion_only_loss", None) else "prompt and solution"
        lines.append(("objective", f"cross entropy of the tokens of {learned}"))
    if hasattr(training_args, "max_completion_length"):
        lines.append(("rollouts", _rollouts(training_args)))
    if args.eval_dataset_name is not None:
        lines.append(("evaluation", _evaluation(args, training_args)))
    lines.append(("output", _output(training_args, checkpoint)))
    return lines


def _model(args: RunArguments, model_args: ModelArguments) -> str:
    text = f"{model_args.model_name_or_path} in {model_args.dtype}"
    if not model_args.use_peft:
        return f"{text}; all its weights are trained"
    modules = model_args.lora_target_modules or "the default modules"
    modules = modules if isinstance(modules, str) else " ".join(modules)
    adapter = getattr(args, "adapter_name_or_path", None)
    adapter = "a LoRA adapter is trained" if adapter is None else f"the LoRA adapter {adapter} is trained on"
    return f"{text}; {adapter}: rank {model_args.lora_r}, alpha {model_args.lora_alpha}, on {modules}"


def _number(number: int, one: str, more: str) -> str:
    return f"{number:,} {one if number == 1 else more}"


def _batch(args: TrainingArguments) -> str:
    per_device, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    size = per_device * accumulation * args.world_size
    text = f"{size} sequences a step: {_number(args.world_size, 'process', 'processes')} x "
    text += f"{_number(accumulation, 'accumulation step', 'accumulation steps')} x {per_device}"
    num_generations = getattr(args, "num_generations", 1)
    return text if num_generations == 1 else f"{text}; {num_generations} rollouts of each problem"


def count_steps(args: TrainingArguments, num_rows: int) -> tuple[int, int]:
    """
    Return the steps of an epoch, and the number of examples that are left out of it, since they do not fill a step.

    Raises:
        ValueError: for fewer examples than a step takes.
    """
    if isinstance(args, OPSDConfig):
        needed, steps = args.generation_batch_size * args.world_size, 1.0  # problems that are sampled at once
    elif isinstance(args, GRPOConfig):
        needed = args.generation_batch_size // args.num_generations
        steps = args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps
    else:
        batches = math.ceil(num_rows / (args.per_device_train_batch_size * args.world_size))
        return math.ceil(batches / args.gradient_accumulation_steps), 0
    if num_rows < needed:
        raise ValueError(
            f"--dataset_name: {num_rows} usable examples are fewer than one step takes ({needed}); lower "
            "--per_device_train_batch_size or --gradient_accumulation_steps"
        )
    return math.ceil(num_rows // needed * steps), num_rows % needed


def _steps(args: TrainingArguments, num_rows: int | None) -> str:
    if num_rows is None:
        return f"{args.max_steps:,}" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    per_epoch, left_out = count_steps(args, num_rows)
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    text = f"{total:,}, {total / per_epoch:.3g} epochs: {num_rows:,} examples, "
    text += _number(per_epoch, "step an epoch", "steps an epoch")
    if getattr(args, "curriculum", "none") != "none":
        return f"{text}, drawn by {args.curriculum}"
    return text + (f", {left_out} left out of each (each time others)" if left_out else "")


def _optimizer(args: TrainingArguments) -> str:
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    warmup = f", warm-up {args.warmup_steps:g}" if args.warmup_steps else ""
    return f"learning rate {args.learning_rate:g}, {schedule}{warmup}; gradient norm {args.max_grad_norm:g} at most"


def _teacher(args: OPSDConfig, starts_fresh: bool) -> str:
    """Say who the teacher is and what that means. `starts_fresh`: there is an adapter, which is new."""
    if args.teacher_model_name_or_path is not None:
        where = f" on the server {args.teacher_model_server_url}" if args.teacher_model_server_url else ""
        text = f"{args.teacher_model_name_or_path}, another model{where}: it stays what it is"
    elif args.fixed_teacher:
        copied = "the model with its adapter off" if starts_fresh else "a copy of the weights at the start"
        text = f"the initial policy ({copied}): it stays what it is"
    elif args.use_ema_teacher:
        text = f"an average of the student's weights, decay {args.ema_decay:g} each "
        text += f"{_number(args.ema_update_steps, 'step', 'steps')}: "
        text += "it follows the student slowly"
    else:
        text = "the current policy: it moves with the student, and nothing holds the two"
    shown = placeholders(args.teacher_prompt)
    sees_reference = args.reason_first or args.teacher_context == "none" or "solution" in shown
    seen = args.context.meaning if sees_reference else "its own template without a solution"
    if args.teacher_model_name_or_path is not None and args.teacher_context == "none":
        seen = "what the student sees"
    if args.context.of_group is not None:
        fallback = "left out of the loss" if args.reference_fallback == "skip" else f"the {args.reference_fallback}"
        seen += f" (without one: {fallback})"
    return f"{text}; it sees {seen}" + (" and writes a rationale for it first" if args.reason_first else "")


def _objective(args: OPSDConfig) -> str:
    if args.use_tinker_loss:
        text = "policy gradient on the sampled tokens, advantage log p_teacher - log p_student"
        text += f", capped at {args.sampled_token_clip:g}" if args.sampled_token_clip else ""
    else:
        names = {0.0: "KL(teacher||student)", 1.0: "KL(student||teacher)"}
        text = names.get(args.beta, f"Jensen-Shannon divergence, beta {args.beta:g}")
        text += " over the full vocabulary"
        if args.top_k_loss:
            role = {"both": "both roles"}.get(args.top_k_loss_support, f"the {args.top_k_loss_support}")
            tail = " and one for all others" if args.top_k_loss_add_tail else ", renormalized"
            text = text.replace("the full vocabulary", f"the {args.top_k_loss} most probable entries of {role}{tail}")
        if args.jsd_token_clip:
            what = "each summand" if args.jsd_clip_mode == "pointwise" else "each token's sum"
            scaled = ", its gradient scaled down" if args.jsd_clip_mode == "scale" else ""
            text += f"; {what} at most {args.jsd_token_clip:g} nats{scaled}"
    text += f"; temperature {args.loss_temperature:g}"
    if (args.correct_weight, args.incorrect_weight) != (1.0, 1.0):
        text += f"; right rollouts weigh {args.correct_weight:g}, wrong ones {args.incorrect_weight:g}"
    if args.token_weights != "none":
        text += f"; tokens weigh {TOKEN_WEIGHTS[args.token_weights].meaning}"
    return text + (f"; plus {args.policy_gradient_weight:g} x GRPO" if args.policy_gradient_weight else "")


def _rollouts(args: Any) -> str:
    sampler = "transformers"
    if args.use_vllm:
        colocated = f"vLLM in the training processes, {args.vllm_gpu_memory_utilization:g} of each GPU"
        sampler = colocated if args.vllm_mode == "colocate" else "vLLM on a server"
    text = f"{sampler}; up to {args.max_completion_length:,} tokens, temperature {args.temperature:g}"
    text += f", top-p {args.top_p:g}, top-k {args.top_k or 'off'}"
    return text + ("; sampled one step ahead" if getattr(args, "max_staleness", 0) else "")


def _evaluation(args: RunArguments, training_args: TrainingArguments) -> str:
    strategy = getattr(training_args.eval_strategy, "value", training_args.eval_strategy)
    each = f"{training_args.eval_steps:g} steps" if strategy == "steps" else strategy
    text = f"{args.eval_dataset_name}, each {each}"
    num_samples = getattr(training_args, "eval_accuracy_samples", 0)
    return f"{text}; {num_samples} graded completion{'s' * (num_samples > 1)} of each problem" if num_samples else text


def _output(args: TrainingArguments, checkpoint: str | None) -> str:
    strategy = getattr(args.save_strategy, "value", args.save_strategy)
    saved = {"no": "no checkpoints", "steps": f"a checkpoint each {args.save_steps:g} steps"}
    text = f"{args.output_dir}; {saved.get(strategy, f'a checkpoint each {strategy}')}"
    return text if checkpoint is None else f"{text}; goes on from {Path(checkpoint).name}"


def describe_prompts(
    dataset: Dataset, columns: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, **template_settings: Any
) -> Lines:
    """
    Show the first prompt of each role, shortened, and their mean length.

    Args:
        dataset: its columns hold token ids, or conversations, whose prompt the chat template makes.
        columns: column -> heading.
        template_settings: of the chat template.
    """

    def encode(prompt: Sequence[Any]) -> list[int]:
        if not isinstance(prompt[0], dict):
            return list(prompt)
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False, **template_settings)
        return tokenizer(text, add_special_tokens=False).input_ids

    lines = []
    for column, heading in columns.items():
        prompts = [encode(prompt) for prompt in dataset[:NUM_SAMPLES][column]]
        mean = sum(map(len, prompts)) / len(prompts)
        lines.append((heading, f"{mean:.0f} tokens on average, such as: {_on_one_line(tokenizer.decode(prompts[0]))}"))
    return lines


def _on_one_line(text: str, head: int = 140, tail: int = 80) -> str:
    text = text.replace("\n", "\\n")
    return text if len(text) <= head + tail + 7 else f"{text[:head]} [...] {text[-tail:]}"


# Risks


def find_risks(args: TrainingArguments) -> list[str]:
    """Return the settings that an experiment has shown to be risky, each with the experiment and the way out."""
    if not isinstance(args, OPSDConfig):
        return []
    risks = []
    if not (args.fixed_teacher or args.use_ema_teacher or args.teacher_model_name_or_path):
        risks.append(
            "no --fixed_teacher: teacher and student move together. On the quickstart's task this ended at 2.5 ± 2.5 "
            f"% right, against 97.3 ± 0.6 % with it and 45.5 % of the base ({ABLATIONS}). Add --fixed_teacher or "
            "--use_ema_teacher"
        )
    if args.beta == 0.0 and args.jsd_token_clip and args.jsd_clip_mode != "scale" and not args.use_tinker_loss:
        score = {"pointwise": "35.5 ± 1.8", "token": "33.1 ± 1.1"}[args.jsd_clip_mode]
        risks.append(
            f"--beta 0 with --jsd_token_clip {args.jsd_token_clip:g} ({args.jsd_clip_mode}): where the lesson sits in "
            f"few tokens, the clip undoes it. On the quickstart's task 0.05 ended at {score} % right, against "
            f"94.9 ± 0.2 % without a clip and 98.3 ± 0.4 % with --jsd_clip_mode scale ({ABLATIONS}). On Qwen3-1.7B "
            "the pointwise clip kept a run from collapsing (paper v3, Figure 4: AIME24 about 57, 49 without it). "
            f"Watch {REVERSED}"
        )
    if args.teacher_context == "answer":
        risks.append(
            "--teacher_context answer: the final answer alone may not be enough for the teacher. On the quickstart's "
            "task, whose model copies worked references, this ended at 6.5 ± 4.0 % right, against 96.5 ± 0.9 % "
            f"with the solution and 45.1 % of the base ({ABLATIONS}). Watch rewards/accuracy/mean"
        )
    if args.student_thinking and args.teacher_thinking:
        risks.append(
            "--student_thinking with --teacher_thinking: of the four pairs of modes, a student without and a teacher "
            "with thinking gave the largest divergence on mathematical tokens and the best results in the authors' "
            "early experiments (project page). Leave out --student_thinking"
        )
    return risks


class ReversedClipCallback(TrainerCallback):
    """Warns, once in a run, where the clip reverses the lesson at too many tokens."""

    def __init__(self) -> None:
        self.has_warned = False

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        ratio = (logs or {}).get(REVERSED, 0.0)
        if self.has_warned or ratio <= MAX_REVERSED:
            return
        self.has_warned = True
        logger.warning(
            "step %d, %s: at %.1f %% of the tokens --jsd_token_clip makes a step push the teacher's most probable "
            "token down, although the teacher wants it up. At 3.9 %% it undid the lesson of the quickstart (%s). "
            "Say --jsd_clip_mode scale, or raise --jsd_token_clip (0: no clip)",
            state.global_step, REVERSED, 100.0 * ratio, ABLATIONS,
        )  # fmt: skip
