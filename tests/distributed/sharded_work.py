"""What ranks compute of models whose parameters are sharded: functions of ``(rank, size, ...)``."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import curvlib as cl
from curvlib.core.operator import as_operator
from curvlib.core.ranks import spread
from curvlib.core.ranks.group import Group, group_of
from curvlib.core.ranks.shards import part_of
from curvlib.estimators.rows import extend, qr
from curvlib.influence.refined import refined
from curvlib.operators.accuracy import accuracy
from curvlib.operators.mfac_operator import MFAC
from curvlib.operators.windows.window import Window
from curvlib.rates.batch_sharpness import batch_sharpness
from tests.cases import build
from tests.distributed.work import F64, batches, net, uneven


def mesh() -> DeviceMesh:
    return DeviceMesh("cpu", list(range(dist.get_world_size())))


def sharded_net() -> nn.Module:
    """A model in units that no number of ranks divides, and a root."""
    model = net()
    fully_shard(model[0], mesh=mesh())
    fully_shard(model, mesh=mesh())
    return model


def cut_net() -> nn.Module:
    """A model whose parameters are cut along their last axes, without FSDP."""
    model = net()
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            cut = distribute_tensor(p.detach(), mesh(), [Shard(p.ndim - 1)])
            module.register_parameter(name, nn.Parameter(cut))
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
    cut = risk if size == 1 else cl.Risk(cut_net(), nn.CrossEntropyLoss(), uneven(rank, size))
    return {
        "cut": cut.space.gather(cl.hessian(cut) @ columns(cut)),
        "value": risk.value(),
        "gradient": whole(risk.gradient()),
        "weight": torch.tensor(risk.weight()),
        "hessian": whole(H @ V),
        "column": whole(H @ V[:, 0]),
        "one by one": whole(cl.hessian(risk, memory=0) @ V),
        "ggn": whole(cl.ggn(risk) @ V),
        "type2": whole(cl.fisher(risk, kind="type2") @ V),
        "empirical": whole(cl.fisher(risk, kind="empirical") @ V),
        "mc": whole(cl.fisher(risk, kind="mc", samples=2, seed=3) @ V),
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


def sketches(rank: int, size: int) -> dict[str, torch.Tensor]:
    """Estimates that orthonormalize blocks of vectors, some of more than the operator's rank."""
    model = net() if size == 1 else sharded_net()
    risk = cl.Risk(model, nn.CrossEntropyLoss(), few(rank, size))
    H, G, whole = cl.hessian(risk), cl.ggn(risk), risk.space.gather
    found: dict[str, torch.Tensor] = {}
    traces = {
        "xtrace": cl.trace(H, method="xtrace", probes=5, block=2),
        "signs": cl.trace(H, method="xtrace", probes=5, law="rademacher"),
        "xnystrace": cl.trace(G, method="xnystrace", probes=6),
        "hutch++": cl.trace(H, method="hutch++", max_products=12, block=2),
        "beyond": cl.trace(G, method="xtrace", probes=20, block=20),
        "exact": cl.trace(H, block=64),
        "zero": cl.trace(0.0 * G, method="xnystrace", probes=3),
    }
    for name, trace in traces.items():
        found[name] = torch.tensor([trace.value, trace.stderr, trace.low])
    norms = {
        "frobenius": cl.frobenius_norm(H, probes=5),
        "plain frobenius": cl.frobenius_norm(H, method="hutchinson", probes=3),
        "exact frobenius": cl.frobenius_norm(G, block=64),
    }
    found |= {name: torch.tensor([norm.value, norm.stderr]) for name, norm in norms.items()}
    chosen = {"odd": slice(1, None, 2), "last": [-1], "bias": "*.bias"}
    entries = {
        "xdiag": cl.diagonal(H, method="xdiag", probes=5, block=2, blocks=chosen),
        "xnysdiag": cl.diagonal(G, method="xnysdiag", probes=6, blocks=chosen),
        "hutchinson": cl.diagonal(H, method="hutchinson", probes=4, blocks=chosen),
        "gaussian": cl.diagonal(H, law="gaussian", probes=4, blocks=chosen),
        "every": cl.diagonal(H, blocks=chosen, block=64),
    }
    for name, diagonal in entries.items():
        found |= {name: whole(diagonal.value), name + " error": whole(diagonal.stderr)}
        for kind in ("layers", "channels", "blocks"):
            means = diagonal.block_means(kind)
            found[f"{name} {kind}"] = torch.stack([means.value, means.stderr])
    both = cl.estimate(H, ["trace", "diagonal", "frobenius", "layers"], probes=4)
    found["layers"] = torch.tensor(list(both.layers.values()))
    found["joint"] = torch.tensor([both.trace, both.frobenius])
    return found


