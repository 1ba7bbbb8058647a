r"""Phases of a fit of Kronecker factors before it runs: see :mod:`curvlib.core.plan`.

From the shapes of layers alone, with ``T`` rows of an example in a layer of ``O`` outputs and ``I``
inputs (a bias's column included), ``N`` training examples, and ``c`` backward
passes of an example for the Fisher matrix:

=============  =====================================  ==========================  =================
phase          multiplications and additions of a     keeps                       data-parallel
               layer                                                              ranks sum
=============  =====================================  ==========================  =================
factors        :math:`N T (2 (1 + c) O I + 2 c O^2    nothing                     :math:`O^2 + I^2`
               + 2 I^2)`
eigenvectors   :math:`9 (O^3 + I^3)`, float64         :math:`O^2 + I^2`           nothing
eigenvalues    :math:`N (2 (1 + c) T O I)`, and the   :math:`O I`                 :math:`O I`
               route of
               :mod:`curvlib.operators.factors.squares`
=============  =====================================  ==========================  =================

Passes count :math:`2 T O I` forward and as much backward, since no gradients of weights are
formed. Passes are shared by the ranks. Data-parallel ranks each factorize all layers, and so have
the same bits. Sharded ones decompose and keep their part, and have one layer whole at a time; they
gather parameters :math:`1 + c` times for a batch, and for each batch sum factors and gather bases
as :mod:`curvlib.operators.factors.in_step` says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from curvlib.core.plan import Phase, Ranks
from curvlib.core.risk import Risk
from curvlib.operators.factors.squares import route
from curvlib.operators.factors.sums import HELD, TILE
from curvlib.operators.fisher_diagonal import affordable_fisher
from curvlib.operators.layers.shapes import LayerShape, layer_shapes
from curvlib.operators.scores.known_examples import known_examples

#: What can be fitted without forming a matrix.
CURVATURES = ("ekfac", "kfac", "diagonal", "identity")


def fit_phases(
    layers: Sequence[LayerShape],
    ranks: Ranks,
    *,
    examples: int,
    batch_size: int,
    curvature: str = "ekfac",
    backward_passes: int = 1,
    itemsize: int = 4,
) -> Iterator[Phase]:
    """A fit of all layers: see :func:`curvlib.kfac`.

    Args:
        layers: Shapes: :func:`curvlib.operators.layers.shapes.layer_shapes` reads them.
        ranks: Who shares it.
        examples: ``N``.
        batch_size: Examples of a batch.
        curvature: ``"ekfac"``, ``"kfac"``, ``"diagonal"`` or ``"identity"``.
        backward_passes: ``c``: entries of an example's output for an exact type-2 Fisher, samples
            for Monte-Carlo.
        itemsize: Bytes of a number: 4 or 8.

    Raises:
        ValueError: If the curvature is unknown.

    Example:
        >>> layer = LayerShape("linear", 1, outputs=64, inputs=65, rows=16)
        >>> [p.name for p in fit_phases([layer], Ranks(), examples=100, batch_size=10)]
        ['factors', 'eigenvectors', 'eigenvalues']
    """
    if curvature not in CURVATURES:
        names = ", ".join(map(repr, CURVATURES))
        raise ValueError(f"curvature= is one of {names}, got {curvature!r}")
    if curvature == "identity":
        return
    N, c, item = examples, backward_passes, itemsize
    share, batch = ranks.share(N), min(batch_size, ranks.most(N))
    here = -(-ranks.most(N) // batch)  # batches of a rank
    rows = float(max((batch * rows_bytes(s, item) for s in layers), default=0))
    activations = float(sum(batch * rows_bytes(s, item) for s in layers))
    passes = N * sum((1.0 + c) * one_pass(s) for s in layers)
    values = float(sum(s.size for s in layers) * item)
    gathered = here * ranks.gather((1 + c) * values) if ranks.sharded else 0.0
    if curvature == "diagonal":
        squares = sum(N * c * 2.0 * s.rows * s.size for s in layers)
        work = share * (passes + squares)
        yield Phase(
            "diagonal", work, ranks.held(values), activations + rows, gathered + _sum(values, ranks)
        )
        return
    own = [s for s in layers if s.covered]
    moments = sum(
        2.0 * N * s.rows * s.groups * (c * left * _half(s.outputs) + right * _half(s.inputs))
        for s in own
        for left, right in [_entries(s)]
    )
    factors = float(sum(s.groups * sum(_entries(s)) for s in own) * item)
    layer = max((s.groups * sum(_entries(s)) + s.size for s in own), default=0) * item
    whole = 2.0 * layer if ranks.sharded else 0.0  # with the buffer that is sent
    rounds, held = _rounds(own, batch, c, item) if ranks.sharded else (1, 0.0)
    lefts = float(sum(s.groups * _entries(s)[0] for s in own) * item)
    of_factors = here * ranks.gather(factors + (rounds - 1) * lefts)
    yield Phase(
        "factors",
        share * (passes + moments),
        working=ranks.held(factors) + activations + held + whole,
        traffic=gathered + (of_factors if ranks.sharded else ranks.all_reduce(factors)),
    )
    widest = max((max(dense_sides(s), default=0) for s in own), default=0)
    cubes = sum(9.0 * s.groups * side**3 for s in own for side in dense_sides(s))
    bases = float(sum(s.groups * side**2 for s in own for side in dense_sides(s)) * item)
    yield Phase(
        "eigenvectors",
        cubes / ranks.count if ranks.sharded else cubes,
        kept=ranks.held(bases),
        working=3.0 * 8.0 * widest**2,
        traffic=ranks.gather((1.0 + 8.0 / item) * bases) / ranks.count if ranks.sharded else 0.0,
    )
    if curvature == "kfac":  # products of the eigenvalues of the factors
        yield Phase("eigenvalues", 0.0, kept=ranks.held(values))
        return
    again = passes + sum(N * _squares(s, c) for s in own)
    of_values = here * rounds * ranks.gather(bases + values)
    yield Phase(
        "eigenvalues",
        share * again,
        ranks.held(values),
        activations + rows + held + whole,
        gathered + (of_values if ranks.sharded else ranks.all_reduce(values)),
    )


def fit_settings(
    risk: Risk, *, fisher: str | None = None, samples: int = 1, examples: int | None = None
) -> dict[str, Any]:
    """What :func:`fit_phases` takes, by name; shapes come from a forward pass of the first batch.

    Args:
        risk: Model, loss, data and parameters.
        fisher: ``"type2"``, ``"mc"`` or ``"empirical"``; as influence chooses when omitted.
        samples: Sampled targets, for ``"mc"``.
        examples: ``N``, where the data does not say.

    Raises:
        ValueError: If the number of examples is not known, or the Fisher matrix is unknown.
    """
    count = known_examples(risk) if examples is None else examples
    if count is None:
        raise ValueError("the data does not say how many examples it has; pass examples=")
    shapes = layer_shapes(risk)
    kind = affordable_fisher(risk) if fisher is None else fisher
    passes = {"type2": max(1, shapes.outputs), "mc": samples, "empirical": 1}
    if kind not in passes:
        raise ValueError(f"fisher= is one of {', '.join(map(repr, passes))}, got {kind!r}")
    return {
        "layers": shapes.layers,
        "examples": count,
        "batch_size": shapes.batch_size,
        "backward_passes": passes[kind],
        "itemsize": risk.space.dtype.itemsize,
    }


def one_pass(s: LayerShape) -> float:
    """Work of one pass of one example, forward or backward."""
    return 2.0 * s.rows * s.size


def dense_sides(s: LayerShape) -> list[int]:
    """Lengths of the sides whose factors are dense."""
    sides = ((s.outputs, s.left_dense), (s.inputs, s.right_dense))
    return [side for side, dense in sides if dense and s.covered]


def rows_bytes(s: LayerShape, item: int) -> int:
    """Bytes of an example's rows in one layer."""
    return s.groups * s.rows * (s.outputs + s.inputs) * item


