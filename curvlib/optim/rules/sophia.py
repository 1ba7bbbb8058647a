r"""Sophia's update rule: momentum over a moving average of diagonal curvature, clipped.

With the gradient :math:`g_t` and, at every ``interval``-th step, an estimate :math:`\hat h` of the
diagonal of the curvature,

.. math::

    m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
    h_t = \beta_2 h_{t-1} + (1 - \beta_2) \hat h \quad \text{(else } h_t = h_{t-1}\text{)},

    \theta_t = (1 - \eta \lambda)\, \theta_{t-1}
        - \eta\, \mathrm{clip}\!\left( \frac{m_t}{\max(\rho h_t, \varepsilon)},\ 1 \right),

entry by entry, with ``clip(x, 1)`` in [-1, 1]. Where the curvature is small or negative, the step
is that of signed momentum, :math:`\eta` long. Both averages start at zero, and the paper leaves
their bias in: early curvature is understated, so that steps begin as signed momentum. With
``correct_bias`` they are divided by :math:`1 - \beta_1^t` and :math:`1 - \beta_2^n`, where ``n``
counts updates of the curvature, not steps.

H. Liu, Z. Li, D. Hall, P. Liang and T. Ma, *Sophia: A scalable stochastic second-order optimizer
for language model pre-training*, ICLR 2024 (whose gamma is :math:`\rho` here, as in its code).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SophiaState:
    """Moving averages of one parameter, in its shape (float32 for half precision).

    Attributes:
        momentum: Of gradients.
        curvature: Of estimates of the diagonal.
    """

    momentum: Tensor
    curvature: Tensor


@dataclass(frozen=True)
class SophiaStep:
    """What a step does to one parameter.

    Attributes:
        change: What is added to it, in the type of its state.
        state: Its averages afterwards.
        clipped: How many entries were clipped, a scalar.
    """

    change: Tensor
    state: SophiaState
    clipped: Tensor


def init(parameter: Tensor) -> SophiaState:
    """The state before the first step: zeros."""
    half = parameter.dtype in (torch.float16, torch.bfloat16)
    zeros = torch.zeros_like(
        parameter,
        dtype=torch.float32 if half else None,
        memory_format=torch.preserve_format,
        requires_grad=False,
    )
    return SophiaState(zeros, torch.zeros_like(zeros))


def update(
    parameter: Tensor,
    gradient: Tensor,
    state: SophiaState,
    estimate: Tensor | None,
    *,
    lr: float,
    betas: tuple[float, float],
    rho: float,
    eps: float,
    weight_decay: float,
    correct_bias: bool = False,
    steps: int = 1,
    curvature_updates: int = 1,
) -> SophiaStep:
    r"""One step of one parameter; nothing is changed in place.

    Args:
        parameter: Where it is, any shape.
        gradient: In its shape.
        state: Its averages.
        estimate: :math:`\hat h` of this step, in its shape, or ``None`` for none.
        lr: :math:`\eta`, at most how far an entry moves (before decay).
        betas: :math:`\beta_1, \beta_2`.
        rho: :math:`\rho`: the smaller, the more is clipped.
        eps: :math:`\varepsilon`, below which curvature does not count.
        weight_decay: :math:`\lambda`, decoupled.
        correct_bias: Whether the averages' bias is divided out.
        steps: This one included.
        curvature_updates: This step's included.

    Example:
        >>> p, g, h = torch.zeros(3), torch.tensor([1.0, -1.0, 1.0]), torch.tensor([4.0, 1.0, -9.0])
        >>> settings = dict(betas=(0.0, 0.0), rho=0.5, eps=1e-12, weight_decay=0.0)
        >>> step = update(p, g, init(p), h, lr=0.1, **settings)
        >>> step.change, int(step.clipped)
        (tensor([-0.0500,  0.1000, -0.1000]), 2)
    """
    beta1, beta2 = betas
    momentum = torch.lerp(state.momentum, gradient.to(state.momentum.dtype), 1.0 - beta1)
    curvature = state.curvature
    if estimate is not None:
        curvature = torch.lerp(curvature, estimate.to(curvature.dtype), 1.0 - beta2)
    m, factor = momentum, rho
    if correct_bias:
        m = momentum / (1.0 - beta1**steps)
        factor = rho / (1.0 - beta2**curvature_updates) if curvature_updates else rho
    change = (curvature * factor).clamp_(min=eps)
    torch.div(m, change, out=change).clamp_(-1.0, 1.0)
    clipped = torch.linalg.vector_norm(change.trunc(), 1)  # three times faster than to compare
    if weight_decay:
        change.add_(parameter, alpha=weight_decay)
    return SophiaStep(change.mul_(-lr), SophiaState(momentum, curvature), clipped)
