r"""
Grade mathematical answers from the command line, see `opsd.grading`.

    python eval/grading.py --pairs FILE.jsonl
    python eval/grading.py --responses FILE.jsonl --thinking

read lines with `pred` and `gold`, or `response` and `gold` (text, numbers or null; optional: `answer_type`), and write
one JSON line for each, in order: `equal`, `status`, `seconds` and `score` of its `Verdict`, for responses also
`extracted`.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opsd.grading import EXTRACT_METHODS, GRADERS, GradingPool, answer_text, extract_answer
from opsd.run.flags import SWITCH


def read_lines(path: str, columns: set[str]) -> list[dict[str, Any]]:
    """Return the records of a JSONL file, with answers as text; a `ValueError` names the line that is not valid."""
    records = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").split("\n"), 1):  # U+2028 ends no line
        try:
            record = json.loads(line) if line.strip() else None
            if record is not None:
                if not isinstance(record, dict) or not columns <= record.keys():
                    raise ValueError(f"each line needs an object with {' and '.join(sorted(columns))}")
                records.append({**record, **{column: answer_text(record[column]) for column in columns}})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    return records


def main(arguments: list[str] | None = None) -> None:
    """Run the command line, see the head of this file."""
    parser = argparse.ArgumentParser(description="Grade mathematical answers; one JSON line for each, in order.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pairs", metavar="FILE.jsonl", help="lines with pred and gold")
    source.add_argument("--responses", metavar="FILE.jsonl", help="lines with response and gold")
    add = parser.add_argument
    add("--thinking", **SWITCH, help="responses without </think> have no answer")
    add("--extract", choices=EXTRACT_METHODS, default="final", help="how answers are found (default: %(default)s)")
    add("--grader", choices=GRADERS, default="strict", help="how they are compared (default: %(default)s)")
    add("--grade_workers", type=int, help="worker processes (default: one per CPU core, at most 8)")
    add("--grade_timeout", type=float, default=10.0, help="processor seconds per answer (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        records = read_lines(options.pairs or options.responses, {"pred" if options.pairs else "response", "gold"})
        pool = GradingPool(options.grade_workers, options.grade_timeout, grader=options.grader)
    except UnicodeDecodeError as error:
        parser.error(f"{options.pairs or options.responses}: not UTF-8 ({error}); convert it first")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    with pool:
        results = []
        for record in records:
            if options.responses:
                record["pred"] = extract_answer(record["response"] or "", options.thinking, options.extract)
            results.append(pool.submit(record["pred"], record["gold"], record.get("answer_type")))
        for record, result in zip(records, results, strict=True):
            extracted = {"extracted": record["pred"]} if options.responses else {}
            sys.stdout.write(json.dumps({**asdict(result.result()), **extracted}) + "\n")


if __name__ == "__main__":
    main()
