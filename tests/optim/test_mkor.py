"""MKOR on networks: steps re-derived, layers of all kinds, half precision, the hybrid's switch."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvlib.operators.layers.recorder import LayerRecorder
from curvlib.operators.layers.vectors import Signs, row_sums, summable, vectors
from curvlib.optim.mkor import MKOR
from curvlib.optim.rules import mkor
from tests.optim.small import F64, batches, equal, loss_of, net, same, train, weights


def seeded(build: Any, seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# ------------------------------------------------------------------ what rows add up to
def recorded(model: nn.Module, loss: Any) -> tuple[Any, Any]:
    found: list[Any] = []
    recorder = LayerRecorder(model, sink=found.append)
    recorder.start()
    loss(model).backward()
    recorder.flush()
    recorder.close()
    return recorder, found[0]


LAYERS = {
    "linear": (lambda: nn.Linear(3, 4), lambda: drawn(6, 3)),
    "linear, shared over tokens": (lambda: nn.Linear(3, 4), lambda: drawn(6, 5, 3)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, padding=1, stride=2), lambda: drawn(6, 2, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), groups=2), lambda: drawn(6, 4, 5, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), lambda: drawn(6, 2, 3, 3, 4)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_mean_vectors_are_means_of_rows(kind: str) -> None:
    model, x = seeded(LAYERS[kind][0]).double(), LAYERS[kind][1]()
    recorder, found = recorded(model, lambda m: m(x).sin().sum() / len(x))
    layer = recorder.layers[0]
    sums = row_sums(layer, found, F64)
    left, right = vectors(layer, sums, signed=False)
    # the sum of gradients at the outputs is the gradient by the bias
    torch.testing.assert_close(left.flatten(), model.bias.grad)
    # a layer is linear, and so the mean of its outputs is that of its mean input
    G, out, _ = layer.shape
    matrix = torch.cat([model.weight.reshape(G, out, -1), model.bias.reshape(G, out, 1)], -1)
    means = model(x).movedim(1, -1) if kind.startswith("conv") else model(x)
    expected = means.reshape(-1, G * out).mean(0)
    torch.testing.assert_close((matrix @ right.mT).flatten(), expected)
    assert float(sums["rows"]) == means.numel() / (G * out)


def test_mean_vectors_of_an_embedding_are_those_of_its_gradients() -> None:
    model = seeded(lambda: nn.Embedding(7, 4, padding_idx=0)).double()
    tokens = torch.tensor([[1, 2, 0], [2, 6, 3]])
    recorder, found = recorded(model, lambda m: m(tokens).square().sin().sum() / 2)
    left, right = vectors(
        recorder.layers[0], row_sums(recorder.layers[0], found, F64), signed=False
    )
    assert left is None
    torch.testing.assert_close(right[0, 0], model.weight.grad.sum(0))


@pytest.mark.parametrize("kind", LAYERS)
def test_signed_vectors_estimate_the_factors_of_kfac_without_bias(kind: str) -> None:
    model, x = seeded(LAYERS[kind][0]).double(), LAYERS[kind][1]()
    outputs: list[Tensor] = []
    model.register_forward_hook(lambda m, a, y: outputs.append(y) or y.retain_grad())
    recorder, found = recorded(model, lambda m: m(x).sin().sum() / len(x))
    layer, k = recorder.layers[0], 20000
    G, out, _ = layer.shape
    left, right = vectors(layer, row_sums(layer, found, F64, signs=Signs(k, "a")), signed=True)
    grad = outputs[0].grad
    rows = (grad.movedim(1, -1) if kind.startswith("conv") else grad).reshape(-1, G, out)
    # W sum g^ g^', with W examples: a Fisher matrix of the mean loss
    expected = len(x) * torch.einsum("ngo,ngp->gop", rows, rows)
    products = left[..., :, None] * left[..., None, :]
    error = products.mean(1) - expected
    assert float((error / (products.std(1) / k**0.5)).abs().max()) < 5.0
    assert right.shape == (G, k, layer.shape[2])
    second = right.mT @ right / k
    means = vectors(layer, row_sums(layer, found, F64), signed=False)[1]
    spread = second - means.mT @ means  # a covariance: the second moment is no mean's square
    assert torch.linalg.eigvalsh(spread).min() > -0.05
    assert float(spread.diagonal(dim1=1, dim2=2).max()) > 0.3
    assert float(second[:, -1, -1].mean()) == pytest.approx(1.0, abs=0.05)  # of the bias's ones


# ------------------------------------------------------------------------- whole steps
def test_steps_of_a_linear_layer_are_the_formulas() -> None:
    model = seeded(lambda: nn.Linear(3, 2)).double()
    opt = MKOR(
        model, lr=0.3, momentum=0.5, inner="sgd", interval=2, statistic="mean", decay=0.8,
        damping=0.0,
    )  # fmt: skip
    W = torch.cat([model.weight, model.bias[:, None]], 1).detach().clone()
    left = right = velocity = None
    for t in range(7):
        x, y = drawn(5, 3, seed=t), drawn(5, 2, seed=50 + t)
        opt.step(lambda x=x, y=y: F.mse_loss(model(x), y))
        a = torch.cat([x, torch.ones(5, 1, dtype=F64)], 1)
        g = 2.0 * (a @ W.T - y) / y.numel()
        if t % 2 == 0:
            for_a, for_g = a.mean(0), g.sum(0)
            if left is None:
                left = for_g.square().mean() * torch.eye(2, dtype=F64)
                right = for_a.square().mean() * torch.eye(4, dtype=F64)
            left = 0.8 * left + 0.2 * torch.outer(for_g, for_g)
            right = 0.8 * right + 0.2 * torch.outer(for_a, for_a)
        grad = g.T @ a
        along = torch.linalg.inv(left) @ grad @ torch.linalg.inv(right)
        along *= grad.norm() / along.norm()
        velocity = along if velocity is None else 0.5 * velocity + along
        W = W - 0.3 * velocity
        now = torch.cat([model.weight, model.bias[:, None]], 1).detach()
        torch.testing.assert_close(now, W, rtol=1e-10, atol=1e-12)
    assert (opt.clock.steps, opt.clock.curvature_updates) == (7, 4)


def test_hooks_are_there_in_due_steps_alone() -> None:
    model, data = net(), batches(6)
    opt = MKOR(model, interval=3)
    hooked = []
    for batch in data:
        hooked.append(bool(model[0]._forward_hooks))
        opt.step(lambda batch=batch: loss_of(model, batch))
    assert hooked == [True, False, False, True, False, False]
    opt.close()
    assert not model[0]._forward_hooks


def test_an_ill_conditioned_regression_is_solved_sooner_than_by_the_inner_optimizer() -> None:
    mix = torch.diag(torch.logspace(-1.5, 0, 8, dtype=F64)) @ drawn(8, 8, seed=4)
    x, y = drawn(256, 8) @ mix, drawn(256, 3, seed=2)

    def least(build: Any) -> float:
        found = []
        for lr in (0.03, 0.1, 0.3):
            model = seeded(lambda: nn.Linear(8, 3)).double()
            opt = build(model, lr)
            for _ in range(150):
                opt.zero_grad()
                F.mse_loss(model(x), y).backward()
                opt.step()
            found.append(float(F.mse_loss(model(x), y).detach()))
        return min(found)

    a = torch.cat([x, torch.ones(256, 1, dtype=F64)], 1)
    best = float(F.mse_loss(a @ torch.linalg.lstsq(a, y).solution, y))
    sgd = least(lambda m, lr: torch.optim.SGD(m.parameters(), lr, momentum=0.9)) - best
    # signs come from the data's bits, which differ in the last place between machines: six seeds
    # have 0.39 to 0.63 of SGD's distance, 0.58 in the median
    ours = [
        least(lambda m, lr, seed=seed: MKOR(m, lr=lr, inner="sgd", interval=5, seed=seed)) - best
        for seed in range(3)
    ]
    assert max(ours) < 0.75 * sgd


class Mixed(nn.Module):
    """An embedding, a convolution, a normalization, a linear layer, and a free parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.conv(self.table(tokens).mT)).mT
        return self.gain * self.head(self.norm(x).mean(1))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_layers_of_all_kinds_train_and_the_rest_has_the_inner_optimizer(
    dtype: torch.dtype | None,
) -> None:
    model = seeded(Mixed)
    tokens = torch.randint(11, (32, 5), generator=torch.Generator().manual_seed(0))
    opt = MKOR(model, lr=0.02, interval=2, dtype=dtype)
    losses = [
        float(opt.step(lambda: F.cross_entropy(model(tokens), tokens[:, 0] % 3))) for _ in range(25)
    ]
    assert losses[-1] < 0.2 * losses[0]
    found = opt.coverage()
    assert set(found.uncovered) == {"norm.weight", "norm.bias", "gain"}
    assert "no product of two sides" in found.uncovered["norm.weight"]
    assert set(opt.inverses) == {"table", "conv", "head"}
    assert opt.inverses["table"].left is None
    assert opt.inverses["conv"].right.rest.dtype == (dtype or torch.float32)
    assert all(p in opt.state for p in model.parameters())


