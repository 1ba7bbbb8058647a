"""Arguments of searches, checked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import RandomSampler, SubsetRandomSampler, WeightedRandomSampler

_UNITS = ("inner_product", "nats")
_NORMALIZE = (None, "self", "gradient")
_RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def require_unit(unit: str, curvature: Any) -> None:
    """Raises ValueError if there is no such unit of scores with a curvature."""
    if unit not in _UNITS:
        raise ValueError(f"unit= is one of {', '.join(map(repr, _UNITS))}, got {unit!r}")
    if unit == "nats" and isinstance(curvature, str) and curvature == "identity":
        raise ValueError(
            "unit='nats' predicts what removing an example does, for which curvature is "
            "needed; use curvature='ekfac', or unit='inner_product'"
        )


def require_normalization(normalize: str | None, unit: str) -> None:
    """Raises ValueError if scores in a unit cannot be normalized so."""
    if normalize not in _NORMALIZE:
        names = ", ".join(map(repr, _NORMALIZE))
        raise ValueError(f"normalize= is one of {names}, got {normalize!r}")
    if normalize is not None and unit == "nats":
        raise ValueError("normalized scores are not in nats; use unit='inner_product'")


def require_order(data: Any) -> None:
    """Raises ValueError if a loader shuffles: scores are of examples by their numbers."""
    holders = (data, getattr(data, "batch_sampler", None))
    samplers = [getattr(holder, "sampler", None) for holder in holders]
    found = [type(sampler).__name__ for sampler in samplers if isinstance(sampler, _RANDOM)]
    if found:
        raise ValueError(
            f"the loader draws examples in random order ({found[0]}), another one at every pass, "
            "so that their numbers mean nothing; pass DataLoader(..., shuffle=False)"
        )


def require_enough(k: int, bottom: int, examples: int | None) -> None:
    """Raises ValueError if more examples are asked for than there are, where that is known."""
    if examples is not None and max(k, bottom) > examples:
        raise ValueError(
            f"{max(k, bottom)} examples were asked for, but there are only {examples} to score; "
            "pass a smaller k= (and bottom=), or more data"
        )


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
