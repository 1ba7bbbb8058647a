"""How many examples there are, where that can be known without a pass over the data."""

from __future__ import annotations

from typing import Any

from curvlib.core.batch import Batch
from curvlib.core.risk import Risk
from curvlib.operators.batch_examples import example_count


def known_examples(risk: Risk) -> int | None:
    """The number of examples of data in memory, or of a loader's data set; else ``None``.

    That of a loader that drops its last batch, or samples, is about right.

    Example:
        >>> import torch, curvlib as cl
        >>> data = [(torch.ones(n, 2), torch.ones(n, 1)) for n in (4, 3)]
        >>> known_examples(cl.Risk(torch.nn.Linear(2, 1), torch.nn.MSELoss(), data))
        7
    """
    if risk.in_memory is not None:
        batches = enumerate(risk.in_memory)
        return sum(example_count(Batch(risk, i, data)) for i, data in batches)
    data: Any = getattr(risk.data, "dataset", None)
    return len(data) if hasattr(data, "__len__") else None
