r"""Curvature along a direction, and what it says of the loss there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlib.core.operator import LinearOperator
from curvlib.core.result import Result
from curvlib.estimators.arguments import column_norms, right_hand_sides
from curvlib.estimators.eigenpairs import require_symmetric
from curvlib.estimators.rows import summed


@dataclass(frozen=True, eq=False, repr=False)
class DirectionalSharpness(Result):
    r"""Curvature of a loss along directions :math:`u`, exact up to rounding.

    Attributes:
        value: :math:`u^\top H u / u^\top u`, ``[K]`` (or a scalar for one vector), float64.
        curvature: :math:`u^\top H u`, alike.
        slope: :math:`g^\top u`, alike, or ``None`` without a gradient.
        products: Columns multiplied.
        method: ``"product"``.
        name: What was measured.
        settings: The settings, by name.
    """

    value: Tensor
    curvature: Tensor
    slope: Tensor | None
    products: int
    method: str
    name: str
    settings: dict[str, Any]

    def change(self, step: float = 1.0) -> Tensor:
        r"""The change of the loss to second order, :math:`s\, g^\top u + s^2\, u^\top H u / 2`.

        Args:
            step: :math:`s`: how far along ``u``.

        Raises:
            ValueError: If there was no gradient.
        """
        return step * self._slope() + 0.5 * step * step * self.curvature

    @property
    def best_step(self) -> Tensor:
        r""":math:`-g^\top u / u^\top H u`, where the prediction is least.

        Without positive curvature there is no such step: then it is infinite, downhill.

        Raises:
            ValueError: If there was no gradient.
        """
        slope = self._slope()
        unbounded = torch.where(slope == 0.0, slope * torch.nan, -slope.sign() * torch.inf)
        return torch.where(self.curvature > 0.0, -slope / self.curvature, unbounded)

    def _slope(self) -> Tensor:
        if self.slope is None:
            raise ValueError(
                "the change of the loss needs its gradient: pass gradient=risk.gradient() to "
                "directional_sharpness"
            )
        return self.slope


def directional_sharpness(
    op: LinearOperator | Tensor, u: Tensor, gradient: Tensor | None = None
) -> DirectionalSharpness:
    r"""The sharpness :math:`u^\top H u / u^\top u` along directions.

    Directions are, for instance, an optimizer's updates. With the gradient, it also predicts how
    the loss changes along ``u`` to second order.

    Args:
        op: The Hessian, or another symmetric operator, or a dense symmetric matrix.
        u: Directions ``[P]`` or ``[P, K]``, not zero.
        gradient: The loss's gradient ``[P]`` at the same point.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If a shape does not fit, a direction is zero, or a number not finite.
        FloatingPointError: If a product is not finite.

    Example:
        >>> H = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
        >>> found = directional_sharpness(
        ...     H, torch.tensor([1.0, 1.0]).double(), torch.ones(2).double()
        ... )
        >>> round(found.value.item(), 6), found.change().item(), found.best_step.item()
        (2.0, 4.0, -0.5)

    Source:
        Y. Pan and Y. Li, *Toward understanding why Adam converges faster than SGD for
        transformers*, 2023, definition 1.
    """
    op = require_symmetric(op, spread=True)
    columns = right_hand_sides(op, u, "u")
    g = None if gradient is None else right_hand_sides(op, gradient, "gradient")
    if g is not None and g.shape[1] != 1:
        raise ValueError(f"expected gradient of shape [{op.length}], got {list(g.shape)}")
    norms = column_norms(columns, op.spread)
    if bool((norms == 0.0).any()):
        zero = (norms == 0.0).nonzero()[:, 0].tolist()
        raise ValueError(f"directions {zero} are zero: the sharpness along them is undefined")
    unit = (columns / norms).mT.contiguous()
    product = op.matmat(unit.mT).mT
    value = summed(torch.linalg.vecdot(unit, product).double().cpu(), op.spread)
    if not bool(torch.isfinite(value).all()):
        raise FloatingPointError(
            f"the product of {op!r} with the directions has entries that are NaN or infinite; "
            "check the loss and its derivatives at these parameters (risk.check())"
        )
    size = norms.double().cpu()
    slope = None
    if g is not None:
        slope = summed((columns.mT @ g)[:, 0].double().cpu(), op.spread)
    one = u.ndim == 1
    curvature = value * size.square()
    return DirectionalSharpness(
        value=value[0] if one else value,
        curvature=curvature[0] if one else curvature,
        slope=None if slope is None else slope[0] if one else slope,
        products=columns.shape[1],
        method="product",
        name=op.name,
        settings={},
    )
