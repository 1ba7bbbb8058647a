r"""Products of batches as captured graphs, proven right before they are used.

For each shape of a batch the product is recorded (:mod:`curvlib.operators.captured.capture`) and
compiled. Before the result is used it is held against the eager product on random vectors
:math:`u, v` of that very batch,

.. math::
    \lVert \hat H v - H v \rVert \le \varepsilon \lVert H v \rVert, \qquad
    | u^T \hat H v - v^T \hat H u | \le \varepsilon \lVert \hat H v \rVert

(entries of ``u`` and ``v`` are standard normal, so that both sides of the second are of the order
of the matrix's Frobenius norm). What fails, or cannot be recorded, runs eagerly, and says so.

A record holds the Python side of the model as it was: control flow, numbers that are attributes of
modules, shapes. Shapes, modes, attributes and the batch's own numbers are compared at every
product, and another one makes another record; there are at most ``MAX_CAPTURES``. Numbers that a
model keeps elsewhere (globals, closures, lists of objects) are not seen.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from curvlib.core.batch import Batch
from curvlib.core.risk import Risk
from curvlib.operators.captured.batch_function import (
    Form,
    batch_function,
    batch_inputs,
    batch_terms,
)
from curvlib.operators.captured.batch_record import python_state, structure
from curvlib.operators.captured.capture import Capture, captured, recordable, widened
from curvlib.operators.captured.proof import difference, probes, tolerance
from curvlib.operators.captured.replay import launched
from curvlib.operators.columns import pieces
from curvlib.operators.graphs import GraphCache

#: Records that one operator makes at most; batches of other shapes run eagerly.
MAX_CAPTURES = 8
BACKENDS = ("inductor", "aot_eager")

Compile = bool | str


class BatchProduct(Protocol):
    """The eager product, batch by batch."""

    def begin(self) -> None:
        """Called before each pass."""

    def add(self, batch: Batch, total: Tensor | None, columns: Tensor) -> Tensor:
        """The sum so far (``None``: nothing yet) with the batch's product times its scale."""


@dataclass
class Captured:
    """A capture that is in use.

    Attributes:
        capture: The recorded stages.
        owners: Where its constants are found among the attributes of modules.
        linearize: The first stage as it runs.
        push: The second stage as it runs, by the number of vectors.
        narrow: Whether several vectors at once do not work.
    """

    capture: Capture
    owners: list[tuple[dict[str, Any], str, Tensor]]
    linearize: Callable[..., Sequence[Tensor]]
    push: dict[int, Callable[..., Sequence[Tensor]]] = field(default_factory=dict)
    narrow: bool = False

    @property
    def current(self) -> bool:
        """Whether the model still holds the constants."""
        return all(attributes.get(name) is held for attributes, name, held in self.owners)


