"""Data sets of problems with solutions and answers, from the Hub or from local files, checked before they are used."""

import csv
import glob
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from datasets import (
    ClassLabel,
    Dataset,
    DatasetBuilder,
    Features,
    List,
    Value,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from huggingface_hub import snapshot_download
from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

from opsd.grading import answer_text
from opsd.run.conversations import Turn, has_system_turn, split_conversation, unpack, unread_keys, with_system_prompt
from opsd.run.hub import describe_search

logger = logging.getLogger(__name__)

TABLES = (".csv", ".tsv")
SUFFIXES = (".json", ".jsonl", ".parquet", *TABLES)

CONVERSATIONS = ("messages", "conversations")  # usual names of their columns
NEEDED_TURNS = {  # flags whose columns may hold conversations
    "problem_column": "user turn, of which the last is the problem",
    "solution_column": "assistant turn after the last user turn, the solution",
}
FLAGS = ("problem_column", "solution_column", "answer_column", "answer_type_column")
HISTORY = List({"role": Value("string"), "content": Value("large_string")})


def row_name(flag: str) -> str:
    """Return the name in the rows of the column that a flag names, or of one that a template names itself."""
    return flag.removesuffix("_column") if flag in FLAGS else flag


def _call(flag: str, column: str) -> str:
    """Return what asked for a column, for messages."""
    return f"--{flag} {column}" if flag in FLAGS else f"{{{flag}}} in a prompt's template"


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
    system_prompt: str | None = None,
    composed: tuple[Callable[[dict[str, Any]], dict[str, Any]], Sequence[str]] | None = None,
) -> Dataset:
    """
    Load one split of a data set into memory, as rows of texts.

    Rows in which a needed text is missing or blank are left out. The log counts them, and problems that come again.

    Args:
        name: a Hub id; or a local json, jsonl, parquet, csv or tsv file; or a local folder, also one from
            `save_to_disk`. Its splits and configurations are those that `datasets` finds, except that a file
            `<split>.jsonl` (or another suffix) is all of that split.
        split: name of the split. A single file is taken whole.
        columns: flag -> column that needs a text in each row: of `{"problem_column": "Question"}` comes `problem`.
            Numbers become texts. The columns of problem and solution may hold conversations, see `split_conversation`;
            if that of the problem does, and there is no column `solution`, the solution comes from there, too. A
            column that is no flag's but stands in a template comes as `{name: name}`.
        optional_columns: likewise, of columns that have to exist but may be empty in a row.
        config: configuration of a folder or of a Hub data set.
        revision: commit, tag or branch of a Hub data set.
        system_prompt: the first turn of all prompts; `None` leaves those of the conversations.
        composed: what makes the needed texts of a row as it is stored, and the other columns that this takes. Classes
            come as their numbers.

    Returns:
        Rows of the columns without their `_column`, and, where there are any, of `history`: the turns before the
        problem, each with `role` and `content`.

    Raises:
        FileNotFoundError: a path that does not exist, or a folder without any data file.
        ValueError: a file that cannot be read (with the line), an unknown suffix, split, configuration or column, a
            value that is neither text nor number, no row left.
    """
    every = {**columns, **(optional_columns or {})}
    kept: dict[str, list[str | None]] = {flag: [] for flag in every}
    histories: list[list[Turn]] = []
    num_rows = 0
    names: dict[str, None] = {}  # of columns, in their order
    filled: set[str] = set()  # flags of the columns that hold a text or number
    has_conversations = False
    unread: set[str] = set()  # keys of their turns
    read = every | {column: column for column in (composed[1] if composed else ())}
    for place, row in _read_rows(_find(name, split, config, revision), read, has_classes=composed is not None):
        num_rows += 1
        if composed is not None:
            try:
                row = composed[0](row)
            except ValueError as error:
                raise ValueError(f"--dataset_name {name}: {place}: {error}") from error
        names.update(dict.fromkeys(row))
        row |= _unpack_conversations(row, every, place)
        if isinstance(turns := row.get(every["problem_column"]), list):
            has_conversations = True
            unread |= unread_keys(turns)
            if every.get("solution_column") == "solution" and "solution" not in names:
                every["solution_column"] = every["problem_column"]
        texts, history = _read_texts(row, every, place)
        filled.update(flag for flag, text in texts.items() if text is not None)
        if all(texts[flag] is not None for flag in columns):
            histories.append(history)
            for flag, text in texts.items():
                kept[flag].append(text)
    if num_rows == 0:
        raise ValueError(f"--dataset_name {name}: no rows in it")
    _check_columns(list(names), every)
    if not histories:
        blank = [every[flag] for flag in columns if flag not in filled]
        raise ValueError(
            f"no usable row among {num_rows}: "
            + (f"the column {blank[0]!r} is empty in all of them" if blank else "each lacks one of the needed texts")
            + f"; choose other columns with {' and '.join('--' + flag for flag in columns if flag in FLAGS)}"
        )
    if dropped := num_rows - len(histories):
        empty = " or ".join(dict.fromkeys(every[flag] for flag in columns))
        logger.warning("left out %d of %d examples with an empty %s", dropped, num_rows, empty)
    for flag in optional_columns or {}:
        if missing := kept[flag].count(None):
            logger.info("%d of %d examples have no %s", missing, len(histories), every[flag])
    if repeated := len(histories) - len(set(zip(kept["problem_column"], map(str, histories), strict=True))):
        logger.warning("%d of %d examples repeat the problem of another example", repeated, len(histories))
    if has_conversations:
        _log_conversations(every, histories, unread, system_prompt)
        if "system" in names and system_prompt is None:
            logger.warning("the column system is not read; --system_prompt puts a system turn into all prompts")
    histories = [with_system_prompt(history, system_prompt) for history in histories]
    data: dict[str, list] = {row_name(flag): texts for flag, texts in kept.items()}
    features: dict[str, Any] = dict.fromkeys(data, Value("large_string"))
    if any(histories):  # else without, so that the rows are those that a run of an earlier version has recorded
        data["history"], features["history"] = histories, HISTORY
    return Dataset.from_dict(data, Features(features))


