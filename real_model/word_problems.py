"""
Word problems with two numbers, one of which is the answer as it stands there, and a fixed held-out set.

The model does not lack arithmetic here: it calculates where nothing is to be calculated.

    python -m real_model.word_problems --output_dir outputs/smollm2/data --seed 0
"""

import argparse
import hashlib
import logging
import random
from collections.abc import Callable
from pathlib import Path

from quickstart.addition import shuffle_solutions, write_jsonl

logger = logging.getLogger(__name__)

NAMES = ("Tom", "Ana", "Ben", "Mia", "Leo", "Eva", "Max", "Zoe", "Sam", "Ida")
THINGS = ("apples", "pens", "books", "cards", "coins", "shells", "stamps", "eggs", "cups", "toys")
NUMBERS = range(2, 20)
HELD_OUT_ONE_IN = 4  # pairs of numbers, in each kind
SALT = "final"  # of their hash; chosen after the settings (13 of 128 problems were in data of a trial all the same)
TRAIN_SIZE = 1024
TEST_SIZE = 128


# A kind makes a text and, of each of its two numbers, a question and its solution. The texts do not say which is asked
# for, so that the question has to be read and another problem's solution does not tell the place.
Question = tuple[str, str]
Kind = Callable[[int, int, str, str], tuple[str, Question, Question]]


def price(a: int, b: int, one: str, things: str) -> tuple[str, Question, Question]:
    bought = f"How many {things} does {one} buy?", f"{one} buys {a} {things}."
    cost = f"How many dollars does {one} pay for each?", f"{one} pays {b} dollars for each."
    return f"{one} buys {a} {things} for {b} dollars each.", bought, cost


def boxes(a: int, b: int, one: str, things: str) -> tuple[str, Question, Question]:
    boxes = f"How many boxes does {one} have?", f"{one} has {a} boxes."
    inside = f"How many {things} are in one box?", f"There are {b} {things} in one box."
    return f"{one} has {a} boxes with {b} {things} in each.", boxes, inside


def found(a: int, b: int, one: str, things: str) -> tuple[str, Question, Question]:
    before = f"How many {things} did {one} have at first?", f"{one} had {a} {things} at first."
    added = f"How many {things} did {one} find?", f"{one} found {b} {things}."
    return f"{one} had {a} {things} and found {b} more.", before, added


def colors(a: int, b: int, one: str, things: str) -> tuple[str, Question, Question]:
    red = f"How many red {things} does {one} have?", f"{one} has {a} red {things}."
    blue = f"How many blue {things} does {one} have?", f"{one} has {b} blue {things}."
    return f"{one} has {a} red {things} and {b} blue {things}.", red, blue


KINDS: tuple[Kind, ...] = (price, boxes, found, colors)


def is_held_out(kind: str, a: int, b: int) -> bool:
    """True if a kind's problems with these numbers are kept for the test: by a hash, whatever the seed."""
    digest = hashlib.sha256(f"{SALT} {kind} {a} {b}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def make_problems(rng: random.Random, size: int, held_out: bool) -> list[dict[str, str]]:
    """
    Make `size` distinct problems, with `problem`, `solution`, `answer` and `kind`.

    The kinds come in turn, and each asks for its first and for its second number by turns.
    """
    problems: dict[str, dict[str, str]] = {}
    while len(problems) < size:
        asked, index = divmod(len(problems), len(KINDS))
        kind = KINDS[index]
        numbers = rng.sample(NUMBERS, 2)
        if is_held_out(kind.__name__, *numbers) == held_out:
            text, *questions = kind(*numbers, rng.choice(NAMES), rng.choice(THINGS))
            question, solution = questions[asked % 2]
            problem = {"problem": f"{text} {question}", "solution": solution, "answer": str(numbers[asked % 2])}
            problems.setdefault(problem["problem"], problem | {"kind": kind.__name__})
    return list(problems.values())


def write_data(output_dir: Path, seed: int = 0) -> None:
    """Write `train.jsonl`, `train_donor.jsonl` (other problems' solutions) and `test.jsonl` (held out)."""
    output_dir.mkdir(parents=True, exist_ok=True)
    train = make_problems(random.Random(seed), TRAIN_SIZE, held_out=False)
    write_jsonl(output_dir / "train.jsonl", train)
    write_jsonl(output_dir / "train_donor.jsonl", shuffle_solutions(train, seed))
    write_jsonl(output_dir / "test.jsonl", make_problems(random.Random(0), TEST_SIZE, held_out=True))
    logger.info("%d training and %d test problems in %s", TRAIN_SIZE, TEST_SIZE, output_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the data files of the word problems.")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the jsonl files")
    parser.add_argument("--seed", type=int, default=0, help="of the training problems; the test problems are fixed")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    write_data(arguments.output_dir, arguments.seed)


if __name__ == "__main__":
    main()
