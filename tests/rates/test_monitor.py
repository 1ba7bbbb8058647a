"""StabilityMonitor: readings against dense matrices, edges, files, resuming, and errors."""

from __future__ import annotations

import csv
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvlib as cl
from curvlib.rates import stability_table
from curvlib.rates.batch_reading import read_batches
from curvlib.rates.learner import LanczosLearner
from curvlib.rates.monitor import StabilityMonitor
from curvlib.rates.stability_bounds import edge_of
from curvlib.rates.stability_history import StabilityHistory
from curvlib.rates.stability_table import read_csv
from tests.problems import snapshot
from tests.programs import Program
from tests.rates.small import F64, classifier, each_hessian


def go(risk: cl.Risk, optimizer: Any, monitor: StabilityMonitor | None, steps: int) -> None:
    x, y = risk.data
    for _ in range(steps):
        optimizer.zero_grad()
        loss = risk.loss.function(risk.model(x), y)
        loss.backward()
        optimizer.step()
        if monitor is not None:
            monitor.step(loss)


def sgd(risk: cl.Risk, lr: float = 0.1, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(risk.model.parameters(), lr=lr, **options)


def flat(risk: cl.Risk) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in risk.model.parameters()])


# ---------------------------------------------------------------------- what is read
def test_eigenvalue_trace_and_norm_against_the_dense_hessian():
    risk = classifier(40)
    row = StabilityMonitor(risk, sgd(risk), probes=200).read(0.5)
    H = cl.hessian(risk).to_dense()
    assert row.lambda_max == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=1e-3)
    assert abs(row.trace - float(H.trace())) < 4 * row.trace_stderr < 0.3 * float(H.trace())
    assert abs(row.frobenius - float(H.norm())) < 4 * row.frobenius_stderr < 0.3 * row.frobenius
    assert row.loss == 0.5
    assert row.batch_sharpness == row.lambda_max  # the batch is all of the data
    assert math.isnan(row.noise_scale)


def test_the_part_along_the_top_eigenvector_is_exact():
    risk = classifier(40)
    with torch.no_grad():  # nearly rank one: what is left of the noise is small
        risk.model[2].weight.mul_(8.0)
    H = cl.hessian(risk).to_dense()
    monitor = StabilityMonitor(risk, sgd(risk), probes=16, tolerance=1e-6)
    row = monitor.read()
    plain = math.sqrt(2 * float(H.norm() ** 2 - H.diagonal().norm() ** 2) / 16)
    assert row.trace_stderr < 0.9 * plain
    assert abs(row.trace - float(H.trace())) < 4 * row.trace_stderr


def test_mini_batches_against_brute_force():
    risk = classifier(40)
    H = each_hessian(risk)
    g = torch.Generator().manual_seed(1)
    tops = [
        torch.linalg.eigvalsh(H[torch.randperm(40, generator=g)[:4]].mean(0))[-1]
        for _ in range(400)
    ]
    expected, error = float(torch.stack(tops).mean()), float(torch.stack(tops).std()) / 20
    row = StabilityMonitor(risk, sgd(risk), batch_size=4, draws=30).read()
    assert abs(row.batch_sharpness - expected) < 4 * math.hypot(error, row.batch_sharpness_stderr)
    rows = torch.cat(list(cl.gradients(risk)))
    scale = float(rows.var(0).sum() / rows.mean(0).square().sum())
    found = [  # disjoint, and not
        read_batches(risk, 4, draws, 40, start=None, tolerance=0.9, seed=1000 * seed)[0].noise_scale
        for seed in range(12)
        for draws in (5, 12)
    ]
    for kind in (torch.tensor(found[::2]), torch.tensor(found[1::2])):
        assert abs(float(kind.mean()) - scale) < 4 * float(kind.std()) / math.sqrt(12)


