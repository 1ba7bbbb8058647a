r"""Hessian of any scalar function of a tensor: inputs, activations, latents."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvlib.core.digest import digest
from curvlib.core.normalization import PrimitiveNorms
from curvlib.core.operator import LinearOperator
from curvlib.operators.columns import derivative, pieces


def hessian_of(fn: Callable[[Tensor], Tensor], x: Tensor) -> LinearOperator:
    r"""The Hessian :math:`\nabla^2 f(x)` of a scalar function of one tensor, by double backward.

    The graph is built at the first product, and kept.

    Args:
        fn: Maps ``x`` to a scalar tensor.
        x: Where the Hessian is taken, of any shape; flattened in row-major order.

    Returns:
        A symmetric operator ``[x.numel(), x.numel()]``.

    Raises:
        TypeError: If ``x`` is no floating-point tensor, or ``fn`` returns no tensor.
        ValueError: If ``fn`` returns no scalar, or one that does not depend on ``x``.
        FloatingPointError: If the product is not finite.

    Example:
        >>> import torch, curvlib as cl
        >>> A = cl.hessian_of(lambda z: (z**3).sum(), torch.tensor([1.0, 2.0]))
        >>> A.to_dense().tolist()
        [[6.0, 0.0], [0.0, 12.0]]
    """
    if not callable(fn):
        raise TypeError(f"fn= needs a function of one tensor, got {type(fn).__name__}")
    kind = getattr(x, "dtype", type(x).__name__)
    if kind not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"x= needs a real floating-point tensor, got {kind}")
    leaf = x.detach().clone().requires_grad_()
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    graph: list[Tensor] = []

    def gradient() -> Tensor:
        if not graph:
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                value = fn(leaf)
                if not torch.is_tensor(value):
                    raise TypeError(f"fn should return a scalar tensor, got {type(value).__name__}")
                if value.ndim != 0:
                    raise ValueError(
                        f"fn should return a scalar, got shape {list(value.shape)}; "
                        "reduce it with .sum() or .mean()"
                    )
                if not value.requires_grad:
                    raise ValueError(
                        "fn(x) does not depend on x, or was detached from it; "
                        "compute it from the argument, without torch.no_grad()"
                    )
                (g,) = torch.autograd.grad(value, leaf, create_graph=True)
                graph.append(g)
        return graph[0]

    def with_graph(columns: Tensor) -> Tensor:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), PrimitiveNorms():
            y = x if x.requires_grad else leaf
            (g,) = torch.autograd.grad(fn(y), y, create_graph=True)
            parts = [
                torch.autograd.grad(g, y, c.reshape(y.shape).to(y.dtype), create_graph=True)[0]
                for c in columns.mT
            ]
        return torch.stack([p.reshape(-1).to(dtype) for p in parts], dim=1)

    def product(columns: Tensor) -> Tensor:
        g = gradient()
        out = columns.new_zeros(columns.shape[::-1]).mT
        if g.requires_grad:  # else fn is linear
            for piece in pieces(columns.shape[1], columns.shape[1]):
                vectors = columns[:, piece].mT.reshape(-1, *leaf.shape).to(leaf.dtype)
                (part,) = derivative([g], [leaf], [vectors], retain_graph=True)
                if part is not None:
                    out[:, piece] = part.reshape(part.shape[0], -1).mT
        if not bool(torch.isfinite(out).all()):
            raise FloatingPointError(
                "the Hessian product of fn at x is not finite; fn has no finite second derivative "
                "there (a root or a norm at zero), or overflows"
            )
        return out

    return LinearOperator(
        product,
        (x.numel(), x.numel()),
        dtype=dtype,
        device=x.device,
        symmetric=True,
        name=f"Hessian of {getattr(fn, '__name__', type(fn).__name__)}",
        identity=lambda: digest([leaf]),
        differentiable=with_graph,
    )
