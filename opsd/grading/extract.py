r"""The answer of a response or of a row of data, as text."""

import math
import re

import numpy as np

EXTRACT_METHODS = ("final", "release")

Answer = str | int | float | None

BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])\s*(?:(\{)|((?:\\[a-zA-Z]+(?:\{[^{}]*\})*|[^\s{}$\\])+))")
BETWEEN_BOXES = re.compile(
    r"(?:[\s$,;]|\\[()\[\],;: ]|\\q?quad|\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b|[\w{}]+\s*=)*"
)
TRAILING_SPACE = re.compile(r"(?:(?<!\\)\\[ ,;:!]|\s)+$")


def answer_text(value: Answer) -> str | None:
    """
    Return a reference answer as text; `None` and NaN, which mark a missing answer, give `None`.

    A whole number loses its decimal point (`25.0` is `"25"`). A float32 has the digits that it was written with (`"0.1"`).

    Raises:
        TypeError: for anything but text and numbers.
        ValueError: for a float that stands for several whole numbers (float64: 2**53 or more, float32: 2**24 or more).
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return str(int(value))
    if not isinstance(value, (float, np.floating)):
        raise TypeError(f"an answer is text or a number, not {type(value).__name__}: {value!r}; write it as text")
    if math.isnan(value):
        return None
    digits = np.finfo(type(value)).nmant + 1
    if math.isfinite(value) and abs(float(value)) >= 2**digits:
        raise ValueError(f"the answer {value!r} is a float of 2**{digits} or more, not exact; write it as text")
    return str(int(value)) if value == np.round(value) and math.isfinite(value) else str(value)


def _closing_brace(text: str, start: int) -> int | None:
    r"""Return the index of the brace that closes the one at `start`, or `None`. `\{` and `\}` do not count."""
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0 and match[0] == "}":
            return match.start()
    return None


def extract_answer(text: str, thinking: bool = False, method: str = "final") -> str | None:
    r"""
    Return the final answer of a response, stripped, or `None` if there is none.

    `final`: the last complete, non-empty `\boxed{...}`, `\boxed {...}`, `\boxed 7`, `\fbox{...}` or `\framebox{...}`
    after the last `</think>`. Of nested boxes the innermost counts. Boxes of one line that are separated only by
    commas, `and`, `or` and the like form one list, joined by commas.

    `release`: the last `\boxed{` of the whole response, thoughts included, up to the brace that closes it. Escaped
    braces count as braces. This is how the released evaluation is understood.

    Args:
        text: the response, without its prompt.
        thinking: True if the response was sampled in thinking mode. Without a `</think>` it was then cut off before
            its answer. `release` ignores this.
        method: one of `EXTRACT_METHODS`.

    Raises:
        ValueError: for an unknown method.
    """
    if method not in EXTRACT_METHODS:
        raise ValueError(f"extraction method {method!r}: must be one of {', '.join(EXTRACT_METHODS)}")
    if method == "release":
        start = text.rfind(r"\boxed{")
        end = _closing_brace(re.sub(r"\\(?=[{}])", " ", text), start + len(r"\boxed")) if start >= 0 else None
        return None if end is None else text[start + len(r"\boxed{") : end].strip()
    _, end_of_thought, text = text.rpartition("</think>")
    if not end_of_thought and (thinking or "<think>" in text):
        return None
    boxes: list[str] = []
    limit = start_of_next = len(text)
    for match in reversed(list(BOX.finditer(text))):
        end = _closing_brace(text, match.start(1)) if match[1] else match.end()
        if end is None or end > limit:  # never closed, or around a box that has been read
            continue
        between = text[end + len(match[1] or "") : start_of_next]
        if boxes and ("\n" in between or len(between) > 60 or not BETWEEN_BOXES.fullmatch(between)):
            break
        content = TRAILING_SPACE.sub("", text[match.end() : end]).strip() if match[1] else match[2].rstrip(".,;:)")
        if content:
            boxes.insert(0, content)
            limit = start_of_next = match.start()
    return ", ".join(dict.fromkeys(boxes)) or None
