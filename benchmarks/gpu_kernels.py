"""Kernels on a GPU: steps of M-FAC against copies of memory, probes and products against torch.

    python benchmarks/gpu_kernels.py [--rounds 9] [--lengths 1e6 1e7 1e8] [--rows 32 128 512]

A step of M-FAC is one push of a gradient and the solve of it: two passes over the window, whose
floor is ``2 * itemsize * m * d`` bytes at the bandwidth of a copy (bytes read and written) that is
measured in the same rounds. ``share`` is the floor over the step's time (target 0.8), ``push`` and
``combination`` are those of the passes alone, and ``torch`` is the step with torch's passes.

What is read off ``K`` products of Rademacher probes (inner products, and the diagonal's regression)
is timed in a kernel, which makes the probes again, and in torch, which reads them; ``share`` is the
floor ``(K + 4) d itemsize`` over the kernel's time. Times are medians of interleaved rounds. A CUDA
device and CuPy are needed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import common
import torch
from torch import Tensor

from curvlib.core.cupy_arrays import cupy_for
from curvlib.estimators import sampling
from curvlib.estimators.philox import draw_keys
from curvlib.estimators.probe_kernels import ProbeKernels
from curvlib.estimators.probes import fill_signs
from curvlib.estimators.rows import dots
from curvlib.operators.mfac_operator import MFAC
from curvlib.operators.windows.window import Window

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CALLS = 10  # between two waits for the device


def waited(call: Callable[[], Any]) -> Callable[[], None]:
    """Several calls, until the device has done them."""

    def calls() -> None:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()

    return calls


def raced(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of a call of each."""
    arranged = {name: waited(call) for name, call in contenders.items()}
    times = common.race(arranged, rounds=rounds, least=0.05)
    return {name: timing.median / CALLS for name, timing in times.items()}


def copied(size: int) -> tuple[Callable[[], Any], int]:
    """A copy as large as some memory, up to 4 GB, and the bytes that it reads and writes."""
    source = torch.zeros(min(size, 2**32) // 4, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * source.nbytes


def mfac_step(d: int, m: int, name: str, rounds: int) -> dict[str, Any]:
    """One row of the table of steps."""
    dtype = DTYPES[name]
    numbers = torch.randn(d + 8 * m, device="cuda").to(dtype)
    turn = [0]

    def following() -> Tensor:  # rows that are shifted against each other differ
        turn[0] += 8
        start = turn[0] % (8 * m)
        return numbers[start : start + d]

    operators = {}
    for fused in (True, False):
        window = Window(d, m, dtype=dtype, device="cuda", fused=fused)
        operators[fused] = MFAC(window, damping=1.0)
        for _ in range(m):
            window.push(following(), check=False)

    def step(fused: bool) -> Callable[[], Tensor]:
        def call() -> Tensor:
            operators[fused].push(following(), check=False)
            return operators[fused].solve_row()

        return call

    coefficients = torch.rand(1, m, 1, device="cuda", dtype=torch.float64)
    ours = operators[True].window
    copy, copy_bytes = copied(ours.nbytes)
    seconds = raced(
        {
            "copy": copy,
            "step": step(True),
            "torch": step(False),
            "push": lambda: ours.push(following(), check=False),
            "combination": lambda: ours.combination(coefficients),
        },
        rounds,
    )
    bandwidth = copy_bytes / seconds["copy"]
    passed = m * d * dtype.itemsize
    return {
        "what": "mfac",
        "d": d,
        "m": m,
        "dtype": name,
        "GB/s": bandwidth / 1e9,
        "step ms": 1e3 * seconds["step"],
        "share": 2 * passed / bandwidth / seconds["step"],
        "push": passed / bandwidth / seconds["push"],
        "combination": passed / bandwidth / seconds["combination"],
        "torch": seconds["torch"] / seconds["step"],
    }


def probe_products(d: int, count: int, rounds: int) -> dict[str, Any]:
    """One row of the table of probes."""
    keys = draw_keys(count, torch.Generator("cuda").manual_seed(0))
    Y = torch.randn(count, d, device="cuda")
    W = torch.empty_like(Y)
    kernels = ProbeKernels.of(Y)
    assert kernels is not None
    slopes, residual = torch.zeros(2, d, device="cuda")

    def in_torch() -> None:
        for k, (w, y) in enumerate(zip(W, Y, strict=True)):
            sampling.regress(slopes, residual, None, k + 1, w, y)
        dots(W, Y)

    fill_signs(W, keys, kernels)
    copy, copy_bytes = copied(Y.nbytes)
    seconds = raced(
        {
            "copy": copy,
            "fill": lambda: kernels.fill(W, keys),
            "torch fill": lambda: fill_signs(W, keys),
            "read": lambda: kernels.read(Y, keys, diagonal=slopes, residual=residual),
            "torch read": in_torch,
        },
        rounds,
    )
    bandwidth = copy_bytes / seconds["copy"]
    return {
        "what": "probes",
        "d": d,
        "K": count,
        "GB/s": bandwidth / 1e9,
        "read ms": 1e3 * seconds["read"],
        "share": (count + 4) * 4 * d / bandwidth / seconds["read"],
        "fill": 4 * count * d / bandwidth / seconds["fill"],
        "torch read": seconds["torch read"] / seconds["read"],
        "torch fill": seconds["torch fill"] / seconds["fill"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--lengths", nargs="+", type=float, default=[1e6, 1e7, 1e8])
    parser.add_argument("--rows", nargs="+", type=int, default=[32, 128, 512])
    parser.add_argument("--probes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_kernels.py measures kernels on a GPU, and torch finds no CUDA device here")
    cupy = cupy_for(torch.device("cuda", 0))
    if cupy is None:
        sys.exit("gpu_kernels.py needs the CuPy of torch's CUDA: pip install 'curvlib[cupy]'")
    rows: list[dict[str, Any]] = []
    room = 0.4 * torch.cuda.mem_get_info()[0]  # two windows, and what is copied
    for name in options.dtypes:
        for d in map(int, options.lengths):
            for m in options.rows:
                if d * m * DTYPES[name].itemsize < room:
                    rows.append(mfac_step(d, m, name, options.rounds))
                    print(common.table(rows[-1:], _shown(rows[-1])), flush=True)
                    torch.cuda.empty_cache()
    for d in map(int, options.lengths):
        for count in options.probes:
            rows.append(probe_products(d, count, options.rounds))
            print(common.table(rows[-1:], _shown(rows[-1])), flush=True)
    if not options.no_save:
        gpu = {"name": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        settings = {"rounds": options.rounds, "gpu": gpu, "cupy": cupy.__version__}
        print(
            "\nwrote", common.save("gpu_kernels", rows, settings).relative_to(common.RESULTS.parent)
        )


def _shown(row: dict[str, Any]) -> dict[str, str]:
    formats = {int: ",", float: ".3g", str: ""}
    return {key: formats[type(value)] for key, value in row.items() if key != "what"}


if __name__ == "__main__":
    main()
