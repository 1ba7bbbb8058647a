r"""All scores, beyond the few best: written to disk, measured filters, certified bounds.

What these have in common is one pass over the training data of which every score is used, in the
same directions and units as :meth:`curvlib.influence.influence.Influence.scores`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlib.core.digest import digest
from curvlib.core.result import Result
from curvlib.core.run import Progress
from curvlib.influence.arguments import numbers
from curvlib.influence.candidates import Candidates, uniform
from curvlib.influence.influence import Influence
from curvlib.influence.parts import whole_part
from curvlib.influence.queries import Queries, query_risk, risk_on
from curvlib.influence.recall import Recall, recall
from curvlib.influence.store import Piece, ScoreMatrix, write_scores
from curvlib.operators.scores.example_scores import example_scores
from curvlib.operators.scores.known_examples import known_examples

Measurement = Callable[[Any, Any], Tensor]


def score_matrix(
    influence: Influence,
    query: Any,
    folder: str | os.PathLike[str],
    train: Any = None,
    *,
    measurement: Measurement | None = None,
    query_reduction: str | None = None,
    normalize: str | None = None,
    rank: int | None = None,
    tolerance: float | None = None,
    chosen: Iterable[int] | Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    shard: int = 4096,
    progress: Progress = None,
) -> ScoreMatrix:
    """Writes the scores of all training examples to a folder, ``[N, Q]``, never all in memory.

    Stopped at any moment, the same call goes on and ends with the same bits; made again, it returns
    at once. The folder remembers what the scores are of (digests of parameters, data, queries and
    curvature, and the settings), and is refused for anything else.

    Args:
        influence: The influence.
        query: As of :meth:`~curvlib.influence.influence.Influence.scores`, as are ``train``,
            ``measurement``, ``query_reduction``, ``normalize``, ``rank`` and ``tolerance``.
        folder: Where; it is made if its parent exists.
        train: See ``query``.
        measurement: See ``query``.
        query_reduction: See ``query``.
        normalize: See ``query``.
        rank: See ``query``.
        tolerance: See ``query``.
        chosen: Numbers of the only examples to score: rows are theirs, in ascending order.
        dtype: torch.float32 or torch.float64.
        shard: Examples of one file, at least: what is lost at most when the scan is killed.
        progress: Whether to show a bar: see :data:`curvlib.core.run.Progress`.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If the folder holds other scores, or an argument is out of range.
        OSError: If the disk has not as much space as is needed; says how much that is.
        FloatingPointError: If scores are not finite; names the layer.

    Example:
        >>> import tempfile
        >>> x = torch.tensor([[1.0], [2.0], [-1.0]])
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> inf = Influence(model, torch.nn.MSELoss(), (x, x), "identity", progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     matrix = score_matrix(inf, (x[:2], x[:2]), folder, progress=False)
        ...     matrix.shape, matrix.complete
        ((3, 2), True)
    """
    risk = risk_on(influence.risk, train)
    asked = query_risk(influence.risk, query, measurement)
    queries, only = Queries(asked, query_reduction, rank, tolerance), numbers(chosen)
    own = influence.preconditioner
    directions = queries.directions(influence.risk, own)
    scan = influence._scan(whole_part(risk), directions, normalize, only)

    def source(place: Mapping[str, Any] | None) -> Iterator[Piece]:
        for part in scan.stream(**(place or {})):
            place = {"batch": part.batch + 1, "seen": part.stop, "alone": part.alone}
            yield Piece(scan.values(part).mT, place)

    model = risk.model
    return write_scores(
        folder,
        source,
        queries=scan.queries,
        identity={
            "model": digest([*model.parameters(), *model.buffers()]),
            "data": risk.fingerprint(),
            "queries": queries.risk.fingerprint(),
            "curvature": own.fingerprint(),
            "curvature_name": own.name,
            "unit": influence.unit,
            **queries.settings,
            "normalize": normalize,
            "chosen": None if only is None else digest([only]),
        },
        examples=known_examples(risk) if only is None else len(only),
        dtype=dtype,
        shard=shard,
        progress=progress,
    )


@dataclass(frozen=True, eq=False, repr=False)
class BoundedScores(Result):
    """Scores by compressed directions, and what they are off by at most.

    Attributes:
        scores: ``[Q, N]``.
        bounds: ``[Q, N]``: the score by uncompressed directions is within this of ``scores``, up to
            rounding.
        indices: Numbers of the examples, int64 ``[N]``.
        unit: Unit of both.
    """

    scores: Tensor
    bounds: Tensor
    indices: Tensor
    unit: str

    def certain(self, k: int) -> Tensor:
        """How many of each query's top ``k`` are among the true top ``k`` for certain, ``[Q]``.

        An example is, if its lower bound is above the upper bounds of all but ``k - 1`` others.

        Raises:
            ValueError: If ``k`` is not 1 to ``N``.
        """
        count = self.scores.shape[1]
        if not 1 <= k <= count:
            raise ValueError(f"k= is 1 to the {count} examples, got {k}")
        low, high = self.scores - self.bounds, self.scores + self.bounds
        # of one example the others: those whose upper bound reaches its lower one, itself aside
        ordered = high.sort(dim=1).values
        below = torch.searchsorted(ordered, low.contiguous())
        rivals = count - below - 1
        return (rivals < k).sum(1)


def bounded_scores(
    influence: Influence,
    query: Any,
    train: Any = None,
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    measurement: Measurement | None = None,
    query_reduction: str | None = None,
    chosen: Iterable[int] | Tensor | None = None,
) -> BoundedScores:
    """Scores by compressed directions with a certified bound on the error of each.

    Of block ``b``, the score is off by at most the norm of what the query's direction leaves out
    times the norm of the example's gradient; the bound is the sum over blocks.

    Args:
        influence: The influence.
        query: As of :meth:`~curvlib.influence.influence.Influence.scores`, as are all others.
        train: See ``query``.
        rank: See ``query``.
        tolerance: See ``query``.
        measurement: See ``query``.
        query_reduction: See ``query``.
        chosen: Numbers of the only examples to score.

    Raises:
        ValueError: As of :meth:`~curvlib.influence.influence.Influence.scores`.
    """
    risk = risk_on(influence.risk, train)
    asked = query_risk(influence.risk, query, measurement)
    queries = Queries(asked, query_reduction, rank, tolerance)
    directions = queries.directions(influence.risk, influence.preconditioner)
    scan = influence._scan(whole_part(risk), directions, None, numbers(chosen))
    parts = example_scores(risk, directions, norms=True, chosen=scan.chosen)
    scores, bounds, indices = [], [], []
    for part in parts:
        assert part.norms is not None
        columns = zip(directions.values(), part.norms.unbind(1), strict=True)
        bound = torch.stack([own.bound(norms) for own, norms in columns]).sum(0)
        scores.append((part.scores * scan.factor).mT.cpu())
        bounds.append((bound * abs(scan.factor)).mT.cpu())
        indices.append(part.numbers.cpu())
    return BoundedScores(
        torch.cat(scores, 1), torch.cat(bounds, 1), torch.cat(indices), influence.unit
    )


def measured_recall(
    influence: Influence,
    query: Any,
    candidates: Candidates,
    train: Any = None,
    *,
    k: int = 10,
    sample: int = 1000,
    shared: bool = True,
    measurement: Measurement | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> Recall:
    """How much of the true top a filter keeps: its recall on examples drawn at random.

    Args:
        influence: The influence.
        query: The queries that the candidates are for, in the same order.
        candidates: What the filter keeps.
        train: The training examples, if not those of the influence.
        k: Proponents of each query that count, among the sample.
        sample: Examples to score.
        shared: As of :func:`~curvlib.influence.recall.recall`.
        measurement: As of :meth:`~curvlib.influence.influence.Influence.scores`.
        generator: Where the sample comes from, or
        seed: its seed. With neither, the seed is 0.

    Raises:
        ValueError: If there are not as many queries as the candidates are for, or ``k`` is not 1 to
            ``sample``.
    """
    drawn = uniform(candidates.examples, sample, generator=generator, seed=seed).indices
    found = bounded_scores(influence, query, train, measurement=measurement, chosen=drawn)
    return recall(candidates, found.scores.mT, found.indices, k, shared=shared)
