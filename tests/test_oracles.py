"""The oracles against one another: two routes to each matrix, and identities between them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tests import oracles
from tests.cases import CASES, build

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", CASES)
def test_cases_mean_what_they_say(name: str) -> None:
    case = build(name)
    truth = case.truth
    theta = oracles.parameters(case)
    assert 5 <= theta.numel() <= 300
    assert len({id(p) for p in case.selected().values()}) == len(case.selected())
    out = oracles.outputs_at(case)(theta)
    if truth.kind != "other":
        assert_close(
            truth.objective(out, truth.targets),
            truth.terms(out, truth.targets) / truth.divisor,
            **EXACT,
        )
    rows = oracles.gradient_rows(case)
    assert_close(rows.sum(0) / truth.divisor, oracles.gradient(case), **EXACT)
    if case.single is not None:
        assert_close(rows, oracles.gradient_rows_alone(case), **EXACT)
    sizes = [len(b["labels"]) if isinstance(b, dict) else len(b[0]) for b in case.data]
    assert len(set(sizes)) == len(sizes)  # batches are unequal


@pytest.mark.parametrize("name", CASES)
def test_double_backward_agrees_with_differences(name: str) -> None:
    case = build(name)
    H = oracles.dense("hessian", name)
    assert_close(H, H.T, **EXACT)
    V = torch.randn(H.shape[0], 2, dtype=H.dtype, generator=torch.Generator().manual_seed(0))
    assert _error(oracles.hessian_columns_by_differences(case, V), H @ V) < 1e-8


@pytest.mark.parametrize("name", [n for n in CASES if build(n).truth.kind in {"ce", "nll", "bce"}])
def test_enumerated_labels_give_the_ggn(name: str) -> None:
    case = build(name)
    assert _error(oracles.type2_fisher(case), oracles.dense("ggn", name)) < 1e-10


@pytest.mark.parametrize("net", ["mlp", "LayerNorm", "MultiheadAttention", "conv BatchNorm eval"])
def test_nll_of_log_softmax_is_cross_entropy(net: str) -> None:
    case = build(f"{net} nll")
    logits = replace(case, model=case.model[0])  # without LogSoftmax; the same parameters
    truth = replace(case.truth, kind="ce", objective=F.cross_entropy)
    assert _error(oracles.hessian(replace(logits, truth=truth)), oracles.hessian(case)) < 1e-10
    assert _error(oracles.ggn(replace(logits, truth=truth)), oracles.ggn(case)) < 1e-10


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("name", [n for n in CASES if n.startswith(("LayerNorm", "BatchNorm"))])
def test_functional_hessian_of_torch_is_no_oracle(name: str) -> None:
    """Why ``torch.func.hessian`` is not used here; when this fails, PyTorch has mended it."""
    case = build(name)
    wrong = torch.func.hessian(oracles.value_at(case))(oracles.parameters(case))
    assert _error(wrong, oracles.dense("hessian", name)) > 1e-3