def test_sides_that_are_too_long_have_no_inverse() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(9, 4), nn.Linear(4, 12), nn.Linear(12, 20)))
    opt = MKOR(model, max_side=8)
    opt.step(lambda: model(torch.ones(2, 9)).square().mean())
    assert opt.inverses["0"].right is None
    assert opt.inverses["0"].left is not None
    assert opt.inverses["1"].left is None
    found = opt.coverage()
    assert set(found.uncovered) == {"2.weight", "2.bias"}
    assert "longer than max_side=8" in found.uncovered["2.bias"]


def test_a_tied_table_has_the_inner_optimizer() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.table(tokens))

    model = seeded(Tied)
    opt = MKOR(model)
    tokens = torch.arange(5)
    losses = [float(opt.step(lambda: F.cross_entropy(model(tokens), tokens))) for _ in range(20)]
    assert losses[-1] < losses[0]
    assert "sides are exchanged" in opt.coverage().uncovered["table.weight"]
    assert summable(opt.recorder.layers[0])


def test_frozen_parts_of_a_layer() -> None:
    model, data = net(), batches(9)
    model[0].bias.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    opt = MKOR(model, interval=2)
    before = weights(model)
    after = train(opt, model, data[:5])
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[2], before[2])
    assert not torch.equal(after[0], before[0])
    assert opt.inverses["0"].right.diagonal.shape == (1, 3)
    model[0].bias.requires_grad_(True)  # the right side grows by a column
    loss_of(model, data[5]).backward()
    assert opt.coverage().percent == 100.0  # asked in the middle of a step
    opt.step()
    train(opt, model, data[6:])
    assert opt.inverses["0"].right.diagonal.shape == (1, 4)
    assert not torch.equal(weights(model)[1], before[1])


