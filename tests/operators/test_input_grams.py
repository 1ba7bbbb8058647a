"""Input Gram matrices against explicit rows: of loops, and of Jacobians of the layer's output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvlib as cl
from curvlib.operators.input_grams import InputGram, InputGrams, input_grams
from curvlib.operators.layers.inputs import layer_of
from tests.problems import Counting, snapshot

F64 = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def risk_of(model: nn.Module, inputs: list[Tensor], **settings: Any) -> cl.Risk:
    """A risk whose loss is a mean over everything the model puts out."""
    return cl.Risk(
        model.double(),
        lambda output, batch: output.square().mean(),
        inputs,
        forward=lambda m, batch: m(batch),
        weight=lambda batch: 1.0,
        **settings,
    )


def rows_by_jacobian(layer: nn.Module, x: Tensor) -> Tensor:
    """Rows ``[G, T, n]``: the derivative of one output of each group by its own weights."""
    conv = layer
    groups = getattr(layer, "groups", 1)

    def forward(weight: Tensor) -> Tensor:
        return torch.func.functional_call(conv, {"weight": weight}, (x,))

    weight = layer.weight.detach()
    J = torch.autograd.functional.jacobian(forward, weight)  # [*output, *weight]
    channel = x.ndim - weight.ndim + 1
    out = weight.shape[0]
    found = []
    for g in range(groups):
        o = g * (out // groups)
        of_one = J.select(channel, o)
        of_one = of_one.select(of_one.ndim - weight.ndim, o)  # by the weights of output o
        found.append(of_one.movedim(1 - weight.ndim, -1).reshape(-1, weight[0].numel()))
    return torch.stack(found)


CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1d": (nn.Conv1d(3, 2, 3, padding=1), (2, 3, 5)),
    "1d same, even kernel": (nn.Conv1d(2, 2, 4, padding="same", dilation=1), (2, 2, 6)),
    "1d unbatched": (nn.Conv1d(2, 3, 2, stride=2), (2, 7)),
    "1d depthwise": (nn.Conv1d(3, 3, 2, groups=3), (2, 3, 5)),
    "2d": (nn.Conv2d(2, 3, (3, 2), padding=(1, 0), stride=(2, 1)), (2, 2, 5, 4)),
    "2d groups": (nn.Conv2d(4, 6, 2, groups=2, bias=False), (3, 4, 3, 4)),
    "2d dilated": (nn.Conv2d(2, 2, 2, dilation=(2, 3), padding=2), (2, 2, 4, 5)),
    "2d same, dilated": (nn.Conv2d(1, 2, (2, 3), padding="same", dilation=3), (2, 1, 6, 7)),
    "2d valid": (nn.Conv2d(2, 2, 2, padding="valid"), (2, 2, 3, 3)),
    "2d circular": (nn.Conv2d(2, 2, 3, padding=(2, 1), padding_mode="circular"), (2, 2, 4, 4)),
    "2d reflect": (nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect", groups=2), (2, 2, 4, 4)),
    "2d replicate, same": (
        nn.Conv2d(1, 2, (2, 4), padding="same", padding_mode="replicate"),
        (2, 1, 4, 5),
    ),
    "3d": (nn.Conv3d(2, 2, (2, 1, 3), padding=(1, 0, 1), stride=(1, 2, 1)), (2, 2, 3, 3, 3)),
    "3d groups": (nn.Conv3d(2, 4, 2, groups=2, dilation=(1, 2, 1)), (1, 2, 3, 4, 3)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str) -> None:
    layer, shape = CONVOLUTIONS[name]
    batches = [draw(*shape, seed=1), draw(*shape, seed=2)]
    found = input_grams(risk_of(layer, batches))["weight"]
    rows = torch.cat([rows_by_jacobian(layer, x) for x in batches], dim=1)
    assert found.count == rows.shape[1]
    assert torch.allclose(found.stacked, rows.mT @ rows / found.count, rtol=1e-13, atol=1e-14)
    assert torch.allclose(found.mean.reshape(len(rows), -1), rows.mean(1), rtol=1e-12, atol=1e-14)
    assert found.gram.dtype == F64
    assert torch.equal(found.gram, found.gram.mT)
    assert found.groups == layer.groups
    assert found.gram.ndim == (2 if layer.groups == 1 else 3)
    # rows times the matrix are the layer's outputs
    W = found.matrix(layer.weight.detach())
    out = torch.func.functional_call(
        layer,
        {"bias": None} if layer.bias is None else {"bias": torch.zeros_like(layer.bias)},
        (batches[0],),
    )
    out = out if out.ndim == layer.weight.ndim else out[None]
    by_rows = rows[:, : found.count // 2] @ W.mT  # [G, T, out / G]
    expected = out.detach().unflatten(1, (layer.groups, -1)).movedim(2, -1).transpose(0, 1)
    assert torch.allclose(by_rows, expected.reshape(by_rows.shape), rtol=1e-12, atol=1e-13)
    assert torch.equal(found.weight(W), layer.weight)


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3), (2, 2, 3, 3)])
def test_linear(shape: tuple[int, ...]) -> None:
    batches = [draw(*shape, seed=1), draw(1, *shape[1:], seed=2)]
    found = input_grams(risk_of(nn.Linear(3, 2), batches))["weight"]
    gram, total, count = torch.zeros(3, 3, dtype=F64), torch.zeros(3, dtype=F64), 0
    for batch in batches:
        for row in batch.reshape(-1, 3):
            gram, total, count = gram + torch.outer(row, row), total + row, count + 1
    assert found.count == count
    assert torch.allclose(found.gram, gram / count, rtol=1e-13, atol=1e-15)
    assert torch.allclose(found.mean, total / count, rtol=1e-13, atol=1e-15)
    assert found.kind == "linear"


def test_one_row_without_batch_axis() -> None:
    found = input_grams(risk_of(nn.Linear(3, 2), [draw(3)]))["weight"]
    assert torch.allclose(found.gram, torch.outer(draw(3), draw(3)))
    assert found.count == 1


class Conv1D(nn.Module):
    """As in GPT-2 of transformers, by name and layout of the weight."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(draw(nx, nf))
        self.bias = nn.Parameter(draw(nf))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.shape[:-1], self.nf)


