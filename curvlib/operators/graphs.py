r"""Graphs of a batch that products differentiate, built once and kept where it pays.

A Hessian product costs three gradients: one to build the graph of the gradient, two to
differentiate it. For data in memory the graph is kept from one product to the next, which saves
the first, as long as the graphs fit the memory budget. The bytes that a graph holds are counted
while it is built (``torch.autograd.graph.saved_tensors_hooks``).

A kept graph belongs to the parameters, buffers, modes and data with which it was built. All of
them are compared at every product, by their values, since ``p.data`` and NumPy change tensors
without autograd's notice: large tensors by a sketch (products of their rows of 1,024 entries with
one random vector), which costs one read and sees whatever exceeds rounding. When anything
changed, the graphs are built anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import Node

from curvlib.core.batch import Batch
from curvlib.core.data import tensors
from curvlib.core.random import generator_of
from curvlib.core.risk import Risk

Graph = TypeVar("Graph")


#: Entries of one row of a sketch.
SKETCH = 1024


class Signature:
    """What a graph was built with: modes, places and (sketched) values of tensors."""

    def __init__(
        self, modes: tuple[bool, ...], held: Sequence[Tensor], sketch: Callable[[Tensor], Tensor]
    ) -> None:
        self.places = (modes, *((t.data_ptr(), t.shape, t.dtype) for t in held))
        self.values = [sketch(t) for t in held]

    def same(self, other: Signature | None) -> bool:
        """Whether nothing changed since the other signature was taken."""
        if other is None or self.places != other.places:
            return False
        return all(map(torch.equal, self.values, other.values))


@dataclass
class GraphCache(Generic[Graph]):
    """Graphs of a risk's batches, kept within a budget of bytes.

    Attributes:
        risk: The risk.
        budget: Bytes that kept graphs may hold.
        build: Builds the graph of one batch.
        verify: Raises if a graph cannot be differentiated; called for the first graph.
        holds: Tensors that a graph holds, beside what autograd saves for it.
    """

    risk: Risk
    budget: int
    build: Callable[[Batch], Graph]
    verify: Callable[[Graph], None] | None = None
    holds: Callable[[Graph], Sequence[Tensor]] = lambda graph: ()
    _kept: dict[int, tuple[Signature, Graph, int]] = field(default_factory=dict)
    _model: Signature | None = None
    _directions: dict[tuple[torch.dtype, torch.device], Tensor] = field(default_factory=dict)
    _largest: int | None = None

    @property
    def room(self) -> int:
        """How many graphs of one batch fit the budget."""
        return self.budget // max(self._largest or 1, 1)

    @property
    def keeps(self) -> bool:
        """Whether graphs are kept at all: for data in memory that fits."""
        return self.risk.in_memory is not None and self.room > 0 and not self.risk.places

    def begin(self) -> None:
        """Compares the model with the one that kept graphs belong to; once before each pass."""
        if not self.keeps:
            return
        held = [*self.risk.model.parameters(), *self.risk.model.buffers()]
        modes = tuple(m.training for m in self.risk.model.modules())
        model = Signature(modes, held, self._sketch)
        if not model.same(self._model):
            self._kept.clear()
            self._model = model

    def graph(self, batch: Batch) -> tuple[Graph, bool]:
        """The graph of a batch, and whether it is kept (so that it must not be freed)."""
        if not self.keeps:
            return self._measured(batch) if self._largest is None else self.build(batch), False
        held = list(tensors((self.risk.in_memory or ())[batch.index]))
        signature = Signature((), held, self._sketch)
        known = self._kept.pop(batch.index, None)
        if known is not None and signature.same(known[0]):
            self._kept[batch.index] = known
            return known[1], True
        graph = self._measured(batch)
        size = self._largest or 0
        keep = sum(k[2] for k in self._kept.values()) + size <= self.budget
        if keep:
            self._kept[batch.index] = (signature, graph, size)
        return graph, keep

    def _sketch(self, tensor: Tensor) -> Tensor:
        flat = tensor.detach().reshape(-1)
        if tensor.dtype not in (torch.float32, torch.float64) or flat.numel() < 4 * SKETCH:
            return flat.clone()
        key = (tensor.dtype, tensor.device)
        if key not in self._directions:
            direction = torch.rand(SKETCH, generator=generator_of(None, 0), dtype=torch.float64)
            self._directions[key] = (direction + 0.5).to(tensor.device, tensor.dtype)
        whole = flat.numel() // SKETCH * SKETCH
        return torch.cat([flat[:whole].view(-1, SKETCH) @ self._directions[key], flat[whole:]])

    def _measured(self, batch: Batch) -> Graph:
        if self.risk.places:
            graph, size = self.risk.held.bytes_saved(lambda: self.build(batch))
            return self._verified(graph, size)
        held = {p.untyped_storage().data_ptr() for p in self.risk.model.parameters()}
        size = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal size
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in held:
                held.add(storage.data_ptr())
                size += storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            graph = self.build(batch)
        for tensor in self.holds(graph):
            pack(tensor)
        return self._verified(graph, size)

    def _verified(self, graph: Graph, size: int) -> Graph:
        if self.verify is not None and self._largest is None:
            self.verify(graph)
        self._largest = max(self._largest or 0, size)
        return graph


def once_differentiable(outputs: Sequence[Tensor]) -> bool:
    """Whether a graph passes through a function that is marked ``@once_differentiable``.

    Such a function puts a node that raises into the graph of its backward, without a path to the
    parameters: ``torch.autograd.grad`` leaves it out, and second derivatives silently lack it.
    """
    return any(
        node.name().endswith("::Error") or node.name() == "Error" for node in _nodes(outputs)
    )


def reentrant(output: Tensor) -> bool:
    """Whether a graph has parts under reentrant checkpointing.

    Their own graph is built in the backward pass, so that ``torch.autograd.grad`` finds no path
    to the parameters inside, and says nothing.
    """
    return any(node.name().startswith("CheckpointFunction") for node in _nodes([output]))


def ends_in(output: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Whether a graph ends in one of some leaves.

    Example:
        >>> a, b = (torch.ones(1, requires_grad=True) for _ in range(2))
        >>> ends_in(2 * a, [a, b]), ends_in(2 * a, [b])
        (True, False)
    """
    wanted = {id(leaf) for leaf in leaves}
    return any(id(getattr(node, "variable", None)) in wanted for node in _nodes([output]))


def _nodes(outputs: Sequence[Tensor]) -> Iterator[Node]:
    """The nodes of a graph."""
    stack = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
