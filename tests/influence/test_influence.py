"""Influence scores against dense solves, and against models that are really refitted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvlib as cl
from curvlib.core.kronecker import Kronecker
from curvlib.influence.influence import Influence
from curvlib.influence.result import InfluenceScores, SelfInfluence, TopInfluence
from curvlib.operators.fisher_diagonal import fisher_diagonal
from curvlib.operators.scores.example_scores import example_gradients_by_layers
from tests.operators.factored import (
    CE,
    F64,
    PROBLEMS,
    TOKENS,
    Language,
    classes,
    draw,
    problem,
    relative,
    seeded,
)

mpl.use("Agg")
QUIET: dict[str, Any] = {"progress": False}


def rows(risk: cl.Risk) -> Tensor:
    """Gradients of examples (tested against autograd elsewhere), ``[N, P]``."""
    return torch.cat(list(example_gradients_by_layers(risk)))


def damped(op: Kronecker, damping: float, *, relative: bool = True) -> Tensor:
    """A Kronecker-factored matrix with the damping of each block, dense."""
    ones = torch.zeros(1, op.shape[0], dtype=F64)
    for name, value in op.dampings(damping, relative=relative).items():
        block = op.blocks_of[name]
        block.scatter(torch.full((1, *block.eigenvalues.shape), value, dtype=F64), ones)
    return op.to_dense() + torch.diag(ones[0])


def mlp(count: int = 20, seed: int = 0) -> cl.Risk:
    model = seeded(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)))
    x, y = draw(count, 4, seed=seed), classes(count, below=3, seed=seed)
    cut = count - 5
    return cl.Risk(model, CE, [(x[:cut], y[:cut]), (x[cut:], y[cut:])])


QUERY = (draw(3, 4, seed=9), classes(3, below=3, seed=9))


# ------------------------------------------------------------------- dense solves
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("curvature", ["ekfac", "kfac"])
def test_scores_are_those_of_a_dense_solve(name: str, curvature: str) -> None:
    risk = problem(name)
    if name == "experts":  # one of them sees no token, and has no curvature
        risk = risk.restrict(["experts.0.*", "experts.1.*", "head.*"])
    inf = Influence.of(risk, curvature, **QUIET)
    K = cl.kfac(risk, rest="diagonal", progress=False)
    K = K if curvature == "ekfac" else K.kronecker()
    G = rows(risk)
    expected = G @ torch.linalg.solve(damped(K, 0.1), G.T)
    found = inf.scores(risk, per_layer=True)
    assert relative(found.scores, expected) < 1e-9
    assert found.per_layer is not None
    assert relative(found.per_layer.sum(2), found.scores) < 1e-12
    assert relative(inf.self_scores().scores, expected.diagonal()) < 1e-9


@pytest.mark.parametrize("relative_damping", [True, False])
def test_other_curvature(relative_damping: bool) -> None:
    """Identity, diagonal, M-FAC, and a matrix without a solve of its own."""
    risk = mlp()
    G, q = rows(risk), rows(risk.on(QUERY))
    P = risk.space.size
    eye = torch.eye(P, dtype=F64)
    assert relative(Influence.of(risk, "identity").scores(QUERY).scores, q @ G.T) < 1e-13

    diagonal = fisher_diagonal(risk).diagonal()
    value = 0.3 * float(diagonal.mean()) if relative_damping else 0.3
    expected = (q / (diagonal + value)) @ G.T
    options: dict[str, Any] = {"damping": 0.3, "relative": relative_damping}
    assert (
        relative(Influence.of(risk, "diagonal", **options).scores(QUERY).scores, expected) < 1e-12
    )

    window = cl.mfac(risk, count=20, damping=0.05, relative=False)
    expected = q @ torch.linalg.solve(window.to_dense(), G.T)
    assert relative(Influence.of(risk, window).scores(QUERY).scores, expected) < 1e-8

    H = cl.ggn(risk)
    if relative_damping:
        with pytest.raises(ValueError, match="relative damping of .* needs its trace"):
            Influence.of(risk, H).scores(QUERY)
        return
    expected = q @ torch.linalg.solve(H.to_dense() + 0.3 * eye, G.T)
    assert relative(Influence.of(risk, H, **options).scores(QUERY).scores, expected) < 1e-5


def test_damping_to_infinity_is_the_identity() -> None:
    risk = mlp()
    G, q = rows(risk), rows(risk.on(QUERY))
    inf = Influence.of(risk, damping=1e12, relative=False, **QUIET)
    assert relative(1e12 * inf.scores(QUERY).scores, q @ G.T) < 1e-9


def test_a_fitted_operator_and_its_parameters() -> None:
    """Scores are about the parameters that it covers."""
    risk = mlp()
    K = cl.kfac(risk, params=["0.*"], progress=False)
    inf = Influence.of(risk, K)
    assert inf.risk.space.names == ("0.weight", "0.bias")
    part = risk.restrict(["0.*"])
    expected = rows(part.on(QUERY)) @ torch.linalg.solve(damped(K, 0.1), rows(part).T)
    assert relative(inf.scores(QUERY).scores, expected) < 1e-10

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 3)
            self.shift = nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + self.shift

    other = cl.Risk(seeded(Shifted()), CE, (draw(6, 4), classes(6, below=3)))
    inf = Influence.of(other, cl.kfac(other, progress=False))  # its shift is in no block
    assert inf.risk.space.names == ("body.weight", "body.bias")
    part = other.restrict(["body.*"])
    expected = cl.kfac(part, progress=False).solve(rows(part).T)
    assert relative(inf.scores(part).scores, rows(part) @ expected) < 1e-10
    whole = Influence.of(other, **QUIET)
    assert whole.risk.space.size == other.space.size
    assert whole.scores(QUERY).layers == ("shift", "body")


# --------------------------------------------------------------- removing examples
def test_nats_of_linear_regression_in_closed_form() -> None:
    """Cook's formula: the change of parameters is that of influence over 1 - leverage."""
    x, y = draw(12, 3), draw(12, 2, seed=1)
    theta = torch.linalg.lstsq(x, y).solution
    model = nn.Linear(3, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(theta.T)
    leverage = (x @ torch.linalg.inv(x.T @ x) * x).sum(1)
    xq, yq = draw(4, 3, seed=2), draw(4, 2, seed=3)
    for reduction in ("mean", "sum"):
        risk = cl.Risk(model, nn.MSELoss(reduction=reduction), (x, y))
        for H, tolerance in ((cl.ggn(risk), 1e-6), (cl.kfac(risk, progress=False), 1e-9)):
            inf = Influence.of(risk, H, damping=0.0, unit="nats")
            found = inf.scores((xq, yq)).scores
            for n in range(12):
                left = torch.arange(12) != n
                moved = torch.linalg.lstsq(x[left], y[left]).solution - theta
                g = 2.0 * xq[:, :, None] * (xq @ theta - yq)[:, None, :]
                expected = (g * moved).sum((1, 2)) * (1.0 - leverage[n])
                assert torch.allclose(found[:, n], expected, rtol=tolerance, atol=tolerance)
    assert "nats" in repr(inf)


def test_nats_of_logistic_regression_by_refitting() -> None:
    """Newton's method without each example; class weights are part of the mean."""
    count, weight = 150, torch.tensor([1.0, 3.0], dtype=F64)
    x = torch.cat([draw(count, 2), torch.ones(count, 1, dtype=F64)], 1)
    y = (x[:, 0] + draw(count, seed=4) > 0).long()
    xq, yq = x[:20] + 0.3, 1 - y[:20]

    def fitted(keep: Tensor) -> Tensor:
        theta = torch.zeros(3, dtype=F64)
        a = weight[y]
        for _ in range(30):
            p = (x @ theta).sigmoid()
            g = x[keep].T @ (a * (p - y))[keep]
            H = (x[keep].T * (a * p * (1 - p))[keep]) @ x[keep]
            theta = theta - torch.linalg.solve(H, g)
        return theta

    def losses(theta: Tensor) -> Tensor:
        z = xq @ theta
        return weight[yq] * F.binary_cross_entropy_with_logits(z, yq.double(), reduction="none")

    full = fitted(torch.ones(count).bool())
    model = nn.Linear(3, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.stack([-full, full]) / 2)
    risk = cl.Risk(model, nn.CrossEntropyLoss(weight=weight), (x, y))
    inf = Influence.of(risk, cl.ggn(risk), damping=1e-9, relative=False, unit="nats")
    found = inf.scores((xq, yq)).scores
    actual = torch.stack([losses(fitted(torch.arange(count) != n)) for n in range(60)], 1)
    actual = actual - losses(full)[:, None]
    slope = float((found[:, :60] * actual).sum() / found[:, :60].square().sum())
    both = torch.stack([found[:, :60].reshape(-1), actual.reshape(-1)])
    assert float(torch.corrcoef(both)[0, 1]) > 0.99
    assert 0.95 < slope < 1.15  # above 1 by leverage


def test_units_differ_by_the_weight() -> None:
    risk = mlp()
    raw, nats = (Influence.of(risk, unit=unit, **QUIET) for unit in ("inner_product", "nats"))
    assert relative(20 * nats.scores(QUERY).scores, raw.scores(QUERY).scores) < 1e-13
    assert relative(20 * nats.self_scores().scores, raw.self_scores().scores) < 1e-13
    a, b = raw.top(QUERY, k=3), nats.top(QUERY, k=3)
    assert torch.equal(a.indices, b.indices)
    assert a.per_layer is not None
    assert b.per_layer is not None
    assert relative(20 * b.per_layer, a.per_layer) < 1e-12
    assert (a.unit, b.unit) == ("inner_product", "nats")
    assert "raises the query's loss" in a.sign


# ------------------------------------------------------------------------ searches
def test_top_is_the_sorted_full_matrix() -> None:
    risk = mlp(40)
    inf = Influence.of(risk, **QUIET)
    full = inf.scores(QUERY, per_layer=True)
    top = inf.top(QUERY, k=6, bottom=4)
    order = full.scores.sort(dim=1, descending=True)
    assert torch.equal(top.indices, order.indices[:, :6])
    assert relative(top.scores, order.values[:, :6]) < 1e-12
    assert torch.equal(top.bottom_indices, order.indices.flip(1)[:, :4])
    assert relative(top.bottom_scores, order.values.flip(1)[:, :4]) < 1e-12
    assert full.per_layer is not None
    assert top.per_layer is not None
    assert top.bottom_per_layer is not None
    where = top.indices[..., None].expand(-1, -1, full.per_layer.shape[2])
    assert relative(top.per_layer, full.per_layer.gather(1, where)) < 1e-12
    assert relative(top.bottom_per_layer.sum(2), top.bottom_scores) < 1e-12
    assert torch.allclose(top.mean, full.scores.mean(1), rtol=1e-10)
    assert torch.allclose(top.std, full.scores.std(1, correction=0), rtol=1e-10)
    assert top.examples == 40
    assert torch.equal(top.sample.sort(1).values, full.scores.sort(1).values)
    everything = inf.top(QUERY, k=40)
    assert torch.equal(everything.indices, order.indices)


def test_ties_go_to_the_first_example() -> None:
    """Also across batches, and for opponents. Of small integers, so that ties are exact."""
    x = torch.tensor([[1.0, 0.0], [2.0, -1.0], [0.0, 3.0], [-1.0, 1.0]], dtype=F64).repeat(3, 1)
    y = torch.tensor([[1.0], [2.0], [1.0], [0.0]], dtype=F64).repeat(3, 1)
    model = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, -1.0]]))
    g = (2.0 * (x @ model.weight.detach().T - y) * x).long()
    scores = (g[:4] @ g.T).tolist()
    down = [sorted(range(12), key=lambda n: (-row[n], n)) for row in scores]
    up = [sorted(range(12), key=lambda n: (row[n], n)) for row in scores]
    for size in (12, 5, 1):
        data = list(zip(x.split(size), y.split(size), strict=True))
        inf = Influence(model, nn.MSELoss(), data, "identity", **QUIET)
        for k in (12, 3):
            top = inf.top((x[:4], y[:4]), k=k)
            assert top.indices.tolist() == [own[:k] for own in down]
            assert top.bottom_indices.tolist() == [own[:k] for own in up]


