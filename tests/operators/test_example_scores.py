"""Scores of examples against Gram matrices of autograd's own gradients, one example at a time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import curvlib as cl
from curvlib.operators.fisher_diagonal import affordable_fisher, fisher_diagonal
from curvlib.operators.scores.blocks import score_blocks
from curvlib.operators.scores.directions import DenseDirections, formed
from curvlib.operators.scores.example_scores import (
    BatchScores,
    example_gradients_by_layers,
    example_scores,
)
from curvlib.operators.scores.rows import by_token
from tests.operators.factored import (
    CE,
    F64,
    FISHERS,
    PROBLEMS,
    TOKENS,
    Hidden,
    Language,
    classes,
    draw,
    problem,
    relative,
    seeded,
)

# problems whose layers all take a row for each token of integers or vectors ``[N, T, d]``
BY_TOKEN = ("language model", "tied, masked", "conv1d of gpt-2")
ALONE = ("time first", "experts")


def truth(risk: cl.Risk) -> Tensor:
    """Gradients of each example's summed loss, by autograd, ``[N, P]``."""
    loss = copy.copy(risk.loss.function)
    loss.reduction = "sum"
    rows = []
    for batch in risk.batches():
        for i in range(batch.examples):
            x, y = (t[i : i + 1] for t in batch.data)
            value = loss(risk.model(x), y)
            found = torch.autograd.grad(value, list(risk.params.values()), allow_unused=True)
            rows.append(risk.space.join(list(found)))
    return torch.stack(rows)


def directions(risk: cl.Risk, rows: Tensor) -> dict[str, DenseDirections]:
    return {block.name: DenseDirections(block.gather(rows)) for block in score_blocks(risk)}


def scored(risk: cl.Risk, rows: Tensor, **options: Any) -> BatchScores:
    """All batches of a risk as one."""
    parts = list(example_scores(risk, directions(risk, rows), **options))
    joined = {
        name: None
        if getattr(parts[0], name) is None
        else torch.cat([getattr(part, name) for part in parts])
        for name in ("numbers", "scores", "layers", "tokens", "norms")
    }
    last = parts[-1]
    return BatchScores(batch=last.batch, stop=last.stop, alone=last.alone, **joined)


