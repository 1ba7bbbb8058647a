r"""The Krylov kernel: orthonormal bases that grow in place, and what is read off them.

A basis is one preallocated tensor of *rows* ``[m, P]``, so that each basis vector is
contiguous; the same memory read as columns is ``rows.T``. The small matrices are in float64 on
the CPU. Nothing of the basis's size is ever temporary.

Where vectors are spread over processes, each holds its part of every row, and a pass of
Gram-Schmidt sends its ``[j, b]`` coefficients once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from curvlib.core.ranks.spread import Spread
from curvlib.estimators.probes import fill_normal
from curvlib.estimators.rows import norms, summed

#: Bytes of float64 scratch memory that a rotation of a basis may use.
SCRATCH_BYTES = 1 << 22


def project_out(basis: Tensor, rows: Tensor, spread: Spread | None = None) -> Tensor:
    """Subtracts from ``rows`` ``[b, P]``, in place, their part in the span of ``basis`` ``[j, P]``.

    Returns:
        The coefficients ``[j, b]``, on the device.
    """
    if rows.shape[0] == 1:
        coefficients = summed(torch.mv(basis, rows[0]), spread)
        rows[0].addmv_(basis.T, coefficients, alpha=-1)
        return coefficients[:, None]
    coefficients = summed(basis @ rows.T, spread)
    rows.addmm_(coefficients.T, basis, alpha=-1)
    return coefficients


def orthonormalize(
    rows: Tensor,
    size: int,
    count: int,
    *,
    keep: int,
    recent: int,
    deflate: Tensor | None,
    floor: float,
    generator: torch.Generator,
    spread: Spread | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Orthonormalizes the ``count`` rows after the first ``size`` against those and each other.

    In place, by classical Gram-Schmidt: a cheap pass over the ``recent`` last rows, which hold
    most of what a Lanczos step has to remove, a pass over all, and another one where the second
    removed much of a row ("twice is enough", Parlett, *The symmetric eigenvalue problem*, 6.9).

    Rows that depend on others are replaced by random ones, orthonormal to everything before, so
    that a basis always grows: with :math:`W` the rows as they were and :math:`Q` those before,

    .. math:: W = C^\top Q + R^\top \tilde W .

    Args:
        rows: The basis, ``[m, P]``.
        size: How many rows are orthonormal already.
        count: How many rows after them are new.
        keep: How many of the new ones to end with, at most ``count``.
        recent: How many of the ``size`` rows the cheap pass covers.
        deflate: Further orthonormal rows ``[d, P]`` to be orthogonal to.
        floor: A row whose remaining norm is at most this depends on the others.
        generator: For random rows.
        spread: Which part of the rows is here, where they are spread over processes.

    Returns:
        ``C`` ``[size, count]`` and ``R`` ``[keep, count]``, float64 on the CPU.

    Raises:
        FloatingPointError: If a number is not finite.
    """
    new = rows[size : size + count]
    total = torch.zeros((size, count), dtype=rows.dtype, device=rows.device)
    if recent:
        total[size - recent :] += project_out(rows[size - recent : size], new, spread)
    before = norms(new, spread)
    _project_out_all(rows[:size], new, deflate, total, spread)
    after = norms(new, spread)
    # the device is waited for once, unless a pass has to be repeated
    read = torch.cat([total.flatten(), before, after]).cpu().double()
    C, lengths = read[: total.numel()].view(total.shape), read[total.numel() :].view(2, count)
    if not bool(torch.isfinite(lengths).all()):
        raise FloatingPointError("a vector has an entry that is not finite")
    again = bool((lengths[1] < 0.7 * lengths[0]).any())
    if again:
        _project_out_all(rows[:size], new, deflate, total, spread)
        C = total.cpu().double()
    R = torch.zeros((keep, count), dtype=torch.float64)
    accepted = 0
    for column in range(count):
        row, norm = rows[size + column], float(lengths[1, column])
        known = norm  # of the row when the last pass over all rows began
        if accepted == keep:
            break
        if accepted and norm > floor:
            known_rows = rows[size : size + accepted]
            passes = [project_out(known_rows, row[None], spread)[:, 0] for _ in range(2)]
            first, second, length = (
                torch.cat([*passes, norms(row[None], spread)])
                .cpu()
                .double()
                .split([accepted, accepted, 1])
            )
            R[:accepted, column] = first + second
            norm = float(length)
        elif accepted or again:
            norm = float(norms(row[None], spread))
        if norm <= floor:
            continue
        row.mul_(1.0 / norm)
        if norm < 0.1 * known:  # what rounding had left of the other rows is magnified
            extra = torch.zeros((size, 1), dtype=rows.dtype, device=rows.device)
            _project_out_all(rows[:size], row[None], deflate, extra, spread)
            project_out(rows[size : size + accepted], row[None], spread)
            left = float(norms(row[None], spread))
            if left < 0.1:
                continue
            row.mul_(1.0 / left)
            C[:, column] += norm * extra[:, 0].cpu().double()
        R[accepted, column] = norm
        if accepted < column:
            rows[size + accepted].copy_(row)
        accepted += 1
    for index in range(accepted, keep):
        random_row(rows, size + index, deflate, generator, spread)
    return C, R


