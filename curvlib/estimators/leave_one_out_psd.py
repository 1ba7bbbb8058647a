r"""The exchangeable estimators of positive semi-definite operators: one product for each probe.

From :math:`Y = A \Omega` alone comes the Nystrom approximation
:math:`\hat A = Y (\Omega^\top Y)^{-1} Y^\top`, and without probe :math:`i` the one with
:math:`z_i z_i^\top` less, :math:`z_i = Y G e_i / \sqrt{G_{ii}}`,
:math:`G = (\Omega^\top Y)^{-1}`. The rest :math:`A - \hat A_{-i}` is probed with
:math:`\omega_i`, whose product with it is :math:`Y G e_i / G_{ii}`.

As the rest vanishes on the other probes, resphering replaces :math:`\omega_i` by its part
orthogonal to them, :math:`\Omega C e_i / C_{ii}` with :math:`C = (\Omega^\top \Omega)^{-1}`.

All is done for :math:`A + \nu I` with :math:`\nu` at rounding level, by an eigendecomposition of
:math:`\Omega^\top Y` (its Cholesky factorization breaks down where the rank is low), and the
shift is taken off again.

Source: E. N. Epperly, J. A. Tropp and R. J. Webber, *XTrace*, arXiv:2301.07825, section 2.3 and
supplement; J. A. Tropp et al., *Fixed-rank approximation of a positive-semidefinite matrix from
streaming data*, NeurIPS 2017 (the shift).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvlib.estimators.exchangeable import nystrom_samples
from curvlib.estimators.leave_one_out import BATCH, inner, pick, spans
from curvlib.estimators.stopping import Plan, multiply


@dataclass(frozen=True)
class NystromState:
    """Where a run stands.

    Attributes:
        probes: Rows of probes, ``[b, n]`` for each step.
        images: Their products, ``[b, n]`` for each step.
        generator: State of the random generator.
    """

    probes: tuple[Tensor, ...]
    images: tuple[Tensor, ...]
    generator: Tensor

    @property
    def count(self) -> int:
        """Number of probes so far."""
        return sum(block.shape[0] for block in self.probes)


def first_state(plan: Plan) -> NystromState:
    """The state before the first product."""
    return NystromState((), (), plan.random.get_state())


def next_state(plan: Plan, state: NystromState) -> NystromState:
    """One block product.

    Raises:
        FloatingPointError: If a product is not finite.
    """
    rows, generator = plan.draw(state.generator, plan.following(state.count))
    image = multiply(plan.op, rows, state.count)
    return replace(
        state,
        probes=(*state.probes, rows),
        images=(*state.images, image),
        generator=generator,
    )


@dataclass(frozen=True)
class NystromSketch:
    """What follows from all probes: see the module's text for the letters.

    Attributes:
        shift: The shift of the operator.
        root: Columns that turn products into a factor of the approximation, ``[m, m]``.
        G: Inverse of ``probes.T @ (A + shift I) @ probes``, ``[m, m]``.
        C: Inverse of ``probes.T @ probes``, ``[m, m]``.
    """

    shift: float
    root: Tensor
    G: Tensor
    C: Tensor


def sketch(plan: Plan, state: NystromState) -> NystromSketch:
    """Factorizes ``probes.T @ A @ probes``.

    Raises:
        ValueError: If it has a clearly negative eigenvalue: the operator is not PSD.
    """
    n, eps = plan.op.shape[0], torch.finfo(plan.op.dtype).eps
    both = inner(state.probes, (*state.images, *state.probes))
    core, gram = both[:, : state.count], both[:, state.count :]
    squares = sum(float(torch.linalg.vector_norm(b.double()).square()) for b in state.images)
    shift = eps * squares**0.5
    values, V = torch.linalg.eigh(0.5 * (core + core.mT) + shift * gram)
    if float(values[0]) < -(eps**0.5) * float(values[-1].abs()) - 2 * shift * n:
        raise ValueError(
            f"expected a positive semi-definite operator, but {plan.op!r} has a probe with "
            f"w @ A @ w / w @ w = {float(values[0]) / n:.2e}; use method='xtrace' or 'xdiag', "
            "and build it without psd=True"
        )
    values = values.clamp_min(0.1 * shift * n)
    root = V / values.sqrt()
    resphere = plan.law != "rademacher"
    C = torch.linalg.inv(gram) if resphere else torch.eye(len(gram), dtype=torch.float64)
    return NystromSketch(shift=shift, root=root, G=root @ root.mT, C=C)


def factor_chunks(
    state: NystromState, shift: float, matrix: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """``(A + shift I) @ probes @ matrix``, as rows in float64, over chunks of the vectors."""
    weights = matrix.mT.to(state.probes[0].device)
    for span in spans(state.probes[0]):
        rows = torch.cat([y[:, span] for y in state.images]).double()
        start = 0
        for block in state.probes:
            rows[start : start + block.shape[0]].add_(block[:, span], alpha=shift)
            start += block.shape[0]
        yield span, weights @ rows


def trace_samples(plan: Plan, state: NystromState) -> tuple[Tensor, Tensor]:
    """XNysTrace: an estimate of the trace for each probe, and their influences, each ``[m]``."""
    if not any(bool(block.any()) for block in state.images):
        nothing = torch.zeros(state.count, dtype=torch.float64)
        return nothing, nothing.clone()
    parts = sketch(plan, state)
    K = torch.zeros_like(parts.G)
    for _, F in factor_chunks(state, parts.shift, parts.root):
        K += (F @ F.mT).cpu()
    E = parts.root / parts.G.diagonal().sqrt()[:, None]
    n = plan.op.shape[0]
    samples, shares = nystrom_samples(
        parts.G, parts.C, E @ K @ E.mT, K.trace(), n, resphere=plan.law != "rademacher"
    )
    return samples - parts.shift * n, shares


def diagonal_samples(plan: Plan, state: NystromState) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """XNysDiag: one unbiased estimate of the diagonal for each probe, and what a partner changes.

    Each probe has its next one for partner, the last one the first.

    Yields:
        The sample of probe i, what its partner in the sketch does to it, and what probe i does
        to its partner's sample, ``[n]`` each: see :mod:`curvlib.estimators.exchangeable`.
    """
    op, count = plan.op, state.count
    n, device = op.shape[0], op.device
    if not any(bool(block.any()) for block in state.images):
        nothing = torch.zeros(n, dtype=op.dtype, device=device)
        yield from [(nothing, nothing, nothing)] * count
        return
    parts = sketch(plan, state)
    known = torch.empty(n, dtype=torch.float64, device=device)
    for span, F in factor_chunks(state, parts.shift, parts.root):
        known[span] = F.square().sum(0)
    known -= parts.shift
    root = parts.G.diagonal().sqrt()
    for start in range(0, count, 2 * BATCH):
        chosen = [i % count for i in range(start, min(start + 2 * BATCH, count) + 1)]
        size = len(chosen) - 1
        out = torch.empty((3, size, n), dtype=op.dtype, device=device)
        cosine = (parts.G / root / root[:, None])[chosen[:-1], chosen[1:]].to(device)[:, None]
        free = (1.0 - cosine.square()).clamp_min(4 * torch.finfo(torch.float64).eps)
        roots = root[chosen].to(device)[:, None]
        first, second = slice(0, size), slice(1, size + 1)
        for span, z in factor_chunks(state, parts.shift, (parts.G / root)[:, chosen]):
            probes = pick([w[:, span] for w in state.probes], chosen).double()
            samples = known[span] - z.square() + probes * z / roots
            out[0, :, span] = samples[first]
            for k, own, other in ((1, first, second), (2, second, first)):
                lost = z[own].square() + z[other].square() - 2 * cosine * z[own] * z[other]
                seen = (z[own] - cosine * z[other]) / roots[own]
                without = known[span] - (lost - probes[own] * seen) / free
                out[k, :, span] = samples[own] - without
        yield from zip(*out, strict=True)
