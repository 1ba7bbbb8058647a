r"""Directions of K-FAC that are low-rank exactly, without any decomposition of them.

Where the damped block is a Kronecker product :math:`L \otimes R` (undamped K-FAC, or
:func:`~curvlib.operators.factors.factored_damping.factored_damping`), the direction of a query with
the gradient :math:`\sum_t g_t a_t^\top` is

.. math:: L^{-1} \Bigl(\sum_t g_t a_t^\top\Bigr) R^{-1}
          = \sum_{t \le T} (L^{-1} g_t) (R^{-1} a_t)^\top ,

of rank ``T`` at most, its tokens. These factors are kept where they take less memory than the
matrix; nothing is left out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from curvlib.core.kronecker import Kronecker
from curvlib.core.kronecker_blocks import KroneckerBlock
from curvlib.core.risk import Risk
from curvlib.influence.directions import MEMORY, BlockDirections, Keep
from curvlib.influence.low_rank import LowRankDirections
from curvlib.influence.preconditioner import Preconditioner
from curvlib.influence.solved import Solver
from curvlib.operators.factors.factored_damping import factor_eigenvalues
from curvlib.operators.scores.example_rows import ExampleRows, example_rows

#: Eigenvalues of both factors of a block, and the block.
_Factored = tuple[KroneckerBlock, Tensor, Tensor]


def factored_blocks(preconditioner: Preconditioner) -> dict[str, _Factored]:
    """The blocks in which the damped curvature is a product of factors, by name."""
    op = preconditioner.operator
    if not isinstance(op, Kronecker) or preconditioner.damping != 0.0:
        return {}
    out = {}
    for name, block in op.blocks_of.items():
        found = factor_eigenvalues(block)
        if found is not None and min(block.eigenvalues.shape[1:]) > 1:
            out[name] = (block, *found)
    return out


def factored_parts(
    risk: Risk,
    preconditioner: Preconditioner,
    *,
    rank: int | None = None,
    keep: Keep | None = None,
    memory: int = MEMORY,
) -> Iterator[dict[str, BlockDirections]]:
    """Directions of some queries at a time, in factored form where there is one.

    Args:
        risk: The queries.
        preconditioner: One with :func:`factored_blocks`.
        rank: Queries with more tokens are kept as matrices, which ``keep`` may compress.
        keep: Compresses directions that are matrices.
        memory: Bytes that gradients of queries take at once, at most (one query's at least).

    Raises:
        RuntimeError: If the curvature is singular.
    """
    factored = factored_blocks(preconditioner)
    solver = Solver(risk, preconditioner)
    each = risk.space.size * risk.space.dtype.itemsize
    for rows in example_rows(risk, block=max(1, memory // max(1, each))):
        out: dict[str, BlockDirections] = {}
        whole = []
        for own in rows:
            name = own.block.name
            if _applies(own, factored.get(name), rank):
                out[name] = _factored(own, factored[name])
            else:
                whole.append(own)
        if whole:
            solved = solver.of(whole)
            out |= keep(solved) if keep else {name: own.dense() for name, own in solved.items()}
        yield {own.block.name: out[own.block.name] for own in rows}


def _applies(own: ExampleRows, factored: _Factored | None, rank: int | None) -> bool:
    if factored is None or own.left is None or own.right is None:
        return False
    block = factored[0]
    same = block.parts == own.block.parts and tuple(block.eigenvalues.shape) == own.block.shape
    return same and (rank is None or own.right.shape[2] <= rank)


def _factored(own: ExampleRows, factored: _Factored) -> LowRankDirections:
    r""":math:`L^{-1} g_t` and :math:`R^{-1} a_t` of all queries."""
    assert own.left is not None
    assert own.right is not None
    block, left, right = factored
    for side, values in (("left", left), ("right", right)):
        if not bool((values > 0).all()):
            raise RuntimeError(
                f"block {block.name!r} is singular: {int((values <= 0).sum())} eigenvalues of its "
                f"{side} factor are zero; damp it, with curvlib's factored_damping or damping="
            )
    _, n, T, _ = own.right.shape
    like = own.right
    return LowRankDirections(
        left=_solved(own.left, block.left, left).flatten(1, 2).mT.to(like.dtype).contiguous(),
        right=_solved(own.right, block.right, right).flatten(1, 2).to(like.dtype),
        ranks=torch.full((n,), T, dtype=torch.int64),
        residual=torch.zeros(n, dtype=torch.float64, device=like.device),
    )


def _solved(rows: Tensor, basis: Tensor | None, values: Tensor) -> Tensor:
    """Rows ``[G, n, T, d]`` times the inverse of a factor."""
    scale = values[:, None, None].to(rows.dtype)
    if basis is None:
        return rows / scale
    Q = basis[:, None].to(rows.dtype)
    return (rows @ Q / scale) @ Q.mT
