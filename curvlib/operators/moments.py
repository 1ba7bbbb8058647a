r"""Second moments of streamed rows on the blocks of a partition, in primal or dual form.

For a block of ``b`` coordinates and ``m`` rows, what determines :math:`\frac1m G_b^T G_b` is
either the ``b x b`` matrix itself (primal) or the ``m x b`` rows (dual), whichever is smaller. A
stream starts as rows and becomes matrices as soon as there are ``b`` rows, so that memory is at
most ``b`` numbers for each coordinate, and the window of all rows is never stored where it is
longer than a block. Matrices are accumulated in float64 by batched matrix products of some 64
rows at a time: one by one, the memory traffic of the matrices would be 64 times that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlib.core.block_stacks import CHUNK
from curvlib.core.partition import Partition
from curvlib.core.ranks.group import Group
from curvlib.operators.rows import RowDraw

#: Rows that are accumulated at once, and the bytes that they may take.
ROWS, MEMORY = 64, 2**28


@dataclass(frozen=True, eq=False)
class Moments:
    r"""Second moments of ``count`` rows.

    Attributes:
        partition: The blocks.
        count: ``m``, how many rows there were.
        dtype: Type of the rows.
        means: For each stack either :math:`\frac1m G_b^T G_b`, ``[n, b, b]``, or ``None``.
        rows: For each stack either the rows :math:`G_b`, ``[n, m, b]``, or ``None``.
    """

    partition: Partition
    count: int
    dtype: torch.dtype
    means: tuple[Tensor | None, ...]
    rows: tuple[Tensor | None, ...]

    def dense(self, stack: int, start: int, stop: int) -> Tensor:
        r""":math:`\frac1m G_b^T G_b` of some blocks, ``[n, b, b]``, float64: a copy."""
        mean, rows = self.means[stack], self.rows[stack]
        if mean is not None:
            return mean[start:stop].to(torch.float64, copy=True)
        assert rows is not None
        part = rows[start:stop].double()
        return part.mT @ part / self.count

    def mean_squares(self, stack: int) -> Tensor:
        """Mean over a block's coordinates of the diagonal, ``[n]``, float64."""
        mean, rows = self.means[stack], self.rows[stack]
        if mean is not None:
            return mean.diagonal(dim1=-2, dim2=-1).double().mean(-1)
        assert rows is not None
        return rows.square().sum((1, 2), dtype=torch.float64) / (self.count * rows.shape[-1])

    def plus(self, other: Moments) -> Moments:
        """The moments of the rows of both."""
        count = self.count + other.count
        share = self.count / count
        means: list[Tensor | None] = []
        rows: list[Tensor | None] = []
        for k, indices in enumerate(self.partition.stacks):
            n, b = indices.shape
            mine, others = self.rows[k], other.rows[k]
            if mine is not None and others is not None and count < b:
                means.append(None)
                rows.append(torch.cat([mine, others], 1))
                continue
            formed = self.means[k] if self.means[k] is not None else other.means[k]
            dtype = torch.float64 if formed is None else formed.dtype
            mean = torch.empty((n, b, b), dtype=dtype, device=indices.device)
            for start, stop in self.partition.chunks(k, CHUNK):
                mean[start:stop] = self.dense(k, start, stop) * share
                mean[start:stop] += other.dense(k, start, stop) * (1.0 - share)
            means.append(mean)
            rows.append(None)
        return Moments(self.partition, count, self.dtype, tuple(means), tuple(rows))


