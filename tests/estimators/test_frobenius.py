"""The Frobenius norm: methods, shapes, identities, resuming and errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from curvlib.core.operator import LinearOperator
from curvlib.core.result import Result
from curvlib.estimators.frobenius import METHODS, FrobeniusNorm, choose, frobenius_norm
from curvlib.estimators.trace import trace
from tests.estimators.small import columnwise, interrupted, killed, matrix, operator, same

N = 90
INDEFINITE = matrix(0.8 ** torch.arange(N) * torch.tensor([1.0, -1.0, 1.0]).repeat(N // 3))


def quick(op: Any, **changes: Any) -> FrobeniusNorm:
    return frobenius_norm(op, progress=False, **changes)


def test_what_is_known_picks_the_method() -> None:
    assert quick(operator(INDEFINITE), max_products=40).method == "xtrace"
    assert quick(operator(INDEFINITE), max_products=7).method == "hutchinson"
    assert quick(torch.ones(3, 200), max_products=40).method == "hutchinson"
    assert quick(torch.ones(3, 20)).method == "exact"
    large = LinearOperator(lambda V: V, (10**8, 10**8), dtype=torch.float32, symmetric=True)
    assert choose(large, None, 100, None) == "hutchinson"


@pytest.mark.parametrize("shape", [(7, 20), (20, 7), (9, 9)])
def test_exact_for_any_shape(shape: tuple[int, int]) -> None:
    A = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = quick(A)
    assert result.value == pytest.approx(float(torch.linalg.matrix_norm(A)), rel=1e-14)
    assert result.interval == (result.value, result.value)
    assert result.products == shape[1]


@pytest.mark.parametrize("shape", [(7, 50), (50, 20)])
def test_rectangular_operators_need_no_transpose(shape: tuple[int, int]) -> None:
    A = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    op = LinearOperator(lambda V: A @ V, shape, dtype=A.dtype)
    runs = [quick(op, method="hutchinson", probes=8, seed=s).squared for s in range(400)]
    values = torch.tensor(runs)
    z = (values.mean() - A.square().sum()) / (values.std() / math.sqrt(400))
    assert abs(float(z)) < 4.0


def test_the_square_is_the_trace_of_the_squared_operator() -> None:
    op = columnwise(INDEFINITE)
    norm = quick(op, method="hutchinson", probes=12, law="gaussian", seed=4)
    square = trace(op @ op, method="hutchinson", probes=12, law="gaussian", seed=4, progress=False)
    assert norm.squared == pytest.approx(square.value, rel=1e-12)
    assert norm.squared_stderr == pytest.approx(square.stderr, rel=1e-10)
    assert torch.allclose(norm.samples, square.samples, rtol=1e-12)
    assert norm.value == pytest.approx(math.sqrt(norm.squared))
    assert norm.stderr == pytest.approx(norm.squared_stderr / (2 * norm.value))
    assert norm.low == pytest.approx(math.sqrt(square.low))


@pytest.mark.parametrize("rank", [0, 3, 7])
def test_exact_below_full_rank(rank: int) -> None:
    values = torch.zeros(N)
    values[:rank] = torch.arange(1.0, rank + 1.0) * (-1.0) ** torch.arange(rank)
    result = quick(operator(matrix(values)), method="xtrace", probes=12)
    assert result.squared == pytest.approx(float(values.square().sum()), rel=1e-12)
    assert result.squared_stderr <= 1e-11


def test_the_sketch_wins_where_the_spectrum_decays() -> None:
    truth = float(torch.linalg.matrix_norm(INDEFINITE))

    def error(method: str) -> float:
        runs = [
            quick(operator(INDEFINITE), method=method, max_products=32, seed=s).value - truth
            for s in range(50)
        ]
        return float(torch.tensor(runs).square().mean().sqrt())

    assert error("xtrace") < error("hutchinson") / 5


@pytest.mark.parametrize("method", METHODS)
def test_tolerance_is_that_of_the_norm(method: str) -> None:
    result = quick(operator(INDEFINITE), method=method, tolerance=0.1, max_products=1000)
    assert result.converged
    assert result.stderr <= 0.1 * result.value
    assert result.products >= 8 * METHODS[method]
    assert not quick(
        operator(INDEFINITE), method=method, tolerance=1e-12, max_products=20
    ).converged


def test_one_probe_knows_no_error() -> None:
    result = quick(operator(INDEFINITE), method="hutchinson", probes=1)
    assert math.isnan(result.stderr)
    assert result.interval == (0.0, math.inf)
    assert quick(operator(INDEFINITE), method="xtrace", max_products=1).method == "hutchinson"


@pytest.mark.parametrize("method", METHODS)
def test_a_nan_is_named_and_nothing_is_lost(method: str, tmp_path: Path) -> None:
    def call(op: LinearOperator, **changes: Any) -> FrobeniusNorm:
        return quick(op, method=method, max_products=24, block=4, **changes)

    interrupted(call, INDEFINITE, tmp_path / "c")


def test_kill_9_resumes_bitwise(tmp_path: Path) -> None:
    expression = (
        "frobenius_norm(op, method='xtrace', max_products=40, block=4, checkpoint=path, "
        "save_every=0, progress=seen)"
    )
    result = killed(expression, tmp_path / "c", psd=False)
    decaying = operator(matrix(0.8 ** torch.arange(N)))
    same(result, quick(decaying, method="xtrace", max_products=40, block=4))


def test_results_are_kept(tmp_path: Path) -> None:
    result = quick(operator(INDEFINITE), max_products=20)
    loaded = Result.load(result.save(tmp_path / "f.safetensors"))
    assert isinstance(loaded, FrobeniusNorm)
    same(loaded, result)


@pytest.mark.parametrize(
    ("op", "changes", "error", "message"),
    [
        (INDEFINITE, {"method": "hutch++"}, ValueError, r"unknown method 'hutch\+\+'"),
        (INDEFINITE, {"law": "cauchy"}, ValueError, "unknown law of probes"),
        (INDEFINITE, {"probes": 0}, ValueError, "expected probes >= 1, got 0"),
        (torch.ones(3, 4), {"method": "xtrace"}, ValueError, "needs a symmetric operator"),
        (torch.ones(0, 0), {}, ValueError, r"the operator is empty, of shape \(0, 0\)"),
        (torch.ones(3, 4).half(), {}, TypeError, "operators work on float32 or float64"),
    ],
)
def test_misuse_is_named(
    op: Any, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        quick(op, **changes)
