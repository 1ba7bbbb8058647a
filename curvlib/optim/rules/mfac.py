r"""M-FAC's update rule: preconditioned directions of a chosen length, with momentum.

With the direction :math:`u_t = F_t^{-1} g_t` of the newest row of a window of ``c`` gradients,

.. math::

    v_t = \mu v_{t-1} + s_t u_t, \qquad
    \theta_t = (1 - \eta w)\, \theta_{t-1} - \eta v_t, \qquad
    s_t = \min\!\left(\frac{\lVert g_t \rVert}{\lVert u_t \rVert},
        \sqrt{\kappa / q_t}\right), \qquad
    q_t = u_t^\top F_t u_t = g_t^\top F_t^{-1} g_t ,

where the first term is there with norm matching (else 1), and the second one with ``trust``.

Weight decay ``w`` is decoupled: it is no part of ``g`` and never enters the window, where it would
pass for curvature.

**Norm matching.** Where damping follows the size of gradients, :math:`u` is of the order of
:math:`1 / \lVert g \rVert`: steps get *longer* as training converges, so that learning rates have
to fall. With the length of the gradient, steps vanish with it, and learning rates are those of SGD.

**Trust.** :math:`q` is the squared length of the direction in the metric ``F`` (twice the
Kullback-Leibler divergence of a unit step, to second order, if ``F`` is the Fisher matrix). Let
:math:`g = G^\top e` be a row of the window and :math:`K = \lambda c I + G G^\top`. By push-through
:math:`F^{-1} g = c\, G^\top K^{-1} e`, so

.. math:: q = c\, e^\top G G^\top K^{-1} e = c\, e^\top (K - \lambda c I) K^{-1} e
            = c \left(1 - \lambda c\, [K^{-1}]_{ee}\right) < c,

since :math:`K^{-1}` is positive definite: it comes with the solve, and no direction is longer than
:math:`\sqrt c \le \sqrt m`, however small the damping. With :math:`\kappa \ge m` no direction is
ever clipped (of those that have their own length). Its mean over the rows is
:math:`\mathrm{tr}\, F^{-1} (F - \lambda I)`, the effective dimension. With one window for each
tensor, :math:`q` is the sum of theirs.

E. Frantar, E. Kurtic and D. Alistarh, *M-FAC: Efficient matrix-free approximations of second-order
information*, NeurIPS 2021, whose rule has none of the three: norm matching, trust, decoupled decay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def init(parameter: Tensor) -> Tensor:
    """Momentum before the first step: zeros in its shape (float32 for half precision)."""
    half = parameter.dtype in (torch.float16, torch.bfloat16)
    return torch.zeros_like(
        parameter,
        dtype=torch.float32 if half else None,
        memory_format=torch.preserve_format,
        requires_grad=False,
    )


def factor(wanted: float, quadratic: float, trust: float | None) -> float:
    r"""What a direction is multiplied by, :math:`s`.

    Args:
        wanted: :math:`\lVert g \rVert / \lVert u \rVert`, or 1.
        quadratic: :math:`q = g^\top F^{-1} g`; without ``trust`` it does not matter.
        trust: :math:`\kappa`; ``None`` for no bound.

    Example:
        >>> factor(2.0, 16.0, None), factor(2.0, 16.0, 4.0), factor(1.0, 1.0, 4.0)
        (2.0, 0.5, 1.0)
    """
    if trust is not None and quadratic * wanted * wanted > trust:
        return math.sqrt(trust / quadratic)
    return wanted


def update(
    parameters: Sequence[Tensor],
    directions: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    factor: float = 1.0,
) -> None:
    r"""One step, in place: changes parameters and momenta; directions are used up.

    Args:
        parameters: Where they are, any shapes.
        directions: :math:`F^{-1} g`, in their shapes.
        momenta: Those before, in their shapes; empty without momentum.
        lr: :math:`\eta`.
        momentum: :math:`\mu`.
        weight_decay: ``w``, decoupled.
        factor: Of directions, from :func:`factor`.

    Example:
        >>> p, u = torch.ones(2), torch.tensor([1.0, 2.0])
        >>> update([p], [u], [], lr=0.5, momentum=0.0, weight_decay=0.2)
        >>> p
        tensor([ 0.4000, -0.1000])
    """
    steps = list(directions)
    if not steps:
        return
    if factor != 1.0:
        torch._foreach_mul_(steps, factor)
    if momentum:
        kept = list(momenta)
        torch._foreach_mul_(kept, momentum)
        torch._foreach_add_(kept, steps)
        steps = kept
    changed = list(parameters)
    if weight_decay:
        torch._foreach_mul_(changed, 1.0 - lr * weight_decay)
    torch._foreach_add_(changed, steps, alpha=-lr)
