"""What steps of sharded layers send, hold and refuse: functions of ``(rank, size, ...)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils._pytree import tree_leaves

from curvlib.core.ranks.group import Group
from curvlib.core.ranks.places import reshard
from curvlib.optim import KFAC, MKOR
from curvlib.optim.layer_shares import Job, LayerShares
from curvlib.optim.sharding import Sharding
from curvlib.optim.shell import CurvatureOptimizer
from tests.distributed.sharded_layers_work import BUILDS, data, words
from tests.distributed.sharded_optim_work import by_closure, by_fsdp, local, weights
from tests.distributed.sharded_work import counted, deep_net, mesh, said, sharded_net
from tests.distributed.work import F64, net


def sent(rank: int, size: int) -> dict[str, Any]:
    """What a rank sends of gradients in a step, in slices, and the numbers in each of its sums."""
    found = {}
    for name, build in {
        "kfac": lambda model: KFAC(model, factor_interval=2),
        "mkor": lambda model: MKOR(model, interval=2),
    }.items():
        model = deep_net()
        for layer in model:
            fully_shard(layer, mesh=mesh())
        fully_shard(model, mesh=mesh())
        opt, batch = build(model), (torch.ones(4, 8, dtype=F64), torch.arange(4))
        by_closure(opt, model, batch)
        numbers: list[int] = []
        sums: list[int] = []
        with exchanged(rank, numbers), counted(sums):
            by_closure(opt, model, batch)  # no curvature is read
        here = sum(local(p).numel() for p in model.parameters())
        found[name] = ([n / here for n in numbers], sums)
    return found


@contextmanager
def exchanged(rank: int, numbers: list[int]) -> Iterator[None]:
    """Notes how many numbers go to other ranks in each exchange."""
    plain = Group.exchanged

    def noted(self: Group, parts: Any, lengths: Any) -> Any:
        numbers.append(sum(len(part) for r, part in enumerate(parts) if r != rank))
        return plain(self, parts, lengths)

    Group.exchanged = noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        Group.exchanged = plain  # type: ignore[method-assign]


def held(rank: int, size: int) -> dict[str, Any]:
    """Numbers of whole gradients that a rank holds, and slices of what ranks have made of them."""
    model: Any = deep_net()
    model.append(nn.Sequential(nn.Linear(8, 64)).double())
    fully_shard(model, mesh=mesh())
    params = list(model.parameters())
    sharding = Sharding(params)
    slices = {id(p): torch.full_like(local(p), i + 1) for i, p in enumerate(params)}
    pairs = zip(params[::2], params[1::2], strict=True)
    jobs = [Job((id(weight), id(bias)), float(weight.numel())) for weight, bias in pairs]
    shares = LayerShares(jobs, slices, sharding)
    for i, p in enumerate(params):
        if id(p) in shares.whole:
            assert torch.equal(shares.whole[id(p)], torch.full(p.shape, i + 1.0, dtype=F64))
    assert {
        id(p) for i in range(len(jobs)) if shares.mine(i) for p in params[2 * i : 2 * i + 2]
    } == {*shares.whole}
    dtypes = {id(p): (torch.float32, F64)[i % 2] for i, p in enumerate(params)}
    made = {key: (whole + rank).to(dtypes[key]) for key, whole in shares.whole.items()}
    parts = shares.parts(made, dtypes)
    own = {n for n in range(len(jobs)) if shares.mine(n)}
    for i, p in enumerate(params):
        mine, part = i // 2 in own, parts[id(p)]
        assert part.dtype == dtypes[id(p)]
        assert part.shape == local(p).shape
        assert not part.numel() or mine == bool((part == i + 1 + rank).all())
    return {"held": sum(t.numel() for t in shares.whole.values()), "jobs": sorted(own)}


def mixed(rank: int, size: int) -> dict[str, Any]:
    """Losses of float32 models that compute in bfloat16, and whether the factors are alike."""
    found: dict[str, Any] = {}
    for name in ("kfac", "mc", "mkor"):
        model: Any = words(1).float()
        if size > 1:
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)
            fully_shard(model, mesh=mesh(), mp_policy=policy)
        opt: Any = BUILDS[name](model)
        batch = data(rank, size)[0]
        by_fsdp(opt, model, batch)
        assert opt.skipped == 0
        if name == "mkor":
            found[name] = opt.inverses["block.0"].left.diagonal.double()
        else:
            found[name] = opt.layers["block.0"].right.double()
        state = tree_leaves(opt.state_dict()["state"])
        assert all(t.dtype == torch.float32 for t in state if isinstance(t, Tensor))
    return found


def refusals(rank: int, size: int) -> dict[str, str]:
    """What is refused, and how; on all ranks alike."""
    methods: dict[str, Any] = {"kfac": KFAC, "mkor": MKOR}
    alone = [dist.new_group([r]) for r in range(size)][rank]
    found = {}
    for name, method in methods.items():
        model, whole = sharded_net(), net()
        opt = method(model)

        def hybrid(method: Any = method) -> None:
            other = net()
            fully_shard(
                other, mesh=DeviceMesh("cpu", [[0], [1]], mesh_dim_names=("replicas", "shards"))
            )
            method(other)

        def parallel(method: Any = method) -> None:
            other = nn.Sequential(nn.Linear(4, 6)).double()
            parallelize_module(other, mesh(), {"0": ColwiseParallel()})
            method(other)

        def beside(method: Any = method) -> None:
            other: Any = net()
            fully_shard(other, mesh=mesh(), ignored_params={other[0].weight})
            method(other)

        def gathered(method: Any = method, model: Any = model) -> None:
            model(torch.ones(2, 4, dtype=F64))
            method(model)

        def late(opt: Any = opt, whole: Any = whole) -> None:
            opt.add_param_group({"params": whole.parameters()})

        def foreign(method: Any = method, model: Any = model) -> None:
            method(model, process_group=alone)

        def other_state(method: Any = method, model: Any = model) -> None:
            state = method(model).state_dict()
            p = next(model.parameters())
            turned = DTensor.from_local(p.to_local(), DeviceMesh("cpu", [1, 0]), p.placements)
            state["state"] = {0: {"momentum": turned}}
            method(model).load_state_dict(state)

        cases: dict[str, Callable[[], Any]] = {
            "hybrid": hybrid,
            "parallel": parallel,
            "beside": beside,
            "gathered": gathered,
            "late": late,
            "foreign": foreign,
            "other state": other_state,
        }
        for case, call in cases.items():
            found[f"{name}, {case}"] = said(call)
            reshard(model)
        x, y = torch.ones(2, 4, dtype=F64), torch.tensor([0, 1])
        before = weights(model)
        by_closure(opt, model, (x, y))  # nothing of this did harm
        assert not torch.equal(weights(model), before)
        assert len(opt.param_groups) == 1
    found["unfollowed"] = said(lambda: Plain(sharded_net().parameters(), {}))
    return found


class Plain(CurvatureOptimizer):
    """A method that says nothing of sharded parameters."""

    def _update(self, gradients: Any) -> bool | None:
        raise NotImplementedError
