"""Fits that are killed, and disks that fill up: the same call goes on, with the same bits."""

from __future__ import annotations

import contextlib
import errno
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from curvlib.influence.influence import Influence
from curvlib.operators.kfac import KFAC, kfac
from tests.operators.factored import PROBLEMS, problem
from tests.programs import Program

PROBLEM = """
import sys, time
import torch
from torch import nn
import curvlib as cl
from curvlib.operators.kfac import kfac

NAP = 0.0

def forward(model, batch):
    time.sleep(NAP)
    return model(batch[0])

def problem():
    draw = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=draw))
    x = torch.randn(60, 6, generator=draw)
    y = torch.randint(3, (60,), generator=draw)
    batches = [(x[i : i + 5], y[i : i + 5]) for i in range(0, 60, 5)]
    return cl.Risk(model, nn.CrossEntropyLoss(), batches, forward=forward)

def fit(risk, path, **options):
    return kfac(risk, fisher="mc", checkpoint=path, save_every=0, **options)
"""
RUN = """
NAP = 0.03
fit(problem(), sys.argv[1], progress=lambda done, *_: print(done, flush=True), {options})
"""


def killed(options: str, path: Path, after: float) -> None:
    """Kills a fit as soon as it has said that this much is done."""
    program = Program("-c", PROBLEM + RUN.format(options=options), path)
    for line in program.stdout:
        if float(line) >= after and path.exists():
            break
    assert program.stop(signal.SIGKILL).code == -signal.SIGKILL


@pytest.mark.parametrize(("options", "after"), [("", 17), ("prefix=4", 2)])
def test_a_killed_fit_goes_on_bitwise(options: str, after: float, tmp_path: Path) -> None:
    """In the pass for factors and in that for eigenvalues."""
    program: dict[str, Any] = {"__name__": "program"}
    exec(PROBLEM, program)
    settings = eval(f"dict({options})")
    path = tmp_path / "fit"
    killed(options, path, after)
    told: list[float] = []
    K = program["fit"](
        program["problem"](), path, progress=lambda done, *_: told.append(done), **settings
    )
    assert told[0] >= after  # what was done was not done again
    whole = program["fit"](program["problem"](), tmp_path / "whole", **settings)
    assert torch.equal(K.to_dense(), whole.to_dense())
    assert torch.equal(K.kronecker().to_dense(), whole.kronecker().to_dense())


@contextlib.contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Files may have so many bytes: the system refuses more, as a full disk does."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


FULL = r"cannot write .* it needs \d+ bytes, and \d+ are free; make room .what was at this place"


def test_a_disk_that_fills_up_keeps_the_last_file(tmp_path: Path) -> None:
    K = kfac(problem("mlp"))
    path = K.save(tmp_path / "k")
    before = path.read_bytes()
    with small_disk(1000), pytest.raises(OSError, match=FULL) as told:
        kfac(problem("language model")).save(path)
    assert told.value.errno == errno.EFBIG
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["k"]
    assert torch.equal(KFAC.load(path).to_dense(), K.to_dense())


@pytest.mark.parametrize("size", [500, 3800])
def test_a_disk_that_fills_up_while_fitting(size: int, tmp_path: Path) -> None:
    """At once, or when the eigenvectors come: the fit goes on, and so does one that is stopped."""
    risk = problem("tied, masked")
    whole = kfac(risk, checkpoint=tmp_path / "whole", save_every=0)
    path, calls = tmp_path / "k", 0

    def hook(*of: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt

    handle = risk.model.head.register_forward_hook(hook)
    with (
        small_disk(size),
        pytest.warns(RuntimeWarning, match=FULL),
        pytest.raises(KeyboardInterrupt),
    ):
        kfac(risk, checkpoint=path, save_every=0)
    handle.remove()
    assert path.exists() == (size > 500)
    found = kfac(risk, checkpoint=path, save_every=0)
    assert torch.equal(found.to_dense(), whole.to_dense())
    with small_disk(size), pytest.warns(RuntimeWarning, match=FULL):
        found = kfac(risk, checkpoint=tmp_path / "other", save_every=0)
    assert torch.equal(found.to_dense(), whole.to_dense())


def test_a_disk_that_fills_up_while_scanning(tmp_path: Path) -> None:
    x, y = PROBLEMS["mlp"][2]
    risk = problem("mlp").on(list(zip(x.split(1), y.split(1), strict=True)))
    inf = Influence.of(risk, "identity", progress=False)
    expected = inf.top((x, y), k=6)
    with small_disk(300), pytest.warns(RuntimeWarning, match=FULL):
        found = inf.top((x, y), k=6, checkpoint=tmp_path / "scan", save_every=0)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.scores, expected.scores)
    saved = found.save(tmp_path / "top").read_bytes()
    with small_disk(300), pytest.raises(OSError, match=FULL):
        found.save(tmp_path / "top")
    assert (tmp_path / "top").read_bytes() == saved
