"""Activation checkpointing, also of bfloat16 models, whose vectors are float32."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import curvlib as cl

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
#: Whether forward-mode derivatives for several vectors at once go through checkpoints.
BATCHES_CHECKPOINTS = torch.__version__ >= (2, 13)


class Model(nn.Module):
    """Its middle is checkpointed, unless ``reentrant`` is ``None``."""

    def __init__(self, reentrant: bool | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 6))
        self.last = nn.Linear(6, 3)
        self.reentrant = reentrant
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for p in self.parameters():  # the same numbers in every dtype
                p.copy_(torch.randn(p.shape, generator=generator).to(BF16) / 2)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        if self.reentrant is None:
            return self.last(self.body(h))
        return self.last(checkpoint(self.body, h, use_reentrant=self.reentrant))


def _risk(reentrant: bool | None, dtype: torch.dtype) -> cl.Risk:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(9, 4, generator=generator).to(BF16).to(dtype)
    y = torch.randint(3, (9,), generator=generator)
    return cl.Risk(Model(reentrant, dtype), nn.CrossEntropyLoss(), (x, y))


def _vectors(risk: cl.Risk) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    V = torch.randn(risk.space.size, 3, generator=generator, dtype=F64)
    return V.to(risk.space.dtype)


def _self_scores(risk: cl.Risk) -> Tensor:
    return cl.influence.Influence(risk.model, nn.CrossEntropyLoss(), risk.data).self_scores().scores


MEASURES: dict[str, Callable[[cl.Risk], Tensor]] = {
    "gradient": lambda risk: risk.gradient(),
    "hessian": lambda risk: cl.hessian(risk) @ _vectors(risk),
    "ggn": lambda risk: cl.ggn(risk) @ _vectors(risk),
    "empirical": lambda risk: cl.fisher(risk, kind="empirical") @ _vectors(risk),
    "mc": lambda risk: cl.fisher(risk, kind="mc") @ _vectors(risk),
    "jacobian": lambda risk: cl.jacobian(risk) @ _vectors(risk),
    "rows": lambda risk: torch.cat(list(cl.gradients(risk))),
    "kfac": lambda risk: cl.kfac(risk, eigen_corrected=True).solve(_vectors(risk), damping=0.1),
    "influence": _self_scores,
}


def _distance(found: Tensor, expected: Tensor) -> float:
    miss = torch.linalg.vector_norm(found.double() - expected.double())
    return float(miss / torch.linalg.vector_norm(expected.double()))


each = pytest.mark.parametrize("name", MEASURES)


@each
def test_results_are_those_without_checkpointing(name: str) -> None:
    plain, found = (MEASURES[name](_risk(choice, F64)) for choice in (None, False))
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)


@each
def test_bfloat16_models_have_float32_vectors(name: str) -> None:
    plain, found, exact = (
        MEASURES[name](_risk(choice, dtype))
        for choice, dtype in ((None, BF16), (False, BF16), (False, F64))
    )
    assert found.dtype == F32
    # what comes by another way from checkpointed models rounds to bfloat16 elsewhere
    elsewhere = name == "rows" or (name == "jacobian" and not BATCHES_CHECKPOINTS)
    assert _distance(found, plain) <= (2.0**-6 if elsewhere else 1e-5)
    assert _distance(found, exact) < 0.1  # bfloat16 has 8 bits, and derivatives cancel


@each
@pytest.mark.parametrize("dtype", [F64, BF16])
def test_reentrant_checkpointing_is_refused_with_the_way_out(name: str, dtype: torch.dtype) -> None:
    risk = _risk(True, dtype)
    before = copy.deepcopy(risk.model.state_dict())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad=True")
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            MEASURES[name](risk)
    for key, value in risk.model.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(p.grad is None and p.requires_grad for p in risk.model.parameters())
    assert not any(module._forward_hooks for module in risk.model.modules())
