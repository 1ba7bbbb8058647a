r"""Cheaper second derivatives of convolutions.

The gradients of a convolution :math:`y = x * W + b` are products of two factors each, so the
derivative of :math:`(\bar y, x, W) \mapsto (\bar x, \bar W, \bar b)` along :math:`(a, A, \alpha)`
consists of convolutions and of their gradients:

.. math:: \text{at } \bar y: \; a * W + x * A + \alpha, \qquad
          \text{at } x: \; \bar x \text{ for the weight } A, \qquad
          \text{at } W: \; \bar W \text{ for the input } a .

PyTorch takes the last as a convolution whose kernel is as large as the image, which takes up to
four times as long as the kernel made for gradients of weights, and the second one also for the
model's input, where nobody asks for it. :func:`convolution_products` takes over these parts for
weights that are used once. Hooks on the nodes of the graph hand PyTorch the other parts only, so
that all else stays with autograd; results are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

_NODE = "ConvolutionBackwardBackward0"
_SETTINGS = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
_aten = torch.ops.aten

Found = dict[int, Tensor]
Triple = tuple[Tensor | None, Tensor | None, Tensor | None]


@contextmanager
def convolution_products(
    params: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> Iterator[Found]:
    """While it lasts, double backward passes through convolutions are cheaper.

    Args:
        params: Leaves that require gradients.
        gradients: Their gradients, with graphs.

    Yields:
        What a double backward pass leaves out, by number of the parameter: to be added to its
        result, and to be cleared before the next pass.

    Example:
        >>> conv, x = torch.nn.Conv1d(1, 1, 1, bias=False), torch.ones(1, 1, 3)
        >>> loss = conv(conv(x)).sum()  # 3 w^2, but the weight is used twice
        >>> first = torch.autograd.grad(loss, [conv.weight], create_graph=True)
        >>> with convolution_products([conv.weight], first) as rest:
        ...     (product,) = torch.autograd.grad(first, [conv.weight])
        >>> float(product), rest
        (6.0, {})
    """
    found: Found = {}
    handles: list[RemovableHandle] = []
    try:
        for i, (p, g) in enumerate(zip(params, gradients, strict=True)):
            node: Any = None if g is None else g.grad_fn
            if p.ndim > 2 and node is not None and node.name() == _NODE and _is_weight(p, node):
                double = _DoubleBackward(node, i, found)
                handles += [node.register_prehook(double.before), node.register_hook(double.after)]
        yield found
    finally:
        for handle in handles:  # nodes and hooks hold each other
            handle.remove()


def _is_weight(p: Tensor, node: Any) -> bool:
    """Whether a parameter is the weight of the convolution, as it is, without hooks of a user."""
    weight = node.next_functions[2][0]
    return getattr(weight, "variable", None) is p and not p._backward_hooks


class _DoubleBackward:
    """Both hooks of a node.

    Args:
        node: Of the double backward of one convolution.
        number: Of its weight among the parameters.
        found: Where contributions to the weight are added.
    """

    def __init__(self, node: Any, number: int, found: Found) -> None:
        self.node = node
        self.number = number
        self.found = found
        self.rest: Tensor | None = None

    def before(self, given: Triple) -> Triple | None:
        """Computes some parts, and leaves the others."""
        (a, A, alpha), node, self.rest = given, self.node, None
        if A is None:
            return None
        x, W = node._saved_input.detach(), node._saved_weight.detach()
        settings = [getattr(node, f"_saved_{name}") for name in _SETTINGS]
        if a is None:
            if node.next_functions[1][0] is not None or alpha is None:
                return None  # all that PyTorch does is needed, or it needs one thing to go on
            self.rest = _aten.convolution(x, A, None, *settings)
            return None, None, alpha
        self.rest = _aten.convolution(a, W, None, *settings)
        own = _aten.convolution_backward(
            node._saved_grad_output.detach(), a, W, None, *settings, [False, True, False]
        )[1]
        known = self.found.get(self.number)
        self.found[self.number] = own if known is None else known + own
        return None, A, alpha

    def after(self, results: Triple, _: Triple) -> Triple | None:
        """Adds what belongs to the output's gradient."""
        rest, self.rest = self.rest, None
        if rest is None or results[0] is None:  # the latter is not asked for
            return None
        return results[0] + rest, *results[1:]
