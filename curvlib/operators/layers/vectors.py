r"""Rank-one statistics of factored layers: sums of rows, or of rows with random signs.

A layer's gradient is a sum of products :math:`g_t a_t^\top`. A plain sum of rows gives the mean
:math:`\bar a`, and :math:`\bar a \bar a^\top` is no second moment: it has one direction, the
same in most batches, and the sum of :math:`g` is zero where training has converged. With signs
:math:`z_t = \pm 1`, independent and of mean zero,

.. math:: v = \frac{1}{\sqrt T} \sum_t z_t a_t, \qquad E \, v v^\top = \frac1T \sum_t a_t a_t^\top,

so :math:`v v^\top` is an unbiased estimate of the second moment, of the same rank. Signs are those
of an example's content (see :mod:`curvlib.core.content_numbers`), so that micro-batches and
ranks add up to what one large batch would give.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvlib.core.content_numbers import content_uniform
from curvlib.operators.layers import rows as layer_rows
from curvlib.operators.layers.factored import FactoredLayer
from curvlib.operators.layers.recorded import Recorded
from curvlib.operators.layers.use import Use

#: Bytes of rows that are held at once.
CHUNK = 1 << 26


@dataclass(frozen=True)
class Signs:
    """Random signs of rows.

    Attributes:
        vectors: ``k``, how many sets of signs.
        seed: A string.
    """

    vectors: int
    seed: str


def summable(layer: FactoredLayer) -> str:
    """Why :func:`row_sums` does not know the rows of a layer, or nothing."""
    if layer.roles == ("scale",):
        return "the gradient of a normalization layer is no product of two sides"
    if len(layer.roles) > 1:
        return "it is shared by an embedding and a linear layer, whose sides are exchanged"
    return ""


def row_sums(
    layer: FactoredLayer,
    found: Recorded,
    dtype: torch.dtype,
    *,
    signs: Signs | None = None,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """Sums over the rows of a layer in one pass, additive over passes and ranks.

    Args:
        layer: A layer that is :func:`summable`.
        found: A pass.
        dtype: Of the sums.
        signs: Signs of the rows; without, ``k = 1``. Rows that cannot be told apart by example
            have signs of their place in the batch.
        scale: What the user's loss was multiplied by.

    Returns:
        ``left``: of gradients at the outputs, ``[G, k, O]``, and ``right``: of inputs,
        ``[G, k, I]`` (of an embedding, whose inputs are indices: of gradients), each if the side
        is dense; ``rows`` and ``terms``, how many there are. Nothing, if the layer was not used.

    Example:
        >>> from torch import nn
        >>> from curvlib.operators.layers.recorder import LayerRecorder
        >>> model, passes = nn.Linear(2, 1), []
        >>> recorder = LayerRecorder(model, sink=passes.append)
        >>> recorder.start()
        >>> model(torch.tensor([[1.0, 2.0], [3.0, 5.0]])).sum().backward()
        >>> recorder.flush()
        >>> row_sums(recorder.layers[0], passes[0], torch.float32)["right"]
        tensor([[[4., 7., 2.]]])
    """
    pairs = [
        (use, gradient)
        for use, gradient in found.with_gradients(layer.name, found.gradients)
        if gradient is not None
    ]
    if not pairs:
        return {}
    n = found.examples if found.aligned(layer.name) else 1
    T = sum(use.rows(n) or 0 for use, _ in pairs)
    k = 1 if signs is None else signs.vectors
    weights = None if signs is None else _signs(signs, found, n, T, dtype)
    G, out, width = layer.shape
    embedding = layer.roles == ("embedding",)
    total = zero_sums(layer, dtype, k, pairs[0][1].device)
    total["rows"] += n * T
    total["terms"] += found.terms
    step = max(1, CHUNK // max(1, T * G * max(width, 1 if embedding else out) * dtype.itemsize))
    for start in range(0, n, step):
        at = slice(start, min(start + step, n))
        own = None if weights is None else weights[:, at]
        if embedding:
            total["right"] += _summed(_embedded(pairs, n, at, dtype), own) / scale
            continue
        uses, gradients = [use for use, _ in pairs], [gradient for _, gradient in pairs]
        if "right" in total:
            total["right"] += _summed(layer_rows.input_matrix(layer, uses, n, at, dtype), own)
        if "left" in total:
            rows = layer_rows.output_matrix(layer, uses, gradients, n, at, dtype)
            total["left"] += _summed(rows, own) / scale
    return total


def zero_sums(
    layer: FactoredLayer, dtype: torch.dtype, k: int, device: torch.device
) -> dict[str, Tensor]:
    """What :func:`row_sums` returns for no rows.

    Args:
        layer: A layer.
        dtype: Of the sums.
        k: Sets of signs, or 1.
        device: Of the sums.
    """
    G, out, width = layer.shape
    zeros = {
        "rows": torch.zeros((), dtype=torch.float64, device=device),
        "terms": torch.zeros((), dtype=torch.float64, device=device),
    }
    if layer.left_dense:
        zeros["left"] = torch.zeros((G, k, out), dtype=dtype, device=device)
    if layer.right_dense:
        zeros["right"] = torch.zeros((G, k, width), dtype=dtype, device=device)
    return zeros


def vectors(
    layer: FactoredLayer, sums: dict[str, Tensor], *, signed: bool, ranks: int = 1
) -> tuple[Tensor | None, Tensor | None]:
    r"""The vectors of the left and of the right side, ``[G, k, d]``, of sums over a whole step.

    The mean row; or with signs the vectors whose mean outer product estimates the second moment.
    Gradients are those of the mean loss (see :mod:`curvlib.operators.layers.recorded`): their sum
    is the mean over terms already, and with signs it is multiplied by :math:`\sqrt W`.

    Args:
        layer: The layer.
        sums: Of :func:`row_sums`, over all micro-batches and ranks.
        signed: Whether with signs.
        ranks: How many ranks there are.
    """
    rows, terms = sums["rows"].clamp(min=1.0), sums["terms"]
    of_inputs = 1.0 / (rows.sqrt() if signed else rows)
    of_gradients = (terms.sqrt() if signed else torch.ones_like(terms)) / ranks
    left, right = sums.get("left"), sums.get("right")
    if left is not None:
        left = left * of_gradients.to(left.dtype)
    if right is not None:
        factor = of_gradients if layer.roles == ("embedding",) else of_inputs
        right = right * factor.to(right.dtype)
    return left, right


def _summed(rows: Tensor, weights: Tensor | None) -> Tensor:
    """``[G, k, d]`` of rows ``[G, n, T, d]`` and weights ``[k, n, T]``."""
    if weights is None:
        return rows.sum((1, 2))[:, None]
    return weights.flatten(1) @ rows.flatten(1, 2)


def _embedded(pairs: list[tuple[Use, Tensor]], n: int, at: slice, dtype: torch.dtype) -> Tensor:
    parts = [layer_rows.embedding_rows(use, g, n, at, dtype)[1] for use, g in pairs]
    return torch.cat(parts, 1)[None]


def _signs(signs: Signs, found: Recorded, n: int, T: int, dtype: torch.dtype) -> Tensor:
    """Signs ``[k, n, T]``: those of the first layer's input, which is the model's, say."""
    shape = torch.Size([n, T * signs.vectors])
    if n == found.examples:
        uniform = content_uniform(found.uses[0].x.reshape(n, -1), n, signs.seed, shape)
    else:
        uniform = content_uniform((), n, signs.seed, shape)
    drawn = torch.where(uniform < 0.5, -1.0, 1.0).to(dtype)
    return drawn.reshape(n, T, signs.vectors).permute(2, 0, 1).to(found.uses[0].x.device)
