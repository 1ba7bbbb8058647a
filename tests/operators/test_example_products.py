"""Per-example products against risks of single examples, for the whole table of cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import curvlib as cl
from curvlib.core.examples import chosen_examples
from curvlib.operators.example_products import example_products
from tests.cases import CASES, build
from tests.problems import columns, error, risk_of, snapshot

pytestmark = pytest.mark.filterwarnings("ignore:curvlib. .*:UserWarning")

MAKE = {"hessian": cl.hessian, "ggn": cl.ggn}


def singles(risk: cl.Risk) -> list[tuple[cl.Risk, float]]:
    out = []
    for batch in risk.batches():
        for i in range(batch.examples):
            one = risk.on([chosen_examples(batch, torch.tensor([i])).data])
            out.append((one, float(next(iter(one.batches())).weight)))
    return out


def streamed(risk: cl.Risk, V: Tensor, kind: str, block: int | None = None) -> Tensor:
    return torch.cat([part.matmat(V) for part in example_products(risk, kind=kind, block=block)])


def why_not(name: str) -> str | None:
    """Why a case's batches cannot be taken apart, if they cannot."""
    try:
        next(example_products(risk_of(build(name))))
    except ValueError as reason:
        text = str(reason)
        assert "examples depend on" in text or "cannot be split" in text, text
        return text
    return None


def test_most_cases_can_be_split() -> None:
    reasons = {name: why_not(name) for name in CASES}
    whole = {name for name, reason in reasons.items() if reason is not None}
    assert len(whole) <= 0.25 * len(CASES), whole
    assert reasons["BatchNorm1d train"] is not None


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_single_examples(name: str, kind: str) -> None:
    if kind == "ggn" and name == "hf own loss":
        pytest.skip("a GGN needs a tensor output")
    if why_not(name) is not None:
        pytest.skip("examples depend on each other, or are not the rows of its tensors")
    risk = risk_of(build(name))
    V = columns(risk.space.size, 2, dtype=risk.space.dtype)
    found = streamed(risk, V, kind)
    rows = []
    for one, weight in singles(risk):
        scale = 1.0 if risk.loss.reduction == "sum" else weight
        empty = weight == 0.0 and risk.loss.reduction == "mean"
        rows.append(torch.zeros_like(V) if empty else MAKE[kind](one).matmat(V) * scale)
    expected = torch.stack(rows)
    limit = 1e-9 if risk.space.dtype == torch.float64 else 1e-3
    if max(torch.finfo(d).eps for d in risk.space.dtypes) > 1e-4:
        limit = 0.1  # half-precision parameters
    assert error(found.double(), expected.double()) < limit
    total = found.double().sum(0) / risk.weight()
    assert error(total, MAKE[kind](risk).matmat(V).double()) < limit


def small(batches: int = 2) -> cl.Risk:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(9, 3).double(), torch.randint(2, (9,))
    data = list(zip(x.split([5, 4]), y.split([5, 4]), strict=True)) if batches == 2 else (x, y)
    return cl.Risk(model, nn.CrossEntropyLoss(), data)


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_each_example_may_have_columns_of_its_own(kind: str) -> None:
    risk = small()
    own = columns(9, risk.space.size * 3, seed=4).view(9, risk.space.size, 3)
    found, start = [], 0
    for part in example_products(risk, kind=kind, block=2):
        found.append(part.matmat(own[start : start + part.count]))
        start += part.count
    assert [f.shape[0] for f in found] == [2, 2, 1, 2, 2]
    for i, (one, weight) in enumerate(singles(risk)):
        torch.testing.assert_close(torch.cat(found)[i], MAKE[kind](one).matmat(own[i]) * weight)


def test_examples_go_through_vmap_together(monkeypatch: pytest.MonkeyPatch) -> None:
    risk = small()
    calls = []
    original = cl.Risk.call
    monkeypatch.setattr(cl.Risk, "call", lambda *a: calls.append(0) or original(*a))
    part = next(example_products(risk, block=5))
    built = len(calls)
    part.matmat(columns(risk.space.size, 3))
    assert part.count == 5
    assert built == 1 + 5 + 2  # batch and single examples, to compare; all at once (nested call)
    assert len(calls) == built  # products need no further forward pass


def test_the_model_is_left_as_it_was_while_the_caller_has_control() -> None:
    risk = small()
    before = snapshot(risk.model)
    for part in example_products(risk):
        part.matmat(columns(risk.space.size, 1))
        snapshot(risk.model).assert_same(before)
    snapshot(risk.model).assert_same(before)


def test_arguments_that_do_not_fit() -> None:
    risk = small()
    with pytest.raises(ValueError, match="kind= is one of 'hessian', 'ggn', got 'fisher'"):
        example_products(risk, kind="fisher")
    with pytest.raises(ValueError, match="block= needs at least one example, got 0"):
        example_products(risk, block=0)
    with pytest.raises(ValueError, match="start= needs a number of examples, at least 0, got -1"):
        example_products(risk, start=-1)
    part = next(example_products(risk, block=2))
    size = risk.space.size
    shape = rf"expected columns of shape \[{size}, K\], or \[2, {size}, K\] for 2 examples"
    for bad in (torch.zeros(size), torch.zeros(3, size, 1), torch.zeros(size + 1, 1)):
        with pytest.raises(ValueError, match=shape):
            part.matmat(bad.double())
    with pytest.raises(ValueError, match="expected columns in torch.float64 on cpu, got torch.fl"):
        part.matmat(torch.zeros(size, 1))


def test_diverged_parameters_are_named_as_such() -> None:
    risk = small()
    part = next(example_products(risk))
    with torch.no_grad():
        risk.params["0.weight"].mul_(float("nan"))
    part = next(example_products(risk))
    with pytest.raises(FloatingPointError, match="the parameters may have diverged: risk.check"):
        part.matmat(columns(risk.space.size, 1))


def test_examples_that_depend_on_each_other() -> None:
    class Centered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.linear(x).tanh()
            return out - 0.5 * out.mean(0)

    x, y = torch.randn(6, 3).double(), torch.randint(2, (6,))
    risk = cl.Risk(Centered(), nn.CrossEntropyLoss(), (x, y))
    with pytest.raises(ValueError, match="do not add up .* put BatchNorm into eval mode"):
        next(example_products(risk))
    trained = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    with pytest.raises(ValueError, match=r"takes batches, but not single examples \(Expected more"):
        next(example_products(cl.Risk(trained, nn.CrossEntropyLoss(), (x, y))))
