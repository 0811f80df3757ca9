"""Sampling with vLLM: one engine for a model and its LoRA adapters, or one in each of several processes."""

import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from eval.benchmarks import Question
from opsd.adapters import Adapter
from opsd.vllm_engine import engine_options, lora_options, stop_engine

if TYPE_CHECKING:  # vLLM reads its environment when it is imported: see start_engine
    from vllm import LLM
    from vllm.lora.request import LoRARequest

logger = logging.getLogger(__name__)

ADAPTER_IDS = itertools.count(1)  # vLLM caches adapters by id: a new one for each use, as files may have changed


def flag(default: int | float | bool, text: str) -> Any:
    """A dataclass field that is a flag of the command line, with its default and help."""
    return field(default=default, metadata={"help": f"{text} (default: %(default)s)"})


@dataclass(frozen=True)
class Sampling:
    """How to sample; the fields are flags of the command line. Raises `ValueError` for a value outside its range."""

    val_n: int = flag(4, "samples per problem, the k of Avg@k")
    temperature: float = flag(1.0, "of these samples")
    top_p: float = flag(1.0, "1: off")
    top_k: int = flag(0, "0 or -1: off")
    min_p: float = flag(0.0, "0: off")
    presence_penalty: float = flag(0.0, "0: off")
    max_new_tokens: int = flag(38912, "length limit of a response")
    greedy: bool = flag(False, "also one response per problem at temperature 0")
    seed: int = flag(0, "from which the seed of each sample derives")

    def __post_init__(self):
        for name, valid, allowed in (
            ("val_n", self.val_n >= 1, "at least 1 sample per problem"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1 (off)"),
            ("top_k", self.top_k >= -1, "at least 1, or 0 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 (off) and 1"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "between -2 and 2"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1 token"),
        ):
            if not valid:
                raise ValueError(f"--{name} {getattr(self, name)}: must be {allowed}")


@dataclass(frozen=True)
class Request:
    """A response to sample."""

    checkpoint: str | None  # adapter folder; `None` for the base model
    question: Question
    sample: int  # 0 to val_n - 1, or GREEDY
    seed: int | None  # `None` for the greedy one


@dataclass(frozen=True)
class Completion:
    """A sampled response."""

    text: str
    num_tokens: int
    finish_reason: str  # "stop", or "length" where it was truncated
    seconds: float | None = None  # its share of the engine's time, see `WorkTime`


class WorkTime:
    """
    Divides the time of an engine evenly over the requests in work.

    The seconds of all requests add up to those that the engine worked, whatever it works on at once. So the tokens of
    a model over the seconds of its requests are its speed, also where it shares the engine with another one.

    Args:
        at_once: requests that the engine works on; further ones wait in their order.
    """

    def __init__(self, at_once: int):
        self._at_once = at_once
        self._seconds: dict[str, float] = {}  # of the requests that are not finished, in their order

    def add(self, request: str) -> None:
        self._seconds[request] = 0.0

    def spend(self, seconds: float) -> None:
        in_work = list(itertools.islice(self._seconds, self._at_once))
        for request in in_work:
            self._seconds[request] += seconds / len(in_work)

    def finish(self, request: str) -> float:
        """Take a request out; returns its seconds."""
        return self._seconds.pop(request)


GREEDY = -1  # the sample number of a problem's response at temperature 0


def sample_seed(base_seed: int, benchmark: str, problem: str, sample: int) -> int:
    """Seed of a sample, from what identifies it alone: neither order, batch nor model changes it. 63 bits."""
    digest = hashlib.sha256(json.dumps([base_seed, benchmark, problem, sample]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def sampling_requests(checkpoint: str | None, questions: Iterable[Question], sampling: Sampling) -> list[Request]:
    """The requests for all samples of a model, problem after problem."""
    requests = []
    for question in questions:
        for sample in range(sampling.val_n):
            seed = sample_seed(sampling.seed, question.benchmark, question.problem, sample)
            requests.append(Request(checkpoint, question, sample, seed))
        if sampling.greedy:
            requests.append(Request(checkpoint, question, GREEDY, None))
    return requests


def start_engine(
    base_model: str,
    *,
    lora_rank: int = 0,
    lora_modules: Sequence[str] | None = None,
    max_model_len: int | None = None,
    gpu_memory_utilization: float | None = None,
    tensor_parallel_size: int = 1,
    enforce_eager: bool = False,
    dtype: str | None = None,
    revision: str | None = None,
) -> "LLM":
    """
    Start the vLLM engine that serves `base_model` and, if there are any, its LoRA adapters.

    Args:
        lora_rank: the largest rank of the adapters that it shall serve; 0 for the base model alone.
        lora_modules: of the adapters, see `lora_options`.
        max_model_len: tokens of prompt and response together; `None` for the model's own limit.
        gpu_memory_utilization: share of the memory; `None` for 0.9 on a GPU and 0.1 on a CPU.
        enforce_eager: without CUDA graphs.
        dtype: of the weights; `None` for that of the model, and on a CPU float32. Logits are float32.
        revision: commit, tag or branch of a model on the Hub.
    """
    options = engine_options(gpu_memory_utilization)
    options["enforce_eager"] = options.get("enforce_eager", False) or enforce_eager
    if dtype is not None:
        options["dtype"] = dtype
    options |= {"revision": revision, "tokenizer_revision": revision}
    if lora_rank > 0:
        # Two at a time: the next adapter starts while the last long responses of the one before go on.
        options |= lora_options(lora_rank, lora_modules, max_loras=2)
    from vllm import LLM  # only now: it reads the environment

    return LLM(base_model, max_model_len=max_model_len, tensor_parallel_size=tensor_parallel_size, **options)


def generate(
    engine: "LLM", requests: Sequence[Request], sampling: Sampling
) -> Iterator[list[tuple[Request, Completion]]]:
    """
    Sample the responses, batched by the engine, each handed out as soon as it is finished.

    Args:
        engine: from `start_engine`.
        requests: are started in this order.

    Yields:
        After each step of the engine the responses that it finished, mostly none.

    Raises:
        ValueError: if a checkpoint holds no usable adapter, before anything is sampled.
    """
    from vllm.lora.request import LoRARequest

    adapters: dict[str | None, LoRARequest | None] = {None: None}
    with TemporaryDirectory(prefix="opsd-adapters-") as plain:
        for checkpoint in sorted({request.checkpoint for request in requests if request.checkpoint is not None}):
            adapter = Adapter.read(checkpoint, "checkpoint_dir")
            number = next(ADAPTER_IDS)
            # The prefix cache goes by name and path.
            folder = adapter.make_plain(Path(plain, str(number)))
            adapters[checkpoint] = LoRARequest(f"{checkpoint}#{number}", number, folder)
            _check_effect(engine, adapters[checkpoint], requests[0].question.prompt_ids)
        yield from _run(engine, requests, sampling, adapters)


def _check_effect(engine: "LLM", adapter: "LoRARequest", prompt_ids: list[int]) -> None:
    """Warn if the adapter, in this engine, leaves the log-probabilities of up to 32 tokens as the base has them."""
    from vllm import SamplingParams

    def logprobs(lora_request: "LoRARequest | None") -> list[float]:
        (output,) = engine.generate(
            [{"prompt_token_ids": prompt_ids[:32]}],
            SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, logprobs=0),
            lora_request=lora_request,
            use_tqdm=False,
        )
        places = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]  # token id -> its log-probability
        return [entry.logprob for place in places for entry in place.values()]

    if logprobs(None) == logprobs(adapter):
        logger.warning(
            "%s: in this engine its log-probabilities are those of the base model, and so its scores will be: the "
            "adapter is zero, or too small for the engine's precision",
            adapter.lora_name,
        )


def _run(
    engine: "LLM",
    requests: Sequence[Request],
    sampling: Sampling,
    adapters: Mapping[str | None, "LoRARequest | None"],
) -> Iterator[list[tuple[Request, Completion]]]:
    """The requests of `generate`, each with its adapter."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    common = {
        "max_tokens": sampling.max_new_tokens,
        "presence_penalty": sampling.presence_penalty,
        "skip_special_tokens": False,  # </think> may be one
        "output_kind": RequestOutputKind.FINAL_ONLY,
    }
    drawn = {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    core = engine.llm_engine
    # Enough that the scheduler never lacks a request, not so many that the first step waits for all prompts.
    at_once = core.vllm_config.scheduler_config.max_num_seqs
    queue_size = 2 * at_once
    work_time = WorkTime(at_once)
    # vLLM 0.31's LoRA operations on CPU take index -1, which is no adapter, for the last one: there, a base request in
    # one batch with an adapter's would get that adapter, so that the two kinds wait for each other.
    on_cpu = torch.cuda.device_count() == 0
    for _, waiting in itertools.groupby(enumerate(requests), lambda item: on_cpu and item[1].checkpoint is None):
        while True:
            for number, request in itertools.islice(waiting, queue_size - core.get_num_unfinished_requests()):
                if request.sample == GREEDY:
                    parameters = SamplingParams(temperature=0.0, **common)
                else:
                    parameters = SamplingParams(seed=request.seed, **drawn, **common)
                prompt = {"prompt_token_ids": request.question.prompt_ids}
                core.add_request(str(number), prompt, parameters, lora_request=adapters[request.checkpoint])
                work_time.add(str(number))
            if not core.has_unfinished_requests():
                break
            start = time.perf_counter()
            outputs = core.step()
            work_time.spend(time.perf_counter() - start)
            finished = []
            for output in outputs:
                response, seconds = output.outputs[0], work_time.finish(output.request_id)
                completion = Completion(response.text, len(response.token_ids), response.finish_reason, seconds)
                finished.append((requests[int(output.request_id)], completion))
            yield finished


def generate_in_parallel(
    processes: int, base_model: str, options: Mapping[str, Any], requests: Sequence[Request], sampling: Sampling
) -> Iterator[list[tuple[Request, Completion]]]:
    """
    The same as `generate`, by one engine in each of several processes, which share the requests evenly.

    Where there are GPUs, each process gets as many of the visible ones as `tensor_parallel_size` says.

    Args:
        options: for `start_engine`.

    Raises:
        RuntimeError: if one of the processes fails.
    """
    devices = visible_devices()
    share = options["tensor_parallel_size"]
    context = multiprocessing.get_context("spawn")  # CUDA and vLLM do not survive a fork
    workers = {}
    try:
        for rank in range(processes):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (sender, devices[rank * share : (rank + 1) * share], base_model, options)
            worker = context.Process(target=_serve, args=(*arguments, requests[rank::processes], sampling))
            worker.start()
            sender.close()  # so that the worker's end is the only one, and its death is seen here
            workers[receiver] = worker
        running = set(workers)
        while running:
            ready = wait(running, timeout=0.1)
            if not ready:
                yield []  # the caller's chance to do something else
            for receiver in ready:
                try:
                    yield receiver.recv()
                except EOFError:
                    running.remove(receiver)
                    workers[receiver].join()
                    if workers[receiver].exitcode != 0:
                        raise RuntimeError(
                            f"an engine process ended with exit code {workers[receiver].exitcode}, see its message "
                            "above; what is finished is kept, the same command goes on from there"
                        ) from None
    finally:
        for worker in workers.values():
            worker.terminate()
            worker.join()


def visible_devices() -> list[str]:
    """The GPUs of this process as CUDA_VISIBLE_DEVICES names them; empty where there are none."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(device) for device in range(count)]


def _serve(
    sender: Connection,
    devices: Sequence[str],
    base_model: str,
    options: Mapping[str, Any],
    requests: Sequence[Request],
    sampling: Sampling,
) -> None:
    """A process of `generate_in_parallel`: start an engine and send what it finishes."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    with closing(sender):
        engine = start_engine(base_model, **options)
        for finished in generate(engine, requests, sampling):
            if finished:
                sender.send(finished)
        stop_engine(engine)


def _exit_with_parent() -> None:
    """Also where the parent was killed: the GPU must be free for the run that takes its place."""
    multiprocessing.parent_process().join()
    os._exit(1)
