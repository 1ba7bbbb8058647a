"""Data, losses and models as they come: influence is right, or says what is wrong."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import curvlib as cl
from curvlib.influence.influence import Influence
from curvlib.influence.matrix import score_matrix
from tests.operators.factored import CE, F64, classes, draw, relative, seeded

QUIET: dict[str, Any] = {"progress": False}
X, Y = draw(23, 4), classes(23, below=3)
QUERY = (draw(3, 4, seed=9), classes(3, below=3, seed=9))


def model(seed: int = 0) -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), seed)


def rows(net: nn.Module, loss: Any, x: Tensor, y: Tensor) -> Tensor:
    """Gradients of each example's own loss, by autograd."""
    params = [p for p in net.parameters() if p.requires_grad]
    out = []
    for n in range(len(x)):
        found = torch.autograd.grad(loss(net(x[n : n + 1]), y[n : n + 1]), params)
        out.append(torch.cat([g.reshape(-1) for g in found]))
    return torch.stack(out)


# --------------------------------------------------------------------- order of data
ORDERED = TensorDataset(X, Y)
SHUFFLED: dict[str, Any] = {
    "shuffle=True": lambda: DataLoader(ORDERED, batch_size=5, shuffle=True),
    "weighted": lambda: DataLoader(ORDERED, 5, sampler=WeightedRandomSampler([1.0] * 23, 23)),
    "subset": lambda: DataLoader(ORDERED, 5, sampler=SubsetRandomSampler(range(10))),
    "batches": lambda: DataLoader(
        ORDERED, batch_sampler=BatchSampler(RandomSampler(ORDERED), 5, False)
    ),
}


@pytest.mark.parametrize("name", SHUFFLED)
def test_shuffled_data_is_refused(name: str, tmp_path: Any) -> None:
    """As training data, as other data and as queries."""
    loader = SHUFFLED[name]()
    shuffled = Influence(model(), CE, loader, "identity", **QUIET)
    ordered = Influence(model(), CE, DataLoader(ORDERED, 5), "identity", **QUIET)
    calls = [
        lambda: shuffled.top(QUERY, k=2),
        lambda: shuffled.scores(QUERY),
        shuffled.self_scores,
        lambda: score_matrix(shuffled, QUERY, tmp_path / "m", progress=False),
        lambda: ordered.top(QUERY, k=2, train=loader),
        lambda: ordered.scores(loader),
        lambda: ordered.scores(ordered.risk.on(loader)),
        lambda: ordered.scores(loader, measurement=lambda out, y: out.sum()),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"random order .*; pass DataLoader\(..., shuffle=F"):
            call()
    assert shuffled.scores(QUERY, train=(X, Y)).scores.shape == (3, 23)
    assert ordered.scores(QUERY).scores.shape == (3, 23)


class _Moving:
    """Batches in another order at every pass, which no sampler tells."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        order = torch.randperm(23, generator=torch.Generator().manual_seed(self.passes))
        yield from zip(X[order].split(5), Y[order].split(5), strict=True)


def test_data_that_moves_is_noticed() -> None:
    inf = Influence(model(), CE, _Moving(), "identity", **QUIET)
    with pytest.raises(RuntimeError, match="changed by .* when they were looked at again: the da"):
        inf.top(QUERY, k=5)
    inf.top(QUERY, k=5, per_layer=False, per_token=False)  # one pass alone


def test_loaders_of_streams() -> None:
    """Whose number of batches is unknown."""

    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            yield from zip(X, Y, strict=True)

    inf = Influence(model(), CE, DataLoader(Stream(), batch_size=5), **QUIET)
    expected = Influence(model(), CE, (X, Y), **QUIET)
    assert relative(inf.scores(QUERY).scores, expected.scores(QUERY).scores) < 1e-12
    found = inf.top(QUERY, k=3)
    assert torch.equal(found.indices, expected.top(QUERY, k=3).indices)
    with pytest.raises(ValueError, match="50 examples were asked for, but there are only 23 to"):
        inf.top(QUERY)


# ---------------------------------------------------------------------------- losses
@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 0.5], dtype=F64)),
        nn.CrossEntropyLoss(weight=torch.tensor([0.0, 1.0, 1.0], dtype=F64)),
        nn.CrossEntropyLoss(ignore_index=1),
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(label_smoothing=0.1),
    ],
    ids=["weights", "zero weight", "ignored", "sum", "smooth"],
)
def test_weighted_and_masked_losses_in_unequal_batches(loss: nn.Module) -> None:
    """Gradients are those of each example's weighted loss, whatever the batch is."""
    net, each = model(), copy.copy(loss)
    each.reduction = "sum"
    data = list(zip(X.split(5), Y.split(5), strict=True))  # 5, 5, 5, 5, 3
    G, q = rows(net, each, X, Y), rows(net, each, *QUERY)
    inf = Influence(net, loss, data, "identity", **QUIET)
    assert relative(inf.scores(QUERY).scores, q @ G.T) < 1e-12
    assert relative(inf.self_scores().scores, G.square().sum(1)) < 1e-12
    whole = Influence(net, loss, (X, Y), **QUIET)
    parts = Influence(net, loss, data, **QUIET)
    assert relative(parts.scores(QUERY).scores, whole.scores(QUERY).scores) < 1e-10


