"""The evaluator with real vLLM on a tiny model, killed and resumed; its scores; its refusal of bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_collator import STUDENT_PROMPT, encode_chat_prompt, fill_template
from eval import engine as sampling_engine
from eval import evaluate_math
from eval.benchmarks import BENCHMARKS, Benchmark, find_benchmark, load_questions
from eval.engine import (
    GREEDY,
    Sampling,
    generate,
    sample_seed,
    sampling_requests,
    start_engine,
)
from eval.evaluate_math import evaluate, main, paired_differences, request_key, score, score_all
from eval.report import plot_accuracy, plot_budgets, report_tables
from eval.run_files import Sample, model_version, open_samples
from eval.scores import accuracy_within, budgets
from opsd.adapters import Adapter
from opsd.grading import GradingPool
from opsd.vllm_engine import stop_engine

ROOT = Path(__file__).resolve().parents[1]
SUMS = [(358, 647), (120, 45), (999, 1), (271, 828), (314, 159), (500, 250)]
SAMPLING = Sampling(val_n=3, max_new_tokens=24, greedy=True)


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"problem": f"{a}+{b}", "solution": f"It is {a + b}, clearly.", "answer": a + b} for a, b in SUMS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def questions(data_file, tokenizer):
    return load_questions(find_benchmark(str(data_file)), tokenizer, thinking=False)


@pytest.fixture(scope="module")
def adapters(tiny_model_dir, tmp_path_factory):
    """Adapter folders: "zero" leaves the model as it is, the others do not; "large" has the larger rank."""
    folders = {}
    run = tmp_path_factory.mktemp("run")
    for step, (name, rank) in enumerate({"zero": 4, "random": 4, "large": 8}.items()):
        torch.manual_seed(step)
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
        config = LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=name == "zero")
        folders[name] = str(run / f"checkpoint-{25 * (step + 1)}")
        get_peft_model(model, config).save_pretrained(folders[name])
    return folders


def read(folder):
    return Adapter.read(folder, "checkpoint_dir")


@pytest.fixture(scope="module")
def engine(tiny_model_dir, adapters):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the fastest for a tiny model, by far so where other processes compete
    with mock.patch.dict(os.environ):  # vLLM adds to it
        engine = start_engine(
            str(tiny_model_dir), lora_rank=max(read(a).rank for a in adapters.values()), max_model_len=512
        )
        yield engine
        stop_engine(engine)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pool():
    with GradingPool(workers=1) as pool:
        yield pool


@pytest.fixture(scope="module")
def sample(engine, pool):
    """A function that evaluates questions, and returns the samples without the model's name."""

    def run(questions, sampling=SAMPLING, checkpoint=None):
        _, samples = evaluate(engine, questions, sampling, pool, thinking=False, checkpoint=checkpoint)
        assert {sample.model for sample in samples} == {checkpoint or "base"}
        return [replace(sample, model="") for sample in samples]

    return run


def texts(samples):
    return [sample.text for sample in samples]


@pytest.fixture(scope="module")
def base_samples(sample, questions):
    return sample(questions)


@pytest.mark.vllm
def test_samples_do_not_depend_on_number_or_order_of_problems(sample, questions, base_samples):
    assert sample(questions[3:1:-1]) == [*base_samples[12:16], *base_samples[8:12]]
    assert sample(questions[:1], Sampling(val_n=1, max_new_tokens=24)) == base_samples[:1]


@pytest.mark.vllm
def test_samples_differ_from_each_other_and_with_the_seed(sample, questions, base_samples):
    assert any(len(set(texts(base_samples[start : start + 3]))) > 1 for start in range(0, len(base_samples), 4))
    assert texts(sample(questions, replace(SAMPLING, seed=1))) != texts(base_samples)
    assert texts(sample(questions, replace(SAMPLING, presence_penalty=2.0))) != texts(base_samples)


@pytest.mark.vllm
def test_many_long_prompts_at_once_keep_their_seeds(engine, sample, questions):
    # More prompt tokens than fit into one step: vLLM must not split a prompt, whose sampler it cannot rewind on CPU.
    budget = engine.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    prompt_ids = questions[0].prompt_ids * 3
    count = budget // len(prompt_ids) + 2
    longer = [
        replace(questions[0], index=index, problem=f"{index}", prompt_ids=[index, *prompt_ids])  # no common prefix
        for index in range(count)
    ]
    sampling = Sampling(val_n=1, max_new_tokens=4)
    assert sample(longer, sampling)[-1] == sample(longer[-1:], sampling)[0]


@pytest.mark.vllm
def test_more_requests_than_the_engine_takes_at_once(engine, sample, questions, monkeypatch, base_samples):
    monkeypatch.setattr(engine.llm_engine.vllm_config.scheduler_config, "max_num_seqs", 2)  # 4 requests in the engine
    assert sample(questions) == base_samples


@pytest.mark.vllm
def test_adapters_and_base_share_an_engine(sample, questions, adapters, base_samples):
    assert texts(sample(questions, checkpoint=adapters["random"])) != texts(base_samples)
    assert sample(questions, checkpoint=adapters["zero"]) == base_samples
    assert sample(questions) == base_samples


