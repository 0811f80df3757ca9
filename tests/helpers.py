"""Helpers of the tests and their workers: the tiny model, problems, settings, a trainer, and given rollouts."""

import json
import os
import random
import re
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, TrainerCallback

from data_collator import MicroBatch, start_rollouts
from opsd_trainer import OPSDConfig, OPSDTrainer
from quickstart import addition

ROOT = Path(__file__).resolve().parents[1]
# The fixed model; `scripts/test_portability.sh` puts others, built from other seeds, in its place.
TINY_MODEL = Path(os.environ.get("TINY_MODEL", ROOT / "tests" / "tiny_model")).resolve()
SEED = int(os.environ.get("TEST_SEED", "42"))  # of rollouts and adapters; no test may depend on it

# Nats, between a sampler's log-probability of a token and that of the training forward. Against float64, those of the
# tiny model in float32 are off by 5e-6 to 2e-5 at most and by 6e-7 on average; with stale weights by more than 0.1.
LOGPROB_GAP, MEAN_LOGPROB_GAP = 1e-4, 1e-5

TOP_K = 20  # log-probabilities that a teacher on a server tells of a token

# Settings of runs on the tiny model, under the names of the flags

# Any program, float32 on CPU
CPU = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "disable_tqdm": True,
    "report_to": "none",
    "seed": SEED,
}
ADAPTER = {
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "lora_target_modules": "all-linear",
}
# OPSD: JSD against a teacher without thinking mode, on rollouts from the student's own distribution
OPSD = {
    "max_completion_length": 40,
    "max_length": 1000,
    "beta": 0.5,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "jsd_token_clip": 0.0,
    "max_grad_norm": 1.0,
    "teacher_thinking": False,
}
# A teacher that is an average of the student
EMA = {"fixed_teacher": False, "use_ema_teacher": True, "ema_decay": 0.7, "learning_rate": 1e-2}


def make_problems() -> Dataset:
    """64 additions with `problem`, `solution` and `answer`."""
    return Dataset.from_list(addition.training_problems(seed=0, size=64))


def make_trainer_factory(model_dir: Path, problems: Dataset, folder: Path) -> Callable[..., OPSDTrainer]:
    """A function that builds an `OPSDTrainer`; keyword arguments replace the settings above and those below."""

    def make(
        dataset=problems, model=None, lora=True, lora_settings=None, callbacks=None, eval_dataset=None, **settings
    ):
        defaults = (
            CPU
            | OPSD
            | {
                "output_dir": str(folder / "run"),
                "per_device_train_batch_size": 4,
                "max_steps": 2,
                "save_strategy": "no",
                "fixed_teacher": lora,
            }
        )
        adapter = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | (
            lora_settings or {}
        )
        return OPSDTrainer(
            model=model or str(model_dir),
            args=OPSDConfig(**(defaults | settings)),
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            processing_class=AutoTokenizer.from_pretrained(model_dir),
            peft_config=LoraConfig(**adapter) if lora and model is None else None,
            callbacks=callbacks,
        )

    return make


