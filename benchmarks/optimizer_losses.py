"""Steps and seconds to AdamW's final loss: every optimizer tuned alike.

Each has seven learning rates, a factor of ``10 ** (1 / 3)`` apart. The three whose final losses
(means of the last three evaluations) are the least on one seed are run on a second, and the one
with the least mean of both is taken. It is then run on other seeds. The goal is the median of
AdamW's final losses over those; steps and seconds are those of the first evaluation at which a run
is at or below it. Learning rates are constant. Everything else is at documented defaults, but for
what ``settings`` says: momentum 0.9 and no weight decay for all, and a few settings of ours
that were chosen from a few values on the first tuning seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import common
import torch
from optimizer_tasks import Run, Task, attention, train
from torch import nn

from curvlib.optim.adahessian import AdaHessian
from curvlib.optim.kfac import KFAC
from curvlib.optim.mfac import MFAC
from curvlib.optim.mkor import MKOR
from curvlib.optim.sophia import Sophia

TUNING_SEEDS = (100, 101)
Settings = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """An optimizer.

    Attributes:
        make: Of a model, learning rate, task and settings.
        lowest: Exponent (in thirds of a decade) of the lowest learning rate, by task.
        settings: That are not defaults, for all tasks (``""``) and by task.
        ours: Whether it is curvlib's.
    """

    make: Callable[[nn.Module, float, Task, Settings], torch.optim.Optimizer]
    lowest: dict[str, int]
    settings: dict[str, Settings]
    ours: bool = True

    def of(self, task: Task) -> Settings:
        return self.settings.get("", {}) | self.settings.get(task.name, {})

    def rates(self, task: Task) -> list[float]:
        """Seven of them."""
        first = self.lowest.get(task.name, self.lowest[""])
        return [float(f"{10.0 ** ((first + i) / 3.0):.3g}") for i in range(7)]


def _adahessian(model: nn.Module, lr: float, _: Task, more: Settings) -> AdaHessian:
    """Curvature in each of the first steps, if it is said so, and then at intervals."""
    more = dict(more)
    first, interval = more.pop("every step, first", 0), more.pop("interval", 1)
    opt = AdaHessian(model.parameters(), lr, interval=1 if first else interval, **more)

    def adapt(*_: Any) -> None:
        opt.interval = 1 if opt.clock.steps < first else interval

    opt.register_step_post_hook(adapt)
    return opt


def _kfac(model: nn.Module, lr: float, task: Task, more: Settings) -> KFAC:
    """The bound on steps is tuned with the learning rate: alone, neither does much."""
    more = dict(more)
    more["kl_clip"] = more.pop("kl_clip / lr ** 2") * lr**2
    if task.likelihood is not None:
        more = {"fisher": "mc", "loss": task.likelihood, **more}
    return KFAC(model, lr=lr, **more)


def _sophia(model: nn.Module, lr: float, task: Task, more: Settings) -> Sophia:
    own = "hutchinson" if task.likelihood is None else "gauss_newton"
    return Sophia(model.parameters(), lr, estimator=own, weight_decay=0.0, **more)


FACTORS: Settings = {"factor_interval": 5, "inverse_interval": 20, "kl_clip / lr ** 2": 0.03}
KFACS: dict[str, Settings] = {
    "": FACTORS | {"damping": 0.003},
    "hedging": {"damping": 0.1, "kl_clip / lr ** 2": 1.0},
}
METHODS: dict[str, Method] = {
    "SGD": Method(
        lambda m, lr, t, more: torch.optim.SGD(m.parameters(), lr, **more),
        {"": -6, "autoencoder": -3},
        {"": {"momentum": 0.9}},
        ours=False,
    ),
    "AdamW": Method(
        lambda m, lr, t, more: torch.optim.AdamW(m.parameters(), lr, **more),
        {"": -10, "digits": -9, "hedging": -8},
        {"": {"weight_decay": 0.0}},
        ours=False,
    ),
    "AdaHessian": Method(_adahessian, {"": -6}, {}),
    "AdaHessian, 10": Method(_adahessian, {"": -6}, {"": {"interval": 10}}),
    "AdaHessian, 1 then 10": Method(
        _adahessian, {"": -6}, {"": {"interval": 10, "every step, first": 30}}
    ),
    "Sophia": Method(
        _sophia,
        {"": -10, "autoencoder": -13},
        {"": {"rho": 0.3, "correct_bias": True}},
    ),
    "M-FAC": Method(
        lambda m, lr, t, more: MFAC(m.parameters(), lr, **more),
        {"": -6, "autoencoder": -3},
        {"": {"size": 64}},
    ),
    "K-FAC": Method(_kfac, {"": -6}, KFACS),
    "E-KFAC": Method(
        _kfac, {"": -6}, {k: more | {"eigen_corrected": True} for k, more in KFACS.items()}
    ),
    "MKOR": Method(
        lambda m, lr, t, more: MKOR(m, lr=lr, **more),
        {"": -9},
        {},
    ),
}


def compare(
    task: Task, names: list[str], seeds: int, known: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Rows of one task; those of AdamW that are known give the goal where it is not run."""
    goal = next((row["goal"] for row in known if row["method"] == "AdamW"), None)
    if goal is None or "AdamW" in names:
        names = ["AdamW", *(name for name in names if name != "AdamW")]
    for name in names:
        with attention():
            lr, tried, runs = tuned(task, METHODS[name], seeds)
        if name == "AdamW":
            goal = statistics.median(run.final for run in runs)
        assert goal is not None
        yield row(task, name, goal, lr, tried, runs)


