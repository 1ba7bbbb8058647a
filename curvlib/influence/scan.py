r"""The scan of training data: running top and bottom of each query's scores, in one pass.

``init``, ``step`` (one batch), ``step``, ... over a frozen :class:`ScanState`, which is all that
the next step depends on, for :func:`curvlib.core.run.run`. Memory is that of ``k`` scores for each
query, whatever the number of training examples.

Ties are broken by the number of the example, the smaller first, so that the result does not depend
on how data is split into batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvlib.core.data import batch_count
from curvlib.core.risk import Risk
from curvlib.core.run import Report
from curvlib.influence.directions import Directions
from curvlib.operators.scores.example_scores import BatchScores, example_scores

#: Examples whose scores are kept as a sample of all.
SAMPLE = 1024


@dataclass(frozen=True, eq=False)
class Ranked:
    """Numbers of examples and their scores, best first, ``[Q, m]``."""

    indices: Tensor
    scores: Tensor


@dataclass(frozen=True, eq=False)
class ScanState:
    """A scan between two batches.

    Attributes:
        batch: Batches that are done, those without a chosen example included.
        seen: Examples of the data up to there.
        examples: Examples that were scored.
        alone: Whether examples go through the model one by one.
        done: Whether the data is at its end.
        top_indices: Proponents so far, ``[Q, m]``.
        top_scores: Their scores.
        bottom_indices: Opponents so far.
        bottom_scores: Their scores.
        total: Sums of scores, float64 ``[Q]``.
        squares: Sums of squares of scores, float64 ``[Q]``.
        sample_keys: Of a uniform sample of examples, what it is drawn by, ``[m]``.
        sample_scores: Its scores, ``[Q, m]``.
    """

    batch: int
    seen: int
    examples: int
    alone: bool
    done: bool
    top_indices: Tensor
    top_scores: Tensor
    bottom_indices: Tensor
    bottom_scores: Tensor
    total: Tensor
    squares: Tensor
    sample_keys: Tensor
    sample_scores: Tensor


class Scan:
    """Steps of a scan.

    Args:
        risk: The training data.
        directions: Of the queries.
        k: Proponents to keep.
        bottom: Opponents to keep.
        factor: What scores are multiplied by, and
        scales: one more factor for each example, ``[N]``.
        by_norm: Whether scores are divided by the norms of examples' gradients.
        chosen: Numbers of the only examples to scan, ascending.
        first: Number of the first example.
        sample: Examples of the sample.
    """

    def __init__(
        self,
        risk: Risk,
        directions: Directions,
        *,
        k: int,
        bottom: int,
        factor: float = 1.0,
        scales: Tensor | None = None,
        by_norm: bool = False,
        chosen: Tensor | None = None,
        first: int = 0,
        sample: int = SAMPLE,
    ) -> None:
        self.risk = risk
        self.directions = directions
        self.k = k
        self.bottom = bottom
        self.factor = factor
        self.scales = scales
        self.by_norm = by_norm
        self.chosen = chosen
        self.first = first
        self.sample = sample
        self.queries = next(iter(directions.values())).count
        data = risk.in_memory if risk.in_memory is not None else risk.data
        self.total = batch_count(data)
        self._stream: Iterator[BatchScores] | None = None
        self._at = -1

    def stream(
        self, batch: int = 0, seen: int | None = None, *, alone: bool = False
    ) -> Iterator[BatchScores]:
        """What examples score, batch by batch, from the first or from where others end."""
        return example_scores(
            self.risk,
            self.directions,
            norms=self.by_norm,
            chosen=self.chosen,
            start=batch,
            first=self.first if seen is None else seen,
            alone=alone,
        )

    def init(self) -> ScanState:
        """The state before the first batch."""
        scores = self.risk.space.empty().new_zeros((self.queries, 0))
        numbers = torch.zeros((self.queries, 0), dtype=torch.int64)
        zeros = torch.zeros(self.queries, dtype=torch.float64)
        return ScanState(
            batch=0,
            seen=self.first,
            examples=0,
            alone=False,
            done=False,
            top_indices=numbers,
            top_scores=scores.cpu(),
            bottom_indices=numbers,
            bottom_scores=scores.cpu(),
            total=zeros,
            squares=zeros,
            sample_keys=torch.zeros(0, dtype=torch.int64),
            sample_scores=scores.cpu(),
        )

    def step(self, state: ScanState) -> ScanState:
        """One batch more (of those with chosen examples), or the end of the data."""
        if self._stream is None or self._at != state.batch:
            self._stream = self.stream(state.batch, state.seen, alone=state.alone)
        self._at = -1  # a step that fails begins with this batch again
        part = next(self._stream, None)
        if part is None:
            self._stream = None
            self.total = state.batch if self.chosen is None else self.total
            return replace(state, done=True)
        out = self.merged(state, part)
        self._at = out.batch
        return out

    def report(self, state: ScanState) -> Report:
        """What is done, in batches."""
        total = None if self.total is None else float(self.total)
        done = float(state.batch) if total is None or not state.done else total
        return done, total, f"{state.examples} examples"

    def factors(self, part: BatchScores) -> Tensor:
        """What scores of a batch are multiplied by, ``[n]``."""
        out = torch.full_like(part.layers[:, 0, 0], self.factor)
        if self.scales is not None:
            out = out * self.scales.to(out)[part.numbers.to(out.device)]
        if part.norms is not None:
            out = out * inverse(part.norms.square().sum(1).sqrt())
        return out

    def values(self, part: BatchScores) -> Tensor:
        """Scores of a batch in the unit that is asked for, ``[Q, n]``, on the CPU."""
        return (part.scores * self.factors(part)[:, None]).mT.cpu()

    def every(self, *, layers: bool) -> Tensor:
        """All scores ``[N, Q, 1]``; with the parts of layers behind them ``[N, Q, 1 + B]``."""
        rows = []
        for part in self.stream():
            each = [self.values(part).mT[..., None]]
            if layers:
                each.append((part.layers * self.factors(part)[:, None, None]).cpu())
            rows.append(torch.cat(each, 2))
        return torch.cat(rows) if rows else torch.zeros(0)  # this process may have no example

    def merged(self, state: ScanState, part: BatchScores) -> ScanState:
        """The state with a batch's scores added: a pure function."""
        scores = self.values(part)
        numbers = part.numbers.expand(self.queries, -1)
        top = _best(state.top_indices, state.top_scores, numbers, scores, self.k, descending=True)
        bottom = _best(
            state.bottom_indices,
            state.bottom_scores,
            numbers,
            scores,
            self.bottom,
            descending=False,
        )
        keys = torch.cat([state.sample_keys, hashed(part.numbers)])
        kept = keys.sort(stable=True).indices[: self.sample]
        exact = scores.double()
        return replace(
            state,
            batch=part.batch + 1,
            seen=part.stop,
            examples=state.examples + scores.shape[1],
            alone=part.alone,
            top_indices=top.indices,
            top_scores=top.scores,
            bottom_indices=bottom.indices,
            bottom_scores=bottom.scores,
            total=state.total + exact.sum(1),
            squares=state.squares + exact.square().sum(1),
            sample_keys=keys[kept],
            sample_scores=torch.cat([state.sample_scores, scores], 1)[:, kept],
        )


