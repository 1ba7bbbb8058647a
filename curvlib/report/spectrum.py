"""A spectrum as people keep it: a table, a figure, numbers, and the command that made them."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curvlib.estimators.density import Density
from curvlib.estimators.eigenpairs import Eigenpairs
from curvlib.report.figures import save_figure, spectrum_figure, with_error
from curvlib.report.files import number, write_command, write_numbers


@dataclass(frozen=True)
class Spectrum:
    """What was measured, and of what.

    Attributes:
        eigenpairs: The extreme eigenvalues.
        density: The spectral density.
        name: The operator (``"Hessian"``).
        target: What the user pointed at.
        parameters: ``P``.
        examples: ``N``.
        seconds: Wall time of this run.
        resumed: Whether the run began earlier, which ``seconds`` does not count.
    """

    eigenpairs: Eigenpairs
    density: Density
    name: str
    target: str
    parameters: int
    examples: int
    seconds: float
    resumed: bool = False

    @property
    def largest(self) -> float:
        """The largest Ritz value that was seen."""
        return max(float(self.eigenpairs.values.max()), float(self.density.nodes.max()))

    @property
    def stable_step(self) -> float | None:
        """``2 / lambda_max``: gradient descent on the local quadratic diverges above it.

        ``None`` where no eigenvalue is positive beyond the accuracy of the estimates.
        """
        accuracy = self.eigenpairs.settings["tolerance"] * self.eigenpairs.norm
        return 2.0 / self.largest if self.largest > accuracy else None

    @property
    def products(self) -> int:
        """Products of the operator with one vector."""
        return self.eigenpairs.products + self.density.products


def table(spectrum: Spectrum) -> str:
    """The numbers as text, for a terminal."""
    pairs, density = spectrum.eigenpairs, spectrum.density
    lines = ["", f"{'eigenvalue':>18}  {'residual':>9}"]
    for index, (value, residual, converged) in enumerate(_rows(pairs), start=1):
        note = "" if converged else "  not converged"
        lines.append(f"{index:>4}  {value:>12.6g}  {residual:>9.1e}{note}")
    step = spectrum.stable_step
    facts = {
        "trace": f"{with_error(density.trace, density.trace_stderr)}  ("
        + ("standard error)" if math.isfinite(density.trace_stderr) else "one probe: no error)"),
        "largest stable step": "none: no eigenvalue is positive"
        if step is None
        else f"{step:.4g}  (2 / lambda_max)",
        "products": f"{spectrum.products}",
        "wall time": f"{spectrum.seconds:.1f} s{' (this run)' if spectrum.resumed else ''}",
    }
    lines += ["", *(f"{name + ':':<21}{value}" for name, value in facts.items()), ""]
    return "\n".join(lines)


def write(spectrum: Spectrum, folder: str | os.PathLike[str], command: str) -> list[Path]:
    """Writes figure, numbers and command into a folder; each file appears whole or not at all.

    Args:
        spectrum: What was measured.
        folder: An existing folder. Files of an earlier run are replaced.
        command: The command that made it.

    Returns:
        The files: ``spectrum.png``, ``spectrum.pdf``, ``spectrum.json``,
        ``eigenpairs.safetensors``, ``density.safetensors`` and ``command.txt``.

    Raises:
        OSError: If a file cannot be written.
        ImportError: If matplotlib is absent; the numbers are written by then.
    """
    folder = Path(folder)
    numbers = write_numbers(folder / "spectrum.json", _document(spectrum), command)
    shell = write_command(folder, command)
    kept = [
        spectrum.eigenpairs.save(folder / "eigenpairs.safetensors"),
        spectrum.density.save(folder / "density.safetensors"),
    ]
    figure = spectrum_figure(
        spectrum.eigenpairs,
        spectrum.density,
        title=spectrum.target,
        examples=spectrum.examples,
    )
    return [*save_figure(figure, folder / "spectrum"), numbers, *kept, shell]


def _document(spectrum: Spectrum) -> dict[str, Any]:
    pairs, density = spectrum.eigenpairs, spectrum.density
    return {
        "operator": spectrum.name,
        "target": spectrum.target,
        "parameters": spectrum.parameters,
        "examples": spectrum.examples,
        "eigenvalues": [
            {"value": value, "residual": residual, "converged": converged}
            for value, residual, converged in _rows(pairs)
        ],
        "norm": number(pairs.norm),
        "largest_stable_step": spectrum.stable_step,
        "trace": number(density.trace),
        "trace_stderr": number(density.trace_stderr),
        "near_zero": number(density.near_zero),
        "mass_near_zero": number(density.mass_near_zero),
        "mass_near_zero_stderr": number(density.mass_near_zero_stderr),
        "products": spectrum.products,
        "seconds": round(spectrum.seconds, 3),
        "resumed": spectrum.resumed,
    }


def _rows(pairs: Eigenpairs) -> list[tuple[float, float, bool]]:
    columns = (pairs.values.tolist(), pairs.residuals.tolist(), pairs.converged.tolist())
    return sorted(zip(*columns, strict=True), reverse=True)
