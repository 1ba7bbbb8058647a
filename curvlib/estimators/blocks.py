r"""Blocks of entries of a flat vector, whose means an estimate of a diagonal knows with errors.

The entries of a block are correlated within each probe, so that the error of their mean does
not follow from the errors of the entries. It follows from the block's mean in each probe, of
which running moments are kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlib.core.algebra import Index, indices
from curvlib.core.operator import LinearOperator
from curvlib.core.ranks.spread import Spread
from curvlib.core.result import Result
from curvlib.core.space import ParamSpace
from curvlib.estimators.cells import Cells, Piece, cell_shape, pieces, whole_cells
from curvlib.estimators.intervals import t_quantiles

#: What a parameter space is divided into.
KINDS = ("layers", "channels", "kernels")


@dataclass(frozen=True)
class Blocks:
    """Which entries belong together.

    Attributes:
        space: The parameters, for layers, channels and kernels; ``None`` for none of these.
        chosen: Sorted indices of the caller's own blocks, by name.
        spread: Which entries are here, where vectors are spread over processes: sums are over all.
    """

    space: ParamSpace | None
    chosen: dict[str, Tensor]
    spread: Spread | None = None

    @property
    def groups(self) -> dict[str, dict[str, int]]:
        """For each kind of blocks, how many there are of each name, in the order of the sums."""
        out: dict[str, dict[str, int]] = {}
        if self.space is not None:
            shapes = dict(zip(self.space.names, self._whole_shapes, strict=True))
            out["layers"] = dict.fromkeys(self.space.layers(), 1)
            out["channels"] = {n: s[0] if s else 1 for n, s in shapes.items()}
            out["kernels"] = {n: s[0] * s[1] for n, s in shapes.items() if len(s) > 2}
        if self.chosen:
            out["blocks"] = dict.fromkeys(self.chosen, 1)
        return out

    @property
    def count(self) -> int:
        """Number of all blocks."""
        return sum(sum(names.values()) for names in self.groups.values())

    def sums(self, entries: Tensor) -> Tensor:
        """Sums of ``[n]`` entries over every block, ``[count]`` in float64, kind after kind."""
        cells = self.cells(1, entries.device)
        for piece in self.pieces(entries.shape[0]):
            cells.add(piece, entries[None, piece.span])
        return self.of_cells(cells)[0]

    def pieces(self, n: int, width: int = 2**19) -> list[Piece]:
        """Pieces of at most ``width`` entries that cover ``[n]``: see :mod:`.cells`."""
        chosen = list(self.chosen.values())
        if self.spread is not None:
            chosen = [self.spread.own(index)[1] for index in chosen]
        return pieces(self.shapes, chosen, n, width)

    def cells(self, rows: int, device: torch.device) -> Cells:
        """Sums of no entries yet, for ``rows`` vectors."""
        return Cells(self.shapes, len(self.chosen), rows, device)

    @property
    def shapes(self) -> Sequence[Sequence[int]] | None:
        """Shapes of the parameters, or of what is here of them."""
        return None if self.space is None else self.space.shapes

    @property
    def _whole_shapes(self) -> Sequence[Sequence[int]]:
        assert self.space is not None
        if self.spread is None:
            return self.space.shapes
        return [part.shape for part in self.spread.slices]

    def of_cells(self, cells: Cells) -> Tensor:
        """Sums over every block from those over cells, ``[rows, count]``."""
        sums, chosen = cells.sums, cells.chosen
        if self.spread is not None:
            sums, chosen = whole_cells(cells, self.spread)
        if self.space is None:
            return chosen
        kernels, channels, totals = [], [], {}
        shapes = self._whole_shapes
        split = torch.split(sums, [cell_shape(shape)[0] for shape in shapes], dim=1)
        for name, shape, part in zip(self.space.names, shapes, split, strict=True):
            if len(shape) > 2:
                kernels.append(part)
                part = part.unflatten(1, (shape[0], shape[1])).sum(2)
            channels.append(part)
            totals[name] = part.sum(1)
        layers = [
            torch.stack([totals[n] for n in names]).sum(0) for names in self.space.layers().values()
        ]
        return torch.cat([torch.stack(layers, 1), *channels, *kernels, chosen], 1)


def blocks_of(op: LinearOperator, chosen: Mapping[str, Index] | None) -> Blocks:
    """The blocks of an operator's parameters, and those that a caller names.

    Args:
        op: The operator.
        chosen: Indices, masks, slices or name globs of parameters, by name of the block.

    Raises:
        TypeError: If ``chosen`` is no mapping.
        ValueError: If a block is empty or out of range, or an index repeats.
    """
    if chosen is not None and not isinstance(chosen, Mapping):
        raise TypeError(
            "expected blocks={'name': indices, mask, slice or name globs}, "
            f"got {type(chosen).__name__}"
        )
    named = {
        str(name): indices(op, index, 0).sort().values for name, index in (chosen or {}).items()
    }
    for name, where in named.items():
        if where.numel() == 0:
            raise ValueError(f"the block {name!r} in blocks= is empty")
    return Blocks(op.space, named, op.spread)


@dataclass(frozen=True)
class Moments:
    """Running moments over probes of block means x and of the means d of squared probes.

    Attributes:
        count: Number of probes.
        means: Means of x and d, ``[2, B]``, float64.
        squares: Centred sums of x x, x d and d d, ``[3, B]``.
    """

    count: int
    means: Tensor
    squares: Tensor

    def with_probe(self, x: Tensor, d: Tensor) -> Moments:
        """The moments with one more probe (Welford's recurrence)."""
        new = torch.stack([x, d])
        before = new - self.means
        means = self.means + before / (self.count + 1)
        after = new - means
        more = torch.stack([before[0] * after[0], before[0] * after[1], before[1] * after[1]])
        return Moments(self.count + 1, means, self.squares + more)

    def ratio(self) -> tuple[Tensor, Tensor]:
        """Mean of x by mean of d, and its standard error, each ``[B]``; NaN with one probe."""
        value = self.means[0] / self.means[1]
        if self.count == 1:
            return value, torch.full_like(value, math.nan)
        xx, xd, dd = self.squares
        left = (xx - 2 * value * xd + value.square() * dd).clamp_min(0.0)
        return value, (left / (self.count - 1) / self.count).sqrt() / self.means[1]


@dataclass(frozen=True, eq=False, repr=False)
class BlockMeans(Result):
    """Means of a diagonal over blocks, with the standard errors of the means.

    Attributes:
        value: Means, ``[B]``, float64.
        stderr: Their standard errors, ``[B]``; NaN with one probe.
        sizes: Entries of each block, ``[B]``.
        counts: How many blocks there are of each name, in order.
        degrees: Degrees of freedom of the standard errors, ``[B]``; 0 if exact.
        kind: ``"layers"``, ``"channels"``, ``"kernels"`` or ``"blocks"``.
        name: What was measured.
    """

    value: Tensor
    stderr: Tensor
    sizes: Tensor
    counts: dict[str, int]
    degrees: Tensor
    kind: str
    name: str

    @property
    def interval(self) -> tuple[Tensor, Tensor]:
        """95 % intervals of each mean, by Student's law: lower and upper ends, each ``[B]``."""
        half = (t_quantiles(self.degrees) * self.stderr).where(self.stderr != 0.0, 0.0)
        return self.value - half, self.value + half

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        """Means and standard errors of the blocks of one name (a layer or a parameter).

        Raises:
            ValueError: If there is no such name.
        """
        start = 0
        for other, count in self.counts.items():
            if other == name:
                return self.value[start : start + count], self.stderr[start : start + count]
            start += count
        raise ValueError(f"no block is named {name!r}; there are {list(self.counts)}")

    def named(self) -> dict[str, float]:
        """Means by name, ``"conv.weight[3]"`` where a name has several blocks."""
        labels: list[str] = []
        for name, count in self.counts.items():
            labels += [name] if count == 1 else [f"{name}[{i}]" for i in range(count)]
        return dict(zip(labels, self.value.tolist(), strict=True))


def block_table(
    blocks: Blocks, value: Tensor, stderr: Tensor, sizes: Tensor, degrees: Tensor | float
) -> dict[str, dict[str, Any]]:
    """Means, errors and sizes by kind of block, as an estimate keeps them."""
    out: dict[str, dict[str, Any]] = {}
    degrees = torch.as_tensor(degrees, dtype=torch.float64, device=value.device).expand_as(value)
    start = 0
    for kind, names in blocks.groups.items():
        stop = start + sum(names.values())
        out[kind] = {
            "value": value[start:stop].cpu(),
            "stderr": stderr[start:stop].cpu(),
            "sizes": sizes[start:stop].cpu(),
            "degrees": degrees[start:stop].cpu().clone(),
            "names": list(names),
            "counts": list(names.values()),
        }
        start = stop
    return out
