"""Modules whose products with weights happen inside, where no hook on a layer sees them.

The gates of recurrent networks and the projections of attention are such. The rows of the layers
inside are found from what the module got and the gradients at what it gave, by running it again in
the open: :class:`curvlib.operators.layers.hidden_calls.HiddenReplay`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

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
        keep: Which rows there are, bool ``[N, T]``, or ``None`` for all.
    """

    layer: str
    inputs: Tensor
    gradients: Sequence[Tensor]
    keep: Tensor | None = None