# ------------------------------------------------------------------------ gradients
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("name", PROBLEMS)
def test_scores_are_the_gram_matrix_of_autograds_gradients(name: str, tokens: bool) -> None:
    """Grouped and depthwise convolutions, shared modules, tied heads, masks, norms, experts."""
    risk = problem(name)
    G = truth(risk)
    found = scored(risk, G, tokens=tokens)
    assert relative(found.scores, G @ G.T) < 1e-13
    assert found.numbers.tolist() == list(range(len(G)))
    assert found.alone == (name in ALONE)
    for b, block in enumerate(score_blocks(risk)):
        own = block.gather(G).flatten(1)
        assert torch.allclose(found.layers[..., b], own @ own.T, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", PROBLEMS)
def test_rows_are_autograds_gradients(name: str) -> None:
    risk = problem(name)
    rows = list(example_gradients_by_layers(risk, block=2))
    assert max(map(len, rows)) <= 2
    assert relative(torch.cat(rows), truth(risk)) < 1e-13


@pytest.mark.parametrize("name", PROBLEMS)
def test_norms(name: str) -> None:
    """Exact in each block, also of weights that are shared or used several times."""
    risk = problem(name)
    G = truth(risk)
    for tokens in (False, True):
        found = scored(risk, G, norms=True, tokens=tokens).norms
        assert found is not None
        for b, block in enumerate(score_blocks(risk)):
            exact = block.gather(G).flatten(1).norm(dim=1)
            assert torch.allclose(found[:, b], exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", BY_TOKEN)
def test_tokens_add_up_to_the_sequence(name: str) -> None:
    risk = problem(name)
    found = scored(risk, truth(risk), tokens=True)
    assert found.tokens is not None
    assert found.tokens.shape[2] == 4
    assert relative(found.tokens.sum(2), found.scores) < 1e-13


def test_tokens_of_a_linear_layer_by_hand() -> None:
    """The part of token t is g_t' D a_t, with the gradient of the whole sequence's loss."""
    model = seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    x, y = draw(2, 5, 3), draw(2, 5, 2, seed=1)
    risk = cl.Risk(model, nn.MSELoss(reduction="sum"), (x, y))
    D = draw(1, 26, seed=2)
    found = scored(risk, D, tokens=True).tokens
    inner = torch.tanh(model[0](x))
    g = 2.0 * (model[2](inner) - y)  # at the output of the last layer
    back = (g @ model[2].weight) * (1.0 - inner.square())
    first, second = score_blocks(risk)
    ones = torch.ones(2, 5, 1, dtype=F64)
    expected = torch.einsum(
        "nto,oi,nti->nt", back, first.gather(D)[0, 0], torch.cat([x, ones], 2)
    ) + torch.einsum("nto,oi,nti->nt", g, second.gather(D)[0, 0], torch.cat([inner, ones], 2))
    assert found is not None
    assert torch.allclose(found[:, 0], expected, rtol=1e-12)


def test_what_belongs_to_no_token_is_the_rest() -> None:
    """A pooled head takes one row for each example."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(3, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(x)).mean(1))

    risk = cl.Risk(seeded(Pooled()), CE, (draw(4, 5, 3), classes(4, below=2)))
    found = scored(risk, truth(risk), tokens=True)
    names = [block.name for block in score_blocks(risk)]
    assert found.tokens is not None
    assert torch.allclose(found.tokens.sum(2), found.layers[..., names.index("body")])


def test_places_of_tokens() -> None:
    values = torch.arange(12.0).view(1, 1, 12)
    by_hand = values.view(3, 4).sum(0)
    assert torch.equal(by_token(values, (2, 3, 4), 2, 4)[0, 0], by_hand)
    assert torch.equal(by_token(values, (8, 3), 2, 4)[0, 0], values.view(4, 3).sum(1))
    assert torch.equal(by_token(values, (2, 12), 2, 12), values)
    assert by_token(values, (2, 12), 2, 5) is None
    assert by_token(values, None, 2, 5) is None
    assert by_token(values, None, 2, 1).tolist() == [[[66.0]]]


def test_flattened_tokens_are_of_their_sequence() -> None:
    model = seeded(Language())
    loss = nn.CrossEntropyLoss(ignore_index=2)
    x, y = TOKENS, TOKENS.roll(1, 1)
    G = truth(cl.Risk(model, loss, (x, y)))
    flat = cl.Risk(
        model,
        loss,
        [(x[:3], y[:3].reshape(-1)), (x[3:], y[3:].reshape(-1))],
        forward=lambda m, b: m(b[0]).transpose(1, 2).reshape(-1, 7),
    )
    single = flat.on([(x[i : i + 1], y[i]) for i in range(5)])
    assert relative(scored(single, G).scores, G @ G.T) < 1e-13
    assert relative(scored(flat, G).scores, G @ G.T) < 1e-13
    assert relative(torch.cat(list(example_gradients_by_layers(flat))), G) < 1e-13
    chosen = torch.tensor([1, 4])
    assert relative(scored(flat, G, chosen=chosen).scores, (G @ G.T)[chosen]) < 1e-13


# ---------------------------------------------------------------- what is in no layer
class _Bare(nn.Module):
    """A parameter of its own, an LSTM and a PReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3))
        self.cell = nn.GRU(3, 2, batch_first=True)
        self.act = nn.PReLU()
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.cell(x + self.shift)[0][:, -1]))


@pytest.mark.parametrize("make", [_Bare, Hidden])
def test_parameters_in_no_layer(make: Any) -> None:
    """And layers whose weight is used by a function, too, where no hook sees it."""
    model = seeded(make())
    x = draw(4, 3) if isinstance(model, Hidden) else draw(4, 3, 3)
    risk = cl.Risk(model, CE, [(x[:3], classes(3, below=2)), (x[3:], classes(1, below=2))])
    G = truth(risk)
    for tokens in (False, True):
        found = scored(risk, G, tokens=tokens, norms=True)
        assert relative(found.scores, G @ G.T) < 1e-13
        assert found.norms is not None
        assert torch.allclose(found.norms.square().sum(1).sqrt(), G.norm(dim=1), rtol=1e-10)


def test_uses_that_change_between_batches() -> None:
    """A weight that a function uses in one batch only."""

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            out = self.a(x)
            return F.linear(out, self.a.weight) if float(x.sum()) > 0 else out

    x = draw(4, 3).abs()
    y = classes(4, below=3)
    risk = cl.Risk(seeded(Sometimes()), CE, [(-x[:2], y[:2]), (x[2:], y[2:])])
    G = truth(risk)
    assert relative(scored(risk, G).scores, G @ G.T) < 1e-13


def test_blocks_are_the_whole_space() -> None:
    risk = cl.Risk(seeded(_Bare()), CE, (draw(4, 3, 3), classes(4, below=2)))
    rows = draw(2, risk.space.size)
    out = torch.full_like(rows, torch.nan)
    for block in score_blocks(risk):
        block.scatter(block.gather(rows), out)
    assert torch.equal(out, rows)


