"""Operators that cross to SciPy and DLPack, and back."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.sparse.linalg as spla
import torch

import curvlib as cl

F64 = torch.float64


def _matrix(rows: int, columns: int, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3), dtype=F64).to(
        dtype
    )


# ------------------------------------------------------------------------ SciPy
def test_scipy_products_agree_with_dense():
    A = _matrix(5, 3)
    S = cl.to_scipy(A)
    assert S.shape == (5, 3)
    assert S.dtype == np.float64
    X, y = np.random.default_rng(0).normal(size=(3, 4)), np.arange(5.0)
    np.testing.assert_allclose(S @ X, A.numpy() @ X, rtol=1e-14)
    np.testing.assert_allclose(S @ X[:, 0], A.numpy() @ X[:, 0], rtol=1e-14)
    np.testing.assert_allclose(S.matvec(X[:, :1]), A.numpy() @ X[:, :1], rtol=1e-14)
    np.testing.assert_allclose(S.rmatvec(y), A.numpy().T @ y, rtol=1e-14)
    np.testing.assert_allclose(S.T @ y, A.numpy().T @ y, rtol=1e-14)


def test_scipy_solvers_run_on_a_curvlib_operator():
    A = _matrix(12, 12)
    A = A @ A.T + torch.eye(12, dtype=F64)
    op = cl.from_scipy(A.numpy())
    values = spla.eigsh(op.to_scipy(), k=3, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(values), torch.linalg.eigvalsh(A)[-3:].numpy(), rtol=1e-10)
    b = np.ones(12)
    x, info = spla.cg(cl.to_scipy(op), b, rtol=1e-12)
    assert info == 0
    np.testing.assert_allclose(A.numpy() @ x, b, rtol=1e-8)


def test_scipy_keeps_float32():
    op = cl.to_scipy(_matrix(4, 4, torch.float32))
    assert op.dtype == np.float32
    assert (op @ np.ones(4)).dtype == np.float32


@pytest.mark.parametrize("kind", ["array", "sparse", "operator", "integers"])
def test_from_scipy(kind: str):
    A = _matrix(6, 6)
    A = (A + A.T).round(decimals=1)
    if kind == "integers":
        A = (A * 10).round()
    given = {
        "array": A.numpy(),
        "sparse": sp.csr_array(A.numpy()),
        "operator": spla.aslinearoperator(A.numpy()),
        "integers": A.numpy().astype(np.int64),
    }[kind]
    op = cl.from_scipy(given)
    V = _matrix(6, 2)
    torch.testing.assert_close(op @ V, A @ V, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(op.T @ V, A.T @ V, rtol=1e-13, atol=1e-13)
    assert op.symmetric == (kind != "operator")  # SciPy's operators do not say
    assert op.dtype == F64


def test_round_trip_of_a_rectangular_operator():
    A = _matrix(3, 5)
    back = cl.from_scipy(cl.to_scipy(A))
    torch.testing.assert_close(back.to_dense(), A, rtol=0, atol=0)
    torch.testing.assert_close(back.T.to_dense(), A.T, rtol=0, atol=0)


def test_from_scipy_refuses():
    with pytest.raises(TypeError, match=r"expected a SciPy operator.*got str"):
        cl.from_scipy("matrix")
    with pytest.raises(TypeError, match="expected a real matrix, got complex128"):
        cl.from_scipy(np.eye(2) * 1j)


def test_numpy_vectors_are_refused_with_the_way_out():
    with pytest.raises(TypeError, match=r"torch\.from_numpy"):
        cl.from_scipy(np.eye(2)) @ np.ones(2)


# ----------------------------------------------------------------------- DLPack
def test_dlpack_shares_memory_both_ways():
    array = np.arange(4.0)
    tensor = cl.from_dlpack(array)
    array[0] = 7.0
    assert tensor.tolist() == [7.0, 1.0, 2.0, 3.0]
    back = torch.from_dlpack(cl.to_dlpack(tensor.requires_grad_()))
    back[1] = 9.0
    assert array[1] == 9.0


def test_dlpack_refuses():
    with pytest.raises(TypeError, match=r"expected a torch\.Tensor, got list"):
        cl.to_dlpack([1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected an array that has __dlpack__.*got list"):
        cl.from_dlpack([1.0])
