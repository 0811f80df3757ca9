"""Run by `test_launchers.py` under `accelerate launch`, in each of its processes: several runs of `opsd_train.py`."""

import json
import os
import shutil
import sys
from pathlib import Path

import helpers
import psutil
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, gather_object
from requests.adapters import HTTPAdapter
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from trl.distributed import DistributedBackend

import opsd_train
import opsd_trainer
from opsd.run import run as run_module
from opsd.teacher import local_shard
from opsd_trainer import OPSDTrainer

SETTINGS = helpers.CPU | helpers.OPSD
SETTINGS |= {
    "use_vllm": True,
    "per_device_train_batch_size": 4 // int(os.environ.get("WORLD_SIZE", "1")),
    "max_steps": 4,
    "save_steps": 2,
}
ADAPTER = helpers.ADAPTER | {"fixed_teacher": True}
# Together they have all teachers and objectives that the other runs lack.
VARIANTS = {
    "group": {
        "teacher_context": "rollout",
        "num_generations": 4,
        "reference_fallback": "answer",
        "policy_gradient_weight": 0.1,
        "curriculum": "pass_rate",
        "vllm_importance_sampling_correction": True,
        "top_k": 20,
        "top_p": 0.95,
        "jsd_token_clip": 0.05,
        "jsd_clip_mode": "scale",
        "top_k_loss": 5,
        "top_k_loss_support": "both",
        "top_k_loss_add_tail": True,
    },
    "reason_first": {
        "reason_first": True,
        "max_reasoning_length": 30,
        "fixed_teacher": False,
        "use_ema_teacher": True,
        "ema_decay": 0.5,
        "curriculum": "divergence",
        "correct_weight": 0.5,
        "beta": 0.0,
        "jsd_token_clip": 0.05,
    },
    "sampled_token": {
        "use_tinker_loss": True,
        "sampled_token_clip": 1.0,
        "vllm_importance_sampling_correction": True,
        "temperature": 1.2,
        "loss_temperature": 1.0,
        "num_loss_tokens_to_skip": 1,
        "fixed_teacher": False,
    },
    "full": {
        "use_peft": False,
        "learning_rate": 1e-4,
        "reason_first": True,
        "max_reasoning_length": 30,
        "incorrect_weight": 2.0,
        "policy_gradient_weight": 0.1,
        "num_generations": 2,
        "beta": 1.0,
        "jsd_token_clip": 0.05,
        "jsd_clip_mode": "token",
    },
    "wrong_hint": {
        "teacher_context": "wrong_hint",
        "num_generations": 4,
        "token_weights": "top_divergence",
        "verifier": "exact_match",
    },
    "answer": {
        "teacher_context": "answer",
        "token_weights": "falling",
        "teacher_system_prompt": "You know the answer.",
        "verify_rollouts": True,
        "max_tokens_per_micro_batch": 300,
    },
    "donor": {
        "teacher_context": "donor",
        "token_weights": "student_entropy",
        "student_prompt": "Problem: {problem}\n\nHint: it begins with {problem}",
        "verify_rollouts": True,
    },
    "reference_only": {
        "teacher_context": "reference_only",
        "token_weights": "teacher_certainty",
        "verify_rollouts": True,
    },
    "shortest_rollout": {
        "teacher_context": "shortest_rollout",
        "num_generations": 4,
        "token_weights": "top_entropy",
        "fixed_teacher": False,
        "use_ema_teacher": True,
        "ema_decay": 0.5,
    },
    "served_teacher": {
        "teacher_model_name_or_path": "TEACHER",
        "teacher_model_server_url": "SERVER",
        "fixed_teacher": False,
        "top_k_loss": helpers.TOP_K,
        "top_k_loss_add_tail": True,
        "verify_rollouts": True,
    },
    "other_model": {
        "teacher_model_name_or_path": "TEACHER",
        "fixed_teacher": False,
        "token_weights": "growing",
        "verify_rollouts": True,
    },
}


