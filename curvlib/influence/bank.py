r"""Banks of retrained models: the ground truth that influence scores are judged by.

For random subsets :math:`S_1, \dots, S_M` of the training examples, each a fraction
:math:`\alpha` of them, and :math:`R` retrainings with other seeds,

.. math:: L_{mq} = \frac1R \sum_r \ell_q\big(\theta(S_m, r)\big)

is the loss of query ``q``. One retraining is mostly noise; how much of the mean is not is told by
two halves of the retrainings, see :meth:`RetrainingBank.reliability`.

Source:
    Ilyas, Park, Engstrom, Leclerc and Madry, "Datamodels: Predicting Predictions from Training
    Data", 2022; Park et al., "TRAK: Attributing Model Behavior at Scale", 2023, section 2.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from curvlib.core.random import generator_of
from curvlib.core.result import Result
from curvlib.core.run import Progress, run
from curvlib.influence.ranks import rank_correlation

#: Trains models on kept examples ``[b, N]`` with seeds ``[b]``; returns query losses ``[b, Q]``.
Train = Callable[[Tensor, Sequence[int]], Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class RetrainingBank(Result):
    """Query losses of models that were trained on random subsets.

    Attributes:
        keep: Which examples each subset has, bool ``[M, N]``.
        losses: ``[M, R, Q]``, float64.
        settings: The settings, by name.
    """

    keep: Tensor
    losses: Tensor
    settings: dict[str, Any]

    def reliability(self, *, splits: int = 16, seed: int = 0) -> Tensor:
        r"""How much of the mean losses' ranks over subsets is no noise of training, ``[Q]``.

        The rank correlation of the means over two halves of the retrainings, averaged over random
        splits and carried to all of them by the Spearman-Brown formula
        :math:`n r / (1 + (n - 1) r)`. A perfect predictor has about its square root as its score.

        Raises:
            ValueError: If there is one retraining only.
        """
        _, R, _ = self.losses.shape
        if R < 2:
            raise ValueError(
                "the reliability needs two retrainings of each subset at least, got 1; build the "
                "bank with repeats=5"
            )
        random = generator_of(None, seed)
        half = R // 2
        found = []
        for _ in range(splits):
            order = torch.randperm(R, generator=random)
            first, second = order[:half], order[half : 2 * half]
            means = self.losses[:, first].mean(1), self.losses[:, second].mean(1)
            found.append(rank_correlation(means[0].mT, means[1].mT))
        r = torch.stack(found).mean(0).clamp(min=0.0)
        n = R / half
        return n * r / (1.0 + (n - 1.0) * r)


@dataclass(frozen=True, eq=False)
class BankState:
    """Losses of the models that have been trained, ``[done, Q]``."""

    losses: Tensor


def retraining_bank(
    train: Train,
    examples: int,
    *,
    masks: int = 100,
    repeats: int = 5,
    fraction: float = 0.5,
    together: int = 1,
    seed: int = 0,
    problem: str = "",
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: float = 30.0,
    progress: Progress = None,
) -> RetrainingBank:
    """Trains models on random subsets of the training examples, and keeps their query losses.

    Args:
        train: Function of kept examples, bool ``[b, N]``, and as many seeds, that trains ``b``
            models (in whatever way, at once or one by one) and returns their losses on the
            queries, ``[b, Q]``. It should depend on nothing else.
        examples: ``N``.
        masks: ``M``, subsets.
        repeats: ``R``, models for each, which differ in their seed.
        fraction: Of the examples in a subset.
        together: Models that ``train`` is asked for at a time.
        seed: Of the subsets and of the models' seeds.
        problem: What else the losses depend on (model, data), in words: a checkpoint of another
            problem is refused.
        checkpoint: A file to save to, and to continue from where it exists.
        save_every: Seconds between saves.
        progress: Whether to show a bar: see :data:`curvlib.core.run.Progress`.

    Raises:
        ValueError: If a number does not fit, or ``train`` returns losses of another shape.
        FloatingPointError: If a loss is not finite.

    Example:
        >>> import torch
        >>> def train(keep, seeds):  # a "model" whose loss counts missing examples
        ...     return (~keep).sum(1, keepdim=True).double()
        >>> bank = retraining_bank(train, 10, masks=4, repeats=2)
        >>> bank.keep.sum(1).tolist(), bank.losses.shape
        ([5, 5, 5, 5], torch.Size([4, 2, 1]))
    """
    kept = round(fraction * examples)
    if not 0 < kept < examples:
        raise ValueError(
            f"fraction= keeps {kept} of {examples} examples; a subset needs at least one, and not "
            "all of them"
        )
    for name, number in (("masks", masks), ("repeats", repeats), ("together", together)):
        if number < 1:
            raise ValueError(f"{name}= needs a positive number, got {number}")
    random = generator_of(None, seed)
    keep = torch.zeros((masks, examples), dtype=torch.bool)
    for row in keep:
        row[torch.randperm(examples, generator=random)[:kept]] = True
    seeds = torch.randint(2**31 - 1, (masks * repeats,), generator=random).tolist()
    total = masks * repeats

    def step(state: BankState) -> BankState:
        done = len(state.losses)
        models = range(done, min(done + together, total))
        rows = torch.tensor([i // repeats for i in models])
        new = train(keep[rows], [seeds[i] for i in models])
        new = torch.as_tensor(new).detach().double().cpu()
        width = state.losses.shape[1] if done else None
        if new.ndim != 2 or len(new) != len(models) or width not in (None, new.shape[1]):
            raise ValueError(
                f"train= should return losses of shape [{len(models)}, {width or 'Q'}] (models, "
                f"queries), got {list(new.shape)}"
            )
        bad = (~torch.isfinite(new)).any(1).nonzero()
        if len(bad):
            raise FloatingPointError(
                f"the model of subset {int(rows[bad[0]])} with seed {seeds[done + int(bad[0])]} "
                "has a query loss that is not finite: its training diverged; use a smaller "
                "learning rate in train="
            )
        return replace(state, losses=torch.cat([state.losses, new]) if done else new)

    settings = {"masks": masks, "repeats": repeats, "fraction": fraction, "seed": seed}
    last = run(
        lambda: BankState(torch.zeros((0, 0), dtype=torch.float64)),
        step,
        state_type=BankState,
        done=lambda state: len(state.losses) >= total,
        report=lambda state: (len(state.losses), total, ""),
        title="retraining",
        checkpoint=checkpoint,
        problem=lambda: f"{examples} {problem}",
        settings=settings,
        save_every=save_every,
        progress=progress,
    )
    return RetrainingBank(keep, last.losses.view(masks, repeats, -1), settings)
