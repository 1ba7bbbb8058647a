"""What learning rates leave in a folder: a table, a figure, numbers, and the command."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curvlib.rates.learning_rate import MaxLearningRate
from curvlib.rates.measured_edges import MeasuredEdges
from curvlib.report.figures import new_figure, save_figure
from curvlib.report.files import number, write_command, write_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: A prediction within this factor of a measured edge counts as right.
FACTOR = 1.5


@dataclass(frozen=True)
class Rates:
    """What was predicted, and perhaps measured.

    Attributes:
        predicted: The predictions.
        measured: The edges of the same batch sizes, or ``None``.
        target: What the user pointed at.
        parameters: ``P``.
        seconds: Wall time of this run.
        resumed: Whether the run began earlier, which ``seconds`` does not count.
    """

    predicted: MaxLearningRate
    measured: MeasuredEdges | None
    target: str
    parameters: int
    seconds: float
    resumed: bool = False


def within(predicted: list[float], measured: list[float], factor: float = FACTOR) -> int:
    """How many predictions are within a factor of what was measured.

    Example:
        >>> within([1.0, 1.0, 1.0], [1.4, 0.7, 1.6])
        2
    """
    pairs = zip(predicted, measured, strict=True)
    return sum(1.0 / factor <= p / m <= factor for p, m in pairs)


def table(rates: Rates) -> str:
    """The numbers as text, for a terminal."""
    found = rates.predicted
    lines = ["", found.table(), ""]
    facts = {
        "largest curvature": f"{float(found.sharpness[0]):.5g}",
        "law in use": found.law.replace("_", " "),
    }
    if rates.measured is not None:
        lines += [rates.measured.table(), ""]
        head = f"{'batch':>7}  {'predicted':>10}  {'± error':>8}"
        head += f"  {'stable':>10}  {'measured/pred.':>14}"
        lines.append(f"{head}  {'trainable':>10}  {'measured/pred.':>14}")
        for row in _rows(rates):
            lines.append(
                f"{row['batch_size']:7d}  {row['predicted']:10.4g}  {row['predicted_stderr']:8.1e}"
                f"  {row['stable']:10.4g}  {row['stable'] / row['predicted']:14.2f}"
                f"  {row['trainable']:10.4g}  {row['trainable'] / row['predicted']:14.2f}"
            )
        lines.append("")
        for name, count in _hits(rates).items():
            facts[f"within {FACTOR:g}x, {name}"] = f"{count} of {len(found.batch_sizes)}"
    facts["products"] = f"{found.products}"
    facts["wall time"] = f"{rates.seconds:.1f} s{' (this run)' if rates.resumed else ''}"
    return "\n".join([*lines, *(f"{name + ':':<24}{text}" for name, text in facts.items()), ""])


def write(rates: Rates, folder: str | os.PathLike[str], command: str) -> list[Path]:
    """Writes everything into a folder; each file appears whole or not at all.

    Args:
        rates: What was predicted and measured.
        folder: An existing folder. Files of an earlier run are replaced.
        command: The command that made it.

    Returns:
        The files: ``rates.png``, ``.pdf``, ``.json`` and ``.safetensors`` (the predictions),
        ``edges.safetensors`` (what was measured, where something was) and ``command.txt``.

    Raises:
        OSError: If a file cannot be written.
        ImportError: If matplotlib is absent; the numbers are written by then.
    """
    folder = Path(folder)
    kept = [rates.predicted.save(folder / "rates.safetensors")]
    (folder / "edges.safetensors").unlink(missing_ok=True)  # of an earlier run
    if rates.measured is not None:
        kept.append(rates.measured.save(folder / "edges.safetensors"))
    numbers = write_numbers(folder / "rates.json", _document(rates), command)
    shell = write_command(folder, command)
    return [*save_figure(rates_figure(rates), folder / "rates"), numbers, *kept, shell]


def rates_figure(rates: Rates) -> Figure:
    """Predictions, the critical batch size and measured edges on the same axes.

    Raises:
        ImportError: If matplotlib is absent.
    """
    found = rates.predicted
    with new_figure(7.0, 3.4) as out:
        ax = out.subplots()
        found.plot(ax)
        if rates.measured is not None:
            rates.measured.plot(ax)
        legend = ax.get_legend()
        if legend is not None:
            legend.remove()
        sizes = sorted(set(found.batch_sizes.tolist()))
        shown = sizes if len(sizes) <= 12 else sizes[:: -(-len(sizes) // 12)]
        ax.set_xticks(shown, [f"{size:d}" for size in shown])
        ax.set_xticks([], minor=True)
        ax.set_xlim(sizes[0] / 1.3, sizes[-1] * 1.3)  # a knee beyond does not squeeze the rest
        ax.grid(color="0.92", lw=0.6)
        ax.set_axisbelow(True)
        ax.set_title("")
        ax.set_xlabel("batch size (examples)")
        ax.set_ylabel("largest learning rate")
        handles, labels = ax.get_legend_handles_labels()
        out.legend(handles, labels, loc="outside right upper", frameon=False)
        heading = [rates.target, f"N = {found.examples:,} examples", found.optimizer]
        heading.append(
            f"critical batch size {found.knee:.3g} "
            f"(95 %: {found.knee_low:.3g} to {found.knee_high:.3g})"
        )
        out.suptitle("   |   ".join(heading), size=8.5, x=0.01, ha="left")
    return out


def _rows(rates: Rates) -> list[dict[str, Any]]:
    found, measured = rates.predicted, rates.measured
    rows = []
    for i, size in enumerate(found.batch_sizes.tolist()):
        row = {
            "batch_size": size,
            "predicted": number(found.value[i]),
            "predicted_stderr": number(found.stderr[i]),
            "laws": {name: number(values[i]) for name, values in found.laws.items()},
        }
        if measured is not None:
            row |= {
                "stable": number(measured.value[i]),
                "stable_stderr": number(measured.stderr[i]),
                "trainable": number(measured.trainable[i]),
                "trainable_stderr": number(measured.trainable_stderr[i]),
            }
        rows.append(row)
    return rows


def _hits(rates: Rates) -> dict[str, int]:
    assert rates.measured is not None
    predicted = rates.predicted.value.tolist()
    return {
        "stable": within(predicted, rates.measured.value.tolist()),
        "trainable": within(predicted, rates.measured.trainable.tolist()),
    }


def _document(rates: Rates) -> dict[str, Any]:
    found = rates.predicted
    out: dict[str, Any] = {
        "target": rates.target,
        "parameters": rates.parameters,
        "examples": found.examples,
        "optimizer": found.optimizer,
        "law": found.law,
        "largest_curvature": number(found.sharpness[0]),
        "critical_batch_size": number(found.knee),
        "critical_batch_size_interval": [number(found.knee_low), number(found.knee_high)],
        "rates": _rows(rates),
        "products": found.products,
        "settings": found.settings,
        "seconds": round(rates.seconds, 3),
        "resumed": rates.resumed,
    }
    if rates.measured is not None:
        out["measured"] = {
            "steps": rates.measured.steps,
            "loss_at_start": number(rates.measured.start),
            "rise": rates.measured.rise,
            "runs": rates.measured.runs,
            "settings": rates.measured.settings,
            **{f"{name}_within_{FACTOR:g}": count for name, count in _hits(rates).items()},
        }
    return out