def tuned(task: Task, method: Method, seeds: int) -> tuple[float, dict[float, float], list[Run]]:
    """The best rate, final losses on the first tuning seed by rate, and runs at the best rate."""
    more = method.of(task)

    def run(lr: float, seed: int) -> Run:
        return train(task, lambda model: method.make(model, lr, task, more), seed)

    tried = {lr: run(lr, TUNING_SEEDS[0]).final for lr in method.rates(task)}
    short = sorted(tried, key=lambda lr: tried[lr])[:3]
    both = {lr: tried[lr] + run(lr, TUNING_SEEDS[1]).final for lr in short}
    best = min(both, key=lambda lr: both[lr])
    return best, tried, [run(best, seed) for seed in range(seeds)]


def row(
    task: Task, name: str, goal: float, lr: float, tried: dict[float, float], runs: list[Run]
) -> dict[str, Any]:
    reached = [run.reached(goal) for run in runs]
    rates = list(tried)
    said = {
        key: type(value).__name__ if isinstance(value, nn.Module) else value
        for key, value in METHODS[name].of(task).items()
    }

    def to_goal(values: Callable[[Run], list[float]]) -> list[float | None]:
        """Median, least and most; ``None`` for runs that do not get there."""
        found = [
            math.inf if i is None else values(r)[i] for r, i in zip(runs, reached, strict=True)
        ]
        spread = statistics.median(found), min(found), max(found)
        return [round(v, 4) if math.isfinite(v) else None for v in spread]

    finals = [run.final for run in runs]
    spread = statistics.median(finals), min(finals), max(finals)
    return {
        "part": "loss",
        "task": task.name,
        "data": task.data,
        "method": name,
        "settings": said,
        "lr": lr,
        "at the end of the grid": lr in (rates[0], rates[-1]),
        "rates": rates,
        "tuning losses": [float(f"{v:.4g}") if math.isfinite(v) else None for v in tried.values()],
        "final loss": [float(f"{v:.4g}") if math.isfinite(v) else None for v in spread],
        "goal": float(f"{goal:.6g}"),
        "reached": sum(i is not None for i in reached),
        "seeds": len(runs),
        "steps": to_goal(lambda r: [float(task.every * i) for i in range(len(r.losses))]),
        "of steps": task.steps,
        "seconds": to_goal(lambda r: r.seconds),
        "processor seconds": to_goal(lambda r: r.work),
        "ms a step": round(1e3 * statistics.median(r.work[-1] for r in runs) / task.steps, 3),
    }


def show(rows: list[dict[str, Any]]) -> str:
    """A table; ranges in brackets."""

    def three(values: list[float | None], spec: str) -> str:
        middle, low, high = ("-" if v is None else format(v, spec) for v in values)
        return f"{middle} ({low}-{high})"

    lines = [
        {
            "task": r["task"],
            "method": r["method"],
            "lr": f"{r['lr']:g}" + (" (end)" if r["at the end of the grid"] else ""),
            "final loss": three(r["final loss"], ".4g"),
            "steps to AdamW's": three(r["steps"], ".0f"),
            "seconds": three(r["seconds"], ".2f"),
            "processor s": three(r["processor seconds"], ".2f"),
            "ms a step": f"{r['ms a step']:.2f}",
        }
        for r in rows
    ]
    return common.table(lines, dict.fromkeys(lines[0], ""))