def second_moments(
    rows: Tensor | Iterable[Tensor] | RowDraw,
    partition: Partition,
    *,
    dtype: torch.dtype = torch.float64,
    every: int = 0,
) -> tuple[Moments, Moments | None]:
    r"""Accumulates the second moments of a stream of rows.

    Args:
        rows: ``[m, P]``, or an iterable of such blocks or of vectors ``[P]``. A block may be
            overwritten once the next is asked for. Or a draw of a risk's rows, of which, in a
            process group, each rank accumulates its own; moments are then joined, which sends
            :math:`2 P b (R - 1) / R` numbers for matrices (:math:`m \ge b`) and
            :math:`P m / R` for rows.
        partition: The blocks.
        dtype: Of the matrices: float64, or float32 for half the memory.
        every: Puts every ``every``-th row aside, if positive.

    Returns:
        The moments of the rows; and of those put aside.

    Raises:
        TypeError: If rows are no float32 or float64 tensors.
        ValueError: If there is none (or none to put aside), or lengths or devices do not fit.
        FloatingPointError: If a row is not finite.
    """
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype= is torch.float32 or torch.float64, got {dtype}")
    kept, aside = _Sums(partition, dtype), _Sums(partition, dtype)
    seen = 0
    if isinstance(rows, RowDraw) and rows.shared:
        group = rows.risk.group
        assert group is not None
        with group.together("accumulating gradient rows"):
            own = rows.own()
            # numbers of rows matter only where some are put aside
            runs = own if every else [(0, (block for _, block in own))]
            for first, blocks in runs:
                for part, row_dtype in _gathered(blocks, partition, dtype):
                    _divide(part, row_dtype, first, every, kept, aside)
                    first += len(part)
        for sums in (kept, aside) if every else (kept,):
            sums.join(group)
        seen = kept.count + aside.count
    else:
        if isinstance(rows, RowDraw):
            rows = rows.everywhere()
        for part, row_dtype in _gathered(rows, partition, dtype):
            _divide(part, row_dtype, seen, every, kept, aside)
            seen += len(part)
    if seen == 0:
        raise ValueError(
            "there are no rows: the iterable is empty, or was used up before; pass at least one "
            "row, from a fresh iterator"
        )
    if every and (kept.count == 0 or aside.count == 0):
        raise ValueError(
            f"damping chosen on held-out rows needs at least {every} rows, of which every "
            f"{every}th is held out, got {seen}"
        )
    return kept.moments(), aside.moments() if every else None


def _divide(
    part: Tensor, dtype: torch.dtype, seen: int, every: int, kept: _Sums, aside: _Sums
) -> None:
    """Adds rows ``[r, P]`` that come after ``seen`` others, of a type, to what they belong to."""
    kept.row_dtype = aside.row_dtype = dtype
    if every:
        numbers = torch.arange(seen + 1, seen + 1 + len(part))
        out = (numbers % every == 0).to(part.device)
        aside.add(part[out])
        part = part[~out]
    kept.add(part)


class _Sums:
    """What is accumulated."""

    def __init__(self, partition: Partition, dtype: torch.dtype) -> None:
        self.partition = partition
        self.dtype = dtype
        self.count = 0
        self.row_dtype = dtype  # that of the rows that come
        self.totals: list[Tensor | None] = [None] * len(partition.stacks)
        self.pending: list[list[Tensor]] = [[] for _ in partition.stacks]

    def add(self, rows: Tensor) -> None:
        """Rows ``[r, P]`` in the type of the sums, which are overwritten afterwards."""
        if not len(rows):
            return
        self.count += len(rows)
        for k, stack in enumerate(self.partition.stacks):
            n, b = stack.shape
            total = self.totals[k]
            if total is None and self.count < b:
                self.pending[k].append(_blocks(rows, stack).to(self.row_dtype).contiguous())
                continue
            if total is None:
                total = torch.zeros((n, b, b), dtype=self.dtype, device=rows.device)
                self.totals[k] = total
            for start, stop in self.partition.chunks(k, CHUNK):
                for held in self.pending[k]:
                    X = held[start:stop].to(self.dtype)
                    total[start:stop].baddbmm_(X.mT, X)
                X = _blocks(rows, stack[start:stop])
                total[start:stop].baddbmm_(X.mT, X)
            self.pending[k] = []

    def join(self, group: Group) -> None:
        """Adds what other ranks have accumulated; every rank has the same afterwards."""
        every = group.values([self.count, str(self.row_dtype).removeprefix("torch.")])
        self.count = sum(count for count, _ in every)
        self.row_dtype = next((getattr(torch, d) for count, d in every if count), self.dtype)
        for k, stack in enumerate(self.partition.stacks):
            n, b = stack.shape
            held, total = self.pending[k], self.totals[k]
            if self.count < b:  # then no rank has formed matrices
                mine = torch.cat(held, 1) if held else self._none(stack)
                rows = group.rows(mine.transpose(0, 1).contiguous())
                self.pending[k] = [torch.cat(rows).transpose(0, 1).contiguous()]
                continue
            if total is None:
                total = torch.zeros((n, b, b), dtype=self.dtype, device=stack.device)
                for start, stop in self.partition.chunks(k, CHUNK):
                    for part in held:
                        X = part[start:stop].to(self.dtype)
                        total[start:stop].baddbmm_(X.mT, X)
            self.pending[k], self.totals[k] = [], group.add(total)

    def _none(self, stack: Tensor) -> Tensor:
        n, b = stack.shape
        return torch.zeros((n, 0, b), dtype=self.row_dtype, device=stack.device)

    def moments(self) -> Moments:
        rows = [torch.cat(held, 1) if held else None for held in self.pending]
        means = [None if total is None else total.div_(self.count) for total in self.totals]
        return Moments(self.partition, self.count, self.row_dtype, tuple(means), tuple(rows))