@pytest.mark.vllm
def test_base_and_adapters_do_not_mix_within_a_batch(engine, sample, questions, adapters):
    folders = [None, adapters["random"], adapters["large"]]
    alone = {folder: texts(sample(questions[:2], checkpoint=folder)) for folder in folders}
    requests = [sampling_requests(folder, questions[:2], SAMPLING) for folder in folders]
    mixed = [request for group in zip(*requests, strict=True) for request in group]
    finished = {
        request_key(request): completion.text
        for batch in generate(engine, mixed, SAMPLING)
        for request, completion in batch
    }
    for folder, own in zip(folders, requests, strict=True):
        assert [finished[request_key(request)] for request in own] == alone[folder]


@pytest.mark.vllm
def test_an_adapter_replaced_in_its_folder_is_loaded_anew(sample, questions, adapters, base_samples, tmp_path):
    folder = tmp_path / "adapter"
    folder.symlink_to(adapters["random"])
    changed = sample(questions, checkpoint=str(folder))
    folder.unlink()
    folder.symlink_to(adapters["zero"])
    assert texts(changed) != texts(base_samples)
    assert sample(questions, checkpoint=str(folder)) == base_samples


@pytest.mark.vllm
def test_an_adapter_with_patterns_is_sampled_as_the_same_function(sample, questions, adapters, tmp_path):
    """The scaling is 2 for both; a power of two, so that no rounding tells them apart."""
    shutil.copytree(adapters["random"], tmp_path / "pattern")
    file = tmp_path / "pattern" / "adapter_config.json"
    config = json.loads(file.read_text())
    pattern = dict.fromkeys(config["target_modules"], config["lora_alpha"])
    file.write_text(json.dumps(config | {"lora_alpha": 1, "alpha_pattern": pattern}))
    assert sample(questions, checkpoint=str(tmp_path / "pattern")) == sample(questions, checkpoint=adapters["random"])


@pytest.mark.vllm
def test_an_adapter_without_effect_is_reported(sample, questions, adapters, caplog):
    sample(questions[:1], checkpoint=adapters["random"])
    assert caplog.messages == []
    sample(questions[:1], checkpoint=adapters["zero"])
    assert f"{adapters['zero']}#" in caplog.text and "are those of the base model" in caplog.text


def completion_log_probs(model, prompt_ids, completion_ids):
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + completion_ids])).logits[0, len(prompt_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion_ids)[:, None])[:, 0].double()  # (T,)


@pytest.mark.vllm
@pytest.mark.parametrize("name", ["base", "random"])
def test_log_probs_agree_with_transformers(engine, questions, adapters, tiny_model_dir, name):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    adapter = LoRARequest("log-probs", next(sampling_engine.ADAPTER_IDS), adapters["random"])
    outputs = engine.generate(
        [{"prompt_token_ids": question.prompt_ids} for question in questions],
        SamplingParams(max_tokens=24, seed=0, logprobs=0),
        lora_request=None if name == "base" else adapter,
        use_tqdm=False,
    )
    expected = {}
    for dtype in (torch.float32, torch.float64):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=dtype)
        if name != "base":
            model = PeftModel.from_pretrained(model, adapters[name]).to(dtype)
        expected[dtype] = torch.cat(
            [
                completion_log_probs(model.eval(), question.prompt_ids, list(output.outputs[0].token_ids))
                for question, output in zip(questions, outputs, strict=True)
            ]
        )
    sampled = [
        row[token].logprob
        for output in outputs
        for row, token in zip(output.outputs[0].logprobs, output.outputs[0].token_ids, strict=True)
    ]
    exact = expected[torch.float64]
    float32_error = (expected[torch.float32] - exact).abs().max().item()  # transformers' own: 1e-5 to 2e-5 nats
    assert float32_error < 1e-4
    torch.testing.assert_close(torch.tensor(sampled, dtype=torch.float64), exact, rtol=0, atol=3 * float32_error)