def solvers(rank: int, size: int) -> dict[str, torch.Tensor]:
    """Low-rank approximations, preconditioned solves, functions, parts of operators."""
    with warnings.catch_warnings():  # budgets are short
        warnings.filterwarnings("ignore", message=".*did not converge")
        return _solvers(rank, size)


def _solvers(rank: int, size: int) -> dict[str, torch.Tensor]:
    model = net() if size == 1 else sharded_net()
    risk = cl.Risk(model, nn.CrossEntropyLoss(), few(rank, size))
    H, G, space = cl.hessian(risk), cl.ggn(risk), risk.space
    whole, b = space.gather, risk.gradient()
    fixed = cl.low_rank(G, 5, oversampling=2, probes=2)
    ritz = cl.low_rank(H, 4, method="eigh", oversampling=2, probes=2)
    grown = cl.low_rank(G, tolerance=0.4, probes=2, block=6)
    used = cl.low_rank(G, 20, power=0, oversampling=0, probes=0)  # more than its rank
    near = used.operator_in(space)
    near_solve = near.shift(0.5).solve(b, damping=0.1)
    quick = cl.solve(G, b, damping=0.1, preconditioner=6, tolerance=1e-3)
    given = cl.solve(G, b, damping=0.1, preconditioner=near, tolerance=1e-3)
    inverse = cl.inverse(G, damping=0.5, preconditioner=6, tolerance=1e-2)
    logdet = cl.logdet(G, 0.5, steps=3, probes=2)
    scales = cl.Diagonal(b.abs() + 0.1, spread=space.spread)
    norms = [cl.spectral_norm(op, max_products=8).value for op in (H, H @ scales)]
    angle = cl.cosine_similarity(H, G, max_products=16)
    sharp = cl.directional_sharpness(H, torch.stack([b, b.abs()], 1), b)
    block = (H @ H).blocks()["0"]
    if size > 1:
        assert block.spread is not None
        assert block.spread == H.blocks()["0"].spread
    some = H.submatrix([40, 2, 17], slice(3, 30, 4))
    named = H.submatrix("3.*")
    return {
        "fixed": whole(fixed.vectors).square(),
        "values": torch.cat([fixed.values, ritz.values, grown.values]),
        "errors": torch.tensor([found.squared_error for found in (fixed, ritz, grown)]),
        "near": near.to_dense(),
        "near solve": whole(near_solve),
        "near numbers": torch.tensor([near.trace(), near.logdet(0.1)]),
        "near diagonal": whole((near.power(2.0) + near).matmat(b[:, None])[:, 0] + near.diagonal()),
        "quick": whole(quick.value),
        "given": whole(given.value),
        "iterations": torch.cat([quick.iterations, given.iterations]),
        "inverse": whole(inverse @ b),
        "logdet": torch.tensor([logdet.value, logdet.stderr]),
        "scales": scales.power(0.5).inverse(0.1).shift(1.0).to_dense(),
        "scales' numbers": torch.tensor([scales.trace(), scales.logdet(0.1)]),
        "norms": torch.tensor(norms),
        "angle": torch.tensor([angle.value, angle.stderr]),
        "sharpness": torch.cat([sharp.value, sharp.slope, sharp.change(0.1)]),
        "block": block.to_dense(),
        "submatrix": some.to_dense(),
        "transposed": some.T.to_dense(),
        "named": named.to_dense(),
        "whole": H.whole() @ whole(b),
        "scipy": torch.from_numpy(cl.to_scipy(H) @ whole(b).numpy()),
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
            name + " elements": F.inverse_submatrix([50, 3, 17], [3, 4]),
        }
        F.precompute()
        found[name + " kept"] = F.inverse_submatrix([50, 3, 17], [3, 4])
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


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2.0

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g * 2.0


