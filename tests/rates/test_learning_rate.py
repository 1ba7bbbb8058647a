"""Predicted learning rates against exact moments on least squares, and what the table says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvlib as cl
from curvlib.rates.example_curvature import example_curvature
from curvlib.rates.gradient_noise import gradient_moments
from curvlib.rates.learning_rate import LAWS, MaxLearningRate, max_learning_rate
from curvlib.rates.preconditioned import preconditioner
from tests.rates.moments import largest_stable, radius
from tests.rates.small import F64, classifier, each_hessian


def least_squares(count: int = 256, size: int = 6, power: float = 0.7) -> cl.Risk:
    """Interpolating: targets are linear in the inputs."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(count, size, dtype=F64, generator=g) * power ** torch.arange(size)
    y = x @ torch.randn(size, 1, dtype=F64, generator=g)
    return cl.Risk(nn.Linear(size, 1, bias=False).double(), nn.MSELoss(), (x, y))


def data(risk: cl.Risk) -> Tensor:
    x = risk.data[0]
    return 2.0 * x[:, :, None] * x[:, None, :]


SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256]


# ------------------------------------------------------------------- least squares
@pytest.mark.parametrize(
    ("optimizer", "momentum"), [("sgd", None), ("momentum", 0.5), ("momentum", None)]
)
def test_within_a_quarter_of_the_edge_of_interpolating_least_squares(
    optimizer: str, momentum: float | None
) -> None:
    risk = least_squares()
    rates = max_learning_rate(risk, SIZES, optimizer, momentum=momentum, seed=1)
    beta = 0.0 if optimizer == "sgd" else 0.9 if momentum is None else momentum
    assert rates.momentum == beta
    each = data(risk)
    for size, value in zip(SIZES[::2], rates.value.tolist()[::2], strict=True):
        found = largest_stable(
            lambda lr, size=size: radius(each, size, lr, beta) < 1.0, value, 0.02
        )
        limit = 0.02 if size == 256 else 0.25  # without noise it is the bound itself
        assert value == pytest.approx(found, rel=limit), size


def test_sgd_itself_diverges_above_and_not_below() -> None:
    """A run of torch's SGD on single examples, far on either side of the prediction."""
    risk = least_squares()
    value = float(max_learning_rate(risk, [2]).value[0])
    x, y = risk.data
    for factor, diverges in ((0.6, False), (4.0, True)):
        model = nn.Linear(6, 1, bias=False).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=factor * value)
        g = torch.Generator().manual_seed(0)
        for _ in range(3000):
            chosen = torch.randperm(256, generator=g)[:2]
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x[chosen]), y[chosen])
            if not loss < 1e12:
                break
            loss.backward()
            optimizer.step()
        assert bool(nn.functional.mse_loss(model(x), y) > 1e3) == diverges


@pytest.mark.parametrize("size", [4, 32, 256])
def test_adam_with_a_fixed_state(size: int) -> None:
    """Exact moments of ``u = beta u + (1 - beta) G x``, ``x -= lr P^-1 u``."""
    risk = least_squares()
    P = torch.tensor([2.0, 0.5, 1.0, 0.3, 0.2, 1.0], dtype=F64)
    rates = max_learning_rate(risk, [size], "adam", state=P)
    each = data(risk) / (P.sqrt()[:, None] * P.sqrt()[None, :])
    found = largest_stable(lambda lr: radius(each, size, lr, 0.9, 0.9) < 1.0, float(rates.value))
    assert float(rates.value) == pytest.approx(found, rel=0.02 if size == 256 else 0.25)
    if size == 256:
        top = float(torch.linalg.eigvalsh(each.mean(0))[-1])
        assert float(rates.value) == pytest.approx(38.0 / top, rel=1e-3)


@pytest.mark.parametrize("size", [4, 32, 256])
@pytest.mark.parametrize("damping", [0.05, 1.0])
def test_damped_second_order_steps(size: int, damping: float) -> None:
    risk = least_squares()
    rates = max_learning_rate(risk, [size], "damped", damping=damping, directions=6)
    H = data(risk).mean(0)
    values, vectors = torch.linalg.eigh(H)
    root = vectors @ torch.diag((values + damping).rsqrt()) @ vectors.mT
    each = root @ data(risk) @ root
    found = largest_stable(lambda lr: radius(each, size, lr) < 1.0, float(rates.value))
    assert float(rates.value) == pytest.approx(found, rel=0.02 if size == 256 else 0.4)


