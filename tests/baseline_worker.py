"""Run by `test_baselines.py` under `accelerate launch`, in each of its processes: OPSD, SFT and GRPO in turn."""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from accelerate.utils import gather_object
from helpers import ADAPTER, CPU

import grpo_train
import opsd_train
import sft_train
from opsd.rollouts import VLLMSampler
from opsd.run import run as run_module

COMMON = CPU | ADAPTER | {"max_steps": 2, "save_steps": 1}
# At this temperature, the highest that vLLM takes, no two rollouts are alike unless they have the same seed: all of 64
# of one prompt differed for each of six seeds.
ROLLOUTS = {"use_vllm": True, "max_completion_length": 40, "temperature": 2.0, "effective_batch_size": 8}
RUNS = {
    "opsd": (
        opsd_train,
        ROLLOUTS
        | {"per_device_train_batch_size": 4, "fixed_teacher": True, "teacher_thinking": False, "max_length": 6000},
    ),
    "sft": (
        sft_train,
        {
            "problem_column": "Question",
            "effective_batch_size": 4,
            "per_device_train_batch_size": 1,
            "max_length": 6000,
        },
    ),
    # two rollouts of a group of four on each process: their seeds must not depend on the process alone
    "grpo": (
        grpo_train,
        ROLLOUTS
        | {
            "problem_column": "Question",
            "answer_column": "Answer",
            "num_generations": 4,
            "effective_batch_size": 4,
            "per_device_train_batch_size": 1,
            "max_prompt_length": 4000,
        },
    ),
}


def main(model: str, dataset: str, folder: str) -> None:
    """Write each method's log and the rollouts of all processes into `folder`/results.json."""
    trainers, shutdown = [], run_module.shutdown
    run_module.shutdown = lambda trainer, sampler: trainers.append(trainer)  # the group stays for the next run
    sampled: list[list[int]] = []
    generate = VLLMSampler.generate

    def keep_rollouts(self, *args, **kwargs):
        outputs = generate(self, *args, **kwargs)
        sampled.extend(prompt + completion for prompt, completion in zip(*outputs[:2], strict=True))
        return outputs

    VLLMSampler.generate = keep_rollouts
    results = {}
    for name, (program, settings) in RUNS.items():
        flags = COMMON | settings | {"model_name_or_path": model, "dataset_name": dataset}
        flags["output_dir"] = Path(folder, name)
        sampled.clear()
        program.main([text for flag, value in flags.items() for text in (f"--{flag}", str(value))])
        results[name] = {"log": trainers[-1].state.log_history, "rollouts": gather_object(list(sampled))}
    results["processes"] = gather_object([{"backend": dist.get_backend(), "world_size": dist.get_world_size()}])
    if trainers[-1].accelerator.is_main_process:
        Path(folder, "results.json").write_text(json.dumps(results))
    shutdown(trainers[-1])


if __name__ == "__main__":
    main(*sys.argv[1:])
