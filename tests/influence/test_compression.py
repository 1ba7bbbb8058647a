"""Low-rank directions: equal to dense ones at full rank, and never further off than they say."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import curvlib as cl
from curvlib.core.kronecker_blocks import KroneckerBlock, Part
from curvlib.influence.compression import compressed, low_rank, range_svd, shared_ranks
from curvlib.influence.directions import DenseDirections
from curvlib.influence.influence import Influence
from curvlib.influence.low_rank import JoinedDirections, LowRankDirections, joined
from curvlib.influence.matrix import bounded_scores
from curvlib.influence.metric import metric_of
from curvlib.influence.solved import Solved


def normal(*shape, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)


def decaying(Q, G, O, I, decay, seed=0, dtype=torch.float64):
    """Matrices with singular values ``decay ** k``."""
    U = torch.linalg.qr(normal(Q, G, O, O, seed=seed)).Q
    V = torch.linalg.qr(normal(Q, G, I, I, seed=seed + 1)).Q
    k = min(O, I)
    S = decay ** torch.arange(k, dtype=torch.float64)
    return ((U[..., :k] * S) @ V[..., :k].mT).to(dtype)


sizes = st.tuples(
    st.integers(1, 4), st.integers(1, 2), st.integers(1, 13), st.integers(1, 13)
)  # Q, G, O, I


@pytest.mark.parametrize(("n", "rows"), [(1, 1), (2, 3), (30, 40)])
@pytest.mark.parametrize("ranks", [(3, 3, 3, 3), (1, 4, 0, 2)])
def test_rows_or_gradients_give_the_same(monkeypatch, n, rows, ranks):
    """Many rows of many examples are contracted as gradients, few as rows; also in parts."""
    total = sum(ranks)
    low = LowRankDirections(
        normal(2, 6, total), normal(2, total, 5), torch.tensor(ranks), torch.zeros(4)
    )
    left, right = normal(2, n, rows, 6, seed=1), normal(2, n, rows, 5, seed=2)
    expected = torch.einsum("gnto,qgoi,gnti->nq", left, low.dense(), right)
    assert low._formed(n, rows) == (n == 30)
    for chunk in (2**20, 2 * 2 * 6 * 5 * 8):
        monkeypatch.setattr("curvlib.influence.low_rank.CHUNK", chunk)
        found = low.contract(left, right)
        assert torch.allclose(found, expected, rtol=1e-11, atol=1e-11)


@given(sizes, st.integers(1, 5), st.integers(1, 6), st.floats(0.05, 1.0), st.integers(0, 999))
@settings(max_examples=120, deadline=None)
def test_scores_are_never_further_off_than_the_bound(shape, rank, rows, decay, seed):
    Q, G, O, I = shape
    D = decaying(Q, G, O, I, decay, seed)
    low = low_rank(D, rank=rank, oversampling=seed % 3, iterations=seed % 2, seed=seed)
    left, right = normal(G, 5, rows, O, seed=seed + 2), normal(G, 5, rows, I, seed=seed + 3)
    exact = DenseDirections(D).contract(left, right)
    gradient = torch.einsum("gnto,gnti->ngoi", left, right)
    norms = gradient.flatten(1).norm(dim=1)
    scale = norms[:, None] * D.flatten(1).norm(dim=1)
    gap = (low.contract(left, right) - exact).abs()
    assert bool((gap <= low.bound(norms) + 1e-13 * scale).all())


@given(st.integers(0, 999), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=25, deadline=None)
def test_the_bound_is_attained_and_of_the_stored_factors(seed, dtype):
    """For the gradient that is the rest itself, the bound is the error."""
    D = normal(2, 1, 9, 7, seed=seed, dtype=dtype)
    low = low_rank(D, rank=3, seed=seed)
    rest = D.double() - low.dense().double()
    norms = rest.flatten(1).norm(dim=1)
    off = (rest * rest).sum((1, 2, 3))
    bound = low.bound(norms).diagonal()
    assert bool((off <= bound).all())
    assert off.tolist() == pytest.approx(bound.tolist(), rel=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 1, 12, 8), (2, 3, 5, 9), (2, 1, 1, 6)])
def test_full_rank_equals_dense(shape, dtype):
    D = normal(*shape, dtype=dtype)
    Q, G, O, I = shape
    low = low_rank(D)
    assert low.ranks.tolist() == [min(O, I)] * Q
    assert low.shape == (G, O, I)
    assert low.count == Q
    left, right = normal(G, 4, 3, O, dtype=dtype), normal(G, 4, 3, I, seed=1, dtype=dtype)
    dense = DenseDirections(D)
    tolerance = 50 * torch.finfo(dtype).eps
    for name in ("contract", "contract_tokens"):
        a, b = getattr(low, name)(left, right), getattr(dense, name)(left, right)
        assert a.shape == b.shape
        assert a.dtype == dtype
        assert float((a - b).abs().max()) < tolerance * float(b.abs().max())
    assert bool((low.residual < tolerance * D.double().flatten(1).norm(dim=1)).all())
    assert torch.allclose(low.dense(), D, rtol=0, atol=tolerance * 10)


def test_scores_of_rows_sum_to_scores_with_ranks_that_differ():
    D = torch.cat([decaying(1, 2, 9, 8, d, seed=i) for i, d in enumerate((0.02, 0.5, 0.9))])
    D[1] = 0.0  # a query whose gradient vanishes
    low = low_rank(D, tolerance=0.1)
    ranks = low.ranks.tolist()
    assert ranks[1] == 0
    assert len(set(ranks)) == 3
    left, right = normal(2, 6, 5, 9), normal(2, 6, 5, 8, seed=1)
    rows = low.contract_tokens(left, right)
    by_hand = torch.einsum("gnto,qgoi,gnti->nqt", left, low.dense(), right)
    assert torch.allclose(rows, by_hand, rtol=0, atol=1e-12)
    assert torch.allclose(rows.sum(-1), low.contract(left, right), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["contract", "contract_tokens"])
def test_rows_that_are_one_hot_are_indices(name):
    D = normal(3, 1, 11, 6)
    index = torch.tensor([[0, 10, 4], [4, 4, 1]])
    right = normal(1, 2, 3, 6, seed=1)
    rows = torch.nn.functional.one_hot(index, 11).double()[None]
    for low in (low_rank(D, rank=2), low_rank(D, tolerance=0.3)):
        found = getattr(low, name)(index, right)
        assert torch.allclose(found, getattr(low, name)(rows, right), rtol=0, atol=1e-13)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rows", [1, 30])
def test_a_column_of_ones_may_be_left_out(groups, rows, monkeypatch):
    """As rows or as gradients, in one chunk or in several."""
    low = low_rank(normal(3, groups, 6, 5), rank=2)
    left, bare = normal(groups, 40, rows, 6), normal(groups, 40, rows, 4, seed=1)
    right = torch.cat([bare, torch.ones(groups, 40, rows, 1)], -1)
    for body in (low, DenseDirections(low.dense())):
        expected = body.contract_tokens(left, right).sum(-1)
        for chunk, least in ((2**24, 64), (1000, 4), (1, 1)):
            monkeypatch.setattr("curvlib.operators.scores.directions.FORMED", chunk)
            monkeypatch.setattr("curvlib.operators.scores.directions.ROWS", least)
            monkeypatch.setattr("curvlib.influence.low_rank.ROWS", chunk)
            for rest in (right, bare):
                assert torch.allclose(body.contract(left, rest), expected, rtol=1e-11, atol=1e-12)


def test_chunks_of_examples_do_not_change_scores(monkeypatch):
    low = low_rank(normal(3, 1, 6, 5), rank=2)
    left, right = normal(1, 7, 4, 6), normal(1, 7, 4, 5, seed=1)
    expected = low.contract(left, right), low.contract_tokens(left, right)
    monkeypatch.setattr("curvlib.influence.low_rank.CHUNK", 1)
    assert torch.allclose(low.contract(left, right), expected[0], rtol=1e-12)
    assert torch.allclose(low.contract_tokens(left, right), expected[1], rtol=1e-12)


@given(st.floats(0.3, 0.95), st.floats(1e-4, 0.5), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_ranks_adapt_to_the_tolerance_and_are_the_smallest(decay, tolerance, seed):
    """Eckart and Young: no smaller rank could do, up to what a random range misses."""
    D = decaying(2, 1, 60, 50, decay, seed)
    low = low_rank(D, tolerance=tolerance)
    values = torch.linalg.svdvals(D[:, 0])
    norms = D.flatten(1).norm(dim=1)
    for q in range(2):
        assert float(low.residual[q]) <= tolerance * float(norms[q]) * (1 + 1e-5)
        tails = values[q].flip(0).square().cumsum(0).flip(0).sqrt()
        least = int((tails > tolerance * float(norms[q]) * (1 + 1e-9)).sum())
        assert least <= int(low.ranks[q]) <= least + 1


def test_ranks_stop_at_the_cap_and_the_residual_tells():
    D = normal(2, 1, 40, 40)
    low = low_rank(D, rank=20, tolerance=0.01)
    assert low.ranks.tolist() == [20, 20]
    best = torch.linalg.svdvals(D[:, 0])[:, 20:].norm(dim=1)
    assert bool((low.residual >= best).all())
    assert bool((low.residual <= 1.1 * best).all())
    assert low_rank(D, rank=99).ranks.tolist() == [40, 40]


def test_a_random_range_is_nearly_the_best_one():
    """Residuals of fixed rank are within 2 % of Eckart and Young's, for a slow decay."""
    D = decaying(3, 1, 120, 90, 0.93)
    best = torch.linalg.svdvals(D[:, 0])[:, 16:].norm(dim=1)
    low = low_rank(D, rank=16)
    assert bool((low.residual <= 1.02 * best).all())
    plain = low_rank(D, rank=16, oversampling=0, iterations=0)
    assert bool((plain.residual > low.residual).all())
    U, S, V = range_svd(D[:, 0], 16, 10, 2, 0)
    eye = torch.eye(16, dtype=torch.float64)
    for basis in (U.mT @ U, V @ V.mT):
        assert torch.allclose(basis, eye.expand(3, 16, 16), rtol=0, atol=1e-12)
    assert torch.allclose(S, torch.linalg.svdvals(D[:, 0])[:, :16], rtol=0.02)


