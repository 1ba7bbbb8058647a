r"""Windows of an optimizer's gradients: rows are prepared first, and pushed when all is well.

A :class:`GradientWindow` holds the gradients of some tensors, whole
(:class:`~curvlib.operators.windows.window.Window`) or compressed with error feedback
(:class:`~curvlib.operators.windows.sparse.SparseWindow`), with one matrix
:math:`F = \lambda I + \frac1c G^\top G` over all tensors or one for each. ``prepared(row)``
changes nothing, so that a step over several windows can be given up as long as no row was pushed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlib.core.ranks.places import UNFOLLOWED
from curvlib.core.ranks.spread import Spread
from curvlib.operators.windows import solve as window_solve
from curvlib.operators.windows.compression import kept_entries, top_entries
from curvlib.operators.windows.sparse import SparseWindow
from curvlib.operators.windows.systems import Systems
from curvlib.operators.windows.window import Window

F64 = torch.float64

#: Relative error of directions up to which float32 passes over a window are good enough.
ACCURACY = 1e-3

#: Norms of rows whose squares, and sums of these, stay in the range of float64.
LONGEST = 1e150


@dataclass(frozen=True, eq=False)
class Prepared:
    """What pushing a row will store.

    Attributes:
        values: The row ``[P]``, or the entries of it that are kept, in the stored type.
        columns: Where these are; ``None`` for whole rows.
        residual: What is carried over to the next row, ``[P]``; ``None`` for whole rows.
        zero: Whether all that would be stored is zero.
    """

    values: Tensor
    columns: Tensor | None
    residual: Tensor | None
    zero: bool


class GradientWindow:
    """The last gradients of some tensors, and what they precondition with.

    Args:
        lengths: Numbers of entries of the tensors, which make up a row in this order.
        size: ``m``, how many rows are kept at most.
        dtype: How rows are stored: float32, float64 or bfloat16.
        device: Where all lives.
        by_tensor: Whether each tensor has a matrix of its own, or all have one.
        compression: The fraction of entries (of each tensor, or of all) that is kept, with error
            feedback; ``None`` for whole rows.
        spread: Where the tensors are slices of sharded ones, how they lie over processes, which
            then push the same rows, each its part. A push sends ``m`` numbers, and norms one each.

    Attributes:
        window: The rows.
        residual: What error feedback carries over, ``[P]``; ``None`` for whole rows.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a number is out of range.
        MemoryError: If whole rows do not fit; the message says what would.

    Example:
        >>> window = GradientWindow([2, 1], 8, dtype=torch.float64)
        >>> window.push(window.prepared(torch.tensor([3.0, 4.0, 0.0])))
        >>> window.direction(1.0, "rows").tolist(), window.quadratic(1.0, "rows")
        ([0.06, 0.08, 0.0], 0.5)
    """

    def __init__(
        self,
        lengths: Sequence[int],
        size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        by_tensor: bool = False,
        compression: float | None = None,
        spread: Spread | None = None,
    ) -> None:
        require_followed(spread, by_tensor, compression)
        self.spread = spread
        self.lengths = tuple(lengths)
        self.by_tensor = by_tensor
        self.compression = compression
        total = sum(self.lengths)
        parts = self.lengths if by_tensor else (total,)
        self.window: Window | SparseWindow
        self.residual: Tensor | None = None
        if compression is None:
            own = parts if spread is None else None
            self.window = Window(total, size, dtype=dtype, device=device, parts=own, spread=spread)
        else:
            kept = kept_entries(parts, compression)
            self.window = SparseWindow(total, size, kept, dtype=dtype, device=device, parts=parts)
            self.residual = torch.zeros(total, dtype=self.vector_dtype, device=device)
        self._systems = Systems(self.window)

    @property
    def vector_dtype(self) -> torch.dtype:
        """Of rows before they are stored, of residuals and of directions."""
        return F64 if self.window.dtype == F64 else torch.float32

    # ------------------------------------------------------------------------- rows
    def row(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """One row ``[P]`` of the tensors' gradients, with zeros for missing ones."""
        dtype, device = self.vector_dtype, self.window.device
        out = torch.empty(sum(self.lengths), dtype=dtype, device=device)
        for part, g in zip(out.split(list(self.lengths)), gradients, strict=True):
            if g is None:
                part.zero_()
            else:
                part.view(g.shape).copy_(g)
        return out

    def prepared(self, row: Tensor) -> Prepared | None:
        """What pushing a row would store; nothing is changed.

        Args:
            row: ``[P]``.

        Returns:
            That, or ``None`` if it would not be finite, or longer than 1e150.
        """
        if not isinstance(self.window, SparseWindow):
            values = row.to(self.window.dtype)
            length = norm(values, self.spread)
            return Prepared(values, None, None, length == 0) if length < LONGEST else None
        assert self.residual is not None
        residual = row + self.residual
        if not norm(residual) < LONGEST:
            return None
        columns = top_entries(residual, self.window.parts, self.window.kept)
        values = residual[columns].to(self.window.dtype)
        if not (length := norm(values)) < LONGEST:
            return None
        residual[columns] -= values.to(residual.dtype)
        return Prepared(values, columns, residual, length == 0)

    def push(self, prepared: Prepared) -> None:
        """Adds a row; the oldest makes room for it where there is none."""
        if isinstance(self.window, SparseWindow):
            assert prepared.columns is not None
            self.window.push(prepared.columns, prepared.values)
            self.residual = prepared.residual
        else:
            self.window.push(prepared.values, check=False)

    # ------------------------------------------------------------------- directions
    def direction(self, damping: float, relative: bool | str) -> Tensor:
        r""":math:`F^{-1} g = c\, G^\top K^{-1} e` for the newest row, ``[P]``, in one pass.

        Args:
            damping: Absolute, or a fraction.
            relative: Whether it is a fraction of the mean diagonal entry of
                :math:`\frac1c G^\top G`, or (``"rows"``) of the mean of the ``c`` eigenvalues
                that ``c`` rows can have.

        Raises:
            RuntimeError: If the window is empty.
        """
        asked = damping, relative, 0.0
        found = window_solve.solve_row(self._systems, asked, -1, ACCURACY)
        return found.to(self.vector_dtype)

    def quadratic(self, damping: float, relative: bool | str) -> float:
        """``g^T F^{-1} g`` for the newest row, summed over parts: below ``c`` in each. No pass."""
        system = self._systems.current(damping, relative)
        slot = self.window.slot(-1)
        return float((system.gram[:, slot] * system.coefficients_of_row(slot)[:, :, 0]).sum())

    def lengths_of(self, direction: Tensor) -> tuple[float, float]:
        """The norms of the newest row (no pass) and of a direction ``[P]``; waits once."""
        slot = self.window.slot(-1)
        row = self.window.stored_gram()[:, slot, slot].sum().sqrt()
        if self.spread is not None:
            return float(row), norm(direction, self.spread)
        own, length = torch.stack([row, fast_norm(direction).to(F64)]).tolist()
        return own, length if in_range(length) else norm(direction)

    # ---------------------------------------------------------------- more tensors
    def widened(self, more: Sequence[int], spread: Spread | None = None) -> GradientWindow:
        """A window of more tensors, whose gradients were zero in the rows there are.

        Args:
            more: Numbers of entries of the further tensors.
            spread: How all of them lie over processes.
        """
        old, start = self.window.state_dict(), sum(self.lengths)
        out = GradientWindow(
            (*self.lengths, *more),
            self.window.size,
            dtype=self.window.dtype,
            device=self.window.device,
            by_tensor=self.by_tensor,
            compression=self.compression,
            spread=spread,
        )
        new = out.window.state_dict()
        count, added = self.window.count, len(out.window.parts) - len(self.window.parts)
        gram = torch.cat([old["gram"], old["gram"].new_zeros(added, count, count)])
        state = old | {key: new[key] for key in ("length", "parts")} | {"gram": gram}
        if isinstance(out.window, SparseWindow):
            assert isinstance(self.window, SparseWindow)
            columns = _placeholders(self.window, out.window, start).expand(count, -1)
            state["kept"] = new["kept"]
            state["columns"] = torch.cat([old["columns"], columns.to(old["columns"])], 1)
            zeros = old["values"].new_zeros(columns.shape)
            state["values"] = torch.cat([old["values"], zeros], 1)
        else:
            state["rows"] = [*old["rows"], old["rows"][0].new_zeros(count, sum(more))]
        out.window.load_state_dict(state)
        if self.residual is not None:
            assert out.residual is not None
            out.residual[:start] = self.residual
        return out

    # ------------------------------------------------------------- saving, loading
    def state_dict(self) -> dict[str, Any]:
        """All of it: tensors, which share memory with it, and plain values."""
        return {
            "lengths": list(self.lengths),
            "by_tensor": self.by_tensor,
            "compression": self.compression,
            "window": self.window.state_dict(),
            "residual": self.residual,
        }

    @classmethod
    def from_state(
        cls, state: Mapping[str, Any], device: torch.device, spread: Spread | None = None
    ) -> GradientWindow:
        """The window that a state was taken of, bitwise; tensors are copied.

        Args:
            state: What :meth:`state_dict` returned.
            device: Where it shall live.
            spread: How its tensors lie over processes.
        """
        saved = state["window"]
        out = cls(
            state["lengths"],
            saved["size"],
            dtype=getattr(torch, saved["dtype"]),
            device=device,
            by_tensor=state["by_tensor"],
            compression=state["compression"],
            spread=spread,
        )
        out.window.load_state_dict(saved)
        if out.residual is not None:
            out.residual.copy_(state["residual"])
        return out