def command(tiny_model_dir, output_file, *arguments):
    fixed = [
        "--enable_thinking",
        "false",
        "--val_n",
        "3",
        "--greedy",
        "--max_new_tokens",
        "24",
        "--grade_workers",
        "1",
    ]
    base = [sys.executable, "eval/evaluate_math.py", "--base_model", tiny_model_dir, "--output_file", output_file]
    return [str(part) for part in [*base, *fixed, *arguments]]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def run_command(*parts):
    run = subprocess.run(command(*parts), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    return run.stdout


def read_samples(output_file):
    """Key -> sample; no key may occur twice."""
    lines = output_file.with_suffix(".jsonl").read_text().splitlines()
    samples = {sample.key: sample for sample in (Sample(**json.loads(line)) for line in lines)}
    assert len(samples) == len(lines)
    return samples


@pytest.fixture(scope="module")
def work(data_file, adapters):
    """Base and two adapters on two data sets: 3 x (6 + 4) problems x 4 samples."""
    other = data_file.with_name("other.jsonl")
    other.write_text(
        "".join(json.dumps({"problem": f"{n}+{n + 1}", "answer": 2 * n + 1}) + "\n" for n in range(500, 504))
    )
    return ["--checkpoint_dir", adapters["random"], adapters["large"], "--dataset", str(data_file), str(other)]


@pytest.fixture(scope="module")
def whole_run(tiny_model_dir, work, tmp_path_factory):
    """Output file and printed tables of a run that nothing interrupts."""
    output_file = tmp_path_factory.mktemp("results") / "new" / "whole.json"
    return output_file, run_command(tiny_model_dir, output_file, *work)


@pytest.mark.multiprocess
@pytest.mark.vllm
def test_command_line_end_to_end(whole_run, sample, questions, adapters, base_samples):
    output_file, printed = whole_run
    samples = read_samples(output_file)
    assert len(samples) == 3 * 10 * 4
    for checkpoint in (None, adapters["random"], adapters["large"]):  # as if each were evaluated by itself
        alone = base_samples if checkpoint is None else sample(questions, checkpoint=checkpoint)
        for expected in alone:
            key = (checkpoint or "base", *expected.key[1:])
            assert replace(samples[key], model="") == expected
    report = json.loads(output_file.read_text())
    assert report["complete"] and len(report["results"]) == 6 and len(report["differences"]) == 4
    assert report["arguments"]["val_n"] == 3
    base = report["results"][0]
    assert (base["model"], base["dataset"], base["val_n"], base["num_problems"]) == ("base", "sums", 3, 6)
    assert base["avg_at_k"] == pytest.approx(sum(s.correct for s in base_samples if s.sample != GREEDY) / 18)
    assert report["table"]["base"] == {"sums": base["avg_at_k"], "other": report["results"][1]["avg_at_k"]}
    assert set(report["settings"]["adapters"]) == {adapters["random"], adapters["large"]}
    assert output_file.with_suffix(".md").read_text() == printed
    assert "| model | sums | other |" in printed
    assert output_file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.multiprocess
@pytest.mark.vllm
def test_killed_run_goes_on_where_it_was(whole_run, tiny_model_dir, work, tmp_path):
    output_file = tmp_path / "killed.json"
    samples_file = output_file.with_suffix(".jsonl")
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(
            command(tiny_model_dir, output_file, *work), cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log
        )
        while not samples_file.is_file() or samples_file.stat().st_size == 0:
            assert running.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.005)
        running.send_signal(signal.SIGKILL)
        running.wait()
    kept = samples_file.read_bytes()
    assert not json.loads(output_file.read_text())["complete"]
    assert 0 < kept.count(b"\n") < 120
    samples_file.write_bytes(kept[: kept.rindex(b"\n") + 1] + kept[:50])  # and a last line torn

    run_command(tiny_model_dir, output_file, *work, "--data_parallel", "2")
    assert samples_file.read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])  # nothing is sampled again
    assert read_samples(output_file) == read_samples(whole_run[0])
    reports = [json.loads(file.read_text()) for file in (output_file, whole_run[0])]
    for result in (result for report in reports for result in report["results"]):
        assert result.pop("tokens_per_second") > 0
    assert reports[0]["results"] == reports[1]["results"]
    assert reports[0]["fingerprint"] == reports[1]["fingerprint"]


@pytest.fixture
def finished_run(whole_run, tmp_path, monkeypatch):
    """A copy of the whole run's files; no engine may start."""

    def fail(*args, **options):
        raise AssertionError("the engine was started")

    monkeypatch.setattr(evaluate_math, "start_engine", fail)
    for file in whole_run[0].parent.glob("whole.json*"):
        shutil.copy(file, tmp_path)
    return tmp_path / "whole.json"


@pytest.mark.multiprocess
@pytest.mark.vllm
def test_finished_run_needs_no_engine(whole_run, finished_run, tiny_model_dir, work, adapters, capsys):
    arguments = command(tiny_model_dir, finished_run, *work)[2:]
    main(arguments)
    assert capsys.readouterr().out == whole_run[1]
    assert read_samples(finished_run) == read_samples(whole_run[0])
    # Fewer samples, problems, models and data sets are among what is there.
    main([*arguments, "--val_n", "2", "--num_samples", "3", "--checkpoint_dir", adapters["large"]])
    few = json.loads(finished_run.read_text())
    assert [(result["val_n"], result["num_problems"]) for result in few["results"]] == [(2, 3)] * 4
    assert set(few["settings"]["adapters"]) == {adapters["random"], adapters["large"]}


@pytest.mark.multiprocess
@pytest.mark.vllm
def test_changed_settings_are_refused_with_what_changed(
    finished_run, tiny_model_dir, data_file, adapters, work, tmp_path, capsys
):
    arguments = command(tiny_model_dir, finished_run, *work)[2:]
    before = finished_run.with_suffix(".jsonl").read_bytes()
    with pytest.raises(SystemExit):
        main([*arguments, "--temperature", "0.5", "--seed", "3"])
    message = capsys.readouterr().err
    assert "temperature: 1.0 -> 0.5" in message and "seed: 0 -> 3" in message and "--overwrite" in message
    assert "top_p:" not in message

    (tmp_path / "sums.jsonl").write_text(data_file.read_text().replace("1005", "1006"))
    with pytest.raises(SystemExit):
        main([*arguments, "--dataset", str(tmp_path / "sums.jsonl")])
    message = capsys.readouterr().err
    assert "data_sets sums:" in message and "data_sets other" not in message

    weights = Path(adapters["large"]) / "adapter_model.safetensors"
    original = weights.read_bytes()
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(SystemExit):
        main(arguments)
    weights.write_bytes(original)
    assert f"adapters {adapters['large']}:" in capsys.readouterr().err
    assert finished_run.with_suffix(".jsonl").read_bytes() == before

    with pytest.raises(AssertionError, match="the engine was started"):
        main([*arguments, "--temperature", "0.5", "--overwrite"])
    assert finished_run.with_suffix(".jsonl").read_bytes() == b""


