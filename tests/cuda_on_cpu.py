"""Kernels of curvlib, compiled for the CPU by g++: see ``cuda_on_cpu.h``."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from curvlib.core.raw_kernels import THREADS

GXX, NVCC = shutil.which("g++"), shutil.which("nvcc")

#: Marks a test that runs kernels on the CPU.
emulated = pytest.mark.skipif(GXX is None, reason="needs g++")


class Emulated:
    """In the place of :class:`curvlib.core.raw_kernels.Kernels`.

    Args:
        source: The kernels.
        order: In which threads take turns: 0, 1 or 2.
    """

    def __init__(self, source: Path, order: int = 0) -> None:
        self.library = _library(source)
        self.device = torch.device("cpu")
        self.order = order
        self.launched: list[str] = []

    def launch(self, name: str, grid: tuple[int, int], *arguments: Any) -> None:
        values = [_value(argument) for argument in arguments]
        packed = (ctypes.c_int64 * 12)(*values)
        kernel = ctypes.cast(getattr(self.library, name), ctypes.c_void_p)
        failed = self.library.launch(kernel, *grid, THREADS, self.order, packed)
        reasons = ["", "threads wait in vain", "a vector was read at no multiple of its size"]
        assert not failed, f"{name}: {reasons[failed]}"
        self.launched.append(name)


def _value(argument: Any) -> int:
    if argument is None:
        return 0
    return argument.data_ptr() if isinstance(argument, Tensor) else argument


@lru_cache
def _library(source: Path) -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp())
    whole = folder / "kernels.cpp"
    shim = Path(__file__).with_suffix(".h")
    whole.write_text(f'#include "{shim}"\n#include "{source}"\n')
    built = folder / "kernels.so"
    command = [
        str(GXX),
        "-std=c++17",
        "-O1",
        "-shared",
        "-fPIC",
        "-w",
        str(whole),
        "-o",
        str(built),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    library = ctypes.CDLL(str(built))
    shutil.rmtree(folder)
    return library


def guarded(like: Tensor, fill: float = float("nan"), margin: int = 64, offset: int = 0) -> Tensor:
    """A copy with numbers around it that spoil what reads them; :func:`untouched` checks them.

    Args:
        like: What is copied.
        fill: The numbers around.
        margin: How many on each side.
        offset: Numbers by which the copy starts past a multiple of 64 bytes.
    """
    room = torch.full((like.numel() + 2 * margin,), fill, dtype=like.dtype)
    start = margin + offset
    room = torch.cat([room, room.new_full((offset,), fill)])
    out = room[start : start + like.numel()].view(like.shape)
    return out.copy_(like)


def untouched(tensor: Tensor, margin: int = 64) -> bool:
    """Whether what lies around a guarded tensor is as it was."""
    start, stop = tensor.storage_offset(), tensor.storage_offset() + tensor.numel()
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    around = torch.cat([whole[:start], whole[stop:]])
    return bool(around.isnan().all())


def cubin(source: Path, folder: Path, architecture: str) -> str:
    """What nvcc says of compiling a file, warnings being errors: registers and spills."""
    command = [
        str(NVCC), "-cubin", f"-arch={architecture}", "-std=c++17", "-Xptxas", "-v",
        "-Werror", "all-warnings", "-o", str(folder / "out.cubin"), str(source),
    ]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr
