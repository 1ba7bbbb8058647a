r"""Multiply-adds: how often each weight is used for one example.

A weight of a linear layer takes part in one multiply-add for every position it is applied to, a
weight of a convolution in one for every output position (padding included). They are the costs
with which :func:`curvlib.pruning.budgets.allocate` prunes to a number of multiply-adds.

One forward pass runs under a dispatch mode that sees every matrix product and convolution, in
whatever module or function it happens, and finds the parameter that an operand is: the parameter
itself, a view of it (a slice of a packed attention projection), or what was computed from it and
other parameters and buffers alone (a masked or normalized weight).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from curvlib.core.forward import has_recurrent
from curvlib.core.risk import Risk

#: Positions of the factors of each product, by the operation's name.
_PRODUCTS = {
    "mm": (0, 1),
    "bmm": (0, 1),
    "mv": (0, 1),
    "dot": (0, 1),
    "addmm": (1, 2),
    "addmv": (1, 2),
    "addbmm": (1, 2),
    "baddbmm": (1, 2),
}
_CONVOLUTIONS = ("convolution", "_convolution", "convolution_overrideable")
#: Operations on weights [.., ..] that multiply nothing, or as much as their output has entries.
_LIGHT = (
    "embedding",
    "index",
    "index_select",
    "gather",
    "cat",
    "native_layer_norm",
    "native_group_norm",
    "_fused_rms_norm",
)


def flops(risk: Risk) -> dict[str, float]:
    """Multiply-adds per example that each weight takes part in, by parameter.

    The first batch (of all ranks) is run forward once, and the model is left as it was. Recurrent
    layers are counted for as many steps as that batch has.

    Args:
        risk: Model, data and parameters.

    Returns:
        A number for each parameter of ``risk.space``: the mean over its entries. It is 0 for what
        is only added, scaled with or looked up (biases, norms, embeddings), and for parameters
        that the forward pass does not use. A parameter that is used in several places counts for
        all of them.

    Raises:
        RuntimeError: If a weight goes into an operation that is not understood: names both; or
            another rank failed.
        ValueError: If there is no batch.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 5))
        >>> data = (torch.zeros(7, 1, 4, 4), torch.zeros(7, 5))
        >>> flops(Risk(model, nn.MSELoss(), data, params=["*.weight"]))
        {'0.weight': 4.0, '2.weight': 1.0}
    """
    if risk.group is None:
        return _flops(risk)
    found: dict[str, float] = {}
    with risk.group.together("counting multiply-adds"):
        if next(risk.batches(shard=True), None) is not None:
            found = _flops(risk)
    every: list[dict[str, float]] = risk.group.values(found)
    first = next((costs for costs in every if costs), None)
    if first is None:
        raise ValueError("the data has no batch on any rank; pass at least one batch")
    return first


def _flops(risk: Risk) -> dict[str, float]:
    """Of the first batch of this rank's shard."""
    counter = _Counter(risk.model, risk.params)
    with risk.untouched():
        counter.fixed(list(risk.model.buffers()))
        batch = next(iter(risk.batches(shard=True)))
        with _plain_recurrence(risk.model), counter:
            batch.output()
        examples = batch.examples
    unknown = {n: op for n, op in counter.unknown.items() if risk.params[n].ndim >= 2}
    if unknown:
        name, op = next(iter(unknown.items()))
        raise RuntimeError(
            f"the multiply-adds of {name!r} in the operation {op} are not known; leave it out with "
            "params=, or give costs of your own"
        )
    return {
        name: counter.products[name] / (max(p.numel(), 1) * max(examples, 1))
        for name, p in risk.params.items()
    }


class _Counter(TorchDispatchMode):
    """Adds up the products that parameters take part in."""

    def __init__(self, model: nn.Module, params: dict[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotation
        self.products: dict[str, int] = defaultdict(int)
        self.unknown: dict[str, str] = {}
        self.ranges: list[tuple[int, int, str | None]] = []
        self.held: list[Tensor] = []  # so that their addresses are not used again
        names = {id(p): name for name, p in params.items()}
        for p in model.parameters():
            self._add(p, names.get(id(p)))

    def fixed(self, tensors: list[Tensor]) -> None:
        """Tensors that do not depend on the data."""
        for tensor in tensors:
            self._add(tensor, None)

    def _add(self, tensor: Tensor, name: str | None) -> None:
        start = tensor.data_ptr()
        if tensor.numel() and start:
            self.held.append(tensor)
            self.ranges.append((start, start + _extent(tensor), name))

    def _find(self, tensor: Any) -> tuple[bool, str | None]:
        """Whether a tensor does not depend on the data, and which parameter it is of."""
        if not isinstance(tensor, Tensor) or tensor.numel() == 0:
            return False, None
        address = tensor.data_ptr()
        for start, stop, name in reversed(self.ranges):
            if start <= address < stop:
                return True, name
        return False, None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs the operation and books its products."""
        operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        found = [self._find(x) for x in operands]
        out = func(*args, **(kwargs or {}))
        if not operands or func.is_view or not isinstance(out, (Tensor, tuple, list)):
            return out
        if all(fixed for fixed, _ in found):
            self._derive(out, operands, [name for _, name in found])
            return out
        op = func.overloadpacket.__name__
        if op in _PRODUCTS:
            a, b = (args[i] for i in _PRODUCTS[op])
            self._book(a, b, _products(a, b))
        elif op in _CONVOLUTIONS:
            weight, transposed = args[1], args[6]
            where: Any = args[0] if transposed else out
            positions = where.numel() // where.shape[1]
            self._book(weight, None, weight.numel() * positions)
        elif torch.Tag.pointwise not in func.tags and op not in _LIGHT and not _copies(op):
            for _, name in found:
                if name is not None:
                    self.unknown.setdefault(name, str(func))
        return out

    def _book(self, a: Tensor, b: Tensor | None, count: int) -> None:
        for factor in (a, b):
            name = self._find(factor)[1]
            if name is not None:
                self.products[name] += count

    def _derive(self, out: Any, operands: list[Tensor], names: list[str | None]) -> None:
        """What is computed from parameters and buffers alone is of the parameter of its size."""
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not self._find(tensor)[0]:
                same = [
                    n
                    for n, x in zip(names, operands, strict=True)
                    if n is not None and x.numel() == tensor.numel()
                ]
                self._add(tensor, same[0] if same else None)


def _products(a: Tensor, b: Tensor) -> int:
    """Multiply-adds of a (batched) matrix product, of a matrix and a vector, or of two vectors."""
    if a.ndim == 1:
        return a.numel()
    columns = b.shape[-1] if b.ndim == a.ndim else 1
    return a.numel() * columns


def _extent(tensor: Tensor) -> int:
    """Bytes from the first to past the last entry."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return (sum((n - 1) * s for n, s in pairs) + 1) * tensor.element_size()


def _copies(op: str) -> bool:
    return op in ("clone", "_to_copy", "_unsafe_view", "detach", "contiguous", "copy_", "alias")


@contextmanager
def _plain_recurrence(model: nn.Module) -> Iterator[None]:
    """Fused recurrent kernels, which hide their products, are off (cuDNN's by the risk)."""
    backend: Any = torch.backends.mkldnn
    before = backend.enabled
    if has_recurrent(model):
        backend.enabled = False
    try:
        yield
    finally:
        if has_recurrent(model):
            backend.enabled = before
