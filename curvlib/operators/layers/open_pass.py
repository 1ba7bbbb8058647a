"""A forward pass of a model that trains, while its gradients have not all come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvlib.operators.layers.hidden_calls import HiddenReplay
from curvlib.operators.layers.unseen import ModuleCall
from curvlib.operators.layers.use import Use


@dataclass(frozen=True, eq=False)
class NotedCall:
    """A call of a layer's module, or of a module that is replayed, and where its gradients go.

    Attributes:
        use: The call of a layer's module.
        replay: The module that is run again, and its call.
        slots: Of its outputs among the gradients of the pass.
    """

    use: Use | None
    replay: tuple[HiddenReplay, ModuleCall] | None
    slots: slice


@dataclass(eq=False)
class OpenPass:
    """A forward pass that is going on, or waits for its gradients.

    Attributes:
        examples: How many there are, if there is an input to tell.
        inputs: The model's, if labels are drawn by their content.
        output: The model's, if it is read.
        calls: Of layers' modules, in order.
        gradients: At their outputs.
        edges: Of the graph, at these, where they are needed.
        sampled: Gradients of sampled labels' scores.
        terms: How many loss terms there are.
        reached: Whether gradients have come.
    """

    examples: int | None = None
    inputs: Any = None
    output: Any = None
    calls: list[NotedCall] = field(default_factory=list)
    gradients: list[Tensor | None] = field(default_factory=list)
    edges: list[GradientEdge | None] = field(default_factory=list)
    sampled: list[Tensor | None] | None = None
    terms: Tensor | None = None
    reached: bool = False
