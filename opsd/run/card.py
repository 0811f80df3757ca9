"""The model card of a run: what was trained, on what, how, with which result, and how to use it."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData, hf_hub_download

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
- Licences: {licences}
- Steps: {steps} of {sequences} sequences each
- What it is: {kind}

## Results

{results}

The numbers of each log are in `{metrics}`, their curves in `{curves}`. They are of the training's own problems. This
measures the model:

```bash
{evaluation}
```

{scores}

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
Trained on {hardware}.
"""

RESULTS = "results"  # folder in a run for the files of evaluations
SCORES = re.compile(r"<!-- scores -->.*<!-- end of scores -->", re.DOTALL)  # what an evaluation replaces
# What was sampled with, by its name in the evaluator's settings
SAMPLED = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "max_new_tokens", "thinking", "seed")


def link(name: str, kind: str = "") -> str:
    """A folder or file as it is called, a Hub id with its page."""
    if os.path.exists(os.path.expanduser(name)):
        return f"`{name}`"
    return f"[{name}](https://huggingface.co/{kind}{name})"


def describe_revision(revision: str | None, commit: str | None) -> str:
    """Return which revision and which commit of a repository it was, as far as that is known and says something."""
    known = [f"revision {revision}"] if revision not in (None, "main", commit) else []
    known += [] if commit is None else [f"commit {commit}"]
    return f" ({', '.join(known)})" if known else ""


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
        # Merged in bfloat16, most of a young adapter would be lost
        f'model = {kind}.from_pretrained("{folder}"' + (', dtype="float32")' if package == "peft" else ")"),
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


@cache
def find_licence(name: str, repo_type: str) -> str | None:
    """Return the licence that the card of a model or data set names; without a card in reach, or a licence, `None`."""
    folder = Path(name).expanduser()
    try:
        card = (
            folder / "README.md" if folder.exists() else Path(hf_hub_download(name, "README.md", repo_type=repo_type))
        )
        head = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8"), re.DOTALL)
        named = (yaml.safe_load(head[1]) or {}).get("license") if head else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return None if named is None else str(named)


def read_evaluations(run_dir: Path) -> dict[Path, dict[str, Any]]:
    """Return the complete output files of eval/evaluate_math.py in a run's folder, and in its `results`."""
    found = {}
    for file in sorted([*run_dir.glob("*.json"), *(run_dir / RESULTS).glob("*.json")]):
        try:
            report = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if isinstance(report, dict) and report.keys() >= {"settings", "differences"} and report.get("complete"):
            found[file] = report
    return found


def describe_evaluation(file: Path, report: Mapping[str, Any], run_dir: Path) -> str:
    """Write the scores of an evaluation, with their intervals and what they depend on."""

    def percent(share: float | None) -> str:
        return "" if share is None else f"{100 * share:.1f}"

    def interval(result: Mapping[str, Any]) -> str:
        return "" if result["interval"] is None else " to ".join(map(percent, result["interval"]))

    settings, arguments, results = report["settings"], report["arguments"], report["results"]

    def call(model: str) -> str:
        folder = Path(settings["base_model"] if model == "base" else model).resolve()
        is_this = folder == run_dir.resolve()  # the base of an evaluation, where the whole model was trained
        return "this model" if is_this else "base model" if model == "base" else folder.name

    differences = {(d["dataset"], d["model"]): d for d in report["differences"] if d["reference"] == "base"}
    k = results[0]["val_n"]
    lines = [f"| data set | model | Avg@{k}, % | 95 % interval | pass@{k}, % | problems | minus base, points |"]
    lines.append("|---|---|--:|--:|--:|--:|--:|")
    for result in results:
        difference = differences.get((result["dataset"], result["model"]))
        gain = "" if difference is None else f"{100 * difference['difference']:+.1f} ({interval(difference)})"
        graded = result["num_problems"] - result["num_ungraded"]
        cells = [result["dataset"], call(result["model"]), percent(result["avg_at_k"]), interval(result)]
        cells += [percent(result["pass_at_k"].get(str(k))), str(graded), gain]
        lines.append(f"| {' | '.join(cells)} |")
    tested = {call(result["model"]) for result in results} - {"base model", "this model"}
    facts = [f"{name} {settings[name]}" for name in SAMPLED if name in settings]
    facts += [f"base model's version {settings['base_model_version']}"]
    facts += [f"data {name} at {commit}" for name, commit in arguments.get("dataset_commits", {}).items() if commit]
    facts += [f"{package} {version}" for package, version in settings["versions"].items()]
    if settings.get("merge_adapter"):
        facts.append("adapter merged into the base")
    text = "\n".join(lines) + f"\n\nSampled with {', '.join(facts)}"
    if "hardware" in arguments:
        text += f", on {arguments['hardware']}"
    text += ". Intervals are bootstraps over problems; another training would differ by more."
    if len(tested) > 1:
        text += " Of several checkpoints the best one on a test set is an optimistic score."
    if "command" in arguments:
        text += f"\n\n```bash\n{arguments['command']}\n```"
    for image in (file.with_suffix(".png"), file.with_suffix(".budgets.png")):
        if image.is_file():
            text += f"\n\n![{image.stem}]({image.relative_to(run_dir)})"
    return text


def render_scores(run_dir: Path) -> str:
    """Write the part of a card that an evaluation fills."""
    texts = [describe_evaluation(file, report, run_dir) for file, report in read_evaluations(run_dir).items()]
    inside = "\n\n".join(["### Evaluation", *texts]) if texts else f"No evaluation is in `{RESULTS}` yet."
    return f"<!-- scores -->\n{inside}\n<!-- end of scores -->"


def complete_card(run_dir: Path) -> int:
    """
    Put the evaluations of a run into its card; returns how many there are.

    Raises:
        ValueError: if there is no card, or it has no place for them.
    """
    card = run_dir / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    if not SCORES.search(text):
        raise ValueError(f"{card}: no card of a run, which has a place for scores between comments; finish a training")
    scores = render_scores(run_dir)
    card.write_text(SCORES.sub(lambda _: scores, text), encoding="utf-8")
    return len(read_evaluations(run_dir))


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
    revision, commits = model["model_revision"], settings.get("commits", {})
    licences = {"base model": find_licence(base, "model"), "data": find_licence(data, "dataset")}
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
        base=link(base) + describe_revision(revision, commits.get("model")),
        method=METHODS[method],
        licences=", ".join(f"{what} {licence or 'not known here'}" for what, licence in licences.items()),
        data=link(data, "datasets/")
        + describe_revision(script["dataset_revision"], commits.get("dataset"))
        + f", split {script['dataset_split']}, {num_examples:,} examples",
        steps=step,
        sequences=settings["data"]["sequences_per_step"],
        kind=f"a LoRA adapter of rank {model['lora_r']}" if model["use_peft"] else "the whole model",
        results="First log against the last one: " + ", ".join(learned) + "." if learned else "Nothing was logged.",
        metrics=METRICS,
        curves=CURVES,
        evaluation=evaluation_command(settings),
        scores=render_scores(Path(training["output_dir"])),
        hardware=settings.get("hardware", "hardware that is not recorded"),
        settings="\n".join(f"| `{name}` | {value} |" for name, value in shown.items()),
        versions=", ".join(f"{package} {version}" for package, version in settings["versions"].items()),
        **usage(settings),
    )
