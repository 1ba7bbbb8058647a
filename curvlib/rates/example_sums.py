r"""The pass over examples behind :mod:`curvlib.rates.example_curvature`, block by block.

A frozen state holds what has been gathered and the random generator's state, so that the pass
goes on bitwise from where it was stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from curvlib.core.operator import LinearOperator
from curvlib.core.risk import Risk
from curvlib.operators.example_products import ExampleProducts, example_products

#: Random vectors for what is averaged over examples as well: few suffice.
PROBES = 8


@dataclass(frozen=True, eq=False)
class SumsState:
    """What is known after some blocks of examples.

    Attributes:
        random: State of the random generator.
        projected: Of the examples so far, ``[n, k, k]``, float64.
        spread: ``[n, k, k]``, float64.
        weights: ``[n]``, float64.
        scalars: Own curvature and square of the noise, trace and square, ``[n, 4]``, float64.
        mixed: Random mixtures of all noise, ``[PROBES, P]``.
        ends: ``[2]``, what products of the whole matrix add after the last example, or ``None``.
    """

    random: Tensor
    projected: Tensor
    spread: Tensor
    weights: Tensor
    scalars: Tensor
    mixed: Tensor
    ends: Tensor | None = None


class ExampleSums:
    """The steps of the pass: first state, next state, finished numbers.

    Args:
        H: The matrix of all examples, preconditioned if that is asked for.
        root: The preconditioner's ``P ** -1/2``, or ``None``.
        V: Top eigenvectors of ``H``, ``[P, k]``.
        part: The examples.
        kind: ``"hessian"`` or ``"ggn"``.
        block: Examples at a time.
    """

    def __init__(
        self,
        H: LinearOperator,
        root: LinearOperator | None,
        V: Tensor,
        part: Risk,
        kind: str,
        block: int | None,
    ) -> None:
        self.H, self.root, self.V = H, root, V
        self._generator = torch.Generator()
        self._open = (part, kind, block)
        self._pieces: tuple[int, Iterator[ExampleProducts]] | None = None

    def first(self, generator: torch.Generator) -> SumsState:
        """The state before the first example; signs come from a generator on the CPU."""
        P, k = self.V.shape
        none = torch.zeros((0, k, k), dtype=torch.float64)
        return SumsState(
            random=generator.get_state(),
            projected=none,
            spread=none,
            weights=torch.zeros(0, dtype=torch.float64),
            scalars=torch.zeros((0, 4), dtype=torch.float64),
            mixed=self.V.new_zeros((PROBES, P)),
        )

    def next(self, state: SumsState) -> SumsState:
        """Adds the next block of examples, or what comes after the last one."""
        self._generator.set_state(state.random)
        seen = len(state.weights)
        if self._pieces is None or self._pieces[0] != seen:
            part, kind, block = self._open
            self._pieces = (seen, example_products(part, kind=kind, block=block, start=seen))
        piece = next(self._pieces[1], None)
        if piece is None:
            return replace(state, ends=self._ends(state))
        out = self._added(state, piece)
        self._pieces = (len(out.weights), self._pieces[1])
        return out

    def _added(self, state: SumsState, piece: ExampleProducts) -> SumsState:
        V, n = self.V, piece.count
        k = V.shape[1]
        images = self._product(piece, V)
        M = torch.einsum("pa,npb->nab", V, images)
        R = images - torch.einsum("pa,nab->npb", V, M)
        R = R - torch.einsum("pa,nab->npb", V, torch.einsum("pa,npb->nab", V, R))
        along = torch.einsum("npb,nb->np", R, self._signs(n, k))
        z = self._signs(n, V.shape[0])
        both = self._product(piece, torch.stack([along, z], dim=2))
        scalars = torch.stack(
            [
                torch.linalg.vecdot(along.double(), both[:, :, 0].double()),
                along.double().square().sum(1),
                torch.linalg.vecdot(z.double(), both[:, :, 1].double()),
                both[:, :, 1].double().square().sum(1),
            ],
            dim=1,
        )
        mixes = self._signs(n * k, PROBES).view(n, k, PROBES)
        return SumsState(
            random=self._generator.get_state(),
            projected=torch.cat([state.projected, M.double().cpu()]),
            spread=torch.cat([state.spread, (R.mT @ R).double().cpu()]),
            weights=torch.cat([state.weights, piece.weights]),
            scalars=torch.cat([state.scalars, scalars.cpu()]),
            mixed=state.mixed.clone().add_(torch.einsum("npb,nbj->jp", R, mixes)),
        )

    def _ends(self, state: SumsState) -> Tensor:
        image = self.H.matmat(state.mixed.mT)
        shared = torch.linalg.vecdot(state.mixed.double(), image.mT.double()).mean()
        rest = self._signs(self.V.shape[0], PROBES)
        rest = rest - self.V @ (self.V.mT @ rest)
        image = self.H.matmat(rest)
        image = image - self.V @ (self.V.mT @ image)
        return torch.stack([shared, image.double().square().sum() / PROBES]).cpu()

    def finished(self, state: SumsState, values: Tensor) -> dict[str, Any]:
        """What the last state says, scaled to examples of mean weight one.

        Raises:
            ValueError: If no loss term of the examples is valid.
        """
        assert state.ends is not None
        weights = state.weights
        mean = float(weights.mean())
        if mean == 0.0:
            raise ValueError(
                "no loss term of the examples is valid; check ignore_index and weight="
            )
        projected, spread = state.projected / mean, state.spread / mean**2
        scale = torch.tensor([mean**3, mean**2, mean, mean**2], dtype=torch.float64)
        scalars = state.scalars / scale
        total = float(spread.diagonal(dim1=1, dim2=2).sum())
        shared, complement = state.ends.tolist()
        trace = scalars[:, 2]
        # batches divide by their own weight: to first order, that takes out its deviation
        projected = projected - (weights / mean - 1.0)[:, None, None] * torch.diag(values)
        projected = projected + torch.diag(values) - projected.mean(0)
        return {
            "projected": projected,
            "spread": spread,
            "own": scalars[:, :2].contiguous(),
            "shared": shared / mean**2 / total if total > 0.0 else 0.0,
            "trace": float(trace.mean()),
            "trace_stderr": float(trace.std()) / math.sqrt(len(weights)),
            "square": float(scalars[:, 3].mean()),
            "complement": complement,
        }

    def _product(self, piece: ExampleProducts, columns: Tensor) -> Tensor:
        """``P^-1/2 H_i P^-1/2`` times columns ``[P, K]`` or ``[n, P, K]``, as ``[n, P, K]``."""
        if self.root is None:
            return piece.matmat(columns)
        inner = piece.matmat(_apply(self.root, columns))
        return _apply(self.root, inner)

    def _signs(self, rows: int, columns: int) -> Tensor:
        bits = torch.randint(2, (rows, columns), generator=self._generator)
        return bits.to(self.V).mul_(2.0).sub_(1.0)


def _apply(root: LinearOperator, columns: Tensor) -> Tensor:
    if columns.ndim == 2:
        return root.matmat(columns)
    n, size, k = columns.shape
    flat = columns.permute(1, 0, 2).reshape(size, n * k)
    return root.matmat(flat).view(size, n, k).permute(1, 0, 2)
