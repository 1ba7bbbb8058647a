"""One call of a module of a factored layer, and the calls of a pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from curvlib.operators.layers.hidden_calls import HiddenUse
from curvlib.operators.layers.inputs import positions


@dataclass(frozen=True, eq=False)
class Use:
    """One call of a module of a factored layer.

    Attributes:
        layer: Name of the layer.
        module: The module.
        role: Its role.
        x: Its input.
        version: Of the input's memory, when it was read.
        edge: Of the graph, at the output; ``None`` where no gradient flows.
        shape: Shape of the output.
        keep: Which rows count for factors, bool ``[N, T]``, or ``None`` for all.
        given: Whether ``x`` holds rows already, ``[G, N, T, I]``, and gradients are
            ``[G, N, T, O]``: of products that are inside a module, where no hook sees them.
        inside: Where the gradients of such a product come from.
    """

    layer: str
    module: nn.Module
    role: str
    x: Tensor
    version: int
    edge: GradientEdge | None
    shape: tuple[int, ...]
    keep: Tensor | None
    given: bool = False
    inside: HiddenUse | None = None

    @property
    def places(self) -> tuple[int, ...]:
        """Shape of the places at which it takes rows."""
        if self.given:
            return tuple(self.x.shape[1:3])
        if self.role == "embedding":
            return tuple(self.x.shape)
        if self.role == "scale":
            return tuple(self.x.shape[:1])
        return positions(self.module, self.x)

    def rows(self, examples: int) -> int | None:
        """``T``, rows for each example, or ``None`` if the first axis is not of examples."""
        places = self.places
        if examples == 1:
            return math.prod(places)
        if not places or places[0] % examples:
            return None
        return math.prod(places) // examples


class Uses:
    """The uses of a pass, in order, with those of one layer at hand.

    Attributes:
        uses: Calls of layers' modules.
        examples: How many examples there are.
    """

    uses: tuple[Use, ...]
    examples: int

    @cached_property
    def _by_layer(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for i, use in enumerate(self.uses):
            found.setdefault(use.layer, []).append(i)
        return found

    def of(self, layer: str) -> list[Use]:
        """The uses of a layer."""
        return [self.uses[i] for i in self._by_layer.get(layer, ())]

    def with_gradients(
        self, layer: str, gradients: Sequence[Tensor | None]
    ) -> list[tuple[Use, Tensor | None]]:
        """The uses of a layer, and what is known of each, from as much about all uses."""
        return [(self.uses[i], gradients[i]) for i in self._by_layer.get(layer, ())]
