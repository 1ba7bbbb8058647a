"""Kernels of the window's passes: on the CPU by emulation, and on a GPU."""

from __future__ import annotations

import copy
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from curvlib.operators.mfac_operator import MFAC
from curvlib.operators.windows import row_products
from curvlib.operators.windows.arguments import require_fused
from curvlib.operators.windows.kernels import SOURCE, TILE, WindowKernels
from curvlib.operators.windows.system import CHUNK_ERROR
from curvlib.operators.windows.window import Window
from tests.cuda_on_cpu import NVCC, Emulated, cubin, emulated, guarded, untouched

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
LENGTHS = [1, 7, 8, 63, 4095, 4096, 4097, 2 * TILE + 13]


def _rows(count: int, length: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, length, generator=generator, dtype=F64).to(dtype)


def _kernels(dtype: torch.dtype, order: int = 0) -> WindowKernels:
    return WindowKernels(Emulated(SOURCE, order), dtype)  # type: ignore[arg-type]


def _bound(rows: Tensor, x: Tensor) -> Tensor:
    """Of errors of inner products; few terms have the rounding of one, which does not average."""
    norms = torch.linalg.vector_norm(rows.to(F64), dim=1) * torch.linalg.vector_norm(x.to(F64))
    return (CHUNK_ERROR if rows.shape[1] > 1000 else 2.0**-23) * norms


# ------------------------------------------------------------------ kernels by emulation
@emulated
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("length", LENGTHS)
def test_a_push_writes_the_row_and_reads_the_others(dtype: torch.dtype, length: int) -> None:
    count, size, slot = 11, 13, 4
    rows = guarded(_rows(size, length, dtype), offset=length % 3)
    before, row = rows.clone(), guarded(_rows(1, length, dtype, seed=1)[0], offset=1)
    found = _kernels(dtype).push(rows, count, slot, row)
    after = before.clone()
    after[slot] = row
    assert torch.equal(rows, after)
    assert untouched(rows)
    expected = after[:count].to(F64) @ row.to(F64)
    assert found.dtype == F64
    assert ((found - expected).abs() <= _bound(after[:count], row)).all()


@emulated
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("length", LENGTHS)
def test_inner_products_and_combinations(dtype: torch.dtype, length: int) -> None:
    rows, kernels = guarded(_rows(10, length, dtype), offset=8 * (length % 2)), _kernels(dtype)
    x = guarded(_rows(1, length, F32, seed=2)[0])
    expected = rows.to(F64) @ x.to(F64)
    found = kernels.inner(rows, x)
    assert ((found - expected).abs() <= _bound(rows, x)).all()
    weights, out = _rows(1, 10, F64, seed=3)[0], guarded(torch.zeros(length), offset=length % 5)
    kernels.combination(rows, weights, out)
    expected = weights @ rows.to(F64)
    bound = 2.0**-23 * (weights.abs() @ rows.to(F64).abs())
    assert ((out - expected).abs() <= 4 * bound).all()
    assert untouched(out)


@emulated
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_order_of_threads_does_not_matter(dtype: torch.dtype) -> None:
    rows, x = _rows(9, TILE + 77, dtype), _rows(1, TILE + 77, dtype, seed=1)[0]
    found = []
    for order in range(3):
        kernels, mine, out = _kernels(dtype, order), rows.clone(), torch.empty(TILE + 77)
        pushed = kernels.push(mine, 9, 8, x)
        kernels.combination(mine, pushed, out)
        found.append((pushed, kernels.inner(mine, x.float()), out))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


@emulated
def test_what_is_not_finite_stays_where_it_is() -> None:
    rows, x = _rows(5, 600, BF16), _rows(1, 600, BF16, seed=1)[0]
    rows[2, 599], rows[3, 0] = torch.inf, torch.nan
    found = _kernels(BF16).push(rows, 5, 0, x)
    assert found.isfinite().tolist() == [True, True, False, False, True]


