"""Verifiers of other answers than mathematics: what each takes for right, their limits, and one of the user's own."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ADAPTER, CPU, Recorder, script_rollouts
from transformers import AutoTokenizer

import grpo_train
import opsd_train
from eval import engine as sampling_engine
from eval import evaluate_math
from eval.benchmarks import BENCHMARKS, find_benchmark, load_questions
from opsd import rewards
from opsd.config import OPSDConfig
from opsd.grading import BUILT_IN, GradingPool, check_answers, describe_verifier, extract, find_rule
from opsd.rewards import Verifier, make_reward

OWN = '''
import os, time

def share(completion, answer, row):
    """The share of the answer's letters that the completion has."""
    return sum(letter in completion for letter in answer) / len(answer)

def by_problem(completion, answer, row):
    return float(completion == answer + row["problem"])

def fails(completion, answer, row):
    if completion == "exit":
        raise SystemExit(3)
    return {}[completion]

def bad(completion, answer, row):
    return {"two": 2, "nan": float("nan"), "text": "1", "none": None, "true": True}[completion]

def hangs(completion, answer, row):
    while completion == "loop":
        pass
    if completion == "crash":
        os.kill(os.getpid(), 9)
    return 1.0

def two(completion, answer):
    return 1.0

NUMBER = 3
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The name of a module of verifiers in the working directory."""
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rewards, "GRADE_WORKERS", 1)  # each takes a second to start
    return name


@pytest.fixture(scope="module")
def pool():
    with GradingPool(workers=2, timeout=2) as pool:
        yield pool


def verdict(pool, verifier, text, answer="1", row=None):
    return pool.submit(extract(text, verifier), answer, verifier=verifier, row=row or {}).result()


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        (r"So it is \boxed{Paris}.", "paris", 1.0),
        (r"\boxed{\text{New  York}}", "new york", 1.0),
        (r"\boxed{London} or \boxed{Paris}" + "\nno", "Paris", 0.0),  # one list of two
        ("\\boxed{London}\n\\boxed{Paris}\nI am sure.", "Paris", 1.0),
        ("It is\n\n  Paris \n\n", "Paris", 1.0),
        ("It is Paris", "Paris", 0.0),
        ("1.0", "1", 0.0),
        ("</think>Paris", "Paris", 1.0),
    ],
)
def test_exact_match(pool, text, answer, score):
    assert verdict(pool, "exact_match", text, answer).score == score


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (r"\boxed{B}", "B"),
        (r"First \boxed{A}, no: \boxed{B}", "B"),
        (r"\boxed{(b)}", "B"),
        (r"\boxed{B.}", "B"),
        (r"\boxed{\text{B}}", "B"),
        (r"$\boxed{\mathbf{(B)}}$", "B"),
        (r"\boxed{B) Paris}", "B"),
        (r"\boxed{\text{B. Paris}}", "B"),
        (r"\boxed B", "B"),
        ("The answer is (B).", "B"),
        ("The answer is b.", "B"),
        ("The answer is **B**", "B"),
        ("The answer is: $B$", "B"),
        ("**Answer:** B", "B"),
        ("The correct answer is option C because of A", "C"),
        (r"The answer is \boxed{D}", "D"),
        ("The answer is A. No, wait, the answer is B", "B"),
        (r"\boxed{A} ... so the answer is B", "B"),
        (r"the answer is A, so \boxed{B}", "B"),
        (r"put it within \boxed{}: the answer is B", "B"),
        (r"\boxed{A, B}", None),
        (r"\boxed{AB}", None),
        (r"\boxed{B} and then \boxed{42}", None),  # the last one counts
        ("the answer is a number", None),
        ("The answer is Paris", None),
        ("The answer is not A", None),
        ("B", None),
        ("", None),
    ],
)
def test_letter_of_multiple_choice(text, letter):
    assert extract(text, "multiple_choice") == letter


def test_multiple_choice(pool):
    assert verdict(pool, "multiple_choice", r"\boxed{b}", " B ").score == 1.0
    assert verdict(pool, "multiple_choice", r"\boxed{b}", "c").score == 0.0
    nothing = verdict(pool, "multiple_choice", "Paris", "B")
    assert (nothing.equal, nothing.score, nothing.status) == (False, 0.0, "no_answer")


def python(code, label="python"):
    return f"Thus:\n```{label}\n{code}\n```\nIt prints:\n```\n4\n```\n"


RIGHT = "def add(a, b): return a + b"
TESTS = "assert add(1, 1) == 2\nassert add(-1, 1) == 0"


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (python(RIGHT), 1.0),
        (python(RIGHT, "py"), 1.0),
        (f"```\n{RIGHT}\n```", 1.0),
        (python("oops(") + python(RIGHT), 1.0),  # the last block counts
        (python(RIGHT) + python("def add(a, b): return a"), 0.0),
        (f"- like this:\n  ```python\n  {RIGHT}\n  ```", 1.0),
        (RIGHT, 0.0),
        (f"```python\n{RIGHT}", 0.0),  # cut off
        (f"```bash\n{RIGHT}\n```", 0.0),
        (python("def add(a, b): return a"), 0.0),
        (python("def add(a, b): return ("), 0.0),
        (python("import sys\nsys.exit(0)"), 0.0),
        (python("import os\nos._exit(0)"), 0.0),
        (python("name = input()\n" + RIGHT), 0.0),
        (python("import socket\nsocket.create_connection(('127.0.0.1', 9))\n" + RIGHT), 0.0),
        (python("import os\nwhile True: os.fork()"), 0.0),
        (python("import subprocess\nsubprocess.run(['true'])\n" + RIGHT), 0.0),
        (python("x = [0] * 10**10\n" + RIGHT), 0.0),
        (python("open('large', 'wb').write(bytes(10**8))\n" + RIGHT), 0.0),
        (python("import shutil\nshutil.rmtree('..')\n" + RIGHT), 0.0),
        (python("def add(a, b): return add(a, b)"), 0.0),
        (python("print('x' * 10**7)\nopen('small', 'w').write('x')\n" + RIGHT), 1.0),
        (python("import asyncio\nasync def f(): pass\nasyncio.run(f())\n" + RIGHT), 1.0),
        (python("import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()\n" + RIGHT), 1.0),
        (python("if __name__ == '__main__': input()\n" + RIGHT), 1.0),
    ],
)
def test_python_tests(pool, text, score):
    assert verdict(pool, "python_tests", text, TESTS).score == score


def test_python_changes_nothing_outside_of_its_folder(pool, tmp_path):
    (tmp_path / "mine").write_text("mine")
    for line in (f"open({str(tmp_path / 'new')!r}, 'w')", f"import os\nos.remove({str(tmp_path / 'mine')!r})"):
        assert verdict(pool, "python_tests", python(f"{line}\n{RIGHT}"), TESTS).score == 0.0
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_python_without_an_end(pool):
    """On the processor and asleep; the workers go on."""
    loops = [python("while True: pass"), python("import time\ntime.sleep(10**6)"), python(RIGHT)]
    futures = [pool.submit(extract(t, "python_tests"), TESTS, verifier="python_tests") for t in loops]
    assert [future.result().score for future in futures] == [0.0, 0.0, 1.0]


def test_python_sees_no_variables_of_the_environment(pool, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "secret")
    code = "import os\nassert 'SOME_TOKEN' not in os.environ\n" + RIGHT
    assert verdict(pool, "python_tests", python(code), TESTS).score == 1.0


def test_thoughts_are_not_judged():
    for verifier in BUILT_IN:
        assert extract(r"<think>\boxed{A}", verifier) is None
        assert extract(r"\boxed{A}", verifier, thinking=True) is None
    assert extract("<think>no</think>yes", "exact_match") == "yes"


@pytest.mark.parametrize(
    ("verifier", "good", "bad", "message"),
    [
        ("multiple_choice", ["A", " b ", None, " "], "AB", "'AB' is not the letter of a choice"),
        ("python_tests", [TESTS, None], "assert f(", "is not Python"),
    ],
)
def test_answers_of_the_data_are_checked(verifier, good, bad, message):
    check_answers(verifier, good)
    check_answers("exact_match", [*good, bad])
    with pytest.raises(ValueError, match=rf"--answer_column: the answer .*{message}.*--verifier {verifier}"):
        check_answers(verifier, [*good, bad])


# A verifier of one's own


def test_own_verifier(own, tmp_path):
    grade = Verifier(thinking=False, name=f"{own}:share")
    assert grade(["abx", "", "ab"], ["ab", "ab", None], [{}] * 3) == [1.0, 0.0, None]
    assert grade(["a"], ["ab"], [{}]) == [0.5]
    assert Verifier(False, name=f"{own}:by_problem")(["ab", "a"], ["a", "a"], [{"problem": "b"}] * 2) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maths", "--verifier maths: neither one of math, exact_match, multiple_choice, python_tests nor MODULE:"),
        ("nowhere_at_all:f", "--verifier nowhere_at_all:f: no module nowhere_at_all in"),
        ("OWN:nothing", "has no nothing"),
        ("OWN:NUMBER", "is not callable with three arguments"),
        ("OWN:two", "is not callable with three arguments"),
        ("broken:f", "broken is not imported: ZeroDivisionError: division by zero (broken.py, line 1)"),
        ("lacking:f", "lacking is not imported: ModuleNotFoundError: No module named 'nowhere_at_all'"),
    ],
)
def test_own_verifier_that_cannot_be_is_refused(own, tmp_path, name, message):
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "lacking.py").write_text("import nowhere_at_all")
    with pytest.raises(ValueError, match=re.escape(message)):
        OPSDConfig(str(tmp_path), verifier=name.replace("OWN", own), use_cpu=True, bf16=False)


def test_exceptions_are_reported_once_and_are_no_wrong_answers(own, caplog):
    grade = Verifier(thinking=False, name=f"{own}:fails")
    assert grade(["x", "y", "exit"], ["1"] * 3, [{}] * 3) == [None] * 3
    assert caplog.text.count("KeyError: 'x'") + caplog.text.count("KeyError: 'y'") == 1
    assert f"--verifier {own}:fails could not judge a completion: KeyError" in caplog.text
    assert f"({own}.py, line 14)" in caplog.text and "SystemExit: 3" in caplog.text


def test_numbers_out_of_range_are_no_grades(own, caplog):
    grade = Verifier(thinking=False, name=f"{own}:bad")
    assert grade(["two", "none", "true"], ["1"] * 3, [{}] * 3) == [None, None, 1.0]
    assert "returned 2, and not a number in [0, 1] or None" in caplog.text
    assert grade(["nan", "text"], ["1"] * 2, [{}] * 2) == [None] * 2


def test_a_verifier_that_hangs_or_crashes_is_none_and_the_pool_goes_on(own, caplog):
    with GradingPool(workers=1, timeout=1) as pool:
        found = [pool.submit(t, "1", verifier=f"{own}:hangs").result() for t in ("loop", "fine", "crash", "fine")]
    assert [(one.equal, one.status) for one in found] == [
        (None, "timeout"),
        (True, "verifier"),
        (None, "crashed"),
        (True, "verifier"),
    ]
    assert "its process ended by timeout" in caplog.text and "its process ended by crashed" in caplog.text


def test_source_of_an_own_verifier_is_described(own, tmp_path):
    find_rule(f"{own}:share")
    before = describe_verifier(f"{own}:share")
    (tmp_path / f"{own}.py").write_text(OWN + "# changed")
    assert re.fullmatch(rf"{own}:share sha256:[0-9a-f]{{64}}", before) and describe_verifier(f"{own}:share") != before
    assert describe_verifier("exact_match") == "exact_match"


# Training


@pytest.fixture
def words(tmp_path):
    file = tmp_path / "words.jsonl"
    rows = [{"problem": "12+34", "solution": "46", "answer": "46"}, {"problem": "1+2", "solution": "3", "answer": "3"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    return file


def test_reward_of_grpo_is_the_score_as_it_is(own, tiny_model_dir):
    tokenizer, logged = AutoTokenizer.from_pretrained(tiny_model_dir), []
    reward = make_reward("math", False, tokenizer, f"{own}:share")
    ids = tokenizer(["46<|im_end|>", "4<|im_end|>", "<|im_end|>"], add_special_tokens=False).input_ids
    scores = reward(
        completion_ids=ids, answer=["46", "46", None], row=[{}] * 3, log_metric=lambda *m: logged.append(m)
    )
    assert scores == [1.0, 0.5, 0.0] and reward.__name__ == "share"
    assert dict(logged) == {"rewards/ungraded_ratio": pytest.approx(1 / 3), "rewards/accuracy/mean": 0.5}


def run(program, model, data, folder, **settings):
    flags = CPU | ADAPTER | {"model_name_or_path": model, "dataset_name": data, "output_dir": folder, "max_steps": 2}
    flags |= {"per_device_train_batch_size": 4, "num_generations": 2, "save_steps": 1, "max_completion_length": 8}
    program.main([text for flag, value in (flags | settings).items() for text in (f"--{flag}", str(value))])


def test_grpo_trains_with_an_own_verifier_and_resumes_with_no_other(own, tiny_model_dir, words, tmp_path):
    run(grpo_train, tiny_model_dir, words, tmp_path / "run", verifier=f"{own}:share")
    settings = json.loads((tmp_path / "run" / "run_config.json").read_text())
    assert settings["script"]["verifier"] == f"{own}:share"
    assert settings["data"]["verifier"] == describe_verifier(f"{own}:share")
    log = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert {"rewards/share/mean", "rewards/accuracy/mean", "rewards/ungraded_ratio"} <= log[0].keys()

    resume = {"resume_from_checkpoint": tmp_path / "run" / "checkpoint-1", "verifier": f"{own}:share"}
    with pytest.raises(SystemExit, match=f"verifier: {own}:share -> exact_match"):
        run(grpo_train, tiny_model_dir, words, tmp_path / "run", **resume | {"verifier": "exact_match"})
    (tmp_path / f"{own}.py").write_text(OWN + "# changed")
    with pytest.raises(SystemExit, match=f"verifier: {own}:share sha256:.* -> {own}:share sha256"):
        run(grpo_train, tiny_model_dir, words, tmp_path / "run", **resume)


@pytest.mark.parametrize(
    ("program", "settings", "message"),
    [
        (grpo_train, {"verifier": "exact_match", "reward": "last_number"}, "--reward last_number: leave it out with"),
        (grpo_train, {"verifier": "nowhere_at_all:f"}, "--verifier nowhere_at_all:f: no module"),
        (grpo_train, {"verifier": "multiple_choice"}, "--answer_column: the answer '46' is not the letter"),
        (opsd_train, {"verifier": "exact_match", "max_length": 100}, "--verifier exact_match: rollouts are graded"),
        (opsd_train, {"verifier": "exact_match", "extract": "last_number"}, "--extract last_number: must be final"),
        (
            opsd_train,
            {"verifier": "multiple_choice", "answer_column": "answer", "max_length": 100},
            "--answer_column: the answer '46' is not the letter",
        ),
    ],
)
def test_what_does_not_go_with_a_verifier_is_refused(program, settings, message, tiny_model_dir, words, tmp_path):
    with pytest.raises(SystemExit, match=re.escape(message)):
        run(program, tiny_model_dir, words, tmp_path / "run", **settings)


def test_gates_and_held_out_accuracy_take_what_is_right(own, make_trainer, problems):
    """The verifier wants all letters of the answer: 0.5 is a reward, and not right."""
    rows = [{"problem": f"{n}+1", "solution": "s", "answer": "ab"} for n in range(8)]
    recorder = Recorder()
    trainer = make_trainer(
        dataset=type(problems).from_list(rows),
        eval_dataset=type(problems).from_list(rows[:2]),
        callbacks=[recorder],
        verifier=f"{own}:share",
        incorrect_weight=0.0,
        policy_gradient_weight=0.5,
        num_generations=2,
        max_steps=1,
        eval_accuracy_samples=2,
        eval_strategy="steps",
        eval_steps=1,
    )
    script_rollouts(trainer, lambda problem, occurrence: ("ab" if occurrence % 2 else "a") + "<|im_end|>")
    trainer.train()
    assert recorder.values("rewards/accuracy/mean") == [0.5] and recorder.values("rewards/score/mean") == [0.75]
    assert recorder.values("eval_accuracy")[0] == 0.5


# The evaluator


@pytest.fixture
def evaluated(tiny_model_dir, tmp_path, monkeypatch):
    """A function that evaluates with given responses in place of an engine, and returns settings and results."""

    def evaluate(data, responses, *flags):
        def completions(args, options, requests, sampling):
            texts = [responses[request.question.index] for request in requests]
            yield [(r, sampling_engine.Completion(t, 1, "stop")) for r, t in zip(requests, texts, strict=True)]

        monkeypatch.setattr(evaluate_math, "completions", completions)
        file = tmp_path / "scores.json"
        command = ["--base_model", str(tiny_model_dir), "--dataset", str(data), "--output_file", str(file)]
        command += ["--enable_thinking", "false", "--val_n", "1", "--max_new_tokens", "8", "--grade_workers", "1"]
        evaluate_math.main([*command, *flags])
        report = json.loads(file.read_text())
        return report["settings"], report["results"][0]

    return evaluate


def test_evaluator_with_an_own_verifier(own, evaluated, tmp_path, capsys):
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps({"problem": p, "answer": "ab"}) + "\n" for p in ("p", "q")))
    settings, result = evaluated(data, ["ab", "a"], "--verifier", f"{own}:share")
    assert (result["avg_at_k"], result["mean_score"], result["majority_at_k"]) == (0.5, 0.75, None)
    assert result["status"] == {"verifier": 2} and result["problems"][0]["extracted"] == [None]
    assert settings["data_sets"]["mine"].endswith(f", judged by {describe_verifier(f'{own}:share')}")
    with pytest.raises(SystemExit):
        evaluated(data, ["ab", "a"], "--verifier", "exact_match")
    assert re.search(r"data_sets mine: (\w+), judged by own.* -> \1, judged by exact_match", capsys.readouterr().err)

    evaluate_math.main(["--regrade", str(tmp_path / "scores.json"), "--verifier", "exact_match"])
    report = json.loads((tmp_path / "scores.json").read_text())
    assert report["settings"]["data_sets"]["mine"].endswith(", judged by exact_match")
    (regraded,) = report["results"]
    assert (regraded["avg_at_k"], regraded["mean_score"], regraded["majority_at_k"]) == (0.5, 0.5, 0.5)
    evaluated(data, [], "--verifier", "exact_match")  # all is there


def test_verifier_of_the_training_is_that_of_the_evaluation(own, tmp_path, caplog):
    folders = []
    for verifier in ("exact_match", "multiple_choice"):
        folders.append(str(tmp_path / verifier))
        Path(folders[-1]).mkdir()
        record = {"script": {}, "training": {"verifier": verifier}, "model": {}}
        (tmp_path / verifier / "run_config.json").write_text(json.dumps(record))
    parser = evaluate_math.build_parser()
    args = parser.parse_args(["--base_model", "some/model", "--checkpoint_dir", folders[0]])
    evaluate_math.settle_prompts(args)
    assert args.verifier == "exact_match" and "--verifier: as in the training" in caplog.text
    with pytest.raises(ValueError, match="--verifier: the models were trained with different ones"):
        evaluate_math.settle_prompts(parser.parse_args(["--base_model", "some/model", "--checkpoint_dir", *folders]))


@pytest.mark.parametrize("flag", [("--extract", "release"), ("--grader", "release")])
def test_flags_of_mathematics_are_refused_without_it(evaluated, words, capsys, flag):
    with pytest.raises(SystemExit):
        evaluated(words, [], "--verifier", "exact_match", *flag)
    assert f"{' '.join(flag)}: is for the verifier math" in capsys.readouterr().err


def test_verifier_that_no_data_set_would_have_is_refused(evaluated, tmp_path, capsys):
    write(tmp_path, "mmlu", MMLU)
    with pytest.raises(SystemExit):
        evaluated("mmlu", [], "--data_root", str(tmp_path), "--verifier", "exact_match")
    assert "--verifier exact_match: the benchmarks among --dataset have their own" in capsys.readouterr().err


# Benchmarks of multiple choice

GPQA = {
    "Question": "Which is a colour?\n",
    "Correct Answer": "red\n",
    "Incorrect Answer 1": "two",
    "Incorrect Answer 2": "cow",
    "Incorrect Answer 3": "sea",
}
MMLU = {"question": "Which is a colour?", "subject": "art", "choices": ["two", "red", "cow", "sea"], "answer": 1}
PRO = {"question": "Which?", "options": [f"choice {n}" for n in range(10)], "answer": "J", "category": "art"}


def write(folder, name, *rows):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return find_benchmark(name, folder)


@pytest.mark.parametrize(("name", "row", "gold"), [("mmlu", MMLU, "B"), ("mmlu-pro", PRO, "J")])
def test_choices_are_listed_in_the_order_of_the_data(tiny_model_dir, tmp_path, name, row, gold):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    (question,) = load_questions(write(tmp_path, name, row), tokenizer, thinking=False)
    assert (question.gold, question.verifier) == (gold, "multiple_choice")
    choices = row.get("choices") or row["options"]
    lines = "\n".join(f"({letter}) {choice}" for letter, choice in zip("ABCDEFGHIJ", choices, strict=False))
    asked = "Which choice is right? The final answer is its letter, within \\boxed{}."
    assert question.problem == f"{row['question']}\n\n{lines}\n\n{asked}"
    assert question.problem in tokenizer.decode(question.prompt_ids)


def test_choices_of_gpqa_have_one_order_for_each_problem(tiny_model_dir, tmp_path):
    """It does not depend on the other rows, and the right one stands at any place."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    rows = [GPQA | {"Question": f"{n}: which is a colour?"} for n in range(40)]
    questions = load_questions(write(tmp_path, "gpqa-diamond", *rows), tokenizer, thinking=False)
    again = load_questions(write(tmp_path, "gpqa-diamond", *rows[::-1]), tokenizer, thinking=False)[::-1]
    assert [(q.problem, q.gold) for q in questions] == [(q.problem, q.gold) for q in again]
    assert {question.gold for question in questions} == set("ABCD")
    for question in questions:
        assert f"({question.gold}) red\n" in question.problem
        assert all(question.problem.count(f") {word}") == 1 for word in ("red", "two", "cow", "sea"))