def let_fsdp_run_on_cpu() -> None:
    """Keep accelerate from silently taking FSDP on CPU for DDP."""
    make_state = PartialState.__init__

    def make_state_for_fsdp(self, *args, **kwargs):
        make_state(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = make_state_for_fsdp


def partition_larger_weights() -> None:
    """Let ZeRO-3 shard the tiny model's larger weights: below 100,000 elements it would keep them whole."""
    make_plugin = DeepSpeedPlugin.__post_init__

    def make_plugin_with_threshold(self):
        make_plugin(self)
        self.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 2500

    DeepSpeedPlugin.__post_init__ = make_plugin_with_threshold


class KeptTrainer(OPSDTrainer):
    """Stays within reach after `opsd_train.main`. A deleted engine would take the process group with it."""

    kept: list[OPSDTrainer] = []
    extra_callbacks: list[TrainerCallback] = []
    is_scripted = False  # whether its rollouts are given
    loss_dtypes: set[str] = set()  # of the losses of tokens, over all runs

    def __init__(self, *args, **kwargs):
        super().__init__(*args, callbacks=self.extra_callbacks, **kwargs)
        self.kept.append(self)
        if self.is_scripted:
            helpers.script_rollouts(self)

    def token_losses(self, *args, **kwargs):
        losses = super().token_losses(*args, **kwargs)
        self.loss_dtypes |= {str(losses.loss.dtype), str(losses.statistics.divergence.dtype)}
        return losses


class KillServer(TrainerCallback):
    """Kills the server between two steps."""

    def __init__(self, pid: int):
        self.server = psutil.Process(pid)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and state.is_world_process_zero:
            for process in (*self.server.children(recursive=True), self.server):
                process.kill()
            # Without TRL's minute of further attempts
            KeptTrainer.kept[-1].sampler.vllm_client.session.mount("http://", HTTPAdapter())


def train(settings: dict) -> OPSDTrainer:
    """Run `opsd_train.py` with these flags; return the trainer as it is at the end."""
    opsd_train.main([text for flag, value in settings.items() for text in (f"--{flag}", str(value))])
    return KeptTrainer.kept[-1]


def describe(trainer: OPSDTrainer) -> dict:
    """Say how this process trains, and how many elements of the model it holds as shards."""
    wrapped = trainer.model_wrapped
    return {
        "backend": dist.get_backend(),
        "world_size": dist.get_world_size(),
        "distributed_type": trainer.accelerator.distributed_type.value,
        "wrapper": type(wrapped).__name__,
        "zero_stage": wrapped.zero_optimization_stage() if hasattr(wrapped, "zero_optimization_stage") else None,
        "elements": count_elements(trainer.model),
    }


def count_elements(model: torch.nn.Module) -> int:
    """Count the elements of a model that this process holds."""
    return sum(local_shard(weight).numel() for weight in model.parameters())


def whole(trainer: OPSDTrainer, weight: Tensor) -> Tensor:
    """Return a copy of the whole weight, gathered from the processes if it is sharded."""
    with DistributedBackend(trainer.accelerator).gather_params([weight]):
        weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
        return weight.detach().clone()


def moved_base_weights(trainer: OPSDTrainer, model_dir: str) -> list[str]:
    """Return the names of the frozen weights that differ from those of the model's file in any bit."""
    file = load_file(Path(model_dir, "model.safetensors"))
    moved, seen = [], set()
    for name, weight in trainer.model.named_parameters():
        if weight.requires_grad:
            continue
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if not torch.equal(whole(trainer, weight), file[name].to(weight.dtype)):
            moved.append(name)
        seen.add(name)
    if seen != set(file):
        raise ValueError(f"not compared: {seen ^ set(file)}")
    return moved


def main(model: str, dataset: str, folder: str, *further: str) -> None:
    """
    Train after a preflight and resume that run, do the same with an EMA teacher, and train ten steps in bfloat16.

    With "full" there is also a full fine-tuning. With "tensor_parallel" there is only the first run, with one engine
    over two processes. With "teacher_model FOLDER" there is only a run against that teacher, on rollouts that are
    given, without vLLM. With "server PORT PID" there is a run against a server, and one in which the server dies. With
    "stale PORT" there is only a run whose rollouts are asked for ahead, and it resumed. With "variants FOLDER
    URL NAME ..." there are only those of `VARIANTS`, three steps of eight rollouts each. The other model is that of
    the folder, and a server of it is at the URL.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        let_fsdp_run_on_cpu()
    partition_larger_weights()
    opsd_trainer.OPSDTrainer = KeptTrainer
    # The group stays for the next run
    shutdown, run_module.shutdown = run_module.shutdown, lambda trainer, sampler: None
    common = SETTINGS | {"model_name_or_path": model, "dataset_name": dataset} | ADAPTER
    run, resumed = Path(folder, "run"), Path(folder, "resumed")
    if "server" in further:
        _, port, pid = further
        common |= {"vllm_mode": "server", "vllm_server_host": "127.0.0.1", "vllm_server_port": port}

    if "stale" in further:
        common |= {"vllm_mode": "server", "vllm_server_host": "127.0.0.1", "vllm_server_port": further[1]}
        common |= {"max_staleness": 1, "beta": 0.0, "vllm_adapter_dir": Path(folder, "adapters")}
        trainer = train(common | {"output_dir": run})
        results = {"run": trainer.state.log_history, "seed": trainer.args.seed}
        if trainer.accelerator.is_main_process:
            shutil.copytree(run / "checkpoint-2", resumed / "checkpoint-2")
        trainer.accelerator.wait_for_everyone()
        trainer = train(common | {"output_dir": resumed, "resume_from_checkpoint": True})
        if trainer.accelerator.is_main_process:
            results["resumed"] = trainer.state.log_history
            Path(folder, "results.json").write_text(json.dumps(results))
        shutdown(trainer, trainer.sampler)
        return
    if "teacher_model" in further:
        KeptTrainer.is_scripted = True
        common |= {
            "use_vllm": False,
            "fixed_teacher": False,
            "teacher_context": "none",
            "max_steps": 3,
            "save_steps": 3,
        }
        common |= {"teacher_model_name_or_path": further[1], "preflight": True, "output_dir": run}
        trainer = train(common)
        processes = []
        if dist.is_initialized():
            processes = gather_object([describe(trainer) | {"of_teacher": count_elements(trainer.teacher.other)}])
        if trainer.accelerator.is_main_process:
            results = {"run": trainer.state.log_history, "processes": processes}
            Path(folder, "results.json").write_text(json.dumps(results))
        shutdown(trainer, trainer.sampler)
        return
    if "variants" in further:
        common |= {"per_device_train_batch_size": 8 // int(os.environ.get("WORLD_SIZE", "1")), "max_steps": 3}
        common |= {"answer_column": "answer", "save_strategy": "no"}
        results, processes = {}, []
        for name in further[3:]:
            places = {"TEACHER": further[1], "SERVER": further[2]}
            settings = {flag: places.get(str(value), value) for flag, value in VARIANTS[name].items()}
            trainer = train(common | settings | {"output_dir": Path(folder, name)})
            results[name] = trainer.state.log_history
            processes += gather_object([describe(trainer)])
        if trainer.accelerator.is_main_process:
            Path(folder, "results.json").write_text(json.dumps(results | {"processes": processes}))
        shutdown(trainer, trainer.sampler)
        return
    if "tensor_parallel" in further:
        common |= {"vllm_tensor_parallel_size": 2}
    trainer = train(common | {"output_dir": run, "preflight": True})
    results = {"run": trainer.state.log_history, "processes": gather_object([describe(trainer)])}
    if "tensor_parallel" in further:
        results["engine_size"] = trainer.sampler.llm.llm_engine.vllm_config.parallel_config.tensor_parallel_size
        if trainer.accelerator.is_main_process:
            Path(folder, "results.json").write_text(json.dumps(results))
        shutdown(trainer, trainer.sampler)
        return
    if "server" in further:
        if trainer.accelerator.is_main_process:
            Path(folder, "results.json").write_text(json.dumps(results))
        KeptTrainer.extra_callbacks = [KillServer(int(pid))]
        train(common | {"output_dir": Path(folder, "killed")})
    if trainer.accelerator.is_main_process:
        shutil.copytree(run / "checkpoint-2", resumed / "checkpoint-2")
    trainer.accelerator.wait_for_everyone()

    trainer = train(common | {"output_dir": resumed, "resume_from_checkpoint": True})
    results["resumed"] = trainer.state.log_history
    results["processes"] += gather_object([describe(trainer)])

    average = common | {"fixed_teacher": False, "use_ema_teacher": True, "ema_decay": 0.5}
    results["ema"] = train(average | {"output_dir": Path(folder, "ema")}).state.log_history
    resume = {"resume_from_checkpoint": Path(folder, "ema", "checkpoint-2"), "output_dir": Path(folder, "ema_resumed")}
    results["ema_resumed"] = train(average | resume).state.log_history

    common |= {"save_strategy": "no"}
    bfloat16 = {"dtype": "bfloat16", "bf16": True, "gradient_checkpointing": True, "max_steps": 10}
    trainer = train(common | bfloat16 | {"output_dir": Path(folder, "bfloat16")})
    results["bfloat16"] = trainer.state.log_history
    results["processes"] += gather_object([describe(trainer)])
    results["moved_base_weights"] = moved_base_weights(trainer, model)
    results["loss_dtypes"] = sorted(KeptTrainer.loss_dtypes)

    if "full" in further:
        full = {"use_peft": False, "learning_rate": 1e-4, "max_steps": 3}
        trainer = train(common | full | {"output_dir": Path(folder, "full")})
        results["full"] = trainer.state.log_history

    if trainer.accelerator.is_main_process:
        Path(folder, "results.json").write_text(json.dumps(results))
    shutdown(trainer, trainer.sampler)


if __name__ == "__main__":
    main(*sys.argv[1:])
