r"""Layers of sharded parameters, divided among ranks for a step.

A preconditioner of layers needs their whole gradients, of which each rank has slices. Each layer is
one rank's in a step: slices go to it, and slices of what it makes of them come back. So no two
ranks do the same work, and what one rank has made is the same for all, to the bit.

With :math:`P` entries of :math:`s` bytes on :math:`R` ranks, a rank sends twice about
:math:`s P (R - 1) / R^2` bytes, and holds about :math:`s P / R` of whole gradients, the largest
layer at least; gathered on every rank, they would be :math:`R / 2` times the traffic, and
:math:`R` times the work.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlib.core.ranks.places import Place
from curvlib.optim.sharding import Sharding


@dataclass(frozen=True)
class Job:
    """One layer's work in a step.

    Attributes:
        keys: Its parameters, by ``id``.
        cost: Of the work, in any unit that all jobs share.
    """

    keys: tuple[int, ...]
    cost: float


class LayerShares:
    """This rank's share of the layers, and their whole gradients; all, where nothing is sharded.

    Ranks call it together, with the same jobs.

    Args:
        jobs: The layers' work.
        gradients: Of their parameters, by ``id``: this rank's slices.
        sharding: How parameters are cut; ``None`` if they are whole.

    Attributes:
        whole: Whole gradients of this rank's layers, by ``id``; not to be written to.

    Example:
        >>> shares = LayerShares([Job((7,), 1.0)], {7: torch.ones(2)}, None)
        >>> shares.mine(0), shares.whole[7].tolist()
        (True, [1.0, 1.0])
    """

    def __init__(
        self, jobs: Sequence[Job], gradients: Mapping[int, Tensor], sharding: Sharding | None
    ) -> None:
        self._group = None if sharding is None else sharding.group
        self.whole: Mapping[int, Tensor] = gradients
        if sharding is None or self._group is None:
            return
        self._owners = owners_of(jobs, self._group.size)
        pairs = zip(jobs, self._owners, strict=True)
        self._owner = {key: owner for job, owner in pairs for key in job.keys}
        self._places: dict[int, Place] = {key: sharding.place(key) for key in self._owner}
        self.whole = self._wholes(gradients)

    def mine(self, job: int) -> bool:
        """Whether a job, by its number, is this rank's."""
        return self._group is None or self._owners[job] == self._group.rank

    def parts(
        self, made: Mapping[int, Tensor], dtypes: Mapping[int, torch.dtype]
    ) -> dict[int, Tensor]:
        """This rank's slices of what all ranks have made, each of its own layers.

        Args:
            made: Whole tensors of parameters' shapes, by ``id``.
            dtypes: Of all that ranks have made.
        """
        group = self._group
        if group is None:
            return dict(made)
        found: dict[int, Tensor] = {}
        for keys in _alike({key: (dtype, self._device(key)) for key, dtype in dtypes.items()}):
            own = [key for key in keys if self._owner[key] == group.rank]
            sent = [[self._cut(key, made[key], rank) for key in own] for rank in range(group.size)]
            from_ = [[key for key in keys if self._owner[key] == r] for r in range(group.size)]
            shapes = [[self._shape(key, group.rank) for key in some] for some in from_]
            empty = torch.empty(0, dtype=dtypes[keys[0]], device=self._device(keys[0]))
            for some, got in zip(from_, self._exchanged(sent, shapes, empty), strict=True):
                found.update(zip(some, got, strict=True))
        return found

    def _wholes(self, gradients: Mapping[int, Tensor]) -> dict[int, Tensor]:
        group = self._group
        assert group is not None
        found: dict[int, Tensor] = {}
        kinds = {key: (gradients[key].dtype, gradients[key].device) for key in self._owner}
        for keys in _alike(kinds):
            own = [key for key in keys if self._owner[key] == group.rank]
            to = [[key for key in keys if self._owner[key] == r] for r in range(group.size)]
            sent = [[gradients[key] for key in some] for some in to]
            shapes = [[self._shape(key, rank) for key in own] for rank in range(group.size)]
            got = self._exchanged(sent, shapes, gradients[keys[0]].new_empty(0))
            for i, key in enumerate(own):
                axis = self._places[key].slices.dim
                found[key] = torch.cat([of_rank[i] for of_rank in got], axis)
        return found

    def _exchanged(
        self,
        sent: Sequence[Sequence[Tensor]],
        shapes: Sequence[Sequence[tuple[int, ...]]],
        empty: Tensor,
    ) -> list[list[Tensor]]:
        """Tensors of each rank, of some shapes, for those that it gets from this one."""
        assert self._group is not None
        flat = [torch.cat([empty, *(t.reshape(-1) for t in some)]) for some in sent]
        sizes = [[math.prod(shape) for shape in some] for some in shapes]
        got = self._group.exchanged(flat, [sum(some) for some in sizes])
        return [
            [part.view(s) for part, s in zip(block.split(lengths), some, strict=True)]
            for block, lengths, some in zip(got, sizes, shapes, strict=True)
        ]

    def _shape(self, key: int, rank: int) -> tuple[int, ...]:
        assert self._group is not None
        return self._places[key].slices.local(rank, self._group.size)

    def _cut(self, key: int, whole: Tensor, rank: int) -> Tensor:
        assert self._group is not None
        slices = self._places[key].slices
        first, last = slices.bounds(rank, self._group.size)
        return whole.narrow(slices.dim, first, last - first)

    def _device(self, key: int) -> torch.device:
        return self._places[key].leaf.device


def owners_of(jobs: Sequence[Job], ranks: int) -> list[int]:
    """Which rank works on each job: about as much on each, and what shares a parameter on one.

    Args:
        jobs: The jobs.
        ranks: How many ranks there are.

    Example:
        >>> jobs = [Job((1, 2), 1.0), Job((3,), 2.5), Job((2, 4), 1.0), Job((5,), 0.5)]
        >>> owners_of(jobs, 2)
        [1, 0, 1, 1]
    """
    parent = list(range(len(jobs)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = number = parent[parent[number]]
        return number

    first: dict[int, int] = {}
    for number, job in enumerate(jobs):
        for key in job.keys:
            one, other = root(first.setdefault(key, number)), root(number)
            parent[max(one, other)] = min(one, other)
    roots = [root(number) for number in range(len(jobs))]
    sums = dict.fromkeys(roots, 0.0)
    for job, own in zip(jobs, roots, strict=True):
        sums[own] += job.cost
    loads = [(0.0, rank) for rank in range(ranks)]
    owner: dict[int, int] = {}
    for own in sorted(sums, key=lambda own: (-sums[own], own)):
        load, owner[own] = loads[0]
        heapq.heapreplace(loads, (load + sums[own], owner[own]))
    return [owner[own] for own in roots]


def cost_of(shape: tuple[int, int, int]) -> float:
    """What preconditioning a matrix ``[G, O, I]`` costs: products with both sides."""
    groups, out, width = shape
    return float(groups * out * width * (out + width))


def _alike(kinds: Mapping[int, tuple[torch.dtype, torch.device]]) -> Iterable[list[int]]:
    """Keys of tensors that fit one buffer, in order."""
    found: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for key, kind in kinds.items():
        found.setdefault(kind, []).append(key)
    return found.values()
