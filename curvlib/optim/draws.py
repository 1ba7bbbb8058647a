r"""Random vectors of an optimizer: functions of a seed and of counters, without a state.

A probe depends on the seed, on the number of the curvature update, on its own number, and on the
parameter. It is thus the same for all micro-batches of a step and on all ranks, and a resumed run
draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from curvlib.core.random import generator_of
from curvlib.core.ranks.spread import Spread
from curvlib.estimators.probes import fill_probes


def stream(device: torch.device, *numbers: int) -> torch.Generator:
    """A generator that is determined by whole numbers: a seed and counters.

    Example:
        >>> a, b = (stream(torch.device("cpu"), 0, 5, i) for i in (1, 1))
        >>> torch.equal(torch.rand(3, generator=a), torch.rand(3, generator=b))
        True
    """
    text = " ".join(map(str, numbers)).encode()
    seed = int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
    return generator_of(None, seed, device)


def signs(like: Tensor, *numbers: int, spread: Spread | None = None) -> Tensor:
    """Rademacher signs of the shape, dtype and device of a tensor.

    Args:
        like: A parameter.
        numbers: Seed, curvature update, probe, index of the parameter.
        spread: Where the parameter is sharded and ``like`` is this rank's slice, how: its signs
            are then those that one process draws for the whole.

    Example:
        >>> signs(torch.zeros(2, 2), 0, 1, 0, 3).abs()
        tensor([[1., 1.],
                [1., 1.]])
    """
    generator = stream(like.device, *numbers)
    row = torch.empty((1, like.numel()), dtype=like.dtype, device=like.device)
    if spread is None:
        fill_probes(row, "rademacher", generator)
    else:
        spread.fill(row[0], lambda chunk: fill_probes(chunk[None], "rademacher", generator))
    return row.view(like.shape)
