"""What optimizers write besides PyTorch's own entries, and how it is checked when read.

``state_dict()`` has PyTorch's two entries, ``state`` and ``param_groups``, and a third one,
``curvlib``: plain numbers, strings, lists and tensors, so that ``torch.load(weights_only=True)``
reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvlib.core.files import curvlib_version
from curvlib.optim.clock import Clock

if TYPE_CHECKING:
    from curvlib.optim.shell import CurvatureOptimizer

#: Of the entry ``curvlib``; raised when what it holds changes its meaning.
FORMAT = 1


def saved(opt: CurvatureOptimizer, state: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer of the shell writes.

    Args:
        opt: The optimizer.
        state: PyTorch's two entries. Slices of sharded parameters become ``DTensor``.
    """
    state["curvlib"] = record(
        type(opt).__name__,
        [p for _, p, _ in opt.parameters()],
        {
            "clock": asdict(opt.clock),
            "skipped": opt.skipped,
            "seed": opt.seed,
            "extra": opt._extra_state(),
        },
    )
    if opt.sharding is not None:
        shared = opt.sharding.shared
        of = state["state"].items()
        state["state"] = {i: {k: shared(i, v) for k, v in own.items()} for i, own in of}
    return state


def load(
    opt: CurvatureOptimizer, state_dict: object, plain: Callable[[dict[str, Any]], None]
) -> None:
    """Gives an optimizer of the shell a state that :func:`saved` wrote.

    Args:
        opt: The optimizer.
        state_dict: The state.
        plain: PyTorch's ``load_state_dict``.

    Raises:
        TypeError: If it is no dictionary.
        ValueError: If it is the state of another optimizer, model or version of curvlib. Nothing
            has changed then.
    """
    params = [p for _, p, _ in opt.parameters()]
    state, own = require_own(state_dict, type(opt).__name__, params)
    before = (opt.state, opt.param_groups)
    plain(state)
    try:
        for group in opt.param_groups:
            opt._check(group)
        for i, p, _ in opt.parameters():
            if i in state["state"]:
                values = state["state"][i]
                if opt.sharding is not None:
                    values = {k: opt.sharding.owned(i, v) for k, v in values.items()}
                opt.state[p] = restored(values, p.device)
        opt._load_extra_state(own["extra"])
    except Exception:  # whatever it is, the state stays as it was
        opt.state, opt.param_groups = before
        raise
    opt.clock = Clock(**own["clock"])
    opt.skipped, opt.seed = own["skipped"], own["seed"]


def picklable(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of an optimizer without what cannot be copied, or belongs to others.

    Those are wrappers of PyTorch and of schedulers, process groups, and slices of parameters, which
    a copy finds in its own.
    """
    left = ("step", "_zero_grad_profile_name", "process_group", "sharding")
    own = {k: v for k, v in attributes.items() if not k.startswith("_optimizer_")}
    return {k: v for k, v in own.items() if k not in left}


def copied(opt: CurvatureOptimizer, memo: dict[int, Any]) -> CurvatureOptimizer:
    """A deep copy, with the same process group."""
    twin = type(opt).__new__(type(opt))
    memo[id(opt)] = twin
    twin.__setstate__(deepcopy(opt.__getstate__(), memo))
    twin.process_group = opt.process_group
    return twin


def record(method: str, params: Sequence[Tensor], content: Mapping[str, Any]) -> dict[str, Any]:
    """The entry ``curvlib`` of a state.

    Args:
        method: Name of the optimizer's class.
        params: Its parameters, in order.
        content: What it holds besides.
    """
    return {
        "format": FORMAT,
        "version": curvlib_version(),
        "method": method,
        "shapes": [list(p.shape) for p in params],
        **content,
    }


def require_own(
    state_dict: object, method: str, params: Sequence[Tensor]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A state dict and its entry ``curvlib``, if they belong to this optimizer and model.

    Raises:
        TypeError: If it is no dictionary.
        ValueError: If it is the state of another optimizer, model or version of curvlib.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"load_state_dict takes what state_dict() returned, got {type(state_dict).__name__}"
        )
    missing = {"state", "param_groups", "curvlib"} - set(state_dict)
    if missing:
        raise ValueError(
            f"the state has no entry {sorted(missing)}, so it is not one that {method} wrote; "
            f"load what {method}.state_dict() returned"
        )
    own = dict(state_dict["curvlib"])
    if own.get("format") != FORMAT:
        raise ValueError(
            f"the state was written by curvlib {own.get('version', 'unknown')} in format "
            f"{own.get('format')!r}, and this version reads format {FORMAT}; use the version that "
            "wrote it"
        )
    if own.get("method") != method:
        raise ValueError(f"the state is that of {own.get('method')}, expected {method}")
    shapes = [list(p.shape) for p in params]
    if own.get("shapes") != shapes:
        saved = own.get("shapes", [])
        if len(saved) != len(shapes):
            differ = f"it has {len(saved)} parameters, this optimizer {len(shapes)}"
        else:
            at = next(
                i
                for i, pair in enumerate(zip(saved, shapes, strict=True))
                if len({*map(tuple, pair)}) > 1
            )
            differ = f"parameter {at} has shape {saved[at]} there and {shapes[at]} here"
        raise ValueError(f"the state is that of another model: {differ}")
    return dict(state_dict), own


def restored(value: Any, device: torch.device) -> Any:
    """A copy of a saved value with tensors on a device, of the dtype that was saved.

    PyTorch's own loading casts the state to the dtype of the parameter, which would round a
    moving average in float32 to the bfloat16 of its parameter.
    """
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, Mapping):
        return {k: restored(v, device) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(restored(v, device) for v in value)
    return value
