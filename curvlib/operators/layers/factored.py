r"""Which parameters have Kronecker-factored curvature, and as what matrices.

A *factored layer* is a set of parameters whose gradient is a matrix :math:`[O, I]` (or one for
each of ``G`` groups of a convolution), made of the uses of one or several modules:

=============  ===================================  ========================================
role           modules                              gradient of an example
=============  ===================================  ========================================
``matrix``     Linear, Conv1d/2d/3d, HF's Conv1D    :math:`\sum_t g_t [a_t, 1]^\top`
``embedding``  Embedding                            :math:`\sum_t e_{v_t} g_t^\top`
``scale``      affine normalization layers          :math:`[\sum_t g_t \circ \hat x_t,
                                                    \sum_t g_t]`, one row
=============  ===================================  ========================================

Of the role ``matrix`` are also the linear maps *inside* of recurrent modules and of
``MultiheadAttention`` (:mod:`curvlib.operators.layers.hidden_maps`), each a layer with the name of
the module and of the map, ``"lstm.hh_l0"``.

with the inputs :math:`a_t`, the gradients :math:`g_t` with respect to the outputs, the indices
:math:`v_t` and the normalized inputs :math:`\hat x_t`. A weight that several modules share is one
layer, also where an embedding shares it with a linear head. Everything else is *uncovered*, with
the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from curvlib.core.kronecker_blocks import Part
from curvlib.core.owners import Owner, Owners
from curvlib.core.ranks.dtensors import plain_type
from curvlib.operators.layers.hidden_owners import HiddenGroup, HiddenOwners
from curvlib.operators.layers.inputs import Layer, layer_of
from curvlib.operators.layers.parameters import Parameters

#: Normalization layers with the weight's axes at the end of the input, and with channels on axis 1.
_TRAILING = (nn.LayerNorm, nn.RMSNorm)
_CHANNELS = (
    nn.GroupNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
)


@dataclass(frozen=True, eq=False)
class FactoredLayer:
    """Parameters whose curvature is one Kronecker-factored block.

    Attributes:
        name: Name of the layer; of the parameter, for a bias on its own.
        kind: Types of its modules, for reports.
        weight: Name of the weight, if it is one of the selected parameters.
        bias: Name of the bias that is joined to it.
        modules: The modules that use them, with their roles.
        shape: ``(G, O, I)``, the bias's column included.
        parts: Where the columns lie in the flat vector.
        left_dense: Whether the left factor is dense, or diagonal.
        right_dense: Whether the right factor is.
        maps: Of linear maps inside of the modules: the key of the map in each module.
    """

    name: str
    kind: str
    weight: str | None
    bias: str | None
    modules: tuple[tuple[nn.Module, str], ...]
    shape: tuple[int, int, int]
    parts: tuple[Part, ...]
    left_dense: bool
    right_dense: bool
    maps: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its parameters."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    @property
    def roles(self) -> tuple[str, ...]:
        """The different roles of its modules."""
        return tuple(dict.fromkeys(role for _, role in self.modules))


def factored_layers(
    risk: Parameters, *, dense_norms: bool, max_side: int, gates: str = "joint"
) -> tuple[list[FactoredLayer], dict[str, str]]:
    """The factored layers of a risk's parameters, and why the other parameters are in none.

    Args:
        risk: Model and parameters.
        dense_norms: Whether blocks of normalization layers are dense, or diagonal.
        max_side: Sides that are longer have a diagonal factor.
        gates: Whether the gates of recurrent modules have one left factor (``"joint"``) or one
            each (``"separate"``).
    """
    every = Owners(risk.model)
    inside = HiddenOwners(risk, every)
    names = {id(param): name for name, param in risk.params.items()}
    layers: list[FactoredLayer] = []
    uncovered: dict[str, str] = {}
    joined: set[str] = set()
    for name in risk.space.names:
        if name in joined:
            continue
        if name in inside:
            reason = inside.unfit(name)
            if reason:
                uncovered[name] = reason
            found_inside = () if reason else inside.layers_of(name, separate=gates == "separate")
            for own in found_inside:
                limited = _sides(_inside(risk, own), dense_norms, max_side)
                layers.append(limited)
                joined.update(limited.names)
            continue
        owners = every.of(risk.params[name])
        keys = {key for _, key in owners}
        reason = _unfit(owners, keys)
        if reason:
            uncovered[name] = reason
            continue
        modules = [module for module, _ in owners]
        bias = _common_bias(names, every, modules) if keys == {"weight"} else name
        found = _layer(risk, name if keys == {"weight"} else None, bias, modules)
        limited = _sides(found, dense_norms, max_side)
        layers.append(limited)
        joined.update(limited.names)
    return layers, uncovered


def role_of(module: nn.Module) -> str | None:
    """The role of a module, or ``None`` if its gradient is not known to factorize."""
    if "forward" in module.__dict__:
        return None
    if layer_of(module) is not None:
        return "matrix"
    if isinstance(module, nn.Embedding):
        plain = type(module).forward is nn.Embedding.forward and not module.scale_grad_by_freq
        return "embedding" if plain and module.max_norm is None else None
    if isinstance(module, (*_TRAILING, *_CHANNELS)):
        return "scale"
    # Hugging Face's and others' own RMSNorm classes: one weight along the last axis
    own = module._parameters.get("weight")
    named = plain_type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
    return "scale" if named and own is not None and own.ndim == 1 else None


def on_channels(module: nn.Module) -> bool:
    """Whether the weight of a normalization layer is along axis 1, not at the end."""
    return isinstance(module, _CHANNELS)


def _unfit(owners: list[Owner], keys: set[str]) -> str:
    """Why a parameter is in no factored layer, or nothing."""
    kinds = " and ".join(sorted({plain_type(module).__name__ for module, _ in owners}))
    roles = {role_of(module) for module, _ in owners}
    if None in roles:
        return (
            f"it belongs to {kinds}; factored are Linear, Conv1d, Conv2d, Conv3d, Embedding, "
            "normalization layers and Hugging Face's Conv1D with their own forward passes, "
            "recurrent modules and MultiheadAttention"
        )
    if keys not in ({"weight"}, {"bias"}):
        return f"it is {', '.join(sorted(map(repr, keys)))} of {kinds}, neither weight nor bias"
    if keys == {"bias"}:
        return "" if len(roles) == 1 else f"it is shared by {kinds}"
    layers = {layer_of(module) for module, _ in owners}
    if len(roles) == 1:
        same = len(layers) == 1 and len({on_channels(module) for module, _ in owners}) == 1
        return "" if same else f"it is shared by layers of different kinds ({kinds})"
    linear = {layer for layer in layers if layer is not None}
    if roles == {"matrix", "embedding"} and {layer.kind for layer in linear} == {"linear"}:
        return ""
    return f"it is shared by layers of different kinds ({kinds})"


def _common_bias(names: Mapping[int, str], every: Owners, modules: list[nn.Module]) -> str | None:
    """The bias, of those ``names``, that all modules of one weight, and no others, have."""
    bias = modules[0]._parameters.get("bias")
    alike = all(module._parameters.get("bias") is bias for module in modules)
    if bias is None or id(bias) not in names or not alike:
        return None
    owners = every.of(bias)
    same = {id(module) for module, _ in owners} == {id(m) for m in modules}
    own = same and {key for _, key in owners} == {"bias"}
    return names[id(bias)] if own and len({role_of(m) for m in modules}) == 1 else None


def _layer(
    risk: Parameters, weight: str | None, bias: str | None, modules: list[nn.Module]
) -> FactoredLayer:
    """The layer, with dense sides."""
    space = risk.space
    roles = [role_of(module) or "" for module in modules]
    owner = (weight or bias or "").rpartition(".")[0]
    name = (owner or weight or "weight") if weight is not None else bias or ""
    kind = " and ".join(sorted({plain_type(module).__name__ for module in modules}))
    size = 0 if bias is None else risk.params[bias].numel()
    parts: list[Part] = []
    shape = (1, 1, size) if roles[0] == "scale" else (1, size, 1)  # of a bias on its own
    if weight is not None:
        held = risk.params[weight]
        start = space.slice(weight).start
        layer = layer_of(modules[0]) if set(roles) == {"matrix"} else None
        if roles[0] == "scale":
            parts.append(Part(start, held.numel()))
            shape = (1, 1, held.numel() + size)
        elif layer is None:  # an embedding, or one with a linear head
            parts.append(Part(start, held.shape[1]))
            shape = (1, held.shape[0], held.shape[1])
        else:
            parts.append(Part(start, layer.width, layer.kind == "transposed"))
            shape = (layer.groups, _outputs(layer), layer.width + (bias is not None))
    if bias is not None:
        parts.append(Part(space.slice(bias).start, size if roles[0] == "scale" else 1))
    pairs = tuple(zip(modules, roles, strict=True))
    return FactoredLayer(name, kind, weight, bias, pairs, shape, tuple(parts), True, True)


def _inside(risk: Parameters, own: HiddenGroup) -> FactoredLayer:
    """The layer of a linear map inside of modules, with dense sides."""
    first, space = own.maps[0], risk.space
    parts = []
    if own.weight is not None:
        start = space.slice(own.weight).start + first.first * first.width
        parts.append(Part(start, first.width))
    if own.bias is not None:
        parts.append(Part(space.slice(own.bias).start + first.bias_first, 1))
    shape = (own.groups, first.outputs // own.groups, sum(part.columns for part in parts))
    return FactoredLayer(
        name=own.name,
        kind=" and ".join(sorted({plain_type(module).__name__ for module in own.modules})),
        weight=own.weight,
        bias=own.bias,
        modules=tuple((module, "matrix") for module in own.modules),
        shape=shape,
        parts=tuple(parts),
        left_dense=True,
        right_dense=True,
        maps=tuple(found.key for found in own.maps),
    )


def _outputs(layer: Layer) -> int:
    """``O``, the number of outputs of each group."""
    return int(torch.Size(layer.shape).numel()) // (layer.width * layer.groups)


def _sides(layer: FactoredLayer, dense_norms: bool, max_side: int) -> FactoredLayer:
    _, out, width = layer.shape
    left = layer.roles == ("matrix",) and out <= max_side
    right = width <= max_side and (dense_norms or layer.roles != ("scale",))
    return replace(layer, left_dense=left, right_dense=right)
