"""``curvlib prune``: its numbers, its files, going on after Ctrl-C, and what bad input is told."""

from __future__ import annotations

import importlib.util
import json
import re
import signal

import pytest
import torch
from safetensors.torch import load_file

import curvlib as cl
from curvlib.cli import main
from curvlib.core.space import ParamSpace
from curvlib.pruning import Comparison
from curvlib.pruning.patterns import check_pattern
from tests.programs import Program

TARGET = """
import os, time
import torch
import curvlib as cl

class Slow(torch.nn.Tanh):
    def forward(self, x):
        time.sleep(float(os.environ.get("NAP", "0")))
        return super().forward(x)

def network(hidden=12):
    return torch.nn.Sequential(torch.nn.Linear(8, hidden), Slow(), torch.nn.Linear(hidden, 3))

def data(seed):
    x = torch.randn(600, 8, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :3].argmax(1)

def risk():
    return cl.Risk(network(), torch.nn.CrossEntropyLoss(), data(0))

def test():
    return cl.Risk(network(), torch.nn.CrossEntropyLoss(), data(1))

def regression():
    x, _ = data(0)
    return cl.Risk(network(), torch.nn.MSELoss(), (x, x[:, :3]))

def other():
    return cl.Risk(network(4), torch.nn.CrossEntropyLoss(), data(1))
"""
WEIGHTS = 8 * 12 + 12 * 3
FAST = ["--recompute", "2", "--compare", "none"]


def prune(*arguments):
    return main(["prune", *arguments])


def numbers(folder):
    return json.loads((folder / "prune.json").read_text())


