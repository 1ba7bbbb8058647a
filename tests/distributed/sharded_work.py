"""What ranks compute of models whose parameters are sharded: functions of ``(rank, size, ...)``."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import curvlib as cl
from tests.distributed.work import F64, net, uneven


def mesh() -> DeviceMesh:
    return DeviceMesh("cpu", list(range(dist.get_world_size())))


def sharded_net() -> nn.Module:
    """A model in units that no number of ranks divides, and a root."""
    model = net()
    fully_shard(model[0], mesh=mesh())
    fully_shard(model, mesh=mesh())
    return model


def the_risk(rank: int, size: int, loss: Any = None, params: Any = None) -> cl.Risk:
    model = net() if size == 1 else sharded_net()
    return cl.Risk(model, loss or nn.CrossEntropyLoss(), uneven(rank, size), params=params)


def columns(risk: cl.Risk, count: int = 3) -> torch.Tensor:
    g = torch.Generator().manual_seed(2)
    return risk.space.scatter(torch.randn(risk.space.total, count, generator=g, dtype=F64))


def products(rank: int, size: int) -> dict[str, torch.Tensor]:
    risk = the_risk(rank, size)
    V, whole = columns(risk), risk.space.gather
    total = the_risk(rank, size, nn.CrossEntropyLoss(reduction="sum"))
    some = the_risk(rank, size, params=["0.*", "3.bias"])
    H = cl.hessian(risk)
    return {
        "value": risk.value(),
        "gradient": whole(risk.gradient()),
        "weight": torch.tensor(risk.weight()),
        "hessian": whole(H @ V),
        "column": whole(H @ V[:, 0]),
        "one by one": whole(cl.hessian(risk, memory=0) @ V),
        "ggn": whole(cl.ggn(risk) @ V),
        "type2": whole(cl.fisher(risk, kind="type2") @ V),
        "sum": whole(cl.hessian(total) @ V),
        "some": some.space.gather(cl.hessian(some) @ columns(some)),
        "combined": whole((H + 0.5 * cl.ggn(risk).shift(0.1)) @ V),
        "differences": whole(cl.hessian(risk, method="finite_difference") @ V[:, 0]),
    }
