r"""The proximal Bregman response: what influence functions of networks really approximate.

Retraining without an example follows another path, so that its effect is mostly noise. Bae et al.
compare instead with the minimizer of

.. math::

    J_\varepsilon(\theta) = \frac1W \sum_n D\big(f_\theta(x_n), f_{\theta_s}(x_n)\big)
        + \frac\lambda2 \|\theta - \theta_s\|^2
        + \frac{\varepsilon}{W} \ell_m(\theta),

with the Bregman divergence :math:`D` of the loss between outputs and those of the trained
parameters :math:`\theta_s`. Its curvature at :math:`\theta_s` is :math:`G + \lambda I`, the damped
GGN, so that to first order in :math:`\varepsilon`

.. math:: \theta - \theta_s \approx -\frac{\varepsilon}{W} (G + \lambda I)^{-1} \nabla \ell_m ,

and with :math:`\varepsilon = -1` (example ``m`` is taken out once) the change of a query's loss is
its influence in nats. It is found by Newton's method with the GGN, solved by conjugate gradients.
For cross-entropy, :math:`D` is the divergence of Kullback and Leibler from
the trained model's predictions; for squared errors the squared distance.

Source:
    Bae, Ng, Lo, Ghassemi and Grosse, "If Influence Functions are the Answer, Then What is the
    Question?", 2022, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlib.core.result import Result
from curvlib.core.risk import Risk
from curvlib.estimators.solve import solve
from curvlib.operators.bregman import BregmanObjective, Term
from curvlib.operators.scores.example_values import example_losses


@dataclass(frozen=True, eq=False, repr=False)
class ProximalResponse(Result):
    """Changes of query losses when examples are taken out of a proximal objective.

    Attributes:
        change: Loss of each query at the new minimizer minus that at the trained parameters, for
            each example, divided by ``-epsilon``: ``[Q, m]``, float64. Comparable with influence
            in nats.
        residual: Norm of the gradient at each minimizer, relative to that of the example's term,
            ``[m]``.
        iterations: Newton steps, ``[m]``.
        settings: The settings, by name.
    """

    change: Tensor
    residual: Tensor
    iterations: Tensor
    settings: dict[str, Any]


def proximal_response(
    risk: Risk,
    examples: Sequence[int],
    queries: Risk,
    *,
    damping: float,
    epsilon: float = -1.0,
    tolerance: float = 1e-6,
    steps: int = 50,
) -> ProximalResponse:
    r"""Takes examples out of the proximal Bregman objective, one by one.

    For small models: each example costs some tens of products with the GGN of all data.

    Args:
        risk: The trained model with its training data, in memory, as tensors with examples along
            the first axis. Best in float64.
        examples: Indices of the examples that are taken out.
        queries: The queries, a risk of the same model: ``risk.on(data)``.
        damping: :math:`\lambda`, absolute. With relative damping of 0.1 that is 0.1 times the mean
            eigenvalue of the GGN.
        epsilon: How often the example is added: -1 takes it out; nearer to 0, the response is
            nearer to influence.
        tolerance: Of the gradient's norm, relative to that of the example's term.
        steps: Newton steps, at most.

    Raises:
        TypeError: If a risk is no Risk.
        ValueError: If the loss has no known divergence, or an argument does not fit.
        RuntimeError: If Newton's method does not converge.

    Example:
        >>> import torch, curvlib as cl
        >>> x = torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> model = torch.nn.Linear(2, 1, bias=False).double()
        >>> risk = cl.Risk(model, torch.nn.MSELoss(), (x, x[:, :1] ** 2))
        >>> found = proximal_response(risk, [3], risk.on((x[:5], x[:5, :1])), damping=0.1)
        >>> found.change.shape
        torch.Size([5, 1])
    """
    for name, own in (("risk", risk), ("queries", queries)):
        if not isinstance(own, Risk):
            raise TypeError(f"{name}= takes a Risk, got {type(own).__name__}")
    if not damping > 0.0:
        raise ValueError(f"damping= needs a positive number, got {damping}")
    if epsilon == 0.0:
        raise ValueError("epsilon= needs a number other than 0; -1 takes the example out once")
    objective = BregmanObjective(risk, damping)
    moved = objective.of(queries)
    before = example_losses(queries)
    changes, residuals, counts = [], [], []
    for index in examples:
        term = objective.example(index)
        shift, residual, count = _minimizer(objective, term, epsilon, tolerance, steps)
        if not residual <= tolerance:
            raise RuntimeError(
                f"Newton's method left a gradient of {residual:.2g} for example {index} after "
                f"{count} steps, {tolerance:g} was asked for; pass a larger steps=, damping= or "
                "tolerance=, or a float64 model"
            )
        objective.place(shift)
        changes.append((example_losses(moved) - before) / -epsilon)
        residuals.append(residual)
        counts.append(count)
    return ProximalResponse(
        change=torch.stack(changes, 1),
        residual=torch.tensor(residuals, dtype=torch.float64),
        iterations=torch.tensor(counts),
        settings={"damping": damping, "epsilon": epsilon, "tolerance": tolerance},
    )


def _minimizer(
    objective: BregmanObjective, term: Term, epsilon: float, tolerance: float, steps: int
) -> tuple[Tensor, float, int]:
    """The minimizer's shift, the norm of the gradient there, and how many steps it took."""
    shift = torch.zeros(objective.size, dtype=torch.float64)
    value, gradient = objective.at(shift, term, epsilon)
    scale = max(float(gradient.norm()), 1e-300)
    for count in range(steps):
        norm = float(gradient.norm())
        if norm <= tolerance * scale:
            return shift, norm / scale, count
        objective.place(shift)
        curvature = objective.curvature()
        step = solve(
            curvature, gradient.to(curvature.dtype), damping=objective.damping, tolerance=1e-3
        ).value.double()
        size = 1.0
        while size > 1e-6:
            trial = shift - size * step
            new_value, new_gradient = objective.at(trial, term, epsilon)
            # near the minimizer, values are rounded before gradients are
            if new_value < value or float(new_gradient.norm()) < norm:
                break
            size /= 2.0
        else:
            return shift, norm / scale, count
        shift, value, gradient = trial, new_value, new_gradient
    return shift, float(gradient.norm()) / scale, steps
