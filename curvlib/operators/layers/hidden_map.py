"""One linear map inside of a module, and a call of a module that was run again in the open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HiddenMap:
    """A product with a weight, or with some rows of one, inside of a module.

    Attributes:
        key: Its name in the module.
        weight: Name of the weight in the module, ``"out_proj.weight"``.
        bias: Name of the bias, if it has one.
        first: Row of the weight at which its outputs begin.
        bias_first: Entry of the bias at which they begin.
        outputs: ``O``, how many rows.
        width: ``I``.
        gates: Into how many equal parts its outputs are split by the module.
    """

    key: str
    weight: str
    bias: str | None
    first: int
    bias_first: int
    outputs: int
    width: int
    gates: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its parameters in the module."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True, eq=False)
class Unrolled:
    """A call of a module that was run again.

    Attributes:
        maps: The linear maps.
        inputs: The inputs of each, ``[N, T, I]``.
        nodes: Tensors of the graph, ``[T, N, O]``, whose gradients are those at the maps' outputs,
        factors: but for factors ``[T, N, O]``; ``None`` where there is none.
        outputs: Tensors of the module's output at which gradients can arrive.
        valid: Which rows there are, bool ``[N, T]``, or ``None`` for all.
    """

    maps: tuple[HiddenMap, ...]
    inputs: tuple[Tensor, ...]
    nodes: tuple[Tensor, ...]
    factors: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]
    valid: Tensor | None

    def pulled(self, output_gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients at the outputs of the maps, ``[N, T, O]``, for gradients at the module's.

        Can be called several times. ``None`` where no gradient arrives.

        Raises:
            ValueError: If there are not as many gradients as outputs.
        """
        if len(output_gradients) != len(self.outputs):
            raise ValueError(
                f"expected gradients at the module's {len(self.outputs)} outputs (None where there "
                f"is none), got {len(output_gradients)}"
            )
        pairs = [
            (out, own.detach().to(out.dtype))
            for out, own in zip(self.outputs, output_gradients, strict=True)
            if own is not None
        ]
        if not pairs:
            return [None] * len(self.nodes)
        different = list({id(node): node for node in self.nodes}.values())
        with torch._C.DisableTorchFunction():
            found: Sequence[Tensor | None] = torch.autograd.grad(
                [out for out, _ in pairs],
                different,
                [own for _, own in pairs],
                retain_graph=True,
                allow_unused=True,
            )
        by_node = {id(node): own for node, own in zip(different, found, strict=True)}
        gradients: list[Tensor | None] = []
        for node, factor in zip(self.nodes, self.factors, strict=True):
            own = by_node[id(node)]
            own = own if own is None or factor is None else own * factor
            gradients.append(None if own is None else own.transpose(0, 1))
        return gradients
