"""What goes wrong on ranks: functions of ``(rank, size, ...)`` that return the messages."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import curvlib as cl
from tests.distributed.work import batches, net, the_risk, uneven, vectors

CE = nn.CrossEntropyLoss()


def message(function: Callable[[], Any]) -> str:
    """The type and text of what a function raises; empty if nothing."""
    try:
        function()
    except Exception as error:  # noqa: BLE001 (whatever it is, it is told)
        return f"{type(error).__name__}: {error}"
    return ""


def messages(rank: int, size: int) -> dict[str, str]:
    last = rank == size - 1
    found: dict[str, str] = {}

    risk = the_risk(rank, size)
    own = vectors(risk) + float(last)
    found["vectors"] = message(lambda: cl.hessian(risk) @ own)

    model = net(seed=int(last))
    found["parameters"] = message(cl.Risk(model, CE, uneven(rank, size)).value)

    model = nn.Sequential(nn.BatchNorm1d(4), net()).double().eval()
    if last:
        model[0].running_mean += 1.0
    found["buffers"] = message(cl.Risk(model, CE, uneven(rank, size)).value)

    loss = nn.CrossEntropyLoss(label_smoothing=0.1 * last)
    found["program"] = message(cl.Risk(net(), loss, uneven(rank, size)).value)
    forward = (lambda m, b: m(b[0])) if last else (lambda m, b: m(b[0]) * 1.0)
    found["code"] = message(cl.Risk(net(), CE, uneven(rank, size), forward=forward).value)

    columns = vectors(risk)[:, : 1 + last]
    product = cl.hessian(risk).matmat if last else cl.ggn(risk).matmat
    found["shapes"] = message(lambda: product(columns))

    def fails(m: nn.Module, b: Any) -> torch.Tensor:
        if last:
            raise LookupError("no such word")
        return m(b[0])

    found["one fails"] = message(cl.Risk(net(), CE, uneven(rank, size), forward=fails).gradient)

    bad = net()
    data = [(x.clone(), y) for x, y in uneven(rank, size)]
    if last:
        data[-1][0][0, 0] = torch.nan
    found["nan"] = message(cl.Risk(bad, CE, data).gradient)
    found["no batch"] = message(cl.Risk(net(), CE, []).gradient)
    masked = [(x, torch.full_like(y, -100)) for x, y in uneven(rank, size)]
    found["no term"] = message(cl.Risk(net(), CE, masked).gradient)
    found["graph"] = message(lambda: cl.hessian(risk).differentiable_matmat(vectors(risk)))
    found["loop"] = message(lambda: list(risk.batches()))
    small = dist.new_group([0])
    if rank == 0:
        found["alone"] = str(cl.Risk(net(), CE, batches(), group=small).group)
    else:
        found["alone"] = message(lambda: cl.Risk(net(), CE, batches(), group=small))
    halves = dist.new_group([0, 1])
    if rank < 2:
        other = cl.Risk(net(), CE, uneven(rank, 2), group=halves)
        found["groups"] = message(lambda: cl.hessian(risk) + cl.hessian(other))
    still = risk.value()  # the group goes on after all of that
    found["after"] = str(bool(torch.isfinite(still)))
    return found


def warned(rank: int, size: int) -> dict[str, list[str]]:
    def said(function: Callable[[], Any]) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
        return [str(w.message) for w in caught]

    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    dataset = TensorDataset(x, y)  # 19 examples

    def loader(drop: bool = False) -> DataLoader[Any]:
        sampler = DistributedSampler(dataset, shuffle=False, drop_last=drop)
        return DataLoader(dataset, batch_size=4, sampler=sampler)

    total = nn.CrossEntropyLoss(reduction="sum")
    return {
        "copies": said(lambda: cl.Risk(net(), CE, batches()).value()),
        "copies of a sum": said(lambda: cl.Risk(net(), total, batches()).value()),
        "shards": said(lambda: cl.Risk(net(), CE, uneven(rank, size)).value()),
        "padding": said(lambda: cl.Risk(net(), CE, loader())),
        "no padding": said(lambda: cl.Risk(net(), CE, loader(drop=True))),
    }


def shards(rank: int, size: int) -> dict[str, Any]:
    """Every kind of data, cut by ``curvlib.shard``: gradients, and the examples of each rank."""
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    plain = TensorDataset(x, y)
    forms: dict[str, Any] = {
        "list": batches(),
        "one batch": (x, y),
        "pair as a list": [x, y],
        "one batch in a list": [(x, y)],
        "loader": DataLoader(plain, batch_size=4),
        "workers": DataLoader(plain, batch_size=4, num_workers=1),
        "batches": DataLoader(
            [(x[i : i + 4], y[i : i + 4]) for i in range(0, 19, 4)], batch_size=None
        ),
        "stream": Endless(batches()),
    }
    found = {}
    for name, data in forms.items():
        risk = cl.Risk(net(), CE, cl.shard(data))
        found[name] = risk.gradient()
        found[f"{name}: fingerprint"] = risk.fingerprint()
    named = [{"x": a, "y": b} for a, b in batches()]
    for name, data in (("mappings", named), ("one mapping", {"x": x, "y": y})):
        risk = cl.Risk(
            net(),
            CE,
            cl.shard(data),
            forward=lambda m, b: m(b["x"]),
            target=lambda b: b["y"],
        )
        found[name] = risk.gradient()
        found[f"{name}: fingerprint"] = risk.fingerprint()
    shuffled = DataLoader(plain, batch_size=4, shuffle=True)
    found["shuffled"] = message(lambda: cl.shard(shuffled))
    return found


class Endless:
    """Batches without a length."""

    def __init__(self, held: list[Any]) -> None:
        self.held = held

    def __iter__(self) -> Any:
        return iter(self.held)


def dies(rank: int, size: int, how: str) -> str:
    """Rank 0 ends, or stops, in the middle of a product; what the others are told, and when."""

    def forward(m: nn.Module, b: Any) -> torch.Tensor:
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL if how == "dies" else signal.SIGSTOP)
        return m(b[0])

    risk = cl.Risk(net(), CE, uneven(rank, size), forward=forward)
    start = time.monotonic()
    told = message(lambda: cl.hessian(risk) @ vectors(risk))
    return f"{told} after {time.monotonic() - start:.0f} s"


def mixed_devices(rank: int, size: int) -> str:
    """A backend that cannot send what is on this device."""
    from curvlib.core.ranks import joined

    risk = cl.Risk(net(), CE, uneven(rank, size))
    assert risk.group is not None
    return message(lambda: joined.require_device(risk.group, torch.device("mps")))
