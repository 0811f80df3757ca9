"""Benchmarks as data, and the questions with their prompts that come out of one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from data_collator import (
    STUDENT_PROMPT,
    TEACHER_PROMPT,
    check_chat_template,
    check_history,
    encode_chat_prompt,
    fill_template,
    placeholders,
    texts_of,
)
from opsd.run.problem_data import SUFFIXES, find_local, load_problems
from opsd.thinking import check_thinking_mode


@dataclass(frozen=True)
class Benchmark:
    """Where the problems of a benchmark are, and in which columns."""

    name: str  # in flags, seeds, files and tables
    path: str  # Hub id, or local file or folder
    split: str = "train"
    problem_column: str = "problem"
    answer_column: str = "answer"
    solution_column: str = "solution"
    answer_type_column: str | None = None
    revision: str | None = "main"  # commit, tag or branch on the Hub; none of the commits is known here
    subsets: Mapping[str, Sequence[str]] = field(default_factory=dict)  # name -> answer types, scored separately too


BENCHMARKS = (
    Benchmark("aime24", "HuggingFaceH4/aime_2024"),
    Benchmark("aime25", "yentinglin/aime_2025"),
    Benchmark("hmmt25", "MathArena/hmmt_feb_2025"),
    Benchmark(
        "amo-bench",
        "meituan-longcat/AMO-Bench",
        split="test",
        problem_column="prompt",
        answer_type_column="answer_type",
        subsets={"amo-bench-39": ("number", "set", "variable")},  # all but the descriptions
    ),
    Benchmark("math-500", "HuggingFaceH4/MATH-500", split="test"),
    Benchmark("minerva", "math-ai/minervamath", split="test", problem_column="question"),
    Benchmark("amc23", "math-ai/amc23", split="test", problem_column="question"),
    # Of after the release of Qwen3 (April 2025)
    Benchmark("beyond-aime", "ByteDance-Seed/BeyondAIME", split="test"),
    Benchmark("hmmt25-nov", "MathArena/hmmt_nov_2025"),
    Benchmark("aime26", "MathArena/aime_2026"),
    Benchmark("hmmt26", "MathArena/hmmt_feb_2026"),
    Benchmark("hmmt26-nov", "MathArena/hmmt_nov_2026"),
)


def find_benchmark(dataset: str, data_root: Path | None = None, **columns: str) -> Benchmark:
    """
    The benchmark that `dataset` means.

    Args:
        dataset: name or Hub id of one of `BENCHMARKS`, or another Hub id, or a local file or folder.
        data_root: folder with copies of `BENCHMARKS` under their names, as folder or file, in place of the Hub.
        columns: `split`, `problem_column`, `revision`, ... of a data set that is not one of `BENCHMARKS`.

    Raises:
        FileNotFoundError: if `data_root` lacks the benchmark, or a local path does not exist.
    """
    for known in BENCHMARKS:
        if dataset.lower() in (known.name, known.path.lower()):
            if data_root is None:
                return known
            for copy in (data_root / known.name, *(data_root / (known.name + suffix) for suffix in SUFFIXES)):
                if copy.exists():
                    return replace(known, path=str(copy), revision=None)
            raise FileNotFoundError(
                f"--data_root {data_root}: there is no {known.name} in it, neither a folder of that name nor a file "
                f"ending in {', '.join(SUFFIXES)}"
            )
    if (path := find_local(dataset, "dataset")) is not None:
        return Benchmark(path.resolve().stem, str(path), **{"revision": None, **columns})
    if "/" not in dataset:
        raise ValueError(
            f"--dataset {dataset}: neither a local file or folder, nor a Hub id, nor one of "
            + ", ".join(known.name for known in BENCHMARKS)
        )
    return Benchmark(dataset, dataset, **columns)


@dataclass(frozen=True)
class Question:
    """A problem with its reference answer and the token ids of its prompt."""

    benchmark: str
    index: int  # of the problem in its benchmark
    problem: str
    gold: str
    answer_type: str | None
    prompt_ids: list[int]


def load_questions(
    benchmark: Benchmark,
    tokenizer: PreTrainedTokenizerBase,
    *,
    thinking: bool,
    privileged: bool = False,
    template: str | None = None,
    system_prompt: str | None = None,
) -> list[Question]:
    """
    Load the problems of a benchmark and encode their prompts.

    Args:
        tokenizer: of the base model.
        thinking: thinking mode of the chat template.
        privileged: the teacher's prompt, with the reference solution, in place of the student's.
        template: of the prompt; `None` for the default of its role.
        system_prompt: first turn of all prompts; `None` leaves that of the data, if it has any.

    Raises:
        FileNotFoundError, ValueError: for data that cannot be used, and a tokenizer whose chat template is missing or
            has no thinking mode where one is asked for.
    """
    check_chat_template(tokenizer, "base_model")
    check_thinking_mode(tokenizer, thinking, "enable_thinking true", "enable_thinking false")
    columns = {"problem_column": benchmark.problem_column, "answer_column": benchmark.answer_column}
    template = template or (TEACHER_PROMPT if privileged else STUDENT_PROMPT)
    shown = placeholders(template)
    if "solution" in shown:
        columns["solution_column"] = benchmark.solution_column
    columns |= {name: name for name in sorted(shown - {"problem", "solution", "answer"})}
    if benchmark.answer_type_column:
        columns["answer_type_column"] = benchmark.answer_type_column
    questions = []
    source = {"revision": benchmark.revision, "system_prompt": system_prompt}
    rows = load_problems(benchmark.path, benchmark.split, columns, **source)
    check_history(tokenizer, rows)
    for index, row in enumerate(rows):
        content = fill_template(template, **texts_of(row))
        prompt_ids = encode_chat_prompt(tokenizer, content, thinking, row.get("history") or ())
        answer = row["answer"].strip()
        questions.append(Question(benchmark.name, index, row["problem"], answer, row.get("answer_type"), prompt_ids))
    return questions
