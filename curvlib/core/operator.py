r"""Linear operators: matrices that one can only multiply by.

An operator :math:`A \in \mathbb{R}^{m \times n}` is known by its product with a block of
columns, ``A.matmat(V)`` with ``V`` of shape ``[n, K]``. Everything else - products with one
vector, sums, scalings, products of operators, shifts, submatrices, per-layer blocks - follows
from that one function, and so does the dense matrix where it fits.

Columns are the last axis, as in SciPy. Blocks that curvlib makes are *column-contiguous*
(``V.T`` is contiguous), so that one column is one contiguous vector; blocks of any other layout
are accepted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvlib.core import algebra
from curvlib.core.algebra import Index
from curvlib.core.digest import digest
from curvlib.core.exhausted import names_what_fits

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as ScipyOperator

    from curvlib.core.ranks.group import Group
    from curvlib.core.ranks.spread import Spread
    from curvlib.core.space import ParamSpace

Matmat = Callable[[Tensor], Tensor]


class LinearOperator:
    """A matrix that is known by its products.

    Args:
        matmat: Maps columns ``[n, K]`` to ``[m, K]``. It may rely on the dtype, device and
            shape of its argument, which are checked before, and must not change it.
        shape: ``(m, n)``.
        dtype: Type of the vectors (``torch.float32`` or ``torch.float64``).
        device: Where the vectors live.
        rmatmat: Product with the transpose, ``[m, K]`` to ``[n, K]``. Symmetric operators
            need none.
        symmetric: Whether ``A == A.T``.
        psd: Whether the operator is known to be symmetric positive semi-definite.
        space: The parameters that index rows and columns, where there are any.
        name: What is measured, for legends and reports (``"Hessian"``).
        identity: A string, or a function that returns one, which differs between operators
            that differ: checkpoints are matched by it.
        differentiable: The product again, on a graph that leads back to the parameters, where
            the operator has one: see :meth:`differentiable_matmat`.
        restrict: Returns the operator of a subset of the parameters (given by name) where
            that is cheaper than a submatrix.
        group: The processes that have to multiply together, each by the same columns.
        spread: Which rows of vectors this process holds where they are spread over several
            (a square operator of sharded parameters); ``shape`` is that of the whole.

    Example:
        >>> import torch
        >>> A = LinearOperator(lambda V: 2 * V, (3, 3), dtype=torch.float64, symmetric=True)
        >>> (A.shift(1.0) @ torch.ones(3, dtype=torch.float64)).tolist()
        [3.0, 3.0, 3.0]
    """

    __array_ufunc__ = None  # NumPy scalars on the left defer to __rmul__

    def __init__(
        self,
        matmat: Matmat,
        shape: tuple[int, int],
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        rmatmat: Matmat | None = None,
        symmetric: bool = False,
        psd: bool = False,
        space: ParamSpace | None = None,
        name: str = "operator",
        identity: str | Callable[[], str] = "",
        restrict: Callable[[tuple[str, ...]], LinearOperator] | None = None,
        differentiable: Matmat | None = None,
        group: Group | None = None,
        spread: Spread | None = None,
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"operators work on float32 or float64 vectors, got {dtype}; "
                "convert the matrix, or use a model's operator, whose vectors are float32 "
                "whatever its parameters are"
            )
        if (symmetric or psd) and shape[0] != shape[1]:
            raise ValueError(f"a symmetric operator is square, got shape {tuple(shape)}")
        self.shape = (int(shape[0]), int(shape[1]))
        self.dtype = dtype
        self.device = torch.empty(0, device=device).device  # "cuda" is "cuda:0" from here on
        self.symmetric = symmetric or psd
        self.psd = psd
        self.space = space
        self.name = name
        self.group = group
        self.spread = spread
        self._product = matmat
        self._transposed_product = matmat if self.symmetric else rmatmat
        self._identity = identity
        self._restrict = restrict
        self._differentiable = differentiable
        self._base: LinearOperator | None = None  # what this is the transpose of

    @property
    def length(self) -> int:
        """Rows of a vector that this process holds: ``shape[1]`` unless they are spread."""
        return self.shape[1] if self.spread is None else self.spread.length

    @property
    def holders(self) -> int:
        """Over how many processes vectors are spread: 1 where each holds them whole."""
        return 1 if self.spread is None else self.spread.group.size

    # ---------------------------------------------------------------- products
    def matmat(self, columns: Tensor) -> Tensor:
        """Product with a block of columns.

        Args:
            columns: ``[n, K]``, of the operator's dtype and device.

        Returns:
            ``[m, K]``.

        Raises:
            TypeError: If ``columns`` is no tensor or of another dtype.
            ValueError: If its shape or device does not fit.
        """
        return self._multiply(columns, self._product, self.shape)

    def rmatmat(self, columns: Tensor) -> Tensor:
        """Product of the transpose with a block of columns, ``[m, K]`` to ``[n, K]``."""
        if self._transposed_product is None:
            raise TypeError(
                f"{self!r} has no product with its transpose; pass rmatmat= when you build it"
            )
        return self._multiply(columns, self._transposed_product, self.shape[::-1])

    def differentiable_matmat(self, columns: Tensor) -> Tensor:
        """The product ``[n, K]`` with a graph, so that a penalty on it can be trained through.

        Args:
            columns: ``[n, K]``, of the operator's dtype and device; may carry a graph.

        Raises:
            TypeError: If the operator's products have no graph; or as :meth:`matmat`.
        """
        if self._differentiable is None:
            raise TypeError(
                f"products of {self!r} carry no graph; curvlib.hessian(risk) and "
                "curvlib.hessian_of(fn, x) have products that do"
            )
        return self._multiply(columns, self._differentiable, self.shape)

    def _multiply(self, columns: Tensor, product: Matmat, shape: tuple[int, ...]) -> Tensor:
        rows, length = shape if self.spread is None else (self.spread.length, self.spread.length)
        if not isinstance(columns, Tensor):
            raise TypeError(
                f"expected a torch.Tensor of shape [{length}, K], got {type(columns).__name__}; "
                "torch.from_numpy(x) converts NumPy arrays, curvlib.to_scipy(op) gives an "
                "operator for NumPy"
            )
        if columns.ndim != 2 or columns.shape[0] != length:
            raise ValueError(
                f"expected columns of shape [{length}, K], got {list(columns.shape)}; "
                f"{self!r} multiplies vectors of length {length}"
            )
        if columns.dtype != self.dtype:
            raise TypeError(
                f"expected {self.dtype} vectors, got {columns.dtype}; "
                f"curvlib never casts silently: use v.to({self.dtype})"
            )
        if columns.device != self.device:
            raise ValueError(
                f"expected vectors on {self.device}, got {columns.device}; "
                f"use v.to({str(self.device)!r})"
            )
        if columns.shape[1] == 0:
            return columns.new_zeros((rows, 0))
        settings = {"columns": columns.shape[1], "graphs": self._restrict is not None}
        with names_what_fits(f"a product of {self.name}", settings):
            out = product(columns)
        if out.shape != (rows, columns.shape[1]):
            raise ValueError(
                f"the product of {self!r} with {list(columns.shape)} should have shape "
                f"{[rows, columns.shape[1]]}, but matmat returned {list(out.shape)}"
            )
        return out

    def __matmul__(self, other: Any) -> Any:
        """``A @ v``, ``A @ V`` or ``A @ B``."""
        if isinstance(other, LinearOperator):
            return algebra.product(self, other)
        if isinstance(other, Tensor) and other.ndim == 1:
            return self.matmat(algebra.as_column(other, self.length))[:, 0]
        return self.matmat(other)

    def __rmatmul__(self, other: Any) -> Any:
        """``v @ A`` (a row vector) or ``V @ A`` with rows ``[K, m]``."""
        if isinstance(other, Tensor) and other.ndim == 1:
            return self.rmatmat(algebra.as_column(other, self._height))[:, 0]
        if isinstance(other, Tensor):
            return self.rmatmat(other.mT).mT
        return NotImplemented

    # ----------------------------------------------------------------- algebra
    @property
    def T(self) -> LinearOperator:  # noqa: N802 (the name that NumPy and torch use)
        """The transpose."""
        if self.symmetric:
            return self
        if self._base is not None:
            return self._base
        out = self._like(
            self.rmatmat,
            rmatmat=self.matmat,
            shape=self.shape[::-1],
            name=f"{self.name}.T",
            symmetric=False,
            psd=False,
        )
        out._base = self
        return out

    def __add__(self, other: Any) -> LinearOperator:
        other = _operand(self, other, "+")
        if other is NotImplemented:
            return NotImplemented
        return algebra.combined(self, other, 1.0)

    def __sub__(self, other: Any) -> LinearOperator:
        other = _operand(self, other, "-")
        if other is NotImplemented:
            return NotImplemented
        return algebra.combined(self, other, -1.0)

    def __radd__(self, other: Any) -> LinearOperator:
        other = _operand(self, other, "+")
        if other is NotImplemented:
            return NotImplemented
        return algebra.combined(other, self, 1.0)

    def __rsub__(self, other: Any) -> LinearOperator:
        other = _operand(self, other, "-")
        if other is NotImplemented:
            return NotImplemented
        return algebra.combined(other, self, -1.0)

    def __mul__(self, factor: Any) -> LinearOperator:
        factor = algebra.scalar(factor)
        if factor is None:
            return NotImplemented
        return algebra.scaled(self, factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> LinearOperator:
        value = algebra.scalar(divisor)
        if value is None:
            return NotImplemented
        if value == 0.0:
            raise ValueError(f"cannot divide {self!r} by zero")
        return self * (1.0 / value)

    def __neg__(self) -> LinearOperator:
        return self * -1.0

    def shift(self, value: float) -> LinearOperator:
        """``A + value * I``, for a square operator (damping, deflation, spectral shifts)."""
        self._require_square("shift")
        return algebra.shifted(self, algebra.finite(value))

    def submatrix(self, rows: Index, columns: Index | None = None) -> LinearOperator:
        """The operator of some rows and columns.

        Args:
            rows: Indices, a boolean mask, a slice, or name globs of parameters (where the
                operator has a ``space``).
            columns: The same for columns; the same selection as ``rows`` when omitted.
                Products multiply zero-padded vectors: for the block of some parameters,
                :meth:`blocks` is cheaper.

        Where vectors are spread over processes, those of the result are whole on each.

        Raises:
            ValueError: If an index is out of range, or a glob matches nothing.
        """
        return algebra.submatrix(self, rows, columns)

    def blocks(self) -> dict[str, LinearOperator]:
        """Diagonal blocks, one for each layer (module that owns parameters), by name.

        Their vectors are spread over processes as those of the operator.

        Raises:
            ValueError: If the operator is not indexed by parameters.
        """
        if self.space is None:
            raise ValueError(
                f"{self!r} is not indexed by parameters, so it has no layers; "
                "use submatrix(indices)"
            )
        out: dict[str, LinearOperator] = {}
        for layer, names in self.space.layers().items():
            if self._restrict is not None:
                out[layer] = self._restrict(names)
            else:
                out[layer] = algebra.part(self, names)
        return out

    # ------------------------------------------------------------- conversions
    def whole(self) -> LinearOperator:
        """The operator of whole vectors on each process, where they are spread; else itself.

        All processes have to multiply together, each by the same columns.
        """
        spread = self.spread
        if spread is None:
            return self
        return self._like(
            lambda V: spread.gather(self.matmat(spread.scatter(V))),
            rmatmat=lambda V: spread.gather(self.rmatmat(spread.scatter(V))),
            space=None,
            spread=None,
        )

    def to_dense(self, *, block: int = 64) -> Tensor:
        """The matrix ``[m, n]``, by products with ``block`` columns of the identity at a time.

        Where vectors are spread over processes, the whole matrix is on each of them.
        """
        if self.spread is not None:
            return self.whole().to_dense(block=block)
        rows, columns = self.shape
        out = torch.empty((columns, rows), dtype=self.dtype, device=self.device).T
        for start in range(0, columns, block):
            stop = min(start + block, columns)
            eye = torch.zeros((stop - start, columns), dtype=self.dtype, device=self.device)
            eye[:, start:stop].fill_diagonal_(1.0)
            out[:, start:stop] = self.matmat(eye.T)
        return out

    def to_scipy(self) -> ScipyOperator:
        """A :class:`scipy.sparse.linalg.LinearOperator`: see :func:`curvlib.to_scipy`."""
        from curvlib.core.interop import to_scipy

        return to_scipy(self)

    def fingerprint(self) -> str:
        """A digest that differs between different operators, by which checkpoints are matched."""
        identity = self._identity() if callable(self._identity) else self._identity
        text = f"{self.name}|{self.shape}|{self.dtype}|{identity}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def digest(self, columns: Sequence[Tensor]) -> str:
        """:func:`digest` of blocks ``[n, K]`` that the operator could multiply, whole."""
        return digest(columns) if self.spread is None else self.spread.digest(columns)

    def __repr__(self) -> str:
        kind = "psd " if self.psd else "symmetric " if self.symmetric else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"<{self.name}: {kind}{self.shape[0]} x {self.shape[1]}, {dtype}, {self.device}>"

    # ----------------------------------------------------------------- private
    def _like(self, matmat: Matmat, **changes: Any) -> LinearOperator:
        """An operator with this one's properties, except for ``changes``."""
        if self._transposed_product is None:
            changes.pop("rmatmat", None)
        settings: dict[str, Any] = {
            "shape": self.shape,
            "dtype": self.dtype,
            "device": self.device,
            "symmetric": self.symmetric,
            "psd": self.psd,
            "space": self.space,
            "name": self.name,
            "identity": self.fingerprint,
            "group": self.group,
            "spread": self.spread,
        }
        return LinearOperator(matmat, **(settings | changes))

    @property
    def _height(self) -> int:
        return self.shape[0] if self.spread is None else self.spread.length

    def _require_whole(self, what: str) -> None:
        if self.spread is not None:
            raise ValueError(
                f"{what} needs whole vectors, and those of {self!r} are spread over "
                f"{self.spread.group.size} processes (a sharding that curvlib cannot follow here); "
                "op.whole() is an operator of whole vectors"
            )

    def _require_square(self, what: str) -> None:
        if self.shape[0] != self.shape[1]:
            raise ValueError(f"{what} needs a square operator, got shape {self.shape}")


