"""What optimizer steps compute, against their time and memory: tokens per second, MFU, shares of the phases."""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from data_collator import MicroBatch, Rollout
from opsd.metrics import STEP, Metrics

# FLOP/s of matrix products of 16 bits, dense, with sums in float32, from NVIDIA's data sheets. The first name that
# stands in the GPU's counts.
PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "GH200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "A100": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10G": 70e12, "RTX 4090": 165e12,
}  # fmt: skip
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # names in configs of mixtures of experts
SAMPLING = ("rollout", "rationale")


def peak_flops(device_name: str) -> float | None:
    """Return the FLOP/s of a GPU in 16 bits, by its name; `None` for one that is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)


class StepOperations:
    """
    Counts the floating-point operations that an optimizer step needs, by the formula in docs/metrics.md.

    Args:
        model: with its adapter, if there is one. Weights may be sharded.
    """

    def __init__(self, model: nn.Module):
        def size(weights: Sequence[nn.Parameter]) -> int:
            return sum(getattr(weight, "ds_numel", weight.numel()) for weight in weights)

        config = model.config.get_text_config()
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        body = [weight for weight in model.parameters() if weight is not embedding and weight is not head]
        self.body, self.head = size(body), size([head])
        self.trained = size([weight for weight in body if weight.requires_grad])
        self.trained_head = self.head * head.requires_grad
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.attention = 2 * config.num_hidden_layers * config.num_attention_heads * head_size

    def count(self, lengths: Sequence[int], num_predicted: int, is_student: bool) -> float:
        """
        Count the operations of one role's passes: the teacher's forward, the student's forward and backward.

        Args:
            lengths: of the role's sequences, in tokens.
            num_predicted: number of tokens whose distribution is computed.
            is_student: whether there is a backward pass.
        """
        num_tokens, attention = sum(lengths), self.attention * sum(length**2 for length in lengths)
        products = 2 * (self.body * num_tokens + self.head * num_predicted)
        if not is_student:
            return products + attention
        return 2 * products + 3 * attention + 2 * (self.trained * num_tokens + self.trained_head * num_predicted)


class Throughput(TrainerCallback):
    """
    Counts what optimizer steps compute, and logs it against their time and memory.

    An optimizer step's time goes from the end of the one before, or of a checkpoint or evaluation, to its own.

    Args:
        metrics: of the trainer.
        model: in training, before a launcher wraps it.
        teacher: the second model, if there is one.
    """

    def __init__(self, metrics: Metrics, model: PreTrainedModel, teacher: PreTrainedModel | None = None):
        self.metrics = metrics
        self._counts: dict[str, float] = defaultdict(float)  # since the last log
        self._operations: dict[str, StepOperations] = {}  # of each role's model
        self._peak_flops = None
        if metrics.accelerator.device.type == "cuda":
            config = model.config.get_text_config()
            is_half = model.dtype.itemsize == 2 or metrics.accelerator.mixed_precision in ("bf16", "fp16")
            if is_half and not any(getattr(config, name, None) for name in NUM_EXPERTS):
                self._peak_flops = peak_flops(torch.cuda.get_device_name())
                self._operations = {"student": StepOperations(model), "teacher": StepOperations(teacher or model)}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.metrics.start_step()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.metrics.end_step()

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.metrics.start_step()

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.metrics.start_step()

    def count(self, rollouts: Sequence[Rollout], batches: Sequence[MicroBatch], is_packed: bool) -> None:
        """Count the tokens of this process's part of a step. An evaluation is left out."""
        if self.metrics.mode != "train":
            return
        generated = [len(rollout.completion_ids) for rollout in rollouts]
        num_generated = sum(generated)
        lengths = {
            "student": [len(r.prompt_ids) + n for r, n in zip(rollouts, generated, strict=True)],
            "teacher": [len(r.teacher_prompt_ids) + n for r, n in zip(rollouts, generated, strict=True)],
        }
        prompts = {"student": "prompt_ids", "teacher": "teacher_prompt_ids"}
        if any(rollout.teacher_top is not None for rollout in rollouts):  # a server computes the teacher's
            del lengths["teacher"], prompts["teacher"]
        num_real = num_computed = sum(map(sum, lengths.values()))
        if not is_packed:
            num_computed = sum(
                getattr(b, prompt).numel() + b.completion_ids.numel() for b in batches for prompt in prompts.values()
            )
        self.metrics.add("padding_ratio", num_computed - num_real, num_computed)
        self._counts["generated"] += num_generated
        self._counts["trained"] += num_real
        if self._operations:
            for role, of_role in lengths.items():
                self._counts["flops"] += self._operations[role].count(of_role, num_generated, role == "student")

    def record(self) -> None:
        """Log the figures of the optimizer steps since the last call."""
        metrics = self.metrics
        if metrics.mode != "train":
            return
        seconds, num_steps = metrics.pop_seconds()
        counts, self._counts = self._counts, defaultdict(float)
        if num_steps == 0:
            return
        step, training = seconds[STEP], seconds["teacher"] + seconds["student"]
        sampling = sum(seconds.get(phase, 0.0) for phase in SAMPLING)
        metrics.add("step_share/sampling", sampling, step)
        metrics.add("step_share/teacher", seconds["teacher"], step)
        metrics.add("step_share/student", seconds["student"], step)
        metrics.add("step_share/rest", step - sampling - training, step)
        # A mean over the processes of what each does in its time; together they do so many times that
        num_processes = metrics.accelerator.num_processes
        metrics.add("tokens_per_second/rollout", num_processes * counts["generated"], seconds["rollout"])
        metrics.add("tokens_per_second/training", num_processes * counts["trained"], training)
        metrics.add("tokens_per_second/step", num_processes * counts["generated"], step)
        if self._peak_flops is not None:
            metrics.add("mfu", counts["flops"], self._peak_flops * training)
        if metrics.accelerator.device.type == "cuda":
            metrics.add_extreme("peak_memory", max, [torch.cuda.max_memory_allocated() / 2**30])
            torch.cuda.reset_peak_memory_stats()
