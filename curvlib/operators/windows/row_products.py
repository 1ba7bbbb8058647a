r"""Products with a tall stack of rows ``G`` ``[m, n]``: ``G X``, ``G^T C`` and ``G G'^T``.

These are memory-bound: one pass over the rows is what they cost, and no copy of the rows is made.
Two precisions are offered, because a pass in float64 costs three to four passes in float32:

fast
    Sums run over chunks of a few thousand columns, in the precision of the rows (bfloat16: in
    float32, where products of bfloat16 numbers are exact), and the sums of chunks in float64. One
    long float32 product of a matrix and a vector is several thousand times less accurate: BLAS
    adds ``n`` terms one after the other (7e-5 against 1e-8 at ``n = 1e6`` where terms have one
    sign).
exact
    Chunks are converted to float64 first, so that only float64 rounds.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from curvlib.operators.windows.kernels import WindowKernels

F64 = torch.float64

#: Bytes of a converted chunk: small enough for a core's cache, large enough for few calls.
CHUNK_BYTES = 2**21

#: Terms that float32 sums at most, before float64 takes over.
TERMS = 8192


def inner(
    rows: Tensor, columns: Tensor, *, exact: bool = False, kernels: WindowKernels | None = None
) -> Tensor:
    """``G X`` in float64.

    Args:
        rows: ``[m, n]``, float32, float64 or bfloat16.
        columns: ``[n, K]``, of any floating-point type.
        exact: Whether products and sums are in float64; else chunk sums in float32.
        kernels: For one column, unless ``exact``: what takes the pass instead.

    Returns:
        ``[m, K]``, float64.
    """
    m, n = rows.shape
    if kernels is not None and not exact and columns.shape[1] == 1:
        return kernels.inner(rows, columns[:, 0])[:, None]
    out = torch.zeros((m, columns.shape[1]), dtype=F64, device=rows.device)
    if rows.dtype == F64:
        return out.addmm_(rows, columns.to(F64)) if n else out
    if exact:
        for start, stop, chunk in converted(rows, F64):
            out.addmm_(chunk, columns[start:stop].to(F64))
        return out
    columns = columns.float()
    if rows.dtype == torch.float32:
        step = TERMS if m >= 32 else 2 * TERMS  # few rows: fewer calls
        chunks = rows.split(step, 1)
        parts = columns.split(step, 0)
    else:
        return _converted_inner(rows, columns, out)
    sums = torch.empty((len(chunks), m, columns.shape[1]), device=rows.device)
    if columns.shape[1] == 1:
        for total, chunk, part in zip(sums, chunks, parts, strict=True):
            torch.mv(chunk, part[:, 0], out=total[:, 0])
    else:
        for total, chunk, part in zip(sums, chunks, parts, strict=True):
            torch.mm(chunk, part, out=total)
    return torch.sum(sums, 0, dtype=F64, out=out)


def _converted_inner(rows: Tensor, columns: Tensor, out: Tensor) -> Tensor:
    vector = columns[:, 0] if columns.shape[1] == 1 else None
    for start, stop, chunk in converted(rows, torch.float32):
        if vector is not None:
            out[:, 0] += torch.mv(chunk, vector[start:stop])
        else:
            out += chunk @ columns[start:stop]
    return out


def combination(
    rows: Tensor,
    coefficients: Tensor,
    out: Tensor,
    *,
    exact: bool = False,
    kernels: WindowKernels | None = None,
) -> None:
    """Writes ``G^T C``.

    Args:
        rows: ``[m, n]``, float32, float64 or bfloat16.
        coefficients: ``[m, K]``, float64.
        out: ``[K, n]``, the transpose of the result, in float32 or float64.
        exact: Whether products and sums are in float64.
        kernels: For one column, unless ``exact``: what takes the pass instead.
    """
    if kernels is not None and not exact and len(out) == 1:
        kernels.combination(rows, coefficients[:, 0], out[0])
        return
    if exact and rows.dtype != F64:
        for start, stop, chunk in converted(rows, F64):
            out[:, start:stop] = coefficients.mT @ chunk
        return
    dtype = F64 if rows.dtype == F64 else torch.float32
    weights = coefficients.to(dtype)
    if rows.dtype == dtype:
        _weighted(rows, weights, out)
        return
    for start, stop, chunk in converted(rows, dtype):
        _weighted(chunk, weights, out[:, start:stop])


def _weighted(rows: Tensor, weights: Tensor, out: Tensor) -> None:
    if out.dtype != rows.dtype:
        out.copy_(weights.mT @ rows)
    elif len(out) == 1:
        torch.mv(rows.mT, weights[:, 0], out=out[0])
    else:
        torch.mm(weights.mT, rows, out=out)


def gram(rows: Tensor, others: Tensor) -> Tensor:
    """``G G'^T`` ``[m, k]`` in float64, products and sums included: ``[m, n]`` and ``[k, n]``."""
    out = torch.zeros((len(rows), len(others)), dtype=F64, device=rows.device)
    if rows.dtype == F64:
        return out.addmm_(rows, others.to(F64).mT) if rows.shape[1] else out
    for start, stop, chunk in converted(rows, F64):
        if others is rows:
            _add_lower(out, chunk)
        else:
            out.addmm_(chunk, others[:, start:stop].to(F64).mT)
    return out.tril() + out.tril(-1).mT if others is rows else out


def _add_lower(out: Tensor, chunk: Tensor) -> None:
    """Adds the lower triangle of ``chunk chunk^T``, in four bands: 5/8 of the work of all."""
    step = -(-len(chunk) // 4)
    for low in range(0, len(chunk), step):
        high = low + step
        out[low:high, :high].addmm_(chunk[low:high], chunk[:high].mT)


def lower_product(lower: Tensor, rows: Tensor, out: Tensor | None = None) -> Tensor:
    """``L G`` for a lower triangular ``L`` ``[m, m]``, in four bands: 5/8 of the work of all."""
    out = torch.empty_like(rows) if out is None else out
    step = -(-len(lower) // 4)
    for low in range(0, len(lower), step):
        high = low + step
        torch.mm(lower[low:high, :high], rows[:high], out=out[low:high])
    return out


def converted(rows: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """Chunks of columns in another type: ``(start, stop, chunk [m, stop - start])``.

    One workspace of about :data:`CHUNK_BYTES` is used for all of them: a chunk is overwritten by
    the next. Rows that have the type already come as views.
    """
    m, n = rows.shape
    step = max(64, CHUNK_BYTES // (max(m, 1) * dtype.itemsize))
    if rows.device.type != "cpu":
        step *= 16  # launches cost more than what a cache saves
    work = None if rows.dtype == dtype else rows.new_empty((m, min(step, n)), dtype=dtype)
    for start in range(0, n, step):
        stop = min(start + step, n)
        if work is None:
            yield start, stop, rows[:, start:stop]
        else:
            chunk = work[:, : stop - start]
            chunk.copy_(rows[:, start:stop])
            yield start, stop, chunk
