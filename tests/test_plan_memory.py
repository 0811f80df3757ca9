"""The memory planner: peaks and sums that can be added up by hand."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import plan_memory
from opsd.run.arguments import ModelArguments
from opsd_trainer import OPSDConfig

MIB = 2**20


def test_peak_of_a_chain_of_products():
    """x (1 MiB) -> y (2 MiB) -> tanh y (2 MiB) -> z (1 MiB)."""
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(256, 512, bias=False), nn.Tanh(), nn.Linear(512, 256, bias=False))
        x = torch.empty(1024, 256)

        def forward():
            with torch.no_grad():
                return model(x + 1.0)

        assert plan_memory.peak_bytes(model, forward) == (1 + 2 + 2) * MIB  # x, y and its tanh at once

        def train():
            model(x + 1.0).sum().backward()

        # x, tanh y, z and its sum, the gradient of z is expanded; then those of tanh y and y beside the weights' own
        weights = 2 * 256 * 512 * 4
        assert plan_memory.peak_bytes(model, train) <= (1 + 2 + 1 + 2 + 2) * MIB + weights + 64


@pytest.mark.parametrize(("lora", "ema"), [(True, False), (True, True), (False, False)])
def test_plan_of_a_small_model(tiny_model_dir, lora, ema):
    config = plan_memory.read_config(str(tiny_model_dir))
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = [(hidden, q), (hidden, kv), (hidden, kv), (q, hidden), (hidden, inner), (hidden, inner), (inner, hidden)]
    base = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2) + hidden
    base += layers * (sum(a * b for a, b in shapes) + 2 * hidden + 2 * config.head_dim)
    adapter = layers * 4 * sum(a + b for a, b in shapes)
    args = OPSDConfig(
        use_cpu=True, bf16=True, fixed_teacher=lora and not ema, use_ema_teacher=ema, use_vllm=True,
        vllm_gpu_memory_utilization=0.5, max_length=2048, max_completion_length=100, per_device_train_batch_size=2,
    )  # fmt: skip
    model_args = ModelArguments(
        model_name_or_path=str(tiny_model_dir), dtype="bfloat16" if lora else "float32", use_peft=lora, lora_r=4,
        lora_target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )  # fmt: skip
    parts = plan_memory.plan(args, model_args, num_processes=8, gpu_bytes=2**30)

    trained = adapter if lora else base
    assert parts["weights"] == (2 * base + 4 * adapter if lora else 4 * base)
    assert parts["gradients, Adam, DDP's buckets"] == (4 + 8 + 4) * trained
    copies = [value for name, value in parts.items() if name.startswith("teacher's copy")]
    assert copies == ([8 * trained] if ema else [])
    assert parts["engine"] == 2**29
    loss = (2 * 4 + 2) * config.vocab_size * 200  # two float32 buffers and one of 16 bits, for all 2 x 100 tokens
    assert parts["loss"] == loss + (0 if lora else 4 * config.vocab_size * hidden)
    # Checkpoints of the layers' inputs, and then less than twenty activations of the widest kind in one layer
    width, tokens = 2 if lora else 4, 2 * (plan_memory.PROMPT_TOKENS + 100)
    checkpoints = width * layers * hidden * tokens
    assert checkpoints < parts["student's pass"] < checkpoints + 4 * 20 * tokens * inner
    held = parts["weights"] + 16 * trained + sum(copies) + plan_memory.CONTEXT
    assert parts["sampling"] == held + 2**29
    longest = max(parts["teacher's pass"], parts["student's pass"] + parts["loss"])
    assert parts["training"] == held + 2**29 + longest


def test_a_second_model_is_counted(tiny_model_dir):
    settings = {"use_cpu": True, "bf16": True, "max_length": 2048, "max_completion_length": 100}
    model_args = ModelArguments(model_name_or_path=str(tiny_model_dir), dtype="bfloat16", use_peft=True)
    own, other = (
        plan_memory.plan(OPSDConfig(**settings, **teacher), model_args, 2, 2**30)
        for teacher in ({"fixed_teacher": True}, {"teacher_model_name_or_path": str(tiny_model_dir)})
    )
    assert other["weights of the teacher model"] == 2 * plan_memory.build(str(tiny_model_dir), None).num_parameters()
    assert other["training"] - own["training"] == other["weights of the teacher model"]
    short = OPSDConfig(**settings, teacher_model_name_or_path=str(tiny_model_dir), teacher_context="none")
    assert plan_memory.plan(short, model_args, 2, 2**30)["teacher's pass"] < other["teacher's pass"] / 2


def test_flags_to_change_come_in_the_order_of_their_cost():
    args = OPSDConfig(use_cpu=True, bf16=False, use_vllm=True, per_device_train_batch_size=4)
    names = [name for name, _ in plan_memory.suggestions(args)]
    assert names[0] == "vllm_enable_sleep_mode" and names[-2:] == ["per_device_train_batch_size", "max_length"]
    args.vllm_enable_sleep_mode, args.vllm_gpu_memory_utilization, args.max_length = True, 0.3, 2048
    assert plan_memory.suggestions(args) == [("per_device_train_batch_size", 1)]
