"""Low-rank approximations whose rank grows until their error is below a tolerance."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from curvlib.core.operator import LinearOperator
from curvlib.estimators.low_rank import LowRank, low_rank
from tests.estimators.small import killed, operator, same
from tests.estimators.small import matrix as small_matrix
from tests.estimators.spectra import Counted, matrix

F64 = torch.float64
K = torch.arange(1, 61, dtype=F64)
SPECTRA = {
    "flat": 3 - 2 * (K - 1) / 59,
    "polynomial": K**-2,
    "exponential": 0.7**K,
    "step": torch.where(K <= 5, 1.0, 1e-3).double(),
    "indefinite": K**-1.5 * torch.where(K % 2 == 0, -1.0, 1.0),
}


def true_error(A: Tensor, found: LowRank) -> float:
    return float((A.double() - found.operator.to_dense().double()).norm())


def least_rank(values: Tensor, tolerance: float) -> int:
    """Eckart-Young: the least rank whose best approximation meets the tolerance."""
    squares = values.square().sort(descending=True).values
    left = squares.flip(0).cumsum(0).flip(0) / squares.sum()
    return int((left > tolerance**2).sum())


@pytest.mark.parametrize("method", ["nystrom", "eigh"])
@pytest.mark.parametrize("tolerance", [0.3, 0.03, 1e-4])
@pytest.mark.parametrize("name", ["polynomial", "exponential", "step"])
def test_the_tolerance_is_met_by_little_more_than_the_least_rank(
    name: str, tolerance: float, method: str
) -> None:
    A, most = matrix(SPECTRA[name]), least_rank(SPECTRA[name], tolerance)
    counted = Counted(A, psd=True)
    found = low_rank(counted.op, tolerance=tolerance, method=method, power=2, block=4, probes=20)
    assert found.converged
    assert true_error(A, found) <= 1.3 * tolerance * float(A.norm())
    assert most <= found.values.numel() <= 1.5 * most + 4
    eye = found.vectors.T @ found.vectors
    assert torch.allclose(eye, torch.eye(len(eye), dtype=F64), atol=1e-12)
    assert counted.products == found.products == 3 * found.values.numel() + 40
    assert found.values.abs().diff().le(1e-12).all()


def test_the_error_of_control_probes_is_the_approximations() -> None:
    """What decides without a product is the error of what is returned."""
    from curvlib.core.random import generator_of
    from curvlib.estimators import adaptive_rank

    for name, method in (("indefinite", "eigh"), ("polynomial", "nystrom")):
        A = matrix(SPECTRA[name])
        growth = adaptive_rank.Growth(Counted(A).op, method, 0.2, 60, 1000, 1, 3, 5, 5)
        state = adaptive_rank.first_state(growth, generator_of(None, 0))
        while not state.finished:
            before, state = state, adaptive_rank.next_state(growth, state)
        W = torch.cat(before.controls).mT
        U = state.basis[0].mT
        rest = A @ W - U @ (state.values[:, None] * (U.mT @ W))
        assert math.isclose(state.error, float(rest.norm() / (A @ W).norm()), rel_tol=1e-6)
        assert 0.01 < state.error <= 0.2


def test_exact_ends_early() -> None:
    values = torch.cat([torch.tensor([5.0, -3.0, 2.0]), torch.zeros(57)]).double()
    A = matrix(values)
    found = low_rank(A, tolerance=1e-6, block=4)
    assert found.values.numel() == 4
    assert true_error(A, found) < 1e-12
    assert found.interval[0] <= found.error <= found.interval[1] < 1e-12
    zero = low_rank(torch.zeros(9, 9, dtype=F64), tolerance=0.5)
    assert zero.converged
    assert zero.error == zero.relative_error == 0.0
    assert zero.interval == (0.0, 0.0)
    whole = low_rank(matrix(SPECTRA["flat"]), tolerance=1e-9, power=0)
    assert whole.values.numel() == 60
    assert whole.converged


def test_limits_are_told() -> None:
    A = matrix(SPECTRA["flat"])
    with pytest.warns(RuntimeWarning, match=r"of rank 12 has a relative error .* larger rank="):
        found = low_rank(A, 12, tolerance=0.01)
    assert found.values.numel() == 12
    assert not found.converged
    counted = Counted(A)
    with pytest.warns(RuntimeWarning, match="pass a larger max_products= or tolerance="):
        found = low_rank(counted.op, tolerance=0.01, max_products=61)
    assert counted.products == found.products == 60  # of 61 left for blocks of 8, one is too few
    assert found.values.numel() == 20


def test_blocks_seeds_and_columns() -> None:
    A = matrix(SPECTRA["polynomial"])
    counted = Counted(A, psd=True)
    low_rank(counted.op, tolerance=0.01, power=0, block=3, probes=7)
    assert counted.columns[:3] == [3, 3, 1]
    assert counted.columns[-3:] == [3, 3, 1]
    assert set(counted.columns[3:-3]) == {3}
    one, two = (low_rank(A, tolerance=0.1, seed=s) for s in (1, 2))
    assert not torch.equal(one.values, two.values)
    assert torch.equal(one.values, low_rank(A, tolerance=0.1, seed=1).values)
    single = low_rank(A.float(), tolerance=1e-3)
    assert single.vectors.dtype == torch.float32
    assert true_error(A, single) < 2e-3 * float(A.norm())


@pytest.mark.parametrize("method", ["nystrom", "eigh"])
def test_a_nan_is_named_and_nothing_is_lost(method: str, tmp_path: Path) -> None:
    A = small_matrix(0.9 ** torch.arange(90))
    how: dict[str, Any] = {"method": method, "block": 4, "probes": 5, "progress": False}
    straight = low_rank(operator(A, psd=True), tolerance=0.3, **how)
    for stop in range(1, 8):
        counted, path = Counted(A, psd=True, name="A"), tmp_path / str(stop)
        counted.op._identity = "A"
        counted.stop_after = stop
        with pytest.raises(RuntimeError):
            low_rank(counted.op, tolerance=0.3, checkpoint=path, save_every=0, **how)
        rest = Counted(A, psd=True, name="A")
        rest.op._identity = "A"
        found = low_rank(rest.op, tolerance=0.3, checkpoint=path, **how)
        same(found, straight)
        assert counted.products + rest.products == straight.products


@pytest.mark.parametrize("how", ["rank=6, block=4", "tolerance=0.2, block=4"])
def test_kill_9_resumes_bitwise(how: str, tmp_path: Path) -> None:
    call = f"low_rank(op, {how}, checkpoint=path, save_every=0, progress=seen)"
    op = operator(small_matrix(0.8 ** torch.arange(90)), psd=True)
    straight = eval(call, {"low_rank": low_rank, "op": op, "path": None, "seen": False})
    same(killed(call, tmp_path / "c", psd=True), straight)


@pytest.mark.parametrize(
    ("error", "text", "changes"),
    [
        (ValueError, r"pass rank= .* or tolerance=", {"tolerance": None}),
        (TypeError, "expected a number for tolerance, got str", {"tolerance": "x"}),
        (ValueError, "expected a positive tolerance", {"tolerance": 0.0}),
        (ValueError, "a tolerance needs at least 2 probes to tell the error, got 1", {"probes": 1}),
        (ValueError, r"expected max_products >= 22 \(twice 10 probes", {"max_products": 21}),
        (TypeError, "expected an int for max_products, got float", {"max_products": 1e3}),
        (
            ValueError,
            r"max_products= goes with tolerance=",
            {"tolerance": None, "rank": 3, "max_products": 50},
        ),
    ],
)
def test_misuse(error: type[Exception], text: str, changes: dict[str, Any]) -> None:
    with pytest.raises(error, match=text):
        low_rank(matrix(SPECTRA["flat"]), **({"tolerance": 0.1} | changes))


def repeated(name: str, how: dict[str, Any], runs: int) -> list[tuple[float, LowRank]]:
    """True errors and what was found, each with an approximation and probes of its own."""
    A = matrix(SPECTRA[name])
    op = LinearOperator(
        lambda V: A @ V, A.shape, dtype=F64, symmetric=True, psd=name != "indefinite"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [low_rank(op, **how, seed=seed, progress=False) for seed in range(runs)]
    return [(true_error(A, f), f) for f in found]


ONE_PASS = {"rank": 5, "power": 0, "oversampling": 2, "probes": 12}
TWO_PASSES = {"rank": 5, "power": 1, "probes": 20}


def grown(tolerance: float) -> dict[str, Any]:
    return {"tolerance": tolerance, "probes": 12, "block": 4}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("flat", ONE_PASS),
        ("flat", grown(0.7)),
        ("polynomial", TWO_PASSES),
        ("polynomial", grown(0.1)),
        ("exponential", ONE_PASS),
        ("exponential", grown(0.3)),
        ("step", TWO_PASSES),
        ("step", grown(0.1)),
        ("indefinite", ONE_PASS),
        ("indefinite", TWO_PASSES),
        ("indefinite", grown(0.3)),
    ],
    ids=str,
)
def test_errors_are_unbiased_and_covered(name: str, how: dict[str, Any]) -> None:
    """Each spectrum at a given rank and with a tolerance; 500 runs."""
    runs = [(truth, found) for truth, found in repeated(name, how, 500) if truth > 1e-12]
    assert len(runs) >= 475  # the others are the whole matrix: nothing is left to estimate
    spread = torch.tensor([f.squared_error / truth**2 - 1.0 for truth, f in runs], dtype=F64)
    assert abs(float(spread.mean() / (spread.std() / math.sqrt(len(runs))))) < 4.0
    covered = sum(f.interval[0] <= truth <= f.interval[1] for truth, f in runs)
    assert 0.92 <= covered / len(runs) <= 0.98


def test_where_no_rank_has_so_small_an_error_all_is_kept() -> None:
    assert all(truth < 1e-12 for truth, _ in repeated("flat", grown(0.1), 20))
