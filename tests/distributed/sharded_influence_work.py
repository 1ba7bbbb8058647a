"""Influence on models with sharded parameters: functions of ``(rank, size, ...)``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import curvlib as cl
from curvlib.influence.influence import Influence
from tests.distributed.factored_work import Images, images, part, seeded, words
from tests.distributed.failures import message
from tests.distributed.sharded_factors_work import (
    CROSS,
    Awkward,
    a_risk,
    last_axes,
    lengths,
    units_fsdp,
    whole_fsdp,
)

PARTS = (
    "indices",
    "scores",
    "per_layer",
    "per_token",
    "token_counts",
    "bottom_indices",
    "bottom_scores",
    "mean",
    "std",
    "sample",
)


def influences(rank: int, size: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, shard, settings in (
        ("images", units_fsdp, {}),
        ("words", last_axes, {"fisher": "empirical"}),
    ):
        risk = a_risk(rank, size, name, shard)
        asked = {"images": images, "words": words}[name](seed=9, sizes=(2, 1))
        inf = Influence.of(risk, cl.kfac(risk, **settings), unit="nats", progress=False)
        top = inf.top(asked, k=4, bottom=3)
        found |= {f"{name} {key}": getattr(top, key) for key in PARTS}
        if name == "images":
            scores = inf.damped(0.3).scores(asked, query_reduction="mean", per_layer=True)
            found |= {"reduced": scores.scores, "layers": scores.per_layer}
            plain = Influence.of(risk, "identity", progress=False)
            found["cosine"] = plain.scores(asked, normalize="gradient").scores
            some = plain.top(
                asked,
                k=2,
                chosen=[0, 3, 4, 9, 12, 17, 18],
                normalize="self",
                per_token=False,
                per_layer=False,
            )
            found |= {"chosen": some.indices, "relative": some.scores}
    found["awkward"], found["awkward self"] = _awkward(rank, size)
    return found


def _awkward(rank: int, size: int) -> tuple[Tensor, Tensor]:
    """Gates, attention, and a parameter in no layer, by the fit that influence makes itself."""
    cuts = {1: [0, 3], 2: [0, 1, 3], 3: [0, 2, 2, 3]}[size]
    model = seeded(Awkward())
    model = model if size == 1 else whole_fsdp(model)
    inf = Influence(model, CROSS, lengths()[cuts[rank] : cuts[rank + 1]], progress=False)
    return inf.scores(lengths()[:1]).scores, inf.self_scores().scores


def refusals(rank: int, size: int) -> dict[str, str]:
    risk = a_risk(rank, size, "images", whole_fsdp)
    inf = Influence.of(risk, "identity", progress=False)
    asked = images(seed=9, sizes=(1,))
    own = part(images(), rank, size)
    bad = [(x.clone(), y) for x, y in own]
    if rank == size - 1:
        bad[-1][0][0] = float("nan")
    windows = Influence.of(risk, cl.hessian(risk), damping=1.0, relative=False, progress=False)
    return {
        "compressed": message(lambda: inf.scores(asked, rank=2)),
        "curvature": message(lambda: windows.scores(asked)),
        "diagonal": message(lambda: Influence.of(risk, "diagonal", progress=False)),
        "not finite": message(lambda: inf.scores(asked, train=bad)),
        "matrix": message(lambda: cl.influence.score_matrix(inf, asked, "matrix")),
    }


def alone(rank: int, size: int) -> dict[str, Any]:
    """Parameters that are sharded over one process."""
    whole = cl.kfac(a_risk(0, 1, "images", None))
    risk = cl.Risk(whole_fsdp(seeded(Images())), CROSS, images())
    K = cl.kfac(risk)
    return {
        "places": len(risk.places),
        "same": torch.equal(K.to_dense(), whole.to_dense()),
        "influence": message(lambda: Influence.of(risk, K)),
    }


def checked(rank: int, size: int, path: str) -> dict[str, Any]:
    """A scan with a checkpoint, which is there at once when it is asked for again."""
    risk = a_risk(rank, size, "images", whole_fsdp)
    inf = Influence.of(risk, "identity", progress=False)
    top = inf.top(images(seed=9, sizes=(2,)), k=4, checkpoint=path, per_token=False)
    return {"scores": top.scores, "indices": top.indices}
