"""Checks of hyper-parameters: what was expected, what came."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def number(group: Mapping[str, Any], name: str) -> float:
    """A real, finite number of a parameter group.

    Raises:
        TypeError: If it is no number (a 0-d tensor is one, a ``bool`` is not).
        ValueError: If it is NaN or infinite.
    """
    value = group[name]
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}= is a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}= is a finite number, got {value}")
    return float(value)


def nonnegative(group: Mapping[str, Any], *names: str) -> None:
    """Requires finite numbers of at least 0.

    Raises:
        TypeError: If one is no number.
        ValueError: If one is negative, NaN or infinite.
    """
    for name in names:
        if number(group, name) < 0:
            raise ValueError(f"{name}= is at least 0, got {group[name]}")


def positive(group: Mapping[str, Any], *names: str) -> None:
    """Requires finite numbers above 0.

    Raises:
        TypeError: If one is no number.
        ValueError: If one is not positive, NaN or infinite.
    """
    for name in names:
        if not number(group, name) > 0:
            raise ValueError(f"{name}= is above 0, got {group[name]}")


def fraction(group: Mapping[str, Any], *names: str) -> None:
    """Requires numbers in [0, 1), such as the decay of a moving average.

    Raises:
        TypeError: If one is no number.
        ValueError: If one is outside.
    """
    for name in names:
        if not 0 <= number(group, name) < 1:
            raise ValueError(f"{name}= is in [0, 1), got {group[name]}")


def fractions(group: Mapping[str, Any], name: str, count: int = 2) -> None:
    """Requires a tuple of numbers in [0, 1), such as ``betas``.

    Raises:
        TypeError: If it is no tuple or list, or holds no numbers.
        ValueError: If its length is another, or a number is outside.
    """
    values = group[name]
    if not isinstance(values, (tuple, list)):
        raise TypeError(f"{name}= is a tuple of {count} numbers, got {type(values).__name__}")
    if len(values) != count:
        raise ValueError(f"{name}= is a tuple of {count} numbers, got {len(values)}")
    for i, value in enumerate(values):
        fraction({f"{name}[{i}]": value}, f"{name}[{i}]")


def count(name: str, value: object) -> int:
    """A whole number of at least 1.

    Raises:
        TypeError: If it is no ``int``.
        ValueError: If it is below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}= is a whole number, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}= is at least 1, got {value}")
    return value


def flag(group: Mapping[str, Any], *names: str) -> None:
    """Requires ``True`` or ``False``.

    Raises:
        TypeError: If it is anything else.
    """
    for name in names:
        if not isinstance(group[name], bool):
            raise TypeError(f"{name}= is True or False, got {type(group[name]).__name__}")


def choice(name: str, value: object, known: tuple[str, ...]) -> str:
    """One of some strings.

    Raises:
        ValueError: If it is none of them.
    """
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}= is one of {', '.join(map(repr, known))}, got {value!r}")
    return value
