r"""Rows that keep their largest entries, with the rest carried over: error feedback.

With the residual :math:`e_{t-1}` of the rows before, a gradient :math:`g_t` becomes

.. math:: a_t = e_{t-1} + g_t, \qquad r_t = \mathrm{top}_k(a_t), \qquad e_t = a_t - r_t,

where top-k keeps the ``k`` entries of largest magnitude of each part. Nothing is lost:
:math:`\sum_t r_t + e_T = \sum_t g_t`, and what storing the kept entries in a shorter type rounds
off is carried over, too.

I.-V. Modoranu, A. Kalinov, E. Kurtic, E. Frantar and D. Alistarh, *Error Feedback Can Accurately
Compress Preconditioners*, ICML 2024 (EFCP), algorithm 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def kept_entries(parts: Sequence[int], fraction: float) -> tuple[int, ...]:
    """How many entries each part keeps: a fraction, rounded up.

    Raises:
        ValueError: If the fraction is not in (0, 1].
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"expected a fraction of entries in (0, 1], got {fraction}")
    return tuple(min(n, math.ceil(fraction * n)) for n in parts)


def top_entries(row: Tensor, parts: Sequence[int], kept: Sequence[int]) -> Tensor:
    """Where the entries of largest magnitude are, in each part, ascending.

    Args:
        row: ``[P]``.
        parts: Lengths of contiguous parts.
        kept: How many entries each part keeps.

    Returns:
        Columns ``[sum(kept)]``, int64, part by part.

    Example:
        >>> top_entries(torch.tensor([3.0, -4.0, 1.0, 0.5, 0.0]), [3, 2], [2, 1]).tolist()
        [0, 1, 3]
    """
    found = []
    for start, n, k in zip(itertools.accumulate(parts, initial=0), parts, kept, strict=False):
        if k == n:
            found.append(torch.arange(start, start + n, device=row.device))
        else:
            magnitudes = row[start : start + n].abs()
            found.append(magnitudes.topk(k, sorted=False).indices.sort().values + start)
    return torch.cat(found)
