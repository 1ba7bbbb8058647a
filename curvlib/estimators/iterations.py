r"""One iteration of each linear solver, for all columns at once.

A solver is a function :data:`Start`, from residuals to what it remembers, and a function
:data:`Advance`, from that to a :class:`Step`: one block product, and where the solutions go.
What is remembered is a dictionary of tensors whose leading axis is the columns, so that columns
that have converged are taken out of all of them alike. Vectors are rows ``[K, P]``, scalars
``[K]`` in float64 on the device. Nothing that is given is written to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from curvlib.core.operator import LinearOperator
from curvlib.core.ranks.spread import Spread
from curvlib.core.structured import LowRankPlusShift, damped_solve
from curvlib.estimators.low_rank_inverse import inverse_rows
from curvlib.estimators.rows import dots

Work = dict[str, Tensor]


class NegativeCurvatureError(RuntimeError):
    """Conjugate gradients met a direction along which the operator is not positive.

    Attributes:
        direction: The direction ``d``, ``[P]``, of norm one.
        curvature: ``d.T @ (A + damping I) @ d``.
        column: The right-hand side, counted from 0.
    """

    def __init__(self, message: str, direction: Tensor, curvature: float, column: int) -> None:
        super().__init__(message)
        self.direction = direction
        self.curvature = curvature
        self.column = column


class Scratch:
    """Blocks of rows that an iteration no longer holds, for the next one to write to.

    Fresh memory costs as much as several passes over it. Whatever an unfinished step has
    written to, no earlier state holds.
    """

    def __init__(self) -> None:
        self._all: list[Tensor] = []
        self._free: list[Tensor] = []

    def take(self, like: Tensor) -> Tensor:
        """A block of the shape and type of ``like``, of any content."""
        if self._all and self._all[0].shape != like.shape:
            self._all, self._free = [], []
        if self._free:
            return self._free.pop()
        self._all.append(torch.empty_like(like))
        return self._all[-1]

    def free_all_but(self, held: Iterable[Tensor]) -> None:
        """Takes back all blocks except those that ``held`` tensors live in."""
        places = {tensor.data_ptr() for tensor in held}
        self._free = [block for block in self._all if block.data_ptr() not in places]


@dataclass(frozen=True)
class System:
    """The damped operator and its preconditioner, on rows.

    Attributes:
        op: The operator.
        damping: What is added to its diagonal.
        preconditioner: An operator near ``op`` with ``solve(columns, damping=...)``, or ``None``.
        scale: Of the Neumann series.
        columns: Which right-hand sides the rows belong to, for errors.
        products: Columns multiplied so far, for errors.
        scratch: Where vectors are written to.
    """

    op: LinearOperator
    damping: float
    preconditioner: Any = None
    scale: float = 1.0
    columns: tuple[int, ...] = ()
    products: int = 0
    scratch: Scratch = field(default_factory=Scratch)

    def product(self, rows: Tensor) -> Tensor:
        """``(A + damping I)`` times each row."""
        found = self.op.matmat(rows.mT).mT.contiguous()
        if self.damping == 0.0:
            return found
        return torch.add(found, rows, alpha=self.damping, out=self.scratch.take(rows))

    def precondition(self, rows: Tensor) -> Tensor:
        """The preconditioner's inverse times each row."""
        if self.preconditioner is None:
            return rows
        if isinstance(self.preconditioner, LowRankPlusShift):
            out = self.scratch.take(rows)
            if inverse_rows(self.preconditioner, rows, self.damping, out) is not None:
                return out
        solved: Any = damped_solve(self.preconditioner, rows.mT, self.damping)
        if not isinstance(solved, Tensor) or solved.shape != rows.mT.shape:
            got = list(solved.shape) if isinstance(solved, Tensor) else type(solved).__name__
            raise ValueError(
                f"preconditioner.solve of columns {list(rows.mT.shape)} should return the same "
                f"shape, got {got}"
            )
        return solved.mT.contiguous()


