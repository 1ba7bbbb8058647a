"""First-order steps of parameters that have no curvature, as state dicts keep them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from curvlib.optim.rules.first_order import FirstOrderState, adamw, init, sgd

RULES = ("adamw", "sgd")


def rest_change(
    rule: str, p: Tensor, gradient: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """What is added to a parameter without curvature, and its state afterwards.

    Args:
        rule: One of :data:`RULES`.
        p: The parameter.
        gradient: Its gradient.
        state: Its state, of which the entries ``momentum``, ``square`` and ``steps`` are read.
        group: ``lr``, ``inner_scale``, ``weight_decay``, ``momentum`` (of SGD), ``inner_betas``
            and ``inner_eps`` (of AdamW).
    """
    lr = float(group["lr"]) * float(group["inner_scale"])
    decay = float(group["weight_decay"])
    known = "steps" in state
    old = (
        FirstOrderState(state["momentum"], state.get("square"), int(state["steps"]))
        if known
        else init(p, squares=rule == "adamw")
    )
    if rule == "adamw":
        betas = (float(group["inner_betas"][0]), float(group["inner_betas"][1]))
        eps = float(group["inner_eps"])
        change, new = adamw(p, gradient, old, lr=lr, betas=betas, eps=eps, weight_decay=decay)
    else:
        momentum = float(group["momentum"])
        change, new = sgd(p, gradient, old, lr=lr, momentum=momentum, weight_decay=decay)
    kept: dict[str, Any] = {"momentum": new.momentum, "steps": new.steps}
    return change, kept if new.square is None else {**kept, "square": new.square}
