"""Spectral densities: exactness of the quadrature, known laws, and honest errors."""

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
from curvlib.core.result import Result
from curvlib.estimators.density import Density, density
from curvlib.estimators.eigenpairs import eigenpairs
from curvlib.estimators.probes import generator_of, probes
from tests.estimators.spectra import Counted, half_tiny, matrix, network_like

F64 = torch.float64
F32 = torch.float32


def _probes(n: int, count: int, law: str = "sphere", seed: int = 0) -> Tensor:
    """The probes of a run, of norm one."""
    W = probes((n, count), law, generator=generator_of(None, seed), dtype=F64)
    return W / W.norm(dim=0)


# ---------------------------------------------------------------- the quadrature
@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    steps=st.integers(1, 12),
    law=st.sampled_from(["sphere", "rademacher"]),
    full=st.booleans(),
    seed=st.integers(0, 10),
)
def test_gauss_quadrature_is_exact(n: int, steps: int, law: str, full: bool, seed: int) -> None:
    A = matrix(torch.linspace(-1.0, 1.0, n, dtype=F64) if n > 1 else [0.7], seed=seed)
    result = density(A, steps=steps, probes=3, law=law, reorthogonalize=full, seed=seed)
    length = min(steps, n)
    assert result.nodes.shape == result.weights.shape == (3, length)
    torch.testing.assert_close(result.weights.sum(1), torch.ones(3, dtype=F64))
    for probe, v in enumerate(_probes(n, 3, law, seed).T):
        power = v.clone()
        for degree in range(2 * length):
            moment = (result.weights[probe] * result.nodes[probe] ** degree).sum()
            torch.testing.assert_close(moment, v @ power, rtol=1e-9, atol=1e-11)
            power = A @ power


def test_products_are_steps_times_probes_in_blocks() -> None:
    for deflate in (False, True):
        counted = Counted(matrix(half_tiny(150)))
        pairs = eigenpairs(counted.op, 5) if deflate else None
        counted.columns.clear()
        result = density(counted.op, steps=20, probes=3, deflate=pairs)
        assert counted.columns == [3] * 20
        assert result.products == 60


def test_probes_that_are_exhausted_are_not_multiplied() -> None:
    """Probe by probe, the recurrence ends with the invariant subspace: here of dimension 4."""
    counted = Counted(matrix([4.0] * 5 + [2.0] * 5 + [1.0] * 5 + [-1.0] * 5))
    result = density(counted.op, steps=15, probes=2)
    assert len(counted.columns) <= 6
    weights = result.weights.sum(1)
    torch.testing.assert_close(weights, torch.ones(2, dtype=F64))
    used = result.nodes[result.weights > 1e-9].tolist()
    assert all(min(abs(node - value) for value in (4, 2, 1, -1)) < 1e-9 for node in used)


# --------------------------------------------------------------------- known laws
def _distance(result: Density, cdf: Any) -> float:
    return float((result.cdf - cdf(result.grid)).abs().max())


def test_goe_gives_the_semicircle() -> None:
    n = 800
    G = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=F64)
    A = (G + G.T) / math.sqrt(2 * n)

    def cdf(x: Tensor) -> Tensor:
        x = x.clamp(-2, 2)
        return 0.5 + (x * (4 - x * x).sqrt() / 4 + torch.asin(x / 2)) / math.pi

    result = density(A, steps=40, probes=4)
    assert _distance(result, cdf) < 0.015
    assert abs(result.mass(-0.5, 0.5)[0] - 0.3150) < 0.01
    inside = result.grid.abs() < 1.6
    law = (4 - result.grid**2).clamp_min(0).sqrt() / (2 * math.pi)
    # Four standard deviations of a density of 0.32 in kernels 0.2 wide, from n * 4 samples.
    assert (result.density - law)[inside].abs().max() < 0.05


