r"""A sampled Gauss-Newton diagonal from the graph of one forward pass (Gauss-Newton-Bartlett).

For a mean :math:`\frac1W \sum_t a_t \ell_t` over loss terms with scores :math:`s_t` of targets that
are drawn from the model's own prediction (:mod:`curvlib.operators.labels`), let

.. math:: u = \sum_t \sqrt{a_t}\, J_t^\top s_t , \qquad
          \hat h = \frac1W \, u \odot u .

Scores are independent of one another, with :math:`E\, s_t = 0` (Bartlett's first identity) and
:math:`E\, s_t s_t^\top = \nabla^2_f \ell_t`, so that :math:`E\, u u^\top = \sum_t a_t J_t^\top
\nabla^2_f \ell_t J_t` and :math:`\hat h` is unbiased for the diagonal of the GGN. Without class
weights, :math:`u / W` is the gradient :math:`g_s` of the mean sampled loss, and
:math:`\hat h = W g_s \odot g_s`: the batch factor is the number of loss terms (tokens that are not
ignored), not of examples.

``u`` and ``W`` add up over micro-batches and over processes; the squares of the parts do not give
the same (they are unbiased too, and noisier or not as the case may be). That costs one backward
pass, and no second derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlib.core.data import describe
from curvlib.core.loss import Loss
from curvlib.operators.labels import label_scores
from curvlib.operators.loss_hessian import term_weights


@dataclass(frozen=True, eq=False)
class SampledSum:
    """A gradient of a sum over sampled loss terms.

    Attributes:
        parts: :math:`u`, one tensor for each parameter; ``None`` where the output does not depend
            on it.
        weight: :math:`W`, a float64 scalar; 1 for ``reduction="sum"``.
    """

    parts: list[Tensor | None]
    weight: Tensor


def sampled_sum(
    loss: Loss,
    output: Tensor,
    target: Tensor,
    params: Sequence[Tensor],
    uniform: Callable[[torch.Size], Tensor],
) -> SampledSum:
    """The gradient of a sum of loss terms at targets that the model's output draws.

    The graph is kept, and the loss scale of mixed precision plays no part: cotangents are
    normalized, so that half precision neither overflows nor underflows.

    Args:
        loss: One of the losses that curvlib knows.
        output: What the model returned, with its graph.
        target: What the loss compares it with; only which terms count, and how much, is read.
        params: Parameters.
        uniform: Returns numbers in (0, 1) of shape ``[1, *shape]`` for a shape: see
            :meth:`curvlib.operators.labels.SampledLabels.uniform`.

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
        >>> found = sampled_sum(loss, model(x), y, list(model.parameters()), labels.uniform)
        >>> [tuple(part.shape) for part in found.parts], float(found.weight)
        ([(3, 2), (3,)], 4.0)
    """
    readable = loss.readable(output, target)
    if not output.requires_grad:
        raise ValueError(
            f"the output ({describe(output)}) has no graph: it was detached, or computed under "
            "torch.no_grad(); pass what the model returned"
        )
    with torch.no_grad():
        weight = torch.as_tensor(
            1.0 if loss.reduction == "sum" else loss.terms(target), dtype=torch.float64
        )
        unit = weight.clamp(min=1.0).sqrt().to(output.device)
        if bool(torch.isfinite(readable).all()):
            score = label_scores(loss, readable.detach(), uniform)[0]
            score = score * term_weights(loss, readable, target).sqrt() / unit
        else:  # there is nothing to draw from: the caller sees what is not finite
            uniform(readable.shape)
            score = torch.full_like(readable, torch.nan)
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
    return SampledSum([None if part is None else _wide(part) * unit for part in parts], weight)


def _wide(part: Tensor) -> Tensor:
    part = part.to_dense() if part.is_sparse else part
    return part if part.dtype == torch.float64 else part.float()