@pytest.mark.multiprocess
@pytest.mark.vllm
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_version_of_a_model_is_that_of_its_weights(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    versions = set()
    for content in (b"old", b"new"):
        (tmp_path / name).write_bytes(content)
        versions.add(model_version(str(tmp_path)))
    assert len(versions) == 2


def test_files_of_unknown_origin_are_refused(finished_run, tiny_model_dir, work, capsys):
    arguments = command(tiny_model_dir, finished_run, *work)[2:]
    settings = finished_run.read_bytes()
    for content, message in ((b"{}", "is not an evaluation"), (None, "with its settings")):
        finished_run.unlink() if content is None else finished_run.write_bytes(content)
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err
    finished_run.write_bytes(settings)
    with finished_run.with_suffix(".jsonl").open("ab") as file:
        file.write(b"{}\n")
    with pytest.raises(SystemExit):
        main(arguments)
    assert "whole.jsonl, line 121: not a sample" in capsys.readouterr().err


@pytest.mark.multiprocess
@pytest.mark.vllm
def test_regrade_gives_the_verdicts_of_the_flags(finished_run, tmp_path, capsys):
    regraded = tmp_path / "regraded.json"
    original = read_samples(finished_run)
    lines = finished_run.with_suffix(".jsonl").read_text().splitlines()
    spoiled = [json.dumps(json.loads(line) | {"correct": None, "status": "lost", "extracted": "?"}) for line in lines]
    finished_run.with_suffix(".jsonl").write_text("\n".join(spoiled) + "\n")
    main(["--regrade", str(finished_run), "--output_file", str(regraded), "--grade_workers", "1"])
    assert read_samples(regraded) == original
    assert all(sample.status == "lost" for sample in read_samples(finished_run).values())
    with pytest.raises(SystemExit):
        main(["--regrade", str(finished_run), "--output_file", str(regraded)])
    assert "--overwrite" in capsys.readouterr().err
    main(["--regrade", str(finished_run), "--extract", "release", "--grader", "release", "--grade_workers", "1"])
    report = json.loads(finished_run.read_text())
    assert (report["settings"]["extract"], report["settings"]["grader"]) == ("release", "release")
    assert all(sample.status != "lost" for sample in read_samples(finished_run).values())


def test_two_runs_do_not_write_to_one_file(tmp_path):
    file = tmp_path / "samples.jsonl"
    hold = "import sys; sys.path.insert(0, '.'); from pathlib import Path; from eval.run_files import open_samples;"
    hold += "kept = open_samples(Path(sys.argv[1])); sys.stdout.write('.'); sys.stdout.flush(); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, file], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.read(1) == b"."
        with pytest.raises(ValueError, match="another evaluation is writing to it"):
            open_samples(file)
        other.stdin.close()
    handle, samples = open_samples(file)
    handle.close()
    assert samples == []


def graded(problem, sample=0, *, correct, extracted="7", **fields):
    """A sample of the benchmark "b", in thinking mode, with its verdict."""
    values = {"model": "base", "benchmark": "b", "answer_type": None, "text": "</think>", "finish_reason": "stop"}
    values |= {"seed": 0, "num_tokens": 10, "problem": "?", "gold": "7", "status": "exact"} | fields
    return Sample(problem_id=problem, sample=sample, correct=correct, extracted=extracted, **values)


def test_scores(pool):
    samples = [
        graded(0, 0, correct=True),
        graded(0, 1, correct=True),
        graded(0, 2, correct=False, extracted="8"),
        graded(1, 0, correct=False, extracted="6"),
        graded(1, 1, correct=False, extracted="6.0", text="cut", finish_reason="length", num_tokens=34),
        graded(1, 2, correct=True),
        graded(1, GREEDY, correct=True),
    ]
    result = score(samples[::-1], pool, thinking=True)
    assert result["avg_at_k"] == pytest.approx(0.5)
    assert result["standard_error"] == pytest.approx(
        1 / 6
    )  # problems at 2/3 and 1/3: deviation 1/sqrt(18), over sqrt(2)
    assert result["pass_at_k"] == pytest.approx({"1": 1 / 2, "2": (1 + 2 / 3) / 2, "3": 1})
    assert result["majority_at_k"] == 0.5  # 7 is elected for the first problem, 6 for the second
    assert [problem["majority"] for problem in result["problems"]] == ["7", "6"]
    assert (result["greedy"], result["mean_tokens"], result["tokens_per_second"]) == (1, 14, None)
    timed = [replace(sample, seconds=seconds) for sample, seconds in zip(samples, range(7), strict=True)]
    assert score(timed, pool, thinking=True)["tokens_per_second"] == pytest.approx((6 * 10 + 34) / 21)
    assert (result["truncated"], result["unclosed_thinking"]) == (1 / 6, 1 / 6)
    assert score(samples, pool, thinking=False)["unclosed_thinking"] is None


def test_accuracy_within_budgets_by_hand():
    verdicts, lengths = [[True, True], [True, False]], [[5, 20], [11, 3]]
    assert [accuracy_within(verdicts, lengths, limit) for limit in (4, 5, 11, 20)] == [0, 0.25, 0.5, 0.75]
    assert budgets(38912) == [8192, 16384, 32768, 38912] and budgets(40000)[-2:] == [38912, 40000]
    assert (budgets(16384), budgets(64), budgets(1)) == ([8192, 16384], [16, 32, 64], [1])


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        (r"\boxed{7} and then \boxed{8}", "7", True),
        (r"\boxed{ \frac{1}{2} } or \boxed{3}", r"\frac{1}{2}", True),
        ("so it is 7.<|im_end|>", "7", True),
        ("there are 7 of them\nso it is 8", "7", False),
        ("so it is 17 or 7.5 or x7 or -7 or 7/2", "7", False),
        ("", "7", False),
    ],
)
def test_answers_that_were_not_taken(text, gold, expected):
    assert evaluate_math.is_missed(graded(0, correct=False, text=text, gold=gold)) == expected
    assert not evaluate_math.is_missed(graded(0, correct=True, text=text, gold=gold))


