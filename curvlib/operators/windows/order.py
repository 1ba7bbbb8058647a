"""Which slot of a window holds which row: slots ``0 ... count - 1``, oldest row first."""

from __future__ import annotations

from collections.abc import Sequence


def slot_of(order: Sequence[int], index: int) -> int:
    """Where a row is stored; ``index`` 0 is the oldest, -1 the newest.

    Raises:
        IndexError: If there is no such row.
    """
    count = len(order)
    if not -count <= index < count:
        raise IndexError(f"there is no row {index} in a window that holds {count} rows")
    return order[index]


def with_new(order: Sequence[int], k: int, size: int) -> tuple[list[int], list[int]]:
    """Slots for new rows, free ones first, then those of the oldest, and the order with them.

    Args:
        order: Of the rows so far.
        k: How many are new, at most ``size``.
        size: How many there is room for.

    Example:
        >>> with_new([0, 1], 2, 3)
        ([2, 0], [1, 2, 0])
    """
    count = len(order)
    slots = list(range(count, min(count + k, size)))
    reused = k - len(slots)
    slots += order[:reused]
    return slots, [*order[reused:], *slots]


def without(order: Sequence[int], index: int) -> tuple[list[int], int]:
    """The order without one row, when that of the last slot has moved into its slot, and the slot.

    Raises:
        IndexError: If there is no such row.

    Example:
        >>> without([1, 2, 0], 0)
        ([1, 0], 1)
    """
    slot, last = slot_of(order, index), len(order) - 1
    return [slot if own == last else own for own in order if own != slot], slot


def places(order: Sequence[int], size: int) -> tuple[list[int], list[int]]:
    """Which places of a saved window are taken over, and the order of rows in the new places.

    Args:
        order: Places of the saved rows, oldest first; they are 0 ... count - 1.
        size: How many rows there is room for.

    Returns:
        The old place of each new one, and the new places, oldest row first. If all rows fit, new
        places are the old ones.
    """
    if len(order) <= size:
        return list(range(len(order))), list(order)
    return list(order[-size:]), list(range(size))
