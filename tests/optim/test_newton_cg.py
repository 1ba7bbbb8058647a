"""Damped Newton steps against closed forms, SciPy, and what the rule promises."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import curvlib as cl
from curvlib.core.operator import LinearOperator
from curvlib.optim.newton_cg import NewtonCG
from curvlib.optim.rules import newton as rule

F64 = torch.float64


class Point(nn.Module):
    """A bare vector of parameters; the loss is a function of it."""

    def __init__(self, x: Any) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.as_tensor(x, dtype=F64))


def problem(function: Any, x: Any) -> cl.Risk:
    """The risk whose value is ``function(x)``."""
    point = Point(x)
    return cl.Risk(
        point,
        lambda output, batch: output,
        [torch.zeros(1)],
        forward=lambda m, b: function(m.x),
        reduction="sum",
    )


def logistic(
    seed: int = 0, n: int = 80, d: int = 5, spread: float = 1.5
) -> tuple[cl.Risk, np.ndarray, np.ndarray]:
    """Logistic regression on overlapping classes, so that there is a minimum."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) * np.logspace(0, spread, d)
    score = x @ rng.normal(size=d)
    y = (score / score.std() + rng.normal(size=n) > 0).astype(float)
    model = nn.Linear(d, 1, bias=False).double()
    with torch.no_grad():
        model.weight.zero_()
    data = (torch.from_numpy(x), torch.from_numpy(y)[:, None])
    return cl.Risk(model, nn.BCEWithLogitsLoss(), data), x, y


def falling(losses: list[float], rounding: float = 1e-14) -> bool:
    return all(b <= a + rounding * abs(a) for a, b in itertools.pairwise(losses))


def point(risk: cl.Risk) -> Tensor:
    return risk.space.join(list(risk.params.values())).clone()


# ------------------------------------------------------------------------------------- the rule
def test_damping_bounds_the_step_by_gamma() -> None:
    """For a positive semi-definite matrix, ||h|| <= gamma."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        a = rng.normal(size=(4, 6))
        g, gamma = a.T @ rng.normal(size=4), float(rng.uniform(0.01, 3))
        lam = rule.damping(float(np.linalg.norm(g)), gamma)
        h = np.linalg.solve(a.T @ a + lam * np.eye(6), -g)
        assert np.linalg.norm(h) <= gamma * (1 + 1e-12)


def trial_of(f: Any, x: Tensor, h: Tensor, B: Tensor) -> rule.Trial:
    def both(at: Tensor) -> tuple[float, Tensor]:
        at = at.detach().requires_grad_()
        value = f(at)
        return float(value.detach()), torch.autograd.grad(value, at)[0]

    (value, g), (new_value, new_g) = both(x), both(x + h)
    return rule.Trial(g, h, B @ h, value, new_value, new_g)


@given(seed=st.integers(0, 2**16), exponent=st.sampled_from([0.5, 1.0]))
@settings(max_examples=30, deadline=None)
def test_a_step_within_the_measured_gamma_lowers_a_convex_loss_as_derived(
    seed: int, exponent: float
) -> None:
    """f(x) - f(x + h) >= ||g+||^2 / (2 lambda) wherever gamma <= gamma(h), for any B."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(7, 4, generator=generator, dtype=F64)
    b = torch.randn(7, generator=generator, dtype=F64)
    x = torch.randn(4, generator=generator, dtype=F64)

    def f(at: Tensor) -> Tensor:
        return torch.logsumexp(A @ at - b, 0) + 0.05 * at.square().sum()

    H = torch.autograd.functional.hessian(f, x)
    B = H * float(torch.rand((), generator=generator, dtype=F64) * 2)
    g = torch.autograd.functional.jacobian(f, x)
    for gamma in (0.01, 0.1, 1.0, 10.0):
        lam = rule.damping(float(g.norm()), gamma, exponent)
        h = torch.linalg.solve(B + lam * torch.eye(4, dtype=F64), -g)
        trial = trial_of(f, x, h, B)
        error = float((trial.new_gradient - g - B @ h).norm())
        measured = rule.measured_gamma(trial, exponent)
        assert measured == pytest.approx(float(g.norm()) ** exponent * float(h.norm()) / error)
        if gamma <= measured:
            fall = trial.value - trial.new_value
            assert fall >= float(trial.new_gradient.square().sum()) / (2 * lam) * (1 - 1e-9)
            assert rule.accepted(trial)


