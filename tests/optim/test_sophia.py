"""Sophia's rule against a plain re-derivation, and its estimators against exact diagonals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import curvlib as cl
from curvlib.core.random import generator_of
from curvlib.operators.labels import SampledLabels
from curvlib.operators.live.fisher import sampled_root
from curvlib.optim.draws import signs
from curvlib.optim.rules import sophia as rule
from curvlib.optim.sophia import Sophia
from curvlib.optim.target_draws import TargetDraws
from tests import models

F64 = torch.float64


# ------------------------------------------------------------------------------------- the rule
def plain(
    theta: np.ndarray,
    gradients: list[np.ndarray],
    estimates: list[np.ndarray | None],
    *,
    lr: float,
    b1: float,
    b2: float,
    rho: float,
    eps: float,
    decay: float,
    correct: bool,
) -> tuple[np.ndarray, list[int]]:
    """Algorithm 3 of the paper, entry by entry, with how many entries were clipped."""
    theta = theta.copy()
    m, h = np.zeros_like(theta), np.zeros_like(theta)
    count, clipped = 0, []
    for t, (g, estimate) in enumerate(zip(gradients, estimates, strict=True), 1):
        hits = 0
        count += estimate is not None
        for i in range(theta.size):
            m[i] = b1 * m[i] + (1 - b1) * g[i]
            if estimate is not None:
                h[i] = b2 * h[i] + (1 - b2) * estimate[i]
            mi = m[i] / (1 - b1**t) if correct else m[i]
            hi = h[i] / (1 - b2**count) if correct and count else h[i]
            ratio = mi / max(rho * hi, eps)
            hits += abs(ratio) >= 1
            theta[i] = theta[i] * (1 - lr * decay) - lr * min(max(ratio, -1.0), 1.0)
        clipped.append(hits)
    return theta, clipped


@given(
    seed=st.integers(0, 2**16),
    interval=st.integers(1, 4),
    b1=st.sampled_from([0.0, 0.5, 0.96]),
    b2=st.sampled_from([0.0, 0.9, 0.99]),
    rho=st.sampled_from([0.01, 0.3, 4.0]),
    decay=st.sampled_from([0.0, 0.1]),
    correct=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_rule_is_the_papers_step_for_step(
    seed: int, interval: int, b1: float, b2: float, rho: float, decay: float, correct: bool
) -> None:
    rng = np.random.default_rng(seed)
    gradients = [rng.normal(size=5) for _ in range(12)]
    estimates = [rng.normal(size=5) + 0.5 if t % interval == 0 else None for t in range(12)]
    start = rng.normal(size=5)
    expected, hits = plain(
        start,
        gradients,
        estimates,
        lr=0.05,
        b1=b1,
        b2=b2,
        rho=rho,
        eps=1e-12,
        decay=decay,
        correct=correct,
    )
    p = torch.from_numpy(start).clone()
    state, updates = rule.init(p), 0
    for t, (g, h) in enumerate(zip(gradients, estimates, strict=True), 1):
        updates += h is not None
        step = rule.update(
            p,
            torch.from_numpy(g),
            state,
            None if h is None else torch.from_numpy(h),
            lr=0.05,
            betas=(b1, b2),
            rho=rho,
            eps=1e-12,
            weight_decay=decay,
            correct_bias=correct,
            steps=t,
            curvature_updates=updates,
        )
        assert int(step.clipped) == hits[t - 1]
        p, state = p + step.change, step.state
    np.testing.assert_allclose(p.numpy(), expected, rtol=0, atol=1e-13)


def test_corrected_curvature_is_unbiased_at_every_interval() -> None:
    """A constant diagonal is known after the first update, whatever the interval between them."""
    p, h = torch.zeros(3, dtype=F64), torch.tensor([0.5, 2.0, 8.0], dtype=F64)
    state, updates = rule.init(p), 0
    for t in range(1, 26):
        estimate = h if t % 10 == 1 else None
        updates += estimate is not None
        step = rule.update(
            p,
            torch.full_like(p, 1e-3),
            state,
            estimate,
            lr=1.0,
            betas=(0.9, 0.99),
            rho=1.0,
            eps=1e-12,
            weight_decay=0.0,
            correct_bias=True,
            steps=t,
            curvature_updates=updates,
        )
        state = step.state
        torch.testing.assert_close(step.change, -1e-3 / h, rtol=1e-12, atol=0)


def test_rule_leaves_its_arguments_and_keeps_half_precision_states_wide() -> None:
    p, g = torch.ones(4, dtype=torch.bfloat16), torch.ones(4, dtype=torch.bfloat16)
    state = rule.init(p)
    assert state.momentum.dtype == state.curvature.dtype == torch.float32
    step = rule.update(
        p, g, state, g, lr=0.1, betas=(0.9, 0.9), rho=1.0, eps=1e-12, weight_decay=0.1
    )
    assert step.change.dtype == torch.float32
    assert torch.equal(p, torch.ones_like(p))
    assert not state.momentum.any()
    assert not state.curvature.any()


# ------------------------------------------------------- Gauss-Newton-Bartlett, by Monte Carlo
def root(loss: Tensor, model: nn.Module, seed: int = 0, scale: float = 1.0) -> list[Any]:
    labels = SampledLabels(1, generator_of(None, seed))
    return sampled_root(loss, list(model.parameters()), lambda count: labels.uniform, scale)


def check_unbiased(
    model: nn.Module, loss: Tensor, exact: Tensor, *, draws: int = 3000
) -> tuple[Tensor, Tensor]:
    """The mean of ``h`` over draws is within its standard errors of the exact diagonal."""
    params = list(model.parameters())
    labels = SampledLabels(1, generator_of(None, 3))
    total, squares = torch.zeros_like(exact), torch.zeros_like(exact)
    for _ in range(draws):
        v = sampled_root(loss, params, lambda count: labels.uniform)
        h = torch.cat([p.reshape(-1) for p in v]).square()
        total += h
        squares += h.square()
    mean = total / draws
    stderr = ((squares / draws - mean.square()) / (draws - 1)).sqrt()
    z = (mean - exact) / stderr.clamp(min=1e-15)
    assert float(z.abs().max()) < 4.5, z  # of a few dozen entries
    assert float(z.square().mean()) < 2.0
    assert float(stderr.median()) < 0.05 * float(exact.max())  # the test can fail
    return mean, exact


def unbiased(model: nn.Module, loss: Any, x: Tensor, y: Tensor, **kw: Any) -> tuple[Tensor, Tensor]:
    """The same, against the dense GGN of curvlib's operator, which its own tests hold exact."""
    model = model.double()
    exact = cl.ggn(cl.Risk(model, loss, (x, y))).to_dense().diagonal()
    return check_unbiased(model, loss(model(x), y), exact, **kw)


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def data(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def labels_of(*shape: int, classes: int = 3, seed: int = 2) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def test_unbiased_for_classes() -> None:
    unbiased(classifier(), nn.CrossEntropyLoss(), data(6, 3), labels_of(6))


def test_unbiased_for_weighted_and_smoothed_classes() -> None:
    loss = nn.CrossEntropyLoss(
        weight=torch.tensor([0.2, 1.0, 3.0], dtype=F64), label_smoothing=0.1, ignore_index=2
    )
    unbiased(classifier(), loss, data(6, 3), labels_of(6))


def test_unbiased_for_class_probabilities() -> None:
    unbiased(classifier(), nn.CrossEntropyLoss(), data(6, 3), data(6, 3, seed=3).softmax(1))


class Tokens(nn.Module):
    """Logits ``[N, V, T]`` of a small causal network."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.mix = nn.GRU(3, 3, batch_first=True)
        self.head = nn.Linear(3, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(tokens))[0]).transpose(1, 2)


def sequences() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    x, y = labels_of(4, 6, classes=5), labels_of(4, 6, classes=5, seed=3)
    y[0, 2:], y[2, :5] = -100, -100  # 15 of 24 count
    return Tokens().double(), x, y


def test_unbiased_for_tokens_of_which_some_are_ignored() -> None:
    model, x, y = sequences()
    mean, exact = unbiased(model, nn.CrossEntropyLoss(), x, y)
    factor = float(mean.sum() / exact.sum())
    assert abs(factor - 1.0) < 0.05, factor  # neither examples (4/15) nor all tokens (24/15)


def test_all_ways_to_write_a_loss_of_tokens_have_the_same_root() -> None:
    model, x, y = sequences()
    logits = model(x)
    flat, wanted = logits.transpose(1, 2).reshape(-1, 5), y.reshape(-1)
    mask = (y != -100).double()
    log_p = logits.transpose(1, 2).log_softmax(-1)
    picked = log_p.gather(2, y.clamp(min=0)[..., None])[..., 0]
    ways = {
        "cross-entropy of flat logits": F.cross_entropy(flat, wanted),
        "sum over the number of tokens": F.cross_entropy(flat, wanted, reduction="sum") / 15,
        "masked mean": -(picked * mask).sum() / mask.sum(),
        "no reduction": F.cross_entropy(flat, wanted, reduction="none").sum() / 15.0,
        "minus": -(picked * mask).sum().neg() / mask.sum(),
    }
    expected = root(F.cross_entropy(logits, y), model, seed=5)
    for name, loss in ways.items():
        for a, b in zip(root(loss, model, seed=5), expected, strict=True):
            torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_unbiased_for_regression_and_binary_targets(reduction: str) -> None:
    x = data(5, 3)
    unbiased(classifier(), nn.MSELoss(reduction=reduction), x, data(5, 3, seed=5))
    loss = nn.BCEWithLogitsLoss(
        weight=torch.tensor([1.0, 2.0, 0.5], dtype=F64),
        pos_weight=torch.tensor([2.0, 0.5, 1.0], dtype=F64),
        reduction=reduction,
    )
    unbiased(classifier(), loss, x, data(5, 3, seed=5).sign().clamp(min=0))


def test_unbiased_for_log_probabilities() -> None:
    model = models.log_probabilities(classifier())
    unbiased(model, nn.NLLLoss(), data(6, 3), labels_of(6))


def test_unbiased_for_a_sum_of_likelihoods_and_a_penalty() -> None:
    """Two heads and weight decay in the loss: the diagonal of the sum, in closed form parts."""
    model = classifier().double()
    x, y, t = data(6, 3), labels_of(6), data(6, seed=7)
    out = model(x)
    penalty = sum(p.square().sum() for p in model.parameters())
    loss = F.cross_entropy(out[:, :2], y.clamp(max=1)) + 0.5 * ((out[:, 2] - t) ** 2).mean()
    loss = (loss + 0.05 * penalty) / 2
    first = cl.Risk(
        model, nn.CrossEntropyLoss(), (x, y.clamp(max=1)), forward=lambda m, b: m(b[0])[:, :2]
    )
    second = cl.Risk(model, nn.MSELoss(), (x, t), forward=lambda m, b: m(b[0])[:, 2])
    exact = (cl.ggn(first) + 0.5 * cl.ggn(second)).to_dense().diagonal() + 0.1
    check_unbiased(model, loss, exact / 2)


def test_it_is_the_squared_gradient_of_the_mean_sampled_loss_times_the_number_of_terms() -> None:
    """h = B g * g with the gradient of cross-entropy at the drawn labels, found by autograd."""
    model, x = classifier().double(), data(7, 3)
    y = labels_of(7)
    y[3] = -100
    output = model(x)
    found = root(F.cross_entropy(output, y), model)
    numbers = SampledLabels(1, generator_of(None, 0)).uniform(torch.Size([7]))[0]
    drawn = (output.softmax(1).cumsum(1) <= numbers[:, None]).sum(1).where(y != -100, -100)
    g = torch.autograd.grad(F.cross_entropy(output, drawn), list(model.parameters()))
    for v, part in zip(found, g, strict=True):
        torch.testing.assert_close(v.square(), 6.0 * part.square())


def test_roots_add_up_over_micro_batches_of_any_size() -> None:
    model, x, y = classifier().double(), data(8, 3), labels_of(8)
    whole = root(F.cross_entropy(model(x), y), model, seed=4)
    labels = SampledLabels(1, generator_of(None, 4))
    parts = [
        sampled_root(
            F.cross_entropy(model(x[at]), y[at], reduction="sum") / 8,
            list(model.parameters()),
            lambda count: labels.uniform,
        )
        for at in (slice(0, 3), slice(3, 8))
    ]
    for a, b, v in zip(*parts, whole, strict=True):
        torch.testing.assert_close(a + b, v)


def test_the_loss_scale_plays_no_part() -> None:
    model, x, y = classifier().double(), data(8, 3), labels_of(8)
    loss = F.cross_entropy(model(x), y)
    for a, b in zip(root(loss, model), root(loss * 65536.0, model, scale=65536.0), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)


def test_batches_without_any_term_have_a_root_of_zero() -> None:
    model = classifier()
    y = torch.tensor([-100, -100])
    loss = F.cross_entropy(model(torch.ones(2, 3)), y, reduction="sum")
    assert all(not part.any() for part in root(loss, model))


def test_half_precision_does_not_underflow() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    x, y = torch.randn(512, 4), labels_of(512)
    wide = root(F.cross_entropy(model(x), y), model)
    with torch.autocast("cpu", torch.bfloat16):
        half = root(F.cross_entropy(model(x), y), model)
    pure = model.to(torch.bfloat16)
    narrow = root(F.cross_entropy(pure(x.bfloat16()), y), pure)
    for a, b, c in zip(wide, half, narrow, strict=True):
        assert b.dtype == c.dtype == torch.float32
        torch.testing.assert_close(b, a, rtol=0.1, atol=0.05 * float(a.abs().max()))
        torch.testing.assert_close(c, a, rtol=0.1, atol=0.1 * float(a.abs().max()))


def test_outputs_that_are_not_finite_are_passed_on() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LogSoftmax(1))
    loss = F.nll_loss(model(torch.full((2, 2), math.nan)), labels_of(2))
    assert all(part.isnan().any() for part in root(loss, model))


def test_a_single_example_and_logits_that_are_a_parameter() -> None:
    logits = nn.ParameterList([torch.zeros(3, dtype=F64)])
    exact = torch.full((3,), 1 / 3 - 1 / 9, dtype=F64)
    check_unbiased(logits, F.cross_entropy(logits[0], torch.tensor(1)), exact)


def test_losses_that_are_no_likelihood_are_named() -> None:
    model = classifier()
    out = model(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"not a known function of 'Abs'.*Hutchinson"):
        root(F.l1_loss(out, torch.zeros(2, 3)).abs(), model)
    focal = F.cross_entropy(out, labels_of(2), reduction="none")
    with pytest.raises(ValueError, match="not a known function of 'Mul'"):
        root((focal * (1 - (-focal).exp())).mean(), model)
    with pytest.raises(ValueError, match="linear in the parameters, or no likelihood"):
        root(model[0].weight.sum(), model)
    with pytest.raises(ValueError, match="not a known function of 'Pow'"):
        root((out**4).sum(), model)


def test_freed_graphs_are_named() -> None:
    model = classifier()
    loss = F.cross_entropy(model(torch.ones(2, 3)), labels_of(2))
    loss.backward()
    with pytest.raises(RuntimeError, match=r"freed before.*opt\.backward"):
        root(loss, model)


# -------------------------------------------------------------------------------- the optimizer
def vector(parts: Any) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in parts])


def flat_loss(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """The loss as a function of the flat parameters."""
    names = [n for n, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]

    def loss(theta: Tensor) -> Tensor:
        parts = theta.split([s.numel() for s in shapes])
        named = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, named, (x,)), y)

    return loss


@pytest.mark.parametrize("estimator", ["gauss_newton", "hutchinson"])
def test_trajectory_is_a_plain_rederivation_with_the_same_probes(estimator: str) -> None:
    model, seed, rho, lr, decay = classifier().double(), 11, 0.3, 0.02, 0.1
    opt = Sophia(
        model.parameters(),
        lr=lr,
        rho=rho,
        weight_decay=decay,
        estimator=estimator,
        interval=3,
        seed=seed,
    )
    theta = vector(model.parameters())
    twin = classifier().double()
    m, h, updates = torch.zeros_like(theta), torch.zeros_like(theta), 0
    for t in range(10):
        x, y = data(6, 3, seed=t), labels_of(6, seed=t)
        y[t % 6] = -100
        loss = flat_loss(twin, x, y)
        g = torch.autograd.functional.jacobian(loss, theta)
        if t % 3 == 0:
            if estimator == "hutchinson":
                z = vector(signs(p, seed, updates, 0, i) for i, p in enumerate(model.parameters()))
                estimate = z * (torch.autograd.functional.hessian(loss, theta) @ z)
            else:
                numbers = TargetDraws(seed, updates, 0).batch(6)(torch.Size([6]))[0]
                with torch.no_grad():
                    p = model(x).softmax(1)
                drawn = (p.cumsum(1) <= numbers[:, None]).sum(1).where(y != -100, -100)
                sampled = torch.autograd.functional.jacobian(flat_loss(twin, x, drawn), theta)
                estimate = 5.0 * sampled.square()
            h = 0.99 * h + 0.01 * estimate
            updates += 1
        m = 0.965 * m + 0.035 * g
        ratio = m / (rho * h).clamp(min=1e-12)
        theta = theta * (1 - lr * decay) - lr * ratio.clamp(-1, 1)
        opt.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
        torch.testing.assert_close(vector(model.parameters()), theta, rtol=1e-11, atol=1e-12)
        assert opt.clipped == [float((ratio.abs() >= 1).double().mean())]
    assert opt.clock.curvature_updates == updates == 4


def test_averaged_curvature_converges_to_the_diagonal_of_the_ggn() -> None:
    """With a learning rate of zero, and more probes, both averages approach the exact diagonal."""
    x, y = data(8, 3), labels_of(8)
    for estimator, exact in (("gauss_newton", cl.ggn), ("hutchinson", cl.hessian)):
        model = classifier().double()
        diagonal = exact(cl.Risk(model, nn.CrossEntropyLoss(), (x, y))).to_dense().diagonal()
        opt = Sophia(
            model.parameters(),
            lr=0.0,
            betas=(0.0, 0.99),
            estimator=estimator,
            interval=1,
            probes=4,
        )
        for _ in range(500):
            opt.step(lambda model=model: F.cross_entropy(model(x), y))
        found = vector(opt.state[p]["curvature"] for p in model.parameters())
        error = (found - diagonal).norm() / diagonal.norm()
        assert float(error) < 0.15, (estimator, error)  # 4 * 199 probes count in effect


def test_clipping_statistics_are_of_each_group() -> None:
    model = classifier()
    opt = Sophia(
        [
            {"params": model[0].parameters(), "rho": 1e-12},
            {"params": model[2].parameters(), "rho": 1e12},
            {"params": [torch.zeros(2, requires_grad=True)]},
        ],
        lr=1e-3,
    )
    assert opt.clipped == []
    opt.step(lambda: F.cross_entropy(model(torch.ones(4, 3)), labels_of(4)))
    always, never, none = opt.clipped
    assert (always, never) == (1.0, 0.0)
    assert math.isnan(none)


def test_a_step_is_never_longer_than_the_learning_rate() -> None:
    model = classifier()
    opt = Sophia(model.parameters(), lr=0.01, weight_decay=0.0)
    for t in range(12):
        before = vector(model.parameters())
        opt.step(lambda t=t: F.cross_entropy(model(data(6, 3, seed=t).float()), labels_of(6)))
        assert float((vector(model.parameters()) - before).abs().max()) <= 0.01 * (1 + 1e-4)


def test_targets_are_those_of_the_joint_batch_however_it_is_split() -> None:
    whole = TargetDraws(3, 4, 0).batch(10)(torch.Size([5, 2]))
    parts = TargetDraws(3, 4, 0)
    split = [parts.batch(4)(torch.Size([2, 2])), parts.batch(6)(torch.Size([3, 2]))]
    assert torch.equal(torch.cat(split, 1), whole)
    other = TargetDraws(3, 4, 1).batch(10)(torch.Size([5, 2]))
    assert not torch.isclose(whole, other).any()


def test_bad_arguments() -> None:
    model = classifier()
    with pytest.raises(ValueError, match="estimator= is one of 'gauss_newton', 'hutchinson'"):
        Sophia(model.parameters(), estimator="empirical")
    with pytest.raises(ValueError, match="interval= is at least 1, got 0"):
        Sophia(model.parameters(), interval=0)
    with pytest.raises(TypeError, match="correct_bias= is True or False, got int"):
        Sophia(model.parameters(), correct_bias=1)
    with pytest.raises(ValueError, match="rho= is above 0"):
        Sophia(model.parameters(), rho=0.0)
    opt = Sophia(model.parameters())
    with pytest.raises(ValueError, match=r"not a known function of 'Abs'.*Hutchinson"):
        opt.step(lambda: F.l1_loss(model(torch.ones(2, 3)), torch.zeros(2, 3)).abs())
    assert opt.clock.steps == 0


def test_states_of_the_other_estimator_are_refused() -> None:
    model = classifier()
    state = Sophia(model.parameters()).state_dict()
    opt = Sophia(model.parameters(), estimator="hutchinson")
    with pytest.raises(ValueError, match="averages of estimator='gauss_newton'.*has 'hutchinson'"):
        opt.load_state_dict(state)


def test_a_language_model_that_computes_its_own_loss() -> None:
    """As Hugging Face models do: nothing but the loss is needed."""
    torch.manual_seed(0)
    model = models.HuggingFaceLike()
    tokens = labels_of(4, 4, classes=5)
    opt = Sophia(model.parameters(), lr=0.02, rho=1.0, weight_decay=0.0, interval=2)
    losses = [float(opt.step(lambda: model(tokens, tokens).loss)) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]
    assert opt.skipped == 0
