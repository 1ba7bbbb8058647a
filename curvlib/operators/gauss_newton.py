r"""Products with :math:`J^T C J`: what the GGN and all Fisher matrices share.

For a batch with output :math:`f(\theta)`, Jacobian :math:`J` and a symmetric matrix :math:`C` in
output space (:mod:`curvlib.operators.loss_hessian`), the product with columns is :math:`J V`, then
:math:`C (J V)`, then :math:`J^T` of that. The two Jacobian products take one of two routes:

*reverse*
    :math:`J v = \partial_u \langle J^T u, v \rangle` (double backward) on a graph of
    :math:`J^T u` that is kept between products: 7/6 to 4/3 gradients' work. Used for data in
    memory and models without convolutions (whose double backward costs more), and for models that
    have no forward-mode derivative.
*forward*
    Forward-mode :math:`J v`, and one backward on the output's graph: 5/3 gradients for one column,
    towards 4/3 for many.

First derivatives of either mode are right through all normalization layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from curvlib.core.batch import Batch
from curvlib.core.operator import LinearOperator
from curvlib.core.risk import Risk
from curvlib.operators.columns import batched_quietly, derivative, pieces
from curvlib.operators.graphs import GraphCache, once_differentiable
from curvlib.operators.loss_hessian import Curvature, tensor_output


@dataclass(frozen=True)
class OutputGraph:
    """A batch's output with its graph.

    Attributes:
        output: The model's output.
        dummy: A cotangent ``u`` in which ``pullback`` is linear (reverse route only).
        pullback: Entries of ``J^T u``, by parameter (reverse route only).
    """

    output: Tensor
    dummy: Tensor | None = None
    pullback: tuple[tuple[int, Tensor], ...] = ()


def gauss_newton(
    risk: Risk,
    curvature: Callable[[Batch, Tensor], Curvature],
    *,
    name: str,
    psd: bool,
    memory: int,
    identity: str = "",
    rebuild: Callable[[Risk], LinearOperator],
) -> LinearOperator:
    """The operator ``J' C J`` of a risk.

    Args:
        risk: The risk.
        curvature: Given a batch and its detached output, returns the product with ``C``.
        name: Name of the operator.
        psd: Whether ``C`` is positive semi-definite.
        memory: Bytes for kept graphs and for columns that are done at once.
        identity: What distinguishes this operator, beside the risk.
        rebuild: The same operator of another risk.
    """
    if memory < 0:
        raise ValueError(f"memory= is a number of bytes, at least 0, got {memory}")
    product = _Product(risk, curvature, memory)
    size = risk.space.size
    return LinearOperator(
        product,
        (size, size),
        dtype=risk.space.dtype,
        device=risk.space.device,
        symmetric=True,
        psd=psd,
        space=risk.space,
        name=name,
        identity=lambda: f"{risk.fingerprint()}|{identity}",
        restrict=lambda names: rebuild(risk.part(names)),
        group=risk.group,
    )


class _Product:
    """The product, with the graphs that it keeps and the route that works for the model."""

    def __init__(
        self, risk: Risk, curvature: Callable[[Batch, Tensor], Curvature], memory: int
    ) -> None:
        self.risk = risk
        self.curvature = curvature
        self.cache = GraphCache(risk, memory, self._build)
        self._verified = False  # that pullback graphs can be differentiated
        self._forward_failed: Exception | None = None
        convolutions = (nn.modules.conv._ConvNd,)
        self.reverse = risk.in_memory is not None and not any(
            isinstance(m, convolutions) for m in risk.model.modules()
        )

    def __call__(self, columns: Tensor) -> Tensor:
        self.cache.begin()
        return self.risk.accumulate(lambda batch, total: self._add(batch, total, columns), columns)

    def _build(self, batch: Batch) -> OutputGraph:
        if not self.reverse:
            return OutputGraph(tensor_output(batch))
        graph = _pullback_graph(batch)
        if not self._verified and once_differentiable([g for _, g in graph.pullback]):
            if self._forward_failed is not None:
                raise RuntimeError(
                    "the model uses an autograd function that has neither a forward-mode nor a "
                    f"second derivative (@once_differentiable): {self._forward_failed}; give it a "
                    "jvp, or a backward that can be differentiated"
                ) from self._forward_failed
            self.reverse = False  # the forward route needs no second derivative
            return OutputGraph(graph.output)
        self._verified = True
        return graph

    def _add(self, batch: Batch, total: Tensor | None, columns: Tensor) -> Tensor:
        space, count = self.risk.space, columns.shape[1]
        params = list(self.risk.params.values())
        out = space.empty(count) if total is None else total
        if count == 1 and not self.reverse and not self.cache.keeps:
            vectors = [v[0] for v in space.split(columns)]
            shared = self._forward(partial(_dual, batch, vectors))
            if shared is not None:
                output, tangent = shared
                product = self.curvature(batch, output.detach())(tangent.unsqueeze(0))
                parts = derivative([output], params, [product.to(output.dtype)], retain_graph=False)
                space.write(parts, out, scale=batch.scale, add=total is not None)
                return out
        graph, kept = self.cache.graph(batch)
        if not graph.output.requires_grad:  # a block of parameters that the output does not use
            return out.zero_() if total is None else out
        curvature = self.curvature(batch, graph.output.detach())
        for wide in pieces(count, self.cache.room, space if graph.dummy is not None else None):
            vectors = space.split(columns[:, wide])
            tangents = None
            if graph.dummy is None:
                tangents = self._forward(partial(_tangents, batch, vectors))
                if tangents is None:  # no forward mode: the graph is built for the other route
                    graph, kept = self.cache.graph(batch)
            if tangents is None:
                tangents = _reverse_tangents(graph, vectors)
            cotangents = curvature(tangents).to(graph.output.dtype)
            for narrow in pieces(wide.stop - wide.start, self.cache.room, space):
                piece = slice(wide.start + narrow.start, wide.start + narrow.stop)
                parts = derivative(
                    [graph.output],
                    params,
                    [cotangents[narrow]],
                    retain_graph=kept or piece.stop < count,
                )
                space.write(parts, out[:, piece], scale=batch.scale, add=total is not None)
        return out

    def _forward(self, compute: Callable[[], Any]) -> Any:
        """A forward-mode result, or ``None`` if the model has no forward-mode derivative."""
        if self.reverse:
            return None
        try:
            return compute()
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, RuntimeError) as error:
            self._forward_failed = error
            self.reverse = True  # an error that is the model's own comes again, and is raised
            self.cache = GraphCache(self.risk, self.cache.budget, self._build)
            return None


def tangents_of(batch: Batch, vectors: list[Tensor]) -> Tensor:
    """``J V`` of one batch, ``[K, *output.shape]``, by the route that the model allows."""
    try:
        return _tangents(batch, vectors)
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError):
        # no forward-mode derivative; an error that is the model's own comes again, and is raised
        graph = _pullback_graph(batch)
        if once_differentiable([g for _, g in graph.pullback]):
            raise
        return _reverse_tangents(graph, vectors)


def _pullback_graph(batch: Batch) -> OutputGraph:
    output = tensor_output(batch)
    if not output.requires_grad:
        return OutputGraph(output)
    dummy = torch.zeros_like(output, requires_grad=True)
    params = list(batch.risk.params.values())
    parts: Sequence[Tensor | None] = torch.autograd.grad(
        output, params, dummy, create_graph=True, allow_unused=True
    )
    pullback = ((i, g) for i, g in enumerate(parts) if g is not None and g.requires_grad)
    return OutputGraph(output, dummy, tuple(pullback))


def _dual(batch: Batch, vectors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Output with its graph, and its tangent along one vector, in one forward pass."""
    params = batch.risk.params
    with forward_ad.dual_level(), _linear_of_constants():
        duals = {
            name: forward_ad.make_dual(p, v.to(p.dtype))
            for (name, p), v in zip(params.items(), vectors, strict=True)
        }
        output, tangent = forward_ad.unpack_dual(tensor_output(batch, duals))
        tangent = torch.zeros_like(output) if tangent is None else tangent.detach()
    return output, tangent