def random_row(
    rows: Tensor,
    index: int,
    deflate: Tensor | None,
    generator: torch.Generator,
    spread: Spread | None = None,
) -> None:
    """Makes row ``index`` random of norm one, orthogonal to the rows before and to ``deflate``."""
    row = rows[index]
    fill_normal(row, generator, spread)
    for _ in range(3):
        row.mul_(1.0 / norms(row[None], spread)[0])
        _project_out_all(rows[:index], row[None], deflate, None, spread)
    row.mul_(1.0 / norms(row[None], spread)[0])


def _project_out_all(
    basis: Tensor,
    new: Tensor,
    deflate: Tensor | None,
    total: Tensor | None,
    spread: Spread | None,
) -> None:
    if deflate is not None:
        project_out(deflate, new, spread)
    if basis.shape[0]:
        coefficients = project_out(basis, new, spread)
        if total is not None:
            total += coefficients


def rotate(rows: Tensor, start: int, stop: int, S: Tensor) -> None:
    """Replaces rows ``start`` to ``stop`` by their combinations ``S.T @ rows``, in place.

    The work goes over chunks of the vectors in float64, so that rotating a float32 basis many
    times costs no orthogonality.

    Args:
        rows: The basis ``[m, P]``.
        start: First row.
        stop: Row after the last.
        S: ``[stop - start, p]`` with orthonormal columns, float64 on the CPU.
    """
    length, kept = S.shape
    chunk = max(1024, SCRATCH_BYTES // (8 * (length + kept)))
    left = S.T.contiguous().to(rows.device, non_blocking=True)
    for first in range(0, rows.shape[1], chunk):
        part = rows[start:stop, first : first + chunk]
        rows[start : start + kept, first : first + chunk] = (left @ part.double()).to(rows.dtype)


def move_rows(rows: Tensor, source: int, target: int, count: int) -> None:
    """Copies ``count`` rows to an earlier place; the two places may overlap."""
    for i in range(count if source != target else 0):
        rows[target + i].copy_(rows[source + i])


def power_of_two(value: float, dtype: torch.dtype) -> float:
    """The power of two next to a positive number: scaling by it, or its inverse, is exact.

    At least the smallest normal number of the vectors' type, whose inverse does not overflow.

    Example:
        >>> power_of_two(0.3, torch.float32), 1.0 / power_of_two(1e-320, torch.float64) < math.inf
        (0.25, True)
    """
    return max(2.0 ** round(math.log2(value)), torch.finfo(dtype).tiny)


def amplification(alphas: Tensor, betas: Tensor, at: float) -> float:
    r"""How much a Lanczos recurrence would have amplified an eigenvector of eigenvalue ``at``.

    If :math:`u` is an eigenvector of eigenvalue :math:`\lambda`, its products with the Lanczos
    vectors are :math:`u^\top v_{i+1} = p_i(\lambda)\, u^\top v_1`, with the orthonormal
    polynomials of the recurrence; as the :math:`v_i` are orthonormal,
    :math:`(u^\top v_1)^2 \sum_i p_i(\lambda)^2 \le 1`. A random start has
    :math:`(u^\top v_1)^2 \ge \delta^2 / n` except with probability :math:`0.8\,\delta`. So once
    the sum exceeds :math:`n / \delta^2`, there is no such eigenvector, nor one of an eigenvalue
    further out (van Dorsselaer, Hochstenbach and van der Vorst, *Computing probabilistic bounds
    for extreme eigenvalues of symmetric matrices with the Lanczos method*, 2000).

    Args:
        alphas: Diagonal of the tridiagonal matrix, ``[j]``.
        betas: Its off-diagonal, ``[j]``, the coupling to the next vector last.
        at: The eigenvalue, outside the Ritz values.

    Returns:
        The sum of :math:`p_i^2` for ``i`` from 0 to ``j``; infinity after a breakdown.
    """
    previous, current, total, beta_before = 0.0, 1.0, 1.0, 0.0
    for alpha, beta in zip(alphas.tolist(), betas.tolist(), strict=True):
        if beta == 0.0 or total > 1e200:
            return math.inf
        previous, current = current, ((at - alpha) * current - beta_before * previous) / beta
        beta_before = beta
        total += current * current
    return total
