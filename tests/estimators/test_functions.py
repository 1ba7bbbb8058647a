"""Traces of functions: exact where they must be, unbiased, honest about their errors."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from curvlib.core.operator import LinearOperator
from curvlib.core.result import Result
from curvlib.estimators.eigenpairs import eigenpairs
from curvlib.estimators.function_sums import sphere_spread
from curvlib.estimators.functions import (
    FunctionTrace,
    effective_dimension,
    logdet,
    trace_of,
)
from curvlib.estimators.probes import generator_of, probes
from tests.estimators.spectra import Counted, half_tiny, matrix, network_like
from tests.programs import Program

F64 = torch.float64
N = 24
#: Spectra, positive semi-definite and indefinite ones.
SPECTRA: dict[str, Tensor] = {
    "flat": torch.linspace(1.0, 1.2, N, dtype=F64),
    "polynomial": torch.arange(1, N + 1, dtype=F64) ** -2,
    "exponential": 0.6 ** torch.arange(N, dtype=F64),
    "step": torch.cat([torch.ones(N // 4, dtype=F64), torch.full((N - N // 4,), 1e-3, dtype=F64)]),
    "indefinite": torch.linspace(-1.0, 2.0, N, dtype=F64),
}
FUNCTIONS = {"exp": torch.exp, "square": torch.square, "log": lambda x: torch.log(x + 1.5)}


def unit_probes(n: int, count: int, law: str = "sphere", seed: int = 0) -> Tensor:
    W = probes((n, count), law, generator=generator_of(None, seed), dtype=F64)
    return W / W.norm(dim=0)


def exact_trace(A: Tensor, fn: Any) -> float:
    return float(fn(torch.linalg.eigvalsh(A)).sum())


# --------------------------------------------------------------------- exactness
@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(2, 30),
    steps=st.integers(1, 8),
    law=st.sampled_from(["sphere", "rademacher"]),
    full=st.booleans(),
    block=st.integers(1, 5),
    seed=st.integers(0, 5),
)
def test_polynomials_up_to_degree_2m_minus_1_are_exact_for_each_probe(
    n: int, steps: int, law: str, full: bool, block: int, seed: int
) -> None:
    A = matrix(torch.linspace(-1.0, 1.3, n, dtype=F64), seed=seed)
    degree = 2 * min(steps, n) - 1
    found = trace_of(
        A,
        lambda x: x**degree - 2 * x ** (degree - 1),
        steps=steps,
        probes=5,
        law=law,
        block=block,
        reorthogonalize=full,
        seed=seed,
    )
    W = unit_probes(n, 5, law, seed)
    fA = torch.linalg.matrix_power(A, degree) - 2 * torch.linalg.matrix_power(A, degree - 1)
    torch.testing.assert_close(found.samples, n * (W * (fA @ W)).sum(0), rtol=1e-9, atol=1e-9 * n)
    assert found.value == pytest.approx(float(found.samples.mean()))
    if law == "rademacher":
        assert found.stderr == pytest.approx(float(found.samples.std()) / math.sqrt(5), abs=1e-12)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_with_all_steps_each_probe_gives_its_quadratic_form(spectrum: str, function: str) -> None:
    A, fn = matrix(SPECTRA[spectrum]), FUNCTIONS[function]
    found = trace_of(A, fn, steps=N, probes=3)
    values, Q = torch.linalg.eigh(A)
    W = Q.T @ unit_probes(N, 3)
    expected = N * (W.square() * fn(values)[:, None]).sum(0)
    torch.testing.assert_close(found.samples, expected, rtol=1e-9, atol=1e-9)
    assert found.quadrature_error < 1e-8 * abs(found.value)


def test_identity_and_rademacher_on_diagonals_have_no_error() -> None:
    identity = trace_of(3.0 * torch.eye(50, dtype=F64), torch.exp, probes=4)
    assert identity.value == pytest.approx(50 * math.exp(3.0), rel=1e-13)
    assert identity.stderr < 1e-10
    assert identity.quadrature_error == 0.0
    assert identity.products == 4, "the first step finds the invariant subspace"
    diagonal = torch.linspace(0.5, 2.0, 30, dtype=F64).diag()
    found = trace_of(diagonal, torch.log, law="rademacher", probes=3)
    assert found.value == pytest.approx(float(diagonal.diagonal().log().sum()), rel=1e-12)
    assert found.stderr < 1e-9


def test_deflated_eigenvalues_are_exact_and_the_rest_is_probed() -> None:
    values = network_like(150)
    A = matrix(values)
    pairs = eigenpairs(A, 10, tolerance=1e-10)
    plain, deflated = (trace_of(A, torch.square, deflate=d, seed=2) for d in (None, pairs))
    assert deflated.exact == pytest.approx(float(values[:10].square().sum()), rel=1e-9)
    truth = float(values.square().sum())
    assert abs(plain.value - truth) < 5 * plain.stderr
    assert abs(deflated.value - truth) < 5 * deflated.stderr
    assert deflated.stderr < 0.02 * plain.stderr
    assert deflated.nodes.max() < 1.0, "no probe sees an outlier"


def test_pairs_that_did_not_converge_are_not_used() -> None:
    A = matrix(network_like(100))
    with pytest.warns(RuntimeWarning, match="did not converge"):
        pairs = eigenpairs(A, 5, max_products=18)
    count = int(pairs.converged.sum())
    assert trace_of(A, torch.exp, deflate=pairs).settings["deflate"] == count < 5


# ------------------------------------------------------------------ honest errors
def _runs(A: Tensor, fn: Any, count: int, **options: Any) -> list[FunctionTrace]:
    return [trace_of(A, fn, seed=seed, **options) for seed in range(count)]


@pytest.mark.parametrize(
    ("spectrum", "count"), [*((name, 8) for name in SPECTRA), ("exponential", 2)]
)
def test_unbiased_and_intervals_cover(spectrum: str, count: int) -> None:
    """1,000 seeds: a z-test of the mean, and 95 % intervals that cover in 92-98 % of runs."""
    A = matrix(SPECTRA[spectrum])
    truth = exact_trace(A, torch.exp)
    runs = _runs(A, torch.exp, 1000, steps=6, probes=count)
    assert max(r.quadrature_error for r in runs) < 0.05 * min(r.stderr for r in runs) + 1e-9
    values = torch.tensor([r.value for r in runs], dtype=F64)
    z = float((values.mean() - truth) / (values.std() / math.sqrt(1000)))
    assert abs(z) < 4.0
    covered = sum(r.interval[0] <= truth <= r.interval[1] for r in runs)
    assert 920 <= covered <= 980
    # The standard errors are, in the root mean square, the spread that there is.
    claimed = torch.tensor([r.stderr for r in runs], dtype=F64).square().mean().sqrt()
    assert 0.93 < float(claimed / values.std()) < 1.07


def test_rademacher_intervals_cover() -> None:
    """Their variance is unknown to the rules: scatter, and Student's t."""
    A = matrix(SPECTRA["indefinite"])
    truth = exact_trace(A, torch.exp)
    runs = _runs(A, torch.exp, 1000, steps=6, probes=8, law="rademacher")
    values = torch.tensor([r.value for r in runs], dtype=F64)
    assert abs(float(values.mean()) - truth) < 4 * float(values.std()) / math.sqrt(1000)
    assert 920 <= sum(r.interval[0] <= truth <= r.interval[1] for r in runs) <= 980


