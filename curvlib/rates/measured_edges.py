r"""Measured edges of stability for each batch size, to hold predictions against.

Copies of a model are trained from its present parameters at learning rates on a grid
(:mod:`curvlib.rates.edge`), and the loss on all data is read at equal distances. Two edges are told
apart:

``value``
    The largest *stable* learning rate: no reading is above ``rise`` times the loss at the start.
    That is what stability laws speak of.
``trainable``
    The largest learning rate from which training *recovers*: the mean of the last quarter of the
    readings is not above that. It is the larger one, often by up to two times from random
    parameters: the loss leaps, curvature falls on the way, and training goes on in a flatter place
    (the catapult of A. Lewkowycz et al., *The large learning rate phase of deep learning*, 2020).

From trained parameters, whose loss is small, noise alone lifts the loss of small batches above
``rise`` times itself, so that the stable edge is too small there; ``trainable`` is the one to look
at then, or a larger ``rise``.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from curvlib.core.minibatch import minibatches, require_batch_size
from curvlib.core.ranks.group import together
from curvlib.core.ranks.turns import added
from curvlib.core.result import Result, axes_or_new
from curvlib.core.risk import Risk
from curvlib.core.run import Progress, run
from curvlib.estimators.arguments import require_counts
from curvlib.rates.arguments import require_risk
from curvlib.rates.edge import bracket, edge_of_brackets, require_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Makes an optimizer from parameters and a learning rate.
Maker = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]
#: How often the loss on all data is read in a run, at least.
READINGS = 20
#: Optimizers that are made here, by name.
TRAINERS = ("sgd", "momentum", "adam")


@dataclass(frozen=True, eq=False, repr=False)
class MeasuredEdges(Result):
    """Largest learning rates that training survived.

    Attributes:
        value: Largest stable learning rate, ``[n]``, float64: geometric mean over seeds.
        stderr: Its standard error over seeds and the grid, ``[n]``.
        trainable: Largest learning rate from which training recovers, ``[n]``.
        trainable_stderr: Its standard error.
        low: Stable ones below each edge, ``[n, S]``; ``high`` are the next ones on the grid.
        high: ``[n, S]``.
        trainable_low: The same of ``trainable``, ``[n, S]``.
        trainable_high: ``[n, S]``.
        batch_sizes: ``[n]``, int64.
        optimizer: What trained, in words.
        steps: Training steps of a run.
        start: The loss at the start.
        rise: A loss above so many times that counts as unstable.
        runs: How often a copy was trained.
        settings: The settings, by name.
    """

    value: Tensor
    stderr: Tensor
    trainable: Tensor
    trainable_stderr: Tensor
    low: Tensor
    high: Tensor
    trainable_low: Tensor
    trainable_high: Tensor
    batch_sizes: Tensor
    optimizer: str
    steps: int
    start: float
    rise: float
    runs: int
    settings: dict[str, Any]

    def table(self) -> str:
        """The edges as text, a line for each batch size."""
        lines = [f"{'batch':>7}  {'stable':>10}  {'± error':>8}  {'trainable':>10}  {'± error':>8}"]
        columns = (self.value, self.stderr, self.trainable, self.trainable_stderr)
        for size, *row in zip(self.batch_sizes.tolist(), *map(_list, columns), strict=True):
            lines.append(f"{size:7d}  {row[0]:10.4g}  {row[1]:8.1e}  {row[2]:10.4g}  {row[3]:8.1e}")
        lines.append(
            f"{self.optimizer}, {self.steps} steps from a loss of {self.start:.4g}; unstable above "
            f"{self.rise:g} times that"
        )
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The edges against the batch size, on logarithmic axes.

        Args:
            ax: Where to draw; a new figure when omitted.

        Raises:
            ImportError: If matplotlib is absent.
        """
        ax = axes_or_new(ax)
        sizes = self.batch_sizes.tolist()
        rows = (
            ("measured: stable", self.value, self.stderr, {"mfc": "0.1"}),
            ("measured: recovers", self.trainable, self.trainable_stderr, {"mfc": "white"}),
        )
        for label, values, errors, look in rows:
            ax.errorbar(
                sizes,
                values.tolist(),
                yerr=errors.tolist(),
                fmt="s",
                ms=5,
                color="0.1",
                lw=1.0,
                capsize=2.5,
                label=label,
                zorder=4,
                **look,
            )
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlabel("batch size")
        ax.set_ylabel("learning rate")
        ax.legend(frameon=False)
        return ax


@dataclass(frozen=True)
class _State:
    done: int
    stable: Tensor  # [n, S, 2]: the brackets' ends
    trainable: Tensor
    runs: int


