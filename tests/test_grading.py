"""Extraction of final answers and their comparison: tables of cases."""

import threading

import pytest

from eval import grading
from eval.grading import answer_text, extract_answer, is_equal, normalise


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
    ("prediction", "gold", "expected"),
    [
        ("42", "42", True),
        ("042", "42", True),
        ("42", "042", True),
        ("+42", "42", True),
        ("-42", "42", False),
        ("-0", "0", True),
        ("42", "43", False),
        ("1 2", "12", False),
        (" ( 1, 2 ) ", "(1,2)", True),
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac12", r"\frac{1}{2}", True),
        ("1/2", r"\dfrac{1}{2}", True),
        (r"\frac{1}{2}", r"\frac{1}{3}", False),
        (r"\sqrt{12}", r"2\sqrt{3}", True),
        (r"2\sqrt{3}", r"3\sqrt{2}", False),
        (r"\{2, 1\}", r"\{1, 2\}", True),
        ("(2, 1)", "(1, 2)", False),
        ("10^{6}", "1000000", True),
        (r"\text{Answer: } 42", "42", True),
        (r"\frac{448}{3", r"\frac{448}{3}", False),
        ("9" * 5000, "9" * 5000, True),  # beyond what Python converts to an integer
        ("9" * 5000, "9" * 4999 + "8", False),
        (None, "42", False),
        ("42", None, False),
        ("", "42", False),
        ("", "", False),
    ],
)
def test_is_equal(prediction, gold, expected):
    assert is_equal(prediction, gold) is expected


def test_exact_answers_and_integers_need_no_algebra(monkeypatch):
    def fail(*args, **options):
        raise AssertionError("went through math-verify")

    monkeypatch.setattr(grading, "parse", fail)
    monkeypatch.setattr(grading, "verify", fail)
    assert is_equal("10^{10^{10}}", "10^{10^{10}}")
    assert is_equal("007", "7")
    assert not is_equal("8", "7")


def test_comparison_works_outside_the_main_thread():
    cases = [(r"\frac12", "0.5", True), (r"\sqrt{12}", r"2\sqrt{3}", True), ("1/2", "1/3", False)]
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.extend(is_equal(p, g) for p, g, _ in cases))
    thread.start()
    thread.join()
    assert verdicts == [expected for _, _, expected in cases]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("025", "025"),
        (25, "25"),
        (25.0, "25"),
        (0.5, "0.5"),
        (-3.0, "-3"),
        (float("nan"), None),
        (float("inf"), "inf"),
        (None, None),
    ],
)
def test_answer_text(value, expected):
    assert answer_text(value) == expected


@pytest.mark.parametrize("value", [True, [1, 2], {"answer": 1}])
def test_answer_text_refuses_what_is_no_answer(value):
    with pytest.raises(TypeError, match="text or a number"):
        answer_text(value)


def test_normalise():
    assert normalise(r" \frac 1 2 ") == r"\frac1 2"
    assert normalise("000") == "0"
    assert normalise("x_007") == "x_007"
