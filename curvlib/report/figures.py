"""Figures for papers: readable in one column, in print, and without colour vision."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curvlib.core.files import atomic_write
from curvlib.estimators.density import Density
from curvlib.estimators.eigenpairs import Eigenpairs

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


def _style() -> dict[str, Any]:
    from matplotlib import cycler

    return {**STYLE, "axes.prop_cycle": cycler(color=COLOURS)}


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
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'curvlib[plot]'") from error
    with mpl.rc_context(_style()):
        figure = Figure(figsize=(7.0, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.35, 1.0))
        density.plot(left, scale="symlog")
        eigenpairs.plot(right)
        heading = [title] if title else []
        if examples is not None:
            heading.append(f"N = {examples:,} examples")
        heading.append(f"trace {with_error(density.trace, density.trace_stderr)}")
        figure.suptitle("   |   ".join(heading), size=8.5, x=0.01, ha="left")
    return figure


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
        with mpl.rc_context(_style()), atomic_write(path) as temporary:
            figure.savefig(temporary, format=kind, dpi=300, metadata=metadata)
        files.append(path)
    return files
