r"""First-order rules that take a direction in place of the gradient: SGD with momentum, and AdamW.

With the direction :math:`u_t` (a preconditioned gradient, or the gradient itself),

.. math::

    \text{sgd:} \quad & b_t = \mu b_{t-1} + u_t, \qquad
        \theta_t = (1 - \eta \lambda)\, \theta_{t-1} - \eta\, b_t, \\
    \text{adamw:} \quad & m_t = \beta_1 m_{t-1} + (1 - \beta_1) u_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) u_t^2, \\
        & \theta_t = (1 - \eta \lambda)\, \theta_{t-1} - \eta\,
        \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \varepsilon} .

Weight decay is decoupled in both (I. Loshchilov and F. Hutter, *Decoupled weight decay
regularization*, ICLR 2019), since a penalty in the gradient would be preconditioned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FirstOrderState:
    """Moving averages of one parameter, in its shape (float32 for half precision).

    Attributes:
        momentum: Of directions.
        square: Of their squares; ``None`` for SGD.
        steps: How many there were.
    """

    momentum: Tensor
    square: Tensor | None
    steps: int


def init(parameter: Tensor, *, squares: bool) -> FirstOrderState:
    """The state before the first step: zeros.

    Args:
        parameter: Any shape.
        squares: Whether squares are kept, as :func:`adamw` needs.
    """
    half = parameter.dtype in (torch.float16, torch.bfloat16)
    zeros = torch.zeros_like(
        parameter,
        dtype=torch.float32 if half else None,
        memory_format=torch.preserve_format,
        requires_grad=False,
    )
    return FirstOrderState(zeros, torch.zeros_like(zeros) if squares else None, 0)


def sgd(
    parameter: Tensor,
    direction: Tensor,
    state: FirstOrderState,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> tuple[Tensor, FirstOrderState]:
    r"""What is added to a parameter, and its state afterwards; nothing is changed in place.

    Args:
        parameter: Where it is, any shape.
        direction: :math:`u_t`, in its shape.
        state: Its averages.
        lr: :math:`\eta`.
        momentum: :math:`\mu`.
        weight_decay: :math:`\lambda`.

    Example:
        >>> p, u = torch.zeros(2), torch.tensor([1.0, -2.0])
        >>> settings = dict(lr=0.1, momentum=0.5, weight_decay=0.0)
        >>> _, state = sgd(p, u, init(p, squares=False), **settings)
        >>> sgd(p, u, state, **settings)[0]
        tensor([-0.1500,  0.3000])
    """
    buffer = state.momentum * momentum + direction.to(state.momentum.dtype)
    change = buffer * -lr
    if weight_decay:
        change.add_(parameter, alpha=-lr * weight_decay)
    return change, FirstOrderState(buffer, state.square, state.steps + 1)


def adamw(
    parameter: Tensor,
    direction: Tensor,
    state: FirstOrderState,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, FirstOrderState]:
    r"""What is added to a parameter, and its state afterwards; nothing is changed in place.

    Args:
        parameter: Where it is, any shape.
        direction: :math:`u_t`, in its shape.
        state: Its averages, with squares.
        lr: :math:`\eta`.
        betas: :math:`\beta_1, \beta_2`.
        eps: :math:`\varepsilon`.
        weight_decay: :math:`\lambda`.

    Example:
        >>> p, u = torch.zeros(2), torch.tensor([1.0, -2.0])
        >>> settings = dict(lr=0.1, betas=(0.9, 0.99), eps=0.0, weight_decay=0.0)
        >>> adamw(p, u, init(p, squares=True), **settings)[0]
        tensor([-0.1000,  0.1000])
    """
    assert state.square is not None
    beta1, beta2 = betas
    u = direction.to(state.momentum.dtype)
    average = torch.lerp(state.momentum, u, 1.0 - beta1)
    square = torch.lerp(state.square, u * u, 1.0 - beta2)
    steps = state.steps + 1
    size = (square / (1.0 - beta2**steps)).sqrt_().add_(eps)
    change = (average / size).mul_(-lr / (1.0 - beta1**steps))
    if weight_decay:
        change.add_(parameter, alpha=-lr * weight_decay)
    return change, FirstOrderState(average, square, steps)
