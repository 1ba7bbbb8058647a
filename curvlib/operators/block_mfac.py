r"""Block-wise M-FAC: damped empirical Fisher blocks from gradient rows, and their exact inverses.

For each block :math:`I` of a partition, with the rows :math:`G_I` restricted to it,

.. math:: F_I = \lambda_I I + \frac1m G_I^T G_I,

which is formed as a matrix where the block is no larger than the number ``m`` of rows, and kept
as rows otherwise (:mod:`curvlib.operators.moments`). Blocks are what makes second-order pruning
differ from magnitude: the leverages :math:`\ell_q = 1 - \lambda [F^{-1}]_{qq} \in [0, 1)` of a
matrix sum to at most its rank ``m``, so that they are near zero for all but a few coordinates of
an undivided vector of millions.

Damping is relative by default: a fraction of the mean diagonal of the undamped matrix over the
parameter (weight or bias) that the block belongs to. A parameter whose gradients are all zero
takes the mean over all parameters. (On trained networks the mean over the block, or over all
parameters, gave worse pruned networks.)

Frantar, Kurtic and Alistarh, "M-FAC: Efficient matrix-free approximations of second-order
information", 2021; Singh and Alistarh, "WoodFisher", 2020, for the blocks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from curvlib.core.arguments import finite_number
from curvlib.core.block_diagonal import BlockDiagonal
from curvlib.core.block_stacks import CHUNK, MatrixStack, Stack
from curvlib.core.partition import Partition
from curvlib.operators.held_out import EVERY, held_out_damping
from curvlib.operators.moments import Moments, mean_diagonals, second_moments
from curvlib.operators.row_stack import RowStack
from curvlib.operators.rows import RowDraw


class BlockMFAC(BlockDiagonal):
    r"""Blocks :math:`\lambda_I I + \frac1m G_I^T G_I` of streamed gradient rows.

    All of :class:`~curvlib.core.block_diagonal.BlockDiagonal` includes the damping:
    ``F.solve(x)`` is :math:`F^{-1} x`, and ``F.solve(x, damping)`` adds to it.

    Args:
        rows: ``[m, P]``, or an iterable of blocks ``[n, P]`` or vectors ``[P]``, such as
            :func:`~curvlib.operators.rows.gradient_rows`. It is read once, and not stored where
            blocks are smaller than ``m``. Or a :class:`~curvlib.operators.rows.RowDraw`, whose
            rows the ranks of a process group accumulate together: see
            :func:`~curvlib.operators.moments.second_moments` for the traffic. Other rows have to
            be the same on every rank.
        partition: The blocks: ``Partition.of(risk.space, 64)``.
        damping: :math:`\lambda`; or ``"auto"`` to choose a relative damping on held-out rows
            (every fifth; the operator is made of all rows in the end): see
            :func:`~curvlib.operators.held_out.held_out_damping`.
        relative: Whether ``damping`` is a fraction of the mean diagonal (see the module), or
            absolute.
        dtype: Type in which matrices are accumulated and kept: float64, or float32 for half the
            memory and an error of about ``1e-7`` of a block's largest eigenvalue.
        name: What it is, for legends and reports.

    Attributes:
        count: ``m``, how many rows there were.
        damping: What was asked for, or chosen.
        relative: Whether that is relative.
        dampings: :math:`\lambda_I` of each stack's blocks, ``[n]``, float64.
        escalated: How many blocks were singular to working precision with the damping that was
            asked for. Theirs was multiplied by ten until they were not, with a warning.

    Raises:
        TypeError: If rows or settings have the wrong type.
        ValueError: If rows do not fit or there are none, the damping is negative, or it is
            relative to rows that are all zero.
        FloatingPointError: If a row is not finite, or mean squares overflow.

    Example:
        >>> G = torch.tensor([[2.0, 0.0, 1.0], [0.0, 2.0, 1.0]], dtype=torch.float64)
        >>> each = Partition((torch.tensor([[0], [1], [2]]),), 3)
        >>> F = BlockMFAC(G, each, damping=0.5, relative=False)
        >>> F.diagonal().tolist()  # 0.5 + the mean square of each coordinate
        [2.5, 2.5, 1.5]
        >>> F.with_damping(2.0, relative=False).diagonal().tolist()
        [4.0, 4.0, 3.0]
    """

    count: int
    damping: float
    relative: bool
    dampings: tuple[Tensor, ...]
    escalated: int

    def __init__(
        self,
        rows: Tensor | Iterable[Tensor] | RowDraw,
        partition: Partition,
        *,
        damping: float | str = 0.01,
        relative: bool = True,
        dtype: torch.dtype = torch.float64,
        name: str = "block M-FAC",
    ) -> None:
        if not isinstance(partition, Partition):
            raise TypeError(f"expected a Partition, got {type(partition).__name__}")
        if isinstance(damping, str):
            if damping != "auto" or not relative:
                raise ValueError(
                    "damping= is a number, or 'auto' (which chooses a relative one), got "
                    f"damping={damping!r}, relative={relative}"
                )
            train, held = second_moments(rows, partition, dtype=dtype, every=EVERY)
            assert held is not None
            number = held_out_damping(train, held)
            moments = train.plus(held)
        else:
            number = _checked(damping)
            moments, _ = second_moments(rows, partition, dtype=dtype)
        self._set(moments, number, relative, name, chosen=isinstance(damping, str))

    def with_damping(self, damping: float, *, relative: bool = True) -> BlockMFAC:
        """The same rows with another damping: nothing is read again, or copied.

        Raises:
            TypeError: If ``damping`` is no number.
            ValueError: If it is negative or not finite.
        """
        out = BlockMFAC.__new__(BlockMFAC)
        out._set(self._moments, _checked(damping), relative, self.name, chosen=False)
        return out

    def _set(
        self, moments: Moments, damping: float, relative: bool, name: str, *, chosen: bool
    ) -> None:
        reference = mean_diagonals(moments)
        if not all(bool(torch.isfinite(r).all()) for r in reference):
            raise FloatingPointError(
                "the mean squares of the rows overflow; scale the loss down, or pass "
                "dtype=torch.float64"
            )
        if relative and damping > 0 and not any(bool(r.any()) for r in reference):
            raise ValueError(
                f"all {moments.count} rows are zero, so there is no mean diagonal for a relative "
                "damping; pass damping=..., relative=False, or rows that are not zero"
            )
        if not chosen:
            _warn_of_overfit(moments, reference, damping, relative)
        values = [r * damping if relative else torch.full_like(r, damping) for r in reference]
        self._moments = moments
        stacks = [_stack(moments, k, v) for k, v in enumerate(values)]
        self.escalated = 0
        for k, stack in enumerate(stacks):
            values[k], stacks[k] = self._regular(k, stack, values[k], reference[k])
        self.count = moments.count
        self.damping = damping
        self.relative = relative
        self.dampings = tuple(values)
        self._build(moments.partition, stacks, moments.dtype, rest=0.0, psd=True, name=name)

    def _regular(
        self, k: int, stack: Stack, value: Tensor, reference: Tensor
    ) -> tuple[Tensor, Stack]:
        """The dampings and the stack, after those of singular blocks were raised."""
        moments = self._moments
        least = torch.where(reference > 0, reference * 1e-8, 1e-8)
        first = bad = _singular(moments, k, stack)
        while bool(bad.any()):  # ends, since what is finite is regular with a large damping
            value = torch.where(bad, torch.maximum(10.0 * value, least), value)
            stack = _stack(moments, k, value)
            bad = _singular(moments, k, stack)
        count = int(first.sum())
        if count:
            self.escalated += count
            warnings.warn(
                f"curvlib: {count} blocks of {moments.partition.stacks[k].shape[1]} coordinates "
                "were singular to working precision with their damping, the first is "
                f"{moments.partition.where(k, int(first.nonzero()[0]))}; theirs was raised to "
                f"{float(value[first].max()):.3g} at most; pass a larger damping=",
                UserWarning,
                stacklevel=4,
            )
        return value, stack

    # --------------------------------------------------------------- diagnostics
    def leverages(self) -> Tensor:
        r""":math:`\ell_q = 1 - \lambda [F^{-1}]_{qq}`, ``[P]``, in ``[0, 1]``.

        How much of a coordinate's curvature is due to rows: zero where the score of pruning it is
        its magnitude. They sum to at most ``m`` in each block.
        """
        inverse = self.inverse_diagonal()
        out = torch.zeros_like(inverse)
        for indices, value in zip(self.partition.stacks, self.dampings, strict=True):
            inside = 1.0 - inverse[indices].double() * value[:, None]
            out[indices] = inside.clamp(0.0, 1.0).to(out.dtype)
        return out

    def rank_fractions(self) -> tuple[Tensor, ...]:
        """Mean leverage of each stack's blocks, ``[n]``: effective rank over block size.

        Near zero, blocks are mostly damping and pruning by them is pruning by magnitude; near
        one, mostly rows.
        """
        every = self.leverages()
        return tuple(every[indices].double().mean(1) for indices in self.partition.stacks)


def _singular(moments: Moments, k: int, stack: Stack) -> Tensor:
    chunks = moments.partition.chunks(k, CHUNK)
    return torch.cat([stack.logdet(start, stop, 0.0)[1] for start, stop in chunks])


def _stack(moments: Moments, k: int, damping: Tensor) -> Stack:
    mean, rows = moments.means[k], moments.rows[k]
    if rows is not None:
        return RowStack(rows, damping)
    assert mean is not None
    return MatrixStack(mean, damping)


def _checked(damping: object) -> float:
    value = finite_number("damping", damping)
    if value < 0.0:
        raise ValueError(f"damping= must not be negative, got {value:g}")
    return value


def _warn_of_overfit(
    moments: Moments, reference: Sequence[Tensor], damping: float, relative: bool
) -> None:
    """Few rows and small damping: the update fits these rows and hurts on all others."""
    size = max(s.shape[1] for s in moments.partition.stacks)
    if moments.count >= 4 * size or size == 1:
        return
    typical = float(torch.cat(list(reference)).median())
    share = damping if relative else damping / typical if typical > 0 else math.inf
    if share < 0.1:
        warnings.warn(
            f"curvlib: {moments.count} rows are few for blocks of {size} with a relative damping "
            f"of {share:.2g}: updates may fit the noise of these rows, and be worse than none on "
            f"others; use {4 * size} rows or more, a smaller block, or damping='auto'",
            UserWarning,
            stacklevel=4,
        )
