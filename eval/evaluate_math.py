"""
Evaluation on problems with answers: Avg@k, pass@k and majority@k of a base model and any number of LoRA adapters.

    python eval/evaluate_math.py --base_model Qwen/Qwen3-1.7B --checkpoint_dir outputs/run/checkpoint-* \
        --dataset aime24 aime25 hmmt25 --val_n 12 --output_file outputs/eval/run.json

One engine samples for all models and data sets. Each response is graded while the engine goes on, and appended to
run.jsonl; the same command goes on where a killed one stopped. At the end run.json has settings and statistics, run.md
the tables, and run.png the accuracy over the checkpoints' steps.
"""

import argparse
import itertools
import json
import logging
import re
import shlex
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import asdict, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

from data_collator import STUDENT_PROMPT, TEACHER_PROMPT, check_template
from eval.benchmarks import BENCHMARKS, Benchmark, Question, find_benchmark, load_questions
from eval.engine import (
    GREEDY,
    Completion,
    Request,
    Sampling,
    generate,
    generate_in_parallel,
    sampling_requests,
    start_engine,
    visible_devices,
)
from eval.report import plot_accuracy, plot_budgets, report_tables
from eval.run_files import (
    Sample,
    content_hash,
    files_hash,
    merge_settings,
    model_version,
    open_samples,
    package_versions,
    replace_file,
    sample_line,
    stored_settings,
)
from eval.scores import Estimate, accuracy_within, budgets, elect, estimate, pass_at_k, pass_sizes, vote_classes
from eval.server import Server, connect, generate_from
from opsd.adapters import Adapter, check_model_folder
from opsd.grading import (
    BUILT_IN,
    EXTRACT_METHODS,
    GRADERS,
    GradingPool,
    Verdict,
    check_answers,
    describe_verifier,
    extract,
    find_rule,
)
from opsd.run.flags import SWITCH
from opsd.run.hub import cached_commit, check_model
from opsd.run.problem_data import is_path
from opsd.run.record import describe_hardware, find_record
from opsd.thinking import after_thought, freeze_date
from opsd.vllm_engine import stop_engine

if TYPE_CHECKING:
    from vllm import LLM

logger = logging.getLogger(__name__)

MERGE_PROMPTS, MERGE_TOKENS = 4, 256  # that a merged adapter is checked on: so many, each up to so many tokens
OF_ENGINES = ("merge_adapter", "gpu_memory_utilization", "tensor_parallel_size", "data_parallel", "enforce_eager")
OF_ENGINES = (*OF_ENGINES, "max_model_len")  # flags of engines in this process
JUDGED = ", judged by "
BASE = "base"  # the name of the base model in files and tables; a checkpoint's is its folder


def request_key(request: Request) -> tuple[str, str, int, int]:
    """The key of the `Sample` that answers `request`."""
    question = request.question
    return request.checkpoint or BASE, question.benchmark, question.index, request.sample


def make_sample(request: Request, completion: Completion) -> Sample:
    """A sample that is still to be graded."""
    question = request.question
    return Sample(
        *request_key(request),
        seed=request.seed,
        num_tokens=completion.num_tokens,
        finish_reason=completion.finish_reason,
        problem=question.problem,
        gold=question.gold,
        answer_type=question.answer_type,
        text=completion.text,
        seconds=completion.seconds,
        verifier=question.verifier,
        row=dict(question.row),
    )


def grade(batches: Iterable[Sequence[Sample]], pool: GradingPool, *, thinking: bool, method: str) -> Iterator[Sample]:
    """
    Grade samples as they come, in the pool's processes; yields each as soon as it has its verdict.

    `method` is how the answers are found that the verifier `math` compares.
    """
    waiting: dict[Future[Verdict], Sample] = {}

    def verdicts(done: Iterable[Future[Verdict]]) -> Iterator[Sample]:
        for future in done:
            sample, verdict = waiting.pop(future), future.result()
            sample.correct, sample.status, sample.score = verdict.equal, verdict.status, verdict.score
            yield sample

    for batch in batches:
        for sample in batch:
            found = extract(sample.text, sample.verifier, thinking, method)
            sample.extracted = found if find_rule(sample.verifier).votes else None
            row = {"problem": sample.problem, "answer": sample.gold} | sample.row
            waiting[pool.submit(found, sample.gold, sample.answer_type, sample.verifier, row)] = sample
        yield from verdicts(wait(waiting, timeout=0).done)
    yield from verdicts(as_completed(list(waiting)))