def check_transposed(layer: nn.Module) -> None:
    x = draw(2, 5, 3)
    found = input_grams(risk_of(layer, [x]))["weight"]
    rows = x.reshape(-1, 3)
    assert found.kind == "transposed"
    assert torch.allclose(found.gram, rows.T @ rows / 10)
    W = found.matrix(layer.weight.detach())
    assert W.shape == (1, 4, 3)
    assert torch.allclose(rows @ W[0].T + layer.bias, layer(x).reshape(-1, 4))
    assert torch.equal(found.weight(W), layer.weight)


def test_transposed_weights() -> None:
    check_transposed(Conv1D(4, 3))


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_transposed_weights_of_transformers() -> None:
    pytest.importorskip("transformers", reason="pip install 'curvlib[hf]'")
    from transformers.pytorch_utils import Conv1D as Theirs

    layer = Theirs(4, 3)
    with torch.no_grad():
        layer.bias.copy_(draw(4))
    check_transposed(layer.double())


class Twice(nn.Module):
    """One layer called twice, and another that shares its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        self.seen = [x.detach()]
        for layer in (self.a, self.a, self.b):
            x = layer(input=x).tanh()
            self.seen.append(x.detach())
        return x


def test_repeated_and_tied_layers_are_summed() -> None:
    model = Twice()
    found = input_grams(risk_of(model, [draw(4, 3)]))
    rows = torch.cat(model.seen[:3])
    assert list(found) == ["a.weight"]
    assert found.uncovered == {}
    assert found["a.weight"].count == 12
    assert torch.allclose(found["a.weight"].gram, rows.T @ rows / 12, rtol=1e-13)


def test_bits_do_not_depend_on_chunks_beyond_rounding_nor_on_batches() -> None:
    model, x = nn.Conv2d(2, 3, 3), draw(6, 2, 5, 5)
    whole = input_grams(risk_of(model, [x]))["weight"]
    chunks = input_grams(risk_of(model, list(x.split(4))), memory=1)["weight"]
    assert torch.allclose(whole.gram, chunks.gram, rtol=1e-13, atol=1e-15)
    assert whole.count == chunks.count
    linear, rows = nn.Linear(5, 3), draw(6, 2, 5)
    first = input_grams(risk_of(linear, [rows]))["weight"]
    again = input_grams(risk_of(linear, [rows]), memory=1)["weight"]
    assert torch.allclose(first.gram, again.gram, rtol=1e-13, atol=1e-15)


def test_low_precision_models_have_exact_sums() -> None:
    model = nn.Linear(4, 2).to(torch.bfloat16)
    x = draw(300, 4).to(torch.bfloat16)
    risk = cl.Risk(model, nn.MSELoss(), (x, torch.zeros(300, 2, dtype=torch.bfloat16)))
    found = input_grams(risk)["weight"]
    assert torch.allclose(found.gram, x.double().T @ x.double() / 300, rtol=1e-14)
    assert input_grams(risk, dtype=torch.float32)["weight"].gram.dtype == torch.float32


def test_masks() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Flatten(0, 1), nn.Linear(3, 2))
    x = draw(2, 4, 3)
    x[0, 2:] = torch.nan
    x[1, 3:] = torch.inf
    kept = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]).bool()

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = model, nn.Linear(2, 1)

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.head(self.body(batch["x"]).unflatten(0, (2, 4)).nan_to_num().sum(1))

    risk = risk_of(Pooled(), [{"x": x, "mask": kept}])
    found = input_grams(risk, mask=lambda batch: batch["mask"])
    rows = x[kept]
    assert found["body.0.weight"].count == 5
    assert torch.allclose(found["body.0.weight"].gram, rows.T @ rows / 5)
    inner = model[0](rows).tanh().detach()
    assert torch.allclose(found["body.3.weight"].gram, inner.T @ inner / 5)
    assert found["head.weight"].count == 2  # one row for each example: all count
    conv = nn.Conv1d(2, 3, 3, padding=1)
    images = draw(2, 2, 4)
    of_places = input_grams(risk_of(conv, [images]), mask=lambda batch: kept, memory=1)["weight"]
    patches = rows_by_jacobian(conv, images)[0][kept.reshape(-1)]
    assert torch.allclose(of_places.gram, patches.T @ patches / 5)


# --------------------------------------------------------------- what is not covered
class Elsewhere(nn.Module):
    """Weights that are used where no hook of their module sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(3, 3)
        self.functional = nn.Linear(3, 3)
        self.both = nn.Linear(3, 3)
        self.joined = nn.Linear(3, 3)
        self.idle = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.loose = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(self.plain(x), self.functional.weight)
        x = F.linear(self.both(x), self.both.weight.T)
        x = self.joined(x) @ torch.cat([self.joined.weight, self.plain.bias[None]])[:3]
        assert self.idle.weight.requires_grad
        assert self.plain.weight.size(0) == self.plain.weight.stride(0) == 3
        return self.norm(x) * self.loose


