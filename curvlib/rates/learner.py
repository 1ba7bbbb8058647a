r"""Learning rate and momentum from the spectrum, while a network trains.

Heavy-ball momentum on a quadratic with curvatures from :math:`l` to :math:`L` converges fastest
with Polyak's pair

.. math:: \eta = \frac{4}{(\sqrt L + \sqrt l)^2}, \qquad
          \mu = \Big( \frac{\sqrt{L / l} - 1}{\sqrt{L / l} + 1} \Big)^2,
          \qquad \eta = \frac{(1 + \sqrt\mu)^2}{L} .

A :class:`LanczosLearner` reads both ends off a few Lanczos steps at chosen training steps:

* the low one, :math:`l`, from a *ghost batch* (some examples that are not trained on at that
  moment). It is the curvature below which lies a small share of the positive trace: neither the
  negative end nor the smallest Ritz value, which is noise;
* the high one, :math:`L`, is the batch sharpness: the mean largest curvature of mini-batches of
  the size that is trained with, which is larger than that of all data
  (:mod:`curvlib.rates.batch_sharpness`).

Mini-batches bound the learning rate further, and the more so the larger the momentum
(:mod:`curvlib.rates.laws`). With the noise :math:`\nu = \operatorname{tr}(H) / b` of batches whose
effective size is :math:`b = B / (1 - B / N)`, the learner takes

.. math:: \frac1\eta = \frac{L}{(1 + \sqrt\mu)^2} + \frac{\nu}{1 - \mu},

which is Polyak's :math:`\eta` without noise (the full batch), and half of the largest mean-square
stable learning rate, where convergence is fastest, where noise dominates.

Readings are smoothed (a moving average of logarithms), learning rate and :math:`1 - \mu` change by
a bounded factor from one reading to the next, and when the loss rises the learner rolls back to the
last good reading with a smaller learning rate.

*Groups and schedulers.* The learner owns no entry of ``optimizer.param_groups``. It puts its
learning rate and momentum there while ``optimizer.step()`` runs and takes them out again, so that
schedulers see their own numbers only. A group's learning rate is

.. math:: \eta_g = \eta \cdot \frac{\text{lr of the group now}}{\text{reference}},

where the reference is what the first group began with: ratios between groups are kept, and a
scheduler's warm-up or decay multiplies. ``learner.rates`` are the numbers in force.

Source: B. Polyak, *Some methods of speeding up the convergence of iteration methods*, 1964, for
the pair; D. Granziol, S. Zohren and S. Roberts, *Learning rates as a function of batch size*, JMLR
23 (2022), for Lanczos on the fly, which they call preliminary.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from curvlib.core.minibatch import require_batch_size
from curvlib.core.risk import Risk
from curvlib.estimators.arguments import require_counts
from curvlib.rates.arguments import first_seed, require_kind, require_risk
from curvlib.rates.learner_reading import Ends, LearnerReading, read_ends
from curvlib.rates.pair import Pair
from curvlib.rates.rollback import LossWatch, Snapshot
from curvlib.rates.training import (
    diverged,
    joined_loss,
    reference_rate,
    require_heavy_ball,
    require_positive,
    require_state,
    require_trained,
)

KIND = "LanczosLearner"
#: Copies of the parameters from one reading to the next, for roll-backs.
COPIES = 10


class LanczosLearner:
    r"""Sets the learning rate and momentum of ``torch.optim.SGD`` from short Lanczos runs.

    Call :meth:`step` once for each training step, before ``optimizer.step()``. In a process group,
    all ranks do, with the same parameters and states of the optimizer (as
    ``DistributedDataParallel`` keeps them): they read and decide alike. Without a reading, a step
    sends three numbers.

    Args:
        risk: Model, loss and data to read curvature from: the training data, or some thousand
            examples of them. A mean over independent examples.
        optimizer: The ``torch.optim.SGD`` that trains the model, without Nesterov's momentum. Its
            learning rates give the ratios between groups.
        every: Training steps from one reading to the next; the first is at the first step.
        batch_size: What is trained with; all of the risk's examples when omitted.
        ghost: Examples in the ghost batch; four times the batch size when omitted.
        steps: Lanczos steps on it.
        draws: Mini-batches whose sharpness is measured.
        share: Of the positive trace that lies below the low curvature; 0 takes the smallest
            positive Ritz value. More means less momentum.
        kind: ``"ggn"`` (the steadier, as it has no negative end) or ``"hessian"``.
        smoothing: Weight of the past in the moving averages, in [0, 1).
        change: Largest factor by which the pair changes between readings; the first is free.
        safety: Factor of the learning rate.
        max_momentum: Largest momentum. Below Polyak's, the learning rate follows
            :math:`(1 + \sqrt\mu)^2 / L`.
        rise: Roll back when the running loss is so many times its lowest; ``None`` never.
        restore: Whether a roll-back puts parameters, buffers and momentum back as well (they are
            copied ten times between readings), or cuts the learning rate only.
        generator: Where examples and random vectors come from, or
        seed: their seed. With neither, the seed is 0.

    Raises:
        TypeError: If an argument is of a wrong type, or the optimizer is no ``torch.optim.SGD``.
        ValueError: If an argument does not fit.

    Example:
        >>> import torch, curvlib as cl
        >>> x = torch.diag(torch.tensor([3.0, 2.0, 1.0])).double()
        >>> model = torch.nn.Linear(3, 1, bias=False).double()
        >>> risk = cl.Risk(model, torch.nn.MSELoss(), (x, torch.zeros(3, 1).double()))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> learner = LanczosLearner(risk, optimizer, share=0.0)
        >>> for _ in range(40):
        ...     optimizer.zero_grad()
        ...     loss = risk.loss.function(model(x), risk.data[1])
        ...     loss.backward()
        ...     _ = learner.step(loss)
        ...     optimizer.step()
        >>> round(learner.lr, 4), round(learner.momentum, 4)  # curvatures 6, 8/3 and 2/3
        (0.375, 0.25)
        >>> loss.item() < 1e-15
        True
    """

    def __init__(
        self,
        risk: Risk,
        optimizer: torch.optim.SGD,
        *,
        every: int = 100,
        batch_size: int | None = None,
        ghost: int | None = None,
        steps: int = 20,
        draws: int = 4,
        share: float = 0.01,
        kind: str = "ggn",
        smoothing: float = 0.5,
        change: float = 2.0,
        safety: float = 1.0,
        max_momentum: float = 0.95,
        rise: float | None = 2.0,
        restore: bool = True,
        generator: torch.Generator | None = None,
        seed: int | None = None,
    ) -> None:
        require_trained(risk, optimizer)
        require_heavy_ball(optimizer)
        self._count = require_risk(risk)
        self._batch = self._count if batch_size is None else batch_size
        require_batch_size(self._batch, self._count)
        self._ghost = min(4 * self._batch, self._count) if ghost is None else ghost
        require_batch_size(self._ghost, self._count)
        require_counts(every=(every, 1), steps=(steps, 2), draws=(draws, 1))
        require_kind(kind)
        require_positive(safety=safety)
        for name, value in (("share", share), ("smoothing", smoothing), ("momentum", max_momentum)):
            if not 0.0 <= value < 1.0:
                label = "max_momentum" if name == "momentum" else name
                raise ValueError(f"expected 0 <= {label} < 1, got {value}")
        for name, least in (("change", change), ("rise", 2.0 if rise is None else rise)):
            if not 1.0 < least < math.inf:
                raise ValueError(f"expected {name} > 1 (a factor), got {least}")
        self.risk, self.optimizer = risk, optimizer
        self.readings: list[LearnerReading] = []
        self._settings: dict[str, Any] = {
            "every": every,
            "batch_size": self._batch,
            "ghost": self._ghost,
            "steps": steps,
            "draws": draws,
            "share": share,
            "kind": kind,
            "smoothing": smoothing,
            "change": change,
            "safety": safety,
            "max_momentum": max_momentum,
            "rise": rise,
            "restore": restore,
            "size": risk.space.size,
        }
        references = [reference_rate(group) for group in optimizer.param_groups]
        require_positive(**{f"lr of group {i}": r for i, r in enumerate(references)})
        self._reference = references[0]
        self._ratios = [r / references[0] for r in references]
        self._base = first_seed(generator, seed)
        self._calls = 0
        self._pair = Pair()
        self._vector: Tensor | None = None
        self._watch = LossWatch(rise)
        self._snapshot: Snapshot | None = None
        self._held: list[tuple[Any, float]] | None = None
        self._handles = [
            optimizer.register_step_pre_hook(self._put),
            optimizer.register_step_post_hook(self._take),
        ]

    # ------------------------------------------------------------------- reading
    @property
    def lr(self) -> float:
        """Learning rate of the first group, without a schedule's factor and dampening."""
        return self._reference if self._pair.lr is None else self._pair.lr

    @property
    def momentum(self) -> float:
        """The momentum in force."""
        if self._pair.lr is None:
            return float(self.optimizer.param_groups[0]["momentum"])
        return self._pair.momentum

    @property
    def rates(self) -> list[tuple[float, float]]:
        """Learning rate and momentum of each group in the next ``optimizer.step()``."""
        return [
            (float(self._rate(group)), float(self._momentum(group)))
            for group in self.optimizer.param_groups
        ]

    @property
    def cost(self) -> float:
        """What all readings took, in training steps (gradients of ``batch_size`` examples)."""
        return sum(reading.cost for reading in self.readings)

    @property
    def products(self) -> int:
        """Columns multiplied by all readings."""
        return sum(reading.products for reading in self.readings)

    def step(self, loss: Tensor | float | None = None) -> LearnerReading | None:
        """To be called for each training step, before ``optimizer.step()``.

        Args:
            loss: The loss of this step's batch, to notice when it rises. In a process group, each
                rank passes that of its part; what counts is their mean.

        Returns:
            The reading, if one was due or the learner rolled back.

        Raises:
            TypeError: If the loss is no number.
            FloatingPointError: If parameters have diverged and nothing can be put back.
        """
        value = joined_loss(self.risk, loss)
        every = int(self._settings["every"])
        due = self._calls % every == 0
        reading = None
        if value is not None:
            if self._watch.risen(value):
                reading = self._roll_back(f"the loss rose to {value:.3g}")
            else:
                self._watch = self._watch.after(value)
        if reading is None and (due or self._calls % max(1, every // COPIES) == 0):
            where = diverged(self.risk)
            if where is not None:
                reading = self._roll_back(f"parameter {where!r} diverged")
            elif self._settings["restore"] and self._watch.good:
                self._snapshot = Snapshot.take(self.risk, self.optimizer)
        if due and reading is None:
            reading = self._read()
        self._calls += 1
        return reading

    def close(self) -> None:
        """Lets go of the optimizer, whose entries are as schedulers left them."""
        self._restore_groups()
        for handle in self._handles:
            handle.remove()

    # --------------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """Everything to continue bitwise: numbers, strings, tensors and lists of them."""
        return {
            "kind": KIND,
            "settings": dict(self._settings),
            "calls": self._calls,
            "base": self._base,
            "reference": self._reference,
            "ratios": list(self._ratios),
            "pair": asdict(self._pair),
            "watch": self._watch.state(),
            "vector": None if self._vector is None else self._vector.clone(),
            "snapshot": None if self._snapshot is None else self._snapshot.state(),
            "readings": [asdict(reading) for reading in self.readings],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from what :meth:`state_dict` gave.

        Raises:
            TypeError: If it is no dictionary.
            ValueError: If it is of something else, or of other settings.
        """
        require_state(state, self._settings, KIND)
        self._calls, self._base = int(state["calls"]), int(state["base"])
        self._reference, self._ratios = float(state["reference"]), list(state["ratios"])
        self._pair = Pair(**state["pair"])
        self._watch = LossWatch.of(state["watch"], self._settings["rise"])
        vector, snapshot = state["vector"], state["snapshot"]
        self._vector = None if vector is None else vector.clone()
        self._snapshot = None if snapshot is None else Snapshot.of(snapshot)
        self.readings = [LearnerReading(**reading) for reading in state["readings"]]

    # ------------------------------------------------------------------- private
    def _read(self) -> LearnerReading:
        s = self._settings
        found = read_ends(
            self.risk,
            self.optimizer,
            s,
            self._count,
            ratios=self._ratios,
            start=self._vector,
            seed=self._base + 1009 * self._calls,
        )
        self._vector = found.vector
        chosen = ("smoothing", "change", "safety", "max_momentum")
        self._pair, note = self._pair.after(
            found.sharpness, found.smallest, found.noise, **{name: s[name] for name in chosen}
        )
        if not found.sharpness > 0.0:
            warnings.warn(f"{KIND}: {note}", RuntimeWarning, stacklevel=3)
        return self._record(found, note)

    def _roll_back(self, why: str) -> LearnerReading:
        restored = self._snapshot is not None
        if self._snapshot is not None:
            self._snapshot.put_back(self.risk, self.optimizer)
        elif (where := diverged(self.risk)) is not None:
            raise FloatingPointError(
                f"{why}, and parameter {where!r} has entries that are NaN or infinite; there is "
                "nothing to put back. Start again with safety=0.5, or keep copies with restore=True"
            )
        factor = 1.0 / self._settings["change"]
        self._pair = self._pair.less(self.lr, self.momentum, factor)
        lr = self.lr
        self._watch = self._watch.again()
        last = "parameters put back and " if restored else ""
        return self._record(None, f"{why}: {last}learning rate cut to {lr:.3g}")

    def _record(self, found: Ends | None, note: str) -> LearnerReading:
        reading = LearnerReading(
            step=self._calls,
            largest=math.nan if found is None else found.largest,
            sharpness=math.nan if found is None else found.sharpness,
            smallest=math.nan if found is None else found.smallest,
            noise=math.nan if found is None else found.noise,
            lr=self.lr,
            momentum=self.momentum,
            products=0 if found is None else found.products,
            cost=0.0 if found is None else found.work / self._batch,
            note=note,
        )
        self.readings.append(reading)
        return reading

    # --------------------------------------------------------------------- hooks
    def _rate(self, group: dict[str, Any]) -> Any:
        if self._pair.lr is None:
            return group["lr"]
        factor = self._pair.lr / self._reference / (1.0 - float(group["dampening"]))
        return group["lr"] * factor

    def _momentum(self, group: dict[str, Any]) -> Any:
        return group["momentum"] if self._pair.lr is None else self._pair.momentum

    def _put(self, *_: Any) -> None:
        self._restore_groups()  # after an optimizer.step() that raised
        held = [(group["lr"], group["momentum"]) for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"], group["momentum"] = self._rate(group), self._momentum(group)
        self._held = held

    def _take(self, *_: Any) -> None:
        self._restore_groups()

    def _restore_groups(self) -> None:
        if self._held is not None:
            for group, (lr, momentum) in zip(self.optimizer.param_groups, self._held, strict=True):
                group["lr"], group["momentum"] = lr, momentum
            self._held = None
