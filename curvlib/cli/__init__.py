"""The command line: ``curvlib spectrum ...``."""

from curvlib.cli.main import main

__all__ = ["main"]
