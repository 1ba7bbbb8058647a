r"""Hessian of a risk, by double backward.

For the risk :math:`R(\theta) = \frac1W \sum_b L_b(\theta)`, the product with columns
:math:`V \in \mathbb{R}^{P \times K}` is

.. math:: H V = \frac1W \sum_b \nabla_\theta \langle \nabla_\theta L_b, V \rangle

(Pearlmutter, "Fast exact multiplication by the Hessian", 1994), one pass over the data for all
columns. The graph of :math:`\nabla L_b` is shared by the columns and, for data in memory, kept
between products: 3 gradients' work for one column, about 2 for each further one.

Reverse over reverse is used on purpose. ``torch.func``'s forward-over-reverse and
``torch.func.hessian`` are silently wrong through LayerNorm, batch-statistics BatchNorm and affine
InstanceNorm (pytorch#196699, #196700, #198017).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from curvlib.core.batch import Batch
from curvlib.core.check import central_difference
from curvlib.core.exhausted import is_exhausted
from curvlib.core.normalization import PrimitiveNorms
from curvlib.core.operator import LinearOperator
from curvlib.core.ranks.watch import NoAnswerError
from curvlib.core.risk import Risk
from curvlib.operators.captured.compiled import Compile, CompiledProduct
from curvlib.operators.columns import derivative, pieces
from curvlib.operators.graphs import GraphCache, once_differentiable

#: Default budget, in bytes, for graphs that are kept and for columns that are done at once.
MEMORY = 2**30


def hessian(
    risk: Risk,
    *,
    method: str = "exact",
    memory: int = MEMORY,
    compile: Compile = False,  # noqa: A002 (the name that torch uses)
) -> LinearOperator:
    """The Hessian of a risk with respect to its parameters.

    Args:
        risk: Model, loss, data and parameters.
        method: ``"exact"`` (double backward), or ``"finite_difference"`` for models without
            second derivatives: central differences of the gradient, with a step scaled by the
            norms of vector and parameters (relative error about 1e-4 in float32, 1e-8 in float64).
        memory: Bytes that kept graphs, and graphs of columns done at once, may take. Data in
            memory (not a ``DataLoader``) is needed for graphs to be kept.
        compile: Whether products run as captured graphs (exact method only). For each shape of a
            batch, the product is recorded and compiled at its first use (seconds to minutes), and
            used if it agrees with the eager one on random vectors of that batch and is symmetric;
            else it runs eagerly, with a warning. ``True`` compiles by inductor where a compiler
            works and else runs the captured operations one by one. ``"inductor"`` or
            ``"aot_eager"`` (one by one) insists: an error is raised instead of the warning.

    Returns:
        A symmetric operator ``[P, P]``, in the unit of the loss over that of the parameters
        squared, of the risk's mean (or sum).

    Raises:
        ValueError: If the method is unknown, the memory negative, or ``compile=`` unknown or for
            finite differences.
        RuntimeError: At the product, if a ``compile=`` that is insisted on does not work.

    Example:
        >>> import torch, curvlib as cl
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)
        >>> H = cl.hessian(cl.Risk(model, torch.nn.MSELoss(), (x, y)))
        >>> H.to_dense().tolist()
        [[2.0, 4.0], [4.0, 8.0]]
    """
    if memory < 0:
        raise ValueError(f"memory= is a number of bytes, at least 0, got {memory}")
    name = "Hessian"
    if method == "exact":
        product: Callable[[Tensor], Tensor] = _Product(risk, memory)
        if compile is not False:
            risk.require_whole("compile=")
            product = CompiledProduct(risk, partial(_Product, risk), _form, compile, memory, name)
        differentiable = partial(_product_with_graph, risk)
    elif method == "finite_difference":
        if compile is not False:
            raise ValueError(
                "compile= is for method='exact'; finite differences have no graph to capture"
            )
        product, differentiable = partial(_difference, risk), None
        name = "Hessian (finite differences)"
    else:
        raise ValueError(f"method= is 'exact' or 'finite_difference', got {method!r}")
    size = risk.space.total
    return LinearOperator(
        product,
        (size, size),
        dtype=risk.space.dtype,
        device=risk.space.device,
        symmetric=True,
        space=risk.space,
        name=name,
        identity=risk.fingerprint,
        restrict=lambda names: hessian(
            risk.part(names), method=method, memory=memory, compile=compile
        ),
        differentiable=differentiable if risk.space.spread is None else None,
        group=risk.group,
        spread=risk.space.spread,
    )


def _gradient_graph(batch: Batch) -> list[tuple[int, Tensor]]:
    """Entries of the gradient that depend on the parameters any further, by parameter."""
    gradients = enumerate(batch.gradient(create_graph=True))
    return [(i, g) for i, g in gradients if g is not None and g.requires_grad]


def _require_second(gradients: list[tuple[int, Tensor]]) -> None:
    if once_differentiable([g for _, g in gradients]):
        raise RuntimeError(
            "the model uses an autograd function marked @once_differentiable, so its gradient has "
            "no derivative (PyTorch would silently leave terms out); use curvlib.ggn(risk), which "
            "needs first derivatives only, or hessian(risk, method='finite_difference')"
        )


class _Product:
    """The product, with the graphs that it keeps."""

    def __init__(self, risk: Risk, memory: int) -> None:
        self.risk = risk
        self.cache = GraphCache(risk, memory, _gradient_graph, _require_second)

    def __call__(self, columns: Tensor) -> Tensor:
        self.begin()
        return self.risk.accumulate(
            lambda batch, total: self.add(batch, total, columns), columns, rows=True
        )

    def begin(self) -> None:
        """Called before each pass."""
        self.cache.begin()

    def add(self, batch: Batch, total: Tensor | None, columns: Tensor) -> Tensor:
        """The sum so far (``None``: nothing yet) with the batch's product times its scale."""
        space, params = self.risk.space, list(self.risk.params.values())
        out = space.empty(columns.shape[1]) if total is None else total
        gradients, kept = self.cache.graph(batch)
        # a loss that owns the head works in place, which cannot be batched over columns
        room = self.cache.room if self.risk.loss.linear is None else 1
        for piece in pieces(columns.shape[1], room, space):
            parts: list[Tensor | None] = [None] * len(params)
            if gradients:  # else the loss is linear in the parameters
                vectors = space.split(columns[:, piece])
                try:
                    parts = derivative(
                        [g for _, g in gradients],
                        params,
                        [vectors[i].to(g.dtype) for i, g in gradients],
                        retain_graph=kept or piece.stop < columns.shape[1],
                        group=self.risk.group,
                    )
                except RuntimeError as error:
                    if is_exhausted(error) or isinstance(error, NoAnswerError):
                        raise
                    raise RuntimeError(
                        f"the gradient of batch {batch.index} cannot be differentiated again: "
                        f"{error}; use curvlib.ggn(risk), which needs first derivatives only, or "
                        "hessian(risk, method='finite_difference')"
                    ) from error
            space.write(parts, out[:, piece], scale=batch.scale, add=total is not None)
        return out


