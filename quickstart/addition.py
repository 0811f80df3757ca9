"""
The quickstart's task: three-digit addition worked in words, with a fixed held-out set, written as local data files.

    python quickstart/addition.py --output_dir outputs/quickstart/data --seed 0
"""

import argparse
import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

COLUMNS = ("ones", "tens", "hundreds")
HELD_OUT_ONE_IN = 64  # pairs of operands
TEST_SIZE = 256
TRAIN_SIZE = 4096
MAX_SIZE = 10_000  # there are about 12,600 held-out pairs


def is_held_out(a: int, b: int) -> bool:
    """Whether `a+b` and `b+a` are kept for the test: decided by a hash of the operands, whatever the seed."""
    digest = hashlib.sha256(f"{min(a, b)}+{max(a, b)}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def draw_operands(rng: random.Random, held_out: bool = False) -> tuple[int, int]:
    """Draw two uniform three-digit operands from the held-out pairs or, by default, from all the others."""
    while True:
        a, b = rng.randint(100, 999), rng.randint(100, 999)
        if is_held_out(a, b) == held_out:
            return a, b


def digit_pairs(a: int, b: int) -> list[tuple[int, int]]:
    """Digits of two three-digit numbers, column by column from the ones to the hundreds."""
    return [(a // 10**place % 10, b // 10**place % 10) for place in range(len(COLUMNS))]


def column_totals(a: int, b: int, keep_carry: Callable[[int], bool] = lambda digit_sum: True) -> list[int]:
    """
    Totals of the columns, incoming carries included, from the ones to the hundreds.

    Args:
        a, b: three-digit operands.
        keep_carry: asked with the sum of a column's two digits wherever a carry comes in; `False` drops that carry.
            What is dropped propagates: the next column has a carry only if this column's total, as written, overflows.
    """
    totals, carry = [], False
    for digit_a, digit_b in digit_pairs(a, b):
        total = digit_a + digit_b
        total += carry and keep_carry(total)
        totals.append(total)
        carry = total >= 10
    return totals


def final_answer(totals: Sequence[int]) -> str:
    """The number that column totals spell: the last digits of ones and tens behind the whole of the hundreds."""
    ones, tens, hundreds = totals
    return f"{hundreds}{tens % 10}{ones % 10}"


def problem_text(a: int, b: int) -> str:
    """The problem as both roles see it."""
    return f"{a}+{b}"


def response_text(a: int, b: int, totals: Sequence[int]) -> str:
    r"""The model's own style: `ones: 8+7 gives 15. tens: 5+4 gives 10. hundreds: 3+6 gives 10. So \boxed{1005}`."""
    columns = zip(COLUMNS, digit_pairs(a, b), totals, strict=True)
    steps = [f"{column}: {digit_a}+{digit_b} gives {total}. " for column, (digit_a, digit_b), total in columns]
    return "".join(steps) + rf"So \boxed{{{final_answer(totals)}}}"


def reference_text(totals: Sequence[int]) -> str:
    r"""The terse style of the reference solutions: `We get ones 15, tens 10, hundreds 10, hence \boxed{1005}.`"""
    steps = ", ".join(f"{column} {total}" for column, total in zip(COLUMNS, totals, strict=True))
    return rf"We get {steps}, hence \boxed{{{final_answer(totals)}}}."


def thinking_text(a: int, b: int, totals: Sequence[int]) -> str:
    """A response in thinking mode: the totals as a terse thought, and then the model's own style."""
    return f"<think>\n{reference_text(totals)}\n</think>\n\n{response_text(a, b, totals)}"


def make_problems(rng: random.Random, size: int, held_out: bool) -> list[dict[str, str]]:
    """
    `size` different problems with correct reference solutions: dicts with `problem`, `solution` and `answer`.

    Raises:
        ValueError: if `size` is not in 1..10000.
    """
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"the number of problems must be in 1..{MAX_SIZE}, not {size}")
    operands: dict[tuple[int, int], None] = {}  # a set that keeps its order
    while len(operands) < size:
        operands[draw_operands(rng, held_out)] = None
    return [
        {"problem": problem_text(a, b), "solution": reference_text(column_totals(a, b)), "answer": str(a + b)}
        for a, b in operands
    ]


def training_problems(seed: int, size: int = TRAIN_SIZE) -> list[dict[str, str]]:
    """Training problems, none of them held out."""
    return make_problems(random.Random(seed), size, held_out=False)


def held_out_problems(size: int = TEST_SIZE) -> list[dict[str, str]]:
    """The held-out problems: the same for every seed; a smaller `size` gives the first ones."""
    return make_problems(random.Random(0), size, held_out=True)


def shuffle_solutions(examples: Sequence[dict[str, str]], seed: int) -> list[dict[str, str]]:
    """
    Give each problem the solution of another one, as a control; problems and answers stay as they are.

    Raises:
        ValueError: if in 1000 permutations some problem always gets a solution that reads like its own.
    """
    rng = random.Random(seed)
    solutions = [example["solution"] for example in examples]
    for _ in range(1000):
        shuffled = rng.sample(solutions, len(solutions))
        # A permutation hits about one own solution and one that reads the same by chance: a few attempts do.
        if all(old != new for old, new in zip(solutions, shuffled, strict=True)):
            return [{**example, "solution": new} for example, new in zip(examples, shuffled, strict=True)]
    raise ValueError(f"the solutions of these {len(examples)} examples cannot be shuffled: too many read the same")


def write_jsonl(path: Path, examples: Iterable[dict[str, str]]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")


def write_data(output_dir: Path, seed: int, train_size: int = TRAIN_SIZE, test_size: int = TEST_SIZE) -> None:
    """
    Write `train.jsonl`, `train_shuffled.jsonl` (other problems' solutions), `train_answers.jsonl` (no solutions) and
    `test.jsonl` (held out).
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    train = training_problems(seed, train_size)
    write_jsonl(output_dir / "train.jsonl", train)
    write_jsonl(output_dir / "train_shuffled.jsonl", shuffle_solutions(train, seed))
    answers = [{"problem": example["problem"], "answer": example["answer"]} for example in train]
    write_jsonl(output_dir / "train_answers.jsonl", answers)
    write_jsonl(output_dir / "test.jsonl", held_out_problems(test_size))
    logger.info("%d training and %d test problems in %s", train_size, test_size, output_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the data files of the addition task.")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the jsonl files")
    parser.add_argument("--seed", type=int, default=0, help="of the training problems; the test problems are fixed")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    write_data(arguments.output_dir, arguments.seed)


if __name__ == "__main__":
    main()