def test_an_absent_gradient_of_a_bias_leaves_the_norm_of_the_rest() -> None:
    model = net()
    opt = MKOR(model, lr=1.0, momentum=0.0, inner="sgd", interval=5)
    train(opt, model, batches(1))
    loss_of(model, batches(2)[1]).backward()
    model[0].bias.grad = None
    norm, before = model[0].weight.grad.norm(), weights(model)
    opt.step()
    step = weights(model)[0] - before[0]
    torch.testing.assert_close(step.norm(), norm)
    assert torch.equal(weights(model)[1], before[1])
    cosine = float((step * model[0].weight.grad).sum() / norm**2)
    assert -1.0 < cosine < -0.05  # preconditioned, and downhill


# -------------------------------------------------------------------------- half precision
def test_half_precision_trains_as_float32_and_resumes_bitwise() -> None:
    data = batches(40, dtype=torch.float32)
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = net(torch.float32)
        opt = MKOR(model, lr=0.02, interval=3, dtype=dtype)
        train(opt, model, data)
        losses[dtype] = sum(float(loss_of(model, batch).detach()) for batch in data)
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.01)
    model = net(torch.float32)
    opt = MKOR(model, lr=0.02, interval=3, dtype=torch.bfloat16)
    train(opt, model, data[:5])
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    other = copy.deepcopy(model)
    expected = train(opt, model, data[5:15])
    file.seek(0)
    resumed = MKOR(other, lr=0.02, interval=3, dtype=torch.bfloat16)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert same(train(resumed, other, data[5:15]), expected)
    assert equal(resumed.state_dict(), opt.state_dict())
    assert resumed.inverses["0"].left.rest.dtype == torch.bfloat16


