"""Whole matrices of scores: as in memory, resumed, bounded; filters measured by them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from curvlib.influence.candidates import uniform
from curvlib.influence.influence import Influence
from curvlib.influence.matrix import (
    BoundedScores,
    bounded_scores,
    measured_recall,
    score_matrix,
)
from curvlib.influence.recall import recall
from curvlib.influence.store import ScoreMatrix

ROWS, BATCH = 30, 4


def problem(body=None, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = body or nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 3))
        x, y = torch.randn(ROWS, 5, dtype=dtype), torch.randint(3, (ROWS,))
        query = torch.randn(4, 5, dtype=dtype), torch.randint(3, (4,))
    batches = [(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, ROWS, BATCH)]
    return body.to(dtype), batches, query


@pytest.fixture(scope="module")
def case():
    model, batches, query = problem()
    return Influence(model, nn.CrossEntropyLoss(), batches, progress=False), query


def written(inf, query, folder, **named):
    return score_matrix(inf, query, folder, **{"shard": 8, "progress": False, **named})


def bits(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"normalize": "self"},
        {"normalize": "gradient"},
        {"rank": 2},
        {"query_reduction": "mean"},
    ],
)
def test_what_is_written_is_what_is_returned(case, tmp_path, settings):
    inf, query = case
    expected = inf.scores(query, **settings).scores.mT
    matrix = written(inf, query, tmp_path / "scores", dtype=torch.float64, **settings)
    assert np.array_equal(matrix.rows(), expected.numpy())
    assert [own.stop - own.start for own in matrix.shards] == [8, 8, 8, 6]
    half = written(inf, query, tmp_path / "half", **settings)
    assert np.array_equal(half.rows(), expected.float().numpy())


def test_chosen_examples_alone(case, tmp_path):
    inf, query = case
    expected = inf.scores(query).scores.mT
    chosen = torch.tensor([29, 3, 4, 17])
    matrix = written(inf, query, tmp_path / "scores", chosen=chosen, dtype=torch.float64)
    assert matrix.shape == (4, 4)
    found = torch.from_numpy(matrix.rows())
    assert torch.allclose(found, expected[chosen.sort().values], rtol=1e-12, atol=1e-14)


class ByTime(nn.Module):
    """Takes time first inside, so that examples go through it one by one."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(1, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(self.a(x.mT[..., None]).tanh().mean(0))


@pytest.mark.parametrize("body", [None, ByTime])
def test_interrupted_anywhere_it_ends_with_the_same_bits(tmp_path, body):
    model, batches, query = problem(body and body())
    inf = Influence(model, nn.CrossEntropyLoss(), batches, progress=False)
    written(inf, query, tmp_path / "whole")

    class Stop(Exception):  # noqa: N818  # it is no error
        pass

    folder = tmp_path / "scores"
    for last in (5, 9, 20, 25):

        def told(done, total, note, last=last):
            assert total == ROWS
            if done > last:
                raise Stop

        with pytest.raises(Stop):
            written(inf, query, folder, progress=told)
        half = ScoreMatrix.open(folder)
        assert not half.complete
        if half.shards:
            assert half.shards[-1].place["alone"] == (body is not None)
    assert written(inf, query, folder).complete
    assert bits(folder) == bits(tmp_path / "whole")


def test_a_folder_of_other_scores_is_refused(case, tmp_path):
    inf, query = case
    folder = tmp_path / "scores"
    written(inf, query, folder)
    other = Influence.of(inf.risk, inf.preconditioner.operator, damping=0.2, progress=False)
    with pytest.raises(ValueError, match="curvature was .* and is now"):
        written(other, query, folder)
    with pytest.raises(ValueError, match="queries was"):
        written(inf, (query[0] + 1.0, query[1]), folder)
    with pytest.raises(ValueError, match="rank was None and is now 2"):
        written(inf, query, folder, rank=2)
    with pytest.raises(ValueError, match="chosen was None and is now"):
        written(inf, query, folder, chosen=[1, 2])
    weight = inf.risk.model[0].weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] += 1.0
    try:
        with pytest.raises(ValueError, match="model was"):
            written(inf, query, folder)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert written(inf, query, folder).complete


@pytest.mark.parametrize("settings", [{"rank": 1}, {"rank": 2}, {"tolerance": 0.3}, {}])
@pytest.mark.parametrize("unit", ["inner_product", "nats"])
def test_bounds_hold_for_every_score(case, settings, unit):
    own, query = case
    inf = Influence.of(own.risk, own.preconditioner.operator, unit=unit, progress=False)
    exact = inf.scores(query).scores
    found = bounded_scores(inf, query, **settings)
    gap = (found.scores - exact).abs()
    assert bool((gap <= found.bounds + 1e-13 * exact.abs().max()).all())
    assert torch.equal(found.indices, torch.arange(ROWS))
    if settings:
        assert float(gap.max()) > 1e-3 * float(exact.abs().max())  # it was compressed
        assert float((gap / found.bounds).max()) > 0.02  # and bounds are of its size
    else:
        assert not bool(found.bounds.any())


def test_what_is_certain_of_the_top_is_true(case):
    inf, query = case
    exact = inf.scores(query).scores
    for k in (1, 5, 12, ROWS):
        for tolerance in (1e-3, 0.05, 0.3):
            found = bounded_scores(inf, query, tolerance=tolerance)
            certain = found.certain(k)
            mine = found.scores.topk(k).indices
            for q in range(4):
                true = set(exact[q].topk(k).indices.tolist())
                assert int(certain[q]) <= len(true & set(mine[q].tolist()))
        everything = bounded_scores(inf, query).certain(k)
        assert everything.tolist() == [k] * 4
    assert bool((bounded_scores(inf, query, tolerance=1e-3).certain(5) >= 3).all())


def test_certain_by_hand():
    scores = torch.tensor([[9.0, 6.0, 5.0, 1.0]])
    bounds = torch.tensor([[1.0, 0.6, 0.6, 1.0]])
    found = BoundedScores(scores, bounds, torch.arange(4), "inner_product")
    # 8..10, 5.4..6.6, 4.4..5.6, 0..2: the second and the third may change places
    assert [int(found.certain(k)) for k in (1, 2, 3, 4)] == [1, 1, 3, 4]
    with pytest.raises(ValueError, match="k= is 1 to the 4 examples, got 5"):
        found.certain(5)


def test_recall_of_a_filter_is_that_of_all_scores(case):
    inf, query = case
    kept = uniform(ROWS, 12, queries=4, seed=3)
    scores = inf.scores(query).scores.mT
    whole = measured_recall(inf, query, kept, k=6, sample=ROWS)
    assert whole.value == recall(kept, scores, torch.arange(ROWS), 6).value
    part = measured_recall(inf, query, kept, k=3, sample=15, seed=8)
    drawn = uniform(ROWS, 15, seed=8).indices
    assert part.value == recall(kept, scores[drawn], drawn, 3).value
    assert part.sample == 15


def test_candidates_are_what_a_scan_goes_through(case):
    inf, query = case
    kept = uniform(ROWS, 12, queries=4, seed=3)
    top = inf.top(query, k=5, chosen=kept.indices)
    scores = inf.scores(query).scores[:, kept.indices]
    best = kept.indices[scores.topk(5).indices]
    assert torch.equal(top.indices, best)
    assert top.examples == 12
