"""The report page: what it reads, what it counts, that no text breaks it, and that a browser shows it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from statistics_files import make_row, score, write_statistics
from transformers import AutoModelForCausalLM, AutoTokenizer

from opsd.inspection import page as pages
from opsd.inspection import runs as runs_module
from opsd.inspection.definitions import PAGE, plain, read_definitions
from opsd.inspection.page import make_page, thin, visible, visible_token
from opsd.inspection.runs import read_run, read_runs
from opsd.inspection.tokens import summarize
from opsd.run.record import RECORD
from opsd.run.report import METRICS
from opsd_trainer import COMPLETIONS
from quickstart import addition

NASTY = "</script><img src=x onerror=alert(1)><!--"
RTL = "\u202eabc\u05e9\u05dc\u05d5\u05dd"


def write_lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_run(folder, statistics=True, steps=(1, 5, 9)):
    """A run of given numbers: nasty texts, a token of 3,000 characters, and a divergence that falls over the steps."""
    folder.mkdir(parents=True, exist_ok=True)
    logs = [{"step": s, "loss": 1 / s, "divergence": 2 / s, "odd/<b>": s, "entropy": None} for s in range(1, 11)]
    logs += [{"step": 5, "eval_loss": 0.3}, {"step": 10, "train_runtime": 3.0, "train_loss": 0.5}]
    write_lines(folder / METRICS, logs)
    rollout = {"prompt": f"P {NASTY}", "completion": f"C {NASTY} {RTL}", "num_tokens": 3, "truncated": False}
    write_lines(folder / COMPLETIONS, [rollout | {"step": s, "answer": "2", "correct": s > 1} for s in (1, 2, 3)])
    (folder / RECORD).write_text(json.dumps({"training": {"learning_rate": 1e-3, "output_dir": str(folder)}}))
    if statistics:
        tokens = ["So", " ", "\n", NASTY, RTL, "x" * 3000, "wait", "2"]
        rows = []
        for step in steps:
            divergence = [0.1 / step, 0.0, 0.01, 0.8 / step, 0.05, 0.02, 0.3 / step, -0.01]
            kinds = [0, 0, 0, 0, 0, 0, 1, 2]
            epistemic = [token == "wait" for token in tokens]
            row = make_row(step, tokens, divergence, kinds=kinds, epistemic=epistemic, problem=f"1+1 {NASTY} {RTL}")
            rows += [row, make_row(step, ["a", "b"], [0.0, 0.1], "2+2", correct=False, clipped=[0.0, 0.5])]
        write_statistics(folder, rows)
    return folder


def page_of(*folders):
    return make_page(read_runs(folders))


def data_of(html):
    found = re.findall(r'<script id="data" type="application/json">(.*?)</script>', html, flags=re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


# What it reads


def test_names_of_files_are_those_of_the_run():
    assert (runs_module.METRICS, runs_module.COMPLETIONS, runs_module.RECORD) == (METRICS, COMPLETIONS, RECORD)


def test_definitions_are_those_of_the_page():
    """Each row of the page is there, word for word but for its marks."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    definitions = read_definitions()
    assert len(lines) == len(definitions) > 30
    for line, (name, definition) in zip(lines, definitions.items(), strict=True):
        cells = [plain(cell) for cell in line.strip("|").split("|")]
        assert [name, definition.unit, definition.text, definition.trouble] == cells
        assert definition.text or definition.unit or definition.trouble
    assert definitions["divergence/first_tokens"].section == "Always"
    assert "First tokens" in definitions["divergence/first_tokens"].trouble  # of a link, the text
    assert not any("](" in text or "`" in text for definition in definitions.values() for text in definition)


