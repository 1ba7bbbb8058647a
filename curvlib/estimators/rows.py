r"""Long vectors as rows ``[K, n]``: inner products, combinations and orthonormalization.

Blocks of rows are held as tuples, so that a block is added without a copy. What is small comes
back in float64 on the CPU. Sums over a row are taken in the vectors' own type over spans that fit
a CPU's caches, and added up in float64: as accurate as float64 conversions for the purposes of
estimates, and no slower than memory.

Where vectors are spread over processes, rows are this process's part of them, and inner products
are summed over the processes, all those of a call at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from curvlib.core.ranks.spread import Spread

Blocks = tuple[Tensor, ...]


def chunk_length(device: torch.device) -> int:
    """Entries of a vector that are worked on at once: on a CPU, as many as stay in cache."""
    return 2**14 if device.type == "cpu" else 2**19


def spans(like: Tensor) -> Iterator[slice]:
    """Slices that cover the columns of rows ``[k, n]``, so that copies of them stay small.

    On a CPU they fit its caches, on other devices they keep it busy.
    """
    length, chunk = like.shape[-1], chunk_length(like.device)
    for start in range(0, max(length, 1), chunk):
        yield slice(start, min(start + chunk, length))


def summed(numbers: Tensor, spread: Spread | None) -> Tensor:
    """Numbers that were summed over this process's rows, over the rows of all."""
    return numbers if spread is None else spread.sum(numbers)


def norms(rows: Tensor, spread: Spread | None = None) -> Tensor:
    """Norms of rows ``[K, n]``, ``[K]``, in their own type."""
    own: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return own if spread is None else spread.sum(own.double().square()).sqrt().to(own.dtype)


def largest(rows: Tensor, spread: Spread | None = None) -> float:
    """Largest absolute value of all entries; NaN or infinite if one is."""
    own = float(torch.linalg.vector_norm(rows, torch.inf)) if rows.numel() else 0.0
    if spread is None:
        return own
    if spread.most(float(math.isnan(own))):  # a maximum over ranks may leave NaN out
        return math.nan
    return spread.most(own)


def dots(a: Tensor, b: Tensor, spread: Spread | None = None) -> Tensor:
    """Inner products of rows ``[K, n]``, one for each, ``[K]`` in float64 on their device.

    Example:
        >>> dots(torch.ones(2, 3), torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]])).tolist()
        [6.0, 1.0]
    """
    if a.device.type != "cpu":
        found: Tensor = torch.linalg.vecdot(a.double(), b.double())
        return summed(found, spread)
    out = []
    for x, y in zip(a, b, strict=True):
        pairs = zip(x.split(2**15), y.split(2**15), strict=True)
        out.append(torch.stack([torch.dot(u, v) for u, v in pairs]).sum(dtype=torch.float64))
    return summed(torch.stack(out) if out else a.new_zeros(0, dtype=torch.float64), spread)


def inner(
    left: Blocks, right: Blocks, *, wide: bool = False, spread: Spread | None = None
) -> Tensor:
    """Inner products of rows in blocks, ``[m, k]``, in float64 on the CPU.

    Args:
        left: Rows, ``m`` in all.
        right: Rows, ``k`` in all.
        wide: Whether to convert to float64 before multiplying.
        spread: Which rows of the vectors are here, where they are spread over processes.
    """
    shape = (sum(a.shape[0] for a in left), sum(b.shape[0] for b in right))
    if 0 in shape:
        return torch.zeros(shape, dtype=torch.float64)
    out = torch.zeros(shape, dtype=torch.float64, device=left[0].device)
    for span in spans(left[0]):
        b = _joined(right, span)
        b = b.double() if wide else b
        start = 0
        for block in left:
            a = block[:, span].double() if wide else block[:, span]
            out[start : start + block.shape[0]] += a @ b.mT
            start += block.shape[0]
    return summed(out.cpu(), spread)


def subtract(rows: Tensor, blocks: Blocks, coefficients: Tensor, out: Tensor) -> Tensor:
    """``rows - coefficients.T @ blocks`` into ``out`` (which may be ``rows``), ``[k, n]``."""
    weights = coefficients.mT.to(rows.device, rows.dtype, non_blocking=True)
    start = 0
    for block in blocks:
        part = weights[:, start : start + block.shape[0]]
        torch.addmm(out if start else rows, part, block, alpha=-1.0, out=out)
        start += block.shape[0]
    return out if start else out.copy_(rows)


