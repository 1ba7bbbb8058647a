r"""The Hessian-gradient product of a risk, with a graph where it is trained through.

:math:`H g = \nabla_\theta \tfrac12 \lVert \nabla R(\theta) \rVert^2` measures how fast the
gradient's norm changes. Matching it (or the Hessian's diagonal) between domains aligns their
Hessians (Hemati, Zhang, Estiri, Chen, "Understanding Hessian alignment for domain
generalization", ICCV 2023), which needs third derivatives of the loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvlib.core.batch import Batch
from curvlib.core.normalization import PrimitiveNorms
from curvlib.core.risk import Risk
from curvlib.operators.hessian import hessian


def hessian_gradient_product(risk: Risk, *, differentiable: bool = False) -> Tensor:
    """The Hessian of a risk times its gradient, ``[P]``.

    Args:
        risk: Model, loss, data and parameters.
        differentiable: Whether the product carries a graph to the parameters, so that
            ``hessian_gradient_product(risk, differentiable=True).square().sum().backward()``
            trains through it. The graphs of all batches are held at once.

    Returns:
        A flat vector in the order of ``risk.space``.

    Raises:
        RuntimeError: If the gradient cannot be differentiated again.

    Example:
        >>> import torch, curvlib as cl
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> risk = cl.Risk(model, torch.nn.MSELoss(), (torch.ones(1, 1), torch.zeros(1, 1)))
        >>> w = model.weight.item()  # R = w^2, gradient 2 w, Hessian 2
        >>> abs(float(hessian_gradient_product(risk)) - 4 * w) < 1e-6
        True
    """
    op = hessian(risk)
    if not differentiable:
        return op.matmat(risk.gradient()[:, None])[:, 0]
    return op.differentiable_matmat(_gradient_with_graph(risk)[:, None])[:, 0]


def _gradient_with_graph(risk: Risk) -> Tensor:
    def add(batch: Batch, total: Tensor | None) -> Tensor:
        parts: Sequence[Tensor | None] = batch.gradient(create_graph=True)
        part = risk.space.join_with_graph(parts) * batch.scale
        return part if total is None else torch.add(total, part)

    with PrimitiveNorms():
        return risk.accumulate(add)
