"""What of PyTorch's is sharded: tensors, and modules that FSDP2 gathers parameters for.

Who has one of them has imported its module. Nothing is imported to find out: functions of
``torch.distributed.nn``, which both modules import, keep the default process group of the moment as
a default argument, so that its threads would not end when it is destroyed.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a ``DTensor``."""
    found = sys.modules.get("torch.distributed.tensor")
    return found is not None and isinstance(tensor, found.DTensor)


def slice_of(tensor: Tensor) -> Tensor:
    """This rank's part of a ``DTensor``, which shares its memory; others as they are."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        own: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return own.detach()


def is_fsdp(module: nn.Module) -> bool:
    """Whether FSDP2 gathers parameters for a module."""
    found = sys.modules.get("torch.distributed.fsdp")
    return found is not None and isinstance(module, found.FSDPModule)


def plain_type(module: nn.Module) -> type:
    """The class of a module, without the one that ``fully_shard`` puts in front of it."""
    if not is_fsdp(module):
        return type(module)
    from torch.distributed.fsdp import FSDPModule

    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))
