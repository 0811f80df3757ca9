"""What chat templates differ in: the thinking mode, the marks around a thought, the present date."""

import datetime
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the grading workers import this module, and transformers takes seconds
    from transformers import PreTrainedTokenizerBase

# Start and end of a thought; the answer follows the end. Qwen3, DeepSeek-R1 and most others; Gemma 4; gpt-oss;
# Magistral; Seed-OSS
MARKS = (
    ("<think>", "</think>"),
    ("<|channel>thought", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
)
STARTS, ENDS = (re.compile("|".join(map(re.escape, marks))) for marks in zip(*MARKS, strict=True))
DATE_CALL = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


def after_thought(text: str, thinking: bool = False) -> str | None:
    """
    Return what follows the last thought of a response; `None` if it was cut off while thinking.

    Args:
        thinking: it was sampled in thinking mode, so that without the end of a thought it has no answer.
    """
    ends = list(ENDS.finditer(text))
    if ends:
        return text[ends[-1].end() :]
    return None if thinking or STARTS.search(text) else text


def decode_response(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """Decode a response without special tokens, except the marks of thoughts, which are special in some tokenizers."""
    marks = "".join(map("".join, MARKS))
    dropped = {i for i in tokenizer.all_special_ids if tokenizer.convert_ids_to_tokens(i) not in marks}
    kept = [token_id for token_id in ids if token_id not in dropped]
    return tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def check_thinking_mode(tokenizer: "PreTrainedTokenizerBase", flag: str, way_out: str = "leave it out") -> None:
    """
    Raise `ValueError`, naming `flag` and `way_out`, for a chat template without thinking mode.

    A template has one if `enable_thinking` changes its prompt, or if its prompt ends in an open thought. If it names
    the marks for earlier turns only, the model may answer without a thought, and each such answer would count as cut
    off.
    """
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "?"}], add_generation_prompt=True, tokenize=False, enable_thinking=thinking
        )
        for thinking in (True, False)
    ]
    ends_in_thought = any(prompts[0].rstrip().endswith(start) for start, _ in MARKS)
    if prompts[0] == prompts[1] and not ends_in_thought:
        raise ValueError(
            f"--{flag}: the chat template of {tokenizer.name_or_path} has no thinking mode to switch on, so that a "
            f"response without a thought would count as cut off; {way_out}"
        )


def freeze_date(tokenizer: "PreTrainedTokenizerBase", date: str | None) -> str | None:
    """
    Write a date into a chat template that asks for the present one, so that a run has the same prompts on each day.

    Args:
        date: as in "2026-01-31"; `None` for today.

    Returns:
        The date, or `None` for a template without one.
    """
    if not isinstance(tokenizer.chat_template, str) or DATE_CALL.search(tokenizer.chat_template) is None:
        return None
    day = datetime.date.today() if date is None else datetime.date.fromisoformat(date)
    tokenizer.chat_template = DATE_CALL.sub(lambda call: repr(day.strftime(call[2])), tokenizer.chat_template)
    return day.isoformat()
