"""M-FAC SGD against dense inverses in float64, its bound, compressed rows, and its state."""

from __future__ import annotations

import copy
import io
import itertools
import math
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from curvlib.core.random import generator_of
from curvlib.operators.windows.gradient_window import GradientWindow
from curvlib.optim.mfac import MFAC
from curvlib.optim.rules import mfac as rule
from tests.operators.test_window import Allocations
from tests.optim.small import F64, batches, loss_of, net, train

SHAPES = [(3, 4), (4,), (), (2, 1, 3)]
SIZES = [math.prod(shape) for shape in SHAPES]


def gaussian(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=generator_of(None, seed))


def parameters(dtype: torch.dtype = F64) -> list[nn.Parameter]:
    return [nn.Parameter(gaussian(i, *shape).to(dtype)) for i, shape in enumerate(SHAPES)]


def gradients(steps: int, seed: int = 100) -> list[list[Tensor | None]]:
    """Correlated gradients of the parameters, of growing and shrinking size."""
    base = gaussian(seed, sum(SIZES))
    rows = [
        (0.5 * base + gaussian(seed + 1 + t, sum(SIZES))) * math.exp(math.sin(t))
        for t in range(steps)
    ]
    return [
        [part.view(shape) for part, shape in zip(row.split(SIZES), SHAPES, strict=True)]
        for row in rows
    ]


def run(opt: MFAC, params: list[nn.Parameter], steps: list[list[Tensor | None]]) -> np.ndarray:
    """The trajectory ``[steps, P]`` under prescribed gradients."""
    out = []
    for given_ in steps:
        for p, g in zip(params, given_, strict=True):
            p.grad = None if g is None else g.to(p.dtype)
        opt.step()
        out.append(torch.cat([p.detach().flatten() for p in params]).double())
    return torch.stack(out).numpy()


def plain(
    steps: list[list[Tensor | None]],
    *,
    size: int,
    damping: float,
    relative: bool | str = "rows",
    tensors: bool = False,
    lr: float,
    momentum: float = 0.0,
    decay: float = 0.0,
    matching: bool = False,
    trust: float | None = None,
) -> np.ndarray:
    """The rule with dense matrices and NumPy, one step after the other."""
    theta = torch.cat([p.detach().flatten() for p in parameters()]).numpy()
    velocity, window, out = np.zeros_like(theta), deque[np.ndarray](maxlen=size), []
    bounds = np.cumsum([0, *SIZES])
    blocks = list(itertools.pairwise(bounds)) if tensors else [(0, len(theta))]
    for grads in steps:
        row = np.concatenate(
            [
                np.zeros(n) if g is None else g.numpy().ravel()
                for n, g in zip(SIZES, grads, strict=True)
            ]
        )
        u, q = np.zeros_like(theta), 0.0
        if row.any():
            window.append(row)
            G = np.stack(window)
            c = len(G)
            for low, high in blocks:
                if not row[low:high].any():
                    continue
                F0 = G[:, low:high].T @ G[:, low:high] / c
                mean = {"rows": np.trace(F0) / c, True: F0.diagonal().mean(), False: 1.0}[relative]
                u[low:high] = np.linalg.solve(
                    F0 + damping * mean * np.eye(high - low), row[low:high]
                )
                q += row[low:high] @ u[low:high]
        scale = np.linalg.norm(row) / np.linalg.norm(u) if matching and u.any() else 1.0
        if trust is not None and q * scale**2 > trust:
            scale = math.sqrt(trust / q)
        for low, high, g in zip(bounds[:-1], bounds[1:], grads, strict=True):
            if g is not None:
                part = slice(low, high)
                velocity[part] = momentum * velocity[part] + scale * u[part]
                theta[part] = (1 - lr * decay) * theta[part] - lr * velocity[part]
        out.append(theta.copy())
    return np.stack(out)


# ---------------------------------------------------------------------------- trajectories
@pytest.mark.parametrize("window", ["group", "tensor"])
@pytest.mark.parametrize(
    ("relative", "damping"), [("rows", 1.0), ("rows", 1e-3), (True, 0.5), (False, 0.2)]
)
def test_steps_are_those_of_the_dense_inverse(
    window: str, relative: bool | str, damping: float
) -> None:
    params, steps = parameters(), gradients(11)
    opt = MFAC(
        params,
        lr=0.1,
        size=4,
        damping=damping,
        relative=relative,
        momentum=0.0,
        window=window,
        norm_matching=False,
    )
    expected = plain(
        steps, size=4, damping=damping, relative=relative, tensors=window == "tensor", lr=0.1
    )
    np.testing.assert_allclose(run(opt, params, steps), expected, rtol=1e-9, atol=1e-10)
    assert opt.windows[0].count == 4


