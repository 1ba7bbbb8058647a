"""The exact factored form of K-FAC's directions, against dense solves and autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import curvlib as cl
from curvlib.influence.compression import low_rank
from curvlib.influence.directions import DenseDirections, direction_parts
from curvlib.influence.factored import factored_blocks, factored_parts
from curvlib.influence.influence import Influence
from curvlib.influence.low_rank import LowRankDirections
from curvlib.influence.preconditioner import Preconditioner
from curvlib.influence.queries import Queries, query_risk
from curvlib.operators.factors.factored_damping import factored_damping
from curvlib.operators.scores.example_rows import example_rows

T, WIDTH = 3, 9


class Tokens(nn.Module):
    """Embedding, a layer for each token, a norm, and a head, all of which have their own blocks."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(7, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, index):
        return self.head(self.norm(self.mix(self.words(index)).tanh()).mean(1))


@pytest.fixture(scope="module")
def case():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Tokens().double()
        x, y = torch.randint(7, (24, T)), torch.randint(4, (24,))
        query = torch.randint(7, (5, T)), torch.randint(4, (5,))
    batches = [(x[i : i + 8], y[i : i + 8]) for i in (0, 8, 16)]
    risk = cl.Risk(model, nn.CrossEntropyLoss(), batches)
    K = cl.kfac(risk, rest="diagonal")
    return risk, K, query


def factored(case, damping=0.1):
    risk, K, _ = case
    return Influence.of(risk, factored_damping(K.kronecker(), damping), damping=0.0, progress=False)


def directions(inf, query, rank=None, tolerance=None):
    own = Queries(query_risk(inf.risk, query, None), rank=rank, tolerance=tolerance)
    return own.directions(inf.risk, inf.preconditioner)


def test_scores_are_those_of_dense_solves_and_autograd(case):
    risk, _, query = case
    inf = factored(case)
    H = inf.preconditioner.operator.to_dense()
    train = torch.cat(list(cl.gradients(risk)))
    queries = torch.cat(list(cl.gradients(risk.on(query))))
    expected = queries @ torch.linalg.solve(H, train.mT)
    found = inf.scores(query).scores
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-10 * float(expected.abs().max()))


def test_directions_are_factors_of_as_many_columns_as_tokens(case):
    inf = factored(case)
    found = directions(inf, case[2])
    assert set(factored_blocks(inf.preconditioner)) == {"words", "mix", "head"}
    mix = found["mix"]
    assert isinstance(mix, LowRankDirections)
    assert mix.ranks.tolist() == [T] * 5
    assert not bool(mix.residual.any())
    assert mix.bytes < 5 * WIDTH * (WIDTH + 1) * 8
    assert found["head"].ranks.tolist() == [1] * 5
    for name in ("words", "norm"):  # one-hot rows, and no product
        assert isinstance(found[name], DenseDirections)
    (dense,) = direction_parts(query_risk(inf.risk, case[2], None), inf.preconditioner)
    for name, own in found.items():
        exact = dense[name].matrices
        gap = (own.dense() - exact).abs().max()
        assert float(gap) < 1e-10 * float(exact.abs().max())


def test_rank_and_tolerance_compress_what_has_more_tokens(case):
    inf = factored(case)
    capped = directions(inf, case[2], rank=2)
    assert capped["mix"].ranks.tolist() == [2] * 5  # of 3 tokens
    assert bool((capped["mix"].residual > 0).all())
    assert not bool(capped["head"].residual.any())
    assert directions(inf, case[2], rank=3)["mix"].residual.tolist() == [0.0] * 5
    loose = directions(inf, case[2], tolerance=0.2)
    assert loose["mix"].ranks.tolist() == [T] * 5  # exact is in memory as it is


def test_with_any_other_damping_ranks_are_higher(case):
    """Which is why the factored form needs a damping of its own."""
    risk, K, query = case
    own = Preconditioner(K.kronecker(), 0.1, True)
    assert factored_blocks(own) == {}
    assert factored_blocks(Preconditioner(K, 0.0, True)).keys() <= {"norm"}
    assert factored_blocks(Preconditioner(None, 0.0, True)) == {}
    (dense,) = direction_parts(risk.on(query), own)
    assert min(low_rank(dense["mix"].matrices, tolerance=1e-6).ranks.tolist()) > 2 * T


def test_parts_of_queries_do_not_change_directions(case):
    inf = factored(case)
    queries = query_risk(inf.risk, case[2], None)
    parts = list(factored_parts(queries, inf.preconditioner, memory=1))
    assert len(parts) == 5
    (whole,) = factored_parts(queries, inf.preconditioner)
    for name, own in whole.items():
        each = torch.cat([part[name].dense() for part in parts])
        assert torch.allclose(each, own.dense(), rtol=1e-9, atol=1e-12)


def test_groups_and_float32():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        body = nn.Conv1d(8, 12, 2, groups=2, stride=2)
        model = nn.Sequential(body, nn.Tanh(), nn.Flatten(), nn.Linear(24, 3))
        x, y = torch.randn(20, 8, 4), torch.randint(3, (20,))
    risk = cl.Risk(model, nn.CrossEntropyLoss(), (x, y))
    K = factored_damping(cl.kfac(risk).kronecker(), 0.1)
    inf = Influence.of(risk, K, damping=0.0, progress=False)
    found = directions(inf, (x[:4], y[:4]))
    assert isinstance(found["0"], LowRankDirections)
    assert found["0"].shape == (2, 6, 9)
    (dense,) = direction_parts(risk.on((x[:4], y[:4])), inf.preconditioner)
    for name, own in found.items():
        exact = dense[name].matrices
        assert float((own.dense() - exact).abs().max()) < 1e-4 * float(exact.abs().max())


def test_rows_of_examples_are_their_gradients(case):
    risk = case[0]
    expected = torch.cat(list(cl.gradients(risk)))
    seen = 0
    for rows in example_rows(risk, block=5):
        for own in rows:
            found = own.whole
            if found is None:
                found = (own.left.mT @ own.right).transpose(0, 1)
            exact = own.block.gather(expected[seen : seen + len(found)])
            assert torch.allclose(found, exact, rtol=1e-9, atol=1e-12)
        seen += len(found)
    assert seen == 24


def test_a_singular_factor_is_named(case):
    risk, _, query = case
    x = torch.zeros(24, T, dtype=torch.int64)  # the words 1 to 6 never occur
    small = cl.Risk(risk.model, nn.CrossEntropyLoss(), (x, torch.zeros(24, dtype=torch.int64)))
    bare = cl.kfac(small, params=["head.*"]).kronecker()
    inf = Influence.of(small, bare, damping=0.0, progress=False)
    with pytest.raises(RuntimeError, match="block 'head' is singular: .* factor are zero"):
        directions(inf, query)
