"""
Train steps of `OPSDTrainer` on a GPU that is not there, for `test_fake_cuda.py`.

Fake tensors have shape, dtype and device, and no values. A mix of devices or dtypes raises where CUDA would raise, and
so does reading a value, for which a GPU would have to be waited for. Prints for each case the error, or null.
"""

import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import PartialState
from helpers import TINY_MODEL, make_problems, make_trainer_factory, script_rollouts
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl.experimental.gold import gold_trainer

from data_collator import start_rollouts
from opsd.adapters import disable_input_dtype_casting
from opsd.losses import fused
from opsd.run import checkpoints
from opsd.teacher import FrozenWeights
from opsd_trainer import OPSDTrainer

CUDA = torch.device("cuda", 0)


class Precision(TorchDispatchMode):
    """Refuses matrix products of float32, which are many times slower, and casts of 16 bits to float32 and back."""

    def __init__(self):
        super().__init__()
        self.num_products = 0
        self._widened: dict[int, torch.Tensor] = {}  # id -> what was cast to float32; kept, so that ids stay apart

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm"):
            factors = [argument for argument in args if isinstance(argument, torch.Tensor)][-2:]
            if factors[0].shape[-1] > 1:  # the other one is the outer product of positions and frequencies
                self.num_products += 1
                dtypes = {factor.dtype for factor in factors}
                if dtypes != {torch.bfloat16}:
                    raise TypeError(f"{name} of {dtypes}, {[tuple(factor.shape) for factor in factors]}")
        elif name == "_to_copy":
            dtypes = (args[0].dtype, output.dtype)
            if dtypes == (torch.bfloat16, torch.float32):
                self._widened[id(output)] = output
            elif dtypes == (torch.float32, torch.bfloat16) and id(args[0]) in self._widened:
                raise TypeError(f"cast to float32 and back: {tuple(output.shape)}")
        return output


def move_to_fake_cuda(trainer: OPSDTrainer) -> None:
    """Put fake weights on the device "cuda", and let accelerate, autocast and the clock believe that it is there."""
    for module in trainer.model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                fake = torch.empty(weight.shape, dtype=weight.dtype, device=CUDA)
                module._parameters[name] = nn.Parameter(fake, requires_grad=weight.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=CUDA)
    for state in (trainer.accelerator.state, PartialState()):  # new states are copies of the second one
        state.device = CUDA
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_: True
    trainer.metrics._now = lambda: 0.0
    # A kernel has no fake form; the eager one has the same arguments
    fused.chunk_losses_triton = fused.chunk_losses
    # The two reads that a step has: GOLD's of the loss, after each backward pass, and that of the gradient's norm
    gold_trainer.float = lambda loss: 0.0
    checkpoints.math = SimpleNamespace(isfinite=lambda norm: True, nan=math.nan)


def train_step(folder: Path, lora: bool = True, plant: Callable = lambda trainer: None, **settings: Any) -> None:
    """Train one optimizer step of two micro-batches. `plant` may change the trainer before it."""
    # Eager attention: the fused ones are chosen by what the GPU can do
    config = Qwen3Config.from_pretrained(TINY_MODEL, num_hidden_layers=2, attn_implementation="eager")
    model = Qwen3ForCausalLM(config).to(torch.bfloat16 if lora else torch.float32)
    model.name_or_path = str(TINY_MODEL)
    if lora:
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer = make_trainer_factory(TINY_MODEL, make_problems(), folder)(
        model=model,
        bf16=True,
        gradient_checkpointing=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        **{"fixed_teacher": lora} | settings,
    )
    script_rollouts(trainer)
    trainer.model.train()
    batches = trainer.prepare_step(start_rollouts([trainer.train_dataset[i // 2] for i in range(4)]), 2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        move_to_fake_cuda(trainer)
        trainer._buffered_inputs = [batch.to(CUDA) for batch in batches]
        trainer._loss_denominator = trainer._loss_denominator.to(CUDA)
        trainer._buffered_on_policy = [True, True]
        trainer._fill_buffer = lambda *args: None  # it is full
        trainer.create_optimizer()
        trainer.teacher.start(trainer.model, trainer._run_state, None)
        frozen = FrozenWeights(trainer.model, trainer.accelerator)
        plant(trainer)
        casts = disable_input_dtype_casting(trainer.model, active=trainer.accelerator.native_amp)
        with casts, Precision() as precision:
            for _ in range(2):
                trainer.training_step(trainer.model, [])
            norm = trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 0.1)
            trainer._get_grad_norm(trainer.model, norm)
            trainer.optimizer.step()
            trainer.teacher.update(1)
            trainer.model.zero_grad()
            sums = frozen._sums()
        num_frozen = sum(not weight.requires_grad for weight in trainer.model.parameters())
        assert precision.num_products > 100 and norm.device == sums.device == CUDA and len(sums) == num_frozen


# Faults


def put_weights_on_the_cpu(trainer: OPSDTrainer) -> None:
    original = trainer._loss_arguments
    trainer._loss_arguments = lambda batch: original(batch) | {"weights": original(batch)["weights"].cpu()}


def cast_inputs_to_float32(trainer: OPSDTrainer) -> None:
    for module in trainer.model.modules():
        if isinstance(module, LoraLayer):
            module._cast_input_dtype = lambda x, dtype: x.to(dtype)


def read_the_loss(trainer: OPSDTrainer) -> None:
    original = trainer.mark_nonfinite
    trainer.mark_nonfinite = lambda loss, per_token: original(loss * float(loss.item() > 0.0), per_token)


EMA = {"fixed_teacher": False, "use_ema_teacher": True}
GRADED = {"correct_weight": 0.5, "policy_gradient_weight": 0.1, "num_generations": 2}
CASES: dict[str, dict[str, Any]] = {
    "recipe": {"beta": 0.0, "jsd_token_clip": 0.05},
    "jsd": {},
    "average": EMA,
    "graded": GRADED,
    "sampled token": {"use_tinker_loss": True},
    "top k": {"top_k_loss": 20},
    "full": {"lora": False, "fixed_teacher": False},
    "full, average": EMA | {"lora": False},
}
FAULTS: dict[str, dict[str, Any]] = {
    "CPU tensor in the loss": GRADED | {"plant": put_weights_on_the_cpu},
    "float32 adapter cast": {"plant": cast_inputs_to_float32},
    "read of a value": {"plant": read_the_loss},
}


def main() -> None:
    errors: dict[str, str | None] = {}
    for name, settings in (CASES | FAULTS).items():
        errors[name] = None
        try:
            with tempfile.TemporaryDirectory() as folder:
                train_step(Path(folder), **settings)
        except Exception as error:
            if "-v" in sys.argv and name not in FAULTS:
                raise
            errors[name] = f"{type(error).__name__}: {error}"
    sys.stdout.write("\n" + json.dumps(errors))


if __name__ == "__main__":
    main()
