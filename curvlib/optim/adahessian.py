r"""AdaHessian: the averaged gradient over the Hessian's diagonal, or over the norms of its rows.

Every ``interval`` steps, a double backward of the loss gives the product :math:`Hz` with random
signs (Hutchinson), and the step divides the averaged gradient by the averaged curvature: see
:mod:`curvlib.optim.rules.adahessian` for the formulas. Work in gradients of the loss: 3 in a step
with curvature (with one probe), 1 in the others. Memory: one tensor of the parameter's shape, and
one of its number of blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from curvlib.core.ranks.places import UNFOLLOWED
from curvlib.optim import arguments
from curvlib.optim.gradients import Gradients
from curvlib.optim.probed import probed_products
from curvlib.optim.rules.adahessian import (
    ESTIMANDS,
    Moments,
    Settings,
    averaged,
    block_means,
    init,
    move,
    reading,
)
from curvlib.optim.shell import CurvatureOptimizer


class AdaHessian(CurvatureOptimizer):
    r"""AdaHessian (Yao et al., AAAI 2021), in the paper's form and in an unbiased one.

    Args:
        params: Parameters, named parameters or groups, in which ``lr``, ``betas``, ``eps``,
            ``hessian_power``, ``weight_decay``, ``block_size``, ``foreach`` and ``maximize`` may
            differ.
        lr: Learning rate.
        betas: Decay of the averages of gradients and of curvature.
        eps: Added to the curvature (in its unit to the power ``hessian_power``), above 0.
        hessian_power: Exponent of the curvature: 1 in the paper, 0 is SGD with momentum.
        weight_decay: Decoupled: each step subtracts ``lr * weight_decay * parameter``.
        estimand: What curvature stands for. ``"rownorm"``, the paper's rule step for step,
            converges to the norms of the Hessian's rows. ``"diagonal"`` converges to the absolute
            value of its diagonal; where that is small beside its row, the average is noisy and
            often near zero by chance, so that it needs a larger ``eps`` (1e-2) and a smaller
            ``lr`` (a tenth) than the other, which is the default for that reason.
        interval: Steps from one curvature update to the next. Above 1, give the average a start:
        warmup: So many first steps all take curvature in. Ten steps on a single noisy product
            diverge at learning rates that ``interval=1`` stands; 30 make up for it.
        probes: Random vectors of each curvature update, each of which costs two gradients.
        block_size: Entries whose curvature is averaged: ``None``: the kernel of a convolution
            (tensors of 3 and more dimensions; all but the first two), as in the paper; or the
            length of runs of the flattened tensor, for those of 2 and more dimensions; 1: none.
        foreach: Whether a step does all tensors of a group at once: faster on a GPU, and more
            memory. ``None``: there, and small tensors together on a CPU.
        maximize: Whether the loss is maximized.
        seed: Of the probes.
        process_group: Replicas of data-parallel training; the default group if
            ``torch.distributed`` is initialized. Curvature and, in ``backward`` and
            ``step(closure)``, gradients are averaged over it.

    Raises:
        TypeError: If parameters are no real floating-point tensors, or an argument has another
            type.
        ValueError: If there are no parameters, one is there twice, or an argument is out of range.

    Parameters may be sharded (FSDP2), unless blocks would be cut: each rank then steps its slices,
    and a loss whose curvature is read comes from the closure, or from a block ``with
    opt.gathering():``. With :math:`K` probes such a pass sends the parameters about :math:`3 + 4 K`
    times (3 in FSDP2's own).

    A parameter that got its first gradient between two curvature updates waits for the next.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0], [-2.0]])
        >>> opt = AdaHessian(model.parameters(), lr=1.0, betas=(0.0, 0.999), eps=1e-8)
        >>> before = opt.step(lambda: torch.nn.functional.mse_loss(model(x), y))
        >>> [round(w, 4) for w in model.weight.flatten().tolist()]  # a Newton step: H is diagonal
        [1.0, -1.0]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        *,
        hessian_power: float = 1.0,
        weight_decay: float = 0.0,
        estimand: str = "rownorm",
        interval: int = 1,
        warmup: int = 0,
        probes: int = 1,
        block_size: int | None = None,
        foreach: bool | None = None,
        maximize: bool = False,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.estimand = arguments.choice("estimand", estimand, ESTIMANDS)
        self.interval = arguments.count("interval", interval)
        if isinstance(warmup, bool) or not isinstance(warmup, int):
            raise TypeError(f"warmup= is an int, got {type(warmup).__name__}")
        if warmup < 0:
            raise ValueError(f"warmup= is a number of steps, at least 0, got {warmup}")
        self.warmup = warmup
        self.probes = arguments.count("probes", probes)
        self._verified = False
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "hessian_power": hessian_power,
            "weight_decay": weight_decay,
            "block_size": block_size,
            "foreach": foreach,
            "maximize": maximize,
        }
        super().__init__(params, defaults, seed=seed, process_group=process_group)

    follows_shards = True

    def _check(self, group: dict[str, Any]) -> None:
        arguments.nonnegative(group, "lr", "hessian_power", "weight_decay")
        arguments.positive(group, "eps")
        arguments.fractions(group, "betas")
        if group["block_size"] is not None:
            arguments.count("block_size", group["block_size"])
        if self.sharding is not None:
            _require_whole_blocks(group)
        if group["foreach"] is not None:
            arguments.flag(group, "foreach")

    def _due(self) -> bool:
        return self.clock.steps < self.warmup or self.clock.due(self.interval)

    def _observe(self, loss: Tensor, scale: float) -> list[Tensor | None]:
        members = self.trainable()
        vectors, gradients, products = probed_products(
            self, loss, scale, self.probes, verify=not self._verified
        )
        self._verified = True
        replicas = self.replicas
        for n, (i, p, group) in enumerate(members):
            if gradients[n] is None and replicas == 1:
                continue  # other ranks may use what this one does not
            for k in range(self.probes):
                seen = products[k][n]
                part = torch.zeros_like(p) if seen is None else seen / replicas
                name = f"{i}.{k}"
                if self.estimand == "diagonal":  # linear, so that one sum is enough
                    part = block_means(part * vectors[k][n], group["block_size"]) / self.probes
                    name = f"{i}"
                self._add(name, part)
        return gradients

    def _update(self, gradients: Gradients) -> bool:
        number, work = 0, []
        for group, grads in zip(self.param_groups, gradients, strict=True):
            settings = self._settings(group)
            jobs = []
            for i, (p, g) in enumerate(zip(group["params"], grads, strict=True), number):
                if g is not None:
                    jobs.append((p, g, self._reading(i, settings)))
            work.append((group, settings, jobs))
            number += len(grads)
        if not self.finite(r for _, _, jobs in work for _, _, r in jobs):
            return False  # squares overflowed
        for group, settings, jobs in work:
            for part in _parts(jobs, group["foreach"]):
                params = [p for p, _, _ in part]
                slices = [self.own(p) for p in params]
                moments = [
                    Moments(**self.state[p]) if p in self.state else init(own, settings)
                    for p, own in zip(params, slices, strict=True)
                ]
                moments = averaged(
                    [g for _, g, _ in part], [r for _, _, r in part], moments, settings
                )
                move(slices, moments, settings)
                for p, kept in zip(params, moments, strict=True):
                    self.state[p] = dict(vars(kept))
        return True

    def _reading(self, number: int, settings: Settings) -> Tensor | None:
        if self.estimand == "diagonal":  # block means already
            return self.pending.get(f"{number}")
        found = [self.pending.get(f"{number}.{k}") for k in range(self.probes)]
        products = [f for f in found if f is not None]
        return reading(products, settings) if products else None

    def _settings(self, group: dict[str, Any]) -> Settings:
        return Settings(
            float(group["lr"]),
            (float(group["betas"][0]), float(group["betas"][1])),
            float(group["eps"]),
            float(group["hessian_power"]),
            float(group["weight_decay"]),
            self.estimand,
            group["block_size"],
        )

    def _extra_state(self) -> dict[str, Any]:
        return {"estimand": self.estimand}

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        if state["estimand"] != self.estimand:
            raise ValueError(
                f"the state holds averages of estimand={state['estimand']!r}, and this optimizer "
                f"has {self.estimand!r}"
            )


