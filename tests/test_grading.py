"""Extraction of final answers and their comparison: tables of cases; the workers that compare them."""

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from eval.grading import GradingPool, answer_text, extract_answer, grade, is_equal, main

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
HANGING = (r"\Gamma(10^8)", "5")  # for minutes within math-verify


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"So \boxed{42}.", "42"),
        (r"First \boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{ 7 }", "7"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),  # an escaped brace need not be closed
        (r"\boxed{a \\} b", r"a \\"),  # \\ is a line break, so this brace is not escaped
        (r"\boxed{5} and then \boxed{}", "5"),
        (r"\boxed{5} and then \boxed{ }", "5"),
        (r"\boxed{5} and then \boxed{\frac{1}{2}", "5"),  # cut off
        (r"\boxed{5", None),
        (r"\boxed{5\}", None),
        ("The answer is 42.", None),
        ("", None),
        (r"<think>\boxed{1}</think>\boxed{2}", "2"),
        (r"<think>\boxed{1}</think>2", None),
        (r"a</think>\boxed{1}</think>\boxed{2}", "2"),
        (r"<think>\boxed{1}", None),  # cut off within its thoughts
        (r"\boxed 7", "7"),
        (r"$\boxed7$.", "7"),
        (r"\(\boxed \frac{1}{2}\)", r"\frac{1}{2}"),
        (r"\fbox{7}", "7"),
        (r"\boxedness{7}", None),
        (r"$x=\boxed{1}$ or $x = \boxed{2}$", "1, 2"),
        (r"\boxed{1}, \boxed{2} and \boxed{3}.", "1, 2, 3"),
        (r"\boxed{1} and \boxed{1}", "1"),
        ("\\boxed{1}\n\\boxed{2}", "2"),
        (r"\boxed{1} hence \boxed{2}", "2"),
    ],
)
def test_extract_answer(text, expected):
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"Maybe \boxed{1}. Wait,", None),
        (r"Maybe \boxed{1}.</think>It is \boxed{2}.", "2"),
        (r"Maybe \boxed{1}.</think>It is two.", None),
    ],
)
def test_extract_answer_of_a_thinking_model(text, expected):
    assert extract_answer(text, thinking=True) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"Maybe \boxed{1}. Wait,", "1"),
        (r"\boxed{1}</think>2", "1"),
        (r"\boxed{1} or \boxed{ 2 }", "2"),
        (r"\boxed {1}", None),
        (r"\boxed{1} then \boxed{2", None),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{\left\{1\right.}", None),
        ("1", None),
    ],
)
def test_legacy_extraction(text, expected):
    assert extract_answer(text, thinking=True, method="release") == expected


def test_unknown_methods_are_refused():
    with pytest.raises(ValueError, match="'first': must be one of final, release"):
        extract_answer("", method="first")
    with pytest.raises(ValueError, match="'fast': must be one of strict, legacy"):
        grade("1", "1", grader="fast")
    with pytest.raises(ValueError, match="'fast': must be one of strict, legacy"):
        GradingPool(grader="fast")
    with pytest.raises(ValueError, match="workers 0: must be more than 0"):
        GradingPool(workers=0)