def save_model(folder: Path, tiny_model_dir: Path, tokenizer=None, **changes) -> str:
    """Save a random model, wider and less deep than the tiny one, with its tokenizer or another one."""
    config = Qwen3Config.from_pretrained(tiny_model_dir)
    settings = {"hidden_size": 160, "num_hidden_layers": 2, "intermediate_size": 192, "layer_types": None}
    settings |= {"tie_word_embeddings": False, "initializer_range": 0.1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(Qwen3Config(**config.to_dict() | settings | changes))
    model.save_pretrained(folder)
    (tokenizer or AutoTokenizer.from_pretrained(tiny_model_dir)).save_pretrained(folder)
    return str(folder)


class Recorder(TrainerCallback):
    """Keeps what was logged."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(logs)

    def values(self, name):
        return [logs[name] for logs in self.logs if name in logs]


# Rollouts


def saved_rollouts(run: Path, step: int | None = None) -> list[dict[str, Any]]:
    """The rollouts that a run has saved, of one step or of all."""
    records = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    return [record for record in records if step in (None, record["step"])]


def work_out(problem: str, is_right: bool = True) -> str:
    """A response to `a+b` in the model's own style, with its end of turn; if wrong, 1 too much in the hundreds."""
    a, b = map(int, problem.split("+"))
    totals = addition.column_totals(a, b)
    totals[2] += not is_right
    return addition.response_text(a, b, totals) + "<|im_end|>"


def is_right(trainer: OPSDTrainer, batch: MicroBatch) -> torch.Tensor:
    """Return whether the last box of each completion has the sum that its prompt asks for, (B,), bool."""
    prompts = trainer.processing_class.batch_decode(batch.prompt_ids)
    problems = [re.search(r"Problem: (\d+)\+(\d+)\n", prompt).groups() for prompt in prompts]
    texts = trainer.processing_class.batch_decode(batch.completion_ids)
    boxes = [re.findall(r"\\boxed\{(\d+)\}", text)[-1:] for text in texts]
    return torch.tensor([box == [str(sum(map(int, problem)))] for problem, box in zip(problems, boxes, strict=True)])


def script_rollouts(trainer: OPSDTrainer, write: Callable[[str, int], str] = lambda problem, _: work_out(problem)):
    """
    Let transformers' `generate` give texts that do not depend on the model.

    `write(problem, occurrence)` returns the completion, where `occurrence` counts from 0 how often the problem came
    before in this optimizer step. So it is the same in any batch and on any number of processes. A text without an
    end of turn has to go beyond the limit, as transformers stops nowhere else.
    """
    tokenizer, occurrences = trainer.processing_class, Counter()

    def generate(input_ids, attention_mask, generation_config, **kwargs):
        completions = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            problem = re.search(r"Problem: (.*)\n", tokenizer.decode(ids[mask.bool()]))[1]
            text = write(problem, occurrences[trainer.state.global_step, problem])
            occurrences[trainer.state.global_step, problem] += 1
            written = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
            completions.append(written[: generation_config.max_new_tokens])
            assert text.endswith("<|im_end|>") or len(written) >= generation_config.max_new_tokens, text
        padded = torch.nn.utils.rnn.pad_sequence(
            completions, batch_first=True, padding_value=generation_config.pad_token_id
        )
        return torch.cat([input_ids, padded], dim=1)

    trainer.model.generate = generate


def rollout(trainer, size=4, steps=1):
    """Make the micro-batches of one optimizer step, sampled by the student."""
    trainer.model.train()
    return trainer.prepare_step(start_rollouts([trainer.train_dataset[i] for i in range(size)]), steps)


def perturb_student(trainer):
    """Move the adapter, which is zero at the start, so that the student is not the teacher."""
    generator = torch.Generator().manual_seed(SEED)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)


def teacher_logits(trainer, inputs):
    with trainer.teacher.active(trainer.model):
        return trainer.completion_logits(trainer.model, inputs, "teacher")


def copies(trainer):
    """The weights that the teacher has of its own, by name."""
    teacher = trainer.teacher.weights
    return dict(zip(teacher._names, teacher._copies, strict=True))


def gradient_of_one_step(make_trainer, accumulation, prompts_per_process=8, **settings):
    """Gradient, loss and token count of the first optimizer step, always on the same 8 rollouts, which are given."""
    gradients = []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]).clone())

    trainer = make_trainer(
        per_device_train_batch_size=prompts_per_process // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        max_grad_norm=1e9,
        lora_settings={"init_lora_weights": False},
        callbacks=[Keep(), recorder := Recorder()],
        **settings,
    )
    script_rollouts(trainer)
    trainer.train()
    return gradients[0], recorder.values("loss")[0], recorder.values("num_generated_tokens")[0]


# Processes


@contextmanager
def started(command: list, log: Path, **environment: str) -> Iterator[subprocess.Popen]:
    """Run a command with its output in `log`. After the block all processes that it has started are gone."""
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | environment
    environment["ACCELERATE_TORCH_DEVICE"] = "cpu"  # not cpu:0, where torch.load can put nothing
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()
                process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


