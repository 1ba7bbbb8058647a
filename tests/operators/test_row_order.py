"""Whose rows are whose: transformers with time first, folded rows, batch statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from curvlib.operators.layers.row_order import order_of
from curvlib.optim.kfac import KFAC

F64 = torch.float64
EVERY: dict[str, Any] = {
    "lr": 0.02,
    "damping": 0.01,
    "factor_interval": 1,
    "inverse_interval": 2,
}


def seeded(make: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double()


class Sequences(nn.Module):
    """Embeddings, a transformer, a norm and a head; inside, time may come first."""

    def __init__(self, time_first: bool) -> None:
        super().__init__()
        self.time_first = time_first
        self.table = nn.Embedding(7, 4)
        own = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=not time_first)
        self.encoder = nn.TransformerEncoder(own, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x.T if self.time_first else x)
        out = self.head(self.norm(self.encoder(x)))
        return out.transpose(0, 1) if self.time_first else out


def tokens(n: int, t: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(n + 10 * t)
    return torch.randint(7, (n, t), generator=g), torch.randint(3, (n, t), generator=g)


def steps(model: nn.Module, data: list[tuple[Tensor, Tensor]], **options: Any) -> KFAC:
    opt = KFAC(model, **EVERY, **options)
    with sdpa_kernel(SDPBackend.MATH):
        for x, y in data:
            opt.step(lambda x=x, y=y: F.cross_entropy(model(x).flatten(0, -2), y.flatten()))
    assert opt.skipped == 0
    return opt


@pytest.mark.parametrize(
    "options",
    [{}, {"eigen_corrected": True}, {"sharing": "reduce"}, {"dense_norms": True}],
    ids=str,
)
@pytest.mark.parametrize("sizes", [[(2, 4), (3, 4)], [(4, 4), (2, 4)], [(3, 4), (4, 8), (1, 2)]])
def test_time_first_is_batch_first(sizes: list[tuple[int, int]], options: dict[str, Any]) -> None:
    """Also where there are as many steps as examples, or a multiple."""
    data = [tokens(n, t) for n, t in sizes]
    found = []
    for time_first in (True, False):
        model = seeded(lambda time_first=time_first: Sequences(time_first))
        opt = steps(model, data, **options)
        assert opt.coverage().percent == 100.0
        assert not opt.recorder.order.open
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-10)


class Folded(nn.Module):
    """Rows are folded, time by time."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        rows = self.norm(self.inner(x.transpose(0, 1).flatten(0, 1)))
        return self.head(rows.view(t, n, 4).mean(0))


def test_rows_in_another_order_have_no_factor_and_a_reason() -> None:
    model, x = seeded(Folded), torch.randn(4, 8, 3, dtype=F64)
    y = torch.tensor([0, 1, 1, 0])
    before = [p.detach().clone() for p in model.parameters()]
    opt = steps(model, [(x, y)] * 2)
    uncovered = opt.coverage().uncovered
    assert set(uncovered) == {"norm.weight", "norm.bias"}  # all rows are enough for the others
    assert "cannot be told apart by the 4 examples" in uncovered["norm.weight"]
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    model = seeded(Folded)
    opt = steps(model, [(x, y)] * 2, eigen_corrected=True)
    uncovered = opt.coverage().uncovered
    assert set(uncovered) == {"norm.weight", "norm.bias"}  # first factors have no squares yet
    opt = steps(seeded(Folded), [(x, y)] * 2, sharing="reduce")
    assert {"inner.weight", "inner.bias"} < set(opt.coverage().uncovered)


class Coupled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(3, 4), nn.LayerNorm(4)
        self.batch, self.head = nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(self.inner(x))
        return self.head(self.batch(rows.transpose(1, 2)).mean(-1))


def test_batch_statistics_leave_it_to_shapes() -> None:
    model, x = seeded(Coupled), torch.randn(4, 8, 3, dtype=F64)
    opt = steps(model, [(x, torch.tensor([0, 1, 1, 0]))] * 4, eigen_corrected=True)
    assert opt.recorder.order.known.get("norm") in (None, "first")
    assert opt.recorder.order.tries == 0  # no more passes are spent on it
    assert opt.coverage().percent == 100.0
    assert int(model.batch.num_batches_tracked) == 4


def test_reentrant_checkpoints_leave_it_to_shapes() -> None:
    class Model(Coupled):
        def forward(self, x: Tensor) -> Tensor:
            rows = self.norm(self.inner(x))
            return checkpoint(lambda rows: self.head(rows).mean(1), rows, use_reentrant=True)

    model, x = seeded(Model), torch.randn(4, 8, 3, dtype=F64)
    opt = steps(model, [(x, torch.tensor([0, 1, 1, 0]))])
    assert not opt.recorder.order.known
    assert set(opt.layers) == {"inner", "norm"}  # the head runs in the backward pass only


def test_orders() -> None:
    rows = torch.zeros(6, 3, 2)
    assert order_of(rows, 3) is None
    rows[4:] = 1.0
    assert order_of(rows, 3) == "first"
    rows = torch.zeros(6, 3, 2)
    rows[:, 2] = 1.0
    assert order_of(rows, 3) == "second"
    assert order_of(rows.flatten(0, 1), 3) == "mixed"
    assert order_of(torch.ones(6, 3, 2), 3) is None
