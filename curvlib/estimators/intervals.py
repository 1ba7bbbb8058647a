r"""Standard errors of means over probes, and 95 % intervals that cover as often as they say."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def mean_and_stderr(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the first axis and its standard error, NaN with one sample."""
    count = samples.shape[0]
    mean = samples.mean(0)
    if count == 1:
        return mean, torch.full_like(mean, math.nan)
    return mean, ((samples - mean).square().sum(0) / (count - 1) / count).sqrt()


def t_quantile(degrees: float) -> float:
    """How many standard errors a 95 % interval extends to each side, by Student's law.

    Example:
        >>> round(t_quantile(9), 3)
        2.262
    """
    return float(t_quantiles(torch.tensor(float(degrees))))


def t_quantiles(degrees: Tensor) -> Tensor:
    """:func:`t_quantile` of each entry, in float64; infinite where there are none."""
    from scipy.special import stdtrit

    known = degrees.double().clamp_min(1e-3).numpy()
    return (
        torch.from_numpy(np.atleast_1d(stdtrit(known, 0.975)))
        .reshape(degrees.shape)
        .where(degrees > 0, torch.inf)
    )


def degrees_of(shares: Tensor, influences: Tensor | None = None) -> Tensor:
    r"""Degrees of freedom with which a mean of shares ``[m, ...]`` is known to be a variance.

    Satterthwaite's twice the squared mean by its variance, at least 2 and at most ``m - 1``.

    Args:
        shares: What each probe contributes.
        influences: How much the mean depends on each probe, where that is not its share alone.
    """
    count = shares.shape[0]
    spread = (shares if influences is None else influences).var(0) / count
    spread = spread.clamp_min(torch.finfo(shares.dtype).tiny)
    return (2 * shares.mean(0).square() / spread).clamp(min(2, count - 1), count - 1)


def interval(value: float, stderr: float, degrees: float) -> tuple[float, float]:
    """The 95 % interval of a mean by Student's law; unbounded where the error is unknown."""
    if stderr == 0.0:
        return value, value
    if math.isnan(stderr):
        return -math.inf, math.inf
    half = t_quantile(degrees) * stderr
    return value - half, value + half


def mean_interval(samples: Tensor) -> tuple[float, float]:
    r"""The 95 % interval of a mean from independent samples ``[m]``, corrected for skewness.

    Quadratic forms are skewed where few eigenvalues dominate, and the usual t-interval then
    covers too rarely (86 % with 8 probes, 91 % with 30 where one eigenvalue dominates). Hall's
    monotone cubic transformation removes the skewness to first order; the quantile is Student's
    with as many degrees of freedom as the variance is known with.

    Source: P. Hall, *On the removal of skewness by transformation*, J. R. Stat. Soc. B 54 (1992).

    Example:
        >>> low, high = mean_interval(torch.tensor([0.0, 0.1, 0.1, 0.2, 0.2, 2.0]).double())
        >>> round(low, 2), round(high, 2)
        (-0.11, 2.65)
    """
    count = samples.shape[0]
    mean, stderr = (float(x) for x in mean_and_stderr(samples))
    if count < 4 or stderr == 0.0:
        return interval(mean, stderr, count - 1)
    third = float((samples - mean).pow(3).sum()) * count / ((count - 1) * (count - 2))
    a = third / (stderr * math.sqrt(count)) ** 3 / math.sqrt(count)
    if abs(a) < 1e-3:
        return interval(mean, stderr, count - 1)

    def original(x: float) -> float:
        inside = 1.0 + a * (x - a / 6.0)
        return 3.0 / a * (math.copysign(abs(inside) ** (1.0 / 3.0), inside) - 1.0)

    quantile = t_quantile(float(degrees_of((samples - mean).square())))
    return mean - stderr * original(quantile), mean - stderr * original(-quantile)
