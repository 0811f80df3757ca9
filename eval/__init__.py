"""The vLLM evaluator."""

import opsd  # noqa: F401  refuses a program of another clone