def _form(batch: Batch, leaves: list[Tensor]) -> Callable[[list[Tensor]], Sequence[Tensor | None]]:
    """The product of one batch, to be captured: see :mod:`curvlib.operators.captured.compiled`."""
    value = batch.total(batch.output())
    gradients: Sequence[Tensor | None] = [None] * len(leaves)
    if value.requires_grad:  # a block of parameters may not be used
        gradients = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
    used = [(i, g) for i, g in enumerate(gradients) if g is not None and g.requires_grad]

    def push(vectors: list[Tensor]) -> Sequence[Tensor | None]:
        if not used:
            return [None] * len(leaves)
        cotangents = [vectors[i].to(g.dtype) for i, g in used]
        outputs = [g for _, g in used]
        parts: Sequence[Tensor | None] = torch.autograd.grad(
            outputs, leaves, cotangents, allow_unused=True
        )
        return parts

    return push


def _product_with_graph(risk: Risk, columns: Tensor) -> Tensor:
    params = list(risk.params.values())

    def add(batch: Batch, total: Tensor | None) -> Tensor:
        gradients = _gradient_graph(batch)
        _require_second(gradients)
        out = []
        for column in columns.mT:
            vectors = risk.space.split(column)
            parts: Sequence[Tensor | None] = [None] * len(params)
            if gradients:
                parts = torch.autograd.grad(
                    [g for _, g in gradients],
                    params,
                    [vectors[i].to(g.dtype) for i, g in gradients],
                    create_graph=True,
                    allow_unused=True,
                )
            out.append(risk.space.join_with_graph(parts))
        product = torch.stack(out, dim=1) * batch.scale
        return product if total is None else total + product

    with PrimitiveNorms():  # the third derivatives of the native ones are wrong
        return risk.accumulate(add, columns)


def _difference(risk: Risk, columns: Tensor) -> Tensor:
    def add(batch: Batch, total: Tensor | None) -> Tensor:
        out = risk.space.empty(columns.shape[1]).zero_() if total is None else total
        for k in range(columns.shape[1]):
            out[:, k].add_(central_difference(batch, columns[:, k]), alpha=batch.scale)
        return out

    return risk.accumulate(add, columns, rows=True)
