r"""Damping of each Kronecker factor apart, which keeps a product of factors one.

.. math:: \bigl(L + \tfrac{\sqrt\lambda}{\pi} I\bigr) \otimes \bigl(R + \pi \sqrt\lambda\, I\bigr),
          \qquad \pi^2 = \frac{\operatorname{tr} R / I}{\operatorname{tr} L / O} ,

instead of :math:`L \otimes R + \lambda I` (Martens and Grosse, "Optimizing neural networks with
Kronecker-factored approximate curvature", 2015, section 6.3). For a relative
:math:`\lambda = c\,\bar l\,\bar r`, with the mean eigenvalues of the factors, that is
:math:`L + \sqrt c\,\bar l\, I` and :math:`R + \sqrt c\,\bar r\, I`. The inverse of such a matrix
maps the gradient :math:`\sum_t g_t a_t^\top` of an example to the product of as many vectors,
:math:`\sum_t (L^{-1} g_t)(R^{-1} a_t)^\top`, where any other damping makes its rank full.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from curvlib.core.arguments import finite_number
from curvlib.core.kronecker import DAMPING, Kronecker
from curvlib.core.kronecker_blocks import KroneckerBlock


def factor_eigenvalues(block: KroneckerBlock) -> tuple[Tensor, Tensor] | None:
    r"""Eigenvalues :math:`l` ``[G, O]`` and :math:`r` ``[G, I]`` with :math:`\Lambda = l r^\top`.

    Float64; ``None`` where there are none (EK-FAC, diagonals, damped products).

    Example:
        >>> from curvlib.core.kronecker_blocks import Part
        >>> values = torch.tensor([[[2.0, 4.0], [3.0, 6.0]]])
        >>> l, r = factor_eigenvalues(KroneckerBlock("layer", (Part(0, 2),), None, None, values))
        >>> bool((l[:, :, None] * r[:, None] == values).all())
        True
    """
    values = block.eigenvalues.double()
    mean = values.mean((1, 2), keepdim=True)
    if not bool((mean > 0).all()):
        return None
    left, right = values.mean(2, keepdim=True), values.mean(1, keepdim=True) / mean
    tolerance = 64.0 * torch.finfo(block.eigenvalues.dtype).eps
    if bool(((left * right - values).abs() > tolerance * values.abs()).any()):
        return None
    return left[..., 0], right[:, 0]


def factored_damping(
    operator: Kronecker, damping: float = DAMPING, *, relative: bool = True
) -> Kronecker:
    """A Kronecker-factored operator whose factors are damped apart.

    Pass it as curvature with ``damping=0``: it is damped already.

    Args:
        operator: K-FAC: ``curvlib.kfac(...)``, or its ``.kronecker()``. Blocks that are no product
            of factors (diagonals) are damped as always.
        damping: A fraction of the mean eigenvalue of each block; or, with ``relative=False``, the
            damping itself.
        relative: Which of the two.

    Raises:
        TypeError: If ``operator`` is of another type.
        ValueError: If no block is a product of factors, or damping is negative.
        RuntimeError: If damping is relative and the operator has coordinates in no block, or a
            block whose mean eigenvalue is not positive.

    Example:
        >>> import curvlib as cl
        >>> risk = cl.Risk(
        ...     torch.nn.Linear(2, 1), torch.nn.MSELoss(), (torch.eye(2), torch.ones(2, 1))
        ... )
        >>> K = factored_damping(cl.kfac(risk).kronecker(), 0.1)
        >>> K.solve(torch.ones(3), damping=0.0).shape
        torch.Size([3])
    """
    if not isinstance(operator, Kronecker):
        raise TypeError(f"expected a Kronecker-factored operator, got {type(operator).__name__}")
    if operator.spread is not None:
        raise ValueError(
            f"damping of factors needs whole eigenvalues, and those of {operator!r} are spread "
            f"over {operator.spread.group.size} processes (a sharding that curvlib cannot follow "
            "here); damp their products: operator.solve(x, damping)"
        )
    if not finite_number("damping", damping) >= 0.0:
        raise ValueError(f"damping= is at least 0, got {damping}")
    values, factored = [], 0
    each = operator.dampings(damping, relative=relative)
    for name, block in operator.blocks_of.items():
        found = factor_eigenvalues(block)
        if found is None:
            values.append(block.eigenvalues + each[name])
            continue
        factored += 1
        left, right = found
        means = left.mean(1, keepdim=True), right.mean(1, keepdim=True)
        # of G groups each has its own split of the block's damping
        root = math.sqrt(each[name]) / (means[0] * means[1]).sqrt()
        damped = (left + root * means[0])[..., None] * (right + root * means[1])[:, None]
        values.append(damped.to(block.eigenvalues.dtype))
    if not factored:
        raise ValueError(
            f"no block of {operator!r} is a product of two factors: corrected eigenvalues are "
            "none; use curvlib.kfac(...).kronecker()"
        )
    rest = operator.rest + (damping if operator.uncovered else 0.0)
    return operator.with_eigenvalues(values, rest=rest, name=f"{operator.name}, factors damped")
