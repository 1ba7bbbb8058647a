"""The check finds what makes curvature meaningless, and errors name where numbers break."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import curvlib as cl
from tests.problems import snapshot

F64 = torch.float64


def _data(n: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(n, 4, generator=generator, dtype=F64),
        torch.randint(0, 3, (n,), generator=generator),
    )


def _model(*middle: nn.Module) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), *middle, nn.Tanh(), nn.Linear(5, 3)).to(F64)


def _kinds(risk: cl.Risk) -> list[str]:
    return [finding.kind for finding in risk.check().findings]


@pytest.mark.parametrize("split", [12, 5])
def test_nothing_is_found_where_nothing_is_wrong(split: int):
    x, y = _data()
    data = [(x[:split], y[:split]), (x[split:], y[split:])] if split < 12 else (x, y)
    model = _model(nn.LayerNorm(5), nn.BatchNorm1d(5).eval(), nn.Dropout().eval())
    before = snapshot(model)
    report = cl.Risk(model, nn.CrossEntropyLoss(), data).check()
    assert report.ok, str(report)
    assert report.asymmetry < 1e-12
    assert report.derivative_error < 1e-6
    assert str(report).startswith("nothing wrong found")
    snapshot(model).assert_same(before)


def test_float32_is_not_mistaken_for_an_error():
    x, y = _data()
    risk = cl.Risk(_model(nn.GELU()).float(), nn.CrossEntropyLoss(), (x.float(), y))
    assert risk.check().ok


@pytest.mark.parametrize(
    "module", [nn.Dropout(0.5), nn.RReLU(), nn.AlphaDropout(0.3)], ids=lambda m: type(m).__name__
)
def test_dropout(module: nn.Module):
    model = _model(module)
    before = snapshot(model)
    risk = cl.Risk(model, nn.CrossEntropyLoss(), _data())
    report = risk.check()
    assert [f.kind for f in report.findings] == ["dropout"]
    assert "draw at random: 1" in report.findings[0].message
    assert "model.eval()" in report.findings[0].remedy
    assert "What to do: model.eval()" in str(report)
    snapshot(model).assert_same(before)


def test_dropout_inside_attention_and_recurrent_modules():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(4, 5, num_layers=2, dropout=0.2)
            self.attention = nn.MultiheadAttention(5, 1, dropout=0.1)
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.rnn(x)[0]
            return self.head(self.attention(h, h, h)[0])

    model = Net().to(F64)
    findings = cl.Risk(model, nn.CrossEntropyLoss(), _data()).check().findings
    assert [f.kind for f in findings] == ["dropout"]
    assert "rnn, attention" in findings[0].message
    assert _kinds(cl.Risk(model.eval(), nn.CrossEntropyLoss(), _data())) == []


def test_batch_statistics():
    model = _model(nn.BatchNorm1d(5))
    risk = cl.Risk(model, nn.CrossEntropyLoss(), _data())
    (finding,) = risk.check().findings
    assert finding.kind == "batch statistics"
    assert "normalize by batch: 1" in finding.message
    assert _kinds(cl.Risk(model.eval(), nn.CrossEntropyLoss(), _data())) == []


def test_loaders_that_shuffle():
    x, y = _data()
    shuffled = DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True)
    (finding,) = cl.Risk(_model(), nn.CrossEntropyLoss(), shuffled).check().findings
    assert finding.kind == "data"
    assert "shuffle=False" in finding.remedy
    plain = DataLoader(TensorDataset(x, y), batch_size=5)
    assert cl.Risk(_model(), nn.CrossEntropyLoss(), plain).check().ok


def test_batches_in_another_order_are_told_apart_from_other_batches():
    x, y = _data()
    one = DataLoader(TensorDataset(x, y), batch_size=1, shuffle=True)
    (finding,) = cl.Risk(_model(), nn.CrossEntropyLoss(), one).check().findings
    assert "same batches in different order" in finding.message


class Augmented(Dataset):  # type: ignore[type-arg]
    def __init__(self, source: str) -> None:
        self.x, self.y = _data()
        self.source = source

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(4) if self.source == "torch" else np.random.randn(4)  # noqa: NPY002
        return self.x[i] + torch.as_tensor(noise, dtype=F64), self.y[i]


@pytest.mark.parametrize("source", ["torch", "numpy"])
def test_random_augmentation(source: str):
    loader = DataLoader(Augmented(source), batch_size=4)
    (finding,) = cl.Risk(_model(), nn.CrossEntropyLoss(), loader).check().findings
    assert finding.kind == "data"
    assert "augmentation" in finding.message
    assert "list(loader)" in finding.remedy


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn(x.shape, dtype=x.dtype)


def test_randomness_that_no_module_admits():
    (finding,) = cl.Risk(_model(Noisy()), nn.CrossEntropyLoss(), _data()).check().findings
    assert finding.kind == "randomness"
    assert "model.eval()" in finding.remedy


@pytest.mark.parametrize(
    ("loss", "way_out"),
    [
        (lambda out, y: nn.functional.cross_entropy(out, y, reduction="sum"), "reduction='sum'"),
        (lambda out, y: nn.functional.cross_entropy(out, y, ignore_index=0), "weight="),
        (lambda out, y: (out.logsumexp(1).sum() - out[0, y[0]]) ** 2, "weight="),
    ],
    ids=["sum", "mask", "square"],
)
def test_losses_that_are_not_what_they_seem(loss: Any, way_out: str):
    (finding,) = cl.Risk(_model(), loss, _data()).check().findings
    assert finding.kind == "reduction"
    assert "not a mean over examples" in finding.message
    assert way_out in finding.remedy


def test_losses_whose_normalization_is_given_are_left_alone():
    loss = lambda out, y: nn.functional.cross_entropy(out, y, ignore_index=0)  # noqa: E731
    weight = lambda batch: (batch[1] != 0).sum()  # noqa: E731
    assert cl.Risk(_model(), loss, _data(), weight=weight).check().ok
    total = lambda out, y: nn.functional.cross_entropy(out, y, reduction="sum")  # noqa: E731
    assert cl.Risk(_model(), total, _data(), reduction="sum").check().ok


class Asymmetric(torch.autograd.Function):
    """x squared, whose backward mixes entries when it is differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x.detach() * g + g * (x.roll(1, dims=1) - x.roll(1, dims=1).detach())


