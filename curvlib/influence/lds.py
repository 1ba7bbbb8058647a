r"""The linear datamodeling score: do sums of influence scores predict retrained models?

With scores :math:`s_{qn}` (positive: the example lowers the query's loss) and a bank of models
that were trained on subsets :math:`S_m`,

.. math:: \mathrm{LDS}_q = \operatorname{Spearman}_m \Big( \sum_{n \in S_m} s_{qn},\; -L_{mq} \Big),

and LDS is its mean over queries. Its interval is a bootstrap over queries and over subsets at once.

Source:
    Park, Georgiev, Ilyas, Leclerc and Madry, "TRAK: Attributing Model Behavior at Scale", 2023,
    definition 2.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvlib.core.random import generator_of
from curvlib.core.result import Result, axes_or_new, unframed
from curvlib.influence.bank import RetrainingBank
from curvlib.influence.ranks import rank_correlation

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, repr=False)
class LDS(Result):
    """A linear datamodeling score.

    Attributes:
        value: The mean over queries, in [-1, 1].
        stderr: Its bootstrap standard error.
        low: Lower end of the 95 % bootstrap interval.
        high: Upper end.
        each: The score of each query, ``[Q]``, float64.
        ceiling: What a perfect predictor of the mean losses would have, from two halves of the
            retrainings; NaN with one retraining.
        settings: The settings, by name.
    """

    value: float
    stderr: float
    low: float
    high: float
    each: Tensor
    ceiling: float
    settings: dict[str, Any]

    def plot(self, ax: Axes | None = None) -> Axes:
        """The scores of the queries, sorted, with their mean, its interval and the ceiling.

        Raises:
            ImportError: If matplotlib is absent.
        """
        ax = axes_or_new(ax)
        each = self.each.sort().values
        ax.plot(range(1, len(each) + 1), each.tolist(), ".", ms=4, color="#0072B2", label="queries")
        ax.axhspan(self.low, self.high, color="0.85", lw=0)
        ax.axhline(self.value, color="0.2", lw=1.2, label=f"mean {self.value:.3f}")
        if self.ceiling == self.ceiling:  # not NaN
            ax.axhline(self.ceiling, color="#D55E00", lw=1.0, ls="--", label="ceiling")
        ax.set_xlabel("query, sorted")
        ax.set_ylabel("linear datamodeling score")
        return unframed(ax)


def linear_datamodeling_score(
    scores: Tensor, bank: RetrainingBank, *, resamples: int = 500, seed: int = 0
) -> LDS:
    """How well influence scores predict the losses of retrained models.

    Args:
        scores: ``[Q, N]``, positive where the example lowers the query's loss. For an ensemble of
            models, the mean of their scores.
        bank: Models that were trained on subsets of the ``N`` examples, and their ``Q`` losses.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If shapes do not fit, or scores are not finite.

    Example:
        >>> import torch
        >>> from curvlib.influence.bank import retraining_bank
        >>> worth = torch.arange(8.0).double()
        >>> bank = retraining_bank(lambda keep, seeds: -(keep.double() @ worth)[:, None], 8)
        >>> found = linear_datamodeling_score(worth[None], bank)
        >>> round(found.value, 6), round(found.ceiling, 6)
        (1.0, 1.0)
    """
    given: tuple[object, object] = (scores, bank)
    if not isinstance(given[0], Tensor) or not isinstance(given[1], RetrainingBank):
        raise TypeError(
            "linear_datamodeling_score takes scores [Q, N] as a tensor and a RetrainingBank, got "
            f"{type(scores).__name__} and {type(bank).__name__}"
        )
    M, R, Q = bank.losses.shape
    N = bank.keep.shape[1]
    if scores.shape != (Q, N):
        raise ValueError(
            f"expected scores of shape [{Q}, {N}] (queries and examples of the bank), got "
            f"{list(scores.shape)}"
        )
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("scores have entries that are NaN or infinite")
    predicted = scores.double().cpu() @ bank.keep.double().mT
    measured = -bank.losses.mean(1).mT
    each = rank_correlation(predicted, measured)
    random = generator_of(None, seed)
    found = torch.empty(resamples, dtype=torch.float64)
    for i in range(resamples):
        queries = torch.randint(Q, (Q,), generator=random)
        subsets = torch.randint(M, (M,), generator=random)
        where = queries[:, None], subsets[None]
        found[i] = rank_correlation(predicted[where], measured[where]).mean()
    low, high = torch.quantile(found, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    ceiling = float(bank.reliability().sqrt().mean()) if R > 1 else float("nan")
    return LDS(
        value=float(each.mean()),
        stderr=float(found.std()),
        low=low,
        high=high,
        each=each,
        ceiling=ceiling,
        settings={"masks": M, "repeats": R, "resamples": resamples, "seed": seed},
    )
