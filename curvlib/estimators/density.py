r"""The spectral density of a symmetric operator, with standard errors."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvlib.core.operator import LinearOperator
from curvlib.core.result import Result, axes_or_new
from curvlib.core.run import Progress, run
from curvlib.estimators import intervals, quadrature, smoothing
from curvlib.estimators.arguments import require_counts
from curvlib.estimators.eigenpairs import Eigenpairs, deflation_rows, require_symmetric
from curvlib.estimators.probes import generator_of
from curvlib.estimators.quadrature import QuadratureState

if TYPE_CHECKING:
    from matplotlib.axes import Axes


#: Bytes of Lanczos vectors up to which a density keeps all of them unless told otherwise.
BASIS_BYTES = 2**28


@dataclass(frozen=True, eq=False, repr=False)
class Density(Result):
    r"""A spectral density: exact outliers, and a statistical bulk.

    The distribution of all ``size`` eigenvalues has mass 1: ``1 / size`` at each outlier, and
    the rest in the bulk. ``density`` is that of the bulk; it integrates to its mass.

    Attributes:
        grid: Where the density is evaluated, ``[points]``, covering the bulk.
        density: Of the bulk, the mean over probes, ``[points]``.
        stderr: Its standard error over probes, ``[points]``; NaN with one probe.
        cdf: Share of eigenvalues up to each grid point, outliers included, ``[points]``.
        nodes: Quadrature nodes of each probe, ascending, ``[probes, steps]``.
        weights: Their weights, ``[probes, steps]``; each row sums to the bulk's mass.
        residuals: How far an eigenvalue is at most from each node, ``[probes, steps]``.
        outliers: Deflated eigenvalues, ``[k]``.
        outlier_residuals: Their residuals, ``[k]``.
        trace: Sum of the eigenvalues (from the first moment, which the quadrature has exactly).
        trace_stderr: Its standard error; NaN with one probe.
        mass_near_zero: Share of eigenvalues with absolute value at most ``near_zero``. Where that
            is finer than the quadrature's nodes near zero lie, it grows with ``steps``.
        mass_near_zero_stderr: Its standard error over probes (not over steps); NaN with one probe.
        near_zero: What counts as near zero.
        norm: Largest absolute node or outlier.
        size: Number of eigenvalues.
        psd: Whether the operator is known to have no negative eigenvalue; the kernels are then
            reflected at zero.
        products: How many columns the operator multiplied.
        name: What was measured.
        settings: The settings, by name.
    """

    grid: Tensor
    density: Tensor
    stderr: Tensor
    cdf: Tensor
    nodes: Tensor
    weights: Tensor
    residuals: Tensor
    outliers: Tensor
    outlier_residuals: Tensor
    trace: float
    trace_stderr: float
    mass_near_zero: float
    mass_near_zero_stderr: float
    near_zero: float
    norm: float
    size: int
    psd: bool
    products: int
    name: str
    settings: dict[str, Any]

    def on(self, grid: Tensor, width: float | None = None) -> tuple[Tensor, Tensor]:
        """The bulk's density and its standard error on another grid.

        Args:
            grid: Increasing points, ``[n]``.
            width: Of the Gaussian kernels; when omitted, each node's residual, but no less than
                the grid's spacing there.

        Returns:
            Density and standard error, each ``[n]``; the second is NaN with one probe.

        Raises:
            ValueError: If the grid is not increasing or the width not positive.
        """
        grid = torch.as_tensor(grid, dtype=torch.float64)
        if grid.ndim != 1 or grid.numel() < 2 or not bool((grid.diff() > 0).all()):
            raise ValueError("expected a grid of at least two increasing points")
        widths = smoothing.kernel_widths(self.nodes, self.residuals, grid, width)
        return intervals.mean_and_stderr(
            smoothing.smooth(grid, self.nodes, self.weights, widths, self.psd)
        )

    def on_symlog(
        self, points: int = 1024, linear: float | None = None, resolution: float = 0.05
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""The bulk's density per decade, on an axis that is linear near zero and logarithmic away.

        The axis is :math:`u = \mathrm{asinh}(\lambda / 2 t) / \ln 10`; one unit of it is one
        decade of :math:`|\lambda|` where :math:`|\lambda| \gg t`.

        Args:
            points: Number of grid points.
            linear: Where the axis turns linear, ``t``. When omitted, what nine tenths of the
                eigenvalues exceed, within eight and two decades below the norm.
            resolution: Least width of the kernels, in decades: nodes that are known better are
                not drawn as spikes.

        Returns:
            Grid of eigenvalues, density per decade and its standard error, each ``[points]``.

        Raises:
            ValueError: If ``linear`` or ``resolution`` is not positive.
        """
        t = self._turn() if linear is None else float(linear)
        if not (t > 0.0 and math.isfinite(t)):
            raise ValueError(f"expected a positive linear=, got {linear}")
        if not (resolution > 0.0 and math.isfinite(resolution)):
            raise ValueError(f"expected a positive resolution=, got {resolution}")
        low, high = (math.asinh(float(self.grid[i]) / (2 * t)) for i in (0, -1))
        reach = smoothing.REACH * resolution * math.log(10.0)
        low, high = (max(low - reach, 0.0) if self.psd else low - reach), high + reach
        grid = 2 * t * torch.linspace(low, high, points, dtype=torch.float64).sinh()

        def decade(at: Tensor) -> Tensor:
            return math.log(10.0) * (at.square() + 4 * t * t).sqrt()

        widths = smoothing.kernel_widths(self.nodes, self.residuals, grid, None)
        widths = torch.maximum(widths, resolution * decade(self.nodes))
        density, stderr = intervals.mean_and_stderr(
            smoothing.smooth(grid, self.nodes, self.weights, widths, self.psd)
        )
        return grid, density * decade(grid), stderr * decade(grid)

    def mass(self, low: float = -math.inf, high: float = math.inf) -> tuple[float, float]:
        """Share of eigenvalues between ``low`` and ``high``, and its standard error over probes."""
        bulk = smoothing.mass_between(self.nodes, self.weights, self.residuals, low, high)
        inside = int(((self.outliers >= low) & (self.outliers <= high)).sum())
        value, stderr = intervals.mean_and_stderr(bulk[:, None])
        return float(value[0]) + inside / self.size, float(stderr[0])

    def plot(
        self, ax: Axes | None = None, *, scale: str = "linear", linear: float | None = None
    ) -> Axes:
        """The density on a logarithmic axis, with a band of standard errors, outliers marked.

        Args:
            ax: Where to draw; a new figure when omitted.
            scale: Of the eigenvalues: ``"linear"``, or ``"symlog"`` for a density per decade.
            linear: Where the symlog axis turns linear: see :meth:`on_symlog`.

        Raises:
            ImportError: If matplotlib is absent.
            ValueError: If the scale is unknown.
        """
        from curvlib.estimators.figure import plot_density

        return plot_density(self, axes_or_new(ax), scale, linear)

    def _turn(self) -> float:
        seen = torch.maximum(self.nodes.abs(), self.residuals).flatten()
        order = seen.argsort()
        mass = self.weights.flatten()[order].cumsum(0)
        at = int((mass < 0.1 * mass[-1]).sum())
        norm = self.norm or 1.0
        return min(max(float(seen[order][at]), 1e-8 * norm), 1e-2 * norm)