def curved(O, I, seed=0):
    """A Kronecker block of a steep spectrum, and the dense roots of its factors."""
    U, V = (torch.linalg.qr(normal(1, n, n, seed=seed + n)).Q for n in (O, I))
    l, r = (0.5 ** torch.arange(n, dtype=torch.float64) for n in (O, I))
    block = KroneckerBlock("layer", (Part(0, I),), U, V, (l[:, None] * r)[None])
    floors = l + 1e-4 * l.mean(), r + 1e-4 * r.mean()
    roots = [Q[0] * f.sqrt() @ Q[0].mT for Q, f in zip((U, V), floors, strict=True)]
    return block, roots


def in_parameters(solved, **how):
    """Compressed directions of one block, as they are for parameters."""
    return compressed({"layer": solved}, **how)["layer"]


def test_in_a_metric_the_error_of_scores_to_expect_is_least():
    """By the dense roots of the factors; and nothing else of the same rank is better."""
    block, (left, right) = curved(14, 11)
    D = normal(3, 1, 14, 11)
    low = in_parameters(Solved(block.rotated(D), block), rank=4)
    plain = low_rank(D, rank=4)
    best = torch.linalg.svdvals(left @ D[:, 0] @ right)[:, 4:].norm(dim=1)

    def expected(found):
        return (left @ (D - found.dense())[:, 0] @ right).flatten(1).norm(dim=1)

    assert torch.allclose(expected(low), best, rtol=1e-9)
    assert bool((expected(plain) > 2.0 * best).all())
    gap = (D - low.dense()).flatten(1).norm(dim=1)
    assert bool((low.residual >= gap).all())
    assert torch.allclose(low.residual, gap, rtol=3e-6)  # the bound is that of the plain norm


