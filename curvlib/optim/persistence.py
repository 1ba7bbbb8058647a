"""What optimizers write besides PyTorch's own entries, and how it is checked when read.

``state_dict()`` has PyTorch's two entries, ``state`` and ``param_groups``, and a third one,
``curvlib``: plain numbers, strings, lists and tensors, so that ``torch.load(weights_only=True)``
reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvlib.core.files import curvlib_version

#: Of the entry ``curvlib``; raised when what it holds changes its meaning.
FORMAT = 1


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
