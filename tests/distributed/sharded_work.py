"""What ranks compute of models whose parameters are sharded: functions of ``(rank, size, ...)``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import curvlib as cl
from tests.distributed.work import F64, batches, net, uneven


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


def few(rank: int, size: int) -> list[Any]:
    """Two batches; with three ranks, the second has none."""
    cuts = {1: [0, 2], 2: [0, 1, 2], 3: [0, 1, 1, 2]}[size]
    return batches()[:2][cuts[rank] : cuts[rank + 1]]


def estimates(rank: int, size: int) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():  # budgets are short
        warnings.filterwarnings("ignore", message=".*did not converge")
        return _estimates(rank, size)


def _estimates(rank: int, size: int) -> dict[str, torch.Tensor]:
    model = net() if size == 1 else sharded_net()
    risk = cl.Risk(model, nn.CrossEntropyLoss(), few(rank, size))
    H, G, whole = cl.hessian(risk), cl.ggn(risk), risk.space.gather
    pairs = cl.eigenpairs(H, 2, which="BE")
    restarted = cl.eigenpairs(G, 2, block=2, basis=6, start=pairs.vectors, max_products=20)
    rest = cl.eigenpairs(H, 2, deflate=pairs, max_products=14)
    spectrum = cl.density(H, steps=5, probes=2, deflate=pairs)
    thin = cl.density(H, steps=4, probes=2, law="rademacher", reorthogonalize=False)
    traces = {
        law: cl.trace(H, method="hutchinson", probes=4, law=law)
        for law in ("rademacher", "gaussian", "sphere")
    }
    entries = cl.diagonal(H, method="hutchinson", probes=5)
    some = cl.diagonal(H, method="hutchinson", law="gaussian", tolerance=0.9, max_products=12)
    b = risk.gradient()
    by_cg = cl.solve(G, torch.stack([b, columns(risk)[:, 0]], 1), damping=0.1, tolerance=1e-8)
    by_minres = cl.solve(H, b, damping=0.1, max_products=16)
    series = cl.solve(G, b, damping=0.1, method="neumann", terms=3, scale=0.5)
    return {
        "values": pairs.values,
        "vectors": whole(pairs.vectors) * whole(pairs.vectors)[:1].sign(),
        "residuals": pairs.residuals < 1e-6,
        "restarted": restarted.values,
        "rest": rest.values,
        "density": spectrum.density,
        "thin": thin.nodes,
        **{law: found.samples for law, found in traces.items()},
        "diagonal": whole(entries.value),
        "diagonal's error": whole(entries.stderr),
        "some": whole(some.value),
        "cg": whole(by_cg.value),
        "minres": whole(by_minres.value),
        "series": whole(series.value),
        "iterations": torch.tensor(
            [by_cg.iterations.tolist()[0], by_minres.iterations.tolist()[0], some.products]
        ),
    }


def windows(rank: int, size: int) -> dict[str, Any]:
    """M-FAC with rows that lie like the parameters, and how many numbers were summed."""
    model = net() if size == 1 else sharded_net()
    risk = cl.Risk(model, nn.CrossEntropyLoss(), few(rank, size))
    space = risk.space
    g = torch.Generator().manual_seed(3)
    rows = torch.randn(7, space.total, generator=g, dtype=F64)
    x = space.scatter(torch.randn(space.total, 2, generator=g, dtype=F64))
    found: dict[str, Any] = {}
    sent: list[int] = []
    for dtype in (F64, torch.float32, torch.bfloat16):
        F = cl.mfac_window(space, 4, damping=0.1, dtype=dtype)
        own = [space.scatter(row).to(F.dtype) for row in rows]
        v = x.to(F.dtype)
        for row in own[:5]:
            F.push(row)
        F.remove(1)
        F.push(torch.stack(own[5:]))
        with counted(sent):
            F.push(own[0], check=False)
            direction = F.solve_row()
            solved = F.solve(v)
        name = str(dtype)
        found |= {
            name + " row": space.gather(direction),
            name + " solve": space.gather(solved),
            name + " product": space.gather(F @ v),
            name + " power": space.gather(F.power(-0.5) @ v),
            name + " inverse diagonal": space.gather(F.inverse_diagonal()),
            name + " diagonal": space.gather(F.diagonal()),
            name + " numbers": torch.tensor([F.trace(), F.logdet(), F.quadratic_row()]),
            name + " eigenvalues": F.eigenvalues(),
        }
        bad = own[1].clone()
        if rank == size - 1:
            bad[0] = float("nan")
        taken = F.push(torch.stack([own[2], bad]), skip_non_finite=True)
        found[name + " taken"] = torch.tensor([taken, F.window.count])
    entries = cl.mfac(risk.gradient()[None], space=space, damping=0.1)
    found["pushed"] = space.gather(entries.solve(x))
    return {**found, "sent": torch.tensor(sent)}


@contextmanager
def counted(sent: list[int]) -> Iterator[None]:
    """Notes how many numbers each sum over ranks has."""
    plain = dist.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, **settings: Any) -> Any:
        sent.append(tensor.numel())
        return plain(tensor, *args, **settings)

    dist.all_reduce = counting
    try:
        yield
    finally:
        dist.all_reduce = plain
