r"""A fit of Kronecker factors to sharded parameters: ranks go through their batches together.

Of every sum, factor, basis and eigenvalue a rank holds the slice that
:mod:`curvlib.core.ranks.spread_blocks` gives it. Each batch's term of a layer is computed whole, by
every rank from its own batch, and summed over ranks into the slices; each factor is gathered to one
rank, decomposed there, and its eigenvectors are cut again. So a rank holds :math:`1/R` of
everything, and beside that one layer's factors or bases whole at a time.

For layers of ``O`` outputs and ``I`` inputs and ``c`` backward passes, of which the gradients of
``h`` are kept at a time (as many as ``HELD`` bytes allow), a rank sends :math:`(R - 1) / R` times

=============  =================================================================  ==============
pass           numbers                                                            how often
=============  =================================================================  ==============
both           :math:`(1 + c) \sum O I`: parameters, gathered                     for each batch
factors        :math:`\sum (\lceil c / h \rceil O^2 + I^2)`                        for each batch
eigenvectors   :math:`\frac 1 R \sum (O^2 + I^2)` in float64, and again as bases  once
eigenvalues    :math:`\lceil c / h \rceil \sum (O^2 + I^2 + O I)`                 for each batch
=============  =================================================================  ==============

A rank that has fewer batches, examples or directions than another goes through one of its own
again, which counts for nothing. What fails on one rank alone is told at the next exchange, and in
the middle of a pass by :mod:`curvlib.core.ranks.watch`: all raise. Checkpoints are written after
each pass, whole, so that any number of ranks goes on from them; a pass that is stopped is done
again.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from curvlib.core.batch import Batch
from curvlib.core.data import tensors
from curvlib.core.kronecker_blocks import Part
from curvlib.core.ranks.bundles import Bundle, own_sum
from curvlib.core.ranks.in_step import Agreement
from curvlib.core.ranks.spread_blocks import Cut, SpreadBlock, places_of
from curvlib.operators.factors.fit import Fit
from curvlib.operators.factors.pairs import Share, factor, miscounted, shares
from curvlib.operators.factors.ranks import SIDES
from curvlib.operators.factors.rows import Rows, decomposed_rows, trace_of_rows
from curvlib.operators.factors.slices import LayerSlices, StateSlices
from curvlib.operators.factors.state import FACTORS, FitState
from curvlib.operators.factors.sums import (
    HELD,
    Basis,
    EigenvalueSums,
    Gradients,
    Sums,
    add_gradients,
    add_inputs,
    factor_sums,
)
from curvlib.operators.factors.targets import Direction, counted_examples
from curvlib.operators.layers.factored import FactoredLayer
from curvlib.operators.layers.finite import require_finite
from curvlib.operators.layers.stepped_passes import at_output, stepped_passes, stepped_rows
from curvlib.operators.layers.uses import Pass

#: Gradients along some directions of a pass; ``None`` for one that only other ranks have.
Round = list[tuple[Direction, Gradients] | None]


class SteppedFit(Fit):
    """Steps of a fit of sharded parameters, which all ranks make together."""

    stepped = True

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        assert self.risk.group is not None
        self.group = self.risk.group
        self.slices = LayerSlices(self.all_layers, self.held, self.group, self.like)
        self.parts = StateSlices(self.slices)

    # ------------------------------------------------------------------ zeros of sums
    def _factor_zeros(self) -> Sums:
        sums: dict[str, Tensor] = {}
        counts: dict[str, float] = {}
        for layer in self.all_layers:
            for role in layer.roles:
                key = f"{layer.name}|{role}"
                counts[key] = 0.0
                for side in SIDES[role == "scale" :]:
                    sums[f"{key}|{side}"] = self.slices.zeros(self.slices.side(layer, side))
        return Sums(sums, counts)

    def _rest_zeros(self, name: str) -> Tensor:
        return self.slices.zeros(self.slices.rest(name).values)

    # ------------------------------------------------------------------------- batches
    def _from(self, state: FitState) -> Iterator[Batch]:
        own = super()._from(state)
        if state.phase == FACTORS and self.prefix is not None:
            own = self._holding(islice(own, self.prefix))
        return self.risk.stream.in_step(own)

    def _holding(self, own: Iterator[Batch]) -> Iterator[Batch]:
        for batch in own:
            self._held.append(batch)
            yield batch

    def _added(self, state: FitState, batch: Batch) -> FitState:
        agreed = Agreement(self.group, "its part of a fit")
        found = Sums(state.sums, dict(state.counts))
        try:
            assert self._watcher is not None
            for one, real in stepped_passes(self._watcher, batch, agreed):
                self._add(state, one, found, agreed, real=real)
        except BaseException:
            self._stream = None
            raise
        counted = agreed.attempt(lambda: self._counted(state, batch, found))
        agreed.most()
        assert counted is not None
        return counted

    def _rounds(self, state: FitState, one: Pass, agreed: Agreement) -> Iterator[Round]:
        """Gradients along all directions of a pass, some at a time, as often on each rank."""
        stream = self._directions(state, one)
        direction = agreed.attempt(lambda: next(stream, None))
        last: Direction | None = None
        held: Round = []
        size = 0
        (more,) = agreed.most(direction is not None)
        while more:
            last = direction or last
            gradients = one.gradients(_or_nothing(direction, last, one))
            size += sum(g.numel() * g.element_size() for g in gradients if g is not None)
            agreed.attempt(partial(require_finite, gradients, one, "gradients at the outputs"))
            held.append(None if direction is None else (direction, gradients))
            direction = agreed.attempt(lambda: next(stream, None))
            more, full = agreed.most(direction is not None, size >= HELD)
            if full or not more:
                yield held
                held, size = [], 0

    # --------------------------------------------------------------------------- sums
    def _add(
        self, state: FitState, one: Pass, found: Sums, agreed: Agreement, *, real: bool
    ) -> None:
        agreed.attempt(lambda: require_finite([use.x for use in one.uses], one, "inputs"))
        factors, first = state.phase == FACTORS, True
        if factors:
            kept = agreed.attempt(lambda: counted_examples(one.batch, one.output))
            one = one.keeping(kept)
        for held in self._rounds(state, one, agreed):
            for layer in self.layers(state):
                if factors:
                    self._add_factors_of(layer, one, held, found, agreed, real=real, first=first)
                elif self.settings.eigen_corrected:
                    self._add_eigenvalues_of(layer, state, one, held, agreed, real=real)
            if not factors:
                self._add_rest_of(state, one, held, agreed, real=real)
            first = False
        agreed.attempt(one.require_unchanged)

    def _add_factors_of(
        self,
        layer: FactoredLayer,
        one: Pass,
        held: Round,
        found: Sums,
        agreed: Agreement,
        *,
        real: bool,
        first: bool,
    ) -> None:
        reduce = self.settings.sharing == "reduce"
        whole = factor_sums([layer], self.like)

        def add() -> None:
            if first:
                add_inputs(layer, one, whole, reduce=reduce)
            for k, own in enumerate(held):
                if own is not None:
                    begins = first and k == 0
                    add_gradients(layer, one, own[1], whole, reduce=reduce, first=begins)

        if real:
            agreed.attempt(add)
        keys = [key for key in whole.tensors if first or not key.endswith("|matrix|right")]
        slices = tuple(self.slices.side(layer, key.rpartition("|")[2]) for key in keys)
        sums = Bundle(slices, self.group).own_sums([whole.tensors[key] for key in keys])
        for key, own in zip(keys, sums, strict=True):
            found.tensors[key] += own
        for key, count in whole.counts.items():
            found.counts[key] += count

    def _add_eigenvalues_of(
        self,
        layer: FactoredLayer,
        state: FitState,
        one: Pass,
        held: Round,
        agreed: Agreement,
        *,
        real: bool,
    ) -> None:
        whole = self.like.new_zeros(layer.shape)
        adder = EigenvalueSums([layer], {layer.name: self._bases(state, layer)}, len(held))

        def add() -> None:
            for own in held:
                if own is not None:
                    adder.add(layer, one, own[1], whole)

        if real:
            agreed.attempt(add)
        state.sums[layer.name] += own_sum(whole, self.slices.cut(layer).values, self.group)

    def _bases(self, state: FitState, layer: FactoredLayer) -> Basis:
        """The eigenvectors of a layer, whole."""
        sides = [side for side in SIDES if f"{layer.name}|{side}" in state.bases]
        if not sides:
            return None, None
        bundle = Bundle(tuple(self.slices.side(layer, side) for side in sides), self.group)
        own = [state.bases[f"{layer.name}|{side}"] for side in sides]
        found = dict(zip(sides, bundle.gathered(own), strict=True))
        return found.get("left"), found.get("right")

    def _add_rest_of(
        self, state: FitState, one: Pass, held: Round, agreed: Agreement, *, real: bool
    ) -> None:
        """Adds squares of gradients by uncovered parameters, each example alone."""
        names = list(state.uncovered)
        if not names or self.settings.rest != "diagonal":
            return
        cotangents = [at_output(None if own is None else own[0], one) for own in held]
        params = {name: self.held.params[name] for name in state.uncovered}
        sums = {name: self.like.new_zeros((1, 1, p.numel())) for name, p in params.items()}
        for _, _, gradients in stepped_rows(self.risk, params, one, cotangents, agreed):
            for name, own in gradients.items() if real else ():
                sums[name] += own.square().reshape(1, 1, -1)
        for name, total in sums.items():
            cut = self.slices.rest(name)
            state.sums[f"{name}|rest"] += own_sum(total, cut.values, self.group)

    # ------------------------------------------------------------------ ends of passes
    def _factorized(self, state: FitState) -> FitState:
        weight = self._positive(state)
        uncovered = dict(state.uncovered)
        traces = self._traces(state)
        rows: dict[str, Rows] = {}
        corrected: dict[str, Tensor] = {}
        for layer in self.layers(state):
            reason = miscounted(layer, state.calls, state.uses)
            parts = None if reason else shares(layer, traces, state.counts, weight)
            if parts is None:
                uncovered.update(self._without(layer, reason))
                continue
            for side, own in zip(SIDES, parts, strict=True):
                rows[f"{layer.name}|{side}"] = self._rows(state, layer, side, own)
            if self.settings.eigen_corrected:
                corrected[layer.name] = self.slices.zeros(self.slices.cut(layer).values)
        values, bases = decomposed_rows(rows, self.like, self.group)
        return self._after_factors(state, (corrected, bases, values), uncovered)

    def _traces(self, state: FitState) -> dict[str, float]:
        keys = [key for layer in self.layers(state) for key in state.sums if _is_of(key, layer)]
        by_name = {layer.name: layer for layer in self.all_layers}
        own = []
        for key in keys:
            name, _, side = key.rsplit("|", 2)
            own.append(
                trace_of_rows(state.sums[key], self.slices.side(by_name[name], side), self.group)
            )
        found: list[float] = self.group.add(torch.stack(own)).tolist()
        return dict(zip(keys, found, strict=True))

    def _rows(self, state: FitState, layer: FactoredLayer, side: str, parts: list[Share]) -> Rows:
        slices, sums = self.slices.side(layer, side), state.sums
        shape = slices.local(self.group.rank, self.group.size)

        def made() -> Tensor:
            found = factor(parts, sums, shape)
            for part in parts:  # they are not needed any more
                if part.key is not None:
                    del sums[part.key]
            return found

        return Rows(slices, made)

    def blocks(self, state: FitState) -> list[Any]:
        """The blocks with the eigenvalues of the Kronecker products."""
        found = []
        for layer in self.layers(state):
            left, right = (state.values[f"{layer.name}|{side}"] for side in SIDES)
            cut = self.slices.cut(layer)
            low, high = cut.values.bounds(self.group.rank, self.group.size)
            if cut.axis < 2:
                left = left.narrow(cut.axis, low, high - low)
            if cut.axis != 1:
                right = right.narrow(min(cut.axis, 1), low, high - low)
            values = (left[:, :, None] * right[:, None, :]).to(self.settings.dtype)
            bases = [state.bases.get(f"{layer.name}|{side}") for side in SIDES]
            found.append(self._block(layer.name, layer.parts, bases, values, cut))
        return found

    def rest_blocks(self, state: FitState) -> list[Any]:
        """Diagonal blocks of what is in no layer, where they were asked for."""
        found = []
        for name in state.uncovered:
            values = state.sums.get(f"{name}|rest")
            if values is not None:
                size = self.held.params[name].numel()
                parts = (Part(self.held.space.slice(name).start, size),)
                cut = self.slices.rest(name)
                found.append(self._block(f"{name} (diagonal)", parts, [None, None], values, cut))
        return found

    def _block(
        self,
        name: str,
        parts: tuple[Part, ...],
        bases: list[Tensor | None],
        values: Tensor,
        cut: Cut,
    ) -> SpreadBlock:
        places = places_of(parts, cut.shape, self.risk.space)
        return SpreadBlock(name, parts, places, bases[0], bases[1], values, cut, self.group)


def _is_of(key: str, layer: FactoredLayer) -> bool:
    return key.rsplit("|", 2)[0] == layer.name


def _or_nothing(direction: Direction | None, last: Direction | None, one: Pass) -> Direction:
    """A direction, or zero times the last one, along which a rank goes because others do."""
    if direction is not None:
        return direction
    tensor = next(tensors(one.output)) if last is None else last[0]
    return tensor, torch.zeros_like(tensor)
