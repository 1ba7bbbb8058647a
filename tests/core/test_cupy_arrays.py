"""Operators that cross to CuPy and back: with NumPy in CuPy's place, and on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.sparse.linalg as spla
import torch

import curvlib as cl
from curvlib.core import cupy_arrays, raw_kernels
from curvlib.core.operator import LinearOperator

F64 = torch.float64


def _matrix(rows: int, columns: int, dtype: torch.dtype = F64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, columns, generator=generator, dtype=F64).to(dtype)


def _positive(n: int) -> torch.Tensor:
    A = _matrix(n, n)
    return A @ A.mT / n + torch.eye(n, dtype=F64)


def _module(monkeypatch: pytest.MonkeyPatch, name: str, **names: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(names)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """NumPy and SciPy in CuPy's place: the same names, on the CPU, for torch of the same CUDA."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    runtime = SimpleNamespace(runtimeGetVersion=lambda: 13020)
    for name in ("cupyx", "cupyx.scipy", "cupyx.scipy.sparse"):
        _module(monkeypatch, name)
    names = {"LinearOperator": spla.LinearOperator, "aslinearoperator": spla.aslinearoperator}
    _module(monkeypatch, "cupyx.scipy.sparse.linalg", **names)
    own = {"from_dlpack": np.from_dlpack, "dtype": np.dtype}
    return _module(monkeypatch, "cupy", cuda=SimpleNamespace(runtime=runtime), **own)