def require_followed(spread: Spread | None, by_tensor: bool, compression: float | None) -> None:
    """Raises ValueError for windows that spread rows cannot have."""
    if spread is not None and (by_tensor or compression is not None):
        raise ValueError(
            f"{UNFOLLOWED}: windows of tensors, and compressed ones, need whole gradients; use "
            "window='group' without compression="
        )


def norm(vector: Tensor, spread: Spread | None = None) -> float:
    """The norm, NaN or infinite if an entry is; in float64 where squares leave float32's range."""
    if spread is not None:
        square = torch.linalg.vector_norm(vector, dtype=F64).square()
        return float(spread.sum(square).sqrt())
    value = float(fast_norm(vector))
    return value if in_range(value) else float(torch.linalg.vector_norm(vector, dtype=F64))


def fast_norm(vector: Tensor) -> Tensor:
    """The norm, in float32 unless the vector is in float64, on its device: see :func:`in_range`."""
    dtype = F64 if vector.dtype == F64 else torch.float32
    out: Tensor = torch.linalg.vector_norm(vector, dtype=dtype)
    return out


def in_range(value: float) -> bool:
    """Whether squares stayed in the range of float32 for a norm."""
    return 1e-12 < value < 1e18


def _placeholders(old: SparseWindow, new: SparseWindow, start: int) -> Tensor:
    """Columns of further tensors, each once, as many as old rows lack in a wider window."""
    if len(old.parts) == len(new.parts):
        return start + torch.arange(sum(new.kept) - sum(old.kept))
    parts, kept = new.parts[len(old.parts) :], new.kept[len(old.parts) :]
    starts = itertools.accumulate(parts, initial=start)
    return torch.cat([s + torch.arange(k) for s, k in zip(starts, kept, strict=False)])
