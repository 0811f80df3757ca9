"""
Model families without their weights: tiny random models of their architectures, with what differs in their tokenizers.

These are vocabularies beyond the tokenizer, system turns, no padding token, several end tokens. For each family: rows
of a batch are as alone, the fused loss is the dense one, a step moves the adapter and nothing else, and vLLM serves
the adapter as the training computes it.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from helpers import LOGPROB_GAP, MEAN_LOGPROB_GAP, TINY_MODEL, make_trainer_factory, rollout
from torch.testing import assert_close
from transformers import AutoTokenizer, GenerationConfig

TURN = "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
NEXT = "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
PLAIN = "{%- for message in messages -%}" + TURN + "{%- endfor -%}" + NEXT
SYSTEM = "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}" + PLAIN
# As Gemma's: a system turn is refused, and the assistant has another name
NO_SYSTEM = (
    "{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}"
    + PLAIN.replace("assistant", "model")
)


@dataclass(frozen=True)
class Family:
    """An architecture with small settings, and what its tokenizers and configurations are like."""

    settings: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None  # None: that of the tiny model, Qwen3's with a thinking mode
    has_padding_token: bool = True
    unused_ids: int = 0  # of the vocabulary beyond the tokenizer's
    loss_implementations: tuple[str, ...] = ("fused", "dense")
    attention: str = "sdpa"
    has_float64: bool = True
    served_modules: str | tuple[str, ...] = "all-linear"  # that vLLM serves natively


FAMILIES = {
    "Qwen3": Family({"head_dim": 32}, unused_ids=18),  # Qwen3: 151,936 ids, of which the tokenizer has 151,669
    "Qwen2": Family({}, SYSTEM, unused_ids=18),  # Qwen2.5 too
    "Llama": Family({"head_dim": 32, "tie_word_embeddings": False}, SYSTEM, has_padding_token=False),
    "Gemma2": Family(
        {
            "head_dim": 32,
            "sliding_window": 16,
            "query_pre_attn_scalar": 32,
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 5.0,
        },
        NO_SYSTEM,
        attention="eager",  # which alone, on a CPU, has the cap on the attention's logits
        has_float64=False,  # its softmax is in float32, to which the mask of a float64 is infinite
    ),
    "Gemma3": Family(
        {
            "head_dim": 32,
            "sliding_window": 16,
            "query_pre_attn_scalar": 32,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        NO_SYSTEM,
        unused_ids=18,
    ),
    "Mistral": Family(
        {"head_dim": 32, "sliding_window": 16, "tie_word_embeddings": False}, PLAIN, has_padding_token=False
    ),
    # vLLM's Phi has neither grouped heads nor another size than 4 times the hidden one
    "Phi": Family(
        {"num_key_value_heads": 2, "intermediate_size": 256, "tie_word_embeddings": False},
        PLAIN,
        unused_ids=18,
        loss_implementations=("dense",),
    ),
    "Phi3": Family({"tie_word_embeddings": False}, PLAIN, unused_ids=18),  # Phi-4 too
    "SmolLM3": Family({"no_rope_layers": [1, 0], "tie_word_embeddings": True}),
    "Qwen3Moe": Family(
        {
            "head_dim": 32,
            "moe_intermediate_size": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "tie_word_embeddings": False,
        },
        unused_ids=18,
        served_modules=("q_proj", "k_proj", "v_proj", "o_proj"),
        has_float64=False,  # the grouped product of the experts has none
    ),
}
TEXT_MODELS = {"Gemma3": "Gemma3Text"}  # whose configuration has another name than the model


@pytest.fixture
def make_family(problems, tmp_path):
    """Write a family's model and tokenizer, and return a factory of trainers on them."""

    def make(name: str):
        family, folder = FAMILIES[name], tmp_path / name
        tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
        if family.chat_template is not None:
            tokenizer.chat_template = family.chat_template
        if not family.has_padding_token:
            tokenizer.pad_token = None
        shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        shape |= {"num_key_value_heads": 1, "vocab_size": len(tokenizer) + family.unused_ids}
        shape |= {"max_position_embeddings": 1024, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
        shape |= {"pad_token_id": tokenizer.pad_token_id, "initializer_range": 0.2}
        config = getattr(transformers, TEXT_MODELS.get(name, name) + "Config")(**(shape | family.settings))
        torch.manual_seed(0)
        model = getattr(transformers, name + "ForCausalLM")(config)
        ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
        model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return make_trainer_factory(folder, problems, tmp_path)

    return make


def attention(name: str) -> dict[str, str]:
    return {"attn_implementation": FAMILIES[name].attention}


def random_adapter(trainer) -> None:
    """Give the adapter weights that move the student well away from the teacher."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            weight.data.copy_(0.1 * torch.randn(weight.shape, generator=generator))


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_losses_and_a_step(make_family, name):
    implementations = FAMILIES[name].loss_implementations
    settings = {"max_completion_length": 12, "loss_implementation": implementations[0]}
    trainer = make_family(name)(max_steps=1, model_init_kwargs=attention(name), **settings)
    assert set(trainer.end_ids) == set(trainer.processing_class.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    random_adapter(trainer)
    if FAMILIES[name].has_float64:
        trainer.model.double()  # so that rounding hides nothing; RoPE and norms round to float32 (6e-8)
    precision = 1e-5 if FAMILIES[name].has_float64 else 1e-3
    (batch,) = rollout(trainer)
    assert batch.prompt_ids.shape[1] > 16  # beyond the sliding windows
    losses = {
        kind: trainer.token_losses(trainer.model, batch, kind).loss.detach().double() for kind in implementations
    }
    assert losses["dense"].mean() > 1e-3
    assert_close(losses[implementations[0]], losses["dense"], rtol=precision, atol=precision / 100)

    with torch.no_grad():
        together = trainer.completion_logits(trainer.model, batch, "student")
        alone = []
        for ids, mask, completion, kept in zip(
            batch.prompt_ids, batch.prompt_mask.bool(), batch.completion_ids, batch.completion_mask, strict=True
        ):
            row = torch.cat([ids[mask], completion[kept]])[None]
            alone.append(trainer.model(input_ids=row).logits[0, -kept.sum() - 1 : -1])
    assert_close(together, torch.cat(alone), rtol=10 * precision, atol=precision)

    trainer.model.float()
    before = {key: weight.clone() for key, weight in trainer.model.named_parameters()}
    trainer.train()
    moved = {key for key, weight in trainer.model.named_parameters() if not torch.equal(weight, before[key])}
    assert moved == {key for key in before if "lora_" in key}


def test_a_head_with_a_bias_is_refused_by_the_fused_loss(make_family):
    with pytest.raises(ValueError, match="--loss_implementation fused needs a plain linear head without bias"):
        make_family("Phi")()


def test_attention_that_leaves_out_a_cap_is_refused(make_family):
    with pytest.raises(ValueError, match="attn_implementation='sdpa' leaves out the cap"):
        make_family("Gemma2")()


def test_adapters_on_experts_are_refused_with_vllm(make_family):
    with pytest.raises(ValueError, match="mixture of experts name the attention's --lora_target_modules"):
        make_family("Qwen3Moe")(use_vllm=True)


QUICK = ("Qwen3", "Gemma3")  # with unused ids, and with windows; the others with -m slow
NEEDS_GPU = {"Qwen3Moe": "vLLM's CPU build has no mixture of experts under an adapter: its kernel is Triton's"}


@pytest.mark.vllm
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_vllm_serves_the_adapter_as_the_training_computes_it(make_family, name):
    if name in NEEDS_GPU and not torch.cuda.is_available():
        pytest.skip(NEEDS_GPU[name])
    settings = {"max_completion_length": 12, "loss_implementation": FAMILIES[name].loss_implementations[0]}
    modules = FAMILIES[name].served_modules
    modules = modules if isinstance(modules, str) else list(modules)
    settings |= {"lora_settings": {"target_modules": modules}}
    trainer = make_family(name)(
        use_vllm=True, vllm_max_model_length=256, model_init_kwargs=attention(name), **settings
    )
    random_adapter(trainer)
    (batch,) = rollout(trainer)
    with torch.no_grad():
        logits = trainer.completion_logits(trainer.model, batch, "student")
    own = logits.log_softmax(-1).gather(1, batch.of_tokens(batch.completion_ids)[:, None])[:, 0]
    gap = (own - batch.of_tokens(batch.sampler_logprobs)).abs()
    trainer.sampler.close()
    assert gap.mean() <= 10 * MEAN_LOGPROB_GAP and gap.max() <= 10 * LOGPROB_GAP
