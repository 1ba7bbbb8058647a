r"""Directions of which each rank holds a slice: see :class:`.BlockDirections`.

For :math:`Q` directions of a block a rank of :math:`R` holds :math:`Q G O I / R` numbers. At use,
for each batch, they are gathered, some directions at a time: a rank sends
:math:`(R - 1) / R\; Q G O I` numbers, :math:`Q` times as many as for the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from curvlib.core.ranks.bundles import gathered
from curvlib.core.ranks.group import Group
from curvlib.core.ranks.spread_blocks import Cut
from curvlib.operators.scores.directions import CHUNK, BlockDirections, DenseDirections


@dataclass(frozen=True, eq=False)
class SpreadDirections:
    """Slices of dense directions.

    Attributes:
        own: This rank's slice ``[Q, ...]`` of the matrices ``[Q, G, O, I]``.
        cut: How they are cut.
        group: The ranks.
    """

    own: Tensor
    cut: Cut
    group: Group

    @property
    def count(self) -> int:
        """``Q``."""
        return len(self.own)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(G, O, I)``."""
        return self.cut.shape

    @property
    def bytes(self) -> int:
        """Memory that is held, by this rank."""
        return self.own.numel() * self.own.element_size()

    def pieces(self) -> Iterator[tuple[slice, DenseDirections]]:
        """Some directions at a time, whole; for all ranks together."""
        step = max(1, CHUNK // (math.prod(self.shape) * self.own.element_size()))
        for start in range(0, self.count, step):
            at = slice(start, min(start + step, self.count))
            yield at, DenseDirections(gathered(self.own[at], self.cut.values, self.group, 1))

    def dense(self) -> Tensor:
        """The directions as matrices, ``[Q, G, O, I]``."""
        return gathered(self.own, self.cut.values, self.group, 1)

    def contract(self, left: Tensor, right: Tensor) -> Tensor:
        """As of the whole ones, for all ranks together."""
        return DenseDirections(self.dense()).contract(left, right)

    def contract_tokens(self, left: Tensor, right: Tensor) -> Tensor:
        """As of the whole ones, for all ranks together."""
        return DenseDirections(self.dense()).contract_tokens(left, right)

    def bound(self, norms: Tensor) -> Tensor:
        """Zeros ``[n, Q]``: nothing is left out."""
        return norms.new_zeros((len(norms), self.count))


def pieces(directions: BlockDirections) -> Iterator[tuple[slice, BlockDirections]]:
    """Directions as this process has them; spread ones whole, some at a time."""
    if isinstance(directions, SpreadDirections):
        yield from directions.pieces()
    else:
        yield slice(0, directions.count), directions