@pytest.mark.parametrize("n", [1, 2, 7])
def test_the_spread_of_sphere_probes_is_that_of_their_law(n: int) -> None:
    """Variance and skewness from the rules, against many draws."""
    values = torch.linspace(-1.0, 1.0, n, dtype=F64).exp() ** 2
    squares = unit_probes(n, 200_000).square().T
    stderr, skewness = sphere_spread(values.expand(squares.shape), squares, n)
    samples = n * (squares @ values)
    if n == 1:
        assert stderr < 1e-12
        return
    spread = samples - samples.mean()
    assert stderr * math.sqrt(len(samples)) == pytest.approx(float(spread.std()), rel=0.01)
    actual = float((spread**3).mean() / spread.std() ** 3)
    assert skewness * math.sqrt(len(samples)) == pytest.approx(actual, abs=0.05)


def test_unbiased_in_the_complement_of_deflated_pairs() -> None:
    A = matrix(SPECTRA["exponential"])
    pairs = eigenpairs(A, 3, tolerance=1e-12)
    truth = exact_trace(A, torch.sqrt)
    runs = _runs(A, lambda x: x.clamp_min(0).sqrt(), 400, steps=N, probes=4, deflate=pairs)
    values = torch.tensor([r.value for r in runs], dtype=F64)
    assert abs(float(values.mean()) - truth) < 4 * float(values.std()) / math.sqrt(400)


