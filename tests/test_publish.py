"""The card that an evaluation completes, and the upload, to a stand-in that answers as the Hub's API does."""

import base64
import json
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from helpers import ADAPTER, CPU, OPSD, ROOT, JsonHandler, serving
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from eval.evaluate_math import write_report
from eval.run_files import Sample
from opsd.grading import GradingPool
from opsd.run.arguments import parse_arguments
from opsd.run.card import complete_card, find_licence, render_card
from opsd.run.publish import main, published_files
from opsd.run.run import Run
from opsd_train import OPSDArguments
from opsd_trainer import OPSDConfig


@contextmanager
def standing_in():
    """The Hub on a port of its own; yields its address, the files of each commit, and all that was asked for."""
    commits, asked = [], []

    class Handler(JsonHandler):
        def do_POST(self):
            length = self.headers["Content-Length"]
            body = self.rfile.read(int(length)) if length else self.read_chunks()
            asked.append((self.path, self.headers["Authorization"]))
            address = f"http://{self.headers['Host']}"
            if self.path == "/api/repos/create":
                name = json.loads(body)
                self.reply({"url": f"{address}/{name.get('organization', 'me')}/{name['name']}"})
            elif self.path == "/api/validate-yaml":
                self.reply({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                files = json.loads(body)["files"]
                self.reply({"files": [f | {"uploadMode": "regular", "shouldIgnore": False} for f in files]})
            elif "/commit/" in self.path:
                lines = [json.loads(line) for line in body.splitlines()]
                values = [line["value"] for line in lines if line["key"] == "file"]
                commits.append({value["path"]: base64.b64decode(value["content"]) for value in values})
                self.reply({"commitOid": "c" * 40, "commitUrl": f"{address}/me/it/commit/{'c' * 40}", "success": True})
            else:
                self.reply({"error": f"unknown: {self.path}"}, 404)

        def do_GET(self):
            asked.append((self.path, self.headers["Authorization"]))
            self.reply({"error": "not found"}, 404)

        do_HEAD = do_GET

        def read_chunks(self):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            return b"".join(parts)

    with serving(Handler) as address:
        yield address, commits, asked


def run_with_hub(address, *words):
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_test"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture
def run_dir(tmp_path, tiny_model_dir):
    """A finished run: an adapter and its card, and files that are nobody else's business."""
    folder = tmp_path / "run"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(folder)
    flags = ["--model_name_or_path", str(tiny_model_dir), "--use_peft", "--lora_r", "4", "--output_dir", str(folder)]
    flags += ["--use_cpu", "--bf16", "false", "--dataset_revision", "v1"]
    settings = Run("opsd", *parse_arguments(OPSDArguments, OPSDConfig, flags)).settings()
    (folder / "README.md").write_text(render_card("opsd", settings, [], step=5, num_examples=64))
    (folder / "checkpoint-5").mkdir()
    for name in (
        "completions.jsonl",
        "metrics.jsonl",
        "run_config.json",
        "training.png",
        "checkpoint-5/a.safetensors",
    ):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def evaluated(run_dir, tiny_model_dir):
    """The run with an evaluation of its base and of itself: of 4 problems the base has 1 right, and it has 3."""
    samples = []
    for model, right in (("base", 1), (str(run_dir), 3)):
        for problem in range(4):
            fields = {"text": "", "extracted": "7", "correct": problem < right, "status": "exact", "seed": 0}
            fields |= {"num_tokens": 5, "finish_reason": "stop", "problem": "?", "gold": "7", "answer_type": None}
            samples.append(Sample(model=model, benchmark="sums", problem_id=problem, sample=0, **fields))
    settings = {"base_model": str(tiny_model_dir), "base_model_version": "abc", "versions": {"vllm": "0.1"}}
    settings |= {"temperature": 1.0, "max_new_tokens": 16, "thinking": False, "seed": 3}
    arguments = {"command": "python eval/evaluate_math.py --here", "hardware": "1 x Abacus"}
    arguments["dataset_commits"] = {"sums": "d" * 40}
    (run_dir / "results").mkdir()
    with GradingPool(workers=1) as pool:
        write_report(run_dir / "results" / "sums.json", settings, arguments, samples, pool, "base")
    return run_dir


def test_an_evaluation_completes_the_card(evaluated, capsys):
    card = evaluated / "README.md"
    before = card.read_text()
    assert "No evaluation is in `results` yet." in before and "Licences: base model not known here, data not" in before
    assert "(revision v1)" in before and "Trained on " in before
    main([str(evaluated)])
    text = card.read_text()
    assert "| sums | base model | 25.0 | 0.0 to 75.0 | 25.0 | 4 |  |" in text
    assert "| sums | this model | 75.0 | 25.0 to 100.0 | 75.0 | 4 | +50.0 (0.0 to 100.0) |" in text
    for part in ("temperature 1.0", "seed 3", "version abc", f"data sums at {'d' * 40}", "vllm 0.1", "on 1 x Abacus"):
        assert part in text
    assert "```bash\npython eval/evaluate_math.py --here\n```" in text
    assert "![sums.budgets](results/sums.budgets.png)" in text
    assert ModelCard.load(card).data.library_name == "peft"
    assert complete_card(evaluated) == 1 and card.read_text() == text  # again, it is the same
    start, _, end = text.partition("### Evaluation")
    assert before.startswith(start.removesuffix("<!-- scores -->\n")) and before.endswith(
        end.partition("scores -->")[2]
    )


def test_a_licence_is_read_or_not_known(tmp_path):
    for number, (text, licence) in enumerate(
        (("---\nlicense: mit\n---\n# It", "mit"), ("---\ntags: []\n---\n", None), ("# It\nlicense: mit", None))
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "README.md").write_text(text)
        assert find_licence(str(folder), "model") == licence
    assert find_licence(str(tmp_path), "model") is None


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "README.md: no card of a run" in capsys.readouterr().err


@pytest.mark.multiprocess
def test_upload(evaluated):
    with standing_in() as (address, commits, asked):
        run = run_with_hub(address, "-m", "opsd.run.publish", evaluated, "--hub_model_id", "me/it")
    assert run.returncode == 0, run.stderr
    (files,) = commits
    expected = {"README.md", "adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "run_config.json"}
    expected |= {"training.png", "results/sums.md", "results/sums.budgets.png"}
    assert set(files) == set(published_files(evaluated)) == expected
    assert all(files[name] == (evaluated / name).read_bytes() for name in files)
    assert b"| sums | this model | 75.0 |" in files["README.md"]
    assert {key for path, key in asked if path.startswith("/api/")} == {"Bearer hf_test"}
    assert f"uploaded to {address}/me/it" in run.stderr


@pytest.mark.multiprocess
@pytest.mark.slow
def test_training_uploads_once_at_its_end(tiny_model_dir, tmp_path):
    data, run_dir = tmp_path / "train.jsonl", tmp_path / "run"
    rows = [{"problem": f"{n}+1", "solution": f"{n + 1}", "answer": n + 1} for n in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = CPU | ADAPTER | OPSD | {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2}
    settings |= {"model_name_or_path": tiny_model_dir, "dataset_name": data, "output_dir": run_dir}
    settings |= {"push_to_hub": True, "hub_model_id": "me/it", "max_completion_length": 4}
    flags = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    with standing_in() as (address, commits, _):
        run = run_with_hub(address, "opsd_train.py", *flags)
        assert run.returncode == 0, run.stderr[-3000:]
        (files,) = commits
        assert f"uploaded to {address}/me/it" in run.stdout
    assert {"README.md", "adapter_model.safetensors", "tokenizer.json", "training.png", "run_config.json"} <= set(
        files
    )
    assert not [name for name in files if "completions" in name or name.startswith("checkpoint-")]
    assert files["README.md"] == (run_dir / "README.md").read_bytes()
    assert b"trained by on-policy self-distillation" in files["README.md"]
    assert files["adapter_model.safetensors"] == (run_dir / "adapter_model.safetensors").read_bytes()
