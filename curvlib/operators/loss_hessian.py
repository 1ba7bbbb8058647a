r"""Hessians of losses with respect to the model's output.

The closed forms of the sums of loss terms (no reduction), for columns ``[K, *output.shape]``;
:math:`a` are the weights of the terms (class weights, masks, smoothing):

================  ============================================================
cross-entropy     :math:`a \, (\operatorname{diag} p - p p^T)`, ``p = softmax(output)``
NLL               the same with ``p = exp(output)``: see below
MSE               :math:`2 I`
BCE-with-logits   :math:`a \, \sigma (1 - \sigma)`, ``sigma = sigmoid(output)``
================  ============================================================

The Hessian of the negative log-likelihood in the *log-probabilities* themselves is zero, and so
would be its GGN. What users mean is the curvature in the logits behind them; since the log-softmax
is idempotent, that is the categorical curvature above, pulled back through the log-probabilities.
Any other loss is differentiated twice with respect to the output by autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from curvlib.core.batch import Batch
from curvlib.core.chunked_logits import Logits
from curvlib.core.data import describe
from curvlib.core.linear_cross_entropy import needs_logits
from curvlib.core.loss import Loss
from curvlib.operators.columns import derivative

#: Maps columns ``[K, *output.shape]`` to columns of the same shape.
Curvature = Callable[[Tensor], Tensor]


def loss_hessian(batch: Batch, output: Tensor) -> Curvature:
    """Product with the Hessian of one batch's summed loss terms in the (detached) output."""
    loss = batch.risk.loss
    if loss.known:
        return expected_hessian(loss, output, batch.target)
    leaf = output.detach().requires_grad_()
    value = batch.total(leaf)
    gradient = (
        torch.autograd.grad(value, leaf, create_graph=True, allow_unused=True)[0]
        if value.requires_grad
        else None
    )
    if gradient is None:
        raise ValueError(
            f"the loss of batch {batch.index} does not depend on the model's output, which "
            f"{loss.describe()} gets as its first argument; for a model that computes its own "
            "loss, let forward= return the logits"
        )
    if not gradient.requires_grad:  # the loss is linear in the output
        return torch.zeros_like

    def product(columns: Tensor) -> Tensor:
        (out,) = derivative([gradient], [leaf], [columns], retain_graph=True)
        return torch.zeros_like(columns) if out is None else out

    return product


def expected_hessian(loss: Loss, output: Tensor, target: Tensor) -> Curvature:
    """The closed form of a known loss: its Hessian, and its Fisher information (type-2)."""
    output = loss.readable(output, target).detach()
    if loss.kind == "mse":
        return lambda columns: 2.0 * columns
    weight = term_weights(loss, output, target)
    if loss.kind == "bce_with_logits":
        p = output.sigmoid()
        diagonal = weight * p * (1.0 - p)
        return lambda columns: columns * diagonal
    p = probabilities(loss, output)
    axis = class_axis(output) + 1

    def product(columns: Tensor) -> Tensor:
        scaled = columns * p
        scaled.addcmul_(p.expand_as(scaled), scaled.sum(axis, keepdim=True), value=-1.0)
        return scaled.mul_(weight)

    return product


def term_weights(loss: Loss, output: Tensor, target: Tensor) -> Tensor:
    """Weight ``a`` of each loss term, broadcastable to the output (classes kept as one axis)."""
    if loss.kind == "mse":
        return torch.ones_like(output)
    if loss.kind == "bce_with_logits":
        weight = torch.ones_like(output) if loss.weight is None else loss.weight.to(output)
        if loss.pos_weight is not None:
            weight = weight * (1.0 + (loss.pos_weight.to(output) - 1.0) * target)
        return weight.expand_as(output)
    axis = class_axis(output)
    classes = output.shape[axis]
    each = (
        torch.ones(classes, dtype=output.dtype, device=output.device)
        if loss.weight is None
        else loss.weight.to(output)
    )
    smooth = loss.label_smoothing
    if target.is_floating_point():
        mixed = (1.0 - smooth) * target + smooth / classes
        shape = [classes if d == axis else 1 for d in range(output.ndim)]
        return (mixed * each.view(shape)).sum(axis, keepdim=True)
    valid = target != loss.ignore_index
    weight = (1.0 - smooth) * each[target.where(valid, 0)] + smooth * each.mean()
    return (weight * valid).unsqueeze(axis)


def class_axis(output: Tensor) -> int:
    """Axis of the classes: 1, or 0 for the output of a single example."""
    return 0 if output.ndim == 1 else 1


def probabilities(loss: Loss, output: Tensor) -> Tensor:
    """Class probabilities of a categorical loss.

    Raises:
        ValueError: If the output of an NLL loss is not log-probabilities.
    """
    axis = class_axis(output)
    if loss.kind == "cross_entropy":
        return output.softmax(axis)
    p = output.exp()
    gap = float((p.sum(axis) - 1.0).abs().max()) if p.numel() else 0.0
    if not gap <= 1e-2:
        raise ValueError(
            f"NLL needs log-probabilities, but exp(output) sums to 1 only within {gap:.3g}; "
            "end the model with log_softmax, or use cross-entropy on its logits"
        )
    return p


def tensor_output(
    batch: Batch, params: Mapping[str, Tensor] | None = None, *, hidden: bool = False
) -> Tensor:
    """The model's output, which a Gauss-Newton product needs as one tensor with a graph.

    Args:
        batch: The batch.
        params: Tensors that take the parameters' places, by name.
        hidden: Whether what a head gets will do, where the loss owns the head.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If it does not depend on the selected parameters.
    """
    output, headed = batch.output(params), False
    if isinstance(output, Logits):
        if not hidden:
            raise needs_logits("a derivative of the model's outputs")
        headed = output.weight.requires_grad or (
            output.bias is not None and output.bias.requires_grad
        )
        output = output.hidden
    if not isinstance(output, Tensor):
        raise TypeError(
            "Gauss-Newton products need the output as one tensor, but the model returned "
            f"{describe(output)}; pass forward=lambda model, batch: model(**batch).logits or alike"
        )
    if not (output.requires_grad or headed or batch.risk.is_part):
        raise ValueError(
            "the model's output does not depend on the selected parameters, or was detached; "
            "check forward= and params="
        )
    return output
