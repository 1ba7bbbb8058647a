"""How much of the true top-k a filter keeps, measured on a random sample."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlib.core.result import Result
from curvlib.influence.candidates import Candidates


@dataclass(frozen=True, eq=False, repr=False)
class Recall(Result):
    """How much of the true top-k a filter keeps, on a sample.

    Attributes:
        value: Kept, of all ``trials``.
        stderr: Its binomial standard error, ``sqrt(value (1 - value) / trials)``; that of queries
            that resemble each other is larger.
        low: Lower end of Wilson's 95 % interval, which is not empty at a value of 0 or 1.
        high: Upper end of it.
        per_query: Kept for each query, float64 ``[Q]``.
        trials: ``k`` times the number of queries.
        k: Proponents of each query.
        sample: How many training examples were scored.
        share: The part of the training examples that the filter keeps: what chance would recall.
    """

    value: float
    stderr: float
    low: float
    high: float
    per_query: Tensor
    trials: int
    k: int
    sample: int
    share: float


def recall(
    candidates: Candidates, scores: Tensor, sample: Tensor, k: int = 10, *, shared: bool = True
) -> Recall:
    """The fraction of the true top-k that a filter keeps, measured on a random sample.

    The top ``k`` among ``n`` sampled examples stand for the top ``k N / n`` of all.

    Args:
        candidates: What a filter keeps.
        scores: True scores of the sampled examples, ``[n, Q]``: large for proponents.
        sample: Their indices, ``[n]``, drawn at random: ``uniform(N, n).indices``.
        k: Proponents of each query that count.
        shared: Whether a query may use what was kept for other queries, as in a scan of
            ``candidates.indices``; otherwise only its own.

    Raises:
        ValueError: If shapes do not fit, indices are repeated or out of range, or ``k`` is not
            1 to ``n``.

    Example:
        >>> from curvlib.influence.candidates import uniform
        >>> kept = uniform(10, 5, seed=0)
        >>> measured = recall(kept, torch.arange(10.0)[:, None], torch.arange(10), k=4)
        >>> measured.value == sum(int(i) >= 6 for i in kept.indices) / 4
        True
    """
    queries, n = len(candidates.per_query), len(sample)
    if sample.ndim != 1 or tuple(scores.shape) != (n, queries):
        raise ValueError(
            f"expected indices [n] and scores [n, {queries}], got {list(sample.shape)} and "
            f"{list(scores.shape)}"
        )
    if not 1 <= k <= n:
        raise ValueError(f"k= is 1 to the {n} sampled examples, got {k}")
    sample = sample.cpu()
    if sample.unique().numel() < n or int(sample.min()) < 0:
        raise ValueError("expected every sampled index once, and none negative")
    if int(sample.max()) >= candidates.examples:
        raise ValueError(
            f"index {int(sample.max())} is sampled, but the filter saw {candidates.examples} "
            "training examples"
        )
    top = sample[scores.cpu().sort(dim=0, descending=True, stable=True).indices[:k]]
    kept = torch.tensor(
        [
            int(torch.isin(top[:, q], candidates.indices if shared else own).sum())
            for q, own in enumerate(candidates.per_query)
        ],
        dtype=torch.float64,
    )
    trials = k * queries
    value = float(kept.sum()) / trials
    low, high = _wilson(value, trials)
    return Recall(
        value=value,
        stderr=math.sqrt(value * (1.0 - value) / trials),
        low=low,
        high=high,
        per_query=kept / k,
        trials=trials,
        k=k,
        sample=n,
        share=candidates.share if shared else _mean_share(candidates),
    )


def _wilson(value: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval of a fraction (1927)."""
    centre = value + z * z / (2 * trials)
    spread = z * math.sqrt(value * (1.0 - value) / trials + z * z / (4 * trials * trials))
    scale = 1.0 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def _mean_share(candidates: Candidates) -> float:
    sizes = [len(own) for own in candidates.per_query]
    return sum(sizes) / (len(sizes) * candidates.examples)
