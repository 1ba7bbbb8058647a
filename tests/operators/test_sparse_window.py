"""Compressed windows against whole ones of the same rows, and error feedback against sums."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from curvlib.core.random import generator_of
from curvlib.operators.windows import solve as window_solve
from curvlib.operators.windows.compression import kept_entries, top_entries
from curvlib.operators.windows.gradient_window import GradientWindow
from curvlib.operators.windows.sparse import SparseWindow
from curvlib.operators.windows.systems import Systems
from curvlib.operators.windows.window import Window

F64 = torch.float64
PARTS, KEPT = (7, 1, 12), (3, 1, 5)


def gaussian(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=generator_of(None, seed))


def filled(count: int, size: int, dtype: torch.dtype = F64) -> tuple[SparseWindow, Tensor]:
    """A window of ``size`` that took ``count`` rows, and those it should still hold, whole."""
    window = SparseWindow(20, size, KEPT, dtype=dtype, parts=PARTS)
    rows = []
    for row in gaussian(count, count, 20).to(dtype):
        columns = top_entries(row, PARTS, KEPT)
        window.push(columns, row[columns])
        rows.append(torch.zeros_like(row).index_copy_(0, columns, row[columns]))
    return window, torch.stack(rows[-size:])


# ------------------------------------------------------------------------ top entries
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.floats(0.01, 1.0),
    st.integers(0, 2**20),
)
@settings(deadline=None, max_examples=60)
def test_the_largest_entries_of_each_part_are_kept(
    parts: list[int], fraction: float, seed: int
) -> None:
    row = gaussian(seed, sum(parts))
    kept = kept_entries(parts, fraction)
    columns = top_entries(row, parts, kept)
    start, at = 0, 0
    for n, k in zip(parts, kept, strict=True):
        assert fraction * n <= k < fraction * n + 1
        mine = set((columns[at : at + k] - start).tolist())
        magnitudes = row[start : start + n].abs().tolist()
        largest = sorted(range(n), key=lambda i: -magnitudes[i])[:k]
        assert mine == set(largest)
        start, at = start + n, at + k
    assert at == len(columns)


def test_equal_entries_are_kept_as_many_as_asked_for() -> None:
    columns = top_entries(torch.ones(6), [4, 2], [2, 1])
    assert len(set(columns.tolist())) == 3
    assert (columns[:2] < 4).all()
    assert columns[2] >= 4


# ---------------------------------------------------------------------------- windows
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "size"), [(1, 4), (4, 4), (9, 4), (13, 5)])
def test_products_are_those_of_the_whole_rows(dtype: torch.dtype, count: int, size: int) -> None:
    window, rows = filled(count, size, dtype)
    assert torch.equal(window.rows(), rows)
    order = [window.slot(i) for i in range(window.count)]
    X, C = gaussian(1, 20, 2), gaussian(2, 3, window.count, 2)
    found = window.inner(X)[:, order], window.combination(C, exact=True)
    gram = window.stored_gram()[:, order][:, :, order]
    start = 0
    for part, n in enumerate(PARTS):
        G = rows[:, start : start + n].double()
        assert torch.allclose(gram[part], G @ G.mT, rtol=1e-14, atol=1e-14)
        assert torch.equal(gram[part], gram[part].mT)
        assert torch.allclose(found[0][part], G @ X[start : start + n], rtol=1e-13, atol=1e-14)
        expected = G.mT @ C[part][order]
        assert torch.allclose(found[1][start : start + n], expected, rtol=1e-13, atol=1e-14)
        start += n
    fast = window.combination(C)
    assert fast.dtype == (F64 if dtype == F64 else torch.float32)
    assert torch.allclose(fast.double(), found[1], rtol=1e-5, atol=1e-5)


def test_chunks_of_gathered_rows_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    window, _ = filled(9, 6)
    X, C = gaussian(1, 20, 2), gaussian(2, 3, 6, 2)
    inner, combination = window.inner(X), window.combination(C)
    monkeypatch.setattr("curvlib.operators.windows.sparse.GATHERED", 4)
    assert torch.allclose(window.inner(X), inner, rtol=1e-14, atol=1e-15)
    assert torch.allclose(window.combination(C), combination, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("relative", ["rows", True, False])
def test_solves_are_those_of_the_dense_matrices(relative: bool | str) -> None:
    window, rows = filled(9, 4)
    systems, x = Systems(window), gaussian(3, 20, 2)
    found = window_solve.solve(systems, (0.1, relative, 0.0), x, 1e-5)
    newest = window_solve.solve_row(systems, (0.1, relative, 0.0), -1, 1e-5)
    start = 0
    for n in PARTS:
        part = slice(start, start + n)
        F0 = rows[:, part].mT @ rows[:, part] / 4
        mean = {"rows": F0.trace() / 4, True: F0.trace() / n, False: 1.0}[relative]
        dense = F0 + 0.1 * mean * torch.eye(n, dtype=F64)
        assert torch.allclose(found[part], torch.linalg.solve(dense, x[part]), rtol=1e-10)
        expected = torch.linalg.solve(dense, rows[-1, part])
        assert torch.allclose(newest[part], expected, rtol=1e-10, atol=1e-13)
        start += n


@pytest.mark.parametrize("kind", [Window, SparseWindow])
def test_a_loaded_window_has_each_row_in_its_place(kind: type) -> None:
    def push(window: Window | SparseWindow, row: Tensor) -> None:
        if isinstance(window, SparseWindow):
            columns = top_entries(row, PARTS, KEPT)
            window.push(columns, row[columns])
        else:
            window.push(row)

    def made(size: int) -> Window | SparseWindow:
        if kind is SparseWindow:
            return SparseWindow(20, size, KEPT, parts=PARTS)
        return Window(20, size, parts=PARTS)

    window = made(4)
    for row in gaussian(5, 6, 20).float():
        push(window, row)
    for size in (4, 6):
        other = made(size)
        other.load_state_dict(copy.deepcopy(window.state_dict()))
        assert [other.slot(i) for i in range(4)] == [window.slot(i) for i in range(4)]
        C = gaussian(6, 3, 4, 1)
        assert torch.equal(other.combination(C), window.combination(C))
        assert torch.equal(other.stored_gram(), window.stored_gram())
    small = made(2)
    small.load_state_dict(window.state_dict())
    assert torch.equal(small.rows(), window.rows()[-2:])
    for row in gaussian(7, 3, 20).float():
        push(small, row)
        push(window, row)
    assert torch.equal(small.rows(), window.rows()[-2:])


def test_a_compressed_window_is_small() -> None:
    whole, sparse = Window(10_000, 64), SparseWindow(10_000, 64, [100])
    grams = 8 * 64 * 64
    assert sparse.nbytes - grams == 0.02 * (whole.nbytes - grams)
    assert repr(sparse) == (
        "<SparseWindow: 0 of 64 rows of length 10000, 100 entries each, float32, cpu>"
    )
    assert sparse.polish() is sparse.rounded is False


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"each of the 1 parts stores, at most \[3\], got \[4\]"):
        SparseWindow(3, 2, [4])
    with pytest.raises(
        ValueError, match=r"each of the 2 parts stores, at most \[2, 1\], got \[1\]"
    ):
        SparseWindow(3, 2, [1], parts=[2, 1])
    with pytest.raises(TypeError, match="cannot hold float16 rows"):
        SparseWindow(3, 2, [1], dtype=torch.float16)
    window = SparseWindow(3, 2, [2])
    with pytest.raises(ValueError, match=r"expected 2 columns and values, got shapes \[1\] and"):
        window.push(torch.tensor([0]), torch.ones(1))
    with pytest.raises(IndexError, match="there is no row -1 in a window that holds 0 rows"):
        window.slot(-1)
    with pytest.raises(ValueError, match=r"the state has kept=\[1\], this window has \[2\]"):
        window.load_state_dict(SparseWindow(3, 2, [1]).state_dict())
    with pytest.raises(ValueError, match=r"a fraction of entries in \(0, 1\], got 0"):
        kept_entries([3], 0.0)


# --------------------------------------------------------------------- error feedback
@given(
    st.sampled_from([torch.float32, torch.bfloat16, F64]),
    st.booleans(),
    st.floats(0.02, 1.0),
    st.integers(1, 12),
    st.integers(0, 2**20),
)
@settings(deadline=None, max_examples=60)
def test_error_feedback_loses_nothing(
    dtype: torch.dtype, by_tensor: bool, fraction: float, count: int, seed: int
) -> None:
    window = GradientWindow(PARTS, count, dtype=dtype, by_tensor=by_tensor, compression=fraction)
    rows = gaussian(seed, count, 20).to(window.vector_dtype)
    for row in rows:
        prepared = window.prepared(row)
        assert prepared is not None
        window.push(prepared)
    assert window.residual is not None
    total = window.window.rows().double().sum(0) + window.residual.double()
    precision = 1e-14 if dtype == F64 else 1e-6
    assert torch.allclose(total, rows.double().sum(0), rtol=0, atol=count * precision * 10)


def test_preparing_a_row_changes_nothing() -> None:
    window = GradientWindow([20], 3, dtype=F64, compression=0.2)
    for row in gaussian(1, 4, 20):
        window.push(window.prepared(row))
    before = copy.deepcopy(window.state_dict())
    for row in gaussian(2, 3, 20):
        assert window.prepared(row) is not None
    assert torch.equal(window.residual, before["residual"])
    assert torch.equal(window.window.rows(), _rows_of(before))


@pytest.mark.parametrize("compression", [None, 0.5])
@pytest.mark.parametrize(
    ("dtype", "entry", "good"),
    [
        (torch.float32, float("nan"), False),
        (torch.float32, float("-inf"), False),
        (torch.bfloat16, 3.4e38, False),  # rounds to infinity
        (torch.bfloat16, 3.3e38, True),
        (F64, 1e160, False),  # its square is beyond float64
        (F64, 1e140, True),
    ],
)
def test_rows_that_are_not_finite_are_not_prepared(
    compression: float | None, dtype: torch.dtype, entry: float, good: bool
) -> None:
    window = GradientWindow([4], 3, dtype=dtype, compression=compression)
    row = torch.ones(4, dtype=window.vector_dtype)
    row[2] = entry
    prepared = window.prepared(row)
    assert (prepared is not None) == good
    if prepared is not None:
        window.push(prepared)
        assert bool(window.direction(1.0, "rows").isfinite().all())


@pytest.mark.parametrize("by_tensor", [False, True])
@pytest.mark.parametrize("compression", [None, 0.3])
def test_a_wider_window_has_zeros_in_older_rows(by_tensor: bool, compression: float | None) -> None:
    window = GradientWindow([5, 8], 4, dtype=F64, by_tensor=by_tensor, compression=compression)
    for row in gaussian(1, 6, 13):
        window.push(window.prepared(row))
    wide = window.widened([9, 1])
    assert wide.lengths == (5, 8, 9, 1)
    assert torch.equal(wide.window.rows()[:, :13], window.window.rows())
    assert torch.equal(wide.window.rows()[:, 13:], torch.zeros(4, 10, dtype=F64))
    if compression is not None:
        assert torch.equal(wide.residual[:13], window.residual)
        assert torch.equal(wide.residual[13:], torch.zeros(10, dtype=F64))
    wide.push(wide.prepared(gaussian(2, 23)))
    rows = wide.window.rows()
    start, found = 0, wide.direction(0.5, False)
    for n in wide.lengths if by_tensor else (23,):
        part = slice(start, start + n)
        dense = rows[:, part].mT @ rows[:, part] / 4 + 0.5 * torch.eye(n, dtype=F64)
        assert torch.allclose(found[part], torch.linalg.solve(dense, rows[-1, part]), rtol=1e-10)
        start += n


def _rows_of(state: dict) -> Tensor:
    window = GradientWindow.from_state(state, torch.device("cpu"))
    return window.window.rows()
