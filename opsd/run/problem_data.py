"""Data sets of problems with solutions and answers, from the Hub or from local files, checked before they are used."""

import hashlib
import inspect
import json
import logging
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features, Value, load_dataset, load_dataset_builder, load_from_disk
from datasets.exceptions import DatasetGenerationError

from opsd.grading import answer_text

logger = logging.getLogger(__name__)

SUFFIXES = (".json", ".jsonl", ".parquet")


def is_path(name: str) -> bool:
    """True for what can only be a path, and not a Hub id, by how it begins."""
    return name.startswith((".", "/", "~"))


def find_local(name: str, flag: str = "dataset_name") -> Path | None:
    """The file or folder that a data set's name means, `None` for a Hub id; `FileNotFoundError` if it is missing."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    if path.suffix in SUFFIXES or is_path(name):
        raise FileNotFoundError(
            f"--{flag} {name}: no such file or folder; give an existing path or the id of a Hub data set"
        )
    return None


def load_problems(
    name: str,
    split: str,
    columns: Mapping[str, str],
    optional_columns: Mapping[str, str] | None = None,
    config: str | None = None,
    revision: str | None = None,
) -> Dataset:
    """
    Load one split of a data set as rows of texts, cached under a hash of the content of its files.

    Rows in which a needed text is missing or blank are left out. The log says how many, and how many problems are
    equal.

    Args:
        name: a Hub id; or a local json, jsonl or parquet file; or a local folder, also one from `save_to_disk`. Its
            splits and configurations are those that `datasets` finds, except that a file `<split>.jsonl` (or `.json`,
            `.parquet`) is all of that split.
        split: name of the split. A single file is taken whole.
        columns: flag -> column that needs a text in each row: of `{"problem_column": "Question"}` comes `problem`.
            Numbers become texts; a column of numbers alone can only be an `answer_column`.
        optional_columns: likewise, of columns that have to exist but may be empty in a row.
        config: configuration of a folder or of a Hub data set.
        revision: commit, tag or branch of a Hub data set.

    Raises:
        FileNotFoundError: a path that does not exist, or a folder without any data file.
        ValueError: a file that cannot be read (with the line), an unknown suffix, split, configuration or column, a
            value that is neither text nor number, no row left.
    """
    source = _find(name, split, config, revision)
    every = {**columns, **(optional_columns or {})}
    try:
        dataset = Dataset.from_generator(
            lambda: _read_texts(source, every),
            features=Features({flag.removesuffix("_column"): Value("large_string") for flag in every}),
            fingerprint=_fingerprint(source, every),
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise ValueError(f"--dataset_name {name}: {error.__cause__}") from error
        raise
    return _drop_incomplete_rows(dataset, columns)


# From a name to files or rows


def _find(name: str, split: str, config: str | None, revision: str | None) -> Dataset | list[Path]:
    """Return the json files of a split, or the rows of any other source."""
    path = find_local(name)
    if path is not None and (revision or config and path.is_file()):
        flag, value = ("revision", revision) if revision else ("config", config)
        raise ValueError(f"--dataset_{flag} {value}: the local --dataset_name {name} has none; leave it out")
    splits: Mapping[str, Dataset | list[Path]]
    try:
        if path is None:
            splits = load_dataset(name, config, revision=revision)
        elif path.is_file():
            splits = {split: [path]}
        elif (path / "dataset_dict.json").exists():
            splits = load_from_disk(path)
        elif (path / "state.json").exists():
            splits = {split: load_from_disk(path)}
        else:
            splits = _find_files(path, split, config)
    except OSError as error:
        where = "neither a file or folder here, nor to be had from the Hub" if path is None else "nothing to read"
        raise FileNotFoundError(f"--dataset_name {name}: {where} ({error})") from error
    except ValueError as error:
        raise ValueError(f"--dataset_name {name}, --dataset_config {config}: {error}") from error
    if split not in splits:
        raise ValueError(f"--dataset_split {split}: {name} has the splits {', '.join(map(str, splits))}")
    source = splits[split]
    if isinstance(source, Dataset):
        return source
    if len(suffixes := {file.suffix for file in source}) > 1 or not suffixes <= set(SUFFIXES):
        raise ValueError(
            f"--dataset_name {name}: ends in {', '.join(sorted(suffixes))}; name files of one of {', '.join(SUFFIXES)}"
        )
    if suffixes != {".parquet"}:
        return source
    try:  # `datasets` knows a cached file by its time; the name makes it the content
        return load_dataset("parquet", _fingerprint(source, {}), data_files=list(map(str, source)), split="train")
    except (DatasetGenerationError, ValueError) as error:
        raise ValueError(f"--dataset_name {name}: not readable as .parquet: {error.__cause__ or error}") from error


def _find_files(folder: Path, split: str, config: str | None) -> dict[str, list[Path]]:
    """Return the files of each split, as `datasets` finds them; `ValueError` where these may be different data."""
    card = folder / "README.md"
    if config or card.is_file() and re.search("^configs:", card.read_text(encoding="utf-8"), re.MULTILINE):
        return _split_files(folder, config)
    if whole := [file for suffix in SUFFIXES if (file := folder / (split + suffix)).is_file()]:
        return {split: whole}  # `datasets` would add train_shuffled.jsonl to train.jsonl
    splits = _split_files(folder, None)
    first: dict[str, Path] = {}
    for file in splits.get(split, []):
        if first.setdefault(file.name, file) != file:
            raise ValueError(f"{first[file.name]} and {file} may be different data; name one folder or file")
    return splits


def _split_files(folder: Path, config: str | None) -> dict[str, list[Path]]:
    splits = load_dataset_builder(str(folder), config).config.data_files
    return {str(split): [Path(file) for file in files] for split, files in splits.items()}


def _fingerprint(source: Dataset | list[Path], columns: Mapping[str, str]) -> str:
    """Hash of the content of the source, of the columns, and of the code that reads them."""
    parts = [json.dumps(columns), inspect.getsource(answer_text), Path(__file__).read_text(encoding="utf-8")]
    if isinstance(source, Dataset):
        return hashlib.sha256("\n".join([*parts, source._fingerprint]).encode()).hexdigest()[:32]
    for file in source:
        with file.open("rb") as content:
            parts.append(hashlib.file_digest(content, "sha256").hexdigest())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


# From files or rows to texts


def _read_texts(source: Dataset | list[Path], columns: Mapping[str, str]) -> Iterator[dict[str, str | None]]:
    """Yield the needed texts of each row; a blank one is `None`."""
    names: set[str] = set()
    texts_of: set[str] = set()  # flags
    numbers_of: set[str] = set()
    for place, row in _read_rows(source, columns):
        names.update(row)
        texts = {}
        for flag, column in columns.items():
            try:
                text = _as_text(row.get(column), flag == "answer_column")
            except (TypeError, ValueError) as error:
                raise ValueError(f"--{flag} {column}: {place}: {error}") from error
            texts[flag.removesuffix("_column")] = text
            if text is not None:
                (texts_of if isinstance(row[column], str) else numbers_of).add(flag)
        yield texts
    if not names:
        raise ValueError("no rows in it")
    _check_columns(names, columns)
    if flags := numbers_of - texts_of - {"answer_column"}:
        raise ValueError(f"--{min(flags)} {columns[min(flags)]}: the column does not hold text but numbers")


def _as_text(value: Any, is_answer: bool) -> str | None:
    """Return a text or number as text, `None` for what is blank; `TypeError` or `ValueError` for all else."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float, np.number, type(None))):
        raise TypeError(f"neither text nor number but {type(value).__name__} {str(value)[:80]}; write it as text")
    text = answer_text(value) if is_answer or not isinstance(value, str) else value
    if text is None or not text.strip():
        return None
    text.encode()  # half a surrogate pair is a ValueError
    return text


