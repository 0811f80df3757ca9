"""The model card of a run: what was trained, on what, how, with which result, and how to use it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from opsd.run.report import CURVES, METRICS, describe_learning, evaluation_command

METHODS = {
    "opsd": "on-policy self-distillation (OPSD, [arXiv 2601.18734](https://arxiv.org/abs/2601.18734))",
    "sft": "supervised fine-tuning on reference solutions (SFT)",
    "grpo": "reinforcement learning on verifiable answers "
    "(GRPO, [arXiv 2402.03300](https://arxiv.org/abs/2402.03300))",
}
# What a card shows of the settings of any method, and of the trainer's in each; all of them are in run_config.json
SHOWN = {
    "model": ("dtype", "lora_r", "lora_alpha", "lora_target_modules"),
    "script": ("thinking", "reward"),
    "training": ("learning_rate", "lr_scheduler_type", "seed"),
}
SAMPLING = ("temperature", "top_p", "top_k", "max_completion_length", "num_generations")
SHOWN_OF_METHOD = {
    "opsd": (
        *("teacher_model_name_or_path", "fixed_teacher", "use_ema_teacher", "teacher_context", "beta"),
        *("jsd_token_clip", "jsd_clip_mode", "token_weights"),
        *("use_tinker_loss", "top_k_loss", "policy_gradient_weight", "student_thinking", "teacher_thinking"),
        *(*SAMPLING, "max_length"),
    ),
    "grpo": ("loss_type", "scale_rewards", "beta", *SAMPLING),
    "sft": ("max_length", "completion_only_loss"),
}
SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of vLLM, for --max-lora-rank

CARD = """---
{metadata}
---

# {name}

{base}, trained by {method} with [TRL](https://github.com/huggingface/trl).

- Base model: {base}
- Data: {data}
- Steps: {steps} of {sequences} sequences each
- What it is: {kind}

## Results

{results}

The numbers of each log are in `{metrics}`, their curves in `{curves}`. They are of the training's own problems. This
measures the model:

```bash
{evaluation}
```

## Use

Load:

```python
{load}
```

Merge:

```python
{merge}
```

Serve:

```bash
{serve}
```

## Settings

| setting | value |
|---|---|
{settings}

All settings of each start are in `run_config.json`, with what changed since the start before. Versions: {versions}.
"""


def link(name: str, kind: str = "") -> str:
    """A folder or file as it is called, a Hub id with its page."""
    if os.path.exists(os.path.expanduser(name)):
        return f"`{name}`"
    return f"[{name}](https://huggingface.co/{kind}{name})"


def usage(settings: Mapping[str, Any]) -> dict[str, str]:
    """Three lines each on loading, merging and serving."""
    training, model = settings["training"], settings["model"]
    run_dir, base = str(training["output_dir"]), model["model_name_or_path"]
    folder = training["hub_model_id"] or run_dir
    merged = os.path.join(run_dir, "merged")
    kind, package = (
        ("AutoPeftModelForCausalLM", "peft") if model["use_peft"] else ("AutoModelForCausalLM", "transformers")
    )
    load = [
        f"from {package} import {kind}"
        + ("\nfrom transformers import AutoTokenizer" if package == "peft" else ", AutoTokenizer"),
        f'model = {kind}.from_pretrained("{folder}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}")',
    ]
    save = [f'model.save_pretrained("{merged}")', f'tokenizer.save_pretrained("{merged}")']
    if not model["use_peft"]:
        merge, serve = "# nothing to merge: these are the whole weights", [f"vllm serve {folder}"]
        asked = folder
    elif model["use_dora"] or model["lora_modules_to_save"] or model["lora_r"] > SERVED_RANKS[-1]:
        merge, serve = "\n".join(["model = model.merge_and_unload()", *save]), [f"vllm serve {merged}"]
        asked = merged
    else:
        merge = "\n".join(["model = model.merge_and_unload()", *save])
        rank, asked = min(rank for rank in SERVED_RANKS if rank >= model["lora_r"]), Path(folder).name
        serve = [f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {asked}={folder}"]
    serve += [
        "curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\",
        f"""    -d '{{"model": "{asked}", "messages": [{{"role": "user", "content": "What is 1 + 1?"}}]}}'""",
    ]
    return {"load": "\n".join(load), "merge": merge, "serve": "\n".join(serve)}


def render_card(
    method: str, settings: Mapping[str, Any], logs: Sequence[Mapping[str, Any]], step: int, num_examples: int
) -> str:
    """
    Write the card of a run.

    Args:
        method: opsd, sft or grpo.
        settings: as in the record of the run (run_config.json).
        logs: what was logged, with the step of each.
        step: optimizer steps done.
        num_examples: rows that were trained on.
    """
    script, training, model = settings["script"], settings["training"], settings["model"]
    base, data = model["model_name_or_path"], script["dataset_name"]
    is_hub = {name: not os.path.exists(os.path.expanduser(name)) for name in (base, data)}
    metadata = ModelCardData(
        base_model=base if is_hub[base] else None,
        datasets=[data] if is_hub[data] else None,
        library_name="peft" if model["use_peft"] else "transformers",
        pipeline_tag="text-generation",
        tags=["trl", method, *(["lora"] if model["use_peft"] else [])],
    )
    revision = model["model_revision"]
    learned = describe_learning(logs)
    shown = {
        name: settings[group][name] for group, names in SHOWN.items() for name in names if name in settings[group]
    }
    shown |= {name: training[name] for name in SHOWN_OF_METHOD[method]}
    shown = {name: value for name, value in shown.items() if value is not None}
    if not model["use_peft"]:
        shown = {name: value for name, value in shown.items() if not name.startswith("lora_")}
    return CARD.format(
        metadata=metadata.to_yaml(),
        name=Path(training["hub_model_id"] or training["output_dir"]).name,
        base=link(base) + (f" (revision {revision})" if revision not in (None, "main") else ""),
        method=METHODS[method],
        data=f"{link(data, 'datasets/')}, split {script['dataset_split']}, {num_examples:,} examples",
        steps=step,
        sequences=settings["data"]["sequences_per_step"],
        kind=f"a LoRA adapter of rank {model['lora_r']}" if model["use_peft"] else "the whole model",
        results="First log against the last one: " + ", ".join(learned) + "." if learned else "Nothing was logged.",
        metrics=METRICS,
        curves=CURVES,
        evaluation=evaluation_command(settings),
        settings="\n".join(f"| `{name}` | {value} |" for name, value in shown.items()),
        versions=", ".join(f"{package} {version}" for package, version in settings["versions"].items()),
        **usage(settings),
    )
