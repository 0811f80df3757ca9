"""Micro-batches without padding: packed, padded and one by one have the same losses and gradients."""

import pytest
import torch
from helpers import EMA, gradient_of_one_step, script_rollouts, work_out
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from data_collator import PackedRole, Rollout, start_rollouts
from opsd.packing import divide_evenly, packed_inputs, reason_against_packing
from opsd_trainer import OPSDTrainer

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def make_model(config, attention="sdpa"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize(
    "config",
    [
        Qwen3Config(**SIZES, **HEADS),
        Qwen2Config(**SIZES, num_attention_heads=4, num_key_value_heads=4),
        LlamaConfig(**SIZES, **HEADS),
        MistralConfig(**SIZES, **HEADS, sliding_window=3),
        Gemma3TextConfig(**SIZES, **HEADS, sliding_window=3, layer_types=["sliding_attention", "full_attention"]),
        Qwen3MoeConfig(**SIZES, **HEADS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    ],
    ids=lambda config: config.model_type,
)
def test_sequences_in_a_row_are_as_each_alone(config):
    model = make_model(config)
    assert reason_against_packing(model) is None
    sequences = [torch.randint(50, (length,)).tolist() for length in (9, 1, 4)]
    row = PackedRole.of_sequences(sequences)
    assert row.position_ids.tolist() == [[*range(9), 0, *range(4)]] and row.bounds.tolist() == [0, 9, 10, 14]
    packed = model(**packed_inputs(row, model.config), use_cache=False).logits[0]
    alone = torch.cat([model(torch.tensor([ids]), use_cache=False).logits[0] for ids in sequences])
    assert_close(packed, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "attention", "reason"),
    [
        (Qwen3Config(**SIZES, **HEADS), "eager", "--attn_implementation eager has no form"),
        (Qwen3NextConfig(**SIZES, **HEADS), "sdpa", "layers of the kind linear_attention"),
    ],
    ids=["eager", "linear_attention"],
)
def test_models_that_mix_sequences_are_found(config, attention, reason):
    with torch.no_grad():
        assert reason in reason_against_packing(make_model(config, attention))


def test_a_layer_that_loses_the_bounds_is_found(monkeypatch):
    model = make_model(Qwen3Config(**SIZES, **HEADS))
    attention = type(model.model.layers[0].self_attn)
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *args, sequence_lengths=None, **kwargs: forward(*args, **kwargs))
    with torch.no_grad():
        assert "its layers mix sequences" in reason_against_packing(model)


def test_micro_batches_have_about_equal_numbers_of_tokens():
    lengths = [10, 2, 3, 1, 9, 4, 5, 6]
    rollouts = [Rollout(row, "", [0] * length, [0] * length) for row, length in enumerate(lengths)]
    parts = divide_evenly(rollouts, 3)
    assert sorted(rollout.row for part in parts for rollout in part) == list(range(8))
    assert [sum(len(rollout.prompt_ids) for rollout in part) for part in parts] == [14, 13, 13]
    one_long = [Rollout(row, "", [0] * length, [0]) for row, length in enumerate((1000, 1, 1, 1))]
    assert [[rollout.row for rollout in part] for part in divide_evenly(one_long, 4)] == [[0], [1], [2], [3]]
    assert divide_evenly(rollouts, 1) == [rollouts]


@pytest.mark.parametrize("implementation", ["fused", "dense"])
@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.0, "jsd_token_clip": 0.05},
        {"top_k_loss": 8},
        {"correct_weight": 2.0, "incorrect_weight": 0.5, "policy_gradient_weight": 0.1, "num_generations": 2},
        {"lora": False, "gradient_checkpointing": True} | EMA,
        {"num_loss_tokens_to_skip": 3},
    ],
    ids=["clip", "top_k", "weights", "ema", "skip"],
)
def test_losses_and_gradients_without_padding(make_trainer, settings, implementation):
    trainer = make_trainer(loss_implementation=implementation, **settings)
    trainer.teacher.start(trainer.model, {}, None)
    with torch.no_grad():  # a student that is not the teacher
        for weight in (parameter for parameter in trainer.model.parameters() if parameter.requires_grad):
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    assert not trainer._is_packed
    trainer._check_packing()
    assert trainer._is_packed
    lengths = iter((9, 30, 14, 21))  # in characters
    script_rollouts(trainer, lambda problem, place: work_out(problem, place == 0)[: next(lengths)] + "<|im_end|>")
    rollouts = start_rollouts([trainer.train_dataset[row // trainer.num_generations] for row in range(4)])
    trainer.model.train()
    trainer.prepare_step(rollouts, 1)
    assert len({len(rollout.completion_ids) for rollout in rollouts}) == 4

    def compute(batches, is_packed):
        trainer._is_packed = is_packed
        trainer.model.zero_grad()
        losses = []
        for batch in batches:
            losses.append(trainer.token_losses(trainer.model, batch))
            losses[-1].loss.sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
        statistics = [torch.cat(values) for values in zip(*(part.statistics for part in losses), strict=True)]
        return torch.cat([part.loss for part in losses]).detach(), gradient, statistics

    packed = compute([trainer.collator(rollouts)], True)
    padded = compute([trainer.collator(rollouts)], False)
    alone = compute([trainer.collator([rollout]) for rollout in rollouts], False)
    assert packed[0].abs().sum() > 0 and packed[1].abs().sum() > 0
    for other in (padded, alone):
        assert_close(packed, other, rtol=1e-4, atol=1e-5)


def test_a_step_does_not_depend_on_the_micro_batches(make_trainer):
    whole = gradient_of_one_step(make_trainer, 1)
    for accumulation, packing in ((1, False), (2, True), (4, True), (4, False)):
        other = gradient_of_one_step(make_trainer, accumulation, packing=packing)
        assert_close(other, whole, rtol=1e-4, atol=1e-5)


def test_a_limit_of_tokens_divides_micro_batches_and_changes_nothing(make_trainer):
    whole = gradient_of_one_step(make_trainer, 2)
    sizes = []
    compute = OPSDTrainer._share_of_loss

    def note(self, model, batch):
        sizes.append((len(batch.rows), sum(batch.student.lengths) + sum(batch.teacher.lengths)))
        return compute(self, model, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OPSDTrainer, "_share_of_loss", note)
        gradient_of_one_step(make_trainer, 2)
        assert [rows for rows, _ in sizes] == [4, 4]
        limit = max(tokens for _, tokens in sizes) // 2
        for max_tokens in (limit, 1):
            sizes.clear()
            limited = gradient_of_one_step(make_trainer, 2, max_tokens_per_micro_batch=max_tokens)
            assert all(tokens <= max_tokens or rows == 1 for rows, tokens in sizes) and len(sizes) > 2
            assert sum(rows for rows, _ in sizes) == 8
            assert_close(limited, whole, rtol=1e-5, atol=1e-6)
    assert len(sizes) == 8
