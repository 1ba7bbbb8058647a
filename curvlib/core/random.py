"""Randomness from explicit generators and seeds; torch's global random state is left alone."""

from __future__ import annotations

import hashlib

import torch


def generator_of(
    generator: torch.Generator | None,
    seed: int | None,
    device: torch.device | str = "cpu",
) -> torch.Generator:
    """A fresh generator on ``device`` from what a caller gave.

    Args:
        generator: The caller's generator, on any device. One number is drawn from it, so that
            two calls with one generator are independent and a program that seeds it repeats.
        seed: Or a seed. With neither, the seed is 0: estimates repeat by default.
        device: Where random numbers are needed.

    Raises:
        TypeError: If ``generator`` or ``seed`` is of another type.
        ValueError: If both are given.

    Example:
        >>> a, b = generator_of(None, 7), generator_of(None, 7)
        >>> bool(torch.rand(1, generator=a) == torch.rand(1, generator=b))
        True
    """
    if generator is not None and seed is not None:
        raise ValueError("pass generator= or seed=, not both")
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator= is a torch.Generator, got {type(generator).__name__}; "
                "use seed= for a number"
            )
        high = 2**63 - 1
        drawn = torch.randint(high, (), generator=generator, device=generator.device)
        seed = int(drawn)
    if seed is None:
        seed = 0
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed= is an int, got {type(seed).__name__}")
    return torch.Generator(device=device).manual_seed(_scramble(seed))


def _scramble(seed: int) -> int:
    """Another seed, so that probes differ from what programs draw with ``manual_seed(seed)``.

    A model or data set that was drawn from the same stream would not be independent of them.
    """
    return int.from_bytes(hashlib.sha256(f"curvlib {seed}".encode()).digest()[:8], "big") >> 1
