"""Preconditioned gradients of queries, as directions that training examples are multiplied by.

The protocol of directions and its dense body are in :mod:`curvlib.operators.scores.directions`,
since the scan over data knows it; the low-rank body is in :mod:`curvlib.influence.low_rank`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch

from curvlib.core.risk import Risk
from curvlib.influence.preconditioner import Preconditioner
from curvlib.influence.solved import Solved, Solver
from curvlib.operators.scores.directions import BlockDirections, DenseDirections
from curvlib.operators.scores.example_rows import ExampleRows, example_rows

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
#: How the directions of some queries are kept, in all blocks: themselves, or compressed.
Keep = Callable[[Mapping[str, Solved]], dict[str, BlockDirections]]
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
        keep: Compresses the directions of some queries. Default: they are dense.
        join: Joins what that returns for several parts of the queries.
        memory: Bytes that gradients of queries take at once, at most (one query's at least).

    Raises:
        ValueError: If the reduction is unknown, or examples depend on each other.
        FloatingPointError: If a gradient is not finite; names the layer.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"query_reduction= is None, 'sum' or 'mean', got {reduction!r}")
    join = join or _joined
    parts: dict[str, list[BlockDirections]] = {}
    for solved in _solved(risk, preconditioner, reduction, memory):
        for name, own in (_dense(solved) if keep is None else keep(solved)).items():
            parts.setdefault(name, []).append(own)
    return {name: found[0] if len(found) == 1 else join(found) for name, found in parts.items()}


def direction_parts(
    risk: Risk,
    preconditioner: Preconditioner,
    *,
    reduction: str | None = None,
    memory: int = MEMORY,
) -> Iterator[dict[str, DenseDirections]]:
    """Dense directions of some queries at a time: see :func:`query_directions`."""
    for solved in _solved(risk, preconditioner, reduction, memory):
        yield {name: own.dense() for name, own in solved.items()}


def _solved(
    risk: Risk, preconditioner: Preconditioner, reduction: str | None, memory: int
) -> Iterator[dict[str, Solved]]:
    """Preconditioned gradients of some queries at a time; of all, where they are reduced."""
    solver = Solver(risk, preconditioner)
    each = risk.space.size * risk.space.dtype.itemsize
    stream = example_rows(risk, block=max(1, memory // max(1, each)))
    for rows in stream if reduction is None else _reduced(stream, mean=reduction == "mean"):
        yield solver.of(rows)


def _reduced(stream: Iterator[list[ExampleRows]], *, mean: bool) -> Iterator[list[ExampleRows]]:
    """The sum or mean of all gradients, as that of one query."""
    total: list[ExampleRows] = []
    count = 0
    for rows in stream:
        own = [replace(r, left=None, right=None, whole=r.total()) for r in rows]
        sums = [replace(r, whole=a.total() + r.total()) for a, r in zip(total, own, strict=False)]
        total = sums or own
        count += rows[0].examples
    scale = 1.0 / count if mean else 1.0
    if total:
        yield [replace(r, whole=r.matrices() * scale) for r in total]


def _dense(solved: Mapping[str, Solved]) -> dict[str, BlockDirections]:
    return {name: own.dense() for name, own in solved.items()}


def _joined(parts: list[BlockDirections]) -> BlockDirections:
    return DenseDirections(torch.cat([part.dense() for part in parts]))