def target(place, name="risk"):
    """What the command loads, with the seed of its default."""
    spec = importlib.util.spec_from_file_location("mine_again", place / "mine.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(module, name)()


def accuracy(model, data):
    return 100.0 * float((model(data[0]).argmax(1) == data[1]).double().mean())


def test_numbers_files_and_weights_that_load(place, capsys, rng_untouched):
    arguments = ["mine.py:risk", "--sparsity", "0.75", *FAST, "--out", "a folder"]
    assert prune(*arguments) == 0
    folder = place / "a folder"
    assert sorted(p.name for p in folder.iterdir()) == [
        "command.txt",
        "prune.json",
        "prune.pdf",
        "prune.png",
        "prune.safetensors",
        "pruned.safetensors",
    ]
    found, risk = numbers(folder), target(place)
    dense = float(risk.value())
    assert found["quantity"] == "accuracy (%)"
    assert found["before"] == pytest.approx(accuracy(risk.model, risk.data))
    assert found["loss_before"] == pytest.approx(dense, rel=1e-6)
    assert (found["examples"], found["method"], found["sparsity"]) == (600, "obs", 0.75)
    risk.model.load_state_dict(load_file(folder / "pruned.safetensors"), strict=True)
    assert float(risk.value()) == pytest.approx(found["loss_after"], rel=1e-6)
    assert found["after"] == pytest.approx(accuracy(risk.model, risk.data))
    gone = sum(int((risk.model[i].weight == 0).sum()) for i in (0, 2))
    assert gone == round(0.75 * WEIGHTS)
    own = cl.prune(target(place).model, target(place), 0.75, recompute=2, progress=False)
    assert torch.equal(own.weights["0.weight"], risk.model[0].weight)
    result = cl.PruneResult.load(folder / "prune.safetensors")
    assert torch.equal(result.keep["0.weight"], own.keep["0.weight"])

    shown = capsys.readouterr().out
    assert f"loss:                {found['loss_after']:.5g}  (before: " in shown
    assert re.search(r"all +132 +33 +75.00%", shown)
    versions, command = (folder / "command.txt").read_text().splitlines()
    assert f"torch {torch.__version__}" in versions
    assert command.startswith("curvlib prune mine.py:risk --sparsity 0.75 ")
    assert found["command"] == command


def test_another_set_is_the_judge(place):
    arguments = ["mine.py:risk", "--sparsity", "0.5", *FAST, "--test", "mine.py:test"]
    assert prune(*arguments, "--out", "o") == 0
    found, test = numbers(place / "o"), target(place, "test")
    assert found["quantity"] == "test accuracy (%)"
    assert found["before"] == pytest.approx(accuracy(test.model, test.data))
    test.model.load_state_dict(load_file(place / "o" / "pruned.safetensors"))
    assert found["after"] == pytest.approx(accuracy(test.model, test.data))


def test_a_regression_is_judged_by_its_loss(place, capsys):
    assert prune("mine.py:regression", "--sparsity", "0.5", *FAST, "--out", "o") == 0
    found = numbers(place / "o")
    assert found["quantity"] == "loss"
    assert found["after"] == found["loss_after"]
    assert capsys.readouterr().out.count("\nloss:") == 1


def test_patterns(place):
    options = ["--pattern", "2:4", "--compare", "none"]
    assert prune("mine.py:risk", *options, "--out", "o") == 0
    assert numbers(place / "o")["sparsity"] == 0.5
    result = cl.PruneResult.load(place / "o" / "prune.safetensors")
    space = ParamSpace.of(target(place).model, ["*.weight"])
    check_pattern(result.masks.flat(space), space, "2:4")
    more = [*options, "--sparsity", "0.7", "--method", "wanda"]
    assert prune("mine.py:risk", *more, "--out", "p") == 0
    result = cl.PruneResult.load(place / "p" / "prune.safetensors")
    check_pattern(result.masks.flat(space), space, "2:4")
    assert result.sparsity == round(0.7 * WEIGHTS) / WEIGHTS


def test_options_are_those_of_prune(place):
    options = ["--sparsity", "0.6", "--scope", "layer", "--update", "none", "--recompute", "3"]
    options += ["--block-size", "8", "--rows", "64", "--layer-maximum", "0.9", "--seed", "2"]
    options += ["--fisher", "empirical", "--damping", "0.5"]
    options += ["--params", "*.weight", "--dtype", "float64", "--compare", "none"]
    assert prune("mine.py:risk", *options, "--out", "o") == 0
    settings = numbers(place / "o")["settings"]
    expected = {"scope": "layer", "update": "none", "recompute": 3, "block_size": 8, "rows": 64}
    expected |= {"layer_maximum": 0.9, "seed": 2, "fisher": "empirical", "damping": 0.5}
    assert settings.items() >= expected.items()
    assert load_file(place / "o" / "pruned.safetensors")["0.weight"].dtype == torch.float64


def test_methods_are_compared_with_the_settings_that_were_given(place, capsys):
    options = ["--sparsity", "0.5", "--recompute", "2", "--update", "none", "--rows", "256"]
    others = ["--compare", "magnitude, wanda", "--sparsities", "0.8,0.5"]
    assert prune("mine.py:risk", *options, *others, "--out", "o") == 0
    curves = Comparison.load(place / "o" / "comparison.safetensors")
    assert curves.methods == ("magnitude", "wanda", "obs")
    assert curves.sparsities == (0.5, 0.8)
    found = numbers(place / "o")
    assert found["comparison"]["obs"][0] == found["after"]  # the same event, twice
    assert found["comparison"]["quantity"] == "accuracy (%)"
    assert float(curves.losses[2, 0]) == pytest.approx(found["loss_after"], rel=1e-6)
    assert "wanda" in capsys.readouterr().out


@pytest.mark.filterwarnings("default:curvlib:UserWarning")
def test_what_rounds_would_warn_of_again_and_again_is_one_line(place, capsys):
    options = ["--sparsity", "0.5", "--method", "mfac", "--compare", "none", "--out", "o"]
    assert prune("mine.py:risk", *options) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("curvlib: warning: curvlib: 64 rows are few")


@pytest.mark.slow
def test_the_demo(place, capsys):
    assert prune("--pattern", "2:4", "--params", "[37].weight", "--compare", "none") == 0
    found = numbers(place / "curvlib-out" / "digits-prune")
    assert found["quantity"] == "test accuracy (%)"
    assert found["before"] > 95.0
    assert found["after"] > found["before"] - 5.0
    assert list(found["layers"]) == ["3.weight", "7.weight"]
    from curvlib.demo import digits

    demo = digits()
    weights = load_file(place / "curvlib-out" / "digits-prune" / "pruned.safetensors")
    demo.model.load_state_dict(weights, strict=True)
    assert float(demo.risk().value()) == pytest.approx(found["loss_after"], rel=1e-5)


# ------------------------------------------------------------------------- going on
LONG = ["mine.py:risk", "--sparsity", "0.8", "--recompute", "6", "--sparsities", "0.5,0.8"]
LONG += ["--save-every", "0.001", "--no-check"]


def stopped(place, stage):
    """What a run says that is stopped by Ctrl-C once there is a checkpoint of a stage."""
    process = Program("-m", "curvlib", "prune", *LONG, "--out", stage, cwd=place, NAP="0.02")
    process.until((place / stage / "checkpoints" / f"{stage}.safetensors").exists)
    code, _, error = process.stop(signal.SIGINT)
    assert code == 130
    return error.rstrip()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["prune", "compare"])
