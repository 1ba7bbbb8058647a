"""Derivatives for many columns at once: batched where PyTorch can, one by one where not."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from curvlib.core.ranks.group import Group
from curvlib.core.ranks.watch import failed_alike
from curvlib.core.space import ParamSpace

#: Columns that are done at once at most: more saves no work, and memory stays bounded.
MAX_COLUMNS = 16
#: Bytes of a block of vectors that are done at once, by the kind of device. Batched derivatives
#: save dispatch, which small networks are bound by; for larger ones they are slower on a CPU (2.7
#: against 3.2 gradients for each column of a Hessian product of a transformer of 0.8M parameters).
MAX_BYTES = {"cpu": 2**18, "cuda": 2**26}


def pieces(count: int, room: int, space: ParamSpace | None = None) -> list[slice]:
    """Slices of ``range(count)``: the columns that are done at once.

    Args:
        count: ``K``, the number of columns.
        room: How many columns fit the memory budget.
        space: Where the columns that are made live: few enough of them that they stay in cache.
    """
    size = min(MAX_COLUMNS, room)
    if space is not None:
        largest = MAX_BYTES.get(space.device.type, MAX_BYTES["cuda"])
        share = space.size  # of this rank; ranks have to decide alike
        if space.spread is not None:
            share = -(-space.spread.size // space.spread.group.size)
        size = min(size, largest // (share * torch.finfo(space.dtype).bits // 8))
    parts = -(-count // max(1, size))
    ends = [round(i * count / parts) for i in range(parts + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


@contextmanager
def batched_quietly() -> Iterator[None]:
    """Keeps PyTorch's notice to itself that an operation is batched by a loop of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop because")
        yield


def derivative(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    *,
    retain_graph: bool,
    group: Group | None = None,
) -> list[Tensor | None]:
    """Vector-Jacobian products for ``K`` cotangents.

    Args:
        outputs: Tensors with a graph.
        inputs: What they are differentiated by.
        cotangents: One tensor ``[K, *output.shape]`` for each output.
        retain_graph: Whether the graph is used again afterwards.
        group: The ranks that derive together, where parameters are sharded.

    Returns:
        For each input ``[K, *input.shape]``, or ``None`` where no output depends on it.
    """
    count = cotangents[0].shape[0]
    if count > 1:
        try:
            with batched_quietly():
                return list(
                    torch.autograd.grad(
                        outputs,
                        inputs,
                        cotangents,
                        retain_graph=True,
                        allow_unused=True,
                        is_grads_batched=True,
                    )
                )
        except RuntimeError as error:  # no batching rule (GroupNorm): columns go one by one
            if not failed_alike(group, error):
                raise
    rows: list[Sequence[Tensor | None]] = [
        torch.autograd.grad(
            outputs,
            inputs,
            [c[k] for c in cotangents],
            retain_graph=retain_graph or k + 1 < count,
            allow_unused=True,
        )
        for k in range(count)
    ]
    if count == 1:  # spares a copy
        return [None if part is None else part.unsqueeze(0) for part in rows[0]]
    return [
        None if parts[0] is None else torch.stack([p for p in parts if p is not None])
        for parts in zip(*rows, strict=True)
    ]
