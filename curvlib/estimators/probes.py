r"""Random probes: columns ``w`` with :math:`E[w w^\top] = I`, from explicit generators.

Nothing here touches torch's global random state. The signs of Rademacher probes are bits that the
generator draws, or (:func:`fill_signs`) follow from a key by position, so that kernels can make
them again.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from curvlib.core.random import generator_of
from curvlib.core.ranks.spread import Spread
from curvlib.estimators.philox import BITS, words
from curvlib.estimators.probe_kernels import ProbeKernels
from curvlib.estimators.rows import norms

__all__ = ["LAWS", "fill_probes", "generator_of", "probes"]

#: Laws of probes: entries ±1, standard normal entries, or uniform on the sphere of radius √n.
LAWS = ("rademacher", "gaussian", "sphere")


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


def fill_probes(
    rows: Tensor, law: str, generator: torch.Generator, spread: Spread | None = None
) -> None:
    """Overwrites each row of ``[K, n]`` with a probe: see :func:`probes`.

    Where vectors are spread over processes, with this process's part of a probe.
    """
    if law not in LAWS:
        raise ValueError(f"unknown law of probes {law!r}; there are {', '.join(LAWS)}")
    if law == "rademacher":
        for row in rows:
            if spread is None:
                _fill_signs(row, generator)
            else:
                spread.fill(row, lambda chunk: _fill_signs(chunk, generator))
        return
    for row in rows:
        fill_normal(row, generator, spread)
        if law == "sphere":
            size = row.shape[0] if spread is None else spread.size
            row.mul_(size**0.5 / norms(row[None], spread)[0])


def _fill_signs(row: Tensor, generator: torch.Generator) -> None:
    """Random signs from the bits of random words: one draw for 64 of them."""
    drawn = torch.empty((row.shape[0] + 63) // 64, dtype=torch.int64, device=row.device)
    drawn.random_(-(2**63), None, generator=generator)
    _write_signs(row, drawn)


def fill_normal(row: Tensor, generator: torch.Generator, spread: Spread | None = None) -> None:
    """Overwrites ``[n]`` with standard normal numbers, or this process's part of them."""
    if spread is None:
        row.normal_(generator=generator)
    else:
        spread.fill(row, lambda chunk: chunk.normal_(generator=generator))


@lru_cache(maxsize=16)
def _signs_of_bytes(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The eight signs that each byte stands for, ``[256, 8]``: a constant."""
    with torch.inference_mode(False):
        byte = torch.arange(256, device=device)[:, None]
        bits = (byte >> torch.arange(8, device=device)) & 1
        return (1 - 2 * bits).to(dtype)


def fill_signs(rows: Tensor, keys: Tensor, kernels: ProbeKernels | None = None) -> None:
    """Overwrites rows ``[K, n]`` with the Rademacher probes of keys ``[K]``, on any device.

    Args:
        rows: Each contiguous, of any floating-point type.
        keys: int64, on the rows' device.
        kernels: What writes them in one pass, where it can be had.
    """
    if kernels is not None:
        kernels.fill(rows, keys)
        return
    for row, bits in zip(rows, words(keys, -(-rows.shape[1] // BITS)), strict=True):
        _write_signs(row, bits.flatten())


def _write_signs(row: Tensor, bits: Tensor) -> None:
    """Signs from the bits of integers, the lowest of the first one first."""
    signs, n = _signs_of_bytes(row.dtype, row.device), row.shape[0]
    chosen = bits.view(torch.uint8)[: -(-n // 8)].int()
    whole = n // 8
    if whole:
        out = row[: 8 * whole].unflatten(0, (whole, 8))
        torch.index_select(signs, 0, chosen[:whole], out=out)
    if n % 8:
        row[8 * whole :] = torch.index_select(signs, 0, chosen[whole:])[0, : n % 8]