def test_in_a_metric_the_tolerance_is_the_error_of_scores_in_the_root_mean_square():
    """Of Gaussian gradients whose covariance is that of the metric."""
    O, I, n = 14, 11, 4000
    block, (left, right) = curved(O, I)
    D = normal(2, 1, O, I)
    low = in_parameters(Solved(block.rotated(D), block), tolerance=0.2)
    G = left @ normal(n, O, I, seed=5) @ right
    exact = torch.einsum("qoi,noi->nq", D[:, 0], G)
    error = torch.einsum("qoi,noi->nq", (D - low.dense())[:, 0], G)
    ratio = (error.square().mean(0) / exact.square().mean(0)).sqrt()
    assert bool((ratio < 0.2 * 1.05).all())  # standard errors of some 1.5 %
    assert bool((ratio > 0.05).all())
    assert int(low.ranks.max()) < min(O, I) // 2


@given(sizes, st.integers(1, 5), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=40, deadline=None)
def test_the_bound_holds_in_a_metric_and_when_ranks_are_shared(shape, rank, dtype):
    """In float32, too, of the factors as they are rotated back."""
    Q, _, O, I = shape
    solved, exact = {}, {}
    for i, name in enumerate("ab"):
        block, _ = curved(O + 7 * i, I + 9, O + I)
        own = [t if t is None else t.to(dtype) for t in (block.left, block.right)]
        block = replace(block, left=own[0], right=own[1], eigenvalues=block.eigenvalues.to(dtype))
        D = normal(Q, 1, O + 7 * i, I + 9, seed=rank + i, dtype=dtype) * 10.0**-i
        solved[name] = Solved(D, block)
        exact[name] = block.left.double() @ D.double() @ block.right.double().mT
    for name, low in compressed(solved, rank=rank).items():
        D = exact[name]
        if isinstance(low, DenseDirections):  # of which nothing is left out
            continue
        left, right = normal(1, 5, 3, D.shape[2], seed=2), normal(1, 5, 3, D.shape[3], seed=3)
        norms = (left.mT @ right).transpose(0, 1).flatten(1).norm(dim=1)
        gap = (DenseDirections(low.dense().double() - D).contract(left, right)).abs()
        assert bool((gap <= low.bound(norms) + 1e-13 * norms[:, None] * D.norm()).all())


