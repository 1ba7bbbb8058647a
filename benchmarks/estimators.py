"""Traces and diagonals: error against products and seconds, overhead, and time per product.

    python benchmarks/estimators.py [--seeds 40] [--rounds 5] [--no-save]

Four tables, each row with its ``part``:

- ``accuracy``: the error of each method for the same products, in the root mean square over
  seeds, relative to the trace (or to the norm of the diagonal), with its own standard error, on
  matrices of 1,000 rows with prescribed spectra and on the Hessian and the GGN of a trained
  digits network (a quarter of the seeds). Truths are dense. The last method is ``trace(op)``
  or ``diagonal(op)`` as it is called without one.
- ``products``: how many products plain Hutchinson would need for the error of each method.
- ``overhead``: time outside the operator's products by time inside them, for P > 1e6 and two
  sizes of the data; ``ms`` is that outside for each product, which does not depend on the data,
  and ``enough`` how many examples make the overhead 5 %, as products take time in proportion.
- ``per product``: milliseconds per product of the same method, of curvlib and curvlinops.

Large pages are asked of PyTorch's allocator for both libraries (``THP_MEM_ALLOC_ENABLE=1``):
otherwise page faults of fresh memory are most of what is measured outside the products.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # before torch allocates

import common
import torch
from torch import Tensor

import curvlib as cl
from curvlib.core.operator import LinearOperator
from curvlib.estimators.diagonal import diagonal
from curvlib.estimators.functions import trace_of
from curvlib.estimators.low_rank import low_rank
from curvlib.estimators.solve import solve
from curvlib.estimators.trace import trace

F64 = torch.float64
SIZE = 1000
BUDGETS = (12, 48, 192)

try:
    import curvlinops
except ImportError:
    curvlinops = None


# ------------------------------------------------------------------------------- problems
@dataclass(frozen=True)
class Matrix:
    """A matrix whose diagonal is known, as each library takes it."""

    name: str
    diagonal: Tensor
    ours: LinearOperator
    theirs: Any


def spectra() -> dict[str, Tensor]:
    k = torch.arange(SIZE, dtype=F64)
    return {
        "flat": 3.0 - 2.0 * k / (SIZE - 1),
        "polynomial": (k + 1) ** -2,
        "exponential": 0.7**k,
        "step": torch.where(k < 50, 1.0, 1e-3).to(F64),
    }


def matrices() -> list[Matrix]:
    """Random eigenvectors, prescribed eigenvalues (as in Epperly, Tropp and Webber's tests)."""
    draw = torch.Generator().manual_seed(3)
    Q = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=draw, dtype=F64)).Q
    out = []
    for name, values in spectra().items():
        A = (Q * values) @ Q.T
        A = 0.5 * (A + A.T)
        op = LinearOperator(A.matmul, (SIZE, SIZE), dtype=F64, psd=True, name=name)
        out.append(Matrix(name, A.diagonal().clone(), op, A))
    return out


def networks() -> list[Matrix]:
    p, double = common.problem("digits"), common.problem("digits").double()
    risk = cl.Risk(p.model, torch.nn.CrossEntropyLoss(), (p.x, p.y))
    truths = {"hessian": hessian_diagonal(double), "ggn": ggn_diagonal(double)}
    ours = {"hessian": cl.hessian(risk), "ggn": cl.ggn(risk)}
    return [
        Matrix(f"digits {kind}", truths[kind], ours[kind], peer(p, kind))
        for kind in ("hessian", "ggn")
    ]


def peer(p: common.Problem, kind: str) -> Any:
    return None if curvlinops is None else common.curvlinops_operator(p, kind)


def hessian_diagonal(p: common.Problem) -> Tensor:
    """By double backward, column after column."""
    grads = torch.autograd.grad(p.loss(), p.params, create_graph=True)
    flat, out = common.join(grads), []
    for rows in torch.arange(p.size).split(200):
        eye = torch.zeros(len(rows), p.size, dtype=flat.dtype)
        eye[torch.arange(len(rows)), rows] = 1.0
        columns = torch.autograd.grad(flat, p.params, eye, retain_graph=True, is_grads_batched=True)
        joined = torch.cat([c.reshape(len(rows), -1) for c in columns], 1)
        out.append(joined[torch.arange(len(rows)), rows])
    return torch.cat(out)