@pytest.mark.parametrize("curvature", ["ekfac", "kfac"])
def test_examples_of_no_weight_are_as_if_they_were_not_there(curvature: str) -> None:
    """Not in the factors of inputs, either; whatever their batches are."""
    zero = nn.CrossEntropyLoss(weight=torch.tensor([0.0, 1.0, 1.0], dtype=F64))
    masked = Y.masked_fill(Y == 0, -100)
    there = Y != 0
    without = Influence(model(), CE, (X[there], Y[there]), curvature, **QUIET)
    query = (QUERY[0], QUERY[1].clamp(min=1))
    expected = without.scores(query).scores
    for loss, y in ((zero, Y), (CE, masked)):
        for size in (23, 5, 1):
            data = list(zip(X.split(size), y.split(size), strict=True))
            inf = Influence(model(), loss, data, curvature, **QUIET)
            assert relative(inf.scores(query).scores[:, there], expected) < 1e-10


def test_examples_of_no_weight_have_no_influence() -> None:
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.0, 1.0, 1.0], dtype=F64))
    inf = Influence(model(), loss, (X, Y), unit="nats", **QUIET)
    for normalize in (None, "self", "gradient"):
        if normalize:
            inf = Influence(model(), loss, (X, Y), **QUIET)
        found = inf.scores(QUERY, normalize=normalize).scores
        assert bool((found[:, Y == 0] == 0).all())
        assert bool((found[:, Y != 0] != 0).any())
        assert bool(found.isfinite().all())
    ignored = (QUERY[0], torch.full((3,), -100))
    for options in ({}, {"rank": 1}, {"tolerance": 0.1}):
        assert bool((Influence(model(), CE, (X, Y), **QUIET).scores(ignored, **options).scores == 0)
                    .all())  # fmt: skip


def test_a_batch_that_is_ignored_altogether() -> None:
    masked = torch.full((5,), -100)
    inf = Influence(model(), CE, [(X[:5], masked), (X, Y)], **QUIET)
    found = inf.scores(QUERY).scores
    assert bool((found[:, :5] == 0).all())
    expected = Influence(model(), CE, (X, Y), **QUIET).scores(QUERY).scores
    assert relative(found[:, 5:], expected) < 1e-12


def _mean(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y)


def test_means_where_sums_are_needed_are_told() -> None:
    inf = Influence(model(), CE, (X, Y), **QUIET)
    with pytest.raises(ValueError, match="is not a sum over examples: it gives batch 0 .* its hal"):
        inf.scores(QUERY, measurement=_mean)
    with pytest.raises(ValueError, match="is not a sum over examples"):
        inf.scores(QUERY, measurement=lambda out, y: out[0, 1])
    sums = inf.scores(QUERY, measurement=lambda out, y: F.cross_entropy(out, y, reduction="sum"))
    assert relative(sums.scores, inf.scores(QUERY).scores) < 1e-12
    declared = cl.Risk(model(), _mean, (X, Y), reduction="sum")
    with pytest.raises(ValueError, match="is not a sum over examples"):
        Influence.of(declared, "identity").self_scores()
    undeclared = cl.Risk(model(), lambda out, y: F.cross_entropy(out, y, reduction="sum"), (X, Y))
    with pytest.raises(ValueError, match="is not a mean over examples"):
        Influence.of(undeclared, "identity").self_scores()


