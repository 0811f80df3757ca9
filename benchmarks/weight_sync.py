"""
Two ways to hand a LoRA adapter to vLLM in bfloat16: TRL's, which merges it into the weights, and this project's.

    python benchmarks/weight_sync.py --output benchmarks/weight_sync.md

`OPSDTrainer` trains with rollouts from vLLM. After every optimizer step the adapter goes to vLLM both ways, in turns:
natively by `VLLMSampler.sync_weights`, and, copied into a second model with an engine of its own, by the
`sync_weights` of TRL's `VLLMGeneration`. So both see the same updates. What is measured, over all adapted matrices,
with W_0 the weights before training and D = scale * B A the adapter's float32 delta:

- base weights changed: share of the trained model's frozen weights W (adapter unmerged) that differ from W_0
- drift: ||W - W_0|| / ||D||
- error of the delta in vLLM: ||D_vLLM - D|| / ||D||, where D_vLLM is the difference of vLLM's weights to W_0 (merged)
  or the product of the A and B in vLLM's LoRA buffers (native)
- entries equal to the base's: share of vLLM's merged weights that are those of W_0
- seconds: median over the syncs so far; also as the median of the ratios of the two syncs of each step
"""

import argparse
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import vllm
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, TrainerCallback, set_seed
from trl.generation.vllm_generation import VLLMGeneration

from opsd.vllm_engine import keep_linear_weights
from opsd_trainer import OPSDConfig, OPSDTrainer
from quickstart.addition import training_problems
from quickstart.base_model import train_tokenizer

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FORMS = {"merged": "TRL, merged", "native": "here, native"}


class Measurement(NamedTuple):
    learning_rate: float
    steps: int
    form: str
    changed: float  # share
    drift: float  # relative to the adapter's delta
    error: float  # relative to the adapter's delta
    equal: float | None  # share
    num_bytes: int
    seconds: float
    ratio: float  # of the seconds of a native sync to those of a merged one


