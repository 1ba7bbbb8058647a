r"""Linear solves as a state and its steps: iterate, measure the true residuals, restart.

The residual that an iteration carries along drifts from the true one. So every 64 iterations,
and when all columns seem to have converged, a block product measures
:math:`b - (A + \delta I) x`. Columns whose residual had drifted, or that are not there yet, start
again from the true one, as long as that helps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from curvlib.core.operator import LinearOperator
from curvlib.core.structured import LowRankPlusShift
from curvlib.estimators import iterations, sketch
from curvlib.estimators.iterations import Scratch, Step, System
from curvlib.estimators.rows import all_finite

PERIOD = 64  # iterations between measurements of the true residual
DRIFT = 2.0  # a true residual above this times the carried one is acted upon
SAFETY = 0.99  # iterations end a little below the tolerance, so that the true residual is below


@dataclass(frozen=True)
class Problem:
    """What is solved, and how.

    Attributes:
        op: The operator.
        rows: Right-hand sides, divided by their norms, rows ``[K, P]``; zero ones stay zero.
        start: Solutions to start from, in the same units, or ``None``.
        damping: What is added to the diagonal.
        method: A key of :data:`curvlib.estimators.iterations.METHODS`, or ``"direct"``.
        tolerance: Of the relative residuals.
        budget: Columns multiplied at most.
        terms: Iterations at most.
        preconditioner: An operator with ``solve``, or ``None``.
        rank: Of a Nyström preconditioner, 0 for none.
        scale: Of the Neumann series; ``None`` to estimate it.
        built: Holds the Nyström preconditioner once it is built from the state.
        scratch: Memory of the iterations.
    """

    op: LinearOperator
    rows: Tensor
    start: Tensor | None
    damping: float
    method: str
    tolerance: float
    budget: float
    terms: float
    preconditioner: Any
    rank: int
    scale: float | None
    built: list[LowRankPlusShift] = field(default_factory=list)
    scratch: Scratch = field(default_factory=Scratch)


@dataclass(frozen=True)
class SolveState:
    """Where the solves stand.

    Attributes:
        x: Solutions, rows ``[K, P]``.
        work: What the method remembers of the active columns.
        active: Columns that are iterated.
        residuals: Relative residuals, as last known, ``[K]``, float64.
        measured: The same, as last measured by a product; infinite before.
        iterations: Iterations of each column, ``[K]``.
        hints: Why a column stopped iterating, ``""`` if it seems to have converged.
        reasons: How each column ended; ``""`` while it has not.
        setup: What is made once: the preconditioner's parts, the scale.
        since: Iterations since the last measurement.
        products: Columns multiplied.
    """

    SPREAD: ClassVar = ("x", "work", "setup")

    x: Tensor
    work: dict[str, Tensor]
    active: tuple[int, ...]
    residuals: Tensor
    measured: Tensor
    iterations: Tensor
    hints: tuple[str, ...]
    reasons: tuple[str, ...]
    setup: dict[str, Any]
    since: int
    products: int


def first_state(problem: Problem, random: torch.Generator) -> SolveState:
    """The state before the first iteration, preconditioner and scale included."""
    count = problem.rows.shape[0]
    setup, products = _setup(problem, random)
    state = SolveState(
        x=torch.zeros_like(problem.rows) if problem.start is None else problem.start.clone(),
        work={},
        active=(),
        residuals=torch.ones(count, dtype=torch.float64),
        measured=torch.full((count,), math.inf, dtype=torch.float64),
        iterations=torch.zeros(count, dtype=torch.int64),
        hints=("",) * count,
        reasons=("",) * count,
        setup=setup,
        since=0,
        products=products,
    )
    zero = (iterations.row_norms(problem.rows, problem.op.spread) == 0.0).cpu()
    if bool(zero.any()):
        state.x[zero.to(state.x.device)] = 0.0
        state.residuals[zero] = 0.0
        reasons = tuple("converged" if z else "" for z in zero.tolist())
        state = replace(state, reasons=reasons)
    if problem.start is not None:
        return _measure(problem, state)
    pending = _pending(state)
    return _start_again(problem, state, pending, problem.rows[list(pending)])


def next_state(problem: Problem, state: SolveState) -> SolveState:
    """One block product: an iteration of the active columns, or a measurement of all pending."""
    pending = _pending(state)
    room = problem.budget - state.products
    if state.active and room >= len(state.active) + len(pending) and state.since < PERIOD:
        return _iterate(problem, state)
    return _measure(problem, state)


def is_done(state: SolveState) -> bool:
    """Whether every column has ended."""
    return all(state.reasons)


def _iterate(problem: Problem, state: SolveState) -> SolveState:
    system = _system(problem, state, state.active)
    step: Step = iterations.METHODS[problem.method][1](system, state.work)
    active = torch.tensor(state.active)
    residuals, counts, hints = state.residuals.clone(), state.iterations.clone(), list(state.hints)
    residuals[active] = step.norms
    counts[active] += 1
    left = step.norms <= SAFETY * problem.tolerance
    for index, why in step.stop.items():
        left[index] = True
        hints[state.active[index]] = why
    for index, at in enumerate(state.active):
        if not left[index] and counts[at] >= problem.terms:
            left[index] = True
            hints[at] = "terms"
    factor = iterations.column(step.factor, state.x)
    if len(state.active) == state.x.shape[0]:
        state.x.addcmul_(factor, step.direction)
    else:
        for at, amount, direction in zip(state.active, factor, step.direction, strict=True):
            state.x[at].addcmul_(amount, direction)
    work = step.work
    if bool(left.any()):
        keep = (~left).nonzero()[:, 0]
        work = {k: v[keep.to(v.device)] for k, v in work.items()} if len(keep) else {}
        active = active[keep]
    problem.scratch.free_all_but(work.values())
    return replace(
        state,
        work=work,
        active=tuple(active.tolist()),
        residuals=residuals,
        iterations=counts,
        hints=tuple(hints),
        since=state.since + 1,
        products=state.products + len(left),
    )


def _measure(problem: Problem, state: SolveState) -> SolveState:
    """True residuals of the pending columns: each ends, goes on, or starts again."""
    pending = _pending(state)
    system = _system(problem, state, pending)
    index = torch.tensor(pending)
    where = index.to(state.x.device)
    whole = len(pending) == len(problem.rows)
    rows, x = (problem.rows, state.x) if whole else (problem.rows[where], state.x[where])
    rest = torch.sub(rows, system.product(x), out=problem.scratch.take(rows))
    norms = iterations.row_norms(rest, problem.op.spread).cpu()
    iterations.require_finite(system, norms)
    room = problem.budget - state.products - len(pending)
    reasons = list(state.reasons)
    on: list[int] = []  # places in active
    again: list[int] = []  # places in pending
    for place, (at, norm) in enumerate(zip(pending, norms.tolist(), strict=True)):
        running = at in state.active
        if norm <= problem.tolerance:
            reasons[at] = "converged"
        elif state.hints[at] == "terms":
            reasons[at] = "terms"
        elif problem.method == "direct":
            reasons[at] = "precision"
        elif room < 2 * (len(on) + len(again) + 1):
            reasons[at] = "budget"
        elif running and norm <= DRIFT * float(state.residuals[at]):
            on.append(state.active.index(at))
        elif norm > 0.5 * float(state.measured[at]):
            reasons[at] = state.hints[at] or "precision"
        else:
            again.append(place)
    residuals, measured = state.residuals.clone(), state.measured.clone()
    residuals[index] = norms
    measured[index] = norms
    keep = torch.tensor(on, dtype=torch.int64)
    work = {k: v[keep.to(v.device)] for k, v in state.work.items()}
    state = replace(
        state,
        work=work if on else {},
        active=tuple(state.active[i] for i in on),
        residuals=residuals,
        measured=measured,
        hints=("",) * len(state.hints),
        reasons=tuple(reasons),
        since=0,
        products=state.products + len(pending),
    )
    return _start_again(problem, state, tuple(pending[p] for p in again), rest[again])


def _start_again(
    problem: Problem, state: SolveState, columns: tuple[int, ...], residuals: Tensor
) -> SolveState:
    """Adds columns to the active ones, from their residuals."""
    if not columns or problem.method == "direct":
        return state
    work = iterations.METHODS[problem.method][0](_system(problem, state, columns), residuals)
    active = state.active + columns
    if state.active:
        order = sorted(range(len(active)), key=active.__getitem__)
        work = {k: torch.cat([state.work[k], v])[order] for k, v in work.items()}
        active = tuple(sorted(active))
    return replace(state, active=active, work=work)


def _pending(state: SolveState) -> tuple[int, ...]:
    return tuple(i for i, reason in enumerate(state.reasons) if not reason)


def _setup(problem: Problem, random: torch.Generator) -> tuple[dict[str, Any], int]:
    """What is made once, and the products that it took."""
    op = problem.op
    if problem.rank:
        vectors, values = nystrom_parts(op, problem.rank, random)
        return {"vectors": vectors, "values": values}, problem.rank
    if problem.method == "neumann" and problem.scale is None:
        from curvlib.estimators.eigenpairs import eigenpairs

        seed = int(torch.randint(2**62, (), generator=random, device=random.device))
        width = min(op.shape[0], 12)
        top = eigenpairs(
            op, 1, which="LA", basis=max(width, 3), tolerance=0.05, check=False, seed=seed
        )
        norm = max(float(top.values[0] + top.residuals[0]) + problem.damping, 0.0)
        return {"scale": 1.0 / norm if norm > 0.0 else 1.0}, top.products
    return {"scale": 1.0 if problem.scale is None else problem.scale}, 0


def nystrom_parts(op: LinearOperator, rank: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows ``[rank, P]`` and eigenvalues of a Nyström approximation, from as many products."""
    omega = sketch.random_rows(op, rank, random)
    product = op.matmat(omega.mT).mT
    if not all_finite(product, op.spread):
        raise FloatingPointError(
            f"the products of the preconditioner with {op!r} have entries that are NaN or "
            "infinite; check the loss and its derivatives at these parameters (risk.check())"
        )
    return sketch.nystrom(op, omega, product)


