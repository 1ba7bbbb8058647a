"""The command line on several processes: ``torchrun -m curvlib.cli COMMAND TARGET``.

What a launcher such as ``torchrun`` says in the environment makes the process group, so that TARGET
finds it. The first process prints and writes; errors are printed by those that have them.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from curvlib.core.ranks.group import Group, group_of


@contextlib.contextmanager
def processes() -> Iterator[Group | None]:
    """Joins the group of the launcher's processes, if there are several, and leaves it at the end.

    Each process takes the GPU of its local number. Where the caller has made a group, that is it.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
    if not several or not dist.is_available() or dist.is_initialized():
        yield group_of()
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available() and local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield group_of()
    finally:
        dist.destroy_process_group()


def end_threads() -> None:
    """Ends the threads of a group that was left: they live as long as any object that knows it.

    A thread that outlives the interpreter may end the process with an error after all is done.
    """
    if "RANK" in os.environ:
        gc.collect()


@contextlib.contextmanager
def prints_on_the_first(group: Group | None) -> Iterator[None]:
    """Drops what other processes than the first one print."""
    if group is None or group.first:
        yield
        return
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def complain(text: str, group: Group | None) -> None:
    """Prints an error, with the rank that has it where there are several."""
    where = "" if group is None else f" (rank {group.rank})"
    print(f"curvlib: {text}{where}", file=sys.stderr)