@pytest.fixture
def on_cpu(cupy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU counts as a CUDA device, and has no streams."""
    monkeypatch.setattr(cupy_arrays, "_require_cuda", lambda device: None)
    for name in ("torch_on_stream_of", "cupy_on_stream_of_torch"):
        monkeypatch.setattr(cupy_arrays, name, lambda cupy, device: nullcontext())


# --------------------------------------------------------------------------- products
@pytest.mark.usefixtures("on_cpu")
def test_products_agree_with_dense() -> None:
    A = _matrix(5, 3)
    C = cl.to_cupy(A)
    X, y = np.random.default_rng(0).normal(size=(3, 4)), np.arange(5.0)
    np.testing.assert_allclose(C.matmat(X), A.numpy() @ X, rtol=1e-14)
    np.testing.assert_allclose(C.matmat(np.asfortranarray(X)), A.numpy() @ X, rtol=1e-14)
    np.testing.assert_allclose(C.matvec(X[:, 0]), A.numpy() @ X[:, 0], rtol=1e-14)
    np.testing.assert_allclose(C.matvec(X[:, :1]), A.numpy() @ X[:, :1], rtol=1e-14)
    np.testing.assert_allclose(C.rmatvec(y), A.numpy().T @ y, rtol=1e-14)
    np.testing.assert_allclose(C.H.matmat(A.numpy()), A.numpy().T @ A.numpy(), rtol=1e-14)
    assert C.dtype == np.float64


@pytest.mark.usefixtures("on_cpu")
def test_other_types_are_converted_to_the_operators() -> None:
    C = cl.to_cupy(_matrix(4, 4, torch.float32))
    assert C.dtype == np.float32
    assert C.matvec(np.ones(4)).dtype == np.float32


@pytest.mark.usefixtures("on_cpu")
def test_nothing_is_copied_on_the_way_to_cupy() -> None:
    seen: list[tuple[int, int]] = []

    def multiply(V: torch.Tensor) -> torch.Tensor:
        out = 2.0 * V
        seen.append((V.data_ptr(), out.data_ptr()))
        return out.requires_grad_()  # a graph is no obstacle

    C = cl.to_cupy(LinearOperator(multiply, (6, 6), dtype=F64, symmetric=True))
    for x in (np.ones(6), np.ones((6, 3)), np.ones((6, 3), order="F"), np.ones((6, 6))[:, ::2]):
        y = C.matmat(x) if x.ndim == 2 else C.matvec(x)
        assert seen.pop() == (x.__array_interface__["data"][0], y.__array_interface__["data"][0])
        assert y.shape == x.shape


@pytest.mark.usefixtures("on_cpu")
def test_nothing_is_copied_on_the_way_from_cupy() -> None:
    seen: list[tuple[int, int]] = []

    def multiply(x: Any) -> Any:
        out = 2.0 * x
        seen.append((x.__array_interface__["data"][0], out.__array_interface__["data"][0]))
        return out

    A = cl.from_cupy(
        spla.LinearOperator((6, 6), matvec=multiply, matmat=multiply, dtype=np.float64),
        device="cpu",
    )
    for V in (torch.ones(6, 3, dtype=F64), torch.ones(3, 6, dtype=F64).mT):
        out = A @ V
        assert seen.pop() == (V.data_ptr(), out.data_ptr())
        assert torch.equal(out, 2.0 * V)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("kind", ["array", "sparse", "operator", "float32", "integers"])
def test_from_cupy_and_back(kind: str) -> None:
    A = (_matrix(4, 6) * 10).round()
    given = {
        "array": A.numpy(),
        "sparse": sp.csr_array(A.numpy()),
        "operator": spla.aslinearoperator(A.numpy()),
        "float32": A.float().numpy(),
        "integers": A.numpy().astype(np.int32),
    }[kind]
    op = cl.from_cupy(given, device="cpu")
    assert op.dtype == (torch.float32 if kind == "float32" else F64)
    A = A.to(op.dtype)
    torch.testing.assert_close(op.to_dense(), A, rtol=0, atol=0)
    torch.testing.assert_close(op.T.to_dense(), A.T, rtol=0, atol=0)
    back = cl.from_cupy(cl.to_cupy(op), device="cpu")
    torch.testing.assert_close(back.to_dense(), A, rtol=0, atol=0)


@pytest.mark.usefixtures("on_cpu")
def test_solvers_run_on_the_operator() -> None:
    A = _positive(30)
    C, b = cl.to_cupy(A), np.ones(30)
    for solve in (spla.cg, spla.gmres):
        x, failed = solve(C, b, rtol=1e-10, atol=0.0)
        assert not failed
        np.testing.assert_allclose(A.numpy() @ x, b, rtol=1e-8)
    values = spla.eigsh(C, k=3, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(values), torch.linalg.eigvalsh(A)[-3:].numpy(), rtol=1e-10)
    wide = _matrix(12, 30)
    singular = spla.svds(cl.to_cupy(wide), k=2, return_singular_vectors=False)
    expected = torch.linalg.svdvals(wide)[:2].flip(0).numpy()
    np.testing.assert_allclose(np.sort(singular), expected, rtol=1e-10)


# ---------------------------------------------------------------------------- streams
class _Stream:
    """A stream that writes down what waits for it and what runs on it."""

    def __init__(self, name: str, pointer: int, log: list[str]) -> None:
        self.name, self.log = name, log
        self.ptr = self.cuda_stream = pointer

    def wait_stream(self, other: _Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def record(self) -> _Stream:
        return self

    wait_event = wait_stream

    def __enter__(self) -> None:
        self.log.append(f"on {self.name}")

    def __exit__(self, *error: object) -> None:
        self.log.append(f"off {self.name}")


@contextmanager
def _entered(stream: _Stream) -> Iterator[None]:
    with stream:
        yield


@pytest.fixture
def streams(cupy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Streams of both libraries, whose addresses a test sets."""
    log: list[str] = []
    state = SimpleNamespace(log=log, torch=7, cupy=9)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: _Stream("torch", state.torch, log)
    )
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: _Stream("default", 0, log))
    monkeypatch.setattr(torch.cuda, "stream", _entered)

    def external(pointer: int, device: Any = None) -> _Stream:
        assert pointer  # which torch would take for any new stream
        return _Stream(f"external {pointer}", pointer, log)

    monkeypatch.setattr(torch.cuda, "ExternalStream", external)
    vars(cupy.cuda).update(
        Device=lambda index: nullcontext(),
        get_current_stream=lambda: _Stream("cupy", state.cupy, log),
        ExternalStream=external,
        Stream=SimpleNamespace(from_external=lambda held: external(held.__cuda_stream__()[1])),
    )
    return state


DEVICE = torch.device("cuda", 0)


def test_torch_joins_cupys_stream(cupy: Any, streams: SimpleNamespace) -> None:
    with cupy_arrays.torch_on_stream_of(cupy, DEVICE):
        streams.log.append("product")
    expected = ["external 9 waits for torch", "on external 9", "product", "off external 9"]
    assert streams.log == [*expected, "torch waits for external 9"]


def test_cupy_joins_torchs_stream(cupy: Any, streams: SimpleNamespace) -> None:
    for named in ("from_external", "ExternalStream"):  # CuPy 14, and 13
        if named == "ExternalStream":
            cupy.cuda.Stream = SimpleNamespace()
        del streams.log[:]
        with cupy_arrays.cupy_on_stream_of_torch(cupy, DEVICE):
            streams.log.append("product")
        expected = ["external 7 waits for cupy", "on external 7", "product", "off external 7"]
        assert streams.log == [*expected, "cupy waits for external 7"]


