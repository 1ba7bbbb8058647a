"""The product of a batch as a function of every tensor that it depends on: what is recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from curvlib.core.batch import Batch
from curvlib.core.data import tensors
from curvlib.core.forward import Holder
from curvlib.core.risk import Risk
from curvlib.operators.captured.batch_record import RecordedBatch, rebuilt

#: Given a batch and the leaves that stand for the parameters, returns the product of its summed
#: loss terms with a vector, both as parts in the parameters' shapes.
Form = Callable[[Batch, list[Tensor]], Callable[[list[Tensor]], Sequence[Tensor | None]]]


def batch_function(risk: Risk, form: Form, batch: Batch) -> Callable[..., Tensor]:
    """The product as a function of :func:`batch_inputs` and a vector ``[P]``.

    Args:
        risk: The risk.
        form: The product.
        batch: The batch, whose other values are constants.
    """
    names, weighed = _names(risk), batch_terms(risk, batch) is not None

    def function(*flat: Tensor) -> Tensor:
        *others, vector = flat
        following = iter(others)
        leaves = [next(following).detach().requires_grad_() for _ in risk.params]
        held = [next(following) for _ in names[len(leaves) :]]
        data = rebuilt(batch.data, following)
        weight = next(following) if weighed else None
        recorded = RecordedBatch(risk, batch.index, data, terms=weight)

        def product(_: Any) -> Tensor:
            push = form(recorded, leaves)
            return risk.space.join_with_graph(push(risk.space.split(vector)))

        values = dict(zip(names, [*leaves, *held], strict=True))
        out: Tensor = torch.func.functional_call(Holder(risk.model), values, (product,))
        return out

    return function


def batch_inputs(risk: Risk, batch: Batch) -> list[Tensor]:
    """Parameters, buffers, the batch's tensors, and its weight where that takes part."""
    params = list(risk.params.values())
    chosen = {id(p) for p in params}
    others = [p for p in risk.model.parameters() if id(p) not in chosen]
    weight = batch_terms(risk, batch)
    every = [*params, *others, *risk.model.buffers(), *tensors(batch.data)]
    return [t.detach() for t in (every if weight is None else [*every, weight])]


def batch_terms(risk: Risk, batch: Batch) -> Tensor | None:
    """The batch's weight, where it is part of the function (means of unknown losses)."""
    if risk.loss.known or risk.loss.reduction == "sum":
        return None
    return torch.as_tensor(batch.weight, dtype=torch.float64, device=risk.device)


def _names(risk: Risk) -> list[str]:
    """Names of the parameters in the space, then of the others, then of buffers."""
    holder = Holder(risk.model)
    names = {id(p): name for name, p in holder.named_parameters()}
    chosen = [names.pop(id(p)) for p in risk.params.values()]
    return [*chosen, *names.values(), *(name for name, _ in holder.named_buffers())]
