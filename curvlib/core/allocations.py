"""How many bytes of tensors a computation has at once, on any device."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Allocations(TorchDispatchMode):
    """Counts bytes of tensors that are made while it is entered.

    What kernels allocate inside themselves is not seen.

    Attributes:
        live: Bytes of what was made since and is still there.
        peak: The most that this has been.

    Example:
        >>> import torch
        >>> with Allocations() as found:
        ...     x = torch.zeros(10, dtype=torch.float64)
        ...     y = (x + 1).view(2, 5)
        ...     del x
        >>> found.live, found.peak
        (80, 160)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            leaf.untyped_storage()._cdata
            for leaf in tree_iter((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for leaf in tree_iter(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self._known and key not in given:
                    size = storage.nbytes()
                    self._known[key] = weakref.finalize(storage, self._free, key, size)
                    self.live += size
        self.peak = max(self.peak, self.live)
        return out

    def _free(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size
