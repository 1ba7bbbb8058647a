r"""Spectra of mini-batches beside that of all data.

The extreme eigenvalues and the spectral density of the Hessian (or GGN) of random mini-batches of
:math:`B` examples, those of the whole data, and what the two isotropic random-matrix models of
:mod:`curvlib.rates.spiked` predict for the batch: the additive one from the noise's variance
(:mod:`curvlib.rates.noise`), the multiplicative one from the trace, whose part outside of the
largest eigenvalue is taken as an even bulk.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvlib.core.minibatch import minibatches, require_batch_size
from curvlib.core.random import generator_of
from curvlib.core.result import Result, axes_or_new, unframed
from curvlib.core.risk import Risk
from curvlib.core.run import Progress, run
from curvlib.estimators import intervals, smoothing
from curvlib.estimators.arguments import require_counts
from curvlib.estimators.density import density
from curvlib.estimators.eigenpairs import eigenpairs
from curvlib.rates.arguments import (
    curvature,
    first_seed,
    mean_and_stderr,
    require_kind,
    require_risk,
)
from curvlib.rates.noise import hessian_noise
from curvlib.rates.spiked import additive, effective_batch, multiplicative

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, repr=False)
class BatchSpectrum(Result):
    r"""Spectra of mini-batches, and of all data.

    Attributes:
        top: Mean largest eigenvalue of a mini-batch.
        top_stderr: Its standard error over draws.
        bottom: Mean smallest eigenvalue.
        bottom_stderr: Its standard error.
        full_top: Largest eigenvalue of the whole data.
        full_bottom: Its smallest.
        additive_top: Predicted for the batch by isotropic additive noise.
        additive_bottom: Likewise, at the other end.
        multiplicative_top: Predicted for the batch as a sample covariance; NaN unless the kind is
            ``"ggn"``.
        variance: :math:`\sigma^2`, of an entry of one example's matrix.
        variance_stderr: Its standard error.
        trace: Trace, from the first moments of all spectra.
        trace_stderr: Its standard error.
        tops: Largest eigenvalue of each mini-batch, ``[draws]``.
        bottoms: Smallest, ``[draws]``.
        grid: Where the densities are evaluated, ``[points]``.
        density: Of mini-batches, the mean over draws, ``[points]``.
        density_stderr: Its standard error.
        full_density: Of the whole data, from one probe, ``[points]``.
        batch_size: :math:`B`.
        examples: :math:`N`.
        effective_batch: :math:`b = B / (1 - B / N)`.
        size: :math:`P`.
        products: Columns multiplied by matrices of mini-batches.
        full_products: Columns multiplied by that of the whole data.
        kind: ``"hessian"`` or ``"ggn"``.
        settings: The settings, by name.
    """

    top: float
    top_stderr: float
    bottom: float
    bottom_stderr: float
    full_top: float
    full_bottom: float
    additive_top: float
    additive_bottom: float
    multiplicative_top: float
    variance: float
    variance_stderr: float
    trace: float
    trace_stderr: float
    tops: Tensor
    bottoms: Tensor
    grid: Tensor
    density: Tensor
    density_stderr: Tensor
    full_density: Tensor
    batch_size: int
    examples: int
    effective_batch: float
    size: int
    products: int
    full_products: int
    kind: str
    settings: dict[str, Any]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Both densities on a logarithmic axis, with measured and predicted extremes.

        Args:
            ax: Where to draw; a new figure when omitted.

        Raises:
            ImportError: If matplotlib is absent.
        """
        ax = axes_or_new(ax)
        floor = 1e-3 / (self.size * float(self.grid[-1] - self.grid[0]))
        grid = self.grid.tolist()
        ax.fill_between(grid, floor, self.full_density.tolist(), color="0.8", lw=0)
        ax.plot(grid, self.full_density.tolist(), color="0.5", lw=1.0, label="all data")
        label = f"batches of {self.batch_size} (mean of {len(self.tops)})"
        ax.plot(grid, self.density.tolist(), color="C0", lw=1.4, label=label)
        additive_ends = [self.additive_bottom, self.additive_top]
        marks = [
            ("C0", "-", "batch extremes, measured", [self.bottom, self.top]),
            ("C3", "--", "isotropic additive noise", additive_ends),
        ]
        if self.kind == "ggn":
            marks.append(("C1", ":", "sample covariance", [self.multiplicative_top]))
        for color, style, words, places in marks:
            for i, place in enumerate(places):
                ax.axvline(place, color=color, ls=style, lw=1.2, label=words if i == 0 else None)
        ax.set_yscale("log")
        ax.set_ylim(bottom=floor)
        ax.set_xlabel(f"eigenvalue of the {'GGN' if self.kind == 'ggn' else 'Hessian'}")
        ax.set_ylabel("density")
        return unframed(ax)


@dataclass(frozen=True)
class SpectrumState:
    """State of a run: row 0 is that of the whole data, the others are mini-batches'."""

    base: int
    extremes: Tensor
    nodes: Tensor
    weights: Tensor
    residuals: Tensor
    products: Tensor


