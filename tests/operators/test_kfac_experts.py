"""Mixtures of experts, whose layers see the few tokens that are routed to them by their values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvlib as cl
from curvlib.influence.influence import Influence
from curvlib.operators.kfac import kfac
from curvlib.operators.scores.blocks import score_blocks
from tests.operators.factored import (
    CE,
    F64,
    FISHERS,
    classes,
    coordinates,
    draw,
    relative,
    rotated_block,
    seeded,
)
from tests.operators.test_example_scores import scored, truth

EXPERTS, WIDTH = 5, 3


class Mixture(nn.Module):
    """The two best experts of each token, weighted by the router, as in Mixtral.

    The last expert's logit is far below the others, so that it gets no token at all.
    """

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style = style
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4), nn.SiLU(), nn.Linear(4, WIDTH, bias=False))
            for _ in range(EXPERTS)
        )
        self.register_buffer("shift", torch.tensor([0.0, 0.0, 0.0, 0.0, -100.0]))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        share = (self.router(flat) + self.shift).softmax(-1)
        best, chosen = share.topk(2, -1)
        best = best / best.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == i)
            if not len(rows) and self.style != "empty calls":
                continue
            if self.style == "mask":
                mask = (chosen == i).any(-1)
                weight = (best * (chosen == i)).sum(-1)[mask]
                out[mask] = out[mask] + expert(flat[mask]) * weight[:, None]
            else:
                part = expert(flat[rows]) * best[rows, place, None]
                out = out.index_add(0, rows, part)
        return x + out.view_as(x)


class Model(nn.Module):
    def __init__(self, style: str, *, tokens: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.mixture = Mixture(style)
        self.head = nn.Linear(WIDTH, 2)
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        out = self.head(self.mixture(self.inner(x)).tanh())
        return out.transpose(1, 2) if self.tokens else out.mean(1)


STYLES = ("index", "mask", "empty calls")
X = draw(6, 2, WIDTH)


def problem(style: str, *, tokens: bool = True, size: int = 4) -> cl.Risk:
    y = classes(6, 2, below=2) if tokens else classes(6, below=2)
    data = list(zip(X.split(size), y.split(size), strict=True))
    return cl.Risk(seeded(Model(style, tokens=tokens)), CE, data)


def routed(risk: cl.Risk) -> list[list[int]]:
    """How many tokens each expert gets in each batch."""
    model: Any = risk.model
    out = []
    for x, _ in risk.data:
        mixture = model.mixture
        share = mixture.router(model.inner(x)) + mixture.shift
        out.append(share.topk(2, -1).indices.reshape(-1).bincount(minlength=EXPERTS).tolist())
    return out


def test_what_is_tested_is_sparse() -> None:
    """Some expert sees no token of one batch, but of another; one never does."""
    counts = torch.tensor(routed(problem("index", size=1)))
    some = (counts == 0).any(0) & (counts > 0).any(0)
    assert bool(some.any())
    assert int(counts[:, -1].sum()) == 0


@pytest.mark.parametrize("size", [6, 4, 1])
@pytest.mark.parametrize("tokens", [True, False])
@pytest.mark.parametrize("style", STYLES)
def test_gram_matrices_are_those_of_autograd(style: str, tokens: bool, size: int) -> None:
    risk = problem(style, tokens=tokens, size=size)
    G = truth(risk)
    found = scored(risk, G)
    assert relative(found.scores, G @ G.T) < 1e-13
    for b, block in enumerate(score_blocks(risk)):
        own = block.gather(G).flatten(1)
        assert torch.allclose(found.layers[..., b], own @ own.T, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("style", STYLES)
def test_eigenvalues_are_exact_and_idle_experts_listed(style: str, fisher: str) -> None:
    risk = problem(style, size=2)
    K = kfac(risk, fisher=fisher)
    target = FISHERS[fisher](risk)
    idle = {f"mixture.experts.4.{name}" for name in ("0.weight", "0.bias", "2.weight")}
    assert set(K.coverage().uncovered) == idle
    for reason in K.coverage().uncovered.values():
        assert "never called" in reason or "no row of its inputs counts" in reason
    for layer, block in K.blocks_of.items():
        expected = rotated_block(K, layer, target).diagonal()
        assert relative(block.eigenvalues.reshape(-1), expected) < 1e-10, layer
        for op in (K, K.kronecker()):
            own = op.blocks_of[layer]
            tensors = [t for t in (own.left, own.right, own.eigenvalues) if t is not None]
            assert all(bool(t.isfinite().all()) for t in tensors)
    covered = torch.cat([torch.arange(*coordinates(risk, n)) for n in K.coverage().covered])
    assert math.isclose(K.trace(), float(target.diagonal()[covered].sum()), rel_tol=1e-10)
    assert math.isclose(K.trace(), float(target.trace()), rel_tol=1e-10)  # nothing is missing


def test_factors_are_of_the_tokens_that_an_expert_gets() -> None:
    """By hand, from the rows that are routed to it."""
    risk = problem("index", size=2)
    K = kfac(risk).kronecker()
    model: Any = risk.model
    with torch.no_grad():
        flat = model.inner(X).reshape(-1, WIDTH)
        chosen = (model.mixture.router(flat) + model.mixture.shift).topk(2, -1).indices
    for i in range(EXPERTS - 1):
        rows = flat[(chosen == i).any(-1)]
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=F64)], 1)
        A = rows.T @ rows / len(rows)
        block = K.blocks_of[f"mixture.experts.{i}.0"]
        assert block.right is not None
        found = block.right[0] @ torch.diag(block.eigenvalues[0].sum(0)) @ block.right[0].T
        assert relative(found / found.trace(), A / A.trace()) < 1e-10


@pytest.mark.parametrize("style", STYLES)
def test_influence_is_about_the_experts_that_are_used(style: str) -> None:
    risk = problem(style, size=2)
    inf = Influence.of(risk, progress=False)
    assert not any(name.startswith("mixture.experts.4") for name in inf.risk.space.names)
    found = inf.scores(risk, per_layer=True)
    assert bool(found.scores.isfinite().all())
    K = kfac(risk, params=[n for n in risk.space.names if "experts.4" not in n], progress=False)
    G = truth(risk.restrict(list(K.space.names)))
    assert relative(found.scores, G @ K.solve(G.T)) < 1e-10
    assert relative(inf.self_scores().scores, found.scores.diagonal()) < 1e-10
    top = inf.top(risk, k=6)
    assert relative(top.scores, found.scores.sort(1, descending=True).values) < 1e-10


class _Fused(nn.Module):
    """Experts as one tensor of three axes, as newer libraries have them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.zeros(2, WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        which = (x[..., 0] > 0).long()
        out = torch.einsum("nti,ntio->nto", x, self.experts[which])
        return self.head(torch.tanh(out).mean(1))


def test_fused_experts_are_listed_and_scored_exactly() -> None:
    risk = cl.Risk(seeded(_Fused()), CE, (X, classes(6, below=2)))
    K = kfac(risk, rest="diagonal")
    assert "it belongs to _Fused" in K.coverage().uncovered["experts"]
    assert K.coverage().by_type["_Fused"] == (0, 18)
    assert math.isclose(K.trace(), float(cl.ggn(risk).to_dense().trace()), rel_tol=1e-10)
    G = truth(risk)
    assert relative(scored(risk, G).scores, G @ G.T) < 1e-13


def test_experts_of_other_batches() -> None:
    """Which batches tokens are routed in changes nothing."""

    class Stream:
        def __iter__(self) -> Iterator[Any]:
            yield from problem("index", size=1).data

    risk = problem("index")
    first, second = kfac(risk), kfac(risk.on(Stream()))
    assert relative(second.to_dense(), first.to_dense()) < 1e-10
