r"""The everyday question: the batch size changes, what becomes of the learning rate?

=============  =====================================================  =========================
rule           factor of the learning rate                            where it applies
=============  =====================================================  =========================
``knee``       :math:`(1 + B^*/B_0) / (1 + B^*/B_1)`                  SGD, any batch sizes, with
                                                                      the critical batch size
``linear``     :math:`B_1 / B_0`                                      SGD far below it
``none``       1                                                      SGD far above it
``sqrt``       :math:`\sqrt{B_1 / B_0}`                               Adam and other adaptive
                                                                      methods
``damping``    1; the damping by :math:`B_0 / B_1`                    damped second-order methods
=============  =====================================================  =========================

The first is the law of mean-square stability, :math:`\eta \propto 1 / (\lambda_1 + \nu / B)` with
:math:`B^* = \nu / \lambda_1`; the next two are its limits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from curvlib.core.result import Result
from curvlib.estimators.arguments import require_counts
from curvlib.rates.learning_rate import MaxLearningRate
from curvlib.rates.methods import OPTIMIZERS

#: Rules by name.
RULES = ("knee", "linear", "none", "sqrt", "damping")


@dataclass(frozen=True, eq=False, repr=False)
class ScaledRate(Result):
    """A learning rate for another batch size.

    Attributes:
        value: The learning rate.
        factor: By how much it is scaled.
        damping_factor: By how much damping is scaled; 1 except for the rule ``"damping"``.
        rule: Which rule was used.
        why: Why, and what to mind.
    """

    value: float
    factor: float
    damping_factor: float
    rule: str
    why: str


def scale(
    lr: float,
    from_batch: int,
    to_batch: int,
    *,
    optimizer: str = "sgd",
    knee: float | MaxLearningRate | None = None,
    rule: str | None = None,
) -> ScaledRate:
    r"""A learning rate that works for one batch size, for another one.

    Args:
        lr: What works.
        from_batch: For batches of this size.
        to_batch: The size that is asked about.
        optimizer: ``"sgd"``, ``"momentum"``, ``"adam"`` or ``"damped"``.
        knee: The critical batch size, or what :func:`max_learning_rate` returned, which measured
            it. With momentum, it includes the amplification of noise.
        rule: One of :data:`RULES`. When omitted, the one that applies: ``"knee"`` for SGD with a
            known critical batch size, else ``"linear"``; ``"sqrt"`` for Adam; ``"damping"`` for
            damped methods.

    Raises:
        TypeError: If a batch size is no int.
        ValueError: If a number is not positive, or the optimizer or rule is unknown or needs a
            ``knee``.

    Example:
        >>> scale(0.1, 32, 128).value
        0.4
        >>> found = scale(0.1, 32, 128, knee=64)
        >>> round(found.value, 6), found.rule
        (0.2, 'knee')
        >>> round(scale(1e-3, 64, 256, optimizer="adam").value, 6)
        0.002

    Source:
        P. Goyal et al., *Accurate, large minibatch SGD*, 2017 (linear); D. Granziol, S. Zohren and
        S. Roberts, *Learning rates as a function of batch size*, JMLR 23 (2022) (all three);
        S. Malladi et al., *On the SDEs and scaling rules for adaptive gradient algorithms*, 2022.
    """
    if not (math.isfinite(lr) and lr > 0.0):
        raise ValueError(f"expected a positive learning rate, got {lr}")
    require_counts(from_batch=(from_batch, 1), to_batch=(to_batch, 1))
    if optimizer not in OPTIMIZERS:
        raise ValueError(
            f"unknown optimizer={optimizer!r}; there are {', '.join(map(repr, OPTIMIZERS))}"
        )
    if rule is not None and rule not in RULES:
        raise ValueError(f"unknown rule={rule!r}; there are {', '.join(map(repr, RULES))}")
    critical = _critical(knee)
    chosen = _rule(optimizer, critical) if rule is None else rule
    if chosen == "knee" and critical is None:
        raise ValueError(
            "rule='knee' needs knee=, the critical batch size: "
            "max_learning_rate(risk, batch_sizes) measures it"
        )
    ratio = to_batch / from_batch
    damping = 1.0
    if chosen == "linear":
        factor = ratio
    elif chosen == "sqrt":
        factor = math.sqrt(ratio)
    elif chosen == "knee":
        assert critical is not None
        factor = (1.0 + critical / from_batch) / (1.0 + critical / to_batch)
    else:
        factor = 1.0
        damping = 1.0 / ratio if chosen == "damping" else 1.0
    why = _why(chosen, from_batch, to_batch, critical)
    return ScaledRate(lr * factor, factor, damping, chosen, why)


def _critical(knee: Any) -> float | None:
    value = knee.knee if isinstance(knee, MaxLearningRate) else knee
    if value is None:
        return None
    if not (math.isfinite(value) and value > 0.0):
        raise ValueError(f"expected a positive critical batch size for knee=, got {value}")
    return float(value)


def _rule(optimizer: str, critical: float | None) -> str:
    if optimizer == "adam":
        return "sqrt"
    if optimizer == "damped":
        return "damping"
    return "linear" if critical is None else "knee"


def _why(rule: str, start: int, stop: int, critical: float | None) -> str:
    """The rule in words."""
    if rule == "knee":
        place = (
            "below it, where rates grow in proportion to the batch"
            if max(start, stop) < 0.25 * (critical or 0.0)
            else "above it, where larger batches hardly allow larger rates"
            if min(start, stop) > 4.0 * (critical or 0.0)
            else "near it, where rates grow, but less than in proportion"
        )
        return (
            f"SGD is mean-square stable up to a rate proportional to 1 / (1 + B* / B); the "
            f"critical batch size is B* = {critical:.3g}, and {start} and {stop} are {place}"
        )
    if rule == "linear":
        return (
            "far below the critical batch size, the stable rate of SGD is proportional to the "
            "batch; above it, it stops growing: measure it (max_learning_rate) and pass knee= "
            "before going far up"
        )
    if rule == "none":
        return (
            "far above the critical batch size, the stable rate is 2 / lambda_max whatever the "
            "batch"
        )
    if rule == "sqrt":
        extra = (
            f"; from batches of about {critical:.3g} on, rates stop growing"
            if critical is not None and max(start, stop) > critical
            else ""
        )
        return (
            "adaptive methods divide by the root of the squared gradient, which is noise "
            "of variance proportional to 1 / B in small batches: the stable rate grows as the "
            f"square root of the batch{extra}"
        )
    return (
        "a damped second-order step at a fixed rate is stable if damping exceeds the curvature's "
        "noise, which needs damping proportional to rate / B: keep the rate, and scale the damping "
        f"by {start / stop:.3g}"
    )