def test_classes_of_mmlu_are_places(tiny_model_dir, tmp_path):
    from datasets import ClassLabel, Dataset, Features, List, Value

    features = Features(question=Value("string"), choices=List(Value("string")), answer=ClassLabel(names=list("ABCD")))
    row = {name: MMLU[name] for name in features}
    Dataset.from_list([row], features=features).to_parquet(tmp_path / "mmlu.parquet")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    (question,) = load_questions(find_benchmark("mmlu", tmp_path), tokenizer, thinking=False)
    assert question.gold == "B"


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("mmlu", MMLU | {"answer": 4}, "the answer 4 is none of 4 choices"),
        ("mmlu", MMLU | {"answer": "red"}, "the answer 'red' is none of 4 choices"),
        ("mmlu", MMLU | {"choices": "a, b"}, "the column choices holds 'a, b', and no list of choices"),
        ("mmlu", {"question": "?", "answer": 1}, "the data set has no column choices; it has question, answer"),
        ("gpqa-diamond", GPQA | {"Incorrect Answer 2": "red"}, "the right choice is also a wrong one: red"),
        ("gpqa-diamond", GPQA | {"Incorrect Answer 2": None}, "the column Incorrect Answer 2 is empty"),
    ],
)
def test_rows_without_one_right_choice_are_refused(tiny_model_dir, tmp_path, name, row, message):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    with pytest.raises(ValueError, match=rf"line 1: {re.escape(message)}"):
        load_questions(write(tmp_path, name, row), tokenizer, thinking=False)


