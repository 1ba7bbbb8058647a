r"""The proximal Bregman objective of a risk, as a function of a shift of its parameters.

.. math::

    J(\delta) = \frac1W \sum_n D\big(f_{\theta_s + \delta}(x_n), f_{\theta_s}(x_n)\big)
        + \frac\lambda2 \|\delta\|^2 + \frac{\varepsilon}{W} \ell_m(\theta_s + \delta)

with, for each loss term of weight :math:`a`, the Bregman divergence of the loss in the outputs:
:math:`a\,\mathrm{KL}(p_s \| p)` for cross-entropy, NLL and BCE-with-logits, and
:math:`\|f - f_s\|^2` for MSE. Its Hessian at :math:`\delta = 0`, :math:`\varepsilon = 0` is the GGN
of the risk plus :math:`\lambda I`.

Source: Bae et al., "If Influence Functions are the Answer, Then What is the Question?", 2022.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from curvlib.core.batch import Batch
from curvlib.core.examples import chosen_examples
from curvlib.core.loss import Loss
from curvlib.core.operator import LinearOperator
from curvlib.core.risk import Risk
from curvlib.operators.ggn import ggn
from curvlib.operators.loss_hessian import class_axis, probabilities, tensor_output, term_weights


@dataclass(frozen=True, eq=False)
class Term:
    """One training example of an objective.

    Attributes:
        batch: The example alone, for a copy of the model.
        share: ``1 / W``.
    """

    batch: Batch
    share: float

    def gradient(self) -> Tensor:
        """Gradient of the example's summed loss terms, ``[P]``."""
        with self.batch.risk.untouched():
            return self.batch.risk.space.join(self.batch.gradient())


class BregmanObjective:
    r"""The objective of a risk, on a copy of its model.

    Args:
        risk: Model, loss, data in memory and parameters.
        damping: :math:`\lambda`, absolute.

    Raises:
        ValueError: If the loss has no known divergence, or data are not in memory.
    """

    def __init__(self, risk: Risk, damping: float) -> None:
        if not risk.loss.known:
            raise ValueError(
                f"the loss {risk.loss.describe()} has no Bregman divergence that curvlib knows; "
                "use cross-entropy, NLL, MSE or BCE-with-logits"
            )
        if risk.in_memory is None:
            raise ValueError(
                "the proximal objective compares outputs of the same examples again and again; "
                "pass data in memory (tensors, or a list of batches)"
            )
        self.damping = damping
        self.weight = risk.weight()
        self._risk = risk.of(copy.deepcopy(risk.model))
        self._start = risk.space.join(list(risk.params.values())).clone()
        self._base: list[Tensor] = []
        with self._risk.untouched():
            self._base.extend(tensor_output(b).detach().clone() for b in self._risk.batches())

    @property
    def size(self) -> int:
        """``P``."""
        return self._risk.space.size

    def example(self, index: int) -> Term:
        """One training example.

        Raises:
            ValueError: If there is no such example.
        """
        seen = 0
        with self._risk.untouched():
            for batch in self._risk.batches():
                if seen <= index < seen + batch.examples:
                    place = index - seen
                    return Term(chosen_examples(batch, slice(place, place + 1)), 1.0 / self.weight)
                seen += batch.examples
        raise ValueError(f"expected an example from 0 to {seen - 1}, got {index}")

    def of(self, other: Risk) -> Risk:
        """Another risk of the same model, for the copy whose parameters :meth:`place` shifts."""
        return other.of(self._risk.model)

    def place(self, shift: Tensor) -> None:
        """Gives the copy's parameters their values at a shift ``[P]``."""
        moved = (self._start.double() + shift.to(self._start.device)).to(self._start)
        with torch.no_grad():
            for p, value in zip(
                self._risk.params.values(), self._risk.space.split(moved), strict=True
            ):
                p.copy_(value)

    def curvature(self) -> LinearOperator:
        """The GGN of the divergence, at the parameters as they are placed."""
        return ggn(self._risk)

    def at(self, shift: Tensor, term: Term, epsilon: float) -> tuple[float, Tensor]:
        """Value and gradient ``[P]``, float64, at a shift of the parameters."""
        self.place(shift)
        risk = self._risk
        leaves = list(risk.params.values())

        def derived(value: Tensor) -> Tensor:
            parts = torch.autograd.grad(value, leaves, allow_unused=True)
            return torch.cat([risk.space.join(parts).double(), value.detach().double()[None]])

        total = torch.zeros(risk.space.size + 1, dtype=torch.float64, device=shift.device)
        with risk.untouched():
            for batch in risk.batches():
                output = tensor_output(batch)
                total += derived(
                    divergence(risk.loss, output, self._base[batch.index], batch.target)
                )
            output = term.batch.output()
            total += epsilon * derived(term.batch.total(output))
        total /= self.weight
        shift = shift.double()
        total[:-1] += self.damping * shift
        total[-1] += 0.5 * self.damping * shift.square().sum()
        return float(total[-1]), total[:-1]


def divergence(loss: Loss, output: Tensor, base: Tensor, target: Tensor) -> Tensor:
    """Sum over loss terms of the Bregman divergence of outputs from base outputs, a scalar.

    Args:
        loss: A known loss.
        output: The model's output, with its graph.
        base: Outputs that it is compared with, of the same shape.
        target: The targets, for the weights of terms alone.
    """
    output, base = loss.readable(output, target), loss.readable(base, target)
    weight = term_weights(loss, base, target)
    if loss.kind == "mse":
        return (weight * (output - base).square()).sum()
    if loss.kind == "bce_with_logits":
        p = base.sigmoid()
        terms = F.softplus(output) - F.softplus(base) - p * (output - base)
        return (weight * terms).sum()
    axis = class_axis(output)
    p = probabilities(loss, base)
    gap = base.log_softmax(axis) - output.log_softmax(axis)
    return (weight * p * gap).sum()
