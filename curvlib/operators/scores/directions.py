r"""Directions that per-example gradients are multiplied by, block by block.

A *block* is one matrix of parameters :math:`[O, I]` (or ``G`` of them, for grouped convolutions),
and the gradient of example ``n`` in it a sum of products of rows,
:math:`G_n = \sum_t l_{nt} r_{nt}^\top` (see :mod:`curvlib.operators.layers.rows`). For ``Q``
directions :math:`D_q` of the same shape, all that scores need is

.. math:: s_{nq} = \langle D_q, G_n \rangle = \sum_t l_{nt}^\top D_q\, r_{nt} ,

whose terms are the scores of the rows ``t``. How directions are kept is a body of
:class:`BlockDirections`: here as they are, :class:`DenseDirections`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

#: Bytes that intermediate products may take.
CHUNK = 64 * 2**20
#: Bytes of gradients that are formed at once: they are read again from the processor's cache.
FORMED = 8 * 2**20
#: Rows of a gradient that are formed at once, at least.
ROWS = 64
#: Work of writing and reading an entry, in floating-point operations.
_PASS = 10.0


class BlockDirections(Protocol):
    """``Q`` directions in one block.

    Everywhere, ``left`` is either rows ``[G, n, T, O]``, or indices ``[n, T]`` (int64) of rows that
    are one-hot (embeddings, with ``G = 1``), and ``right`` is rows ``[G, n, T, I]``. For
    :meth:`contract`, a last column of ones (of a bias) may be left out, ``[G, n, T, I - 1]``.
    """

    @property
    def count(self) -> int:
        """``Q``."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(G, O, I)``."""

    @property
    def bytes(self) -> int:
        """Memory that is held."""

    def contract(self, left: Tensor, right: Tensor) -> Tensor:
        r""":math:`\sum_t l_{nt}^\top D_q r_{nt}`, ``[n, Q]``."""

    def contract_tokens(self, left: Tensor, right: Tensor) -> Tensor:
        r""":math:`l_{nt}^\top D_q r_{nt}`, ``[n, Q, T]``."""

    def bound(self, norms: Tensor) -> Tensor:
        """What scores may be off by at most, ``[n, Q]``, for gradients of these norms ``[n]``."""

    def dense(self) -> Tensor:
        """The directions as matrices, ``[Q, G, O, I]``."""


