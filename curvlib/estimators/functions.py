r"""Traces of functions of a symmetric operator, by stochastic Lanczos quadrature.

:math:`\mathrm{tr} f(A) \approx \frac{n}{R} \sum_{r=1}^R w_r^\top f(A) w_r` with random unit
vectors :math:`w_r`, each quadratic form by the Gauss rule that ``m`` Lanczos steps from
:math:`w_r` give. Two errors are told apart: that of the probes (``stderr``), and that of the
rules (``quadrature_error``), which only more steps make smaller.
"""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlib.core.digest import digest
from curvlib.core.operator import LinearOperator
from curvlib.core.result import Result
from curvlib.core.run import Progress, run
from curvlib.estimators import function_state, stopping
from curvlib.estimators.arguments import require_counts
from curvlib.estimators.eigenpairs import Eigenpairs, deflation_rows, require_symmetric
from curvlib.estimators.function_state import FunctionState, Plan
from curvlib.estimators.function_sums import Function, Sums
from curvlib.estimators.probes import generator_of

#: Laws of probes whose norm is known: recurrences start from vectors of norm one.
LAWS = ("sphere", "rademacher")


@dataclass(frozen=True, eq=False, repr=False)
class FunctionTrace(Result):
    r"""The trace of a function of an operator.

    Attributes:
        value: :math:`\mathrm{tr} f(A)`.
        stderr: Its standard error over probes. For sphere probes, from the variance of their
            law, which the rules tell as they tell the trace (so also with one probe); else from
            the scatter of the samples, NaN with one probe.
        interval: Where it lies with 95 % confidence as far as the probes go: for sphere probes
            with the skewness of their law, else by Student's t.
        quadrature_error: How much the rules of one, two and three steps less differ at most from
            those that were used, in the mean over probes: an estimate from above where the error
            falls with the steps. It is not part of ``stderr``. NaN with one step.
        samples: What each probe says of the bulk, ``[R]``; ``value`` is their mean and ``exact``.
        exact: The part of the deflated eigenvalues.
        nodes: Ritz values of each probe, ascending, ``[R, steps]``.
        weights: Their weights, ``[R, steps]``; each row sums to one.
        clipped: Ritz values that rounding had made negative and that were taken as zero (only
            where ``f`` needs positive ones).
        converged: Whether both errors are within the tolerance; ``None`` where none was given.
        products: How many columns the operator multiplied.
        function: What ``f`` is.
        method: How it was estimated.
        name: What was measured.
        settings: The settings, by name.
    """

    value: float
    stderr: float
    interval: tuple[float, float]
    quadrature_error: float
    samples: Tensor
    exact: float
    nodes: Tensor
    weights: Tensor
    clipped: int
    converged: bool | None
    products: int
    function: str
    method: str
    name: str
    settings: dict[str, Any]


def trace_of(
    op: LinearOperator | Tensor,
    fn: Function,
    *,
    steps: int = 32,
    probes: int = 8,
    tolerance: float | None = None,
    max_products: int | None = None,
    law: str = "sphere",
    deflate: Eigenpairs | None = None,
    block: int | None = None,
    reorthogonalize: bool = True,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: float = 30.0,
    progress: Progress = None,
) -> FunctionTrace:
    r"""The trace of ``fn(A)``, by stochastic Lanczos quadrature in ``steps * probes`` products.

    Probes advance ``block`` at a time, each step being one block product. The error of the
    probes falls as :math:`1 / \sqrt{R P}` for a smooth spectrum, so large operators need few;
    that of the rules falls geometrically with the steps where ``fn`` is analytic around the
    spectrum (``fn`` of degree ``2 * steps - 1`` is exact).

    Args:
        op: A symmetric operator, or a dense symmetric matrix.
        fn: Maps float64 eigenvalues on the CPU, of any shape, to values of that shape
            (``torch.exp``).
        steps: Lanczos steps of a probe, at most P. A probe stops earlier in an invariant
            subspace, and where ``tolerance`` is met with a tenth of it left to the rule.
        probes: Random vectors; with a tolerance, how many at least (and no fewer than 8).
        tolerance: Go on until the standard error is at most this times the value, at most 1000
            probes or ``max_products``. A ``RuntimeWarning`` says if that was not enough.
        max_products: Use no more products, and fewer probes if need be.
        law: ``"sphere"``, or ``"rademacher"`` (exact where ``fn(A)`` is diagonal).
        deflate: Eigenpairs that are counted exactly, such as outliers; probes then see the
            complement only. Pairs that have not converged are not used.
        block: Probes advanced together, which share memory of ``steps * block * P`` numbers; up
            to 8 when omitted.
        reorthogonalize: ``False`` keeps three vectors for each probe instead of ``steps``;
            ghosts then split weights between copies of a node, which leaves the sums as they are.
        generator: Where the probes come from, or
        seed: their seed. With neither, the seed is 0.
        checkpoint: A file to save to, and to continue from where it exists.
        save_every: Seconds between saves.
        progress: Whether to show a bar: see :data:`curvlib.core.run.Progress`.

    Raises:
        TypeError: If an argument is of a wrong type, or ``fn`` returns no tensor.
        ValueError: If the operator is not symmetric, an argument does not fit, or ``fn`` is not
            finite at a Ritz value.
        FloatingPointError: If a product is not finite.

    Example:
        >>> A = torch.diag(torch.linspace(0.0, 2.0, 200, dtype=torch.float64))
        >>> heat = trace_of(A, lambda x: torch.exp(-x), steps=12)
        >>> abs(heat.value - float(torch.exp(-A.diagonal()).sum())) < 4 * heat.stderr
        True
        >>> heat.products, heat.quadrature_error < 1e-6
        (96, True)

    Source:
        S. Ubaru, J. Chen and Y. Saad, *Fast estimation of tr(f(A)) via stochastic Lanczos
        quadrature*, SIAM J. Matrix Anal. Appl. 38 (2017); G. Golub and G. Meurant, *Matrices,
        Moments and Quadrature* (2010), chapter 6.
    """
    if not callable(fn):
        raise TypeError(
            f"expected a function of a tensor of eigenvalues for fn, got {type(fn).__name__}"
        )
    return _trace(
        op,
        fn,
        getattr(fn, "__name__", type(fn).__name__),
        None,
        steps=steps,
        probes=probes,
        tolerance=tolerance,
        max_products=max_products,
        law=law,
        deflate=deflate,
        block=block,
        reorthogonalize=reorthogonalize,
        generator=generator,
        seed=seed,
        checkpoint=checkpoint,
        save_every=save_every,
        progress=progress,
    )