def test_a_metric_at_full_rank_changes_nothing():
    block, _ = curved(6, 9)
    D = normal(2, 1, 6, 9)
    low = low_rank(D, metric=metric_of(block.eigenvalues))
    assert torch.allclose(low.dense(), D, rtol=0, atol=1e-11)
    assert metric_of(torch.zeros(1, 2, 2)) is None


# ------------------------------------------------------------- ranks that layers share
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_shared_ranks_are_the_best_ones_of_their_memory(queries, rank, seed):
    """By trying all: no choice that takes as much leaves out less for its last number."""
    values = {
        name: normal(queries, k, seed=seed + k).square().sort(dim=1, descending=True).values
        for name, k in (("a", 4), ("b", 3), ("c", 5))
    }
    costs = {"a": 5, "b": 3, "c": 4}
    found = shared_ranks(values, costs, rank)
    budget = rank * 12
    for q in range(queries):
        mine = [int(found[n][q]) for n in "abc"]
        spent = sum(r * costs[n] for n, r in zip("abc", mine, strict=True))
        assert spent <= budget
        kept = sum(float(values[n][q, :r].sum()) for n, r in zip("abc", mine, strict=True))
        best = max(
            sum(float(values[n][q, :r].sum()) for n, r in zip("abc", own, strict=True))
            for own in itertools.product(range(5), range(4), range(6))
            if sum(r * costs[n] for n, r in zip("abc", own, strict=True)) <= spent
        )
        assert kept == pytest.approx(best)


