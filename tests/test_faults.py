"""Faults that a run survives: SIGKILL, SIGTERM, a full disk, losses that are not finite, rollouts without tokens."""

import io
import json
import math
import multiprocessing
import os
import resource
import signal
import socket
from functools import partial
from itertools import repeat
from pathlib import Path

import pytest
import torch
from helpers import ADAPTER, CPU, ROOT, make_problems, make_trainer_factory, saved_rollouts
from launch_worker import let_fsdp_run_on_cpu
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from transformers import TrainerCallback
from trl import GRPOTrainer, SFTTrainer

import grpo_train
import opsd.grpo
import opsd.sft
import opsd_train
import sft_train
from opsd.rollouts import Completion
from opsd.run import checkpoints
from opsd.run.checkpoints import find_fault, find_last_complete
from opsd_trainer import OPSDTrainer

STEPS = 4


class ScriptedSampler:
    """Gives completions of given lengths, in the order in which they are asked for. Those below 6 tokens end."""

    def __init__(self, trainer, lengths):
        self.end, self.lengths = trainer.processing_class.eos_token_id, iter(lengths)

    def sync(self, step, reuse):
        pass

    def sample(self, prompts):
        completions = [[5 + i for i in range(next(self.lengths))] for _ in prompts]
        completions = [[*ids[:-1], self.end] if ids and len(ids) < 6 else ids for ids in completions]
        return [Completion(ids, [-1.0] * len(ids)) for ids in completions]


# Runs that are killed


@pytest.fixture(scope="session")
def forks():
    """Start processes that have imported the program already: the import takes most of a short run's time."""
    os.environ["PYTHONPATH"] = str(ROOT)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["opsd_train"])
    return context


def run_program(arguments, plant=None, step=None):
    if plant is not None:
        plant(step)
    opsd_train.main(arguments)


def in_a_process(forks, *args):
    """Call `run_program(*args)` in a process of its own; return its exit code, which is negative for a signal."""
    process = forks.Process(target=run_program, args=args)
    process.start()
    process.join()
    return process.exitcode


def command_line(model_dir, train_file, folder, *arguments):
    return [
        *("--model_name_or_path", str(model_dir), "--dataset_name", str(train_file), "--output_dir", str(folder)),
        *("--config", str(ROOT / "quickstart" / "opsd.yaml"), "--max_steps", str(STEPS), "--disable_tqdm", "true"),
        *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--max_completion_length", "8"),
        *("--use_vllm", "false", "--logging_steps", "1", "--save_steps", "1", "--save_total_limit", "1", *arguments),
    ]


@pytest.fixture(scope="session")
def train_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    make_problems().to_json(file)
    return file


@pytest.fixture(scope="session")
def whole_run(forks, tiny_model_dir, train_file, tmp_path_factory):
    """Folder of a run without a fault."""
    folder = tmp_path_factory.mktemp("whole")
    assert in_a_process(forks, command_line(tiny_model_dir, train_file, folder)) == 0
    return folder


def read_run(folder):
    """Return the logs of a run without times, its rollouts and its final adapter."""
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    names = ("step", "loss", "grad_norm", "learning_rate", "divergence", "num_generated_tokens")
    logs = [{name: entry[name] for name in names} for entry in state["log_history"] if "loss" in entry]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [entry["step"] for entry in logs]
    assert [{name: line[name] for name in names} for line in lines if "loss" in line] == logs
    return logs, saved_rollouts(folder), load_file(folder / "adapter_model.safetensors")


def assert_same_run(folder, other):
    (logs, rollouts, adapter), (other_logs, other_rollouts, other_adapter) = read_run(folder), read_run(other)
    assert [entry["step"] for entry in logs] == list(range(1, STEPS + 1))
    assert logs == other_logs and rollouts == other_rollouts and len(rollouts) == 4 * STEPS
    assert_close(adapter, other_adapter, rtol=0.0, atol=0.0)


def send(number):
    os.kill(os.getpid(), number)


def kill_in_a_step(step):
    compute_loss = OPSDTrainer.compute_loss

    def dying(self, *args, **kwargs):
        loss = compute_loss(self, *args, **kwargs)
        if (self.state.global_step, self._step % 2) == (step, 0):  # the second micro-batch of the step after `step`
            send(signal.SIGKILL)
        return loss

    OPSDTrainer.compute_loss = dying