@dataclass(frozen=True)
class Step:
    """What an iteration found: the solutions go by ``factor * direction``.

    Attributes:
        factor: ``[K]``, float64.
        direction: Rows ``[K, P]``.
        norms: Norms of the residuals, ``[K]``, float64 on the CPU.
        work: What is remembered.
        stop: Why columns cannot go on, by their index.
    """

    factor: Tensor
    direction: Tensor
    norms: Tensor
    work: Work
    stop: dict[int, str] = field(default_factory=dict)


Start = Callable[[System, Tensor], Work]
Advance = Callable[[System, Work], Step]


# ---------------------------------------------------------- conjugate gradients
def cg_start(system: System, residuals: Tensor) -> Work:
    """Before the first iteration of preconditioned conjugate gradients."""
    z = system.precondition(residuals)
    rz = dots(residuals, z, system.op.spread)
    _require_positive_preconditioner(system, rz.cpu())
    return {"r": residuals, "d": z, "rz": rz}


def cg_step(system: System, work: Work) -> Step:
    """An iteration of preconditioned conjugate gradients.

    Source:
        M. Hestenes and E. Stiefel, *Methods of conjugate gradients for solving linear systems*,
        J. Res. Nat. Bur. Standards 49 (1952); Y. Saad, *Iterative methods for sparse linear
        systems*, algorithm 9.1.
    """
    r, d, rz = work["r"], work["d"], work["rz"]
    product = system.product(d)
    curvature = dots(d, product, system.op.spread)
    if system.preconditioner is not None:  # which should not be asked about what went wrong
        _require_positive_curvature(system, d, curvature.cpu())
    alpha = rz / curvature
    r = torch.addcmul(r, column(-alpha, r), product, out=system.scratch.take(r))
    z = system.precondition(r)
    after = dots(r, z, system.op.spread)
    norms = after.sqrt() if z is r else row_norms(r, system.op.spread)
    norms, after_, curvature = torch.stack([norms, after, curvature]).cpu()
    _require_positive_curvature(system, d, curvature)
    require_finite(system, norms)
    if z is not r:
        _require_positive_preconditioner(system, after_)
    following = torch.addcmul(z, column(after / rz, d), d, out=system.scratch.take(d))
    return Step(alpha, d, norms, {"r": r, "d": following, "rz": after})


def _require_positive_curvature(system: System, d: Tensor, curvature: Tensor) -> None:
    require_finite(system, curvature)
    if bool((curvature > 0.0).all()):
        return
    at = int(curvature.argmin())
    norm = float(row_norms(d[at : at + 1], system.op.spread))
    value = float(curvature[at]) / norm**2
    needed = system.damping - value
    raise NegativeCurvatureError(
        f"conjugate gradients need a positive definite operator, but {system.op!r} with "
        f"damping={system.damping:g} has curvature {value:.3g} along a direction (right-hand side "
        f"{system.columns[at]}, after {system.products} products); pass a larger damping= "
        f"(more than {needed:.3g}, perhaps much more), or method='minres'. The direction is in "
        "this error's .direction",
        d[at] / norm,
        value,
        system.columns[at],
    )


def _require_positive_preconditioner(system: System, rz: Tensor) -> None:
    require_finite(system, rz)
    if bool((rz < 0.0).any()):
        raise RuntimeError(
            f"the preconditioner {system.preconditioner!r} is not positive definite: "
            f"r.T @ M^-1 @ r is {float(rz.min()):.3g} for a residual; use one that is (more "
            "damping), or none"
        )


# ----------------------------------------------------------------------- MINRES
def minres_start(system: System, residuals: Tensor) -> Work:
    """Before the first iteration of preconditioned MINRES."""
    y = system.precondition(residuals)
    square = dots(residuals, y, system.op.spread)
    _require_positive_preconditioner(system, square.cpu())
    zeros = torch.zeros_like(residuals)
    beta = square.sqrt()
    none = torch.zeros_like(beta)
    # Without a preconditioner the recurrence's own phibar is the norm of the residual.
    residual = {} if y is residuals else {"r": residuals}
    return residual | {
        "r1": zeros,
        "r2": residuals,
        "y": y,
        "w1": zeros,
        "w2": zeros,
        "old": none,
        "beta": beta,
        "dbar": none,
        "epsln": none,
        "phibar": beta,
        "cs": none - 1.0,
        "sn": none,
        "norm": none,
    }


