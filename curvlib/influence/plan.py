r"""What a computation of influence takes, before it starts: work and memory of each phase.

Of the fit: see :mod:`curvlib.operators.factors.plan`, whose letters these are. With ``Q`` queries:

=============  ====================================================  ==========================
phase          multiplications and additions of a layer              keeps
=============  ====================================================  ==========================
queries        :math:`6 Q T O I`, the smaller of                     :math:`Q O I`, if dense
               :math:`2 Q T (O^2 + I^2)`, :math:`2 Q O I (O + I)`,
               and, if dense, :math:`2 Q O I (O + I)` back
compression    :math:`2 Q O I (2 r + p)(2 s + 2)`, and small         :math:`Q r (O + I)`
               factorizations
scan           :math:`N 4 T O I`, and the cheapest of                scores that are kept
               :math:`2 N T Q O I`, :math:`2 N (T + Q) O I`;
               low rank: :math:`2 N T Q r (O + I)`
=============  ====================================================  ==========================

The work of what has no weights (attention, activations) is not counted, so times are lower
bounds; the bytes of factors and dense directions are exact, and compressed ones take no more, since
layers share the ranks of theirs. Processes ("ranks") share queries, and examples of the
scan; data-parallel ones all have the directions, and gather these once and their best scores at
the end. Sharded ones all go through the queries and keep a part of each direction; they gather
parameters twice for a batch of queries or examples, and bases or directions once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from curvlib.core.plan import Phase, Plan, Ranks
from curvlib.core.risk import Risk
from curvlib.influence.directions import MEMORY
from curvlib.influence.scan import SAMPLE
from curvlib.operators.factors.plan import (
    dense_sides,
    fit_phases,
    fit_settings,
    one_pass,
    rows_bytes,
)
from curvlib.operators.layers.shapes import LayerShape
from curvlib.operators.scores.directions import CHUNK, formed


def plan(
    layers: Sequence[LayerShape],
    *,
    examples: int,
    queries: int,
    batch_size: int,
    curvature: str = "ekfac",
    backward_passes: int = 1,
    fitted: bool = False,
    rank: int | None = None,
    oversampling: int = 10,
    iterations: int = 2,
    k: int = 50,
    bottom: int | None = None,
    scanned: int | None = None,
    itemsize: int = 4,
    ranks: int = 1,
    sharded: bool = False,
) -> Plan:
    """The plan of a fit and a scan, on each rank.

    Args:
        layers: Shapes: :func:`curvlib.operators.layers.shapes.layer_shapes` reads them.
        examples: ``N``.
        queries: ``Q``.
        batch_size: Training examples of a batch.
        curvature: ``"ekfac"``, ``"kfac"``, ``"diagonal"`` or ``"identity"``.
        backward_passes: ``c``: entries of an example's output for an exact type-2 Fisher, samples
            for Monte-Carlo.
        fitted: Whether the curvature is there already.
        rank: Rank of compressed directions.
        oversampling: Of the compression.
        iterations: Of the compression.
        k: Proponents that are kept.
        bottom: Opponents that are kept; ``k`` when omitted.
        scanned: Examples that a filter leaves; all when omitted.
        itemsize: Bytes of a number: 4 or 8.
        ranks: ``R``, how many processes share it.
        sharded: Whether parameters, factors and directions are divided among them.

    Raises:
        ValueError: If the curvature is unknown, or a number is not positive.

    Example:
        >>> layer = LayerShape("linear", 1, outputs=64, inputs=65, rows=16)
        >>> plan([layer], examples=10_000, queries=8, batch_size=32, k=10)
        Plan
          phase                work       keeps    works in
          factors        5.33 GFLOP         0 B      297 kB
          eigenvectors   4.83 MFLOP     33.3 kB      101 kB
          eigenvalues    6.66 GFLOP     16.6 kB      528 kB
          queries        13.9 MFLOP      133 kB      399 kB
          scan           4.66 GFLOP     42.9 kB      797 kB
          all            16.7 GFLOP        peak     1.02 MB
    """
    counts: dict[str, Any] = {
        "examples": examples,
        "queries": queries,
        "batch_size": batch_size,
        "backward_passes": backward_passes,
        "k": k,
        "itemsize": itemsize,
        "rank": 1 if rank is None else rank,
        "scanned": 1 if scanned is None else scanned,
    }
    for setting, value in counts.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{setting}= is a number of at least 1, got {value!r}")
    kept_scores = k + (k if bottom is None else bottom)
    used = examples if scanned is None else min(scanned, examples)
    world = Ranks(ranks, sharded)
    fit = fit_phases(
        layers,
        world,
        examples=examples,
        batch_size=batch_size,
        curvature=curvature,
        backward_passes=backward_passes,
        itemsize=itemsize,
    )
    found = [phase for phase in fit if not fitted]
    found += _queries(layers, world, queries, curvature, rank, oversampling, iterations, itemsize)
    kept = (found[-1].kept, kept_scores)
    found.append(_scan(layers, world, used, queries, batch_size, rank, kept, itemsize))
    settings = {name: value for name, value in counts.items() if name not in {"rank", "scanned"}}
    settings |= {"curvature": curvature, "rank": rank, "scanned": used, "fitted": fitted}
    return Plan.of(found, world, settings)


def planned(
    risk: Risk,
    queries: int,
    *,
    fisher: str | None = None,
    samples: int = 1,
    examples: int | None = None,
    **settings: Any,
) -> Plan:
    """The plan for a risk's training data: shapes come from a forward pass of its first batch.

    Args:
        risk: Model, loss, training data and parameters.
        queries: ``Q``.
        fisher: ``"type2"``, ``"mc"`` or ``"empirical"``; as influence chooses when omitted.
        samples: Sampled targets, for ``"mc"``.
        examples: ``N``, where the data does not say.
        settings: Further arguments of :func:`plan`.

    Raises:
        ValueError: If the number of examples is not known, or a number is not positive.

    Example:
        >>> import torch, curvlib as cl
        >>> x, y = torch.randn(50, 8), torch.randn(50, 2)
        >>> risk = cl.Risk(torch.nn.Linear(8, 2), torch.nn.MSELoss(), (x, y))
        >>> planned(risk, queries=3).settings["backward_passes"]
        2
    """
    read = fit_settings(risk, fisher=fisher, samples=samples, examples=examples)
    return plan(queries=queries, **{**read, **settings})


def _queries(
    layers: Sequence[LayerShape],
    ranks: Ranks,
    Q: int,
    curvature: str,
    rank: int | None,
    oversampling: int,
    iterations: int,
    item: int,
) -> list[Phase]:
    """Phases of the directions."""
    work = float(Q) * sum(3.0 * one_pass(s) for s in layers)
    factored = curvature in ("ekfac", "kfac")
    if factored:
        work += Q * sum(_rotation(s) for s in layers if s.covered)
    dense = float(Q * sum(s.size for s in layers) * item)
    held = 3.0 * max(min(dense, float(MEMORY)), dense / Q)  # gradients, solved, and as blocks
    low = [
        s
        for s in layers
        if rank is not None and rank * (s.outputs + s.inputs) < s.outputs * s.inputs
    ]
    back = [s for s in layers if s.covered and s not in low] if factored else []
    work += Q * sum(2.0 * s.size * sum(dense_sides(s)) for s in back)
    if ranks.sharded and rank is None:  # every rank goes through all of them, in a batch
        values = sum(s.size for s in layers)
        squares = sum(s.groups * side**2 for s in layers for side in dense_sides(s) if factored)
        gathered = ranks.gather(float((3 * values + squares) * item))
        largest = max(s.size + s.groups * sum(d**2 for d in dense_sides(s)) for s in layers)
        return [Phase("queries", work, ranks.held(dense), 2.0 * largest * item + CHUNK, gathered)]
    share = ranks.share(Q)
    once = ranks.gather(dense)  # of directions, wherever they were made
    if rank is None or not low:
        return [Phase("queries", share * work, ranks.held(dense), ranks.held(held), once)]
    width = rank + oversampling
    width += rank if len(low) > 1 else 0  # what a layer may get of others' ranks
    flops = 0.0
    for s in low:
        O, I = s.outputs, s.inputs
        short, long = min(O, I), max(O, I)
        if width >= short:
            own = 14.0 * long * short**2
        else:
            products = 2.0 * O * I * width * (2 * iterations + 2)
            bases = 4.0 * width**2 * ((iterations + 1) * O + iterations * I)
            own = products + bases + 14.0 * I * width**2 + 2.0 * O * width**2
        if factored:  # from the eigenbasis
            own += 2.0 * rank * sum(side**2 for side in dense_sides(s))
        flops += Q * s.groups * (own + 2.0 * O * I * rank)
    small = _directions_bytes(layers, Q, rank, item)
    sent = once if ranks.sharded else ranks.gather(small)
    return [
        Phase("queries", share * work, working=ranks.held(held)),
        Phase("compression", share * flops, ranks.held(small), 2.0 * CHUNK, sent),
    ]


def _scan(
    layers: Sequence[LayerShape],
    ranks: Ranks,
    N: int,
    Q: int,
    batch: int,
    rank: int | None,
    kept: tuple[float, int],
    item: int,
) -> Phase:
    """The scan, with directions of some bytes (on a rank) and some scores of each query."""
    batch = min(batch, ranks.most(N))
    work, most = 0.0, 0.0
    for s in layers:
        O, I, T = s.outputs, s.inputs, max(1, s.rows)
        r = None if rank is None else min(rank, O, I)
        work += N * 2.0 * one_pass(s)
        if r is not None and r * (O + I) < s.outputs * s.inputs:
            work += 2.0 * N * s.groups * T * Q * r * (O + I)
            entries = float(batch * s.groups * T * Q * 2 * r)
        elif formed(T, Q, (s.groups, O, I)):
            work += 2.0 * N * (T + Q) * s.size
            entries = float(batch * s.size)
        else:
            work += 2.0 * N * T * Q * s.size
            entries = float(batch * Q * T * min(O, I))
        most = max(most, min(entries * item, float(CHUNK)))
    activations = float(sum(batch * rows_bytes(s, item) for s in layers))
    best = float(Q * kept[1] * (8 + item))
    scores = best + Q * min(SAMPLE, N) * item + min(SAMPLE, N) * 8
    sent = ranks.gather(ranks.count * best)
    if ranks.sharded:
        each = 2.0 * sum(s.size for s in layers) * item + kept[0] * ranks.count
        sent += -(-ranks.most(N) // batch) * ranks.gather(each)
    return Phase("scan", ranks.share(N) * work, scores, activations + most, sent)


def _directions_bytes(layers: Sequence[LayerShape], Q: int, rank: int, item: int) -> int:
    """Bytes of compressed directions, with rank and residual of each query."""
    total = 0
    for s in layers:
        O, I = s.outputs, s.inputs
        low = Q * (s.groups * min(rank, O, I) * (O + I) * item + 16)
        dense = Q * s.size * item
        total += min(low, dense) if rank * (O + I) < O * I else dense
    return total


def _rotation(s: LayerShape) -> float:
    """Work of taking one gradient into the eigenbasis: its rows, where there are few, or itself."""
    left, right = s.outputs if s.left_dense else 0, s.inputs if s.right_dense else 0
    whole = 2.0 * s.size * (left + right)
    rows = 2.0 * s.groups * s.rows * (s.outputs * left + s.inputs * right)
    few = s.rows * (s.outputs + s.inputs) < s.outputs * s.inputs
    return min(rows, whole) if few else whole
