"""Diagonals and norms without error, one product for each column: what small operators get."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from curvlib.estimators.rows import dots
from curvlib.estimators.stopping import Plan, multiply


@dataclass(frozen=True)
class ExactState:
    """Where a run stands.

    Attributes:
        diagonal: Entries so far, ``[n]``; zeros for a rectangular operator.
        squares: Sum of the squares of all entries so far.
        count: Columns multiplied.
    """

    SPREAD: ClassVar = ("diagonal",)

    diagonal: Tensor
    squares: float
    count: int


def exact(plan: Plan) -> ExactState:
    """Diagonal and squared Frobenius norm, from products with the columns of the identity.

    Raises:
        FloatingPointError: If a product is not finite.
    """
    op = plan.op
    height, size = op.shape

    def step(state: ExactState) -> ExactState:
        start, stop = state.count, min(state.count + plan.block, size)
        which = columns = torch.arange(start, stop, device=op.device)
        if op.spread is not None:
            which, columns = op.spread.own(columns)
            which = which + start
        rows = torch.zeros((stop - start, op.length), dtype=op.dtype, device=op.device)
        rows[which - start, columns] = 1.0
        product = multiply(op, rows, start)
        wide = product.double().reshape(1, -1)
        if height == size:
            state.diagonal[columns] = product[which - start, columns]
        squares = float(dots(wide, wide, op.spread)[0])
        return ExactState(state.diagonal, state.squares + squares, stop)

    return plan.run(
        lambda: ExactState(torch.zeros(op.length, dtype=op.dtype, device=op.device), 0.0, 0),
        step,
        state_type=ExactState,
        done=lambda state: state.count == size,
        report=lambda state: (state.count, size, ""),
        title="columns",
        settings={k: v for k, v in plan.settings.items() if k in ("dtype", "device")},
    )
