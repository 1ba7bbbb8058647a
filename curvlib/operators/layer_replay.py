"""Modules whose products with weights happen inside, where no hook on a layer sees them.

The gates of recurrent networks and the projections of attention are such. A :class:`Replay` says
which factored layers are inside of one module, and finds their rows from what the module got and
the gradients at what it gave: by running it again in the open.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from curvlib.operators.kfac_layers import FactoredLayer, Parameters

#: Gradients at the tensors of a module's output, ``None`` where none arrived.
OutputGradients = Sequence[Tensor | None]


@dataclass(frozen=True, eq=False)
class ModuleCall:
    """One call of a module.

    Attributes:
        args: Its positional arguments, detached.
        kwargs: Its keyword arguments, detached.
        outputs: The tensors of its output, in order, detached.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class InnerRows:
    """Rows of one use of a layer inside.

    Attributes:
        layer: Name of the layer.
        inputs: ``[G, N, T, I]``, or one column less, where the layer has a bias: it is appended.
        gradients: ``[G, N, T, O]`` for each set of gradients at the module's output.
    """

    layer: str
    inputs: Tensor
    gradients: Sequence[Tensor]


class Replay(Protocol):
    """Finds the rows of layers inside of one module."""

    @property
    def module(self) -> nn.Module:
        """The module."""

    def layers(self, held: Parameters) -> tuple[list[FactoredLayer], dict[str, str]]:
        """The layers inside, and why others of the module's own parameters are in none.

        ``(G, O, I)`` of a layer are the shape of its weight ``[G * O, I]`` (and bias ``[G * O]``).
        """

    def rows(self, call: ModuleCall, gradients: Sequence[OutputGradients]) -> list[InnerRows]:
        """Rows of all uses in one call, for some sets of gradients at the output.

        Called before the parameters change; must leave no trace in the module.
        """
