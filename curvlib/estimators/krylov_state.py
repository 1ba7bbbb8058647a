r"""What is wanted of a thick-restart run, and where it stands."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from curvlib.core.operator import LinearOperator
from curvlib.estimators import lanczos
from curvlib.estimators.probes import fill_normal
from curvlib.estimators.rows import largest


@dataclass(frozen=True)
class Plan:
    """What is wanted, and the operator: all that does not change in a run."""

    op: LinearOperator
    k: int
    which: str
    tolerance: float
    block: int
    check: bool
    warm: bool
    budget: float
    deflate: Tensor | None  # rows [d, P]
    deflated_norm: float

    @property
    def dimension(self) -> int:
        """Of the space that is searched."""
        return self.op.shape[0] - (0 if self.deflate is None else self.deflate.shape[0])


@dataclass(frozen=True)
class KrylovState:
    """Where a run stands.

    Attributes:
        rows: The buffer ``[m, P]``: ``size`` rows of Q, then ``block`` rows of R.
        T: Projected matrix, ``[size, size]``.
        E: Coupling of Q to R, ``[block, size]``.
        dropped: For each row of Q, the norm of what its relation leaves out, ``[size]``.
        size: Rows of Q.
        block: Rows of R.
        locked: Rows of Q that hold the pairs found, during a check.
        phase: ``"expand"``, ``"check"``, ``"verify"`` or ``"done"``.
        reason: Why the pairs are what they are: ``"converged"``, ``"precision"``, ``"budget"``.
        scale: Unit of T, E and the norms; 0 until a product has been nonzero.
        norm: Largest absolute Ritz value so far, in that unit.
        products: Columns multiplied.
        checked: Columns multiplied by the current check.
        retries: Times that pairs were improved after their residuals had been measured.
        worst: The largest measured residual before the last retry.
        values: Ritz values of the pairs found, in that unit, ``[k]``, most wanted first.
        residuals: Their residuals: estimates, and measured ones for the first ``verified``.
        verified: How many residuals are measured.
        generator: State of the random generator.
    """

    SPREAD: ClassVar = ("rows",)

    rows: Tensor
    T: Tensor
    E: Tensor
    dropped: Tensor
    size: int
    block: int
    locked: int
    phase: str
    reason: str
    scale: float
    norm: float
    products: int
    checked: int
    retries: int
    worst: float
    values: Tensor
    residuals: Tensor
    verified: int
    generator: Tensor


def first_state(
    plan: Plan, basis: int, start: Tensor | None, generator: torch.Generator
) -> KrylovState:
    """The state before the first product: a random block, or one that begins with ``start``."""
    op = plan.op
    rows = torch.empty((basis, op.length), dtype=op.dtype, device=op.device)
    for index in range(plan.block):
        if start is not None and index < start.shape[1]:
            rows[index].copy_(start[:, index])
            rows[index].mul_(1.0 / max(largest(rows[index], op.spread), 1e-30))
        else:
            fill_normal(rows[index], generator, op.spread)
    lanczos.orthonormalize(
        rows,
        0,
        plan.block,
        keep=plan.block,
        recent=0,
        deflate=plan.deflate,
        floor=100 * torch.finfo(op.dtype).eps * math.sqrt(op.shape[0]),
        generator=generator,
        spread=op.spread,
    )
    nothing = torch.zeros(0, dtype=torch.float64)
    return KrylovState(
        rows=rows,
        T=torch.zeros((0, 0), dtype=torch.float64),
        E=torch.zeros((plan.block, 0), dtype=torch.float64),
        dropped=nothing,
        size=0,
        block=plan.block,
        locked=0,
        phase="expand",
        reason="",
        scale=0.0,
        norm=0.0,
        products=0,
        checked=0,
        retries=0,
        worst=math.inf,
        values=nothing,
        residuals=nothing,
        verified=0,
        generator=generator.get_state(),
    )


def wanted_first(values: Tensor, which: str) -> Tensor:
    """Indices of the values, from the most to the least wanted.

    The first ``k`` are those that ``which`` asks for; for ``"BE"`` the two ends alternate, the
    high end first.
    """
    if which == "LA":
        return values.argsort(descending=True, stable=True)
    if which == "SA":
        return values.argsort(stable=True)
    if which == "LM":
        return values.abs().argsort(descending=True, stable=True)
    low = values.argsort(stable=True)
    count = values.numel()
    both = torch.stack([low.flip(0), low], dim=1).flatten()
    return both[:count]


def result_order(values: Tensor, which: str) -> Tensor:
    """Indices that put the values found into the order of the result."""
    return values.argsort(stable=True) if which == "BE" else wanted_first(values, which)
