"""Work in Python grows with the number of layers, not with its square.

A model of a thousand layers spends seconds in a single loop over all pairs of them. What is counted
are lines of curvlib that run, which no other process disturbs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import curvlib as cl
from curvlib.influence.influence import Influence
from curvlib.operators.layers.factored import factored_layers

DATA = (torch.ones(4, 4), torch.tensor([0, 1, 2, 0]))
LOSS = nn.CrossEntropyLoss()
OWN = str(Path(cl.__file__).parent) + os.sep
FEW, MANY = 8, 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.maps = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x: Any) -> Any:
        return x + self.maps(self.norm(x))


def deep(blocks: int) -> nn.Module:
    return nn.Sequential(*(Block() for _ in range(blocks)), nn.Linear(4, 3)).double()


def lines(run: Callable[[], Any]) -> int:
    """Lines of curvlib that run; each turn of a loop counts, also of one that is a line."""
    count = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(OWN):
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return count


def uses(model: nn.Module, folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is done with a model, by turns: later ones need the earlier."""
    x, y = DATA[0].double(), DATA[1]
    risk = cl.Risk(model, LOSS, (x, y))
    risk.value()
    yield "risk", lambda: cl.Risk(model, LOSS, (x, y))
    yield "check", risk.check
    yield "product", lambda: cl.hessian(risk) @ risk.space.empty().fill_(1.0)
    yield "layers", lambda: factored_layers(risk, dense_norms=True, max_side=9)
    yield "fit", lambda: cl.kfac(risk, progress=False)
    K = cl.kfac(risk, progress=False)
    yield "solve", lambda: K.solve(risk.space.empty().fill_(1.0), 0.1)
    yield "save", lambda: K.save(folder / "k")
    yield "load", lambda: cl.KFAC.load(folder / "k", risk)
    yield "coverage", K.coverage
    inf = Influence.of(risk, K, progress=False)
    yield "scores", lambda: inf.scores((x, y))
    yield "self-scores", inf.self_scores
    yield "top", lambda: inf.top((x, y), k=2)
    yield (
        "prune",
        lambda: cl.prune(model, risk, 0.5, method="magnitude", layer_maximum=0.9, progress=False),
    )
    yield "gradients", lambda: list(cl.gradients(risk))
    every = {"factor_interval": 1, "inverse_interval": 1}
    layered: dict[str, Any] = {
        "KFAC": cl.optim.KFAC(model, lr=1e-3, damping=0.1, **every),
        "EKFAC": cl.optim.KFAC(model, lr=1e-3, damping=0.1, eigen_corrected=True, **every),
        "MKOR": cl.optim.MKOR(model, lr=1e-3, interval=1),
    }
    for name, made in layered.items():
        yield name, lambda made=made: made.step(lambda: LOSS(model(x), y))
        made.close()
    for name, options in (("AdaHessian", {}), ("Sophia", {"interval": 1}), ("MFAC", {})):
        made = getattr(cl.optim, name)(model.parameters(), lr=1e-3, **options)
        yield name, lambda made=made: made.step(lambda: LOSS(model(x), y))


def test_work_is_linear_in_the_layers(tmp_path: Path) -> None:
    found: dict[str, list[int]] = {}
    for blocks in (FEW, MANY):
        folder = tmp_path / str(blocks)
        folder.mkdir()
        for name, run in uses(deep(blocks), folder):
            run()  # what is made once does not count
            found.setdefault(name, []).append(lines(run))
    grown = {name: many / few for name, (few, many) in found.items()}
    limit = 1.1 * MANY / FEW
    assert {name: round(ratio, 2) for name, ratio in grown.items() if ratio > limit} == {}


def test_lines_are_counted() -> None:
    """A loop over pairs is noticed: the count of each turn of a comprehension, too."""
    risk = cl.Risk(deep(3), LOSS, (DATA[0].double(), DATA[1]))
    one = lines(lambda: risk.space.restrict([risk.space.names[0]]))
    every = lines(lambda: [risk.space.restrict([n]) for n in risk.space.names])
    assert every == pytest.approx(one * len(risk.space.names), rel=0.05)
    assert one > len(risk.space.names)
