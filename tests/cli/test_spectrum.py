"""``curvlib spectrum``: its numbers, its files, and what bad input is told."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import curvlib as cl
from curvlib.cli import main

TARGET = """
import torch
import curvlib as cl

def risk():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, generator=draw)
    return cl.Risk(model, torch.nn.CrossEntropyLoss(), (x, (x[:, 0] > 0).long()))

def dropout():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout())
    return cl.Risk(model, torch.nn.MSELoss(), (torch.eye(3), torch.zeros(3, 2)))

def flat():
    model = torch.nn.Linear(2, 1, bias=False)
    return cl.Risk(model, lambda out, y: -out.square().mean(), (torch.eye(2), torch.ones(2, 1)))

def nan():
    model = torch.nn.Linear(2, 1)
    return cl.Risk(model, torch.nn.MSELoss(), (torch.eye(2) * torch.nan, torch.ones(2, 1)))

def mismatch():
    model = torch.nn.Linear(3, 1)
    return cl.Risk(model, torch.nn.MSELoss(), (torch.eye(2), torch.ones(2, 1)))
"""
PARAMETERS = 26


def spectrum(*arguments):
    return main(["spectrum", *arguments])


def numbers(folder):
    return json.loads((folder / "spectrum.json").read_text())


def dense(kind=cl.hessian, dtype=torch.float32):
    """The matrix of the target's operator, by the seed of the command's default."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, generator=draw)
    return kind(
        cl.Risk(model, nn.CrossEntropyLoss(), (x.to(dtype), (x[:, 0] > 0).long()))
    ).to_dense()


def test_numbers_are_those_of_the_matrix(place, capsys, rng_untouched):
    assert spectrum("mine.py:risk", "--k", "5", "--steps", "26", "--out", "out") == 0
    expected = torch.linalg.eigvalsh(dense().double()).flip(0)
    found = numbers(place / "out")
    values = torch.tensor([row["value"] for row in found["eigenvalues"]], dtype=torch.float64)
    residuals = torch.tensor([row["residual"] for row in found["eigenvalues"]])
    assert all(row["converged"] for row in found["eigenvalues"])
    # An eigenvalue lies within the residual of each Ritz value (plus float32's rounding).
    assert bool(((values - expected[:5]).abs() <= residuals + 1e-6 * expected[0]).all())
    assert float(residuals.max()) <= 4e-4 * float(expected[0])
    assert found["parameters"] == PARAMETERS
    assert found["examples"] == 20
    assert found["largest_stable_step"] == pytest.approx(2 / float(expected[0]), rel=1e-3)
    assert abs(found["trace"] - float(expected.sum())) <= 5 * found["trace_stderr"] + 1e-5

    shown = capsys.readouterr().out
    assert f"{found['eigenvalues'][0]['value']:.6g}" in shown
    assert f"largest stable step: {found['largest_stable_step']:.4g}" in shown
    assert re.search(r"trace: +-?\d.* ± \d", shown)
    assert re.search(rf"products: +{found['products']}\n", shown)
    assert re.search(r"wall time: +\d+\.\d s", shown)


def test_files_and_the_command_that_made_them(place, capsys):
    arguments = ["mine.py:risk", "--k", "2", "--steps", "8", "--out", "a folder"]
    assert spectrum(*arguments) == 0
    folder = place / "a folder"
    assert sorted(p.name for p in folder.iterdir()) == [
        "command.txt",
        "density.safetensors",
        "eigenpairs.safetensors",
        "spectrum.json",
        "spectrum.pdf",
        "spectrum.png",
    ]
    assert (folder / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "spectrum.pdf").read_bytes().startswith(b"%PDF")
    versions, command = (folder / "command.txt").read_text().splitlines()
    assert f"torch {torch.__version__}" in versions
    assert command == "curvlib spectrum mine.py:risk --k 2 --steps 8 --out 'a folder'"
    assert numbers(folder)["command"] == command
    pairs = cl.Eigenpairs.load(folder / "eigenpairs.safetensors")
    rows = numbers(folder)["eigenvalues"]
    assert [row["value"] for row in rows] == sorted(pairs.values.tolist(), reverse=True)
    assert cl.Density.load(folder / "density.safetensors").nodes.numel() > 0
    # Again, in the same folder: the same numbers replace the old ones.
    first = numbers(folder)
    assert spectrum(*arguments) == 0
    assert numbers(folder) | {"seconds": 0} == first | {"seconds": 0}


