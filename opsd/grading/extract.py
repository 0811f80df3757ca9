r"""The answer of a response or of a row of data, as text."""

import math

import numpy as np
import regex as re  # for balanced braces

from opsd.thinking import after_thought

EXTRACT_METHODS = ("final", "release", "last_number")

Answer = str | int | float | np.number | None

BOX = re.compile(
    r"\\(?:boxed|f(?:rame)?box)(?![a-zA-Z])\s*"
    r"(?:\{((?:\\.|[^{}\\]|\{(?1)\})*+)\}|((?:\\[a-zA-Z]+(?:\{[^{}]*\})*|[^\s{}$\\])+))",
    re.DOTALL,
)
RELEASE_BOX = re.compile(r"\\boxed\{((?:[^{}]|\{(?1)\})*+)\}")
BETWEEN = re.compile(r"(?:[\s$,;]|\\[()\[\],;: ]|\\q?quad|\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b|[\w{}]+\s*=)*")
NUMBER = re.compile(r"(?:(?<!\d)-)?\d+(?:,\d{3})*(?:\.\d+)?(?!\d)")
TRAILING_SPACE = re.compile(r"(?:(?<!\\)\\[ ,;:!]|\s)+$")


def answer_text(value: Answer) -> str | None:
    """
    Return a reference answer as text; `None` and NaN, which mark a missing answer, give `None`.

    A whole number loses its decimal point (`25.0` is `"25"`). What was a float32 on its way keeps the digits that it
    was written with: `0.10000000149011612` is `"0.1"`.

    Raises:
        TypeError: for anything but text and numbers.
        ValueError: for a float that stands for several whole numbers (float64: 2**53 or more, float32: 2**24 or more).
    """
    if value is None:
        return None
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return str(int(value))
    if not isinstance(value, (str, float, np.floating)):
        raise TypeError(f"an answer is text or a number, not {type(value).__name__}: {value!r}; write it as text")
    if not isinstance(value, str):
        if math.isnan(value):
            return None
        digits = np.finfo(type(value)).nmant + 1
        if math.isfinite(value) and abs(float(value)) >= 2**digits:
            raise ValueError(f"the answer {value!r} is a float of 2**{digits} or more, not exact; write it as text")
        value = str(int(value)) if math.isfinite(value) and value == int(value) else str(value)
    is_float32 = re.fullmatch(r"-?\d+\.\d{14,}", value) is not None and float(np.float32(value)) == float(value)
    return str(np.float32(value)) if is_float32 else value


def extract_answer(text: str, thinking: bool = False, method: str = "final") -> str | None:
    r"""
    Return the final answer of a response, stripped, or `None` if there is none.

    `final`: the last complete, non-empty `\boxed{...}`, `\boxed {...}`, `\boxed 7`, `\fbox{...}` or `\framebox{...}`
    after the last thought; of nested boxes the innermost. Boxes of one line with only commas, `and`, `or` and the
    like between them form one list. `release`, as the released evaluation is understood: the last `\boxed{` of the
    whole response, thoughts included, up to the brace that closes it; escaped braces count as braces. `last_number`:
    the last number after the last thought, in a box or not: for models that do not know of boxes.

    Args:
        text: the response, without its prompt.
        thinking: it was sampled in thinking mode, so that without the end of a thought it has no answer; not for
            `release`.
        method: one of `EXTRACT_METHODS`.

    Raises:
        ValueError: for an unknown method.
    """
    if method not in EXTRACT_METHODS:
        raise ValueError(f"extraction method {method!r}: must be one of {', '.join(EXTRACT_METHODS)}")
    if method == "release":
        match = RELEASE_BOX.match(text, max(0, text.rfind(r"\boxed{")))
        return None if match is None else match[1].strip()
    answer = after_thought(text, thinking)
    if answer is None:
        return None
    text = answer
    if method == "last_number":
        numbers = NUMBER.findall(text)
        return numbers[-1] if numbers else None
    boxes: list[str] = []
    limit = start_of_next = len(text)
    for match in reversed(list(BOX.finditer(text, overlapped=True))):
        if match.end() > limit:  # around a box that has been read
            continue
        between = text[match.end() : start_of_next]
        if boxes and ("\n" in between or len(between) > 60 or not BETWEEN.fullmatch(between)):
            break
        content = match[2].rstrip(".,;:)") if match[2] else TRAILING_SPACE.sub("", match[1]).strip()
        if content:
            boxes.insert(0, content)
            limit = start_of_next = match.start()
    return ", ".join(dict.fromkeys(boxes)) or None
