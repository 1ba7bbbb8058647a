r"""Sums over blocks of entries, from vectors that are only there piece by piece.

A *cell* is the finest block that a parameter has: a kernel of a convolution, a row of a matrix,
an entry of a vector. Pieces hold whole cells (or parts of one that is long), so that what is
computed for a piece can be summed while it is in cache; rows, parameters and layers then follow
from the cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlib.core.ranks.spread import Spread


@dataclass(frozen=True)
class Piece:
    """Some consecutive entries.

    Attributes:
        span: The entries.
        cells: The cells that they make up, or part of.
        chosen: Indices of the entries that belong to each of the caller's own blocks.
    """

    span: slice
    cells: slice
    chosen: tuple[Tensor, ...]


def cell_shape(shape: Sequence[int]) -> tuple[int, int]:
    """How many cells a parameter has, and how many entries each.

    Example:
        >>> cell_shape((8, 3, 5, 5)), cell_shape((8, 3)), cell_shape((8,)), cell_shape(())
        ((24, 25), (8, 3), (8, 1), (1, 1))
    """
    if len(shape) > 2:
        return shape[0] * shape[1], math.prod(shape[2:])
    return (shape[0] if shape else 1), (shape[1] if len(shape) == 2 else 1)


def pieces(
    shapes: Sequence[Sequence[int]] | None, chosen: Sequence[Tensor], n: int, width: int
) -> list[Piece]:
    """Pieces that cover ``[n]``.

    Args:
        shapes: Of the parameters, or ``None`` where there are no cells.
        chosen: Sorted indices of further blocks.
        n: Number of entries.
        width: Most entries of a piece.

    Example:
        >>> [(p.span.stop, p.cells.stop) for p in pieces([(2, 5), (3,)], [], 13, 4)]
        [(4, 1), (5, 1), (9, 2), (10, 2), (13, 5)]
    """
    spans: list[tuple[int, int, slice]] = []
    if shapes is None:
        spans = [(a, min(a + width, n), slice(0, 0)) for a in range(0, n, width)]
    start = first = 0
    for shape in shapes or ():
        count, size = cell_shape(shape)
        if not size:  # of a slice that is empty here
            first += count
            continue
        if size > width:
            for cell in range(first, first + count):
                for a in range(start, start + size, width):
                    spans.append((a, min(a + width, start + size), slice(cell, cell + 1)))
                start += size
        else:
            many = max(width // size, 1)
            for cell in range(0, count, many):
                stop = min(cell + many, count)
                place = slice(first + cell, first + stop)
                spans.append((start + cell * size, start + stop * size, place))
            start += count * size
        first += count
    ends = torch.tensor([b for _, b, _ in spans], dtype=torch.int64)
    cuts = [[0, *torch.searchsorted(index.cpu(), ends).tolist()] for index in chosen]
    return [
        Piece(
            slice(a, b),
            place,
            tuple(i[c[k] : c[k + 1]] for i, c in zip(chosen, cuts, strict=True)),
        )
        for k, (a, b, place) in enumerate(spans)
    ]


class Cells:
    """Sums over cells and chosen blocks, for some vectors at once.

    Attributes:
        sums: Of the cells, ``[rows, cells]``, float64.
        chosen: Of the caller's own blocks, ``[rows, blocks]``, float64.
    """

    def __init__(
        self, shapes: Sequence[Sequence[int]] | None, chosen: int, rows: int, device: torch.device
    ) -> None:
        self.shapes = shapes
        count = sum(cell_shape(shape)[0] for shape in shapes or ())
        self.sums = torch.zeros((rows, count), dtype=torch.float64, device=device)
        self.chosen = torch.zeros((rows, chosen), dtype=torch.float64, device=device)

    def add(self, piece: Piece, values: Tensor) -> None:
        """Adds the entries ``[rows, c]`` of a piece."""
        count = piece.cells.stop - piece.cells.start
        if count == values.shape[1]:
            self.sums[:, piece.cells] += values
        elif count:
            self.sums[:, piece.cells] += values.unflatten(1, (count, -1)).sum(2)
        for at, index in enumerate(piece.chosen):
            if index.numel():
                self.chosen[:, at] += values[:, index - piece.span.start].sum(1)


def whole_cells(cells: Cells, spread: Spread) -> tuple[Tensor, Tensor]:
    """Sums over cells and chosen blocks of whole vectors, from those over every rank's entries.

    A cell lies on one rank, or a part of it on each: one sum over ranks in either case.

    Args:
        cells: Of this rank's entries.
        spread: Which they are.

    Returns:
        As :attr:`Cells.sums` and :attr:`Cells.chosen`, of all, the same on every rank.
    """
    rows, start = len(cells.sums), 0
    parts: list[Tensor] = []
    for part, shape in zip(spread.slices, cells.shapes or (), strict=cells.shapes is not None):
        lead = min(max(len(shape) - 1, 1), 2) if shape else 0  # axes that number the cells
        count = cell_shape(shape)[0]
        own = cells.sums[:, start : start + count].reshape(rows, *shape[:lead])
        if part.dim < lead:
            first, last = part.bounds(spread.group.rank, spread.group.size)
            whole = own.new_zeros((rows, *part.shape[:lead]))
            whole.narrow(part.dim + 1, first, last - first).copy_(own)
            own = whole
        parts.append(own.reshape(rows, -1))
        start += count
    sums = torch.cat([*parts, cells.chosen], 1)
    sums = spread.sum(sums)
    at = sums.shape[1] - cells.chosen.shape[1]
    return sums[:, :at], sums[:, at:]
