"""Layers and tokens of the few scores that are kept: a second look at their examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlib.core.risk import Risk
from curvlib.influence.directions import Directions
from curvlib.operators.scores.example_scores import BatchScores, example_scores


@dataclass(frozen=True, eq=False)
class Details:
    """Parts of kept scores.

    Attributes:
        scores: ``[Q, m]``.
        layers: ``[Q, m, B]``.
        tokens: ``[Q, m, T]``, zero beyond an example's tokens; ``T = 0`` without.
        counts: Tokens of each example, ``[Q, m]``.
    """

    scores: Tensor
    layers: Tensor
    tokens: Tensor
    counts: Tensor

    def taken(self, where: Tensor) -> Details:
        """Those at places ``[Q, k]`` of each row."""
        deep = where[..., None]
        return Details(
            self.scores.gather(1, where),
            self.layers.gather(1, deep.expand(-1, -1, self.layers.shape[2])),
            self.tokens.gather(1, deep.expand(-1, -1, self.tokens.shape[2])),
            self.counts.gather(1, where),
        )


def no_details(risk: Risk, directions: Directions, indices: Tensor) -> Details:
    """Zeros for all of :func:`details`."""
    scores = torch.zeros(indices.shape, dtype=risk.space.dtype)
    return Details(
        scores,
        scores.new_zeros((*indices.shape, len(directions))),
        scores.new_zeros((*indices.shape, 0)),
        torch.zeros_like(indices),
    )


def details(
    risk: Risk,
    directions: Directions,
    indices: Tensor,
    factors: Callable[[BatchScores], Tensor],
    *,
    tokens: bool,
    norms: bool = False,
    first: int = 0,
) -> Details:
    """Scores of chosen examples for each query, by layers and tokens.

    Args:
        risk: The training data.
        directions: Of the queries.
        indices: Numbers of the examples of each query, ``[Q, m]``.
        factors: What a batch's scores are multiplied by, ``[n]``.
        tokens: Whether to score tokens.
        norms: Whether ``factors`` needs the norms of gradients.
        first: Number of the data's first example; scores of examples before it, and of those behind
            its last one, are zero.
    """
    rows, columns = indices.shape
    none = no_details(risk, directions, indices)
    scores, layers, by_tokens, counts = none.scores, none.layers, none.tokens, none.counts
    chosen = indices.unique()
    wanted = torch.zeros((len(chosen), rows), dtype=torch.bool)
    wanted[torch.searchsorted(chosen, indices).mT, torch.arange(rows)] = True
    stream = example_scores(
        risk, directions, tokens=tokens, norms=norms, chosen=chosen, wanted=wanted, first=first
    )
    for part in stream:
        own = factors(part)
        place = torch.searchsorted(part.numbers, indices).clamp_(max=len(part.numbers) - 1)
        q, m = (part.numbers[place] == indices).nonzero(as_tuple=True)
        n = place[q, m]
        scores[q, m] = (part.scores[n, q] * own[n]).cpu()
        layers[q, m] = (part.layers[n, q] * own[n, None]).cpu()
        if part.tokens is not None:
            size = part.tokens.shape[2]
            if size > by_tokens.shape[2]:
                wider = scores.new_zeros((rows, columns, size - by_tokens.shape[2]))
                by_tokens = torch.cat([by_tokens, wider], 2)
            by_tokens[q, m, :size] = (part.tokens[n, q] * own[n, None]).cpu()
            counts[q, m] = size
    return Details(scores, layers, by_tokens, counts)
