"""The trace: methods, budgets, rates, resuming and errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from curvlib.core.operator import LinearOperator
from curvlib.core.result import Result
from curvlib.estimators.intervals import mean_interval, t_quantiles
from curvlib.estimators.trace import METHODS, Trace, choose, trace
from tests.estimators.small import (
    columnwise,
    interrupted,
    killed,
    matrix,
    operator,
    same,
)

N = 90
DECAYING = matrix(0.8 ** torch.arange(N))
FLAT = matrix(torch.linspace(1.0, 3.0, N))


def quick(op: Any, **changes: Any) -> Trace:
    return trace(op, progress=False, **changes)


# ------------------------------------------------------------------------ methods
def test_what_is_known_picks_the_method() -> None:
    assert quick(operator(FLAT), max_products=40).method == "xtrace"
    assert quick(operator(FLAT, psd=True), max_products=40).method == "xnystrace"
    assert quick(operator(FLAT), max_products=7).method == "hutchinson"
    assert quick(operator(FLAT), max_products=N).method == "exact"
    assert quick(FLAT, tolerance=1e-3, max_products=N).method == "xtrace"
    large = LinearOperator(lambda V: V, (10**8, 10**8), dtype=torch.float32, symmetric=True)
    assert choose(large, None, 100, None) == "hutchinson"  # 2 x 50 x 0.4 GB would be kept
    assert choose(large, "xtrace", 100, None) == "xtrace"


def test_small_operators_are_multiplied_out() -> None:
    result = quick(FLAT)
    assert result.method == "exact"
    assert result.products == N
    assert result.value == pytest.approx(float(FLAT.trace()), rel=1e-14)
    assert result.stderr == 0.0
    assert result.interval == (result.value, result.value)
    assert quick(torch.tensor([[2.5]])).value == 2.5


@pytest.mark.parametrize("rank", [0, 1, 5, 9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", ["xtrace", "xnystrace", "hutch++"])
def test_exact_below_full_rank(method: str, dtype: torch.dtype, rank: int) -> None:
    """With more probes than the rank, nothing is left to estimate."""
    values = torch.zeros(N)
    values[:rank] = torch.arange(1.0, rank + 1.0)
    op = operator(matrix(values).to(dtype), psd=True)
    result = quick(op, method=method, probes=10)
    scale = float(values.sum())
    # The Nystrom approximation inverts a Gram matrix: rounding is amplified by its condition,
    # which is large when nine random vectors just span the range.
    amplified = {"hutch++": 40, "xtrace": 40, "xnystrace": 400}[method]
    if rank == 9 and method != "hutch++":
        amplified = 2e6 if method == "xnystrace" else 1e4
    rounding = amplified * torch.finfo(dtype).eps * scale
    assert abs(result.value - scale) <= rounding
    assert result.stderr <= rounding
    assert result.low - rounding <= scale <= result.high + rounding


def test_indefinite_low_rank_is_exact_too() -> None:
    values = torch.zeros(N)
    values[:4] = torch.tensor([3.0, -2.0, 1.0, -2.5])
    assert quick(operator(matrix(values)), probes=6, method="xtrace").value == pytest.approx(
        -0.5, abs=1e-13
    )


def test_rademacher_sees_a_diagonal_without_error() -> None:
    values = torch.randn(N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = quick(values.diag(), method="hutchinson", probes=3)
    assert result.value == pytest.approx(float(values.sum()), rel=1e-13)
    assert result.stderr < 1e-13
    sphere = quick(values.diag(), method="hutchinson", probes=3, law="sphere")
    assert sphere.stderr > 1e-3


def test_shifts_of_the_identity_are_exact_with_resphered_probes() -> None:
    op = operator(2.5 * torch.eye(N, dtype=torch.float64), psd=True)
    for method in ("xtrace", "xnystrace", "hutch++"):
        result = quick(op, method=method, max_products=30)
        assert result.value == pytest.approx(2.5 * N, rel=1e-12)
        assert result.stderr < 1e-10


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [*range(1, 14), 88, 89])
def test_any_number_of_products_is_accepted(method: str, budget: int) -> None:
    op = operator(DECAYING, psd=True)
    result = quick(op, method=method, max_products=budget)
    assert 0 < result.products <= budget
    assert budget - result.products < METHODS[method]
    assert math.isfinite(result.value)
    if len(result.samples) == 1:
        assert math.isnan(result.stderr)
        assert result.interval == (-math.inf, math.inf)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("law", ["rademacher", "gaussian", "sphere"])
def test_blocks_do_not_change_the_result(method: str, law: str) -> None:
    op = columnwise(DECAYING, psd=True)
    whole = quick(op, method=method, law=law, max_products=30, block=64, seed=3)
    for block in (1, 4, 7):
        part = quick(op, method=method, law=law, max_products=30, block=block, seed=3)
        assert part.products == whole.products
        if method == "hutchinson":
            same(part, whole)
        assert part.value == pytest.approx(whole.value, rel=1e-9)
        assert part.stderr == pytest.approx(whole.stderr, rel=1e-6)


def test_the_hutchinson_samples_are_the_quadratic_forms() -> None:
    result = quick(operator(FLAT), method="hutchinson", probes=5, law="gaussian")
    assert result.samples.shape == (5,)
    assert result.value == pytest.approx(float(result.samples.mean()), rel=1e-14)
    assert result.stderr == pytest.approx(float(result.samples.std()) / math.sqrt(5), rel=1e-12)


# -------------------------------------------------------------------------- rates
def _errors(A: torch.Tensor, method: str, budgets: list[int], **changes: Any) -> torch.Tensor:
    op, truth = operator(A, psd=method == "xnystrace"), float(A.trace())
    rows = [
        [
            quick(op, method=method, max_products=b, seed=s, block=64, **changes).value - truth
            for s in range(150)
        ]
        for b in budgets
    ]
    return torch.tensor(rows, dtype=torch.float64).square().mean(1).sqrt()


def _slope(budgets: list[int], errors: torch.Tensor) -> float:
    x = torch.tensor(budgets, dtype=torch.float64).log()
    y = errors.log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def test_hutchinson_falls_with_the_root_of_the_products() -> None:
    budgets = [8, 16, 32, 64, 128]
    for A in (FLAT, DECAYING):
        slope = _slope(budgets, _errors(A, "hutchinson", budgets))
        assert -0.58 < slope < -0.42


@pytest.mark.parametrize("method", ["hutch++", "xtrace", "xnystrace"])
def test_sketches_are_far_better_where_the_spectrum_decays(method: str) -> None:
    budgets = [12, 24, 48]
    errors = _errors(DECAYING, method, budgets)
    plain = _errors(DECAYING, "hutchinson", budgets)
    assert _slope(budgets, errors) < -1.5
    # With 12 products Hutch++ has four to sketch with, and is as good as none (within 4 %).
    few = 1 if method == "hutch++" else 0
    assert bool((errors[few:] < plain[few:]).all())
    # At least five times fewer products than Hutchinson for the same error.
    assert method == "hutch++" or float(errors[1]) < float(plain[1]) / math.sqrt(5)


def test_the_psd_method_needs_half_the_products() -> None:
    nystrom = _errors(DECAYING, "xnystrace", [12, 24])
    both = _errors(DECAYING, "xtrace", [12, 24])
    assert bool((nystrom < both).all())


# ----------------------------------------------------------------------- stopping
@pytest.mark.parametrize("method", METHODS)
def test_tolerance_stops_at_the_standard_error(method: str) -> None:
    op = operator(matrix(torch.arange(1.0, 301.0) ** -1.0), psd=True)
    result = quick(op, method=method, tolerance=0.05, max_products=290)
    assert result.converged
    assert result.stderr <= 0.05 * abs(result.value)
    assert result.products < 290
    assert len(result.samples) >= 8
    short = quick(op, method=method, tolerance=1e-7, max_products=30)
    assert not short.converged
    assert short.products > 27


def test_no_error_is_trusted_before_eight_probes() -> None:
    result = quick(torch.eye(200), method="hutchinson", tolerance=0.5)
    assert result.products == 8  # though the error is zero from the second probe on


def test_stopping_does_not_depend_on_the_block() -> None:
    op = columnwise(matrix(torch.arange(1.0, 301.0) ** -1.0))
    results = [
        quick(op, method="hutchinson", tolerance=0.05, block=b, max_products=500)
        for b in (1, 5, 64)
    ]
    assert results[0].converged
    for other in results[1:]:
        same(results[0], other)


# ------------------------------------------------------------------------- resume
@pytest.mark.parametrize("method", METHODS)
def test_a_nan_is_named_and_nothing_is_lost(method: str, tmp_path: Path) -> None:
    def call(op: LinearOperator, **changes: Any) -> Trace:
        return quick(op, method=method, max_products=24, block=4, seed=5, **changes)

    interrupted(call, DECAYING, tmp_path / "c", psd=True)


@pytest.mark.parametrize("method", METHODS)
def test_kill_9_resumes_bitwise(method: str, tmp_path: Path) -> None:
    expression = (
        f"trace(op, method={method!r}, max_products=40, block=4, checkpoint=path, "
        "save_every=0, progress=seen)"
    )
    result = killed(expression, tmp_path / "c", psd=True)
    straight = quick(operator(DECAYING, psd=True), method=method, max_products=40, block=4)
    same(result, straight)


@pytest.mark.parametrize("method", ["hutchinson", "xtrace", "xnystrace"])
def test_a_finished_run_goes_on_with_a_larger_budget(method: str, tmp_path: Path) -> None:
    op, path = operator(DECAYING, psd=True), tmp_path / "c"
    quick(op, method=method, max_products=16, block=8, checkpoint=path)
    longer = quick(op, method=method, max_products=32, block=8, checkpoint=path)
    same(longer, quick(op, method=method, max_products=32, block=8))


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    op, path = operator(DECAYING), tmp_path / "c"
    quick(op, method="xtrace", max_products=8, checkpoint=path)
    with pytest.raises(ValueError, match="was made with other settings: seed was 0 and is now 1"):
        quick(op, method="xtrace", max_products=8, checkpoint=path, seed=1)
    with pytest.raises(ValueError, match="is of another estimate"):
        quick(op, method="hutchinson", max_products=8, checkpoint=path)


def test_results_are_kept(tmp_path: Path) -> None:
    result = quick(operator(DECAYING, name="Hessian"), max_products=20)
    loaded = Result.load(result.save(tmp_path / "trace.safetensors"))
    assert isinstance(loaded, Trace)
    same(loaded, result)
    assert repr(result).startswith("Trace(value=4.9")
    assert result.name == "Hessian"


@pytest.mark.usefixtures("rng_untouched")
def test_randomness_is_the_callers() -> None:
    op = operator(FLAT)
    generator = torch.Generator().manual_seed(1)
    first = quick(op, max_products=20, generator=generator)
    second = quick(op, max_products=20, generator=generator)
    assert first.value != second.value
    again = quick(op, max_products=20, generator=torch.Generator().manual_seed(1))
    assert again.value == first.value
    assert quick(op, max_products=20).value == quick(op, max_products=20, seed=0).value


def test_progress_is_told() -> None:
    told: list[tuple[float, float | None]] = []
    trace(
        operator(FLAT),
        max_products=32,
        block=4,
        progress=lambda done, total, _: told.append((done, total)),
    )
    assert told == [(8, 32), (16, 32), (24, 32), (32, 32)]


# ---------------------------------------------------------------------- intervals
def test_intervals_of_skewed_samples_lean_with_them() -> None:
    samples = torch.distributions.Exponential(torch.tensor(1.0, dtype=torch.float64)).icdf(
        torch.linspace(0.01, 0.99, 40, dtype=torch.float64)
    )
    low, high = mean_interval(samples)
    mean = float(samples.mean())
    assert high - mean > 1.2 * (mean - low)
    low, high = mean_interval(-samples)
    assert -mean - low > 1.2 * (high + mean)
    even = torch.linspace(-1.0, 1.0, 21, dtype=torch.float64)
    low, high = mean_interval(even)
    assert low == pytest.approx(-high)
    assert high == pytest.approx(2.085963 * float(even.std()) / math.sqrt(21), rel=1e-6)


def test_student_quantiles() -> None:
    expected = torch.tensor([12.7062, 2.2622, 1.96, math.inf], dtype=torch.float64)
    assert torch.allclose(t_quantiles(torch.tensor([1.0, 9.0, 1e9, 0.0])), expected, atol=1e-4)


# ------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": "magic"}, ValueError, "unknown method 'magic'; there are hutchinson"),
        ({"law": "cauchy"}, ValueError, "unknown law of probes 'cauchy'"),
        ({"max_products": 0}, ValueError, "expected max_products >= 1, got 0"),
        ({"max_products": -3}, ValueError, "expected max_products >= 1, got -3"),
        ({"probes": 0}, ValueError, "expected probes >= 1, got 0"),
        ({"max_products": 2.0}, TypeError, "expected an int for max_products, got float"),
        ({"probes": True}, TypeError, "expected an int for probes, got bool"),
        ({"block": 0}, ValueError, "expected block >= 1, got 0"),
        ({"tolerance": 0.0}, ValueError, "expected a positive tolerance"),
        ({"tolerance": math.nan}, ValueError, "expected a positive tolerance"),
        ({"tolerance": "1%"}, TypeError, "expected a number for tolerance, got str"),
        ({"probes": 4, "max_products": 8}, ValueError, "probes= or max_products=, not both"),
        ({"seed": 1.5}, TypeError, "seed= is an int"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "not both"),
        ({"generator": 1}, TypeError, "generator= is a torch.Generator"),
        ({"method": "xnystrace"}, ValueError, "needs a positive semi-definite operator"),
    ],
)
def test_misuse_is_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quick(operator(FLAT), **changes)


def test_operators_that_have_no_trace_here() -> None:
    with pytest.raises(ValueError, match="expected a square operator"):
        quick(torch.ones(3, 4))
    with pytest.raises(ValueError, match="expected a symmetric operator"):
        quick(torch.ones(3, 3).triu())
    with pytest.raises(TypeError, match="operators work on float32 or float64"):
        quick(torch.eye(3, dtype=torch.float16))
    with pytest.raises(TypeError, match="expected a LinearOperator or a torch.Tensor"):
        quick([[1.0]])


def test_an_operator_that_is_not_psd_is_found_out() -> None:
    op = operator(matrix(torch.linspace(-1.0, 1.0, N)), psd=True)
    with pytest.raises(ValueError, match="expected a positive semi-definite operator, but"):
        quick(op, method="xnystrace", probes=12)


# ------------------------------------------------------------------------ devices
@pytest.mark.gpu
@pytest.mark.parametrize("method", [None, *METHODS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_a_gpu(method: str | None, dtype: torch.dtype, tmp_path: Path) -> None:
    A = DECAYING.to("cuda", dtype)
    op = LinearOperator(lambda V: A @ V, (N, N), dtype=dtype, device="cuda", psd=True)
    result = quick(op, method=method, max_products=60, checkpoint=tmp_path / "c")
    width = max(result.high - result.low, 1e-5)
    assert abs(result.value - float(DECAYING.trace())) < 2 * width
    same(quick(op, method=method, max_products=60, checkpoint=tmp_path / "c"), result)
