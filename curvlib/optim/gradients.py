"""Parameters and gradients as optimizers meet them: checked, made dense, accumulated, compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from curvlib.core.ranks.dtensors import slice_of

#: Of each group, gradients or ``None``.
Gradients = list[list[Tensor | None]]


def listed_group(group: Any) -> Any:
    """A parameter group whose members are a list, which can be read twice; others as they are."""
    if not isinstance(group, dict) or "params" not in group:
        return group
    members = group["params"]
    return {**group, "params": [members] if isinstance(members, Tensor) else list(members)}


def listed(params: Iterable[Any], method: str) -> Iterable[Any]:
    """Parameters, or groups whose members are lists.

    Args:
        params: What a user passed.
        method: Name of the optimizer's class.

    Raises:
        ValueError: If there are none.
    """
    if isinstance(params, Tensor):
        return params  # about which PyTorch complains itself
    found = [listed_group(p) for p in params]
    sizes = [len(p.get("params", "?")) if isinstance(p, dict) else 1 for p in found]
    if not any(sizes):
        raise ValueError(
            f"{method} got no parameters; pass model.parameters(), or groups of which one has some"
        )
    return found


def checked_group(group: dict[str, Any], known: set[int]) -> dict[str, Any]:
    """A parameter group whose members are a list of real floating-point tensors, each once.

    Args:
        group: What a user passed.
        known: ``id`` of parameters that are there already; grows.

    Raises:
        TypeError: If one is an integer or complex tensor.
        ValueError: If one is there twice.
    """
    group = listed_group(group)
    if "params" in group:
        require_parameters(group["params"], known)
    return group


def require_parameters(members: list[Any], known: set[int]) -> None:
    """Requires real floating-point tensors, each of them once.

    Args:
        members: What a user passed: tensors, or pairs of a name and a tensor.
        known: ``id`` of parameters that are there already; grows.

    Raises:
        TypeError: If one is an integer or complex tensor.
        ValueError: If one is there twice.
    """
    for i, member in enumerate(members):
        p = member[1] if isinstance(member, tuple) else member
        if not isinstance(p, Tensor):
            continue  # about which PyTorch complains itself
        if not p.is_floating_point():
            raise TypeError(
                f"parameters are real floating-point tensors, but parameter {i} of the group is "
                f"{p.dtype}; leave it out, or split it into real and imaginary parts"
            )
        if id(p) in known:
            raise ValueError(
                f"parameter {i} of the group is in the optimizer already; list each one once"
            )
        known.add(id(p))


def positive_scale(scale: float) -> float:
    """What a loss was multiplied by.

    Raises:
        ValueError: If it is no positive, finite number.
    """
    value = float(scale)
    if not 0 < value < float("inf"):
        raise ValueError(f"scale= is a positive number, got {value}; pass scaler.get_scale()")
    return value


def versions(parameters: Iterable[tuple[int, Tensor, Any]]) -> dict[int, tuple[Tensor, int]]:
    """The gradients in ``.grad`` and their versions, by identity."""
    grads = [p.grad for _, p, _ in parameters]
    return {id(g): (g, slice_of(g)._version) for g in grads if g is not None}


def accumulated(
    before: dict[int, tuple[Tensor, int]], after: dict[int, tuple[Tensor, int]]
) -> bool:
    """Whether a backward pass added to ``.grad``; setting gradients to zero is none."""
    for key, (grad, version) in after.items():
        if key not in before or (before[key][1] != version and bool(grad.any())):
            return True
    return False


def gradients_of(groups: Iterable[dict[str, Any]]) -> Gradients:
    """Dense gradients of each group (of their slices), negated where the group maximizes."""
    out: Gradients = []
    for group in groups:
        grads = [p.grad if p.requires_grad else None for p in group["params"]]
        grads = [None if g is None else dense(slice_of(g)) for g in grads]
        if group["maximize"]:
            grads = [None if g is None else -g for g in grads]
        out.append(grads)
    return out


def dense(tensor: Tensor) -> Tensor:
    """A sparse tensor as a dense one."""
    return tensor.to_dense() if tensor.layout != torch.strided else tensor


def accumulate(params: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Adds to ``.grad``; first gradients are copied, since several may share memory."""
    for p, g in zip(params, gradients, strict=True):
        if g is None:
            continue
        if p.grad is None:
            p.grad = torch.empty_like(p).copy_(g)
        elif p.grad.layout == torch.strided:
            p.grad.add_(g)
        else:
            p.grad = g + p.grad


def finite(tensors: Iterable[Tensor | None]) -> bool:
    """Whether all numbers are finite; the device is waited for once, if they are.

    What is not finite makes a sum so, and a sum costs next to nothing (a maximum norm takes as long
    as forty sums). That a sum alone has overflowed is told apart afterwards.
    """
    some = [t for t in tensors if t is not None and t.numel()]
    if not some:
        return True
    sums = [t.sum() for t in some]
    if len({(s.dtype, s.device) for s in sums}) > 1:
        sums = [s.to(some[0].device, torch.float32) for s in sums]
    if all(map(math.isfinite, torch.stack(sums).tolist())):
        return True
    return all(bool(torch.isfinite(t).all()) for t in some)
