r"""Eigenpairs at the ends of a symmetric operator's spectrum."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from curvlib.core.operator import LinearOperator, as_operator
from curvlib.core.result import Result, axes_or_new, unframed
from curvlib.core.run import Progress, Report, run
from curvlib.estimators import krylov_state, thick_restart
from curvlib.estimators.krylov_state import KrylovState, Plan
from curvlib.estimators.probes import generator_of
from curvlib.estimators.rows import finite_everywhere, summed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Which eigenvalues: largest, smallest, largest absolute ones, and from both ends.
WHICH = ("LA", "SA", "LM", "BE")


@dataclass(frozen=True, eq=False, repr=False)
class Eigenpairs(Result):
    r"""Eigenvalues and eigenvectors, with measured residuals.

    By Weyl's and Temple's bounds there is an eigenvalue of the operator within ``residuals[i]``
    of ``values[i]``; the error is the residual's square over the gap where that is smaller.

    Attributes:
        values: Eigenvalues, ``[k]``, float64.
        vectors: Orthonormal eigenvectors, ``[P, k]``, column-contiguous; this rank's rows where
            parameters are sharded (``op.space.gather`` makes them whole).
        residuals: :math:`\|A v_i - \lambda_i v_i\|`, measured by products, ``[k]``, float64.
        converged: Whether the residual is at most ``tolerance * norm``, ``[k]``.
        norm: Largest absolute Ritz value: a lower bound of :math:`\|A\|_2`, in practice tight.
        products: How many columns the operator multiplied.
        name: What was measured.
        settings: The settings, by name.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: Tensor
    norm: float
    products: int
    name: str
    settings: dict[str, Any]

    def plot(self, ax: Axes | None = None) -> Axes:
        """A stem plot of the eigenvalues, with bars for residuals where they can be seen.

        Args:
            ax: Where to draw; a new figure when omitted.

        Raises:
            ImportError: If matplotlib is absent.
        """
        ax = axes_or_new(ax)
        values = self.values.tolist()
        index = range(1, len(values) + 1)
        done = self.converged.tolist()
        for keep, style in ((True, "C0"), (False, "C3")):
            chosen = [i for i, c in enumerate(done) if c == keep]
            if not chosen:
                continue
            ax.vlines(
                [i + 1 for i in chosen], 0.0, [values[i] for i in chosen], color=style, lw=1.4
            )
            ax.errorbar(
                [i + 1 for i in chosen],
                [values[i] for i in chosen],
                yerr=[float(self.residuals[i]) for i in chosen],
                fmt="o",
                ms=4.5,
                color=style,
                mfc=style if keep else "white",
                capsize=2.5,
                elinewidth=1.0,
                label=self._legend() if keep else "not converged (bar: residual)",
            )
        ax.axhline(0.0, color="0.3", lw=0.8, zorder=0)
        ax.set_xticks(list(index)[:: max(1, len(values) // 12)])
        ax.set_xlabel("index")
        ax.set_ylabel("eigenvalue")
        low, high = ax.get_ylim()
        ax.set_ylim(low, high + 0.28 * (high - low))  # room for the legend above the stems
        return unframed(ax, loc="upper right")

    def _legend(self) -> str:
        ends = {"LA": "largest", "SA": "smallest", "LM": "largest |λ|", "BE": "both ends"}
        worst = float(self.residuals[self.converged].max()) if bool(self.converged.any()) else 0.0
        return (
            f"{self.name}, P = {self.vectors.shape[0]:,}: {self.values.numel()} "
            f"{ends[self.settings['which']]}\n"
            f"residuals ≤ {worst:.1e}, {self.products} products"
        )


def eigenpairs(
    op: LinearOperator | Tensor,
    k: int = 6,
    *,
    which: str = "LA",
    tolerance: float | None = None,
    max_products: int | None = None,
    basis: int | None = None,
    block: int = 1,
    check: bool = True,
    start: Eigenpairs | Tensor | None = None,
    deflate: Eigenpairs | Tensor | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: float = 30.0,
    progress: Progress = None,
) -> Eigenpairs:
    r"""The ``k`` eigenpairs at an end of the spectrum, by thick-restart block Lanczos.

    The basis is fully re-orthogonalized, so that there are no ghosts, and lives on the
    operator's device in one buffer of ``basis`` vectors. Lanczos from ``b`` vectors finds at
    most ``b`` copies of a repeated eigenvalue; so when the wanted pairs have converged, a random
    vector orthogonal to them is followed until it would have shown a missed copy with
    probability 0.99, for at most as many products as were used before. At the end each residual
    is measured by a product.

    Args:
        op: A symmetric operator, or a dense symmetric matrix.
        k: How many, 1 to P.
        which: ``"LA"`` largest (descending), ``"SA"`` smallest (ascending), ``"LM"`` largest
            absolute values (by absolute value, descending), ``"BE"`` half from each end, one
            more from the high end where ``k`` is odd (ascending, as in SciPy).
        tolerance: A pair has converged when its residual is at most this times the norm of the
            operator - never times the eigenvalue, which may be zero. The square root of the
            machine epsilon when omitted: 3e-4 in float32, 1.5e-8 in float64.
        max_products: Stop after so many products, with what there is.
        basis: Vectors in the buffer, at least ``k + 2 * block`` and ``k + 3``. With more, fewer
            products are needed.
        block: Vectors multiplied at a time. Above 1, products cost less each, more are needed,
            and repeated eigenvalues are found without a check.
        check: Whether to look for missed copies (the other option is faster).
        start: Vectors ``[P, j]`` to start from, such as eigenvectors at an earlier point of
            training; the block has at least as many.
        deflate: Pairs to leave out, or orthonormal vectors ``[P, d]``: the eigenpairs of
            :math:`(I - D D^\top) A (I - D D^\top)` in the complement are returned.
        generator: Where random vectors come from, or
        seed: their seed. With neither, the seed is 0.
        checkpoint: A file to save to, and to continue from where it exists.
        save_every: Seconds between saves.
        progress: Whether to show a bar: see :data:`curvlib.core.run.Progress`.

    Returns:
        The pairs. Those that did not converge are marked, and a ``RuntimeWarning`` says why.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If the operator is not symmetric, or an argument does not fit.
        FloatingPointError: If a product is not finite.

    Example:
        >>> pairs = eigenpairs(torch.diag(torch.tensor([3.0, 3.0, 1.0, 0.0])).double(), 2)
        >>> [round(v, 6) for v in pairs.values.tolist()]
        [3.0, 3.0]
        >>> bool(pairs.converged.all())
        True

    Source:
        K. Wu and H. Simon, *Thick-restart Lanczos method for large symmetric eigenvalue
        problems*, SIAM J. Matrix Anal. Appl. 22 (2000), algorithm 3.
    """
    op = require_symmetric(op, spread=True)
    n = op.shape[0]
    removed, removed_norm = deflation_rows(op, deflate)
    dimension = n - (0 if removed is None else removed.shape[0])
    first = _start_columns(op, start)
    _require_int("k", k)
    _require_int("block", block)
    if not 1 <= k <= dimension:
        left = f" minus {n - dimension} deflated" if dimension < n else ""
        raise ValueError(f"expected 1 <= k <= {dimension} (the operator's size{left}), got k={k}")
    if which not in WHICH:
        raise ValueError(f"unknown which={which!r}; there are {', '.join(WHICH)}")
    if block < 1:
        raise ValueError(f"expected block >= 1, got {block}")
    eps = torch.finfo(op.dtype).eps
    tolerance = math.sqrt(eps) if tolerance is None else float(tolerance)
    if not 0.0 < tolerance < 1.0:
        raise ValueError(
            f"expected 0 < tolerance < 1 (relative to the operator's norm), got {tolerance}"
        )
    width = min(dimension, max(block, 0 if first is None else first.shape[1]))
    least = min(k + max(2 * width, 3), dimension + width)
    if basis is not None:
        _require_int("basis", basis)
    if basis is not None and basis < least:
        raise ValueError(
            f"expected basis >= {least} (k + 2 * block, at least k + 3; the block has {width}), "
            f"got {basis}"
        )
    if max_products is not None and max_products < 2 * k + width:
        raise ValueError(
            f"expected max_products >= {2 * k + width} (k to span the pairs, k to measure their "
            f"residuals, and a block), got {max_products}"
        )
    plan = Plan(
        op=op,
        k=k,
        which="LA" if which == "LM" and op.psd else which,
        tolerance=tolerance,
        block=width,
        check=check,
        warm=first is not None,
        budget=math.inf if max_products is None else max_products,
        deflate=removed,
        deflated_norm=removed_norm,
    )
    rows = buffer_size(k, width, dimension, basis)
    settings = {
        "k": k,
        "which": which,
        "tolerance": tolerance,
        "basis": rows,
        "block": block,
        "check": check,
        "start": None if first is None else first.shape[1],
        "deflate": 0 if removed is None else removed.shape[0],
        "seed": (seed or 0) if generator is None else "generator",
        "dtype": str(op.dtype).removeprefix("torch."),
        "device": op.device.type,
    }
    random = generator_of(generator, seed, op.device)
    given = [t for t in (first, None if removed is None else removed.mT) if t is not None]
    state = run(
        lambda: krylov_state.first_state(plan, rows, first, random),
        lambda state: thick_restart.next_state(plan, state),
        state_type=KrylovState,
        done=lambda state: thick_restart.is_done(plan, state),
        report=lambda state: _report(plan, state),
        title=f"eigenpairs of {op.name}",
        checkpoint=checkpoint,
        problem=lambda: f"{op.fingerprint()} {op.digest(given)}",
        settings=settings,
        device=op.device,
        save_every=save_every,
        progress=progress,
        group=op.group,
        spread=op.spread,
    )
    return _finish(plan, state, settings)


def buffer_size(k: int, width: int, dimension: int, basis: int | None) -> int:
    """Vectors in the buffer for ``k`` pairs and blocks of ``width``, in a space of a dimension."""
    return min(2 * k + 16 + 4 * width if basis is None else basis, dimension + width)


def _finish(plan: Plan, state: KrylovState, settings: dict[str, Any]) -> Eigenpairs:
    order = krylov_state.result_order(state.values, settings["which"])
    scale = state.scale or 1.0
    limit = plan.tolerance * state.norm
    converged = state.residuals <= limit
    missing = int((~converged).sum())
    if missing:
        ways = {
            "budget": "pass a larger max_products= (with checkpoint= the run continues)",
            "precision": (
                f"the products' own accuracy does not allow it in {settings['dtype']}: pass a "
                "larger tolerance=, or use float64"
            ),
        }
        warnings.warn(
            f"{missing} of {plan.k} eigenpairs of {plan.op.name} did not converge after "
            f"{state.products} products: the largest residual is "
            f"{float(state.residuals.max()) * scale:.1e}, the limit {limit * scale:.1e}; "
            f"{ways[state.reason]}",
            RuntimeWarning,
            stacklevel=3,
        )
    vectors = torch.empty((plan.k, plan.op.length), dtype=plan.op.dtype, device=plan.op.device)
    for target, source in enumerate(order.tolist()):
        vectors[target].copy_(state.rows[source])
    return Eigenpairs(
        values=state.values[order] * scale,
        vectors=vectors.mT,
        residuals=state.residuals[order] * scale,
        converged=converged[order],
        norm=state.norm * scale,
        products=state.products,
        name=plan.op.name,
        settings=settings,
    )


def _report(plan: Plan, state: KrylovState) -> Report:
    if state.phase != "expand":
        notes = {"check": "looking for missed copies", "verify": "measuring residuals", "done": ""}
        extra = plan.k if state.phase == "check" else plan.k - state.verified
        return state.products, state.products + extra, notes[state.phase]
    if state.residuals.numel() == 0 or state.norm == 0.0:
        return state.products, None, ""
    relative = (state.residuals / state.norm).clamp(1e-16, 1.0)
    aim = thick_restart.SAFETY * plan.tolerance
    share = float((relative.log() / math.log(aim)).clamp(max=1.0).mean())
    total = None if share < 0.05 else min(plan.budget, round(state.products / share) + plan.k)
    count = int((relative <= aim).sum())
    return state.products, total, f"{count}/{plan.k} converged, residual {relative.max():.0e} ‖A‖"


def require_symmetric(op: LinearOperator | Tensor, *, spread: bool = False) -> LinearOperator:
    """A symmetric operator, from an operator or a matrix.

    Args:
        op: The operator or matrix.
        spread: Whether the caller follows vectors that are spread over processes.

    Raises:
        ValueError: If it is not square or not known to be symmetric.
    """
    op = as_operator(op, spread=spread)
    if op.shape[0] != op.shape[1]:
        raise ValueError(f"expected a square operator, got shape {op.shape}")
    if not op.symmetric:
        raise ValueError(
            f"expected a symmetric operator, got {op!r}; pass symmetric=True when you build it if "
            "it is, or use (A + A.T) * 0.5"
        )
    if op.shape[0] == 0:
        raise ValueError("the operator is empty (0 x 0): it has no spectrum")
    return op


def deflation_rows(
    op: LinearOperator, deflate: Eigenpairs | Tensor | None
) -> tuple[Tensor | None, float]:
    """Orthonormal rows ``[d, P]`` to leave out, and the largest absolute value that goes with them.

    Raises:
        TypeError: If ``deflate`` is neither eigenpairs nor a tensor of the operator's type.
        ValueError: If its shape or device does not fit, or its columns are not orthonormal.
    """
    if deflate is None:
        return None, 0.0
    columns = _columns_of(op, deflate, "deflate")
    gram = summed((columns.mT @ columns).double().cpu(), op.spread)
    error = float((gram - torch.eye(len(gram), dtype=torch.float64)).abs().max())
    if not error <= 10 * math.sqrt(torch.finfo(op.dtype).eps):
        raise ValueError(
            f"expected orthonormal columns in deflate=, but V.T @ V is off by {error:.1e}; "
            "use torch.linalg.qr(V).Q"
        )
    rows = columns.mT.contiguous()
    known = isinstance(deflate, Eigenpairs)
    return rows, float(deflate.values.abs().max()) if known else 0.0  # type: ignore[union-attr]


def _start_columns(op: LinearOperator, start: Eigenpairs | Tensor | None) -> Tensor | None:
    if start is None:
        return None
    columns = _columns_of(op, start, "start")
    if not finite_everywhere(columns, op.spread):
        raise ValueError("expected finite numbers in start=, got NaN or infinity")
    return columns


def _columns_of(op: LinearOperator, columns: Any, name: str) -> Tensor:
    n, most = op.length, op.shape[0]
    if isinstance(columns, Eigenpairs):
        columns = columns.vectors.to(op.device)  # loaded results are on the CPU
    if not isinstance(columns, Tensor):
        raise TypeError(
            f"{name}= takes Eigenpairs or a tensor [{n}, j], got {type(columns).__name__}"
        )
    if columns.ndim == 1:
        columns = columns[:, None]
    if columns.ndim != 2 or columns.shape[0] != n or not 1 <= columns.shape[1] <= most:
        raise ValueError(
            f"expected {name}= of shape [{n}, j] with 1 <= j <= {most}, got {list(columns.shape)}"
        )
    if columns.dtype != op.dtype or columns.device != op.device:
        raise TypeError(
            f"expected {name}= in {op.dtype} on {op.device}, got {columns.dtype} on "
            f"{columns.device}; use .to(...)"
        )
    return cast("Tensor", columns.detach())


def _require_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected an int for {name}, got {type(value).__name__}")
