r"""Gradients of queries times the damped inverse curvature, in the eigenbasis of the curvature.

With a Kronecker-factored curvature, the direction of a query in a block is

.. math:: D = Q_L \bigl[ (Q_L^\top G\, Q_R) \oslash (\Lambda + \lambda) \bigr] Q_R^\top .

What is in brackets is all that compression needs: its metric is diagonal there, and norms are the
same. Dense directions are rotated back, :math:`2 O I (O + I)` for each query. The gradient is
:math:`\sum_t l_t r_t^\top`, and its rows are rotated instead of it where there are few,
:math:`2 T (O^2 + I^2)` instead of :math:`2 O I (O + I)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvlib.core.kronecker import Kronecker
from curvlib.core.kronecker_blocks import KroneckerBlock
from curvlib.core.risk import Risk
from curvlib.influence.metric import Metric, metric_of
from curvlib.influence.preconditioner import Preconditioner
from curvlib.operators.factors.squares import rotated
from curvlib.operators.scores.blocks import flat_rows, score_blocks
from curvlib.operators.scores.directions import DenseDirections
from curvlib.operators.scores.example_rows import ExampleRows


@dataclass(frozen=True, eq=False)
class Solved:
    """Preconditioned gradients of ``Q`` queries in one block.

    Attributes:
        matrices: ``[Q, G, O, I]``, in the eigenbasis of ``block``.
        block: The curvature in the block; ``None`` where matrices are in no other basis.
    """

    matrices: Tensor
    block: KroneckerBlock | None

    def metric(self) -> Metric | None:
        """In which the error of scores is least; ``None`` for the identity."""
        return None if self.block is None else metric_of(self.block.eigenvalues)

    def dense(self) -> DenseDirections:
        """The directions as they are."""
        return DenseDirections(
            self.matrices if self.block is None else self.block.restored(self.matrices)
        )


class Solver:
    """Multiplies gradients by a damped inverse curvature.

    Args:
        risk: The queries.
        preconditioner: The damped inverse.

    Raises:
        RuntimeError: If relative damping is a fraction of nothing.
    """

    def __init__(self, risk: Risk, preconditioner: Preconditioner) -> None:
        self.preconditioner = preconditioner
        self.size = risk.space.size
        self._inverses = _inverses(risk, preconditioner)

    def of(self, rows: Sequence[ExampleRows]) -> dict[str, Solved]:
        """Of some queries, in some or all blocks, by their names.

        Raises:
            RuntimeError: If the damped matrix is singular, or a solve does not converge.
        """
        if self.preconditioner.operator is None:
            return {own.block.name: Solved(own.matrices(), None) for own in rows}
        if self._inverses is not None:
            return {own.block.name: _in_basis(own, *self._inverses[own.block.name]) for own in rows}
        blocks = [own.block for own in rows]
        flat = flat_rows(blocks, {own.block.name: own.matrices() for own in rows}, self.size)
        solved = self.preconditioner.solve(flat.mT).mT
        # copies, so that the flat rows are not kept alive
        return {b.name: Solved(b.gather(solved).clone(), None) for b in blocks}


def _inverses(
    risk: Risk, preconditioner: Preconditioner
) -> dict[str, tuple[KroneckerBlock, Tensor]] | None:
    """Blocks of the curvature and their damped inverse eigenvalues, where blocks are the same."""
    op, like = preconditioner.operator, risk.space.empty()
    if not isinstance(op, Kronecker) or op.device != like.device:
        return None
    by_parts = {block.parts: block for block in op.blocks_of.values()}
    pairs = [(own, by_parts.get(own.parts)) for own in score_blocks(risk)]
    if any(b is None or tuple(b.eigenvalues.shape) != own.shape for own, b in pairs):
        return None
    damping = op.dampings(preconditioner.damping, relative=preconditioner.relative)
    out = {}
    for own, found in pairs:
        assert found is not None
        shifted = found.eigenvalues + damping[found.name]
        if bool((shifted == 0).any()):
            return None  # the operator's own solve says what is singular
        block = replace(
            found,
            left=None if found.left is None else found.left.to(like),
            right=None if found.right is None else found.right.to(like),
            eigenvalues=found.eigenvalues.to(like),
        )
        out[own.name] = (block, shifted.reciprocal_().to(like))
    return out


def _in_basis(own: ExampleRows, block: KroneckerBlock, inverse: Tensor) -> Solved:
    _, O, I = block.eigenvalues.shape
    by_rows = False
    if own.left is not None and own.right is not None:
        left, right = (0 if Q is None else Q.shape[-1] for Q in (block.left, block.right))
        by_rows = own.right.shape[2] * (O * left + I * right) < O * I * (left + right)
    if by_rows:
        assert own.left is not None
        assert own.right is not None
        found = rotated(own.left, block.left).mT @ rotated(own.right, block.right)
        found = found.transpose(0, 1)
    else:
        found = block.rotated(own.matrices())
    return Solved(torch.mul(found, inverse), block)
