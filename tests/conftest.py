"""Fixtures of several test files: the tiny model, problems, and a trainer on them."""

import os
from collections.abc import Generator
from pathlib import Path

import pytest
from datasets import Dataset
from helpers import TINY_MODEL, make_problems, make_trainer_factory


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that start processes or engines: were they last, one worker would wait for the other."""
    long = {item.path for item in items if item.get_closest_marker("multiprocess") or item.get_closest_marker("vllm")}
    items.sort(key=lambda item: item.path not in long)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """
    Skip what PyTorch itself cannot do with an `ATEN_CPU_CAPABILITY` below that of the processor.

    Its attention in bfloat16 asks the processor for AMX, and then misses AVX-512 in itself.
    """
    try:
        return (yield)
    except RuntimeError as error:
        if "ATEN_CPU_CAPABILITY" in os.environ and "only supported when avx512 is supported" in str(error):
            pytest.skip(f"PyTorch with this ATEN_CPU_CAPABILITY: {error}")
        raise


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