def is_missed(sample: Sample) -> bool:
    """Whether a response without credit has the reference answer in a box, or as a word of its last line."""
    if sample.correct is not False:
        return False
    gold = re.escape("".join(sample.gold.split()).strip("$"))
    boxed = re.search(r"\\boxed\{" + gold + r"\}", "".join(sample.text.split()))
    lines = re.sub(r"<\|[^|<>]*\|>", "", sample.text).rstrip().rsplit("\n", 1)
    alone = r"(?<![\w.,\\/^-])" + re.escape(sample.gold.strip().strip("$")) + r"(?![\w/^]|[.,]\d)"
    return bool(boxed or re.search(alone, lines[-1]))


def majority(drawn: Sequence[Sample], pool: GradingPool) -> Sample | None:
    """Return the first sample of the largest class of equal answers (see `eval.scores`); `None` without answers."""

    def equal(known: str, answer: str) -> bool:
        return pool.submit(answer, known, drawn[0].answer_type, drawn[0].verifier).result().equal is True

    elected = elect(vote_classes([sample.extracted for sample in drawn], equal))
    return None if elected is None else drawn[elected]


def tokens_per_second(samples: Sequence[Sample]) -> float | None:
    """Return generated tokens over the seconds of an engine; `None` if these are not known for all samples."""
    seconds = [sample.seconds for sample in samples if sample.seconds is not None]
    if len(seconds) < len(samples) or sum(seconds) == 0:
        return None
    return sum(sample.num_tokens for sample in samples) / sum(seconds)


def score(samples: Iterable[Sample], pool: GradingPool, *, thinking: bool) -> dict[str, Any]:
    """
    Statistics of a model's graded samples on a benchmark.

    A problem with a sample that no grader can judge is left out of all accuracies as a whole: leaving out the one
    sample would favour those that happen to match the reference word for word.

    Returns:
        Shares in [0, 1], over the problems that are graded, `None` if there are none: `avg_at_k` with `standard_error`
        and `interval` (see `eval.scores.estimate`), `pass_at_k` (k -> unbiased pass@k), `majority_at_k`, and `greedy`
        (also `None` without such samples). Over all samples: `truncated` (share that hit the length limit),
        `mean_score` (of those that a verifier has judged), `unclosed_thinking` (share without the end of a thought;
        `None` without thinking), `mean_tokens`, `tokens_per_second` (generated tokens over the seconds that an engine
        worked for them; `None` where these are not known), and `status` (how verdicts were reached, counted); as pairs
        problem, sample: `missed` (see `is_missed`) and `cut_off` (at the length limit). `val_n`, `num_problems`,
        `num_ungraded` (problems left out).
        `problems`: for each one `problem_id`, `problem`, `gold`, the lists `correct`, `extracted`, `num_tokens`, the
        `majority` answer with `majority_correct`.
    """
    ordered = sorted(samples, key=lambda sample: sample.key)
    drawn = [sample for sample in ordered if sample.sample != GREEDY]
    groups = [list(group) for _, group in itertools.groupby(drawn, key=lambda sample: sample.problem_id)]
    votes = find_rule(drawn[0].verifier).votes
    with ThreadPoolExecutor() as threads:  # that wait for the pool's processes
        elected = list(threads.map(lambda group: majority(group, pool), groups))
    problems = []
    for group, vote in zip(groups, elected, strict=True):
        problems.append(
            {
                "problem_id": group[0].problem_id,
                "problem": group[0].problem,
                "gold": group[0].gold,
                "correct": [sample.correct for sample in group],
                "extracted": [sample.extracted for sample in group],
                "num_tokens": [sample.num_tokens for sample in group],
                "majority": None if vote is None else vote.extracted,
                "majority_correct": (False if votes else None) if vote is None else vote.correct,
            }
        )
    greedy = [sample.correct for sample in ordered if sample.sample == GREEDY and sample.correct is not None]
    graded = [problem for problem in problems if None not in problem["correct"]]
    judged = [sample for sample in drawn if sample.correct is not None]
    scores = [float(sample.correct) if sample.score is None else sample.score for sample in judged]
    average = estimate([statistics.fmean(problem["correct"]) for problem in graded]) if graded else Estimate()
    sizes = pass_sizes(min(len(problem["correct"]) for problem in graded)) if graded else []
    return {
        "val_n": max(len(group) for group in groups),
        "num_problems": len(problems),
        "num_ungraded": len(problems) - len(graded),
        "avg_at_k": average.mean,
        "standard_error": average.standard_error,
        "interval": average.interval,
        "pass_at_k": {
            str(k): statistics.fmean(pass_at_k(len(p["correct"]), sum(p["correct"]), k) for p in graded) for k in sizes
        },
        "majority_at_k": statistics.fmean(problem["majority_correct"] for problem in graded)
        if graded and votes
        else None,
        "mean_score": statistics.fmean(scores) if scores else None,
        "greedy": statistics.fmean(greedy) if greedy else None,
        "truncated": statistics.fmean(sample.finish_reason == "length" for sample in drawn),
        "unclosed_thinking": statistics.fmean(after_thought(sample.text, True) is None for sample in drawn)
        if thinking
        else None,
        "mean_tokens": statistics.fmean(sample.num_tokens for sample in drawn),
        "tokens_per_second": tokens_per_second(ordered),
        "status": dict(Counter(sample.status for sample in drawn)),
        "missed": [[sample.problem_id, sample.sample] for sample in drawn if is_missed(sample)],
        "cut_off": [[sample.problem_id, sample.sample] for sample in drawn if sample.finish_reason == "length"],
        "problems": problems,
    }


