r"""Sums of squares of rotated per-example gradients: the corrected eigenvalues of EK-FAC.

.. math:: \Lambda = \sum_n (Q_L^\top G_n Q_R)^{\circ 2}, \qquad G_n = \sum_t g_{nt} a_{nt}^\top .

The tokens are summed *before* the square. Of three routes to one layer's sum, which agree up to
rounding, :func:`route` takes that with the least work, by example, for ``O`` outputs, ``I`` inputs
and ``T`` rows:

========  =========================================  =========================================
route     what                                       multiplications and additions
========  =========================================  =========================================
pairs     :math:`\sum_{t \le t'} (\tilde g_t \circ   :math:`T (T + 1) O I` after rotations
          \tilde g_{t'}) (\tilde a_t \circ           :math:`2 T (O^2 + I^2)`, in one matrix
          \tilde a_{t'})^\top`; T = 1 is             product over all examples, nothing of
          :math:`(\tilde g^2)^\top \tilde a^2`       size :math:`O I` for each
rotate    rows first, then the matrices              :math:`2 T O I` after the same rotations
form      matrices first, then both rotations        :math:`2 T O I + 2 O I (O + I)`
========  =========================================  =========================================

The squares of the last two cost as much as some ten operations for each entry, since they go
through memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Work of writing, reading and squaring an entry, in floating-point operations.
PASS = 10.0


def route(rows: int, shape: tuple[int, int, int], dense: tuple[bool, bool], shared: int = 1) -> str:
    """The cheapest route.

    Args:
        rows: ``T``.
        shape: ``(G, O, I)``.
        dense: Whether the left and the right factor are dense: the others need no rotation.
        shared: Directions that share the rotated inputs.

    Example:
        >>> route(1, (1, 64, 64), (True, True)), route(16, (1, 512, 512), (True, True))
        ('pairs', 'rotate')
        >>> route(4096, (1, 16, 27), (True, True))
        'form'
    """
    _, out, width = shape
    left, right = (float(n * side) for n, side in zip((out, width), dense, strict=True))
    rotations = 2.0 * rows * (out * left + width * right / shared)
    entries = float(out * width)
    work = {
        "pairs": rotations + rows * (rows + 1.0) * entries,
        "rotate": rotations + (2.0 * rows + PASS) * entries,
        "form": (2.0 * rows + 2.0 * (left + right) + PASS) * entries,
    }
    return min(work, key=lambda name: work[name])


def squares(
    left: Tensor, right: Tensor, bases: tuple[Tensor | None, Tensor | None], way: str
) -> Tensor:
    """The sum of squares over some examples, ``[G, O, I]``.

    Args:
        left: Rows of gradients ``[G, n, T, O]``, not rotated.
        right: Rows of inputs ``[G, n, T, I]``, rotated, unless ``way`` is ``"form"``.
        bases: ``[G, O, O]`` and ``[G, I, I]``, or ``None`` for the identity.
        way: A route.
    """
    if way != "form":
        left = rotated(left, bases[0])
    if way == "pairs":
        first, second = torch.triu_indices(left.shape[2], left.shape[2], device=left.device)
        twice = (1.0 + (first != second).to(left.dtype))[:, None]
        L = left[:, :, first] * left[:, :, second]
        R = right[:, :, first] * right[:, :, second] * twice
        return torch.bmm(L.flatten(1, 2).mT, R.flatten(1, 2))
    return matrices(left, right, bases, way).square_().sum(1)


def matrices(
    left: Tensor, right: Tensor, bases: tuple[Tensor | None, Tensor | None], way: str
) -> Tensor:
    """Rotated gradients of some examples, ``[G, n, O, I]``, from rows as of :func:`squares`.

    With ``way="rotate"`` both have been rotated.
    """
    found = left.mT @ right
    if way == "form":
        L, R = bases
        found = found if L is None else L.mT[:, None] @ found
        found = found if R is None else found @ R[:, None]
    return found


def rotated(rows: Tensor, basis: Tensor | None) -> Tensor:
    """Rows ``[G, n, T, d]`` in a basis ``[G, d, d]``; a last column of ones may be left out."""
    if basis is None:
        return rows
    flat, width = rows.flatten(1, 2), rows.shape[-1]
    if width == basis.shape[1]:
        out = flat @ basis
    else:
        out = torch.baddbmm(basis[:, width:], flat, basis[:, :width])
    return out.view(*rows.shape[:3], out.shape[-1])


def embedding_squares(out: Tensor, index: Tensor, rows: Tensor) -> None:
    """Adds the squares of an embedding's gradients to ``[V, d]``, no row that is not used.

    Args:
        out: ``[V, d]``.
        index: ``[n, T]``.
        rows: Rotated gradients ``[n, T, d]``.
    """
    n, size = len(index), out.shape[0]
    keys = torch.arange(n, device=index.device)[:, None] * size + index
    found, inverse = torch.unique(keys, return_inverse=True)
    sums = rows.new_zeros((len(found), rows.shape[-1]))
    sums.index_add_(0, inverse.reshape(-1), rows.flatten(0, 1))
    out.index_add_(0, found % size, sums.square_())
