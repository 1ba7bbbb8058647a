r"""Stacks of symmetric blocks, by batched factorizations in float64.

A stack is what a block-diagonal operator keeps for the blocks of one size: matrices, one matrix
that all share, or rows whose products the matrices are. Each knows how to multiply, solve and the
like for a range of its blocks, so that operators can work in chunks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from curvlib.core.partition import Partition

#: Entries of the matrices of one chunk of blocks (64 MB in float64).
CHUNK = 2**23


class Stack(ABC):
    """Blocks of one size, however they are kept: what :class:`BlockDiagonal` works on.

    Ranges ``start, stop`` are of blocks; ``X`` is ``[n, K, b]``, one row for each column. The
    second value of a pair says which blocks ``[n]`` are singular.
    """

    precision: float
    shared = False

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """What the blocks are made of, for fingerprints."""

    @abstractmethod
    def shifted(self, value: float) -> Stack:
        """All blocks plus ``value`` times the identity."""

    @abstractmethod
    def dense(self, start: int, stop: int) -> Tensor:
        """Matrices ``[n, b, b]``, a copy."""

    @abstractmethod
    def diagonal(self, start: int, stop: int) -> Tensor:
        """Diagonals ``[n, b]``."""

    @abstractmethod
    def apply(self, X: Tensor, start: int, stop: int) -> Tensor:
        """Products, ``[n, K, b]``."""

    @abstractmethod
    def solve(self, X: Tensor, start: int, stop: int, damping: float) -> tuple[Tensor, Tensor]:
        """Solutions ``[n, K, b]``."""

    @abstractmethod
    def inverse_diagonal(self, start: int, stop: int, damping: float) -> tuple[Tensor, Tensor]:
        """Diagonals of inverses, ``[n, b]``."""

    @abstractmethod
    def logdet(self, start: int, stop: int, damping: float) -> tuple[Tensor, Tensor]:
        """Logarithms of determinants, ``[n]``."""


class MatrixStack(Stack):
    """Blocks as matrices ``[n, b, b]`` plus shifts ``[n]`` of their diagonals."""

    def __init__(self, matrices: Tensor, shift: Tensor | float = 0.0) -> None:
        n = len(matrices)
        self.shared = n > 1 and matrices.stride(0) == 0 and not isinstance(shift, Tensor)
        self.matrices = matrices
        self.shift = shift
        self.precision = torch.finfo(matrices.dtype).eps

    def tensors(self) -> list[Tensor]:
        """What the blocks are made of, one matrix where they are the same."""
        first = self.matrices[:1] if self.shared else self.matrices
        return [first, torch.as_tensor(self.shift, dtype=torch.float64)]

    def shifted(self, value: float) -> MatrixStack:
        """The same matrices, which are not copied."""
        return MatrixStack(self.matrices, self.shift + value)

    def _shifts(self, start: int, stop: int) -> Tensor | float:
        if isinstance(self.shift, Tensor):
            return self.shift[start:stop, None]
        return self.shift

    def _distinct(self, start: int, stop: int, damping: float) -> Tensor:
        """Damped matrices in float64, one for all where they are the same."""
        stop = start + 1 if self.shared else stop
        out = self.matrices[start:stop].to(torch.float64, copy=True)
        out.diagonal(dim1=-2, dim2=-1).add_(self._shifts(start, stop)).add_(damping)
        return out

    def dense(self, start: int, stop: int) -> Tensor:
        """Matrices ``[n, b, b]``, a copy."""
        out = self.matrices[start:stop].clone(memory_format=torch.contiguous_format)
        out.diagonal(dim1=-2, dim2=-1).add_(self._shifts(start, stop))
        return out

    def diagonal(self, start: int, stop: int) -> Tensor:
        """Diagonals ``[n, b]``."""
        return self.matrices[start:stop].diagonal(dim1=-2, dim2=-1) + self._shifts(start, stop)

    def apply(self, X: Tensor, start: int, stop: int) -> Tensor:
        """Products, ``[n, K, b]``."""
        shifts = self._shifts(start, stop)
        shifts = shifts[:, None].to(X) if isinstance(shifts, Tensor) else shifts
        X = X.to(self.matrices.dtype)
        if self.shared:
            return X @ self.matrices[0] + shifts * X
        return X @ self.matrices[start:stop] + shifts * X

    def solve(self, X: Tensor, start: int, stop: int, damping: float) -> tuple[Tensor, Tensor]:
        """Solutions ``[n, K, b]``, in float64."""
        M = self._distinct(start, stop, damping)
        n, count, b = X.shape
        right = X.double().reshape(1, n * count, b) if self.shared else X.double()
        out, bad = solve_blocks(M, right.mT, self.precision)
        return out.mT.reshape(n, count, b), bad.expand(n)

    def inverse_diagonal(self, start: int, stop: int, damping: float) -> tuple[Tensor, Tensor]:
        """Diagonals of inverses, ``[n, b]``, in float64."""
        M = self._distinct(start, stop, damping)
        out, bad = solve_blocks(M, torch.eye(M.shape[-1]).to(M).expand_as(M), self.precision)
        entries = out.diagonal(dim1=-2, dim2=-1)
        return entries.expand(stop - start, -1), bad.expand(stop - start)

    def logdet(self, start: int, stop: int, damping: float) -> tuple[Tensor, Tensor]:
        """Logarithms of determinants, ``[n]``, in float64."""
        M = self._distinct(start, stop, damping)
        factor, bad = cholesky(M, self.precision)
        each = 2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return each.expand(stop - start), bad.expand(stop - start)


def cholesky(M: Tensor, precision: float) -> tuple[Tensor, Tensor]:
    """Cholesky factors, and which matrices are not positive definite to working precision.

    A pivot that is a rounding error of its diagonal entry has lost all digits: the criterion does
    not depend on the scale of any coordinate.
    """
    factor, info = torch.linalg.cholesky_ex(M)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    lost = ~(pivots > 8.0 * precision * M.diagonal(dim1=-2, dim2=-1))
    return factor, (info > 0) | lost.any(-1)


def solve_blocks(M: Tensor, right: Tensor, precision: float) -> tuple[Tensor, Tensor]:
    """Solutions of ``M [n, b, b]``, ``right [n, b, K]``; and which matrices are singular.

    Matrices that are not positive definite, but regular, are solved by their eigenvalues.
    """
    factor, bad = cholesky(M, precision)
    if not bool(bad.any()):
        return torch.cholesky_solve(right, factor), bad
    eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    out = torch.cholesky_solve(right, torch.where(bad[:, None, None], eye, factor))
    values, vectors = torch.linalg.eigh(M[bad])
    magnitude = values.abs()
    singular = magnitude.amin(-1) <= 8.0 * precision * magnitude.amax(-1)
    values = torch.where(values == 0.0, 1.0, values)
    out[bad] = vectors @ ((vectors.mT @ right[bad]) / values.unsqueeze(-1))
    bad = bad.clone()
    bad[bad.nonzero()[:, 0]] = singular
    return out, bad


def checked_matrices(partition: Partition, matrices: Sequence[Tensor]) -> list[Tensor]:
    """The matrices of each stack of a partition, if they fit it.

    Raises:
        TypeError: If a matrix is none of float32 or float64.
        ValueError: If shapes or devices do not fit.
    """
    if not isinstance(partition, Partition):
        raise TypeError(f"expected a Partition, got {type(partition).__name__}")
    out = list(matrices)
    if len(out) != len(partition.stacks):
        raise ValueError(
            f"expected one tensor of matrices for each of {len(partition.stacks)} stacks, "
            f"got {len(out)}"
        )
    for k, (matrix, stack) in enumerate(zip(out, partition.stacks, strict=True)):
        if not isinstance(matrix, Tensor):
            raise TypeError(f"expected a torch.Tensor for stack {k}, got {type(matrix).__name__}")
        n, b = stack.shape
        if matrix.shape != (n, b, b):
            raise ValueError(
                f"expected matrices {[n, b, b]} for stack {k}, got {list(matrix.shape)}"
            )
        if matrix.dtype not in (torch.float32, torch.float64) or matrix.dtype != out[0].dtype:
            raise TypeError(
                "expected matrices that are all float32 or all float64, got "
                f"{matrix.dtype} for stack {k}"
            )
        if matrix.device != stack.device:
            raise ValueError(
                f"stack {k} has indices on {stack.device}, but matrices on {matrix.device}"
            )
    return out


def require_symmetric(partition: Partition, k: int, matrix: Tensor) -> None:
    """Raises ValueError unless the blocks of stack ``k`` are finite and symmetric."""
    shared = len(matrix) > 1 and matrix.stride(0) == 0
    eps = torch.finfo(matrix.dtype).eps
    for start, stop in [(0, 1)] if shared else partition.chunks(k, CHUNK):
        part = matrix[start:stop]
        size = part.abs().amax((-2, -1))
        bad = ~torch.isfinite(size)
        if bool(bad.any()):
            where = partition.where(k, start + int(bad.nonzero()[0]))
            raise ValueError(f"{where} has entries that are NaN or infinite")
        gap = (part - part.mT).abs().amax((-2, -1))
        bad = gap > 100.0 * eps * size
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            raise ValueError(
                f"expected symmetric blocks, but {partition.where(k, start + first)} differs from "
                f"its transpose by {float(gap[first]):.1e}; use 0.5 * (M + M.mT)"
            )
