"""Optimizers that step sharded parameters: functions of ``(rank, size, ...)``, one process too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

import curvlib as cl
from curvlib.core.ranks.places import reshard
from curvlib.optim import MFAC, AdaHessian, NewtonCG, Sophia
from curvlib.optim.shell import CurvatureOptimizer
from tests.distributed.checkpoints import written_or_read
from tests.distributed.sharded_work import (
    counted,
    cut_net,
    deep_net,
    few,
    mesh,
    said,
    sharded_net,
    transferred,
)
from tests.distributed.work import F64, net

STEPS = 4
Build = Callable[[Any], CurvatureOptimizer]

#: Which are trained; intervals of 2 and 3, so that steps of FSDP2's own come in between.
BUILDS: dict[str, Build] = {
    "adahessian": lambda params: AdaHessian(params, lr=0.02, interval=2),
    "diagonal": lambda params: AdaHessian(
        params,
        lr=0.01,
        eps=0.1,
        weight_decay=0.01,
        estimand="diagonal",
        interval=3,
        probes=2,
        foreach=True,
    ),
    "sophia-g": lambda params: Sophia(params, lr=0.01, rho=1.0, interval=3, probes=2),
    "sophia-h": lambda params: Sophia(
        params, lr=0.01, rho=0.5, estimator="hutchinson", interval=2, correct_bias=True
    ),
    "mfac": lambda params: MFAC(params, size=3, weight_decay=0.01),
    "mfac, trust": lambda params: MFAC(
        params, lr=0.01, size=3, momentum=0.0, damping=0.1, norm_matching=False, trust=0.5
    ),
}


class Small(nn.Module):
    """Convolutions, a checkpointed block, what is not used, and slices that some ranks lack."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 2)
        self.block = nn.Sequential(nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 1))
        self.head = nn.Linear(1, 3)
        self.idle = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv(x.view(len(x), 2, 4)).tanh().flatten(1)
        out: Tensor = self.head(checkpoint(self.block, hidden, use_reentrant=False))
        return out


def small(size: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Small().double()
    if size > 1:
        fully_shard(model.conv, mesh=mesh())
        fully_shard(model.block, mesh=mesh())
        fully_shard(model, mesh=mesh())
    return model


def data(rank: int, size: int, steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    """This rank's equal parts of some batches."""
    g = torch.Generator().manual_seed(7)
    whole = [
        (torch.randn(12, 8, generator=g, dtype=F64), torch.randint(3, (12,), generator=g))
        for _ in range(steps)
    ]
    return [(x.chunk(size)[rank], y.chunk(size)[rank]) for x, y in whole]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def full(value: Any) -> Any:
    """Nested values with whole copies of tensors."""

    def one(item: Any) -> Any:
        if isinstance(item, DTensor):
            return item.detach().full_tensor()
        return item.detach().clone() if isinstance(item, Tensor) else item

    return tree_map(one, value)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.flatten() for p in full(list(model.parameters()))])


# --------------------------------------------------------------------------- ways to take a step
def by_closure(opt: Any, model: Any, batch: Any) -> None:
    opt.step(lambda: loss_of(model, batch))


def by_backward(opt: Any, model: Any, batch: Any) -> None:
    opt.zero_grad()
    with opt.gathering():
        opt.backward(loss_of(model, batch))
    opt.step()


def by_observe(opt: Any, model: Any, batch: Any) -> None:
    opt.zero_grad()
    with opt.gathering():
        loss = loss_of(model, batch)
        opt.observe(loss)
        loss.backward()
    opt.step()


def by_own_backward(opt: Any, model: Any, batch: Any) -> None:
    """As trainers that own the loop do."""

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of(model, batch)
        opt.backward(loss)
        return loss.detach()

    opt.step(closure)


