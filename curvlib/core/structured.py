r"""Operators whose eigenvalues are known: each adds ``solve``, ``power``, ``trace`` and the like.

They are what preconditioners, low-rank approximations and diagonal curvature are made of. All of
their functions are exact and cost no more than a few products.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from curvlib.core.arguments import finite_number
from curvlib.core.digest import digest
from curvlib.core.eigenvalues import (
    counted,
    finite_tensor,
    require_positive,
    require_power,
    require_regular,
    summed,
)
from curvlib.core.operator import LinearOperator, Matmat
from curvlib.core.ranks.spread import Spread


class Diagonal(LinearOperator):
    """A diagonal matrix.

    Args:
        values: The diagonal, ``[P]``, finite.
        name: What it is, for legends and reports.
        spread: Which of its entries are here, where vectors are spread over processes
            (``risk.space.spread``): ``values`` are then this process's.

    Raises:
        TypeError: If ``values`` is no float32 or float64 tensor.
        ValueError: If it is not one-dimensional, or has an entry that is not finite.

    Example:
        >>> D = Diagonal(torch.tensor([1.0, 4.0]))
        >>> D.solve(torch.ones(2)).tolist(), (D.power(0.5) @ torch.ones(2)).tolist()
        ([1.0, 0.25], [1.0, 2.0])
    """

    def __init__(
        self, values: Tensor, *, name: str = "diagonal", spread: Spread | None = None
    ) -> None:
        values = finite_tensor("values", values, 1, spread)
        n = values.numel() if spread is None else spread.size
        super().__init__(
            lambda V: values[:, None] * V,
            (n, n),
            dtype=values.dtype,
            device=values.device,
            symmetric=True,
            psd=not counted(values < 0, spread),
            name=name,
            identity=lambda: self.digest([values]),
            group=None if spread is None else spread.group,
            spread=spread,
        )
        self.values = values

    def diagonal(self) -> Tensor:
        """The diagonal, ``[P]``."""
        return self.values

    def shift(self, value: float) -> Diagonal:
        """``D + value * I``, again diagonal."""
        name = super().shift(value).name
        return Diagonal(self.values + float(value), name=name, spread=self.spread)

    def solve(self, x: Tensor, damping: float = 0.0) -> Tensor:
        r""":math:`(D + \text{damping}\, I)^{-1} x` for ``x`` of shape ``[P]`` or ``[P, K]``.

        Raises:
            RuntimeError: If an entry of the damped diagonal is zero.
        """
        shifted = self.values + finite_number("damping", damping)
        require_regular(self, shifted, damping, self.spread)
        return on_columns(self, x, lambda V: V / shifted[:, None])

    def power(self, p: float) -> Diagonal:
        """``D ** p``; ``p = 0`` is the identity.

        Raises:
            RuntimeError: If a power of an entry is not real, or not finite.
        """
        require_power(self, self.values, p, self.spread)
        return Diagonal(self.values**p, name=f"({self.name})^{p:g}", spread=self.spread)

    def inverse(self, damping: float = 0.0) -> Diagonal:
        r""":math:`(D + \text{damping}\, I)^{-1}`, again diagonal."""
        shifted = self.values + finite_number("damping", damping)
        require_regular(self, shifted, damping, self.spread)
        return Diagonal(1.0 / shifted, name=f"({self.name})^-1", spread=self.spread)

    def trace(self) -> float:
        """The sum of the diagonal."""
        return float(summed(self.values.sum(dtype=torch.float64), self.spread))

    def logdet(self, damping: float = 0.0) -> float:
        r""":math:`\log \det (D + \text{damping}\, I)`.

        Raises:
            RuntimeError: If an entry of the damped diagonal is not positive.
        """
        shifted = self.values.double() + finite_number("damping", damping)
        require_positive(self, shifted, damping, self.spread)
        return float(summed(shifted.log().sum(), self.spread))


class LowRankPlusShift(LinearOperator):
    r""":math:`A = U \,\mathrm{diag}(v)\, U^\top + s I` with orthonormal columns :math:`U`.

    Its eigenvalues are :math:`v_i + s`, and :math:`s` with multiplicity ``P - k``. Inverses and
    powers are of the same kind, so they are exact: in :math:`O(P k)` for each column.

    Args:
        vectors: :math:`U`, ``[P, k]`` with orthonormal columns; ``k`` may be 0.
        values: :math:`v`, ``[k]``.
        shift: :math:`s`; the attribute is ``offset``.
        name: What it is, for legends and reports.
        spread: Which rows of :math:`U` are here, where vectors are spread over processes
            (``risk.space.spread``): ``vectors`` are then this process's rows.

    Attributes:
        vectors: :math:`U`, ``[P, k]``.
        eigenvalues: :math:`v + s`, ``[k]``, float64, on the CPU.
        offset: :math:`s`.

    Raises:
        TypeError: If a tensor is none of float32 or float64.
        ValueError: If shapes do not fit, numbers are not finite, or :math:`U^\top U \ne I`.

    Example:
        >>> U = torch.eye(3, dtype=torch.float64)[:, :1]
        >>> A = LowRankPlusShift(U, torch.tensor([3.0]), 1.0)
        >>> A.diagonal().tolist(), A.trace(), round(A.logdet(), 4)
        ([4.0, 1.0, 1.0], 6.0, 1.3863)
        >>> A.solve(torch.ones(3, dtype=torch.float64)).tolist()
        [0.25, 1.0, 1.0]
    """

    def __init__(
        self,
        vectors: Tensor,
        values: Tensor,
        shift: float = 0.0,
        *,
        name: str = "low rank",
        spread: Spread | None = None,
    ) -> None:
        values = finite_tensor("values", values, 1)
        offset = finite_number("shift", shift)
        eigenvalues = values.detach().cpu().double() + offset
        self._build(vectors, eigenvalues, offset, name, spread, check=True)

    @classmethod
    def from_eigenvalues(
        cls,
        vectors: Tensor,
        eigenvalues: Tensor,
        offset: float = 0.0,
        *,
        name: str = "low rank",
        spread: Spread | None = None,
    ) -> LowRankPlusShift:
        """The same, from the eigenvalues ``v + s`` themselves: nothing cancels for small ones."""
        eigenvalues = finite_tensor("eigenvalues", eigenvalues, 1)
        out = cls.__new__(cls)
        number = finite_number("offset", offset)
        own = eigenvalues.detach().cpu().double()
        out._build(vectors, own, number, name, spread, check=True)
        return out

    def _build(
        self,
        vectors: Tensor,
        eigenvalues: Tensor,
        offset: float,
        name: str,
        spread: Spread | None,
        *,
        check: bool,
    ) -> None:
        vectors = finite_tensor("vectors", vectors, 2, spread)
        n, k = vectors.shape
        n = n if spread is None else spread.size
        if k > n or eigenvalues.shape != (k,):
            raise ValueError(
                f"expected vectors [P, k] with k <= P and k values, got {[n, k]} and "
                f"{list(eigenvalues.shape)}"
            )
        if check and k:
            gram = summed((vectors.mT @ vectors).double().cpu(), spread)
            error = float((gram - torch.eye(k, dtype=torch.float64)).abs().max())
            if not error <= 10 * math.sqrt(torch.finfo(vectors.dtype).eps):
                raise ValueError(
                    f"expected orthonormal columns in vectors, but U.T @ U is off by {error:.1e}; "
                    "use torch.linalg.qr(U).Q"
                )
        every = (
            eigenvalues if k == n else torch.cat([eigenvalues, eigenvalues.new_tensor([offset])])
        )
        super().__init__(
            lambda V: self._apply(V, eigenvalues, offset),
            (n, n),
            dtype=vectors.dtype,
            device=vectors.device,
            symmetric=True,
            psd=bool((every >= 0).all()),
            name=name,
            identity=lambda: f"{self.digest([vectors])}{digest([eigenvalues])}{offset!r}",
            group=None if spread is None else spread.group,
            spread=spread,
        )
        self.vectors = vectors
        self.eigenvalues = eigenvalues
        self.offset = offset

    @property
    def values(self) -> Tensor:
        """:math:`v`, the eigenvalues minus the shift, ``[k]``, float64."""
        return self.eigenvalues - self.offset

    def _apply(self, V: Tensor, eigenvalues: Tensor, offset: float) -> Tensor:
        """``U diag(eigenvalues) U.T V + offset (I - U U.T) V``, without cancellation."""
        U = self.vectors
        coefficients = summed(U.mT @ V, self.spread)
        inside = eigenvalues[:, None].to(V) * coefficients
        if offset == 0.0 or U.shape[1] == self.shape[0]:
            return U @ inside
        if bool((eigenvalues.abs() >= abs(offset)).all()):
            return torch.addmm(offset * V, U, inside - offset * coefficients)
        rest = V - U @ coefficients
        rest = rest - U @ summed(
            U.mT @ rest, self.spread
        )  # what rounding left in the span would be magnified
        return torch.addmm(offset * rest, U, inside)

    def _same(self, eigenvalues: Tensor, offset: float, name: str) -> LowRankPlusShift:
        out = LowRankPlusShift.__new__(LowRankPlusShift)
        out._build(self.vectors, eigenvalues, offset, name, self.spread, check=False)
        return out

    def _distinct(self, damping: float) -> Tensor:
        """The damped eigenvalues ``[k]`` or, with that of the complement, ``[k + 1]``."""
        if len(self.eigenvalues) == self.shape[0]:
            return self.eigenvalues + damping
        return torch.cat([self.eigenvalues, torch.tensor([self.offset]).double()]) + damping

    def diagonal(self) -> Tensor:
        """The diagonal, ``[P]``."""
        return self.vectors.square() @ self.values.to(self.vectors) + self.offset

    def shift(self, value: float) -> LowRankPlusShift:
        """``A + value * I``, of the same kind."""
        name = super().shift(value).name
        return self._same(self.eigenvalues + float(value), self.offset + float(value), name)

    def solve(self, x: Tensor, damping: float = 0.0) -> Tensor:
        r""":math:`(A + \text{damping}\, I)^{-1} x` for ``x`` of shape ``[P]`` or ``[P, K]``.

        Raises:
            RuntimeError: If the damped operator is singular.
        """
        damping = finite_number("damping", damping)
        require_regular(self, self._distinct(damping), damping)
        values, rest = self.eigenvalues + damping, self.offset + damping
        outside = 0.0 if rest == 0.0 else 1.0 / rest  # zero only where U is a full basis
        return on_columns(self, x, lambda V: self._apply(V, 1.0 / values, outside))

    def power(self, p: float) -> LowRankPlusShift:
        """``A ** p``, of the same kind; ``p = 0`` is the identity.

        Raises:
            RuntimeError: If a power of an eigenvalue is not real, or not finite.
        """
        require_power(self, self._distinct(0.0), p)
        full = len(self.eigenvalues) == self.shape[0]
        rest = 0.0 if full else self.offset**p
        return self._same(self.eigenvalues**p, rest, f"({self.name})^{p:g}")

    def inverse(self, damping: float = 0.0) -> LowRankPlusShift:
        r""":math:`(A + \text{damping}\, I)^{-1}`, of the same kind."""
        damping = finite_number("damping", damping)
        require_regular(self, self._distinct(damping), damping)
        full = len(self.eigenvalues) == self.shape[0]
        rest = 0.0 if full else 1.0 / (self.offset + damping)
        return self._same(1.0 / (self.eigenvalues + damping), rest, f"({self.name})^-1")

    def trace(self) -> float:
        """The sum of the eigenvalues."""
        outside = self.shape[0] - len(self.eigenvalues)
        return float(self.eigenvalues.sum()) + outside * self.offset

    def logdet(self, damping: float = 0.0) -> float:
        r""":math:`\log \det (A + \text{damping}\, I)`.

        Raises:
            RuntimeError: If an eigenvalue of the damped operator is not positive.
        """
        damping = finite_number("damping", damping)
        require_positive(self, self._distinct(damping), damping)
        outside = self.shape[0] - len(self.eigenvalues)
        rest = math.log(self.offset + damping) if outside else 0.0
        return float((self.eigenvalues + damping).log().sum()) + outside * rest


def on_columns(op: LinearOperator, x: Any, function: Matmat) -> Tensor:
    """Applies a function of columns ``[P, K]`` to a vector or columns, checked as a product's."""
    if isinstance(x, Tensor) and x.ndim == 1:
        return on_columns(op, x[:, None], function)[:, 0]
    return op._multiply(x, function, op.shape)


def damped_solve(op: Any, columns: Tensor, damping: float) -> Tensor:
    """``op.solve`` with absolute damping, also where an operator's own is relative by default."""
    settings = {"relative": False} if getattr(op, "relative_damping", False) else {}
    out: Tensor = op.solve(columns, damping=damping, **settings)
    return out
