"""Data-parallel products, windows and fits: time on one and two processes, and traffic.

    python benchmarks/scaling.py [--rounds 9] [--problems mlp conv gpt] [--columns 1 8]

Two processes of one thread each (gloo), on the same machine. ``speedup`` is how many times more
products a second both make than one of them alone with all data, in interleaved rounds (the other
waits); ``reduction`` the share of a product's time that the first rank spends in exchanges with the
other, waiting included; ``bytes`` what a rank hands to collectives in one product, ``formula`` what
:mod:`curvlib.core.ranks.joined` says. The batch of each problem is cut in two.

Then products of a model that FSDP2 shards, as ratios to FSDP2's own gradient and to the same
product with whole parameters, with the number of messages; ``sent_to_parameters`` is what a rank
hands to collectives in units of the parameters' bytes.

The last rows are the traffic of a sliding M-FAC window's step and of an EK-FAC fit against theirs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import common
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from curvlib.core.ranks.group import Group

HEADER = 20


@dataclass
class Traffic:
    """What a rank hands to collectives, and how long it is in them."""

    bytes: int = 0
    seconds: float = 0.0
    calls: dict[str, int] = field(default_factory=dict)


@contextlib.contextmanager
def traffic() -> Iterator[Traffic]:
    """Counts what goes through ``torch.distributed`` meanwhile, and how long curvlib waits."""
    found = Traffic()

    def counted(name: str, own: Callable[..., Any], at: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            named = (kwargs[key] for key in ("input", "input_tensor") if key in kwargs)
            sent = args[at] if len(args) > at else next(named)
            found.bytes += sent.numel() * sent.element_size()
            found.calls[name] = found.calls.get(name, 0) + 1
            return own(*args, **kwargs)

        return call

    def timed(*args: Any) -> Any:
        start = time.perf_counter()
        try:
            return exchange(*args)
        finally:
            found.seconds += time.perf_counter() - start

    places = {"all_reduce": 0, "broadcast": 0, "all_gather": 1}
    places |= {"all_gather_single": 1, "all_gather_into_tensor": 1}
    places |= {"reduce_scatter_single": 1, "reduce_scatter_tensor": 1}
    places = {name: at for name, at in places.items() if hasattr(dist, name)}
    before = {name: getattr(dist, name) for name in places}
    for name, at in places.items():
        setattr(dist, name, counted(name, before[name], at))
    exchange = Group._call
    Group._call = timed
    try:
        yield found
    finally:
        Group._call = exchange
        for name, own in before.items():
            setattr(dist, name, own)


def _operators(problem: common.Problem, kind: str, rank: int, size: int) -> tuple[Any, Any]:
    """The operator of this rank's part, and that of one process with everything."""
    import curvlib as cl

    make = {"hessian": cl.hessian, "ggn": cl.ggn}[kind]
    loss = nn.CrossEntropyLoss()
    tokens = len(problem.y) // len(problem.x)  # targets of language models are flat
    count = len(problem.x)
    own = slice(rank * count // size, (rank + 1) * count // size)
    part = (problem.x[own], problem.y[own.start * tokens : own.stop * tokens])
    shared = make(cl.Risk(problem.model, loss, [part]))
    alone = make(cl.Risk(problem.model, loss, [(problem.x, problem.y)], group=False))
    return shared, alone


def products(rank: int, size: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for name in args.problems:
        problem = common.problem(name)
        for kind in ("hessian", "ggn"):
            shared, alone = _operators(problem, kind, rank, size)
            for columns in args.columns:
                V = common.vectors(problem.size, columns)
                gap = common.error(shared @ V, (alone @ V).double())
                seconds: dict[str, list[float]] = {"alone": [], "shared": [], "exchange": []}
                for _ in range(args.rounds):
                    dist.barrier()
                    if rank == 0:
                        start = time.perf_counter()
                        alone @ V
                        seconds["alone"].append(time.perf_counter() - start)
                    dist.barrier()
                    with traffic() as seen:
                        start = time.perf_counter()
                        shared @ V
                        seconds["shared"].append(time.perf_counter() - start)
                    seconds["exchange"].append(seen.seconds)
                middle = {key: statistics.median(v) for key, v in seconds.items() if v}
                if rank == 0:
                    row = {
                        "problem": name,
                        "operator": kind,
                        "K": columns,
                        "products_per_second_1": columns / middle["alone"],
                        "products_per_second_2": columns / middle["shared"],
                        "speedup": middle["alone"] / middle["shared"],
                        "reduction": middle["exchange"] / middle["shared"],
                        "bytes": seen.bytes,
                        "formula": 4 * problem.size * columns + 8 * HEADER,
                        "difference": gap,
                    }
                    print(
                        f"{name:7}{kind:9}K={columns:<3} {row['speedup']:5.2f} times faster on 2, "
                        f"{100 * row['reduction']:4.1f} % in exchanges, {row['bytes']} bytes "
                        f"(formula {row['formula']}), differs by {gap:.1e}",
                        flush=True,
                    )
                    rows.append(row)
    return rows


def sharded(rank: int, size: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Products of a model that FSDP2 shards, beside FSDP2's own gradient and whole parameters."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    import curvlib as cl

    problem, cut = common.problem("gpt"), common.problem("gpt")
    loss = nn.CrossEntropyLoss()
    tokens, count = len(problem.y) // len(problem.x), len(problem.x)
    own = slice(rank * count // size, (rank + 1) * count // size)
    x, y = problem.x[own], problem.y[own.start * tokens : own.stop * tokens]
    mesh = init_device_mesh("cpu", (size,))
    for module in cut.model.modules():
        if isinstance(module, common.Block):
            fully_shard(module, mesh=mesh)
    fully_shard(cut.model, mesh=mesh)
    risks = {"whole": cl.Risk(problem.model, loss, [(x, y)])}
    risks["sharded"] = cl.Risk(cut.model, loss, [(x, y)])
    vector = common.vectors(problem.size, 1)[:, 0]
    vectors = {"whole": vector, "sharded": risks["sharded"].space.scatter(vector)}

    def gradient() -> None:
        loss(cut.model(x), y).backward()

    rows = []
    for kind, make in (("hessian", cl.hessian), ("ggn", cl.ggn)):
        works: dict[str, Callable[[], Any]] = {"gradient": gradient}
        for name, risk in risks.items():
            op = make(risk)
            works[name] = lambda op=op, v=vectors[name]: op @ v
        found = {name: works[name]() for name in risks}
        gap = common.error(risks["sharded"].space.gather(found["sharded"]), found["whole"].double())
        gradient()
        seconds: dict[str, list[float]] = {name: [] for name in works}
        seen: dict[str, Traffic] = {}
        for _ in range(args.rounds):
            for name, run in works.items():
                dist.barrier()
                with traffic() as seen[name]:
                    start = time.perf_counter()
                    run()
                    seconds[name].append(time.perf_counter() - start)
        middle = {name: statistics.median(v) for name, v in seconds.items()}
        sent = seen["sharded"]
        row = {
            "problem": "gpt sharded by FSDP2",
            "operator": kind,
            "to_gradient": middle["sharded"] / middle["gradient"],
            "to_whole": middle["sharded"] / middle["whole"],
            "exchange": sent.seconds / seconds["sharded"][-1],
            "messages": sum(sent.calls.values()),
            "tensors": len(list(cut.model.parameters())),
            "sent_to_parameters": sent.bytes / (4 * problem.size),
            "difference": gap,
        }
        if rank == 0:
            print(
                f"gpt sharded, {kind}: {row['to_gradient']:.2f} of FSDP2's gradient, "
                f"{row['to_whole']:.2f} of the product with whole parameters, {row['messages']} "
                f"messages for {row['tensors']} parameters, differs by {gap:.1e}",
                flush=True,
            )
            rows.append(row)
    return rows


def ekfac(rank: int, size: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Traffic of a fit, and its time beside one process's."""
    import curvlib as cl

    problem = common.problem("mlp")
    loss = nn.CrossEntropyLoss()
    count = len(problem.x)
    own = slice(rank * count // size, (rank + 1) * count // size)
    risk = cl.Risk(problem.model, loss, [(problem.x[own], problem.y[own])])
    alone = cl.Risk(problem.model, loss, [(problem.x, problem.y)], group=False)
    sides = [(m.out_features, m.in_features + 1) for m in problem.model if hasattr(m, "weight")]
    moments = sum(o * o + i * i for o, i in sides)
    numbers = 2 * moments + sum(o * i for o, i in sides)  # sums, eigenvectors, eigenvalues
    formula = 4 * numbers + 8 * sum(o + i for o, i in sides)  # those of factors are float64
    seconds: dict[str, list[float]] = {"alone": [], "shared": []}
    for _ in range(max(1, args.rounds // 3)):
        dist.barrier()
        if rank == 0:
            start = time.perf_counter()
            cl.kfac(alone, fisher="mc", progress=False)
            seconds["alone"].append(time.perf_counter() - start)
        dist.barrier()
        with traffic() as seen:
            start = time.perf_counter()
            cl.kfac(risk, fisher="mc", progress=False)
            seconds["shared"].append(time.perf_counter() - start)
    if rank != 0:
        return []
    row = {
        "problem": "ekfac fit of the mlp",
        "speedup": statistics.median(seconds["alone"]) / statistics.median(seconds["shared"]),
        "bytes": seen.bytes,
        "formula": formula,
    }
    print(
        f"EK-FAC fit of the mlp: {row['speedup']:.2f} times faster on 2, {seen.bytes} bytes "
        f"(formula {formula}, without headers)",
        flush=True,
    )
    return [row]


def mfac(rank: int, size: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Traffic and time of a step (push, and solve for the row) of a window sharded by FSDP2.

    The new row of the Gram matrix is summed over ranks once; in float32 a second time, when it is
    computed again in float64 for the accuracy of the solve.
    """
    return [row for kind in (torch.float64, torch.float32) for row in _step(kind, rank, size, args)]


def _step(
    dtype: torch.dtype, rank: int, size: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    import curvlib as cl

    m = 64
    problem = common.problem("mlp")
    alone = cl.mfac_window(problem.size, m, damping=0.1, dtype=dtype) if rank == 0 else None
    model = common.problem("mlp").model
    mesh = init_device_mesh("cpu", (size,))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    risk = cl.Risk(model, nn.CrossEntropyLoss(), [(problem.x, problem.y)])
    space = risk.space
    shared = cl.mfac_window(space, m, damping=0.1, dtype=dtype)
    rows = common.vectors(problem.size, m + 2).T.contiguous()
    own = [space.scatter(row) for row in rows]
    for i in range(m + 1):
        shared.push(own[i])
        if alone is not None:
            alone.push(rows[i])
    whole = space.gather(shared.solve_row())
    gap = 0.0 if alone is None else common.error(whole, alone.solve_row().double())
    seconds: dict[str, list[float]] = {"alone": [], "shared": []}
    for _ in range(args.rounds):
        dist.barrier()
        if alone is not None:
            start = time.perf_counter()
            alone.push(rows[-1], check=False)
            alone.solve_row()
            seconds["alone"].append(time.perf_counter() - start)
        dist.barrier()
        with traffic() as seen:
            start = time.perf_counter()
            shared.push(own[-1], check=False)
            shared.solve_row()
            seconds["shared"].append(time.perf_counter() - start)
    if rank != 0:
        return []
    row = {
        "problem": f"step of a window of {m} rows, mlp sharded",
        "dtype": str(dtype).removeprefix("torch."),
        "speedup": statistics.median(seconds["alone"]) / statistics.median(seconds["shared"]),
        "bytes": seen.bytes,
        "calls": seen.calls,
        "formula": 8 * m,
        "difference": gap,
    }
    print(
        f"M-FAC step, {m} {row['dtype']} rows sharded: {row['speedup']:.2f} times faster on 2, "
        f"{seen.bytes} bytes in {seen.calls} (formula {8 * m}), differs by {gap:.1e}",
        flush=True,
    )
    return [row]


PARTS: dict[str, Callable[[int, int, argparse.Namespace], list[dict[str, Any]]]] = {
    "products": products,
    "sharded": sharded,
    "ekfac": ekfac,
    "mfac": mfac,
}


def work(rank: int, size: int, meeting: str, args: argparse.Namespace, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    for part in args.parts:
        rows = PARTS[part](rank, size, args)
        if rank == 0:
            results.put(rows)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--problems", nargs="+", default=["mlp", "conv", "gpt"])
    parser.add_argument("--columns", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        settings = (2, f"{folder}/meeting", args, results)
        processes = [context.Process(target=work, args=(r, *settings)) for r in range(2)]
        for process in processes:
            process.start()
        rows = [row for _ in args.parts for row in results.get()]
        for process in processes:
            process.join()
    print("wrote", common.save("scaling", rows, vars(args)))


if __name__ == "__main__":
    main()
