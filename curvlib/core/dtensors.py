"""What of PyTorch's is sharded: tensors, and modules that FSDP2 gathers parameters for."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a ``DTensor``."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def slice_of(tensor: Tensor) -> Tensor:
    """This rank's part of a ``DTensor``, which shares its memory; others as they are."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        own: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return own.detach()


def is_fsdp(module: nn.Module) -> bool:
    """Whether FSDP2 gathers parameters for a module."""
    if not dist.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)
