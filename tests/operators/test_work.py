"""How much work products are: floating-point operations in gradients, passes, and memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import curvlib as cl
from tests import models
from tests.cases import build
from tests.problems import OPERATORS, Counting, columns, risk_of

pytestmark = pytest.mark.filterwarnings("ignore:curvlib. .*:UserWarning")


def _problems() -> dict[str, tuple[nn.Module, tuple[Tensor, Tensor], dict[str, Any]]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mlp = nn.Sequential(
            nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10)
        )
        conv = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2),
            nn.GELU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.GELU(),
            nn.AvgPool2d(4),
            nn.Flatten(),
            nn.Linear(32, 10),
        )
        gpt = models.GPT(vocabulary=32, length=16, width=32, heads=4, hidden=128, depth=2)
        tokens = {"forward": lambda m, b: m(b[0]).flatten(0, 1), "target": lambda b: b[1].flatten()}
        return {
            "mlp": (mlp, (torch.randn(32, 64), torch.randint(10, (32,))), {}),
            "conv": (conv, (torch.randn(8, 3, 8, 8), torch.randint(10, (8,))), {}),
            "gpt": (gpt, (torch.randint(32, (4, 16)), torch.randint(32, (4, 16))), tokens),
        }


def _flops(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def _gradient(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    """One gradient, as a user writes it, with the attention kernel that has two derivatives."""
    x, y = batch
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = model(x)
        loss = F.cross_entropy(out.flatten(0, -2), y.flatten())
        torch.autograd.grad(loss, list(model.parameters()))


class Problem:
    """A model with a loader (whose graphs are not kept) and a batch in memory (kept)."""

    def __init__(self, name: str) -> None:
        model, batch, settings = _problems()[name]
        self.gradient = _flops(lambda: _gradient(model, batch))
        self.streamed = cl.Risk(model, nn.CrossEntropyLoss(), Counting([batch]), **settings)
        self.held = cl.Risk(model, nn.CrossEntropyLoss(), batch, **settings)
        self.size = self.held.space.size

    def cost(self, op: cl.LinearOperator, count: int) -> float:
        """Work of a block product, in gradients for each column."""
        V = columns(self.size, count, dtype=torch.float32)
        return _flops(lambda: op @ V) / self.gradient / count


@pytest.fixture(params=["mlp", "conv", "gpt"])
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param)


def test_the_gradient_is_one_gradient(problem: Problem) -> None:
    assert _flops(problem.held.gradient) == problem.gradient


def test_hessian_products(problem: Problem) -> None:
    op = cl.hessian(problem.streamed)
    assert problem.cost(op, 1) <= 3.1
    assert problem.cost(op, 1) <= 3.1  # nothing is done once that is not done again
    for count in (8, 11, 32):
        assert problem.cost(op, count) <= 2.2


def test_hessian_products_on_data_in_memory(problem: Problem) -> None:
    op = cl.hessian(problem.held)
    assert problem.cost(op, 1) <= 3.1  # builds the graph
    assert problem.cost(op, 1) <= 2.2  # uses it again
    assert problem.cost(op, 8) <= 2.2


def test_no_memory_keeps_no_graph(problem: Problem) -> None:
    op = cl.hessian(problem.held, memory=0)
    for _ in range(2):
        assert 2.5 < problem.cost(op, 1) <= 3.1
    assert problem.cost(op, 8) <= 2.2


def test_ggn_products(problem: Problem) -> None:
    op = cl.ggn(problem.streamed)
    assert problem.cost(op, 1) <= 1.75
    assert problem.cost(op, 1) <= 1.75
    for count in (8, 11, 32):
        assert problem.cost(op, count) <= 1.45


@pytest.mark.parametrize("kind", ["type2", "empirical"])
def test_fisher_products(problem: Problem, kind: str) -> None:
    op = cl.fisher(problem.streamed, kind=kind)
    assert problem.cost(op, 1) <= 2.1
    assert problem.cost(op, 8) <= 1.7


@pytest.mark.parametrize("operator", OPERATORS)
def test_passes_over_the_data(operator: str) -> None:
    case = build("mlp ce")
    data = Counting(case.data)
    op = OPERATORS[operator].make(cl.Risk(case.model, case.loss, data))
    assert data.passes == 0, "a pass at construction"
    (2 * op).shift(1), op.T, repr(op), op.blocks(), op.fingerprint()
    assert data.passes == 0
    P = op.shape[1]
    for i, count in enumerate((1, 8, 40)):
        op @ columns(P, count)
        assert data.passes == i + 1, "one pass for each block product"
        assert data.batches == len(case.data) * (i + 1)
    op @ columns(P, 0)
    assert data.passes == 3


def test_forward_passes_of_a_hessian_product() -> None:
    """One forward pass for each batch and product, none while the graph is kept."""
    case = build("mlp ce")
    calls = []
    case.model.register_forward_hook(lambda *_: calls.append(1))
    op = cl.hessian(risk_of(case))
    op @ columns(op.shape[1], 20)
    assert len(calls) == len(case.data)
    op @ columns(op.shape[1], 2)
    assert len(calls) == len(case.data)


@pytest.mark.parametrize("operator", OPERATORS)
def test_memory_does_not_grow_with_the_columns(operator: str) -> None:
    """Beyond the vectors, 64 columns take what 16 take."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
        batch = (torch.randn(512, 32), torch.randint(4, (512,)))
    op = OPERATORS[operator].make(cl.Risk(model, nn.CrossEntropyLoss(), Counting([batch])))
    P = op.shape[1]

    def extra(count: int) -> int:
        V = columns(P, count, dtype=torch.float32)
        op @ V
        with torch.profiler.profile(profile_memory=True) as profile:
            op @ V
        level = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                level += event.nbytes()
                peak = max(peak, level)
        return peak - 2 * V.numel() * 4

    few, many = extra(16), extra(128)
    assert few > 0
    assert many <= 1.25 * few
