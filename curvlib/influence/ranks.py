"""Rank correlations, row by row."""

from __future__ import annotations

import torch
from torch import Tensor


def ranks(rows: Tensor) -> Tensor:
    """Ranks within each row, ties as their mean, float64, of the same shape."""
    from scipy.stats import rankdata  # slow to import

    return torch.from_numpy(rankdata(rows.detach().cpu().numpy(), axis=-1)).double()


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation of the rows of two matrices ``[Q, M]``, as ``[Q]``, float64.

    Rows without any variation have the correlation 0.

    Example:
        >>> import torch
        >>> a = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
        >>> rank_correlation(a, torch.tensor([[10.0, 20.0, 90.0], [9.0, 2.0, 1.0]])).tolist()
        [1.0, -1.0]
    """
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(-1, True), y - y.mean(-1, True)
    scale = (x.square().sum(-1) * y.square().sum(-1)).sqrt()
    product = (x * y).sum(-1)
    return torch.where(scale > 0.0, product / scale.clamp(min=1e-300), 0.0).clamp(-1.0, 1.0)
