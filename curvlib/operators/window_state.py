"""What windows are saved as, and made from again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvlib.core.files import read_record, write_record


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


def places(order: Sequence[int], size: int) -> tuple[list[int], list[int]]:
    """Which places of a saved window are taken over, and the order of rows in the new places.

    Args:
        order: Places of the saved rows, oldest first; they are 0 ... count - 1.
        size: How many rows there is room for.

    Returns:
        The old place of each new one, and the new places, oldest row first. If all rows fit, new
        places are the old ones.
    """
    if len(order) <= size:
        return list(range(len(order))), list(order)
    return list(order[-size:]), list(range(size))


def copy_rows(
    sources: Sequence[Tensor], kept: Sequence[int], targets: Sequence[Tensor], starts: Sequence[int]
) -> None:
    """Copies rows ``kept`` of blocks of columns to the first rows of other blocks.

    Args:
        sources: Blocks ``[*, n]`` that make up the columns.
        kept: Which rows.
        targets: Blocks ``[*, n]`` that make up the same columns, however cut.
        starts: First column of each of them.
    """
    first = 0
    for source in sources:
        last = first + source.shape[1]
        for target, start in zip(targets, starts, strict=True):
            low, high = max(first, start), min(last, start + target.shape[1])
            if low >= high:
                continue
            for new, old in enumerate(kept):
                target[new, low - start : high - start] = source[old, low - first : high - first]
        first = last


def write(path: str | os.PathLike[str], state: dict[str, Any]) -> Path:
    """Writes a state to one file, which appears whole or not at all."""
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
