r"""Sums of a function over a spectrum that Gauss rules stand for, with their errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from curvlib.estimators import intervals, quadrature
from curvlib.estimators.quadrature import QuadratureState

#: A function of eigenvalues: maps a float64 tensor to one of the same shape.
Function = Callable[[Tensor], Tensor]
#: Skewness below which the law is taken as symmetric.
SYMMETRIC = 1e-3
#: What counts as rounding, in machine epsilons times the norm.
ROUNDING = 100.0


@dataclass(frozen=True)
class Found:
    """What the rules give: see :class:`curvlib.estimators.functions.FunctionTrace`."""

    value: float
    stderr: float
    interval: tuple[float, float]
    quadrature_error: float
    samples: Tensor
    exact: float
    nodes: Tensor
    weights: Tensor
    clipped: int


@dataclass(frozen=True)
class Sums:
    """A function, and the spectrum that it is summed over.

    Attributes:
        fn: The function.
        function: What it is, in words.
        above: Where it is defined, for functions of positive definite operators: for values
            above this one, which is minus the damping. ``None`` is everywhere.
        outliers: Eigenvalues that are known, ``[k]``.
        dimension: How many others there are.
        operator: What the operator is, in words.
        eps: Machine epsilon of its products.
        sphere: Whether probes are uniform on the sphere: the rules then tell the variance and
            the skewness of what probes say, too.
    """

    fn: Function
    function: str
    above: float | None
    outliers: Tensor
    dimension: int
    operator: str
    eps: float
    sphere: bool

    def of(self, state: QuadratureState) -> Found:
        """The trace and its errors, from some recurrences."""
        nodes, weights, _ = quadrature.quadrature(state)
        exact, values, clipped = self._evaluate(nodes, weights)
        samples = (weights * values).sum(1) * self.dimension
        mean, error = intervals.mean_and_stderr(samples)
        value, stderr = exact + float(mean), float(error)
        interval = intervals.interval(value, stderr, samples.numel() - 1)
        if self.sphere:
            stderr, skewness = sphere_spread(values, weights, self.dimension)
            interval = skewed_interval(value, stderr, skewness)
        return Found(
            value=value,
            stderr=stderr,
            interval=interval,
            quadrature_error=self._rule_error(state, samples),
            samples=samples,
            exact=exact,
            nodes=nodes,
            weights=weights,
            clipped=clipped,
        )

    def check(self, state: QuadratureState) -> None:
        """Raises where recurrences show eigenvalues outside the function's domain."""
        if self.above is not None:
            nodes, weights, _ = quadrature.quadrature(state)
            self._inside(nodes, weights, self.above)

    def _rule_error(self, state: QuadratureState, samples: Tensor) -> float:
        """How much rules of one to three steps less differ at most, in the mean over probes."""
        exact = [float(state.betas[p, n - 1]) == 0.0 for p, n in enumerate(state.lengths)]
        if any(n == 1 and not e for n, e in zip(state.lengths, exact, strict=True)):
            return math.nan
        worst = 0.0
        for less in (1, 2, 3):
            lengths = tuple(
                n if e else max(n - less, 1) for n, e in zip(state.lengths, exact, strict=True)
            )
            nodes, weights, _ = quadrature.quadrature(replace(state, lengths=lengths))
            lesser = (weights * self._evaluate(nodes, weights)[1]).sum(1) * self.dimension
            worst = max(worst, float((samples - lesser).abs().mean()))
        return worst

    def _evaluate(self, nodes: Tensor, weights: Tensor) -> tuple[float, Tensor, int]:
        """The sum over the outliers, the values at the nodes, and how many were clipped."""
        outliers, clipped = self.outliers, 0
        if self.above is not None:
            outliers, nodes, clipped = self._inside(nodes, weights, self.above)
        values = self._values(nodes, weights)
        exact = float(self._values(outliers, torch.ones_like(outliers)).sum())
        return exact, values, clipped

    def _values(self, nodes: Tensor, weights: Tensor) -> Tensor:
        values: Any = self.fn(nodes)
        if not isinstance(values, Tensor):
            raise TypeError(
                f"expected fn to return a tensor, got {type(values).__name__}; write it with "
                "functions of torch, such as torch.exp"
            )
        if values.shape != nodes.shape:
            raise ValueError(
                "expected fn to return one value for each eigenvalue, of shape "
                f"{list(nodes.shape)}, got {list(values.shape)}"
            )
        bad = ~torch.isfinite(values) & (weights > 0.0)
        if bool(bad.any()):
            where = nodes[bad]
            raise ValueError(
                f"{self.function} is not finite at {where.numel()} of {int((weights > 0.0).sum())} "
                f"Ritz values of {self.operator}, from {float(where.min()):.3g} to "
                f"{float(where.max()):.3g}; fn= must be defined on the whole spectrum"
            )
        return torch.where(weights > 0.0, values.double(), 0.0)

    def _inside(self, nodes: Tensor, weights: Tensor, above: float) -> tuple[Tensor, Tensor, int]:
        """Outliers and nodes without negative rounding errors, and how many had one.

        Raises:
            ValueError: If a value is not above ``above``.
        """
        used = torch.cat([nodes[weights > 0.0], self.outliers])
        floor = ROUNDING * self.eps * float(used.abs().max())
        negative = used[(used < -floor) & (used <= above)]
        if negative.numel():
            low = float(negative.min())
            share = float(weights[nodes <= float(negative.max())].sum()) / nodes.shape[0]
            count = share * self.dimension + int((self.outliers <= float(negative.max())).sum())
            raise ValueError(
                f"{self.function} of {self.operator} is not defined: {negative.numel()} of "
                f"{used.numel()} Ritz values (they stand for about {count:.3g} eigenvalues) are "
                f"{f'at most {above:g}' if above else 'negative'}, down to {low:.3g}. Pass a "
                f"damping= above {-low:.3g} (eigenvalues may lie somewhat further out), or an "
                "operator without negative eigenvalues, such as curvlib.ggn(risk) instead of the "
                "Hessian"
            )
        zeros = int((used.abs() <= floor).sum())
        if above == 0.0 and zeros:
            raise ValueError(
                f"{self.function} of {self.operator} is not defined: {zeros} of {used.numel()} "
                "Ritz values are zero up to rounding, so that the operator is singular; pass a "
                "positive damping="
            )
        clipped = int(((used < 0.0) & (used >= -floor)).sum())
        return _clip(self.outliers, floor), _clip(nodes, floor), clipped


