"""Events that are stopped at any moment go on where they were, and end bitwise the same."""

from __future__ import annotations

import signal

import pytest
import torch

import curvlib as cl
from curvlib.pruning import Masks
from tests.programs import Program
from tests.pruning.events import draw, problem


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_stopped_event_goes_on_bitwise(tmp_path, at, first_order):
    settings = {
        "recompute": 6,
        "rows": 128,
        "block_size": 16,
        "first_order": first_order,
        "damping": 1.0,
    }
    model, risk = problem()
    expected = cl.prune(model, risk, 0.8, progress=False, **settings)
    path = tmp_path / "prune.safetensors"
    calls = []

    def progress(done, total, note):
        calls.append((done, total))
        if done == at:
            raise StoppedError

    with pytest.raises(StoppedError):
        cl.prune(
            model,
            risk,
            0.8,
            checkpoint=path,
            save_every=0,
            progress=progress,
            apply=True,
            **settings,
        )
    assert torch.equal(model[0].weight, problem()[0][0].weight)
    assert calls[-1] == (at, 6)
    assert path.exists() == (at > 1)
    again = []
    found = cl.prune(
        model,
        risk,
        0.8,
        checkpoint=path,
        save_every=0,
        progress=lambda *of: again.append(of),
        **settings,
    )
    assert len(again) == 6 - (at - 1)  # the round that was being reported is done again
    assert found.predicted == expected.predicted
    for name, weight in expected.weights.items():
        assert torch.equal(weight, found.weights[name])
        assert torch.equal(expected.keep[name], found.keep[name])
    third = cl.prune(model, risk, 0.8, checkpoint=path, progress=StoppedError, **settings)
    assert torch.equal(third.weights["0.weight"], expected.weights["0.weight"])


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    model, risk = problem()
    path = tmp_path / "prune.safetensors"
    settings = {
        "recompute": 2,
        "rows": 128,
        "block_size": 16,
        "checkpoint": path,
        "progress": False,
    }
    first = cl.prune(model, risk, 0.5, **settings)
    for change, text in (
        ({"sparsity": 0.6}, "sparsity was 0.5 and is now 0.6"),
        ({"update": "none"}, "update was 'joint' and is now 'none'"),
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"params": ["0.weight"]}, r"params was \['0.weight', '2.weight'\]"),
        ({"layer_maximum": 0.9}, "layer_maximum was None and is now 0.9"),
        ({"keep": Masks({"0.weight": draw(16, 8) > -1})}, "keep was '"),
        ({"scope": {"0.weight": 0.4}}, "scope was 'global' and is now"),
        ({"method": "obc"}, "of another estimate"),
    ):
        with pytest.raises(ValueError, match=text):
            cl.prune(model, risk, **({"sparsity": 0.5} | settings | change))
    with torch.no_grad():
        model[0].weight.add_(1e-3)
    with pytest.raises(ValueError, match="of another problem"):
        cl.prune(model, risk, 0.5, **settings)
    assert first.sparsity == 0.5


PROGRAM = """
import sys, time
import torch
import curvlib as cl
from tests.pruning.events import problem

model, risk = problem()
nap = float(sys.argv[2])
result = cl.prune(
    model, risk, 0.8, recompute=12, rows=128, block_size=16, checkpoint=sys.argv[1], save_every=0,
    progress=lambda *of: time.sleep(nap),
)
result.save(sys.argv[1] + ".result")
"""


def test_a_killed_event_goes_on_bitwise(tmp_path):
    model, risk = problem()
    expected = cl.prune(model, risk, 0.8, recompute=12, rows=128, block_size=16, progress=False)
    path = tmp_path / "prune.safetensors"
    program = Program("-c", PROGRAM, path, 0.3)
    program.until(path.exists)
    assert program.stop(signal.SIGKILL).code == -signal.SIGKILL
    rounds = []
    found = cl.prune(
        model,
        risk,
        0.8,
        recompute=12,
        rows=128,
        block_size=16,
        checkpoint=path,
        progress=lambda *of: rounds.append(of),
    )
    assert 0 < len(rounds) < 12
    for name, weight in expected.weights.items():
        assert torch.equal(weight, found.weights[name])
    assert found.predicted == expected.predicted
