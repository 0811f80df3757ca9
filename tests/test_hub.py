"""Models and data sets by Hub id, without the Hub: from the cache, or with a message on what was looked for where."""

import json
import re

import pytest
from huggingface_hub import constants

from eval.evaluate_math import main as evaluate
from opsd.run.hub import cached_commit, check_model
from opsd.run.problem_data import load_problems
from opsd_train import main as train

COMMIT = "0123456789" * 4
COLUMNS = {"problem_column": "problem", "answer_column": "answer"}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the Hub, and a function that puts a repository with one file into it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True)

    def put(folder, name, content):
        snapshot = tmp_path / folder / "snapshots" / COMMIT
        snapshot.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_text(content)
        (tmp_path / folder / "refs").mkdir(exist_ok=True)
        (tmp_path / folder / "refs" / "main").write_text(COMMIT)

    return tmp_path, put


def test_commit_by_the_cache(cache):
    folder, put = cache
    assert cached_commit("some/data", "dataset") is None
    put("datasets--some--data", "train.jsonl", "")
    assert cached_commit("some/data", "dataset") == cached_commit("some/data", "dataset", "main") == COMMIT
    assert cached_commit("some/data", "dataset", "v2") is None
    assert cached_commit("some/data", "model") is None
    assert cached_commit("other/data", "dataset", "f" * 40) == "f" * 40
    assert cached_commit(str(folder), "dataset", "main") is None


def test_a_data_set_of_the_cache_is_read_without_the_hub(cache, caplog):
    _, put = cache
    put("datasets--some--data", "train.jsonl", json.dumps({"problem": "1+1", "answer": 2}) + "\n")
    rows = load_problems("some/data", "train", COLUMNS)
    assert list(rows) == [{"problem": "1+1", "answer": "2"}]
    assert "read from its copy in the cache" in caplog.text and COMMIT in caplog.text


def test_what_is_not_there_says_where_it_was_looked_for(cache):
    folder, put = cache
    with pytest.raises(FileNotFoundError) as failure:
        load_problems("some/data", "train", COLUMNS, revision="v1")
    message = str(failure.value)
    assert message.startswith("--dataset_name some/data: not found. Looked for: a file or folder /")
    assert f"revision v1 in the cache {folder / 'datasets--some--data'} (it is not there)" in message
    assert "the Hub (switched off by HF_HUB_OFFLINE: " in message
    assert "hf download --repo-type dataset some/data" in message
    put("models--some--model", "other.json", "{}")
    with pytest.raises(FileNotFoundError, match=f"--base_model some/model: .*it holds {COMMIT}.*download some/model"):
        check_model("some/model", "base_model")
    put("models--some--model", "config.json", "{}")
    check_model("some/model", "base_model")
    check_model(str(folder), "base_model")
    with pytest.raises(ValueError, match="--base_model a/b/c: neither a folder here nor a Hub id"):
        check_model("a/b/c", "base_model")


def test_programs_say_it_before_they_load_anything(cache, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"problem": "1+1", "solution": "2", "answer": "2"}) + "\n")
    flags = ["--dataset_name", str(data), "--output_dir", str(tmp_path / "run"), "--use_cpu", "--bf16", "false"]
    with pytest.raises(SystemExit, match=r"--model_name_or_path some/model: not found\. Looked for"):
        train(["--model_name_or_path", "some/model", "--per_device_train_batch_size", "1", *flags])
    with pytest.raises(SystemExit):
        evaluate(["--base_model", "some/model", "--dataset", str(data), "--output_file", str(tmp_path / "a.json")])
    assert re.search(r"--base_model some/model: not found\. Looked for", capsys.readouterr().err)