@pytest.mark.parametrize("name", ["language model", "experts", "tied, masked"])
def test_batches_do_not_matter(name: str) -> None:
    x, y = PROBLEMS[name][2]
    risk = problem(name)
    inf = Influence.of(risk, "identity", **QUIET)
    tops = [
        inf.top((x[:2], y[:2]), 3, train=list(zip(x.split(size), y.split(size), strict=True)))
        for size in (1, 2, 3)
    ]
    for own in tops[1:]:
        assert torch.equal(own.indices, tops[0].indices)
        assert relative(own.scores, tops[0].scores) < 1e-12
        assert torch.allclose(own.per_token, tops[0].per_token, rtol=1e-10, atol=1e-13)


def test_tokens_of_unequal_sequences() -> None:
    model = seeded(Language())
    loss = nn.CrossEntropyLoss()
    short = TOKENS[:2, :3]
    data = [(TOKENS[2:], TOKENS[2:].roll(1, 1)), (short, short.roll(1, 1))]
    inf = Influence(model, loss, data, "ekfac", fit={"fisher": "empirical"}, **QUIET)
    top = inf.top((TOKENS[:1], TOKENS[:1].roll(1, 1)), k=5)
    assert top.per_token is not None
    assert top.token_counts is not None
    assert top.per_token.shape == (1, 5, 4)
    assert torch.equal(top.token_counts, torch.where(top.indices >= 3, 3, 4))
    assert relative(top.per_token.sum(2), top.scores) < 1e-12
    assert bool((top.per_token[..., 3][top.indices >= 3] == 0).all())


