"""
Check and time a colocated vLLM engine with the adapter of a random Qwen3: what the CPU's sampler cannot show.

    python benchmarks/engine.py

`OPSDTrainer` trains one step after its preflight. Then noise moves the adapter, so that it matters, and the first
tokens of 200 seeds are compared with the model's own probabilities, with the adapter and without: Pearson's chi-square
over ten groups of tokens of about the same probability each. The program fails below p = 1e-4.
"""

import argparse
import json
import logging
import math
import sys
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch
from common import random_qwen3
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor

from opsd.preflight import Preflight, PreflightError
from opsd_trainer import OPSDConfig, OPSDTrainer
from quickstart.addition import training_problems
from quickstart.base_model import BaseModelConfig, train_tokenizer

NUM_SEEDS, NUM_GROUPS = 200, 10


def chi_square_p(probabilities: Tensor, tokens: list[int]) -> float:
    """
    Return the p-value of sampled tokens under a distribution (V,).

    Tokens are dealt to the groups from the most probable one on, each to the group that has the least so far.
    """
    order = probabilities.argsort(descending=True).tolist()
    share, group_of_token = [0.0] * NUM_GROUPS, {}
    for token in order[:2000]:
        group_of_token[token] = share.index(min(share))
        share[group_of_token[token]] += probabilities[token].item()
    rest = share.index(min(share))  # of the many others, whose probabilities are small
    share[rest] += 1.0 - sum(share)
    counts = Counter(group_of_token.get(token, rest) for token in tokens)
    expected = [len(tokens) * value for value in share]
    statistic = sum((counts[group] - value) ** 2 / value for group, value in enumerate(expected))
    return torch.special.gammaincc(torch.tensor((NUM_GROUPS - 1) / 2), torch.tensor(statistic / 2)).item()


def seconds(function, *arguments, **settings) -> float:
    start = time.perf_counter()
    function(*arguments, **settings)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def make_trainer(arguments: argparse.Namespace, folder: Path) -> OPSDTrainer:
    use_cuda = torch.cuda.is_available()
    tokenizer = train_tokenizer(BaseModelConfig())
    sizes = {
        "num_attention_heads": max(arguments.hidden_size // 128, 2),
        "num_key_value_heads": 2,
        "head_dim": 128 if arguments.hidden_size >= 256 else 32,
        "tie_word_embeddings": False,
    }
    model = random_qwen3(tokenizer, arguments.hidden_size, arguments.vocab_size, arguments.num_layers, **sizes)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    config = OPSDConfig(
        output_dir=str(folder / "run"),
        use_cpu=not use_cuda,
        bf16=use_cuda,
        model_init_kwargs={"dtype": "bfloat16" if use_cuda else "float32"},
        per_device_train_batch_size=4,
        max_completion_length=arguments.num_tokens,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        fixed_teacher=True,
        teacher_thinking=False,
        use_vllm=True,
        vllm_gpu_memory_utilization=0.5,
        vllm_enable_sleep_mode=use_cuda,
        disable_tqdm=True,
    )
    return OPSDTrainer(
        model=str(folder / "model"),
        args=config,
        train_dataset=Dataset.from_list(training_problems(0, 64)),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab_size", type=int, default=151_936)
    parser.add_argument("--hidden_size", type=int, default=2048)
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--num_tokens", type=int, default=256, help="of a rollout")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)

    results: dict[str, float | str] = {}
    with tempfile.TemporaryDirectory() as name:
        trainer = make_trainer(arguments, Path(name))
        sampler, prompt = trainer.sampler, trainer.train_dataset[0]["student_prompt_ids"]
        trainer.add_callback(preflight := Preflight(trainer))
        try:
            trainer.train()
            results["preflight"] = "holds"
        except PreflightError as error:
            results["preflight"] = str(error)
            trainer.remove_callback(preflight)
            trainer.train()
        logged = trainer.state.log_history[0]
        results |= {key: logged[key] for key in logged if key.startswith(("sampling/", "seconds/"))}

        generator = torch.Generator().manual_seed(1)
        for parameter, weight in trainer.model.named_parameters():
            if "lora_B" in parameter:
                noise = torch.randn(weight.shape, generator=generator)
                weight.data += 0.1 * noise.to(weight.device, weight.dtype)
        results["seconds of a sync"] = min(seconds(sampler.sync_weights) for _ in range(3))
        trainer.model.eval()
        p_values = {}
        for base in (False, True):
            tokens = [completion.ids[0] for completion in sampler.sample([prompt] * NUM_SEEDS, base, max_tokens=1)]
            ids = torch.tensor([prompt], device=trainer.accelerator.device)
            role = trainer.model.disable_adapter() if base else nullcontext()
            with torch.no_grad(), trainer.accelerator.autocast(), role:
                logits = trainer.model(input_ids=ids, logits_to_keep=1).logits[0, -1]
            p_values["without adapter" if base else "with adapter"] = chi_square_p(
                logits.float().softmax(-1).cpu(), tokens
            )
        results |= {f"chi-square p, {NUM_SEEDS} seeds, {role}": value for role, value in p_values.items()}

        prompts = [row["student_prompt_ids"] for row in trainer.train_dataset]
        start = time.perf_counter()
        completions = sampler.sample(prompts)
        num_tokens = sum(len(completion.ids) for completion in completions)
        results["generated tokens per second, 64 sequences"] = num_tokens / (time.perf_counter() - start)
        if sampler.enable_sleep_mode:
            results["seconds of wake and sleep, one token"] = seconds(sampler.sample, [prompt], max_tokens=1)
            results["GiB reserved by PyTorch, engine asleep"] = torch.cuda.memory_reserved() / 2**30
        sampler.close()
    sys.stdout.write(json.dumps(results, indent=2) + "\n")
    if results["preflight"] != "holds" or not all(math.isfinite(p) and p > 1e-4 for p in p_values.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
