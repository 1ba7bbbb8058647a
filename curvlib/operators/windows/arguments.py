"""What a window is asked for, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from curvlib.core.cupy_arrays import require_cupy
from curvlib.core.ranks.spread import Spread

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def require_size(name: str, value: Any) -> int:
    """A positive integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected an integer for {name}, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"expected a positive {name}, got {value}")
    return value


def require_dtype(dtype: Any) -> torch.dtype:
    """A type that rows can be stored in."""
    if dtype == torch.float16:
        raise TypeError(
            "a window cannot hold float16 rows: gradients overflow it (largest number 65504) and "
            "its 5 bits of exponent lose the small ones; use dtype=torch.bfloat16, which takes "
            "the same memory, or torch.float32"
        )
    if dtype not in _DTYPES:
        raise TypeError(f"a window holds float32, float64 or bfloat16 rows, got {dtype}")
    known: torch.dtype = dtype
    return known


def require_storage(storage: Any) -> str | None:
    """Where rows are kept."""
    if storage not in (None, "cpu"):
        raise ValueError(
            f"storage= is 'cpu' (rows in host memory) or None (on the device), got {storage!r}"
        )
    return None if storage is None else "cpu"


def require_fused(
    fused: Any, dtype: torch.dtype, device: torch.device, storage: str | None
) -> bool | None:
    """Whether passes are kernels; where they must be, that they can be."""
    if fused is not None and not isinstance(fused, bool):
        raise TypeError(f"fused= is True, False or None (where it can be), got {fused!r}")
    if fused:
        if device.type != "cuda" or storage == "cpu" or dtype == torch.float64:
            where = "rows in host memory" if storage == "cpu" else f"{dtype} rows on {device}"
            raise ValueError(
                "fused=True is for float32 or bfloat16 rows on a CUDA device, got "
                f"{where.removeprefix('torch.')}; leave it out, and torch's passes are taken"
            )
        require_cupy()
    known: bool | None = fused
    return known


def require_one_part(length: int, parts: Sequence[int] | None, spread: Spread | None) -> None:
    """Refuses parts, and another length, of rows that are spread over processes."""
    if spread is not None and (parts is not None or length != spread.length):
        raise ValueError(
            "a window whose rows are spread over processes has one part, of this process's "
            f"{spread.length} entries, got length={length}, parts={parts!r} (a sharding that "
            "curvlib cannot follow)"
        )


def part_lengths(parts: Sequence[int] | None, length: int) -> tuple[int, ...]:
    """Lengths of contiguous parts that make up rows."""
    if parts is None:
        return (length,)
    lengths = tuple(require_size("a length in parts=", part) for part in parts)
    if sum(lengths) != length:
        raise ValueError(
            f"parts= are lengths of contiguous slices that make up a row of length {length}, but "
            f"the {len(lengths)} given add up to {sum(lengths)}"
        )
    return lengths


def require_memory(
    length: int,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    available: int | None,
    parts: int = 1,
) -> None:
    """Refuses a window that does not fit, and says what would."""
    grams = 8 * parts * size * size
    needed = size * length * dtype.itemsize + grams
    if available is None or needed <= available:
        return
    ways = []
    rows = _largest(length, dtype.itemsize, available, parts)
    if rows >= 1:
        ways.append(f"size={rows}")
    halved = needed - size * length * (dtype.itemsize - 2)
    if dtype.itemsize > 2 and halved <= available:
        ways.append("dtype=torch.bfloat16")
    elif dtype.itemsize > 2 and (fewer := _largest(length, 2, available, parts)) > rows:
        ways.append(f"dtype=torch.bfloat16 with size={fewer}")
    if device.type != "cpu":
        ways.append("storage='cpu', which keeps the rows in host memory")
    ways = ways or ["a part of the parameters (params= of the risk)"]
    raise MemoryError(
        f"a window of {size} rows of length {length} in {str(dtype).removeprefix('torch.')} needs "
        f"{_readable(needed)}, but {device} has {_readable(available)}; what would fit: "
        f"{', or '.join(ways)}"
    )


def _largest(length: int, itemsize: int, available: int, parts: int) -> int:
    """The largest number of rows that fits in 90 % of what there is."""
    row, gram, budget = length * itemsize, 8 * parts, 0.9 * available
    # the root of gram m^2 + row m = budget
    return int(2 * budget / (row + (row * row + 4 * gram * budget) ** 0.5))


def as_rows(rows: Any, length: int, device: torch.device) -> Tensor:
    """Rows ``[k, P]`` of a floating-point type, from a row or rows."""
    if not isinstance(rows, Tensor):
        raise TypeError(f"expected a row as a torch.Tensor, got {type(rows).__name__}")
    if not rows.dtype.is_floating_point:
        raise TypeError(f"expected rows of a floating-point type, got {rows.dtype}")
    if rows.ndim not in (1, 2) or rows.shape[-1] != length:
        raise ValueError(
            f"expected a row [{length}] or rows [k, {length}], got shape {list(rows.shape)}"
        )
    if rows.device != device:
        raise ValueError(
            f"expected rows on {device}, got {rows.device}; use row.to({str(device)!r})"
        )
    out: Tensor = rows.detach()
    return out[None] if out.ndim == 1 else out


def finite_rows(
    stored: Tensor, *, skip: bool, source: Tensor, spread: Spread | None = None
) -> Tensor:
    """Rows that are finite."""
    quick = torch.isfinite(stored.sum(1))  # the fastest pass; it may overflow in vain
    if spread is not None:  # all ranks decide alike
        quick = spread.sum(1.0 - quick.double()) == 0
    if bool(quick.all()):
        return stored
    finite: list[bool] = torch.isfinite(
        torch.linalg.vector_norm(stored, float("inf"), dim=1)
    ).tolist()
    if spread is not None:
        finite = (spread.sum(torch.tensor([float(not f) for f in finite])) == 0).tolist()
    if all(finite):
        return stored
    if not skip:
        i = finite.index(False)
        bad = int((~torch.isfinite(stored[i])).sum())
        given = int((~torch.isfinite(source[i])).sum())
        why = "" if given else f" once stored as {stored.dtype}"
        if spread is not None:
            why += " (here; perhaps on another rank)"
        which = "the row" if len(stored) == 1 else f"row {i} of {len(stored)}"
        raise FloatingPointError(
            f"{bad} of {stored.shape[1]} entries of {which} are NaN or infinite{why}; nothing was "
            "pushed: look for the cause, or pass skip_non_finite=True to leave such rows out"
        )
    return stored[[i for i, good in enumerate(finite) if good]]


def _readable(size: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"
