r"""Second moments of the inputs of layers: what layer-wise curvature is made of.

For a layer with the weight matrix :math:`W` that is applied to the rows :math:`x_1, \dots, x_T` of
its inputs over the data (examples times tokens, or times places of a convolution),

.. math:: A = \frac1T \sum_{t=1}^T x_t x_t^\top = \frac1T X^\top X, \qquad
          \bar x = \frac1T \sum_t x_t .

They serve two purposes:

layer-wise pruning
    A change :math:`\Delta` of the weight changes the layer's outputs by
    :math:`\sum_t |\Delta x_t|^2 = T\, \mathrm{tr}(\Delta A \Delta^\top)`. The Hessian of that sum
    with respect to each row of :math:`W` is :math:`2 X^\top X = 2 T A`, the matrix ``2 X X^T`` of
    Frantar and Alistarh ("Optimal brain compression", 2022; "SparseGPT", 2023), whose inputs are
    columns. Everything here is *per row* (divided by :math:`T`), which leaves minimizers as they
    are and makes layers with many and few rows comparable.
Kronecker-factored curvature
    :math:`A` is the factor of the inputs; ``[[A, mean], [mean^T, 1]]`` is that of weight and bias.

Rows are read by hooks in one pass over the data, which is streamed: no more than one chunk of
rows is held. Uses of a weight that hooks cannot see (``F.linear`` with the weight of another
module, attention's projections) are noticed, and such weights are not covered rather than wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from curvlib.core.owners import Owners
from curvlib.core.ranks.group import Group
from curvlib.core.result import Result
from curvlib.core.risk import Risk
from curvlib.operators.layers.inputs import Layer, input_rows, layer_of, positions
from curvlib.operators.layers.row_masks import Mask, mask_at, row_mask
from curvlib.operators.layers.weight_uses import WeightUses

#: Bytes of a chunk of rows.
CHUNK = 64 * 2**20


@dataclass(frozen=True, eq=False, repr=False)
class InputGram(Result):
    r"""Second moment of the inputs of one weight.

    Attributes:
        name: Name of the weight.
        gram: :math:`\frac1T X^\top X`, ``[n, n]``, or ``[G, n, n]`` for ``G > 1`` groups.
        mean: Mean row, ``[n]`` or ``[G, n]``.
        count: ``T``, the number of rows (of each group), over all uses of the weight.
        kind: ``"linear"``, ``"conv1d"``, ``"conv2d"``, ``"conv3d"`` or ``"transposed"`` (weights
            ``[in, out]``, as in Hugging Face's ``Conv1D``).
        shape: Shape of the weight.
        groups: ``G``.
    """

    name: str
    gram: Tensor
    mean: Tensor
    count: int
    kind: str
    shape: tuple[int, ...]
    groups: int

    @property
    def layer(self) -> Layer:
        """How the weight is a matrix."""
        return Layer(self.kind, tuple(self.shape), self.groups)

    @property
    def stacked(self) -> Tensor:
        """The Gram matrices as ``[G, n, n]``, also for one group."""
        return self.gram[None] if self.gram.ndim == 2 else self.gram

    def matrix(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as ``[G, out / G, n]``: see :meth:`Layer.matrix`."""
        return self.layer.matrix(weight)

    def weight(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`matrix`."""
        return self.layer.weight(matrix)


class InputGrams(dict[str, InputGram]):
    """Input Gram matrices by the name of the weight.

    Attributes:
        uncovered: Names of the parameters that were asked for and have no Gram matrix, each with
            the reason. Biases of covered layers are not listed.
    """

    def __init__(self, grams: dict[str, InputGram], uncovered: dict[str, str]) -> None:
        super().__init__(grams)
        self.uncovered = uncovered


def input_grams(
    risk: Risk,
    names: str | Iterable[str] | None = None,
    *,
    mask: Mask | None = None,
    dtype: torch.dtype = torch.float64,
    memory: int = CHUNK,
) -> InputGrams:
    r"""Second moments of the inputs of a model's layers, in one pass over the data.

    Covered are the weights of ``Linear``, ``Conv1d``, ``Conv2d``, ``Conv3d`` (groups, dilation,
    every padding) and Hugging Face's ``Conv1D``. The rows of modules that are called several
    times, and of modules that share a weight, are summed.

    Args:
        risk: Model, data and parameters. The loss is not used, nor are targets.
        names: Names of parameters, or globs on them. Default: all parameters of the risk. What
            cannot be covered is listed in ``uncovered``, and raises where it is named exactly.
        mask: Function of a batch that returns which rows count (padding does not), a bool tensor
            like an attention mask ``[N, T]``, in the layout of the layers' inputs. Layers with one
            row for each example count all.
        dtype: Type of products and sums: float64, or float32.
        memory: Bytes that a chunk of rows may take.

    Returns:
        :class:`InputGram` by name, a dictionary with the attribute ``uncovered``.

    Raises:
        TypeError: If ``dtype`` is another type, or ``mask`` returns no bool tensor.
        ValueError: If names select nothing, a named parameter or all are not covered, or a mask
            does not fit.
        FloatingPointError: If inputs are not finite; names the layer.

    Example:
        >>> import torch, curvlib as cl
        >>> model = torch.nn.Linear(2, 1)
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
        >>> risk = cl.Risk(model, torch.nn.MSELoss(), (x, torch.zeros(2, 1)))
        >>> gram = input_grams(risk)["weight"]
        >>> gram.gram.tolist(), gram.mean.tolist(), gram.count
        ([[5.0, 1.0], [1.0, 2.0]], [2.0, 1.0], 2)
    """
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype= is torch.float32 or torch.float64, got {dtype}")
    if memory < 1:
        raise ValueError(f"memory= is a positive number of bytes, got {memory}")
    exact, chosen = _chosen(risk, names)
    sums, uncovered = _sums(risk, chosen, dtype)
    _require_named(exact, uncovered)
    if sums:
        uses = WeightUses({name: found.weight for name, found in sums.items()})
        group = risk.group
        shard = nullcontext() if group is None else group.together("the inputs of its shard")
        with shard, risk.untouched(), torch.no_grad():
            for batch in risk.batches(shard=True):
                kept = None if mask is None else row_mask(mask, batch.data)
                with _watched(sums, kept, memory), uses:
                    batch.output()
                _require_finite(sums, batch.index)
        for name, found in sums.items():
            found.uses = uses.counts[name]
        if group is not None:
            _join(sums, group)
    for name in [name for name, found in sums.items() if found.reason]:
        uncovered[name] = sums.pop(name).reason
    _require_named(exact, uncovered)
    if not sums:
        why = "; ".join(f"{name!r}: {reason}" for name, reason in uncovered.items())
        raise ValueError(
            f"no weight has input rows that curvlib knows ({why}); name others with names=, or "
            "select weights of Linear, Conv1d, Conv2d or Conv3d layers with params="
        )
    modules = [module for found in sums.values() for module in found.modules]
    covered = {id(module._parameters.get("bias")) for module in modules}
    listed = {
        name: uncovered[name]
        for name in risk.space.names
        if name in uncovered and id(risk.params[name]) not in covered
    }
    return InputGrams({name: found.result(name) for name, found in sums.items()}, listed)


def _chosen(risk: Risk, names: str | Iterable[str] | None) -> tuple[list[str], list[str]]:
    """Names given exactly, and all that are selected in the order of the space."""
    known = risk.space.names
    if names is None:
        return [], list(known)
    items = [names] if isinstance(names, str) else list(names)
    for item in items:
        if not any(name == item or fnmatchcase(name, item) for name in known):
            raise ValueError(f"{item!r} in names= selects no parameter; there are {list(known)}")
    exact = [name for name in known if name in items]
    return exact, [n for n in known if any(n == i or fnmatchcase(n, i) for i in items)]


def _require_named(exact: list[str], uncovered: dict[str, str]) -> None:
    for name in exact:
        if name in uncovered:
            raise ValueError(
                f"parameter {name!r} has no input Gram matrix: {uncovered[name]}; leave it out of "
                "names="
            )


@dataclass
class _Sum:
    """Sums of one weight, while they are made."""

    weight: Tensor
    layer: Layer
    modules: list[nn.Module]
    gram: Tensor
    total: Tensor
    count: int = 0
    calls: int = 0  # of the modules
    uses: dict[str, int] = field(default_factory=dict)  # of the weight, by function

    @property
    def reason(self) -> str:
        """Why the sums are not those of all uses of the weight, or nothing."""
        uses = sum(self.uses.values())
        if uses != self.calls:
            return (
                f"its modules were called {self.calls} times, but the weight was used {uses} times "
                f"({', '.join(sorted(self.uses))}), so that some inputs are unknown"
            )
        if self.calls == 0:
            return "its module was never called"
        return "" if self.count else "no row of its inputs counts"

    def result(self, name: str) -> InputGram:
        gram = (self.gram + self.gram.mT) / (2.0 * self.count)
        mean = self.total / self.count
        single = self.layer.groups == 1
        return InputGram(
            name=name,
            gram=gram[0] if single else gram,
            mean=mean[0] if single else mean,
            count=self.count,
            kind=self.layer.kind,
            shape=self.layer.shape,
            groups=self.layer.groups,
        )


def _sums(
    risk: Risk, chosen: list[str], dtype: torch.dtype
) -> tuple[dict[str, _Sum], dict[str, str]]:
    """Sums, all zero, of the weights that may be covered, and the reasons for the others."""
    sums: dict[str, _Sum] = {}
    uncovered: dict[str, str] = {}
    every = Owners(risk.model)
    for name in chosen:
        weight = risk.params[name]
        owners = every.of(weight)
        layers = {layer_of(module) for module, _ in owners}
        layer = layers.pop() if len(layers) == 1 else None
        kinds = " and ".join(sorted({type(module).__name__ for module, _ in owners}))
        if layer is None:
            uncovered[name] = (
                f"it belongs to {kinds}; curvlib knows the input rows of Linear, Conv1d, Conv2d, "
                "Conv3d and Hugging Face's Conv1D with their own forward passes"
            )
        elif any(key != "weight" for _, key in owners):
            uncovered[name] = f"it is no weight, but {owners[0][1]!r} of {kinds}"
        else:
            n = layer.width
            zeros = weight.new_zeros((layer.groups, n, n), dtype=dtype)
            modules = [module for module, _ in owners]
            sums[name] = _Sum(weight, layer, modules, zeros, zeros[:, 0].clone())
    return sums, uncovered


def _join(sums: dict[str, _Sum], group: Group) -> None:
    """Adds up what the ranks have of their shards: one sum of all matrices."""
    parts = [part for found in sums.values() for part in (found.gram, found.total)]
    flat = group.add(torch.cat([part.reshape(-1) for part in parts]))
    for part, summed in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
        part.copy_(summed.view(part.shape))
    told = group.values([[found.count, found.calls, found.uses] for found in sums.values()])
    for i, found in enumerate(sums.values()):
        found.count = sum(each[i][0] for each in told)
        found.calls = sum(each[i][1] for each in told)
        names = {name for each in told for name in each[i][2]}
        found.uses = {n: sum(each[i][2].get(n, 0) for each in told) for n in sorted(names)}


def _require_finite(sums: dict[str, _Sum], index: int) -> None:
    squares = torch.stack([found.gram.diagonal(dim1=-2, dim2=-1).sum() for found in sums.values()])
    if not bool(torch.isfinite(squares).all()):
        name = next(n for n, s in zip(sums, squares.tolist(), strict=True) if not math.isfinite(s))
        raise FloatingPointError(
            f"the inputs of the layer with weight {name!r} are not finite at batch {index}; look "
            "at the data and the layers before it, or use a higher precision"
        )


@contextmanager
def _watched(sums: dict[str, _Sum], kept: Tensor | None, memory: int) -> Iterator[None]:
    """Adds the inputs of modules to the sums during a forward pass."""
    handles = []
    try:
        for name, found in sums.items():
            for module in found.modules:
                hook = _adder(name, found, kept, memory)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adder(name: str, found: _Sum, kept: Tensor | None, memory: int) -> Any:
    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        found.calls += 1
        keep = None if kept is None else mask_at(kept.to(x.device), positions(module, x), name)
        for rows in input_rows(module, x, keep=keep, dtype=found.gram.dtype, memory=memory):
            found.gram.baddbmm_(rows.mT, rows)
            found.total += rows.sum(1)
            found.count += rows.shape[1]

    return add
