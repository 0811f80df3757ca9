"""The quickstart: a tiny model, its task, and all methods on it."""

import opsd  # noqa: F401  refuses a program of another clone
