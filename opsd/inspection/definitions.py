"""The definitions of the metrics, as docs/metrics.md has them."""

import re
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


class Definition(NamedTuple):
    """A row of the page, as plain text."""

    section: str
    unit: str
    text: str
    trouble: str


def plain(markdown: str) -> str:
    """Leave out the marks of code and links."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", markdown).replace("`", "").strip()


def read_definitions(page: Path = PAGE) -> dict[str, Definition]:
    """
    Return metric -> definition, in the order of the page.

    Raises:
        OSError: if there is no such page.
    """
    section, definitions = "", {}
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ").strip()
        elif named := re.match(r"\| `([^`]+)` \|(.*)\|$", line.rstrip()):
            unit, text, trouble = (plain(cell) for cell in named[2].split("|"))
            definitions[named[1]] = Definition(section, unit, text, trouble)
    return definitions
