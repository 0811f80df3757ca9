"""
Run a program and then its tests, within limits: the process of the verifier `python_tests`.

    python -I run_python.py CPU_SECONDS CLOCK_SECONDS < JSON of [program, tests]

writes `started`, and `, passed` if both come to their end. It is a guard against accidents, not against attackers:
what goes round Python's audit events, such as `ctypes` or an extension, is held by the limits of the kernel alone.
"""

import ctypes
import json
import math
import os
import resource
import signal
import socket
import sys
import types
from typing import Any

ADDRESS_SPACE = 2 * 2**30  # bytes
FILE_SIZE = 16 * 2**20  # bytes of each file
OPEN_FILES = 64
NEW_USER_AND_NETWORK = 0x10000000 | 0x40000000  # CLONE_NEWUSER | CLONE_NEWNET
PROCESSES = ("os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.exec", "os.system", "subprocess.Popen")
SIGNALS = ("os.kill", "os.killpg", "signal.pthread_kill")
# Event -> places of the paths among its arguments
CHANGES = {"os.remove": (0,), "os.rmdir": (0,), "os.mkdir": (0,), "os.rename": (0, 1), "os.truncate": (0,)}
CHANGES |= {"os.link": (1,), "os.symlink": (1,), "os.chmod": (0,), "os.chown": (0,), "os.utime": (0,)}
CHANGES |= {"shutil.rmtree": (0,), "shutil.move": (0, 1), "shutil.copyfile": (1,), "shutil.chown": (0,)}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def limit(cpu_seconds: float, clock_seconds: float) -> None:
    """Limit what the kernel counts, and leave the network where that is allowed."""
    for kind, value in (
        (resource.RLIMIT_CPU, math.ceil(cpu_seconds)), (resource.RLIMIT_AS, ADDRESS_SPACE),
        (resource.RLIMIT_FSIZE, FILE_SIZE), (resource.RLIMIT_NOFILE, OPEN_FILES), (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        most = resource.getrlimit(kind)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(kind, (value, value))
    signal.setitimer(signal.ITIMER_REAL, clock_seconds)  # its signal ends the process, also where the parent is gone
    ctypes.CDLL(None).unshare(NEW_USER_AND_NETWORK)  # for a network without devices; where it fails, `refuse` remains


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: raise `PermissionError` for other processes, networks, and changes of files outside the folder."""
    if event in PROCESSES or event in SIGNALS:
        raise PermissionError(f"{event}: there is one process")
    if event == "socket.__new__" and arguments[1] != socket.AF_UNIX or event == "socket.getaddrinfo":
        raise PermissionError(f"{event}: there is no network")
    if event == "open":
        path, mode, flags = arguments
        writes = any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool((flags or 0) & WRITING)
        paths = [path] if writes else []
    else:
        paths = [arguments[place] for place in CHANGES.get(event, ())]
    for path in paths:
        if isinstance(path, (str, bytes, os.PathLike)):
            place = os.path.realpath(os.fsdecode(path))
            if place != os.devnull and os.path.commonpath([place, FOLDER]) != FOLDER:
                raise PermissionError(f"{event}: {place} is outside the folder of the tests")


def main() -> None:
    """Read a program and its tests, run both in one module, and say so if neither fails."""
    program, tests = json.load(sys.stdin)  # after it, standard input is at its end
    limit(*map(float, sys.argv[1:]))
    os.write(1, b"started")
    answer, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    module = types.ModuleType("program")
    sys.modules["program"] = module
    sys.argv = ["program"]
    sys.addaudithook(refuse)
    exec(compile(program, "program", "exec"), module.__dict__)
    exec(compile(tests, "tests", "exec"), module.__dict__)
    os.write(answer, b", passed")
    os._exit(0)  # without waiting for threads


FOLDER = os.path.realpath(os.getcwd())

if __name__ == "__main__":
    main()
