r"""Products of each example's own Hessian or GGN, streamed over the data.

With :math:`H_n` the Hessian of the summed (and weighted) loss terms of example ``n`` and
:math:`w_n` their weight,

.. math:: H = \frac1W \sum_n H_n, \qquad W = \sum_n w_n,

and a mini-batch :math:`S` has the Hessian :math:`\sum_{n \in S} H_n / \sum_{n \in S} w_n`. What the
spectrum of a mini-batch is, and how noisy, follows from :math:`H_n V` for a few columns ``V``.

The parameters are repeated for the examples of a block: a ``vmap`` over examples of the *forward*
pass alone, and double backward through all of it, which is right through all normalization layers
(derivatives are never taken inside ``vmap``). Models that ``vmap`` cannot follow go example by
example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from curvlib.core.batch import Batch
from curvlib.core.examples import batch_of_one, chosen_examples, require_independent
from curvlib.core.exhausted import is_exhausted, names_what_fits
from curvlib.core.operator import LinearOperator
from curvlib.core.risk import Risk
from curvlib.operators.columns import batched_quietly
from curvlib.operators.ggn import ggn
from curvlib.operators.graphs import once_differentiable
from curvlib.operators.hessian import hessian
from curvlib.operators.loss_hessian import loss_hessian

#: Numbers in the repeated parameters of a block: the default block is as large as that allows.
BLOCK_NUMBERS = 2**22
_OPERATORS: dict[str, Callable[[Risk], LinearOperator]] = {"hessian": hessian, "ggn": ggn}

#: Products ``[n, P]`` of ``n`` examples with one vector each, given in the parameters' shapes.
Product = Callable[[list[Tensor]], Tensor]


class ExampleProducts:
    """The per-example matrices of a block of examples, known by their products.

    Attributes:
        count: ``n``, the number of examples.
        weights: Weight of each example's loss terms, ``[n]``, float64, on the CPU.
    """

    def __init__(self, risk: Risk, weights: Tensor, product: Product) -> None:
        self.count = int(weights.numel())
        self.weights = weights
        self._risk = risk
        self._product = product

    def matmat(self, columns: Tensor) -> Tensor:
        """Products of each example's matrix.

        Args:
            columns: ``[P, K]``, the same for all examples, or ``[n, P, K]``, of each its own.

        Returns:
            ``[n, P, K]``, in the risk's vector dtype.

        Raises:
            ValueError: If the shape, dtype or device does not fit.
            FloatingPointError: If a product is not finite.
        """
        space = self._risk.space
        fits = columns.ndim in (2, 3) and columns.shape[-2] == space.size
        if not fits or (columns.ndim == 3 and columns.shape[0] != self.count):
            raise ValueError(
                f"expected columns of shape [{space.size}, K], or [{self.count}, {space.size}, K] "
                f"for {self.count} examples, got {list(columns.shape)}"
            )
        if columns.dtype != space.dtype or columns.device != space.device:
            raise ValueError(
                f"expected columns in {space.dtype} on {space.device}, got {columns.dtype} on "
                f"{columns.device}; use .to(...)"
            )
        width = columns.shape[-1]
        out = torch.empty(
            (self.count, width, space.size), dtype=space.dtype, device=space.device
        ).mT
        with self._risk.untouched():
            for k in range(width):
                column = columns[..., k]
                if column.ndim == 1:
                    vectors = [v.expand(self.count, *v.shape) for v in space.split(column)]
                else:
                    vectors = space.split(column.mT)
                out[..., k] = self._product(vectors)
        if not bool(torch.isfinite(out).all()):
            raise FloatingPointError(
                "per-example products have entries that are NaN or infinite; the parameters may "
                "have diverged: risk.check() names the layer"
            )
        return out


def example_products(
    risk: Risk, *, kind: str = "hessian", block: int | None = None, start: int = 0
) -> Iterator[ExampleProducts]:
    """Streams the examples of a risk, block by block, as matrices to multiply by.

    Args:
        risk: Model, loss, data and parameters. Examples of a batch must be independent (no
            batch-statistics BatchNorm, no dropout), which is checked for the first block. All
            tensors of a batch have examples along their first axis.
        kind: ``"hessian"`` or ``"ggn"``.
        block: Examples of a block at most; memory is about that of ``block`` Hessian products.
            About ``2 ** 22 / P`` when omitted, from 1 to 64.
        start: Examples to pass over: as many as the blocks of an earlier iteration held.

    Returns:
        An iterator over blocks, in the order of the data. A block is used before the next one.

    Raises:
        ValueError: If ``kind`` is unknown, ``block`` not positive, ``start`` negative, a batch
            cannot be split into examples, or examples are not independent.

    Example:
        >>> import torch, curvlib as cl
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.randn(5, 2), torch.randn(5, 1)
        >>> risk = cl.Risk(model, torch.nn.MSELoss(), (x, y))
        >>> v = torch.ones(2, 1)
        >>> rows = torch.cat([part.matmat(v) for part in example_products(risk)])
        >>> rows.shape, bool(torch.allclose(rows.mean(0), cl.hessian(risk) @ v))
        (torch.Size([5, 2, 1]), True)
    """
    if kind not in _OPERATORS:
        raise ValueError(f"kind= is one of {', '.join(map(repr, _OPERATORS))}, got {kind!r}")
    if block is None:
        block = max(1, min(64, BLOCK_NUMBERS // risk.space.size))
    if block < 1:
        raise ValueError(f"block= needs at least one example, got {block}")
    if start < 0:
        raise ValueError(f"start= needs a number of examples, at least 0, got {start}")
    return _stream(risk, kind, block, start)


def _stream(risk: Risk, kind: str, block: int, skipped: int) -> Iterator[ExampleProducts]:
    batched = True
    first = True
    batches = risk.batches()
    while True:
        with risk.untouched():  # the model is as it was whenever the caller has control
            batch = next(batches, None)
            if batch is None:
                return
            count = batch.examples
        passed, skipped = min(skipped, count), max(0, skipped - count)
        for start in range(passed, count, block):
            told = names_what_fits("products of examples", {"rows": min(block, count)})
            with told, risk.untouched():
                indices = torch.arange(start, min(start + block, count))
                part = chosen_examples(batch, indices)
                ones = [chosen_examples(part, slice(i, i + 1)) for i in range(len(indices))]
                weights = torch.tensor([float(one.weight) for one in ones], dtype=torch.float64)
                if first:
                    _require_independent(part, ones)
                    first = False
                product = _batched(part, kind) if batched else None
            if product is None:
                batched = False
                product = _looped(ones, weights, kind)
            yield ExampleProducts(risk, weights, product)


# ------------------------------------------------------------------- by vmap
def _batched(batch: Batch, kind: str) -> Product | None:
    """Products on one graph of repeated parameters; ``None`` if ``vmap`` cannot follow."""
    n = batch.examples
    leaves = {
        name: p.detach().expand(n, *p.shape).requires_grad_()
        for name, p in batch.risk.params.items()
    }
    try:
        with batched_quietly():
            return (_hessian_product if kind == "hessian" else _ggn_product)(batch, leaves)
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        if is_exhausted(error):
            raise
        return None  # errors that are the model's own come again, one example at a time


def _hessian_product(batch: Batch, leaves: dict[str, Tensor]) -> Product | None:
    risk = batch.risk
    mean = not (risk.loss.known or risk.loss.reduction == "sum")

    def total(values: dict[str, Tensor], example: Any) -> Tensor:
        one = Batch(risk, batch.index, batch_of_one(example))
        output = risk.call(one.data, values)
        return risk.loss.total(output, one.target, one.weight if mean else 1.0)

    value = torch.func.vmap(total)(leaves, batch.data).sum()
    inputs = list(leaves.values())
    gradient = _grad([value], inputs, None, create_graph=True)
    if once_differentiable([g for _, g in gradient]):
        return None

    def product(vectors: list[Tensor]) -> Tensor:
        cotangents = [vectors[i].to(g.dtype) for i, g in gradient]
        return _rows(risk, _grad([g for _, g in gradient], inputs, cotangents), batch.examples)

    return product


def _ggn_product(batch: Batch, leaves: dict[str, Tensor]) -> Product | None:
    risk = batch.risk

    def call(values: dict[str, Tensor], example: Any) -> Tensor:
        output = risk.call(batch_of_one(example), values)
        if not isinstance(output, Tensor):  # the loop says what to do
            raise TypeError(f"a Gauss-Newton product got {type(output).__name__}")
        return output

    output = torch.func.vmap(call)(leaves, batch.data).flatten(0, 1)
    inputs = list(leaves.values())
    curvature = loss_hessian(batch, output.detach())
    dummy = torch.zeros_like(output, requires_grad=True)
    pullback = _grad([output], inputs, [dummy], create_graph=True)
    if once_differentiable([g for _, g in pullback]):
        return None

    def product(vectors: list[Tensor]) -> Tensor:
        along = [vectors[i].to(g.dtype) for i, g in pullback]
        tangents = _grad([g for _, g in pullback], [dummy], along)
        tangent = tangents[0][1] if tangents else torch.zeros_like(output)
        cotangent = curvature(tangent.detach().unsqueeze(0))[0].to(output.dtype)
        return _rows(risk, _grad([output], inputs, [cotangent]), batch.examples)

    return product


def _grad(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None,
    *,
    create_graph: bool = False,
) -> list[tuple[int, Tensor]]:
    """Derivatives by index of the input, where there are any (that can be derived further)."""
    if not outputs:
        return []
    parts: Sequence[Tensor | None] = torch.autograd.grad(
        outputs,
        inputs,
        cotangents,
        create_graph=create_graph,
        retain_graph=True,
        allow_unused=True,
    )
    pairs = ((i, g) for i, g in enumerate(parts) if g is not None)
    return [(i, g) for i, g in pairs if g.requires_grad or not create_graph]


def _rows(risk: Risk, found: list[tuple[int, Tensor]], count: int) -> Tensor:
    parts: list[Tensor | None] = [None] * len(risk.params)
    for i, g in found:
        parts[i] = g
    return risk.space.join(parts, columns=count).mT


# ------------------------------------------------------------- example by example
def _looped(ones: list[Batch], weights: Tensor, kind: str) -> Product:
    risk = ones[0].risk

    def product(vectors: list[Tensor]) -> Tensor:
        rows = torch.zeros((len(ones), risk.space.size), dtype=risk.space.dtype).to(
            risk.space.device
        )
        for i, one in enumerate(ones):
            scale = 1.0 if risk.loss.reduction == "sum" else float(weights[i])
            if scale != 0.0:  # an example without a valid loss term
                op = _OPERATORS[kind](risk.on([one.data]))
                rows[i] = scale * (op @ risk.space.join([v[i] for v in vectors]))
        return rows

    return product


def _require_independent(batch: Batch, ones: list[Batch]) -> None:
    """Raises ValueError unless outputs of single examples are those in their batch."""
    if len(ones) < 2:
        return
    risk = batch.risk
    together = risk.space.join(batch.gradient()).double()
    alone = torch.zeros_like(together)
    for one in ones:
        if float(one.weight) == 0.0:
            continue
        try:
            alone += risk.space.join(one.gradient())
        except (RuntimeError, ValueError) as error:
            if is_exhausted(error):
                raise
            raise ValueError(
                f"the model or loss takes batches, but not single examples ({error}): examples "
                "depend on each other; put BatchNorm into eval mode (model.eval())"
            ) from error
    require_independent(alone, together, risk)
