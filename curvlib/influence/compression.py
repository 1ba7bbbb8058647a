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

Memory decides where compression pays: a block whose factors would take no less than the matrices
stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvlib.core.kronecker_blocks import KroneckerBlock
from curvlib.core.random import generator_of
from curvlib.influence.directions import BlockDirections
from curvlib.influence.low_rank import CHUNK, LowRankDirections, joined

#: The rank that adaptive compression tries first.
_FIRST = 16
#: What residuals are rounded up by, so that they bound in float32, too.
_UP = 1.0 + 1e-6


#: Eigenvalues of a metric are no smaller than this, relative to their mean.
_FLOOR = 1e-3


@dataclass(frozen=True, eq=False)
class Metric:
    """Roots of the second moments of gradients in one block, by their eigenvectors.

    Attributes:
        block: The eigenvectors.
        left: Roots of eigenvalues, ``[G, O, 1]``.
        right: The same of the other side, ``[G, 1, I]``.
    """

    block: KroneckerBlock
    left: Tensor
    right: Tensor

    def weighted(self, D: Tensor) -> Tensor:
        """Matrices ``[Q, G, O, I]`` in the metric."""
        return self.block.rotated(D) * (self.left * self.right).to(D.dtype)

    def restored(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Factors ``[G, O, R]`` and ``[G, R, I]`` of weighted matrices as those of matrices."""
        left, right = left / self.left.to(left.dtype), right / self.right.to(right.dtype)
        block = self.block
        left = left if block.left is None else block.left @ left
        return left, right if block.right is None else right @ block.right.mT


def metric_of(block: KroneckerBlock) -> Metric | None:
    """The metric of a curvature block: the product of its marginal eigenvalues.

    ``None`` for a block without curvature.

    Example:
        >>> from curvlib.core.kronecker_blocks import Part
        >>> values = torch.tensor([[[2.0, 4.0], [3.0, 6.0]]])
        >>> metric = metric_of(KroneckerBlock("layer", (Part(0, 2),), None, None, values))
        >>> bool(torch.allclose(metric.weighted(torch.ones(1, 1, 2, 2))[0] ** 2, values, rtol=0.01))
        True
    """
    values = block.eigenvalues
    mean = values.mean((1, 2), keepdim=True)
    if not bool((mean > 0).all()):
        return None
    left = values.mean(2, keepdim=True) + _FLOOR * mean
    right = values.mean(1, keepdim=True) / mean + _FLOOR
    return Metric(block, left.sqrt(), right.sqrt())


def compressed(
    directions: BlockDirections,
    *,
    metric: Metric | None = None,
    rank: int | None = None,
    tolerance: float | None = None,
    oversampling: int = 10,
    iterations: int = 2,
    seed: int = 0,
) -> BlockDirections:
    """Directions in less memory, where that is possible.

    Args:
        directions: The directions of ``Q`` queries in one block.
        metric: In which errors are least; the identity when omitted.
        rank: The rank of each query; at most, with ``tolerance``. Grosse et al. use 32.
        tolerance: How large the residual may be, relative to the norm of the direction: each query
            gets the smallest rank that keeps it. With neither, directions stay as they are.
        oversampling: Columns beyond the rank.
        iterations: Power iterations; more sharpen a flat spectrum.
        seed: Of the random matrix.

    Returns:
        Low-rank directions; or what was given, where they would take as much memory.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> from curvlib.influence.directions import DenseDirections
        >>> D = DenseDirections(torch.ones(3, 1, 50, 40, dtype=torch.float64))
        >>> low = compressed(D, tolerance=1e-6)
        >>> low.ranks.tolist(), low.bytes < D.bytes / 10
        ([1, 1, 1], True)
    """
    require_compression(rank, tolerance, oversampling, iterations)
    if rank is None and tolerance is None:
        return directions
    _, O, I = directions.shape  # noqa: E741 (the axes of outputs and inputs)
    if tolerance is None and rank is not None and rank * (O + I) >= O * I:
        return directions
    found = low_rank(
        directions.dense(),
        metric=metric,
        rank=rank,
        tolerance=tolerance,
        oversampling=oversampling,
        iterations=iterations,
        seed=seed,
    )
    return found if found.bytes < directions.bytes else directions


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
    bad = (~torch.isfinite(matrices.flatten(1)).all(1)).nonzero()[:, 0].tolist()
    if bad:
        raise FloatingPointError(
            f"the directions of queries {bad[:6]} have entries that are NaN or infinite: their "
            "gradients are, or the damping is too small"
        )
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
                left, right = metric.restored(left, right)
            rest = [_residual(D[q], left, right) * _UP]
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
    O, I = D.shape[-2:]  # noqa: E741
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
    """The Frobenius norm of what is left out, in float64."""
    rest = D.double() - left.double() @ right.double()
    return float(torch.linalg.vector_norm(rest))
