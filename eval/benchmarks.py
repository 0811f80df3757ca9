"""Benchmarks as data, and the questions with their prompts that come out of one."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any

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
from opsd.grading import check_answers
from opsd.run.problem_data import SUFFIXES, find_local, load_problems
from opsd.thinking import check_thinking_mode

ASKED = "Which choice is right? The final answer is its letter, within \\boxed{}."


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
    config: str | None = None  # configuration of the data set
    verifier: str = "math"
    # Of multiple choice. The column of a list, to which the answer is an index or a letter, in the order of the data;
    # or the columns of wrong choices beside that of the answer, in an order that follows from the problem
    choices_column: str | None = None
    wrong_columns: Sequence[str] = ()
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
    # Outside of mathematics
    Benchmark(
        "gpqa-diamond",
        "Idavidrein/gpqa",
        config="gpqa_diamond",
        problem_column="Question",
        answer_column="Correct Answer",
        wrong_columns=("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
        verifier="multiple_choice",
    ),
    Benchmark(
        "mmlu",
        "cais/mmlu",
        split="test",
        config="all",
        problem_column="question",
        choices_column="choices",
        verifier="multiple_choice",
    ),
    Benchmark(
        "mmlu-pro",
        "TIGER-Lab/MMLU-Pro",
        split="test",
        problem_column="question",
        choices_column="options",
        verifier="multiple_choice",
    ),
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
                    config = known.config if (copy / "README.md").is_file() else None  # which describes them
                    return replace(known, path=str(copy), revision=None, config=config)
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


def list_choices(benchmark: Benchmark, row: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return a row of multiple choice with the choices in the problem, and a letter as answer.

    Raises:
        ValueError: for a row without choices, or whose answer is none of them.
    """
    columns = (benchmark.answer_column, *benchmark.wrong_columns)
    for column in (benchmark.problem_column, *columns, *filter(None, [benchmark.choices_column])):
        if column not in row:
            raise ValueError(f"the data set has no column {column}; it has {', '.join(row)}")
    answer = row[benchmark.answer_column]
    if benchmark.choices_column is None:
        if empty := [column for column in columns if row[column] is None or not str(row[column]).strip()]:
            raise ValueError(f"the column {empty[0]} is empty")
        choices = [str(row[column]).strip() for column in columns]
        answer, problem = choices[0], row[benchmark.problem_column]
        if choices.count(answer) > 1:
            raise ValueError(f"the right choice is also a wrong one: {answer}")
        choices.sort(key=lambda choice: hashlib.sha256(f"{problem}\n{choice}".encode()).digest())
        place = choices.index(answer)
    else:
        choices = row[benchmark.choices_column]
        if not isinstance(choices, list) or not 2 <= len(choices) <= len(ascii_uppercase):
            raise ValueError(f"the column {benchmark.choices_column} holds {choices!r}, and no list of choices")
        is_letter = isinstance(answer, str) and len(answer) == 1 and answer in ascii_uppercase
        place = ascii_uppercase.index(answer) if is_letter else answer
        if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(choices):
            raise ValueError(f"the answer {answer!r} is none of {len(choices)} choices")
    lines = [f"({ascii_uppercase[i]}) {str(choice).strip()}" for i, choice in enumerate(choices)]
    problem = "\n\n".join([str(row[benchmark.problem_column]).strip(), "\n".join(lines), ASKED])
    return {**row, benchmark.problem_column: problem, benchmark.answer_column: ascii_uppercase[place]}


@dataclass(frozen=True)
class Question:
    """A problem with its reference answer and the token ids of its prompt."""

    benchmark: str
    index: int  # of the problem in its benchmark
    problem: str
    gold: str
    answer_type: str | None
    prompt_ids: list[int]
    verifier: str = "math"
    row: Mapping[str, str] = field(default_factory=dict)  # other texts of the data, for a verifier


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
    choices = [*benchmark.wrong_columns, *([benchmark.choices_column] if benchmark.choices_column else [])]
    composed = (partial(list_choices, benchmark), choices) if choices else None
    source = {"revision": benchmark.revision, "config": benchmark.config, "system_prompt": system_prompt}
    rows = load_problems(benchmark.path, benchmark.split, columns, composed=composed, **source)
    check_answers(benchmark.verifier, rows["answer"])
    check_history(tokenizer, rows)
    for index, row in enumerate(rows):
        content = fill_template(template, **texts_of(row))
        prompt_ids = encode_chat_prompt(tokenizer, content, thinking, row.get("history") or ())
        answer = row["answer"].strip()
        other = {
            name: text for name, text in texts_of(row).items() if name not in ("problem", "answer", "answer_type")
        }
        asked = benchmark.name, index, row["problem"], answer, row.get("answer_type"), prompt_ids
        questions.append(Question(*asked, benchmark.verifier, other))
    return questions
