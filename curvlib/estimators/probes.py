r"""Random probes: columns ``w`` with :math:`E[w w^\top] = I`, from explicit generators.

Nothing here touches torch's global random state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from curvlib.core.random import generator_of

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
