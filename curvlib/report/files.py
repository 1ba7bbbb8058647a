"""What reports leave in a folder: numbers as JSON, and the command that made them."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from pathlib import Path
from typing import Any

from curvlib.core.files import atomic_write, curvlib_version


def write_numbers(path: Path, document: dict[str, Any], command: str) -> Path:
    """Writes numbers, the command and the versions as JSON; the file appears whole or not at all.

    Raises:
        OSError: If the file cannot be written.
    """
    full = {**document, "command": command, "versions": versions()}
    with atomic_write(path) as temporary:
        text = json.dumps(full, indent=2, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def write_command(folder: Path, command: str) -> Path:
    """Writes ``command.txt``: versions as a comment, and the command.

    Raises:
        OSError: If the file cannot be written.
    """
    path = folder / "command.txt"
    comment = ", ".join(f"{name} {version}" for name, version in versions().items())
    with atomic_write(path) as temporary:
        temporary.write_text(f"# {comment}\n{command}\n", encoding="utf-8")
    return path


def number(value: Any) -> float | None:
    """A number that JSON has; ``None`` for those that are not finite."""
    plain = float(value)
    return plain if math.isfinite(plain) else None


def versions() -> dict[str, str]:
    """Versions of curvlib, Python and what the numbers depend on."""
    packages = {p: importlib.metadata.version(p) for p in ("torch", "numpy")}
    return {"curvlib": curvlib_version(), "Python": platform.python_version(), **packages}
