"""What pruning leaves in a folder: weights, masks, a table, a figure, and the command."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curvlib.core.files import atomic_write
from curvlib.pruning.compare import Comparison
from curvlib.pruning.result import PruneResult
from curvlib.report.figures import new_figure, save_figure
from curvlib.report.files import number, write_command, write_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Pruning:
    """What was pruned, and what it did.

    Attributes:
        result: The pruned model, which it holds.
        comparison: Other methods at several sparsities, or ``None``.
        quantity: What models are judged by.
        dense: That of the model before.
        pruned: That of the pruned model.
        target: What the user pointed at.
        examples: ``N``.
        seconds: Wall time of this run.
        resumed: Whether the run began earlier, which ``seconds`` does not count.
    """

    result: PruneResult
    comparison: Comparison | None
    quantity: str
    dense: float
    pruned: float
    target: str
    examples: int
    seconds: float
    resumed: bool = False


def table(pruning: Pruning) -> str:
    """The numbers as text, for a terminal."""
    found = pruning.result
    said = f"  (predicted: {found.predicted:.3g})" if math.isfinite(found.predicted) else ""
    facts = {
        "method": found.method,
        "loss": f"{found.after:.5g}  (before: {found.before:.5g})",
        pruning.quantity: f"{pruning.pruned:.5g}  (before: {pruning.dense:.5g})",
        "change of the loss": f"{found.measured:.3g}{said}",
        "wall time": f"{pruning.seconds:.1f} s{' (this run)' if pruning.resumed else ''}",
    }
    lines = ["", found.table(), "", *(f"{name + ':':<21}{text}" for name, text in facts.items())]
    if pruning.comparison is not None:
        lines += ["", pruning.comparison.table()]
    return "\n".join([*lines, ""])


def write(pruning: Pruning, folder: str | os.PathLike[str], command: str) -> list[Path]:
    """Writes everything into a folder; each file appears whole or not at all.

    Args:
        pruning: What was pruned.
        folder: An existing folder. Files of an earlier run are replaced.
        command: The command that made it.

    Returns:
        The files: ``prune.png``, ``.pdf``, ``.json`` and ``.safetensors`` (the result, masks
        included), ``pruned.safetensors`` (the model's whole state), ``comparison.safetensors``
        where methods were compared, and ``command.txt``.

    Raises:
        OSError: If a file cannot be written.
        ImportError: If matplotlib is absent; the rest is written by then.
    """
    folder = Path(folder)
    files = [
        write_weights(pruning.result, folder / "pruned.safetensors"),
        write_numbers(folder / "prune.json", _document(pruning), command),
        pruning.result.save(folder / "prune.safetensors"),
    ]
    if pruning.comparison is not None:
        files.append(pruning.comparison.save(folder / "comparison.safetensors"))
    files.append(write_command(folder, command))
    return [*save_figure(figure(pruning), folder / "prune"), *files]


def write_weights(result: PruneResult, path: Path) -> Path:
    """Writes the state of the pruned model, so that ``load_state_dict(load_file(path))`` reads it.

    Raises:
        ValueError: If the result holds no model (it was loaded from a file).
        OSError: If the file cannot be written.
    """
    from safetensors.torch import save_file

    if result.model is None:
        raise ValueError(
            "this result holds no model, as after loading; use result.applied(model) and save that"
        )
    state = {
        name: value.detach().clone().contiguous()
        for name, value in result.model.state_dict().items()
    }
    with atomic_write(path) as temporary:
        save_file(state, temporary)
    return path


def figure(pruning: Pruning) -> Figure:
    """Sparsity by parameter and, where methods were compared, what they leave of the model.

    Raises:
        ImportError: If matplotlib is absent.
    """
    rows = len(pruning.result.layers)
    size = (7.0, max(2.9, 1.2 + 0.24 * rows))
    if pruning.comparison is None:
        size = (4.2, 1.4 + 0.24 * rows)
    with new_figure(*size) as out:
        if pruning.comparison is None:
            pruning.result.plot(out.subplots())
        else:
            left, right = out.subplots(1, 2, width_ratios=(1.0, 1.15))
            pruning.result.plot(left)
            pruning.comparison.plot(right)
            right.set_title("each from the unpruned model", loc="left")
        heading = f"{pruning.target}   |   N = {pruning.examples:,} examples"
        heading += "\n" if pruning.comparison is None else "   |   "  # the narrow one has two lines
        heading += f"{pruning.quantity}: {pruning.dense:.4g} → {pruning.pruned:.4g}"
        out.suptitle(heading, size=8.5, x=0.01, ha="left")
    return out


def _document(pruning: Pruning) -> dict[str, Any]:
    found = pruning.result
    out: dict[str, Any] = {
        "target": pruning.target,
        "examples": pruning.examples,
        "method": found.method,
        "sparsity": found.sparsity,
        "quantity": pruning.quantity,
        "before": number(pruning.dense),
        "after": number(pruning.pruned),
        "loss_before": number(found.before),
        "loss_after": number(found.after),
        "predicted_change": number(found.predicted),
        "measured_change": number(found.measured),
        "layers": {
            name: {**row, "predicted": number(row["predicted"])}
            for name, row in found.layers.items()
        },
        "settings": found.settings,
        "seconds": round(pruning.seconds, 3),
        "resumed": pruning.resumed,
    }
    if pruning.comparison is not None:
        curves = pruning.comparison
        out["comparison"] = {
            "sparsities": list(curves.sparsities),
            "quantity": curves.quantity,
            **{
                name: [number(v) for v in row]
                for name, row in zip(curves.methods, curves.values.tolist(), strict=True)
            },
            "problems": curves.problems,
        }
    return out
