"""What callers give, checked."""

from __future__ import annotations

import math
from typing import Any

import torch


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


def usable_device(device: torch.device | str) -> torch.device:
    """The device, if tensors can be made there.

    Raises:
        ValueError: If they cannot, or there is no such device.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise ValueError(
            f"device={str(device)!r} cannot be used here ({error}); leave device= out for that of "
            "the parameters, or name one that torch can use"
        ) from error
    return found
