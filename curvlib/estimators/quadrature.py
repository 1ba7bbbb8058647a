r"""Stochastic Lanczos quadrature as a state and its steps.

Each probe has a Lanczos recurrence of its own; all probes are multiplied in one block product.
After ``m`` steps the eigenvalues :math:`\theta_j` of a probe's tridiagonal matrix and the
squares :math:`w_j` of the first entries of its eigenvectors are the nodes and weights of the
Gauss quadrature of the probe's spectral measure, exact for polynomials of degree ``2 m - 1``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from curvlib.core.operator import LinearOperator
from curvlib.core.ranks.spread import Spread
from curvlib.estimators import lanczos
from curvlib.estimators.probes import fill_probes
from curvlib.estimators.rows import dots, largest, norms


@dataclass(frozen=True)
class QuadratureState:
    """Where the recurrences stand.

    Attributes:
        basis: Lanczos vectors ``[slots, probes, P]``: all of them, or three slots in turn (the
            last two vectors and the next one, so that a step that fails destroys nothing).
        alphas: Diagonals of the tridiagonal matrices, ``[probes, steps]``, float64.
        betas: Off-diagonals, the coupling to the next vector last, ``[probes, steps]``.
        lengths: Steps that each probe has made.
        active: Probes whose recurrence goes on.
        step: Steps made.
        scale: Unit of alphas and betas, a power of two; 0 until a product has been nonzero.
        products: Columns multiplied.
    """

    SPREAD: ClassVar = ("basis",)

    basis: Tensor
    alphas: Tensor
    betas: Tensor
    lengths: tuple[int, ...]
    active: tuple[int, ...]
    step: int
    scale: float
    products: int


def first_state(
    op: LinearOperator,
    steps: int,
    probes: int,
    *,
    slots: int,
    law: str,
    deflate: Tensor | None,
    generator: torch.Generator,
) -> QuadratureState:
    """The state before the first product: random probes of norm one, orthogonal to ``deflate``."""
    basis = torch.empty((slots, probes, op.length), dtype=op.dtype, device=op.device)
    fill_probes(basis[0], law, generator, op.spread)
    for probe in range(probes):
        row = basis[0, probe]
        for _ in range(2 if deflate is not None else 0):
            row.mul_(1.0 / norms(row[None], op.spread)[0])
            lanczos.project_out(deflate, row[None], op.spread)  # type: ignore[arg-type]
        row.mul_(dots(row[None], row[None], op.spread).sqrt().reciprocal().to(row.dtype))
    zeros = torch.zeros((probes, steps), dtype=torch.float64)
    return QuadratureState(
        basis=basis,
        alphas=zeros,
        betas=zeros.clone(),
        lengths=(0,) * probes,
        active=tuple(range(probes)),
        step=0,
        scale=0.0,
        products=0,
    )


def next_state(
    op: LinearOperator, state: QuadratureState, *, deflate: Tensor | None, full: bool
) -> QuadratureState:
    """One block product of the active probes, and one step of each of their recurrences.

    Args:
        op: The operator.
        state: The state, whose later slots of ``basis`` are overwritten.
        deflate: Orthonormal rows ``[d, P]`` to leave out.
        full: Whether every vector is made orthogonal to all before.

    Raises:
        FloatingPointError: If the product is not finite.
    """
    slots, count, _ = state.basis.shape
    now, following = state.step % slots, (state.step + 1) % slots
    everyone = len(state.active) == count
    block = state.basis[now] if everyone else state.basis[now, list(state.active)]
    product = op.matmat(block.T)
    del block
    scale = state.scale
    if scale == 0.0:
        most = largest(product, op.spread)
        if not math.isfinite(most):
            raise _not_finite(op, state.step)
        scale = lanczos.power_of_two(most, op.dtype) if most > 0.0 else 0.0
    last = state.step + 1 == state.alphas.shape[1]
    alphas, betas = state.alphas.clone(), state.betas.clone()
    lengths, active = list(state.lengths), []
    eps = torch.finfo(op.dtype).eps
    for index, probe in enumerate(state.active):
        fresh = product[:, index] * (1.0 / (scale or 1.0))
        if state.step and not full:
            before = state.basis[(state.step - 1) % slots, probe]
            fresh.sub_(before, alpha=float(betas[probe, state.step - 1]))
        first = 0 if full else now
        known = state.basis[first : now + 1, probe]
        alpha, beta = _orthogonalize(known, fresh, deflate, op.spread)
        if not math.isfinite(beta) or not math.isfinite(alpha):
            raise _not_finite(op, state.step)
        alphas[probe, state.step] = alpha
        lengths[probe] = state.step + 1
        norm = float((alphas[probe].abs() + betas[probe]).max())
        if beta <= 64 * eps * norm:  # what rounding leaves of nothing
            continue  # an invariant subspace: this probe's quadrature is exact
        betas[probe, state.step] = beta
        active.append(probe)
        if not last:
            torch.mul(fresh, 1.0 / beta, out=state.basis[following, probe])
    return replace(
        state,
        alphas=alphas,
        betas=betas,
        lengths=tuple(lengths),
        active=tuple(active),
        step=state.step + 1,
        scale=scale,
        products=state.products + product.shape[1],
    )


def _orthogonalize(
    known: Tensor, fresh: Tensor, deflate: Tensor | None, spread: Spread | None
) -> tuple[float, float]:
    """Makes ``fresh`` orthogonal to the rows ``known``: its coefficient of the last, its norm."""
    row, numbers = fresh[None], [math.nan] * 3
    alpha = lanczos.project_out(known[-2:], row, spread)[-1, 0].double()
    before = dots(row, row, spread)[0].sqrt()
    for attempt in range(2):
        if deflate is not None:
            lanczos.project_out(deflate, row, spread)
        alpha += lanczos.project_out(known, row, spread)[-1, 0].double()
        numbers = torch.stack([alpha, dots(row, row, spread)[0].sqrt(), before]).tolist()
        if attempt == 0 and numbers[1] >= 0.7 * numbers[2]:
            break
    return numbers[0], numbers[1]


def quadrature(state: QuadratureState) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes, weights and residuals of each probe, each ``[probes, steps]``, nodes ascending.

    A probe that stopped early has fewer nodes: the rest repeat its largest with weight zero.
    Residuals are norms of residuals of the Ritz pairs: how far at most an eigenvalue is away.
    """
    count, steps = state.alphas.shape
    nodes = torch.zeros((count, steps), dtype=torch.float64)
    weights, residuals = nodes.clone(), nodes.clone()
    for probe, length in enumerate(state.lengths):
        off = state.betas[probe, : length - 1]
        T = state.alphas[probe, :length].diag() + off.diag(1) + off.diag(-1)
        theta, S = torch.linalg.eigh(T)
        nodes[probe, :length] = theta
        nodes[probe, length:] = theta[-1]
        weights[probe, :length] = S[0].square()
        residuals[probe, :length] = S[-1].abs() * state.betas[probe, length - 1]
    scale = state.scale or 1.0
    weights /= weights.sum(1, keepdim=True)
    return nodes * scale, weights, residuals * scale


def _not_finite(op: LinearOperator, step: int) -> FloatingPointError:
    return FloatingPointError(
        f"the product of step {step + 1} with {op!r} has entries that are NaN or infinite, though "
        "its vectors are finite; check the loss and its derivatives at these parameters "
        "(risk.check()). With checkpoint=, what came before is saved"
    )