def test_much_damping_allows_rates_in_proportion_to_it() -> None:
    """Rate = damping x the rate of SGD, which falls with B: damping in proportion to lr / B."""
    risk = least_squares()
    plain = max_learning_rate(risk, SIZES, directions=6)
    for damping in (100.0, 1000.0):
        rates = max_learning_rate(risk, SIZES, "damped", damping=damping, directions=6)
        torch.testing.assert_close(rates.value, damping * plain.value, rtol=0.05, atol=0.0)


def test_the_knee_is_where_the_rate_is_half_of_the_largest() -> None:
    risk = least_squares()
    known = example_curvature(risk, 6, seed=2)
    for law in ("second_moment", "mean_square"):
        rates = max_learning_rate(risk, [1, 256], law=law, curvature=known)
        assert rates.knee_low < rates.knee < rates.knee_high
        b = rates.knee * 255 / (256 - rates.knee)
        noise = float(rates.noise[0]) if law == "second_moment" else float(rates.trace[0])
        assert noise / b == pytest.approx(float(rates.sharpness[0]), rel=1e-6)
        near = round(rates.knee)
        at = max_learning_rate(risk, [near], law=law, curvature=known)
        half = float(at.laws["deterministic"]) / 2
        assert float(at.value) == pytest.approx(half, rel=0.1)


# ------------------------------------------------------------------ laws and tables
def test_laws_side_by_side() -> None:
    risk = classifier(64)
    known = example_curvature(risk, 8)
    rates = max_learning_rate(risk, [1, 8, 64], curvature=known)
    assert tuple(rates.laws) == LAWS
    top = known.top
    torch.testing.assert_close(rates.laws["deterministic"], torch.full((3,), 2 / top, dtype=F64))
    for i, size in enumerate((1, 8, 64)):
        b = size * 63 / (64 - size) if size < 64 else math.inf
        expected = 2 / (top + known.trace / b)
        assert float(rates.laws["mean_square"][i]) == pytest.approx(expected)
        sharp = known.sharpness(size).value
        assert float(rates.laws["batch_sharpness"][i]) == pytest.approx(2 / sharp)
        assert float(rates.laws["isotropic"][i]) == pytest.approx(2 / known.isotropic(size))
    for name, law in rates.laws.items():
        assert float(law[-1]) == pytest.approx(2 / top), name  # the full batch
        assert bool((law.diff() >= -1e-12).all()), name
    assert float(rates.laws["linear"][0]) < float(rates.laws["square_root"][0])
    used = max_learning_rate(risk, [8], curvature=known, law="batch_sharpness")
    assert torch.equal(used.value, used.laws["batch_sharpness"])
    assert float(used.stderr) > 0.0


def test_the_table_and_the_figure(tmp_path: Path) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    rates = max_learning_rate(classifier(40), [1, 8, 40], directions=3)
    lines = rates.table().splitlines()
    assert lines[0].split() == [
        "batch", "deterministic", "batch_sharpness", "isotropic", "mean_square", "second_moment*",
        "linear", "square_root",
    ]  # fmt: skip
    assert [line.split()[0] for line in lines[1:4]] == ["1", "8", "40"]
    assert float(lines[1].split()[5]) == pytest.approx(float(rates.value[0]), rel=1e-3)
    assert lines[4].startswith("SGD, * in use; critical batch size ")
    ax = rates.plot()
    ax.figure.canvas.draw()
    words = [t.get_text() for t in ax.get_legend().get_texts()]
    assert "second moment (in use)" in words
    assert "critical batch size" in words
    plt.close("all")
    again = MaxLearningRate.load(rates.save(tmp_path / "rates.safetensors"))
    assert torch.equal(again.value, rates.value)
    assert again.table() == rates.table()