def _log_conversations(
    columns: Mapping[str, str], histories: list[list[Turn]], unread: set[str], system_prompt: str | None
) -> None:
    """Say how conversations are read."""
    column, systems = columns["problem_column"], sum(map(has_system_turn, histories))
    logger.info(
        "conversations in %s: the last user turn is the problem%s; of %d, %d have a system turn%s, %d earlier turns",
        column, ", the assistant's turn after it the solution" * (columns.get("solution_column") == column),
        len(histories), systems, ", replaced by --system_prompt" * (system_prompt is not None and systems > 0),
        sum(len(history) > has_system_turn(history) for history in histories),
    )  # fmt: skip
    if unread:
        logger.warning("not read in the turns of %s: %s", column, ", ".join(sorted(unread)))


def _unpack_conversations(row: Mapping[str, Any], columns: Mapping[str, str], place: str) -> dict[str, Any]:
    """Return the columns that may hold conversations, which the cells of a table have as JSON."""
    unpacked = {}
    for flag in NEEDED_TURNS.keys() & columns.keys():
        column = columns[flag]
        if column in row:
            try:
                unpacked[column] = unpack(row[column])
            except ValueError as error:
                raise ValueError(f"--{flag} {column}: {place}: {error}") from error
    return unpacked


def _read_texts(
    row: Mapping[str, Any], columns: Mapping[str, str], place: str
) -> tuple[dict[str, str | None], list[Turn]]:
    """Return the text of each flag's column, `None` for a blank one, and the turns before the problem."""
    texts: dict[str, str | None] = {}
    history: list[Turn] = []
    for flag, column in columns.items():
        value = row.get(column)
        try:
            if flag in NEEDED_TURNS and isinstance(value, list):
                before, problem, solution = split_conversation(value) if value else ([], None, None)
                found = problem if flag == "problem_column" else solution
                history = before if flag == "problem_column" else history
                if value and found is None:
                    raise ValueError(f"no {NEEDED_TURNS[flag]}; leave the row out")
                value = found
            texts[flag] = _as_text(value, flag)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{_call(flag, column)}: {place}: {error}") from error
    return texts, history


