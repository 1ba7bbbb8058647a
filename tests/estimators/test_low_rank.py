"""Low-rank approximations against the best ones, and their estimated errors against the true."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from curvlib.core.operator import LinearOperator
from curvlib.core.structured import LowRankPlusShift
from curvlib.estimators import sketch
from curvlib.estimators.low_rank import LowRank, low_rank
from tests.estimators.spectra import Counted, matrix

F64 = torch.float64
PSD = {
    "exponential": torch.logspace(0, -6, 80, dtype=F64),
    "polynomial": torch.arange(1, 101, dtype=F64) ** -2.0,
    "step": torch.cat([torch.full((12,), 5.0), torch.full((88,), 1e-3)]).double(),
    "flat": torch.ones(50, dtype=F64),
}


def best_error(values: Tensor, rank: int) -> float:
    """Eckart-Young: what no approximation of this rank can beat, in the Frobenius norm."""
    return float(values.abs().sort(descending=True).values[rank:].norm())


def true_error(A: Tensor, found: LowRank) -> float:
    return float((A.double() - found.operator.to_dense().double()).norm())


@pytest.mark.parametrize("method", ["nystrom", "eigh"])
@pytest.mark.parametrize("name", PSD)
def test_near_the_best(name: str, method: str) -> None:
    A = matrix(PSD[name])
    for rank in (1, 5, 12, 20):
        counted = Counted(A, psd=True)
        found = low_rank(counted.op, rank, method=method, power=2)
        best = best_error(PSD[name], rank)
        error = true_error(A, found)
        assert best * (1 - 1e-9) <= error <= 1.05 * best + 1e-10
        eye = found.vectors.T @ found.vectors
        assert torch.allclose(eye, torch.eye(rank, dtype=F64), atol=1e-12)
        assert (found.values.diff() <= 1e-12).all()
        assert found.values.min() >= 0
        passes = 3 if method == "nystrom" else 4
        assert counted.products == found.products == (rank + 10) * passes + 10
        assert found.method == method


def test_eigenvalues_are_bounded_by_the_true_ones() -> None:
    """Nyström and Rayleigh-Ritz values lie below the eigenvalues of a PSD matrix."""
    values = PSD["polynomial"]
    for method in ("nystrom", "eigh"):
        found = low_rank(matrix(values), 10, method=method, power=0)
        assert (found.values <= values[:10] * (1 + 1e-10)).all()
        assert (found.values >= 0.3 * values[:10]).all()


def test_power_iterations_help() -> None:
    A = matrix(PSD["polynomial"])
    errors = [true_error(A, low_rank(A, 10, method="eigh", power=p)) for p in range(4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] <= 1.001 * best_error(PSD["polynomial"], 10) < errors[0]


def test_nystrom_beats_eigh_for_the_same_products() -> None:
    A = matrix(PSD["exponential"])
    one = low_rank(A, 10, method="nystrom", power=1, probes=0)
    two = low_rank(A, 10, method="eigh", power=0, probes=0)
    assert one.products == two.products
    assert true_error(A, one) < true_error(A, two)


@pytest.mark.parametrize("method", ["nystrom", "eigh"])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_exact_for_low_rank(method: str, dtype: torch.dtype) -> None:
    values = torch.cat([torch.tensor([4.0, 4.0, 1.0, 1e-2]), torch.zeros(56)]).double()
    A = matrix(values).to(dtype)
    found = low_rank(A, 6, method=method)
    eps = torch.finfo(dtype).eps
    assert true_error(A, found) <= 100 * eps * 4.0
    assert found.error <= 100 * eps * 4.0
    assert torch.allclose(found.values[:4], values[:4], atol=100 * eps)
    assert found.values[4:].abs().max() <= 15 * eps  # the stabilizing shift is taken off again


def test_indefinite_by_absolute_value() -> None:
    values = torch.cat([torch.tensor([-5.0, 4.0, -3.0, 2.0]), 1e-6 * torch.ones(60)]).double()
    A = matrix(values)
    found = low_rank(A, 3)
    assert found.method == "eigh"
    assert torch.allclose(found.values, torch.tensor([-5.0, 4.0, -3.0], dtype=F64))
    assert math.isclose(true_error(A, found), best_error(values, 3), rel_tol=1e-6)
    with pytest.raises(
        RuntimeError, match=r"needs a positive semi-definite operator, but matrix has an eigenvalue"
    ):
        low_rank(A, 3, method="nystrom")


def test_tiny_negative_eigenvalues_are_rounding() -> None:
    """Matrices that are PSD but for rounding, such as GGNs in float32."""
    values = torch.cat([torch.logspace(0, -3, 10), torch.full((70,), -1e-7)]).double()
    found = low_rank(Counted(matrix(values).float(), psd=True).op, 20, method="nystrom")
    assert found.values.min() >= 0
    assert torch.allclose(found.values[:5], values[:5], rtol=1e-3)


def test_squared_error_is_unbiased() -> None:
    """A z-test over 500 seeds, each with an approximation and probes of its own."""
    A = matrix(PSD["polynomial"])
    op = Counted(A, psd=True).op
    differences, covered = [], 0
    for seed in range(500):
        found = low_rank(op, 5, power=0, oversampling=2, probes=12, seed=seed)
        truth = true_error(A, found)
        differences.append(found.squared_error / truth**2 - 1.0)
        covered += abs(found.error - truth) <= 2.201 * found.error_stderr
    spread = torch.tensor(differences, dtype=F64)
    assert abs(float(spread.mean() / (spread.std() / math.sqrt(500)))) < 3.5
    assert 0.85 <= covered / 500 <= 0.99  # squares of twelve probes are skewed


def test_relative_error() -> None:
    A = matrix(PSD["exponential"])
    found = low_rank(A, 10, probes=50)
    truth = true_error(A, found) / float(A.norm())
    assert math.isclose(found.relative_error, truth, rel_tol=0.5)
    assert math.isclose(math.sqrt(found.squared_norm), float(A.norm()), rel_tol=0.3)
    zero = low_rank(torch.zeros(5, 5, dtype=F64), 2)
    assert zero.relative_error == zero.error == zero.error_stderr == 0.0


def test_the_operator_has_solve_and_logdet() -> None:
    A = matrix(PSD["step"])
    found = low_rank(A, 12)
    op = found.operator
    assert isinstance(op, LowRankPlusShift)
    near = op.shift(1e-3)
    b = torch.ones(100, dtype=F64)
    exact = torch.linalg.solve(A, b)
    assert (near.solve(b) - exact).norm() <= 1e-3 * exact.norm()
    assert math.isclose(near.logdet(), float(torch.logdet(A)), rel_tol=1e-3)
    assert torch.allclose(near.diagonal(), A.diagonal(), atol=5e-3)
    assert math.isclose(op.trace(), 60.0, rel_tol=1e-3)


@given(
    n=st.integers(1, 20),
    rank=st.integers(1, 20),
    method=st.sampled_from(["nystrom", "eigh"]),
    power=st.integers(0, 2),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=50, deadline=None)
def test_whole_rank_is_exact(n: int, rank: int, method: str, power: int, seed: int) -> None:
    rank = min(rank, n)
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(n, generator=generator, dtype=F64)
    values[rank:] = 0.0
    A = matrix(values, seed)
    found = low_rank(Counted(A, psd=True).op, rank, method=method, power=power, seed=seed)
    assert true_error(A, found) <= 1e-10
    assert found.error <= 1e-10


def test_seeds_and_generators(rng_untouched: None) -> None:
    A = matrix(PSD["polynomial"])
    one, two = low_rank(A, 5, seed=3, power=0), low_rank(A, 5, seed=3, power=0)
    other = low_rank(A, 5, seed=4, power=0)
    assert torch.equal(one.values, two.values)
    assert not torch.equal(one.values, other.values)
    generator = torch.Generator().manual_seed(0)
    first, second = (low_rank(A, 5, generator=generator, power=0) for _ in range(2))
    assert not torch.equal(first.values, second.values)
    assert first.settings["seed"] == "generator"


def test_blocks_do_not_matter() -> None:
    A = matrix(PSD["polynomial"])
    counted = Counted(A, psd=True)
    whole = low_rank(A, 5, method="nystrom", block=100)
    pieces = low_rank(counted.op, 5, block=4)
    assert counted.columns == [4, 4, 4, 3] * 2 + [4, 4, 2]
    assert torch.allclose(whole.values, pieces.values, rtol=1e-12)
    assert math.isclose(whole.squared_error, pieces.squared_error, rel_tol=1e-9)


def test_few_probes() -> None:
    A = matrix(PSD["polynomial"])
    none = low_rank(A, 5, probes=0)
    assert math.isnan(none.squared_error)
    assert math.isnan(none.squared_error_stderr)
    one = low_rank(A, 5, probes=1)
    assert one.squared_error > 0
    assert math.isnan(one.squared_error_stderr)


# -------------------------------------------------------------------- long runs
@pytest.mark.parametrize("method", ["nystrom", "eigh"])
def test_interrupted_anywhere_ends_bitwise_the_same(method: str, tmp_path: Path) -> None:
    A = matrix(PSD["polynomial"])
    how: dict[str, Any] = {"method": method, "block": 4, "save_every": 0, "progress": False}
    whole = Counted(A, psd=True)
    undisturbed = low_rank(whole.op, 5, **how)
    for stop in range(1, len(whole.columns)):
        path = tmp_path / f"{stop}.safetensors"
        counted = Counted(A, psd=True)
        counted.stop_after = stop
        with pytest.raises(RuntimeError):
            low_rank(counted.op, 5, checkpoint=path, **how)
        rest = Counted(A, psd=True)
        found = low_rank(rest.op, 5, checkpoint=path, **how)
        assert torch.equal(found.values, undisturbed.values)
        assert torch.equal(found.vectors, undisturbed.vectors)
        assert found.squared_error == undisturbed.squared_error
        assert found.products == undisturbed.products
        assert counted.products + rest.products == whole.products
    with pytest.raises(ValueError, match="rank was 5 and is now 6"):
        low_rank(whole.op, 6, checkpoint=tmp_path / "1.safetensors", **how)


def test_files_and_progress(tmp_path: Path) -> None:
    seen: list[tuple[float, float | None, str]] = []
    found = low_rank(matrix(PSD["step"]), 5, block=8, progress=lambda *a: seen.append(a))
    assert seen[0] == (8, 55, "pass 1 of 3")
    assert seen[-1] == (55, 55, "error")
    loaded = LowRank.load(found.save(tmp_path / "l.safetensors"))
    assert torch.equal(loaded.vectors, found.vectors)
    assert loaded.vectors.T.is_contiguous()
    assert "squared_error=" in repr(found)


# ---------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("error", "text", "changes"),
    [
        (ValueError, r"expected a square operator", {"op": torch.ones(2, 3)}),
        (ValueError, "expected a symmetric operator", {"op": torch.ones(3, 3).triu()}),
        (TypeError, "expected an int for rank, got float", {"rank": 2.0}),
        (TypeError, "expected an int for rank, got bool", {"rank": True}),
        (ValueError, "expected rank >= 1, got 0", {"rank": 0}),
        (ValueError, "expected rank <= 50", {"rank": 51}),
        (ValueError, "unknown method='svd'; there are nystrom, eigh", {"method": "svd"}),
        (ValueError, "expected power >= 0, got -1", {"power": -1}),
        (ValueError, "expected oversampling >= 0, got -1", {"oversampling": -1}),
        (ValueError, "expected probes >= 0, got -1", {"probes": -1}),
        (ValueError, "expected block >= 1, got 0", {"block": 0}),
        (TypeError, "seed= is an int, got str", {"seed": "x"}),
    ],
)
def test_misuse(error: type[Exception], text: str, changes: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"op": matrix(PSD["flat"]), "rank": 3} | changes
    with pytest.raises(error, match=text):
        low_rank(**arguments)


@pytest.mark.parametrize(("at", "text"), [(3, "products 1 to 15"), (38, "products 31 to 40")])
def test_a_product_that_is_not_finite(at: int, text: str, tmp_path: Path) -> None:
    counted = Counted(matrix(PSD["polynomial"]), psd=True)
    counted.fail_at = at
    path = tmp_path / "c.safetensors"
    with pytest.raises(FloatingPointError, match=text):
        low_rank(counted.op, 5, checkpoint=path, save_every=1e6)
    mended = Counted(counted.A, psd=True)
    found = low_rank(mended.op, 5, checkpoint=path, save_every=1e6)
    assert mended.products == found.products - (30 if at > 30 else 0)


def test_nystrom_of_the_zero_operator() -> None:
    op = LinearOperator(torch.zeros_like, (6, 6), dtype=F64, psd=True)
    found = low_rank(op, 2)
    assert torch.equal(found.values, torch.zeros(2, dtype=F64))
    omega = sketch.random_rows(op, 3, torch.Generator().manual_seed(0))
    assert torch.allclose(omega @ omega.T, torch.eye(3, dtype=F64), atol=1e-14)