def score_all(samples: Iterable[Sample], pool: GradingPool, *, thinking: bool) -> list[dict[str, Any]]:
    """`score` with `model` and `dataset`, for each pair in order of appearance, and for the benchmarks' subsets."""
    subsets = {known.name: known.subsets for known in BENCHMARKS}
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.model, sample.benchmark), []).append(sample)
        for name, answer_types in subsets.get(sample.benchmark, {}).items():
            if sample.answer_type in answer_types:
                groups.setdefault((sample.model, name), []).append(sample)
    return [
        {"model": model, "dataset": dataset} | score(group, pool, thinking=thinking)
        for (model, dataset), group in groups.items()
    ]


def paired_differences(results: Sequence[Mapping[str, Any]], reference: str) -> list[dict[str, Any]]:
    """
    Differences of Avg@k between each model and the model `reference`, problem by problem.

    Returns:
        For each data set and model: `dataset`, `model`, `reference`, and over the problems that are graded for both
        the mean `difference` with its `standard_error` and `interval`.
    """

    def accuracies(result: Mapping[str, Any]) -> dict[int, float]:
        graded = (problem for problem in result["problems"] if None not in problem["correct"])
        return {problem["problem_id"]: statistics.fmean(problem["correct"]) for problem in graded}

    references = {result["dataset"]: accuracies(result) for result in results if result["model"] == reference}
    differences = []
    for result in results:
        if result["model"] == reference or result["dataset"] not in references:
            continue
        own, other = accuracies(result), references[result["dataset"]]
        if common := [own[problem] - other[problem] for problem in own if problem in other]:
            difference = asdict(estimate(common))
            names = {"dataset": result["dataset"], "model": result["model"], "reference": reference}
            differences.append(names | {"difference": difference.pop("mean")} | difference)
    return differences


def evaluate(
    engine: "LLM",
    questions: Sequence[Question],
    sampling: Sampling,
    pool: GradingPool,
    *,
    thinking: bool,
    checkpoint: str | None = None,
) -> tuple[dict[str, Any], list[Sample]]:
    """
    Sample responses to the questions of a benchmark and grade them, without any file.

    Args:
        engine: from `eval.engine.start_engine`.
        thinking: the mode that the prompts were encoded with: a response whose thought does not end has no answer.
        checkpoint: adapter folder; `None` for the base model.

    Returns:
        The statistics, see `score`, and the samples in the order of the questions.

    Raises:
        ValueError: if `checkpoint` holds no usable adapter.
    """
    requests = sampling_requests(checkpoint, questions, sampling)
    batches = ([make_sample(*pair) for pair in finished] for finished in generate(engine, requests, sampling))
    graded = grade(batches, pool, thinking=thinking, method="final")
    samples = {sample.key: sample for sample in tqdm(graded, desc=checkpoint or BASE, total=len(requests))}
    return score(samples.values(), pool, thinking=thinking), [samples[request_key(request)] for request in requests]


def sequence_length(
    base_model: str,
    questions: Sequence[Question],
    max_new_tokens: int,
    limit: int | None,
    revision: str | None = None,
) -> int:
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
    positions = AutoConfig.from_pretrained(base_model, revision=revision).get_text_config().max_position_embeddings
    if longest + max_new_tokens > positions:
        raise ValueError(
            f"--max_new_tokens {max_new_tokens}: with the longest prompt of {longest} tokens more than the "
            f"{positions} positions of {base_model}; give at most {positions - longest}, or cut long samples with "
            "--max_model_len"
        )
    return longest + max_new_tokens


