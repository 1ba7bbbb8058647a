r"""The inverse of a symmetric operator as an operator, whose products are solves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvlib.core.operator import LinearOperator
from curvlib.estimators import solve_state
from curvlib.estimators.arguments import read_preconditioner, read_settings
from curvlib.estimators.eigenpairs import require_symmetric
from curvlib.estimators.probes import generator_of
from curvlib.estimators.solve import solve


class Inverse(LinearOperator):
    r""":math:`(A + \delta I)^{-1}`: see :func:`inverse`.

    Attributes:
        op: :math:`A`.
        damping: :math:`\delta`.
        method: How products are solved.
    """

    def __init__(self, op: LinearOperator, damping: float, method: str, settings: Any) -> None:
        self.op = op
        self.damping = damping
        self.method = method
        own = settings["preconditioner"]
        kept = {k: v for k, v in settings.items() if k != "preconditioner"}
        digest = getattr(own, "fingerprint", lambda: type(own).__name__)
        super().__init__(
            lambda V: solve(op, V, damping=damping, method=method, **settings).value,
            op.shape,
            dtype=op.dtype,
            device=op.device,
            symmetric=True,
            psd=op.psd and damping >= 0.0,
            space=op.space,
            name=f"({op.name})^-1" if damping == 0.0 else f"({op.name} + {damping:g} I)^-1",
            identity=lambda: f"{op.fingerprint()}{damping!r}{method}{kept}{digest()}",
            group=op.group,
            spread=op.spread,
        )

    def solve(self, x: Tensor, damping: float = 0.0) -> Tensor:
        r""":math:`A x + \delta x`: the inverse of the inverse is a product.

        Raises:
            ValueError: If further damping is asked for, which is no product.
        """
        if damping != 0.0:
            raise ValueError(
                f"{self!r} has a solve without damping only, got damping={damping:g}; "
                "use curvlib.solve(op, b, damping=..., method='minres')"
            )
        product: Tensor = self.op.shift(self.damping) @ x
        return product


def inverse(
    op: LinearOperator | Tensor,
    *,
    damping: float = 0.0,
    method: str | None = None,
    preconditioner: Any = None,
    tolerance: float | None = None,
    max_products: int | None = None,
    terms: int | None = None,
    scale: float | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> Inverse:
    r""":math:`(A + \delta I)^{-1}` as an operator: each product is a :func:`curvlib.solve`.

    It is as exact as its tolerance says, so it is symmetric and linear to that accuracy only.

    Args:
        op: A symmetric operator, or a dense symmetric matrix.
        damping: :math:`\delta`.
        method: See :func:`curvlib.solve`.
        preconditioner: See :func:`curvlib.solve`; a Nyström preconditioner is built here, once.
        tolerance: Relative residual of each column.
        max_products: Of each product (with a block of columns).
        terms: Of the Neumann series.
        scale: Of the Neumann series.
        generator: Where random vectors come from, or
        seed: their seed. With neither, the seed is 0.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If the operator is not symmetric, or an argument does not fit.

    Example:
        >>> A = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
        >>> inv = inverse(A, damping=1.0)
        >>> [round(v, 6) for v in (inv @ torch.ones(2, dtype=torch.float64)).tolist()]
        [0.5, 0.25]
    """
    op = require_symmetric(op, spread=True)
    damping, method, tolerance = read_settings(
        op,
        damping=damping,
        method=method,
        preconditioner=preconditioner,
        tolerance=tolerance,
        terms=terms,
        scale=scale,
    )
    random = generator_of(generator, seed, op.device)
    rank, given = read_preconditioner(op, preconditioner)
    if rank:
        parts = solve_state.nystrom_parts(op, rank, random)
        given = solve_state.preconditioner_of(op, *parts, damping)
    settings = {
        "preconditioner": given,
        "tolerance": tolerance,
        "max_products": max_products,
        "terms": terms,
        "scale": scale,
        "seed": int(torch.randint(2**62, (), generator=random, device=random.device)),
        "progress": False,
    }
    return Inverse(op, damping, method, settings)