def by_parts(opt: Any, model: Any, batch: Any) -> None:
    """Two micro-batches, of which one goes through FSDP2's own passes where none is due."""
    opt.zero_grad()
    for i, part in enumerate(zip(*(t.chunk(2) for t in batch), strict=True)):
        if i == 0 or opt.due:
            with opt.gathering():
                opt.backward(loss_of(model, part) / 2)
        else:
            (loss_of(model, part) / 2).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
    opt.step()


def by_fsdp(opt: Any, model: Any, batch: Any) -> None:
    """As any loop does, for methods that read gradients only."""
    opt.zero_grad()
    loss_of(model, batch).backward()
    opt.step()


def trained(rank: int, size: int) -> dict[str, Tensor]:
    """Weights after some steps of each optimizer, in each way."""
    runs: list[tuple[str, Any]] = [(name, by_closure) for name in BUILDS]
    runs += [("adahessian", way) for way in (by_backward, by_own_backward, by_parts)]
    runs += [("sophia-h", by_observe), ("mfac", by_fsdp)]
    found = {}
    for name, way in runs:
        model = small(size)
        opt = BUILDS[name](model.parameters())
        for batch in data(rank, size):
            way(opt, model, batch)
        found[f"{name}, {way.__name__}"] = weights(model)
        assert all(p.grad is None or isinstance(p.grad, DTensor) for p in opt_params(opt, size))
        assert opt.skipped == 0
        if isinstance(opt, Sophia):
            found[f"{name}, {way.__name__}, clipped"] = torch.tensor(opt.clipped)
    model = net() if size == 1 else cut_net()  # without FSDP: passes gather in all steps
    opt = AdaHessian(model.parameters(), lr=0.02)
    for x, y in data(rank, size, 2):
        opt.step(lambda x=x, y=y: loss_of(model, (x[:, :4], y)))  # type: ignore[misc]
    return found | {"cut": weights(model)}


def opt_params(opt: CurvatureOptimizer, size: int) -> list[Any]:
    return [p for _, p, _ in opt.parameters()] if size > 1 else []


def groups(rank: int, size: int) -> dict[str, Any]:
    """Groups, one added later, and a frozen one; a step that only one rank finds not finite."""
    model: Any = small(size)
    head = {"params": model.head.parameters(), "lr": 0.05}
    opt = AdaHessian([{"params": model.conv.parameters()}, head], lr=0.02)
    model.block[0].requires_grad_(False)
    (first, second, third, fourth, last) = data(rank, size, 5)
    by_closure(opt, model, first)
    opt.add_param_group({"params": model.block.parameters(), "maximize": True})
    by_closure(opt, model, second)
    model.block[0].requires_grad_(True)
    by_closure(opt, model, third)
    before = weights(model)
    for broken in (opt, MFAC(model.parameters(), size=2), Sophia(model.parameters())):
        opt.zero_grad()
        with broken.gathering():
            broken.backward(loss_of(model, fourth))
        if rank == size - 1:  # where it has no entry of it, a rank has the first of another
            grads = [local(p.grad) for p in model.parameters() if p.grad is not None]
            own = next(g for g in grads if g.numel())
            own.view(-1)[0] = float("nan")
        broken.step()
        assert broken.skipped == 1
    assert torch.equal(weights(model), before)
    opt.zero_grad()
    by_closure(opt, model, last)
    held = {id(p) for p in model.parameters()}
    assert all(id(p) in held for _, p, _ in opt.parameters())
    return {"weights": weights(model), "mfac": widened(rank, size)}


def widened(rank: int, size: int) -> Tensor:
    """Rows of which some ranks have no entry, then of a further parameter, then restored."""
    model: Any = small(size)
    model.requires_grad_(False)
    model.block[2].requires_grad_(True)
    opt = MFAC(model.parameters(), size=3)
    first, second, third, last = data(rank, size)
    by_closure(opt, model, first)
    assert size == 1 or rank == 0 or opt.windows[0].length == 0
    model.conv.requires_grad_(True)
    by_closure(opt, model, second)
    by_closure(opt, model, third)
    again = MFAC(model.parameters(), size=3)
    again.load_state_dict(opt.state_dict())
    by_closure(again, model, last)
    assert again.windows[0].count == 3
    return weights(model)


