r"""Data-parallel replicas: sums over ranks that every rank agrees on.

Each rank holds the whole model and computes the mean loss of its part of the batch. The loss of
the joint batch is the mean of these, so gradients are averaged. Averaging twice changes nothing,
so gradients may come averaged already (from ``DistributedDataParallel``). A rank sends
:math:`2 s P (R - 1) / R` bytes for its gradient, and as much for each tensor of curvature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from curvlib.core.ranks.group import Group, group_of


def size_of(process_group: dist.ProcessGroup | None) -> int:
    """How many replicas there are."""
    group = group_of(process_group)
    return 1 if group is None else group.size


def average_gradients(params: Sequence[Tensor], process_group: dist.ProcessGroup | None) -> None:
    """Averages ``.grad`` over ranks, in place; a rank without a gradient counts as zeros.

    Args:
        params: The same parameters, in the same order, on each rank.
        process_group: The group of the replicas.
    """
    group = group_of(process_group)
    if group is None:
        return
    for members in _alike(params):
        present = torch.tensor(
            [p.grad is not None for p in members], dtype=members[0].dtype, device=members[0].device
        )
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in members]
        parts = [g.to_dense() if g.layout != torch.strided else g for g in parts]
        flat = group.add(torch.cat([present, *(g.reshape(-1) for g in parts)]))
        found, mean = flat[: len(members)], flat[len(members) :] / group.size
        used = [bool(f) for f in (found != 0).tolist()]
        for p, here, part in zip(
            members, used, mean.split([p.numel() for p in members]), strict=True
        ):
            if not here:
                continue
            if p.grad is None or p.grad.layout != torch.strided:
                p.grad = part.view(p.shape).clone()
            else:
                p.grad.copy_(part.view(p.shape))


def sum_over_ranks(
    tensors: Mapping[str, Tensor], process_group: dist.ProcessGroup | None
) -> dict[str, Tensor]:
    """Sums tensors over ranks, by name.

    Raises:
        RuntimeError: If the ranks hold different tensors.
    """
    group = group_of(process_group)
    if group is None:
        return dict(tensors)
    names = sorted(tensors)
    _require_same(names, tensors, group)
    summed: dict[str, Tensor] = {}
    for members in _alike([tensors[name] for name in names]):
        flat = group.add(torch.cat([t.reshape(-1) for t in members]))
        parts = flat.split([t.numel() for t in members])
        by_tensor = {id(t): part for t, part in zip(members, parts, strict=True)}
        for name in names:
            if id(tensors[name]) in by_tensor:
                summed[name] = by_tensor[id(tensors[name])].view(tensors[name].shape)
    return summed


def _require_same(names: Sequence[str], tensors: Mapping[str, Tensor], group: Group) -> None:
    """Compares a small signature over ranks, where a difference would hang or mix tensors up."""
    every = group.numbers([len(names), sum(tensors[n].numel() for n in names)])
    own = every[group.rank]
    for rank, (count, size) in enumerate(every):
        if [count, size] != own:
            raise RuntimeError(
                f"ranks gathered different curvature: this one has {own[0]:.0f} tensors of "
                f"{own[1]:.0f} numbers, rank {rank} has {count:.0f} of {size:.0f}; every rank "
                "needs the same number of backward (or observe) calls before a step"
            )


def _alike(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors that fit one buffer, by dtype and device."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(kinds.values())
