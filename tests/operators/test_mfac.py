"""M-FAC operators against dense inverses in float64, and against the recursion of the paper."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from curvlib.core.risk import Risk
from curvlib.core.space import ParamSpace
from curvlib.estimators.solve import solve
from curvlib.operators.block_mfac import BlockMFAC
from curvlib.operators.gradients import gradients
from curvlib.operators.mfac import MFAC, mfac, mfac_window
from curvlib.operators.windows.window import Window

F64 = torch.float64


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _undamped(rows: Tensor, parts: tuple[int, ...]) -> Tensor:
    blocks = [g.mT @ g / len(g) for g in rows.to(F64).split(list(parts), 1)]
    return torch.block_diag(*blocks)


def _dense(F: MFAC) -> Tensor:
    """The matrix, from nothing but the rows and the damping that is in use."""
    parts = F.window.parts
    used = zip(parts, F.damping_used, strict=True)
    damping = torch.cat([torch.full((n,), v, dtype=F64) for n, v in used])
    return _undamped(F.window.rows(), parts) + damping.diag()


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.to(F64) - exact).norm() / exact.norm())


def _orthogonal_rows() -> Tensor:
    return torch.linalg.qr(_randn(40, 6)).Q.mT * torch.arange(1.0, 7.0, dtype=F64)[:, None]


CASES: dict[str, tuple[Tensor, tuple[int, ...]]] = {
    "fewer rows than parameters": (_randn(9, 60), (60,)),
    "more rows than parameters": (_randn(64, 10), (10,)),
    "one row": (_randn(1, 30), (30,)),
    "one parameter": (_randn(5, 1), (1,)),
    "a row of zeros": (torch.cat([_randn(3, 20), torch.zeros(1, 20, dtype=F64)]), (20,)),
    "rows that repeat": (_randn(3, 20).repeat(3, 1), (20,)),
    "orthogonal rows": (_orthogonal_rows(), (40,)),
    "parts": (_randn(8, 50), (20, 1, 29)),
    "a part without gradients": (
        torch.cat([_randn(8, 20), torch.zeros(8, 5, dtype=F64)], 1),
        (20, 5),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("damping", "relative"), [(0.1, True), (0.7, False), (1e-4, True)])
def test_everything_against_dense(name: str, damping: float, relative: bool) -> None:
    rows, parts = CASES[name]
    F = mfac(rows, damping=damping, relative=relative, parts=parts)
    assert isinstance(F, MFAC)
    plain = _undamped(rows, parts)
    means = [float(block.mean()) for block in plain.diagonal().split(list(parts))]
    whole = float(plain.diagonal().mean())
    for used, mean in zip(F.damping_used, means, strict=True):
        assert math.isclose(used, damping * (mean or whole) if relative else damping)
    A = _dense(F)
    inverse = torch.linalg.inv(A)
    n, c = F.shape[0], len(rows)
    X = _randn(n, 3, seed=1)
    X[:, 1] = rows.mT @ _randn(c, seed=2)  # in the span
    X[:, 2] -= rows.mT @ torch.linalg.lstsq(rows.mT, X[:, 2:], driver="gelsd").solution[:, 0]
    tolerance = 1e-9
    assert _error(F @ X, A @ X) <= 1e-13
    assert _error(F.to_dense(), A) <= 1e-13
    for k in range(3):
        if X[:, k].norm() > 1e-8:
            assert _error(F.solve(X)[:, k], inverse @ X[:, k]) <= tolerance
            assert _error(F.solve(X[:, k]), inverse @ X[:, k]) <= tolerance
    if len(parts) == 1 and X[:, 2].norm() > 1e-8:  # out of the span: x / damping
        assert _error(F.solve(X[:, 2]), X[:, 2] / F.damping_used[0]) <= tolerance
    for j in range(c):
        exact = torch.linalg.solve(A, rows[j])  # stable where the row is in the span, unlike inv
        assert (F.solve_row(j) - exact).norm() <= tolerance * max(float(exact.norm()), 1e-300)
        quadratic = float(rows[j] @ exact)
        assert math.isclose(F.quadratic_row(j), quadratic, rel_tol=1e-9, abs_tol=1e-300)
        assert F.quadratic_row(j) < c * len(parts)
    diagonal = inverse.diagonal()
    used = A.diagonal() - plain.diagonal()
    assert _error(F.inverse_diagonal(), diagonal) <= tolerance
    assert _error(F.diagonal(), A.diagonal()) <= 1e-13
    assert (F.leverages() - (1 - used * diagonal)).abs().max() <= tolerance
    p = torch.tensor(sorted({0, n // 2, n - 1}))
    assert _error(F.inverse_submatrix(p), inverse[p][:, p]) <= tolerance
    for kept in (False, True):
        if kept:
            F.precompute()
        q = [-1, 0]
        found = F.inverse_submatrix(torch.arange(n) < 2, q)
        assert _error(found, inverse[: min(n, 2)][:, q]) <= tolerance
        assert math.isclose(
            F.inverse_element(0, n - 1), float(inverse[0, -1]), rel_tol=1e-8, abs_tol=1e-12
        )
    values = torch.linalg.eigvalsh(plain).flip(0)
    found = F.eigenvalues()
    assert torch.allclose(found, values[: len(found)], rtol=1e-9, atol=1e-12 * float(values[0]))
    assert math.isclose(F.trace(), float(A.trace()), rel_tol=1e-12)
    assert math.isclose(F.logdet(), float(torch.logdet(A)), rel_tol=1e-9, abs_tol=1e-9)
    values, vectors = torch.linalg.eigh(A)
    for power in (-1.0, -0.5, 0.0, 0.5, 2.0):
        exact = (vectors * values**power) @ vectors.mT @ X
        assert _error(F.power(power) @ X, exact) <= tolerance
    more = torch.linalg.inv(A + 0.3 * torch.eye(n, dtype=F64))
    assert _error(F.solve(X, 0.3), more @ X) <= tolerance
    assert _error(F.inverse(0.3) @ X, more @ X) <= tolerance
    assert math.isclose(F.logdet(0.3), -float(torch.logdet(more)), rel_tol=1e-9, abs_tol=1e-9)
    assert F.psd
    assert F.symmetric


def test_one_row_is_its_closed_form() -> None:
    g, x = _randn(30), _randn(30, seed=1)
    F = mfac(g[None], damping=0.2, relative=False)
    assert isinstance(F, MFAC)
    assert _error(F.solve(x), (x - g * (g @ x) / (0.2 + g @ g)) / 0.2) <= 1e-13
    assert _error(F.solve_row(), g / (0.2 + g @ g)) <= 1e-13


# ------------------------------------------------------------------------- properties
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("push"), st.integers(1, 10)),
            st.tuples(st.just("evict"), st.just(0)),
            st.tuples(st.just("remove"), st.integers(0, 9)),
            st.tuples(st.just("resize"), st.integers(1, 8)),
        ),
        min_size=1,
        max_size=20,
    ),
    st.sampled_from([(11,), (3, 8)]),
)
@settings(max_examples=40, deadline=None)
def test_any_sequence_equals_the_static_result(
    steps: list[tuple[str, int]], parts: tuple[int, ...]
) -> None:
    F = mfac_window(11, 4, damping=0.05, relative=False, parts=parts, dtype=F64)
    x = _randn(11, 2, seed=5)
    for i, (step, number) in enumerate(steps):
        if step == "push":
            F.push(_randn(number, 11, seed=i))
        elif step == "resize":
            F.resize(number)
        elif F.window.count:
            F.remove(number % F.window.count) if step == "remove" else F.evict()
        if i % 3 == 0:
            F.solve(x)  # what is cached must not survive the next step
    if not F.window.count:
        assert torch.equal(F.solve(x), x / 0.05)
        return
    static = mfac(F.window.rows(), damping=0.05, relative=False, parts=parts)
    assert isinstance(static, MFAC)
    exact = torch.linalg.inv(_dense(static))
    for op in (F, static):
        assert _error(op.solve(x), exact @ x) <= 1e-9
        assert _error(op.inverse_diagonal(), exact.diagonal()) <= 1e-9
        for j in range(F.window.count):
            assert _error(op.solve_row(j), exact @ F.window.row(j)) <= 1e-9


@given(st.integers(1, 12), st.integers(1, 20), st.floats(1e-4, 1e3), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_identities(m: int, n: int, damping: float, seed: int) -> None:
    rows, x, y = _randn(m, n, seed=seed), _randn(n, seed=seed + 1), _randn(n, seed=seed + 2)
    F = MFAC(_window(rows), damping=damping, relative=False)
    solved = F.solve(x)
    size = float(x.norm() * y.norm()) / damping
    assert abs(float(y @ solved - x @ F.solve(y))) <= 1e-12 * size
    top = float(torch.linalg.matrix_norm(rows, 2)) ** 2 / m
    quadratic, square = float(x @ solved), float(x @ x)
    assert square / (damping + top) * (1 - 1e-9) <= quadratic <= square / damping * (1 + 1e-9)
    diagonal, mean = F.inverse_diagonal(), rows.square().mean(0)
    assert bool((diagonal >= 1 / (damping + mean)).all())
    assert bool((diagonal <= 1 / damping).all())
    leverages = F.leverages()
    assert bool((leverages >= 0).all())
    assert bool((leverages < 1).all())
    assert float(leverages.sum()) <= min(m, n) * (1 + 1e-12)
    scaled = MFAC(_window(3 * rows), damping=9 * damping, relative=False)
    assert (9 * scaled.solve(x) - solved).norm() <= 1e-10 * solved.norm() * (1 + top / damping)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    permuted = MFAC(_window(rows[:, order]), damping=damping, relative=False).solve(x[order])
    assert (permuted - solved[order]).norm() <= 1e-10 * solved.norm() * (1 + top / damping)
    more = F.with_damping(10 * damping, relative=False)
    assert float(x @ more.solve(x)) <= quadratic * (1 + 1e-9)
    far = F.with_damping(1e12 * (1 + top), relative=False)
    assert _error(far.solve(x) * far.damping, x) <= 1e-10


def _window(rows: Tensor, **settings: Any) -> Window:
    window = Window(rows.shape[1], len(rows), dtype=rows.dtype, **settings)
    window.push(rows)
    return window


def test_order_of_rows_does_not_matter_and_the_window_is_averaged_while_it_fills() -> None:
    rows, x = _randn(6, 30), _randn(30, seed=1)
    F = mfac_window(30, 100, damping=0.1, relative=False, dtype=F64)
    for i, row in enumerate(rows):
        F.push(row)
        exact = torch.linalg.inv(_undamped(rows[: i + 1], (30,)) + 0.1 * torch.eye(30, dtype=F64))
        assert _error(F.solve(x), exact @ x) <= 1e-10
    before = F.solve(x)
    F.remove(2)
    F.push(rows[2])
    assert _error(F.solve(x), before) <= 1e-10


# --------------------------------------------------------------------------- accuracy
def _power_law(condition: float, m: int = 128, n: int = 1200) -> tuple[Tensor, float, Tensor]:
    """Float32 rows, the damping at which ``cond(K) = condition``, and directions of their span."""
    U = torch.linalg.qr(_randn(m, m)).Q
    V = torch.linalg.qr(_randn(n, m, seed=1)).Q
    exponent = 0.5 * math.log(condition * 10) / math.log(m)
    rows = (U * torch.arange(1, m + 1).to(F64) ** -exponent) @ V.mT
    rows = (rows / rows.norm(dim=1).max()).float()
    values = torch.linalg.eigvalsh(rows.to(F64) @ rows.to(F64).mT)
    return rows, float((values[-1] - condition * values[0]) / ((condition - 1) * m)), V


def _recursion(rows: Tensor, damping: float, x: Tensor) -> Tensor:
    """The recursion over rows of the M-FAC paper (section 3.1), in the type of the rows."""
    m = len(rows)
    V, c = torch.zeros_like(rows), torch.zeros(m, dtype=rows.dtype)
    for i, g in enumerate(rows):
        V[i] = g / damping - ((V[:i] @ g) / c[:i]) @ V[:i]
        c[i] = m + g @ V[i]
    return x / damping - ((V @ x) / c) @ V


@pytest.mark.parametrize(("condition", "bound"), [(1e5, 1e-4), (1e7, 1e-3)])
@pytest.mark.parametrize("one_by_one", [True, False])
def test_float32_solves_are_right(condition: float, bound: float, one_by_one: bool) -> None:
    rows, damping, V = _power_law(condition)
    assert damping > 0
    m, n = rows.shape
    exact = rows.to(F64).mT @ rows.to(F64) / m + damping * torch.eye(n, dtype=F64)
    factor = torch.linalg.cholesky(exact)
    outside = _randn(n, seed=3)
    outside -= V @ (V.mT @ outside)
    vectors = {
        "random": _randn(n, seed=2),
        "in the span": rows.to(F64).mT @ _randn(m, seed=4),
        "along the longest row": V[:, 0],
        "out of the span": outside,
        "a row": rows[-1].to(F64),
    }
    window = Window(n, m)
    for block in rows.split(1 if one_by_one else m):
        window.push(block)
    F = MFAC(window, damping=damping, relative=False)
    worst = 0.0
    for name, vector in vectors.items():
        x = vector.float()
        truth = torch.cholesky_solve(x.to(F64)[:, None], factor)[:, 0]
        assert _error(F.solve(x), truth) <= bound / 10, name
        worst = max(worst, _error(_recursion(rows, damping, x), truth))
    assert worst > 10 * bound  # what the recursion leaves of a float32 result
    assert _error(F.solve_row(), truth) <= bound / 10  # of the last: a row


def test_one_pass_in_float32_is_enough_where_systems_are_well_conditioned() -> None:
    rows = _randn(32, 20_000).float()
    F = mfac_window(20_000, 32)
    for row in rows:
        F.push(row)
    truth = MFAC(_window(rows.to(F64)))
    exact = truth.solve_row()
    assert _error(F.solve_row(), exact) <= 1e-5
    assert F.window.rounded  # nothing was read again in float64
    x = rows[3] + 1e-5 * _randn(20_000, seed=9).float()
    assert _error(F.solve(x), truth.solve(x.to(F64))) <= 1e-5
    assert not F.window.rounded  # here it was needed
    loose = MFAC(Window(20_000, 32), accuracy=math.inf)
    for row in rows:
        loose.push(row)
    assert 1e-5 < _error(loose.solve(x), truth.solve(x.to(F64))) < 1.0
    assert loose.window.rounded


@pytest.mark.parametrize("scale", [1e-22, 1e-14, 1e14, 1e25])
def test_scales_at_which_float32_products_leave_its_range(scale: float) -> None:
    rows = (_randn(6, 50) * scale).float()
    F = mfac_window(50, 6, damping=0.1)
    for row in rows:
        F.push(row)
    double = rows.to(F64)
    A = _undamped(double, (50,))
    A += 0.1 * A.diagonal().mean() * torch.eye(50, dtype=F64)
    x = torch.ones(50) * scale
    assert _error(F.solve_row(2) * scale, torch.linalg.solve(A, double[2]) * scale) <= 1e-5
    assert _error(F.solve(x) * scale, torch.linalg.solve(A, x.to(F64)) * scale) <= 1e-5


def test_bfloat16_windows_are_those_of_the_rounded_rows() -> None:
    rows, x = _randn(8, 200), _randn(200, seed=1).float()
    F = mfac_window(200, 8, dtype=torch.bfloat16)
    for row in rows:
        F.push(row)
    exact = MFAC(_window(rows.bfloat16().to(F64)))
    assert F.dtype == torch.float32
    assert _error(F.solve(x), exact.solve(x.to(F64))) <= 1e-5
    assert _error(F.solve_row(), exact.solve_row()) <= 1e-5
    assert _error(F.inverse_diagonal(), exact.inverse_diagonal()) <= 1e-6


# ----------------------------------------------------------------------------- damping
def test_singular_systems_are_damped_more_and_say_so() -> None:
    rows = torch.cat([_randn(3, 20)] * 2)
    F = mfac(rows, damping=1e-18)
    assert isinstance(F, MFAC)
    with pytest.warns(RuntimeWarning, match="singular to working precision with damping .* is use"):
        used = F.damping_used[0]
    (steps,) = F.escalations
    assert steps >= 1
    assert math.isclose(used, 1e-18 * 10**steps * float(rows.square().mean()))
    assert F.damping == 1e-18
    x = _randn(20)
    A = _dense(F)
    assert (A @ F.solve(x) - x).norm() <= 1e-15 * F.solve(x).norm() * float(A.trace())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.solve(x)  # said once
        F.damping = 0.1
        assert F.escalations == (0,)
    parts = mfac(torch.cat([rows, _randn(6, 9, seed=1)], 1), damping=1e-18, parts=[20, 9])
    assert isinstance(parts, MFAC)
    with pytest.warns(RuntimeWarning, match="the window system of 1 of 2 parts is singular"):
        assert parts.escalations[1] == 0


def test_dampings_are_tried_without_reading_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    F = MFAC(_window(_randn(6, 30)))
    F.damping_used  # noqa: B018 (factorizes)
    reads: list[int] = []
    whole = Window.pieces
    monkeypatch.setattr(Window, "pieces", lambda self: reads.append(1) or whole(self))
    for damping in (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5):
        F.damping = damping
        F.with_damping(damping).logdet()
        F.quadratic_row()
        F.trace()
    assert not reads
    F.solve_row()
    assert len(reads) == 1
    F.solve(torch.ones(30, dtype=F64))
    assert len(reads) == 3


def test_rows_that_were_not_checked_are_found_by_the_solve() -> None:
    F = mfac_window(5, 3)
    F.push(torch.ones(5))
    F.push(torch.full((5,), float("nan")), check=False)
    with pytest.raises(FloatingPointError, match="1 of 2 rows of the window are not finite; remo"):
        F.solve(torch.ones(5))
    F.remove(1)
    assert bool(torch.isfinite(F.solve(torch.ones(5))).all())


def test_an_empty_window() -> None:
    F = mfac_window(4, 3, damping=0.5, relative=False)
    x = torch.ones(4)
    assert torch.equal(F.solve(x, 0.5), x)
    assert torch.equal(F @ x, x / 2)
    assert torch.equal(F.diagonal(), x / 2)
    assert torch.equal(F.inverse_diagonal(), 2 * x)
    assert torch.equal(F.leverages(), 0 * x)
    assert torch.equal(F.inverse_submatrix([1, 2]), 2 * torch.eye(2))
    assert (F.trace(), F.logdet(0.5), len(F.eigenvalues())) == (2.0, 0.0, 0)
    assert F.fingerprint() != mfac_window(4, 3).fingerprint()
    relative = mfac_window(4, 3)
    for call in (lambda: relative.solve(x), lambda: relative @ x, relative.trace, relative.logdet):
        with pytest.raises(RuntimeError, match="the window is empty, .* pass relative=False"):
            call()
    with pytest.raises(RuntimeError, match="the window is empty, so nothing is known of F; push"):
        relative.precompute()


def test_fingerprints_and_powers_follow_the_window() -> None:
    F = mfac_window(4, 3)
    F.push(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    seen = {F.fingerprint()}
    root = F.power(0.5)
    F.push(torch.tensor([0.0, 1.0, 0.0, 0.0]))
    seen.add(F.fingerprint())
    with pytest.raises(RuntimeError, match=r"the window has changed since power\(0\.5\)"):
        root @ torch.ones(4)
    F.remove(0)
    seen.add(F.fingerprint())  # the Gram matrix is that of the first
    F.damping = 0.5
    seen.add(F.fingerprint())
    assert len(seen) == 4
    assert "M-FAC: psd 4 x 4" in repr(F)


def test_it_preconditions_a_solver() -> None:
    rows = _randn(20, 60) * torch.logspace(0, 2, 60, dtype=F64)
    F = MFAC(_window(rows), damping=1e-3)
    b = _randn(60, seed=1)
    result = solve(F, b, damping=0.1, method="cg", preconditioner=F, tolerance=1e-8)
    exact = torch.linalg.solve(_dense(F) + 0.1 * torch.eye(60, dtype=F64), b)
    assert _error(result.value, exact) <= 1e-6
    assert int(result.iterations) <= 3


# ------------------------------------------------------------------------- from a risk
def _risk() -> Risk:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = _randn(30, 4), torch.arange(30) % 3
    return Risk(model, nn.CrossEntropyLoss(), (x, y))


def test_rows_of_a_risk_and_of_a_stream() -> None:
    risk = _risk()
    n = risk.space.size
    F = mfac(risk, count=30, damping=0.1)
    assert isinstance(F, MFAC)
    assert F.space is risk.space
    assert F.window.size == 30
    rows = torch.cat(list(gradients(risk)))
    expected = rows.mT @ rows / 30
    expected += 0.1 * expected.diagonal().mean() * torch.eye(n, dtype=F64)
    assert _error(F.to_dense(), expected) <= 1e-9
    streamed = mfac(gradients(risk, block=7), damping=0.1, space=risk.space, size=30)
    collected = mfac(gradients(risk, block=7), damping=0.1)
    assert _error(streamed.to_dense(), expected) <= 1e-9
    assert _error(collected.to_dense(), expected) <= 1e-9
    last = mfac(gradients(risk, block=7), size=8, parts="tensor", space=risk.space)
    assert isinstance(last, MFAC)
    assert torch.allclose(last.window.rows(), rows[-8:], rtol=1e-12)
    assert last.window.parts == (20, 5, 15, 3)
    layers = mfac(risk, size=8, parts="layer", dtype=torch.bfloat16)
    assert isinstance(layers, MFAC)
    assert layers.window.parts == (25, 18)
    assert layers.window.dtype == torch.bfloat16
    assert [list(op.shape) for op in layers.blocks().values()] == [[25, 25], [18, 18]]
    sampled = mfac(risk, kind="mc", count=16, micro_batch=2, seed=1)
    assert isinstance(sampled, MFAC)
    assert sampled.window.count == 16
    halves = mfac(rows.half())
    assert isinstance(halves, MFAC)
    assert halves.window.dtype == torch.float32


def test_blocks() -> None:
    risk = _risk()
    F = mfac(risk, block_size=4, count=30, damping=0.1)
    assert isinstance(F, BlockMFAC)
    assert F.shape == (risk.space.size,) * 2


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no rows": (lambda: mfac([]), ValueError, "there are no rows"),
    "empty": (lambda: mfac(torch.zeros(0, 3)), ValueError, "there are no rows"),
    "one vector": (lambda: mfac(torch.zeros(3)), ValueError, r"expected rows \[m, P\], got .*\[3"),
    "a number": (lambda: mfac(3), TypeError, "a curvlib.Risk, got int"),  # type: ignore[arg-type]
    "lists": (lambda: mfac([[1.0]]), TypeError, r"blocks of rows as tensors \[n, P\], got list"),  # type: ignore[list-item]
    "cubes": (
        lambda: mfac([torch.zeros(1, 2, 3)]),
        ValueError,
        r"blocks of rows \[n, P\], got shape \[1, 2, 3\]",
    ),
    "zero damping": (lambda: mfac(torch.ones(2, 3), damping=0.0), ValueError, "positive damping"),
    "auto": (
        lambda: mfac(torch.ones(2, 3), damping="auto"),
        ValueError,
        "damping='auto' belongs to blocks, .* pass block_size= too",
    ),
    "count of rows": (
        lambda: mfac(torch.ones(2, 3), count=2, kind="mc", micro_batch=2),
        ValueError,
        "count=, kind=, micro_batch= belong to a risk",
    ),
    "no size": (lambda: mfac(torch.ones(2, 3), size=0), ValueError, "a positive size, got 0"),
    "no size of a stream": (lambda: mfac([], size=0), ValueError, "a positive size, got 0"),
    "no size of a risk": (lambda: mfac(_risk(), size=0, count=3), ValueError, "positive size, g"),
    "no count": (lambda: mfac(_risk(), count=0), ValueError, "count= needs to be at least 1"),
    "short loader": (lambda: mfac(_risk(), size=31), ValueError, "need 31 examples, .* has 30"),
    "empty loader": (
        lambda: mfac(Risk(nn.Linear(1, 1), nn.MSELoss(), [])),
        ValueError,
        "the data has no batch",
    ),
    "arrays": (lambda: mfac(torch.ones(2, 3).numpy()), TypeError, "torch.from_numpy"),
    "integers": (
        lambda: mfac(torch.ones(2, 3).int()),
        TypeError,
        "or bfloat16 rows, got torch.int",
    ),
    "short rows": (
        lambda: mfac([torch.ones(2, 3), torch.ones(2, 4)]),
        ValueError,
        r"rows \[k, 3\], got shape \[2, 4\]",
    ),
    "a column": (
        lambda: mfac(torch.ones(2, 3)).push(torch.ones(3, 1)),
        ValueError,
        r"expected a row \[3\] or rows \[k, 3\], got shape \[3, 1\]",
    ),
    "groups of what": (lambda: mfac(torch.ones(2, 3), parts=[["*"]]), ValueError, "needs space="),
    "groups that leave some out": (
        lambda: mfac_window(_risk().space, 2, parts=[["0.*"]]),
        ValueError,
        "'2.weight' is in no group",
    ),
    "groups without parameters": (
        lambda: mfac_window(_risk().space, 2, parts=[["*"], ["0.*"]]),
        ValueError,
        r"group \['0.\*'\] of parts= has no parameter of its own",
    ),
    "groups that are no neighbours": (
        lambda: mfac_window(_risk().space, 2, parts=[["*.weight"], ["*.bias"]]),
        ValueError,
        "2 groups make 4 runs; make a window of each",
    ),
    "more damping": (
        lambda: mfac(torch.ones(2, 3)).solve(torch.ones(3), -1.0),
        ValueError,
        "expected damping >= 0",
    ),
    "accuracy": (
        lambda: mfac(torch.ones(2, 3), accuracy=-1.0),
        ValueError,
        "a positive accuracy, got -1.0",
    ),
    "all zero": (
        lambda: mfac(torch.zeros(2, 3)).solve(torch.ones(3)),
        RuntimeError,
        "all 2 rows of the window are zero, .* pass relative=False",
    ),
    "float16": (lambda: mfac(torch.ones(2, 3), dtype=torch.float16), TypeError, "float16 rows"),
    "nan": (lambda: mfac(torch.ones(2, 3) * math.nan), FloatingPointError, "row 0 of 2 are NaN"),
    "parts": (
        lambda: mfac(torch.ones(2, 3), parts="all"),
        ValueError,
        "'tensor', 'layer', name globs",
    ),
    "parts of what": (lambda: mfac(torch.ones(2, 3), parts="layer"), ValueError, "needs space="),
    "blocks of what": (lambda: mfac(torch.ones(2, 3), block_size=2), ValueError, "needs space="),
    "blocks of a window": (
        lambda: mfac(torch.ones(2, 3), block_size=2, size=3, dtype=F64),
        ValueError,
        "size=, dtype= belong to a window",
    ),
    "space": (
        lambda: MFAC(Window(3, 2), space=ParamSpace.of(nn.Linear(1, 1))),
        ValueError,
        "space has 2 parameters, but rows of the window have length 3",
    ),
    "window": (lambda: MFAC(torch.ones(2, 3)), TypeError, "expected a curvlib Window, got Tensor"),  # type: ignore[arg-type]
    "dtype": (
        lambda: mfac(torch.ones(2, 3)).solve(torch.ones(3, dtype=F64)),
        TypeError,
        "expected torch.float32 vectors, got torch.float64",
    ),
    "index": (
        lambda: mfac(torch.ones(2, 3)).inverse_element(3, 0),
        IndexError,
        "index 3 is out of range for 3 parameters",
    ),
    "indices": (
        lambda: mfac(torch.ones(2, 3)).inverse_submatrix(torch.ones(2)),
        TypeError,
        "expected integer indices or a boolean mask, got torch.float32",
    ),
    "mask": (
        lambda: mfac(torch.ones(2, 3)).inverse_submatrix(torch.ones(2) > 0),
        ValueError,
        "expected a mask of length 3, got 2",
    ),
    "row": (
        lambda: mfac(torch.ones(2, 3)).solve_row(2),
        IndexError,
        "no row 2 in a window that holds 2 rows",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_say_what_was_expected(name: str) -> None:
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call()


# ------------------------------------------------------------------------------- CUDA
@pytest.mark.gpu
@pytest.mark.parametrize("storage", [None, "cpu"])
def test_cuda_equals_cpu(storage: str | None) -> None:
    rows, x = _randn(12, 4000).float(), _randn(4000, seed=1).float()
    here = mfac_window(4000, 8, parts=[1000, 3000])
    there = mfac_window(4000, 8, parts=[1000, 3000], device="cuda", storage=storage)
    for row in rows:
        here.push(row)
        there.push(row.cuda())
    assert _error(there.solve(x.cuda()).cpu(), here.solve(x).to(F64)) <= 1e-5
    assert _error(there.solve_row().cpu(), here.solve_row().to(F64)) <= 1e-5
    assert _error(there.inverse_diagonal().cpu(), here.inverse_diagonal().to(F64)) <= 1e-6
