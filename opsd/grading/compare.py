r"""
Equality of answers: by their text, their structure, their values, and else by math-verify.

math-verify's `verify` decides equations, inequalities, matrices, integrals and the like. It does not decide numbers
and functions: it compares floats to 6 decimals and other numbers to 15 digits, and computes 10^{10^{10}} if asked.
"""

import functools
import itertools
import math
import random
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
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
from opsd.grading.parse import BALANCED, ParsedAnswer, TooLargeError, normalize, parse_answer, without_spaces

GRADERS = ("strict", "release")
MAX_MAGNITUDE = 2**16  # bits of a number before the point, or of its inverse
MAX_DIGITS = 2**17  # of a number that is written out
MAX_TERMS = 10_000  # of sums and products, together
PARSING = {"convert_degrees": False, "normalization_config": None}
PARSING["conversion_config"] = ConversionConfig(lowercase_symbols=False)
POINTS = [(2, 40, 1), (-30_000, -3000, 1009), (100, 3000, 1009), (1000, 1020, 1009)] * 3  # ranges for the variables
REDUCTIONS: dict[str, Callable] = {"Add": sum, "Sum": sum, "Mul": math.prod, "Product": math.prod, "Max": max}
REDUCTIONS |= {"Min": min, "UnevaluatedExpr": sum}  # the last of one value
CONSTANTS = {"Pi": "pi", "Exp1": "e", "Infinity": "inf", "NegativeInfinity": "inf"}
FUNCTION = re.compile("a?(?:sin|cos|tan|cot)h?|sec|csc|exp|log|gamma|factorial|binomial|sign|floor|ceiling|Abs|Mod")
INEQUALITY = re.compile(r"[<>]|\\(?:le|ge|ne)(?![a-zA-Z])")
SETS = re.compile(r"\\(?:mathbb|emptyset)(?![a-zA-Z])")


