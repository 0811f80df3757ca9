r"""
Equality of answers: by their text, their structure, their values, and else by math-verify.

math-verify's parser reads the values. Its `verify` decides what is not made of numbers, variables and functions only:
equations, matrices, unions and complements of sets, integrals. It does not decide the rest, because it compares
floats to 6 decimals and other numbers to 15 digits, so that 2^{98} and 2^{99} have the same inverse, because it computes
10^{10^{10}} if asked, and because it takes (3,2) and (2,1) for empty intervals.
"""

import functools
import math
import random
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import mpmath
import regex as re
import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from math_verify import parse, verify
from math_verify.grader import should_treat_as_complex
from sympy import Basic, Expr, MatrixBase

from opsd.grading.extract import Answer, answer_text
from opsd.grading.parse import (
    BALANCED,
    INTEGER,
    ParsedAnswer,
    TooLargeError,
    has_thousands,
    normalize,
    parse_answer,
    without_spaces,
)

GRADERS = ("strict", "release")
MAX_MAGNITUDE = 2**16  # bits of a number before the point, or of its inverse
MAX_DIGITS = 2**17  # of a number that is written out
MAX_TERMS = 10_000  # of sums and products, together
PARSING = ConversionConfig(lowercase_symbols=False)
CONSTANTS = {"Pi": "pi", "Exp1": "e", "Infinity": "inf", "NegativeInfinity": "inf"}
FUNCTION = re.compile("a?(?:sin|cos|tan|cot)h?|sec|csc|exp|log|gamma|factorial|binomial|sign|floor|ceiling|Abs|Mod")
RENAMED = {"ceiling": "ceil", "Abs": "fabs", "Mod": "fmod"}
RATIONAL = re.compile(r"([+-]?)(?:([0-9]+(?:\.[0-9]*)?)|([0-9]+)/([0-9]+)|\\[dtc]?frac\{([0-9]+)\}\{([0-9]+)\})")
INEQUALITY = re.compile(r"[<>]|\\(?:le|ge|ne)(?![a-zA-Z])")
SETS = re.compile(r"\\(?:mathbb|emptyset)(?![a-zA-Z])")


@dataclass(frozen=True)
class Verdict:
    r"""
    The comparison of a prediction with a reference answer.

    Attributes:
        equal: True if they are the same; `None` for status `ungraded` only.
        status: how that was decided.
            `exact`, `integer`, `rational`: by the text alone, as the same text, as whole numbers or as fractions;
            `number`: values, exact or to a precision that grows with the numbers in them;
            `expression`: values at several points for the variables;
            `text`: words, or what cannot be read as mathematics and is not the same text;
            `unit`: two units or moduli that contradict each other, or words that change a number;
            `set`, `tuple`: element by element, in any order or in order; an interval is a tuple;
            `kind`: one is a number and the other is not, a set and the other a tuple, and the like;
            `math_verify`: by math-verify's `verify`;
            `no_answer`, `no_gold`: there is no prediction, or no reference answer (not equal);
            `too_large`: numbers or texts beyond the limits of `opsd.grading` (not equal);
            `timeout`, `memory`, `crashed`: the worker was ended at its time limit, reached its memory limit, or
            ended for another reason (not equal);
            `ungraded`: a reference answer of type `description` that is not one mathematical expression;
            `release`: by the released grader.
        seconds: the processor time that it took.
    """

    equal: bool | None
    status: str
    seconds: float


# ---- Values of expressions ----


class _UndefinedError(Exception):
    """An expression has no real value at a point."""


class _UnsupportedError(Exception):
    """An expression is not made of numbers, variables and known functions only."""


