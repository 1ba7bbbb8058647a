"""The trace of a symmetric operator, with its standard error."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from curvlib.core.operator import LinearOperator
from curvlib.core.result import Result
from curvlib.core.run import Progress
from curvlib.estimators import exchangeable, hutchpp, leave_one_out, leave_one_out_psd, sampling
from curvlib.estimators.eigenpairs import require_symmetric
from curvlib.estimators.exact import exact
from curvlib.estimators.intervals import interval, mean_and_stderr, mean_interval
from curvlib.estimators.rows import summed
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
METHODS = {"hutchinson": 1, "hutch++": 3, "xtrace": 2, "xnystrace": 1}
#: Below this size an operator is multiplied out even when a tolerance might stop earlier.
SMALL = 64


@dataclass(frozen=True, eq=False, repr=False)
class Trace(Result):
    """A trace.

    Attributes:
        value: The estimate.
        stderr: Its standard error: 0 if exact, NaN with one probe.
        low: Lower end of the 95 % interval.
        high: Its upper end.
        samples: What each probe says, ``[m]``, float64; empty if exact. Samples of ``"xtrace"``
            and ``"xnystrace"`` share their sketch and are not independent.
        products: How many columns the operator multiplied.
        method: ``"exact"``, ``"hutchinson"``, ``"hutch++"``, ``"xtrace"`` or ``"xnystrace"``.
        converged: Whether the tolerance was met; true if none was asked for.
        size: Size of the operator.
        name: What was measured.
        settings: The settings, by name.
    """

    value: float
    stderr: float
    low: float
    high: float
    samples: Tensor
    products: int
    method: str
    converged: bool
    size: int
    name: str
    settings: dict[str, Any]

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval."""
        return self.low, self.high


