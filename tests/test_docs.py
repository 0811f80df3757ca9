"""README and docs/ are true: links lead somewhere, and what they name exists in the code."""

import ast
import fnmatch
import importlib.util
import itertools
import re
from dataclasses import fields
from pathlib import Path

import pytest
from trl import GRPOConfig, SFTConfig

from eval.evaluate_math import build_parser
from grpo_train import GRPOArguments
from opsd.config import OPSDConfig
from opsd.held_out import METRICS as HELD_OUT_METRICS
from opsd.run.arguments import ModelArguments
from opsd_train import OPSDArguments
from sft_train import SFTArguments

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = [file for pattern in ("*.py", "opsd/**/*.py", "eval/*.py") for file in ROOT.glob(pattern)]
# Flags of other programs that the pages name
FOREIGN_FLAGS = {
    "accelerate": {"config_file", "num_processes", "mixed_precision"},
    "sbatch": {"nodes", "signal", "array", "gpus", "wrap"},
    "vllm": {"enable-lora", "max-lora-rank", "lora-modules", "logprobs-mode", "host", "max-model-len"}
    | {"max-logprobs", "max-num-batched-tokens"},
    "pip": {"no-build-isolation", "no-deps"},
    "mkdocs": {"strict"},
    "any": {"help", "help_all", "version", "config"},
}
TRANSFORMERS_METRICS = {"loss", "grad_norm", "learning_rate", "epoch"}
MAX_WORDS = 25


def page_id(page):
    return str(page.relative_to(ROOT)) if isinstance(page, Path) else None


