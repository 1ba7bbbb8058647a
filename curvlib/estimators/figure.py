r"""How a spectral density is drawn."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

from curvlib.core.result import unframed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from curvlib.estimators.density import Density


def plot_density(result: Density, ax: Axes, scale: str, linear: float | None) -> Axes:
    """Draws a density: see :meth:`curvlib.estimators.density.Density.plot`."""
    if scale not in ("linear", "symlog"):
        raise ValueError(f"expected scale='linear' or 'symlog', got {scale!r}")
    if scale == "linear":
        grid, density, stderr = result.grid, result.density, result.stderr
        floor = 0.1 / (result.size * float(grid[-1] - grid[0]))
    else:
        turn = result._turn() if linear is None else linear
        grid, density, stderr = result.on_symlog(linear=turn)
        floor = 0.1 / result.size
        ax.set_xscale("asinh", linear_width=2 * turn)
        ends = [float(grid[0]), float(grid[-1]), *result.outliers.tolist()]
        ticks = decades(min(ends), max(ends), 2 * turn)
        ax.set_xticks([at for at, _ in ticks], [label for _, label in ticks])
        ax.set_xticks([], minor=True)
    top = float(density.max())
    floor = max(floor, 1e-12 * top)
    ax.set_yscale("log")
    ax.plot(grid, density.clamp_min(0.1 * floor), color="C0", lw=1.4, label=_legend(result))
    if not math.isnan(float(stderr[0])):
        low = (density - stderr).clamp_min(0.1 * floor)
        ax.fill_between(
            grid, low, density + stderr, color="C0", alpha=0.25, lw=0, label="± standard error"
        )
    if result.outliers.numel():
        _mark_outliers(result.outliers, ax)
    ax.set_ylim(floor, top * (top / floor) ** 0.35)  # room for the legend
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel("density" if scale == "linear" else "density per decade")
    return unframed(ax, loc="upper right")


def _mark_outliers(values: Tensor, ax: Axes) -> None:
    # Marks in the axis's own height: an outlier has a mass, not a density.
    transform = ax.get_xaxis_transform()
    ax.vlines(values.tolist(), 0.0, 0.06, color="C3", lw=1.2, transform=transform)
    ax.plot(
        values.tolist(),
        [0.06] * values.numel(),
        ls="",
        marker="v",
        ms=5,
        color="C3",
        transform=transform,
        label=f"{values.numel()} outlier{'s' if values.numel() > 1 else ''}, exact",
    )


def _legend(result: Density) -> str:
    settings = result.settings
    return (
        f"{result.name}, P = {result.size:,}\n"
        f"{settings['probes']} probe{'s' if settings['probes'] > 1 else ''} × "
        f"{settings['steps']} Lanczos steps"
    )


def decades(low: float, high: float, turn: float) -> list[tuple[float, str]]:
    """Ticks at zero and at powers of ten beyond ``turn``, about five on the longer side."""
    first = math.ceil(math.log10(turn))
    last = math.floor(math.log10(max(high, -low, 10.0 * turn)))
    stride = max(1, math.ceil((last - first + 1) / 5))
    ticks = [(0.0, "0")]
    for exponent in range(last, first - 1, -stride):
        for sign, mark in ((1.0, ""), (-1.0, "-")):
            at = sign * 10.0**exponent
            if low <= at <= high:
                ticks.append((at, f"${mark}10^{{{exponent}}}$"))
    return sorted(ticks)
