r"""The shell that curvature optimizers share: everything but their update rule.

A method is a subclass with four hooks (one level of inheritance):

``_check(group)``
    raises for the hyper-parameters of a group, also of later ones.
``_due()``
    whether the coming step reads curvature. Default: never.
``_observe(loss, scale)``
    gathers curvature of one (micro-batch) loss: adds it to ``self.pending[name]``, which must be
    additive over micro-batches, and returns the gradients of ``loss`` (one entry for each
    parameter of ``self.trainable()``) if they came with it. ``loss`` is multiplied by ``scale``
    (of a ``GradScaler``): curvature is divided by it, returned gradients are not. Pending tensors
    are summed over ranks (where parameters are sharded, derivatives are so already), so a mean over
    ranks divides by ``self.replicas``. The graph of ``loss`` must survive if no gradients are
    returned, or if ``self.keep_graph`` is set.
``_update(gradients)``
    the step, for finite gradients (a list for each group, ``None`` where absent, dense, negated
    for groups with ``maximize``) and finite ``self.pending`` (empty if there was none). It
    computes first and writes then; it returns ``False`` if it changed nothing because a result
    was not finite. While it runs, ``self.clock`` still counts the steps before this one.

Also, as needed: ``_extra_state()`` and ``_load_extra_state(state)`` for what belongs to no
parameter; ``_missing()`` for the error when a step is due without any curvature yet; ``_saw(loss,
scale)`` for the value of each loss; and for methods that watch the user's own passes
``_prepare()``, before the passes of each step (and for new, copied and loaded optimizers),
``_collect()``, before gradients are read, and ``_forget()``, when they are set to zero.

A method that sets ``follows_shards`` takes sharded parameters: it writes to ``self.own(p)``, this
rank's slice, of whose shape gradients, curvature and state are, and sums and decides with all ranks
(``self.sharding``, ``self.finite``). One that watches layers unsets ``differentiates``: FSDP2's own
passes will do, and what is pending is of this rank's batch.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from curvlib.operators.live.loss import accumulate_gradient, require_live
from curvlib.optim.arguments import flag
from curvlib.optim.clock import Clock
from curvlib.optim.gradients import (
    Gradients,
    accumulate,
    accumulated,
    checked_group,
    finite,
    gradients_of,
    listed,
    positive_scale,
    versions,
)
from curvlib.optim.persistence import copied, load, picklable, saved
from curvlib.optim.replicas import average_gradients, size_of, sum_over_ranks
from curvlib.optim.sharding import Sharding, sharding_of


class CurvatureOptimizer(Optimizer, ABC):
    """What all optimizers of curvlib do alike: see their classes.

    Args:
        params: Parameters, named parameters or parameter groups, as in ``torch.optim``.
        defaults: Hyper-parameters of groups that have none of their own.
        seed: Of all random numbers.
        process_group: Replicas of data-parallel training; the default group if
            ``torch.distributed`` is initialized. Ranks that share sharded parameters are those of
            their mesh.

    Attributes:
        clock: Steps and curvature updates so far.
        skipped: Steps that were skipped since a gradient or curvature was not finite.
        pending: Curvature that was gathered for the coming step.
        keep_graph: Whether the loss that is observed goes through ``backward`` afterwards.
        sharding: This rank's slices of sharded parameters; ``None`` if they are whole.

    Raises:
        TypeError: If parameters are no real floating-point tensors.
        ValueError: If there are none, if one is there twice, or for bad hyper-parameters or
            shardings.
    """

    #: Whether the method steps slices of parameters.
    follows_shards = False
    #: Whether curvature is made of derivatives by parameters, slices of which are sums over ranks.
    differentiates = True

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed= is an int, got {type(seed).__name__}")
        self.seed = seed
        self.process_group = process_group
        self.clock = Clock()
        self.skipped = 0
        self.pending: dict[str, Tensor] = {}
        self.keep_graph = False
        self.sharding: Sharding | None = None
        self._backwards = 0
        self._seen: weakref.ref[Tensor] | None = None
        self._built = False
        super().__init__(listed(params, type(self).__name__), {"maximize": False, **defaults})
        self._built = True
        self._prepare()

    # ------------------------------------------------------------------ hooks of methods
    def _check(self, group: dict[str, Any]) -> None:
        """Raises for bad hyper-parameters of a group."""

    def _due(self) -> bool:
        """Whether the coming step reads curvature."""
        return False

    def _observe(self, loss: Tensor, scale: float) -> list[Tensor | None] | None:
        """Adds curvature of a loss to ``self.pending``; the gradients, if they came with it."""

    @abstractmethod
    def _update(self, gradients: Gradients) -> bool | None:
        """The step; ``False`` if nothing changed since a result was not finite."""

    def _add(self, name: str, part: Tensor) -> None:
        """Adds a part of the pending curvature."""
        self.pending[name] = self.pending[name] + part if name in self.pending else part

    def _extra_state(self) -> dict[str, Any]:
        """What the method keeps besides the state of parameters: plain values and tensors."""
        return {}

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        """Takes back what ``_extra_state`` returned; raises before it changes anything."""

    def _saw(self, loss: Tensor, scale: float) -> None:
        """Notes the value of the loss of a (micro-)batch, which is multiplied by ``scale``."""

    def _prepare(self) -> None:
        """Prepares the passes of the coming step."""

    def _collect(self) -> None:
        """Adds what passes have shown to ``self.pending``."""

    def _forget(self) -> None:
        """Forgets what passes have shown."""

    def _missing(self) -> None:
        """Raises since a step is due that has no curvature yet."""
        raise RuntimeError(
            f"{type(self).__name__} has no curvature yet, since gradients came from a plain "
            "loss.backward(); use opt.step(lambda: loss), or opt.backward(loss) in place of "
            "loss.backward(), or opt.observe(loss) before it"
        )

    # ----------------------------------------------------------------------- parameters
    def parameters(self) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
        """All parameters with their number and group."""
        number = 0
        for group in self.param_groups:
            for p in group["params"]:
                yield number, p, group
                number += 1

    def trainable(self) -> list[tuple[int, Tensor, dict[str, Any]]]:
        """Parameters (their slices) that require gradients, with their number and group."""
        return [(i, self.own(p), group) for i, p, group in self.parameters() if p.requires_grad]

    def own(self, p: Tensor) -> Tensor:
        """This rank's slice of a parameter that is sharded; others as they are."""
        return p if self.sharding is None else self.sharding.own(p)

    def finite(self, tensors: Iterable[Tensor | None]) -> bool:
        """Whether all numbers are finite, on all ranks that share parameters."""
        own = finite(tensors)
        return own if self.sharding is None else self.sharding.every(own)

    @property
    def replicas(self) -> int:
        """How many data-parallel processes train together."""
        return size_of(self.process_group)

    @property
    def due(self) -> bool:
        """Whether the coming step reads curvature: ``backward`` then costs more."""
        return self._due()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as in ``torch.optim``; curvature is due at the next step.

        Raises:
            TypeError: If parameters are no real floating-point tensors.
            ValueError: If one is there already, or for bad hyper-parameters.
        """
        known = {id(p) for _, p, _ in self.parameters()}
        super().add_param_group(checked_group(param_group, known))
        before = (self.clock, self.sharding)
        self.clock = replace(self.clock, age=None)
        try:
            self._shard()
            flag(self.param_groups[-1], "maximize")
            self._check(self.param_groups[-1])
            if self._built:
                self._prepare()
        except Exception:  # whatever it is, the group is not added
            self.param_groups.pop()
            self.clock, self.sharding = before
            raise

    def _shard(self) -> None:
        params = [p for _, p, _ in self.parameters()]
        needs = "" if self.follows_shards else type(self).__name__
        self.sharding = sharding_of(params, self.process_group, needs)
        if self.sharding is not None:
            self.process_group = self.sharding.process_group

    # ------------------------------------------------------------------- loss and step
    def gathering(self) -> AbstractContextManager[None]:
        """A block for a loss whose curvature is read, and its backward pass, in one's own loop.

        ``step(closure)`` enters it by itself. It does nothing unless parameters are sharded: then
        FSDP2's hooks are off within, so that second derivatives exist. Ranks enter it together.
        Methods that watch layers do without it.
        """
        return nullcontext() if self.sharding is None else self.sharding.gathering()

    def observe(self, loss: Tensor, scale: float = 1.0) -> None:
        """Gathers curvature if it is due, for loops that call ``loss.backward()`` afterwards.

        Twice for the same loss is once, also with ``backward`` afterwards.

        Args:
            loss: The loss of one (micro-)batch, with its graph, which is kept.
            scale: What the loss was multiplied by (``scaler.get_scale()``).

        Raises:
            TypeError: If the loss is no tensor.
            ValueError: If it is no scalar or has no graph.
            RuntimeError: If it has no second derivative, where the method needs one, or if
                parameters are sharded and a step that is due is outside :meth:`gathering`.
        """
        self._gather(require_live(loss), positive_scale(scale), keep=True)

    def backward(self, loss: Tensor, scale: float = 1.0, *, sync: bool = True) -> None:
        """``loss.backward()``, with the curvature when it is due; adds to ``.grad``.

        With several processes, ``loss`` comes from the plain module; one that is wrapped in
        ``DistributedDataParallel`` goes with ``observe`` and ``loss.backward()``.

        Args:
            loss: The loss of one (micro-)batch, with its graph, which is freed.
            scale: What the loss was multiplied by (``scaler.get_scale()``). Gradients stay
                multiplied by it, for ``scaler.unscale_(opt)``.
            sync: Whether ``.grad`` is then averaged over ranks; ``False`` for all but the last of
                several micro-batches saves communication. Sharded gradients always are.

        Raises:
            TypeError: If the loss is no tensor.
            ValueError: If it is no scalar or has no graph.
            RuntimeError: If it has no second derivative, where the method needs one, or if
                parameters are sharded and a step that is due is outside :meth:`gathering`.
        """
        found = self._gather(require_live(loss), positive_scale(scale), keep=False)
        if found is None:
            accumulate_gradient(loss)
        else:
            accumulate([p for _, p, _ in self.trainable()], found)
        self._backwards += 1
        if sync and self.sharding is None:
            average_gradients([p for _, p, _ in self.trainable()], self.process_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Tensor | None:  # type: ignore[override]  # PyTorch's overloads return floats
        """One step.

        Args:
            closure: Returns the loss of the batch, with its graph. It calls neither ``zero_grad``
                nor ``backward`` (if it does, its gradients are used). Without it, the gradients
                in ``.grad`` are used.

        Returns:
            The loss, detached, if there is a closure.

        Raises:
            TypeError: If the closure returns no tensor.
            ValueError: If it returns no scalar, or one without a graph.
            RuntimeError: If a step needs curvature and there is none yet.
        """
        loss = None if closure is None else self._evaluated(closure)
        with torch.no_grad():
            self._collect()
            if self.sharding is not None:
                self.sharding.follow()
            gradients = gradients_of(self.param_groups)
            if all(g is None for group in gradients for g in group):
                pass
            elif self._taken(gradients):
                self.clock = self.clock.ticked(curvature=bool(self.pending))
            else:
                self.skipped += 1
        self.pending, self._seen = {}, None
        self._prepare()
        return loss

    def _taken(self, gradients: Gradients) -> bool:
        """Takes the step; ``False`` if it is skipped."""
        due = self._due()
        if due and not self.pending and self.clock.curvature_updates == 0:
            self._missing()
        if (due or self.pending) and (self.sharding is None or not self.differentiates):
            self.pending = sum_over_ranks(self.pending, self.process_group)
        read = [*(g for group in gradients for g in group), *self.pending.values()]
        return self.finite(read) and self._update(gradients) is not False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears gradients and pending curvature."""
        self._forget()
        self.pending, self._seen = {}, None
        if self.sharding is not None:
            self.sharding.forget_gradients()
        super().zero_grad(set_to_none)

    def _evaluated(self, closure: Callable[[], Any]) -> Tensor:
        """The loss of a closure, whose gradients and curvature are then in place."""
        before, calls = versions(self.parameters()), self._backwards
        with self.gathering() if self._due() and self.differentiates else nullcontext():
            with torch.enable_grad():
                loss = closure()
            if not isinstance(loss, Tensor):
                loss = require_live(loss, "what the closure returns")
            if self.sharding is not None:
                self.sharding.take_gradients()
            if calls != self._backwards or accumulated(before, versions(self.parameters())):
                if self._seen is None:
                    self._saw(loss, 1.0)
                return loss.detach()  # the closure called backward itself
            require_live(loss, "what the closure returns")
            self.zero_grad()
            self.backward(loss)
        return loss.detach()

    def _gather(self, loss: Tensor, scale: float, *, keep: bool) -> list[Tensor | None] | None:
        """Curvature of a loss, if it is due and not observed yet; gradients, if they came too."""
        if self._seen is not None and self._seen() is loss:
            return None
        due = self._due()
        if due and self.sharding is not None and self.differentiates:
            self.sharding.require_gathered(loss)
        self.keep_graph = keep
        try:
            found = self._observe(loss, scale) if due else None
        except BaseException:
            self.pending = {}  # sums that may be incomplete
            raise
        finally:
            self.keep_graph = False
        self._saw(loss, scale)
        self._seen = weakref.ref(loss)
        return found

    # --------------------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """The state, with a third entry ``"curvlib"`` beside PyTorch's two.

        Gradients and pending curvature are not part of it: save between a step and the next
        backward.
        """
        return saved(self, super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state; the trajectory is then bitwise the one that was saved.

        Raises:
            TypeError: If it is no dictionary.
            ValueError: If it is that of another optimizer, model or version of curvlib. Nothing
                has changed then.
        """
        load(self, state_dict, super().load_state_dict)
        self.pending, self._seen = {}, None
        self._prepare()

    def __getstate__(self) -> dict[str, Any]:
        return {**picklable(vars(self)), **super().__getstate__(), "_seen": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        vars(self).setdefault("process_group", None)
        self.sharding = None
        self._shard()
        self._prepare()

    def __deepcopy__(self, memo: dict[int, Any]) -> CurvatureOptimizer:
        return copied(self, memo)
