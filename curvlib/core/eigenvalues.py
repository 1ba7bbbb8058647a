"""Checks of eigenvalues, of which each rank may hold some: finite, not zero, positive."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from curvlib.core.arguments import finite_number
from curvlib.core.operator import LinearOperator
from curvlib.core.ranks.spread import Spread


def summed(numbers: Tensor, spread: Spread | None) -> Tensor:
    """The sum of every rank's numbers."""
    return numbers if spread is None else spread.sum(numbers)


def counted(marked: Tensor, spread: Spread | None) -> int:
    """How many entries of a mask are true, here and on the other ranks."""
    return int(summed(marked.sum(), spread))


def least(values: Tensor, spread: Spread | None) -> float:
    """The least of every rank's values."""
    own = float(values.min()) if values.numel() else math.inf
    return own if spread is None else -spread.most(-own)


def finite_tensor(name: str, values: Any, ndim: int, spread: Spread | None = None) -> Tensor:
    """What a caller gave for ``name``, if it is a tensor of finite numbers.

    Raises:
        TypeError: If it is no tensor, or neither float32 nor float64.
        ValueError: If its shape does not fit, or an entry is not finite.
    """
    if not isinstance(values, Tensor):
        raise TypeError(f"expected a torch.Tensor for {name}, got {type(values).__name__}")
    if values.ndim != ndim:
        raise ValueError(f"expected {name} with {ndim} dimension(s), got {list(values.shape)}")
    if values.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"expected {name} in float32 or float64, got {values.dtype}")
    count = values.numel()
    if spread is not None:
        if len(values) != spread.length:
            raise ValueError(
                f"expected this process's {spread.length} rows of {name}, got {list(values.shape)}"
            )
        count = spread.size * (count // max(spread.length, 1))
    bad = counted(~torch.isfinite(values), spread)
    if bad:
        raise ValueError(f"{bad} of {count} entries of {name} are NaN or infinite")
    return values


def require_regular(
    op: LinearOperator, values: Tensor, damping: float, spread: Spread | None = None
) -> None:
    """Raises RuntimeError if an eigenvalue is zero."""
    zero = counted(values == 0, spread)
    if zero:
        raise RuntimeError(
            f"{op!r} with damping={damping:g} is singular: {zero} of its {values.numel()} distinct "
            "eigenvalues are zero; pass a larger damping="
        )


def require_positive(
    op: LinearOperator, values: Tensor, damping: float, spread: Spread | None = None
) -> None:
    """Raises RuntimeError if an eigenvalue is not positive."""
    bad = counted(values <= 0, spread)
    if bad:
        lowest = least(values, spread)
        raise RuntimeError(
            f"log det of {op!r} with damping={damping:g} needs positive eigenvalues, but "
            f"{bad} are not, the least is {lowest:.3g}; pass damping > {damping - lowest:.3g}"
        )


def require_power(
    op: LinearOperator, values: Tensor, power: Any, spread: Spread | None = None
) -> None:
    """Raises RuntimeError if a power of the eigenvalues is not real, or infinite."""
    p = finite_number("p", power)
    negative = 0 if p.is_integer() else counted(values < 0, spread)
    if negative:
        lowest = least(values, spread)
        raise RuntimeError(
            f"power {p:g} of {op!r} is not real: {negative} eigenvalues are negative, the "
            f"least is {lowest:.3g}; use op.shift({-lowest:.3g}) or an integer power"
        )
    if p < 0:
        zero = counted(values == 0, spread)
        if zero:
            raise RuntimeError(
                f"power {p:g} of {op!r} is infinite: {zero} of its distinct eigenvalues are zero; "
                "use op.shift(damping).power(p)"
            )