@pytest.mark.parametrize(
    ("choice", "kind"),
    [
        ("hessian", cl.hessian),
        ("ggn", cl.ggn),
        ("fisher", lambda risk: cl.fisher(risk, kind="type2")),
        ("fisher-type2", lambda risk: cl.fisher(risk, kind="type2")),
        ("fisher-empirical", lambda risk: cl.fisher(risk, kind="empirical")),
    ],
)
def test_kinds_of_curvature(place, choice, kind):
    arguments = ["--curvature", choice, "--k", "1", "--steps", "4", "--out", "out"]
    assert spectrum("mine.py:risk", *arguments) == 0
    top = torch.linalg.eigvalsh(kind_dense(kind))[-1]
    assert numbers(place / "out")["eigenvalues"][0]["value"] == pytest.approx(float(top), rel=1e-3)


def kind_dense(kind):
    return dense(kind).double()


def test_monte_carlo_fisher_follows_the_seed(place):
    def top(seed):
        arguments = ["--curvature", "fisher-mc", "--k", "1", "--steps", "4", "--out", "out"]
        assert spectrum("mine.py:risk", *arguments, "--seed", str(seed)) == 0
        return numbers(place / "out")["eigenvalues"][0]["value"]

    assert top(1) == top(1)
    assert top(1) != top(2)


def test_smallest_eigenvalues(place):
    assert spectrum("mine.py:risk", "--which", "SA", "--k", "2", "--steps", "8", "--out", "o") == 0
    expected = torch.linalg.eigvalsh(dense().double())
    found = numbers(place / "o")
    assert found["eigenvalues"][-1]["value"] == pytest.approx(float(expected[0]), abs=1e-5)
    # The largest stable step is the largest eigenvalue's, which the density knows.
    assert found["largest_stable_step"] >= 2 / float(expected[-1]) * 0.999


def test_float64_is_computed_on_a_copy(place):
    arguments = ["--dtype", "float64", "--tolerance", "1e-10", "--k", "3", "--steps", "8"]
    assert spectrum("mine.py:risk", *arguments, "--out", "o") == 0
    expected = torch.linalg.eigvalsh(dense(dtype=torch.float64)).flip(0)[:3]
    found = [row["value"] for row in numbers(place / "o")["eigenvalues"]]
    assert found == pytest.approx(expected.tolist(), rel=1e-9)


def test_some_parameters(place):
    arguments = ["--params", "0.*", "--params", "2.bias", "--k", "1", "--steps", "4"]
    assert spectrum("mine.py:risk", *arguments, "--out", "o") == 0
    assert numbers(place / "o")["parameters"] == 18
    keep = [*range(16), 24, 25]
    block = dense().double()[keep][:, keep]
    top = float(torch.linalg.eigvalsh(block)[-1])
    assert numbers(place / "o")["eigenvalues"][0]["value"] == pytest.approx(top, rel=1e-3)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_another_device(place, device):
    arguments = ["--device", device, "--dtype", "float64", "--k", "1", "--steps", "4"]
    assert spectrum("mine.py:risk", *arguments, "--out", "o") == 0
    top = float(torch.linalg.eigvalsh(dense(dtype=torch.float64))[-1])
    assert numbers(place / "o")["eigenvalues"][0]["value"] == pytest.approx(top, rel=1e-7)


