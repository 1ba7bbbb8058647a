r"""Influence of examples on themselves, :math:`g_n^\top (H + \lambda I)^{-1} g_n`.

Layer by layer where the curvature is diagonal in an eigenbasis of Kronecker factors (K-FAC, EK-FAC,
a diagonal, the identity): see :mod:`curvlib.operators.scores.example_squares`. For any other
operator by its own solve, with the flat gradients of some examples at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from curvlib.core.kronecker import Kronecker
from curvlib.core.kronecker_blocks import KroneckerBlock
from curvlib.core.ranks.spread_blocks import SpreadBlock
from curvlib.core.risk import Risk
from curvlib.core.structured import Diagonal
from curvlib.influence.preconditioner import Preconditioner
from curvlib.influence.spread_queries import inverse_blocks
from curvlib.operators.scores.blocks import score_blocks
from curvlib.operators.scores.example_scores import example_gradients_by_layers
from curvlib.operators.scores.example_squares import Metrics, example_squares

#: Bytes that flat gradients of examples may take.
MEMORY = 2**28


def self_products(risk: Risk, preconditioner: Preconditioner) -> Iterator[Tensor]:
    """Self-influence of all examples, in their order, ``[n]`` at a time.

    Args:
        risk: The examples' loss and data, as a function of the parameters.
        preconditioner: The damped inverse curvature.

    Raises:
        RuntimeError: If the damped curvature is singular, or a solve does not converge.
        FloatingPointError: If a gradient is not finite; names the layer.
    """
    metrics = block_metrics(risk, preconditioner)
    if metrics is not None:
        yield from example_squares(risk, metrics)
        return
    each = risk.space.size * risk.space.dtype.itemsize
    for rows in example_gradients_by_layers(risk, block=max(1, MEMORY // max(1, 3 * each))):
        yield preconditioner.squares(rows)


class _Gathered(Mapping[str, KroneckerBlock | None]):
    """Metrics that ranks have slices of, whole while they are used."""

    def __init__(self, blocks: Mapping[str, SpreadBlock], like: Tensor) -> None:
        self._blocks = blocks
        self._like = like

    def __getitem__(self, name: str) -> KroneckerBlock:
        own = self._blocks[name].whole()
        return replace(
            own,
            left=None if own.left is None else own.left.to(self._like),
            right=None if own.right is None else own.right.to(self._like),
            eigenvalues=own.eigenvalues.to(self._like),
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)


def block_metrics(risk: Risk, preconditioner: Preconditioner) -> Metrics | None:
    """The preconditioner in each block of a risk, or ``None`` if it is no diagonal in these."""
    op, blocks = preconditioner.operator, score_blocks(risk)
    if risk.places and op is not None:
        return _Gathered(inverse_blocks(risk, preconditioner, blocks), risk.space.empty())
    if op is None:
        return dict.fromkeys(block.name for block in blocks)
    like = risk.space.empty()
    if isinstance(op, Diagonal):
        values = preconditioner.solve(like.new_ones((risk.space.size, 1))).mT
        return {
            b.name: KroneckerBlock(b.name, b.parts, None, None, b.gather(values)[0]) for b in blocks
        }
    if not isinstance(op, Kronecker):
        return None
    inverse = op.inverse(preconditioner.damping, relative=preconditioner.relative)
    known = {(b.parts, tuple(b.eigenvalues.shape)): b for b in inverse.blocks_of.values()}
    found = {block.name: known.get((block.parts, block.shape)) for block in blocks}
    if any(own is None for own in found.values()):
        return None
    return {
        name: replace(
            own,
            left=None if own.left is None else own.left.to(like),
            right=None if own.right is None else own.right.to(like),
            eigenvalues=own.eigenvalues.to(like),
        )
        for name, own in found.items()
        if own is not None
    }