def _check_columns(names: set[str], columns: Mapping[str, str]) -> None:
    for flag, column in columns.items():
        if column not in names:
            raise ValueError(f"--{flag} {column}: the data set has no such column; it has {', '.join(sorted(names))}")


def _read_rows(source: Dataset | list[Path], columns: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield rows, each with the place where it stands."""
    if not isinstance(source, Dataset):
        for file in source:
            yield from _read_json(file)
        return
    _check_columns(set(source.column_names), columns)
    rows = source.select_columns(sorted(set(columns.values())))
    narrow = {}  # floats, which keep their digits as NumPy's
    for column, feature in rows.features.items():
        if isinstance(feature, ClassLabel):
            raise ValueError(f"column {column}: holds numbers of classes, not text: {feature}")
        if feature in (Value("float16"), Value("float32")):
            narrow[column] = getattr(np, feature.dtype)
    for index, row in enumerate(rows, 1):
        yield f"row {index}", row | {column: kind(row[column]) for column, kind in narrow.items() if row[column]}


def _read_json(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Yield the objects of a file, one in each line or all in one array, with their numbers as they are written.

    `datasets` settles the type of a column by the first 10 MB. Where types are mixed it puts texts into quotation
    marks, and it takes texts for dates and whole numbers for floats.
    """
    line = 0
    with file.open(encoding="utf-8-sig", newline="\n") as content:
        try:
            is_array = content.read(80).lstrip().startswith("[")
            content.seek(0)
            for line, document in enumerate([content.read()] if is_array else content, 1):
                if document.isspace():
                    continue
                value = json.loads(document, parse_float=_exact_float)
                for index, row in enumerate(value if is_array else [value], line):
                    if not isinstance(row, dict):
                        raise ValueError("no object, and no array of objects")
                    yield f"{file}, {'row' if is_array else 'line'} {index}", row
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}, after line {line}: not UTF-8 ({error.reason}); save it as UTF-8") from error
        except (ValueError, RecursionError) as error:
            line = getattr(error, "lineno", 1) if is_array else line
            raise ValueError(f"{file}, line {line}: not JSON ({error})") from error


