"""Natural gradients of all layers of a model, and steps along them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlib.operators.layers.factored import FactoredLayer
from curvlib.optim.layer_curvature import LayerCurvature
from curvlib.optim.layer_places import LayerPlaces
from curvlib.optim.layer_shares import Job, LayerShares, cost_of
from curvlib.optim.rules.kfac import (
    factored_inverses,
    inverted,
    preconditioned,
    preconditioned_by,
)
from curvlib.optim.sharding import Sharding


@dataclass(frozen=True, eq=False)
class Member:
    """A parameter that has a gradient.

    Attributes:
        parameter: The parameter.
        gradient: Its gradient; this rank's slice of it, if it is sharded.
        group: Hyper-parameters of its group.
    """

    parameter: Tensor
    gradient: Tensor
    group: Mapping[str, Any]


#: Damping of a layer, and with it the inverse eigenvalues, or the inverses of both factors.
Inverse = tuple[float, tuple[Tensor, ...]]


def natural_gradients(
    layers: Iterable[tuple[FactoredLayer, LayerPlaces]],
    params: Mapping[str, Tensor],
    members: Mapping[int, Member],
    curvature: Mapping[str, LayerCurvature],
    inverses: MutableMapping[str, Inverse],
    *,
    relative: bool,
    factored: bool = False,
    dtype: torch.dtype,
    sharding: Sharding | None = None,
) -> dict[int, Tensor]:
    """Preconditioned gradients by ``id`` of the parameter, of parameters that are covered wholly.

    Of sharded parameters, slices of them: each layer's gradient is preconditioned whole on one of
    the ranks.

    Args:
        layers: The layers.
        params: All parameters, by name.
        members: Those with a gradient, by ``id``.
        curvature: Of the layers where it is known.
        inverses: Inverses that are known; others that this rank needs are added.
        relative: Whether damping is.
        factored: Whether damping is split between the factors.
        dtype: Of the natural gradients.
        sharding: How parameters and gradients are cut, if they are.
    """
    covered: list[tuple[FactoredLayer, LayerPlaces, dict[str, int]]] = []
    entries = Counter[int]()
    for layer, places in layers:
        ids = {name: id(params[name]) for name in layer.names if id(params[name]) in members}
        known = curvature.get(layer.name)
        if known is not None and ids and known.fits(layer.shape):
            covered.append((layer, places, ids))
            entries.update({key: places.sizes[name] for name, key in ids.items()})
    # of attention's projections, all are known or none is used
    shapes = {id(p): p.shape for p in params.values()}
    wholly = {key: dtype for key, count in entries.items() if count == shapes[key].numel()}
    jobs = [Job(tuple(ids.values()), cost_of(layer.shape)) for layer, _, ids in covered]
    gradients = {key: member.gradient for key, member in members.items()}
    shares = LayerShares(jobs, gradients, sharding)
    made: dict[int, Tensor] = {}
    for number, (layer, places, ids) in enumerate(covered):
        if not shares.mine(number):
            continue
        known = curvature[layer.name]
        damping = float(members[next(iter(ids.values()))].group["damping"])
        inverse = inverses.get(layer.name)
        if inverse is None or inverse[0] != damping:
            inverse = (damping, _inverses(known, damping, relative=relative, factored=factored))
            inverses[layer.name] = inverse
        matrix = places.read({name: shares.whole[key] for name, key in ids.items()}, dtype)
        if factored:
            matrix = preconditioned_by(matrix, *inverse[1])
        else:
            matrix = preconditioned(matrix, *known.basis, *inverse[1])
        for key in ids.values():
            if key not in made:
                made[key] = torch.empty(shapes[key], dtype=dtype, device=matrix.device)
        places.write(matrix, {name: made[key] for name, key in ids.items()})
    return shares.parts({key: whole for key, whole in made.items() if key in wholly}, wholly)


def _inverses(
    known: LayerCurvature, damping: float, *, relative: bool, factored: bool
) -> tuple[Tensor, ...]:
    if not factored:
        return (inverted(known.eigenvalues(), damping, relative=relative),)
    return factored_inverses(*known.sides(), damping, relative=relative)


def inner_products(
    directions: Mapping[int, Tensor], members: Mapping[int, Member], sharding: Sharding | None
) -> dict[int, float]:
    """Inner products of directions with gradients, by ``id``; the same bits on all ranks.

    Args:
        directions: By ``id`` of the parameter.
        members: Parameters with a gradient, these at least.
        sharding: How both are cut, if they are.
    """
    if not directions:
        return {}
    numbers = torch.stack(
        [
            torch.dot(v.view(-1), members[key].gradient.reshape(-1).to(v.dtype))
            for key, v in directions.items()
        ]
    )
    if sharding is not None:
        numbers = sharding.sum(numbers)  # over slices
    return dict(zip(directions, numbers.tolist(), strict=True))


def step_along(
    params: list[Tensor],
    directions: list[Tensor],
    state: MutableMapping[Tensor, dict[str, Any]],
    group: Mapping[str, Any],
    clip: float,
    own: Callable[[Tensor], Tensor],
) -> None:
    """Steps of a group's parameters, with momentum and decoupled weight decay, in place.

    Args:
        params: Parameters.
        directions: Natural gradients, which are overwritten.
        state: Of the optimizer; its entries ``velocity`` are the buffers of momentum.
        group: ``lr``, ``momentum`` and ``weight_decay``.
        clip: Factor of the directions.
        own: This rank's slice of a parameter that is sharded, in whose shape its direction is.
    """
    if not params:
        return
    momentum, lr = float(group["momentum"]), float(group["lr"])
    if clip != 1.0:
        torch._foreach_mul_(directions, clip)
    if momentum:
        for p, direction in zip(params, directions, strict=True):
            if "velocity" not in state[p]:
                state[p]["velocity"] = torch.zeros_like(direction)
        buffers = [state[p]["velocity"] for p in params]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, directions)
        directions = buffers
    slices = [own(p) for p in params]
    if group["weight_decay"]:
        torch._foreach_mul_(slices, 1.0 - lr * float(group["weight_decay"]))
    torch._foreach_add_(slices, directions, alpha=-lr)
