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
    counters = torch.arange(count, device=keys.device).expand(len(keys), -1)
    key = [(keys & _MASK)[:, None], (keys >> 32 & _MASK)[:, None]]
    x = [counters & _MASK, counters >> 32, torch.zeros_like(counters), torch.zeros_like(counters)]
    for _ in range(_ROUNDS):
        # 32 x 32 bits fill the 64 of an int64: the high half is what an arithmetic shift leaves
        first, second = x[0] * _MULTIPLIERS[0], x[2] * _MULTIPLIERS[1]
        x = [
            (second >> 32 & _MASK) ^ x[1] ^ key[0],
            second & _MASK,
            (first >> 32 & _MASK) ^ x[3] ^ key[1],
            first & _MASK,
        ]
        key = [(k + step) & _MASK for k, step in zip(key, _INCREMENTS, strict=True)]
    return torch.stack(x, 2).to(torch.int32)
