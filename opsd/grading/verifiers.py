r"""
The registry of `--verifier`: how completions are judged where the answers are no mathematics.

A verifier is a function of the text of a completion, the answer and the row of the data, all texts. It returns a
number in [0, 1], or `None` if it cannot judge. Rewards take the number as it is. Right is what gets `RIGHT`.
"""

import functools
import hashlib
import importlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from opsd.grading.compare import grade
from opsd.grading.extract import BOX, extract_answer
from opsd.thinking import after_thought

RIGHT = 1.0  # a completion with less is not right: for gates, accuracy and majorities
RUNNER = Path(__file__).with_name("run_python.py")
CLOCK_FACTOR = 3  # seconds on the clock for each second of the processor that `python_tests` may take

Row = Mapping[str, str]


@dataclass(frozen=True)
class Rule:
    """
    How a verifier judges.

    Attributes:
        compare: what was extracted, the answer, the row -> number in [0, 1], or `None`.
        extract: text after the thoughts -> what is judged, or `None` if it holds no answer.
        votes: what is extracted is an answer, which a majority may have in common.
        fault: answer of the data -> what is wrong with it, or `None`.
    """

    compare: Callable[[str, str, Row], float | None]
    extract: Callable[[str], str | None] = str
    votes: bool = False
    fault: Callable[[str], str | None] = lambda answer: None


# Exact match


def _final_text(text: str) -> str | None:
    """Return what the last box holds, without a LaTeX text command around it; without a box the last line."""
    if (box := extract_answer(text)) is not None:
        bare = re.fullmatch(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}", box)
        return box if bare is None else bare[1]
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), None)


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _is_same_text(prediction: str, answer: str, row: Row) -> float:
    return float(_plain(prediction) == _plain(answer))


# Multiple choice

SAID = re.compile(
    r"\b(?i:answer)[\s*]*(?:is\b|:)(?:[\s:*_$(\[]|\\[a-zA-Z]+\{|\\\(|(?i:option|choice|letter)\s)*"
    r"([A-Za-z])(?![\w'\u2019])(.?)"
)
ALONE = re.compile(r"[\s*$(\[]*([A-Za-z])(?:[\s*$)\].:]*|[).:][\s*)]+.*)", re.DOTALL)


def _letter(text: str) -> str | None:
    """
    Return the letter of the last box or the last `answer is X`, whichever stands last, as a capital.

    A box that holds anything but one letter, which may have the text of its choice behind it, gives none.
    """
    found: list[tuple[int, str | None]] = []
    for box in BOX.finditer(text):
        content = re.sub(r"\\[a-zA-Z]+|[{}]|\\(?=[()\[\] ])", " ", box[1] or box[2] or "")
        if content.strip():
            letter = ALONE.fullmatch(content)
            found.append((box.end(), letter[1].upper() if letter else None))
    for said in SAID.finditer(text):
        if said[1].isupper() or not said[2].isspace():  # "the answer is a number" names no choice
            found.append((said.end(), said[1].upper()))
    return max(found, key=lambda place: place[0])[1] if found else None


def _is_same_letter(prediction: str, answer: str, row: Row) -> float:
    return float(prediction == answer.strip().upper())


def _fault_of_letter(answer: str) -> str | None:
    return None if re.fullmatch(r"\s*[A-Za-z]\s*", answer) else "is not the letter of a choice"


# Python