def write_report(
    output_file: Path,
    settings: Mapping[str, Any],
    arguments: Mapping[str, Any],
    samples: Iterable[Sample],
    pool: GradingPool,
    reference: str,
) -> str:
    """Score the samples, write `output_file`, the tables and the plot beside it; returns the tables."""
    results = score_all(samples, pool, thinking=settings["thinking"])
    differences = paired_differences(results, reference)
    table: dict[str, dict[str, float | None]] = {}  # model -> data set -> Avg@k in [0, 1]
    limits = budgets(settings["max_new_tokens"])
    for result in results:
        graded = [problem for problem in result["problems"] if None not in problem["correct"]]
        pairs = [problem["correct"] for problem in graded], [problem["num_tokens"] for problem in graded]
        result["avg_within"] = {str(limit): accuracy_within(*pairs, limit) for limit in limits} if graded else {}
        table.setdefault(result["model"], {})[result["dataset"]] = result["avg_at_k"]
    tables = report_tables(results, differences)
    plot_budgets(results, output_file.with_suffix(".budgets.png"))
    write_output(output_file, settings, arguments, table=table, differences=differences, results=results)
    replace_file(output_file.with_suffix(".md"), tables.encode())
    plot_accuracy(results, output_file.with_suffix(".png"))
    return tables


def write_output(file: Path, settings: Mapping[str, Any], arguments: Mapping[str, Any], **outcome: Any) -> None:
    """Write `output_file`: at the start of a run without `outcome`, at its end complete."""
    header = {"arguments": arguments, "settings": settings, "fingerprint": content_hash(settings)}
    report = header | {"complete": bool(outcome)} | (outcome or {"results": []})
    replace_file(file, json.dumps(report, indent=1).encode())


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s --base_model MODEL --dataset NAME ... --output_file FILE [flags]; --help explains them",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--base_model", help="folder or Hub id")
    add("--revision", help="commit, tag or branch of --base_model on the Hub (default: that of the training, or main)")
    add("--checkpoint_dir", nargs="+", default=[], help="LoRA adapter folders; also names of --base_url")
    add("--merge_adapter", **SWITCH, help="evaluate each adapter merged into a temporary copy of the base")
    add("--base_url", help="OpenAI-compatible server that samples, in place of an engine: http://HOST:PORT/v1")
    add("--skip_base", **SWITCH, help="evaluate the adapters only")
    add("--reference", default=BASE, help="the model that the others are compared with (default: %(default)s)")
    names = ", ".join(known.name for known in BENCHMARKS)
    add("--dataset", "--dataset_name", nargs="+", default=[], help=f"{names}; or Hub ids, local files or folders")
    add("--data_root", type=Path, help="folder with copies of these benchmarks under their names, in place of the Hub")
    other = "of data sets other than these benchmarks (default: %(default)s)"
    add("--dataset_split", default="train", help=other)
    add("--dataset_revision", help="commit, tag or branch on the Hub of other data sets (default: main)")
    add("--problem_column", default="problem", help=other)
    add("--answer_column", default="answer", help=f"text or numbers, {other}")
    add("--solution_column", default="solution", help=f"for --privileged, {other}")
    add("--privileged", **SWITCH, help="the teacher's prompt, with the solution: the teacher's ceiling")
    run = "default: that of the runs of --checkpoint_dir, by their run_config.json, for all models"
    add("--student_prompt", help=f"template with {{problem}} and other columns ({run})")
    add("--teacher_prompt", help=f"for --privileged, template with {{problem}} and other columns ({run})")
    add("--system_prompt", help=f"system turn before the problem ({run})")
    add("--num_samples", type=int, help="only the first so many problems of each data set (default: all)")
    for knob in fields(Sampling):
        kind = SWITCH if knob.type is bool else {"type": knob.type, "default": knob.default}
        add(f"--{knob.name}", help=knob.metadata["help"], **kind)
    thinking = SWITCH | {"dest": "thinking", "default": True}
    add("--enable_thinking", **thinking, help="thinking mode of the chat template (default: true)")
    add("--output_file", type=Path, help="JSON; its siblings are .jsonl, .md, .png (default: outputs/eval/MODEL.json)")
    add("--overwrite", **SWITCH, help="start anew in place of going on")
    judges = (
        f"{', '.join(BUILT_IN)}, or MODULE:FUNCTION from the working directory, with (completion, answer, row) -> "
    )
    run = "default: that of the runs of --checkpoint_dir, or math"
    add("--verifier", help=f"{judges}number in [0, 1] or None, of data sets other than these benchmarks ({run})")
    math = "for the verifier math (default: %(default)s)"
    add("--extract", choices=EXTRACT_METHODS, default="final", help=f"how answers are found, {math}")
    add("--grader", choices=GRADERS, default="strict", help=f"how they are compared, {math}")
    add("--grade_workers", type=int, help="processes that grade (default: as many as there are cores, at most 8)")
    add("--grade_timeout", type=float, default=10.0, help="seconds for an answer (default: %(default)s)")
    add("--regrade", type=Path, metavar="FILE", help="grade the samples of this output file anew, without an engine")
    add("--gpu_memory_utilization", type=float, help="share of the memory (default: 0.9; on a CPU 0.1)")
    add("--tensor_parallel_size", type=int, default=1, help="GPUs of an engine (default: %(default)s)")
    add("--data_parallel", type=int, default=1, help="engines, each on GPUs of its own (default: %(default)s)")
    add("--enforce_eager", **SWITCH, help="without CUDA graphs")
    add("--max_model_len", type=int, help="tokens of prompt and response (default: the longest prompt's need)")
    add("--dry_run", **SWITCH, help="check flags and local files, print the command with all settings, exit")
    return parser