def test_measurements_that_cannot_be_split_are_believed() -> None:
    """Of queries whose targets are no tensor, and of one query."""
    inf = Influence(model(), CE, (X, Y), **QUIET)
    one = (QUERY[0][:1], QUERY[1][:1])
    found = inf.scores(one, measurement=lambda out, y: out[0, 1])
    assert found.scores.shape == (1, 23)

    def picky(out: Tensor, y: Tensor) -> Tensor:
        if len(out) not in (1, 3):
            raise ValueError("three queries, please")
        return out[:, 0].sum()

    assert inf.scores(QUERY, measurement=picky).scores.shape == (3, 23)


# --------------------------------------------------------------------------- queries
def test_queries_that_are_one_or_repeated() -> None:
    inf = Influence(model(), CE, (X, Y), **QUIET)
    every = inf.scores(QUERY).scores
    one = inf.scores((QUERY[0][1:2], QUERY[1][1:2])).scores
    assert relative(one, every[1:2]) < 1e-12
    bare = inf.scores((QUERY[0][1], QUERY[1][1])).scores  # an example without an axis of examples
    assert relative(bare, every[1:2]) < 1e-12
    same = torch.tensor([0, 0, 2, 0])
    again = (QUERY[0][same], QUERY[1][same])
    assert relative(inf.scores(again).scores, every[same]) < 1e-12
    for options in ({}, {"rank": 3}):
        top = inf.top(again, k=4, **options)
        assert bool((top.indices[[0, 1, 3]] == top.indices[0]).all())
        assert torch.equal(top.indices[0], inf.top(QUERY, k=4).indices[0])


def test_repeated_training_examples_have_the_same_scores() -> None:
    twice = (X.repeat(2, 1), Y.repeat(2))
    inf = Influence(model(), CE, twice, **QUIET)
    found = inf.scores(QUERY).scores
    assert torch.allclose(found[:, :23], found[:, 23:], rtol=1e-12)
    once = Influence(model(), CE, (X, Y), **QUIET).scores(QUERY).scores
    assert relative(found[:, :23], once) < 1e-10  # the mean of the curvature is the same


def test_nothing_to_score() -> None:
    inf = Influence(model(), CE, (X, Y), **QUIET)
    with pytest.raises(ValueError, match="batch 0 has no example; leave it out"):
        inf.top((QUERY[0][:0], QUERY[1][:0]), k=1)
    with pytest.raises(ValueError, match="the data has no batch"):
        inf.top([], k=1)
    with pytest.raises(ValueError, match="the data has no batch"):
        inf.scores(QUERY, train=[])


def test_too_few_examples_are_told_before_the_scan() -> None:
    net, calls = model(), 0

    def hook(*of: Any) -> None:
        nonlocal calls
        calls += 1

    inf = Influence(net, CE, (X, Y), "identity", **QUIET)
    net[0].register_forward_hook(hook)
    for k, chosen in ((24, None), (3, [1, 2])):
        with pytest.raises(ValueError, match=f"{k} examples were asked for, but there are only"):
            inf.top(QUERY, k=k, chosen=chosen)
    assert calls == 0
    with pytest.raises(ValueError, match="2 examples were asked for, but there are only 1 to"):
        inf.top(QUERY, k=2, chosen=[1, 99])