def local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# ------------------------------------------------------------------------------------------ state
def saved(rank: int, size: int) -> dict[str, Any]:
    """Whole states after two steps, the numbers of it that are here, and weights after four."""
    found = {}
    for name, build in BUILDS.items():
        model = small(size)
        opt = build(model.parameters())
        for batch in data(rank, size)[:2]:
            by_closure(opt, model, batch)
        state = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, opt.state_dict())
        large = [t for t in tree_leaves(state) if isinstance(t, Tensor) and t.ndim]
        assert size == 1 or all(isinstance(t, DTensor) or t.shape[0] == 1 for t in large)
        weights_then = full(model.state_dict())
        twin = small(size)
        twin.load_state_dict(model.state_dict())
        other = build(twin.parameters())
        other.load_state_dict(state)
        for batch in data(rank, size)[2:]:
            by_closure(opt, model, batch)
            by_closure(other, twin, batch)
        assert torch.equal(weights(model), weights(twin)), name
        found[name] = {
            "model": weights_then,
            "opt": full(state),
            "numbers": sum(local(t).numel() for t in large),
            "end": weights(model),
        }
    return found


def resumed(rank: int, size: int, before: dict[str, Any]) -> dict[str, Tensor]:
    """Weights after two steps more, from whole states."""
    found = {}
    for name, build in BUILDS.items():
        model = small(1)
        model.load_state_dict(before[name]["model"])
        if size > 1:
            fully_shard(model.block, mesh=mesh())
            fully_shard(model, mesh=mesh())
        opt = build(model.parameters())
        opt.load_state_dict(before[name]["opt"])
        for batch in data(rank, size)[2:]:
            by_closure(opt, model, batch)
        found[name] = weights(model)
    return found


def checkpointed(rank: int, size: int, folder: str, writes: bool) -> dict[str, Tensor]:
    """States that ``torch.distributed.checkpoint`` writes, or reads, and weights at the end."""
    found = {}
    for name in ("adahessian", "sophia-g", *(["mfac"] if size > 1 else [])):
        model = small(size)
        opt = BUILDS[name](model.parameters())
        steps = data(rank, size)
        for batch in steps[:2] if writes else steps[1:3]:  # a state to be read into is needed
            by_closure(opt, model, batch)
        written_or_read(model, opt, Path(folder) / name, writes=writes)
        for batch in steps[2:]:
            by_closure(opt, model, batch)
        found[name] = weights(model)
    return found


def sent(rank: int, size: int) -> dict[str, Any]:
    """How often steps send the parameters, and how many numbers each of their sums has."""
    found = {}
    for name, build in {
        "one": lambda params: AdaHessian(params, lr=1e-3),
        "two": lambda params: AdaHessian(params, lr=1e-3, probes=2),
        "mfac": lambda params: MFAC(params, size=5),
    }.items():
        model = deep_net()
        for layer in model:
            fully_shard(layer, mesh=mesh())
        fully_shard(model, mesh=mesh())
        opt, batch = build(model.parameters()), (torch.ones(4, 8, dtype=F64), torch.arange(4))
        by_closure(opt, model, batch)
        numbers: list[int] = []
        sums: list[int] = []
        with transferred(numbers), counted(sums):
            by_closure(opt, model, batch)
        found[name] = (sum(numbers) / sum(p.numel() for p in model.parameters()), sums)
    return found


