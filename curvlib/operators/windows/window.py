r"""Windows: the last ``m`` rows (gradients) that were pushed, and their Gram matrix.

A window is a ring buffer ``G`` of shape ``[m, P]`` with the Gram matrix :math:`G G^\top` in
float64. An entry of the Gram matrix is computed once, from the *stored* (rounded) rows, when the
younger of its two rows arrives: nothing drifts, whatever is pushed, evicted and removed, and the
matrix stays positive semi-definite also for bfloat16 rows. Pushing one row costs one write and one
pass over the window; all else that M-FAC needs is on the ``m x m`` side (Frantar, Kurtic, Alistarh,
"M-FAC: Efficient Matrix-Free Approximations of Second-Order Information", 2021, section 3.2).

A window may be split into *parts*, contiguous slices of the rows (parameter tensors, say), each
with a Gram matrix of its own. Entries of rows that were pushed one by one come from float32
products with float64 sums over chunks (relative error about 1e-8); :meth:`Window.polish` computes
them again in float64, which :class:`~curvlib.operators.mfac.MFAC` does when, and only when, the
conditioning asks for it.

Where parameters are sharded over :math:`R` ranks, a rank holds its entries of every row, :math:`m P
/ R` numbers, and the whole Gram matrix, the same bits on each. Beside that it sends, in float64,

====================  =====================================================
push of k rows        :math:`m k` numbers, and ``k`` with ``check=True``
solve of K columns    :math:`m K` (:math:`(m + 1) K` where rows are rounded)
solve for a row       none
====================  =====================================================

each in one all-reduce.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvlib.core.ranks.spread import Spread
from curvlib.operators.windows import blocks as window_blocks
from curvlib.operators.windows import gram as window_gram
from curvlib.operators.windows import order as window_order
from curvlib.operators.windows import row_products
from curvlib.operators.windows import state as window_state
from curvlib.operators.windows.arguments import (
    as_rows,
    finite_rows,
    part_lengths,
    require_dtype,
    require_fused,
    require_one_part,
    require_size,
    require_storage,
)
from curvlib.operators.windows.kernels import WindowKernels

F64 = torch.float64

#: Rows pushed at once from which their Gram entries are computed in float64 right away.
MANY = 8


class Window:
    """The last ``size`` rows of length ``length``, oldest first.

    Args:
        length: ``P``, the length of a row.
        size: ``m``, how many rows are kept at most.
        dtype: How rows are stored: float32, float64 or bfloat16.
        device: Where vectors and the Gram matrix live.
        parts: Lengths of the parts, which add up to ``length``; one part when omitted.
        storage: ``"cpu"`` keeps the rows in host memory (pinned for CUDA), in blocks of columns
            that are brought to the device one after the other, once for each product. By default
            rows live on ``device``.
        fused: Whether passes on a CUDA device are kernels of curvlib's own (see
            :mod:`curvlib.operators.windows.kernels`), which need CuPy. ``None``: where they can be
            had; numbers are the same within rounding.
        spread: Where rows are spread over processes, which of their entries are here: ``length``
            of them. Parts are not split then.

    Attributes:
        count: Rows that are held.
        version: A number that every change increases.

    Raises:
        TypeError: If ``dtype`` is none of the three, or an argument is of the wrong type.
        ValueError: If a number is not positive, ``parts`` do not add up, or ``fused`` is asked for
            where no kernel is.
        ImportError: If ``fused`` is asked for and CuPy is missing.
        MemoryError: If the window does not fit; the message says what would.

    Example:
        >>> import torch
        >>> window = Window(3, 2, dtype=torch.float64)
        >>> for row in torch.eye(3, dtype=torch.float64):
        ...     _ = window.push(row)
        >>> window.rows().tolist(), window.count
        ([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], 2)
    """

    def __init__(
        self,
        length: int,
        size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        parts: Sequence[int] | None = None,
        storage: str | None = None,
        fused: bool | None = None,
        spread: Spread | None = None,
    ) -> None:
        require_one_part(length, parts, spread)
        self.spread = spread
        self.length = require_size("length", length) if spread is None else spread.length
        self.size = require_size("size", size)
        self.dtype = require_dtype(dtype)
        self.device = torch.empty(0, device=device).device
        self.storage = require_storage(storage)
        self.parts = part_lengths(parts, self.length)
        self.version = 0
        self.fused = require_fused(fused, self.dtype, self.device, self.storage)
        fits = self.fused is not False and self.storage is None
        self._kernels = WindowKernels.of(self.dtype, self.device) if fits else None
        with torch.inference_mode(False):  # what is made there can never be changed outside
            self._blocks = window_blocks.empty(
                self.parts, self.size, self.dtype, self.device, self.storage
            )
            self._gram = window_gram.empty(len(self.parts), self.size, self.device)
        self._order: list[int] = []  # slots, oldest row first; they are 0 ... count - 1
        self._rounded: set[int] = set()  # slots whose Gram entries came from float32 products

    # ------------------------------------------------------------------- reading
    @property
    def count(self) -> int:
        """How many rows are held."""
        return len(self._order)

    @property
    def whole_parts(self) -> tuple[int, ...]:
        """Lengths of the parts of whole rows, on all processes together."""
        return self.parts if self.spread is None else (self.spread.size,)

    @property
    def rounded(self) -> bool:
        """Whether some Gram entries came from float32 products: see :meth:`polish`."""
        return bool(self._rounded)

    @property
    def nbytes(self) -> int:
        """Bytes that the window takes, with its Gram matrices."""
        return sum(block.rows.nbytes for block in self._blocks) + self._gram.nbytes

    def slot(self, index: int) -> int:
        """Where a row is stored; ``index`` 0 is the oldest, -1 the newest.

        Raises:
            IndexError: If there is no such row.
        """
        return window_order.slot_of(self._order, index)

    def row(self, index: int) -> Tensor:
        """A copy of one row ``[P]``, as it is stored; 0 is the oldest, -1 the newest."""
        return window_blocks.rows(self._blocks, [self.slot(index)], self.device)[0]

    def rows(self) -> Tensor:
        """A copy of all rows ``[count, P]``, oldest first, on the device."""
        return window_blocks.rows(self._blocks, self._order, self.device)

    def gram(self) -> Tensor:
        """Gram matrices ``[parts, count, count]`` in float64, oldest row first."""
        return self._gram[:, self._order][:, :, self._order]

    def stored_gram(self) -> Tensor:
        """The same in the order of :meth:`slot`, as a view: no copy, and nothing waits."""
        return self._gram[:, : self.count, : self.count]

    def columns(self, indices: Tensor) -> Tensor:
        """Some columns ``[count, n]`` of the window in float64, in the order of :meth:`slot`."""
        self._await_copies()
        return window_blocks.columns(self._blocks, self.count, indices, self.device)

    def pieces(self) -> Iterator[tuple[int, int, int, Tensor]]:
        """All that is stored, once: ``(part, start, stop, rows [count, stop - start])``.

        Rows are in the order of :meth:`slot`, on the device: views where they live there.
        """
        for block in self._blocks:
            rows = block.rows[: self.count].to(self.device, non_blocking=True)
            yield block.part, block.start, block.stop, rows

    def inner(self, columns: Tensor, *, exact: bool = False) -> Tensor:
        """``G X`` for ``X`` ``[P, K]``, part by part: ``[parts, count, K]`` in float64."""
        shape = (len(self.parts), self.count, columns.shape[1])
        out = torch.zeros(shape, dtype=F64, device=self.device)
        for part, start, stop, rows in self.pieces():
            x = columns[start:stop]
            out[part] += row_products.inner(rows, x, exact=exact, kernels=self._kernels)
        return self.summed(out)

    def summed(self, numbers: Tensor) -> Tensor:
        """Numbers that were summed over the entries here, over those of all processes."""
        return numbers if self.spread is None else self.spread.sum(numbers)

    def combination(self, coefficients: Tensor, *, exact: bool = False) -> Tensor:
        """``G^T C`` ``[P, K]`` for ``C`` ``[parts, count, K]`` in float64.

        The result is in float64 where rows are or ``exact`` is set, else in float32.
        """
        dtype = F64 if exact or self.dtype == F64 else torch.float32
        shape = (coefficients.shape[2], self.length)
        out = torch.empty(shape, dtype=dtype, device=self.device)
        for part, start, stop, rows in self.pieces():
            target, weights = out[:, start:stop], coefficients[part]
            row_products.combination(rows, weights, target, exact=exact, kernels=self._kernels)
        return out.mT

    # ------------------------------------------------------------------ changing
    def push(self, rows: Tensor, *, skip_non_finite: bool = False, check: bool = True) -> int:
        """Adds a row ``[P]``, or rows ``[k, P]`` in order; the oldest make room for them.

        Rows are converted to the stored type. Costs one pass over the window for one row, and
        one pass for all of several.

        Args:
            rows: Floating-point, on the window's device. They are copied.
            skip_non_finite: Leave out rows with NaN or infinite entries instead of refusing them.
            check: Whether to look for such entries at all, which waits for a CUDA device. Without
                it a row that is not finite is found by the next solve.

        Returns:
            How many rows were taken.

        Raises:
            TypeError: If ``rows`` is no floating-point tensor.
            ValueError: If its shape or device does not fit.
            FloatingPointError: If a row is not finite; the window is then as it was.
        """
        new = as_rows(rows, self.length, self.device)
        # beyond the stored type's range is as bad as infinite
        stored = new.to(self.dtype)
        if check:
            stored = finite_rows(stored, skip=skip_non_finite, source=new, spread=self.spread)
        if len(stored):
            self._insert(stored[-self.size :])
        return len(stored)

    def _insert(self, new: Tensor) -> None:
        slots, self._order = window_order.with_new(self._order, len(new), self.size)
        self.version += 1
        exact = len(new) >= MANY or self.dtype == F64
        self._rounded = self._rounded.difference(slots).union([] if exact else slots)
        if len(new) == 1 and self._kernels is not None:
            products = self._pushed(self._kernels, new[0].contiguous(), slots[0])
        else:
            window_blocks.write(self._blocks, new, slots)
            products = self._exact(new, slots) if exact else self.inner(new.mT)
        window_gram.write(self._gram, products, slots)

    def _pushed(self, kernels: WindowKernels, row: Tensor, slot: int) -> Tensor:
        """Writes a row and returns all rows' products with it, reading the others once."""
        out = torch.empty((len(self.parts), self.count, 1), dtype=F64, device=self.device)
        for block in self._blocks:
            own = row[block.start : block.stop]
            out[block.part, :, 0] = kernels.push(block.rows, self.count, slot, own)
        return self.summed(out)

    def _exact(self, new: Tensor, slots: list[int]) -> Tensor:
        """Products of all rows with those in some slots, in float64, in one pass."""
        whole = slots == list(range(self.count))
        shape = (len(self.parts), self.count, len(new))
        out = torch.zeros(shape, dtype=F64, device=self.device)
        for part, start, stop, rows in self.pieces():
            out[part] += row_products.gram(rows, rows if whole else new[:, start:stop])
        return self.summed(out)

    def polish(self) -> bool:
        """Computes Gram entries that came from float32 products again, in float64, in one pass.

        Returns:
            Whether there were any.
        """
        if not self._rounded:
            return False
        slots = sorted(self._rounded)
        self._rounded = set()
        self.version += 1
        new = window_blocks.rows(self._blocks, slots, self.device)
        window_gram.write(self._gram, self._exact(new, slots), slots)
        return True

    def _await_copies(self) -> None:
        """Before the host itself reads or writes rows that a CUDA device copies in its own time."""
        if self.storage == "cpu" and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def evict(self) -> None:
        """Forgets the oldest row.

        Raises:
            IndexError: If there is none.
        """
        self.remove(0)

    def remove(self, index: int) -> None:
        """Forgets one row; 0 is the oldest, -1 the newest. At most one row is moved.

        Raises:
            IndexError: If there is no such row.
        """
        last = self.count - 1
        self._order, slot = window_order.without(self._order, index)
        self._rounded = {slot if own == last else own for own in self._rounded - {slot}}
        self.version += 1
        if slot == last:
            return
        self._await_copies()
        for block in self._blocks:
            block.rows[slot].copy_(block.rows[last])
        window_gram.move(self._gram, last, slot)

    def clear(self) -> None:
        """Forgets all rows."""
        self._order, self._rounded = [], set()
        self.version += 1

    def resize(self, size: int) -> None:
        """Changes how many rows are kept at most; the oldest are dropped where there are more.

        Both windows are in memory while rows are copied.

        Raises:
            TypeError: If ``size`` is no integer.
            ValueError: If it is not positive.
            MemoryError: If the new window does not fit beside the old one.
        """
        other = Window(
            self.length, size, dtype=self.dtype, device=self.device, parts=self.parts,
            storage=self.storage, fused=self.fused, spread=self.spread,
        )  # fmt: skip
        other.load_state_dict(self.state_dict())
        self.size, self._blocks, self._gram = other.size, other._blocks, other._gram
        self._order, self._rounded = other._order, other._rounded
        self.version += 1

    # ------------------------------------------------------------- saving, loading
    def state_dict(self) -> dict[str, Any]:
        """All that the window is: tensors and numbers.

        Tensors share memory with the window, as those of any ``state_dict`` do.
        """
        self._await_copies()
        settings = window_state.settings(self.length, self.size, self.dtype, self.parts)
        rows, gram = [block.rows[: self.count] for block in self._blocks], self.stored_gram()
        where = {"order": list(self._order), "rounded": sorted(self._rounded)}
        return settings | where | {"rows": rows, "gram": gram}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the rows of a state, bitwise and in place; if this is smaller, the newest ones.

        Raises:
            ValueError: If the state is that of rows of another length, type or split into parts.
        """
        mine = window_state.settings(self.length, self.size, self.dtype, self.parts)
        window_state.require_alike(mine, state)
        self._await_copies()
        kept, order = window_order.places(state["order"], self.size)
        window_blocks.take(state["rows"], kept, self._blocks)
        self._order = order
        self._rounded = {new for new, old in enumerate(kept) if old in state["rounded"]}
        window_gram.take(self._gram, state["gram"], kept)
        self.version += 1

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the window to one file (safetensors), which appears whole or not at all.

        Raises:
            ValueError: If its rows are spread over processes.
        """
        return window_state.write(path, self.state_dict(), self.spread)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        storage: str | None = None,
    ) -> Window:
        """Reads a window from a file that :meth:`save` wrote, bitwise.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, or holds no window.
        """
        state, made = window_state.read(path)
        out = cls(**made, device=device, storage=storage)
        out.load_state_dict(state)
        return out

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        parts = "" if len(self.parts) == 1 else f", {len(self.parts)} parts"
        where = "" if self.storage is None else f", rows on {self.storage}"
        return (
            f"<Window: {self.count} of {self.size} rows of length {self.length}, "
            f"{dtype}{parts}, {self.device}{where}>"
        )