# ---------------------------------------------------------------------------- models
class _Idle(nn.Module):
    """A layer that is never called, a parameter that is never used, and one without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.idle = nn.Linear(2, 2)
        self.extra = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize("curvature", ["ekfac", "kfac"])
def test_parameters_that_no_gradient_reaches_are_left_out(curvature: str) -> None:
    net = seeded(_Idle())
    inf = Influence(net, CE, (X, Y), curvature, **QUIET)
    assert all(name.startswith("body.") for name in inf.risk.space.names)
    expected = Influence(net, CE, (X, Y), curvature, params=["body.*"], **QUIET)
    assert relative(inf.scores(QUERY).scores, expected.scores(QUERY).scores) < 1e-12
    assert inf.top(QUERY, k=3).layers == ("body.0", "body.2")
    own = cl.kfac(cl.Risk(net, CE, (X, Y)), rest="diagonal", progress=False)
    given = Influence(net, CE, (X, Y), own, **QUIET)
    assert given.risk.space.names == inf.risk.space.names
    absolute = Influence(net, CE, (X, Y), curvature, damping=0.1, relative=False, **QUIET)
    assert bool(absolute.scores(QUERY).scores.isfinite().all())


def test_frozen_layers_and_parts() -> None:
    net = model()
    net[0].requires_grad_(False)
    G, q = (rows(net, CE, *data) for data in ((X, Y), QUERY))
    inf = Influence(net, CE, (X, Y), "identity", **QUIET)
    assert inf.risk.space.names == ("2.weight", "2.bias")
    assert relative(inf.scores(QUERY).scores, q @ G.T) < 1e-12
    assert not net[0].weight.requires_grad
    part = Influence.of(cl.Risk(model(), CE, (X, Y), params=["2.*"]), "identity", **QUIET)
    assert relative(part.scores(QUERY).scores, q @ G.T) < 1e-12
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter is selected; the model has none that req"):
        Influence(net, CE, (X, Y), **QUIET)


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)],
)
def test_shorter_types(dtype: torch.dtype, bound: float) -> None:
    """Scores are float32; gradients have the model's own precision."""
    exact = Influence(model(), CE, (X, Y), **QUIET)
    inf = Influence(model().to(dtype), CE, (X.to(dtype), Y), **QUIET)
    query = (QUERY[0].to(dtype), QUERY[1])
    found = inf.scores(query).scores
    assert found.dtype == torch.float32
    assert relative(found.double(), exact.scores(QUERY).scores) < bound
    own = inf.self_scores().scores.double()
    assert relative(own, exact.self_scores().scores) < bound
    top = inf.top(query, k=3)
    assert torch.allclose(top.scores, found.gather(1, top.indices), rtol=1e-2)


def test_random_models_and_dependent_examples_are_told() -> None:
    drops = seeded(nn.Sequential(nn.Linear(4, 3), nn.Dropout())).train()
    for seed in range(25):  # with some, the last example keeps the same outputs alone
        torch.manual_seed(seed)
        with pytest.raises(ValueError, match="switch off dropout"):
            Influence(drops, CE, (X, Y), **QUIET)
    norm = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    with pytest.raises(ValueError, match="put BatchNorm into eval mode"):
        Influence(norm, CE, (X, Y), **QUIET)
    Influence(norm.eval(), CE, (X, Y), **QUIET)


def test_single_examples_are_no_batches() -> None:
    class Own(Dataset):
        def __len__(self) -> int:
            return 2

    inf = Influence(model(), CE, (X, Y), "identity", **QUIET)
    for data in (ORDERED, Own()):
        with pytest.raises(TypeError, match="of single examples; pass torch.utils.data.DataLoad"):
            inf.top(data, k=1)


def test_a_factor_file_of_other_data(tmp_path: Any) -> None:
    """Also of a loader whose data set has as many examples."""
    risk = cl.Risk(model(), CE, DataLoader(ORDERED, 5))
    path = cl.kfac(risk, progress=False).save(tmp_path / "k")
    other = DataLoader(TensorDataset(X + 1.0, Y), 5)
    with pytest.raises(ValueError, match="was fitted on another risk"):
        cl.KFAC.load(path, risk.on(other))
    K = cl.KFAC.load(path, risk)
    with pytest.raises(ValueError, match="was fitted on another risk"):
        Influence(model(), CE, other, K, **QUIET)
    with pytest.raises(ValueError, match="was fitted on another risk"):
        Influence(model(1), CE, DataLoader(ORDERED, 5), K, **QUIET)
    Influence(model(), CE, DataLoader(ORDERED, 5), K, **QUIET)


def test_a_fit_in_one_pass() -> None:
    data = list(zip(X.split(5), Y.split(5), strict=True))
    risk = cl.Risk(model(), CE, data)
    inf = Influence.of(risk, fit={"prefix": 2}, **QUIET)
    given = Influence.of(risk, cl.kfac(risk, prefix=2, rest="diagonal", progress=False), **QUIET)
    assert relative(inf.scores(QUERY).scores, given.scores(QUERY).scores) < 1e-12
    whole = Influence.of(risk, **QUIET).scores(QUERY).scores
    assert 1e-4 < relative(inf.scores(QUERY).scores, whole) < 0.5