def test_no_positive_eigenvalue_means_no_largest_step(place, capsys):
    assert spectrum("mine.py:flat", "--k", "1", "--steps", "3", "--out", "o") == 0
    assert numbers(place / "o")["largest_stable_step"] is None
    assert "largest stable step: none: no eigenvalue is positive" in capsys.readouterr().out


def test_what_the_checks_find_is_said(place, capsys):
    assert spectrum("mine.py:dropout", "--k", "1", "--steps", "2", "--out", "o") in (0, 2)
    assert re.search(r"check: .*dropout", capsys.readouterr().out, re.IGNORECASE)


def test_default_folder_is_named_after_the_target(place):
    assert spectrum("mine.py:risk", "--k", "1", "--steps", "2") == 0
    assert (place / "curvlib-out" / "mine-risk" / "spectrum.json").is_file()


# -------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.py:risk"], "there is no file absent.py"),
        (["mine.py"], "names nothing: expected file.py:name"),
        (["mine.py:absent"], "has no 'absent'"),
        (["mine.py:TARGET_"], "has no 'TARGET_'"),
        (["mine.py:torch"], "is of type module, no curvlib.Risk"),
        (["mine.py:risk", "--k", "27"], "k <= 26.*got k=27"),
        (["mine.py:risk", "--params", "3.*"], r"'3.\*' in params= selects nothing"),
        (["mine.py:nan"], "batch 0"),
        (["mine.py:mismatch"], "RuntimeError: mat1 and mat2"),
        (["mine.py:risk", "--out", "mine.py/out"], "cannot write to --out mine.py/out"),
        (["mine.py:risk", "--out", "mine.py"], "cannot write to --out mine.py "),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(place, capsys, arguments, message):
    out = [] if "--out" in arguments else ["--out", "out"]
    assert spectrum(*arguments, *out) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("curvlib: error: ")
    assert re.search(message, lines[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", "0"], "--k: expected a positive whole number, got 0"),
        (["--k", "ten"], "--k: invalid whole number value: 'ten'"),
        (["--tolerance", "-1"], "--tolerance: expected a positive number, got -1"),
        (["--which", "SM"], "--which: invalid choice: 'SM'"),
        (["--curvature", "jacobian"], "--curvature: invalid choice: 'jacobian'"),
        (["--device", "nowhere"], "--device: cannot use device 'nowhere'"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["--absent"], "unrecognized arguments: --absent"),
    ],
)
def test_options_that_are_none_are_one_line_and_exit_code_2(place, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        spectrum("mine.py:risk", *arguments)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_an_unfinished_run_is_not_overwritten(place, capsys):
    (place / "out" / "checkpoints").mkdir(parents=True)
    kept = place / "out" / "checkpoints" / "eigenpairs.safetensors"
    kept.write_bytes(b"precious")
    assert spectrum("mine.py:risk", "--out", "out") == 2
    assert "out holds an unfinished run; pass --resume" in capsys.readouterr().err
    assert spectrum("mine.py:risk", "--out", "out", "--resume") == 2
    assert "damaged" in capsys.readouterr().err
    assert kept.read_bytes() == b"precious"


def test_debug_shows_the_traceback(place, capsys):
    assert spectrum("mine.py:mismatch", "--debug") == 2
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert error.splitlines()[-1].startswith("curvlib: error: RuntimeError")


def test_scikit_learn_is_asked_for_by_the_demo_alone(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert spectrum("--out", "out") == 2
    assert "pip install 'curvlib[demo]'" in capsys.readouterr().err


def test_numbers_survive_where_matplotlib_is_absent(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert spectrum("mine.py:risk", "--k", "1", "--steps", "2", "--out", "out") == 2
    assert "pip install 'curvlib[plot]'" in capsys.readouterr().err
    assert numbers(place / "out")["parameters"] == PARAMETERS


def test_module_and_version():
    done = subprocess.run(
        [sys.executable, "-m", "curvlib", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("curvlib ")
