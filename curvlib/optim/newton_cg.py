r"""Damped Newton steps on a whole risk: Newton-CG, Gauss-Newton, or any operator with ``solve``.

Each step solves :math:`(B + \lambda I) h = -g` with :math:`\lambda = \|g\|^\alpha / \gamma`, moves
to :math:`x + h` if the loss falls there, and learns :math:`\gamma` from how well :math:`B`
predicted the gradient along :math:`h`: see :mod:`curvlib.optim.rules.newton`. It is a method for
problems of which the whole loss can be evaluated (a head on fixed features, a fit, a fine-tuned
optimum to measure curvature at), not for mini-batches: it sees no noise.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from curvlib.core.operator import LinearOperator
from curvlib.core.risk import Risk
from curvlib.estimators.iterations import NegativeCurvatureError
from curvlib.estimators.solve import solve
from curvlib.operators.ggn import ggn
from curvlib.optim import arguments
from curvlib.optim.persistence import record, require_own
from curvlib.optim.rules.newton import (
    NewtonState,
    Trial,
    against_negative_curvature,
    damping,
    everywhere,
    init,
    norm,
    rejected,
    update,
)


@dataclass(frozen=True)
class NewtonStep:
    r"""What the last step did.

    Attributes:
        accepted: Whether the parameters changed.
        loss: Before.
        new_loss: After; the same if nothing was accepted.
        gradient_norm: Before.
        damping: :math:`\lambda` of the last trial.
        trials: Steps that were tried.
        products: Columns multiplied by matrices.
    """

    accepted: bool
    loss: float
    new_loss: float
    gradient_norm: float
    damping: float
    trials: int
    products: int


class NewtonCG(torch.optim.Optimizer):
    r"""Newton's method with gradient-norm-scaled damping, on the parameters of a risk.

    Args:
        risk: Model, loss, all the data, and the parameters that are trained, which may be sharded
            (FSDP2) over the ranks that share the data: each then steps its slices.
        operator: Makes the matrix of the risk at its present parameters: ``curvlib.ggn``
            (Gauss-Newton; positive semi-definite), ``curvlib.hessian``, ``curvlib.kfac``, or a
            function of one's own. Operators with ``solve`` solve themselves, others by conjugate
            gradients.
        lr: Share of the Newton step that is taken; schedulers may change it.
        gamma: :math:`\gamma` of the first step, about how far it may go (for
            :math:`\alpha = 1`); ``math.inf`` for no damping, until a step is rejected.
        exponent: :math:`\alpha`.
        adapt: Whether :math:`\gamma` is learned. If not, only rejected steps make it less.
        tolerance: Of the linear systems, relative.
        max_products: Products of each system; what conjugate gradients have by then is used.
        max_trials: Steps that are tried, each with at least twice the damping, before the
            parameters stay where they are.
        preconditioner: Makes a preconditioner of the risk, for conjugate gradients.

    Attributes:
        last: What the last step did; ``None`` before the first.
        progress: :math:`\gamma`, and counts of steps, rejected trials and products.
        skipped: Steps that changed nothing: the loss or gradient was not finite, or no trial was
            accepted.

    Raises:
        TypeError: If ``risk`` is no risk, or an argument has another type.
        ValueError: If an argument is out of range.

    Where conjugate gradients meet negative curvature, the system is solved again with more damping
    than that curvature. At a point with a gradient of zero nothing happens, be it a minimum or
    not. Near a minimum, where the loss changes by rounding only, steps are accepted as long as the
    gradient does not grow; ``last.accepted`` is false when nothing more can be gained.

    What other optimizers of curvlib do and this one does not, since the risk holds model, loss,
    data and precision: closures, ``backward`` and ``.grad`` (gradients of the user's are neither
    read nor written), accumulation, loss scales, clipping, several groups, ``maximize``.

    Example:
        >>> import curvlib as cl
        >>> model = torch.nn.Linear(3, 1).double()
        >>> x, y = torch.randn(20, 3).double(), torch.randn(20, 1).double()
        >>> risk = cl.Risk(model, torch.nn.MSELoss(), (x, y))
        >>> opt = NewtonCG(risk, gamma=float("inf"), tolerance=1e-10)
        >>> loss = opt.step()  # least squares: one step
        >>> bool(risk.gradient().norm() < 1e-8)
        True
    """

    def __init__(
        self,
        risk: Risk,
        operator: Callable[[Risk], LinearOperator] = ggn,
        *,
        lr: float = 1.0,
        gamma: float = 1.0,
        exponent: float = 1.0,
        adapt: bool = True,
        tolerance: float = 1e-3,
        max_products: int = 200,
        max_trials: int = 12,
        preconditioner: Callable[[Risk], Any] | None = None,
    ) -> None:
        if not isinstance(risk, Risk):
            raise TypeError(
                f"NewtonCG takes a curvlib.Risk (model, loss and data), got {type(risk).__name__}"
            )
        for name, function in (("operator", operator), ("preconditioner", preconditioner)):
            if not callable(function) and (name == "operator" or function is not None):
                raise TypeError(
                    f"{name}= is a function of a risk, such as curvlib.ggn, got "
                    f"{type(function).__name__}"
                )
        if gamma != math.inf:
            arguments.positive({"gamma": gamma}, "gamma")
        arguments.positive({"exponent": exponent, "tolerance": tolerance}, "exponent", "tolerance")
        arguments.flag({"adapt": adapt}, "adapt")
        self.max_products = arguments.count("max_products", max_products)
        self.max_trials = arguments.count("max_trials", max_trials)
        self.risk = risk
        self.operator = operator
        self.preconditioner = preconditioner
        self.exponent, self.adapt, self.tolerance = float(exponent), adapt, float(tolerance)
        self.progress = init(float(gamma))
        self.skipped = 0
        self.last: NewtonStep | None = None
        super().__init__(list(risk.params.values()), {"lr": lr})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises RuntimeError: parameters are those of the risk."""
        if self.param_groups:
            raise RuntimeError(
                "the parameters of NewtonCG are those of its risk: make a new one for a risk with "
                "more of them (params=)"
            )
        arguments.positive(param_group | self.defaults, "lr")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: None = None) -> Tensor:  # type: ignore[override]  # takes no closure
        """One step; at most one change of the parameters.

        Args:
            closure: None: the loss is the risk's.

        Returns:
            The loss before the step; NaN if it, or its gradient, is not finite.

        Raises:
            TypeError: If there is a closure.
        """
        if closure is not None:
            raise TypeError(
                "NewtonCG evaluates its own risk, several times a step: call step() without a "
                "closure"
            )
        space = self.risk.space
        try:
            value, gradient = self.risk.value(), self.risk.gradient()
        except FloatingPointError:
            self.skipped += 1
            return torch.full((), math.nan, dtype=space.dtype, device=space.device)
        length = norm(gradient, space.spread)
        before = self.progress
        found, new_loss, trials, used = length == 0.0, float(value), 0, 0.0
        params = list(self.risk.params.values())
        start = [p.detach().clone() for p in params]
        try:
            while not found and trials < self.max_trials:
                trials += 1
                used = damping(length, self.progress.gamma, self.exponent)
                matrix = self.operator(self.risk)  # anew: parameters may have come back
                step = self._step_of(matrix, gradient, length, used)
                if step is None:
                    continue
                if everywhere(not bool(step.any()), space.spread):
                    break  # too short to see, and more damping shortens it
                trial = self._tried(matrix, gradient, step, float(value))
                found, self.progress = update(
                    self.progress, trial, exponent=self.exponent, adapt=self.adapt
                )
                if found:
                    new_loss = trial.new_value
                else:
                    _restore(params, start)
        except FloatingPointError:  # of a product with the matrix
            self.progress = before
        finally:
            if not found:
                _restore(params, start)
        self.skipped += not found
        self.last = NewtonStep(
            accepted=self.progress.steps > before.steps,
            loss=float(value),
            new_loss=new_loss,
            gradient_norm=length,
            damping=used,
            trials=trials,
            products=self.progress.products - before.products,
        )
        return value

    def _step_of(
        self, matrix: LinearOperator, gradient: Tensor, length: float, used: float
    ) -> Tensor | None:
        """The step as it is rounded; ``None`` if there is none, and more damping is needed."""
        try:
            solution, products = self._solved(matrix, -gradient, used)
        except NegativeCurvatureError as error:
            self.progress = against_negative_curvature(
                self.progress, length, used, error.curvature, self.exponent
            )
            return None
        self.progress = replace(self.progress, products=self.progress.products + products)
        here = self.risk.space.join(list(self.risk.params.values()))
        there = here + float(self.param_groups[0]["lr"]) * solution
        if not everywhere(bool(torch.isfinite(there).all()), self.risk.space.spread):
            self.progress = rejected(self.progress, length, 0.0, self.exponent)
            return None
        return there - here

    def _tried(self, matrix: LinearOperator, gradient: Tensor, step: Tensor, value: float) -> Trial:
        """Moves the parameters, and looks around."""
        product = matrix @ step
        self.progress = replace(self.progress, products=self.progress.products + 1)
        parts = self.risk.space.split(step)
        for p, part in zip(self.risk.params.values(), parts, strict=True):
            p.add_(part)
        try:
            new_value, new_gradient = float(self.risk.value()), self.risk.gradient()
        except FloatingPointError:
            new_value, new_gradient = math.inf, torch.full_like(gradient, math.inf)
        spread = self.risk.space.spread
        return Trial(gradient, step, product, value, new_value, new_gradient, spread)

    def _solved(self, matrix: LinearOperator, b: Tensor, used: float) -> tuple[Tensor, int]:
        own = callable(getattr(matrix, "solve", None))
        prepared = None if own or self.preconditioner is None else self.preconditioner(self.risk)
        with warnings.catch_warnings():  # a system that is solved in part has a descent direction
            warnings.filterwarnings(
                "ignore", message=".*right-hand sides of", category=RuntimeWarning
            )
            solution = solve(
                matrix,
                b,
                damping=used,
                method="direct" if own else "cg",
                preconditioner=prepared,
                tolerance=self.tolerance,
                max_products=self.max_products,
                progress=False,
            )
        return solution.value, solution.products

    # --------------------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """The state: that of parameters is empty, the rest is under ``"curvlib"``."""
        out = super().state_dict()
        out["curvlib"] = record(
            type(self).__name__,
            self._whole(),
            {"progress": asdict(self.progress), "skipped": self.skipped},
        )
        return out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state; the trajectory is then bitwise the one that was saved.

        Raises:
            TypeError: If it is no dictionary.
            ValueError: If it is that of another optimizer, model or version of curvlib.
        """
        state_dict, own = require_own(state_dict, type(self).__name__, self._whole())
        super().load_state_dict(state_dict)
        self.progress = NewtonState(**own["progress"])
        self.skipped = own["skipped"]

    def _whole(self) -> list[Tensor]:
        """Tensors of the shapes of the whole parameters."""
        spread = self.risk.space.spread
        if spread is None:
            return list(self.risk.params.values())
        return [torch.empty(part.shape, device="meta") for part in spread.slices]


def _restore(params: list[Tensor], values: list[Tensor]) -> None:
    for p, value in zip(params, values, strict=True):
        p.copy_(value)