def test_wishart_gives_marchenko_pastur() -> None:
    n, ratio = 600, 0.25
    X = torch.randn(n, int(n / ratio), generator=torch.Generator().manual_seed(1), dtype=F64)
    A = X @ X.T * (ratio / n)
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    fine = torch.linspace(low, high, 20_001, dtype=F64)
    law = ((high - fine) * (fine - low)).clamp_min(0).sqrt() / (2 * math.pi * ratio * fine)
    mass = torch.cat([torch.zeros(1, dtype=F64), torch.cumulative_trapezoid(law, fine)])

    def cdf(x: Tensor) -> Tensor:
        at = torch.searchsorted(fine, x.clamp(low, high)).clamp_max(len(fine) - 1)
        return mass[at]

    assert _distance(density(A, steps=40, probes=4), cdf) < 0.015


def test_the_cdf_is_that_of_the_eigenvalues() -> None:
    values = half_tiny(400)
    result = density(matrix(values), steps=60, probes=6, deflate=eigenpairs(matrix(values), 10))
    near = result.grid[(result.grid > 0.02) & (result.grid < 0.45)]
    truth = (values[None] <= near[:, None]).double().mean(1)
    cdf = result.cdf[(result.grid > 0.02) & (result.grid < 0.45)]
    assert (cdf - truth).abs().max() < 0.04
    assert (result.cdf.diff() >= -1e-12).all()
    assert abs(result.mass(-math.inf, 1e-3)[0] - 0.5) < 4 * 0.5 / math.sqrt(6 * 400)


# -------------------------------------------------------------------- honest errors
def test_the_trace_is_within_its_error() -> None:
    A = matrix(network_like(200))
    truth, scores = float(A.trace()), []
    for seed in range(60):
        result = density(A, steps=3, probes=8, seed=seed)
        scores.append((result.trace - truth) / result.trace_stderr)
    z = torch.tensor(scores)
    # Student's t with 7 degrees of freedom has variance 1.4 (of 60 draws, ± 0.45 or so).
    assert abs(float(z.mean())) < 4 * 1.2 / math.sqrt(60)
    assert 0.6 < float(z.std()) < 2.0


def test_rademacher_probes_see_a_diagonal_exactly() -> None:
    diagonal = torch.linspace(-1.0, 3.0, 77, dtype=F64)
    op = LinearOperator(lambda V: diagonal[:, None] * V, (77, 77), dtype=F64, symmetric=True)
    result = density(op, steps=5, probes=2, law="rademacher")
    assert result.trace == pytest.approx(float(diagonal.sum()), rel=1e-12)
    assert result.trace_stderr < 1e-10


def test_the_band_covers_the_mean_density() -> None:
    A = matrix(torch.linspace(-1.0, 1.0, 60, dtype=F64))
    grid = torch.linspace(-0.8, 0.8, 41, dtype=F64)
    truth = density(A, steps=20, probes=400, seed=1).on(grid, width=0.1)[0]
    inside = []
    for seed in range(2, 22):
        mean, stderr = density(A, steps=20, probes=10, seed=seed).on(grid, width=0.1)
        inside.append(((mean - truth).abs() <= 2.262 * stderr).double().mean())  # t(9), 95 %
    assert 0.88 < float(torch.stack(inside).mean()) < 1.0


def test_one_probe_has_no_standard_error() -> None:
    result = density(matrix([1.0, 2.0, 3.0]), probes=1)
    assert math.isnan(result.trace_stderr)
    assert math.isnan(result.mass_near_zero_stderr)
    assert result.stderr.isnan().all()
    assert not result.density.isnan().any()


