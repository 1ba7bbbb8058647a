"""What operators refuse, and in which words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from curvlib.core.operator import LinearOperator, as_operator
from curvlib.core.space import ParamSpace

F64 = torch.float64
SPACE = ParamSpace.of(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double())  # P = 9


def _rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(0))


def _spd(n: int) -> Tensor:
    m = _rand(n, n)
    return m @ m.T


def _operator(matrix: Tensor, **settings: object) -> LinearOperator:
    arguments: dict[str, object] = {"dtype": matrix.dtype, "rmatmat": lambda V: matrix.T @ V}
    shape = (matrix.shape[0], matrix.shape[1])
    return LinearOperator(lambda V: matrix @ V, shape, **(arguments | settings))  # type: ignore[arg-type]


def test_as_operator_refuses() -> None:
    with pytest.raises(TypeError, match=r"LinearOperator or a torch.Tensor, got ndarray.*hessian"):
        as_operator(np.eye(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"two dimensions, got shape \[3\]"):
        as_operator(torch.zeros(3))
    with pytest.raises(TypeError, match=r"float32 or float64 vectors, got torch.int64"):
        as_operator(torch.eye(3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"float32 or float64 vectors, got torch.bfloat16"):
        as_operator(torch.eye(3, dtype=torch.bfloat16))


def test_vectors_that_do_not_fit() -> None:
    A = _operator(_rand(3, 5))
    with pytest.raises(TypeError, match=r"torch.Tensor of shape \[5, K\], got ndarray.*from_numpy"):
        A @ np.zeros(5)
    with pytest.raises(ValueError, match="a vector of length 5, got 4"):
        A @ torch.zeros(4, dtype=F64)
    with pytest.raises(ValueError, match="a vector of length 3, got 5"):
        torch.zeros(5, dtype=F64) @ A
    with pytest.raises(ValueError, match=r"columns of shape \[5, K\], got \[4, 2\]"):
        A @ torch.zeros(4, 2, dtype=F64)
    with pytest.raises(ValueError, match=r"columns of shape \[5, K\], got \[5\]"):
        A.matmat(torch.zeros(5, dtype=F64))
    with pytest.raises(ValueError, match=r"columns of shape \[5, K\], got \[5, 1, 1\]"):
        A @ torch.zeros(5, 1, 1, dtype=F64)
    with pytest.raises(TypeError, match=r"expected torch.float64 vectors, got torch.float32"):
        A @ torch.zeros(5)
    with pytest.raises(ValueError, match=r"vectors on cpu, got meta; use v.to\('cpu'\)"):
        A @ torch.zeros(5, dtype=F64, device="meta")


def test_operators_that_cannot_be() -> None:
    with pytest.raises(TypeError, match=r"float32 or float64 vectors, got torch.float16"):
        LinearOperator(lambda V: V, (2, 2), dtype=torch.float16)
    with pytest.raises(ValueError, match=r"a symmetric operator is square, got shape \(2, 3\)"):
        LinearOperator(lambda V: V, (2, 3), dtype=F64, psd=True)
    wrong = LinearOperator(lambda V: V[:1], (2, 2), dtype=F64)
    with pytest.raises(ValueError, match=r"shape \[2, 3\], but matmat returned \[1, 3\]"):
        wrong @ torch.zeros(2, 3, dtype=F64)


def test_no_transpose() -> None:
    A = LinearOperator(lambda V: V, (3, 3), dtype=F64, name="one-way")
    V = torch.zeros(3, 1, dtype=F64)
    for op in (A, 2 * A, A.shift(1), A + A, A @ A, A.submatrix([0, 1, 2])):
        with pytest.raises(TypeError, match="no product with its transpose; pass rmatmat="):
            op.rmatmat(V)
    S = _operator(_spd(3), psd=True)
    for op in (S + A, A + S, S @ A, A @ S):
        with pytest.raises(TypeError, match="no product with its transpose; pass rmatmat="):
            op.rmatmat(V)


def test_combinations_that_do_not_fit() -> None:
    A = _operator(_rand(3, 5))
    S = _operator(_spd(3), psd=True)
    with pytest.raises(ValueError, match=r"cannot combine shapes \(3, 5\) and \(3, 3\) with '\+'"):
        A + S
    with pytest.raises(ValueError, match=r"cannot combine shapes \(3, 3\) and \(2, 2\) with '-'"):
        S - torch.eye(2, dtype=F64)
    with pytest.raises(ValueError, match=r"cannot multiply shapes \(3, 5\) and \(3, 3\)"):
        A @ S
    single = _operator(_spd(3).float(), psd=True)
    with pytest.raises(TypeError, match=r"cannot combine torch.float64 and torch.float32.*'\+'"):
        S + single
    with pytest.raises(TypeError, match=r"cannot combine torch.float64 and torch.float32.*'@'"):
        S @ single
    elsewhere = LinearOperator(lambda V: V, (3, 3), dtype=F64, device="meta")
    with pytest.raises(ValueError, match=r"cannot combine operators on cpu and meta"):
        S + elsewhere
    for bad in (lambda: S + 1.0, lambda: 1.0 + S, lambda: S - 2, lambda: 2 - S):
        with pytest.raises(TypeError, match=r"is ambiguous; write op.shift"):
            bad()
    with pytest.raises(TypeError, match="unsupported operand"):
        S + "a"
    with pytest.raises(TypeError, match=r"unsupported operand|can't multiply"):
        S * "a"


def test_factors_that_are_no_finite_numbers() -> None:
    S = _operator(_spd(3), psd=True)
    for bad in (float("nan"), float("inf"), np.float64("nan"), torch.tensor(float("nan"))):
        with pytest.raises(ValueError, match="expected a finite factor"):
            bad * S
    with pytest.raises(ValueError, match=r"cannot divide .* by zero"):
        S / 0
    with pytest.raises(ValueError, match="expected a finite"):
        S.shift(float("nan"))


def test_shapes_that_need_a_square() -> None:
    with pytest.raises(ValueError, match=r"shift needs a square operator, got shape \(3, 5\)"):
        _operator(_rand(3, 5)).shift(1.0)


def test_indices_that_do_not_fit() -> None:
    A = _operator(_spd(9), psd=True, space=SPACE)
    with pytest.raises(ValueError, match=r"indices must lie in \[-9, 9\), got \[0, 9\]"):
        A.submatrix([0, 9])
    with pytest.raises(ValueError, match="must not repeat"):
        A.submatrix([0, -9])
    with pytest.raises(ValueError, match=r"a mask needs shape \[9\], got \[3\]"):
        A.submatrix(torch.tensor([True, False, True]))
    with pytest.raises(ValueError, match=r"no parameter matches \['5\.\*'\]; there are"):
        A.submatrix("5.*")
    bare = _operator(_spd(9), psd=True)
    with pytest.raises(ValueError, match="not indexed by parameters: select by indices"):
        bare.submatrix("0.*")
    with pytest.raises(ValueError, match="not indexed by parameters, so it has no layers"):
        bare.blocks()
