"""Loading of local data sets, and what is said about bad ones."""

import json
import re

import pytest
from datasets import Dataset

from opsd.run.problem_data import drop_incomplete_rows, load_problems

ROWS = [{"problem": f"{i}+1", "solution": f"\\boxed{{{i + 1}}}"} for i in range(3)]


def write_jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write(path, suffix):
    if suffix == ".jsonl":
        return write_jsonl(path / "data.jsonl")
    if suffix == ".json":
        (path / "data.json").write_text(json.dumps(ROWS, indent=1))
        return path / "data.json"
    Dataset.from_list(ROWS).to_parquet(path / "data.parquet")
    return path / "data.parquet"


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_files_and_folders(tmp_path, suffix):
    file = write(tmp_path, suffix)
    assert load_problems(str(file)).to_list() == ROWS
    assert load_problems(str(tmp_path)).to_list() == ROWS


def test_folder_with_several_splits(tmp_path):
    (tmp_path / "data").mkdir()
    Dataset.from_list(ROWS[:1]).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    Dataset.from_list(ROWS[1:]).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    assert load_problems(str(tmp_path), "train").to_list() == ROWS[:1]
    assert load_problems(str(tmp_path), "test").to_list() == ROWS[1:]


def test_split_is_a_whole_name_and_has_to_exist(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS[:1])
    write_jsonl(tmp_path / "train_shuffled.jsonl", ROWS[1:])
    assert load_problems(str(tmp_path) + "/", "train").to_list() == ROWS[:1]
    assert load_problems(str(tmp_path), "train_shuffled").to_list() == ROWS[1:]
    with pytest.raises(ValueError, match="--dataset_split test: the folder .* has the splits train"):
        load_problems(str(tmp_path), "test")


def test_neither_here_nor_on_the_hub():
    with pytest.raises(FileNotFoundError, match="--dataset_name data/mine: neither a file or folder here, nor"):
        load_problems("data/mine")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_problems(str(tmp_path / "none.jsonl"))
    with pytest.raises(FileNotFoundError, match="no file ending in"):
        load_problems(str(tmp_path))


def test_unknown_suffix(tmp_path):
    (tmp_path / "data.csv").write_text("problem,solution\n")
    with pytest.raises(ValueError, match="unknown suffix '.csv'"):
        load_problems(str(tmp_path / "data.csv"))


def test_not_json_says_the_line(tmp_path):
    file = write_jsonl(tmp_path / "data.jsonl")
    file.write_text(file.read_text() + '{"problem": "4+1", "solution\n')
    with pytest.raises(ValueError, match=re.escape(f"{file}, line 4: not JSON")):
        load_problems(str(file))
    write_jsonl(tmp_path / "lines.json")
    (tmp_path / "lines.json").write_text((tmp_path / "lines.json").read_text() + "{\n")
    with pytest.raises(ValueError, match="lines.json, line 4: not JSON"):
        load_problems(str(tmp_path / "lines.json"))
    (tmp_path / "unicode.jsonl").write_text('{"problem": "a\u2028b", "solution": "1"}\n{"problem"\n')
    with pytest.raises(ValueError, match="unicode.jsonl, line 2: not JSON"):
        load_problems(str(tmp_path / "unicode.jsonl"))
    (tmp_path / "list.json").write_text('[\n {"problem": "4+1"},\n {"problem" 3}\n]')
    with pytest.raises(ValueError, match="list.json, line 3: not JSON"):
        load_problems(str(tmp_path / "list.json"))


def test_empty_file(tmp_path):
    (tmp_path / "data.jsonl").touch()
    with pytest.raises(ValueError, match="data.jsonl: the file is empty"):
        load_problems(str(tmp_path / "data.jsonl"))
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="blank.jsonl: not readable as .jsonl"):
        load_problems(str(tmp_path / "blank.jsonl"))


def test_missing_column_names_those_that_exist():
    with pytest.raises(
        ValueError, match="--solution_column proof: the data set has no such column; it has problem, sol"
    ):
        drop_incomplete_rows(Dataset.from_list(ROWS), problem_column="problem", solution_column="proof")


def test_column_that_is_not_text():
    with pytest.raises(ValueError, match="--problem_column id: the column does not hold text"):
        drop_incomplete_rows(Dataset.from_list([{"id": 1}]), problem_column="id")


def test_blank_rows_are_left_out_and_counted(caplog):
    rows = [*ROWS, {"problem": "5+1", "solution": "  "}, {"problem": None, "solution": "6"}]
    usable = drop_incomplete_rows(Dataset.from_list(rows), problem_column="problem", solution_column="solution")
    assert usable.to_list() == ROWS
    assert "left out 2 of 5 examples" in caplog.text


def test_only_blank_solutions():
    rows = [{"problem": "1+1", "solution": ""}, {"problem": "1+2", "solution": None}]
    with pytest.raises(ValueError, match="no usable row among 2: the column 'solution' is empty in all of them"):
        drop_incomplete_rows(Dataset.from_list(rows), problem_column="problem", solution_column="solution")
