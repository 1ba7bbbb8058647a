"""Optimizers that watch layers, on sharded parameters: functions of ``(rank, size, ...)``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from curvlib.optim import KFAC, MKOR
from curvlib.optim.shell import CurvatureOptimizer
from tests.distributed.checkpoints import written_or_read
from tests.distributed.sharded_optim_work import (
    by_backward,
    by_closure,
    by_fsdp,
    by_observe,
    by_own_backward,
    full,
    local,
    loss_of,
    weights,
)
from tests.distributed.sharded_work import (
    cut_net,
    mesh,
)
from tests.distributed.work import F64, net

STEPS = 5
CE = nn.CrossEntropyLoss()


class Words(nn.Module):
    """A tied embedding, attention, what is frozen, without factors, or never called."""

    def __init__(self, attends: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.attention = nn.MultiheadAttention(5, 1, batch_first=True) if attends else None
        self.norm = nn.LayerNorm(5)
        self.block = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 5, bias=False))
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 5))
        self.head = nn.Linear(5, 7)
        self.head.weight = self.embed.weight
        self.idle = nn.Linear(2, 2)
        self.block[0].bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x)
        if self.attention is not None:
            hidden = hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0]
        hidden = self.norm(hidden)
        hidden = hidden + checkpoint(self.block, hidden, use_reentrant=False)
        out: Tensor = self.head((hidden * self.scale).mean(1))
        return out


def words(size: int, *, attends: bool = True, sharded: bool | None = None) -> Any:
    """The model, in units that no number of ranks divides, if there are several."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Words(attends).double()
    if size > 1 if sharded is None else sharded:
        for unit in (model.norm, model.block, model.idle, model):
            fully_shard(unit, mesh=mesh())
    return model


