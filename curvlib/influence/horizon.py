r"""The damping that a training run implies.

Influence functions ask where the optimum moves; but a network is trained for a finite time. On a
quadratic with eigenvalue :math:`\sigma` (weight decay :math:`\mu` included), ``T`` steps of
gradient descent with learning rate :math:`\eta` respond to a change of the gradient by

.. math:: \eta \sum_{t < T} (1 - \eta\sigma)^t = \frac{1 - (1 - \eta \sigma)^T}{\sigma}
          \approx \frac{1}{\sigma + \lambda}, \qquad \lambda = \frac{1}{\eta T},

which is :math:`1/\sigma` for directions that have converged and :math:`\eta T` for those that have
hardly moved; the two sides are equal in both limits, and between them the left one is larger by at
most 30 % for small :math:`\eta\sigma` (a factor :math:`1.3\,(1 + \eta\sigma)` at any). So an
inverse that is damped by

.. math:: \lambda = \mu + \frac{1 - \beta}{\eta T}

answers for the run that there was, with momentum :math:`\beta`. It is absolute, and belongs to the
curvature of the *mean* loss that was trained on. Where it is much larger than a tenth of the mean
eigenvalue, the usual choice, the latter answers for a training that nobody has done.

Source:
    The response of finitely many steps is that of Bae, Lin, Lorraine and Grosse, "Training Data
    Attribution via Approximate Unrolled Differentiation", 2024 (section 3, one segment); its
    replacement by a damped inverse is the one of early stopping by ridge regression.
"""

from __future__ import annotations

import math


def training_damping(
    lr: float, steps: int, *, momentum: float = 0.0, weight_decay: float = 0.0
) -> float:
    r"""The absolute damping of influence that goes with a run of SGD.

    Args:
        lr: Learning rate :math:`\eta`; with a schedule, its mean over the steps.
        steps: ``T``, optimizer steps (not epochs).
        momentum: :math:`\beta` of heavy-ball or Nesterov momentum, without dampening.
        weight_decay: :math:`\mu` as ``torch.optim.SGD`` takes it, an L2 penalty.

    Returns:
        :math:`\lambda`, for ``Influence(..., damping=..., relative=False)``.

    Raises:
        ValueError: If a number does not fit.

    Example:
        >>> round(training_damping(0.1, 500, momentum=0.9, weight_decay=1e-3), 6)
        0.003
    """
    for name, value in (("lr", lr), ("steps", steps)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}= needs a positive number, got {value}")
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"momentum= is at least 0 and below 1, got {momentum}")
    if not (math.isfinite(weight_decay) and weight_decay >= 0.0):
        raise ValueError(f"weight_decay= is at least 0, got {weight_decay}")
    return weight_decay + (1.0 - momentum) / (lr * steps)
