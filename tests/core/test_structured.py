"""Operators with known eigenvalues, against dense float64 linear algebra."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from curvlib.core.operator import LinearOperator
from curvlib.core.structured import Diagonal, LowRankPlusShift

F64 = torch.float64
Structured = Diagonal | LowRankPlusShift


def _basis(n: int, k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=F64)).Q


def _low_rank(values: list[float], shift: float, n: int = 7) -> LowRankPlusShift:
    return LowRankPlusShift(_basis(n, len(values)), torch.tensor(values, dtype=F64), shift)


CASES: dict[str, Structured] = {
    "diagonal": Diagonal(torch.tensor([3.0, 0.5, 1e-3, 7.0], dtype=F64)),
    "one entry": Diagonal(torch.tensor([2.5], dtype=F64)),
    "low rank plus shift": _low_rank([4.0, 2.0, 0.1], 0.3),
    "eigenvalues below the shift": _low_rank([-0.9, -0.5], 1.0),
    "full basis": _low_rank([4.0, 2.0, 1.0, 0.5, 0.25], 0.1, n=5),
    "rank 0": LowRankPlusShift(torch.zeros(4, 0, dtype=F64), torch.zeros(0, dtype=F64), 2.0),
}
INDEFINITE: dict[str, Structured] = {
    "diagonal": Diagonal(torch.tensor([3.0, -0.5, 2.0], dtype=F64)),
    "low rank": _low_rank([4.0, -2.0], 0.5),
    "negative shift": _low_rank([4.0, 2.0], -0.5),
}


@pytest.mark.parametrize("name", CASES)
def test_everything_against_dense(name: str) -> None:
    op = CASES[name]
    n = op.shape[0]
    A = op.to_dense()
    eye = torch.eye(n, dtype=F64)
    assert torch.allclose(A, A.T, rtol=0, atol=1e-14)
    X = torch.randn(n, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    for damping in (0.0, 0.7):
        B = A + damping * eye
        assert torch.allclose(op.solve(X, damping), torch.linalg.solve(B, X), rtol=1e-11)
        assert torch.allclose(op.solve(X[:, 0], damping=damping), torch.linalg.solve(B, X[:, 0]))
        inverse = op.inverse(damping)
        assert isinstance(inverse, type(op))
        assert torch.allclose(inverse.to_dense(), torch.linalg.inv(B), rtol=1e-10, atol=1e-12)
        assert math.isclose(op.logdet(damping), float(torch.logdet(B)), rel_tol=1e-11)
        shifted = op.shift(damping)
        assert isinstance(shifted, type(op))
        assert torch.allclose(shifted.to_dense(), B, rtol=1e-13, atol=1e-14)
    values, vectors = torch.linalg.eigh(A)
    for p in (-1.5, -1, -0.5, 0, 0.25, 0.5, 2):
        expected = (vectors * values**p) @ vectors.T
        scale = float(expected.abs().max())
        found = op.power(p)
        assert isinstance(found, type(op))
        assert (found.to_dense() - expected).abs().max() <= 1e-11 * scale
    assert math.isclose(op.trace(), float(A.trace()), rel_tol=1e-13)
    assert torch.allclose(op.diagonal(), A.diagonal(), rtol=1e-13)
    assert op.psd
    assert op.symmetric


def test_low_rank_is_its_formula() -> None:
    U, v = _basis(6, 2), torch.tensor([3.0, -1.0], dtype=F64)
    op = LowRankPlusShift(U, v, 0.25)
    assert torch.allclose(op.to_dense(), (U * v) @ U.T + 0.25 * torch.eye(6, dtype=F64))
    assert torch.equal(op.values, v)
    assert op.offset == 0.25
    again = LowRankPlusShift.from_eigenvalues(U, v + 0.25, 0.25)
    assert torch.equal(again.to_dense(), op.to_dense())


@pytest.mark.parametrize("name", INDEFINITE)
def test_indefinite_ones_solve_but_have_no_logarithm(name: str) -> None:
    op = INDEFINITE[name]
    A = op.to_dense()
    assert not op.psd
    X = torch.ones(op.shape[0], 2, dtype=F64)
    assert torch.allclose(op.solve(X), torch.linalg.solve(A, X))
    assert torch.allclose(op.power(3).to_dense(), A @ A @ A)
    lowest = float(torch.linalg.eigvalsh(A)[0])
    with pytest.raises(RuntimeError, match=rf"1 are not, the least is {lowest:.3g}; pass damping"):
        op.logdet()
    with pytest.raises(RuntimeError, match=r"power 0\.5 of .* is not real: 1 eigenvalues are neg"):
        op.power(0.5)
    assert math.isfinite(op.logdet(damping=1.0 - lowest))


@given(
    st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6),
    st.floats(1e-6, 1e6),
    st.integers(0, 10_000),
)
@settings(max_examples=50, deadline=None)
def test_inverse_of_inverse(values: list[float], shift: float, seed: int) -> None:
    n = len(values) + 2
    U = _basis(n, len(values), seed)
    op = LowRankPlusShift.from_eigenvalues(U, torch.tensor(values, dtype=F64), shift)
    twice = op.inverse().inverse()
    norm = max(*values, shift)
    assert (twice.to_dense() - op.to_dense()).abs().max() <= 1e-12 * norm
    assert math.isclose(op.logdet(), -op.inverse().logdet(), rel_tol=1e-9, abs_tol=1e-9)
    x = torch.ones(n, dtype=F64)
    residual = op @ op.solve(x) - x
    # The solution may be as large as 1 / least; a backward stable solve leaves eps |A| |x|.
    least = min(*values, shift)
    assert residual.norm() <= 1e-14 * (norm / least) * x.norm()


def test_small_damping_loses_no_digits_in_float32() -> None:
    """A subtraction of 1/s from 1/(v + s) would lose all digits where s is small."""
    n, s = 400, 1e-5
    U = torch.linalg.qr(torch.randn(n, 8, generator=torch.Generator().manual_seed(0))).Q
    op = LowRankPlusShift(U, torch.logspace(2, 0, 8), s)
    exact = LowRankPlusShift(torch.linalg.qr(U.double()).Q, torch.logspace(2, 0, 8, dtype=F64), s)
    inside = U @ torch.ones(8)
    found = op.solve(inside).double()
    expected = exact.solve(inside.double())
    # What rounding of the right-hand side alone makes of it: eps |b| / s, outside the span.
    assert (U.double().T @ (found - expected)).norm() <= 1e-5 * expected.norm()


def test_float32_keeps_its_type() -> None:
    for op in (Diagonal(torch.ones(3)), LowRankPlusShift(torch.eye(3)[:, :1], torch.ones(1), 1.0)):
        assert op.solve(torch.ones(3)).dtype == torch.float32
        assert op.inverse().dtype == torch.float32
        assert op.diagonal().dtype == torch.float32


def test_they_are_operators() -> None:
    op = CASES["low rank plus shift"]
    other = _low_rank([4.0, 2.0, 0.1], 0.31)
    assert isinstance(op, LinearOperator)
    assert torch.allclose((op + 2 * op).to_dense(), 3 * op.to_dense())
    assert op.fingerprint() != other.fingerprint()
    assert op.fingerprint() == _low_rank([4.0, 2.0, 0.1], 0.3).fingerprint()
    diagonal = CASES["diagonal"]
    assert diagonal.fingerprint() != diagonal.shift(1.0).fingerprint()


# ---------------------------------------------------------------------- errors
def test_singular() -> None:
    zero = Diagonal(torch.tensor([1.0, 0.0, 0.0]))
    with pytest.raises(RuntimeError, match=r"damping=0 is singular: 2 of its 3 distinct"):
        zero.solve(torch.ones(3))
    with pytest.raises(RuntimeError, match="is singular"):
        zero.inverse()
    with pytest.raises(RuntimeError, match=r"power -1 of .* is infinite: 2 of its"):
        zero.power(-1)
    with pytest.raises(RuntimeError, match="2 are not, the least is 0; pass damping > 0"):
        zero.logdet()
    flat = _low_rank([1.0], 0.0)
    with pytest.raises(RuntimeError, match=r"is singular: 1 of its 2 distinct eigenvalues"):
        flat.solve(torch.ones(7, dtype=F64))
    with pytest.raises(RuntimeError, match=r"with damping=-1 is singular"):
        flat.inverse(damping=-1.0)
    assert torch.allclose(flat.power(0).to_dense(), torch.eye(7, dtype=F64))


def test_wrong_construction() -> None:
    U = _basis(4, 2)
    two = torch.ones(2, dtype=F64)
    with pytest.raises(TypeError, match="expected a torch.Tensor for values, got list"):
        Diagonal([1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected values with 1 dimension\(s\), got \[2, 2\]"):
        Diagonal(torch.eye(2))
    with pytest.raises(TypeError, match="expected values in float32 or float64, got torch.int64"):
        Diagonal(torch.tensor([1]))
    with pytest.raises(ValueError, match="1 of 2 entries of values are NaN or infinite"):
        Diagonal(torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match=r"k <= P and k values, got \[4, 2\] and \[3\]"):
        LowRankPlusShift(U, torch.ones(3, dtype=F64))
    with pytest.raises(ValueError, match=r"U\.T @ U is off by 3\.0e\+00; use torch\.linalg\.qr"):
        LowRankPlusShift(2 * U, two)
    with pytest.raises(TypeError, match="expected a number for shift, got str"):
        LowRankPlusShift(U, two, "1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a finite number for shift, got inf"):
        LowRankPlusShift(U, two, math.inf)


def test_wrong_arguments() -> None:
    op = CASES["low rank plus shift"]
    x = torch.ones(7, dtype=F64)
    with pytest.raises(TypeError, match="expected a number for damping, got str"):
        op.solve(x, damping="big")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a finite number for damping, got nan"):
        op.logdet(damping=math.nan)
    with pytest.raises(TypeError, match="expected a number for p, got NoneType"):
        op.power(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected columns of shape \[7, K\], got \[3, 1\]"):
        op.solve(torch.ones(3, dtype=F64))
    with pytest.raises(TypeError, match=r"expected torch\.float64 vectors, got torch\.float32"):
        op.solve(x.float())
