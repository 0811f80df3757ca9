"""
On-policy rollouts: samplers that draw from exactly the policy that is being trained.

TRL's `VLLMGeneration` hands LoRA to vLLM by merging it into the base weights and unmerging it again. In bfloat16 that
moves the base, which is the teacher, and rounds most of a young adapter away (`benchmarks/weight_sync.md`). Here vLLM
loads the base once and serves the adapter natively; a sync hands over the adapter and writes to nothing else.
"""

import copy
import hashlib
import json
import math
import os
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration, extract_logprobs
from trl.models.utils import unwrap_model_for_generation

from opsd.adapters import check_vllm_lora_support
from opsd.config import OPSDConfig
from opsd.vllm_engine import (
    check_lora_dtype,
    engine_options,
    keep_linear_weights,
    load_adapter,
    lora_options,
    stop_engine,
)

MEMORY_DIR = Path("/dev/shm")
MEMORY_DIR_FREE = 2**31  # bytes that must be free for it to be used; containers often have 64 MiB

# Settings of `VLLMGeneration` that TRL's configs have with the prefix vllm_, and under the same name
VLLM_SETTINGS = (
    "mode", "server_base_url", "server_host", "server_port", "server_timeout", "group_port",
    "tensor_parallel_size", "gpu_memory_utilization", "max_model_length", "enable_sleep_mode", "model_impl",
)  # fmt: skip
SAMPLING_SETTINGS = (
    "temperature", "top_p", "top_k", "min_p", "max_completion_length", "trust_remote_code", "seed",
)  # fmt: skip


def prompt_keys(prompts: Sequence[Sequence[int]], seed: int, step: int) -> list[bytes]:
    """Hash the run's seed, the step and the prompt, for each prompt."""
    return [hashlib.sha256(json.dumps([seed, step, list(prompt)]).encode()).digest() for prompt in prompts]


def sample_seeds(keys: Sequence[bytes], keys_before: Iterable[bytes] = ()) -> list[int]:
    """
    Derive a seed of 63 bits for each rollout from the hash of its prompt (`prompt_keys`) and its earlier occurrences.

    So a rollout does not depend on its place in the batch, on the number of processes, or on a resume.

    Args:
        keys: of the prompts.
        keys_before: of the prompts of the processes before this one.
    """
    occurrences = Counter(keys_before)
    seeds = []
    for key in keys:
        digest = hashlib.sha256(key + occurrences[key].to_bytes(4, "big")).digest()
        occurrences[key] += 1
        seeds.append(int.from_bytes(digest[:8], "big") >> 1)
    return seeds


class Completion(NamedTuple):
    """Sampled token ids, with the end-of-sequence token if there is one, and their log-probabilities."""

    ids: list[int]
    logprobs: list[float] | None  # None: the sampler does not report them


class Requests(NamedTuple):
    """Completions that a server has been asked for."""

    prompts: list[list[int]]  # token ids, of all processes in their order
    own: slice  # of this process among them
    replies: list[Future]  # in the main process: for each prompt what `VLLMClient.generate` returns


