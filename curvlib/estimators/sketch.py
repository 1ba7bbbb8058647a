r"""Low-rank approximations from a block of products: Nyström and Rayleigh-Ritz.

Blocks are rows ``[l, P]``; the small matrices are in float64 on the CPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from curvlib.core.operator import LinearOperator
from curvlib.core.ranks.spread import Spread
from curvlib.estimators.probes import fill_probes
from curvlib.estimators.rows import all_finite, dots, extend, inner, norms, subtract, summed


def random_rows(op: LinearOperator, count: int, generator: torch.Generator) -> Tensor:
    """Orthonormal random vectors of an operator, rows ``[count, P]``, uniformly distributed."""
    return orthonormal(probe_rows(op, count, "gaussian", generator), op.spread)


def probe_rows(op: LinearOperator, count: int, law: str, generator: torch.Generator) -> Tensor:
    """Random probes of an operator, rows ``[count, P]``."""
    rows = torch.empty((count, op.length), dtype=op.dtype, device=op.device)
    fill_probes(rows, law, generator, op.spread)
    return rows


def orthonormal(rows: Tensor, spread: Spread | None = None) -> Tensor:
    """Orthonormal rows that span what ``rows`` span (and more, where those are dependent)."""
    return extend((), rows, spread=spread)[0]


def finite_product(op: LinearOperator, rows: Tensor, before: int) -> Tensor:
    """Products with rows ``[l, P]``, as rows.

    Args:
        op: The operator.
        rows: The vectors.
        before: How many products came before, for the message.

    Raises:
        FloatingPointError: If an entry is NaN or infinite.
    """
    found = op.matmat(rows.mT).mT
    if not all_finite(found, op.spread):
        raise FloatingPointError(
            f"the products {before + 1} to {before + rows.shape[0]} with {op!r} have entries that "
            "are NaN or infinite, though the vectors are finite; check the loss and its "
            "derivatives at these parameters (risk.check()). With checkpoint=, what came before "
            "is saved"
        )
    return found


def error_samples(
    op: LinearOperator, vectors: Tensor, values: Tensor, rows: Tensor, before: int
) -> Tensor:
    r"""What probes say of :math:`\|A - \hat A\|_F^2` and :math:`\|A\|_F^2`, ``[2, K]``, float64.

    Args:
        op: The operator A.
        vectors: Orthonormal rows ``[k, P]`` of the approximation.
        values: Its eigenvalues, ``[k]``.
        rows: Probes, ``[K, P]``.
        before: How many products came before, for errors.

    Raises:
        FloatingPointError: If a product is not finite.
    """
    found = finite_product(op, rows, before)
    coefficients = values[:, None] * inner((vectors,), (rows,), spread=op.spread)
    rest = subtract(found, (vectors,), coefficients, torch.empty_like(found))
    own = torch.stack([dots(rest, rest), dots(found, found)])
    return summed(own, op.spread).cpu()


def nystrom(op: LinearOperator, omega: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
    r"""Eigenpairs of Nyström's approximation from the products of some vectors.

    It is :math:`Y (\Omega^\top Y)^+ Y^\top` with :math:`Y = A \Omega`. It is computed for
    :math:`A + \nu I` with :math:`\nu` at the level of rounding errors, and :math:`\nu` taken off
    the eigenvalues again: so it is stable whatever the rank of :math:`A`.

    Args:
        op: The operator.
        omega: Orthonormal test vectors, rows ``[l, P]``.
        product: Their products, ``[l, P]``.

    Returns:
        Orthonormal rows ``[l, P]`` and eigenvalues ``[l]``, descending, float64 on the CPU.

    Raises:
        RuntimeError: If the operator has a negative eigenvalue.

    Source:
        J. Tropp, A. Yurtsever, M. Udell and V. Cevher, *Fixed-rank approximation of a
        positive-semidefinite matrix from streaming data*, NeurIPS 2017, algorithm 3.
    """
    size, n, spread = omega.shape[0], op.shape[0], op.spread
    norm = float(norms(product.reshape(1, -1), spread)[0])
    if norm == 0.0:
        return omega, torch.zeros(size, dtype=torch.float64)
    core = inner((omega,), (product,), spread=spread)
    core = 0.5 * (core + core.mT)
    nu = math.sqrt(n) * torch.finfo(omega.dtype).eps * norm
    lowest = float(torch.linalg.eigvalsh(core)[0])
    if lowest < -10.0 * nu:
        raise RuntimeError(
            f"the Nyström approximation needs a positive semi-definite operator, but {op.name} has "
            f"an eigenvalue of at most {lowest:.3g}; use method='eigh', or add damping with "
            f"op.shift({-lowest:.2g}) or more"
        )
    nu = max(nu, -2.0 * lowest)
    factor = torch.linalg.cholesky(core + nu * torch.eye(size, dtype=torch.float64))
    # Rows B = L^-1 (Y + nu Omega) have B'B = the approximation of A + nu I.
    shifted = torch.add(product, omega, alpha=nu)
    Q, _, R = extend((), shifted, spread=spread)
    small = torch.linalg.solve_triangular(factor, R.mT, upper=False)
    _, sigma, V = torch.linalg.svd(small)
    return V.to(Q) @ Q, (sigma.square() - nu).clamp(min=0.0)


def rayleigh_ritz(
    basis: Tensor, product: Tensor, spread: Spread | None = None
) -> tuple[Tensor, Tensor]:
    """Ritz pairs of orthonormal rows ``[l, P]`` from their products, by absolute value.

    Returns:
        Orthonormal rows ``[l, P]`` and values ``[l]``, the largest absolute values first, float64
        on the CPU.
    """
    core = inner((basis,), (product,), spread=spread)
    values, S = torch.linalg.eigh(0.5 * (core + core.mT))
    order = values.abs().argsort(descending=True)
    return S.mT[order].to(basis) @ basis, values[order]