def trace(
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
) -> Trace:
    r"""The trace, by random probes.

    ========== ======== ============ =====================================================
    method     products memory       error for the same products
    ========== ======== ============ =====================================================
    hutchinson 1        a few [P]    falls as products to the power -1/2
    hutch++    3        [P, m]       as 1/products for PSD operators
    xtrace     2        2 [P, m]     as the tail of the spectrum: exact when rank < probes
    xnystrace  1        2 [P, m]     likewise, with half the products; PSD operators only
    ========== ======== ============ =====================================================

    On flat spectra, where a sketch knows nothing of the rest, ``"xtrace"`` needs twice the
    products of ``"hutchinson"``, and ``"xnystrace"`` as many. Beside the products, Hutchinson's
    method reads and writes about four vectors for each; the others read those that they keep two
    to three times for each block of probes, so that a larger ``block`` costs less.

    All are unbiased. Intervals aim at 95 % coverage. For ``"hutchinson"`` and ``"hutch++"`` they
    are t-intervals of independent samples, corrected for skewness (of the residual part only, for
    Hutch++: the rest is exact). For ``"xtrace"`` and ``"xnystrace"`` the standard error includes
    the covariance that probes have by sharing a sketch, which the published estimate leaves
    out, and the quantile is Student's with as many degrees of freedom as the variance is known
    with: see :mod:`curvlib.estimators.exchangeable`.

    Args:
        op: A symmetric operator, or a dense symmetric matrix.
        method: When omitted: exact where the budget allows it, else ``"xnystrace"`` for
            operators known to be PSD and ``"xtrace"`` for others, unless their memory would
            exceed 4 GiB or the budget is below 8 products; then ``"hutchinson"``. Methods with a
            sketch multiply small operators out where that is within the budget.
        law: Of the probes: ``"rademacher"``, ``"gaussian"`` or ``"sphere"``. When omitted,
            Rademacher for Hutchinson and sphere (resphered) for the others, from 65,536 rows on
            Rademacher for all.
        probes: How many, or
        max_products: the budget in products. By default 100 products, or 1,000 with a tolerance.
        tolerance: Stops once the standard error is at most this share of the estimate, after
            8 probes or more. A later call with the same checkpoint may have a larger budget.
        block: Probes that advance together: a matter of speed and memory, not of the result.
        generator: Where the probes come from, or
        seed: their seed. With neither, the seed is 0.
        checkpoint: A file to save to, and to continue from where it exists.
        save_every: Seconds between saves.
        progress: Whether to show a bar: see :data:`curvlib.core.run.Progress`.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If the operator is not symmetric, is not PSD under ``"xnystrace"``, or an
            argument does not fit.
        FloatingPointError: If a product is not finite.

    Example:
        >>> A = torch.diag(0.5 ** torch.arange(300, dtype=torch.float64))
        >>> estimate = trace(A, max_products=60)
        >>> estimate.method, estimate.products, abs(estimate.value - 2.0) < 1e-6
        ('xtrace', 60, True)

    Source:
        M. F. Hutchinson, *A stochastic estimator of the trace of the influence matrix*, Commun.
        Stat. Simul. Comput. 18 (1989); R. A. Meyer et al., *Hutch++*, arXiv:2010.09649; E. N.
        Epperly, J. A. Tropp and R. J. Webber, *XTrace*, arXiv:2301.07825.
    """
    op = require_symmetric(op, spread=True)
    if method is not None:
        one_of("method", method, tuple(METHODS))
    if method == "xnystrace" and not op.psd:
        raise ValueError(
            f"method 'xnystrace' needs a positive semi-definite operator, got {op!r}; use "
            "'xtrace', or build the operator with psd=True if it is"
        )
    cost = METHODS[method or ("xnystrace" if op.psd else "xtrace")]
    budget = products_of(probes, max_products, tolerance, cost)
    chosen = choose(op, method, budget, tolerance)
    limit = budget if chosen in ("hutchinson", "exact") else min(budget, op.shape[0] - 1)
    setup = plan(
        op,
        law=law or ("rademacher" if chosen == "hutchinson" else law_of_sketch(op.shape[0])),
        limit=max(limit // METHODS.get(chosen, 1), 1) if chosen != "hutch++" else limit,
        block=block,
        tolerance=tolerance,
        generator=generator,
        seed=seed,
        checkpoint=checkpoint,
        save_every=save_every,
        progress=progress,
    )
    if chosen == "exact":
        value = float(summed(exact(setup).diagonal.sum(dtype=torch.float64), op.spread))
        none = torch.zeros(0, dtype=torch.float64)
        return _result(setup, chosen, value, 0.0, (value, value), none, op.shape[0])
    return _ESTIMATES[chosen](setup)


def choose(
    op: LinearOperator,
    method: str | None,
    budget: int,
    tolerance: float | None,
    holders: int | None = None,
) -> str:
    """The method for an operator and a budget of products: see :func:`trace`.

    Args:
        op: The operator.
        method: The one that is asked for.
        budget: Products.
        tolerance: See :func:`trace`.
        holders: Over how many processes vectors are spread; as those of ``op`` when omitted.
    """
    n = op.shape[0]
    if method == "hutchinson" or (method == "xtrace" and budget == 1):
        return "hutchinson"  # which XTrace with one probe is
    if budget >= n and (tolerance is None or n <= SMALL):
        return "exact"
    if method is not None:
        return method
    pick = "xnystrace" if op.psd else "xtrace"
    kept = (
        2
        * (min(budget, n) // METHODS[pick])
        * n
        * (torch.finfo(op.dtype).bits // 8)
        / (holders or op.holders)
    )
    return pick if kept <= KEPT_BYTES and budget >= 8 else "hutchinson"


def _hutchinson(setup: Plan) -> Trace:
    def statistics(state: sampling.SamplingState) -> tuple[float, float]:
        mean, stderr = mean_and_stderr(state.traces)
        return float(mean), float(stderr)

    last = setup.run(
        lambda: sampling.first_state(setup),
        lambda state: sampling.next_state(setup, state, None),
        state_type=sampling.SamplingState,
        done=lambda state: setup.done(state.count, lambda: relative(*statistics(state))),
        report=lambda state: (state.count, setup.limit, ""),
        title="trace (hutchinson)",
        settings=setup.settings,
    )
    value, stderr = statistics(last)
    ends = mean_interval(last.traces)
    return _result(setup, "hutchinson", value, stderr, ends, last.traces, last.count)


def _hutchpp(setup: Plan) -> Trace:
    budget = setup.limit
    rank = budget // 3
    rest = replace(setup, limit=budget - 2 * rank)

    def relative_error(state: hutchpp.HutchppState) -> float:
        mean, stderr = mean_and_stderr(state.samples)
        return relative(state.known + float(mean), float(stderr))

    last = setup.run(
        lambda: hutchpp.first_state(setup),
        lambda state: hutchpp.next_state(rest, state, rank),
        state_type=hutchpp.HutchppState,
        done=lambda state: rest.done(len(state.samples), lambda: relative_error(state)),
        report=lambda state: (state.products, budget, ""),
        title="trace (hutch++)",
        settings={**setup.settings, "rank": rank},
    )
    samples = last.known + last.samples
    mean, stderr = mean_and_stderr(last.samples)
    ends = mean_interval(last.samples)
    ends = (last.known + ends[0], last.known + ends[1])
    value = last.known + float(mean)
    return _result(setup, "hutch++", value, float(stderr), ends, samples, last.products)


def _xtrace(setup: Plan) -> Trace:
    n = setup.op.shape[0]

    def samples(state: leave_one_out.SketchState) -> tuple[Tensor, Tensor]:
        return exchangeable.trace_samples(
            state.R, state.H, state.W, state.norms, n, resphere=setup.law != "rademacher"
        )

    def relative_error(state: leave_one_out.SketchState) -> float:
        value, stderr, _ = exchangeable.mean_and_stderr(*samples(state))
        return relative(float(value), float(stderr))

    last = setup.run(
        lambda: leave_one_out.first_state(setup),
        lambda state: leave_one_out.next_state(setup, state, keep_images=False),
        state_type=leave_one_out.SketchState,
        done=lambda state: setup.done(state.count, lambda: relative_error(state)),
        report=lambda state: (state.products, 2 * setup.limit, ""),
        title="trace (xtrace)",
        settings=setup.settings,
    )
    return _exchangeable(setup, "xtrace", *samples(last), last.products)


def _xnystrace(setup: Plan) -> Trace:
    def relative_error(state: leave_one_out_psd.NystromState) -> float:
        samples = leave_one_out_psd.trace_samples(setup, state)
        value, stderr, _ = exchangeable.mean_and_stderr(*samples)
        return relative(float(value), float(stderr))

    last = setup.run(
        lambda: leave_one_out_psd.first_state(setup),
        lambda state: leave_one_out_psd.next_state(setup, state),
        state_type=leave_one_out_psd.NystromState,
        done=lambda state: setup.done(state.count, lambda: relative_error(state)),
        report=lambda state: (state.count, setup.limit, ""),
        title="trace (xnystrace)",
        settings=setup.settings,
    )
    samples, shares = leave_one_out_psd.trace_samples(setup, last)
    return _exchangeable(setup, "xnystrace", samples, shares, last.count)


def _exchangeable(
    setup: Plan, method: str, samples: Tensor, shares: Tensor, products: int
) -> Trace:
    value, stderr, degrees = (float(x) for x in exchangeable.mean_and_stderr(samples, shares))
    # Where the rank is below the number of probes, what is left is rounding.
    rounding = math.sqrt(len(samples)) * torch.finfo(setup.op.dtype).eps * abs(value)
    stderr = math.hypot(stderr, rounding)
    ends = interval(value, stderr, degrees)
    return _result(setup, method, value, stderr, ends, samples, products)


_ESTIMATES = {
    "hutchinson": _hutchinson,
    "hutch++": _hutchpp,
    "xtrace": _xtrace,
    "xnystrace": _xnystrace,
}


def _result(
    setup: Plan,
    method: str,
    value: float,
    stderr: float,
    ends: tuple[float, float],
    samples: Tensor,
    products: int,
) -> Trace:
    met = setup.tolerance is None or relative(value, stderr) <= setup.tolerance
    return Trace(
        value=value,
        stderr=stderr,
        low=ends[0],
        high=ends[1],
        samples=samples,
        products=products,
        method=method,
        converged=met,
        size=setup.op.shape[0],
        name=setup.op.name,
        settings={**setup.settings, "tolerance": setup.tolerance},
    )