def test_page_has_curves_with_their_definitions(tmp_path):
    html = page_of(make_run(tmp_path / "run"))
    loss = data_of(html)["curves"]["loss"][0]
    assert loss["train"] == [[s, float(f"{1 / s:.6g}")] for s in range(1, 11)]
    assert loss["eval"] == [[5, 0.3]]
    assert not {"train_runtime", "train_loss", "entropy"} & data_of(html)["curves"].keys()
    for text in (read_definitions()["loss"].trouble.split(";")[0], "of teacher and student, before the clip"):
        assert text in html
    assert "odd/&lt;b&gt;" in html and "odd/<b>" not in html


def test_curves_are_thinned_and_keep_their_ends():
    points = [[step, 0.0] for step in range(1, 5002)]
    kept = thin(points)
    assert kept[0] == points[0] and kept[-1] == points[-1] and len(kept) <= pages.MAX_POINTS + 1
    assert thin(points[: pages.MAX_POINTS]) == points[: pages.MAX_POINTS]


def test_runs_without_token_statistics(tmp_path):
    html = page_of(make_run(tmp_path / "run", statistics=False))
    assert "has no token statistics" in html and "--save_token_statistics" in html
    assert html.count("<article") == 2 and data_of(html)["curves"]["loss"]


def test_broken_files_are_noted(tmp_path):
    folder = make_run(tmp_path / "run")
    whole = (folder / "token_statistics" / "step_000009.parquet").read_bytes()
    (folder / "token_statistics" / "step_000009.parquet").write_bytes(whole[: len(whole) // 2])
    write_statistics(folder, [make_row(12, ["a"], [float("nan")]), make_row(12, ["a", "b"], [1.0])])
    (folder / "token_statistics" / "step_x.parquet").write_text("no")
    with (folder / METRICS).open("a") as lines:
        lines.write('[1]\n{"step": 11, "lo')
    (folder / RECORD).write_text("{")
    run = read_run(folder)
    assert run.steps == [1, 5] and len(run.logs) == 12
    notes = "\n".join(run.notes)
    for part in ("step_000009.parquet could not be read", "row 0: divergence has a value that is not finite"):
        assert part in notes
    assert (
        "row 1: divergence has 1 entries in place of 2" in notes and "step_000012.parquet has no completion" in notes
    )
    assert f"{METRICS}: line 13 and 1 more" in notes and f"{RECORD} could not be read" in notes
    html = make_page([run])
    assert "What could not be read" in html and "step_000009.parquet" in html


def test_missing_columns_and_files_are_noted(tmp_path):
    folder = make_run(tmp_path / "run")
    row = make_row(1, ["a"], [1.0])
    row.pop("clipped")
    write_statistics(folder, [row])
    for name in (METRICS, COMPLETIONS, RECORD):
        (folder / name).unlink()
    run = read_run(folder)
    assert run.steps == [5, 9] and "no column clipped; left out" in run.notes[-1]
    html = make_page([run])
    assert "No metrics have been logged." in html and "No rollouts were saved." in html


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: [folder / "none"], r"there is no such folder; give the --output_dir"),
        (lambda folder: [folder], r"it has neither metrics.jsonl nor"),
        (lambda folder: [make_run(folder / "a"), folder / "a"], r"name each run once"),
        (lambda folder: [make_run(folder / f"{i}", statistics=False) for i in range(7)], r"7 runs; give at most 6"),
    ],
    ids=["missing", "empty", "twice", "many"],
)
def test_folders_are_refused(make, message, tmp_path):
    with pytest.raises(ValueError, match=f"^OUTPUT_DIR.*{message}"):
        page_of(*make(tmp_path))