@emulated
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_windows_are_the_same_with_kernels(dtype: torch.dtype) -> None:
    plain = Window(5003, 4, dtype=dtype, parts=[2000, 3003])
    fused = Window(5003, 4, dtype=dtype, parts=[2000, 3003])
    kernels = _kernels(dtype)
    fused._kernels = kernels
    for row in _rows(7, 5003, F32):
        plain.push(row)
        fused.push(row)
    launched = kernels.kernels.launched  # type: ignore[attr-defined]
    assert launched == ["push_" + str(dtype).removeprefix("torch.")] * 14
    assert torch.equal(plain.rows(), fused.rows())
    for k, part in enumerate(fused.rows().to(F64).split([2000, 3003], 1)):
        assert (
            (fused.gram()[k] - part @ part.mT).abs() <= 2 * _bound(part, part[0])[:, None]
        ).all()
    assert torch.equal(fused.gram(), fused.gram().mT)
    assert fused.rounded
    x = _rows(1, 5003, F32, seed=5)[0]
    here, there = (MFAC(w, damping=0.1) for w in (plain, fused))
    del launched[:]
    for a, b in ((here.solve(x), there.solve(x)), (here.solve_row(), there.solve_row())):
        assert torch.linalg.vector_norm(a - b) <= 1e-5 * torch.linalg.vector_norm(a)
    name = str(dtype).removeprefix("torch.")
    assert launched == [f"inner_{name}"] * 2 + [f"combination_{name}"] * 4
    # several columns, and passes in float64, are torch's
    del launched[:]
    there.solve(x[:, None].expand(-1, 2).contiguous())
    row_products.inner(fused._blocks[0].rows[:4], x[:2000, None], exact=True, kernels=kernels)
    assert not launched


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_kernels_compile_without_spills(architecture: str, tmp_path: Path) -> None:
    said = cubin(SOURCE, tmp_path, architecture)
    assert len(re.findall("Compiling entry function", said)) == 6
    assert re.findall(r"(\d+) bytes spill stores", said) == ["0"] * 6


# ------------------------------------------------------------------------------ choice
def test_no_kernels_without_a_gpu() -> None:
    assert Window(10, 2)._kernels is None
    assert WindowKernels.of(F64, torch.device("cpu")) is None
    assert WindowKernels.of(F32, torch.device("cpu")) is None
    window = Window(10, 2, fused=False)
    window.resize(3)
    assert window.fused is False


def test_kernels_that_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    message = (
        r"fused=True is for float32 or bfloat16 rows on a CUDA device, got float32 rows on cpu"
    )
    with pytest.raises(ValueError, match=message):
        Window(10, 2, fused=True)
    with pytest.raises(ValueError, match=r"got rows in host memory; leave it out"):
        Window(10, 2, fused=True, storage="cpu")
    with pytest.raises(TypeError, match=r"fused= is True, False or None .*, got 'yes'"):
        Window(10, 2, fused="yes")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match=r"pip install 'curvlib\[cupy\]'"):
        require_fused(True, F32, torch.device("cuda", 0), None)


# -------------------------------------------------------------------------------- CUDA
def _there(dtype: torch.dtype, parts: list[int], size: int, fused: bool) -> Window:
    window = Window(sum(parts), size, dtype=dtype, parts=parts, device="cuda", fused=fused)
    assert (window._kernels is not None) == fused
    return window


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("parts", [[4096 * 8], [20001, 3, 50000], [1000]])
def test_kernels_on_a_gpu_are_those_of_torch(dtype: torch.dtype, parts: list[int]) -> None:
    pytest.importorskip("cupy")
    rows = _rows(13, sum(parts), F32).cuda()
    x = _rows(1, sum(parts), F32, seed=4)[0].cuda()
    plain, fused = (_there(dtype, parts, 9, choice) for choice in (False, True))
    for row in rows:
        plain.push(row)
        fused.push(row)
    assert torch.equal(plain.rows(), fused.rows())
    exact = plain.rows().to(F64)
    for k, part in enumerate(exact.split(parts, 1)):
        error = (fused.gram()[k] - part @ part.mT).abs()
        assert (error <= 2 * _bound(part, part[0])[:, None]).all()
    ours = fused.combination(fused.inner(x[:, None]))
    theirs = plain.combination(plain.inner(x[:, None]))
    assert torch.linalg.vector_norm(ours - theirs) <= 1e-6 * torch.linalg.vector_norm(theirs)


@pytest.mark.gpu
def test_kernels_on_a_gpu_follow_torch_streams() -> None:
    pytest.importorskip("cupy")
    window = _there(F32, [1 << 20], 4, True)
    side = torch.cuda.Stream()
    rows = _rows(6, 1 << 20, F32).cuda()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for row in rows:
            torch.cuda._sleep(10_000_000)
            window.push(2.0 * row, check=False)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(window.rows(), 2.0 * rows[2:])
    expected = window.rows().to(F64) @ window.rows().to(F64).mT
    assert torch.allclose(window.gram()[0], expected, rtol=0, atol=CHUNK_ERROR * 2e7)


@pytest.mark.gpu
def test_windows_with_kernels_can_be_copied_and_pickled() -> None:
    pytest.importorskip("cupy")
    window = _there(BF16, [1000], 3, True)
    window.push(_rows(1, 1000, F32)[0].cuda())
    for twin in (copy.deepcopy(window), pickle.loads(pickle.dumps(window))):
        assert twin._kernels is not None
        twin.push(_rows(1, 1000, F32, seed=1)[0].cuda())
        assert torch.equal(twin.rows()[0], window.rows()[0])