def test_measured_gamma_of_a_quadratic_is_infinite_and_that_of_a_missing_part_is_known() -> None:
    A = torch.diag(torch.tensor([1.0, 3.0, 10.0], dtype=F64))
    x = torch.tensor([1.0, -2.0, 0.5], dtype=F64)

    def f(at: Tensor) -> Tensor:
        return 0.5 * at @ (A @ at)

    h = -0.3 * x
    assert rule.measured_gamma(trial_of(f, x, h, A)) == math.inf
    eye = torch.eye(3, dtype=F64)
    assert rule.measured_gamma(trial_of(f, x, h, A - 2.0 * eye)) == pytest.approx(
        float((A @ x).norm()) / 2.0  # ||g|| / ||H - B||
    )


def test_gamma_follows_what_is_measured_within_bounds() -> None:
    g, h = torch.tensor([1.0]).double(), torch.tensor([-0.5]).double()

    def after(gamma: float, new_gradient: float, new_value: float = 0.0) -> rule.NewtonState:
        trial = rule.Trial(g, h, h, 1.0, new_value, torch.tensor([new_gradient]).double())
        return rule.update(rule.init(gamma), trial)[1]

    assert after(2.0, 0.0).gamma == 1.0  # error 0.5: measured 1
    assert after(8.0, 0.0).gamma == 4.0  # at least half of what it was
    assert after(0.1, 0.0).gamma == pytest.approx(0.4)  # at most four times
    assert after(math.inf, 0.0).gamma == math.inf  # accepted steps leave no damping alone
    assert after(0.1, 0.0, 2.0).gamma == 0.05  # rejected
    assert after(math.inf, 0.0, 2.0).gamma == 0.5
    assert after(math.inf, math.nan, math.nan).gamma == 0.25  # half of the step
    assert after(math.inf, 1e300, 2.0).gamma > 0.0
    assert rule.update(rule.init(2.0), rule.Trial(g, h, h, 1.0, 0.0, 0 * g), adapt=False)[
        1
    ] == rule.NewtonState(2.0, steps=1)


def test_steps_that_change_the_loss_by_rounding_are_judged_by_the_gradient() -> None:
    g, h = torch.tensor([1e-9]).double(), torch.tensor([-1e-9]).double()
    for new, good in ((1e-10, True), (2e-9, False)):
        trial = rule.Trial(g, h, h, 1.0, 1.0 + 2e-16, torch.tensor([new]).double())
        assert rule.accepted(trial) is good


# -------------------------------------------------------------------------------- the optimizer
@pytest.mark.parametrize("operator", [cl.hessian, cl.ggn])
def test_a_diagonal_quadratic_takes_one_step(operator: Any) -> None:
    scales, target = torch.logspace(-3, 3, 8, dtype=F64), torch.arange(8, dtype=F64)
    model = Point(torch.zeros(8))
    risk = cl.Risk(
        model,
        nn.MSELoss(reduction="sum"),
        [(scales, target)],
        forward=lambda m, b: m.x * b[0],
    )
    opt = NewtonCG(risk, operator, gamma=math.inf, tolerance=1e-13, max_products=1000)
    before = opt.step()
    assert float(before) == pytest.approx(float(target.square().sum()))
    torch.testing.assert_close(model.x.detach(), target / scales, rtol=1e-9, atol=1e-9)
    assert opt.last is not None
    assert opt.last.accepted
    assert opt.last.trials == 1
    assert opt.last.damping == 0.0


