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

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from curvlib.estimators.exchangeable import nystrom_samples
from curvlib.estimators.rows import dots, inner, largest, spans, summed
from curvlib.estimators.stopping import Plan, multiply


@dataclass(frozen=True)
class NystromState:
    """Where a run stands.

    Attributes:
        probes: Rows of probes, ``[b, n]`` for each step.
        images: Their products, ``[b, n]`` for each step.
        generator: State of the random generator.
    """

    SPREAD: ClassVar = ("probes", "images")

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


def sketch(plan: Plan, state: NystromState) -> NystromSketch | None:
    """Factorizes ``probes.T @ A @ probes``; ``None`` if all products are zero.

    Raises:
        ValueError: If it has a clearly negative eigenvalue: the operator is not PSD.
    """
    n, eps = plan.op.shape[0], torch.finfo(plan.op.dtype).eps
    if not any(largest(block, plan.op.spread) for block in state.images):
        return None
    both = inner(state.probes, (*state.images, *state.probes), spread=plan.op.spread)
    core, gram = both[:, : state.count], both[:, state.count :]
    squares = sum(float(dots(b, b, plan.op.spread).sum()) for b in state.images)
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


def factored(state: NystromState, shift: float, factor: Tensor, span: slice) -> Tensor:
    """``factor @ (A + shift I) @ probes``, some entries, rows ``[m, c]``.

    In float64, as the factor may cancel most of the products; the result needs no more than the
    vectors' own type.
    """
    like = state.probes[0]
    size = like[:, span].shape[1]
    rows = torch.empty((state.count, size), dtype=torch.float64, device=like.device)
    start = 0
    for probes, images in zip(state.probes, state.images, strict=True):
        part = rows[start : start + len(probes)]
        part.copy_(images[:, span]).add_(probes[:, span], alpha=shift)
        start += len(probes)
    return (factor @ rows).to(like.dtype)


def trace_samples(plan: Plan, state: NystromState) -> tuple[Tensor, Tensor]:
    """XNysTrace: an estimate of the trace for each probe, and their influences, each ``[m]``."""
    parts = sketch(plan, state)
    if parts is None:
        nothing = torch.zeros(state.count, dtype=torch.float64)
        return nothing, nothing.clone()
    K = torch.zeros_like(parts.G)
    weights = parts.root.mT.to(plan.op.device)
    for span in spans(state.probes[0]):
        F = factored(state, parts.shift, weights, span)
        K += (F @ F.mT).cpu()
    K = summed(K, plan.op.spread)
    E = parts.root / parts.G.diagonal().sqrt()[:, None]
    n = plan.op.shape[0]
    samples, shares = nystrom_samples(
        parts.G, parts.C, E @ K @ E.mT, K.trace(), n, resphere=plan.law != "rademacher"
    )
    return samples - parts.shift * n, shares


@dataclass(frozen=True)
class DiagonalSamples:
    r"""XNysDiag: one unbiased estimate of the diagonal for each probe, and what a partner changes.

    The sample of probe i is :math:`\mathrm{known} - z_i^2 + w_i z_i / \sqrt{G_{ii}}`. Each probe
    has its next one for partner, the last one the first. With the cosine c that they have under
    G, leaving j out too changes the sample by :math:`p\,(p + \kappa_i w_i)`,
    :math:`p = (z_j - c z_i) / \sqrt{1 - c^2}`,
    :math:`\kappa_i = c / \sqrt{G_{ii} (1 - c^2)}`.

    Over all probes it takes ``2 m^2`` multiply-adds in float64 for each entry, and ``2 m``
    numbers of memory are read once.

    Attributes:
        state: The sketch.
        shift: The shift of the operator.
        factor: What maps damped products to a factor of the approximation, ``[m, m]``.
        directions: What maps that factor to the ``z_i``, the first one's repeated at the end.
        lengths: ``1 / sqrt(G_ii)``, ``[m, 1]``.
        cosine: ``-c``, ``[m, 1]``.
        free: ``1 / (1 - c^2)``, ``[m, 1]``.
    """

    state: NystromState
    shift: float
    factor: Tensor
    directions: Tensor
    lengths: Tensor
    cosine: Tensor
    free: Tensor

    @classmethod
    def of(cls, plan: Plan, state: NystromState) -> DiagonalSamples | None:
        """From a sketch; ``None`` if all products are zero."""
        parts = sketch(plan, state)
        if parts is None:
            return None
        m, like = state.count, state.probes[0]
        root = parts.G.diagonal().sqrt()
        first = torch.arange(m)
        after = (first + 1) % m
        cosine = (parts.G / root / root[:, None])[first, after][:, None]
        free = (1.0 - cosine.square()).clamp_min(4 * torch.finfo(torch.float64).eps)
        return cls(
            state=state,
            shift=parts.shift,
            factor=parts.root.mT.to(like.device),
            directions=(parts.root / root[:, None])[[*range(m), 0]].to(like),
            lengths=(1.0 / root)[:, None].to(like),
            cosine=-cosine.to(like),
            free=(1.0 / free).to(like),
        )

    @property
    def count(self) -> int:
        """Number of probes."""
        return self.state.count

    def at(self, span: slice) -> tuple[Tensor, Tensor, Tensor]:
        """For some entries: samples, what partners do to them, what they do to the partners'.

        Returns:
            Rows ``[m, c]`` each, one for each probe.
        """
        m = self.count
        W = torch.cat([w[:, span] for w in self.state.probes])
        F = factored(self.state, self.shift, self.factor, span)
        z = self.directions @ F
        known = F.square_().sum(0) - self.shift
        z0, z1 = z[:m], z[1:]
        samples = (W * z0).mul_(self.lengths).addcmul_(z0, z0, value=-1.0).add_(known)
        W1 = torch.cat([W[1:], W[:1]])
        lengths = torch.cat([self.lengths[1:], self.lengths[:1]])
        change = self._change(z0, z1, W, self.lengths)
        return samples, change, self._change(z1, z0, W1, lengths)

    def _change(self, own: Tensor, other: Tensor, W: Tensor, lengths: Tensor) -> Tensor:
        p = torch.addcmul(other, self.cosine, own)
        return torch.mul(p, self.free).addcmul_(-self.cosine * self.free * lengths, W).mul_(p)
