r"""CuPy beside torch: operators that cross without copies, on one stream at a time.

Arrays cross by DLPack, which shares memory both ways. That is right only if both libraries agree
on *when* memory is written, read and given back, and each queues its work on a stream of its own.
So whoever is called joins the stream of the caller: torch works on CuPy's current stream while
CuPy multiplies by a curvlib operator, and CuPy on torch's while curvlib multiplies by a CuPy
operator. Before, that stream waits for what the other one has queued (parameters that an optimizer
step still writes, say), and afterwards the other one waits for it. The host waits for nothing, and
memory is taken from, and given back to, the pool of the stream that uses it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from curvlib.core.operator import LinearOperator, as_operator


def to_cupy(op: LinearOperator | Tensor) -> Any:
    """An operator for ``cupyx.scipy.sparse.linalg``, which multiplies CuPy arrays without copies.

    ``eigsh``, ``svds``, ``cg`` and ``gmres`` of cupyx take it. Products run on CuPy's current
    stream, ordered after what torch has queued.

    Args:
        op: Operator, or dense tensor, on a CUDA device.

    Returns:
        A ``cupyx.scipy.sparse.linalg.LinearOperator``.

    Raises:
        ImportError: If CuPy is missing, or cannot be loaded.
        RuntimeError: If CuPy was built for another CUDA than torch, or there is no CUDA device.
        ValueError: If the operator is not on a CUDA device.
    """
    cupy, sparse = require_cupy(), _sparse()
    A = as_operator(op, spread=True).whole()
    _require_cuda(A.device)
    dtype = cupy.dtype(str(A.dtype).removeprefix("torch."))

    def product(x: Any, multiply: Any) -> Any:
        with torch_on_stream_of(cupy, A.device):
            columns = from_dlpack((x if x.ndim == 2 else x[:, None]).astype(dtype, copy=False))
            out = cupy.from_dlpack(multiply(columns).detach())
        return out.reshape(out.shape[0], *x.shape[1:])

    return sparse.LinearOperator(
        A.shape,
        matvec=lambda x: product(x, A.matmat),
        matmat=lambda x: product(x, A.matmat),
        rmatvec=lambda x: product(x, A.rmatmat),
        rmatmat=lambda x: product(x, A.rmatmat),
        dtype=dtype,
    )


def from_cupy(matrix: Any, *, device: torch.device | str = "cuda") -> LinearOperator:
    """A curvlib operator from a CuPy operator, sparse matrix or array, without copies.

    Products run on torch's current stream, ordered after what CuPy has queued.

    Args:
        matrix: What ``cupyx.scipy.sparse.linalg.aslinearoperator`` takes.
        device: The CUDA device on which it lives.

    Raises:
        ImportError: If CuPy is missing, or cannot be loaded.
        RuntimeError: If CuPy was built for another CUDA than torch, or there is no CUDA device.
        TypeError: If the matrix is not real.
        ValueError: If the device is no CUDA device.
    """
    cupy, sparse = require_cupy(), _sparse()
    _require_cuda(torch.device(device))
    A = sparse.aslinearoperator(matrix)
    kind = np.dtype(A.dtype)
    if kind.kind not in "fiub":
        raise TypeError(f"expected a real matrix, got {kind}; curvlib's operators are real")
    place = torch.empty(0, device=device).device

    def product(columns: Tensor, multiply: Any) -> Tensor:
        with cupy_on_stream_of_torch(cupy, place):
            return from_dlpack(multiply(cupy.from_dlpack(columns.detach())))

    return LinearOperator(
        lambda V: product(V, A.matmat),
        (A.shape[0], A.shape[1]),
        dtype=torch.float32 if kind == np.float32 else torch.float64,
        device=place,
        rmatmat=lambda V: product(V, A.rmatmat),
        name="CuPy operator",
    )


# ------------------------------------------------------------------------ streams
@contextmanager
def torch_on_stream_of(cupy: Any, device: torch.device) -> Iterator[None]:
    """Work of torch goes to CuPy's current stream, in order with torch's own.

    Args:
        cupy: The module.
        device: A CUDA device, with its number.
    """
    with torch.cuda.device(device), cupy.cuda.Device(device.index):
        pointer = int(cupy.cuda.get_current_stream().ptr)
        own = torch.cuda.current_stream(device)
        # the default stream is 0 or, in full, 1; torch would take 0 for "any new stream"
        if pointer in (0, 1):
            joined = torch.cuda.default_stream(device)
        else:
            joined = torch.cuda.ExternalStream(pointer, device)
        if joined.cuda_stream == own.cuda_stream:
            yield
            return
        joined.wait_stream(own)
        try:
            with torch.cuda.stream(joined):
                yield
        finally:
            own.wait_stream(joined)


@contextmanager
def cupy_on_stream_of_torch(cupy: Any, device: torch.device) -> Iterator[None]:
    """Work of CuPy goes to torch's current stream, in order with CuPy's own.

    Args:
        cupy: The module.
        device: A CUDA device, with its number.
    """
    with torch.cuda.device(device), cupy.cuda.Device(device.index):
        own = cupy.cuda.get_current_stream()
        pointer = int(torch.cuda.current_stream(device).cuda_stream)
        if pointer == int(own.ptr):
            yield
            return
        joined = _stream_at(cupy, pointer)
        joined.wait_event(own.record())
        try:
            with joined:
                yield
        finally:
            own.wait_event(joined.record())


class _Handle:
    """A stream by its address, as the CUDA stream protocol wants it."""

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


def _stream_at(cupy: Any, pointer: int) -> Any:
    """CuPy's view of a stream: as of CuPy 14 by the protocol, before by address."""
    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(_Handle(pointer))
    return cupy.cuda.ExternalStream(pointer)