@dataclass(frozen=True)
class Verdict:
    """
    The comparison of a prediction with a reference answer.

    Attributes:
        equal: True if they are the same; `None` for status `ungraded`, and where another verifier could not judge.
        status: how that was decided.
            `exact`, `rational`: by the text alone, as the same text or as whole numbers, decimals and fractions;
            `number`, `expression`: by values, of an expression with variables at several points;
            `text`: words, or what cannot be read as mathematics and is not the same text;
            `unit`: units or moduli that contradict each other, or words that change a number;
            `set`, `tuple`: element by element, in any order or in order; an interval is a tuple;
            `kind`: one is a number and the other is not, a set and the other a tuple, and the like;
            `math_verify`, `release`: by math-verify's `verify`, as a part of the grader or as all of it;
            `verifier`: by another verifier than the grader of mathematics, or `error` if it raised one;
            not equal because of `no_answer`, `no_gold` (no reference answer), `too_large` (beyond the limits of this
            package, or without a value at enough points), `timeout`, `memory` or `crashed` (of the worker);
            `ungraded`: a reference answer of type `description` that is not one mathematical expression.
        seconds: the processor time that it took.
        score: in [0, 1], what a reward takes; by default 1 if equal and 0 if not, `None` where `equal` is `None`.
    """

    equal: bool | None
    status: str
    seconds: float
    score: float | None = None

    def __post_init__(self):
        if self.score is None and self.equal is not None:
            object.__setattr__(self, "score", float(self.equal))


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
        self.magnitude = 0  # bits before the point of the largest number so far or its inverse
        self.terms = 0  # of sums and products so far

    def value(self, node: Basic) -> Any:
        """Return the value of `node`, an `mpf` or `mpc`, or raise one of the errors of this module."""
        kind = type(node).__name__
        try:
            result = self.mp.convert(self._compute(node, kind, node.args))
        except (ValueError, ZeroDivisionError, TypeError) as error:  # a pole, or the order of complex numbers
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
            return self.mp.mpf(getattr(self.mp, CONSTANTS[kind])) * (-1 if kind == "NegativeInfinity" else 1)
        if kind in ("Sum", "Product") and len(arguments) == 2:
            return REDUCTIONS[kind](self._series(arguments[0], *arguments[1]))
        if kind == "factorial" and self.double_factorials and type(arguments[0]).__name__ == "factorial":
            return self.mp.fac2(self.value(arguments[0].args[0]))
        values = [self.value(argument) for argument in arguments]
        if kind in REDUCTIONS:
            return REDUCTIONS[kind](values)
        if kind in ("floor", "ceiling"):
            nearest = self.mp.nint(self.mp.mpf(values[0]))
            if abs(values[0] - nearest) < self.mp.mpf(2) ** (-self.mp.prec // 2):  # below it by rounding alone
                return nearest
        if kind == "Pow":
            result = self._power(*values)
        elif FUNCTION.fullmatch(kind):
            result = getattr(self.mp, {"ceiling": "ceil", "Abs": "fabs", "Mod": "fmod"}.get(kind, kind))(*values)
        else:
            raise _UnsupportedError
        # Of several variables, only values that stay real count: \sqrt{a}\sqrt{b} is taken for \sqrt{ab}.
        if len(self.point) > 1 and self.mp.im(result) and not any(map(self.mp.im, values)):
            raise _UndefinedError
        return result

    def _symbol(self, name: str) -> Any:
        if name in self.point:
            return self.mp.mpf(self.point[name].numerator) / self.point[name].denominator
        if name == "i":
            return self.mp.j
        raise _UnsupportedError  # bound, by an integral or a limit

    def _power(self, base: Any, exponent: Any) -> Any:
        if base == 0 == exponent:
            raise _UndefinedError
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


def _equal_at(point: dict[str, Fraction], trees: list[Basic], double_factorials: bool) -> bool:
    """Compare to a precision that grows with the numbers on the way."""
    precision, needed = 0, 400
    while needed > precision:
        precision = needed
        evaluation = _Evaluation(point, precision, double_factorials)
        prediction, gold = (evaluation.value(tree) for tree in trees)
        needed = 4 * evaluation.magnitude + 300
    if evaluation.mp.isinf(prediction) or evaluation.mp.isinf(gold):
        return prediction == gold
    equal = abs(prediction - gold) < evaluation.mp.mpf(2) ** (-3 * evaluation.magnitude - 200)
    if not equal and point and evaluation.mp.im(prediction) and evaluation.mp.im(gold):
        raise _UndefinedError  # where neither is real, they may be branches of the same, as of \sqrt{1/x}
    return equal


GROUP = r"(\{(?:[^{}]|(?2))*+\})"
READINGS = [  # what the parser does not read, or reads as something else; in this order
    (r"(\\sqrt|\^)\s*(\((?:[^()]|(?2))*+\))", r"\1{\2}"),  # \sqrt(2), x^(y)
    # \frac12, \sqrt3
    (r"(\\sqrt\s*\[[^\[\]]*\]|\\(?:frac|binom|sqrt)(?![a-zA-Z]))\s*(?![\[{])(\\[a-zA-Z]+|[\w.])", r"\1{\2}"),
    (rf"(\\(?:frac|binom)\s*{GROUP})\s*(?!\{{)(\\[a-zA-Z]+|\w)", r"\1{\3}"),  # \frac{1}2
    (r"((?<![\w.^])\d[\d.]*|\)) *(?=[({])", r"\1\\cdot "),  # 3(1/2) is 3.5
    (r"\) *(?=\d|\\frac)", r")\\cdot "),  # (2)3 is no mixed number
    (r"(?<![\w.])(\d+)\\frac\{(\d+)\}\{(\d+)\}", r"(\1+\\frac{\2}{\3})"),  # a mixed number
    (r"(?<![a-zA-Z\\])d(?=\\(?!int))", "{d}"),  # d\pi is a differential
    (r"(\d+)\.(\d+)", lambda match: rf"{{\frac{{{match[1]}{match[2]}}}{{{10 ** len(match[2])}}}}}"),  # 15 digits of it
]


@functools.lru_cache(maxsize=1024)
def _tree(text: str) -> Basic | MatrixBase | None:
    """The parsed, not evaluated expression; `None` if it cannot be read."""
    number = _rational(text)  # saves the parser seconds for long numbers
    if number is not None:
        return sympy.Rational(number.numerator, number.denominator)
    if re.search(r"mod|[:']|(?<![\w^])\d+\s+\d", text) or not re.fullmatch(rf"(?:[^()\[\]{{}}]|{BALANCED})*+", text):
        return None
    for pattern, replacement in READINGS:
        text = re.sub(pattern, replacement, text)
    # Left alone, the parser evaluates these, however large they are.
    unevaluated = sympy.evaluate(False) if re.search(r"\\(?:binom|Gamma)", text) else nullcontext()
    try:
        with unevaluated:
            tree = latex2sympy(text, is_real=not should_treat_as_complex(text), **PARSING)
    except (MemoryError, SystemError):  # the interpreter raises either if it is out of memory
        raise
    except Exception:  # what the parser raises for text that is no mathematics, also from within sympy
        return None
    return tree if isinstance(tree, (Basic, MatrixBase)) else None


def _same_expression(prediction: str, gold: str) -> tuple[bool, str]:
    trees = [tree for text in (prediction, gold) if (tree := _tree(text)) is not None]
    if len(trees) < 2:
        return False, "text"
    if all(isinstance(tree, Expr) for tree in trees):
        names = sorted({symbol.name for tree in trees for symbol in tree.free_symbols} - {"i"})
        status, points, generator = "expression" if names else "number", 0, random.Random(0)
        try:
            for low, high, denominator in POINTS if names else POINTS[:1]:
                point = {name: Fraction(generator.randrange(low, high), denominator) for name in names}
                with suppress(_UndefinedError, TooLargeError):
                    if not _equal_at(point, trees, "!!" in prediction + gold):
                        return False, status
                    points += 1
            enough = points >= (3 if names else 1)
            return enough, status if enough else "too_large"
        except _UnsupportedError:
            pass
    for node in itertools.chain(*map(sympy.preorder_traversal, trees)):  # math-verify computes what it sees
        if isinstance(node, (sympy.Pow, sympy.factorial, sympy.binomial, sympy.gamma)):
            with suppress(_UndefinedError, _UnsupportedError):
                _Evaluation({symbol.name: Fraction(2) for symbol in node.free_symbols}, 100, False).value(node)
    with suppress(NotImplementedError):  # two equations without a solution are the same to math-verify
        if all(isinstance(tree, sympy.Eq) and isinstance(tree.rhs, Expr) for tree in trees) and not sympy.solve(
            trees[1]
        ):
            return False, "math_verify"
    return verify(trees[1], trees[0], allow_set_relation_comp=True, timeout_seconds=None), "math_verify"


def _same_value(prediction: ParsedAnswer, gold: ParsedAnswer) -> tuple[bool, str]:
    required = prediction.unit_required or gold.unit_required or (prediction.unit and gold.unit)
    if required and prediction.unit != gold.unit:
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
        *(f"({answer.text})/100" if answer.percent else answer.text for answer in (prediction, gold))
    )


