"""Normalization by primitive operations, whose derivatives of every order are right.

PyTorch's native LayerNorm, batch-statistics BatchNorm and InstanceNorm have right first and second
derivatives in reverse mode, but wrong third ones (pytorch#186256). While :class:`PrimitiveNorms`
is entered, they are computed from means and products instead.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class PrimitiveNorms(TorchFunctionMode):
    """Replaces ``F.layer_norm``, ``F.batch_norm`` and ``F.instance_norm`` by their formulas.

    Example:
        >>> import torch
        >>> x, norm = torch.randn(3, 4), torch.nn.LayerNorm(4)
        >>> with PrimitiveNorms():
        ...     y = norm(x)
        >>> bool(torch.allclose(y, norm(x), atol=1e-6))
        True
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replaces the call where the native one's derivatives are wrong."""
        settings = kwargs or {}
        if func is F.layer_norm:
            return _layer_norm(*args, **settings)
        if func is F.batch_norm and _batch_statistics(*args, **settings):
            return _batch_norm(*args, **settings)
        if func is F.instance_norm and _instance_statistics(*args, **settings):
            return _instance_norm(*args, **settings)
        return func(*args, **settings)


def _normalized(x: Tensor, axes: list[int], eps: float) -> Tensor:
    centered = x - x.mean(axes, keepdim=True)
    return centered * (centered.square().mean(axes, keepdim=True) + eps).rsqrt()


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = (1, -1, *(1,) * (x.ndim - 2))  # of a channel axis 1
    x = x if weight is None else x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


def _layer_norm(
    input: Tensor,  # noqa: A002 (the name that torch uses)
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    axes = list(range(input.ndim - len(normalized_shape), input.ndim))
    out = _normalized(input, axes, eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def _batch_statistics(*args: Any, training: bool = False, **_: Any) -> bool:
    return bool(args[5]) if len(args) > 5 else training


def _batch_norm(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    del running_mean, running_var, training, momentum  # the pass's statistics are thrown away
    axes = [0, *range(2, input.ndim)]
    return _affine(_normalized(input, axes, eps), weight, bias)


def _instance_statistics(*args: Any, use_input_stats: bool = True, **_: Any) -> bool:
    return bool(args[5]) if len(args) > 5 else use_input_stats


def _instance_norm(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    del running_mean, running_var, use_input_stats, momentum
    return _affine(_normalized(input, list(range(2, input.ndim)), eps), weight, bias)
