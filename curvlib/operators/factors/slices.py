"""What each rank holds of a fit to sharded parameters: slices of sums, bases and eigenvalues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from curvlib.core.ranks.group import Group
from curvlib.core.ranks.slices import Slices
from curvlib.core.ranks.spread_blocks import Cut, cut_of
from curvlib.operators.factors.files import later, own_slice
from curvlib.operators.factors.ranks import SIDES
from curvlib.operators.factors.state import FitState
from curvlib.operators.layers.factored import FactoredLayer
from curvlib.operators.layers.parameters import Parameters


class LayerSlices:
    """How the tensors of layers are cut.

    Args:
        layers: The layers.
        held: The parameters, as wholes.
        group: The ranks.
        like: Of the type and device of the tensors.
    """

    def __init__(
        self, layers: Sequence[FactoredLayer], held: Parameters, group: Group, like: Tensor
    ) -> None:
        self.group = group
        self.like = like
        self._held = held
        self._layers = {layer.name: layer for layer in layers}

    def cut(self, layer: FactoredLayer) -> Cut:
        """How the block of a layer is cut."""
        return cut_of(layer.shape, layer.left_dense, self.group.size)

    def rest(self, name: str) -> Cut:
        """How the diagonal of a parameter that is in no layer is cut."""
        return Cut((1, 1, self._held.params[name].numel()), 2)

    def side(self, layer: FactoredLayer, side: str) -> Slices:
        """How a factor of a layer, or its basis, is cut."""
        cut, which = self.cut(layer), SIDES.index(side)
        dense = (layer.left_dense, layer.right_dense)[which]
        return cut.side(which) if dense else cut.diagonal(which)

    def of(self, key: str) -> Slices:
        """How a tensor of :class:`.FitState` is cut, by its key."""
        if key in self._layers:
            return self.cut(self._layers[key]).values
        name, _, last = key.rpartition("|")
        if last == "rest":
            return self.rest(name).values
        name = name if name in self._layers else name.rpartition("|")[0]
        return self.side(self._layers[name], last)

    def zeros(self, slices: Slices) -> Tensor:
        """This rank's slice of zeros."""
        return self.like.new_zeros(slices.local(self.group.rank, self.group.size))


class StateSlices:
    """How checkpoints hold states whole: see :class:`curvlib.core.ranks.file_parts.StateParts`."""

    def __init__(self, slices: LayerSlices) -> None:
        self.slices = slices
        self.group = slices.group

    def taken(self, state: FitState) -> dict[str, Any]:
        """The fields, with tensors that are gathered while they are written."""
        fields = dict(vars(state))
        for field in ("sums", "bases"):
            fields[field] = {
                key: later(own, self.slices.of(key), self.group)
                for key, own in fields[field].items()
            }
        return fields

    def given(self, fields: dict[str, Any]) -> dict[str, Any]:
        """This rank's slices of the fields in a file."""
        out, device = dict(fields), self.slices.like.device
        for field in ("sums", "bases"):
            out[field] = {
                key: own_slice(stored, self.slices.of(key), self.group, device)
                for key, stored in fields[field].items()
            }
        out["values"] = {
            key: stored.narrow(0, 0, stored.shape[0], device)
            for key, stored in fields["values"].items()
        }
        return out
