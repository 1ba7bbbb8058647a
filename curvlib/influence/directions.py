"""Preconditioned gradients of queries, as directions that training examples are multiplied by.

The protocol of directions and its dense body are in :mod:`curvlib.operators.query_directions`,
since the scan over data knows it; the low-rank body is in :mod:`curvlib.influence.low_rank`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from curvlib.core.risk import Risk
from curvlib.influence.preconditioner import Preconditioner
from curvlib.operators.example_scores import example_gradients_by_layers
from curvlib.operators.query_directions import BlockDirections, DenseDirections
from curvlib.operators.score_blocks import score_blocks

__all__ = [
    "BlockDirections",
    "DenseDirections",
    "Directions",
    "Keep",
    "direction_parts",
    "query_directions",
]

#: Directions of all blocks, by their names.
Directions = Mapping[str, BlockDirections]
#: How the directions of some queries in a block of this name are kept: themselves, or compressed.
Keep = Callable[[str, BlockDirections], BlockDirections]
#: Bytes that gradients of queries may take before they are compressed.
MEMORY = 2**28
REDUCTIONS = (None, "sum", "mean")


def query_directions(
    risk: Risk,
    preconditioner: Preconditioner,
    *,
    reduction: str | None = None,
    keep: Keep | None = None,
    join: Callable[[list[BlockDirections]], BlockDirections] | None = None,
    memory: int = MEMORY,
) -> Directions:
    """Directions of all queries.

    Args:
        risk: The queries' loss (or measurement) and data, as a function of the parameters.
        preconditioner: What their gradients are multiplied by.
        reduction: ``"sum"`` or ``"mean"`` makes one direction of all queries.
        keep: Compresses the directions of some queries in one block. Default: they are dense.
        join: Joins what that returns for several parts of the queries.
        memory: Bytes that gradients of queries take at once, at most (one query's at least).

    Raises:
        ValueError: If the reduction is unknown, or examples depend on each other.
        FloatingPointError: If a gradient is not finite; names the layer.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"query_reduction= is None, 'sum' or 'mean', got {reduction!r}")
    join = join or _dense
    parts: dict[str, list[BlockDirections]] = {}
    for dense in direction_parts(risk, preconditioner, reduction=reduction, memory=memory):
        for name, own in dense.items():
            parts.setdefault(name, []).append(own if keep is None else keep(name, own))
    return {name: found[0] if len(found) == 1 else join(found) for name, found in parts.items()}


def direction_parts(
    risk: Risk,
    preconditioner: Preconditioner,
    *,
    reduction: str | None = None,
    memory: int = MEMORY,
) -> Iterator[dict[str, DenseDirections]]:
    """Dense directions of some queries at a time: see :func:`query_directions`."""
    blocks = score_blocks(risk)
    for rows in _reduced(_gradients(risk, memory), reduction):
        solved = preconditioner.solve(rows.mT).mT
        # copies, so that the flat rows are not kept alive
        yield {b.name: DenseDirections(b.gather(solved).clone()) for b in blocks}


def _gradients(risk: Risk, memory: int) -> Iterator[Tensor]:
    each = risk.space.size * risk.space.dtype.itemsize
    return example_gradients_by_layers(risk, block=max(1, memory // max(1, each)))


def _reduced(rows: Iterator[Tensor], reduction: str | None) -> Iterator[Tensor]:
    if reduction is None:
        yield from rows
        return
    total, count = None, 0
    for part in rows:
        own = part.sum(0, keepdim=True)
        total = own if total is None else total + own
        count += len(part)
    if total is not None:
        yield total / count if reduction == "mean" else total


def _dense(parts: list[BlockDirections]) -> BlockDirections:
    return DenseDirections(torch.cat([part.dense() for part in parts]))
