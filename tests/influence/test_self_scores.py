"""Self-influence block by block, against dense solves and the flat route."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import curvlib as cl
from curvlib.influence import self_scores
from curvlib.influence.influence import Influence
from curvlib.influence.preconditioner import Preconditioner
from curvlib.influence.self_scores import block_metrics, self_products
from curvlib.operators.factors.factored_damping import factored_damping
from curvlib.operators.fisher_diagonal import fisher_diagonal
from curvlib.operators.scores.example_scores import example_gradients_by_layers
from tests.operators.factored import (
    CE,
    PROBLEMS,
    TOKENS,
    Language,
    classes,
    draw,
    problem,
    relative,
    seeded,
)

OPERATORS: dict[str, Any] = {
    "ekfac": lambda risk: cl.kfac(risk, rest="diagonal", progress=False),
    "kfac": lambda risk: cl.kfac(risk, rest="diagonal", progress=False).kronecker(),
    "dense norms": lambda risk: cl.kfac(risk, dense_norms=True, progress=False),
    "diagonal sides": lambda risk: cl.kfac(risk, max_side=4, progress=False),
    "factors damped": lambda risk: factored_damping(
        cl.kfac(risk, eigen_corrected=False, progress=False)
    ),
    "diagonal": fisher_diagonal,
    "identity": lambda risk: None,
}


def of(name: str) -> cl.Risk:
    risk = problem(name)
    # one expert sees no token, and has no curvature
    return risk.restrict(["experts.0.*", "experts.1.*", "head.*"]) if name == "experts" else risk


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_block_by_block_is_the_flat_route(name: str, kind: str) -> None:
    risk = of(name)
    own = Preconditioner(OPERATORS[kind](risk), 0.1, relative=True)
    assert block_metrics(risk, own) is not None
    flat = torch.cat([own.squares(rows) for rows in example_gradients_by_layers(risk)])
    assert relative(torch.cat(list(self_products(risk, own))), flat) < 1e-11


@pytest.mark.parametrize("damping", [(0.03, True), (2.0, False)])
def test_any_damping(damping: tuple[float, bool]) -> None:
    risk = problem("mlp")
    inf = Influence.of(risk, damping=damping[0], relative=damping[1], progress=False)
    scores = inf.scores(risk).scores
    assert relative(inf.self_scores().scores, scores.diagonal()) < 1e-11


def test_other_operators_take_the_flat_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """M-FAC; matrices without a solve; and K-FAC whose blocks are not those of layers."""
    monkeypatch.setattr(self_scores, "MEMORY", 1)  # one example at a time
    risk = problem("mlp")
    G = torch.cat(list(example_gradients_by_layers(risk)))
    window = cl.mfac(risk, count=6, damping=0.05, relative=False)
    own = Preconditioner(window, 0.0, relative=True)
    assert block_metrics(risk, own) is None
    expected = (G * torch.linalg.solve(window.to_dense(), G.T).T).sum(1)
    parts = list(self_products(risk, own))
    assert [len(part) for part in parts] == [1] * 6
    assert relative(torch.cat(parts), expected) < 1e-8

    gates = cl.Risk(seeded(_Recurrent()), CE, (draw(4, 3, 3), classes(4, below=2)))
    K = cl.kfac(gates, gates="separate", progress=False)
    own = Preconditioner(K, 0.1, relative=True)
    assert block_metrics(gates, own) is None
    G = torch.cat(list(example_gradients_by_layers(gates)))
    assert relative(torch.cat(list(self_products(gates, own))), own.squares(G)) < 1e-12


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(3, 2, batch_first=True)
        self.head = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(x)[0][:, -1])


def test_float32_models_with_operators_in_float64() -> None:
    model = seeded(Language()).float()
    risk = cl.Risk(model, CE, (TOKENS, TOKENS.roll(1, 1)))
    own = Preconditioner(cl.kfac(risk, dtype=torch.float64, progress=False), 0.1, relative=True)
    found = torch.cat(list(self_products(risk, own)))
    assert found.dtype == torch.float32
    flat = torch.cat([own.squares(rows) for rows in example_gradients_by_layers(risk)])
    assert relative(found, flat) < 1e-5


def test_a_singular_curvature_is_told() -> None:
    risk = problem("mlp")
    K = cl.kfac(risk, progress=False)
    zero = K.with_eigenvalues([0.0 * b.eigenvalues for b in K.blocks_of.values()])
    with pytest.raises(RuntimeError, match="is singular"):
        list(self_products(risk, Preconditioner(zero, 0.0, relative=True)))
