"""The order of the house: imports run one way, the trainer stays small, the root holds programs only."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [
    file
    for pattern in ("*.py", "opsd/**/*.py", "eval/*.py", "quickstart/*.py", "real_model/*.py")
    for file in ROOT.glob(pattern)
]


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}


def imports_of(module: str) -> set[str]:
    """Modules of the project that a module imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names & MODULES.keys() - {module}


def test_there_is_no_circle_of_imports():
    order = list(TopologicalSorter({module: imports_of(module) for module in MODULES}).static_order())
    assert len(order) == len(MODULES) > 30


@pytest.mark.parametrize(
    ("rooms", "may_import"),
    [
        (("data_collator",), ()),
        (("opsd.losses",), ("opsd.losses",)),
        (("opsd.thinking",), ()),
        (("opsd.grading",), ("opsd.grading", "opsd.thinking")),
        (("opsd.adapters", "opsd.curriculum", "opsd.metrics", "opsd.vllm_engine", "opsd.run.checkpoints"), ()),
        (("opsd.run.conversations",), ()),
        (("opsd.contexts",), ()),
        (("opsd.token_weights",), ("data_collator", "opsd.losses", "opsd.metrics")),
        (
            ("opsd.config",),
            ("data_collator", "opsd.contexts", "opsd.curriculum", "opsd.grading", "opsd.losses", "opsd.token_weights"),
        ),
        (("opsd.packing",), ("data_collator",)),
        (("opsd.token_kinds",), ()),
        (
            ("opsd.token_statistics",),
            ("data_collator", "opsd.losses", "opsd.metrics", "opsd.token_kinds", "opsd.token_weights"),
        ),
        (
            ("opsd.saved_statistics",),
            ("data_collator", "opsd.config", "opsd.losses", "opsd.metrics", "opsd.rollouts", "opsd.teacher_context"),
        ),
        (("opsd.stale_rollouts",), ("opsd.rollouts",)),
        (("opsd.throughput",), ("data_collator", "opsd.metrics")),
        (("opsd.rewards",), ("opsd.grading", "opsd.thinking")),
        (("opsd.run.hub",), ()),
        (("opsd.run.problem_data",), ("opsd.grading", "opsd.run.conversations", "opsd.run.hub", "opsd.thinking")),
        (("opsd.alarm",), ("data_collator", "opsd.config")),
        (("opsd.held_out",), ("data_collator", "opsd.grading", "opsd.rollouts", "opsd.thinking")),
        (("opsd.teacher_model",), ("opsd.adapters", "opsd.config", "opsd.losses", "opsd.packing")),
        (("opsd.teacher_server",), ("data_collator", "opsd.config", "opsd.losses")),
        (("opsd.teacher",), ("opsd.config", "opsd.teacher_model", "opsd.teacher_server")),
        (("opsd.rollouts",), ("opsd.adapters", "opsd.config", "opsd.vllm_engine")),
        (("opsd.preflight",), ("data_collator", "opsd.rollouts", "opsd.teacher", "opsd_trainer")),
        (("opsd",), ("opsd", "data_collator", "opsd_trainer")),
        (("opsd_trainer",), ("opsd", "data_collator")),
        (("opsd_train", "sft_train", "grpo_train"), ("opsd", "data_collator", "opsd_trainer")),
    ],
    ids=lambda names: names[0] if names else "nothing",
)
def test_imports_run_down(rooms, may_import):
    def stands_in(module, names):
        return any(module == name or module.startswith(f"{name}.") for name in names)

    members = [module for module in MODULES if stands_in(module, rooms)]
    assert members
    for module in members:
        assert [name for name in imports_of(module) if not stands_in(name, may_import)] == [], module


def test_only_the_preflight_imports_the_trainer():
    assert [m for m in MODULES if m.startswith("opsd.") and "opsd_trainer" in imports_of(m)] == ["opsd.preflight"]


def test_sizes():
    assert len((ROOT / "opsd_trainer.py").read_text().splitlines()) < 600
    assert len(list(ROOT.glob("*.py"))) <= 6


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_modules_are_production_code(file):
    text = file.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text))
    assert "sys.path.insert" not in text and "unittest" not in text
