"""The evaluator with an OpenAI-compatible server: a stand-in that notes what it is asked, and a real vLLM server."""

import json
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import helpers
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from eval.benchmarks import Question
from eval.engine import Sampling, WorkTime, sampling_requests
from eval.evaluate_math import main, request_key
from eval.server import connect, generate_from

ROOT = Path(__file__).resolve().parents[1]
BASE = {"id": "model", "object": "model", "created": 0, "owned_by": "vllm", "root": "some/model", "parent": None}


def lora(name, root):
    return BASE | {"id": name, "root": str(root), "parent": "model"}


@contextmanager
def standing_in(models, answer=None):
    """A server of these models on a port of its own; yields its address and the list of what it is asked."""
    asked = []

    class Handler(helpers.JsonHandler):
        def do_GET(self):
            self.reply({"object": "list", "data": models})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            status, text, tokens, reason = (answer or self.answer)(body)
            choice = {"index": 0, "text": text, "finish_reason": reason, "logprobs": None}
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": tokens, "total_tokens": 0}
            reply = {"id": "1", "object": "text_completion", "created": 0, "model": body["model"], "choices": [choice]}
            self.reply(reply | {"usage": usage} if status == 200 else {"error": {"message": text}}, status)

        def answer(self, body):
            return 200, f"\\boxed{{{body['model']} {body.get('seed')}}}", 7, "stop"

    with helpers.serving(Handler) as address:
        yield f"{address}/v1", asked


QUESTIONS = [Question("b", index, f"{index}+1", str(index + 1), None, [5, 6, index]) for index in range(3)]


def test_a_response_is_asked_for_with_all_settings():
    sampling = Sampling(val_n=2, temperature=0.7, top_p=0.9, top_k=20, min_p=0.1, max_new_tokens=9, greedy=True)
    requests = [r for folder in (None, "step") for r in sampling_requests(folder, QUESTIONS, sampling)]
    with standing_in([BASE, lora("step", "/run/checkpoint-5")]) as (url, asked):
        batches = list(generate_from(connect(url, ["step"]), requests, sampling))
    answered = [pair for batch in batches for pair in batch]
    assert sorted(map(request_key, requests)) == sorted(request_key(request) for request, _ in answered)
    for request, completion in answered:
        model = "step" if request.checkpoint else "model"
        assert completion.text == f"\\boxed{{{model} {request.seed}}}"
        assert (completion.num_tokens, completion.finish_reason) == (7, "stop") and completion.seconds > 0
    common = {"max_tokens": 9, "presence_penalty": 0.0, "repetition_penalty": 1.0, "skip_special_tokens": False}
    drawn = common | {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.1}
    greedy = common | {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    expected = [
        {"model": "step" if r.checkpoint else "model", "prompt": r.question.prompt_ids}
        | (greedy if r.seed is None else drawn | {"seed": r.seed})
        for r in requests
    ]
    as_text = partial(json.dumps, sort_keys=True)
    assert sorted(map(as_text, asked)) == sorted(map(as_text, expected))
    models = [body["model"] for body in asked]  # one model after the other
    assert models == sorted(models)


def test_adapters_by_name_and_by_folder(tmp_path):
    folder = tmp_path / "run" / "checkpoint-5"
    with standing_in([BASE, BASE | {"id": "alias"}, lora("step", folder)]) as (url, _):
        for checkpoint in ("step", str(folder)):
            server = connect(url, [checkpoint])
            assert server.names == {None: "model", checkpoint: "step"}
            assert server.roots == {None: "some/model", checkpoint: str(folder)}
        with pytest.raises(ValueError, match=f"--checkpoint_dir other: the server at --base_url {url} .* it has step"):
            connect(url, ["other"])
    with (
        standing_in([BASE, BASE | {"id": "second", "root": "another/model"}]) as (url, _),
        pytest.raises(ValueError, match=r"has 2 base models \(model, second\)"),
    ):
        connect(url, [])
    with pytest.raises(ValueError, match="no OpenAI-compatible server answers there .*/v1"):
        connect(url, [])  # it is gone


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, "cut", 5, "length"), "cut a response after 5 of --max_new_tokens 9; start it with a longer"),
        ((400, "too long a prompt", 0, "stop"), "too long a prompt.*\n.*the same command goes on"),
    ],
)
def test_a_server_that_fails(answer, message):
    sampling = Sampling(val_n=1, max_new_tokens=9)
    with (
        standing_in([BASE], lambda body: answer) as (url, _),
        pytest.raises(RuntimeError, match=message),
    ):
        list(generate_from(connect(url, []), sampling_requests(None, QUESTIONS, sampling), sampling))


