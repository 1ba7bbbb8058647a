"""What callers give, checked."""

from __future__ import annotations

import math
from typing import Any


def finite_number(name: str, value: Any) -> float:
    """A finite number from what a caller gave for ``name``, as a float.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is not finite.
    """
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"expected a number for {name}, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number for {name}, got {value}")
    return float(value)
