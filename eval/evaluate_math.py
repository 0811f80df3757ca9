"""
Evaluation on mathematical problems: Avg@k of a base model and any number of LoRA adapters, served by one vLLM engine.

    python eval/evaluate_math.py --base_model Qwen/Qwen3-1.7B --checkpoint_dir outputs/run/checkpoint-50 \
        --dataset HuggingFaceH4/aime_2024 --val_n 12 --output_file outputs/aime24.json
"""

import argparse
import hashlib
import itertools
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this file's folder is on the path

from data_collator import STUDENT_PROMPT, TEACHER_PROMPT, encode_chat_prompt, fill_template
from eval.grading import answer_text, extract_answer, is_equal
from problem_data import keep_usable, load_problems

if TYPE_CHECKING:  # vLLM reads its environment when it is imported: see start_engine
    from vllm import LLM, CompletionOutput

# What vLLM's CPU build needs: a small cache, no binding to cores, no warm-up, the engine in this process.
CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
CPU_ENGINE = {
    "dtype": "float32",  # log-probs agree with those of transformers to 1e-6; in bfloat16 they would not to 1e-3
    "enforce_eager": True,
    "enable_chunked_prefill": False,  # vLLM 0.31 cannot rewind a sample's generator on CPU, as it does after a chunk
    "gpu_memory_utilization": 0.1,  # only has to be free; what is taken is VLLM_CPU_KVCACHE_SPACE
}

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
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1 token"),
        ):
            if not valid:
                raise ValueError(f"--{name} {getattr(self, name)}: must be {allowed}")


@dataclass(frozen=True)
class Question:
    """A problem with its reference answer and the token ids of its prompt."""

    problem: str
    gold: str
    prompt_ids: list[int]


def load_questions(
    dataset: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    thinking: bool,
    privileged: bool = False,
    num_samples: int | None = None,
    dataset_split: str = "train",
    problem_column: str = "problem",
    answer_column: str = "answer",
    solution_column: str = "solution",
) -> list[Question]:
    """
    Load problems and encode their prompts.

    Args:
        dataset: a Hub id or a local file or folder, see `problem_data.load_problems`.
        tokenizer: of the base model.
        thinking: thinking mode of the chat template.
        privileged: the teacher's prompt, with the reference solution, in place of the student's.
        num_samples: only the first so many problems; `None` for all.

    Raises:
        FileNotFoundError, ValueError: for data that cannot be used, and a tokenizer whose chat template is missing or
            has no thinking mode where one is asked for.
    """
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"--num_samples {num_samples}: must be at least 1 problem, or left out for all")
    if tokenizer.chat_template is None:
        raise ValueError(f"--base_model {tokenizer.name_or_path}: its tokenizer has no chat template for the prompts")
    if thinking and "think" not in tokenizer.get_chat_template():
        raise ValueError(
            f"--enable_thinking: the chat template of {tokenizer.name_or_path} has no thinking mode, so that every "
            "response would count as cut off while thinking; use --no_thinking"
        )
    rows = load_problems(dataset, dataset_split)
    if answer_column in rows.column_names:
        try:
            answers = [answer_text(value) for value in rows[answer_column]]
        except TypeError as error:
            raise ValueError(f"--answer_column {answer_column}: {error}") from error
        rows = rows.remove_columns(answer_column).add_column(answer_column, answers)
    columns = {"problem_column": problem_column, "answer_column": answer_column}
    if privileged:
        columns["solution_column"] = solution_column
    rows = keep_usable(rows, **columns)
    template = TEACHER_PROMPT if privileged else STUDENT_PROMPT
    questions = []
    for row in rows.select(range(min(num_samples or len(rows), len(rows)))):
        solution = {"solution": row[solution_column]} if privileged else {}
        content = fill_template(template, problem=row[problem_column], **solution)
        prompt_ids = encode_chat_prompt(tokenizer, content, thinking)
        questions.append(Question(row[problem_column], row[answer_column].strip(), prompt_ids))
    return questions


