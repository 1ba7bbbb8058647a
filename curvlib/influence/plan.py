r"""What a computation of influence takes, before it starts: work and memory of each phase.

From the shapes of layers alone, with ``T`` rows of an example in a layer of ``O`` outputs and ``I``
inputs (a bias's column included), ``N`` training examples, ``Q`` queries, and ``c`` backward passes
of an example for the Fisher matrix:

=============  ====================================================  ==========================
phase          multiplications and additions of a layer              keeps
=============  ====================================================  ==========================
factors        :math:`N T (2 (1 + c) O I + 2 c O^2 + 2 I^2)`;        nothing
               of wide layers nearly half of the squares
eigenvectors   :math:`9 (O^3 + I^3)`, float64                        :math:`O^2 + I^2`
eigenvalues    :math:`N (2 (1 + c) T O I)`, and the route of         :math:`O I`
               :mod:`curvlib.operators.kfac_squares`
queries        :math:`6 Q T O I`, the smaller of                     :math:`Q O I`, if dense
               :math:`2 Q T (O^2 + I^2)`, :math:`2 Q O I (O + I)`,
               and, if dense, :math:`2 Q O I (O + I)` back
compression    :math:`2 Q O I (2 r + p)(2 s + 2)`, and small         :math:`Q r (O + I)`
               factorizations
scan           :math:`N 4 T O I`, and the cheapest of                scores that are kept
               :math:`2 N T Q O I`, :math:`2 N (T + Q) O I`;
               low rank: :math:`2 N T Q r (O + I)`
=============  ====================================================  ==========================

Passes count :math:`2 T O I` forward and as much backward, since no gradients of weights are
formed. The work of what has no weights (attention, activations) is not counted, so times are lower
bounds; the bytes of factors and dense directions are exact, and compressed ones take no more, since
layers share ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from curvlib.core.result import Result
from curvlib.core.risk import Risk
from curvlib.influence.directions import MEMORY
from curvlib.influence.scan import SAMPLE
from curvlib.operators.fisher_diagonal import affordable_fisher
from curvlib.operators.kfac_squares import route
from curvlib.operators.kfac_sums import TILE
from curvlib.operators.known_examples import known_examples
from curvlib.operators.layer_shapes import LayerShape, layer_shapes
from curvlib.operators.query_directions import CHUNK, formed

_CURVATURES = ("ekfac", "kfac", "diagonal", "identity")


@dataclass(frozen=True, eq=False, repr=False)
class Plan(Result):
    """Work and memory of each phase; prints as a table.

    Attributes:
        phases: Names of the phases, in order.
        flops: Floating-point operations of each.
        kept: Bytes that each leaves in memory.
        working: Bytes that each needs besides, about.
        settings: What it was made for.
    """

    phases: tuple[str, ...]
    flops: tuple[float, ...]
    kept: tuple[float, ...]
    working: tuple[float, ...]
    settings: dict[str, Any]

    @property
    def total(self) -> float:
        """Floating-point operations of all phases."""
        return sum(self.flops)

    @property
    def peak(self) -> float:
        """Bytes that are held at once, at most, beside the model."""
        held, most = 0.0, 0.0
        for kept, working in zip(self.kept, self.working, strict=True):
            held += kept
            most = max(most, held + working)
        return most

    def seconds(self, flops_per_second: float) -> float:
        """How long it takes at a rate that the machine reaches, at least."""
        return self.total / flops_per_second

    def __repr__(self) -> str:
        rows = [("phase", "work", "keeps", "works in")]
        rows += [
            (name, _readable(flops, "FLOP"), _readable(kept, "B"), _readable(working, "B"))
            for name, flops, kept, working in zip(
                self.phases, self.flops, self.kept, self.working, strict=True
            )
        ]
        rows.append(("all", _readable(self.total, "FLOP"), "peak", _readable(self.peak, "B")))
        lines = [f"{a:<13}{b:>12}{c:>12}{d:>12}" for a, b, c, d in rows]
        return "\n".join(["Plan", *(f"  {line}" for line in lines)])


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
) -> Plan:
    """The plan of a fit and a scan.

    Args:
        layers: Shapes: :func:`curvlib.operators.layer_shapes.layer_shapes` reads them.
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

    Raises:
        ValueError: If the curvature is unknown, or a number is not positive.

    Example:
        >>> layer = LayerShape("linear", 1, outputs=64, inputs=65, rows=16)
        >>> plan([layer], examples=10_000, queries=8, batch_size=32, k=10)
        Plan
          phase                work       keeps    works in
          factors        5.33 GFLOP         0 B     33.3 kB
          eigenvectors   4.83 MFLOP     33.3 kB      101 kB
          eigenvalues    6.66 GFLOP     16.6 kB      264 kB
          queries        20.4 MFLOP      133 kB      399 kB
          scan           4.66 GFLOP     42.9 kB      797 kB
          all            16.7 GFLOP        peak     1.02 MB
    """
    if curvature not in _CURVATURES:
        names = ", ".join(map(repr, _CURVATURES))
        raise ValueError(f"curvature= is one of {names}, got {curvature!r}")
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
    found: list[tuple[str, float, float, float]] = []
    if not fitted:
        found += _fit(layers, examples, batch_size, curvature, backward_passes, itemsize)
    found += _queries(layers, queries, curvature, rank, oversampling, iterations, itemsize)
    found.append(_scan(layers, used, queries, batch_size, rank, kept_scores, itemsize))
    settings = {name: value for name, value in counts.items() if name not in {"rank", "scanned"}}
    settings |= {"curvature": curvature, "rank": rank, "scanned": used, "fitted": fitted}
    return Plan(
        phases=tuple(name for name, _, _, _ in found),
        flops=tuple(flops for _, flops, _, _ in found),
        kept=tuple(kept for _, _, kept, _ in found),
        working=tuple(working for _, _, _, working in found),
        settings=settings,
    )


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
    count = known_examples(risk) if examples is None else examples
    if count is None:
        raise ValueError("the data does not say how many examples it has; pass examples=")
    shapes = layer_shapes(risk)
    kind = affordable_fisher(risk) if fisher is None else fisher
    passes = {"type2": max(1, shapes.outputs), "mc": samples, "empirical": 1}
    if kind not in passes:
        raise ValueError(f"fisher= is one of {', '.join(map(repr, passes))}, got {kind!r}")
    own = {"batch_size": shapes.batch_size, "itemsize": risk.space.dtype.itemsize, **settings}
    return plan(shapes.layers, examples=count, queries=queries, backward_passes=passes[kind], **own)


def _fit(
    layers: Sequence[LayerShape], N: int, batch: int, curvature: str, c: int, item: int
) -> Iterator[tuple[str, float, float, float]]:
    """Phases of the fit."""
    if curvature == "identity":
        return
    rows = float(max((batch * _rows_bytes(s, item) for s in layers), default=0))
    passes = N * sum((1.0 + c) * _once(s) for s in layers)
    sizes = [s.size for s in layers]
    if curvature == "diagonal":
        squares = sum(N * c * 2.0 * s.rows * s.size for s in layers)
        yield "diagonal", passes + squares, float(sum(sizes) * item), rows
        return
    own = [s for s in layers if s.covered]
    moments = sum(
        2.0 * N * s.rows * s.groups * (c * left * _half(s.outputs) + right * _half(s.inputs))
        for s in own
        for left, right in [_entries(s)]
    )
    factors = float(sum(s.groups * sum(_entries(s)) for s in own) * item)
    yield "factors", passes + moments, 0.0, factors
    widest = max((max(_dense_sides(s), default=0) for s in own), default=0)
    cubes = sum(9.0 * s.groups * side**3 for s in own for side in _dense_sides(s))
    bases = float(sum(s.groups * side**2 for s in own for side in _dense_sides(s)) * item)
    yield "eigenvectors", cubes, bases, 3.0 * 8.0 * widest**2
    values = float(sum(sizes) * item)
    # the eigenvalues of K-FAC are products of those of its factors
    again = passes + sum(N * _squares(s, c) for s in own) if curvature == "ekfac" else 0.0
    yield "eigenvalues", again, values, rows if curvature == "ekfac" else 0.0


def _queries(
    layers: Sequence[LayerShape],
    Q: int,
    curvature: str,
    rank: int | None,
    oversampling: int,
    iterations: int,
    item: int,
) -> Iterator[tuple[str, float, float, float]]:
    """Phases of the directions."""
    work = float(Q) * sum(3.0 * _once(s) for s in layers)
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
    work += Q * sum(2.0 * s.size * sum(_dense_sides(s)) for s in back)
    if rank is None or not low:
        yield "queries", work, dense, held
        return
    yield "queries", work, 0.0, held
    width = rank + oversampling
    width += rank if len(low) > 1 else 0  # what a layer may get of others' ranks
    flops = 0.0
    for s in low:
        O, I = s.outputs, s.inputs  # noqa: E741 (the axes of outputs and inputs)
        short, long = min(O, I), max(O, I)
        if width >= short:
            own = 14.0 * long * short**2
        else:
            products = 2.0 * O * I * width * (2 * iterations + 2)
            bases = 4.0 * width**2 * ((iterations + 1) * O + iterations * I)
            own = products + bases + 14.0 * I * width**2 + 2.0 * O * width**2
        if factored:  # from the eigenbasis
            own += 2.0 * rank * sum(side**2 for side in _dense_sides(s))
        flops += Q * s.groups * (own + 2.0 * O * I * rank)
    yield "compression", flops, float(_directions_bytes(layers, Q, rank, item)), float(2 * CHUNK)


def _scan(
    layers: Sequence[LayerShape], N: int, Q: int, batch: int, rank: int | None, kept: int, item: int
) -> tuple[str, float, float, float]:
    """The scan."""
    work, most = 0.0, 0.0
    for s in layers:
        O, I, T = s.outputs, s.inputs, max(1, s.rows)  # noqa: E741
        r = None if rank is None else min(rank, O, I)
        work += N * 2.0 * _once(s)
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
    activations = float(sum(batch * _rows_bytes(s, item) for s in layers))
    scores = float(Q * (kept * (8 + item) + min(SAMPLE, N) * item) + min(SAMPLE, N) * 8)
    return "scan", work, scores, activations + most


def _half(side: int) -> float:
    """The part of a second moment of many rows that is multiplied out."""
    tiles = math.ceil(side / TILE)
    return 1.0 if side < 2 * TILE else (tiles + 1.0) / (2.0 * tiles)


def _rotation(s: LayerShape) -> float:
    """Work of taking one gradient into the eigenbasis: its rows, where there are few, or itself."""
    left, right = (side if dense else 0 for side, dense in _sides(s))
    whole = 2.0 * s.size * (left + right)
    rows = 2.0 * s.groups * s.rows * (s.outputs * left + s.inputs * right)
    few = s.rows * (s.outputs + s.inputs) < s.outputs * s.inputs
    return min(rows, whole) if few else whole


def _once(s: LayerShape) -> float:
    """Work of one pass of one example, forward or backward."""
    return 2.0 * s.rows * s.size


def _entries(s: LayerShape) -> tuple[int, int]:
    """Entries of the left and the right factor of one group."""
    left = s.outputs**2 if s.left_dense else s.outputs
    return left, s.inputs**2 if s.right_dense else s.inputs


def _sides(s: LayerShape) -> tuple[tuple[int, bool], tuple[int, bool]]:
    return (s.outputs, s.left_dense), (s.inputs, s.right_dense)


def _dense_sides(s: LayerShape) -> list[int]:
    return [side for side, dense in _sides(s) if dense and s.covered]


def _rows_bytes(s: LayerShape, item: int) -> int:
    """Bytes of an example's rows in one layer."""
    return s.groups * s.rows * (s.outputs + s.inputs) * item