def test_uses_that_hooks_do_not_see_are_not_covered() -> None:
    found = input_grams(risk_of(Elsewhere(), [draw(2, 3)]))
    assert list(found) == ["plain.weight"]
    reasons = found.uncovered
    assert (
        "called 0 times, but the weight was used 1 times (linear)" in reasons["functional.weight"]
    )
    assert "called 1 times, but the weight was used 2 times" in reasons["both.weight"]
    assert "called 1 times, but the weight was used 2 times" in reasons["joined.weight"]
    assert reasons["idle.weight"] == "its module was never called"
    assert (
        "it belongs to LayerNorm; curvlib knows the input rows of Linear" in reasons["norm.weight"]
    )
    assert "it belongs to Elsewhere" in reasons["loose"]
    assert reasons["idle.bias"] == "it is no weight, but 'bias' of Linear"
    assert "plain.bias" not in reasons


@pytest.mark.filterwarnings("ignore:curvlib. scaled_dot_product:UserWarning")
def test_attention_layers_are_not_covered_by_half() -> None:
    model = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dropout=0.0)
    found = input_grams(risk_of(model, [draw(2, 3, 4)]))
    assert list(found) == ["linear1.weight", "linear2.weight"]
    assert "multi_head_attention_forward" in found.uncovered["self_attn.out_proj.weight"]
    assert "MultiheadAttention" in found.uncovered["self_attn.in_proj_weight"]


def test_layers_with_a_forward_of_their_own_are_not_known() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2.0 * x)

    class Kept(nn.Linear):
        pass

    class Inner(nn.Conv2d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(2.0 * x, weight, bias)

    replaced = nn.Linear(2, 2)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    assert layer_of(Doubled(2, 2)) is None
    assert layer_of(Kept(2, 2)) == layer_of(nn.Linear(2, 2))
    assert layer_of(Inner(1, 1, 1)) is None
    assert layer_of(replaced) is None
    assert layer_of(nn.ConvTranspose2d(2, 2, 2)) is None
    assert layer_of(nn.Embedding(2, 2)) is None
    assert layer_of(nn.ReLU()) is None
    assert layer_of(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))) is None


def test_embeddings_that_share_a_linear_weight_are_not_covered() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.body, self.head = (
                nn.Embedding(5, 3),
                nn.Linear(3, 3),
                nn.Linear(3, 5, bias=False),
            )
            self.head.weight = self.table.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.body(self.table(tokens)))

    found = input_grams(risk_of(Tied(), [torch.tensor([[0, 1], [2, 4]])]))
    assert list(found) == ["body.weight"]
    assert "it belongs to Embedding and Linear;" in found.uncovered["table.weight"]


def test_names_select() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    risk = risk_of(model, [draw(4, 3)])
    assert list(input_grams(risk, "2.weight")) == ["2.weight"]
    globbed = input_grams(risk, ["*.weight"])
    assert list(globbed) == ["0.weight", "2.weight"]
    assert list(globbed.uncovered) == ["1.weight"]
    partial = input_grams(risk_of(model, [draw(4, 3)], params=["2.*"]))
    assert list(partial) == ["2.weight"]
    assert isinstance(partial, InputGrams)


