"""Figures for papers: readable in one column, in print, and without colour vision."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curvlib.core.files import atomic_write
from curvlib.estimators.density import Density
from curvlib.estimators.eigenpairs import Eigenpairs
from curvlib.estimators.figure import decades

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Okabe and Ito's colours, which people without full colour vision tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7")
STYLE: dict[str, Any] = {
    "font.size": 8.0,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8.0,
    "legend.fontsize": 7.0,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.2,
    "figure.dpi": 200,
    "pdf.fonttype": 42,  # text stays text
    "svg.fonttype": "none",
}


def style() -> dict[str, Any]:
    """Settings of matplotlib for all figures."""
    from matplotlib import cycler

    return {**STYLE, "axes.prop_cycle": cycler(color=COLOURS)}


@contextlib.contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    """A figure of a size in inches, to be drawn in the style of all figures.

    Raises:
        ImportError: If matplotlib is absent.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'curvlib[plot]'") from error
    with mpl.rc_context(style()):
        yield Figure(figsize=(width, height), layout="constrained")


def spectrum_figure(
    eigenpairs: Eigenpairs, density: Density, *, title: str = "", examples: int | None = None
) -> Figure:
    """Density and extreme eigenvalues, side by side, and what was measured below.

    Args:
        eigenpairs: The extreme eigenvalues.
        density: The spectral density.
        title: What they belong to.
        examples: ``N``, where known.

    Raises:
        ImportError: If matplotlib is absent.
    """
    with new_figure(7.0, 2.9) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1.35, 1.0))
        density.plot(left, scale="symlog")
        eigenpairs.plot(right)
        heading = [title] if title else []
        if examples is not None:
            heading.append(f"N = {examples:,} examples")
        heading.append(f"trace {with_error(density.trace, density.trace_stderr)}")
        figure.suptitle("   |   ".join(heading), size=8.5, x=0.01, ha="left")
    return figure


def layers_figure(
    rows: Sequence[tuple[str, int, float, float]], *, label: str, heading: list[str], note: str
) -> Figure:
    """A bar for each layer, with its standard error, in the order of the model.

    The axis is linear; where bars differ by more than two decades, it turns logarithmic away from
    zero, so that small layers can be read, too.

    Args:
        rows: Name, number of parameters, value and standard error of each layer.
        label: What the bars show.
        heading: What they belong to, in parts.
        note: How they were estimated.

    Raises:
        ImportError: If matplotlib is absent.
    """
    names = [f"{name}  ({parameters:,})" for name, parameters, _, _ in rows]
    values = [value for _, _, value, _ in rows]
    errors = [stderr if stderr > 0.0 else 0.0 for _, _, _, stderr in rows]
    at = list(range(len(rows)))
    with new_figure(7.0, 1.25 + 0.24 * len(rows)) as figure:
        ax = figure.subplots()
        ax.barh(at, values, height=0.68, color=COLOURS[0], alpha=0.85, lw=0)
        if any(errors):
            bars = ax.errorbar(
                values,
                at,
                xerr=errors,
                fmt="none",
                ecolor="0.15",
                elinewidth=1.1,
                capsize=2.5,
            )
            # Below the axes, where no bar can lie under it.
            figure.legend([bars], ["± standard error"], loc="outside lower right", frameon=False)
        turn = _turn(values)
        if turn:
            ax.set_xscale("asinh", linear_width=turn)
            ticks = decades(min(*values, 0.0), max(*values, 0.0), 3.0 * turn)
            ax.set_xticks([tick for tick, _ in ticks], [mark for _, mark in ticks])
            ax.set_xticks([], minor=True)
        ax.axvline(0.0, color="0.3", lw=0.8)
        ax.set_yticks(at, names)
        ax.set_ylim(len(rows) - 0.5, -0.5)  # the first layer on top
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.grid(axis="x", color="0.9", lw=0.6)
        ax.set_axisbelow(True)
        ax.set_xlabel(f"{label}  ({note})")
        if len(rows) > 2:
            ax.set_ylabel("layer (parameters)")
        figure.suptitle("   |   ".join(heading), size=8.5, x=0.01, ha="left")
    return figure


def _turn(values: Sequence[float]) -> float | None:
    """Where an axis of such values turns logarithmic; ``None`` where it is linear throughout."""
    sizes = sorted(abs(value) for value in values if value)
    if not sizes or sizes[-1] < 100.0 * sizes[0]:
        return None
    return max(sizes[0], 1e-4 * sizes[-1])


def with_error(value: float, error: float) -> str:
    """A number with its standard error, both to the digits that the error leaves."""
    if not math.isfinite(error):
        return f"{value:.5g}"
    digits = 1 - math.floor(math.log10(error)) if error > 0 else 6
    return f"{value:.{min(max(digits, 0), 12)}f} ± {error:.2g}"


def save_figure(figure: Figure, stem: str | os.PathLike[str]) -> list[Path]:
    """Writes a figure as PNG and PDF; each file appears whole or not at all.

    Args:
        figure: The figure.
        stem: Path without an ending.

    Returns:
        The two files.

    Raises:
        OSError: If a file cannot be written.
    """
    import matplotlib as mpl

    files = []
    for kind in ("png", "pdf"):
        path = Path(f"{os.fspath(stem)}.{kind}")
        # No date in the file: the same numbers give the same bytes.
        metadata = {"CreationDate": None} if kind == "pdf" else {}
        with mpl.rc_context(style()), atomic_write(path) as temporary:
            figure.savefig(temporary, format=kind, dpi=300, metadata=metadata)
        files.append(path)
    return files
