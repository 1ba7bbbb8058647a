"""Steps of an inner first-order optimizer along directions that another method has made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from curvlib.optim.rules.first_order import FirstOrderState, adamw, init, sgd

RULES = ("adamw", "sgd")


def inner_steps(
    rule: str,
    group: Mapping[str, Any],
    along: Mapping[int, Tensor],
    state: Mapping[Tensor, Mapping[str, Any]],
    own: Callable[[Tensor], Tensor],
) -> list[tuple[Tensor, Tensor, dict[str, Any]]]:
    """What is added to each parameter of a group that has a direction, and its state afterwards.

    Args:
        rule: One of :data:`RULES`.
        group: ``params``, ``lr``, ``weight_decay``, ``momentum`` (of SGD), ``betas`` and ``eps``
            (of AdamW).
        along: Directions, by ``id`` of the parameter.
        state: States of parameters: ``momentum``, ``square`` (of AdamW) and ``steps``; other
            entries are not read.
        own: This rank's slice of a parameter that is sharded, in whose shape its direction is.
    """
    params = [p for p in group["params"] if id(p) in along]
    if not params:
        return []
    slices = [own(p) for p in params]
    before = [
        _known(state.get(p, {})) or init(mine, squares=rule == "adamw")
        for p, mine in zip(params, slices, strict=True)
    ]
    shared = {"lr": float(group["lr"]), "weight_decay": float(group["weight_decay"])}
    us = [along[id(p)] for p in params]
    if rule == "adamw":
        betas = (float(group["betas"][0]), float(group["betas"][1]))
        found = adamw(slices, us, before, betas=betas, eps=float(group["eps"]), **shared)
    else:
        found = sgd(slices, us, before, momentum=float(group["momentum"]), **shared)
    return [
        (p, change, {key: value for key, value in vars(new).items() if value is not None})
        for p, change, new in zip(params, *found, strict=True)
    ]


def _known(state: Mapping[str, Any]) -> FirstOrderState | None:
    if "steps" not in state:
        return None
    return FirstOrderState(state["momentum"], state.get("square"), int(state["steps"]))
