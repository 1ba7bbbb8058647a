r"""Phases of M-FAC before it runs: see :mod:`curvlib.core.plan`.

With :math:`m` rows of :math:`s` bytes a number, in :math:`q` parts, on :math:`R` ranks:

=========  ==============================  ====================  ================================
phase      work                            memory                sharded ranks
=========  ==============================  ====================  ================================
window     none                            :math:`s m P + 8 q    :math:`s m P / R + 8 q m^2`
                                           m^2`
row        a gradient of one batch, and    the gradient's        :math:`2 m P / R`; sends
           :math:`2 m P`                                         :math:`2 \frac{R - 1}{R} 8 q m`
direction  :math:`4 m P + q m^3 / 3`       two vectors           :math:`4 m P / R`; sends
                                                                 :math:`2 \frac{R - 1}{R} 8 q m`
=========  ==============================  ====================  ================================

Data-parallel ranks hold the same window, and send nothing but the gradient's all-reduce, which
training has anyway. A row and a direction are one step of :class:`curvlib.optim.MFACSGD`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from curvlib.core.plan import Phase, Ranks
from curvlib.core.product_cost import ProductCost
from curvlib.operators.windows.arguments import require_dtype, require_size, require_storage
from curvlib.operators.windows.blocks import BLOCK_BYTES


def window_phases(
    gradient: ProductCost,
    ranks: Ranks,
    *,
    size: int,
    dtype: torch.dtype = torch.float32,
    parts: int = 1,
    storage: str | None = None,
) -> Iterator[Phase]:
    """A window of gradients, a row, and a direction: see :func:`curvlib.mfac_window`.

    Args:
        gradient: What a gradient costs: :func:`curvlib.operators.measured_product`.
        ranks: Who shares it; each has a batch of its own.
        size: ``m``.
        dtype: How rows are stored.
        parts: How many parts have a matrix of their own.
        storage: ``"cpu"`` keeps rows in host memory, which is not counted then.

    Raises:
        TypeError: If rows cannot be stored in the type.
        ValueError: If a number is not positive.

    Example:
        >>> cost = ProductCost(1000, 4000, 4000, 4000, 1, 1, *9 * [0.0])
        >>> next(window_phases(cost, Ranks(), size=10)).kept
        40800.0
    """
    m, item = require_size("size", size), require_dtype(dtype).itemsize
    n, vector = gradient.size, ranks.held(gradient.vector)
    rows = ranks.held(m * n * item)
    gram = 8.0 * require_size("parts", parts) * m**2
    elsewhere = require_storage(storage) is not None
    block = min(rows, 2.0 * BLOCK_BYTES) if elsewhere else 0.0
    yield Phase("window", 0.0, kept=gram + (0.0 if elsewhere else rows), working=block)
    own = 2.0 * m * n / (ranks.count if ranks.sharded else 1)
    sums = ranks.all_reduce(8.0 * parts * m) if ranks.sharded else 0.0
    sent = gradient.traffic(ranks)
    if ranks.sharded:
        sent /= gradient.batches(ranks)  # of one batch
    yield Phase(
        "row",
        gradient.flops * gradient.examples / gradient.total + own,
        working=gradient.memory(ranks) + vector + block,
        traffic=sent + sums,
    )
    yield Phase(
        "direction", 2.0 * own + parts * m**3 / 3, working=2.0 * vector + block, traffic=sums
    )
