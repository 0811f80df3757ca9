"""What several benchmarks share: a Qwen3 with random weights, lengths of sequences, the memory of a process."""

import ctypes
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM


def random_qwen3(
    tokenizer: PreTrainedTokenizerBase, hidden_size: int, vocab_size: int, num_layers: int, **settings: Any
) -> Qwen3ForCausalLM:
    """
    Make a Qwen3 with random weights, always the same: in float32, where there is a GPU in bfloat16.

    Args:
        tokenizer: with the end-of-sequence token.
        hidden_size: a multiple of 64.
        vocab_size, num_layers: further sizes.
        settings: of `Qwen3Config`, in place of those here.
    """
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "intermediate_size": 3 * hidden_size,
        "num_attention_heads": hidden_size // 64,
        "num_key_value_heads": max(1, hidden_size // 128),
        "head_dim": 64,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**(sizes | settings)))
    return model.bfloat16() if torch.cuda.is_available() else model


def aime_lengths(generator: torch.Generator) -> tuple[float, float, float]:
    """
    Draw lengths as in training on AIME-like problems, in tokens: of problem, completion and reference solution.

    Problems have 60 to 250 tokens, solutions about 600 and up to 4,000. A quarter of the completions ends early.
    """
    uniform, early, end = torch.rand(3, generator=generator).tolist()
    completion = 1024 * (0.2 + 0.8 * end if early < 0.25 else 1.0)
    solution = min(4000.0, 600 * torch.randn((), generator=generator).mul(0.8).exp().item())
    return 60 + 190 * uniform, completion, solution


def resident_bytes(field: str) -> int:
    """Return `VmRSS` (now) or `VmHWM` (peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def reset_peak() -> None:
    """Give freed memory back to the system, and let `VmHWM` of this process begin anew."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
