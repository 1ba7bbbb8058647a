r"""Stochastic Lanczos quadrature in rounds of probes: its plan, its state and its steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from curvlib.core.operator import LinearOperator
from curvlib.core.run import Report
from curvlib.estimators import quadrature, stopping
from curvlib.estimators.function_sums import Found, Sums
from curvlib.estimators.quadrature import QuadratureState

#: Most probes that a tolerance may use.
MOST = 1000
#: Share of the tolerance that the rules may use up.
RULE_SHARE = 0.1


@dataclass(frozen=True)
class FunctionState(QuadratureState):
    """Where a run stands: the recurrences of this round, and those of all complete rounds.

    Attributes:
        complete: Whether this round is complete.
        kept_alphas: Diagonals of the complete rounds, ``[R, steps]``, float64.
        kept_betas: Off-diagonals, ``[R, steps]``; zero at the end of an invariant subspace.
        kept_lengths: Steps of each of their probes.
        generator: State of the random generator.
    """

    complete: bool
    kept_alphas: Tensor
    kept_betas: Tensor
    kept_lengths: tuple[int, ...]
    generator: Tensor


@dataclass(frozen=True)
class Plan:
    """What is wanted, and the operator: all that does not change in a run."""

    op: LinearOperator
    sums: Sums
    length: int
    probes: int
    block: int
    tolerance: float | None
    budget: float
    law: str
    full: bool
    removed: Tensor | None  # rows [k, P]

    def next_round(self, state: FunctionState) -> int:
        """Probes of the next round; zero where no more are wanted or allowed."""
        have = len(state.kept_lengths)
        if self.tolerance is not None and have and self.met(self.sums.of(kept(state))):
            return 0
        wanted = (self.probes if self.tolerance is None else MOST) - have
        allowed = (self.budget - state.products) // self.length
        return int(min(self.block, wanted, allowed))

    def met(self, found: Found) -> bool:
        """Whether the tolerance, if there is one, is met."""
        reach = (self.tolerance or 0.0) * abs(found.value)
        return (
            found.samples.numel() >= stopping.LEAST_PROBES
            and found.stderr <= reach
            and found.quadrature_error <= reach
        )


def first_state(plan: Plan, generator: torch.Generator) -> FunctionState:
    """The state before the first product."""
    count = int(min(plan.block, plan.budget // plan.length))
    slots = plan.length if plan.full else 3
    state = _start(plan, count, slots, generator)
    nothing = torch.zeros((0, plan.length), dtype=torch.float64)
    return FunctionState(
        **vars(state),
        complete=False,
        kept_alphas=nothing,
        kept_betas=nothing.clone(),
        kept_lengths=(),
        generator=generator.get_state(),
    )


def next_state(plan: Plan, state: FunctionState) -> FunctionState:
    """One block product; or, after a complete round, the probes of the next one.

    Raises:
        FloatingPointError: If the product is not finite.
        ValueError: If the function is not defined on the spectrum.
    """
    if state.complete:
        return _next_round(plan, state)
    new = quadrature.next_state(plan.op, state, deflate=plan.removed, full=plan.full)
    state = cast("FunctionState", new)
    plan.sums.check(state)
    if state.step == plan.length or not state.active or _exact_enough(plan, state):
        scale = state.scale or 1.0
        state = replace(
            state,
            complete=True,
            kept_alphas=torch.cat([state.kept_alphas, state.alphas * scale]),
            kept_betas=torch.cat([state.kept_betas, state.betas * scale]),
            kept_lengths=(*state.kept_lengths, *state.lengths),
        )
    return state


def finished(plan: Plan, state: FunctionState) -> bool:
    """Whether no round follows."""
    return state.complete and plan.next_round(state) == 0


def kept(state: FunctionState) -> QuadratureState:
    """The recurrences of all complete rounds."""
    return QuadratureState(
        basis=state.basis[:0],
        alphas=state.kept_alphas,
        betas=state.kept_betas,
        lengths=state.kept_lengths,
        active=(),
        step=state.step,
        scale=1.0,
        products=state.products,
    )


def report(plan: Plan, state: FunctionState) -> Report:
    """Products made, of how many, and the relative standard error so far."""
    if plan.tolerance is None:
        probes = min(plan.probes, plan.budget // plan.length)
        return state.products, probes * plan.length, ""
    total = plan.budget if math.isfinite(plan.budget) else MOST * plan.length
    if not state.complete:
        return state.products, total, ""
    found = plan.sums.of(kept(state))
    relative = stopping.relative(found.value, found.stderr)
    if 0.0 < relative < math.inf:  # the error falls with the square root of the products
        needed = state.products * (relative / plan.tolerance) ** 2
        total = min(total, max(needed, state.products))
    return state.products, total, f"error {relative:.1e}"


def _next_round(plan: Plan, state: FunctionState) -> FunctionState:
    """New probes, in the same memory: what they overwrite, a complete round needs no more."""
    count = plan.next_round(state)
    generator = torch.Generator(device=plan.op.device)
    generator.set_state(state.generator)
    fresh = _start(plan, count, 1, generator)
    basis = state.basis[:, :count]
    basis[0].copy_(fresh.basis[0])
    started = replace(fresh, basis=basis, products=state.products)
    return replace(state, **vars(started), complete=False, generator=generator.get_state())


def _start(plan: Plan, count: int, slots: int, generator: torch.Generator) -> QuadratureState:
    return quadrature.first_state(
        plan.op,
        plan.length,
        count,
        slots=slots,
        law=plan.law,
        deflate=plan.removed,
        generator=generator,
    )


def _exact_enough(plan: Plan, state: FunctionState) -> bool:
    """Whether further steps would not matter beside the tolerance."""
    if plan.tolerance is None or state.step < 4:
        return False
    found = plan.sums.of(state)
    return found.quadrature_error <= RULE_SHARE * plan.tolerance * abs(found.value)
