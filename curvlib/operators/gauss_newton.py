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

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from curvlib.core.batch import Batch
from curvlib.core.chunked_logits import Logits
from curvlib.core.exhausted import is_exhausted
from curvlib.core.operator import LinearOperator
from curvlib.core.ranks.group import Group
from curvlib.core.risk import Risk
from curvlib.operators.captured.compiled import Compile, CompiledProduct
from curvlib.operators.columns import batched_quietly, derivative, pieces
from curvlib.operators.graphs import GraphCache, once_differentiable
from curvlib.operators.head_curvature import ChunkCurvature, HeadProduct
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
    head: Callable[[Batch, Logits], ChunkCurvature],
    name: str,
    psd: bool,
    memory: int,
    identity: str = "",
    rebuild: Callable[[Risk], LinearOperator],
    compile: Compile = False,  # noqa: A002 (the name that torch uses)
    before: Callable[[Risk], None] | None = None,
) -> LinearOperator:
    """The operator ``J' C J`` of a risk.

    Args:
        risk: The risk.
        curvature: Given a batch and its detached output, returns the product with ``C``.
        head: The same by chunks of logits, for a loss that owns the head.
        name: Name of the operator.
        psd: Whether ``C`` is positive semi-definite.
        memory: Bytes for kept graphs and for columns that are done at once.
        identity: What distinguishes this operator, beside the risk.
        rebuild: The same operator of another risk.
        compile: Whether products run as captured graphs: see
            :mod:`curvlib.operators.captured.compiled`.
        before: Called before each pass over the data, with the risk.
    """
    if memory < 0:
        raise ValueError(f"memory= is a number of bytes, at least 0, got {memory}")
    own = None if risk.loss.linear is None else head
    product: Callable[[Tensor], Tensor] = _Product(risk, curvature, own, memory, before)
    if compile is not False:
        risk.require_whole("compile=")
        form = partial(_form, curvature)
        product = CompiledProduct(
            risk, lambda room: _Product(risk, curvature, None, room), form, compile, memory, name
        )
    size = risk.space.total
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
        spread=risk.space.spread,
    )