def mean_diagonals(moments: Moments) -> list[Tensor]:
    """What relative damping is relative to: for each stack's blocks ``[n]``, float64.

    The mean diagonal of the undamped matrix over the parameter that a block belongs to, or over
    all parameters where that is zero or there are none.
    """
    partition = moments.partition
    means = [moments.mean_squares(k) for k in range(len(partition.stacks))]
    sizes = [float(s.shape[1]) for s in partition.stacks]
    total = sum(float(m.sum()) * b for m, b in zip(means, sizes, strict=True))
    overall = total / sum(len(m) * b for m, b in zip(means, sizes, strict=True))
    if partition.space is None:
        return [torch.full_like(m, overall) for m in means]
    sums = means[0].new_zeros(len(partition.space.names))
    entries = torch.zeros_like(sums)
    owners = [partition.parameters(k) for k in range(len(means))]
    for mean, size, owner in zip(means, sizes, owners, strict=True):
        sums.index_add_(0, owner, mean * size)
        entries.index_add_(0, owner, torch.full_like(mean, size))
    each = torch.where(sums > 0, sums / entries.clamp(min=1.0), overall)
    return [each[owner] for owner in owners]


def _blocks(rows: Tensor, indices: Tensor) -> Tensor:
    """``[r, P]`` to ``[n, r, b]``, whose matrices are what BLAS takes without a copy."""
    n, b = indices.shape
    return rows.index_select(1, indices.reshape(-1)).view(len(rows), n, b).transpose(0, 1)


def _gathered(
    rows: Tensor | Iterable[Tensor], partition: Partition, dtype: torch.dtype
) -> Iterator[tuple[Tensor, torch.dtype]]:
    """Checked rows, some at a time, in one buffer of ``dtype`` that is used again; their type."""
    buffer: Tensor | None = None
    size = partition.size
    seen = filled = 0
    for item in [rows] if isinstance(rows, Tensor) else rows:
        if not isinstance(item, Tensor) or item.dtype not in (torch.float32, torch.float64):
            kind = item.dtype if isinstance(item, Tensor) else type(item).__name__
            raise TypeError(
                f"expected rows as float32 or float64 tensors, got {kind}; row.float() converts "
                "half precision, torch.from_numpy(rows) NumPy arrays"
            )
        block = item.detach()[None] if item.ndim == 1 else item.detach()
        if block.ndim != 2 or block.shape[1] != size:
            raise ValueError(
                f"expected rows [n, P] or [P] with P = {size}, got {list(item.shape)}; rows are "
                "flat gradients of the parameters that the partition is of"
            )
        if block.device != partition.device:
            raise ValueError(
                f"expected rows on {partition.device} as the partition is, got {block.device}"
            )
        if buffer is None:
            length = max(1, min(ROWS, MEMORY // (size * dtype.itemsize)))
            buffer = torch.empty((length, size), dtype=dtype, device=block.device)
            first_dtype = block.dtype
        if block.dtype != first_dtype:
            raise TypeError(f"rows change from {first_dtype} to {block.dtype} at row {seen}")
        for part in torch.split(block, len(buffer)):
            if not bool(torch.isfinite(part.sum())) and not bool(torch.isfinite(part).all()):
                first = int((~torch.isfinite(part).all(1)).nonzero()[0])
                raise FloatingPointError(
                    f"row {seen + first} has entries that are NaN or infinite; leave it out, or "
                    "look for overflow (a loss scale that is too large, half precision)"
                )
            seen += len(part)
            while len(part):
                now = min(len(part), len(buffer) - filled)
                buffer[filled : filled + now] = part[:now]
                part, filled = part[now:], filled + now
                if filled == len(buffer):
                    yield buffer, first_dtype
                    filled = 0
    if buffer is not None and filled:
        yield buffer[:filled], first_dtype
