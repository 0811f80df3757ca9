r"""
Grading of mathematical answers: the final \boxed{} of a response, and its comparison with the reference answer.

    python eval/grading.py --pairs FILE.jsonl
    python eval/grading.py --responses FILE.jsonl --thinking

read lines with `pred` and `gold`, or `response` and `gold` (text, numbers or null; optional: `answer_type`), and write
one JSON line for each, in order: `equal`, `status` and `seconds` of its `Verdict`, for responses also `extracted`.
"""

import argparse
import atexit
import contextlib
import functools
import itertools
import json
import logging
import math
import os
import queue
import random
import re
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import mpmath
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from math_verify import parse, verify
from math_verify.grader import should_treat_as_complex
from sympy import Basic, Expr, MatrixBase, Rational

EXTRACT_METHODS = ("final", "release")
GRADERS = ("strict", "legacy")
START_SECONDS = 600  # enough for a worker's imports on any machine
STANDSTILL = 20  # a worker whose answer takes so many times its limit without using a processor is ended, too

Answer = str | int | float | None


@dataclass(frozen=True)
class Verdict:
    r"""
    The comparison of a prediction with a reference answer.

    Attributes:
        equal: whether they are the same; `None` for status `ungraded` only.
        status: how that was decided.
            `exact`, `integer`, `rational`: by the text alone, as the same text, as whole numbers or as fractions;
            `number`: values, exact or to a precision that grows with the numbers in them;
            `expression`: values at several points for the variables;
            `text`: words, or what cannot be read as mathematics and is not the same text;
            `unit`: two units or moduli that contradict each other;
            `set`, `tuple`: element by element, in any order or in order; an interval is a tuple;
            `kind`: one is a number and the other is not, a set and the other a tuple, and the like;
            `math_verify`: by math-verify's `verify`;
            `no_answer`, `no_gold`: there is no prediction, or no reference answer (not equal);
            `too_large`: numbers or texts beyond `MAX_BITS`, `MAX_CHARACTERS` or `MAX_DEPTH` (not equal);
            `timeout`, `memory`, `crashed`: the worker was ended at its time limit, reached its memory limit, or
            ended for another reason (not equal);
            `ungraded`: a reference answer of type `description` that is not one mathematical expression;
            `legacy`: by the legacy grader.
        seconds: the processor time that it took.
    """

    equal: bool | None
    status: str
    seconds: float


def answer_text(value: Answer) -> str | None:
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


# ---- Extraction ----

BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*(?:(\{)|((?:\\[a-zA-Z]+(?:\{[^{}]*\})*|[^\s{}$\\])+))")
BETWEEN_BOXES = re.compile(
    r"(?:[\s$,;]|\\[()\[\],;: ]|\\q?quad|\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b|[\w{}]+\s*=)*"
)


def _closing(text: str, start: int) -> int | None:
    r"""Where the brace that opens at `start` closes; `None` if it never does. `\{` and `\}` do not count."""
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0 and match[0] == "}":
            return match.start()
    return None


def extract_answer(text: str, thinking: bool = False, method: str = "final") -> str | None:
    r"""
    The final answer of a response.

    `final`: behind the last `</think>`, the last complete, non-empty `\boxed{...}`, `\boxed {...}`, `\boxed 7` or
    `\fbox{...}`; of nested boxes the innermost. Boxes of one line with nothing but a comma, `and`, `or` and the like
    between them are one list, joined by commas.

    `release`, what the release is taken to do: the last `\boxed{` of the whole response, thoughts included, up to the
    brace that closes it; escaped braces count as braces.

    Args:
        text: the response, without its prompt.
        thinking: the response was sampled in thinking mode, so that without a `</think>` it was cut off before it
            came to an answer; `release` ignores it.
        method: one of `EXTRACT_METHODS`.

    Returns:
        What stands in the box, stripped; `None` if there is no answer.

    Raises:
        ValueError: for an unknown method.
    """
    if method not in EXTRACT_METHODS:
        raise ValueError(f"extraction method {method!r}: must be one of {', '.join(EXTRACT_METHODS)}")
    if method == "release":
        start = text.rfind(r"\boxed{")
        end = _closing(re.sub(r"\\(?=[{}])", " ", text), start + len(r"\boxed")) if start >= 0 else None
        return None if end is None else text[start + len(r"\boxed{") : end].strip()
    _, end_of_thought, text = text.rpartition("</think>")
    if not end_of_thought and (thinking or "<think>" in text):
        return None
    boxes: list[str] = []
    limit = start_of_next = len(text)
    for match in reversed(list(BOX.finditer(text))):
        end = _closing(text, match.start(1)) if match[1] else match.end()
        if end is None or end > limit:  # never closed, or around a box that has been read
            continue
        between = text[end + len(match[1] or "") : start_of_next]
        if boxes and ("\n" in between or len(between) > 60 or not BETWEEN_BOXES.fullmatch(between)):
            break
        content = text[match.end() : end].strip() if match[1] else match[2].rstrip(".,;:)")
        if content:
            boxes.insert(0, content)
            limit = start_of_next = match.start()
    return ", ".join(dict.fromkeys(boxes)) or None


# ---- Reading: the structure of an answer ----

MAX_CHARACTERS = 1000  # of an answer that is to be parsed, each run of digits counted as one
MAX_DEPTH = 25  # of nested brackets
MAX_ELEMENTS = 200  # of a set that is given by a rule

UNICODE = str.maketrans(
    {
        **{"−": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty "},
        **{"≤": r"\le ", "≥": r"\ge ", "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∈": r"\in ", "≈": r"\approx "},
        **{"√": r"\sqrt ", "∛": r"\sqrt[3] ", "°": r"^\circ ", "∅": r"\emptyset ", "…": r"\ldots ", "θ": r"\theta "},
        **{"½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3", "\u00a0": " ", "\u202f": " "},
    }
)
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
REWRITES = [  # in this order
    (r"[,;.]?\s*\$?\s*(?:\\text\s*\{)?\s*\bwhere\b.*", ""),  # an explanation of what the answer has said
    (r"(?<!\\)\\[()\[\]]|\\?\$|[€£¥]", " "),  # marks of mathematics and of currencies
    (r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])\s*\.?|\\(?:display|text)style(?![a-zA-Z])|\\!", ""),
    (r"\\(?:math(?:rm|bf|it|sf)|[mh]box|text(?:rm|bf|it|sf|tt|normal))(?![a-zA-Z])", r"\\text"),
    (r"(?<=\d)(?:\{,\}|\\[,;: ]|~)(?=\d{3}(?!\d))", ","),  # thousands separators
    (r"(?<!\\)\\(?:[,;: ]|q?quad(?![a-zA-Z]))|~|\s", " "),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\[dt]binom", r"\\binom"),
    (r"\\operatorname\s*\{\s*([a-z]+)\s*\}", r"\\\1 "),
    (r"\\(?:leq?slant|leqq?)(?![a-zA-Z])|<=", r"\\le "),
    (r"\\(?:geq?slant|geqq?)(?![a-zA-Z])|>=", r"\\ge "),
    (r"\\lt(?![a-zA-Z])", "<"),
    (r"\\gt(?![a-zA-Z])", ">"),
    (r"\\(?:mid|[lr]?vert)(?![a-zA-Z])", "|"),
    (r"\\(?:[lc]?dots[bc]?|ldots)(?![a-zA-Z])|\.\.\.", r"\\ldots "),
    (r"\\lbrace(?![a-zA-Z])", r"\\{"),
    (r"\\rbrace(?![a-zA-Z])", r"\\}"),
    (r"\\varnothing|\\\{\s*\\\}", r"\\emptyset "),
    (r"\^\s*\{?\s*(?:\\circ|\\degree)\s*\}?|\\degree", r"^\\circ "),
    (r"\\text\s*\{\s*,?\s*(and|or)\s*,?\s*\}", r" \1 "),
    (r"(?<![a-zA-Z\\])infinity(?![a-zA-Z])", r"\\infty "),
    (r"(?<![a-zA-Z\\])(pi|sqrt|sin|cos|tan|ln|log|exp)(?![a-zA-Z])", r"\\\1 "),
    (r"\*\*", "^"),
    (r"\*", r"\\cdot "),
    (r"(\d)[eE]([+-]?\d+)(?!\w)", r"\1\\cdot 10^{\2}"),
    (r"(?<![\d.])(\d+) +(\d+)/(\d+)(?!\d)", r"\1\\frac{\2}{\3}"),
]
REWRITES = [(re.compile(pattern, re.DOTALL), replacement) for pattern, replacement in REWRITES]
ENVIRONMENT = re.compile(r"\\(?:begin|end)\{(?:aligned|align\*?|gathered|split|equation\*?)\}|&")
PREFIX = re.compile(
    r"(?:\\text\s*\{[a-zA-Z ]*(?::|\bis)\s*\}|[a-zA-Z ]*(?:[a-zA-Z]{2}:|\bis ))\s*:?(?=.)"
)  # "Answer: "
ARGUMENTS = re.compile(r"\\(?:(frac|binom)|sqrt\s*(?:\[[^\[\]]*\])?)(?![a-zA-Z])")
ARGUMENT = re.compile(r"\s*(\{|\\[a-zA-Z]+|[^\s\\{}()\[\]])")
PRODUCT = re.compile(r"((?<![\w.^])\d[\d.]*|\)) *(?=[({])|\) *(?=\d|\\frac)")  # the parser reads "3(1/2)" as 3.5
SEPARATOR = re.compile(r"[,;]|\bor\b|\band\b|\\(?:cup|lor|vee)(?![a-zA-Z])")
PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![a-zA-Z])")
APPROXIMATELY = re.compile(r"\\approx(?![a-zA-Z])")
TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
RELATION = re.compile(r"\\(?:equiv|le|ge|in)(?![a-zA-Z])|:?=|[<>]")
THOUSANDS = re.compile(r"(?<![\d.,])([1-9]\d{0,2}(?:,\d{3})+)(?![\d,])")
MIRRORED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
OPENING, CLOSING = {"<": "(", r"\le": "["}, {"<": ")", r"\le": "]"}
INTEGER = re.compile(r"([+-]?)0*(\d+)")
RATIONAL = re.compile(r"([+-]?)(?:(\d+(?:\.\d*)?|\.\d+)|(\d+)/(\d+)|\\[dtc]?frac\{(\d+)\}\{(\d+)\})")
SPACE = re.compile(r"(\\[a-zA-Z]+\s(?=[a-zA-Z])|\d\s+(?=\d))|\s+")  # but for those that mean something: \pi r, 1 2
INFINITE = re.compile(r"\binfinit(?:e|ely|y)\b", re.IGNORECASE)
NOT_INFINITE = re.compile(r"\d|\b(?:not?|non|never|finite|finitely)\b|n't", re.IGNORECASE)
WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}")
PERCENT = re.compile(r"\s*(?:\\?%|percent|\\text\s*\{\s*percent\s*\})$")
UNIT = re.compile(
    r"\s*(?:\\text\s*\{\s*(?P<text>[a-zA-Z][a-zA-Z .]*)\}|(?<=[\d})])\s+(?P<plain>[a-zA-Z]{2}[a-zA-Z .]*)"
    r"|(?P<degree>\^\\circ)|(?<=\d)_\{?(?P<base>\d+)\}?)\s*(?P<power>\^\s*\{?\s*[23]\s*\}?)?$"
)
# A unit is one to three words behind a number, of which none changes what is said of the number.
NO_UNIT = re.compile(
    r"\b(?:an?|all|and|any|are|as|at|both|by|cannot|each|else|even|every|except|exactly|few|fewer|for|from|if|in|is|"
    r"least|less|many|max|maximum|maybe|min|minimum|mod|modulo|more|most|non?|none|not|odd|of|on|only|or|other|over|"
    r"prime|some|such|than|that|the|then|times|to|twice|unless|up|when|with|without|dozen|half|hundred|thousand|"
    r"[mbtr]+illion|percent|pct)\b"
)


