r"""Targets that the model itself draws, and their scores: what a sampled Fisher is made of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvlib.core.loss import Loss
from curvlib.core.risk import Risk
from curvlib.operators.loss_hessian import class_axis, probabilities

#: Numbers that are passed over at a time.
_CHUNK = 2**20


class SampledLabels:
    """Draws targets from the distribution that the loss reads into the model's outputs.

    Numbers are drawn in float64 on the CPU, example after example, so that neither batches nor
    devices change the targets.

    Args:
        samples: Targets for each loss term.
        generator: A CPU generator; it advances with every draw.
    """

    def __init__(self, samples: int, generator: torch.Generator) -> None:
        self.samples = samples
        self.generator = generator

    def scores(self, loss: Loss, output: Tensor) -> Tensor:
        """Scores ``[samples, *output.shape]``: gradients of the loss terms in the output.

        Args:
            loss: A loss that curvlib knows.
            output: Readable (:meth:`curvlib.core.loss.Loss.readable`), examples along axis 0.
        """
        return label_scores(loss, output, self.uniform)

    def uniform(self, shape: torch.Size) -> Tensor:
        """Numbers in (0, 1), drawn example after example, ``[samples, *shape]``."""
        first, rest = (shape[0], shape[1:]) if shape else (1, shape)
        numbers = torch.rand(
            (first, self.samples, *rest), generator=self.generator, dtype=torch.float64
        ).clamp_(min=1e-300)
        return numbers.transpose(0, 1).reshape(self.samples, *shape)

    def skip(self, terms: int) -> None:
        """Passes over what so many loss terms would draw, such as those of other ranks."""
        left = terms * self.samples
        while left > 0:
            now = min(left, _CHUNK)
            torch.rand(now, generator=self.generator, dtype=torch.float64)
            left -= now


def drawn_terms(loss: Loss, target: Tensor) -> int:
    """How many numbers a sample of a batch's targets takes, masked terms included.

    Args:
        loss: A loss that curvlib knows.
        target: What it compares the batch's output with.
    """
    if loss.categorical and target.is_floating_point():
        return target.numel() // max(1, target.shape[class_axis(target)])
    return target.numel()


def terms_before(risk: Risk) -> int:
    """Terms that samples of the ranks before this one draw in a pass; counted without the model.

    Raises:
        RuntimeError: If another rank failed.
    """
    group = risk.group
    if group is None:
        return 0
    with group.together("counting its loss terms"):
        own = sum(drawn_terms(risk.loss, batch.target) for batch in risk.stream.own(1.0))
    return int(sum(n for (n,) in group.numbers([own])[: group.rank]))


def label_scores(loss: Loss, output: Tensor, uniform: Callable[[torch.Size], Tensor]) -> Tensor:
    """Scores ``[samples, *output.shape]`` of targets that are drawn from the model's outputs.

    Args:
        loss: A loss that curvlib knows.
        output: Readable, examples along axis 0.
        uniform: Returns numbers in (0, 1) of shape ``[samples, *shape]`` for a shape.
    """
    if loss.kind == "mse":  # y ~ N(f, 1/2), so that -log p = (f - y)^2 + const
        noise = torch.erfinv(2.0 * uniform(output.shape).to(output.device) - 1.0)
        return (-2.0 * noise).to(output.dtype)  # noise of variance 1/2
    if loss.kind == "bce_with_logits":
        p = output.sigmoid()
        return p - (uniform(output.shape).to(output.device) < p).to(output.dtype)
    axis = class_axis(output)
    p = probabilities(loss, output)
    shape = [size for d, size in enumerate(output.shape) if d != axis]
    numbers = uniform(torch.Size(shape)).to(output.device).unsqueeze(axis + 1)
    cumulative = p.to(torch.float64).cumsum(axis)
    total = cumulative.narrow(axis, output.shape[axis] - 1, 1)
    drawn = (cumulative <= numbers * total).sum(axis + 1, keepdim=True)
    drawn.clamp_(max=output.shape[axis] - 1)
    scores = p.expand(len(numbers), *p.shape).clone()
    minus = torch.full_like(drawn, -1, dtype=scores.dtype)
    return scores.scatter_add_(axis + 1, drawn, minus)
