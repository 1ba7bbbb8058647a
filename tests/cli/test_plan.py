"""``curvlib plan``: what it prints, that it runs nothing, and what bad input is told."""

from __future__ import annotations

import pytest
import torch

from curvlib.cli import main
from curvlib.cli.common import target_risk
from curvlib.core.ranks.group import Group

TARGET = """
import torch
import curvlib as cl

def risk():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, generator=draw)
    return cl.Risk(model, torch.nn.CrossEntropyLoss(), (x, (x[:, 0] > 0).long()))

def stream():
    held = risk()
    class Batches:
        def __iter__(self):
            return iter([held.data])
    return cl.Risk(held.model, torch.nn.CrossEntropyLoss(), Batches())
"""


def plan(*arguments):
    return main(["plan", "mine.py:risk", *arguments])


def table(shown):
    """Rows of the table by phase, as words."""
    return {line.split()[0]: line.split() for line in shown.splitlines() if line.startswith("  ")}


@pytest.mark.parametrize(
    ("arguments", "phases"),
    [
        (["spectrum"], ["graphs", "eigenpairs", "density"]),
        (["spectrum", "--curvature", "ggn", "--k", "3"], ["graphs", "eigenpairs", "density"]),
        (["trace"], ["graphs", "diagonal"]),  # multiplied out: from the diagonal
        (["trace", "--tolerance", "0.1"], ["graphs", "trace"]),
        (["trace", "--method", "xtrace", "--products", "8"], ["graphs", "diagonal"]),
        (["diagonal", "--method", "hutchinson"], ["graphs", "diagonal"]),
        (["solve", "--columns", "3", "--method", "minres"], ["graphs", "solve"]),
        (["mfac", "--size", "5", "--rows", "bfloat16"], ["window", "row", "direction"]),
        (["kfac", "--fisher", "mc"], ["factors", "eigenvectors", "eigenvalues"]),
        (["kfac", "--curvature", "diagonal"], ["diagonal"]),
        (["influence", "--queries", "3", "--rank", "1"], ["factors", "queries", "scan"]),
    ],
)
def test_each_computation_has_a_table(place, capsys, arguments, phases):
    assert plan(*arguments) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("mine.py:risk: Risk(Sequential")
    assert set(phases) <= table(shown).keys()
    assert {"phase", "all"} <= table(shown).keys()
    assert "it fits" in shown
    assert not (place / "curvlib-out").exists()


def test_ranks_have_traffic(place, capsys):
    assert plan("spectrum", "--ranks", "2", "--k", "2") == 0
    shown = capsys.readouterr().out
    assert "Plan of each of 2 ranks (data parallel)" in shown
    assert "sends" in shown
    assert plan("spectrum", "--ranks", "2", "--sharded") == 0
    assert "Plan of each of 2 ranks (sharded)" in capsys.readouterr().out


def test_ranks_are_those_of_the_launcher(place, capsys, monkeypatch):
    """Each measures by itself: nothing is sent."""
    made = target_risk

    def in_a_group(args):
        risk = made(args)
        risk.group = Group(None, 0, 3, torch.device("cpu"))
        return risk

    monkeypatch.setattr("curvlib.cli.plan.target_risk", in_a_group)
    assert plan("spectrum") == 0
    assert "Plan of each of 3 ranks (data parallel)" in capsys.readouterr().out
    assert plan("kfac", "--ranks", "5") == 0
    assert "Plan of each of 5 ranks (data parallel)" in capsys.readouterr().out


def test_what_would_fit_is_said(place, capsys):
    assert plan("mfac", "--size", "1000", "--available", "5e6") == 0
    shown = capsys.readouterr().out
    assert "available on a rank: 5 MB; it does not fit by " in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("what would fit: ")]
    size = int(line.split("--size ")[1].split(",")[0])
    assert 500 < size < 1000
    assert plan("mfac", "--size", str(size), "--available", "5e6") == 0
    assert "it fits" in capsys.readouterr().out
    assert plan("mfac", "--size", str(size + 1), "--available", "5e6") == 0
    assert "does not fit" in capsys.readouterr().out
    assert plan("spectrum", "--available", "1.2e6") == 0
    assert " with " in capsys.readouterr().out  # several are lowered together
    assert plan("spectrum", "--available", "1") == 0
    assert "no setting makes it fit: take part of the parameters" in capsys.readouterr().out


def test_settings_reach_the_plan(place, capsys):
    sizes = {}
    for dtype in ("float32", "float64"):
        assert plan("mfac", "--size", "7", "--dtype", dtype, "--params", "0.*") == 0
        sizes[dtype] = table(capsys.readouterr().out)["window"][3:5]
    assert sizes == {"float32": ["840", "B"], "float64": ["1.29", "kB"]}  # 7 x 16, and 7 x 7
    found = []
    for size in ("5", "20"):
        assert plan("solve", "--batch-size", size) == 0
        found.append(table(capsys.readouterr().out)["all"])
    assert found[0] != found[1]


def test_data_of_unknown_length(place, capsys):
    assert main(["plan", "mine.py:stream", "spectrum"]) == 2
    assert "does not say how many examples it has" in capsys.readouterr().err
    assert main(["plan", "mine.py:stream", "spectrum", "--examples", "20"]) == 0


def test_bad_input(place, capsys):
    for arguments, told in (
        (["mine.py:risk", "speed"], "invalid choice: 'speed'"),
        (["mine.py:risk", "spectrum", "--ranks", "0"], "expected a positive whole number, got 0"),
        (["mine.py:risk", "spectrum", "--available", "-1"], "expected a positive number"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["plan", *arguments])
        assert stopped.value.code == 2
        assert told in capsys.readouterr().err
    assert main(["plan", "gone.py:risk", "spectrum"]) == 2
    assert "there is no file gone.py" in capsys.readouterr().err
