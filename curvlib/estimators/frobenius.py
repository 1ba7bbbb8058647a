"""The Frobenius norm of an operator, with its standard error."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlib.core.operator import LinearOperator, as_operator
from curvlib.core.result import Result
from curvlib.core.run import Progress
from curvlib.estimators import exchangeable, leave_one_out, sampling
from curvlib.estimators.exact import exact
from curvlib.estimators.intervals import interval, mean_and_stderr, mean_interval
from curvlib.estimators.rows import inner
from curvlib.estimators.stopping import (
    KEPT_BYTES,
    Plan,
    law_of_sketch,
    one_of,
    plan,
    products_of,
    relative,
)

#: Methods, and the products that a probe costs in each.
METHODS = {"hutchinson": 1, "xtrace": 2}


@dataclass(frozen=True, eq=False, repr=False)
class FrobeniusNorm(Result):
    """A Frobenius norm, the root of an unbiased estimate of its square.

    Attributes:
        value: The norm.
        stderr: Its standard error, to first order that of the square by twice the norm.
        low: Lower end of the 95 % interval, the root of that of the square.
        high: Its upper end.
        squared: The squared norm: the sum of all squared entries, for symmetric operators the
            sum of the squared eigenvalues.
        squared_stderr: Its standard error: 0 if exact, NaN with one probe.
        samples: What each probe says of the squared norm, ``[m]``, float64; empty if exact.
        products: How many columns the operator multiplied.
        method: ``"exact"``, ``"hutchinson"`` or ``"xtrace"``.
        converged: Whether the tolerance was met; true if none was asked for.
        name: What was measured.
        settings: The settings, by name.
    """

    value: float
    stderr: float
    low: float
    high: float
    squared: float
    squared_stderr: float
    samples: Tensor
    products: int
    method: str
    converged: bool
    name: str
    settings: dict[str, Any]

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval."""
        return self.low, self.high


