"""``curvlib trace`` and ``curvlib diagonal``: numbers, files, bad input, and resumed runs."""

from __future__ import annotations

import json
import re
import signal
import sys

import pytest
import torch
from torch import nn

import curvlib as cl
from curvlib.cli import main
from curvlib.core.result import Result
from tests.programs import Program

COMMANDS = ("trace", "diagonal")
TARGET = """
import os, time
import torch
import curvlib as cl

class Slow(torch.nn.Linear):
    def forward(self, x):
        time.sleep(float(os.environ.get("NAP", "0")))
        return super().forward(x)

class Again:
    '''Read anew at every pass, so that products take their time.'''
    def __init__(self, batches):
        self.batches = batches
    def __iter__(self):
        return iter(self.batches)
    def __len__(self):
        return len(self.batches)

def make(data):
    torch.manual_seed(0)
    model = torch.nn.Sequential(Slow(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, generator=draw)
    return cl.Risk(model, torch.nn.CrossEntropyLoss(), data(x, (x[:, 0] > 0).long()))

def risk():
    return make(lambda x, y: (x, y))

def slow():
    return make(lambda x, y: Again(list(zip(x.split(10), y.split(10)))))

def nan():
    model = torch.nn.Linear(2, 1)
    return cl.Risk(model, torch.nn.MSELoss(), (torch.eye(2) * torch.nan, torch.ones(2, 1)))
"""
PARAMETERS = {"0": 16, "2": 10}


def numbers(folder, command):
    return json.loads((folder / f"{command}.json").read_text())