class CompiledProduct:
    """The product with columns, by captured graphs where they are proven right.

    Args:
        risk: The risk.
        eager: Makes the eager product, given a budget of bytes for kept graphs.
        form: The product of one batch, which is recorded.
        compile: ``True``, or the name of a backend, which then must work.
        memory: Bytes for what is kept between products.
        name: Of the operator, for messages.

    Raises:
        ValueError: If the backend is unknown, or the loss owns the head of the model.
    """

    def __init__(
        self,
        risk: Risk,
        eager: Callable[[int], BatchProduct],
        form: Form,
        compile: Compile,  # noqa: A002 (the name that torch uses)
        memory: int,
        name: str,
    ) -> None:
        if compile is not True and compile not in BACKENDS:
            raise ValueError(f"compile= is a bool, 'inductor' or 'aot_eager', got {compile!r}")
        if risk.loss.linear is not None:
            raise ValueError(
                "compile= records products of an output, and LinearCrossEntropy never holds all "
                "logits; leave compile= out, or use torch.nn.CrossEntropyLoss and a model of logits"
            )
        self.risk = risk
        self.form = form
        self.name = name
        self.insists = compile is not True
        self.backend = str(compile) if self.insists else "inductor"
        self.eager = eager(memory)  # where nothing is captured
        self.witness = eager(0)  # which captures are held against; keeps no graphs
        self.memory = memory
        self._forget()
        self.known: dict[Hashable, Captured | None] = {}
        self.said: set[str] = set()
        self.counted: set[int] = set()  # batches whose normalization the eager product verified
        self.last: Hashable = None
        self.states: dict[Hashable, int] = {}  # numbers of the states that the model was in
        self.state = 0
        self.begun = False  # whether the eager product was told of the pass

    def __call__(self, columns: Tensor) -> Tensor:
        """The product ``[P, K]``."""
        state = python_state(self.risk)
        if state != self.last:
            self.last = state
            self.state = self.states.setdefault(state, len(self.states))
            self._forget()
        self.cache.begin()
        self.begun = False
        return self.risk.accumulate(lambda batch, total: self._add(batch, total, columns), columns)

    def _add(self, batch: Batch, total: Tensor | None, columns: Tensor) -> Tensor:
        count, terms = columns.shape[1], batch_terms(self.risk, batch)
        if terms is not None and (float(terms) == 0.0 or batch.index not in self.counted):
            self.counted.add(batch.index)  # the first pass verifies what the loss averages over
            return self.witness.add(batch, total, columns)
        largest = max(p.stop - p.start for p in pieces(count, self.cache.room, self.risk.space))
        found = self._found(batch, _widths(count, largest))
        if found is None:
            if not self.begun:
                self.begun = True
                self.eager.begin()
            return self.eager.add(batch, total, columns)
        kept, _ = self.cache.graph(batch)
        out = self.risk.space.empty(count) if total is None else total
        start = 0
        for width in _widths(count, 1 if found.narrow else largest):
            piece = slice(start, start := start + width)
            part = _pushed(found.push[width], columns[:, piece].mT.contiguous(), kept)
            rows = out[:, piece].mT
            if total is None:
                torch.mul(part, batch.scale, out=rows)
            else:
                rows.add_(part, alpha=batch.scale)
        return out

    def _forget(self) -> None:
        """Drops what was kept between products."""
        self.cache = GraphCache(self.risk, self.memory, self._linearized, holds=lambda kept: kept)

    # ---------------------------------------------------------------- captures
    def _found(self, batch: Batch, widths: Sequence[int] = ()) -> Captured | None:
        """The capture for a batch's shape, proven for some numbers of vectors at once."""
        try:
            key = (structure(batch.data), self.state)
        except TypeError as error:
            return self._refuse(str(error))
        found = self.known.get(key)
        if found is None and key in self.known:
            return None
        if found is None or not found.current:
            if len(self.known) >= MAX_CAPTURES and key not in self.known:
                return self._refuse(
                    f"batches and states of the model came in more than {MAX_CAPTURES} different "
                    "shapes, each of which is captured anew; pad or bucket the batches"
                )
            if found is not None:
                self._forget()
            self.known[key] = None
            found = self._captured(batch)
            if found is None:
                return None
        for width in sorted(set(widths)):
            chosen = 1 if found.narrow else width
            if chosen not in found.push:
                wrong = self._proven(batch, found, chosen)
                if wrong is not None:
                    self.known[key] = None
                    return self._refuse(wrong)
        self.known[key] = found
        return found

    def _captured(self, batch: Batch) -> Captured | None:
        risk = self.risk
        if torch.is_autocast_enabled(risk.device.type):
            return self._refuse("autocast is on; enter it in forward= instead")
        vector = probes(risk.space, 1)[:, 0]
        with risk.untouched():  # errors that are the model's own come from here
            self.witness.add(batch, None, vector[:, None])
        inputs = batch_inputs(risk, batch)
        try:
            with risk.untouched(), recordable(risk.model):
                capture = captured(batch_function(risk, self.form, batch), inputs, vector)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 (any code of the model's may meet fake tensors)
            return self._refuse(f"the product cannot be captured ({_short(error)})")
        owners = [
            (vars(module), name, held)
            for module in risk.model.modules()
            for name, held in vars(module).items()
            if isinstance(held, Tensor) and any(held is c for c in capture.held)
        ]
        inputs += [c.detach() for c in capture.held]
        linearize: Callable[..., Sequence[Tensor]] = capture.linearize
        if not capture.draws:  # torch's own operations draw what the eager product draws
            linearize = self._lowered(capture.linearize, inputs)
        if not (self.cache.keeps or capture.draws or capture.writes):
            linearize = launched(linearize, inputs)
        return Captured(capture, owners, linearize)

    def _linearized(self, batch: Batch) -> list[Tensor]:
        found = self._found(batch)
        assert found is not None  # it was found before the cache was asked
        return self._run_linearize(batch, found)

    def _run_linearize(self, batch: Batch, found: Captured) -> list[Tensor]:
        inputs = [*batch_inputs(self.risk, batch), *(c.detach() for c in found.capture.held)]

        def run() -> list[Tensor]:
            with torch.no_grad():
                return list(found.linearize(*inputs))

        if not found.capture.draws:
            return run()
        out: list[Tensor] = self.risk.draws.run(batch.index, run)
        return out

    # ------------------------------------------------------------------- proof
    def _proven(self, batch: Batch, found: Captured, width: int) -> str | None:
        """Compiles the second stage for ``width`` vectors and proves it, or says what is wrong."""
        probe = probes(self.risk.space, max(width, 2))
        with self.risk.untouched():
            exact = self.witness.add(batch, None, probe)
        with self.risk.untouched(), torch.no_grad():
            try:
                kept = self._run_linearize(batch, found)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # noqa: BLE001 (compiled code has assertions of its own)
                return f"the captured product cannot be run ({_short(error)})"
            rows = probe.mT.contiguous()[:width]
            graph = found.capture.push
            if width > 1:
                try:
                    graph = widened(graph, rows, kept)
                except torch.OutOfMemoryError:
                    raise
                except Exception:  # noqa: BLE001 (an operation that does not batch)
                    found.narrow = True
                    return None if 1 in found.push else self._proven(batch, found, 1)
            # zeros: a recording that returns what it was made with, whatever comes, is found out
            examples = [torch.zeros_like(rows if width > 1 else rows[0]), *kept]
            push = launched(self._lowered(graph, examples), examples)
            try:
                parts = [_pushed(push, part, kept).clone() for part in probe.mT.split(width)]
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # noqa: BLE001 (as above)
                return f"the captured product cannot be run ({_short(error)})"
            product = torch.cat(parts).mT * batch.scale
        wrong = difference(product, exact, probe, tolerance(self.risk))
        if wrong is None:
            found.push[width] = push
        return wrong

    def _lowered(
        self, graph: fx.GraphModule, examples: list[Any]
    ) -> Callable[..., Sequence[Tensor]]:
        """The graph as machine code, where a compiler works, else as it is."""
        if self.backend == "aot_eager":
            return graph
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                import torch._inductor as inductor

                compiled: Callable[..., Sequence[Tensor]] = inductor.compile(graph, examples)
                return compiled
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if self.insists:
                raise RuntimeError(
                    f"inductor cannot compile the product ({_short(error)}); it needs a C++ "
                    "compiler, or Triton on CUDA: use compile=True, which does without"
                ) from error
            self.backend = "aot_eager"
            self._say(
                f"inductor cannot compile the product ({_short(error)}), so its captured graph "
                "runs operation by operation"
            )
            return graph

    # ---------------------------------------------------------------- refusals
    def _refuse(self, reason: str) -> Captured | None:
        """Says why there is no capture, or raises it."""
        if self.insists:
            raise RuntimeError(
                f"{self.name}: compile={self.backend!r}, but {reason}; compile=True runs what "
                "cannot be captured eagerly"
            )
        self._say(f"products run eagerly, since {reason}")
        return None

    def _say(self, what: str) -> None:
        if what not in self.said:
            self.said.add(what)
            warnings.warn(
                f"curvlib: {self.name}: {what} (said once for each operator)",
                UserWarning,
                stacklevel=2,
            )


# ------------------------------------------------------------------------ numbers
def _widths(count: int, largest: int) -> list[int]:
    """Powers of two that sum to ``count``, at most ``largest``: few are captured."""
    out = []
    while count > 0:
        out.append(1 << (min(count, largest).bit_length() - 1))
        count -= out[-1]
    return out


def _pushed(push: Callable[..., Sequence[Tensor]], rows: Tensor, kept: Sequence[Tensor]) -> Tensor:
    """The second stage on rows ``[K, P]``, for the ``K`` that it was made for."""
    with torch.no_grad():
        if rows.shape[0] == 1:
            return push(rows[0], *kept)[0][None]
        return push(rows, *kept)[0]


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
