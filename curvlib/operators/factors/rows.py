"""Factors of which each rank holds a slice, decomposed by one rank each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlib.core.ranks.bundles import cut_from, gathered, gathered_at
from curvlib.core.ranks.group import Group
from curvlib.core.ranks.slices import Slices
from curvlib.operators.factors.pairs import symmetric
from curvlib.operators.factors.ranks import owners_of


@dataclass(frozen=True, eq=False)
class Rows:
    """This rank's slice of a factor, which is made when it is needed.

    Attributes:
        slices: How the factor is cut: ``[G, d, d]``, or ``[G, d]`` of a diagonal.
        make: Makes the slice, float64.
    """

    slices: Slices
    make: Callable[[], Tensor]


def decomposed_rows(
    factors: Mapping[str, Rows], like: Tensor, group: Group
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Eigenvalues (float64, whole on every rank), and this rank's slices of eigenvectors.

    In each round every rank has one factor whole, decomposes it, and cuts its eigenvectors.

    Args:
        factors: By key; diagonal ones have no eigenvectors.
        like: Of the type and device of the eigenvectors.
        group: The ranks.
    """
    values: dict[str, Tensor] = {}
    bases: dict[str, Tensor] = {}
    for key, own in factors.items():
        if len(own.slices.shape) == 2:
            values[key] = gathered(own.make(), own.slices, group)
    shapes = {key: own.slices.shape for key, own in factors.items() if key not in values}
    queues: list[list[str]] = [[] for _ in range(group.size)]
    for key, rank in owners_of(shapes, group.size).items():
        queues[rank].append(key)
    for turn in range(max(map(len, queues))):
        keys = {rank: queue[turn] for rank, queue in enumerate(queues) if turn < len(queue)}
        whole: Tensor | None = None
        for rank, key in keys.items():
            found = gathered_at(factors[key].make(), factors[key].slices, group, rank)
            whole = found if rank == group.rank else whole
        value, vectors = None, None
        with group.together("its eigendecompositions"):
            if whole is not None:
                value, vectors = torch.linalg.eigh(symmetric(whole))
        whole = None
        for rank, key in keys.items():
            slices, mine = factors[key].slices, rank == group.rank
            filled = like.new_empty(slices.shape[:2], dtype=torch.float64)
            if mine and value is not None:
                filled = value.clamp_(min=0.0).contiguous()
            values[key] = group.from_rank(filled, rank)
            basis = vectors.to(like.dtype) if mine and vectors is not None else None
            bases[key] = cut_from(basis, slices, group, rank, like)
    return {key: values[key] for key in factors}, {k: bases[k] for k in factors if k in bases}


def trace_of_rows(own: Tensor, slices: Slices, group: Group) -> Tensor:
    """What a rank's slice of a factor adds to its trace, float64."""
    first, _ = slices.bounds(group.rank, group.size)
    entries = own.double()
    if entries.ndim == 3:
        entries = entries.diagonal(first if slices.dim == 1 else 0, -2, -1)
    return entries.sum()
