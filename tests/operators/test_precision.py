"""Shorter types: float32 and bfloat16 parameters against the float64 oracle, with stated bounds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import curvlib as cl
from tests.cases import Case, build
from tests.problems import OPERATORS, ROWS, columns, error, oracle, risk_of

pytestmark = pytest.mark.filterwarnings("ignore:curvlib. .*:UserWarning")

FLOAT32 = 2e-5  # relative Frobenius error of a block product, condition numbers of the table
BFLOAT16 = 0.1  # 25 units of 2**-8: parameters, inputs and activations have 8 bits


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: _cast(v, dtype) for k, v in value.items()}
    return type(value)(_cast(v, dtype) for v in value)


def _in(case: Case, dtype: torch.dtype) -> Case:
    """The same problem with parameters, buffers and inputs in another type."""
    return replace(case, model=case.model.to(dtype), data=[_cast(b, dtype) for b in case.data])


@pytest.mark.parametrize(("operator", "name"), ROWS, ids=[f"{o}-{n}" for o, n in ROWS])
def test_float32(operator: str, name: str) -> None:
    case = _in(build(name), torch.float32)
    op = OPERATORS[operator].make(risk_of(case))
    A = oracle(operator, name, rounded=torch.float32)
    assert op.dtype == torch.float32
    V = columns(A.shape[0], 3)
    for block in (V, V[:, :1]):
        assert error(op @ block.float(), A @ block) < FLOAT32
    assert error(op @ V[:, 0].float(), A @ V[:, 0]) < FLOAT32


HALF = [
    "mlp ce",
    "mlp mse",
    "mlp bce",
    "LayerNorm ce",
    "conv BatchNorm eval ce",
    "MultiheadAttention ce",
    "sdpa",
    "LSTM",
    "GRU",
    "embedding",
    "tied",
    "masked lm",
    "ce weighted",
]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", HALF)
def test_bfloat16_parameters_with_float32_vectors(operator: str, name: str) -> None:
    case = _in(build(name), torch.bfloat16)
    A = oracle(operator, name, rounded=torch.bfloat16)
    op = OPERATORS[operator].make(risk_of(case))
    assert op.dtype == torch.float32
    V = columns(A.shape[0], 3)
    out = op @ V.float()
    assert out.dtype == torch.float32
    assert error(out, A @ V) < BFLOAT16
    with pytest.raises(TypeError, match=r"expected torch.float32 vectors, got torch.bfloat16"):
        op @ V.bfloat16()


def test_mixed_parameter_types_are_kept_apart() -> None:
    """A float32 head on a bfloat16 body, as mixed-precision training leaves them."""
    case = build("mlp ce", rounded=torch.bfloat16)
    A = oracle("hessian", "mlp ce", rounded=torch.bfloat16)
    model = case.model.float()
    model[0].bfloat16()
    data = [(x.float(), y) for x, y in case.data]

    def forward(m: torch.nn.Module, batch: Any) -> Tensor:
        return m[2](torch.tanh(m[0](batch[0].bfloat16()).float()))

    op = cl.hessian(cl.Risk(model, case.loss, data, forward=forward))
    assert op.dtype == torch.float32
    V = columns(A.shape[0], 2)
    assert error(op @ V.float(), A @ V) < BFLOAT16


@pytest.mark.parametrize("name", ["mlp ce", "LayerNorm ce", "sdpa", "LSTM"])
def test_autocast_around_a_product_is_the_models_own(name: str) -> None:
    """Autocast inside ``forward`` is part of the model; the operator stays in float32."""
    case = _in(build(name), torch.float32)
    A = oracle("hessian", name, rounded=torch.float32)

    def forward(m: torch.nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return m(batch[0])

    op = cl.hessian(cl.Risk(case.model, case.loss, case.data, forward=forward))
    V = columns(A.shape[0], 2)
    assert error(op @ V.float(), A @ V) < BFLOAT16
