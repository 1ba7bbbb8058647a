"""K-FAC and influence of ranks: functions of ``(rank, size, ...)``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvlib as cl
from curvlib.operators.input_grams import input_grams
from tests.distributed.failures import message

F64 = torch.float64
CUTS = {1: [0, 5], 2: [0, 1, 5], 3: [0, 4, 4, 5]}  # with three ranks, the second has none


class Images(nn.Module):
    """A grouped convolution, a normalization, and a linear layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, groups=2)
        self.norm = nn.LayerNorm(4)
        self.twice = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x).tanh().mean((2, 3)))
        return self.head(self.twice(self.twice(h).tanh()))


class Words(nn.Module):
    """A tied embedding and head over sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        return self.head(self.mix(h.cumsum(1)).tanh())


def language_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="sum")


def seeded(model: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(3)
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=F64) * 0.5)
    return model


def images(seed: int = 1, sizes: tuple[int, ...] = (3, 5, 1, 4, 6)) -> list[Any]:
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, 2, 4, 4, generator=g, dtype=F64), torch.randint(3, (n,), generator=g))
        for n in sizes
    ]


def words(seed: int = 2, sizes: tuple[int, ...] = (3, 5, 1, 4, 6)) -> list[Any]:
    g = torch.Generator().manual_seed(seed)
    whole = [torch.randint(7, (n, 6), generator=g) for n in sizes]
    return [(t[:, :-1], t[:, 1:]) for t in whole]


def part(every: list[Any], rank: int, size: int) -> list[Any]:
    return every[CUTS[size][rank] : CUTS[size][rank + 1]]


def risks(rank: int, size: int) -> dict[str, cl.Risk]:
    own_images, own_words = part(images(), rank, size), part(words(), rank, size)
    return {
        "images": cl.Risk(seeded(Images()), nn.CrossEntropyLoss(), own_images),
        "words": cl.Risk(
            seeded(Words()),
            lambda o, t: F.cross_entropy(o.transpose(1, 2), t, reduction="sum"),
            own_words,
            reduction="sum",
        ),
    }


def fits(rank: int, size: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, risk in risks(rank, size).items():
        kinds: dict[str, dict[str, Any]] = {"empirical": {"fisher": "empirical"}}
        if name == "images":
            kinds |= {
                "type2": {},
                "mc": {"fisher": "mc", "samples": 2},
                "kfac": {"eigen_corrected": False},
                "reduce": {"sharing": "reduce", "rest": "diagonal", "params": None},
                "prefix": {"prefix": 3},
                "fraction": {"prefix": 0.7},
            }
        for kind, settings in kinds.items():
            K = cl.kfac(risk, **settings)
            found[f"{name} {kind}"] = K.to_dense()
            found[f"{name} {kind} solve"] = K.solve(torch.ones(K.shape[0], dtype=F64))
            found[f"{name} {kind} kfac"] = K.kronecker().to_dense()
    return found


def influences(rank: int, size: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    queries = {"images": images(seed=9, sizes=(2, 1)), "words": words(seed=9, sizes=(2, 1))}
    for name, risk in risks(rank, size).items():
        kind = {"fisher": "empirical"} if name == "words" else {}
        inf = cl.influence.Influence.of(risk, cl.kfac(risk, **kind), unit="nats", progress=False)
        asked = queries[name]
        scores = inf.scores(asked, per_layer=True)
        found[f"{name} scores"] = scores.scores
        found[f"{name} layers"] = scores.per_layer
        found[f"{name} self"] = inf.self_scores().scores
        plain = cl.influence.Influence.of(risk, cl.kfac(risk, **kind), progress=False)
        found[f"{name} relative"] = plain.scores(asked, normalize="self").scores
        found[f"{name} cosine"] = plain.scores(asked, normalize="gradient").scores
        for kind_of, settings in {
            "plain": {},
            "compressed": {"rank": 2},
            "chosen": {"chosen": [0, 3, 4, 9, 12, 17, 18]},
        }.items():
            top = inf.top(asked, k=4, bottom=3, **settings)
            for part_of in (
                "indices",
                "scores",
                "per_layer",
                "per_token",
                "token_counts",
                "bottom_indices",
                "bottom_scores",
                "bottom_per_layer",
                "mean",
                "std",
                "sample",
                "sample_keys",
            ):
                found[f"{name} {kind_of} {part_of}"] = getattr(top, part_of)
            found[f"{name} {kind_of} examples"] = torch.tensor(top.examples)
    return found


class Stopping:
    """A forward pass that fails on one rank after some batches."""

    def __init__(self, after: int | None) -> None:
        self.left = after
        self.calls = 0

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        self.calls += 1
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise LookupError("the disk with the images is gone")
        return model(batch[0])


def resumed(rank: int, size: int, folder: str, what: str, after: int | None) -> dict[str, Any]:
    """A fit or a scan with checkpoints, which fails on the last rank, or goes to its end."""
    forward = Stopping(after if rank == size - 1 else None)
    risk = cl.Risk(
        seeded(Images()), nn.CrossEntropyLoss(), part(images(), rank, size), forward=forward
    )
    path = f"{folder}/{what}.ckpt"

    def value() -> Tensor:
        if what == "fit":
            return cl.kfac(risk, checkpoint=path, save_every=0.0, progress=False).to_dense()
        inf = cl.influence.Influence.of(risk, "identity", progress=False)
        top = inf.top(images(seed=9, sizes=(2,)), k=4, checkpoint=path, save_every=0.0)
        return torch.cat([top.indices.double(), top.scores], 1)

    found: dict[str, Any] = {}
    try:
        found["value"] = value()
    except (LookupError, RuntimeError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    return found | {"calls": forward.calls}


def refused(rank: int, size: int, folder: str) -> dict[str, str]:
    risk = risks(rank, size)["images"]
    inf = cl.influence.Influence.of(risk, "identity", progress=False)
    one = images(sizes=(1,))
    return {
        "matrix": message(lambda: cl.influence.score_matrix(inf, one, folder)),
        "proximal": message(
            lambda: cl.influence.proximal_response(risk, [0], risk.alone(), damping=0.1)
        ),
    }


def grams(rank: int, size: int) -> dict[str, Tensor]:
    found = input_grams(risks(rank, size)["images"])
    out = {
        f"{name} {part}": getattr(g, part) for name, g in found.items() for part in ("gram", "mean")
    }
    return out | {f"{name} count": torch.tensor(g.count) for name, g in found.items()}
