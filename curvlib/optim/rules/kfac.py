r"""The update rule of K-FAC and E-KFAC, as functions of tensors.

For a layer with the gradient matrix :math:`G \in \mathbb{R}^{O \times I}` (bias as last column) and
the Fisher matrix :math:`F \approx L \otimes R`, or :math:`Q \,\mathrm{diag}(\Lambda)\, Q^\top` with
:math:`Q = Q_L \otimes Q_R`:

averages
    :math:`\bar L \leftarrow \beta \bar L + (1 - \beta) L`, from zero, and over
    :math:`1 - \beta^k` after ``k`` updates, so that the first ones are not too small;
basis
    :math:`L = Q_L \,\mathrm{diag}(l)\, Q_L^\top`, in float64;
eigenvalues
    :math:`\Lambda = l r^\top` for K-FAC (Martens and Grosse, "Optimizing neural networks with
    Kronecker-factored approximate curvature", 2015, section 3); for E-KFAC the average of
    :math:`\mathbb{E} (Q_L^\top G Q_R)^{\circ 2}` (George et al., "Fast approximate natural gradient
    descent in a Kronecker-factored eigenbasis", 2018, algorithm 1), which is moved to a new basis
    :math:`Q'` as the diagonal of the same matrix there,
    :math:`(Q_L'^\top Q_L)^{\circ 2} \Lambda ((Q_R'^\top Q_R)^{\circ 2})^\top`;
step
    :math:`V = Q_L \bigl( (Q_L^\top G Q_R) / (\Lambda + \lambda) \bigr) Q_R^\top`: Tikhonov damping
    of the whole block, exactly, without a split between the factors;
    With factored damping :math:`V = (L + \pi^{-1} \sqrt\lambda I)^{-1} G
    (R + \pi \sqrt\lambda I)^{-1}` instead: half the work, and stronger damping than asked for, by
    :math:`\sqrt\lambda (\pi L \otimes I + \pi^{-1} I \otimes R)`;
KL clipping
    :math:`V \leftarrow \min(1, \sqrt{\kappa / \eta^2 \sum \langle V, G \rangle})\, V`, so that
    :math:`\eta^2 V^\top (F + \lambda) V \le \kappa` (Ba, Grosse and Martens, "Distributed
    second-order optimization using Kronecker-factored approximations", 2017, section 5).

All matrices have a leading axis ``G`` of groups (of a grouped convolution's channels, of gates). A
diagonal factor is ``[G, n]`` instead of ``[G, n, n]``, and has no basis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: Relative to a factor's mean eigenvalue; up to twice as much, to set equal eigenvalues apart.
JITTER = 1e-9


def averaged(old: Tensor | None, new: Tensor, decay: float) -> Tensor:
    """The moving average with one value more; of ``new`` alone it is ``(1 - decay) * new``.

    Example:
        >>> two = averaged(averaged(None, torch.ones(1), 0.5), torch.ones(1), 0.5)
        >>> float(two), float(two) / debias(0.5, 2)
        (0.75, 1.0)
    """
    return new * (1.0 - decay) if old is None else torch.lerp(old, new, 1.0 - decay)


def debias(decay: float, updates: int) -> float:
    """What a moving average from zero is divided by."""
    return 1.0 - decay**updates


def eigenbasis(factor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues ``[G, n]``, none negative, and eigenvectors ``[G, n, n]`` of a factor.

    A diagonal factor has no eigenvectors. Decomposed in float64, returned in the factor's type.
    Where that does not converge, it is tried again with :data:`JITTER` on the diagonal.

    Raises:
        torch.linalg.LinAlgError: If it does not converge then, either.
    """
    if factor.ndim == 2:
        return factor.clamp(min=0.0), None
    wide = factor.to(torch.float64)
    wide = 0.5 * (wide + wide.mT)
    try:
        values, vectors = torch.linalg.eigh(wide)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # not in the stubs
        size = wide.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True) * JITTER
        apart = torch.linspace(1.0, 2.0, wide.shape[-1], dtype=wide.dtype, device=wide.device)
        values, vectors = torch.linalg.eigh(wide + torch.diag_embed(size * apart))
    return values.clamp_(min=0.0).to(factor.dtype), vectors.to(factor.dtype)


def outer(left: Tensor, right: Tensor) -> Tensor:
    """Eigenvalues ``[G, O, I]`` of a Kronecker product."""
    return left[:, :, None] * right[:, None, :]


def moved(
    values: Tensor,
    old: tuple[Tensor | None, Tensor | None],
    new: tuple[Tensor | None, Tensor | None],
) -> Tensor:
    """The diagonal, in a new basis, of the matrix that is diagonal in the old one.

    Args:
        values: Its eigenvalues ``[G, O, I]``.
        old: Its eigenvectors, left and right.
        new: The new basis.

    Example:
        >>> eye = torch.eye(2)[None]
        >>> moved(torch.tensor([[[1.0], [3.0]]]), (eye, None), (eye.flip(1), None))[0, :, 0]
        tensor([3., 1.])
    """
    if old[0] is not None and new[0] is not None:
        values = (new[0].mT @ old[0]).square() @ values
    if old[1] is not None and new[1] is not None:
        values = values @ (new[1].mT @ old[1]).square().mT
    return values