# ------------------------------------------------------------------------- streams
@pytest.mark.parametrize("name", ["language model", "experts", "grouped convolutions"])
def test_batches_and_order_do_not_matter(name: str) -> None:
    risk = problem(name)
    G = truth(risk)
    whole = problem(name, batches=False)
    assert relative(scored(whole, G).scores, scored(risk, G).scores) < 1e-13
    x, y = PROBLEMS[name][2]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    shuffled = scored(risk.on((x[order], y[order])), G).scores
    assert relative(shuffled, scored(risk, G).scores[order]) < 1e-13


def test_chosen_examples_and_later_starts() -> None:
    risk = problem("language model")
    G = truth(risk)
    every = scored(risk, G).scores
    chosen = torch.tensor([0, 2, 4])
    found = scored(risk, G, chosen=chosen)
    assert found.numbers.tolist() == [0, 2, 4]
    assert relative(found.scores, every[chosen]) < 1e-13
    last = scored(risk, G, start=1, first=4)
    assert last.numbers.tolist() == [4]
    assert last.stop == 5
    assert torch.equal(last.scores, every[4:])
    assert [p.batch for p in example_scores(risk, directions(risk, G), chosen=chosen[2:])] == [1]


@pytest.mark.parametrize("name", ["tied, masked", "experts", "grouped convolutions"])
def test_wanted_pairs(name: str) -> None:
    """Those of the full matrix, and zeros elsewhere."""
    risk = problem(name)
    G = truth(risk)
    chosen = torch.tensor([0, 2, 3])
    wanted = torch.rand(3, len(G), generator=torch.Generator().manual_seed(0)) < 0.5
    every = scored(risk, G, chosen=chosen, tokens=True)
    found = scored(risk, G, chosen=chosen, wanted=wanted, tokens=True)
    assert relative(found.scores, every.scores * wanted) < 1e-13
    assert torch.allclose(found.tokens, every.tokens * wanted[..., None], rtol=1e-11, atol=1e-13)


def test_large_examples_are_done_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curvlib.operators.scores.rows.CHUNK", 1)
    monkeypatch.setattr("curvlib.operators.scores.directions.CHUNK", 1)
    for name in ("language model", "grouped convolutions", "mlp"):
        risk = problem(name)
        G = truth(risk)
        for tokens in (False, True):
            assert relative(scored(risk, G, tokens=tokens).scores, G @ G.T) < 1e-13


def test_the_model_is_left_alone_between_batches() -> None:
    risk = problem("language model")
    model = risk.model.train()
    stream = example_scores(risk, directions(risk, truth(risk)))
    next(stream)
    assert all(not m._forward_hooks for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.training


def test_weights_of_unknown_losses() -> None:
    """A mean over tokens with its number: gradients of sums over tokens."""
    model = seeded(Language())
    x, y = TOKENS, TOKENS.roll(1, 1)
    y = y.masked_fill(torch.arange(4) < torch.arange(5)[:, None] - 1, -100)
    G = truth(cl.Risk(model, CE, (x, y)))
    own = cl.Risk(
        model,
        _mean,
        [(x[:3], y[:3]), (x[3:], y[3:])],
        weight=lambda batch: (batch[1] != -100).sum(),
    )
    assert relative(scored(own, G).scores, G @ G.T) < 1e-12


# ---------------------------------------------------------------------- directions
@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, 4) for _ in range(6))),
    one_hot=st.booleans(),
    seed=st.integers(0, 99),
)
def test_dense_directions(sizes: tuple[int, ...], one_hot: bool, seed: int) -> None:
    """Both routes against an einsum, rows and indices of one-hot rows."""
    Q, G, n, T, out, width = sizes
    G = 1 if one_hot else G
    D = DenseDirections(draw(Q, G, out, width, seed=seed))
    right = draw(G, n, T, width, seed=seed + 1)
    left = draw(G, n, T, out, seed=seed + 2)
    rows = left
    if one_hot:
        left = classes(n, T, below=out, seed=seed)
        rows = F.one_hot(left, out).double()[None]
    expected = torch.einsum("gnto,qgoi,gnti->nqt", rows, D.matrices, right)
    assert torch.allclose(D.contract_tokens(left, right), expected)
    assert torch.allclose(D.contract(left, right), expected.sum(2))
    assert (D.count, D.shape) == (Q, (G, out, width))
    assert D.bytes == 8 * Q * G * out * width
    assert torch.equal(D.bound(torch.ones(n)), torch.zeros(n, Q))
    assert D.dense() is D.matrices


def test_the_cheaper_route() -> None:
    assert formed(64, 32, (1, 16, 16))
    assert not formed(1, 32, (1, 64, 64))
    assert not formed(64, 1, (1, 64, 64))
    assert formed(64, 8, (1, 65, 64), one_hot=True)
    assert not formed(64, 8, (1, 50000, 64), one_hot=True)


