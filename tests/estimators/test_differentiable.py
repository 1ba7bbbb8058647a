"""Diagonals that carry a graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import curvlib as cl
from curvlib.estimators.diagonal import diagonal
from curvlib.estimators.differentiable import diagonal_with_graph

F64 = torch.float64


def _risk() -> cl.Risk:
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)).to(F64)
    x = torch.randn(9, 3, dtype=F64, generator=generator)
    return cl.Risk(model, nn.CrossEntropyLoss(), (x, torch.arange(9) % 2))


def _estimate(risk: cl.Risk, count: int = 3, law: str = "rademacher") -> tuple:
    op = cl.hessian(risk)
    return diagonal_with_graph(op, law=law, count=count, generator=None, seed=4)


@pytest.mark.parametrize("law", ["rademacher", "gaussian"])
def test_gradients_through_the_diagonal(law: str):
    risk = _risk()
    params = list(risk.params.values())
    value, _ = _estimate(risk, law=law)
    gradient = risk.space.join(torch.autograd.grad(value.square().sum(), params))
    d = torch.randn(risk.space.size, dtype=F64, generator=torch.Generator().manual_seed(2))
    before, ends = [p.detach().clone() for p in params], []
    for step in (1e-5, -1e-5):
        for p, start, part in zip(params, before, risk.space.split(d), strict=True):
            p.data.copy_(start + step * part)
        ends.append(float(_estimate(risk, law=law)[0].detach().square().sum()))
    assert float(gradient @ d) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


def test_values_and_errors_are_those_of_the_probes():
    risk = _risk()
    value, stderr = _estimate(risk, count=400)
    truth = cl.hessian(risk).to_dense().diagonal()
    z = (value.detach() - truth) / stderr
    assert not stderr.requires_grad
    assert float(z.abs().max()) < 4.5
    assert 0.6 < float(z.square().mean()) < 1.6


def test_the_diagonal_keeps_its_graph_when_asked():
    risk = _risk()
    H = cl.hessian(risk)
    estimate = diagonal(H, differentiable=True, probes=3, seed=4)
    torch.testing.assert_close(estimate.value, _estimate(risk)[0], rtol=0, atol=0)
    assert estimate.products == 3
    estimate.value.square().sum().backward()
    assert all(p.grad is not None for p in risk.params.values())
    plain = diagonal(H, method="hutchinson", probes=3, seed=4)
    torch.testing.assert_close(plain.value, estimate.value.detach(), rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="differentiable=True is for method='hutchinson'"):
        diagonal(H, differentiable=True, method="xdiag")


def test_refusals():
    op = cl.hessian(_risk())
    with pytest.raises(ValueError, match="expected probes >= 1, got 0"):
        diagonal_with_graph(op, law="rademacher", count=0, generator=None, seed=0)
    with pytest.raises(TypeError, match="carry no graph"):
        diagonal_with_graph(cl.ggn(_risk()), law="rademacher", count=1, generator=None, seed=0)
    _, stderr = _estimate(_risk(), count=1)
    assert torch.isnan(stderr).all()
