"""The command line: ``curvlib spectrum | trace | diagonal ...``."""

from curvlib.cli.main import main

__all__ = ["main"]