@pytest.mark.parametrize("operator", [cl.hessian, cl.ggn, cl.kfac])
def test_logistic_regression_falls_monotonically_to_the_minimum(operator: Any) -> None:
    risk, x, y = logistic()
    opt = NewtonCG(risk, operator)
    losses = []
    for _ in range(150 if operator is cl.kfac else 30):
        losses.append(float(opt.step()))
        assert opt.last is not None
        assert opt.last.loss == losses[-1]
        if not opt.last.accepted:
            break
    assert falling(losses)

    def f(w: np.ndarray) -> float:
        z = x @ w
        return float(np.mean(np.logaddexp(0, z) - y * z))

    def gradient(w: np.ndarray) -> np.ndarray:
        return x.T @ (1 / (1 + np.exp(-(x @ w))) - y) / len(y)

    def hessian(w: np.ndarray) -> np.ndarray:
        p = 1 / (1 + np.exp(-(x @ w)))
        return (x.T * (p * (1 - p))) @ x / len(y)

    best = scipy.optimize.minimize(
        f, np.zeros(5), jac=gradient, hess=hessian, method="Newton-CG", options={"xtol": 1e-12}
    )
    np.testing.assert_allclose(point(risk).numpy(), best.x, rtol=1e-6)
    assert float(risk.gradient().norm()) < 1e-9


def test_convergence_is_faster_than_linear_with_the_exact_hessian() -> None:
    risk, _, _ = logistic(seed=1)
    opt = NewtonCG(risk, cl.hessian, tolerance=1e-10)
    norms = []
    while len(norms) < 25 and (not norms or norms[-1] > 1e-12):
        opt.step()
        norms.append(float(risk.gradient().norm()))
    ratios = [b / a for a, b in itertools.pairwise(norms)]
    assert min(ratios) < 1e-3, norms
    assert len(norms) < 15


def test_a_poor_matrix_still_converges_since_gamma_follows_it() -> None:
    """B = 0: gradient descent, whose step gamma / ||g|| is found along the way."""
    risk, _, _ = logistic(d=2, spread=0.3)

    def nothing(of: cl.Risk) -> LinearOperator:
        size = of.space.size
        return LinearOperator(torch.zeros_like, (size, size), dtype=F64, psd=True)

    opt = NewtonCG(risk, nothing)
    losses = [float(opt.step()) for _ in range(60)]
    assert falling(losses)
    assert float(risk.gradient().norm()) < 1e-5
    assert math.isfinite(opt.progress.gamma)


def rosenbrock(x: Tensor) -> Tensor:
    return (100.0 * (x[1:] - x[:-1].square()).square() + (1 - x[:-1]).square()).sum()


def double_well(x: Tensor) -> Tensor:
    return ((x.square() - 1).square()).sum() + 0.1 * (x[:-1] * x[1:]).sum()


@pytest.mark.parametrize("gamma", [1.0, math.inf])
@pytest.mark.parametrize(
    ("function", "start"),
    [(rosenbrock, [-1.2, 1.0, 0.5]), (double_well, [0.1, -0.2, 0.05, 0.3])],
)
def test_negative_curvature_is_damped_until_steps_go_down(
    function: Any, start: list[float], gamma: float
) -> None:
    risk = problem(function, start)
    H = torch.autograd.functional.hessian(function, point(risk))
    negative = float(torch.linalg.eigvalsh(H)[0]) < 0
    opt, losses = NewtonCG(risk, cl.hessian, gamma=gamma, tolerance=1e-8), []
    for _ in range(60):
        losses.append(float(opt.step()))
        assert opt.last is not None
        if not opt.last.accepted:
            break
    assert falling(losses)
    x = point(risk)
    assert float(torch.autograd.functional.jacobian(function, x).norm()) < 1e-6
    assert float(torch.linalg.eigvalsh(torch.autograd.functional.hessian(function, x))[0]) > 0
    if negative:
        assert opt.progress.rejected > 0