def ggn_diagonal(p: common.Problem) -> Tensor:
    """From the Jacobian of each output: the mean over examples of J' (diag(q) - q q') J."""
    with torch.no_grad():
        q = p.model(p.x).softmax(1)
    params = dict(p.model.named_parameters())
    square, mean = 0.0, 0.0
    for c in range(q.shape[1]):

        def output(params: dict[str, Tensor], x: Tensor, c: int = c) -> Tensor:
            return torch.func.functional_call(p.model, params, x[None])[0, c]

        rows = torch.func.vmap(torch.func.grad(output), (None, 0))(params, p.x)
        J = torch.cat([r.detach().flatten(1) for r in rows.values()], 1)
        square, mean = square + q[:, c, None] * J.square(), mean + q[:, c, None] * J
    return (square - torch.as_tensor(mean).square()).mean(0)


# ----------------------------------------------------------------------------- contenders
Estimate = Callable[[Matrix, int, int], Any]


def _ours(quantity: str, method: str | None) -> Estimate:
    function: Any = {"trace": trace, "diagonal": diagonal}[quantity]
    return lambda m, products, seed: (
        function(m.ours, method=method, max_products=products, seed=seed, progress=False).value
    )


def _theirs(name: str) -> Estimate:
    def call(m: Matrix, products: int, seed: int) -> Any:
        torch.manual_seed(seed)  # its probes come from the global generator
        return getattr(curvlinops, name)(m.theirs, products)

    return call


CONTENDERS: dict[str, dict[tuple[str, str], Estimate]] = {
    "trace": {
        ("curvlib", "hutchinson"): _ours("trace", "hutchinson"),
        ("curvlib", "hutch++"): _ours("trace", "hutch++"),
        ("curvlib", "xtrace"): _ours("trace", "xtrace"),
        ("curvlib", "xnystrace"): _ours("trace", "xnystrace"),
        ("curvlib", "default"): _ours("trace", None),
        ("curvlinops", "hutchinson"): _theirs("hutchinson_trace"),
        ("curvlinops", "hutch++"): _theirs("hutchpp_trace"),
        ("curvlinops", "xtrace"): _theirs("xtrace"),
    },
    "diagonal": {
        ("curvlib", "hutchinson"): _ours("diagonal", "hutchinson"),
        ("curvlib", "xdiag"): _ours("diagonal", "xdiag"),
        ("curvlib", "xnysdiag"): _ours("diagonal", "xnysdiag"),
        ("curvlib", "default"): _ours("diagonal", None),
        ("curvlinops", "hutchinson"): _theirs("hutchinson_diag"),
        ("curvlinops", "xdiag"): _theirs("xdiag"),
    },
}


# ------------------------------------------------------------------------------- accuracy
def accuracy(m: Matrix, quantity: str, seeds: int) -> list[dict[str, Any]]:
    truth = m.diagonal if quantity == "diagonal" else m.diagonal.sum()
    scale = float(truth.norm())
    rows = []
    for products in BUDGETS:
        base = {"part": "accuracy", "problem": m.name, "quantity": quantity, "products": products}
        errors: dict[tuple[str, str], list[float]] = {}
        seconds: dict[tuple[str, str], list[float]] = {}
        for seed in range(seeds):  # contenders take turns
            for who, estimate in CONTENDERS[quantity].items():
                if who in errors and not errors[who]:
                    continue
                start = time.perf_counter()
                try:
                    found = torch.as_tensor(estimate(m, products, seed), dtype=F64)
                except Exception as reason:
                    note = f"{type(reason).__name__}: {str(reason)[:60]}"
                    note = note if curvlinops or who[0] == "curvlib" else "not installed"
                    rows.append(base | {"library": who[0], "method": who[1], "note": note})
                    errors[who] = []
                    continue
                seconds.setdefault(who, []).append(time.perf_counter() - start)
                errors.setdefault(who, []).append(float((found - truth).norm()) / scale)
        rows += [
            base
            | {
                "library": who[0],
                "method": who[1],
                **root_mean_square(found),
                "ms": round(1e3 * statistics.median(seconds[who]), 3),
            }
            for who, found in errors.items()
            if found
        ]
    return rows


