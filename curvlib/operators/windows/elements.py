r"""Diagonals and elements of M-FAC matrices, column by column of the window.

With ``X = L^{-1} G``, :math:`[F^{-1}]_{pq} = (\delta_{pq} - X_{:p}^\top X_{:q}) / \lambda`. ``X``
is made for one chunk of columns at a time, in float64, where it is summed up; it is kept only if
asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from curvlib.core.memory import available_memory
from curvlib.operators.windows.arguments import require_memory
from curvlib.operators.windows.row_products import converted, lower_product
from curvlib.operators.windows.system import ROUNDING, System
from curvlib.operators.windows.window import Window

F64 = torch.float64


def diagonal(window: Window, system: System, out: Tensor) -> Tensor:
    """The diagonal of ``F``, written into ``out`` ``[P]``."""
    damping = system.damping.tolist()
    for part, start, chunk in _chunks(window):
        out[start : start + chunk.shape[1]] = chunk.square().mean(0) + damping[part]
    return out


def leverages(window: Window, system: System, out: Tensor) -> Tensor:
    """``g_q^T K^{-1} g_q`` of each column, within its bounds, written into ``out`` ``[P]``."""
    for damping, start, mean, found in _leverages(window, system):
        out[start : start + len(mean)] = found.minimum(mean / (damping + mean))
    return out


def inverse_diagonal(window: Window, system: System, out: Tensor) -> Tensor:
    """The diagonal of ``F^{-1}``, within its bounds, written into ``out`` ``[P]``."""
    for damping, start, mean, found in _leverages(window, system):
        inverse = ((1.0 - found) / damping).maximum(1.0 / (damping + mean))
        out[start : start + len(mean)] = inverse.clamp_(max=1.0 / damping)
    return out


def _leverages(window: Window, system: System) -> Iterator[tuple[float, int, Tensor, Tensor]]:
    """Chunk by chunk: damping, first column, mean squares of columns, squares of ``X``."""
    damping, at, work = system.damping.tolist(), -1, None
    for part, start, chunk in _chunks(window):
        if part != at:
            at, whitener = part, system.whitener(part)
        if work is None or work.shape[1] < chunk.shape[1]:
            work = torch.empty_like(chunk)
        whitened = lower_product(whitener, chunk, work[:, : chunk.shape[1]])
        yield damping[part], start, chunk.square().mean(0), whitened.square_().sum(0)


def whitened(
    window: Window, system: System, dtype: torch.dtype, accuracy: float = 0.0
) -> list[Tensor]:
    """``L^{-1} G`` of each part, ``[c, length]``.

    Args:
        window: The window.
        system: Its factorized systems.
        dtype: Type of the result.
        accuracy: Products are in float32, for a result in float32, where their error (relative to
            the largest column) is estimated to be less than that.

    Raises:
        MemoryError: If there is no room.
    """
    device = window.device
    require_memory(window.length, system.count, dtype, device, available_memory(device))
    out = [
        torch.empty((system.count, length), dtype=dtype, device=device) for length in window.parts
    ]
    short = dtype == torch.float32 and not system.extreme
    short = short and ROUNDING * system.condition**0.5 <= accuracy
    starts, at = list(itertools.accumulate(window.parts, initial=0)), -1
    for part, start, stop, rows in window.pieces():
        if part != at:
            at, whitener = part, system.whitener(part)
            whitener = whitener.to(dtype) if short else whitener
        found = out[part][:, start - starts[part] : stop - starts[part]]
        for first, last, chunk in converted(rows, whitener.dtype):
            target = found[:, first:last]
            if whitener.dtype == dtype:
                lower_product(whitener, chunk, target)
            else:
                target.copy_(lower_product(whitener, chunk))
    return out


def inverse_submatrix(
    window: Window, system: System, rows: Tensor, columns: Tensor, kept: list[Tensor] | None
) -> Tensor:
    """Elements of ``F^{-1}`` in float64, ``[len(rows), len(columns)]``.

    Args:
        window: The window.
        system: Its factorized systems.
        rows: Indices, ``[r]``.
        columns: Indices, ``[s]``.
        kept: What :func:`whitened` returned, where it was called.
    """
    out = torch.zeros((len(rows), len(columns)), dtype=F64, device=window.device)
    same = columns is rows

    def whitened_at(part: int, index: Tensor) -> Tensor:
        """Columns of ``L^{-1} G``, ``[m, n]``, of which ranks have their own."""
        own = index if window.spread is None else window.spread.own(index)[1]
        found = window.columns(own) if kept is None else kept[part][:, own - start].to(F64)
        if window.spread is not None:
            every = found.new_zeros((len(found), len(index)))
            every[:, window.spread.own(index)[0]] = found
            found = window.spread.sum(every)
        return system.whiten(part, found) if kept is None else found

    start = 0
    for part, length in enumerate(window.whole_parts):
        stop = start + length
        above = ((rows >= start) & (rows < stop)).nonzero()[:, 0]
        beside = above if same else ((columns >= start) & (columns < stop)).nonzero()[:, 0]
        if len(above) and len(beside):
            first, second = rows[above], columns[beside]
            left = whitened_at(part, first)
            right = left if same else whitened_at(part, second)
            unit = (first[:, None] == second).to(F64)
            out[above[:, None], beside] = (unit - left.mT @ right) / float(system.damping[part])
        start = stop
    return out


def indices(selection: Any, length: int, device: torch.device) -> Tensor:
    """Non-negative indices ``[n]`` from integers or a boolean mask.

    Raises:
        TypeError: If they are of another type.
        ValueError: If a mask has another length.
        IndexError: If one is out of range.
    """
    found = torch.as_tensor(selection, device=device).reshape(-1)
    if found.dtype == torch.bool:
        if len(found) != length:
            raise ValueError(f"expected a mask of length {length}, got {len(found)}")
        return found.nonzero()[:, 0]
    if found.numel() == 0:
        return found.to(torch.int64)
    if found.is_floating_point() or found.is_complex():
        raise TypeError(f"expected integer indices or a boolean mask, got {found.dtype}")
    found = found.to(torch.int64)
    outside = found[(found < -length) | (found >= length)]
    if len(outside):
        raise IndexError(f"index {int(outside[0])} is out of range for {length} parameters")
    return torch.where(found < 0, found + length, found)


def _chunks(window: Window) -> Iterator[tuple[int, int, Tensor]]:
    """All columns once, in float64: the part, where the chunk starts in ``[P]``, the chunk."""
    for part, start, _, rows in window.pieces():
        for first, _, chunk in converted(rows, F64):
            yield part, start + first, chunk
