"""Batch sharpness: predictions against dense mini-batches, and on real networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvlib as cl
from curvlib.core.minibatch import minibatches
from curvlib.rates.batch_sharpness import BatchSharpness, batch_sharpness
from curvlib.rates.example_curvature import ExampleCurvature, example_curvature
from tests.rates.small import F64, classifier, each_hessian


def exact(each: Tensor, batch: int, draws: int = 400) -> tuple[float, float]:
    """Mean largest eigenvalue of dense mini-batches and its standard error."""
    g = torch.Generator().manual_seed(batch)
    tops = torch.stack(
        [
            torch.linalg.eigvalsh(each[torch.randperm(len(each), generator=g)[:batch]].mean(0))[-1]
            for _ in range(draws)
        ]
    )
    return float(tops.mean()), float(tops.std()) / draws**0.5


# ------------------------------------------------------------- what is gathered
@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_small_matrices_are_those_of_dense_examples(kind: str, scaled: bool) -> None:
    risk = classifier(24, batches=2)
    each = each_hessian(risk, kind)
    P = torch.linspace(0.5, 2.0, each.shape[1], dtype=F64) if scaled else torch.ones(43, dtype=F64)
    each = each / (P.sqrt()[:, None] * P.sqrt()[None, :])
    found = example_curvature(
        risk, 3, kind=kind, preconditioner=P if scaled else None, tolerance=1e-10, block=5
    )
    values, vectors = torch.linalg.eigh(each.mean(0))
    torch.testing.assert_close(found.values, values.flip(0)[:3])
    V = found.vectors
    torch.testing.assert_close((V * vectors.flip(1)[:, :3]).sum(0).abs(), torch.ones(3, dtype=F64))
    images = each @ V
    M = V.mT @ images
    R = images - V @ M
    torch.testing.assert_close(found.projected, M, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.spread, R.mT @ R, rtol=1e-6, atol=1e-7)
    noise = float((each - each.mean(0)).matmul(V[:, 0]).square().sum(1).mean())
    assert found.noise()[0] == pytest.approx(noise, rel=1e-5)
    assert found.examples == 24


def test_random_estimates_are_unbiased() -> None:
    risk = classifier(24)
    each = each_hessian(risk)
    H = each.mean(0)
    runs = [example_curvature(risk, 3, tolerance=1e-8, seed=seed) for seed in range(40)]
    V = runs[0].vectors
    R = each @ V - V @ (V.mT @ each @ V)
    rest = torch.eye(43, dtype=F64) - V @ V.mT
    truths = {
        "trace": float(H.trace()),
        "square": float(each.square().sum((1, 2)).mean()),
        "complement": float((rest @ H @ rest).square().sum()),
        "shared": float((R * (H @ R)).sum() / R.square().sum()),
        "variance": float((each - H).square().sum() / 23 / 43**2),
    }
    for name, truth in truths.items():
        samples = torch.tensor([getattr(r, name) for r in runs])
        assert abs(float(samples.mean()) - truth) < 4 * float(samples.std()) / 40**0.5, name
    own = torch.stack([r.own for r in runs]).mean(0)
    torch.testing.assert_close(own[:, 1].sum(), R.square().sum(), rtol=0.1, atol=0.0)
    torch.testing.assert_close(own[:, 0].sum(), (R * (each @ R)).sum(), rtol=0.15, atol=0.0)
    inside = torch.tensor([abs(r.trace - truths["trace"]) < 2 * r.trace_stderr for r in runs])
    assert inside.double().mean() > 0.85


def test_examples_with_unequal_weights() -> None:
    """Class weights: a batch divides by its own weight."""
    base = classifier(40)
    weight = torch.tensor([1.0, 3.0, 0.5], dtype=F64)
    risk = cl.Risk(base.model, nn.CrossEntropyLoss(weight=weight), base.data)
    found = example_curvature(risk, 43, tolerance=1e-8)
    torch.testing.assert_close(found.projected.mean(0), torch.diag(found.values), atol=1e-8, rtol=0)
    parts = minibatches(risk, 20, 200)
    tops = torch.stack([torch.linalg.eigvalsh(cl.hessian(p).to_dense())[-1] for p in parts])
    predicted = found.sharpness(20, resamples=1000)
    assert predicted.value == pytest.approx(float(tops.mean()), rel=0.05)
    assert predicted.deviation == pytest.approx(float(tops.std()), rel=0.35)


# -------------------------------------------------------------- what is predicted
@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("batch", [2, 4, 8, 16, 32, 64])
def test_corrected_against_dense_batches(kind: str, batch: int) -> None:
    risk = classifier(64)
    known = example_curvature(risk, 6, kind=kind)
    truth, error = exact(each_hessian(risk, kind), batch)
    found = known.sharpness(batch)
    slack = 4 * (error + found.stderr) + 1e-9
    assert found.value == pytest.approx(truth, rel=0.08, abs=slack)
    assert found.lower - slack <= truth <= found.upper + slack
    assert found.lower <= found.value <= found.upper
    if batch == 4:
        assert abs(known.isotropic(4) / truth - 1) > 3 * abs(found.value / truth - 1)


@pytest.mark.parametrize("stop_at", [0, 5, 13, 24])
def test_the_pass_over_examples_goes_on_bitwise(tmp_path: Path, stop_at: int) -> None:
    """Stopped within the eigenpairs (0), within a batch, in the next one, before the last step."""
    risk = classifier(24, batches=2)
    options: dict[str, Any] = {"examples": None, "block": 5, "seed": 3, "save_every": 0}
    whole = example_curvature(risk, 3, **options)
    path = tmp_path / "run.safetensors"

    def stop(done: float, total: float | None, note: str) -> None:
        if (total == 24 and done >= stop_at > 0) or (stop_at == 0 and total != 24):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        example_curvature(risk, 3, **options, checkpoint=path, progress=stop)
    seen: list[float] = []
    again = example_curvature(
        risk,
        3,
        **options,
        checkpoint=path,
        progress=lambda done, total, note: seen.append(done if total == 24 else -1.0),
    )
    for name in ("values", "vectors", "projected", "spread", "own"):
        assert torch.equal(getattr(again, name), getattr(whole, name)), name
    for name in ("shared", "trace", "square", "complement", "products"):
        assert getattr(again, name) == getattr(whole, name), name
    if stop_at:
        assert min(seen) >= stop_at - 5  # not from the beginning; eigenpairs took no step
    with pytest.raises(ValueError, match=r"block was 5 and is now 4"):
        example_curvature(risk, 3, **(options | {"block": 4}), checkpoint=path)


def test_all_directions_leave_sampling_errors_only() -> None:
    risk = classifier(64)
    known = example_curvature(risk, 43, tolerance=1e-8)
    for batch in (4, 32):
        truth, error = exact(each_hessian(risk), batch)
        found = known.sharpness(batch)
        assert abs(found.value - truth) < 4 * (error + found.stderr)


def test_the_full_batch_is_not_corrected() -> None:
    risk = classifier(30)
    found = batch_sharpness(risk, 30, draws=2)
    assert found.corrected == pytest.approx(found.full, rel=1e-9)
    assert found.isotropic == pytest.approx(found.full)
    assert found.measured == pytest.approx(found.full, rel=1e-3)
    assert found.corrected_stderr < 1e-9
    assert found.lower == pytest.approx(found.full)
    assert found.upper == pytest.approx(found.full)


def test_measured_values_are_those_of_the_mini_batches() -> None:
    risk = classifier(40)
    found = batch_sharpness(risk, 5, draws=60, tolerance=1e-6)
    truth, error = exact(each_hessian(risk), 5)
    assert abs(found.measured - truth) < 4 * (error + found.measured_stderr)
    assert found.measured_stderr == pytest.approx(float(found.samples.std()) / 60**0.5)
    assert found.full < found.measured
    assert found.effective_batch == pytest.approx(5 / (1 - 5 / 40))


def test_a_subset_of_examples_predicts_for_all() -> None:
    risk = classifier(200)
    known = example_curvature(risk, 8, examples=120)
    assert known.projected.shape[0] == 120
    assert known.examples == 200
    torch.testing.assert_close(known.projected.mean(0), torch.diag(known.values), atol=1e-8, rtol=0)
    truth, error = exact(each_hessian(risk), 10)
    assert known.sharpness(10).value == pytest.approx(truth, rel=0.15, abs=4 * error)
    assert known.sharpness(200).value == pytest.approx(known.top, rel=1e-9)


# ------------------------------------------------------------------ real networks
def digits(network: str, steps: int) -> cl.Risk:
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    x = torch.tensor(load_digits().images[:1024], dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(load_digits().target[:1024])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if network == "mlp":
            model = nn.Sequential(
                nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 10)
            )
        else:
            model = nn.Sequential(
                nn.Conv2d(1, 4, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(4, 8, 3, padding=1),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(128, 10),
            )
    g = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(steps):
        chosen = torch.randint(1024, (64,), generator=g)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    return cl.Risk(model, nn.CrossEntropyLoss(), (x, y))


@pytest.mark.parametrize(("network", "steps"), [("mlp", 0), ("mlp", 200), ("conv", 100)])
def test_on_digits_within_a_quarter_where_isotropic_noise_is_not(network: str, steps: int) -> None:
    risk = digits(network, steps)
    known = example_curvature(risk, 8)
    ratios, isotropic = [], []
    for batch, draws in ((8, 24), (16, 16), (32, 12), (64, 8), (128, 4), (256, 3)):
        found = batch_sharpness(risk, batch, draws=draws, curvature=known, resamples=256)
        ratios.append(found.corrected / found.measured)
        isotropic.append(found.isotropic / found.measured)
    assert max(abs(r - 1.0) for r in ratios) < 0.25, ratios
    assert min(isotropic) < 0.75, isotropic


# ------------------------------------------------------------------------ plumbing
def test_seeds_resuming_and_saving(tmp_path: Path) -> None:
    risk = classifier(20)
    whole = batch_sharpness(risk, 4, draws=5, resamples=32)
    again = batch_sharpness(risk, 4, draws=5, resamples=32)
    assert torch.equal(whole.samples, again.samples)
    assert whole.corrected == again.corrected
    assert not torch.equal(whole.samples, batch_sharpness(risk, 4, draws=5, seed=1).samples)
    path = tmp_path / "sharpness"
    seen = []

    def stop(count: float, total: float | None, note: str) -> None:
        seen.append(count)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        batch_sharpness(
            risk, 4, draws=5, resamples=32, checkpoint=path, save_every=0, progress=stop
        )
    ended = batch_sharpness(risk, 4, draws=5, resamples=32, checkpoint=path, progress=stop)
    assert torch.equal(ended.samples, whole.samples)
    assert (ended.corrected, ended.products) == (whole.corrected, whole.products)
    loaded = BatchSharpness.load(whole.save(tmp_path / "r.safetensors"))
    assert torch.equal(loaded.samples, whole.samples)
    known = example_curvature(risk, 3)
    kept = ExampleCurvature.load(known.save(tmp_path / "k.safetensors"))
    assert kept.sharpness(4).value == known.sharpness(4).value
    assert "measured=" in repr(whole)


def test_arguments_that_do_not_fit() -> None:
    risk = classifier(20)
    known = example_curvature(risk, 2)
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "a batch size from 1 to 20 .*, got 21", {"batch_size": 21}),
        (ValueError, "a batch size from 1 to 20 .*, got 0", {"batch_size": 0}),
        (ValueError, "kind= is one of 'hessian', 'ggn', got 'ntk'", {"kind": "ntk"}),
        (ValueError, "expected draws >= 1, got 0", {"draws": 0}),
        (ValueError, "expected resamples >= 1, got 0", {"resamples": 0}),
        (ValueError, "expected directions >= 1, got 0", {"directions": 0}),
        (TypeError, "curvature= takes an ExampleCurvature, got int", {"curvature": 3}),
        (ValueError, "curvature= is that of a hessian of 43 parameters and 20 examples, but", {
            "curvature": known, "kind": "ggn",
        }),
    ]  # fmt: skip
    for kind, text, changes in cases:
        with pytest.raises(kind, match=text):
            batch_sharpness(risk, **({"batch_size": 4} | changes))
    scaled = example_curvature(risk, 2, preconditioner=torch.ones(43, dtype=F64))
    with pytest.raises(ValueError, match="curvature= is preconditioned, and mini-batches are"):
        batch_sharpness(risk, 4, curvature=scaled)
    with pytest.raises(ValueError, match="a batch size from 1 to 20"):
        example_curvature(risk, 2, examples=21)
    with pytest.raises(ValueError, match="expected examples >= 2, got 1"):
        example_curvature(risk, 2, examples=1)
    with pytest.raises(ValueError, match="the data has 1 example"):
        batch_sharpness(classifier(1), 1)
    masked = risk.data[0], torch.full((20,), -100)
    with pytest.raises(ValueError, match="no loss term"):
        example_curvature(risk.on(masked), 2)
    with torch.no_grad():
        next(iter(risk.params.values())).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="0"):
        batch_sharpness(risk, 4)