def data(rank: int, size: int, steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    """This rank's equal parts of some batches of sentences."""
    g = torch.Generator().manual_seed(7)
    whole = [
        (torch.randint(7, (12, 6), generator=g), torch.randint(7, (12,), generator=g))
        for _ in range(steps)
    ]
    return [(x.chunk(size)[rank], y.chunk(size)[rank]) for x, y in whole]


Build = Callable[[nn.Module], CurvatureOptimizer]


def _grouped(model: Any) -> KFAC:
    """Two groups that are clipped apart; attention is in neither."""
    some = [*model.embed.parameters(), *model.norm.parameters(), model.scale]
    rest = [*model.block.parameters(), model.head.bias]
    groups = [
        {"params": some, "kl_clip": 1e-4, "lr": 0.05},
        {"params": rest, "damping": 0.03, "momentum": 0.0},
    ]
    return KFAC(model, groups, factor_interval=2, inverse_interval=3, damping=0.01)


#: Which are trained; intervals of 2 and 3, so that steps without hooks come in between.
BUILDS: dict[str, Build] = {
    "kfac": lambda model: KFAC(model, factor_interval=2, inverse_interval=3, damping=0.01),
    "factored": lambda model: KFAC(
        model,
        damping=0.02,
        relative=True,
        damping_form="factored",
        factor_interval=1,
        inverse_interval=2,
        inner="sgd",
        weight_decay=0.01,
    ),
    "mc": lambda model: KFAC(
        model, fisher="mc", loss=CE, factor_interval=2, inverse_interval=2, damping=0.01, seed=3
    ),
    "ekfac": lambda model: KFAC(
        model, eigen_corrected=True, factor_interval=1, inverse_interval=3, damping=0.01
    ),
    "ekfac, mc": lambda model: KFAC(
        model,
        eigen_corrected=True,
        fisher="mc",
        loss=CE,
        dense_norms=True,
        factor_interval=2,
        inverse_interval=3,
        damping=0.01,
        kl_clip=None,
        momentum=0.0,
        lr=0.02,
    ),
    "reduce": lambda model: KFAC(
        model, sharing="reduce", factor_interval=2, inverse_interval=2, damping=0.05, kl_clip=0.01
    ),
    "groups": _grouped,
    "unclipped": lambda model: KFAC(
        model, factor_interval=2, inverse_interval=3, damping=0.01, kl_clip=None
    ),
    "mkor": lambda model: MKOR(model, interval=2, vectors=3),
    "mkor, means": lambda model: MKOR(
        model, lr=0.05, inner="sgd", statistic="mean", interval=3, damping=0.1, weight_decay=0.01
    ),
    "mkor-h": lambda model: MKOR(
        model, lr=0.02, interval=1, hybrid=True, cost=1.5, block=4, every=2, patience=1
    ),
}


# --------------------------------------------------------------------------- ways to take a step
def by_parts(opt: Any, model: Any, batch: Any) -> None:
    """Two micro-batches, the first of which FSDP2 does not reduce."""
    opt.zero_grad()
    for i, part in enumerate(zip(*(t.chunk(2) for t in batch), strict=True)):
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(i == 1)
        opt.backward(loss_of(model, part) / 2)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
    opt.step()


RUNS: dict[str, list[Callable[[Any, Any, Any], None]]] = {
    "kfac": [by_closure, by_fsdp, by_backward, by_observe, by_own_backward, by_parts],
    "mc": [by_closure, by_fsdp, by_backward],
    "ekfac": [by_closure, by_fsdp, by_parts],
    "mkor": [by_closure, by_fsdp, by_backward, by_parts],
}


def trained(rank: int, size: int, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Weights after some steps of each optimizer, in each way, and what was known of layers."""
    found = {}
    for name in names:
        for way in RUNS.get(name, [by_closure]):
            # means over keys of attention are zero but for rounding, which inverses would amplify
            model = words(size, attends=name != "mkor, means")
            hooks = hooks_of(model)
            opt: Any = BUILDS[name](model)
            for batch in data(rank, size):
                way(opt, model, batch)
            key = f"{name}, {way.__name__}"
            found[key] = weights(model)
            found[f"{key}, covered"] = torch.tensor(opt.coverage().percent, dtype=F64)
            if isinstance(opt, KFAC):
                for layer, own in opt.layers.items():
                    found[f"{key}, {layer}"] = torch.cat([own.left.flatten(), own.right.flatten()])
            assert opt.skipped == 0
            opt.close()
            assert hooks_of(model) == hooks
            assert all(isinstance(p, DTensor) for p in model.parameters()) or size == 1
    return found


def hooks_of(model: nn.Module) -> list[list[int]]:
    """Keys of the hooks of all modules, in order."""
    return [
        list(table)
        for module in model.modules()
        for table in (module._forward_pre_hooks, module._forward_hooks)
    ]


def alone(rank: int, size: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Weights of whole parameters, and of those that FSDP2 shards on one rank."""
    found = {}
    for name in ("kfac", "ekfac, mc", "mkor"):
        ends = []
        for sharded in (False, True):
            model = words(1, sharded=sharded)
            opt = BUILDS[name](model)
            for batch in data(rank, size)[:3]:
                by_closure(opt, model, batch)
            assert isinstance(next(model.parameters()), DTensor) == sharded
            ends.append(weights(model))
        found[name] = (ends[0], ends[1])
    return found


def cut(rank: int, size: int) -> dict[str, Tensor]:
    """Weights of a model that is cut along last axes without FSDP2, so that all passes gather."""
    model = net() if size == 1 else cut_net()
    opt = KFAC(model, factor_interval=2, inverse_interval=3, damping=0.01)
    for x, y in data(rank, size):
        opt.zero_grad()
        with opt.gathering():
            opt.backward(F.cross_entropy(model(x[:, :4].to(F64)), y % 3))
        opt.step()
    return {"cut": weights(model)}


def changing(rank: int, size: int) -> dict[str, Any]:
    """Parameters that freeze and thaw, a forward pass alone, and steps that are skipped."""
    found = {}
    for name in ("kfac", "mkor"):
        model: Any = words(size)
        model.norm.requires_grad_(False)
        opt: Any = BUILDS[name](model)
        first, second, third, fourth, last = data(rank, size)
        by_closure(opt, model, first)
        opt.zero_grad()
        loss_of(model, second).backward()
        model(second[0])  # leaves the root's parameters gathered
        model.norm.requires_grad_(True)
        opt.step()
        model(third[0])
        found[f"{name}, covered"] = torch.tensor(opt.coverage().percent, dtype=F64)
        by_closure(opt, model, third)
        before = weights(model)
        loss_of(model, fourth).backward()
        if rank == size - 1:
            grads = [local(p.grad) for p in model.parameters() if p.grad is not None]
            next(g for g in grads if g.numel()).view(-1)[0] = float("nan")
        opt.step()
        assert opt.skipped == 1
        assert torch.equal(weights(model), before)
        opt.zero_grad()
        by_closure(opt, model, last)
        found[name] = weights(model)
    return found


def overflowing(rank: int, size: int) -> dict[str, Any]:
    """A step whose gradients are finite on all ranks, and whose change is not on the last one."""
    model = words(size)
    opt = MKOR(model, lr=1e300, inner="sgd", interval=1)
    loss_of(model, data(rank, size)[0]).backward()
    if rank == size - 1:
        assert model.scale.grad is not None
        local(model.scale.grad)[-1] = 1e10
    before = weights(model)
    opt.step()
    return {"weights": weights(model), "unchanged": torch.equal(weights(model), before)}


class Last(nn.Module):
    """A recurrent network, from the last of its outputs."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.head = net, nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.net(F.one_hot(x, 7).double())[0][:, -1])
        return out


class Convolved(nn.Module):
    """Groups, and a normalization of channels; sides that have full rank after one batch.

    Where one has not, E-KFAC's eigenvalues in its null space depend on the rounding of a basis.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.net = nn.Sequential(nn.Conv1d(4, 6, 3, groups=2), nn.GroupNorm(3, 6), nn.Tanh())
        self.head = nn.Linear(6, 7)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.net(self.embed(x).mT).mean(2))
        return out


KINDS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: Last(nn.LSTM(7, 5, batch_first=True)),
    "gru": lambda: Last(nn.GRU(7, 5, num_layers=2, batch_first=True)),
    "convolutions": Convolved,
}