def resolved_command(args: argparse.Namespace) -> str:
    """The command line with all its settings, defaults too."""
    words = ["python", "eval/evaluate_math.py"]
    settings = vars(args).copy()
    del settings["dry_run"]
    for name, value in settings.items():
        if isinstance(value, bool):
            words += ["--enable_thinking" if name == "thinking" else f"--{name}", str(value).lower()]
        elif isinstance(value, list):
            words += [f"--{name}", *value] if value else []
        elif value is not None:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def check_arguments(args: argparse.Namespace) -> tuple[Sampling, list[Benchmark], int]:
    """
    Check all that needs no Hub, and complete `args.output_file`; returns sampling, benchmarks and largest LoRA rank.

    Raises:
        ValueError, FileNotFoundError: naming the flag.
    """
    sampling = Sampling(**{knob.name: getattr(args, knob.name) for knob in fields(Sampling)})
    if args.base_model is None or not args.dataset:
        raise ValueError("give --base_model and --dataset (or --regrade with the output file of an earlier run)")
    if is_path(args.base_model) and not Path(args.base_model).is_dir():
        raise FileNotFoundError(f"--base_model {args.base_model}: no such folder; give a folder or a Hub id")
    check_model_folder(args.base_model, "base_model", "checkpoint_dir")
    models = [*([] if args.skip_base else [BASE]), *args.checkpoint_dir]
    if not models:
        raise ValueError("--skip_base: nothing to evaluate; give adapters with --checkpoint_dir")
    if args.reference != BASE and args.reference not in models:
        raise ValueError(f"--reference {args.reference}: not among the models, which are {', '.join(models)}")
    if args.base_url is not None:
        defaults = build_parser().parse_args([])
        for flag in OF_ENGINES:
            if getattr(args, flag) != getattr(defaults, flag):
                raise ValueError(f"--{flag} with --base_url: is the server's business; leave one of the two out")
    settle_revision(args)
    lora_rank = 0
    if args.base_url is None:
        adapters = [Adapter.read(folder, "checkpoint_dir") for folder in args.checkpoint_dir]
        lora_rank = 0 if args.merge_adapter else max([adapter.rank for adapter in adapters], default=0)
    given = args.verifier
    settle_prompts(args)
    find_rule(args.verifier)
    names = ("problem_column", "answer_column", "solution_column", "verifier")
    columns = {name: getattr(args, name) for name in names}
    if args.dataset_revision is not None:
        columns["revision"] = args.dataset_revision
    benchmarks = [find_benchmark(name, args.data_root, split=args.dataset_split, **columns) for name in args.dataset]
    for flag, names in (("checkpoint_dir", models), ("dataset", [benchmark.name for benchmark in benchmarks])):
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"--{flag}: {twice[0]} names two of them; each needs a name of its own")
    for flag in ("num_samples", "data_parallel", "tensor_parallel_size", "grade_workers", "grade_timeout"):
        value = getattr(args, flag)
        if value is not None and value <= 0:
            raise ValueError(f"--{flag} {value}: must be more than 0")
    gpus, needed = len(visible_devices()), args.data_parallel * args.tensor_parallel_size
    if 0 < gpus < needed:
        raise ValueError(
            f"--data_parallel {args.data_parallel}: with --tensor_parallel_size {args.tensor_parallel_size} this "
            f"takes {needed} GPUs, of which {gpus} are visible"
        )
    if given is not None and all(benchmark.verifier != given for benchmark in benchmarks):
        raise ValueError(
            f"--verifier {given}: the benchmarks among --dataset have their own, and there is no other data"
        )
    if all(benchmark.verifier != "math" for benchmark in benchmarks):
        for flag, default in (("extract", "final"), ("grader", "strict")):
            if (value := getattr(args, flag)) != default:
                raise ValueError(f"--{flag} {value}: is for the verifier math, which no data set has; leave it out")
    if args.output_file is None:
        args.output_file = Path("outputs", "eval", Path(args.base_model).name + ".json")
    check_output_file(args.output_file)
    return sampling, benchmarks, lora_rank


