"""What an optimizer step computes: operations by hand, peaks of GPUs, tokens and padding in the log."""

import pytest
from helpers import Recorder, perturb_student, script_rollouts, work_out
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from opsd.packing import say_padded
from opsd.throughput import StepOperations, peak_flops
from opsd_trainer import OPSDConfig

LENGTHS, NUM_PREDICTED = (5, 3), 4


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peaks_of_gpus(name, expected):
    assert peak_flops(name) == expected


def make_model(**settings):
    sizes = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 3}
    return Qwen3ForCausalLM(Qwen3Config(**(sizes | settings)))


# Of a layer: q and o 8 x 12, k and v 8 x 6, three matrices 8 x 6, norms 2 x 8 and 2 x 3; and the last norm
BODY = 2 * (2 * 96 + 2 * 48 + 3 * 48 + 22) + 8
HEAD = 50 * 8
ATTENTION = 2 * 2 * 4 * 3 * (5**2 + 3**2)  # 2 L A sum(s^2)


@pytest.mark.parametrize("is_tied", [True, False])
def test_operations_of_full_fine_tuning(is_tied):
    operations = StepOperations(make_model(tie_word_embeddings=is_tied))
    products = 2 * (BODY * 8 + HEAD * 4)
    assert operations.count(LENGTHS, NUM_PREDICTED, is_student=False) == products + ATTENTION
    # The backward pass takes one product for the inputs and one for the weights
    assert operations.count(LENGTHS, NUM_PREDICTED, is_student=True) == 3 * products + 3 * ATTENTION


def test_operations_with_an_adapter():
    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    operations = StepOperations(get_peft_model(make_model(), adapter))
    trained = 2 * (2 * 8 + 12 * 2)
    products = 2 * ((BODY + trained) * 8 + HEAD * 4)
    assert operations.count(LENGTHS, NUM_PREDICTED, is_student=False) == products + ATTENTION
    # No weight of the base has a gradient
    assert operations.count(LENGTHS, NUM_PREDICTED, True) == 2 * products + 3 * ATTENTION + 2 * trained * 8


@pytest.mark.parametrize("packing", [True, False])
def test_padding_and_tokens_of_a_step(make_trainer, packing):
    trainer = make_trainer(packing=packing, max_steps=1, callbacks=[recorder := Recorder()])
    perturb_student(trainer)
    lengths = iter((5, 40, 12, 25))  # in characters
    script_rollouts(trainer, lambda problem, _: work_out(problem)[: next(lengths)] + "<|im_end|>")
    counted, prepared = [], trainer.throughput.count

    def keep(rollouts, batches, is_packed):
        counted.append((rollouts, batches))
        prepared(rollouts, batches, is_packed)

    trainer.throughput.count = keep
    trainer.train()
    ((rollouts, (batch,)),) = counted
    real = sum(len(r.prompt_ids) + len(r.teacher_prompt_ids) + 2 * len(r.completion_ids) for r in rollouts)
    computed = (
        real if packing else sum(batch.model_inputs(role)["input_ids"].numel() for role in ("student", "teacher"))
    )
    logs = recorder.logs[0]
    assert logs["padding_ratio"] == pytest.approx((computed - real) / computed, abs=1e-9)
    assert (logs["padding_ratio"] > 0.1) == (not packing)
    # Tokens in a time are a rate; that they are the right tokens shows in the time that they stand for
    training = logs["seconds/teacher"] + logs["seconds/student"]
    assert logs["tokens_per_second/training"] * training == pytest.approx(real, rel=1e-6)
    generated = sum(len(rollout.completion_ids) for rollout in rollouts)
    assert logs["tokens_per_second/rollout"] * logs["seconds/rollout"] == pytest.approx(generated, rel=1e-6)
    assert logs["tokens_per_second/step"] * logs["seconds/step"] == pytest.approx(generated, rel=1e-6)
    shares = [logs[f"step_share/{phase}"] for phase in ("sampling", "teacher", "student", "rest")]
    assert sum(shares) == pytest.approx(1.0) and min(shares) > 0.0
    assert "mfu" not in logs and "peak_memory" not in logs  # of GPUs alone


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens_per_micro_batch": 0}, r"--max_tokens_per_micro_batch 0: must lie in \[1, inf\)"),
        (
            {"max_tokens_per_micro_batch": 100, "packing": False},
            "--max_tokens_per_micro_batch 100: must be left out with --packing false",
        ),
    ],
)
def test_limits_of_tokens_that_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        OPSDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_a_limit_for_a_model_that_is_padded_is_refused(caplog):
    say_padded(None, 100)
    with pytest.raises(ValueError, match="--max_tokens_per_micro_batch 100: the model cannot pack .*a reason"):
        say_padded("a reason", 100)
    say_padded("a reason", None)
    assert "micro-batches are padded" in caplog.text
