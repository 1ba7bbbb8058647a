r"""The likelihoods that a live loss is made of, read from its graph.

A training loop has a scalar loss with its graph, and no more. The likelihoods are the last
nonlinear operations on the way to it:

===========================  ====================================  ==============================
operation                    loss terms                            Hessian in the prediction
===========================  ====================================  ==============================
``log_softmax``              :math:`-\sum_c q_c \log p_c`          :math:`(\sum_c q_c)
                                                                   (\operatorname{diag} p - pp^T)`
``mse_loss``, ``x ** 2``     :math:`w (f - y)^2`                   :math:`2 w`
``bce_with_logits``          :math:`w\, \ell(f, y)`                :math:`w\, \sigma (1 - \sigma)`
===========================  ====================================  ==============================

All that lies between them and the loss must be linear: means, sums, class weights, masks, ignored
targets, label smoothing, a loss divided by the number of micro-batches, a loss scale. The weights
:math:`q` and ``w`` are then the derivatives of the loss by ``log p`` and by the square: whatever
normalization a user has, the curvature is that of his loss.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

#: Operations that are linear in what requires a gradient, if only one of their inputs does; and
_LINEAR = frozenset(
    {"Alias", "Clone", "Copy", "Div", "Dot", "Expand", "Gather", "Index", "IndexSelect", "Inner"}
    | {"Linear", "MaskedFill", "MaskedSelect", "Mean", "Mul", "Mv", "Nansum", "Neg", "NllLoss"}
    | {"NllLoss2D", "Permute", "Reshape", "ReshapeAlias", "Select", "Slice", "Split", "Squeeze"}
    | {"SplitWithSizes", "Sum", "T", "Take", "ToCopy", "Transpose", "Unbind", "UnsafeView"}
    | {"Unsqueeze", "View"}
)
#: those that are linear in all of them together.
_SUMS = frozenset({"Add", "Cat", "Rsub", "Stack", "Sub", "Where"})


@dataclass(frozen=True, eq=False)
class Likelihood:
    """Loss terms of one kind, as one operation of the graph makes them.

    Attributes:
        kind: ``"nll"``, ``"mse"`` or ``"bce_with_logits"``: see :mod:`curvlib.operators.labels`.
        output: What the terms are functions of (log-probabilities for ``"nll"``, classes along
            axis 1, or 0 if one-dimensional), detached, in float32 or float64.
        weight: Of each term in the loss, not negative, broadcastable to ``output``.
        axis: Where the classes are in the graph.
        edges: Where cotangents of the output enter the graph, each with its sign.
        dtype: Type of the cotangents there.
    """

    kind: str
    output: Tensor
    weight: Tensor
    axis: int | None
    edges: tuple[tuple[GradientEdge, float], ...]
    dtype: torch.dtype

    def cotangent(self, score: Tensor) -> Tensor:
        """A score in the shape of ``output``, in the layout and type of the graph."""
        if self.axis is not None and score.ndim > 1:
            score = score.movedim(1, self.axis)
        return score.to(self.dtype)


def likelihoods(loss: Tensor, scale: float = 1.0) -> list[Likelihood]:
    """The likelihoods of a live loss.

    Args:
        loss: A scalar with its graph, which is kept.
        scale: What the loss was multiplied by; weights are divided by it.

    Raises:
        ValueError: If an operation between the likelihoods and the loss is not linear, or none is
            found; it is named.
        RuntimeError: If the graph was freed.

    Example:
        >>> logits = torch.zeros(2, 3, requires_grad=True)
        >>> loss = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2]))
        >>> [(found.kind, found.weight.tolist()) for found in likelihoods(8.0 * loss, 8.0)]
        [('nll', [[0.5], [0.5]])]
    """
    try:
        nodes = list(_last_nonlinear(loss))
        if not nodes:
            raise ValueError(
                "the loss is linear in the parameters, or no likelihood of a model's output: "
                + _remedy
            )
        found = torch.autograd.grad(
            [loss],
            [GradientEdge(node, 0) for node in nodes],
            retain_graph=True,
            allow_unused=True,
        )
        return [
            _likelihood(node, derivative / scale)
            for node, derivative in zip(nodes, found, strict=True)
        ]
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise RuntimeError(
            "the graph of the loss was freed before: backward() was called on it already; use "
            "opt.backward(loss) in its place, or opt.observe(loss) before it"
        ) from error


_remedy = (
    "Gauss-Newton curvature is read from cross-entropy (log_softmax), mse_loss, squares and "
    "binary_cross_entropy_with_logits, combined linearly; write the loss with them, or use "
    "Hutchinson's estimate, which takes any loss"
)


def _last_nonlinear(loss: Tensor) -> Iterator[Node]:
    """The operations from which on the loss is linear."""
    stack, seen = [loss.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = _name(node)
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        if _kind(node) is not None:
            yield node
        elif name in _SUMS or (name in _LINEAR and len(parents) <= 1):
            stack.extend(parents)
        elif name != "AccumulateGrad":
            raise ValueError(f"the loss is not a known function of {name!r}: {_remedy}")


def _name(node: Node) -> str:
    """``"Mul"`` of ``MulBackward0``."""
    return re.sub(r"Backward\d*$", "", node.name().rpartition("::")[2])


def _kind(node: Node) -> str | None:
    name = _name(node)
    if name == "Pow" and getattr(node, "_saved_exponent", None) != 2:
        return None
    return {
        "LogSoftmax": "nll",
        "MseLoss": "mse",
        "Pow": "mse",
        "BinaryCrossEntropyWithLogits": "bce_with_logits",
    }.get(name)


def _likelihood(node: Node, derivative: Tensor) -> Likelihood:
    kind = _kind(node)
    saved = _Saved(node)
    if kind == "nll":
        log_p = saved["result"]
        axis = saved.axis(log_p.ndim)
        wide = _wide(log_p).log_softmax(axis)  # what half precision has rounded sums to one again
        weight = -_wide(derivative).sum(axis, keepdim=True)
        if log_p.ndim > 1:
            wide, weight = wide.movedim(axis, 1), weight.movedim(axis, 1)
        edge = (GradientEdge(node, 0), 1.0)  # scores sum to zero: log_softmax leaves them
        return Likelihood("nll", wide, weight.abs(), axis, (edge,), log_p.dtype)
    output = saved["self"]
    weight = _wide(derivative)
    if _name(node) != "Pow" and saved.reduction == 1:
        weight = weight / output.numel()
    if kind == "bce_with_logits":
        weight = weight * saved.factor("weight")
        positive = saved.factor("pos_weight")
        weight = weight * (1.0 + (positive - 1.0) * _wide(saved["target"]))
    edges = tuple(
        (GradientEdge(parent, number), sign)
        for (parent, number), sign in zip(node.next_functions[:2], (1.0, -1.0), strict=False)
        if parent is not None
    )
    return Likelihood(
        str(kind), _wide(output), weight.abs().expand(output.shape), None, edges, output.dtype
    )


class _Saved:
    """What autograd saved for an operation (documented as ``grad_fn._saved_<name>``)."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def __getitem__(self, name: str) -> Tensor:
        value = getattr(self._node, f"_saved_{name}")
        assert isinstance(value, Tensor)
        return value.detach()

    def factor(self, name: str) -> Tensor | float:
        value = getattr(self._node, f"_saved_{name}")
        return _wide(value.detach()) if isinstance(value, Tensor) else 1.0

    @property
    def reduction(self) -> int:
        return int(getattr(self._node, "_saved_reduction"))  # noqa: B009  # mypy knows no such name

    def axis(self, ndim: int) -> int:
        """The axis of the classes; autograd saves negative ones as unsigned numbers."""
        value = int(getattr(self._node, "_saved_dim"))  # noqa: B009  # mypy knows no such name
        value = value - 2**64 if value >= 2**63 else value
        return value % max(ndim, 1)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
