r"""XDiag: the diagonal of a symmetric operator from leave-one-out sketches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlib.estimators.exchangeable import left_out
from curvlib.estimators.leave_one_out import BATCH, SketchState, combine, pick, sum_of_products


def diagonal_samples(state: SketchState) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    r"""XDiag: one unbiased estimate of the diagonal for each probe, and what a partner changes.

    The two-sided form for symmetric operators, which sums to the trace. Each probe has its next
    one for partner, the last one the first.

    Yields:
        The sample of probe i, what its partner in the sketch does to it, and what probe i does
        to its partner's sample, ``[n]`` each: see :mod:`curvlib.estimators.exchangeable`.
    """
    count = state.count
    views = _DiagonalViews.of(state)
    for start in range(0, count, BATCH):
        chosen = [i % count for i in range(start, min(start + BATCH, count) + 1)]
        rows = views.rows(state, chosen)
        for k in range(len(chosen) - 1):
            i, j = chosen[k], chosen[k + 1]
            one, other = rows[k], rows[k + 1]
            yield one.sample, views.change(i, j, one, other), views.change(j, i, other, one)


@dataclass(frozen=True)
class _Row:
    """Vectors of one probe: see :class:`_DiagonalViews`."""

    direction: Tensor  # q = Q s
    outside: Tensor  # A q - Q H s
    compressed: Tensor  # Q H s
    known: Tensor  # diagonal of A without (I - P) A (I - P)
    rest: Tensor  # (I - P) A (I - P) w
    probe: Tensor  # w
    sample: Tensor


@dataclass(frozen=True)
class _DiagonalViews:
    """The ``m x m`` matrices of :func:`diagonal_samples`, named as in the formulas."""

    S: Tensor
    X: Tensor
    N: Tensor
    HS: Tensor
    SHS: Tensor
    SS: Tensor
    SW: Tensor
    SD: Tensor
    known: Tensor

    @classmethod
    def of(cls, state: SketchState) -> _DiagonalViews:
        S, X = left_out(state.R, state.W)
        D = state.R - state.H @ X
        HS = state.H @ S
        known = 2 * sum_of_products(state.basis, state.images)
        start = 0
        for block in state.basis:
            stop = start + block.shape[0]
            known -= (combine(state.basis, state.H[:, start:stop]) * block).sum(0)
            start = stop
        return cls(
            S=S,
            X=X,
            N=state.R - D + S * (S * D).sum(-2),
            HS=HS,
            SHS=S.mT @ HS,
            SS=S.mT @ S,
            SW=S.mT @ state.W,
            SD=S.mT @ D,
            known=known,
        )

    def rows(self, state: SketchState, chosen: list[int]) -> list[_Row]:
        """The vectors of some probes."""
        Q, Z = state.basis, state.images
        directions = combine(Q, self.S[:, chosen])
        compressed = combine(Q, self.HS[:, chosen])
        outsides = combine(Z, self.S[:, chosen]) - compressed
        rests = combine(Q, self.N[:, chosen]) - combine(Z, self.X[:, chosen])
        probes = pick(state.probes, chosen)
        out = []
        for k, i in enumerate(chosen):
            q = directions[k]
            known = self.known - q * (2 * outsides[k] + float(self.SHS[i, i]) * q)
            sample = known + probes[k] * rests[k]
            out.append(_Row(q, outsides[k], compressed[k], known, rests[k], probes[k], sample))
        return out

    def change(self, i: int, j: int, one: _Row, other: _Row) -> Tensor:
        """What probe j in the sketch does to the sample of probe i, ``[n]``.

        Without j the basis loses one direction more, q; everything follows from it and from
        ``g = (I - P_i) A q``.
        """
        c = float(self.SS[i, j])
        root = max(1.0 - c * c, 4 * torch.finfo(torch.float64).eps) ** 0.5
        a = float(self.SW[j, i] - c * self.SW[i, i]) / root
        d = float(self.SD[j, i] - c * self.SD[i, i]) / root
        rho = float(self.SHS[j, j] - 2 * c * self.SHS[i, j] + c * c * self.SHS[i, i]) / root**2
        q = (other.direction - c * one.direction) / root
        g = other.outside - c * one.outside
        g = g.add_(one.direction, alpha=float(self.SHS[i, j] - c * self.SHS[i, i])).div_(root)
        rest = (one.rest + a * g).add_(q, alpha=d + a * rho)
        known = one.known - q * (2 * g + rho * q)
        without: Tensor = known + one.probe * rest
        return one.sample - without
