"""Removal curves: does leaving out the most influential examples hurt as predicted?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvlib.core.digest import digest
from curvlib.core.random import generator_of
from curvlib.core.result import Result, axes_or_new, unframed
from curvlib.core.run import Progress, run
from curvlib.influence.bank import BankState, Train

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, repr=False)
class RemovalCurve(Result):
    """Mean query losses after the removal of examples, with the scores' choice and at random.

    Attributes:
        removed: How many examples are removed, ``[K]``.
        change: Change of the mean query loss with the top ones removed, ``[K]``, over that of the
            models that were trained on everything.
        change_stderr: Its standard error over retrainings, ``[K]``.
        random: The same with as many random examples removed, ``[K]``.
        random_stderr: Its standard error.
        base: Mean query loss of the models that were trained on everything.
        losses: All of them, ``[2 K + 1, R]``: everything, the top ones, random ones.
    """

    removed: Tensor
    change: Tensor
    change_stderr: Tensor
    random: Tensor
    random_stderr: Tensor
    base: float
    losses: Tensor

    def plot(self, ax: Axes | None = None, *, label: str = "most influential") -> Axes:
        """Changes of the loss against the number of removed examples.

        Raises:
            ImportError: If matplotlib is absent.
        """
        ax = axes_or_new(ax)
        curves = (
            (label, self.change, self.change_stderr, "#D55E00"),
            ("at random", self.random, self.random_stderr, "0.5"),
        )
        for name, values, errors, color in curves:
            ax.errorbar(
                self.removed.tolist(),
                values.tolist(),
                yerr=errors.tolist(),
                label=name,
                color=color,
                marker="o",
                ms=3.5,
                capsize=2,
            )
        ax.axhline(0.0, color="0.8", lw=0.8)
        ax.set_xlabel("examples removed")
        ax.set_ylabel("change of the query loss")
        return unframed(ax)


def removal_curve(
    train: Train,
    scores: Tensor,
    *,
    removed: Sequence[int],
    repeats: int = 5,
    seed: int = 0,
    problem: str = "",
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: float = 30.0,
    progress: Progress = None,
) -> RemovalCurve:
    """Retrains without the examples of the highest scores, and without random ones.

    Args:
        train: Trains models on kept examples and returns their query losses: see
            :func:`curvlib.influence.bank.retraining_bank`.
        scores: ``[N]``: of one query, or summed over queries. Positive for proponents, so that
            their removal raises the loss.
        removed: How many examples are left out, ``K`` increasing numbers below ``N``.
        repeats: ``R``, models of each; their random removals differ, too.
        seed: Of the models and of the random choices.
        problem: What else the losses depend on, in words: a checkpoint of another is refused.
        checkpoint: A file to save to, and to continue from where it exists.
        save_every: Seconds between saves.
        progress: Whether to show a bar: see :data:`curvlib.core.run.Progress`.

    Raises:
        ValueError: If a number or a shape does not fit.

    Example:
        >>> import torch
        >>> worth = torch.arange(10.0).double()
        >>> def train(keep, seeds):
        ...     return -(keep.double() @ worth)[:, None]
        >>> curve = removal_curve(train, worth, removed=[1, 2])
        >>> curve.change.tolist(), bool((curve.random <= curve.change).all())
        ([9.0, 17.0], True)
    """
    counts = list(removed)
    N = len(scores)
    if scores.ndim != 1 or not bool(torch.isfinite(scores).all()):
        raise ValueError(f"expected finite scores of shape [N], got {list(scores.shape)}")
    if not counts or counts != sorted(set(counts)) or not 0 < counts[0] <= counts[-1] < N:
        raise ValueError(
            f"removed= takes increasing numbers of examples from 1 to {N - 1}, got {counts}"
        )
    if repeats < 2:
        raise ValueError(f"repeats= needs two models at least, for standard errors, got {repeats}")
    random = generator_of(None, seed)
    seeds = torch.randint(2**31 - 1, (repeats,), generator=random).tolist()
    order = scores.cpu().sort(descending=True, stable=True).indices
    keep = torch.ones((2 * len(counts) + 1, repeats, N), dtype=torch.bool)
    for i, count in enumerate(counts):
        keep[1 + i][:, order[:count]] = False
        for r in range(repeats):
            keep[1 + len(counts) + i, r, torch.randperm(N, generator=random)[:count]] = False

    def step(state: BankState) -> BankState:
        row = keep[len(state.losses)]
        losses = torch.as_tensor(train(row, seeds)).detach().double().cpu()
        if losses.ndim != 2 or len(losses) != repeats:
            raise ValueError(
                f"train= should return losses of shape [{repeats}, Q], got {list(losses.shape)}"
            )
        means = losses.mean(1)[None]
        return BankState(torch.cat([state.losses, means]) if len(state.losses) else means)

    last = run(
        lambda: BankState(torch.zeros((0, repeats), dtype=torch.float64)),
        step,
        state_type=BankState,
        done=lambda state: len(state.losses) >= len(keep),
        report=lambda state: (len(state.losses), len(keep), ""),
        title="removal curve",
        checkpoint=checkpoint,
        problem=lambda: f"{digest([scores])} {problem}",
        settings={"removed": counts, "repeats": repeats, "seed": seed},
        save_every=save_every,
        progress=progress,
    ).losses
    change = last[1:] - last[0]  # models of one seed are compared with each other
    mean, error = change.mean(1), change.std(1) / repeats**0.5
    K = len(counts)
    return RemovalCurve(
        removed=torch.tensor(counts),
        change=mean[:K],
        change_stderr=error[:K],
        random=mean[K:],
        random_stderr=error[K:],
        base=float(last[0].mean()),
        losses=last,
    )
