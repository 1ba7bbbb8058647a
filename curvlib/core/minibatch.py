r"""Random mini-batches of a risk's data, as risks of their own.

A mini-batch of :math:`B` of the :math:`N` examples is drawn without replacement, as training
loops draw them. Draws are independent of each other, or *disjoint* (no example in two of them).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from curvlib.core.batch import Batch
from curvlib.core.data import is_mapping, mapped
from curvlib.core.examples import chosen_examples
from curvlib.core.random import generator_of
from curvlib.core.ranks.group import together
from curvlib.core.risk import Risk


def example_count(risk: Risk) -> int:
    """``N``, the number of examples; a pass over data that is not held in memory.

    Example:
        >>> x, y = torch.zeros(5, 2), torch.zeros(5, 1)
        >>> example_count(Risk(torch.nn.Linear(2, 1), torch.nn.MSELoss(), (x, y)))
        5
    """
    return sum(example_counts(risk))


def example_counts(risk: Risk) -> list[int]:
    """The number of examples of each rank's shard; one number where there is one process."""
    count = 0
    with together(risk.group, "counting its examples"):
        if risk.in_memory is not None:
            count = sum(Batch(risk, i, data).examples for i, data in enumerate(risk.in_memory))
        if not count:
            count = sum(batch.examples for batch in risk.batches(shard=True))
    if risk.group is None:
        return [count]
    return [int(n) for (n,) in risk.group.numbers([count])]


def example_start(risk: Risk) -> int:
    """The number, among all ranks' examples, of the first one of this rank's shard."""
    return 0 if risk.group is None else sum(example_counts(risk)[: risk.group.rank])


def require_batch_size(batch_size: Any, count: int) -> int:
    """A batch size from 1 to ``count``.

    Raises:
        TypeError: If it is no int.
        ValueError: If it is below 1 or above the number of examples.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise TypeError(f"a batch size is an int, got {type(batch_size).__name__}")
    if not 1 <= batch_size <= count:
        raise ValueError(
            f"expected a batch size from 1 to {count} (the number of examples), got {batch_size}"
        )
    return batch_size


def minibatches(
    risk: Risk,
    batch_size: int,
    draws: int,
    *,
    disjoint: bool = False,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> list[Risk]:
    """Random mini-batches of a risk's data, each as a risk of the same model, loss and parameters.

    One pass over the data. Examples lie along the first axis of every tensor of a batch. In a
    process group the examples of all ranks are drawn from, and each keeps those of its shard.

    Args:
        risk: The risk of all examples, a mean (``reduction="mean"``).
        batch_size: Examples in each mini-batch, drawn without replacement, 1 to ``N``.
        draws: How many mini-batches.
        disjoint: Whether no example may be in two of them.
        generator: Where the choice comes from, or
        seed: its seed. With neither, the seed is 0.

    Returns:
        The risks. The examples of each are one batch in memory, in the order of the data, or a
        few where the data's batches cannot be joined (sequences of different lengths).

    Raises:
        TypeError: If a number is no int.
        ValueError: If the batch size does not fit the data, there are too few examples for
            disjoint draws, a batch cannot be split into examples, or the risk is a sum.

    Example:
        >>> x, y = torch.arange(6.0).view(6, 1), torch.zeros(6, 1)
        >>> risk = Risk(torch.nn.Linear(1, 1), torch.nn.MSELoss(), (x, y))
        >>> parts = minibatches(risk, 2, 3, disjoint=True)
        >>> sorted(torch.cat([part.data[0][0] for part in parts])[:, 0].tolist())
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """
    if risk.loss.reduction == "sum":
        raise ValueError(
            "mini-batches of a loss with reduction='sum' are not on the scale of the whole sum; "
            "use reduction='mean'"
        )
    count = example_count(risk)
    require_batch_size(batch_size, count)
    if isinstance(draws, bool) or not isinstance(draws, int):
        raise TypeError(f"expected an int for draws, got {type(draws).__name__}")
    if draws < 1:
        raise ValueError(f"expected draws >= 1, got {draws}")
    if disjoint and draws * batch_size > count:
        raise ValueError(
            f"{draws} disjoint mini-batches of {batch_size} need {draws * batch_size} examples, "
            f"but there are {count}; use fewer or smaller ones"
        )
    random = generator_of(generator, seed)
    if disjoint:
        order = torch.randperm(count, generator=random)[: draws * batch_size]
        chosen = list(order.view(draws, batch_size).sort(1).values)
    else:
        chosen = [
            torch.randperm(count, generator=random)[:batch_size].sort().values for _ in range(draws)
        ]
    parts: list[list[Any]] = [[] for _ in chosen]
    start = example_start(risk)
    with together(risk.group, "drawing mini-batches"):
        for batch in risk.batches(shard=True):
            stop = start + batch.examples
            for indices, found in zip(chosen, parts, strict=True):
                inside = indices[(indices >= start) & (indices < stop)] - start
                if inside.numel():
                    found.append(chosen_examples(batch, inside).data)
            start = stop
    return [risk.on(_joined(found) if found else []) for found in parts]


def _joined(parts: Sequence[Any]) -> list[Any]:
    """The parts as one batch where their tensors fit together, else as they are."""
    if len(parts) == 1 or any(_shapes(part) != _shapes(parts[0]) for part in parts):
        return list(parts)
    return [_cat(parts)]


def _cat(parts: Sequence[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if is_mapping(first):
        return {name: _cat([part[name] for part in parts]) for name in tuple(first.keys())}
    return tuple(_cat([part[i] for part in parts]) for i in range(len(first)))


def _shapes(item: Any) -> Any:
    return mapped(item, lambda tensor: (tuple(tensor.shape[1:]), tensor.dtype))
