r"""Random probes: columns ``w`` with :math:`E[w w^\top] = I`, from explicit generators.

Nothing here touches torch's global random state.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

#: Laws of probes: entries ±1, standard normal entries, or uniform on the sphere of radius √n.
LAWS = ("rademacher", "gaussian", "sphere")


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


def probes(
    shape: tuple[int, int],
    law: str = "rademacher",
    *,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""Random columns, each drawn by itself: the j-th probe is the same however many are drawn.

    All laws have :math:`E[w w^\top] = I`. Rademacher and sphere probes have
    :math:`\|w\|^2 = n` exactly. Rademacher probes see the diagonal of a matrix without error
    (variance of :math:`w^\top A w`: :math:`2(\|A\|_F^2 - \|\mathrm{diag} A\|^2)`, of Gaussian
    ones: :math:`2\|A\|_F^2`); sphere probes know no preferred axes.

    Args:
        shape: ``(n, K)``.
        law: ``"rademacher"``, ``"gaussian"`` or ``"sphere"``.
        generator: Where the numbers come from, and the device they live on.
        dtype: Type of the columns.

    Returns:
        ``[n, K]``, column-contiguous.

    Raises:
        ValueError: If the law is unknown.

    Example:
        >>> two = probes((4, 2), generator=generator_of(None, 0))
        >>> three = probes((4, 3), generator=generator_of(None, 0))
        >>> torch.equal(two, three[:, :2]), three.T.is_contiguous()
        (True, True)
    """
    n, count = shape
    rows = torch.empty((count, n), dtype=dtype, device=generator.device)
    fill_probes(rows, law, generator)
    return rows.mT


def fill_probes(rows: Tensor, law: str, generator: torch.Generator) -> None:
    """Overwrites each row of ``[K, n]`` with a probe: see :func:`probes`."""
    if law not in LAWS:
        raise ValueError(f"unknown law of probes {law!r}; there are {', '.join(LAWS)}")
    for row in rows:
        if law == "rademacher":
            row.random_(0, 2, generator=generator).mul_(2).sub_(1)
        else:
            row.normal_(generator=generator)
        if law == "sphere":
            row.mul_(row.shape[0] ** 0.5 / torch.linalg.vector_norm(row))
