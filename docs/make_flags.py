"""
Write docs/flags.md from the settings' fields and help texts.

    python docs/make_flags.py

`tests/test_docs.py` fails if the page and the code differ.
"""

import argparse
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import yaml
from trl import GRPOConfig, ModelConfig, SFTConfig

from eval.evaluate_math import build_parser
from grpo_train import GRPOArguments
from opsd.config import FIXED, OPSDConfig
from opsd.run.arguments import BaselineArguments, ModelArguments, RunArguments
from opsd.run.flags import HELP
from opsd_train import OPSDArguments
from sft_train import SFTArguments

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "flags.md"
HEAD = """# Flags

`python docs/make_flags.py` writes this page from the help texts of the settings. `--help` of each program has the same
texts. Flags also stand in a YAML file for `--config`, one `name: value` a line. A flag with a default of `False` may
stand alone: `--fixed_teacher` is `--fixed_teacher true`.

[Your own data](own_data.md) says which flags to look at first. [Method](method.md) explains those of teacher and
loss.
"""
INHERITED = """Every flag of TRL's `GOLDConfig`, `SFTConfig`, `GRPOConfig` and `ModelConfig` works too, with the
exceptions below. These are the ones that recipes, quickstart and these pages name. Defaults are those of
`opsd_train.py`, else of the program that has the flag.
"""
REFUSED = """OPSD has these flags from TRL's GOLD trainer and from transformers. They must keep their value.
Another one is refused with the reason.
"""


def own_fields(settings: type) -> list[Field]:
    """The fields that a class itself declares."""
    return [setting for setting in fields(settings) if setting.name in settings.__annotations__]


def config_groups() -> Iterator[tuple[str, list[Field]]]:
    """Yield the groups of `OPSDConfig`, as the comments between its fields name them."""
    text = (ROOT / "opsd" / "config.py").read_text(encoding="utf-8")
    body = text.partition("class OPSDConfig")[2].partition("def __post_init__")[0]
    by_name = {setting.name: setting for setting in own_fields(OPSDConfig)}
    for part in re.split(r"^    # ", body, flags=re.MULTILINE)[1:]:
        title, _, rest = part.partition("\n")
        names = re.findall(r"^    (\w+):", rest, flags=re.MULTILINE)
        yield title, [by_name.pop(name) for name in names]
    assert not by_name, f"fields without a group: {', '.join(by_name)}"


def cell(text: Any) -> str:
    """Make one line for a table of plain text; what looks like HTML or a column's end stays text."""
    line = " ".join(str(text).split())
    return line.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*")


def default_of(setting: Field) -> str:
    default = setting.default if setting.default is not MISSING else None
    if default is None:
        return "none"
    if isinstance(default, str) and "\n" in default:
        return "in `data_collator.py`"
    return f"`{default}`" if default != "" else "empty"


def row(flag: str, default: str, text: Any) -> str:
    return f"| `--{flag}` | {default} | {cell(text)} |"


def table(rows: list[str]) -> str:
    return "\n".join(["| flag | default | meaning |", "|---|---|---|", *rows]) + "\n"


def field_rows(settings: list[Field]) -> list[str]:
    rows = []
    for setting in settings:
        text = setting.metadata["help"]
        if choices := setting.metadata.get("choices"):
            text += f" One of: {', '.join(choices)}."
        rows.append(row(setting.name, default_of(setting), text))
    return rows


def flags_in_use() -> set[str]:
    """The flags that recipes and the quickstart's files set, and those that other pages name."""
    names: set[str] = set()
    for file in [*ROOT.glob("scripts/run_*.sh"), *(page for page in ROOT.glob("docs/*.md") if page != PAGE)]:
        names |= set(re.findall(r"--(\w+)", file.read_text(encoding="utf-8")))
    for file in ROOT.glob("quickstart/*.yaml"):
        names |= yaml.safe_load(file.read_text(encoding="utf-8")).keys()
    return names


def inherited_rows() -> list[str]:
    own = {s.name for kind in (RunArguments, OPSDArguments, SFTArguments, GRPOArguments) for s in fields(kind)}
    own |= {setting.name for kind in (OPSDConfig, ModelArguments) for setting in own_fields(kind)}
    rows = []
    known: dict[str, Field] = {}
    for kind in (OPSDConfig, ModelConfig, SFTConfig, GRPOConfig):
        known = {setting.name: setting for setting in fields(kind)} | known
    for name in sorted(flags_in_use() & known.keys() - own - FIXED.keys()):
        theirs = " ".join((known[name].metadata.get("help") or "").split())
        rows.append(row(name, default_of(known[name]), HELP.get(name) or re.split(r"(?<=[.?])\s", theirs)[0]))
    return rows


def parser_rows(parser: argparse.ArgumentParser) -> list[str]:
    rows = []
    for action in parser._actions:
        if action.help is argparse.SUPPRESS or action.dest == "help":
            continue
        text = (action.help or "") % vars(action) if "%(" in (action.help or "") else action.help or ""
        if action.choices:
            text += f"; one of {', '.join(map(str, action.choices))}"
        is_switch = action.nargs == 0
        default = "off" if is_switch else "none" if action.default in (None, []) else f"`{action.default}`"
        rows.append(row(action.option_strings[0].removeprefix("--"), default, text))
    return rows


def refused_rows() -> list[str]:
    rows = [f"| `--{flag}` | `{value}` | {cell(reason)} |" for flag, (value, reason) in FIXED.items()]
    return ["| flag | must be | reason |", "|---|---|---|", *rows]


def make_page() -> str:
    """The whole page."""
    shared = own_fields(RunArguments) + own_fields(ModelArguments)
    parts = [HEAD, "## All training programs\n", table(field_rows(shared))]
    parts += ["## `opsd_train.py`\n", "### Data and start\n", table(field_rows(own_fields(OPSDArguments)))]
    for title, settings in config_groups():
        parts += [f"### {title}\n", table(field_rows(settings))]
    parts += ["## The baselines\n", "### Both\n", table(field_rows(own_fields(BaselineArguments)))]
    for program, kind in (("sft_train.py", SFTArguments), ("grpo_train.py", GRPOArguments)):
        if own := own_fields(kind):
            parts += [f"### `{program}`\n", table(field_rows(own))]
    parts += ["## `eval/evaluate_math.py`\n", table(parser_rows(build_parser()))]
    parts += ["## From TRL and transformers\n", INHERITED, table(inherited_rows())]
    parts += ["## Refused by OPSD\n", REFUSED, "\n".join(refused_rows()) + "\n"]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