def test_one_step_is_the_damped_system_solved_densely() -> None:
    risk, _, _ = logistic(seed=2)
    x, g, H = point(risk), risk.gradient(), cl.hessian(risk).to_dense()
    NewtonCG(risk, cl.hessian, gamma=0.7, exponent=0.5, lr=0.5, tolerance=1e-12).step()
    lam = float(g.norm()) ** 0.5 / 0.7
    h = torch.linalg.solve(H + lam * torch.eye(5, dtype=F64), -g)
    torch.testing.assert_close(point(risk), x + 0.5 * h, rtol=1e-10, atol=1e-13)


def test_steps_that_are_not_accepted_leave_the_parameters_bitwise() -> None:
    """The matrix has the wrong sign of everything: no damping up to the limit helps."""
    risk, _, _ = logistic()
    with torch.no_grad():
        for p in risk.params.values():
            p.normal_(generator=torch.Generator().manual_seed(0))
    before, gradient = point(risk), risk.gradient()

    def wrong(of: cl.Risk) -> LinearOperator:
        size = of.space.size
        out = LinearOperator(lambda V: -1e9 * V, (size, size), dtype=F64, symmetric=True)
        out.solve = lambda columns, damping=0.0: -columns  # type: ignore[attr-defined]  # uphill
        return out

    opt = NewtonCG(risk, wrong, max_trials=4)
    opt.step()
    assert opt.last is not None
    assert not opt.last.accepted
    assert opt.last.trials == 4
    assert (opt.skipped, opt.progress.steps) == (1, 0)
    assert torch.equal(point(risk), before)
    assert torch.equal(risk.gradient(), gradient)


def test_an_interrupted_step_leaves_the_parameters_bitwise() -> None:
    risk, _, _ = logistic()
    before, calls = point(risk), []

    def interrupted() -> Tensor:
        calls.append(1)
        if len(calls) == 2:  # after the move
            raise KeyboardInterrupt
        return type(risk).value(risk)

    risk.value = interrupted  # type: ignore[method-assign]  # of this one object
    with pytest.raises(KeyboardInterrupt):
        NewtonCG(risk).step()
    assert torch.equal(point(risk), before)


def test_points_that_are_not_finite_are_skipped_or_stepped_back_from() -> None:
    def edge(x: Tensor) -> Tensor:  # -log has no values beyond zero
        return -x.log().sum() + 30.0 * x.sum()

    risk = problem(edge, [1.0, 1.0])
    opt = NewtonCG(risk, cl.hessian, gamma=math.inf)
    for _ in range(20):
        opt.step()
    torch.testing.assert_close(point(risk), torch.full((2,), 1 / 30, dtype=F64), rtol=1e-6, atol=0)
    risk = problem(edge, [-1.0, 1.0])
    opt = NewtonCG(risk, cl.hessian)
    assert math.isnan(float(opt.step()))
    assert opt.skipped == 1
    assert point(risk).tolist() == [-1.0, 1.0]


def test_matrices_that_are_not_finite_are_skipped() -> None:
    risk, _, _ = logistic()
    before = point(risk)

    def broken(of: cl.Risk) -> LinearOperator:
        size = of.space.size
        return LinearOperator(lambda V: V * math.nan, (size, size), dtype=F64, psd=True)

    opt = NewtonCG(risk, broken)
    state = opt.state_dict()
    opt.step()
    assert opt.skipped == 1
    assert torch.equal(point(risk), before)
    assert opt.state_dict()["curvlib"]["progress"] == state["curvlib"]["progress"]


def test_a_gradient_of_zero_is_left() -> None:
    risk = problem(lambda x: x.square().sum(), [0.0, 0.0])
    opt = NewtonCG(risk)
    assert float(opt.step()) == 0.0
    assert opt.last is not None
    assert not opt.last.accepted
    assert opt.skipped == 0


