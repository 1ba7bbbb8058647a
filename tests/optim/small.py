"""A small network, its data, and the ways in which a user may drive an optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvlib.optim.shell import CurvatureOptimizer
from tests.optim.cases import OptimizerCase

F64 = torch.float64


def net(dtype: torch.dtype = F64) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def batches(count: int, size: int = 12, dtype: torch.dtype = F64) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(7)
    return [
        (
            torch.randn(size, 3, generator=g, dtype=F64).to(dtype),
            torch.randint(3, (size,), generator=g),
        )
        for _ in range(count)
    ]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def by_closure(opt: CurvatureOptimizer, loss: Callable[[], Tensor]) -> None:
    opt.step(loss)


def by_backward(opt: CurvatureOptimizer, loss: Callable[[], Tensor]) -> None:
    opt.zero_grad()
    opt.backward(loss())
    opt.step()


def by_observe(opt: CurvatureOptimizer, loss: Callable[[], Tensor]) -> None:
    opt.zero_grad()
    value = loss()
    opt.observe(value)
    value.backward()
    opt.step()


def train(
    opt: CurvatureOptimizer,
    model: nn.Module,
    data: list[tuple[Tensor, Tensor]],
    drive: Callable[[CurvatureOptimizer, Callable[[], Tensor]], None] = by_closure,
) -> list[Tensor]:
    for batch in data:
        drive(opt, lambda batch=batch: loss_of(model, batch))
    return weights(model)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def trained(case: OptimizerCase, steps: int, drive: Any = by_closure) -> list[Tensor]:
    model = net()
    return train(case.build(model, None), model, batches(steps), drive)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference, relative to the largest entry."""
    top = max(float(x.abs().max()) for x in b)
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True)) / top


def frozen_copy(state: Any) -> Any:
    """A state dict with all its tensors copied."""
    return copy.deepcopy(state)


def equal(a: Any, b: Any) -> bool:
    """Whether two nested states are bitwise the same."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)