def test_batches_are_left_out_on_demand():
    risk = classifier(40)
    row = StabilityMonitor(risk, sgd(risk), batch_size=4, draws=0).read()
    assert math.isnan(row.batch_sharpness)
    assert row.trace_over_batch == pytest.approx(row.trace * (1 / 4 - 1 / 40))
    assert row.mean_square_sharpness == pytest.approx(row.lambda_max + row.trace_over_batch)


def test_sharpness_along_the_update():
    risk = classifier(40)
    optimizer = torch.optim.Adam(risk.model.parameters(), lr=0.01)
    monitor = StabilityMonitor(risk, optimizer, every=3)
    go(risk, optimizer, None, 2)
    monitor._calls = 2
    before = flat(risk)
    go(risk, optimizer, monitor, 1)
    u = flat(risk) - before
    H = cl.hessian(risk).to_dense()
    expected = float(u @ H @ u / (u @ u))
    assert monitor.history["update_sharpness"].tolist() == pytest.approx([expected], rel=1e-6)


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "RMSprop", "Adagrad", "SGD"])
def test_sharpness_is_what_the_edge_is_for(kind):
    risk = classifier(40)
    first, *rest = risk.model.parameters()
    groups = [{"params": rest, "lr": 0.01}, {"params": [first], "lr": 0.03}]
    optimizer = getattr(torch.optim, kind)(groups, lr=0.01, weight_decay=0.5)
    monitor = StabilityMonitor(risk, optimizer, every=4, tolerance=1e-4)
    go(risk, optimizer, monitor, 4)
    parts = []
    for p in risk.model.parameters():
        state, rate = optimizer.state[p], 3.0 if p is first else 1.0
        if kind in ("Adam", "AdamW"):
            P = (state["exp_avg_sq"] / (1 - 0.999**4)).sqrt() + 1e-8
        elif kind == "RMSprop":
            P = state["square_avg"].sqrt() + 1e-8
        else:
            P = state["sum"].sqrt() + 1e-10 if kind == "Adagrad" else torch.ones_like(p)
        parts.append((P / rate).reshape(-1))
    root = torch.cat(parts).rsqrt()
    H = cl.hessian(risk).to_dense()
    if kind != "AdamW":  # decoupled weight decay is no curvature
        H = H + 0.5 * torch.eye(len(H), dtype=F64)
    expected = float(torch.linalg.eigvalsh(root[:, None] * H.detach() * root)[-1])
    row = monitor.history
    assert float(row["sharpness"][0]) == pytest.approx(expected, rel=1e-5)
    assert float(row["lambda_max"][0]) == pytest.approx(
        float(torch.linalg.eigvalsh(cl.hessian(risk).to_dense())[-1]), rel=1e-5
    )


def test_what_is_not_known_yet_is_nan():
    risk = classifier(40)
    row = StabilityMonitor(risk, torch.optim.Adam(risk.model.parameters())).read()
    assert math.isnan(row.sharpness)  # no state before the first step
    assert math.isnan(row.update_sharpness)
    assert math.isnan(row.loss)
    warm = sgd(risk, weight_decay=0.1)
    warm.param_groups[0]["lr"] = 0.0
    row = StabilityMonitor(risk, warm).read()
    assert (row.edge, math.isnan(row.sharpness)) == (math.inf, True)


def test_a_reading_from_the_last_eigenvector_costs_a_few_products():
    risk = classifier(40)
    optimizer = sgd(risk, lr=0.01)
    monitor = StabilityMonitor(risk, optimizer, every=5, probes=4)
    go(risk, optimizer, monitor, 100)
    products = monitor.history["products"]
    beside = 4 + 1  # probes, and the update
    assert float(products[1:].mean()) - beside <= 6
    n, row = 1, monitor._rows[0]
    assert row.cost == pytest.approx(n + 2.0 * row.products)  # one graph, batch = all
    assert monitor.cost == pytest.approx(float(monitor.history["cost"].sum()))


