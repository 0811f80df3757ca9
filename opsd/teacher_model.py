"""Another model in the teacher's role (on-policy distillation): whether it fits the student, and how it is loaded."""

import logging
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl.models.utils import prepare_deepspeed
from trl.trainer.utils import create_model_from_path

from opsd.adapters import make_skeleton
from opsd.losses import read_head_settings
from opsd.packing import check_attention

if TYPE_CHECKING:
    from opsd.config import OPSDConfig

logger = logging.getLogger(__name__)

NUM_SHOWN = 3  # tokens of each kind of difference


def tokenizer_differences(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> list[str]:
    """Say in which tokens the vocabularies differ, with numbers and examples; an empty list if in none."""
    of_student, of_teacher = student.get_vocab(), teacher.get_vocab()
    moved = [token for token, i in of_student.items() if of_teacher.get(token, i) != i]
    kinds = {
        "in the student's alone": [f"{t!r} ({i})" for t, i in of_student.items() if t not in of_teacher],
        "in the teacher's alone": [f"{t!r} ({i})" for t, i in of_teacher.items() if t not in of_student],
        "with other ids": [f"{token!r} ({of_student[token]}, {of_teacher[token]})" for token in moved],
    }
    return [
        f"{len(tokens)} tokens {kind}, such as {', '.join(sorted(tokens)[:NUM_SHOWN])}"
        for kind, tokens in kinds.items()
        if tokens
    ]


def check_teacher_model(args: "OPSDConfig", tokenizer: PreTrainedTokenizerBase, student: PreTrainedModel) -> int:
    """
    Check that the model of `--teacher_model_name_or_path` can teach the student token by token. Loads no weights.

    Args:
        args: settings.
        tokenizer: of the student.
        student: language model without adapter, or its skeleton.

    Returns:
        Number of vocabulary entries that both heads have. Heads may be padded beyond the tokenizer, each in its way:
        both roles' distributions are then those over these entries.

    Raises:
        ValueError: for another tokenizer, naming what differs; a head with fewer entries than the tokenizer; and a
            head that the fused loss cannot take beside the student's.
    """
    name, options = args.teacher_model_name_or_path, load_options(args)
    theirs = AutoTokenizer.from_pretrained(name, **options)
    if differences := tokenizer_differences(tokenizer, theirs):
        raise ValueError(
            f"--teacher_model_name_or_path {name}: its tokenizer is not that of {tokenizer.name_or_path}: "
            f"{'; '.join(differences)}. Distributions are compared entry by entry: take a teacher of the student's "
            "family"
        )
    for what, ours, other in (
        ("ends its turns with", tokenizer.eos_token, theirs.eos_token),
        ("has the chat template", tokenizer.chat_template, theirs.chat_template),
    ):
        if ours != other:
            logger.warning(
                "--teacher_model_name_or_path %s: %s %r, the student %r; both are asked in the student's way",
                *(name, what, str(other)[:60], str(ours)[:60]),
            )
    skeleton = make_skeleton(name, **options)
    sizes = [model.config.get_text_config().vocab_size for model in (student, skeleton)]
    largest = max(tokenizer.get_vocab().values())
    if min(sizes) <= largest:
        raise ValueError(
            f"--teacher_model_name_or_path {name}: heads of {sizes[0]} (student) and {sizes[1]} (teacher) entries, "
            f"and the tokenizer's ids go up to {largest}; take a teacher with an entry for each"
        )
    if sizes[0] != sizes[1]:
        logger.info("heads of %d and %d entries: the loss is over the first %d", *sizes, min(sizes))
    if args.teacher_model_server_url is not None:
        _check_served(args, student, *sizes)
    elif args.loss_implementation == "fused" and read_head_settings(student) != read_head_settings(skeleton):
        raise ValueError(
            f"--teacher_model_name_or_path {name}: scales or caps its logits otherwise than the student, "
            f"{read_head_settings(skeleton)} and {read_head_settings(student)}; choose --loss_implementation dense"
        )
    return min(sizes)


def _check_served(args: "OPSDConfig", student: PreTrainedModel, size: int, size_of_teacher: int) -> None:
    """Raise `ValueError` for heads whose entries a server's log-probabilities cannot be compared over."""
    if size != size_of_teacher:
        raise ValueError(
            f"--teacher_model_server_url: heads of {size} (student) and {size_of_teacher} (teacher) entries, and the "
            "server's log-probabilities are over all of its own; leave the flag out, and the teacher is loaded here"
        )
    if args.loss_implementation == "fused" and read_head_settings(student).logit_softcap is not None:
        raise ValueError(
            "--teacher_model_server_url: the student caps its logits, which the fused loss cannot turn round for the "
            "teacher's; choose --loss_implementation dense"
        )


def load_options(args: "OPSDConfig") -> dict[str, Any]:
    """Return the options with which the teacher's files are read."""
    return {"revision": args.teacher_model_revision, "trust_remote_code": args.trust_remote_code}


def load_teacher_model(args: "OPSDConfig", student: PreTrainedModel, accelerator: Accelerator) -> nn.Module:
    """
    Load the teacher, frozen and in evaluation mode, with the student's attention, and wrap it as its launcher needs.

    Its weights are bfloat16 with `--bf16`, else of the student's dtype. Under ZeRO-3 and FSDP2 each process holds a
    part of them. Else each holds all. No checkpoint has them.
    """
    model = create_model_from_path(
        args.teacher_model_name_or_path,
        dtype=torch.bfloat16 if args.bf16 else student.dtype,
        attn_implementation=student.config.get_text_config()._attn_implementation,
        device_map=None,
        **load_options(args),
    )
    check_attention(model.config.get_text_config())
    model.requires_grad_(False).eval()
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        return prepare_deepspeed(model, accelerator)
    if accelerator.distributed_type != DistributedType.FSDP:
        return model.to(accelerator.device)
    fsdp_plugin = accelerator.state.fsdp_plugin
    if fsdp_plugin.fsdp_version != 2:
        raise ValueError("--teacher_model_name_or_path: is not sharded by FSDP 1; say fsdp_version: 2")
    of_student = fsdp_plugin.auto_wrap_policy, fsdp_plugin.transformer_cls_names_to_wrap
    model = fsdp2_prepare_model(accelerator, model)
    fsdp_plugin.auto_wrap_policy, fsdp_plugin.transformer_cls_names_to_wrap = of_student  # it is wrapped later
    return model
