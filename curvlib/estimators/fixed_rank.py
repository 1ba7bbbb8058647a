"""Low-rank approximations of a fixed rank: passes over a block of random vectors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from curvlib.core.operator import LinearOperator
from curvlib.estimators import sketch


@dataclass(frozen=True)
class SketchState:
    """Where the passes over the block stand.

    Attributes:
        block: The vectors that are multiplied, rows ``[l, P]``.
        product: Their products, of which the first ``column`` are there.
        column: Columns of this pass that are done.
        passes: Whole passes that are done.
        squares: Norms of ``(A - Ahat) w`` and of ``A w`` for the probes, ``[2, probes]``, squared.
        tested: Probes that are done.
        random: State of the generator of the probes.
        products: Columns multiplied.
    """

    SPREAD: ClassVar = ("block", "product")

    block: Tensor
    product: Tensor
    column: int
    passes: int
    values: Tensor
    squares: Tensor
    tested: int
    random: Tensor
    products: int


def first_state(
    op: LinearOperator, width: int, probes: int, random: torch.Generator
) -> SketchState:
    """The state before the first product: ``width`` random vectors."""
    block = sketch.random_rows(op, width, random)
    return SketchState(
        block=block,
        product=torch.empty_like(block),
        column=0,
        passes=0,
        values=torch.zeros(0, dtype=torch.float64),
        squares=torch.zeros((2, probes), dtype=torch.float64),
        tested=0,
        random=random.get_state(),
        products=0,
    )


def next_state(
    op: LinearOperator, state: SketchState, rank: int, method: str, passes: int, block: int
) -> SketchState:
    """One block product: of the sketch's vectors, or of fresh probes for the error.

    Raises:
        FloatingPointError: If a product is not finite.
    """
    if state.passes == passes:
        return _tested(op, state, block)
    stop = min(state.column + block, state.block.shape[0])
    found = sketch.finite_product(op, state.block[state.column : stop], state.products)
    state.product[state.column : stop].copy_(found)
    state = replace(state, column=stop, products=state.products + found.shape[0])
    if stop < state.block.shape[0]:
        return state
    state = replace(state, column=0, passes=state.passes + 1)
    if state.passes < passes:
        return replace(state, block=sketch.orthonormal(state.product, op.spread))
    if method == "nystrom":
        vectors, values = sketch.nystrom(op, state.block, state.product)
    else:
        vectors, values = sketch.rayleigh_ritz(state.block, state.product, op.spread)
    none = state.product.new_empty((0, op.length))
    return replace(state, block=vectors[:rank].contiguous(), product=none, values=values[:rank])


def _tested(op: LinearOperator, state: SketchState, block: int) -> SketchState:
    random = torch.Generator(device=op.device)
    random.set_state(state.random)
    count = min(block, state.squares.shape[1] - state.tested)
    rows = sketch.probe_rows(op, count, "rademacher", random)
    squares = state.squares.clone()
    squares[:, state.tested : state.tested + count] = sketch.error_samples(
        op, state.block, state.values, rows, state.products
    )
    return replace(
        state,
        squares=squares,
        tested=state.tested + count,
        random=random.get_state(),
        products=state.products + count,
    )
