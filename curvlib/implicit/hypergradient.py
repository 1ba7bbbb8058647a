r"""Gradients of an outer function with respect to hyperparameters of an inner minimization."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlib.core.digest import digest
from curvlib.core.operator import LinearOperator
from curvlib.core.result import Result
from curvlib.core.run import Progress
from curvlib.estimators.solve import solve
from curvlib.operators.cross_derivative import Function, cross_derivative, first_derivatives
from curvlib.operators.function import hessian_of


@dataclass(frozen=True, eq=False, repr=False)
class Hypergradient(Result):
    r"""The gradient :math:`d/d\lambda\; F(\theta^*(\lambda), \lambda)`, and what it is made of.

    Attributes:
        value: The gradient, shaped like the hyperparameters.
        direct: Its direct part, :math:`\partial F / \partial \lambda`, alike.
        adjoint: :math:`q = (H + \delta I)^{-1}\, \partial F / \partial \theta`, ``[P]``; the
            response of the minimum contributes
            :math:`-(\partial^2 f / \partial \lambda\, \partial \theta^\top)\, q`.
        residual: Relative residual of the solve for ``q``.
        stationarity: :math:`\|\partial f / \partial \theta\|`, which is zero at a minimum: the
            implicit function theorem takes that for granted.
        converged: Whether the solve converged.
        products: Products with the inner Hessian.
        method: How ``q`` was solved for.
        name: What was differentiated.
        settings: The settings, by name.
    """

    value: Tensor
    direct: Tensor
    adjoint: Tensor
    residual: float
    stationarity: float
    converged: bool
    products: int
    method: str
    name: str
    settings: dict[str, Any]


def hypergradient(
    outer: Function,
    inner: Function,
    theta: Tensor,
    hyper: Tensor,
    *,
    hessian: LinearOperator | None = None,
    damping: float = 0.0,
    method: str | None = None,
    preconditioner: Any = None,
    tolerance: float | None = None,
    max_products: int | None = None,
    terms: int | None = None,
    scale: float | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: float = 30.0,
    progress: Progress = None,
) -> Hypergradient:
    r"""The gradient of :math:`F(\theta^*(\lambda), \lambda)` for :math:`\theta^* = \arg\min f`.

    By implicit differentiation, with :math:`H = \partial^2 f / \partial\theta^2` at the minimum:

    .. math:: \frac{dF}{d\lambda} = \frac{\partial F}{\partial \lambda}
        - \frac{\partial^2 f}{\partial \lambda\, \partial \theta^\top}\,
          (H + \delta I)^{-1}\, \frac{\partial F}{\partial \theta} .

    One solve, by any method of :func:`curvlib.solve`, whatever the number of hyperparameters and
    however the minimum was found.

    Args:
        outer: :math:`F`, a scalar function of ``(theta, hyper)``, such as a validation loss.
        inner: :math:`f`, a scalar function of ``(theta, hyper)``, such as a regularized training
            loss; twice differentiable.
        theta: The minimum of ``inner`` over its first argument, of any shape.
        hyper: The hyperparameters :math:`\lambda`, of any shape, in the same dtype.
        hessian: The inner Hessian ``[P, P]`` in the place of exact products: of a
            :class:`curvlib.Risk`, or a GGN.
        damping: :math:`\delta`, for Hessians that are nearly singular. It biases the result.
        method: See :func:`curvlib.solve`. When omitted, ``"cg"`` where the Hessian is known to be
            positive semi-definite, else ``"minres"``. ``"neumann"`` with ``terms`` is the
            truncated series.
        preconditioner: See :func:`curvlib.solve`.
        tolerance: Relative residual of the solve.
        max_products: Stop the solve after so many products, with what there is.
        terms: Of the Neumann series.
        scale: Of the Neumann series.
        generator: Where random vectors come from, or
        seed: their seed. With neither, the seed is 0.
        checkpoint: A file to save the solve to, and to continue from where it exists.
        save_every: Seconds between saves.
        progress: Whether to show a bar: see :data:`curvlib.core.run.Progress`.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If a function returns no scalar, the inner one does not depend on ``theta``,
            or an argument does not fit.
        RuntimeError: If the solve fails: see :func:`curvlib.solve`.
        FloatingPointError: If a derivative is not finite.

    Example:
        The minimum of ``(t - h)**2 / 2`` is ``h``, so that ``t**2`` has the gradient ``2 h``:

        >>> t = torch.tensor([3.0], dtype=torch.float64)
        >>> found = hypergradient(
        ...     lambda t, h: t.square().sum(), lambda t, h: 0.5 * (t - h).square().sum(), t, t
        ... )
        >>> found.value.tolist()
        [6.0]

    Source:
        J. Lorraine, P. Vicol and D. Duvenaud, *Optimizing millions of hyperparameters by implicit
        differentiation*, AISTATS 2020; F. Pedregosa, *Hyperparameter optimization with
        approximate gradient*, ICML 2016.
    """
    outer_theta, direct = first_derivatives(outer, theta, hyper, "outer")
    inner_theta, _ = first_derivatives(inner, theta, hyper, "inner")
    cross = cross_derivative(inner, theta, hyper)
    if hessian is None:
        fixed = hyper.detach()
        exact = hessian_of(lambda t: inner(t, fixed), theta)
        hessian = LinearOperator(
            exact.matmat,
            exact.shape,
            dtype=exact.dtype,
            device=exact.device,
            symmetric=True,
            name="inner Hessian",
            identity=lambda: digest([theta, hyper]),
        )
    elif not isinstance(hessian, LinearOperator):
        raise TypeError(f"hessian= takes a LinearOperator, got {type(hessian).__name__}")
    elif hessian.shape != (theta.numel(), theta.numel()):
        raise ValueError(
            f"expected hessian= of shape {(theta.numel(), theta.numel())}, got {hessian.shape}"
        )
    solution = solve(
        hessian,
        outer_theta,
        damping=damping,
        method=method,
        preconditioner=preconditioner,
        tolerance=tolerance,
        max_products=max_products,
        terms=terms,
        scale=scale,
        generator=generator,
        seed=seed,
        checkpoint=checkpoint,
        save_every=save_every,
        progress=progress,
    )
    direct = direct.reshape(hyper.shape)
    response = (cross @ solution.value).reshape(hyper.shape)
    return Hypergradient(
        value=direct - response,
        direct=direct,
        adjoint=solution.value,
        residual=float(solution.residuals[0]),
        stationarity=float(torch.linalg.vector_norm(inner_theta)),
        converged=bool(solution.converged[0]),
        products=solution.products,
        method=solution.method,
        name="hypergradient",
        settings=solution.settings,
    )