@pytest.fixture
def evaluation(tiny_model_dir, tmp_path):
    """Flags of an evaluation of two sums, and its output file."""
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps({"problem": f"{n}+1", "answer": n + 1}) + "\n" for n in (1, 2)))
    flags = ["--base_model", str(tiny_model_dir), "--dataset", str(data), "--enable_thinking", "false"]
    flags += ["--val_n", "2", "--max_new_tokens", "8", "--grade_workers", "1"]
    return [*flags, "--output_file", str(tmp_path / "scores.json")], tmp_path / "scores.json"


def test_results_name_the_server(evaluation, capsys):
    flags, file = evaluation

    def answer(body):
        return 200, "\\boxed{2}", 4, "stop"

    with standing_in([BASE, lora("step", "/run/5")], answer) as (url, asked):
        main([*flags, "--base_url", url, "--checkpoint_dir", "step"])
        assert len(asked) == 8
        main([*flags, "--base_url", url, "--checkpoint_dir", "step"])
        assert len(asked) == 8  # nothing is asked again
    report = json.loads(file.read_text())
    settings = report["settings"]
    assert settings["server"] == {"url": url + "/", "model": "model"}
    assert settings["adapters"] == {"step": "served: /run/5"}
    assert settings["base_model_version"] == "served: some/model"
    assert settings["versions"].keys() == {"transformers", "math-verify"}  # those of the server are not known
    assert report["table"] == {"base": {"sums": 0.5}, "step": {"sums": 0.5}}
    for result in report["results"]:
        assert result["tokens_per_second"] > 0
    with pytest.raises(SystemExit):  # samples of a server and of an engine do not mix
        main(flags)
    assert f"server: {{'url': '{url}/', 'model': 'model'}} -> None" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [["--merge_adapter"], ["--data_parallel", "2"], ["--max_model_len", "99"], ["--gpu_memory_utilization", "0.5"]],
)
def test_flags_of_engines_are_refused_with_a_server(evaluation, flags, capsys):
    with pytest.raises(SystemExit):
        main([*evaluation[0], "--base_url", "http://127.0.0.1:9/v1", *flags])
    assert f"{flags[0]} with --base_url: is the server's business" in capsys.readouterr().err


def test_time_is_divided_over_the_requests_in_work():
    work_time = WorkTime(at_once=2)
    for name in "abc":
        work_time.add(name)
    work_time.spend(1.0)  # a and b
    assert work_time.finish("a") == 0.5
    work_time.spend(3.0)  # b and c
    assert (work_time.finish("b"), work_time.finish("c")) == (2.0, 1.5)


@pytest.mark.multiprocess
@pytest.mark.vllm
@pytest.mark.slow
def test_a_vllm_server_gives_the_samples_of_an_engine(evaluation, tiny_model_dir, tmp_path):
    """With the same seeds, of the base and of an adapter that the server has loaded."""
    flags, file = evaluation
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    folder = tmp_path / "adapter"
    get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).save_pretrained(
        folder
    )
    flags = [*flags, "--checkpoint_dir", str(folder), "--greedy"]
    port, log = helpers.free_port(), tmp_path / "server.log"
    command = ["bash", ROOT / "scripts" / "serve_vllm.sh", "--host", "127.0.0.1", "--max-model-len", "1000"]
    command += ["--lora-modules", f"step={folder}"]
    settings = {"MODEL": str(tiny_model_dir), "PORT": str(port), "MAX_LORA_RANK": "8"}
    with helpers.started(command, log, **settings) as server:
        for _ in range(600):
            assert server.poll() is None, log.read_text()[-5000:]
            with suppress(ValueError):
                connect(f"http://127.0.0.1:{port}/v1", [])
                break
            time.sleep(1)
        run = subprocess.run(
            [sys.executable, "eval/evaluate_math.py", *flags, "--base_url", f"http://127.0.0.1:{port}/v1"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
    served = file.with_suffix(".jsonl").read_text().splitlines()
    shutil.move(file, tmp_path / "served.json")
    main([*flags, "--overwrite"])
    own = file.with_suffix(".jsonl").read_text().splitlines()

    def texts(lines):
        samples = map(json.loads, lines)
        return {(s["model"], s["problem_id"], s["sample"]): (s["text"], s["num_tokens"]) for s in samples}

    assert len(served) == 12 and texts(served) == texts(own)