EQUAL = [
    (r"2\pi r", r"\pi r \cdot 2"),
    (r"\sin x \cos x", r"\frac{1}{2}\sin(2x)"),
    ("y = 2x + 3", "2x - y + 3 = 0"),
    ("x+y=1", "y+x=1"),
    (r"\lfloor2d\rfloor + 1", r"1 + \lfloor 2d \rfloor"),
    (r"\frac12", "0.5"),
    ("0.5", r"\frac12"),
    ("1/2", r"\dfrac{1}{2}"),
    (r"\pm 3", r"\{3,-3\}"),
    ("3, -3", r"\pm 3"),
    ("√2", r"\sqrt{2}"),
    ("2√3", r"\sqrt{12}"),
    ("√(2+1)", r"\sqrt 3"),
    ("x²", "x^2"),
    ("π/2", r"\frac{\pi}{2}"),
    ("1,000,000", "1000000"),
    ("1{,}000", "1000"),
    (r"1\,000", "1000"),
    (r"\$12.50", "12.5"),
    (r"\$1,200", "1200"),
    ("$12$", "12"),
    ("€5", "5"),
    ("12 dollars", r"\$12"),
    ("5 cm", "5"),
    (r"5\text{ cm}", "5 cm"),
    (r"5\mathrm{~cm}^2", "5"),
    (r"90^\circ", "90"),
    (r"\sin 30^\circ", r"\frac12"),
    (r"\tan 45^\circ", "1"),
    ("30 degrees", r"30^\circ"),
    ("x = 5", "5"),
    ("5", "x=5"),
    ("f(x)=2x+1", "1+2x"),
    ("a_n=2^n", "2^{n}"),
    ("(x+1)^2", "x^2+2x+1"),
    (r"\sqrt{x^2}", "|x|"),
    (r"\sqrt{a}\sqrt{b}", r"\sqrt{ab}"),
    ("n(n+1)/2", r"\binom{n+1}{2}"),
    (r"\frac{n(n+1)}{2}", r"\sum_{k=1}^{n} k"),
    ("n!", r"\prod_{k=1}^n k"),
    (r"\binom{10}{3}", "120"),
    (r"\binom52", "10"),
    ("(-1)^n", "(-1)^{n+2}"),
    (r"\lfloor x\rfloor+1", r"1+\lfloor x \rfloor"),
    (r"e^{i\pi}", "-1"),
    ("(2+i)^2", "3+4i"),
    ("2i+3", "3+2i"),
    (r"\log_2 8", "3"),
    (r"\ln e^2", "2"),
    (r"\sqrt[3]{-8}", "-2"),
    ("(1,2]", "(1, 2]"),
    (r"x\ge 2", r"[2,\infty)"),
    (r"2\le x", r"[2,\infty)"),
    (r"x \in [1,2)", r"1\le x<2"),
    ("-1<x<1", "(-1,1)"),
    ("1>x>-1", "(-1,1)"),
    ("(1,2),(3,4)", "(3,4),(1,2)"),
    ("(x,y)=(1,2)", "(1,2)"),
    ("3, 4", "(3,4)"),
    (r"\{1,2,3\}", "3,2,1"),
    (r"\emptyset", r"\varnothing"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
    (r"\begin{pmatrix}1/2\\3\end{pmatrix}", r"\begin{pmatrix}\frac12\\3\end{pmatrix}"),
    (r"3\frac{1}{2}", "3.5"),
    ("3 1/2", r"\frac72"),
    ("3(1/2)", r"\frac32"),
    ("(2)(3)", "6"),
    (r"2\left(3\right)", "6"),
    ("1.5e3", "1500"),
    (r"1.5 \times 10^3", "1500"),
    ("6.02e-3", "0.00602"),
    ("101_2", "101_{2}"),
    (r"\text{east}", "East"),
    (r"\text{Infinitely many}", r"\infty"),
    ("infinitely many solutions", "Infinitely many."),
    (r"+\infty", r"\infty"),
    ("52!!", r"2^{26}\cdot 26!"),
    ("5!!", "15"),
    ("x^2+y^2=1", "y^2+x^2=1"),
    ("12!", "479001600"),
    (r"25\%", r"\frac14"),
    ("1:2", "1:2"),
    (r"\frac{1}{2}, \frac13", "0.5, 1/3"),
    (r"1 \text{ and } 2", "1, 2"),
    (r"x=1 \text{ or } x=2", "1,2"),
    ("a=1, b=2", "b=2, a=1"),
    (r"\text{The answer is } 5", "5"),
    (r"\frac{\sqrt3}2", r"\frac{\sqrt{3}}{2}"),
    ("x^{1/3}", r"\sqrt[3]{x}"),
    ("2^{-3}", "0.125"),
    (r"\cos\frac{\pi}{7}-\cos\frac{2\pi}{7}+\cos\frac{3\pi}{7}", r"\frac12"),
    (r"\sqrt{5+2\sqrt6}", r"\sqrt2+\sqrt3"),
    (r"\sqrt2\sqrt3-\sqrt6", "0"),
    (r"5\%", "0.05"),
    (r"1-\frac{1}{e}", r"\frac{e-1}{e}"),
    (r"\arctan 1", r"\frac{\pi}{4}"),
    (r"2\pi\text{ cm}", r"2\pi"),
    ("1.0", "1"),
    ("007", "7"),
    ("y=2x+3", "y=3+2x"),
    (r"\max(2,3)", "3"),
    (r"\left(\frac{1}{2},\ \infty\right)", r"(0.5,\infty)"),
    (r"\mathbb{R}\setminus\{0\}", r"\mathbb{R} \setminus \{0\}"),
    (r"\boxed{5}", "5"),
    ("5.", "5"),
    (r"\{2, 4, \ldots, 10\}", r"\{2,4,6,8,10\}"),
    (r"\{n^2 \mid 1\le n\le 4, n\in\mathbb{Z}\}", "1,4,9,16"),
    (r"\text{Yes}", "yes"),
    (r"\frac{a+b}{c}", r"\frac{a}{c}+\frac{b}{c}"),
]

DIFFERENT = [
    ("y = 2x + 3", "2x + y + 3 = 0"),
    (r"\frac{1}{2006!}", r"\frac{1}{2004!}"),
    (r"\sqrt{10^{40}+1}", "10^{20}"),
    (r"\sqrt{10^{400}+1}", "10^{200}"),
    (r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}"),
    (r"\frac{\sqrt{2}}{2006!}", r"\frac{\sqrt{2}}{2004!}"),
    ("0.333333", r"\frac13"),
    ("3.14159265358979323846", r"\pi"),
    ("3", r"\pm 3"),
    (r"5\text{ cm}^2", r"5\text{ cm}"),
    (r"5\text{ or more}", "5"),
    (r"5\text{ million}", "5"),
    (r"\text{at least } 5", "5"),
    (r"\text{more than }5", "5"),
    ("5 million", "5"),
    ("2x = 4", "4"),
    ("x^2=4", "4"),
    ("x=1", "y=1"),
    ("(x+1)^2", "x^2+2x+2"),
    ("|x|", "x"),
    (r"\sqrt{x^2}", "x"),
    ("(-1)^n", "(-1)^{n+1}"),
    (r"\cos(\pi n)", "(-1)^n"),
    (r"\lfloor x \rfloor", r"\lceil x \rceil - 1"),
    ("2i+3", "3-2i"),
    ("(1,2]", "(1,2)"),
    ("x>2", r"[2,\infty)"),
    ("(1,2),(3,4)", "(1,3),(2,4)"),
    ("4, 3", "(3,4)"),
    (r"\{3,4\}", "(3,4)"),
    (r"\{1,2,3\}", r"\{1,2,3,4\}"),
    (r"\{1,1\}", r"\{1,2\}"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix}"),
    (r"3\frac12", r"\frac32"),
    ("3(1/2)", r"\frac72"),
    ("(2)(3)", "5"),
    ("1 2", "12"),
    ("1 2", "3"),
    ("10_2", "10_3"),
    ("east", "seat"),
    ("ab", "ac"),
    ("AB", "ab"),
    ("A", "a"),
    ("finitely many", "Infinitely many."),
    ("not infinite", r"\infty"),
    (r"\infty", r"-\infty"),
    ("1", r"\infty"),
    ("x^2+y^2=1", "y^2+x^2=2"),
    (r"x\equiv 3 \pmod 7", "3"),
    ("10^{10^{10}}", "10^{10^{10}}+1"),
    ("1000000000!", "5"),
    ("x^{10^{9}}", "x"),
    (r"25\%", r"0.25\%"),
    ("3:4", "4:3"),
    ("a=1, b=2", "a=2, b=1"),
    (r"\text{none}", "0"),
    (r"\frac10", r"\frac20"),
    ("0/0", "1"),
    (r"\text{The answer is not } 5", "5"),
    (r"e^{\pi\sqrt{163}}", "262537412640768744"),
    ("10^{-50}", "0"),
    (r"\frac{\sqrt{2}}{10^{80}}", "0"),
    (r"\text{Yes}", "no"),
    ("x<2", "y<2"),
    ("2", r"\frac{2"),
]


@pytest.mark.parametrize(("prediction", "gold"), EQUAL)
def test_equal_answers(prediction, gold):
    assert grade(prediction, gold).equal is True
    assert grade(gold, prediction).equal is True


@pytest.mark.parametrize(("prediction", "gold"), DIFFERENT)
def test_different_answers(prediction, gold):
    assert grade(prediction, gold).equal is False
    assert grade(gold, prediction).equal is False


@pytest.mark.parametrize(
    ("prediction", "gold", "equal", "status"),
    [
        ("9" * 5000, "9" * 5000, True, "exact"),  # beyond what Python converts to an integer
        ("9" * 5000, "9" * 4999 + "8", False, "integer"),
        ("10^{10^{10}}", "10^{10^{10}}", True, "exact"),
        (" ( 1, 2 ) ", "(1,2)", True, "exact"),
        ("007", "7", True, "integer"),
        ("-0", "0", True, "integer"),
        (25.0, "025", True, "integer"),
        (0.5, "1/2", True, "rational"),
        (r"\frac{1}{3}", "0.333", False, "rational"),
        (r"\sqrt{4}", 2, True, "number"),
        ("x+1", "1+x", True, "expression"),
        ("{2, 1}", r"\{1, 2\}", True, "set"),
        ("(1, 2)", "(2, 1)", False, "tuple"),
        ("(1, 2)", "3", False, "kind"),
        ("x=1", "y=1", False, "math_verify"),
        (r"5\text{ m}", r"5\text{ cm}", False, "unit"),
        ("Yes", "no way", False, "text"),
        (r"\frac{1}{2", "1/2", False, "text"),
        ("x+y=1", "y+x=1", True, "math_verify"),
        (None, "42", False, "no_answer"),
        (" ", "42", False, "no_answer"),
        ("42", None, False, "no_gold"),
        ("", "", False, "no_gold"),
        ("10^{10^{10}}", "5", False, "too_large"),
        ("(10^9)!", "5", False, "too_large"),
        (r"\binom{10^9}{5 \cdot 10^8}", "5", False, "too_large"),
        (r"\sum_{k=1}^{10^9} k", "5", False, "too_large"),
        ("x" * 2000, "5", False, "too_large"),
        ("(" * 500 + "1" + ")" * 500, "1", True, "exact"),
        (r"\frac{1}{1+" * 60 + "1" + "}" * 60, "1", False, "too_large"),
    ],
)
def test_status(prediction, gold, equal, status):
    verdict = grade(prediction, gold)
    assert (verdict.equal, verdict.status) == (equal, status)
    assert verdict.seconds >= 0


@pytest.mark.parametrize(
    ("prediction", "gold", "answer_type", "equal"),
    [
        ("1,234", "1234", "number", True),
        ("1,234", "1234", "set", False),
        ("1,234", r"\{1, 234\}", "set", True),
        ("x", "Let $x$ be a prime.", "description", None),
        (None, "Let $x$ be a prime.", "description", None),
        ("x", "Let $x$ be a prime.", None, False),
        ("infinite", r"Infinitely many. \textit{(``infinite'' is accepted.)}", "description", True),
        ("6", "Infinitely many.", "description", False),
        (
            r"1+\lfloor 2d \rfloor",
            r"$\lfloor 2d \rfloor + 1$, where $\lfloor \rfloor$ is the floor.",
            "description",
            True,
        ),
        (
            r"\lfloor 2d \rfloor",
            r"$\lfloor 2d \rfloor + 1$, where $\lfloor \rfloor$ is the floor.",
            "description",
            False,
        ),
    ],
)
def test_answer_type(prediction, gold, answer_type, equal):
    verdict = grade(prediction, gold, answer_type=answer_type)
    assert verdict.equal is equal
    assert (verdict.status == "ungraded") == (equal is None)


def test_the_legacy_grader_has_the_faults_of_the_release():
    for prediction, gold in [
        (r"\frac{1}{2006!}", r"\frac{1}{2004!}"),
        (r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}"),
        (r"\sqrt{10^{40}+1}", "10^{20}"),
        ("0.4444444", r"\frac{4}{9}"),
    ]:
        assert grade(prediction, gold, grader="legacy").equal
    assert not grade("√2", r"\sqrt{2}", grader="legacy").equal
    assert grade(r"\frac12", "0.5", grader="legacy").status == "legacy"


@pytest.fixture(scope="module")
def pool():
    with GradingPool(workers=2) as pool:
        yield pool


def test_pool_grades_in_order_from_any_thread(pool):
    cases = [
        ("x+1", "1+x"),
        ("x+1", "x"),
        ("9" * 5000, "10^{5000}-1"),
        (r"\frac12", "0.5"),
        (None, "1"),
        ("a", "p", "set"),
    ]
    verdicts = {}

    def run(name):
        verdicts[name] = [(verdict.equal, verdict.status) for verdict in pool.grade_all(cases)]

    threads = [threading.Thread(target=run, args=(name,)) for name in range(2)]
    for thread in threads:
        thread.start()
    run("main")
    for thread in threads:
        thread.join()
    expected = [(True, "expression"), (False, "expression"), (True, "number"), (True, "number")]
    expected += [(False, "no_answer"), (False, "expression")]
    assert verdicts == {name: expected for name in ("main", 0, 1)}


def test_hanging_answers_time_out_and_veto_nothing():
    prediction, gold = HANGING
    with GradingPool(workers=1, timeout=1) as pool:
        futures = [pool.submit(prediction, gold), pool.submit(prediction, prediction), pool.submit("x+1", "1+x")]
        verdicts = [future.result() for future in futures]
    assert [(verdict.equal, verdict.status) for verdict in verdicts] == [
        (False, "timeout"),
        (True, "exact"),
        (True, "expression"),
    ]
    assert verdicts[0].seconds == 1


def test_a_worker_without_memory_is_no_error():
    with GradingPool(workers=1, memory_limit_gib=0.001) as pool:
        verdict = pool.submit("x+1", "1+x").result()
    assert (verdict.equal, verdict.status in ("memory", "crashed")) == (False, True)


def test_a_worker_that_does_not_start_is_an_error(monkeypatch):
    with GradingPool(workers=1) as pool:
        monkeypatch.setattr(pool._workers[0], "command", [sys.executable, "-c", "exit(1)"])
        assert pool.submit("1", "1").result().equal  # needs no worker
        with pytest.raises(RuntimeError, match="does not start"):
            pool.submit("x+1", "1+x").result()


def test_is_equal():
    assert is_equal(5, 5.0)
    assert not is_equal(None, "x")
    code = "import sys; from eval.grading import is_equal; assert 'torch' not in sys.modules; "
    code += "assert is_equal('x+1', '1+x'); assert not is_equal('x+1', 'x')"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)  # and its pool closes with the process


