"""What ranks compute in the tests: functions of ``(rank, size, ...)``, which return tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import curvlib as cl

F64 = torch.float64


def net(seed: int = 0) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=F64) * 0.5)
    return model


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Five unequal batches with masked targets."""
    g = torch.Generator().manual_seed(1)
    out = []
    for n in (3, 5, 1, 4, 6):
        y = torch.randint(3, (n,), generator=g)
        y[torch.rand(n, generator=g) < 0.2] = -100
        out.append((torch.randn(n, 4, generator=g, dtype=F64), y))
    return out


def uneven(rank: int, size: int) -> list[Any]:
    """Shards of very different length: with three ranks, the second has none."""
    every = batches()
    cuts = {1: [0, 5], 2: [0, 1, 5], 3: [0, 4, 4, 5]}[size]
    return every[cuts[rank] : cuts[rank + 1]]


def the_risk(rank: int, size: int, loss: Any = None) -> cl.Risk:
    return cl.Risk(net(), loss or nn.CrossEntropyLoss(), uneven(rank, size))


def vectors(risk: cl.Risk, columns: int = 3) -> torch.Tensor:
    g = torch.Generator().manual_seed(2)
    return torch.randn(risk.space.size, columns, generator=g, dtype=F64)


def products(rank: int, size: int) -> dict[str, torch.Tensor]:
    risk = the_risk(rank, size)
    V = vectors(risk)
    total = the_risk(rank, size, nn.CrossEntropyLoss(reduction="sum"))
    return {
        "value": risk.value(),
        "gradient": risk.gradient(),
        "weight": torch.tensor(risk.weight()),
        "hessian": cl.hessian(risk) @ V,
        "differences": cl.hessian(risk, method="finite_difference") @ V[:, 0],
        "ggn": cl.ggn(risk) @ V,
        "type2": cl.fisher(risk, kind="type2") @ V,
        "sum": cl.hessian(total) @ V,
        "block": cl.hessian(risk).blocks()["3"].to_dense(),
        "combined": (cl.hessian(risk) + 0.5 * cl.ggn(risk).shift(0.1)) @ V,
    }
