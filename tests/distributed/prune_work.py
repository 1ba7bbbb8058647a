"""Pruning, on ranks and in one process: functions of ``(rank, size, ...)``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import curvlib as cl
from curvlib.pruning import compare, gradual
from curvlib.pruning.importance import layer_importance
from tests.distributed.rates_work import data
from tests.distributed.work import F64

#: Settings of events: methods with gradients, values, Hessian products or layers' inputs.
EVENTS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "diagonal": {"method": "diagonal"},
    "hutchinson": {"method": "hutchinson"},
    "mfac": {"method": "mfac", "recompute": 3, "rows": 20, "block_size": 8, "damping": 1e-3},
    "obs": {"method": "obs", "recompute": 3, "block_size": 8, "rows": 50},
    "obs, wide": {"method": "obs", "recompute": 2, "block_size": 40, "rows": 30},
    "obs, auto": {"method": "obs", "recompute": 1, "block_size": 8, "rows": 30, "damping": "auto"},
    "first order": {"method": "obs", "recompute": 2, "block_size": 8, "first_order": True},
    "flops": {"method": "obs", "recompute": 2, "block_size": 8, "scope": "flops", "rows": 40},
    "wanda": {"method": "wanda"},
    "sparsegpt": {"method": "sparsegpt"},
    "obc": {"method": "obc"},
    "importance": {"method": "magnitude", "scope": "importance"},
    "2:4": {"method": "obs", "recompute": 1, "block_size": 8, "pattern": "2:4", "rows": 40},
}


def model_of() -> nn.Module:
    g = torch.Generator().manual_seed(4)
    model = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=g, dtype=F64))
    return model


def risk_of(rank: int, size: int) -> cl.Risk:
    cuts = {1: [0, 5], 2: [0, 1, 5], 3: [0, 4, 4, 5]}[size]
    return cl.Risk(model_of(), nn.CrossEntropyLoss(), data()[cuts[rank] : cuts[rank + 1]])


def flat(found: cl.PruneResult) -> dict[str, Tensor]:
    keep = torch.cat([found.keep[name].flatten() for name in sorted(found.keep)])
    weights = torch.cat([found.weights[name].flatten() for name in sorted(found.weights)])
    losses = torch.tensor([found.before, found.after, found.predicted], dtype=F64)
    return {"keep": keep.double(), "weights": weights, "losses": losses.nan_to_num()}


def events(rank: int, size: int, folder: str) -> dict[str, dict[str, Tensor]]:
    risk = risk_of(rank, size)
    out = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few rows for the size of the blocks
        for name, settings in EVENTS.items():
            found = cl.prune(risk.model, risk, 0.6, progress=False, seed=2, **settings)
            out[name] = flat(found)
        path = Path(folder) / f"event{size}"
        for _ in range(2):  # the second one finds all done
            again = cl.prune(
                risk.model, risk, 0.6, checkpoint=path, seed=2, progress=False, **EVENTS["obs"]
            )
        assert path.exists()
        assert torch.equal(flat(again)["weights"], out["obs"]["weights"])
        steps = list(gradual(risk.model, risk, [0.3, 0.5], method="diagonal", progress=False))
        cl.pruning.detach(risk.model)
        curves = compare(
            risk_of(rank, size).model,
            risk_of(rank, size),
            [0.3],
            ["magnitude", "diagonal"],
            progress=False,
        )
    out["gradual"] = flat(steps[-1])
    out["compare"] = {"losses": curves.losses}
    out["importances"] = {"value": layer_importance(risk_of(rank, size)).value}
    return out
