"""From sums over data to the two factors of each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvlib.operators.layers.factored import FactoredLayer


@dataclass(frozen=True)
class Share:
    """The part of one role in a factor: its sum, divided and multiplied.

    Attributes:
        key: Of the sum; without one, it is the identity.
        divisor: What the sum is divided by.
        coefficient: And multiplied by.
    """

    key: str | None
    divisor: float
    coefficient: float = 1.0


def shares(
    layer: FactoredLayer, traces: Mapping[str, float], counts: Mapping[str, float], weight: float
) -> tuple[list[Share], list[Share]] | None:
    """What the left and the right factor are sums of; ``None`` if there is nothing.

    Roles of a tied weight, whose curvatures are Kronecker products each, are joined into the one
    whose partial traces are those of their sum.

    Args:
        layer: The layer.
        traces: Of the sums over data, by key.
        counts: Rows, by role.
        weight: Of the loss terms.
    """
    pairs: list[tuple[Share, Share]] = []
    numbers: list[tuple[float, float]] = []
    for role in layer.roles:
        key = f"{layer.name}|{role}"
        count = counts[key]
        if not count > 0.0:
            continue
        if role == "matrix":
            pair = (Share(f"{key}|left", weight), Share(f"{key}|right", count))
        else:  # the gradients are on the right
            left = Share(f"{key}|left", count) if role == "embedding" else Share(None, 1.0)
            pair = (left, Share(f"{key}|right", weight))
        pairs.append(pair)
        ones = float(layer.shape[0] * layer.shape[1])
        a, b = ((ones if own.key is None else traces[own.key]) / own.divisor for own in pair)
        numbers.append((a, b))
    total = sum(a * b for a, b in numbers)
    if not total > 0.0:
        return None
    if len(pairs) == 1:
        return [pairs[0][0]], [pairs[0][1]]
    lefts = [replace(p, coefficient=b) for (p, _), (_, b) in zip(pairs, numbers, strict=True)]
    rights = [
        replace(p, coefficient=a / total) for (_, p), (a, _) in zip(pairs, numbers, strict=True)
    ]
    return lefts, rights


def factor(parts: Sequence[Share], sums: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """A factor in float64, dense or a diagonal, or rows of one, from sums over data.

    Args:
        parts: What it is a sum of.
        sums: By key.
        shape: Of the identity, where that is a part of it.
    """
    out: Tensor | None = None
    like = next(iter(sums.values()))
    for part in parts:
        if part.key is None:
            own = torch.ones(shape, dtype=torch.float64, device=like.device)
        else:
            own = sums[part.key].double() / part.divisor
        own = own if part.coefficient == 1.0 else own * part.coefficient
        out = own if out is None else out + own
    assert out is not None
    return out


def factors(
    layer: FactoredLayer, sums: Mapping[str, Tensor], counts: Mapping[str, float], weight: float
) -> tuple[Tensor, Tensor] | None:
    """Both factors in float64, dense or diagonals; ``None`` if there is nothing."""
    every = (f"{layer.name}|{role}|{side}" for role in layer.roles for side in ("left", "right"))
    keys = [key for key in every if key in sums]
    read = torch.stack([traces_of(sums[key].double()) for key in keys]).tolist()  # waits once
    found = shares(layer, dict(zip(keys, read, strict=True)), counts, weight)
    if found is None:
        return None
    left, right = (factor(parts, sums, layer.shape[:2]) for parts in found)
    return symmetric(left), symmetric(right)


def traces_of(total: Tensor) -> Tensor:
    """The trace of a factor, a scalar."""
    entries = total if total.ndim == 2 else total.diagonal(dim1=-2, dim2=-1)
    return entries.sum()


def symmetric(found: Tensor) -> Tensor:
    """A dense factor without what rounding makes unsymmetric; a diagonal as it is."""
    return found if found.ndim == 2 else 0.5 * (found + found.mT)


def miscounted(
    layer: FactoredLayer, all_calls: Mapping[str, int], all_uses: Mapping[str, Mapping[str, int]]
) -> str:
    """Why uses of the layer's parameters are not all known, or nothing."""
    calls = all_calls[layer.name]
    if calls == 0:
        return "its module was never called"
    for name in layer.names:
        uses = all_uses[name]
        if sum(uses.values()) != calls:
            return (
                f"its modules were called {calls} times, but {name!r} was used "
                f"{sum(uses.values())} times ({', '.join(sorted(uses))}), so that some uses are "
                "unknown"
            )
    return ""
