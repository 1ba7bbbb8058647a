r"""Rademacher probes on a CUDA device: made, and multiplied with their products, by position.

The signs of a probe are the bits of a counter-based generator (:mod:`curvlib.estimators.philox`)
under a key of 8 bytes. An operator has to be given its columns, so probes are written once for
their product. What is read off the product makes the signs again in registers, so the probe is not
read: for ``K`` products ``y`` of length ``n`` in ``s`` bytes for each number

=============================== ===================================== ====================
pass                            bytes read and written                floor
=============================== ===================================== ====================
:meth:`ProbeKernels.fill`       :math:`K n s`                         the same
:meth:`ProbeKernels.read`       :math:`K n s`, with diagonals         the same
                                :math:`(K + 4) n s`
=============================== ===================================== ====================

and 16 bytes for each product and 2048 columns. In torch, inner products of float32 vectors take
about :math:`40 K n` bytes (they are converted to float64), and diagonals :math:`44 K n` more.

Sums are in float64, those of tiles added in the same order on every device. Diagonals go through
the same operations on each entry as in :func:`curvlib.estimators.sampling.regress`, but for the
contraction of products and sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from curvlib.core.raw_kernels import THREADS, Kernels
from curvlib.estimators.philox import BITS

#: The kernels.
SOURCE = Path(__file__).with_suffix(".cu")

#: Columns of a block that writes probes, and of one that reads products.
FILLED, TILE = THREADS * BITS, THREADS * 8

_NAMES = {torch.float32: "float32", torch.float64: "float64"}


@dataclass(frozen=True, eq=False)
class ProbeKernels:
    """Passes over probes and products on one device.

    Attributes:
        kernels: The kernels.
    """

    kernels: Kernels

    @classmethod
    def of(cls, rows: Tensor) -> ProbeKernels | None:
        """Those for rows ``[K, n]``; ``None`` where there are none, or CuPy cannot be used."""
        if rows.dtype not in _NAMES or rows.stride(1) != 1:
            return None
        kernels = Kernels.of(SOURCE, rows.device)
        return None if kernels is None else cls(kernels)

    def fill(self, rows: Tensor, keys: Tensor) -> None:
        """Overwrites rows ``[K, n]`` with the probes of keys ``[K]``."""
        count, columns = rows.shape
        grid = (-(-columns // FILLED), count)
        self.kernels.launch(f"fill_{_NAMES[rows.dtype]}", grid, rows, rows.stride(0), columns, keys)

    def read(
        self,
        products: Tensor,
        keys: Tensor,
        *,
        known: int = 0,
        diagonal: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Reads products of probes once: inner products with their probes, and squared norms.

        Args:
            products: ``[K, n]``, row after row in memory.
            keys: Of the probes, ``[K]``.
            known: How many observations the diagonal holds already.
            diagonal: Slopes of the regressions of products on probes, ``[n]``: see
                :func:`curvlib.estimators.sampling.regress`. Changed in place.
            residual: Their sums of squared residuals, ``[n]``. Changed in place.

        Returns:
            Both ``[K]``, float64 on the device.
        """
        count, columns = products.shape
        tiles = -(-columns // TILE)
        sums = torch.empty((tiles, count, 2), dtype=torch.float64, device=products.device)
        shape = (products.stride(0), columns, count)
        name = f"read_{_NAMES[products.dtype]}"
        self.kernels.launch(
            name, (tiles, 1), products, *shape, keys, known, diagonal, residual, sums
        )
        inner, squares = sums.sum(0).unbind(1)
        return inner, squares