class VLLMSampler(VLLMGeneration):
    """
    `VLLMGeneration` that serves the adapter natively and seeds each sample.

    - LoRA, colocated: each process has an engine on its device. `sync_weights` casts the adapter to the engine's
      dtype, where it is, and hands it over under a new name and id, by which vLLM also keys its prefix cache.
    - LoRA, server: the main process writes the adapter into a memory-backed folder, and tells a vLLM server that sees
      the same folder (`scripts/serve_vllm.sh`).
    - Full fine-tuning: the weights are streamed as TRL does it, which without an adapter merges nothing.

    Args:
        args, kwargs: those of `VLLMGeneration`.
        seed: of the run.
        adapter_dir: folder through which adapters reach a server; `None` for a memory-backed one.
        logprobs_mode: of a colocated engine; a server has its own, see `check_server_logprobs`. "raw_logprobs": of the
            model itself, before temperature, penalties and truncation. "processed_logprobs": of the distribution that
            was sampled from.
        engine_arguments: further arguments of `vllm.LLM`, such as `revision`.

    Raises:
        ValueError: for an adapter or a number of processes that the engine cannot serve.
        ConnectionError: in server mode, if the server does not answer.
    """

    def __init__(
        self,
        *args: Any,
        seed: int = 0,
        adapter_dir: str | None = None,
        logprobs_mode: str = "raw_logprobs",
        engine_arguments: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.seed = seed
        self.logprobs_mode = logprobs_mode
        self.step = 0  # of the run: a rollout's seed derives from it, the run's seed and the prompt
        self._synced_step: int | None = None  # step whose student's weights vLLM holds; None: it holds others
        has_room = MEMORY_DIR.is_dir() and shutil.disk_usage(MEMORY_DIR).free > MEMORY_DIR_FREE
        self.adapter_dir = Path(adapter_dir or (MEMORY_DIR if has_room else tempfile.gettempdir())).resolve()
        self.engine_arguments = engine_arguments or {}
        self.num_syncs = 0
        self.adapter_bytes = 0  # of the last sync
        self._adapter: Any = None  # what vLLM holds: a LoRARequest, or with a server its name
        self._asked: list[Future] = []  # what `ask` has asked for last
        super().__init__(*args, **kwargs)

    @classmethod
    def from_config(
        cls,
        args: TrainingArguments,
        model: nn.Module,
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase,
        **settings: Any,
    ) -> "VLLMSampler":
        """Start vLLM with the settings that the configs of TRL's trainers share. `settings` replaces and adds."""
        shared = {name: getattr(args, f"vllm_{name}") for name in VLLM_SETTINGS}
        shared |= {name: getattr(args, name) for name in SAMPLING_SETTINGS}
        shared["engine_arguments"] = {"revision": (args.model_init_kwargs or {}).get("revision")}
        return cls(model=model, accelerator=accelerator, processing_class=tokenizer, **(shared | settings))

    @property
    def _lora_config(self) -> LoraConfig | None:
        return self.model.peft_config["default"] if isinstance(self.model, PeftModel) else None

    # Engine

    def _init_vllm(self) -> None:
        self._llm_weights_sleeping = False
        if self._lora_config is not None:
            check_vllm_lora_support(self._lora_config)
        (self._run_id,) = broadcast_object_list([f"opsd-{uuid.uuid4().hex}"])
        self._url = self.server_base_url or f"http://{self.server_host}:{self.server_port}"
        if self.mode == "colocate":
            self._start_engine()
        elif self._lora_config is None:
            super()._init_vllm()
        elif self.accelerator.is_main_process:
            with self._server_errors():
                self.vllm_client = VLLMClient(base_url=self._url, connection_timeout=self.server_timeout)
        self.accelerator.wait_for_everyone()

    def _start_engine(self) -> None:
        accelerator, size = self.accelerator, self.tensor_parallel_size
        if accelerator.num_processes % size:
            raise ValueError(
                f"--vllm_tensor_parallel_size {size}: must divide the number of processes, {accelerator.num_processes}"
            )
        if size > 1:
            self.tp_group, _ = torch.distributed.new_subgroups(size)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process

        options = engine_options(self.gpu_memory_utilization)
        mixed_precision = {"bf16": "bfloat16", "fp16": "float16"}.get(accelerator.mixed_precision)
        options["dtype"] = mixed_precision or str(self.model.dtype).removeprefix("torch.")
        if self._lora_config is None:
            keep_linear_weights()
        else:
            check_lora_dtype(options["dtype"])
            adapted = [name for name, module in self.model.named_modules() if isinstance(module, BaseTunerLayer)]
            options |= lora_options(self._lora_config.r, [name.rpartition(".")[2] for name in adapted])
        from vllm import LLM

        calls = {type(module): type(module).__call__ for module in self.model.modules()}
        self.llm = LLM(
            self.model.name_or_path,
            tensor_parallel_size=size,
            max_model_len=self.max_model_length,
            max_num_seqs=self.max_num_seqs,
            enable_sleep_mode=self.enable_sleep_mode,
            model_impl=self.model_impl,
            trust_remote_code=self.trust_remote_code,
            # With several processes the engine joins the process group of the training.
            distributed_executor_backend="external_launcher" if accelerator.num_processes > 1 else "uni",
            logprobs_mode=self.logprobs_mode,
            **options,
            **self.engine_arguments,
        )
        # Of a model that it has not written itself (SmolLM3), vLLM changes the class of transformers
        for module in self.model.modules():
            kind = type(module)
            if kind.__call__ is not calls[kind]:
                module.__class__ = type(kind.__name__, (kind,), {"__call__": calls[kind]})
        self._sleep()

    def check_server_logprobs(self) -> None:
        """Raise `ValueError` if a server reports other log-probabilities than those of `logprobs_mode`."""
        if self.mode != "server" or not self.accelerator.is_main_process:
            return
        with self._server_errors():
            reported = self.vllm_client.get_server_info()["model_config"]["logprobs_mode"]
        if reported != self.logprobs_mode:
            raise ValueError(
                f"--vllm_importance_sampling_correction: the vLLM server at {self._url} runs with --logprobs-mode "
                f"{reported}; start it as scripts/serve_vllm.sh --logprobs-mode {self.logprobs_mode}"
            )

    def close(self) -> None:
        """Free what a colocated engine holds, so that this process can start another one; ask a server no more."""
        if self.mode == "colocate":
            stop_engine(self.llm)
        for reply in self._asked:
            reply.cancel()

    def _sleep(self) -> None:
        """Free the GPU for training: the cache, and the weights too if each sync sends all of them."""
        if not self.enable_sleep_mode:
            return
        if self._lora_config is None:
            self.llm.sleep(level=2)
            self._llm_weights_sleeping = True
        else:  # level 1 would copy the base to host memory and back at each step, which takes longer than the step
            self.llm.sleep(level=0)
            self.llm.release_kv_cache_memory()

    @contextmanager
    def _server_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # TRL's client raises nothing more specific
            raise ConnectionError(
                f"the vLLM server at {self._url} failed: {error}\nStart it with scripts/serve_vllm.sh (the same "
                "model, --max-lora-rank at least --lora_r, a folder that both see: --vllm_adapter_dir), or sample in "
                "the training processes with --vllm_mode colocate. --resume_from_checkpoint true goes on from the "
                "last complete checkpoint"
            ) from error

    # Weights

    def sync(self, step: int, reuse: bool = False) -> None:
        """
        Hand the student's weights to vLLM. All processes call it together.

        Args:
            step: number of optimizer steps so far.
            reuse: do nothing if vLLM holds the weights of this step: for evaluation, which changes none.
        """
        self.step = step
        if not reuse or self._synced_step != step:
            self.sync_weights()
            self._synced_step = step

    def sync_weights(self) -> None:
        """
        Hand the present adapter (in full fine-tuning: all weights) to vLLM. All processes call it together.

        A server first finishes what it was asked for before (`ask`), from the weights that it holds.
        """
        wait(self._asked)
        self._synced_step = None
        self.num_syncs += 1
        config = self._lora_config
        if config is None:
            super().sync_weights()
        elif self.mode == "server":
            self._write_adapter(config)
        else:
            self._load_adapter(config)

    def _load_adapter(self, config: LoraConfig) -> None:
        """Hand the adapter to the engine in this process."""
        engine = self.llm.llm_engine
        tensors = self._adapter_tensors(self.accelerator.device, engine.vllm_config.lora_config.lora_dtype)
        if self._adapter is not None:
            engine.remove_lora(self._adapter.lora_int_id)
        self._adapter = load_adapter(self.llm, self.num_syncs, tensors, config)

    def _write_adapter(self, config: LoraConfig) -> None:
        """Hand the adapter to the server, through a folder."""
        tensors = self._adapter_tensors("cpu", torch.float32)  # the server casts it to its own dtype
        folder = self.adapter_dir / f"{self._run_id}-{self.num_syncs}"
        if self.accelerator.is_main_process:
            try:
                folder.mkdir(parents=True)
                save_file(tensors, folder / "adapter_model.safetensors")
                config.save_pretrained(folder)
                self._send_adapter(folder)
            finally:  # vLLM has it in memory now, and would fail if it ever had to read it again
                shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _adapter_tensors(self, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return a copy of the whole adapter under the names that PEFT saves it with; cast, then moved to `device`."""
        trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        with self._dist.gather_params(list(trained.values())):
            tensors = {}
            for name, weight in trained.items():
                weight = weight.detach()
                weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
                tensors[self._fix_param_name_to_vllm(name)] = weight.to(dtype, copy=True).to(device)
        self.adapter_bytes = sum(tensor.nbytes for tensor in tensors.values())
        return get_peft_model_state_dict(self.model, state_dict=tensors, save_embedding_layers=False)

    def _send_adapter(self, folder: Path) -> None:
        def post(action: str, **payload: str) -> None:
            response = self.vllm_client.session.post(f"{self._url}/v1/{action}_lora_adapter", json=payload)
            if response.status_code != 200:
                raise RuntimeError(f"{action}_lora_adapter: {response.status_code}, {response.text}")

        with self._server_errors():
            if self._adapter is not None:
                post("unload", lora_name=self._adapter)
            self._adapter = folder.name
            post("load", lora_name=folder.name, lora_path=str(folder))

    # Sampling

    def sample(self, prompts: list[list[int]], base: bool = False, **settings: Any) -> list[Completion]:
        """
        Sample a completion for each prompt, from the weights of the last sync. All processes call it together.

        Args:
            prompts: token ids of this process, repeated where a prompt shall have several completions.
            base: sample from the base model, without the adapter.
            settings: sampling settings under vLLM's names, in place of those of the rollouts.
        """
        _, completions, logprobs, _ = self.generate(prompts, base=base, **settings)
        return list(map(self._completion, completions, logprobs))

    @staticmethod
    def _completion(ids: list[int], logprobs: list[list[Any]]) -> Completion:
        return Completion(ids, [math.nan if value is None else value for (value,) in logprobs])  # None: vLLM's NaN

    def generate(
        self,
        prompts: list[list[int]],
        images: None = None,
        num_generations: int = 1,
        profiler: Any = None,
        base: bool = False,
        **settings: Any,
    ) -> tuple[list[list[int]], list[list[int]], list[list[list[float]]], list[list[list[int]]]]:
        """
        Sample as `sample` does, with the signature of `VLLMGeneration.generate`, which TRL's trainers call.

        Args:
            images, num_generations, profiler: not used.

        Returns:
            Prompts, completions, and log-probabilities and ids of the sampled tokens, (prompts, tokens, 1).
        """
        sample = self._sample_colocated if self.mode == "colocate" else self._sample_from_server
        seeds, adapter = self._seeds(prompts, self.step), None if base else self._adapter
        completions, logprobs, logprob_token_ids = sample(prompts, seeds, self._sampling | settings, adapter)
        return prompts, completions, logprobs, logprob_token_ids

    def _seeds(self, prompts: list[list[int]], step: int) -> list[int]:
        """Derive the seed of each prompt of this process. All processes call it together."""
        keys = prompt_keys(prompts, self.seed, step)
        keys_of_processes = gather_object([keys])
        return sample_seeds(keys, chain.from_iterable(keys_of_processes[: self.accelerator.process_index]))

    @property
    def _sampling(self) -> dict[str, Any]:
        """Sampling settings of the rollouts, under vLLM's names."""
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p or 0.0,
            "repetition_penalty": self.repetition_penalty,
            "max_tokens": self.max_completion_length,
            "logprobs": 0,
        } | self.generation_kwargs

    def _sample_colocated(
        self, prompts: list[list[int]], seeds: list[int], settings: dict[str, Any], adapter: Any
    ) -> tuple:
        from vllm import SamplingParams

        own = slice(len(prompts))
        if self.tensor_parallel_size > 1:  # all processes of a group run the requests of all of them
            gathered: list[Any] = [None] * self.tensor_parallel_size
            torch.distributed.all_gather_object(gathered, (prompts, seeds), group=self.tp_group)
            before = sum(len(part[0]) for part in gathered[: torch.distributed.get_rank(self.tp_group)])
            own = slice(before, before + len(prompts))
            prompts, seeds = ([item for part in gathered for item in part[field]] for field in (0, 1))
        if self._llm_weights_sleeping:
            self.sync_weights()
        if self.enable_sleep_mode:
            self.llm.wake_up(tags=["kv_cache"])
        try:
            outputs = self.llm.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts],
                [SamplingParams(seed=seed, detokenize=False, **settings) for seed in seeds],
                lora_request=adapter,
                use_tqdm=False,
            )[own]
        except Exception as error:
            error.add_note(
                "vLLM failed while it sampled rollouts. Checkpoints are not touched: --resume_from_checkpoint true "
                "goes on from the last complete one. If memory ran out, lower --vllm_gpu_memory_utilization"
            )
            raise
        self._sleep()
        return [list(output.outputs[0].token_ids) for output in outputs], *extract_logprobs(outputs)

    def _sample_from_server(
        self, prompts: list[list[int]], seeds: list[int], settings: dict[str, Any], adapter: str | None
    ) -> tuple:
        replies = self._replies(self._request(prompts, seeds, settings, adapter))
        return tuple(
            [reply[key][0] for reply in replies] for key in ("completion_ids", "logprobs", "logprob_token_ids")
        )

    def _request(
        self, prompts: list[list[int]], seeds: list[int], settings: dict[str, Any], adapter: str | None
    ) -> Requests:
        """Let the main process ask for the completions of all processes, each with its seed, all at once."""
        if adapter is not None:
            settings = settings | {"model": adapter}

        def generate(prompt: list[int], seed: int) -> dict[str, list]:
            return self.vllm_client.generate([prompt], generation_kwargs=settings | {"seed": seed})

        all_prompts, all_seeds = gather_object(prompts), gather_object(seeds)
        counts = gather_object([len(prompts)])  # processes may need different numbers of rationales
        replies = []
        if self.accelerator.is_main_process:
            executor = ThreadPoolExecutor(max_workers=64)
            replies = [executor.submit(generate, *asked) for asked in zip(all_prompts, all_seeds, strict=True)]
            executor.shutdown(wait=False)  # its threads end with the last reply
        before = sum(counts[: self.accelerator.process_index])
        return Requests(all_prompts, slice(before, before + len(prompts)), replies)

    def _replies(self, requests: Requests) -> list[dict[str, list]]:
        """Wait for the server; return the replies of this process. All processes call it together."""
        replies = None
        if self.accelerator.is_main_process:
            try:
                with self._server_errors():
                    replies = [reply.result() for reply in requests.replies]
            finally:  # after an error
                for reply in requests.replies:
                    reply.cancel()
        (replies,) = broadcast_object_list([replies])
        return replies[requests.own]

    # Sampling ahead

    def ask(self, prompts: list[list[int]], step: int) -> Requests:
        """
        Ask a server for the rollouts of a later step, and do not wait. All processes call it together.

        They come from the weights of the last sync, with the seeds that `sample` would give them in that step.

        Args:
            prompts: token ids of this process.
            step: number of optimizer steps before the one that will train on them.
        """
        requests = self._request(prompts, self._seeds(prompts, step), self._sampling, self._adapter)
        self._asked = requests.replies
        return requests

    def collect(self, requests: Requests) -> list[Completion]:
        """
        Wait for what `ask` asked for; return the completions of this process. All processes call it together.

        Raises:
            ConnectionError: in the main process, if the server failed.
        """
        replies = self._replies(requests)
        return [self._completion(reply["completion_ids"][0], reply["logprobs"][0]) for reply in replies]


