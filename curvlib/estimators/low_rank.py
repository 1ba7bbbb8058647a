r"""Low-rank approximations of symmetric operators, with an error estimated from fresh probes."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlib.core.operator import LinearOperator
from curvlib.core.ranks.spread import Spread
from curvlib.core.result import Result
from curvlib.core.run import Progress, Report, run
from curvlib.core.space import ParamSpace
from curvlib.core.structured import LowRankPlusShift
from curvlib.estimators import adaptive_rank, fixed_rank
from curvlib.estimators.adaptive_rank import Growth, GrowthState
from curvlib.estimators.arguments import require_counts
from curvlib.estimators.eigenpairs import require_symmetric
from curvlib.estimators.intervals import mean_interval
from curvlib.estimators.probes import generator_of
from curvlib.estimators.stopping import products_of

#: Single-pass approximation of positive semi-definite operators, and Rayleigh-Ritz for any.
METHODS = ("nystrom", "eigh")


@dataclass(frozen=True, eq=False, repr=False)
class LowRank(Result):
    r""":math:`\hat A = U \,\mathrm{diag}(\lambda)\, U^\top`, and how far it is from :math:`A`.

    The error comes from probes :math:`w` that the approximation has not seen:
    :math:`\|A - \hat A\|_F^2 = E \|(A - \hat A) w\|^2`, so its square is unbiased.

    Attributes:
        values: :math:`\lambda`, ``[k]``, float64, the largest absolute values first.
        vectors: :math:`U`, ``[P, k]``, orthonormal, column-contiguous; this process's rows of it
            where vectors are spread over processes.
        squared_error: Estimate of :math:`\|A - \hat A\|_F^2`; NaN without probes.
        squared_error_stderr: Its standard error.
        squared_norm: Estimate of :math:`\|A\|_F^2` from the same probes.
        low: Lower end of the 95 % interval of :attr:`error`.
        high: Its upper end.
        products: Columns multiplied, those for the error included.
        method: ``"nystrom"`` or ``"eigh"``.
        converged: Whether the tolerance was met; true if none was asked for.
        name: What was approximated.
        settings: The settings, by name.
    """

    values: Tensor
    vectors: Tensor
    squared_error: float
    squared_error_stderr: float
    squared_norm: float
    low: float
    high: float
    products: int
    method: str
    converged: bool
    name: str
    settings: dict[str, Any]

    @property
    def operator(self) -> LowRankPlusShift:
        r""":math:`\hat A` as an operator with ``solve``, ``logdet`` and the like.

        Raises:
            ValueError: If the vectors are spread over processes: see :meth:`operator_in`.
        """
        holders = self.settings.get("holders", 1)
        if holders > 1:
            raise ValueError(
                f"the vectors of this approximation are spread over {holders} processes, of which "
                "each knows its rows only; use operator_in(risk.space)"
            )
        return self._operator(None)

    def operator_in(self, space: ParamSpace) -> LowRankPlusShift:
        """The same where vectors may be spread over processes, of the space of the parameters."""
        return self._operator(space.spread)

    def _operator(self, spread: Spread | None) -> LowRankPlusShift:
        name = f"{self.name}, rank {self.values.numel()}"
        return LowRankPlusShift.from_eigenvalues(
            self.vectors, self.values, name=name, spread=spread
        )

    @property
    def error(self) -> float:
        r"""Estimate of :math:`\|A - \hat A\|_F`."""
        return math.sqrt(self.squared_error)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of :attr:`error`, from its samples by fresh probes.

        As that of a mean of squares: see :func:`curvlib.estimators.intervals.mean_interval`.
        """
        return self.low, self.high

    @property
    def error_stderr(self) -> float:
        """Standard error of :attr:`error`, to first order."""
        if self.squared_error == 0.0:
            return 0.0
        return self.squared_error_stderr / (2.0 * self.error)

    @property
    def relative_error(self) -> float:
        r"""Estimate of :math:`\|A - \hat A\|_F / \|A\|_F`, 0 for the zero operator."""
        if self.squared_norm == 0.0:
            return 0.0
        return math.sqrt(self.squared_error / self.squared_norm)


