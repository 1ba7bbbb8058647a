"""Which route to corrected eigenvalues is taken: that with the least work, as PyTorch counts it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import curvlib as cl
from curvlib.operators.factors import squares as kfac_squares
from curvlib.operators.factors.squares import PASS, rotated, route, squares
from curvlib.operators.kfac import kfac
from tests.operators.factored import F64, classes, draw, relative, rotated_block, seeded

WAYS = ("pairs", "rotate", "form")
N = 3


def work(way: str, rows: int, out: int, width: int, dense: tuple[bool, bool], shared: int) -> float:
    """Operations for an example: products as PyTorch counts them, and entries that are squared."""
    bases = tuple(
        torch.eye(side).expand(1, side, side).contiguous() if own else None
        for side, own in zip((out, width), dense, strict=True)
    )
    left, right = torch.ones(1, N, rows, out), torch.ones(1, N, rows, width)
    total = 0.0
    if way != "form":
        with FlopCounterMode(display=False) as counter:
            right = rotated(right, bases[1])
        total += counter.get_total_flops() / shared
    with FlopCounterMode(display=False) as counter:
        squares(left, right, bases, way)
    total += counter.get_total_flops()
    return total / N + (0.0 if way == "pairs" else PASS * out * width)


@given(
    rows=st.sampled_from([1, 2, 3, 4, 6, 9, 20, 64]),
    out=st.sampled_from([1, 3, 8, 33, 120]),
    width=st.sampled_from([2, 5, 40, 111]),
    dense=st.tuples(st.booleans(), st.booleans()),
    shared=st.sampled_from([1, 8]),
)
@settings(max_examples=60, deadline=None)
def test_the_route_is_the_cheapest(
    rows: int, out: int, width: int, dense: tuple[bool, bool], shared: int
) -> None:
    costs = {way: work(way, rows, out, width, dense, shared) for way in WAYS}
    chosen = route(rows, (1, out, width), dense, shared)
    assert costs[chosen] <= min(costs.values()) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("rows", "shape", "expected"),
    [
        (1, (1, 512, 512), "pairs"),
        (2, (1, 512, 512), "pairs"),
        (64, (1, 512, 512), "rotate"),
        (1024, (1, 64, 28), "form"),
        (4096, (8, 4, 9), "form"),
    ],
)
def test_routes_of_known_shapes(rows: int, shape: tuple[int, int, int], expected: str) -> None:
    """Vectors, short texts, long texts and images."""
    assert route(rows, shape, (True, True)) == expected


class _Three(nn.Module):
    """Layers with one row for each example, with several, and with many."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv1d(1, 2, 2)
        self.words = nn.Linear(12, 12)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.image(x).tanh()  # [n, 2, 96], 96 rows of [2, 3]
        x = self.words(x.reshape(len(x), 16, 12)).tanh()  # 16 rows of [12, 13]
        return self.head(x.mean(1))


def test_each_layer_takes_its_route(monkeypatch: pytest.MonkeyPatch) -> None:
    risk = cl.Risk(seeded(_Three()), nn.CrossEntropyLoss(), (draw(3, 1, 97), classes(3, below=2)))
    taken: dict[tuple[int, ...], str] = {}
    real = kfac_squares.squares

    def noted(left: Tensor, right: Tensor, bases: Any, way: str) -> Tensor:
        taken[(left.shape[3], right.shape[3])] = way
        return real(left, right, bases, way)

    with monkeypatch.context() as patched:
        patched.setattr(kfac_squares, "squares", noted)
        K = kfac(risk)
    assert taken == {(2, 3): "form", (12, 13): "rotate", (2, 13): "pairs"}
    G = cl.ggn(risk).to_dense()
    for layer, block in K.blocks_of.items():
        expected = rotated_block(K, layer, G).diagonal()
        assert relative(block.eigenvalues.reshape(-1), expected) < 1e-10
    for way in WAYS:  # and any other gives the same
        with monkeypatch.context() as patched:
            patched.setattr(kfac_squares, "route", lambda *of, way=way: way)
            assert relative(kfac(risk).to_dense(), K.to_dense()) < 1e-10
    assert K.dtype == F64
