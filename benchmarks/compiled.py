"""Products with the Hessian and the GGN as captured graphs: against eager ones, and curvlinops.

    python benchmarks/compiled.py [--rounds 7] [--threads 1] [--problems digits mlp gpt]

Data in memory, so that eager products keep their graphs and captured ones their linearizations.
``ratio`` is wall time in gradients, ``speedup`` in eager products of the same rounds, ``first``
seconds of the first product, which records, compiles and proves (without any cache on disk), and
``error`` is against float64. ``eager``: plain autograd; ``aot_eager``: the captured operations one
by one; ``inductor``: compiled.

Measured on one thread of a busy CPU (``results/compiled.json``), inductor is 1.4 (Hessian) and 2.2
(GGN) times as fast as eager products on the digits, which dispatch binds; *no faster* on the MLP
(1.10 and 0.98), whose time is in large matrix products; 1.26 and 1.31 times on the GPT, by fused
element-wise operations, after six to nine minutes of compiling: there it pays after thousands of
products. ``aot_eager`` is worth it for the small network's GGN alone. No GPU has measured it yet.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()  # before torch reads it

import common
import products
import torch
from torch import Tensor

BACKENDS: dict[str, bool | str] = {"eager": False, "aot_eager": "aot_eager", "inductor": "inductor"}


def _product(p: common.Problem, kind: str, backend: bool | str) -> Callable[[Tensor], Tensor]:
    import curvlib as cl

    risk = cl.Risk(p.model, torch.nn.CrossEntropyLoss(), (p.x, p.y))
    make = cl.hessian if kind == "hessian" else cl.ggn
    return make(risk, compile=backend).matmat


def measure(name: str, kind: str, count: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of one problem, one operator and ``count`` columns."""
    p = common.problem(name)
    V = common.vectors(p.size, count)
    exact = common.math_attention(lambda: products.ORACLES[kind](p.double())(V.double()))()
    calls: dict[str, Callable[[], Any]] = {"gradient": products.gradient(p)}
    rows: dict[str, dict[str, Any]] = {"gradient": {}}
    for library, backend in BACKENDS.items():
        call = partial(_product(p, kind, backend), V)
        start = time.perf_counter()
        try:
            found = call()
        except RuntimeError as reason:
            rows[library] = {"note": str(reason)[:100]}
            continue
        first = time.perf_counter() - start
        calls[library] = call
        rows[library] = {"first": round(first, 2), "error": common.error(found, exact)}
    try:
        peer = products.CONTENDERS[kind]["curvlinops"](p)
        calls["curvlinops"] = common.math_attention(partial(peer, V))
        rows["curvlinops"] = {"error": common.error(calls["curvlinops"](), exact)}
    except ImportError:
        rows["curvlinops"] = {"note": "not installed"}
    times = common.race(calls, rounds=rounds, least=0.2)
    base = {"problem": name, "parameters": p.size, "operator": kind, "columns": count}
    for library, time_ in times.items():
        rows[library] |= {
            "ms": round(1e3 * time_.median, 3),
            "low": round(1e3 * time_.low, 3),
            "high": round(1e3 * time_.high, 3),
            "ratio": round(time_.median / times["gradient"].median, 3),
            "speedup": round(times["eager"].median / time_.median, 3),
        }
    return [base | {"library": library} | row for library, row in rows.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--problems", nargs="+", default=["digits", "mlp", "gpt"])
    parser.add_argument("--columns", nargs="+", type=int, default=[1])
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="curvlib: scaled_dot_product_attention")
    shown = {
        "library": "", "ms": ".2f", "ratio": ".2f", "speedup": ".2f", "first": ".1f",
        "error": ".1e", "note": "",
    }  # fmt: skip
    rows = common.measured(options, ("hessian", "ggn"), measure, shown)
    if not options.no_save:
        settings = {"rounds": options.rounds, "dtype": "float32", "device": "cpu"}
        print("\nwrote", common.save("compiled", rows, settings).relative_to(common.RESULTS.parent))


if __name__ == "__main__":
    main()