# -------------------------------------------------------------------- optimizers
def test_optimizers_as_they_are() -> None:
    risk = classifier(40)
    params = list(risk.model.parameters())

    def of(optimizer: Any, **settings: Any) -> MaxLearningRate:
        return max_learning_rate(risk, [40], optimizer, directions=3, **settings)

    plain = of("sgd")
    assert torch.equal(of(torch.optim.SGD(params, lr=1.0)).value, plain.value)
    heavy = of(torch.optim.SGD(params, lr=1.0, momentum=0.8))
    torch.testing.assert_close(heavy.value, of("momentum", momentum=0.8).value)
    assert float(heavy.value) == pytest.approx(1.8 * float(plain.value))
    damp = of(torch.optim.SGD(params, lr=1.0, momentum=0.8, dampening=0.5))
    torch.testing.assert_close(damp.value, 2 * heavy.value)
    adam = torch.optim.AdamW(params, lr=1e-4, betas=(0.8, 0.99))
    rms = torch.optim.RMSprop(params, lr=1e-4)
    for optimizer in (adam, rms):
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(risk.model(risk.data[0]), risk.data[1]).backward()
            optimizer.step()
    P = preconditioner(adam, risk.space, risk).diagonal()
    scaled = cl.hessian(risk).to_dense() / (P.sqrt()[:, None] * P.sqrt()[None, :])
    top = float(torch.linalg.eigvalsh(scaled)[-1])
    assert float(of(adam).value) == pytest.approx(2 * 1.8 / 0.2 / top, rel=1e-3)
    torch.testing.assert_close(of(adam).value, of("adam", state=adam, momentum=0.8).value)
    assert "AdamW with its state" in repr(of(adam))
    P = preconditioner(rms, risk.space, risk).diagonal()
    scaled = cl.hessian(risk).to_dense() / (P.sqrt()[:, None] * P.sqrt()[None, :])
    assert float(of(rms).value) == pytest.approx(
        2 / float(torch.linalg.eigvalsh(scaled)[-1]), rel=1e-3
    )


def test_adams_settled_state_is_the_mean_square_of_batch_gradients() -> None:
    risk = classifier(24)
    rows = torch.cat(list(cl.gradients(risk)))
    moments = gradient_moments(risk, block=5)
    torch.testing.assert_close(moments.mean, risk.gradient())
    torch.testing.assert_close(moments.variance, rows.var(0))
    assert moments.noise_scale == pytest.approx(
        float(rows.var(0).sum() / rows.mean(0).square().sum())
    )
    g = torch.Generator().manual_seed(0)
    squares = torch.stack(
        [rows[torch.randperm(24, generator=g)[:6]].mean(0).square() for _ in range(4000)]
    )
    P = moments.preconditioner(6, eps=1e-12).diagonal()
    error = squares.std(0) / 4000**0.5
    assert bool(((P.square() - squares.mean(0)).abs() < 5 * error).all())
    full = moments.preconditioner(24, eps=0.5).diagonal()
    torch.testing.assert_close(full, moments.mean.abs() + 0.5)
    with pytest.raises(ValueError, match="expected eps > 0, got 0"):
        moments.preconditioner(6, eps=0.0)


def test_adam_grows_as_the_square_root_where_noise_dominates() -> None:
    """Near a minimum gradients are noise: P falls as B^-1/2, and rates rise, below the knee."""
    risk = least_squares(count=4000, size=12, power=1.0)
    with torch.no_grad():
        x, y = risk.data
        risk.params["weight"].copy_(torch.linalg.lstsq(x, y).solution.mT + 1e-3)
    g = torch.Generator().manual_seed(1)
    noisy = risk.on((x, y + torch.randn(y.shape, dtype=F64, generator=g)))
    rates = max_learning_rate(noisy, [16, 64, 256], "adam", examples=500, law="batch_sharpness")
    slopes = (rates.value / rates.sharpness.reciprocal()).log()
    assert bool((slopes.diff() > -0.05).all())
    P = [gradient_moments(noisy).preconditioner(b).diagonal().mean() for b in (16, 64, 256)]
    assert float(P[0] / P[1]) == pytest.approx(2.0, rel=0.1)
    assert float(P[1] / P[2]) == pytest.approx(2.0, rel=0.1)