def kill_while_the_optimizer_is_written(step):
    save = torch.save

    def dying(value, file, *args, **kwargs):
        if str(file).endswith(f"checkpoint-{step + 1}/optimizer.pt"):
            save(value, content := io.BytesIO())
            Path(file).write_bytes(content.getvalue()[:5000])
            send(signal.SIGKILL)
        save(value, file, *args, **kwargs)

    torch.save = dying


def kill_before_the_manifest(step):
    write = checkpoints.write_manifest

    def dying(checkpoint):
        if checkpoint.name == f"checkpoint-{step + 1}":
            send(signal.SIGKILL)
        write(checkpoint)

    checkpoints.write_manifest = dying


def kill_before_the_rotation(step):
    rotate = checkpoints.rotate_checkpoints

    def dying(run_dir, *args, **kwargs):
        if Path(run_dir, f"checkpoint-{step}").exists():
            send(signal.SIGKILL)
        rotate(run_dir, *args, **kwargs)

    checkpoints.rotate_checkpoints = dying


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("plant", "step", "left"),
    [
        (kill_in_a_step, 2, {2}),
        (kill_while_the_optimizer_is_written, 2, {2, 3}),
        (kill_before_the_manifest, 2, {2, 3}),
        (kill_before_the_rotation, 3, {2, 3}),
        (kill_before_the_rotation, STEPS, {STEPS - 1, STEPS}),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_killed_run_goes_on_from_the_last_complete_checkpoint(
    forks, tiny_model_dir, train_file, whole_run, tmp_path, caplog, plant, step, left
):
    arguments = command_line(tiny_model_dir, train_file, tmp_path)
    assert in_a_process(forks, arguments, plant, step) == -signal.SIGKILL
    assert {int(path.name.removeprefix("checkpoint-")) for path in tmp_path.glob("checkpoint-*")} == left
    assert find_last_complete(tmp_path) == tmp_path / f"checkpoint-{step}"
    with caplog.at_level("INFO"):
        opsd_train.main([*arguments, "--resume_from_checkpoint", "true"])
    assert f"going on from {tmp_path / f'checkpoint-{step}'}" in caplog.messages
    if step < STEPS:  # saved once more, and what was torn or too much is gone
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]
    assert_same_run(tmp_path, whole_run)


# Runs that are told to leave


def terminate_in_a_step(step):
    compute_loss = OPSDTrainer.compute_loss

    def interrupted(self, *args, **kwargs):
        if (self.state.global_step, self._step % 2) == (step, 1):
            send(signal.SIGTERM)
        return compute_loss(self, *args, **kwargs)

    OPSDTrainer.compute_loss = interrupted


@pytest.mark.multiprocess
def test_sigterm_saves_and_leaves(forks, tiny_model_dir, train_file, whole_run, tmp_path):
    arguments = command_line(tiny_model_dir, train_file, tmp_path)
    rare = [*arguments, "--save_strategy", "no", "--save_only_model", "true"]
    assert in_a_process(forks, rare, terminate_in_a_step, 1) == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "adapter_model.safetensors").exists()  # it would look like that of a finished run
    handler = signal.getsignal(signal.SIGTERM)
    opsd_train.main([*arguments, "--resume_from_checkpoint", "true"])
    assert signal.getsignal(signal.SIGTERM) is handler
    assert_same_run(tmp_path, whole_run)


@pytest.mark.multiprocess
def test_sigterm_in_the_last_step_changes_nothing(forks, tiny_model_dir, train_file, whole_run, tmp_path):
    arguments = command_line(tiny_model_dir, train_file, tmp_path)
    assert in_a_process(forks, arguments, terminate_in_a_step, STEPS - 1) == 0
    assert_same_run(tmp_path, whole_run)


def interrupt_in_a_step(step, times, terminal):
    """Send so many Ctrl-C in a step; what goes to the terminal is written to a file."""
    os.dup2(os.open(terminal, os.O_WRONLY | os.O_CREAT), 2)
    compute_loss = OPSDTrainer.compute_loss

    def interrupted(self, *args, **kwargs):
        if (self.state.global_step, self._step % 2) == (step, 1):
            for _ in range(times):
                send(signal.SIGINT)
        return compute_loss(self, *args, **kwargs)

    OPSDTrainer.compute_loss = interrupted