# ------------------------------------------------------------------ model and data
def test_the_model_is_left_as_it_is_and_data_are_read_once() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8, 2)
    ).double()
    doubled: list[int] = []

    def double(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        doubled.append(1)
        return (2.0 * args[0],)

    model[4].register_forward_pre_hook(double)  # the user's hook comes first
    data = Counting([draw(3, 1, 3, 3, seed=k) for k in range(2)])
    risk = risk_of(model, data)  # type: ignore[arg-type]
    seen: list[Tensor] = []
    handle = model[3].register_forward_hook(lambda m, a, out: seen.append(out.detach()))
    before = snapshot(model)
    found = input_grams(risk)
    before.assert_same(snapshot(model))
    assert (data.passes, len(doubled)) == (1, 2)
    rows = 2.0 * torch.cat(seen)
    assert torch.allclose(found["4.weight"].gram, rows.T @ rows / 6)
    handle.remove()


def test_hooks_are_gone_after_an_exception() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.layer(x)
            raise KeyError("of the model")

    model = Failing()
    risk = risk_of(model, [draw(2, 3)])
    before = snapshot(model)
    with pytest.raises(KeyError, match="of the model"):
        input_grams(risk)
    before.assert_same(snapshot(model))


def test_saved_and_loaded(tmp_path: Any) -> None:
    found = input_grams(risk_of(nn.Conv2d(4, 4, 2, groups=2), [draw(2, 4, 3, 3)]))["weight"]
    again = InputGram.load(found.save(tmp_path / "gram.safetensors"))
    assert torch.equal(again.gram, found.gram)
    assert again.layer == found.layer
    assert "gram=[2, 8, 8]" in repr(found)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    model, x = nn.Conv2d(4, 6, 3, groups=2, padding="same"), draw(3, 4, 5, 5)
    expected = input_grams(risk_of(model, [x]))["weight"]
    found = input_grams(risk_of(model.cuda(), [x]))["weight"]
    assert found.gram.is_cuda
    assert torch.allclose(found.gram.cpu(), expected.gram, rtol=1e-12)


# --------------------------------------------------------------------------- errors
def test_errors_of_arguments() -> None:
    risk = risk_of(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), [draw(2, 3)])
    with pytest.raises(
        TypeError, match=r"dtype= is torch\.float32 or torch\.float64, got torch\.b"
    ):
        input_grams(risk, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="memory= is a positive number of bytes, got 0"):
        input_grams(risk, memory=0)
    with pytest.raises(ValueError, match=r"'7\.\*' in names= selects no parameter; there are \['0"):
        input_grams(risk, ["0.weight", "7.*"])
    with pytest.raises(
        ValueError, match=r"'1\.weight' has no input Gram matrix: it belongs to Laye"
    ):
        input_grams(risk, ["0.weight", "1.weight"])
    with pytest.raises(ValueError, match=r"'0\.bias' has no input Gram matrix: it is no weight"):
        input_grams(risk, "0.bias")
    with pytest.raises(
        ValueError, match=r"no weight has input rows that curvlib knows \('1\.weight'"
    ):
        input_grams(risk, "1.*")
    other = risk_of(Elsewhere(), [draw(2, 3)])
    with pytest.raises(
        ValueError, match=r"'idle\.weight' has no input Gram .* never called; leave"
    ):
        input_grams(other, "idle.weight")


def test_errors_of_masks() -> None:
    risk = risk_of(nn.Linear(3, 3), [draw(2, 4, 3)])
    with pytest.raises(
        TypeError, match=r"mask= returned a list of 1 \(int\); it should return a bo"
    ):
        input_grams(risk, mask=lambda batch: [1])  # type: ignore[arg-type,return-value]
    with pytest.raises(
        TypeError, match=r"mask= returned a tensor of torch\.int64; .*mask\.bool\(\)"
    ):
        input_grams(risk, mask=lambda batch: torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(
        ValueError, match=r"mask= returned shape \[4, 2\], but .* have rows \[2, 4\]"
    ):
        input_grams(risk, mask=lambda batch: torch.ones(4, 2).bool())
    with pytest.raises(ValueError, match="'weight': no row of its inputs counts"):
        input_grams(risk, mask=lambda batch: torch.zeros(2, 4).bool())


def test_numbers_that_are_not_finite_are_named() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    batches = [draw(2, 3), draw(2, 3)]
    batches[1][0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match=r"weight '0\.weight' are not finite at batch 1"):
        input_grams(risk_of(model, batches))


def test_errors_of_weights() -> None:
    found = input_grams(risk_of(nn.Linear(3, 2), [draw(2, 3)]))["weight"]
    with pytest.raises(ValueError, match=r"expected a weight of shape \[2, 3\], got \[3, 2\]"):
        found.matrix(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"expected a matrix of shape \[1, 2, 3\], got \[3, 2\]"):
        found.weight(torch.zeros(3, 2))