# ------------------------------------------------------------------------ bad input
def test_arguments_that_do_not_fit() -> None:
    risk = classifier(20)
    adam = torch.optim.Adam(risk.model.parameters())
    nesterov = torch.optim.SGD(risk.model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    known = example_curvature(risk, 2)
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "a batch size from 1 to 20 .*, got 21", {"batch_sizes": [1, 21]}),
        (ValueError, "a batch size from 1 to 20 .*, got 0", {"batch_sizes": [0]}),
        (TypeError, "a batch size is an int, got float", {"batch_sizes": [1.5]}),
        (ValueError, "expected at least one batch size, got none", {"batch_sizes": []}),
        (ValueError, "unknown optimizer='lion'; there are 'sgd', 'mom", {"optimizer": "lion"}),
        (ValueError, "momentum= belongs to 'momentum' and 'adam', got", {"momentum": 0.9}),
        (ValueError, "damping= belongs to 'damped', got optimizer='sgd'", {"damping": 0.9}),
        (ValueError, "state= belongs to 'adam', got optimizer='sgd'", {"state": adam}),
        (ValueError, "expected 0 <= momentum < 1, got 1", {
            "optimizer": "momentum", "momentum": 1.0}),
        (ValueError, "needs a positive damping=, got None", {"optimizer": "damped"}),
        (ValueError, "holds no state for parameter", {"optimizer": adam}),
        (ValueError, "belong to optimizers given by name; this Adam", {
            "optimizer": adam, "momentum": 0.9}),
        (ValueError, "Nesterov's momentum has another law", {"optimizer": nesterov}),
        (TypeError, "state= takes a torch.optim.Optimizer that has taken steps, or", {
            "optimizer": "adam", "state": "adam"}),
        (ValueError, "law= is 'second_moment', 'mean_square' or", {"law": "linear"}),
        (ValueError, "kind= is one of 'hessian', 'ggn', got 'ntk'", {"kind": "ntk"}),
        (ValueError, "curvature= is for 'sgd' and 'momentum'; 'adam' needs", {
            "optimizer": "adam", "curvature": known}),
    ]  # fmt: skip
    for kind, text, changes in cases:
        with pytest.raises(kind, match=text):
            max_learning_rate(risk, **({"batch_sizes": [4]} | changes))
    with pytest.raises(ValueError, match="the data has 1 example"):
        max_learning_rate(classifier(1), [1])


def test_curvature_without_an_upper_end() -> None:
    x = torch.randn(8, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    concave = cl.Risk(nn.Linear(2, 1, bias=False).double(), lambda f, y: -f.square().mean(), (x, x))
    with pytest.raises(RuntimeError, match="the largest eigenvalue of the hessian is -.* no learn"):
        max_learning_rate(concave, [4])


def test_diverged_parameters() -> None:
    risk = classifier(20)
    with torch.no_grad():
        next(iter(risk.params.values())).fill_(math.nan)
    for optimizer in ("sgd", "adam"):
        with pytest.raises(FloatingPointError, match="0"):
            max_learning_rate(risk, [4], optimizer)
    with pytest.raises(FloatingPointError, match="0"):
        gradient_moments(risk)


def test_each_hessian_is_what_the_tests_say() -> None:
    risk = classifier(10)
    torch.testing.assert_close(each_hessian(risk).mean(0), cl.hessian(risk).to_dense())


@pytest.mark.parametrize(
    ("optimizer", "options", "files"),
    [
        ("sgd", {}, {"run", "run-eigenpairs"}),
        ("damped", {"damping": 0.1}, {"run", "run-undamped"}),
        ("adam", {}, {"run-batch-2", "run-batch-9"}),
    ],
)
def test_goes_on_from_its_checkpoints(
    tmp_path: Path, optimizer: str, options: dict[str, Any], files: set[str]
) -> None:
    risk = classifier(24)
    whole = max_learning_rate(risk, [2, 9], optimizer, **options)
    path = tmp_path / "run.safetensors"
    max_learning_rate(risk, [2, 9], optimizer, **options, checkpoint=path)
    assert files <= {file.stem for file in tmp_path.iterdir()}
    steps: list[float] = []
    again = max_learning_rate(
        risk,
        [2, 9],
        optimizer,
        **options,
        checkpoint=path,
        progress=lambda done, total, note: steps.append(done),
    )
    assert steps == []  # everything was known
    for name in LAWS:
        assert torch.equal(again.laws[name], whole.laws[name])
