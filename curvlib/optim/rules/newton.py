r"""Newton steps with gradient-norm-scaled damping: which damping, which step, which radius next.

With the gradient :math:`g` of :math:`f` at :math:`x`, and a symmetric :math:`B` near its Hessian,

.. math:: \big( B + \lambda I \big) h = -g, \qquad \lambda = \|g\|^\alpha / \gamma .

For :math:`\alpha = 1` and :math:`B \succeq 0`, :math:`\|h\| \le \|g\| / \lambda = \gamma`:
:math:`\gamma` is a radius in the space of parameters, that of a ball in which

.. math:: \| \nabla f(x + h) - g - B h \| \le \lambda \|h\| = \|g\| \, \|h\| / \gamma ,

so that the linear model of the gradient has a small *relative* error. The largest such
:math:`\gamma` is the gradient-normalized smoothness at ``x``. Along one step it can be measured:

.. math:: \gamma(h) = \|g\|^\alpha \, \frac{\|h\|}{\| \nabla f(x + h) - g - B h \|} .

It is infinite for a quadratic function with its own Hessian, about :math:`2 \|g\| / (L \|h\|)`
where the Hessian is ``L``-Lipschitz (so that :math:`\lambda \to 0` and steps become Newton's), and
:math:`\|g\| / \|H - B\|` where :math:`B` misses a part of the Hessian (so that :math:`\lambda`
stays as large as what is missed).

Why it suffices (derived here): for the exact solution, :math:`\nabla f(x + h) + \lambda h` is the
error above. If that is at most :math:`\lambda \|h\|`, squaring gives
:math:`\langle \nabla f(x + h), -h \rangle \ge \|\nabla f(x + h)\|^2 / (2 \lambda)`, and for convex
``f`` the loss falls by at least as much. The paper's method doubles :math:`\gamma` after a step
with :math:`f(x) - f(x + h) \ge \|\nabla f(x + h)\|^2 / (8 \lambda)` and halves it otherwise; here
the measured :math:`\gamma(h)` is followed, within a factor, and any sufficient decrease (Armijo) is
accepted.

A. Semenov, M. Jaggi and N. Doikov, *Gradient-normalized smoothness for optimization with
approximate Hessians*, ICLR 2026 (arXiv:2506.13710). N. Doikov and Yu. Nesterov, *Gradient
regularization of Newton method with Bregman distances*, Math. Program. 204 (2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvlib.core.ranks.spread import Spread

#: How much gamma may change from one trial to the next.
GROWTH, SHRINKAGE, LARGEST_FALL = 4.0, 0.5, 1e-3
#: The share of the linear prediction by which the loss must fall.
ARMIJO = 1e-4


@dataclass(frozen=True)
class NewtonState:
    """What is remembered from one step to the next.

    Attributes:
        gamma: The radius; infinite for no damping.
        steps: Accepted steps.
        rejected: Trials that were not accepted.
        products: Columns multiplied by matrices.
    """

    gamma: float
    steps: int = 0
    rejected: int = 0
    products: int = 0


@dataclass(frozen=True)
class Trial:
    """A step that was tried.

    Attributes:
        gradient: Before it, ``[P]``.
        step: :math:`h`, ``[P]``.
        product: :math:`B h`, ``[P]``.
        value: The loss before.
        new_value: After.
        new_gradient: After, ``[P]``.
        spread: Where ranks hold rows of the vectors, which.
    """

    gradient: Tensor
    step: Tensor
    product: Tensor
    value: float
    new_value: float
    new_gradient: Tensor
    spread: Spread | None = None

    def norm(self, vector: Tensor) -> float:
        """The norm of a vector like these."""
        return norm(vector, self.spread)

    def dot(self, a: Tensor, b: Tensor) -> float:
        """An inner product of two."""
        own = torch.dot(a.double(), b.double())
        return float(own if self.spread is None else self.spread.sum(own))

    @property
    def landed(self) -> bool:
        """Whether the gradient after it is finite."""
        return everywhere(bool(torch.isfinite(self.new_gradient).all()), self.spread)


def init(gamma: float) -> NewtonState:
    """The state before the first step."""
    return NewtonState(gamma)


def damping(gradient_norm: float, gamma: float, exponent: float = 1.0) -> float:
    r""":math:`\lambda = \|g\|^\alpha / \gamma`.

    Example:
        >>> damping(4.0, 2.0), damping(4.0, 2.0, 0.5), damping(4.0, math.inf)
        (2.0, 1.0, 0.0)
    """
    return math.pow(gradient_norm, exponent) / gamma


def measured_gamma(trial: Trial, exponent: float = 1.0) -> float:
    r""":math:`\gamma(h)`: infinite where the model of the gradient errs by rounding alone.

    Args:
        trial: A step with finite numbers.
        exponent: :math:`\alpha`.

    Example:
        >>> g, h = torch.tensor([2.0]), torch.tensor([-1.0])
        >>> trial = Trial(g, h, 2.0 * h, 1.0, 0.5, torch.tensor([0.5]))
        >>> measured_gamma(trial)
        4.0
    """
    error = trial.new_gradient - trial.gradient - trial.product
    length = trial.norm(trial.gradient)
    rounding = 8.0 * torch.finfo(error.dtype).eps * max(length, trial.norm(trial.product))
    size = trial.norm(error)
    if size <= rounding:
        return math.inf
    return math.pow(length, exponent) * trial.norm(trial.step) / size


def accepted(trial: Trial) -> bool:
    """Whether the loss fell by enough, or as far as rounding lets one see.

    Where the loss changes by rounding only, the gradient must not have grown.

    Example:
        >>> g, h = torch.tensor([2.0]), torch.tensor([-1.0])
        >>> accepted(Trial(g, h, 2.0 * h, 1.0, 0.5, torch.tensor([0.5])))
        True
        >>> accepted(Trial(g, h, 2.0 * h, 1.0, 1.5, torch.tensor([0.5])))
        False
    """
    if not (math.isfinite(trial.new_value) and trial.landed):
        return False
    slope = trial.dot(trial.gradient, trial.step)
    change = trial.new_value - trial.value
    noise = 16.0 * torch.finfo(trial.gradient.dtype).eps * abs(trial.value)
    if abs(change) <= noise and abs(slope) <= 4.0 * noise:
        return trial.norm(trial.new_gradient) <= trial.norm(trial.gradient)
    return slope < 0.0 and change <= ARMIJO * slope


def update(
    state: NewtonState, trial: Trial, *, exponent: float = 1.0, adapt: bool = True
) -> tuple[bool, NewtonState]:
    r"""Whether a trial is accepted, and the state after it.

    After an accepted step :math:`\gamma` is the measured one, though neither more than four times
    nor less than half of what it was; a rejected one at least halves it. From infinity (no
    damping) it comes down by a rejected step alone, to the measured one.

    Args:
        state: Before the trial.
        trial: What was tried.
        exponent: :math:`\alpha`.
        adapt: Whether :math:`\gamma` changes after accepted steps.
    """
    if not accepted(trial):
        size, length = trial.norm(trial.gradient), trial.norm(trial.step)
        if trial.landed:
            natural = min(state.gamma, math.pow(size, exponent - 1.0) * length)
            found = max(measured_gamma(trial, exponent), LARGEST_FALL * natural)
            state = replace(state, gamma=min(state.gamma, found))
        return False, rejected(state, size, length, exponent)
    gamma = state.gamma
    if adapt and math.isfinite(gamma):
        gamma = min(max(measured_gamma(trial, exponent), SHRINKAGE * gamma), GROWTH * gamma)
    return True, replace(state, gamma=gamma, steps=state.steps + 1)


def rejected(
    state: NewtonState, gradient_norm: float, length: float, exponent: float = 1.0
) -> NewtonState:
    r"""The state after a step that was not taken: half of :math:`\gamma`.

    Args:
        state: Before.
        gradient_norm: :math:`\|g\|`, positive.
        length: :math:`\|h\|`, from which :math:`\gamma` starts if it is infinite; 1 if zero.
        exponent: :math:`\alpha`.
    """
    gamma = state.gamma
    if not math.isfinite(gamma):
        gamma = (length or 1.0) * math.pow(gradient_norm, exponent - 1.0)
    return replace(state, gamma=SHRINKAGE * gamma, rejected=state.rejected + 1)


def against_negative_curvature(
    state: NewtonState, gradient_norm: float, found: float, curvature: float, exponent: float = 1.0
) -> NewtonState:
    r"""The state with more damping, after a direction without positive curvature was met.

    Any damping that makes the matrix positive exceeds :math:`\lambda - c`, with the curvature
    ``c`` along ``d``; twice that (and twice :math:`\lambda`) is tried next.

    Args:
        state: Before.
        gradient_norm: :math:`\|g\|`, positive.
        found: :math:`\lambda`, with which it was met.
        curvature: ``c``, with the damping, of a direction of norm one.
        exponent: :math:`\alpha`.
    """
    needed = 2.0 * max(found - curvature, found)
    if needed <= 0.0:  # a flat direction, and no damping yet
        return rejected(state, gradient_norm, 0.0, exponent)
    gamma = math.pow(gradient_norm, exponent) / needed
    return replace(state, gamma=gamma, rejected=state.rejected + 1)


def norm(vector: Tensor, spread: Spread | None = None) -> float:
    """The norm in float64, of all ranks' rows together where they hold rows of a vector."""
    own = torch.linalg.vector_norm(vector.double())
    return float(own if spread is None else spread.sum(own.square()).sqrt())


def everywhere(true: bool, spread: Spread | None) -> bool:
    """Whether something is true of all ranks' rows."""
    return true if spread is None else not spread.most(float(not true))
