"""
A larger model that adds right, to teach the quickstart's base model by on-policy distillation.

    python quickstart/teacher_model.py --base_model outputs/quickstart/model --output_dir outputs/quickstart/teacher

It is the base model with twice the layers. The new ones change nothing at first. Then all is trained on
additions after the student's prompt, in which no carry is dropped.
"""

import argparse
import logging
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from quickstart.base_model import BaseModelConfig, pretrain

logger = logging.getLogger(__name__)


def right_carries(seed: int) -> BaseModelConfig:
    """Return a training after the student's prompt alone, in which no carry is dropped."""
    return BaseModelConfig(
        seed=seed,
        problem_only_examples=32,
        reference_examples=0,
        drop_carry_overflowing=0.0,
        drop_carry_other=0.0,
        steps=40,
        learning_rate=2e-3,
        warmup_steps=10,
    )


def deepen(model: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """Return a model with a new layer after each of a model's own. Its logits are those of the model."""
    config = type(model.config)(**model.config.to_dict() | {"layer_types": None})
    config.num_hidden_layers *= 2
    config.layer_types = 2 * model.config.layer_types
    deep = Qwen3ForCausalLM(config)
    deep.generation_config = model.generation_config
    deep.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    deep.model.norm.load_state_dict(model.model.norm.state_dict())
    for i, layer in enumerate(deep.model.layers):
        layer.load_state_dict(model.model.layers[i // 2].state_dict())
        if i % 2:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                torch.nn.init.zeros_(projection.weight)
    return deep


def build_teacher_model(base_model: Path, output_dir: Path, seed: int) -> None:
    """Build the teacher of a base model in `output_dir`. Takes about 20 seconds of one CPU core."""
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    model = deepen(Qwen3ForCausalLM.from_pretrained(base_model))
    pretrain(model, tokenizer, right_carries(seed))
    tokenizer.save_pretrained(output_dir)
    model.save_pretrained(output_dir)
    logger.info("a model of %.2f M parameters is in %s", model.num_parameters() / 1e6, output_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build a larger model that teaches the quickstart's base model.")
    parser.add_argument("--base_model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the larger model")
    parser.add_argument("--seed", type=int, default=0, help="of the training examples (default: %(default)s)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    build_teacher_model(arguments.base_model, arguments.output_dir, arguments.seed)


if __name__ == "__main__":
    main()