@pytest.mark.parametrize(("torchs", "cupys"), [(0, 0), (0, 1), (7, 7)])
def test_one_stream_needs_no_order(
    cupy: Any, streams: SimpleNamespace, torchs: int, cupys: int
) -> None:
    streams.torch, streams.cupy = torchs, cupys
    with cupy_arrays.torch_on_stream_of(cupy, DEVICE):
        pass
    if cupys != 1:
        with cupy_arrays.cupy_on_stream_of_torch(cupy, DEVICE):
            pass
    assert streams.log == []


def test_the_default_stream_of_cupy_is_that_of_torch(cupy: Any, streams: SimpleNamespace) -> None:
    streams.cupy = 0
    with cupy_arrays.torch_on_stream_of(cupy, DEVICE):
        pass
    assert streams.log[0] == "default waits for torch"


def test_streams_are_ordered_after_errors(cupy: Any, streams: SimpleNamespace) -> None:
    for context in (cupy_arrays.torch_on_stream_of, cupy_arrays.cupy_on_stream_of_torch):
        with pytest.raises(ZeroDivisionError), context(cupy, DEVICE):
            raise ZeroDivisionError
    assert [entry for entry in streams.log if "waits" in entry][1::2] == [
        "torch waits for external 9",
        "cupy waits for external 7",
    ]


# ----------------------------------------------------------------------------- kernels
def test_kernels_are_launched_on_torchs_stream(
    cupy: Any, streams: SimpleNamespace, tmp_path: Any
) -> None:
    launched: list[Any] = []

    def raw_module(code: str, options: tuple[str, ...]) -> Any:
        assert code == "source"
        return SimpleNamespace(
            get_function=lambda name: lambda *given: launched.append((name, *given))
        )

    cupy.RawModule = raw_module
    source = tmp_path / "kernels.cu"
    source.write_text("source")
    kernels = raw_kernels.Kernels.of(source, DEVICE)
    assert kernels is not None
    x = torch.ones(3)
    kernels.launch("f", (4, 2), x, None, 5, np.float32(2.0))
    assert launched == [("f", (4, 2), (256,), (x.data_ptr(), 0, 5, 2.0))]
    assert [type(value) for value in launched[0][3]] == [np.int64] * 3 + [np.float32]
    assert streams.log[0] == "external 7 waits for cupy"


