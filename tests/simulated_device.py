"""A device that is not there: its tensors live on the CPU, and what the host waits for is counted.

Inside :class:`SimulatedDevice`, tensors that are made with ``device="xla"`` say that they are on a
device. As on a GPU, the host may not mix them with its own (but for numbers), and waits for the
device where it asks for a number, copies to or from it, or needs to know how many entries there
are. Each such wait is counted, with the line of curvlib that asked for it. Nothing of this is
PyTorch's XLA: any type of device that this build of PyTorch lacks would do.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import curvlib

DEVICE = torch.device("xla", 0)

CURVLIB = str(Path(curvlib.__file__).parent)

#: Methods that hand numbers to Python, which torch does not dispatch on a device it lacks.
READS = (
    Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__float__, Tensor.__int__, Tensor.__bool__,
    Tensor.__index__, Tensor.__contains__, Tensor.__len__,
)  # fmt: skip

#: Methods that ask for the device before they dispatch.
DIRECT = {
    Tensor.copy_: torch.ops.aten.copy_.default,
    Tensor.nonzero: torch.ops.aten.nonzero.default,
    torch.nonzero: torch.ops.aten.nonzero.default,
}

#: Operators for which a GPU's host has to know numbers.
WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "repeat_interleave",
    "_unique2", "unique_dim", "_linalg_check_errors", "_linalg_eigh", "_linalg_svd",
}  # fmt: skip


class OnDevice(Tensor):
    """A tensor that says it is on the device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __repr__(self) -> str:
        return f"OnDevice({self.held})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__len__:
            return args[0].shape[0]
        if func is Tensor.data_ptr:
            return args[0].held.data_ptr()
        if func in READS and isinstance(args[0], OnDevice):
            _active().note(func.__name__)
            return func(args[0].held, *args[1:], **(kwargs or {}))
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            return _active().indexed(func, *args)
        if func is Tensor.contiguous:
            held = args[0].held
            return args[0] if held.is_contiguous() else OnDevice(held.contiguous())
        if func in DIRECT:
            return _active().__torch_dispatch__(DIRECT[func], types, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():  # results are wrapped already
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _active().__torch_dispatch__(func, types, args, kwargs)


def _held(x: Any) -> Any:
    return x.held if isinstance(x, OnDevice) else x


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


_modes: list[SimulatedDevice] = []


def _active() -> SimulatedDevice:
    assert _modes, "a tensor on the simulated device was used outside of SimulatedDevice"
    return _modes[-1]


class _Functions(TorchFunctionMode):
    """``torch.tensor`` does not ask the dispatcher for the device's memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        place = kwargs.get("device")
        made = func is torch.tensor or (func is torch.as_tensor and not isinstance(args[0], Tensor))
        if made and place is not None and torch.device(place).type == DEVICE.type:
            _active().note("to the device")
            return OnDevice(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


class SimulatedDevice(TorchDispatchMode):
    """Where the device is.

    Attributes:
        waits: How often the host waited, by where in curvlib.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __enter__(self) -> SimulatedDevice:
        _modes.append(self)
        self._functions = _Functions()
        self._functions.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._functions.__exit__(*error)
        _modes.pop()

    def note(self, what: str) -> None:
        """Counts a wait, by the function of curvlib that asked for it."""
        inside = [f for f in traceback.extract_stack() if f.filename.startswith(CURVLIB)]
        where = f"{Path(inside[-1].filename).stem}.{inside[-1].name}" if inside else "test"
        self.waits[f"{where}: {what}"] += 1

    def indexed(self, func: Any, tensor: Tensor, index: Any, *value: Any) -> Any:
        """``tensor[index]`` and ``tensor[index] = value``, by the CPU's tensors."""
        for i in index if isinstance(index, tuple) else (index,):
            if not isinstance(i, (Tensor, list)):
                continue
            if isinstance(i, list) or not isinstance(i, OnDevice):
                self.note("index from the host")
            elif _is_mask(i):
                self.note("index by a mask")
            elif i.ndim == 0:
                self.note("index by a number")
        if value and isinstance(value[0], Tensor) and not isinstance(value[0], OnDevice):
            self.note("to the device")
        index = tree_map(_held, index)
        with torch._C.DisableTorchFunctionSubclass():
            if not isinstance(tensor, OnDevice):
                assert not value or not isinstance(value[0], OnDevice), "device into the host"
                return func(tensor, index, *value)
            out = func(tensor.held, index, *map(_held, value))
        return out if value else OnDevice(out)

    def to_device(self, tensor: Tensor) -> Tensor:
        """A tensor of the CPU, on the device; not counted."""
        return OnDevice(tensor.clone(memory_format=torch.preserve_format))

    @contextmanager
    def counted(self) -> Iterator[Counter[str]]:
        """Counts the waits of a block of code alone."""
        before, self.waits = self.waits, Counter()
        try:
            yield self.waits
        finally:
            self.waits = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        ours = [x for x in given if isinstance(x, OnDevice)]
        name = func.name().split("::")[1].split(".")[0]
        target = kwargs.get("device")
        target = torch.device(target) if target is not None else None
        to_device = target.type == DEVICE.type if target is not None else bool(ours)
        if name in WAITS and ours:
            self.note(name)
        if name in ("index", "index_put_") and ours and any(map(_is_mask, args[1])):
            self.note("index by a mask")
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            into = isinstance(args[0], OnDevice) if name == "copy_" else to_device
            waits = not (kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,)))
            crosses = into != isinstance(source, OnDevice)
            if crosses and (waits or not into) and source.numel():
                self.note("to the device" if into else "to the host")
        elif len(ours) != len(given) and ours:
            foreign = [x for x in given if not isinstance(x, OnDevice) and x.ndim]
            indices = name in ("index", "index_put_")
            assert not foreign or indices, f"{func} mixes tensors of the device and the host"
            if foreign and any(x.numel() for x in foreign):
                self.note("index from the host")

        settings = dict(tree_map(_held, kwargs))
        if target is not None:
            settings["device"] = torch.device("cpu") if to_device else target
        settings.pop("pin_memory", None)
        if name == "_to_copy":
            settings.pop("device", None)
            out = args[0].held if ours else args[0]
            out = func(out, **settings)
        else:
            out = func(*tree_map(_held, args), **settings)
        return self._wrapped(out, given, to_device)

    def _wrapped(self, out: Any, given: list[Tensor], to_device: bool) -> Any:
        """Results on the device, or the very tensors that were written to."""
        known = {id(x.held): x for x in given if isinstance(x, OnDevice)}

        def wrapped(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if id(x) in known:
                return known[id(x)]
            return OnDevice(x) if to_device else x

        return tree_map(wrapped, out)


class DeviceGenerator(torch.Generator):
    """A generator that says it is on the device; numbers are drawn on the CPU."""

    device = DEVICE  # type: ignore[assignment]


class AnyGenerator:
    """In the place of ``torch.Generator``."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return DeviceGenerator() if torch.device(device).type == DEVICE.type else _Generator(device)


_Generator = torch.Generator


@contextmanager
def simulated_device(monkeypatch: Any) -> Iterator[SimulatedDevice]:
    """The device, with generators."""
    monkeypatch.setattr(torch, "Generator", AnyGenerator)
    with SimulatedDevice() as device:
        yield device
