"""Arguments of searches, checked."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def opponents(k: int, bottom: int | None) -> int:
    """How many opponents, checked."""
    for name, value, least in (("k", k, 1), ("bottom", bottom, 0)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}= is an int, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"{name}= is at least {least}, got {value}")
    return k if bottom is None else bottom


def numbers(chosen: Iterable[int] | Tensor | None) -> Tensor | None:
    """Numbers of examples, ascending, without repetitions."""
    if chosen is None:
        return None
    out = torch.as_tensor(chosen if isinstance(chosen, Tensor) else list(chosen)).cpu()
    out = out if out.numel() else out.long()
    if out.ndim != 1 or out.is_floating_point() or out.dtype == torch.bool:
        raise TypeError(
            f"chosen= is the numbers of examples, integers [n], got {out.dtype} of shape "
            f"{list(out.shape)}"
        )
    if not len(out) or int(out.min()) < 0:
        raise ValueError("chosen= is the numbers of some examples, at least 0, and not empty")
    found: Tensor = out.to(torch.int64).unique()
    return found
