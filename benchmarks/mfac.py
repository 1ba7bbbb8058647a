"""M-FAC: time of push + solve against reading the window twice, precompute, accuracy, memory.

    python benchmarks/mfac.py [--rounds 7] [--most 3e9] [--lengths 1e5 1e6 1e7] [--rows 16 128 1024]

A step is one ``push`` of a gradient and the ``solve_row`` of it, as an optimizer does. It must read
the window twice, so that its floor is ``2 * itemsize * m * d`` bytes at the bandwidth of a copy
(bytes read and written, of arrays as large as the window up to 512 MB), measured in the same
rounds. ``small`` is the share of the ``m x m`` side. The static precompute (Gram matrix, Cholesky
factorization, triangular solve of all rows) stands beside the recursion of the M-FAC paper over
rows. ``memory`` is the growth of a fresh process over the window itself, in vectors of length d.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import common
import torch
from torch import Tensor

from curvlib.operators.mfac import MFAC, mfac_window
from curvlib.operators.windows.window import Window

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def filled(d: int, m: int, dtype: torch.dtype) -> MFAC:
    """A full window of random rows."""
    generator = torch.Generator().manual_seed(0)
    F = mfac_window(d, m, dtype=dtype)
    for start in range(0, m, 64):
        rows = torch.randn(min(64, m - start), d, generator=generator)
        F.push(rows.to(dtype))
    return F


def step(d: int, m: int, name: str, rounds: int) -> dict[str, Any]:
    """One row of the table of steps."""
    dtype = DTYPES[name]
    F = filled(d, m, dtype)
    numbers = torch.randn(d + 2 * m, generator=torch.Generator().manual_seed(1)).to(dtype)
    turn = [0]
    size = m * d * dtype.itemsize
    copied = torch.zeros(min(size, 2**29), dtype=torch.uint8).view(torch.float32)
    target = torch.empty_like(copied)

    def push() -> None:  # rows that are shifted against each other differ
        turn[0] += 1
        start = turn[0] % (2 * m)
        F.push(numbers[start : start + d])

    def push_and_solve() -> Tensor:
        push()
        return F.solve_row()

    def small() -> None:
        F.window.version += 1  # as if it had changed: factorized again
        F.quadratic_row()

    contenders = {
        "copy": lambda: target.copy_(copied),
        "step": push_and_solve,
        "push": push,
        "small": small,
    }
    times = common.race(contenders, rounds=rounds, least=0.05)
    seconds = times["step"]
    bandwidth = 2 * copied.nbytes / times["copy"].median
    floor = 2 * size / bandwidth
    return {
        "d": d,
        "m": m,
        "dtype": name,
        "window MB": round(size / 1e6, 1),
        "GB/s": round(bandwidth / 1e9, 2),
        "floor ms": round(1e3 * floor, 3),
        "step ms": round(1e3 * seconds.median, 3),
        "quartiles": [round(1e3 * seconds.low, 3), round(1e3 * seconds.high, 3)],
        "ratio": round(seconds.median / floor, 3),
        "push": round(times["push"].median / seconds.median, 3),
        "small": round(times["small"].median / seconds.median, 3),
        "float64": not F.window.rounded,  # whether solves had to repeat passes in float64
        "memory": memory(d, m, name),
    }


def recursion(rows: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The recursion over rows of the M-FAC paper (section 3.1)."""
    m = len(rows)
    V, c = torch.zeros_like(rows), torch.zeros(m, dtype=rows.dtype)
    for i, g in enumerate(rows):
        V[i] = torch.addmv(g / damping, V[:i].mT, (V[:i] @ g) / c[:i], alpha=-1.0)
        c[i] = m + g @ V[i]
    return V, c


def precompute(d: int, m: int, rounds: int) -> dict[str, Any]:
    """The static algorithm, beside the recursion over rows."""
    rows = torch.randn(m, d, generator=torch.Generator().manual_seed(0))

    def ours() -> MFAC:
        F = MFAC(Window(d, m), damping=1e-2, relative=False)
        F.push(rows)
        F.precompute()
        return F

    def without_elements() -> Tensor:
        F = MFAC(Window(d, m), damping=1e-2, relative=False)
        F.push(rows)
        return F.solve_row()

    contenders = {
        "recursion": lambda: recursion(rows, 1e-2),
        "ours": ours,
        "solves only": without_elements,
    }
    times = common.race(contenders, rounds=rounds, least=0.0)
    return {
        "d": d,
        "m": m,
        "recursion s": round(times["recursion"].median, 3),
        "ours s": round(times["ours"].median, 3),
        "solves only s": round(times["solves only"].median, 3),
        "faster": round(times["recursion"].median / times["ours"].median, 2),
        "faster, solves only": round(times["recursion"].median / times["solves only"].median, 2),
    }


def memory(d: int, m: int, name: str) -> float | None:
    """Growth of a fresh process over its window, in float32 vectors of length d."""
    done = subprocess.run(
        [sys.executable, __file__, "--memory", str(d), str(m), name],
        capture_output=True,
        text=True,
        check=False,
    )
    grown = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    return None if grown is None else round(grown / (4 * d), 2)


def _memory_here(d: int, m: int, name: str) -> None:
    small = filled(2000, min(m, 64), DTYPES[name])
    small.solve_row()  # libraries are loaded, buffers of kernels exist
    F = filled(d, m, DTYPES[name])
    rows = torch.randn(2, d)

    def call() -> None:
        for row in rows:
            F.push(row)
            F.solve_row()

    print(json.dumps(common.peak_memory(call)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--most", type=float, default=3e9, help="bytes of the largest window")
    parser.add_argument("--least", type=float, default=0.0, help="bytes of the smallest window")
    parser.add_argument("--lengths", nargs="+", type=float, default=[1e5, 1e6, 1e7, 1e8])
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 64, 256, 1024])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--static", nargs=2, type=float, default=[2e5, 256])
    parser.add_argument("--no-static", action="store_true")
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        d, m, name = options.memory
        _memory_here(int(d), int(m), name)
        return
    rows: list[dict[str, Any]] = []
    shown = {
        "d": ",", "m": "", "dtype": "", "window MB": ".0f", "GB/s": ".1f", "floor ms": ".2f",
        "step ms": ".2f", "ratio": ".2f", "push": ".0%", "small": ".0%", "float64": "",
        "memory": ".1f",
    }  # fmt: skip
    for name in options.dtypes:
        for d in map(int, options.lengths):
            for m in options.rows:
                size = d * m * DTYPES[name].itemsize
                if options.least <= size <= options.most:
                    rows.append({"what": "step"} | step(d, m, name, options.rounds))
                    print(common.table(rows[-1:], shown), flush=True)
    if not options.no_static:
        d, m = map(int, options.static)
        rows.append({"what": "precompute"} | precompute(d, m, min(options.rounds, 3)))
        print(common.table(rows[-1:], {key: "" for key in rows[-1] if key != "what"}))
    steps = [row for row in rows if row["what"] == "step"]
    print("\n" + common.table(steps, shown))
    if not options.no_save:
        settings = {"rounds": options.rounds, "threads": options.threads, "device": "cpu"}
        print("\nwrote", common.save("mfac", rows, settings).relative_to(common.RESULTS.parent))


if __name__ == "__main__":
    main()
