r"""Uniform random numbers that an example's content gives, not its place in a batch.

Micro-batches and ranks then draw for each example what one large batch would. Each example's bytes
are hashed to 64 bits, and a counter is mixed in (the finalizer of SplitMix64: Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", 2014), in integer arithmetic modulo
:math:`2^{64}`, so that devices agree bitwise and nothing is copied to the CPU.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from curvlib.core.data import tensors

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, odd
_FIRST = -4658895280553007687
_SECOND = -7723592293110705685
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def content_uniform(content: Any, examples: int, seed: str, shape: torch.Size) -> Tensor:
    """Numbers in (0, 1), float64, the same for the same example and seed.

    Args:
        content: Tensors, however nested: those with ``examples`` along the first axis count.
        examples: How many there are.
        seed: A string.
        shape: Of the numbers; a multiple of ``examples`` along the first axis.

    Example:
        >>> x = torch.arange(6.0).reshape(3, 2)
        >>> whole = content_uniform(x, 3, "a", torch.Size([3, 2]))
        >>> part = content_uniform(x[1:], 2, "a", torch.Size([2, 2]))
        >>> bool((whole[1:] == part).all())
        True
    """
    keys = content_keys(content, examples)
    if not shape or shape[0] % examples:
        keys = keys.sum(0, keepdim=True)
    each = math.prod(shape) // len(keys)
    start = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big", signed=True)
    counter = torch.arange(1, each + 1, device=keys.device) * _GOLDEN
    bits = mixed(mixed(keys + start)[:, None] + counter)
    return ((_shifted(bits, 12).double() + 0.5) * 2.0**-52).reshape(shape)


def content_keys(content: Any, examples: int) -> Tensor:
    """64 bits of each example's content, int64 ``[N]``."""
    keys: Tensor | None = None
    for tensor in tensors(content):
        if tensor.ndim and tensor.shape[0] == examples and not tensor.is_complex():
            rows = tensor.detach().contiguous()
            rows = rows.view(_INTEGERS[rows.element_size()]).reshape(examples, -1)
            places = torch.arange(1, rows.shape[1] + 1, device=rows.device) * _GOLDEN
            own = (rows.to(torch.int64) * (mixed(places) | 1)).sum(1)
            keys = own if keys is None else mixed(keys) + own
    if keys is None:
        return torch.zeros(examples, dtype=torch.int64)
    return keys


def mixed(x: Tensor) -> Tensor:
    """64 bits mixed up, int64 to int64, one to one: sums of them tell sets apart."""
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shifted to the right, with zeros from the left."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
