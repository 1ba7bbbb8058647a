"""What callbacks share: which optimizer trains which risk, and cheap readings of curvature."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from curvlib.core.minibatch import minibatches
from curvlib.core.operator import LinearOperator
from curvlib.core.random import generator_of
from curvlib.core.risk import Risk
from curvlib.core.structured import Diagonal
from curvlib.estimators.eigenpairs import eigenpairs
from curvlib.rates.arguments import curvature
from curvlib.rates.preconditioned import preconditioned

#: Work of one product, in gradients on the same examples, once a graph is kept.
WORK = {"hessian": 2.0, "ggn": 5.0 / 3.0}
#: Share of a random vector in a warm start, so that an eigenvector that has overtaken is found.
MIX = 0.1


@dataclass(frozen=True)
class Top:
    """A largest eigenvalue, its residual, its vector ``[P]``, and what they took.

    ``work`` is in gradients of single examples.
    """

    value: float
    residual: float
    vector: Tensor
    products: int
    work: float


def require_trained(risk: Any, optimizer: Any) -> None:
    """Checks that an optimizer trains the parameters of a risk.

    Raises:
        TypeError: If one of them is of another type.
        ValueError: If a parameter is not among the optimizer's.
    """
    if not isinstance(risk, Risk):
        raise TypeError(f"expected a curvlib.Risk, got {type(risk).__name__}")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in risk.params.items() if id(p) not in known]
    if missing:
        raise ValueError(
            f"the optimizer does not train {missing[:4]} of the risk; pass the optimizer of this "
            "model, or select its parameters with Risk(..., params=...)"
        )


def group_entries(risk: Risk, optimizer: Optimizer, values: list[float]) -> Tensor | None:
    """One number for each group, spread over the risk's parameters: ``[P]``, float64.

    ``None`` where it is the same number for all of them.
    """
    group_of = {
        id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]
    }
    used = [group_of[id(p)] for p in risk.params.values()]
    if len({values[i] for i in used}) <= 1:
        return None
    parts = [
        torch.full(tuple(p.shape), values[i], dtype=torch.float64, device=p.device)
        for i, p in zip(used, risk.params.values(), strict=True)
    ]
    return torch.cat([part.reshape(-1) for part in parts])


def trained_curvature(
    part: Risk, optimizer: Optimizer, kind: str, ratios: list[float]
) -> LinearOperator:
    r"""The curvature that gradient descent with groups of their own rates and decays meets.

    With ratios :math:`r` of the groups' learning rates and weight decays :math:`w`, that is
    :math:`R^{1/2} (H + W) R^{1/2}`: then one learning rate, the first group's, remains.
    """
    op = curvature(part, kind)
    decays = [float(g.get("weight_decay", 0.0)) for g in optimizer.param_groups]
    scale = group_entries(part, optimizer, ratios)
    decay = group_entries(part, optimizer, decays)
    if decay is not None:
        op = op + Diagonal(decay.to(op.dtype))
    elif any(decays):
        op = op.shift(_of_first(part, optimizer, decays))
    if scale is not None:
        return preconditioned(op, Diagonal((1.0 / scale).to(op.dtype)))
    factor = _of_first(part, optimizer, ratios)
    return op if factor == 1.0 else op * factor


def _of_first(risk: Risk, optimizer: Optimizer, values: list[float]) -> float:
    first = next(iter(risk.params.values()))
    for value, group in zip(values, optimizer.param_groups, strict=True):
        if any(p is first for p in group["params"]):
            return value
    return values[0]


def top_of(
    op: LinearOperator,
    start: Tensor | None,
    *,
    examples: int,
    kind: str,
    seed: int,
    tolerance: float = 1e-2,
) -> Top:
    """The largest eigenvalue, from an eigenvector at an earlier point of training.

    Args:
        op: The operator.
        start: ``[P]``, or ``None``.
        examples: That a product goes over, for the work.
        kind: ``"hessian"`` or ``"ggn"``, for the work.
        seed: Of the random vector that is mixed into the start.
        tolerance: Of the residual; the value's error is of its square where there is a gap.
    """
    random = generator_of(None, seed)
    first = torch.randn(op.shape[0], generator=random).to(dtype=op.dtype, device=op.device)
    first = first / torch.linalg.vector_norm(first)
    if start is not None:
        first = start.to(first) + MIX * first
    pairs = eigenpairs(
        op,
        1,
        start=first[:, None],
        tolerance=tolerance,
        check=False,
        generator=random,
        progress=False,
    )
    work = examples * (1.0 + WORK[kind] * pairs.products)
    value, residual = float(pairs.values[0]), float(pairs.residuals[0])
    return Top(value, residual, pairs.vectors[:, 0].clone(), pairs.products, work)


def parts_of(risk: Risk, batch_size: int, draws: int, count: int, seed: int) -> list[Risk]:
    """Random mini-batches, disjoint where there are enough examples."""
    disjoint = draws * batch_size <= count
    return minibatches(risk, batch_size, draws, disjoint=disjoint, seed=seed)


def loss_value(loss: Any) -> float | None:
    """A loss as a number.

    Raises:
        TypeError: If it is neither a number nor a tensor of one element.
    """
    if loss is None:
        return None
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return float(loss.detach())
    if isinstance(loss, bool) or not isinstance(loss, (int, float)):
        what = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"loss= is a number or a tensor of one element, got {what}")
    return float(loss)


def joined_loss(risk: Risk, loss: Any) -> float | None:
    """A loss as a number: the mean over ranks in a process group, which all call this together.

    Raises:
        TypeError: If it is neither a number nor a tensor of one element.
        RuntimeError: If another rank failed.
    """
    if risk.group is None:
        return loss_value(loss)
    value, failure = None, None
    try:
        value = loss_value(loss)
    except TypeError as error:
        failure = error
    header = [failure is not None, value is not None, value or 0.0]
    every = risk.group.numbers([float(number) for number in header])
    if any(failed for failed, _, _ in every):
        risk.group.raise_failure(failure, "reading its loss")
    losses = [number for _, given, number in every if given]
    return sum(losses) / len(losses) if losses else None


def diverged(risk: Risk) -> str | None:
    """The name of a parameter that is not finite."""
    for name, p in risk.params.items():
        if not bool(torch.isfinite(p.detach().sum())) and not bool(torch.isfinite(p).all()):
            return name
    return None


def require_state(state: Any, settings: Mapping[str, Any], what: str) -> None:
    """Checks that a saved state belongs to a callback of these settings.

    Raises:
        TypeError: If it is no dictionary.
        ValueError: If it is of something else or of other settings.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"expected the dictionary that state_dict() gave, got {type(state)}")
    if state.get("kind") != what:
        raise ValueError(f"expected the state of a {what}, got that of {state.get('kind')!r}")
    old = state["settings"]
    changes = [
        f"{name} was {old.get(name)!r} and is now {settings.get(name)!r}"
        for name in sorted(old.keys() | settings.keys())
        if old.get(name) != settings.get(name)
    ]
    if changes:
        raise ValueError(
            f"the state was made with other settings: {'; '.join(changes)}. Make the {what} with "
            "the old ones"
        )


