"""Jacobians, the NTK, per-example gradients and Hessians of functions of tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian as autograd_hessian

import curvlib as cl
from tests import oracles
from tests.cases import CASES, build
from tests.problems import Counting, columns, error, loader, rebatched, risk_of, snapshot

pytestmark = pytest.mark.filterwarnings("ignore:curvlib. .*:UserWarning")

F64 = torch.float64
TENSORS = [n for n in CASES if n != "hf own loss"]
FLAT = ["tied", "masked lm", "masked batch"]  # outputs of a batch do not tell its examples apart
ENTANGLED = ["BatchNorm1d train", "BatchNorm2d train"]
ROWS = [
    n
    for n in CASES
    if n not in FLAT + ENTANGLED and not (n.startswith("hf") and build(n).truth.kind == "other")
]


# -------------------------------------------------------------------- Jacobian, NTK
@pytest.mark.parametrize("name", TENSORS)
def test_jacobian_products(name: str) -> None:
    case = build(name)
    before = snapshot(case.model)
    op = cl.jacobian(risk_of(case))
    J = oracles.dense("jacobian", name)
    M, P = J.shape
    assert op.shape == (M, P)
    assert not op.symmetric
    for K in (1, 3, 9):
        V, U = columns(P, K, seed=K), columns(M, K, seed=K + 1)
        assert error(op @ V, J @ V) < 1e-8
        assert error(op.T @ U, J.T @ U) < 1e-8
    assert error(op @ V[:, 0], J @ V[:, 0]) < 1e-8
    assert error(U[:, 0] @ op, U[:, 0] @ J) < 1e-8
    assert error(op.to_dense(), J) < 1e-8
    assert error((op.T @ op) @ V, J.T @ (J @ V)) < 1e-8
    with torch.no_grad():
        assert error(op @ V, J @ V) < 1e-8
    snapshot(case.model).assert_same(before)


@pytest.mark.parametrize("name", TENSORS)
def test_ntk(name: str) -> None:
    op = cl.ntk(risk_of(build(name)))
    J = oracles.dense("jacobian", name)
    K = J @ J.T
    assert op.shape == tuple(K.shape)
    assert op.psd
    V = columns(K.shape[0], 3)
    assert error(op @ V, K @ V) < 1e-8
    dense = op.to_dense()
    assert error(dense, K) < 1e-8
    assert error(dense, dense.T) < 1e-12


@pytest.mark.parametrize("name", ["mlp ce", "masked lm", "dense labels", "hf target"])
def test_rows_of_the_jacobian_do_not_depend_on_batches(name: str) -> None:
    case = build(name)
    J = oracles.dense("jacobian", name)
    V, U = columns(J.shape[1], 2), columns(J.shape[0], 2)
    for sizes in ([8], [1] * 8, [5, 3]):
        op = cl.jacobian(risk_of(rebatched(case, sizes)))
        assert error(op @ V, J @ V) < 1e-8
        assert error(op.T @ U, J.T @ U) < 1e-8
    op = cl.jacobian(cl.Risk(case.model, case.loss, loader(case), **case.settings))
    assert error(op @ V, J @ V) < 1e-8


def test_parts_of_the_jacobian() -> None:
    op = cl.jacobian(risk_of(build("mlp ce")))
    J = oracles.dense("jacobian", "mlp ce")
    part = op.submatrix(slice(None), slice(16, None))
    assert error(part.to_dense(), J[:, 16:]) < 1e-10
    with pytest.raises(ValueError, match="not indexed by parameters"):
        op.submatrix("2.*")  # rows are outputs
    with pytest.raises(ValueError, match=r"not indexed by parameters|square"):
        op.blocks()
    ntk = cl.ntk(risk_of(build("mlp ce")))
    assert ntk.space is None


# ------------------------------------------------------------- per-example gradients
@pytest.mark.parametrize("name", ROWS)
def test_gradient_rows(name: str) -> None:
    case = build(name)
    risk = risk_of(case)
    before = snapshot(case.model)
    expected = oracles.dense("rows", name)
    rows = torch.cat(list(cl.gradients(risk)))
    assert rows.shape == expected.shape
    assert rows.dtype == F64
    assert not rows.requires_grad
    assert error(rows, expected) < 1e-10
    assert error(rows.sum(0) / case.truth.divisor, risk.gradient()) < 1e-11
    snapshot(case.model).assert_same(before)


@pytest.mark.parametrize("name", ["mlp ce", "hf target", "LSTM", "custom", "dense labels"])
@pytest.mark.parametrize("block", [1, 2, 3, 100])
def test_gradient_rows_come_in_blocks(name: str, block: int) -> None:
    risk = risk_of(build(name))
    expected = oracles.dense("rows", name)
    blocks = list(cl.gradients(risk, block=block))
    assert all(1 <= len(b) <= block for b in blocks)
    assert error(torch.cat(blocks), expected) < 1e-10
    first = next(iter(cl.gradients(risk, block=block)))  # and the rest is never computed
    assert error(first, expected[: len(first)]) < 1e-10


def test_gradient_rows_are_streamed_and_leave_no_trace_when_dropped() -> None:
    case = build("frozen tensor")
    data = Counting(case.data)
    before = snapshot(case.model)
    stream = cl.gradients(cl.Risk(case.model, case.loss, data, **case.settings), block=1)
    assert data.batches == 0
    next(stream)
    assert data.batches == 1
    snapshot(case.model).assert_same(before)  # between two blocks the model is free to use
    stream.close()
    snapshot(case.model).assert_same(before)


@pytest.mark.parametrize("block", [None, 1, 2, 100])
@pytest.mark.parametrize("name", FLAT)
def test_gradient_rows_of_what_cannot_be_split(name: str, block: int | None) -> None:
    settings = {} if block is None else {"block": block}
    with pytest.raises(ValueError, match=r"batch 0 cannot be split into its 12 examples"):
        list(cl.gradients(risk_of(build(name)), **settings))


@pytest.mark.parametrize("block", [None, 1, 2, 100])
@pytest.mark.parametrize("name", ENTANGLED)
def test_gradient_rows_of_examples_that_depend_on_each_other(name: str, block: int | None) -> None:
    case = build(name)
    before = snapshot(case.model)
    settings = {} if block is None else {"block": block}
    with pytest.raises(ValueError, match=r"put BatchNorm into eval|more than 1 value per channel"):
        list(cl.gradients(risk_of(case), **settings))
    snapshot(case.model).assert_same(before)


def test_gradient_rows_refuse() -> None:
    risk = risk_of(build("mlp ce"))
    with pytest.raises(ValueError, match=r"block=.*at least one row.*got 0"):
        list(cl.gradients(risk, block=0))


# ------------------------------------------------------------ functions of a tensor
def _rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def test_hessian_of_a_function() -> None:
    x = columns(6, 1)[:, 0]
    op = cl.hessian_of(_rosenbrock, x)
    H = autograd_hessian(_rosenbrock, x)
    assert op.shape == (6, 6)
    assert op.symmetric
    assert not op.psd
    assert error(op.to_dense(), H) < 1e-12
    V = columns(6, 3)
    assert error(op @ V, H @ V) < 1e-12
    assert error(op @ V[:, 0], H @ V[:, 0]) < 1e-12
    assert not x.requires_grad
    with torch.no_grad():
        assert error(op @ V, H @ V) < 1e-12


def test_hessian_of_a_loss_in_the_inputs_and_in_activations() -> None:
    case = build("conv BatchNorm eval ce")
    x, y = case.data[0]
    before = snapshot(case.model)
    loss = lambda inputs: nn.functional.cross_entropy(case.model(inputs), y)  # noqa: E731
    H = autograd_hessian(loss, x).reshape(x.numel(), x.numel())
    op = cl.hessian_of(loss, x)
    assert error(op.to_dense(), H) < 1e-10
    snapshot(case.model).assert_same(before)
    hidden = case.model[:2](x).detach()
    tail = lambda h: nn.functional.cross_entropy(case.model[2:](h), y)  # noqa: E731
    H = autograd_hessian(tail, hidden).reshape(hidden.numel(), hidden.numel())
    assert error(cl.hessian_of(tail, hidden).to_dense(), H) < 1e-10


def test_hessian_of_odd_functions() -> None:
    x = columns(3, 1)[:, 0]
    assert cl.hessian_of(lambda t: 3 * t.sum(), x).to_dense().abs().sum() == 0  # linear
    assert cl.hessian_of(lambda t: t[0] ** 2, x).to_dense().diag().tolist() == [2.0, 0.0, 0.0]
    scalar = cl.hessian_of(lambda t: t**3, torch.tensor(2.0, dtype=F64))
    assert scalar.to_dense().tolist() == [[12.0]]
    single = cl.hessian_of(lambda t: (t**4).sum(), torch.ones(2, 2))
    assert single.dtype == torch.float32
    assert single.shape == (4, 4)


def test_hessian_of_refuses() -> None:
    x = columns(3, 1)[:, 0]
    v = x.clone()
    with pytest.raises(ValueError, match=r"scalar.*\[3\]"):
        cl.hessian_of(lambda t: t * 2, x) @ v
    with pytest.raises(ValueError, match=r"differentiat|depend"):
        cl.hessian_of(lambda t: torch.zeros((), dtype=F64), x) @ v
    with pytest.raises(TypeError, match="tensor"):
        cl.hessian_of(_rosenbrock, [1.0, 2.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="float"):
        cl.hessian_of(lambda t: t.sum(), torch.ones(3, dtype=torch.int64)) @ v
    with pytest.raises(FloatingPointError, match="finite"):
        cl.hessian_of(lambda t: t.sqrt().sum(), -torch.ones(3, dtype=F64)) @ v