def _tangents(batch: Batch, vectors: list[Tensor]) -> Tensor:
    """Tangents ``[K, *output.shape]`` of the output along ``K`` vectors."""
    params = {name: p.detach() for name, p in batch.risk.params.items()}
    tangents = {name: v.to(p.dtype) for (name, p), v in zip(params.items(), vectors, strict=True)}

    def call(values: dict[str, Tensor]) -> Tensor:
        output: Tensor = batch.output(values)
        return output

    def push(tangent: dict[str, Tensor]) -> Tensor:
        out: Tensor = torch.func.jvp(call, (params,), (tangent,))[1]
        return out

    with torch.no_grad(), batched_quietly():
        if vectors[0].shape[0] == 1:
            return push({name: v[0] for name, v in tangents.items()}).unsqueeze(0)
        return torch.func.vmap(push, randomness="same")(tangents)


def _reverse_tangents(graph: OutputGraph, vectors: list[Tensor]) -> Tensor:
    count = vectors[0].shape[0]
    shape = (count, *graph.output.shape)
    if graph.dummy is None or not graph.pullback:
        return torch.zeros(shape, dtype=graph.output.dtype, device=graph.output.device)
    (tangents,) = derivative(
        [g for _, g in graph.pullback],
        [graph.dummy],
        [vectors[i].to(g.dtype) for i, g in graph.pullback],
        retain_graph=True,
    )
    return graph.output.new_zeros(shape) if tangents is None else tangents


class _LinearOfConstants(TorchFunctionMode):
    """Spares the zero tangent that forward mode multiplies by in a network's first layer."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs and len(args) >= 2:
            x, *rest = args
            if forward_ad.unpack_dual(x).tangent is None and all(r is not None for r in rest):
                pairs = [forward_ad.unpack_dual(r) for r in rest]
                if all(p.tangent is not None for p in pairs):
                    primal = F.linear(x, *(p.primal for p in pairs))
                    return forward_ad.make_dual(primal, F.linear(x, *(p.tangent for p in pairs)))
        return func(*args, **(kwargs or {}))


@contextmanager
def _linear_of_constants() -> Iterator[None]:
    with _LinearOfConstants():
        yield