def test_the_error_falls_with_the_square_root_of_the_probes() -> None:
    A = matrix(half_tiny(60))
    truth = exact_trace(A, torch.sin)

    def rms(count: int) -> float:
        runs = _runs(A, torch.sin, 60, steps=10, probes=count, block=count)
        return math.sqrt(sum((r.value - truth) ** 2 for r in runs) / 60)

    counts = torch.tensor([4.0, 16.0, 64.0]).log()
    errors = torch.tensor([rms(4), rms(16), rms(64)]).log()
    slope = float(
        ((counts - counts.mean()) * errors).sum() / (counts - counts.mean()).square().sum()
    )
    assert -0.65 < slope < -0.35


@pytest.mark.parametrize("steps", [3, 5, 8, 12])
def test_the_quadrature_error_is_an_upper_estimate(steps: int) -> None:
    A = matrix(half_tiny(100))
    long = logdet(A, 0.05, steps=100, probes=6)
    short = logdet(A, 0.05, steps=steps, probes=6)
    actual = float((short.samples - long.samples).abs().mean())
    assert 0.5 * actual <= short.quadrature_error <= 1e3 * actual + 1e-9
    assert long.quadrature_error < 1e-8


def test_one_rademacher_probe_has_no_standard_error_and_one_step_no_quadrature_error() -> None:
    A = matrix([1.0, 2.0, 3.0])
    one = trace_of(A, torch.exp, probes=1, law="rademacher")
    assert math.isnan(one.stderr)
    assert one.interval == (-math.inf, math.inf)
    assert math.isnan(trace_of(A, torch.exp, steps=1).quadrature_error)


# -------------------------------------------------------------- logdet and dimension
@pytest.mark.parametrize("damping", [1e-2, 1.0])
@pytest.mark.parametrize("spectrum", [s for s in SPECTRA if s != "indefinite"])
def test_logdet_and_effective_dimension(spectrum: str, damping: float) -> None:
    A = matrix(SPECTRA[spectrum])
    values = torch.linalg.eigvalsh(A)
    for function, truth in (
        (logdet, torch.log(values + damping).sum()),
        (effective_dimension, (values / (values + damping)).sum()),
    ):
        found = function(A, damping, steps=N, probes=300)
        assert abs(found.value - float(truth)) < 4 * found.stderr + 1e-9 * abs(float(truth))
        assert found.interval[0] < found.value < found.interval[1] or found.stderr < 1e-12
        assert found.method == "stochastic Lanczos quadrature"
    assert logdet(A, damping).function == f"log(x + {damping:g})"
    assert logdet(matrix(SPECTRA["flat"])).function == "log(x)"
    assert effective_dimension(A, damping).function == f"x / (x + {damping:g})"


def test_effective_dimension_counts_directions() -> None:
    found = effective_dimension(matrix(half_tiny(200)), 1e-3, steps=60, probes=40)
    truth = float((half_tiny(200) / (half_tiny(200) + 1e-3)).sum())
    assert abs(found.value - truth) < 4 * found.stderr
    assert 95 < truth < 105, "half of the eigenvalues are far above the damping"


def test_negative_eigenvalues_under_a_log_say_how_many_how_large_and_what_to_do() -> None:
    values = torch.cat(
        [torch.linspace(1.0, 2.0, 50, dtype=F64), -torch.tensor([0.5, 0.3]).double()]
    )
    A = matrix(values)
    with pytest.raises(
        ValueError,
        match=r"log\(x \+ 0.1\) of <matrix: .*> is not defined: \d+ of \d+ Ritz values \(they "
        r"stand for about .* eigenvalues\) are at most -0.1, down to -0\.\d+. Pass a damping= "
        r"above 0\.\d+ .* or an operator without negative eigenvalues, such as curvlib.ggn",
    ):
        logdet(A, 0.1, steps=30)
    with pytest.raises(ValueError, match=r"Ritz values .* are negative, down to -"):
        logdet(A, steps=30)
    with pytest.raises(ValueError, match=r"x / \(x \+ 0.2\) .*at most -0.2, down to -"):
        effective_dimension(A, 0.2, steps=30)
    found = logdet(A, 0.6, steps=52, probes=60)
    assert abs(found.value - float((values + 0.6).log().sum())) < 4 * found.stderr


def test_the_number_of_negative_eigenvalues_is_right_on_average() -> None:
    """The message's estimate counts eigenvalues, not Ritz values."""
    A = matrix(torch.cat([torch.ones(60, dtype=F64), -torch.ones(20, dtype=F64)]))
    with pytest.raises(ValueError, match="about (1[5-9]|2[0-5]).* eigenvalues"):
        logdet(A, 0.1, probes=50, block=50)