def settle_revision(args: argparse.Namespace) -> None:
    """
    Complete `args.revision` with that of the base model that the adapters were trained on, by their runs' records.

    Raises:
        ValueError: for a local model, and for adapters of different revisions.
    """
    if Path(args.base_model).expanduser().is_dir():
        if args.revision is not None:
            raise ValueError(f"--revision {args.revision}: the local --base_model {args.base_model} has none")
        return
    if args.revision is None:
        records = {folder: find_record(Path(folder)) for folder in args.checkpoint_dir}
        trained = {f: (r.get("model") or {}).get("model_revision") or "main" for f, r in records.items() if r}
        if len(set(trained.values())) > 1:
            lines = "".join(f"\n  {folder}: {revision}" for folder, revision in trained.items())
            raise ValueError(f"--revision: the adapters were trained on different ones:{lines}\nevaluate them apart")
        args.revision = next(iter(trained.values()), None)
        if args.revision not in (None, "main"):
            logger.warning("--revision: as in the training, %s", args.revision)


def settle_prompts(args: argparse.Namespace) -> None:
    """
    Complete prompts and verifier of `args` by those that the models were trained with; `None` is the default prompt.

    Raises:
        ValueError: for models with different ones, for a template that cannot be, and for one that nothing would use.
    """
    role, unused = ("teacher_prompt", "student_prompt") if args.privileged else ("student_prompt", "teacher_prompt")
    if getattr(args, unused) is not None:
        raise ValueError(f"--{unused}: not used {'with' if args.privileged else 'without'} --privileged; leave it out")
    prompt, refused = (TEACHER_PROMPT, set()) if args.privileged else (STUDENT_PROMPT, {"solution", "answer"})
    for flag, default in ((role, prompt), ("system_prompt", None), ("verifier", "math")):
        if getattr(args, flag) is not None:
            continue
        recorded = {}
        for folder in args.checkpoint_dir or [args.base_model]:
            if (record := find_record(Path(folder))) is not None:
                if args.privileged:
                    check_teacher(folder, record["training"])
                value = record["script"].get(flag, record["training"].get(flag))
                own = record["training"].get(f"teacher_{flag}")  # the teacher may have a system turn of its own
                recorded[folder] = (own if args.privileged and own is not None else value) or default
        if len(set(recorded.values())) > 1:
            raise ValueError(
                "\n  ".join(
                    [f"--{flag}: the models were trained with different ones:"]
                    + [f"{folder}: {value!r}" for folder, value in recorded.items()]
                )
                + "\nevaluate them one by one, or give the flag, for all of them"
            )
        setattr(args, flag, next(iter(recorded.values()), default))
        if (value := getattr(args, flag)) != default:
            logger.warning("--%s: as in the training, %r", flag, value)
    if (template := getattr(args, role)) is not None:
        check_template(role, template, {"problem"}, refused)
        setattr(args, role, None if template == prompt else template)


