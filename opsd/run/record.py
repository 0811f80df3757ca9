"""The record of a run's settings in its folder, and which of them a resumed run may change."""

import json
import logging
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import sort_checkpoints

logger = logging.getLogger(__name__)

RECORD = "run_config.json"  # of the last start; those of earlier ones are run_config_1.json, run_config_2.json, ...

# What acts from the resumed step on, or changes neither the policy nor the data. All other settings must stay.
OPTIMIZER = {"learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_type"}
MAY_CHANGE = OPTIMIZER | {
    *("max_grad_norm", "warmup_steps", "lr_scheduler_kwargs", "max_steps", "num_train_epochs", "max_nonfinite_steps"),
    # The number of sequences of a step is recorded, and must stay
    *("per_device_train_batch_size", "gradient_accumulation_steps", "effective_batch_size", "steps_per_generation"),
    *("generation_batch_size", "per_device_eval_batch_size"),
    # Data and prompts are compared by content, a model by the weights that are not trained
    *("dataset_name", "dataset_config", "dataset_revision", "dataset_split", "problem_column", "solution_column"),
    *("answer_column", "model_name_or_path", "model_revision", "model_init_kwargs", "chat_template_kwargs"),
    *("use_vllm", "vllm_mode", "vllm_adapter_dir", "vllm_enable_sleep_mode", "vllm_gpu_memory_utilization"),
    *("vllm_group_port", "vllm_max_model_length", "vllm_model_impl", "vllm_server_base_url", "vllm_server_host"),
    *("vllm_server_port", "vllm_server_timeout", "vllm_tensor_parallel_size", "attn_implementation"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "loss_implementation", "loss_chunk_size", "use_cpu"),
    *("max_tokens_per_micro_batch", "teacher_model_server_url"),
    *("deepspeed", "fsdp", "fsdp_config", "parallelism_config", "tf32", "torch_empty_cache_steps", "local_rank"),
    *(
        "output_dir",
        "run_name",
        "run_config",
        "overwrite_output_dir",
        "resume_from_checkpoint",
        "dry_run",
        "dry_run_file",
        "preflight",
        "profile_steps",
    ),
    *("report_to", "project", "disable_tqdm", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("num_completions_to_print", "enable_jit_checkpoint", "skip_memory_metrics", "full_determinism", "push_to_hub"),
    *("trust_remote_code", "dataset_num_proc", "use_cache", "debug", "verify_rollouts", "stop_on_collapse"),
}
MAY_CHANGE_PREFIXES = ("logging_", "log_", "save_", "eval_", "hub_", "wandb_", "trackio_", "dataloader_", "ddp_")


def read_record(run_dir: Path) -> dict[str, Any] | None:
    """Return the settings of the last start in `run_dir`, `None` if there is none; `ValueError` for another file."""
    file = run_dir / RECORD
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        record["training"].keys()
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not the record of a run ({error!r}); move it away to go on without it") from error
    return record


def find_record(folder: Path) -> dict[str, Any] | None:
    """Return the last settings of the run whose result or checkpoint is in `folder`; `None` without a record."""
    record = read_record(folder)
    if record is None and folder.name.startswith("checkpoint-"):
        return read_record(folder.absolute().parent)
    return record


def check_resumed_settings(run_dir: Path, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """
    Compare the settings of a start with those of the last one in `run_dir`, and log which ones change.

    Args:
        run_dir: folder of the run that is resumed.
        settings: group -> name -> value.

    Raises:
        ValueError: for settings that a resumed run must keep, with each as name: before -> now.
    """
    before = read_record(run_dir)
    if before is None:
        logger.warning("%s has no %s: the settings of its first start are not known", run_dir, RECORD)
        return
    now = json.loads(json.dumps(settings, default=str))
    changes = {group: compare(before.get(group, {}), now[group]) for group in ("script", "training", "model", "data")}
    changed = {
        name: f"{name}: {change['before']} -> {change['now']}"
        for group in changes.values()
        for name, change in group.items()
    }
    plateau = "reduce_lr_on_plateau" in (
        before["training"].get("lr_scheduler_type"),
        now["training"]["lr_scheduler_type"],
    )
    may_change = MAY_CHANGE - OPTIMIZER if plateau else MAY_CHANGE  # its learning rate is in the optimizer's state
    refused = [changed[n] for n in changed if n not in may_change and not n.startswith(MAY_CHANGE_PREFIXES)]
    if refused:
        raise ValueError(
            f"--resume_from_checkpoint: {run_dir} was trained with other settings:\n  " + "\n  ".join(refused) + "\n"
            "give them as before, or start anew with another --output_dir"
        )
    of_trainer = ("resume_from_checkpoint", "model_init_kwargs", "ddp_find_unused_parameters")  # which it also sets
    applied = [text for name, text in changed.items() if name not in of_trainer]
    if applied:
        logger.info("resumed with other settings: %s", ", ".join(applied))


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return name -> {"before": value, "now": value} of the settings in both that differ."""
    return {
        name: {"before": before[name], "now": now[name]}
        for name in before
        if name in now and now[name] != before[name]
    }


def write_record(run_dir: Path, settings: Mapping[str, Any], starts_anew: bool, step: int = 0) -> None:
    """
    Record the settings of a start, and what changed since the start before. Earlier records stay under other names.

    Args:
        run_dir: folder of the run.
        settings: group -> name -> value.
        starts_anew: delete the earlier records.
        step: optimizer steps before this start.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    record, earlier = run_dir / RECORD, sorted(run_dir.glob("run_config_*.json"))
    changes: dict[str, Any] = {}
    now = json.loads(json.dumps(settings, default=str))
    if starts_anew:
        for file in earlier:
            file.unlink()
    elif record.is_file() and sort_checkpoints(run_dir):
        before = json.loads(record.read_text(encoding="utf-8"))
        for group in (group for group, values in now.items() if isinstance(values, dict)):
            if changed := compare(before.get(group, {}), now[group]):
                changes[group] = changed
        record.rename(run_dir / f"run_config_{len(earlier) + 1}.json")
    _write(record, {"first_step": step + 1, "changes": changes} | now)


def mark_finished(run_dir: Path, step: int) -> None:
    """Note in the record that the run has done all its steps, and that the final model is saved."""
    record = run_dir / RECORD
    _write(record, json.loads(record.read_text(encoding="utf-8")) | {"finished_step": step})


def find_finished_step(run_dir: Path, max_steps: int, num_epochs: float) -> int | None:
    """
    The step at which the run in `run_dir` finished; `None` if it has not, or is to be longer now.

    Args:
        run_dir: folder of the run.
        max_steps, num_epochs: what it is to be now; `max_steps` counts where it is positive.
    """
    record = json.loads((run_dir / RECORD).read_text(encoding="utf-8")) if (run_dir / RECORD).is_file() else {}
    step = record.get("finished_step")
    if step is None:
        return None
    if max_steps > 0:
        return step if max_steps <= step else None
    before = record["training"]
    return step if before["max_steps"] <= 0 and num_epochs <= before["num_train_epochs"] else None


def describe_hardware() -> str:
    """Name the GPUs that this process sees; where there are none, processor and cores."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    return f"{named[1] if named else platform.machine()}, {os.cpu_count()} cores"


def _write(file: Path, content: Mapping[str, Any]) -> None:
    """Write JSON whole or not at all."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(file)
