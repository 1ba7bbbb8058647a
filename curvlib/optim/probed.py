"""Hessian products of a live loss with an optimizer's random signs."""

from __future__ import annotations

from torch import Tensor

from curvlib.operators.live.loss import gradient_and_products
from curvlib.optim.draws import signs
from curvlib.optim.shell import CurvatureOptimizer

Vectors = list[list[Tensor]]


def probed_products(
    opt: CurvatureOptimizer, loss: Tensor, scale: float, probes: int, *, verify: bool
) -> tuple[Vectors, list[Tensor | None], list[list[Tensor | None]]]:
    """Signs, gradients and Hessian products for the parameters that train.

    Args:
        opt: The optimizer, whose seed and count of curvature updates give the signs.
        loss: The loss, multiplied by
        scale: this, by which products are divided.
        probes: How many vectors.
        verify: Whether to look for functions without a second derivative.

    Returns:
        Signs ``[probes][n]``, gradients ``[n]`` of ``loss``, products ``[probes][n]``.
    """
    members = opt.trainable()
    update, cut = opt.clock.curvature_updates, opt.sharding
    spreads = [None if cut is None else cut.spread([i]) for i, _, _ in members]
    vectors = [
        [
            signs(p, opt.seed, update, k, i, spread=spread)
            for (i, p, _), spread in zip(members, spreads, strict=True)
        ]
        for k in range(probes)
    ]
    gradients, products = gradient_and_products(
        loss,
        [p for _, p, _ in members],
        vectors,
        keep_graph=opt.keep_graph,
        verify=verify,
        scale=scale,
    )
    return vectors, gradients, products
