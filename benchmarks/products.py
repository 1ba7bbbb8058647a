"""Products with the Hessian and the GGN: time, work, memory and error, against peers.

    python benchmarks/products.py [--rounds 11] [--problems mlp conv gpt digits]

Each row is one library on one problem, one block of K vectors, data in memory, products repeated
on the same vectors. ``ratio`` is wall time in gradients; ``work`` the same in counted
floating-point operations; ``overhead`` how much more time than work. ``memory`` is the growth of
a fresh process (its high-water mark) over two products, in MB; ``error`` is against float64.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import common
import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


# ------------------------------------------------------------------------- contenders
def _curvlib(kind: str, *, streamed: bool) -> Callable[[common.Problem], Product]:
    def make(p: common.Problem) -> Product:
        import curvlib as cl

        data = common.Streamed([(p.x, p.y)]) if streamed else (p.x, p.y)
        risk = cl.Risk(p.model, torch.nn.CrossEntropyLoss(), data)
        op = cl.hessian(risk) if kind == "hessian" else cl.ggn(risk)
        return op.matmat

    return make


def _curvlinops(kind: str) -> Callable[[common.Problem], Product]:
    def make(p: common.Problem) -> Product:
        op = common.curvlinops_operator(p, kind)
        return lambda V: op @ V

    return make


def _backpack(kind: str) -> Callable[[common.Problem], Product]:
    def make(p: common.Problem) -> Product:
        from backpack.hessianfree.ggnvp import ggn_vector_product_from_plist
        from backpack.hessianfree.hvp import hessian_vector_product

        params = p.params

        def product(V: Tensor) -> Tensor:
            output = p.model(p.x)
            loss = torch.nn.functional.cross_entropy(output, p.y)
            grads = None
            if kind == "hessian":  # shared by the columns, as its documentation advises
                grads = torch.autograd.grad(loss, params, create_graph=True)
            columns = []
            for v in V.T:
                parts = common.split(v, params)
                if kind == "hessian":
                    out = hessian_vector_product(loss, params, parts, grad_params=grads)
                else:
                    out = ggn_vector_product_from_plist(loss, output, params, parts)
                columns.append(common.join(out))
            return torch.stack(columns, 1)

        return product

    return make


def double_backward(p: common.Problem) -> Product:
    """What one writes by hand: a graph for each product, shared by its columns."""
    params = p.params

    def product(V: Tensor) -> Tensor:
        grads = torch.autograd.grad(p.loss(), params, create_graph=True)
        return _pull(grads, params, V)

    return product


def double_backward_kept(p: common.Problem) -> Product:
    """What one writes by hand with care: the graph is kept between products."""
    params = p.params
    grads: list[Any] = []

    def product(V: Tensor) -> Tensor:
        if not grads:
            grads.extend(torch.autograd.grad(p.loss(), params, create_graph=True))
        return _pull(grads, params, V)

    return product


def _pull(grads: Any, params: Any, V: Tensor) -> Tensor:
    columns = [
        common.join(torch.autograd.grad(grads, params, common.split(v, params), retain_graph=True))
        for v in V.T
    ]
    return torch.stack(columns, 1)


def ggn_by_hand(p: common.Problem) -> Product:
    """Jv by double backward, the cross-entropy's Hessian in closed form, then one backward."""
    params = p.params

    def product(V: Tensor) -> Tensor:
        output = p.model(p.x)
        u = torch.zeros_like(output, requires_grad=True)
        pulled = torch.autograd.grad(output, params, u, create_graph=True)
        q = output.detach().softmax(1)
        columns = []
        for v in V.T:
            (jv,) = torch.autograd.grad(pulled, u, common.split(v, params), retain_graph=True)
            hjv = (q * jv - q * (q * jv).sum(1, keepdim=True)) / len(q)
            out = torch.autograd.grad(output, params, hjv, retain_graph=True)
            columns.append(common.join(out))
        return torch.stack(columns, 1)

    return product


CONTENDERS: dict[str, dict[str, Callable[[common.Problem], Product]]] = {
    "hessian": {
        "curvlib": _curvlib("hessian", streamed=False),
        "curvlib (streamed)": _curvlib("hessian", streamed=True),
        "curvlinops": _curvlinops("hessian"),
        "BackPACK": _backpack("hessian"),
        "by hand": double_backward,
        "by hand, graph kept": double_backward_kept,
    },
    "ggn": {
        "curvlib": _curvlib("ggn", streamed=False),
        "curvlib (streamed)": _curvlib("ggn", streamed=True),
        "curvlinops": _curvlinops("ggn"),
        "BackPACK": _backpack("ggn"),
        "by hand": ggn_by_hand,
    },
}
ORACLES = {"hessian": double_backward, "ggn": ggn_by_hand}