def measured_edges(
    risk: Risk,
    batch_sizes: Sequence[int],
    optimizer: str | Maker = "sgd",
    *,
    momentum: float = 0.9,
    steps: int = 200,
    seeds: int = 3,
    rise: float = 2.0,
    guess: float = 0.1,
    ratio: float = 2.0**0.25,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: float = 30.0,
    progress: Progress = None,
) -> MeasuredEdges:
    r"""Trains copies of a model to find the largest learning rate for each batch size.

    Batches are independent draws without replacement, the same ones at all learning rates. The
    learning rate is constant. Parameters that the risk does not select stay as they are, as do
    buffers. Costs about eight runs for each batch size and seed.

    Args:
        risk: Model, loss, data and parameters: a mean over independent examples. The model is left
            as it is.
        batch_sizes: Each from 1 to ``N``.
        optimizer: ``"sgd"``, ``"momentum"``, ``"adam"``, or a function of parameters and a
            learning rate that makes a ``torch.optim.Optimizer``.
        momentum: Of ``"momentum"``, or Adam's :math:`\beta_1`.
        steps: Training steps of a run.
        seeds: How many orders of the data; one for the full batch.
        rise: A loss above so many times that at the start is unstable; for a loss below zero, one
            above the start divided by it.
        guess: The learning rate at which the first search begins.
        ratio: Of neighbouring learning rates on the grid.
        seed: First of the seeds.
        checkpoint: File to continue from, and to save to, edge by edge.
        save_every: Seconds between saves.
        progress: Whether to show a bar, or a function to call instead.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If a batch size, the optimizer or a setting does not fit.
        RuntimeError: If no learning rate is too large, or each is.
        FloatingPointError: If the loss at the start is not finite.

    Example:
        >>> import torch, curvlib as cl
        >>> x = torch.diag(torch.tensor([2.0, 1.0])).double()
        >>> risk = cl.Risk(
        ...     torch.nn.Linear(2, 1).double(), torch.nn.MSELoss(), (x, x.sum(1, keepdim=True))
        ... )
        >>> found = measured_edges(risk, [2], seeds=1, progress=False)
        >>> top = cl.eigenpairs(cl.hessian(risk), k=1).values[0]
        >>> bool(abs(found.value[0] * top / 2.0 - 1.0) < 0.15)
        True
    """
    count = require_risk(risk)
    sizes = [require_batch_size(size, count) for size in batch_sizes]
    if not sizes:
        raise ValueError("expected at least one batch size, got none")
    require_counts(steps=(steps, 4), seeds=(seeds, 1))
    if not (rise > 1.0 and math.isfinite(rise)):
        raise ValueError(f"expected rise > 1 (a factor of the loss at the start), got {rise}")
    require_grid(guess, ratio)
    make, words = _maker(optimizer, momentum)
    trainer = _Trainer(risk, make, steps)
    limit = rise * trainer.start if trainer.start > 0.0 else trainer.start / rise
    columns = [1 if size == count else seeds for size in sizes]
    places = [(i, j) for i, n in enumerate(columns) for j in range(n)]
    empty = torch.full((len(sizes), seeds, 2), math.nan, dtype=torch.float64)

    def step(state: _State) -> _State:
        i, j = places[state.done]
        start = guess
        if state.done:  # on the grid of the first guess, next to the edge that was found last
            last = float(state.stable[places[state.done - 1]][0])
            start = guess * ratio ** round(math.log(last / guess) / math.log(ratio))
        seen: dict[float, tuple[float, float]] = {}

        def readings(lr: float) -> tuple[float, float]:
            key = round(math.log(lr), 9)
            if key not in seen:
                seen[key] = trainer.train(lr, sizes[i], seed + j)
            return seen[key]

        ends = bracket(lambda lr: readings(lr)[0] <= limit, start, ratio)
        wide = bracket(lambda lr: readings(lr)[1] <= limit, ends[0], ratio)
        stable, trainable = state.stable.clone(), state.trainable.clone()
        where = (i, slice(None) if columns[i] == 1 else j)
        stable[where] = torch.tensor(ends, dtype=torch.float64)
        trainable[where] = torch.tensor(wide, dtype=torch.float64)
        return _State(state.done + 1, stable, trainable, state.runs + len(seen))

    settings = {
        "batch_sizes": sizes,
        "optimizer": words,
        "steps": steps,
        "seeds": seeds,
        "rise": rise,
        "guess": guess,
        "ratio": ratio,
        "seed": seed,
    }
    last = run(
        lambda: _State(0, empty, empty, 0),
        step,
        state_type=_State,
        done=lambda state: state.done == len(places),
        report=lambda state: (state.done, len(places), ""),
        title="measured edges",
        checkpoint=checkpoint,
        problem=risk.fingerprint,
        settings=settings,
        save_every=save_every,
        progress=progress,
        group=risk.group,
    )
    used = [slice(0, n) for n in columns]
    values = [
        [edge_of_brackets(ends[i, s, 0], ends[i, s, 1]) for i, s in enumerate(used)]
        for ends in (last.stable, last.trainable)
    ]
    (value, stderr), (trainable, error) = (
        torch.tensor(rows, dtype=torch.float64).T.contiguous() for rows in values
    )
    return MeasuredEdges(
        value=value,
        stderr=stderr,
        trainable=trainable,
        trainable_stderr=error,
        low=last.stable[..., 0].contiguous(),
        high=last.stable[..., 1].contiguous(),
        trainable_low=last.trainable[..., 0].contiguous(),
        trainable_high=last.trainable[..., 1].contiguous(),
        batch_sizes=torch.tensor(sizes),
        optimizer=words,
        steps=steps,
        start=trainer.start,
        rise=rise,
        runs=last.runs,
        settings=settings,
    )


