"""AdaHessian: trajectories against the rule written out on dense Hessians, limits, work, errors."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from curvlib.optim.adahessian import AdaHessian
from curvlib.optim.draws import signs
from curvlib.optim.rules.adahessian import Settings, averaged, block_means, init, move, spread
from tests.optim.small import F64, batches, by_closure, loss_of, net, same, train

SHAPES = ((), (3,), (2, 3), (2, 2, 3), (2, 1, 2, 2), (1, 2, 2, 1, 2))
SIZE = sum(math.prod(s) for s in SHAPES)


def parameters() -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=g, dtype=F64)) for s in SHAPES]


def smooth(flat: Tensor, t: int = 0) -> Tensor:
    """A loss with a dense Hessian that changes with place and step."""
    g = torch.Generator().manual_seed(1)
    A = torch.randn(SIZE, SIZE, generator=g, dtype=F64) / SIZE**0.5
    return (A @ flat + 0.1 * t).cos().sum() + flat.square().sum()


def flattened(params: list[Any]) -> Tensor:
    return torch.cat([p.reshape(-1) for p in params])


# ------------------------------------------------------------------------------ the oracle
def block_averaged(x: Tensor, block_size: int | None) -> Tensor:
    """Each entry replaced by the mean of its block, entry by entry."""
    out = torch.empty_like(x)
    if block_size is None:
        if x.ndim <= 2:
            return x.clone()
        for i, j in itertools.product(range(x.shape[0]), range(x.shape[1])):
            out[i, j] = x[i, j].sum() / x[i, j].numel()
        return out
    if x.ndim < 2:
        return x.clone()
    flat, result = x.reshape(-1), out.reshape(-1)
    for start in range(0, flat.numel(), block_size):
        run = slice(start, min(start + block_size, flat.numel()))
        result[run] = flat[run].sum() / len(flat[run])
    return result.reshape(x.shape)


def oracle(steps: int, lr: float, estimand: str, interval: int, probes: int, **kw: Any) -> Tensor:
    """The published rule in its own order of operations, with dense Hessians."""
    b1, b2, eps = kw["betas"][0], kw["betas"][1], kw["eps"]
    k, wd, block = kw["hessian_power"], kw["weight_decay"], kw["block_size"]
    theta = [p.detach().clone() for p in parameters()]
    m = [torch.zeros_like(p) for p in theta]
    v = [torch.zeros_like(p) for p in theta]
    updates = 0
    for t in range(1, steps + 1):
        flat = flattened(theta).requires_grad_()
        g = torch.autograd.functional.jacobian(lambda x, t=t: smooth(x, t), flat)
        if (t - 1) % interval == 0:
            H = torch.autograd.functional.hessian(lambda x, t=t: smooth(x, t), flat)
            draws = []
            for n in range(probes):
                z = [signs(p, 5, updates, n, i) for i, p in enumerate(theta)]
                Hz = (H @ flattened(z)).split([p.numel() for p in theta])
                draws.append([(a, b.view(a.shape)) for a, b in zip(z, Hz, strict=True)])
            updates += 1
            for i in range(len(theta)):
                if estimand == "rownorm":
                    D2 = sum(block_averaged(d[i][1].abs(), block) ** 2 for d in draws) / probes
                else:
                    D2 = sum(block_averaged(d[i][0] * d[i][1], block) for d in draws) / probes
                v[i] = b2 * v[i] + (1 - b2) * D2
        for i, part in enumerate(g.split([p.numel() for p in theta])):
            m[i] = b1 * m[i] + (1 - b1) * part.view(theta[i].shape)
            mean, curvature = m[i] / (1 - b1**t), v[i] / (1 - b2**updates)
            root = curvature.sqrt() if estimand == "rownorm" else curvature.abs()
            theta[i] = theta[i] - lr * (mean / (root**k + eps) + wd * theta[i])
    return flattened(theta)


CHOICES = [
    {"interval": 1, "probes": 1, "block_size": None},
    {"interval": 3, "probes": 1, "block_size": 4},
    {"interval": 2, "probes": 3, "block_size": None, "hessian_power": 0.5, "weight_decay": 0.1},
    {"interval": 1, "probes": 2, "block_size": 1, "hessian_power": 0.0},
]


@pytest.mark.parametrize("estimand", ["rownorm", "diagonal"])
@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("foreach", [False, True])
def test_trajectories_are_those_of_the_written_out_rule(
    estimand: str, choice: dict[str, Any], foreach: bool
) -> None:
    common = {"betas": (0.9, 0.95), "eps": 1e-3, "hessian_power": 1.0, "weight_decay": 0.0}
    common |= choice
    params = parameters()
    opt = AdaHessian(params, 0.05, estimand=estimand, seed=5, foreach=foreach, **common)
    for t in range(1, 8):
        opt.step(lambda t=t: smooth(flattened(params), t))
    expected = oracle(7, 0.05, estimand, **common)
    start = flattened(parameters()).detach()
    assert float((expected - start).abs().max()) > 0.05
    torch.testing.assert_close(flattened(params).detach(), expected, rtol=1e-11, atol=1e-12)


def test_all_tensors_at_once_or_one_by_one_are_bitwise_the_same() -> None:
    def run(foreach: bool | None) -> list[Tensor]:
        model = net()
        opt = AdaHessian(model.parameters(), interval=2, foreach=foreach, weight_decay=0.1)
        return train(opt, model, batches(5))

    assert same(run(True), run(False))
    assert same(run(None), run(False))


def test_networks_with_every_rank_of_convolution_train() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv1d(1, 2, 3), nn.Tanh(), nn.Unflatten(2, (2, 3)), nn.Conv2d(2, 2, 2), nn.Tanh()
        )
        model.extend([nn.Unflatten(3, (2, 1)), nn.Conv3d(2, 2, 1), nn.Flatten(), nn.Linear(4, 1)])
        x, y = torch.randn(16, 1, 8), torch.randn(16, 1)
    for block_size in (None, 3):
        opt = AdaHessian(model.parameters(), lr=0.03, block_size=block_size)
        losses = [float(opt.step(lambda: nn.functional.mse_loss(model(x), y))) for _ in range(40)]
        assert losses[-1] < 0.9 * losses[0]


# ---------------------------------------------------------------------------- block means
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 4), max_size=5),
    st.one_of(st.none(), st.integers(1, 7)),
    st.integers(0, 100),
)
def test_block_means_are_means_over_blocks(shape: list[int], block: int | None, seed: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    means = block_means(x, block)
    found = spread(means, x.shape, block).expand(x.shape)
    torch.testing.assert_close(found, block_averaged(x, block), rtol=1e-12, atol=1e-12)
    if block is None and x.ndim > 2:
        assert means.numel() == x.shape[0] * x.shape[1]
    elif block is not None and x.ndim > 1:
        assert means.numel() == -(-x.numel() // block)


def test_empty_tensors_have_no_blocks() -> None:
    assert block_means(torch.zeros(0, 3), 2).shape == (0, 3)


# ---------------------------------------------------------------------------------- limits
@pytest.mark.parametrize("estimand", ["rownorm", "diagonal"])
@pytest.mark.parametrize("probes", [1, 4])
def test_the_average_converges_to_what_is_documented(estimand: str, probes: int) -> None:
    g = torch.Generator().manual_seed(2)
    A = torch.randn(6, 6, generator=g, dtype=F64)
    H = A @ A.T / 3 + torch.eye(6, dtype=F64)
    w = nn.Parameter(torch.ones(6, dtype=F64))
    b2 = 0.999
    opt = AdaHessian([w], lr=0.0, betas=(0.9, b2), estimand=estimand, probes=probes)
    updates = 1000
    for _ in range(updates):
        opt.step(lambda: 0.5 * w @ H @ w)
    every = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=6)), dtype=F64)
    seen = (every @ H).square() if estimand == "rownorm" else every * (every @ H)
    limit = H.square().sum(1) if estimand == "rownorm" else H.diagonal()
    torch.testing.assert_close(seen.mean(0), limit)  # the claim, over all 64 probes
    found = opt.state[w]["curvature"] / (1 - b2**updates)
    weights = (1 - b2) * b2 ** torch.arange(updates, dtype=F64) / (1 - b2**updates)
    error = (seen.var(0, unbiased=False) / probes * weights.square().sum()).sqrt()
    assert bool(((found - limit).abs() < 4.5 * error).all())
    wrong = H.diagonal().square() if estimand == "rownorm" else H.square().sum(1).sqrt()
    assert bool(((found - wrong).abs() > 8 * error).any())


@pytest.mark.parametrize("estimand", ["rownorm", "diagonal"])
@pytest.mark.parametrize("interval", [1, 10])
def test_an_interval_does_not_bias_the_average(estimand: str, interval: int) -> None:
    """With a diagonal Hessian each reading is exact, and so is each corrected average."""
    h = torch.tensor([4.0, 0.5], dtype=F64)
    w = nn.Parameter(torch.ones(2, dtype=F64))
    opt = AdaHessian(
        [w], lr=0.1, betas=(0.0, 0.999), eps=1e-12, interval=interval, estimand=estimand
    )
    for t in range(1, 101):
        before = w.detach().clone()
        opt.step(lambda: 0.5 * (h * w.square()).sum())
        torch.testing.assert_close(w.detach(), 0.9 * before, rtol=1e-9, atol=0.0)
        assert opt.clock.curvature_updates == -(-t // interval)


def test_warmup_takes_curvature_in_every_step_first() -> None:
    """And the steps in it are those of interval 1."""
    runs = [parameters() for _ in range(2)]
    first = AdaHessian(runs[0], lr=0.01, interval=4, warmup=3, seed=5)
    plain = AdaHessian(runs[1], lr=0.01, seed=5)
    counts = []
    for step in range(12):
        by_closure(first, lambda: smooth(flattened(runs[0])))
        counts.append(first.clock.curvature_updates)
        if step < 3:
            by_closure(plain, lambda: smooth(flattened(runs[1])))
            assert torch.equal(flattened(runs[0]), flattened(runs[1]))
    assert counts == [1, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5]


def test_newton_in_one_step_on_a_diagonal_quadratic() -> None:
    h = torch.tensor([10.0, 1.0, 0.1], dtype=F64)
    w = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=F64))
    opt = AdaHessian([w], lr=1.0, betas=(0.0, 0.9), eps=1e-12, estimand="diagonal")
    opt.step(lambda: 0.5 * (h * w.square()).sum())
    assert float(w.detach().abs().max()) < 1e-10


def test_power_0_is_sgd_with_momentum() -> None:
    model, other, data = net(), net(), batches(4)
    opt = AdaHessian(model.parameters(), lr=0.1, betas=(0.8, 0.9), eps=1e-8, hessian_power=0.0)
    found = train(opt, model, data)
    average = [torch.zeros_like(p) for p in other.parameters()]
    for t, batch in enumerate(data, 1):
        grads = torch.autograd.grad(loss_of(other, batch), list(other.parameters()))
        with torch.no_grad():
            for p, a, g in zip(other.parameters(), average, grads, strict=True):
                a.mul_(0.8).add_(0.2 * g)
                p.sub_(0.1 * a / (1 - 0.8**t) / (1 + 1e-8))
    for a, b in zip(found, other.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-11, atol=1e-13)


def test_averages_change_nothing_in_place_and_moves_only_parameters() -> None:
    choice = Settings(0.1, (0.9, 0.99), 1e-4, 1.0, 0.1, "rownorm", None)
    p, g, r = (torch.full((2, 2), x) for x in (1.0, 2.0, 3.0))
    first = init(p, choice)
    (kept,) = averaged([g], [r], [first], choice)
    before = kept.momentum.clone(), kept.curvature.clone()
    move([p], [kept], choice)
    for tensor, value in ((g, 2.0), (r, 3.0), (first.momentum, 0.0), (first.curvature, 0.0)):
        assert torch.equal(tensor, torch.full((2, 2), value))
    assert torch.equal(kept.momentum, before[0])
    assert torch.equal(kept.curvature, before[1])
    assert (first.steps, kept.steps, kept.curvature_updates) == (0, 1, 1)
    expected = 1.0 - 0.1 * (2.0 / (3.0**0.5 + 1e-4) + 0.1)  # readings are squares
    torch.testing.assert_close(p, torch.full((2, 2), expected))
    (waits,) = averaged([g], [None], [first], choice)
    assert (waits.steps, waits.curvature_updates) == (1, 0)
    move([p], [waits], choice)
    torch.testing.assert_close(p, torch.full((2, 2), expected))


@pytest.mark.parametrize("foreach", [None, True])
def test_tensors_beyond_the_cache_step_like_others(foreach: bool | None) -> None:
    def run(choice: bool | None) -> list[Tensor]:
        g = torch.Generator().manual_seed(0)
        sizes = (3, 70_000, 5, 40_000, 40_000, 2)
        params = [nn.Parameter(torch.randn(n, generator=g)) for n in sizes]
        opt = AdaHessian(params, lr=0.1, foreach=choice)
        for _ in range(2):
            opt.step(lambda: torch.stack([p.cos().sum() for p in params]).sum())
        return [p.detach() for p in params]

    assert same(run(foreach), run(False))


# ------------------------------------------------------------------------------- behaviour
@pytest.mark.parametrize("probes", [1, 3])
def test_work_is_one_backward_pass_and_one_for_each_probe(probes: int) -> None:
    passes = []
    w = nn.Parameter(torch.randn(3, dtype=F64))
    opt = AdaHessian([w], lr=0.01, interval=2, probes=probes)

    def loss() -> Tensor:
        hidden = w.sin()
        hidden.register_hook(lambda g: passes.append(1))
        return hidden.exp().sum()

    for expected in (1 + probes, 1, 1 + probes, 1):
        passes.clear()
        opt.step(loss)
        assert len(passes) == expected


def test_a_parameter_waits_for_its_first_curvature() -> None:
    model, data = net(), batches(4)
    opt = AdaHessian(model.parameters(), lr=0.1, interval=3)
    model[0].requires_grad_(False)
    train(opt, model, data[:1])
    model[0].requires_grad_(True)
    before = [p.detach().clone() for p in model.parameters()]
    after = train(opt, model, data[1:3])
    assert same(after[:2], before[:2])
    assert not same(after[2:], before[2:])
    assert opt.state[model[0].weight]["steps"] == 2
    assert not same(train(opt, model, data[3:])[:2], before[:2])


def test_overflowing_squares_skip_the_step() -> None:
    w = nn.Parameter(torch.ones(2))
    opt = AdaHessian([w], lr=0.1)
    opt.step(lambda: 1e25 * (w - 1).square().sum())  # H z is finite, its square is not
    assert (opt.skipped, opt.clock.steps, dict(opt.state)) == (1, 0, {})
    assert torch.equal(w.detach(), torch.ones(2))


def test_memory_is_the_momentum_and_one_number_for_each_block() -> None:
    w = nn.Parameter(torch.randn(4, 3, 3, 3))
    opt = AdaHessian([w])
    by_closure(opt, lambda: w.sin().sum())
    assert opt.state[w]["momentum"].shape == (4, 3, 3, 3)
    assert opt.state[w]["curvature"].shape == (4, 3, 1, 1)


# ---------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("setting", "error", "text"),
    [
        ({"estimand": "diag"}, ValueError, "estimand= is one of 'rownorm', 'diagonal', got 'diag'"),
        ({"interval": 0}, ValueError, "interval= is at least 1, got 0"),
        ({"interval": 2.5}, TypeError, "interval= is a whole number, got float"),
        ({"warmup": -1}, ValueError, "warmup= is a number of steps, at least 0, got -1"),
        ({"warmup": 2.5}, TypeError, "warmup= is an int, got float"),
        ({"probes": True}, TypeError, "probes= is a whole number, got bool"),
        ({"block_size": 0}, ValueError, "block_size= is at least 1, got 0"),
        ({"block_size": "kernel"}, TypeError, "block_size= is a whole number, got str"),
        ({"eps": 0.0}, ValueError, "eps= is above 0, got 0.0"),
        ({"betas": (0.9,)}, ValueError, "betas= is a tuple of 2 numbers, got 1"),
        ({"betas": 0.9}, TypeError, "betas= is a tuple of 2 numbers, got float"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\]= is in \[0, 1\), got 1.0"),
        ({"foreach": "yes"}, TypeError, "foreach= is True or False, got str"),
        ({"seed": 0.5}, TypeError, "seed= is an int, got float"),
        ({"lr": None}, TypeError, "lr= is a number, got NoneType"),
    ],
    ids=str,
)
def test_bad_settings(setting: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        AdaHessian(net().parameters(), **setting)


def test_a_state_of_the_other_estimand_is_refused() -> None:
    model = net()
    opt = AdaHessian(model.parameters())
    train(opt, model, batches(1))
    other = AdaHessian(model.parameters(), estimand="diagonal")
    with pytest.raises(ValueError, match="averages of estimand='rownorm', and this optimizer"):
        other.load_state_dict(opt.state_dict())
    assert not other.state


def test_learning_rates_may_be_tensors() -> None:
    model, other = net(), net()
    opt = AdaHessian(model.parameters(), lr=torch.tensor(0.1, dtype=F64))
    found = train(opt, model, batches(3))
    assert same(found, train(AdaHessian(other.parameters(), lr=0.1), other, batches(3)))