@dataclass(frozen=True, eq=False)
class DenseDirections:
    """Directions as they are.

    Attributes:
        matrices: ``[Q, G, O, I]``.

    Example:
        >>> import torch
        >>> D = DenseDirections(torch.eye(2).view(1, 1, 2, 2))
        >>> left, right = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[3.0, 4.0]]]])
        >>> D.contract(left, right), D.contract_tokens(left, right)
        (tensor([[11.]]), tensor([[[11.]]]))
    """

    matrices: Tensor

    @property
    def count(self) -> int:
        """``Q``."""
        return len(self.matrices)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(G, O, I)``."""
        _, G, O, I = self.matrices.shape
        return G, O, I

    @property
    def bytes(self) -> int:
        """Memory that is held."""
        return self.matrices.numel() * self.matrices.element_size()

    def contract(self, left: Tensor, right: Tensor) -> Tensor:
        r""":math:`\sum_t l_{nt}^\top D_q r_{nt}`, ``[n, Q]``.

        By the cheaper of two routes: the gradients first, and one matrix product for all
        directions, or row by row.
        """
        one_hot = not left.is_floating_point()
        if not formed(right.shape[2], self.count, self.shape, one_hot=one_hot):
            return self.contract_tokens(left, with_ones(right, self.shape[2])).sum(-1)
        if not one_hot:
            return by_gradients(left, right, self.matrices)
        found = _added(left, right[0], self.shape[1])
        return found.transpose(0, 1).flatten(1) @ self.matrices.flatten(1).mT

    def contract_tokens(self, left: Tensor, right: Tensor) -> Tensor:
        r""":math:`l_{nt}^\top D_q r_{nt}`, ``[n, Q, T]``."""
        _, n, T, _ = right.shape
        out = right.new_empty((n, self.count, T))
        _, O, I = self.shape
        for at in self._parts(n * T * (I if left.ndim == 2 else min(O, I))):
            own = self.matrices[at]
            if left.ndim == 2:
                found = (own[:, 0, left] * right[0]).sum(-1)
            elif O <= I:  # [q, G, n T, O]
                found = (right.flatten(1, 2) @ own.mT * left.flatten(1, 2)).sum((1, 3))
            else:
                found = (left.flatten(1, 2) @ own * right.flatten(1, 2)).sum((1, 3))
            out[:, at] = found.reshape(-1, n, T).transpose(0, 1)
        return out

    def bound(self, norms: Tensor) -> Tensor:
        """Zeros ``[n, Q]``: nothing is left out."""
        return norms.new_zeros((len(norms), self.count))

    def dense(self) -> Tensor:
        """The directions as matrices, ``[Q, G, O, I]``."""
        return self.matrices

    def _parts(self, each: int) -> Iterator[slice]:
        """Directions that are done at once, so that ``each`` numbers for each of them fit."""
        groups = self.shape[0]
        step = max(1, CHUNK // max(1, groups * each * self.matrices.element_size()))
        for start in range(0, self.count, step):
            yield slice(start, start + step)


def by_gradients(left: Tensor, right: Tensor, matrices: Tensor) -> Tensor:
    """Scores ``[n, Q]`` by some rows of gradients at a time, and one product for all directions.

    Rows of few gradients would read all directions for little work, all rows of a gradient
    would leave the cache before they are read.

    Args:
        left: Rows ``[G, n, T, O]``.
        right: Rows ``[G, n, T, I]``, or without a last column of ones.
        matrices: ``[Q, G, O, I]``.
    """
    (G, n, _, width), (count, _, O, I) = right.shape, matrices.shape
    each = max(1, G * I * right.element_size())  # bytes of a row of a gradient
    rows = min(O, max(ROWS, FORMED // max(1, n * each)))
    step = min(n, max(1, FORMED // (rows * each)))
    buffer = right.new_empty(step * G * rows * I)
    out = right.new_zeros((n, count))
    for low in range(0, O, rows):
        flat = matrices[:, :, low : low + rows].flatten(1).mT
        for start in range(0, n, step):
            at = slice(start, start + step)
            outputs, inputs = left[:, at, :, low : low + rows], right[:, at]
            shape = (inputs.shape[1], G, outputs.shape[-1], I)
            own = buffer[: math.prod(shape)].view(shape)
            if G == 1:
                torch.bmm(outputs[0].mT, inputs[0], out=own[:, 0, :, :width])
            else:
                own[..., :width] = (outputs.mT @ inputs).transpose(0, 1)
            if width < I:
                own[..., width] = outputs.sum(2).transpose(0, 1)
            torch.addmm(out[at], own.flatten(1), flat, out=out[at])
    return out


def with_ones(right: Tensor, width: int) -> Tensor:
    """Rows ``[G, n, T, I]``, with the column of ones that was left out."""
    if right.shape[-1] == width:
        return right
    return torch.cat([right, right.new_ones((*right.shape[:-1], 1))], -1)


def _added(index: Tensor, rows: Tensor, size: int) -> Tensor:
    """Rows ``[n, T, I]`` added up by their indices ``[n, T]``, ``[1, n, size, I]``."""
    n, _, width = rows.shape
    out = rows.new_zeros((n * size, width))
    places = torch.arange(n, device=index.device)[:, None] * size + index
    return out.index_add_(0, places.reshape(-1), rows.flatten(0, 1)).view(1, n, size, width)


def formed(rows: int, count: int, shape: tuple[int, int, int], *, one_hot: bool = False) -> bool:
    r"""Whether it is cheaper to form gradients than to multiply directions by each row.

    Forming takes :math:`2 T O I`, and then :math:`2 Q O I` for all directions; otherwise it is
    :math:`2 T Q O I`. Of one-hot rows, forming takes :math:`T I` alone, and so does a direction.

    Args:
        rows: ``T``.
        count: ``Q``.
        shape: ``(G, O, I)``.
        one_hot: Whether left rows are.

    Example:
        >>> formed(16, 8, (1, 64, 64)), formed(1, 8, (1, 64, 64)), formed(16, 1, (1, 64, 64))
        (True, False, False)
    """
    _, O, I = shape
    if one_hot:
        return (2.0 * count + _PASS) * O < _PASS * rows * count
    forming = (2.0 * rows + 2.0 * count + _PASS) * O * I
    return forming < 2.0 * rows * count * O * I + _PASS * rows * count * min(O, I)
