r"""The damped inverse of a curvature matrix, whichever it is, applied to gradients.

Damping is :math:`\lambda = c\,\bar\Lambda` by default, a fraction ``c`` of the mean eigenvalue: of
each block for K-FAC and EK-FAC (Grosse et al., 2023, section 3.3), of the whole matrix for any
other. ``relative=False`` is an absolute number.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from curvlib.core.kronecker import Kronecker
from curvlib.core.operator import LinearOperator
from curvlib.core.risk import Risk
from curvlib.core.run import Progress
from curvlib.estimators.solve import solve
from curvlib.operators.fisher_diagonal import affordable_fisher, fisher_diagonal
from curvlib.operators.kfac import KFAC, kfac

#: Curvature that is fitted when it is asked for by name.
NAMES = ("ekfac", "kfac", "diagonal", "identity")
#: Relative damping where none is given.
DAMPING = 0.1


@dataclass(frozen=True, eq=False)
class Preconditioner:
    r""":math:`(H + \lambda I)^{-1}`.

    Attributes:
        operator: :math:`H`, or ``None`` for the identity.
        damping: As it was asked for.
        relative: Whether that is a fraction of the mean eigenvalue.
    """

    operator: LinearOperator | None
    damping: float
    relative: bool

    @property
    def name(self) -> str:
        """What the curvature is."""
        return "identity" if self.operator is None else self.operator.name

    def solve(self, columns: Tensor) -> Tensor:
        """The damped inverse times columns ``[P, K]``, in their type.

        Raises:
            RuntimeError: If the damped matrix is singular, or a solve does not converge.
        """
        op = self.operator
        if op is None:
            return columns
        own = columns.to(op.device, op.dtype)
        if isinstance(op, Kronecker):
            found = op.solve(own, self.damping, relative=self.relative)
        else:
            damping = self.damping
            if self.relative and damping:
                damping *= _trace(op) / op.shape[0]
            found = _solved(op, own, damping)
        return found.to(columns)

    def squares(self, rows: Tensor) -> Tensor:
        r""":math:`g^\top (H + \lambda I)^{-1} g` for each row ``[n, P]``, ``[n]``."""
        return (rows * self.solve(rows.mT).mT).sum(1)

    def fingerprint(self) -> str:
        """A digest of what it does."""
        own = "identity" if self.operator is None else self.operator.fingerprint()
        return f"{own}|{self.damping!r}|{self.relative}"


def preconditioner(
    risk: Risk,
    curvature: str | LinearOperator | None,
    damping: float | None,
    *,
    relative: bool,
    fit: Mapping[str, Any],
    progress: Progress = None,
) -> tuple[Risk, Preconditioner]:
    """The preconditioner, and the risk as a function of the parameters that it is of.

    Args:
        risk: The training data's.
        curvature: One of :data:`NAMES`, an operator, or ``None`` for EK-FAC.
        damping: Default: 0.1, and for operators that bring their own damping (M-FAC) none.
        relative: Whether it is relative.
        fit: Settings of :func:`curvlib.kfac`, or of the diagonal.
        progress: Whether to show a bar.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If the name is unknown, or the operator is of another model or data.
    """
    value = DAMPING if damping is None else required_damping(damping)
    if curvature is None or isinstance(curvature, str):
        found = _fitted(risk, curvature or NAMES[0], fit, progress)
        risk, found = _reached(risk, found)
        return risk, Preconditioner(found, value, relative)
    if not isinstance(curvature, LinearOperator):
        raise TypeError(
            f"curvature= is one of {', '.join(map(repr, NAMES))} or an operator, got "
            f"{type(curvature).__name__}"
        )
    if fit:
        raise ValueError(f"fit= is for curvature by name, got an operator and fit={dict(fit)}")
    if damping is None and hasattr(curvature, "damping_used"):
        value = 0.0
    risk, curvature = _reached(*_matched(risk, curvature))
    return risk, Preconditioner(curvature, value, relative)


def required_damping(damping: float) -> float:
    """The damping, if it is one.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is negative or not finite.
    """
    if isinstance(damping, bool) or not isinstance(damping, (int, float)):
        raise TypeError(f"damping= is a number, got {type(damping).__name__}")
    if not 0.0 <= damping < float("inf"):
        raise ValueError(f"damping= is a finite number, at least 0, got {damping}")
    return float(damping)


def _fitted(
    risk: Risk, name: str, fit: Mapping[str, Any], progress: Progress
) -> LinearOperator | None:
    if name not in NAMES:
        raise ValueError(f"curvature= is one of {', '.join(map(repr, NAMES))}, got {name!r}")
    if name == "identity":
        if fit:
            raise ValueError(f"the identity is not fitted, got fit={dict(fit)}")
        return None
    settings = dict(fit)
    if "fisher" not in settings:
        settings["fisher"] = affordable_fisher(risk)
    if name == "diagonal":
        return fisher_diagonal(risk, **settings)
    settings = {"rest": "diagonal", "progress": progress, **settings}
    return kfac(risk, eigen_corrected=name == "ekfac", **settings)


def _matched(risk: Risk, op: LinearOperator) -> tuple[Risk, LinearOperator]:
    """The risk as a function of the parameters that an operator covers, and it on these."""
    if op.space is not None and op.space.names != risk.space.names:
        absent = sorted(set(op.space.names) - set(risk.space.names))
        if absent:
            raise ValueError(
                f"the {op.name} operator is of another model: it has the parameters {absent[:6]}, "
                "which the risk has not; fit one on this risk, or pass the same params="
            )
        risk = risk.restrict([risk.held.held[name] for name in op.space.names])
    if op.shape != (risk.space.total, risk.space.total):
        raise ValueError(
            f"the {op.name} operator is of shape {list(op.shape)}, but the risk has "
            f"{risk.space.total} parameters; fit one on this risk, or pass the same params="
        )
    if not isinstance(op, KFAC):
        return risk, op
    op.require_fits(risk)
    found = op.coverage()
    if not found.uncovered or found.diagonal:
        return risk, op
    covered = [risk.held.held[name] for name in found.covered]
    return risk.restrict(covered), op._restricted(found.covered)


def _reached(risk: Risk, op: LinearOperator | None) -> tuple[Risk, LinearOperator | None]:
    """Without the parameters of blocks that are zero: gradients by them are, too."""
    if not isinstance(op, Kronecker):
        return risk, op
    ranges = [place for block in op.zero_blocks() for place in block.ranges]
    whole = risk.space.whole()
    names = [
        name
        for name in risk.space.names
        if not any(start <= whole.slice(name).start < stop for start, stop in ranges)
    ]
    if not ranges or not names:
        return risk, op
    return risk.restrict([risk.held.held[name] for name in names]), op._restricted(tuple(names))


def _solved(op: Any, columns: Tensor, damping: float) -> Tensor:
    """By the operator's own solve, else by conjugate gradients."""
    if hasattr(op, "solve"):
        own: Tensor = op.solve(columns, damping)
        return own
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what it says is raised below
        found = solve(op, columns, damping=damping, progress=False)
    if not bool(found.converged.all()):
        raise RuntimeError(
            f"solves with {op!r} and damping={damping:g} did not converge: the largest relative "
            f"residual is {float(found.residuals.max()):.1e}; use a larger damping=, or an "
            "operator with a solve of its own (curvlib.kfac)"
        )
    return found.value


def _trace(op: Any) -> float:
    if not hasattr(op, "trace"):
        raise ValueError(
            f"relative damping of {op!r} needs its trace, which it does not have; pass an "
            "absolute damping= with relative=False"
        )
    return float(op.trace())
