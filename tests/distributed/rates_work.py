"""Learning rates and what they rest on, on ranks and in one process."""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import curvlib as cl
from curvlib.rates import (
    LanczosLearner,
    StabilityMonitor,
    batch_sharpness,
    batch_spectrum,
    example_curvature,
    gradient_moments,
    hessian_noise,
    max_learning_rate,
    measured_edges,
)
from tests.distributed.work import F64

COUNTS = (7, 3, 9, 1, 12)


def data() -> list[tuple[Tensor, Tensor]]:
    """Unequal batches of a regression and classification problem alike."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(sum(COUNTS), 4, generator=g, dtype=F64)
    y = (x @ torch.randn(4, 3, generator=g, dtype=F64)).argmax(1)
    return list(zip(x.split(COUNTS), y.split(COUNTS), strict=True))


def risk_of(rank: int, size: int) -> cl.Risk:
    """A small network, on shards of which one may be empty."""
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=F64))
    cuts = {1: [0, 5], 2: [0, 1, 5], 3: [0, 4, 4, 5]}[size]
    return cl.Risk(model, nn.CrossEntropyLoss(), data()[cuts[rank] : cuts[rank + 1]])


def plain(result: Any) -> dict[str, Tensor]:
    """The numbers of a result."""
    found = {f.name: getattr(result, f.name) for f in fields(result)}
    return {
        name: value.double() if isinstance(value, Tensor) else torch.tensor(float(value))
        for name, value in found.items()
        if isinstance(value, (Tensor, int, float))
    }


def results(rank: int, size: int) -> dict[str, dict[str, Tensor]]:
    risk = risk_of(rank, size)
    quiet: dict[str, Any] = {"progress": False, "seed": 3}
    adam = torch.optim.Adam(risk.model.parameters(), lr=1e-3)
    for p, g in zip(risk.params.values(), risk.space.split(risk.gradient()), strict=True):
        p.grad = g
    adam.step()
    every = example_curvature(risk, 3, tolerance=1e-6, **quiet)
    return {
        "moments": plain(gradient_moments(risk, block=4)),
        "noise": plain(hessian_noise(risk, 8, draws=4, **quiet)),
        "examples": plain(every),
        "some examples": plain(example_curvature(risk, 2, examples=20, kind="ggn", **quiet)),
        "preconditioned": plain(example_curvature(risk, 2, preconditioner=adam, **quiet)),
        "sharpness": plain(batch_sharpness(risk, 5, draws=3, curvature=every, **quiet)),
        "spectrum": plain(batch_spectrum(risk, 5, draws=2, steps=8, points=64, **quiet)),
        "rate": plain(max_learning_rate(risk, [1, 8, 32], curvature=every, **quiet)),
        "adam": plain(max_learning_rate(risk, [4], "adam", directions=2, **quiet)),
        "edges": plain(measured_edges(risk, [8, 32], steps=12, seeds=1, progress=False)),
        "adam's edges": plain(measured_edges(risk, [8], "adam", steps=8, seeds=1, progress=False)),
    }


def training(rank: int, size: int, folder: str) -> dict[str, Tensor]:
    """A run that is watched, and whose learning rate is set; one loss is bad on one rank alone."""
    risk = risk_of(rank, size)
    optimizer = torch.optim.SGD(risk.model.parameters(), lr=0.05, momentum=0.5)
    path = Path(folder) / f"table{size}.csv"
    monitor = StabilityMonitor(risk, optimizer, every=3, batch_size=8, draws=2, path=path, seed=1)
    learner = LanczosLearner(risk, optimizer, every=4, batch_size=8, ghost=16, steps=8, seed=2)
    readings = []
    for step in range(9):
        loss = float(risk.value())
        if step == 5 and rank == size - 1:
            loss = math.nan
        for p, g in zip(risk.params.values(), risk.space.split(risk.gradient()), strict=True):
            p.grad = g
        reading = learner.step(loss)
        if reading is not None:
            readings.append(reading)
        optimizer.step()
        monitor.step(float(risk.value()))
    assert readings[2].note.startswith("the loss rose to nan"), readings
    number = [f for f, v in asdict(readings[0]).items() if isinstance(v, (int, float))]
    table = monitor.history
    assert path.exists() or rank
    return {
        "readings": torch.tensor(
            [[float(getattr(r, name)) for name in number] for r in readings], dtype=F64
        ).nan_to_num(-1.0),
        "history": torch.stack([table[name].double() for name in HISTORY]),
        "weights": torch.cat([p.detach().flatten() for p in risk.model.parameters()]),
    }


HISTORY = ("loss", "lambda_max", "trace", "frobenius", "batch_sharpness", "noise_scale")


def resumed(rank: int, size: int, path: str) -> dict[str, dict[str, Tensor]]:
    """Continues, or begins, runs whose files are at a path."""
    risk = risk_of(rank, size)
    Path(path).mkdir(exist_ok=True)
    saved: dict[str, Any] = {"save_every": 0.0, "progress": False, "seed": 3}
    every = example_curvature(risk, 2, block=3, checkpoint=Path(path) / "examples", **saved)
    noise = hessian_noise(risk, 8, draws=4, checkpoint=Path(path) / "noise", **saved)
    return {"examples": plain(every), "noise": plain(noise)}


def interrupted(path: str) -> None:
    """Stops in the middle of the examples of :func:`resumed`."""

    def stop(done: float, total: float | None, note: str) -> None:
        if total == sum(COUNTS) and done >= 10:
            raise KeyboardInterrupt

    example_curvature(
        risk_of(0, 1),
        2,
        block=3,
        checkpoint=Path(path) / "examples",
        save_every=0.0,
        progress=stop,
        seed=3,
    )