def refusals(rank: int, size: int) -> dict[str, str]:
    """What is refused, and how."""
    model = sharded_net()
    risk = cl.Risk(model, nn.CrossEntropyLoss(), few(rank, size))
    plain = cl.Risk(net(), nn.CrossEntropyLoss(), few(rank, size))
    H, b = cl.hessian(risk), torch.zeros(risk.space.size, dtype=F64)
    window = cl.mfac_window(risk.space, 2)
    window.push(b + 1.0)

    def placed(*placements: Any, mesh_shape: tuple[int, ...] = (2,), layers: Any = (0,)) -> Any:
        other, where = net(), torch.arange(2).reshape(mesh_shape)
        for layer in layers:
            for name, p in list(other[layer].named_parameters()):
                cut = distribute_tensor(p.detach(), DeviceMesh("cpu", where), placements)
                other[layer].register_parameter(name, nn.Parameter(cut))
        return cl.Risk(other, nn.CrossEntropyLoss(), few(rank, size))

    def buffered() -> Any:
        other = sharded_net()
        other.register_buffer("scale", distribute_tensor(torch.ones(4), mesh(), [Shard(0)]))
        return cl.Risk(other, nn.CrossEntropyLoss(), few(rank, size))

    def headed(other: nn.Module) -> Any:
        loss = cl.LinearCrossEntropy(other[3])
        return cl.Risk(other, loss, few(rank, size), forward=lambda m, b: m[2](m[1](m[0](b[0]))))

    def hybrid() -> Any:
        """HSDP: replicated along one axis of the mesh, sharded along the other."""
        other = net()
        places = DeviceMesh("cpu", [[0, 1]], mesh_dim_names=("replicas", "shards"))
        fully_shard(other, mesh=places)
        return cl.Risk(other, nn.CrossEntropyLoss(), few(rank, size))

    def tensor_parallel() -> Any:
        other = parallelize_module(net(), mesh(), {"0": ColwiseParallel()})
        return cl.Risk(other, nn.CrossEntropyLoss(), few(rank, size))

    def replaced() -> Any:
        other = sharded_net()
        after = cl.Risk(other, nn.CrossEntropyLoss(), few(rank, size))
        other[3].bias = nn.Parameter(other[3].bias.detach().clone())
        return after.value()

    def once() -> Any:
        return cl.ggn(risk_of(lambda m, batch: _Once.apply(m(batch[0])))) @ b

    def not_finite(value: bool = False) -> Any:
        scale = float("nan") if rank == 0 else 1.0
        bad = risk_of(lambda m, batch: m(batch[0] * scale))
        return bad.value() if value else bad.gradient()

    def broken_data() -> Any:
        def batches_of() -> Iterator[Any]:
            yield from few(0, 2)
            if rank == 1:
                raise OSError("the disk is gone")

        return cl.Risk(model, nn.CrossEntropyLoss(), Again(batches_of)).value()

    def risk_of(forward: Any) -> cl.Risk:
        return cl.Risk(model, nn.CrossEntropyLoss(), few(rank, size), forward=forward)

    cases: dict[str, Callable[[], Any]] = {
        "whole": lambda: as_operator(H),
        "preconditioner": lambda: cl.solve(H, b, preconditioner=cl.Diagonal(b + 1.0)),
        "combined": lambda: H + cl.hessian(plain),
        "angle": lambda: cl.cosine_similarity(H, cl.hessian(plain)),
        "low rank": lambda: cl.low_rank(H, 1, oversampling=0, probes=0).operator,
        "own rows": lambda: cl.Diagonal(b[1:], spread=risk.space.spread),
        "own numbers": lambda: cl.Diagonal(b / (b + float(rank)), spread=risk.space.spread),
        "singular": lambda: cl.Diagonal(b + float(rank), spread=risk.space.spread).solve(b),
        "not positive": lambda: cl.Diagonal(b - float(rank), spread=risk.space.spread).logdet(0.5),
        "no power": lambda: cl.Diagonal(b - float(rank), spread=risk.space.spread).power(0.5),
        "trained through": lambda: cl.diagonal(H, differentiable=True, probes=2),
        "compiled hessian": lambda: cl.hessian(risk, compile=True),
        "compiled ggn": lambda: cl.ggn(risk, compile=True),
        "head": lambda: headed(model),
        "hybrid": hybrid,
        "differentiable": lambda: cl.trace(H, probes=2) and H.differentiable_matmat(b[:, None]),
        "gather": lambda: risk.space.gather(b[1:]),
        "scatter": lambda: risk.space.scatter(b),
        "gradients": lambda: list(cl.gradients(risk)),
        "accuracy": lambda: accuracy(risk),
        "jacobian": lambda: cl.jacobian(risk) @ b,
        "mfac": lambda: cl.mfac(risk, size=2),
        "check": risk.check,
        "alone": risk.alone,
        "group": lambda: cl.Risk(model, nn.CrossEntropyLoss(), few(rank, size), group=False),
        "parts": lambda: cl.mfac_window(risk.space, 2, parts="layer"),
        "block_size": lambda: cl.mfac(b[None], space=risk.space, block_size=2),
        "window of a space": lambda: MFAC(Window(risk.space.size, 2), space=risk.space),
        "window's file": lambda: window.window.save("window.safetensors"),
        "prune": lambda: cl.prune(model, risk, 0.5),
        "rates": lambda: batch_sharpness(risk, 1),
        "refined": lambda: refined(risk),
        "replicated": lambda: placed(Replicate()),
        "two dimensions": lambda: placed(Shard(0), Replicate(), mesh_shape=(2, 1)),
        "some whole": lambda: placed(Shard(0)),
        "buffer": buffered,
        "tensor parallel": tensor_parallel,
        "replaced": replaced,
        "once": once,
        "not finite": not_finite,
        "value not finite": lambda: not_finite(value=True),
        "broken data": broken_data,
    }
    return {name: said(call) for name, call in cases.items()}


