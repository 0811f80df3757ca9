"""Loading of data sets: which files, which rows, which texts; and what is said about bad ones."""

import csv
import datetime
import json
import os
import re
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset, load_dataset_builder

from opsd.run import problem_data
from opsd.run.problem_data import load_problems

ROWS = [{"problem": f"{i}+1", "solution": f"\\boxed{{{i + 1}}}"} for i in range(3)]
SOLUTIONS = {"problem_column": "problem", "solution_column": "solution"}
ANSWERS = {"problem_column": "problem", "answer_column": "answer"}


def write_jsonl(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path, rows=ROWS, features=None):
    Dataset.from_list(rows, features=features).to_parquet(path)
    return path


def load(path, split="train", columns=SOLUTIONS, **settings):
    return load_problems(str(path), split, columns, **settings).to_list()


def load_answers(path):
    return [row["answer"] for row in load(path, columns=ANSWERS)]


def answers(*values):
    return [{"problem": f"p{i}", "answer": value} for i, value in enumerate(values)]


def write(path, suffix):
    if suffix == ".jsonl":
        return write_jsonl(path / "data.jsonl")
    if suffix == ".json":
        (path / "data.json").write_text(json.dumps(ROWS, indent=1))
        return path / "data.json"
    if suffix in (".csv", ".tsv"):
        return write_table(path / f"data{suffix}", [ROWS[0], *(row.values() for row in ROWS)])
    return write_parquet(path / "data.parquet")


def template(problem):
    return template.prefix + problem


def prompt_of(row):
    return {"prompt": template(row["problem"])}


def test_columns_that_templates_name(tmp_path):
    """They come under their own names; a missing one, and one that holds no text, are named with the template."""
    rows = [row | {"unit": 7, "tags": ["a"]} for row in ROWS]
    file = write_jsonl(tmp_path / "data.jsonl", rows)
    named = {"problem_column": "problem", "unit": "unit"}
    assert load(file, columns=named) == [{"problem": row["problem"], "unit": "7"} for row in ROWS]
    with pytest.raises(
        ValueError, match=r"\{hint\} in a prompt's template: the data set has no such column; it has pr"
    ):
        load(file, columns=named | {"hint": "hint"})
    with pytest.raises(
        ValueError, match=r"\{tags\} in a prompt's template: .*line 1: neither text nor number but list"
    ):
        load(file, columns=named | {"tags": "tags"})


# Files of a folder


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet", ".csv", ".tsv"])
def test_files_and_folders(tmp_path, suffix):
    file = write(tmp_path, suffix)
    assert load(file) == ROWS
    assert load(tmp_path) == ROWS