def gradient(p: common.Problem) -> Callable[[], Tensor]:
    params = p.params
    return lambda: common.join(torch.autograd.grad(p.loss(), params))


# ----------------------------------------------------------------------- measurements
def _prepare(
    make: Callable[[common.Problem], Product], name: str, V: Tensor
) -> tuple[Callable[[], Tensor] | None, str]:
    """A product to be timed, or why there is none."""
    try:
        product = make(common.problem(name))
        call = common.math_attention(lambda: product(V))
        call()
    except ImportError as reason:
        return None, f"not installed: {reason.name}"
    except Exception as reason:  # a peer that cannot do this problem
        return None, f"{type(reason).__name__}: {str(reason)[:80]}"
    return call, ""


def measure(name: str, kind: str, count: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of all contenders on one problem."""
    p = common.problem(name)
    V = common.vectors(p.size, count)
    exact = common.math_attention(lambda: ORACLES[kind](p.double())(V.double()))()
    calls: dict[str, Callable[[], Any]] = {"gradient": common.math_attention(gradient(p))}
    notes: dict[str, str] = {}
    for library, make in CONTENDERS[kind].items():
        call, note = _prepare(make, name, V)
        if call is None:
            notes[library] = note
        else:
            calls[library] = call
    work = {library: common.flops(call) for library, call in calls.items()}
    times = common.race(calls, rounds=rounds, least=0.1)
    unit, unit_work = times["gradient"].median, work["gradient"]
    base = {"problem": name, "parameters": p.size, "operator": kind, "K": count}
    rows = []
    for library, call in calls.items():
        seconds = times[library].median
        ratio, flop_ratio = seconds / unit, work[library] / unit_work
        row = base | {
            "library": library,
            "ms": round(1e3 * seconds, 3),
            "quartiles": [round(1e3 * times[library].low, 3), round(1e3 * times[library].high, 3)],
            "ratio": round(ratio, 3),
            "work": round(flop_ratio, 3),
            "overhead": round(ratio / flop_ratio - 1, 3) if flop_ratio else None,
            "memory": memory(name, kind, count, library),
        }
        if library != "gradient":
            row["error"] = float(f"{common.error(call(), exact):.3g}")
            row["ratio per column"] = round(ratio / count, 3)
        rows.append(row)
    rows += [base | {"library": library, "note": note} for library, note in notes.items()]
    return rows


def memory(name: str, kind: str, count: int, library: str) -> float | None:
    """Megabytes that a fresh process grows by, at most, over two products."""
    arguments = ["--memory", name, kind, str(count), library]
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=False
    )
    grown = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    return None if grown is None else round(grown / 1e6, 1)


def _memory_here(name: str, kind: str, count: int, library: str) -> None:
    p = common.problem(name)
    V = common.vectors(p.size, count)
    common.math_attention(gradient(p))()  # libraries are loaded, buffers of kernels exist
    if library == "gradient":
        call = gradient(p)
    else:
        product = CONTENDERS[kind][library](p)
        small = common.problem("digits" if name != "digits" else "mlp")
        warm = CONTENDERS[kind][library](small)
        common.math_attention(lambda: warm(common.vectors(small.size, 1)))()
        del warm, small

        def call() -> Tensor:
            product(V)
            return product(V)

    print(json.dumps(common.peak_memory(common.math_attention(call))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--problems", nargs="+", default=["mlp", "conv", "gpt", "digits"])
    parser.add_argument("--columns", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--memory", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        name, kind, count, library = options.memory
        _memory_here(name, kind, int(count), library)
        return
    shown = {
        "library": "", "ms": ".2f", "ratio": ".2f", "work": ".2f", "overhead": ".0%",
        "memory": ".0f", "error": ".1e", "note": "",
    }  # fmt: skip
    rows = common.measured(options, CONTENDERS, measure, shown)
    if not options.no_save:
        settings = {"rounds": options.rounds, "dtype": "float32", "device": "cpu"}
        print("\nwrote", common.save("products", rows, settings).relative_to(common.RESULTS.parent))


if __name__ == "__main__":
    main()
