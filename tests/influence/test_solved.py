"""Preconditioned gradients of queries in the eigenbasis are solves with flat gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import curvlib as cl
from curvlib.influence.directions import direction_parts, query_directions
from curvlib.influence.influence import Influence
from curvlib.influence.preconditioner import Preconditioner
from curvlib.influence.solved import Solver
from curvlib.operators.scores.blocks import score_blocks
from curvlib.operators.scores.example_rows import example_rows


class Net(nn.Module):
    """Few and many rows, groups, embedding, normalization, and a layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.norm = nn.LayerNorm(8)
        self.mix = nn.Conv1d(8, 8, 2, groups=2)
        self.twice = nn.Linear(8, 8)
        self.wide = nn.Linear(8, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, x):
        y = self.norm(self.embed(x))
        y = self.twice(self.twice(y).tanh())
        y = self.mix(y.mT).mT.tanh()
        return self.head(self.wide(y).tanh().mean(1))


@pytest.fixture(params=[2, 12], ids=["few rows", "many rows"])
def case(request):
    draw = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net().double()
    x = torch.randint(7, (20, request.param + 1), generator=draw)
    y = torch.randint(3, (20,), generator=draw)
    risk = cl.Risk(model, nn.CrossEntropyLoss(), (x, y))
    return risk, risk.on((x[:5].flip(1), y[:5]))


@pytest.mark.parametrize("curvature", ["ekfac", "kfac", "diagonal", "identity"])
def test_directions_are_solves_with_gradients(case, curvature):
    risk, queries = case
    inf = Influence.of(risk, curvature, progress=False)
    rows = torch.cat(list(cl.gradients(queries.restrict(list(inf.risk.params.values())))))
    flat = inf.preconditioner.solve(rows.mT).mT
    queries = queries.restrict(list(inf.risk.params.values()))
    for reduction, expected in (
        (None, flat),
        ("sum", flat.sum(0)[None]),
        ("mean", flat.mean(0)[None]),
    ):
        for memory in (2**28, 1):
            found = query_directions(
                queries, inf.preconditioner, reduction=reduction, memory=memory
            )
            for block in score_blocks(queries):
                exact = block.gather(expected)
                gap = (found[block.name].dense() - exact).abs().max()
                assert float(gap) <= 1e-10 * float(exact.abs().max()), block.name


def test_ekfac_is_solved_in_its_eigenbasis(case):
    """No flat solve is needed; and norms are those of the directions."""
    risk, queries = case
    inf = Influence.of(risk, cl.kfac(risk, rest="diagonal", progress=False), progress=False)
    solver = Solver(queries, inf.preconditioner)
    (rows,) = example_rows(queries)
    (dense,) = direction_parts(queries, inf.preconditioner)
    for name, own in solver.of(rows).items():
        assert own.block is not None
        norms = own.matrices.flatten(1).norm(dim=1)
        assert torch.allclose(norms, dense[name].matrices.flatten(1).norm(dim=1), rtol=1e-10)


class Shared(nn.Module):
    """The weight of ``a`` is used outside of it, so that it has a diagonal, as has its bias."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(nn.functional.linear(self.a(x).tanh(), self.a.weight))


def test_blocks_of_another_layout_are_solved_flat():
    """Two diagonals, of a weight and its bias, which are scored as one block."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(9, 4, generator=draw, dtype=torch.float64), torch.arange(9) % 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Shared().double()
    risk = cl.Risk(model, nn.CrossEntropyLoss(), (x, y))
    inf = Influence.of(risk, cl.kfac(risk, rest="diagonal", progress=False), progress=False)
    assert "a" not in inf.preconditioner.operator.blocks_of
    rows = torch.cat(list(cl.gradients(risk)))
    flat = inf.preconditioner.solve(rows.mT).mT
    found = query_directions(risk, inf.preconditioner)
    assert found.keys() == {"a", "b"}
    for block in score_blocks(risk):
        assert torch.allclose(found[block.name].dense(), block.gather(flat), rtol=1e-9)


def test_a_singular_curvature_is_named_by_its_own_solve(case):
    risk, queries = case
    K = cl.kfac(risk, params=["embed.*"], progress=False)
    part = queries.restrict([risk.params["embed.weight"]])
    own = Preconditioner(K.kronecker(), 0.0, True)
    with pytest.raises(RuntimeError, match="singular: .* eigenvalues of block 'embed' are zero"):
        query_directions(part, own)
