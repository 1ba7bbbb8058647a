"""TARGET: a risk that the user's own code makes, found by file or module and name."""

from __future__ import annotations

import copy
import difflib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from curvlib.core.risk import Risk

_FORM = "expected file.py:name or package.module:name, name being a Risk or a function of one"


class TargetError(ValueError):
    """A TARGET that cannot be used; the message says why and what to do."""


def load(target: str) -> Risk:
    """The risk that a TARGET names.

    Args:
        target: ``file.py:name`` or ``package.module:name``, ``name`` being a :class:`Risk` or a
            function without arguments that returns one.

    Raises:
        TargetError: If there is no such file, module or name, if the user's code raises, or if
            what it gives is no :class:`Risk`. The user's exception is the cause.
    """
    value = load_object(target)
    if not isinstance(value, Risk):
        raise TargetError(
            f"{target} is of type {type(value).__name__}, no curvlib.Risk; "
            "return curvlib.Risk(model, loss, data)"
        )
    return value


def load_object(target: str, *, option: str = "TARGET", form: str = _FORM) -> Any:
    """What a TARGET names: an object, or what a function without arguments returns.

    Args:
        target: ``file.py:name`` or ``package.module:name``.
        option: What the user calls it.
        form: What is expected.

    Raises:
        TargetError: If there is no such file, module or name, or if the user's code raises.
    """
    place, colon, name = target.rpartition(":")
    if not (colon and place and name.isidentifier()):
        raise TargetError(f"{option} {target!r} names nothing: {form}")
    module = _from_file(place) if _is_path(place) else _from_module(place)
    if not hasattr(module, name):
        names = [n for n in vars(module) if not n.startswith("_")]
        close = difflib.get_close_matches(name, names, n=3) or sorted(names)[:8]
        raise TargetError(f"{place} has no {name!r}; it has {', '.join(close) or 'no names'}")
    value = getattr(module, name)
    if callable(value) and not isinstance(value, (Risk, nn.Module)):
        value = _guard(value, f"{name}() of {place}")
    return value


def converted(
    risk: Risk, *, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Risk:
    """The same risk on copies of model, loss and data of another type or on another device.

    The user's objects stay as they are. Batches are converted as they come.

    Args:
        risk: The risk.
        dtype: Type of floating-point parameters and data; unchanged when omitted.
        device: Where the copy lives; unchanged when omitted.
    """
    to = functools.partial(_convert, dtype=dtype, device=device)
    model = to(risk.model)
    twins = dict(zip(map(id, risk.model.parameters()), model.parameters(), strict=True))
    return Risk(
        model,
        to(risk.loss.of(risk.model, model)),
        _Converted(risk.data, to) if risk.in_memory is None else [to(b) for b in risk.in_memory],
        forward=risk.take_output,
        target=risk.take_target,
        weight=risk.take_weight,
        reduction=risk.given_reduction,
        params=[twins[id(p)] for p in risk.params.values()],
        group=risk.group or False,
    )


def converted_data(data: Any, *, dtype: torch.dtype | None, device: torch.device | None) -> Any:
    """Batches of another type or on another device, converted as they come."""
    to = functools.partial(_convert, dtype=dtype, device=device)
    held = isinstance(data, (Tensor, Mapping, list, tuple))
    return to(data) if held else _Converted(data, to)


class _Converted:
    """Data whose batches are converted as they come."""

    def __init__(self, data: Any, to: Callable[[Any], Any]) -> None:
        self.data = data
        self.to = to

    def __iter__(self) -> Iterator[Any]:
        return (self.to(batch) for batch in self.data)

    def __len__(self) -> int:
        return len(self.data)


def _convert(value: Any, dtype: torch.dtype | None, device: torch.device | None) -> Any:
    """Tensors, modules, and containers and partial functions of them."""
    again = functools.partial(_convert, dtype=dtype, device=device)
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).to(device=device, dtype=dtype)
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
    if isinstance(value, functools.partial):
        return functools.partial(
            again(value.func),
            *map(again, value.args),
            **{k: again(v) for k, v in value.keywords.items()},
        )
    if isinstance(value, Mapping):
        out: Any = copy.copy(value)  # keeps the class: a BatchEncoding stays one
        for key in value:
            out[key] = again(value[key])
        return out
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(again, value))
    if isinstance(value, (list, tuple)):
        return type(value)(map(again, value))
    return value


def _is_path(place: str) -> bool:
    return place.endswith(".py") or "/" in place or "\\" in place


def _from_file(place: str) -> ModuleType:
    path = Path(place)
    if path.is_dir():
        raise TargetError(f"{place} is a folder; {_FORM}")
    if not path.is_file():
        raise TargetError(f"there is no file {place}; {_FORM}")
    if path.suffix != ".py":
        raise TargetError(f"{place} is no Python file; {_FORM}")
    name = f"curvlib_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TargetError(f"{place} cannot be imported; {_FORM}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # what dataclasses and workers of a DataLoader look up
    sys.path.insert(0, str(path.resolve().parent))  # as if Python ran the file
    _guard(functools.partial(spec.loader.exec_module, module), place)
    return module


def _from_module(place: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        found = importlib.util.find_spec(place) is not None
    except (ModuleNotFoundError, ValueError):
        found = False
    if not found:
        raise TargetError(f"there is no module {place} (nor is it a file); {_FORM}")
    module = _guard(functools.partial(importlib.import_module, place), place)
    assert isinstance(module, ModuleType)
    return module


def _guard(function: Callable[[], Any], what: str) -> Any:
    """Calls the user's code; what it raises is reported with the line that raised it."""
    try:
        return function()
    except (Exception, SystemExit) as error:
        line = error.__traceback__
        while line is not None and line.tb_next is not None:
            line = line.tb_next
        where = (
            f" at {Path(line.tb_frame.f_code.co_filename).name}:{line.tb_lineno}" if line else ""
        )
        raise TargetError(f"{what} raised {type(error).__name__}: {error}{where}") from error
