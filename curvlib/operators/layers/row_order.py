r"""Which rows of a layer belong to which example, found from the graph of a training loss.

The rows of an input ``[N, T, d]`` belong to the examples along its first axis, those of
``[T, N, d]`` (PyTorch's default for transformers and recurrent networks) to those along its second.
Where ``T`` is a multiple of ``N``, shapes do not tell them apart. Gradients do: what comes out for
the last example depends on the rows of that example, so that the gradient of its output (times
random numbers) is zero on the rows of all others. One backward pass, once for each layer, settles
the order of all of them; it is that of the user's own graph, and nothing runs forward again.

Where examples depend on each other (batch statistics), no rows are zero, and shapes decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from curvlib.core.data import tensors
from curvlib.core.random import generator_of
from curvlib.operators.layers.factored import FactoredLayer, on_channels
from curvlib.operators.layers.use import Use

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRIES = 3


@dataclass(eq=False)
class RowOrder:
    """The order of the rows of layers, as far as it is known.

    Attributes:
        open: Layers whose order may have to be found.
        known: By layer: ``"first"`` or ``"second"``, the axis of the examples, or ``"mixed"``.
        tries: Passes that may still be spent on the open ones.
    """

    open: set[str]
    known: dict[str, str] = field(default_factory=dict)
    tries: int = _TRIES

    @classmethod
    def of(cls, layers: Iterable[FactoredLayer], apart: str) -> RowOrder:
        """Of some layers.

        Args:
            layers: The layers.
            apart: Of which layers rows have to be told apart by example: ``"none"``,
                ``"scales"`` (normalization layers) or ``"all"``.
        """
        wanted = {"none": (), "scales": ("scale",), "all": ("matrix", "embedding", "scale")}[apart]
        return cls({own.name for own in layers if not own.maps and {*own.roles} & {*wanted}})

    def unclear(self, use: Use, examples: int | None) -> bool:
        """Whether a use of a layer has rows whose order is to be found."""
        if use.layer not in self.open or examples is None or examples < 2 or not self.tries:
            return False
        if isinstance(use.module, _CONVOLUTIONS) or (
            use.role == "scale" and on_channels(use.module)
        ):
            return False  # examples come first, by the definition of the module
        return use.x.ndim > (1 if use.role == "embedding" else 2) or use.x.shape[0] != examples

    def find(
        self,
        output: Any,
        uses: Sequence[tuple[Use, GradientEdge]],
        examples: int,
    ) -> None:
        """Finds the order of layers in a pass.

        Args:
            output: What came out of the model, with its graph, which is kept.
            uses: Unclear uses, and the edges at their outputs.
            examples: How many examples there are.
        """
        own = _of_last(output, examples)
        if own is None or not uses:
            return
        value, sure = own
        self.tries -= 1
        try:
            found: Sequence[Tensor | None] = torch.autograd.grad(
                [value], [edge for _, edge in uses], retain_graph=True, allow_unused=True
            )
        except RuntimeError:  # checkpointing that knows no such gradients: shapes decide
            return
        orders: dict[str, set[str]] = {}
        for (use, _), gradient in zip(uses, found, strict=True):
            order = None if gradient is None else order_of(gradient, examples)
            if order is not None and (sure or order != "mixed"):
                orders.setdefault(use.layer, set()).add(order)
        for name, each in orders.items():
            self.known[name] = each.pop() if len(each) == 1 else "mixed"
            self.open.discard(name)

    def mixed(self, use: Use, examples: int) -> bool:
        """Whether a layer's rows cannot be told apart by example."""
        order = self.known.get(use.layer)
        other = order == "second" and (use.x.ndim < 2 or use.x.shape[1] != examples)
        return order == "mixed" or other

    def turned(
        self, use: Use, gradients: Sequence[Tensor | None]
    ) -> tuple[Use, list[Tensor | None]]:
        """A use, and gradients at its output, with the examples along the first axis."""
        if self.known.get(use.layer) != "second" or use.x.ndim < 2:
            return use, list(gradients)
        first, second, *rest = use.shape
        shape = (second, first, *rest)
        turned = [None if g is None else g.transpose(0, 1) for g in gradients]
        return replace(use, x=use.x.transpose(0, 1), shape=shape), turned


def order_of(gradient: Tensor, examples: int) -> str | None:
    """The order of rows, of the gradient of the last example's output at a layer's output.

    Args:
        gradient: Of the layer's output.
        examples: ``N``.

    Returns:
        ``"first"`` or ``"second"``, the axis of the examples (or into which they are folded),
        ``"mixed"``, or ``None`` where examples depend on each other or nothing arrived.

    Example:
        >>> g = torch.zeros(4, 2, 3)
        >>> g[:, 1] = 1.0
        >>> order_of(g, 2), order_of(g.transpose(0, 1), 2)
        ('second', 'first')
    """
    rows = gradient.detach().ne(0).any(-1) if gradient.ndim else gradient
    if not rows.ndim or not bool(rows.any()):
        return None
    if rows.shape[0] % examples == 0 and not bool(rows.reshape(examples, -1)[:-1].any()):
        return "first"
    if rows.ndim > 1 and rows.shape[1] == examples and not bool(rows[:, :-1].any()):
        return "second"
    return "mixed" if float(rows.double().mean()) < 0.6 else None


def _of_last(output: Any, examples: int) -> tuple[Tensor, bool] | None:
    """A number that depends on the output of the last example; and whether on no other."""
    shown = [t for t in tensors(output) if t.requires_grad and t.is_floating_point() and t.ndim]
    for where, sure in _PLACES:
        for tensor in shown:
            own = where(tensor, examples)
            if own is not None and own.numel():
                numbers = torch.randn(own.numel(), generator=generator_of(None, 0))
                wide = own.to(torch.promote_types(own.dtype, torch.float32)).reshape(-1)
                return (wide * numbers.to(wide)).sum(), sure
    return None


def _first(tensor: Tensor, n: int) -> Tensor | None:
    return tensor[-1] if tensor.shape[0] == n else None


def _second(tensor: Tensor, n: int) -> Tensor | None:
    return tensor[:, -1] if tensor.ndim > 1 and tensor.shape[1] == n else None


def _folded(tensor: Tensor, n: int) -> Tensor | None:
    return tensor.reshape(n, -1)[-1] if tensor.shape[0] % n == 0 else None


_PLACES: tuple[tuple[Callable[[Tensor, int], Tensor | None], bool], ...] = (
    (_first, True),
    (_second, True),
    (_folded, False),
)
