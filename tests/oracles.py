"""Dense matrices by the plainest route there is, in float64, sharing no code with curvlib.

Everything starts from a :class:`tests.cases.Case`: torch's own loss on the concatenated data.
Never ``torch.func.hessian``: it is silently wrong through LayerNorm and BatchNorm (pytorch#198017).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.autograd.functional import hessian as autograd_hessian
from torch.autograd.functional import jacobian as autograd_jacobian
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.cases import Case, build


def parameters(case: Case) -> Tensor:
    """The selected parameters, flat, in the order of ``named_parameters``."""
    return torch.cat([p.detach().reshape(-1) for p in case.selected().values()])


def outputs_at(case: Case) -> Callable[[Tensor], Tensor]:
    """Outputs for the whole data set, as a function of the flat parameters."""
    selected = case.selected()

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = case.model

        def forward(self) -> Tensor:
            return case.outputs(self.model)

    whole = Whole()

    def function(theta: Tensor) -> Tensor:
        parts = torch.split(theta, [p.numel() for p in selected.values()])
        named = {
            f"model.{name}": part.view(p.shape)
            for (name, p), part in zip(selected.items(), parts, strict=True)
        }
        buffers = {f"model.{n}": b.clone() for n, b in case.model.named_buffers()}
        with sdpa_kernel(SDPBackend.MATH):
            return functional_call(whole, named | buffers, ())

    return function


def value_at(case: Case) -> Callable[[Tensor], Tensor]:
    outputs = outputs_at(case)
    return lambda theta: case.truth.objective(outputs(theta), case.truth.targets)


# --------------------------------------------------------------- first derivatives
def gradient(case: Case) -> Tensor:
    theta = parameters(case).requires_grad_()
    return torch.autograd.grad(value_at(case)(theta), theta)[0]


def jacobian(case: Case) -> Tensor:
    """``[number of outputs, P]``, rows in the row-major order of the outputs."""
    theta = parameters(case)
    rows = autograd_jacobian(outputs_at(case), theta)
    return rows.reshape(-1, theta.numel())


def gradient_rows(case: Case) -> Tensor:
    """``[N, P]``: gradients of each example's summed loss terms, by a loop over examples."""
    outputs, truth = outputs_at(case), case.truth
    theta = parameters(case).requires_grad_()
    out = outputs(theta)
    rows = []
    for n in range(out.shape[0]):
        alone = truth.terms(out[n : n + 1], truth.targets[n : n + 1])
        rows.append(torch.autograd.grad(alone, theta, retain_graph=True)[0])
    return torch.stack(rows)


def gradient_rows_alone(case: Case) -> Tensor:
    """The same, from forward passes that see one example only."""
    rows = []
    for n in range(case.truth.targets.shape[0]):
        params = list(case.selected().values())
        was = [p.requires_grad for p in params]
        for p in params:
            p.requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):
            out = case.single(case.model, n)
        loss = case.truth.terms(out, case.truth.targets[n : n + 1])
        grads = torch.autograd.grad(loss, params, allow_unused=True)
        for p, flag in zip(params, was, strict=True):
            p.requires_grad_(flag)
        flat = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]
        rows.append(torch.cat([g.reshape(-1) for g in flat]))
    return torch.stack(rows)


# -------------------------------------------------------------- second derivatives
def hessian(case: Case) -> Tensor:
    return autograd_hessian(value_at(case), parameters(case))


def hessian_columns_by_differences(case: Case, directions: Tensor, step: float = 1e-4) -> Tensor:
    """``H @ directions`` from gradients at four shifted points: error ``O(step**4)``."""
    columns = []
    theta = parameters(case)
    value = value_at(case)

    def slope(at: Tensor) -> Tensor:
        at = at.detach().requires_grad_()
        return torch.autograd.grad(value(at), at)[0]

    for v in directions.T:
        h = step / float(v.norm())
        near = slope(theta + h * v) - slope(theta - h * v)
        far = slope(theta + 2 * h * v) - slope(theta - 2 * h * v)
        columns.append((8 * near - far) / (12 * h))
    return torch.stack(columns, 1)


def output_hessian(case: Case) -> Tensor:
    """Curvature of the loss in the outputs, ``[outputs, outputs]``.

    For NLL the outputs are log-probabilities and the curvature is that of the categorical
    distribution, ``diag(p) - p p'``: its product with Jacobians is the cross-entropy's GGN.
    """
    truth = case.truth
    out = outputs_at(case)(parameters(case)).detach()
    if truth.kind == "nll":
        return _categorical(out.exp(), truth.weights / truth.divisor)
    size = out.numel()
    return autograd_hessian(lambda o: truth.objective(o, truth.targets), out).reshape(size, size)


def ggn(case: Case) -> Tensor:
    J = jacobian(case)
    return J.T @ output_hessian(case) @ J


def empirical_fisher(case: Case) -> Tensor:
    rows = gradient_rows(case)
    return rows.T @ rows / case.truth.divisor


def type2_fisher(case: Case) -> Tensor:
    """Enumerates the labels of each loss term, weighted by the model's probabilities."""
    truth = case.truth
    out = outputs_at(case)(parameters(case)).detach()
    J = jacobian(case).reshape(*out.shape, -1)
    total = torch.zeros(J.shape[-1], J.shape[-1], dtype=J.dtype)
    if truth.kind in {"ce", "nll"}:  # channels last: [terms, C, P]
        J = J.movedim(1, -2).flatten(0, -3)
        logits = out.movedim(1, -1).flatten(0, -2)
        for rows, z, count in zip(J, logits, truth.weights.flatten(), strict=True):
            p = z.softmax(0)
            for label in range(len(z)):
                score = rows[label] - p @ rows  # gradient of log p_label
                if truth.kind == "nll":
                    score = rows[label]
                total += count * p[label] * torch.outer(score, score)
    elif truth.kind == "bce":
        counts = truth.weights.expand(out.shape).flatten()
        for row, z, count in zip(J.flatten(0, -2), out.flatten(), counts, strict=True):
            p = torch.sigmoid(z)
            for label, chance in ((1.0, p), (0.0, 1 - p)):
                score = (label - p) * row
                total += count * chance * torch.outer(score, score)
    else:
        raise ValueError(truth.kind)
    return total / truth.divisor


def _categorical(p: Tensor, counts: Tensor) -> Tensor:
    """``counts * (diag(p) - p p')`` for each term; classes on axis 1 of ``p``."""
    n, size = p.shape[0], p.numel()
    dense = torch.zeros(size, size, dtype=p.dtype)
    where = torch.arange(size).reshape(p.shape).movedim(1, -1).reshape(-1, p.shape[1])
    rows = p.movedim(1, -1).reshape(-1, p.shape[1])
    assert counts.numel() * p.shape[1] == size
    assert n == counts.shape[0]
    for index, q, count in zip(where, rows, counts.flatten(), strict=True):
        dense[index[:, None], index[None]] = count * (torch.diag(q) - torch.outer(q, q))
    return dense


MATRICES: dict[str, Callable[[Case], Tensor]] = {
    "hessian": hessian,
    "ggn": ggn,
    "empirical": empirical_fisher,
    "type2": ggn,  # equal for the known losses; test_oracles.py holds it against enumeration
    "jacobian": jacobian,
    "rows": gradient_rows,
}


@cache
def dense(kind: str, name: str, rounded: torch.dtype | None = None) -> Tensor:
    """The oracle's matrix of a row of the table; computed once, do not change it in place."""
    return MATRICES[kind](build(name, rounded=rounded))
