"""One search from several: processes that each scan their own part of the training data.

The parts have the same queries and curvature and disjoint examples (``chosen=`` of
:meth:`curvlib.influence.Influence.top`), each is run wherever there is a processor, saved and
loaded; together they are the search of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from curvlib.influence.result import TopInfluence
from curvlib.influence.scan import SAMPLE, ranked

_SAME = ("layers", "unit", "sign", "curvature", "damping", "relative", "rescored")


def merged_searches(parts: Sequence[TopInfluence]) -> TopInfluence:
    """The strongest proponents and opponents over searches of disjoint examples.

    Args:
        parts: Searches with the same queries, curvature and settings.

    Returns:
        What one search of all examples returns (means and deviations up to rounding).

    Raises:
        TypeError: If something else is given.
        ValueError: If there is none, they differ in what they are, or have examples in common.

    Example:
        >>> import torch
        >>> from curvlib.influence import Influence
        >>> x = torch.arange(1.0, 7.0).double()[:, None]
        >>> model = torch.nn.Linear(1, 1).double()
        >>> data = [(x[:3], -x[:3]), (x[3:], -x[3:])]
        >>> inf = Influence(model, torch.nn.MSELoss(), data, "identity", progress=False)
        >>> query = (x[:1], -x[:1])
        >>> halves = [inf.top(query, 2, chosen=range(3)), inf.top(query, 2, chosen=range(3, 6))]
        >>> bool((merged_searches(halves).indices == inf.top(query, 2).indices).all())
        True
    """
    parts = list(parts)
    if not parts:
        raise ValueError("there is no search to merge; pass results of Influence.top")
    for part in parts:
        if not isinstance(part, TopInfluence):
            raise TypeError(f"expected results of Influence.top, got {type(part).__name__}")
    first = parts[0]
    for part in parts[1:]:
        for name in _SAME:
            if getattr(part, name) != getattr(first, name):
                raise ValueError(
                    f"the searches differ in {name}: {getattr(first, name)!r} and "
                    f"{getattr(part, name)!r}; merge searches of one call with other chosen="
                )
        if part.settings != first.settings or len(part.scores) != len(first.scores):
            raise ValueError(
                f"the searches differ in queries or settings: {len(first.scores)} queries with "
                f"{first.settings}, and {len(part.scores)} with {part.settings}"
            )
    high = _side(parts, first.settings["k"], "", descending=True)
    low = _side(parts, first.settings["bottom"], "bottom_", descending=False)
    counts = torch.tensor([part.examples for part in parts], dtype=torch.float64)
    share = counts / counts.sum()
    means = torch.stack([part.mean for part in parts])
    squares = torch.stack([part.std.square() + part.mean.square() for part in parts])
    mean = (share[:, None] * means).sum(0)
    variance = (share[:, None] * squares).sum(0) - mean.square()
    keys = torch.cat([part.sample_keys for part in parts])
    chosen = keys.sort(stable=True).indices[:SAMPLE]
    return replace(
        first,
        **high,
        **low,
        mean=mean,
        std=variance.clamp_(min=0.0).sqrt_(),
        sample=torch.cat([part.sample for part in parts], 1)[:, chosen],
        sample_keys=keys[chosen],
        examples=int(counts.sum()),
    )


def _side(
    parts: Sequence[TopInfluence], k: int, prefix: str, *, descending: bool
) -> dict[str, Any]:
    indices = torch.cat([getattr(part, f"{prefix}indices") for part in parts], 1)
    for row in indices.tolist():
        if len(set(row)) < len(row):
            twice = next(i for i in row if row.count(i) > 1)
            raise ValueError(
                f"the searches have example {twice} in common; choose disjoint examples"
            )
    scores = torch.cat([getattr(part, f"{prefix}scores") for part in parts], 1)
    by_number = indices.argsort(dim=1)  # ties go to the smaller number
    order = by_number.gather(
        1, ranked(scores.gather(1, by_number), k, descending=descending).indices
    )
    out: dict[str, Tensor | None] = {
        "indices": indices.gather(1, order),
        "scores": scores.gather(1, order),
    }
    for name in ("per_layer", "per_token", "token_counts"):
        held = [getattr(part, f"{prefix}{name}") for part in parts]
        if any(part is None for part in held):
            out[name] = None
            continue
        every = torch.cat([_widened(part, held) for part in held], 1)
        out[name] = every[torch.arange(len(order))[:, None], order]
    return {f"{prefix}{name}": value for name, value in out.items()}


def _widened(part: Tensor, held: Sequence[Tensor]) -> Tensor:
    """With as many tokens as the longest has."""
    if part.ndim < 3:
        return part
    wide = max(other.shape[2] for other in held)
    return torch.nn.functional.pad(part, (0, wide - part.shape[2]))
