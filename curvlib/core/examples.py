"""Examples of a batch: some of them, one of them, and whether they are independent.

Per-example derivatives, gradient rows and mini-batches all take batches apart along the first axis
of every tensor. This is where that is done.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvlib.core.batch import Batch
from curvlib.core.data import describe, mapped
from curvlib.core.risk import Risk


def chosen_examples(batch: Batch, where: slice | Tensor) -> Batch:
    """The batch of some examples of a batch.

    Args:
        batch: A batch whose tensors all have examples along their first axis.
        where: Which: a slice, or indices ``[n]``, int64, on any device.

    Raises:
        ValueError: If the batch holds anything else than such tensors.
    """

    def cut(item: Tensor) -> Tensor:
        if item.ndim == 0 or item.shape[0] != batch.examples:
            raise ValueError(
                f"batch {batch.index} cannot be split into its {batch.examples} examples: "
                f"it holds a tensor of shape {list(item.shape)}; give per-example data along "
                "the first axis of every tensor, or batches of one example"
            )
        return item[where if isinstance(where, slice) else where.to(item.device)]

    def refuse(item: Any) -> Any:
        raise ValueError(
            f"batch {batch.index} cannot be split into examples: it holds {describe(item)}; "
            "give batches of tensors, or of one example"
        )

    return Batch(batch.risk, batch.index, mapped(batch.data, cut, refuse))


def batch_of_one(example: Any) -> Any:
    """What ``vmap`` gives for one example, as data of a batch: a first axis of length one."""
    return mapped(example, lambda item: item.unsqueeze(0))


def require_independent(total: Tensor, expected: Tensor, risk: Risk) -> None:
    """Raises ValueError unless the sum of examples' gradients is that of their batch.

    A batch gradient that is not finite passes: what reads it next names where it came from.
    """
    if not bool(torch.isfinite(expected).all()):
        return
    total, expected = total.double(), expected.double()
    gap = float(torch.linalg.vector_norm(total - expected))
    scale = float(torch.linalg.vector_norm(expected)) + float(torch.linalg.vector_norm(total))
    precision = max(torch.finfo(d).eps for d in risk.space.dtypes)
    if not gap <= 100.0 * precision**0.5 * scale:
        raise ValueError(
            "per-example gradients do not add up to the gradient of the batch "
            f"(relative difference {gap / scale:.2g}): examples depend on each other, or the loss "
            "is not the sum or mean that it seems; put BatchNorm into eval mode, switch off "
            "dropout (model.eval()), or see risk.check()"
        )
