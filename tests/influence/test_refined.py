"""Refined inverses, damping of a run, and another damping without another fit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import curvlib as cl
from curvlib.influence.horizon import training_damping
from curvlib.influence.influence import Influence
from curvlib.influence.refined import refined

F64 = torch.float64


def risk() -> cl.Risk:
    g = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=F64))
    x = torch.randn(40, 4, dtype=F64, generator=g)
    return cl.Risk(model, nn.CrossEntropyLoss(), (x, torch.randint(3, (40,), generator=g)))


def test_refined_scores_are_those_of_the_exact_ggn() -> None:
    own = risk()
    rows = torch.cat(list(cl.gradients(own)))
    G = cl.ggn(own).to_dense()
    damping = 0.1 * float(G.trace()) / len(G)
    expected = rows[:5] @ torch.linalg.solve(G + damping * torch.eye(len(G), dtype=F64), rows.mT)
    queries = (own.data[0][:5], own.data[1][:5])
    curvature = refined(own, tolerance=1e-10, iterations=500)
    found = Influence.of(own, curvature, progress=False).scores(queries).scores
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    plain = Influence.of(own, progress=False).scores(queries).scores
    assert float((plain - expected).norm() / expected.norm()) > 1e-3  # EK-FAC alone is not exact
    few = refined(own, cl.kfac(own), tolerance=1e-10, iterations=4)
    partly = Influence.of(own, few, progress=False).scores(queries).scores
    assert float((partly - expected).norm()) < float((plain - expected).norm())
    assert 0 < few.products <= 5 * 8
    assert float(curvature.trace()) == pytest.approx(float(G.trace()))
    v = torch.ones(len(G), 2, dtype=F64)
    torch.testing.assert_close(curvature @ v, G @ v)


def test_bad_refinement() -> None:
    own = risk()
    with pytest.raises(TypeError, match="refined takes a Risk, got int"):
        refined(3)  # type: ignore[arg-type]  # the wrong type is the point
    with pytest.raises(ValueError, match="tolerance= is between 0 and 1, got 2"):
        refined(own, tolerance=2.0)
    with pytest.raises(ValueError, match="iterations= needs a positive number, got 0"):
        refined(own, iterations=0)
    K = cl.kfac(own)
    with pytest.raises(ValueError, match="got one and {'samples': 2}"):
        refined(own, K, samples=2)
    other = own.on((own.data[0][:7], own.data[1][:7]))
    with pytest.raises(ValueError, match="was fitted on another risk"):
        refined(other, K)


# ------------------------------------------------------------------------- damping
def test_another_damping_needs_no_other_fit() -> None:
    own = risk()
    first = Influence.of(own, progress=False)
    queries = (own.data[0][:3], own.data[1][:3])
    before = first.scores(queries).scores
    again = first.damped(1.5).scores(queries)
    fresh = Influence.of(own, damping=1.5, progress=False).scores(queries)
    assert torch.equal(again.scores, fresh.scores)
    assert again.damping == 1.5
    absolute = first.damped(0.2, relative=False).scores(queries)
    truth = Influence.of(own, damping=0.2, relative=False, progress=False).scores(queries)
    assert torch.equal(absolute.scores, truth.scores)
    assert torch.equal(first.scores(queries).scores, before)
    with pytest.raises(ValueError, match="damping= is a finite number, at least 0, got -1"):
        first.damped(-1.0)
    with pytest.raises(TypeError, match="damping= is a number, got str"):
        first.damped("much")  # type: ignore[arg-type]  # the wrong type is the point


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-6, 1.0), st.integers(1, 5000), st.floats(1e-3, 0.3))
def test_damping_stands_for_a_finite_run(sharp: float, steps: int, lr: float) -> None:
    """Against the exact response of gradient descent on a quadratic."""
    sigma = sharp / lr  # lr * sigma <= 1
    exact = -math.expm1(steps * math.log1p(-min(sharp, 1 - 1e-12))) / sigma
    damped = 1.0 / (sigma + training_damping(lr, steps))
    assert 0.999 < exact / damped < 1.3 * (1.0 + sharp)


def test_momentum_and_decay_by_simulation() -> None:
    """Heavy ball on quadratics: flat directions move by lr T / (1 - beta) per unit of gradient."""
    lr, beta, decay, T = 0.05, 0.9, 2e-3, 4000
    theta, v = 0.0, 0.0
    for _ in range(T):  # gradient -1, no curvature but the decay
        v = beta * v + (-1.0 + decay * theta)
        theta -= lr * v
    assert theta == pytest.approx(1.0 / training_damping(lr, T, momentum=beta, weight_decay=decay),
                                  rel=0.3)  # fmt: skip
    flat = 0.0
    v = 0.0
    for _ in range(T):
        v = beta * v - 1.0
        flat -= lr * v
    assert flat == pytest.approx(1.0 / training_damping(lr, T, momentum=beta), rel=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr= needs a positive number, got 0"),
        ({"steps": 0}, "steps= needs a positive number, got 0"),
        ({"momentum": 1.0}, "momentum= is at least 0 and below 1, got 1"),
        ({"weight_decay": -1.0}, "weight_decay= is at least 0, got -1"),
        ({"lr": float("nan")}, "lr= needs a positive number, got nan"),
    ],
)
def test_bad_runs(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training_damping(**({"lr": 0.1, "steps": 10} | options))  # type: ignore[arg-type]  # mixed
