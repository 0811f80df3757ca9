"""Worker processes that grade, with limits on time and memory."""

import contextlib
import logging
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import NamedTuple

from opsd.grading.compare import GRADERS, MAX_DIGITS, Verdict, compare_texts, grade
from opsd.grading.extract import Answer, answer_text
from opsd.grading.verifiers import BUILT_IN, RIGHT, Row, judge, last_line

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 600  # enough for a worker's imports on any machine
STANDSTILL = 20  # a worker whose answer takes so many times its limit without using a processor is ended, too


class _Task(NamedTuple):
    """What a worker is asked."""

    prediction: str | None
    gold: str | None
    answer_type: str | None
    verifier: str
    row: Row


class _Worker:
    """A process that grades one answer at a time. It starts when first asked, and anew after each that ended it."""

    def __init__(self, timeout: float, memory_limit_gib: float, grader: str):
        self.timeout = timeout
        self.settings = f"{grader!r}, {timeout}, {memory_limit_gib}, {os.getcwd()!r}"
        self.running: tuple[subprocess.Popen[bytes], Connection] | None = None

    def grade(self, task: _Task) -> tuple[Verdict, str]:
        """Return the verdict, and of a verifier that could not judge what happened."""
        if self.running is not None and self.running[0].poll() is not None:
            self.stop()
        process, connection = self.running or self._start()
        start, status = time.perf_counter(), "timeout"
        try:
            connection.send(task)
            if connection.poll(STANDSTILL * self.timeout):
                return connection.recv()
        except (EOFError, ConnectionError):  # the process has ended
            if process.wait() != -signal.SIGPROF:
                status = "crashed"
        self.stop()
        seconds = min(self.timeout, time.perf_counter() - start)
        if task.verifier == "math":
            return Verdict(False, status, seconds), ""
        return Verdict(None, status, seconds), f"its process ended by {status}"

    def _start(self) -> tuple[subprocess.Popen[bytes], Connection]:
        connection, other_end = Pipe()
        program = f"from {__name__} import work; work({other_end.fileno()}, {self.settings})"
        with other_end:
            command = [sys.executable, "-c", program]  # what a library prints there goes to stderr
            process = subprocess.Popen(command, stdout=2, cwd=ROOT, pass_fds=[other_end.fileno()])
        self.running = process, connection
        with contextlib.suppress(EOFError, ConnectionError):
            if connection.poll(START_SECONDS) and connection.recv():
                return self.running
        self.stop()
        raise RuntimeError(f"the grading worker does not start: {sys.executable} -c '{program}'")

    def stop(self) -> None:
        if self.running is not None:
            with self.running[0] as process, self.running[1]:  # waits for its end, and closes the connection
                process.kill()
            self.running = None