class _TooLargeError(Exception):
    """A text, a number or a range that no time limit should be spent on."""


@dataclass(frozen=True)
class _Answer:
    """
    An answer as it was read: a `value` (`text`), a `set` or a `tuple` (`items`), or a `relation` without a value.
    """

    kind: str
    text: str = ""
    items: tuple["_Answer", ...] = ()
    brackets: str = ""  # of a tuple or an interval; of a set that stands in braces "{}"
    name: str = ""  # what stands left of "=", or in the middle of an inequality
    relation: str = ""  # all of it, where it is an equation or an inequality
    unit: str = ""
    percent: bool = False


def _clean(text: str) -> str:
    """`text` in one notation: LaTeX without delimiters, sizes and spacing commands."""
    if r"\boxed" in text or r"\fbox" in text:
        text = extract_answer(text) or text
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda match: f"^{{{match[0].translate(SUPERSCRIPTS)}}}", text)
    text = text.translate(UNICODE)
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    if not re.search("matrix|array|cases", text):
        text = ENVIRONMENT.sub("", text).replace(r"\\", ";")
    if INFINITE.search(text) and not NOT_INFINITE.search(text):
        return r"\infty"
    return text.strip(" .,;:")


def _pairs(text: str) -> dict[int, int]:
    """Where each bracket of `text` closes, by where it opens; empty if they do not match. Intervals mix ( and [."""
    pairs, opened = {}, []
    for position, character in enumerate(text):
        if character in "([{":
            opened.append(position)
        elif character in ")]}":
            if not opened or (text[opened[-1]] == "{") != (character == "}"):
                return {}
            pairs[opened.pop()] = position
    return {} if opened else pairs


