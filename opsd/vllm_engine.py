"""How vLLM engines are started in this project, for rollouts and for evaluation, on GPU and on CPU."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

import torch
from peft import LoraConfig
from torch import Tensor

if TYPE_CHECKING:  # vLLM reads part of its environment when it is imported: see engine_options
    from vllm import LLM
    from vllm.lora.request import LoRARequest

# Of every engine in this process. FlashInfer's sampler is compiled at the start of an engine and needs nvcc; requests
# with a seed and greedy ones, which all of this project's are, never reach it.
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
# Logits in float32, as in the loss: bfloat16 rounds log-probabilities by 0.02 to 0.06 nats.
ENGINE = {"hf_overrides": {"head_dtype": "float32"}, "use_tqdm_on_load": False}
# What vLLM's CPU build needs: a small cache, no binding to cores, no warm-up.
CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_CI_ENV": "1",
}
CPU_ENGINE = {
    "dtype": "float32",  # log-probs agree with those of transformers to 1e-6; in bfloat16 they would not to 1e-3
    "enforce_eager": True,
    "enable_chunked_prefill": False,  # vLLM 0.31 cannot rewind a sample's generator on CPU, as it does after a chunk
    "gpu_memory_utilization": 0.1,  # only has to be free; what is taken is VLLM_CPU_KVCACHE_SPACE
}


def engine_options(gpu_memory_utilization: float | None = None) -> dict[str, Any]:
    """
    Arguments of `vllm.LLM` for this machine; call it before vLLM starts an engine.

    Where the user's environment does not say otherwise, the engine runs in this process, whose global random
    generators it reseeds: a process of its own would outlive a killed run and keep the GPU. On a machine without CUDA
    this also sets what vLLM's CPU build needs in the environment.

    Args:
        gpu_memory_utilization: share of a GPU's memory that the engine may take; `None` for 0.9.
    """
    has_gpu = torch.cuda.is_available()
    for name, value in (ENVIRONMENT | ({} if has_gpu else CPU_ENVIRONMENT)).items():
        os.environ.setdefault(name, value)
    if os.environ.get("ATEN_CPU_CAPABILITY") == "default":  # PyTorch would compile vector code, which it then lacks
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # of engines in processes of their own
        torch._dynamo.config.disable = True
    return ENGINE | ({"gpu_memory_utilization": gpu_memory_utilization or 0.9} if has_gpu else CPU_ENGINE)


def check_lora_dtype(dtype: str | None) -> None:
    """Raise `ValueError` if vLLM cannot serve adapters in an engine of this dtype on this machine."""
    if dtype == "float32" and torch.cuda.is_available():
        raise ValueError(
            "--dtype float32 with --use_vllm and --use_peft: vLLM's LoRA kernels for GPUs take 16 bits only; train "
            "with --dtype bfloat16 or --bf16 true, or sample without --use_vllm"
        )


def lora_options(rank: int, modules: Sequence[str] | None = None, max_loras: int = 1) -> dict[str, Any]:
    """
    Arguments of `vllm.LLM` to serve LoRA adapters of any rank up to `rank`, `max_loras` at a time.

    Args:
        modules: last parts of the names of all modules that the adapters are on, such as `q_proj`. The engine serves
            adapters on these alone: on embedding and head they would cost time at each token. `None`: on all.

    Raises:
        ValueError: if vLLM serves no adapters of that rank.
    """
    from vllm.config.lora import MaxLoRARanks

    multiply_adapters_at_once()
    served = [size for size in get_args(MaxLoRARanks) if size >= rank]
    if not served:
        raise ValueError(f"vLLM serves LoRA adapters up to rank {max(get_args(MaxLoRARanks))}, not {rank}")
    return {
        "enable_lora": True,
        "max_loras": max_loras,
        "max_cpu_loras": max_loras,
        "max_lora_rank": min(served),
        "lora_target_modules": None if modules is None else sorted(set(modules)),
    }


def load_adapter(engine: "LLM", number: int, tensors: dict[str, Tensor], config: LoraConfig) -> "LoRARequest":
    """
    Put an adapter into an engine of this process, without a file.

    Args:
        engine: with `lora_options`; it holds no adapter when it can hold but one.
        number: of the adapter; each must have its own, as vLLM keys its prefix cache by it.
        tensors: under the names that PEFT saves them with. They are the engine's from now on: it scales them in place.
        config: of the adapter.

    Returns:
        What requests name the adapter by. Its path does not exist, so that vLLM would fail if it ever had to read the
        adapter again.

    Raises:
        ValueError: if a tensor has no place in the engine.
    """
    from vllm.lora.request import LoRARequest

    request = LoRARequest(f"adapter-{number}", number, f"/nowhere/adapter-{number}")
    engine.collective_rpc(_load_adapter, args=(number, tensors, config))
    return request


def _load_adapter(worker: Any, number: int, tensors: dict[str, Tensor], config: LoraConfig) -> None:
    """Do what `LRUCacheWorkerLoRAManager.add_adapter` does, with tensors in place of the files."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    worker_manager = worker.model_runner.lora_manager
    manager = worker_manager._adapter_manager
    settings = PEFTHelper.from_dict(config.to_dict())
    settings.validate_legal(worker_manager.lora_config)
    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    adapter = LoRAModel.from_lora_tensors(
        number,
        tensors,
        settings,
        device=worker_manager.device,
        dtype=worker_manager.lora_config.lora_dtype,
        weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
        skip_prefixes=getattr(manager.model, "lora_skip_prefixes", None),
    )
    manager.add_adapter(adapter)
    if misplaced := sorted(adapter.loras.keys() - manager.modules.keys()):
        manager.remove_adapter(number)
        raise ValueError(
            f"vLLM has no place for the adapter's {len(misplaced)} modules such as {misplaced[0]}; take them out of "
            "--lora_target_modules, or sample without --use_vllm"
        )
    manager.activate_adapter(number)
    adapter.loras = None  # copied to where they are computed with; activating it again would fail