def test_no_kernels_where_cupy_cannot_be_used(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cupy_arrays.cupy_for(DEVICE) is cupy
    assert cupy_arrays.cupy_for(torch.device("cpu")) is None
    cupy.cuda.runtime.runtimeGetVersion = lambda: 12090
    assert cupy_arrays.cupy_for(DEVICE) is None
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert cupy_arrays.cupy_for(DEVICE) is None


# ---------------------------------------------------------------------------- bad input
def test_cupy_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    for call in (cl.to_cupy, cl.from_cupy):
        with pytest.raises(ImportError, match=r"pip install 'curvlib\[cupy\]'"):
            call(torch.eye(2))


def test_cupy_that_cannot_be_loaded(cupy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ModuleType:
        raise ImportError("libcublas.so.13: cannot open shared object file")

    monkeypatch.setattr("importlib.import_module", missing)
    message = r"CuPy is installed, but cannot be loaded: libcublas.*cupy-cuda13x\[ctk\]"
    with pytest.raises(ImportError, match=message):
        cl.to_cupy(torch.eye(2))


@pytest.mark.parametrize("call", [cl.to_cupy, cl.from_cupy])
def test_cupy_for_another_cuda(cupy: Any, call: Any) -> None:
    cupy.cuda.runtime.runtimeGetVersion = lambda: 12090
    message = (
        r"CuPy was built for CUDA 12, but torch for CUDA 13\.0; replace it by the one of torch's "
        r"CUDA: pip uninstall cupy-cuda12x, then pip install cupy-cuda13x"
    )
    with pytest.raises(RuntimeError, match=message):
        call(torch.eye(2))


@pytest.mark.usefixtures("cupy")
def test_cupy_needs_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    message = r"CuPy works on CUDA devices, got cpu; move the model with model\.to\('cuda'\)"
    with pytest.raises(ValueError, match=message):
        cl.to_cupy(torch.eye(2))
    with pytest.raises(ValueError, match=message):
        cl.from_cupy(np.eye(2), device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"CuPy needs a CUDA device, and torch finds none"):
        cl.from_cupy(np.eye(2))


@pytest.mark.usefixtures("on_cpu")
def test_complex_matrices_are_refused() -> None:
    with pytest.raises(TypeError, match="expected a real matrix, got complex128"):
        cl.from_cupy(np.eye(2) * 1j, device="cpu")


# -------------------------------------------------------------------------------- CUDA
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_solvers_of_cupyx_run_on_a_gpu(dtype: torch.dtype) -> None:
    cupy = pytest.importorskip("cupy")
    from cupyx.scipy.sparse import linalg

    A, tolerance = _positive(64).to("cuda", dtype), 1e-4 if dtype == torch.float32 else 1e-8
    C, b = cl.to_cupy(A), cupy.ones(64, dtype=str(dtype).removeprefix("torch."))
    for solve in (linalg.cg, linalg.gmres):
        x, _ = solve(C, b, rtol=tolerance / 10)
        residual = A @ torch.from_dlpack(x) - 1.0
        assert float(torch.linalg.vector_norm(residual)) <= 10 * tolerance
    values = linalg.eigsh(C, k=3, which="LA", return_eigenvectors=False)
    expected = torch.linalg.eigvalsh(A.double())[-3:].cpu().numpy()
    np.testing.assert_allclose(np.sort(cupy.asnumpy(values)), expected, rtol=tolerance)
    wide = _matrix(40, 64).to("cuda", dtype)
    singular = linalg.svds(cl.to_cupy(wide), k=3, return_singular_vectors=False)
    expected = torch.linalg.svdvals(wide.double())[:3].flip(0).cpu().numpy()
    np.testing.assert_allclose(np.sort(cupy.asnumpy(singular)), expected, rtol=tolerance)
    back = cl.from_cupy(cupy.from_dlpack(A))
    torch.testing.assert_close(back @ A[:, :2], A @ A[:, :2])
    again = cl.from_cupy(C)
    torch.testing.assert_close(again @ A[:, :2], A @ A[:, :2])


@pytest.mark.gpu
def test_nothing_is_copied_on_a_gpu() -> None:
    cupy = pytest.importorskip("cupy")
    seen: list[tuple[int, int]] = []

    def multiply(V: torch.Tensor) -> torch.Tensor:
        out = 2.0 * V
        seen.append((V.data_ptr(), out.data_ptr()))
        return out

    op = LinearOperator(multiply, (6, 6), dtype=F64, device="cuda", symmetric=True)
    C = cl.to_cupy(op)
    for x in (cupy.ones((6, 3)), cupy.ones((6, 3), order="F")):
        y = C.matmat(x)
        assert seen.pop() == (x.data.ptr, y.data.ptr)
    V = torch.ones(3, 6, dtype=F64, device="cuda").mT
    out = cl.from_cupy(C) @ V
    assert seen.pop() == (V.data_ptr(), out.data_ptr())


@pytest.mark.gpu
def test_streams_are_ordered_on_a_gpu() -> None:
    """Each side sleeps before it writes what the other one reads: unordered, zeros are read."""
    cupy = pytest.importorskip("cupy")
    n, there = 1 << 20, cupy.cuda.Stream(non_blocking=True)
    D = torch.zeros(n, dtype=F64, device="cuda")

    def slow(V: torch.Tensor) -> torch.Tensor:
        torch.cuda._sleep(50_000_000)
        return D[:, None] * V

    C = cl.to_cupy(LinearOperator(slow, (n, n), dtype=F64, device="cuda", symmetric=True))
    torch.cuda.synchronize()
    with there:
        x = cupy.zeros(n)
        there.synchronize()
        torch.cuda._sleep(50_000_000)
        D.fill_(3.0)  # queued by torch behind its sleep, on its own stream
        x += 2.0
        y = C.matvec(x)
        x *= 0.0  # behind the product, which still reads it
        total = float(y.sum())
    assert total == 6.0 * n
    side = torch.cuda.Stream()
    with there:
        M = cupy.zeros((64, 64))
        A = cl.from_cupy(M)
        there.synchronize()
    torch.cuda.synchronize()
    with there, torch.cuda.stream(side):
        external = torch.cuda.ExternalStream(there.ptr)
        with torch.cuda.stream(external):
            torch.cuda._sleep(50_000_000)
        M += 1.0  # behind that
        torch.cuda._sleep(50_000_000)
        V = torch.ones(64, 2, dtype=F64, device="cuda")
        out = A @ V
        M *= 0.0  # behind the product
        assert torch.equal(out, torch.full_like(out, 64.0))