def said(call: Callable[[], Any]) -> str:
    try:
        return f"nothing: {call()!r}"
    except Exception as error:  # noqa: BLE001 (what it says is looked at)
        return f"{type(error).__name__}: {error}"


class _Breaks(torch.autograd.Function):
    """Fails in a derivative of some order."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: int) -> torch.Tensor:
        ctx.order = order
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        if ctx.order == 1:
            raise RuntimeError("no derivative here")
        return _Breaks.apply(g, ctx.order - 1), None


def told(rank: int, size: int) -> dict[str, Any]:
    """What ranks say of failures of the last one alone, or of all, within passes."""
    model, last = sharded_net(), rank == size - 1
    right = cl.Risk(model, nn.CrossEntropyLoss(), uneven(rank, size))
    expected, V = right.value(), columns(right)

    def failing(m: nn.Module, batch: Any) -> torch.Tensor:
        hidden = m[0](batch[0])
        if last:
            raise LookupError("no such word")
        return m[3](m[2](m[1](hidden)))

    def everywhere(m: nn.Module, batch: Any) -> torch.Tensor:
        raise LookupError(f"no such word on rank {rank}")

    def breaking(order: int) -> cl.Risk:
        def forward(m: nn.Module, batch: Any) -> torch.Tensor:
            hidden = m[1](m[0](batch[0]))
            return m[3](m[2](_Breaks.apply(hidden, order) if last else hidden))

        return risk_of(forward)

    def risk_of(forward: Any = None, **settings: Any) -> cl.Risk:
        data = uneven(rank, size)
        return cl.Risk(model, nn.CrossEntropyLoss(), data, forward=forward, **settings)

    def weight(batch: Any) -> float:
        return -1.0 if last else 1.0

    other = sharded_net()
    replaced = cl.Risk(other, nn.CrossEntropyLoss(), uneven(rank, size))
    if last:
        other[3].bias = nn.Parameter(other[3].bias.detach().clone())
    cases: dict[str, Callable[[], Any]] = {
        "forward": lambda: cl.hessian(risk_of(failing)) @ V,
        "value": risk_of(failing).value,
        "backward": lambda: cl.ggn(breaking(1)) @ V,
        "second derivative": lambda: cl.hessian(breaking(2)) @ V,
        "weight": risk_of(weight=weight).value,
        "everywhere": risk_of(everywhere).gradient,
        "replaced": replaced.value,
    }
    found: dict[str, Any] = {}
    for name, call in cases.items():
        start = time.monotonic()
        found[name] = said(call)
        found[name + " seconds"] = time.monotonic() - start
        assert torch.equal(right.value(), expected)  # the group goes on
    return found


class Again:
    """Batches that can be iterated again."""

    def __init__(self, batches_of: Callable[[], Iterator[Any]]) -> None:
        self.batches_of = batches_of

    def __iter__(self) -> Iterator[Any]:
        return self.batches_of()


class _Largest(TorchDispatchMode):
    """Notes the longest axis of all tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.longest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for item in tree_leaves(out):
            if isinstance(item, torch.Tensor):
                self.longest = max(self.longest, *item.shape, 0)
        return out