def _longest_sequence(args: OPSDConfig, datasets: Sequence[Dataset]) -> int:
    """Count the tokens of the longest prompt together with what is sampled after it."""
    longest = max(len(ids) for dataset in datasets for ids in dataset["student_prompt_ids"])
    longest += args.max_completion_length
    if args.reason_first and args.context.of_group is not None:
        longest = max(longest, args.max_prompt_length or 0)
    elif args.reason_first:
        requests = (ids for dataset in datasets for ids in dataset["reasoning_prompt_ids"])
        longest = max(longest, max(map(len, requests)) + args.max_reasoning_length)
    return longest


MOST_HELD_OUT = 256  # sequences at once, more than which need memory and hardly less time


def _most_requests(args: OPSDConfig, num_processes: int, held_out: Sequence[Dataset]) -> int:
    """Return how many sequences an engine samples at once: a step's rollouts, or more of the held-out problems."""
    num_problems = math.ceil(max(map(len, held_out), default=0) / num_processes)
    of_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.vllm_tensor_parallel_size
    of_evaluation = num_problems * args.eval_accuracy_samples * args.vllm_tensor_parallel_size
    return max(of_step, min(of_evaluation, MOST_HELD_OUT))


def make_vllm_sampler(
    args: OPSDConfig,
    model: nn.Module,
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: list[int],
    datasets: Sequence[Dataset],
) -> VLLMSampler:
    """
    Start vLLM with the settings of the rollouts.

    Args:
        args: settings.
        model: the model in training.
        accelerator: the trainer's accelerator.
        tokenizer: the model's tokenizer.
        end_ids: end-of-sequence tokens.
        datasets: encoded examples that will be sampled from.

    Raises:
        ValueError: if `--vllm_max_model_length` is too small, or if a server reports log-probabilities that importance
            weights cannot be made of.
    """
    longest = _longest_sequence(args, datasets)
    if args.vllm_max_model_length is not None and args.vllm_max_model_length < longest:
        raise ValueError(
            f"--vllm_max_model_length {args.vllm_max_model_length}: the longest prompt needs {longest} tokens with "
            "what is sampled after it; leave the flag out, or lower --max_length to drop long problems"
        )
    sampler = VLLMSampler.from_config(
        args,
        model,
        accelerator,
        tokenizer,
        max_model_length=args.vllm_max_model_length or longest,
        max_num_seqs=_most_requests(args, accelerator.num_processes, datasets[1:]),
        generation_kwargs={"presence_penalty": args.presence_penalty, "stop_token_ids": end_ids},
        adapter_dir=args.vllm_adapter_dir,
        logprobs_mode="processed_logprobs" if args.vllm_importance_sampling_correction else "raw_logprobs",
    )
    if args.vllm_importance_sampling_correction:
        sampler.check_server_logprobs()
    return sampler


