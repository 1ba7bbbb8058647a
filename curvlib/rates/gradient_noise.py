r"""Moments of single examples' gradients, and the preconditioner that Adam settles at.

With the gradient :math:`g_i` of example ``i``, :math:`\bar g` their mean and :math:`s^2` their
variance in each coordinate, the squared gradient of a batch has the mean
:math:`\bar g^2 + s^2 / b`. Adam's and RMSprop's second moments forget their past, so at fixed
parameters their preconditioner settles at

.. math:: P_B = \sqrt{\bar g^2 + s^2 / b} + \epsilon .

Where noise dominates, :math:`P_B \propto B^{-1/2}`: the square-root rule of adaptive methods.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvlib.core.minibatch import require_batch_size
from curvlib.core.ranks.group import together
from curvlib.core.ranks.turns import added
from curvlib.core.result import Result
from curvlib.core.risk import Risk
from curvlib.core.structured import Diagonal
from curvlib.operators.gradients import shard_gradients
from curvlib.rates.arguments import require_risk
from curvlib.rates.spiked import effective_batch


@dataclass(frozen=True, eq=False, repr=False)
class GradientMoments(Result):
    r"""Mean and variance of single examples' gradients.

    Attributes:
        mean: :math:`\bar g`, the gradient of the risk, ``[P]``.
        variance: :math:`s^2`, unbiased, ``[P]``, in float64.
        examples: :math:`N`.
    """

    mean: Tensor
    variance: Tensor
    examples: int

    @property
    def noise_scale(self) -> float:
        r""":math:`\sum s^2 / \|\bar g\|^2`: the batch whose noise is as large as the gradient.

        Source: S. McCandlish et al., *An empirical model of large-batch training*, 2018.
        """
        return float(self.variance.sum() / self.mean.double().square().sum())

    def preconditioner(self, batch_size: int, eps: float = 1e-8) -> Diagonal:
        """``P_B``, what Adam or RMSprop divides by in the long run at these parameters.

        Raises:
            ValueError: If the batch size does not fit, or ``eps`` is not positive.
        """
        require_batch_size(batch_size, self.examples)
        if not eps > 0.0:
            raise ValueError(f"expected eps > 0, got {eps}")
        b = effective_batch(batch_size, self.examples)
        square = self.mean.double().square() + self.variance / b
        name = f"Adam's preconditioner for batches of {batch_size}"
        return Diagonal((square.sqrt() + eps).to(self.mean.dtype), name=name)


def gradient_moments(risk: Risk, *, block: int = 64) -> GradientMoments:
    """Mean and variance of single examples' gradients, in two passes.

    In a process group, a rank sends three sums of ``P`` numbers.

    Args:
        risk: A mean over independent examples.
        block: Examples at a time: see :func:`curvlib.gradients`.

    Raises:
        TypeError: If it is no risk.
        ValueError: If it is a sum, has one example, or examples depend on each other.
        FloatingPointError: If the gradient is not finite.

    Example:
        >>> x, y = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.fill_(1.0)
        >>> found = gradient_moments(Risk(model, torch.nn.MSELoss(), (x, y)))
        >>> found.mean.item(), found.variance.item()
        (10.0, 128.0)
    """
    count = require_risk(risk)
    total = torch.zeros(risk.space.size, dtype=torch.float64, device=risk.space.device)
    square = torch.zeros_like(total)
    scale = count / risk.weight()
    mean = risk.gradient()  # names the layer if it is not finite
    center = mean.double()
    with together(risk.group, "adding up its gradients"):
        for rows in shard_gradients(risk, block=block):
            each = rows.double() * scale - center
            total += each.sum(0)
            square += each.square().sum(0)
    total, square = added(risk.group, total), added(risk.group, square)
    variance = (square - total.square() / count).clamp(min=0.0) / (count - 1)
    return GradientMoments(mean, variance, count)
