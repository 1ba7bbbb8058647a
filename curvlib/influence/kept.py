"""From what a scan kept to proponents and opponents: ranked again, with layers and tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlib.influence.details import Details, details, no_details
from curvlib.influence.directions import Directions
from curvlib.influence.parts import Part, joined_details
from curvlib.influence.result import TopInfluence
from curvlib.influence.scan import Ranked, Scan, ScanState, ranked

#: Relative change of scores between two passes over the data that rounding explains.
TOLERANCE = 0.1


@dataclass(frozen=True, eq=False)
class Kept:
    """Examples of each query, best first.

    Attributes:
        indices: Their numbers, ``[Q, k]``.
        scores: Their scores.
        layers: Parts of layers, ``[Q, k, B]``, or ``None``.
        tokens: Parts of tokens, ``[Q, k, T]``, or ``None``.
        counts: Tokens of each example, ``[Q, k]``, or ``None``.
    """

    indices: Tensor
    scores: Tensor
    layers: Tensor | None
    tokens: Tensor | None
    counts: Tensor | None


def _kept(
    scan: Scan,
    part: Part,
    state: ScanState,
    parts: Iterator[Directions],
    counts: tuple[int, int],
    *,
    rescored: bool,
    layers: bool,
    tokens: bool,
) -> tuple[Kept, Kept]:
    """Proponents and opponents."""
    found = None
    if rescored or layers or tokens:
        indices = torch.cat([state.top_indices, state.bottom_indices], 1)
        found = _details(scan, part, parts, indices, tokens=tokens)
        if not rescored:
            _require_same(found, torch.cat([state.top_scores, state.bottom_scores], 1))
    width = state.top_indices.shape[1]
    sides = []
    for count, own, where, descending in (
        (counts[0], Ranked(state.top_indices, state.top_scores), slice(0, width), True),
        (counts[1], Ranked(state.bottom_indices, state.bottom_scores), slice(width, None), False),
    ):
        parts_of = None if found is None else _side(found, where)
        if rescored and parts_of is not None:
            own, parts_of = _reranked(own.indices, parts_of, count, descending=descending)
        sides.append(
            Kept(
                own.indices,
                own.scores,
                parts_of.layers if parts_of is not None and layers else None,
                parts_of.tokens if parts_of is not None and tokens else None,
                parts_of.counts if parts_of is not None and tokens else None,
            )
        )
    return sides[0], sides[1]


def _details(
    scan: Scan, part: Part, parts: Iterator[Directions], indices: Tensor, *, tokens: bool
) -> Details:
    found, start = [], 0
    for directions in parts:
        stop = start + next(iter(directions.values())).count
        found.append(_own_details(scan, part, directions, indices[start:stop], tokens=tokens))
        start = stop
    width = max(part.tokens.shape[2] for part in found)
    wide = [torch.nn.functional.pad(p.tokens, (0, width - p.tokens.shape[2])) for p in found]
    return Details(
        torch.cat([part.scores for part in found]),
        torch.cat([part.layers for part in found]),
        torch.cat(wide),
        torch.cat([part.counts for part in found]),
    )


def _own_details(
    scan: Scan, part: Part, directions: Directions, indices: Tensor, *, tokens: bool
) -> Details:
    def own() -> Details:
        return details(
            scan.risk,
            directions,
            indices,
            scan.factors,
            tokens=tokens,
            norms=scan.by_norm,
            first=part.first,
        )

    if part.group is None:
        return own()
    found = no_details(scan.risk, directions, indices)
    if part.stepped:
        with part.watched():
            found = own()
        return joined_details(part.group, found)
    with part.group.together("a second look at its examples"):
        if not part.empty:
            found = own()
    return joined_details(part.group, found)


def _require_same(found: Details, scores: Tensor) -> None:
    """Raises RuntimeError if the second look at examples found others than the scan."""
    scale = torch.linalg.vector_norm(scores) + 1e-3 * torch.linalg.vector_norm(found.layers)
    gap = torch.linalg.vector_norm(found.scores - scores) / scale.clamp(min=1e-300)
    if float(gap) > TOLERANCE:
        raise RuntimeError(
            f"the scores of kept examples changed by {float(gap):.0%} when they were looked at "
            "again: the data comes in another order, or is augmented anew, at every pass; pass "
            "data that is fixed (shuffle=False, list(loader)), or per_layer=False and "
            "per_token=False"
        )


def _side(found: Details, at: slice) -> Details:
    return Details(
        found.scores[:, at], found.layers[:, at], found.tokens[:, at], found.counts[:, at]
    )


def _reranked(
    indices: Tensor, found: Details, count: int, *, descending: bool
) -> tuple[Ranked, Details]:
    """The best by their new scores, ties by the smaller number."""
    order = indices.argsort(1)
    best = ranked(found.scores.gather(1, order), count, descending=descending)
    where = order.gather(1, best.indices)
    return Ranked(indices.gather(1, where), best.scores), found.taken(where)


def top_influence(
    scan: Scan,
    part: Part,
    state: ScanState,
    parts: Iterator[Directions],
    counts: tuple[int, int],
    *,
    rescored: bool,
    layers: bool,
    tokens: bool,
    settings: dict[str, Any],
    provenance: dict[str, Any],
) -> TopInfluence:
    """The result of a search.

    Args:
        scan: The scan.
        part: The examples of this process.
        state: The scan's last state, the same in every process.
        parts: Directions of some queries at a time, all queries together.
        counts: How many proponents and opponents.
        rescored: Whether they are ranked by these directions, not by what the scan found.
        layers: Whether to find the parts of layers.
        tokens: Whether to find those of tokens.
        settings: Settings, by name.
        provenance: Unit, sign and curvature.
    """
    high, low = _kept(
        scan, part, state, parts, counts, rescored=rescored, layers=layers, tokens=tokens
    )
    mean = state.total / state.examples
    variance = state.squares / state.examples - mean.square()
    return TopInfluence(
        indices=high.indices,
        scores=high.scores,
        per_layer=high.layers,
        per_token=high.tokens,
        token_counts=high.counts,
        bottom_indices=low.indices,
        bottom_scores=low.scores,
        bottom_per_layer=low.layers,
        bottom_per_token=low.tokens,
        bottom_token_counts=low.counts,
        layers=tuple(scan.directions),
        mean=mean,
        std=variance.clamp_(min=0.0).sqrt_(),
        sample=state.sample_scores,
        sample_keys=state.sample_keys,
        examples=state.examples,
        rescored=rescored,
        settings=settings,
        **provenance,
    )
