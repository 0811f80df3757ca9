"""Grading: from the text of a response to a verdict, of mathematics or by another verifier."""

from opsd.grading.compare import GRADERS, Verdict, grade
from opsd.grading.extract import EXTRACT_METHODS, Answer, answer_text, extract_answer
from opsd.grading.verifiers import BUILT_IN, RIGHT, Row, check_answers, describe_verifier, extract, find_rule
from opsd.grading.workers import GradingPool

__all__ = [
    "BUILT_IN",
    "EXTRACT_METHODS",
    "GRADERS",
    "RIGHT",
    "Answer",
    "GradingPool",
    "Row",
    "Verdict",
    "answer_text",
    "check_answers",
    "describe_verifier",
    "extract",
    "extract_answer",
    "find_rule",
    "grade",
]
