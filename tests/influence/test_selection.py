"""Damping by a bank of retrained models: ridge regressions, whose scores have closed forms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvlib.influence import Influence, retraining_bank
from curvlib.influence.bank import RetrainingBank
from curvlib.influence.lds import linear_datamodeling_score
from curvlib.influence.selection import DAMPINGS, DampingSelection, select_damping

F64 = torch.float64
N, D, Q = 24, 3, 8
G = torch.Generator().manual_seed(3)
SCALES = torch.tensor([3.0, 1.0, 0.1], dtype=F64)  # an ill-conditioned Hessian
X = torch.randn(N, D, dtype=F64, generator=G) * SCALES
Y = X.sum(1, keepdim=True) + torch.randn(N, 1, dtype=F64, generator=G)
QUERY = (torch.randn(Q, D, dtype=F64, generator=G), torch.randn(Q, 1, dtype=F64, generator=G))


def ridge(keep: Tensor, decay: float) -> Tensor:
    """Weights ``[D, 1]`` of least mean squares plus half of ``decay`` times their square."""
    x, y, n = X[keep], Y[keep], int(keep.sum())
    return torch.linalg.solve(2 * x.mT @ x / n + decay * torch.eye(D, dtype=F64), 2 * x.mT @ y / n)


def bank(decay: float, masks: int = 40, seed: int = 0) -> RetrainingBank:
    def train(keeps: Tensor, seeds: Sequence[int]) -> Tensor:
        x, y = QUERY
        return torch.stack([(x @ ridge(keep, decay) - y).square()[:, 0] for keep in keeps])

    return retraining_bank(train, N, masks=masks, repeats=1, seed=seed)


def fitted(weights: Tensor) -> nn.Linear:
    model = nn.Linear(D, 1, bias=False, dtype=F64)
    with torch.no_grad():
        model.weight.copy_(weights.mT)
    return model


def influence(weights: Tensor, curvature: str = "ekfac") -> Influence:
    return Influence(fitted(weights), nn.MSELoss(), (X, Y), curvature, progress=False)


def closed(weights: Tensor, damping: float, *, relative: bool) -> Tensor:
    """Scores from the residuals and the dense Hessian."""
    H = 2 * X.mT @ X / N
    shift = damping * float(H.trace()) / D if relative else damping
    x, y = QUERY
    queries, train = 2 * (x @ weights - y) * x, 2 * (X @ weights - Y) * X
    return queries @ torch.linalg.solve(H + shift * torch.eye(D, dtype=F64), train.mT)


ALL = torch.ones(N, dtype=torch.bool)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("curvature", ["ekfac", "kfac"])
def test_values_are_scores_of_closed_forms(curvature: str, relative: bool) -> None:
    """One output and one layer: both are the exact Hessian."""
    weights, judge = ridge(ALL, 0.5), bank(0.5)
    tried = [10.0, 0.003, 0.4]  # in no order
    found = select_damping(
        influence(weights, curvature), QUERY, judge, dampings=tried, relative=relative, seed=4
    )
    expected = [
        linear_datamodeling_score(
            closed(weights, damping, relative=relative), judge, resamples=100, seed=4
        )
        for damping in tried
    ]
    assert found.values.tolist() == pytest.approx([lds.value for lds in expected], abs=1e-12)
    assert found.stderrs.tolist() == pytest.approx([lds.stderr for lds in expected], abs=1e-12)
    assert len(set(found.values.tolist())) == 3
    assert found.damping == tried[int(found.values.argmax())]
    assert found.dampings.tolist() == tried
    assert found.relative is relative


@pytest.mark.parametrize("decay", [0.05, 1.0, 20.0])
def test_weight_decay_is_found_again(decay: float) -> None:
    """Models trained with weight decay are answered for by damping of its size."""
    found = select_damping(
        influence(ridge(ALL, decay)),
        QUERY,
        bank(decay, masks=200),
        dampings=[decay / 100, decay, 100 * decay],
        relative=False,
        resamples=2,
    )
    assert found.damping == decay


def test_several_are_averaged() -> None:
    first, second = ridge(ALL, 0.1), 2.0 * ridge(ALL, 3.0)
    judge = bank(0.5)
    found = select_damping(
        [influence(first), influence(second)], QUERY, judge, dampings=[0.1, 1.0], resamples=2
    )
    for damping, value in zip([0.1, 1.0], found.values.tolist(), strict=True):
        pair = [closed(w, damping, relative=True) for w in (first, second)]
        assert value == pytest.approx(
            linear_datamodeling_score((pair[0] + pair[1]) / 2, judge).value
        )
    one = select_damping(influence(first), QUERY, judge, dampings=[0.1, 1.0], resamples=2)
    assert not torch.equal(one.values, found.values)


def test_the_first_of_equals() -> None:
    found = select_damping(
        influence(ridge(ALL, 0.5)), QUERY, bank(0.5), dampings=[1e9, 1e10, 0.3], resamples=2
    )
    assert float(found.values[0]) == float(found.values[1])  # both are the identity
    tied = select_damping(
        influence(ridge(ALL, 0.5)), QUERY, bank(0.5), dampings=[1e10, 1e9], resamples=2
    )
    assert tied.damping == 1e10


def test_influence_is_left_as_it_was() -> None:
    inf = influence(ridge(ALL, 0.5))
    before = (inf.preconditioner, inf.scores(QUERY).scores)
    found = select_damping(inf, QUERY, bank(0.5, masks=5), resamples=2)
    assert found.dampings.tolist() == list(DAMPINGS)
    assert inf.preconditioner is before[0]
    assert torch.equal(inf.scores(QUERY).scores, before[1])


def test_saved_loaded_and_plotted(tmp_path: Path) -> None:
    found = select_damping(influence(ridge(ALL, 0.5)), QUERY, bank(0.5, masks=5), resamples=3)
    again = DampingSelection.load(found.save(tmp_path / "selection.safetensors"))
    assert again.damping == found.damping
    assert torch.equal(again.values, found.values)
    assert again.settings == {"influences": 1, "resamples": 3, "seed": 0}
    pytest.importorskip("matplotlib")
    axes = found.plot()
    assert axes.get_xscale() == "log"
    assert axes.get_legend_handles_labels()[1] == [f"chosen: {found.damping:g}"]
    zero = select_damping(
        influence(ridge(ALL, 0.5)), QUERY, bank(0.5, masks=5), dampings=[0.0, 1.0], relative=False
    )
    assert zero.plot().get_xscale() == "linear"
    assert zero.plot().get_xlabel() == "damping"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"influence": 3}, TypeError, "takes an Influence, or several, got int"),
        ({"influence": []}, TypeError, "takes an Influence, or several, got none"),
        ({"influence": ["ekfac"]}, TypeError, "takes an Influence, or several, got str"),
        ({"dampings": []}, ValueError, r"one of them at least, got \[\]"),
        ({"dampings": [0.1, -1.0]}, ValueError, r"at least 0, .* got \[0.1, -1.0\]"),
        ({"dampings": [float("nan")]}, ValueError, r"takes finite numbers, .* got \[nan\]"),
        ({"bank": "bank"}, TypeError, "a RetrainingBank, got Tensor and str"),
        ({"query": (X, Y)}, ValueError, rf"expected scores of shape \[{Q}, {N}\]"),
    ],
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    own = {"influence": influence(ridge(ALL, 0.5)), "query": QUERY, "bank": bank(0.5, masks=5)}
    with pytest.raises(error, match=message):
        select_damping(**(own | arguments))


def test_the_identity_has_no_damping() -> None:
    inf = influence(ridge(ALL, 0.5), "identity")
    with pytest.raises(ValueError, match="identity has no curvature that could be damped"):
        select_damping(inf, QUERY, bank(0.5, masks=5))
