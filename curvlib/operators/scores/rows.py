r"""Gradients of examples in a block as sums of products of rows, and what rows belong to.

The terms of one block in one pass: pairs of rows ``left`` ``[G, n, T, O]`` (or indices ``[n, T]``)
and ``right`` ``[G, n, T, I]``, as of :class:`~curvlib.operators.scores.directions.BlockDirections`,
such that :math:`G_n = \sum \sum_t l_{nt} r_{nt}^\top`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlib.operators.layers.factored import FactoredLayer, on_channels
from curvlib.operators.layers.rows import (
    embedding_rows,
    input_matrix,
    normalized,
    output_matrix,
)
from curvlib.operators.layers.use import Use
from curvlib.operators.scores.blocks import ScoreBlock
from curvlib.operators.scores.directions import CHUNK
from curvlib.operators.scores.passes import GradientPass


@dataclass(frozen=True, eq=False)
class Term:
    """Products of rows.

    Attributes:
        left: ``[G, n, T, O]``, or indices ``[n, T]`` of one-hot rows.
        right: ``[G, n, T, I]``.
        places: Shape of the places that the rows are of, examples included; ``None`` if unknown.
    """

    left: Tensor
    right: Tensor
    places: tuple[int, ...] | None


def terms(
    block: ScoreBlock,
    found: GradientPass,
    at: slice,
    dtype: torch.dtype,
    *,
    apart: bool = False,
    ones: bool = True,
) -> Iterator[Term]:
    """The terms of some examples of a pass.

    Args:
        block: The block.
        found: The pass.
        at: Which examples.
        dtype: Type of the rows.
        apart: Whether uses, and the places of normalization layers, are kept apart.
        ones: Whether the column of ones, of biases, is there.
    """
    if block.name in found.whole:
        right = found.whole[block.name][at].to(dtype).transpose(0, 1)
        _, n, O, _ = right.shape
        eye = torch.eye(O, dtype=dtype, device=right.device)
        yield Term(eye.expand(block.shape[0], n, O, O), right, None)
        return
    layer = block.layer
    if layer is None:
        return
    n = found.examples
    own = [
        (use, gradient)
        for use, gradient in found.one.with_gradients(block.name, found.outputs)
        if gradient is not None and use.rows(n) != 0
    ]  # (an expert that gets no token may be called with no row)
    matrices = [(use, g) for use, g in own if use.role == "matrix"]
    for group in [[pair] for pair in matrices] if apart else [matrices]:
        if group:
            uses, gradients = [use for use, _ in group], [g for _, g in group]
            left = output_matrix(layer, uses, gradients, n, at, dtype)
            right = input_matrix(layer, uses, n, at, dtype, ones=ones)
            yield Term(left, right, uses[0].places if len(uses) == 1 else None)
    for use, gradient in own:
        if use.role == "embedding":
            index, rows, _ = embedding_rows(use, gradient, n, at, dtype)
            yield Term(index, rows[None], use.places)
        elif use.role == "scale":
            rows = scale_places(layer, use, gradient, n, at, dtype)
            rows = rows if apart else rows.sum(1, True)
            yield Term(rows.new_ones((1, *rows.shape[:2], 1)), rows[None], _norm_places(use))


def scale_places(
    layer: FactoredLayer, use: Use, gradient: Tensor, n: int, at: slice, dtype: torch.dtype
) -> Tensor:
    """Gradients by a normalization layer's weight (and bias) at each place, ``[n, T, I]``."""
    g = gradient.to(dtype)
    products = [] if layer.weight is None else [g * normalized(use).to(dtype)]
    products += [] if layer.bias is None else [g]
    moved = [p.movedim(1, -1) if on_channels(use.module) else p for p in products]
    weight = use.module._parameters.get("weight")
    size = moved[0].shape[-1] if weight is None else weight.numel()
    return torch.cat([p.reshape(n, -1, size)[at] for p in moved], -1)


def _norm_places(use: Use) -> tuple[int, ...]:
    shape = tuple(use.x.shape)
    if on_channels(use.module):
        return (shape[0], *shape[2:])
    weight = use.module._parameters.get("weight")
    return shape[: len(shape) - (1 if weight is None else weight.ndim)]


def chunks(block: ScoreBlock, found: GradientPass, like: torch.dtype) -> Iterator[slice]:
    """Examples that are done at once, so that rows and gradients fit."""
    n = found.examples
    G, O, I = block.shape
    rows = [use.rows(n) or 0 for use in found.one.of(block.name)]
    each = G * (sum(rows) * (O + I) + O * I)
    step = max(1, CHUNK // max(1, each * like.itemsize))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def matrices(block: ScoreBlock, parts: Sequence[Term], like: Tensor) -> Tensor:
    """Gradients as matrices, ``[n, G, O, I]``; ``like`` is zeros of that shape."""
    out = like
    for term in parts:
        if term.left.is_floating_point():
            out += (term.left.mT @ term.right).transpose(0, 1)
            continue
        n, size = len(out), block.shape[1]
        places = torch.arange(n, device=out.device)[:, None] * size + term.left
        flat = out.view(-1, block.shape[2])
        flat.index_add_(0, places.reshape(-1), term.right[0].flatten(0, 1))
    return out


def norms(parts: Sequence[Term], n: int, like: Tensor) -> Tensor:
    """Frobenius norms of gradients, ``[n]``, of all terms together."""
    out = like.new_zeros(n)
    for i, term in enumerate(parts):
        out += _square(term)
        for other in parts[:i]:
            out += 2.0 * (_inner(term.left, other.left) * (term.right @ other.right.mT)).sum(
                (0, 2, 3)
            )
    return out.clamp_(min=0.0).sqrt_()


def _square(term: Term) -> Tensor:
    """Squared norms of one term, ``[n]``."""
    _, _, T, width = term.right.shape
    one_hot = not term.left.is_floating_point()
    outputs = 0 if one_hot else term.left.shape[-1]
    if one_hot or T * (outputs + width) < outputs * width:
        return (_inner(term.left, term.left) * (term.right @ term.right.mT)).sum((0, 2, 3))
    return (term.left.mT @ term.right).square().sum((0, 2, 3))


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of left rows ``[G, n, T, S]``, each as of :class:`Term`."""
    if a.is_floating_point() and b.is_floating_point():
        return a @ b.mT
    if b.is_floating_point():
        return _inner(b, a).mT
    if a.is_floating_point():  # what rows have at the indices
        index = b[None, :, None].expand(-1, -1, a.shape[2], -1)
        return a.gather(3, index)
    return (a[:, :, None] == b[:, None])[None]


def by_token(values: Tensor, places: tuple[int, ...] | None, n: int, tokens: int) -> Tensor | None:
    """Scores of rows as scores of tokens, or ``None`` if the rows are of no tokens.

    Rows are of tokens where a layer takes them along an axis as long as there are tokens, the
    first one if there are several; other axes are summed.

    Args:
        values: Scores of rows, ``[k, Q, T']``.
        places: Shape of the places of all ``n`` examples of the pass.
        n: Examples of the pass.
        tokens: ``T``.

    Returns:
        ``[k, Q, T]``.
    """
    if tokens == 1:
        return values.sum(-1, keepdim=True)
    if not places or places[0] % n:
        return None
    axes = (places[0] // n, *places[1:])
    if tokens not in axes or math.prod(axes) != values.shape[-1]:
        return None
    axis = 2 + axes.index(tokens)
    return (
        values.unflatten(-1, axes).movedim(axis, 2).flatten(3).sum(-1) if len(axes) > 1 else values
    )
