"""
A task outside of mathematics, with a verifier of its own: sort words.

    python examples/sort_words.py FOLDER

writes train.jsonl and test.jsonl. `--verifier examples.sort_words:share_in_place` judges, from the folder above this
one; docs/own_data.md has the commands.
"""

import argparse
import itertools
import json
import random
from collections.abc import Mapping
from pathlib import Path

WORDS = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen")
NUM_TRAIN = 256  # of 8 * 7 * 6 problems; the others are for the test


def share_in_place(completion: str, answer: str, row: Mapping[str, str]) -> float | None:
    """
    Return the share of words that stand where they belong, in [0, 1]; 1 is right.

    Args:
        completion: text of the response after its thoughts. Its last line counts.
        answer: the sorted words.
        row: all texts of the row, such as `problem`. A row whose answer has other words than its problem is faulty.
    """
    expected = answer.split()
    if sorted(row["problem"].split()) != expected:
        return None
    written = (completion.strip().splitlines() or [""])[-1].split()
    if len(written) != len(expected):
        return 0.0
    return sum(ours == theirs for ours, theirs in zip(written, expected, strict=True)) / len(expected)


def make_problems() -> list[dict[str, str]]:
    """Make all problems of three words, in random order; the sorted words are `solution` and `answer`."""
    problems = []
    for words in itertools.permutations(WORDS, 3):
        ordered = " ".join(sorted(words))
        problems.append({"problem": " ".join(words), "solution": ordered, "answer": ordered})
    random.Random(0).shuffle(problems)
    return problems


def main() -> None:
    """Run the command line, see the head of this file."""
    parser = argparse.ArgumentParser(description="Write problems whose answers are sorted words.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(problem) + "\n" for problem in make_problems()]
    (folder / "train.jsonl").write_text("".join(lines[:NUM_TRAIN]), encoding="utf-8")
    (folder / "test.jsonl").write_text("".join(lines[NUM_TRAIN:]), encoding="utf-8")


if __name__ == "__main__":
    main()
