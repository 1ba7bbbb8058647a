r"""Records what factored layers get and give while a model trains, for optimizers that need it.

Hooks on the layers note their inputs :math:`a`, and hooks on their outputs the gradients
:math:`\hat g` that the user's own backward pass brings there. Nothing runs a second time, and
between :meth:`LayerRecorder.stop` and :meth:`LayerRecorder.start` there is no hook at all.

Gradients are as the backward pass brings them: :mod:`curvlib.operators.layers.recorded` has the
scale.

Sampled Fisher. When the user's backward pass reaches the output of the model, targets are drawn
from the output's own distribution, and their scores are pulled back through the same graph to the
layers' outputs; the graph is then there still, and so this works with ``loss.backward()``, too.

A pass is handed over when its gradients have come and the next forward pass begins, or by
:meth:`LayerRecorder.flush`. Up to 8 passes wait for theirs. Under ``torch.no_grad``, and in
reentrant checkpointing, nothing is recorded. Examples lie along the first axis of the model's input
and of the layers' inputs (or folded into it, example after example); where that matters
(``apart``), another order is found (:mod:`curvlib.operators.layers.row_order`), and
:meth:`Recorded.aligned` says whether there is one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from curvlib.core.data import describe, tensors
from curvlib.core.forward import has_compiled
from curvlib.core.loss import Loss
from curvlib.core.space import ParamSelection, ParamSpace, select
from curvlib.operators.coverage import Coverage, coverage_of
from curvlib.operators.layers.factored import factored_layers
from curvlib.operators.layers.hidden_calls import HiddenReplay, distinct, layers_inside
from curvlib.operators.layers.open_pass import NotedCall, OpenPass
from curvlib.operators.layers.parameters import Chosen
from curvlib.operators.layers.recorded import Recorded
from curvlib.operators.layers.recorder_hooks import (
    GradientHook,
    ModuleHook,
    detached,
    in_backward,
    remove,
)
from curvlib.operators.layers.row_order import RowOrder
from curvlib.operators.layers.unseen import ModuleCall
from curvlib.operators.layers.use import Use
from curvlib.operators.live.labels import pulled_back, require_samplable, require_terms

_WAITING = 8


class LayerRecorder:
    """Records inputs of factored layers and gradients at their outputs.

    Args:
        model: The model that trains.
        params: Parameters: see :func:`curvlib.core.space.select`. Frozen ones have no layer.
        sink: Called with each pass that is complete.
        loss: The loss that the user minimizes, if its terms matter: with it, ``terms`` are those
            of the loss (of cross-entropy the places whose gradient is not zero: ignored targets
            have none); without, the examples.
        sampled: Whether to pull back scores of sampled labels, too.
        seed: Of these; they depend on what an example holds, not on its batch.
        output: Function of what the model returns, to the tensor that the loss reads.
        dense_norms: As in :func:`curvlib.kfac`.
        max_side: As in :func:`curvlib.kfac`.
        gates: Whether the gates of recurrent modules have one left factor, ``"joint"``, or one
            each, ``"separate"``.
        apart: Of which layers rows have to be told apart by example: ``"none"``, ``"scales"`` or
            ``"all"``.

    Attributes:
        layers: The factored layers.
        uncovered: Why each of the other parameters is in none.
        draw: Number of the draw of sampled labels; the owner counts it on.
        on: Whether it records.
        lending: A block in which calls of modules are run again, where their parameters are
            sharded.

    Raises:
        TypeError: If ``model`` is no module.
        ValueError: If the model is compiled, no parameter is selected, or there is no sampled
            Fisher of this loss.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> found = []
        >>> recorder = LayerRecorder(model, sink=found.append)
        >>> recorder.start()
        >>> model(torch.ones(3, 2)).mean().backward()
        >>> recorder.flush()
        >>> found[0].uses[0].x.shape, found[0].gradients[0].shape
        (torch.Size([3, 2]), torch.Size([3, 1]))
        >>> recorder.close()
    """

    def __init__(
        self,
        model: nn.Module,
        params: ParamSelection = None,
        *,
        sink: Callable[[Recorded], None],
        loss: Loss | None = None,
        sampled: bool = False,
        seed: int = 0,
        output: Callable[[Any], Any] | None = None,
        dense_norms: bool = False,
        max_side: int = 8192,
        gates: str = "joint",
        apart: str = "none",
    ) -> None:
        chosen = select(model, params)
        if has_compiled(model):
            raise ValueError(
                "hooks on layers do not run inside torch.compile; pass the model before it is "
                "compiled, and do not compile it"
            )
        require_terms(loss)
        if sampled:
            require_samplable(loss)
        self.model = model
        self.sink = sink
        self.loss = loss
        self.sampled = sampled
        self.seed = seed
        self.draw = 0
        self.output = output
        self._held = Chosen(model, chosen, ParamSpace.from_named(chosen))
        layers, uncovered = factored_layers(
            self._held, dense_norms=dense_norms, max_side=max_side, gates=gates
        )
        self.layers = tuple(layers)
        self.uncovered = uncovered
        self.replays = [HiddenReplay(m, own) for m, own in layers_inside(layers).items()]
        self.order = RowOrder.of(layers, apart)
        self._handles: list[RemovableHandle] = []
        self._passes: list[OpenPass] = []
        self.pulling = False
        self.lending: Callable[[], AbstractContextManager[None]] = nullcontext

    # ------------------------------------------------------------------ switches
    @property
    def on(self) -> bool:
        """Whether it records."""
        return bool(self._handles)

    def start(self) -> None:
        """Puts hooks on the model, if there are none."""
        if self.on:
            return
        me = weakref.ref(self)
        handles = self._handles
        weakref.finalize(self, remove, handles).atexit = False
        model = self.model
        begin = ModuleHook(me, "_begin")
        handles.append(model.register_forward_pre_hook(begin, prepend=True, with_kwargs=True))
        for layer in self.layers:
            for module, role in () if layer.maps else layer.modules:
                note = ModuleHook(me, "_note", layer.name, role)
                handles.append(module.register_forward_hook(note, prepend=True, with_kwargs=True))
        for replay in self.replays:
            note = ModuleHook(me, "_note_replay", replay)
            handles.append(
                replay.module.register_forward_hook(note, prepend=True, with_kwargs=True)
            )
        handles.append(model.register_forward_hook(ModuleHook(me, "_end")))

    def stop(self) -> None:
        """Takes the hooks off, and forgets passes that have not been handed over."""
        remove(self._handles)
        self._passes.clear()

    close = stop

    def flush(self) -> None:
        """Hands over passes whose gradients have come, and forgets the others."""
        self.hand_over()
        self._passes.clear()

    @property
    def params(self) -> Mapping[str, Tensor]:
        """The parameters, by name."""
        return self._held.params

    @property
    def space(self) -> ParamSpace:
        """Their space."""
        return self._held.space

    @property
    def dtype(self) -> torch.dtype:
        """Type that sums over rows need: float64 for a model of float64, else float32."""
        return self._held.space.dtype

    def coverage(self) -> Coverage:
        """Which parameters are in factored layers, and why the others are not."""
        return coverage_of(self.model, self._held.params, self.uncovered)

    # --------------------------------------------------------------------- hooks
    def _begin(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled() and not in_backward():
            self._open((args, kwargs))

    def _open(self, inputs: Any) -> OpenPass:
        self.hand_over()
        del self._passes[: max(0, len(self._passes) - _WAITING + 1)]
        first = next((t for t in tensors(inputs) if t.ndim), None)
        count = None if first is None else first.shape[0]
        found = OpenPass(examples=count, inputs=inputs if self.sampled else None)
        self._passes.append(found)
        return found

    def _current(self, inputs: Any) -> OpenPass:
        """The pass that a call belongs to: layers may be called outside of the model's call."""
        if self._passes and not self._passes[-1].reached:
            return self._passes[-1]
        return self._open(inputs)

    def _note(
        self, layer: str, role: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor
    ) -> None:
        if not (torch.is_grad_enabled() and output.requires_grad) or in_backward():
            return
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        found = self._current((args, kwargs))
        use = Use(layer, module, role, x, x._version, None, tuple(output.shape), None)
        slots = self._watched(found, [output], edges=self.order.unclear(use, found.examples))
        found.calls.append(NotedCall(use, None, slots))

    def _note_replay(
        self, replay: HiddenReplay, _: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> Any:
        if not torch.is_grad_enabled() or in_backward():
            return None
        taken = distinct(replay.module, output)
        outputs = tuple(tensors(output if taken is None else taken))
        found = self._current((args, kwargs))
        own = ModuleCall(detached(args), detached(kwargs), detached(outputs))
        found.calls.append(NotedCall(None, (replay, own), self._watched(found, outputs)))
        return taken

    def _watched(self, found: OpenPass, outputs: Sequence[Tensor], *, edges: bool = False) -> slice:
        """Watches for gradients at outputs of a call; where they will be found."""
        start = len(found.gradients)
        for tensor in outputs:
            wanted = (self.sampled or edges) and tensor.requires_grad
            edge = get_gradient_edge(tensor) if wanted else None
            index = len(found.gradients)
            found.edges.append(edge)
            found.gradients.append(None)
            if tensor.requires_grad:
                tensor.register_hook(GradientHook(weakref.ref(self), weakref.ref(found), index))
        return slice(start, len(found.gradients))

    def _end(self, _: nn.Module, __: Any, output: Any) -> None:
        if not torch.is_grad_enabled() or not self._passes or in_backward():
            return
        found = self._passes[-1]
        self._find_order(found, output)
        if self.sampled or self.loss is not None:
            found.output = output
            me, own = weakref.ref(self), weakref.ref(found)
            for i, tensor in enumerate(tensors(output)):
                if tensor.requires_grad:
                    tensor.register_hook(GradientHook(me, own, i, of_output=True))

    def _find_order(self, found: OpenPass, output: Any) -> None:
        n, unclear = found.examples, []
        for call in found.calls:
            edge = found.edges[call.slots.start] if call.use is not None else None
            if call.use is not None and edge is not None and self.order.unclear(call.use, n):
                unclear.append((call.use, edge))
        if unclear and n is not None:
            self.pulling = True
            try:
                self.order.find(output, unclear, n)
            finally:
                self.pulling = False
        if not self.sampled:
            found.edges = [None] * len(found.edges)

    # ----------------------------------------------------------------- gradients
    def arrived(self, found: OpenPass, index: int, gradient: Tensor) -> None:
        """A gradient at the output of a layer."""
        before = found.gradients[index]
        found.reached = True
        found.gradients[index] = gradient.detach() if before is None else before + gradient

    def arrived_at_output(self, found: OpenPass, index: int, gradient: Tensor) -> None:
        """A gradient at an output of the model: labels are drawn at the first."""
        if found.terms is not None:
            return
        assert self.loss is not None
        edges = found.edges
        with torch.enable_grad():  # which is off in a backward pass
            output = self._readable(found.output)
        self.pulling = True
        try:
            found.terms, sampled = pulled_back(
                self.loss,
                output,
                (list(tensors(found.output))[index], gradient),
                [edge for edge in edges if edge is not None],
                content=found.inputs,
                examples=found.examples or 1,
                seed=f"{self.seed}|{self.draw}",
                sampled=self.sampled,
            )
        finally:
            self.pulling = False
        if sampled is not None:
            own = iter(sampled)
            found.sampled = [None if edge is None else next(own) for edge in edges]
            found.reached = True

    def _readable(self, output: Any) -> Tensor:
        out = output if self.output is None else self.output(output)
        if not isinstance(out, Tensor):
            raise TypeError(
                f"the sampled Fisher reads the output as one tensor, but got {describe(out)}; pass "
                "output=lambda out: out.logits or alike"
            )
        return out

    def hand_over(self) -> None:
        """Hands over passes whose gradients have come."""
        done = [found for found in self._passes if found.reached]
        if not done:
            return
        self.forget_reached()
        lent = self.lending() if self.replays else nullcontext()
        with torch.no_grad(), torch.autocast(self._held.space.device.type, enabled=False), lent:
            for found in done:
                self.sink(self._recorded(found))

    def forget_reached(self) -> None:
        """Forgets passes whose gradients have come, for they are set to zero."""
        self._passes = [found for found in self._passes if not found.reached]

    def _recorded(self, found: OpenPass) -> Recorded:
        sets = [found.gradients] if found.sampled is None else [found.gradients, found.sampled]
        uses: list[Use] = []
        gradients: list[list[Tensor | None]] = [[] for _ in sets]
        for call in found.calls:
            given = [own[call.slots] for own in sets]
            if call.use is not None:
                use, turned = self.order.turned(call.use, [own[0] for own in given])
                uses.append(use)
                for mine, one in zip(gradients, turned, strict=True):
                    mine.append(one)
            if call.replay is not None:
                replay, own_call = call.replay
                for inner in replay.rows(own_call, given):
                    x = inner.inputs
                    shape = tuple(inner.gradients[0].shape)
                    use = Use(
                        inner.layer, replay.module, "matrix", x, x._version, None, shape, inner.keep
                    )
                    uses.append(replace(use, given=True))
                    for mine, one in zip(gradients, inner.gradients, strict=True):
                        mine.append(one)
        for use in uses:
            if use.x._version != use.version:
                raise RuntimeError(
                    f"the input of layer {use.layer!r} was changed in place after the layer had "
                    "read it, so its curvature is lost; replace the in-place operation (x += y, "
                    "inplace=True) by x = x + y"
                )
        count = found.examples
        if count is None:
            count = uses[0].x.shape[0] if uses and uses[0].x.ndim else 1
        device = self._held.space.device
        terms = torch.tensor(float(count), dtype=torch.float64, device=device)
        return Recorded(
            tuple(uses),
            tuple(gradients[0]),
            tuple(gradients[1]) if len(gradients) > 1 else None,
            count,
            terms if found.terms is None else found.terms.to(device),
            self.loss is not None and self.loss.reduction == "sum",
            frozenset(
                call.use.layer
                for call in found.calls
                if call.use is not None and self.order.mixed(call.use, count)
            ),
        )