def batch_spectrum(
    risk: Risk,
    batch_size: int,
    draws: int = 8,
    *,
    kind: str = "hessian",
    steps: int = 32,
    tolerance: float = 1e-3,
    points: int = 512,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: float = 30.0,
    progress: Progress = None,
) -> BatchSpectrum:
    """Extreme eigenvalues and densities of mini-batches, beside those of the whole data.

    Args:
        risk: Model, loss, data and parameters: a mean over independent examples.
        batch_size: From 1 to ``N``.
        draws: Random mini-batches, 2 or more for standard errors.
        kind: ``"hessian"`` or ``"ggn"``.
        steps: Lanczos steps of each density, one probe each.
        tolerance: Of the extreme eigenvalues, relative to the norm.
        points: Of the grid.
        generator: Where mini-batches and probes come from, or
        seed: their seed. With neither, the seed is 0.
        checkpoint: A file to save to after a draw, and to continue from where it exists.
        save_every: Seconds between saves.
        progress: Whether to show a bar: see :data:`curvlib.core.run.Progress`.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If the batch size does not fit, the data has one example, or an argument is
            out of range.
        FloatingPointError: If a product is not finite.

    Example:
        >>> import torch, curvlib as cl
        >>> x, y = torch.randn(64, 3).double(), torch.randn(64, 1).double()
        >>> risk = cl.Risk(torch.nn.Linear(3, 1).double(), torch.nn.MSELoss(), (x, y))
        >>> found = batch_spectrum(risk, 8, progress=False)
        >>> found.bottom < found.full_bottom < found.full_top < found.top
        True
    """
    count = require_risk(risk)
    require_batch_size(batch_size, count)
    require_kind(kind)
    require_counts(draws=(draws, 1), steps=(steps, 1), points=(points, 32))
    random = generator_of(generator, seed)
    length = min(steps, risk.space.size)
    settings = {
        "batch_size": batch_size,
        "draws": draws,
        "kind": kind,
        "steps": length,
        "tolerance": tolerance,
        "points": points,
        "seed": (seed or 0) if generator is None else "generator",
    }

    def none(*shape: int) -> Tensor:
        return torch.zeros((0, *shape), dtype=torch.float64)

    state = run(
        lambda: SpectrumState(
            first_seed(random, None), none(2), none(length), none(length), none(length), none()
        ),
        lambda state: _next(risk, batch_size, kind, length, tolerance, state),
        state_type=SpectrumState,
        done=lambda state: len(state.extremes) > draws,
        report=lambda state: (len(state.extremes), draws + 1, ""),
        title=f"spectra of the {kind} of mini-batches",
        checkpoint=checkpoint,
        problem=risk.fingerprint,
        settings=settings,
        save_every=save_every,
        progress=progress,
        group=risk.group,
    )
    # any further randomness follows from the state, which a continued run shares
    noise = hessian_noise(risk, batch_size, kind=kind, seed=state.base, progress=False)
    return _finish(risk, state, noise.value, noise.stderr, count, settings)


def _next(
    risk: Risk, batch_size: int, kind: str, length: int, tolerance: float, state: SpectrumState
) -> SpectrumState:
    row = len(state.extremes)
    random = generator_of(None, state.base + row)
    part = risk if row == 0 else minibatches(risk, batch_size, 1, generator=random)[0]
    op = curvature(part, kind)
    seed = first_seed(random, None)
    spectrum = density(op, steps=length, probes=1, points=32, seed=seed, progress=False)
    both = min(2, op.shape[0])
    pairs = eigenpairs(
        op, both, which="BE", tolerance=tolerance, check=False, seed=seed, progress=False
    )
    ends = torch.stack([pairs.values.min(), pairs.values.max()])
    products = torch.tensor([spectrum.products + pairs.products], dtype=torch.float64)
    return replace(
        state,
        extremes=torch.cat([state.extremes, ends[None].cpu()]),
        nodes=torch.cat([state.nodes, spectrum.nodes.cpu()]),
        weights=torch.cat([state.weights, spectrum.weights.cpu()]),
        residuals=torch.cat([state.residuals, spectrum.residuals.cpu()]),
        products=torch.cat([state.products, products]),
    )


def _finish(
    risk: Risk,
    state: SpectrumState,
    variance: float,
    variance_stderr: float,
    count: int,
    settings: dict[str, Any],
) -> BatchSpectrum:
    size, kind, batch_size = risk.space.size, settings["kind"], settings["batch_size"]
    psd = kind == "ggn" and risk.loss.known
    low, high = (float(x) for x in state.extremes[0])
    bottoms, tops = state.extremes[1:, 0], state.extremes[1:, 1]
    traces = (state.weights * state.nodes).sum(1) * size
    trace, trace_stderr = mean_and_stderr(traces)
    grid = smoothing.even_grid(state.nodes, state.residuals, settings["points"], None, psd)
    widths = smoothing.kernel_widths(state.nodes, state.residuals, grid, None)
    curves = smoothing.smooth(grid, state.nodes, state.weights, widths, psd)
    mean, stderr = intervals.mean_and_stderr(curves[1:])
    b = effective_batch(batch_size, count)
    noise = max(variance, 0.0)
    bulk = max(trace - high, 0.0) / max(size - 1, 1)
    return BatchSpectrum(
        **_mean("top", tops),
        **_mean("bottom", bottoms),
        full_top=high,
        full_bottom=low,
        additive_top=additive(max(high, 0.0), noise, size, b),
        additive_bottom=additive(min(low, -0.0), noise, size, b),
        multiplicative_top=multiplicative(max(high, 0.0), bulk, size, b)
        if kind == "ggn"
        else float("nan"),
        variance=variance,
        variance_stderr=variance_stderr,
        trace=trace,
        trace_stderr=trace_stderr,
        tops=tops,
        bottoms=bottoms,
        grid=grid,
        density=mean,
        density_stderr=stderr,
        full_density=curves[0],
        batch_size=batch_size,
        examples=count,
        effective_batch=b,
        size=size,
        products=int(state.products[1:].sum()),
        full_products=int(state.products[0]),
        kind=kind,
        settings=settings,
    )


def _mean(name: str, samples: Tensor) -> dict[str, Any]:
    value, stderr = mean_and_stderr(samples)
    return {name: value, f"{name}_stderr": stderr}