def minres_step(system: System, work: Work) -> Step:
    """An iteration of preconditioned MINRES, with the residual's own recurrence.

    Source:
        C. Paige and M. Saunders, *Solution of sparse indefinite systems of linear equations*,
        SIAM J. Numer. Anal. 12 (1975); for the residual, S.-C. Choi, C. Paige and M. Saunders,
        *MINRES-QLP*, SIAM J. Sci. Comput. 33 (2011), section 2.2.
    """
    r2, last, w1, w2 = work["r2"], work["y"], work["w1"], work["w2"]
    take = system.scratch.take
    old, beta, cs, sn = work["old"], work["beta"], work["cs"], work["sn"]
    eps = torch.finfo(r2.dtype).eps
    # The Lanczos vector is last / beta; the division goes into the coefficients.
    y = torch.mul(system.product(last), column(1.0 / beta, r2), out=take(r2))
    y.addcmul_(column(-torch.where(old > 0.0, beta / old, old), y), work["r1"])
    alpha = dots(last, y, system.op.spread) / beta
    y.addcmul_(column(-alpha / beta, y), r2)
    z = system.precondition(y)
    square = dots(y, z, system.op.spread)
    following = square.sqrt()
    norm = torch.maximum(work["norm"], (alpha.square() + beta_square(old, beta, square)).sqrt())

    delta = cs * work["dbar"] + sn * alpha
    gbar = sn * work["dbar"] - cs * alpha
    epsln, dbar = sn * following, -cs * following
    root = torch.hypot(gbar, dbar)  # ||A r|| / ||r|| of the residual before
    gamma = torch.hypot(gbar, following)
    singular = (root <= math.sqrt(eps) * norm) | (gamma <= 10 * eps * norm)
    divisor = torch.where(singular, torch.ones_like(gamma), gamma)
    cs = torch.where(singular, torch.zeros_like(gamma), gbar / divisor)
    sn = torch.where(singular, torch.ones_like(gamma), following / divisor)
    phi = cs * work["phibar"]
    phibar = sn * work["phibar"]

    w = torch.mul(last, column(1.0 / (beta * divisor), last), out=take(w1))
    w.addcmul_(column(-work["epsln"] / divisor, w), w1)
    w.addcmul_(column(-delta / divisor, w), w2)
    broken = following <= 10 * eps * norm
    residual = {}
    if "r" in work:
        safe = torch.where(broken, torch.ones_like(following), following)
        r = torch.mul(work["r"], column(sn.square(), r2), out=take(r2))
        r.addcmul_(column(-torch.where(broken, sn * 0.0, phibar * cs / safe), r), y)
        residual = {"r": r}
    norms = row_norms(residual["r"], system.op.spread) if residual else phibar.abs()
    numbers = [square, norms, singular.to(norms.dtype), broken.to(norms.dtype)]
    square, norms, ended, broke = torch.stack(numbers).cpu()  # waits for the device once
    require_finite(system, square)
    if z is not y:
        _require_positive_preconditioner(system, square)
    require_finite(system, norms)
    stop = dict.fromkeys(ended.nonzero()[:, 0].tolist(), "inconsistent")
    for i in broke.nonzero()[:, 0].tolist():
        stop.setdefault(i, "breakdown")
    return Step(
        phi,
        w,
        norms,
        residual
        | {
            "r1": r2,
            "r2": y,
            "y": z,
            "w1": w2,
            "w2": w,
            "old": beta,
            "beta": following,
            "dbar": dbar,
            "epsln": epsln,
            "phibar": phibar,
            "cs": cs,
            "sn": sn,
            "norm": norm,
        },
        stop,
    )