# ----------------------------------------------------------- normalization, deflation
@pytest.mark.parametrize("psd", [False, True])
@pytest.mark.parametrize("width", [None, 0.05])
@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("values", [network_like(120), half_tiny(120)], ids=["network", "tiny"])
def test_the_density_integrates_to_the_mass_of_the_bulk(
    values: Tensor, k: int, width: float | None, psd: bool
) -> None:
    if psd:
        values = values.abs()
    op = Counted(matrix(values), psd=psd).op
    pairs = eigenpairs(op, k) if k else None
    result = density(op, steps=30, probes=2, deflate=pairs, width=width)
    bulk = 1 - k / 120
    tolerance = 1e-6 if width is None or not psd else 1e-3
    assert float(torch.trapezoid(result.density, result.grid)) == pytest.approx(bulk, abs=tolerance)
    torch.testing.assert_close(result.weights.sum(1), torch.full((2,), bulk, dtype=F64))
    assert float(result.cdf[-1]) == pytest.approx(bulk, abs=1e-6), "outliers lie beyond the grid"
    assert result.mass()[0] == pytest.approx(1.0)
    if psd:
        assert result.grid[0] >= 0.0
    grid, per_decade, _ = result.on_symlog(4000)
    t = result._turn()
    axis = (grid / (2 * t)).asinh() / math.log(10)
    if width is None:
        assert float(torch.trapezoid(per_decade, axis)) == pytest.approx(bulk, abs=2e-3)


def test_deflated_outliers_are_exact() -> None:
    values = network_like(300)
    A = matrix(values)
    pairs = eigenpairs(A, 10)
    result = density(A, steps=30, probes=3, deflate=pairs)
    assert torch.equal(result.outliers, pairs.values)
    assert torch.equal(result.outlier_residuals, pairs.residuals)
    assert result.nodes.max() < 0.5, "no node strays to an outlier"
    assert result.grid.max() < 1.0
    # The outliers' part of the trace has no error: what is left is the bulk's.
    plain = density(A, steps=30, probes=3)
    assert result.trace_stderr < 0.1 * plain.trace_stderr
    assert abs(result.trace - float(A.trace())) < 5 * result.trace_stderr
    assert result.norm == pytest.approx(10.0)
    assert result.mass(1.0)[0] == pytest.approx(10 / 300)


def test_pairs_that_did_not_converge_are_not_deflated() -> None:
    A = matrix(network_like(100))
    with pytest.warns(RuntimeWarning, match="did not converge"):
        pairs = eigenpairs(A, 5, max_products=18)
    count = int(pairs.converged.sum())
    assert 0 <= count < 5
    result = density(A, steps=10, deflate=pairs)
    assert result.outliers.numel() == count
    assert float(result.weights[0].sum()) == pytest.approx(1 - count / 100)


# ------------------------------------------------------------------------ edge cases
def test_tiny_and_degenerate_operators() -> None:
    one = density(matrix([3.0]))
    assert one.nodes.flatten().tolist() == pytest.approx([3.0, 3.0])
    assert one.trace == pytest.approx(3.0)
    assert one.products == 2
    zero = density(torch.zeros(9, 9, dtype=F64), steps=5)
    assert zero.products == 2
    assert zero.trace == 0.0
    assert zero.norm == 0.0
    assert zero.mass_near_zero == pytest.approx(1.0)
    identity = density(torch.eye(9, dtype=F64), steps=5)
    assert identity.trace == pytest.approx(9.0)
    for result in (one, zero, identity):
        assert float(torch.trapezoid(result.density, result.grid)) == pytest.approx(1.0)
        assert float(result.cdf[0]) == pytest.approx(0.0, abs=1e-6)
        assert float(result.cdf[-1]) == pytest.approx(1.0)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_scaling_changes_nothing_but_the_scale(scale: float, dtype: torch.dtype) -> None:
    A = matrix(network_like(150)).to(dtype)
    B = (A.to(F64) * scale).to(dtype)
    a, b = density(A, steps=15), density(B, steps=15)
    loose = 1e-4 if dtype == F32 else 1e-9
    torch.testing.assert_close(b.nodes / scale, a.nodes, rtol=loose, atol=loose)
    torch.testing.assert_close(b.density * scale, a.density, rtol=0.05, atol=1e-3)
    assert b.trace / scale == pytest.approx(a.trace, rel=1e-3)


