r"""Derivatives of a live loss: a scalar that a training loop has just computed, with its graph.

Operators evaluate a risk over data. An optimizer has one loss tensor :math:`L(\theta)` of the
present batch instead, whose graph is used once and freed. The gradient and the products

.. math:: g = \nabla_\theta L, \qquad
          H z = \nabla_\theta \langle \nabla_\theta L, z \rangle

come from one backward pass with a graph and one double backward per vector (Pearlmutter, "Fast
exact multiplication by the Hessian", 1994): work of 3 gradients for the first product, and no
reference cycle, which ``loss.backward(create_graph=True)`` leaves behind.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from curvlib.core.exhausted import is_exhausted
from curvlib.operators.conv_products import convolution_products
from curvlib.operators.graphs import once_differentiable, reentrant


def require_live(loss: object, origin: str = "the loss") -> Tensor:
    """The loss, if it is a scalar with a graph.

    Args:
        loss: What a user gave.
        origin: Where it came from, for the message.

    Raises:
        TypeError: If it is no real floating-point tensor.
        ValueError: If it is no scalar, or has no graph.
    """
    if not isinstance(loss, Tensor):
        hint = "; does the function lack a return statement?" if loss is None else ""
        raise TypeError(
            f"{origin} should be a scalar tensor with a graph, got {type(loss).__name__}{hint}"
        )
    if not loss.is_floating_point():
        raise TypeError(f"{origin} should be a real floating-point scalar, got {loss.dtype}")
    if loss.numel() != 1:
        raise ValueError(
            f"{origin} should be a scalar, got shape {list(loss.shape)}; reduce it with .mean() "
            "or .sum()"
        )
    if not loss.requires_grad:
        raise ValueError(
            f"{origin} has no graph, so it has no gradient; compute it from parameters that "
            "require gradients, outside torch.no_grad() and without .detach() or .item()"
        )
    return loss


def accumulate_gradient(loss: Tensor) -> None:
    """``loss.backward()``: adds the gradient to ``.grad`` of all leaves, and frees the graph.

    Raises:
        RuntimeError: If the graph was freed before; the message says what to do.
    """
    with _explaining():
        loss.backward()


def gradient(
    loss: Tensor, params: Sequence[Tensor], *, keep_graph: bool = False
) -> list[Tensor | None]:
    """The gradient of a live loss.

    Args:
        loss: A scalar with its graph.
        params: Leaves that require gradients.
        keep_graph: Whether the graph is used again afterwards.

    Returns:
        For each parameter a tensor of its shape, or ``None`` where the loss does not use it.

    Raises:
        RuntimeError: If the graph was freed before, or has parts under reentrant checkpointing;
            the message says what to do.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> gradient((w**3).sum(), [w])
        [tensor([ 3., 12.])]
    """
    if not params:
        return []
    with _explaining():
        found = torch.autograd.grad(loss, params, retain_graph=keep_graph, allow_unused=True)
    require_whole(loss, found)
    return list(found)


def require_whole(loss: Tensor, gradients: Sequence[Tensor | None]) -> None:
    """Raises if gradients are absent since parts of the graph are built in the backward pass.

    Args:
        loss: Where the graph begins.
        gradients: Of some parameters.

    Raises:
        RuntimeError: If there is reentrant checkpointing in the graph.
    """
    if any(g is None for g in gradients) and reentrant(loss):
        raise RuntimeError(
            "parts of the model are under reentrant checkpointing, where gradients are known to "
            "loss.backward() alone; use torch.utils.checkpoint.checkpoint(..., "
            "use_reentrant=False)"
        )


def gradient_and_products(
    loss: Tensor,
    params: Sequence[Tensor],
    vectors: Sequence[Sequence[Tensor]],
    *,
    keep_graph: bool = False,
    verify: bool = True,
    scale: float = 1.0,
) -> tuple[list[Tensor | None], list[list[Tensor | None]]]:
    """The gradient of a live loss, and its Hessian times vectors.

    Args:
        loss: A scalar with its graph.
        params: Leaves that require gradients.
        vectors: Vectors to multiply; each is one tensor per parameter, of its shape.
        keep_graph: Whether the graph of ``loss`` is used again afterwards; otherwise all of it
            that products pass through is freed.
        verify: Whether the graph is searched for functions marked ``@once_differentiable``, whose
            second derivatives PyTorch leaves out silently (some microseconds per operation; the
            first batch of a training run is enough).
        scale: What the loss was multiplied by. Products are those of the loss without it; in
            between, they are multiplied by its root, since with all of it half precision
            overflows sooner than the gradient does.

    Returns:
        The gradient (one tensor per parameter, detached; ``None`` where the loss does not use it),
        and for each vector its product (``None`` where the gradient does not depend on the
        parameter). Gradients and products of sparse parameters are dense.

    Raises:
        RuntimeError: If an operation has no second derivative, or the graph was freed or its
            tensors changed, or parts of it are checkpointed the reentrant way; the message names
            it and the way out.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> gradient_and_products((w**3).sum(), [w], [[torch.tensor([1.0, -1.0])]])
        ([tensor([ 3., 12.])], [[tensor([  6., -12.])]])
    """
    if not params:
        return [], [[] for _ in vectors]
    factor = 2.0 ** -round(0.5 * math.log2(scale))
    with _explaining(second=True), torch.enable_grad():
        first: Sequence[Tensor | None] = torch.autograd.grad(
            loss, params, create_graph=True, allow_unused=True
        )
        live = [(i, _dense(g)) for i, g in enumerate(first) if g is not None and g.requires_grad]
    require_whole(loss, first)
    if verify:
        _require_second([g for _, g in live])
    products: list[list[Tensor | None]] = []
    with convolution_products(params, first) as rest:
        for k, vector in enumerate(vectors):
            parts: Sequence[Tensor | None] = [None] * len(params)
            if live:  # else the loss is linear in the parameters
                with _explaining(second=True):
                    parts = torch.autograd.grad(
                        [g for _, g in live],
                        params,
                        [_times(vector[i].to(g.dtype), factor) for i, g in live],
                        retain_graph=keep_graph or k + 1 < len(vectors),
                        allow_unused=True,
                    )
            own = [None if p is None else _dense(p).detach() for p in parts]
            for i, part in rest.items():
                known = own[i]
                own[i] = part if known is None else known + part
            rest.clear()
            products.append([None if p is None else _times(p, 1.0 / (scale * factor)) for p in own])
    gradients = [None if g is None else _dense(g.detach()) for g in first]
    return gradients, products


def _require_second(gradients: Sequence[Tensor]) -> None:
    if once_differentiable(gradients):
        raise RuntimeError(
            "the model uses an autograd function marked @once_differentiable, so its gradient has "
            "no derivative (PyTorch would silently leave terms out); write its backward with "
            "differentiable operations and drop the mark, or use an optimizer that needs first "
            "derivatives only (M-FAC, K-FAC, MKOR)"
        )


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1.0 else tensor * factor


def _dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.layout != torch.strided else tensor


@contextmanager
def _explaining(*, second: bool = False) -> Iterator[None]:
    """Turns PyTorch's errors into ones that say what to do.

    Errors of other kinds go on as they are, or (``second``) are said to be of second derivatives.
    """
    try:
        yield
    except RuntimeError as error:
        if is_exhausted(error):
            raise
        told = _explained(str(error))
        if told is None and second:
            told = RuntimeError(
                f"the gradient of the loss cannot be differentiated again: {error}; find the "
                "operation with torch.autograd.set_detect_anomaly(True), or use an optimizer that "
                "needs first derivatives only (M-FAC, K-FAC, MKOR)"
            )
        if told is None:
            raise
        raise told from error


def _explained(text: str) -> RuntimeError | None:
    """The error that says which operation has no second derivative, and the way out."""
    if "second time" in text or "already been freed" in text:
        return RuntimeError(
            "the graph of the loss was freed before: backward() was called on it already; pass the "
            "loss to the optimizer first, or let it call backward (opt.backward(loss), or "
            "opt.step(closure) with a closure that returns the loss and calls no backward)"
        )
    if "modified by an inplace operation" in text:
        return RuntimeError(
            "tensors in the graph of the loss changed since the forward pass (a step of another "
            "optimizer in between, or an in-place operation of the model); compute the loss anew "
            f"before the curvature is taken. PyTorch says: {text}"
        )
    if "aot_autograd" in text:
        return RuntimeError(
            "the model is compiled, and compiled functions have no double backward; use the "
            "uncompiled module for steps that read curvature (model._orig_mod), or an optimizer "
            "that needs first derivatives only (M-FAC, K-FAC, MKOR)"
        )
    found = re.search(r"derivative for '?(?:aten::)?(\w+)'? is not implemented", text)
    if found:
        operation = found.group(1)
        return RuntimeError(
            f"the operation {operation!r} in the graph of the loss has no double backward, which "
            f"Hessian products need; {_way_out(operation)}"
        )
    return None


def _way_out(operation: str) -> str:
    if "attention" in operation:
        return (
            "run the forward pass under torch.nn.attention.sdpa_kernel(SDPBackend.MATH), whose "
            "attention has one"
        )
    if "cudnn" in operation:
        return (
            "run the forward pass under torch.backends.cudnn.flags(enabled=False), whose "
            "recurrent layers have one"
        )
    return (
        "replace it by operations that have one, or use an optimizer that needs first "
        "derivatives only (M-FAC, K-FAC, MKOR)"
    )