def check_teacher(folder: str, training: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a run whose teacher is not what `--privileged` measures: the base with the solution."""
    if (context := training.get("teacher_context", "solution")) != "solution":
        raise ValueError(
            f"--privileged: {folder} was trained with --teacher_context {context}, and this would measure a teacher "
            "that sees the solutions; give --teacher_prompt and --system_prompt if that is meant"
        )
    if (model := training.get("teacher_model_name_or_path")) is not None:
        raise ValueError(f"--privileged: {folder} was taught by another model, {model}; evaluate that as --base_model")


def check_output_file(file: Path) -> None:
    """Raise `ValueError` unless `file` can have siblings with other endings."""
    if file.is_dir():
        raise ValueError(f"--output_file {file}: is a folder; name a file")
    if file.suffix != ".json":
        raise ValueError(f"--output_file {file}: name a file that ends in .json; its samples go beside it, in .jsonl")


def describe_judge(verifier: str) -> str:
    """Return what stands behind the hash of a data set; of mathematics nothing, so that results of before go on."""
    return "" if verifier == "math" else JUDGED + describe_verifier(verifier)


def run_settings(
    args: argparse.Namespace,
    sampling: Sampling,
    questions: Mapping[str, Sequence[Question]],
    server: Server | None = None,
) -> dict[str, Any]:
    """
    Return the settings that samples and their verdicts depend on, apart from the key of the sample.

    The numbers of samples, problems, data sets, models and GPUs are not among them.
    """
    version = model_version(args.base_model, args.revision) if server is None else f"served: {server.roots[None]}"
    settings: dict[str, Any] = {"base_model": args.base_model, "base_model_version": version}
    settings |= {knob.name: getattr(sampling, knob.name) for knob in fields(Sampling)}
    del settings["val_n"], settings["greedy"]
    prompts = ("student_prompt", "teacher_prompt", "system_prompt")
    for name in (*prompts, "thinking", "privileged", "max_model_len", "extract", "grader", "grade_timeout"):
        settings[name] = getattr(args, name)
    settings |= {"data_sets": {}, "prompts": {}, "adapters": {}, "versions": package_versions()}
    for name, loaded in questions.items():
        content = content_hash([[q.problem, q.gold, q.answer_type] for q in loaded])
        settings["data_sets"][name] = content + describe_judge(loaded[0].verifier)
        settings["prompts"][name] = content_hash([question.prompt_ids for question in loaded])
    for folder in args.checkpoint_dir:
        files = [Path(folder, "adapter_config.json"), Path(folder, "adapter_model.safetensors")]
        settings["adapters"][folder] = files_hash(files) if server is None else f"served: {server.roots[folder]}"
    # Only where they say something, so that results of before go on
    if args.merge_adapter:
        settings["merge_adapter"] = True
    if server is not None:
        settings["server"] = {"url": server.url, "model": server.names[None]}
        settings["versions"] = {name: settings["versions"][name] for name in ("transformers", "math-verify")}
    return settings


def regrade(args: argparse.Namespace) -> str:
    """
    Grade the samples of an earlier run anew, into `args.output_file` or in place; returns the tables.

    Raises:
        ValueError: if there is no such run, or the output file exists.
    """
    source = args.regrade.with_suffix(".json")
    settings = stored_settings(source)
    if settings is None:
        raise ValueError(f"--regrade {args.regrade}: no output file of an earlier run")
    target = args.output_file or source
    check_output_file(target)
    if target != source and target.exists() and not args.overwrite:
        raise ValueError(f"--output_file {target}: exists; name another file, or replace it with --overwrite")
    handle, samples = open_samples(source.with_suffix(".jsonl"))
    named = {benchmark.name for benchmark in BENCHMARKS}
    for sample in samples:
        if args.verifier is not None and sample.benchmark not in named:
            check_answers(args.verifier, [sample.gold])
            sample.verifier = args.verifier
    for name, verifier in {sample.benchmark: sample.verifier for sample in samples}.items():
        settings["data_sets"][name] = settings["data_sets"][name].partition(JUDGED)[0] + describe_judge(verifier)
    settings |= {"extract": args.extract, "grader": args.grader, "grade_timeout": args.grade_timeout}
    settings["versions"] |= {"math-verify": package_versions()["math-verify"]}
    arguments = json.loads(source.read_text(encoding="utf-8"))["arguments"]
    pool = GradingPool(workers=args.grade_workers, timeout=args.grade_timeout, grader=args.grader)
    with handle, pool:
        graded = grade([samples], pool, thinking=settings["thinking"], method=args.extract)
        list(tqdm(graded, total=len(samples), desc="grading"))
        replace_file(target.with_suffix(".jsonl"), b"".join(map(sample_line, samples)))
        return write_report(target, settings, arguments, samples, pool, args.reference)


def completions(
    args: argparse.Namespace, options: Mapping[str, Any], requests: Sequence[Request], sampling: Sampling
) -> Iterator[list[tuple[Request, Completion]]]:
    """
    Start the engine or engines, and yield what they finish.

    One engine serves the base and the adapters. With --merge_adapter each adapter is merged into a temporary copy of
    the base, in its dtype, which gets an engine of its own. So is, in float32, one that vLLM does not serve, as DoRA.
    """
    adapters = {folder: Adapter.read(folder, "checkpoint_dir") for folder in args.checkpoint_dir}
    merged = [folder for folder, adapter in adapters.items() if args.merge_adapter or adapter.must_be_merged]
    for folder in merged:  # first, so that what cannot be merged is known before the base is sampled
        own = [replace(request, checkpoint=None) for request in requests if request.checkpoint == folder]
        if own:
            prompts = {tuple(request.question.prompt_ids[:MERGE_TOKENS]): None for request in own}
            dtype = torch.float32
            own_options = {**options, "lora_rank": 0, "revision": None}
            if args.merge_adapter:
                dtype = AutoConfig.from_pretrained(args.base_model, revision=args.revision).dtype or dtype
            else:
                own_options["dtype"] = "float32"
            with TemporaryDirectory(prefix="opsd-merged-") as model:
                adapters[folder].merge(args.base_model, model, [*prompts][:MERGE_PROMPTS], dtype, args.revision)
                for batch in _start_and_generate(args, model, own_options, own, sampling):
                    yield [(replace(request, checkpoint=folder), completion) for request, completion in batch]
    served = [request for request in requests if request.checkpoint not in merged]
    if served:
        modules = set().union(*(adapter.modules for folder, adapter in adapters.items() if folder not in merged))
        own_options = {**options, "lora_modules": sorted(modules)}
        yield from _start_and_generate(args, args.base_model, own_options, served, sampling)


def _start_and_generate(
    args: argparse.Namespace, model: str, options: Mapping[str, Any], requests: Sequence[Request], sampling: Sampling
) -> Iterator[list[tuple[Request, Completion]]]:
    if args.data_parallel > 1:
        yield from generate_in_parallel(args.data_parallel, model, options, requests, sampling)
    else:
        engine = start_engine(model, **options)
        yield from generate(engine, requests, sampling)
        stop_engine(engine)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: sample and grade what is missing, write the results, print the tables."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    try:  # all that can be wrong with the input, before the engine starts
        if args.regrade is not None:
            sys.stdout.write(regrade(args))
            return
        sampling, benchmarks, lora_rank = check_arguments(args)
        if args.dry_run:
            sys.stdout.write(resolved_command(args) + "\n")
            return
        check_model(args.base_model, "base_model", args.revision)
        if args.base_url is None:
            for folder in args.checkpoint_dir:
                Adapter.read(folder, "checkpoint_dir").check_base(args.base_model, revision=args.revision)
        server = None if args.base_url is None else connect(args.base_url, args.checkpoint_dir)
        stored = None if args.overwrite else stored_settings(args.output_file)
        tokenizer = AutoTokenizer.from_pretrained(args.base_model, revision=args.revision)
        date = freeze_date(tokenizer, (stored or {}).get("date"))
        mode = {"thinking": args.thinking, "privileged": args.privileged, "system_prompt": args.system_prompt}
        mode["template"] = args.teacher_prompt if args.privileged else args.student_prompt
        questions = {benchmark.name: load_questions(benchmark, tokenizer, **mode) for benchmark in benchmarks}
        chosen = [question for loaded in questions.values() for question in loaded[: args.num_samples]]
        options = {
            "lora_rank": lora_rank,
            "max_model_len": sequence_length(
                args.base_model, chosen, sampling.max_new_tokens, args.max_model_len, args.revision
            ),
            "gpu_memory_utilization": args.gpu_memory_utilization,
            "tensor_parallel_size": args.tensor_parallel_size,
            "enforce_eager": args.enforce_eager,
            "revision": args.revision,
        }
        settings = run_settings(args, sampling, questions, server) | ({} if date is None else {"date": date})
        if stored is not None:
            settings = merge_settings(stored, settings, args.output_file)
        args.output_file.parent.mkdir(parents=True, exist_ok=True)
        file, finished = open_samples(args.output_file.with_suffix(".jsonl"), args.overwrite)
    except (ValueError, OSError) as error:
        parser.error(str(error))

    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    arguments |= {"command": resolved_command(args), "hardware": describe_hardware()}
    arguments["dataset_commits"] = {
        benchmark.name: cached_commit(benchmark.path, "dataset", benchmark.revision) for benchmark in benchmarks
    }
    models: list[str | None] = [*([] if args.skip_base else [None]), *args.checkpoint_dir]
    requests = [request for model in models for request in sampling_requests(model, chosen, sampling)]
    samples = {sample.key: sample for sample in finished}
    missing = [request for request in requests if request_key(request) not in samples]
    pool = GradingPool(workers=args.grade_workers, timeout=args.grade_timeout, grader=args.grader)
    with file, pool:
        write_output(args.output_file, settings, arguments)
        if missing:
            source = (
                completions(args, options, missing, sampling)
                if server is None
                else generate_from(server, missing, sampling)
            )
            batches = ([make_sample(*pair) for pair in batch] for batch in source)
            verdicts: dict[tuple[str, str], list[bool]] = {}
            with tqdm(total=len(requests), initial=len(requests) - len(missing), unit="sample") as bar:
                for sample in grade(batches, pool, thinking=args.thinking, method=args.extract):
                    file.write(sample_line(sample))
                    samples[sample.key] = sample
                    seen = verdicts.setdefault((sample.model, sample.benchmark), [])
                    seen += [sample.correct] * (sample.correct is not None)
                    accuracy = f"{statistics.fmean(seen):.1%}" if seen else "ungraded"
                    bar.set_postfix_str(f"{sample.model}, {sample.benchmark}: {accuracy}", refresh=False)
                    bar.update()
        chosen_samples = [samples[request_key(request)] for request in requests]
        tables = write_report(args.output_file, settings, arguments, chosen_samples, pool, args.reference)
    sys.stdout.write(tables)


if __name__ == "__main__":
    main()