def dense(kind=cl.hessian):
    """The target's matrix in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).double()
    return kind(cl.Risk(model, nn.CrossEntropyLoss(), (x, (x[:, 0] > 0).long()))).to_dense()


def parts(A):
    return {"0": A.diagonal()[:16], "2": A.diagonal()[16:]}


# ----------------------------------------------------------------------- numbers
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_traces_are_those_of_the_matrix(place, capsys, curvature, rng_untouched):
    arguments = ["mine.py:risk", "--products", "400", "--curvature", curvature, "--out", "out"]
    assert main(["trace", *arguments, "--method", "hutchinson"]) == 0
    A = dense(getattr(cl, curvature))
    found = numbers(place / "out", "trace")
    for row, (layer, own) in zip(found["layers"], parts(A).items(), strict=True):
        assert row["layer"] == layer
        assert row["parameters"] == PARAMETERS[layer]
        assert abs(row["trace"] - float(own.sum())) < 5 * row["stderr"]
        assert row["mean_diagonal"] == pytest.approx(row["trace"] / row["parameters"])
    assert sum(row["trace"] for row in found["layers"]) == pytest.approx(found["trace"])
    assert sum(row["share"] for row in found["layers"]) == pytest.approx(1.0)
    assert abs(found["trace"] - float(A.trace())) < 5 * found["stderr"]
    assert found["interval"][0] < found["trace"] < found["interval"][1]
    assert abs(found["frobenius_norm"] - float(A.norm())) < 5 * found["frobenius_norm_stderr"]
    assert found["products"] == 400
    assert found["method"] == "hutchinson"
    shown = capsys.readouterr().out
    assert re.search(r"layer +parameters +trace +± error +share +mean diagonal", shown)
    assert f"{found['layers'][0]['trace']:.6g}" in shown
    assert re.search(r"trace: +\d.* ± \d.*\(95 %: \S+ to \S+\)", shown)
    assert re.search(r"Frobenius norm: +\d.* ± \d", shown)
    assert re.search(r"wall time: +\d+\.\d s", shown)


@pytest.mark.parametrize(("method", "curvature"), [("xtrace", "hessian"), ("xnystrace", "ggn")])
def test_sketched_traces(place, method, curvature):
    """The default where the budget is smaller than the operator."""
    arguments = ["mine.py:risk", "--products", "20", "--curvature", curvature, "--out", "out"]
    assert main(["trace", *arguments]) == 0
    A = dense(getattr(cl, curvature))
    found = numbers(place / "out", "trace")
    assert found["method"] == method
    assert found["products"] == 20
    for row, own in zip(found["layers"], parts(A).values(), strict=True):
        assert abs(row["trace"] - float(own.sum())) < 6 * row["stderr"] + 1e-5
    assert sum(row["trace"] for row in found["layers"]) == pytest.approx(found["trace"])
    assert abs(found["trace"] - float(A.trace())) < 6 * found["stderr"] + 1e-5
    assert found["interval"][0] <= found["trace"] <= found["interval"][1]


def test_few_products_are_independent_probes(place):
    assert main(["trace", "mine.py:risk", "--products", "6", "--out", "out"]) == 0
    assert numbers(place / "out", "trace")["method"] == "hutchinson"


@pytest.mark.parametrize("method", ["hutchinson", "xdiag"])
def test_diagonals_are_those_of_the_matrix(place, capsys, method, rng_untouched):
    arguments = ["mine.py:risk", "--products", "20", "--method", method, "--out", "out"]
    assert main(["diagonal", *arguments]) == 0
    A = dense()
    found = numbers(place / "out", "diagonal")
    saved = Result.load(place / "out" / "diagonal.safetensors")
    for row, (layer, own) in zip(found["layers"], parts(A).items(), strict=True):
        assert row["layer"] == layer
        assert abs(row["mean_diagonal"] - float(own.mean())) < 6 * row["stderr"]
        entries = parts(torch.diag(saved.value))[layer]
        assert row["smallest"] == pytest.approx(float(entries.min()))
        assert row["largest"] == pytest.approx(float(entries.max()))
    assert abs(found["mean_diagonal"] - float(A.diagonal().mean())) < 6 * found["stderr"]
    assert found["method"] == method
    assert found["products"] == 20
    assert found["entry_stderr"] > 0
    shown = capsys.readouterr().out
    assert re.search(r"layer +parameters +mean diagonal +± error +smallest +largest", shown)
    assert re.search(r"error of an entry: +\d", shown)


@pytest.mark.parametrize("command", COMMANDS)
def test_small_operators_are_exact(place, capsys, command):
    assert main([command, "mine.py:risk", "--out", "out"]) == 0
    found = numbers(place / "out", command)
    assert found["method"] == "exact"
    assert found["products"] == 26
    assert found["stderr"] == 0.0
    size = 1 if command == "trace" else 26
    total = found["trace" if command == "trace" else "mean_diagonal"] * size
    assert total == pytest.approx(float(dense().trace()), rel=1e-5)
    shown = capsys.readouterr().out
    assert re.search(r"0 +16 +\S+ +exact", shown)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_tolerance_stops_early(place, command):
    arguments = ["mine.py:risk", "--tolerance", "0.2", "--out", "out"]
    assert main([command, *arguments]) == 0
    found = numbers(place / "out", command)
    assert found["products"] < 1000
    if command == "trace":
        assert found["stderr"] <= 0.2 * abs(found["trace"])


@pytest.mark.parametrize("command", COMMANDS)
def test_files_and_the_command_that_made_them(place, command):
    arguments = [command, "mine.py:risk", "--products", "12", "--seed", "3", "--out", "a folder"]
    assert main(arguments) == 0
    folder = place / "a folder"
    expected = {"command.txt", *(f"{command}.{end}" for end in ("json", "pdf", "png"))}
    assert {p.name for p in folder.iterdir()} == expected | {f"{command}.safetensors"}
    assert (folder / f"{command}.png").read_bytes().startswith(b"\x89PNG")
    line = (folder / "command.txt").read_text().splitlines()[1]
    assert line == f"curvlib {command} mine.py:risk --products 12 --seed 3 --out 'a folder'"
    assert numbers(folder, command)["command"] == line
    assert numbers(folder, command)["examples"] == 20
    first = numbers(folder, command)
    assert main(arguments) == 0
    assert numbers(folder, command) | {"seconds": 0} == first | {"seconds": 0}


@pytest.mark.parametrize("command", COMMANDS)
def test_default_folder_and_some_parameters(place, command):
    assert main([command, "mine.py:risk", "--products", "9", "--params", "2.*"]) == 0
    found = numbers(place / "curvlib-out" / f"mine-risk-{command}", command)
    assert found["parameters"] == 10
    assert [row["layer"] for row in found["layers"]] == ["2"]


# ---------------------------------------------------------------------- bad input
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.py:risk"], "there is no file absent.py"),
        (["mine.py:absent"], "has no 'absent'"),
        (["mine.py:nan"], "batch 0"),
        (["mine.py:risk", "--params", "3.*"], r"'3.\*' in params= selects nothing"),
        (["mine.py:risk", "--out", "mine.py/out"], "cannot write to --out mine.py/out"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(place, capsys, command, arguments, message):
    out = [] if "--out" in arguments else ["--out", "out"]
    assert main([command, *arguments, *out]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("curvlib: error: ")
    assert re.search(message, lines[0])


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("trace", ["--products", "0"], "--products: expected a positive whole number, got 0"),
        ("trace", ["--tolerance", "-1"], "--tolerance: expected a positive number, got -1"),
        ("diagonal", ["--method", "magic"], "--method: invalid choice: 'magic'"),
        ("diagonal", ["--k", "3"], "unrecognized arguments: --k"),
    ],
)
def test_options_that_are_none(place, capsys, command, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main([command, "mine.py:risk", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_method_that_does_not_fit_the_operator(place, capsys):
    arguments = ["mine.py:risk", "--method", "xnysdiag", "--products", "9", "--out", "out"]
    assert main(["diagonal", *arguments]) == 2
    assert "needs a positive semi-definite operator" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_numbers_survive_where_matplotlib_is_absent(place, capsys, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([command, "mine.py:risk", "--products", "9", "--out", "out"]) == 2
    assert "pip install 'curvlib[plot]'" in capsys.readouterr().err
    assert numbers(place / "out", command)["parameters"] == 26


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unfinished_run_is_not_overwritten(place, capsys, command):
    kept = place / "out" / "checkpoints" / f"{command}.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"precious")
    assert main([command, "mine.py:risk", "--out", "out"]) == 2
    assert "out holds an unfinished run; pass --resume" in capsys.readouterr().err
    assert kept.read_bytes() == b"precious"


# ------------------------------------------------------------------- resumed runs
def start(place, command, *arguments, nap="0"):
    settings = ["--products", "24", "--no-check", "--save-every", "0.01"]
    settings += ["--method", "xdiag"] if command == "diagonal" else ["--method", "hutchinson"]
    words = ["-m", "curvlib", command, "mine.py:slow", *settings, *arguments]
    return Program(*words, cwd=place, NAP=nap)


def measured(folder, command):
    """All numbers but those of the clock and the command."""
    found = numbers(folder, command)
    kept = {k: v for k, v in found.items() if k not in ("seconds", "resumed", "command")}
    return kept, (folder / f"{command}.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_stopped_and_resumed(place, command):
    code, _, error = start(place, command, "--out", "undisturbed").finish()
    assert code == 0, error
    assert error == ""  # no bar where there is no terminal
    for stop in (signal.SIGKILL, signal.SIGINT):
        out = stop.name
        checkpoint = place / out / "checkpoints" / f"{command}.safetensors"
        process = start(place, command, "--out", out, nap="0.1")
        process.until(checkpoint.exists)
        code, _, error = process.stop(stop)
        assert code == (130 if stop == signal.SIGINT else -signal.SIGKILL)
        if stop == signal.SIGINT:
            assert f"stopped: by Ctrl-C; go on with: curvlib {command} mine.py:slow" in error
            assert error.rstrip().endswith("--resume")
        assert not (place / out / f"{command}.json").exists()
        code, _, error = start(place, command, "--out", out, "--resume").finish()
        assert code == 0, error
        assert measured(place / out, command) == measured(place / "undisturbed", command)
        assert numbers(place / out, command)["resumed"]
        assert not (place / out / "checkpoints").exists()