def _squares(s: LayerShape, c: int) -> float:
    """Work of the corrected eigenvalues for one example, by the route that is taken."""
    O, I, T = s.outputs, s.inputs, s.rows  # noqa: E741
    left, right = (O if s.left_dense else 0), (I if s.right_dense else 0)
    way = route(T, (s.groups, O, I), (s.left_dense, s.right_dense), c)
    each = {
        "pairs": c * T * (T + 1.0) * O * I,
        "rotate": c * 2.0 * T * O * I,
        "form": c * 2.0 * O * I * (T + left + right),
    }
    rotations = 0.0 if way == "form" else 2.0 * T * (c * O * left + I * right)
    return s.groups * (rotations + each[way])


def _directions_bytes(layers: Sequence[LayerShape], Q: int, rank: int, item: int) -> int:
    """Bytes of compressed directions, with rank and residual of each query."""
    total = 0
    for s in layers:
        O, I = s.outputs, s.inputs  # noqa: E741
        low = Q * (s.groups * min(rank, O, I) * (O + I) * item + 16)
        dense = Q * s.size * item
        total += min(low, dense) if rank * (O + I) < O * I else dense
    return total


def _readable(value: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 999.5 or prefix == "P":
            break
        value /= 1000.0
    return f"{value:.3g} {prefix}{unit}"
