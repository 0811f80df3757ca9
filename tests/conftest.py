"""What several test files share: the quickstart's trained tiny model, and a trainer on it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset
from peft import LoraConfig
from tiny_settings import CPU, OPSD
from transformers import AutoTokenizer

from opsd_trainer import OPSDConfig, OPSDTrainer
from quickstart.addition import training_problems
from quickstart.base_model import build_base_model

ROOT = Path(__file__).parents[1]


def build_tiny_model() -> Path:
    """The quickstart's base model (trained Qwen3, 0.5 M parameters), in the quickstart's own cache."""
    return build_base_model(ROOT / "outputs" / "quickstart" / "base")


@pytest.fixture(scope="session")
def tiny_model_dir() -> Path:
    return build_tiny_model()


def make_problems() -> Dataset:
    """64 additions with `problem`, `solution` and `answer`."""
    return Dataset.from_list(training_problems(seed=0, size=64))


def make_trainer_factory(model_dir: Path, problems: Dataset, folder: Path) -> Callable[..., OPSDTrainer]:
    """A function that builds an `OPSDTrainer`; keyword arguments replace `tiny_settings` and those below."""

    def make(
        dataset=problems, model=None, lora=True, lora_settings=None, callbacks=None, eval_dataset=None, **settings
    ):
        defaults = (
            CPU
            | OPSD
            | {
                "output_dir": str(folder / "run"),
                "per_device_train_batch_size": 4,
                "max_steps": 2,
                "save_strategy": "no",
                "fixed_teacher": lora,
            }
        )
        adapter = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | (
            lora_settings or {}
        )
        return OPSDTrainer(
            model=model or str(model_dir),
            args=OPSDConfig(**(defaults | settings)),
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            processing_class=AutoTokenizer.from_pretrained(model_dir),
            peft_config=LoraConfig(**adapter) if lora and model is None else None,
            callbacks=callbacks,
        )

    return make


@pytest.fixture(scope="session")
def problems() -> Dataset:
    return make_problems()


@pytest.fixture
def make_trainer(tiny_model_dir, problems, tmp_path):
    return make_trainer_factory(tiny_model_dir, problems, tmp_path)
