"""``risk.check()``: each fault planted, found, named with the way out; and no false alarms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import curvlib as cl
from tests.cases import CASES, build
from tests.problems import Counting, risk_of, snapshot

pytestmark = pytest.mark.filterwarnings("ignore:curvlib. .*:UserWarning")

F64 = torch.float64
CE = nn.CrossEntropyLoss()
SOUND = [n for n in CASES if not n.startswith("BatchNorm")]


def _model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def _data(n: int = 8) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, dtype=F64, generator=g), torch.randint(3, (n,), generator=g)


def _found(risk: cl.Risk, kind: str) -> Any:
    report = risk.check()
    assert not report.ok
    (finding,) = [f for f in report.findings if f.kind == kind]
    assert finding.message in str(report)
    assert finding.remedy in str(report)
    return finding


# ------------------------------------------------------------------- no false alarms
@pytest.mark.parametrize("name", SOUND)
def test_sound_problems_pass(name: str) -> None:
    case = build(name)
    before = snapshot(case.model)
    report = risk_of(case).check()
    assert report.ok, str(report)
    assert report.asymmetry < 1e-12
    assert report.derivative_error < 1e-7
    assert "nothing wrong found" in str(report)
    snapshot(case.model).assert_same(before)


@pytest.mark.parametrize("name", ["mlp ce", "LayerNorm ce", "LSTM", "sdpa", "encoder eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sound_problems_pass_in_shorter_types(name: str, dtype: torch.dtype) -> None:
    case = build(name)
    data = [
        tuple(t.to(dtype) if t.is_floating_point() else t for t in batch) for batch in case.data
    ]
    report = cl.Risk(case.model.to(dtype), case.loss, data).check()
    if dtype == torch.float32:
        assert report.ok, str(report)
    else:
        assert not {"dropout", "batch statistics", "data", "reduction"} & {
            f.kind for f in report.findings
        }


# ------------------------------------------------------------------------------ modes
def test_dropout_in_training_mode() -> None:
    model = nn.Sequential(_model(), nn.Dropout(0.3))
    before = snapshot(model)
    finding = _found(cl.Risk(model, CE, _data()), "dropout")
    assert "'1'" in finding.message or " 1" in finding.message
    assert "model.eval()" in finding.remedy
    snapshot(model).assert_same(before)
    assert cl.Risk(model.eval(), CE, _data()).check().ok


def test_dropout_inside_other_modules() -> None:
    lstm = nn.LSTM(3, 4, num_layers=2, dropout=0.5, batch_first=True).double()
    x, y = torch.randn(4, 5, 3, dtype=F64), torch.randint(4, (4,))
    risk = cl.Risk(lstm, CE, (x, y), forward=lambda m, b: m(b[0])[0][:, -1])
    _found(risk, "dropout")
    attention = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True).double()
    x = torch.randn(4, 5, 4, dtype=F64)
    risk = cl.Risk(attention, CE, (x, y), forward=lambda m, b: m(b[0], b[0], b[0])[0].mean(1))
    _found(risk, "dropout")


@pytest.mark.parametrize("name", ["BatchNorm1d train", "BatchNorm2d train"])
def test_batch_statistics(name: str) -> None:
    case = build(name)
    before = snapshot(case.model)
    report = risk_of(case).check()
    assert [f.kind for f in report.findings] == ["batch statistics"]
    assert "model.eval()" in report.findings[0].remedy
    snapshot(case.model).assert_same(before)


def test_randomness_that_no_module_declares() -> None:
    def forward(m: nn.Module, batch: Any) -> Tensor:
        out = m(batch[0])
        return out + 0.1 * torch.randn_like(out)

    finding = _found(cl.Risk(_model(), CE, _data(), forward=forward), "randomness")
    assert "torch.rand" in finding.remedy


def test_a_model_that_counts() -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = _model()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.body(x) * (1 + 0.1 * self.calls)

    _found(cl.Risk(Growing(), CE, _data()), "randomness")


# ------------------------------------------------------------------------------- data
def test_a_shuffling_loader() -> None:
    loader = DataLoader(TensorDataset(*_data()), batch_size=3, shuffle=True)
    before = torch.get_rng_state()
    finding = _found(cl.Risk(_model(), CE, loader), "data")
    assert "shuffle=False" in finding.remedy
    assert torch.equal(before, torch.get_rng_state())
    assert cl.Risk(_model(), CE, list(loader)).check().ok


def test_batches_in_another_order() -> None:
    x, y = _data()

    class Turning:
        turn = 0

        def __iter__(self) -> Iterator[Any]:
            self.turn += 1
            batches = [(x[:3], y[:3]), (x[3:], y[3:])]
            return iter(batches[:: 1 if self.turn % 2 else -1])

    finding = _found(cl.Risk(_model(), CE, Turning()), "data")
    assert "order" in finding.message


def test_augmentation() -> None:
    x, y = _data()

    class Augmented(Dataset[Any]):
        def __len__(self) -> int:
            return len(x)

        def __getitem__(self, i: int) -> Any:
            return x[i] + 0.1 * torch.randn(3, dtype=F64), y[i]

    loader = DataLoader(Augmented(), batch_size=4)
    assert "augmentation" in _found(cl.Risk(_model(), CE, loader), "data").message


# -------------------------------------------------------------------------- reduction
def test_a_sum_that_is_taken_for_a_mean() -> None:
    x, y = _data()
    target = F.one_hot(y, 3).double()
    risk = cl.Risk(_model(), lambda out, t: (out - t).square().sum(), (x, target))
    finding = _found(risk, "reduction")
    assert "reduction='sum'" in finding.remedy
    settled = cl.Risk(
        _model(), lambda out, t: (out - t).square().sum(), (x, target), reduction="sum"
    )
    assert settled.check().ok


def test_a_mean_over_unmasked_targets() -> None:
    x, y = _data()
    y = y.clone()
    y[:3] = -1
    loss = lambda out, t: F.cross_entropy(out, t, ignore_index=-1)  # noqa: E731
    assert "weight=" in _found(cl.Risk(_model(), loss, (x, y)), "reduction").remedy
    weighed = cl.Risk(_model(), loss, (x, y), weight=lambda b: (b[1] != -1).sum())
    assert weighed.check().ok


# ----------------------------------------------------------------- second derivatives
class _Wrong(torch.autograd.Function):
    """``sin`` whose gradient is right and whose second derivative is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * x.detach().cos()