CACHE_BYTES = 4 * 2**30  # a constant: what is drawn depends on which prompts share a call


class TransformersSampler:
    """
    Samples with `model.generate` of transformers, from the weights as they are.

    All prompts are sampled in one call, or in as few as keep the keys and values of a call below `CACHE_BYTES`.

    It has the interface of `VLLMSampler`. Random numbers come from PyTorch's generator of the device.

    Args:
        model: the model in training.
        accelerator: the trainer's accelerator.
        generation_config: sampling settings, with `eos_token_id` and `pad_token_id`.
        gradient_checkpointing_kwargs: those of the training, to switch it off meanwhile and on again.
    """

    step = 0  # not used: see `VLLMSampler`

    def __init__(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        generation_config: GenerationConfig,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    ):
        self.model, self.accelerator, self.generation_config = model, accelerator, generation_config
        self.gradient_checkpointing_kwargs = gradient_checkpointing_kwargs

    def sync(self, step: int, reuse: bool = False) -> None:
        """Do nothing: the model in training samples itself."""

    def sync_weights(self) -> None:
        """Do nothing: the model in training samples itself."""

    def close(self) -> None:
        """Do nothing: there is no engine."""

    def sample(self, prompts: list[list[int]], base: bool = False, **settings: Any) -> list[Completion]:
        """
        Sample a completion for each prompt. All processes call it together, also those without prompts.

        Args:
            prompts: token ids of this process.
            base: not used: the caller switches the adapter off.
            settings: `temperature`, `top_p`, `top_k` and `max_tokens`, in place of those of the rollouts.
        """
        config = copy.deepcopy(self.generation_config)
        if settings:
            config.update(max_new_tokens=settings.pop("max_tokens"), min_p=None, **settings)
        pad_id, end_ids = config.pad_token_id, config.eos_token_id
        end_ids = {end_ids} if isinstance(end_ids, int) else set(end_ids)
        size = max(1, CACHE_BYTES // self._cache_bytes(max(map(len, prompts), default=1) + config.max_new_tokens))
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        # Under ZeRO-3 and FSDP2 all processes take part in each call: those without a prompt go on from a padding
        # token.
        num_calls = max(gather_object([math.ceil(len(prompts) / size)]))
        completions = []
        with self._generating(config) as model:
            for start in range(0, num_calls * size, size):
                batch = [prompts[place] for place in order[start : start + size]] or [[pad_id]]
                width = max(map(len, batch))
                input_ids = torch.tensor([[pad_id] * (width - len(ids)) + ids for ids in batch])
                mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in batch])
                sequences = model.generate(
                    input_ids=input_ids.to(self.accelerator.device),
                    attention_mask=mask.to(self.accelerator.device),
                    generation_config=config,
                )
                for ids in sequences[:, width:].tolist():
                    end = next((place for place, token_id in enumerate(ids) if token_id in end_ids), len(ids))
                    completions.append(Completion(ids[: end + 1], None))
        in_order = zip(order, completions, strict=False)  # without those of padding tokens
        return [completion for _, completion in sorted(in_order, key=lambda pair: pair[0])]

    def _cache_bytes(self, length: int) -> int:
        """Return the size of the keys and values of a sequence of `length` tokens, at most."""
        config = self.model.config.get_text_config()
        num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * config.num_hidden_layers * num_heads * head_size * length * 4

    @contextmanager
    def _generating(self, config: GenerationConfig) -> Iterator[PreTrainedModel]:
        """Sample in training's precision, with none of the sampling settings that the model was published with."""
        policy = self.accelerator.unwrap_model(self.model)
        causal_lm = policy.get_base_model() if isinstance(policy, PeftModel) else policy
        published, causal_lm.generation_config = causal_lm.generation_config, config
        try:
            with (
                self.accelerator.autocast(),
                unwrap_model_for_generation(
                    self.model,
                    self.accelerator,
                    gradient_checkpointing_kwargs=self.gradient_checkpointing_kwargs,
                ) as model,
            ):
                yield model
        finally:
            causal_lm.generation_config = published


Sampler = VLLMSampler | TransformersSampler


APART_STEP = -1  # in the place of the step, of which vLLM's seeds are made: no step of the training has it


@contextmanager
def own_randomness(seed: int, accelerator: Accelerator) -> Iterator[None]:
    """Seed PyTorch's generators inside the block, and give them their states again after it."""
    device = accelerator.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed + accelerator.process_index)  # else all processes draw the same
        yield


def sample_apart(sampler: Sampler, prompts: list[list[int]], num_steps: int) -> list[Completion]:
    """Sample after `num_steps` steps, apart from the rollouts of the training, with the same seeds each time."""
    sampler.sync(num_steps, reuse=True)
    sampler.step = APART_STEP
    return sampler.sample(prompts)
