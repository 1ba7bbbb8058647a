"""Four small tasks for optimizers, and how one run of one optimizer on one of them goes.

``digits``
    A ConvNet of 23,000 parameters on scikit-learn's digits, cross-entropy.
``autoencoder``
    64-128-64-32-8-32-64-128-64 with tanh on the same images, mean squared error, batches of 1,024:
    deep, narrow in the middle and ill-conditioned.
``characters``
    A transformer of two blocks that reads 32 characters: of tinyshakespeare where a folder with
    it is given, else of Python's standard library.
``hedging``
    An LSTM that hedges a call on Heston paths (that of ``examples/kfac_lstm_hedging.py``).

Losses of ``digits`` are those of 512 training images, of ``autoencoder`` those of all; the other
two are held out (there, each example is seen about once). The first parameters and the batches
depend on the seed alone.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """What is trained, and for how long.

    Attributes:
        data: What it is trained on, in words.
        model: Makes a model; the global generator is seeded meanwhile.
        draw: A batch.
        loss: Of outputs and targets.
        judged: What the reported loss is of: inputs and targets.
        steps: Of each run.
        every: Steps from one evaluation to the next.
        likelihood: The loss as a module, if it is a negative log-likelihood.
    """

    name: str
    data: str
    model: Callable[[], nn.Module]
    draw: Callable[[torch.Generator], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    judged: Batch
    steps: int
    every: int
    likelihood: nn.Module | None = None


# ------------------------------------------------------------------------------ tasks
def digits_images() -> Batch:
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.from_numpy(found.images).float() / 16.0, torch.from_numpy(found.target).long()


def drawn(x: Tensor, y: Tensor, size: int) -> Callable[[torch.Generator], Batch]:
    def draw(generator: torch.Generator) -> Batch:
        chosen = torch.randint(len(x), (size,), generator=generator)
        return x[chosen], y[chosen]

    return draw


def digits_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 64),
        nn.GELU(),
        nn.Linear(64, 10),
    )


def digits(_: Path | None) -> Task:
    x, y = digits_images()
    x = x[:, None]
    loss = nn.CrossEntropyLoss()
    return Task(
        "digits",
        "digits",
        digits_network,
        drawn(x, y, 64),
        loss,
        (x[:512], y[:512]),
        200,
        5,
        likelihood=loss,
    )


def autoencoder_network() -> nn.Module:
    layers: list[nn.Module] = []
    sizes = (64, 128, 64, 32, 8, 32, 64, 128, 64)
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def autoencoder(_: Path | None) -> Task:
    x = digits_images()[0].flatten(1)
    loss = nn.MSELoss()
    return Task(
        "autoencoder",
        "digits",
        autoencoder_network,
        drawn(x, x, 1024),
        loss,
        (x, x),
        400,
        5,
        likelihood=loss,
    )


def text(folder: Path | None) -> tuple[str, str]:
    """The name of a text, and the text."""
    if folder is not None and (folder / "tinyshakespeare.txt").exists():
        return "tinyshakespeare", (folder / "tinyshakespeare.txt").read_text(encoding="utf-8")
    import argparse
    import inspect
    import tarfile
    import typing

    sources = [inspect.getsource(module) for module in (argparse, tarfile, typing, inspect)]
    return "standard library", "".join(c for c in "".join(sources) if c.isascii())


def characters(folder: Path | None) -> Task:
    length = 32
    name, found = text(folder)
    letters = sorted(set(found))
    codes = torch.tensor([letters.index(c) for c in found[:200_000]])
    held, train = codes[:2048], codes[2048:]
    loss = nn.CrossEntropyLoss()

    def cut(source: Tensor, starts: Tensor) -> Batch:
        tokens = source[starts[:, None] + torch.arange(length + 1)]
        return tokens[:, :-1], tokens[:, 1:].flatten()

    def draw(generator: torch.Generator) -> Batch:
        return cut(train, torch.randint(len(train) - length, (16,), generator=generator))

    return Task(
        "characters",
        name,
        lambda: common.GPT(len(letters), length, width=48, heads=4, depth=2),
        draw,
        loss,
        cut(held, torch.arange(0, len(held) - length, length)),
        200,
        5,
        likelihood=loss,
    )


def example(name: str) -> Any:
    """The definitions of a script in ``examples/``."""
    path = Path(__file__).parents[1] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hedge(_: Path | None) -> Task:
    hedging = example("kfac_lstm_hedging")
    generator = torch.Generator().manual_seed(0)
    paths, other = hedging.heston(8192, generator), hedging.heston(2048, generator)
    return Task(
        "hedging",
        "Heston paths",
        hedging.Hedge,
        drawn(hedging.features(*paths), paths[0], 256),
        lambda shares, prices: hedging.risk(hedging.profit(shares, prices)),
        (hedging.features(*other), other[0]),
        150,
        5,
    )


TASKS: dict[str, Callable[[Path | None], Task]] = {
    "digits": digits,
    "autoencoder": autoencoder,
    "characters": characters,
    "hedging": hedge,
}


# ------------------------------------------------------------------------------- runs
@dataclass(frozen=True)
class Run:
    """Losses every few steps, from the start on, and the time of training until then.

    Attributes:
        seconds: On the wall.
        work: Seconds of the processor, which other processes disturb less.
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    work: list[float] = field(default_factory=list)

    @property
    def final(self) -> float:
        """Mean of the last three losses; infinite for a run that went astray."""
        last = sum(self.losses[-3:]) / 3.0
        return last if math.isfinite(last) else math.inf

    def reached(self, goal: float) -> int | None:
        """Which evaluation found the goal reached first."""
        return next((i for i, loss in enumerate(self.losses) if loss <= goal), None)


def train(task: Task, build: Callable[[nn.Module], torch.optim.Optimizer], seed: int) -> Run:
    """One run. An optimizer of curvlib gets the loss, any other a gradient."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = task.model()
    opt, order = build(model), torch.Generator().manual_seed(seed)
    backward: Any = getattr(opt, "backward", Tensor.backward)
    run, seconds, work = Run(), 0.0, 0.0
    for step in range(task.steps + 1):
        if step % task.every == 0:
            with torch.no_grad():
                run.losses.append(float(task.loss(model(task.judged[0]), task.judged[1])))
            run.seconds.append(seconds)
            run.work.append(work)
            if not math.isfinite(run.losses[-1]):
                return run
        x, y = task.draw(order)
        start, begun = time.perf_counter(), time.process_time()
        opt.zero_grad()
        backward(task.loss(model(x), y))
        opt.step()
        seconds += time.perf_counter() - start
        work += time.process_time() - begun
    return run


def attention() -> Any:
    """The attention kernel that has second derivatives, for all optimizers alike."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)
