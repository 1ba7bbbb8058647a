"""Products of a language model with a large vocabulary: memory and time, chunked and not.

    python benchmarks/vocabulary.py [--vocabulary 32000] [--tokens 512] [--width 64] [--rounds 3]

A small transformer with tied embeddings; one batch, streamed, so that every product computes it
anew. ``memory`` is the growth of a fresh process over two products (its high-water mark, in MB),
``logits`` of how many ``[tokens, V]`` float32 tensors that is; ``floor`` is the memory that cannot
be spared (the product itself, and one chunk of logits where there are chunks, else all of them).
``ratio`` is wall time in gradients of the plain loss, ``work`` the same in floating-point
operations of matrix products, ``error`` the difference from the unchunked product.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    vocabulary: int
    tokens: int
    width: int
    chunk: int

    def problem(self) -> common.Problem:
        """A language model on sequences of 128 tokens."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            length = min(128, self.tokens)
            model = common.GPT(self.vocabulary, length, self.width, heads=2, depth=1)
            model.head = nn.Linear(self.width, self.vocabulary, bias=False)
            model.head.weight = model.embed.weight
            with torch.no_grad():
                model.embed.weight.mul_(0.3)
            tokens = torch.randint(self.vocabulary, (self.tokens // length, length + 1))
        return common.Problem("vocabulary", model, tokens[:, :-1], tokens[:, 1:].flatten())


def hidden(model: nn.Module, x: Tensor) -> Tensor:
    """What the head gets."""
    return model.norm(model.blocks(model.embed(x) + model.position)).flatten(0, 1)


# ------------------------------------------------------------------------- contenders
def _chunked(kind: str) -> Callable[[common.Problem, int], Product]:
    def make(p: common.Problem, chunk: int) -> Product:
        import curvlib as cl

        loss = cl.LinearCrossEntropy(p.model.head, chunk)
        data = common.Streamed([(p.x, p.y)])
        risk = cl.Risk(p.model, loss, data, forward=lambda m, b: hidden(m, b[0]))
        return (cl.hessian if kind == "hessian" else cl.ggn)(risk).matmat

    return make


def _plain(kind: str) -> Callable[[common.Problem, int], Product]:
    def make(p: common.Problem, _: int) -> Product:
        import curvlib as cl

        risk = cl.Risk(p.model, nn.CrossEntropyLoss(), common.Streamed([(p.x, p.y)]))
        return (cl.hessian if kind == "hessian" else cl.ggn)(risk).matmat

    return make


def _curvlinops(kind: str) -> Callable[[common.Problem, int], Product]:
    def make(p: common.Problem, _: int) -> Product:
        op = common.curvlinops_operator(p, kind)
        return lambda V: op @ V

    return make


CONTENDERS: dict[str, Callable[[str], Callable[[common.Problem, int], Product]]] = {
    "curvlib, chunked": _chunked,
    "curvlib": _plain,
    "curvlinops": _curvlinops,
}


def gradient(p: common.Problem) -> Tensor:
    value = F.cross_entropy(p.model(p.x), p.y)
    return common.join(torch.autograd.grad(value, p.params))


class Multiplied(TorchDispatchMode):
    """Floating-point operations of matrix products, those in place included."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__.rstrip("_") in ("mm", "bmm", "addmm", "baddbmm"):
            left, right = args[-2:]
            self.operations += 2 * left.numel() * right.shape[-1]
        return func(*args, **(kwargs or {}))


def work(call: Callable[[], Any]) -> int:
    with Multiplied() as counter:
        call()
    return counter.operations


# ----------------------------------------------------------------------- measurements
def measure(setting: Setting, kind: str, count: int, rounds: int) -> list[dict[str, Any]]:
    p = setting.problem()
    V = common.vectors(p.size, count)
    calls: dict[str, Callable[[], Any]] = {"gradient": common.math_attention(lambda: gradient(p))}
    notes: dict[str, str] = {}
    for library in CONTENDERS:
        call, note = _prepare(library, kind, p, setting.chunk, V)
        if call is None:
            notes[library] = note
        else:
            calls[library] = call
    operations = {library: work(call) for library, call in calls.items()}
    exact = calls["curvlib"]().double()
    times = common.race(calls, rounds=rounds, least=0.0)
    base = {"operator": kind, "K": count, **vars(setting), "parameters": p.size}
    logits = 4 * setting.tokens * setting.vocabulary
    rows = []
    for library, call in calls.items():
        grown = memory(setting, kind, count, library)
        chunk = setting.chunk if library == "curvlib, chunked" else setting.tokens
        row = base | {
            "library": library,
            "s": round(times[library].median, 3),
            "quartiles": [round(times[library].low, 3), round(times[library].high, 3)],
            "ratio": round(times[library].median / times["gradient"].median, 3),
            "work": round(operations[library] / operations["gradient"], 3),
            "memory": grown,
            "logits": None if grown is None else round(1e6 * grown / logits, 3),
            "floor": round((4 * count * p.size + 4 * chunk * setting.vocabulary) / 1e6, 1),
        }
        if library != "gradient":
            row["error"] = float(f"{common.error(call(), exact):.3g}")
        rows.append(row)
    rows += [base | {"library": library, "note": note} for library, note in notes.items()]
    return rows


def _prepare(
    library: str, kind: str, p: common.Problem, chunk: int, V: Tensor
) -> tuple[Callable[[], Tensor] | None, str]:
    """A product to be timed, or why there is none."""
    try:
        product = CONTENDERS[library](kind)(p, chunk)
    except ImportError as reason:
        return None, f"not installed: {reason.name}"
    return common.math_attention(lambda: product(V)), ""


def memory(setting: Setting, kind: str, count: int, library: str) -> float | None:
    """Megabytes that a fresh process grows by, at most, over two products."""
    arguments = ["--memory", json.dumps([vars(setting), kind, count, library])]
    done = subprocess.run(
        [sys.executable, __file__, *arguments, "--threads", str(torch.get_num_threads())],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"},  # what is freed is given back
    )
    grown = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    return None if grown is None else round(grown / 1e6, 1)


def _memory_here(values: dict[str, int], kind: str, count: int, library: str) -> None:
    """In this process: libraries are loaded and kernels have their buffers before the count."""

    def calls(setting: Setting) -> Callable[[], Any]:
        p = setting.problem()
        if library == "gradient":
            return common.math_attention(lambda: gradient(p))
        V = common.vectors(p.size, count)
        product = CONTENDERS[library](kind)(p, setting.chunk)
        return common.math_attention(lambda: [product(V) for _ in range(2)][-1])

    calls(Setting(64, 128, 32, 32))()
    print(json.dumps(common.peak_memory(calls(Setting(**values)))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--chunks", nargs="+", type=int, default=[32])
    parser.add_argument("--columns", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        _memory_here(*json.loads(options.memory))
        return
    shown = {
        "library": "", "chunk": "d", "s": ".2f", "ratio": ".2f", "work": ".2f", "memory": ".0f",
        "logits": ".2f", "floor": ".0f", "error": ".1e", "note": "",
    }  # fmt: skip
    rows = []
    for chunk in options.chunks:
        setting = Setting(options.vocabulary, options.tokens, options.width, chunk)
        for count, kind in itertools.product(options.columns, ("hessian", "ggn")):
            part = measure(setting, kind, count, options.rounds)
            rows += part
            print(f"\n{kind}, K = {count}, {part[0]['parameters']:,} parameters")
            print(common.table(part, shown), flush=True)
            if not options.no_save:  # each time: a later part may take too long
                settings = {"rounds": options.rounds, "dtype": "float32", "device": "cpu"}
                common.save("vocabulary", rows, settings)


if __name__ == "__main__":
    main()