def _exact_float(text: str) -> float | str:
    """Return the number, or its text if a float would lose digits."""
    number = float(text)
    return number if Decimal(repr(number)) == Decimal(text) else text


# Rows to use


def _drop_incomplete_rows(dataset: Dataset, columns: Mapping[str, str]) -> Dataset:
    """Drop the rows that lack a needed text; log how many these and the equal problems are."""
    table = dataset.data.table
    needed = {column: table[flag.removesuffix("_column")] for flag, column in columns.items()}
    complete = reduce(pc.and_, map(pc.is_valid, needed.values()))
    indices = pc.indices_nonzero(complete)
    if len(indices) == 0:
        blank = [column for column, texts in needed.items() if texts.null_count == len(texts)]
        raise ValueError(
            f"no usable row among {len(dataset)}: "
            + (f"the column {blank[0]!r} is empty in all of them" if blank else "each lacks one of the needed texts")
            + f"; choose other columns with {' and '.join('--' + flag for flag in columns)}"
        )
    if dropped := len(dataset) - len(indices):
        logger.warning(
            "left out %d of %d examples with an empty %s", dropped, len(dataset), " or ".join(columns.values())
        )
        dataset = dataset.select(indices.to_pylist())
    if "problem" in dataset.column_names:
        repeated = len(indices) - pc.count_distinct(table["problem"].filter(complete)).as_py()
        if repeated:
            logger.warning("%d of %d examples repeat the problem of another example", repeated, len(indices))
    return dataset


def drop_long_rows(dataset: Dataset, max_length: int | None, flag: str) -> Dataset:
    """
    Drop the rows whose `num_tokens` is above `max_length` (`None`: no limit), and log how many these were.

    The column `num_tokens` goes, too.

    Raises:
        ValueError: no row left, naming the flag.
    """
    short = dataset.filter(lambda num: max_length is None or num <= max_length, input_columns="num_tokens")
    if len(short) == 0:
        raise ValueError(f"--{flag} {max_length}: all {len(dataset)} examples are longer; raise it")
    if dropped := len(dataset) - len(short):
        logger.warning(
            "%d of %d examples left out as longer than %d tokens (--%s)", dropped, len(dataset), max_length, flag
        )
    return short.remove_columns("num_tokens")