def without_code(text):
    """The text without fenced blocks and code spans."""
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def code_spans(text):
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def code_blocks(text, language="bash"):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = []
    for heading in re.findall(r"^#+ +(.+?) *$", text, flags=re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = found.count(slug)
        found.append(f"{slug}-{number}" if number else slug)
    return found


def test_anchors_are_githubs(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b.py`, c\n```bash\n# no heading\n```\n## What is it\n## What is it\n")
    assert anchors(page) == ["a-bpy-c", "what-is-it", "what-is-it-1"]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and file.is_relative_to(ROOT), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}: {anchors(file)}"


def known_flags():
    kinds = (OPSDConfig, OPSDArguments, SFTConfig, SFTArguments, GRPOConfig, GRPOArguments, ModelArguments)
    names = {setting.name for kind in kinds for setting in fields(kind)}
    names |= {word.removeprefix("--") for action in build_parser()._actions for word in action.option_strings}
    for file in (*ROOT.glob("quickstart/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("eval/*.py")):
        text = file.read_text(encoding="utf-8")
        names |= set(re.findall(r'add(?:_argument)?\(\s*"--([\w-]+)"', text))
        switches = re.findall(r'"--([\w-]+)",[^()]*BooleanOptionalAction', text)
        names |= {f"no-{name}" for name in switches}
    return names | set().union(*FOREIGN_FLAGS.values())


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_flags_exist(page):
    known = known_flags()
    text = page.read_text(encoding="utf-8")
    for code in (*code_spans(text), *code_blocks(text)):
        for flag in re.findall(r"(?<![\w-])--([a-zA-Z][\w-]*)", code):
            is_pattern = flag.endswith("_")  # as in `--lora_*`
            exists = any(name.startswith(flag) for name in known) if is_pattern else flag in known
            assert exists, f"{page.name}: --{flag} in {code[:80]!r}"


def is_path(word):
    """Whether a word of code names a file or folder of the project."""
    if not re.fullmatch(r"[\w.*/-]+", word) or word.startswith(("outputs/", "-", "/", ".venv")):
        return False
    if re.search(r"\.(py|sh|yaml|md|txt|in|toml|cff)$", word):
        return True
    return "/" in word and (ROOT / word.split("/")[0]).is_dir()


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_exist(page):
    text = page.read_text(encoding="utf-8")
    words = {word for code in code_spans(text) for word in code.split() if len(code.split()) == 1}
    words |= {word for code in (*code_blocks(text), *code_spans(text)) for word in code.split() if "/" in word}
    for word in filter(is_path, words):
        assert list(ROOT.glob(word.rstrip("/"))), f"{page.name}: {word}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_tests_exist(page):
    sources = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("test_*.py"))
    names = re.findall(r"^def (test_\w+)", sources, flags=re.MULTILINE)
    for code in code_spans(page.read_text(encoding="utf-8")):
        if re.fullmatch(r"test_[\w*]+", code):
            assert fnmatch.filter(names, code), f"{page.name}: {code}"


def sentences(text):
    """The sentences of a page's prose: without tables, code, equations and headings."""
    text = re.sub(r"^```.*?^```|<!--.*?-->|\$\$.*?\$\$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^(\||#|!\[).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"`[^`\n]+`|\$[^$\n]+\$", "code", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    blocks = re.split(r"\n\s*\n|^\s*(?:[-*]|\d+\.) ", text, flags=re.MULTILINE)
    for block in blocks:
        yield from re.split(r"(?<=[.!?])\**\)?\s+(?=[\w*(\[])", " ".join(block.split()))


def test_sentences_are_split():
    text = "# No\n\nOne `a b. c` two.\nThree (v1.1) four: [five](x.md)! Six.\n\n- seven\n- eight\n\n| no |\n"
    expected = ["One code two.", "Three (v1.1) four: five!", "Six.", "seven", "eight"]
    assert list(filter(None, sentences(text))) == expected


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CONTRIBUTING.md"], ids=page_id)
def test_sentences_are_short(page):
    counted = {s: len(re.findall(r"[^\s]*\w[^\s]*", s)) for s in sentences(page.read_text(encoding="utf-8"))}
    assert {s: n for s, n in counted.items() if n > MAX_WORDS} == {}


def test_readme_is_one_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_flags_page_is_the_generated_one():
    spec = importlib.util.spec_from_file_location("make_flags", ROOT / "docs" / "make_flags.py")
    make_flags = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_flags)
    assert make_flags.PAGE.read_text(encoding="utf-8") == make_flags.make_page(), "run python docs/make_flags.py"


def texts_of(node, values):
    """The texts that a metric's name can be: a constant, a variable of the function, or an f-string of these."""
    if isinstance(node, ast.Constant):
        return {node.value}
    if isinstance(node, ast.Name):
        return values.get(node.id, set())
    if isinstance(node, ast.FormattedValue):
        return texts_of(node.value, values)
    parts = [texts_of(part, values) for part in node.values]
    return {"".join(choice) for choice in itertools.product(*parts)}


def values_of_names(function):
    """The texts that are assigned to names in a function, one by one or by a loop over tuples."""
    values = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            pairs = [(node.targets[0], node.value)]
        elif isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple | ast.List):
            pairs = [(node.target, element) for element in node.iter.elts]
        else:
            continue
        for target, value in pairs:
            is_tuple = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
            for name, text in zip(target.elts, value.elts, strict=True) if is_tuple else [(target, value)]:
                if isinstance(name, ast.Name) and isinstance(text, ast.Constant) and isinstance(text.value, str):
                    values.setdefault(name.id, set()).add(text.value)
    return values


def calls_with_values(function):
    """The calls of methods in a function, each with the texts of names. A branch has its own."""
    known = dict.fromkeys(ast.walk(function), values_of_names(function))
    for node in ast.walk(function):  # from the outside inwards
        for branch in (node.body, node.orelse) if isinstance(node, ast.If) else ():
            block = ast.Module(branch, [])
            known |= {call: known[call] | values_of_names(block) for call in ast.walk(block) if call in known}
    return [(c, v) for c, v in known.items() if isinstance(c, ast.Call) and isinstance(c.func, ast.Attribute)]


def strings(node):
    return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def logged_metrics():
    """The names that `Metrics`, the curriculum and the counts of a run log."""
    names = set()
    for file in CODE:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.AugAssign | ast.AnnAssign | ast.Assign):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                if getattr(target, "id", getattr(target, "attr", "")) == "logged_counts" and node.value is not None:
                    names |= strings(node.value)
            if not isinstance(node, ast.FunctionDef):
                continue
            if node.name in ("metrics", "effective_share"):
                names |= {key.value for n in ast.walk(node) if isinstance(n, ast.Dict) for key in n.keys}
            for call, values in calls_with_values(node):
                if call.func.attr == "timed":
                    names |= {f"seconds/{phase}" for phase in texts_of(call.args[0], values)}
                elif call.func.attr in ("add", "add_values", "add_extreme"):
                    owner = call.func.value
                    if getattr(owner, "attr", getattr(owner, "id", "")) == "metrics":
                        found = texts_of(call.args[0], values)
                        assert found, f"{file.name}, line {call.lineno}: which metric is this?"
                        names |= found
    return names


def test_metrics_page_has_each_metric():
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    described = re.findall(r"^\| `([\w/]+)` \|", text, flags=re.MULTILINE)
    assert len(described) == len(set(described))
    logged = logged_metrics()
    assert {"divergence", "seconds/student", "sampling/sampling_logp_difference/max", "num_rationale_tokens"} < logged
    held_out = {f"eval_{name}" for name in HELD_OUT_METRICS}
    assert set(described) == logged | held_out | TRANSFORMERS_METRICS


def test_messages_of_troubleshooting_stand_in_the_code():
    """Of a row's first column, each part between the dots has to stand in one text of the code."""
    spoken = []
    for file in CODE:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                spoken.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                spoken.append(node.value)
    spoken = [re.sub(r"%(?:\.1f %%|[ds])", "\0", text) for text in spoken]
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE)
    assert len(messages) > 50
    for message in messages:
        pattern = r".*".join(map(re.escape, message.split("...")))
        assert any(re.search(pattern, text, re.DOTALL) for text in spoken), message


def test_site_has_all_pages():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    assert set(re.findall(r"(\w+\.md)", navigation)) == {page.name for page in (ROOT / "docs").glob("*.md")}
