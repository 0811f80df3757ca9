"""
Hooks of MkDocs: equations become MathML, which browsers draw without a script, and links out of docs/ stay whole.

On GitHub a page links to `../quickstart/accuracy.png`. The site gets a copy of each such file.
"""

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = re.compile(r"(?<=\]\()\.\./([^)#\s]+)")
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the files outside of docs/ that pages link to."""
    linked: set[str] = set()
    for page in files.documentation_pages():
        linked |= set(OUTSIDE.findall(Path(page.abs_src_path).read_text(encoding="utf-8")))
    for name in sorted(linked):
        path = ROOT / name
        if path.is_file() and not files.get_file_from_path(name):
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point the links at the copies; a folder has none, so that its name alone stays."""
    markdown = re.sub(r"\[([^\]]+)\]\(\.\./[^)#\s]+/\)", r"\1", markdown)
    return OUTSIDE.sub(r"\1", markdown) if page.file.src_uri.count("/") == 0 else markdown


def on_page_content(content: str, **_: Any) -> str:
    """Replace TeX by MathML, and mark code of one word, which is not to be broken."""

    def draw(match: re.Match) -> str:
        tex = html.unescape(match[2]).strip()
        if match[1] == "span":
            return convert(tex)
        return f'<div class="equation">{convert(tex, display="block")}</div>'

    content = EQUATION.sub(draw, content)
    return re.sub(r"<code>(?=[^<\s]{1,44}</code>)", '<code class="word">', content)
