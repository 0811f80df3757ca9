"""The quickstart's ways to train its base model: each a program, a training file and flags."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Method:
    """A way to train the base model, with the settings of its program's YAML file unless `flags` say otherwise."""

    program: str = "opsd_train.py"
    training_file: str = "train.jsonl"
    flags: tuple[str, ...] = ()
    factor: int = 1  # steps, relative to --steps
    has_curve: bool = False  # whether its checkpoints are evaluated too

    @property
    def settings(self) -> Path:
        return Path("quickstart", self.program.replace("_train.py", ".yaml"))


def opsd(flags: str, **fields) -> Method:
    """OPSD with `flags`, written as on a command line."""
    return Method(flags=tuple(flags.split()), **fields)


def without_solutions(flags: str, **fields) -> Method:
    """
    Group self-distillation: the reference is a right rollout of the same problem. The data has final answers alone.
    Group size and learning rate are the best of six settings on seed 0.
    """
    return opsd(
        f"--teacher_context rollout --num_generations 2 --learning_rate 1e-3 {flags}",
        training_file="train_answers.jsonl",
        **fields,
    )


OPSD = {"opsd": Method(has_curve=True)}
CONTROLS = {
    "no_privilege": opsd("--teacher_context none"),
    "shuffled_solutions": Method(training_file="train_shuffled.jsonl"),
}
BASELINES = {
    "sampled_token": opsd("--use_tinker_loss", has_curve=True),
    "grpo": Method("grpo_train.py", factor=3, has_curve=True),
    "sft": Method("sft_train.py"),
}

# heading -> name -> method; the table has them in this order
ABLATIONS = {
    "Teachers": {
        **OPSD,
        "ema": opsd("--fixed_teacher false --use_ema_teacher --ema_decay 0.99"),
        "current_teacher": opsd("--fixed_teacher false"),
        "reason_first": opsd("--reason_first --max_reasoning_length 64"),
        **CONTROLS,
    },
    "Objectives": {
        "beta_0": opsd("--beta 0"),
        "beta_1": opsd("--beta 1"),
        "beta_0_pointwise_clip": opsd("--beta 0 --jsd_token_clip 0.05"),
        "beta_0_token_clip": opsd("--beta 0 --jsd_token_clip 0.05 --jsd_clip_mode token"),
        "beta_0_scale_clip": opsd("--beta 0 --jsd_token_clip 0.05 --jsd_clip_mode scale"),
        "top_k": opsd("--top_k_loss 5"),
        "top_k_tail": opsd("--top_k_loss 5 --top_k_loss_add_tail"),
        "sampled_token": opsd("--use_tinker_loss"),
    },
    "Rollouts": {
        "completion_10": opsd("--max_completion_length 10"),
        "groups_of_8": opsd("--num_generations 8"),
    },
    "Teacher's context": {
        "answer": opsd("--teacher_context answer"),
        "reference_only": opsd("--teacher_context reference_only"),
        "donor": opsd("--teacher_context donor"),
        "wrong_hint": opsd("--teacher_context wrong_hint --num_generations 2"),
    },
    "Token weights": {
        "tokens_growing": opsd("--token_weights growing"),
        "tokens_falling": opsd("--token_weights falling"),
        "tokens_student_entropy": opsd("--token_weights student_entropy"),
        "tokens_teacher_certainty": opsd("--token_weights teacher_certainty"),
        "tokens_top_entropy": opsd("--token_weights top_entropy"),
        "tokens_top_divergence": opsd("--token_weights top_divergence"),
    },
    "Beyond the paper": {
        "failed_only": opsd("--correct_weight 0"),
        "curriculum": opsd("--curriculum divergence"),
        "group_self_distillation": without_solutions("", has_curve=True),
        "group_self_distillation_reward": without_solutions("--policy_gradient_weight 0.1"),
        "grpo": Method("grpo_train.py", has_curve=True),
    },
}

# whose accuracy over generated tokens is plotted, if there
CURVES = ("opsd", "sampled_token", "grpo")
ABLATION_CURVES = ("opsd", "group_self_distillation", "grpo")


def choose_methods(
    groups: Mapping[str, Mapping[str, Method]], only: Sequence[str] | None
) -> dict[str, dict[str, Method]]:
    """
    The methods with the given names, or all of them, under their headings.

    Raises:
        ValueError: naming the names that there are not.
    """
    known = {name for methods in groups.values() for name in methods}
    if unknown := [name for name in only or () if name not in known]:
        raise ValueError(f"--only {' '.join(unknown)}: there is no such method; there are {', '.join(sorted(known))}")
    chosen = {
        heading: {name: method for name, method in methods.items() if not only or name in only}
        for heading, methods in groups.items()
    }
    return {heading: methods for heading, methods in chosen.items() if methods}