def test_float32_agrees_with_float64() -> None:
    A = matrix(half_tiny(300))
    single, double = density(A.to(F32), probes=3), density(A, probes=3)
    assert single.nodes.dtype == F64
    grid = torch.linspace(-0.5, 10.5, 200, dtype=F64)
    a, b = single.on(grid, width=0.3)[0], double.on(grid, width=0.3)[0]
    # Other random numbers: a statistical tolerance, for the mass of each kernel.
    assert (a - b).abs().max() < 6 * float(double.on(grid, width=0.3)[1].max())
    assert abs(single.mass_near_zero - 0.5) < 0.1


def test_without_reorthogonalization_ghosts_leave_the_density_as_it_is() -> None:
    A = matrix(network_like(300))
    full = density(A, steps=120, probes=2)
    cheap = density(A, steps=120, probes=2, reorthogonalize=False)
    ghosts = (cheap.nodes[0] > 9.5).sum()
    assert ghosts > 1, "there are ghosts of the largest eigenvalue"
    assert (full.nodes[0] > 9.5).sum() == 1
    grid = torch.linspace(-1.0, 11.0, 300, dtype=F64)
    a, b = full.on(grid, width=0.2)[0], cheap.on(grid, width=0.2)[0]
    assert (a - b).abs().max() < 1e-3 * float(a.max())
    assert cheap.trace == pytest.approx(full.trace)


@pytest.mark.usefixtures("rng_untouched")
def test_a_seed_repeats() -> None:
    A = matrix(network_like(60))
    first, second, other = (density(A, steps=10, seed=s) for s in (3, 3, 4))
    assert torch.equal(first.nodes, second.nodes)
    assert torch.equal(first.density, second.density)
    assert not torch.equal(first.nodes, other.nodes)
    more = density(A, steps=10, probes=5, seed=3)
    torch.testing.assert_close(more.nodes[:2], first.nodes, rtol=1e-9, atol=1e-9)


# --------------------------------------------------------------------------- errors
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("at", [1, 4, 7, 12])
def test_products_that_are_not_finite_name_the_step_and_lose_nothing(
    tmp_path: Path, at: int, full: bool
) -> None:
    counted = Counted(matrix(network_like(80)), name="Hessian")
    options: dict[str, Any] = {"steps": 8, "probes": 2, "reorthogonalize": full}
    straight = density(counted.op, **options)
    counted.columns.clear()
    counted.fail_at = at
    path = tmp_path / "c"
    step = (at + 1) // 2
    with pytest.raises(FloatingPointError, match=rf"product of step {step} with <Hessian: .*NaN"):
        density(counted.op, **options, checkpoint=path, save_every=1e9)
    counted.fail_at = None
    counted.columns.clear()
    result = density(counted.op, **options, checkpoint=path)
    assert len(counted.columns) == 8 - step + 1
    assert torch.equal(result.nodes, straight.nodes)
    assert torch.equal(result.weights, straight.weights)


def test_arguments_that_do_not_fit() -> None:
    A = matrix([3.0, 2.0, 1.0])
    everything = eigenpairs(A, 3)
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "expected steps >= 1, got 0", {"steps": 0}),
        (ValueError, "expected probes >= 1, got 0", {"probes": 0}),
        (ValueError, "expected points >= 32, got 3", {"points": 3}),
        (TypeError, "expected an int for steps, got float", {"steps": 3.0}),
        (ValueError, "expected law='sphere' or 'rademacher', got 'gaussian'", {"law": "gaussian"}),
        (ValueError, "expected a positive number for width, got 0.0", {"width": 0.0}),
        (ValueError, "expected a positive number for near_zero, got nan", {"near_zero": math.nan}),
        (TypeError, "expected Eigenpairs for deflate, got Tensor; curvlib.eige", {"deflate": A}),
        (ValueError, "all eigenpairs are deflated: there is no bulk", {"deflate": everything}),
    ]
    for kind, text, options in cases:
        with pytest.raises(kind, match=text):
            density(A, **options)
    with pytest.raises(ValueError, match=r"use \(A \+ A.T\) \* 0.5"):
        density(LinearOperator(lambda V: V, (2, 2), dtype=F64))
    result = density(A)
    with pytest.raises(ValueError, match="expected a grid of at least two increasing points"):
        result.on(torch.tensor([1.0, 1.0]))
    with pytest.raises(ValueError, match="expected a positive width, got -1"):
        result.on(torch.tensor([1.0, 2.0]), width=-1.0)
    with pytest.raises(ValueError, match="expected a positive linear=, got 0"):
        result.on_symlog(linear=0.0)


