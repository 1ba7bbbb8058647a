r"""Low-rank approximations whose rank grows until their error is small enough.

Random vectors :math:`Q` are added a block at a time, each orthogonal to those before and
multiplied ``power`` times first, and :math:`Z = A Q` is kept. Control probes, multiplied once,
tell the error of whatever can be made of :math:`Q` and :math:`Z` without a further product:
:math:`(A - \hat A) w = A w - Q H Q^\top w` with :math:`H = Q^\top Z` by Rayleigh-Ritz, and
:math:`A w - Z H^+ Z^\top w` by Nyström's method. As control probes decide when to stop, the error
that is reported comes from fresh ones.

Source: N. Halko, P.-G. Martinsson and J. Tropp, *Finding structure with randomness*, SIAM Review
53 (2011), section 4.4; W. Yu, Y. Gu and Y. Li, *Efficient randomized algorithms for the
fixed-precision low-rank matrix approximation*, SIAM J. Matrix Anal. Appl. 39 (2018).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from curvlib.core.operator import LinearOperator
from curvlib.estimators import sketch
from curvlib.estimators.rows import Blocks, dots, extend, inner, subtract


@dataclass(frozen=True)
class Growth:
    """What does not change while the rank grows.

    Attributes:
        op: The operator.
        method: ``"nystrom"`` or ``"eigh"``.
        tolerance: Of the relative error.
        most: Largest rank.
        budget: Products for everything but the fresh probes.
        power: Times that a block is multiplied before it is added.
        block: Columns multiplied at a time.
        controls: Control probes.
        probes: Fresh probes in the end.
    """

    op: LinearOperator
    method: str
    tolerance: float
    most: int
    budget: int
    power: int
    block: int
    controls: int
    probes: int


@dataclass(frozen=True)
class GrowthState:
    """Where the growth stands.

    Attributes:
        controls: Control probes, rows ``[c, P]`` in blocks.
        answers: Their products, in blocks.
        basis: Q, rows ``[b, P]`` in blocks; in the end the approximation's vectors, in one.
        images: AQ, in blocks; none in the end.
        rising: The block that is being multiplied, ``[b, P]``; empty between blocks.
        passes: Times that it has been multiplied.
        core: ``Q.T @ A @ Q``, ``[m, m]``, float64 on the CPU.
        error: Relative error by the control probes; infinite before it is known.
        values: The approximation's eigenvalues once the growth has ended.
        finished: Whether it has.
        squares: Squared norms of ``(A - Ahat) w`` and ``A w`` of fresh probes, ``[2, probes]``.
        tested: Fresh probes that are done.
        random: State of the generator.
        products: Columns multiplied.
    """

    SPREAD: ClassVar = ("controls", "answers", "basis", "images", "rising")

    controls: Blocks
    answers: Blocks
    basis: Blocks
    images: Blocks
    rising: Tensor
    passes: int
    core: Tensor
    error: float
    values: Tensor
    finished: bool
    squares: Tensor
    tested: int
    random: Tensor
    products: int

    @property
    def rank(self) -> int:
        """Vectors in the basis."""
        return sum(block.shape[0] for block in self.basis)


def first_state(growth: Growth, random: torch.Generator) -> GrowthState:
    """The state before the first product."""
    op = growth.op
    return GrowthState(
        controls=(),
        answers=(),
        basis=(),
        images=(),
        rising=torch.empty((0, op.length), dtype=op.dtype, device=op.device),
        passes=0,
        core=torch.zeros((0, 0), dtype=torch.float64),
        error=torch.inf,
        values=torch.zeros(0, dtype=torch.float64),
        finished=False,
        squares=torch.zeros((2, growth.probes), dtype=torch.float64),
        tested=0,
        random=random.get_state(),
        products=0,
    )


def next_state(growth: Growth, state: GrowthState) -> GrowthState:
    """One block product: of control probes, of a block that rises to the basis, of fresh probes.

    Raises:
        FloatingPointError: If a product is not finite.
    """
    if state.finished:
        return _tested(growth, state)
    known = sum(len(block) for block in state.controls)
    if known < growth.controls:
        size = min(growth.block, growth.controls - known)
        rows, random = _draw(growth.op, state.random, size, "rademacher")
        found = sketch.finite_product(growth.op, rows, state.products)
        return replace(
            state,
            controls=(*state.controls, rows),
            answers=(*state.answers, found),
            random=random,
            products=state.products + size,
        )
    rising, random = state.rising, state.random
    if not len(rising):
        rows, random = _draw(growth.op, random, _room(growth, state), "gaussian")
        rising = extend(state.basis, rows, spread=growth.op.spread)[0]
    found = sketch.finite_product(growth.op, rising, state.products)
    state = replace(state, random=random, products=state.products + len(found))
    if state.passes < growth.power:
        again = extend(state.basis, found, spread=growth.op.spread)[0]
        return replace(state, rising=again, passes=state.passes + 1)
    state = _joined(growth, replace(state, rising=rising[:0], passes=0), rising, found)
    if state.error > growth.tolerance and _room(growth, state) > 0:
        return state
    return _finished(growth, state)


def is_done(growth: Growth, state: GrowthState) -> bool:
    """Whether the growth has ended, and its error is known."""
    return state.finished and state.tested == growth.probes


def _tested(growth: Growth, state: GrowthState) -> GrowthState:
    size = min(growth.block, growth.probes - state.tested)
    rows, random = _draw(growth.op, state.random, size, "rademacher")
    squares = state.squares.clone()
    squares[:, state.tested : state.tested + size] = sketch.error_samples(
        growth.op, state.basis[0], state.values, rows, state.products
    )
    return replace(
        state,
        squares=squares,
        tested=state.tested + size,
        random=random,
        products=state.products + size,
    )


def _room(growth: Growth, state: GrowthState) -> int:
    """Vectors that the next block may have."""
    left = (growth.budget - state.products) // (growth.power + 1)
    return min(growth.block, growth.most - state.rank, left)


def _draw(op: LinearOperator, random: Tensor, size: int, law: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device=op.device)
    generator.set_state(random)
    rows = sketch.probe_rows(op, size, law, generator)
    return rows, generator.get_state()


def _joined(growth: Growth, state: GrowthState, rising: Tensor, found: Tensor) -> GrowthState:
    """The state with one block more, and the error that is left."""
    old = state.rank
    basis, images = (*state.basis, rising), (*state.images, found)
    core = torch.zeros((old + len(rising),) * 2, dtype=torch.float64)
    core[:old, :old] = state.core
    core[:, old:] = inner(basis, (found,), spread=growth.op.spread)
    core[old:, :old] = core[:old, old:].mT
    state = replace(state, basis=basis, images=images, core=core)
    return replace(state, error=_control_error(growth, state))


def _control_error(growth: Growth, state: GrowthState) -> float:
    values, V = torch.linalg.eigh(0.5 * (state.core + state.core.mT))
    if growth.method == "nystrom":
        rows = state.images
        floor = growth.op.shape[0] ** 0.5 * torch.finfo(growth.op.dtype).eps * values.abs().max()
        values = torch.where(values > floor, 1.0 / values, 0.0)
    else:
        rows = state.basis
    rest, whole, spread = 0.0, 0.0, growth.op.spread
    for control, answer in zip(state.controls, state.answers, strict=True):
        coefficients = (V * values) @ (V.mT @ inner(rows, (control,), spread=spread))
        left = subtract(answer, rows, coefficients, torch.empty_like(answer))
        rest += float(dots(left, left, spread).sum())
        whole += float(dots(answer, answer, spread).sum())
    return (rest / whole) ** 0.5 if whole else 0.0


def _finished(growth: Growth, state: GrowthState) -> GrowthState:
    """The approximation from all vectors and their products."""
    basis, images = torch.cat(state.basis), torch.cat(state.images)
    if growth.method == "nystrom":
        vectors, values = sketch.nystrom(growth.op, basis, images)
    else:
        vectors, values = sketch.rayleigh_ritz(basis, images, growth.op.spread)
    return replace(
        state,
        controls=(),
        answers=(),
        basis=(vectors.contiguous(),),
        images=(),
        values=values,
        finished=True,
    )
