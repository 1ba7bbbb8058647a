r"""Compression of directions: oversampled randomized SVD, adaptive ranks, an exact residual.

For each query and block, the dominant singular vectors of :math:`D \in \mathbb{R}^{O \times I}` are
found in the range of :math:`(D D^\top)^s D\, \Omega` with a Gaussian :math:`\Omega` of ``r + p``
columns, orthonormalized after every product (Halko, Martinsson and Tropp, "Finding structure with
randomness", 2011, algorithms 4.4 and 5.1). One :math:`\Omega` serves all queries, and depends on
the seed and the shapes alone: a query is compressed to the same directions, whatever else is in
its batch.

With ``tolerance``, the rank of each query is the smallest at which

.. math:: \|D - L R\|_F \le \tau \|D\|_F ,

within the range that was found; the range is doubled, up to all of the matrix, until it suffices.
The residual that is kept is no estimate: it is the norm of :math:`D - L R` with ``L`` and ``R`` as
they are stored, in float64.

With a :class:`Metric`, what is least is not the norm of the rest but the error of scores to expect:
for gradients with :math:`E\, g g^\top = A_L \otimes A_R`, as K-FAC takes them to be,

.. math:: E \langle D - L R,\, G \rangle^2 = \bigl\| A_L^{1/2} (D - L R) A_R^{1/2} \bigr\|_F^2 ,

so that the singular vectors are those of :math:`A_L^{1/2} D A_R^{1/2}`, and ``tolerance`` is the
relative error of scores in the root mean square. The inverse curvature in ``D`` makes directions
along which there are hardly any gradients large; without the metric most of the rank goes there.

A rank is shared by the layers (:func:`shared_ranks`): in the metric, singular values of all layers
are in the unit of scores, and the largest for their memory are kept, so that the same memory as of
one rank everywhere has the least error of the whole score. Each query shares its own.

Memory decides where compression pays: a block whose factors would take no less than the matrices
stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from curvlib.core.random import generator_of
from curvlib.influence.low_rank import CHUNK, LowRankDirections, joined
from curvlib.influence.metric import Metric
from curvlib.influence.solved import Solved
from curvlib.operators.scores.directions import BlockDirections

#: The rank that adaptive compression tries first.
_FIRST = 16
#: What residuals are rounded up by, so that they bound in float32, too.
_UP = 1.0 + 1e-6


def compressed(
    solved: Mapping[str, Solved],
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    oversampling: int = 10,
    iterations: int = 2,
    seed: int = 0,
) -> dict[str, BlockDirections]:
    """Directions in less memory, where that is possible.

    Args:
        solved: The preconditioned gradients of ``Q`` queries, in all blocks.
        rank: The mean rank over blocks, which is shared by them (see above); the largest of each,
            with ``tolerance``. Grosse et al. use 32.
        tolerance: How large the residual may be, relative to the norm of the direction: in each
            block, each query gets the smallest rank that keeps it. With neither, directions stay
            as they are.
        oversampling: Columns beyond the rank.
        iterations: Power iterations; more sharpen a flat spectrum.
        seed: Of the random matrix.

    Returns:
        Low-rank directions by block; dense ones, where they would take as much memory.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> D = Solved(torch.ones(3, 1, 50, 40, dtype=torch.float64), None)
        >>> low = compressed({"layer": D}, tolerance=1e-6)["layer"]
        >>> low.ranks.tolist(), low.bytes < D.dense().bytes / 10
        ([1, 1, 1], True)
    """
    require_compression(rank, tolerance, oversampling, iterations)
    small: dict[str, Solved] = {}
    if tolerance is not None:
        small = dict(solved)
    elif rank is not None:
        for name, own in solved.items():
            _, _, O, I = own.matrices.shape
            if rank * (O + I) < O * I:
                small[name] = own
    settings = (oversampling, iterations, seed)
    found = dict[str, LowRankDirections]()
    if tolerance is None and rank is not None and len(small) > 1:
        found = _sharing(small, rank, settings)
    else:
        for name, own in small.items():
            found[name] = low_rank(
                own.matrices,
                metric=own.metric(),
                rank=rank,
                tolerance=tolerance,
                oversampling=oversampling,
                iterations=iterations,
                seed=seed,
            )
    out: dict[str, BlockDirections] = {}
    for name, own in solved.items():
        low = found.get(name)
        dense = own.matrices.numel() * own.matrices.element_size()
        out[name] = own.dense() if low is None or low.bytes >= dense else _restored(low, own)
    return out


def _restored(low: LowRankDirections, own: Solved) -> LowRankDirections:
    """Directions in the eigenbasis of a block as those of parameters.

    Norms are the same up to rounding, by which the residual is raised.
    """
    if own.block is None:
        return low
    left, right = own.block.left, own.block.right
    norms = torch.linalg.vector_norm(own.matrices.flatten(1), dim=1).double()
    return replace(
        low,
        left=low.left if left is None else left @ low.left,
        right=low.right if right is None else low.right @ right.mT,
        residual=low.residual * _UP + torch.finfo(low.left.dtype).eps * norms,
    )


def _sharing(
    solved: Mapping[str, Solved], rank: int, settings: tuple[int, int, int]
) -> dict[str, LowRankDirections]:
    """Low-rank directions whose ranks are shared by blocks."""
    full = {name: min(own.matrices.shape[2:]) for name, own in solved.items()}
    costs = {name: sum(own.matrices.shape[2:]) for name, own in solved.items()}
    costs = {name: cost * solved[name].matrices.shape[1] for name, cost in costs.items()}
    metrics = {name: own.metric() for name, own in solved.items()}
    widths = {name: min(2 * rank, n) for name, n in full.items()}
    triples: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    while True:
        for name in solved.keys() - triples.keys():
            W = _finite(solved[name].matrices)
            metric = metrics[name]
            W = W if metric is None else metric.weighted(W)
            triples[name] = range_svd(W, widths[name], *settings)
        values = {name: S.double().square().sum(1) for name, (_, S, _) in triples.items()}
        ranks = shared_ranks(values, costs, rank)
        # all that was found is wanted of these, and perhaps there is more
        more = [n for n, r in ranks.items() if int(r.max()) == widths[n] < full[n]]
        if not more:
            break
        for name in more:
            widths[name] = min(2 * widths[name], full[name])
            del triples[name]
    return {
        name: _truncated(own.matrices, triples[name], ranks[name], metrics[name])
        for name, own in solved.items()
    }


def shared_ranks(
    values: Mapping[str, Tensor], costs: Mapping[str, int], rank: int
) -> dict[str, Tensor]:
    """How many singular values each query keeps of each block.

    Args:
        values: Squares of singular values in the metric, descending, ``[Q, k]`` by block.
        costs: Numbers that one of them takes, by block.
        rank: The memory is that of this many of each block.

    Returns:
        Ranks ``[Q]``, int64 on the CPU, by block.

    Example:
        >>> values = {"a": torch.tensor([[9.0, 4.0, 3.0]]), "b": torch.tensor([[2.0, 1.0, 0.0]])}
        >>> {n: r.tolist() for n, r in shared_ranks(values, {"a": 1, "b": 1}, 2).items()}
        {'a': [3], 'b': [1]}
    """
    names = list(values)
    each = torch.cat([values[n].cpu() / costs[n] for n in names], 1)
    lengths = torch.tensor([values[n].shape[1] for n in names])
    owners = torch.arange(len(names)).repeat_interleave(lengths)
    price = torch.tensor([costs[n] for n in names])[owners]
    order = each.argsort(dim=1, descending=True, stable=True)
    spent = price[order].cumsum(1) <= rank * sum(costs.values())
    kept = torch.zeros_like(spent).scatter_(1, order, spent)
    return {n: part.sum(1) for n, part in zip(names, kept.split(lengths.tolist(), 1), strict=True)}


def _truncated(
    D: Tensor, triples: tuple[Tensor, Tensor, Tensor], ranks: Tensor, metric: Metric | None
) -> LowRankDirections:
    """Low-rank directions of matrices from the singular triples of weighted ones."""
    U, S, V = triples
    lefts, rights, rest = [], [], []
    for q, r in enumerate(ranks.tolist()):
        left, right = U[q, ..., :r] * S[q, :, None, :r], V[q, :, :r]
        if metric is not None:
            left, right = metric.unweighted(left, right)
        lefts.append(left)
        rights.append(right)
        rest.append(_residual(D[q], left, right))
    residual = torch.tensor(rest, dtype=torch.float64, device=D.device)
    return LowRankDirections(torch.cat(lefts, 2), torch.cat(rights, 1), ranks, residual)


def require_compression(
    rank: int | None, tolerance: float | None, oversampling: int = 10, iterations: int = 2
) -> None:
    """Raises ValueError if settings of :func:`compressed` are out of range."""
    if rank is not None and (type(rank) is not int or rank < 1):
        raise ValueError(f"rank= is at least 1, or None for full rank, got {rank!r}")
    if tolerance is not None and not 0.0 <= tolerance < 1.0:
        raise ValueError(
            f"tolerance= is a fraction of a direction's norm, 0 to 1, got {tolerance!r}"
        )
    for name, value in (("oversampling", oversampling), ("iterations", iterations)):
        if type(value) is not int or value < 0:
            raise ValueError(f"{name}= is an integer of at least 0, got {value!r}")


def low_rank(
    matrices: Tensor,
    *,
    metric: Metric | None = None,
    rank: int | None = None,
    tolerance: float | None = None,
    oversampling: int = 10,
    iterations: int = 2,
    seed: int = 0,
) -> LowRankDirections:
    """Low-rank directions of matrices, even where they take more memory.

    Args:
        matrices: ``[Q, G, O, I]``, float32 or float64.
        metric: As of :func:`compressed`.
        rank: As of :func:`compressed`.
        tolerance: As of :func:`compressed`. With neither, the rank is full.
        oversampling: As of :func:`compressed`.
        iterations: As of :func:`compressed`.
        seed: As of :func:`compressed`.

    Raises:
        TypeError: If matrices are none of float32 and float64.
        ValueError: If a number is out of range, or there is no query.
        FloatingPointError: If matrices are not finite.
    """
    require_compression(rank, tolerance, oversampling, iterations)
    if matrices.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"expected directions in float32 or float64, got {matrices.dtype}")
    if matrices.ndim != 4 or not len(matrices):
        raise ValueError(f"expected matrices [Q, G, O, I], Q > 0, got {list(matrices.shape)}")
    _finite(matrices)
    full = min(matrices.shape[2:])
    cap = full if rank is None else min(rank, full)
    tau = 0.0 if tolerance is None else tolerance
    settings = (oversampling, iterations, seed)
    # float64 copies of the residual are the largest intermediates
    step = max(1, CHUNK // max(1, matrices[0].numel() * 8))
    parts = [
        _chunk(matrices[start : start + step], metric, cap, tau, tolerance is not None, settings)
        for start in range(0, len(matrices), step)
    ]
    found = joined(parts)
    assert isinstance(found, LowRankDirections)
    return found


def _finite(matrices: Tensor) -> Tensor:
    """The matrices, if all are finite."""
    if not bool(torch.isfinite(matrices.sum())):
        bad = (~torch.isfinite(matrices.flatten(1)).all(1)).nonzero()[:, 0].tolist()
        if bad:
            raise FloatingPointError(
                f"the directions of queries {bad[:6]} have entries that are NaN or infinite: their "
                "gradients are, or the damping is too small"
            )
    return matrices


def _chunk(
    D: Tensor,
    metric: Metric | None,
    cap: int,
    tau: float,
    adaptive: bool,
    settings: tuple[int, int, int],
) -> LowRankDirections:
    """Low-rank directions of some queries."""
    W = D if metric is None else metric.weighted(D)
    norms = torch.linalg.vector_norm(W.double().flatten(1), dim=1)
    parts: list[LowRankDirections | None] = [None] * len(D)
    todo = list(range(len(D)))
    width = min(cap, _FIRST) if adaptive else cap
    while todo:
        U, S, V = range_svd(W[todo], width, *settings)
        again = []
        for i, q in enumerate(todo):
            limit = tau * float(norms[q])
            rank = _smallest(S[i], norms[q], limit, width) if adaptive else width
            left = (U[i, ..., :rank] * S[i, :, None, :rank]).clone()
            right = V[i, :, :rank].clone()
            if adaptive and width < cap and _residual(W[q], left, right) > limit:
                again.append(q)
                continue
            if metric is not None:
                left, right = metric.unweighted(left, right)
            rest = [_residual(D[q], left, right)]
            residual = torch.tensor(rest, dtype=torch.float64, device=D.device)
            parts[q] = LowRankDirections(left, right, torch.tensor([rank]), residual)
        todo, width = again, min(2 * width, cap)
    found = joined([part for part in parts if part is not None])
    assert isinstance(found, LowRankDirections)
    return found


def range_svd(
    D: Tensor, rank: int, oversampling: int, iterations: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triples of ``[..., O, I]`` by a randomized range, or all exactly.

    Returns:
        ``U`` ``[..., O, r]``, ``S`` ``[..., r]`` and ``V^T`` ``[..., r, I]`` with ``r = rank``.
    """
    O, I = D.shape[-2:]
    width = rank + oversampling
    if width >= min(O, I):
        U, S, V = torch.linalg.svd(D, full_matrices=False)
    else:
        draw = generator_of(None, seed, D.device)
        omega = torch.randn((I, width), generator=draw, dtype=D.dtype, device=D.device)
        basis = torch.linalg.qr(D @ omega).Q
        for _ in range(iterations):
            basis = torch.linalg.qr(D @ torch.linalg.qr(D.mT @ basis).Q).Q
        U, S, V = torch.linalg.svd(basis.mT @ D, full_matrices=False)
        U = basis @ U
    return U[..., :rank], S[..., :rank], V[..., :rank, :]


def _smallest(S: Tensor, norm: Tensor, limit: float, width: int) -> int:
    """The smallest rank whose residual is within a limit, from singular values ``[G, r]``.

    What singular values promise is checked afterwards: they are rounded.
    """
    captured = S.double().square().sum(0).cumsum(0)
    rest = (norm.square() - captured).clamp_min(0.0).sqrt().tolist()
    eps = float(norm) * torch.finfo(S.dtype).eps
    return next((r for r, left in enumerate([float(norm), *rest]) if left + eps <= limit), width)


def _residual(D: Tensor, left: Tensor, right: Tensor) -> float:
    """The Frobenius norm of what is left out, in float64, rounded up."""
    rest = D.double() - left.double() @ right.double()
    return float(torch.linalg.vector_norm(rest)) * _UP
