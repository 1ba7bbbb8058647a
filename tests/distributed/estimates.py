"""Estimates of the ranks' operators: functions of ``(rank, size, ...)``."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch

import curvlib as cl
from tests.distributed.work import batches, net, the_risk, uneven, vectors


def estimates(rank: int, size: int) -> dict[str, Any]:
    risk = the_risk(rank, size)
    H, G = cl.hessian(risk), cl.ggn(risk)
    b = vectors(risk)
    top = cl.eigenpairs(H, k=3, seed=0)
    spectrum = cl.density(H, steps=12, probes=2, seed=1)
    joint = cl.estimate(H, of=["trace", "frobenius"], probes=6, seed=2)
    found = {
        "eigenvalues": top.values,
        "residuals are small": torch.tensor(float(top.residuals.max()) < 1e-6),
        "projector": top.vectors @ top.vectors.mT,
        "nodes": spectrum.nodes,
        "cg": cl.solve(G, b, damping=0.1, tolerance=1e-13).value,
        "minres": cl.solve(H, b[:, 0], damping=0.5, method="minres", tolerance=1e-13).value,
        "low rank": cl.low_rank(G, 6, seed=3).values,
        "logdet": torch.tensor(cl.logdet(G, damping=0.1, probes=3, steps=20, seed=4).value),
        "frobenius": torch.tensor(cl.frobenius_norm(H, max_products=24, seed=5).value),
        "spectral": torch.tensor(float(cl.spectral_norm(H - G, seed=6).value)),
        "joint": torch.tensor([joint.trace, joint.frobenius]),
        "scale": torch.tensor(float(cl.directional_sharpness(H, risk.gradient()).value)),
    }
    for method in ("hutchinson", "hutch++", "xtrace"):
        found[method] = torch.tensor(cl.trace(H, method=method, max_products=18, seed=7).value)
    for method in ("hutchinson", "xdiag"):
        found[f"diagonal {method}"] = cl.diagonal(H, method=method, max_products=18, seed=8).value
    return found


def checks(rank: int, size: int) -> dict[str, Any]:
    """What ``risk.check()`` finds on the ranks: dropout, on all of them."""
    model = torch.nn.Sequential(net(), torch.nn.Dropout(0.5)).train()
    quiet = the_risk(rank, size).check()
    found = cl.Risk(model, torch.nn.CrossEntropyLoss(), uneven(rank, size)).check()
    return {"quiet": quiet.ok, "kinds": [f.kind for f in found.findings], "text": str(found)}


class Interrupting:
    """A forward pass that sends Ctrl-C to its own process, once, on one rank."""

    def __init__(self, after: int | None) -> None:
        self.left = after

    def __call__(self, model: Any, batch: Any) -> Any:
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGINT)
        return model(batch[0])


def resumed(rank: int, size: int, folder: str, stop: bool, passes: str = "") -> dict[str, Any]:
    """A density that is interrupted on the last rank, or continued, and how many passes it took."""
    forward = Interrupting(8 if stop and rank == size - 1 else None)
    count = 0

    def counted(model: Any, batch: Any) -> Any:
        nonlocal count
        count += 1
        return forward(model, batch)

    risk = cl.Risk(net(), torch.nn.CrossEntropyLoss(), uneven(rank, size), forward=counted)
    path = Path(folder) / "density.ckpt"
    H = cl.hessian(risk, memory=0)  # a forward pass for each product
    try:
        found = cl.density(H, steps=12, probes=2, seed=1, checkpoint=path, save_every=1e9)
    except KeyboardInterrupt as error:
        return {"stopped": str(error), "passes": count}
    return {"nodes": found.nodes, "weights": found.weights, "passes": count}


def told(rank: int, size: int) -> list[Any]:
    """Progress is told on the first rank only."""
    seen: list[Any] = []
    H = cl.hessian(the_risk(rank, size))
    cl.trace(H, max_products=4, method="hutchinson", progress=lambda *args: seen.append(args))
    return seen


def as_one(rank: int, size: int) -> torch.Tensor:
    """Each rank alone, on all data."""
    risk = cl.Risk(net(), torch.nn.CrossEntropyLoss(), batches(), group=False)
    return cl.hessian(risk) @ vectors(risk)