class _Product:
    """The product, with the graphs that it keeps and the route that works for the model."""

    def __init__(
        self,
        risk: Risk,
        curvature: Callable[[Batch, Tensor], Curvature],
        head: Callable[[Batch, Logits], ChunkCurvature] | None,
        memory: int,
        before: Callable[[Risk], None] | None = None,
    ) -> None:
        self.risk = risk
        self.before = before
        self.curvature = curvature
        self.head = head
        self.cache = GraphCache(risk, memory, self._build)
        self._verified = False  # that pullback graphs can be differentiated
        self._forward_failed: Exception | None = None
        convolutions = (nn.modules.conv._ConvNd,)
        self.reverse = bool(risk.places) or (  # no forward mode through gathered parameters
            risk.in_memory is not None
            and not any(isinstance(m, convolutions) for m in risk.model.modules())
        )

    def __call__(self, columns: Tensor) -> Tensor:
        self.begin()
        return self.risk.accumulate(
            lambda batch, total: self.add(batch, total, columns), columns, rows=True
        )

    def begin(self) -> None:
        """Called before each pass."""
        self.cache.begin()
        if self.before is not None:
            self.before(self.risk)

    def _build(self, batch: Batch) -> OutputGraph:
        if not self.reverse:
            return OutputGraph(tensor_output(batch, hidden=True))
        graph = _pullback_graph(batch)
        if not self._verified and once_differentiable([g for _, g in graph.pullback]):
            if self._forward_failed is not None:
                raise RuntimeError(
                    "the model uses an autograd function that has neither a forward-mode nor a "
                    f"second derivative (@once_differentiable): {self._forward_failed}; give it a "
                    "jvp, or a backward that can be differentiated"
                ) from self._forward_failed
            if self.risk.places:
                raise RuntimeError(
                    "the model uses an autograd function marked @once_differentiable, and its "
                    "parameters are sharded, where products J v need a second derivative; give it "
                    "a backward that can be differentiated"
                )
            self.reverse = False  # the forward route needs no second derivative
            return OutputGraph(graph.output)
        self._verified = True
        return graph

    def add(self, batch: Batch, total: Tensor | None, columns: Tensor) -> Tensor:
        """The sum so far (``None``: nothing yet) with the batch's product times its scale."""
        space, count = self.risk.space, columns.shape[1]
        params = list(self.risk.params.values())
        out, add = (space.empty(count), False) if total is None else (total, True)
        if self.head is not None and not add:  # the head adds its own part
            out, add = out.zero_(), True
        if count == 1 and not self.reverse and not self.cache.keeps:
            vectors = [v[0] for v in space.split(columns)]
            shared = self._forward(partial(_dual, batch, vectors))
            if shared is not None:
                output, tangent = shared
                curvature = self._curvature(batch, output.detach(), columns, out)
                product = curvature(tangent.unsqueeze(0), slice(0, 1))
                parts: list[Tensor | None] = [None] * len(params)
                if output.requires_grad:  # else a head alone is selected
                    product = product.to(output.dtype)
                    parts = derivative([output], params, [product], retain_graph=False)
                space.write(parts, out, scale=batch.scale, add=add)
                return out
        graph, kept = self.cache.graph(batch)
        used = graph.output.requires_grad
        if not used and self.head is None:  # a block of parameters that the output does not use
            return out if add else out.zero_()
        curvature = self._curvature(batch, graph.output.detach(), columns, out)
        for wide in pieces(count, self.cache.room, space if graph.dummy is not None else None):
            if not used:
                curvature(None, wide)
                continue
            vectors = space.split(columns[:, wide])
            tangents = None
            if graph.dummy is None:
                tangents = self._forward(partial(_tangents, batch, vectors))
                if tangents is None:  # no forward mode: the graph is built for the other route
                    graph, kept = self.cache.graph(batch)
            if tangents is None:
                tangents = _reverse_tangents(graph, vectors, self.risk.group)
            cotangents = curvature(tangents, wide).to(graph.output.dtype)
            if batch.lent:  # to a rank that has none: it counts elsewhere
                cotangents = torch.zeros_like(cotangents)
            for narrow in pieces(wide.stop - wide.start, self.cache.room, space):
                piece = slice(wide.start + narrow.start, wide.start + narrow.stop)
                parts = derivative(
                    [graph.output],
                    params,
                    [cotangents[narrow]],
                    retain_graph=kept or piece.stop < count,
                    group=self.risk.group,
                )
                space.write(parts, out[:, piece], scale=batch.scale, add=add)
        return out

    def _curvature(
        self, batch: Batch, output: Tensor, columns: Tensor, out: Tensor
    ) -> Callable[[Any, slice], Tensor]:
        """The product with ``C``, of tangents along some of the columns.

        Where the loss owns the head, its part of the product is added to ``out``.
        """
        if self.head is not None:
            head = HeadProduct(batch, output, self.head)
            return lambda tangents, wide: head(tangents, columns[:, wide], out[:, wide])
        curvature = self.curvature(batch, output)
        return lambda tangents, _: curvature(tangents)

    def _forward(self, compute: Callable[[], Any]) -> Any:
        """A forward-mode result, or ``None`` if the model has no forward-mode derivative."""
        if self.reverse:
            return None
        try:
            return compute()
        except (NotImplementedError, RuntimeError) as error:
            if is_exhausted(error):
                raise
            self._forward_failed = error
            self.reverse = True  # an error that is the model's own comes again, and is raised
            self.cache = GraphCache(self.risk, self.cache.budget, self._build)
            return None