@pytest.mark.multiprocess
@pytest.mark.parametrize(("times", "left"), [(1, 2), (2, 1)])
def test_first_interrupt_saves_and_second_ends_at_once(
    forks, tiny_model_dir, train_file, whole_run, tmp_path, times, left
):
    arguments, terminal = command_line(tiny_model_dir, train_file, tmp_path / "run"), tmp_path / "terminal"
    plant = partial(interrupt_in_a_step, times=times, terminal=str(terminal))
    assert in_a_process(forks, arguments, plant, 1) == 128 + signal.SIGINT
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{left}"]
    text = terminal.read_text()
    complete = f"{tmp_path}/run/checkpoint-1 is complete"
    assert f"SIGINT: finishing step 2 and saving a checkpoint; Ctrl-C ends it at once; {complete}" in text
    assert (f"SIGINT: leaving at once; {complete}" in text) == (times == 2)
    assert "Traceback" not in text
    opsd_train.main([*arguments, "--resume_from_checkpoint", "true"])
    assert_same_run(tmp_path / "run", whole_run)


@pytest.mark.multiprocess
def test_finished_run_is_left_as_it_is(tiny_model_dir, train_file, whole_run, caplog):
    arguments = command_line(tiny_model_dir, train_file, whole_run, "--resume_from_checkpoint", "true")
    before = {file: file.read_bytes() for file in whole_run.rglob("*") if file.is_file()}
    with pytest.raises(SystemExit) as left, caplog.at_level("INFO"):
        opsd_train.main(arguments)
    assert left.value.code == 0
    assert f"{whole_run} is finished, after step {STEPS}: there is nothing to do" in caplog.text
    assert "other settings" not in caplog.text
    assert {file: file.read_bytes() for file in whole_run.rglob("*") if file.is_file()} == before


# Two processes

DEEPSPEED = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    "ACCELERATE_TORCH_DEVICE": "cpu",  # with ACCELERATE_USE_CPU it would be DDP
}
LAUNCHERS = {
    "ddp": {"ACCELERATE_USE_CPU": "true"},
    "zero2": DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"},
    "fsdp2": {
        "ACCELERATE_USE_CPU": "true",
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    },
}


def skip_and_leave(launcher, rank, port, model_dir, folder, arguments):
    """Train with a step whose loss is NaN on the second process; then run the program until process 0 gets SIGTERM."""
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()} | LAUNCHERS[launcher]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCH_EXTENSIONS_DIR": str(folder / "torch_extensions")}
    if launcher == "fsdp2":
        let_fsdp_run_on_cpu()
    trainer = make_trainer_factory(model_dir, make_problems(), folder)(
        callbacks=[states := States()], gradient_accumulation_steps=2, per_device_train_batch_size=2, max_steps=3
    )
    trainer.sampler = ScriptedSampler(trainer, repeat(4))
    if rank == 1:
        spoil(trainer, {1}, "NaN loss")
    trainer.train()
    kind = trainer.accelerator.distributed_type.value
    saved = trainer.state.stateful_callbacks["run_state"]
    torch.save({"states": states.of_steps, "saved": saved, "kind": kind}, folder / f"states_{rank}.pt")
    run_program(arguments, terminate_in_a_step if rank == 0 else None, 1)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("launcher", "kind"),
    [
        ("ddp", "MULTI_CPU"),
        pytest.param("zero2", "DEEPSPEED", marks=pytest.mark.slow),
        pytest.param("zero3", "DEEPSPEED", marks=pytest.mark.slow),
        pytest.param("fsdp2", "FSDP", marks=pytest.mark.slow),
    ],
)
def test_two_processes_skip_and_leave_together(forks, tiny_model_dir, train_file, tmp_path, launcher, kind):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = command_line(tiny_model_dir, train_file, tmp_path / "left", "--save_strategy", "no")
    processes = [
        forks.Process(target=skip_and_leave, args=(launcher, rank, port, tiny_model_dir, tmp_path, arguments))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
        process.kill()  # one that waits for the other for ever
        process.join()
    assert [process.exitcode for process in processes] == [128 + signal.SIGTERM] * 2
    ranks = [torch.load(tmp_path / f"states_{rank}.pt") for rank in range(2)]
    for rank in ranks:
        assert rank["kind"] == kind
        assert rank["saved"]["num_nonfinite_steps"] == 1
        assert_skipped(rank["states"], {1})
    kept = [torch.load(tmp_path / "run" / "nonfinite" / f"step_00002_process_{rank}.pt") for rank in range(2)]
    assert [list(batch["losses"]) for batch in kept] == [[], [0]]

    (left,) = (tmp_path / "left").glob("checkpoint-*")
    assert left.name == "checkpoint-2" and find_fault(left) is None
    assert {path.name for path in left.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    adapter = load_file(left / "adapter_model.safetensors")
    assert adapter and all(weight.numel() > 0 for weight in adapter.values())


# A full disk


class Quota(TrainerCallback):
    """After a step no file can grow beyond `limit` bytes: the operating system fails the write, as on a full disk."""

    def __init__(self, step, limit):
        self.step, self.limit = step, limit

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))


