"""
A larger model that adds right, with the same tokenizer: it teaches the base model by on-policy distillation.

    python quickstart/teacher_model.py --output_dir outputs/quickstart/teacher --seed 0
"""

import argparse
import logging
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from quickstart.base_model import BaseModelConfig, create_model, pretrain, train_tokenizer

logger = logging.getLogger(__name__)


def right_carries(seed: int) -> BaseModelConfig:
    """Return a pre-training behind the student's prompt alone, in which no carry is dropped."""
    return BaseModelConfig(
        seed=seed,
        problem_only_examples=32,
        reference_examples=0,
        drop_carry_overflowing=0.0,
        drop_carry_other=0.0,
        steps=500,
        learning_rate=2e-3,
    )


def create_large_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Return a float32 model twice as wide as the base model and one layer deeper, with random weights."""
    small = create_model(tokenizer)
    larger = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
    larger |= {"intermediate_size": 512, "initializer_range": 0.06, "layer_types": None}
    model = Qwen3ForCausalLM(Qwen3Config(**small.config.to_dict() | larger))
    model.generation_config = small.generation_config
    return model


def build_teacher_model(output_dir: Path, seed: int) -> Path:
    """Build the model in `output_dir`, unless it is there already. Takes some minutes of one CPU core."""
    config = right_carries(seed)
    if (output_dir / "config.json").is_file():
        logger.info("there is a model in %s already", output_dir)
        return output_dir
    tokenizer = train_tokenizer(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create_large_model(tokenizer)
    pretrain(model, tokenizer, config)
    tokenizer.save_pretrained(output_dir)
    model.save_pretrained(output_dir)
    logger.info("%.1f M parameters are in %s", model.num_parameters() / 1e6, output_dir)
    return output_dir


def main() -> None:
    parser = argparse.ArgumentParser(description="Build a larger model that teaches the quickstart's base model.")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the model")
    parser.add_argument("--seed", type=int, default=0, help="of weights and training examples (default: %(default)s)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    build_teacher_model(arguments.output_dir, arguments.seed)


if __name__ == "__main__":
    main()
