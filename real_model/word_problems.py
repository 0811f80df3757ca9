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
TRAIN_SIZE = 1024
TEST_SIZE = 128


def price(a: int, b: int, one: str, things: str) -> tuple[str, str, int]:
    problem = f"{one} buys {a} {things} for {b} dollars each. How many {things} does {one} buy?"
    return problem, f"{one} buys {a} {things}.", a


def boxes(a: int, b: int, one: str, things: str) -> tuple[str, str, int]:
    problem = f"{one} has {a} boxes with {b} {things} in each. How many {things} are in one box?"
    return problem, f"There are {b} {things} in one box.", b


def at_first(a: int, b: int, one: str, things: str) -> tuple[str, str, int]:
    problem = f"{one} had {a} {things} and found {b} more. How many {things} did {one} have at first?"
    return problem, f"{one} had {a} {things} at first.", a


def colors(a: int, b: int, one: str, things: str) -> tuple[str, str, int]:
    problem = f"{one} has {a} red {things} and {b} blue {things}. How many blue {things} does {one} have?"
    return problem, f"{one} has {b} blue {things}.", b


# a kind makes problem, solution and answer from two numbers, a name and a thing
KINDS: tuple[Callable[[int, int, str, str], tuple[str, str, int]], ...] = (price, boxes, at_first, colors)


def is_held_out(kind: str, a: int, b: int) -> bool:
    """True if a kind's problems with these numbers are kept for the test: by a hash, whatever the seed."""
    digest = hashlib.sha256(f"{kind} {a} {b}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def make_problems(rng: random.Random, size: int, held_out: bool) -> list[dict[str, str]]:
    """Make `size` distinct problems, the kinds in turn, with `problem`, `solution`, `answer` and `kind`."""
    problems: dict[str, dict[str, str]] = {}
    while len(problems) < size:
        kind = KINDS[len(problems) % len(KINDS)]
        a, b = rng.sample(NUMBERS, 2)
        if is_held_out(kind.__name__, a, b) == held_out:
            problem, solution, answer = kind(a, b, rng.choice(NAMES), rng.choice(THINGS))
            problems.setdefault(
                problem, {"problem": problem, "solution": solution, "answer": str(answer), "kind": kind.__name__}
            )
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
