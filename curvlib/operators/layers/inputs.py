r"""Layers that multiply rows of inputs by a matrix, and these rows.

A linear layer maps each row :math:`x_t` of its input to :math:`W x_t` (plus a bias); a convolution
does the same with the patch of the input under its kernel at each place of its output, and a
grouped convolution with the patches of each group. :func:`layer_of` recognizes such layers,
:meth:`Layer.matrix` is their weight as a matrix, and :func:`input_rows` streams the rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvlib.core.ranks.dtensors import plain_type

_CONVOLUTIONS: dict[type[nn.Module], str] = {
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
}


@dataclass(frozen=True)
class Layer:
    """How the weight of a layer is a matrix.

    Attributes:
        kind: ``"linear"``, ``"conv1d"``, ``"conv2d"``, ``"conv3d"``, or ``"transposed"`` for
            weights of shape ``[in, out]`` (``Conv1D`` of Hugging Face's GPT-2).
        shape: Shape of the weight.
        groups: Number of groups ``G`` of channels; 1 but for grouped convolutions.

    Example:
        >>> layer = layer_of(torch.nn.Conv2d(4, 6, 3, groups=2))
        >>> layer.matrix(torch.zeros(layer.shape)).shape
        torch.Size([2, 3, 18])
    """

    kind: str
    shape: tuple[int, ...]
    groups: int = 1

    @property
    def width(self) -> int:
        """``n``, the length of a row of inputs."""
        return self.shape[0] if self.kind == "transposed" else math.prod(self.shape[1:])

    def matrix(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as ``[G, out / G, n]``, each row an output's weights.

        Columns of convolutions are in the order ``(*kernel, in)``, so that neighbouring columns
        are neighbouring input channels, as in :class:`~curvlib.core.partition.Partition`.

        Raises:
            ValueError: If it has another shape.
        """
        if tuple(weight.shape) != self.shape:
            raise ValueError(
                f"expected a weight of shape {list(self.shape)}, got {list(weight.shape)}; "
                "pass the parameter that the record was made for"
            )
        rows = weight.mT if self.kind == "transposed" else weight.movedim(1, -1)
        return rows.reshape(self.groups, -1, self.width)

    def weight(self, matrix: Tensor) -> Tensor:
        """A matrix ``[G, out / G, n]`` (or ``[out, n]``) in the weight's own shape.

        Raises:
            ValueError: If it has not as many entries, or other columns.
        """
        if matrix.numel() != math.prod(self.shape) or matrix.shape[-1] != self.width:
            outputs = math.prod(self.shape) // self.width
            raise ValueError(
                f"expected a matrix of shape {[self.groups, outputs // self.groups, self.width]}, "
                f"got {list(matrix.shape)}"
            )
        if self.kind == "transposed":
            return matrix.reshape(-1, self.width).mT.contiguous()
        rows = matrix.reshape(self.shape[0], *self.shape[2:], self.shape[1])
        return rows.movedim(-1, 1).contiguous()


def layer_of(module: nn.Module) -> Layer | None:
    """The layer that a module is, or ``None`` if its input rows are not known.

    Subclasses count where they keep the forward pass of their class. Hugging Face's ``Conv1D`` is
    recognized by its name and ``[in, out]`` weight, so that transformers need not be installed.
    """
    if "forward" in module.__dict__:
        return None
    weight = module._parameters.get("weight")
    if weight is None:
        return None
    shape = tuple(weight.shape)
    own = type(module).forward
    if isinstance(module, nn.Linear):
        return Layer("linear", shape) if own is nn.Linear.forward else None
    for base, kind in _CONVOLUTIONS.items():
        if isinstance(module, base):
            plain = own is base.forward and _inner(type(module)) is _inner(base)
            groups: Any = module.groups  # nn.Module's attributes are tensors or modules to mypy
            return Layer(kind, shape, int(groups)) if plain else None
    if plain_type(module).__name__ == "Conv1D" and weight.ndim == 2 and hasattr(module, "nf"):
        return Layer("transposed", shape)
    return None


def _inner(kind: type[nn.Module]) -> Any:
    return getattr(kind, "_conv_forward", None)


def positions(module: nn.Module, x: Tensor) -> tuple[int, ...]:
    """Shape of the places at which a layer takes a row of its input: batch, tokens, pixels."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return tuple(x.shape[:-1])
    batched = _batched(module, x)
    axes = tuple(range(2, batched.ndim))
    pads = _padding(module)
    sizes = [
        (batched.shape[a] + sum(pads[i]) - _span(module, i)) // module.stride[i] + 1
        for i, a in enumerate(axes)
    ]
    return (batched.shape[0], *sizes)


def input_rows(
    module: nn.Module,
    x: Tensor,
    *,
    keep: Tensor | None = None,
    dtype: torch.dtype,
    memory: int,
) -> Iterator[Tensor]:
    """Rows that a layer multiplies by its weight matrix, in chunks.

    Args:
        module: A layer that :func:`layer_of` recognizes.
        x: Its input.
        keep: Which rows count, bool, of the shape of :func:`positions`. Default: all.
        dtype: Type of the rows.
        memory: Bytes that a chunk should take at most (one example or row at least).

    Yields:
        ``[G, T, n]``.
    """
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        rows = x.reshape(-1, x.shape[-1])
        if keep is not None:
            rows = rows[keep.reshape(-1)]
        step = max(1, memory // max(1, rows.shape[-1] * dtype.itemsize))
        for part in rows.split(step):
            yield part.to(dtype)[None]
        return
    places = positions(module, x)
    batched = _batched(module, x)
    each = math.prod(places[1:]) * batched.shape[1] * math.prod(module.kernel_size)
    step = max(1, memory // max(1, each * dtype.itemsize))
    kept = [None] * len(range(0, places[0], step)) if keep is None else keep.split(step)
    for part, chosen in zip(batched.split(step), kept, strict=True):
        patches = _patches(module, part).to(dtype)
        yield patches if chosen is None else patches[:, chosen.reshape(-1)]


def _batched(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    return x[None] if x.ndim == len(module.kernel_size) + 1 else x


def _span(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, axis: int) -> int:
    """Extent of the dilated kernel along a spatial axis."""
    return module.dilation[axis] * (module.kernel_size[axis] - 1) + 1


def _padding(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[tuple[int, int]]:
    """Padding before and after along each spatial axis."""
    if module.padding == "valid":
        return [(0, 0)] * len(module.kernel_size)
    if isinstance(module.padding, str):  # "same": an odd rest goes to the end
        totals = [_span(module, i) - 1 for i in range(len(module.kernel_size))]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in module.padding]


def _patches(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """Patches ``[G, T, prod(kernel) * C / G]`` of a batched input ``[N, C, *S]``."""
    dims = len(module.kernel_size)
    pads = [amount for pair in reversed(_padding(module)) for amount in pair]
    if any(pads):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, pads, mode=mode)
    for axis in range(dims):
        x = x.unfold(2 + axis, _span(module, axis), module.stride[axis])
    for axis in range(dims):
        spread = [slice(None)] * (2 + dims) + [slice(None)] * dims
        spread[2 + dims + axis] = slice(None, None, module.dilation[axis])
        x = x[tuple(spread)]
    # now [N, C, *places, *kernel]
    x = x.unflatten(1, (module.groups, -1))
    order = [1, 0, *range(3, 3 + 2 * dims), 2]  # groups, places, kernel, channels
    x = x.permute(order)
    return x.reshape(module.groups, math.prod(x.shape[1 : 2 + dims]), -1)
