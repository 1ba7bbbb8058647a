r"""Damping that is chosen by a few retrained models.

Which damping :math:`\lambda` fits is a property of the run: near the mean eigenvalue for networks
that fit their data, far above it for those that were trained briefly. A small bank of retrained
models, of the user's own recipe but of other seeds than whatever the scores are judged by later,
tells: the damping whose scores have the largest linear datamodeling score on it,

.. math:: \hat\lambda = \arg\max_\lambda \mathrm{LDS}\big(s(\lambda)\big).

Twenty subsets, two retrainings each, are enough to tell decades apart. Nothing is fitted again, and
the sums of a subset's scores are all that is compared.

Source:
    Cross-validated damping is common for ridge regression (Golub, Heath and Wahba, "Generalized
    cross-validation as a method for choosing a good ridge parameter", 1979); the criterion is that
    of Park et al., "TRAK: Attributing Model Behavior at Scale", 2023, definition 2.4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvlib.core.result import Result, axes_or_new, unframed
from curvlib.influence.bank import RetrainingBank
from curvlib.influence.influence import Influence
from curvlib.influence.lds import linear_datamodeling_score

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Decades, from a hundredth of the mean eigenvalue to a hundred of them.
DAMPINGS = (0.01, 0.1, 1.0, 10.0, 100.0)


@dataclass(frozen=True, eq=False, repr=False)
class DampingSelection(Result):
    """Damping with the largest linear datamodeling score.

    Attributes:
        damping: The chosen one, for ``inf.damped(found.damping, relative=found.relative)``.
        relative: Whether it is a fraction of the mean eigenvalue.
        dampings: Those that were tried, ``[K]``, float64.
        values: Their scores on the bank, ``[K]``, float64.
        stderrs: Bootstrap standard errors of these, ``[K]``; their differences are less noisy.
        settings: The settings, by name.
    """

    damping: float
    relative: bool
    dampings: Tensor
    values: Tensor
    stderrs: Tensor
    settings: dict[str, Any]

    def plot(self, ax: Axes | None = None) -> Axes:
        """The scores against damping, with their standard errors.

        Raises:
            ImportError: If matplotlib is absent.
        """
        ax = axes_or_new(ax)
        x, y = self.dampings.tolist(), self.values.tolist()
        ax.errorbar(x, y, self.stderrs.tolist(), fmt=".-", color="#0072B2", capsize=2)
        ax.axvline(self.damping, color="0.2", lw=1.0, ls="--", label=f"chosen: {self.damping:g}")
        if min(x) > 0.0:
            ax.set_xscale("log")
        ax.set_xlabel("damping / mean eigenvalue" if self.relative else "damping")
        ax.set_ylabel("linear datamodeling score")
        return unframed(ax)


def select_damping(
    influence: Influence | Sequence[Influence],
    query: Any,
    bank: RetrainingBank,
    *,
    dampings: Sequence[float] = DAMPINGS,
    relative: bool = True,
    resamples: int = 100,
    seed: int = 0,
) -> DampingSelection:
    """The damping whose scores best predict a bank of retrained models.

    Args:
        influence: Scores' source; several (models of other seeds, checkpoints of a run) are
            averaged, each with the same damping.
        query: As of :meth:`curvlib.influence.Influence.scores`: the queries of the bank.
        bank: A small bank from :func:`curvlib.influence.retraining_bank`, say ``masks=20,
            repeats=2``. Judge the result by another one.
        dampings: To try; :func:`curvlib.influence.training_damping` with ``relative=False`` tells
            where to look.
        relative: Whether they are fractions of the mean eigenvalue.
        resamples: Of the bootstrap of ``stderrs``.
        seed: Of the bootstrap.

    Raises:
        TypeError: If ``influence`` or ``bank`` is of another type.
        ValueError: If there is nothing to try, a damping is negative or not finite, curvature is
            the identity, or the bank is of other examples or queries.

    Example:
        >>> import torch
        >>> from curvlib.influence import retraining_bank
        >>> g = torch.Generator().manual_seed(0)
        >>> x, w = torch.randn(12, 2, generator=g).double(), torch.tensor([[1.0], [2.0]]).double()
        >>> y = x @ w + torch.randn(12, 1, generator=g)
        >>> def ridge(keep):  # trained to the optimum with weight decay 1
        ...     a = x[keep].mT @ x[keep] * (2 / int(keep.sum())) + torch.eye(2).double()
        ...     return torch.linalg.solve(a, x[keep].mT @ y[keep] * (2 / int(keep.sum())))
        >>> def train(keeps, seeds):
        ...     return torch.stack([(x @ ridge(keep) - y).square()[:, 0] for keep in keeps])
        >>> model = torch.nn.Linear(2, 1, bias=False).double()
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(ridge(torch.ones(12, dtype=torch.bool)).mT)
        >>> inf = Influence(model, torch.nn.MSELoss(), (x, y), progress=False)
        >>> bank = retraining_bank(train, 12, masks=20, repeats=1)
        >>> found = select_damping(inf, (x, y), bank, dampings=[0.0, 1.0, 30.0], relative=False)
        >>> found.damping
        1.0
    """
    given = list(influence) if isinstance(influence, (list, tuple)) else [influence]
    every = [one for one in given if isinstance(one, Influence)]
    if not every or len(every) < len(given):
        names = sorted({type(one).__name__ for one in given}) or ["none"]
        raise TypeError(f"select_damping takes an Influence, or several, got {', '.join(names)}")
    if any(one.preconditioner.operator is None for one in every):
        raise ValueError(
            "the identity has no curvature that could be damped; use curvature='ekfac'"
        )
    tried = [float(damping) for damping in dampings]
    if not tried or not all(math.isfinite(damping) and damping >= 0.0 for damping in tried):
        raise ValueError(
            f"dampings= takes finite numbers, at least 0, and one of them at least, got {tried}"
        )
    found = []
    for damping in tried:
        scores = [one.damped(damping, relative=relative).scores(query).scores for one in every]
        mean = torch.stack(scores).mean(0)
        found.append(linear_datamodeling_score(mean, bank, resamples=resamples, seed=seed))
    values = [lds.value for lds in found]
    return DampingSelection(
        damping=tried[values.index(max(values))],
        relative=relative,
        dampings=torch.tensor(tried, dtype=torch.float64),
        values=torch.tensor(values, dtype=torch.float64),
        stderrs=torch.tensor([lds.stderr for lds in found], dtype=torch.float64),
        settings={"influences": len(every), "resamples": resamples, "seed": seed},
    )