class Cut(torch.autograd.Function):
    """x squared, whose backward has no derivative in x: symmetric, and wrong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0].detach() * g


class Custom(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


def test_wrong_second_derivatives():
    report = cl.Risk(_model(Custom(Asymmetric)), nn.CrossEntropyLoss(), _data()).check()
    assert [f.kind for f in report.findings] == ["symmetry", "derivative"]
    assert "custom autograd functions" in report.findings[0].remedy
    report = cl.Risk(_model(Custom(Cut)), nn.CrossEntropyLoss(), _data()).check()
    assert [f.kind for f in report.findings] == ["derivative"]
    assert report.asymmetry < 1e-12
    assert report.derivative_error > 1e-2
    assert "finite_difference" in report.findings[0].remedy


# ------------------------------------------------------------------ non-finite numbers
class Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.detach()).square().sum(1, keepdim=True).sqrt() + x


def _second_batch(change: Any) -> list[tuple[Tensor, Tensor]]:
    x, y = _data()
    z = x[6:].clone()
    change(z)
    return [(x[:6], y[:6]), (z, y[6:])]


def test_data_that_is_not_finite_is_named_by_batch():
    data = _second_batch(lambda z: z[2].fill_(torch.nan))
    model = _model()
    before = snapshot(model)
    with pytest.raises(FloatingPointError, match="the data of batch 1 is not finite; remove"):
        cl.Risk(model, nn.CrossEntropyLoss(), data).value()
    snapshot(model).assert_same(before)


def test_outputs_that_are_not_finite_are_named_by_layer_and_batch():
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.log()

    data = _second_batch(lambda z: z.fill_(-1.0))
    data[0] = (data[0][0].abs() + 0.1, data[0][1])
    model = nn.Sequential(nn.Identity(), Log(), nn.Linear(4, 3)).to(F64)
    with pytest.raises(FloatingPointError, match="output of layer '1' is not finite at batch 1"):
        cl.hessian(cl.Risk(model, nn.CrossEntropyLoss(), data)) @ torch.ones(15, dtype=F64)
    assert not any(m._forward_hooks for m in model.modules())


def test_losses_that_are_not_finite_are_named_by_batch():
    x, _ = _data()
    target = torch.zeros(12, 3, dtype=F64)
    target[7] = torch.inf
    data = [(x[:6], target[:6]), (x[6:], target[6:])]
    with pytest.raises(FloatingPointError, match=r"the (data|loss) of batch 1 is "):
        cl.Risk(_model(), nn.MSELoss(), data).gradient()
    loss = lambda out, t: ((out - t) ** 2).mean() / (t.sum() - t.sum())  # noqa: E731
    with pytest.raises(FloatingPointError, match="the loss of batch 0 is inf; look at"):
        cl.Risk(_model(), loss, (x, target[:6].repeat(2, 1))).value()


def test_gradients_that_are_not_finite_are_named_by_parameter():
    risk = cl.Risk(_model(Root()), nn.CrossEntropyLoss(), _data())
    assert torch.isfinite(risk.value())
    with pytest.raises(
        FloatingPointError, match=r"gradient of parameter '0\.weight' is not finite at batch 0"
    ):
        risk.gradient()


def test_second_derivatives_that_do_not_exist_are_told_apart():
    class Power(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x.detach()).abs() ** 1.5 + x

    risk = cl.Risk(_model(Power()), nn.CrossEntropyLoss(), _data())
    assert torch.isfinite(risk.gradient()).all()
    with pytest.raises(FloatingPointError, match="second derivative does not exist here"):
        cl.hessian(risk) @ torch.ones(risk.space.size, dtype=F64)


def test_vectors_that_are_not_finite():
    risk = cl.Risk(_model(), nn.CrossEntropyLoss(), _data())
    v = torch.ones(risk.space.size, dtype=F64)
    v[3] = torch.nan
    with pytest.raises(FloatingPointError, match="the vectors are not finite or too large"):
        cl.hessian(risk) @ v


def test_large_sums_are_not_mistaken_for_infinity():
    model = nn.Linear(4, 1, bias=False)
    risk = cl.Risk(model, lambda out, y: (out * 2e38).mean(), (torch.ones(1, 4), torch.ones(1)))
    assert risk.gradient().tolist() == pytest.approx([2e38] * 4)  # their sum overflows
