"""Which layer's inputs or gradients are not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from curvlib.operators.layers.uses import Pass


def require_finite(tensors: Sequence[Tensor | None], one: Pass, what: str) -> None:
    """Raises FloatingPointError naming the first layer whose tensor is not finite.

    Args:
        tensors: One for each use of the pass.
        one: The pass.
        what: What they are, for the message.
    """
    found = [
        (use.layer, tensor.detach())
        for use, tensor in zip(one.uses, tensors, strict=True)
        if tensor is not None and tensor.numel() and tensor.is_floating_point()
    ]
    if not found:
        return
    sums = torch.stack([tensor.sum().double() for _, tensor in found]).tolist()
    for (name, tensor), total in zip(found, sums, strict=True):
        # a sum may overflow alone
        if not math.isfinite(total) and not bool(torch.isfinite(tensor).all()):
            raise FloatingPointError(
                f"the {what} of layer {name!r} are not finite at batch {one.batch.index}; look at "
                "the data and the layers before it (after it, for gradients), or use a higher "
                "precision"
            )
