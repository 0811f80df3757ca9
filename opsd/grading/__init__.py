"""Grading of mathematical answers: from the text of a response to a verdict."""

from opsd.grading.compare import GRADERS, Verdict, grade
from opsd.grading.extract import EXTRACT_METHODS, Answer, answer_text, extract_answer
from opsd.grading.workers import GradingPool

__all__ = ["EXTRACT_METHODS", "GRADERS", "Answer", "GradingPool", "Verdict", "answer_text", "extract_answer", "grade"]
