r"""Passes over the rows of a window on a CUDA device, each in one kernel.

For ``c`` rows of length ``n`` in ``s`` bytes for each number, with the floor that any method has:

===================== =========================================== ==========================
pass                  bytes read and written                      floor
===================== =========================================== ==========================
:meth:`push`          :math:`(c - 1) n s + 2 n s` and             :math:`(c + 1) n s`
                      :math:`16 c \lceil n / 4096 \rceil` of sums
:meth:`inner`         :math:`c n s + 4 n` and as many of sums     :math:`c n s + 4 n`
:meth:`combination`   :math:`c n s + 4 n`                         :math:`c n s + 4 n`
===================== =========================================== ==========================

A push reads the other rows once, writes the new one, and has its row of the Gram matrix. The ways
in torch read each row as often, but convert bfloat16 rows to float32 in memory first, which adds
:math:`8 c n` bytes.

Rows are float32 or bfloat16. In the first two passes, products and sums of the 4 or 8 entries of
16 bytes are in float32 (of bfloat16 numbers, products are exact there) and all other sums in
float64, in the same order on every device: results repeat bitwise, and are within what
:data:`curvlib.operators.windows.system.CHUNK_ERROR` allows. A combination adds the rows one after
the other in float32, as :mod:`curvlib.operators.windows.row_products` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvlib.core.raw_kernels import THREADS, Kernels

F64 = torch.float64

#: The kernels.
SOURCE = Path(__file__).with_suffix(".cu")

#: Columns of a block in passes that sum over columns.
TILE = 4096

_NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


@dataclass(frozen=True, eq=False)
class WindowKernels:
    """Passes over rows of one type on one device.

    Attributes:
        kernels: The kernels.
        dtype: Of the rows.
    """

    kernels: Kernels
    dtype: torch.dtype

    @classmethod
    def of(cls, dtype: torch.dtype, device: torch.device) -> WindowKernels | None:
        """Those for rows of a type; ``None`` where there are none, or CuPy cannot be used."""
        if dtype not in _NAMES:
            return None
        kernels = Kernels.of(SOURCE, device)
        return None if kernels is None else cls(kernels, dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return WindowKernels.of, (self.dtype, self.kernels.device)

    def push(self, rows: Tensor, count: int, slot: int, row: Tensor) -> Tensor:
        """Writes a row to a slot; its inner products with all rows, ``[count]`` in float64.

        Args:
            rows: ``[m, n]``, row after row in memory.
            count: How many of them there are, the new one included.
            slot: Where it belongs.
            row: ``[n]``, contiguous, of the rows' type.
        """
        return self._summed("push", rows, count, (slot, row))

    def inner(self, rows: Tensor, x: Tensor) -> Tensor:
        """Inner products of all rows ``[count, n]`` with ``x`` ``[n]``, ``[count]`` in float64."""
        x = x.to(torch.float32).contiguous()
        return self._summed("inner", rows, len(rows), (x,))

    def _summed(
        self, name: str, rows: Tensor, count: int, more: tuple[int | Tensor, ...]
    ) -> Tensor:
        columns = rows.shape[1]
        tiles = -(-columns // TILE)
        sums = torch.empty((tiles, count), dtype=F64, device=rows.device)
        shape = (rows.stride(0), columns, count)
        self.kernels.launch(f"{name}_{_NAMES[self.dtype]}", (tiles, 1), rows, *shape, *more, sums)
        return sums.sum(0)

    def combination(self, rows: Tensor, weights: Tensor, out: Tensor) -> None:
        """Writes ``weights @ rows``.

        Args:
            rows: ``[count, n]``.
            weights: ``[count]``, float64.
            out: ``[n]``, float32, contiguous.
        """
        count, columns = rows.shape
        blocks = -(-columns // (THREADS * 16 // rows.itemsize))
        weights = weights.to(torch.float32).contiguous()
        shape = (rows.stride(0), columns, count)
        name = f"combination_{_NAMES[self.dtype]}"
        self.kernels.launch(name, (blocks, 1), rows, *shape, weights, out)
