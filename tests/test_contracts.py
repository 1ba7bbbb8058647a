"""Every problem of the table times every operator, against the oracles; one set of promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import curvlib as cl
from tests import oracles
from tests.cases import CASES, build
from tests.problems import (
    OPERATORS,
    ROWS,
    columns,
    error,
    joined,
    loader,
    oracle,
    psd_is_promised,
    rebatched,
    risk_of,
    snapshot,
)

pytestmark = pytest.mark.filterwarnings("ignore:curvlib. .*:UserWarning")

RIGHT = 1e-8  # relative, in float64
SAME = 1e-12  # two ways to the same sum

rows = pytest.mark.parametrize(("operator", "name"), ROWS, ids=[f"{o}-{n}" for o, n in ROWS])
problems = pytest.mark.parametrize("name", CASES)


def _make(operator: str, name: str, **changes: Any) -> cl.LinearOperator:
    return OPERATORS[operator].make(risk_of(build(name), **changes))


# ------------------------------------------------------------------- values, gradients
@problems
def test_value_and_gradient(name: str) -> None:
    case = build(name)
    risk = risk_of(case)
    truth = case.truth
    expected = truth.objective(case.outputs(case.model), truth.targets).detach()
    value = risk.value()
    assert value.shape == ()
    assert not value.requires_grad
    assert error(value, expected) < SAME
    assert risk.space.names == tuple(case.selected())
    assert error(risk.gradient(), oracles.gradient(case)) < 1e-11
    assert risk.weight() == pytest.approx(truth.divisor, rel=1e-14)


# ---------------------------------------------------------------------- products
@rows
def test_products_are_right(operator: str, name: str) -> None:
    op = _make(operator, name)
    A = oracle(operator, name)
    P = A.shape[0]
    assert op.shape == (P, P)
    assert op.dtype == torch.float64
    for K in (1, 3, 9):
        V = columns(P, K, seed=K)
        out = op @ V
        assert out.shape == (P, K)
        assert not out.requires_grad
        assert error(out, A @ V) < RIGHT
    v = columns(P, 1, seed=5)[:, 0]
    product = op @ v
    assert product.shape == (P,)
    assert error(product, A @ v) < RIGHT
    assert error(v @ op, v @ A) < RIGHT
    assert torch.equal(op @ v, op @ v), "the same product twice differs"
    assert error(op @ V[:, :1], A @ V[:, :1]) < RIGHT  # after a block, kept graphs or not


@rows
def test_dense_matrix_flags_and_blocks(operator: str, name: str) -> None:
    op = _make(operator, name)
    A = oracle(operator, name)
    dense = op.to_dense(block=17)
    assert error(dense, A) < RIGHT
    size = float(A.norm())
    assert op.symmetric
    assert float((dense - dense.T).norm()) <= SAME * size
    untouched = A.abs().sum(0) == 0
    assert float(dense[:, untouched].abs().sum()) == 0.0
    assert float(dense[untouched].abs().sum()) == 0.0
    if psd_is_promised(operator, name):
        assert op.psd
    if op.psd:
        assert float(torch.linalg.eigvalsh(dense).min()) >= -SAME * size
    blocks = op.blocks()
    assert set(blocks) == set(op.space.layers())
    for layer, names in op.space.layers().items():
        where = torch.cat([torch.arange(P)[op.space.slice(n)] for P in [len(A)] for n in names])
        part = A[where][:, where]
        assert blocks[layer].shape == part.shape
        V = columns(len(part), 2)
        assert float((blocks[layer] @ V - part @ V).norm()) <= RIGHT * size
    assert float((blocks[layer].to_dense() - part).norm()) <= RIGHT * size


@rows
def test_products_are_linear(operator: str, name: str) -> None:
    op = _make(operator, name)
    U, V = columns(op.shape[1], 2, seed=1), columns(op.shape[1], 2, seed=2)
    both = op @ (2.5 * U - 0.5 * V)
    assert error(both, 2.5 * (op @ U) - 0.5 * (op @ V)) < SAME
    big = op @ (1e6 * U)
    assert error(big, 1e6 * (op @ U)) < SAME
    assert float((op @ torch.zeros_like(U)).abs().sum()) == 0.0


@rows
def test_layouts_of_blocks(operator: str, name: str) -> None:
    """Row-major, column-major, strided and expanded blocks are the same numbers."""
    op = _make(operator, name)
    V = columns(op.shape[1], 4)
    out = op @ V
    assert error(op @ V.T.contiguous().T, out) <= SAME
    assert error(op @ torch.stack([V, V], 2)[..., 0], out) <= SAME
    expanded = op @ V[:, :1].expand(-1, 3)
    assert error(expanded, out[:, :1].expand(-1, 3)) <= SAME


# --------------------------------------------------------------- nothing is changed
@rows
def test_the_model_is_left_as_it_was(operator: str, name: str) -> None:
    case = build(name)
    for i, p in enumerate(case.model.parameters()):
        if i % 2:
            p.grad = torch.full_like(p, 0.25)
    before = snapshot(case.model)
    op = OPERATORS[operator].make(risk_of(case))
    snapshot(case.model).assert_same(before)
    op @ columns(op.shape[1], 2)
    op @ columns(op.shape[1], 1)[:, 0]
    snapshot(case.model).assert_same(before)


class BrokenError(Exception):
    """Raised on purpose."""


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("where", ["forward", "loss", "data", "backward"])
@pytest.mark.parametrize("name", ["BatchNorm2d train", "frozen tensor", "encoder train", "LSTM"])
def test_the_model_is_left_as_it_was_after_an_exception(
    operator: str, where: str, name: str
) -> None:
    case = build(name)
    model, calls = case.model, []

    def fail_late(*_: Any) -> None:
        calls.append(where)
        if len(calls) > 1:  # not in the first batch
            raise BrokenError(where)

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            fail_late()
            return g

    class Data:
        def __iter__(self) -> Any:
            for batch in case.data:
                if where == "data":
                    fail_late()
                yield batch

    def forward(m: torch.nn.Module, batch: Any) -> torch.Tensor:
        out = m(batch[0])
        if where == "forward":
            fail_late()
        return Failing.apply(out) if where == "backward" else out

    def loss(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if where == "loss":
            fail_late()
        return torch.nn.functional.cross_entropy(out, y)

    chosen = case.loss if operator in {"type2"} and where != "loss" else loss
    if operator == "type2" and where == "loss":
        pytest.skip("type-2 needs one of the known losses, which do not fail")
    risk = cl.Risk(
        model, chosen, Data(), forward=forward, params=case.settings.get("params"), weight=_count
    )
    before = snapshot(model)
    op = OPERATORS[operator].make(risk)
    with pytest.raises(BrokenError, match=where):
        op @ columns(op.shape[1], 2)
    snapshot(model).assert_same(before)
    healthy = OPERATORS[operator].make(risk_of(case))
    V = columns(healthy.shape[1], 2)
    assert error(healthy @ V, oracle(operator, name) @ V) < RIGHT


def _count(batch: Any) -> int:
    return len(batch[1])


@rows
def test_under_no_grad_and_inference_mode(operator: str, name: str) -> None:
    A = oracle(operator, name)
    V = columns(A.shape[0], 2)
    with torch.no_grad():
        op = _make(operator, name)
        assert error(op @ V, A @ V) < RIGHT
        assert not torch.is_grad_enabled()
    op = _make(operator, name)
    with torch.inference_mode():
        out = op @ V
    assert error(out.clone(), A @ V) < RIGHT


# ----------------------------------------------------------------- batches and data
SPLITTABLE = [(o, n) for o, n in ROWS if "train" not in n or "Batch" not in n]


@pytest.mark.parametrize(("operator", "name"), SPLITTABLE, ids=[f"{o}-{n}" for o, n in SPLITTABLE])
def test_batching_does_not_matter(operator: str, name: str) -> None:
    case = build(name)
    A = oracle(operator, name)
    V = columns(A.shape[0], 3)
    for sizes in ([8], [1] * 8, [5, 3], [2, 1, 4, 1]):
        op = OPERATORS[operator].make(risk_of(rebatched(case, sizes)))
        assert error(op @ V, A @ V) < RIGHT, sizes
    for data in (joined(case), tuple(case.data), loader(case)):
        op = OPERATORS[operator].make(cl.Risk(case.model, case.loss, data, **case.settings))
        assert error(op @ V, A @ V) < RIGHT
