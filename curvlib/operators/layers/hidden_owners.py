"""Which selected parameters are of linear maps inside of modules, and how they go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from curvlib.core.owners import Owners
from curvlib.core.ranks.dtensors import plain_type
from curvlib.operators.layers.hidden_map import HiddenMap
from curvlib.operators.layers.hidden_maps import hidden_maps, hides_maps, unfit
from curvlib.operators.layers.parameters import Parameters

_Owners = list[tuple[nn.Module, HiddenMap]]


@dataclass(frozen=True, eq=False)
class HiddenGroup:
    """Linear maps that share their parameters: one, or several of tied weights.

    Attributes:
        name: Name of the layer that they are.
        weight: Name of the weight, if it is one of the selected parameters.
        bias: Name of the bias that is joined to it, or of the bias on its own.
        modules: The modules,
        maps: and the map in each.
        groups: In how many blocks of outputs.
    """

    name: str
    weight: str | None
    bias: str | None
    modules: tuple[nn.Module, ...]
    maps: tuple[HiddenMap, ...]
    groups: int


class HiddenOwners:
    """The modules with hidden linear maps that own parameters of a model."""

    def __init__(self, held: Parameters, owners: Owners) -> None:
        self.held = held
        self._owners = owners
        self._names = {id(param): name for name, param in held.params.items()}
        self._weights: dict[str, _Owners] = {}
        self._biases: dict[str, _Owners] = {}
        self._places: dict[str, set[tuple[int, str]]] = {}
        for module in held.model.modules():
            for own in hidden_maps(module) if hides_maps(module) else ():
                self._add(self._weights, module, own, own.weight)
                if own.bias is not None:
                    self._add(self._biases, module, own, own.bias)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def unfit(self, name: str) -> str:
        """Why a parameter is in no factored layer, or nothing."""
        owners = [*self._weights.get(name, []), *self._biases.get(name, [])]
        reasons = [reason for module, _ in owners if (reason := unfit(module))]
        if reasons:
            return reasons[0]
        param = self.held.params[name]
        everywhere = {
            (id(module), key): plain_type(module).__name__ for module, key in self._owners.of(param)
        }
        kinds = {plain_type(module).__name__ for module, _ in owners}
        others = {kind for place, kind in everywhere.items() if place not in self._places[name]}
        parts = _grouped(owners, "first" if name in self._weights else "bias_first")
        alike = all(
            len({(m.outputs, m.gates, m.width if name in self._weights else 0) for _, m in part})
            == 1
            for part in parts
        )
        if others or not alike or (name in self._weights and name in self._biases):
            both = " and ".join(sorted(kinds | others))
            return f"it is shared by layers of different kinds ({both})"
        return ""

    def layers_of(self, name: str, *, separate: bool) -> list[HiddenGroup]:
        """The layers of a weight with its biases, or of a bias that is with no weight.

        Args:
            name: Of the parameter.
            separate: Whether each gate is a block of its own.
        """
        if name in self._weights:
            groups = _grouped(self._weights[name], "first")
            biases = [self._joined_bias(group) for group in groups]
            return [
                self._group(name, group, name, bias, separate)
                for group, bias in zip(groups, biases, strict=True)
            ]
        if self._goes_with_weights(name):
            return []  # they come with the weight
        return [
            self._group(name, group, None, name, separate=False)
            for group in _grouped(self._biases[name], "bias_first")
        ]

    def _add(self, found: dict[str, _Owners], module: nn.Module, own: HiddenMap, at: str) -> None:
        holder, key = _holder(module, at)
        param = holder._parameters.get(key)
        name = self._names.get(id(param))
        if param is not None and name is not None:
            found.setdefault(name, []).append((module, own))
            self._places.setdefault(name, set()).add((id(holder), key))

    def _joined_bias(self, group: _Owners) -> str | None:
        """The bias that the maps of a group, and no others, have, if all of it has such a group."""
        found = {self._bias_name(module, own) for module, own in group}
        name = next(iter(found))
        return name if len(found) == 1 and name and self._goes_with_weights(name) else None

    def _goes_with_weights(self, bias: str) -> bool:
        """Whether each part of a bias belongs to just the maps of one selected weight."""
        if bias not in self._biases or self.unfit(bias):
            return False
        weights = {
            _ids(group)
            for name, owners in self._weights.items()
            if not self.unfit(name)
            for group in _grouped(owners, "first")
        }
        return all(_ids(group) in weights for group in _grouped(self._biases[bias], "bias_first"))

    def _bias_name(self, module: nn.Module, own: HiddenMap) -> str | None:
        if own.bias is None:
            return None
        holder, key = _holder(module, own.bias)
        return self._names.get(id(holder._parameters.get(key)))

    def _group(
        self, name: str, group: _Owners, weight: str | None, bias: str | None, separate: bool
    ) -> HiddenGroup:
        first = group[0][1]
        suffix = first.weight if weight is not None else first.bias or ""
        prefix = name[: -len(suffix)] if name.endswith(suffix) else f"{name}."
        return HiddenGroup(
            f"{prefix}{first.key}{'' if weight is not None else '.bias'}",
            weight,
            bias,
            tuple(module for module, _ in group),
            tuple(own for _, own in group),
            first.gates if separate else 1,
        )


def _holder(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and the parameter's name there."""
    path, _, key = name.rpartition(".")
    return (module.get_submodule(path) if path else module), key


def _grouped(owners: Sequence[tuple[nn.Module, HiddenMap]], by: str) -> list[_Owners]:
    """Owners by the part of the parameter that they use."""
    found: dict[int, _Owners] = {}
    for module, own in owners:
        found.setdefault(own.first if by == "first" else own.bias_first, []).append((module, own))
    return list(found.values())


def _ids(group: _Owners) -> frozenset[tuple[int, str]]:
    return frozenset((id(module), own.key) for module, own in group)