def rotated(gradient: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    r""":math:`Q_L^\top G Q_R`, ``[G, O, I]``."""
    gradient = gradient if left is None else left.mT @ gradient
    return gradient if right is None else gradient @ right


def restored(gradient: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    r""":math:`Q_L X Q_R^\top`, the inverse of :func:`rotated`."""
    gradient = gradient if left is None else left @ gradient
    return gradient if right is None else gradient @ right.mT


def inverted(values: Tensor, damping: float, *, relative: bool) -> Tensor:
    r""":math:`1 / (\Lambda + \lambda)`; relative damping is a fraction of the mean eigenvalue."""
    return (values + (damping * values.mean() if relative else damping)).reciprocal_()


def preconditioned(
    gradient: Tensor, left: Tensor | None, right: Tensor | None, inverse: Tensor
) -> Tensor:
    """The natural gradient ``[G, O, I]``.

    Args:
        gradient: ``[G, O, I]``.
        left: Eigenvectors ``[G, O, O]``, or ``None`` for the identity.
        right: ``[G, I, I]``, or ``None``.
        inverse: Inverse eigenvalues: see :func:`inverted`.

    Example:
        >>> g = torch.tensor([[[2.0, 6.0]]])
        >>> preconditioned(
        ...     g, None, None, inverted(torch.tensor([[[1.0, 2.0]]]), 1.0, relative=False)
        ... )
        tensor([[[1., 2.]]])
    """
    if len(gradient) == 1:  # products of matrices are faster than of stacks
        gradient, inverse = gradient[0], inverse[0]
        left, right = (None if q is None else q[0] for q in (left, right))
        return restored(rotated(gradient, left, right) * inverse, left, right)[None]
    return restored(rotated(gradient, left, right) * inverse, left, right)


def factored_inverses(
    left: tuple[Tensor, Tensor | None],
    right: tuple[Tensor, Tensor | None],
    damping: float,
    *,
    relative: bool,
) -> tuple[Tensor, Tensor]:
    r"""Inverses of both factors with the damping split between them.

    :math:`(L + \pi^{-1} \sqrt\lambda I)^{-1}` and :math:`(R + \pi \sqrt\lambda I)^{-1}` with
    :math:`\pi^2 = \frac{\mathrm{tr} R / I}{\mathrm{tr} L / O}` (Martens and Grosse, 2015,
    section 6.3).

    Args:
        left: Eigenvalues ``[G, O]`` and eigenvectors ``[G, O, O]``, or ``None`` of a diagonal.
        right: Of the right factor.
        damping: :math:`\lambda`, or
        relative: whether it is a fraction of the mean eigenvalue of the Kronecker product.

    Returns:
        ``[G, O, O]`` and ``[G, I, I]``; diagonals as ``[G, O]``, ``[G, I]``.

    Example:
        >>> ones, fours = torch.ones(1, 2), torch.full((1, 3), 4.0)
        >>> factored_inverses((ones, None), (fours, None), 1.0, relative=True)
        (tensor([[0.5000, 0.5000]]), tensor([[0.1250, 0.1250, 0.1250]]))
    """
    tiny = torch.finfo(left[0].dtype).tiny
    means = [values.mean(1, keepdim=True) for values, _ in (left, right)]
    level = damping * (means[0] * means[1]).mean() if relative else damping
    ratio = (means[1].clamp(min=tiny) / means[0].clamp(min=tiny)).sqrt()
    root = level**0.5
    shifts = (root / ratio, root * ratio)
    found = []
    for (values, vectors), shift in zip((left, right), shifts, strict=True):
        inverse = (values + shift).reciprocal_()
        found.append(inverse if vectors is None else (vectors * inverse[:, None]) @ vectors.mT)
    return found[0], found[1]


def preconditioned_by(gradient: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The natural gradient ``[G, O, I]``, in two products.

    Args:
        gradient: ``[G, O, I]``.
        left: Inverse of the left factor, ``[G, O, O]`` or ``[G, O]``.
        right: Of the right one.

    Example:
        >>> preconditioned_by(torch.ones(1, 1, 2), torch.full((1, 1, 1), 2.0), torch.ones(1, 2))
        tensor([[[2., 2.]]])
    """
    if left.ndim == right.ndim == 3 and len(gradient) == 1:
        return (left[0] @ gradient[0] @ right[0])[None]
    gradient = left[:, :, None] * gradient if left.ndim == 2 else left @ gradient
    return gradient * right[:, None] if right.ndim == 2 else gradient @ right


def kl_scale(products: Sequence[float], lr: float, kl_clip: float | None) -> float:
    r"""The factor of KL clipping.

    Args:
        products: :math:`\langle V, G \rangle` of each tensor.
        lr: :math:`\eta`.
        kl_clip: :math:`\kappa`; ``None`` for no clipping.
    """
    total = lr * lr * math.fsum(products)
    return 1.0 if kl_clip is None or total <= kl_clip else math.sqrt(kl_clip / total)