def _sum(size: float, ranks: Ranks) -> float:
    """Bytes that a rank sends for a sum that all, or each its part, hold."""
    return ranks.gather(size) if ranks.sharded else ranks.all_reduce(size)


def _rounds(layers: Sequence[LayerShape], batch: int, c: int, item: int) -> tuple[int, float]:
    """In how many rounds a batch's directions are added, and bytes of gradients of one round."""
    each = float(batch * sum(s.groups * s.rows * s.outputs for s in layers) * item)
    some = max(1, min(c, math.ceil(HELD / each))) if each else 1
    return math.ceil(c / some), some * each


def _half(side: int) -> float:
    """The part of a second moment of many rows that is multiplied out."""
    tiles = math.ceil(side / TILE)
    return 1.0 if side < 2 * TILE else (tiles + 1.0) / (2.0 * tiles)


def _entries(s: LayerShape) -> tuple[int, int]:
    """Entries of the left and the right factor of one group."""
    left = s.outputs**2 if s.left_dense else s.outputs
    return left, s.inputs**2 if s.right_dense else s.inputs


def _squares(s: LayerShape, c: int) -> float:
    """Work of the corrected eigenvalues for one example, by the route that is taken."""
    O, I, T = s.outputs, s.inputs, s.rows
    left, right = (O if s.left_dense else 0), (I if s.right_dense else 0)
    way = route(T, (s.groups, O, I), (s.left_dense, s.right_dense), c)
    each = {
        "pairs": c * T * (T + 1.0) * O * I,
        "rotate": c * 2.0 * T * O * I,
        "form": c * 2.0 * O * I * (T + left + right),
    }
    rotations = 0.0 if way == "form" else 2.0 * T * (c * O * left + I * right)
    return s.groups * (rotations + each[way])
