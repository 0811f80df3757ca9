"""The baselines: what SFT and GRPO learn from, what they say of bad input, and whole runs on the tiny model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, Features, Value
from helpers import ADAPTER, CPU
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoTokenizer
from trl import SFTConfig

import grpo_train
import sft_train
from data_collator import encode_chat_prompt
from eval.benchmarks import find_benchmark, load_questions
from opsd.grpo import OnPolicyGRPOTrainer
from opsd.rewards import make_reward
from opsd.run.checkpoints import find_fault
from opsd.run.problem_data import HISTORY, load_problems
from opsd.sft import CompleteSFTTrainer

ROOT = Path(__file__).parents[1]
AIME = ROOT.parent / "shared" / "data" / "eval" / "aime24"
SETTINGS = CPU | ADAPTER | {"per_device_train_batch_size": 4, "max_steps": 4, "save_steps": 2}


@pytest.fixture
def train_file(tmp_path, problems):
    file = tmp_path / "train.jsonl"
    problems.to_json(file)
    return file


@pytest.fixture
def run(tiny_model_dir, train_file, tmp_path):
    """A function that runs a program on the tiny model; keywords replace and add to the flags above."""

    def run(program, folder="out", **settings):
        defaults = {"model_name_or_path": tiny_model_dir, "dataset_name": train_file, "output_dir": tmp_path / folder}
        flags = defaults | SETTINGS | settings
        program.main([text for flag, value in flags.items() for text in (f"--{flag}", str(value))])
        return tmp_path / folder

    return run


@pytest.fixture
def no_model(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a model would have been loaded")

    monkeypatch.setattr(CompleteSFTTrainer, "__init__", fail)
    monkeypatch.setattr(OnPolicyGRPOTrainer, "__init__", fail)


@pytest.mark.parametrize(
    ("program", "settings", "message"),
    [
        (sft_train, {"solution_column": "proof"}, "--solution_column proof: the data set has no such column"),
        (sft_train, {"max_length": 20}, "--max_length 20: all 64 examples are longer"),
        (sft_train, {"effective_batch_size": 6}, "--effective_batch_size 6: is not a multiple of 1 processes x"),
        (sft_train, {"eval_strategy": "steps"}, "--eval_dataset_name and --eval_strategy need each other"),
        (
            grpo_train,
            {"num_generations": 4, "answer_column": "key"},
            "--answer_column key: the data set has no such column",
        ),
        (
            grpo_train,
            {"num_generations": 4, "max_prompt_length": 20},
            "--max_prompt_length 20: all 64 examples are longer",
        ),
        (sft_train, {"student_prompt": "Add!"}, "--student_prompt lacks the placeholder {problem}"),
        (grpo_train, {"student_prompt": "{question}"}, "--student_prompt lacks the placeholder {problem}"),
        (grpo_train, {"num_generations": 3}, "make it a multiple of --num_generations"),
        (sft_train, {"assistant_only_loss": True}, "--assistant_only_loss True: must be False"),
        (
            sft_train,
            {"eos_token": "<|endoftext|>"},
            "--eos_token <|endoftext|>: must be None: the prompts are encoded with the tokenizer",
        ),
        (
            grpo_train,
            {"use_vllm": True, "use_dora": True, "num_generations": 4},
            "--use_dora True: vLLM does not serve",
        ),
        (
            grpo_train,
            {"use_vllm": True, "loss_type": "vespo", "num_generations": 4},
            "--vllm_importance_sampling_mode sequence_mask: must be one of token_truncate, token_mask with "
            "--loss_type",
        ),
        (
            grpo_train,
            {"num_generations": 4, "neftune_noise_alpha": 5},
            "--neftune_noise_alpha 5.0: must be None",
        ),
        (sft_train, {"lora_target_modules": "q_prj"}, "--lora_target_modules q_prj: the model has no such module"),
        (
            grpo_train,
            {"num_generations": 4, "model_name_or_path": "./nowhere"},
            "--model_name_or_path ./nowhere: no such folder",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_before_a_model_is_loaded(run, no_model, program, settings, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        run(program, **settings)


# SFT


def limits(max_length):
    return SFTConfig(max_length=max_length, use_cpu=True, bf16=False)


@pytest.mark.parametrize("program", [sft_train, grpo_train], ids=["sft", "grpo"])
def test_own_prompt_is_that_of_the_evaluation(tiny_model_dir, train_file, problems, program):
    template = "{problem}\nBe brief."
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    questions = load_questions(find_benchmark(str(train_file)), tokenizer, thinking=False, template=template)
    if program is sft_train:
        rows = sft_train.prepare(problems, tokenizer, False, limits(None), template)
        prompts = [row["input_ids"][: row["completion_mask"].index(1)] for row in rows]
    else:
        rows = grpo_train.prepare(problems, tokenizer, False, None, template)
        prompts = [encode_chat_prompt(tokenizer, row["prompt"][0]["content"], thinking=False) for row in rows]
    assert prompts == [question.prompt_ids for question in questions]
    assert tokenizer.decode(prompts[0]).count(f"{problems[0]['problem']}\nBe brief.<|im_end|>") == 1


def test_sft_learns_the_solution_behind_the_prompt_of_the_evaluation(tiny_model_dir, train_file, problems):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    questions = load_questions(find_benchmark(str(train_file)), tokenizer, thinking=False)
    encoded = sft_train.prepare(problems, tokenizer, False, limits(None))
    for row, question, problem in zip(encoded, questions, problems, strict=True):
        ids, mask = row["input_ids"], row["completion_mask"]
        length = len(question.prompt_ids)
        assert ids[:length] == question.prompt_ids
        assert mask == [0] * length + [1] * (len(ids) - length)
        assert tokenizer.decode(ids[length:]) == problem["solution"] + tokenizer.eos_token


def test_sft_leaves_out_and_counts_what_is_too_long(tiny_model_dir, problems, caplog):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    lengths = [len(ids) for ids in sft_train.prepare(problems, tokenizer, False, limits(None))["input_ids"]]
    limit = sorted(lengths)[len(lengths) // 2]
    fitting = sft_train.prepare(problems, tokenizer, False, limits(limit))
    assert [len(ids) for ids in fitting["input_ids"]] == [length for length in lengths if length <= limit]
    assert f"{len(lengths) - len(fitting)} of 64 examples left out as longer than {limit} tokens" in caplog.text


def test_sft_trains_evaluates_and_resumes(run, train_file, tiny_model_dir, problems):
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset_name": train_file}
    folder = run(sft_train, **evaluation)
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    losses = [logs["loss"] for logs in state["log_history"] if "loss" in logs]
    assert len(losses) == 4
    evaluations = [logs["eval_loss"] for logs in state["log_history"] if "eval_loss" in logs]
    assert len(evaluations) == 2 and evaluations[1] < evaluations[0]
    adapter = load_file(folder / "adapter_model.safetensors")
    assert any(weight.any() for name, weight in adapter.items() if "lora_B" in name)
    settings = json.loads((folder / "run_config.json").read_text())
    assert settings["model"]["lora_r"] == 16 and settings["training"]["completion_only_loss"] is True
    card = (folder / "README.md").read_text()
    assert f"`{tiny_model_dir}`, trained by supervised fine-tuning" in card and "[None]" not in card

    with pytest.raises(SystemExit, match="holds checkpoint-4"):
        run(sft_train)
    resumed = run(sft_train, **evaluation, resume_from_checkpoint=folder / "checkpoint-2", folder="resumed")
    assert_close(load_file(resumed / "adapter_model.safetensors"), adapter, rtol=0, atol=0)


def test_sft_has_its_prompt_of_the_flags(run, tmp_path, monkeypatch, tiny_model_dir):
    """Own template, system prompt and conversations; and a flag of another program's, which is said to be unused."""
    turns = [{"role": "user", "content": "12+34"}, {"role": "assistant", "content": "46"}]
    earlier = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
    rows = [{"conversations": [*earlier, *turns], "answer": 46}] * 4
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    learned, prepare = [], sft_train.prepare

    def keep(*args, **kwargs):
        learned.extend(prepare(*args, **kwargs)["input_ids"])
        sys.exit("would train")

    monkeypatch.setattr(sft_train, "prepare", keep)
    settings = {"dataset_name": tmp_path / "chats.jsonl", "problem_column": "conversations"}
    with pytest.raises(SystemExit, match="would train"):
        run(sft_train, **settings, student_prompt="{problem}=", system_prompt="Be brief.")
    assert AutoTokenizer.from_pretrained(tiny_model_dir).decode(learned[0]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nGood day<|im_end|>\n"
        "<|im_start|>user\n12+34=<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n46<|im_end|>"
    )


