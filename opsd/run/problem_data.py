"""Data sets of problems with solutions and answers, from the Hub or from local files, checked before they are used."""

import json
import logging
import re
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError

from opsd.grading import answer_text

logger = logging.getLogger(__name__)

SPLIT_FILE = re.compile(r"(train|test|validation)(?:-\d+-of-\d+)?")
LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def is_path(name: str) -> bool:
    """True for what can only be a path, and not a Hub id, by how it begins."""
    return name.startswith((".", "/", "~"))


def find_local(name: str, flag: str = "dataset_name") -> Path | None:
    """The file or folder that a data set's name means, `None` for a Hub id; `FileNotFoundError` if it is missing."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    if path.suffix in LOADERS or is_path(name):
        raise FileNotFoundError(
            f"--{flag} {name}: no such file or folder; give an existing path or the id of a Hub data set"
        )
    return None


def load_problems(name: str, split: str = "train", config: str | None = None, revision: str | None = None) -> Dataset:
    """
    Load one split of a data set.

    Args:
        name: a Hub id; or a local json, jsonl or parquet file; or a local folder of such files (searched recursively;
            where files are named after splits, as in `test-00000-of-00001.parquet`, only those of `split` are taken).
        split: name of the split. A single file is taken whole.
        config: configuration of a Hub data set.
        revision: commit, tag or branch of a Hub data set.

    Raises:
        FileNotFoundError: a path that does not exist, or a folder without any data file.
        ValueError: a file that cannot be parsed (with the line), an unknown suffix, an unknown split, an empty split.
    """
    path = find_local(name)
    if path is not None:
        dataset = _load_files(path, split)
    else:
        try:
            loaded = load_dataset(name, config, revision=revision)
        except OSError as error:  # no connection, or no such data set
            raise FileNotFoundError(
                f"--dataset_name {name}: neither a file or folder here, nor to be had from the Hub ({error})"
            ) from error
        if not isinstance(loaded, DatasetDict) or split not in loaded:
            raise ValueError(f"--dataset_split {split}: {name} has the splits {', '.join(map(str, loaded))}")
        dataset = loaded[split]
    if len(dataset) == 0:
        raise ValueError(f"--dataset_name {name}: the split {split} is empty")
    return dataset


def _load_files(path: Path, split: str) -> Dataset:
    files = [path]
    if path.is_dir():
        # `load_dataset` on the folder would take train_shuffled.jsonl, too, for a file of the split train
        files = sorted(file for file in path.rglob("*") if file.suffix in LOADERS)
        splits = {file: match[1] for file in files if (match := SPLIT_FILE.fullmatch(file.stem))}
        of_split = [file for file in files if splits.get(file, file.stem) == split]
        if splits and not of_split:
            raise ValueError(
                f"--dataset_split {split}: the folder {path} has the splits {', '.join(sorted(set(splits.values())))}"
            )
        files = of_split or files
        if not files:
            raise FileNotFoundError(f"--dataset_name {path}: the folder has no file ending in {', '.join(LOADERS)}")
    elif path.suffix not in LOADERS:
        raise ValueError(f"--dataset_name {path}: unknown suffix {path.suffix!r}; use one of {', '.join(LOADERS)}")
    if len({LOADERS[file.suffix] for file in files}) > 1:
        raise ValueError(f"--dataset_name {path}: the folder mixes parquet with json files; name one of the files")
    if all(file.stat().st_size == 0 for file in files):
        raise ValueError(f"--dataset_name {path}: the file is empty")
    loader = LOADERS[files[0].suffix]
    try:
        return load_dataset(loader, data_files=[str(file) for file in files], split="train")
    except (DatasetGenerationError, ValueError) as error:
        for file in files if loader == "json" else []:
            _check_json(file)
        reason = error.__cause__ or error
        raise ValueError(f"--dataset_name {path}: not readable as {files[0].suffix}: {reason}") from error


def _check_json(file: Path) -> None:
    """Raise `ValueError` with the line at which `file` stops being JSON: `datasets` counts within a block of 10 MB."""
    text = file.read_text(encoding="utf-8")
    # One document, or one in each line. Not `splitlines`: other line ends of Unicode may stand inside a string.
    documents = [text] if text.startswith(("[", "{\n")) else text.split("\n")
    for line, document in enumerate(documents, 1):
        try:
            json.loads(document if document.strip() else "null")
        except json.JSONDecodeError as error:
            line += error.lineno - 1
            raise ValueError(
                f"--dataset_name {file}, line {line}: not JSON ({error.msg} at column {error.colno})"
            ) from error


def check_columns(dataset: Dataset, **columns: str) -> None:
    """Raise `ValueError`, naming flag and columns, for a column that is missing; `columns`: flag -> column name."""
    for flag, column in columns.items():
        if column not in dataset.column_names:
            raise ValueError(
                f"--{flag} {column}: the data set has no such column; it has {', '.join(dataset.column_names)}"
            )


def drop_incomplete_rows(dataset: Dataset, **columns: str) -> Dataset:
    """
    Drop the rows in which one of the needed texts is missing or blank, and log how many these were.

    Args:
        dataset: rows of texts. Answers (`answer_column`) may also be numbers, and become texts.
        columns: flag name -> column name, as in `problem_column="problem"`.

    Raises:
        ValueError: a column that does not exist (naming those that do), one that does not hold text, or no row left.
    """
    check_columns(dataset, **columns)
    if (column := columns.get("answer_column")) is not None:
        try:
            answers = [answer_text(value) for value in dataset[column]]
        except TypeError as error:
            raise ValueError(f"--answer_column {column}: {error}") from error
        dataset = dataset.remove_columns(column).add_column(column, answers)
    for flag, column in columns.items():
        if dataset.features[column].dtype not in ("string", "large_string", "null"):
            raise ValueError(f"--{flag} {column}: the column does not hold text but {dataset.features[column]}")
    complete = dataset.filter(
        lambda *values: all(value is not None and value.strip() for value in values),
        input_columns=list(columns.values()),
    )
    if len(complete) == 0:
        blank = [column for column in columns.values() if not any((value or "").strip() for value in dataset[column])]
        raise ValueError(
            f"no usable row among {len(dataset)}: "
            + (f"the column {blank[0]!r} is empty in all of them" if blank else "each lacks one of the needed texts")
            + f"; choose other columns with {' and '.join('--' + flag for flag in columns)}"
        )
    if dropped := len(dataset) - len(complete):
        logger.warning(
            "left out %d of %d examples with an empty %s", dropped, len(dataset), " or ".join(columns.values())
        )
    return complete


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
