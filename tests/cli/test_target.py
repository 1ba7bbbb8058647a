"""TARGET: what names a risk, and what each wrong one is told."""

from __future__ import annotations

import copy
import functools
import sys
from collections import UserDict
from typing import NamedTuple

import pytest
import torch
from torch import nn

import curvlib as cl
from curvlib.cli.target import TargetError, converted, load

GOOD = """
import torch
import curvlib as cl

def risk():
    return cl.Risk(torch.nn.Linear(2, 1), torch.nn.MSELoss(), (torch.eye(2), torch.ones(2, 1)))

made = risk()
model = torch.nn.Linear(2, 1)

def fails():
    return 1 / 0

def leaves():
    raise SystemExit(3)

def needs(argument):
    return argument

def nothing():
    pass

class Kinds:
    @staticmethod
    def risk():
        return made
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file of targets; what importing it leaves behind is cleaned up."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "my_targets.py"
    path.write_text(GOOD)
    yield path
    for name in ("curvlib_target_my_targets", "curvlib_target_broken", "my_targets"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["risk", "made"])
@pytest.mark.parametrize("place", ["my_targets.py", "./my_targets.py", "{folder}/my_targets.py"])
def test_a_file_and_a_name(file, place, name):
    risk = load(f"{place.format(folder=file.parent)}:{name}")
    assert isinstance(risk, cl.Risk)
    assert risk.space.size == 3


def test_a_module_and_a_name(file):
    assert isinstance(load("my_targets:risk"), cl.Risk)


def test_a_file_imports_its_neighbours(file):
    (file.parent / "sub").mkdir()
    (file.parent / "sub" / "neighbour_of_target.py").write_text("width = 4")
    (file.parent / "sub" / "broken.py").write_text(
        "from neighbour_of_target import width\n"
        + GOOD.replace("Linear(2, 1),", "Linear(2, 1, bias=width == 0),")
    )
    assert load("sub/broken.py:risk").space.size == 2


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("my_targets.py", "names nothing: expected file.py:name or package.module:name"),
        ("my_targets.py:", "names nothing"),
        (":risk", "names nothing"),
        ("my_targets.py:a b", "names nothing"),
        ("absent.py:risk", "there is no file absent.py"),
        ("absent/file.py:risk", "there is no file absent/file.py"),
        ("../:risk", "is a folder"),
        ("./data.txt:risk", "is no Python file"),
        ("absent_module:risk", "there is no module absent_module"),
        ("absent_package.module:risk", "there is no module absent_package.module"),
        ("my_targets.py:riks", "has no 'riks'; it has risk"),
        ("my_targets.py:model", "is of type Linear, no curvlib.Risk"),
        ("my_targets.py:nothing", "is of type NoneType, no curvlib.Risk"),
        ("my_targets.py:Kinds", "is of type Kinds, no curvlib.Risk"),
        (
            "my_targets.py:fails",
            r"fails\(\) of .* raised ZeroDivisionError: .* at my_targets.py:12",
        ),
        ("my_targets.py:leaves", r"leaves\(\) of my_targets.py raised SystemExit: 3"),
        ("my_targets.py:needs", r"raised TypeError: .*argument"),
        (
            "broken.py:risk",
            r"broken.py raised ModuleNotFoundError: .*absent_thing.* at broken.py:1",
        ),
        ("unparsable.py:risk", "unparsable.py raised SyntaxError"),
    ],
)
def test_targets_that_cannot_be_used(file, target, message):
    (file.parent / "data.txt").write_text("no python")
    (file.parent / "broken.py").write_text("import absent_thing\n")
    (file.parent / "unparsable.py").write_text("def :\n")
    with pytest.raises(TargetError, match=message):
        load(target)


def test_what_the_users_code_raised_is_the_cause(file):
    with pytest.raises(TargetError) as caught:
        load("my_targets.py:fails")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


# ------------------------------------------------------------------- converted
def batches(n=2):
    draw = torch.Generator().manual_seed(1)
    return [
        (torch.randn(3, 4, generator=draw), torch.randint(2, (3,), generator=draw))
        for _ in range(n)
    ]


def test_a_copy_in_float64_is_the_risk_in_float64():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]))
    risk = cl.Risk(model, loss, batches())
    before = [p.clone() for p in model.state_dict().values()]
    twin = converted(risk, dtype=torch.float64)

    assert twin.space.dtype == torch.float64
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert loss.weight.dtype == torch.float32
    assert risk.space.dtype == torch.float32

    double = [(x.double(), y) for x, y in batches()]
    heavy = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0], dtype=torch.float64))
    expected = cl.Risk(copy.deepcopy(model).double(), heavy, double)
    assert torch.equal(twin.value(), expected.value())
    assert torch.equal(twin.gradient(), expected.gradient())


def test_a_copy_keeps_which_parameters_were_chosen():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[0].bias.requires_grad_(False)
    risk = cl.Risk(model, nn.CrossEntropyLoss(), batches(), params=[model[0].bias, model[1].weight])
    twin = converted(risk, dtype=torch.float64)
    assert twin.space.names == ("0.bias", "1.weight")
    assert not any(p is q for p in model.parameters() for q in twin.model.parameters())


def test_batches_of_any_kind_are_converted_as_they_come():
    class Pair(NamedTuple):
        x: torch.Tensor
        y: torch.Tensor

    class Loader:
        def __iter__(self):
            for x, y in batches():
                yield UserDict(pair=Pair(x, y), scale=2.0, names=["a", "b"])

        def __len__(self):
            return 2

    def forward(model, batch):
        assert isinstance(batch, UserDict)
        assert batch["names"] == ["a", "b"]
        assert batch["pair"].x.dtype == torch.float64
        return model(batch["pair"].x) * batch["scale"]

    model = nn.Linear(4, 2)
    risk = cl.Risk(
        model,
        functools.partial(nn.functional.cross_entropy, weight=torch.tensor([1.0, 2.0])),
        Loader(),
        forward=forward,
        target=lambda batch: batch["pair"].y,
    )
    twin = converted(risk, dtype=torch.float64)
    assert len(twin.data) == 2
    x, y = (torch.cat(t) for t in zip(*batches(), strict=True))
    expected = nn.functional.cross_entropy(
        2.0 * nn.functional.linear(x.double(), model.weight.double(), model.bias.double()),
        y,
        weight=torch.tensor([1.0, 2.0], dtype=torch.float64),
    )
    assert torch.allclose(twin.value(), expected, rtol=1e-12)