def check_adapter(folder: str) -> int:
    """
    The LoRA rank of an adapter.

    Raises:
        ValueError: if `folder` holds no usable adapter. A model without its adapter would be the base model.
    """
    path = Path(folder)
    weights = path / "adapter_model.safetensors"
    for file in (path / "adapter_config.json", weights):
        if not file.is_file():
            inside = sorted(str(found.parent) for found in path.glob("*/adapter_config.json"))
            hint = f"; there are adapters in {', '.join(inside)}" if inside else ""
            raise ValueError(f"--checkpoint_dir {folder}: no LoRA adapter, {file.name} is missing{hint}")
    try:
        with safe_open(weights, "pt") as tensors:
            shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118 (no iterator)
    except SafetensorError as error:
        raise ValueError(f"--checkpoint_dir {folder}: {weights.name} cannot be read: {error}") from error
    if not shapes or any(0 in shape for shape in shapes):  # saved under ZeRO-3 without gathering, shapes are [0]
        raise ValueError(f"--checkpoint_dir {folder}: the adapter is empty; save it again from all processes")
    config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    if config["peft_type"] != "LORA":
        raise ValueError(
            f"--checkpoint_dir {folder}: the adapter is of type {config['peft_type']}; only LORA is served"
        )
    return max([config["r"], *config.get("rank_pattern", {}).values()])


def sequence_length(base_model: str, questions: Sequence[Question], max_new_tokens: int, limit: int | None) -> int:
    """
    The `max_model_len` of the engine: `limit` if given, else room for the longest prompt and `max_new_tokens`.

    Raises:
        ValueError: if the model has too few positions for that, or a prompt does not fit into `limit`.
    """
    longest = max(len(question.prompt_ids) for question in questions)
    if limit is not None:
        if longest >= limit:
            raise ValueError(f"--max_model_len {limit}: the longest prompt has {longest} tokens; give more")
        return limit
    positions = AutoConfig.from_pretrained(base_model).get_text_config().max_position_embeddings
    if longest + max_new_tokens > positions:
        raise ValueError(
            f"--max_new_tokens {max_new_tokens}: with the longest prompt of {longest} tokens more than the {positions} "
            f"positions of {base_model}; give at most {positions - longest}, or cut long samples with --max_model_len"
        )
    return longest + max_new_tokens