# ------------------------------------------------------------------ saving, plotting
def test_densities_are_saved_and_loaded(tmp_path: Path) -> None:
    A = matrix(network_like(60))
    result = density(A, steps=12, deflate=eigenpairs(A, 2))
    again = Result.load(result.save(tmp_path / "d.safetensors"))
    assert isinstance(again, Density)
    for name in ("grid", "density", "stderr", "cdf", "nodes", "weights", "outliers"):
        assert torch.equal(getattr(again, name), getattr(result, name))
    assert again.trace == result.trace
    assert again.settings == result.settings
    grid = torch.linspace(-1, 1, 50)
    assert torch.equal(again.on(grid)[0], result.on(grid)[0])
    assert f"trace={result.trace:.5g} ± {result.trace_stderr:.2g}" in repr(again)


@pytest.mark.parametrize("scale", ["linear", "symlog"])
def test_the_plot_says_what_was_measured(scale: str) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    counted = Counted(matrix(network_like(60)), name="Hessian")
    result = density(counted.op, steps=12, deflate=eigenpairs(counted.op, 3))
    figure, ax = plt.subplots()
    assert result.plot(ax, scale=scale) is ax
    figure.canvas.draw()
    texts = [t.get_text() for t in ax.get_legend().get_texts()]
    assert "Hessian, P = 60\n2 probes × 12 Lanczos steps" in texts
    assert "± standard error" in texts
    assert "3 outliers, exact" in texts
    assert ax.get_yscale() == "log"
    assert ax.get_ylabel() == ("density" if scale == "linear" else "density per decade")
    low, high = ax.get_xlim()
    assert low < result.grid[0]
    assert high > result.outliers.max()
    labels = [t.get_text() for t in ax.get_xticklabels()]
    assert len(labels) == len(set(labels)) or scale == "linear"
    plt.close(figure)
    alone = density(counted.op, steps=5, probes=1).plot()
    assert [t.get_text() for t in alone.get_legend().get_texts()] == [
        "Hessian, P = 60\n1 probe × 5 Lanczos steps"
    ]
    plt.close("all")
    with pytest.raises(ValueError, match="expected scale='linear' or 'symlog', got 'log'"):
        result.plot(scale="log")


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    A = matrix(network_like()).cuda()
    result = density(A, deflate=eigenpairs(A, 10))
    assert result.nodes.device.type == "cpu"
    assert abs(result.trace - float(A.trace())) < 6 * result.trace_stderr


def test_large_bases_are_kept_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    A = matrix(torch.linspace(0.0, 1.0, 40, dtype=F64))
    kept = density(A, steps=12, probes=2)
    assert kept.settings["reorthogonalize"] is True
    monkeypatch.setattr("curvlib.estimators.density.BASIS_BYTES", 12 * 2 * 40 * 8 - 1)
    cheap = density(A, steps=12, probes=2)
    assert cheap.settings["reorthogonalize"] is False
    assert torch.equal(cheap.nodes, density(A, steps=12, probes=2, reorthogonalize=False).nodes)
    assert density(A, steps=12, probes=2, reorthogonalize=True).settings["reorthogonalize"] is True
