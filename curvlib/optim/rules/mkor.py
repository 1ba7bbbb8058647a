r"""MKOR's rules: the inverse of a moving average of rank-one terms, kept by rank-one updates.

A layer's gradient :math:`G`, ``[O, I]``, is preconditioned by :math:`L^{-1} G R^{-1}`, with moving
averages :math:`C` of :math:`v v^\top`, one for each side,

.. math:: C_t = c \, C_{t-1} + (1 - c) \, \tfrac1k \sum_{j=1}^k v_j v_j^\top .

Its inverse :math:`M` follows exactly, without a decomposition of anything larger than ``k x k``
(Sherman-Morrison; for ``k > 1`` Woodbury), in :math:`O(k d^2)`:

.. math:: M_t = \frac1c \Big( M_{t-1} - U \big( \tfrac{c k}{1 - c} I + V^\top U \big)^{-1} U^\top
          \Big), \qquad U = M_{t-1} V .

The paper's equations 5 and 6 print a *plus* sign and other powers of :math:`c`: that matrix is
positive definite, but it is no inverse of the average, and it grows along ``v``, where the inverse
shrinks. The exact one is used here.

*Scale.* The average starts from the identity times the mean square of the first vectors, so that
vectors that are ``s`` times as long give :math:`M / s^2`, and preconditioned gradients (whose norms
are matched below) do not depend on units, on the loss's scale or on AMP's. The paper starts from
the identity itself: vectors that are short beside it (as gradients are) then never count.

*Stabilizer.* Directions that vectors do not reach are forgotten, :math:`M` grows there as
:math:`c^{-t}`. Where its infinity norm (which is no less than the largest eigenvalue) exceeds
:math:`b = 1 / (\lambda \bar\mu)`, with the mean eigenvalue :math:`\bar\mu = \mathrm{tr}\, C / d`,
it is blended towards the identity, :math:`\zeta M + (1 - \zeta) I / \bar\mu`, with just the
:math:`\zeta` that brings the norm to ``b``. (The paper blends with a fixed :math:`\zeta` and a
threshold in absolute units.) So the stabilizer is a damping :math:`\lambda`, relative to the mean
eigenvalue: the smallest eigenvalue of :math:`M^{-1}` is at least :math:`\lambda \bar\mu`.

*Half precision.* Arithmetic is in float32; what is stored is the diagonal in float32 and the rest
in bfloat16. The rounding error ``E`` is known when it is made, and
:math:`\min(\|E\|_\infty, \|E\|_F) \ge \|E\|_2` is added to the diagonal: the stored matrix is
positive definite whatever was rounded. Its relative error is a few roundings over ``1 - c``.

*Norm matching.* The preconditioned gradient of a layer gets the norm of the gradient, over weight
and bias together.

M. Mozaffari, S. Li, Z. Zhang and M. Mehri Dehnavi, *MKOR: Momentum-enabled Kronecker-factor-based
optimizer using rank-1 updates*, NeurIPS 2023 (arXiv:2306.01685), Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Inverse:
    r"""The inverse of a side's moving average, for each of ``G`` groups.

    Attributes:
        rest: What is off its diagonal, ``[G, d, d]``, in the type it is stored in.
        diagonal: Its diagonal, ``[G, d]``, float32 or float64.
        mean: :math:`\bar\mu`, the mean eigenvalue of the moving average, ``[G]``; 0 as long as no
            vector but zero has come.
    """

    rest: Tensor
    diagonal: Tensor
    mean: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Its parts, in the order of the arguments."""
        return self.rest, self.diagonal, self.mean


