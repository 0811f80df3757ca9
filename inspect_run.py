"""
Show what a run learned, or several side by side, in one self-contained page.

    python inspect_run.py outputs/mine
    python inspect_run.py outputs/mine outputs/other --output report.html

The page has the curves of all metrics, and with `--save_token_statistics` the tokens with most divergence, and
completions whose tokens are coloured by it: docs/inspection.md.
"""

import argparse
import sys
from pathlib import Path

from opsd.inspection.page import make_page
from opsd.inspection.runs import read_runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", type=Path, nargs="+", help="--output_dir of a training")
    parser.add_argument("--output", type=Path, help="file of the page (default: report.html in the first OUTPUT_DIR)")
    arguments = parser.parse_args()
    file = arguments.output or arguments.output_dir[0] / "report.html"
    if file.is_dir():
        parser.error(f"--output {file}: this is a folder; give a file such as {file / 'report.html'}")
    try:
        runs = read_runs(arguments.output_dir)
        page = make_page(runs)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(page, encoding="utf-8")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for run in runs:
        for note in run.notes:
            print(f"{run.name}: {note}", file=sys.stderr)  # noqa: T201
    print(f"{file}, {len(page.encode()):,} bytes: open it in a browser")  # noqa: T201


if __name__ == "__main__":
    main()
