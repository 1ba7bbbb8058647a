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

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlib.core.batch import Batch
from curvlib.core.examples import chosen_examples, require_independent
from curvlib.core.exhausted import names_what_fits
from curvlib.core.random import generator_of
from curvlib.core.ranks.group import together
from curvlib.core.ranks.turns import AHEAD, added, in_turns
from curvlib.core.risk import Risk
from curvlib.operators.gradients import (
    example_gradients,
    example_loss,
)
from curvlib.operators.labels import SampledLabels, drawn_terms
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
        An iterator over rows ``[n, P]`` with ``n <= block``, in the risk's vector dtype. In a
        process group they are those of one process, on every rank: each computes the gradients
        of its own examples and sends them, ``count * P / R`` numbers (see
        :mod:`curvlib.core.ranks.turns`), or sums of them, ``2 * count * P * (R - 1) / R`` numbers,
        for micro-batches.

    Raises:
        RuntimeError: If another rank failed.
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
    drawn = RowDraw.of(risk, count, kind=kind, micro_batch=micro_batch, seed=seed, block=block)
    return drawn.everywhere()


@dataclass(frozen=True)
class RowDraw:
    """Which gradient rows are drawn: see :func:`gradient_rows` for the arguments.

    Attributes:
        risk: Of the gradients.
        count: Rows.
        kind: ``"empirical"`` or ``"mc"``.
        micro_batch: Examples of each row.
        block: Rows of a block at most.
        seed: Of all that is random.
        census: What the data has.
    """

    risk: Risk
    count: int
    kind: str
    micro_batch: int
    block: int
    seed: int
    census: Census

    @classmethod
    def of(
        cls,
        risk: Risk,
        count: int,
        *,
        kind: str = "empirical",
        micro_batch: int = 1,
        seed: int = 0,
        block: int = 64,
    ) -> RowDraw:
        """The draw, after all arguments were checked; one pass over the data."""
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
        generator_of(None, seed)  # is one
        found = census(risk)
        needed = count * micro_batch
        if kind == "empirical" and needed > found.examples:
            raise ValueError(
                f"{count} rows of {micro_batch} example(s) need {needed} examples, but the data "
                f"has {found.examples}; ask for at most {found.examples // micro_batch} rows, pass "
                "more data, or use kind='mc', which draws fresh targets at every pass"
            )
        return cls(risk, count, kind, micro_batch, block, seed, found)

    @property
    def scale(self) -> float:
        """What sums of gradients are multiplied by."""
        return math.sqrt(self.census.examples / self.census.weight / self.micro_batch)

    @property
    def shared(self) -> bool:
        """Whether each rank has rows of its own: those that :meth:`own` gives."""
        return self.risk.group is not None and self.micro_batch == 1

    def everywhere(self, ahead: float = AHEAD) -> Iterator[Tensor]:
        """The rows of all ranks, in the order of one process.

        Args:
            ahead: Bytes of rows that a rank computes before its turn.
        """
        if self.micro_batch > 1:
            return self._micro_batches()
        like, group = self.risk.space.empty(), self.risk.group
        return (
            block.mul_(self.scale)
            for _, own in self._passes(generator_of(None, self.seed))
            for block in in_turns(group, own, like, ahead=ahead)
        )

    def own(self) -> Iterator[tuple[int, Tensor]]:
        """The rows that this rank has of all, without communication, if they are single examples.

        Yields:
            The number of the first one among all rows, and rows ``[n, P]``.
        """
        for first, block in self._blocks(generator_of(None, self.seed)):
            yield first, block.mul_(self.scale)

    def _micro_batches(self) -> Iterator[Tensor]:
        """Sums of ``micro_batch`` gradients each, taken at random from windows of the stream.

        In a process group, ranks add their own gradients to the open rows, which are summed once.
        """
        risk, generator = self.risk, generator_of(None, self.seed)
        random = generator_of(generator, None)
        singles = (
            (first + i, row)
            for first, block in self._blocks(generator)
            for i, row in enumerate(block)
        )
        room = max(1, MEMORY // (risk.space.size * risk.space.dtype.itemsize))
        start, waiting = 0, None
        for done in range(0, self.count, room):
            rows = min(room, self.count - done)
            places = (torch.randperm(rows * self.micro_batch, generator=random) % rows).tolist()
            sums = risk.space.empty().new_zeros((rows, risk.space.size))
            with together(risk.group, "adding up micro-batches"):
                waiting = next(singles, None) if waiting is None else waiting
                while waiting is not None and waiting[0] < start + len(places):
                    number, row = waiting
                    sums[places[number - start]].add_(row, alpha=self.scale)
                    waiting = next(singles, None)
            yield from torch.split(added(risk.group, sums), self.block)
            start += len(places)

    def _blocks(self, generator: torch.Generator) -> Iterator[tuple[int, Tensor]]:
        """This rank's gradients in blocks, with the number of the first one among all."""
        for first, blocks in self._passes(generator):
            for block in blocks:
                yield first, block
                first += len(block)

    def _passes(self, generator: torch.Generator) -> Iterator[tuple[int, Iterator[Tensor]]]:
        """For each pass over the data, this rank's gradients and the number of the first one."""
        labels = SampledLabels(1, generator_of(generator, None)) if self.kind == "mc" else None
        stream = _Stream(self.risk, labels, self.block, self.census.start)
        done, needed = 0, self.count * self.micro_batch
        while done < needed:
            now = min(needed - done, self.census.examples)
            order = torch.randperm(self.census.examples, generator=generator)
            chosen = order[:now].sort().values
            before, own, after = self.census.split(chosen)
            if labels is not None:
                labels.skip(self.census.terms(before))
            yield done + len(before), stream.once(own)
            if labels is not None:
                labels.skip(self.census.terms(after))
            done += now


def example_count(risk: Risk) -> int:
    """How many examples the data has, by one pass over it without the model."""
    return census(risk).examples


@dataclass(frozen=True)
class Census:
    """What the data has, of all ranks.

    Attributes:
        weight: Total weight of the loss terms; 1 for sums.
        sizes: Examples of each batch, in the order of ranks.
        draws: Numbers that sampled targets of an example take, in each batch.
        start: The number of the first example of this rank's shard.
        stop: That after its last one.
    """

    weight: float
    sizes: tuple[int, ...]
    draws: tuple[int, ...]
    start: int
    stop: int

    @property
    def examples(self) -> int:
        """Examples in all."""
        return sum(self.sizes)

    def split(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ascending numbers of examples: those of ranks before this one, its own, and the rest."""
        ends = torch.tensor([self.start, self.stop])
        first, last = torch.searchsorted(chosen, ends).tolist()
        return chosen[:first], chosen[first:last], chosen[last:]

    def terms(self, chosen: Tensor) -> int:
        """Numbers that sampled targets of some examples (ascending) take."""
        if not len(chosen):
            return 0
        ends = torch.tensor(self.sizes).cumsum(0)
        batch = torch.searchsorted(ends, chosen, right=True)
        return int(torch.tensor(self.draws)[batch].sum())


def census(risk: Risk) -> Census:
    """Counts examples and loss terms, by one pass over the data without the model.

    Raises:
        ValueError: If no loss term is valid.
    """
    sizes, draws, weight = [], [], 0.0
    with together(risk.group, "counting its examples"), risk.untouched():
        for batch in risk.batches(shard=True):
            sizes.append(batch.examples)
            draws.append(_draws(batch))
            weight += 0.0 if risk.loss.reduction == "sum" else float(batch.weight)
    start, own = 0, sum(sizes)
    if risk.group is not None:
        every = risk.group.values([sizes, draws, weight])
        start = sum(sum(found) for found, _, _ in every[: risk.group.rank])
        sizes, draws = ([n for row in every for n in row[i]] for i in range(2))
        weight = sum(found for _, _, found in every)
    if risk.loss.reduction == "sum":
        weight = 1.0
    if weight <= 0.0:
        raise ValueError(
            "no loss term is valid: every target is ignored, or all weights are zero; "
            "check ignore_index, class weights and weight="
        )
    return Census(weight, tuple(sizes), tuple(draws), start, start + own)


def _draws(batch: Batch) -> int:
    target = batch.target
    if not (batch.risk.loss.known and isinstance(target, Tensor)):
        return 0
    return drawn_terms(batch.risk.loss, target) // max(1, batch.examples)


class _Stream:
    """One pass after the other; remembers what it found out about the model."""

    def __init__(self, risk: Risk, labels: SampledLabels | None, block: int, start: int) -> None:
        self.risk = risk
        self.labels = labels
        self.block = block
        self.start = start  # number of the first example of the shard
        self.batched = True
        self.verified = False

    def once(self, chosen: Tensor) -> Iterator[Tensor]:
        """Rows ``[n, P]`` of the examples with the (ascending) numbers ``chosen``."""
        batches = self.risk.batches(shard=True)
        first, done = self.start, 0  # example number at which the batch begins, and rows so far
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


def _require_finite(risk: Risk, rows: Tensor, numbers: Tensor) -> None:
    bad = (~torch.isfinite(rows)).nonzero()
    if len(bad):
        row, place = bad[0].tolist()
        name = next(n for n in risk.space.names if place < risk.space.slice(n).stop)
        raise FloatingPointError(
            f"the gradient of example {int(numbers[row])} is not finite in parameter {name!r}; "
            "look for overflow or for NaN in the data (curvlib's risk.gradient() names the layer)"
        )
