"""Hooks that do not keep their owner alive, and do nothing in copies of a model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle


class ModuleHook:
    """A hook on a module that does not keep the recorder alive, and that copies do nothing of."""

    def __init__(self, recorder: weakref.ref[Any], method: str, *before: Any) -> None:
        self.recorder = recorder
        self.method = method
        self.before = before

    def __call__(self, *args: Any) -> Any:
        """Calls the recorder's method, if there is a recorder still."""
        if torch.compiler.is_compiling():
            return None  # nothing is recorded inside of compiled code
        recorder = self.recorder()
        return None if recorder is None else getattr(recorder, self.method)(*self.before, *args)

    def __deepcopy__(self, memo: Any) -> Any:
        return nothing

    def __reduce__(self) -> Any:
        return (_nothing, ())


class GradientHook:
    """A hook on a tensor: hands its gradient to the recorder."""

    def __init__(
        self,
        recorder: weakref.ref[Any],
        found: weakref.ref[Any],
        index: int,
        *,
        of_output: bool = False,
    ) -> None:
        self.recorder = recorder
        self.found = found
        self.index = index
        self.of_output = of_output

    def __call__(self, gradient: Tensor) -> None:
        """Takes a gradient, unless it is one of those that the recorder itself asked for.

        Those that are differentiated again (``create_graph=True``: of a gradient penalty, or of a
        Hessian product) are no gradients of the loss, either.
        """
        if torch.is_grad_enabled():
            return
        recorder, found = self.recorder(), self.found()
        if recorder is None or found is None or recorder.pulling:
            return
        if self.of_output:
            recorder.arrived_at_output(found, self.index, gradient)
        else:
            recorder.arrived(found, self.index, gradient)


def nothing(*args: Any) -> None:
    """What stands for a hook in a copy of a model."""


def _nothing() -> Callable[..., None]:
    return nothing


def remove(handles: list[RemovableHandle]) -> None:
    """Takes hooks off."""
    for handle in handles:
        handle.remove()
    handles.clear()


def detached(values: Any) -> Any:
    """Tensors, however nested, without their graphs."""
    if isinstance(values, Tensor):
        return values.detach()
    if isinstance(values, tuple) and hasattr(values, "_fields"):  # a PackedSequence, too
        return type(values)(*map(detached, values))
    if isinstance(values, (tuple, list)):
        return tuple(detached(value) for value in values)
    if isinstance(values, Mapping):
        return {key: detached(value) for key, value in values.items()}
    return values


def in_backward() -> bool:
    """Whether a backward pass is going on: layers are then called again by checkpointing."""
    return torch._C._current_graph_task_id() != -1