def start_engine(
    base_model: str,
    *,
    lora_rank: int = 0,
    max_model_len: int | None = None,
    gpu_memory_utilization: float | None = None,
    tensor_parallel_size: int = 1,
) -> "LLM":
    """
    Start the vLLM engine that serves `base_model` and, if there are any, its LoRA adapters.

    On a machine without CUDA this sets what vLLM's CPU build needs, where the user has not set it. There the engine
    runs in this process and reseeds its global random generators.

    Args:
        lora_rank: the largest rank of the adapters that `evaluate` shall serve; 0 for the base model alone.
        max_model_len: tokens of prompt and response together; `None` for the model's own limit.
        gpu_memory_utilization: share of the memory; `None` for 0.9 on a GPU and 0.1 on a CPU.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    options: dict[str, Any] = {"gpu_memory_utilization": 0.9}
    if torch.cuda.device_count() == 0:
        for name, value in CPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        options = dict(CPU_ENGINE)
    if gpu_memory_utilization is not None:
        options["gpu_memory_utilization"] = gpu_memory_utilization
    from vllm import LLM  # only now: it reads the environment
    from vllm.config.lora import MaxLoRARanks

    if lora_rank > 0:
        served = [size for size in get_args(MaxLoRARanks) if size >= lora_rank]
        if not served:
            raise ValueError(
                f"--checkpoint_dir: vLLM serves adapters up to rank {max(get_args(MaxLoRARanks))}, not {lora_rank}"
            )
        options |= {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": min(served)}
    return LLM(base_model, max_model_len=max_model_len, tensor_parallel_size=tensor_parallel_size, **options)


def stop_engine(engine: "LLM") -> None:
    """Free what `engine` holds, so that another one can start in this process; it cannot be used afterwards."""
    from vllm.distributed import cleanup_dist_env_and_memory

    engine.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def sample_seed(base_seed: int, problem: str, index: int) -> int:
    """Seed of a sample, from what identifies it alone: neither order, batch nor model changes it. 63 bits."""
    digest = hashlib.sha256(json.dumps([base_seed, problem, index]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def grade_response(completion: "CompletionOutput", gold: str, seed: int | None, thinking: bool) -> dict[str, Any]:
    """One response as it stands in the results; `seed` is `None` for the greedy one."""
    extracted = extract_answer(completion.text, thinking)
    return {
        "seed": seed,
        "text": completion.text,
        "extracted": extracted,
        "correct": is_equal(extracted, gold),
        "num_tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
    }


def evaluate(
    engine: "LLM",
    questions: Sequence[Question],
    sampling: Sampling,
    *,
    thinking: bool,
    checkpoint: str | None = None,
) -> dict[str, Any]:
    """
    Sample responses to `questions` and grade them.

    Args:
        engine: from `start_engine`.
        thinking: the mode that the prompts were encoded with: a response whose thought does not end has no answer.
        checkpoint: adapter folder; `None` for the base model.

    Returns:
        `model` ("base" or the adapter folder), `avg_at_k` (mean accuracy in [0, 1]), `standard_error` (of it,
        clustered by problem; `None` for a single problem), `greedy` (accuracy at temperature 0, or `None`),
        `truncated` (share of the samples that hit the length limit) and `samples`: for each problem its `responses`
        and the `greedy` one, or `None`.

    Raises:
        ValueError: if `checkpoint` holds no usable adapter.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    model, adapter = "base", None
    if checkpoint is not None:
        check_adapter(checkpoint)
        model, adapter_id = str(checkpoint), next(ADAPTER_IDS)
        adapter = LoRARequest(f"{model}#{adapter_id}", adapter_id, model)  # the prefix cache goes by name and path

    common = {"max_tokens": sampling.max_new_tokens, "skip_special_tokens": False}  # </think> may be a special token
    filters = {"top_p": sampling.top_p, "top_k": sampling.top_k, "min_p": sampling.min_p}
    prompts, parameters = [], []
    for question in questions:
        seeds = [sample_seed(sampling.seed, question.problem, index) for index in range(sampling.val_n)]
        drawn = [SamplingParams(temperature=sampling.temperature, seed=seed, **filters, **common) for seed in seeds]
        drawn += [SamplingParams(temperature=0.0, **common)] * sampling.greedy
        prompts += [{"prompt_token_ids": question.prompt_ids}] * len(drawn)
        parameters += drawn

    def named_bar(*args, desc: str = "", **options) -> tqdm:
        return tqdm(*args, desc=f"{model}: {desc}", **options)

    outputs = engine.generate(prompts, parameters, lora_request=adapter, use_tqdm=named_bar)

    samples = []
    remaining = zip(outputs, parameters, strict=True)
    for question in questions:
        graded = [
            grade_response(output.outputs[0], question.gold, parameter.seed, thinking)
            for output, parameter in itertools.islice(remaining, sampling.val_n + sampling.greedy)
        ]
        greedy = graded.pop() if sampling.greedy else None
        samples.append({"problem": question.problem, "gold": question.gold, "responses": graded, "greedy": greedy})

    accuracies = [statistics.fmean(response["correct"] for response in sample["responses"]) for sample in samples]
    responses = [response for sample in samples for response in sample["responses"]]
    return {
        "model": model,
        "avg_at_k": statistics.fmean(accuracies),
        # The samples of a problem are not independent; the problems are.
        "standard_error": statistics.stdev(accuracies) / len(accuracies) ** 0.5 if len(accuracies) > 1 else None,
        "greedy": statistics.fmean(sample["greedy"]["correct"] for sample in samples) if sampling.greedy else None,
        "truncated": statistics.fmean(response["finish_reason"] == "length" for response in responses),
        "samples": samples,
    }


