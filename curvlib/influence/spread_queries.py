"""Directions of queries where parameters are sharded: each rank keeps slices of them.

All ranks go through the queries, which are the same on each. In a layer, gradients of some queries
are multiplied by the inverse curvature, whose basis is gathered for that, and a slice is kept. No
more than one layer's basis, and the gradients of some queries in it, are whole at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from curvlib.core.kronecker import Kronecker
from curvlib.core.ranks.spread_blocks import Cut, SpreadBlock, cut_of
from curvlib.core.risk import Risk
from curvlib.influence.preconditioner import Preconditioner
from curvlib.operators.scores.blocks import ScoreBlock, score_blocks
from curvlib.operators.scores.directions import CHUNK
from curvlib.operators.scores.passes import GradientPass, GradientPasses
from curvlib.operators.scores.rows import matrices, terms
from curvlib.operators.scores.spread_directions import SpreadDirections


def spread_directions(
    risk: Risk, preconditioner: Preconditioner, reduction: str | None = None
) -> dict[str, SpreadDirections]:
    """Directions of all queries, by block.

    Args:
        risk: The queries' loss and data, the same on every rank.
        preconditioner: What their gradients are multiplied by.
        reduction: ``"sum"`` or ``"mean"`` makes one direction of all queries.

    Raises:
        ValueError: If the curvature has other blocks than the parameters, or examples depend on
            each other.
        FloatingPointError: If a gradient is not finite; names the layer.
    """
    blocks = score_blocks(risk)
    inverse = inverse_blocks(risk, preconditioner, blocks)
    assert risk.group is not None
    cuts = {b.name: _cut(b, inverse.get(b.name), risk.group.size) for b in blocks}
    found: dict[str, list[Tensor]] = {block.name: [] for block in blocks}
    count = 0
    passes = GradientPasses(risk, blocks)
    batches = risk.stream.together()
    while True:
        with risk.untouched(first_order=True), risk.held.gathering():
            batch = next(batches, None)
            if batch is None:
                break
            for one in passes.of(batch):
                passes.attempt(one.require_finite)
                count += one.examples
                for block in blocks:
                    for own in _directions(one, block, inverse.get(block.name), reduction):
                        low, high = cuts[block.name].values.bounds(risk.group.rank, risk.group.size)
                        kept = own.narrow(cuts[block.name].axis + 1, low, high - low).clone()
                        parts = found[block.name]
                        if reduction is not None and parts:
                            parts[0] += kept
                        else:
                            parts.append(kept)
    scale = 1.0 / count if reduction == "mean" else 1.0
    return {
        name: SpreadDirections(torch.cat(parts) * scale, cuts[name], risk.group)
        for name, parts in found.items()
    }


def inverse_blocks(
    risk: Risk, preconditioner: Preconditioner, blocks: list[ScoreBlock]
) -> dict[str, SpreadBlock]:
    """The damped inverse curvature in each block; empty for the identity.

    Raises:
        ValueError: If the curvature is of another kind, or has other blocks.
    """
    op = preconditioner.operator
    if op is None:
        return {}
    if isinstance(op, Kronecker) and op.spread == risk.space.spread:
        inverse = op.inverse(preconditioner.damping, relative=preconditioner.relative)
        known = {(b.parts, b.cut.shape): b for b in inverse.blocks_of.values()}
        found = {b.name: known[b.parts, b.shape] for b in blocks if (b.parts, b.shape) in known}
        if len(found) == len(blocks):
            return found
    raise ValueError(
        f"influence with sharded parameters takes the curvature 'ekfac', 'kfac' or 'identity', or "
        f"one that curvlib.kfac(risk) fits with gates='joint', got {op!r} (a sharding that curvlib "
        "cannot follow)"
    )


def _directions(
    one: GradientPass, block: ScoreBlock, inverse: SpreadBlock | None, reduction: str | None
) -> Iterator[Tensor]:
    """Directions ``[q, G, O, I]`` of some queries at a time, whole."""
    like = one.one.batch.risk.space.empty()
    basis = None if inverse is None else inverse.whole()
    step = max(1, CHUNK // (like.element_size() * block.shape[0] * block.shape[1] * block.shape[2]))
    for start in range(0, one.examples, step):
        at = slice(start, min(start + step, one.examples))
        zeros = like.new_zeros((at.stop - at.start, *block.shape))
        X = matrices(block, list(terms(block, one, at, like.dtype)), zeros)
        X = X if reduction is None else X.sum(0, keepdim=True)
        if basis is not None:
            rotated = basis.rotated(X.to(basis.eigenvalues)) * basis.eigenvalues
            X = basis.restored(rotated).to(like)
        yield X


def _cut(block: ScoreBlock, inverse: SpreadBlock | None, ranks: int) -> Cut:
    return cut_of(block.shape, block.shape[1] > 1, ranks) if inverse is None else inverse.cut
