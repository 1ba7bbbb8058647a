r"""The pass over examples behind :mod:`curvlib.rates.example_curvature`, block by block.

A frozen state holds what has been gathered and the seed of random signs, which are drawn for each
example by itself: the pass goes on bitwise from where it was stopped, and neither blocks, batches
nor ranks change the signs.

In a process group of :math:`R` ranks, each goes over the examples of its shard, in one step, and
sends :math:`M (2 k^2 + 5) / R` numbers of its examples and a sum of :math:`8 P`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from curvlib.core.minibatch import example_counts
from curvlib.core.operator import LinearOperator
from curvlib.core.random import generator_of
from curvlib.core.ranks.group import Group
from curvlib.core.risk import Risk
from curvlib.operators.example_products import ExampleProducts, example_products
from curvlib.rates.arguments import first_seed

#: Random vectors for what is averaged over examples as well: few suffice.
PROBES = 8


@dataclass(frozen=True, eq=False)
class SumsState:
    """What is known after some blocks of examples.

    Attributes:
        seed: Of the random signs; those of example ``i`` have this plus ``i``.
        projected: Of the examples so far, ``[n, k, k]``, float64.
        spread: ``[n, k, k]``, float64.
        weights: ``[n]``, float64.
        scalars: Own curvature and square of the noise, trace and square, ``[n, 4]``, float64.
        mixed: Random mixtures of all noise, ``[PROBES, P]``.
        ends: ``[2]``, what products of the whole matrix add after the last example, or ``None``.
    """

    seed: int
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
        self._open = (part, kind, block)
        self._pieces: tuple[int, Iterator[ExampleProducts]] | None = None

    def first(self, generator: torch.Generator) -> SumsState:
        """The state before the first example."""
        P, k = self.V.shape
        none = torch.zeros((0, k, k), dtype=torch.float64)
        return SumsState(
            seed=first_seed(generator, None),
            projected=none,
            spread=none,
            weights=torch.zeros(0, dtype=torch.float64),
            scalars=torch.zeros((0, 4), dtype=torch.float64),
            mixed=self.V.new_zeros((PROBES, P)),
        )

    def next(self, state: SumsState) -> SumsState:
        """Adds the next block of examples, or what comes after the last one."""
        part, kind, block = self._open
        seen = len(state.weights)
        if part.group is not None:
            counts = example_counts(part)
            return (
                self._joined(state, part.group, counts) if seen < sum(counts) else self._last(state)
            )
        if self._pieces is None or self._pieces[0] != seen:
            self._pieces = (seen, example_products(part, kind=kind, block=block, start=seen))
        piece = next(self._pieces[1], None)
        if piece is None:
            return self._last(state)
        out = self._added(state, piece, seen)
        self._pieces = (len(out.weights), self._pieces[1])
        return out

    def _joined(self, state: SumsState, group: Group, counts: list[int]) -> SumsState:
        """Adds all examples that are left, of all ranks, in the order of ranks."""
        part, kind, block = self._open
        start, seen = sum(counts[: group.rank]), len(state.weights)
        passed = min(max(0, seen - start), counts[group.rank])
        own = replace(
            state,
            projected=state.projected[:0],
            spread=state.spread[:0],
            weights=state.weights[:0],
            scalars=state.scalars[:0],
            mixed=torch.zeros_like(state.mixed),
        )
        with group.together("a pass over its examples"):
            if passed < counts[group.rank]:
                for piece in example_products(part, kind=kind, block=block, start=passed):
                    own = self._added(own, piece, start + passed + len(own.weights))
        device = self.V.device

        def rows(name: str) -> Tensor:
            found = [getattr(state, name), *group.rows(getattr(own, name).to(device))]
            return torch.cat([part.cpu() for part in found])

        return SumsState(
            seed=state.seed,
            projected=rows("projected"),
            spread=rows("spread"),
            weights=rows("weights"),
            scalars=rows("scalars"),
            mixed=state.mixed + group.add(own.mixed),
        )

    def _added(self, state: SumsState, piece: ExampleProducts, number: int) -> SumsState:
        """The state with more examples, the first of which has a number among all."""
        V, n = self.V, piece.count
        P, k = V.shape
        signs = torch.stack(
            [self._signs(state.seed + number + i, k * (PROBES + 1) + P) for i in range(n)]
        )
        images = self._product(piece, V)
        M = torch.einsum("pa,npb->nab", V, images)
        R = images - torch.einsum("pa,nab->npb", V, M)
        R = R - torch.einsum("pa,nab->npb", V, torch.einsum("pa,npb->nab", V, R))
        along = torch.einsum("npb,nb->np", R, signs[:, :k])
        z = signs[:, k * (PROBES + 1) :]
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
        mixes = signs[:, k : k * (PROBES + 1)].view(n, k, PROBES)
        return replace(
            state,
            projected=torch.cat([state.projected, M.double().cpu()]),
            spread=torch.cat([state.spread, (R.mT @ R).double().cpu()]),
            weights=torch.cat([state.weights, piece.weights]),
            scalars=torch.cat([state.scalars, scalars.cpu()]),
            mixed=state.mixed.clone().add_(torch.einsum("npb,nbj->jp", R, mixes)),
        )

    def _last(self, state: SumsState) -> SumsState:
        return replace(state, ends=self._ends(state))

    def _ends(self, state: SumsState) -> Tensor:
        image = self.H.matmat(state.mixed.mT)
        shared = torch.linalg.vecdot(state.mixed.double(), image.mT.double()).mean()
        rest = self._signs(state.seed - 1, self.V.shape[0] * PROBES).view(-1, PROBES)
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

    def _signs(self, seed: int, count: int) -> Tensor:
        bits = torch.randint(2, (count,), generator=generator_of(None, seed))
        return bits.to(self.V).mul_(2.0).sub_(1.0)


def _apply(root: LinearOperator, columns: Tensor) -> Tensor:
    if columns.ndim == 2:
        return root.matmat(columns)
    n, size, k = columns.shape
    flat = columns.permute(1, 0, 2).reshape(size, n * k)
    return root.matmat(flat).view(size, n, k).permute(1, 0, 2)
