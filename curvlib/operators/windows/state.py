"""What windows are saved as, and made from again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from curvlib.core.files import read_record, write_record
from curvlib.core.ranks.spread import Spread


def settings(length: int, size: int, dtype: torch.dtype, parts: tuple[int, ...]) -> dict[str, Any]:
    """What a window was made with, as plain values."""
    name = str(dtype).removeprefix("torch.")
    return {"length": length, "size": size, "dtype": name, "parts": list(parts)}


def require_alike(mine: dict[str, Any], state: dict[str, Any], more: Sequence[str] = ()) -> None:
    """That rows of a state fit a window with these settings; its size may differ.

    Args:
        mine: Settings of the window.
        state: The state, which holds its own.
        more: Names of settings to compare besides the common ones.

    Raises:
        ValueError: If they do not.
    """
    for key in ("length", "dtype", "parts", *more):
        if state.get(key) != mine[key]:
            raise ValueError(
                f"the state has {key}={state.get(key)!r}, this window has {mine[key]!r}; make the "
                "window with the arguments of the one that was saved"
            )


def write(path: str | os.PathLike[str], state: dict[str, Any], spread: Spread | None) -> Path:
    """Writes a state to one file, which appears whole or not at all.

    Raises:
        ValueError: If its rows are spread over processes.
    """
    if spread is not None:
        raise ValueError(
            "one file holds whole rows, and those of this window are spread over "
            f"{spread.group.size} processes (a sharding that curvlib cannot follow here); "
            "save each process's state_dict() to a file of its own"
        )
    write_record(path, "Window", state)
    return Path(path)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A state from a file, and the arguments of a window that can take it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or holds no window.
    """
    kind, state = read_record(path)
    if kind != "Window":
        raise ValueError(f"{str(path)!r} holds a {kind}, expected a Window")
    arguments = {key: state[key] for key in ("length", "size", "parts")}
    return state, arguments | {"dtype": getattr(torch, state["dtype"])}
