r"""Gradient graphs: what a Hessian product differentiates, built once and kept where it pays.

A Hessian product costs three gradients: one to build the graph of the gradient, two to
differentiate it. For data in memory the graph is kept from one product to the next, which saves
the first, as long as the graphs fit the memory budget. The bytes that a graph holds are counted
while it is built (``torch.autograd.graph.saved_tensors_hooks``).

A kept graph belongs to the parameters, buffers, modes and data with which it was built. A
signature of all of them is compared at every product; when anything changed, the graphs are
built anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from curvlib.core.batch import Batch
from curvlib.core.data import tensors
from curvlib.core.risk import Risk

Signature = tuple[object, ...]


@dataclass(frozen=True)
class GradientGraph:
    """The gradient of one batch's loss, with its graph.

    Attributes:
        gradients: Entries of the gradient that depend on the parameters any further.
        where: For each of them, the index of its parameter.
        bytes: What the graph holds, beside the parameters.
    """

    gradients: tuple[Tensor, ...]
    where: tuple[int, ...]
    bytes: int

    @property
    def entries(self) -> list[tuple[int, Tensor]]:
        """Pairs of a parameter's index and its entry of the gradient."""
        return list(zip(self.where, self.gradients, strict=True))


@dataclass
class GraphCache:
    """Gradient graphs of a risk's batches, kept within a budget of bytes."""

    risk: Risk
    budget: int
    kept: dict[int, tuple[Signature, GradientGraph]] = field(default_factory=dict)
    largest: int | None = None  # bytes of the largest graph seen
    current: Signature = ()  # of the model, refreshed at each product

    @property
    def room(self) -> int:
        """How many graphs of one batch fit the budget."""
        return self.budget // max(self.largest or 1, 1)

    def begin(self) -> None:
        """Refreshes the model's signature: call it once before each pass."""
        if self.risk.in_memory is None:
            return
        now = _model_signature(self.risk)
        if now != self.current:
            self.kept.clear()
            self.current = now

    def graph(self, batch: Batch) -> tuple[GradientGraph, bool]:
        """The graph of a batch, and whether it is kept (so that it must not be freed)."""
        in_memory = self.risk.in_memory is not None
        signature = _data_signature(batch) if in_memory else ()
        if batch.index in self.kept:
            known, graph = self.kept[batch.index]
            if known == signature:
                return graph, True
            del self.kept[batch.index]
        graph = build(batch, measure=in_memory or self.largest is None)
        self.largest = max(self.largest or 0, graph.bytes)
        used = sum(g.bytes for _, g in self.kept.values())
        keep = in_memory and used + graph.bytes <= self.budget
        if keep:
            self.kept[batch.index] = (signature, graph)
        return graph, keep


def build(batch: Batch, *, measure: bool) -> GradientGraph:
    """Builds the graph of the gradient of one batch's total loss."""
    counter = _Counter({p.untyped_storage().data_ptr() for p in batch.risk.params.values()})
    if measure:
        with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor):
            gradients = batch.gradient(create_graph=True)
    else:
        gradients = batch.gradient(create_graph=True)
    where = tuple(i for i, g in enumerate(gradients) if g is not None and g.requires_grad)
    used = [g for g in gradients if g is not None and g.requires_grad]
    return GradientGraph(tuple(used), where, counter.bytes)


class _Counter:
    """Counts the bytes of distinct storages that a graph saves."""

    def __init__(self, skip: set[int]) -> None:
        self.seen = skip
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


def _model_signature(risk: Risk) -> Signature:
    held = [*risk.model.parameters(), *risk.model.buffers()]
    modes = tuple(m.training for m in risk.model.modules())
    places = tuple((t.data_ptr(), t._version) for t in held)
    return (modes, places, _checksums(held))


def _data_signature(batch: Batch) -> Signature:
    assert batch.risk.in_memory is not None
    held = list(tensors(batch.risk.in_memory[batch.index]))
    return tuple((id(t), t.data_ptr(), t._version) for t in held)


def _checksums(held: Sequence[Tensor]) -> tuple[int, ...]:
    """Sums of the bits, which see changes made behind autograd's back (``p.data``)."""
    sums = [_bits(t.detach()).sum() for t in held if t.numel()]
    return tuple(torch.stack(sums).tolist()) if sums else ()


def _bits(tensor: Tensor) -> Tensor:
    if not tensor.dtype.is_floating_point:
        return tensor.to(torch.int64)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    size = tensor.element_size()
    return tensor.view(integers[size]) if size in integers else tensor.to(torch.int64)