def _find(name: str, split: str, config: str | None, revision: str | None) -> Dataset | list[Path]:
    """Return the rows of a split, or the files that they are in."""
    path = find_local(name)
    if path is not None and (revision or config and path.is_file()):
        flag, value = ("revision", revision) if revision else ("config", config)
        raise ValueError(f"--dataset_{flag} {value}: the local --dataset_name {name} has none; leave it out")
    splits: Mapping[str, Dataset | list[Path]]
    try:
        if path is None:
            splits = _find_on_hub(name, split, config, revision)
        elif path.is_file():
            splits = {split: [path]}
        elif (path / "dataset_dict.json").exists():
            splits = load_from_disk(path)
        elif (path / "state.json").exists():
            splits = {split: load_from_disk(path)}
        elif glob.has_magic(str(path.absolute())):
            raise ValueError("[, * and ? in a path make a pattern for `datasets`; rename the folder, or name a file")
        else:
            splits = _find_files(path, split, config)
    except OSError as error:
        is_local = path is not None
        where = f"nothing to read ({error})" if is_local else describe_search(name, "dataset", revision, error)
        raise FileNotFoundError(f"--dataset_name {name}: {where}") from error
    except ValueError as error:
        raise ValueError(f"--dataset_name {name}, --dataset_config {config}: {error}") from error
    if split not in splits:
        raise ValueError(f"--dataset_split {split}: {name} has the splits {', '.join(map(str, splits))}")
    return splits[split]


def _find_on_hub(
    name: str, split: str, config: str | None, revision: str | None
) -> Mapping[str, Dataset | list[Path]]:
    """Return the splits of a Hub data set; without a connection those of a copy in the cache."""
    try:
        if not _has_tables(load_dataset_builder(name, config, revision=revision)):
            return load_dataset(name, config, revision=revision)
        patterns = ["README.md", *(f"*{suffix}" for suffix in TABLES)]
        folder = snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns)
    except ConnectionError as error:  # `datasets` takes what it has built itself, not what others have downloaded
        try:
            folder = snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True)
        except IncompleteSnapshotError:
            raise
        except LocalEntryNotFoundError:
            raise error from None
        logger.warning("%s: %s; read from its copy in the cache, %s", name, error, folder)
    return _find_files(Path(folder), split, config)


def _has_tables(builder: DatasetBuilder) -> bool:
    """Return whether `_read_cells` can read all files, whose types `datasets` would guess."""
    files = [file for files in (builder.config.data_files or {}).values() for file in files]
    return bool(files) and all(str(file).endswith(TABLES) for file in files)


def _find_files(folder: Path, split: str, config: str | None) -> dict[str, list[Path]]:
    """Return the files of each split, as `datasets` finds them; `ValueError` where these may be different data."""
    card = folder / "README.md"
    is_described = card.is_file() and re.search("^configs:", card.read_text(encoding="utf-8"), re.MULTILINE)
    whole = [file for suffix in SUFFIXES if (file := folder / (split + suffix)).is_file()]
    if whole and not is_described and config is None:
        splits = {split: whole}  # `datasets` would add train_shuffled.jsonl to train.jsonl
    else:
        data_files = load_dataset_builder(str(folder), config).config.data_files
        splits = {str(name): [Path(file) for file in files] for name, files in data_files.items()}
    if is_described:
        return splits
    first: dict[str, Path] = {}
    for file in splits.get(split, []):
        if first.setdefault(file.stem, file) != file:
            raise ValueError(f"{first[file.stem]} and {file} may be different data; name one folder or file")
    read = {file.name for files in splits.values() for file in files}
    if aside := {file.name for file in folder.glob("**/[!.]*") if file.suffix in SUFFIXES} - read:
        logger.warning("%s, split %s: files that are not read: %s", folder, split, ", ".join(sorted(aside)))
    return splits


