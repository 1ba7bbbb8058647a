"""How often parameters are used in forward passes, by whatever function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from curvlib.core.data import tensors

#: Functions whose results' shapes, and functions whose results' order depends on the data.
_SHAPES = frozenset({"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive"})
_ORDERS = frozenset({"sort", "argsort", "topk", "multinomial"})


class WeightUses(TorchFunctionMode):
    """Counts functions that make tensors from a parameter.

    Uses that no module's call explains (``F.linear`` with the weight of another module,
    attention's projections) are thereby noticed.

    Args:
        params: Parameters, by name.

    Attributes:
        counts: Uses of each parameter, by the name of the function.
        selects: Whether entries were selected by their values (boolean masks, ``nonzero``).
        sorts: Whether entries were put in order by their values.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 2)
        >>> with WeightUses({"w": layer.weight}) as uses:
        ...     _ = layer(torch.ones(1, 2)) + layer.weight
        >>> uses.counts
        {'w': {'linear': 1, 'add': 1}}
    """

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.counts: dict[str, dict[str, int]] = {name: {} for name in params}
        self.selects = False
        self.sorts = False
        self._names = {id(param): name for name, param in params.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function, and counts it where it makes tensors from a parameter."""
        out = func(*args, **(kwargs or {}))
        called = getattr(func, "__name__", str(func))
        self.selects |= called in _SHAPES or (called == "where" and len(args) == 1)
        if called in ("__getitem__", "__setitem__"):
            self.selects |= any(t.dtype == torch.bool for t in tensors([args[1]]))
        self.sorts |= called in _ORDERS
        if next(tensors(out), None) is not None:
            for item in tensors([args, kwargs or {}]):
                name = self._names.get(id(item))
                if name is not None:
                    self.counts[name][called] = self.counts[name].get(called, 0) + 1
        return out
