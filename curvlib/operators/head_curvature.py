r"""Gauss-Newton products through a head that the loss owns, a chunk of tokens at a time.

With hidden states :math:`h(\theta)`, a head :math:`z = h W^T + b` and a symmetric matrix :math:`C`
in the logits, the product :math:`J^T C J v` along :math:`(\dot h, \dot W, \dot b)` is, for each
chunk of tokens,

.. math:: c = C \, (\dot h W^T + h \dot W^T + \dot b), \qquad
    \bar h = c W, \quad \bar W = c^T h, \quad \bar b = \textstyle\sum_t c_t,

where :math:`\dot h = J_h v` and :math:`J_h^T \bar h` are the body's
(:mod:`curvlib.operators.gauss_newton`). For ``K`` columns the chunks are ``K`` times smaller:
``1 + 4 K`` products of ``[tokens, V]`` with ``[V, d]`` in all, none larger than ``[chunk, V]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvlib.core.batch import Batch
from curvlib.core.chunked_logits import Logits, add_product, tangents
from curvlib.core.loss import Loss
from curvlib.operators.labels import SampledLabels, label_scores
from curvlib.operators.loss_hessian import expected_hessian, term_weights

#: Of a place among the tokens, its logits ``[rows, V]`` and their tangents ``[K, rows, V]``.
Visit = Callable[[slice, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ChunkCurvature:
    """A matrix ``C`` in the logits of a batch, by chunks of tokens.

    Attributes:
        product: Cotangents ``[K, rows, V]`` of one chunk.
        before: Sees every chunk before the first product, where ``C`` couples tokens.
        copies: Tensors of the logits' shape that a product makes.
    """

    product: Visit
    before: Callable[[slice, Tensor, Tensor], None] | None = None
    copies: int = 1


def expected_chunks(batch: Batch, _: Logits) -> ChunkCurvature:
    """The Hessian of the loss terms, which is their type-2 Fisher information."""
    loss, targets = _plain(batch)

    def product(place: slice, logits: Tensor, along: Tensor) -> Tensor:
        return expected_hessian(loss, logits, targets[place])(along)

    return ChunkCurvature(product)


def sampled_chunks(batch: Batch, _: Logits, labels: SampledLabels) -> ChunkCurvature:
    """The Fisher information with targets that are drawn from the model's predictions."""
    loss, targets = _plain(batch)
    numbers = labels.uniform(batch.target.shape).flatten(1)

    def product(place: slice, logits: Tensor, along: Tensor) -> Tensor:
        scores = label_scores(loss, logits, lambda _: numbers[:, place])
        out = torch.zeros_like(along)
        for score in scores:
            out += score * (along * score).sum(-1, keepdim=True)
        return out.mul_(term_weights(loss, logits, targets[place]) / labels.samples)

    return ChunkCurvature(product, copies=labels.samples)


def empirical_chunks(batch: Batch, logits: Logits) -> ChunkCurvature:
    """The squares of the gradients of each example's summed loss terms."""
    linear, target = batch.risk.loss.linear, batch.target
    assert linear is not None
    terms = linear.terms(logits, target)
    examples = target.shape[0] if target.ndim else 1
    owner = torch.arange(examples, device=target.device).repeat_interleave(
        target.numel() // max(1, examples)
    )
    inner: list[Tensor] = []

    def scores(place: slice, own: Tensor) -> Tensor:
        return terms.at(place).scores(own.softmax(-1), torch.ones_like(terms.total[place]))

    def before(place: slice, own: Tensor, along: Tensor) -> None:
        if place.start == 0:
            inner[:] = [along.new_zeros((along.shape[0], examples))]
        found = torch.einsum("kcv,cv->kc", along, scores(place, own))
        inner[0].index_add_(1, owner[place], found)

    def product(place: slice, own: Tensor, _: Tensor) -> Tensor:
        return inner[0][:, owner[place], None] * scores(place, own)

    return ChunkCurvature(product, before)


def _plain(batch: Batch) -> tuple[Loss, Tensor]:
    """The loss of logits, and the targets of all tokens."""
    return replace(batch.risk.loss, linear=None), batch.target.reshape(-1)


class HeadProduct:
    """Products ``J^T C J`` of the head alone, for one batch.

    Args:
        batch: The batch.
        hidden: What the head gets, detached.
        curvature: Makes ``C``.
    """

    def __init__(
        self, batch: Batch, hidden: Tensor, curvature: Callable[[Batch, Logits], ChunkCurvature]
    ) -> None:
        linear = batch.risk.loss.linear
        assert linear is not None
        self.batch = batch
        self.logits = linear.logits(hidden)
        linear.terms(self.logits, batch.target)  # that output and target fit
        self.curvature = curvature(batch, self.logits)
        owned = {id(p): name for name, p in batch.risk.params.items()}
        self.weight = owned.get(id(linear.head.weight))
        self.bias = owned.get(id(getattr(linear.head, "bias", None)))

    @torch.no_grad()
    def __call__(self, along: Tensor | None, columns: Tensor, out: Tensor) -> Tensor:
        """Adds the head's part of a product to ``out``, and returns the hidden states' cotangents.

        Args:
            along: Tangents of the hidden states ``[K, *hidden.shape]``; ``None`` for zeros.
            columns: ``[P, K]``.
            out: ``[P, K]``, of contiguous columns.
        """
        logits, count = self.logits, columns.shape[1]
        dtype = logits.hidden.dtype
        rows = None if along is None else along.reshape(count, *logits.rows.shape).to(dtype)
        vectors = self._part(columns, self.weight), self._part(columns, self.bias)
        if vectors[0] is not None:
            vectors = vectors[0].to(dtype), vectors[1]
        weight, bias = self._part(out, self.weight), self._part(out, self.bias)
        size = count * self.curvature.copies
        if self.curvature.before is not None:
            for place, own in logits.chunks(size):
                self.curvature.before(place, own, self._tangents(place, rows, vectors))
        back = [logits.rows.new_empty((count, 0, logits.rows.shape[1]))]
        for place, own in logits.chunks(size):
            c = self.curvature.product(place, own, self._tangents(place, rows, vectors))
            if bias is not None:
                bias.add_(c.sum(1), alpha=self.batch.scale)
            c = c.to(dtype)
            if along is not None:
                back.append(c @ logits.weight)
            if weight is not None:
                for own_out, left in zip(weight, c, strict=True):
                    add_product(own_out, left, logits.rows[place], self.batch.scale)
        found = torch.cat(back, 1)
        return found.reshape(count, *logits.hidden.shape) if along is not None else found

    def _tangents(
        self, place: slice, along: Tensor | None, vectors: tuple[Tensor | None, Tensor | None]
    ) -> Tensor:
        logits = self.logits
        weight, bias = vectors
        return tangents(
            logits.rows[place],
            logits.weight,
            None if along is None else along[:, place],
            weight,
            bias,
        )

    def _part(self, flat: Tensor, name: str | None) -> Tensor | None:
        """A parameter's rows of ``[P, K]`` as ``[K, *shape]``, a view."""
        if name is None:
            return None
        space = self.batch.risk.space
        shape = space.shapes[space.names.index(name)]
        part: Tensor = flat.mT[:, space.slice(name)].unflatten(1, shape)
        return part
