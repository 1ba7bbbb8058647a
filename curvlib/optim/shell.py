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
    are summed over ranks, so a mean over ranks divides by ``self.replicas``. The graph of ``loss``
    must survive if no gradients are returned, or if ``self.keep_graph`` is set.
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
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from curvlib.operators.live_loss import accumulate_gradient, require_live
from curvlib.optim.arguments import flag
from curvlib.optim.clock import Clock
from curvlib.optim.gradients import (
    accumulate,
    accumulated,
    dense,
    finite,
    listed_group,
    positive_scale,
    require_parameters,
    versions,
)
from curvlib.optim.persistence import record, require_own, restored
from curvlib.optim.replicas import average_gradients, size_of, sum_over_ranks

Gradients = list[list[Tensor | None]]


class CurvatureOptimizer(Optimizer, ABC):
    """What all optimizers of curvlib do alike: see their classes.

    Args:
        params: Parameters, named parameters or parameter groups, as in ``torch.optim``.
        defaults: Hyper-parameters of groups that have none of their own.
        seed: Of all random numbers.
        process_group: Replicas of data-parallel training; the default group if
            ``torch.distributed`` is initialized.

    Attributes:
        clock: Steps and curvature updates so far.
        skipped: Steps that were skipped since a gradient or curvature was not finite.
        pending: Curvature that was gathered for the coming step.
        keep_graph: Whether the loss that is observed goes through ``backward`` afterwards.

    Raises:
        TypeError: If parameters are no real floating-point tensors.
        ValueError: If there are none, if one is there twice, or for bad hyper-parameters.
    """

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
        self._backwards = 0
        self._seen: weakref.ref[Tensor] | None = None
        self._built = False
        if not isinstance(params, Tensor):  # about which PyTorch complains itself
            params = [listed_group(p) for p in params]
            sizes = [len(p.get("params", "?")) if isinstance(p, dict) else 1 for p in params]
            if not any(sizes):
                raise ValueError(
                    f"{type(self).__name__} got no parameters; pass model.parameters(), or groups "
                    "of which one has some"
                )
        super().__init__(params, {"maximize": False, **defaults})
        self._built = True
        self._prepare()

    # ------------------------------------------------------------------ hooks of methods
    def _check(self, group: dict[str, Any]) -> None:
        """Raises for bad hyper-parameters of a group."""

    def _due(self) -> bool:
        """Whether the coming step reads curvature."""
        return False

    def _observe(self, loss: Tensor, scale: float) -> list[Tensor | None] | None:
        """Adds curvature of a loss to ``self.pending``; the gradients, if they came with it.

        Methods that are never due have none.
        """

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
        """Parameters that require gradients, with their number and group."""
        return [(i, p, group) for i, p, group in self.parameters() if p.requires_grad]

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
        param_group = listed_group(param_group)
        if "params" in param_group:
            require_parameters(param_group["params"], {id(p) for _, p, _ in self.parameters()})
        super().add_param_group(param_group)
        before = self.clock
        self.clock = replace(before, age=None)
        try:
            flag(self.param_groups[-1], "maximize")
            self._check(self.param_groups[-1])
            if self._built:
                self._prepare()
        except Exception:  # whatever it is, the group is not added
            self.param_groups.pop()
            self.clock = before
            raise

    # ------------------------------------------------------------------- loss and step
    def observe(self, loss: Tensor, scale: float = 1.0) -> None:
        """Gathers curvature if it is due, for loops that call ``loss.backward()`` afterwards.

        Twice for the same loss is once, also with ``backward`` afterwards.

        Args:
            loss: The loss of one (micro-)batch, with its graph, which is kept.
            scale: What the loss was multiplied by (``scaler.get_scale()``).

        Raises:
            TypeError: If the loss is no tensor.
            ValueError: If it is no scalar or has no graph.
            RuntimeError: If it has no second derivative, where the method needs one.
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
                several micro-batches saves communication.

        Raises:
            TypeError: If the loss is no tensor.
            ValueError: If it is no scalar or has no graph.
            RuntimeError: If it has no second derivative, where the method needs one.
        """
        found = self._gather(require_live(loss), positive_scale(scale), keep=False)
        if found is None:
            accumulate_gradient(loss)
        else:
            accumulate([p for _, p, _ in self.trainable()], found)
        self._backwards += 1
        if sync:
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
            gradients = self._gradients()
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
        if due or self.pending:
            self.pending = sum_over_ranks(self.pending, self.process_group)
        read = [*(g for group in gradients for g in group), *self.pending.values()]
        return finite(read) and self._update(gradients) is not False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears gradients and pending curvature."""
        self._forget()
        self.pending, self._seen = {}, None
        super().zero_grad(set_to_none)

    def _evaluated(self, closure: Callable[[], Any]) -> Tensor:
        """The loss of a closure, whose gradients and curvature are then in place."""
        before, calls = versions(self.parameters()), self._backwards
        with torch.enable_grad():
            loss = closure()
        if not isinstance(loss, Tensor):
            loss = require_live(loss, "what the closure returns")
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
        self.keep_graph = keep
        try:
            found = self._observe(loss, scale) if self._due() else None
        except BaseException:
            self.pending = {}  # sums that may be incomplete
            raise
        finally:
            self.keep_graph = False
        self._saw(loss, scale)
        self._seen = weakref.ref(loss)
        return found

    def _gradients(self) -> Gradients:
        """Dense gradients of each group, negated where the group maximizes."""
        out: Gradients = []
        for group in self.param_groups:
            grads = [p.grad if p.requires_grad else None for p in group["params"]]
            grads = [None if g is None else dense(g) for g in grads]
            if group["maximize"]:
                grads = [None if g is None else -g for g in grads]
            out.append(grads)
        return out

    # --------------------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """The state, with a third entry ``"curvlib"`` beside PyTorch's two.

        Gradients and pending curvature are not part of it: save between a step and the next
        backward.
        """
        state = super().state_dict()
        state["curvlib"] = record(
            type(self).__name__,
            [p for _, p, _ in self.parameters()],
            {
                "clock": asdict(self.clock),
                "skipped": self.skipped,
                "seed": self.seed,
                "extra": self._extra_state(),
            },
        )
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state; the trajectory is then bitwise the one that was saved.

        Raises:
            TypeError: If it is no dictionary.
            ValueError: If it is that of another optimizer, model or version of curvlib. Nothing
                has changed then.
        """
        params = [p for _, p, _ in self.parameters()]
        state_dict, own = require_own(state_dict, type(self).__name__, params)
        before = (self.state, self.param_groups)
        super().load_state_dict(state_dict)
        try:
            for group in self.param_groups:
                self._check(group)
            for i, p, _ in self.parameters():
                if i in state_dict["state"]:
                    self.state[p] = restored(state_dict["state"][i], p.device)
            self._load_extra_state(own["extra"])
        except Exception:  # whatever it is, the state stays as it was
            self.state, self.param_groups = before
            raise
        self.clock = Clock(**own["clock"])
        self.skipped, self.seed = own["skipped"], own["seed"]
        self.pending, self._seen = {}, None
        self._prepare()

    def __getstate__(self) -> dict[str, Any]:
        own = {k: v for k, v in vars(self).items() if not k.startswith("_optimizer_")}
        own["_seen"] = None
        for name in ("step", "_zero_grad_profile_name", "process_group"):
            own.pop(name, None)  # a scheduler's wrapper of step; groups cannot be copied
        return {**own, **super().__getstate__()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        vars(self).setdefault("process_group", None)
        self._prepare()

    def __deepcopy__(self, memo: dict[int, Any]) -> CurvatureOptimizer:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(deepcopy(self.__getstate__(), memo))
        twin.process_group = self.process_group
        return twin