def test_a_restored_state_continues_bitwise(tmp_path: Any) -> None:
    def run(cut: int) -> Tensor:
        risk, _, _ = logistic()
        opt = NewtonCG(risk, gamma=0.3)
        for _ in range(cut):
            opt.step()
        torch.save((risk.model.state_dict(), opt.state_dict()), tmp_path / "saved")
        risk, _, _ = logistic()
        opt = NewtonCG(risk)
        weights, state = torch.load(tmp_path / "saved", weights_only=True)
        risk.model.load_state_dict(weights)
        opt.load_state_dict(state)
        for _ in range(5 - cut):
            opt.step()
        return point(risk)

    assert torch.equal(run(0), run(3))


def test_schedulers_change_the_share_of_a_step() -> None:
    risk, _, _ = logistic()
    opt = NewtonCG(risk)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    opt.step()
    schedule.step()
    x, g, lam = point(risk), risk.gradient(), None
    H = cl.ggn(risk).to_dense()
    lam = float(g.norm()) / opt.progress.gamma
    opt.tolerance = 1e-12
    opt.step()
    h = torch.linalg.solve(H + lam * torch.eye(5, dtype=F64), -g)
    torch.testing.assert_close(point(risk), x + 0.5 * h)


def test_float32_networks_are_fitted_to_the_rounding_of_the_loss() -> None:
    """Gauss-Newton on a small tanh network: no warning, no growth of the loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1))
    x = torch.randn(40, 3)
    risk = cl.Risk(model, nn.MSELoss(), (x, torch.sin(x.sum(1, keepdim=True))))
    opt = NewtonCG(risk)
    losses = [float(opt.step()) for _ in range(40)]
    assert falling(losses, 1e-5)
    assert losses[-1] < 0.05 * losses[0]
    assert all(p.grad is None for p in model.parameters())


def test_conjugate_gradients_may_be_cut_short_and_preconditioned() -> None:
    risk, _, _ = logistic(seed=3)
    short = NewtonCG(risk, max_products=2, tolerance=1e-10)
    losses = [float(short.step()) for _ in range(40)]
    assert falling(losses)
    assert short.progress.products <= 40 * (4 + 1)
    risk, _, _ = logistic(seed=3)
    opt = NewtonCG(risk, tolerance=1e-8, preconditioner=cl.kfac)
    opt.step()
    assert opt.last is not None
    assert opt.last.products <= 4  # K-FAC is the GGN of one linear layer with one output


def test_bad_arguments() -> None:
    risk, _, _ = logistic()
    with pytest.raises(TypeError, match=r"takes a curvlib\.Risk .*got list"):
        NewtonCG([nn.Parameter(torch.zeros(2))])  # type: ignore[arg-type]  # on purpose
    with pytest.raises(TypeError, match=r"operator= is a function of a risk.*got str"):
        NewtonCG(risk, "ggn")  # type: ignore[arg-type]  # on purpose
    with pytest.raises(TypeError, match="preconditioner= is a function of a risk"):
        NewtonCG(risk, preconditioner=3)  # type: ignore[arg-type]  # on purpose
    for bad in ({"gamma": 0.0}, {"gamma": math.nan}, {"exponent": -1.0}, {"tolerance": 0.0}):
        (name,) = bad
        with pytest.raises(ValueError, match=f"{name}= is"):
            NewtonCG(risk, **bad)
    with pytest.raises(ValueError, match="lr= is above 0"):
        NewtonCG(risk, lr=-1.0)
    with pytest.raises(TypeError, match="adapt= is True or False"):
        NewtonCG(risk, adapt=1)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(ValueError, match="max_trials= is at least 1"):
        NewtonCG(risk, max_trials=0)
    opt = NewtonCG(risk)
    with pytest.raises(TypeError, match="call step.. without a closure"):
        opt.step(lambda: F.mse_loss(torch.zeros(1), torch.zeros(1)))  # type: ignore[arg-type]  # on purpose
    with pytest.raises(RuntimeError, match="are those of its risk"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(ValueError, match="state has no entry"):
        opt.load_state_dict(torch.optim.SGD(risk.model.parameters(), lr=0.1).state_dict())