class GradingPool(contextlib.AbstractContextManager):
    """
    Worker processes that grade answers, as mathematics or by another verifier (see `verifiers.py`). A worker that
    exceeds its limits is killed and replaced.

    A worker is a program of its own, without torch, vLLM and the caller's main program. So it is safe beside an
    engine, from any thread, and with several pools at a time. Workers start when the text alone does not decide, and
    end with the pool or its process. The kernel limits processor time, so that a verdict does not depend on the load.

    Args:
        workers: how many at most; `None`: one for each CPU core, up to 8.
        timeout: seconds of processor time for each answer, after which its status is `timeout`.
        memory_limit_gib: address space of a worker.
    """

    def __init__(
        self, workers: int | None = None, timeout: float = 10.0, memory_limit_gib: float = 2.0, grader: str = "strict"
    ):
        workers = min(os.cpu_count() or 1, 8) if workers is None else workers
        for name, value in (("workers", workers), ("timeout", timeout), ("memory_limit_gib", memory_limit_gib)):
            if not value > 0:
                raise ValueError(f"{name} {value}: must be more than 0")
        if grader not in GRADERS:
            raise ValueError(f"grader {grader!r}: must be one of {', '.join(GRADERS)}")
        self.grader = grader
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()  # so that no more start than are needed
        for _ in range(workers):
            self._idle.put(_Worker(timeout, memory_limit_gib, grader))
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="grading")
        self._reported: set[tuple[str, str]] = set()  # verifier, and first word of what happened to it
        self._reporting = threading.Lock()

    def submit(
        self,
        prediction: Answer,
        gold: Answer,
        answer_type: str | None = None,
        verifier: str = "math",
        row: Row | None = None,
    ) -> "Future[Verdict]":
        """
        Grade in the background; arguments and errors as of `grade`.

        The future's result is a verdict, whatever happens to the worker, or a `RuntimeError` if none can be started.
        A verifier other than "math" that fails, or exceeds the limits, gives the verdict `None` and a warning, once
        for each kind of failure.

        Args:
            verifier: whose judgement is asked, of what its `extract` returns.
            row: texts of the data, for a verifier other than "math".
        """
        start = time.thread_time()
        text = prediction if isinstance(prediction, str) and verifier != "math" else answer_text(prediction)
        gold = answer_text(gold)
        decided: tuple[bool | None, str] | None = None
        if verifier != "math" and (text is None or gold is None):
            decided = False, "no_gold" if gold is None else "no_answer"
        elif verifier == "math" and self.grader == "strict":
            decided = compare_texts(text, gold, answer_type)
        if decided is None:
            return self._threads.submit(self._grade, _Task(text, gold, answer_type, verifier, row or {}))
        future: Future[Verdict] = Future()
        future.set_result(Verdict(*decided, time.thread_time() - start))
        return future

    def _grade(self, task: _Task) -> Verdict:
        worker = self._idle.get()
        try:
            verdict, failure = worker.grade(task)
        finally:
            self._idle.put(worker)
        if failure:
            self._report(task.verifier, failure)
        return verdict

    def _report(self, verifier: str, failure: str) -> None:
        kind = verifier, failure.split(" ")[0] if ":" in failure else failure
        with self._reporting:
            is_new = kind not in self._reported
            self._reported.add(kind)
        if is_new:
            logger.warning(
                "--verifier %s could not judge a completion: %s. Such completions count as not graded, which the "
                "reward of GRPO takes for 0; they are not reported again", verifier, failure,
            )  # fmt: skip

    def grade_all(self, answers: Iterable[tuple[Answer, Answer] | tuple[Answer, Answer, str | None]]) -> list[Verdict]:
        """Return the verdicts on (prediction, gold) or (prediction, gold, answer_type), in their order."""
        return [future.result() for future in [self.submit(*answer) for answer in answers]]

    def close(self) -> None:
        """End the workers after what they are grading. What still waits in the queue is cancelled."""
        self._threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().stop()

    def __exit__(self, *exception: object) -> None:
        self.close()


def work(descriptor: int, grader: str, timeout: float, memory_limit_gib: float, directory: str) -> None:
    """
    Answer each task that comes over the connection `descriptor` with its verdict, and with what a verifier raised.

    A verifier of the user's is imported from `directory`, and works in it.
    """
    connection: Connection = Connection(descriptor)
    connection.send("ready")
    resource.setrlimit(resource.RLIMIT_AS, (int(memory_limit_gib * 2**30),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.set_int_max_str_digits(MAX_DIGITS)
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of the time limit that this process has
    with contextlib.suppress(EOFError):  # the parent has ended
        while True:
            task, failure = connection.recv(), ""
            # The signal ends the process, even within C code or if its parent was killed.
            signal.setitimer(signal.ITIMER_PROF, timeout)
            start = time.thread_time()
            try:
                if task.verifier == "math":
                    verdict = grade(task.prediction, task.gold, grader=grader, answer_type=task.answer_type)
                else:
                    verdict, failure = _verify(task, directory)
            except (MemoryError, SystemError):
                verdict = Verdict(False, "memory", time.thread_time() - start)
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send((verdict, failure))


def _verify(task: _Task, directory: str) -> tuple[Verdict, str]:
    """Return the verdict of a verifier other than "math", and the last line of what it raised."""
    start = time.thread_time()
    try:
        if task.verifier not in BUILT_IN:
            os.chdir(directory)
        score = judge(task.verifier, str(task.prediction), str(task.gold), task.row)
    except (Exception, SystemExit) as error:
        return Verdict(None, "error", time.thread_time() - start), last_line(error)
    is_right = None if score is None else score >= RIGHT
    return Verdict(is_right, "verifier", time.thread_time() - start, score), ""