def low_rank(
    op: LinearOperator | Tensor,
    rank: int | None = None,
    *,
    tolerance: float | None = None,
    max_products: int | None = None,
    method: str | None = None,
    power: int = 1,
    oversampling: int = 10,
    probes: int = 10,
    block: int | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: float = 30.0,
    progress: Progress = None,
) -> LowRank:
    r"""The dominant part of a symmetric operator from ``(rank + oversampling)`` random vectors.

    With a fixed rank, takes ``(rank + oversampling) * (power + 1)`` products by Nyström's method,
    one pass more by ``"eigh"``, and ``probes`` for the error. With a tolerance, the rank grows a
    block at a time until the error is below, for ``power + 1`` products for each unit of rank and
    twice ``probes``: see :mod:`curvlib.estimators.adaptive_rank`. For the eigenpairs themselves
    to high accuracy use :func:`curvlib.eigenpairs`; this is for approximations, where every
    product is a block.

    Args:
        op: A symmetric operator, or a dense symmetric matrix.
        rank: Eigenpairs kept, 1 to P. With a tolerance: at most so many; P when omitted.
        tolerance: Of the relative error, ``norm(A - Ahat) / norm(A)`` in the Frobenius norm, that
            ends the growth.
        max_products: At most so many with a tolerance; 1,000 when omitted.
        method: ``"nystrom"`` for positive semi-definite operators (the better approximation, for
            a pass less), ``"eigh"`` for any: a random subspace and the eigenvalues of the
            operator in it. When omitted, by whether ``op.psd``.
        power: Times that the random vectors are multiplied first: subspace iteration.
        oversampling: Vectors more than ``rank``; none with a tolerance.
        probes: Fresh Rademacher probes for the error; with 0 the error is NaN, and at least 2 are
            needed for its standard error. As many others decide when a tolerance is met.
        block: Columns multiplied at a time, and by which the rank grows. When omitted, 32, and 8
            with a tolerance.
        generator: Where random vectors come from, or
        seed: their seed. With neither, the seed is 0.
        checkpoint: A file to save to, and to continue from where it exists.
        save_every: Seconds between saves.
        progress: Whether to show a bar: see :data:`curvlib.core.run.Progress`.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If the operator is not symmetric, or an argument does not fit.
        RuntimeError: If Nyström's method meets a negative eigenvalue.
        FloatingPointError: If a product is not finite.

    Example:
        >>> A = torch.diag(torch.tensor([5.0, 2.0, 0.0, 0.0], dtype=torch.float64))
        >>> found = low_rank(A, 2)
        >>> [round(v, 6) for v in found.values.tolist()], found.error < 1e-6
        ([5.0, 2.0], True)
        >>> round(found.operator.logdet(damping=1.0), 6) == round(
        ...     torch.tensor(18.0).log().item(), 6
        ... )
        True
        >>> B = torch.diag(0.5 ** torch.arange(99, dtype=torch.float64))
        >>> grown = low_rank(B, tolerance=1e-3)
        >>> grown.values.numel(), grown.relative_error < 1e-3
        (16, True)

    Source:
        N. Halko, P.-G. Martinsson and J. Tropp, *Finding structure with randomness*, SIAM Review
        53 (2011), algorithms 4.4 and 5.3; J. Tropp et al., *Fixed-rank approximation of a
        positive-semidefinite matrix from streaming data*, NeurIPS 2017, algorithm 3.
    """
    op = require_symmetric(op, spread=True)
    n = op.shape[0]
    if rank is None and tolerance is None:
        raise ValueError("pass rank= (eigenpairs kept) or tolerance= (relative error), or both")
    block = (32 if tolerance is None else 8) if block is None else block
    require_counts(
        rank=(n if rank is None else rank, 1),
        power=(power, 0),
        oversampling=(oversampling, 0),
        probes=(probes, 0),
        block=(block, 1),
    )
    if rank is not None and rank > n:
        raise ValueError(f"expected rank <= {n} (the operator's size), got {rank}")
    method = ("nystrom" if op.psd else "eigh") if method is None else method
    if method not in METHODS:
        raise ValueError(f"unknown method={method!r}; there are {', '.join(METHODS)}")
    settings = {
        "rank": rank,
        "tolerance": tolerance,
        "max_products": max_products,
        "method": method,
        "power": power,
        "oversampling": oversampling,
        "probes": probes,
        "block": block,
        "seed": (seed or 0) if generator is None else "generator",
        "dtype": str(op.dtype).removeprefix("torch."),
        "device": op.device.type,
    }
    random = generator_of(generator, seed, op.device)
    how: dict[str, Any] = {
        "title": f"low rank of {op.name}",
        "checkpoint": checkpoint,
        "problem": op.fingerprint,
        "settings": settings,
        "device": op.device,
        "save_every": save_every,
        "progress": progress,
        "group": op.group,
        "spread": op.spread,
    }
    if tolerance is not None:
        budget = _budget(tolerance, max_products, probes, power)
        most = n if rank is None else rank
        growth = Growth(op, method, tolerance, most, budget, power, block, probes, probes)
        return _grown(growth, random, settings, how)
    if max_products is not None:
        raise ValueError("max_products= goes with tolerance=; a fixed rank sets the products")
    assert rank is not None
    width = min(n, rank + oversampling)
    passes = power + (1 if method == "nystrom" else 2)
    total = width * passes + probes
    state = run(
        lambda: fixed_rank.first_state(op, width, probes, random),
        lambda state: fixed_rank.next_state(op, state, rank, method, passes, block),
        state_type=fixed_rank.SketchState,
        done=lambda state: state.passes == passes and state.tested == probes,
        report=lambda state: _report(state, total, passes),
        **how,
    )
    return _result(op, state.block, state.values, state.squares, state.products, settings)


