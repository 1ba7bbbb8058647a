"""Squares of gradients in a metric, against autograd's gradients and dense matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import curvlib as cl
from curvlib.core.kronecker_blocks import KroneckerBlock
from curvlib.operators.factors import squares as kfac_squares
from curvlib.operators.scores.blocks import ScoreBlock, score_blocks
from curvlib.operators.scores.example_squares import example_squares
from tests.operators.factored import CE, PROBLEMS, classes, draw, problem, seeded
from tests.operators.test_example_scores import truth

KINDS = ("rotated", "rows of inputs", "diagonal", "identity")


def metric(block: ScoreBlock, kind: str, seed: int = 0) -> KroneckerBlock | None:
    """Random bases, and weights that may be of any sign."""
    if kind == "identity":
        return None
    G, O, I = block.shape
    left = torch.linalg.qr(draw(G, O, O, seed=seed)).Q if kind == "rotated" else None
    right = None if kind == "diagonal" else torch.linalg.qr(draw(G, I, I, seed=seed + 1)).Q
    return KroneckerBlock(block.name, block.parts, left, right, draw(G, O, I, seed=seed + 2))


def dense(op: KroneckerBlock | None, block: ScoreBlock, G: Tensor) -> Tensor:
    """The squares of rows ``[n, P]``, by the definition."""
    X = block.gather(G)
    if op is None:
        return X.square().sum((1, 2, 3))
    out = torch.zeros(len(X), dtype=X.dtype)
    for n in range(len(X)):
        for g in range(X.shape[1]):
            own = X[n, g]
            own = own if op.left is None else op.left[g].T @ own
            own = own if op.right is None else own @ op.right[g]
            out[n] += (op.eigenvalues[g] * own * own).sum()
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_squares_are_those_of_autograds_gradients(name: str, kind: str) -> None:
    risk = problem(name)
    G = truth(risk)
    blocks = score_blocks(risk)
    metrics = {b.name: metric(b, kind, seed=7 * i) for i, b in enumerate(blocks)}
    found = list(example_squares(risk, metrics))
    assert [len(part) for part in found] == [len(b[0]) for b in risk.data]
    expected = torch.stack([dense(metrics[b.name], b, G) for b in blocks]).sum(0)
    scale = torch.stack([dense(metrics[b.name], b, G).abs() for b in blocks]).sum(0)
    assert bool(((torch.cat(found) - expected).abs() <= 1e-12 * scale).all())


@pytest.mark.parametrize("way", ["pairs", "rotate", "form"])
@given(rows=st.integers(1, 4), out=st.integers(1, 4), width=st.integers(1, 4))
@settings(max_examples=8, deadline=None)
def test_all_routes(way: str, rows: int, out: int, width: int) -> None:
    model = seeded(nn.Linear(width, out))
    risk = cl.Risk(model, nn.MSELoss(), (draw(3, rows, width), draw(3, rows, out, seed=1)))
    (block,) = score_blocks(risk)
    own = metric(block, "rotated")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kfac_squares, "route", lambda *of: way)
        found = torch.cat(list(example_squares(risk, {block.name: own})))
    expected = dense(own, block, truth(risk))
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-11)


def test_large_examples_are_done_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curvlib.operators.scores.rows.CHUNK", 1)
    for name in ("tied, masked", "grouped convolutions", "experts"):
        risk = problem(name)
        metrics = {b.name: metric(b, "rotated") for b in score_blocks(risk)}
        found = torch.cat(list(example_squares(risk, metrics)))
        G = truth(risk)
        expected = torch.stack([dense(metrics[b.name], b, G) for b in score_blocks(risk)]).sum(0)
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-11)


def test_no_gradient_of_all_parameters_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing larger than the rows of a batch: with one row for each example not even matrices."""
    largest = 0

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]  # as of torch
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    model = seeded(nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 3)))
    risk = cl.Risk(model, CE, (draw(20, 30), classes(20, below=3)))
    metrics = {b.name: metric(b, "rotated") for b in score_blocks(risk)}
    with Watched():
        list(example_squares(risk, metrics))
    assert largest <= 41 * 41  # a factor's basis; the gradients of 20 examples are 27,260 numbers


def test_the_model_is_left_alone_between_batches() -> None:
    risk = problem("language model")
    model = risk.model.train()
    stream = example_squares(risk, dict.fromkeys(b.name for b in score_blocks(risk)))
    next(stream)
    assert all(not m._forward_hooks for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.training


def test_metrics_that_do_not_fit() -> None:
    risk = problem("mlp")
    good: dict[str, Any] = dict.fromkeys(b.name for b in score_blocks(risk))
    with pytest.raises(ValueError, match=r"expected a metric of each of the blocks \['0', '2', "):
        list(example_squares(risk, {"0": None}))
    small = KroneckerBlock("0", (), None, None, draw(1, 5, 4))
    with pytest.raises(ValueError, match=r"metric of shape \[1, 5, 5\] in block '0', got \[1, 5"):
        list(example_squares(risk, good | {"0": small}))


def test_what_is_not_finite_is_named() -> None:
    risk = problem("mlp")
    names: dict[str, Any] = dict.fromkeys(b.name for b in score_blocks(risk))
    x, y = PROBLEMS["mlp"][2]
    bad = x.clone()
    bad[2, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="inputs of layer '0' are not finite at batch 0"):
        list(example_squares(risk.on((bad, y)), names))
    risk = cl.Risk(seeded(nn.Linear(2, 1)), nn.MSELoss(), (10.0 + draw(3, 2), draw(3, 1)))
    (block,) = score_blocks(risk)
    huge = KroneckerBlock("", block.parts, None, None, 1e308 * draw(*block.shape).sign().abs())
    with pytest.raises(FloatingPointError, match="squares of gradients of batch 0 are not finite"):
        list(example_squares(risk, {block.name: huge}))


def test_an_embedding_that_is_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.tokens(x) * self.tokens(x.flip(1)).tanh()).sum(1))

    risk = cl.Risk(seeded(Twice()), CE, (classes(4, 3, below=5), classes(4, below=2)))
    G = truth(risk)
    for kind in KINDS:
        metrics = {b.name: metric(b, kind) for b in score_blocks(risk)}
        found = torch.cat(list(example_squares(risk, metrics)))
        expected = torch.stack([dense(metrics[b.name], b, G) for b in score_blocks(risk)]).sum(0)
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-11)