def buffers_of(model: nn.Module) -> list[Tensor]:
    """Buffers of a model, each once."""
    return list({id(b): b for b in model.buffers()}.values())


def require_positive(**numbers: float) -> None:
    """Raises ValueError for a number that is not positive and finite."""
    for name, value in numbers.items():
        if not (value > 0.0 and math.isfinite(value)):
            raise ValueError(f"expected a positive number for {name}, got {value}")


def reference_rate(group: dict[str, Any]) -> float:
    """The learning rate that a schedule's factors are relative to."""
    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))


def require_heavy_ball(optimizer: Optimizer) -> None:
    """Checks that Polyak's pair is for an optimizer.

    Raises:
        TypeError: If it is no ``torch.optim.SGD``.
        ValueError: If it has Nesterov's momentum, maximizes, or has a dampening of 1.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        raise TypeError(
            f"LanczosLearner sets the pair of torch.optim.SGD, got {type(optimizer).__name__}; "
            "StabilityMonitor watches other optimizers"
        )
    for index, group in enumerate(optimizer.param_groups):
        for name, why in (
            ("nesterov", "Polyak's pair belongs to heavy-ball momentum"),
            ("maximize", "the pair minimizes"),
        ):
            if group.get(name):
                raise ValueError(f"group {index} has {name}=True: {why}; use {name}=False")
        if float(group["dampening"]) >= 1.0:
            raise ValueError(
                f"group {index} has dampening={group['dampening']}: below 1, the learner makes up "
                "for it; use dampening=0"
            )
