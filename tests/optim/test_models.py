"""Models of many kinds, and odd ways to treat them, under every method."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvlib.optim.kfac import KFAC
from curvlib.optim.mkor import MKOR
from tests.optim.cases import OPTIMIZERS, OptimizerCase
from tests.optim.small import F64, batches, distance, loss_of, net, same, train, trained, weights

each = pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)
#: One row for each method.
METHODS = [
    case
    for case in OPTIMIZERS
    if case.name in ("adahessian", "sophia-g", "sophia-h", "mfac", "kfac", "e-kfac", "mkor")
]


class Recurrent(nn.Module):
    def __init__(self, kind: str, *, batch_first: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6, padding_idx=0)
        self.inner = getattr(nn, kind)(6, 5, batch_first=batch_first)
        self.head, self.batch_first = nn.Linear(5, 4), batch_first

    def forward(self, x: Tensor) -> Tensor:
        rows = self.table(x)
        out, _ = self.inner(rows if self.batch_first else rows.transpose(0, 1))
        return self.head(out if self.batch_first else out.transpose(0, 1)).transpose(1, 2)


class Transformer(nn.Module):
    """PyTorch's own, time first, with its padding mask; the head is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=False)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        rows = self.table(x).transpose(0, 1)
        out = self.encoder(rows, src_key_padding_mask=x == 0).transpose(0, 1)
        return self.head(out).transpose(1, 2)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.GroupNorm(2, 4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3, groups=2, bias=False),
            nn.BatchNorm2d(4),
            nn.GELU(),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(16, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def numbers(*shape: int, below: int = 0, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    if below:
        return torch.randint(below, shape, generator=g)
    return torch.randn(shape, generator=g, dtype=F64)


TOKENS = numbers(6, 6, below=9)  # as many steps as examples
TOKENS[0, 4:] = 0
TAGS = numbers(6, 6, below=4, seed=1).masked_fill(TOKENS == 0, -100)
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, Tensor]] = {
    "lstm": (lambda: Recurrent("LSTM", batch_first=True), TOKENS, TAGS),
    "gru, time first": (lambda: Recurrent("GRU", batch_first=False), TOKENS, TAGS),
    "transformer": (Transformer, TOKENS, TAGS),
    "convolutions": (Convolutions, numbers(6, 2, 4, 4), numbers(6, below=4)),
}


