"""What functions of :mod:`curvlib.rates` share: kinds of curvature, seeds, checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvlib.core.minibatch import example_count
from curvlib.core.operator import LinearOperator
from curvlib.core.random import generator_of
from curvlib.core.risk import Risk
from curvlib.operators.ggn import ggn
from curvlib.operators.hessian import hessian

#: Kinds of curvature that mini-batches are measured by.
KINDS: dict[str, Callable[[Risk], LinearOperator]] = {"hessian": hessian, "ggn": ggn}


def require_risk(risk: Any) -> int:
    """``N``, the number of examples of a risk whose mini-batches make sense.

    Raises:
        TypeError: If it is no risk.
        ValueError: If it is a sum, or has one example only.
    """
    if not isinstance(risk, Risk):
        raise TypeError(f"expected a curvlib.Risk, got {type(risk).__name__}")
    risk.require_whole("this measurement")
    if risk.loss.reduction == "sum":
        raise ValueError(
            "mini-batches of a loss with reduction='sum' are not on the scale of the whole sum; "
            "use reduction='mean'"
        )
    count = example_count(risk)
    if count < 2:
        raise ValueError(
            f"the data has {count} example: mini-batches differ from the whole, and noise is "
            "defined, for two examples or more"
        )
    return count


def curvature(risk: Risk, kind: str) -> LinearOperator:
    """The Hessian or GGN of a risk.

    Raises:
        ValueError: If the kind is unknown.
    """
    require_kind(kind)
    return KINDS[kind](risk)


def require_kind(kind: str) -> None:
    """Raises ValueError for an unknown kind of curvature."""
    if kind not in KINDS:
        raise ValueError(f"kind= is one of {', '.join(map(repr, KINDS))}, got {kind!r}")


def first_seed(generator: torch.Generator | None, seed: int | None) -> int:
    """A number from which the seeds of all draws follow: draw ``i`` has this plus ``i``."""
    return int(torch.randint(2**62, (), generator=generator_of(generator, seed)))


def mean_and_stderr(samples: Tensor) -> tuple[float, float]:
    """Mean and standard error of independent samples ``[n]``; NaN for the error of one."""
    count = samples.numel()
    error = float(samples.std()) / count**0.5 if count > 1 else float("nan")
    return float(samples.mean()), error
