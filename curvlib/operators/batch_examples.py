"""The examples of a batch, also where tensors have several rows for each of them.

Language models are often trained on tokens ``[N, T]`` with logits and targets flattened to
``[N T, V]`` and ``[N T]``. The loss terms of one sequence depend on each other's parameters in one
forward pass, so the example is the sequence: the entry of the batch's first tensor.
"""

from __future__ import annotations

from torch import Tensor

from curvlib.core.batch import Batch
from curvlib.core.data import mapped, tensors
from curvlib.core.examples import chosen_examples


def example_count(batch: Batch) -> int:
    """Number of examples: of targets, or of inputs where each has several targets."""
    rows = batch.examples
    held = [tensor for tensor in tensors(batch.data) if tensor.ndim]
    leads = [tensor.shape[0] for tensor in held]
    if not leads or all(lead == rows for lead in leads):
        return rows
    first = leads[0]
    if first == 1:  # one example, if its tokens are the targets
        return 1 if held[0].shape[1:2] == (rows,) or len(set(leads)) == 1 else rows
    folded = first > 0 and all(size % first == 0 for size in [rows, *leads])
    return first if folded else rows


def one_example(batch: Batch, index: int) -> Batch:
    """The batch of one example, with all of its rows.

    Raises:
        ValueError: If a tensor of the batch has no examples along its first axis.
    """
    return some_examples(batch, slice(index, index + 1))


def some_examples(batch: Batch, where: slice | Tensor) -> Batch:
    """The batch of some examples, with all of their rows.

    Args:
        batch: The batch.
        where: Which: a slice, or indices ``[n]``, int64, on any device.

    Raises:
        ValueError: If a tensor of the batch has no examples along its first axis.
    """
    n = example_count(batch)
    if n == batch.examples:
        return chosen_examples(batch, where)

    def cut(item: Tensor) -> Tensor:
        if not item.ndim:
            return item
        chosen = where if isinstance(where, slice) else where.to(item.device)
        rows: Tensor = item.reshape(n, -1, *item.shape[1:])[chosen]
        return rows.flatten(0, 1)

    return Batch(batch.risk, batch.index, mapped(batch.data, cut))
