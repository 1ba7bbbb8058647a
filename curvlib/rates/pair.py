r"""How learning rate and momentum follow from readings of curvature.

See :mod:`curvlib.rates.learner` for the rule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from curvlib.rates.laws import polyak

#: How much of a cut learning rate comes back at each reading without a new rise of the loss.
RECOVERY = 2.0**0.25


@dataclass(frozen=True)
class Pair:
    """Learning rate and momentum, and what they rest on.

    Attributes:
        log_sharpness: Moving average of the sharpness's logarithm; NaN before the first reading.
        log_smallest: That of the low curvature.
        noise: Moving average of the noise.
        lr: The learning rate; ``None`` before the first reading.
        momentum: The momentum.
        cut: Factor of the learning rate after roll-backs, at most 1.
    """

    log_sharpness: float = math.nan
    log_smallest: float = math.nan
    noise: float = math.nan
    lr: float | None = None
    momentum: float = 0.0
    cut: float = 1.0

    def after(
        self,
        sharpness: float,
        smallest: float,
        noise: float,
        *,
        smoothing: float,
        change: float,
        safety: float,
        max_momentum: float,
    ) -> tuple[Pair, str]:
        """The pair after a reading, and what went otherwise than usual.

        Args:
            sharpness: The largest curvature of a training batch.
            smallest: The low curvature that counts.
            noise: The positive trace over the effective batch size.
            smoothing: Weight of the past.
            change: Largest factor of the change of learning rate and ``1 - momentum``.
            safety: Factor of the learning rate.
            max_momentum: Largest momentum.

        Example:
            >>> pair, _ = Pair().after(
            ...     9.0, 1.0, 0.0, smoothing=0.5, change=2.0, safety=1.0, max_momentum=0.95
            ... )
            >>> round(pair.lr, 6), round(pair.momentum, 6)
            (0.25, 0.25)
        """
        if not (sharpness > 0.0 and smallest > 0.0):
            return self, (
                f"the largest curvature is {sharpness:.3g}, which is not positive: no learning "
                "rate follows from it, so learning rate and momentum are kept"
            )
        past = smoothing if math.isfinite(self.log_sharpness) else 0.0
        high = _average(self.log_sharpness, math.log(sharpness), past)
        low = _average(self.log_smallest, math.log(min(smallest, sharpness)), past)
        nu = _average(self.noise, noise, past)
        L, l = math.exp(high), math.exp(min(low, high))
        momentum = min(polyak(L, l).momentum, max_momentum)
        cut = min(1.0, self.cut * RECOVERY)
        if self.lr is not None:
            momentum = max(0.0, 1.0 - _within(1.0 - momentum, 1.0 - self.momentum, change))
        lr = safety * cut * noisy_rate(L, nu, momentum)
        note = ""
        if self.lr is not None:
            bounded = _within(lr, self.lr, change)
            note = "" if bounded == lr else f"the change of the rate from {self.lr:.3g} was bounded"
            lr = bounded
        return Pair(high, low, nu, lr, momentum, cut), note

    def less(self, lr: float, momentum: float, factor: float) -> Pair:
        """The pair with the learning rate ``lr`` that is in force cut by a factor."""
        return replace(self, lr=lr * factor, momentum=momentum, cut=self.cut * factor)


def low_curvature(nodes: Tensor, weights: Tensor, share: float) -> float:
    r"""The curvature below which lies a share of the positive trace.

    Args:
        nodes: Ritz values, ascending, ``[m]``.
        weights: Their quadrature weights, ``[m]``.
        share: In [0, 1); 0 gives the smallest positive node.

    Returns:
        The node, or 0 where none is positive.

    Example:
        >>> import torch
        >>> low_curvature(torch.tensor([-1.0, 0.1, 1.0, 9.0]), torch.full((4,), 0.25), 0.05)
        1.0
    """
    positive = (nodes > 1e-6 * float(nodes.abs().max())) & (weights > 0.0)
    if not bool(positive.any()):
        return 0.0
    values, mass = nodes[positive], (nodes * weights)[positive]
    below = mass.cumsum(0) / mass.sum()
    index = int((below <= share).sum())
    return float(values[min(index, len(values) - 1)])


def noisy_rate(sharpness: float, noise: float, momentum: float) -> float:
    """The learning rate for a momentum: Polyak's without noise, half the stable one in noise.

    Args:
        sharpness: ``L``, positive.
        noise: ``nu``, at least 0.
        momentum: In [0, 1).

    Example:
        >>> noisy_rate(1.0, 0.0, 0.25), noisy_rate(1.0, 3.0, 0.0)
        (2.25, 0.25)
    """
    return 1.0 / (sharpness / (1.0 + math.sqrt(momentum)) ** 2 + noise / (1.0 - momentum))


def _average(old: float, new: float, past: float) -> float:
    return new if past == 0.0 else past * old + (1.0 - past) * new


def _within(value: float, old: float, factor: float) -> float:
    return min(max(value, old / factor), old * factor)
