"""MKOR's rules against dense matrices, PyTorch's optimizers and synthetic sequences of losses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from curvlib.optim.rules import first_order, hybrid, mkor
from curvlib.optim.rules.hybrid import HybridState, Trials

F64 = torch.float64


def vectors(count: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=g, dtype=F64)


def dense_average(V: Tensor, decay: float) -> Tensor:
    """Of ``[n, G, k, d]``, by its definition, from the identity times the first mean square."""
    d = V.shape[-1]
    C = V[0].square().mean((1, 2))[:, None, None] * torch.eye(d, dtype=V.dtype)
    for v in V:
        C = decay * C + (1 - decay) * v.mT @ v / v.shape[1]
    return C


# ------------------------------------------------------------------------------ inverses
@settings(max_examples=15, deadline=None)
@given(
    d=st.integers(1, 8),
    k=st.integers(1, 5),
    groups=st.integers(1, 3),
    decay=st.floats(0.9, 0.99),
    seed=st.integers(0, 10**6),
)
def test_it_is_the_inverse_of_the_moving_average_after_100_updates(
    d: int, k: int, groups: int, decay: float, seed: int
) -> None:
    V = vectors(100, (groups, k, d), seed)
    found = mkor.init(groups, d, dtype=F64)
    for v in V:
        found = mkor.update(found, v, decay=decay)
    C = dense_average(V, decay)
    M = mkor.dense(found)
    expected = torch.linalg.inv(C)
    assert float((M - expected).norm() / expected.norm()) < 1e-10
    torch.testing.assert_close(found.mean, C.diagonal(dim1=1, dim2=2).mean(1), rtol=1e-12, atol=0)
    assert torch.equal(M, M.mT)


def test_the_papers_printed_update_is_no_inverse() -> None:
    """Eq. 3.5 (line 7 of Algorithm 1), retyped: why it is not used."""
    c, d = 0.95, 8
    v = vectors(1, (d,), 3)[0]
    start = torch.eye(d, dtype=F64)
    u = start @ v
    printed = c * start + (1 - c) / (c**2 * (1 + c * (1 - c) * v @ u)) * torch.outer(u, u)
    exact = torch.linalg.inv(c * start + (1 - c) * torch.outer(v, v))
    assert float((printed - exact).norm() / exact.norm()) > 0.05
    assert v @ printed @ v > v @ start @ v > v @ exact @ v  # it grows along v
    ours = mkor.Inverse(torch.zeros(1, d, d, dtype=F64), torch.ones(1, d, dtype=F64), torch.ones(1))
    ours = mkor.update(ours, v[None, None], decay=c)
    torch.testing.assert_close(mkor.dense(ours)[0], exact, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("power", [-20, 20])
def test_units_of_vectors_do_not_matter(power: int) -> None:
    s = 2.0**power
    one, other = mkor.init(1, 4), mkor.init(1, 4)
    for v in vectors(30, (1, 2, 4)).float():
        one = mkor.update(one, v, decay=0.9, damping=0.2)
        other = mkor.update(other, s * v, decay=0.9, damping=0.2)
    assert torch.equal(mkor.dense(other) * s**2, mkor.dense(one))


HARD = {
    "one direction, which all others forget": lambda g, d: torch.ones(1, 1, d),
    "spikes": lambda g, d: (
        torch.randn(1, 1, d, generator=g) * 10.0 ** float(torch.randint(-3, 4, (), generator=g))
    ),
    "one coordinate at a time": lambda g, d: torch.eye(d)[int(torch.randint(d, (), generator=g))][
        None, None
    ],
    "a subspace": lambda g, d: torch.cat(
        [torch.randn(1, 3, d // 2, generator=g), torch.zeros(1, 3, d - d // 2)], -1
    ),
}


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10**6), damping=st.sampled_from([0.3, 0.03]), d=st.integers(2, 40))
def test_it_stays_symmetric_positive_definite_and_bounded(
    kind: str, dtype: torch.dtype, seed: int, damping: float, d: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    found = mkor.init(1, d, dtype=dtype)
    for _ in range(100):
        found = mkor.update(found, HARD[kind](g, d), decay=0.9, damping=damping)
    M = mkor.dense(found)
    assert torch.equal(M, M.mT)
    assert found.rest.dtype == dtype
    values = torch.linalg.eigvalsh(M.double())
    assert values[0, 0] > 0
    rounding = 1.0 if dtype == torch.float32 else 1.0 + 0.02 * d**0.5
    assert values[0, -1] <= rounding * 1.0001 / (damping * float(found.mean))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), d=st.integers(24, 40))
def test_rounding_alone_would_make_it_indefinite(seed: int, d: int) -> None:
    Q = torch.linalg.qr(vectors(1, (d, d), seed)[0])[0]
    M = ((Q * torch.logspace(-6, 0, d, dtype=F64)) @ Q.T).float()[None]
    assert torch.linalg.eigvalsh(M.bfloat16().double())[0, 0] < 0
    kept = mkor.dense(mkor._stored(0.5 * (M + M.mT), torch.ones(1), torch.bfloat16))
    assert torch.linalg.eigvalsh(kept.double())[0, 0] > 0
    assert float((kept - M).norm() / M.norm()) < 0.02


def test_half_precision_is_close_to_float32_in_half_the_memory() -> None:
    V = vectors(60, (1, 8, 64), 1).float() * torch.linspace(0.3, 3.0, 64)
    one, half = mkor.init(1, 64), mkor.init(1, 64, dtype=torch.bfloat16)
    for v in V:
        one = mkor.update(one, v, decay=0.9, damping=0.03)
        half = mkor.update(half, v, decay=0.9, damping=0.03)
    G = vectors(1, (64, 5), 2).float()
    a, b = mkor.product(one, G), mkor.product(half, G)
    unit = 2.0**-9  # of rounding, made in each update and forgotten by the decay, and allowed for
    assert float((a - b).norm() / a.norm()) < 3.0 * unit / (1.0 - 0.9)
    assert half.rest.element_size() * 2 == one.rest.element_size()
    assert half.diagonal.dtype == torch.float32


def test_the_stabilizer_is_exact_where_it_acts_and_absent_elsewhere() -> None:
    v = vectors(1, (1, 1, 6), 5)[0]
    free = mkor.update(mkor.init(1, 6, dtype=F64), v, decay=0.1)
    M, mean = mkor.dense(free)[0], float(free.mean)
    assert float(M.abs().sum(1).max()) > 1 / (0.3 * mean)
    held = mkor.update(mkor.init(1, 6, dtype=F64), v, decay=0.1, damping=0.3)
    assert float(mkor.dense(held)[0].abs().sum(1).max()) == pytest.approx(1 / (0.3 * mean))
    loose = mkor.update(mkor.init(1, 6, dtype=F64), v, decay=0.1, damping=1e-3)
    assert torch.equal(mkor.dense(loose), mkor.dense(free))
    keep = (1 / 0.3 - 1) / (float(M.abs().sum(1).max()) * mean - 1)
    blended = keep * M + (1 - keep) * torch.eye(6, dtype=F64) / mean
    torch.testing.assert_close(mkor.dense(held)[0], blended)


def test_zero_vectors_say_nothing() -> None:
    start = mkor.init(2, 3, dtype=F64)
    zeros = torch.zeros(2, 1, 3, dtype=F64)
    same = mkor.update(start, zeros, decay=0.9, damping=0.1)
    assert torch.equal(mkor.dense(same), mkor.dense(start))
    v = vectors(1, (2, 1, 3))[0]
    v[1] = 0.0  # one of the groups
    found = mkor.update(mkor.update(start, v, decay=0.9), zeros, decay=0.9)
    torch.testing.assert_close(
        mkor.dense(found)[0], torch.linalg.inv(dense_average(v[None, :1], 0.9))[0]
    )
    assert torch.equal(mkor.dense(found)[1], torch.eye(3, dtype=F64))


def test_an_indefinite_matrix_begins_anew() -> None:
    lost = mkor.Inverse(torch.zeros(1, 2, 2), torch.tensor([[-300.0, 1.0]]), torch.ones(1))
    found = mkor.update(lost, torch.tensor([[[1.0, 0.0]]]), decay=0.9)
    assert torch.equal(mkor.dense(found)[0], torch.eye(2))


def test_preconditioning_is_two_products() -> None:
    V, W = vectors(9, (2, 1, 4)), vectors(9, (2, 1, 3), 1)
    left, right = mkor.init(2, 4, dtype=F64), mkor.init(2, 3, dtype=F64)
    for v, w in zip(V, W, strict=True):
        left, right = mkor.update(left, v, decay=0.7), mkor.update(right, w, decay=0.7)
    G = vectors(1, (2, 4, 3), 2)[0]
    inv = torch.linalg.inv
    expected = inv(dense_average(V, 0.7)) @ G @ inv(dense_average(W, 0.7))
    torch.testing.assert_close(mkor.preconditioned(G, left, right), expected)
    assert torch.equal(mkor.preconditioned(G, None, None), G)
    torch.testing.assert_close(mkor.preconditioned(G, None, right), G @ inv(dense_average(W, 0.7)))


# -------------------------------------------------------------------------------- norms
@given(seed=st.integers(0, 10**6), power=st.integers(-60, 60))
@settings(max_examples=30, deadline=None)
def test_norms_of_weight_and_bias_together_are_matched(seed: int, power: int) -> None:
    g = [vectors(1, (4, 3), seed)[0], vectors(1, (4,), seed + 1)[0]]
    u = [vectors(1, (4, 3), seed + 2)[0] * 2.0**power, vectors(1, (4,), seed + 3)[0] * 2.0**power]
    found = mkor.norm_matched(u, g)
    flat = [torch.cat([t.flatten() for t in ts]) for ts in (found, g, u)]
    assert float(flat[0].norm()) == pytest.approx(float(flat[1].norm()), rel=1e-14)
    cosine = flat[0] @ flat[2] / (flat[0].norm() * flat[2].norm())
    assert float(cosine) == pytest.approx(1.0, abs=1e-14)


def test_updates_that_are_zero_or_not_finite_become_the_gradient() -> None:
    g = [torch.tensor([3.0, 4.0])]
    for bad in (torch.zeros(2), torch.tensor([math.inf, 1.0]), torch.tensor([math.nan, 1.0])):
        assert torch.equal(mkor.norm_matched([bad], g)[0], g[0])
    assert torch.equal(mkor.norm_matched([torch.ones(2)], [torch.zeros(2)])[0], torch.zeros(2))


# -------------------------------------------------------------------------- first order
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_first_order_rules_are_pytorchs(rule: str, decay: float) -> None:
    mine, theirs = (vectors(1, (3, 2))[0] for _ in range(2))
    theirs.requires_grad_()
    if rule == "adamw":
        opt = torch.optim.AdamW([theirs], lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=decay)
    else:
        opt = torch.optim.SGD([theirs], lr=0.1, momentum=0.7)
    state = first_order.init(mine, squares=rule == "adamw")
    for u in vectors(12, (3, 2), 4):
        if rule == "adamw":
            (change,), (state,) = first_order.adamw(
                [mine], [u], [state], lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=decay
            )
        else:
            with torch.no_grad():
                theirs.mul_(1 - 0.1 * decay)  # decoupled, which PyTorch's SGD has not
            (change,), (state,) = first_order.sgd(
                [mine], [u], [state], lr=0.1, momentum=0.7, weight_decay=decay
            )
        mine = mine + change
        theirs.grad = u
        opt.step()
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-12, atol=1e-14)
    assert state.steps == 12


# ------------------------------------------------------------------------------- hybrid
def run(
    steps: int,
    fall: object,
    cost: float,
    trials: Trials = Trials(),  # noqa: B008  (frozen)
    noise: float = 0.0,
    scale: float = 1.0,
    shift: float = 0.0,
    seed: int = 0,
) -> HybridState:
    """A training whose loss falls by ``fall(step, second order)`` in each step."""
    g = torch.Generator().manual_seed(seed)
    state, loss = hybrid.init(), 0.0
    for t in range(steps):
        second = state.second_order(trials)
        seen = loss + noise * float(torch.randn((), generator=g))
        state = hybrid.update(state, scale * seen + shift, trials, cost=cost)
        if state.switched_at is not None:
            break
        loss -= fall(t, second)  # type: ignore[operator]  # a function
    return state


def test_second_order_steps_that_pay_are_kept() -> None:
    found = run(4000, lambda t, second: 3.0 if second else 1.0, cost=2.0, noise=0.5)
    assert found.switched_at is None
    assert found.trials >= 40
    assert found.steps == 4000


@pytest.mark.parametrize("cost", [1.0, 1.2, 5.0])
def test_equal_progress_goes_to_the_cheaper_steps(cost: float) -> None:
    found = run(2000, lambda t, second: 1.0, cost=cost)
    # three trials, each judged after the block that follows it
    assert found.switched_at == 20 * (4 * 3 + 1)


def test_a_gain_less_than_its_price_does_not_pay() -> None:
    def gain(t: int, second: bool) -> float:
        return 1.5 if second else 1.0

    assert run(4000, gain, cost=1.4).switched_at is None
    assert run(4000, gain, cost=1.6).switched_at == 260


@pytest.mark.parametrize("end", [500, 1500])
def test_it_switches_soon_after_the_advantage_has_ended(end: int) -> None:
    def fall(t: int, second: bool) -> float:
        return 0.5 ** (t / 2000) * (3.0 if second and t < end else 1.0)

    for seed in range(5):
        found = run(end + 400, fall, cost=1.5, noise=0.5, seed=seed)
        assert found.switched_at is not None
        assert end < found.switched_at <= end + 360


def test_a_loss_that_rises_is_not_excused_by_its_cost() -> None:
    found = run(2000, lambda t, second: -2.0 if second else -1.0, cost=100.0)
    assert found.switched_at == 260
    found = run(2000, lambda t, second: -1.0 if second else -2.0, cost=100.0)
    assert found.switched_at is None


def test_where_nothing_moves_trials_are_coin_flips() -> None:
    """Three heads in a row take 14 flips on average; variance 142 (a textbook result)."""
    runs = 200
    counts = [
        run(40000, lambda t, s: 0.0, 1.0, Trials(4, 2, 3), noise=1.0, seed=i).trials
        for i in range(runs)
    ]
    mean = sum(counts) / runs
    # neighbouring trials share a block, so flips are a little dependent
    assert abs(mean - 14.0) < 4.0 * (142.0 / runs) ** 0.5 + 3.0


@settings(max_examples=10, deadline=None)
@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-100.0, 100.0), seed=st.integers(0, 99))
def test_units_and_offsets_of_the_loss_do_not_matter(scale: float, shift: float, seed: int) -> None:
    def fall(t: int, second: bool) -> float:
        return 3.0 if second and t < 300 else 1.0

    plain = run(900, fall, cost=1.5, noise=0.5, seed=seed)
    assert run(900, fall, 1.5, noise=0.5, scale=scale, shift=shift, seed=seed).switched_at == (
        plain.switched_at
    )


def test_losses_that_are_not_finite_are_passed_over() -> None:
    state = hybrid.init()
    for t in range(100):
        state = hybrid.update(state, -float(t), Trials(4, 2, 1), cost=1.0)
        state = hybrid.update(state, math.nan, Trials(4, 2, 1), cost=1.0)
    assert state.switched_at is not None
    assert state.steps == 200


def test_rates_are_slopes() -> None:
    losses = tuple(float(x) for x in vectors(1, (20,), 9)[0])
    t = torch.arange(15, dtype=F64)
    A = torch.stack([t, torch.ones_like(t)], 1)
    slope = torch.linalg.lstsq(A, torch.tensor(losses[5:], dtype=F64)[:, None]).solution[0, 0]
    assert hybrid.rate(losses) == pytest.approx(-float(slope), rel=1e-10)


@pytest.mark.parametrize("bad", [(3, 4, 3), (20, 1, 3), (20, 4, 0)])
def test_trials_need_room(bad: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least 4 steps, a cycle at least 2 blocks, and"):
        Trials(*bad)


def test_hybrid_states_are_kept_as_plain_values() -> None:
    state = run(150, lambda t, s: 1.0, 2.0)
    kept = state.plain()
    assert isinstance(kept["losses"], list)
    assert HybridState.from_plain(kept) == state