def write_results(file: Path, settings: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> None:
    """Write the results so far; `file` is at all times either the old or the new one, complete."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps({"settings": settings, "results": results}, indent=1), encoding="utf-8")
    partial.replace(file)


def results_table(results: Sequence[Mapping[str, Any]], val_n: int) -> str:
    """The results as a Markdown table, in percent."""

    def percent(share: float | None) -> str:
        return "" if share is None else f"{100 * share:.1f}"

    lines = [f"| model | Avg@{val_n} | ± | greedy | truncated |", "|---|--:|--:|--:|--:|"]
    for result in results:
        shares = (result[key] for key in ("avg_at_k", "standard_error", "greedy", "truncated"))
        lines.append(f"| {result['model']} | {' | '.join(percent(share) for share in shares)} |")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base_model", required=True, help="folder or Hub id")
    add("--checkpoint_dir", nargs="+", default=[], help="LoRA adapter folders")
    add("--skip_base", action="store_true", help="evaluate the adapters only")
    add("--dataset", "--dataset_name", required=True, help="Hub id, or local json, jsonl or parquet file or folder")
    add("--dataset_split", default="train")
    add("--problem_column", default="problem")
    add("--answer_column", default="answer", help="text or numbers")
    add("--solution_column", default="solution", help="for --privileged")
    add("--privileged", action="store_true", help="the teacher's prompt, with the solution: the teacher's ceiling")
    add("--num_samples", type=int, help="only the first so many problems (default: all)")
    for knob in fields(Sampling):
        kind = {"action": "store_true"} if knob.type is bool else {"type": knob.type, "default": knob.default}
        add(f"--{knob.name}", help=knob.metadata["help"], **kind)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--enable_thinking", dest="thinking", action="store_true", help="the default")
    mode.add_argument("--no_thinking", dest="thinking", action="store_false")
    parser.set_defaults(thinking=True)
    add("--output_file", type=Path, help="JSON, written anew after each model")
    add("--gpu_memory_utilization", type=float, help="default: 0.9; on a CPU 0.1")
    add("--tensor_parallel_size", type=int, default=1)
    add("--max_model_len", type=int, help="tokens of prompt and response (default: the longest prompt's need)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: evaluate the base model and each adapter, write the results, print a table."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    models: list[str | None] = [*([] if args.skip_base else [None]), *args.checkpoint_dir]
    try:  # all that can be wrong with the input, before the engine starts
        sampling = Sampling(**{knob.name: getattr(args, knob.name) for knob in fields(Sampling)})
        if not models:
            raise ValueError("--skip_base: nothing to evaluate; give adapters with --checkpoint_dir")
        lora_rank = max([check_adapter(folder) for folder in args.checkpoint_dir], default=0)
        if args.base_model.startswith((".", "/", "~")) and not Path(args.base_model).is_dir():
            raise FileNotFoundError(f"--base_model {args.base_model}: no such folder; give a folder or a Hub id")
        questions = load_questions(
            args.dataset,
            AutoTokenizer.from_pretrained(args.base_model),
            thinking=args.thinking,
            privileged=args.privileged,
            num_samples=args.num_samples,
            dataset_split=args.dataset_split,
            problem_column=args.problem_column,
            answer_column=args.answer_column,
            solution_column=args.solution_column,
        )
        max_model_len = sequence_length(args.base_model, questions, sampling.max_new_tokens, args.max_model_len)
        if args.output_file is not None:
            args.output_file.parent.mkdir(parents=True, exist_ok=True)
            if args.output_file.is_dir():
                raise ValueError(f"--output_file {args.output_file}: is a folder; name a file")
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))

    engine = start_engine(
        args.base_model,
        lora_rank=lora_rank,
        max_model_len=max_model_len,
        gpu_memory_utilization=args.gpu_memory_utilization,
        tensor_parallel_size=args.tensor_parallel_size,
    )
    settings = vars(args) | {"output_file": str(args.output_file), "max_model_len": max_model_len}
    results = []
    for checkpoint in models:
        results.append(evaluate(engine, questions, sampling, thinking=args.thinking, checkpoint=checkpoint))
        if args.output_file is not None:
            write_results(args.output_file, settings, results)
    stop_engine(engine)
    sys.stdout.write(results_table(results, sampling.val_n) + "\n")


if __name__ == "__main__":
    main()
