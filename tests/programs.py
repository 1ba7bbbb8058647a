"""Programs of Python as processes of their own, without the seconds that importing torch takes.

They are forked from one process that has imported the libraries and done nothing else. All of them
have its hash seed, which is not that of the tests: a run that goes on in the tests' process, or in
one that ``subprocess`` starts, shows whether anything depends on it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).parents[1]
LIMIT = 120.0
_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(
    ["curvlib.cli", "matplotlib.backends.backend_agg", "pytest", "sklearn.datasets"]
)


class Ended(NamedTuple):
    """What a program said, and its exit code: below zero, the signal that ended it."""

    code: int
    output: str
    error: str


class Program:
    """``python *arguments``, running: ``-m module ...``, ``-c code ...`` or ``file ...``.

    Args:
        arguments: Of the command line.
        cwd: The folder in which it runs.
        environment: Variables that are added to those of the tests.
    """

    def __init__(self, *arguments: object, cwd: Path = ROOT, **environment: str) -> None:
        ends = [_FORKED.Pipe(duplex=False) for _ in range(2)]
        self.process = _FORKED.Process(
            target=_run,
            args=([str(a) for a in arguments], str(cwd), environment, *(e[1] for e in ends)),
        )
        with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT)):  # read when the first one starts
            self.process.start()
        self.stdout, self.stderr = (os.fdopen(os.dup(end[0].fileno())) for end in ends)
        for end in (end for pair in ends for end in pair):
            end.close()

    def until(self, seen: Callable[[], bool]) -> None:
        """Waits for something that the program does."""
        end = time.monotonic() + LIMIT
        while not seen():
            assert self.process.exitcode is None, self.finish()
            assert time.monotonic() < end, "it was waited for in vain"
            time.sleep(0.002)

    def stop(self, how: signal.Signals) -> Ended:
        """Sends a signal and waits for the end."""
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError):  # it has ended: its code says how
            os.kill(self.process.pid, how)
        return self.finish()

    def finish(self) -> Ended:
        """Waits for the end; what it says has to fit the pipes, 64 KiB each."""
        self.process.join(LIMIT)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
        with self.stdout, self.stderr:
            said = self.stdout.read(), self.stderr.read()
        assert code is not None, f"it did not end within {LIMIT:.0f} s: {said}"
        self.process.close()
        return Ended(code, *said)


def _run(
    arguments: list[str],
    cwd: str,
    environment: dict[str, str],
    stdout: Connection,
    stderr: Connection,
) -> None:
    import torch

    for number, end in ((1, stdout), (2, stderr)):
        os.dup2(end.fileno(), number)
        end.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    os.chdir(cwd)
    os.environ.update(environment)
    sys.path.insert(0, cwd)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "program", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")