@pytest.fixture
def without_quota():
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.pt"])
def test_full_disk_leaves_earlier_checkpoints_intact(make_trainer, tmp_path, without_quota, file):
    run = tmp_path / "run"
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 3}
    trainer = make_trainer(max_steps=1, **{name: settings[name] for name in ("save_strategy", "save_steps")})
    trainer.train()
    trainer.save_model()
    size = (run / "checkpoint-1" / file).stat().st_size
    good = load_file(run / "adapter_model.safetensors")

    trainer = make_trainer(callbacks=[Quota(2, size - 1)], **settings)
    message = (
        rf"checkpoint-2 could not be written: (.|\n)* MiB free. The last complete checkpoint is {run}/checkpoint-1\."
    )
    with pytest.raises(RuntimeError, match=message):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert not (run / "checkpoint-2" / "trainer_state.json").exists()
    if file == "adapter_model.safetensors":
        with pytest.raises(RuntimeError, match=f"{run} could not be written"):
            trainer.save_model()
    without_quota()
    assert_close(load_file(run / "adapter_model.safetensors"), good, rtol=0.0, atol=0.0)

    make_trainer(**settings).train(resume_from_checkpoint=str(find_last_complete(run)))
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-3"]
    assert find_fault(run / "checkpoint-3") is None


# Numbers that are not finite


class States(TrainerCallback):
    """Keeps the logs, and weights and moments before the first step and after each one."""

    def __init__(self):
        self.of_steps, self.logs = [], []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(logs)

    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        self.on_step_end(args, state, control, model, optimizer)

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        # ZeRO-3 leaves an empty weight and keeps this process's shard beside it.
        tensors = [getattr(weight, "ds_tensor", weight) for weight in model.parameters() if weight.requires_grad]
        tensors += [state["exp_avg"] for state in optimizer.state.values() if "exp_avg" in state]
        tensors = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
        self.of_steps.append([tensor.detach().clone() for tensor in tensors])


def spoil(trainer, steps, kind):
    """Make the loss or its gradient not finite in the first micro-batch of the steps after `steps`."""
    token_losses = trainer.token_losses

    def spoiled(*args):
        losses = token_losses(*args)
        per_token = losses.loss
        if trainer.state.global_step in steps and trainer._step % 2 == 1:
            if kind == "NaN gradient":
                per_token.register_hook(lambda gradient: gradient * float("nan"))
            else:
                per_token = per_token + float("inf" if kind == "infinite loss" else "nan")
        return losses._replace(loss=per_token)

    trainer.token_losses = spoiled


def assert_skipped(states, steps):
    for step, (before, after) in enumerate(zip(states, states[1:], strict=False)):
        is_same = len(before) == len(after) and all(map(torch.equal, before, after))
        assert is_same == (step in steps), step