@pytest.mark.parametrize(
    "names",
    [
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("train/0000.parquet", "test/0000.parquet"),
        ("train-00000-of-00002-9f8e7d6c5b4a3f2e.parquet", "test-00000-of-00001-0a1b2c3d4e5f6a7b.parquet"),
        ("math_train.jsonl", "math_test.jsonl"),
        ("part/training/a.jsonl", "part/eval/a.jsonl"),
        ("train.jsonl", "test.jsonl"),
    ],
)
def test_splits_of_a_folder_are_not_mixed(tmp_path, names):
    for name, rows in zip(names, (ROWS[:1], ROWS[1:]), strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (write_parquet if name.endswith("parquet") else write_jsonl)(tmp_path / name, rows)
    assert load(tmp_path, "train") == ROWS[:1]
    assert load(tmp_path, "test") == ROWS[1:]
    with pytest.raises(ValueError, match="--dataset_split dev: .* has the splits train, test"):
        load(tmp_path, "dev")


def test_a_file_named_after_the_split_is_the_split(tmp_path, caplog):
    write_jsonl(tmp_path / "train.jsonl", ROWS[:1])
    write_jsonl(tmp_path / "train_shuffled.jsonl", ROWS[1:])
    assert load(f"{tmp_path}/", "train") == ROWS[:1]
    assert "split train: files that are not read: train_shuffled.jsonl" in caplog.text
    assert load(tmp_path, "train_shuffled") == ROWS[1:]
    with pytest.raises(ValueError, match="--dataset_split test: .* has the splits train"):
        load(tmp_path, "test")


def test_configurations_of_a_folder(tmp_path):
    for name, rows in (("main", ROWS[:1]), ("socratic", ROWS[1:])):
        write_jsonl(tmp_path / name / "train-00000-of-00001.jsonl", rows)
    with pytest.raises(ValueError, match="main/train.* and .*socratic/train.* may be different data"):
        load(tmp_path)
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n"
        for name in ("main", "socratic")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n# Problems\n")
    assert load(tmp_path, config="main") == ROWS[:1]
    assert load(tmp_path, config="socratic") == ROWS[1:]
    with pytest.raises(ValueError, match=r"(?s)--dataset_config None: .*main.*socratic"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"--dataset_config other: .*not found.*main.*socratic"):
        load(tmp_path, config="other")


def test_configuration_and_revision_are_not_ignored(tmp_path):
    file = write_jsonl(tmp_path / "data.jsonl")
    with pytest.raises(ValueError, match="--dataset_config main: the local --dataset_name .*data.jsonl has none"):
        load(file, config="main")
    with pytest.raises(ValueError, match="--dataset_config main: .*not found"):
        load(tmp_path, config="main")
    with pytest.raises(ValueError, match="--dataset_revision v2: the local --dataset_name .* has none"):
        load(tmp_path, revision="v2")


def test_names_of_folders_are_no_patterns(tmp_path):
    """`datasets` would read the rows of the folder that the name matches."""
    for folder in ("a[1]", "a1"):
        write_jsonl(tmp_path / folder / "train-0.jsonl")
        write_jsonl(tmp_path / folder / "train.jsonl")
    with pytest.raises(ValueError, match=r"--dataset_name .*a\[1\].* make a pattern .* rename the folder"):
        load(tmp_path / "a[1]")
    assert load(tmp_path / "a[1]" / "train.jsonl") == ROWS


def test_hidden_files_are_not_data(tmp_path):
    write_jsonl(tmp_path / "data.jsonl", ROWS[:1])
    write_jsonl(tmp_path / ".cache" / "data.jsonl")
    write_jsonl(tmp_path / "a" / ".ipynb_checkpoints" / "data-checkpoint.jsonl")
    (tmp_path / "._data.jsonl").write_bytes(b"\0\5\26\7")
    assert load(tmp_path) == ROWS[:1]


def test_formats_side_by_side(tmp_path, caplog):
    write_jsonl(tmp_path / "a.jsonl", ROWS[:1])
    write_parquet(tmp_path / "b.parquet", ROWS[1:])
    assert load(tmp_path) == ROWS[1:]  # `datasets` takes one format
    assert "files that are not read: a.jsonl" in caplog.text
    write_parquet(tmp_path / "a.parquet", ROWS[:1])
    assert load(tmp_path) == ROWS
    write_jsonl(tmp_path / "train.jsonl", ROWS[:1])
    write_parquet(tmp_path / "train.parquet", ROWS[1:])
    with pytest.raises(ValueError, match="train.jsonl and .*train.parquet may be different data"):
        load(tmp_path)


def test_folders_from_save_to_disk(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert load(tmp_path / "one") == ROWS
    splits = {"train": Dataset.from_list(ROWS[:1]), "test": Dataset.from_list(ROWS[1:])}
    DatasetDict(splits).save_to_disk(tmp_path / "several")
    assert load(tmp_path / "several", "test") == ROWS[1:]
    with pytest.raises(ValueError, match="--dataset_split dev: .* has the splits train, test"):
        load(tmp_path / "several", "dev")


def test_neither_here_nor_on_the_hub():
    with pytest.raises(FileNotFoundError, match="--dataset_name data/mine: not found. Looked for: a file or folder"):
        load("data/mine")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match="--dataset_name .*: nothing to read"):
        load(tmp_path)


def test_unknown_suffix(tmp_path):
    (tmp_path / "data.txt").write_text("problem,solution\n")
    for path in (tmp_path / "data.txt", tmp_path):
        with pytest.raises(ValueError, match="data.txt: not read; name a file ending in .json, .jsonl"):
            load(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_new_content_is_read_whatever_its_time(tmp_path, suffix):
    file = tmp_path / f"data{suffix}"
    for rows in (ROWS[:1], ROWS[1:2], ROWS):  # the same size, then another
        (write_parquet if suffix == ".parquet" else write_jsonl)(file, rows)
        os.utime(file, (1e9, 1e9))
        assert load(file) == rows
        assert load(tmp_path) == rows


def test_prompts_are_encoded_anew_in_each_run(tmp_path):
    """The hash that `datasets` makes of a function does not see a template or a function elsewhere that changes."""
    file = write_jsonl(tmp_path / "data.jsonl")
    for prefix in ("a", "b"):
        template.prefix = prefix
        rows = load_problems(str(file), "train", SOLUTIONS).map(prompt_of)
        assert rows[0]["prompt"] == prefix + ROWS[0]["problem"]


# Values


def test_texts_stay_as_they_are_where_types_are_mixed(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", answers("x+1", "2024-01-02"))
    write_jsonl(tmp_path / "b.jsonl", answers("y+2", 5, r"\frac{1}{2}", '"quoted"', "null", None, " "))
    assert load_answers(tmp_path) == ["x+1", "2024-01-02", "y+2", "5", r"\frac{1}{2}", '"quoted"', "null"]
    rows = [
        {"problem": "p", "solution": "s"},
        {"problem": 7, "solution": 'it is\n"3"'},
        {"problem": "q", "solution": 1},
    ]
    expected = [{name: str(value) for name, value in row.items()} for row in rows]
    assert load(write_jsonl(tmp_path / "c.jsonl", rows)) == expected


def test_dates_are_texts(tmp_path):
    texts = ["2024-01-02", "2024-01-02 10:00:00", "2024-01-02T10:00:00Z"]
    assert load_answers(write_jsonl(tmp_path / "dates.jsonl", answers(*texts))) == texts


def test_types_that_change_after_10_mb(tmp_path):
    """A column that nobody needs, a key that comes late, and null, text, integers and floats in the answers."""
    filler = [{"problem": f"p{i}", "answer": None, "other": i, "pad": "x" * 10_000} for i in range(1100)]
    late = [{"problem": f"q{i}", "answer": value, "other": "text"} for i, value in enumerate((1, "x+1", 0.5, r"\pi"))]
    file = write_jsonl(tmp_path / "data.jsonl", filler + late)
    assert load_answers(file) == ["1", "x+1", "0.5", r"\pi"]
    for row in filler:
        del row["answer"]
    assert load_answers(write_jsonl(file, filler + late)) == ["1", "x+1", "0.5", r"\pi"]


def test_numbers_of_json_are_exact(tmp_path):
    numbers = ["12345678901234567890123", "9007199254740993", "0.5", "25.0", "1e5"]
    numbers += ["0.1234567890123456789012", "1e400", "-0.0"]
    file = tmp_path / "data.json"
    file.write_text(json.dumps(answers(*(f"<{n}>" for n in numbers))).replace('"<', "").replace('>"', ""))
    assert load_answers(file) == [*numbers[:3], "25", "100000", *numbers[5:7], "0"]
    file.write_text(json.dumps(answers("<" + "9" * 5000 + ">")).replace('"<', "").replace('>"', ""))
    with pytest.raises(ValueError, match="line 1: .*limit"):
        load_answers(file)


@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
def test_floats_that_have_lost_digits_are_refused(tmp_path, kind):
    features = Features(problem=Value("string"), answer=Value(kind))
    rows = answers(0.5, 0.25, None, float("nan"))
    assert load_answers(write_parquet(tmp_path / "a.parquet", rows, features)) == ["0.5", "0.25"]
    whole = float(2 ** (np.finfo(kind).nmant + 2))
    if whole < np.finfo(kind).max:
        with pytest.raises(ValueError, match="--answer_column answer: .*, row 1: .*not exact; write it as text"):
            load_answers(write_parquet(tmp_path / "b.parquet", answers(whole), features))


def test_parquet_with_numbers_in_one_file_and_texts_in_the_other(tmp_path):
    write_parquet(tmp_path / "a.parquet", answers("x+1"))
    write_parquet(tmp_path / "b.parquet", answers(12345678901234567))
    assert load_answers(tmp_path) == ["x+1", "12345678901234567"]


def test_types_of_parquet(tmp_path):
    file, problems = tmp_path / "data.parquet", pa.array(["p", "q"], pa.large_string())
    for values in (
        pa.array(["1", "7"], pa.large_string()).dictionary_encode(),
        pa.array(["1", "7"], pa.string_view()),
        pa.array([1, 7], pa.uint64()),
        pa.array([1, 7], pa.int8()),
    ):
        pq.write_table(pa.table({"problem": problems, "answer": values}), file)
        assert load_answers(file) == ["1", "7"]
    for value, name in ((datetime.date(2024, 1, 2), "date"), (Decimal("0.5"), "Decimal"), (b"1", "bytes")):
        pq.write_table(pa.table({"problem": ["p"], "answer": [value]}), file)
        with pytest.raises(ValueError, match=f"--answer_column answer: .*row 1: neither text nor number but {name}"):
            load_answers(file)


@pytest.mark.parametrize("value", [{"role": "user", "content": "1+1"}, {"text": "1+1"}, True])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_values_that_are_no_text_are_refused(tmp_path, value, suffix):
    file = tmp_path / f"data{suffix}"
    (write_parquet if suffix == ".parquet" else write_jsonl)(file, [{"problem": value, "solution": "2"}])
    name = re.escape(type(value).__name__)
    with pytest.raises(ValueError, match=f"--problem_column problem: .*1: neither text nor number but {name} "):
        load(file)


def test_classes_are_not_taken_for_numbers(tmp_path):
    features = Features(problem=Value("string"), answer=ClassLabel(names=["A", "B"]))
    file = write_parquet(tmp_path / "data.parquet", answers("B"), features)
    with pytest.raises(ValueError, match="column answer: holds numbers of classes, not text"):
        load_answers(file)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_numbers_are_texts_in_any_column(tmp_path, suffix):
    """As they are written where the file says it; no whole number of a column of floats has a decimal point."""
    file, columns = tmp_path / f"data{suffix}", {"problem_column": "n", "solution_column": "double"}
    rows = [{"n": n, "double": 2 * n} for n in (3.0, 0.25, 1e-7, 12345678901)]
    (write_parquet if suffix == ".parquet" else write_jsonl)(file, rows)
    texts = [("3", "6"), ("0.25", "0.5"), ("1e-07", "2e-07"), ("12345678901", "24691357802")]
    assert [(row["problem"], row["solution"]) for row in load(file, columns=columns)] == texts
    (write_parquet if suffix == ".parquet" else write_jsonl)(file, [{"n": 2.0**60, "double": 1}])
    with pytest.raises(ValueError, match="--problem_column n: .*1: .*not exact; write it as text"):
        load(file, columns=columns)


def test_one_column_may_have_two_roles(tmp_path):
    file = write_jsonl(tmp_path / "data.jsonl", answers("1", "2"))
    columns = ANSWERS | {"solution_column": "answer"}
    assert [row["solution"] for row in load(file, columns=columns)] == load_answers(file)


# Tables


TEXTS = ["007", "1,000", "NA", "None", "3.0", "1e5", "true", "2024-01-02", r"\frac{1}{2}", 'so "it" is\n\n3', " x"]


def write_table(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_cells_of_a_table_are_the_texts_that_they_are(tmp_path, suffix):
    rows = [["", "problem", "answer"], *([i, f"p{i}", text] for i, text in enumerate(TEXTS))]
    file = write_table(tmp_path / f"data{suffix}", rows)
    assert load_answers(file) == load_answers(tmp_path) == TEXTS
    numbers = {"problem_column": "", "solution_column": "answer"}  # the first column is the index that pandas writes
    assert load(file, columns=numbers)[0] == {"problem": "0", "solution": "007"}


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_empty_cells_are_blank(tmp_path, caplog, suffix):
    rows = [["problem", "answer"], ["p0", ""], ["p1", "0"], [], ["p2", " "], ["", "5"]]
    assert load_answers(write_table(tmp_path / f"data{suffix}", rows)) == ["0"]
    assert "left out 3 of 4 examples with an empty problem or answer" in caplog.text


def test_tables_in_folders_have_splits(tmp_path):
    head = ["problem", "answer"]
    write_table(tmp_path / "train.csv", [head, ["p0", "01"]])
    write_table(tmp_path / "test.csv", [head, ["p1", "02"]])
    assert load(tmp_path, "test", ANSWERS) == [{"problem": "p1", "answer": "02"}]
    write_table(tmp_path / "train.tsv", [head, ["p0", "01"]])
    with pytest.raises(ValueError, match="train.csv and .*train.tsv may be different data"):
        load(tmp_path, "train", ANSWERS)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_tables_of_the_hub_are_read_as_local_ones(tmp_path, monkeypatch, suffix):
    """Stands for the Hub: a folder, whose files are links as in its cache."""
    rows, hub, cache, builder = answers("007", "NA"), tmp_path / "hub", tmp_path / "cache", load_dataset_builder
    hub.mkdir()
    cache.mkdir()
    if suffix == ".jsonl":
        write_jsonl(hub / "train.jsonl", rows)
    else:
        write_table(hub / f"train{suffix}", [rows[0], *(row.values() for row in rows)])
        write_table(hub / f"test{suffix}", [rows[0], *(row.values() for row in rows[:1])])

    def download(name, repo_type, revision, allow_patterns):
        assert (name, repo_type, revision, suffix != ".jsonl") == ("someone/sums", "dataset", "v1", True)
        for file in hub.iterdir():
            assert any(file.match(pattern) for pattern in allow_patterns)
            (cache / file.name).symlink_to(file)
        return str(cache)

    monkeypatch.setattr(
        problem_data,
        "load_dataset_builder",
        lambda name, *args, **kwargs: builder(str(hub) if name == "someone/sums" else name),
    )
    monkeypatch.setattr(problem_data, "load_dataset", lambda name, *args, **kwargs: load_dataset(str(hub)))
    monkeypatch.setattr(problem_data, "snapshot_download", download)
    read = load("someone/sums", columns=ANSWERS, revision="v1")
    assert [row["answer"] for row in read] == ["007", "NA"]


def test_long_cells_and_byte_order_marks(tmp_path):
    file, long = tmp_path / "data.csv", "12+34=46. " * 30_000  # above the limit of Python's reader
    write_table(file, [["problem", "answer"], ["p", long]])
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_answers(file) == [long]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("problem,answer\np,1\nWhat is 1, 2?,3\n", "line 3: not a table (3 cells, and the header has 2; put a cell"),
        ('problem,answer\n"two\nlines",1\np\n', "line 4: not a table (1 cells, and the header has 2"),
        ('problem,answer\np,1\n"q,2\n', "line 3: not a table (unexpected end of data"),
        ('problem,answer\n"a"b,1\n', "line 2: not a table ("),
        ("problem,answer,answer\np,1,2\n", "line 1: not a table (two columns of the same name among problem, answer"),
        ("problem;answer\np;1\n", "--problem_column problem: the data set has no such column; it has problem;answer"),
        ("problem,answer\n", "data.csv: no rows in it"),
        ("", "data.csv: no rows in it"),
    ],
)
def test_faults_of_a_table_are_named(tmp_path, text, message):
    (tmp_path / "data.csv").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_answers(tmp_path / "data.csv")


# Conversations


def conversation(*texts, form="messages", system=None):
    """User and assistant by turns."""
    names = {"messages": ("role", "content", "user", "assistant"), "sharegpt": ("from", "value", "human", "gpt")}
    who, what, *speakers = names[form]
    turns = [{who: speakers[i % 2], what: text} for i, text in enumerate(texts)]
    return ([{who: "system", what: system}] if system is not None else []) + turns


MESSAGES = {"problem_column": "messages", "solution_column": "solution"}
HISTORY = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
TUTOR = {"role": "system", "content": "You teach."}


@pytest.mark.parametrize("form", ["messages", "sharegpt"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_problem_and_solution_of_conversations(tmp_path, suffix, form):
    """The last two turns; what comes before them stays, for the prompts."""
    chats = [
        conversation("1+1?", "2", form=form),
        conversation("Hello", "Good day", "1+2?", "3", form=form, system="You teach."),
    ]
    file = tmp_path / f"data{suffix}"
    (write_parquet if suffix == ".parquet" else write_jsonl)(file, [{"messages": chat, "id": 0} for chat in chats])
    first, second = load(file, columns=MESSAGES)
    assert first == {"problem": "1+1?", "solution": "2", "history": []}
    assert second == {"problem": "1+2?", "solution": "3", "history": [TUTOR, *HISTORY]}
    (row,) = load(file, columns={"problem_column": "messages"}, system_prompt="Be brief.")[1:]
    assert row == {"problem": "1+2?", "history": [TUTOR | {"content": "Be brief."}, *HISTORY]}


def test_conversations_without_earlier_turns_are_as_texts(tmp_path):
    chats = [{"messages": conversation(row["problem"], row["solution"])} for row in ROWS]
    assert load(write_jsonl(tmp_path / "data.jsonl", chats), columns=MESSAGES) == ROWS
    texts = write_jsonl(tmp_path / "texts.jsonl")
    (first, *_) = load(texts, system_prompt="Be brief.")
    assert first == ROWS[0] | {"history": [TUTOR | {"content": "Be brief."}]}


def test_a_solution_column_wins_over_the_conversation(tmp_path):
    row = {"messages": conversation("1+1?", "2"), "solution": "two", "proof": "II"}
    file = write_jsonl(tmp_path / "data.jsonl", [row])
    for column, solution in (("solution", "two"), ("proof", "II"), ("messages", "2")):
        assert load(file, columns=MESSAGES | {"solution_column": column}) == [
            {"problem": "1+1?", "solution": solution}
        ]
    with pytest.raises(ValueError, match="--solution_column other: the data set has no such column"):
        load(file, columns=MESSAGES | {"solution_column": "other"})


def test_a_conversation_may_end_with_the_problem_where_no_solution_is_needed(tmp_path):
    file = write_jsonl(tmp_path / "data.jsonl", [{"messages": conversation("Hello", "Good day", "1+2?"), "answer": 3}])
    columns = {"problem_column": "messages", "answer_column": "answer"}
    assert load(file, columns=columns) == [{"problem": "1+2?", "answer": "3", "history": HISTORY}]
    with pytest.raises(
        ValueError, match="--solution_column messages: .*, line 1: no assistant turn after the last user turn"
    ):
        load(file, columns=MESSAGES)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([{"role": "assistant", "content": "2"}], "no user turn"),
        ([{"role": "system", "content": "2"}], "no user turn"),
        (
            conversation("1+1?", "2") + [{"role": "assistant", "content": "3"}],
            "the last user turn is followed by assistant, assistant; it needs one assistant turn",
        ),
        (
            conversation("1+1?", "2") + [{"role": "tool", "content": "3"}],
            "turn 3 has the role 'tool', and only system",
        ),
        ([{"role": None, "content": "2"}], "turn 1 has the role None"),
        ([{"role": "user", "content": [{"type": "text", "text": "1"}]}], "turn 1 has as content a list of parts"),
        ([{"role": "user", "content": None}], "turn 1 has as content NoneType, not text"),
        (
            [{"role": "user", "content": "1", "tool_calls": [{"name": "add"}]}],
            "turn 1 has tool_calls, which no prompt can hold; leave the row out",
        ),
        (["1+1"], "turn 1 is str, not an object with role and content: 1+1"),
    ],
)
def test_conversations_that_cannot_be_read_are_named(tmp_path, suffix, turns, message):
    file = tmp_path / f"data{suffix}"
    (write_parquet if suffix == ".parquet" else write_jsonl)(file, [{"messages": turns}])
    place = "row 1" if suffix == ".parquet" else "line 1"
    with pytest.raises(ValueError, match=rf"--problem_column messages: .*{place}: " + re.escape(message)):
        load(file, columns=MESSAGES)


def test_conversations_in_the_cells_of_a_table(tmp_path):
    chats = [conversation("1+1?", "2"), conversation("[{1}]", "3", form="sharegpt", system="You teach.")]
    file = write_table(tmp_path / "data.csv", [["messages"], *([json.dumps(chat)] for chat in chats)])
    assert load(file, columns=MESSAGES) == [
        {"problem": "1+1?", "solution": "2", "history": []},
        {"problem": "[{1}]", "solution": "3", "history": [TUTOR]},
    ]
    write_table(file, [["messages"], [str(chats[0])]])  # as pandas writes it
    with pytest.raises(ValueError, match="--problem_column messages: .*line 2: looks like a conversation and"):
        load(file, columns=MESSAGES)
    write_table(file, [["problem", "solution"], ["[{1}, {2}]", '["role"]']])
    assert load(file) == [{"problem": "[{1}, {2}]", "solution": '["role"]'}]


def test_prompt_and_completion_in_two_columns(tmp_path):
    row = {"prompt": conversation("Hello", "Good day", "1+2?"), "completion": [{"role": "assistant", "content": "3"}]}
    file = write_jsonl(tmp_path / "data.jsonl", [row])
    columns = {"problem_column": "prompt", "solution_column": "completion"}
    assert load(file, columns=columns) == [{"problem": "1+2?", "solution": "3", "history": HISTORY}]
    with pytest.raises(ValueError, match="--problem_column completion: .*line 1: no user turn, of which the last is"):
        load(file, columns=columns | {"problem_column": "completion"})


def test_empty_conversations_are_left_out_and_unread_keys_named(tmp_path, caplog):
    chats = [[], None, [turn | {"name": "Ann"} for turn in conversation("1+1?", "2")], conversation("1+1?", " ")]
    rows = load(write_jsonl(tmp_path / "data.jsonl", [{"messages": chat} for chat in chats]), columns=MESSAGES)
    assert rows == [{"problem": "1+1?", "solution": "2"}]
    assert "left out 3 of 4 examples with an empty messages" in caplog.text
    assert "not read in the turns of messages: name" in caplog.text
    assert "the column system" not in caplog.text


def test_a_column_of_system_prompts_beside_conversations_is_named(tmp_path, caplog):
    rows = [{"messages": conversation("1+1?", "2"), "system": "You teach."}]
    for suffix, write_rows in ((".jsonl", write_jsonl), (".parquet", write_parquet)):
        caplog.clear()
        file = write_rows(tmp_path / f"data{suffix}", rows)
        assert len(load(file, columns=MESSAGES)) == 1
        assert "the column system is not read; --system_prompt" in caplog.text
        assert load(file, columns=MESSAGES, system_prompt="Be brief.")[0]["history"][0]["content"] == "Be brief."


def test_equal_problems_after_other_turns_are_not_repeated(tmp_path, caplog):
    chats = [conversation("Go on", "1"), conversation("a", "b", "Go on", "2"), conversation("c", "d", "Go on", "3")]
    load(write_jsonl(tmp_path / "data.jsonl", [{"messages": chat} for chat in chats]), columns=MESSAGES)
    assert "repeat" not in caplog.text
    load(write_jsonl(tmp_path / "data.jsonl", [{"messages": chat} for chat in chats * 2]), columns=MESSAGES)
    assert "3 of 6 examples repeat the problem" in caplog.text


# Files that cannot be read


def test_not_json_says_the_line(tmp_path):
    file = write_jsonl(tmp_path / "data.jsonl")
    file.write_text(file.read_text() + '{"problem": "4+1", "solution\n')
    with pytest.raises(ValueError, match=re.escape(f"{file}, line 4: not JSON")):
        load(file)
    write_jsonl(tmp_path / "lines.json")
    (tmp_path / "lines.json").write_text((tmp_path / "lines.json").read_text() + "{\n")
    with pytest.raises(ValueError, match="lines.json, line 4: not JSON"):
        load(tmp_path / "lines.json")
    (tmp_path / "unicode.jsonl").write_text('{"problem": "a\u2028b", "solution": "1"}\n{"problem"\n')
    with pytest.raises(ValueError, match="unicode.jsonl, line 2: not JSON"):
        load(tmp_path / "unicode.jsonl")
    (tmp_path / "list.json").write_text('[\n {"problem": "4+1"},\n {"problem" 3}\n]')
    with pytest.raises(ValueError, match="list.json, line 3: not JSON"):
        load(tmp_path / "list.json")


@pytest.mark.parametrize("text", ['"text"\n', "[1, 2]", '{"a": ' + "[" * 100_000 + "\n"])
def test_json_that_is_no_row(tmp_path, text):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(ValueError, match="data.json, line 1: not JSON"):
        load(tmp_path / "data.json")


@pytest.mark.parametrize(("encoding", "text"), [("utf-16", "é"), ("latin-1", "é"), ("cp932", "数学")])
def test_other_encodings_are_named(tmp_path, encoding, text):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(ROWS[0] | {"problem": text}, ensure_ascii=False) + "\n", encoding=encoding)
    (tmp_path / "data.csv").write_text(f"problem,solution\n{text},1\n", encoding=encoding)
    for name in ("data.jsonl", "data.csv"):
        with pytest.raises(ValueError, match=rf"{name}, after line \d: not UTF-8 .*; save it as UTF-8"):
            load(tmp_path / name)


def test_half_of_a_surrogate_pair_is_named(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"problem": "1", "solution": "\\ud835"}\n')
    with pytest.raises(ValueError, match="--solution_column solution: .*data.jsonl, line 1: .*surrogates"):
        load(file)


def test_byte_order_marks_line_ends_and_blank_lines(tmp_path):
    lines = [json.dumps(row) for row in [*ROWS, {"problem": "a\u2028b", "solution": "1"}]]
    (tmp_path / "data.jsonl").write_bytes("\r\n\r\n".join(lines).encode("utf-8-sig"))
    assert load(tmp_path / "data.jsonl")[:3] == ROWS
    (tmp_path / "data.json").write_bytes(("\n" * 100 + " [" + ",".join(lines) + "]").encode("utf-8-sig"))
    assert load(tmp_path / "data.json")[3]["problem"] == "a\u2028b"


def test_empty_file(tmp_path):
    for text in ("", "\n\n", "[]"):
        (tmp_path / "data.json").write_text(text)
        with pytest.raises(ValueError, match="data.json: no rows in it"):
            load(tmp_path / "data.json")


def test_not_parquet(tmp_path):
    (tmp_path / "data.parquet").write_text("{}")
    with pytest.raises(ValueError, match="data.parquet: not readable as Parquet: .*footer"):
        load(tmp_path / "data.parquet")


# Rows


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_missing_column_names_those_that_exist(tmp_path, suffix):
    with pytest.raises(
        ValueError, match="--solution_column proof: the data set has no such column; it has problem, sol"
    ):
        load(write(tmp_path, suffix), columns=SOLUTIONS | {"solution_column": "proof"})


def test_missing_problems_beside_conversations_say_how_to_read_them(tmp_path):
    for name in ("messages", "conversations"):
        file = write_jsonl(tmp_path / f"{name}.jsonl", [{name: conversation("1+1?", "2"), "id": 0}])
        with pytest.raises(ValueError, match=rf"it has {name}, id\. For conversations: --problem_column {name}$"):
            load(file)


def test_blank_rows_are_left_out_and_counted(tmp_path, caplog):
    rows = [*ROWS, {"problem": "5+1", "solution": "  "}, {"problem": None, "solution": "6"}]
    assert load(write_jsonl(tmp_path / "data.jsonl", rows)) == ROWS
    assert "left out 2 of 5 examples with an empty problem or solution" in caplog.text


def test_optional_columns_may_be_empty(tmp_path):
    file = write_jsonl(tmp_path / "data.jsonl", [*answers("1", None), {"problem": "p2"}])
    columns, optional = {"problem_column": "problem"}, {"answer_column": "answer"}
    assert [row["answer"] for row in load(file, columns=columns, optional_columns=optional)] == ["1", None, None]


def test_only_blank_solutions(tmp_path):
    rows = [{"problem": "1+1", "solution": ""}, {"problem": "1+2", "solution": None}]
    with pytest.raises(ValueError, match="no usable row among 2: the column 'solution' is empty in all of them"):
        load(write_jsonl(tmp_path / "data.jsonl", rows))


def test_equal_problems_are_counted(tmp_path, caplog):
    file = write_jsonl(tmp_path / "data.jsonl", [*ROWS, {"problem": ROWS[0]["problem"], "solution": None}])
    load(file)
    assert "repeat" not in caplog.text  # the row without a solution is not used
    load(write_jsonl(file, [*ROWS, *ROWS[:2]]))
    assert "2 of 5 examples repeat the problem of another example" in caplog.text
