"""Rollouts that are asked for one step ahead (`--max_staleness 1`), of a stand-in of the server and of vLLM's own."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import LOGPROB_GAP, Recorder, RolloutServer, free_port, saved_rollouts, started
from test_launchers import launch
from transformers import AutoTokenizer, TrainerCallback

from opsd.rollouts import prompt_keys, sample_seeds
from opsd.run.checkpoints import find_fault
from opsd.stale_rollouts import FILE
from opsd_trainer import OPSDConfig, OPSDTrainer

ROOT = Path(__file__).resolve().parents[1]
NUM_STEPS = 5
SETTINGS = {
    "use_vllm": True,
    "vllm_mode": "server",
    "beta": 0.0,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": NUM_STEPS,  # of four rollouts; twelve rows make an epoch of three steps
}


class Weights(TrainerCallback):
    """Keeps the adapter as it is before each step, and says when the passes of a step are done."""

    def __init__(self):
        self.trainer: OPSDTrainer | None = None
        self.before_steps: list[dict[str, torch.Tensor]] = []
        self.passes_done = [threading.Event() for _ in range(NUM_STEPS)]

    def on_step_begin(self, args, state, control, **kwargs):
        self.before_steps.append(self.trainer.sampler._adapter_tensors("cpu", torch.float32))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.passes_done[state.global_step].set()

    def steps_before(self, tensors: dict[str, torch.Tensor]) -> int | None:
        """Return the number of steps after which the adapter was this one, `None` if it never was."""
        is_same = [all(torch.equal(tensors[n], t) for n, t in before.items()) for before in self.before_steps]
        assert sum(is_same) <= 1
        return is_same.index(True) if any(is_same) else None


@pytest.fixture
def train(make_trainer, problems, tmp_path):
    """A function that trains against a server, and returns the trainer."""

    def train(server: RolloutServer, *callbacks, resume=None, **settings) -> OPSDTrainer:
        defaults = SETTINGS | {"dataset": problems.select(range(12)), "vllm_adapter_dir": str(tmp_path / "adapters")}
        trainer = make_trainer(callbacks=list(callbacks), vllm_server_base_url=server.url, **defaults | settings)
        for callback in callbacks:
            callback.trainer = trainer
        trainer.train(resume_from_checkpoint=resume)
        assert server.faults == []
        return trainer

    return train


def asked(server: RolloutServer, trainer: OPSDTrainer) -> list[dict[tuple, str]]:
    """Return what was asked for each step, in the order in which it was asked: (prompt, seed) -> adapter."""
    prompts = {tuple(prompt) for prompt in trainer.train_dataset["student_prompt_ids"]}
    samples = [sample for sample in server.samples if tuple(sample["prompt"]) in prompts]
    steps = [samples[start : start + 4] for start in range(0, len(samples), 4)]
    return [{(tuple(sample["prompt"]), sample["seed"]): sample["model"] for sample in step} for step in steps]


def sampling_steps(server: RolloutServer, trainer: OPSDTrainer, weights: Weights) -> list[int | None]:
    """Return for each step after how many steps the policy sampled its rollouts."""
    adapters = [set(step.values()) for step in asked(server, trainer)]
    return [weights.steps_before(server.adapters[name]) for (name,) in adapters]


def test_rollouts_come_from_the_weights_of_the_step_before(train, tmp_path):
    """And are those of the on-policy run else, since here they follow from the seeds alone."""
    with RolloutServer() as server:
        trainer = train(server, weights := Weights())
        assert sampling_steps(server, trainer, weights) == [0, 1, 2, 3, 4]
        expected, rollouts = asked(server, trainer), saved_rollouts(tmp_path / "run")
    assert not list((tmp_path / "run").rglob(FILE))

    weights = Weights()

    def hold(sample):
        """Reply to what is asked for ahead after the passes of the step: it fails if the step waits for the reply."""
        step = sample["number"] // 4
        if step > 0 and not weights.passes_done[step - 1].wait(timeout=20):
            return "nothing was trained meanwhile"

    with RolloutServer(hold) as server:
        trainer = train(server, weights, max_staleness=1)
        assert sampling_steps(server, trainer, weights) == [0, 0, 1, 2, 3]
        assert [step.keys() for step in asked(server, trainer)] == [step.keys() for step in expected]
    assert saved_rollouts(tmp_path / "run") == rollouts


@pytest.mark.parametrize("settings", [{}, {"num_generations": 2, "dataloader_num_workers": 1}], ids=str)
def test_evaluations_between_steps(train, problems, tmp_path, settings):
    """They sample from the weights of their step, and the rollouts that wait are the same as without them."""
    settings |= {"max_staleness": 1}
    with RolloutServer() as server:
        expected = asked(server, train(server, **settings))
    rollouts = saved_rollouts(tmp_path / "run")
    settings |= {"eval_dataset": problems.select(range(12, 16)), "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"per_device_eval_batch_size": 4, "save_token_statistics": 2, "token_statistics_steps": 3}
    with RolloutServer(lambda sample: time.sleep(0.05)) as server:
        trainer = train(server, weights := Weights(), **settings)
        held_out = {tuple(prompt) for prompt in trainer.eval_dataset["student_prompt_ids"]}
        evaluated = [sample["model"] for sample in server.samples if tuple(sample["prompt"]) in held_out]
        own_seeds = {key for step in expected for key in step}
        sampled = {key: name for step in asked(server, trainer) for key, name in step.items()}
        for number, step in enumerate(expected):
            assert {weights.steps_before(server.adapters[sampled[key]]) for key in step} == {max(0, number - 1)}
        assert len(sampled.keys() - own_seeds) == 2  # the token statistics', the same each time
    found = [weights.steps_before(server.adapters[name]) for name in evaluated]
    assert found == [step for step in (1, 2, 3, 4, None) for _ in range(4)]  # None: after the last step
    assert saved_rollouts(tmp_path / "run") == rollouts


def test_rationales_come_from_the_teacher(train):
    """An averaged teacher's weights take the student's place on the server for a while."""
    settings = {"reason_first": True, "max_reasoning_length": 20, "use_ema_teacher": True, "fixed_teacher": False}
    with RolloutServer() as server:
        trainer = train(server, weights := Weights(), max_staleness=1, learning_rate=1e-2, ema_decay=0.5, **settings)
        assert sampling_steps(server, trainer, weights) == [0, 0, 1, 2, 3]
        prompts = {tuple(prompt) for prompt in trainer.train_dataset["reasoning_prompt_ids"]}
        models = [sample["model"] for sample in server.samples if tuple(sample["prompt"]) in prompts]
    found = [weights.steps_before(server.adapters[name]) for name in models]
    assert found == 4 * [0] + 16 * [None]  # at first the average is the student


@pytest.mark.parametrize("stop_at", [2, 3], ids=["within an epoch", "between epochs"])
def test_resumed_run_takes_the_rollouts_that_waited(train, tmp_path, stop_at):
    settings = {"max_staleness": 1, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    run, whole, resumed = tmp_path / "run", Recorder(), Recorder()
    with RolloutServer() as server:
        trainer = train(server, whole, **settings)
        expected, rollouts = asked(server, trainer), saved_rollouts(run)
    checkpoint = run / f"checkpoint-{stop_at}"
    assert find_fault(checkpoint) is None
    waiting = json.loads((checkpoint / FILE).read_text())
    assert waiting["step"] == stop_at and len(waiting["prompts"]) == len(waiting["replies"]) == 4
    assert not (run / f"checkpoint-{NUM_STEPS}" / FILE).exists()
    with RolloutServer() as server:
        train(server, resumed, resume=str(checkpoint), **settings)
        assert [step.keys() for step in asked(server, trainer)] == [step.keys() for step in expected[stop_at + 1 :]]
    for name in ("loss", "grad_norm", "divergence", "sampling/sampling_logp_difference/mean"):
        assert resumed.values(name) == pytest.approx(whole.values(name)[stop_at:], rel=1e-6, abs=1e-9), name
    assert saved_rollouts(run) == rollouts


def test_a_server_that_fails_meanwhile(train, tmp_path, caplog):
    """The checkpoint of the step is saved, and the next step says what is wrong."""

    def hold(sample):
        return "out of memory" if sample["number"] >= 8 else None

    settings = {"max_staleness": 1, "save_strategy": "steps", "save_steps": 1}
    with (
        RolloutServer(hold) as server,
        pytest.raises(ConnectionError, match=r"(?s)the vLLM server at http://127.* failed: .*out of memory"),
    ):
        train(server, **settings)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert find_fault(checkpoint) is None and not (checkpoint / FILE).exists()
    assert f"the server failed: {checkpoint} has no rollouts of the next step" in caplog.text
    assert {record["step"] for record in saved_rollouts(tmp_path / "run")} == {1, 2}
    with RolloutServer() as server:
        trainer = train(server, weights := Weights(), resume=str(checkpoint), **settings)
        assert sampling_steps(server, trainer, weights) == [0, 0, 1]  # of its own three steps: on-policy at first


def test_data_in_another_order(train, monkeypatch):
    rows = iter([[0, 1, 2, 3], [0, 0, 0, 0]])
    monkeypatch.setattr("opsd.stale_rollouts.rows_of_step", lambda *_: next(rows))
    with (
        RolloutServer() as server,
        pytest.raises(RuntimeError, match="--max_staleness 1: step 2 has other prompts than were asked for ahead"),
    ):
        train(server, max_staleness=1)


def test_importance_weights_need_the_probabilities_of_the_sampling(train):
    settings = {"max_staleness": 1, "use_tinker_loss": True, "vllm_importance_sampling_correction": True}
    settings |= {"beta": 0.5, "max_steps": 2}
    with RolloutServer(logprobs_mode="processed_logprobs") as server:
        train(server, recorder := Recorder(), **settings)
        assert len(recorder.values("sampling/importance_sampling_ratio/mean")) == 2
    with (
        RolloutServer() as server,
        pytest.raises(
            ValueError, match=r"runs with --logprobs-mode raw_logprobs; .* --logprobs-mode processed_logprob"
        ),
    ):
        train(server, **settings)


CORRECTION = {"vllm_importance_sampling_correction": True}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_staleness": 2}, r"--max_staleness 2: must lie in \[0, 1\]: rollouts are asked for at most one"),
        ({"use_vllm": False}, "--max_staleness 1: must be 0 without --use_vllm and --vllm_mode server"),
        ({"vllm_mode": "colocate"}, "--max_staleness 1: must be 0 without --use_vllm and --vllm_mode server"),
        ({"beta": 0.5}, "--beta 0.5: must be 0 with --max_staleness 1"),
        ({"beta": 1.0} | CORRECTION | {"policy_gradient_weight": 0.1, "num_generations": 2}, "--beta 1.0: must be 0"),
        (
            {"use_tinker_loss": True},
            "--vllm_importance_sampling_correction False: must be true with --max_staleness 1",
        ),
        (
            {"policy_gradient_weight": 0.1, "num_generations": 2},
            "--vllm_importance_sampling_correction False: must be true with --max_staleness 1",
        ),
        ({"curriculum": "divergence"}, "--curriculum divergence: must be none with --max_staleness 1"),
        ({"ignore_data_skip": True}, "--ignore_data_skip True: must be false with --max_staleness 1"),
    ],
)
def test_what_needs_rollouts_of_the_present_policy(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        OPSDConfig(**SETTINGS | {"max_staleness": 1, "bf16": False} | settings)


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ddp", "zero2", "zero3", "fsdp2"])
def test_two_processes(launcher, train, problems, tiny_model_dir, tmp_path):
    """Each gets its own rollouts, which follow from step, prompt and seed. One process goes on with them too."""
    problems.select(range(12)).to_json(data := tmp_path / "train.jsonl")
    with RolloutServer() as server:
        port, log = server.url.rpartition(":")[2], tmp_path / "log"
        extensions = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "torch_extensions")}
        status = launch(launcher, 2, log, tiny_model_dir, data, tmp_path, "stale", port, **extensions)
        assert status == 0, log.read_text()[-5000:]
        assert server.faults == []
    results = json.loads((tmp_path / "results.json").read_text())
    rollouts = saved_rollouts(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    end_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    prompts = {tokenizer.decode(sample["prompt"]): sample["prompt"] for sample in server.samples}
    for record in rollouts:
        seeds = sample_seeds(prompt_keys([prompts[record["prompt"]]], results["seed"], record["step"] - 1))
        assert record["completion"] == tokenizer.decode(RolloutServer.completion(*seeds, end_id))
    assert [record["step"] for record in rollouts] == [step for step in (1, 2, 3, 4) for _ in range(4)]
    assert saved_rollouts(tmp_path / "resumed") == rollouts[8:]
    assert len(server.samples) == 4 * 4 + 4  # of the resumed run: what did not wait in the checkpoint
    losses = [[logs["loss"] for logs in results[run] if "loss" in logs] for run in ("run", "resumed")]
    assert losses[1][2:] == pytest.approx(losses[0][2:], rel=1e-6) and len(losses[1]) == 4
    if launcher != "ddp":  # whose checkpoints go on with as many processes
        return
    with RolloutServer() as server:
        settings = {"max_staleness": 1, "max_steps": 4, "output_dir": str(tmp_path / "alone")}
        train(server, alone := Recorder(), resume=str(tmp_path / "run" / "checkpoint-2"), **settings)
        assert len(server.samples) == 4
    assert alone.values("loss") == pytest.approx(losses[0][2:], rel=1e-5)


@pytest.mark.multiprocess
@pytest.mark.vllm
@pytest.mark.slow
def test_staleness_shows_in_the_log(train, tiny_model_dir, tmp_path):
    """With vLLM's server: the first step is on-policy, later ones differ by a step of the optimizer."""
    port = free_port()
    command = ["bash", ROOT / "scripts" / "serve_vllm.sh", "--host", "127.0.0.1", "--max-model-len", "1000"]
    names = {"MODEL": str(tiny_model_dir), "PORT": str(port), "MAX_LORA_RANK": "16"}
    server = RolloutServer()
    server.url = f"http://127.0.0.1:{port}"
    with started(command, tmp_path / "server.log", **names):
        for staleness in (1, 0):
            train(server, recorder := Recorder(), max_staleness=staleness, learning_rate=1e-2)
            differences = recorder.values("sampling/sampling_logp_difference/max")
            assert len(differences) == NUM_STEPS and differences[0] <= LOGPROB_GAP
            if staleness:
                assert min(differences[1:]) > 10 * LOGPROB_GAP
            else:
                assert max(differences) <= LOGPROB_GAP