def test_negative_outliers_are_found_too() -> None:
    A = matrix(torch.cat([torch.linspace(1.0, 2.0, 30, dtype=F64), -torch.ones(1, dtype=F64)]))
    pairs = eigenpairs(A, 1, which="SA", tolerance=1e-10)
    with pytest.raises(ValueError, match=r"about 1 eigenvalues\) are at most -0.1, down to -1"):
        logdet(A, 0.1, deflate=pairs)


def test_what_rounding_made_negative_is_zero_and_counted() -> None:
    values = torch.cat([torch.ones(20), torch.zeros(20)])
    A = matrix(values).float() - 2e-7 * torch.eye(40)  # rounding of float32, made sure of
    A = 0.5 * (A + A.T)
    found = logdet(A, 1e-8, steps=10, probes=8)
    assert found.clipped > 0
    truth = 20 * math.log(1e-8)
    assert abs(found.value - truth) < 5 * found.stderr + 1e-3 * abs(truth)
    with pytest.raises(ValueError, match=r"\d+ of \d+ Ritz values are zero up to rounding.*posit"):
        logdet(A)
    assert logdet(matrix(torch.ones(5)), 0.1).clipped == 0


# ------------------------------------------------------------------ budget, tolerance
def test_products_are_block_products_of_the_probes() -> None:
    counted = Counted(matrix(half_tiny(120)))
    found = trace_of(counted.op, torch.exp, steps=10, probes=7, block=3)
    assert counted.columns == [3] * 10 + [3] * 10 + [1] * 10
    assert found.products == counted.products == 70
    assert found.samples.shape == (7,)
    assert found.nodes.shape == (7, 10)
    together = trace_of(matrix(half_tiny(120)), torch.exp, steps=10, probes=7)
    torch.testing.assert_close(together.samples, found.samples, rtol=1e-9, atol=1e-9)


def test_max_products_is_kept() -> None:
    counted = Counted(matrix(half_tiny(120)))
    found = trace_of(counted.op, torch.exp, steps=10, probes=8, max_products=57)
    assert found.samples.numel() == 5
    assert counted.products == found.products == 50
    with pytest.raises(ValueError, match="expected max_products >= 10, which is one probe of 10"):
        trace_of(counted.op, torch.exp, steps=10, max_products=9)


@pytest.mark.parametrize("tolerance", [0.1, 0.01])
def test_tolerance_stops_at_the_standard_error(tolerance: float) -> None:
    counted = Counted(matrix(half_tiny(400)))
    found = trace_of(counted.op, torch.sqrt, tolerance=tolerance, steps=60)
    assert found.converged
    assert found.stderr <= tolerance * found.value
    assert found.quadrature_error <= tolerance * found.value
    assert counted.products == found.products
    truth = float(half_tiny(400).sqrt().sum())
    assert abs(found.value - truth) <= 4 * found.stderr + found.quadrature_error


def test_tolerance_shortens_the_recurrences() -> None:
    A = matrix(SPECTRA["flat"])
    found = trace_of(A, torch.exp, tolerance=1e-2, steps=20)
    assert found.products <= 5 * 8, "a few steps show that fewer would do"
    assert found.converged


def test_a_tolerance_that_is_not_reached_is_said() -> None:
    A = matrix(half_tiny(100))
    with pytest.warns(RuntimeWarning, match=r"did not reach tolerance 1e-06.*more max_products="):
        found = trace_of(A, torch.sqrt, tolerance=1e-6, max_products=500, steps=20)
    assert found.converged is False
    assert found.products <= 500


# ------------------------------------------------------------------------ the rest
@pytest.mark.usefixtures("rng_untouched")
def test_seeds_and_generators_repeat() -> None:
    A = matrix(network_like(40))
    a, b, c = (trace_of(A, torch.exp, seed=s) for s in (1, 1, 2))
    assert torch.equal(a.samples, b.samples)
    assert not torch.equal(a.samples, c.samples)
    g = [trace_of(A, torch.exp, generator=torch.Generator().manual_seed(4)) for _ in range(2)]
    assert torch.equal(g[0].samples, g[1].samples)


def test_float32_products() -> None:
    A = matrix(half_tiny(200))
    found = trace_of(A.float(), torch.exp, probes=30)
    assert found.samples.dtype == F64
    assert abs(found.value - exact_trace(A, torch.exp)) < 4 * found.stderr


