r"""An exact number of gradient rows, which second-order methods make their Fisher matrices of.

.. math:: \frac1m \sum_{i=1}^m g_i g_i^T \approx F, \qquad
          g = \sqrt{\tfrac{N}{W}} \, \frac{1}{\sqrt{b}} \sum_{n \in \text{micro-batch}} g_n,

with the gradient :math:`g_n` of the summed (and weighted) loss terms of example ``n``, ``N``
examples in all, the total weight ``W = risk.weight()`` of their terms (``N = W`` for plain means;
1 for ``reduction="sum"``) and ``b`` examples in each micro-batch. So rows are scaled such that
their plain mean of squares estimates the Fisher matrix of the risk as it is, whatever its batches,
masks, class weights and reduction: with each example once, it *is*
``curvlib.fisher(risk, "empirical")``.

The scale :math:`1/\sqrt b` is :math:`\sqrt b` times the mean over a micro-batch. Gradients of
different examples are nearly uncorrelated, so that a row of ``b`` examples estimates the same
matrix with less noise (Singh and Alistarh, "WoodFisher", 2020, section 4, average 400). It is
biased: the expectation is :math:`F + (b - 1)\, \nabla R \, \nabla R^T \cdot N / W`, which matters
away from a stationary point; sampled targets have no such bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from curvlib.core.batch import Batch
from curvlib.core.examples import chosen_examples, require_independent
from curvlib.core.exhausted import names_what_fits
from curvlib.core.random import generator_of
from curvlib.core.risk import Risk
from curvlib.operators.gradients import (
    example_gradients,
    example_loss,
)
from curvlib.operators.labels import SampledLabels
from curvlib.operators.loss_hessian import term_weights

#: Bytes that the rows of unfinished micro-batches may take.
MEMORY = 2**30
_KINDS = ("empirical", "mc")


def gradient_rows(
    risk: Risk,
    count: int,
    *,
    kind: str = "empirical",
    micro_batch: int = 1,
    seed: int = 0,
    block: int = 64,
) -> Iterator[Tensor]:
    """Streams exactly ``count`` gradient rows, scaled so that their mean of squares is a Fisher.

    Examples are a random subset of the whole data (of all of it, where it is needed), visited in
    the order of the data, so that data which is sorted by class is no trap. One pass over the data
    (without the model) counts them first.

    Args:
        risk: Model, loss, data and parameters. Examples of a batch must be independent, which is
            checked; all tensors of a batch have examples along their first axis.
        count: Rows, exactly.
        kind: ``"empirical"`` (true targets) or ``"mc"`` (one target for each loss term, drawn
            from the model's own predictions: the sampled Fisher; passes over the data are
            repeated with fresh targets where ``count * micro_batch`` exceeds its examples).
        micro_batch: Examples of each row. They are spread at random over rows, as far as the
            open rows fit 1 GiB (else over as many neighbouring rows as do).
        seed: Of the subset, the sampled targets and the micro-batches. The way in which data is
            split into batches changes none of them.
        block: Rows of a block at most; memory is about that of ``block`` gradients.

    Returns:
        An iterator over rows ``[n, P]`` with ``n <= block``, in the risk's vector dtype.

    Raises:
        TypeError: If a number is no int.
        ValueError: If a number is not positive, ``kind`` is unknown, the data has fewer examples
            than ``count * micro_batch`` (``"empirical"``), the loss is no likelihood that curvlib
            knows (``"mc"``), or examples depend on each other.
        FloatingPointError: If a row is not finite (names the example and the parameter).

    Example:
        >>> import torch, curvlib as cl
        >>> model = torch.nn.Linear(2, 1).double()
        >>> x, y = torch.randn(6, 2).double(), torch.randn(6, 1).double()
        >>> risk = cl.Risk(model, torch.nn.MSELoss(), [(x[:5], y[:5]), (x[5:], y[5:])])
        >>> G = torch.cat(list(gradient_rows(risk, 6)))
        >>> bool(torch.allclose(G.T @ G / 6, cl.fisher(risk, "empirical").to_dense()))
        True
    """
    for name, value in (("count", count), ("micro_batch", micro_batch), ("block", block)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}= is an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name}= needs to be at least 1, got {value}")
    if kind not in _KINDS:
        raise ValueError(f"kind= is one of {', '.join(map(repr, _KINDS))}, got {kind!r}")
    if kind == "mc" and not risk.loss.known:
        raise ValueError(
            f"the loss {risk.loss.describe()} is no likelihood that curvlib knows, so targets "
            "cannot be sampled; use cross-entropy, NLL, MSE or BCE-with-logits, or "
            "kind='empirical'"
        )
    generator = generator_of(None, seed)
    examples, weight = _census(risk)
    needed = count * micro_batch
    if kind == "empirical" and needed > examples:
        raise ValueError(
            f"{count} rows of {micro_batch} example(s) need {needed} examples, but the data has "
            f"{examples}; ask for at most {examples // micro_batch} rows, pass more data, or use "
            "kind='mc', which draws fresh targets at every pass"
        )
    scale = (examples / weight / micro_batch) ** 0.5
    rows = _example_rows(risk, kind, needed, examples, generator, block)
    if micro_batch == 1:
        return (part.mul_(scale) for part in rows)
    return _grouped(rows, count, micro_batch, scale, generator, block)


def example_count(risk: Risk) -> int:
    """How many examples the data has, by one pass over it without the model."""
    return _census(risk)[0]


def _census(risk: Risk) -> tuple[int, float]:
    """How many examples the data has, and the total weight of their loss terms."""
    examples, weight = 0, 0.0
    with risk.untouched():
        for batch in risk.batches():
            examples += batch.examples
            weight += 0.0 if risk.loss.reduction == "sum" else float(batch.weight)
    if risk.loss.reduction == "sum":
        return examples, 1.0
    if weight <= 0.0:
        raise ValueError(
            "no loss term is valid: every target is ignored, or all weights are zero; "
            "check ignore_index, class weights and weight="
        )
    return examples, weight


def _example_rows(
    risk: Risk, kind: str, needed: int, examples: int, generator: torch.Generator, block: int
) -> Iterator[Tensor]:
    """Rows of single examples, pass after pass over the data."""
    labels = SampledLabels(1, generator_of(generator, None)) if kind == "mc" else None
    stream = _Stream(risk, labels, block)
    while needed:
        now = min(needed, examples)
        order = torch.randperm(examples, generator=generator)
        chosen = order[:now].sort().values
        yield from stream.once(chosen)
        needed -= now


class _Stream:
    """One pass after the other; remembers what it found out about the model."""

    def __init__(self, risk: Risk, labels: SampledLabels | None, block: int) -> None:
        self.risk = risk
        self.labels = labels
        self.block = block
        self.batched = True
        self.verified = False

    def once(self, chosen: Tensor) -> Iterator[Tensor]:
        """Rows ``[n, P]`` of the examples with the (ascending) numbers ``chosen``."""
        batches = self.risk.batches()
        first, done = 0, 0  # example number at which the batch begins, and rows so far
        while done < len(chosen):
            with self.risk.untouched():
                batch = next(batches)
                size = batch.examples
                if not self.verified and size > 1:
                    self._verify(batch)
            stop = int(torch.searchsorted(chosen, first + size))
            for start in range(done, stop, self.block):
                numbers = chosen[start : min(start + self.block, stop)]
                told = names_what_fits("rows of gradients", {"rows": len(numbers)})
                with told, self.risk.untouched():
                    where = (numbers - first).to(self.risk.device)
                    rows = self._rows(chosen_examples(batch, where))
                if not bool(torch.isfinite(rows.sum())):
                    _require_finite(self.risk, rows, numbers)
                yield rows
            first, done = first + size, stop

    def _rows(self, batch: Batch) -> Tensor:
        if self.labels is None:
            rows, self.batched = example_gradients(batch, example_loss, batched=self.batched)
            return rows
        loss = self.risk.loss
        with torch.no_grad():
            readable = loss.readable(batch.output(), batch.target)
            scores = self.labels.scores(loss, readable)[0]
            # independent terms of mean zero: the squares of sums are the sums of squares
            scores = scores * term_weights(loss, readable, batch.target).sqrt()

        def directed(one: Batch, output: Any, score: Any) -> Tensor:
            value: Tensor = (loss.readable(output, one.target) * score).sum()
            return value

        rows, self.batched = example_gradients(batch, directed, scores, batched=self.batched)
        return rows

    def _verify(self, batch: Batch) -> None:
        """That examples are independent, for a few of the first batch of several."""
        self.verified = True
        few = chosen_examples(batch, slice(0, max(2, min(self.block, 8))))
        expected = self.risk.space.join(few.gradient())
        rows, self.batched = example_gradients(few, example_loss, batched=self.batched)
        require_independent(rows.sum(0), expected, self.risk)


def _grouped(
    rows: Iterator[Tensor],
    count: int,
    micro_batch: int,
    scale: float,
    generator: torch.Generator,
    block: int,
) -> Iterator[Tensor]:
    """Sums of ``micro_batch`` rows each, taken at random from windows of the stream."""
    sums: Tensor | None = None
    places: list[int] = []  # the sum that each of the following examples belongs to
    for part in rows:
        for row in part:
            if sums is None:
                open_rows = min(count, max(1, MEMORY // (row.numel() * row.element_size())))
                sums = row.new_zeros((open_rows, row.numel()))
                order = torch.randperm(open_rows * micro_batch, generator=generator)
                places = (order % open_rows).tolist()[::-1]
            sums[places.pop()].add_(row, alpha=scale)
            if not places:
                count -= len(sums)
                yield from torch.split(sums, block)
                sums = None


def _require_finite(risk: Risk, rows: Tensor, numbers: Tensor) -> None:
    bad = (~torch.isfinite(rows)).nonzero()
    if len(bad):
        row, place = bad[0].tolist()
        name = next(n for n in risk.space.names if place < risk.space.slice(n).stop)
        raise FloatingPointError(
            f"the gradient of example {int(numbers[row])} is not finite in parameter {name!r}; "
            "look for overflow or for NaN in the data (curvlib's risk.gradient() names the layer)"
        )