def test_report_lists_what_to_look_at(pool, tmp_path):
    samples = [graded(n, correct=False, text=r"\boxed{7} no, \boxed{8}") for n in range(22)]
    samples.append(graded(22, correct=True, finish_reason="length"))
    result = score(samples, pool, thinking=False)
    assert len(result["missed"]) == 22 and result["cut_off"] == [[22, 0]]
    result |= {"model": "base", "dataset": "b", "avg_within": {"8": 0.25, "16": 0.5}}
    tables = report_tables([result], [])
    assert "| b, base | 25.0 | 50.0 |" in tables and "| data set, model | 8 | 16 |" in tables
    assert "- b, base: 22 samples: the reference answer" in tables and "19/0 and 2 more" in tables
    assert "- b, base: 1 samples: cut off at the length limit (problem/sample): 22/0" in tables
    plot_budgets([result], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_entries_of_benchmarks():
    assert len({known.name for known in BENCHMARKS}) == len({known.path for known in BENCHMARKS}) == len(BENCHMARKS)
    for known in BENCHMARKS:
        assert re.fullmatch(r"[\w-]+/[\w-]+", known.path) and known.split in ("train", "test")
        assert find_benchmark(known.path.upper()) == known


def test_revision_of_the_base_model(adapters, tmp_path, tiny_model_dir, monkeypatch):
    """It is that of the training where nobody says otherwise, and never that of a local model."""

    def settle(*runs, base="some/model", revision=None):
        folders = []
        for number, trained in enumerate(runs):
            folder = tmp_path / f"run_{number}"
            folder.mkdir(exist_ok=True)
            (folder / "run_config.json").write_text(json.dumps({"training": {}, "model": {"model_revision": trained}}))
            folders.append(str(folder))
        flags = ["--base_model", base, *(["--checkpoint_dir", *folders] if folders else [])]
        args = evaluate_math.build_parser().parse_args(flags + ([] if revision is None else ["--revision", revision]))
        evaluate_math.settle_revision(args)
        return args.revision

    assert (settle(), settle("v1", "v1"), settle("v1", revision="v2")) == (None, "v1", "v2")
    assert settle("v1", base=str(tiny_model_dir)) is None
    with pytest.raises(ValueError, match=r"--revision: .*different ones:\n.*run_0: v1\n.*run_1: main\n.*apart"):
        settle("v1", "main")
    with pytest.raises(ValueError, match="--revision v1: the local --base_model"):
        settle(base=str(tiny_model_dir), revision="v1")


@pytest.mark.parametrize("known", BENCHMARKS, ids=lambda known: known.name)
def test_gold_answers_equal_themselves(known, tokenizer, pool):
    """Of the benchmarks that BENCHMARK_DATA, a folder for --data_root, has a copy of."""
    try:
        benchmark = find_benchmark(known.name, Path(os.environ["BENCHMARK_DATA"]))
    except (KeyError, FileNotFoundError):
        pytest.skip("no copy at hand")
    questions = load_questions(benchmark, tokenizer, thinking=False)
    assert len(questions) >= 30
    graded = [q for q in questions if q.answer_type != "description"]
    verdicts = [pool.submit(question.gold, question.gold, question.answer_type).result() for question in graded]
    assert [q.gold for q, verdict in zip(graded, verdicts, strict=True) if verdict.equal is not True] == []


def test_ungraded_problems_are_kept_apart(pool):
    samples = [graded(0, correct=True, benchmark="amo-bench", answer_type="number")]
    samples += [graded(n, correct=None, benchmark="amo-bench", answer_type="description") for n in (1, 2)]
    samples.append(graded(3, correct=False, benchmark="amo-bench", answer_type="description"))
    everything, without_descriptions = score_all(samples, pool, thinking=True)
    assert (everything["dataset"], without_descriptions["dataset"]) == ("amo-bench", "amo-bench-39")
    assert (everything["num_problems"], everything["num_ungraded"], everything["avg_at_k"]) == (4, 2, 0.5)
    assert (without_descriptions["num_problems"], without_descriptions["avg_at_k"]) == (1, 1)
    nothing = score(samples[1:3], pool, thinking=True)
    assert (nothing["num_ungraded"], nothing["avg_at_k"], nothing["majority_at_k"]) == (2, None, None)
    tables = report_tables([{"model": "base", "dataset": "amo-bench"} | nothing], [])
    assert "2 of 2" in tables


def test_paired_differences(pool):
    verdicts = {"base": [0, 1, 0, None], "x/checkpoint-5": [1, 1, 0, 1]}
    samples = [
        graded(problem, correct=None if right is None else bool(right), model=model)
        for model, rights in verdicts.items()
        for problem, right in enumerate(rights)
    ]
    (difference,) = paired_differences(score_all(samples, pool, thinking=True), "base")
    assert (difference["model"], difference["reference"], difference["dataset"]) == ("x/checkpoint-5", "base", "b")
    assert difference["difference"] == pytest.approx(1 / 3)  # differences 1, 0, 0: the ungraded problem is out
    assert difference["standard_error"] == pytest.approx(1 / 3)


def test_plot_needs_checkpoints_with_steps(pool, tmp_path):
    samples = [graded(0, correct=True, model=model) for model in ("base", "final")]
    results = score_all(samples, pool, thinking=True)
    assert not plot_accuracy(results, tmp_path / "plot.png")
    samples += [graded(0, correct=True, model=f"run/checkpoint-{step}") for step in (100, 25)]
    assert plot_accuracy(score_all(samples, pool, thinking=True), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_are_fixed_and_distinct():
    assert sample_seed(0, "b", "1+1", 0) == 1713884541600202259  # published results rest on this
    seeds = {
        sample_seed(base, benchmark, problem, index)
        for base in (0, 1)
        for benchmark in ("b", "c")
        for problem in ("1", "2")
        for index in range(4)
    }
    assert len(seeds) == 32
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_questions(data_file, tokenizer):
    student = load_questions(find_benchmark(str(data_file)), tokenizer, thinking=True)
    assert [(question.index, question.problem, question.gold) for question in student[:2]] == [
        (0, "358+647", "1005"),
        (1, "120+45", "165"),
    ]
    expected = encode_chat_prompt(tokenizer, fill_template(STUDENT_PROMPT, problem="358+647"), thinking=True)
    assert student[0].prompt_ids == expected
    teacher = load_questions(find_benchmark(str(data_file)), tokenizer, thinking=True, privileged=True)
    assert "It is 1005, clearly." in tokenizer.decode(teacher[0].prompt_ids)
    for privileged, template, content in (
        (False, "{problem}?", "358+647?"),
        (True, "{solution} So what is {problem}?", "It is 1005, clearly. So what is 358+647?"),
    ):
        mode = {"thinking": True, "privileged": privileged, "template": template}
        questions = load_questions(find_benchmark(str(data_file)), tokenizer, **mode)
        assert questions[0].prompt_ids == encode_chat_prompt(tokenizer, content, thinking=True)


RECORDS = {  # as opsd_train.py, sft_train.py and older versions of both write them
    "opsd": {"script": {"system_prompt": "You add."}, "training": {"student_prompt": "Add {problem}!"}},
    "sft": {"script": {"student_prompt": "Add {problem}!", "system_prompt": "You add."}, "training": {}},
    "other": {"script": {"student_prompt": "Sum of {problem}?", "system_prompt": None}, "training": {}},
    "old": {"script": {}, "training": {"student_prompt": STUDENT_PROMPT, "teacher_prompt": "{solution} {problem}"}},
    "older": {"script": {}, "training": {}},
    "donor": {"script": {}, "training": {"teacher_context": "donor"}},
    "taught": {"script": {}, "training": {"teacher_model_name_or_path": "the/teacher"}},
}


@pytest.fixture
def settle(adapters, tmp_path, tiny_model_dir):
    """A function that gives the student's, the teacher's and the system prompt of an evaluation of runs."""

    def settle(*names, flags=()):
        folders = []
        for name in names:
            run, _, checkpoint = name.partition("/")
            if not (tmp_path / run).exists():
                shutil.copytree(adapters["random"], tmp_path / run / "checkpoint-5")
                shutil.copytree(adapters["random"], tmp_path / run, dirs_exist_ok=True)
                if run in RECORDS:
                    (tmp_path / run / "run_config.json").write_text(json.dumps(RECORDS[run]))
            folders.append(str(tmp_path / run / checkpoint))
        args = evaluate_math.build_parser().parse_args(
            ["--base_model", str(tiny_model_dir), *(["--checkpoint_dir", *folders] if folders else []), *flags]
        )
        evaluate_math.settle_prompts(args)
        return args.student_prompt, args.teacher_prompt, args.system_prompt

    return settle


@pytest.mark.parametrize(
    ("runs", "flags", "expected"),
    [
        ([], [], (None, None, None)),
        (["unknown"], [], (None, None, None)),
        (["opsd"], [], ("Add {problem}!", None, "You add.")),
        (["sft/checkpoint-5"], [], ("Add {problem}!", None, "You add.")),
        (["opsd", "opsd/checkpoint-5", "sft", "unknown"], [], ("Add {problem}!", None, "You add.")),
        (["old", "older"], [], (None, None, None)),
        (["old"], ["--privileged"], (None, "{solution} {problem}", None)),
        (["opsd"], ["--privileged"], (None, None, "You add.")),
        (["opsd"], ["--student_prompt", "{problem}", "--system_prompt", "x"], ("{problem}", None, "x")),
        (["opsd"], ["--student_prompt", STUDENT_PROMPT], (None, None, "You add.")),
        (["opsd", "other"], ["--student_prompt", "{problem}", "--system_prompt", ""], ("{problem}", None, "")),
    ],
)
def test_prompts_are_those_of_the_training(settle, caplog, runs, flags, expected):
    assert settle(*runs, flags=flags) == expected
    assert ("--system_prompt: as in the training, 'You add.'" in caplog.text) == (expected[2] == "You add.")
    assert ("--student_prompt: as in the training" in caplog.text) == (expected[0] == "Add {problem}!")


@pytest.mark.parametrize(
    ("runs", "flags", "message"),
    [
        (["opsd", "other"], [], "--student_prompt: the models were trained with different ones:"),
        (["opsd", "other"], ["--student_prompt", "{problem}"], "--system_prompt: the models were trained with"),
        (["old", "older"], ["--privileged"], "--teacher_prompt: the models were trained with different ones"),
        ([], ["--student_prompt", "Add!"], "--student_prompt lacks the placeholder {problem}"),
        ([], ["--privileged", "--student_prompt", "{problem}"], "--student_prompt: not used with --privileged"),
        ([], ["--teacher_prompt", "{problem}"], "--teacher_prompt: not used without --privileged"),
        (["donor"], ["--privileged"], "was trained with --teacher_context donor, and this would measure a teacher"),
        (["taught"], ["--privileged"], "was taught by another model, the/teacher; evaluate that as --base_model"),
    ],
)
def test_prompts_that_cannot_be_settled_are_refused(settle, runs, flags, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        settle(*runs, flags=flags)


def test_a_full_model_is_asked_with_its_prompt(tmp_path):
    (tmp_path / "run_config.json").write_text(json.dumps(RECORDS["opsd"]))
    for folder in (tmp_path, tmp_path / "checkpoint-5"):
        args = evaluate_math.build_parser().parse_args(["--base_model", str(folder)])
        evaluate_math.settle_prompts(args)
        assert (args.student_prompt, args.system_prompt) == ("Add {problem}!", "You add.")
    args = evaluate_math.build_parser().parse_args(["--base_model", str(tmp_path / "model")])  # beside a run
    evaluate_math.settle_prompts(args)
    assert args.student_prompt is None


def test_the_prompt_is_asked_with_and_recorded(
    adapters, data_file, tiny_model_dir, tokenizer, tmp_path, monkeypatch, caplog
):
    run = tmp_path / "run"
    shutil.copytree(adapters["random"], run)
    (run / "run_config.json").write_text(json.dumps(RECORDS["opsd"]))
    asked = []

    def completions(args, options, requests, sampling):
        asked.extend(tokenizer.decode(request.question.prompt_ids) for request in requests)
        yield [(request, sampling_engine.Completion(r"\boxed{1005}", 1, "stop")) for request in requests]

    monkeypatch.setattr(evaluate_math, "completions", completions)
    output_file = tmp_path / "scores.json"
    flags = ["--base_model", str(tiny_model_dir), "--checkpoint_dir", str(run), "--dataset", str(data_file)]
    flags += ["--enable_thinking", "false", "--val_n", "1", "--num_samples", "1", "--max_new_tokens", "8"]
    flags += ["--grade_workers", "1"]
    main([*flags, "--output_file", str(output_file)])
    expected = "<|im_start|>system\nYou add.<|im_end|>\n<|im_start|>user\nAdd 358+647!<|im_end|>\n"
    assert [text.startswith(expected) for text in asked] == [True, True]  # the base as well
    settings = json.loads(output_file.read_text())["settings"]
    assert (settings["student_prompt"], settings["system_prompt"]) == ("Add {problem}!", "You add.")
    with pytest.raises(SystemExit):
        main([*flags, "--output_file", str(output_file), "--system_prompt", "You multiply."])


def test_questions_of_conversations(tmp_path, tokenizer):
    turns = [{"role": "system", "content": "You add."}, {"role": "user", "content": "1+2"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns, "answer": "3"}) + "\n")
    benchmark = find_benchmark(str(tmp_path / "chats.jsonl"), problem_column="messages")
    for system_prompt, first in ((None, "You add."), ("You multiply.", "You multiply.")):
        (question,) = load_questions(benchmark, tokenizer, thinking=False, system_prompt=system_prompt)
        assert tokenizer.decode(question.prompt_ids).startswith(f"<|im_start|>system\n{first}<|im_end|>\n")
        assert question.problem == "1+2"


def test_answers_may_be_numbers(tmp_path, tokenizer):
    file = tmp_path / "numbers.jsonl"
    file.write_text("".join(json.dumps({"q": f"{n}?", "a": n}) + "\n" for n in (25.0, 0.5, None)))
    benchmark = find_benchmark(str(file), problem_column="q", answer_column="a")
    assert [question.gold for question in load_questions(benchmark, tokenizer, thinking=False)] == ["25", "0.5"]


def test_benchmarks_by_name_id_and_copy(tmp_path, tokenizer):
    assert find_benchmark("AIME24") == find_benchmark("HuggingFaceH4/aime_2024")
    assert find_benchmark("someone/else", split="test") == Benchmark("someone/else", "someone/else", split="test")
    with pytest.raises(ValueError, match="--dataset aime99.*aime24, aime25"):
        find_benchmark("aime99")
    with pytest.raises(FileNotFoundError, match="--data_root .*amo-bench"):
        find_benchmark("amo-bench", tmp_path)
    folder = tmp_path / "amo-bench" / "data"
    folder.mkdir(parents=True)
    row = {"question_id": 1, "prompt": "1+1?", "solution": "2", "answer": "\\boxed{2}", "answer_type": "number"}
    (folder / "test-0.jsonl").write_text(json.dumps(row) + "\n")
    (question,) = load_questions(find_benchmark("amo-bench", tmp_path), tokenizer, thinking=False)
    assert (question.benchmark, question.problem, question.answer_type) == ("amo-bench", "1+1?", "number")


def test_a_template_without_thinking_mode_is_refused(data_file, tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match="--enable_thinking true: .*--enable_thinking false"):
        load_questions(find_benchmark(str(data_file)), tokenizer, thinking=True)


@pytest.mark.parametrize("name", ["run_eval.sh", "run_eval_nonthink.sh"])
def test_launch_scripts(name, adapters):
    checkpoints = str(Path(adapters["random"]).parent / "checkpoint-*")
    settings = {"DRY_RUN": "1", "CHECKPOINTS": checkpoints, "MODEL": "some/model", "OUTPUT_DIR": "there"}
    settings["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    run = subprocess.run(
        ["bash", ROOT / "eval" / name, "--val_n", "2"], env=os.environ | settings, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    resolved = evaluate_math.build_parser().parse_args(run.stdout.split()[2:])
    assert sorted(resolved.checkpoint_dir) == sorted(adapters.values())
    assert (resolved.base_model, resolved.val_n, resolved.output_file.parent) == (
        "some/model",
        2,
        Path("there/results"),
    )
    assert resolved.thinking == (name == "run_eval.sh")
    assert resolved.dataset == ["aime24", "aime25", "hmmt25"]
    sampling = (resolved.temperature, resolved.top_p, resolved.top_k, resolved.min_p, resolved.presence_penalty)
    assert (*sampling, resolved.max_new_tokens) == (1.0, 1.0, 0, 0.0, 0.0, 38912)  # the release's


def spoil(adapter: str, target: Path, spoiled: str) -> str:
    """A copy of `adapter` in `target` with one fault; returns its folder."""
    target.mkdir()
    config = json.loads((Path(adapter) / "adapter_config.json").read_text())
    weights = target / "adapter_model.safetensors"
    weights.write_bytes((Path(adapter) / weights.name).read_bytes())
    if spoiled == "no weights":
        weights.unlink()
    elif spoiled == "no tensors":
        save_file({}, weights)
    elif spoiled == "empty tensors":
        save_file({"base_model.model.lm_head.lora_B.weight": torch.zeros(0)}, weights)
    elif spoiled == "torn":
        weights.write_bytes(weights.read_bytes()[:100])
    elif spoiled == "other type":
        config["peft_type"] = "IA3"
    if spoiled != "no config":
        (target / "adapter_config.json").write_text(json.dumps(config))
    return str(target)


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        ("no config", "adapter_config.json is missing"),
        ("no weights", "adapter_model.safetensors is missing"),
        ("no tensors", "empty"),
        ("empty tensors", "empty"),
        ("torn", "cannot be read"),
        ("other type", "IA3"),
    ],
)
def test_unusable_adapters_are_refused(adapters, tmp_path, spoiled, message):
    folder = spoil(adapters["random"], tmp_path / "spoiled", spoiled)
    with pytest.raises(ValueError, match=f"--checkpoint_dir .*{message}"):
        read(folder)


def test_adapter_rank_and_hint(adapters):
    assert read(adapters["random"]).rank == 4
    with pytest.raises(ValueError, match=f"there are adapters in .*{adapters['random']}"):
        read(str(Path(adapters["random"]).parent))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--val_n", "0"], ["--val_n 0", "at least 1"]),
        (["--temperature", "-0.5"], ["--temperature -0.5", "0 (greedy) or more"]),
        (["--top_p", "0"], ["--top_p 0"]),
        (["--top_k", "-2"], ["--top_k -2"]),
        (["--min_p", "1.5"], ["--min_p 1.5"]),
        (["--max_new_tokens", "0"], ["--max_new_tokens 0"]),
        (["--max_new_tokens", "1000000"], ["--max_new_tokens 1000000", "give at most"]),
        (["--max_model_len", "8"], ["--max_model_len 8", "longest prompt"]),
        (["--num_samples", "0"], ["--num_samples 0"]),
        (["--presence_penalty", "3"], ["--presence_penalty 3"]),
        (["--grade_timeout", "0"], ["--grade_timeout 0"]),
        (["--data_parallel", "0"], ["--data_parallel 0"]),
        (["--skip_base"], ["--skip_base", "--checkpoint_dir"]),
        (["--reference", "other"], ["--reference other", "base"]),
        (["--regrade", "nowhere.json"], ["--regrade nowhere.json"]),
        (["--checkpoint_dir", "nowhere"], ["--checkpoint_dir nowhere", "adapter_config.json is missing"]),
        (["--base_model", "./nowhere"], ["--base_model ./nowhere", "no such folder"]),
        (["--dataset", "nowhere.jsonl"], ["--dataset nowhere.jsonl", "no such file"]),
        (["--problem_column", "question"], ["--problem_column question", "problem, solution"]),
        (["--answer_column", "gold"], ["--answer_column gold", "answer"]),
        (["--privileged", "--solution_column", "proof"], ["--solution_column proof", "solution"]),
        (["--output_file", "."], ["--output_file .", "name a file"]),
        (["--output_file", "results.txt"], ["--output_file results.txt", ".json"]),
    ],
)
def test_bad_input_is_refused_before_the_engine_starts(
    arguments, expected, tiny_model_dir, data_file, capsys, monkeypatch, tmp_path
):
    def fail(*args, **options):
        raise AssertionError("the engine was started")

    monkeypatch.setattr(evaluate_math, "start_engine", fail)
    defaults = ["--base_model", str(tiny_model_dir), "--dataset", str(data_file), "--max_new_tokens", "8"]
    defaults += ["--output_file", str(tmp_path / "scores.json")]
    with pytest.raises(SystemExit):
        main([*defaults, *arguments])
    message = capsys.readouterr().err
    for part in expected:
        assert part in message
