"""What an estimate says of each layer: a table, a figure, numbers, and the command behind them."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from curvlib.core.result import Result
from curvlib.report.figures import layers_figure, save_figure, with_error
from curvlib.report.files import number, write_command, write_numbers


@dataclass(frozen=True)
class Layer:
    """A row of the table.

    Attributes:
        layer: Its name.
        parameters: How many it has.
        value: What was estimated.
        stderr: Its standard error; 0 if exact, NaN if unknown.
        more: Further numbers of the row, by the heading of their column.
    """

    layer: str
    parameters: int
    value: float
    stderr: float
    more: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Layers:
    """What was measured, and of what.

    Attributes:
        what: ``"trace"`` or ``"diagonal"``: what the files are called.
        heading: What the values of the rows are.
        rows: One for each layer, in the order of the model.
        total: The value of the whole, its standard error and 95 % interval.
        total_heading: What it is.
        facts: Further lines below the table, by name.
        numbers: Further numbers of the JSON file.
        result: What is saved whole.
        method: How it was estimated.
        products: Products of the operator with one vector.
        name: The operator (``"Hessian"``).
        target: What the user pointed at.
        parameters: ``P``.
        examples: ``N``.
        seconds: Wall time of this run.
        resumed: Whether the run began earlier, which ``seconds`` does not count.
    """

    what: str
    heading: str
    rows: tuple[Layer, ...]
    total: tuple[float, float, tuple[float, float]]
    total_heading: str
    facts: dict[str, str]
    numbers: dict[str, Any]
    result: Result
    method: str
    products: int
    name: str
    target: str
    parameters: int
    examples: int
    seconds: float
    resumed: bool = False


def table(layers: Layers) -> str:
    """The numbers as text, for a terminal."""
    wide = max(len("layer"), *(len(row.layer) for row in layers.rows))
    more = list(layers.rows[0].more)
    head = f"{'layer':<{wide}}  {'parameters':>10}  {layers.heading:>13}  {'± error':>8}"
    lines = ["", head + "".join(f"  {name:>13}" for name in more)]
    for row in layers.rows:
        line = f"{row.layer:<{wide}}  {row.parameters:>10,}  {row.value:>13.6g}  "
        line += f"{_error(row.stderr):>8}"
        lines.append(line + "".join(f"  {row.more[name]:>13.6g}" for name in more))
    facts = {
        layers.total_heading: _total(*layers.total),
        **layers.facts,
        "method": layers.method,
        "products": f"{layers.products}",
        "wall time": f"{layers.seconds:.1f} s{' (this run)' if layers.resumed else ''}",
    }
    return "\n".join([*lines, "", *(f"{name + ':':<21}{text}" for name, text in facts.items()), ""])


def write(layers: Layers, folder: str | os.PathLike[str], command: str) -> list[Path]:
    """Writes figure, numbers and command into a folder; each file appears whole or not at all.

    Args:
        layers: What was measured.
        folder: An existing folder. Files of an earlier run are replaced.
        command: The command that made it.

    Returns:
        The files: ``.png``, ``.pdf``, ``.json`` and ``.safetensors``, named after what was
        measured, and ``command.txt``.

    Raises:
        OSError: If a file cannot be written.
        ImportError: If matplotlib is absent; the numbers are written by then.
    """
    folder = Path(folder)
    numbers = write_numbers(folder / f"{layers.what}.json", _document(layers), command)
    shell = write_command(folder, command)
    kept = layers.result.save(folder / f"{layers.what}.safetensors")
    figure = layers_figure(
        [(row.layer, row.parameters, row.value, row.stderr) for row in layers.rows],
        label=f"{layers.heading} of the {layers.name}",
        heading=[
            layers.target,
            f"N = {layers.examples:,} examples",
            f"{layers.total_heading} {_short(*layers.total[:2])}",
        ],
        note=f"{layers.method}, {layers.products} products",
    )
    return [*save_figure(figure, folder / layers.what), numbers, kept, shell]


def _document(layers: Layers) -> dict[str, Any]:
    value, stderr, (low, high) = layers.total
    return {
        "operator": layers.name,
        "target": layers.target,
        "parameters": layers.parameters,
        "examples": layers.examples,
        layers.total_heading.replace(" ", "_"): number(value),
        "stderr": number(stderr),
        "interval": [number(low), number(high)],
        "layers": [
            {
                "layer": row.layer,
                "parameters": row.parameters,
                layers.heading.replace(" ", "_"): number(row.value),
                "stderr": number(row.stderr),
                **{name.replace(" ", "_"): number(value) for name, value in row.more.items()},
            }
            for row in layers.rows
        ],
        **layers.numbers,
        "method": layers.method,
        "products": layers.products,
        "seconds": round(layers.seconds, 3),
        "resumed": layers.resumed,
    }


def _error(stderr: float) -> str:
    return f"{stderr:.1e}" if stderr > 0.0 else "exact" if stderr == 0.0 else "-"


def _total(value: float, stderr: float, interval: tuple[float, float]) -> str:
    if stderr == 0.0:
        return f"{value:.6g}  (exact)"
    if not math.isfinite(interval[0]):
        return f"{value:.6g}  (one probe: no error)"
    return f"{with_error(value, stderr)}  (95 %: {interval[0]:.5g} to {interval[1]:.5g})"


def _short(value: float, stderr: float) -> str:
    return with_error(value, stderr) if stderr > 0.0 else f"{value:.6g}"