def test_evaluator_grades_a_benchmark_by_its_verifier(evaluated, tmp_path):
    assert {known.name for known in BENCHMARKS if known.verifier != "math"} == {"gpqa-diamond", "mmlu", "mmlu-pro"}
    write(tmp_path, "mmlu", MMLU, MMLU | {"question": "Which one?"})
    settings, result = evaluated("mmlu", [r"\boxed{\text{(B)}}", r"\boxed{C}"], "--data_root", str(tmp_path))
    assert (result["avg_at_k"], result["majority_at_k"]) == (0.5, 0.5)
    assert [problem["extracted"] for problem in result["problems"]] == [["B"], ["C"]]
    assert settings["data_sets"]["mmlu"].endswith(", judged by multiple_choice")


# The example


def test_example_of_sorted_words(tmp_path, monkeypatch):
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, root / "examples" / "sort_words.py", tmp_path], check=True)
    train, test = ((tmp_path / f"{split}.jsonl").read_text().splitlines() for split in ("train", "test"))
    assert (len(train), len(test), len(set(train) | set(test))) == (256, 80, 336)
    monkeypatch.chdir(root)
    monkeypatch.setattr(rewards, "GRADE_WORKERS", 1)
    row = {"problem": "cat ant bee", "answer": "ant bee cat"}
    grade = Verifier(thinking=False, name="examples.sort_words:share_in_place")
    texts = ["Sorted:\nant bee cat", "ant cat bee", "ant bee", ""]
    assert grade(texts, [row["answer"]] * 4, [row] * 4) == [1.0, pytest.approx(1 / 3), 0.0, 0.0]
    assert grade(["ant bee cat"], [row["answer"]], [{"problem": "dog cat"}]) == [None]
