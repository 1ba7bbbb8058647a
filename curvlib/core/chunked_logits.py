r"""Logits that are computed a chunk of tokens at a time, and their cross-entropy's derivatives.

With hidden states :math:`h_t \in \mathbb{R}^d`, a head :math:`z_t = W h_t + b` over a vocabulary of
:math:`V` and targets :math:`y_t`, the loss terms are

.. math:: \ell_t = \alpha_t \log \sum_c e^{z_{tc}} - \langle q_t, z_t \rangle, \qquad
    \alpha_t = \sum_c q_{tc},

with :math:`q_t = a_{y_t} e_{y_t}` (class weights :math:`a`, zero for ignored targets), mixed with
:math:`a / V` by label smoothing. The logits of all tokens, ``[tokens, V]``, are most of a language
model's memory, and second derivatives need several of them. Here they are made for ``chunk``
tokens, used and dropped: in the loss, in its gradient :math:`\zeta_t = \alpha_t p_t - q_t` with
:math:`p = \operatorname{softmax}(z)`, :math:`\bar h = \zeta W`, :math:`\bar W = \zeta^T h`, and in
the derivative of that gradient along :math:`(u, U, \beta)`,

.. math:: r = u W^T + h U^T + \beta, \quad D = \alpha \, (\operatorname{diag} p - p p^T) \, r, \quad
    \dot h = D W + \zeta U, \quad \dot W = D^T h + \zeta^T u, \quad \dot b = \textstyle\sum_t D_t.

In units of ``2 T V d`` floating-point operations (one matrix product), the loss takes 1, its
gradient 3 and the derivative of that 7; without chunks it is 1, 2 and 6. Memory beyond the vectors
is about 5 ``chunk * V`` numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Logits:
    """Logits that are not computed until a chunk of them is needed.

    Attributes:
        hidden: What the head gets, ``[..., d]``.
        weight: The head's, ``[V, d]``.
        bias: The head's, ``[V]``, if it has one.
        chunk: Rows that may be computed at the same time.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    chunk: int

    @property
    def rows(self) -> Tensor:
        """The hidden states of all tokens, ``[T, d]``."""
        return self.hidden.reshape(-1, self.hidden.shape[-1])

    def chunks(self, count: int = 1) -> Iterator[tuple[slice, Tensor]]:
        """Places among the flattened tokens and their logits ``[rows, V]``, float32 for half.

        Args:
            count: How many tensors of the logits' shape the caller makes of each chunk.
        """
        rows = self.rows
        for place in _places(len(rows), max(1, self.chunk // count)):
            yield place, _logits(rows[place], self.weight, self.bias)


@dataclass(frozen=True, eq=False)
class Terms:
    """The constants of ``T`` loss terms.

    Attributes:
        index: Targets ``[T]``, 0 where they are ignored.
        total: ``alpha``, ``[T]``.
        own: Part of ``q`` at the target, ``[T]``.
        valid: 0 for ignored targets, else 1, ``[T]``.
        smooth: Part of ``q`` at every class, ``[V]``, if any.
        chunk: Tokens at a time.
    """

    index: Tensor
    total: Tensor
    own: Tensor
    valid: Tensor
    smooth: Tensor | None
    chunk: int

    def chunks(self) -> Iterator[tuple[slice, Terms]]:
        """Places of chunks, and their terms."""
        return ((place, self.at(place)) for place in _places(len(self.index), self.chunk))

    def at(self, place: slice) -> Terms:
        """The terms of one chunk."""
        return replace(
            self,
            index=self.index[place],
            total=self.total[place],
            own=self.own[place],
            valid=self.valid[place],
        )

    def targets(self, z: Tensor) -> Tensor:
        """``<q, z>`` of a chunk, ``[rows]``."""
        out = z.gather(1, self.index.unsqueeze(1)).squeeze(1) * self.own
        return out if self.smooth is None else out + (z @ self.smooth) * self.valid

    def scores(self, p: Tensor, scale: Tensor) -> Tensor:
        """``scale * (alpha p - q)`` of a chunk, ``[rows, V]``."""
        out = p * (scale * self.total).unsqueeze(1)
        out = out.scatter_add_(1, self.index.unsqueeze(1), -(scale * self.own).unsqueeze(1))
        return out if self.smooth is None else out.addr_(scale * self.valid, self.smooth, alpha=-1)


def losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms) -> Tensor:
    """Loss terms ``[T]`` of hidden states ``[T, d]``, twice differentiable chunk by chunk."""
    apply: Any = _Losses.apply
    out: Tensor = apply(hidden, weight, bias, terms)
    return out


class _Losses(torch.autograd.Function):
    """Loss terms ``[T]`` of hidden states ``[T, d]``, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.terms = terms
        out = [terms.total[:0]]
        for s, part in terms.chunks():
            z = _logits(hidden[s], weight, bias)
            out.append(part.total * z.logsumexp(1) - part.targets(z))
        return torch.cat(out)

    @staticmethod
    def backward(ctx: Any, *scales: Tensor) -> Any:
        needs = ctx.needs_input_grad[:3]
        apply: Any = _Gradient.apply
        return *apply(*ctx.saved_tensors, scales[0], ctx.terms, needs), None


class _Gradient(torch.autograd.Function):
    """The gradient of loss terms, weighted by ``scale [T]``, in hidden states and the head.

    Its own backward is made of differentiable operations: third derivatives exist, but their graph
    holds all chunks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor,
        terms: Terms,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(hidden, weight, bias, scale)
        ctx.terms = terms
        ctx.set_materialize_grads(False)
        sums = _Sums(hidden, weight, needs)
        for s, part in terms.chunks():
            p = _logits(hidden[s], weight, bias).softmax(1)
            sums.add((part.scores(p, scale[s]), hidden[s], weight))
        return sums.parts()

    @staticmethod
    def backward(ctx: Any, *along: Tensor | None) -> Any:
        hidden, weight, bias, scale = ctx.saved_tensors
        u, U, beta = along
        sums = _Sums(hidden, weight, ctx.needs_input_grad[:3])
        by_scale = [scale[:0]]
        for s, part in ctx.terms.chunks():
            h, v = hidden[s], None if u is None else u[s]
            p = _logits(h, weight, bias).softmax(1)
            r = tangents(h, weight, v, U, beta)
            mean = (p.unsqueeze(1) @ r.unsqueeze(2)).squeeze(2)
            by_scale.append(part.total * mean.squeeze(1) - part.targets(r))
            turned = (r - mean) * p * (scale[s] * part.total).unsqueeze(1)
            del r
            sums.add((turned, h, weight), (part.scores(p, scale[s]), v, U))
        return *sums.parts(), torch.cat(by_scale), None, None


class _Sums:
    """Collects ``left @ weight`` of chunks, and sums ``left^T @ hidden`` and ``left`` over them."""

    def __init__(self, hidden: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]) -> None:
        self.dtype = hidden.dtype
        dtype = wide(self.dtype)
        self.rows: list[Tensor] | None = [hidden[:0]] if needs[0] else None
        self.weight = torch.zeros_like(weight, dtype=dtype) if needs[1] else None
        self.bias = weight.new_zeros(len(weight), dtype=dtype) if needs[2] else None

    def add(self, *products: tuple[Tensor, Tensor | None, Tensor | None]) -> None:
        """Adds ``(left, hidden, weight)`` of one chunk; the bias sees the first ``left`` alone."""
        rows: Tensor | None = None
        if self.bias is not None:
            self.bias += products[0][0].sum(0)
        for left, hidden, weight in products:
            left = left.to(self.dtype)
            if self.rows is not None and weight is not None:
                rows = left @ weight if rows is None else rows + left @ weight
            if self.weight is not None and hidden is not None:
                add_product(self.weight, left, hidden)
        if self.rows is not None and rows is not None:
            self.rows.append(rows)

    def parts(self) -> tuple[Tensor | None, ...]:
        """The three, in the parameters' type."""
        weight, bias = self.weight, self.bias
        return (
            None if self.rows is None else torch.cat(self.rows),
            None if weight is None else weight.to(self.dtype),
            None if bias is None else bias.to(self.dtype),
        )


