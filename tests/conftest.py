"""Fixtures of several test files: the tiny model, problems, and a trainer on them."""

from pathlib import Path

import pytest
from datasets import Dataset
from helpers import TINY_MODEL, make_problems, make_trainer_factory


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that start processes or engines: were they last, one worker would wait for the other."""
    long = {item.path for item in items if item.get_closest_marker("multiprocess") or item.get_closest_marker("vllm")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="session")
def tiny_model_dir() -> Path:
    """The fixed model (trained Qwen3, 0.5 M parameters, float32); `tiny_model/README.md` says how it was made."""
    return TINY_MODEL


@pytest.fixture(scope="session")
def problems() -> Dataset:
    return make_problems()


@pytest.fixture
def make_trainer(tiny_model_dir, problems, tmp_path):
    return make_trainer_factory(tiny_model_dir, problems, tmp_path)
