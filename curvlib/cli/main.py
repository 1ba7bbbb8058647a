"""The entry point: parses, runs one command, and turns errors into one clear line."""

from __future__ import annotations

import argparse
import contextlib
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from curvlib.cli import diagonal, influence, plan, prune, rates, spectrum, trace
from curvlib.cli.processes import complain, end_threads, prints_on_the_first, processes
from curvlib.core.files import curvlib_version

#: Exit codes: what was asked for cannot be done; stopped by Ctrl-C (as shells report it).
BAD_INPUT, INTERRUPTED = 2, 130


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments after the program's name; those of the process when omitted.

    Returns:
        The exit code: 0, 2 for what cannot be done, 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(prog="curvlib", description="Curvature of PyTorch models.")
    parser.add_argument("--version", action="version", version=f"curvlib {curvlib_version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (spectrum, trace, diagonal, prune, rates, influence, plan):
        command.add_parser(commands)
    args = parser.parse_args(argv)
    try:
        return _run(args, argv)
    finally:
        end_threads()


def _run(args: argparse.Namespace, argv: list[str]) -> int:
    with processes() as group:
        try:
            with _plain_warnings(), prints_on_the_first(group):
                args.run(args, argv)
        except KeyboardInterrupt as interrupt:
            complain(f"stopped: {_line(interrupt) or 'by Ctrl-C'}", group)
            return INTERRUPTED
        except Exception as error:  # noqa: BLE001 (the last frame; --debug shows the whole)
            if args.debug:
                traceback.print_exc()
            complain(f"error: {_describe(error)}", group)
            return BAD_INPUT
    return 0


def _describe(error: BaseException) -> str:
    """One line. Errors that no message of curvlib's explains carry their type."""
    text = _line(error)
    explained = isinstance(error, (ValueError, TypeError, OSError, ImportError)) and " " in text
    return text if explained else f"{type(error).__name__}: {text}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Shows each warning as one line, without the place in curvlib's source."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"curvlib: warning: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