class _Evaluation:
    """Values of parsed expressions at a point, by mpmath, and the size of the numbers on the way."""

    def __init__(self, point: dict[str, Fraction], precision: int, double_factorials: bool):
        self.point = point
        self.double_factorials = double_factorials  # the parser reads n!! as (n!)!
        self.mp = mpmath.mp.clone()
        self.mp.prec = precision
        self.magnitude = 0  # bits before the point of the largest number so far, or of the inverse of the smallest
        self.terms = 0  # of sums and products

    def value(self, node: Basic) -> Any:
        """
        Return the value of `node`, an `mpf` or `mpc`, computed only while it stays small enough.

        Raises:
            TooLargeError, _UndefinedError, _UnsupportedError
        """
        kind = type(node).__name__
        try:
            result = self.mp.convert(self._compute(node, kind, node.args))
        except (ValueError, ZeroDivisionError) as error:  # a pole
            raise _UndefinedError from error
        if self.mp.isnan(result):
            raise _UndefinedError
        if isinstance(result, self.mp.mpc) and result.imag == 0:
            result = result.real
        if result and not self.mp.isinf(result):
            bits = self.mp.mag(result)
            self.magnitude = max(self.magnitude, bits if kind == "Add" else abs(bits))  # a sum may be 0
        if self.magnitude > MAX_MAGNITUDE:
            raise TooLargeError
        return result

    def _compute(self, node: Basic, kind: str, arguments: tuple[Basic, ...]) -> Any:
        if node.is_Rational:
            return self.mp.mpf(int(node.p)) / int(node.q)
        if node.is_Symbol:
            return self._symbol(node.name)
        if kind in CONSTANTS:
            return +getattr(self.mp, CONSTANTS[kind]) * (-1 if kind == "NegativeInfinity" else 1)
        if kind in ("Sum", "Product") and len(arguments) == 2:
            return (sum if kind == "Sum" else math.prod)(self._series(arguments[0], *arguments[1]))
        if kind == "factorial" and self.double_factorials and type(arguments[0]).__name__ == "factorial":
            return self.mp.fac2(self.value(arguments[0].args[0]))
        values = [self.value(argument) for argument in arguments]
        if kind in ("Add", "Mul"):
            return (sum if kind == "Add" else math.prod)(values)
        if kind in ("Max", "Min"):
            return (max if kind == "Max" else min)(map(self._real, values))
        if kind in ("floor", "ceiling"):
            nearest = self.mp.nint(self._real(values[0]))
            if abs(values[0] - nearest) < self.mp.mpf(2) ** (-self.mp.prec // 2):  # below it by rounding alone
                return nearest
        if kind == "Pow":
            result = self._power(*values)
        elif kind == "UnevaluatedExpr":
            return values[0]
        elif FUNCTION.fullmatch(kind):
            result = getattr(self.mp, RENAMED.get(kind, kind))(*values)
        else:
            raise _UnsupportedError
        # At a point for real variables, functions of real values must be real.
        if self.point and self.mp.im(result) and not any(map(self.mp.im, values)):
            raise _UndefinedError
        return result

    def _symbol(self, name: str) -> Any:
        if name in self.point:
            return self.mp.mpf(self.point[name].numerator) / self.point[name].denominator
        if name == "i":
            return self.mp.j
        if name.startswith("bar{") and (inner := _tree(name[4:-1])) is not None:  # \overline{3+4i} is no symbol
            return self.mp.conj(self.value(inner))
        raise _UnsupportedError  # bound, by an integral or a limit

    def _real(self, value: Any) -> Any:
        if self.mp.im(value) or self.mp.isinf(value):
            raise _UndefinedError
        return value

    def _power(self, base: Any, exponent: Any) -> Any:
        if base == 0:
            if self.mp.re(exponent) <= 0:
                raise _UndefinedError
            return base
        if abs(base) != 1 and abs(exponent) > 2**60 and not self.mp.isinf(exponent):
            raise TooLargeError
        if not self.mp.im(base) and not self.mp.im(exponent) and base < 0 and not self.mp.isint(exponent):
            ratio = Fraction(int(exponent * 2**60), 2**60).limit_denominator(2000)
            if ratio.denominator % 2 and abs(exponent * ratio.denominator - ratio.numerator) < 2.0**-100:
                return (-1) ** ratio.numerator * self.mp.power(-base, exponent)  # a real root, as of \sqrt[3]{-8}
        return self.mp.power(base, exponent)

    def _series(self, function: Basic, symbol: Basic, low: Basic, high: Basic) -> list[Any]:
        """The terms of a sum or product."""
        low, high = self.value(low), self.value(high)
        if not (self.mp.isint(low) and self.mp.isint(high)):
            raise _UnsupportedError if self.mp.isinf(high) else _UndefinedError
        self.terms += int(max(0, high - low + 1))
        if self.terms > MAX_TERMS:
            raise TooLargeError
        outer, values = self.point, []
        for number in range(int(low), int(high) + 1):
            self.point = {**outer, symbol.name: Fraction(number)}
            values.append(self.value(function))
        self.point = outer
        return values


def _points(names: list[str]) -> Iterator[dict[str, Fraction]]:
    """Values for variables; the same at every call."""
    generator = random.Random(0)
    for low, high, denominator in [(2, 40, 1), (-3000, 3000, 1009), (100, 3000, 1009), (1000, 1020, 1009)] * 3:
        yield {name: Fraction(generator.randrange(low, high), denominator) for name in names}


def _equal_at(point: dict[str, Fraction], trees: list[Basic], double_factorials: bool) -> bool:
    precision, needed = 0, 400
    while needed > precision:
        precision = needed
        evaluation = _Evaluation(point, precision, double_factorials)
        prediction, gold = (evaluation.value(tree) for tree in trees)
        needed = 4 * evaluation.magnitude + 300
    if evaluation.mp.isinf(prediction) or evaluation.mp.isinf(gold):
        return prediction == gold
    return abs(prediction - gold) < evaluation.mp.mpf(2) ** (-3 * evaluation.magnitude - 200)


# ---- Expressions ----

GROUP = r"(\{(?:[^{}]|(?2))*+\})"
READINGS = [  # what the parser does not read, or reads as something else; in this order
    (r"(\\sqrt|\^)\s*(\((?:[^()]|(?2))*+\))", r"\1{\2}"),  # \sqrt(2), x^(y)
    (
        r"(\\sqrt\s*\[[^\[\]]*\]|\\(?:frac|binom|sqrt)(?![a-zA-Z]))\s*(?![\[{])(\\[a-zA-Z]+|[\w.])",
        r"\1{\2}",
    ),  # \frac12
    (rf"(\\(?:frac|binom)\s*{GROUP})\s*(?!\{{)(\\[a-zA-Z]+|\w)", r"\1{\3}"),  # \frac{1}2
    (r"((?<![\w.^])\d[\d.]*|\)) *(?=[({])", r"\1\\cdot "),  # 3(1/2) is 3.5
    (r"\) *(?=\d|\\frac)", r")\\cdot "),
    (r"(?<![\w.])(\d+)\\frac\{(\d+)\}\{(\d+)\}", r"(\1+\\frac{\2}{\3})"),  # a mixed number
    (r"(?<=\\[a-zA-Z]+)(?=\d)", " "),  # \lfloor2
    (r"(?<![a-zA-Z\\])d(?=\\(?!int))", "{d}"),  # d\pi is a differential
]
DECIMAL = re.compile(r"(\d+)\.(\d+)")  # 15 digits of it


@functools.lru_cache(maxsize=1024)
def _tree(text: str) -> Basic | MatrixBase | None:
    """The parsed, not evaluated expression; `None` if it cannot be read."""
    number = _rational(text)  # saves the parser seconds for long numbers
    if number is not None:
        return sympy.Rational(number.numerator, number.denominator)
    if re.search(r"mod|:|(?<![\w^])\d+\s+\d", text) or not re.fullmatch(rf"(?:[^()\[\]{{}}]|{BALANCED})*+", text):
        return None
    for pattern, replacement in READINGS:
        text = re.sub(pattern, replacement, text)
    text = DECIMAL.sub(lambda match: rf"{{\frac{{{match[1]}{match[2]}}}{{{10 ** len(match[2])}}}}}", text)
    # Left alone, the parser evaluates these, however large they are.
    unevaluated = sympy.evaluate(False) if re.search(r"\\(?:binom|Gamma)", text) else nullcontext()
    try:
        with unevaluated:
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


def _same_expression(prediction: str, gold: str) -> tuple[bool, str]:
    trees = [_tree(prediction), _tree(gold)]
    if any(tree is None for tree in trees):
        return False, "text"
    if all(isinstance(tree, Expr) for tree in trees):
        names = {symbol.name for tree in trees for symbol in tree.free_symbols}
        names = sorted(name for name in names if name != "i" and not re.match(r"bar\{.*\d", name))
        status, points, too_large = "expression" if names else "number", 0, False
        try:
            for point in _points(names) if names else [{}]:
                try:
                    if not _equal_at(point, trees, "!!" in prediction + gold):
                        return False, status
                    points += 1
                except _UndefinedError:
                    continue
                except TooLargeError:
                    too_large = True
            if points >= (3 if names else 1):
                return True, status
            if too_large:
                raise TooLargeError
        except _UnsupportedError:
            pass
    return verify(trees[1], trees[0], allow_set_relation_comp=True, timeout_seconds=None), "math_verify"


# ---- Structures ----


def _same_value(prediction: ParsedAnswer, gold: ParsedAnswer) -> tuple[bool, str]:
    if prediction.unit != gold.unit and (
        (prediction.unit and gold.unit) or prediction.unit_required or gold.unit_required
    ):
        return False, "unit"
    texts = prediction.text, gold.text
    if texts[0] == texts[1] != "" and prediction.percent == gold.percent:
        return True, "exact"
    if all(re.fullmatch("[a-zA-Z]{3,}", text) for text in texts):
        return texts[0].lower() == texts[1].lower(), "text"
    equal, status = _same_expression(*texts)
    if equal or prediction.percent == gold.percent:
        return equal, status
    # 50% is the same as 50 where the question asks for a percentage, but also as 0.5.
    return _same_expression(
        *(rf"\frac{{{answer.text}}}{{100}}" if answer.percent else answer.text for answer in (prediction, gold))
    )


def _same(prediction: ParsedAnswer, gold: ParsedAnswer) -> tuple[bool, str]:
    answers = prediction, gold
    for answer in answers:  # a computation that is wrong is no answer
        if not all(_same_expression(part, answer.text)[0] for part in answer.computation):
            return False, "kind"
    kinds = {answer.kind for answer in answers}
    if prediction.relation and gold.relation and not prediction.name == gold.name != "":
        if without_spaces(prediction.relation) == without_spaces(gold.relation):
            return True, "exact"
        return _same_expression(prediction.relation, gold.relation)
    # math-verify would take the last side of an equation for its value: 4 for x^2=4.
    if any(answer.kind == "relation" and not INEQUALITY.search(answer.text) for answer in answers):
        return False, "kind"
    is_set = [answer.kind == "relation" or SETS.match(answer.text) is not None for answer in answers]
    if len(kinds) > 1 and any(is_set) and all(answer.items or is_set[i] for i, answer in enumerate(answers)):
        return _same_expression(prediction.text, gold.text)
    if kinds == {"value"}:
        return _same_value(prediction, gold)
    in_order = kinds == {"tuple"} and prediction.brackets == gold.brackets
    if kinds == {"set", "tuple"}:  # "(3, 4)" may be given as "3, 4", but not as a set in braces
        in_order = {prediction.brackets, gold.brackets} == {"", "()"}
    if not in_order and kinds != {"set"}:
        return False, "kind"
    remaining = list(gold.items)
    for item in prediction.items:
        candidates = remaining[:1] if in_order else [*filter(item.__eq__, remaining), *remaining]
        match = next((candidate for candidate in candidates if _same(item, candidate)[0]), None)
        if match is None:
            return False, "tuple" if in_order else "set"
        remaining.remove(match)
    return not remaining, "tuple" if in_order else "set"


# ---- Whole answers ----


def compare_texts(prediction: str | None, gold: str | None, answer_type: str | None) -> tuple[bool | None, str] | None:
    """Return `equal` and `status` as far as the texts decide them in linear time, else `None`."""
    if gold is None or not gold.strip():
        return False, "no_gold"
    if answer_type == "description" and _is_prose(gold):
        return None, "ungraded"
    if prediction is None or not prediction.strip():
        return False, "no_answer"
    texts = [without_spaces(text) for text in (prediction, gold)]
    if texts[0] == texts[1]:
        return True, "exact"
    if all(integers := [INTEGER.fullmatch(text) for text in texts]):
        signed = [(match[1] == "-" and match[2] != "0", match[2]) for match in integers]
        return signed[0] == signed[1], "integer"
    if None not in (rationals := [_rational(text) for text in texts]):
        return rationals[0] == rationals[1], "rational"
    return None


def _is_prose(gold: str) -> bool:
    try:
        return re.search(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}", normalize(gold)) is not None
    except TooLargeError:
        return True


def _rational(text: str) -> Fraction | None:
    match = RATIONAL.fullmatch(text) if len(text) < sys.get_int_max_str_digits() else None
    if match is None:
        return None
    sign, *parts = match.groups()
    numerator, denominator = [*map(Fraction, filter(None, parts)), Fraction(1)][:2]
    return None if denominator == 0 else Fraction(f"{sign}1") * numerator / denominator


def _compare_structures(prediction: str, gold: str, answer_type: str | None) -> tuple[bool, str]:
    try:
        texts = normalize(prediction), normalize(gold)
        if texts[0] and without_spaces(texts[0]) == without_spaces(texts[1]):
            return True, "exact"
        first = None
        for thousands in {"number": (True,), "set": (False,)}.get(answer_type, (True, False)):
            verdict = _same(*(parse_answer(text, thousands) for text in texts))
            first = first or verdict
            if verdict[0] or not any(map(has_thousands, texts)):
                return verdict
        return first
    except TooLargeError:
        return False, "too_large"


def grade(prediction: Answer, gold: Answer, *, grader: str = "strict", answer_type: str | None = None) -> Verdict:
    """
    Compare a prediction with a reference answer, in this process and without a limit on time and memory.

    This is what the workers of a `GradingPool` run.

    `strict`: the text first; then the structure (lists, sets, tuples, intervals, units, names as in `x=5`), whose values
    are compared exactly or to a high precision, at several points if there are variables; the rest goes to math-verify.
    Decimals are exact: 0.333 is not 1/3.

    `release`: math-verify's `parse` of both between dollars and its `verify`, with their default settings, time limits
    (5 seconds per step) and faults. This is how the released evaluation is understood. It works in the main thread only.

    Args:
        prediction: the extracted answer; `None`, for none, equals nothing.
        gold: the reference answer.
        grader: one of `GRADERS`.
        answer_type: how to read the answers, as AMO-Bench has it: for `number` the comma in `1,234` separates
            thousands, for `set` elements (else, either); `description` may be `ungraded`. `release` ignores it.

    Raises:
        TypeError: for answers that are neither text nor number.
        ValueError: for an unknown grader or a float that is not exact.
    """
    if grader not in GRADERS:
        raise ValueError(f"grader {grader!r}: must be one of {', '.join(GRADERS)}")
    start = time.thread_time()
    prediction, gold = answer_text(prediction), answer_text(gold)
    if grader == "strict":
        decided = compare_texts(prediction, gold, answer_type)
        equal, status = decided or _compare_structures(prediction, gold, answer_type)
    elif prediction is None or gold is None:
        equal, status = False, "no_gold" if gold is None else "no_answer"
    else:
        equal, status = verify(parse(f"${gold}$"), parse(f"${prediction}$")), "release"
    return Verdict(equal, status, time.thread_time() - start)
