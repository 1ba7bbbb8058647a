r"""Directions of low rank: many queries in the memory of few.

The preconditioned gradient of a query, :math:`D_q \in \mathbb{R}^{O \times I}`, is kept as
:math:`L_q R_q` with :math:`L_q` of shape :math:`[O, r_q]`, so that the score of row ``t`` is

.. math:: l_{nt}^\top D_q\, r_{nt} \approx \sum_{k \le r_q} (l_{nt}^\top L_q)_k (R_q r_{nt})_k .

The memory is :math:`r (O + I)` instead of :math:`O I` for each query, hence so many more queries
share one scan of the training data (Grosse et al., 2023, section 3.2.2). Where there are many rows
of many examples, it is less work to form gradients, and :math:`L_q R_q` of a few queries at a time
for all of them: :math:`n (T + Q) O I + Q r O I` instead of :math:`n T Q r (O + I)` multiplications.
What is left out is known:
with the Frobenius norm of the rest, the score of a gradient :math:`G` is off by

.. math:: |\langle D_q - L_q R_q, G \rangle| \le \|D_q - L_q R_q\|_F \, \|G\|_F

at most (Cauchy-Schwarz), a bound that holds for each score and not only on average. It is about
the directions as they are stored; rounding in the products themselves comes on top, as it does
for dense directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlib.operators.scores.directions import (
    BlockDirections,
    DenseDirections,
    by_gradients,
    with_ones,
)

#: Bytes that intermediate products may take.
CHUNK = 64 * 2**20
#: Bytes of products of rows that are summed: they stay in the processor's cache.
ROWS = 4 * 2**20
#: Work of writing and reading an entry, in multiplications.
PASS = 5


@dataclass(frozen=True, eq=False)
class LowRankDirections:
    r"""Directions :math:`L_q R_q`, of their own rank each.

    Attributes:
        left: All :math:`L_q` side by side, ``[G, O, R]`` with ``R`` the sum of ranks.
        right: All :math:`R_q`, one below the other, ``[G, R, I]``.
        ranks: Rank of each query, int64 on the CPU, ``[Q]``.
        residual: Frobenius norm of what each query leaves out, rounded up, float64 ``[Q]``.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> left, right = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[3.0, 0.0, 1.0]]])
        >>> D = LowRankDirections(left, right, torch.tensor([1]), torch.tensor([0.5]))
        >>> D.contract(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 3))
        tensor([[12.]])
        >>> D.bound(torch.tensor([10.0]))
        tensor([[5.]])
    """

    left: Tensor
    right: Tensor
    ranks: Tensor
    residual: Tensor

    def __post_init__(self) -> None:
        total = int(self.ranks.sum())
        fits = (
            self.left.ndim == self.right.ndim == 3
            and self.left.shape[0] == self.right.shape[0]
            and self.left.shape[2] == self.right.shape[1] == total
            and self.ranks.shape == self.residual.shape
            and self.ranks.ndim == 1
        )
        if not fits:
            raise ValueError(
                f"expected left [G, O, R], right [G, R, I], ranks and residual [Q] with R = "
                f"{total}, the sum of ranks, got {list(self.left.shape)}, "
                f"{list(self.right.shape)}, {list(self.ranks.shape)} and "
                f"{list(self.residual.shape)}"
            )

    @property
    def count(self) -> int:
        """``Q``."""
        return len(self.ranks)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(G, O, I)``."""
        return self.left.shape[0], self.left.shape[1], self.right.shape[2]

    @property
    def bytes(self) -> int:
        """Memory that is held."""
        held = (self.left, self.right, self.ranks, self.residual)
        return sum(t.numel() * t.element_size() for t in held)

    def contract(self, left: Tensor, right: Tensor) -> Tensor:
        r""":math:`\sum_t l_{nt}^\top L_q R_q r_{nt}`, ``[n, Q]``.

        Args:
            left: Rows ``[G, n, T, O]``, or indices ``[n, T]`` of rows that are one-hot.
            right: Rows ``[G, n, T, I]``, or without a last column of ones.
        """
        _, n, T, _ = right.shape
        if left.is_floating_point() and self._formed(n, T):
            return self._by_gradients(left, right)
        out = right.new_empty((n, self.left.shape[2]))
        for at, products in self._products(left, right, ROWS):
            torch.sum(products, (0, 2), out=out[at])
        return self._summed(out)

    def contract_tokens(self, left: Tensor, right: Tensor) -> Tensor:
        r""":math:`l_{nt}^\top L_q R_q r_{nt}`, ``[n, Q, T]``; arguments as of :meth:`contract`."""
        _, n, T, _ = right.shape
        out = right.new_empty((n, self.count, T))
        for at, products in self._products(left, right, CHUNK):
            out[at] = self._summed(products.sum(0).flatten(0, 1)).unflatten(0, (-1, T)).mT
        return out

    def bound(self, norms: Tensor) -> Tensor:
        """What scores may be off by at most, ``[n, Q]``, for gradients of these norms ``[n]``."""
        return (norms.double()[:, None] * self.residual.to(norms.device)).to(norms.dtype)

    def dense(self) -> Tensor:
        """The directions as matrices, ``[Q, G, O, I]``."""
        return torch.stack([self.left[..., at] @ self.right[:, at] for at in spans(self.ranks)])

    def _formed(self, n: int, T: int) -> bool:
        """Whether gradients of ``n`` examples with ``T`` rows are less work than the rows."""
        _, O, I = self.shape
        total, count = self.left.shape[2], self.count
        forming = (n * (T + count + PASS) + total + PASS * count) * O * I
        return forming < n * T * total * (O + I + PASS)

    def _by_gradients(self, left: Tensor, right: Tensor) -> Tensor:
        """Scores by gradients, with a few directions at a time as matrices."""
        G, O, I = self.shape
        places = spans(self.ranks)
        step = max(1, CHUNK // max(1, G * O * I * right.element_size()))
        rows = None
        if step < self.count:  # gradients are formed once
            rows = (left.mT @ with_ones(right, I)).transpose(0, 1).flatten(1)
        found = []
        for start in range(0, self.count, step):
            few = places[start : start + step]
            matrices = right.new_empty((len(few), G, O, I))
            for own, at in zip(matrices, few, strict=True):
                torch.bmm(self.left[..., at], self.right[:, at], out=own)
            if rows is None:
                return by_gradients(left, right, matrices)
            found.append(rows @ matrices.flatten(1).mT)
        return torch.cat(found, 1)

    def _products(self, left: Tensor, right: Tensor, memory: int) -> Iterator[tuple[slice, Tensor]]:
        """For some examples at a time, the terms of all queries, ``[G, n, T, R]``."""
        G, n, T, width = right.shape
        total = self.left.shape[2]
        step = max(1, min(n, memory // max(1, 2 * G * T * total * right.element_size())))
        ones = self.right[:, None, :, -1] if width < self.right.shape[2] else None
        columns = self.right[..., :width].mT
        buffers = right.new_empty((2, G, step * T, total))
        for start in range(0, n, step):
            at = slice(start, min(start + step, n))
            first, second = buffers[:, :, : (at.stop - start) * T]
            if left.is_floating_point():
                torch.bmm(left[:, at].flatten(1, 2), self.left, out=first)
            else:
                torch.index_select(self.left[0], 0, left[at].reshape(-1), out=first[0])
            rows = right[:, at].flatten(1, 2)
            if ones is None:
                torch.bmm(rows, columns, out=second)
            else:
                torch.baddbmm(ones, rows, columns, out=second)
            yield at, first.mul_(second).unflatten(1, (-1, T))

    def _summed(self, terms: Tensor) -> Tensor:
        """Sums ``[m, Q]`` over each query's own of terms ``[m, R]``."""
        first = int(self.ranks[0]) if self.count else 0
        if first and bool((self.ranks == first).all()):
            own: Tensor = terms.unflatten(1, (-1, first))
            return own.sum(-1)
        lengths = self.ranks.to(terms.device)
        sums: Tensor = torch.segment_reduce(
            terms.mT.contiguous(), "sum", lengths=lengths, axis=0, initial=0
        )
        return sums.mT


def spans(ranks: Tensor) -> list[slice]:
    """Where each query's columns are."""
    ends = ranks.cumsum(0).tolist()
    return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]


@dataclass(frozen=True, eq=False)
class JoinedDirections:
    """Directions of several bodies, one after the other.

    Attributes:
        parts: The bodies, at least one, all of one shape.
    """

    parts: tuple[BlockDirections, ...]

    @property
    def count(self) -> int:
        """``Q``."""
        return sum(part.count for part in self.parts)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(G, O, I)``."""
        return self.parts[0].shape

    @property
    def bytes(self) -> int:
        """Memory that is held."""
        return sum(part.bytes for part in self.parts)

    def contract(self, left: Tensor, right: Tensor) -> Tensor:
        """Scores ``[n, Q]``."""
        return torch.cat([part.contract(left, right) for part in self.parts], 1)

    def contract_tokens(self, left: Tensor, right: Tensor) -> Tensor:
        """Scores of rows ``[n, Q, T]``."""
        return torch.cat([part.contract_tokens(left, right) for part in self.parts], 1)

    def bound(self, norms: Tensor) -> Tensor:
        """What scores may be off by at most, ``[n, Q]``, for gradients of these norms ``[n]``."""
        return torch.cat([part.bound(norms) for part in self.parts], 1)

    def dense(self) -> Tensor:
        """The directions as matrices, ``[Q, G, O, I]``."""
        return torch.cat([part.dense() for part in self.parts])


def joined(parts: Sequence[BlockDirections]) -> BlockDirections:
    """The directions of several batches of queries in one block, in order.

    Raises:
        ValueError: If there are none, or their shapes differ.

    Example:
        >>> parts = [DenseDirections(torch.ones(q, 1, 2, 3)) for q in (2, 5)]
        >>> joined(parts).count
        7
    """
    shapes = {part.shape for part in parts}
    if len(shapes) != 1:
        raise ValueError(f"expected directions of one shape (G, O, I), got {sorted(shapes)}")
    if len(parts) == 1:
        return parts[0]
    low = [part for part in parts if isinstance(part, LowRankDirections)]
    if len(low) == len(parts):
        return LowRankDirections(
            torch.cat([part.left for part in low], 2),
            torch.cat([part.right for part in low], 1),
            torch.cat([part.ranks for part in low]),
            torch.cat([part.residual for part in low]),
        )
    dense = [part.matrices for part in parts if isinstance(part, DenseDirections)]
    if len(dense) == len(parts):
        return DenseDirections(torch.cat(dense))
    return JoinedDirections(tuple(parts))
