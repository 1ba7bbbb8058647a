"""Windows: rows, Gram matrices and their bookkeeping, against lists of rows in float64."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from curvlib.core import memory
from curvlib.core.files import write_record
from curvlib.core.ranks.group import Group
from curvlib.core.ranks.spread import Slices, Spread
from curvlib.operators.windows import blocks as window_blocks
from curvlib.operators.windows import row_products
from curvlib.operators.windows.arguments import require_memory
from curvlib.operators.windows.window import Window

F64 = torch.float64
DTYPES = (torch.float32, F64, torch.bfloat16)


def _rows(count: int, length: int, seed: int = 0) -> Tensor:
    return torch.randn(count, length, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _gram(rows: Tensor, parts: tuple[int, ...]) -> Tensor:
    return torch.stack([p @ p.mT for p in rows.to(F64).split(list(parts), 1)])


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.integers(1, 12)),
        st.tuples(st.just("evict"), st.just(0)),
        st.tuples(st.just("remove"), st.integers(0, 20)),
        st.tuples(st.just("resize"), st.integers(1, 9)),
        st.tuples(st.just("clear"), st.just(0)),
        st.tuples(st.just("reload"), st.just(0)),
        st.tuples(st.just("polish"), st.just(0)),
    ),
    min_size=1,
    max_size=25,
)


@given(STEPS, st.sampled_from(DTYPES), st.sampled_from([(13,), (4, 9)]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_sequence_equals_a_list_of_rows(
    steps: list[tuple[str, int]], dtype: torch.dtype, parts: tuple[int, ...], host: bool
) -> None:
    window = Window(13, 5, dtype=dtype, parts=parts, storage="cpu" if host else None)
    expected: list[Tensor] = []
    for i, (step, number) in enumerate(steps):
        if step == "push":
            new = _rows(number, 13, i)
            assert window.push(new[0] if number == 1 else new) == number
            expected = (expected + list(new.to(dtype)))[-window.size :]
        elif step == "resize":
            window.resize(number)
            expected = expected[-number:]
        elif step == "clear":
            window.clear()
            expected = []
        elif step == "polish":
            window.polish()
        elif step == "reload":
            other = Window(13, window.size, dtype=dtype, parts=parts)
            other.load_state_dict(window.state_dict())
            assert torch.equal(other.gram(), window.gram())
            window = other
        elif expected:
            index = number % len(expected) if step == "remove" else 0
            window.remove(index) if step == "remove" else window.evict()
            del expected[index]
        else:
            with pytest.raises(IndexError, match="no row 0 in a window that holds 0 rows"):
                window.evict()
    assert window.count == len(expected)
    if not expected:
        return
    rows = torch.stack(expected)
    assert torch.equal(window.rows(), rows)
    assert all(torch.equal(window.row(i), row) for i, row in enumerate(expected))
    exact = _gram(rows, parts)
    found = window.gram()
    assert torch.equal(found, found.mT)
    scale = float(exact.diagonal(dim1=1, dim2=2).amax())
    assert (found - exact).abs().max() <= (1e-14 if dtype == F64 else 1e-6) * scale
    window.polish()  # whatever the type: of the rounded rows, and in float64
    assert (window.gram() - exact).abs().max() <= 1e-14 * scale
    assert torch.linalg.eigvalsh(window.gram()).min() >= -1e-13 * scale


def test_ten_thousand_pushes_do_not_drift() -> None:
    window = Window(40, 6)
    for row in _rows(10_000, 40).float():
        window.push(row)
    exact = _gram(window.rows(), (40,))
    assert (window.gram() - exact).abs().max() <= 1e-6 * exact.max()
    assert window.version >= 10_000


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("host", [False, True])
def test_products_and_combinations(
    dtype: torch.dtype, host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window_blocks, "BLOCK_BYTES", 8 * 1000)
    monkeypatch.setattr(row_products, "TERMS", 300)
    monkeypatch.setattr(row_products, "CHUNK_BYTES", 8 * 100 * 70)
    parts = (700, 1, 1300)
    window = Window(2001, 8, dtype=dtype, parts=parts, storage="cpu" if host else None)
    window.push(_rows(11, 2001))
    assert (len(list(window.pieces())) > 3) is host
    rows = window.rows().to(F64)
    X, C = _rows(3, 2001, 1).mT, _rows(24, 3, 2).reshape(3, 8, 3)
    inner = torch.stack([g @ x for g, x in zip(rows.split(parts, 1), X.split(parts), strict=True)])
    combination = torch.cat([g.mT @ c for g, c in zip(rows.split(parts, 1), C, strict=True)])
    vector = X if dtype == F64 else X.float()
    rounded = vector.to(F64) - X
    for K in (1, 3):
        for exact in (False, True):
            tolerance = 1e-13 if exact or dtype == F64 else 1e-6
            found = window.inner(vector[:, :K], exact=exact)
            moved = torch.stack(
                [g @ x for g, x in zip(rows.split(parts, 1), rounded.split(parts), strict=True)]
            )
            assert found.dtype == F64
            assert (found - (inner + moved)[..., :K]).abs().max() <= tolerance * inner.abs().max()
            out = window.combination(C[..., :K], exact=exact)
            assert out.dtype == (F64 if exact or dtype == F64 else torch.float32)
            error = (out.to(F64) - combination[:, :K]).abs().max()
            assert error <= tolerance * combination.abs().max()
    indices = torch.tensor([2000, 0, 700, 699])
    order = [window.slot(i) for i in range(8)]
    assert torch.equal(window.columns(indices)[order], rows[:, indices])


def test_chunks_are_what_keeps_float32_sums_right() -> None:
    n = 400_000
    rows = 1.0 + 0.1 * _rows(4, n).float()
    exact = rows.double() @ rows[0].double()
    found = row_products.inner(rows, rows[0][:, None])[:, 0]
    assert ((found - exact) / exact).abs().max() <= 1e-7
    assert row_products.inner(rows[:, :0], rows[0, :0, None]).abs().max() == 0


# --------------------------------------------------------------------------- refusals
def test_rows_that_are_not_finite_change_nothing() -> None:
    window = Window(4, 3)
    window.push(torch.ones(4))
    before, version = window.state_dict(), window.version
    bad = torch.tensor([1.0, float("nan"), float("inf"), 0.0])
    with pytest.raises(FloatingPointError, match="2 of 4 entries of the row are NaN or infinite; "):
        window.push(bad)
    block = torch.stack([torch.ones(4), bad, 2 * torch.ones(4)])
    with pytest.raises(FloatingPointError, match="2 of 4 entries of row 1 of 3 are NaN"):
        window.push(block)
    assert window.version == version
    assert torch.equal(window.gram(), before["gram"])
    assert window.push(bad, skip_non_finite=True) == 0
    assert window.version == version
    assert window.push(block, skip_non_finite=True) == 2
    assert torch.equal(window.rows(), torch.tensor([[1.0], [1.0], [2.0]]).expand(3, 4))
    big = Window(2, 2, dtype=torch.bfloat16)
    with pytest.raises(FloatingPointError, match=r"1 of 2 .* once stored as torch.bfloat16"):
        big.push(torch.tensor([3.4e38, 1.0]))


def test_half_precision_rows_are_taken_but_not_stored() -> None:
    window = Window(3, 2)
    row = torch.tensor([0.1, 2.0, -3.0])
    for dtype in (torch.float16, torch.bfloat16, F64):
        window.push(row.to(dtype))
        assert torch.equal(window.row(-1), row.to(dtype).float())


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "float16": (
        lambda: Window(3, 2, dtype=torch.float16),
        TypeError,
        "cannot hold float16 rows: gradients overflow it .* use dtype=torch.bfloat16",
    ),
    "integers": (lambda: Window(3, 2, dtype=torch.int32), TypeError, "float32, float64 or bf"),
    "no rows": (lambda: Window(3, 0), ValueError, "expected a positive size, got 0"),
    "no columns": (lambda: Window(-1, 2), ValueError, "expected a positive length, got -1"),
    "fraction": (lambda: Window(3, 2.0), TypeError, "expected an integer for size, got float"),  # type: ignore[arg-type]
    "storage": (lambda: Window(3, 2, storage="disk"), ValueError, "storage= is 'cpu' .* 'disk'"),
    "parts": (lambda: Window(3, 2, parts=[1, 1]), ValueError, "the 2 given add up to 2"),
    "empty part": (lambda: Window(3, 2, parts=[3, 0]), ValueError, "positive a length in parts="),
    "list": (lambda: Window(3, 2).push([1.0] * 3), TypeError, "row as a torch.Tensor, got list"),  # type: ignore[arg-type]
    "int row": (lambda: Window(3, 2).push(torch.ones(3).int()), TypeError, "floating-point type"),
    "length": (lambda: Window(3, 2).push(torch.ones(4)), ValueError, r"row \[3\] or rows .*\[4\]"),
    "device": (
        lambda: Window(3, 2).push(torch.ones(3, device="meta")),
        ValueError,
        r"expected rows on cpu, got meta; use row.to\('cpu'\)",
    ),
    "row": (lambda: Window(3, 2).row(0), IndexError, "no row 0 in a window that holds 0 rows"),
    "resize": (lambda: Window(3, 2).resize(0), ValueError, "expected a positive size, got 0"),
    "state": (
        lambda: Window(3, 2).load_state_dict(Window(4, 2).state_dict()),
        ValueError,
        "the state has length=4, this window has 3",
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("storage", [None, "cpu"])
def test_a_process_may_hold_no_entry(
    dtype: torch.dtype, storage: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Spread, "sum", lambda self, numbers: numbers + 1.0)  # what others have
    spread = Spread((Slices((2, 3), 0),), Group(None, 2, 3, torch.device("cpu")))
    window = Window(0, 2, dtype=dtype, spread=spread, storage=storage)
    assert window.push(torch.zeros(3, 0), check=False) == 3
    window.push(torch.zeros(0), check=False)
    window.polish()
    assert torch.equal(window.gram(), torch.ones(1, 2, 2, dtype=F64))
    assert window.rows().shape == (2, 0)
    assert window.row(0).shape == (0,)
    assert torch.equal(window.inner(torch.zeros(0, 3)), torch.ones(1, 2, 3, dtype=F64))
    assert window.combination(torch.ones(1, 2, 3, dtype=F64)).shape == (0, 3)
    other = Window(0, 1, dtype=dtype, spread=spread)
    other.load_state_dict(window.state_dict())
    assert other.count == 1


@pytest.mark.parametrize("name", BAD)
def test_errors_say_what_was_expected(name: str) -> None:
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call()


def test_a_window_that_does_not_fit_says_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_blocks, "available_memory", lambda device: 600_000_000)
    with pytest.raises(MemoryError) as caught:
        Window(1_000_000, 200)
    text = str(caught.value)
    assert "a window of 200 rows of length 1000000 in float32 needs 800.3 MB" in text
    assert "cpu has 600.0 MB; what would fit: size=134, or dtype=torch.bfloat16" in text
    size = int(re.findall(r"size=(\d+)", text)[0])
    assert size * 4_000_000 + 8 * size**2 <= 600_000_000
    with pytest.raises(MemoryError, match="or dtype=torch.bfloat16 with size=269"):
        Window(1_000_000, 2000)
    cuda = torch.device("cuda")
    with pytest.raises(MemoryError, match="cuda has 8 bytes; what would fit: storage='cpu', whi"):
        require_memory(10, 10, F64, cuda, 8)
    with pytest.raises(MemoryError, match=r"needs 1\.0 kB.*would fit: a part of the parameters"):
        require_memory(10, 10, torch.bfloat16, torch.device("cpu"), 8)
    require_memory(10**9, 10**9, F64, cuda, None)  # nobody knows


def test_available_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:  5 kB\n"}
    monkeypatch.setattr(memory, "_read", lambda path: files.get(path, ""))
    assert memory.available_memory() == 5 * 1024
    files |= {"/sys/fs/cgroup/memory.max": "4000\n", "/sys/fs/cgroup/memory.current": "3500\n"}
    assert memory.available_memory() == 500
    files["/sys/fs/cgroup/memory.stat"] = "anon 1\ninactive_file 100\n"
    assert memory.available_memory() == 600
    files.clear()
    assert (memory.available_memory() or 1) > 0
    assert memory.available_memory("meta") is None


# ----------------------------------------------------------------------------- saving
@pytest.mark.parametrize("dtype", DTYPES)
def test_files_are_bitwise(dtype: torch.dtype, tmp_path: Path) -> None:
    window = Window(21, 5, dtype=dtype, parts=[20, 1])
    window.push(_rows(3, 21))
    for row in _rows(4, 21, 1):
        window.push(row)
    window.remove(2)
    path = window.save(tmp_path / "window.safetensors")
    for storage in (None, "cpu"):
        other = Window.load(path, storage=storage)
        assert torch.equal(other.rows(), window.rows())
        assert torch.equal(other.gram(), window.gram())
        assert (other.size, other.parts, other.rounded) == (5, (20, 1), window.rounded)
        for row in _rows(7, 21, 2):  # and it goes on as the first would
            other.push(row)
        first = Window.load(path)
        for row in _rows(7, 21, 2):
            first.push(row)
        assert torch.equal(other.gram(), first.gram())
    small = Window(21, 2, dtype=dtype, parts=[20, 1])
    small.load_state_dict(window.state_dict())
    assert torch.equal(small.rows(), window.rows()[-2:])
    write_record(tmp_path / "other", "Density", {})
    with pytest.raises(ValueError, match="holds a Density, expected a Window"):
        Window.load(tmp_path / "other")


# ----------------------------------------------------------------------------- memory
class Allocations(TorchDispatchMode):
    """Bytes of new storages that are alive at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {
            t.untyped_storage()._cdata
            for t in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(t, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.count(tensor, before)
        return out

    def count(self, tensor: Tensor, before: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in before or key in self.seen:
            return
        size = storage.nbytes()
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.gone, key, size)

    def gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_is_the_window_and_a_few_vectors(dtype: torch.dtype) -> None:
    from curvlib.operators.mfac_operator import MFAC

    length, size = 300_000, 24
    window = Window(length, size, dtype=dtype)
    rows = _rows(size + 2, length).to(dtype)
    F = MFAC(window)
    x = torch.ones(length, dtype=F.dtype)
    vector = 8 * length
    calls: dict[str, Callable[[], Any]] = {
        "push many": lambda: window.push(rows),
        "push": lambda: window.push(rows[0]),
        "solve_row": F.solve_row,
        "solve": lambda: F.solve(x),
        "polish": window.polish,
        "leverages": F.leverages,
        "inverse_diagonal": F.inverse_diagonal,
        "product": lambda: F @ x,
    }
    for name, call in calls.items():
        with Allocations() as spent:
            call()
        assert spent.peak <= 4 * vector + 4 * row_products.CHUNK_BYTES, name
        assert spent.peak < size * length * 4, name  # no float32 copy of the window


def test_the_host_waits_before_it_touches_rows_on_their_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[torch.device] = []
    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: waits.append(device) or stream)
    there = torch.device("cuda", 0)
    for storage, expected in (("cpu", [there, there]), (None, [])):
        window = Window(5, 3, storage=storage)
        window.push(_rows(3, 5))
        assert not waits
        window.device = there
        window.evict()
        window.state_dict()
        assert waits == expected
        del waits[:]


# ------------------------------------------------------------------------------- CUDA
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("storage", [None, "cpu"])
def test_cuda_equals_cpu(dtype: torch.dtype, storage: str | None) -> None:
    here = Window(5000, 6, dtype=dtype, parts=[2000, 3000])
    there = Window(5000, 6, dtype=dtype, parts=[2000, 3000], device="cuda", storage=storage)
    for row in _rows(9, 5000):
        here.push(row)
        there.push(row.cuda())
    assert torch.equal(here.rows(), there.rows().cpu())
    assert torch.allclose(here.gram(), there.gram().cpu(), rtol=1e-5, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_nothing_waits_for_the_device_in_a_push() -> None:
    window = Window(5000, 4, device="cuda", parts=[2000, 3000])
    rows = list(_rows(8, 5000).float().cuda())
    window.push(rows[0], check=False)
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for row in rows:
            window.push(row, check=False)
        found = window.inner(rows[0][:, None])
        window.combination(found)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert window.count == 4
