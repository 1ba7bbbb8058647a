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
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvlib.core.memory import available_memory
from curvlib.operators import row_products, window_gram, window_state
from curvlib.operators.window_arguments import (
    as_rows,
    finite_rows,
    part_lengths,
    require_dtype,
    require_fused,
    require_memory,
    require_size,
    require_storage,
)
from curvlib.operators.window_kernels import WindowKernels

F64 = torch.float64

#: Bytes of a block of columns of a window that is kept off the device.
BLOCK_BYTES = 2**26

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
            :mod:`curvlib.operators.window_kernels`), which need CuPy. ``None``: where they can be
            had; numbers are the same within rounding.

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
    ) -> None:
        self.length = require_size("length", length)
        self.size = require_size("size", size)
        self.dtype = require_dtype(dtype)
        self.device = torch.empty(0, device=device).device
        self.storage = require_storage(storage)
        self.parts = part_lengths(parts, self.length)
        self.version = 0
        self.fused = require_fused(fused, self.dtype, self.device, self.storage)
        fits = self.fused is not False and self.storage is None
        self._kernels = WindowKernels.of(self.dtype, self.device) if fits else None
        self._allocate()

    def _allocate(self) -> None:
        home = torch.device("cpu") if self.storage == "cpu" else self.device
        require_memory(
            self.length, self.size, self.dtype, home, available_memory(home), len(self.parts)
        )
        pinned = home.type == "cpu" and self.device.type == "cuda"
        shape = (len(self.parts), self.size, self.size)
        with torch.inference_mode(False):  # what is made there can never be changed outside
            self._blocks = [
                torch.empty((self.size, n), dtype=self.dtype, device=home, pin_memory=pinned)
                for n in (stop - start for _, start, stop in self._cuts())
            ]
            self._gram = torch.zeros(shape, dtype=F64, device=self.device)
        self._order: list[int] = []  # slots, oldest row first; they are 0 ... count - 1
        self._rounded: set[int] = set()  # slots whose Gram entries came from float32 products

    def _cuts(self) -> Iterator[tuple[int, int, int]]:
        """The part, start and stop of each block of columns."""
        longest = max(1, BLOCK_BYTES // (self.size * self.dtype.itemsize))
        start = 0
        for part, length in enumerate(self.parts):
            stop, step = start + length, longest if self.storage == "cpu" else length
            for first in range(start, stop, step):
                yield part, first, min(first + step, stop)
            start = stop

    # ------------------------------------------------------------------- reading
    @property
    def count(self) -> int:
        """How many rows are held."""
        return len(self._order)

    @property
    def rounded(self) -> bool:
        """Whether some Gram entries came from float32 products: see :meth:`polish`."""
        return bool(self._rounded)

    @property
    def nbytes(self) -> int:
        """Bytes that the window takes, with its Gram matrices."""
        return sum(t.nbytes for t in self._blocks) + self._gram.nbytes

    def slot(self, index: int) -> int:
        """Where a row is stored; ``index`` 0 is the oldest, -1 the newest.

        Raises:
            IndexError: If there is no such row.
        """
        if not -self.count <= index < self.count:
            raise IndexError(f"there is no row {index} in a window that holds {self.count} rows")
        return self._order[index]

    def row(self, index: int) -> Tensor:
        """A copy of one row ``[P]``, as it is stored; 0 is the oldest, -1 the newest."""
        return self._at(self.slot(index))

    def rows(self) -> Tensor:
        """A copy of all rows ``[count, P]``, oldest first, on the device."""
        out = torch.empty((self.count, self.length), dtype=self.dtype, device=self.device)
        for i, slot in enumerate(self._order):
            for (_, start, stop), block in zip(self._cuts(), self._blocks, strict=True):
                out[i, start:stop] = block[slot]
        return out

    def gram(self) -> Tensor:
        """Gram matrices ``[parts, count, count]`` in float64, oldest row first."""
        return self._gram[:, self._order][:, :, self._order]

    def stored_gram(self) -> Tensor:
        """The same in the order of :meth:`slot`, as a view: no copy, and nothing waits."""
        return self._gram[:, : self.count, : self.count]

    def columns(self, indices: Tensor) -> Tensor:
        """Some columns ``[count, n]`` of the window in float64, in the order of :meth:`slot`."""
        out = torch.empty((self.count, len(indices)), dtype=F64, device=self.device)
        for (_, start, stop), block in zip(self._cuts(), self._blocks, strict=True):
            inside = ((indices >= start) & (indices < stop)).nonzero()[:, 0]
            if len(inside):
                which = (indices[inside] - start).to(block.device)
                out[:, inside] = block[: self.count][:, which].to(self.device, F64)
        return out

    def pieces(self) -> Iterator[tuple[int, int, int, Tensor]]:
        """All that is stored, once: ``(part, start, stop, rows [count, stop - start])``.

        Rows are in the order of :meth:`slot`, on the device: views where they live there.
        """
        for (part, start, stop), block in zip(self._cuts(), self._blocks, strict=True):
            yield part, start, stop, block[: self.count].to(self.device, non_blocking=True)

    def inner(self, columns: Tensor, *, exact: bool = False) -> Tensor:
        """``G X`` for ``X`` ``[P, K]``, part by part: ``[parts, count, K]`` in float64."""
        shape = (len(self.parts), self.count, columns.shape[1])
        out = torch.zeros(shape, dtype=F64, device=self.device)
        for part, start, stop, rows in self.pieces():
            x = columns[start:stop]
            out[part] += row_products.inner(rows, x, exact=exact, kernels=self._kernels)
        return out

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
            kept = finite_rows(stored, skip=skip_non_finite, source=new)
            if kept is not None:
                stored = stored[kept]
        taken = len(stored)
        stored = stored[-self.size :] if taken > self.size else stored
        if not taken:
            return 0
        self._insert(stored)
        return taken

    def _insert(self, new: Tensor) -> None:
        k, free = len(new), self.size - self.count
        slots = list(range(self.count, self.count + min(k, free)))
        reused = k - len(slots)
        slots += self._order[:reused]
        self._order = self._order[reused:] + slots
        self.version += 1
        if k == 1 and self._kernels is not None:
            self._rounded.add(slots[0])
            self._push(self._kernels, new[0].contiguous(), slots[0])
            return
        for (_, start, stop), block in zip(self._cuts(), self._blocks, strict=True):
            for row, slot in zip(new, slots, strict=True):
                block[slot].copy_(row[start:stop], non_blocking=True)
        exact = k >= MANY or self.dtype == F64
        self._rounded -= set(slots)
        self._rounded |= set() if exact else set(slots)
        self._compute_gram(new, slots, exact=exact)

    def _push(self, kernels: WindowKernels, row: Tensor, slot: int) -> None:
        """Writes a row and its Gram entries, reading the others once."""
        shape = (len(self.parts), self.count, 1)
        products = torch.empty(shape, dtype=F64, device=self.device)
        for (part, start, stop), block in zip(self._cuts(), self._blocks, strict=True):
            products[part, :, 0] = kernels.push(block, self.count, slot, row[start:stop])
        window_gram.write(self._gram, products, [slot])

    def _compute_gram(self, new: Tensor, slots: list[int], *, exact: bool) -> None:
        """Writes rows and columns of the Gram matrices, from the stored rows, in one pass."""
        whole = slots == list(range(self.count))
        shape = (len(self.parts), self.count, len(new))
        products = torch.zeros(shape, dtype=F64, device=self.device)
        for part, start, stop, rows in self.pieces():
            if exact:
                others = rows if whole else new[:, start:stop]
                products[part] += row_products.gram(rows, others)
            else:
                products[part] += row_products.inner(rows, new[:, start:stop].mT)
        window_gram.write(self._gram, products, slots)

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
        new = torch.stack([self._at(slot) for slot in slots])
        self._compute_gram(new, slots, exact=True)
        return True

    def _at(self, slot: int) -> Tensor:
        return torch.cat([block[slot].to(self.device) for block in self._blocks])

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
        slot, last = self.slot(index), self.count - 1
        self._order.remove(slot)
        self._rounded.discard(slot)
        self.version += 1
        if slot == last:
            return
        for block in self._blocks:
            block[slot].copy_(block[last])
        window_gram.move(self._gram, last, slot)
        self._order[self._order.index(last)] = slot
        if last in self._rounded:
            self._rounded.remove(last)
            self._rounded.add(slot)

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
            storage=self.storage, fused=self.fused,
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
        settings = window_state.settings(self.length, self.size, self.dtype, self.parts)
        rows, gram = [block[: self.count] for block in self._blocks], self.stored_gram()
        where = {"order": list(self._order), "rounded": sorted(self._rounded)}
        return settings | where | {"rows": rows, "gram": gram}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the rows of a state, bitwise and in place; if this is smaller, the newest ones.

        Raises:
            ValueError: If the state is that of rows of another length, type or split into parts.
        """
        mine = window_state.settings(self.length, self.size, self.dtype, self.parts)
        window_state.require_alike(mine, state)
        kept, order = window_state.places(state["order"], self.size)
        starts = [start for _, start, _ in self._cuts()]
        window_state.copy_rows(state["rows"], kept, self._blocks, starts)
        self._order = order
        self._rounded = {new for new, old in enumerate(kept) if old in state["rounded"]}
        gram = state["gram"][:, kept][:, :, kept]
        self._gram[:, : self.count, : self.count] = gram.to(self.device)
        self.version += 1

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the window to one file (safetensors), which appears whole or not at all."""
        return window_state.write(path, self.state_dict())

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