def test_what_is_not_asked_for_is_not_there() -> None:
    inf = Influence.of(mlp(), "identity")
    top = inf.top(QUERY, k=2, bottom=0, per_layer=False, per_token=False)
    assert top.bottom_indices.shape == (3, 0)
    assert (top.per_layer, top.per_token, top.token_counts) == (None, None, None)


def test_chosen_examples() -> None:
    inf = Influence.of(mlp(), "identity")
    top = inf.top(QUERY, k=3, chosen=[17, 2, 4, 2])
    scores = inf.scores(QUERY).scores
    chosen = torch.tensor([2, 4, 17])
    assert torch.equal(top.indices, chosen[scores[:, chosen].argsort(1, descending=True)])
    assert top.examples == 3


@pytest.mark.parametrize("rescore", [True, False])
def test_compressed_directions(rescore: bool) -> None:
    model = seeded(nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 3)))
    x, y = draw(60, 30), classes(60, below=3)
    inf = Influence(model, CE, list(zip(x.split(16), y.split(16), strict=True)), **QUIET)
    query = (draw(4, 30, seed=5), classes(4, below=3, seed=5))
    dense = inf.top(query, k=5)
    low = inf.top(query, k=5, rank=4, rescore=rescore)
    assert low.rescored is rescore
    assert relative(inf.scores(query, tolerance=0.0).scores, inf.scores(query).scores) < 1e-10
    if rescore:
        assert torch.equal(low.indices, dense.indices)
        assert relative(low.scores, dense.scores) < 1e-12
    else:
        assert 1e-8 < relative(low.scores, dense.scores) < 0.2


