r"""M-FAC: the inverse of a Fisher matrix that a window of gradients spans, in :math:`O(P m)`.

With the ``c`` rows ``G`` that a :class:`~curvlib.operators.windows.window.Window` holds,

.. math:: F = \lambda I + \tfrac1c G^\top G, \qquad K = \lambda c\, I + G G^\top,

Woodbury's identity and its push-through form for row ``j`` of the window are

.. math:: F^{-1} x = \frac{x - G^\top K^{-1} G x}{\lambda}, \qquad
          F^{-1} g_j = c\, G^\top K^{-1} e_j .

So a solve is one ``c x c`` system in float64 and one or two passes over the window. The recursion
of the paper (Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of
Second-Order Information", 2021) computes the Cholesky factor of ``K`` row by row; here that is
one factorization, and ``X = L^{-1} G`` gives
:math:`[F^{-1}]_{pq} = (\delta_{pq} - X_{:p}^\top X_{:q}) / \lambda`.

The small side is in float64, and so are passes over the window for ill-conditioned solves, which
makes these right and the others fast: see :mod:`curvlib.operators.windows.solve`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from curvlib.core.arguments import finite_number
from curvlib.core.digest import digest
from curvlib.core.operator import LinearOperator
from curvlib.core.space import ParamSpace
from curvlib.core.structured import on_columns
from curvlib.operators.windows import elements as window_elements
from curvlib.operators.windows import solve as window_solve
from curvlib.operators.windows.system import System, eigenvalues
from curvlib.operators.windows.systems import Systems, checked_more, checked_positive
from curvlib.operators.windows.window import Window

F64 = torch.float64

#: What picks rows or columns: integers, an integer tensor, or a boolean mask.
Selection = Sequence[int] | Tensor

#: Relative error of solves up to which float32 passes over the window are good enough.
ACCURACY = 1e-5


class MFAC(LinearOperator):
    r""":math:`F = \lambda I + \frac1c G^\top G` for the ``c`` rows of a window, and its inverse.

    With several parts, ``F`` is block-diagonal over them, and each part has its own damping where
    that is relative. The operator follows its window: rows may be pushed and removed at any time.

    Args:
        window: The rows. The operator does not copy it.
        damping: :math:`\lambda`: a fraction of the mean diagonal entry of
            :math:`\frac1c G^\top G`, or absolute.
        relative: Which of the two.
        accuracy: Relative error above which (by estimate) passes over the window are repeated in
            float64; ``math.inf`` never repeats any.
        space: The parameters that index the columns, where there are any.
        name: What it is, for legends and reports.

    Raises:
        TypeError: If ``window`` is no window, or a number is none.
        ValueError: If ``damping`` or ``accuracy`` is not positive, or ``space`` does not fit.

    Example:
        >>> import torch
        >>> window = Window(3, 2, dtype=torch.float64)
        >>> F = MFAC(window, damping=1.0, relative=False)
        >>> F.push(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
        1
        >>> F.solve(torch.ones(3, dtype=torch.float64)).tolist()
        [0.5, 1.0, 1.0]
    """

    def __init__(
        self,
        window: Window,
        *,
        damping: float = 0.01,
        relative: bool = True,
        accuracy: float = ACCURACY,
        space: ParamSpace | None = None,
        name: str = "M-FAC",
    ) -> None:
        given: Any = window
        if not isinstance(given, Window):
            raise TypeError(
                f"expected a curvlib Window, got {type(given).__name__}; curvlib.mfac(rows) "
                "makes the window and the operator from rows"
            )
        if space is not None and space.size != window.length:
            raise ValueError(
                f"space has {space.size} parameters, but rows of the window have length "
                f"{window.length}"
            )
        if space is not None and space.spread != window.spread:
            raise ValueError(
                "the space and the window are spread over processes differently; make the window "
                "with curvlib.mfac_window(risk.space, size)"
            )
        size = window.length if window.spread is None else window.spread.size
        super().__init__(
            self._matmat,
            (size, size),
            dtype=F64 if window.dtype == F64 else torch.float32,
            device=window.device,
            psd=True,
            space=space,
            name=name,
            identity=self._digest,
            spread=window.spread,
        )
        self.window = window
        self.relative = bool(relative)
        self.accuracy = checked_positive("accuracy", accuracy)
        self.damping = damping
        self._systems = Systems(window)

    # ------------------------------------------------------------------ damping
    @property
    def damping(self) -> float:
        """The damping that was asked for (a fraction if ``relative``); setting it reads no row."""
        return self._damping

    @damping.setter
    def damping(self, value: float) -> None:
        self._damping = checked_positive("damping", value, finite=True)

    def with_damping(self, damping: float, *, relative: bool = True) -> MFAC:
        """Another operator on the same window, with another damping: no row is read.

        Raises:
            TypeError: If ``damping`` is no number.
            ValueError: If it is not positive.
        """
        return MFAC(
            self.window,
            damping=damping,
            relative=relative,
            accuracy=self.accuracy,
            space=self.space,
            name=self.name,
        )

    @property
    def damping_used(self) -> tuple[float, ...]:
        """The absolute damping of each part, after what singular systems made necessary."""
        return tuple(self._system().damping.tolist())

    @property
    def escalations(self) -> tuple[int, ...]:
        """How often the damping of each part had to be multiplied by ten."""
        return self._system().escalations

    def _system(self, more: float = 0.0) -> System:
        return self._systems.current(self.damping, self.relative, more)

    def _polished(self, more: float = 0.0) -> System:
        self.window.polish()
        return self._system(more)

    # ----------------------------------------------------------------- products
    def _matmat(self, columns: Tensor) -> Tensor:
        if not self.window.count:
            return self._empty_damping() * columns.detach()
        return window_solve.product(self.window, self._system(), columns.detach())

    def solve(self, x: Tensor, damping: float = 0.0) -> Tensor:
        r""":math:`(F + \text{damping}\, I)^{-1} x` in :math:`O(P m + m^2)`.

        The factorization, :math:`O(m^3)`, is kept until the window changes.

        Args:
            x: ``[P]`` or ``[P, K]``.
            damping: Is added to the operator's own; absolute.

        Raises:
            TypeError: If ``x`` is no tensor of the operator's dtype.
            ValueError: If its shape or device does not fit, or ``damping`` is negative.
            RuntimeError: If the window is empty and the damping relative.
            FloatingPointError: If a row is not finite.
        """
        more = checked_more(damping)
        return on_columns(self, x, lambda columns: self._solve(columns.detach(), more))

    def _solve(self, x: Tensor, more: float) -> Tensor:
        if not self.window.count:
            return x / (self._empty_damping() + more)
        asked = self.damping, self.relative, more
        return window_solve.solve(self._systems, asked, x, self.accuracy)

    def solve_row(self, index: int = -1, damping: float = 0.0) -> Tensor:
        r""":math:`F^{-1} g_j = c\, G^\top K^{-1} e_j` for a row of the window, in one pass.

        Args:
            index: The row: 0 is the oldest, -1 (the default) the newest.
            damping: Is added to the operator's own; absolute.

        Returns:
            ``[P]``.

        Raises:
            IndexError: If there is no such row.
            FloatingPointError: If a row is not finite.
        """
        self.window.slot(index)  # also of an empty window, there is no such row
        asked = self.damping, self.relative, checked_more(damping)
        out = window_solve.solve_row(self._systems, asked, index, self.accuracy)
        return out.to(self.dtype)

    def quadratic_row(self, index: int = -1, damping: float = 0.0) -> float:
        """``g_j^T (F + damping I)^{-1} g_j`` for a row of the window, without any pass.

        It is below ``c``, the number of rows (in each part), which bounds the step along a row.

        Raises:
            IndexError: If there is no such row.
        """
        slot = self.window.slot(index)
        system = self._system(checked_more(damping))
        coefficients = system.coefficients_of_row(slot)
        return float((system.gram[:, slot] * coefficients[:, :, 0]).sum())

    def inverse(self, damping: float = 0.0) -> LinearOperator:
        """``(F + damping I)^{-1}`` as an operator, which follows the window too."""
        more = checked_more(damping)
        return self._like(
            lambda columns: self.solve(columns, more),
            name=f"({self.name})^-1",
            identity=lambda: f"inverse {more!r} {self.fingerprint()}",
        )

    def power(self, p: float) -> LinearOperator:
        r""":math:`F^p` as an operator: :math:`\lambda^p I + G^\top M G` with a small ``M``.

        It is that of the rows that the window holds now.

        Raises:
            RuntimeError: If the window is empty; in products, if it has changed.
        """
        p = finite_number("p", p)
        parts = self._polished().power(p)
        window, version = self.window, self.window.version

        def product(columns: Tensor) -> Tensor:
            if window.version != version:
                raise RuntimeError(
                    f"the window has changed since power({p:g}) of {self!r} was made; make it anew"
                )
            return window_solve.powered(window, parts, columns.detach())

        identity = f"{p!r} {self.fingerprint()}"
        return self._like(product, name=f"({self.name})^{p:g}", identity=identity)

    # ------------------------------------------------------------------ changing
    def push(self, rows: Tensor, *, skip_non_finite: bool = False, check: bool = True) -> int:
        """Adds a row ``[P]`` or rows ``[k, P]``: see :meth:`Window.push`."""
        return self.window.push(rows, skip_non_finite=skip_non_finite, check=check)

    def evict(self) -> None:
        """Forgets the oldest row: see :meth:`Window.evict`."""
        self.window.evict()

    def remove(self, index: int) -> None:
        """Forgets one row: see :meth:`Window.remove`."""
        self.window.remove(index)

    def resize(self, size: int) -> None:
        """Changes how many rows are kept: see :meth:`Window.resize`."""
        self.window.resize(size)

    # ------------------------------------------------------------------ elements
    def diagonal(self) -> Tensor:
        """The diagonal of ``F``, ``[P]``."""
        if not self.window.count:
            return self._constant(self._empty_damping())
        return window_elements.diagonal(self.window, self._system(), self._constant(0.0))

    def leverages(self) -> Tensor:
        r""":math:`l_q = g_q^\top K^{-1} g_q \in [0, 1)` of each coordinate, ``[P]``.

        :math:`[F^{-1}]_{qq} = (1 - l_q) / \lambda`. Their sum, the effective number of directions
        in which the rows outweigh the damping, is at most the rank. One pass in float64,
        :math:`O(P m^2)`; clamped to what holds exactly, :math:`0 \le l_q \le s_q / (\lambda + s_q)`
        with the mean square :math:`s_q` of column ``q``.
        """
        if not self.window.count:
            return self._constant(0.0)
        return window_elements.leverages(self.window, self._polished(), self._constant(0.0))

    def inverse_diagonal(self) -> Tensor:
        r"""The diagonal of :math:`F^{-1}`, ``[P]``, in one pass in float64, :math:`O(P m^2)`.

        Clamped to its exact bounds :math:`1 / (\lambda + s_q)` and :math:`1 / \lambda` with the
        mean square :math:`s_q` of column ``q``.
        """
        if not self.window.count:
            return self._constant(1.0 / self._empty_damping())
        out = self._constant(0.0)
        return window_elements.inverse_diagonal(self.window, self._polished(), out)

    def inverse_element(self, p: int, q: int) -> float:
        """``[F^{-1}]_{pq}``: reads two columns of the window, :math:`O(m^2)`.

        After :meth:`precompute` it is :math:`O(m)`.

        Raises:
            IndexError: If an index is out of range.
        """
        return float(self.inverse_submatrix([p], [q])[0, 0])

    def inverse_submatrix(self, rows: Selection, columns: Selection | None = None) -> Tensor:
        """Some rows and columns of ``F^{-1}``, ``[len(rows), len(columns)]``.

        Args:
            rows: Integers, an integer tensor, or a boolean mask ``[P]``.
            columns: The same for columns; the same selection as ``rows`` when omitted.

        Raises:
            IndexError: If an index is out of range.
            TypeError: If indices are not integers.
        """
        n = self.shape[0]
        first = window_elements.indices(rows, n, self.device)
        second = first if columns is None else window_elements.indices(columns, n, self.device)
        if not self.window.count:
            same = (first[:, None] == second).to(self.dtype)
            return same / self._empty_damping()
        system = self._polished()
        kept = self._systems.whitened(system)
        found = window_elements.inverse_submatrix(self.window, system, first, second, kept)
        return found.to(self.dtype)

    def precompute(self) -> None:
        """Computes and keeps ``L^{-1} G``, as large as the window: elements are then O(m).

        It holds for the present rows and damping; what changes them drops it.

        Raises:
            MemoryError: If there is no room for it.
        """
        system = self._polished()
        self._systems.keep_whitened(system, None)
        found = window_elements.whitened(self.window, system, self.dtype, self.accuracy)
        self._systems.keep_whitened(system, found)

    # ------------------------------------------------------------------- spectra
    def eigenvalues(self) -> Tensor:
        r"""Eigenvalues of the undamped :math:`\frac1c G^\top G`, from the Gram matrix: no pass.

        Returns:
            The ``min(c, P)`` largest of each part, all in one descending list, float64: the rest
            are zero. Negative rounding is cut off.
        """
        if not self.window.count:
            return torch.zeros(0, dtype=F64, device=self.device)
        self.window.polish()
        return eigenvalues(self.window.stored_gram(), self.window.whole_parts)

    def trace(self) -> float:
        """The trace of ``F``."""
        if not self.window.count:
            return self.shape[0] * self._empty_damping()
        return self._system().trace(self.window.whole_parts)

    def logdet(self, damping: float = 0.0) -> float:
        r""":math:`\log \det (F + \text{damping}\, I)`."""
        more = checked_more(damping)
        if not self.window.count:
            return self.shape[0] * math.log(self._empty_damping() + more)
        return self._polished(more).logdet(self.window.whole_parts)

    # ------------------------------------------------------------------- private
    def _constant(self, value: float) -> Tensor:
        return torch.full((self.length,), value, dtype=self.dtype, device=self.device)

    def _empty_damping(self) -> float:
        """The damping of a window without rows."""
        if self.relative:
            raise RuntimeError(
                "the window is empty, so there is nothing that damping could be relative to; "
                "push rows first, or pass relative=False with an absolute damping="
            )
        return self.damping

    def _digest(self) -> str:
        window = self.window
        ones = torch.ones((len(window.parts), window.count, 1), dtype=F64, device=self.device)
        sums = window.combination(ones) if window.count else ones
        state = digest([window.gram(), sums])
        return f"{state}|{window.parts}|{self.damping!r}|{self.relative}"
