r"""A random root of the Gauss-Newton matrix from the graph of one forward pass.

For a mean :math:`\frac1W \sum_t a_t \ell_t` over loss terms with scores :math:`s_t` of targets that
are drawn from the model's own prediction (:mod:`curvlib.operators.labels`), let

.. math:: v = \frac{1}{\sqrt W} \sum_t \sqrt{a_t}\, J_t^\top s_t .

Scores are independent of one another, with :math:`E\, s_t = 0` (Bartlett's first identity) and
:math:`E\, s_t s_t^\top = \nabla^2_f \ell_t`, so that :math:`E\, v v^\top` is the GGN of the mean,
and :math:`v \odot v` is unbiased for its diagonal (the Gauss-Newton-Bartlett estimate of Sophia).
Without class weights :math:`v = \sqrt W g_s` with the gradient :math:`g_s` of the mean sampled
loss, so that :math:`v \odot v = W g_s \odot g_s`: the batch factor is the number of loss terms
(of tokens that are not ignored), not of examples.

Roots of independent batches add up: for the mean of ``k`` batch losses, :math:`\sum_j v_j /
\sqrt k` is a root. It costs one backward pass, and no second derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curvlib.core.data import describe
from curvlib.core.loss import Loss
from curvlib.operators.labels import label_scores
from curvlib.operators.loss_hessian import term_weights


def sampled_root(
    loss: Loss,
    output: Tensor,
    target: Tensor,
    params: Sequence[Tensor],
    uniform: Callable[[torch.Size], Tensor],
) -> list[Tensor | None]:
    """A random vector whose outer product has the batch's GGN as its expectation.

    The graph is kept. The loss scale of mixed precision plays no part: cotangents are normalized,
    so that half precision neither overflows nor underflows.

    Args:
        loss: One of the losses that curvlib knows.
        output: What the model returned, with its graph.
        target: What the loss compares it with; only which terms count, and how much, is read.
        params: Parameters.
        uniform: Returns numbers in (0, 1) of shape ``[1, *shape]`` for a shape, examples first: see
            :meth:`curvlib.operators.labels.SampledLabels.uniform`.

    Returns:
        One tensor for each parameter, in its shape; ``None`` where the output does not depend on
        it.

    Raises:
        TypeError: If output or target are no tensors.
        ValueError: If they do not fit, or the output has no graph.
        RuntimeError: If the graph was freed.

    Example:
        >>> import torch
        >>> from curvlib.core.loss import read_loss
        >>> from curvlib.operators.labels import SampledLabels
        >>> model = torch.nn.Linear(2, 3)
        >>> x, y = torch.ones(4, 2), torch.tensor([0, 1, 2, 0])
        >>> labels = SampledLabels(1, torch.Generator().manual_seed(0))
        >>> loss = read_loss(torch.nn.CrossEntropyLoss())
        >>> root = sampled_root(loss, model(x), y, list(model.parameters()), labels.uniform)
        >>> [tuple(part.shape) for part in root]
        [(3, 2), (3,)]

    Source:
        H. Liu et al., *Sophia*, ICLR 2024, algorithm 2.
    """
    readable = loss.readable(output, target)
    if not output.requires_grad:
        raise ValueError(
            f"the output ({describe(output)}) has no graph: it was detached, or computed under "
            "torch.no_grad(); pass what the model returned"
        )
    with torch.no_grad():
        score = _score(loss, readable.detach(), target, uniform)
    try:
        parts = torch.autograd.grad(
            [output],
            list(params),
            [score.to(output.dtype)],
            retain_graph=True,
            allow_unused=True,
        )
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise RuntimeError(
            "the graph of the output was freed by a backward pass before curvature could be read; "
            "call opt.backward(loss, output, target) instead of loss.backward(), or "
            "opt.observe(loss, output, target) before it"
        ) from error
    return [None if part is None else _wide(part) for part in parts]


def _score(
    loss: Loss, output: Tensor, target: Tensor, uniform: Callable[[torch.Size], Tensor]
) -> Tensor:
    """The cotangent of the output."""
    if not bool(torch.isfinite(output).all()):  # nothing to draw from: the caller sees it
        return torch.full_like(output, torch.nan)
    score = label_scores(loss, output, uniform)[0]
    score *= term_weights(loss, output, target).sqrt()
    if loss.reduction == "sum":
        return score
    weight = torch.as_tensor(loss.terms(target), dtype=torch.float64, device=output.device)
    return score / weight.where(weight > 0.0, 1.0).sqrt()


def _wide(part: Tensor) -> Tensor:
    part = part.to_dense() if part.layout != torch.strided else part
    return part if part.dtype == torch.float64 else part.float()