def beta_square(old: Tensor, beta: Tensor, square: Tensor) -> Tensor:
    """Squares of the two off-diagonal entries of a Lanczos step; the first step has but one."""
    return torch.where(old > 0.0, beta.square(), old) + square


# --------------------------------------------------------------- Neumann series
def neumann_start(system: System, residuals: Tensor) -> Work:
    """Before the first term of a Neumann series."""
    z = system.precondition(residuals)
    rz = dots(residuals, z, system.op.spread)
    _require_positive_preconditioner(system, rz.cpu())
    return {"r": residuals, "z": z, "rz": rz}


def neumann_step(system: System, work: Work) -> Step:
    r"""A term of :math:`s \sum_j (I - s M^{-1} A)^j M^{-1} b`, which is Richardson's iteration.

    In the norm that :math:`M^{-1}` defines, the residual shrinks at least as fast as the
    iteration's spectral radius says: growth proves that the radius exceeds one.
    """
    r, z, rz = work["r"], work["z"], work["rz"]
    product = system.product(z)
    after_r = torch.add(r, product, alpha=-system.scale, out=system.scratch.take(r))
    after_z = system.precondition(after_r)
    after = dots(after_r, after_z, system.op.spread)
    norms = after.sqrt() if after_z is after_r else row_norms(after_r, system.op.spread)
    ratio = torch.where(rz > 0.0, after / rz, rz).sqrt()
    norms, after_, ratio = torch.stack([norms, after, ratio]).cpu()
    require_finite(system, norms)
    if after_z is not after_r:
        _require_positive_preconditioner(system, after_)
    if bool((ratio > 1.0 + 10.0 * math.sqrt(torch.finfo(r.dtype).eps)).any()):
        at = int(ratio.argmax())
        quotient = float((dots(z, product, system.op.spread) / rz)[at])
        cure = (
            "the operator has negative eigenvalues: pass a larger damping=, or method='minres'"
            if quotient < 0.0
            else f"pass scale= below {2.0 / quotient:.3g}, or method='cg'"
        )
        raise RuntimeError(
            f"the Neumann series of {system.op!r} with damping={system.damping:g} and "
            f"scale={system.scale:.3g} diverges: the spectral radius of I - scale * (A + damping "
            f"I) is at least {float(ratio[at]):.4g} (right-hand side {system.columns[at]}, after "
            f"{system.products} products); {cure}"
        )
    scale = torch.full_like(rz, system.scale)
    return Step(scale, z, norms, {"r": after_r, "z": after_z, "rz": after})


# ---------------------------------------------------------------------- algebra
METHODS: dict[str, tuple[Start, Advance]] = {
    "cg": (cg_start, cg_step),
    "minres": (minres_start, minres_step),
    "neumann": (neumann_start, neumann_step),
}


def row_norms(rows: Tensor, spread: Spread | None = None) -> Tensor:
    """Norms of the rows, ``[K]``, float64."""
    return dots(rows, rows, spread).sqrt()


def column(scalars: Tensor, like: Tensor) -> Tensor:
    """Scalars ``[K]`` as ``[K, 1]`` in the type of the vectors."""
    return scalars.to(like.dtype)[:, None]


def require_finite(system: System, numbers: Tensor) -> None:
    """Checks numbers ``[K]`` that came out of an iteration.

    Raises:
        FloatingPointError: If one is NaN or infinite.
    """
    if not bool(torch.isfinite(numbers).all()):
        at = int((~torch.isfinite(numbers)).nonzero()[0, 0])
        raise FloatingPointError(
            f"the iteration after {system.products} products with {system.op!r} has a number that "
            f"is NaN or infinite (right-hand side {system.columns[at]}), though its vectors were "
            "finite; check the loss and its derivatives at these parameters (risk.check()), and "
            "the preconditioner. With checkpoint=, what came before is saved"
        )