Job = tuple[Tensor, Tensor, "Tensor | None"]


def _require_whole_blocks(group: dict[str, Any]) -> None:
    """Raises ValueError if blocks of entries would be cut by the sharding."""
    for p in group["params"]:
        runs = group["block_size"] not in (None, 1) and p.ndim > 1
        if runs or (group["block_size"] is None and p.placements[0].dim > 1):
            raise ValueError(
                f"{UNFOLLOWED}: blocks of block_size={group['block_size']} of a parameter "
                f"{list(p.shape)} would be cut by {p.placements[0]}; use block_size=1"
                + ("" if runs is False else ", or None for kernels of convolutions")
            )


#: Entries that are done at once on a CPU.
_CACHED = 2**16


def _parts(jobs: list[Job], foreach: bool | None) -> list[list[Job]]:
    """Tensors that are done at once: of one dtype and device, or each by itself.

    Without a choice, those on a CPU are as many as stay in its cache.
    """
    if foreach is False:
        return [[job] for job in jobs]
    kinds: dict[tuple[torch.dtype, torch.device], list[Job]] = {}
    for job in jobs:
        kinds.setdefault((job[0].dtype, job[0].device), []).append(job)
    parts: list[list[Job]] = []
    for (_, device), own in kinds.items():
        cached = foreach is None and device.type == "cpu"
        parts += _runs(own, _CACHED if cached else math.inf)
    return parts


def _runs(jobs: list[Job], most: float) -> list[list[Job]]:
    """Consecutive tensors of at most so many entries together, or a longer one."""
    runs: list[list[Job]] = []
    entries = 0
    for job in jobs:
        entries += job[0].numel()
        if not runs or entries > most:
            runs.append([])
            entries = job[0].numel()
        runs[-1].append(job)
    return runs
