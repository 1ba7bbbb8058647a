r"""The inverse of a low-rank-plus-shift operator on rows, as preconditioners need it.

:math:`M^{-1} r = s\, r + U \big((\lambda + \delta)^{-1} - s\big) U^\top r` reads :math:`U` twice,
which is the least: the coefficients are needed whole before they are used. With ``k`` vectors
and ``K`` right-hand sides that is ``2 k / K`` vectors of memory for each column of a product:
small beside the product for many right-hand sides at once, and not for a single one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from curvlib.core.structured import LowRankPlusShift
from curvlib.estimators.rows import inner

#: Relative error that the eigenvalues of a preconditioner may have from rounding.
SLOPPINESS = 0.01


def inverse_rows(
    operator: LowRankPlusShift, rows: Tensor, damping: float, out: Tensor
) -> Tensor | None:
    r"""``(M + damping I)^-1`` times each row, into ``out``, ``[K, P]``.

    Args:
        operator: ``M``.
        rows: ``[K, P]``.
        damping: What is added to its diagonal.
        out: ``[K, P]``, not ``rows``.

    Returns:
        ``out``; or ``None`` where this form would lose the operator's smallest inverses to
        rounding (or there are none): ``operator.solve`` is slower and keeps them.
    """
    values, rest = operator.eigenvalues + damping, operator.offset + damping
    if rest <= 0.0 or not bool((values > 0.0).all()) or not values.numel():
        return None
    if float(values.max()) / rest * torch.finfo(rows.dtype).eps > SLOPPINESS:
        return None
    basis = operator.vectors.mT
    coefficients = (
        inner((basis,), (rows,), spread=operator.spread) * (1.0 / values - 1.0 / rest)[:, None]
    )
    return torch.addmm(rows, coefficients.mT.to(rows), basis, beta=1.0 / rest, out=out)
