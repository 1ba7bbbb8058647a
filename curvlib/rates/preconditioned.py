r"""Curvature as an adaptive optimizer sees it: the spectrum of :math:`P^{-1/2} H P^{-1/2}`.

An adaptive method steps by :math:`-\eta\, P^{-1} m` with a diagonal :math:`P` made from its state,
such as :math:`\sqrt{\hat v} + \epsilon` for Adam. While :math:`P` changes slowly, that is gradient
descent in the coordinates :math:`P^{1/2} \theta`, whose Hessian is :math:`P^{-1/2} H P^{-1/2}`:
its largest eigenvalue, the *preconditioned sharpness*, takes the place of
:math:`\lambda_{\max}(H)` in every stability bound (Cohen et al., "Adaptive gradient methods at the
edge of stability", 2022, section 2).

================================  ====================================================
state                             :math:`P`
================================  ====================================================
Adam, AdamW, NAdam (``amsgrad``)  :math:`\sqrt{v / (1 - \beta_2^t)} + \epsilon`
RMSprop (``centered``)            :math:`\sqrt{v\,[- \bar g^2]} + \epsilon`
Adagrad                           :math:`\sqrt{\sum g^2} + \epsilon`
AdaHessian                        :math:`(v / (1 - \beta_2^t))^{k/2} + \epsilon`
================================  ====================================================

Where parameter groups have learning rates of their own, :math:`P` is divided by their ratio to that
of the first group, so that one learning rate, the first group's, remains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from curvlib.core.operator import LinearOperator
from curvlib.core.risk import Risk
from curvlib.core.space import ParamSpace, select
from curvlib.core.structured import Diagonal, LowRankPlusShift
from curvlib.estimators.eigenpairs import require_symmetric

#: Operators with exact powers.
Preconditioner = Diagonal | LowRankPlusShift
#: Where the parameters behind the names of a space are found.
Params = Risk | nn.Module | Mapping[str, Tensor] | None


def preconditioner(
    optimizer: Optimizer, space: ParamSpace, params: Params = None, *, damping: float = 0.0
) -> Diagonal:
    """The diagonal ``P`` of an optimizer's state, in the order of a parameter space.

    Args:
        optimizer: Of :mod:`torch.optim` or alike, after at least one step. Its state is recognized
            by the names of its entries (see the module's table).
        space: Of the operator that is to be preconditioned, ``op.space``.
        params: The risk, model or mapping of names in which the space's parameters are found. Not
            needed for an optimizer that was made from ``model.named_parameters()``.
        damping: Added to ``P``.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If a parameter is not among the optimizer's, has no state, the state is of an
            unknown kind (SGD has none), or ``P`` is not positive.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.Adam(model.parameters(), eps=0.5)
        >>> (model.weight * torch.tensor([[1.0, -2.0]])).sum().backward()
        >>> optimizer.step()
        >>> P = preconditioner(optimizer, ParamSpace.of(model), model)
        >>> P.diagonal().round(decimals=3).tolist()
        [1.5, 2.5]
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer= takes a torch.optim.Optimizer, got {type(optimizer).__name__}; pass a "
            "curvlib.Diagonal for a preconditioner of your own"
        )
    named = _named(optimizer, params)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    reference = float(optimizer.param_groups[0]["lr"])
    parts: list[Tensor | None] = []
    for name in space.names:
        p = named.get(name)
        if p is None:
            raise ValueError(f"parameter {name!r} is not in params=; there are {sorted(named)[:8]}")
        if id(p) not in groups:
            raise ValueError(
                f"parameter {name!r} is not among the optimizer's; pass the optimizer that trains "
                "this model, or select its parameters with Risk(..., params=...)"
            )
        group = groups[id(p)]
        rate = float(group["lr"])
        if not (rate > 0.0 and reference > 0.0):
            raise ValueError(
                f"the learning rate of the group of {name!r} is {rate:g}, of the first "
                f"{reference:g}; preconditioned curvature needs positive ones"
            )
        parts.append(_denominator(optimizer, p, group, name) * (reference / rate))
    flat = space.join(parts) + damping
    bad = ~((flat > 0.0) & torch.isfinite(flat))
    if bool(bad.any()):
        raise ValueError(
            f"{int(bad.sum())} of {flat.numel()} entries of the preconditioner are not positive "
            "and finite: parameters without gradients, or a state that has diverged; pass "
            "damping=, or leave them out with Risk(..., params=...)"
        )
    return Diagonal(flat, name=f"preconditioner of {type(optimizer).__name__}")