def preconditioner_of(
    op: LinearOperator, vectors: Tensor, values: Tensor, damping: float
) -> LowRankPlusShift:
    r"""The Nyström preconditioner, whose complement has the least of the eigenvalues.

    With damping it is that of the source up to a factor: eigenvalues :math:`\lambda_i` in the
    span, :math:`\lambda_l` elsewhere. Without damping, eigenvalues at the level of rounding are
    replaced by the least above it: the inverse of noise would be the largest of all.

    Source:
        Z. Frangella, J. Tropp and M. Udell, *Randomized Nyström preconditioning*, SIAM J. Matrix
        Anal. Appl. 44 (2023), equation 5.3.
    """
    noise = op.shape[0] * torch.finfo(vectors.dtype).eps * float(values[0])
    seen = values[values > noise]
    kept = values.clamp(min=float(seen[-1])) if damping == 0.0 and len(seen) else values
    return LowRankPlusShift.from_eigenvalues(
        vectors.mT,
        kept,
        float(kept[-1]),
        name=f"Nyström of rank {len(values)}",
        spread=op.spread,
    )


def _system(problem: Problem, state: SolveState, columns: tuple[int, ...]) -> System:
    preconditioner = problem.preconditioner
    if problem.rank:
        if not problem.built:
            parts = state.setup["vectors"], state.setup["values"]
            problem.built.append(preconditioner_of(problem.op, *parts, problem.damping))
        preconditioner = problem.built[0]
    return System(
        op=problem.op,
        damping=problem.damping,
        preconditioner=preconditioner,
        scale=state.setup.get("scale", 1.0),
        columns=columns,
        products=state.products,
        scratch=problem.scratch,
    )
