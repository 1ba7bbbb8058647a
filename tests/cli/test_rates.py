"""``curvlib rates``: numbers, files, validation, bad input, and resumed runs."""

from __future__ import annotations

import json
import re
import signal

import pytest
import torch

from curvlib.cli import main
from curvlib.rates.learning_rate import max_learning_rate
from curvlib.rates.measured_edges import measured_edges
from tests.programs import Program

TARGET = """
import os, time
import torch
import curvlib as cl

class Slow(torch.nn.Linear):
    def forward(self, x):
        time.sleep(float(os.environ.get("NAP", "0")))
        return super().forward(x)

def risk():
    model = torch.nn.Sequential(Slow(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(24, 3, generator=draw)
    return cl.Risk(model, torch.nn.CrossEntropyLoss(), (x, (x[:, 0] > 0).long()))

def one():
    return cl.Risk(torch.nn.Linear(2, 1), torch.nn.MSELoss(), (torch.ones(1, 2), torch.ones(1, 1)))

def concave():
    x = torch.eye(2)
    return cl.Risk(torch.nn.Linear(2, 1, bias=False), lambda f, y: -f.square().mean(), (x, x))

def diverged():
    out = risk()
    with torch.no_grad():
        out.model[0].weight.fill_(torch.nan)
    return out
"""
FAST = ["--steps", "12", "--seeds", "2"]


def numbers(folder):
    return json.loads((folder / "rates.json").read_text())


def own(place):
    """The risk of the target, as the command line loads it."""
    from curvlib.cli.target import load

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return load(f"{place / 'mine.py'}:risk")


def test_predictions_are_those_of_the_library(place, capsys, rng_untouched):
    arguments = ["mine.py:risk", "--batch-sizes", "8,1", "--out", "out"]
    assert main(["rates", *arguments]) == 0
    expected = max_learning_rate(own(place), [1, 8])
    found = numbers(place / "out")
    assert [row["batch_size"] for row in found["rates"]] == [1, 8]
    for row, value in zip(found["rates"], expected.value.tolist(), strict=True):
        assert row["predicted"] == pytest.approx(value, rel=1e-6)
    assert found["critical_batch_size"] == pytest.approx(expected.knee, rel=1e-6)
    assert found["optimizer"] == "SGD"
    assert "measured" not in found
    shown = capsys.readouterr().out
    assert re.search(r"critical batch size \S+ \(95 %: \S+ to \S+\)", shown)
    assert "second_moment*" in shown


def test_validation_is_that_of_the_library(place, capsys):
    arguments = ["mine.py:risk", "--batch-sizes", "2,24", "--optimizer", "momentum"]
    arguments += ["--momentum", "0.5", "--validate", *FAST, "--rise", "1.2", "--out", "out"]
    assert main(["rates", *arguments]) == 0
    found = numbers(place / "out")
    risk = own(place)
    predicted = max_learning_rate(risk, [2, 24], "momentum", momentum=0.5)
    expected = measured_edges(
        risk,
        [2, 24],
        "momentum",
        momentum=0.5,
        steps=12,
        seeds=2,
        rise=1.2,
        guess=float(predicted.value[0]),
        progress=False,
    )
    for i, row in enumerate(found["rates"]):
        assert row["stable"] == pytest.approx(float(expected.value[i]))
        assert row["trainable"] == pytest.approx(float(expected.trainable[i]))
    assert found["measured"]["rise"] == 1.2
    shown = capsys.readouterr().out
    assert re.search(r"within 1.5x, stable: +\d of 2", shown)
    assert "SGD with momentum 0.5, 12 steps from a loss of" in shown


def test_files_and_the_command_that_made_them(place):
    options = ["--batch-sizes", "24", "--validate", "--steps", "4"]
    arguments = ["rates", "mine.py:risk", *options, "--out", "a folder"]
    assert main(arguments) == 0
    folder = place / "a folder"
    expected = {"rates.png", "rates.pdf", "rates.json", "rates.safetensors", "edges.safetensors"}
    assert {path.name for path in folder.iterdir()} == expected | {"command.txt"}
    assert (folder / "rates.png").read_bytes().startswith(b"\x89PNG")
    line = (folder / "command.txt").read_text().splitlines()[1]
    assert line == (
        "curvlib rates mine.py:risk --batch-sizes 24 --validate --steps 4 --out 'a folder'"
    )
    first = numbers(folder)
    assert main(arguments) == 0
    assert numbers(folder) | {"seconds": 0} == first | {"seconds": 0}