def test_stopped_and_resumed(place, capsys, stage):
    assert prune(*LONG, "--out", "undisturbed") == 0
    error = stopped(place, stage)
    assert re.search(r"stopped: by Ctrl-C; go on with: curvlib prune .* --resume$", error)
    assert not (place / stage / "prune.json").exists()
    assert prune(*LONG, "--out", stage, "--resume", "--update", "none") == 2
    assert "update was 'joint' and is now 'none'" in capsys.readouterr().err
    assert prune(*LONG, "--out", stage, "--resume") == 0
    for file in ("pruned", "prune", "comparison"):
        one, two = (place / folder / f"{file}.safetensors" for folder in (stage, "undisturbed"))
        assert one.read_bytes() == two.read_bytes()
    assert numbers(place / stage)["resumed"]
    assert not (place / stage / "checkpoints").exists()


# ------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mine.py:risk"], "prune needs --sparsity, --pattern or both"),
        (["absent.py:risk", "--sparsity", "0.5"], "there is no file absent.py"),
        (["mine.py:risk", "--pattern", "2:5"], "divisible by 5"),
        (["mine.py:risk", "--pattern", "2-4"], "pattern= reads 'N:M', such as '2:4', got '2-4'"),
        (["mine.py:risk", "--pattern", "2:4", "--sparsity", "0.3"], "are pruned by the pattern"),
        (["mine.py:risk", "--sparsity", "0.999"], "empties one of 2 parameters"),
        (["mine.py:risk", "--sparsity", "0.5", "--compare", "best"], "--compare takes names out"),
        (
            ["mine.py:risk", "--sparsity", "0.5", "--method", "magnitude", "--update", "joint"],
            "curvature='none' has no blocks",
        ),
        (
            ["mine.py:risk", "--sparsity", "0.5", "--test", "mine.py:other"],
            r"a parameter '0.weight' of shape \[4, 8\], got \[12, 8\]",
        ),
        (["mine.py:risk", "--sparsity", "0.5", "--params", "*.bias"], "no weight that is pruned"),
        (["mine.py:risk", "--sparsity", "0.5", "--layer-maximum", "0.3"], "at most 38 "),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(place, capsys, arguments, message):
    assert prune(*arguments, "--out", "o") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("curvlib: error: ")
    assert re.search(message, lines[0])
    assert not (place / "o" / "prune.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "1"], "--sparsity: expected a share in [0, 1), got 1"),
        (["--sparsity", "most"], "--sparsity: invalid share value: 'most'"),
        (["--sparsities", "0.5,2"], "--sparsities: expected a share in [0, 1), got 2"),
        (["--method", "best"], "--method: invalid choice: 'best'"),
        (["--scope", "all"], "--scope: invalid choice: 'all'"),
        (["--update", "columns"], "--update: invalid choice: 'columns'"),
        (["--damping", "much"], "--damping: invalid number value: 'much'"),
        (["--recompute", "0"], "--recompute: expected a positive whole number, got 0"),
        (["--curvature", "hessian"], "unrecognized arguments: --curvature"),
    ],
)
def test_options_that_are_none_are_one_line_and_exit_code_2(place, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        prune("mine.py:risk", "--pattern", "2:4", *arguments)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_an_unfinished_run_is_not_overwritten(place, capsys):
    (place / "out" / "checkpoints").mkdir(parents=True)
    kept = place / "out" / "checkpoints" / "prune.safetensors"
    kept.write_bytes(b"precious")
    assert prune("mine.py:risk", "--sparsity", "0.5", *FAST, "--out", "out") == 2
    assert "out holds an unfinished run; pass --resume" in capsys.readouterr().err
    assert kept.read_bytes() == b"precious"


def test_help_names_every_method(capsys):
    with pytest.raises(SystemExit):
        prune("--help")
    shown = capsys.readouterr().out
    assert all(name in shown for name in cl.pruning.METHODS)
    assert "--test TARGET" in shown
