"""How a tensor is cut along one axis, over ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Slices:
    """A parameter that is cut along one axis, as ``torch.chunk`` cuts.

    Attributes:
        shape: Of the whole parameter.
        dim: The axis.
    """

    shape: tuple[int, ...]
    dim: int

    @property
    def size(self) -> int:
        """Entries of the whole parameter."""
        return math.prod(self.shape)

    def bounds(self, rank: int, count: int) -> tuple[int, int]:
        """First index along the axis of rank ``rank`` of ``count``, and the one after its last.

        Example:
            >>> [Slices((7, 2), 0).bounds(rank, 3) for rank in range(3)]
            [(0, 3), (3, 6), (6, 7)]
        """
        length, chunk = self.shape[self.dim], self.chunk(count)
        return min(rank * chunk, length), min((rank + 1) * chunk, length)

    def chunk(self, count: int) -> int:
        """How much of the axis each of ``count`` ranks has, those at the end perhaps less."""
        return -(-self.shape[self.dim] // count)

    def local(self, rank: int, count: int) -> tuple[int, ...]:
        """Shape of the slice of a rank."""
        first, last = self.bounds(rank, count)
        return (*self.shape[: self.dim], last - first, *self.shape[self.dim + 1 :])
