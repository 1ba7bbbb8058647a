"""Weak scaling on paper: the planner's formulas for up to 1,024 ranks and 70B parameters.

    python benchmarks/weak_scaling.py

Nothing is run: times are counts divided by assumed rates, without overlap of work and messages.
The tables of docs/scaling.md are what this prints.
"""

from __future__ import annotations

import torch

from curvlib.core.operator import LinearOperator
from curvlib.core.plan import Ranks
from curvlib.core.product_cost import ProductCost
from curvlib.estimators.plan import eigenpairs_phase

FLOPS = 400e12  # a second on a rank: 40 % of the peak of a 989 TFLOP/s accelerator, bfloat16
FLOPS64 = 25e12  # float64, in eigendecompositions
BYTES = 50e9  # a second that a rank sends: one link of 400 Gbit/s
TOKENS, SEQUENCES = 4096, 16  # of a sequence; sequences of a rank, one a batch
MODELS = {  # parameters, layers, width, bytes of activations of a layer for each token and unit
    "1.5B": (1.5e9, 48, 1600),
    "7B": (6.7e9, 32, 4096),
    "70B": (70e9, 80, 8192),
}
RANKS = (8, 64, 256, 1024)
ACTIVATIONS = 34  # bytes of activations for each token, layer and unit of width, kept for backward


def cost(parameters: float, layers: int, width: int, ranks: int) -> ProductCost:
    """A Hessian product of a transformer in bfloat16, with float32 vectors."""
    gradient = 6.0 * parameters * TOKENS  # of a sequence
    everything = SEQUENCES * ranks
    hessian = 3.0 * gradient * everything  # counted in tests/operators/test_work.py
    further = 2.1 * gradient * everything
    activations = 2.0 * ACTIVATIONS * TOKENS * width * layers  # of the graph of the gradient, too
    vector = 4.0 * parameters
    return ProductCost(
        size=int(parameters),
        vector=vector,
        parameters=2.0 * parameters,
        layer=2.0 * parameters / layers,
        total=everything,
        examples=1,
        flops=hessian,
        second=further,
        further=further,
        again=hessian,
        graph=0.0,
        budget=0.0,
        working=activations + 2.0 * vector,
        pair=vector,
        column=vector,
    )


def products() -> None:
    print("| model | ranks | work | traffic | efficiency | memory, k = 10 | one vector, whole |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, (parameters, layers, width) in MODELS.items():
        for count in RANKS:
            ranks = Ranks(count, sharded=True)
            own = cost(parameters, layers, width, count)
            work = own.work(ranks, 1) / FLOPS
            sent = own.traffic(ranks) / BYTES
            op = LinearOperator(
                lambda V: V, (own.size, own.size), dtype=torch.float32, symmetric=True
            )
            phase = eigenpairs_phase(op, own, ranks, k=10)
            held = phase.kept + phase.working + ranks.held(own.parameters)
            print(
                f"| {name} | {count:,} | {work:.1f} s | {sent:.1f} s | {work / (work + sent):.2f} "
                f"| {held / 1e9:.1f} GB | {own.vector / 1e9:.0f} GB |"
            )


def windows() -> None:
    """A step of M-FAC with m = 1,024 rows in bfloat16: a read of a rank's rows, m floats sent."""
    print("\n| model | ranks | window on a rank | read at 3 TB/s | sent |")
    print("| --- | --- | --- | --- | --- |")
    m = 1024
    for name, (parameters, _, _) in MODELS.items():
        for count in RANKS:
            window = 2.0 * m * parameters / count
            read = 2e3 * window / 3e12
            sent = 2 * Ranks(count, sharded=True).all_reduce(4 * m)
            print(
                f"| {name} | {count:,} | {window / 1e9:,.1f} GB | {read:,.0f} ms "
                f"| {sent / 1e3:.0f} kB |"
            )


def fits() -> None:
    """EK-FAC of the two matrices of each MLP: width d and 4 d; held whole, and held as rows."""
    columns = ["model", "ranks", "eigenvectors", "whole", "sent", "as rows", "one layer"]
    print("\n|", " | ".join([*columns, "sent for a batch"]), "|")
    print("| --- " * 8 + "|")
    for name, (_, layers, d) in MODELS.items():
        sides = [(4 * d, d), (d, 4 * d)]
        numbers = layers * sum(o * o + i * i + o * i for o, i in sides)
        decompositions = layers * sum(9.0 * (o**3 + i**3) for o, i in sides)
        one = max(o * o + i * i + o * i for o, i in sides)
        for count in RANKS:
            ranks = Ranks(count, sharded=True)
            sent, batch = ranks.all_reduce(4.0 * numbers), ranks.gather(4.0 * numbers)
            print(
                f"| {name} | {count:,} "
                f"| {decompositions / min(count, 4 * layers) / FLOPS64:,.0f} s "
                f"| {4.0 * numbers / 1e9:,.0f} GB "
                f"| {sent / 1e9:,.0f} GB, {sent / BYTES:.0f} s "
                f"| {ranks.held(4.0 * numbers) / 1e9:,.1f} GB | {4.0 * one / 1e9:,.1f} GB "
                f"| {batch / 1e9:,.0f} GB, {batch / BYTES:.1f} s |"
            )


if __name__ == "__main__":
    products()
    windows()
    fits()