def root_mean_square(errors: list[float]) -> dict[str, float]:
    """Of errors, with its standard error to first order."""
    squares = [e**2 for e in errors]
    root = math.sqrt(statistics.fmean(squares))
    stderr = statistics.stdev(squares) / math.sqrt(len(squares)) / (2 * root) if root else 0.0
    return {"error": float(f"{root:.3g}"), "stderr": float(f"{stderr:.2g}")}


def savings(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Products that Hutchinson needs for each method's error, from its N ** -1/2 law."""
    out = []
    for row in rows:
        if "error" not in row or row["method"] == "hutchinson" or row["products"] != 48:
            continue
        alike = [
            r
            for r in rows
            if (r["problem"], r["quantity"]) == (row["problem"], row["quantity"])
            and (r["library"], r["method"]) == ("curvlib", "hutchinson")
        ]
        level = math.sqrt(statistics.fmean(r["error"] ** 2 * r["products"] for r in alike))
        kept = {k: row[k] for k in ("problem", "quantity", "library", "method", "error")}
        needed = (level / max(row["error"], 1e-15)) ** 2
        fewer = float(f"{needed / 48:.3g}")
        out.append({"part": "products", **kept, "hutchinson": round(needed), "fewer": fewer})
    return out


# --------------------------------------------------------------------- overhead and time
def overhead(kind: str, examples: int, products: int, rounds: int) -> list[dict[str, Any]]:
    """Each estimator's time outside the products, by that inside."""
    p = common.problem("mlp")
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(examples, p.x.shape[1], generator=draw)
    y = torch.randint(10, (examples,), generator=draw)
    risk = cl.Risk(p.model, torch.nn.CrossEntropyLoss(), (x, y))
    op = cl.hessian(risk) if kind == "hessian" else cl.ggn(risk)
    inside = [0.0]
    product = op._product

    def timed(V: Tensor) -> Tensor:
        start = time.perf_counter()
        out = product(V)
        inside[0] += time.perf_counter() - start
        return out

    op._product = timed
    calls = _calls(op, products, common.vectors(p.size, 8))
    op.matmat(common.vectors(p.size, 8))
    found: dict[str, list[tuple[float, float]]] = {who: [] for who in calls}
    for _ in range(rounds):
        for who, call in calls.items():
            inside[0], start = 0.0, time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # solves end at their budget
                used = call().products
            outside = time.perf_counter() - start - inside[0]
            found[who].append((outside / inside[0], 1e3 * outside / used))
    return [
        {
            "part": "overhead",
            "problem": f"mlp {kind}",
            "parameters": p.size,
            "examples": examples,
            "products": products,
            "method": who,
            "overhead": round(statistics.median(share for share, _ in pairs), 4),
            "ms": round(statistics.median(ms for _, ms in pairs), 2),
            "enough": round(examples * statistics.median(share for share, _ in pairs) / 0.05),
        }
        for who, pairs in found.items()
    ]


def _calls(op: LinearOperator, products: int, b: Tensor) -> dict[str, Callable[[], Any]]:
    """The estimators whose overhead is measured, K = 8 columns at a time."""
    how: dict[str, Any] = {"max_products": products, "progress": False}
    calls: dict[str, Callable[[], Any]] = {
        f"{q} {method}": lambda f=f, method=method: f(op, method=method, **how)
        for q, f, methods in (
            ("trace", trace, ("hutchinson", "hutch++", "xtrace", "xnystrace")),
            ("diagonal", diagonal, ("hutchinson", "xdiag", "xnysdiag")),
        )
        for method in methods
        if op.psd or not method.startswith("xnys")
    }
    steps = max(products // 8, 1)
    calls["trace_of"] = lambda: trace_of(op, torch.exp, steps=steps, probes=8, progress=False)
    solving = how | {"damping": 0.1, "tolerance": 1e-12, "max_products": 2 * products}
    calls["solve minres"] = lambda: solve(op, b, method="minres", **solving)
    if op.psd:
        calls["solve cg"] = lambda: solve(op, b, method="cg", **solving)
        calls["solve cg, rank 16"] = lambda: solve(op, b, method="cg", preconditioner=16, **solving)
        calls["low_rank"] = lambda: low_rank(op, 8, oversampling=4, probes=4, progress=False)
    return calls


def per_product(name: str, kind: str, products: int, rounds: int) -> list[dict[str, Any]]:
    """The same method, the same number of products, K >= 8 columns at a time."""
    p = common.problem(name)
    risk = cl.Risk(p.model, torch.nn.CrossEntropyLoss(), (p.x, p.y))
    op = cl.hessian(risk) if kind == "hessian" else cl.ggn(risk)
    m = Matrix(name, torch.empty(0), op, peer(p, kind))
    rows = []
    for method in ("hutchinson", "xtrace"):
        pair = {
            who: (lambda who=who, method=method: CONTENDERS["trace"][who, method](m, products, 0))
            for who in ("curvlib", "curvlinops")
            if who == "curvlib" or curvlinops is not None
        }
        calls = {who: common.math_attention(call) for who, call in pair.items()}
        times = common.race(calls, rounds=rounds, least=0.05)
        base = {"part": "per product", "problem": f"{name} {kind}", "parameters": p.size}
        for who, timing in times.items():
            row = {"library": who, "method": method, "ms": round(1e3 * timing.median / products, 3)}
            if who == "curvlib" and "curvlinops" in times:
                row["faster"] = round(times["curvlinops"].median / timing.median, 2)
            rows.append(base | {"products": products} | row)
        if curvlinops is None:
            rows.append(base | {"library": "curvlinops", "method": method, "note": "not installed"})
    return rows


# ----------------------------------------------------------------------------------- main
COLUMNS: dict[str, dict[str, str]] = {
    "accuracy": {
        "problem": "", "quantity": "", "products": "d", "library": "", "method": "",
        "error": ".2e", "stderr": ".0e", "ms": ".1f", "note": "",
    },
    "products": {
        "problem": "", "quantity": "", "library": "", "method": "", "error": ".1e",
        "hutchinson": ",d", "fewer": ".3g",
    },
    "overhead": {
        "problem": "", "parameters": ",d", "examples": "d", "method": "", "products": "d",
        "overhead": ".1%", "ms": ".2f", "enough": ",d",
    },
    "per product": {
        "problem": "", "parameters": ",d", "products": "d", "library": "", "method": "",
        "ms": ".3f", "faster": ".2f", "note": "",
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", nargs="+", choices=tuple(COLUMNS), default=list(COLUMNS))
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    again = set(options.parts)
    if again & {"accuracy", "products"}:
        again |= {"accuracy", "products"}
    path = common.RESULTS / "estimators.json"
    old = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    rows: list[dict[str, Any]] = [row for row in old if row["part"] not in again]

    def show(part: str, more: list[dict[str, Any]]) -> None:
        rows.extend(more)
        print(f"\n{part}\n{common.table(more, COLUMNS[part])}", flush=True)

    if {"accuracy", "products"} & set(options.parts):
        for m in [*matrices(), *networks()]:
            seeds = options.seeds if m.name in spectra() else max(options.seeds // 4, 3)
            for quantity in CONTENDERS:
                show("accuracy", accuracy(m, quantity, seeds))
        show("products", savings([row for row in rows if row["part"] == "accuracy"]))
    if "overhead" in options.parts:
        for kind in ("hessian", "ggn"):
            for examples, rounds in ((128, 3), (1024, 1)):
                show("overhead", overhead(kind, examples, 24, min(options.rounds, rounds)))
    if "per product" in options.parts:
        for name in ("mlp", "gpt", "digits"):
            for kind in ("hessian", "ggn"):
                show("per product", per_product(name, kind, 16, options.rounds))
    if not options.no_save:
        settings = {"seeds": options.seeds, "rounds": options.rounds, "device": "cpu"}
        print(
            "\nwrote", common.save("estimators", rows, settings).relative_to(common.RESULTS.parent)
        )


if __name__ == "__main__":
    main()
