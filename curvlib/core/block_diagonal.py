r"""Block-diagonal matrices, whose blocks are solved, inverted and raised to powers exactly.

.. math:: A_{II} = M_I + s_I\,\mathbb{1} \text{ for each block } I, \qquad A_{pq} = 0 \text{ else},

for the disjoint blocks of a :class:`~curvlib.core.partition.Partition`. A coordinate that is in no
block has the entry ``rest`` on the diagonal (zero, unless the operator was shifted).

Blocks are worked on in chunks of a stack, by batched float64 Cholesky factorizations whatever
their own type. A stack whose blocks are all the same matrix (an expanded tensor: the rows of a
layer that share one Gram matrix of inputs) is factorized once, and never materialized whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from curvlib.core.algebra import Index, indices
from curvlib.core.arguments import finite_number
from curvlib.core.block_stacks import (
    CHUNK,
    MatrixStack,
    Stack,
    checked_matrices,
    require_symmetric,
    solve_blocks,
)
from curvlib.core.digest import digest
from curvlib.core.operator import LinearOperator
from curvlib.core.partition import Partition
from curvlib.core.structured import on_columns


class BlockDiagonal(LinearOperator):
    """A symmetric block-diagonal matrix.

    Args:
        partition: The blocks.
        matrices: One symmetric tensor ``[n, b, b]`` for each stack of the partition. It may be
            an expanded tensor (``gram.expand(n, b, b)``) where blocks are the same. It is kept,
            not copied.
        psd: Whether all blocks are known to be positive semi-definite.
        name: What it is, for legends and reports.

    Attributes:
        partition: The blocks.
        rest: The diagonal entry of coordinates that are in no block.

    Raises:
        TypeError: If a matrix is none of float32 or float64.
        ValueError: If shapes, types or devices do not fit, a block is not symmetric or an entry
            not finite.

    Example:
        >>> partition = Partition((torch.tensor([[0, 1], [2, 3]]),), 5)
        >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> A = BlockDiagonal(partition, [matrix.expand(2, 2, 2)])
        >>> (A @ torch.ones(5)).tolist(), A.solve(torch.ones(5), damping=1.0).tolist()
        ([3.0, 3.0, 3.0, 3.0, 0.0], [0.25, 0.25, 0.25, 0.25, 1.0])
    """

    def __init__(
        self,
        partition: Partition,
        matrices: Sequence[Tensor],
        *,
        psd: bool = True,
        name: str = "block diagonal",
    ) -> None:
        checked = checked_matrices(partition, matrices)
        stacks = tuple(MatrixStack(m) for m in checked)
        self._build(partition, stacks, checked[0].dtype, rest=0.0, psd=psd, name=name)
        for k, matrix in enumerate(checked):
            require_symmetric(partition, k, matrix)

    def _build(
        self,
        partition: Partition,
        stacks: Sequence[Stack],
        dtype: torch.dtype,
        *,
        rest: float,
        psd: bool,
        name: str,
    ) -> None:
        super().__init__(
            self._apply,
            (partition.size, partition.size),
            dtype=dtype,
            device=partition.device,
            symmetric=True,
            psd=psd,
            space=partition.space,
            name=name,
            identity=self._digest,
        )
        self.partition = partition
        self.rest = rest
        self._stacks = tuple(stacks)

    def _digest(self) -> str:
        tensors = [t for stack in self._stacks for t in stack.tensors()]
        return digest([*self.partition.stacks, *tensors]) + repr(self.rest)

    def _same(self, stacks: Sequence[Stack], *, rest: float, psd: bool, name: str) -> BlockDiagonal:
        out = BlockDiagonal.__new__(BlockDiagonal)
        out._build(self.partition, stacks, self.dtype, rest=rest, psd=psd, name=name)
        return out

    # ------------------------------------------------------------------ products
    def _apply(self, V: Tensor) -> Tensor:
        return self._on_blocks(V, self.rest, lambda k, s, e, X: self._stacks[k].apply(X, s, e))

    def _on_blocks(
        self, V: Tensor, rest: float, function: Callable[[int, int, int, Tensor], Tensor]
    ) -> Tensor:
        """A function of ``(stack, start, stop, X [n, K, b])`` on all blocks; ``rest`` elsewhere."""
        rows = V.mT
        out = rows * rest if rest and self.partition.uncovered.numel() else torch.zeros_like(rows)
        for k, start, stop, index in self._ranges():
            X = rows[:, index].view(rows.shape[0], stop - start, -1).transpose(0, 1)
            Y = function(k, start, stop, X).to(self.dtype)
            out[:, index] = Y.transpose(0, 1).reshape(rows.shape[0], -1)
        return out.mT

    def _ranges(self) -> Any:
        for k, stack in enumerate(self.partition.stacks):
            for start, stop in self.partition.chunks(k, CHUNK):
                yield k, start, stop, stack[start:stop].reshape(-1)

    def solve(self, x: Tensor, damping: float = 0.0) -> Tensor:
        r""":math:`(A + \text{damping}\, I)^{-1} x` for ``x`` of shape ``[P]`` or ``[P, K]``.

        Raises:
            RuntimeError: If a damped block is singular to working precision (named by its
                parameter), or a coordinate is in no block and there is no damping.
        """
        value = finite_number("damping", damping)
        self._require_rest(value, "solve")

        def solved(k: int, start: int, stop: int, X: Tensor) -> Tensor:
            out, bad = self._stacks[k].solve(X, start, stop, value)
            self._require_regular(k, start, bad, value)
            return out

        rest = 1.0 / (self.rest + value) if self.partition.uncovered.numel() else 0.0
        return on_columns(self, x, lambda V: self._on_blocks(V, rest, solved))

    # ------------------------------------------------------------------- blocks
    def dense(self, stack: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Some blocks of a stack as matrices ``[n, b, b]``: a copy, which may be written to.

        Args:
            stack: Which stack of the partition.
            start: Its first block.
            stop: And the one after the last; all that follow if omitted.

        Raises:
            ValueError: If there is no such stack or range.
        """
        start, stop = self._range(stack, start, stop)
        return self._stacks[stack].dense(start, stop).to(self.dtype)

    def inverse_diagonal(self, damping: float = 0.0) -> Tensor:
        r"""The diagonal of :math:`(A + \text{damping}\, I)^{-1}`, ``[P]``.

        Raises:
            RuntimeError: As :meth:`solve`.
        """
        value = finite_number("damping", damping)
        self._require_rest(value, "the diagonal of the inverse")
        rest = 1.0 / (self.rest + value) if self.partition.uncovered.numel() else 0.0
        out = torch.full((self.shape[0],), rest, dtype=self.dtype, device=self.device)
        for k, start, stop, index in self._ranges():
            entries, bad = self._stacks[k].inverse_diagonal(start, stop, value)
            self._require_regular(k, start, bad, value)
            out[index] = entries.to(self.dtype).reshape(-1)
        return out

    def inverse_submatrix(self, index: Index, damping: float = 0.0) -> Tensor:
        r"""Rows and columns ``index`` of :math:`(A + \text{damping}\, I)^{-1}`, ``[k, k]``.

        Only the blocks that hold one of the coordinates are inverted.

        Args:
            index: Indices, a boolean mask, a slice, or name globs of parameters.
            damping: Added to the diagonal.

        Raises:
            ValueError: If an index is out of range, or a glob matches nothing.
            RuntimeError: As :meth:`solve`.
        """
        value = finite_number("damping", damping)
        where = indices(self, index, 0)
        places = self.partition.places[where]
        out = torch.zeros((len(where), len(where)), dtype=self.dtype, device=self.device)
        outside = (places < 0).nonzero()[:, 0]
        if outside.numel():
            self._require_rest(value, "the inverse")
            out[outside, outside] = 1.0 / (self.rest + value)
        begin = 0
        for k, stack in enumerate(self.partition.stacks):
            n, b = stack.shape
            mine = ((places >= begin) & (places < begin + n * b)).nonzero()[:, 0]
            block, entry = (places[mine] - begin) // b, (places[mine] - begin) % b
            for number in block.unique().tolist():
                M = self._stacks[k].dense(number, number + 1)
                here = block == number
                inverse = self._inverted(k, number, M, value)[0].to(self.dtype)
                rows, entries = mine[here], entry[here]
                out[rows[:, None], rows] = inverse[entries[:, None], entries]
            begin += n * b
        return out

    def inverse_element(self, p: int, q: int, damping: float = 0.0) -> float:
        r"""The entry ``(p, q)`` of :math:`(A + \text{damping}\, I)^{-1}`; zero across blocks.

        Raises:
            ValueError: If an index is out of range.
            RuntimeError: As :meth:`solve`.
        """
        found = self.inverse_submatrix([p] if p == q else [p, q], damping)
        return float(found[0, -1])

    def diagonal(self) -> Tensor:
        """The diagonal, ``[P]``."""
        out = torch.full((self.shape[0],), self.rest, dtype=self.dtype, device=self.device)
        for k, start, stop, index in self._ranges():
            out[index] = self._stacks[k].diagonal(start, stop).to(self.dtype).reshape(-1)
        return out

    def trace(self) -> float:
        """The sum of the diagonal."""
        return float(self.diagonal().sum(dtype=torch.float64))

    def logdet(self, damping: float = 0.0) -> float:
        r""":math:`\log \det (A + \text{damping}\, I)`.

        Raises:
            RuntimeError: If a damped block is not positive definite.
        """
        value = finite_number("damping", damping)
        outside = self.partition.uncovered.numel()
        if outside and self.rest + value <= 0.0:
            raise RuntimeError(
                f"log det of {self!r} with damping={value:g} needs positive eigenvalues, but "
                f"{outside} coordinates are in no block, where it is {self.rest + value:g}; pass "
                f"damping > {-self.rest:g}"
            )
        total = torch.tensor(self.rest + value, dtype=torch.float64).log() if outside else 0.0
        total = float(total * outside)
        for k, start, stop, _ in self._ranges():
            each, bad = self._stacks[k].logdet(start, stop, value)
            if bool(bad.any()):
                first = int(bad.nonzero()[0])
                raise RuntimeError(
                    f"log det of {self!r} with damping={value:g} needs positive eigenvalues, but "
                    f"at least {int(bad.sum())} blocks have others, the first is "
                    f"{self.partition.where(k, start + first)}; pass a larger damping="
                )
            total += float(each.sum())
        return total

    # ------------------------------------------------------------------- algebra
    def shift(self, value: float) -> BlockDiagonal:
        """``A + value * I``, of the same kind; the blocks are not copied."""
        name = super().shift(value).name
        stacks = [stack.shifted(float(value)) for stack in self._stacks]
        psd = self.psd and value >= 0
        return self._same(stacks, rest=self.rest + float(value), psd=psd, name=name)

    def power(self, p: float) -> BlockDiagonal:
        """``A ** p``, of the same kind; ``p = 0`` is the identity.

        Eigenvalues of a positive semi-definite block that rounding made negative count as zero.

        Raises:
            RuntimeError: If a power of an eigenvalue is not real, or not finite.
        """
        p = finite_number("p", p)
        return self._mapped(lambda k, start, M: self._powers(k, start, M, p), p)

    def inverse(self, damping: float = 0.0) -> BlockDiagonal:
        r""":math:`(A + \text{damping}\, I)^{-1}`, of the same kind.

        Raises:
            RuntimeError: As :meth:`solve`.
        """
        value = finite_number("damping", damping)
        self._require_rest(value, "the inverse")

        outside = self.partition.uncovered.numel()
        rest = 1.0 / (self.rest + value) if outside else 0.0
        return self._like_blocks(
            lambda k, start, M: self._inverted(k, start, M, value),
            rest,
            self.psd and value >= 0,
            f"({self.name})^-1",
        )

    def _inverted(self, k: int, start: int, M: Tensor, damping: float) -> Tensor:
        M = M.to(torch.float64, copy=True)
        M.diagonal(dim1=-2, dim2=-1).add_(damping)
        eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device).expand_as(M)
        out, bad = solve_blocks(M, eye, self._stacks[k].precision)
        self._require_regular(k, start, bad, damping)
        return 0.5 * (out + out.mT)

    def _mapped(self, function: Callable[[int, int, Tensor], Tensor], p: float) -> BlockDiagonal:
        rest = 0.0
        if self.partition.uncovered.numel():
            if self.rest == 0.0 and p < 0:
                self._require_rest(0.0, f"power {p:g}")
            if self.rest < 0.0 and not p.is_integer():
                raise RuntimeError(
                    f"power {p:g} of {self!r} is not real: it is {self.rest:g} where there is no "
                    f"block; use op.shift({-self.rest:.3g}) or an integer power"
                )
            rest = self.rest**p
        return self._like_blocks(function, rest, self.psd or p % 2 == 0, f"({self.name})^{p:g}")

    def _like_blocks(
        self, function: Callable[[int, int, Tensor], Tensor], rest: float, psd: bool, name: str
    ) -> BlockDiagonal:
        """The operator whose blocks are a function of ``(stack, start, blocks [n, b, b])``."""
        out = []
        for k, stack in enumerate(self.partition.stacks):
            n, b = stack.shape
            if self._stacks[k].shared:
                one = function(k, 0, self._stacks[k].dense(0, 1)).to(self.dtype)
                out.append(MatrixStack(one.expand(n, b, b)))
                continue
            new = torch.empty((n, b, b), dtype=self.dtype, device=self.device)
            for start, stop in self.partition.chunks(k, CHUNK):
                new[start:stop] = function(k, start, self._stacks[k].dense(start, stop))
            out.append(MatrixStack(new))
        return self._same(out, rest=rest, psd=psd, name=name)

    def _powers(self, k: int, start: int, M: Tensor, p: float) -> Tensor:
        values, vectors = torch.linalg.eigh(M.double())
        noise = self._stacks[k].precision * values.shape[-1] * values.abs().amax(-1, keepdim=True)
        if self.psd:
            values = values.clamp(min=0.0)
        negative = (values < 0).any(-1)
        if bool(negative.any()) and not p.is_integer():
            first = int(negative.nonzero()[0])
            least = float(values.min())
            raise RuntimeError(
                f"power {p:g} of {self!r} is not real: {int(negative.sum())} blocks have negative "
                f"eigenvalues, the first is {self.partition.where(k, start + first)}, the least "
                f"eigenvalue {least:.3g}; use op.shift({-least:.3g}) or an integer power"
            )
        if p < 0:
            zero = (values.abs() <= noise).any(-1)
            if bool(zero.any()):
                first = int(zero.nonzero()[0])
                raise RuntimeError(
                    f"power {p:g} of {self!r} is infinite: {int(zero.sum())} blocks are singular, "
                    f"the first is {self.partition.where(k, start + first)}; use "
                    "op.shift(damping).power(p)"
                )
        out: Tensor = (vectors * values.pow(p).unsqueeze(-2)) @ vectors.mT
        return 0.5 * (out + out.mT)

    # -------------------------------------------------------------------- checks
    def _range(self, stack: int, start: int, stop: int | None) -> tuple[int, int]:
        if not 0 <= stack < len(self._stacks):
            raise ValueError(f"there are {len(self._stacks)} stacks of blocks, got stack={stack}")
        n = len(self.partition.stacks[stack])
        stop = n if stop is None else stop
        if not 0 <= start <= stop <= n:
            raise ValueError(f"stack {stack} has {n} blocks, got the range {start} to {stop}")
        return start, stop

    def _require_rest(self, damping: float, what: str) -> None:
        outside = self.partition.uncovered
        if outside.numel() and self.rest + damping == 0.0:
            raise RuntimeError(
                f"{what} of {self!r} with damping={damping:g} is singular: {outside.numel()} of "
                f"{self.shape[0]} coordinates (the first is {int(outside[0])}) are in no block, "
                "where it is zero; pass damping="
            )

    def _require_regular(self, k: int, start: int, bad: Tensor, damping: float) -> None:
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            raise RuntimeError(
                f"{self!r} with damping={damping:g} is singular to working precision: "
                f"at least {int(bad.sum())} blocks are, the first is "
                f"{self.partition.where(k, start + first)}; pass a larger damping="
            )