def test_an_eigenvector_that_overtakes_is_found():
    x = torch.eye(4, dtype=F64)
    model = nn.Linear(4, 1, bias=False).double()
    weights = torch.tensor([[4.0], [1.0], [1.0], [1.0]], dtype=F64)

    def loss(out: Tensor, _: Tensor) -> Tensor:
        return (weights * out.square()).mean()

    risk = cl.Risk(model, loss, (x, torch.zeros(4, 1, dtype=F64)), reduction="mean")
    monitor = StabilityMonitor(risk, sgd(risk))
    assert monitor.read().lambda_max == pytest.approx(2.0, rel=1e-3)
    weights[2] = 6.0
    monitor._calls = 1
    assert monitor.read().lambda_max == pytest.approx(3.0, rel=1e-3)


# --------------------------------------------------------------------------- edges
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.9},  # Adam's moving average
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.5, "weight_decay": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize(("factor", "stable"), [(0.98, True), (1.02, False)])
def test_edges_are_where_a_quadratic_diverges(options, factor, stable):
    curvature = 3.0
    p = torch.ones(1, dtype=F64, requires_grad=True)
    unit = edge_of(torch.optim.SGD([p], lr=1.0, **options)).value
    total = curvature + options.get("weight_decay", 0.0)
    optimizer = torch.optim.SGD([p], lr=factor * unit / total, **options)
    for _ in range(1500):
        optimizer.zero_grad()
        (0.5 * curvature * p.square()).sum().backward()
        optimizer.step()
    assert (abs(p.item()) < 1e-3) == stable


def test_edges_of_adaptive_methods():
    p = [torch.zeros(1)]
    adam = edge_of(torch.optim.Adam(p, lr=0.01))
    assert adam.value == pytest.approx(38 / 0.01)
    assert adam.value == pytest.approx(
        edge_of(torch.optim.SGD(p, lr=0.01, momentum=0.9, dampening=0.9)).value
    )
    assert edge_of(torch.optim.RMSprop(p, lr=0.1, momentum=0.5)).value == pytest.approx(30.0)
    assert edge_of(torch.optim.Adagrad(p, lr=0.1)).value == pytest.approx(20.0)

    class AdaHessian(torch.optim.SGD):
        """By its name."""

    assert edge_of(AdaHessian(p, lr=0.1)).adaptive


def test_the_rates_of_a_learner_are_seen_whichever_came_first():
    for first in (True, False):
        risk = classifier(40)
        optimizer = sgd(risk, lr=0.001)
        make = [
            LanczosLearner,
            lambda r, o: StabilityMonitor(r, o, every=2),
        ]
        made = [f(risk, optimizer) for f in (make if first else reversed(make))]
        learner, monitor = made if first else reversed(made)
        learner.step()
        go(risk, optimizer, monitor, 2)
        assert float(monitor.history["lr"][0]) == pytest.approx(learner.lr)
        assert float(monitor.history["momentum"][0]) == learner.momentum


def digits() -> tuple[nn.Module, Tensor, Tensor]:
    data = pytest.importorskip("sklearn.datasets").load_digits()
    x = torch.as_tensor(data.data[:500]).float() / 16
    y = nn.functional.one_hot(torch.as_tensor(data.target[:500]), 10).float()
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / 8 if p.ndim > 1 else torch.zeros(p.shape))
    return model, x - x.mean(0), y


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "steps"),
    [
        (lambda params: torch.optim.SGD(params, lr=2.5), 2500),
        (lambda params: torch.optim.Adam(params, lr=0.01), 1500),
    ],
    ids=["gradient descent", "Adam"],
)
def test_full_batch_training_settles_at_the_edge(make, steps):
    model, x, y = digits()
    optimizer = make(model.parameters())
    risk = cl.Risk(model, nn.MSELoss(), (x, y))
    monitor = StabilityMonitor(risk, optimizer, every=steps // 25, probes=2)
    go(risk, optimizer, monitor, steps)
    share = (monitor.history["sharpness"] / monitor.history["edge"])[-8:]
    assert float(monitor.history["sharpness"][0] / monitor.history["edge"][0]) < 0.75
    assert abs(float(share.mean()) - 1.0) < 0.1
    assert monitor.history["loss"][-1] < 0.5 * monitor.history["loss"][0]


# ------------------------------------------------------------------- nothing else moves
def test_a_reading_leaves_model_and_optimizer_as_they_are():
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 2)
    ).train()
    x, y = torch.randn(32, 4), torch.randint(2, (32,))
    optimizer = torch.optim.Adam(model.parameters())
    risk = cl.Risk(model, nn.CrossEntropyLoss(), (x, y))
    go(risk, optimizer, None, 2)
    monitor = StabilityMonitor(risk, optimizer, batch_size=8)
    before, state = snapshot(model), repr(optimizer.state_dict())
    monitor.read()
    snapshot(model).assert_same(before)
    assert repr(optimizer.state_dict()) == state