def test_saved_and_loaded(tmp_path: Path) -> None:
    found = logdet(matrix(half_tiny(50)), 0.1)
    again = Result.load(found.save(tmp_path / "logdet.safetensors"))
    assert isinstance(again, FunctionTrace)
    assert torch.equal(again.samples, found.samples)
    assert again.interval == found.interval
    assert again.settings == found.settings
    assert f"value={found.value:.5g} ± {found.stderr:.2g}" in repr(again)


def test_arguments_that_do_not_fit() -> None:
    A = matrix([3.0, 2.0, 1.0])
    everything = eigenpairs(A, 3)
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "expected steps >= 1, got 0", {"steps": 0}),
        (ValueError, "expected probes >= 1, got -1", {"probes": -1}),
        (ValueError, "expected max_products >= 1, got 0", {"max_products": 0}),
        (ValueError, "expected block >= 1, got 0", {"block": 0}),
        (TypeError, "expected an int for steps, got float", {"steps": 3.0}),
        (TypeError, "expected an int for probes, got bool", {"probes": True}),
        (ValueError, "expected a positive tolerance, got 0", {"tolerance": 0.0}),
        (ValueError, "expected a positive tolerance, got nan", {"tolerance": math.nan}),
        (
            ValueError,
            "unknown law of probes 'gaussian'; there are sphere, rademacher",
            {"law": "gaussian"},
        ),
        (TypeError, "expected Eigenpairs for deflate, got Tensor", {"deflate": A}),
        (ValueError, "all eigenpairs are deflated", {"deflate": everything}),
        (
            ValueError,
            "deflate= needs law='sphere'",
            {"deflate": eigenpairs(A, 1), "law": "rademacher"},
        ),
    ]
    for kind, text, options in cases:
        with pytest.raises(kind, match=text):
            trace_of(A, torch.exp, **options)
    with pytest.raises(TypeError, match="expected a function of a tensor .* got float"):
        trace_of(A, 2.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected fn to return a tensor, got float"):
        trace_of(A, lambda x: 1.0)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match=r"one value for each eigenvalue, of shape \[8, 3\], got"):
        trace_of(A, lambda x: x.sum())
    with pytest.raises(ValueError, match=r"log is not finite at 8 of 24 Ritz values of <m"):
        trace_of(matrix([3.0, 2.0, -1.0]), torch.log)
    with pytest.raises(ValueError, match="expected a finite damping, at least 0, got -1"):
        logdet(A, -1.0)
    with pytest.raises(ValueError, match="expected a finite damping, positive, got 0"):
        effective_dimension(A, 0.0)
    with pytest.raises(ValueError, match="expected a finite damping, at least 0, got nan"):
        logdet(A, math.nan)
    with pytest.raises(ValueError, match=r"use \(A \+ A.T\) \* 0.5"):
        logdet(LinearOperator(lambda V: V, (2, 2), dtype=F64), 1.0)


@pytest.mark.parametrize("at", [1, 7, 23, 41])
def test_products_that_are_not_finite_name_the_step_and_lose_nothing(
    tmp_path: Path, at: int
) -> None:
    counted = Counted(matrix(network_like(80)), name="Hessian")
    options: dict[str, Any] = {"steps": 8, "probes": 6, "block": 2}
    straight = trace_of(counted.op, torch.exp, **options)
    counted.columns.clear()
    counted.fail_at = at
    path = tmp_path / "c"
    with pytest.raises(FloatingPointError, match=r"product of step \d with <Hessian: .*NaN"):
        trace_of(counted.op, torch.exp, **options, checkpoint=path, save_every=1e9)
    counted.fail_at = None
    counted.columns.clear()
    result = trace_of(counted.op, torch.exp, **options, checkpoint=path)
    assert len(counted.columns) == 24 - (at - 1) // 2
    assert torch.equal(result.samples, straight.samples)
    assert result.products == straight.products


# ---------------------------------------------------------------------- resumed runs
RUNS: dict[str, dict[str, Any]] = {
    "rounds": {"steps": 10, "probes": 9, "block": 4},
    "three vectors": {"steps": 10, "probes": 4, "block": 3, "reorthogonalize": False},
    "tolerance": {"steps": 40, "tolerance": 0.04},
}


def run_of(name: str, op: LinearOperator | Tensor, **options: Any) -> FunctionTrace:
    return logdet(op, 0.01, **RUNS[name], **options)


class _StopError(Exception):
    pass