# -------------------------------------------------------------------------------- hybrid
def hybrid(model: nn.Module, **other: Any) -> MKOR:
    settings = {"interval": 1, "hybrid": True, "block": 4, "every": 2, "patience": 1, **other}
    return MKOR(model, lr=0.003, **settings)


def test_the_hybrid_switches_where_second_order_steps_are_too_dear() -> None:
    model, (batch,) = net(), batches(1)
    opt = hybrid(model, cost=1e6)
    assert opt.switched_at is None
    kinds = []
    for _ in range(16):
        kinds.append(opt.second_order)
        opt.step(lambda: loss_of(model, batch))
    assert opt.switched_at == 12  # two blocks of one kind around the first trial
    assert kinds == [True] * 4 + [False] * 4 + [True] * 4 + [False] * 4
    assert not model[0]._forward_hooks
    assert opt.inverses == {}
    assert opt.coverage().percent == 100.0
    updates = opt.clock.curvature_updates
    train(opt, model, batches(10))
    assert opt.clock.curvature_updates == updates == 8
    assert opt.switched_at == 12


def test_after_its_switch_the_hybrid_is_its_inner_optimizer() -> None:
    model, data = net(), batches(40)
    opt = hybrid(model, cost=1e6)
    for batch in data[:1] * 12:
        opt.step(lambda batch=batch: loss_of(model, batch))
    assert opt.switched_at == 12
    other = copy.deepcopy(model)
    adam = torch.optim.AdamW(other.parameters(), lr=0.003, weight_decay=0.0)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        state = opt.state[p]
        adam.state[q] = {
            "step": torch.tensor(float(state["steps"])),
            "exp_avg": state["momentum"].clone(),
            "exp_avg_sq": state["square"].clone(),
        }
    train(opt, model, data)
    for batch in data:
        adam.zero_grad()
        loss_of(other, batch).backward()
        adam.step()
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-9, atol=1e-11)


def test_the_hybrid_resumes_bitwise_across_its_switch() -> None:
    (batch,) = batches(1)
    model = net()
    opt = hybrid(model, cost=1e6)
    train(opt, model, [batch] * 10)
    other, state = copy.deepcopy(model), copy.deepcopy(opt.state_dict())
    resumed = hybrid(other, cost=1e6)
    resumed.load_state_dict(state)
    assert same(train(resumed, other, [batch] * 9), train(opt, model, [batch] * 9))
    assert resumed.switched_at == opt.switched_at == 12


def test_losses_are_seen_in_every_way_to_take_a_step() -> None:
    def plain(opt: MKOR, model: nn.Module) -> None:
        def closure() -> Tensor:
            opt.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        opt.step(closure)

    def micro(opt: MKOR, model: nn.Module) -> None:
        opt.zero_grad()
        for part in zip(batch[0].chunk(2), batch[1].chunk(2), strict=True):
            opt.backward(8.0 * loss_of(model, part) / 2, scale=8.0)
        for p in model.parameters():
            p.grad /= 8.0
        opt.step()

    (batch,) = batches(1)
    seen = []
    for drive in (plain, micro, lambda opt, model: train(opt, model, [batch])):
        model = net()
        opt = hybrid(model)
        for _ in range(3):
            drive(opt, model)
        seen.append(opt.hybrid.losses)
    assert seen[0] == pytest.approx(seen[2])
    assert seen[1] == pytest.approx(seen[2])


