"""
Compute what a recipe takes of a GPU's memory, from its flags and the model's configuration alone.

    python benchmarks/plan_memory.py scripts/run_opsd_8b.sh --gpu_memory 80 [flags of the recipe]

Activations are those of the model's own code on fake tensors, which have sizes and no data: the teacher's forward
pass over its longest prompts, and the student's forward and backward pass, with checkpoints where the flags say so.
The rest is added up. Attention is taken as fused (FlashAttention), the launcher as DDP or one process. Assumed, not
computed: 2 GiB for the CUDA context and NCCL. Fragmentation is not in it. Leaves with status 1 if the recipe does not
fit.
"""

import argparse
import os
import shlex
import subprocess
import sys
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, Qwen3Config
from trl import get_peft_config

from opsd.losses.fused import _automatic_chunk_size
from opsd.run.arguments import ModelArguments, parse_arguments
from opsd_train import OPSDArguments
from opsd_trainer import OPSDConfig

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
CONTEXT = 2 * GIB
PROMPT_TOKENS = 576  # of a student's prompt: with 1,024 sampled tokens the 1,600 of a long problem
# As published; for machines without the Hub: hidden, intermediate, layers, query heads, tied
QWEN3 = {
    "Qwen/Qwen3-1.7B": (2048, 6144, 28, 16, True),
    "Qwen/Qwen3-4B": (2560, 9728, 36, 32, True),
    "Qwen/Qwen3-8B": (4096, 12288, 36, 32, False),
}


def read_config(name: str) -> PretrainedConfig:
    """Read a model's configuration, from its folder or the Hub, or of the recipes' models from the table above."""
    if name not in QWEN3:
        return AutoConfig.from_pretrained(name)
    hidden, intermediate, layers, heads, tied = QWEN3[name]
    return Qwen3Config(
        vocab_size=151_936, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, head_dim=128, tie_word_embeddings=tied,
    )  # fmt: skip