def run_main(capsys, *arguments):
    main([*map(str, arguments), "--grade_workers", "1"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_command_line(tmp_path, capsys):
    pairs, responses = tmp_path / "pairs.jsonl", tmp_path / "responses.jsonl"
    pairs.write_text('{"pred": 7, "gold": "7"}\n{"pred": null, "gold": 0.5}\n{"pred": "x+1", "gold": "1+x"}\n')
    lines = run_main(capsys, "--pairs", pairs)
    assert [(line["equal"], line["status"]) for line in lines] == [
        (True, "exact"),
        (False, "no_answer"),
        (True, "expression"),
    ]
    assert all(line.keys() == {"equal", "status", "seconds"} for line in lines)
    responses.write_text(
        r'{"response": "<think>\\boxed{7}</think>8", "gold": 7}' + "\n" + r'{"response": "\\boxed{7}", "gold": 7}'
    )
    assert [line["extracted"] for line in run_main(capsys, "--responses", responses)] == [None, "7"]
    assert [line["equal"] for line in run_main(capsys, "--responses", responses, "--thinking")] == [False, False]
    assert [line["extracted"] for line in run_main(capsys, "--responses", responses, "--extract", "release")] == [
        "7",
        "7",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: Expecting"),
        ("3", "line 2: not an object"),
        ('{"pred": "1"}', "line 2: no 'gold'; each line needs 'pred' and 'gold'"),
        ('{"pred": ["1"], "gold": "1"}', "line 2: an answer is text or a number, not list"),
    ],
)
def test_command_line_refuses_bad_lines(line, message, tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"pred": "1", "gold": "1"}\n' + line + "\n")
    with pytest.raises(SystemExit):
        main(["--pairs", str(path)])
    assert f"{path}, {message}" in capsys.readouterr().err


def test_labelled_pairs(pool):
    path = SHARED / "grading" / "pairs.jsonl"
    if not path.exists():
        pytest.skip(f"no {path.name}")
    pairs = [json.loads(line) for line in path.read_text().splitlines()]
    verdicts = pool.grade_all((pair["pred"], pair["gold"]) for pair in pairs)
    wrong = [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.equal != pair["equal"]]
    assert len(wrong) <= 3
    assert not [pair for pair in wrong if not pair["equal"]]  # no false positive
    assert "timeout" not in {verdict.status for verdict in verdicts}


def test_labelled_responses(pool):
    path = SHARED / "grading" / "extract_cases.jsonl"
    if not path.exists():
        pytest.skip(f"no {path.name}")
    cases = [json.loads(line) for line in path.read_text().splitlines()]
    cases = [case for case in cases if case["correct"] is not None]
    verdicts = pool.grade_all((extract_answer(case["response"]), case["gold"]) for case in cases)
    assert [verdict.equal for verdict in verdicts] == [case["correct"] for case in cases]


@pytest.mark.parametrize(("benchmark", "count"), [("aime24", 30), ("amo-bench", 39)])
def test_golds_equal_themselves(benchmark, count, pool):
    pandas = pytest.importorskip("pandas")
    files = list((SHARED / "eval" / benchmark / "data").glob("*.parquet"))
    if not files:
        pytest.skip(f"no {benchmark}")
    rows = pandas.read_parquet(files[0]).to_dict("records")
    rows = [row for row in rows if row.get("answer_type") != "description"]
    assert len(rows) == count
    cases = []
    for row in rows:
        gold, answer_type = row["answer"], row.get("answer_type")
        bare = extract_answer(gold) or gold
        cases += [(prediction, gold, answer_type) for prediction in (gold, bare, rf"\boxed{{{bare}}}")]
        if re.fullmatch(r"-?\d+", bare):
            cases.append((int(bare), gold, answer_type))
    assert all(verdict.equal for verdict in pool.grade_all(cases))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("025", "025"),
        (25, "25"),
        (25.0, "25"),
        (0.5, "0.5"),
        (-3.0, "-3"),
        (float("nan"), None),
        (float("inf"), "inf"),
        (None, None),
    ],
)
def test_answer_text(value, expected):
    assert answer_text(value) == expected


@pytest.mark.parametrize("value", [True, [1, 2], {"answer": 1}])
def test_answer_text_refuses_what_is_no_answer(value):
    with pytest.raises(TypeError, match="text or a number"):
        answer_text(value)
