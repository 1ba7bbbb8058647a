"""Fits Kronecker factors and corrected eigenvalues, batch by batch.

In two passes over the data; or in one, with factors of a prefix
(:mod:`curvlib.operators.factors.prefix`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from curvlib.core.batch import Batch
from curvlib.core.kronecker_blocks import KroneckerBlock, Part
from curvlib.core.ranks.file_parts import StateParts
from curvlib.core.risk import Risk
from curvlib.core.run import Progress, Report, run
from curvlib.operators.batch_examples import example_count
from curvlib.operators.factors.pairs import factors, miscounted
from curvlib.operators.factors.prefix import replayed
from curvlib.operators.factors.ranks import SIDES, decomposed, fitted_by_ranks
from curvlib.operators.factors.rest import rest_rows
from curvlib.operators.factors.state import DONE, EIGENVALUES, FACTORS, FitSettings, FitState
from curvlib.operators.factors.sums import (
    Basis,
    EigenvalueSums,
    Sums,
    add_gradients,
    add_inputs,
    factor_sums,
)
from curvlib.operators.factors.targets import Direction, counted_examples, directions
from curvlib.operators.layers.factored import FactoredLayer
from curvlib.operators.layers.finite import require_finite
from curvlib.operators.layers.parameters import whole_parameters
from curvlib.operators.layers.row_masks import Mask
from curvlib.operators.layers.uses import Pass, Watcher, with_last


class Fit:
    """Steps of a fit: see :func:`fitted`."""

    stepped = False  # whether ranks go through batches together
    parts: StateParts | None = None  # how files hold states of which ranks have slices

    def __init__(
        self,
        risk: Risk,
        layers: Sequence[FactoredLayer],
        uncovered: dict[str, str],
        settings: FitSettings,
        mask: Mask | None,
        *,
        safe: bool,
    ) -> None:
        self.risk = risk
        self.held = whole_parameters(risk)
        self.all_layers = list(layers)
        self.first_uncovered = uncovered
        self.settings = settings
        self.mask = mask
        self.safe = safe  # whether a step that fails leaves the state as it was
        self.like = torch.empty(0, dtype=settings.dtype, device=risk.space.device)
        self._stream: Iterator[Batch] | None = None
        self._source: Iterator[Batch] | None = None  # of the data, and
        self._held: list[Batch] = []  # what was read of it, where that is needed again
        self._at = (-1, -1)
        self._watcher: Watcher | None = None
        self._adder: EigenvalueSums | None = None
        self.total: int | None = None if risk.in_memory is None else len(risk.in_memory)
        self.prefix = settings.prefix  # batches of this rank that factors are of

    def _factor_zeros(self) -> Sums:
        return factor_sums(self.all_layers, self.like)

    def _rest_zeros(self, name: str) -> Tensor:
        return self.like.new_zeros(self.held.params[name].numel())

    # ------------------------------------------------------------------- steps
    def init(self) -> FitState:
        """The state before the first batch."""
        sums = self._factor_zeros()
        calls = dict.fromkeys((layer.name for layer in self.all_layers), 0)
        return FitState(
            phase=FACTORS,
            batch=0,
            weight=0.0,
            examples=0,
            before=0,
            sums=sums.tensors,
            counts=sums.counts,
            calls=calls,
            uses={name: {} for layer in self.all_layers for name in layer.names},
            alone=False,
            bases={},
            values={},
            uncovered=dict(self.first_uncovered),
        )

    def step(self, state: FitState) -> FitState:
        """One batch more, or, where the pass is at its end, what follows from its sums."""
        if state.ended:
            return self.concluded(state)
        if state.phase == FACTORS and state.batch == self.prefix and not self.stepped:
            return replace(state, ended=True)
        with self.risk.untouched(first_order=True), self.risk.held.gathering():
            batch = self._next(state)
            if batch is not None:
                return self._added(state, batch)
        self.total = state.batch
        return replace(state, ended=True)

    def concluded(self, state: FitState) -> FitState:
        """The state after a pass, from its sums over all data."""
        state = replace(state, ended=False)
        return self._factorized(state) if state.phase == FACTORS else self._normalized(state)

    def report(self, state: FitState) -> Report:
        """What is done, in batches."""
        own, prefix = self.settings, self.prefix
        first = self.total if prefix is None else min(prefix, self.total or prefix)
        total = None if self.total is None else self.total + (first or 0)
        total = total if own.eigen_corrected else self.total
        before = (first or 0) if own.eigen_corrected and state.phase != FACTORS else 0
        done = total if state.phase == DONE and total is not None else before + state.batch
        note = ("factors", "eigenvalues", "done")[state.phase]
        return float(done), None if total is None else float(total), note

    def layers(self, state: FitState) -> list[FactoredLayer]:
        """The layers that are covered, as far as is known."""
        return [
            layer
            for layer in self.all_layers
            if not any(name in state.uncovered for name in layer.names)
        ]

    def _next(self, state: FitState) -> Batch | None:
        if self._stream is None or self._at != (state.phase, state.batch):
            self._stream = self._from(state)
            self._watcher = Watcher(self.risk, self.layers(state), self.mask, alone=state.alone)
            self._watcher.calls = dict(state.calls)
            self._watcher.uses.counts = {name: dict(own) for name, own in state.uses.items()}
            self._adder = None
        batch = next(self._stream, None)
        self._at = (state.phase, state.batch + 1)
        if batch is None:
            self._stream = None
        elif state.phase == FACTORS and self.prefix is not None and not self.stepped:
            self._held.append(batch)
        return batch

    def _from(self, state: FitState) -> Iterator[Batch]:
        """Batches from that of a state on."""
        if state.phase == EIGENVALUES and self._held and self._source is not None:
            held, self._held = self._held, []
            return replayed(held, self._source)
        self._source = self.risk.stream.own()
        skipped = [next(self._source) for _ in range(state.batch)]
        self._held = skipped if state.phase == FACTORS and self.prefix else []
        return self._source

    def _added(self, state: FitState, batch: Batch) -> FitState:
        assert self._watcher is not None
        # a step that fails half-way must not leave half of a batch in a checkpoint
        sums = {k: torch.zeros_like(v) for k, v in state.sums.items()} if self.safe else state.sums
        found = Sums(sums, dict(state.counts))
        try:
            for one in self._watcher.passes(batch):
                require_finite([use.x for use in one.uses], one, "inputs")
                if state.phase == FACTORS:
                    kept = counted_examples(one.batch, one.output)
                    self._add_factors(state, one.keeping(kept), found)
                else:
                    self._add_eigenvalues(state, one, found.tensors)
        except BaseException:
            self._stream = None  # the next step, if there is one, begins with this batch again
            raise
        if self.safe:
            for name, total in state.sums.items():
                total += sums[name]
        return self._counted(state, batch, found)

    def _counted(self, state: FitState, batch: Batch, found: Sums) -> FitState:
        """The state after a batch whose terms have been added."""
        assert self._watcher is not None
        weight = 0.0 if self.risk.loss.reduction == "sum" else float(batch.weight)
        return replace(
            state,
            batch=state.batch + 1,
            weight=state.weight + weight,
            examples=state.examples + (0 if batch.lent else example_count(batch)),
            counts=found.counts,
            calls=dict(self._watcher.calls),
            uses={name: dict(own) for name, own in self._watcher.uses.counts.items()},
            alone=self._watcher.alone,
        )

    def _directions(self, state: FitState, one: Pass) -> Iterator[Direction]:
        own = self.settings
        seed = f"{own.seed}|{state.phase}"  # fresh targets for the second pass
        yield from directions(one.batch, one.output, own.fisher, own.samples, seed)

    def _add_factors(self, state: FitState, one: Pass, sums: Sums) -> None:
        reduce = self.settings.sharing == "reduce"
        layers = self.layers(state)
        for layer in layers:
            add_inputs(layer, one, sums, reduce=reduce)
        for k, (direction, last) in enumerate(with_last(self._directions(state, one))):
            gradients = one.gradients(direction, last=last)
            require_finite(gradients, one, "gradients at the outputs")
            for layer in layers:
                add_gradients(layer, one, gradients, sums, reduce=reduce, first=k == 0)
        one.require_unchanged()

    def _add_eigenvalues(self, state: FitState, one: Pass, sums: dict[str, Tensor]) -> None:
        layers = self.layers(state)
        if self._adder is None:
            many = {"type2": 8, "mc": self.settings.samples, "empirical": 1}
            bases: dict[str, Basis] = {layer.name: _basis(state, layer.name) for layer in layers}
            self._adder = EigenvalueSums(layers, bases, many[self.settings.fisher])
        rest = self.settings.rest == "diagonal" and bool(state.uncovered)
        for direction, last in with_last(self._directions(state, one)):
            gradients = one.gradients(direction, last=last and not rest)
            if self.settings.eigen_corrected:
                for layer in layers:
                    self._adder.add(layer, one, gradients, sums[layer.name])
            self._add_rest(state, one, direction, sums)
        self._adder.forget()
        one.require_unchanged()

    def _add_rest(
        self, state: FitState, one: Pass, direction: Direction, sums: dict[str, Tensor]
    ) -> None:
        """Adds squares of gradients by the uncovered parameters, which get a diagonal."""
        names = list(state.uncovered)
        if not names or self.settings.rest != "diagonal":
            return
        part = self.risk.part(names)
        squares = part.space.split(rest_rows(part, one, direction).square().sum(0))
        for name, square in zip(part.space.names, squares, strict=True):
            sums[f"{name}|rest"] += square.reshape(-1)

    # --------------------------------------------------------------- ends of passes
    def _factorized(self, state: FitState) -> FitState:
        weight = self._positive(state)
        uncovered = dict(state.uncovered)
        corrected: dict[str, Tensor] = {}
        pairs: dict[str, Tensor] = {}
        for layer in self.layers(state):
            reason = miscounted(layer, state.calls, state.uses)
            pair = None if reason else factors(layer, state.sums, state.counts, weight)
            if pair is None:
                uncovered.update(self._without(layer, reason))
                continue
            pairs |= {f"{layer.name}|{side}": p for side, p in zip(SIDES, pair, strict=True)}
            if self.settings.eigen_corrected:
                corrected[layer.name] = self.like.new_zeros(layer.shape)
        values, bases = decomposed(pairs, self.settings.dtype, self.risk.group)
        return self._after_factors(state, (corrected, bases, values), uncovered)

    def _without(self, layer: FactoredLayer, reason: str) -> dict[str, str]:
        """Why the parameters of a layer that has no factors are in none."""
        reason = reason or "no row of its inputs counts, or no gradient reaches it"
        reason += "" if self.settings.prefix is None else " (in the prefix)"
        return dict.fromkeys(layer.names, reason)

    def _after_factors(
        self,
        state: FitState,
        found: tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]],
        uncovered: dict[str, str],
    ) -> FitState:
        """The state before the second pass: zeros, eigenvectors and eigenvalues of factors."""
        corrected, bases, values = found
        if self.settings.rest == "diagonal":
            for name in uncovered:
                corrected[f"{name}|rest"] = self._rest_zeros(name)
        self._stream = None
        return replace(
            state,
            phase=EIGENVALUES if corrected else DONE,
            batch=0,
            weight=0.0,
            examples=0,
            before=state.examples,
            sums=corrected,
            bases=bases,
            values=values,
            uncovered={n: uncovered[n] for n in self.risk.space.names if n in uncovered},
        )

    def _normalized(self, state: FitState) -> FitState:
        weight = self._positive(state)
        sums = {k: v / weight for k, v in state.sums.items()}
        return replace(state, phase=DONE, sums=sums, values=self._of_all(state))

    def _of_all(self, state: FitState) -> dict[str, Tensor]:
        """Eigenvalues of the factors of a prefix, scaled to all data where they are sums.

        Raises:
            ValueError: If a layer is used otherwise after the prefix.
        """
        if self.settings.prefix is None:
            return state.values
        for layer in self.layers(state):
            reason = miscounted(layer, state.calls, state.uses)
            if reason:
                raise ValueError(
                    f"after the prefix, layer {layer.name!r} is used otherwise: {reason}; fit "
                    "without prefix=, or leave it out with params="
                )
        scale = state.examples / state.before if self.risk.loss.reduction == "sum" else 1.0
        return {k: v * scale if k.endswith("|left") else v for k, v in state.values.items()}

    def _positive(self, state: FitState) -> float:
        if self.risk.loss.reduction == "sum":
            return 1.0
        if not state.weight > 0.0:
            raise ValueError(
                "no loss term is valid: every target is ignored, or all weights are zero; "
                "check ignore_index, class weights and weight="
            )
        return state.weight

    # ------------------------------------------------------------------------ blocks
    def blocks(self, state: FitState) -> list[Any]:
        """The blocks with the eigenvalues of the Kronecker products."""
        blocks = []
        for layer in self.layers(state):
            left, right = (state.values[f"{layer.name}|{side}"] for side in SIDES)
            values = (left[:, :, None] * right[:, None, :]).to(self.settings.dtype)
            bases = _basis(state, layer.name)
            blocks.append(KroneckerBlock(layer.name, layer.parts, *bases, values))
        return blocks

    def rest_blocks(self, state: FitState) -> list[Any]:
        """Diagonal blocks of what is in no layer, where they were asked for."""
        return [
            KroneckerBlock(
                f"{name} (diagonal)",
                (Part(self.held.space.slice(name).start, self.held.params[name].numel()),),
                None,
                None,
                state.sums[f"{name}|rest"].view(1, 1, -1),
            )
            for name in state.uncovered
            if f"{name}|rest" in state.sums
        ]


def fitted(
    fit: Fit,
    *,
    checkpoint: str | os.PathLike[str] | None,
    save_every: float,
    progress: Progress,
) -> FitState:
    """Runs a fit to its end, from a checkpoint where there is one."""
    settings = {
        name: str(value) if isinstance(value, torch.dtype) else value
        for name, value in vars(fit.settings).items()
    }
    settings |= {"mask": fit.mask is not None}
    if fit.risk.group is not None:
        return fitted_by_ranks(fit, fit.risk.group, settings, checkpoint, save_every, progress)
    return run(
        fit.init,
        fit.step,
        state_type=FitState,
        done=lambda state: state.phase == DONE,
        report=fit.report,
        title="K-FAC",
        checkpoint=checkpoint,
        problem=fit.risk.fingerprint,
        settings=settings,
        device=fit.risk.space.device,
        save_every=save_every,
        progress=progress,
    )


def _basis(state: FitState, name: str) -> Basis:
    return state.bases.get(f"{name}|left"), state.bases.get(f"{name}|right")