# ------------------------------------------------------------------- requirements
def require_cupy() -> Any:
    """CuPy, if it is there and of torch's CUDA.

    Raises:
        ImportError: If CuPy is missing, or cannot be loaded.
        RuntimeError: If it was built for another major version of CUDA.
    """
    cupy = _imported("cupy")
    here = str(torch.version.cuda) if torch.version.cuda else ""
    there = int(cupy.cuda.runtime.runtimeGetVersion()) // 1000
    if here and here.split(".", maxsplit=1)[0] != str(there):
        raise RuntimeError(
            f"CuPy was built for CUDA {there}, but torch for CUDA {here}; replace it by the one of "
            f"torch's CUDA: pip uninstall cupy-cuda{there}x, then pip install "
            f"cupy-cuda{here.split('.', maxsplit=1)[0]}x"
        )
    return cupy


def cupy_for(device: torch.device) -> Any | None:
    """CuPy for kernels on a device; ``None`` where it cannot be used, for whatever reason."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    try:
        return require_cupy()
    except (ImportError, RuntimeError):
        return None


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise ImportError(
            "CuPy is needed for this: pip install 'curvlib[cupy]' (or the cupy-cuda wheel of your "
            "CUDA version)"
        ) from None
    except ImportError as error:
        raise ImportError(
            f"CuPy is installed, but cannot be loaded: {error}; it needs the driver and the "
            "libraries of its CUDA version: pip install 'cupy-cuda13x[ctk]' brings the latter"
        ) from error


def _sparse() -> Any:
    return _imported("cupyx.scipy.sparse.linalg")


def _require_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(
            f"CuPy works on CUDA devices, got {device}; move the model with model.to('cuda'), or "
            "use to_scipy and from_scipy"
        )
    if not torch.cuda.is_available():
        raise RuntimeError(
            "CuPy needs a CUDA device, and torch finds none here: torch.cuda.is_available() says "
            "no; install torch with CUDA and the driver, or use to_scipy and from_scipy"
        )
