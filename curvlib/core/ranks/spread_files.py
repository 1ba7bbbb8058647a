r"""Checkpoints of runs whose vectors are spread over processes: a file of rows for each process.

Beside the checkpoint ``path``, which the first process writes and which holds all that is small,
process :math:`r` of :math:`R` writes ``path.TAG-rofR`` with its rows: :math:`s m P / R` bytes for
:math:`m` vectors, and nothing is sent. The checkpoint names the files and says how parameters were
cut, so that any number of processes can go on from it, each reading the rows that it needs: one
parameter's rows of one file at a time. Files lie in a folder that all processes see. New files have
new names, and old ones are removed once the checkpoint names the new ones, so that a process that
is killed at any moment leaves a checkpoint that is whole.

When a step fails, processes cannot agree on anything. Each then writes its rows, and the first one
a checkpoint of another name, ``path.stopped``, which takes the place of the other once a run finds
that all of its files are there.
"""

from __future__ import annotations

import dataclasses
import glob
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvlib.core.files import atomic_write, read_record
from curvlib.core.ranks.slices import Slices
from curvlib.core.ranks.spread import Spread

#: Name of the fields, of a state's class, whose tensors are rows: their last axis is a vector's.
FIELDS = "SPREAD"

_DTYPES = {"F32": torch.float32, "F64": torch.float64}