def logdet(op: LinearOperator | Tensor, damping: float = 0.0, **options: Any) -> FunctionTrace:
    r"""The logarithm of the determinant of ``A + damping * I``, as :func:`trace_of`.

    Ritz values that rounding made negative (within 100 machine epsilons of the norm) are taken
    as zero; the result says how many.

    Args:
        op: A symmetric operator; with the damping, it must be positive definite.
        damping: Added to each eigenvalue, at least 0.
        **options: Of :func:`trace_of`.

    Raises:
        ValueError: If Ritz values show that ``A + damping * I`` is not positive definite. What
            was multiplied is kept in the checkpoint, if there is one, from which the same call
            with a larger damping goes on.

    Example:
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
        >>> f"{logdet(A, probes=400, block=400).value:.1f} and {math.log(8):.1f}"
        '2.1 and 2.1'
    """
    damping = _damping(damping, least="at least 0")
    function = "log(x)" if damping == 0.0 else f"log(x + {damping:g})"
    return _trace(op, lambda x: torch.log(x + damping), function, -damping, **options)


def effective_dimension(
    op: LinearOperator | Tensor, damping: float, **options: Any
) -> FunctionTrace:
    r"""The number of directions that the damping leaves: :math:`\mathrm{tr} A (A + dI)^{-1}`.

    Also the effective number of parameters (of directions that the data determine) where the
    damping is the precision of a Gaussian prior.

    Args:
        op: A symmetric operator; with the damping, it must be positive definite.
        damping: ``d``, positive.
        **options: Of :func:`trace_of`.

    Raises:
        ValueError: If Ritz values show that ``A + damping * I`` is not positive definite; see
            :func:`logdet`.

    Example:
        >>> effective_dimension(4.0 * torch.eye(10).double(), damping=1.0).value
        8.0

    Source:
        D. MacKay, *Bayesian interpolation*, Neural Computation 4 (1992), section 4.
    """
    damping = _damping(damping, least="positive")
    function = f"x / (x + {damping:g})"
    return _trace(op, lambda x: x / (x + damping), function, -damping, **options)


def _damping(value: float, *, least: str) -> float:
    number = float(value)
    if not math.isfinite(number) or number < 0.0 or (number == 0.0 and least == "positive"):
        raise ValueError(f"expected a finite damping, {least}, got {value}")
    return number