# -------------------------------------------------------------------- the diagonal
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_diagonal_of_the_fisher_matrix(name: str, fisher: str) -> None:
    risk = problem(name)
    expected = FISHERS[fisher](risk).diagonal()
    assert relative(fisher_diagonal(risk, fisher=fisher).diagonal(), expected) < 1e-13


def test_the_diagonal_of_sampled_targets() -> None:
    """Its mean over 400 seeds is the exact one, within 4 standard errors."""
    risk = problem("mlp")
    found = torch.stack([fisher_diagonal(risk, fisher="mc", seed=s).diagonal() for s in range(400)])
    gap = found.mean(0) - fisher_diagonal(risk).diagonal()
    assert bool((gap.abs() <= 4.0 * found.std(0) / 20.0 + 1e-12).all())


def test_affordable_fisher_matrices() -> None:
    assert affordable_fisher(problem("mlp")) == "type2"
    wide = cl.Risk(seeded(nn.Linear(2, 65)), CE, (draw(3, 2), classes(3, below=65)))
    assert affordable_fisher(wide) == "mc"
    other = cl.Risk(
        seeded(nn.Linear(2, 1)), lambda out, y: (out - y).abs().mean(), (draw(3, 2), draw(3, 1))
    )
    assert affordable_fisher(other) == "empirical"


def test_a_diagonal_of_nothing() -> None:
    loss = nn.CrossEntropyLoss(ignore_index=0)
    risk = cl.Risk(seeded(nn.Linear(2, 3)), loss, (draw(2, 2), torch.zeros(2).long()))
    with pytest.raises(ValueError, match="no loss term is valid"):
        fisher_diagonal(risk)


# --------------------------------------------------------------------------- errors
def test_directions_that_do_not_fit() -> None:
    risk = problem("mlp")
    good = directions(risk, truth(risk))
    with pytest.raises(ValueError, match=r"directions of some of the blocks \['0'"):
        list(example_scores(risk, {}))
    with pytest.raises(ValueError, match=r"directions are of the blocks \['nowhere'\]"):
        list(example_scores(risk, good | {"nowhere": good["0"]}))
    with pytest.raises(ValueError, match=r"as many directions in every block, got \[1, 6\]"):
        list(example_scores(risk, good | {"0": DenseDirections(good["0"].matrices[:1])}))
    with pytest.raises(ValueError, match=r"shape \[1, 5, 5\] in block '0', got \[1, 5, 4\]"):
        list(example_scores(risk, good | {"0": DenseDirections(good["0"].matrices[..., :4])}))


@pytest.mark.parametrize("run", [scored, lambda risk, _: list(example_gradients_by_layers(risk))])
def test_what_is_not_finite_is_named(run: Any) -> None:
    risk = problem("mlp")
    G = truth(risk)
    x, y = PROBLEMS["mlp"][2]
    bad = x.clone()
    bad[2, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="inputs of layer '0' are not finite at batch 0"):
        run(risk.on((bad, y)), G)
    with torch.no_grad():
        risk.params["3.weight"][0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match="gradients at the outputs of layer"):
        run(risk, G)


def test_overflow_of_scores_and_of_bare_parameters() -> None:
    risk = problem("mlp")
    with pytest.raises(FloatingPointError, match="scores of batch 0 are not finite, though"):
        scored(risk, 1e308 * truth(risk).sign())

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.w).sum(1, keepdim=True).sqrt()

    bare = cl.Risk(Bare().double(), nn.MSELoss(), (-draw(3, 2).abs(), draw(3, 1)))
    with pytest.raises(FloatingPointError, match="gradient by 'w' is not finite at batch 0"):
        list(example_gradients_by_layers(bare))


def test_losses_that_do_not_depend_on_parameters() -> None:
    model = seeded(nn.Linear(2, 2))
    risk = cl.Risk(model, CE, (draw(3, 2), classes(3, below=2)), forward=lambda m, b: b[0])
    with pytest.raises(ValueError, match="loss of batch 0 cannot be differentiated"):
        list(example_gradients_by_layers(risk))


def _mean(output: Tensor, target: Tensor) -> Tensor:
    """A mean over unmasked tokens."""
    return F.cross_entropy(output, target)


def test_means_over_something_unknown() -> None:
    """A mean over unmasked tokens that does not say how many there are."""
    model = seeded(Language())
    x, y = TOKENS, TOKENS.roll(1, 1)
    y = y.masked_fill(torch.arange(4) < torch.arange(5)[:, None] - 1, -100)
    own = cl.Risk(model, _mean, (x, y))
    with pytest.raises(ValueError, match="is not a mean over examples"):
        list(example_gradients_by_layers(own))


def test_dependent_examples() -> None:
    model = seeded(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))).train()
    risk = cl.Risk(model, CE, (draw(4, 3), classes(4, below=3)))
    with pytest.raises(ValueError, match="eval"):
        list(example_gradients_by_layers(risk))