def tangents(
    hidden: Tensor,
    weight: Tensor,
    along_hidden: Tensor | None,
    along_weight: Tensor | None,
    along_bias: Tensor | None,
) -> Tensor:
    """Derivative of logits ``[rows, V]`` along directions, or ``[K, rows, V]`` of ``K`` columns.

    Args:
        hidden: ``[rows, d]``.
        weight: ``[V, d]``.
        along_hidden: Direction ``[rows, d]`` or ``[K, rows, d]``; ``None`` stands for zeros.
        along_weight: ``[V, d]`` or ``[K, V, d]``.
        along_bias: ``[V]`` or ``[K, V]``.
    """
    dtype, out = wide(hidden.dtype), None
    if along_hidden is not None:
        out = (along_hidden @ weight.mT).to(dtype)
    if along_weight is not None:
        part = hidden @ along_weight.mT
        out = part.to(dtype) if out is None else out.add_(part)
    if along_bias is not None:
        part = along_bias.unsqueeze(-2).to(dtype)
        out = part.expand(*part.shape[:-2], len(hidden), -1) if out is None else out.add_(part)
    return hidden.new_zeros((len(hidden), len(weight)), dtype=dtype) if out is None else out


def add_product(out: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """Adds ``scale * left^T @ right`` in place, in the type of ``out``."""
    if out.dtype == left.dtype:
        out.addmm_(left.mT, right, alpha=scale)
    else:
        out.add_(left.mT @ right, alpha=scale)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(hidden, weight, bias).to(wide(hidden.dtype))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which numbers of a type are summed."""
    return torch.float32 if dtype in _HALF else dtype


def _places(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
