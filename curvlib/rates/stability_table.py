"""The rows of a stability monitor, and the files they are written to."""

from __future__ import annotations

import csv
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from curvlib.core.files import atomic_write, remove_leftovers, require_writable


@dataclass(frozen=True)
class StabilityReading:
    r"""Curvature at one moment of training. What does not apply, or is not known yet, is NaN.

    Attributes:
        step: Optimizer steps taken before.
        loss: The loss that the training loop gave.
        lr: Learning rate of the first group, in the last step.
        momentum: Momentum, or :math:`\beta_1`.
        lambda_max: Largest eigenvalue of the Hessian.
        lambda_max_residual: Norm of its residual.
        trace: Of the Hessian.
        trace_stderr: Its standard error.
        frobenius: Frobenius norm of the Hessian.
        frobenius_stderr: Its standard error.
        batch_sharpness: Mean largest eigenvalue of mini-batches.
        batch_sharpness_stderr: Its standard error.
        noise_scale: :math:`\operatorname{tr} \Sigma / \|g\|^2`, in examples.
        noise_scale_stderr: Its standard error.
        update_sharpness: :math:`u^\top H u / u^\top u` along the last update.
        sharpness: The curvature that ``edge`` is for: preconditioned, and with weight decay, where
            the optimizer has that.
        edge: The largest stable ``sharpness``.
        gradient_descent_edge: :math:`2 / \eta`.
        trace_over_batch: :math:`\operatorname{tr}(H) / b`, with the effective batch size ``b``.
        mean_square_sharpness: ``sharpness`` and the noise of mini-batches, as ``edge`` bounds them
            in SGD's mean-square stability.
        products: Columns multiplied.
        cost: What the reading took, in training steps.
    """

    step: int
    loss: float
    lr: float
    momentum: float
    lambda_max: float
    lambda_max_residual: float
    trace: float
    trace_stderr: float
    frobenius: float
    frobenius_stderr: float
    batch_sharpness: float
    batch_sharpness_stderr: float
    noise_scale: float
    noise_scale_stderr: float
    update_sharpness: float
    sharpness: float
    edge: float
    gradient_descent_edge: float
    trace_over_batch: float
    mean_square_sharpness: float
    products: int
    cost: float


COLUMNS = tuple(field.name for field in fields(StabilityReading))
_WHOLE = ("step", "products")


def write_csv(path: str | os.PathLike[str], rows: list[StabilityReading]) -> None:
    """Writes readings as a table; the file appears whole or keeps what it held.

    Raises:
        OSError: If the file cannot be written.
    """
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow([_text(getattr(row, name)) for name in COLUMNS])


def read_csv(path: str | os.PathLike[str]) -> list[StabilityReading]:
    """Reads what :func:`write_csv` wrote, bitwise.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such table.
    """
    path = Path(path)
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))
    if not lines or tuple(lines[0]) != COLUMNS:
        found = ", ".join(lines[0][:4]) if lines else "an empty file"
        raise ValueError(
            f"{str(path)!r} is no table of a StabilityMonitor of this version (it begins with "
            f"{found}); choose another path"
        )
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            values = [
                int(text) if name in _WHOLE else float(text)
                for name, text in zip(COLUMNS, line, strict=True)
            ]
        except ValueError as error:
            raise ValueError(
                f"line {number} of {str(path)!r} is damaged ({error}); remove it, or choose "
                "another path"
            ) from error
        rows.append(StabilityReading(*values))  # type: ignore[arg-type]  # mypy: int | float each
    return rows


def _text(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return "nan" if math.isnan(value) else repr(value)


def existing_rows(path: Path | None, resume: bool) -> list[StabilityReading]:
    """Rows of a table that is to be continued.

    Raises:
        ValueError: If the file exists and is not to be continued, or is no such table.
        OSError: If it cannot be written.
    """
    if path is None:
        return []
    require_writable(path)
    remove_leftovers(path)
    if not path.exists():
        return []
    if not resume:
        raise ValueError(
            f"{str(path)!r} exists; pass resume=True to continue it, or another path, or delete it"
        )
    return read_csv(path)


def writer_of(tensorboard: Any) -> Any:
    """A ``SummaryWriter``, from one or from a folder.

    Raises:
        TypeError: If it is neither.
        ImportError: If TensorBoard is absent.
    """
    if tensorboard is None or hasattr(tensorboard, "add_scalar"):
        return tensorboard
    if not isinstance(tensorboard, (str, os.PathLike)):
        raise TypeError(
            f"tensorboard= is a folder or a SummaryWriter, got {type(tensorboard).__name__}"
        )
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "tensorboard= needs TensorBoard, which is not installed; run: pip install tensorboard"
        ) from error
    return SummaryWriter(os.fspath(tensorboard))
