r"""Hutch++: the trace on a sketched subspace exactly, and of the rest by independent probes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from curvlib.estimators.rows import dots, extend, inner, subtract
from curvlib.estimators.stopping import Plan, multiply


@dataclass(frozen=True)
class HutchppState:
    """Where a run stands.

    Attributes:
        basis: Rows of the sketched subspace, in blocks ``[b, n]``.
        known: Trace on the subspace.
        samples: Samples of the trace of the rest, ``[m]``, float64 on the CPU.
        products: Columns multiplied.
        generator: State of the random generator.
    """

    SPREAD: ClassVar = ("basis",)

    basis: tuple[Tensor, ...]
    known: float
    samples: Tensor
    products: int
    generator: Tensor

    @property
    def rank(self) -> int:
        """Dimension of the subspace so far."""
        return sum(block.shape[0] for block in self.basis)


def first_state(plan: Plan) -> HutchppState:
    """The state before the first product."""
    none = torch.zeros(0, dtype=torch.float64)
    return HutchppState((), 0.0, none, 0, plan.random.get_state())


def next_state(plan: Plan, state: HutchppState, rank: int) -> HutchppState:
    """Block products that extend the subspace up to ``rank``, then those of probes of the rest.

    Raises:
        FloatingPointError: If a product is not finite.
    """
    spread = plan.op.spread
    if state.rank < rank:
        size = min(plan.block, rank - state.rank)
        rows, generator = plan.draw(state.generator, size)
        fresh, *_ = extend(state.basis, multiply(plan.op, rows, state.products), spread=spread)
        image = multiply(plan.op, fresh, state.products + size)
        return replace(
            state,
            basis=(*state.basis, fresh),
            known=state.known + float(dots(fresh, image, spread).sum()),
            products=state.products + 2 * size,
            generator=generator,
        )
    size = plan.following(len(state.samples))
    rows, generator = plan.draw(state.generator, size)
    for _ in range(2 if state.basis else 0):
        subtract(rows, state.basis, inner(state.basis, (rows,), spread=spread), rows)
    if plan.law != "rademacher":  # the direction is uniform: set the length to its mean
        left = plan.op.shape[0] - state.rank
        norms = dots(rows, rows, spread).sqrt()[:, None]
        rows.mul_((left**0.5 / norms).to(rows.dtype))
    image = multiply(plan.op, rows, state.products)
    samples = dots(rows, image, spread).cpu()
    return replace(
        state,
        samples=torch.cat([state.samples, samples]),
        products=state.products + size,
        generator=generator,
    )