def test_a_second_derivative_that_is_wrong() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(_Wrong.apply(self.body(x)))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        risk = cl.Risk(Net().double(), CE, _data())
    report = risk.check()
    assert report.derivative_error > 1e-2
    assert {f.kind for f in report.findings} & {"derivative", "symmetry"}


def test_a_product_that_is_not_symmetric() -> None:
    """A gradient that is not the gradient of anything."""

    class Skewed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return g * (1 + x.roll(1, -1))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(Skewed.apply(torch.tanh(self.body(x))))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        risk = cl.Risk(Net().double(), CE, _data())
    finding = _found(risk, "symmetry")
    assert "custom autograd functions" in finding.remedy
    assert risk.check().asymmetry > 1e-6


# ------------------------------------------------------------------------------- cost
def test_the_work_of_a_check() -> None:
    x, y = _data()
    data = Counting([(x[:3], y[:3]), (x[3:], y[3:])])
    cl.Risk(_model(), CE, data).check()
    assert data.batches <= 2 * 2 + 2  # two passes, and the first batch twice


def test_a_seed_is_one_report() -> None:
    risk = risk_of(build("mlp ce"))
    assert risk.check(seed=1) == risk.check(seed=1)


def test_several_faults_are_all_named() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3))
    loader = DataLoader(TensorDataset(*_data()), batch_size=4, shuffle=True)
    report = cl.Risk(model.double(), CE, loader).check()
    assert {f.kind for f in report.findings} == {"dropout", "batch statistics", "data"}
    assert str(report).startswith("3 found")
    assert str(report).count("What to do:") == 3
