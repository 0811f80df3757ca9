"""
Time the hand-over of an adapter of Qwen3-8B's shapes to vLLM, through files as before and in memory as now:

    python benchmarks/adapter_handover.py --output benchmarks/adapter_handover.md

Both ways by turns, on the CPU, up to the factors that vLLM copies to where it computes with them. These are compared
bit for bit.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import vllm
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

from opsd.rollouts import MEMORY_DIR

NUM_LAYERS, HIDDEN, INTERMEDIATE, KEYS, RANK = 36, 4096, 12288, 1024, 64
SHAPES = {  # inputs and outputs of the modules of a layer
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, KEYS), "self_attn.v_proj": (HIDDEN, KEYS),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (HIDDEN, INTERMEDIATE),
    "mlp.up_proj": (HIDDEN, INTERMEDIATE), "mlp.down_proj": (INTERMEDIATE, HIDDEN),
}  # fmt: skip
MODULES = [name.split(".")[1] for name in SHAPES]
CONFIG = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=MODULES)
WAYS = ("files", "memory")


def make_adapter() -> dict[str, Tensor]:
    """Random factors in float32, as training holds them."""
    tensors = {}
    for layer in range(NUM_LAYERS):
        for name, (inputs, outputs) in SHAPES.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, inputs)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(outputs, RANK)
    return tensors


def hand_over(trained: dict[str, Tensor], way: str, folder: str) -> tuple[LoRAModel, list[float]]:
    """Return what vLLM holds, in bfloat16, and the seconds of the phases."""
    times = [time.perf_counter()]
    if way == "files":
        tensors = {name: tensor.to("cpu", copy=True) for name, tensor in trained.items()}
        times.append(time.perf_counter())
        save_file(tensors, f"{folder}/adapter_model.safetensors")
        CONFIG.save_pretrained(folder)
        times.append(time.perf_counter())
        settings = PEFTHelper.from_local_dir(folder, None)
        adapter = LoRAModel.from_local_checkpoint(
            folder, set(MODULES), settings, lora_model_id=1, device="cpu", dtype=torch.bfloat16
        )
    else:
        tensors = {name: tensor.to(torch.bfloat16, copy=True) for name, tensor in trained.items()}
        times += [time.perf_counter()] * 2
        settings = PEFTHelper.from_dict(CONFIG.to_dict())
        adapter = LoRAModel.from_lora_tensors(1, tensors, settings, device="cpu", dtype=torch.bfloat16)
    times.append(time.perf_counter())
    for factors in adapter.loras.values():
        factors.optimize()
    times.append(time.perf_counter())
    return adapter, [end - start for start, end in zip(times, times[1:], strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", type=Path, help="Markdown file; default: standard output only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trained = make_adapter()
    seconds: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for _ in range(arguments.repetitions):
        held = {}
        for way in WAYS:
            with tempfile.TemporaryDirectory(dir=MEMORY_DIR if MEMORY_DIR.is_dir() else None) as folder:
                held[way], phases = hand_over(trained, way, folder)
            seconds[way].append(phases)
        for name, factors in held["files"].loras.items():
            other = held["memory"].loras[name]
            if not torch.equal(factors.lora_a, other.lora_a) or not torch.equal(factors.lora_b, other.lora_b):
                raise AssertionError(f"{name}: the two ways end with different factors")
    lines = [
        "# Handing an adapter of Qwen3-8B's shapes to vLLM",
        "",
        f"`{' '.join(['python benchmarks/adapter_handover.py', *sys.argv[1:]])}`",
        "",
        f"One thread of a CPU ({platform.machine()}, load {os.getloadavg()[0]:.0f}), PyTorch {torch.__version__}, "
        f"vLLM {vllm.__version__}, rank {RANK} on all seven projections, "
        f"{sum(tensor.nbytes for tensor in trained.values()):,} bytes in float32. Seconds of the fastest of "
        f"{arguments.repetitions} repetitions; what vLLM holds is equal bit for bit.",
        "",
        "| way | " + " | ".join(("copy or cast", "write", "read", "scale", "sum")) + " |",
        "|---|" + "--:|" * 5,
    ]
    for way, repetitions in seconds.items():
        fastest = min(repetitions, key=sum)
        lines.append(f"| {way} | " + " | ".join(f"{value:.2f}" for value in (*fastest, sum(fastest))) + " |")
    ratios = [sum(new) / sum(old) for old, new in zip(seconds["files"], seconds["memory"], strict=True)]
    lines += ["", f"Median over the repetitions of memory / files: {statistics.median(ratios):.2f}."]
    text = "\n".join(lines) + "\n"
    sys.stdout.write(text)
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