def test_queries_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of one query at a time."""
    inf = Influence.of(mlp(), **QUIET)
    before = inf.top(QUERY, k=4, rank=1)
    monkeypatch.setattr("curvlib.influence.directions.MEMORY", 1)
    after = inf.top(QUERY, k=4, rank=1)
    assert torch.equal(before.indices, after.indices)
    assert relative(after.scores, before.scores) < 1e-12


def test_reductions_measurements_and_other_data() -> None:
    inf = Influence.of(mlp(), **QUIET)
    each = inf.scores(QUERY).scores
    assert relative(inf.scores(QUERY, query_reduction="sum").scores[0], each.sum(0)) < 1e-12
    assert relative(inf.scores(QUERY, query_reduction="mean").scores[0], each.mean(0)) < 1e-12
    found = inf.scores(
        QUERY, measurement=lambda out, y: -2.0 * F.cross_entropy(out, y, reduction="sum")
    )
    assert relative(found.scores, -2.0 * each) < 1e-12
    assert relative(inf.scores(QUERY, measurement=CE).scores, each) < 1e-12
    assert (
        relative(
            inf.scores(QUERY, train=QUERY).scores, inf.scores(QUERY, inf.risk.on(QUERY)).scores
        )
        < 1e-14
    )
    assert (
        relative(inf.self_scores(QUERY).scores, inf.scores(QUERY, QUERY).scores.diagonal()) < 1e-12
    )


def test_normalized_scores() -> None:
    inf = Influence.of(mlp(), **QUIET)
    scores = inf.scores(QUERY).scores
    norms = rows(inf.risk).norm(dim=1)
    found = inf.scores(QUERY, normalize="gradient")
    assert relative(found.scores, scores / norms) < 1e-12
    assert found.unit == "normalized"
    expected = scores / inf.self_scores().scores.sqrt()
    assert relative(inf.scores(QUERY, normalize="self").scores, expected) < 1e-12
    top = inf.top(QUERY, k=3, normalize="self")
    assert relative(top.scores, expected.sort(1, descending=True).values[:, :3]) < 1e-12
    assert top.per_layer is not None
    assert relative(top.per_layer.sum(2), top.scores) < 1e-12
    # a gradient of zero has no direction
    zero = cl.Risk(
        inf.risk.model, nn.CrossEntropyLoss(ignore_index=0), (QUERY[0], torch.tensor([1, 0, 2]))
    )
    assert Influence.of(zero, "identity").scores(QUERY, normalize="gradient").scores[0, 1] == 0.0


@pytest.mark.parametrize("normalize", ["gradient", "self"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_normalized_searches(name: str, normalize: str) -> None:
    """Parts of layers add up to the scores, also of shared weights; norms are autograd's."""
    risk = problem(name)
    if name == "experts":
        risk = risk.restrict(["experts.0.*", "experts.1.*", "head.*"])
    inf = Influence.of(risk, **QUIET)
    G, plain = rows(risk), inf.scores(risk).scores
    by = G.norm(dim=1) if normalize == "gradient" else plain.diagonal().sqrt()
    top = inf.top(risk, k=len(G), normalize=normalize)
    expected = (plain / by).sort(1, descending=True).values
    assert relative(top.scores, expected) < 1e-10
    assert top.per_layer is not None
    assert relative(top.per_layer.sum(2), top.scores) < 1e-10