def test_default_sizes_are_powers_of_two_and_all_examples(place):
    assert main(["rates", "mine.py:risk", "--no-check", "--out", "out"]) == 0
    sizes = [row["batch_size"] for row in numbers(place / "out")["rates"]]
    assert sizes == [1, 2, 4, 8, 16, 24]


def test_settings_reach_the_prediction(place):
    arguments = ["mine.py:risk", "--batch-sizes", "4", "--optimizer", "adam", "--params", "2.*"]
    arguments += ["--law", "mean_square", "--curvature", "ggn", "--examples", "20"]
    assert main(["rates", *arguments]) == 0
    found = numbers(place / "curvlib-out" / "mine-risk-rates")
    assert found["parameters"] == 10
    assert found["law"] == "mean_square"
    assert found["optimizer"].startswith("Adam with beta1 0.9")
    assert found["settings"]["kind"] == "ggn"
    assert found["settings"]["examples"] == 20
    assert found["rates"][0]["predicted"] == found["rates"][0]["laws"]["mean_square"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mine.py:risk", "--batch-sizes", "25"], "batch size from 1 to 24 .* got 25"),
        (["mine.py:one"], "the data has 1 example"),
        (["mine.py:concave"], "the largest eigenvalue of the hessian is -"),
        (["mine.py:diverged", "--no-check"], "0.weight|batch 0"),
        (["mine.py:risk", "--momentum", "0.5"], "--momentum belongs to --optimizer momentum and"),
        (["mine.py:risk", "--steps", "20"], "--steps says how to train copies: add --validate"),
        (["mine.py:risk", "--validate", "--rise", "1"], "expected rise > 1"),
        (["mine.py:risk", "--validate", "--steps", "2"], "expected steps >= 4, got 2"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(place, capsys, arguments, message):
    assert main(["rates", *arguments, "--out", "out"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("curvlib: error: ")
    assert re.search(message, lines[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-sizes", "4,0"], "--batch-sizes: expected a positive whole number, got 0"),
        (["--batch-sizes", "four"], "--batch-sizes: invalid list of whole numbers value: 'four'"),
        (["--optimizer", "lion"], "--optimizer: invalid choice: 'lion'"),
        (["--momentum", "1"], r"--momentum: expected a number in \[0, 1\), got 1"),
    ],
)
def test_options_that_are_none(place, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(["rates", "mine.py:risk", *arguments])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def start(place, *arguments, nap="0"):
    options = ["--batch-sizes", "4,24", "--validate", *FAST, "--no-check", "--save-every", "0.01"]
    words = ["-m", "curvlib", "rates", "mine.py:risk", *options, *arguments]
    return Program(*words, cwd=place, NAP=nap)


@pytest.mark.slow
def test_stopped_and_resumed(place):
    assert start(place, "--out", "undisturbed").finish().error == ""
    first = numbers(place / "undisturbed")
    for stop in (signal.SIGKILL, signal.SIGINT):
        folder = place / stop.name
        process = start(place, "--out", stop.name, nap="0.003")
        process.until((folder / "checkpoints" / "edges.safetensors").exists)
        code, _, error = process.stop(stop)
        if stop == signal.SIGINT:
            assert code == 130
            assert "go on with: curvlib rates mine.py:risk" in error
        assert not (folder / "rates.json").exists()
        assert start(place, "--out", stop.name, "--resume").finish().error == ""
        second = numbers(folder)
        assert second["resumed"]
        assert second["rates"] == first["rates"]
        edges = [(f / "edges.safetensors").read_bytes() for f in (place / "undisturbed", folder)]
        assert edges[0] == edges[1]
        assert not (folder / "checkpoints").exists()