class _Trainer:
    """Trains one copy of a model again and again from the same parameters."""

    def __init__(self, risk: Risk, make: Maker, steps: int) -> None:
        self.risk = risk.of(copy.deepcopy(risk.model))
        self.make, self.steps = make, steps
        self.start = float(self.risk.value())
        self._first = [p.detach().clone() for p in self.risk.params.values()]

    def train(self, lr: float, batch_size: int, seed: int) -> tuple[float, float]:
        """The highest reading of the loss, and the mean of the last quarter of them."""
        params = [p for p in self.risk.params.values() if isinstance(p, nn.Parameter)]
        with torch.no_grad():
            for p, first in zip(params, self._first, strict=True):
                p.copy_(first)
        optimizer = self.make(params, lr)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                "optimizer= should make a torch.optim.Optimizer from parameters and a learning "
                f"rate, got {type(optimizer).__name__}"
            )
        every = max(1, self.steps // READINGS)
        losses: list[float] = []
        for done, part in enumerate(self._parts(batch_size, seed), start=1):
            self._step(part, optimizer, params)
            if done % every == 0:
                losses.append(self._loss())
                if losses[-1] == math.inf:
                    return math.inf, math.inf
        quarter = losses[-max(1, len(losses) // 4) :]
        return max(losses), sum(quarter) / len(quarter)

    def _parts(self, batch_size: int, seed: int) -> Any:
        """Mini-batches, drawn some at a time: not more examples at once than the data has."""
        random = torch.Generator().manual_seed(seed)
        left = self.steps
        room = max(1, require_risk(self.risk) // batch_size)
        while left:
            draws = min(left, room)
            yield from minibatches(self.risk, batch_size, draws, generator=random)
            left -= draws

    def _step(
        self, part: Risk, optimizer: torch.optim.Optimizer, params: list[nn.Parameter]
    ) -> None:
        """A training step, with the mean gradient of a mini-batch."""
        space = part.space
        total = torch.zeros(space.size, dtype=space.dtype, device=space.device)
        tally = torch.zeros(1 + len(params), dtype=torch.float64, device=space.device)
        with together(part.group, "a training step"), part.untouched():
            for batch in part.batches(shard=True):
                grads = batch.gradient()
                space.write(grads, total, add=True)
                tally[0] += batch.weight
                tally[1:] += torch.tensor([float(g is not None) for g in grads]).to(tally)
        total, tally = added(part.group, total), added(part.group, tally)
        weight, *used = tally.tolist()
        if weight <= 0.0:  # nothing but masked terms
            return
        for p, mean, seen in zip(params, space.split(total / weight), used, strict=True):
            p.grad = mean.to(p.dtype) if seen else None
        optimizer.step()
        optimizer.zero_grad()

    def _loss(self) -> float:
        """The loss on all data; infinite where it is not finite."""
        try:
            return float(self.risk.value())
        except FloatingPointError:
            return math.inf


def _maker(optimizer: str | Maker, momentum: float) -> tuple[Maker, str]:
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"expected 0 <= momentum < 1, got {momentum}")
    if optimizer == "sgd":
        return (lambda params, lr: torch.optim.SGD(params, lr=lr)), "SGD"
    if optimizer == "momentum":
        words = f"SGD with momentum {momentum:g}"
        return (lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=momentum)), words
    if optimizer == "adam":
        betas = (momentum, 0.999)
        words = f"Adam with beta1 {momentum:g}"
        return (lambda params, lr: torch.optim.Adam(params, lr=lr, betas=betas)), words
    if callable(optimizer):
        return optimizer, getattr(optimizer, "__name__", type(optimizer).__name__)
    raise ValueError(
        f"unknown optimizer={optimizer!r}; there are {', '.join(map(repr, TRAINERS))}, and "
        "functions of parameters and a learning rate that make one"
    )


def _list(values: Tensor) -> list[float]:
    return [float(v) for v in values]
