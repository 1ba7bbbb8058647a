"""What the captured product of a batch belongs to, and the batch of fake tensors it is made of.

A captured graph is Python's side of the model frozen: modes, hooks, numbers that are attributes of
modules, and the shapes and plain values of a batch. These are read here, to be compared.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from curvlib.core.batch import Batch
from curvlib.core.data import is_mapping
from curvlib.core.risk import Risk

_PLAIN = (int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class RecordedBatch(Batch):
    """A batch of fake tensors.

    Attributes:
        terms: The batch's weight, where the loss is a mean that curvlib does not know.
    """

    terms: Tensor | None = None

    def output(self, params: Mapping[str, Tensor] | None = None) -> Any:
        """The model's output; random draws are the caller's matter."""
        return self.risk.call(self.data, params)

    def total(self, output: Any) -> Tensor:
        """Sum of the loss terms."""
        if self.terms is None:
            return super().total(output)
        value = self.risk.loss.total(output, self.target)
        return value * self.terms.to(value.dtype)


def python_state(risk: Risk) -> Hashable:
    """Python's side of the model: types, modes, hooks, and attributes that are plain values."""
    device = risk.device.type
    out: list[Any] = [torch.get_default_dtype(), torch.is_autocast_enabled(device)]
    modules = list(risk.model.modules())
    if isinstance(risk.loss.function, nn.Module):
        modules += risk.loss.function.modules()
    for module in modules:
        out.append(type(module))
        for name, value in vars(module).items():
            if isinstance(value, (*_PLAIN, FunctionType)):
                out.append((name, value))
            elif (name.endswith("_hooks") and value) or _plain_items(value):
                out.append((name, tuple(value)))
    held = [*risk.model.parameters(), *risk.model.buffers()]
    out += [(t.shape, t.stride(), t.dtype, t.device) for t in held]
    return tuple(out)


def structure(item: Any) -> Hashable:
    """The shapes of a batch's tensors, and its other values.

    Raises:
        TypeError: If it holds an object of another kind.
    """
    if isinstance(item, Tensor):
        if type(item) not in (Tensor, nn.Parameter) or item.layout != torch.strided:
            raise TypeError(f"batches hold a {type(item).__name__} of layout {item.layout}")
        return ("tensor", item.shape, item.stride(), item.dtype, item.device)
    if is_mapping(item):
        return (type(item), *((name, structure(item[name])) for name in tuple(item.keys())))
    if isinstance(item, (list, tuple)):
        return (type(item), *map(structure, item))
    if isinstance(item, _PLAIN):
        return (type(item), item)
    raise TypeError(f"batches hold a {type(item).__name__}, which a captured graph cannot read")


def rebuilt(item: Any, following: Iterator[Tensor]) -> Any:
    """A batch of the same types with other tensors."""
    if isinstance(item, Tensor):
        return next(following)
    if is_mapping(item):
        out = copy.copy(item)
        for name in tuple(item.keys()):
            out[name] = rebuilt(item[name], following)
        return out
    if isinstance(item, (list, tuple)):
        parts = [rebuilt(part, following) for part in item]
        return type(item)(*parts) if hasattr(item, "_fields") else type(item)(parts)
    return item


def _plain_items(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(v, _PLAIN) for v in value)
