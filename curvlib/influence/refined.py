r"""A GGN that is solved with by conjugate gradients, preconditioned by its EK-FAC.

EK-FAC leaves out what lies between layers and between directions of its eigenbasis. A few
iterations of conjugate gradients on the GGN itself, started and preconditioned by EK-FAC with the
same damping, put it back: each costs one product with the GGN for each query.

Source:
    The combination is that of Wang et al., "ASTRA", 2025 (arXiv 2507.14740), who iterate a Neumann
    series instead.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from curvlib.core.operator import LinearOperator
from curvlib.core.risk import Risk
from curvlib.estimators.solve import solve
from curvlib.operators.ggn import ggn
from curvlib.operators.kfac import KFAC, kfac


class RefinedGGN(LinearOperator):
    """The GGN of a risk with a preconditioned ``solve``: see :func:`refined`.

    Attributes:
        products: Columns multiplied by the GGN so far.
    """

    def __init__(self, risk: Risk, preconditioner: KFAC, tolerance: float, iterations: int) -> None:
        self._ggn = ggn(risk)
        self._preconditioner = preconditioner
        self._tolerance = tolerance
        self._iterations = iterations
        self.products = 0
        super().__init__(
            self._ggn.matmat,
            self._ggn.shape,
            dtype=self._ggn.dtype,
            device=self._ggn.device,
            space=risk.space,
            symmetric=True,
            psd=True,
            name="GGN refined from EK-FAC",
            identity=lambda: (
                f"{self._ggn.fingerprint()}|{preconditioner.fingerprint()}|{tolerance}|{iterations}"
            ),
        )

    def trace(self) -> float:
        """The trace, which EK-FAC has exactly for the exact (type-2) Fisher matrix."""
        return float(self._preconditioner.trace())

    def solve(self, columns: Tensor, damping: float = 0.0) -> Tensor:
        """``(G + damping I) ** -1`` times columns ``[P, K]``, to the tolerance or the iterations.

        Raises:
            FloatingPointError: If a product is not finite.
        """
        start = self._preconditioner.solve(columns, damping, relative=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # stopping early is meant
            found = solve(
                self._ggn,
                columns,
                damping=damping,
                method="cg",
                preconditioner=self._preconditioner,
                tolerance=self._tolerance,
                max_products=columns.shape[1] * (self._iterations + 2),
                x0=start,
                progress=False,
            )
        self.products += found.products
        return found.value


def refined(
    risk: Risk,
    preconditioner: KFAC | None = None,
    *,
    tolerance: float = 1e-2,
    iterations: int = 100,
    **fit: Any,
) -> RefinedGGN:
    """The GGN as curvature for :class:`curvlib.influence.Influence`, refined from EK-FAC.

    Args:
        risk: The training data's.
        preconditioner: A fitted K-FAC or EK-FAC of all parameters; one is fitted when omitted.
        tolerance: Of solves: relative residual.
        iterations: Conjugate gradients stop after so many, at the best that there is.
        fit: Settings of :func:`curvlib.kfac`, if it is fitted here.

    Raises:
        TypeError: If ``risk`` is no risk.
        ValueError: If the preconditioner is of another risk, or a number does not fit.

    Example:
        >>> import torch, curvlib as cl
        >>> x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0)).double()
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)
        ... )
        >>> risk = cl.Risk(model.double(), torch.nn.MSELoss(), (x, x[:, :1]))
        >>> G = refined(risk, tolerance=1e-8)
        >>> v = torch.ones(risk.space.size, 1).double()
        >>> dense = G.to_dense() + 0.1 * torch.eye(risk.space.size).double()
        >>> bool(torch.allclose(G.solve(v, 0.1), torch.linalg.solve(dense, v), atol=1e-6))
        True
    """
    if not isinstance(risk, Risk):
        raise TypeError(f"refined takes a Risk, got {type(risk).__name__}")
    risk.require_whole("refined")
    if not 0.0 < tolerance < 1.0:
        raise ValueError(f"tolerance= is between 0 and 1, got {tolerance}")
    if iterations < 1:
        raise ValueError(f"iterations= needs a positive number, got {iterations}")
    if preconditioner is None:
        preconditioner = kfac(risk, **{"rest": "diagonal", **fit})
    elif fit:
        raise ValueError(
            f"fit settings are for a preconditioner that is fitted here, got one and {fit}"
        )
    else:
        preconditioner.require_fits(risk)
    return RefinedGGN(risk, preconditioner, tolerance, iterations)
