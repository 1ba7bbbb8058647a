"""What solves need of a window, whether its rows are stored whole or compressed."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Rows(Protocol):
    """Rows in slots, in one or several parts (contiguous slices), and their Gram matrices.

    Bodies are :class:`~curvlib.operators.windows.window.Window` and
    :class:`~curvlib.operators.windows.sparse.SparseWindow`.

    Attributes:
        length: ``P``, the length of a row.
        size: ``m``, how many rows are kept at most.
        dtype: How numbers are stored.
        device: Where vectors and Gram matrices live.
        parts: Lengths of the parts.
        version: A number that every change increases.
    """

    length: int
    size: int
    dtype: torch.dtype
    device: torch.device
    parts: tuple[int, ...]
    version: int

    @property
    def count(self) -> int:
        """How many rows are held."""

    @property
    def whole_parts(self) -> tuple[int, ...]:
        """Lengths of the parts of whole rows, on all processes together."""

    def summed(self, numbers: Tensor) -> Tensor:
        """Numbers that were summed over the entries here, over those of all processes."""

    @property
    def rounded(self) -> bool:
        """Whether some Gram entries came from float32 products."""

    def slot(self, index: int) -> int:
        """Where a row is stored; ``index`` 0 is the oldest, -1 the newest."""

    def stored_gram(self) -> Tensor:
        """Gram matrices ``[parts, count, count]`` in float64, in the order of slots."""

    def inner(self, columns: Tensor, *, exact: bool = False) -> Tensor:
        """``G X`` for ``X`` ``[P, K]``, part by part: ``[parts, count, K]`` in float64."""

    def combination(self, coefficients: Tensor, *, exact: bool = False) -> Tensor:
        """``G^T C`` ``[P, K]`` for ``C`` ``[parts, count, K]`` in float64."""

    def polish(self) -> bool:
        """Computes Gram entries that came from float32 products again, in float64."""
