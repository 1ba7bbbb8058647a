"""Plans of what the command line, and a user, runs: bytes, work and traffic before it starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from curvlib.core.operator import LinearOperator
from curvlib.core.plan import Phase, Plan, Ranks, fitting
from curvlib.core.product_cost import ProductCost
from curvlib.core.risk import Risk
from curvlib.estimators.plan import (
    density_phase,
    diagonal_phase,
    eigenpairs_phase,
    graphs_phase,
    solve_phase,
    trace_phase,
)
from curvlib.influence.plan import plan as influence_plan
from curvlib.operators.factors.plan import fit_phases, fit_settings
from curvlib.operators.hessian import hessian
from curvlib.operators.measured_product import measured_gradient, measured_product
from curvlib.operators.windows.plan import window_phases

Make = Callable[[Risk], LinearOperator]


def planned(risk: Risk, what: str, *, make: Make = hessian, **settings: Any) -> Plan:
    """The plan of a computation, from one small measurement on the first batch.

    Args:
        risk: Model, loss, data and parameters.
        what: ``"spectrum"``, ``"eigenpairs"``, ``"density"``, ``"trace"``, ``"diagonal"``,
            ``"solve"``, ``"mfac"``, ``"kfac"`` or ``"influence"``.
        make: The operator of a risk, for those that multiply: :func:`curvlib.hessian`,
            :func:`curvlib.ggn`, ...
        settings: ``ranks``, ``sharded``, ``examples`` (where the data does not say), ``batch_size``
            (when another than the data's), and those of the computation (``k``, ``steps``,
            ``probes``, ``products``, ``method``, ``size``, ``queries``, ``rank``, ...; ``memory``
            is that of the operator, for kept graphs): see
            :mod:`curvlib.estimators.plan`, :mod:`curvlib.operators.windows.plan`,
            :mod:`curvlib.operators.factors.plan` and :func:`curvlib.influence.planned`.

    Raises:
        ValueError: If there is no such computation, or a number does not fit.

    Example:
        >>> import torch, curvlib as cl
        >>> x, y = torch.randn(50, 8), torch.randn(50, 2)
        >>> risk = cl.Risk(torch.nn.Linear(8, 2), torch.nn.MSELoss(), (x, y))
        >>> planned(risk, "spectrum", k=2, ranks=4).phases
        ('graphs', 'eigenpairs', 'density')
    """
    own = {name: settings.pop(name) for name in _MEASURED_WITH if name in settings}
    return planner(risk, what, make=make, **own)(**settings)


def planner(
    risk: Risk,
    what: str,
    *,
    make: Make = hessian,
    examples: int | None = None,
    fisher: str | None = None,
    samples: int = 1,
) -> Callable[..., Plan]:
    """:func:`planned` as a function of settings, so that what it measures is measured once.

    In a process group it works alone, and takes what its risk has for all data.

    Raises:
        ValueError: If there is no such computation.
    """
    risk = risk.alone()
    if what in _ESTIMATES:
        cost = measured_product(make, risk, examples=examples)
        return partial(_estimate, _ESTIMATES[what], make(risk), cost)
    if what == "mfac":
        return partial(_window, risk.space.dtype, measured_gradient(risk, examples=examples))
    if what not in ("kfac", "influence"):
        names = ", ".join(map(repr, (*_ESTIMATES, "mfac", "kfac", "influence")))
        raise ValueError(f"there are plans of {names}, not of {what!r}")
    read = fit_settings(risk, fisher=fisher, samples=samples, examples=examples)
    return partial(_fit if what == "kfac" else _influence, read)


#: What may be lowered, with its default, or changed, in each computation.
KNOBS: dict[str, dict[str, Any]] = {
    "spectrum": {"k": 10, "steps": 64, "probes": 2, "memory": (0,)},
    "eigenpairs": {"k": 6, "memory": (0,)},
    "density": {"steps": 64, "probes": 2, "memory": (0,)},
    "trace": {"products": 100, "block": 8, "method": ("hutchinson",), "memory": (0,)},
    "diagonal": {"products": 100, "block": 8, "method": ("hutchinson",), "memory": (0,)},
    "solve": {"columns": 1, "method": ("cg",), "memory": (0,)},
    "mfac": {"size": 32, "dtype": (torch.bfloat16,), "storage": ("cpu",)},
    "kfac": {"curvature": ("diagonal",)},
    "influence": {"queries": 1, "rank": (64, 32, 16, 8, 4, 2, 1)},
}


def what_fits(
    make: Callable[..., Plan], what: str, settings: dict[str, Any], available: float
) -> list[dict[str, Any]]:
    """Changes to settings with which a computation fits, each by itself.

    Args:
        make: Makes the plan of some settings: :func:`planner`.
        what: What is computed.
        settings: Those with which it does not fit.
        available: Bytes that a rank has.

    Returns:
        The largest smaller value of a number, or another value, of one setting; where none does,
        of several that are halved together, as often as it takes; and the least number of ranks
        (a power of two) over which to shard.

    Example:
        >>> import torch, curvlib as cl
        >>> x, y = torch.randn(50, 8), torch.randn(50, 2)
        >>> make = planner(cl.Risk(torch.nn.Linear(8, 2), torch.nn.MSELoss(), (x, y)), "mfac")
        >>> what_fits(make, "mfac", {"size": 1000}, 8_060_000)
        [{'size': 999}, {'dtype': torch.bfloat16}, {'sharded': True, 'ranks': 2}]
    """
    knobs: dict[str, Any] = {}
    for name, value in KNOBS[what].items():
        knobs[name] = settings.get(name, value) if isinstance(value, int) else value
    if "queries" not in knobs:  # whose batches are others
        knobs["batch_size"] = make(**settings).settings["batch_size"]
    found = [{k: v} for k, v in fitting(partial(make, **settings), knobs, available).items()]
    numbers = {name: value for name, value in knobs.items() if isinstance(value, int)}
    halved = [{k: max(1, v >> i) for k, v in numbers.items()} for i in range(1, 20)]
    if not found:
        fits = (way for way in halved if make(**{**settings, **way}).peak <= available)
        found = [way for way in [next(fits, None)] if way is not None]
    more = [2**i for i in range(1, 13) if 2**i > settings.get("ranks", 1)]
    shard = partial(make, **{**settings, "sharded": True})
    ranks = fitting(shard, {"ranks": more}, available)
    return found + [{"sharded": True, **ranks} for _ in ranks]


#: Settings that the measurement needs already.
_MEASURED_WITH = ("examples", "fisher", "samples")
Phases = Callable[..., list[Phase]]


def _estimate(
    phases: Phases,
    op: LinearOperator,
    cost: ProductCost,
    *,
    ranks: int = 1,
    sharded: bool = False,
    batch_size: int | None = None,
    memory: int | None = None,
    **settings: Any,
) -> Plan:
    world = Ranks(ranks, sharded)
    own = cost.on(world, batch_size)
    own = own if memory is None else replace(own, budget=memory)
    graphs = graphs_phase(own, world)
    found = [*([graphs] if graphs.kept else []), *phases(op, own, world, **settings)]
    data = f"the first {cost.examples} of {cost.total} examples"
    notes = [f"measured: products of {op.name} with {data}"]
    if phases in (_spectrum, _eigenpairs) and settings.get("products") is None:
        notes.append("assumed: eigenpairs converge when the basis is full for the first time")
    if phases is _solve and settings.get("iterations") is None:
        notes.append("assumed: 100 iterations")
    return Plan.of(found, world, settings | {"batch_size": own.examples}, notes)


def _spectrum(
    op: LinearOperator,
    cost: ProductCost,
    ranks: Ranks,
    *,
    k: int = 10,
    products: int | None = None,
    steps: int = 64,
    probes: int = 2,
) -> list[Phase]:
    k = min(k, op.shape[0])
    left_out = k if k < op.shape[0] else 0
    return [
        eigenpairs_phase(op, cost, ranks, k=k, products=products),
        density_phase(op, cost, ranks, steps=steps, probes=probes, deflated=left_out),
    ]


def _eigenpairs(op: LinearOperator, cost: ProductCost, ranks: Ranks, **own: Any) -> list[Phase]:
    return [eigenpairs_phase(op, cost, ranks, **own)]


def _density(op: LinearOperator, cost: ProductCost, ranks: Ranks, **own: Any) -> list[Phase]:
    return [density_phase(op, cost, ranks, **own)]


def _trace(op: LinearOperator, cost: ProductCost, ranks: Ranks, **own: Any) -> list[Phase]:
    return [trace_phase(op, cost, ranks, **own)]


def _diagonal(op: LinearOperator, cost: ProductCost, ranks: Ranks, **own: Any) -> list[Phase]:
    return [diagonal_phase(op, cost, ranks, **own)]


def _solve(op: LinearOperator, cost: ProductCost, ranks: Ranks, **own: Any) -> list[Phase]:
    return [solve_phase(op, cost, ranks, **own)]


_ESTIMATES: dict[str, Phases] = {
    "spectrum": _spectrum,
    "eigenpairs": _eigenpairs,
    "density": _density,
    "trace": _trace,
    "diagonal": _diagonal,
    "solve": _solve,
}


def _window(
    vectors: torch.dtype,
    gradient: ProductCost,
    *,
    size: int = 32,
    dtype: torch.dtype | None = None,
    ranks: int = 1,
    sharded: bool = False,
    batch_size: int | None = None,
    **settings: Any,
) -> Plan:
    world, stored = Ranks(ranks, sharded), dtype or vectors
    own = gradient.on(world, batch_size)
    phases = window_phases(own, world, size=size, dtype=stored, **settings)
    name = str(stored).removeprefix("torch.")
    notes = [f"measured: the gradient of the first batch ({gradient.examples} examples)"]
    kept = {**settings, "size": size, "dtype": name, "batch_size": own.examples}
    return Plan.of(phases, world, kept, notes)


def _fit(read: dict[str, Any], *, ranks: int = 1, sharded: bool = False, **settings: Any) -> Plan:
    world, own = Ranks(ranks, sharded), {**read, **settings}
    kept = {name: value for name, value in own.items() if name != "layers"}
    return Plan.of(fit_phases(own.pop("layers"), world, **own), world, kept)


def _influence(read: dict[str, Any], *, queries: int = 1, **settings: Any) -> Plan:
    return influence_plan(queries=queries, **{**read, **settings})
