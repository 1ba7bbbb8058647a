"""The factorized systems of a window's present rows, for the dampings that are asked for."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from curvlib.core.arguments import finite_number
from curvlib.operators.windows.rows import Rows
from curvlib.operators.windows.system import System, absolute_damping, attempt, factorize

#: Factorizations that are kept: dampings that are tried on the same rows.
_KEPT = 4

#: Damping, what it is relative to, and what is added to it: see :meth:`Systems.current`.
Damping = tuple[float, bool | str, float]


class Systems:
    """Systems of a window, each made when it is first needed and kept until rows change.

    Args:
        window: The rows.
    """

    def __init__(self, window: Rows) -> None:
        self.window = window
        self._kept: dict[Damping, System] = {}
        self._whitened: tuple[System, list[Tensor]] | None = None
        self._version = -1

    def current(self, damping: float, relative: bool | str, more: float = 0.0) -> System:
        """The system with a damping, plus ``more`` (absolute), for the present rows.

        Args:
            damping: Absolute, or a fraction.
            relative: Whether it is a fraction of the mean diagonal entry, or (``"rows"``) of the
                mean of the ``c`` eigenvalues that ``c`` rows can have.
            more: Is added to it.

        Raises:
            RuntimeError: If the window is empty, or no damping helps.
            FloatingPointError: If a row is not finite.
        """
        window = self.window
        if not window.count:
            raise RuntimeError("the window is empty, so nothing is known of F; push rows first")
        if self._version != window.version:
            self._kept, self._whitened = {}, None
        key = (damping, relative, more)
        if key not in self._kept:
            if len(self._kept) >= _KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = self._factorized(damping, relative, more)
        self._version = window.version
        return self._kept[key]

    def keep_whitened(self, system: System, rows: list[Tensor] | None) -> None:
        """Keeps ``L^{-1} G`` of a system, instead of what was kept, until rows change."""
        self._whitened = None if rows is None else (system, rows)

    def whitened(self, system: System) -> list[Tensor] | None:
        """What was kept of ``L^{-1} G`` for this system."""
        kept = self._whitened
        return None if kept is None or kept[0] is not system else kept[1]

    def _factorized(self, damping: float, relative: bool | str, more: float) -> System:
        window = self.window
        sizes = (window.count,) * len(window.parts) if relative == "rows" else window.whole_parts

        def absolute(gram: Tensor) -> Tensor:
            return absolute_damping(gram, damping, sizes, relative=bool(relative)) + more

        gram = window.stored_gram().clone()
        if window.rounded:
            found = attempt(gram, absolute(gram), rounded=True)
            if found is not None:
                return found
            window.polish()
            gram = window.stored_gram().clone()
        return factorize(gram, absolute(gram))


def checked_more(damping: Any) -> float:
    """Damping that is added to an operator's own.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is negative or not finite.
    """
    number = finite_number("damping", damping)
    if number < 0.0:
        raise ValueError(f"expected damping >= 0 (it is added to the operator's), got {number}")
    return number


def checked_positive(name: str, value: Any, *, finite: bool = False) -> float:
    """A positive number, which may be infinite unless ``finite``."""
    infinite = not finite and isinstance(value, float) and value == math.inf
    number = math.inf if infinite else finite_number(name, value)
    if number <= 0.0:
        raise ValueError(f"expected a positive {name}, got {number}")
    return number
