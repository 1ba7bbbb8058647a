r"""When second-order steps stop paying: a rule on the loss alone, for MKOR-H.

That the loss falls more slowly says little, as it does so under any method. What says it is the
comparison with first-order steps at the same time and place, so these are tried now and then.
Steps go in blocks; the last one of ``every`` blocks takes first-order steps. The *rate* of a block
is how much the loss falls with each step: minus the slope of the straight line through its losses
(least squares; a quarter of them, at the beginning, is left out, since it follows from steps of the
other kind). A trial counts *against* second-order steps if

.. math:: r_1 \ge \frac1\kappa \cdot \frac{r_2^- + r_2^+}{2},

with the rates of the trial, of the blocks before and after it, and the cost :math:`\kappa \ge 1` of
a second-order step in first-order steps (a rise of the loss is not divided by it). After
``patience`` such trials in a row, first-order steps are taken for good.

No threshold has to be tuned to the loss's scale. Where neither kind makes progress, trials count
against with probability one half, and the cheaper one wins, on average after
:math:`2^{p + 1} - 2` trials.

MKOR's paper (section 3.2: *Hybrid MKOR*) says that it switches by "a loss decrease rate-based
method", but not which.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Trials:
    """When first-order steps are tried.

    Attributes:
        block: Steps of a block, at least 4.
        every: Blocks of a cycle, of which the last is a trial; at least 2.
        patience: Trials in a row that must count against second-order steps.

    Raises:
        ValueError: If a block or a cycle is shorter.
    """

    block: int = 20
    every: int = 4
    patience: int = 3

    def __post_init__(self) -> None:
        if self.block < 4 or self.every < 2 or self.patience < 1:
            raise ValueError(
                "a block has at least 4 steps, a cycle at least 2 blocks, and patience= is at "
                f"least 1; got block={self.block}, every={self.every} and "
                f"patience={self.patience}"
            )


@dataclass(frozen=True)
class HybridState:
    """What the rule remembers.

    Attributes:
        steps: Losses seen so far.
        block: Number of the block that goes on, counted from 0 in each cycle.
        losses: Its losses.
        before: Rate of the last second-order block.
        trial: Rate of the last trial, until it is judged.
        against: Trials in a row that counted against second-order steps.
        trials: Trials judged.
        switched_at: The number of steps after which first-order steps were taken for good.
    """

    steps: int = 0
    block: int = 0
    losses: tuple[float, ...] = ()
    before: float | None = None
    trial: float | None = None
    against: int = 0
    trials: int = 0
    switched_at: int | None = None

    def second_order(self, trials: Trials) -> bool:
        """Whether the next step is a second-order one."""
        return self.switched_at is None and self.block < trials.every - 1

    def plain(self) -> dict[str, Any]:
        """As a state dict keeps it."""
        return {**vars(self), "losses": list(self.losses)}

    @classmethod
    def from_plain(cls, kept: Mapping[str, Any]) -> HybridState:
        """From what :meth:`plain` returned."""
        return cls(**{**kept, "losses": tuple(kept["losses"])})


def init() -> HybridState:
    """The state before the first step."""
    return HybridState()


def rate(losses: tuple[float, ...]) -> float:
    """By how much the loss falls with each step, from the second quarter of a block on.

    Example:
        >>> rate((9.0, 9.0, 4.0, 3.0, 2.0, 1.0, 0.0, -1.0))
        1.0
    """
    used = losses[len(losses) // 4 :]
    n = len(used)
    middle, mean = (n - 1) / 2.0, math.fsum(used) / n
    slope = math.fsum((i - middle) * (loss - mean) for i, loss in enumerate(used))
    return -slope / (n * (n * n - 1) / 12.0)


def update(state: HybridState, loss: float, trials: Trials, *, cost: float) -> HybridState:
    r"""The state after a step, with the loss that it began with.

    Args:
        state: Before it.
        loss: Of its batch. One that is not finite is passed over.
        trials: When first-order steps are tried.
        cost: :math:`\kappa`, of a second-order step in first-order steps.
    """
    if state.switched_at is not None or not math.isfinite(loss):
        return replace(state, steps=state.steps + 1)
    losses = (*state.losses, loss)
    state = replace(state, steps=state.steps + 1, losses=losses)
    if len(losses) < trials.block:
        return state
    found = rate(losses)
    following = (state.block + 1) % trials.every
    state = replace(state, losses=(), block=following)
    if following == 0:
        return replace(state, trial=found)
    if state.trial is not None and state.before is not None:
        second = 0.5 * (state.before + found)
        worse = state.trial >= (second / cost if second > 0.0 else second)
        against = state.against + 1 if worse else 0
        over = state.steps if against >= trials.patience else None
        state = replace(
            state, trial=None, against=against, trials=state.trials + 1, switched_at=over
        )
    return replace(state, before=found)