class JsonHandler(BaseHTTPRequestHandler):
    """Answers with JSON, and says nothing in the terminal."""

    def reply(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Start a server on a port of its own; yields its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class RolloutServer:
    """
    A stand-in for the server of rollouts (`scripts/serve_vllm.sh`) on a port of its own, as a context manager.

    What it samples follows from a request's seed alone. It replies to a sample after `hold(sample)`, where
    `sample["number"]` counts them from 0; a text that `hold` returns is the reason for which it fails.
    """

    def __init__(self, hold: Callable[[dict], str | None] = lambda _: None, logprobs_mode: str = "raw_logprobs"):
        self.samples: list[dict] = []  # what was asked for: "number", "model", "prompt", "seed"
        self.adapters: dict[str, dict[str, torch.Tensor]] = {}  # name -> tensors, of all that were loaded
        self.faults: list[str] = []  # of the one that asks
        stand_in, lock, in_work = self, threading.Lock(), Counter()

        class Handler(JsonHandler):
            def do_GET(self):
                config = {"model_config": {"logprobs_mode": logprobs_mode}}
                self.reply({"data": [{"id": "base"}], "vllm_config": config})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/v1/load_lora_adapter":
                    tensors = load_file(Path(body["lora_path"], "adapter_model.safetensors"))
                    stand_in.adapters[body["lora_name"]] = tensors
                    self.reply({})
                elif self.path == "/v1/unload_lora_adapter":
                    if in_work[body["lora_name"]]:
                        stand_in.faults.append(f"{body['lora_name']} is unloaded while it samples")
                    self.reply({})
                else:
                    self.complete(body)

            def complete(self, body):
                with lock:
                    sample = {"number": len(stand_in.samples), "model": body["model"]}
                    sample |= {"prompt": body["prompt"][0], "seed": body["seed"]}
                    stand_in.samples.append(sample)
                    in_work[body["model"]] += 1
                failure = hold(sample)
                with lock:
                    in_work[body["model"]] -= 1
                if failure is not None:
                    self.reply({"error": failure}, 400)
                    return
                ids = stand_in.completion(body["seed"], body["stop_token_ids"][0])[: body["max_tokens"]]
                logprobs = {"tokens": [f"token_id:{i}" for i in ids], "token_logprobs": [-1.0] * len(ids)}
                choice = {"prompt_token_ids": body["prompt"][0], "token_ids": ids}
                self.reply({"choices": [choice | {"logprobs": logprobs | {"top_logprobs": [None] * len(ids)}}]})

        self.handler = Handler

    @staticmethod
    def completion(seed: int, end_id: int) -> list[int]:
        """Token ids that a seed draws."""
        draw = random.Random(seed)
        return [draw.randrange(20, 200) for _ in range(draw.randrange(3, 9))] + [end_id]

    def __enter__(self) -> "RolloutServer":
        self._serving = serving(self.handler)
        self.url = self._serving.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._serving.__exit__(*error)


@contextmanager
def serving_teacher(path, max_length=1001, max_logprobs=TOP_K, shift=0.0, **of_model):
    """Score as `vllm serve --served-model-name NAME` does; yields its address and what it was asked."""
    model, asked = AutoModelForCausalLM.from_pretrained(path).double(), []

    class Handler(JsonHandler):
        def do_GET(self):
            entry = {"id": "other", "root": path, "max_model_len": max_length} | of_model
            self.reply({"data": [entry]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            if body["prompt_logprobs"] > max_logprobs:
                self.reply({"error": f"prompt_logprobs is greater than max allowed: {max_logprobs}"}, 400)
                return
            choices = [{"prompt_logprobs": self.score(ids, body["prompt_logprobs"])} for ids in body["prompt"]]
            self.reply({"choices": choices})

        @torch.no_grad()
        def score(self, ids, k):
            positions = [None]
            for sampled, logits in zip(ids[1:], model(torch.tensor([ids])).logits[0], strict=False):
                logprobs = logits.log_softmax(-1) + shift
                top = logprobs.topk(k)
                ranked = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
                entries = {
                    str(i): {"logprob": value, "rank": rank} for rank, (i, value) in enumerate(ranked.items(), start=1)
                }
                rank = int((logprobs > logprobs[sampled]).sum()) + 1
                entries[str(sampled)] = {"logprob": logprobs[sampled].item(), "rank": rank}
                positions.append(entries)
            return positions

    with serving(Handler) as address:
        yield address, asked
