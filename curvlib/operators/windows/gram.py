"""Gram matrices of a window, in place, as rows come and go."""

from __future__ import annotations

import torch
from torch import Tensor

F64 = torch.float64


def empty(parts: int, size: int, device: torch.device) -> Tensor:
    """Of windows of ``size`` rows, ``[parts, size, size]`` in float64."""
    return torch.zeros((parts, size, size), dtype=F64, device=device)


def write(gram: Tensor, products: Tensor, slots: list[int]) -> None:
    """Writes the rows and columns of some slots, exactly symmetric.

    Args:
        gram: ``[parts, m, m]``.
        products: Of all ``count`` rows with those in the slots, ``[parts, count, len(slots)]``;
            may be changed.
        slots: Where they belong.
    """
    count = products.shape[1]
    if len(slots) == 1:  # an index tensor would have a CUDA device wait
        gram[:, slots[0], :count] = products[:, :, 0]
        gram[:, :count, slots[0]] = products[:, :, 0]
        return
    index = torch.tensor(slots, device=gram.device)
    among = products[:, index].tril()
    products[:, index] = among + among.tril(-1).mT
    gram[:, :count, index] = products
    gram[:, index, :count] = products.mT


def move(gram: Tensor, last: int, slot: int) -> None:
    """Puts the row and column ``last``, which is given up, into an earlier slot."""
    column = gram[:, last, : last + 1].clone()
    column[:, slot] = column[:, last]
    gram[:, slot, :last] = column[:, :last]
    gram[:, :last, slot] = column[:, :last]


def take(gram: Tensor, saved: Tensor, kept: list[int]) -> None:
    """Takes entries of rows ``kept`` of another window, which become the first ones."""
    count = len(kept)
    gram[:, :count, :count] = saved[:, kept][:, :, kept].to(gram.device)