@pytest.mark.parametrize("name", RUNS)
def test_stopped_in_every_product(name: str, tmp_path: Path) -> None:
    A, path = matrix(half_tiny(90)), tmp_path / "c"
    counted = Counted(A)
    straight = run_of(name, counted.op)
    ended = None
    for _ in range(len(counted.columns)):
        last = Counted(A)
        product = last.op._product

        def once(V: Tensor, product: Any = product, last: Counted = last) -> Tensor:
            if last.columns:
                raise _StopError
            return product(V)

        last.op._product = once
        try:
            ended = run_of(name, last.op, checkpoint=path, save_every=1e9)
        except _StopError:
            continue
    assert ended is not None, "each call made one step"
    assert torch.equal(ended.samples, straight.samples)
    assert ended.products == straight.products
    idle = Counted(A)
    assert torch.equal(run_of(name, idle.op, checkpoint=path).samples, straight.samples)
    assert idle.columns == [], "a finished run returns at once"


SCRIPT = """
import os
from tests.estimators.spectra import Counted, half_tiny, matrix
from tests.estimators.test_functions import run_of

counted = Counted(matrix(half_tiny(90)))
left = [{blocks}]
product = counted.op._product

def killing(V):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), 9)
    return product(V)

counted.op._product = killing
run_of({name!r}, counted.op, checkpoint={path!r}, save_every=0.0)
"""


@pytest.mark.parametrize(("name", "blocks"), [("rounds", 14), ("tolerance", 21)])
def test_kill_9(name: str, blocks: int, tmp_path: Path) -> None:
    path = tmp_path / "c"
    script = SCRIPT.format(name=name, blocks=blocks, path=str(path))
    ended = Program("-c", script).finish()
    assert ended.code == -signal.SIGKILL, ended.error
    counted, straight = (Counted(matrix(half_tiny(90))) for _ in range(2))
    resumed = run_of(name, counted.op, checkpoint=path)
    expected = run_of(name, straight.op)
    assert torch.equal(resumed.samples, expected.samples)
    assert resumed.value == expected.value
    assert resumed.stderr == expected.stderr
    assert len(counted.columns) == len(straight.columns) - blocks, "nothing was done twice"


def test_after_negative_eigenvalues_a_larger_damping_goes_on(tmp_path: Path) -> None:
    counted, path = Counted(matrix(SPECTRA["indefinite"])), tmp_path / "c"
    options: dict[str, Any] = {"steps": 12, "probes": 4, "checkpoint": path, "save_every": 1e9}
    with pytest.raises(ValueError, match="is not defined"):
        logdet(counted.op, 0.9, **options)
    made = len(counted.columns)
    assert 1 < made < 12, "found as soon as it shows"
    counted.columns.clear()
    found = logdet(counted.op, 1.5, **options)
    assert len(counted.columns) == 12 - made + 1
    straight = logdet(matrix(SPECTRA["indefinite"]), 1.5, steps=12, probes=4)
    torch.testing.assert_close(found.samples, straight.samples)


def test_checkpoints_know_the_function_where_it_matters(tmp_path: Path) -> None:
    A, path = matrix(half_tiny(60)), tmp_path / "c"
    trace_of(A, torch.exp, checkpoint=path)
    other = Counted(A)
    trace_of(other.op, torch.sqrt, checkpoint=path)
    assert other.columns == [], "the same products serve another function"
    with pytest.raises(ValueError, match="steps was 32 and is now 16"):
        trace_of(A, torch.exp, steps=16, checkpoint=path)
    trace_of(A, lambda x: x + 1, tolerance=0.5, checkpoint=tmp_path / "d")
    with pytest.raises(ValueError, match="is of another problem"):
        trace_of(A, lambda x: x + 2, tolerance=0.5, checkpoint=tmp_path / "d")


def test_progress_says_how_much_there_is_to_do() -> None:
    seen: list[tuple[float, float | None, str]] = []
    A = matrix(half_tiny(90))
    trace_of(A, torch.exp, steps=5, probes=4, block=2, progress=lambda *a: seen.append(a))
    assert seen[-1][:2] == (20, 20)
    seen.clear()
    trace_of(A, torch.sqrt, tolerance=0.03, progress=lambda *a: seen.append(a))
    assert "error " in seen[-1][2]
    assert all(total is not None and done <= total for done, total, _ in seen)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    A = matrix(half_tiny(200)).cuda()
    found = logdet(A, 0.1, deflate=eigenpairs(A, 5), probes=20)
    truth = float((half_tiny(200) + 0.1).log().sum())
    assert abs(found.value - truth) < 5 * found.stderr + found.quadrature_error
