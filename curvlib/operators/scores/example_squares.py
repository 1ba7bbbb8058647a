r"""Squares of per-example gradients in a metric, streamed batch by batch and block by block.

.. math:: s_n = g_n^\top M g_n = \sum_b \sum_{oi} W^{(b)}_{oi}\,
          \bigl(Q_L^\top G_n^{(b)} Q_R\bigr)_{oi}^2 ,

with the gradient :math:`g_n` of the *sum* of the loss terms of example ``n``
(:mod:`curvlib.operators.scores.example_scores`), in the blocks of
:mod:`curvlib.operators.scores.blocks`, for a metric that is diagonal with the entries ``W`` in an
eigenbasis of Kronecker factors: the inverse of a damped EK-FAC, say. Of a layer with one row for
each example that is :math:`(\tilde g^{\circ 2})^\top W \tilde a^{\circ 2}` with the rotated rows,
and no matrix :math:`[O, I]` is formed for an example; otherwise the route is the cheapest of
:mod:`curvlib.operators.factors.squares`. Memory is for the gradients of one layer, never for all
parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from curvlib.core.kronecker_blocks import KroneckerBlock
from curvlib.core.risk import Risk
from curvlib.operators.factors import squares as kfac_squares
from curvlib.operators.scores.blocks import ScoreBlock, score_blocks
from curvlib.operators.scores.passes import GradientPass, GradientPasses
from curvlib.operators.scores.rows import Term, chunks, matrices, norms, terms

#: Metrics by block; ``None`` is the identity.
Metrics = Mapping[str, KroneckerBlock | None]


def example_squares(risk: Risk, metrics: Metrics) -> Iterator[Tensor]:
    """Squares of the gradients of all examples, in their order, ``[n]`` for each batch.

    Args:
        risk: Model, loss, data and parameters.
        metrics: Of every block of the risk, with the entries ``W`` as eigenvalues, in the type of
            the parameters' vectors.

    Raises:
        ValueError: If blocks are missing, or have another shape; or as
            :func:`~curvlib.operators.scores.example_scores.example_scores`.
        FloatingPointError: If a square is not finite; names the layer if its input or gradient is
            not.

    Example:
        >>> import torch, curvlib as cl
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> x, y = torch.tensor([[3.0, 4.0]]), torch.tensor([[7.5]])
        >>> risk = cl.Risk(model, torch.nn.MSELoss(), (x, y))
        >>> [part.tolist() for part in example_squares(risk, {"weight": None})]  # g = -x
        [[25.0]]
    """
    blocks = score_blocks(risk)
    _require_fitting(blocks, metrics)
    passes = GradientPasses(risk, blocks)
    batches = risk.stream.together() if risk.places else risk.batches()
    while True:
        # the model is as it was whenever the caller has control
        with risk.untouched(first_order=True), risk.held.gathering():
            batch = next(batches, None)
            if batch is None:
                return
            found = []
            for one in passes.of(batch):
                own = passes.attempt(partial(_squares, one, blocks, metrics))
                if own is not None and one.counts:
                    found.append(own)
        if not batch.lent:
            yield torch.cat(found)


def _squares(found: GradientPass, blocks: list[ScoreBlock], metrics: Metrics) -> Tensor:
    risk = found.one.batch.risk
    out = risk.space.empty().new_zeros(found.examples)
    for block in blocks:
        metric = metrics[block.name]
        for at in _parts(block, found, metric, out.dtype):
            out[at] += _in_block(block, found, metric, at, out)
    if not bool(torch.isfinite(out).all()):
        found.require_finite()
        raise FloatingPointError(
            f"squares of gradients of batch {found.one.batch.index} are not finite, though inputs "
            "and gradients are: they overflow; use float64, or a larger damping"
        )
    return out


def _parts(
    block: ScoreBlock, found: GradientPass, metric: KroneckerBlock | None, dtype: torch.dtype
) -> Iterator[slice]:
    """Examples that are done at once; of embeddings all, since no matrix is formed."""
    roles = () if block.layer is None else block.layer.roles
    if roles == ("embedding",) and block.name not in found.whole and _plain(metric):
        yield slice(0, found.examples)
    else:
        yield from chunks(block, found, dtype)


def _plain(metric: KroneckerBlock | None) -> bool:
    return metric is None or metric.left is None


def _in_block(
    block: ScoreBlock, found: GradientPass, metric: KroneckerBlock | None, at: slice, like: Tensor
) -> Tensor:
    """Squares of some examples in one block, ``[n]``."""
    n = at.stop - at.start
    if block.name in found.whole:
        return _weighted(found.whole[block.name][at].to(like.dtype), metric)
    parts = list(terms(block, found, at, like.dtype))
    if not parts:
        return like.new_zeros(n)
    one_hot = [not term.left.is_floating_point() for term in parts]
    if _plain(metric) and all(one_hot):
        return _embedded(parts, metric, n, block.shape[1])
    if metric is None:
        return norms(parts, n, like).square()
    if len(parts) > 1 or any(one_hot):
        return _weighted(matrices(block, parts, like.new_zeros((n, *block.shape))), metric)
    return _of_rows(block, parts[0], metric)


def _weighted(X: Tensor, metric: KroneckerBlock | None) -> Tensor:
    """Of matrices ``[n, G, O, I]``."""
    if metric is None:
        return X.square().sum((1, 2, 3))
    return (metric.rotated(X).square() * metric.eigenvalues).sum((1, 2, 3))


def _of_rows(block: ScoreBlock, term: Term, metric: KroneckerBlock) -> Tensor:
    """Of sums of products of rows, by the cheapest route."""
    bases = metric.left, metric.right
    dense = bases[0] is not None, bases[1] is not None
    way = kfac_squares.route(term.right.shape[2], block.shape, dense)
    left, right = term.left, term.right
    out: Tensor
    if way != "form":
        left, right = kfac_squares.rotated(left, bases[0]), kfac_squares.rotated(right, bases[1])
    if way != "pairs":
        found = kfac_squares.matrices(left, right, bases, way)
        out = found.square_().mul_(metric.eigenvalues[:, None]).sum((0, 2, 3))
        return out
    first, second = torch.triu_indices(left.shape[2], left.shape[2], device=left.device)
    twice = (1.0 + (first != second).to(left.dtype))[:, None]
    L = left[:, :, first] * left[:, :, second]
    R = right[:, :, first] * right[:, :, second] * twice
    # one product for all examples: batched ones would copy the weights for each
    weighted = (L.flatten(1, 2) @ metric.eigenvalues).view(R.shape)
    out = (weighted * R).sum((0, 2, 3))
    return out


def _embedded(parts: Sequence[Term], metric: KroneckerBlock | None, n: int, size: int) -> Tensor:
    """Of one-hot rows: sums over the places of each index first, no row that is not used."""
    index = torch.cat([term.left for term in parts], 1)
    rows = torch.cat([term.right for term in parts], 2)
    rows = rows if metric is None else kfac_squares.rotated(rows, metric.right)
    keys = torch.arange(n, device=index.device)[:, None] * size + index
    found, inverse = torch.unique(keys, return_inverse=True)
    sums = rows.new_zeros((len(found), rows.shape[-1]))
    sums.index_add_(0, inverse.reshape(-1), rows[0].flatten(0, 1))
    sums.square_()
    if metric is not None:
        sums *= metric.eigenvalues[0, found % size]
    out: Tensor = rows.new_zeros(n).index_add_(0, found // size, sums.sum(1))
    return out


def _require_fitting(blocks: list[ScoreBlock], metrics: Metrics) -> None:
    names = [block.name for block in blocks]
    if sorted(metrics) != sorted(names):
        raise ValueError(f"expected a metric of each of the blocks {names}, got {sorted(metrics)}")
    for block in blocks:
        own = metrics[block.name]
        if own is not None and tuple(own.eigenvalues.shape) != block.shape:
            raise ValueError(
                f"expected a metric of shape {list(block.shape)} in block {block.name!r}, got "
                f"{list(own.eigenvalues.shape)}"
            )