def kinds(rank: int, size: int) -> dict[str, Tensor]:
    """Weights of networks of other layers."""
    found = {}
    for name, build in KINDS.items():
        for method in ("kfac", "ekfac", "mkor"):
            with torch.random.fork_rng():
                torch.manual_seed(4)
                model: Any = build().double()
            if size > 1:
                fully_shard(model, mesh=mesh())
            opt: Any = BUILDS[method](model)
            for batch in data(rank, size)[:3]:
                by_fsdp(opt, model, batch)
            found[f"{name}, {method}"] = weights(model)
            found[f"{name}, {method}, covered"] = torch.tensor(opt.coverage().percent, dtype=F64)
    return found


# ------------------------------------------------------------------------------------------ state
KEPT = ("kfac", "ekfac, mc", "mkor", "mkor-h")


def saved(rank: int, size: int) -> dict[str, Any]:
    """Whole states after three steps, and weights after all."""
    found = {}
    for name in KEPT:
        model = words(size)
        opt = BUILDS[name](model)
        for batch in data(rank, size)[:3]:
            by_closure(opt, model, batch)
        state = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, opt.state_dict())
        of_parameters = [t for t in tree_leaves(state["state"]) if isinstance(t, Tensor)]
        assert of_parameters
        assert size == 1 or all(isinstance(t, DTensor) for t in of_parameters)
        twin = words(size)
        twin.load_state_dict(model.state_dict())
        other = BUILDS[name](twin)
        other.load_state_dict(state)
        found[name] = {"model": full(model.state_dict()), "opt": full(state)}
        for batch in data(rank, size)[3:]:
            by_closure(opt, model, batch)
            by_closure(other, twin, batch)
        assert torch.equal(weights(model), weights(twin)), name
        found[name]["end"] = weights(model)
    return found


def resumed(rank: int, size: int, before: dict[str, Any]) -> dict[str, Tensor]:
    """Weights at the end, from whole states."""
    found = {}
    for name in KEPT:
        model = words(1)
        model.load_state_dict(before[name]["model"])
        if size > 1:
            fully_shard(model, mesh=mesh())
        opt = BUILDS[name](model)
        opt.load_state_dict(before[name]["opt"])
        for batch in data(rank, size)[3:]:
            by_closure(opt, model, batch)
        found[name] = weights(model)
    return found


def checkpointed(rank: int, size: int, folder: str, writes: bool) -> dict[str, Tensor]:
    """States that ``torch.distributed.checkpoint`` writes, or reads, and weights at the end."""
    found = {}
    for name in KEPT:
        model = words(size)
        opt = BUILDS[name](model)
        steps = data(rank, size)
        for batch in steps[:3] if writes else steps[1:4]:  # a state to be read into is needed
            by_closure(opt, model, batch)
        written_or_read(model, opt, Path(folder) / name, writes=writes)
        for batch in steps[3:]:
            by_closure(opt, model, batch)
        found[name] = weights(model)
    return found
