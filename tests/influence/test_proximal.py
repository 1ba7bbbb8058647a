"""The proximal response: closed form on linear regression, influence to first order elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import curvlib as cl
from curvlib.influence.proximal import ProximalResponse, proximal_response
from curvlib.operators.bregman import BregmanObjective, divergence
from curvlib.operators.gradients import gradients
from tests.problems import snapshot

F64 = torch.float64


def regression() -> cl.Risk:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, dtype=F64, generator=g)
    y = torch.randn(30, 1, dtype=F64, generator=g)
    return cl.Risk(nn.Linear(4, 1, bias=False).double(), nn.MSELoss(), (x, y))


def network(loss: nn.Module, targets: Tensor, outputs: int) -> cl.Risk:
    g = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, outputs)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=F64) * 0.5)
    x = torch.randn(len(targets), 5, dtype=F64, generator=g)
    half = len(targets) // 3
    return cl.Risk(model, loss, [(x[:half], targets[:half]), (x[half:], targets[half:])])


def losses() -> list[tuple[nn.Module, Tensor, int]]:
    g = torch.Generator().manual_seed(2)
    classes = torch.randint(3, (21,), generator=g)
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=F64)
    return [
        (nn.CrossEntropyLoss(weight=weight), classes, 3),
        (nn.MSELoss(), torch.randn(21, 2, dtype=F64, generator=g), 2),
        (nn.BCEWithLogitsLoss(), torch.rand(21, 2, dtype=F64, generator=g), 2),
        (nn.MSELoss(reduction="sum"), torch.randn(21, 2, dtype=F64, generator=g), 2),
    ]


def test_closed_form_of_linear_regression() -> None:
    risk = regression()
    x, y = risk.data
    w = risk.model.weight.detach()[0]
    queries = risk.on((x[:7], y[:7]))
    found = proximal_response(risk, [2, 11], queries, damping=0.3, tolerance=1e-10)
    W, lam = 30.0, 0.3
    for column, m in enumerate([2, 11]):
        A = (
            (2.0 / W) * x.mT @ x
            + lam * torch.eye(4, dtype=F64)
            - (2.0 / W) * torch.outer(x[m], x[m])
        )
        b = (2.0 / W) * (x[m] @ w - y[m, 0]) * x[m]
        moved = w + torch.linalg.solve(A, b)
        change = (x[:7] @ moved - y[:7, 0]) ** 2 - (x[:7] @ w - y[:7, 0]) ** 2
        torch.testing.assert_close(found.change[:, column], change, rtol=1e-6, atol=1e-9)
    assert bool((found.residual <= 1e-10).all())


@pytest.mark.parametrize(("loss", "targets", "outputs"), losses())
def test_to_first_order_it_is_influence_with_the_damped_ggn(
    loss: nn.Module, targets: Tensor, outputs: int
) -> None:
    risk = network(loss, targets, outputs)
    before = snapshot(risk.model)
    queries = risk.on([(x[:4], y[:4]) for x, y in risk.data])
    rows = torch.cat(list(gradients(risk)))
    asked = torch.cat(list(gradients(queries)))
    G = cl.ggn(risk).to_dense() + 0.2 * torch.eye(rows.shape[1], dtype=F64)
    influence = asked @ torch.linalg.solve(G, rows[[1, 9]].mT) / risk.weight()
    found = proximal_response(risk, [1, 9], queries, damping=0.2, epsilon=-1e-5, tolerance=1e-9)
    torch.testing.assert_close(found.change, influence, rtol=2e-3, atol=1e-6)
    before.assert_same(snapshot(risk.model))


@pytest.mark.parametrize(("loss", "targets", "outputs"), losses())
def test_the_divergence_has_the_ggn_as_its_hessian(
    loss: nn.Module, targets: Tensor, outputs: int
) -> None:
    risk = network(loss, targets, outputs)
    objective = BregmanObjective(risk, 0.1)
    term = objective.example(0)
    P = risk.space.size
    value, gradient = objective.at(torch.zeros(P, dtype=F64), term, 0.0)
    assert value == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(gradient, torch.zeros(P, dtype=F64), atol=1e-12, rtol=0.0)
    h = 1e-5
    rows = []
    for i in range(P):
        step = torch.zeros(P, dtype=F64)
        step[i] = h
        ends = objective.at(step, term, 0.0)[1], objective.at(-step, term, 0.0)[1]
        rows.append((ends[0] - ends[1]) / (2 * h))
    expected = cl.ggn(risk).to_dense() + 0.1 * torch.eye(P, dtype=F64)
    torch.testing.assert_close(torch.stack(rows), expected, rtol=1e-5, atol=1e-7)
    assert float(divergence(risk.loss, torch.ones(1, 3).double(), torch.ones(1, 3).double(),
                            torch.tensor([0]) if outputs == 3 else torch.ones(1, 3).double()
                            )) == 0.0  # fmt: skip


def test_bad_input() -> None:
    risk = regression()
    with pytest.raises(TypeError, match="queries= takes a Risk, got int"):
        proximal_response(risk, [0], 3, damping=0.1)  # type: ignore[arg-type]  # the wrong type
    with pytest.raises(ValueError, match="damping= needs a positive number, got 0"):
        proximal_response(risk, [0], risk, damping=0)
    with pytest.raises(ValueError, match="epsilon= needs a number other than 0"):
        proximal_response(risk, [0], risk, damping=1.0, epsilon=0.0)
    with pytest.raises(ValueError, match="expected an example from 0 to 29, got 30"):
        proximal_response(risk, [30], risk, damping=1.0)
    with pytest.raises(RuntimeError, match=r"left a gradient of .* after 1 steps"):
        proximal_response(risk, [0], risk, damping=0.001, steps=1, tolerance=1e-12)
    x, y = risk.data
    odd = cl.Risk(risk.model, lambda o, t: (o - t).abs().mean(), (x, y))
    with pytest.raises(ValueError, match="has no Bregman divergence that curvlib knows"):
        proximal_response(odd, [0], odd, damping=0.1)
    streamed = cl.Risk(risk.model, nn.MSELoss(), torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), batch_size=10))  # fmt: skip
    with pytest.raises(ValueError, match="pass data in memory"):
        proximal_response(streamed, [0], risk, damping=0.1)


def test_saved(tmp_path: object) -> None:
    risk = regression()
    found = proximal_response(risk, [0], risk.on((risk.data[0][:2], risk.data[1][:2])), damping=1.0)
    path = found.save(f"{tmp_path}/p.safetensors")
    assert torch.equal(ProximalResponse.load(path).change, found.change)
