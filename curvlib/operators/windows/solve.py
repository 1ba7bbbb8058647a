r"""Products and solves with M-FAC matrices: passes over a window around its factorized systems.

Passes over float32 and bfloat16 windows round to float32. For solves, what that does to the
result is estimated on the small side; where it is more than ``accuracy`` the passes are done again
in float64. The estimate sees the cancellation in :math:`x - G^\top K^{-1} G x`, which is strong
where ``x`` lies in the span of long rows: there float32 alone would have no correct digit left at
a condition number of 1e7.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from curvlib.operators.windows.rows import Rows
from curvlib.operators.windows.system import System
from curvlib.operators.windows.systems import Damping, Systems

F64 = torch.float64


def product(window: Rows, system: System, x: Tensor) -> Tensor:
    """``F x`` for ``[P, K]``, in two passes."""
    exact = system.extreme
    coefficients = window.inner(x, exact=exact) / system.count
    out = window.combination(coefficients, exact=exact).to(x.dtype)
    return _add_scaled(out, x, system.damping.tolist(), window)


def solve(systems: Systems, damping: Damping, x: Tensor, accuracy: float) -> Tensor:
    """``F^{-1} x`` for ``[P, K]``, in two passes, or three where ``accuracy`` asks for it.

    Where it asks for more than rounded Gram matrices tell, these are polished first.
    """
    window, system = systems.window, systems.current(*damping)
    exact = system.extreme or window.dtype == F64
    products = window.inner(x, exact=exact)
    coefficients = system.solve(products)
    if not exact and math.isfinite(accuracy):
        norms = [torch.linalg.vector_norm(x[start:stop], dim=0) for start, stop in _bounds(window)]
        squares = window.summed(torch.stack(norms).to(F64).square())
        exact = not system.solve_error(squares, products, coefficients) <= accuracy
        if exact and system.rounded:
            window.polish()
            return solve(systems, damping, x, accuracy)
        if exact:
            coefficients = system.solve(window.inner(x, exact=True))
    out = window.combination(coefficients, exact=exact)
    for used, (start, stop) in zip(system.damping.tolist(), _bounds(window), strict=True):
        part = out[start:stop]
        torch.sub(x[start:stop], part, out=part).div_(used)
    return out.to(x.dtype)


def solve_row(systems: Systems, damping: Damping, index: int, accuracy: float) -> Tensor:
    """``F^{-1} g``, ``[P]``, for a row (0 is the oldest, -1 the newest), in one pass."""
    window, system = systems.window, systems.current(*damping)
    coefficients = system.coefficients_of_row(window.slot(index))
    exact = system.extreme or window.dtype == F64
    if not exact and math.isfinite(accuracy):
        exact = not system.row_error(coefficients) <= accuracy
        if exact and system.rounded:
            window.polish()
            return solve_row(systems, damping, index, accuracy)
    return window.combination(coefficients, exact=exact)[:, 0]


def powered(window: Rows, parts: tuple[Tensor, Tensor, list[float]], x: Tensor) -> Tensor:
    """``F^p x`` for ``[P, K]`` from what :meth:`System.power` returned, in two float64 passes."""
    vectors, weights, outside = parts
    inner = vectors.mT @ window.inner(x, exact=True)
    out = window.combination(vectors @ (weights * inner), exact=True)
    return _add_scaled(out, x, outside, window).to(x.dtype)


def _add_scaled(out: Tensor, x: Tensor, factors: Sequence[float], window: Rows) -> Tensor:
    for factor, (start, stop) in zip(factors, _bounds(window), strict=True):
        out[start:stop].add_(x[start:stop], alpha=factor)
    return out


def _bounds(window: Rows) -> Iterator[tuple[int, int]]:
    """Where each part starts and stops."""
    yield from itertools.pairwise(itertools.accumulate(window.parts, initial=0))