def _trace(
    op: LinearOperator | Tensor,
    fn: Function,
    function: str,
    above: float | None,
    *,
    steps: int = 32,
    probes: int = 8,
    tolerance: float | None = None,
    max_products: int | None = None,
    law: str = "sphere",
    deflate: Eigenpairs | None = None,
    block: int | None = None,
    reorthogonalize: bool = True,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: float = 30.0,
    progress: Progress = None,
) -> FunctionTrace:
    op = require_symmetric(op, spread=True)
    require_counts(steps=(steps, 1), probes=(probes, 1))
    for name, count in (("max_products", max_products), ("block", block)):
        if count is not None:
            stopping.whole(name, count)
    if tolerance is not None and not (tolerance > 0.0 and math.isfinite(tolerance)):
        raise ValueError(f"expected a positive tolerance, got {tolerance}")
    stopping.one_of("law of probes", law, LAWS)
    values, removed = _outliers(op, deflate)
    if removed is not None and law != "sphere":
        raise ValueError("deflate= needs law='sphere', whose projection is unbiased")
    dimension = op.shape[0] - values.numel()
    if dimension == 0:
        raise ValueError("all eigenpairs are deflated: sum fn over them, nothing is left to probe")
    length = min(steps, dimension)
    if max_products is not None and max_products < length:
        raise ValueError(
            f"expected max_products >= {length}, which is one probe of {length} steps, got "
            f"{max_products}; pass fewer steps="
        )
    random = generator_of(generator, seed, op.device)
    plan = Plan(
        op=op,
        sums=Sums(
            fn=fn,
            function=function,
            above=above,
            outliers=values,
            dimension=dimension,
            operator=repr(op),
            eps=torch.finfo(op.dtype).eps,
            sphere=law == "sphere",
        ),
        length=length,
        probes=probes,
        block=min(block or 8, probes if tolerance is None else max(probes, 8)),
        tolerance=tolerance,
        budget=math.inf if max_products is None else max_products,
        law=law,
        full=reorthogonalize,
        removed=removed,
    )
    settings = {
        "steps": length,
        "probes": probes,
        "block": plan.block,
        "law": law,
        "deflate": values.numel(),
        "reorthogonalize": reorthogonalize,
        "tolerance": tolerance,
        "max_products": max_products,
        "seed": (seed or 0) if generator is None else "generator",
        "dtype": str(op.dtype).removeprefix("torch."),
        "device": op.device.type,
    }

    def problem() -> str:
        # Without a tolerance, the products do not depend on the function.
        parts = "" if removed is None else op.digest([removed.mT])
        parts += "" if tolerance is None else digest([_signature(fn)])
        return op.fingerprint() + parts

    state = run(
        lambda: function_state.first_state(plan, random),
        lambda state: function_state.next_state(plan, state),
        state_type=FunctionState,
        done=lambda state: function_state.finished(plan, state),
        report=lambda state: function_state.report(plan, state),
        title=f"function of {op.name}",
        checkpoint=checkpoint,
        problem=problem,
        settings=settings,
        device=op.device,
        save_every=save_every,
        progress=progress,
        group=op.group,
        spread=op.spread,
    )
    return _finish(plan, state, settings)


def _finish(plan: Plan, state: FunctionState, settings: dict[str, Any]) -> FunctionTrace:
    found = plan.sums.of(function_state.kept(state))
    converged = None
    if plan.tolerance is not None:
        converged = plan.met(found)
        if not converged:
            warnings.warn(
                f"the trace of {plan.sums.function} of {plan.op!r} did not reach tolerance "
                f"{plan.tolerance:g}: its relative standard error is "
                f"{stopping.relative(found.value, found.stderr):.2g} (more max_products= make it "
                "smaller), that of the quadrature "
                f"{stopping.relative(found.value, found.quadrature_error):.2g} (more steps=)",
                RuntimeWarning,
                stacklevel=4,
            )
    return FunctionTrace(
        value=found.value,
        stderr=found.stderr,
        interval=found.interval,
        quadrature_error=found.quadrature_error,
        samples=found.samples,
        exact=found.exact,
        nodes=found.nodes,
        weights=found.weights,
        clipped=found.clipped,
        converged=converged,
        products=state.products,
        function=plan.sums.function,
        method="stochastic Lanczos quadrature",
        name=plan.op.name,
        settings=settings,
    )


def _outliers(op: LinearOperator, deflate: Eigenpairs | None) -> tuple[Tensor, Tensor | None]:
    """Values ``[k]`` and vectors, as rows, of the eigenpairs that are counted exactly."""
    none = torch.zeros(0, dtype=torch.float64)
    if deflate is None:
        return none, None
    if not isinstance(deflate, Eigenpairs):
        raise TypeError(
            f"expected Eigenpairs for deflate, got {type(deflate).__name__}; "
            "curvlib.eigenpairs(op, k) finds the outliers"
        )
    keep = deflate.converged
    if not bool(keep.any()):
        return none, None
    columns = keep.nonzero()[:, 0].to(deflate.vectors.device)
    rows, _ = deflation_rows(op, deflate.vectors.mT[columns].mT)
    return deflate.values.double().cpu()[keep.cpu()], rows


def _signature(fn: Function) -> Tensor:
    """Values of a function, by which two functions are told apart."""
    return fn(torch.logspace(-9, 9, 73, dtype=torch.float64))
