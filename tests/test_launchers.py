"""Every launcher configuration, on two CPU processes with real vLLM: the same run as in a single process."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import helpers
import psutil
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from helpers import LOGPROB_GAP, free_port, save_model, saved_rollouts, serving_teacher, started
from launch_worker import ADAPTER, SETTINGS, VARIANTS
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from opsd.run.checkpoints import find_fault, find_last_complete
from opsd.vllm_engine import CPU_ENGINE, CPU_ENVIRONMENT, ENGINE, ENVIRONMENT

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("launch_worker.py")
LIMIT_WORKER = Path(__file__).with_name("limit_worker.py")
CONFIGS = ROOT / "scripts" / "accelerate"
LAUNCHERS = {
    "ddp": {"distributed_type": "MULTI_CPU", "wrapper": "DistributedDataParallel", "zero_stage": None},
    "zero2": {"distributed_type": "DEEPSPEED", "wrapper": "DeepSpeedEngine", "zero_stage": 2},
    "zero3": {"distributed_type": "DEEPSPEED", "wrapper": "DeepSpeedEngine", "zero_stage": 3},
    "fsdp2": {"distributed_type": "FSDP", "wrapper": "FSDPPeftModelForCausalLM", "zero_stage": None},
}


def launch(
    config: str, num_processes: int, log: Path, *arguments: object, worker: Path = WORKER, **environment: str
) -> int:
    """Run a worker under `accelerate launch`; return the exit status."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / f"{config}.yaml"]
    command += ["--num_processes", str(num_processes), "--main_process_port", "0", "--mixed_precision", "no"]
    command += [worker, *map(str, arguments)]
    with started(command, log, **environment) as process:
        return process.wait(timeout=600)


