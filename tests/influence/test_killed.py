"""kill -9 of a scan for the top, and of one to disk: the same call goes on, with the same bits."""

from __future__ import annotations

import signal

import pytest
import torch

from tests.programs import Program

PROBLEM = """
import sys, time
import torch
from torch import nn
import curvlib as cl
from curvlib.influence.influence import Influence
from curvlib.influence.matrix import score_matrix

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
    inf = Influence(
        model, nn.CrossEntropyLoss(), batches, "kfac", forward=forward, progress=False
    )
    return inf, (x[:4] + 0.1, y[:4])

def top(inf, query, path):
    return inf.top(query, k=6, rank=2, checkpoint=path, save_every=0)

def matrix(inf, query, path):
    return score_matrix(inf, query, path, rank=2, shard=10, progress=False)
"""
RUN = """
inf, query = problem()
NAP = 0.05
{call}(inf, query, sys.argv[1])
"""


def killed(call, path, there):
    """Starts a program, and kills it as soon as something is there."""
    program = Program("-c", PROBLEM + RUN.format(call=call), path)
    program.until(there)
    assert program.stop(signal.SIGKILL).code == -signal.SIGKILL


@pytest.fixture(scope="module")
def program():
    found = {"__name__": "program"}
    exec(PROBLEM, found)
    return found


def test_a_killed_search_goes_on_bitwise(tmp_path, program):
    path = tmp_path / "scan.safetensors"
    killed("top", path, path.exists)
    inf, query = program["problem"]()
    told = []
    inf.progress = lambda *of: told.append(of)
    found = program["top"](inf, query, path)
    assert told[0][0] >= 2  # the first batch was not done again
    assert len(told) < 13
    inf, query = program["problem"]()
    whole = program["top"](inf, query, tmp_path / "other.safetensors")
    for name in ("indices", "scores", "bottom_indices", "bottom_scores", "mean", "sample"):
        assert torch.equal(getattr(found, name), getattr(whole, name)), name


def test_a_killed_matrix_goes_on_bitwise(tmp_path, program):
    folder = tmp_path / "scores"
    killed("matrix", folder, lambda: len(list(folder.glob("scores-*.npy"))) >= 2)
    inf, query = program["problem"]()
    assert program["matrix"](inf, query, folder).complete
    program["matrix"](inf, query, tmp_path / "whole")
    bits = [
        {path.name: path.read_bytes() for path in sorted(at.iterdir())}
        for at in (folder, tmp_path / "whole")
    ]
    assert bits[0] == bits[1]