def taken_apart(state: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A state's small values by field, and its rows by name, ``"field"`` or ``"field/key"``."""
    small: dict[str, Any] = {}
    rows: dict[str, Tensor] = {}
    for field in dataclasses.fields(state):
        value = getattr(state, field.name)
        if field.name in getattr(type(state), FIELDS, ()):
            if isinstance(value, dict):  # of rows [K, P] and of numbers [K]
                found = {k: v for k, v in value.items() if getattr(v, "ndim", 0) == 2}
                rows |= {f"{field.name}/{key}": v for key, v in found.items()}
                value = {k: v for k, v in value.items() if k not in found}
            elif isinstance(value, tuple):  # of rows alone
                rows |= {f"{field.name}/{at}": v for at, v in enumerate(value)}
                value = ()
            elif value is not None:
                rows[field.name], value = value, None
        small[field.name] = value
    return small, rows


def put_together(small: dict[str, Any], rows: dict[str, Tensor]) -> dict[str, Any]:
    """The converse of :func:`taken_apart`, as fields."""
    out = dict(small)
    for name in sorted(rows, key=lambda name: (len(name), name)):  # blocks 2 and 10 of a tuple
        (field, _, key), tensor = name.partition("/"), rows[name]
        if key and isinstance(out[field], tuple):
            out[field] = (*out[field], tensor)
        elif key:
            out[field] = {**out[field], key: tensor}
        else:
            out[field] = tensor
    return out


def write_rows(path: Path, rows: dict[str, Tensor], spread: Spread) -> dict[str, Any]:
    """Writes this process's rows to a file of its own; what the checkpoint says of all files.

    Raises:
        OSError: If the file cannot be written.
    """
    with spread.group.together("saving its rows"):
        tag = new_tag()
    tag = spread.group.texts(tag)[0]
    with spread.group.together("saving its rows"):
        return write_own(path, rows, spread, tag)


def new_tag() -> str:
    """What tells the files of one save from those of others."""
    return f"{int(time.time() * 1e3):x}"


def write_own(path: Path, rows: dict[str, Tensor], spread: Spread, tag: str) -> dict[str, Any]:
    """The same by a process alone, for a tag that all know.

    Raises:
        OSError: If the file cannot be written.
    """
    from safetensors.torch import save_file

    rank, size = spread.group.rank, spread.group.size
    names = [f"{path.name}.{tag}-{each}of{size}" for each in range(size)]
    with atomic_write(path.with_name(names[rank])) as file:
        save_file(_stored(rows), file)
    return {"files": names, "slices": [[list(s.shape), s.dim] for s in spread.slices]}


def stopped(path: Path) -> Path:
    """Where the checkpoint of a run is written that a failure has stopped."""
    return path.with_name(f"{path.name}.stopped")


def promote(path: Path) -> None:
    """Puts the checkpoint of a failed run in its place if all processes have written their rows."""
    found = stopped(path)
    if not found.is_file():
        return
    try:
        files = read_record(found)[1]["rows"]["files"]
        whole = all(path.with_name(name).is_file() for name in files)
    except (ValueError, KeyError, TypeError):
        whole = False
    if whole:
        os.replace(found, path)
    else:
        found.unlink()


def _stored(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, no two of which share memory."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in rows.items():
        stored = tensor.detach().cpu().contiguous()
        place = stored.untyped_storage().data_ptr()
        out[name] = stored.clone() if place in seen else stored
        seen.add(place)
    return out


def remove_others(path: Path, kept: Sequence[str]) -> None:
    """Removes files of rows that no checkpoint names any more."""
    for file in path.parent.glob(f"{glob.escape(path.name)}.*-*of*"):
        if file.name not in kept:
            file.unlink(missing_ok=True)


def read_rows(
    path: Path, layout: dict[str, Any], spread: Spread | None, device: torch.device | str
) -> dict[str, Tensor]:
    """The rows that this process needs (all, where it holds vectors whole) from the files.

    Raises:
        ValueError: If a file is absent or damaged.
    """
    from safetensors import SafetensorError, safe_open

    slices = [Slices(tuple(shape), dim) for shape, dim in layout["slices"]]
    rank, size = (0, 1) if spread is None else (spread.group.rank, spread.group.size)
    length = sum(math.prod(part.local(rank, size)) for part in slices)
    out: dict[str, Tensor] = {}
    count = len(layout["files"])
    try:
        for source, name in enumerate(layout["files"]):
            with safe_open(path.with_name(name), framework="pt", device="cpu") as file:
                for key in file.keys():  # noqa: SIM118 (no mapping)
                    tensor = file.get_slice(key)
                    if key not in out:
                        shape = (*tensor.get_shape()[:-1], length)
                        out[key] = torch.empty(
                            shape, dtype=_DTYPES[tensor.get_dtype()], device=device
                        )
                    _copy(tensor, out[key], slices, (source, count), (rank, size))
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"the checkpoint {str(path)!r} belongs with {count} files of rows, and {name!r} "
            f"beside it is absent or damaged ({error}); all processes have to see one folder. "
            "Delete the checkpoint if it is not needed"
        ) from error
    return out


def _copy(
    source: Any,
    out: Tensor,
    slices: Sequence[Slices],
    theirs: tuple[int, int],
    mine: tuple[int, int],
) -> None:
    """Copies what both processes' slices have in common, one parameter after the other."""
    at = own = 0
    for part in slices:
        shape, own_shape = part.local(*theirs), part.local(*mine)
        first, last = part.bounds(*theirs)
        low, high = part.bounds(*mine)
        start, stop = max(first, low), min(last, high)
        if start < stop:
            where = (slice(None),) * (out.ndim - 1) + (slice(at, at + math.prod(shape)),)
            found = source[where]
            found = found.reshape((*out.shape[:-1], *shape))
            there = out[..., own : own + math.prod(own_shape)].unflatten(-1, own_shape)
            axis = part.dim - len(part.shape)
            there.narrow(axis, start - low, stop - start).copy_(
                found.narrow(axis, start - first, stop - start)
            )
        at += math.prod(shape)
        own += math.prod(own_shape)


def scattered(rows: Tensor, spread: Spread) -> Tensor:
    """This process's rows ``[..., length]`` of whole ones ``[..., P]``."""
    flat = rows.reshape(-1, rows.shape[-1])
    return spread.scatter(flat.mT).mT.reshape(*rows.shape[:-1], spread.length).contiguous()