def deep_net(layers: int = 10) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(layers)))
    for p in model.double().parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=F64) * 0.4
    return model


def footprint(rank: int, size: int) -> dict[str, Any]:
    """What ranks hold, and how the model is left."""
    model = deep_net()
    for layer in model:
        fully_shard(layer, mesh=mesh())
    fully_shard(model, mesh=mesh())
    model[0].register_forward_hook(lambda *_: None)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(rank), dtype=F64)
    y = torch.arange(4)
    model(x)  # leaves the root's parameters whole
    risk = cl.Risk(model, nn.CrossEntropyLoss(), (x, y))
    risk.value()
    next(model.parameters()).grad = kept = next(model.parameters()).detach().clone()
    before = _state(model)
    spread.CHUNK = 64
    alive = []

    def graph(batch: Any, total: Any) -> torch.Tensor:
        parts = batch.gradient(create_graph=True)
        assert risk.held.regather is not None
        alive.extend(not ref.expired() for ref in risk.held.regather._whole)
        return risk.space.join(parts)

    with _Largest() as seen:
        risk.accumulate(graph, rows=True)
        H, b = cl.hessian(risk), risk.gradient()
        cl.eigenpairs(H, 1, max_products=7, tolerance=0.1)
        cl.density(H, steps=2, probes=1, points=64)
        cl.trace(H, method="hutchinson", probes=2)
        cl.diagonal(H, probes=2)
        cl.solve(cl.ggn(risk), b, damping=1.0, tolerance=0.5)
        window = cl.mfac_window(risk.space, 2)
        window.push(b)
        window.solve(b)
    with suppress(ZeroDivisionError):
        risk.accumulate(lambda batch, _: 1 / 0, rows=True)
    sent = {}
    for name, work in {
        "gradient": risk.gradient,
        "hessian": lambda: cl.hessian(risk) @ b,
        "hessian of 4": lambda: cl.hessian(risk) @ torch.stack([b] * 4, 1),
        "ggn": lambda: cl.ggn(risk) @ b,
    }.items():
        numbers: list[int] = []
        with transferred(numbers):
            work()
        sent[name] = sum(numbers) / risk.space.total
    after = _state(model)
    same = all(a == b for a, b in zip(before, after, strict=True))
    own = sum(p.to_local().numel() for p in model.parameters())
    return {
        "longest": seen.longest,
        "rows": risk.space.size,
        "own": own,
        "total": risk.space.total,
        "alive": sum(alive),
        "gathered": len(alive),
        "same": same and next(model.parameters()).grad is kept,
        "trains": _trains(model, x, y),
        "sent": sent,
    }


def _state(model: nn.Module) -> list[Any]:
    """Bits of the slices, identities, flags, hooks in their order and modes."""
    out: list[Any] = []
    for module in model.modules():
        hooks = (module._forward_pre_hooks, module._forward_hooks)
        out += [[(k, id(h)) for k, h in table.items()] for table in hooks] + [module.training]
    for name, p in model.named_parameters():
        bits = p.to_local().detach().numpy().tobytes()
        out.append((name, id(p), type(p).__name__, p.requires_grad, p.placements, bits))
    return out