def test_blocks_share_a_rank_in_the_memory_of_one_everywhere():
    """A block that is left out with little loss leaves its rank to others."""
    flat, steep = (decaying(3, 1, 60, 50, d, seed=i) for i, d in enumerate((0.97, 0.4)))
    solved = {"flat": Solved(flat, None), "steep": Solved(steep, None)}
    found = compressed(solved, rank=8)
    alone = {n: in_parameters(own, rank=8) for n, own in solved.items()}
    assert sum(d.bytes for d in found.values()) <= sum(d.bytes for d in alone.values())
    assert int(found["flat"].ranks.min()) > 8 > int(found["steep"].ranks.max())

    def error(parts):
        return sum(part.residual.square() for part in parts.values())

    assert bool((error(found) < 0.8 * error(alone)).all())
    for name, low in found.items():
        gap = (solved[name].matrices - low.dense()).flatten(1).norm(dim=1)
        assert torch.allclose(low.residual, gap, rtol=1e-5)


def test_a_block_may_get_much_more_than_the_mean():
    """The range that is found is doubled until it holds what is wanted."""
    one = Solved(normal(2, 1, 40, 15) @ normal(2, 1, 15, 60, seed=1), None)
    rest = {f"{i}": Solved(1e-9 * normal(2, 1, 40, 60, seed=i), None) for i in range(12)}
    found = compressed({"one": one} | rest, rank=2, oversampling=2)
    assert found["one"].ranks.tolist() == [15, 15]
    assert float(found["one"].residual.max()) < 1e-11
    assert sum(int(found[n].ranks[0]) for n in rest) == 13 * 2 - 15


class _Chain(torch.nn.Module):
    """Layers of several shapes over tokens."""

    def __init__(self):
        super().__init__()
        sizes = (24, 40, 32, 16)
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes)
        )

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = layer(x).tanh()
        return self.layers[-1](x).mean(1)


@pytest.mark.parametrize("curvature", ["ekfac", "identity", "diagonal"])
def test_scores_of_shared_ranks_are_near_bounded_and_dense_at_full_rank(curvature):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _Chain().double()
    data = normal(60, 12, 24), torch.arange(60) % 16
    risk = cl.Risk(model, torch.nn.CrossEntropyLoss(), data)
    inf = Influence.of(risk, curvature, progress=False)
    query = normal(5, 12, 24, seed=1), torch.arange(5)
    dense = inf.scores(query).scores
    for rank in (1, 3, 6, 99):
        low = bounded_scores(inf, query, rank=rank)
        gap = (low.scores - dense).abs()
        assert bool((gap <= low.bounds * (1.0 + 1e-9) + 1e-12 * dense.abs().max()).all())
        assert float(gap.max()) < {1: 1.0, 3: 0.5, 6: 0.2, 99: 1e-12}[rank] * float(
            dense.abs().max()
        )


def test_a_query_does_not_depend_on_its_batch_nor_on_global_randomness(rng_untouched):
    D = torch.cat([decaying(1, 1, 40, 30, d) for d in (0.2, 0.9, 0.7)])
    whole = low_rank(D, tolerance=0.05, seed=4)
    parts = [low_rank(D[q : q + 1], tolerance=0.05, seed=4) for q in range(3)]
    assert whole.ranks.tolist() == [int(p.ranks) for p in parts]
    again = joined(parts)
    assert torch.allclose(whole.dense(), again.dense(), rtol=0, atol=1e-12)
    assert torch.allclose(whole.residual, again.residual, rtol=1e-9)


def test_scale_does_not_matter():
    D = decaying(1, 1, 60, 40, 0.8, dtype=torch.float32)
    a, b = low_rank(D, tolerance=0.1), low_rank(D * 1e-18, tolerance=0.1)
    assert torch.equal(a.ranks, b.ranks)
    assert torch.allclose(b.residual * 1e18, a.residual, rtol=1e-4)


