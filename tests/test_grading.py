"""Extraction of final answers and their comparison: tables of cases; the workers that compare them."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from eval.grading import main
from opsd.grading import GradingPool, answer_text, extract_answer, grade

ROOT = Path(__file__).resolve().parents[1]
HANGING = (r"\int_0^1 x^x \sin(x^x) e^{x^x} \, dx", "5")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"So \boxed{42}.", "42"),
        (r"First \boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{ 7 }", "7"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),  # an escaped brace need not be closed
        (r"\boxed{a \\} b", r"a \\"),  # \\ is a line break, so this brace is not escaped
        (r"\boxed{5} and then \boxed{}", "5"),
        (r"\boxed{5} and then \boxed{ }", "5"),
        (r"\boxed{5} and then \boxed{\frac{1}{2}", "5"),  # cut off
        (r"\boxed{5", None),
        (r"\boxed{5\}", None),
        ("The answer is 42.", None),
        ("", None),
        (r"<think>\boxed{1}</think>\boxed{2}", "2"),
        (r"<think>\boxed{1}</think>2", None),
        (r"a</think>\boxed{1}</think>\boxed{2}", "2"),
        (r"<think>\boxed{1}", None),  # cut off within its thoughts
        (r"\boxed 7", "7"),
        (r"$\boxed7$.", "7"),
        (r"\(\boxed \frac{1}{2}\)", r"\frac{1}{2}"),
        (r"\fbox{7}", "7"),
        (r"\framebox{7}", "7"),
        (r"\boxed{7\ }", "7"),  # the space is no part of the answer, and neither is its backslash
        (r"\boxed{x+1\,}", "x+1"),
        (r"\boxedness{7}", None),
        (r"$x=\boxed{1}$ or $x = \boxed{2}$", "1, 2"),
        (r"\boxed{1}, \boxed{2} and \boxed{3}.", "1, 2, 3"),
        (r"\boxed{1} and \boxed{1}", "1"),
        ("\\boxed{1}\n\\boxed{2}", "2"),
        (r"\boxed{1} hence \boxed{2}", "2"),
    ],
)
def test_extract_answer(text, expected):
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"Maybe \boxed{1}. Wait,", None),
        (r"Maybe \boxed{1}.</think>It is \boxed{2}.", "2"),
        (r"Maybe \boxed{1}.</think>It is two.", None),
    ],
)
def test_extract_answer_of_a_thinking_model(text, expected):
    assert extract_answer(text, thinking=True) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"Maybe \boxed{1}. Wait,", "1"),
        (r"\boxed{1}</think>2", "1"),
        (r"\boxed{1} or \boxed{ 2 }", "2"),
        (r"\boxed {1}", None),
        (r"\boxed{1} then \boxed{2", None),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{\left\{1\right.}", None),
        ("1", None),
    ],
)
def test_release_extraction(text, expected):
    assert extract_answer(text, thinking=True, method="release") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Leo has 11 - 2 = 9 shells.", "9"),
        ("9 shells, since 11-2=9, not 8", "8"),
        ("11-2", "2"),
        ("It falls to -2.", "-2"),
        (r"so \boxed{46}", "46"),
        ("1,005 of 2,000", "2,000"),
        ("It costs 2.50.", "2.50"),
        ("either 1,2", "2"),
        ("many", None),
        ("so 3</think>hm", None),
    ],
)
def test_last_number(text, expected):
    assert extract_answer(text, thinking=False, method="last_number") == expected


def test_unknown_methods_are_refused():
    with pytest.raises(ValueError, match="'first': must be one of final, release"):
        extract_answer("", method="first")
    with pytest.raises(ValueError, match="'fast': must be one of strict, release"):
        grade("1", "1", grader="fast")
    with pytest.raises(ValueError, match="'fast': must be one of strict, release"):
        GradingPool(grader="fast")
    with pytest.raises(ValueError, match="workers 0: must be more than 0"):
        GradingPool(workers=0)


ANSWERS = [  # prediction, gold, equal, what it is about
    (r"\ln|x+1|", r"\ln(x+1)", False, "a function that is real where the other is not"),
    (r"2\ln|x|", r"\ln(x^2)", True, "a function that is real where the other is"),
    (r"\sqrt{4/n}", r"\frac{2}{\sqrt{n}}", True, "branches of one function where neither is real"),
    ("x≧2", r"[2,\infty)", True, "Unicode and full-width forms"),
    ("0.1666...", r"\frac16", True, "repeating decimals"),
    ("0.121212...", r"\frac{4}{33}", True, "repeating decimals"),
    ("3.1415...", r"\pi", False, "repeating decimals"),
    (r"9.8\,\mathrm{m\,s^{-2}}", "9.8", True, "units, currencies, counted nouns, and words that change a number"),
    ("9 squared feet", "9 ft^2", True, "units, currencies, counted nouns, and words that change a number"),
    ("5 months", "5", True, "units, currencies, counted nouns, and words that change a number"),
    ("7 sevenths", "7", False, "units, currencies, counted nouns, and words that change a number"),
    (r"\sum_{k=1}^{4} k=10", "10", True, "a computation that ends in its value"),
    (r"\sum_{k=1}^{4} k=11", "11", False, "a computation that ends in its value"),
    ("f'", "f", False, "close, but another answer"),
    ("3:00 PM", "3:00 pm", True, "other notations"),
    (r"x+1=10^{10^{10}}", "x=5y", False, "a number that math-verify must not compute"),
    (
        r"\begin{pmatrix}9^{9^{9^9}}\\1\end{pmatrix}",
        r"\begin{pmatrix}1\\1\end{pmatrix}",
        False,
        "a number that math-verify must not compute",
    ),
    (".75", "3/4", True, "a decimal with a leading or a trailing point"),
    ("$x=.125$", r"\frac18", True, "a decimal with a leading or a trailing point"),
    ("[.25,.5)", r"[\frac14,\frac12)", True, "a decimal with a leading or a trailing point"),
    (r".2\sqrt{5}", r"\frac{\sqrt5}{5}", True, "a decimal with a leading or a trailing point"),
    ("-.8", "-0.8", True, "a decimal with a leading or a trailing point"),
    (r"\{.1,.2\}", r"\{0.2,0.1\}", True, "a decimal with a leading or a trailing point"),
    (".75", "75", False, "a decimal with a leading or a trailing point"),
    (r"\$.99", "99", False, "a decimal with a leading or a trailing point"),
    (".04", "4", False, "a decimal with a leading or a trailing point"),
    (r".5\%", "0.5", True, "a decimal with a leading or a trailing point"),
    ("1.", "1", True, "a decimal with a leading or a trailing point"),
    (r"3.\times 10^4", "30000", True, "a decimal with a leading or a trailing point"),
    (r"6.02\cdot10^{23}", "6.02e23", True, "a decimal with a leading or a trailing point"),
    ("7.25E2", "725", True, "a decimal with a leading or a trailing point"),
    ("2, 3, and 7", "2,3,7", True, "lists with 'and' and 'or'"),
    ("2 and 3", "2,3", True, "lists with 'and' and 'or'"),
    ("x=2 or x=-4", "2,-4", True, "lists with 'and' and 'or'"),
    (r"(0,1), (1,0), \text{ and } (2,3)", "(0,1),(1,0),(2,3)", True, "lists with 'and' and 'or'"),
    ("red, green, and blue", "green, blue, red", True, "lists with 'and' and 'or'"),
    ("2, 3, and 8", "2,3,7", False, "lists with 'and' and 'or'"),
    ("P, Q and R", "P, Q, R", True, "lists with 'and' and 'or'"),
    ("3 or 3", "3", True, "lists with 'and' and 'or'"),
    (r"\frac{9}{4}=2.25", "9/4", True, "a computation that ends in its value"),
    ("3+4+5=12", "12", True, "a computation that ends in its value"),
    (r"12=3\cdot4", "12", True, "a computation that ends in its value"),
    (r"\sqrt{49}=7", "7", True, "a computation that ends in its value"),
    ("g^{-1}(2)=11", "11", True, "a computation that ends in its value"),
    ("2+2=5", "5", False, "a computation that ends in its value"),
    ("2+2=5", "4", False, "a computation that ends in its value"),
    ("3x=12", "12", False, "a computation that ends in its value"),
    ("x^2=9", "9", False, "a computation that ends in its value"),
    ("a+b+c=12", "12", True, "a computation that ends in its value"),
    (r"\log_3 81=4", "4", True, "a computation that ends in its value"),
    ("6!=720", "720", True, "a computation that ends in its value"),
    (r"S=\frac12\cdot6\cdot8=24", "24", True, "a computation that ends in its value"),
    (r"\angle ABC=30^\circ", "30", True, "a computation that ends in its value"),
    ("45 mph", "45", True, "units, currencies, counted nouns, and words that change a number"),
    ("12 in^2", "12", True, "units, currencies, counted nouns, and words that change a number"),
    ("12 cubic feet", "12", True, "units, currencies, counted nouns, and words that change a number"),
    (r"3\text{ kg}", "3", True, "units, currencies, counted nouns, and words that change a number"),
    (r"2.5\ \mathrm{kg\,m/s^2}", "2.5", True, "units, currencies, counted nouns, and words that change a number"),
    (r"8\text{ L}", "8", True, "units, currencies, counted nouns, and words that change a number"),
    ("8 gallons", "8", True, "units, currencies, counted nouns, and words that change a number"),
    ("9 yd", "9 yards", True, "units, currencies, counted nouns, and words that change a number"),
    ("9 kg", "9 kilograms", True, "units, currencies, counted nouns, and words that change a number"),
    ("3 sq ft", "3 square feet", True, "units, currencies, counted nouns, and words that change a number"),
    ("9 kg", "9 g", False, "units, currencies, counted nouns, and words that change a number"),
    ("9 m", "9 m^2", False, "units, currencies, counted nouns, and words that change a number"),
    ("20 minutes", "20 hours", False, "units, currencies, counted nouns, and words that change a number"),
    ("4 thirds", "4", False, "units, currencies, counted nouns, and words that change a number"),
    ("4 dozen", "4", False, "units, currencies, counted nouns, and words that change a number"),
    ("4 cubed", "4", False, "units, currencies, counted nouns, and words that change a number"),
    ("4 mod 7", "4", False, "units, currencies, counted nouns, and words that change a number"),
    ("4 over 9", "4", False, "units, currencies, counted nouns, and words that change a number"),
    ("3 minus 1", "3", False, "units, currencies, counted nouns, and words that change a number"),
    ("£20", "20", True, "units, currencies, counted nouns, and words that change a number"),
    ("20 euros", "€20", True, "units, currencies, counted nouns, and words that change a number"),
    ("75¢", "75", True, "units, currencies, counted nouns, and words that change a number"),
    ("75¢", "$75", False, "units, currencies, counted nouns, and words that change a number"),
    ("€20", r"\$20", False, "units, currencies, counted nouns, and words that change a number"),
    (r"3\text{ million}", "3", False, "units, currencies, counted nouns, and words that change a number"),
    ("12 marbles", "12", True, "units, currencies, counted nouns, and words that change a number"),
    ("7 ways", "7", True, "units, currencies, counted nouns, and words that change a number"),
    (r"15\text{ people}", "15", True, "units, currencies, counted nouns, and words that change a number"),
    ("2ab", "2", False, "units, currencies, counted nouns, and words that change a number"),
    ("3cd", "3", False, "units, currencies, counted nouns, and words that change a number"),
    ("4 not possible", "4", False, "units, currencies, counted nouns, and words that change a number"),
    ("less than 9", "9", False, "units, currencies, counted nouns, and words that change a number"),
    ("9 or fewer", "9", False, "units, currencies, counted nouns, and words that change a number"),
    ("at most 9", "9", False, "units, currencies, counted nouns, and words that change a number"),
    ("36π cm²", r"36\pi", True, "units, currencies, counted nouns, and words that change a number"),
    (
        r"36\pi\text{ square inches}",
        r"36\pi",
        True,
        "units, currencies, counted nouns, and words that change a number",
    ),
    (r"10\sqrt{3}\ \text{m}", r"10\sqrt{3}", True, "units, currencies, counted nouns, and words that change a number"),
    ("100 degrees", "100", True, "units, currencies, counted nouns, and words that change a number"),
    ("72°F", "72", True, "units, currencies, counted nouns, and words that change a number"),
    ("1 hour", "1", True, "units, currencies, counted nouns, and words that change a number"),
    ("3 boys", "3 girls", False, "units, currencies, counted nouns, and words that change a number"),
    ("200 USD", "200", True, "units, currencies, counted nouns, and words that change a number"),
    ("60 mi/hr", "60", True, "units, currencies, counted nouns, and words that change a number"),
    ("8 oz", "8 ounces", True, "units, currencies, counted nouns, and words that change a number"),
    ("3N", "3", False, "units, currencies, counted nouns, and words that change a number"),
    ("7 more", "7", False, "units, currencies, counted nouns, and words that change a number"),
    (r"12\,\mathrm{cm}", "12", True, "units, currencies, counted nouns, and words that change a number"),
    (r"12~\text{cm}^3", "12", True, "units, currencies, counted nouns, and words that change a number"),
    ("４２", "42", True, "Unicode and full-width forms"),
    ("ｘ＝４", "4", True, "Unicode and full-width forms"),
    ("［１，２）", "[1,2)", True, "Unicode and full-width forms"),
    ("3；4", "3,4", True, "Unicode and full-width forms"),
    ("¾", "0.75", True, "Unicode and full-width forms"),
    ("1⅔", "5/3", True, "Unicode and full-width forms"),
    ("x³", "x^3", True, "Unicode and full-width forms"),
    ("y₂", "y_2", True, "Unicode and full-width forms"),
    ("2×3", "6", True, "Unicode and full-width forms"),
    ("8÷2", "4", True, "Unicode and full-width forms"),
    ("√16", "4", True, "Unicode and full-width forms"),
    ("∛27", "3", True, "Unicode and full-width forms"),
    ("π²", r"\pi^2", True, "Unicode and full-width forms"),
    ("−½", "-0.5", True, "Unicode and full-width forms"),
    ("α+β", r"\alpha+\beta", True, "Unicode and full-width forms"),
    ("⌈2.1⌉", "3", True, "Unicode and full-width forms"),
    ("5°", "5", True, "Unicode and full-width forms"),
    ("25℃", "25", True, "Unicode and full-width forms"),
    ("｛1，2｝", r"\{1,2\}", True, "Unicode and full-width forms"),
    ("‘7’", "7", True, "Unicode and full-width forms"),
    ("１．５", "1.5", True, "Unicode and full-width forms"),
    ("10⁻³", "0.001", True, "Unicode and full-width forms"),
    ("x ≤ 2", r"(-\infty,2]", True, "Unicode and full-width forms"),
    ("A ∪ B", r"A\cup B", True, "Unicode and full-width forms"),
    ("∅", r"\text{no solution}", True, "Unicode and full-width forms"),
    (r"\textcolor{green}{12}", "12", True, "faces, sizes, colours, marks"),
    (r"\boldsymbol{x^2}", "x^2", True, "faces, sizes, colours, marks"),
    (r"{\large 12}", "12", True, "faces, sizes, colours, marks"),
    (r"\mathbf{12}", "12", True, "faces, sizes, colours, marks"),
    (r"\underline{12}", "12", True, "faces, sizes, colours, marks"),
    (r"\displaystyle\frac34", "0.75", True, "faces, sizes, colours, marks"),
    (r"\sf 12", "12", True, "faces, sizes, colours, marks"),
    ("`12`", "12", True, "faces, sizes, colours, marks"),
    ("**x=3**", "3", True, "faces, sizes, colours, marks"),
    (r"12\ \checkmark", "12", True, "faces, sizes, colours, marks"),
    (r"\sfrac{3}{4}", "3/4", True, "faces, sizes, colours, marks"),
    (r"\bm{\frac{1}{3}}", "1/3", True, "faces, sizes, colours, marks"),
    (r"\textbf{12}", "12", True, "faces, sizes, colours, marks"),
    (r"\mathsf{B}", "B", True, "faces, sizes, colours, marks"),
    (r"\textbf{(B)}", "B", True, "faces, sizes, colours, marks"),
    (r"\text{(B) }", "(B)", True, "faces, sizes, colours, marks"),
    (r"\framebox{7}", "7", True, "faces, sizes, colours, marks"),
    (r"\left. 7 \right.", "7", True, "faces, sizes, colours, marks"),
    (r"\hspace{1em}7", "7", True, "faces, sizes, colours, marks"),
    (r"\tag{1} 7", "7", True, "faces, sizes, colours, marks"),
    (r"0.\overline{27}", r"\frac{3}{11}", True, "repeating decimals"),
    (r"1.\overline{6}", "5/3", True, "repeating decimals"),
    (r"0.2\bar{3}", r"\frac{7}{30}", True, "repeating decimals"),
    (r".\overline{9}", "1", True, "repeating decimals"),
    (r"0.\overline{3}", "0.3", False, "repeating decimals"),
    (r"0.\overline{12}", r"0.1\overline{2}", False, "repeating decimals"),
    (r"0.\dot{1}4285\dot{7}", r"\frac17", True, "repeating decimals"),
    (r"\overline{AB}", r"\overline{AB}", True, "repeating decimals"),
    (r"(-\infty,+\infty)", r"\mathbb{R}", True, "sets, intervals and inequalities"),
    ("all real numbers", r"(-\infty,\infty)", True, "sets, intervals and inequalities"),
    ("no real solutions", r"\emptyset", True, "sets, intervals and inequalities"),
    (r"x\neq 3", r"(-\infty,3)\cup(3,\infty)", True, "sets, intervals and inequalities"),
    (r"\mathbb{R}\setminus\{3\}", r"x\ne3", True, "sets, intervals and inequalities"),
    (r"x\ne3", r"x\ne4", False, "sets, intervals and inequalities"),
    (r"x\ge0", r"[0,\infty)", True, "sets, intervals and inequalities"),
    ("x>0", r"[0,\infty)", False, "sets, intervals and inequalities"),
    (r"0<x\le 1", "(0,1]", True, "sets, intervals and inequalities"),
    (r"0<x\le 1", "[0,1]", False, "sets, intervals and inequalities"),
    ("x<1", "y<1", False, "sets, intervals and inequalities"),
    (r"(-2,1)\cup(1,3)", r"(1,3)\cup(-2,1)", True, "sets, intervals and inequalities"),
    (r"x\in(0,1)", "0<x<1", True, "sets, intervals and inequalities"),
    ("x>5 or x<1", r"(-\infty,1)\cup(5,\infty)", True, "sets, intervals and inequalities"),
    ("none", "0", False, "sets, intervals and inequalities"),
    ("no solution", "0", False, "sets, intervals and inequalities"),
    ("(3,2)", "(2,1)", False, "sets, intervals and inequalities"),
    ("(3,2)", r"\emptyset", False, "sets, intervals and inequalities"),
    ("x<1", r"x\le1", False, "sets, intervals and inequalities"),
    (r"4\times10^{-5}", ".00004", True, "other notations"),
    (r"{6\choose 2}", "15", True, "other notations"),
    (r"\binom{6}{2}=15", "15", True, "other notations"),
    ("(1011)_2", "1011_2", True, "other notations"),
    ("1011_2", "1011_3", False, "other notations"),
    ("2:3", "4:6", False, "other notations"),  # a ratio is asked for in lowest terms
    ("2:3", "3:2", False, "other notations"),
    ("12:30", "12:45", False, "other notations"),
    (r"\lg 1000", "3", True, "other notations"),
    ("3^-2", "1/9", True, "other notations"),
    (r"2k\pi, k\in\mathbb{Z}", r"n\pi, n\in\mathbb{Z}", False, "other notations"),
    ("12,000,000", "12000000", True, "other notations"),
    ("12 000", "12000", True, "other notations"),
    ("12{,}000.5", "12000.5", True, "other notations"),
    ("1,2,3", "123", False, "other notations"),
    ("12,345,6", "123456", False, "other notations"),
    ("2nd", "2", True, "other notations"),
    (r"17^{\text{th}}", "17", True, "other notations"),
    ("i", "-i", False, "other notations"),
    ("|1+i|", r"\sqrt2", True, "other notations"),
    (r"e^{i\pi/2}", "i", True, "other notations"),
    (r"\frac{1}{1-i}", r"\frac{1+i}{2}", True, "other notations"),
    (r"\begin{pmatrix}1\\0\end{pmatrix}", r"\begin{pmatrix}0\\1\end{pmatrix}", False, "other notations"),
    (r"\begin{bmatrix}1&0\\0&1\end{bmatrix}", r"\begin{pmatrix}1&0\\0&1\end{pmatrix}", True, "other notations"),
    (r"\langle1,2\rangle", "(1,2)", True, "other notations"),
    ("x+y=3", "y=3-x", True, "other notations"),
    ("2x+2y=6", "x+y=3", True, "other notations"),
    ("x+y=3", "x+y=4", False, "other notations"),
    ("x^2+y^2=4", "x^2+y^2=-4", False, "other notations"),
    ("0=1", "0=2", False, "other notations"),
    ("e^x=0", "e^x=-1", False, "other notations"),
    ("y=x^2", "x=y^2", False, "other notations"),
    ("y=3x", "y=-3x", False, "other notations"),
    ("2^{100}", "2^{100}+1", False, "other notations"),
    (r"\frac{1}{10^{40}}", "0", False, "other notations"),
    (r"\sqrt{10^{30}+1}", "10^{15}", False, "other notations"),
    ("0.333", "1/3", False, "other notations"),
    ("3.1416", r"\pi", False, "other notations"),
    (r"\pi\approx3.14", r"\pi", True, "other notations"),
    ("99^{99^{99}}", "1", False, "other notations"),
    ("(10^8)!", "1", False, "other notations"),
    (r"\binom{10^8}{10^7}", "1", False, "other notations"),
    (r"\Gamma(10^9)", "1", False, "other notations"),
    (r"\sum_{k=1}^{10^8}k", "1", False, "other notations"),
    (r"\prod_{k=1}^{10^9}k", "1", False, "other notations"),
    ("x^{10^{12}}", "x", False, "other notations"),
    (r"\sin(10^{10^5})", "0", False, "other notations"),
    ("Tuesday", "tuesday", True, "other notations"),
    ("Tuesday", "Thursday", False, "other notations"),
    ("yes", "no", False, "other notations"),
    ("A", "B", False, "other notations"),
    (r"\text{C and D}", "C, D", True, "other notations"),
    ("AB", "BA", True, "other notations"),
    ("True", "False", False, "other notations"),
    (r"\text{odd}", "odd", True, "other notations"),
    ("", "5", False, "other notations"),
    ("$", "5", False, "other notations"),
    ("5", "", False, "other notations"),
    ("\\", "5", False, "other notations"),
    ("{", "5", False, "other notations"),
    ("5}", "5", False, "other notations"),
    (r"\frac{}{}", "5", False, "other notations"),
    (r"\text{}", "5", False, "other notations"),
    ("5!", "120", True, "other notations"),
    ("5!!", "15", True, "other notations"),
    ("0!", "1", True, "other notations"),
    ("-3^2", "-9", True, "other notations"),
    ("(-3)^2", "9", True, "other notations"),
    (r"\sqrt[3]{-27}", "-3", True, "other notations"),
    ("(-8)^{1/3}", "-2", True, "other notations"),
    (r"\lfloor -2.5\rfloor", "-3", True, "other notations"),
    (r"\gcd(12,18)", "6", True, "other notations"),
    (r"\log_{2}{32}", "5", True, "other notations"),
    (r"\log 1000", "3", True, "other notations"),
    (r"\tan 60^\circ", r"\sqrt3", True, "other notations"),
    (r"\sin 30", "0.5", False, "other notations"),
    (r"\arcsin 1", r"\frac{\pi}{2}", True, "other notations"),
    (r"\cos^{-1}0", r"\frac{\pi}{2}", True, "other notations"),
    ("50%", "0.5", True, "other notations"),
    ("50%", "5", False, "other notations"),
    (r"50\%", r"\frac12", True, "other notations"),
    ("1/2%", "0.005", True, "other notations"),
    ("m=2,n=3", "n=3,m=2", True, "other notations"),
    ("m=2,n=3", "m=3,n=2", False, "other notations"),
    ("x=1", "y=1", False, "other notations"),
    ("x=[2,3)", "y=[2,3)", False, "other notations"),  # no equation that sympy can solve
    ("x=[2,3)", "[2,3)", True, "other notations"),
    ("(2,3)", "2,3", True, "other notations"),
    ("(2,3)", "3,2", False, "other notations"),
    ("[2,3]", "(2,3)", False, "other notations"),
    (r"\boxed{5}\text{ meters}", "5", True, "other notations"),
    (r"so that $n=\boxed{5}$", "5", True, "other notations"),
    (r"\text{Answer: }5", "5", True, "other notations"),
    ("The answer is 5", "5", True, "other notations"),
    ("answer = 5", "5", True, "other notations"),
    ("5, where x is prime", "5", True, "other notations"),
    (r"\frac{x+1}{2}", r"\frac{1+x}{2}", True, "other notations"),
    (r"\frac{x+1}{2}", r"\frac{x-1}{2}", False, "other notations"),
    ("x^{2000000}-x^{2000000}+3", "3", True, "other notations"),
    ("a_1", "a_2", False, "other notations"),
    ("f(x)=3x", "3x", True, "other notations"),
    ("7 R 2", "7", False, "other notations"),
    ("7r2", "7", False, "other notations"),
    (r"2\pi r", r"\pi r \cdot 2", True, "the same, written in another way"),
    (r"\sin x \cos x", r"\frac{1}{2}\sin(2x)", True, "the same, written in another way"),
    ("y = 2x + 3", "2x - y + 3 = 0", True, "the same, written in another way"),
    ("x+y=1", "y+x=1", True, "the same, written in another way"),
    (r"\lfloor2d\rfloor + 1", r"1 + \lfloor 2d \rfloor", True, "the same, written in another way"),
    (r"\frac12", "0.5", True, "the same, written in another way"),
    ("0.5", r"\frac12", True, "the same, written in another way"),
    ("1/2", r"\dfrac{1}{2}", True, "the same, written in another way"),
    (r"\pm 3", r"\{3,-3\}", True, "the same, written in another way"),
    ("3, -3", r"\pm 3", True, "the same, written in another way"),
    ("√2", r"\sqrt{2}", True, "the same, written in another way"),
    ("2√3", r"\sqrt{12}", True, "the same, written in another way"),
    ("√(2+1)", r"\sqrt 3", True, "the same, written in another way"),
    ("x²", "x^2", True, "the same, written in another way"),
    ("π/2", r"\frac{\pi}{2}", True, "the same, written in another way"),
    ("1,000,000", "1000000", True, "the same, written in another way"),
    ("1{,}000", "1000", True, "the same, written in another way"),
    (r"1\,000", "1000", True, "the same, written in another way"),
    (r"\$12.50", "12.5", True, "the same, written in another way"),
    (r"\$1,200", "1200", True, "the same, written in another way"),
    ("$12$", "12", True, "the same, written in another way"),
    ("€5", "5", True, "the same, written in another way"),
    ("12 dollars", r"\$12", True, "the same, written in another way"),
    ("5 cm", "5", True, "the same, written in another way"),
    (r"5\text{ cm}", "5 cm", True, "the same, written in another way"),
    (r"5\mathrm{~cm}^2", "5", True, "the same, written in another way"),
    (r"90^\circ", "90", True, "the same, written in another way"),
    (r"\sin 30^\circ", r"\frac12", True, "the same, written in another way"),
    (r"\tan 45^\circ", "1", True, "the same, written in another way"),
    ("30 degrees", r"30^\circ", True, "the same, written in another way"),
    ("x = 5", "5", True, "the same, written in another way"),
    ("5", "x=5", True, "the same, written in another way"),
    ("f(x)=2x+1", "1+2x", True, "the same, written in another way"),
    ("a_n=2^n", "2^{n}", True, "the same, written in another way"),
    ("(x+1)^2", "x^2+2x+1", True, "the same, written in another way"),
    (r"\sqrt{x^2}", "|x|", True, "the same, written in another way"),
    (r"\sqrt{a}\sqrt{b}", r"\sqrt{ab}", True, "the same, written in another way"),
    ("n(n+1)/2", r"\binom{n+1}{2}", True, "the same, written in another way"),
    (r"\frac{n(n+1)}{2}", r"\sum_{k=1}^{n} k", True, "the same, written in another way"),
    ("n!", r"\prod_{k=1}^n k", True, "the same, written in another way"),
    (r"\binom{10}{3}", "120", True, "the same, written in another way"),
    (r"\binom52", "10", True, "the same, written in another way"),
    ("(-1)^n", "(-1)^{n+2}", True, "the same, written in another way"),
    (r"\lfloor x\rfloor+1", r"1+\lfloor x \rfloor", True, "the same, written in another way"),
    (r"e^{i\pi}", "-1", True, "the same, written in another way"),
    ("(2+i)^2", "3+4i", True, "the same, written in another way"),
    ("2i+3", "3+2i", True, "the same, written in another way"),
    (r"\log_2 8", "3", True, "the same, written in another way"),
    (r"\ln e^2", "2", True, "the same, written in another way"),
    (r"\sqrt[3]{-8}", "-2", True, "the same, written in another way"),
    ("(1,2]", "(1, 2]", True, "the same, written in another way"),
    (r"x\ge 2", r"[2,\infty)", True, "the same, written in another way"),
    (r"2\le x", r"[2,\infty)", True, "the same, written in another way"),
    (r"x \in [1,2)", r"1\le x<2", True, "the same, written in another way"),
    ("-1<x<1", "(-1,1)", True, "the same, written in another way"),
    ("1>x>-1", "(-1,1)", True, "the same, written in another way"),
    ("(1,2),(3,4)", "(3,4),(1,2)", True, "the same, written in another way"),
    ("(x,y)=(1,2)", "(1,2)", True, "the same, written in another way"),
    ("3, 4", "(3,4)", True, "the same, written in another way"),
    (r"\{1,2,3\}", "3,2,1", True, "the same, written in another way"),
    (r"\emptyset", r"\varnothing", True, "the same, written in another way"),
    (
        r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
        True,
        "the same, written in another way",
    ),
    (
        r"\begin{pmatrix}1/2\\3\end{pmatrix}",
        r"\begin{pmatrix}\frac12\\3\end{pmatrix}",
        True,
        "the same, written in another way",
    ),
    (r"3\frac{1}{2}", "3.5", True, "the same, written in another way"),
    ("3 1/2", r"\frac72", True, "the same, written in another way"),
    ("3(1/2)", r"\frac32", True, "the same, written in another way"),
    ("(2)(3)", "6", True, "the same, written in another way"),
    (r"2\left(3\right)", "6", True, "the same, written in another way"),
    ("1.5e3", "1500", True, "the same, written in another way"),
    (r"1.5 \times 10^3", "1500", True, "the same, written in another way"),
    ("6.02e-3", "0.00602", True, "the same, written in another way"),
    ("101_2", "101_{2}", True, "the same, written in another way"),
    (r"\text{east}", "East", True, "the same, written in another way"),
    (r"\text{Infinitely many}", r"\infty", True, "the same, written in another way"),
    ("infinitely many solutions", "Infinitely many.", True, "the same, written in another way"),
    (r"+\infty", r"\infty", True, "the same, written in another way"),
    ("52!!", r"2^{26}\cdot 26!", True, "the same, written in another way"),
    ("x^2+y^2=1", "y^2+x^2=1", True, "the same, written in another way"),
    ("12!", "479001600", True, "the same, written in another way"),
    (r"25\%", r"\frac14", True, "the same, written in another way"),
    ("1:2", "1:2", True, "the same, written in another way"),
    (r"\frac{1}{2}, \frac13", "0.5, 1/3", True, "the same, written in another way"),
    (r"1 \text{ and } 2", "1, 2", True, "the same, written in another way"),
    (r"x=1 \text{ or } x=2", "1,2", True, "the same, written in another way"),
    ("a=1, b=2", "b=2, a=1", True, "the same, written in another way"),
    (r"\text{The answer is } 5", "5", True, "the same, written in another way"),
    (r"\frac{\sqrt3}2", r"\frac{\sqrt{3}}{2}", True, "the same, written in another way"),
    ("x^{1/3}", r"\sqrt[3]{x}", True, "the same, written in another way"),
    ("2^{-3}", "0.125", True, "the same, written in another way"),
    (r"\cos\frac{\pi}{7}-\cos\frac{2\pi}{7}+\cos\frac{3\pi}{7}", r"\frac12", True, "the same, written in another way"),
    (r"\sqrt{5+2\sqrt6}", r"\sqrt2+\sqrt3", True, "the same, written in another way"),
    (r"\sqrt2\sqrt3-\sqrt6", "0", True, "the same, written in another way"),
    (r"5\%", "0.05", True, "the same, written in another way"),
    (r"1-\frac{1}{e}", r"\frac{e-1}{e}", True, "the same, written in another way"),
    (r"\arctan 1", r"\frac{\pi}{4}", True, "the same, written in another way"),
    (r"2\pi\text{ cm}", r"2\pi", True, "the same, written in another way"),
    ("1.0", "1", True, "the same, written in another way"),
    ("007", "7", True, "the same, written in another way"),
    ("y=2x+3", "y=3+2x", True, "the same, written in another way"),
    (r"\max(2,3)", "3", True, "the same, written in another way"),
    (r"\left(\frac{1}{2},\ \infty\right)", r"(0.5,\infty)", True, "the same, written in another way"),
    (r"\mathbb{R}\setminus\{0\}", r"\mathbb{R} \setminus \{0\}", True, "the same, written in another way"),
    (r"\boxed{5}", "5", True, "the same, written in another way"),
    ("5.", "5", True, "the same, written in another way"),
    (r"\{2, 4, \ldots, 10\}", r"\{2,4,6,8,10\}", True, "the same, written in another way"),
    (r"\{n^2 \mid 1\le n\le 4, n\in\mathbb{Z}\}", "1,4,9,16", True, "the same, written in another way"),
    (r"\text{Yes}", "yes", True, "the same, written in another way"),
    (r"\frac{a+b}{c}", r"\frac{a}{c}+\frac{b}{c}", True, "the same, written in another way"),
    ("y = 2x + 3", "2x + y + 3 = 0", False, "close, but another answer"),
    (r"\frac{1}{2006!}", r"\frac{1}{2004!}", False, "close, but another answer"),
    (r"\sqrt{10^{40}+1}", "10^{20}", False, "close, but another answer"),
    (r"\sqrt{10^{400}+1}", "10^{200}", False, "close, but another answer"),
    (r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}", False, "close, but another answer"),
    (r"\frac{\sqrt{2}}{2006!}", r"\frac{\sqrt{2}}{2004!}", False, "close, but another answer"),
    ("0.333333", r"\frac13", False, "close, but another answer"),
    ("3.14159265358979323846", r"\pi", False, "close, but another answer"),
    ("3", r"\pm 3", False, "close, but another answer"),
    (r"5\text{ cm}^2", r"5\text{ cm}", False, "close, but another answer"),
    (r"5\text{ or more}", "5", False, "close, but another answer"),
    (r"5\text{ million}", "5", False, "close, but another answer"),
    (r"\text{at least } 5", "5", False, "close, but another answer"),
    (r"\text{more than }5", "5", False, "close, but another answer"),
    ("5 million", "5", False, "close, but another answer"),
    ("2x = 4", "4", False, "close, but another answer"),
    ("x^2=4", "4", False, "close, but another answer"),
    ("(x+1)^2", "x^2+2x+2", False, "close, but another answer"),
    ("|x|", "x", False, "close, but another answer"),
    (r"\sqrt{x^2}", "x", False, "close, but another answer"),
    ("(-1)^n", "(-1)^{n+1}", False, "close, but another answer"),
    (r"\cos(\pi n)", "(-1)^n", False, "close, but another answer"),
    (r"\lfloor x \rfloor", r"\lceil x \rceil - 1", False, "close, but another answer"),
    ("2i+3", "3-2i", False, "close, but another answer"),
    ("(1,2]", "(1,2)", False, "close, but another answer"),
    ("x>2", r"[2,\infty)", False, "close, but another answer"),
    ("(1,2),(3,4)", "(1,3),(2,4)", False, "close, but another answer"),
    ("4, 3", "(3,4)", False, "close, but another answer"),
    (r"\{3,4\}", "(3,4)", False, "close, but another answer"),
    (r"\{1,2,3\}", r"\{1,2,3,4\}", False, "close, but another answer"),
    (r"\{1,1\}", r"\{1,2\}", False, "close, but another answer"),
    (
        r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
        r"\begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix}",
        False,
        "close, but another answer",
    ),
    (r"3\frac12", r"\frac32", False, "close, but another answer"),
    ("3(1/2)", r"\frac72", False, "close, but another answer"),
    ("(2)(3)", "5", False, "close, but another answer"),
    ("1 2", "12", False, "close, but another answer"),
    ("1 2", "3", False, "close, but another answer"),
    ("10_2", "10_3", False, "close, but another answer"),
    ("east", "seat", False, "close, but another answer"),
    ("ab", "ac", False, "close, but another answer"),
    ("AB", "ab", False, "close, but another answer"),
    ("A", "a", False, "close, but another answer"),
    ("finitely many", "Infinitely many.", False, "close, but another answer"),
    ("not infinite", r"\infty", False, "close, but another answer"),
    (r"\infty", r"-\infty", False, "close, but another answer"),
    ("1", r"\infty", False, "close, but another answer"),
    ("x^2+y^2=1", "y^2+x^2=2", False, "close, but another answer"),
    (r"x\equiv 3 \pmod 7", "3", False, "close, but another answer"),
    ("10^{10^{10}}", "10^{10^{10}}+1", False, "close, but another answer"),
    ("1000000000!", "5", False, "close, but another answer"),
    ("x^{10^{9}}", "x", False, "close, but another answer"),
    (r"25\%", r"0.25\%", False, "close, but another answer"),
    ("3:4", "4:3", False, "close, but another answer"),
    ("a=1, b=2", "a=2, b=1", False, "close, but another answer"),
    (r"\text{none}", "0", False, "close, but another answer"),
    (r"\frac10", r"\frac20", False, "close, but another answer"),
    ("0/0", "1", False, "close, but another answer"),
    (r"\text{The answer is not } 5", "5", False, "close, but another answer"),
    (r"e^{\pi\sqrt{163}}", "262537412640768744", False, "close, but another answer"),
    ("10^{-50}", "0", False, "close, but another answer"),
    (r"\frac{\sqrt{2}}{10^{80}}", "0", False, "close, but another answer"),
    (r"\text{Yes}", "no", False, "close, but another answer"),
    ("x<2", "y<2", False, "close, but another answer"),
    ("2", r"\frac{2", False, "close, but another answer"),
]


@pytest.mark.parametrize(("prediction", "gold", "equal", "about"), ANSWERS)
def test_answers(prediction, gold, equal, about):
    for one, other in ((prediction, gold), (gold, prediction)):
        verdict = grade(one, other)
        assert verdict.equal is equal, f"{about}: {one!r} and {other!r}, decided by {verdict.status}"


# Of a list of public bug reports: row, whether the pairs are equal, the pairs
REPORTED = [
    ("B1", True, [("$.5$", "0.5"), ("x=.5", "0.5"), (r".25\pi", r"0.25\pi"), ("(.5,2)", "(0.5,2)"),
        ("[.5,1]", "[0.5,1]"), (r"\$.50", "0.5"), (".5 cm", "0.5"), (".5%", "0.5%"), (r"\text{.5}", "0.5"),
        (r"\approx .5", "0.5"), ("Answer: .5", "0.5")]),
    ("B1b", False, [("$.5$", "5"), (r".25\pi", r"25\pi"), ("(.5,2)", "(5,2)"), (r"\$.50", "50"),
        (".5 cm", "5 cm")]),
    ("B2", True, [("1, 2, and 3", "1, 2, 3"), (r"1, 2, \text{ and } 3", "1,2,3"),
        (r"x=1, x=2, \text{ or } x=3", "1,2,3"), ("A, B, and C", "A,B,C"), ("(1,2), and (3,4)", "(1,2),(3,4)")]),
    ("B3", True, [(r"\frac72=3.5", "3.5"), (r"\binom{5}{2}=10", "10"), ("2^3=8", "8"), ("100+9=109", "109"),
        ("5=5", "5"), ("f^{-1}(3)=7", "7")]),
    ("B4", True, [("60 km/h", "60"), (r"15\text{ m/s}", "15"), (r"9.8\ \mathrm{m/s^2}", "9.8"),
        (r"4.5e33 \text{ erg/s}", "4.5e33"), (r"1.2\text{ g/cm}^3", "1.2"), ("15 in", "15"), ("15cm", "15"),
        ("15cm^2", "15"), (r"5\text{ in.}", "5")]),
    ("B4b", True, [("5 ft", "5 feet"), ("5 inches", "5 inch"), ("5 box", "5 boxes"), ("5 hrs", "5 hours"),
        ("5 cm", "5 centimeters"), ("5 cm^2", "5 square centimeters"), ("5 units^2", "5 square units")]),
    ("B4c", False, [("2 fifths", "2"), ("7 halves", "7"), ("5 thousandths", "5"), ("5 tenths", "5"),
        ("5 squared", "5"), ("5 cubed", "5"), ("5 factorial", "5"), ("5 thousands", "5"), ("5 hundreds", "5"),
        ("5 lakh", "5"), ("5 below zero", "5"), ("5 impossible", "5")]),
    ("B4d", False, [("5 cents", r"\$5")]),
    ("B5", True, [("7。", "7"), ("7，8", "7,8"), ("（7，8）", "(7,8)"), ("7；8", "7;8"), ("７", "7"),
        ("x＝3", "3"), ("－5", "-5"), ("5％", "5%"), ("⌊2.5⌋", "2"), ("1⁄2", "1/2"), ("⅛", "1/8"),
        ("x₁", "x_1"), ("5℃", "5")]),
    ("B6", True, [(r"\textcolor{blue}{7}", "7"), (r"\color{red}{7}", "7"), (r"\boldsymbol{7}", "7"),
        (r"\bm{7}", "7"), (r"\underline{7}", "7"), (r"{\bf 7}", "7"), (r"\rm 7", "7"), (r"\large 7", "7"),
        (r"7\checkmark", "7"), ("**7**", "7"), (r"\sfrac12", "1/2")]),
    ("B7", True, [(r"0.\overline{3}", "1/3"), (r"0.1\overline{6}", "1/6"), (r"0.\overline{3}", r"0.\bar{3}")]),
    ("B8", True, [(r"(-\infty,\infty)", r"\mathbb{R}"), (r"\mathbb{R}", "all real numbers"),
        (r"\emptyset", "no solution"), (r"x\ne2", r"\mathbb{R}\setminus\{2\}")]),
    ("B10", True, [(".0015", r"1.5\times10^{-3}"), (r"5.\times10^2", "500"), (r"{5 \choose 2}", "10"),
        (r"\lg 100", "2"), ("2^-1", "1/2")]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "equal", "pairs"), REPORTED)
def test_reported_answers(row, equal, pairs):
    assert [pair for pair in pairs if grade(*pair).equal is not equal] == []


@pytest.mark.parametrize(
    ("prediction", "gold", "equal", "reason"),
    [
        (r"\frac{1}{2006!}", r"\frac{1}{2004!}", False, "small numbers are compared to 15 digits"),
        (r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}", False, "small numbers are compared to 15 digits"),
        (r"\sqrt{10^{40}+1}", "10^{20}", False, "large numbers are compared to 15 digits"),
        ("0.4444444", r"\frac{4}{9}", False, "decimals are compared to 6 digits"),
        ("x^2=4", "4", False, "the last side of an equation is taken for its value"),
        ("2x=6", "6", False, "the last side of an equation is taken for its value"),
        ("e^x=0", "e^x=-1", False, "two equations without a solution have the same solutions"),
        ("e^x=-3", "e^{2x}=-3", False, "two equations without a solution have the same solutions"),
        ("3(1/2)", "3.5", False, "a product is read as a mixed number"),
        ("5(1/4)", "5.25", False, "a product is read as a mixed number"),
        ("5!!", "15", True, "a double factorial is read as the factorial of a factorial"),
        ("7!!", "105", True, "a double factorial is read as the factorial of a factorial"),
        (r"\sqrt[3]{-8}", "-2", True, "roots of negative numbers are not real"),
        (r"\sqrt[5]{-32}", "-2", True, "roots of negative numbers are not real"),
        (r"d\pi", r"\pi d", True, "d before a command is read as a differential"),
        (r"d\sqrt{2}", r"\sqrt{2}d", True, "d before a command is read as a differential"),
        ("5 cents", r"\$5", False, "units are dropped, whichever they are"),
        (r"5\text{ billion}", "5", False, "any word after a number is dropped"),
    ],
)
def test_corrections_of_math_verify(prediction, gold, equal, reason):
    """Where math-verify alone is wrong; a correction whose line fails here, as a new version is right, may go."""
    assert grade(prediction, gold).equal is equal, reason
    assert grade(prediction, gold, grader="release").equal is not equal, reason


@pytest.mark.parametrize(
    ("prediction", "gold", "equal", "status"),
    [
        ("9" * 5000, "9" * 5000, True, "exact"),  # beyond what Python converts to an integer
        ("9" * 5000, "9" * 4999 + "8", False, "text"),
        ("10^{10^{10}}", "10^{10^{10}}", True, "exact"),
        (" ( 1, 2 ) ", "(1,2)", True, "exact"),
        ("007", "7", True, "rational"),
        ("-0", "0", True, "rational"),
        (25.0, "025", True, "rational"),
        (0.5, "1/2", True, "rational"),
        (r"\frac{1}{3}", "0.333", False, "rational"),
        (r"\sqrt{4}", 2, True, "number"),
        ("x+1", "1+x", True, "expression"),
        ("{2, 1}", r"\{1, 2\}", True, "set"),
        ("(1, 2)", "(2, 1)", False, "tuple"),
        ("(1, 2)", "3", False, "kind"),
        ("x=1", "y=1", False, "math_verify"),
        ("x>1", r"(1,\infty)", True, "math_verify"),
        ("2+2=5", "5", False, "kind"),
        (r"5\text{ m}", r"5\text{ cm}", False, "unit"),
        ("Yes", "no way", False, "text"),
        (r"\frac{1}{2", "1/2", False, "text"),
        ("x+y=1", "y+x=1", True, "math_verify"),
        (None, "42", False, "no_answer"),
        (" ", "42", False, "no_answer"),
        ("42", None, False, "no_gold"),
        ("", "", False, "no_gold"),
        ("10^{10^{10}}", "5", False, "too_large"),
        ("(10^9)!", "5", False, "too_large"),
        (r"\binom{10^9}{5 \cdot 10^8}", "5", False, "too_large"),
        (r"\sum_{k=1}^{10^9} k", "5", False, "too_large"),
        ("x" * 20_000, "5", False, "too_large"),
        ("(" * 500 + "1" + ")" * 500, "1", True, "exact"),
        (r"\frac{1}{1+" * 60 + "1" + "}" * 60, "1", False, "too_large"),
    ],
)
def test_status(prediction, gold, equal, status):
    verdict = grade(prediction, gold)
    assert (verdict.equal, verdict.status) == (equal, status)
    assert verdict.seconds >= 0


@pytest.mark.parametrize(
    ("prediction", "gold", "answer_type", "equal"),
    [
        ("1,234", "1234", "number", True),
        ("1,234", "1234", "set", False),
        ("1,234", r"\{1, 234\}", "set", True),
        ("x", "Let $x$ be a prime.", "description", None),
        (None, "Let $x$ be a prime.", "description", None),
        ("x", "Let $x$ be a prime.", None, False),
        ("infinite", r"Infinitely many. \textit{(``infinite'' is accepted.)}", "description", True),
        ("6", "Infinitely many.", "description", False),
        (
            r"1+\lfloor 2d \rfloor",
            r"$\lfloor 2d \rfloor + 1$, where $\lfloor \rfloor$ is the floor.",
            "description",
            True,
        ),
        (
            r"\lfloor 2d \rfloor",
            r"$\lfloor 2d \rfloor + 1$, where $\lfloor \rfloor$ is the floor.",
            "description",
            False,
        ),
    ],
)
def test_answer_type(prediction, gold, answer_type, equal):
    verdict = grade(prediction, gold, answer_type=answer_type)
    assert verdict.equal is equal
    assert (verdict.status == "ungraded") == (equal is None)


@pytest.fixture(scope="module")
def pool():
    with GradingPool(workers=2) as pool:
        yield pool


def test_pool_grades_in_order_from_any_thread(pool):
    cases = [
        ("x+1", "1+x"),
        ("x+1", "x"),
        ("9" * 5000, "10^{5000}-1"),
        (r"\frac12", "0.5"),
        (None, "1"),
        ("a", "p", "set"),
    ]
    verdicts = {}

    def run(name):
        verdicts[name] = [(verdict.equal, verdict.status) for verdict in pool.grade_all(cases)]

    threads = [threading.Thread(target=run, args=(name,)) for name in range(2)]
    for thread in threads:
        thread.start()
    run("main")
    for thread in threads:
        thread.join()
    expected = [(True, "expression"), (False, "expression"), (True, "number"), (True, "number")]
    expected += [(False, "no_answer"), (False, "expression")]
    assert verdicts == {name: expected for name in ("main", 0, 1)}


def test_hanging_answers_time_out_and_veto_nothing():
    prediction, gold = HANGING
    with GradingPool(workers=1, timeout=1) as pool:
        futures = [pool.submit(prediction, gold), pool.submit(prediction, prediction), pool.submit("x+1", "1+x")]
        verdicts = [future.result() for future in futures]
    assert [(verdict.equal, verdict.status) for verdict in verdicts] == [
        (False, "timeout"),
        (True, "exact"),
        (True, "expression"),
    ]
    assert verdicts[0].seconds == 1


def test_a_worker_without_memory_is_no_error():
    with GradingPool(workers=1, memory_limit_gib=0.001) as pool:
        verdict = pool.submit("x+1", "1+x").result()
    assert (verdict.equal, verdict.status in ("memory", "crashed")) == (False, True)


def test_a_worker_that_does_not_start_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    with GradingPool(workers=1) as pool:
        assert pool.submit("1", "1").result().equal  # needs no worker
        with pytest.raises(RuntimeError, match="does not start"):
            pool.submit("x+1", "1+x").result()


def test_a_worker_loads_neither_torch_nor_the_callers_program():
    code = "import sys; from opsd.grading import GradingPool; assert 'torch' not in sys.modules; "
    code += "pool = GradingPool(1); assert pool.submit('x+1', '1+x').result().equal"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)  # and its worker ends with the process


def run_main(capsys, *arguments):
    main([*map(str, arguments), "--grade_workers", "1"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_command_line(tmp_path, capsys):
    pairs, responses = tmp_path / "pairs.jsonl", tmp_path / "responses.jsonl"
    pairs.write_text('{"pred": 7, "gold": "7"}\n{"pred": null, "gold": 0.5}\n{"pred": "x+1", "gold": "1+x"}\n')
    lines = run_main(capsys, "--pairs", pairs)
    assert [(line["equal"], line["status"]) for line in lines] == [
        (True, "exact"),
        (False, "no_answer"),
        (True, "expression"),
    ]
    assert all(line.keys() == {"equal", "status", "seconds", "score"} for line in lines)
    responses.write_text(
        r'{"response": "<think>\\boxed{7}</think>8", "gold": 7}' + "\n" + r'{"response": "\\boxed{7}", "gold": 7}'
    )
    assert [line["extracted"] for line in run_main(capsys, "--responses", responses)] == [None, "7"]
    assert [line["equal"] for line in run_main(capsys, "--responses", responses, "--thinking")] == [False, False]
    assert [line["extracted"] for line in run_main(capsys, "--responses", responses, "--extract", "release")] == [
        "7",
        "7",
    ]


def test_command_line_reads_what_editors_write(tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes('\ufeff{"pred": "7", "gold": "7\u2028"}\r\n\n{"pred": 1, "gold": 2}\n'.encode())
    assert [line["equal"] for line in run_main(capsys, "--pairs", path)] == [True, False]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: Expecting"),
        ("3", "line 2: each line needs an object with gold and pred"),
        ('{"pred": "1"}', "line 2: each line needs an object with gold and pred"),
        ('{"pred": ["1"], "gold": "1"}', "line 2: an answer is text or a number, not list"),
        ('{"pred": "1", "gold": 1e20}', "line 2: the answer 1e+20 is a float of 2**53 or more, not exact"),
    ],
)
def test_command_line_refuses_bad_lines(line, message, tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"pred": "1", "gold": "1"}\n' + line + "\n")
    with pytest.raises(SystemExit):
        main(["--pairs", str(path)])
    assert f"{path}, {message}" in capsys.readouterr().err


def test_command_line_names_a_file_that_is_not_utf_8(tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes('{"pred": "é", "gold": "1"}'.encode("latin-1"))
    with pytest.raises(SystemExit):
        main(["--pairs", str(path)])
    assert f"{path}: not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("025", "025"),
        (25, "25"),
        (25.0, "25"),
        (0.5, "0.5"),
        (-3.0, "-3"),
        (float("nan"), None),
        (np.float32("nan"), None),
        (float("inf"), "inf"),
        (None, None),
        (np.int64(2**60 + 1), "1152921504606846977"),
        (2**70 + 1, "1180591620717411303425"),
        (np.float64(25), "25"),
        (np.float32(0.1), "0.1"),
        (0.10000000149011612, "0.1"),  # the same, after `tolist()` or a data set
        ("0.30000001192092896", "0.3"),
        (0.1259765625, "0.1259765625"),  # 129/1024 is a float32, too, but has these digits
        (1 / 3, "0.3333333333333333"),
    ],
)
def test_answer_text(value, expected):
    assert answer_text(value) == expected


@pytest.mark.parametrize("value", [True, np.bool_(True), [1, 2], {"answer": 1}])
def test_answer_text_refuses_what_is_no_answer(value):
    with pytest.raises(TypeError, match="an answer is text or a number, not .*; write it as text"):
        answer_text(value)


@pytest.mark.parametrize("value", [2.0**53, -1e300, np.float32(2**24)])
def test_answer_text_refuses_floats_that_have_lost_digits(value):
    with pytest.raises(ValueError, match=r"is a float of 2\*\*(53|24) or more, not exact; write it as text"):
        answer_text(value)
