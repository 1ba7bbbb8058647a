r"""To and from SciPy, CuPy, and whatever speaks DLPack.

SciPy and CuPy operators multiply arrays of their own kind; curvlib's multiply torch tensors. On
the CPU, NumPy arrays and torch tensors share memory; on a GPU, CuPy arrays and torch tensors do,
through DLPack. Nothing is copied but to change the memory order that the other side asks for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.sparse import issparse
from scipy.sparse.linalg import LinearOperator as ScipyOperator
from scipy.sparse.linalg import aslinearoperator
from torch import Tensor
from torch.utils.dlpack import from_dlpack as from_dlpack_

from curvlib.core.operator import LinearOperator, as_operator

if TYPE_CHECKING:
    from types import ModuleType


def to_scipy(op: LinearOperator | Tensor) -> ScipyOperator:
    """An operator for SciPy's solvers, which multiplies NumPy arrays.

    Vectors cross to the operator's device and back at each product.

    Args:
        op: Operator, or dense tensor.

    Returns:
        A :class:`scipy.sparse.linalg.LinearOperator` of the same shape and dtype.

    Example:
        >>> import torch
        >>> from scipy.sparse.linalg import eigsh
        >>> A = torch.diag(torch.arange(1.0, 6.0, dtype=torch.float64))
        >>> float(eigsh(to_scipy(A), k=1, which="LA", return_eigenvectors=False)[0].round(6))
        5.0
    """
    A = as_operator(op)
    dtype = np.dtype(str(A.dtype).removeprefix("torch."))

    def product(x: Any, multiply: Any) -> Any:
        array = np.array(x, dtype=dtype, order="F", ndmin=1)  # torch needs writable memory
        columns = torch.from_numpy(array.reshape(array.shape[0], -1)).to(A.device)
        out = multiply(columns).detach().cpu().numpy()
        return out.reshape(out.shape[0], *np.shape(x)[1:])

    return ScipyOperator(
        shape=A.shape,
        dtype=dtype,
        matvec=lambda x: product(x, A.matmat),
        matmat=lambda x: product(x, A.matmat),
        rmatvec=lambda x: product(x, A.rmatmat),
        rmatmat=lambda x: product(x, A.rmatmat),
    )


def from_scipy(matrix: Any, *, device: torch.device | str = "cpu") -> LinearOperator:
    """A curvlib operator from a SciPy operator, a sparse matrix or a NumPy array.

    Args:
        matrix: What ``scipy.sparse.linalg.aslinearoperator`` takes.
        device: Where curvlib's vectors live.

    Raises:
        TypeError: If ``matrix`` is none of these, or is not real.

    Example:
        >>> import numpy as np, torch
        >>> A = from_scipy(np.diag([1.0, 2.0]))
        >>> (A @ torch.ones(2, dtype=torch.float64)).tolist(), A.symmetric
        ([1.0, 2.0], True)
    """
    try:
        A = aslinearoperator(matrix)
    except TypeError:
        raise TypeError(
            "expected a SciPy operator, a sparse matrix or a NumPy array, "
            f"got {type(matrix).__name__}"
        ) from None
    kind = np.dtype(A.dtype if A.dtype is not None else np.float64)
    if kind.kind not in "fiub":
        raise TypeError(f"expected a real matrix, got {kind}; curvlib's operators are real")
    dtype = torch.float32 if kind == np.float32 else torch.float64
    symmetric = False
    if issparse(matrix) and matrix.shape[0] == matrix.shape[1]:
        symmetric = (matrix != matrix.T).nnz == 0
    elif isinstance(matrix, np.ndarray):
        symmetric = matrix.shape == matrix.T.shape and bool(np.array_equal(matrix, matrix.T))

    def product(columns: Tensor, multiply: Any) -> Tensor:
        out = np.ascontiguousarray(multiply(columns.cpu().numpy()))
        return torch.from_numpy(out).to(device, dtype)

    return LinearOperator(
        lambda V: product(V, A.matmat),
        (A.shape[0], A.shape[1]),
        dtype=dtype,
        device=device,
        rmatmat=lambda V: product(V, A.rmatmat),
        symmetric=symmetric,
        name="SciPy operator",
    )


def to_cupy(op: LinearOperator | Tensor) -> Any:
    """An operator for ``cupyx.scipy.sparse.linalg``, which multiplies CuPy arrays without copies.

    Args:
        op: Operator, or dense tensor, on a CUDA device.

    Returns:
        A ``cupyx.scipy.sparse.linalg.LinearOperator``.

    Raises:
        ImportError: If CuPy is missing.
        ValueError: If the operator is not on a CUDA device.
    """
    cupy, sparse = _cupy()
    A = as_operator(op)
    _require_cuda(A.device)

    def product(x: Any, multiply: Any) -> Any:
        array = x if x.ndim == 2 else x[:, None]
        return cupy.from_dlpack(multiply(from_dlpack_(array)).contiguous()).reshape(
            -1, *x.shape[1:]
        )

    return sparse.LinearOperator(
        A.shape,
        matvec=lambda x: product(x, A.matmat),
        matmat=lambda x: product(x, A.matmat),
        rmatvec=lambda x: product(x, A.rmatmat),
        rmatmat=lambda x: product(x, A.rmatmat),
        dtype=cupy.dtype(str(A.dtype).removeprefix("torch.")),
    )


def from_cupy(matrix: Any, *, device: torch.device | str = "cuda") -> LinearOperator:
    """A curvlib operator from a CuPy operator, sparse matrix or array, without copies.

    Args:
        matrix: What ``cupyx.scipy.sparse.linalg.aslinearoperator`` takes.
        device: The CUDA device on which it lives.

    Raises:
        ImportError: If CuPy is missing.
        TypeError: If the matrix is not real.
        ValueError: If the device is no CUDA device.
    """
    cupy, sparse = _cupy()
    _require_cuda(torch.device(device))
    A = sparse.aslinearoperator(matrix)
    kind = np.dtype(A.dtype)
    if kind.kind not in "fiub":
        raise TypeError(f"expected a real matrix, got {kind}; curvlib's operators are real")

    def product(columns: Tensor, multiply: Any) -> Tensor:
        out = multiply(cupy.from_dlpack(columns.contiguous()))
        return from_dlpack_(cupy.ascontiguousarray(out))

    return LinearOperator(
        lambda V: product(V, A.matmat),
        (A.shape[0], A.shape[1]),
        dtype=torch.float32 if kind == np.float32 else torch.float64,
        device=device,
        rmatmat=lambda V: product(V, A.rmatmat),
        name="CuPy operator",
    )


def _require_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(
            f"CuPy works on CUDA devices, got {device}; move the model with model.to('cuda'), or "
            "use to_scipy and from_scipy"
        )


def to_dlpack(vectors: Tensor) -> Any:
    """A DLPack capsule of some vectors, which any array library's ``from_dlpack`` takes.

    Raises:
        TypeError: If ``vectors`` is no tensor.
    """
    if not isinstance(vectors, Tensor):
        raise TypeError(f"expected a torch.Tensor, got {type(vectors).__name__}")
    return vectors.detach().__dlpack__()


def from_dlpack(array: Any) -> Tensor:
    """Vectors from another library's array (NumPy, CuPy, JAX, …), sharing its memory.

    Raises:
        TypeError: If the array does not speak DLPack.
    """
    if not hasattr(array, "__dlpack__"):
        raise TypeError(
            f"expected an array that has __dlpack__ (NumPy, CuPy, JAX, ...), "
            f"got {type(array).__name__}"
        )
    tensor: Tensor = from_dlpack_(array)
    return tensor


def _cupy() -> tuple[ModuleType, ModuleType]:
    try:
        cupy = importlib.import_module("cupy")
        sparse = importlib.import_module("cupyx.scipy.sparse.linalg")
    except ImportError:
        raise ImportError(
            "CuPy is needed for this: pip install 'curvlib[cupy]' (or the cupy-cuda wheel of your "
            "CUDA version)"
        ) from None
    return cupy, sparse