@pytest.mark.parametrize(
    ("program", "settings", "message"),
    [
        (sft_train, {"answer_column": "answer"}, "--answer_column answer: not used"),
        (grpo_train, {"solution_column": "proof", "num_generations": 4}, "--solution_column proof: not used"),
        (sft_train, {"solution_column": "solution"}, None),
        (grpo_train, {"answer_column": "answer", "num_generations": 4}, None),
    ],
)
def test_data_flags_that_a_program_does_not_use(run, no_model, caplog, program, settings, message):
    caplog.set_level("INFO")
    with pytest.raises(AssertionError, match="a model would have been loaded"):
        run(program, **settings)
    assert ("not used" in caplog.text) == (message is not None)
    assert (message or "") in caplog.text


# GRPO


@pytest.mark.parametrize(
    ("response", "answer", "math", "exact_match"),
    [
        (r"So \boxed{12}", "12", 1.0, 1.0),
        (r"So \boxed{\frac{1}{2}}", "0.5", 1.0, 0.0),
        (r"So \boxed{013}", "13", 1.0, 0.0),
        (r"So \boxed{12}", "13", 0.0, 0.0),
        ("So 12", "12", 0.0, 0.0),
        ("", "12", 0.0, 0.0),
    ],
)
def test_rewards(tiny_model_dir, response, answer, math, exact_match):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    arguments = {"completions": [[{"role": "assistant", "content": response}]], "answer": [answer], "prompts": []}
    arguments |= {"row": [{}], "log_metric": None}
    arguments["completion_ids"] = [tokenizer(response + "<|im_end|>", add_special_tokens=False).input_ids]
    assert make_reward("math", False, tokenizer)(**arguments) == [math]
    assert make_reward("exact_match", False, tokenizer)(**arguments) == [exact_match]


