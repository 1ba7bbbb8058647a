r"""Which batches a streaming fit takes its eigenvectors from, and how it reads the data once.

The corrected eigenvalues :math:`\Lambda = \mathbb{E} (Q_L^\top G Q_R)^{\circ 2}` are the best
diagonal in *any* orthogonal basis (George et al., 2018, proposition 3.1), so that the basis may
come from a part of the data: the factors of the first batches, the *prefix*. Their batches are
kept in memory and go through the model a second time, so that :math:`\Lambda` is that of all data,
with the trace of the whole Fisher matrix, while each batch is read once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from curvlib.core.batch import Batch
from curvlib.core.data import batch_count
from curvlib.core.risk import Risk


def prefix_batches(risk: Risk, prefix: float | None) -> int | None:
    """How many batches the prefix has; ``None`` for all.

    Args:
        risk: Whose data.
        prefix: A fraction of the batches (float), or their number (int).

    Raises:
        TypeError: If it is no number.
        ValueError: If it is not positive, a fraction above 1, or one of an unknown number.

    Example:
        >>> import torch
        >>> batches = [(torch.ones(2, 1), torch.ones(2, 1))] * 8
        >>> risk = Risk(torch.nn.Linear(1, 1), torch.nn.MSELoss(), batches)
        >>> prefix_batches(risk, 0.3), prefix_batches(risk, 2), prefix_batches(risk, 1.0)
        (3, 2, None)
    """
    if prefix is None:
        return None
    value: Any = prefix
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        kind = type(value).__name__
        raise TypeError(f"prefix= is a number of batches or a fraction, got {kind}")
    total = batch_count(risk.data if risk.in_memory is None else risk.in_memory)
    if risk.group is not None:  # batches of all ranks, in their order
        own = sum(1 for _ in risk.stream.own()) if total is None else total
        total = sum(int(n) for (n,) in risk.group.numbers([float(own)]))
    if isinstance(value, float):
        if not 0.0 < value <= 1.0:
            raise ValueError(
                f"a fraction prefix= is above 0 and at most 1, got {value}; a number of batches "
                "is an int"
            )
        if total is None:
            raise ValueError(
                f"prefix={value} is a fraction of the batches, but the data does not say how many "
                "there are; pass a number of batches, an int"
            )
        value = math.ceil(value * total)
    elif value < 1:
        raise ValueError(f"prefix= is at least 1 batch, got {value}")
    return None if total is not None and value >= total else value


def replayed(held: list[Batch], others: Iterator[Batch]) -> Iterator[Batch]:
    """Batches that are held, which are let go, and then others."""
    while held:
        yield held.pop(0)
    yield from others
