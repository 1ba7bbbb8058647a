"""CUDA kernels of curvlib's own, compiled by CuPy when they are first launched.

Kernels are files of CUDA C beside the module that launches them. They include nothing, so that
what compiles them at run time (NVRTC) needs no headers. Each has a way in torch that gives the same
numbers; where there is no CUDA device or no CuPy that fits it, that way is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvlib.core.cupy_arrays import cupy_for, cupy_on_stream_of_torch

#: Threads of a block, in every kernel.
THREADS = 256


@dataclass(frozen=True, eq=False)
class Kernels:
    """The kernels of a file, for one device.

    Attributes:
        module: Their ``cupy.RawModule``.
        cupy: The module.
        device: A CUDA device.
    """

    module: Any
    cupy: Any
    device: torch.device

    @classmethod
    def of(cls, source: Path, device: torch.device) -> Kernels | None:
        """Those of a file; ``None`` where CuPy cannot be used. Nothing is compiled yet."""
        cupy = cupy_for(device)
        return None if cupy is None else cls(_module(cupy, source), cupy, device)

    def launch(self, name: str, grid: tuple[int, int], *arguments: Any) -> None:
        """Queues a kernel on torch's current stream; nothing waits.

        Args:
            name: Of the function.
            grid: Blocks along x and y.
            arguments: Tensors (by address; ``None`` is the null pointer), integers (64 bits), and
                NumPy scalars.
        """
        with cupy_on_stream_of_torch(self.cupy, self.device):
            self.module.get_function(name)(grid, (THREADS,), tuple(map(_argument, arguments)))


def _argument(value: Any) -> Any:
    if value is None:
        return np.int64(0)
    if isinstance(value, Tensor):
        return np.int64(value.data_ptr())
    return np.int64(value) if isinstance(value, int) else value


@lru_cache(maxsize=16)
def _module(cupy: Any, source: Path) -> Any:
    return cupy.RawModule(code=source.read_text(encoding="utf-8"), options=("--std=c++17",))