def _as_text(value: Any, flag: str) -> str | None:
    """Return a text or number as text, `None` for what is blank; `TypeError` or `ValueError` for all else."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float, np.number, type(None))):
        raise TypeError(f"neither text nor number but {type(value).__name__} {str(value)[:80]}; write it as text")
    text = answer_text(value) if flag == "answer_column" or not isinstance(value, str) else value
    if text is None or not text.strip():
        return None
    text.encode()  # half a surrogate pair is a ValueError
    return text


def _check_columns(names: list[str], columns: Mapping[str, str]) -> None:
    for flag, column in columns.items():
        if column not in names:
            message = f"{_call(flag, column)}: the data set has no such column; it has {', '.join(names)}"
            if flag == "problem_column" and (chats := [name for name in CONVERSATIONS if name in names]):
                message += f". For conversations: --problem_column {chats[0]}"
            raise ValueError(message)


def _read_rows(
    source: Dataset | list[Path], columns: Mapping[str, str], has_classes: bool = False
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield rows, each with the place where it stands. `has_classes`: numbers of classes are wanted."""
    if isinstance(source, Dataset):
        rows = source.select_columns(sorted(set(columns.values()) & set(source.column_names)))
        for column, feature in rows.features.items():
            if isinstance(feature, ClassLabel) and not has_classes:
                raise ValueError(f"column {column}: holds numbers of classes, not text: {feature}")
        floats = (Value("float16"), Value("float32"))
        narrow = {name: getattr(np, kind.dtype) for name, kind in rows.features.items() if kind in floats}
        names = source.column_names
        for index, row in enumerate(rows, 1):  # a narrow float keeps its digits as NumPy's
            exact = {column: kind(row[column]) for column, kind in narrow.items() if row[column]}
            yield f"row {index}", {name: row.get(name) for name in names} | exact
        return
    if unknown := [file for file in source if file.suffix not in SUFFIXES]:
        raise ValueError(f"{unknown[0]}: not read; name a file ending in {', '.join(SUFFIXES)}, or a folder of them")
    for file in source:
        if file.suffix != ".parquet":
            yield from _read_cells(file) if file.suffix in TABLES else _read_json(file)
            continue
        try:  # not `load_dataset`, which knows the content that it has cached by the time of the file
            needed = sorted(set(columns.values()))
            has_all = set(needed) <= set(pq.read_schema(file).names)
            table = pq.read_table(file, columns=needed if has_all else None, partitioning=None)
        except ValueError as error:
            raise ValueError(f"{file}: not readable as Parquet: {error}") from error
        yield from ((f"{file}, {place}", row) for place, row in _read_rows(Dataset(table), columns, has_classes))


def _read_json(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Yield the objects of a file, one in each line or all in one array, with their numbers as they are written.

    `datasets` settles the type of a column by the first 10 MB. Where types are mixed it puts texts into quotation
    marks, and it takes texts for dates and whole numbers for floats.
    """
    line = 0
    with file.open(encoding="utf-8-sig", newline="\n") as content:
        try:
            is_array = next((text for text in content if not text.isspace()), "").lstrip().startswith("[")
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


def _read_cells(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Yield the rows of a table, with its cells as they are written.

    `datasets` guesses types: 007 would become 7, NA and None nothing, and all numbers of a column floats if one is.
    """
    csv.field_size_limit(sys.maxsize)  # of 128 KiB, else
    line = 0
    with file.open(encoding="utf-8-sig", newline="") as content:
        rows = csv.reader(content, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
        try:
            header = [name.strip() for name in next(rows, [])]
            if len(set(header)) < len(header):
                raise ValueError(f"two columns of the same name among {', '.join(header)}")
            line = rows.line_num
            for cells in rows:
                if cells and len(cells) != len(header):
                    raise ValueError(
                        f"{len(cells)} cells, and the header has {len(header)}; put a cell with separators or line "
                        "ends between quotation marks"
                    )
                if cells:
                    yield f"{file}, line {line + 1}", dict(zip(header, cells, strict=True))
                line = rows.line_num
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}, after line {line}: not UTF-8 ({error.reason}); save it as UTF-8") from error
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{file}, line {line + 1}: not a table ({error})") from error


def _exact_float(text: str) -> float | str:
    """Return the number, or its text if a float would lose digits."""
    number = float(text)
    return number if Decimal(repr(number)) == Decimal(text) else text


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