def _trains(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether FSDP's own forward and backward passes still work."""
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    plain = deep_net()
    nn.functional.cross_entropy(plain(x), y).backward()
    grads = [p.grad.full_tensor() for p in model.parameters()]
    for g in (p.grad for p in plain.parameters()):
        dist.all_reduce(g)
    expected = [p.grad / dist.get_world_size() for p in plain.parameters()]
    return all(torch.allclose(a, b) for a, b in zip(grads, expected, strict=True))


@contextmanager
def transferred(numbers: list[int]) -> Iterator[None]:
    """Notes the numbers of each gathering of slices, and each sum into them."""
    plain = Group.joined, Group.own_sum

    def joined(self: Group, block: torch.Tensor) -> torch.Tensor:
        out = plain[0](self, block)
        numbers.append(out.numel())
        return out

    def own_sum(self: Group, blocks: torch.Tensor) -> torch.Tensor:
        numbers.append(blocks.numel())
        return plain[1](self, blocks)

    Group.joined, Group.own_sum = joined, own_sum  # type: ignore[method-assign]
    try:
        yield
    finally:
        Group.joined, Group.own_sum = plain  # type: ignore[method-assign]


def resumed(rank: int, size: int, folder: str, stop: int, diagonal: bool = False) -> dict[str, Any]:
    """Estimates with checkpoints, of which each stops after some products, if any."""
    model = net() if size == 1 else sharded_net()
    risk = cl.Risk(model, nn.CrossEntropyLoss(), few(rank, size))
    whole, total = risk.space.gather, risk.space.total
    b = columns(risk, 1)[:, 0]  # the same bits on any number of ranks
    deflate = risk.space.scatter(torch.full((total, 1), total**-0.5, dtype=F64))
    calls: dict[str, Callable[[Any, str], Any]] = {
        "pairs": lambda H, p: cl.eigenpairs(
            H, 2, deflate=deflate, checkpoint=p, save_every=0, basis=9
        ),
        "density": lambda H, p: cl.density(H, steps=5, probes=2, checkpoint=p, save_every=0),
        "diagonal": lambda H, p: cl.diagonal(
            H, law="gaussian", method="hutchinson", probes=5, block=1, checkpoint=p, save_every=0
        ),
        "solution": lambda H, p: cl.solve(
            H, b, damping=0.5, tolerance=1e-8, checkpoint=p, save_every=0
        ),
    }
    found: dict[str, Any] = {}
    if not diagonal:
        del calls["diagonal"]
    for name, call in calls.items():
        H = cl.hessian(risk)
        if stop:
            H._product = _stopping(H._product, stop)
        with suppress(InterruptedError), warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            found[name] = call(H, f"{folder}/{name}")
    if stop:
        return found
    out = {
        "values": found["pairs"].values,
        "density": found["density"].nodes,
        "solution": whole(found["solution"].value),
    }
    if diagonal:
        entries = found["diagonal"]
        out |= {"diagonal": whole(entries.value), "error": whole(entries.stderr)}
    return out


def _stopping(product: Any, after: int) -> Any:
    left = [after]

    def stopped(block: torch.Tensor) -> torch.Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise InterruptedError
        out: torch.Tensor = product(block)
        return out

    return stopped


def interrupted(rank: int, size: int, folder: str, fail: bool) -> dict[str, Any]:
    """Estimates that save nothing by the clock, and products of those that go on from an error."""
    model = net() if size == 1 else sharded_net()
    risk = cl.Risk(model, nn.CrossEntropyLoss(), few(rank, size))
    H, G = cl.hessian(risk), cl.ggn(risk)
    settings: dict[str, Any] = {"save_every": 1e6, "block": 2}
    calls: dict[str, Callable[[str], Any]] = {
        "xtrace": lambda p: cl.trace(H, method="xtrace", probes=5, checkpoint=p, **settings),
        "xdiag": lambda p: cl.diagonal(H, method="xdiag", probes=5, checkpoint=p, **settings),
        "low rank": lambda p: cl.low_rank(G, 4, oversampling=1, probes=2, checkpoint=p, **settings),
        "grown": lambda p: cl.low_rank(G, 5, tolerance=0.1, probes=2, checkpoint=p, **settings),
        "solve": lambda p: cl.solve(
            G, columns(risk, 1)[:, 0], damping=0.1, preconditioner=3, checkpoint=p, save_every=1e6
        ),
    }
    found: dict[str, Any] = {}
    for name, call in calls.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of a tolerance that is not met
            op = H if name.startswith("x") else G
            product, made = op._product, [0]
            op._product = _counting(product, made, 3 if fail else 1000)
            with suppress(InterruptedError):
                answer = call(f"{folder}/{name}")
                value = answer.values if name in ("low rank", "grown") else answer.value
                whole = name in ("xdiag", "solve")
                found[name] = risk.space.gather(value) if whole else torch.as_tensor(value)
            op._product = product
            found[name + " products"] = made[0]
    return found


def factors(rank: int, size: int) -> dict[str, Any]:
    """QR of blocks of vectors of which a rank has fewer entries than there are vectors."""
    group = group_of()
    where = spread.Spread((spread.Slices((4, 3), 0), spread.Slices((7,), 0)), group)
    g = torch.Generator().manual_seed(0)
    full = torch.randn(6, 19, generator=g, dtype=F64)
    low = torch.randn(6, 2, generator=g, dtype=F64) @ torch.randn(2, 19, generator=g, dtype=F64)
    graded = full * torch.logspace(0, -14, 6, dtype=F64)[:, None] + full[:1]
    found: dict[str, Any] = {}
    for name, rows in {"full": full, "low rank": low, "graded": graded, "zero": 0 * full}.items():
        Q, R = qr(where.scatter(rows.mT).mT, where)
        found[name] = (rows, where.gather(Q.mT).mT, R)
        more, C, R = extend((Q[:2],), where.scatter(rows.mT).mT, spread=where)
        found["more than " + name] = (rows - C.mT @ found[name][1][:2], where.gather(more.mT).mT, R)
    return found


def sums(rank: int, size: int) -> dict[str, list[int]]:
    """How many numbers sketches of a diagonal operator sum over ranks."""
    group = group_of()
    assert group is not None
    where = spread.Spread((spread.Slices((60, 5), 0), spread.Slices((60,), 0)), group)
    values = where.scatter(0.9 ** torch.arange(360, dtype=F64))
    op = cl.Diagonal(values, spread=where)
    found: dict[str, list[int]] = {}
    for method in ("xtrace", "xnystrace", "hutch++", "hutchinson"):
        with counted(found.setdefault(method, [])):
            cl.trace(op, method=method, max_products=60)
    for method in ("xdiag", "xnysdiag"):
        with counted(found.setdefault(method, [])):
            cl.diagonal(op, method=method, max_products=60)
    return found


def _counting(product: Any, made: list[int], most: int) -> Any:
    def counted_product(block: torch.Tensor) -> torch.Tensor:
        if made[0] == most:
            raise InterruptedError
        made[0] += 1
        out: torch.Tensor = product(block)
        return out

    return counted_product


AWKWARD = (
    "GroupNorm",
    "encoder train",
    "sdpa",
    "embedding",
    "tied",
    "called twice",
    "convolutions",
    "untouched",
    "checkpointed",
    "weight norm",
    "frozen",
    "hf target",
    "custom weight",
    "ce soft weighted smooth",
)


def awkward(rank: int, size: int, names: tuple[str, ...]) -> dict[str, Any]:
    """Products of awkward models, and those that one process has."""
    found = {}
    for name in names:
        answers = []
        for parts in {1, size}:
            case = build(name)
            settings = case.settings | ({} if case.names is None else {"params": case.names})
            data = case.data if parts == 1 else part_of(case.data, rank, size)
            if parts > 1:
                fully_shard(case.model, mesh=mesh())
            group = None if parts > 1 else False
            risk = cl.Risk(case.model, case.loss, data, group=group, **settings)
            V = columns(risk, 2)
            products = [risk.gradient()[:, None], cl.hessian(risk) @ V, cl.ggn(risk) @ V]
            answers.append([risk.space.gather(product) for product in products])
        found[name] = [(a - b).norm() / (b.norm() + 1e-9) for a, b in zip(*answers, strict=True)]
    return found


def trained(rank: int, size: int) -> list[float]:
    """A risk that was made before FSDP's first pass follows training; the same without FSDP."""
    values = []
    for model in (sharded_net(), net()):
        sharded = any(isinstance(p, DTensor) for p in model.parameters())
        x, y = batches()[0]
        risk = cl.Risk(model, nn.CrossEntropyLoss(), [(x, y)], group=None if sharded else False)
        before = float(risk.value())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        values += [before, float(risk.value()), risk.space.norm(risk.gradient())]
    return values


def left_alone(rank: int, size: int) -> str:
    """What a rank says when another one dies in the middle of a second derivative."""
    risk = cl.Risk(sharded_net(), nn.CrossEntropyLoss(), few(rank, size))
    gather, passed = Group.joined, [0]

    def joined(self: Group, block: torch.Tensor) -> torch.Tensor:
        passed[0] += 1
        if rank == 0 and passed[0] == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return gather(self, block)

    fatal = 0
    H, b = cl.hessian(risk), columns(risk, 1)
    Group.joined = joined  # type: ignore[method-assign]
    H @ b
    fatal = 2 * passed[0] - 1  # the last but one of the next product
    return said(lambda: H @ b)