def sphere_spread(values: Tensor, weights: Tensor, dimension: int) -> tuple[float, float]:
    r"""Standard error and skewness of a mean over probes that are uniform on the sphere.

    With :math:`F = f(A) - \bar f I` of dimension ``n`` and trace zero, the form of a random unit
    vector times ``n`` has the variance :math:`2 n \|F\|_F^2 / (n + 2)` and the third central
    moment :math:`8 n^2\, \mathrm{tr} F^3 / ((n + 2)(n + 4))` (moments of Dirichlet's law); and
    the rules that give the trace give :math:`\mathrm{tr} F^2` and :math:`\mathrm{tr} F^3` too.
    That is more than the scatter of a few samples tells.

    Args:
        values: Of the function at each node, ``[R, steps]``.
        weights: Of the nodes, ``[R, steps]``; each row sums to one.
        dimension: ``n``.
    """
    n, count = dimension, values.shape[0]
    centred = values - (weights * values).sum(1).mean()
    square, cube = (float((weights * centred**p).sum(1).mean()) * n for p in (2, 3))
    # The mean is itself an estimate, around which the squares are smaller.
    variance = 2 * n / (n + 2) * square / (1 - 2 / ((n + 2) * count))
    if variance <= 0.0:
        return 0.0, 0.0
    third = 8 * n * n / ((n + 2) * (n + 4)) * cube
    return math.sqrt(variance / count), third / variance**1.5 / math.sqrt(count)


def skewed_interval(value: float, stderr: float, skewness: float) -> tuple[float, float]:
    r"""The 95 % interval of a mean whose law is that of a sum of squares.

    The mean is taken as a part that is known and a multiple, unknown, of a gamma variate whose
    shape :math:`k = 4 / \gamma^2` gives the skewness :math:`\gamma`; the multiple's interval is
    exact (as the interval of a variance by the law of chi-squared is). Without skewness, that is
    the normal interval; where one eigenvalue dominates, it is the interval of its square alone.

    Args:
        value: The mean.
        stderr: Its standard error.
        skewness: Its skewness.

    Example:
        >>> [round(end, 2) for end in skewed_interval(0.0, 1.0, 0.0)]
        [-1.96, 1.96]
        >>> [round(end, 2) for end in skewed_interval(0.0, 1.0, 0.5)]
        [-1.41, 3.0]
    """
    from scipy.special import gammaincinv, ndtri

    if abs(skewness) < SYMMETRIC:
        reach = float(ndtri(0.975)) * stderr
        return value - reach, value + reach
    shape, multiple = 4.0 / skewness**2, 2.0 * stderr / skewness
    ends = [
        value - multiple + multiple * shape / max(float(gammaincinv(shape, level)), 1e-300)
        for level in (0.975, 0.025)
    ]
    return min(ends), max(ends)


def _clip(values: Tensor, floor: float) -> Tensor:
    return torch.where((values < 0.0) & (values >= -floor), 0.0, values)