def test_compression_only_where_it_saves_memory():
    wide = Solved(decaying(2, 1, 40, 50, 0.1), None)
    for how in ({}, {"rank": 23}):  # nothing asked for; 23 * 90 > 40 * 50
        assert in_parameters(wide, **how).matrices is wide.matrices
    low = in_parameters(wide, rank=4)
    assert isinstance(low, LowRankDirections)
    assert low.bytes == 2 * 4 * (40 + 50) * 8 + 2 * 16
    noise = Solved(normal(2, 1, 12, 12), None)
    assert isinstance(in_parameters(noise, tolerance=1e-3), DenseDirections)
    vector = Solved(normal(2, 3, 1, 9), None)
    assert isinstance(in_parameters(vector, rank=1), DenseDirections)


def test_directions_of_several_batches_are_joined():
    D = decaying(5, 2, 8, 6, 0.4)
    left, right = normal(2, 3, 4, 8), normal(2, 3, 4, 6, seed=1)
    dense = joined([DenseDirections(D[:2]), DenseDirections(D[2:])])
    assert isinstance(dense, DenseDirections)
    low = joined([low_rank(D[:2], rank=2), low_rank(D[2:], rank=3)])
    assert isinstance(low, LowRankDirections)
    assert low.ranks.tolist() == [2, 2, 3, 3, 3]
    mixed = joined([low_rank(D[:2], rank=2), DenseDirections(D[2:])])
    assert isinstance(mixed, JoinedDirections)
    assert (mixed.count, mixed.shape) == (5, (2, 8, 6))
    assert mixed.bytes == low_rank(D[:2], rank=2).bytes + 3 * 2 * 8 * 6 * 8
    norms = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    for body in (dense, low, mixed):
        expected = torch.einsum("gnto,qgoi,gnti->nqt", left, body.dense(), right)
        assert torch.allclose(body.contract_tokens(left, right), expected, atol=1e-12)
        assert torch.allclose(body.contract(left, right), expected.sum(-1), atol=1e-12)
        gap = (D - body.dense()).flatten(1).norm(dim=1)
        assert torch.allclose(body.bound(norms), norms[:, None] * gap, rtol=1e-5, atol=1e-12)
    assert joined([low]) is low


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda D: in_parameters(Solved(D, None), rank=0), ValueError, "rank= is at least 1"),
        (
            lambda D: in_parameters(Solved(D, None), tolerance=1.5),
            ValueError,
            "tolerance= is a fraction of a direction's norm",
        ),
        (lambda D: low_rank(D, rank=1, oversampling=-1), ValueError, "oversampling= is an integer"),
        (lambda D: low_rank(D, rank=1, iterations=0.5), ValueError, "iterations= is an integer"),
        (lambda D: low_rank(D.half()), TypeError, "float32 or float64, got torch.float16"),
        (lambda D: low_rank(D[:0]), ValueError, r"matrices \[Q, G, O, I\], Q > 0"),
        (
            lambda D: low_rank(D.index_fill(0, torch.tensor(1), torch.nan)),
            FloatingPointError,
            r"directions of queries \[1\] .* NaN",
        ),
        (
            lambda D: compressed(
                {
                    n: Solved(D.index_fill(0, torch.tensor(1), torch.inf).repeat(1, 1, 3, 4), None)
                    for n in "ab"
                },
                rank=1,
            ),
            FloatingPointError,
            r"directions of queries \[1\] .* NaN",
        ),
        (
            lambda D: joined([DenseDirections(D), DenseDirections(D.mT)]),
            ValueError,
            "directions of one shape",
        ),
        (
            lambda D: LowRankDirections(D[0], D[0], torch.tensor([1, 1]), torch.zeros(2)),
            ValueError,
            r"with R = 2, the sum of ranks, got \[1, 3, 2\]",
        ),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call(normal(2, 1, 3, 2))
