r"""To and from SciPy, and whatever speaks DLPack; for CuPy see :mod:`curvlib.core.cupy_arrays`.

SciPy's operators multiply NumPy arrays; curvlib's multiply torch tensors. On the CPU they share
memory, and nothing is copied but to change the memory order that the other side asks for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.sparse import issparse
from scipy.sparse.linalg import LinearOperator as ScipyOperator
from scipy.sparse.linalg import aslinearoperator
from torch import Tensor
from torch.utils.dlpack import from_dlpack as from_dlpack_

from curvlib.core.operator import LinearOperator, as_operator


def to_scipy(op: LinearOperator | Tensor) -> ScipyOperator:
    """An operator for SciPy's solvers, which multiplies NumPy arrays.

    Vectors cross to the operator's device and back at each product. Where they are spread over
    processes, SciPy's are whole on each, and all processes have to make the same calls.

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
    A = as_operator(op, spread=True).whole()
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
