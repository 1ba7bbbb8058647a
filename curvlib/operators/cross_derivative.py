r"""Mixed second derivatives of a function of two tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvlib.core.digest import digest
from curvlib.core.operator import LinearOperator
from curvlib.operators.columns import derivative, pieces

#: A scalar function of two tensors, such as parameters and hyperparameters.
Function = Callable[[Tensor, Tensor], Tensor]

_REAL = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def first_derivatives(
    fn: Function, theta: Tensor, hyper: Tensor, name: str = "fn"
) -> tuple[Tensor, Tensor]:
    r"""Gradients of a scalar function of two tensors, flat.

    Args:
        fn: Maps ``(theta, hyper)`` to a scalar tensor.
        theta: The first tensor, of any shape.
        hyper: The second one.
        name: What errors call the function.

    Returns:
        :math:`\partial f / \partial \theta` ``[P]`` and :math:`\partial f / \partial \lambda`
        ``[L]``, in the dtype of vectors of each; zeros where ``fn`` does not depend on it.

    Raises:
        TypeError: If a tensor is not of a real floating-point type, or ``fn`` returns no tensor.
        ValueError: If ``fn`` returns no scalar, or one that depends on neither.
        FloatingPointError: If a gradient is not finite.

    Example:
        >>> one = torch.ones(2)
        >>> [g.tolist() for g in first_derivatives(lambda t, h: (t * h * h).sum(), one, 3 * one)]
        [[9.0, 9.0], [6.0, 6.0]]
    """
    leaves = _leaves(theta, hyper)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        value = _scalar(fn, leaves, name)
        found = torch.autograd.grad(value, leaves, allow_unused=True)
    out = []
    for what, leaf, part in zip(("theta", "hyper"), leaves, found, strict=True):
        g = torch.zeros_like(leaf) if part is None else part  # type: ignore[redundant-expr]  # allow_unused
        if not bool(torch.isfinite(g).all()):
            raise FloatingPointError(
                f"the gradient of {name} with respect to {what} is not finite at this point"
            )
        out.append(g.detach().reshape(-1).to(_vector_dtype(leaf)))
    return out[0], out[1]


def cross_derivative(fn: Function, theta: Tensor, hyper: Tensor) -> LinearOperator:
    r"""The operator :math:`\partial^2 f / \partial \lambda\, \partial \theta^\top`, ``[L, P]``.

    Its product with ``v`` is :math:`\nabla_\lambda (v^\top \nabla_\theta f)`, that of its
    transpose with ``u`` is :math:`\nabla_\theta (u^\top \nabla_\lambda f)`; both by double
    backward over one kept graph.

    Args:
        fn: Maps ``(theta, hyper)`` to a scalar tensor.
        theta: :math:`\theta`, of any shape, flattened in row-major order.
        hyper: :math:`\lambda`, likewise, in vectors of the same dtype and on the same device.

    Raises:
        TypeError: If a tensor is not of a real floating-point type, the two differ in dtype, or
            ``fn`` returns no tensor.
        ValueError: If ``fn`` returns no scalar or one that depends on neither, or devices differ.
        FloatingPointError: If the product is not finite.

    Example:
        >>> theta, hyper = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
        >>> cross_derivative(lambda t, h: (h * t.square()).sum(), theta, hyper).to_dense().tolist()
        [[2.0, 4.0]]
    """
    leaves = _leaves(theta, hyper)
    dtype = _vector_dtype(leaves[0])
    if _vector_dtype(leaves[1]) != dtype:
        raise TypeError(
            f"expected theta and hyper of one type, got {theta.dtype} and {hyper.dtype}; convert "
            "one with .to(...)"
        )
    if theta.device != hyper.device:
        raise ValueError(
            f"expected theta and hyper on one device, got {theta.device} and {hyper.device}; "
            "use .to(...)"
        )
    graph: list[Tensor | None] = []

    def gradients() -> list[Tensor | None]:
        if not graph:
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                value = _scalar(fn, leaves, "fn")
                graph.extend(
                    torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
                )
        return graph

    def product(columns: Tensor, source: int, target: int) -> Tensor:
        g = gradients()[source]
        leaf = leaves[target]
        out = columns.new_zeros((columns.shape[1], leaf.numel())).mT
        if g is not None and g.requires_grad:  # else the mixed derivative is zero
            for piece in pieces(columns.shape[1], columns.shape[1]):
                vectors = columns[:, piece].mT.reshape(-1, *g.shape).to(g.dtype)
                (part,) = derivative([g], [leaf], [vectors], retain_graph=True)
                if part is not None:
                    out[:, piece] = part.reshape(part.shape[0], -1).mT
        if not bool(torch.isfinite(out).all()):
            raise FloatingPointError(
                "the product with the mixed second derivative of fn is not finite; fn has no "
                "finite second derivative there, or overflows"
            )
        return out

    return LinearOperator(
        lambda V: product(V, 0, 1),
        (hyper.numel(), theta.numel()),
        dtype=dtype,
        device=theta.device,
        rmatmat=lambda U: product(U, 1, 0),
        name=f"mixed derivative of {getattr(fn, '__name__', type(fn).__name__)}",
        identity=lambda: digest(leaves),
    )


def _leaves(theta: Any, hyper: Any) -> list[Tensor]:
    for name, tensor in (("theta", theta), ("hyper", hyper)):
        kind = getattr(tensor, "dtype", type(tensor).__name__)
        if kind not in _REAL:
            raise TypeError(f"{name}= needs a real floating-point tensor, got {kind}")
    return [t.detach().clone().requires_grad_() for t in (theta, hyper)]


def _vector_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _scalar(fn: Function, leaves: list[Tensor], name: str) -> Tensor:
    if not callable(fn):
        raise TypeError(f"{name}= needs a function of two tensors, got {type(fn).__name__}")
    value: Any = fn(leaves[0], leaves[1])
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} should return a scalar tensor, got {type(value).__name__}")
    if value.ndim != 0:
        raise ValueError(
            f"{name} should return a scalar, got shape {list(value.shape)}; "
            "reduce it with .sum() or .mean()"
        )
    if not value.requires_grad:
        raise ValueError(
            f"{name}(theta, hyper) depends on neither, or was detached from them; compute it from "
            "its arguments, without torch.no_grad()"
        )
    return value
