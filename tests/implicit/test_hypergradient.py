"""Hypergradients against closed forms, finite differences and unrolled minimization."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from curvlib.core.result import Result
from curvlib.core.structured import Diagonal
from curvlib.implicit.hypergradient import hypergradient
from curvlib.operators.cross_derivative import cross_derivative, first_derivatives

F64 = torch.float64


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


X, Y = _draw(30, 5), _draw(30, seed=1)
V, Z = _draw(20, 5, seed=2), _draw(20, seed=3)
WEIGHTS = torch.tensor([-1.0, 0.3, 0.0, -2.0, 1.0], dtype=F64)  # logarithms of ridge penalties


def ridge(theta: Tensor, hyper: Tensor) -> Tensor:
    return 0.5 * (X @ theta - Y).square().mean() + 0.5 * (hyper.exp() * theta.square()).sum()


def validation(theta: Tensor, hyper: Tensor) -> Tensor:
    return 0.5 * (V @ theta - Z).square().mean() + 0.01 * hyper.sum()


def _minimum(hyper: Tensor) -> Tensor:
    return torch.linalg.solve(X.T @ X / 30 + hyper.exp().diag(), X.T @ Y / 30)


def _closed_form(hyper: Tensor) -> Tensor:
    """By differentiating the closed form of ridge regression itself."""
    leaf = hyper.clone().requires_grad_()
    (g,) = torch.autograd.grad(validation(_minimum(leaf), leaf), leaf)
    return g


METHODS = [
    {"method": "cg"},
    {"method": "minres"},
    {"method": "neumann", "max_products": 5000},
    {"method": "cg", "preconditioner": Diagonal(X.square().mean(0) + WEIGHTS.exp())},
    {"method": "cg", "preconditioner": 3},
    {},
]


@pytest.mark.parametrize("how", METHODS, ids=str)
def test_ridge_in_closed_form(how: dict) -> None:
    theta = _minimum(WEIGHTS)
    found = hypergradient(validation, ridge, theta, WEIGHTS, tolerance=1e-12, **how)
    expected = _closed_form(WEIGHTS)
    assert (found.value - expected).norm() <= 1e-9 * expected.norm()
    assert found.converged
    assert found.residual <= 1e-12
    assert found.stationarity <= 1e-12
    assert found.method == how.get("method", "minres")
    assert torch.equal(found.direct, torch.full((5,), 0.01, dtype=F64))
    assert found.adjoint.shape == (5,)


def test_truncated_neumann_is_its_sum() -> None:
    theta = _minimum(WEIGHTS)
    H = X.T @ X / 30 + WEIGHTS.exp().diag()
    b = V.T @ (V @ theta - Z) / 20
    scale = 0.1
    expected = torch.zeros_like(b)
    for _ in range(7):
        expected = scale * b + (torch.eye(5, dtype=F64) - scale * H) @ expected
    found = hypergradient(validation, ridge, theta, WEIGHTS, method="neumann", terms=7, scale=scale)
    assert torch.allclose(found.adjoint, expected, rtol=1e-12)
    assert not found.converged
    assert found.residual > 0.01


def test_against_central_differences_of_a_nonlinear_minimum() -> None:
    def inner(theta: Tensor, hyper: Tensor) -> Tensor:
        smooth = torch.nn.functional.softplus(X @ theta).mean()
        return smooth + (hyper[0] * theta.pow(4) + hyper[1].exp() * theta.square()).sum()

    def outer(theta: Tensor, hyper: Tensor) -> Tensor:
        return (V @ theta).tanh().square().mean() + hyper[0] * theta.sum()

    def minimize(hyper: Tensor) -> Tensor:
        theta = torch.zeros(5, dtype=F64)
        for _ in range(60):  # Newton
            g, _ = first_derivatives(inner, theta, hyper)
            H = torch.autograd.functional.hessian(lambda t: inner(t, hyper), theta)
            theta = theta - torch.linalg.solve(H, g)
        return theta

    hyper = torch.tensor([0.5, -1.0], dtype=F64)
    expected = []
    for i in range(2):
        step = torch.zeros(2, dtype=F64)
        step[i] = 1e-5
        high, low = hyper + step, hyper - step
        change = outer(minimize(high), high) - outer(minimize(low), low)
        expected.append(float(change) / 2e-5)
    found = hypergradient(outer, inner, minimize(hyper), hyper, tolerance=1e-11)
    assert torch.allclose(found.value, torch.tensor(expected, dtype=F64), rtol=1e-7)


def test_against_unrolled_gradient_descent() -> None:
    hyper = WEIGHTS.clone().requires_grad_()
    theta = torch.zeros(5, dtype=F64, requires_grad=True)
    for _ in range(400):
        (g,) = torch.autograd.grad(ridge(theta, hyper), theta, create_graph=True)
        theta = theta - 0.2 * g
    (expected,) = torch.autograd.grad(validation(theta, hyper), hyper)
    found = hypergradient(validation, ridge, theta.detach(), WEIGHTS, tolerance=1e-12)
    assert torch.allclose(found.value, expected, rtol=1e-8)


def test_given_hessian_and_damping() -> None:
    theta = _minimum(WEIGHTS)
    H = Diagonal(torch.full((5,), 2.0, dtype=F64))
    found = hypergradient(validation, ridge, theta, WEIGHTS, hessian=H, damping=0.5)
    b = V.T @ (V @ theta - Z) / 20
    assert found.method == "direct"
    assert torch.allclose(found.adjoint, b / 2.5)
    assert torch.allclose(found.value, 0.01 - WEIGHTS.exp() * theta * b / 2.5)


def test_shapes_and_files(tmp_path: Path) -> None:
    theta, hyper = torch.zeros(2, 3, dtype=F64), torch.ones(3, 1, dtype=F64)
    found = hypergradient(
        lambda t, h: (t - 1.0).square().sum(),
        lambda t, h: 0.5 * (t - (h.T - 1.0)).square().sum(),
        theta,
        hyper,
    )
    # theta* is h - 1 in both rows: 2 (0 - 1) from each
    assert torch.allclose(found.value, torch.full((3, 1), -4.0, dtype=F64))
    loaded = Result.load(found.save(tmp_path / "h.safetensors"))
    assert torch.equal(loaded.value, found.value)


def test_nothing_to_respond() -> None:
    """An outer function of the hyperparameters alone has its own gradient."""
    theta = _minimum(WEIGHTS)
    found = hypergradient(lambda t, h: h.square().sum(), ridge, theta, WEIGHTS)
    assert torch.equal(found.value, 2 * WEIGHTS)
    assert found.converged


def test_resumes_only_its_own_problem(tmp_path: Path) -> None:
    path = tmp_path / "h.safetensors"
    theta = _minimum(WEIGHTS)
    first = hypergradient(validation, ridge, theta, WEIGHTS, checkpoint=path)
    again = hypergradient(validation, ridge, theta, WEIGHTS, checkpoint=path)
    assert torch.equal(first.value, again.value)
    with pytest.raises(ValueError, match="is of another problem"):
        hypergradient(validation, ridge, theta, WEIGHTS + 1.0, checkpoint=path)


# ------------------------------------------------------------ mixed derivatives
def test_cross_derivative_and_its_transpose() -> None:
    def fn(theta: Tensor, hyper: Tensor) -> Tensor:
        return (theta.sin().sum() * hyper.exp().sum()) + (theta[:2] * hyper.square()).sum()

    theta, hyper = _draw(4, seed=5), _draw(2, seed=6)
    op = cross_derivative(fn, theta, hyper)
    whole = torch.autograd.functional.hessian(lambda z: fn(z[:4], z[4:]), torch.cat([theta, hyper]))
    assert op.shape == (2, 4)
    assert torch.allclose(op.to_dense(), whole[4:, :4], rtol=1e-13)
    assert torch.allclose(op.T.to_dense(), whole[:4, 4:], rtol=1e-13)


def test_separate_functions_have_no_mixed_derivative() -> None:
    op = cross_derivative(lambda t, h: t.sum() + h.square().sum(), torch.ones(3), torch.ones(2))
    assert torch.equal(op.to_dense(), torch.zeros(2, 3))


def test_first_derivatives() -> None:
    theta, hyper = _draw(3, 2), _draw(2, seed=1)
    g, h = first_derivatives(lambda t, h: (t * h).square().sum(), theta, hyper)
    assert torch.allclose(g, (2 * theta * hyper.square()).reshape(-1))
    assert torch.allclose(h, 2 * hyper * theta.square().sum(0))


# ---------------------------------------------------------------------- errors
def test_misuse() -> None:
    one = torch.ones(2)
    with pytest.raises(TypeError, match=r"theta= needs a real floating-point tensor, got list"):
        hypergradient(validation, ridge, [1.0], one)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"hyper= needs a real .* got torch\.int64"):
        hypergradient(validation, ridge, one, torch.tensor([1]))
    with pytest.raises(TypeError, match="outer= needs a function of two tensors, got float"):
        hypergradient(1.0, ridge, one, one)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="inner should return a scalar tensor, got float"):
        hypergradient(lambda t, h: t.sum(), lambda t, h: 1.0, one, one)
    with pytest.raises(ValueError, match=r"outer should return a scalar, got shape \[2\]"):
        hypergradient(lambda t, h: t, lambda t, h: t.sum(), one, one)
    with pytest.raises(ValueError, match=r"outer\(theta, hyper\) depends on neither"):
        hypergradient(lambda t, h: t.detach().sum(), lambda t, h: t.sum(), one, one)
    with pytest.raises(TypeError, match=r"theta and hyper of one type, got torch\.float32 and"):
        cross_derivative(lambda t, h: t.sum() * h.sum(), one, one.double())
    with pytest.raises(TypeError, match="hessian= takes a LinearOperator, got Tensor"):
        hypergradient(lambda t, h: t.sum(), lambda t, h: t @ h, one, one, hessian=torch.eye(2))
    with pytest.raises(ValueError, match=r"expected hessian= of shape \(2, 2\), got \(3, 3\)"):
        hypergradient(
            lambda t, h: t.sum(), lambda t, h: t @ h, one, one, hessian=Diagonal(torch.ones(3))
        )
    with pytest.raises(ValueError, match="does not depend on x"):
        hypergradient(lambda t, h: t.sum(), lambda t, h: h.sum(), one, one)


def test_devices_must_agree() -> None:
    with pytest.raises(
        ValueError, match="expected theta and hyper on one device, got cpu and meta"
    ):
        cross_derivative(
            lambda t, h: t.sum() * h.sum(), torch.ones(2), torch.ones(2, device="meta")
        )


def test_not_finite() -> None:
    zero = torch.zeros(1, dtype=F64)
    with pytest.raises(FloatingPointError, match="the gradient of outer with respect to theta is"):
        hypergradient(lambda t, h: t.sqrt().sum(), lambda t, h: (t * h).sum(), zero, zero)
    op = cross_derivative(lambda t, h: (t.sqrt() * h).sum(), zero, zero + 1.0)
    with pytest.raises(FloatingPointError, match="the mixed second derivative of fn is not finite"):
        op @ torch.ones(1, dtype=F64)


def test_failed_solves_say_so() -> None:
    theta = torch.zeros(2, dtype=F64)
    saddle = torch.tensor([1.0, -1.0], dtype=F64)
    with pytest.raises(RuntimeError, match=r"has curvature -\d"):
        hypergradient(
            lambda t, h: t[0] + 2 * t[1],
            lambda t, h: (h * t.square()).sum(),
            theta,
            saddle,
            method="cg",
        )
    with pytest.warns(RuntimeWarning, match="did not converge by minres"):
        found = hypergradient(
            lambda t, h: t.sum(), lambda t, h: (h * t.square()).sum(), theta, 0.0 * saddle
        )
    assert not found.converged
    assert math.isclose(found.residual, 1.0)