def test_program(tmp_path):
    """One call that works, and one that says what is wrong with it, without a traceback."""
    folder, file = make_run(tmp_path / "run"), tmp_path / "pages" / "page.html"
    command = [sys.executable, ROOT / "inspect_run.py"]
    done = subprocess.run([*command, folder, "--output", file], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and str(file) in done.stdout, done.stderr
    assert file.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    done = subprocess.run([*command, tmp_path / "none"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "there is no such folder" in done.stderr and "Traceback" not in done.stderr


# What it counts


def test_tokens_by_hand(tmp_path):
    """Token `b` has 0.5 of 1.0 in two places, `c` 0.4 and `a` 0.1; -1 counts as 0."""
    rows = [
        make_row(1, ["a", "b", "c"], [0.1, 0.3, 0.4], kinds=[0, 1, 2]),
        make_row(1, ["b", "a"], [0.2, -1.0], kinds=[1, 0], clipped=[0.5, 0.0], epistemic=[True, False]),
    ]
    write_statistics(tmp_path, rows)
    run = read_run(tmp_path)
    summary = summarize(run.completions, [1])
    assert [(row.token, row.count) for row in summary.tokens] == [("b", 2), ("c", 1), ("a", 2)]
    assert [row.share for row in summary.tokens] == pytest.approx([0.5, 0.4, 0.1], rel=1e-6)
    assert [row.mean for row in summary.tokens] == pytest.approx([0.25, 0.4, 0.05], rel=1e-6)
    assert (summary.num_tokens, summary.num_negative) == (5, 1)
    assert [(place.before, place.token, place.after) for place in summary.places][:2] == [
        ("ab", "c", ""),
        ("a", "b", "c"),
    ]
    assert summary.tokens[0].wanted == ["e", "d"] or summary.tokens[0].wanted[0] == "e"
    kinds = {bar.label: bar for bar in summary.kinds}
    assert [kinds[k].count for k in ("style", "mathematics", "other", "epistemic words")] == [2, 1, 2, 1]
    assert kinds["style"].share == pytest.approx(0.5, rel=1e-6) and kinds["style"].clipped == pytest.approx(0.25)
    positions = {bar.label: bar for bar in summary.positions}
    assert positions["first 4 tokens"].count == 5
    assert [positions[f"quarter {n}"].count for n in (1, 2, 3, 4)] == [2, 1, 2, 0]


@pytest.mark.parametrize(("number", "early", "late"), [(1, 1, 0), (2, 1, 1), (9, 2, 2), (40, 4, 4)])
def test_early_and_late_steps(number, early, late, tmp_path):
    write_statistics(tmp_path, [make_row(step, ["a"], [1.0]) for step in range(1, number + 1)])
    run = read_run(tmp_path)
    steps = list(range(1, number + 1))
    assert run.early == steps[:early] and run.late == steps[len(steps) - late :]
    read = [completion.step for completion in run.completions]
    assert set(run.early + run.late) <= set(read) and len(read) <= 12 and read == sorted(read)


def test_all_runs_stand_side_by_side(tmp_path):
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b", steps=(2,))
    (second / RECORD).write_text(json.dumps({"training": {"learning_rate": 2e-3, "output_dir": str(second)}}))
    html = page_of(first, second)
    data = data_of(html)
    assert data["runs"] == [str(first), str(second)] and len(data["curves"]["loss"]) == 2
    shared = data["problems"][0]["completions"]
    assert [(data["completions"][i]["run"], data["completions"][i]["step"]) for i in shared] == [
        (0, 1), (0, 5), (0, 9), (1, 2),
    ]  # fmt: skip
    assert "Settings that differ" in html and "<bdi>0.002</bdi>" in html


# Texts and size


def test_texts_cannot_leave_their_place(tmp_path):
    html = page_of(make_run(tmp_path / "run"))
    assert "<img" not in html and html.count("</script>") == 2
    assert "\u202e" not in html
    data = data_of(html)
    assert any(text == NASTY for text, _ in data["vocabulary"])  # it comes back whole
    assert "src=" not in re.sub(r"<script id.*?</script>|<bdi>.*?</bdi>|<pre.*?</pre>", "", html, flags=re.DOTALL)


def test_characters_that_steer_are_shown():
    assert visible("a\u202eb\x00c\u05e9\n") == "a⟨U+202E⟩b⟨U+0000⟩c\u05e9\n"
    tokens = {" a": "␣a", "  ": "␣␣", "\n": "↵", "": "∅", "a ": "a␣", " a\n": "␣a↵"}
    tokens |= {"\u200b": "⟨U+200B⟩"}
    assert {token: visible_token(token) for token in tokens} == tokens


def test_page_stays_below_its_limit(tmp_path, monkeypatch):
    """Long completions are cut, and if the page is still too large it takes fewer of them."""
    size = pages.MAX_COMPLETION_TOKENS + 10
    rows = [make_row(step, ["a"] * size, [0.1] * size, str(p)) for step in (1, 2) for p in range(12)]
    write_statistics(tmp_path, rows)
    runs = read_runs([tmp_path])
    html = make_page(runs)
    data = data_of(html)
    assert len(html.encode()) < pages.MAX_BYTES
    assert data["leftOut"] == 24 - len(data["completions"]) > 0
    assert {(c["total"], len(c["tokens"])) for c in data["completions"]} == {(size, size - 10)}
    monkeypatch.setattr(pages, "MAX_BYTES", len(html.encode()) // 2)
    smaller = make_page(runs)
    assert len(smaller.encode()) < pages.MAX_BYTES and 0 < len(data_of(smaller)["completions"]) < len(
        data["completions"]
    )
    monkeypatch.setattr(pages, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="the page would have"):
        make_page(runs)


# What the quickstart's page says


def is_of_the_carry(completion, position):
    """Whether a dropped carry makes a token wrong, in a column's total or in the answer."""
    a, b = map(int, completion.problem.split("+"))
    tokens = completion.columns["tokens"]
    before = "".join(tokens[:position])
    if box := re.search(r"boxed\{(\d*)$", before):
        return not f"{a + b}}}"[len(box[1]) :].startswith(tokens[position])
    if total := re.search(r"(\w+): \d\+\d gives \d*$", before):
        place = addition.COLUMNS.index(total[1])
        return addition.column_totals(a, b)[place] != sum(addition.digit_pairs(a, b)[place])
    return False


def test_first_tokens_of_the_quickstart_are_those_of_the_carry(tiny_model_dir, tmp_path):
    """
    The completions drop each carry, as the base often does. The page then names the digits of the carry first.

    No sampling decides, since the completions are given. The fixed model's scores of them differ between processors by
    their last digits. The carry has 20 % of the tokens and had 99.7 % of the divergence. The 12 places had 0.63
    nats or more, and no other place more than 0.009.
    """
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    examples, completions = [], []
    for example in addition.training_problems(seed=0, size=64):
        a, b = map(int, example["problem"].split("+"))
        dropped = addition.column_totals(a, b, lambda digit_sum: False)
        if dropped != addition.column_totals(a, b):
            examples.append(example)
            completions.append(tokenizer.encode(addition.response_text(a, b, dropped)) + [tokenizer.eos_token_id])
    write_statistics(tmp_path, score(model, model, tokenizer, examples, completions))
    run = read_run(tmp_path)
    assert len(run.completions) == len(examples) > 30
    assert not any(completion.texts["correct"] for completion in run.completions)
    assert_carry_is_named_first(run)


def test_first_tokens_of_a_run_on_the_quickstart_are_those_of_the_carry(make_trainer):
    """
    The same of what a run saves, where the base model samples and makes the mistakes itself.

    The carry had 10 to 14 % of the tokens and 99.2 to 99.4 % of the divergence with six seeds. All 12 places were its
    own, with 0.55 nats or more, and it had 99 % of the divergence of each of the first tokens.
    """
    trainer = make_trainer(save_token_statistics=32, max_steps=1)
    trainer.train()
    run = read_run(Path(trainer.args.output_dir))
    assert len(run.completions) == 32 and run.early == [1]
    assert_carry_is_named_first(run)


def assert_carry_is_named_first(run):
    """Most of the divergence, all of the largest places and most of the first tokens are digits of the carry."""
    summary = summarize(run.completions, run.early)
    by_problem = {completion.problem: completion for completion in run.completions}
    assert len(summary.places) == 12
    for place in summary.places:
        assert is_of_the_carry(by_problem[place.problem], place.position), place
    of_carry, all_of_it, size = {}, {}, 0
    for completion in run.completions:
        for position, value in enumerate(completion.positive):
            token = completion.columns["tokens"][position]
            all_of_it[token] = all_of_it.get(token, 0.0) + value
            if is_of_the_carry(completion, position):
                of_carry[token] = of_carry.get(token, 0.0) + value
                size += 1
    on_carry = sum(of_carry.values()) / sum(all_of_it.values())
    assert size < 0.25 * summary.num_tokens and on_carry > 0.8, (size, on_carry)
    for row in summary.tokens[:3]:
        assert row.token.isdigit() and of_carry[row.token] > 0.6 * all_of_it[row.token], row


# In a browser


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium through Playwright; neither is among the requirements."""
    programs = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, programs)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(programs)} is on the PATH")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


TOO_WIDE = """() => [...document.querySelectorAll("body *")].filter((node) => !(node instanceof SVGElement)
    && getComputedStyle(node).display !== "inline" && node.scrollWidth > node.clientWidth + 1
    && !node.closest("select")).map((node) => node.tagName + "." + node.className)"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_browser(browser, width, scheme, tmp_path):
    """The page opens with texts that try to leave their place; pointer, keys and touch show both roles' tokens."""
    file = tmp_path / "report.html"
    file.write_text(page_of(make_run(tmp_path / "a"), make_run(tmp_path / "b", steps=(2, 3))), encoding="utf-8")
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, has_touch=True, offline=True
    )
    page, requests, said = context.new_page(), [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.goto(file.as_uri())
    assert page.locator("h1").inner_text() == "What these runs learned"
    assert page.locator(".plot svg").count() == len(data_of(file.read_text())["curves"]) > 2
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 28)"}[scheme]

    def check_width():
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(TOO_WIDE) == []

    check_width()
    tip, tokens = page.locator("#tip"), page.locator("#panes .tokens").first.locator(".t")
    assert tokens.count() == 8 and tokens.nth(3).inner_text() == NASTY and not tip.is_visible()
    tokens.nth(6).hover()
    assert tip.is_visible()
    for text in ("wait", "Student", "Teacher", "style", "epistemic", "90.5 %", "divergence 0.3 nats"):
        assert text in tip.inner_text()
    assert tip.locator("tbody .token").all_inner_texts()[:2] == ["wait", "e"]
    check_width()
    tokens.nth(5).hover()  # the one of 3,000 characters
    check_width()
    page.mouse.move(1, 1)
    page.keyboard.press("Escape")

    tokens.nth(0).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("End")
    assert tip.is_visible() and "mathematics" in tip.inner_text()
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    tokens.nth(0).tap()
    assert tip.is_visible() and "So" in tip.inner_text()
    page.locator("h1").tap()
    assert not tip.is_visible()

    def color():
        return tokens.nth(3).evaluate("node => getComputedStyle(node).backgroundColor")

    before = color()
    page.get_by_label("p_T").check()
    assert color() != before and "teacher more" in page.locator("#legend").inner_text()
    page.get_by_label("clip").check()
    assert "cuts" in page.locator("#legend").inner_text()
    page.locator("#problem").select_option("1")
    assert page.locator("#problem-text").inner_text() == "2+2"
    assert page.locator("#panes").inner_text().count("wrong") == 4
    page.locator("#panes select").first.select_option("5")
    assert page.locator("#panes select").first.input_value() == "5"
    plot = page.locator(".plot[data-metric=loss]")
    plot.locator("svg").focus()
    page.keyboard.press("Home")
    assert plot.locator("output").inner_text() == f"step 1: {tmp_path / 'a'} 1, {tmp_path / 'b'} 1"
    check_width()
    assert requests == [file.as_uri()] and said == []
    context.close()
