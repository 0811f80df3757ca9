"""What chat templates differ in: the thinking mode, the marks around a thought, the present date."""

import datetime
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the grading workers import this module, and transformers takes seconds
    from transformers import PreTrainedTokenizerBase

# Start and end of a thought; the answer follows the end. Qwen3, DeepSeek-R1 and most others; Gemma 4; gpt-oss;
# Magistral; Seed-OSS; Command A; Kimi
MARKS = (
    ("<think>", "</think>"),
    ("<|channel>thought", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
)
STARTS, ENDS = (re.compile("|".join(map(re.escape, marks))) for marks in zip(*MARKS, strict=True))
DATE_CODES = ["%-d", "%-m", "%e", *(f"%{code}" for code in "aAwdbBmyYHIpMSfzZjUWcxXGuV")]  # of strftime


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


def check_thinking_mode(tokenizer: "PreTrainedTokenizerBase", thinking: bool, on: str, off: str) -> None:
    """
    Raise `ValueError` where a chat template does not have the thinking mode that was asked for.

    A template has one if `enable_thinking` changes its prompt, or if its prompt ends in an open thought. If it names
    the marks for earlier turns only, the model may answer without a thought, and each such answer would count as cut
    off. With marks that are not known here, all answers would. If a thought is open without thinking mode, too, what
    is written in an unfinished one would count as answer.

    Args:
        thinking: the mode.
        on, off: the flags that switch it on and off, for messages.
    """
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "?"}], add_generation_prompt=True, tokenize=False, enable_thinking=mode
        )
        for mode in (True, False)
    ]
    has_open_thought = [any(prompt.rstrip().endswith(start) for start, _ in MARKS) for prompt in prompts]
    name = f"the chat template of {tokenizer.name_or_path}"
    if not thinking:
        if has_open_thought[1]:
            raise ValueError(f"--{off}: {name} opens a thought all the same; use --{on}")
        return
    if prompts[0] == prompts[1] and not has_open_thought[0]:
        raise ValueError(
            f"--{on}: {name} has no thinking mode to switch on, so that a response without a thought would count as "
            f"cut off; use --{off}"
        )
    words = (tokenizer.get_chat_template(), *tokenizer.get_added_vocab())
    if not any(mark in word for _, mark in MARKS for word in words):
        raise ValueError(
            f"--{on}: neither {name} nor its vocabulary has one of the marks that end a thought, as far as they are "
            f"known here ({', '.join(end for _, end in MARKS)}), so that no answer would be found; use --{off}"
        )


def freeze_date(tokenizer: "PreTrainedTokenizerBase", date: str | None) -> str | None:
    """
    Write a date into a chat template that asks for the present one, so that a run has the same prompts on each day.

    Args:
        date: as in "2026-01-31"; `None` for today.

    Returns:
        The date, or `None` for a template without one.
    """
    template = tokenizer.chat_template
    if template is None or "strftime_now" not in str(template):
        return None
    day = datetime.date.today() if date is None else datetime.date.fromisoformat(date)
    # A macro hides the function of the same name from all calls, whatever their format is made of
    replaced = "".join(f".replace({code!r}, {day.strftime(code)!r})" for code in DATE_CODES)
    macro = f"{{%- macro strftime_now(format) -%}}{{{{ format{replaced} }}}}{{%- endmacro -%}}"
    if isinstance(template, str):
        tokenizer.chat_template = macro + template
    else:  # several, by their names
        tokenizer.chat_template = {name: macro + text for name, text in template.items()}
    return day.isoformat()
