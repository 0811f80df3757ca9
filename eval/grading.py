r"""Grading of mathematical answers: the final \boxed{} of a response, and its comparison with the reference answer."""

import math
import re
import threading

from math_verify import parse, verify

BOX_START = re.compile(r"\\boxed\s*\{")
INTEGER = re.compile(r"([+-]?)0*(\d+)")
SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")  # not between two digits: "1 2" is not 12
COMPARISON_SECONDS = 5  # for each parse and each comparison, where a time limit is possible


def answer_text(value: str | int | float | None) -> str | None:
    """
    A reference answer as text: whole numbers lose their decimal point (`25.0` is `"25"`), `nan` and `None` are `None`.

    Raises:
        TypeError: for anything but text and numbers.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"an answer is text or a number, not {type(value).__name__}: {value!r}")
    if math.isnan(value):
        return None
    return str(int(value)) if math.isfinite(value) and value == int(value) else str(value)


def _braced(text: str, start: int) -> str | None:
    r"""What stands in the braces that open at `start`; `None` if they never close. `\{` and `\}` do not count."""
    depth = 0
    position = start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1  # the character behind a backslash is part of a command
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[start + 1 : position]
        position += 1
    return None


def extract_answer(text: str, thinking: bool = False) -> str | None:
    r"""
    The final answer of a response: the last complete, non-empty `\boxed{...}` behind the last `</think>`.

    Args:
        text: the response, without its prompt.
        thinking: the response was sampled in thinking mode, so that without a `</think>` it was cut off before it
            came to an answer.

    Returns:
        What stands in the box, stripped; `None` if there is no answer.
    """
    _, end_of_thought, answer_part = text.rpartition("</think>")
    if thinking and not end_of_thought:
        return None
    for match in reversed(list(BOX_START.finditer(answer_part))):
        content = _braced(answer_part, match.end() - 1)
        if content is not None and content.strip():
            return content.strip()
    return None


def normalise(answer: str) -> str:
    """`answer` without spaces (but for those between two digits); plain integers without `+` and leading zeros."""
    answer = SPACE.sub("", answer.strip())
    if integer := INTEGER.fullmatch(answer):
        sign, digits = integer.groups()
        return "-" + digits if sign == "-" and digits != "0" else digits
    return answer


def is_equal(prediction: str | None, gold: str | None) -> bool:
    """
    Whether two answers are mathematically the same.

    Equal after `normalise` is equal; two plain integers need no more than that; all else goes to math-verify, with a
    time limit of `COMPARISON_SECONDS` per step (an answer that exceeds it is not equal). Its limit rests on a signal,
    which only the main thread can set: in other threads there is none.

    Args:
        prediction: the extracted answer; `None`, where there was none, equals nothing.
        gold: the reference answer.
    """
    if prediction is None or gold is None:
        return False
    texts = normalise(prediction), normalise(gold)
    if texts[0] == texts[1]:
        return texts[0] != ""
    if all(INTEGER.fullmatch(text) for text in texts):
        return False
    limit = COMPARISON_SECONDS if threading.current_thread() is threading.main_thread() else None
    # As LaTeX mathematics: without the dollars, math-verify takes a single number out of an expression.
    parsed_gold, parsed_prediction = (parse(f"${answer}$", parsing_timeout=limit) for answer in (gold, prediction))
    return verify(parsed_gold, parsed_prediction, timeout_seconds=limit)
