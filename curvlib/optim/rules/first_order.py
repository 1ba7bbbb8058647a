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

from collections.abc import Sequence
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
    parameters: Sequence[Tensor],
    directions: Sequence[Tensor],
    states: Sequence[FirstOrderState],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> tuple[list[Tensor], list[FirstOrderState]]:
    r"""What is added to each parameter, and its state afterwards; nothing is changed in place.

    Args:
        parameters: Where they are, of any shapes.
        directions: :math:`u_t`, in their shapes.
        states: Their averages.
        lr: :math:`\eta`.
        momentum: :math:`\mu`.
        weight_decay: :math:`\lambda`.

    Example:
        >>> ps, us = [torch.zeros(2)], [torch.tensor([1.0, -2.0])]
        >>> settings = dict(lr=0.1, momentum=0.5, weight_decay=0.0)
        >>> _, states = sgd(ps, us, [init(ps[0], squares=False)], **settings)
        >>> sgd(ps, us, states, **settings)[0]
        [tensor([-0.1500,  0.3000])]
    """
    buffers = list(torch._foreach_mul([s.momentum for s in states], momentum))
    torch._foreach_add_(buffers, _as(directions, buffers))
    changes = list(torch._foreach_mul(buffers, -lr))
    if weight_decay:
        torch._foreach_add_(changes, list(parameters), alpha=-lr * weight_decay)
    return changes, [
        FirstOrderState(buffer, s.square, s.steps + 1)
        for buffer, s in zip(buffers, states, strict=True)
    ]


def adamw(
    parameters: Sequence[Tensor],
    directions: Sequence[Tensor],
    states: Sequence[FirstOrderState],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[list[Tensor], list[FirstOrderState]]:
    r"""What is added to each parameter, and its state afterwards; nothing is changed in place.

    Args:
        parameters: Where they are, of any shapes.
        directions: :math:`u_t`, in their shapes.
        states: Their averages, with squares.
        lr: :math:`\eta`.
        betas: :math:`\beta_1, \beta_2`.
        eps: :math:`\varepsilon`.
        weight_decay: :math:`\lambda`.

    Example:
        >>> ps, us = [torch.zeros(2)], [torch.tensor([1.0, -2.0])]
        >>> settings = dict(lr=0.1, betas=(0.9, 0.99), eps=0.0, weight_decay=0.0)
        >>> adamw(ps, us, [init(ps[0], squares=True)], **settings)[0]
        [tensor([-0.1000,  0.1000])]
    """
    beta1, beta2 = betas
    steps = [s.steps + 1 for s in states]
    averages = [s.momentum for s in states]
    us = _as(directions, averages)
    averages = list(torch._foreach_lerp(averages, us, 1.0 - beta1))
    squares = list(torch._foreach_mul([s.square for s in states if s.square is not None], beta2))
    torch._foreach_addcmul_(squares, us, us, 1.0 - beta2)
    sizes = list(torch._foreach_div(squares, [1.0 - beta2**n for n in steps]))
    torch._foreach_sqrt_(sizes)
    torch._foreach_add_(sizes, eps)
    changes = list(torch._foreach_div(averages, sizes))
    torch._foreach_mul_(changes, [-lr / (1.0 - beta1**n) for n in steps])
    if weight_decay:
        torch._foreach_add_(changes, list(parameters), alpha=-lr * weight_decay)
    kept = zip(averages, squares, steps, strict=True)
    return changes, [FirstOrderState(average, square, n) for average, square, n in kept]


def _as(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    return [t.to(own.dtype) for t, own in zip(tensors, like, strict=True)]
