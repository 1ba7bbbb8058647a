"""Gradients by the parameters that are in no factored layer, whose curvature is a diagonal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvlib.core.batch import Batch
from curvlib.core.risk import Risk
from curvlib.operators.batch_examples import one_example
from curvlib.operators.factors.targets import Direction
from curvlib.operators.gradients import example_gradients, example_loss
from curvlib.operators.layers.uses import Pass


def rest_rows(part: Risk, one: Pass, direction: Direction) -> Tensor:
    """Gradients of a pass's examples along one direction, ``[n, P]``.

    Args:
        part: The risk as a function of these parameters.
        one: The pass.
        direction: See :mod:`curvlib.operators.factors.targets`.
    """
    batch = Batch(part, one.batch.index, one.batch.data)
    cotangent = direction[1]
    if one.examples != batch.examples:
        return _folded_rows(part, one, direction)
    if cotangent is None:
        return example_gradients(batch, example_loss)[0]

    def along(_: Batch, output: Any, own: Any) -> Tensor:
        value: Tensor = (output * own.reshape(output.shape)).sum()
        return value

    n = batch.examples
    each = cotangent if cotangent.shape[:1] == (n,) else cotangent[None]
    return example_gradients(batch, along, each)[0]


def _folded_rows(part: Risk, one: Pass, direction: Direction) -> Tensor:
    """Gradients of examples with several rows of the output each, ``[n, P]``.

    Each example goes through the model once more, alone: all of them together are as much work as
    one pass of the batch, where backward passes of the batch would be one for each example.
    """
    output, cotangent = direction
    if cotangent is None:
        output, (cotangent,) = (
            one.output,
            torch.autograd.grad(direction[0], one.output, retain_graph=True),
        )
    batch, rows = Batch(part, one.batch.index, one.batch.data), []
    each = cotangent.unflatten(0, (one.examples, -1))
    for i in range(one.examples):
        if one.examples > 1:
            output = one_example(batch, i).output()
        parts: list[Tensor | None] = [None] * len(part.params)
        if output.requires_grad:
            found = torch.autograd.grad(
                [output],
                list(part.params.values()),
                [each[i].reshape(output.shape)],
                retain_graph=one.examples == 1,
                allow_unused=True,
            )
            parts = list(found)
        rows.append(part.space.join(parts))
    return torch.stack(rows)
