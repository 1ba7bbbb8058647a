"""Products that carry a graph: third derivatives, checked by central differences in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import curvlib as cl
from curvlib.operators.hessian_gradient import hessian_gradient_product

F64 = torch.float64


class Instance(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(2, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.reshape(-1, 2, 3)).flatten(1)


NORMS = {
    "none": nn.Identity,
    "layer": lambda: nn.LayerNorm(6),
    "layer without bias": lambda: nn.LayerNorm((6,), bias=False),
    "group": lambda: nn.GroupNorm(2, 6),
    "batch": lambda: nn.BatchNorm1d(6),
    "batch eval": lambda: nn.BatchNorm1d(6).eval(),
    "instance": Instance,
    "rms": lambda: nn.RMSNorm(6),
}


def _risk(norm: str, split: int = 12) -> cl.Risk:
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), NORMS[norm](), nn.Tanh(), nn.Linear(6, 3)).to(F64)
        for p in model.parameters():
            p.data += 0.1 * torch.randn(p.shape, dtype=F64, generator=generator)
    x = torch.randn(12, 4, dtype=F64, generator=generator)
    y = torch.randint(0, 3, (12,), generator=generator)
    batches = [(x[:split], y[:split])] + ([(x[split:], y[split:])] if split < 12 else [])
    return cl.Risk(model, nn.CrossEntropyLoss(), batches)


def _derivative(risk: cl.Risk, direction: Tensor, value) -> float:
    """Central difference of fourth order of ``value()`` along a direction; undone afterwards."""
    params, before = list(risk.params.values()), [p.detach().clone() for p in risk.params.values()]
    h, ends = 2e-5, []
    for step in (1, -1, 2, -2):
        for p, start, d in zip(params, before, risk.space.split(direction), strict=True):
            p.data.copy_(start + step * h * d)
        ends.append(float(value()))
    for p, start in zip(params, before, strict=True):
        p.data.copy_(start)
    return (8 * (ends[0] - ends[1]) - (ends[2] - ends[3])) / (12 * h)


def _direction(risk: cl.Risk) -> Tensor:
    return torch.randn(risk.space.size, dtype=F64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("norm", NORMS)
def test_penalties_on_the_product_have_right_gradients(norm: str):
    risk = _risk(norm)
    d = _direction(risk)
    penalty = hessian_gradient_product(risk, differentiable=True).square().sum()
    parts = torch.autograd.grad(penalty, list(risk.params.values()))
    expected = _derivative(risk, d, lambda: hessian_gradient_product(risk).square().sum())
    assert float(risk.space.join(parts) @ d) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("split", [12, 7])
def test_values_agree_with_and_without_graph(split: int):
    risk = _risk("layer", split)
    plain = hessian_gradient_product(risk)
    graph = hessian_gradient_product(risk, differentiable=True)
    assert graph.requires_grad
    assert not plain.requires_grad
    torch.testing.assert_close(graph.detach(), plain, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(plain, cl.hessian(risk) @ risk.gradient(), rtol=0, atol=0)


def test_half_the_squared_gradient_norm_has_this_gradient():
    """An oracle without Hessians: H g is the gradient of |g|^2 / 2."""
    risk = _risk("layer", 7)
    d = _direction(risk)
    expected = _derivative(risk, d, lambda: 0.5 * risk.gradient().square().sum())
    assert float(hessian_gradient_product(risk) @ d) == pytest.approx(expected, rel=1e-7)


def test_products_with_a_graph_of_a_block():
    risk = _risk("layer", 7)
    H = cl.hessian(risk)
    V = torch.stack([_direction(risk), risk.gradient()], dim=1)
    product = H.differentiable_matmat(V)
    torch.testing.assert_close(product.detach(), H @ V, rtol=1e-10, atol=1e-12)
    d = _direction(risk)
    parts = torch.autograd.grad((V * product).sum(), list(risk.params.values()))
    expected = _derivative(risk, d, lambda: torch.sum(V * (H @ V)))
    assert float(risk.space.join(parts) @ d) == pytest.approx(expected, rel=1e-6)


def test_a_training_step_through_the_penalty_leaves_the_rest_alone():
    risk = _risk("batch")
    statistics = [b.clone() for b in risk.model.buffers()]
    hessian_gradient_product(risk, differentiable=True).square().sum().backward()
    assert all(p.grad is not None for p in risk.params.values())
    assert all(torch.equal(a, b) for a, b in zip(statistics, risk.model.buffers(), strict=True))


def test_functions_of_a_tensor_have_products_with_a_graph():
    x = torch.tensor([0.5, -1.0, 2.0], dtype=F64, requires_grad=True)
    op = cl.hessian_of(lambda t: (t**4).sum() + t.prod(), x)
    V = torch.tensor([[1.0], [2.0], [-1.0]], dtype=F64)
    product = op.differentiable_matmat(V)
    torch.testing.assert_close(product.detach(), op @ V)
    (third,) = torch.autograd.grad((V * product).sum(), x)
    expected = 24 * x.detach() * V[:, 0] ** 2 + 2 * torch.tensor([-2.0, -1.0, 2.0], dtype=F64)
    torch.testing.assert_close(third, expected)


def test_operators_without_a_graph_say_so():
    with pytest.raises(TypeError, match=r"carry no graph; curvlib\.hessian\(risk\)"):
        cl.ggn(_risk("none")).differentiable_matmat(torch.ones(1, 1, dtype=F64))
