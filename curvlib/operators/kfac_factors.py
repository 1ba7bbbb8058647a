"""From sums over data to the two factors of each layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from curvlib.operators.kfac_layers import FactoredLayer


def factors(
    layer: FactoredLayer, sums: Mapping[str, Tensor], counts: Mapping[str, float], weight: float
) -> tuple[Tensor, Tensor] | None:
    """Both factors in float64, dense or diagonals; ``None`` if there is nothing.

    Roles of a tied weight, whose curvatures are Kronecker products each, are joined into the one
    whose partial traces are those of their sum.
    """
    pairs = []
    for role in layer.roles:
        key = f"{layer.name}|{role}"
        count = counts[key]
        right = sums[f"{key}|right"].double()
        left = sums.get(f"{key}|left")
        left = right.new_ones((layer.shape[0], layer.shape[1])) if left is None else left.double()
        if count > 0.0:
            if role == "matrix":
                pairs.append((left / weight, right / count))
            else:  # the gradients are on the right
                pairs.append((left / count if role == "embedding" else left, right / weight))
    read = [_traces(factor).sum() for pair in pairs for factor in pair]
    numbers = torch.stack(read).tolist() if read else []  # waits for the device once
    traces = list(zip(numbers[::2], numbers[1::2], strict=True))
    total = sum(a * b for a, b in traces)
    if not total > 0.0:
        return None
    left, right = pairs[0]
    if len(pairs) > 1:
        each = list(zip(pairs, traces, strict=True))
        left = torch.stack([own * b for (own, _), (_, b) in each]).sum(0)
        right = torch.stack([own * a for (_, own), (a, _) in each]).sum(0) / total
    return _symmetric(left), _symmetric(right)


def _traces(factor: Tensor) -> Tensor:
    return factor.sum(-1) if factor.ndim == 2 else factor.diagonal(dim1=-2, dim2=-1).sum(-1)


def _symmetric(factor: Tensor) -> Tensor:
    return factor if factor.ndim == 2 else 0.5 * (factor + factor.mT)


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
