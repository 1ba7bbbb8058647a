"""Calls of modules with hidden linear maps, as uses of their factored layers.

While the model runs, a hook notes what such a module gets, and the edges of the graph at its
outputs. Afterwards the call is run again in the open (:mod:`curvlib.operators.layers.hidden_maps`),
which gives the inputs of its layers, and for gradients at the edges those at the layers' outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from curvlib.core.data import tensors
from curvlib.operators.layers.factored import FactoredLayer
from curvlib.operators.layers.hidden_map import Unrolled
from curvlib.operators.layers.hidden_maps import outputs_of, unfit, unrolled
from curvlib.operators.layers.unseen import InnerRows, ModuleCall, OutputGradients


@dataclass(frozen=True, eq=False)
class HiddenCall:
    """One call of a module with hidden maps.

    Attributes:
        module: The module.
        args: What it got.
        kwargs: What it got by name.
        versions: Of the memory of all tensors in these.
        edges: Of the graph, at each output; ``None`` where no gradient flows.
        outputs: The outputs, detached.
        output_versions: Of their memory.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    versions: tuple[int, ...]
    edges: tuple[GradientEdge | None, ...]
    outputs: tuple[Tensor, ...]
    output_versions: tuple[int, ...]

    def unrolled(self, name: str, *, graph: bool) -> Unrolled:
        """The call, run again.

        Args:
            name: Of one of its layers, for messages.
            graph: Whether gradients will be pulled back.

        Raises:
            RuntimeError: If what it got was changed in place since.
            ValueError: If another output comes out.
        """
        if self.versions != _versions(self.args, self.kwargs):
            raise RuntimeError(
                f"what the module of layer {name!r} got was changed in place after the module had "
                "read it, so its gradients are lost; replace the in-place operation (x += y, "
                "inplace=True) by x = x + y"
            )
        found = unrolled(self.module, self.args, self.kwargs, graph=graph)
        for mine, own, version in zip(
            found.outputs, self.outputs, self.output_versions, strict=True
        ):
            if own._version == version and not _same(mine.detach(), own):
                raise ValueError(
                    f"the {type(self.module).__name__} of layer {name!r} gives another output when "
                    "it is run again step by step, so its forward pass is not PyTorch's own; leave "
                    "its parameters out with params=, or write it with linear layers"
                )
        return found


@dataclass(frozen=True, eq=False)
class HiddenUse:
    """Where the gradients of one use of a layer inside come from.

    Attributes:
        call: The call.
        unrolled: The call, run again.
        place: Which of its maps.
        groups: ``G`` of the layer.
    """

    call: HiddenCall
    unrolled: Unrolled
    place: int
    groups: int

    @property
    def inputs(self) -> Tensor:
        """Inputs of the layer, ``[G, N, T, I]``."""
        rows = self.unrolled.inputs[self.place]
        return rows.expand(self.groups, *rows.shape)

    @property
    def keep(self) -> Tensor | None:
        """Which rows there are, bool ``[N, T]``, or ``None`` for all."""
        return self.unrolled.valid

    def gradient(self, pulled: Sequence[Tensor | None]) -> Tensor | None:
        """That at its output, ``[G, N, T, O]``, of those at the outputs of all maps."""
        own = pulled[self.place]
        return None if own is None else _grouped(own, self.groups)


def distinct(module: nn.Module, output: Any) -> Any:
    """What a hook returns so that gradients at outputs are those that come from outside, only.

    Where an ``LSTMCell`` is not fused, its hidden state is computed from its cell state, in the
    same graph: the gradient there would hold what came through the hidden state, too. So both are
    taken as new nodes. ``None``, which leaves an output as it is, for other modules.
    """
    if not isinstance(module, nn.LSTMCell) or not all(t.requires_grad for t in output):
        return None
    return tuple(t.view_as(t) for t in output)


def noted(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> HiddenCall:
    """What a forward hook saw of a call."""
    outputs = outputs_of(output)
    edges = tuple(get_gradient_edge(t) if t.requires_grad else None for t in outputs)
    versions = tuple(t._version for t in outputs)
    shown = tuple(t.detach() for t in outputs)
    return HiddenCall(
        module, tuple(args), dict(kwargs), _versions(args, kwargs), edges, shown, versions
    )


class HiddenReplay:
    """Rows of the layers inside of one module, for :class:`~.layer_recorder.LayerRecorder`.

    Args:
        module: A module with hidden maps.
        inside: Layers by the key of their map: a weight, and a bias that is not joined to it.
    """

    def __init__(self, module: nn.Module, inside: Mapping[str, Sequence[FactoredLayer]]) -> None:
        self.module = module
        self.inside = dict(inside)

    def rows(self, call: ModuleCall, gradients: Sequence[OutputGradients]) -> list[InnerRows]:
        """Rows of all uses in one call, for some sets of gradients at the output.

        Raises:
            RuntimeError: If the module's mode has become one in which calls cannot be run again.
        """
        reason = unfit(self.module)
        if reason:
            name = next(iter(self.inside.values()))[0].name
            raise RuntimeError(
                f"layer {name!r} was recorded before, but cannot be now: {reason}; call "
                "model.train() before the optimizer is made, and it will be left out"
            )
        found = unrolled(self.module, call.args, call.kwargs)
        places = [i for i, t in enumerate(call.outputs) if t.is_floating_point()]
        sets = [found.pulled([own[i] for i in places]) for own in gradients]
        out = []
        for i, hidden in enumerate(found.maps):
            zeros = torch.zeros_like(found.nodes[i]).transpose(0, 1)
            each = [zeros if own[i] is None else own[i] for own in sets]
            rows = found.inputs[i]
            for layer in self.inside.get(hidden.key, ()):
                G = layer.shape[0]
                inputs = rows.expand(G, *rows.shape)
                own_gradients = [_grouped(g, G) for g in each if g is not None]
                out.append(InnerRows(layer.name, inputs, own_gradients, found.valid))
        return out


def layers_inside(
    layers: Sequence[FactoredLayer],
) -> dict[nn.Module, dict[str, list[FactoredLayer]]]:
    """Layers inside of each module with hidden maps, by the key of the map."""
    found: dict[nn.Module, dict[str, list[FactoredLayer]]] = {}
    for layer in layers:
        for (module, _), key in zip(layer.modules, layer.maps, strict=False):
            found.setdefault(module, {}).setdefault(key, []).append(layer)
    return found


def _grouped(gradient: Tensor, groups: int) -> Tensor:
    """Gradients ``[N, T, G * O]`` as ``[G, N, T, O]``."""
    found: Tensor = gradient.unflatten(-1, (groups, -1)).movedim(2, 0)
    return found


def _versions(args: Any, kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in tensors([list(args), dict(kwargs)]))


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs are the same up to rounding of different kernels."""
    if not bool(torch.isfinite(b).all()):
        return True  # what is not finite is named later
    gap = torch.linalg.vector_norm(a.double() - b.double())
    tolerance = 30.0 * max(torch.finfo(t.dtype).eps for t in (a, b)) ** 0.5
    size = float(torch.linalg.vector_norm(b.double()))
    return bool(float(gap) <= tolerance * 2.0 * size)
