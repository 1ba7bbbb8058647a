r"""What a forward and a backward pass showed of layers, and the scale of Fisher matrices of it.

The user's loss is :math:`\frac1W \sum_t \ell_t` over :math:`W` loss terms, so what arrives
are gradients :math:`\hat g = g / W` of terms :math:`g`, but Fisher matrices are means of squares:

.. math:: \frac1W \sum_t g_t g_t^\top = W \sum_t \hat g_t \hat g_t^\top .

*Accumulation*: where a step's gradient is that of ``k`` micro-batches, each loss divided by ``k``,
:math:`\hat g = g / (k W_i) = g / W` with the terms of all :math:`W = \sum_i W_i`, so squares *and*
terms are added, and multiplied at the end. *Ranks*: each has the mean over its own, and gradients
are averaged: :math:`\hat g = R g / W`, so :math:`W / R^2` times the sum over ranks. *AMP*: divided
by the loss scale once more. ``loss.reduction == "sum"`` has :math:`\hat g = g` and the factor 1.
:func:`factor_of_squares` is that factor. *Sampled* labels' scores are pulled back
unscaled, hence :math:`\frac1W \sum_t g_t g_t^\top` with the terms that have a gradient at all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvlib.operators.layers.use import Use, Uses


@dataclass(frozen=True, eq=False)
class Recorded(Uses):
    """What one forward and backward pass showed.

    Attributes:
        uses: Calls of layers' modules, in order.
        gradients: At the output of each, as the user's backward pass brought them.
        sampled: Those of sampled labels' scores, if they were asked for.
        examples: How many examples there are.
        terms: ``W``, loss terms, float64: see :class:`LayerRecorder`.
        sum_of_terms: Whether the loss is a sum, so that gradients are not divided by ``terms``.
        mixed: Layers whose rows are in another order than example after example.
    """

    uses: tuple[Use, ...]
    gradients: tuple[Tensor | None, ...]
    sampled: tuple[Tensor | None, ...] | None
    examples: int
    terms: Tensor
    sum_of_terms: bool
    mixed: frozenset[str] = frozenset()

    def aligned(self, layer: str) -> bool:
        """Whether rows of a layer can be told apart by example."""
        return layer not in self.mixed and all(
            use.rows(self.examples) is not None for use in self.of(layer)
        )

    def merged(self) -> Recorded:
        """The same with all rows as one example, which is enough for sums over rows."""
        return replace(self, examples=1)


def factor_of_squares(
    terms: Tensor, *, sampled: bool, sum_of_terms: bool, ranks: int = 1, scale: float = 1.0
) -> Tensor:
    """The factor that makes sums of squared gradients a Fisher matrix of the mean loss.

    Args:
        terms: ``W``, added up over micro-batches and ranks.
        sampled: Whether the gradients are of sampled labels' scores.
        sum_of_terms: Whether the loss is a sum of its terms.
        ranks: Over which gradients are averaged.
        scale: Of the loss, by which it was multiplied before the backward pass (AMP).

    Example:
        >>> W = torch.tensor(8.0, dtype=torch.float64)
        >>> float(factor_of_squares(W, sampled=False, sum_of_terms=False, ranks=2))
        2.0
    """
    if sampled:
        return torch.ones_like(terms) if sum_of_terms else 1.0 / terms.clamp(min=1.0)
    own = torch.ones_like(terms) if sum_of_terms else terms
    return own / (ranks * scale) ** 2