def init(
    groups: int,
    size: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Inverse:
    """The identity, of a side of length ``size``.

    Args:
        groups: ``G``.
        size: ``d``.
        dtype: What the part off the diagonal is stored in.
        device: Where.
    """
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    return Inverse(
        torch.zeros((groups, size, size), dtype=dtype, device=device),
        torch.ones((groups, size), dtype=exact, device=device),
        torch.zeros(groups, dtype=exact, device=device),
    )


def dense(inverse: Inverse) -> Tensor:
    """The matrix :math:`M`, ``[G, d, d]``, float32 or float64."""
    return inverse.rest.to(inverse.diagonal.dtype) + torch.diag_embed(inverse.diagonal)


def product(inverse: Inverse, X: Tensor) -> Tensor:
    """:math:`M X`, with ``X`` as ``[G, d, n]``."""
    rest = inverse.rest.to(inverse.diagonal.dtype)
    return torch.baddbmm(inverse.diagonal[:, :, None] * X, rest, X)


def update(inverse: Inverse, vectors: Tensor, *, decay: float, damping: float = 0.0) -> Inverse:
    r"""The inverse after vectors have come: exactly of the moving average, then bounded.

    Vectors that are all zero say nothing: they leave it as it is (a zero term would only scale it).
    Where rounding has made it indefinite (which damping prevents), it begins anew.

    Args:
        inverse: Before.
        vectors: :math:`v_j`, ``[G, k, d]``.
        decay: :math:`c`, between 0 and 1.
        damping: :math:`\lambda`, from 0 (no bound) to less than 1.

    Example:
        >>> v = torch.tensor([[[1.0, 2.0]]], dtype=torch.float64)
        >>> found = update(init(1, 2, dtype=torch.float64), v, decay=0.5)
        >>> C = 0.5 * 2.5 * torch.eye(2).double() + 0.5 * v[0].T @ v[0]
        >>> torch.allclose(dense(found)[0], torch.linalg.inv(C))
        True
    """
    V = vectors.to(inverse.diagonal.dtype)
    k, d = V.shape[1:]
    square = V.square().sum((1, 2)) / (k * d)
    seen, started = square > 0, inverse.mean > 0
    one = torch.ones_like(square)
    before = torch.where(started, inverse.mean, square)
    M = dense(inverse)
    M = M / torch.where(started | ~seen, one, square)[:, None, None]
    U = V @ M
    small = (U @ V.mT).double()
    small.diagonal(dim1=-2, dim2=-1).add_(decay * k / (1.0 - decay))
    root, failed = torch.linalg.cholesky_ex(0.5 * (small + small.mT))
    lost = (failed > 0)[:, None, None]
    eye = torch.eye(k, dtype=root.dtype, device=root.device)
    half = torch.linalg.solve_triangular(torch.where(lost, eye, root), U.double(), upper=False)
    half = half.to(U.dtype)
    moved = torch.baddbmm(M, half.mT, half, alpha=-1.0).div_(decay)
    level = torch.diag_embed((1.0 / torch.where(before > 0, before, one))[:, None].expand(-1, d))
    moved = torch.where(seen[:, None, None], torch.where(lost, level, moved), M)
    mean = torch.where(seen, decay * before + (1.0 - decay) * square, inverse.mean)
    if damping:
        moved = _bounded(moved, mean, damping)
    return _stored(0.5 * (moved + moved.mT), mean, inverse.rest.dtype)


def _bounded(M: Tensor, mean: Tensor, damping: float) -> Tensor:
    """Blended towards the identity, where its infinity norm is too large; see the module."""
    level = torch.where(mean > 0, 1.0 / mean, torch.ones_like(mean))
    limit = level / damping
    norm = M.abs().sum(-1).amax(-1)
    keep = torch.where(norm > limit, (limit - level) / (norm - level), torch.ones_like(norm))
    blended = M * keep[:, None, None]
    blended.diagonal(dim1=-2, dim2=-1).add_(((1.0 - keep) * level)[:, None])
    return blended


def _stored(M: Tensor, mean: Tensor, dtype: torch.dtype) -> Inverse:
    """In its type; what rounding may have taken away is added to the diagonal."""
    diagonal = M.diagonal(dim1=-2, dim2=-1).clone()
    M = M - torch.diag_embed(diagonal)
    rest = M.to(dtype)
    if dtype in _HALF:
        error = (M - rest.to(M.dtype)).abs()
        largest = torch.minimum(error.sum(-1).amax(-1), error.square().sum((1, 2)).sqrt())
        diagonal += largest[:, None]
    return Inverse(rest, diagonal, mean)


def preconditioned(gradient: Tensor, left: Inverse | None, right: Inverse | None) -> Tensor:
    r""":math:`L^{-1} G R^{-1}`; a side without an inverse is the identity.

    Args:
        gradient: ``[G, O, I]``.
        left: Of the side of length ``O``.
        right: Of the side of length ``I``.
    """
    found = gradient
    if left is not None:
        found = product(left, found.to(left.diagonal.dtype))
    if right is not None:
        found = product(right, found.to(right.diagonal.dtype).mT).mT
    return found


def norm_matched(updates: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """Updates of a layer's parameters, scaled together to the norm of their gradients together.

    Updates that are all zero, or not finite, are replaced by the gradients.

    Args:
        updates: Of the weight and of the bias, say.
        gradients: Of the same, in the same order.

    Example:
        >>> norm_matched([torch.tensor([3.0]), torch.tensor([4.0])], [torch.tensor([1.0])] * 2)
        [tensor([0.8485]), tensor([1.1314])]
    """
    wanted, norm = _norm(gradients), _norm(updates)
    usable = torch.isfinite(norm) & (norm > 0)
    factor = wanted / torch.where(usable, norm, torch.ones_like(norm))
    return [
        torch.where(usable, update * factor.to(update.dtype), gradient.to(update.dtype))
        for update, gradient in zip(updates, gradients, strict=True)
    ]


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    parts = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]
    norm: Tensor = parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts))
    return norm