def keep_linear_weights() -> None:
    """
    Let the engines that start from now on take new weights, as full fine-tuning needs.

    vLLM's CPU build repacks the weights of linear layers into another form and drops them.
    """
    if torch.cuda.is_available():
        return
    from vllm.model_executor.layers import utils

    def multiply_as_they_are(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = multiply_as_they_are


def multiply_adapters_at_once() -> None:
    """
    Let the engines that start from now on multiply all tokens of an adapter by it at once, on a CPU.

    vLLM's CPU build copies the adapter's matrices for each token of a prompt. So prompts took several times as long
    with an adapter as without.
    """
    if torch.cuda.is_available():
        return
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    def product(inputs: Tensor, weights: Tensor, dtype: torch.dtype, indices: Tensor) -> Tensor:
        """Return (tokens, out) of inputs (tokens, in), weights (adapters, 1, out, in), and indices (tokens,)."""
        if len(indices) == 1:  # on the head, of a request whose prompt's log-probabilities are asked for
            indices = indices.expand(len(inputs))
        outputs = torch.zeros(len(inputs), weights.shape[-2], dtype=dtype)
        for index in indices.unique().tolist():
            if index >= 0:
                own = indices == index
                matrix = weights[index].reshape(weights.shape[-2:]).to(dtype)
                outputs[own] = torch.nn.functional.linear(inputs[own].to(dtype), matrix)
        return outputs

    def shrink(inputs: Tensor, weights: Tensor, output: Tensor, indices: Tensor, scaling: float = 1.0) -> None:
        output[:, : weights.shape[-2]] = scaling * product(inputs, weights, output.dtype, indices)

    def expand_slice(
        inputs: Tensor,
        weights: Tensor,
        output: Tensor,
        indices: Tensor,
        slice_offset: int,
        slice_size: int,
        add_inputs: bool = True,
    ) -> None:
        part = output[:, slice_offset : slice_offset + slice_size]
        values = product(inputs, weights, output.dtype, indices)
        part.copy_(part + values if add_inputs else values)

    for module in (lora_ops, punica_cpu):
        module.bgmv_shrink, module.bgmv_expand_slice = shrink, expand_slice


def stop_engine(engine: "LLM") -> None:
    """Free what `engine` holds, so that another one can start in this process; it cannot be used afterwards."""
    from vllm.distributed import cleanup_dist_env_and_memory

    engine.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