def test_watching_changes_no_step():
    plain, watched = classifier(40), classifier(40)
    go(plain, sgd(plain, momentum=0.9), None, 10)
    optimizer = sgd(watched, momentum=0.9)
    go(watched, optimizer, StabilityMonitor(watched, optimizer, every=3), 10)
    assert torch.equal(flat(plain), flat(watched))


# --------------------------------------------------------------------- files, resuming
def start(path: Path, **options: Any) -> tuple[cl.Risk, Any, StabilityMonitor]:
    risk = classifier(40)
    optimizer = torch.optim.Adam(risk.model.parameters(), lr=0.01)
    settings = {"every": 3, "batch_size": 8, "draws": 2, "seed": 4, "path": path} | options
    return risk, optimizer, StabilityMonitor(risk, optimizer, **settings)


def test_resumes_bitwise_and_replaces_rows_after_the_checkpoint(tmp_path):
    whole = start(tmp_path / "whole.csv")
    go(*whole, 24)
    first = start(tmp_path / "run.csv")
    go(*first, 11)
    torch.save(
        [first[0].model.state_dict(), first[1].state_dict(), first[2].state_dict()],
        tmp_path / "state.pt",
    )
    go(*first, 7)  # it got further than its checkpoint
    assert [row.step for row in read_csv(tmp_path / "run.csv")][-1] == 18
    again = start(tmp_path / "run.csv", resume=True)
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    for part, state in zip((again[0].model, again[1], again[2]), states, strict=True):
        part.load_state_dict(state)
    go(*again, 1)
    assert [row.step for row in read_csv(tmp_path / "run.csv")] == [3, 6, 9, 12]
    go(*again, 12)
    assert (tmp_path / "run.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert repr(again[2]._rows) == repr(read_csv(tmp_path / "run.csv"))  # floats to the last bit


def test_a_killed_write_leaves_the_table_whole(tmp_path, monkeypatch):
    run = start(tmp_path / "run.csv")
    go(*run, 6)
    whole = (tmp_path / "run.csv").read_bytes()
    plain = csv.writer

    def torn(file: Any, **options: Any) -> Any:
        writer = plain(file, **options)

        class Torn:
            def writerow(self, row: Any) -> None:
                writer.writerow(row)
                file.flush()
                if len(row) and str(row[0]) == "6":
                    raise KeyboardInterrupt

        return Torn()

    monkeypatch.setattr(stability_table.csv, "writer", torn)
    with pytest.raises(KeyboardInterrupt):
        go(*run, 3)
    assert (tmp_path / "run.csv").read_bytes() == whole
    assert os.listdir(tmp_path) == ["run.csv"]


@pytest.mark.slow
def test_the_table_survives_kill_9(tmp_path):
    program = f"""
import os, signal
from pathlib import Path
from tests.rates.test_monitor import go, start
from curvlib.rates import stability_table
from curvlib.rates.batch_reading import read_batches
risk, optimizer, monitor = start(Path({str(tmp_path / "run.csv")!r}))
go(risk, optimizer, monitor, 6)
stability_table._text = lambda value: os.kill(os.getpid(), signal.SIGKILL)
go(risk, optimizer, monitor, 3)
"""
    ended = Program("-c", program).finish()
    assert ended.code == -signal.SIGKILL, ended.error
    assert [row.step for row in read_csv(tmp_path / "run.csv")] == [3, 6]
    start(tmp_path / "run.csv", resume=True)
    assert os.listdir(tmp_path) == ["run.csv"]  # what the killed process left is gone


def test_rows_of_an_earlier_run_are_kept(tmp_path):
    go(*start(tmp_path / "run.csv"), 6)
    later = start(tmp_path / "run.csv", resume=True)
    later[2]._calls = 6  # a run that goes on without the monitor's state
    go(*later, 3)
    assert [row.step for row in read_csv(tmp_path / "run.csv")] == [3, 6, 9]


class Writer:
    def __init__(self) -> None:
        self.seen: list[tuple[str, float, int]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.seen.append((name, value, step))


def test_tensorboard_gets_finite_numbers():
    risk = classifier(40)
    writer = Writer()
    monitor = StabilityMonitor(risk, sgd(risk), tensorboard=writer)
    row = monitor.read()
    assert ("curvlib/lambda_max", row.lambda_max, 0) in writer.seen
    names = [name for name, _, _ in writer.seen]
    assert "curvlib/loss" not in names
    assert "curvlib/step" not in names


def test_a_folder_for_tensorboard(tmp_path, monkeypatch):
    import types

    module = types.ModuleType("torch.utils.tensorboard")
    made: list[str] = []
    module.SummaryWriter = lambda folder: made.append(folder) or Writer()  # type: ignore[attr-defined]
    risk = classifier(40)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    StabilityMonitor(risk, sgd(risk), tensorboard=tmp_path).read()
    assert made == [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="not installed; run: pip install tensorboard"):
        StabilityMonitor(risk, sgd(risk), tensorboard=tmp_path)
    with pytest.raises(TypeError, match="tensorboard= is a folder or a SummaryWriter, got int"):
        StabilityMonitor(risk, sgd(risk), tensorboard=3)


# -------------------------------------------------------------------------- the figure
def test_the_history_is_saved_and_drawn(tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    run = start(tmp_path / "run.csv")
    go(*run, 9)
    history = run[2].history
    again = StabilityHistory.load(history.save(tmp_path / "history.safetensors"))
    assert len(again) == 3
    assert torch.equal(again["lambda_max"], history["lambda_max"])
    figure, axes = plt.subplots(1, 2, layout="constrained")
    assert again.plot(axes[0]) is axes[0]
    texts = [text.get_text() for text in axes[0].get_legend().get_texts()]
    assert texts == ["preconditioned sharpness", r"edge $(2 + 2\beta_1) / ((1 - \beta_1)\,\eta)$"]
    risk = classifier(40)
    optimizer = sgd(risk, momentum=0.9)
    monitor = StabilityMonitor(risk, optimizer, every=2, batch_size=4)
    go(risk, optimizer, monitor, 4)
    ax = monitor.plot(axes[1])
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == [
        "batch sharpness, B = 4",
        "with noise tr(H) / B",
        r"$\lambda_{\max}$ of all data",
        r"edge $2 (1 + \mu) / \eta$",
        r"$2 / \eta$",
    ]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("training step", "curvature")
    figure.canvas.draw()
    legend = ax.get_legend().get_window_extent()
    assert legend.y0 >= ax.get_window_extent().y1 - 2.0  # above the data
    plt.close(figure)


def test_plain_gradient_descent_has_one_line_and_its_edge():
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    risk = classifier(40)
    optimizer = sgd(risk)
    monitor = StabilityMonitor(risk, optimizer, every=2)
    go(risk, optimizer, monitor, 4)
    ax = monitor.plot()
    assert [line.get_label() for line in ax.get_lines()] == [
        r"$\lambda_{\max}$ of all data",
        r"edge $2 / \eta$",
    ]
    assert list(ax.get_lines()[1].get_ydata()) == [20.0, 20.0]
    plt.close(ax.figure)


def test_an_empty_history_is_not_drawn():
    risk = classifier(40)
    monitor = StabilityMonitor(risk, sgd(risk))
    with pytest.raises(ValueError, match=r"there is no reading to draw yet; call monitor.step"):
        monitor.plot()
    with pytest.raises(ValueError, match=r"there is no column 'hue'; there are step, loss, lr"):
        monitor.history["hue"]


# ---------------------------------------------------------------------------- bad input
class Lion(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})


def test_bad_arguments(tmp_path):
    risk = classifier(40)
    good = sgd(risk)
    with pytest.raises(ValueError, match=r"unknown optimizer Lion: .* there are SGD, Adam, AdamW"):
        StabilityMonitor(risk, Lion(risk.model.parameters()))
    with pytest.raises(TypeError, match=r"expected a torch.optim.Optimizer, got str"):
        StabilityMonitor(risk, "sgd")
    with pytest.raises(TypeError, match=r"expected a torch.optim.Optimizer, got str"):
        edge_of("sgd")
    with pytest.raises(ValueError, match=r"does not train \['2.bias'\] of the risk"):
        StabilityMonitor(risk, torch.optim.SGD(list(risk.model.parameters())[:3], lr=0.1))
    for size in (0, 41):
        with pytest.raises(ValueError, match=f"expected a batch size from 1 to 40.*got {size}"):
            StabilityMonitor(risk, good, batch_size=size)
    for name, value in (("every", 0), ("draws", -1), ("probes", 1)):
        with pytest.raises(ValueError, match=name):
            StabilityMonitor(risk, good, **{name: value})
    with pytest.raises(ValueError, match=r"expected 0 < tolerance < 1 \(of the norm\), got 1"):
        StabilityMonitor(risk, good, tolerance=1)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        StabilityMonitor(risk, good, path=tmp_path / "none" / "run.csv")
    single = cl.Risk(risk.model, nn.CrossEntropyLoss(), (risk.data[0][:1], risk.data[1][:1]))
    with pytest.raises(ValueError, match="the data has 1 example"):
        StabilityMonitor(single, good)
    with pytest.raises(TypeError, match="loss= is a number"):
        StabilityMonitor(risk, good).read([1.0])
    other = StabilityMonitor(risk, good, every=7).state_dict()
    with pytest.raises(ValueError, match="other settings: every was 7 and is now 100"):
        StabilityMonitor(risk, good).load_state_dict(other)


def test_bad_tables(tmp_path):
    path = tmp_path / "run.csv"
    go(*start(path), 6)
    with pytest.raises(ValueError, match=r"run.csv' exists; pass resume=True to continue it"):
        start(path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2][:20]]))
    with pytest.raises(ValueError, match=r"line 3 of .*run.csv' is damaged"):
        start(path, resume=True)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"is no table of a StabilityMonitor .*begins with a, b"):
        start(path, resume=True)
    path.write_text("")
    with pytest.raises(ValueError, match=r"begins with an empty file"):
        start(path, resume=True)


def test_divergence_is_named_and_readings_stand(tmp_path):
    run = start(tmp_path / "run.csv")
    go(*run, 3)
    with torch.no_grad():
        run[0].model[2].bias[1] = math.nan
    run[2]._calls = 5
    with pytest.raises(
        FloatingPointError,
        match=r"training has diverged: parameter '2.bias' has entries that are NaN or infinite at "
        r"step 6; the 1 readings before stand \(they are in .*run.csv'\). Lower the learning rate",
    ):
        run[2].step()
    assert [row.step for row in read_csv(tmp_path / "run.csv")] == [3]


def test_closing_lets_go_of_the_optimizer():
    risk = classifier(40)
    optimizer = sgd(risk)
    StabilityMonitor(risk, optimizer).close()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
