r"""Random bits by position: Philox, a bijection of counters under a key.

The bits at a place are a function of the key and the place alone. So they can be had again where
they are needed, on any device, and need not be kept. A key of 64 bits and a counter of 128 bits
(of which 64 are used) make four words of 32 bits.

J. K. Salmon, M. A. Moraes, R. O. Dror and D. E. Shaw, *Parallel random numbers: as easy as 1, 2,
3*, SC 2011: Philox4x32 with ten rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Bits that one counter gives.
BITS = 128

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10


def draw_keys(count: int, generator: torch.Generator) -> Tensor:
    """Keys ``[count]``, int64 on the generator's device: the j-th is the same for any count."""
    keys = torch.empty(count, dtype=torch.int64, device=generator.device)
    for j in range(count):
        keys[j : j + 1].random_(-(2**63), None, generator=generator)
    return keys


def words(keys: Tensor, count: int) -> Tensor:
    """The words of the counters 0 ... ``count - 1``, ``[K, count, 4]``, int32.

    Args:
        keys: ``[K]``, int64.
        count: How many counters.

    Example:
        >>> [hex(w % 2**32) for w in words(torch.tensor([0]), 1).flatten().tolist()]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    zeros = torch.zeros((len(keys), count), dtype=torch.int64, device=keys.device)
    counters = torch.arange(count, device=keys.device)
    # Words 2 and 0, which are multiplied, and words 1 and 3; each with its key. A product of 32
    # by 32 bits fills the 64 of an int64, of which the high half is left by a shift; bits above
    # the lowest 32 are cleared before the next product.
    factors = _pair(_MULTIPLIERS[1], _MULTIPLIERS[0], keys)
    steps, own = _pair(*_INCREMENTS, keys), torch.stack([keys, keys >> 32], 1)[:, None]
    mixed = torch.stack([zeros, counters + zeros & _MASK], 2)
    others = torch.stack([counters + zeros >> 32, zeros], 2)
    for turn in range(_ROUNDS):
        product = mixed * factors
        fresh = (product >> 32 ^ others ^ (own + turn * steps)) & _MASK
        mixed, others = fresh.flip(2), product
    out = torch.stack([mixed[:, :, 1], others[:, :, 0], mixed[:, :, 0], others[:, :, 1]], 2)
    return out.to(torch.int32)


def _pair(first: int, second: int, like: Tensor) -> Tensor:
    """Two numbers on a device, without a copy from the host."""
    out = torch.full((2,), first, dtype=torch.int64, device=like.device)
    out[1:].fill_(second)
    return out