def inverse(norms: Tensor) -> Tensor:
    """Reciprocals; zero of zero, since such a gradient has no direction."""
    out: Tensor = torch.where(norms > 0.0, norms, torch.inf).reciprocal()
    return out


def ranked(scores: Tensor, k: int, *, descending: bool) -> Ranked:
    """The ``k`` largest (smallest) of each row ``[Q, N]``, ties by the smaller number.

    Example:
        >>> found = ranked(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), 3, descending=True)
        >>> found.indices.tolist(), found.scores.tolist()
        ([[1, 2, 3]], [[3.0, 3.0, 2.0]])
    """
    values, order = scores.sort(dim=1, descending=descending, stable=True)
    return Ranked(order[:, :k], values[:, :k].contiguous())


def _best(
    indices: Tensor, scores: Tensor, more: Tensor, values: Tensor, k: int, *, descending: bool
) -> Ranked:
    """The best of those so far, whose numbers are smaller, and of others."""
    found = ranked(torch.cat([scores, values], 1), k, descending=descending)
    numbers = torch.cat([indices, more], 1).gather(1, found.indices)
    return Ranked(numbers, found.scores)


def hashed(numbers: Tensor) -> Tensor:
    """Integers that look random, a function of each number: the mixer of SplitMix64."""
    z = numbers + 1
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        z = (z ^ _shifted(z, shift)) * factor
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """A logical shift to the right."""
    out: Tensor = (z >> bits) & (2 ** (64 - bits) - 1)
    return out
