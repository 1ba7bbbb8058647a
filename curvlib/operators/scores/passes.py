r"""Passes over batches that know the gradient of each example, as products of rows or as it is.

The gradient of an example is that of the *sum* of its (weighted) loss terms, whatever the
reduction of the loss: for a mean over tokens, its number of tokens times its own mean. A loss that
curvlib does not know is multiplied by its ``weight=``, and checked to be a mean over examples where
nothing says so, since otherwise an example's share of a batch is unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from curvlib.core.batch import Batch, misread_mean, misread_sum
from curvlib.core.data import tensors
from curvlib.core.ranks.in_step import Agreement
from curvlib.core.risk import Risk
from curvlib.operators.batch_examples import example_count
from curvlib.operators.factors.rest import rest_rows
from curvlib.operators.factors.targets import Direction
from curvlib.operators.gradients import example_loss
from curvlib.operators.layers.finite import require_finite
from curvlib.operators.layers.stepped_passes import at_output, stepped_passes, stepped_rows
from curvlib.operators.layers.uses import Pass, Watcher, with_last
from curvlib.operators.scores.blocks import ScoreBlock

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class GradientPass:
    """A pass of some examples, and their gradients.

    Attributes:
        one: The pass.
        outputs: Gradients at the outputs of its uses, ``None`` where none arrives.
        whole: Gradients ``[n, G, O, I]`` of the blocks that are not made of these, by name.
        counts: Whether the examples are this rank's own: with sharded parameters, a rank goes
            through others as well, since all go together.
    """

    one: Pass
    outputs: list[Tensor | None]
    whole: dict[str, Tensor]
    counts: bool = True

    @property
    def examples(self) -> int:
        """``n``."""
        return self.one.examples

    def require_finite(self) -> None:
        """Raises FloatingPointError naming the first layer with what is not finite."""
        require_finite([use.x for use in self.one.uses], self.one, "inputs")
        require_finite(self.outputs, self.one, "gradients at the outputs")
        for name, rows in self.whole.items():
            if not bool(torch.isfinite(rows).all()):
                raise FloatingPointError(
                    f"the gradient by {name!r} is not finite at batch {self.one.batch.index}; look "
                    "at the data, or use a higher precision"
                )


class GradientPasses:
    """Takes batches through the model: see :class:`GradientPass`.

    A block whose parameters are used by more than its modules (``F.linear`` with a layer's weight)
    in a batch is noticed, and its gradients are made example by example.

    Args:
        risk: Model, loss and parameters.
        blocks: The blocks whose gradients are needed.
        alone: Whether examples go through the model one by one, if that is known.
    """

    def __init__(self, risk: Risk, blocks: Sequence[ScoreBlock], *, alone: bool = False) -> None:
        self.risk = risk
        self.blocks = list(blocks)
        layers = [block.layer for block in blocks if block.layer is not None]
        self._watcher = Watcher(risk, layers, alone=alone)
        self._parts: dict[tuple[str, ...], Risk] = {}
        self._agreed: Agreement | None = None
        if risk.places and risk.group is not None:
            self._agreed = Agreement(risk.group, "its part of a scan")

    def attempt(self, function: Callable[[], T]) -> T | None:
        """What a function of a pass returns.

        Where ranks go together, what it finds not to be finite at its end is told at the next pass.
        """
        if self._agreed is None:
            return function()
        return self._agreed.attempt(function, FloatingPointError)

    @property
    def alone(self) -> bool:
        """Whether examples go through the model one by one."""
        return self._watcher.alone

    def of(
        self, batch: Batch, directions: Callable[[Pass], Iterable[Direction]] | None = None
    ) -> Iterator[GradientPass]:
        """The passes of a batch, in the order of its examples.

        Args:
            batch: The batch.
            directions: What to take gradients of instead of the loss: several, for each pass.

        Raises:
            ValueError: If examples depend on each other, the batch cannot be split, the loss does
                not depend on the parameters, or its mean is over something unknown.
        """
        self._forget_counts()
        if self._agreed is not None:
            yield from self._in_step(batch, self._agreed)
            return
        for one in self._watcher.passes(batch):
            blocks = [b for b in self.blocks if b.layer is None or self._miscounted(b)]
            wanted = _of_loss(one) if directions is None else directions(one)
            for direction, last in with_last(wanted):
                outputs = one.gradients(direction, last=last and not blocks)
                yield GradientPass(one, outputs, self._whole(blocks, one, direction))
            one.require_unchanged()
            self._forget_counts()

    def _in_step(self, batch: Batch, agreed: Agreement) -> Iterator[GradientPass]:
        """The passes of a batch, as many as on the other ranks."""
        for one, counts in stepped_passes(self._watcher, batch, agreed):
            direction = agreed.attempt(partial(_first, _of_loss(one)))
            agreed.most()
            assert direction is not None
            odd = agreed.most(*(b.layer is None or self._miscounted(b) for b in self.blocks))
            outputs = one.gradients(direction, last=not any(odd))
            blocks = [b for b, own in zip(self.blocks, odd, strict=True) if own]
            whole = self._whole_in_step(blocks, one, direction, agreed)
            yield GradientPass(one, outputs, whole, counts)
            agreed.attempt(one.require_unchanged)
            agreed.most()
            self._forget_counts()

    def _whole_in_step(
        self, blocks: list[ScoreBlock], one: Pass, direction: Direction, agreed: Agreement
    ) -> dict[str, Tensor]:
        """As :meth:`_whole`, of all ranks together."""
        names = [name for block in blocks for name in block.names]
        if not names:
            return {}
        params = {name: self.risk.held.held[name] for name in names}
        like = self.risk.space.empty()
        rows = {name: like.new_zeros((one.examples, p.numel())) for name, p in params.items()}
        cotangents = [at_output(direction, one)]
        for i, _, found in stepped_rows(self.risk, params, one, cotangents, agreed):
            for name, gradient in found.items():
                rows[name][i] = gradient.reshape(-1)
        return {block.name: block.of_parameters(rows, self.risk.space.whole()) for block in blocks}

    def slices(self, block: int, make: Callable[[GradientPass, slice], T]) -> Iterator[T]:
        """What a function makes of at most ``block`` examples at a time, over all data, in order.

        The model is as it was whenever the caller has control.

        Args:
            block: Examples at a time.
            make: Function of a pass and of the place of examples in it.
        """
        batches = self.risk.batches()
        while True:
            with self.risk.untouched(first_order=True):
                batch = next(batches, None)
                if batch is None:
                    return
                stream = self.of(batch)
            while True:
                with self.risk.untouched(first_order=True):
                    found = next(stream, None)
                if found is None:
                    break
                for start in range(0, found.examples, block):
                    with self.risk.untouched(first_order=True):
                        made = make(found, slice(start, min(start + block, found.examples)))
                    yield made

    def _forget_counts(self) -> None:
        watcher = self._watcher
        watcher.calls = dict.fromkeys(watcher.calls, 0)
        watcher.uses.counts = {name: {} for name in watcher.uses.counts}

    def _whole(
        self, blocks: list[ScoreBlock], one: Pass, direction: Direction
    ) -> dict[str, Tensor]:
        """Gradients of blocks that their modules' inputs and outputs do not give."""
        names = tuple(name for block in blocks for name in block.names)
        if not names:
            return {}
        if names not in self._parts:
            self._parts[names] = self.risk.part(names)
        part = self._parts[names]
        rows = rest_rows(part, one, direction)
        every = rows.new_zeros((len(rows), self.risk.space.size))
        for name in names:
            every[:, self.risk.space.slice(name)] = rows[:, part.space.slice(name)]
        return {block.name: block.gather(every) for block in blocks}

    def _miscounted(self, block: ScoreBlock) -> bool:
        calls = self._watcher.calls[block.name]
        counts = self._watcher.uses.counts
        return any(sum(counts[name].values()) != calls for name in block.names)


def _first(directions: Iterator[Direction]) -> Direction:
    return next(directions)


def token_count(batch: Batch) -> int:
    """Tokens of each example of a batch: the entries of its first tensor's second axis.

    That is of integers ``[N, T]``, or of floating-point numbers ``[N, T, d]``. Examples of any
    other kind have no tokens, or rather one.
    """
    first = next(tensors(batch.data), None)
    if first is None or first.ndim != (3 if first.is_floating_point() else 2):
        return 1
    return int(first.shape[1])


def _of_loss(one: Pass) -> Iterator[Direction]:
    """The summed loss terms."""
    _require_known_mean(one)
    value = example_loss(one.batch, one.output)
    if not value.requires_grad:
        raise ValueError(
            f"the loss of batch {one.batch.index} cannot be differentiated: it was computed under "
            "torch.no_grad(), detached, or does not use any selected parameter; check forward=, "
            "loss= and params="
        )
    yield value, None


def _require_sum(one: Pass) -> None:
    """Raises ValueError if what is said to be a sum over examples is none, in the first batch."""
    if one.batch.index == 0 and isinstance(one.output, Tensor):
        with torch.no_grad():
            value = one.batch.risk.loss.total(one.output, one.batch.target, 1.0)
            message = misread_sum(one.batch, one.output, value)
        if message is not None:
            raise ValueError(message)


def _require_known_mean(one: Pass) -> None:
    """Raises ValueError if an example's share of an unknown mean is unknown, or a sum is none."""
    batch = one.batch
    risk = batch.risk
    if not risk.loss.known and risk.loss.reduction == "sum":
        _require_sum(one)
    settled = risk.take_weight is not None or risk.given_reduction is not None
    if risk.loss.known or risk.loss.reduction == "sum" or settled:
        return
    if batch.index == 0 and example_count(batch) == 1:
        return
    with torch.no_grad():
        message = misread_mean(
            batch, one.output, risk.loss.total(one.output, batch.target, batch.weight)
        )
    if message is not None:
        raise ValueError(message)
