"""Ranks that train every optimizer on their parts of each batch: functions of ``(rank, size)``."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

import curvlib as cl
from curvlib.optim.adahessian import AdaHessian
from curvlib.optim.newton_cg import NewtonCG
from tests.optim.cases import OPTIMIZERS
from tests.optim.small import (
    batches,
    by_backward,
    by_closure,
    by_observe,
    loss_of,
    net,
    train,
    weights,
)

STEPS = 4
#: Examples of each rank in a batch of twelve, where parts are unequal.
UNEQUAL = {1: [12], 2: [9, 3], 3: [2, 9, 1]}


def equal(rank: int, size: int) -> dict[Any, list[Tensor]]:
    """Equal parts, in all ways of driving an optimizer."""
    data = [(x.chunk(size)[rank], y.chunk(size)[rank]) for x, y in batches(STEPS)]
    found: dict[Any, list[Tensor]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for case in OPTIMIZERS:
            for drive in (by_closure, by_backward):
                model = net()
                opt = case.build(model, None)
                found[case.name, drive.__name__] = train(opt, model, data, drive)
            model = net()
            opt = case.build(model, None)
            for x, y in data:  # micro-batches, with one exchange for each step
                opt.zero_grad()
                for i, part in enumerate(zip(x.chunk(2), y.chunk(2), strict=True)):
                    opt.backward(loss_of(model, part) / 2, sync=i == 1)
                opt.step()
            found[case.name, "micro-batches"] = weights(model)
        found["ddp", ""] = wrapped(data)
    return found


def wrapped(data: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """DistributedDataParallel averages gradients, ``observe`` gathers curvature."""
    model = net()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    opt = AdaHessian(model.parameters(), lr=0.02, interval=2)
    return train(opt, parallel, data, by_observe)


def unequal(rank: int, size: int) -> dict[str, list[Tensor]]:
    """Unequal parts, whose mean losses are weighted so that their mean is that of the batch."""
    parts = UNEQUAL[size]
    share = parts[rank] * size / sum(parts)
    found = {}
    for case in OPTIMIZERS:
        model = net()
        opt = case.build(model, None)
        for x, y in batches(STEPS):
            part = (x.split(parts)[rank], y.split(parts)[rank])
            opt.step(lambda model=model, part=part: loss_of(model, part) * share)
        found[case.name] = weights(model)
    return found


def newton(rank: int, size: int) -> dict[str, Tensor]:
    """Newton steps on a risk whose shards are unequal, or empty."""
    cuts = {1: [0, 3], 2: [0, 1, 3], 3: [0, 2, 2, 3]}[size]
    found = {}
    for name, operator in (("ggn", cl.ggn), ("hessian", cl.hessian)):
        model = net()
        data = batches(3, size=7)[cuts[rank] : cuts[rank + 1]]
        opt = NewtonCG(
            cl.Risk(model, torch.nn.CrossEntropyLoss(), data), operator=operator, gamma=0.3
        )
        for _ in range(4):
            opt.step()
        assert opt.last is not None
        found[name] = torch.cat([p.flatten() for p in weights(model)])
        found[f"{name} loss"] = torch.tensor([opt.last.loss], dtype=torch.float64)
    return found


def different(rank: int, size: int) -> list[Any]:
    """What happens where ranks do different things."""
    w, rare = (torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    opt = AdaHessian([w, rare], lr=0.1)
    opt.step(lambda: w.cos().sum() + (rare.cos().sum() if rank else 0.0))  # unused on one rank
    moved = bool((rare != 1).all())
    message = ""
    rare.requires_grad_(bool(rank))
    opt = AdaHessian([w, rare], lr=0.1)
    opt.backward(w.cos().sum(), sync=False)
    try:
        opt.step()
    except RuntimeError as error:
        message = str(error)
    return [moved, message]
