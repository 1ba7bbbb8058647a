"""One batch of a risk: its output, its loss terms and their weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvlib.core.data import describe, is_pair, tensors

if TYPE_CHECKING:
    from curvlib.core.risk import Risk


@dataclass(frozen=True)
class Batch:
    """One batch of a risk, within a pass.

    Attributes:
        risk: The risk it belongs to.
        index: Its place in the data.
        data: The batch, on the risk's device.
        scale: Factor of the batch's sums in the risk: ``1 / W`` where ``W`` is known before the
            pass (data in memory), else 1, and the pass divides at its end.
        lent: Whether it stands in for none, where ranks have to go through batches together:
            its total and weight are then 0.
    """

    risk: Risk
    index: int
    data: Any
    scale: float = 1.0
    lent: bool = False

    @property
    def target(self) -> Any:
        """What the loss compares the output with."""
        if self.risk.take_target is not None:
            return self.risk.take_target(self.data)
        return self.data[1] if is_pair(self.data) else self.data

    @property
    def examples(self) -> int:
        """Number of examples: the first dimension of the target, or of the first tensor."""
        for tensor in tensors([self.target, self.data]):
            return int(tensor.shape[0]) if tensor.ndim else 1
        return 1

    @property
    def weight(self) -> Tensor | float:
        """Denominator of the batch's mean: its number of valid loss terms."""
        if self.lent:
            return 0.0
        risk, target = self.risk, self.target
        if risk.take_weight is not None:
            value = risk.take_weight(self.data)
            value = value.to(torch.float64) if isinstance(value, Tensor) else float(value)
            if not float(value) >= 0.0:
                raise ValueError(
                    f"weight= returned {float(value)} for batch {self.index}; "
                    "it should return the batch's number of loss terms"
                )
            return value
        if not risk.loss.known:
            return float(self.examples)
        if not isinstance(target, Tensor):
            risk.require_known(self.data)
            raise TypeError(
                f"{risk.loss.kind} needs a target tensor, but the batch's is {describe(target)}; "
                "pass target=lambda batch: batch['labels'], or a loss of (output, batch)"
            )
        return risk.loss.terms(target)

    def output(self, params: Mapping[str, Tensor] | None = None) -> Any:
        """The model's output, with other values for parameters where given.

        A model that draws random numbers draws the same at every call.
        """
        return self.risk.draws.run(self.index, lambda: self.risk.call(self.data, params))

    def total(self, output: Any) -> Tensor:
        """Sum of the loss terms, as a scalar that carries its graph."""
        if self.lent:
            return replace(self, lent=False).total(output) * 0.0
        risk = self.risk
        if risk.loss.known or risk.loss.reduction == "sum":
            return risk.loss.total(output, self.target)
        terms = self.weight
        if float(terms) == 0.0:  # a mean over nothing is nan; its terms sum to zero
            return next(tensors([output, *risk.params.values()])).sum() * 0.0
        value = risk.loss.total(output, self.target, terms)
        risk.note_normalization(self, output, value.detach())
        return value

    def gradient(
        self, *, create_graph: bool = False, params: Mapping[str, Tensor] | None = None
    ) -> list[Tensor | None]:
        """Gradient of :meth:`total` for each parameter, ``None`` where it is not used.

        Args:
            create_graph: Whether the gradient is to be differentiated again.
            params: Leaves that take the parameters' places, in the order of the space.

        Raises:
            ValueError: If the loss does not depend on any of the parameters.
        """
        if params is not None:
            out: list[Tensor | None] = self.risk.held.replaced(
                params, lambda: self._gradient(create_graph, params)
            )
            return out
        return self._gradient(create_graph, self.risk.params)

    def _gradient(self, create_graph: bool, params: Mapping[str, Tensor]) -> list[Tensor | None]:
        value = self.total(self.output())
        if value.requires_grad:
            leaves = list(params.values())
            return list(
                torch.autograd.grad(value, leaves, create_graph=create_graph, allow_unused=True)
            )
        if self.risk.is_part:
            return [None] * len(params)
        raise ValueError(
            f"the loss of batch {self.index} cannot be differentiated: it was computed under "
            "torch.no_grad(), detached, or does not use any selected parameter; check "
            "forward=, loss= and params="
        )


def misread_mean(batch: Batch, output: Any, value: Tensor) -> str | None:
    """Whether an unknown loss is a mean over examples, as far as one batch can tell.

    A mean over ``n`` examples is the weighted mean of the means of its halves.

    Returns:
        What is wrong and what to do, or ``None``.
    """
    loss, target, n = batch.risk.loss, batch.target, batch.examples
    if not isinstance(target, Tensor):
        return (
            f"the loss {loss.describe()} takes batches that curvlib cannot split, so the weight of "
            "each of several batches is unknown; pass weight=lambda batch: <number of loss terms> "
            "(for a causal language model: (batch['labels'][:, 1:] != -100).sum()), "
            "or reduction='sum' if it sums"
        )
    if not isinstance(output, Tensor) or output.ndim == 0 or output.shape[0] != n:
        return (
            f"batch {batch.index} has {n} targets, and its output is {describe(output)}: curvlib "
            f"cannot tell over how many terms the loss {loss.describe()} averages; pass "
            "weight=lambda batch: <number of loss terms>, or reduction='sum' if it sums"
        )
    if n < 2:
        return None
    half = n // 2
    with torch.no_grad():
        a = float(loss.function(output[:half], target[:half])) * half
        b = float(loss.function(output[half:], target[half:])) * (n - half)
    eps = torch.finfo(output.dtype).eps if output.dtype.is_floating_point else 1e-7
    if abs(a + b - float(value)) <= 10.0 * eps**0.5 * (abs(a) + abs(b) + abs(float(value))):
        return None
    return (
        f"the loss {loss.describe()} is not a mean over examples: it gives batch {batch.index} "
        f"{float(value) / n:.6g}, but its halves average {(a + b) / n:.6g}; pass reduction='sum' "
        "if it sums, or weight=lambda batch: <number of loss terms> if it averages over "
        "something else (tokens, unmasked targets)"
    )


def misread_sum(batch: Batch, output: Any, value: Tensor) -> str | None:
    """Whether a function that is said to be a sum over examples is none, as one batch can tell.

    Returns:
        What is wrong and what to do, or ``None``, also where the batch cannot be split.
    """
    loss, target, n = batch.risk.loss, batch.target, batch.examples
    fits = isinstance(target, Tensor) and isinstance(output, Tensor) and output.ndim > 0
    if n < 2 or not fits or output.shape[0] != n:
        return None
    half = n // 2
    with torch.no_grad():
        try:
            a = float(loss.function(output[:half], target[:half]))
            b = float(loss.function(output[half:], target[half:]))
        except (RuntimeError, ValueError, IndexError, TypeError):
            return None  # it is of whole batches alone
    eps = torch.finfo(output.dtype).eps if output.dtype.is_floating_point else 1e-7
    if abs(a + b - float(value)) <= 10.0 * eps**0.5 * (abs(a) + abs(b) + abs(float(value))):
        return None
    return (
        f"{loss.describe()} is not a sum over examples: it gives batch {batch.index} "
        f"{float(value):.6g}, but its halves add up to {a + b:.6g}; return the sum (a mean times "
        "the number of examples)"
    )
