r"""Data-parallel replicas: sums over ranks that every rank agrees on.

Each rank holds the whole model and computes the mean loss of its part of the batch. The loss of
the joint batch is the mean of these, so gradients are averaged. Averaging twice changes nothing,
so gradients may come averaged already (from ``DistributedDataParallel``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def group_of(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group of the replicas; ``None`` where there is only one process."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    group = process_group if process_group is not None else dist.group.WORLD
    return None if dist.get_world_size(group) == 1 else group


def size_of(process_group: dist.ProcessGroup | None) -> int:
    """How many replicas there are."""
    group = group_of(process_group)
    return 1 if group is None else dist.get_world_size(group)


def average_gradients(params: Sequence[Tensor], process_group: dist.ProcessGroup | None) -> None:
    """Averages ``.grad`` over ranks, in place; a rank without a gradient counts as zeros.

    Args:
        params: The same parameters, in the same order, on each rank.
        process_group: The group of the replicas.
    """
    group = group_of(process_group)
    if group is None:
        return
    ranks = dist.get_world_size(group)
    for members in _alike(params):
        present = torch.tensor(
            [p.grad is not None for p in members], dtype=members[0].dtype, device=members[0].device
        )
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in members]
        parts = [g.to_dense() if g.layout != torch.strided else g for g in parts]
        flat = torch.cat([present, *(g.reshape(-1) for g in parts)])
        dist.all_reduce(flat, group=group)
        found, mean = flat[: len(members)], flat[len(members) :] / ranks
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
        flat = torch.cat([t.reshape(-1) for t in members])
        dist.all_reduce(flat, group=group)
        parts = flat.split([t.numel() for t in members])
        by_tensor = {id(t): part for t, part in zip(members, parts, strict=True)}
        for name in names:
            if id(tensors[name]) in by_tensor:
                summed[name] = by_tensor[id(tensors[name])].view(tensors[name].shape)
    return summed


def _require_same(
    names: Sequence[str], tensors: Mapping[str, Tensor], group: dist.ProcessGroup
) -> None:
    """Compares a small signature over ranks, where a difference would hang or mix tensors up."""
    sizes = [len(names), sum(tensors[n].numel() for n in names)]
    device = "cpu" if "gloo" in str(dist.get_backend(group)) else torch.device("cuda")
    seen = torch.tensor([*sizes, *(-s for s in sizes)], device=device)
    dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=group)
    if seen[:2].tolist() != [-s for s in seen[2:].tolist()]:
        raise RuntimeError(
            f"ranks gathered different curvature: this one has {sizes[0]} tensors of {sizes[1]} "
            f"numbers, others up to {seen[0]} of {seen[1]}; every rank needs the same number of "
            "backward (or observe) calls before a step"
        )


def _alike(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors that fit one buffer, by dtype and device."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(kinds.values())