def test_thoughts_that_were_cut_off_earn_nothing(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    texts = [r"<think>\boxed{1}", r"</think>\boxed{1}"]
    completion_ids = tokenizer(texts, add_special_tokens=False).input_ids
    reward = make_reward("math", True, tokenizer)
    assert reward(completions=[], completion_ids=completion_ids, answer=["1", "1"], row=[{}] * 2, log_metric=None) == [
        0.0,
        1.0,
    ]


@pytest.mark.vllm
def test_grpo_rewards_right_answers_on_policy_and_resumes(run, tmp_path, problems, monkeypatch):
    boxed = []  # whether the last box of each completion has the answer
    make_reward = grpo_train.make_reward

    def make_recorded(*args):
        reward = make_reward(*args)

        def recorded(completions, answer, **kwargs):
            boxes = [re.findall(r"\\boxed\{(\d+)\}", message["content"])[-1:] for (message,) in completions]
            boxed.append([float(box == [gold]) for box, gold in zip(boxes, answer, strict=True)])
            return reward(completions=completions, answer=answer, **kwargs)

        return recorded

    monkeypatch.setattr(grpo_train, "make_reward", make_recorded)
    file = tmp_path / "few.jsonl"
    problems.select(range(8)).to_json(file)  # two steps in an epoch
    settings = {"use_vllm": True, "num_generations": 4, "per_device_train_batch_size": 16, "temperature": 1.0}
    settings |= {"dataset_name": file, "save_steps": 3}
    folder = run(grpo_train, **settings, max_completion_length=64)
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    logs = [entry for entry in state["log_history"] if "reward" in entry]
    assert len(logs) == 4
    assert [entry["reward"] for entry in logs] == pytest.approx([sum(step) / 16 for step in boxed])
    assert 0 < sum(map(sum, boxed)) < 64
    for entry in logs:
        assert entry["sampling/sampling_logp_difference/max"] <= 1e-4  # vLLM has the adapter as it is
        assert 0.0 <= entry["frac_reward_zero_std"] <= 1.0
    tokens = [entry["num_generated_tokens"] for entry in logs]
    assert tokens == pytest.approx([16 * sum(e["completions/mean_length"] for e in logs[: i + 1]) for i in range(4)])
    adapter = load_file(folder / "adapter_model.safetensors")
    assert any(weight.any() for name, weight in adapter.items() if "lora_B" in name)

    resume = {"resume_from_checkpoint": folder / "checkpoint-3", "folder": "resumed"}
    resumed = run(grpo_train, **settings, max_completion_length=64, **resume)
    assert_close(load_file(resumed / "adapter_model.safetensors"), adapter, rtol=0, atol=1e-6)


def test_grpo_samples_with_transformers_and_evaluates(run, train_file, tmp_path, problems):
    problems.select(range(4)).to_json(tmp_path / "eval.jsonl")
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset_name": tmp_path / "eval.jsonl"}
    settings = {
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 4,
        "max_steps": 1,
    }
    folder = run(grpo_train, **settings, **evaluation, max_completion_length=64)
    log = json.loads((folder / "checkpoint-1" / "trainer_state.json").read_text())["log_history"]
    assert "trained by reinforcement learning on verifiable answers" in (folder / "README.md").read_text()
    (evaluated,) = [entry for entry in log if "eval_reward" in entry]
    (trained,) = [entry for entry in log if "reward" in entry]
    assert 0.0 <= evaluated["eval_reward"] <= 1.0
    # those of the evaluation are not counted
    assert trained["num_generated_tokens"] == pytest.approx(8 * trained["completions/mean_length"])


def test_grpo_leaves_out_problems_with_control_tokens(tiny_model_dir, caplog):
    """TRL encodes the prompts, and would take them for turns."""
    texts = ["1+1", "2+2<|im_end|>", "<|im_start|>system", "<think> 3+3"]
    dataset = Dataset.from_dict({"problem": texts, "answer": texts})
    rows = grpo_train.prepare(dataset, AutoTokenizer.from_pretrained(tiny_model_dir), False, None)
    assert rows["answer"][:] == ["1+1", "<think> 3+3"]
    assert "2 of 4 examples left out, with control tokens in the prompt" in caplog.text


def test_grpo_prompts_are_the_turns_up_to_the_problem(tiny_model_dir, caplog):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    turns.append({"role": "assistant", "content": "Good day"})
    spoiled = [{"role": "system", "content": "Be <|im_end|> brief."}]
    dataset = Dataset.from_dict(
        {"problem": ["1+1"] * 3, "answer": ["2"] * 3, "history": [turns, [], spoiled]},
        Features(problem=Value("string"), answer=Value("string"), history=HISTORY),
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    rows = grpo_train.prepare(dataset, tokenizer, False, None, "{problem}=")
    assert rows.to_list() == [
        {
            "answer": "2",
            "prompt": [*history, {"role": "user", "content": "1+1="}],
            "row": {"problem": "1+1", "answer": "2"},
        }
        for history in (turns, [])
    ]
    assert "1 of 3 examples left out, with control tokens in the prompt" in caplog.text
    lengths = [len(encode_chat_prompt(tokenizer, "1+1=", False, history)) for history in (turns, [])]
    assert lengths[0] > lengths[1] + 10
    short = grpo_train.prepare(dataset, tokenizer, False, lengths[1], "{problem}=")
    assert len(short) == 1 and len(short[0]["prompt"]) == 1


# All of them


def training_rows() -> Dataset:
    """Rows with the eleven columns of the published training data, from real problems where these are at hand."""
    if AIME.exists():
        columns = {f"{name}_column": name for name in ("problem", "solution", "answer")}
        rows = load_problems(str(AIME), "train", columns)
        texts = [(row["problem"], row["solution"], row["answer"]) for row in rows]
        texts = sorted(texts, key=lambda row: sum(map(len, row)))[:16]
    else:
        texts = [(rf"What is ${i}+{i}$?", rf"Twice {i} is \boxed{{{2 * i}}}.", str(2 * i)) for i in range(100, 116)]
    return Dataset.from_list(
        [
            {
                "source": "aops_forum",
                "problem": problem,
                "solution": solution,
                "messages": [{"role": "user", "content": problem}, {"role": "assistant", "content": solution}],
                "system": "You are a helpful assistant.",
                "conversations": [{"from": "user", "value": problem}, {"from": "assistant", "value": solution}],
                "generated_token_count": len(solution),
                "correct": True,
                "Question": problem,
                "COT_Reason": solution,
                "Answer": answer,
            }
            for problem, solution, answer in texts
        ]
    )


@pytest.mark.multiprocess
@pytest.mark.vllm
def test_two_processes_train_on_the_columns_of_the_published_data(tiny_model_dir, tmp_path):
    """OPSD, SFT and GRPO under `accelerate launch`, with vLLM."""
    dataset = training_rows()
    assert len(dataset.column_names) == 11
    dataset.to_parquet(tmp_path / "train.parquet")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    command += ["--config_file", ROOT / "scripts" / "accelerate" / "ddp.yaml", "--mixed_precision", "no"]
    command += [ROOT / "tests" / "baseline_worker.py", tiny_model_dir, tmp_path / "train.parquet", tmp_path]
    environment = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["ACCELERATE_TORCH_DEVICE"] = "cpu"
    with (tmp_path / "log").open("w") as log:
        completed = subprocess.run(
            list(map(str, command)), cwd=ROOT, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT
        )
    assert completed.returncode == 0, (tmp_path / "log").read_text()[-5000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["processes"] == [{"backend": "gloo", "world_size": 2}] * 2
    for method, size in (("opsd", 8), ("sft", 4), ("grpo", 4)):
        log = results[method]["log"]
        assert sum("loss" in entry for entry in log) == 2
        assert find_fault(tmp_path / method / "checkpoint-2") is None
        assert (tmp_path / method / "adapter_model.safetensors").exists()
        settings = json.loads((tmp_path / method / "run_config.json").read_text())
        batch = settings["training"]["per_device_train_batch_size"]
        assert settings["training"]["gradient_accumulation_steps"] == size // (2 * batch)
        if method != "sft":
            rollouts = {tuple(ids) for ids in results[method]["rollouts"]}
            assert len(rollouts) == 2 * size  # no two alike, in two steps