def _same(prediction: ParsedAnswer, gold: ParsedAnswer) -> tuple[bool, str]:
    answers = prediction, gold
    kinds = {answer.kind for answer in answers}
    if prediction.relation and gold.relation and not prediction.name == gold.name != "":
        if without_spaces(prediction.relation) == without_spaces(gold.relation):
            return True, "exact"
        return _same_expression(prediction.relation, gold.relation)
    for answer in answers:  # a computation that is wrong is no answer, and neither is x^2=4, to math-verify a 4
        if not all(_same_expression(part, answer.text)[0] for part in answer.computation):
            return False, "kind"
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


def compare_texts(prediction: str | None, gold: str | None, answer_type: str | None) -> tuple[bool | None, str] | None:
    """Return `equal` and `status` as far as the texts decide them in linear time, else `None`."""
    if gold is None or not gold.strip():
        return False, "no_gold"
    if answer_type == "description":
        prose = True
        with suppress(TooLargeError):
            prose = re.search(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}", normalize(gold)) is not None
        if prose:
            return None, "ungraded"
    if prediction is None or not prediction.strip():
        return False, "no_answer"
    texts = [without_spaces(text) for text in (prediction, gold)]
    if texts[0] == texts[1]:
        return True, "exact"
    if None not in (rationals := [_rational(text) for text in texts]):
        return rationals[0] == rationals[1], "rational"
    return None


def _rational(text: str) -> Fraction | None:
    """The value of a whole number, a decimal or a fraction."""
    text = re.sub(r"^([+-]?)\\[dt]?frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", text)
    if len(text) < sys.get_int_max_str_digits() and re.fullmatch(r"[+-]?\d+(?:\.\d*|/\d+)?", text):
        with suppress(ZeroDivisionError):
            return Fraction(text)
    return None


def _compare_structures(prediction: str, gold: str, answer_type: str | None) -> tuple[bool, str]:
    texts = normalize(prediction), normalize(gold)
    if texts[0] and without_spaces(texts[0]) == without_spaces(texts[1]):
        return True, "exact"
    flags = [answer_type == "number"] if answer_type in ("number", "set") else [True, False]
    readings = dict.fromkeys(tuple(parse_answer(text, thousands=flag) for text in texts) for flag in flags)
    verdicts = [_same(*reading) for reading in readings]
    return next((verdict for verdict in verdicts if verdict[0]), verdicts[0])


def grade(prediction: Answer, gold: Answer, *, grader: str = "strict", answer_type: str | None = None) -> Verdict:
    """
    Compare a prediction with a reference answer, in this process and without a limit on time and memory.

    `strict`: by the text, the structure and the values, exactly or to a high precision, and else by math-verify.
    Decimals are exact: 0.333 is not 1/3. `release`: math-verify's `parse` of both between dollars and its `verify`,
    with their defaults and faults, as the released evaluation is understood; in the main thread only.

    Args:
        answer_type: as AMO-Bench has it: `number` makes the comma in `1,234` a thousands separator, `set` makes it a
            separator of elements (else, either); `description` may be `ungraded`. `release` ignores it.

    Raises:
        TypeError, ValueError: for answers that `answer_text` refuses, and for an unknown grader.
    """
    if grader not in GRADERS:
        raise ValueError(f"grader {grader!r}: must be one of {', '.join(GRADERS)}")
    start = time.thread_time()
    prediction, gold = answer_text(prediction), answer_text(gold)
    if grader == "strict" and (decided := compare_texts(prediction, gold, answer_type)) is not None:
        equal, status = decided
    elif prediction is None or gold is None:
        equal, status = False, "no_gold" if gold is None else "no_answer"
    elif grader == "strict":
        try:
            equal, status = _compare_structures(prediction, gold, answer_type)
        except TooLargeError:
            equal, status = False, "too_large"
    else:
        equal, status = verify(parse(f"${gold}$"), parse(f"${prediction}$")), "release"
    return Verdict(equal, status, time.thread_time() - start)
