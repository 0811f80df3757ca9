"""The evaluator with real vLLM on a tiny model (one engine for all), its statistics, and its refusal of bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_collator import STUDENT_PROMPT, encode_chat_prompt, fill_template
from eval import evaluate_math
from eval.evaluate_math import (
    Question,
    Sampling,
    check_adapter,
    evaluate,
    load_questions,
    main,
    sample_seed,
    start_engine,
    stop_engine,
)

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
    return load_questions(str(data_file), tokenizer, thinking=False)


@pytest.fixture(scope="module")
def adapters(tiny_model_dir, tmp_path_factory):
    """Adapter folders: "zero" leaves the model as it is, "random" does not."""
    folders = {}
    for name in ("zero", "random"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
        zero_b = name == "zero"
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=zero_b))
        folders[name] = str(tmp_path_factory.mktemp("adapters") / name)
        model.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def engine(tiny_model_dir, adapters):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the fastest for a tiny model, by far so where other processes compete
    with mock.patch.dict(os.environ):  # vLLM adds to it
        engine = start_engine(
            str(tiny_model_dir), lora_rank=max(map(check_adapter, adapters.values())), max_model_len=512
        )
        yield engine
        stop_engine(engine)
    torch.set_num_threads(threads)


def texts(result):
    return [[response["text"] for response in sample["responses"]] for sample in result["samples"]]


@pytest.fixture(scope="module")
def base_result(engine, questions):
    return evaluate(engine, questions, SAMPLING, thinking=False)


def test_samples_do_not_depend_on_number_or_order_of_problems(engine, questions, base_result):
    few = evaluate(engine, questions[3:1:-1], SAMPLING, thinking=False)
    assert few["samples"] == base_result["samples"][3:1:-1]
    one_sample = Sampling(val_n=1, max_new_tokens=24)
    (alone,) = evaluate(engine, questions[:1], one_sample, thinking=False)["samples"]
    assert alone["responses"] == base_result["samples"][0]["responses"][:1]


def test_samples_differ_from_each_other_and_with_the_seed(engine, questions, base_result):
    assert any(len({response["text"] for response in sample["responses"]}) > 1 for sample in base_result["samples"])
    reseeded = evaluate(engine, questions, Sampling(val_n=3, max_new_tokens=24, seed=1), thinking=False)
    assert texts(reseeded) != texts(base_result)


def test_many_long_prompts_at_once_keep_their_seeds(engine, questions):
    # More prompt tokens than fit into one step: vLLM must not split a prompt, whose sampler it cannot rewind on CPU.
    budget = engine.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    prompt_ids = questions[0].prompt_ids * 3
    count = budget // len(prompt_ids) + 2
    longer = [Question(f"{index}", "0", [index, *prompt_ids]) for index in range(count)]  # none finds another's prefix
    sampling = Sampling(val_n=1, max_new_tokens=4)
    together = evaluate(engine, longer, sampling, thinking=False)
    last = evaluate(engine, longer[-1:], sampling, thinking=False)
    assert together["samples"][-1] == last["samples"][0]


def test_adapters_and_base_share_an_engine(engine, questions, adapters, base_result):
    changed = evaluate(engine, questions, SAMPLING, thinking=False, checkpoint=adapters["random"])
    unchanged = evaluate(engine, questions, SAMPLING, thinking=False, checkpoint=adapters["zero"])
    base_again = evaluate(engine, questions, SAMPLING, thinking=False)
    assert changed["model"] == adapters["random"]
    assert texts(changed) != texts(base_result)
    assert unchanged["samples"] == base_result["samples"]
    assert base_again == base_result


def test_an_adapter_replaced_in_its_folder_is_loaded_anew(engine, questions, adapters, base_result, tmp_path):
    folder = tmp_path / "adapter"
    folder.symlink_to(adapters["random"])
    changed = evaluate(engine, questions, SAMPLING, thinking=False, checkpoint=str(folder))
    folder.unlink()
    folder.symlink_to(adapters["zero"])
    unchanged = evaluate(engine, questions, SAMPLING, thinking=False, checkpoint=str(folder))
    assert texts(changed) != texts(base_result)
    assert unchanged["samples"] == base_result["samples"]


def completion_log_probs(model, prompt_ids, completion_ids):
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + completion_ids])).logits[0, len(prompt_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion_ids)[:, None])[:, 0].double()  # (T,)


@pytest.mark.parametrize("name", ["base", "random"])
def test_log_probs_agree_with_transformers(engine, questions, adapters, tiny_model_dir, name):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    adapter = LoRARequest("log-probs", next(evaluate_math.ADAPTER_IDS), adapters["random"])
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


def test_command_line_end_to_end(tiny_model_dir, data_file, adapters, base_result, tmp_path):
    output_file = tmp_path / "results" / "scores.json"
    command = [sys.executable, "eval/evaluate_math.py", "--base_model", str(tiny_model_dir)]
    command += ["--checkpoint_dir", adapters["random"], "--dataset", str(data_file), "--output_file", str(output_file)]
    command += ["--num_samples", "4", "--val_n", "3", "--greedy", "--max_new_tokens", "24", "--no_thinking"]
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    written = json.loads(output_file.read_text())
    assert written["settings"]["val_n"] == 3
    base, adapted = written["results"]
    assert (base["model"], adapted["model"]) == ("base", adapters["random"])
    assert base["samples"] == base_result["samples"][:4]  # another process, other problems beside them
    assert texts(adapted) != texts(base)
    assert "| model | Avg@3 | ± | greedy | truncated |" in run.stdout
    assert adapters["random"] in run.stdout


class CannedEngine:
    """Answers in turn with the given (text, finish reason) pairs."""

    def __init__(self, *responses):
        self.outputs = [
            SimpleNamespace(outputs=[SimpleNamespace(text=text, token_ids=[0] * len(text), finish_reason=reason)])
            for text, reason in responses
        ]

    def generate(self, prompts, parameters, **options):
        assert len(prompts) == len(parameters) == len(self.outputs)
        return self.outputs


RIGHT, WRONG, CUT = (r"\boxed{7}", "stop"), (r"\boxed{8}", "stop"), (r"It is \boxed{", "length")


def test_statistics():
    questions = [Question("a", "7", [1]), Question("b", "7", [2]), Question("c", "7", [3])]
    engine = CannedEngine(RIGHT, RIGHT, WRONG, RIGHT, WRONG, RIGHT, WRONG, CUT, RIGHT)
    result = evaluate(engine, questions, Sampling(val_n=2, greedy=True), thinking=False)
    assert result["avg_at_k"] == pytest.approx(0.5)  # per problem 1, 1/2, 0
    assert result["standard_error"] == pytest.approx(0.5 / 3**0.5)  # deviation 1/2 over three problems
    assert result["greedy"] == pytest.approx(2 / 3)
    assert result["truncated"] == pytest.approx(1 / 6)
    assert [response["correct"] for response in result["samples"][1]["responses"]] == [True, False]
    assert result["samples"][2]["responses"][1] == {
        "seed": sample_seed(0, "c", 1),
        "text": CUT[0],
        "extracted": None,
        "correct": False,
        "num_tokens": len(CUT[0]),
        "finish_reason": "length",
    }


def test_statistics_of_one_problem_without_greedy():
    result = evaluate(CannedEngine(RIGHT, WRONG), [Question("a", "7", [1])], Sampling(val_n=2), thinking=False)
    assert (result["avg_at_k"], result["standard_error"], result["greedy"]) == (0.5, None, None)
    assert result["samples"][0]["greedy"] is None


def test_thinking_responses_need_the_end_of_the_thought():
    engine = CannedEngine(RIGHT, ("Hm.</think>" + RIGHT[0], "stop"))
    result = evaluate(engine, [Question("a", "7", [1])], Sampling(val_n=2), thinking=True)
    assert [response["correct"] for response in result["samples"][0]["responses"]] == [False, True]


def test_seeds_are_fixed_and_distinct():
    assert sample_seed(0, "1+1", 0) == 4390963752228065215  # published results rest on this
    seeds = {sample_seed(base, problem, index) for base in (0, 1) for problem in ("a", "b") for index in range(4)}
    assert len(seeds) == 16
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_questions(data_file, tokenizer):
    student = load_questions(str(data_file), tokenizer, thinking=True, num_samples=2)
    assert [(question.problem, question.gold) for question in student] == [("358+647", "1005"), ("120+45", "165")]
    expected = encode_chat_prompt(tokenizer, fill_template(STUDENT_PROMPT, problem="358+647"), thinking=True)
    assert student[0].prompt_ids == expected
    teacher = load_questions(str(data_file), tokenizer, thinking=True, privileged=True)
    assert "It is 1005, clearly." in tokenizer.decode(teacher[0].prompt_ids)


def test_answers_may_be_numbers(tmp_path, tokenizer):
    file = tmp_path / "numbers.jsonl"
    file.write_text("".join(json.dumps({"q": f"{n}?", "a": n}) + "\n" for n in (25.0, 0.5, None)))
    questions = load_questions(str(file), tokenizer, thinking=False, problem_column="q", answer_column="a")
    assert [question.gold for question in questions] == ["25", "0.5"]


def test_a_template_without_thinking_mode_is_refused(data_file, tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match="--enable_thinking.*--no_thinking"):
        load_questions(str(data_file), tokenizer, thinking=True)


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
        check_adapter(folder)
    with pytest.raises(ValueError, match="--checkpoint_dir"):
        evaluate(CannedEngine(RIGHT), [Question("a", "7", [1])], Sampling(val_n=1), thinking=False, checkpoint=folder)


def test_adapter_rank_and_hint(adapters):
    assert check_adapter(adapters["random"]) == 4
    with pytest.raises(ValueError, match=f"there are adapters in {adapters['random']}"):
        check_adapter(str(Path(adapters["random"]).parent))


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
        (["--skip_base"], ["--skip_base", "--checkpoint_dir"]),
        (["--checkpoint_dir", "nowhere"], ["--checkpoint_dir nowhere", "adapter_config.json is missing"]),
        (["--base_model", "./nowhere"], ["--base_model ./nowhere", "no such folder"]),
        (["--dataset", "nowhere.jsonl"], ["--dataset_name nowhere.jsonl", "no such file"]),
        (["--problem_column", "question"], ["--problem_column question", "problem, solution"]),
        (["--answer_column", "gold"], ["--answer_column gold", "answer"]),
        (["--privileged", "--solution_column", "proof"], ["--solution_column proof", "solution"]),
        (["--output_file", "."], ["--output_file .", "name a file"]),
    ],
)
def test_bad_input_is_refused_before_the_engine_starts(
    arguments, expected, tiny_model_dir, data_file, capsys, monkeypatch
):
    def fail(*args, **options):
        raise AssertionError("the engine was started")

    monkeypatch.setattr(evaluate_math, "start_engine", fail)
    defaults = ["--base_model", str(tiny_model_dir), "--dataset", str(data_file), "--max_new_tokens", "8"]
    with pytest.raises(SystemExit):
        main([*defaults, *arguments])
    message = capsys.readouterr().err
    for part in expected:
        assert part in message
