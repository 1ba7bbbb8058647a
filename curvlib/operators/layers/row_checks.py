"""Whether rows that a layer took in a batch are those that an example alone gives it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from curvlib.operators.layers.use import Use


def last_rows(use: Use, n: int) -> Tensor:
    """Inputs of the last example, examples along the first axis or folded into it."""
    x = use.x[0] if use.given else use.x
    own = x.reshape(n, -1)[-1]
    if use.inside is None or use.inside.keep is None:
        return own
    keep = use.inside.keep.reshape(n, -1)[-1]  # of sequences of several lengths
    return own.reshape(len(keep), -1)[keep]


def among(single: Tensor, output: Tensor, n: int) -> bool:
    """Whether the last of ``n`` examples has its output where it would be; or that is unknown."""
    rows = [output.select(d, n - 1) for d in range(output.ndim) if output.shape[d] == n]
    if output.ndim and output.shape[0] % n == 0:
        rows.append(output.reshape(n, -1)[n - 1])
    rows = [row for row in rows if row.numel() == single.numel()]
    return not rows or any(close(row, single) for row in rows)


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two inputs are the same up to rounding of different kernels."""
    a, b = a.detach().reshape(-1), b.detach().reshape(-1)
    if a.shape != b.shape:
        return False
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    if not bool(torch.isfinite(a).all()):
        return True  # what is not finite is named later
    gap = torch.linalg.vector_norm((a - b).double())
    scale = torch.linalg.vector_norm(a.double()) + torch.linalg.vector_norm(b.double())
    tolerance: float = 10.0 * torch.finfo(a.dtype).eps ** 0.5
    return float(gap) <= tolerance * float(scale)
