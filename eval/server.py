"""Sampling from a running OpenAI-compatible server, in place of an engine of this process."""

import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

from openai import OpenAI, OpenAIError

from eval.engine import GREEDY, Completion, Request, Sampling, WorkTime

IN_FLIGHT = 64  # requests at once; the server queues those that it cannot take yet


@dataclass(frozen=True)
class Server:
    """
    A server and its models, as it names them.

    Attributes:
        client: of the server.
        names: checkpoint (`None`: the base model) -> the server's name of it.
        roots: the same -> what the server says that it loaded: a folder or a Hub id; its name where it does not say.
    """

    client: OpenAI
    names: Mapping[str | None, str]
    roots: Mapping[str | None, str]

    @property
    def url(self) -> str:
        return str(self.client.base_url)


def connect(url: str, checkpoints: Sequence[str]) -> Server:
    """
    Ask a server for its models.

    Args:
        url: with the path that the API has there, mostly `/v1`. The key, if it wants one, is in OPENAI_API_KEY.
        checkpoints: adapters, by the server's name or by the folder that it loaded. Nothing is uploaded.

    Raises:
        ValueError: if no server answers, it has several base models, or not all of these adapters.
    """
    client = OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY") or "none", timeout=None, max_retries=5)
    try:
        listed = list(client.with_options(timeout=10, max_retries=1).models.list())
    except OpenAIError as error:
        raise ValueError(
            f"--base_url {url}: no OpenAI-compatible server answers there ({error}); start one, such as `vllm serve "
            "MODEL`, and give its address with /v1"
        ) from error
    roots = {model.id: str((model.model_extra or {}).get("root") or model.id) for model in listed}
    bases = [model.id for model in listed if not (model.model_extra or {}).get("parent")]
    if len({roots[name] for name in bases}) != 1:  # several names of one model are one
        raise ValueError(
            f"--base_url {url}: the server has {len(bases)} base models ({', '.join(bases)}), of which --base_model "
            "could be any; give the address of a server with one"
        )
    names: dict[str | None, str] = {None: bases[0]}
    for checkpoint in checkpoints:
        folder = Path(checkpoint).absolute()
        found = [name for name in roots.keys() - set(bases) if name == checkpoint or Path(roots[name]) == folder]
        if not found:
            adapters = ", ".join(sorted(roots.keys() - set(bases))) or "none"
            raise ValueError(
                f"--checkpoint_dir {checkpoint}: the server at --base_url {url} has no such adapter; it has "
                f"{adapters}. Start it with `--lora-modules NAME={checkpoint}`, and give the name or the folder"
            )
        names[checkpoint] = found[0]
    return Server(client, names, {checkpoint: roots[name] for checkpoint, name in names.items()})


def generate_from(
    server: Server, requests: Sequence[Request], sampling: Sampling
) -> Iterator[list[tuple[Request, Completion]]]:
    """
    Sample the responses as `eval.engine.generate` does, from a server.

    One model is sampled after the other: vLLM's LoRA operations on a CPU do not keep base and adapters apart in a
    batch.

    Raises:
        RuntimeError: if the server fails, or cuts a response before the length limit.
    """
    with ThreadPoolExecutor(IN_FLIGHT) as threads:
        for _, group in itertools.groupby(requests, key=lambda request: request.checkpoint):
            waiting: dict[Future[Completion], tuple[str, Request]] = {}
            work_time, last = WorkTime(IN_FLIGHT), time.perf_counter()
            for number, request in enumerate(group):
                waiting[threads.submit(_ask, server, request, sampling)] = str(number), request
                work_time.add(str(number))
            try:
                while waiting:
                    done, _ = wait(waiting, timeout=0.1, return_when=FIRST_COMPLETED)
                    now = time.perf_counter()
                    work_time.spend(now - last)
                    last, finished = now, []
                    for future in done:
                        number, request = waiting.pop(future)
                        completion = future.result()
                        seconds = work_time.finish(number)
                        finished.append((request, replace(completion, seconds=seconds)))
                    yield finished
            finally:
                for future in waiting:
                    future.cancel()


def _ask(server: Server, request: Request, sampling: Sampling) -> Completion:
    """Ask for a response. All settings are given: the server would take others from the model's generation_config."""
    is_greedy = request.sample == GREEDY
    try:
        response = server.client.completions.create(
            model=server.names[request.checkpoint],
            prompt=request.question.prompt_ids,
            max_tokens=sampling.max_new_tokens,
            presence_penalty=sampling.presence_penalty,
            temperature=0.0 if is_greedy else sampling.temperature,
            top_p=1.0 if is_greedy else sampling.top_p,
            **({} if request.seed is None else {"seed": request.seed}),
            extra_body={
                "top_k": 0 if is_greedy else sampling.top_k,
                "min_p": 0.0 if is_greedy else sampling.min_p,
                "repetition_penalty": 1.0,
                "skip_special_tokens": False,  # </think> may be one
            },
        )
    except OpenAIError as error:
        raise RuntimeError(
            f"--base_url {server.url}: {error}\nWhat is finished is kept, the same command goes on from there"
        ) from error
    (choice,), usage = response.choices, response.usage
    if usage is None:
        raise RuntimeError(f"--base_url {server.url}: the server does not count tokens (`usage`); use another one")
    if choice.finish_reason == "length" and usage.completion_tokens < sampling.max_new_tokens:
        raise RuntimeError(
            f"--base_url {server.url}: the server cut a response after {usage.completion_tokens} of --max_new_tokens "
            f"{sampling.max_new_tokens}; start it with a longer --max-model-len, or ask for fewer"
        )
    return Completion(choice.text, usage.completion_tokens, choice.finish_reason)