# ------------------------------------------------------------------ stops and files
class _Failing:
    """Batches that break off once."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.fails = batches, False

    def __iter__(self) -> Iterator[Any]:
        for i, batch in enumerate(self.batches):
            if self.fails and i == 3:
                self.fails = False
                raise OSError("the disk is gone")
            yield batch

    def __len__(self) -> int:
        return len(self.batches)


@pytest.mark.parametrize("name", ["mlp", "experts"])
def test_an_interrupted_scan_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    x, y = PROBLEMS[name][2]
    x, y = torch.cat([x, 2 * x]), torch.cat([y, y])
    size = 1 if name == "mlp" else 2
    y = y % 2 if name == "experts" else y
    data = _Failing(list(zip(x.split(size), y.split(size), strict=True)))
    inf = Influence.of(problem(name).on(data), "identity", **QUIET)
    query = (x[:2], y[:2])
    expected = inf.top(query, k=4)
    path = tmp_path / "scan.safetensors"
    data.fails = True
    with pytest.raises(OSError, match="the disk is gone"):
        inf.top(query, k=4, checkpoint=path)
    found = inf.top(query, k=4, checkpoint=path)
    for field in ("indices", "scores", "bottom_scores", "mean", "std", "sample", "per_layer"):
        assert torch.equal(getattr(found, field), getattr(expected, field))
    with pytest.raises(
        ValueError, match="made with other settings: bottom was 4 and is now 3; k was 4"
    ):
        inf.top(query, k=3, checkpoint=path)
    with pytest.raises(ValueError, match="of another problem"):
        inf.top((x[2:4], y[2:4]), k=4, checkpoint=path)


def test_results_are_saved_and_plotted(tmp_path: Path) -> None:
    inf = Influence.of(mlp(), **QUIET)
    for result in (inf.top(QUERY, k=2), inf.scores(QUERY), inf.self_scores()):
        loaded = type(result).load(result.save(tmp_path / "result.safetensors"))
        assert torch.equal(loaded.scores, result.scores)
        assert (loaded.sign, loaded.curvature) == (result.sign, "EK-FAC")
        assert loaded.plot().get_xlabel() == "influence (inner_product)"
    assert isinstance(result, SelfInfluence)
    assert repr(result).startswith("SelfInfluence(scores=[20], unit='inner_product'")
    assert repr(inf).startswith("Influence(EK-FAC, damping=0.1 relative, inner_product")


# -------------------------------------------------------------------------- errors
def test_bad_arguments() -> None:
    risk = mlp()
    with pytest.raises(TypeError, match="takes a Risk, got Linear"):
        Influence.of(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="unit= is one of 'inner_product', 'nats', got 'bits'"):
        Influence.of(risk, unit="bits")
    with pytest.raises(ValueError, match="unit='nats' predicts what removing an example does"):
        Influence.of(risk, "identity", unit="nats")
    with pytest.raises(ValueError, match="curvature= is one of .*, got 'hessian'"):
        Influence.of(risk, "hessian")
    with pytest.raises(TypeError, match="or an operator, got int"):
        Influence.of(risk, 3)
    with pytest.raises(TypeError, match="damping= is a number, got str"):
        Influence.of(risk, damping="0.1")
    with pytest.raises(ValueError, match="damping= is a finite number, at least 0, got -1"):
        Influence.of(risk, damping=-1.0)
    with pytest.raises(ValueError, match="the identity is not fitted"):
        Influence.of(risk, "identity", fit={"fisher": "mc"})
    with pytest.raises(ValueError, match="fit= is for curvature by name"):
        Influence.of(risk, cl.ggn(risk), fit={"fisher": "mc"})
    inf = Influence.of(risk, "identity")
    with pytest.raises(ValueError, match="query_reduction= is None, 'sum' or 'mean'"):
        inf.scores(QUERY, query_reduction="max")
    with pytest.raises(ValueError, match="normalize= is one of None, 'self', 'gradient'"):
        inf.scores(QUERY, normalize="cosine")
    with pytest.raises(ValueError, match="normalized scores are not in nats"):
        Influence.of(risk, unit="nats", **QUIET).scores(QUERY, normalize="self")
    with pytest.raises(TypeError, match="measurement= comes with batches of queries"):
        inf.scores(risk, measurement=CE)


def test_numbers_of_examples() -> None:
    inf = Influence.of(mlp(), "identity")
    with pytest.raises(ValueError, match="k= is at least 1, got 0"):
        inf.top(QUERY, k=0)
    with pytest.raises(ValueError, match="bottom= is at least 0, got -1"):
        inf.top(QUERY, bottom=-1)
    with pytest.raises(TypeError, match="k= is an int, got float"):
        inf.top(QUERY, k=2.0)
    with pytest.raises(
        ValueError, match="50 examples were asked for, but there are only 20 to score"
    ):
        inf.top(QUERY)
    with pytest.raises(
        ValueError, match="3 examples were asked for, but there are only 2 to score"
    ):
        inf.top(QUERY, k=3, chosen=[0, 1])
    with pytest.raises(TypeError, match="chosen= is the numbers of examples, integers"):
        inf.top(QUERY, k=1, chosen=torch.ones(2))
    with pytest.raises(ValueError, match="chosen= .* not empty"):
        inf.top(QUERY, k=1, chosen=[])


def test_operators_of_other_models_and_data() -> None:
    risk = mlp()
    other = cl.Risk(seeded(nn.Sequential(nn.Linear(4, 3))), CE, QUERY)
    with pytest.raises(ValueError, match="of shape .*, but the risk has"):
        Influence.of(risk, fisher_diagonal(other))
    with pytest.raises(ValueError, match=r"another model: it has the parameters \['2.bias'"):
        Influence.of(risk.restrict(["0.*"]), cl.kfac(risk, progress=False))
    with pytest.raises(ValueError, match="was fitted on another risk"):
        Influence.of(risk, cl.kfac(risk.on(QUERY), progress=False))
    with pytest.raises(ValueError, match="a risk of the same model, but it has not"):
        Influence.of(risk, "identity").scores(other)
    P = risk.space.size
    values = torch.logspace(-15, 0, P, dtype=F64)[:, None]
    singular = cl.LinearOperator(lambda V: values * V, (P, P), dtype=F64, psd=True)
    with pytest.raises(RuntimeError, match="did not converge: the largest relative residual"):
        Influence.of(risk, singular, damping=0.0).scores(QUERY)


def test_no_layer_has_kronecker_factors() -> None:
    model = seeded(nn.Sequential(nn.PReLU(), nn.Flatten()))
    risk = cl.Risk(model, nn.MSELoss(), (draw(4, 3), draw(4, 3, seed=1)))
    with pytest.raises(ValueError, match="no parameter has Kronecker-factored curvature"):
        Influence.of(risk, **QUIET)
    Influence.of(risk, "diagonal")  # works


def test_queries_of_other_shapes() -> None:
    inf = Influence.of(mlp(), "identity")
    with pytest.raises(
        ValueError, match=r"queries have examples of shapes \[5\] .*, but the training data of \S*"
    ):
        inf.scores((draw(3, 5), QUERY[1]))


def test_what_is_not_finite_is_named() -> None:
    bad = (QUERY[0].clone(), QUERY[1])
    bad[0][1, 2] = torch.nan
    inf = Influence.of(mlp(), "identity")
    for call in (lambda: inf.scores(bad), lambda: inf.top(QUERY, 2, train=bad)):
        with pytest.raises(FloatingPointError, match="inputs of layer '0' are not finite"):
            call()
    assert isinstance(inf.scores(QUERY), InfluenceScores)  # nothing is broken by it
    assert isinstance(inf.top(QUERY, k=1), TopInfluence)
