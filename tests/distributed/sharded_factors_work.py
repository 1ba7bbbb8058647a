"""K-FAC and EK-FAC of sharded parameters: functions of ``(rank, size, ...)``."""

from __future__ import annotations

import gc
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import curvlib as cl
from curvlib.core.ranks.group import Group
from curvlib.operators.factors.factored_damping import factored_damping
from tests.distributed.factored_work import Images, Words, images, part, seeded, words
from tests.distributed.failures import message
from tests.distributed.sharded_work import _state, mesh

F64 = torch.float64
CROSS = nn.CrossEntropyLoss()


def whole_fsdp(model: nn.Module) -> nn.Module:
    """All parameters in one unit."""
    fully_shard(model, mesh=mesh())
    return model


def units_fsdp(model: nn.Module) -> nn.Module:
    """Each child with parameters is a unit, and the root has the rest."""
    for child in model.children():
        if next(child.parameters(), None) is not None:
            fully_shard(child, mesh=mesh())
    return whole_fsdp(model)


def last_axes(model: nn.Module) -> nn.Module:
    """Parameters are cut along their last axes, without FSDP."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None and id(p) not in made:
                cut = distribute_tensor(p.detach(), mesh(), [Shard(p.ndim - 1)])
                made[id(p)] = nn.Parameter(cut)
            if p is not None:
                module.register_parameter(name, made[id(p)])
    return model


def sequence_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.transpose(1, 2), target, reduction="sum")


def a_risk(rank: int, size: int, name: str, shard: Any) -> cl.Risk:
    model = seeded(Images() if name == "images" else Words())
    model = model if size == 1 else shard(model)
    if name == "images":
        return cl.Risk(model, CROSS, part(images(), rank, size))
    return cl.Risk(model, sequence_loss, part(words(), rank, size), reduction="sum")


FITS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "type2": ("images", units_fsdp, {}),
    "sampled": ("images", whole_fsdp, {"fisher": "mc", "samples": 2, "dense_norms": True}),
    "kfac": ("images", last_axes, {"eigen_corrected": False, "sharing": "reduce"}),
    "tied": ("words", whole_fsdp, {"fisher": "empirical", "prefix": 3}),
}


def columns(space: Any, count: int = 2) -> Tensor:
    g = torch.Generator().manual_seed(4)
    found: Tensor = space.scatter(torch.randn(space.total, count, generator=g, dtype=F64))
    return found


def operators(rank: int, size: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, (which, shard, settings) in FITS.items():
        risk = a_risk(rank, size, which, shard)
        K = cl.kfac(risk, **settings)
        V, whole = columns(risk.space), risk.space.gather
        found |= {
            f"{name} products": whole(K @ V),
            f"{name} solve": whole(K.solve(V[:, 0])),
            f"{name} inverse": whole(K.inverse(0.2) @ V),
            f"{name} power": whole(K.shift(0.1).power(-0.5) @ V),
            f"{name} diagonal": whole(K.diagonal()),
            f"{name} dense": K.to_dense(),
            f"{name} numbers": torch.tensor([K.trace(), K.logdet(), *K.dampings().values()]),
            f"{name} kfac": whole(K.kronecker() @ V),
            f"{name} coverage": torch.tensor(K.coverage().percent),
        }
        if name == "type2":
            blocks = {
                key: block.space.gather(block.diagonal()) for key, block in K.blocks().items()
            }
            found |= {f"block {key}": value for key, value in blocks.items()}
            G = cl.ggn(risk)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                b = risk.gradient()
                x = cl.solve(G, b, damping=0.05, preconditioner=K, max_products=4)
            found["solved"] = whole(x.value)
    return found


class Awkward(nn.Module):
    """Gates, attention, a convolution of each channel, a table, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4, padding_idx=0)
        self.places = nn.Parameter(torch.zeros(5, 4))
        self.lstm = nn.LSTM(4, 3, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.each = nn.Conv1d(6, 6, 3, padding=1, groups=6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lstm(self.table(x) + self.places[: x.shape[1]])[0]
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.head(self.norm(self.each(h.mT).mT.sum(1)))


class Turned(nn.Module):
    """A layer of the kind of Hugging Face's ``Conv1D``, with a weight ``[in, out]``."""

    def __init__(self) -> None:
        super().__init__()

        class Conv1D(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.nf = 5
                self.weight = nn.Parameter(torch.zeros(3, 5))
                self.bias = nn.Parameter(torch.zeros(5))

            def forward(self, x: Tensor) -> Tensor:
                return x @ self.weight + self.bias

        self.turned = Conv1D()

    def forward(self, x: Tensor) -> Tensor:
        return self.turned(x)


def lengths(
    seed: int = 5, sizes: tuple[tuple[int, int], ...] = ((2, 5), (1, 3), (3, 4))
) -> list[Any]:
    """Sequences of several lengths, in batches of several sizes."""
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randint(7, shape, generator=g), torch.randint(3, shape[:1], generator=g))
        for shape in sizes
    ]


def awkward(rank: int, size: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    cuts = {1: [0, 3], 2: [0, 1, 3], 3: [0, 2, 2, 3]}[size]
    own = lengths()[cuts[rank] : cuts[rank + 1]]
    kinds: dict[str, dict[str, Any]] = {
        "joint": {"rest": "diagonal", "fisher": "empirical"},
        "separate": {
            "gates": "separate",
            "max_side": 5,
            "fisher": "mc",
            "rest": "diagonal",
            "mask": lambda batch: batch[0] != 0,
        },
    }
    shards = {"joint": whole_fsdp, "separate": last_axes}
    for name, settings in kinds.items():
        model = seeded(Awkward())
        model = model if size == 1 else shards[name](model)
        risk = cl.Risk(model, CROSS, own)
        K = cl.kfac(risk, **settings)
        found[name] = risk.space.gather(K @ columns(risk.space))
        found[f"{name} solve"] = risk.space.gather(K.solve(columns(risk.space)))
        found[f"{name} trace"] = torch.tensor(K.trace())
        found[f"{name} diagonal"] = risk.space.gather(K.diagonal())
        text = str(K.coverage())
        found[f"{name} coverage"] = torch.tensor([float(ord(c)) for c in text])
    model = seeded(Turned())
    model = model if size == 1 else whole_fsdp(model)
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(6, 3, generator=g, dtype=F64), torch.randint(5, (6,), generator=g)
    cuts = {1: [0, 6], 2: [0, 4, 6], 3: [0, 2, 5, 6]}[size]
    at = slice(cuts[rank], cuts[rank + 1])
    risk = cl.Risk(model, CROSS, [(x[at], y[at])])
    found["turned"] = risk.space.gather(cl.kfac(risk) @ columns(risk.space))
    return found


def saved(rank: int, size: int, path: str, write: bool) -> dict[str, Tensor]:
    """Writes an operator, or reads it."""
    risk = a_risk(rank, size, "images", whole_fsdp)
    if write:
        K = cl.kfac(risk)
        K.save(path)
    else:
        K = cl.KFAC.load(path, risk)
    found = {
        "products": risk.space.gather(K @ columns(risk.space)),
        "kfac": risk.space.gather(K.kronecker() @ columns(risk.space)),
        "numbers": torch.tensor([K.trace(), K.logdet()]),
    }
    held = [t for b in K.blocks_of.values() for t in (b.left, b.right, b.eigenvalues)]
    found["held"] = torch.tensor(sum(t.numel() for t in held if t is not None))
    return found


class Failing:
    """A mask that fails on one rank after some calls, and counts passes."""

    def __init__(self, after: int | None) -> None:
        self.left = after
        self.calls = 0

    def __call__(self, batch: Any) -> Tensor:
        self.calls += 1
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise LookupError("the disk with the images is gone")
        return torch.ones(len(batch[0]), 4, 4, dtype=torch.bool)


class Places(nn.Module):
    """A convolution whose rows a mask counts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.last = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.conv(x).tanh()).mean((2, 3))


def resumed(rank: int, size: int, path: str, after: int | None) -> dict[str, Any]:
    """A fit with a checkpoint that fails on the last rank, or goes to its end."""
    model = seeded(Places())
    model = model if size == 1 else whole_fsdp(model)
    risk = cl.Risk(model, CROSS, part(images(), rank, size))
    mask = Failing(after if rank == size - 1 else None)
    found: dict[str, Any] = {}
    try:
        K = cl.kfac(risk, mask=mask, checkpoint=path, save_every=0.0, progress=False)
        found["value"] = risk.space.gather(K @ columns(risk.space))
    except (LookupError, RuntimeError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    return found | {"calls": mask.calls}


class Broken:
    """Batches of which the last one cannot be read on one rank."""

    def __init__(self, own: list[Any], broken: bool) -> None:
        self.own, self.broken = own, broken

    def __iter__(self) -> Iterator[Any]:
        yield from self.own
        if self.broken:
            raise OSError("the disk is gone")


def failures(rank: int, size: int, folder: str) -> dict[str, str]:
    """What all ranks say where something fails on one of them."""
    last = rank == size - 1
    own = part(images(), rank, size)

    def fit(data: Any = own, **settings: Any) -> cl.KFAC:
        return cl.kfac(cl.Risk(whole_fsdp(seeded(Places())), CROSS, data), **settings)

    def gone() -> str:
        """What is said where checkpoints cannot be written any more; the fit goes on."""
        here = Path(folder) / "checkpoints"
        if rank == 0:
            here.mkdir()

        def mask(batch: Any) -> Tensor:
            shutil.rmtree(here, ignore_errors=True)
            return torch.ones(len(batch[0]), 4, 4, dtype=torch.bool)

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            fit(mask=mask, checkpoint=here / "fit.ckpt", save_every=0.0, progress=False)
        return str(said[0].message)

    def not_finite() -> Any:
        bad = [(x.clone(), y) for x, y in own]
        if last:
            bad[-1][0][0] = float("nan")
        return fit(bad)

    def forward(model: nn.Module, batch: Any) -> Tensor:
        hidden = model.conv(batch[0])
        if last and len(batch[0]) == 1:
            raise LookupError("the disk with the images is gone")
        return model.last(hidden.tanh()).mean((2, 3))

    model = whole_fsdp(seeded(Places()))
    failing = cl.Risk(model, CROSS, own, forward=forward)
    K = fit(own, eigen_corrected=False)
    zero = K.with_eigenvalues([torch.zeros_like(b.eigenvalues) for b in K.blocks_of.values()])
    path = f"{folder}/images.safetensors"
    cl.kfac(a_risk(rank, size, "images", whole_fsdp)).save(path)
    return {
        "data": message(lambda: fit(Broken(own, last))),
        "forward": message(lambda: cl.kfac(failing)),
        "mask": message(lambda: fit(mask=Failing(1 if last else None))),
        "not finite": message(not_finite),
        "gone": gone(),
        "no folder": message(lambda: K.save(f"{folder}/missing/K.safetensors")),
        "other model": message(
            lambda: cl.KFAC.load(path, cl.Risk(whole_fsdp(seeded(Places())), CROSS, own))
        ),
        "factors": message(lambda: factored_damping(K, 0.1)),
        "corrected": message(K.eigen_corrected),
        "singular": message(lambda: zero.solve(columns(K.space), damping=0.0)),
        "mean": message(lambda: zero.solve(columns(K.space))),
        "logdet": message(lambda: zero.logdet(0.0)),
        "power": message(lambda: zero.power(-1.0)),
    }


class Largest(TorchDispatchMode):
    """Notes the most entries of all floating-point tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for item in tree_leaves(out):
            if isinstance(item, Tensor) and item.is_floating_point():
                self.entries = max(self.entries, item.numel())
        return out


@contextmanager
def sent(numbers: dict[str, int]) -> Iterator[None]:
    """Notes how many bytes whole tensors have that are gathered, cut or summed into slices."""
    plain = {name: getattr(Group, name) for name in ("joined", "own_sum", "joined_at", "shares")}

    def noting(name: str) -> Any:
        def noted(self: Group, tensor: Tensor, *rest: Any) -> Any:
            out = plain[name](self, tensor, *rest)
            own = rest[0] if name == "shares" else tensor
            times = 1 if name == "own_sum" else self.size
            numbers[name] = numbers.get(name, 0) + times * own.numel() * own.element_size()
            return out

        return noted

    for name in plain:
        setattr(Group, name, noting(name))
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(Group, name, function)


WIDTHS = [8, 9, 8, 7, 8, 9, 8, 5]


def deep(rank: int) -> cl.Risk:
    """Seven layers, each a unit, and two batches on each rank."""
    layers = [nn.Linear(a, b) for a, b in pairwise(WIDTHS)]
    model = seeded(nn.Sequential(*(nn.Sequential(layer, nn.Tanh()) for layer in layers)))
    for layer in model:
        fully_shard(layer, mesh=mesh())
    fully_shard(model, mesh=mesh())
    g = torch.Generator().manual_seed(rank)
    data = [(torch.randn(3, 8, generator=g, dtype=F64), torch.arange(3)) for _ in range(2)]
    return cl.Risk(model, CROSS, data)


def footprint(rank: int, size: int) -> dict[str, Any]:
    """The largest tensors that are made, what is held and sent, and how the model is left."""
    risk = deep(rank)
    before = _state(risk.model)
    fit: dict[str, int] = {}
    with Largest() as of_fit, sent(fit):
        K = cl.kfac(risk, fisher="mc", progress=False)
    V = columns(risk.space, 1)[:, 0]
    solve: dict[str, int] = {}
    with Largest() as of_products:
        with sent(solve):
            K.solve(V)
        K.diagonal()
        K.logdet()
    held = [t for b in K.blocks_of.values() for t in (b.left, b.right, b.eigenvalues)]
    after = _state(risk.model)
    gc.collect()
    left = [o for o in gc.get_objects() if type(o) is Tensor and tuple(o.shape) == (3, 9)]
    return {
        "activations": len(left),
        "largest": (of_fit.entries, of_products.entries),
        "held": sum(t.numel() for t in held),
        "total": risk.space.total,
        "rows": risk.space.size,
        "fit": fit,
        "solve": sum(solve.values()),
        "same": all(a == b for a, b in zip(before, after, strict=True)),
    }