def _form(
    curvature: Callable[[Batch, Tensor], Curvature], batch: Batch, leaves: list[Tensor]
) -> Callable[[list[Tensor]], Sequence[Tensor | None]]:
    """The product of one batch, to be captured: see :mod:`curvlib.operators.captured.compiled`.

    By the reverse route: of what it computes, a captured graph keeps the two Jacobian products.
    """
    output = tensor_output(batch)
    pullback: list[tuple[int, Tensor]] = []
    if output.requires_grad:
        dummy = torch.zeros_like(output, requires_grad=True)
        pulled: Sequence[Tensor | None] = torch.autograd.grad(
            output, leaves, dummy, create_graph=True, allow_unused=True
        )
        pullback = [(i, g) for i, g in enumerate(pulled) if g is not None and g.requires_grad]

    def push(vectors: list[Tensor]) -> Sequence[Tensor | None]:
        if not pullback:
            return [None] * len(leaves)
        cotangents = [vectors[i].to(g.dtype) for i, g in pullback]
        (tangent,) = torch.autograd.grad([g for _, g in pullback], dummy, cotangents)
        product = curvature(batch, output.detach())(tangent[None])[0].to(output.dtype)
        parts: Sequence[Tensor | None] = torch.autograd.grad(
            output, leaves, product, allow_unused=True
        )
        return parts

    return push


def tangents_of(batch: Batch, vectors: list[Tensor]) -> Tensor:
    """``J V`` of one batch, ``[K, *output.shape]``, by the route that the model allows."""
    try:
        return _tangents(batch, vectors)
    except (NotImplementedError, RuntimeError) as error:
        if is_exhausted(error):
            raise
        # no forward-mode derivative; an error that is the model's own comes again, and is raised
        graph = _pullback_graph(batch)
        if once_differentiable([g for _, g in graph.pullback]):
            raise
        return _reverse_tangents(graph, vectors)


def _pullback_graph(batch: Batch) -> OutputGraph:
    output = tensor_output(batch, hidden=True)
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
    _load_forward_mode()
    with forward_ad.dual_level(), _linear_of_constants():
        duals = {
            name: forward_ad.make_dual(p, v.to(p.dtype))
            for (name, p), v in zip(params.items(), vectors, strict=True)
        }
        output, tangent = forward_ad.unpack_dual(tensor_output(batch, duals, hidden=True))
        tangent = torch.zeros_like(output) if tangent is None else tangent.detach()
    return output, tangent


def _tangents(batch: Batch, vectors: list[Tensor]) -> Tensor:
    """Tangents ``[K, *output.shape]`` of the output along ``K`` vectors."""
    params = {name: p.detach() for name, p in batch.risk.params.items()}
    tangents = {name: v.to(p.dtype) for (name, p), v in zip(params.items(), vectors, strict=True)}

    def call(values: dict[str, Tensor]) -> Tensor:
        output: Any = batch.output(values)
        out: Tensor = output.hidden if isinstance(output, Logits) else output
        return out

    def push(tangent: dict[str, Tensor]) -> Tensor:
        out: Tensor = torch.func.jvp(call, (params,), (tangent,))[1]
        return out

    _load_forward_mode()
    with torch.no_grad(), batched_quietly():
        if vectors[0].shape[0] == 1:
            return push({name: v[0] for name, v in tangents.items()}).unsqueeze(0)
        return torch.func.vmap(push, randomness="same")(tangents)


def _reverse_tangents(
    graph: OutputGraph, vectors: list[Tensor], group: Group | None = None
) -> Tensor:
    count = vectors[0].shape[0]
    shape = (count, *graph.output.shape)
    if graph.dummy is None or not graph.pullback:
        return torch.zeros(shape, dtype=graph.output.dtype, device=graph.output.device)
    (tangents,) = derivative(
        [g for _, g in graph.pullback],
        [graph.dummy],
        [vectors[i].to(g.dtype) for i, g in graph.pullback],
        retain_graph=True,
        group=group,
    )
    return graph.output.new_zeros(shape) if tangents is None else tangents


@lru_cache
def _load_forward_mode() -> None:
    """Has torch load the formulas that forward mode needs, during which it deprecates itself."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.filterwarnings("ignore", message="`torch.jit.script` is")
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


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
