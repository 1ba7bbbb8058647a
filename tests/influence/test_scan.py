"""The scan's state: a pure function of batches, ties, and a uniform sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import curvlib as cl
from curvlib.influence.directions import query_directions
from curvlib.influence.influence import Influence
from curvlib.influence.preconditioner import Preconditioner
from curvlib.influence.scan import Scan, hashed, inverse, ranked
from curvlib.operators.scores.example_scores import BatchScores, example_gradients_by_layers
from tests.operators.factored import CE, F64, classes, draw, relative, seeded
from tests.problems import snapshot


def risk_of(count: int) -> cl.Risk:
    model = seeded(nn.Linear(3, 3))
    return cl.Risk(model, CE, (draw(count, 3), classes(count, below=3)))


def scan_of(risk: cl.Risk, **options: Any) -> Scan:
    directions = query_directions(risk.on((draw(2, 3), classes(2, below=3))), _identity())
    return Scan(risk, directions, **{"k": 2, "bottom": 1, **options})


def _identity() -> Preconditioner:
    return Preconditioner(None, 0.0, False)


def part_of(scores: Tensor, start: int, batch: int) -> BatchScores:
    """Scores ``[n, Q]`` as those of a batch."""
    n = len(scores)
    return BatchScores(
        batch=batch,
        stop=start + n,
        numbers=torch.arange(start, start + n),
        scores=scores,
        layers=scores[..., None],
        tokens=None,
        norms=None,
        alone=False,
    )


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=30),
    cuts=st.lists(st.integers(1, 6), min_size=30, max_size=30),
    k=st.integers(1, 6),
)
def test_any_split_gives_the_stably_sorted_scores(
    values: list[int], cuts: list[int], k: int
) -> None:
    """Few different scores, so that ties are many."""
    scores = torch.tensor(values, dtype=F64)[:, None].repeat(1, 2)
    scan = scan_of(risk_of(2), k=k, bottom=k, sample=7)
    state, start = scan.init(), 0
    for batch, cut in enumerate(cuts):
        own = scores[start : start + cut]
        if len(own):
            before = state
            state = scan.merged(state, part_of(own, start, batch))
            assert before.examples == start  # states are not changed
        start += len(own)
    numbers = range(len(values))
    for found, expected in (
        (state.top_indices, sorted(numbers, key=lambda n: (-values[n], n))),
        (state.bottom_indices, sorted(numbers, key=lambda n: (values[n], n))),
    ):
        assert found.tolist() == [expected[:k]] * 2
    assert torch.allclose(state.total, scores.sum(0))
    assert torch.allclose(state.squares, scores.square().sum(0))
    kept = hashed(torch.arange(len(values))).sort().indices[:7]
    assert torch.equal(state.sample_scores[0], scores[kept, 0])


def test_the_sample_is_uniform() -> None:
    """Of 20000 numbers, those of the smallest keys: spread evenly, by a chi-squared test."""
    keys = hashed(torch.arange(20000))
    assert len(keys.unique()) == 20000
    chosen = keys.sort().indices[:2000]
    counts = torch.histc(chosen.double(), bins=20, min=0, max=20000)
    assert float(((counts - 100.0) ** 2 / 90.0).sum()) < 43.8  # 99.9 % of 19 degrees of freedom
    assert 0.4 < float((chosen % 2).double().mean()) < 0.6


def test_ranks_and_reciprocals() -> None:
    found = ranked(torch.tensor([[2.0, 1.0, 2.0]]), 5, descending=False)
    assert found.indices.tolist() == [[1, 0, 2]]
    assert inverse(torch.tensor([0.0, 4.0])).tolist() == [0.0, 0.25]


@pytest.mark.parametrize("reduction", [None, "sum", "mean"])
def test_directions_of_queries(reduction: str | None) -> None:
    """In parts of one query at a time, or all at once."""
    risk = risk_of(5)
    G = torch.cat(list(example_gradients_by_layers(risk)))
    G = {None: G, "sum": G.sum(0, True), "mean": G.mean(0, True)}[reduction]
    for memory in (1, 2**20):
        found = query_directions(risk, _identity(), reduction=reduction, memory=memory)
        (block,) = found.values()
        expected = torch.cat([G[:, :9].reshape(-1, 3, 3), G[:, 9:, None]], 2)[:, None]
        assert relative(block.dense(), expected) < 1e-14


def test_reports_of_progress() -> None:
    seen: list[tuple[float, float | None, str]] = []
    risk = risk_of(6)
    x, y = risk.data
    inf = Influence.of(
        risk.on(list(zip(x.split(2), y.split(2), strict=True))),
        "identity",
        progress=lambda *report: seen.append(report),
    )
    inf.top((x, y), k=1)
    assert seen[0] == (1.0, 3.0, "2 examples")
    assert seen[-1] == (3.0, 3.0, "6 examples")


def test_the_model_is_left_as_it_was() -> None:
    risk = risk_of(6)
    before = snapshot(risk.model)
    inf = Influence.of(risk, progress=False)
    inf.top(risk, k=2)
    inf.scores(risk, normalize="self")
    snapshot(risk.model).assert_same(before)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:curvlib. .*:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_language_models_of_hugging_face() -> None:
    """Position embeddings that all examples share are found out, and examples go one by one."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=9, n_positions=5, n_embd=4, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = seeded(transformers.GPT2LMHeadModel(config))
    tokens = classes(4, 5, below=9)

    def shared(m: nn.Module, batch: Any) -> Tensor:
        return m(input_ids=batch["ids"]).logits[:, :-1].transpose(1, 2)

    def spread(m: nn.Module, batch: Any) -> Tensor:
        ids = batch["ids"]
        places = torch.arange(5).expand_as(ids)
        return m(input_ids=ids, position_ids=places).logits[:, :-1].transpose(1, 2)

    rows = []
    for i in range(4):
        out = shared(model, {"ids": tokens[i : i + 1]})
        loss = nn.functional.cross_entropy(out, tokens[i : i + 1, 1:], reduction="sum")
        rows.append(
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, model.parameters())])
        )
    G = torch.stack(rows)
    for forward in (shared, spread):
        inf = Influence(
            model,
            CE,
            [{"ids": tokens[:3]}, {"ids": tokens[3:]}],
            "identity",
            forward=forward,
            target=lambda batch: batch["ids"][:, 1:],
            progress=False,
        )
        top = inf.top({"ids": tokens}, k=4)
        expected = (G @ G.T).sort(1, descending=True)
        assert torch.equal(top.indices, expected.indices)
        assert relative(top.scores, expected.values) < 1e-12
        assert relative(top.per_token.sum(2), expected.values) < 1e-12
