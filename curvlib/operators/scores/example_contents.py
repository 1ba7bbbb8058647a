"""What chosen examples of a data set hold: inputs, targets and predictions, for people to see."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlib.core.batch import Batch
from curvlib.core.data import tensors
from curvlib.core.risk import Risk
from curvlib.operators.batch_examples import example_count, some_examples
from curvlib.operators.loss_hessian import class_axis

#: Numbers of a target that are told.
TOLD = 4


@dataclass(frozen=True, eq=False)
class ExampleContent:
    """One example.

    Attributes:
        input: Its entry of the batch's first tensor, on the CPU.
        caption: Its target and what the model predicts, in words; empty where there are many.
    """

    input: Tensor
    caption: str


def example_contents(risk: Risk, numbers: Iterable[int]) -> dict[int, ExampleContent]:
    """Inputs, targets and predictions of chosen examples, by their numbers in the data.

    Batches without one do not go through the model.

    Example:
        >>> import torch, curvlib as cl
        >>> model = torch.nn.Linear(2, 2)
        >>> _ = torch.nn.init.eye_(model.weight), torch.nn.init.zeros_(model.bias)
        >>> risk = cl.Risk(model, torch.nn.CrossEntropyLoss(), (torch.eye(2), torch.tensor([0, 0])))
        >>> example_contents(risk, [1])[1].caption
        'label 0, predicted 1'
    """
    wanted = torch.tensor(sorted(set(numbers)), dtype=torch.int64)
    found: dict[int, ExampleContent] = {}
    start = 0
    with risk.untouched(), torch.no_grad():
        for batch in risk.batches():
            if len(found) == len(wanted):
                break
            stop = start + example_count(batch)
            own = wanted[(wanted >= start) & (wanted < stop)]
            if len(own):
                part = some_examples(batch, own - start)
                first = next(tensors(part.data))
                lines = _captions(part, len(own))
                for row, (number, line) in enumerate(zip(own.tolist(), lines, strict=True)):
                    found[number] = ExampleContent(first[row].detach().cpu().clone(), line)
            start = stop
    return found


def _captions(batch: Batch, count: int) -> list[str]:
    loss, target = batch.risk.loss, batch.target
    if not isinstance(target, Tensor) or target.ndim < 1 or len(target) != count:
        return [""] * count
    if loss.linear is not None:  # sequences of tokens have no one label
        return [""] * count
    output = loss.readable(batch.output(), target)
    if loss.categorical and target.ndim == 1 and not target.is_floating_point():
        predicted = output.argmax(class_axis(output))
        rows = zip(target.tolist(), predicted.tolist(), strict=True)
        return [f"label {own}, predicted {said}" for own, said in rows]
    if target.shape != output.shape or target[0].numel() > TOLD or not target.is_floating_point():
        return [""] * count
    rows = zip(target.reshape(count, -1).tolist(), output.reshape(count, -1).tolist(), strict=True)
    return [f"target {_told(own)}, output {_told(said)}" for own, said in rows]


def _told(values: list[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)
