r"""Linear systems with a symmetric operator, for many right-hand sides at once."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlib.core.operator import LinearOperator, digest
from curvlib.core.result import Result
from curvlib.core.run import Progress, Report, run
from curvlib.core.structured import damped_solve
from curvlib.estimators import solve_state
from curvlib.estimators.arguments import (
    column_norms,
    read_budget,
    read_preconditioner,
    read_settings,
    right_hand_sides,
)
from curvlib.estimators.eigenpairs import require_symmetric
from curvlib.estimators.probes import generator_of
from curvlib.estimators.solve_state import Problem, SolveState


@dataclass(frozen=True, eq=False, repr=False)
class Solution(Result):
    r"""Solutions of :math:`(A + \delta I) x = b`, with measured residuals.

    Attributes:
        value: The solution, ``[P]`` or ``[P, K]``, like the right-hand side.
        residuals: :math:`\|b - (A + \delta I) x\| / \|b\|`, measured by a product at the end,
            ``[K]``, float64.
        iterations: Iterations of each column, ``[K]``.
        converged: Whether the residual is at most the tolerance, ``[K]``.
        reasons: How each column ended: ``"converged"``, ``"budget"``, ``"precision"`` (the
            products' own accuracy allows no less), ``"inconsistent"`` (the operator is singular
            to working precision, and the residual about as small as it can be) or ``"terms"``.
        products: Columns multiplied, all told.
        method: ``"cg"``, ``"minres"``, ``"neumann"`` or ``"direct"``.
        name: What was solved with.
        settings: The settings, by name.
    """

    value: Tensor
    residuals: Tensor
    iterations: Tensor
    converged: Tensor
    reasons: tuple[str, ...]
    products: int
    method: str
    name: str
    settings: dict[str, Any]


def solve(
    op: LinearOperator | Tensor,
    b: Tensor,
    *,
    damping: float = 0.0,
    method: str | None = None,
    preconditioner: Any = None,
    tolerance: float | None = None,
    max_products: int | None = None,
    terms: int | None = None,
    scale: float | None = None,
    x0: Tensor | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: float = 30.0,
    progress: Progress = None,
) -> Solution:
    r"""Solves :math:`(A + \delta I)\, x = b` for one or many right-hand sides.

    All columns advance in one block product per iteration, and leave it when they have
    converged. At the end the true residuals are measured; columns whose own recurrence had
    drifted go on from there.

    Args:
        op: A symmetric operator, or a dense symmetric matrix.
        b: Right-hand sides, ``[P]`` or ``[P, K]``.
        damping: :math:`\delta`.
        method: ``"cg"`` for positive definite operators; ``"minres"`` for indefinite ones;
            ``"neumann"``, the series :math:`s \sum_j (I - s (A + \delta I))^j b`; ``"direct"``,
            the operator's own ``solve``. When omitted: ``"direct"`` where there is one, ``"cg"``
            where ``op.psd`` and ``damping >= 0``, else ``"minres"``.
        preconditioner: An operator near ``op`` with ``solve(columns, damping=...)``, positive
            definite with the same damping, such as those of :mod:`curvlib.core.structured`; or an
            int, the rank of a randomized Nyström preconditioner (for positive semi-definite
            operators; takes as many products).
        tolerance: Of each column's relative residual; 1e-6 in float64, 1e-4 in float32 when
            omitted.
        max_products: Stop after so many products, with what there is. When omitted, ten times
            P (at least 100, at most 10,000) for each column.
        terms: Terms of the Neumann series after which it is truncated. Reaching them is no
            failure, but the residuals say what it left.
        scale: :math:`s` of the Neumann series, below 2 over the largest eigenvalue. When omitted,
            1 over an estimate of it, which takes some products; needed with a preconditioner.
        x0: Where to start from, shaped as ``b``.
        generator: Where random vectors come from (Nyström, scale), or
        seed: their seed. With neither, the seed is 0.
        checkpoint: A file to save to, and to continue from where it exists.
        save_every: Seconds between saves.
        progress: Whether to show a bar: see :data:`curvlib.core.run.Progress`.

    Returns:
        The solutions. Columns that did not converge are marked, and a ``RuntimeWarning`` says
        why.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If the operator is not symmetric, or an argument does not fit.
        NegativeCurvatureError: If conjugate gradients meet a direction without positive
            curvature; a ``RuntimeError`` that has the direction.
        RuntimeError: If the preconditioner is not positive, or the Neumann series diverges.
        FloatingPointError: If a product is not finite.

    Example:
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
        >>> solution = solve(A, torch.ones(3, dtype=torch.float64), damping=1.0, method="cg")
        >>> [round(v, 6) for v in solution.value.tolist()], solution.iterations.tolist()
        ([0.5, 0.333333, 0.2], [3])

    Source:
        M. Hestenes and E. Stiefel (1952) for conjugate gradients; C. Paige and M. Saunders (1975)
        for MINRES; Z. Frangella, J. Tropp and M. Udell, *Randomized Nyström preconditioning*,
        SIAM J. Matrix Anal. Appl. 44 (2023).
    """
    op = require_symmetric(op)
    columns = right_hand_sides(op, b, "b")
    guess = None if x0 is None else right_hand_sides(op, x0, "x0")
    if guess is not None and x0 is not None and x0.shape != b.shape:
        raise ValueError(f"expected x0= shaped as b, {list(b.shape)}, got {list(x0.shape)}")
    damping, method, tolerance = read_settings(
        op,
        damping=damping,
        method=method,
        preconditioner=preconditioner,
        tolerance=tolerance,
        terms=terms,
        scale=scale,
    )
    rank, given = read_preconditioner(op, preconditioner)
    count = columns.shape[1]
    budget = read_budget(op, count, max_products, rank, guess is not None)
    settings: dict[str, Any] = {
        "method": method,
        "damping": damping,
        "preconditioner": rank or (None if given is None else getattr(given, "name", "own")),
        "tolerance": tolerance,
        "max_products": max_products,
        "terms": terms,
        "scale": scale,
        "x0": guess is not None,
        "seed": (seed or 0) if generator is None else "generator",
        "dtype": str(op.dtype).removeprefix("torch."),
        "device": op.device.type,
    }
    # Whatever the units of b, the iterations work on vectors of norm one.
    norms = column_norms(columns)
    units = torch.where(norms > 0.0, norms, torch.ones_like(norms))[:, None]
    rows = (columns.mT / units).contiguous()
    start = None if guess is None else (guess.mT / units).contiguous()
    if method == "direct":
        start = damped_solve(op, rows.mT, damping).mT.contiguous()
    problem = Problem(
        op=op,
        rows=rows,
        start=start,
        damping=damping,
        method=method,
        tolerance=tolerance,
        budget=budget,
        terms=math.inf if terms is None else terms,
        preconditioner=given,
        rank=rank,
        scale=scale,
    )
    random = generator_of(generator, seed, op.device)
    own: Callable[[], str] = getattr(given, "fingerprint", lambda: type(given).__name__)
    inputs = [columns] if guess is None else [columns, guess]
    state = run(
        lambda: solve_state.first_state(problem, random),
        lambda state: solve_state.next_state(problem, state),
        state_type=SolveState,
        done=solve_state.is_done,
        report=lambda state: _report(problem, state),
        title=f"solve with {op.name}",
        checkpoint=checkpoint,
        problem=lambda: f"{op.fingerprint()} {digest(inputs)} {own()}",
        settings=settings,
        device=op.device,
        save_every=save_every,
        progress=progress,
        group=op.group,
    )
    _warn(problem, state)
    value = (state.x * norms[:, None]).mT
    return Solution(
        value=value if b.ndim == 2 else value[:, 0],
        residuals=state.residuals,
        iterations=state.iterations,
        converged=state.residuals <= tolerance,
        reasons=state.reasons,
        products=state.products,
        method=method,
        name=op.name,
        settings=settings,
    )


def _warn(problem: Problem, state: SolveState) -> None:
    failed = [i for i, why in enumerate(state.reasons) if why not in ("converged", "terms")]
    if not failed:
        return
    worst = max(failed, key=lambda i: float(state.residuals[i]))
    residual = float(state.residuals[worst])
    remedies = {
        "budget": "pass a larger max_products=, a preconditioner= or more damping=",
        "precision": (
            f"the products' own accuracy does not allow less in {problem.op.dtype}: pass a larger "
            "tolerance= or more damping=, or use float64"
        ),
        "inconsistent": (
            "the operator is singular to working precision and b is not in its range, so this is "
            "near a least-squares solution: pass damping="
        ),
    }
    warnings.warn(
        f"{len(failed)} of {len(state.reasons)} right-hand sides of {problem.op.name} did not "
        f"converge by {problem.method} after {state.products} products: the largest relative "
        f"residual is {residual:.1e}, the tolerance {problem.tolerance:.1e}; "
        f"{remedies[state.reasons[worst]]}",
        RuntimeWarning,
        stacklevel=3,
    )


def _report(problem: Problem, state: SolveState) -> Report:
    done = sum(why != "" for why in state.reasons)
    worst = float(state.residuals.max())
    note = f"{done}/{len(state.reasons)} converged, residual {worst:.0e}"
    if problem.terms < math.inf:
        return state.products, state.products + float(problem.terms - state.iterations.max()), note
    floor = problem.tolerance
    share = float((state.residuals.clamp(floor, 1.0).log() / math.log(floor)).mean())
    total = None if share < 0.05 else min(problem.budget, state.products / share)
    return state.products, total, note
