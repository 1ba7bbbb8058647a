"""Sampled labels of a model that trains, and their scores at its layers' outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvlib.core.content_numbers import content_uniform
from curvlib.core.linear_cross_entropy import needs_logits
from curvlib.core.loss import Loss
from curvlib.operators.labels import label_scores
from curvlib.operators.loss_hessian import class_axis


def require_terms(loss: Loss | None) -> None:
    """Raises ValueError (or TypeError) unless a loss's terms are known from the model's output."""
    if loss is not None and not loss.known:
        raise ValueError(
            f"the loss {loss.describe()} is none whose terms curvlib knows; use cross-entropy, "
            "NLL, MSE or BCE-with-logits, or leave loss= out: examples are counted then"
        )
    if loss is not None and loss.linear is not None:
        raise needs_logits("loss=")
    if loss is not None and (loss.weight is not None or loss.pos_weight is not None):
        raise ValueError(
            "loss= has weights of classes or elements, and the targets that would say which "
            "apply are not seen by hooks; leave loss= out (with fisher='empirical')"
        )


def require_samplable(loss: Loss | None) -> None:
    """Raises ValueError unless labels can be drawn from the model's output."""
    if loss is None:
        raise ValueError(
            "labels are drawn from the distribution that the loss reads into the model's output; "
            "pass loss=nn.CrossEntropyLoss() or alike, or use fisher='empirical'"
        )


def pulled_back(
    loss: Loss,
    output: Tensor,
    arrived: tuple[Tensor, Tensor],
    edges: Sequence[GradientEdge],
    *,
    content: Any,
    examples: int,
    seed: str,
    sampled: bool,
) -> tuple[Tensor, list[Tensor | None] | None]:
    """Terms of the loss; and the scores of sampled labels at some edges of the graph.

    Args:
        loss: Of the kinds that curvlib knows.
        output: What it reads.
        arrived: A tensor that the model returned, and its gradient by the user's loss.
        edges: Of the graph.
        content: What went into the model.
        examples: How many examples there are.
        seed: Of the labels.
        sampled: Whether to sample.

    Returns:
        ``W``, float64 ``[]``; gradients at the edges of the sum of the terms of sampled labels.

    Raises:
        ValueError: If the gradient is not one of the loss.
    """
    gradient = _fitting(output, *arrived)
    axis = class_axis(output)
    if loss.kind == "cross_entropy" and gradient is not None and output.ndim > 2:
        axis = _classes(gradient)
    valid = None
    if not loss.categorical:
        terms = torch.tensor(float(output.numel()), dtype=torch.float64, device=output.device)
    elif gradient is None:
        count = output.numel() // output.shape[axis]
        terms = torch.tensor(float(count), dtype=torch.float64, device=output.device)
    else:
        valid = (gradient != 0).any(axis, keepdim=True)
        terms = valid.sum(dtype=torch.float64)
    if not sampled or not edges:
        return terms, [] if sampled else None
    with torch.no_grad():
        scores = _scores(loss, output.detach(), axis, content, examples, seed)
        scores = scores if valid is None else scores * valid
    found = torch.autograd.grad(
        [output], edges, [scores.to(output.dtype)], retain_graph=True, allow_unused=True
    )
    return terms, list(found)


def _scores(
    loss: Loss, output: Tensor, axis: int, content: Any, examples: int, seed: str
) -> Tensor:
    wide = output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
    moved = wide.movedim(axis, class_axis(wide)) if loss.categorical else wide

    def uniform(shape: torch.Size) -> Tensor:
        return content_uniform(content, examples, seed, shape)[None].to(output.device)

    scores = label_scores(loss, moved, uniform)[0]
    return scores.movedim(class_axis(wide), axis) if loss.categorical else scores


def _fitting(output: Tensor, arrived: Tensor, gradient: Tensor) -> Tensor | None:
    """The gradient in the output's shape, where the output is the tensor, or flattens it."""
    if arrived.shape == output.shape:
        return gradient.detach()
    same = arrived.numel() == output.numel() and arrived.shape[-1:] == output.shape[-1:]
    return gradient.detach().reshape(output.shape) if same else None


def _classes(gradient: Tensor) -> int:
    """Axis of the classes, along which gradients of cross-entropy add up to zero."""
    size = float(torch.linalg.vector_norm(gradient.float()))
    for axis in (1, gradient.ndim - 1):
        total = float(torch.linalg.vector_norm(gradient.float().sum(axis)))
        if total <= 0.02 * size * math.sqrt(gradient.shape[axis]):
            return axis
    raise ValueError(
        f"the gradient at the model's output of shape {list(gradient.shape)} is not one of "
        "cross-entropy, neither with classes along axis 1 nor along the last; pass the loss that "
        "is minimized as loss=, and output= where it reads something else than the model returns"
    )