@pytest.mark.parametrize("window", ["group", "tensor"])
@pytest.mark.parametrize("trust", [None, 0.5])
@pytest.mark.parametrize("matching", [False, True])
def test_momentum_decay_matching_and_trust(
    window: str, trust: float | None, matching: bool
) -> None:
    params, steps = parameters(), gradients(9)
    opt = MFAC(
        params,
        lr=0.05,
        size=5,
        damping=0.3,
        momentum=0.8,
        weight_decay=0.4,
        window=window,
        norm_matching=matching,
        trust=trust,
    )
    settings_: dict[str, Any] = {"momentum": 0.8, "decay": 0.4, "matching": matching}
    expected = plain(
        steps, size=5, damping=0.3, tensors=window == "tensor", lr=0.05, trust=trust, **settings_
    )
    np.testing.assert_allclose(run(opt, params, steps), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("window", ["group", "tensor"])
@pytest.mark.parametrize("first", [0, 4])
def test_missing_late_and_vanishing_gradients(window: str, first: int) -> None:
    params, steps = parameters(), gradients(12)
    for t, step in enumerate(steps):
        if t < first or t % 5 == 3:
            step[1] = None  # has its first gradient at step ``first``
        if t % 4 == 2:
            step[0] = None
    steps[6] = [torch.zeros(shape, dtype=F64) for shape in SHAPES]
    opt = MFAC(params, lr=0.1, size=4, momentum=0.9, weight_decay=0.1, window=window)
    expected = plain(
        steps,
        size=4,
        damping=1.0,
        tensors=window == "tensor",
        lr=0.1,
        momentum=0.9,
        decay=0.1,
        matching=True,
    )
    np.testing.assert_allclose(run(opt, params, steps), expected, rtol=1e-9, atol=1e-10)


def test_a_parameter_without_any_gradient_takes_no_place() -> None:
    params, steps = parameters(), gradients(3)
    for step in steps:
        step[0] = step[2] = None
    before = params[0].detach().clone()
    opt = MFAC(params, size=4, weight_decay=0.1)
    run(opt, params, steps)
    assert opt.windows[0].length == SIZES[1] + SIZES[3]
    assert torch.equal(params[0].detach(), before)
    assert params[0] not in opt.state


def test_the_first_steps_average_over_the_rows_there_are() -> None:
    p = nn.Parameter(torch.zeros(3, dtype=F64))
    opt = MFAC([p], lr=1.0, size=32, damping=0.5, relative=False, momentum=0.0, norm_matching=False)
    rows = torch.eye(3, dtype=F64) * 2
    for c, g in enumerate(rows, 1):
        before = p.detach().clone()
        p.grad = g
        opt.step()
        # orthogonal rows: (g g' / c + 0.5)^-1 g; divided by m it would be 3.2 g at once
        expected = -g / (4.0 / c + 0.5)
        assert torch.allclose(p.detach() - before, expected, rtol=1e-12)


def test_groups_have_windows_and_settings_of_their_own() -> None:
    params, steps = parameters(), gradients(6)
    opt = MFAC(
        [
            {"params": params[:2], "size": 3, "damping": 0.1},
            {"params": params[2:], "size": 5, "window": "tensor", "lr": 0.01},
        ],
        lr=0.1,
    )
    found = run(opt, params, steps)
    each: list[np.ndarray] = []
    for members, options in (
        (slice(0, 2), {"size": 3, "damping": 0.1, "lr": 0.1}),
        (slice(2, 4), {"size": 5, "window": "tensor", "lr": 0.01}),
    ):
        alone = parameters()[members]
        each.append(run(MFAC(alone, **options), alone, [step[members] for step in steps]))
    np.testing.assert_allclose(found, np.concatenate(each, 1), rtol=1e-12)
    assert {k: w.size for k, w in opt.windows.items()} == {0: 3, 1: 5}


def test_micro_batches_make_one_row() -> None:
    model = net()
    opt = MFAC(model.parameters(), size=4)
    for x, y in batches(3):
        opt.zero_grad()
        for part in zip(x.chunk(3), y.chunk(3), strict=True):
            (loss_of(model, part) / 3).backward()
        joint = torch.cat([p.grad.flatten() for p in model.parameters()])
        opt.step()
        assert torch.equal(opt.windows[0].row(-1), joint)
    assert opt.windows[0].count == 3


def test_weight_decay_does_not_enter_the_window() -> None:
    params, steps = parameters(), gradients(3)
    opt = MFAC(params, size=4, weight_decay=100.0)
    run(opt, params, steps)
    rows = torch.stack([torch.cat([g.flatten() for g in step]) for step in steps])
    assert torch.equal(opt.windows[0].rows(), rows)


# ----------------------------------------------------------------------------- the rule
@given(st.integers(1, 12), st.integers(1, 8), st.floats(-6, 3), st.integers(0, 2**20))
@settings(deadline=None, max_examples=80)
def test_no_direction_is_longer_than_the_number_of_rows(
    count: int, length: int, exponent: float, seed: int
) -> None:
    window, damping = GradientWindow([length], 5, dtype=F64), 10.0**exponent
    scales = gaussian(seed, count, 1).mul(3).exp()
    for row in gaussian(seed + 1, count, length) * scales:
        window.push(window.prepared(row))
        rows = window.window.rows()
        quadratic = window.quadratic(damping, "rows")
        c = len(rows)
        F0 = rows.mT @ rows / c
        dense = F0 + damping * F0.trace() / c * torch.eye(length, dtype=F64)
        u = torch.linalg.solve(dense, row)
        assert 0 < quadratic < c
        assert quadratic == pytest.approx(float(row @ u), rel=1e-6)
        assert window.lengths_of(row)[0] == pytest.approx(float(row.norm()), rel=1e-12)
        every = [float(g @ torch.linalg.solve(dense, g)) for g in rows]
        effective = float(torch.linalg.solve(dense, F0).trace())
        assert sum(every) / c == pytest.approx(effective, rel=1e-6)


@given(st.floats(0.01, 100), st.floats(1e-3, 1e3), st.one_of(st.none(), st.floats(1e-3, 1e3)))
@settings(deadline=None)
def test_scaled_directions_keep_to_both_lengths(
    wanted: float, quadratic: float, trust: float | None
) -> None:
    s = rule.factor(wanted, quadratic, trust)
    assert 0 < s <= wanted * (1 + 1e-12)
    if trust is not None:
        assert s**2 * quadratic <= trust * (1 + 1e-12)
    if trust is None or wanted**2 * quadratic < trust * (1 - 1e-12):
        assert s == wanted


def test_a_step_is_as_long_as_trust_allows() -> None:
    params, steps = parameters(), gradients(8)
    opt = MFAC(params, lr=0.5, size=4, damping=0.01, momentum=0.0, norm_matching=False, trust=0.3)
    theta = torch.cat([p.detach().flatten() for p in params])
    for step in steps:
        after = torch.as_tensor(run(opt, params, [step])[0])
        u, rows = (theta - after) / 0.5, opt.windows[0].rows()
        c = len(rows)
        squared = float((rows @ u).square().sum() / c)
        squared += 0.01 * float(rows.square().sum()) / c**2 * float(u.square().sum())
        assert squared == pytest.approx(0.3, rel=1e-9)  # 0.3 is less than all of theirs
        theta = after


def test_the_rule_alone() -> None:
    p, u, v = gaussian(1, 2, 3), gaussian(2, 2, 3), gaussian(3, 2, 3)
    expected_v = 0.7 * v + 0.25 * u
    expected = p * (1 - 0.1 * 0.2) - 0.1 * expected_v
    parts = [p.clone(), p[0].clone()], [u.clone(), u[0].clone()], [v.clone(), v[0].clone()]
    rule.update(*parts, lr=0.1, momentum=0.7, weight_decay=0.2, factor=0.25)
    assert torch.allclose(parts[0][0], expected, rtol=1e-14)
    assert torch.allclose(parts[0][1], expected[0], rtol=1e-14)
    assert torch.allclose(parts[2][0], expected_v, rtol=1e-14)
    rule.update([], [], [], lr=0.1, momentum=0.7, weight_decay=0.2)
    half = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    assert rule.init(half).dtype == torch.float32
    assert not rule.init(half).requires_grad


# -------------------------------------------------------------- precision, compression
@pytest.mark.parametrize("window", ["group", "tensor"])
def test_bfloat16_windows_come_close_to_float32(window: str) -> None:
    steps, found = gradients(10), {}
    start = torch.cat([p.detach().flatten() for p in parameters()]).numpy()
    for dtype in (torch.float32, torch.bfloat16, F64):
        params = parameters(torch.float32)
        opt = MFAC(params, lr=0.1, size=6, dtype=dtype, window=window)
        found[dtype] = run(opt, params, steps) - start
        assert opt.windows[0].dtype == dtype
        assert all(opt.state[p]["momentum"].dtype == torch.float32 for p in params)
    far = np.abs(found[F64]).max()
    assert np.abs(found[torch.float32] - found[F64]).max() < 1e-6 * far
    error = np.abs(found[torch.bfloat16] - found[torch.float32]).max()
    assert 1e-5 * far < error < 2e-2 * far


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_in_half_precision(dtype: torch.dtype) -> None:
    params, single, steps = parameters(dtype), parameters(dtype), gradients(6)
    single = [nn.Parameter(p.detach().float()) for p in single]
    steps = [[g.to(dtype).float() for g in step] for step in steps]
    options: dict[str, Any] = {"lr": 0.01, "size": 4}
    found = run(MFAC(params, **options), params, steps)
    expected = run(MFAC(single, **options), single, steps)
    assert np.abs(found - expected).max() < 6 * torch.finfo(dtype).eps * np.abs(expected).max()


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", ["group", "tensor"])
def test_compressed_rows_and_the_residual_add_up_to_the_gradients(
    dtype: torch.dtype, window: str
) -> None:
    params, steps = parameters(), gradients(7)
    opt = MFAC(params, size=7, compression=0.2, dtype=dtype, window=window)
    run(opt, params, steps)
    (held,) = opt.state_dict()["curvlib"]["extra"]["windows"]
    total = opt.windows[0].rows().double().sum(0) + held["window"]["residual"].double()
    expected = sum(torch.cat([g.flatten() for g in step]) for step in steps)
    assert torch.allclose(total, expected, rtol=1e-5 if dtype != F64 else 1e-13, atol=1e-5)
    kept = sum(math.ceil(0.2 * n) for n in SIZES) if window == "tensor" else math.ceil(4.6)
    assert int((opt.windows[0].rows() != 0).sum(1).max()) == kept


@pytest.mark.parametrize("window", ["group", "tensor"])
def test_compressed_steps_are_those_of_dense_inverses_of_compressed_rows(window: str) -> None:
    params, steps = parameters(), gradients(9)
    tensors = window == "tensor"
    residual, compressed = torch.zeros(sum(SIZES), dtype=F64), []
    for step in steps:
        row = torch.cat([g.flatten() for g in step]) + residual
        kept = torch.zeros_like(row)
        for start, n in zip(np.cumsum([0, *SIZES]), SIZES, strict=False) if tensors else [(0, 23)]:
            k = math.ceil(0.3 * n)
            order = row[start : start + n].abs().argsort(descending=True)[:k] + start
            kept[order] = row[order]
        residual = row - kept
        parts = [part.view(s) for part, s in zip(kept.split(SIZES), SHAPES, strict=True)]
        compressed.append(parts)
    opt = MFAC(params, lr=0.1, size=4, compression=0.3, window=window, weight_decay=0.1)
    expected = plain(
        compressed,
        size=4,
        damping=1.0,
        tensors=tensors,
        lr=0.1,
        momentum=0.9,
        decay=0.1,
        matching=True,
    )
    np.testing.assert_allclose(run(opt, params, steps), expected, rtol=1e-9, atol=1e-10)


def test_keeping_all_entries_is_keeping_whole_rows() -> None:
    params, other, steps = parameters(), parameters(), gradients(9)
    found = run(MFAC(params, size=4, compression=1.0), params, steps)
    np.testing.assert_allclose(found, run(MFAC(other, size=4), other, steps), rtol=1e-12)


def test_memory_is_the_window_and_a_few_vectors() -> None:
    n, m = 50_000, 16
    params = [nn.Parameter(torch.zeros(n // 2)), nn.Parameter(torch.zeros(5, n // 10))]
    for p in params:
        p.grad = torch.ones_like(p)
    vector = 4 * n
    for compression, floor in ((None, m * vector), (0.01, int(0.02 * m * vector) + vector)):
        opt = MFAC(params, size=m, compression=compression)
        with Allocations() as seen:
            opt.step()
        momentum = vector
        assert seen.peak < floor + momentum + 3.2 * vector
        with Allocations() as seen:
            opt.step()
        assert seen.peak < (3.2 if compression else 2.2) * vector


# -------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("compression", [None, 0.3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3.4e38])
def test_what_is_not_finite_never_enters_a_window(bad: float, compression: float | None) -> None:
    params = parameters(torch.float32)
    opt = MFAC(
        [{"params": params[:2]}, {"params": params[2:]}],
        size=4,
        dtype=torch.bfloat16,
        compression=compression,
    )
    good, wrong = gradients(6), gradients(1, seed=7)
    run(opt, params, good[:5])
    before = copy.deepcopy(opt.state_dict())
    theta = torch.cat([p.detach().flatten() for p in params])
    assert wrong[0][3] is not None
    wrong[0][3][0, 0, 0] = bad  # in the second group; 3.4e38 is infinite in bfloat16
    run(opt, params, wrong)
    assert opt.skipped == 1
    assert opt.clock.steps == 5
    assert torch.equal(torch.cat([p.detach().flatten() for p in params]), theta)
    after = opt.state_dict()
    after["curvlib"]["skipped"] = 0
    _require_equal(after, before)
    run(opt, params, good[5:])
    assert opt.clock.steps == 6


def _require_equal(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            _require_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            _require_equal(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("window", ["group", "tensor"])
@pytest.mark.parametrize("compression", [None, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_continues_bitwise(
    window: str, compression: float | None, dtype: torch.dtype
) -> None:
    steps = gradients(12)
    for t in range(5):
        steps[t][1] = None  # the window grows later, also after loading
    options: dict[str, Any] = {
        "size": 3, "window": window, "compression": compression, "dtype": dtype, "trust": 0.5
    }  # fmt: skip
    params = parameters(torch.float32)
    opt = MFAC(params, **options)
    run(opt, params, steps[:4])
    for cut in (4, 8):
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        file.seek(0)
        other = [nn.Parameter(p.detach().clone()) for p in params]
        resumed = MFAC(other)  # settings come with the state
        resumed.load_state_dict(torch.load(file, weights_only=True))
        found = run(resumed, other, steps[cut : cut + 4])
        assert np.array_equal(found, run(opt, params, steps[cut : cut + 4]))
        _require_equal(resumed.state_dict(), opt.state_dict())


def test_a_bad_state_changes_nothing() -> None:
    model, data = net(), batches(4)
    opt = MFAC(model.parameters(), size=3)
    train(opt, model, data)
    before = copy.deepcopy(opt.state_dict())
    state = copy.deepcopy(before)
    state["curvlib"]["extra"]["windows"][0]["window"]["window"]["parts"] = [1, 2]
    with pytest.raises(ValueError, match=r"the state has parts=\[1, 2\], this window has"):
        opt.load_state_dict(state)
    _require_equal(opt.state_dict(), before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr= is at least 0, got -1"),
        ({"lr": float("nan")}, ValueError, "lr= is a finite number, got nan"),
        ({"momentum": 1.0}, ValueError, r"momentum= is in \[0, 1\), got 1"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay= is at least 0"),
        ({"damping": 0.0}, ValueError, "damping= is above 0, got 0"),
        ({"relative": "columns"}, ValueError, "relative= is 'rows', True or False, got 'columns'"),
        ({"trust": 0.0}, ValueError, "trust= is above 0"),
        ({"norm_matching": 1}, TypeError, "norm_matching= is True or False, got int"),
        ({"size": 0}, ValueError, "size= is at least 1, got 0"),
        ({"size": 2.5}, TypeError, "size= is a whole number, got float"),
        ({"window": "layer"}, ValueError, "window= is one of 'group', 'tensor', got 'layer'"),
        ({"dtype": torch.float16}, TypeError, "cannot hold float16 rows"),
        ({"dtype": torch.int8}, TypeError, "holds float32, float64 or bfloat16 rows, got"),
        ({"compression": 0}, ValueError, "compression= is above 0, got 0"),
        ({"compression": 1.5}, ValueError, r"stored, in \(0, 1\], got 1.5"),
    ],
)
def test_bad_settings_are_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    params = parameters()
    with pytest.raises(error, match=message):
        MFAC(params, **options)
    opt = MFAC(params[:1])
    with pytest.raises(error, match=message):
        opt.add_param_group({"params": params[1:], **options})
    assert len(opt.param_groups) == 1


def test_a_group_lives_on_one_device() -> None:
    params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, device="meta"))]
    with pytest.raises(ValueError, match="one group are on cpu, meta, but a window is on one"):
        MFAC(params)


def test_a_window_that_does_not_fit_is_refused() -> None:
    p = nn.Parameter(torch.zeros(1_000_000))
    p.grad = torch.ones_like(p)
    opt = MFAC([p], size=10_000_000)
    with pytest.raises(MemoryError, match="what would fit: size="):
        opt.step()
    assert opt.windows == {}
    assert not p.detach().any()