def preconditioned(
    op: LinearOperator,
    by: Optimizer | Preconditioner | Tensor,
    params: Params = None,
    *,
    damping: float = 0.0,
) -> LinearOperator:
    r"""The symmetric operator :math:`P^{-1/2} A P^{-1/2}`, for all estimators.

    It has the eigenvalues of :math:`P^{-1} A`. An eigenvector ``u`` stands for the direction
    :math:`P^{-1/2} u` of the parameters.

    Args:
        op: A symmetric operator, indexed by parameters where ``by`` is an optimizer.
        by: An optimizer whose state gives ``P``; or ``P`` itself: its diagonal ``[P]``, or an
            operator with powers (:class:`curvlib.Diagonal`, :class:`curvlib.LowRankPlusShift`).
        params: See :func:`preconditioner`.
        damping: Added to ``P``.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If the operator is not symmetric, or ``P`` does not fit it or is not positive.

    Example:
        >>> A = torch.diag(torch.tensor([4.0, 9.0]))
        >>> preconditioned(A, torch.tensor([4.0, 0.25])).to_dense().diagonal().tolist()
        [1.0, 36.0]

    Source:
        J. Cohen et al., *Adaptive gradient methods at the edge of stability*, 2022, section 2.
    """
    op = require_symmetric(op)
    root = inverse_root(op, by, params, damping=damping)
    return LinearOperator(
        lambda columns: root.matmat(op.matmat(root.matmat(columns))),
        op.shape,
        dtype=op.dtype,
        device=op.device,
        symmetric=True,
        psd=op.psd,
        space=op.space,
        name=f"preconditioned {op.name}",
        identity=lambda: f"{op.fingerprint()}|{root.fingerprint()}",
        group=op.group,
    )


def inverse_root(
    op: LinearOperator | Risk,
    by: Optimizer | Preconditioner | Tensor,
    params: Params = None,
    *,
    damping: float = 0.0,
) -> LinearOperator:
    """``P ** -1/2`` for an operator, or for the operators of a risk: see :func:`preconditioned`."""
    space = op.space
    if isinstance(by, Optimizer):
        if space is None:
            raise ValueError(
                f"{op!r} is not indexed by parameters, so an optimizer's state cannot be matched; "
                "pass the preconditioner's diagonal"
            )
        found = params if params is not None or not isinstance(op, Risk) else op
        matrix: Preconditioner = preconditioner(by, space, found, damping=damping)
    else:
        if isinstance(by, Tensor):
            by = Diagonal(by)
        if not isinstance(by, (Diagonal, LowRankPlusShift)):
            raise TypeError(
                "a preconditioner is a torch.optim.Optimizer, its diagonal as a tensor, a Diagonal "
                f"or a LowRankPlusShift, got {type(by).__name__}"
            )
        matrix = by.shift(damping) if damping else by
    size = op.space.size if isinstance(op, Risk) else op.shape[0]
    dtype = op.space.dtype if isinstance(op, Risk) else op.dtype
    if matrix.shape[0] != size or matrix.dtype != dtype:
        raise ValueError(
            f"expected a preconditioner of size {size} in {dtype}, got {matrix.shape[0]} in "
            f"{matrix.dtype}"
        )
    values = matrix.values if isinstance(matrix, Diagonal) else matrix._distinct(0.0)
    if not bool((values > 0.0).all()):
        raise ValueError(
            f"expected a positive definite preconditioner, but its least eigenvalue is "
            f"{float(values.min()):.3g}; pass damping="
        )
    return matrix.power(-0.5)


def _named(optimizer: Optimizer, params: Params) -> Mapping[str, Tensor]:
    if isinstance(params, Risk):
        return params.params
    if isinstance(params, nn.Module):
        return select(params, list(params.parameters()))
    if isinstance(params, Mapping):
        return params
    if params is not None:
        raise TypeError(
            f"params= takes a risk, a model or a mapping of names, got {type(params).__name__}"
        )
    groups = optimizer.param_groups
    if not all("param_names" in group for group in groups):
        raise ValueError(
            "the optimizer does not know the names of its parameters; pass params=risk (or the "
            "model), or make it from model.named_parameters()"
        )
    return {
        name: p
        for group in groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    }


def _denominator(optimizer: Optimizer, p: Tensor, group: Mapping[str, Any], name: str) -> Tensor:
    """What the update of a parameter is divided by, in float64."""
    state = optimizer.state.get(p)
    if not state:
        raise ValueError(
            f"{type(optimizer).__name__} holds no state for parameter {name!r}: it has not taken a "
            "step yet, the parameter had no gradient, or the optimizer keeps none (SGD: use the "
            "operator as it is)"
        )
    eps = float(group.get("eps", 0.0))
    power = float(group.get("hessian_power", 1.0))
    if "acc_delta" not in state:  # Adadelta's learning rate is no scale
        for key in ("exp_hessian_diag_sq", "exp_avg_sq"):
            if key in state:
                largest = bool(group.get("amsgrad"))
                square: Tensor = state["max_exp_avg_sq" if largest else key].double()
                return (square / _correction(state, group)).pow(0.5 * power) + eps
        if "square_avg" in state:
            square = state["square_avg"].double()
            if group.get("centered"):
                square = (square - state["grad_avg"].double().square()).clamp(min=0.0)
            return square.pow(0.5) + eps
        if "sum" in state:
            root: Tensor = state["sum"].double().sqrt() + eps
            return root
    raise ValueError(
        f"the state of {type(optimizer).__name__} for parameter {name!r} is of an unknown kind "
        f"({', '.join(sorted(map(str, state)))}): there is no preconditioner in it that curvlib "
        "knows; pass its diagonal as a tensor"
    )


def _correction(state: Mapping[str, Any], group: Mapping[str, Any]) -> float:
    """``1 - beta2 ** t``; RAdam and others without a step count are taken as settled."""
    if "step" not in state or "betas" not in group:
        return 1.0
    out = 1.0 - float(group["betas"][1]) ** float(state["step"])
    return out if math.isfinite(out) and out > 0.0 else 1.0