def save_model(arguments: argparse.Namespace, folder: str) -> str:
    """Put the model, in bfloat16, and its tokenizer into `folder`; returns what it is, in words."""
    name = arguments.model_name_or_path
    if name is not None:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(name)
        description = f"`{name}`"
    else:
        tokenizer = train_tokenizer()
        set_seed(0)
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=arguments.hidden_size,
                intermediate_size=3 * arguments.hidden_size,
                num_hidden_layers=arguments.num_layers,
                num_attention_heads=arguments.hidden_size // 64,
                num_key_value_heads=arguments.hidden_size // 128,
                head_dim=128,
                tie_word_embeddings=True,
                eos_token_id=tokenizer.eos_token_id,
            )
        ).bfloat16()
        description = (
            f"Qwen3 with H = {arguments.hidden_size:,} and {arguments.num_layers} layers, random with a standard "
            f"deviation of {model.config.initializer_range}, the scale of large models' weights, on which the "
            "rounding depends"
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return description


# What the trainer and the engines hold, by the name of the adapted module


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def frozen_weights(model: PeftModel) -> dict[str, Tensor]:
    return {name: layer.base_layer.weight.detach() for name, layer in lora_layers(model).items()}


def adapter_deltas(model: PeftModel) -> dict[str, Tensor]:
    return {
        name: (layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
        for name, layer in lora_layers(model).items()
    }


def unpacked_names(engine_model: nn.Module, module_name: str) -> list[str]:
    """The names that PEFT has for the parts of one of vLLM's linear layers, such as `qkv_proj`."""
    parent, _, leaf = module_name.rpartition(".")
    return [f"{parent}.{part}" for part in engine_model.packed_modules_mapping.get(leaf, [leaf])]


def merged_weights(model_runner: Any, base: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = {}
    for parameter_name, parameter in model_runner.model.named_parameters():
        names = unpacked_names(model_runner.model, parameter_name.removesuffix(".weight"))
        if names[0] in base:
            parts = parameter.detach().split([len(base[name]) for name in names])
            weights.update(zip(names, parts, strict=True))
    return weights


def native_deltas(model_runner: Any, base: dict[str, Tensor], adapter_id: int) -> dict[str, Tensor]:
    manager = model_runner.lora_manager._adapter_manager
    slot = manager.lora_index_to_id.index(adapter_id)
    deltas = {}
    for module_name, module in manager.modules.items():
        names = unpacked_names(model_runner.model, module_name)
        if names[0] in base:
            for name, a, b in zip(names, module.lora_a_stacked, module.lora_b_stacked, strict=True):
                deltas[name] = b[slot, 0].float() @ a[slot, 0].float()  # vLLM has multiplied B by the scale
    return deltas


# Comparison


def norm(tensors: dict[str, Tensor]) -> float:
    return sum(tensor.double().square().sum().item() for tensor in tensors.values()) ** 0.5


def difference(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[name].float() - other.float() for name, other in others.items()}


def share_equal(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    num_equal = sum((tensors[name] == other).sum().item() for name, other in others.items())
    return num_equal / sum(other.numel() for other in others.values())


def seconds_of(sync: Callable[[], None]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    sync()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


class SyncBothWays(TrainerCallback):
    """Hands the adapter to vLLM in both ways after each step, and measures after some of them."""

    def __init__(self, trainer: OPSDTrainer, merging: VLLMGeneration, steps: list[int]):
        self.trainer, self.merging, self.steps = trainer, merging, steps
        self.base = {name: weight.clone() for name, weight in frozen_weights(trainer.model).items()}
        self.seconds: dict[str, list[float]] = {form: [] for form in FORMS}
        self.measurements: list[Measurement] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.merging.sync_weights()  # as training does before its first rollout

    def on_step_end(self, args, state, control, **kwargs):
        trained = dict(self.trainer.model.named_parameters())
        with torch.no_grad():
            for name, parameter in self.merging.model.named_parameters():
                if self.merging.model.prefix in name:
                    parameter.copy_(trained[name])
        syncs = {"merged": self.merging.sync_weights, "native": self.trainer.sampler.sync_weights}
        for form in FORMS if state.global_step % 2 else reversed(FORMS):
            self.seconds[form].append(seconds_of(syncs[form]))
        if state.global_step in self.steps:
            self.measurements += [self.measure(form, args.learning_rate, state.global_step) for form in FORMS]

    def measure(self, form: str, learning_rate: float, step: int) -> Measurement:
        rollouts, equal = self.trainer.sampler, None
        generation = rollouts if form == "native" else self.merging
        model_runner = generation.llm.llm_engine.model_executor.driver_worker.model_runner
        frozen, deltas = frozen_weights(generation.model), adapter_deltas(generation.model)
        if form == "native":
            held, num_bytes = native_deltas(model_runner, self.base, rollouts.num_syncs), rollouts.adapter_bytes
        else:
            weights = merged_weights(model_runner, self.base)
            held, equal = difference(weights, self.base), share_equal(weights, self.base)
            sent = [p for name, p in generation.model.named_parameters() if generation.model.prefix not in name]
            num_bytes = sum(parameter.nbytes for parameter in sent)
        ratios = [
            native / merged for native, merged in zip(self.seconds["native"], self.seconds["merged"], strict=True)
        ]
        return Measurement(
            learning_rate, step, form,
            changed=1 - share_equal(frozen, self.base),
            drift=norm(difference(frozen, self.base)) / norm(deltas),
            error=norm(difference(held, deltas)) / norm(deltas),
            equal=equal, num_bytes=num_bytes,
            seconds=statistics.median(self.seconds[form]), ratio=statistics.median(ratios),
        )  # fmt: skip


def train(folder: str, learning_rate: float, arguments: argparse.Namespace) -> list[Measurement]:
    """Train up to the last of the steps to measure after; returns what was measured."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lora = LoraConfig(r=64, lora_alpha=128, target_modules=MODULES, task_type="CAUSAL_LM")
    batch_size, num_steps = arguments.batch_size, max(arguments.steps)
    set_seed(0)
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = OPSDTrainer(
            model=folder,
            args=OPSDConfig(
                output_dir=output_dir,
                model_init_kwargs={"dtype": "bfloat16"},
                use_cpu=not torch.cuda.is_available(),
                bf16=True,
                gradient_checkpointing=False,
                per_device_train_batch_size=batch_size,
                max_completion_length=arguments.completion_length,
                learning_rate=learning_rate,
                lr_scheduler_type="constant",
                max_steps=num_steps,
                save_strategy="no",
                logging_steps=10,
                report_to="none",
                fixed_teacher=True,
                use_vllm=True,
                vllm_gpu_memory_utilization=0.3,
            ),
            train_dataset=Dataset.from_list(training_problems(0, batch_size * num_steps)),
            processing_class=tokenizer,
            peft_config=lora,
        )
        keep_linear_weights()
        second_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        merging = VLLMGeneration(
            get_peft_model(second_model, lora).to(trainer.accelerator.device),
            trainer.accelerator,
            tokenizer,
            gpu_memory_utilization=trainer.sampler.gpu_memory_utilization,
            max_model_length=trainer.sampler.max_model_length,
            max_num_seqs=batch_size,
        )
        callback = SyncBothWays(trainer, merging, arguments.steps)
        trainer.add_callback(callback)
        trainer.train()
    return callback.measurements


def share(value: float) -> str:
    return f"{100 * value:.1f} %" if value else "0"


def report(description: str, measurements: list[Measurement], arguments: argparse.Namespace) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    lines = [
        "# Handing the adapter to vLLM",
        "",
        f"`{' '.join(['python benchmarks/weight_sync.py', *sys.argv[1:]])}`",
        "",
        f"{device}, PyTorch {torch.__version__}, TRL {version('trl')}, PEFT {version('peft')}, vLLM "
        f"{vllm.__version__}, bfloat16. {description}. LoRA of rank 64 and alpha 128 on all seven projections, "
        f"float32; AdamW, constant learning rate, {arguments.batch_size} rollouts of {arguments.completion_length} "
        "tokens a step. One run for each learning rate, both syncs after each of its steps, with the same adapter. "
        "The base weights are those of the adapted matrices, and 0 is none at all; drift and error are relative to "
        "the adapter's delta; seconds are medians over the syncs so far, and of the ratios of the two syncs of a "
        "step. `weight_sync.py` has the formulas.",
        "",
        "| learning rate | steps | sync | base weights changed | drift | error of the delta in vLLM "
        "| entries equal to the base's | bytes per sync | seconds per sync | x merged |",
        "|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for own in measurements:
        lines.append(
            f"| {own.learning_rate:.0e} | {own.steps} | {FORMS[own.form]} | {share(own.changed)} | {own.drift:.3g} "
            f"| {own.error:.3g} | {'' if own.equal is None else share(own.equal)} | {own.num_bytes:,} "
            f"| {own.seconds:.3f} | {own.ratio if own.form == 'native' else 1:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="default: a random Qwen3 of the next two arguments")
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--num_layers", type=int, default=2)
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[5e-6, 2e-4])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 10, 100], help="after which to measure")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--completion_length", type=int, default=16)
    parser.add_argument("--output", type=Path, help="Markdown file; default: standard output only")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        description = save_model(arguments, folder)
        measurements = []
        for learning_rate in arguments.learning_rates:  # each in a fresh process: engines leave traces in theirs
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                measurements += pool.submit(train, folder, learning_rate, arguments).result()
    text = report(description, measurements, arguments)
    sys.stdout.write(text)
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
