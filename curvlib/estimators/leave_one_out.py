r"""Sketches for the exchangeable estimators XTrace and XDiag, and for the Frobenius norm.

The formulas are in :mod:`curvlib.estimators.exchangeable`; here are the long vectors: probes,
the orthonormal basis of their products, and what the basis is mapped to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from curvlib.estimators.rows import dots, extend, inner
from curvlib.estimators.stopping import Plan, multiply


@dataclass(frozen=True)
class SketchState:
    """Where a run stands.

    Attributes:
        probes: Rows of probes, ``[b, n]`` for each step.
        basis: Rows of Q, ``[b, n]`` for each step.
        images: Rows of AQ, ``[b, n]`` for each step, where they are kept.
        R: ``Q.T @ A @ probes``, upper triangular, ``[m, m]`` in float64 on the CPU.
        H: ``Q.T @ A @ Q``, ``[m, m]``.
        W: ``Q.T @ probes``, ``[m, m]``.
        norms: Squared norms of the probes, ``[m]``.
        products: Columns multiplied.
        generator: State of the random generator.
    """

    SPREAD: ClassVar = ("probes", "basis", "images")

    probes: tuple[Tensor, ...]
    basis: tuple[Tensor, ...]
    images: tuple[Tensor, ...]
    R: Tensor
    H: Tensor
    W: Tensor
    norms: Tensor
    products: int
    generator: Tensor

    @property
    def count(self) -> int:
        """Number of probes so far."""
        return int(self.norms.shape[0])


def first_state(plan: Plan) -> SketchState:
    """The state before the first product."""
    nothing = torch.zeros((0, 0), dtype=torch.float64)
    return SketchState(
        probes=(),
        basis=(),
        images=(),
        R=nothing,
        H=nothing,
        W=nothing,
        norms=torch.zeros(0, dtype=torch.float64),
        products=0,
        generator=plan.random.get_state(),
    )


def next_state(plan: Plan, state: SketchState, *, keep_images: bool) -> SketchState:
    """Two block products: of some probes, and of what they add to the basis.

    Raises:
        FloatingPointError: If a product is not finite.
    """
    size, spread = plan.following(state.count), plan.op.spread
    rows, generator = plan.draw(state.generator, size)
    product = multiply(plan.op, rows, state.products)
    fresh, C, R, seen = extend(state.basis, product, rows, spread=spread)
    image = multiply(plan.op, fresh, state.products + size)
    basis = (*state.basis, fresh)
    probes = (*state.probes, rows)
    columns = inner(basis, (image,), spread=spread)  # Q.T A Q_new
    old = state.count
    H = torch.zeros((old + size, old + size), dtype=torch.float64)
    H[:old, :old] = state.H
    H[:, old:] = columns
    H[old:, :old] = columns[:old].mT
    H[old:, old:] = 0.5 * (columns[old:] + columns[old:].mT)
    W = torch.zeros_like(H)
    W[:old, :old] = state.W
    W[:old, old:] = seen
    W[old:] = inner((fresh,), probes, spread=spread)
    whole = torch.zeros_like(H)
    whole[:old, :old] = state.R
    whole[:old, old:] = C
    whole[old:, old:] = R
    squares = dots(rows, rows, spread).cpu()
    return SketchState(
        probes=probes,
        basis=basis,
        images=(*state.images, image) if keep_images else (),
        R=whole,
        H=H,
        W=W,
        norms=torch.cat([state.norms, squares]),
        products=state.products + 2 * size,
        generator=generator,
    )