def frobenius_norm(
    op: LinearOperator | Tensor,
    *,
    method: str | None = None,
    law: str | None = None,
    probes: int | None = None,
    max_products: int | None = None,
    tolerance: float | None = None,
    block: int = 8,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: float = 30.0,
    progress: Progress = None,
) -> FrobeniusNorm:
    r"""The Frobenius norm, from products alone (none with the transpose).

    ``"hutchinson"`` averages :math:`\|A w\|^2`, whose mean is :math:`\|A\|_F^2`, for operators of
    any shape. ``"xtrace"`` (symmetric operators, two products for each probe) knows the part
    that the other probes have sketched, :math:`\|A P_i\|_F^2`, and samples only
    :math:`\|A (I - P_i) w_i\|^2`: exact when the rank is below the number of probes, and far
    better wherever the spectrum decays. The square is unbiased in both; its root is low by half
    its relative variance.

    Args:
        op: An operator or a dense matrix.
        method: When omitted: exact where the budget allows it, else ``"xtrace"`` for symmetric
            operators, unless its memory would exceed 4 GiB or the budget is below 8 products.
        law: Of the probes: ``"rademacher"``, ``"gaussian"`` or ``"sphere"``. When omitted,
            Rademacher for Hutchinson and sphere (resphered) for XTrace, from 65,536 columns on
            Rademacher for both.
        probes: How many, or
        max_products: the budget in products. By default 100 products, or 1,000 with a tolerance.
        tolerance: Stops once the standard error is at most this share of the norm, after
            8 probes or more.
        block: Probes that advance together: a matter of speed and memory, not of the result.
        generator: Where the probes come from, or
        seed: their seed. With neither, the seed is 0.
        checkpoint: A file to save to, and to continue from where it exists.
        save_every: Seconds between saves.
        progress: Whether to show a bar: see :data:`curvlib.core.run.Progress`.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If the operator is not symmetric under ``"xtrace"``, or an argument does not
            fit.
        FloatingPointError: If a product is not finite.

    Example:
        >>> A = torch.diag(0.5 ** torch.arange(300, dtype=torch.float64))
        >>> norm = frobenius_norm(A, max_products=40)
        >>> norm.method, abs(norm.squared - 4 / 3) < 1e-6
        ('xtrace', True)

    Source:
        M. F. Hutchinson (1989) and E. N. Epperly et al., arXiv:2301.07825, for the trace of
        :math:`A^\top A`; the leave-one-out form is derived in
        :func:`curvlib.estimators.exchangeable.square_samples`.
    """
    op = as_operator(op, spread=True)
    if 0 in op.shape:
        raise ValueError(f"the operator is empty, of shape {op.shape}: it has no norm to estimate")
    if method is not None:
        one_of("method", method, tuple(METHODS))
    if method == "xtrace" and not op.symmetric:
        raise ValueError(
            f"method 'xtrace' needs a symmetric operator, got {op!r}; use 'hutchinson'"
        )
    cost = METHODS[method or ("xtrace" if op.symmetric else "hutchinson")]
    budget = products_of(probes, max_products, tolerance, cost)
    chosen = choose(op, method, budget, tolerance)
    limit = budget if chosen != "xtrace" else max(min(budget, op.shape[1] - 1) // 2, 1)
    setup = plan(
        op,
        law=law or (law_of_sketch(op.shape[1]) if chosen == "xtrace" else "rademacher"),
        limit=limit,
        block=block,
        tolerance=tolerance,
        generator=generator,
        seed=seed,
        checkpoint=checkpoint,
        save_every=save_every,
        progress=progress,
    )
    if chosen == "exact":
        squared = exact(setup).squares
        none = torch.zeros(0, dtype=torch.float64)
        return _result(setup, chosen, squared, 0.0, (squared, squared), none, op.shape[1])
    return _hutchinson(setup) if chosen == "hutchinson" else _xtrace(setup)


def choose(op: LinearOperator, method: str | None, budget: int, tolerance: float | None) -> str:
    """The method for an operator and a budget of products: see :func:`frobenius_norm`."""
    n = op.shape[1]
    if method == "hutchinson" or (method == "xtrace" and budget == 1):
        return "hutchinson"
    if budget >= n and (tolerance is None or n <= 64):
        return "exact"
    if method is not None:
        return method
    kept = 3 * (min(budget, n) // 2) * n * (torch.finfo(op.dtype).bits // 8) / op.holders
    fits = op.symmetric and kept <= KEPT_BYTES and budget >= 8
    return "xtrace" if fits else "hutchinson"


def _hutchinson(setup: Plan) -> FrobeniusNorm:
    def squares(state: sampling.SamplingState) -> Tensor:
        assert state.squares is not None
        return state.squares

    def relative_error(state: sampling.SamplingState) -> float:
        mean, stderr = mean_and_stderr(squares(state))
        return 0.5 * relative(float(mean), float(stderr))

    last = setup.run(
        lambda: sampling.first_state(setup, squares=True),
        lambda state: sampling.next_state(setup, state, None),
        state_type=sampling.SamplingState,
        done=lambda state: setup.done(state.count, lambda: relative_error(state)),
        report=lambda state: (state.count, setup.limit, ""),
        title="Frobenius norm (hutchinson)",
        settings=setup.settings,
    )
    squared, stderr = (float(x) for x in mean_and_stderr(squares(last)))
    ends = mean_interval(squares(last))
    return _result(setup, "hutchinson", squared, stderr, ends, squares(last), last.count)


def _xtrace(setup: Plan) -> FrobeniusNorm:
    def statistics(state: leave_one_out.SketchState) -> tuple[Tensor, Tensor]:
        gram = inner(state.images, state.images, spread=setup.op.spread)
        return exchangeable.square_samples(
            state.R,
            state.H,
            state.W,
            gram,
            state.norms,
            setup.op.shape[0],
            resphere=setup.law != "rademacher",
        )

    def relative_error(state: leave_one_out.SketchState) -> float:
        mean, stderr, _ = exchangeable.mean_and_stderr(*statistics(state))
        return 0.5 * relative(float(mean), float(stderr))

    last = setup.run(
        lambda: leave_one_out.first_state(setup),
        lambda state: leave_one_out.next_state(setup, state, keep_images=True),
        state_type=leave_one_out.SketchState,
        done=lambda state: setup.done(state.count, lambda: relative_error(state)),
        report=lambda state: (state.products, 2 * setup.limit, ""),
        title="Frobenius norm (xtrace)",
        settings=setup.settings,
    )
    samples, shares = statistics(last)
    mean, stderr, degrees = (float(x) for x in exchangeable.mean_and_stderr(samples, shares))
    rounding = math.sqrt(len(samples)) * torch.finfo(setup.op.dtype).eps * mean
    stderr = math.hypot(stderr, rounding)
    ends = interval(mean, stderr, degrees)
    return _result(setup, "xtrace", mean, stderr, ends, samples, last.products)


def root_error(squared: float, stderr: float) -> tuple[float, float]:
    """The root of a squared norm, and its standard error by the delta method.

    Example:
        >>> root_error(4.0, 0.4)
        (2.0, 0.1)
    """
    value = math.sqrt(max(squared, 0.0))
    return value, (stderr / (2 * value) if value else math.sqrt(stderr))


def _result(
    setup: Plan,
    method: str,
    squared: float,
    stderr: float,
    ends: tuple[float, float],
    samples: Tensor,
    products: int,
) -> FrobeniusNorm:
    value, error = root_error(squared, stderr)
    met = setup.tolerance is None or relative(value, error) <= setup.tolerance
    return FrobeniusNorm(
        value=value,
        stderr=error,
        low=math.sqrt(max(ends[0], 0.0)),
        high=math.sqrt(max(ends[1], 0.0)),
        squared=squared,
        squared_stderr=stderr,
        samples=samples,
        products=products,
        method=method,
        converged=met,
        name=setup.op.name,
        settings={**setup.settings, "tolerance": setup.tolerance},
    )
