"""Where a window's rows are stored: blocks of columns, each of all rows.

Those that are kept off the device come to it one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlib.core.memory import available_memory
from curvlib.operators.windows.arguments import require_memory

F64 = torch.float64

#: Bytes of a block of columns of a window that is kept off the device.
BLOCK_BYTES = 2**26


@dataclass(frozen=True, eq=False)
class Block:
    """Some columns of all rows.

    Attributes:
        part: The part that they belong to.
        start: The first of them.
        stop: The last of them, plus one.
        rows: ``[size, stop - start]``, a row in each slot.
    """

    part: int
    start: int
    stop: int
    rows: Tensor


def empty(
    parts: Sequence[int], size: int, dtype: torch.dtype, device: torch.device, storage: str | None
) -> list[Block]:
    """Blocks that make up rows, with nothing written in them; on the device, one for each part.

    Args:
        parts: Lengths of the parts.
        size: How many rows.
        dtype: How they are stored.
        device: Where they are used.
        storage: ``"cpu"`` keeps them in host memory, in blocks of :data:`BLOCK_BYTES`.

    Raises:
        MemoryError: If they do not fit; the message says what would.
    """
    home = torch.device("cpu") if storage == "cpu" else device
    require_memory(sum(parts), size, dtype, home, available_memory(home), len(parts))
    pinned = home.type == "cpu" and device.type == "cuda"
    longest = max(1, BLOCK_BYTES // (size * dtype.itemsize))
    out, start = [], 0
    for part, length in enumerate(parts):
        end, step = start + length, longest if storage == "cpu" else length
        for first in range(start, end, max(1, step)) or [start]:  # a process may have no entry
            stop = min(first + step, end)
            shape = (size, stop - first)
            rows = torch.empty(shape, dtype=dtype, device=home, pin_memory=pinned)
            out.append(Block(part, first, stop, rows))
        start = end
    return out


def rows(blocks: Sequence[Block], slots: Sequence[int], device: torch.device) -> Tensor:
    """A copy of the rows in some slots, ``[len(slots), P]``, on a device."""
    dtype = blocks[0].rows.dtype
    out = torch.empty((len(slots), blocks[-1].stop), dtype=dtype, device=device)
    for block in blocks:
        for row, slot in zip(out, slots, strict=True):
            row[block.start : block.stop] = block.rows[slot]
    return out


def columns(blocks: Sequence[Block], count: int, indices: Tensor, device: torch.device) -> Tensor:
    """Some columns of the first slots, ``[count, n]``, in float64 on a device."""
    out = torch.empty((count, len(indices)), dtype=F64, device=device)
    for block in blocks:
        inside = ((indices >= block.start) & (indices < block.stop)).nonzero()[:, 0]
        if len(inside):
            which = (indices[inside] - block.start).to(block.rows.device)
            out[:, inside] = block.rows[:count][:, which].to(device, F64)
    return out


def write(blocks: Sequence[Block], rows: Tensor, slots: Sequence[int]) -> None:
    """Writes rows ``[k, P]`` into slots."""
    for block in blocks:
        for row, slot in zip(rows, slots, strict=True):
            block.rows[slot].copy_(row[block.start : block.stop], non_blocking=True)


def take(sources: Sequence[Tensor], kept: Sequence[int], targets: Sequence[Block]) -> None:
    """Takes rows ``kept`` of blocks of columns into the first slots of other blocks.

    Args:
        sources: Blocks ``[*, n]`` that make up the columns, however cut.
        kept: Which rows.
        targets: Where they are stored.
    """
    first = 0
    for source in sources:
        last = first + source.shape[1]
        for target in targets:
            low, high = max(first, target.start), min(last, target.stop)
            if low >= high:
                continue
            within = slice(low - target.start, high - target.start)
            for new, old in enumerate(kept):
                target.rows[new, within] = source[old, low - first : high - first]
        first = last
