r"""A random root of the Gauss-Newton matrix of a live loss.

The loss is a sum :math:`L = \sum_t w_t \ell_t` of likelihood terms, read from its graph
(:mod:`curvlib.operators.live.likelihood`). With scores :math:`s_t` of targets that are drawn from
the model's own prediction (:mod:`curvlib.operators.labels`), let

.. math:: v = \sum_t \sqrt{w_t}\, J_t^\top s_t .

Scores are independent of one another, with :math:`E\, s_t = 0` (Bartlett's first identity) and
:math:`E\, s_t s_t^\top = \nabla^2_f \ell_t`, so that :math:`E\, v v^\top` is the GGN of ``L``, and
:math:`v \odot v` is unbiased for its diagonal: the Gauss-Newton-Bartlett estimate of Sophia. For a
mean over ``B`` terms, :math:`w_t = 1/B` and :math:`v = \sqrt B g_s` with the gradient :math:`g_s`
of the mean sampled loss, so that :math:`v \odot v = B\, g_s \odot g_s`: the batch factor is the
number of loss terms (of tokens that are not ignored), not of examples.

Roots of a sum of independent losses add up, so that micro-batches and processes need no more than
a sum. It costs one backward pass, and no second derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curvlib.core.loss import Loss
from curvlib.operators.labels import label_scores
from curvlib.operators.live.likelihood import Likelihood, likelihoods
from curvlib.operators.live.loss import require_whole

#: Returns numbers in (0, 1) of shape ``[1, *shape]`` for a shape.
Uniform = Callable[[torch.Size], Tensor]


def sampled_root(
    loss: Tensor,
    params: Sequence[Tensor],
    uniform: Callable[[int], Uniform],
    scale: float = 1.0,
) -> list[Tensor | None]:
    """A random vector whose outer product has the GGN of a live loss as its expectation.

    The graph is kept. Cotangents do not have the loss scale of mixed precision.

    Args:
        loss: A scalar with its graph.
        params: Leaves that require gradients.
        uniform: Given how many numbers will be drawn in all, returns what draws them.
        scale: What the loss was multiplied by.

    Returns:
        One tensor for each parameter, in its shape, in float32 or float64; ``None`` where no
        likelihood depends on it.

    Raises:
        ValueError: If the loss is no linear combination of known likelihoods.
        RuntimeError: If the graph was freed, or is checkpointed the reentrant way.

    Example:
        >>> from curvlib.operators.labels import SampledLabels
        >>> model = torch.nn.Linear(2, 3)
        >>> x, y = torch.ones(4, 2), torch.tensor([0, 1, 2, 0])
        >>> labels = SampledLabels(1, torch.Generator().manual_seed(0))
        >>> loss = torch.nn.functional.cross_entropy(model(x), y)
        >>> root = sampled_root(loss, list(model.parameters()), lambda count: labels.uniform)
        >>> [tuple(part.shape) for part in root]
        [(3, 2), (3,)]

    Source:
        H. Liu, Z. Li, D. Hall, P. Liang and T. Ma, *Sophia: A scalable stochastic second-order
        optimizer for language model pre-training*, ICLR 2024, algorithm 2.
    """
    with torch.no_grad():
        found = likelihoods(loss, scale)
        draw = uniform(sum(math.prod(numbers_of(part)) for part in found))
        cotangents = [part.cotangent(_score(part, draw)) for part in found]
    edges = [
        (edge, sign * cotangent)
        for part, cotangent in zip(found, cotangents, strict=True)
        for edge, sign in part.edges
    ]
    parts = torch.autograd.grad(
        [edge for edge, _ in edges],
        list(params),
        [cotangent for _, cotangent in edges],
        retain_graph=True,
        allow_unused=True,
    )
    found_parts: list[Tensor | None] = [*parts]  # torch does not say that some may be None
    require_whole(loss, found_parts)
    return [None if part is None else _wide(part) for part in found_parts]


def numbers_of(part: Likelihood) -> torch.Size:
    """Shape of the random numbers that scores of a likelihood take."""
    shape = list(part.output.shape)
    if part.kind == "nll":
        del shape[1 if len(shape) > 1 else 0]
    return torch.Size(shape)


def _score(part: Likelihood, uniform: Uniform) -> Tensor:
    """Scores of drawn targets, times the roots of the weights."""
    loss = Loss(lambda output, target: output, part.kind, "sum")
    if not bool(torch.isfinite(part.output).all()):  # nothing to draw from: the caller sees it
        return torch.full_like(part.output, torch.nan)
    return label_scores(loss, part.output, uniform)[0] * part.weight.sqrt()


def _wide(part: Tensor) -> Tensor:
    part = part.to_dense() if part.layout != torch.strided else part
    return part if part.dtype == torch.float64 else part.float()