@pytest.fixture(scope="module")
def data(problems, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    problems.to_json(path)
    return path


@pytest.fixture(scope="module")
def deepspeed_build(tmp_path_factory) -> str:
    """Folder in which DeepSpeed compiles. In the user's folder a killed test would leave a lock for ever."""
    return str(tmp_path_factory.mktemp("torch_extensions"))


@pytest.fixture(scope="module")
def one_process(tiny_model_dir, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one_process")
    assert launch("cpu", 1, folder / "log", tiny_model_dir, data, folder) == 0, (folder / "log").read_text()[-5000:]
    return folder


def values(history: list[dict], name: str) -> list[float]:
    return [logs[name] for logs in history if name in logs]


def rollouts(folder: Path) -> list[tuple]:
    """Return (step, prompt, completion) of all rollouts, in an order that does not depend on the processes."""
    return sorted((record["step"], record["prompt"], record["completion"]) for record in saved_rollouts(folder))


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def check_run(folder: Path, history: list[dict], reference: Path | None = None) -> None:
    """Check that 4 steps were on-policy and the adapter saved whole; with `reference`, that this run gave the same."""
    assert len(values(history, "loss")) == 4
    assert max(values(history, "sampling/sampling_logp_difference/max")) <= LOGPROB_GAP
    trained = adapter(folder)
    assert all(weight.any() for weight in trained.values())  # all parts of it have moved: B starts at zero
    assert_close(adapter(folder / "checkpoint-4"), trained, rtol=0, atol=0)
    assert len(set(rollouts(folder))) == 16
    if reference is None:
        return
    expected = json.loads((reference / "results.json").read_text())["run"]
    assert values(history, "loss") == pytest.approx(values(expected, "loss"), rel=1e-5)
    assert rollouts(folder) == rollouts(reference / "run")
    assert_close(trained, adapter(reference / "run"), rtol=0, atol=1e-5)


def check_ema(results: dict, reference: dict | None = None) -> None:
    """Check that the teacher follows the student, is resumed, and with `reference` gives the losses of that run."""
    losses = values(results["ema"], "loss")
    assert losses[0] == pytest.approx(values(results["run"], "loss")[0], rel=1e-6)  # from the same teacher
    # Then not: an equal teacher would give the same losses to 1e-6, as resuming does below.
    fixed = values(results["run"], "loss")
    assert max(abs(loss / other - 1) for loss, other in zip(losses[1:], fixed[1:], strict=True)) > 1e-5
    assert values(results["ema_resumed"], "loss")[2:] == pytest.approx(losses[2:], rel=1e-6)
    if reference is not None:
        assert losses == pytest.approx(values(reference["ema"], "loss"), rel=1e-5)


def check_resumed_and_bfloat16(folder: Path, results: dict) -> None:
    """Check that the run resumed at step 2 equals the whole one, and that ten steps in bfloat16 leave the base."""
    assert values(results["resumed"], "loss")[2:] == pytest.approx(values(results["run"], "loss")[2:], rel=1e-6)
    assert rollouts(folder / "resumed") == [record for record in rollouts(folder / "run") if record[0] > 2]
    assert_close(adapter(folder / "resumed"), adapter(folder / "run"), rtol=0, atol=1e-6)

    assert len(values(results["bfloat16"], "loss")) == 10
    assert all(weight.any() for weight in adapter(folder / "bfloat16").values())
    assert results["moved_base_weights"] == []
    assert results["loss_dtypes"] == ["torch.float32"]


@pytest.mark.multiprocess
@pytest.mark.vllm
def test_one_process(one_process):
    results = json.loads((one_process / "results.json").read_text())
    check_run(one_process / "run", results["run"])
    check_ema(results)
    check_resumed_and_bfloat16(one_process, results)


@pytest.mark.multiprocess
@pytest.mark.vllm
@pytest.mark.parametrize(
    "launcher", ["ddp", *(pytest.param(launcher, marks=pytest.mark.slow) for launcher in ("zero2", "zero3", "fsdp2"))]
)
def test_launcher(launcher, one_process, tiny_model_dir, data, deepspeed_build, tmp_path):
    log = tmp_path / "log"
    further = ["full"] if launcher == "zero3" else []
    status = launch(launcher, 2, log, tiny_model_dir, data, tmp_path, *further, TORCH_EXTENSIONS_DIR=deepspeed_build)
    assert status == 0, log.read_text()[-5000:]
    results = json.loads((tmp_path / "results.json").read_text())
    total = sum(weight.numel() for weight in adapter(one_process / "run").values())
    total += sum(weight.numel() for weight in load_file(tiny_model_dir / "model.safetensors").values())
    elements = {"zero3": total // 2, "fsdp2": total // 2}.get(launcher, total)
    expected = {"backend": "gloo", "world_size": 2, "elements": elements} | LAUNCHERS[launcher]
    assert results["processes"] == [expected] * 6  # in three runs
    check_run(tmp_path / "run", results["run"], one_process)
    check_ema(results, json.loads((one_process / "results.json").read_text()))
    check_resumed_and_bfloat16(tmp_path, results)
    if further:
        assert max(values(results["full"], "sampling/sampling_logp_difference/max")) <= LOGPROB_GAP
        base, trained = load_file(tiny_model_dir / "model.safetensors"), load_file(tmp_path / "full/model.safetensors")
        assert {name: weight.shape for name, weight in trained.items()} == {n: w.shape for n, w in base.items()}
        assert not any(trained[name].equal(weight) for name, weight in base.items())


@pytest.fixture(scope="module")
def teacher_model(tiny_model_dir, tmp_path_factory) -> Path:
    return Path(save_model(tmp_path_factory.mktemp("teacher"), tiny_model_dir))


@pytest.fixture(scope="module")
def one_process_with_teacher_model(tiny_model_dir, data, teacher_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("with_teacher_model")
    status = launch("cpu", 1, folder / "log", tiny_model_dir, data, folder, "teacher_model", teacher_model)
    assert status == 0, (folder / "log").read_text()[-5000:]
    return folder


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "launcher", ["ddp", *(pytest.param(launcher, marks=pytest.mark.slow) for launcher in ("zero2", "zero3", "fsdp2"))]
)
def test_teacher_model(
    launcher, one_process_with_teacher_model, teacher_model, tiny_model_dir, data, deepspeed_build, tmp_path
):
    """Another model teaches: the same run as in one process; where the student is sharded, the teacher is too."""
    arguments = (tiny_model_dir, data, tmp_path, "teacher_model", teacher_model)
    status = launch(launcher, 2, log := tmp_path / "log", *arguments, TORCH_EXTENSIONS_DIR=deepspeed_build)
    assert status == 0, log.read_text()[-5000:]
    results = json.loads((tmp_path / "results.json").read_text())
    expected = json.loads((one_process_with_teacher_model / "results.json").read_text())
    assert values(results["run"], "loss") == pytest.approx(values(expected["run"], "loss"), rel=1e-5)
    assert min(values(results["run"], "loss")) > 0.1  # nats, from a random teacher
    trained, reference = adapter(tmp_path / "run"), adapter(one_process_with_teacher_model / "run")
    assert_close(trained, reference, rtol=0, atol=1e-5)
    total = sum(weight.numel() for weight in load_file(teacher_model / "model.safetensors").values())
    held = total // 2 if launcher in ("zero3", "fsdp2") else total
    for process in results["processes"]:
        assert (process["world_size"], process["wrapper"]) == (2, LAUNCHERS[launcher]["wrapper"])
        assert abs(process["of_teacher"] - held) <= 0.05 * total  # ZeRO-3 keeps small weights whole
    assert not [file for file in (tmp_path / "run" / "checkpoint-3").rglob("*") if "teacher" in file.name]


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "launcher", ["ddp", *(pytest.param(launcher, marks=pytest.mark.slow) for launcher in ("zero2", "zero3", "fsdp2"))]
)
def test_a_limit_of_tokens(launcher, deepspeed_build, tmp_path):
    """
    Packed micro-batches give the gradients of padded ones, and so do those divided on the way.

    The processes need different numbers of them.
    """
    log, result = tmp_path / "log", tmp_path / "result.pt"
    status = launch(launcher, 2, log, result, worker=LIMIT_WORKER, TORCH_EXTENSIONS_DIR=deepspeed_build)
    assert status == 0, log.read_text()[-5000:]
    runs = torch.load(result)
    padded = runs.pop("padded")
    expected = {"world_size": 2} | LAUNCHERS[launcher]
    numbers = [[len(process) for process in run["sizes"]] for run in (padded, *runs.values())]
    assert numbers == [[4, 4], [4, 4], [8, 8], [16, 16]]  # in two steps
    shortest, longest = ([tokens for _, tokens in process] for process in runs["1"]["sizes"])
    assert 3 * max(shortest) <= 300 < 3 * min(longest)  # the first process alone would do with fewer
    for name, run in runs.items():
        limit = float("inf") if name == "packed" else int(name)
        assert expected.items() <= run["process"].items()
        assert all(tokens <= limit or rollouts == 1 for process in run["sizes"] for rollouts, tokens in process)
        assert run["losses"] == pytest.approx(padded["losses"], rel=1e-5)
        assert run["eval_loss"] == pytest.approx(padded["eval_loss"], rel=1e-5)
        for key, change in padded["changes"].items():
            assert change.norm() > 0 and (run["changes"][key] - change).norm() <= 1e-4 * change.norm(), key


@pytest.mark.multiprocess
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("names", [list(VARIANTS)[:4], list(VARIANTS)[4:]], ids=["objectives", "contexts"])
def test_variants_under_zero3(names, tiny_model_dir, data, teacher_model, deepspeed_build, tmp_path):
    """
    The teachers, contexts, token weights and objectives that the other runs lack, with vLLM.

    They are the same under ZeRO-3 as in one process.
    """
    histories = []
    with serving_teacher(str(teacher_model)) as (url, _):
        for launcher, num_processes in (("cpu", 1), ("zero3", 2)):
            folder = tmp_path / launcher
            folder.mkdir()
            arguments = (tiny_model_dir, data, folder, "variants", teacher_model, url, *names)
            log = folder / "log"
            status = launch(launcher, num_processes, log, *arguments, TORCH_EXTENSIONS_DIR=deepspeed_build)
            assert status == 0, log.read_text()[-5000:]
            histories.append(json.loads((folder / "results.json").read_text()))
    expected, results = histories
    expected.pop("processes")
    processes = results.pop("processes")
    assert len(processes) == 2 * len(names) == 2 * len(results)
    assert all(process["world_size"] == 2 and process["zero_stage"] == 3 for process in processes)
    for name, history in results.items():
        assert len(values(history, "loss")) == 3
        assert len(values(history, "rewards/accuracy/mean")) == 3
        assert bool(values(history, "rationales/mean_length")) == ("reason_first" in VARIANTS[name])
        assert rollouts(tmp_path / "zero3" / name) == rollouts(tmp_path / "cpu" / name), name
        for metric in ("loss", "divergence", "rewards/accuracy/mean", "rationales/mean_length"):
            assert values(history, metric) == pytest.approx(values(expected[name], metric), rel=1e-4, abs=1e-6), name
        if "vllm_importance_sampling_correction" in VARIANTS[name]:
            ratio = "sampling/importance_sampling_ratio"
            assert max(values(history, f"{ratio}/max")) > min(values(history, f"{ratio}/min"))
            assert values(history, f"{ratio}/mean") == pytest.approx(values(expected[name], f"{ratio}/mean"), rel=1e-4)
        else:
            assert max(values(history, "sampling/sampling_logp_difference/max")) <= LOGPROB_GAP


@pytest.mark.multiprocess
@pytest.mark.vllm
@pytest.mark.slow
def test_one_engine_over_two_processes(one_process, tiny_model_dir, data, tmp_path):
    assert launch("ddp", 2, log := tmp_path / "log", tiny_model_dir, data, tmp_path, "tensor_parallel") == 0, (
        log.read_text()
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["engine_size"] == 2
    check_run(tmp_path / "run", results["run"], one_process)


@pytest.mark.multiprocess
@pytest.mark.vllm
@pytest.mark.slow
def test_server(one_process, tiny_model_dir, data, tmp_path):
    """Two processes with a server give the same run. If the server dies, the error is clear, the checkpoint intact."""
    port, log = free_port(), tmp_path / "log"
    command = ["bash", ROOT / "scripts" / "serve_vllm.sh", "--host", "127.0.0.1", "--max-model-len", "1000"]
    settings = {"MODEL": str(tiny_model_dir), "PORT": str(port), "MAX_LORA_RANK": str(ADAPTER["lora_r"])}
    with started(command, tmp_path / "server.log", **settings) as server:
        status = launch("ddp", 2, log, tiny_model_dir, data, tmp_path, "server", port, server.pid)
        assert (tmp_path / "results.json").exists(), (log.read_text()[-5000:], (tmp_path / "server.log").read_text())
    results = json.loads((tmp_path / "results.json").read_text())
    check_run(tmp_path / "run", results["run"], one_process)
    assert status != 0
    assert f"ConnectionError: the vLLM server at http://127.0.0.1:{port} failed" in log.read_text()
    assert find_fault(tmp_path / "killed" / "checkpoint-2") is None
    assert not (tmp_path / "killed" / "checkpoint-4").exists()


@pytest.mark.multiprocess
@pytest.mark.vllm
@pytest.mark.slow
def test_grpo_with_a_server(tiny_model_dir, data, tmp_path):
    port, run = free_port(), tmp_path / "run"
    server = ["bash", ROOT / "scripts" / "serve_vllm.sh", "--host", "127.0.0.1", "--max-model-len", "1000"]
    server += ["--logprobs-mode", "processed_logprobs"]
    names = {"MODEL": str(tiny_model_dir), "PORT": str(port), "MAX_LORA_RANK": str(ADAPTER["lora_r"])}
    settings = helpers.CPU | helpers.ADAPTER | {"max_completion_length": 40, "temperature": 1.0, "max_steps": 2}
    settings |= {"num_generations": 4, "per_device_train_batch_size": 8, "use_vllm": True, "vllm_mode": "server"}
    settings |= {"vllm_server_host": "127.0.0.1", "vllm_server_port": port, "vllm_adapter_dir": tmp_path / "adapters"}
    settings |= {"model_name_or_path": tiny_model_dir, "dataset_name": data, "output_dir": run}
    flags = [word for flag, value in settings.items() for word in (f"--{flag}", str(value))]
    with (
        started(server, tmp_path / "server.log", **names),
        started([sys.executable, ROOT / "grpo_train.py", *flags], tmp_path / "log") as training,
    ):
        assert training.wait(timeout=600) == 0, (tmp_path / "log").read_text()[-5000:]
    state = json.loads((run / "checkpoint-2" / "trainer_state.json").read_text())
    gaps = values(state["log_history"], "sampling/sampling_logp_difference/max")
    assert len(gaps) == 2 and max(gaps) <= 1e-4


# Configurations and scripts


def test_configurations():
    files = [ROOT / "accelerate.yaml", *CONFIGS.glob("*.yaml")]
    assert {file.stem for file in files[1:]} >= {*LAUNCHERS, "single_gpu", "cpu", "multi_node"}
    for file in files:
        load_config_from_file(str(file))  # refuses keys that it does not know
        # accelerate takes these from the command line only, whatever the file says
        assert not {"rdzv_backend", "same_network"} & set(yaml.safe_load(file.read_text())), file
    assert yaml.safe_load(files[0].read_text()) == yaml.safe_load((CONFIGS / "ddp.yaml").read_text())


def test_server_script_has_the_settings_of_the_colocated_engine():
    """On a machine without a GPU: both the script and `vllm_engine.py` state these settings."""
    shared = CPU_ENVIRONMENT | {name: ENVIRONMENT[name] for name in ENVIRONMENT if name != "VLLM_LOGGING_LEVEL"}
    environment = {name: value for name, value in os.environ.items() if name not in shared}
    command = subprocess.run(
        ["bash", ROOT / "scripts" / "serve_vllm.sh", "--port", "1"],
        env=environment | {"MODEL": "a model", "DRY_RUN": "1", "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"},
        check=True,
        capture_output=True,
        text=True,
    )
    words = shlex.split(command.stdout)
    assert words[words.index("--model") + 1] == "a model" and words[-2:] == ["--port", "1"]
    assert {f"{name}={value}" for name, value in shared.items()} <= set(words)
    assert json.loads(words[words.index("--hf-overrides") + 1]) == ENGINE["hf_overrides"]
    for name, value in CPU_ENGINE.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            assert ("--" if value else "--no-") + flag in words
        else:
            assert words[words.index(f"--{flag}") + 1] == str(value)


@contextmanager
def started_under_slurm(folder: Path, *arguments: str, **environment: str) -> Iterator[subprocess.Popen]:
    """Run the SLURM script and a recipe on two nodes of one process each, both of them this machine."""
    commands = {
        "scontrol": "echo 127.0.0.1",
        "srun": '[ "$1" = --kill-on-bad-exit=1 ] && shift\n'
        'SLURM_NODEID=0 "$@" & first=$!\nSLURM_NODEID=1 "$@"\nwait $first',
    }
    for name, lines in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{lines}\n")
        (folder / name).chmod(0o755)
    allocation = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    allocation |= {"PORT": str(free_port()), "PATH": f"{folder}:{os.environ['PATH']}"} | environment
    command = ["bash", ROOT / "scripts" / "train_multi_node.sh", "scripts/run_opsd_8b.sh", *arguments]
    with started(command, folder / "log", **allocation) as process:
        yield process


@pytest.mark.multiprocess
@pytest.mark.slow
def test_multi_node_script(tiny_model_dir, data, tmp_path):
    """Two nodes find each other and train; SIGTERM makes them save, and the same command goes on from there."""
    run = tmp_path / "run"
    names = {"MODEL": str(tiny_model_dir), "OUTPUT_DIR": str(run)}
    settings = SETTINGS | ADAPTER | {"use_vllm": False, "dtype": "float32", "dataset_name": data}
    settings |= {"per_device_train_batch_size": 2, "effective_batch_size": 4, "preflight": False}
    settings |= {"max_steps": 100_000, "save_steps": 100_000}
    arguments = [word for flag, value in settings.items() for word in (f"--{flag}", str(value))]
    with started_under_slurm(tmp_path, *arguments, **names) as srun:
        deadline = time.monotonic() + 600
        rollouts_file = run / "completions.jsonl"
        while not rollouts_file.is_file() or '"step": 2,' not in rollouts_file.read_text():
            assert srun.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-5000:]
            time.sleep(0.5)
        for process in psutil.Process(srun.pid).children(recursive=True):  # launchers and training, as SLURM does
            if process.name().startswith("python"):
                process.terminate()
        assert srun.wait(timeout=300) != 0
    checkpoint = find_last_complete(run)
    assert checkpoint is not None, (tmp_path / "log").read_text()[-5000:]
    assert len(saved_rollouts(run, 1)) == 4  # 2 of each node

    with started_under_slurm(tmp_path, *arguments, **names, DRY_RUN="1") as printed:
        assert printed.wait(timeout=300) == 0
    assert "--resume_from_checkpoint true" in (tmp_path / "log").read_text()
