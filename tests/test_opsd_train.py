"""The entry point: what it says of bad input before a model is loaded, and whole runs on the tiny model."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import save_model, saved_rollouts
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoTokenizer, TrainingArguments

import opsd_train
from opsd.alarm import Alarm, Sign
from opsd_trainer import OPSDTrainer

AIME = Path(__file__).parents[2] / "shared" / "data" / "eval" / "aime24"


@pytest.fixture
def train_file(tmp_path, problems):
    file = tmp_path / "train.jsonl"
    problems.to_json(file)
    return file


@pytest.fixture
def run(tiny_model_dir, train_file, tmp_path):
    """A function that runs the program on the tiny model; arguments replace and add to the ones below."""

    def run(*arguments):
        opsd_train.main(
            [
                *("--model_name_or_path", str(tiny_model_dir), "--dataset_name", str(train_file)),
                *("--config", str(Path(opsd_train.__file__).with_name("quickstart") / "opsd.yaml")),
                *("--output_dir", str(tmp_path / "out"), "--per_device_train_batch_size", "4", "--max_steps", "2"),
                *("--save_steps", "1", "--logging_steps", "1", "--disable_tqdm", "true", "--use_vllm", "false"),
                *arguments,
            ]
        )
        return tmp_path / "out"

    return run


@pytest.fixture
def no_model(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a model would have been loaded")

    monkeypatch.setattr(OPSDTrainer, "__init__", fail)


def write(file, *lines):
    file.write_text("".join(line + "\n" for line in lines))
    return str(file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--use_ema_teacher"], "--use_ema_teacher True: must be left out with --fixed_teacher"),
        (["--ema_decay", "1"], "--ema_decay 1.0: must lie in [0, 1)"),
        (["--beta", "1.5"], "--beta 1.5: must lie in [0, 1]"),
        (["--jsd_token_clip", "-1"], "--jsd_token_clip -1.0: must lie in"),
        (["--temperature", "0"], "--temperature 0.0: must lie in"),
        (["--lmbda", "0.5"], "--lmbda 0.5: must be 1"),
        (["--max_completion_length", "1024"], "--max_completion_length 1024: must be below"),
        (["--teacher_prompt", "{solution}"], "--teacher_prompt lacks the placeholder {problem}"),
        (["--dataset_name", "missing/train.jsonl"], "--dataset_name missing/train.jsonl: no such file"),
        (["--solution_column", "proof"], "--solution_column proof: the data set has no such column; it has problem"),
        (["--answer_column", "key"], "--answer_column key: the data set has no such column"),
        (["--resume_from_checkpoint", "true"], "there is no complete checkpoint in"),
        (["--resume_from_checkpoint", "nowhere"], "--resume_from_checkpoint nowhere: not a complete checkpoint"),
        (["--per_device_train_batch_size", "128"], "64 usable examples, fewer than one step takes (128)"),
        (["--eval_strategy", "steps"], "--eval_dataset_name and --eval_strategy need each other"),
        (["--use_vllm", "true", "--use_peft", "--use_dora"], "--use_dora True: vLLM does not serve such an adapter"),
        (["--use_vllm", "true", "--use_peft", "--load_in_4bit"], "leave out --load_in_4bit"),
        (["--presence_penalty", "1"], "--presence_penalty 1.0: must be 0 without --use_vllm"),
        (
            ["--adapter_name_or_path", "nowhere"],
            "--adapter_name_or_path nowhere: no LoRA adapter, adapter_config.json is missing",
        ),
        (["--max_nonfinite_steps", "0"], "--max_nonfinite_steps 0: must be at least 1"),
        (["--loss_temperature", "0"], "--loss_temperature 0.0: must lie in"),
        (
            ["--num_loss_tokens_to_skip", "64"],
            "--num_loss_tokens_to_skip 64: must be below --max_completion_length 64",
        ),
        (["--disable_dropout", "false"], "--disable_dropout False: must be True: noise would reach the teacher too"),
        (["--neftune_noise_alpha", "5"], "--neftune_noise_alpha 5.0: must be None: noise would reach the teacher too"),
        (["--label_smoothing_factor", "0.1"], "--label_smoothing_factor 0.1: must be 0.0: OPSD has a loss of its own"),
        (["--loss_type", "dft"], "--loss_type dft: must be"),
        (["--eos_token", "<pad>"], "--eos_token <pad>: must be None: the collator makes the prompts"),
        (["--pad_token", "<pad>"], "--pad_token <pad>: must be None"),
        (
            ["--pad_to_multiple_of", "8"],
            "--pad_to_multiple_of 8: must be auto: rollouts are not cut, and packed in one way",
        ),
        (["--train_sampling_strategy", "sequential"], "--train_sampling_strategy sequential: must be random"),
        (["--padding_free"], "--padding_free True: must be False"),
        (["--use_liger_kernel"], "--use_liger_kernel True: must be False"),
        (["--activation_offloading"], "--activation_offloading True: must be False"),
        (["--torch_compile"], "--torch_compile True: must be False: OPSD calls parts of the model by themselves"),
        (["--torch_compile_backend", "eager"], "--torch_compile_backend eager: must be None"),
        (
            ["--uld_student_temperature", "2"],
            "--uld_student_temperature 2.0: must be 1.0: there is no second tokenizer",
        ),
        (["--auto_find_batch_size"], "--auto_find_batch_size True: must be False: the batch would change"),
        (
            ["--label_names", "answer"],
            "--label_names ['answer']: must be None: the evaluation is the loss on rollouts",
        ),
        (["--batch_eval_metrics", "true"], "--batch_eval_metrics True: must be False"),
        (["--fp16", "true"], "--fp16: there is no float16 training on a CPU"),
        (["--eval_on_start"], "--eval_on_start: needs --eval_dataset_name"),
        (["--eval_accuracy_samples", "2"], "--eval_accuracy_samples 2: must go with --eval_strategy and"),
        (["--report_to", "notebook"], "--report_to notebook: notebook is not supported, only"),
        (["--lora_r", "0"], "--lora_r 0: `r` should be a positive integer"),
        (
            ["--lora_target_modules", "q_prj"],
            "--lora_target_modules q_prj: the model has no such module; it has down_proj",
        ),
        (["--lora_target_modules", "q_proj", "layers.7.v_proj"], "--lora_target_modules layers.7.v_proj: the model"),
        (["--lora_modules_to_save", "score"], "--lora_modules_to_save score: the model has no such module"),
        (["--lora_modules_to_save", "lm_head"], "--loss_implementation fused needs a plain linear head"),
        (["--model_name_or_path", "./nowhere"], "--model_name_or_path ./nowhere: no such folder"),
        (
            ["--fixed_teacher", "false", "--teacher_model_name_or_path", "./nowhere"],
            "--teacher_model_name_or_path ./nowhere: no such folder",
        ),
        (["--teacher_model_name_or_path", "m"], "--fixed_teacher True: must be false with --teacher_model_name"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_before_a_model_is_loaded(run, no_model, arguments, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        run(*arguments)


def test_teacher_model_of_another_tokenizer_is_refused_before_a_model_is_loaded(
    run, no_model, tiny_model_dir, tmp_path
):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.add_tokens(["<other>"])
    teacher = save_model(tmp_path / "teacher", tiny_model_dir, tokenizer)
    message = f"1 tokens in the teacher's alone, such as '<other>' ({len(tokenizer) - 1})"
    with pytest.raises(SystemExit, match=re.escape(message)):
        run("--fixed_teacher", "false", "--teacher_model_name_or_path", teacher)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "the/base"}')
    with pytest.raises(SystemExit, match="holds a LoRA adapter, not a model; merge it into its base model, the/base"):
        run("--fixed_teacher", "false", "--teacher_model_name_or_path", str(tmp_path / "adapter"))


def test_float32_adapters_on_a_gpu_are_refused_before_a_model_is_loaded(run, no_model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit, match="--dtype float32 with --use_vllm and --use_peft: vLLM's"):
        run("--use_vllm", "true", "--dtype", "float32")


def test_several_gpus_for_one_process_are_refused_before_a_model_is_loaded(run, no_model, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 4)
    with pytest.raises(SystemExit, match="4 GPUs are visible to one process, .* or set CUDA_VISIBLE_DEVICES=0"):
        run()


def test_missing_model_name(no_model):
    with pytest.raises(SystemExit, match="--model_name_or_path is missing"):
        opsd_train.main(["--use_cpu", "--bf16", "false"])


def test_bad_data_is_refused_before_a_model_is_loaded(run, no_model, tmp_path):
    blank = write(
        tmp_path / "blank.jsonl", '{"problem": "1+1", "solution": ""}', '{"problem": "2+2", "solution": " "}'
    )
    with pytest.raises(SystemExit, match="the column 'solution' is empty in all of them"):
        run("--dataset_name", blank)
    with pytest.raises(SystemExit, match="empty.jsonl: no rows in it"):
        run("--dataset_name", write(tmp_path / "empty.jsonl"))
    broken = write(tmp_path / "broken.jsonl", '{"problem": "1+1", "solution": "2"}', '{"problem": "2+2", ')
    with pytest.raises(SystemExit, match=r"broken.jsonl, line 2: not JSON"):
        run("--dataset_name", broken)


def test_tokenizer_without_chat_template(run, no_model, tiny_model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "config.json").write_text((tiny_model_dir / "config.json").read_text())
    with pytest.raises(SystemExit, match="has no chat template"):
        run("--model_name_or_path", str(tmp_path / "bare"))


def test_tokenizer_without_end_token(run, no_model, tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "endless")
    file = tmp_path / "endless" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["eos_token"]
    file.write_text(json.dumps(settings))
    with pytest.raises(SystemExit, match="endless: its tokenizer has no end-of-sequence token.*set `eos_token`"):
        run("--model_name_or_path", str(tmp_path / "endless"))


def test_run_stops_resumes_and_starts_anew(run, tmp_path, problems):
    kept = tmp_path / "out" / "mine" / "notes.txt"
    kept.parent.mkdir(parents=True)
    kept.touch()
    (tmp_path / "out" / "checkpoint-best").mkdir()  # somebody's own, not a step
    out = run("--answer_column", "answer")
    assert kept.exists()  # nothing is deleted unless asked for
    assert {"adapter_model.safetensors", "tokenizer.json", "run_config.json", "checkpoint-1", "checkpoint-2"} <= set(
        os.listdir(out)
    )
    configuration = json.loads((out / "run_config.json").read_text())
    assert configuration["training"]["beta"] == 0.5 and configuration["training"]["max_completion_length"] == 64
    assert configuration["model"]["lora_r"] == 16 and configuration["script"]["problem_column"] == "problem"
    assert {"torch", "transformers", "trl"} <= set(configuration["versions"])
    (first, *_) = saved_rollouts(out)
    assert first["answer"] in problems["answer"][:]

    with pytest.raises(SystemExit, match="holds checkpoint-2: continue with --resume_from_checkpoint true"):
        run()
    (out / "checkpoint-4").mkdir()  # torn: the newest complete one is taken
    run("--resume_from_checkpoint", "true", "--max_steps", "3", "--save_only_model", "true")
    state = json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3]
    with pytest.raises(SystemExit, match="not a complete checkpoint: it lacks .* which --save_only_model leaves out"):
        run("--resume_from_checkpoint", str(out / "checkpoint-3"))

    run("--overwrite_output_dir", "--max_steps", "1")
    assert not (out / "checkpoint-3").exists() and (out / "checkpoint-1").exists()
    assert {record["step"] for record in saved_rollouts(out)} == {1}
    assert kept.exists() and (out / "checkpoint-best").exists()


def test_run_that_the_alarm_stops_is_measured_and_can_go_on(run, tmp_path, problems, caplog, monkeypatch):
    """The alarm gives its sign at step 1. Then held-out problems without answers are refused."""
    held_out, blank = tmp_path / "held_out.jsonl", tmp_path / "blank.jsonl"
    problems.select(range(40, 44)).to_json(held_out)
    problems.select([0]).remove_columns("answer").add_column("answer", [" "]).to_json(blank)
    caplog.set_level("INFO")
    sign = Sign(1, 1, "all is lost", "another task")
    monkeypatch.setattr(Alarm, "read", lambda self, logs: [sign] if logs["step"] == 1 and "loss" in logs else [])
    evaluation = ["--eval_strategy", "steps", "--eval_steps", "1", "--eval_accuracy_samples", "2", "--save_steps", "5"]
    evaluation += ["--eval_dataset_name", str(held_out)]
    with pytest.raises(SystemExit, match="--eval_accuracy_samples 2: rollouts are graded against answers; name their"):
        run(*evaluation)
    evaluation += ["--answer_column", "answer"]
    out = run("--stop_on_collapse", *evaluation)
    said = caplog.text
    caplog.clear()
    assert "stopped before the end by --stop_on_collapse at step 1: all is lost; " in said
    assert "checkpoint-1 is complete" in said and len(re.findall(r"evaluation .* held-out \d+\.\d ± ", said)) == 2
    assert (out / "adapter_model.safetensors").exists() and "held-out accuracy" in (out / "README.md").read_text()
    assert "finished_step" not in json.loads((out / "run_config.json").read_text())

    run("--resume_from_checkpoint", "true", "--stop_on_collapse", "--save_steps", "1", *evaluation)
    assert len(logged(out, 2, "eval_accuracy")) == 3 and len(logged(out, 2, "eval_accuracy_gain")) == 2
    assert "stopped" not in caplog.text
    with pytest.raises(SystemExit, match="no row of --eval_dataset_name has an answer to grade against"):
        run("--overwrite_output_dir", *evaluation, "--eval_dataset_name", str(blank))


def read_completions(out):
    files = sorted(out.glob("**/completions*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def logged(out, step, name):
    state = json.loads((out / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [entry[name] for entry in state["log_history"] if name in entry]


def test_rollouts_are_graded_where_answers_are_given(run, tmp_path, problems):
    """Those without an answer are not graded, and not wrong; no weight of the loss changes."""
    rows = [row | {"answer": row["answer"] if place % 2 else None} for place, row in enumerate(problems)]
    file = write(tmp_path / "half.jsonl", *map(json.dumps, rows))
    settings = ["--dataset_name", file, "--per_device_train_batch_size", "8"]
    out = run(*settings, "--answer_column", "answer")
    completions = read_completions(out)
    graded = [record for record in completions if record["answer"] is not None]
    assert 0 < len(graded) < len(completions) == 16
    for record in completions:
        assert (record["correct"] is None) == (record["answer"] is None)
        if record["answer"] is not None:
            assert record["correct"] == (
                re.findall(r"boxed\{(\d+)\}", record["completion"])[-1:] == [record["answer"]]
            )
    shares, ungraded = (logged(out, 2, f"rewards/{name}") for name in ("accuracy/mean", "ungraded_ratio"))
    for step, (share, rest) in enumerate(zip(shares, ungraded, strict=True), 1):
        of_step = [record["correct"] for record in graded if record["step"] == step]
        assert share == pytest.approx(sum(of_step) / len(of_step)) and rest == pytest.approx(1 - len(of_step) / 8)
    plain, off = tmp_path / "plain", tmp_path / "off"
    run(*settings, "--output_dir", str(plain))
    assert logged(plain, 2, "loss") == logged(out, 2, "loss")
    assert logged(plain, 2, "rewards/accuracy/mean") == [] and "correct" not in read_completions(plain)[0]
    settings += ["--answer_column", "answer"]
    run(*settings, "--output_dir", str(off), "--verify_rollouts", "false", "--max_steps", "1")
    assert logged(off, 1, "rewards/accuracy/mean") == []
    run(*settings, "--output_dir", str(plain), "--resume_from_checkpoint", "true", "--max_steps", "3")
    assert len(logged(plain, 3, "rewards/accuracy/mean")) == 1


def chats(problems, *before):
    def turns(row):
        return [
            *before,
            {"role": "user", "content": row["problem"]},
            {"role": "assistant", "content": row["solution"]},
        ]

    return [json.dumps({"messages": turns(row)}) for row in problems]


TUTOR = {"role": "system", "content": "You teach addition."}
EARLIER = [{"role": "user", "content": "Can you add?"}, {"role": "assistant", "content": "Yes."}]


def test_conversations_are_trained_on_and_compared_by_a_resumed_run(run, tmp_path, problems, caplog):
    caplog.set_level("INFO")
    file = write(tmp_path / "chats.jsonl", *chats(problems, TUTOR, *EARLIER))
    chat = ["--dataset_name", file, "--problem_column", "messages"]
    out = run(*chat, "--max_steps", "1", "--preflight")
    assert "conversations in messages: the last user turn is the problem, the assistant's turn after it" in caplog.text
    assert "of 64, 64 have a system turn, 64 earlier turns" in caplog.text
    begin = "<|im_start|>system\nYou teach addition.<|im_end|>\n<|im_start|>user\nCan you add?<|im_end|>\n"
    assert all(record["prompt"].startswith(begin) for record in read_completions(out))
    assert json.loads((out / "run_config.json").read_text())["script"]["system_prompt"] == TUTOR["content"]

    resume = ["--resume_from_checkpoint", "true", "--max_steps", "2"]
    other = write(tmp_path / "other.jsonl", *chats(problems, TUTOR, EARLIER[0], EARLIER[1] | {"content": "No."}))
    for change, message in (
        ([*chat, "--system_prompt", "You subtract."], "system_prompt: You teach addition. -> You subtract."),
        ([*chat, "--dataset_name", other], "train_dataset: "),
        (["--problem_column", "problem"], "train_dataset: "),
    ):
        with pytest.raises(SystemExit, match=message):
            run(*resume, *change)
    # The same content in other words
    untaught = write(tmp_path / "untaught.jsonl", *chats(problems, *EARLIER))
    run(*resume, "--dataset_name", untaught, "--problem_column", "messages", "--system_prompt", TUTOR["content"])
    assert (out / "checkpoint-2").exists()


def test_system_prompt_of_plain_problems(run, caplog):
    out = run("--system_prompt", "You are brief.", "--max_steps", "1")
    begin = "<|im_start|>system\nYou are brief.<|im_end|>\n<|im_start|>user\nProblem: "
    assert all(record["prompt"].startswith(begin) for record in read_completions(out))
    with pytest.raises(SystemExit, match="system_prompt: You are brief. -> None"):
        run("--resume_from_checkpoint", "true", "--max_steps", "2")


def test_different_system_turns_are_said(run, no_model, tmp_path, problems, caplog):
    lines = chats(problems.select(range(60)), TUTOR) + chats(problems.select(range(60, 64)))
    with pytest.raises(AssertionError, match="a model would have been loaded"):
        run("--dataset_name", write(tmp_path / "chats.jsonl", *lines), "--problem_column", "messages")
    assert "the rows have different system turns: the evaluator will ask without one" in caplog.text


def test_template_without_system_turns(run, no_model, tiny_model_dir, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('No system turns') }}{% endif %}"
    (model / "chat_template.jinja").write_text(refusal + (model / "chat_template.jinja").read_text())
    with pytest.raises(SystemExit, match=r"cannot hold the turns system before the problem \(No system turns\)"):
        run("--model_name_or_path", str(model), "--system_prompt", "You teach.")


def test_tables_are_trained_on(run, tmp_path, problems):
    """Leading zeros, and numbers for problems, solutions and answers."""
    with (tmp_path / "train.csv").open("w") as file:
        file.write("question,sum\n" + "".join(f"0{row['problem']},00{row['answer']}\n" for row in problems))
    columns = ["--problem_column", "question", "--solution_column", "sum", "--answer_column", "sum"]
    out = run("--dataset_name", str(tmp_path / "train.csv"), *columns, "--max_steps", "1")
    for record in read_completions(out):
        assert re.search(r"Problem: 0\d+\+\d+\n", record["prompt"]) and record["answer"].startswith("00")
        assert isinstance(record["correct"], bool)


def test_training_goes_on_from_a_finished_adapter(run, tmp_path):
    first = run("--max_steps", "1")
    second = tmp_path / "second"
    run("--adapter_name_or_path", str(first), "--output_dir", str(second), "--max_steps", "1")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert before.keys() == after.keys() and not all(before[name].equal(after[name]) for name in before)
    # The teacher of the second run is the policy that the first one ended with, and not the base
    teacher = load_file(second / "checkpoint-1" / "teacher_weights_0.safetensors")
    assert len(teacher) == len(before)
    for name, weight in before.items():
        assert_close(teacher[".".join(name.split(".")[:-1]) + ".default.weight"], weight, rtol=0, atol=0)


def test_an_adapter_to_start_from_must_fit_and_is_recorded(run, tmp_path, monkeypatch):
    first = run("--max_steps", "1", "--lora_r", "4", "--lora_target_modules", "q_proj")
    start = ["--adapter_name_or_path", str(first), "--output_dir", str(tmp_path / "second"), "--max_steps", "1"]
    run(*start)
    recorded = json.loads((tmp_path / "second" / "run_config.json").read_text())["model"]
    assert (recorded["lora_r"], recorded["lora_target_modules"], recorded["lora_dropout"]) == (4, ["q_proj"], 0.0)

    start[3] = str(tmp_path / "third")
    for flags, message in (
        (["--lora_r", "8"], "--lora_r 8: --adapter_name_or_path .* has 4, and keeps it; leave the flag out"),
        (["--lora_alpha", "64"], "--lora_alpha 64: .* has 32"),
        (["--use_dora"], "--use_dora True: .* has False"),
        (["--lora_target_modules", "q_proj", "v_proj"], r"--lora_target_modules \['q_proj', 'v_proj'\]: .* has"),
        (["--use_peft", "false"], "add --use_peft"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(*start, *flags)
    weights = load_file(first / "adapter_model.safetensors")
    renamed = {name.replace(".model.layers", ".model.language_model.layers"): weights[name] for name in weights}
    save_file(renamed, first / "adapter_model.safetensors")
    monkeypatch.setattr(opsd_train, "load_with_adapter", None)  # before a model is loaded
    with pytest.raises(SystemExit, match="--adapter_name_or_path .*: 12 tensors do not fit .* nothing for the model"):
        run(*start)


def test_resume_keeps_what_makes_policy_and_data(run, no_model, monkeypatch, tmp_path, train_file, tiny_model_dir):
    monkeypatch.undo()
    out = run("--max_steps", "1")
    record = (out / "run_config.json").read_text()
    monkeypatch.setattr(OPSDTrainer, "__init__", None)
    lines = train_file.read_text().splitlines(keepends=True)
    other, reordered, template = tmp_path / "other.jsonl", tmp_path / "reordered.jsonl", tmp_path / "template"
    other.write_text("".join(lines[:-1]))
    reordered.write_text("".join(lines[::-1]))
    shutil.copytree(tiny_model_dir, template)
    file = template / "chat_template.jinja"
    file.write_text("{# changed #}" + file.read_text())
    for flags, *expected in (
        ("--lora_alpha 64", "lora_alpha: 32 -> 64"),
        ("--use_rslora true --lora_alpha 8", "use_rslora: False -> True", "lora_alpha: 32 -> 8"),
        ("--lora_r 8", "lora_r: 16 -> 8"),
        ("--lora_target_modules q_proj", "lora_target_modules: all-linear -> ['q_proj']"),
        ("--seed 3", "seed: 42 -> 3"),
        ("--data_seed 3", "data_seed: None -> 3"),
        ("--beta 1", "beta: 0.5 -> 1.0"),
        ("--teacher_thinking true", "teacher_thinking: False -> True"),
        ("--max_completion_length 32", "max_completion_length: 64 -> 32"),
        ("--per_device_train_batch_size 8", "sequences_per_step: 4 -> 8"),
        ("--solution_column answer", "train_dataset: "),
        (f"--dataset_name {other}", "train_dataset: "),
        (f"--dataset_name {reordered}", "train_dataset: "),
        (f"--model_name_or_path {template}", "chat_template: "),
    ):
        with pytest.raises(SystemExit) as refusal:
            run("--resume_from_checkpoint", "true", "--max_steps", "2", *flags.split())
        assert "was trained with other settings" in str(refusal.value)
        for text in expected:
            assert text in str(refusal.value)
        assert "max_steps" not in str(refusal.value)
    assert (out / "run_config.json").read_text() == record


def test_resume_applies_what_may_change(run, tmp_path, train_file, caplog):
    out = run("--max_steps", "1", "--weight_decay", "0.25", "--lr_scheduler_type", "linear")
    moved = train_file.rename(tmp_path / "moved.jsonl")
    changes = ["--learning_rate", "1e-5", "--weight_decay", "0.5", "--max_steps", "4", "--save_steps", "2"]
    changes += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--logging_steps", "2"]
    with caplog.at_level("INFO"):
        run(
            "--resume_from_checkpoint", "true", "--lr_scheduler_type", "linear", "--dataset_name", str(moved), *changes
        )
    (message,) = [text for text in caplog.messages if "resumed with other settings" in text]
    for change in ("learning_rate: 0.002 -> 1e-05", "weight_decay: 0.25 -> 0.5", "max_steps: 1 -> 4"):
        assert change in message
    optimizer = torch.load(out / "checkpoint-2" / "optimizer.pt", weights_only=True)
    group = optimizer["param_groups"][0]
    assert group["weight_decay"] == 0.5
    assert group["initial_lr"] == 1e-5 and group["lr"] == pytest.approx(1e-5 / 2)  # linear over 4 steps, after 2
    log = json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    rates = {entry["step"]: entry["learning_rate"] for entry in log if "learning_rate" in entry}
    assert rates == {1: 2e-3, 2: pytest.approx(1e-5 * 3 / 4), 4: pytest.approx(1e-5 / 4)}
    assert not (out / "checkpoint-3").exists()
    records = [json.loads((out / name).read_text())["training"] for name in ("run_config_1.json", "run_config.json")]
    assert [record["learning_rate"] for record in records] == [2e-3, 1e-5]


def test_resume_without_a_record_says_so(run, caplog):
    out = run("--max_steps", "1")
    (out / "run_config.json").unlink()
    run("--resume_from_checkpoint", "true", "--max_steps", "2", "--lora_alpha", "32")
    assert f"{out} has no run_config.json" in caplog.text and (out / "run_config.json").is_file()


@pytest.mark.multiprocess
def test_one_process_goes_on_as_two_on_a_cpu(run, tiny_model_dir, train_file, tmp_path):
    out = run("--max_steps", "1")
    root = Path(opsd_train.__file__).parent
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    command += ["--config_file", root / "scripts" / "accelerate" / "ddp.yaml", "--mixed_precision", "no"]
    command += [root / "opsd_train.py", "--config", root / "quickstart" / "opsd.yaml", "--use_vllm", "false"]
    command += ["--model_name_or_path", tiny_model_dir, "--dataset_name", train_file, "--output_dir", out]
    command += ["--per_device_train_batch_size", "2", "--max_steps", "2", "--resume_from_checkpoint", "true"]
    environment = os.environ | {"PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("ACCELERATE_TORCH_DEVICE", None)
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    assert (out / "checkpoint-2" / "rng_state_1.pth").is_file()


def test_wandb_offline(run, monkeypatch, tmp_path):
    for variable, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", str(tmp_path)), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(variable, value)
    for variable in ("WANDB_PROJECT", "WANDB_ENTITY"):
        monkeypatch.setenv(variable, "replaced below")
    run("--report_to", "wandb", "--wandb_project", "project", "--wandb_entity", "entity", "--run_name", "named")
    import wandb

    assert wandb.run is not None and wandb.run.settings.mode == "offline"
    assert (wandb.run.project, wandb.run.entity, wandb.run.name) == ("project", "entity", "named")
    assert wandb.run.summary["train/divergence"] > 0.0 and wandb.run.summary["train/num_generated_tokens"] > 0
    wandb.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.skipif(not AIME.exists(), reason="the AIME 2024 problems are not beside the project")
def test_real_mathematics(run):
    out = run(
        *("--dataset_name", str(AIME), "--max_length", "4096", "--max_completion_length", "16", "--max_steps", "2"),
        *("--teacher_thinking", "true", "--beta", "0", "--jsd_token_clip", "0.05"),
    )
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    assert all(entry["divergence"] > 0.0 for entry in state["log_history"] if "divergence" in entry)


def test_what_a_run_shows_and_leaves(run, capsys, caplog, tiny_model_dir):
    """After the summary a line for each log and three at the end; no bar and no dictionary beside them."""
    caplog.set_level("INFO")
    out = run("--disable_tqdm", "false")
    shown = capsys.readouterr()
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("opsd.run.")]
    lines = lines[next(place for place, line in enumerate(lines) if line.startswith("step 1/2")) :]
    assert [line.split("  ")[0] for line in lines[:2]] == ["step 1/2", "step 2/2"]
    assert lines[2].startswith("step 2/2 after ") and "first log -> last log:  loss " in lines[2]
    assert lines[3] == f"adapter: {out}  (beside it metrics.jsonl, training.png, README.md)"
    assert lines[4].startswith("evaluate it: python ") and len(lines) == 5
    assert "'loss'" not in shown.err and "0/2" not in shown.err
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2, 2]
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    card = (out / "README.md").read_text()
    assert f"`{tiny_model_dir}`, trained by on-policy self-distillation" in card and "[None]" not in card
    assert json.loads((out / "run_config.json").read_text())["finished_step"] == 2
