"""Callbacks for trainers that own the loop: Hugging Face's ``Trainer`` and Lightning.

Both take a function that makes the callback from the model and the optimizer, which exist only
once the trainer has started::

    def monitor(model, optimizer):
        return cl.StabilityMonitor(cl.Risk(model, loss, data), optimizer, every=100)


    trainer = Trainer(..., callbacks=[cl.hugging_face_callback(monitor)])
    trainer = lightning.Trainer(..., callbacks=[cl.lightning_callback(monitor)])

What is made may be a :class:`curvlib.rates.monitor.StabilityMonitor` or a
:class:`curvlib.rates.learner.LanczosLearner`; it is found in the callback's ``.watcher``. Its state
is saved with the trainer's checkpoints and continued from them. A learner is told of the loss where
the trainer has it (Lightning); without, it does not roll back when the loss rises.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from curvlib.core.files import atomic_write
from curvlib.rates.learner import LanczosLearner
from curvlib.rates.monitor import StabilityMonitor

#: What the adapters drive.
Watcher = StabilityMonitor | LanczosLearner
#: Makes it, from the model and the optimizer.
Make = Callable[[nn.Module, Optimizer], Watcher]

STATE_FILE = "curvlib_watcher.pt"


def hugging_face_callback(make: Make) -> Any:
    """A ``transformers.TrainerCallback`` around a monitor or learner.

    Args:
        make: Function of the model and the optimizer.

    Returns:
        The callback. It steps once for each optimizer step, writes its state into each checkpoint
        folder, and continues from there.

    Raises:
        TypeError: If ``make`` is no function.
        ImportError: If transformers is absent.
    """
    _require_function(make)
    try:
        base: Any = importlib.import_module("transformers").TrainerCallback
    except ImportError as error:
        raise ImportError(
            "hugging_face_callback needs transformers, which is not installed; "
            "run: pip install 'curvlib[hf]'"
        ) from error

    class CurvlibCallback(base):  # type: ignore[misc]  # a class that is known when called
        """Drives a monitor or learner."""

        def __init__(self) -> None:
            self.watcher: Watcher | None = None

        def on_train_begin(self, *event: Any, **parts: Any) -> None:
            args, state, _ = event
            optimizer = parts["optimizer"]
            self.watcher = made(make, parts["model"], getattr(optimizer, "optimizer", optimizer))
            file = _state_file(args, state)
            if state.global_step and file.exists():
                self.watcher.load_state_dict(torch.load(file, weights_only=True))

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            if isinstance(self.watcher, LanczosLearner):
                self.watcher.step()

        def on_step_end(self, *event: Any, **_: Any) -> None:
            if isinstance(self.watcher, StabilityMonitor):
                self.watcher.step(_logged(event[1]))

        def on_save(self, *event: Any, **_: Any) -> None:
            args, state, _control = event
            file = _state_file(args, state)
            if self.watcher is not None and file.parent.is_dir():
                with atomic_write(file) as temporary:
                    torch.save(self.watcher.state_dict(), temporary)

        def on_train_end(self, *_: Any, **__: Any) -> None:
            if self.watcher is not None:
                self.watcher.close()

    return CurvlibCallback()


def lightning_callback(make: Make) -> Any:
    """A Lightning ``Callback`` around a monitor or learner, for the first optimizer.

    Args:
        make: Function of the Lightning module and the optimizer.

    Returns:
        The callback. It steps once for each optimizer step; its state is part of Lightning's
        checkpoints.

    Raises:
        TypeError: If ``make`` is no function.
        ImportError: If Lightning is absent.
    """
    _require_function(make)
    base: Any = _lightning()

    class CurvlibCallback(base):  # type: ignore[misc]  # a class that is known when called
        """Drives a monitor or learner."""

        def __init__(self) -> None:
            super().__init__()
            self.watcher: Watcher | None = None
            self._state: dict[str, Any] | None = None
            self._loss: Tensor | None = None
            self._steps = 0

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.watcher = made(make, pl_module, trainer.optimizers[0])
            self._steps = int(trainer.global_step)
            if self._state is not None:
                self.watcher.load_state_dict(self._state)

        def on_before_backward(self, *event: Any) -> None:
            self._loss = event[2].detach()

        def on_before_optimizer_step(self, *_: Any) -> None:
            if isinstance(self.watcher, LanczosLearner):
                self.watcher.step(self._loss)

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if int(trainer.global_step) == self._steps:
                return  # accumulated batches take no optimizer step
            self._steps = int(trainer.global_step)
            if isinstance(self.watcher, StabilityMonitor):
                self.watcher.step(self._loss)

        def on_train_end(self, *_: Any) -> None:
            if self.watcher is not None:
                self.watcher.close()

        def state_dict(self) -> dict[str, Any]:
            return {} if self.watcher is None else self.watcher.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self._state = state_dict or None

    return CurvlibCallback()


def made(make: Make, model: nn.Module, optimizer: Optimizer) -> Watcher:
    """What the function makes.

    Raises:
        TypeError: If that is neither a monitor nor a learner.
    """
    found = make(model, optimizer)
    if not isinstance(found, (StabilityMonitor, LanczosLearner)):
        raise TypeError(
            "expected a function of (model, optimizer) that returns a StabilityMonitor or a "
            f"LanczosLearner, it returned {type(found).__name__}"
        )
    return found


def _require_function(make: Any) -> None:
    if not callable(make):
        raise TypeError(
            "expected a function of (model, optimizer) that makes the monitor or learner, got "
            f"{type(make).__name__}: the trainer makes the optimizer later"
        )


def _lightning() -> Any:
    """Lightning's base class, by either of its names."""
    for name in ("lightning.pytorch.callbacks", "pytorch_lightning.callbacks"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name).Callback
    raise ImportError(
        "lightning_callback needs Lightning, which is not installed; run: pip install lightning"
    )


def _state_file(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE


def _logged(state: Any) -> float | None:
    """The last loss that the trainer logged."""
    for entry in reversed(state.log_history):
        if isinstance(entry, Mapping) and "loss" in entry:
            return float(entry["loss"])
    return None
