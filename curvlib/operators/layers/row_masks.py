"""Masks of the rows that count in layers' inputs: padded tokens do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvlib.core.data import describe

#: A function of a batch that returns which rows count, like an attention mask, as bool.
Mask = Callable[[Any], Tensor]


def row_mask(mask: Mask, data: Any) -> Tensor:
    """What a mask returns for a batch.

    Raises:
        TypeError: If that is no bool tensor.
    """
    kept = mask(data)
    if not isinstance(kept, Tensor):
        raise TypeError(f"mask= returned {describe(kept)}; it should return a bool tensor")
    if kept.dtype != torch.bool:
        raise TypeError(
            f"mask= returned a tensor of {kept.dtype}; it should return a bool tensor "
            "(attention_mask.bool())"
        )
    return kept


def mask_at(kept: Tensor, places: tuple[int, ...], name: str) -> Tensor | None:
    """The mask in the shape of the places where a layer takes rows; ``None`` if it has none.

    Raises:
        ValueError: If it does not fit them.
    """
    if kept.shape == places:
        return kept
    if len(places) == 1 and kept.numel() == places[0]:
        return kept.reshape(places)
    if len(places) == 1 and kept.shape[:1] == places:
        return None
    raise ValueError(
        f"mask= returned shape {list(kept.shape)}, but the inputs of the layer with weight "
        f"{name!r} have rows {list(places)}; return a mask of that shape, or leave the layer out "
        "with names="
    )