def extend(
    basis: Blocks, fresh: Tensor, others: Tensor | None = None, *, spread: Spread | None = None
) -> tuple[Tensor, ...]:
    r"""Orthonormalizes new vectors against a basis and one another.

    Block Gram-Schmidt, twice, and within the block Cholesky factors of Gram matrices in float64:
    the basis is read four times and nothing as long as it is formed. Where the new vectors are
    dependent to a part in 1e5 (the rank of a sketch is exhausted), Householder's QR does it
    (:func:`qr`).

    Args:
        basis: Orthonormal rows, in blocks ``[b, n]``.
        fresh: New rows ``[b, n]``, which may depend on the basis and on one another.
        others: Rows ``[k, n]`` whose inner products with the basis are wanted too.
        spread: Which rows of the vectors are here, where they are spread over processes.

    Returns:
        Orthonormal rows ``[b, n]``, and in float64 on the CPU their coefficients ``C`` on the
        basis ``[m, b]`` and ``R`` ``[b, b]``: ``fresh.T == basis.T @ C + rows.T @ R``; with
        ``others`` also ``basis @ others.T``, ``[m, k]``.

    Source:
        L. Giraud, J. Langou and M. Rozloznik, *The loss of orthogonality in the Gram-Schmidt
        orthogonalization process* (2005), for "twice is enough"; Y. Yamamoto et al., *Roundoff
        error analysis of the CholeskyQR2 algorithm*, ETNA 44 (2015).
    """
    size = fresh.shape[0]
    right = (fresh,) if others is None else (fresh, others)
    first = inner(basis, right, spread=spread)
    C, seen = first[:, :size], first[:, size:]
    room = torch.empty_like(fresh, memory_format=torch.contiguous_format)
    rows = subtract(fresh, basis, C, room) if basis else fresh
    whole = dots(fresh, fresh, spread).sqrt().cpu()
    factor = _factor(inner((rows,), (rows,), wide=True, spread=spread), whole)
    if factor is None:
        rows, C, R = _householder(basis, fresh, spread)
        return (rows, C, R) if others is None else (rows, C, R, seen)
    R = factor.mT
    rows = _solve(factor, rows, room)
    if basis:
        again = inner(basis, (rows,), spread=spread)
        subtract(rows, basis, again, rows)
        C = C + again @ R
    # Orthonormal but for rounding, magnified by the condition of the block: once more.
    gram = inner((rows,), (rows,), spread=spread)
    if float((gram - torch.eye(size).double()).abs().max()) > 4 * torch.finfo(rows.dtype).eps:
        last = torch.linalg.cholesky(gram)
        _solve(last, rows, rows)
        R = last.mT @ R
    return (rows, C, R) if others is None else (rows, C, R, seen)


def _factor(gram: Tensor, norms: Tensor) -> Tensor | None:
    """The Cholesky factor, unless rows are dependent to a part in 1e5.

    Args:
        gram: Gram matrix of rows, ``[b, b]``.
        norms: What the rows' norms were before the basis was taken out, ``[b]``.
    """
    own = gram.diagonal().clamp_min(0.0).sqrt()
    eps = float(torch.finfo(torch.float32).eps)
    if not bool((own > 100 * eps * norms).all()):
        return None
    factor, info = torch.linalg.cholesky_ex(gram / (own[:, None] * own))
    if int(info) or float(factor.diagonal().min()) < 1e-5:
        return None
    scaled: Tensor = own[:, None] * factor
    return scaled


def _solve(factor: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    """``factor^-1 @ rows`` into ``out``, which may be ``rows``, span by span."""
    eye = torch.eye(len(factor), dtype=torch.float64)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
    inverse = inverse.to(rows.device, rows.dtype, non_blocking=True)
    for span in spans(rows):
        torch.mm(inverse, rows[:, span].clone() if out is rows else rows[:, span], out=out[:, span])
    return out


def all_finite(rows: Tensor, spread: Spread | None = None) -> bool:
    """Whether no entry is NaN or infinite, here and on the other ranks.

    A sum is finite only if all of its terms are; as it may overflow where they are, entries are
    only looked at one by one where it is not.
    """
    return bool(summed(rows.sum(), spread).isfinite()) or finite_everywhere(rows, spread)


def finite_everywhere(rows: Tensor, spread: Spread | None = None) -> bool:
    """Whether no entry is NaN or infinite, here and on the other ranks."""
    finite = bool(torch.isfinite(rows).all())
    return finite if spread is None else not spread.most(float(not finite))


def qr(rows: Tensor, spread: Spread | None = None) -> tuple[Tensor, Tensor]:
    """Householder's QR of vectors in rows ``[b, n]``: orthonormal rows, and ``R`` ``[b, b]``.

    Where vectors are spread over processes, each factorizes its part of them, and all factorize
    the small factors of all: as stable as one factorization, whatever the vectors' rank, for one
    exchange of ``b * b`` numbers. ``R`` is in float64 on the CPU.

    Source:
        J. Demmel, L. Grigori, M. Hoemmen and J. Langou, *Communication-optimal parallel and
        sequential QR and LU factorizations*, SIAM J. Sci. Comput. 34 (2012).
    """
    Q, R = torch.linalg.qr(rows.mT)
    if spread is None:
        return Q.mT.contiguous(), R.double().cpu().triu()
    parts = spread.group.rows(R.double().to(spread.group.device))
    left, R = torch.linalg.qr(torch.cat(parts).cpu())
    first = sum(len(part) for part in parts[: spread.group.rank])
    own = left[first : first + Q.shape[1]].to(Q)
    return (Q @ own).mT.contiguous(), R.triu()


def _householder(
    basis: Blocks, fresh: Tensor, spread: Spread | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`extend`, for rows that may depend on the basis and on one another."""
    size = fresh.shape[0]
    C = torch.zeros((sum(q.shape[0] for q in basis), size), dtype=torch.float64)
    R = torch.eye(size, dtype=torch.float64)
    rows = fresh.clone()
    for attempt in range(3):
        coefficients = inner(basis, (rows,), spread=spread)
        subtract(rows, basis, coefficients, rows)
        rows, r = qr(rows, spread)
        C = C + coefficients @ R
        R = r @ R
        if not basis or (attempt and bool((r.diagonal().abs() > 0.7).all())):
            break
    return rows, C, R


def _joined(blocks: Blocks, span: slice) -> Tensor:
    parts = [block[:, span] for block in blocks]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
