r"""Linear systems with a symmetric operator, for many right-hand sides at once."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlib.core.operator import LinearOperator, digest
from curvlib.core.result import Result
from curvlib.core.run import Progress, Report, run
from curvlib.estimators import iterations, solve_state
from curvlib.estimators.eigenpairs import require_symmetric
from curvlib.estimators.probes import generator_of
from curvlib.estimators.solve_state import Problem, SolveState

#: Conjugate gradients, MINRES, Neumann series, and the operator's own ``solve``.
METHODS = ("cg", "minres", "neumann", "direct")


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
            products' own accuracy allows no less), ``"inconsistent"`` (the operator is
            singular to working precision, and the residual about as small as it can be) or ``"terms"``.
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
    damping = number("damping", damping)
    method = choose_method(op, method, damping)
    rank, given = read_preconditioner(op, preconditioner)
    if method == "direct" and preconditioner is not None:
        raise ValueError("method='direct' takes no preconditioner=; use 'cg' or 'minres'")
    tolerance = default_tolerance(op) if tolerance is None else number("tolerance", tolerance)
    if not 0.0 < tolerance < 1.0:
        raise ValueError(f"expected 0 < tolerance < 1, got {tolerance}")
    if method != "neumann" and (terms is not None or scale is not None):
        raise ValueError(f"terms= and scale= belong to method='neumann', got method={method!r}")
    if scale is not None and not number("scale", scale) > 0.0:
        raise ValueError(f"expected a positive scale=, got {scale}")
    if method == "neumann" and preconditioner is not None and scale is None:
        raise ValueError(
            "a preconditioned Neumann series needs scale=, below 2 over the largest eigenvalue of "
            "M^-1 A; 1.0 where the preconditioner is no less than the operator"
        )
    count = columns.shape[1]
    budget = read_budget(op, count, max_products, rank, guess is not None)
    if terms is not None:
        positive_int("terms", terms)
    settings = {
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
    inverses = torch.where(norms > 0.0, 1.0 / norms, 0.0 * norms)
    rows = (columns.mT * inverses[:, None]).contiguous()
    start = None if guess is None else (guess.mT * inverses[:, None]).contiguous()
    if method == "direct":
        start = op.solve(rows.mT, damping=damping).mT.contiguous()  # type: ignore[attr-defined]
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
    inputs = [columns] if guess is None else [columns, guess]
    state = run(
        lambda: solve_state.first_state(problem, random),
        lambda state: solve_state.next_state(problem, state),
        state_type=SolveState,
        done=solve_state.is_done,
        report=lambda state: _report(problem, state),
        title=f"solve with {op.name}",
        checkpoint=checkpoint,
        problem=lambda: f"{op.fingerprint()} {digest(inputs)} {_fingerprint(given)}",
        settings=settings,
        device=op.device,
        save_every=save_every,
        progress=progress,
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


def _fingerprint(preconditioner: Any) -> str:
    if preconditioner is None:
        return ""
    own = getattr(preconditioner, "fingerprint", None)
    return str(own()) if callable(own) else type(preconditioner).__name__


# -------------------------------------------------------------------- arguments
def choose_method(op: LinearOperator, method: str | None, damping: float) -> str:
    """The method that is asked for, or the one that fits what is known of the operator.

    Raises:
        ValueError: If it is unknown, or ``"direct"`` for an operator without ``solve``.
    """
    own = callable(getattr(op, "solve", None))
    if method is None:
        return "direct" if own else "cg" if op.psd and damping >= 0.0 else "minres"
    if method not in METHODS:
        raise ValueError(f"unknown method={method!r}; there are {', '.join(METHODS)}")
    if method == "direct" and not own:
        raise ValueError(f"{op!r} has no solve of its own; use method='cg' or 'minres'")
    return method


def read_preconditioner(op: LinearOperator, preconditioner: Any) -> tuple[int, Any]:
    """Rank of a Nyström preconditioner (0 for none), and a given preconditioner.

    Raises:
        TypeError: If it is neither an int nor has a ``solve``.
        ValueError: If the rank or the shape does not fit.
    """
    if preconditioner is None:
        return 0, None
    n = op.shape[0]
    if isinstance(preconditioner, int) and not isinstance(preconditioner, bool):
        if not 1 <= preconditioner <= n:
            raise ValueError(f"expected a rank from 1 to {n} for preconditioner=, got {preconditioner}")
        return preconditioner, None
    if not callable(getattr(preconditioner, "solve", None)):
        raise TypeError(
            "preconditioner= takes an operator with solve(columns, damping=...), such as those of "
            "curvlib.core.structured, or an int (the rank of a Nyström preconditioner), got "
            f"{type(preconditioner).__name__}"
        )
    shape = getattr(preconditioner, "shape", op.shape)
    if tuple(shape) != op.shape:
        raise ValueError(f"expected a preconditioner of shape {op.shape}, got {tuple(shape)}")
    return 0, preconditioner


def read_budget(
    op: LinearOperator, count: int, max_products: int | None, rank: int, guess: bool
) -> int:
    """How many columns may be multiplied.

    Raises:
        TypeError: If it is no int.
        ValueError: If it allows not even one iteration.
    """
    before = rank + (count if guess else 0)
    if max_products is None:
        return before + count * min(max(10 * op.shape[0], 100), 10_000)
    positive_int("max_products", max_products)
    if max_products < before + 2 * count:
        raise ValueError(
            f"expected max_products >= {before + 2 * count} (an iteration and a measurement of "
            f"the residual for each of {count} right-hand sides, {before} before), got "
            f"{max_products}"
        )
    return max_products


def right_hand_sides(op: LinearOperator, b: Any, name: str) -> Tensor:
    """Columns ``[P, K]`` of finite numbers, from ``[P]`` or ``[P, K]``.

    Raises:
        TypeError: If it is no tensor of the operator's type.
        ValueError: If its shape or device does not fit, or a number is not finite.
    """
    n = op.shape[0]
    if not isinstance(b, Tensor):
        raise TypeError(f"expected a torch.Tensor [{n}] or [{n}, K] for {name}, got {type(b).__name__}")
    if b.ndim not in (1, 2) or b.shape[0] != n or (b.ndim == 2 and b.shape[1] == 0):
        raise ValueError(f"expected {name} of shape [{n}] or [{n}, K], got {list(b.shape)}")
    if b.dtype != op.dtype:
        raise TypeError(f"expected {name} in {op.dtype}, got {b.dtype}; use {name}.to({op.dtype})")
    if b.device != op.device:
        raise ValueError(f"expected {name} on {op.device}, got {b.device}; use {name}.to(...)")
    if not bool(torch.isfinite(b).all()):
        raise ValueError(f"expected finite numbers in {name}, got NaN or infinity")
    b = b.detach()
    return b if b.ndim == 2 else b[:, None]


def column_norms(columns: Tensor) -> Tensor:
    """Norms of the columns, without overflow or underflow on the way."""
    largest = columns.abs().amax(0)
    scale = torch.where(largest > 0.0, largest, torch.ones_like(largest))
    return torch.linalg.vector_norm(columns / scale, dim=0) * scale


def default_tolerance(op: LinearOperator) -> float:
    """Of relative residuals: what damped solves reach in the operator's type."""
    return 1e-6 if op.dtype == torch.float64 else 1e-4


def number(name: str, value: Any) -> float:
    """A finite number.

    Raises:
        TypeError: If it is none.
        ValueError: If it is not finite.
    """
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"expected a number for {name}, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number for {name}, got {value}")
    return float(value)


def positive_int(name: str, value: Any) -> None:
    """Checks a positive int.

    Raises:
        TypeError: If it is no int.
        ValueError: If it is not positive.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected an int for {name}, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"expected {name} >= 1, got {value}")


# Names that a caller meets in except clauses.
NegativeCurvatureError = iterations.NegativeCurvatureError