def _budget(tolerance: Any, max_products: int | None, probes: int, power: int) -> int:
    """Products for everything but the fresh probes."""
    most = products_of(None, max_products, tolerance, 1)
    least = 2 * probes + power + 1
    if probes < 2:
        raise ValueError(f"a tolerance needs at least 2 probes to tell the error, got {probes}")
    if most < least:
        raise ValueError(
            f"expected max_products >= {least} (twice {probes} probes, and {power + 1} for the "
            f"first unit of rank), got {most}"
        )
    return most - probes


def _grown(
    growth: Growth, random: torch.Generator, settings: dict[str, Any], how: dict[str, Any]
) -> LowRank:
    def report(state: GrowthState) -> Report:
        note = f"rank {state.rank}, error {state.error:.0e}"
        return state.products, growth.budget + growth.probes, note

    state = run(
        lambda: adaptive_rank.first_state(growth, random),
        lambda state: adaptive_rank.next_state(growth, state),
        state_type=GrowthState,
        done=lambda state: adaptive_rank.is_done(growth, state),
        report=report,
        **how,
    )
    if state.error > growth.tolerance and state.rank < growth.op.shape[0]:
        why = "rank" if state.rank == growth.most else "max_products"
        warnings.warn(
            f"the approximation of {growth.op.name} of rank {state.rank} has a relative error of "
            f"{state.error:.1e}, the tolerance is {growth.tolerance:.1e}; pass a larger {why}= or "
            "tolerance=",
            RuntimeWarning,
            stacklevel=3,
        )
    met = state.error <= growth.tolerance
    return _result(
        growth.op, state.basis[0], state.values, state.squares, state.products, settings, met
    )


def _result(
    op: LinearOperator,
    vectors: Tensor,
    values: Tensor,
    squares: Tensor,
    products: int,
    settings: dict[str, Any],
    converged: bool = True,
) -> LowRank:
    error, norm = squares
    count = error.numel()
    low, high = mean_interval(error) if count else (-math.inf, math.inf)
    return LowRank(
        values=values,
        vectors=vectors.mT,
        squared_error=float(error.mean()) if count else math.nan,
        squared_error_stderr=float(error.std()) / math.sqrt(count) if count > 1 else math.nan,
        squared_norm=float(norm.mean()) if count else math.nan,
        low=math.sqrt(max(low, 0.0)),
        high=math.sqrt(high),
        products=products,
        method=settings["method"],
        converged=converged,
        name=op.name,
        settings=settings if op.spread is None else {**settings, "holders": op.holders},
    )


def _report(state: fixed_rank.SketchState, total: int, passes: int) -> Report:
    note = "error" if state.passes == passes else f"pass {state.passes + 1} of {passes}"
    return state.products, total, note