FENCED = re.compile(r"^[ \t]*```([^\n`]*)\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)


def _last_block(text: str) -> str | None:
    """Return the last fenced block that is marked as Python, or where none is, the last without a mark."""
    blocks = [(label.strip().lower(), code) for label, code in FENCED.findall(text)]
    for labels in (("python", "py", "python3"), ("",)):
        if marked := [code for label, code in blocks if label in labels]:
            return textwrap.dedent(marked[-1])
    return None


def _passes_tests(program: str, tests: str, row: Row) -> float:
    """
    Return 1 if `program` and then `tests` run to their end, else 0.

    They run as `run_python.py` in an empty folder, with the time that this process has left for its verdict.
    """
    if (fault := _fault_of_tests(tests)) is not None:
        raise ValueError(f"the answer {fault}")
    seconds = signal.getitimer(signal.ITIMER_PROF)[0] or 10.0
    with TemporaryDirectory(prefix="opsd-tests-") as folder:
        # Without the variables of this process, among which may be keys
        bare = {"HOME": folder, "TMPDIR": folder, "PATH": os.defpath}
        bare |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-I", "-B", str(RUNNER), str(seconds), str(CLOCK_FACTOR * seconds)]
        asked = json.dumps([program, tests]).encode()
        try:
            run = subprocess.run(
                command, input=asked, capture_output=True, cwd=folder, env=bare, timeout=2 * CLOCK_FACTOR * seconds
            )
        except subprocess.TimeoutExpired:
            return 0.0
    if not run.stdout.startswith(b"started"):
        raise RuntimeError(f"the tests are not started: {run.stderr.decode(errors='replace')[-500:]}")
    return float(run.stdout == b"started, passed")


def _fault_of_tests(answer: str) -> str | None:
    try:
        compile(answer, "tests", "exec")
    except (SyntaxError, ValueError) as error:
        return f"is not Python: {error}"
    return None


BUILT_IN = {
    "math": Rule(
        lambda prediction, answer, row: grade(prediction, answer, answer_type=row.get("answer_type")).score,
        extract_answer,
        votes=True,
    ),
    "exact_match": Rule(_is_same_text, _final_text, votes=True),
    "multiple_choice": Rule(_is_same_letter, _letter, votes=True, fault=_fault_of_letter),
    "python_tests": Rule(_passes_tests, _last_block, fault=_fault_of_tests),
}


@functools.cache
def find_rule(name: str) -> Rule:
    """
    Return the rule of a verifier: the name of one of `BUILT_IN`, or MODULE:FUNCTION, found from the working directory.

    Raises:
        ValueError: for what is neither, a module that cannot be imported, and what does not take three arguments.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    module_name, _, function_name = name.partition(":")
    if not (module_name and function_name):
        raise ValueError(f"--verifier {name}: neither one of {', '.join(BUILT_IN)} nor MODULE:FUNCTION")
    folder = os.getcwd()
    sys.path[:0] = [folder]  # for this import, also of what the module itself imports from there
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(f"--verifier {name}: no module {error.name} in {folder}, nor installed") from error
        raise ValueError(f"--verifier {name}: {module_name} is not imported: {last_line(error)}") from error
    finally:
        sys.path.remove(folder)
    if not hasattr(module, function_name):
        raise ValueError(f"--verifier {name}: {module.__file__} has no {function_name}")
    function = getattr(module, function_name)
    try:
        inspect.signature(function).bind("completion", "answer", {})
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--verifier {name}: is not callable with three arguments, the completion's text, the answer and the row "
            f"({error})"
        ) from error
    return Rule(function)


def extract(text: str, verifier: str, thinking: bool = False, method: str = "final") -> str | None:
    """
    Return what a verifier judges of a response; `None` without an answer, or with a thought that does not end.

    Args:
        text, thinking, method: as of `extract_answer`. `method` is for the verifier `math` alone.
    """
    if verifier == "math":
        return extract_answer(text, thinking, method)
    answer = after_thought(text, thinking)
    return None if answer is None else find_rule(verifier).extract(answer)


def judge(verifier: str, prediction: str, answer: str, row: Row) -> float | None:
    """
    Return the number that a verifier gives what was extracted; raises what it raises.

    Raises:
        ValueError: if it returns anything but `None` and a number in [0, 1].
    """
    score = find_rule(verifier).compare(prediction, answer, row)
    if score is None:
        return None
    if not isinstance(score, (bool, int, float)) or not 0 <= score <= 1:
        raise ValueError(f"returned {score!r}, and not a number in [0, 1] or None")
    return float(score)


def check_answers(verifier: str, answers: Iterable[str | None], flag: str = "answer_column") -> None:
    """Raise `ValueError`, naming `flag`, for the first answer that a verifier cannot judge by."""
    fault_of = find_rule(verifier).fault
    for answer in answers:
        if answer is not None and answer.strip() and (fault := fault_of(answer)) is not None:
            raise ValueError(
                f"--{flag}: the answer {answer[:200]!r} {fault}; --verifier {verifier} needs such: change the row, or "
                "name another column or verifier"
            )


def describe_verifier(name: str) -> str:
    """Return the name of a verifier, and the hash of the file that one which is not built in comes from."""
    if name in BUILT_IN:
        return name
    file = inspect.getfile(importlib.import_module(name.partition(":")[0]))
    return f"{name} sha256:{hashlib.sha256(Path(file).read_bytes()).hexdigest()}"


def last_line(error: BaseException) -> str:
    """Return the last line of a traceback, with the place that it comes from."""
    line = traceback.format_exception_only(error)[-1].strip()
    frames = traceback.extract_tb(error.__traceback__)
    return f"{line} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else line