def made(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return MODELS[name][0]().double()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("case", METHODS, ids=lambda case: case.name)
def test_models_of_many_kinds_train(case: OptimizerCase, name: str) -> None:
    model, (_, x, y) = made(name), MODELS[name]
    opt = case.build(model, None)
    with torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(0)
        losses = [
            float(opt.step(lambda n=n: F.cross_entropy(model(x[:n]), y[:n])))
            for n in (6, 6, 5, 2, 6, 3) * 4  # unequal batches
        ]
    assert opt.skipped == 0
    assert losses[-2] < 0.98 * losses[0]  # of the whole data, both


@pytest.mark.parametrize("build", [KFAC, MKOR])
@pytest.mark.parametrize("name", ["lstm", "gru, time first", "transformer"])
def test_maps_inside_of_modules_are_covered(name: str, build: Any) -> None:
    model, (_, x, y) = made(name), MODELS[name]
    opt = build(model)
    with sdpa_kernel(SDPBackend.MATH):
        opt.step(lambda: F.cross_entropy(model(x), y))
    inside = {n for n, _ in model.named_parameters() if "inner" in n or "self_attn" in n}
    assert inside
    assert inside <= set(opt.coverage().covered)
    uncovered = set(opt.coverage().uncovered)
    scales = {n for n, _ in model.named_parameters() if "norm" in n}
    tied = {"table.weight"} if name == "transformer" else set()
    assert uncovered == (set() if build is KFAC else scales | tied)


# ----------------------------------------------------------------------------- lifetimes
@each
def test_pickled_together_they_go_on(case: OptimizerCase) -> None:
    model, data = net(), batches(6)
    opt = case.build(model, None)
    train(opt, model, data[:1])
    other, twin = pickle.loads(pickle.dumps((model, opt)))
    assert same(train(twin, other, data[1:]), train(opt, model, data[1:]))


@each
def test_a_model_is_pickled_and_copied_alone(case: OptimizerCase) -> None:
    model, data = net(), batches(4)
    opt = case.build(model, None)  # whose hooks are on the model now
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (torch.load(file, weights_only=False), copy.deepcopy(model)):
        loss_of(twin, data[0]).backward()  # leaves no trace
    assert same(train(opt, model, data), trained(case, 4))


@each
def test_loading_forgets_what_was_gathered(case: OptimizerCase) -> None:
    model, data = net(), batches(8)
    opt = case.build(model, None)
    train(opt, model, data[:3])
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    expected = train(opt, model, data[3:])
    opt.backward(loss_of(model, data[0]))
    model.load_state_dict(saved[0])
    opt.load_state_dict(saved[1])
    assert same(train(opt, model, data[3:]), expected)


@each
def test_two_optimizers_share_a_model(case: OptimizerCase) -> None:
    model, data = net(), batches(6)
    one, two = (case.build(model, model[i].parameters()) for i in (0, 2))
    for batch in data:
        one.zero_grad()
        two.zero_grad()
        loss = loss_of(model, batch)
        one.observe(loss)
        two.observe(loss)
        loss.backward()
        one.step()
        two.step()
    before = weights(net())
    assert all(distance([a], [b]) > 0 for a, b in zip(weights(model), before, strict=True))
    assert (one.skipped, two.skipped, one.clock.steps, two.clock.steps) == (0, 0, 6, 6)


# ------------------------------------------------------------------------- odd losses
@each
def test_gradient_penalties(case: OptimizerCase) -> None:
    """The gradient of an input inside of the loss is not the loss's own."""
    model, data = net(), batches(5)
    opt = case.build(model, None)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        own = F.cross_entropy(model(x), y)
        (slope,) = torch.autograd.grad(own, x, create_graph=True)
        return own + slope.square().sum()

    for x, y in data:
        opt.step(lambda x=x, y=y: loss(x, y))
    assert (opt.clock.steps, opt.skipped) == (5, 0)


def test_hessian_products_of_others_leave_factors_alone() -> None:
    def factors(products: bool) -> Tensor:
        model, (batch,) = net(), batches(1)
        opt = KFAC(model)
        loss = loss_of(model, batch)
        if products:
            torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        loss.backward()
        opt.step()
        return opt.layers["0"].left

    assert torch.equal(factors(True), factors(False))


@each
def test_models_without_any_layer_have_first_order_steps(case: OptimizerCase) -> None:
    norm = torch.nn.utils.parametrizations.weight_norm
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(norm(nn.Linear(3, 5, bias=False)), nn.Tanh())
        model.append(norm(nn.Linear(5, 3, bias=False))).double()
    opt, (batch,) = case.build(model, None), batches(1)
    losses = [float(opt.step(lambda: loss_of(model, batch))) for _ in range(10)]
    assert losses[-1] < losses[0]
    assert opt.skipped == 0
    if isinstance(opt, (KFAC, MKOR)):
        assert opt.coverage().percent == 0.0


@each
def test_examples_without_a_batch_axis_and_several_passes(case: OptimizerCase) -> None:
    model, data = net(), batches(6)
    opt = case.build(model, None)
    for (x, y), (u, v) in zip(data[::2], data[1::2], strict=True):
        opt.step(lambda x=x, y=y: F.cross_entropy(model(x[0]), y[0]))
        opt.step(
            lambda x=x, y=y, u=u, v=v: F.cross_entropy(model(x), y) + F.cross_entropy(model(u), v)
        )
    assert (opt.clock.steps, opt.skipped) == (6, 0)


@pytest.mark.parametrize("case", METHODS, ids=lambda case: case.name)
def test_compiled_models_work_or_are_named(case: OptimizerCase) -> None:
    torch.compiler.reset()
    model, (batch,) = net(), batches(1)
    opt = case.build(model, None)
    compiled = torch.compile(model, backend="aot_eager")
    hooked = isinstance(opt, (KFAC, MKOR))
    if case.second_order or hooked:
        with pytest.raises(RuntimeError, match="the model is compiled|not compiled"):
            opt.step(lambda: loss_of(compiled, batch))
        assert opt.clock.steps == 0
    else:
        opt.step(lambda: loss_of(compiled, batch))
        assert distance(weights(model), trained(case, 1)) < case.tolerance
    if hooked:
        with pytest.raises(ValueError, match="hooks on layers do not run inside torch.compile"):
            case.build(compiled, None)
