r"""Windows of rows that are stored by their largest entries, with their Gram matrices.

A row of length ``P`` of which ``k`` entries are kept takes ``k`` values and ``k`` positions
(int32), so that a window of 1 % of the entries in float32 is fifty times smaller than a whole one.
Gram entries are sums over common positions, in float64. A product costs :math:`O(m k)`, and
combinations write one vector of length ``P``.

For what M-FAC makes of them see :mod:`curvlib.operators.mfac_operator`; for how rows are chosen
:mod:`curvlib.operators.windows.compression`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from curvlib.operators.windows import gram as window_gram
from curvlib.operators.windows import order as window_order
from curvlib.operators.windows import state as window_state
from curvlib.operators.windows.arguments import part_lengths, require_dtype, require_size

F64 = torch.float64

#: Numbers that are gathered at once, at most: they are in float64.
GATHERED = 2**21


class SparseWindow:
    """The last ``size`` rows of length ``length``, of which fixed numbers of entries are stored.

    Args:
        length: ``P``, the length of a row.
        size: ``m``, how many rows are kept at most.
        kept: How many entries of a row each part stores.
        dtype: How values are stored: float32, float64 or bfloat16.
        device: Where all lives.
        parts: Lengths of the parts, which add up to ``length``; one part when omitted.

    Attributes:
        version: A number that every change increases.

    Raises:
        TypeError: If ``dtype`` is none of the three, or an argument is of the wrong type.
        ValueError: If a number is not positive, ``parts`` do not add up, or ``kept`` does not fit.

    Example:
        >>> window = SparseWindow(4, 2, kept=[2])
        >>> window.push(torch.tensor([1, 3]), torch.tensor([5.0, -2.0]))
        >>> window.rows().tolist(), window.stored_gram().tolist()
        ([[0.0, 5.0, 0.0, -2.0]], [[[29.0]]])
    """

    def __init__(
        self,
        length: int,
        size: int,
        kept: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        parts: Sequence[int] | None = None,
    ) -> None:
        self.length = require_size("length", length)
        self.size = require_size("size", size)
        self.dtype = require_dtype(dtype)
        self.device = torch.empty(0, device=device).device
        self.parts = part_lengths(parts, self.length)
        self.kept = tuple(require_size("a number in kept=", k) for k in kept)
        if len(self.kept) != len(self.parts) or any(
            k > n for k, n in zip(self.kept, self.parts, strict=True)
        ):
            raise ValueError(
                f"kept= says how many entries each of the {len(self.parts)} parts stores, at most "
                f"{list(self.parts)}, got {list(self.kept)}"
            )
        self.version = 0
        shape = (self.size, sum(self.kept))
        with torch.inference_mode(False):
            self._values = torch.zeros(shape, dtype=self.dtype, device=self.device)
            self._columns = torch.zeros(shape, dtype=torch.int32, device=self.device)
            self._gram = window_gram.empty(len(self.parts), self.size, self.device)
        self._order: list[int] = []

    # ------------------------------------------------------------------- reading
    @property
    def count(self) -> int:
        """How many rows are held."""
        return len(self._order)

    @property
    def whole_parts(self) -> tuple[int, ...]:
        """Lengths of the parts, which are whole here."""
        return self.parts

    def summed(self, numbers: Tensor) -> Tensor:
        """The numbers: all entries are here."""
        return numbers

    @property
    def rounded(self) -> bool:
        """Never: Gram entries are sums in float64."""
        return False

    @property
    def nbytes(self) -> int:
        """Bytes that the window takes, with its Gram matrices."""
        return self._values.nbytes + self._columns.nbytes + self._gram.nbytes

    def slot(self, index: int) -> int:
        """Where a row is stored; ``index`` 0 is the oldest, -1 the newest.

        Raises:
            IndexError: If there is no such row.
        """
        return window_order.slot_of(self._order, index)

    def rows(self) -> Tensor:
        """A copy of all rows ``[count, P]``, oldest first, zero where nothing is stored."""
        out = torch.zeros((self.count, self.length), dtype=self.dtype, device=self.device)
        return out.scatter_(1, self._columns[self._order].long(), self._values[self._order])

    def stored_gram(self) -> Tensor:
        """Gram matrices ``[parts, count, count]`` in float64, in the order of :meth:`slot`."""
        return self._gram[:, : self.count, : self.count]

    def polish(self) -> bool:
        """Nothing is to be computed again."""
        return False

    def _slices(self) -> Iterator[tuple[int, slice]]:
        """Each part and where its entries are stored."""
        for part, (start, stop) in enumerate(
            itertools.pairwise(itertools.accumulate(self.kept, initial=0))
        ):
            yield part, slice(start, stop)

    def inner(self, columns: Tensor, *, exact: bool = False) -> Tensor:  # noqa: ARG002  # always is
        """``G X`` for ``X`` ``[P, K]``, part by part: ``[parts, count, K]`` in float64."""
        shape = (len(self.parts), self.count, columns.shape[1])
        out = torch.empty(shape, dtype=F64, device=self.device)
        for part, entries in self._slices():
            step = max(1, GATHERED // (self.kept[part] * max(1, columns.shape[1])))
            for first in range(0, self.count, step):
                rows = slice(first, min(first + step, self.count))
                taken = columns[self._columns[rows, entries]].to(F64)
                values = self._values[rows, entries, None].to(F64)
                torch.sum(taken.mul_(values), 1, out=out[part, rows])
        return out

    def combination(self, coefficients: Tensor, *, exact: bool = False) -> Tensor:
        """``G^T C`` ``[P, K]`` for ``C`` ``[parts, count, K]`` in float64.

        The result is in float64 where values are or ``exact`` is set, else in float32. Sums are
        taken in the order of rows, on any device.
        """
        dtype = F64 if exact or self.dtype == F64 else torch.float32
        shape = (coefficients.shape[2], self.length)
        out = torch.zeros(shape, dtype=dtype, device=self.device)
        for part, entries in self._slices():
            step = max(1, GATHERED // self.kept[part])
            if self.device.type != "cpu":
                step = 1  # additions to one place would come in any order
            for first in range(0, self.count, step):
                rows = slice(first, min(first + step, self.count))
                where = self._columns[rows, entries].reshape(-1)
                values = self._values[rows, entries].to(dtype)
                for k, total in enumerate(out):
                    weights = coefficients[part, rows, k, None].to(dtype)
                    total.index_add_(0, where, (weights * values).reshape(-1))
        return out.mT

    # ------------------------------------------------------------------ changing
    def push(self, columns: Tensor, values: Tensor) -> None:
        """Adds a row; the oldest makes room for it.

        Args:
            columns: Where its entries are, ``[sum(kept)]``, part by part, each place once.
            values: The entries, ``[sum(kept)]``, finite; they are rounded to the stored type.

        Raises:
            ValueError: If there is another number of them.
        """
        expected = (sum(self.kept),)
        if tuple(columns.shape) != expected or tuple(values.shape) != expected:
            raise ValueError(
                f"expected {expected[0]} columns and values, got shapes {list(columns.shape)} and "
                f"{list(values.shape)}"
            )
        (slot,), self._order = window_order.with_new(self._order, 1, self.size)
        self._columns[slot] = columns
        self._values[slot] = values
        self.version += 1
        row = torch.zeros((self.length, 1), dtype=self.dtype, device=self.device)
        row[columns, 0] = self._values[slot]
        window_gram.write(self._gram, self.inner(row), [slot])

    # ------------------------------------------------------------- saving, loading
    def _settings(self) -> dict[str, Any]:
        made = window_state.settings(self.length, self.size, self.dtype, self.parts)
        return {**made, "kept": list(self.kept)}

    def state_dict(self) -> dict[str, Any]:
        """All that the window is: tensors, which share memory with it, and numbers."""
        values, columns = self._values[: self.count], self._columns[: self.count]
        rows = {"order": list(self._order), "values": values, "columns": columns}
        return self._settings() | rows | {"gram": self.stored_gram()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the rows of a state, bitwise and in place; if this is smaller, the newest ones.

        Raises:
            ValueError: If the state is that of rows of another length, type or split into parts.
        """
        window_state.require_alike(self._settings(), state, ("kept",))
        kept, order = window_order.places(state["order"], self.size)
        self._values[: len(kept)] = state["values"][kept].to(self.device)
        self._columns[: len(kept)] = state["columns"][kept].to(self.device)
        self._order = order
        window_gram.take(self._gram, state["gram"], kept)
        self.version += 1

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        parts = "" if len(self.parts) == 1 else f", {len(self.parts)} parts"
        return (
            f"<SparseWindow: {self.count} of {self.size} rows of length {self.length}, "
            f"{sum(self.kept)} entries each, {dtype}{parts}, {self.device}>"
        )