@pytest.mark.parametrize("kind", ["NaN loss", "infinite loss", "NaN gradient"])
def test_step_that_is_not_finite_is_skipped_and_its_batch_kept(make_trainer, tmp_path, kind):
    states = States()
    trainer = make_trainer(callbacks=[states], gradient_accumulation_steps=2, max_steps=4, weight_decay=0.1)
    trainer.max_nonfinite_steps = 2
    trainer.sampler = ScriptedSampler(trainer, repeat(4))
    spoil(trainer, {0, 2}, kind)
    trainer.train()
    assert_skipped(states.of_steps, {0, 2})
    assert [logs["num_nonfinite_steps"] for logs in states.logs if "loss" in logs] == [1, 1, 2, 2]
    assert all(map(torch.isfinite, torch.tensor([logs["loss"] for logs in states.logs if "loss" in logs])))
    files = sorted((tmp_path / "run" / "nonfinite").iterdir())
    assert [file.name for file in files] == ["step_00001_process_0.pt", "step_00003_process_0.pt"]
    kept = torch.load(files[1])
    assert kept["step"] == 3 and len(kept["inputs"]) == 2
    decode = trainer.processing_class.batch_decode
    prompts = [prompt for batch in kept["inputs"] for prompt in decode(batch["prompt_ids"])]
    for prompt, rollout in zip(prompts, saved_rollouts(tmp_path / "run", 3), strict=True):
        assert prompt.endswith(rollout["prompt"][-40:])
    if kind == "NaN gradient":
        assert kept["losses"] == {}
    else:
        (losses,) = kept["losses"].values()
        assert losses.shape == (kept["inputs"][0]["completion_mask"].sum(),) and not losses.isfinite().any()


def test_run_without_finite_steps_ends(make_trainer):
    states = States()
    trainer = make_trainer(callbacks=[states], max_steps=9, gradient_accumulation_steps=2)
    trainer.sampler = ScriptedSampler(trainer, repeat(4))
    spoil(trainer, {1, 2, 4, 5, 6}, "NaN loss")
    with pytest.raises(FloatingPointError, match="not finite in 3 steps in a row, up to step 7; their batches are in"):
        trainer.train()
    assert_skipped(states.of_steps, {1, 2, 4, 5})


BASELINES = {
    "sft": (sft_train, opsd.sft, "CompleteSFTTrainer", SFTTrainer, {}),
    "grpo": (
        grpo_train,
        opsd.grpo,
        "OnPolicyGRPOTrainer",
        GRPOTrainer,
        {"num_generations": 2, "max_completion_length": 4},
    ),
}


@pytest.fixture(params=BASELINES)
def run_baseline(request, tiny_model_dir, train_file, tmp_path, monkeypatch):
    """
    Return a function that runs SFT or GRPO with an infinite loss in the given steps; further arguments are flags.

    Weight decay changes the weights in each step, also in one in which all completions earn the same reward.
    """
    program, module, name, trl_trainer, settings = BASELINES[request.param]
    settings = CPU | ADAPTER | settings | {"model_name_or_path": tiny_model_dir, "dataset_name": train_file}
    settings |= {"output_dir": tmp_path, "max_steps": 4, "save_steps": 2, "weight_decay": 0.1}
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    states, compute_loss = States(), trl_trainer.compute_loss
    monkeypatch.setattr(module, name, partial(getattr(module, name), callbacks=[states]))

    def run(steps, **further):
        def infinite_loss(self, *args, **kwargs):  # whose gradient is finite
            return compute_loss(self, *args, **kwargs) + (math.inf if self.state.global_step in steps else 0.0)

        monkeypatch.setattr(trl_trainer, "compute_loss", infinite_loss)
        flags = settings | further
        program.main([text for flag, value in flags.items() for text in (f"--{flag}", str(value))])

    return run, states