def _split(text: str, separator: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """The parts of `text` between the separators outside of all brackets, and these separators."""
    parts, found, depth, last, position = [], [], 0, 0, 0
    while position < len(text):
        match = separator.match(text, position) if depth == 0 else None
        if match:
            parts.append(text[last:position].strip())
            found.append(match[0])
            last = position = match.end()
        else:
            depth += (text[position] in "([{") - (text[position] in ")]}")
            position += 1
    return [*parts, text[last:].strip()], found


def _brace_arguments(text: str) -> str:
    r"""`\frac12` as `\frac{1}{2}`, `\sqrt(x)` and `x^(y)` with braces, `\binom{n}{k}` as the factorials that it is."""
    for match in reversed(list(re.finditer(r"(?:\\sqrt|\^)\s*(?=\()", text))):
        end = _pairs(text)[match.end()]
        text = f"{text[: match.end()]}{{{text[match.end() + 1 : end]}}}{text[end + 1 :]}"
    for match in reversed(list(ARGUMENTS.finditer(text))):
        position, arguments = match.end(), []
        for _ in range(2 if match[1] else 1):
            argument = ARGUMENT.match(text, position)
            if argument is None:
                return text  # no LaTeX: left to the parser to refuse
            if argument[1] == "{":
                end = _pairs(text)[argument.start(1)] + 1
                arguments.append(text[argument.end() : end - 1])
                position = end
            else:
                arguments.append(argument[1])
                position = argument.end()
        n, k = arguments if match[1] else (arguments[0], "")
        if match[1] == "binom":
            command = rf"(\frac{{({n})!}}{{({k})!(({n})-({k}))!}})"
        else:
            command = match[0].replace(" ", "") + "".join(f"{{{argument}}}" for argument in arguments)
        text = text[: match.start()] + command + text[position:]
    return text


def _is_name(text: str) -> bool:
    r"""Whether `text` can stand left of an answer, as in `x=5`, `f(2)=5`, `m+n=5`, unlike that of `2x=5` or `x^2=5`."""
    if re.search(r"[\^<>]|\\(?:sqrt|infty|pi|pm)(?![a-zA-Z])|^[+-]", text):
        return False
    outside = re.sub(r"_(?:\{[^{}]*\}|\w)|\([^()]*\)", "", text)
    return re.search("[a-zA-Z]", text) is not None and re.search(r"\d", outside) is None


def _read(text: str, thousands: bool) -> _Answer:
    """The structure of a cleaned answer; `thousands`: read 1,234 as one number and not as two."""
    if thousands:
        text = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    while text[:1] in ("(", "{") and _pairs(text).get(0) == len(text) - 1:
        inner = text[1:-1].strip()
        if text[0] == "(" and len(_split(inner, SEPARATOR)[0]) > 1:
            break
        text = inner
    parts, _ = _split(text, SEPARATOR)
    if r"\ldots" in parts[2:-1]:
        parts = _progression(parts)
    signs = [{r"\pm": "+", r"\mp": "-"}, {r"\pm": "-", r"\mp": "+"}]
    answers = []
    for part in parts:
        for sign in signs if PLUS_MINUS.search(part) else signs[:1]:
            answers.append(_read_one(PLUS_MINUS.sub(lambda match, sign=sign: sign[match[0]], part), thousands))
    return answers[0] if len(answers) == 1 else _Answer("set", items=tuple(answers))


def _progression(parts: list[str]) -> list[str]:
    r"""`0, 2, 4, \ldots, 30` written out, where it is an arithmetic progression of integers."""
    *head, dots, last = parts
    if dots != r"\ldots" or len(head) < 2 or not all(INTEGER.fullmatch(part) for part in [*head, last]):
        return parts
    numbers = [int(part) for part in head]
    step = numbers[1] - numbers[0]
    if step == 0 or (int(last) - numbers[0]) % step or not 0 <= (int(last) - numbers[0]) // step < MAX_ELEMENTS:
        return parts
    written_out = range(numbers[0], int(last) + step, step)
    return [str(number) for number in written_out] if numbers == [*written_out[: len(numbers)]] else parts


def _rule(inner: str) -> list[str] | None:
    r"""The elements of `\{2k : 0 \le k \le 15\}`: values of a rule at all integers of a range."""
    (rule, *conditions), _ = _split(inner, re.compile(r"[:|]"))
    if len(conditions) != 1:
        return None
    ranges = [_interval(*_split(part, RELATION)) for part in _split(conditions[0], SEPARATOR)[0]]
    bounds = [item for found in ranges if found for item in found.items]
    if len(ranges) - ranges.count(None) != 1 or not all(INTEGER.fullmatch(bound.text) for bound in bounds):
        return None
    interval = next(found for found in ranges if found)
    low, high = (int(bound.text) for bound in bounds)
    numbers = range(low + (interval.brackets[0] == "("), high + (interval.brackets[1] == "]"))
    if len(numbers) > MAX_ELEMENTS or not re.fullmatch("[a-zA-Z]", interval.name):
        return None
    return [re.sub(rf"(?<![a-zA-Z\\]){interval.name}(?![a-zA-Z])", f"({number})", rule) for number in numbers]


def _interval(parts: list[str], relations: list[str]) -> _Answer | None:
    r"""`x<2` as `(-\infty,2)` and `1\le x<2` as `[1,2)`; `None` where it is no inequality between a name and values."""
    if not relations or len(relations) > 2 or any(relation not in MIRRORED for relation in relations):
        return None
    if relations[0] in (">", r"\ge"):  # read from right to left
        parts, relations = parts[::-1], [MIRRORED[relation] for relation in relations[::-1]]
    if any(relation in (">", r"\ge") for relation in relations):
        return None
    names = [_is_name(part) for part in parts]
    if names == [True, False]:
        low, high, brackets, name = r"-\infty", parts[1], "(" + CLOSING[relations[0]], parts[0]
    elif names == [False, True]:
        low, high, brackets, name = parts[0], r"\infty", OPENING[relations[0]] + ")", parts[1]
    elif names == [False, True, False]:
        low, high, brackets, name = parts[0], parts[2], OPENING[relations[0]] + CLOSING[relations[1]], parts[1]
    else:
        return None
    return _Answer(
        "tuple", items=(_read_value(low), _read_value(high)), brackets=brackets, name=SPACE.sub(r"\1", name)
    )


def _read_one(text: str, thousands: bool) -> _Answer:
    """The structure of an answer without separators outside of brackets."""
    text = next(filter(None, _split(PREFIX.sub("", text), APPROXIMATELY)[0]), "")  # exact, where both are given
    parts, relations = _split(text, RELATION)
    if relations:
        if all(relation in ("=", ":=", r"\equiv", r"\in") for relation in relations):
            if _is_name(parts[0]):
                return replace(_read(parts[-1], thousands), name=SPACE.sub(r"\1", parts[0]), relation=text)
            return _Answer("relation", relation=text)
        return replace(_interval(parts, relations) or _Answer("relation"), relation=text)
    pairs = _pairs(text)
    if text.startswith(r"\{") and text.endswith(r"\}") and pairs.get(1) == len(text) - 1:
        inner = text[2:-2].strip()
        elements = _rule(inner)
        answer = _read(inner if elements is None else ",".join(elements), thousands)
        return replace(answer, brackets="{}") if answer.kind == "set" else answer
    if text[:1] in ("(", "[") and pairs.get(0) == len(text) - 1:
        parts, _ = _split(text[1:-1], SEPARATOR)
        if len(parts) > 1:
            items = tuple(_read(part, thousands) for part in parts)
            return _Answer("tuple", items=items, brackets=text[0] + text[-1])
    return _read_value(text)


def _read_value(text: str) -> _Answer:
    """A single value, with its unit."""
    unit, percent = "", PERCENT.search(text)
    if percent:
        text = text[: percent.start()]
    elif TRIGONOMETRIC.search(text):
        text = re.sub(r"(\d+(?:\.\d+)?)\s*\^\\circ", r"\\frac{\1\\pi}{180}", text)
    elif (match := UNIT.search(text)) and re.search(r"\d|\\pi", text[: match.start()]):
        words = match["text"] or match["plain"] or ("degree" if match["degree"] else f"base{match['base']}")
        if len(words.split()) <= 3 and not NO_UNIT.search(words.lower()):
            text, unit = text[: match.start()], re.sub(r"s\b|[\s.^{}]", "", words + (match["power"] or ""))
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
    while _pairs(text.strip()).get(0) == len(text.strip()) - 1 and text.strip()[0] in "({":
        text = text.strip()[1:-1]
    return _Answer(
        "value", SPACE.sub(r"\1", text.strip(" .,;:")).removeprefix("+"), unit=unit, percent=percent is not None
    )


# ---- Comparison ----

MAX_BITS = 2**17  # of an exact number, some 40,000 digits
MAX_MAGNITUDE = 2**14  # bits of a number before the point that is not exact
MAX_TERMS = 10_000  # of sums and products, together
POINTS = 12  # for the variables: integers, positive fractions and fractions in turn
PARSING = ConversionConfig(lowercase_symbols=False)
FUNCTIONS = (
    *("sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "acot", "sinh", "cosh", "tanh", "coth"),
    *("asinh", "acosh", "atanh", "sign", "gamma"),
)


class _UndefinedError(Exception):
    """An expression has no real value at a point."""


class _UnsupportedError(Exception):
    """An expression is none of numbers and variables only."""


class _Evaluation:
    """Values of parsed expressions at a point: `Fraction` where exact, else of mpmath, at a precision of so many bits."""

    def __init__(self, point: dict[str, Fraction], precision: int, double_factorials: bool):
        self.point = point
        self.double_factorials = double_factorials  # the parser reads n!! as (n!)!
        self.context = mpmath.mp.clone()
        self.context.prec = precision
        self.magnitude = 0  # bits before the point of the largest number so far, or of the inverse of the smallest
        self.terms = 0

    def value(self, node: Basic) -> Any:
        """
        The value of `node`, computed only while it stays small enough.

        Raises:
            _TooLargeError, _UndefinedError, _UnsupportedError
        """
        result = self._compute(node, type(node).__name__)
        if isinstance(result, self.context.mpc) and result.imag == 0:
            result = result.real
        if isinstance(result, Fraction):
            bits = result.numerator.bit_length() + result.denominator.bit_length()
            if bits > MAX_BITS:
                raise _TooLargeError
            self.magnitude = max(self.magnitude, bits)
        elif self.context.isnan(result):
            raise _UndefinedError
        elif result and not self.context.isinf(result):
            bits = self.context.mag(result)
            self.magnitude = max(self.magnitude, bits if type(node).__name__ == "Add" else abs(bits))  # a sum may be 0
        return result

    def _compute(self, node: Basic, kind: str) -> Any:
        context, arguments = self.context, node.args
        if node.is_Rational:
            return Fraction(int(node.p), int(node.q))
        if node.is_Float:
            return Fraction(str(node))
        if node.is_Symbol:
            if node.name in self.point:
                return self.point[node.name]
            if node.name == "i":
                return context.j
            raise _UnsupportedError  # bound, by an integral or a limit
        if kind in ("Infinity", "NegativeInfinity"):
            return context.inf if kind == "Infinity" else -context.inf
        if kind in ("Pi", "Exp1"):
            return +context.pi if kind == "Pi" else +context.e
        if kind in ("Sum", "Product"):
            return self._series(node, kind)
        if kind == "factorial" and self.double_factorials and type(arguments[0]).__name__ == "factorial":
            return self._factorial(self.value(arguments[0].args[0]), 2)
        values = [self.value(argument) for argument in arguments]
        if kind == "Add":
            return sum(self._alike(values))
        if kind == "Mul":
            return math.prod(self._alike(values))
        if kind == "Pow":
            return self._power(*values)
        if kind == "factorial":
            return self._factorial(*values, 1)
        if kind == "UnevaluatedExpr":
            return values[0]
        if kind == "Abs":
            return abs(values[0])
        if kind in ("Max", "Min", "floor", "ceiling") and any(
            isinstance(value, context.mpc) or context.isinf(value) for value in values
        ):
            raise _UndefinedError
        if kind in ("Max", "Min"):
            return (max if kind == "Max" else min)(self._alike(values))
        if kind in ("floor", "ceiling"):
            value, nearest = self._inexact(values[0]), context.nint(self._inexact(values[0]))
            if abs(value - nearest) < context.mpf(2) ** (-context.prec // 2):  # not below an integer by rounding alone
                return Fraction(int(nearest))
            return Fraction(int(context.floor(value) if kind == "floor" else context.ceil(value)))
        if not values:
            raise _UnsupportedError
        *values, last = [self._inexact(value) for value in values]
        if kind == "exp":
            return self._power(+context.e, last)
        if kind == "log" and last and all(values):
            return self._apply(context.log, *values, last)
        if kind in FUNCTIONS and abs(last) < MAX_BITS:
            return self._apply(getattr(context, kind), last)
        raise _UnsupportedError

    def _inexact(self, value: Any) -> Any:
        return self.context.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value

    def _alike(self, values: list[Any]) -> list[Any]:
        return values if all(isinstance(value, Fraction) for value in values) else [*map(self._inexact, values)]

    def _apply(self, function: Callable, *values: Any) -> Any:
        """The value of a function of mpmath, which at a point for real variables must be real."""
        try:
            result = function(*values)
        except (ValueError, ZeroDivisionError) as error:  # a pole
            raise _UndefinedError from error
        if self.point and self.context.im(result):
            raise _UndefinedError
        return result

    def _power(self, base: Any, exponent: Any) -> Any:
        if base == 0:
            if self.context.re(self._inexact(exponent)) <= 0:
                raise _UndefinedError
            return Fraction(0)
        bits = base.numerator.bit_length() if isinstance(base, Fraction) else abs(self.context.mag(base))
        if abs(base) != 1 and abs(self._inexact(exponent)) * max(1, bits) > MAX_BITS:
            raise _TooLargeError
        if isinstance(exponent, Fraction):
            if exponent.denominator == 1:
                return base ** int(exponent)
            if exponent.denominator % 2 and not self.context.im(self._inexact(base)) and base < 0:  # a real root
                root = self.context.power(-self._inexact(base), self._inexact(exponent))
                return -root if exponent.numerator % 2 else root
        return self._apply(self.context.power, self._inexact(base), self._inexact(exponent))

    def _factorial(self, n: Any, step: int) -> Any:
        if abs(n) > MAX_TERMS:
            raise _TooLargeError
        if isinstance(n, Fraction) and n.denominator == 1:
            if n < 0:
                raise _UndefinedError
            return Fraction(math.prod(range(int(n), 0, -step)))
        return self._apply(self.context.factorial if step == 1 else self.context.fac2, self._inexact(n))

    def _series(self, node: Basic, kind: str) -> Any:
        function, *limits = node.args
        if not limits:
            return self.value(function)
        *limits, (symbol, low, high) = limits
        low, high = self.value(low), self.value(high)
        if not all(isinstance(bound, Fraction) for bound in (low, high)):
            raise _UnsupportedError
        if low.denominator * high.denominator != 1:
            raise _UndefinedError
        inner = node.func(function, *limits) if limits else function
        values = []
        outer, self.terms = self.point, self.terms + int(max(0, high - low + 1))
        if self.terms > MAX_TERMS:
            raise _TooLargeError
        for number in range(int(low), int(high) + 1):
            self.point = {**outer, symbol.name: Fraction(number)}
            values.append(self.value(inner))
        self.point = outer
        return (sum if kind == "Sum" else math.prod)(self._alike(values))


@functools.lru_cache(maxsize=1024)
def _tree(text: str) -> Basic | MatrixBase | None:
    """The parsed, not evaluated expression; `None` if it cannot be read."""
    number = _rational(text)  # saves the parser seconds for long numbers
    if number is not None:
        return Rational(number.numerator, number.denominator)
    if re.search(r"mod|(?<![\w^])\d+\s+\d", text) or (not _pairs(text) and re.search(r"[()\[\]{}]", text)):
        return None
    text = PRODUCT.sub(lambda match: (match[1] or ")") + r"\cdot ", _brace_arguments(text))
    text = re.sub(r"(\\[a-zA-Z]+)(?=\d)", r"\1 ", text)  # the parser knows no "\lfloor2"
    if r"\int" not in text:
        text = re.sub(r"(?<![a-zA-Z\\])d(?=\\)", "{d}", text)  # to the parser, "d\pi" is a differential
    try:
        tree = latex2sympy(
            text,
            is_real=not should_treat_as_complex(text),
            convert_degrees=False,
            normalization_config=None,
            conversion_config=PARSING,
        )
    except MemoryError:
        raise
    except Exception:  # what the parser raises for text that is no mathematics, also from within sympy
        return None
    return tree if isinstance(tree, (Basic, MatrixBase)) else None


def _points(names: list[str]) -> Iterator[dict[str, Fraction]]:
    """Values for variables; the same at every call."""
    generator = random.Random(0)
    for number in range(POINTS if names else 1):
        if number % 3 == 0:
            values = map(Fraction, generator.sample(range(2, 12 + len(names)), len(names)))
        else:
            lowest = (-3000, 100)[number % 3 - 1]
            values = (Fraction(generator.randrange(lowest, 3000), 1009) for _ in names)
        yield dict(zip(names, values, strict=True))


def _equal_at(point: dict[str, Fraction], trees: list[Basic], double_factorials: bool) -> bool:
    precision, needed = 0, 400
    while needed > precision:
        precision = needed
        evaluation = _Evaluation(point, precision, double_factorials)
        values = [evaluation.value(tree) for tree in trees]
        if all(isinstance(value, Fraction) for value in values):
            return values[0] == values[1]
        if evaluation.magnitude > MAX_MAGNITUDE:
            raise _TooLargeError
        needed = 4 * evaluation.magnitude + 300
    prediction, gold = map(evaluation._inexact, values)
    if evaluation.context.isinf(prediction) or evaluation.context.isinf(gold):
        return prediction == gold
    return abs(prediction - gold) < evaluation.context.mpf(2) ** (-3 * evaluation.magnitude - 200)


def _same_expression(prediction: str, gold: str) -> tuple[bool, str]:
    trees = [_tree(prediction), _tree(gold)]
    if any(tree is None for tree in trees):
        return False, "text"
    if all(isinstance(tree, Expr) for tree in trees):
        names = sorted({symbol.name for tree in trees for symbol in tree.free_symbols} - {"i"})
        points, enough, too_large = 0, 3 if names else 1, False
        try:
            for point in _points(names):
                try:
                    if not _equal_at(point, trees, "!!" in prediction + gold):
                        return False, "expression" if names else "number"
                    points += 1
                except _UndefinedError:
                    continue
                except _TooLargeError:
                    too_large = True
            if points >= enough:
                return True, "expression" if names else "number"
            if too_large:
                raise _TooLargeError
        except _UnsupportedError:
            pass
    return verify(trees[1], trees[0], timeout_seconds=None), "math_verify"


def _same_value(prediction: _Answer, gold: _Answer) -> tuple[bool, str]:
    if prediction.unit and gold.unit and prediction.unit != gold.unit:
        return False, "unit"
    texts = prediction.text, gold.text
    if all(re.fullmatch("[a-zA-Z]{3,}", text) for text in texts):
        return texts[0].lower() == texts[1].lower(), "text"
    if texts[0] == texts[1] != "" and prediction.percent == gold.percent:
        return True, "exact"
    equal, status = _same_expression(*texts)
    if equal or prediction.percent == gold.percent:
        return equal, status
    # 50% is the same as 50 where the question asks for a percentage, but also as 0.5.
    return _same_expression(
        *(rf"\frac{{{answer.text}}}{{100}}" if answer.percent else answer.text for answer in (prediction, gold))
    )


def _same(prediction: _Answer, gold: _Answer) -> tuple[bool, str]:
    if prediction.relation and gold.relation and not prediction.name == gold.name != "":
        return _same_expression(prediction.relation, gold.relation)
    kinds = {prediction.kind, gold.kind}
    if kinds == {"value"}:
        return _same_value(prediction, gold)
    in_order = kinds == {"tuple"} and prediction.brackets == gold.brackets
    if kinds == {"set", "tuple"}:  # "(3, 4)" may be given as "3, 4", but not as a set in braces
        in_order = {prediction.brackets, gold.brackets} == {"", "()"}
    if not in_order and kinds != {"set"}:
        return False, "kind"
    status = "tuple" if "tuple" in kinds else "set"
    if len(prediction.items) != len(gold.items):
        return False, status
    remaining = list(gold.items)
    for item in prediction.items:
        candidates = remaining[:1] if in_order else [*filter(item.__eq__, remaining), *remaining]
        match = next((candidate for candidate in candidates if _same(item, candidate)[0]), None)
        if match is None:
            return False, status
        remaining.remove(match)
    return True, status


def _checked(text: str) -> str:
    """`text` cleaned; raises `_TooLargeError` for one that should not be parsed."""
    text = " ".join(text.split())
    pairs = _pairs(text)
    doubled = {
        position
        for start, end in pairs.items()
        if pairs.get(start + 1) == end - 1 and text[start] == text[start + 1] != "["
        for position in (start, end)
    }
    text = "".join(character for position, character in enumerate(text) if position not in doubled)
    if len(re.sub(r"\d+", "0", text)) > MAX_CHARACTERS:
        raise _TooLargeError
    text = _clean(text)
    depth = itertools.accumulate((character in "([{") - (character in ")]}") for character in text)
    if max(depth, default=0) > MAX_DEPTH:
        raise _TooLargeError
    return text


def _by_text(prediction: str | None, gold: str | None, answer_type: str | None) -> tuple[bool | None, str] | None:
    """What the text alone decides, in a time that is linear in its length; `None` if it does not."""
    if gold is None or not gold.strip():
        return False, "no_gold"
    if answer_type == "description" and WORD.search(_clean(gold)):
        return None, "ungraded"
    if prediction is None or not prediction.strip():
        return False, "no_answer"
    texts = [SPACE.sub(r"\1", text.strip()) for text in (prediction, gold)]
    if texts[0] == texts[1]:
        return True, "exact"
    if all(integers := [INTEGER.fullmatch(text) for text in texts]):
        signed = [(match[1] == "-" and match[2] != "0", match[2]) for match in integers]
        return signed[0] == signed[1], "integer"
    if None not in (rationals := [_rational(text) for text in texts]):
        return rationals[0] == rationals[1], "rational"
    return None


def _rational(text: str) -> Fraction | None:
    match = RATIONAL.fullmatch(text) if len(text) < sys.get_int_max_str_digits() else None
    if match is None:
        return None
    sign, *parts = match.groups()
    numerator, denominator = [*map(Fraction, filter(None, parts)), Fraction(1)][:2]
    return None if denominator == 0 else Fraction(f"{sign}1") * numerator / denominator


def _by_value(prediction: str, gold: str, answer_type: str | None) -> tuple[bool, str]:
    try:
        texts = _checked(prediction), _checked(gold)
        first = None
        for thousands in {"number": (True,), "set": (False,)}.get(answer_type, (True, False)):
            verdict = _same(*(_read(text, thousands) for text in texts))
            first = first or verdict
            if verdict[0] or not any(THOUSANDS.search(text) for text in texts):
                return verdict
        return first
    except _TooLargeError:
        return False, "too_large"


def grade(prediction: Answer, gold: Answer, *, grader: str = "strict", answer_type: str | None = None) -> Verdict:
    """
    Compare a prediction with a reference answer, in this process and without a limit on time and memory: what the
    workers of a `GradingPool` run.

    `strict`: the text first; then the structure of the answer is read (lists, sets, tuples, intervals, units,
    names as in `x=5`), and its values are parsed by math-verify's parser and compared as numbers, exactly or to a high
    precision, at several points if there are variables; what is neither goes to math-verify's `verify`. Decimals are
    exact: 0.333 is not 1/3.

    `legacy`, what the release is taken to do: math-verify's `parse` of both between dollars and its `verify`, with
    their default settings, time limits (of 5 seconds per step) and faults: floats are compared to 6 decimals, other
    numbers to 15 digits. It works in the main thread only.

    Args:
        prediction: the extracted answer; `None`, where there was none, equals nothing.
        gold: the reference answer.
        grader: one of `GRADERS`.
        answer_type: how to read the answers, as AMO-Bench has it: for `number` the comma in `1,234` separates
            thousands, for `set` elements (else, either); `description` may be `ungraded`. The legacy grader ignores it.

    Raises:
        TypeError: for answers that are neither text nor number.
        ValueError: for an unknown grader.
    """
    if grader not in GRADERS:
        raise ValueError(f"grader {grader!r}: must be one of {', '.join(GRADERS)}")
    start = time.thread_time()
    prediction, gold = answer_text(prediction), answer_text(gold)
    if grader == "strict":
        equal, status = _by_text(prediction, gold, answer_type) or _by_value(prediction, gold, answer_type)
    elif prediction is None or gold is None:
        equal, status = False, "no_gold" if gold is None else "no_answer"
    else:
        equal, status = verify(parse(f"${gold}$"), parse(f"${prediction}$")), "legacy"
    return Verdict(equal, status, time.thread_time() - start)


# ---- Workers ----


class _Worker:
    """A process that grades, one answer at a time; it starts when first asked, and anew after each that it did not survive."""

    def __init__(self, timeout: float, memory_limit_gib: float, grader: str):
        self.timeout = timeout
        self.command = [
            *(sys.executable, str(Path(__file__).resolve()), "--worker", "--grader", grader),
            *("--grade_timeout", str(timeout), "--memory_limit_gib", str(memory_limit_gib)),
        ]
        self.process: subprocess.Popen[bytes] | None = None

    def grade(self, prediction: str | None, gold: str | None, answer_type: str | None) -> Verdict:
        if self.process is None or self.process.poll() is not None:
            self.stop()
            self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            if not self._reply(START_SECONDS):
                self.stop()
                raise RuntimeError(f"the grading worker does not start: {' '.join(self.command)}")
        start = time.perf_counter()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps([prediction, gold, answer_type]).encode() + b"\n")
            self.process.stdin.flush()
        reply = self._reply(STANDSTILL * self.timeout)
        if reply:
            return Verdict(**json.loads(reply))
        in_time = reply is not None and self.process.wait() != -signal.SIGPROF
        self.stop()
        return Verdict(False, "crashed" if in_time else "timeout", min(self.timeout, time.perf_counter() - start))

    def _reply(self, seconds: float) -> bytes | None:
        """A line from the process, empty if it has ended; `None` where there is none in time."""
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        return self.process.stdout.readline() if poll.poll(1000 * seconds) else None

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


class GradingPool:
    """
    Worker processes that grade answers, each killed and replaced where it exceeds its limits.

    A worker is a program of its own that imports neither torch nor vLLM nor the caller's main program, and gets no
    other file of the caller's, so that it is safe beside an engine, from any thread, and with several pools at a time.
    Workers start when there is work that the text alone does not decide, and end with the pool or its process. Their
    limit is on processor time, kept by the kernel, so that a verdict depends neither on the load of the machine nor
    on what a worker hangs in. Also a context manager.

    Args:
        workers: how many at most; `None`: one for each CPU core, up to 8.
        timeout: seconds of processor time for each answer, after which its status is `timeout`.
        memory_limit_gib: address space of a worker.
        grader: one of `GRADERS`.

    Raises:
        ValueError: for limits that are not positive and an unknown grader.
    """

    def __init__(
        self,
        workers: int | None = None,
        timeout: float = 10.0,
        memory_limit_gib: float = 2.0,
        grader: str = "strict",
    ):
        workers = min(os.cpu_count(), 8) if workers is None else workers
        for name, value in (("workers", workers), ("timeout", timeout), ("memory_limit_gib", memory_limit_gib)):
            if not value > 0:
                raise ValueError(f"{name} {value}: must be more than 0")
        if grader not in GRADERS:
            raise ValueError(f"grader {grader!r}: must be one of {', '.join(GRADERS)}")
        self.grader = grader
        self._workers = [_Worker(timeout, memory_limit_gib, grader) for _ in range(workers)]
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()  # so that no more start than are needed
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="grading")

    def submit(self, prediction: Answer, gold: Answer, answer_type: str | None = None) -> "Future[Verdict]":
        """
        Grade in the background; arguments as in `grade`. The future's result is a verdict, whatever happens to the
        worker; its exception a `RuntimeError` if no worker can be started.

        Raises:
            TypeError: for answers that are neither text nor number.
        """
        start = time.thread_time()
        prediction, gold = answer_text(prediction), answer_text(gold)
        decided = _by_text(prediction, gold, answer_type) if self.grader == "strict" else None
        if decided is None:
            return self._threads.submit(self._grade, prediction, gold, answer_type)
        future: Future[Verdict] = Future()
        future.set_result(Verdict(*decided, time.thread_time() - start))
        return future

    def _grade(self, *answer: str | None) -> Verdict:
        worker = self._idle.get()
        try:
            return worker.grade(*answer)
        finally:
            self._idle.put(worker)

    def grade_all(self, answers: Iterable[tuple[Answer, Answer] | tuple[Answer, Answer, str | None]]) -> list[Verdict]:
        """The verdicts on (prediction, gold) or (prediction, gold, answer_type), in their order."""
        return [future.result() for future in [self.submit(*answer) for answer in answers]]

    def close(self) -> None:
        """End the workers, after what they are grading; what still waits in the queue is cancelled."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.stop()

    def __enter__(self) -> "GradingPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@functools.cache
def _shared_pool() -> GradingPool:
    pool = GradingPool()
    atexit.register(pool.close)
    return pool


os.register_at_fork(after_in_child=_shared_pool.cache_clear)  # a forked process has none of its threads


def is_equal(prediction: Answer, gold: Answer) -> bool:
    """Whether two answers are the same, by a `GradingPool` that the process shares: from any thread, in bounded time."""
    return _shared_pool().submit(prediction, gold).result().equal is True


def _work(grader: str, timeout: float, memory_limit_gib: float) -> None:
    """A worker: a JSON line [prediction, gold, answer_type] in, one with the fields of its verdict out."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no reply
    resource.setrlimit(resource.RLIMIT_AS, (int(memory_limit_gib * 2**30),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.set_int_max_str_digits(MAX_BITS)
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of the time limit that this process has
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(
            signal.ITIMER_PROF, timeout
        )  # ends the process, even within C code or if its parent was killed
        start = time.thread_time()
        prediction, gold, answer_type = json.loads(line)
        try:
            verdict = grade(prediction, gold, grader=grader, answer_type=answer_type)
        except MemoryError:
            verdict = Verdict(False, "memory", time.thread_time() - start)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(asdict(verdict)), file=replies, flush=True)


# ---- Command line ----


def _read_lines(path: str, columns: tuple[str, str]) -> list[dict[str, Any]]:
    """
    The records of a JSONL file, with answers as text.

    Raises:
        ValueError: for a line that is not valid, with its number.
    """
    records = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
            missing = [column for column in columns if column not in record]
            if missing:
                raise ValueError(f"no {missing[0]!r}; each line needs {columns[0]!r} and {columns[1]!r}")
            records.append({**record, **{column: answer_text(record[column]) for column in columns}})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    return records


def main(arguments: list[str] | None = None) -> None:
    """The command line, see the head of this file."""
    parser = argparse.ArgumentParser(description="Grade mathematical answers; one JSON line for each, in order.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pairs", metavar="FILE.jsonl", help="lines with pred and gold")
    source.add_argument("--responses", metavar="FILE.jsonl", help="lines with response and gold")
    source.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--thinking", action="store_true", help="responses without </think> have no answer")
    parser.add_argument(
        "--extract", choices=EXTRACT_METHODS, default="final", help="of answers (default: %(default)s)"
    )
    parser.add_argument("--grader", choices=GRADERS, default="strict", help="of answers (default: %(default)s)")
    parser.add_argument("--grade_workers", type=int, help="worker processes (default: one per CPU core, at most 8)")
    parser.add_argument(
        "--grade_timeout", type=float, default=10.0, help="processor seconds per answer (default: %(default)s)"
    )
    parser.add_argument("--memory_limit_gib", type=float, default=2.0, help="of a worker (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.worker:
        _work(options.grader, options.grade_timeout, options.memory_limit_gib)
        return
    try:
        records = _read_lines(options.pairs or options.responses, ("pred" if options.pairs else "response", "gold"))
        pool = GradingPool(options.grade_workers, options.grade_timeout, options.memory_limit_gib, options.grader)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    with pool:
        results = []
        for record in records:
            if options.responses:
                record["pred"] = extract_answer(record["response"] or "", options.thinking, options.extract)
            results.append(pool.submit(record["pred"], record["gold"], record.get("answer_type")))
        for record, result in zip(records, results, strict=True):
            extracted = {"extracted": record["pred"]} if options.responses else {}
            sys.stdout.write(json.dumps({**asdict(result.result()), **extracted}) + "\n")


if __name__ == "__main__":
    main()
