r"""Rows of factored layers: what their gradients are products of.

The gradient of example ``n`` by a layer of the role ``matrix`` is
:math:`\sum_t g_{nt} a_{nt}^\top`, with the rows :math:`g` of the gradient at its output and
:math:`a` of its input (a convolution's: the patches under its kernel), 1 appended for a bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from curvlib.core.forward import Holder
from curvlib.operators.layers.factored import FactoredLayer, on_channels
from curvlib.operators.layers.inputs import input_rows
from curvlib.operators.layers.use import Use

_ALL = 2**62
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def input_matrix(
    layer: FactoredLayer,
    uses: Sequence[Use],
    n: int,
    at: slice,
    dtype: torch.dtype,
    *,
    ones: bool = True,
) -> Tensor:
    """Input rows of some examples, of all uses, ``[G, n, T, I]``; perhaps the memory of a use.

    Args:
        layer: A layer.
        uses: Uses of the role ``matrix``.
        n: Examples in all.
        at: Which examples.
        dtype: Type of the rows.
        ones: Whether the last column, of ones, is there where a weight has a bias.
    """
    return _of_all([_inputs(layer, use, n, at, dtype, ones=ones) for use in uses])


def output_matrix(
    layer: FactoredLayer,
    uses: Sequence[Use],
    gradients: Sequence[Tensor | None],
    n: int,
    at: slice,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of gradients at the outputs, of all uses, ``[G, n, T, O]``; perhaps their memory."""
    found = []
    for use, gradient in zip(uses, gradients, strict=True):
        g = _gradient(use, gradient, dtype)
        if use.given:
            found.append(g.reshape(g.shape[0], n, -1, g.shape[-1])[:, at])
            continue
        if isinstance(use.module, _CONVOLUTIONS):
            g = g[None] if use.x.ndim == len(use.module.kernel_size) + 1 else g
            g = g.movedim(1, -1)
        rows = g.reshape(n, -1, *layer.shape[:2])[at]
        found.append(rows.permute(2, 0, 1, 3))
    return _of_all(found)


def kept_rows(uses: Sequence[Use], n: int, at: slice) -> Tensor | None:
    """Which rows of all uses count, bool ``[n, T]``, or ``None`` for all."""
    if all(use.keep is None for use in uses):
        return None
    found = []
    for use in uses:
        keep = use.keep
        if keep is None:
            keep = torch.ones(n, use.rows(n) or 0, dtype=torch.bool, device=use.x.device)
        found.append(keep[at])
    return torch.cat(found, 1)


def embedding_rows(
    use: Use, gradient: Tensor | None, n: int, at: slice, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices ``[n, T]``, gradients ``[n, T, d]``, and which rows have a gradient, ``[n, T]``.

    That of the padding index is zero, by the definition of the module.
    """
    index = use.x.reshape(n, -1)[at]
    g = _gradient(use, gradient, dtype)
    rows = g.reshape(n, -1, g.shape[-1])[at]
    padding = getattr(use.module, "padding_idx", None)
    valid = torch.ones_like(index, dtype=torch.bool) if padding is None else index != padding
    return index, rows * valid[..., None], valid


def scale_rows(
    layer: FactoredLayer,
    uses: Sequence[Use],
    gradients: Sequence[Tensor | None],
    n: int,
    at: slice,
    dtype: torch.dtype,
) -> Tensor:
    """Gradients by the weight (and bias) of a normalization layer, ``[n, I]``."""
    total: Tensor | None = None
    for use, gradient in zip(uses, gradients, strict=True):
        g = _gradient(use, gradient, dtype)
        parts = []
        if layer.weight is not None:
            parts.append(_per_example(use, g * normalized(use).to(dtype), n, at))
        if layer.bias is not None:
            parts.append(_per_example(use, g, n, at))
        rows = torch.cat(parts, 1)
        total = rows if total is None else total + rows
    assert total is not None
    return total


def normalized(use: Use) -> Tensor:
    r"""What a normalization layer multiplies by its weight: its output is linear in it."""
    module = use.module
    held = {name: p for name, p in module._parameters.items() if p is not None}
    names = [name for name in ("weight", "bias") if name in held]
    x = use.x.to(next(iter(held.values())).dtype)
    with torch.no_grad():
        ends = []
        for value in (1.0, 0.0):
            swapped = {
                f"model.{name}": torch.full(
                    tuple(held[name].shape),
                    value if name == "weight" else 0.0,
                    dtype=held[name].dtype,
                    device=x.device,
                )
                for name in names
            }
            # of BatchNorm in training mode, which moves its running statistics
            copies = {f"model.{k}": b.clone() for k, b in module._buffers.items() if b is not None}
            ends.append(
                torch.func.functional_call(
                    Holder(module), swapped | copies, (lambda m: type(m).forward(m, x),)
                )
            )
    out: Tensor = ends[0] - ends[1]
    return out


def _of_all(rows: list[Tensor]) -> Tensor:
    """Rows of all uses, ``[G, n, T, d]``; of a single one without a copy."""
    return rows[0] if len(rows) == 1 else torch.cat(rows, 2)


def _per_example(use: Use, product: Tensor, n: int, at: slice) -> Tensor:
    if on_channels(use.module):
        moved = product.movedim(1, -1)
        size = moved.shape[-1]
    else:
        weight = use.module.weight
        moved = product
        size = int(weight.numel()) if isinstance(weight, Tensor) else product.shape[-1]
    return moved.reshape(n, -1, size)[at].sum(1)


def _gradient(use: Use, gradient: Tensor | None, dtype: torch.dtype) -> Tensor:
    if gradient is None:
        return torch.zeros(use.shape, dtype=dtype, device=use.x.device)
    return gradient.to(dtype)


def _inputs(
    layer: FactoredLayer, use: Use, n: int, at: slice, dtype: torch.dtype, *, ones: bool
) -> Tensor:
    G, _, width = layer.shape
    if layer.weight is None:
        T = use.rows(n)
        count = len(range(*at.indices(n)))
        return torch.ones((1, count, T or 0, 1), dtype=dtype, device=use.x.device)
    x = use.x
    if use.given:
        rows = x.reshape(x.shape[0], n, -1, x.shape[-1])[:, at].to(dtype)
    elif isinstance(use.module, _CONVOLUTIONS):
        x = x[None] if x.ndim == len(use.module.kernel_size) + 1 else x
        shape = x.shape[1:]
        x = x.reshape(n, -1, *shape)[at].reshape(-1, *shape)
        rows = next(iter(input_rows(use.module, x, dtype=dtype, memory=_ALL)))
        # columns (*kernel, in), as of Layer.matrix, become (in, *kernel), as of the flat vector
        channels = shape[0] // G
        rows = rows.unflatten(-1, (-1, channels)).transpose(-1, -2).flatten(-2)
    else:
        rows = x.reshape(n, -1, x.shape[-1])[at].to(dtype)[None]
    rows = rows.reshape(rows.shape[0], len(range(*at.indices(n))), -1, rows.shape[-1])
    if ones and rows.shape[-1] < width:
        rows = torch.cat([rows, rows.new_ones((*rows.shape[:-1], 1))], -1)
    return rows