# ----------------------------------------------------------------------------------- Newton steps
def newton(rank: int, size: int) -> dict[str, Any]:
    """Newton steps on a sharded risk whose data is in shards that may be empty."""
    found: dict[str, Any] = {}
    operators: dict[str, tuple[Any, float]] = {
        "hessian": (cl.hessian, 1.0),
        "natural": (lambda risk: cl.fisher(risk, kind="type2"), 0.5),
    }
    for name, (operator, gamma) in operators.items():
        model = net() if size == 1 else sharded_net()
        risk = cl.Risk(model, nn.CrossEntropyLoss(), few(rank, size))
        opt = NewtonCG(risk, operator, gamma=gamma, tolerance=1e-12, max_products=4)
        losses = [float(opt.step())]
        other = NewtonCG(risk, operator, tolerance=1e-12, max_products=4)
        other.load_state_dict(opt.state_dict())
        losses.append(float(other.step()))
        state = other.state_dict()["curvlib"]
        assert state["shapes"] == [list(p.shape) for p in net().parameters()]
        counts = [state["progress"][key] for key in ("steps", "rejected", "products")]
        found[name] = weights(model)
        found[f"{name}, losses"] = torch.tensor(losses, dtype=F64)
        found[f"{name}, counts"] = torch.tensor(counts)
        found[f"{name}, gamma"] = torch.tensor(state["progress"]["gamma"], dtype=F64)
    return found


# ------------------------------------------------------------------------------------- refusals
def refusals(rank: int, size: int) -> dict[str, str]:
    """What is refused, and how; on all ranks alike."""
    model, whole = sharded_net(), net()
    batch = data(rank, size)[0]
    batch = (batch[0][:, :4], batch[1])
    opt = AdaHessian(model.parameters(), lr=0.02)
    sophia = Sophia(model.parameters())
    alone = [dist.new_group([r]) for r in range(size)][rank]

    def outside(way: str) -> None:
        getattr(opt, way)(loss_of(model, batch))

    def rowed(settings: dict[str, Any]) -> None:
        MFAC(model.parameters(), size=2, **settings)

    def foreign() -> None:
        state = AdaHessian(model.parameters()).state_dict()
        p = next(model.parameters())
        turned = DTensor.from_local(p.to_local(), _turned(size), p.placements)
        state["state"] = {0: {"momentum": turned}}
        opt.load_state_dict(state)

    def late() -> None:
        loss = loss_of(model, batch)
        with sophia.gathering():
            sophia.backward(loss)

    def within() -> None:
        with opt.gathering():
            opt.step(lambda: loss_of(model, batch))

    def failing() -> None:
        with opt.gathering():
            opt.backward(loss_of(model, batch))
            raise OSError("the disk is gone")

    cases: dict[str, Callable[[], Any]] = {
        "late": late,
        "failing": failing,
        "within": within,
        "backward": lambda: outside("backward"),
        "observe": lambda: outside("observe"),
        "sophia": lambda: sophia.backward(loss_of(model, batch)),
        "gathered": lambda: model(batch[0]) is None or AdaHessian(model.parameters()),
        "some whole": lambda: AdaHessian([*model.parameters(), *whole.parameters()]),
        "added whole": lambda: opt.add_param_group({"params": whole.parameters()}),
        "runs": lambda: AdaHessian(model.parameters(), block_size=2),
        "kernels": lambda: AdaHessian([_cut_kernel()]),
        "tensors": lambda: rowed({"window": "tensor"}),
        "compressed": lambda: rowed({"compression": 0.5}),
        "group": lambda: AdaHessian(model.parameters(), process_group=alone),
        "foreign state": foreign,
    }
    found = {}
    for name, call in cases.items():
        found[name] = said(call)
        reshard(model)
    opt.step()  # nothing of this did harm, or left a gradient
    assert opt.clock.steps == opt.skipped == 0
    by_closure(opt, model, batch)
    assert len(opt.param_groups) == 1
    return found


def _turned(size: int) -> Any:
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh("cpu", list(range(size))[::-1])


def _cut_kernel() -> nn.Parameter:
    from torch.distributed.tensor import Shard, distribute_tensor

    return nn.Parameter(distribute_tensor(torch.ones(2, 2, 4), mesh(), [Shard(2)]))
