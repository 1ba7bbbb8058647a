"""Estimates that are killed at any moment end bitwise as if nothing had happened."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from curvlib.estimators.density import density
from curvlib.estimators.eigenpairs import eigenpairs
from tests.estimators.spectra import Counted, matrix, network_like
from tests.programs import Program

FUNCTIONS = {"eigenpairs": eigenpairs, "density": density}
#: Runs with restarts, a check and measurements; with deflation; of three vectors only.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "restarts": ("eigenpairs", {"k": 6, "basis": 12, "which": "BE", "tolerance": 1e-6}),
    "copies": ("eigenpairs", {"k": 5, "which": "LA", "tolerance": 1e-9, "seed": 3}),
    "blocks": ("eigenpairs", {"k": 4, "block": 3, "basis": 12}),
    "density": ("density", {"steps": 24, "probes": 2}),
    "three vectors": ("density", {"steps": 24, "probes": 3, "reorthogonalize": False}),
}


def problem(run: str) -> torch.Tensor:
    values = network_like(90)
    if run == "copies":
        values[-3:] = 10.0
    return matrix(values)


def _tensors(result: Any) -> list[torch.Tensor]:
    return [v for v in vars(result).values() if isinstance(v, torch.Tensor)]


def _assert_bitwise(a: Any, b: Any) -> None:
    assert a.products == b.products
    for x, y in zip(_tensors(a), _tensors(b), strict=True):
        assert torch.equal(x.nan_to_num(-1.0), y.nan_to_num(-1.0))


class StopError(Exception):
    pass


@pytest.mark.parametrize("run", RUNS)
def test_stopped_in_every_product(run: str, tmp_path: Path) -> None:
    """Every call makes one step and is stopped in the next product; at last one ends."""
    name, options = RUNS[run]
    A, path = problem(run), tmp_path / "c"
    function, counted = FUNCTIONS[name], Counted(A)
    straight = function(counted.op, **options)
    ended = None
    for _ in range(len(counted.columns)):
        last = Counted(A)
        last.stop_after, last.error = 1, StopError
        try:
            ended = function(last.op, **options, checkpoint=path, save_every=1e9)
        except StopError:
            continue
    assert ended is not None, "each call made one step"
    _assert_bitwise(ended, straight)
    idle = Counted(A)
    _assert_bitwise(function(idle.op, **options, checkpoint=path), straight)
    assert idle.columns == [], "a finished run returns at once"


SCRIPT = """
import os
from tests.estimators.spectra import Counted
from tests.estimators.test_resume import FUNCTIONS, RUNS, problem

name, options = RUNS[{run!r}]
counted = Counted(problem({run!r}))
left = [{blocks}]
product = counted.op._product

def killing(V):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), 9)
    return product(V)

counted.op._product = killing
FUNCTIONS[name](counted.op, **options, checkpoint={path!r}, save_every=0.0)
"""


@pytest.mark.parametrize(("run", "blocks"), [("restarts", 11), ("copies", 21), ("density", 13)])
def test_kill_9(run: str, blocks: int, tmp_path: Path) -> None:
    name, options = RUNS[run]
    path = tmp_path / "c"
    script = SCRIPT.format(run=run, blocks=blocks, path=str(path))
    ended = Program("-c", script).finish()
    assert ended.code == -signal.SIGKILL, ended.error
    counted, straight = Counted(problem(run)), Counted(problem(run))
    resumed = FUNCTIONS[name](counted.op, **options, checkpoint=path)
    _assert_bitwise(resumed, FUNCTIONS[name](straight.op, **options))
    assert len(counted.columns) == len(straight.columns) - blocks, "nothing was done twice"


def test_checkpoints_know_problem_and_settings(tmp_path: Path) -> None:
    A, path = problem("density"), tmp_path / "c"
    density(A, steps=5, checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="other settings: steps was 5 and is now 6"):
        density(A, steps=6, checkpoint=path)
    with pytest.raises(ValueError, match="other settings: seed was 0 and is now 1"):
        density(A, steps=5, seed=1, checkpoint=path)
    with pytest.raises(ValueError, match="is of another problem"):
        density(A + 1e-12, steps=5, checkpoint=path)
    with pytest.raises(ValueError, match="is of another estimate"):
        eigenpairs(A, 2, checkpoint=path)
    pairs = [eigenpairs(A, 3, seed=s) for s in (0, 1)]
    density(A, steps=5, deflate=pairs[0], checkpoint=tmp_path / "d")
    with pytest.raises(ValueError, match="is of another problem"):
        density(A, steps=5, deflate=pairs[1], checkpoint=tmp_path / "d")
    assert path.read_bytes() == before
    assert density(A, steps=5, width=0.1, points=64, checkpoint=path).grid.numel() == 64


def test_a_generator_continues_too(tmp_path: Path) -> None:
    """The run's own random state is in the checkpoint, wherever the first numbers came from."""
    A, path = problem("restarts"), tmp_path / "c"
    options: dict[str, Any] = {"k": 4, "tolerance": 1e-8}
    straight = eigenpairs(A, **options, generator=torch.Generator().manual_seed(8))
    stopped = Counted(A)
    stopped.stop_after, stopped.error = 9, StopError
    with pytest.raises(StopError):
        eigenpairs(
            stopped.op, **options, generator=torch.Generator().manual_seed(8), checkpoint=path
        )
    mine = torch.Generator().manual_seed(8)
    torch.rand(3, generator=mine)
    _assert_bitwise(eigenpairs(A, **options, generator=mine, checkpoint=path), straight)
