"""Diagonals and norms without error, one product for each column: what small operators get."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvlib.estimators.stopping import Plan, multiply


@dataclass(frozen=True)
class ExactState:
    """Where a run stands.

    Attributes:
        diagonal: Entries so far, ``[n]``; zeros for a rectangular operator.
        squares: Sum of the squares of all entries so far.
        count: Columns multiplied.
    """

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
        rows = torch.zeros((stop - start, size), dtype=op.dtype, device=op.device)
        rows[:, start:stop].fill_diagonal_(1.0)
        product = multiply(op, rows, start)
        wide = product.double().ravel()
        if height == size:
            state.diagonal[start:stop] = product[:, start:stop].diagonal()
        return ExactState(state.diagonal, state.squares + float(torch.dot(wide, wide)), stop)

    return plan.run(
        lambda: ExactState(torch.zeros(size, dtype=op.dtype, device=op.device), 0.0, 0),
        step,
        state_type=ExactState,
        done=lambda state: state.count == size,
        report=lambda state: (state.count, size, ""),
        title="columns",
        settings={k: v for k, v in plan.settings.items() if k in ("dtype", "device")},
    )
