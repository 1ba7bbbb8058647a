r"""The diagonal with a graph: a penalty on it can be trained through.

For operators whose products carry a graph (:meth:`LinearOperator.differentiable_matmat`), the mean
of :math:`w \odot A w` over probes does so too. Its gradient is an unbiased estimate of the
gradient of any linear function of the diagonal; of a quadratic one (a squared distance of two
diagonals) it has the bias that the estimate's variance makes, which falls with the probes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from curvlib.core.operator import LinearOperator
from curvlib.estimators.probes import generator_of, probes


def diagonal_with_graph(
    op: LinearOperator,
    *,
    law: str,
    count: int,
    generator: torch.Generator | None,
    seed: int | None,
) -> tuple[Tensor, Tensor]:
    """Estimate ``[P]`` with a graph, and its standard error ``[P]`` without one.

    Args:
        op: An operator whose products carry a graph.
        law: Of the probes.
        count: How many, all held at once with their graphs.
        generator: Where they come from, or
        seed: their seed.

    Raises:
        TypeError: If the operator's products carry no graph.
        ValueError: If there is no probe.

    Example:
        >>> import curvlib as cl
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> op = cl.hessian_of(lambda z: (z**3).sum(), x)  # the diagonal is 6 x
        >>> value, _ = diagonal_with_graph(op, law="rademacher", count=1, generator=None, seed=0)
        >>> torch.autograd.grad(value.sum(), x)[0].tolist()
        [6.0, 6.0]
    """
    if count < 1:
        raise ValueError(f"expected probes >= 1, got {count}")
    draw = generator_of(generator, seed, op.device)
    W = probes((op.shape[0], count), law, generator=draw, dtype=op.dtype)
    terms = W * op.differentiable_matmat(W)
    value = terms.sum(1) / W.square().sum(1)
    with torch.no_grad():
        spread = (terms - W.square() * value[:, None]).square().sum(1)
        squares = W.square().mean(1) * max(count - 1, 1) ** 0.5 * count**0.5
        stderr = spread.sqrt() / squares
        if count == 1:
            stderr = torch.full_like(stderr, torch.nan)
    return value, stderr
