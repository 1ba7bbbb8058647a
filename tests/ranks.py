"""Runs functions on several processes of one gloo group, and returns what each of them returns.

The functions live in modules that can be imported by name (``tests.distributed.work``) and are
called as ``name(rank, size, *args)``. Processes are kept for the next call; after a failure, whose
tracebacks the caller sees, new ones are started. This file is what they run, too.
"""

from __future__ import annotations

import atexit
import datetime as dt
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def on_ranks(function: str, size: int, *args: Any, fresh: bool = False) -> list[Any]:
    """What ``function``, named ``"module:name"``, returns on each of ``size`` ranks.

    Args:
        function: Its name.
        size: How many ranks.
        args: Further arguments, sent by ``torch.save``.
        fresh: Whether to start new processes.

    Raises:
        AssertionError: If a rank raised or ended, with the tracebacks.
    """
    if fresh or size not in _POOLS:
        close(size)
        _POOLS[size] = Pool(size)
    pool = _POOLS[size]
    try:
        return pool.call(function, args)
    except AssertionError:
        close(size)
        raise


class Pool:
    """Processes that wait for calls."""

    def __init__(self, size: int, timeout: float = 300.0) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.size, self.calls = size, 0
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__, str(self.folder), str(rank), str(size), str(timeout)],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]

    def start(self, function: str, args: tuple[Any, ...]) -> None:
        import torch

        self.calls += 1
        torch.save((function, args), self.folder / f"call{self.calls}.pt")
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{self.calls}\n")
            process.stdin.flush()

    def call(self, function: str, args: tuple[Any, ...]) -> list[Any]:
        self.start(function, args)
        return self.finish()

    def finish(self) -> list[Any]:
        import torch

        said = []
        for process in self.processes:
            assert process.stdout is not None
            said.append(process.stdout.readline().strip())
        errors = [path.read_text() for path in sorted(self.folder.glob("error*.txt"))]
        assert all(line == "done" for line in said), "\n".join([f"said {said}", *errors])
        paths = [self.folder / f"{self.calls}.{rank}.pt" for rank in range(self.size)]
        return [torch.load(path, weights_only=False) for path in paths]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)


_POOLS: dict[int, Pool] = {}


@atexit.register
def close(size: int | None = None) -> None:
    """Ends the processes of a pool, or of all."""
    for key in [size] if size is not None else list(_POOLS):
        pool = _POOLS.pop(key, None)
        if pool is not None:
            pool.close()


def main(folder: Path, rank: int, size: int, timeout: float) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed goes to the test's stderr
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=size,
        timeout=dt.timedelta(seconds=timeout),
    )
    for line in sys.stdin:
        function, args = torch.load(folder / f"call{line.strip()}.pt", weights_only=False)
        module, name = function.split(":")
        try:
            found = getattr(importlib.import_module(module), name)(rank, size, *args)
            torch.save(found, folder / f"{line.strip()}.{rank}.pt")
            dist.barrier()
            answer = "done"
        except BaseException:  # noqa: BLE001 (the caller is told)
            (folder / f"error{rank}.txt").write_text(f"rank {rank}:\n{traceback.format_exc()}")
            answer = "failed"
        print(answer, file=answers, flush=True)
        if answer == "failed":
            os._exit(1)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