class Peak(TorchDispatchMode):
    """Adds up the bytes of the storages that are alive, but for those of `kept` tensors."""

    def __init__(self, kept: list[torch.Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in kept}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def free() -> None:
            self._seen.discard(key)
            self.live -= size

        weakref.finalize(storage, free)


def peak_bytes(model: nn.Module, function: Callable[[], Any]) -> int:
    """Return the most bytes that `function` holds at a time beside the model, on fake tensors."""
    with Peak([*model.parameters(), *model.buffers()]) as peak:
        function()
    return peak.peak


def make_fake(model: nn.Module) -> None:
    """Give a model without data fake weights. Tied ones stay one."""
    fakes: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_weight = tensors is module._parameters
                    fakes[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_weight else fake
                if tensor is not None:
                    tensors[name] = fakes[id(tensor)]


def activations(model: nn.Module, teacher_model: nn.Module, args: OPSDConfig) -> tuple[int, int]:
    """Return the peaks of the teacher's and of the student's pass, without gradients of weights, in bytes."""
    is_adapted, batch = hasattr(model, "peft_config"), args.per_device_train_batch_size
    short = PROMPT_TOKENS + args.max_completion_length
    longest = short if args.teacher_context == "none" else args.max_length or 20_000

    def run(model: nn.Module, num_tokens: int) -> torch.Tensor:
        backbone = (model.get_base_model() if hasattr(model, "peft_config") else model).base_model
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
            ids = torch.ones(batch, num_tokens, dtype=torch.long)
            return backbone(input_ids=ids, attention_mask={"full_attention": None}, use_cache=False)[0]

    def teach() -> None:
        with torch.no_grad(), model.disable_adapter() if is_adapted else ExitStack():
            run(teacher_model, longest)

    gradients = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)

    def learn() -> None:
        hidden = run(model, short)
        hidden.backward(torch.ones_like(hidden))

    with disable_input_dtype_casting(model, active=is_adapted and args.bf16):
        teacher = 0 if args.teacher_model_server_url is not None else peak_bytes(teacher_model, teach)
        student = peak_bytes(model, learn)
    return teacher, max(student - gradients, 0)


def build(name: str, dtype: torch.dtype) -> nn.Module:
    """Return a model without weights."""
    config = read_config(name)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def plan(args: OPSDConfig, model_args: ModelArguments, num_processes: int, gpu_bytes: int) -> dict[str, int]:
    """Return what takes how many bytes of each GPU. "sampling" and "training" are what is there at these times."""
    dtype = torch.float32 if model_args.dtype in (None, "auto") else getattr(torch, model_args.dtype)
    model = build(model_args.model_name_or_path, dtype)
    config, teacher_model = model.config, None
    if args.teacher_model_name_or_path is not None and args.teacher_model_server_url is None:
        teacher_model = build(args.teacher_model_name_or_path, torch.bfloat16 if args.bf16 else dtype)
    with torch.device("meta"):
        if (peft_config := get_peft_config(model_args)) is not None:
            model = get_peft_model(model, peft_config)
    model.train()
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with FakeTensorMode():
        for each in filter(None, (model, teacher_model)):
            make_fake(each)
        teacher, student = activations(model, model if teacher_model is None else teacher_model, args)
    weights = list(model.parameters())
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    trained_bytes = sum(weight.nbytes for weight in weights if weight.requires_grad)
    all_bytes = sum(weight.nbytes for weight in weights)
    base = sum(weight.numel() for weight in weights if peft_config is None or not weight.requires_grad)

    parts = {
        "weights": all_bytes,
        "gradients, Adam, DDP's buckets": 2 * trained_bytes + 8 * trained - (num_processes == 1) * trained_bytes,
    }
    if teacher_model is not None:
        parts["weights of the teacher model"] = sum(weight.nbytes for weight in teacher_model.parameters())
    if args.use_ema_teacher or (args.fixed_teacher and peft_config is None):
        copy = 4 * trained if args.use_ema_teacher else trained_bytes
        parts["teacher's copy, and the student's while it is in place"] = copy + trained_bytes
    held = sum(parts.values()) + CONTEXT
    parts["context and NCCL (assumed)"] = CONTEXT
    parts["teacher's pass"], parts["student's pass"] = teacher, student
    tokens = args.per_device_train_batch_size * args.max_completion_length
    entry = (3 if args.policy_gradient_weight else 2) * 4 + 2
    chunk = args.loss_chunk_size or _automatic_chunk_size(entry * config.vocab_size, torch.device("cuda"))
    parts["loss"] = entry * config.vocab_size * min(chunk, tokens)
    if peft_config is None:  # the head's gradient, in float32
        parts["loss"] += 4 * config.vocab_size * config.hidden_size
    engine = resting = 0
    if args.use_vllm and args.vllm_mode == "colocate":
        engine = int(args.vllm_gpu_memory_utilization * gpu_bytes)
        resting = 2 * base // args.vllm_tensor_parallel_size if args.vllm_enable_sleep_mode else engine
        parts["engine"] = engine
    # The loss runs while the student's checkpoints wait, the teacher's pass before them
    parts["training"] = held + resting + max(teacher, student + parts["loss"])
    parts["sampling"] = held + engine
    return parts


def suggestions(args: OPSDConfig) -> list[tuple[str, Any]]:
    """Return flags that save memory, with values, from the one that costs least."""
    changes: list[tuple[str, Any]] = []
    if not args.gradient_checkpointing:
        changes.append(("gradient_checkpointing", True))
    if args.use_vllm and args.vllm_mode == "colocate":
        if not args.vllm_enable_sleep_mode:
            changes.append(("vllm_enable_sleep_mode", True))
        lower = [share for share in (0.5, 0.4, 0.3) if share < args.vllm_gpu_memory_utilization]
        changes += [("vllm_gpu_memory_utilization", share) for share in lower]
    if args.per_device_train_batch_size > 1:
        changes.append(("per_device_train_batch_size", 1))
    if (args.max_length or 20_000) > 8_000:
        changes.append(("max_length", 8_000))
    return changes


def read_recipe(command: list[str]) -> tuple[OPSDConfig, ModelArguments, int]:
    """Return the settings of a recipe with further flags, and its number of processes."""
    environment = os.environ | {"DRY_RUN": "1"}
    output = subprocess.run(["bash", *command], env=environment, capture_output=True, text=True, cwd=ROOT)
    if output.returncode:
        sys.exit(output.stderr or output.stdout)
    words = shlex.split(next(line for line in output.stdout.splitlines() if line.startswith("accelerate launch")))
    num_processes = int(words[words.index("--num_processes") + 1])
    program = words.index("opsd_train.py")
    flags = [*words[program + 1 :], "--dry_run", str(num_processes)]
    _, args, model_args = parse_arguments(OPSDArguments, OPSDConfig, flags)
    return args, model_args, num_processes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a script of OPSD, such as scripts/run_opsd_8b.sh")
    parser.add_argument("--gpu_memory", type=float, default=80.0, help="GB of a GPU, as the maker counts: GiB")
    known, flags = parser.parse_known_args()
    args, model_args, num_processes = read_recipe([known.recipe, *flags])
    gpu_bytes = int(known.gpu_memory * GIB)
    parts = plan(args, model_args, num_processes, gpu_bytes)
    sys.stdout.write(
        f"{known.recipe}, {model_args.model_name_or_path}, {num_processes} GPUs\n\n| | GiB |\n|---|--:|\n"
    )
    sys.stdout.write("".join(f"| {name} | {value / GIB:.1f} |\n" for name, value in parts.items()))
    need = max(parts["training"], parts["sampling"])
    if need <= gpu_bytes:
        sys.stdout.write(f"\nfits: {need / GIB:.1f} of {known.gpu_memory:g} GiB\n")
        return
    sys.stdout.write(f"\ndoes not fit: {need / GIB:.1f} of {known.gpu_memory:g} GiB\n")
    changed = []
    for name, value in suggestions(args):
        setattr(args, name, value)
        changed = [text for text in changed if not text.startswith(f"--{name} ")] + [f"--{name} {value}".lower()]
        parts = plan(args, model_args, num_processes, gpu_bytes)
        need = max(parts["training"], parts["sampling"])
        if need <= gpu_bytes:
            sys.stdout.write(f"fits with {' '.join(changed)}: {need / GIB:.1f} GiB\n")
            sys.exit(1)
    sys.stdout.write(f"does not fit with {' '.join(changed)} either: {need / GIB:.1f} GiB; take more or larger GPUs\n")
    sys.exit(1)


if __name__ == "__main__":
    main()
