"""Losses, error norms and gradient norms of single examples, one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import curvlib as cl
from curvlib.operators.scores.example_values import error_norms, example_losses, gradient_norms
from tests.cases import CASES, build
from tests.problems import risk_of, snapshot

F64 = torch.float64
#: Cases whose examples depend on each other, by statistics of the batch.
DEPENDENT = frozenset({"BatchNorm1d train", "BatchNorm2d train"})
pytestmark = pytest.mark.filterwarnings("ignore:curvlib. .*:UserWarning")


def alone(risk: cl.Risk) -> list[tuple[cl.Risk, float]]:
    """Risks of single examples, and the weights that their means are divided by."""
    from curvlib.operators.batch_examples import example_count, one_example

    out = []
    for batch in risk.batches():
        for i in range(example_count(batch)):
            one = one_example(batch, i)
            weight = 1.0 if risk.loss.reduction == "sum" else float(one.weight)
            out.append((risk.on([one.data]), weight))
    return out


def parted(name: str) -> tuple[cl.Risk, list[tuple[cl.Risk, float]]] | None:
    """A case with its single examples, unless they depend on each other."""
    risk = risk_of(build(name))
    try:
        ones = alone(risk)
        total = sum(float(one.value()) * weight for one, weight in ones if weight)
    except ValueError as reason:
        if "examples" not in str(reason) and "Expected more than 1 value" not in str(reason):
            raise
        return None
    expected = float(risk.value()) * risk.weight()
    return (risk, ones) if abs(total - expected) <= 1e-9 * abs(expected) else None


@pytest.mark.parametrize("name", sorted(CASES))
def test_of_the_whole_table(name: str) -> None:
    found = parted(name)
    if found is None:
        assert name in DEPENDENT, name
        pytest.skip("examples depend on each other")
    risk, ones = found
    before = snapshot(risk.model)
    losses = example_losses(risk)
    before.assert_same(snapshot(risk.model))
    expected = [float(one.value()) * weight if weight else 0.0 for one, weight in ones]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=F64), rtol=1e-9, atol=1e-12)


def test_error_norms_of_each_loss() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, dtype=F64, generator=g)
    net = nn.Linear(3, 4).double()
    y = torch.tensor([0, 3, -100, 1, 2])
    p = net(x).detach().softmax(1)
    expected = [(p[i] - torch.eye(4, dtype=F64)[c]).norm().item() if c >= 0 else 0.0
                for i, c in enumerate(y.tolist())]  # fmt: skip
    found = error_norms(cl.Risk(net, nn.CrossEntropyLoss(), (x, y)))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=F64))
    logs = nn.Sequential(net, nn.LogSoftmax(1))
    torch.testing.assert_close(error_norms(cl.Risk(logs, nn.NLLLoss(), (x, y))), found)
    t = torch.rand(5, 4, dtype=F64, generator=g)
    found = error_norms(cl.Risk(net, nn.MSELoss(), [(x[:2], t[:2]), (x[2:], t[2:])]))
    torch.testing.assert_close(found, (net(x).detach() - t).norm(dim=1))
    found = error_norms(cl.Risk(net, nn.BCEWithLogitsLoss(), (x, t)))
    torch.testing.assert_close(found, (net(x).detach().sigmoid() - t).norm(dim=1))


def test_error_norms_of_sequences() -> None:
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(7, (3, 4), generator=g)

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 7).double()

        def forward(self, t: torch.Tensor) -> torch.Tensor:
            return self.table(t).mT

    model = Words()
    p = model(tokens).detach().softmax(1)
    errors = p - torch.nn.functional.one_hot(tokens, 7).mT
    found = error_norms(cl.Risk(model, nn.CrossEntropyLoss(), (tokens, tokens)))
    torch.testing.assert_close(found, errors.flatten(1).norm(dim=1))


def test_gradient_norms_are_those_of_single_examples() -> None:
    risk = risk_of(build(sorted(CASES)[0]))
    found = gradient_norms(risk, block=2)
    expected = [float(one.gradient().norm()) * weight for one, weight in alone(risk)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=F64), rtol=1e-7, atol=1e-10)


def test_errors() -> None:
    x = torch.ones(2, 1)
    for function in (example_losses, error_norms, gradient_norms):
        with pytest.raises(TypeError, match=f"{function.__name__} takes a Risk, got int"):
            function(3)  # type: ignore[arg-type]  # the wrong type is the point
    odd = cl.Risk(nn.Linear(1, 1), lambda o, t: (o - t).abs().mean(), (x, x))
    with pytest.raises(ValueError, match=r"has no predicted probabilities .* gradient_norms"):
        error_norms(odd)
    broken = cl.Risk(nn.Linear(1, 1), nn.MSELoss(), (x, torch.tensor([[0.0], [float("inf")]])))
    with pytest.raises(FloatingPointError, match="the loss of example 1 is not finite"):
        example_losses(broken)