def density(
    op: LinearOperator | Tensor,
    *,
    steps: int = 64,
    probes: int = 2,
    law: str = "sphere",
    deflate: Eigenpairs | None = None,
    points: int = 1024,
    width: float | None = None,
    near_zero: float | None = None,
    reorthogonalize: bool | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: float = 30.0,
    progress: Progress = None,
) -> Density:
    r"""The spectral density, by stochastic Lanczos quadrature in ``steps * probes`` products.

    All probes advance together: a step is one block product. The range comes from the recurrences
    themselves and costs no product. For large operators one probe already sees the density well
    (the error falls with the number of eigenvalues), so spend products on steps, which sharpen
    it, and use two or more probes for standard errors.

    Each node is drawn as a Gaussian as wide as its residual, within which there is an
    eigenvalue: outliers that Lanczos has found come out sharp, the bulk smooth.

    Args:
        op: A symmetric operator, or a dense symmetric matrix.
        steps: Lanczos steps, at most P; a probe stops earlier in an invariant subspace.
        probes: Random vectors.
        law: ``"sphere"``, or ``"rademacher"`` (exact trace of diagonal operators).
        deflate: Eigenpairs that are counted exactly, such as the outliers; the bulk is then that
            of the complement. Pairs that have not converged are not used.
        points: Points of the grid.
        width: Of the Gaussian kernels, when all shall have the same.
        near_zero: What ``mass_near_zero`` counts; a thousandth of the norm when omitted.
        reorthogonalize: Keeps all Lanczos vectors (``steps * probes * P`` numbers) and the
            recurrences free of ghosts. ``False`` keeps three vectors for each probe; ghosts then
            split weights between copies of a node, which leaves the density as it is. When
            omitted, all are kept where they take at most 256 MiB: beyond that, reading them
            costs as much as a product of a small batch.
        generator: Where the probes come from, or
        seed: their seed. With neither, the seed is 0.
        checkpoint: A file to save to, and to continue from where it exists.
        save_every: Seconds between saves.
        progress: Whether to show a bar: see :data:`curvlib.core.run.Progress`.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If the operator is not symmetric, or an argument does not fit.
        FloatingPointError: If a product is not finite.

    Example:
        >>> A = torch.diag(torch.linspace(0.0, 2.0, 200, dtype=torch.float64))
        >>> spectrum = density(A, steps=20, probes=4)
        >>> spectrum.products
        80
        >>> bool(abs(spectrum.trace - 200.0) < 4 * spectrum.trace_stderr)
        True

    Source:
        L. Lin, Y. Saad and C. Yang, *Approximating spectral densities of large matrices*, SIAM
        Review 58 (2016), section 3.2; S. Ubaru, J. Chen and Y. Saad, *Fast estimation of tr(f(A))
        via stochastic Lanczos quadrature*, SIAM J. Matrix Anal. Appl. 38 (2017).
    """
    op = require_symmetric(op, spread=True)
    require_counts(steps=(steps, 1), probes=(probes, 1), points=(points, 32))
    if law not in ("sphere", "rademacher"):
        raise ValueError(f"expected law='sphere' or 'rademacher', got {law!r}")
    for name, limit in (("width", width), ("near_zero", near_zero)):
        if limit is not None and not (limit > 0.0 and math.isfinite(limit)):
            raise ValueError(f"expected a positive number for {name}, got {limit}")
    outliers = _converged(deflate)
    removed, _ = deflation_rows(op, outliers)
    dimension = op.shape[0] - (0 if removed is None else removed.shape[0])
    if dimension == 0:
        raise ValueError("all eigenpairs are deflated: there is no bulk whose density to estimate")
    length = min(steps, dimension)
    held = length * probes * -(-op.shape[0] // op.holders) * (torch.finfo(op.dtype).bits // 8)
    full = held <= BASIS_BYTES if reorthogonalize is None else reorthogonalize
    settings = {
        "steps": length,
        "probes": probes,
        "law": law,
        "deflate": op.shape[0] - dimension,
        "reorthogonalize": full,
        "seed": (seed or 0) if generator is None else "generator",
        "dtype": str(op.dtype).removeprefix("torch."),
        "device": op.device.type,
    }
    random = generator_of(generator, seed, op.device)
    state = run(
        lambda: quadrature.first_state(
            op,
            length,
            probes,
            slots=length if full else 3,
            law=law,
            deflate=removed,
            generator=random,
        ),
        lambda state: quadrature.next_state(op, state, deflate=removed, full=full),
        state_type=QuadratureState,
        done=lambda state: state.step == length or not state.active,
        report=lambda state: (state.step, length, ""),
        title=f"density of {op.name}",
        checkpoint=checkpoint,
        problem=lambda: op.fingerprint() + ("" if removed is None else op.digest([removed.mT])),
        settings=settings,
        device=op.device,
        save_every=save_every,
        progress=progress,
        group=op.group,
        spread=op.spread,
    )
    kept = {"points": points, "width": width, **settings}
    return _finish(op, state, outliers, kept, near_zero)


def _finish(
    op: LinearOperator,
    state: QuadratureState,
    outliers: Eigenpairs | None,
    settings: dict[str, Any],
    near_zero: float | None,
) -> Density:
    nodes, weights, residuals = quadrature.quadrature(state)
    size = op.shape[0]
    none = torch.zeros(0, dtype=torch.float64)
    exact = none if outliers is None else outliers.values.double().cpu()
    exact_residuals = none if outliers is None else outliers.residuals.double().cpu()
    bulk = (size - exact.numel()) / size
    weights = weights * bulk
    norm = float(torch.cat([nodes.abs().flatten(), exact.abs()]).max())
    near_zero = 1e-3 * norm if near_zero is None else float(near_zero)
    grid = smoothing.even_grid(nodes, residuals, settings["points"], settings["width"], op.psd)
    widths = smoothing.kernel_widths(nodes, residuals, grid, settings["width"])
    smooth, stderr = intervals.mean_and_stderr(
        smoothing.smooth(grid, nodes, weights, widths, op.psd)
    )
    steps = (exact[None, :] <= grid[:, None]).sum(1).double() / size
    shares = smoothing.mass_between(nodes, weights, residuals, -near_zero, near_zero)
    near, near_stderr = intervals.mean_and_stderr(shares[:, None])
    moments, moments_stderr = intervals.mean_and_stderr(
        (weights * nodes).sum(1, keepdim=True) * size
    )
    return Density(
        grid=grid,
        density=smooth,
        stderr=stderr,
        cdf=smoothing.cumulative(grid, nodes, weights, widths, op.psd) + steps,
        nodes=nodes,
        weights=weights,
        residuals=residuals,
        outliers=exact,
        outlier_residuals=exact_residuals,
        trace=float(moments[0] + exact.sum()),
        trace_stderr=float(moments_stderr[0]),
        mass_near_zero=float(near[0]) + int((exact.abs() <= near_zero).sum()) / size,
        mass_near_zero_stderr=float(near_stderr[0]),
        near_zero=near_zero,
        norm=norm,
        size=size,
        psd=op.psd,
        products=state.products,
        name=op.name,
        settings=settings,
    )


def _converged(deflate: Eigenpairs | None) -> Eigenpairs | None:
    if deflate is None:
        return None
    if not isinstance(deflate, Eigenpairs):
        raise TypeError(
            f"expected Eigenpairs for deflate, got {type(deflate).__name__}; "
            "curvlib.eigenpairs(op, k) finds the outliers"
        )
    keep = deflate.converged
    if not bool(keep.any()):
        return None
    changed = {n: getattr(deflate, n)[keep] for n in ("values", "residuals", "converged")}
    columns = keep.nonzero()[:, 0].to(deflate.vectors.device)
    vectors = deflate.vectors if bool(keep.all()) else deflate.vectors.mT[columns].mT
    return Eigenpairs(
        vectors=vectors,
        norm=deflate.norm,
        products=deflate.products,
        name=deflate.name,
        settings=deflate.settings,
        **changed,
    )
