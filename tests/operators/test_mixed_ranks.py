"""Layers that take vectors, sequences and images of vectors, in one model and in one layer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvlib as cl
from curvlib.operators.kfac import kfac
from curvlib.operators.scores.blocks import score_blocks
from tests.operators.factored import CE, FISHERS, classes, draw, relative, rotated_block, seeded
from tests.operators.test_example_scores import scored, truth


class _Patches(nn.Module):
    """As of a model for time series: 4-D patches, 3-D tokens and 2-D vectors; conv over both."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(1, 2, 2, groups=1)
        self.depth = nn.Conv2d(2, 4, 2, groups=2, padding=1, padding_mode="reflect")
        self.patch = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.token = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.depth(self.image(x).tanh()).tanh()  # [n, 4, h, w]
        own = self.norm(self.patch(out[..., :3])).tanh()  # 4-D
        own = self.token(own.mean(2))  # 3-D
        return self.head(own.mean(1))  # 2-D


class _Everywhere(nn.Module):
    """One layer for all of them, with its weight tied to another's; called four times."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.other = nn.Linear(3, 3, bias=False)
        if tied:
            self.other.weight = self.layer.weight
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x).tanh()  # 4-D
        x = self.layer(x.mean(1)).tanh()  # 3-D
        x = x + self.other(x)
        return self.head(self.layer(x.sum(1)))  # 2-D


MODELS: dict[str, Any] = {
    "patches": (_Patches, draw(5, 1, 4, 4)),
    "everywhere": (lambda: _Everywhere(tied=False), draw(5, 2, 4, 3)),
    "everywhere, tied": (lambda: _Everywhere(tied=True), draw(5, 2, 4, 3)),
}


def problem(name: str, *, size: int = 3) -> cl.Risk:
    make, x = MODELS[name]
    y = classes(5, below=2)
    return cl.Risk(seeded(make()), CE, list(zip(x.split(size), y.split(size), strict=True)))


@pytest.mark.parametrize("size", [5, 3, 1])
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_the_gram_matrix_of_autograds_gradients(name: str, size: int) -> None:
    risk = problem(name, size=size)
    G = truth(risk)
    for tokens in (False, True):
        found = scored(risk, G, tokens=tokens, norms=True)
        assert relative(found.scores, G @ G.T) < 1e-13
    assert not found.alone or size == 1
    for b, block in enumerate(score_blocks(risk)):
        own = block.gather(G).flatten(1)
        assert torch.allclose(found.layers[..., b], own @ own.T, rtol=1e-11, atol=1e-13)
    assert found.norms is not None
    assert torch.allclose(found.norms.square().sum(1).sqrt(), G.norm(dim=1), rtol=1e-10)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("name", MODELS)
def test_eigenvalues_are_exact(name: str, fisher: str, sharing: str) -> None:
    risk = problem(name)
    K = kfac(risk, fisher=fisher, sharing=sharing)
    F = FISHERS[fisher](risk)
    assert K.coverage().percent == 100.0
    for layer, block in K.blocks_of.items():
        expected = rotated_block(K, layer, F).diagonal()
        assert relative(block.eigenvalues.reshape(-1), expected) < 1e-10, layer
    assert math.isclose(K.trace(), float(F.trace()), rel_tol=1e-10)
