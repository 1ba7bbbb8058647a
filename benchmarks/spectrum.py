"""Spectral densities, 2 probes of 50 steps each: time, products and error, against curvlinops.

    python benchmarks/spectrum.py [--rounds 5] [--problems mlp conv gpt digits]

Both estimate the density of the Hessian and of the GGN of the same problem, data in memory, in
float32. curvlinops is timed on equal terms (it is given the spectrum's boundaries, which curvlib
finds by itself) and with its default boundaries, once, for at most ``--patience`` seconds.

On ``digits`` the whole spectrum is known: ``error`` is the Wasserstein distance between estimated
and exact distribution, relative to the norm, with the same grid and kernel width for both, and
averaged over ``--seeds`` seeds; "all vectors" is ``density(reorthogonalize=True)`` and "three
vectors" ``False``, the Lanczos recurrence that curvlinops runs, too; the default is one of the
two, by memory; ``error, own`` is with curvlib's own grid and widths.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import common
import torch
from products import ORACLES, gradient
from torch import Tensor

STEPS, PROBES, KAPPA, MARGIN, POINTS = 50, 2, 3.0, 0.05, 1024


class Counted:
    """Counts products of an operator of any library."""

    def __init__(self, op: Any, method: str) -> None:
        self.columns = self.calls = 0
        inner = getattr(op, method)

        def product(V: Any) -> Any:
            self.calls += 1
            shape = V.shape if isinstance(V, Tensor) else V[0].shape
            own = 1 if isinstance(V, Tensor) else _own_ndim(op)
            self.columns += shape[-1] if len(shape) > own else 1
            return inner(V)

        setattr(op, method, product)


def _own_ndim(op: Any) -> int:
    return len(op._in_shape[0])


def curvlib_operator(p: common.Problem, kind: str) -> Any:
    import curvlib as cl

    risk = cl.Risk(p.model, torch.nn.CrossEntropyLoss(), (p.x, p.y))
    return cl.hessian(risk) if kind == "hessian" else cl.ggn(risk)


def curvlib_density(op: Any, seed: int, *, full: bool | None = None) -> Any:
    import curvlib as cl

    return cl.density(
        op, steps=STEPS, probes=PROBES, points=POINTS, seed=seed, reorthogonalize=full
    )


def curvlinops_density(op: Any, boundaries: Any, seed: int = 0) -> tuple[Tensor, Tensor]:
    from curvlinops.papyan2020traces.spectrum import lanczos_approximate_spectrum

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return lanczos_approximate_spectrum(
            op,
            STEPS,
            num_points=POINTS,
            num_repeats=PROBES,
            kappa=KAPPA,
            boundaries=boundaries,
            margin=MARGIN,
        )


# ------------------------------------------------------------------------------ errors
def exact_eigenvalues(p: common.Problem, kind: str) -> Tensor:
    product = ORACLES[kind](p.double())
    dense = product(torch.eye(p.size, dtype=torch.float64))
    return torch.linalg.eigvalsh((dense + dense.T) / 2)


def wasserstein(grid: Tensor, density: Tensor, exact: Tensor) -> float:
    """Distance of a density on a grid from exact eigenvalues, relative to the norm."""
    grid, density = grid.double(), density.double()
    mass = (density[1:] + density[:-1]) / 2 * grid.diff()
    share = torch.cat([torch.zeros(1, dtype=torch.float64), mass.cumsum(0)])
    share = share / share[-1]
    steps = torch.searchsorted(exact, grid, right=True).double() / exact.numel()
    gap = (share - steps).abs()
    area = ((gap[1:] + gap[:-1]) / 2 * grid.diff()).sum()
    return float(area / exact.abs().max())


def errors(p: common.Problem, kind: str, seeds: int) -> dict[str, dict[str, float]]:
    exact = exact_eigenvalues(p, kind)
    bounds = (float(exact[0]), float(exact[-1]))
    reach = (bounds[1] - bounds[0]) * (0.5 + MARGIN)
    width = 2 / (STEPS - 1) / math.sqrt(8 * math.log(KAPPA)) * reach
    middle = (bounds[0] + bounds[1]) / 2
    grid = torch.linspace(middle - reach, middle + reach, POINTS, dtype=torch.float64)
    found: dict[str, list[float]] = {"curvlib": [], "three": [], "own": [], "curvlinops": []}
    op = curvlib_operator(p, kind)
    for seed in range(seeds):
        result = curvlib_density(op, seed)
        found["curvlib"].append(wasserstein(grid, result.on(grid, width)[0], exact))
        three = curvlib_density(op, seed, full=False)
        found["three"].append(wasserstein(grid, three.on(grid, width)[0], exact))
        found["own"].append(wasserstein(result.grid, result.density, exact))
    with contextlib.suppress(ImportError):
        other = common.curvlinops_operator(p, kind)
        for seed in range(seeds):
            at, density = common.math_attention(
                lambda seed=seed: curvlinops_density(other, bounds, seed)
            )()
            found["curvlinops"].append(wasserstein(at, density, exact))
    mean = {name: sum(v) / len(v) for name, v in found.items() if v}
    out = {"curvlib": {"error": mean["curvlib"], "error, own": mean["own"]}}
    out["curvlib (three vectors)"] = {"error": mean["three"]}
    if "curvlinops" in mean:
        out["curvlinops"] = {"error": mean["curvlinops"]}
    return out


# ------------------------------------------------------------------------ measurements
class OutOfPatience(Exception):  # noqa: N818
    """A call took longer than it may."""


@contextlib.contextmanager
def patience(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise OutOfPatience

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def measure(name: str, kind: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    p = common.problem(name)
    base = {"problem": name, "parameters": p.size, "operator": kind}
    op = curvlib_operator(p, kind)
    first = curvlib_density(op, 0)
    bounds = (float(first.grid[0]), float(first.grid[-1]))
    calls: dict[str, Callable[[], Any]] = {
        "gradient": common.math_attention(gradient(p)),
        # a new operator each time: the graph is built within the time
        "curvlib": lambda: curvlib_density(curvlib_operator(p, kind), 0),
        "curvlib (all vectors)": lambda: curvlib_density(curvlib_operator(p, kind), 0, full=True),
        "curvlib (three vectors)": lambda: curvlib_density(
            curvlib_operator(p, kind), 0, full=False
        ),
    }
    rows: list[dict[str, Any]] = []
    try:
        calls["curvlinops"] = common.math_attention(
            lambda: curvlinops_density(common.curvlinops_operator(p, kind), bounds)
        )
        calls["curvlinops"]()
    except ImportError as reason:
        del calls["curvlinops"]
        rows.append(base | {"library": "curvlinops", "note": f"not installed: {reason.name}"})
    times = common.race(calls, rounds=options.rounds, least=0.2)
    unit = times["gradient"].median
    known = errors(p, kind, options.seeds) if name == "digits" else {}
    for library in calls:
        seconds = times[library].median
        row = base | {
            "library": library,
            "s": round(seconds, 4),
            "quartiles": [round(times[library].low, 4), round(times[library].high, 4)],
            "ratio": round(seconds / unit, 1),
        }
        if library != "gradient":
            row["products"] = STEPS * PROBES
            row["faster"] = (
                round(times["curvlinops"].median / seconds, 2) if ("curvlinops" in times) else None
            )
        row |= {k: float(f"{v:.3g}") for k, v in known.get(library, {}).items()}
        rows.append(row)
    if "curvlinops" in calls:
        rows.append(base | default_boundaries(p, kind, unit, options.patience))
    return rows


def default_boundaries(p: common.Problem, kind: str, unit: float, seconds: int) -> dict[str, Any]:
    """curvlinops with its default arguments, once."""
    op = common.curvlinops_operator(p, kind)
    counted = Counted(op, "_matmat")
    row: dict[str, Any] = {"library": "curvlinops (default boundaries)"}
    start = time.perf_counter()
    try:
        with patience(seconds):
            common.math_attention(lambda: curvlinops_density(op, None))()
    except OutOfPatience:
        row["note"] = f"stopped after {seconds} s"
    except Exception as reason:  # ARPACK does not converge on lowest eigenvalues near zero
        row["note"] = f"failed: {type(reason).__name__}"
    else:
        row["s"] = round(time.perf_counter() - start, 4)
        row["ratio"] = round(row["s"] / unit, 1)
    return row | {"products": counted.calls}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--patience", type=int, default=60)
    parser.add_argument("--problems", nargs="+", default=["mlp", "conv", "gpt", "digits"])
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shown = {
        "library": "", "s": ".2f", "ratio": ".0f", "products": "d", "faster": ".2f",
        "error": ".1e", "error, own": ".1e", "note": "",
    }  # fmt: skip
    rows = []
    for name in options.problems:
        for kind in ("hessian", "ggn"):
            part = measure(name, kind, options)
            rows += part
            title = f"{name} ({part[0]['parameters']:,} parameters), {kind}"
            print(f"\n{title}\n{common.table(part, shown)}", flush=True)
    if not options.no_save:
        settings = {
            "rounds": options.rounds, "steps": STEPS, "probes": PROBES, "seeds": options.seeds,
            "dtype": "float32", "device": "cpu",
        }  # fmt: skip
        print("\nwrote", common.save("spectrum", rows, settings).relative_to(common.RESULTS.parent))


if __name__ == "__main__":
    main()
