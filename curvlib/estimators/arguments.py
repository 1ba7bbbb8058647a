r"""What estimators take, checked: every error says what was expected, what came, what to do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvlib.core.arguments import finite_number
from curvlib.core.operator import LinearOperator
from curvlib.core.ranks.spread import Spread
from curvlib.estimators.rows import finite_everywhere

#: Conjugate gradients, MINRES, Neumann series, and the operator's own ``solve``.
METHODS = ("cg", "minres", "neumann", "direct")


def read_settings(
    op: LinearOperator,
    *,
    damping: Any,
    method: str | None,
    preconditioner: Any,
    tolerance: Any,
    terms: Any,
    scale: Any,
) -> tuple[float, str, float]:
    """Damping, method and tolerance, checked with the settings that go with them.

    Raises:
        TypeError: If one is of a wrong type.
        ValueError: If one does not fit.
    """
    damping = finite_number("damping", damping)
    method = choose_method(op, method, damping)
    if method == "direct" and preconditioner is not None:
        raise ValueError("method='direct' takes no preconditioner=; use 'cg' or 'minres'")
    if tolerance is None:
        tolerance = 1e-6 if op.dtype == torch.float64 else 1e-4
    tolerance = finite_number("tolerance", tolerance)
    if not 0.0 < tolerance < 1.0:
        raise ValueError(f"expected 0 < tolerance < 1, got {tolerance}")
    if method != "neumann" and (terms is not None or scale is not None):
        raise ValueError(f"terms= and scale= belong to method='neumann', got method={method!r}")
    if terms is not None:
        require_counts(terms=(terms, 1))
    if scale is not None and not finite_number("scale", scale) > 0.0:
        raise ValueError(f"expected a positive scale=, got {scale}")
    if method == "neumann" and preconditioner is not None and scale is None:
        raise ValueError(
            "a preconditioned Neumann series needs scale=, below 2 over the largest eigenvalue of "
            "M^-1 A; 1.0 where the preconditioner is no less than the operator"
        )
    return damping, method, tolerance


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
            raise ValueError(
                f"expected a rank from 1 to {n} for preconditioner=, got {preconditioner}"
            )
        return preconditioner, None
    if not callable(getattr(preconditioner, "solve", None)):
        raise TypeError(
            "preconditioner= takes an operator with solve(columns, damping=...), such as those of "
            "curvlib.core.structured, or an int (the rank of a Nyström preconditioner), got "
            f"{type(preconditioner).__name__}"
        )
    if getattr(preconditioner, "spread", None) != op.spread:
        raise ValueError(
            f"a preconditioner of {op!r} has to have its vectors on the same processes, got "
            f"{preconditioner!r}; pass an int (the rank of a Nyström preconditioner), or one that "
            "is made with spread=op.spread from this process's rows"
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
    require_counts(max_products=(max_products, 1))
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
    n = op.length
    if not isinstance(b, Tensor):
        raise TypeError(
            f"expected a torch.Tensor [{n}] or [{n}, K] for {name}, got {type(b).__name__}"
        )
    if b.ndim not in (1, 2) or b.shape[0] != n or (b.ndim == 2 and b.shape[1] == 0):
        raise ValueError(f"expected {name} of shape [{n}] or [{n}, K], got {list(b.shape)}")
    if b.dtype != op.dtype:
        raise TypeError(f"expected {name} in {op.dtype}, got {b.dtype}; use {name}.to({op.dtype})")
    if b.device != op.device:
        raise ValueError(f"expected {name} on {op.device}, got {b.device}; use {name}.to(...)")
    if not finite_everywhere(b, op.spread):
        raise ValueError(f"expected finite numbers in {name}, got NaN or infinity")
    columns: Tensor = b.detach()
    return columns if columns.ndim == 2 else columns[:, None]


def column_norms(columns: Tensor, spread: Spread | None = None) -> Tensor:
    """Norms of the columns, without overflow or underflow on the way."""
    if spread is not None:
        own = column_norms(columns) if len(columns) else columns.new_zeros(columns.shape[1])
        return column_norms(torch.stack(spread.group.rows(own[None]), 0)[:, 0])
    largest = columns.abs().amax(0)
    scale = torch.where(largest > 0.0, largest, torch.ones_like(largest))
    norms: Tensor = torch.linalg.vector_norm(columns / scale, dim=0) * scale
    return norms


def require_counts(**counts: tuple[Any, int]) -> None:
    """Checks integers, each given with the least that it may be.

    Raises:
        TypeError: If one is no int.
        ValueError: If one is too small.
    """
    for name, (value, least) in counts.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"expected an int for {name}, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"expected {name} >= {least}, got {value}")
