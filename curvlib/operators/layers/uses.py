r"""What layers get and give in a forward pass, example by example.

Hooks note the inputs of factored layers, and the edges of the graph at their outputs, at which
gradients are asked for afterwards (an edge stays where it is when the output is changed in place).
Modules with linear maps inside are run again in the open:
:mod:`curvlib.operators.layers.hidden_calls`.

The gradient of example ``n`` is a sum over the *rows* of a layer's input that belong to it, so it
must be known which do. A layer whose input has the examples along its first axis (or folded into
it, example after example) is recognized, and the recognition is *verified* for each new
combination of shapes (for each batch, if the model sorts by values): the last example alone must
give the layer the same rows. Where rows are arranged otherwise (time first), or are selected by
their values (tokens routed to experts), examples go through the model one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from curvlib.core.batch import Batch
from curvlib.core.data import tensors
from curvlib.core.ranks.watch import NoAnswerError
from curvlib.core.risk import Risk
from curvlib.operators.batch_examples import example_count, one_example
from curvlib.operators.factors.targets import Direction
from curvlib.operators.layers.factored import FactoredLayer
from curvlib.operators.layers.hidden_calls import (
    HiddenCall,
    HiddenUse,
    distinct,
    layers_inside,
    noted,
)
from curvlib.operators.layers.inputs import positions
from curvlib.operators.layers.row_checks import among, close, last_rows
from curvlib.operators.layers.row_masks import Mask, mask_at, row_mask
from curvlib.operators.layers.use import Use, Uses
from curvlib.operators.layers.weight_uses import WeightUses


@dataclass(frozen=True, eq=False)
class Pass(Uses):
    """A forward pass of a batch, or of one of its examples.

    Attributes:
        batch: What went through the model.
        output: What came out, with its graph.
        uses: Calls of layers' modules, in order.
        examples: How many examples there are.
    """

    batch: Batch
    output: Any
    uses: tuple[Use, ...]
    examples: int

    def gradients(self, direction: Direction, *, last: bool = False) -> list[Tensor | None]:
        """Gradients at the outputs of all uses, ``None`` where none arrives.

        Args:
            direction: What is differentiated.
            last: Whether nothing else will be, so that the graph may go.
        """
        tensor, cotangent = direction
        calls = {id(u.inside.call): u.inside for u in self.uses if u.inside is not None}
        edges = [use.edge for use in self.uses if use.edge is not None]
        for inside in calls.values():
            edges += [edge for edge in inside.call.edges if edge is not None]
        if not edges:
            return [None] * len(self.uses)
        found = iter(
            torch.autograd.grad(
                [tensor],
                edges,
                None if cotangent is None else [cotangent],
                retain_graph=not last or bool(calls),
                allow_unused=True,
            )
        )
        own = [None if use.edge is None else next(found) for use in self.uses]
        if not calls:
            return own
        pulled = {
            key: inside.unrolled.pulled(
                [None if edge is None else next(found) for edge in inside.call.edges]
            )
            for key, inside in calls.items()
        }
        return [
            given if u.inside is None else u.inside.gradient(pulled[id(u.inside.call)])
            for u, given in zip(self.uses, own, strict=True)
        ]

    def keeping(self, examples: Tensor | None) -> Pass:
        """The pass with rows of some examples alone, bool ``[n]``, counting for factors."""
        if examples is None:
            return self
        uses = []
        for use in self.uses:
            rows = use.rows(self.examples)
            if use.role == "scale" or rows is None:
                uses.append(use)
                continue
            keep = examples.to(use.x.device)[:, None].expand(-1, rows)
            uses.append(replace(use, keep=keep if use.keep is None else keep & use.keep))
        return replace(self, uses=tuple(uses))

    def require_unchanged(self) -> None:
        """Raises RuntimeError if an input was changed in place after its layer had read it."""
        for use in self.uses:
            if use.x._version != use.version:
                raise RuntimeError(
                    f"the input of layer {use.layer!r} was changed in place after the layer had "
                    "read it, so its gradients are lost; replace the in-place operation (x += y, "
                    "inplace=True) by x = x + y"
                )


class Watcher:
    """Runs batches through the model, and notes the uses of its layers.

    Args:
        risk: The model.
        layers: The factored layers.
        mask: Which rows count for factors.
        alone: Whether examples go through the model one by one, if that is known.

    Attributes:
        alone: Whether they do.
        uses: Uses of each parameter of the layers, by function; and
        calls: calls of each layer's modules.
    """

    def __init__(
        self,
        risk: Risk,
        layers: Sequence[FactoredLayer],
        mask: Mask | None = None,
        *,
        alone: bool = False,
    ) -> None:
        self.risk = risk
        self.layers = list(layers)
        self.mask = mask
        self.alone = alone
        named = {name: risk.held.held[name] for layer in layers for name in layer.names}
        self.uses = WeightUses(named)
        self.calls = dict.fromkeys((layer.name for layer in layers), 0)
        self._hidden = layers_inside(self.layers)
        self._verified: set[Any] = set()

    def passes(self, batch: Batch) -> Iterator[Pass]:
        """The pass of a batch; or, where its rows cannot be told apart, of each example.

        Raises:
            ValueError: If examples depend on each other, or a batch cannot be split.
        """
        n = self.examples(batch)
        if not self.alone or n == 1:
            found = self.run(batch, self.kept(batch))
            if n == 1 or self._recognized(found, n):
                yield found
                return
            self.alone = True
        for i in range(n):
            one = one_example(batch, i)
            yield self.run(one, self.kept(one))

    def examples(self, batch: Batch) -> int:
        """How many examples a batch has.

        Raises:
            ValueError: If there is none.
        """
        n = example_count(batch)
        if n == 0:
            raise ValueError(f"batch {batch.index} has no example; leave it out")
        return n

    def _recognized(self, found: Pass, n: int) -> bool:
        """Whether the rows of all uses are known to belong to the examples as they seem to."""
        return not self.unverified(found, n) or self.verified(found, self.last_alone(found, n))

    def unverified(self, found: Pass, n: int) -> bool:
        """Whether it is not known yet if rows belong to the examples as they seem to."""
        return (
            self._signature(found, n) not in self._verified or self.uses.sorts or self._mixed(found)
        )

    def verified(self, found: Pass, single: Pass) -> bool:
        """Whether rows belong to the examples as they seem to, given :meth:`last_alone`."""
        n, same = found.examples, not self._mixed(found)
        same = same and [u.layer for u in single.uses] == [u.layer for u in found.uses]
        same = same and all(
            close(last_rows(a, n), last_rows(b, 1))
            for a, b in zip(found.uses, single.uses, strict=True)
        )
        mine, others = next(tensors(single.output), None), next(tensors(found.output), None)
        where = f"the last example of batch {found.batch.index}"
        if mine is not None and others is not None and not among(mine, others, n):
            raise ValueError(
                f"{where} has another output when it is alone: examples depend on each other, or "
                "the model draws random numbers; put BatchNorm into eval mode, and switch off "
                "dropout (model.eval())"
            )
        if found.batch.index in self.risk.draws.states:  # outputs may agree by chance
            raise ValueError(
                f"the model draws random numbers, so {where} is another function when it is "
                "alone; switch off dropout (model.eval()), or pass batches of one example"
            )
        if same:
            self._verified.add(self._signature(found, n))
        return same

    def _mixed(self, found: Pass) -> bool:
        return self.uses.selects or any(use.rows(found.examples) is None for use in found.uses)

    def _signature(self, found: Pass, n: int) -> Any:
        return (n, *((use.layer, tuple(use.x.shape)) for use in found.uses))

    def last_alone(self, found: Pass, n: int) -> Pass:
        """The pass of the last example alone, without a graph."""
        batch = found.batch
        one = one_example(batch, n - 1)
        try:
            with torch.no_grad():
                return self._run(one, None, counted=False)
        except NoAnswerError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(
                f"the last example of batch {batch.index} cannot go through the model alone "
                f"({error}), so examples are not known to be independent; put BatchNorm into eval "
                "mode (model.eval()), or let forward= take batches of one example"
            ) from error

    def kept(self, batch: Batch) -> Tensor | None:
        """Which rows of a batch count, or ``None`` for all.

        Raises:
            TypeError: If the mask is no bool tensor.
        """
        return None if self.mask is None else row_mask(self.mask, batch.data)

    def run(self, batch: Batch, kept: Tensor | None = None) -> Pass:
        """One forward pass, whose uses are counted, where just some rows do."""
        return self._run(batch, kept, counted=True)

    def _run(self, batch: Batch, kept: Tensor | None, *, counted: bool) -> Pass:
        uses: list[Use | HiddenCall] = []
        n = example_count(batch)
        with self._hooked(uses, kept, n, counted=counted):
            if counted:
                with self.uses:
                    output = batch.output()
            else:
                output = batch.output()
        found: list[Use] = []
        for use in uses:
            if isinstance(use, HiddenCall):
                found += self._inside(use, kept, n, counted=counted)
            else:
                found.append(use)
        return Pass(batch, output, tuple(found), n)

    @contextmanager
    def _hooked(
        self, uses: list[Use | HiddenCall], kept: Tensor | None, n: int, *, counted: bool
    ) -> Iterator[None]:
        handles = []
        try:
            for module in self._hidden:
                hook = _noting_call(uses)
                handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))
            for layer in self.layers:
                for module, role in () if layer.maps else layer.modules:
                    hook = self._noting(layer, role, uses, kept, n, counted)
                    handles.append(
                        module.register_forward_hook(hook, prepend=True, with_kwargs=True)
                    )
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _noting(
        self,
        layer: FactoredLayer,
        role: str,
        uses: list[Use | HiddenCall],
        kept: Tensor | None,
        n: int,
        counted: bool,
    ) -> Any:
        def note(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
            x = (args[0] if args else next(iter(kwargs.values()))).detach()
            if counted:
                self.calls[layer.name] += 1
            edge = get_gradient_edge(output) if output.requires_grad else None
            keep = None
            if kept is not None and role == "matrix":
                keep = mask_at(kept.to(x.device), positions(module, x), layer.name)
            elif kept is not None and role == "embedding":
                keep = mask_at(kept.to(x.device), tuple(x.shape), layer.name)
            keep = None if keep is None else keep.reshape(1 if n == 1 else n, -1)
            shape = tuple(output.shape)
            uses.append(Use(layer.name, module, role, x, x._version, edge, shape, keep))

        return note

    def _inside(
        self, call: HiddenCall, kept: Tensor | None, n: int, *, counted: bool
    ) -> Iterator[Use]:
        """Uses of the layers inside of a module, in one call."""
        own = self._hidden[call.module]
        unrolled = call.unrolled(next(iter(own.values()))[0].name, graph=counted)
        pairs = [(i, layer) for i, m in enumerate(unrolled.maps) for layer in own.get(m.key, ())]
        for place, layer in pairs:
            if counted:
                self.calls[layer.name] += 1
            inside = HiddenUse(call, unrolled, place, layer.shape[0])
            x, keep = inside.inputs, inside.keep
            if kept is not None:
                given = mask_at(kept.to(x.device), tuple(x.shape[1:3]), layer.name)
                keep = given if keep is None or given is None else keep & given
            folded = keep is not None and n > 0 and keep.numel() % n == 0
            keep = keep.reshape(n, -1) if folded and keep is not None else None
            shape = (*x.shape[:3], layer.shape[1])
            yield Use(
                layer.name,
                call.module,
                "matrix",
                x,
                x._version,
                None,
                shape,
                keep,
                given=True,
                inside=inside,
            )


def with_last(directions: Iterable[Direction]) -> Iterator[tuple[Direction, bool]]:
    """Directions, and whether each is the last one."""
    stream = iter(directions)
    held = next(stream, None)
    while held is not None:
        after = next(stream, None)
        yield held, after is None
        held = after


def _noting_call(uses: list[Use | HiddenCall]) -> Any:
    def note(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        taken = distinct(module, output)
        uses.append(noted(module, args, kwargs, output if taken is None else taken))
        return taken

    return note