def test_the_cost_is_that_of_the_layers() -> None:
    model = net()
    opt = hybrid(model, interval=1, vectors=2)
    train(opt, model, batches(1))
    n = 12  # examples
    gradient = 6 * n * (5 * 4 + 3 * 6)
    extra = 2 * (5 * 4 * (5 + 4) + 3 * 6 * (3 + 6)) + 18 * (25 + 16 + 9 + 36)
    assert opt.cost == pytest.approx(1 + extra / gradient)


def test_maximizing_counts_the_rise_as_progress() -> None:
    model, (batch,) = net(), batches(1)
    opt = hybrid(model, maximize=True, cost=1e6)
    for _ in range(3):
        opt.step(lambda: loss_of(model, batch))
    assert all(loss < 0 for loss in opt.hybrid.losses)
    assert list(opt.hybrid.losses) == sorted(opt.hybrid.losses, reverse=True)


# ------------------------------------------------------------------------------- errors
def test_what_is_refused() -> None:
    model = net()
    with pytest.raises(TypeError, match=r"model= is a torch.nn.Module, got generator"):
        MKOR(model.parameters())  # type: ignore[arg-type]  # the point
    with pytest.raises(ValueError, match="dtype= is float32, float64 or bfloat16, got torch.int"):
        MKOR(model, dtype=torch.int32)
    with pytest.raises(TypeError, match="hybrid= is True or False"):
        MKOR(model, hybrid="yes")  # type: ignore[arg-type]  # the point
    with pytest.raises(ValueError, match="cost= is at least 1, got 0.5"):
        MKOR(model, hybrid=True, cost=0.5)
    with pytest.raises(ValueError, match="a block has at least 4 steps.*got block=2"):
        MKOR(model, hybrid=True, block=2)
    with pytest.raises(ValueError, match="inner= is one of 'adamw', 'sgd'"):
        MKOR(model, inner="lion")
    with pytest.raises(ValueError, match="statistic= is one of 'signs', 'mean'"):
        MKOR(model, statistic="median")
    with pytest.raises(ValueError, match="decay= is above 0, got 0: a term of rank one has no"):
        MKOR(model, decay=0.0)
    with pytest.raises(ValueError, match="interval= is at least 1"):
        MKOR(model, interval=0)


def test_a_model_that_is_not_the_one_that_is_called() -> None:
    model, (batch,) = net(), batches(1)
    opt = MKOR(model)
    copied = copy.deepcopy(model)
    loss_of(copied, batch).backward()
    for p, q in zip(model.parameters(), copied.parameters(), strict=True):
        p.grad = q.grad
    with pytest.raises(RuntimeError, match="no curvature yet: no layer of the model.*not compiled"):
        opt.step()
    hybrids = hybrid(model)
    hybrids.observe(loss_of(copied, batch))
    with pytest.raises(RuntimeError, match="no curvature yet: no layer of the model"):
        hybrids.step()


def test_states_with_other_settings() -> None:
    model, data = net(), batches(2)
    opt = MKOR(model)
    train(opt, model, data)
    state = copy.deepcopy(opt.state_dict())
    for other in ({"inner": "sgd"}, {"statistic": "mean"}, {"hybrid": True}):
        with pytest.raises(ValueError, match="the state is that of MKOR with.*and this one has"):
            MKOR(net(), **other).load_state_dict(state)  # type: ignore[arg-type]  # mixed
    state["curvlib"]["extra"]["inverses"]["7"] = state["curvlib"]["extra"]["inverses"]["0"]
    with pytest.raises(ValueError, match=r"inverses of layers \['7'\], which the model has not"):
        MKOR(net()).load_state_dict(state)


def test_inverses_of_the_public_attribute_are_readable() -> None:
    model = net()
    opt = MKOR(model, damping=0.1)
    train(opt, model, batches(30))
    for own in opt.inverses.values():
        for side in (own.left, own.right):
            M = mkor.dense(side)[0]
            assert torch.equal(M, M.T)
            assert torch.linalg.eigvalsh(M)[0] > 0
            assert float(torch.linalg.eigvalsh(M)[-1] * side.mean) <= 1 / 0.1 + 1e-9
