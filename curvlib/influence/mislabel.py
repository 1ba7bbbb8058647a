"""Finding mislabelled examples: those that influence themselves most are inspected first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvlib.core.result import Result, axes_or_new, unframed
from curvlib.influence.ranks import ranks

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, repr=False)
class MislabelDetection(Result):
    """How well scores put mislabelled examples first.

    Attributes:
        auc: Probability that a mislabelled example scores above a clean one.
        inspected: Fractions of all examples, ``[K]``.
        found: Share of the mislabelled ones among so many with the highest scores, ``[K]``.
        curve: Share found after 1, 2, ..., N examples, ``[N]``.
        flipped: How many are mislabelled.
    """

    auc: float
    inspected: Tensor
    found: Tensor
    curve: Tensor
    flipped: int

    def plot(self, ax: Axes | None = None) -> Axes:
        """The share found against the share inspected, beside chance and the best possible.

        Raises:
            ImportError: If matplotlib is absent.
        """
        ax = axes_or_new(ax)
        n = len(self.curve)
        share = [(i + 1) / n for i in range(n)]
        ax.plot(share, self.curve.tolist(), color="#0072B2", label=f"AUC {self.auc:.3f}")
        ax.plot([0, self.flipped / n, 1], [0, 1, 1], color="0.6", lw=1.0, ls=":", label="best")
        ax.plot([0, 1], [0, 1], color="0.6", lw=1.0, ls="--", label="chance")
        ax.set_xlabel("examples inspected")
        ax.set_ylabel("mislabelled found")
        return unframed(ax)


def mislabel_detection(
    scores: Tensor, flipped: Tensor, *, inspected: Sequence[float] = (0.1, 0.2)
) -> MislabelDetection:
    """How well scores, such as self-influence, put mislabelled examples first.

    Args:
        scores: ``[N]``, high where an example is suspect.
        flipped: Which examples are mislabelled, bool ``[N]``.
        inspected: Fractions of the examples that somebody would look at.

    Raises:
        ValueError: If shapes do not fit, scores are not finite, fractions are not in (0, 1], or
            all examples are alike.

    Example:
        >>> import torch
        >>> scores = torch.tensor([0.1, 9.0, 0.3, 0.2, 5.0])
        >>> found = mislabel_detection(
        ...     scores, torch.tensor([False, True, False, False, True]), inspected=[0.2, 0.4]
        ... )
        >>> found.auc, found.found.tolist()
        (1.0, [0.5, 1.0])
    """
    if scores.ndim != 1 or flipped.shape != scores.shape or flipped.dtype != torch.bool:
        raise ValueError(
            f"expected scores [N] and flipped [N] of type bool, got {list(scores.shape)} and "
            f"{list(flipped.shape)} of {flipped.dtype}"
        )
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("scores have entries that are NaN or infinite")
    n, bad = len(scores), int(flipped.sum())
    if not 0 < bad < n:
        raise ValueError(f"{bad} of {n} examples are mislabelled; detection needs both kinds")
    if not all(0.0 < fraction <= 1.0 for fraction in inspected):
        raise ValueError(f"inspected= takes fractions in (0, 1], got {list(inspected)}")
    order = scores.cpu().sort(descending=True, stable=True).indices
    curve = flipped.cpu()[order].double().cumsum(0) / bad
    place = ranks(scores[None])[0]
    wins = float(place[flipped.cpu()].sum()) - bad * (bad + 1) / 2
    counts = [max(1, round(fraction * n)) for fraction in inspected]
    return MislabelDetection(
        auc=wins / (bad * (n - bad)),
        inspected=torch.tensor(list(inspected), dtype=torch.float64),
        found=torch.stack([curve[count - 1] for count in counts]),
        curve=curve,
        flipped=bad,
    )