def test_baselines_skip_steps_that_are_not_finite(run_baseline, tmp_path):
    run, states = run_baseline
    run({1})
    assert_skipped(states.of_steps, {1})
    assert [logs["num_nonfinite_steps"] for logs in states.logs if "loss" in logs] == [0, 1, 1, 1]
    (file,) = (tmp_path / "nonfinite").iterdir()
    kept = torch.load(file)
    assert file.name == "step_00002_process_0.pt" and kept["step"] == 2
    names = {"input_ids", "completion_ids"}  # of SFT, of GRPO
    assert [len(inputs[name]) for inputs in kept["inputs"] for name in names & inputs.keys()] == [2, 2]
    assert kept["losses"] == {0: math.inf, 1: math.inf}

    run({2}, resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert [logs["num_nonfinite_steps"] for logs in states.logs if "loss" in logs][4:] == [2, 2]


def test_baselines_without_finite_steps_end(run_baseline):
    run, states = run_baseline
    with pytest.raises(FloatingPointError, match="not finite in 2 steps in a row, up to step 3; their batches are in"):
        run({1, 2, 3}, max_nonfinite_steps=2)
    assert_skipped(states.of_steps, {1})


# A vLLM engine that dies


@pytest.mark.vllm
def test_engine_that_dies_leaves_the_checkpoints(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(use_vllm=True, save_strategy="steps", save_steps=1, max_steps=3)
    runner = trainer.sampler.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    execute_model = runner.execute_model

    def dying(scheduled, *args, **kwargs):
        if trainer.state.global_step == 1 and not scheduled.scheduled_new_reqs:  # in the middle of the completions
            raise RuntimeError("the GPU has fallen off the bus")
        return execute_model(scheduled, *args, **kwargs)

    monkeypatch.setattr(runner, "execute_model", dying)
    with pytest.raises(Exception) as error:
        trainer.train()
    causes, cause = [], error.value
    while cause is not None:
        causes.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    assert any("fallen off the bus" in cause for cause in causes)
    assert "vLLM failed while it sampled rollouts. Checkpoints are not touched" in "\n".join(error.value.__notes__)
    assert find_last_complete(tmp_path / "run") == tmp_path / "run" / "checkpoint-1"
    trainer.sampler.close()


# Without tokens


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_implementation": "dense"},
        {"use_tinker_loss": True},
        {"top_k_loss": 5, "jsd_clip_mode": "token", "jsd_token_clip": 0.5},
        {"loss_implementation": "dense", "use_tinker_loss": True, "top_k_loss": 5},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())) or "fused",
)
def test_completions_without_tokens_or_without_end(make_trainer, problems, settings):
    lengths = [
        *(3, 0, 6, 2), *(0, 0, 0, 0),  # step 1: a micro-batch without a token
        *(0, 0, 0, 0), *(4, 4, 4, 4),  # the evaluation after it, likewise
        *(0, 0, 0, 0), *(0, 0, 0, 0),  # step 2: nothing at all
        *(0, 0, 0, 0), *(0, 0, 0, 0),
        *(6, 6, 6, 6), *(6, 6, 6, 6),  # step 3: all of them truncated
        *(6, 6, 6, 6), *(6, 6, 6, 6),
    ]  # fmt: skip
    states = States()
    trainer = make_trainer(
        callbacks=[states], eval_dataset=problems.select(range(8)), eval_strategy="steps", eval_steps=1,
        per_device_eval_batch_size=4, max_completion_length=6, gradient_accumulation_steps=2, max_steps=3, **settings,
    )  # fmt: skip
    trainer.sampler = ScriptedSampler(trainer, lengths)
    trainer.train()
    train = [logs for logs in states.logs if "loss" in logs]
    evaluation = [logs for logs in states.logs if "eval_loss" in logs]
    for logs in train + evaluation:
        assert all(map(torch.isfinite, torch.tensor([value for value in logs.values() if isinstance(value, float)])))
    for prefix, logs, means, truncated in (
        ("", train, [11 / 8, 0.0, 6.0], [1 / 8, 0.0, 1.0]),
        ("eval_", evaluation, [2.0, 0.0, 6.0], [0.0, 0.0, 1.0]),
    ):
        assert [entry[f"{prefix}completions/mean_length"] for entry in logs] == means
        assert [entry[f"{prefix}completions/clipped_ratio"] for entry in logs] == truncated
        assert [entry.get(f"{prefix}divergence", 0.0) > 0.0 for entry in logs] == [True, False, True]
        assert f"{prefix}divergence" not in logs[1]  # a mean of nothing
    assert [logs["num_generated_tokens"] for logs in train] == [11, 11, 59]
    assert [logs["grad_norm"] > 0.0 for logs in train] == [True, False, True]
    assert [logs["num_nonfinite_steps"] for logs in train] == [0, 0, 0]
