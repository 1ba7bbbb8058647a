"""Blocks of coordinates as matrices, with eigenvectors on their left and their right.

See :mod:`curvlib.core.kronecker` for what they are of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from curvlib.core.ranks.spread_blocks import SpreadBlock
    from curvlib.core.space import ParamSpace


@dataclass(frozen=True)
class Part:
    """Some columns of a block's matrix, and where they lie in the flat vector.

    Attributes:
        start: Where their entries begin; they are contiguous.
        columns: How many columns.
        transposed: Whether they lie column after column, rather than row after row.
    """

    start: int
    columns: int
    transposed: bool = False


@dataclass(frozen=True, eq=False)
class KroneckerBlock:
    r"""One block: ``G`` matrices of shape ``[O, I]`` (``G > 1`` for grouped convolutions).

    Attributes:
        name: Name, for messages.
        parts: Where the columns are, from left to right.
        left: :math:`Q_L`, ``[G, O, O]``, or ``None`` for the identity.
        right: :math:`Q_R`, ``[G, I, I]``, or ``None`` for the identity.
        eigenvalues: :math:`\Lambda`, ``[G, O, I]``.
    """

    name: str
    parts: tuple[Part, ...]
    left: Tensor | None
    right: Tensor | None
    eigenvalues: Tensor

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return self.eigenvalues.numel()

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Coordinates of each part, from start to stop."""
        rows = self.eigenvalues.shape[0] * self.eigenvalues.shape[1]
        return [(part.start, part.start + rows * part.columns) for part in self.parts]

    def gather(self, rows: Tensor) -> Tensor:
        """Entries of flat rows ``[K, P]`` as matrices ``[K, G, O, I]``."""
        G, O, _ = self.eigenvalues.shape
        found = []
        for part, (start, stop) in zip(self.parts, self.ranges, strict=True):
            flat = rows[:, start:stop]
            if part.transposed:
                found.append(flat.reshape(-1, G, part.columns, O).mT)
            else:
                found.append(flat.reshape(-1, G, O, part.columns))
        return found[0] if len(found) == 1 else torch.cat(found, -1)

    def scatter(self, matrices: Tensor, rows: Tensor) -> None:
        """Writes matrices ``[K, G, O, I]`` into flat rows ``[K, P]``."""
        column = 0
        for part, (start, stop) in zip(self.parts, self.ranges, strict=True):
            piece = matrices[..., column : column + part.columns]
            piece = piece.mT if part.transposed else piece
            rows[:, start:stop] = piece.reshape(rows.shape[0], stop - start)
            column += part.columns

    def multiply(self, rows: Tensor, values: Tensor, out: Tensor) -> None:
        """Writes the product of the block with other eigenvalues into flat rows ``[K, P]``.

        Args:
            rows: Vectors, ``[K, P]``.
            values: Eigenvalues, ``[G, O, I]``.
            out: ``[K, P]``.
        """
        self.scatter(self.restored(self.rotated(self.gather(rows)) * values), out)

    def at(self, parts: tuple[Part, ...], space: ParamSpace) -> KroneckerBlock:  # noqa: ARG002
        """The block with its parts elsewhere, in another space."""
        return replace(self, parts=parts)

    def wholes(self) -> Iterator[Tensor]:
        """The tensors of the block."""
        yield from tensors_of(self)

    def rotated(self, X: Tensor) -> Tensor:
        r""":math:`Q_L^\top X Q_R` of matrices ``[..., G, O, I]``."""
        X = X if self.left is None else self.left.mT @ X
        return X if self.right is None else X @ self.right

    def restored(self, X: Tensor) -> Tensor:
        r""":math:`Q_L X Q_R^\top`, the inverse of :meth:`rotated`."""
        X = X if self.left is None else self.left @ X
        return X if self.right is None else X @ self.right.mT

    def diagonal(self) -> Tensor:
        r""":math:`(Q_L \circ Q_L) \Lambda (Q_R \circ Q_R)^\top`, ``[G, O, I]``."""
        X = self.eigenvalues
        X = X if self.left is None else self.left.square() @ X
        return X if self.right is None else X @ self.right.square().mT


def tensors_of(block: KroneckerBlock | SpreadBlock) -> Iterator[Tensor]:
    """The tensors of a block, as this process holds them."""
    yield from (t for t in (block.left, block.right, block.eigenvalues) if t is not None)


def checked(blocks: Sequence[KroneckerBlock | SpreadBlock]) -> tuple[torch.dtype, torch.device]:
    """Type and device of all blocks, which are checked."""
    if not blocks:
        raise ValueError("expected at least one block, got none")
    names = [block.name for block in blocks]
    if len(set(names)) != len(names):
        raise ValueError(f"expected blocks of different names, got {names}")
    dtype, device = blocks[0].eigenvalues.dtype, blocks[0].eigenvalues.device
    for block in blocks:
        _check_shapes(block)
        for tensor in tensors_of(block):
            if tensor.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"expected block {block.name!r} in float32 or float64, got {tensor.dtype}"
                )
            if tensor.dtype != dtype or tensor.device != device:
                raise ValueError(
                    f"expected all blocks as {dtype} on {device}, got {tensor.dtype} on "
                    f"{tensor.device} in block {block.name!r}"
                )
            bad = tensor.numel() - int(torch.isfinite(tensor).sum())
            if bad:
                raise ValueError(
                    f"{bad} of {tensor.numel()} entries of block {block.name!r} are NaN or infinite"
                )
    return dtype, device


def _check_shapes(block: KroneckerBlock | SpreadBlock) -> None:
    if not isinstance(block, KroneckerBlock):
        return  # made of slices by curvlib alone
    shape = tuple(block.eigenvalues.shape)
    if len(shape) != 3 or sum(part.columns for part in block.parts) != shape[-1]:
        raise ValueError(
            f"expected eigenvalues [G, O, I] of block {block.name!r} with as many columns as its "
            f"parts, {sum(part.columns for part in block.parts)}, got {list(shape)}"
        )
    groups, *sides = shape
    for side, Q, n in zip(("left", "right"), (block.left, block.right), sides, strict=True):
        if Q is not None and tuple(Q.shape) != (groups, n, n):
            raise ValueError(
                f"expected {side} eigenvectors {[groups, n, n]} of block {block.name!r}, got "
                f"{list(Q.shape)}"
            )


def uncovered(blocks: Sequence[KroneckerBlock | SpreadBlock], size: int) -> list[tuple[int, int]]:
    """Coordinates in no block, as ranges."""
    found, last = [], 0
    covered = sorted((start, stop, b.name) for b in blocks for start, stop in b.ranges)
    for start, stop, name in covered:
        if start < last:
            raise ValueError(f"block {name!r} overlaps another; blocks must be disjoint")
        if stop > size:
            raise ValueError(f"block {name!r} ends at {stop}, but there are {size} coordinates")
        if start > last:
            found.append((last, start))
        last = stop
    return [*found, (last, size)] if last < size else found
