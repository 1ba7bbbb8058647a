"""The algebra of operators, against dense matrices; flags; every error's text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from curvlib.core.digest import digest
from curvlib.core.operator import LinearOperator, as_operator
from curvlib.core.space import ParamSpace

F64 = torch.float64
SPACE = ParamSpace.of(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double())  # P = 9


def _rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def _symmetric(n: int, seed: int = 0) -> Tensor:
    m = _rand(n, n, seed=seed)
    return m + m.T


def _spd(n: int, seed: int = 0) -> Tensor:
    m = _rand(n, n, seed=seed)
    return m @ m.T


def _operator(matrix: Tensor, **settings: object) -> LinearOperator:
    """An operator that knows ``matrix`` only through products."""
    arguments: dict[str, object] = {"dtype": matrix.dtype, "rmatmat": lambda V: matrix.T @ V}
    shape = (matrix.shape[0], matrix.shape[1])
    return LinearOperator(lambda V: matrix @ V, shape, **(arguments | settings))  # type: ignore[arg-type]


def _assert_is(op: LinearOperator, dense: Tensor) -> None:
    """Products from both sides, with vectors and blocks, are those of ``dense``."""
    assert op.shape == tuple(dense.shape)
    m, n = dense.shape
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(op.to_dense(block=2), dense, **close)
    for k in (1, 3):
        right, left = _rand(n, k, seed=1), _rand(m, k, seed=2)
        torch.testing.assert_close(op @ right, dense @ right, **close)
        torch.testing.assert_close(op.matmat(right), dense @ right, **close)
        torch.testing.assert_close(op.T @ left, dense.T @ left, **close)
        torch.testing.assert_close(op.rmatmat(left), dense.T @ left, **close)
        torch.testing.assert_close(left.T @ op, left.T @ dense, **close)
    torch.testing.assert_close(op @ right[:, 0], dense @ right[:, 0], **close)
    torch.testing.assert_close(left[:, 0] @ op, left[:, 0] @ dense, **close)


# --------------------------------------------------------------------- algebra
ALGEBRA: dict[str, tuple[Callable[..., LinearOperator], Callable[..., Tensor]]] = {
    "sum": (lambda a, b: a + b, lambda a, b: a + b),
    "difference": (lambda a, b: a - b, lambda a, b: a - b),
    "scaled": (lambda a, b: -2.5 * a, lambda a, b: -2.5 * a),
    "scaled right": (lambda a, b: a * 3, lambda a, b: 3 * a),
    "divided": (lambda a, b: a / 4.0, lambda a, b: a / 4.0),
    "negative": (lambda a, b: -a, lambda a, b: -a),
    "shift": (lambda a, b: a.shift(0.3), lambda a, b: a + 0.3 * torch.eye(a.shape[0], dtype=F64)),
    "product": (lambda a, b: a @ b, lambda a, b: a @ b),
    "transpose": (lambda a, b: a.T, lambda a, b: a.T),
    "gram": (lambda a, b: a.T @ a, lambda a, b: a.T @ a),
    "nested": (
        lambda a, b: ((2 * a + b.shift(1.0)) @ a.T - b) / 3,
        lambda a, b: ((2 * a + b + torch.eye(a.shape[0], dtype=F64)) @ a.T - b) / 3,
    ),
    "submatrix": (
        lambda a, b: a.submatrix([2, 0], [1, 3, 0]),
        lambda a, b: a[[2, 0]][:, [1, 3, 0]],
    ),
    "of dense right": (lambda a, b: a + b.to_dense(), lambda a, b: a + b),
    "of dense left": (lambda a, b: a.to_dense() - b, lambda a, b: a - b),
}


@pytest.mark.parametrize("name", ALGEBRA)
@pytest.mark.parametrize("symmetric", [False, True])
def test_algebra_is_that_of_matrices(name: str, symmetric: bool) -> None:
    make = _symmetric if symmetric else lambda n, seed: _rand(n, n, seed=seed)
    a, b = make(5, seed=3), make(5, seed=4)
    on_operators, on_matrices = ALGEBRA[name]
    op = on_operators(_operator(a, symmetric=symmetric), _operator(b, symmetric=symmetric))
    _assert_is(op, on_matrices(a, b))
    if op.symmetric:
        torch.testing.assert_close(op.to_dense(), op.to_dense().T)


def test_rectangular_products_and_transposes() -> None:
    a, b = _rand(4, 6, seed=1), _rand(6, 3, seed=2)
    A, B = _operator(a), _operator(b)
    _assert_is(A @ B, a @ b)
    _assert_is((A @ B).T, (a @ b).T)
    _assert_is(A.T, a.T)
    assert A.T.T is A
    _assert_is(A.submatrix(slice(1, 3), torch.tensor([5, 0])), a[1:3][:, [5, 0]])


operands = st.sampled_from(["a", "b", "a.T"])
actions = st.sampled_from(["+", "-", "@", "*", "shift", "T", "sub"])


@settings(max_examples=60, deadline=None)
@given(first=operands, steps=st.lists(st.tuples(actions, operands), max_size=4))
def test_random_expressions_and_their_flags(first: str, steps: list[tuple[str, str]]) -> None:
    a, b = _rand(4, 4, seed=5), _spd(4, seed=6)
    A, B = _operator(a), _operator(b, psd=True)
    dense = {"a": a, "b": b, "a.T": a.T}
    ops = {"a": A, "b": B, "a.T": A.T}
    m, op = dense[first], ops[first]
    for action, name in steps:
        other, second = dense[name], ops[name]
        if action == "sub":
            m, op = m[[1, 3, 0, 2]][:, [1, 3, 0, 2]], op.submatrix([1, 3, 0, 2])
        elif action == "+":
            m, op = m + other, op + second
        elif action == "-":
            m, op = m - other, op - second
        elif action == "@":
            m, op = m @ other, op @ second
        elif action == "*":
            m, op = -0.5 * m, -0.5 * op
        elif action == "shift":
            m, op = m + 0.7 * torch.eye(4, dtype=F64), op.shift(0.7)
        else:
            m, op = m.T, op.T
    v = _rand(4, 2, seed=7)
    tolerance = 1e-12 * float(m.norm()) * 10
    assert float((op @ v - m @ v).norm()) <= tolerance
    assert float((op.T @ v - m.T @ v).norm()) <= tolerance
    # a flag promises something, and the promise must hold
    if op.symmetric:
        assert float((m - m.T).norm()) <= tolerance
    if op.psd:
        assert float(torch.linalg.eigvalsh((m + m.T) / 2).min()) >= -tolerance


# ------------------------------------------------------------------------ flags
def test_flags_follow_the_algebra() -> None:
    S = _operator(_symmetric(4), symmetric=True)
    D = _operator(_spd(4), psd=True)
    N = _operator(_rand(4, 4))
    assert D.symmetric
    assert (D + D).psd
    assert not (D - D).psd
    assert (D - D).symmetric
    assert not (D + S).psd
    assert (D + S).symmetric
    assert not (D + N).symmetric
    assert (2 * D).psd
    assert (0 * D).psd
    assert not (-D).psd
    assert (-D).symmetric
    assert D.shift(1).psd
    assert not D.shift(-1).psd
    assert D.shift(-1).symmetric
    assert not (D @ S).symmetric
    assert (S @ S).psd
    assert (N.T @ N).psd
    assert (N @ N.T).psd
    assert not (N @ N).symmetric
    assert D.submatrix([0, 2]).psd
    assert not D.submatrix([0, 2], [1, 2]).symmetric
    assert S.T is S
    assert not N.T.symmetric


def test_numbers_that_scale() -> None:
    a = _symmetric(3)
    A = _operator(a, symmetric=True)
    for factor in (2, 2.0, np.float64(2.0), np.float32(2.0), np.int64(2), torch.tensor(2.0)):
        _assert_is(factor * A, 2 * a)
        _assert_is(A * factor, 2 * a)
        _assert_is(A / factor, a / 2)


def test_nothing_is_multiplied_before_it_is_needed() -> None:
    calls = []

    def product(V: Tensor) -> Tensor:
        calls.append(V.shape)
        return V.clone()

    A = LinearOperator(product, (6, 6), dtype=F64, symmetric=True)
    B = ((2 * A).shift(1) @ A - A).submatrix([0, 1])
    repr(B), B.fingerprint(), B.T
    assert not calls
    B @ _rand(2, 5)
    assert len(calls) == 3
    assert all(shape == (6, 5) for shape in calls)


def test_to_dense_takes_blocks_of_columns() -> None:
    widths = []

    def product(V: Tensor) -> Tensor:
        widths.append(V.shape[1])
        assert V.T.is_contiguous()
        return 2 * V

    A = LinearOperator(product, (7, 7), dtype=F64, symmetric=True)
    assert torch.equal(A.to_dense(block=3), 2 * torch.eye(7, dtype=F64))
    assert widths == [3, 3, 1]


def test_no_columns_need_no_product() -> None:
    def product(V: Tensor) -> Tensor:
        raise AssertionError("multiplied an empty block")

    A = LinearOperator(product, (3, 4), dtype=F64)
    assert (A @ torch.zeros(4, 0, dtype=F64)).shape == (3, 0)


# ----------------------------------------------------------- submatrices, blocks
@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ([4, 1], [4, 1]),
        (torch.tensor([-1, 0]), [8, 0]),
        (slice(2, 8, 3), [2, 5]),
        (torch.arange(9) % 4 == 0, [0, 4, 8]),
        ("0.*", [0, 1, 2, 3, 4, 5]),
        (["0.bias", "2.weight"], [4, 5, 6, 7]),
        ("*.bias", [4, 5, 8]),
    ],
)
def test_submatrix_indices(index: object, expected: list[int]) -> None:
    a = _spd(9)
    A = _operator(a, psd=True, space=SPACE)
    _assert_is(A.submatrix(index), a[expected][:, expected])  # type: ignore[arg-type]
    _assert_is(A.submatrix([0, 3], index), a[[0, 3]][:, expected])  # type: ignore[arg-type]


def test_blocks_are_the_diagonal_blocks_of_layers() -> None:
    a, b = _spd(9), _symmetric(9, seed=8)
    A = _operator(a, psd=True, space=SPACE)
    B = _operator(b, symmetric=True, space=SPACE)
    for op, dense in ((A, a), (A + B, a + b), (2 * A - B, 2 * a - b), (A @ B, a @ b)):
        blocks = op.blocks()
        assert list(blocks) == ["0", "2"]
        _assert_is(blocks["0"], dense[:6, :6])
        _assert_is(blocks["2"], dense[6:, 6:])


def test_blocks_use_restrict_where_there_is_one() -> None:
    a = _spd(9)
    asked = []

    def restrict(names: tuple[str, ...]) -> LinearOperator:
        asked.append(names)
        where = torch.cat([torch.arange(9)[SPACE.slice(n)] for n in names])
        part = a[where][:, where]
        return _operator(part, psd=True, space=SPACE.restrict(names))

    A = _operator(a, psd=True, space=SPACE, restrict=restrict)
    for op, dense in (
        (A, a),
        (3 * A, 3 * a),
        (A.shift(2.0), a + 2 * torch.eye(9, dtype=F64)),
        (A + A, 2 * a),
        (A - 3 * A, -2 * a),
    ):
        asked.clear()
        blocks = op.blocks()
        _assert_is(blocks["2"], dense[6:, 6:])
        assert set(asked) == {("0.weight", "0.bias"), ("2.weight", "2.bias")}
    _assert_is((A @ A).blocks()["0"], (a @ a)[:6, :6])  # no product of blocks


def test_space_is_kept_where_rows_and_columns_keep_their_meaning() -> None:
    A = _operator(_spd(9), psd=True, space=SPACE)
    other = dataclasses.replace(SPACE, names=("a", "b", "c", "d"))
    B = _operator(_spd(9), psd=True, space=other)
    for op in (A + A, 2 * A, A.shift(1), -A, A @ A):
        assert op.space == SPACE
    assert (A + B).space is None
    assert (A @ B).space is None
    assert A.submatrix([0, 1]).space is None


# ------------------------------------------------------------------- fingerprint
def test_fingerprints_differ_between_operators_that_differ() -> None:
    A = _operator(_spd(4), psd=True, identity="A")
    B = _operator(_spd(4), psd=True, identity=lambda: "B")
    ops = [
        A,
        B,
        A + B,
        A - B,
        B - A,
        A @ B,
        B @ A,
        2 * A,
        3 * A,
        -A,
        A.shift(2),
        A.shift(3),
        A.submatrix([0, 1]),
        A.submatrix([0, 2]),
        A.submatrix([0, 1], [0, 2]),
        A.submatrix([1, 0]),
        (2 * A).shift(2),
        2 * A.shift(2),
        A.shift(1e-17),
        A.shift(-2),
    ]
    prints = [op.fingerprint() for op in ops]
    assert len(set(prints)) == len(prints)
    again = _operator(_spd(4), psd=True, identity="A")
    assert again.fingerprint() == A.fingerprint()
    assert (2 * again).fingerprint() == (2 * A).fingerprint()


def test_digest_sees_values_shapes_types_and_order() -> None:
    x = torch.arange(6.0)
    variants = [
        [x],
        [x + 1],
        [x.reshape(2, 3)],
        [x.double()],
        [x.bfloat16()],
        [x, x],
        [x[:3], x[3:]],
        [torch.tensor(0.0)],
        [-torch.tensor(0.0)],
        [torch.zeros(0)],
        [],
    ]
    digests = [digest(v) for v in variants]
    assert len(set(digests)) == len(digests)
    assert digest([x.reshape(2, 3).T]) == digest([x.reshape(2, 3).T.contiguous()])
    assert digest([x.clone().requires_grad_()]) == digest([x])


# ------------------------------------------------------------------- as_operator
def test_dense_tensors_become_operators() -> None:
    a = _rand(3, 5)
    _assert_is(as_operator(a), a)
    assert as_operator(_symmetric(4)).symmetric
    assert not as_operator(_rand(4, 4)).symmetric
    A = as_operator(a)
    assert as_operator(A) is A
    assert as_operator(a.clone()).fingerprint() == A.fingerprint()
    assert as_operator(2 * a).fingerprint() != A.fingerprint()


def test_repr_says_what_it_is() -> None:
    A = _operator(_spd(9), psd=True, name="Hessian")
    assert repr(A) == "<Hessian: psd 9 x 9, float64, cpu>"
    assert repr((2 * A).shift(-1e-3)) == "<2 * Hessian - 0.001 I: symmetric 9 x 9, float64, cpu>"
    assert repr(-(A + A)) == "<-1 * (Hessian + Hessian): symmetric 9 x 9, float64, cpu>"