def as_operator(matrix: LinearOperator | Tensor, *, spread: bool = False) -> LinearOperator:
    """An operator as it is, or a dense square or rectangular tensor as an operator.

    Args:
        matrix: The operator or tensor.
        spread: Whether the caller follows vectors that are spread over processes.

    Raises:
        TypeError: If ``matrix`` is neither, or not of a real floating-point type.
        ValueError: If the tensor is not two-dimensional, or vectors are spread over processes
            where that is not followed.
    """
    if isinstance(matrix, LinearOperator):
        if not spread:
            matrix._require_whole("this function")
        return matrix
    if not isinstance(matrix, Tensor):
        raise TypeError(
            f"expected a LinearOperator or a torch.Tensor, got {type(matrix).__name__}; "
            "curvlib.hessian(risk) makes one from a model, curvlib.from_scipy(A) from SciPy"
        )
    if matrix.ndim != 2:
        raise ValueError(f"a dense operator needs two dimensions, got shape {list(matrix.shape)}")
    symmetric = matrix.shape[0] == matrix.shape[1] and torch.equal(matrix, matrix.mT)
    return LinearOperator(
        lambda V: matrix @ V,
        (matrix.shape[0], matrix.shape[1]),
        dtype=matrix.dtype,
        device=matrix.device,
        rmatmat=lambda V: matrix.mT @ V,
        symmetric=symmetric,
        name="matrix",
        identity=lambda: digest([matrix]),
    )


def _operand(op: LinearOperator, other: Any, sign: str) -> Any:
    if isinstance(other, Tensor) and other.ndim == 2:
        other = as_operator(other)
    if not isinstance(other, LinearOperator):
        if algebra.scalar(other) is not None:
            raise TypeError(
                f"op {sign} {other!r} is ambiguous; write op.shift({other!r}) for op + c * I"
            )
        return NotImplemented
    if op.shape != other.shape:
        raise ValueError(f"cannot combine shapes {op.shape} and {other.shape} with {sign!r}")
    algebra.require_same_kind(op, other, sign)
    return other
