r"""Whether a product that was made by other means is the product that it should be.

For random vectors :math:`u, v` with standard normal entries, and the product :math:`H` to be proven

.. math::
    \lVert \hat H V - H V \rVert \le \varepsilon \lVert H V \rVert, \qquad
    | u^T \hat H v - v^T \hat H u | \le \varepsilon \lVert \hat H v \rVert.

Both sides of the second are of the order of the matrix's Frobenius norm, so that it does not lose
its power with the number of parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from curvlib.core.random import generator_of
from curvlib.core.risk import Risk
from curvlib.core.space import ParamSpace

#: Tolerated relative difference of the captured to the eager product, by the unit of rounding.
#: torch.func's wrong second derivatives differ by 1e-3 (a small GPT) to 8e-2.
TOLERANCES = {1e-15: 1e-9, 1e-6: 2e-4, 1e-2: 3e-2}


def probes(space: ParamSpace, count: int) -> Tensor:
    """Standard normal vectors ``[P, K]``, always the same."""
    rows = torch.randn(count, space.size, generator=generator_of(None, 0), dtype=torch.float64)
    return rows.to(space.device, space.dtype).mT


def tolerance(risk: Risk) -> float:
    """The tolerated relative difference, by the least precise type that takes part."""
    precision = max(torch.finfo(d).eps for d in risk.space.dtypes)
    if torch.float64 not in risk.space.dtypes and risk.device.type == "cuda" and _rounds_to_tf32():
        precision = max(precision, 2.0**-10)
    return next(bound for unit, bound in TOLERANCES.items() if precision <= unit)


def _rounds_to_tf32() -> bool:
    """Whether float32 products or convolutions may be in TF32, whichever interface set that.

    ``allow_tf32`` raises once the other one has been used.
    """
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]  # not in the stubs
    return any(setting.fp32_precision == "tf32" for setting in settings)


def difference(product: Tensor, exact: Tensor, probe: Tensor, tolerated: float) -> str | None:
    """What is wrong with a captured product of two or more probes, if anything."""
    norm = float(torch.linalg.matrix_norm(exact))
    gap = float(torch.linalg.matrix_norm(product - exact))
    if not gap <= tolerated * norm:
        return (
            f"the captured product differs from the eager one by {gap / norm if norm else gap:.1e} "
            f"relatively on random vectors (tolerated: {tolerated:.0e}); the model's operations do "
            "something else when they are recorded"
        )
    uHv, vHu = float(probe[:, 0] @ product[:, 1]), float(probe[:, 1] @ product[:, 0])
    size = float(torch.linalg.matrix_norm(product[:, :2])) / 2**0.5
    if not abs(uHv - vHu) <= tolerated * size:
        return (
            f"the product is not symmetric: u'Hv and v'Hu differ by {abs(uHv - vHu) / size:.1e} "
            f"relatively (tolerated: {tolerated:.0e}), and so do the eager product's: an "
            "operation's second derivative is wrong, see risk.check()"
        )
    return None
