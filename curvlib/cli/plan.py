"""``curvlib plan``: memory, work and traffic of a command, by phase and rank, before it runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from curvlib.cli.common import OPERATORS, add_model, count, new_parser, positive, target_risk
from curvlib.cli.trace import METHODS, diagonal_method
from curvlib.core.memory import available_memory
from curvlib.core.plan import Plan, readable
from curvlib.core.risk import Risk
from curvlib.estimators.diagonal import METHODS as DIAGONALS
from curvlib.estimators.plan import SOLVE_BLOCKS
from curvlib.operators.factors.plan import CURVATURES
from curvlib.planning import planner, what_fits

_DESCRIPTION = """\
Prints what a computation takes before it runs: floating-point work, memory and traffic of each
phase, on each rank. Products and gradients are measured on the first batch alone; the rest are
formulas. Where it does not fit, says which setting would.
"""
#: What there are plans of, and what it is called.
_WHAT = {
    "spectrum": "eigenpairs and spectral density",
    "trace": "the trace, layer by layer",
    "diagonal": "the diagonal",
    "solve": "linear systems, by iterations",
    "mfac": "a window of gradients: its memory, and a step",
    "kfac": "a fit of Kronecker factors",
    "influence": "a fit of factors, and a search",
}
#: Arguments that are none of the computation's settings.
_OTHER = {
    *("target", "what", "run", "seed", "params", "device", "dtype", "debug", "available"),
    *("examples", "fisher", "samples"),
}


def add_parser(commands: Any) -> None:
    """Adds the command to the command line's parser."""
    parser = new_parser(
        commands,
        "plan",
        help="memory, work and traffic of a computation, before it runs",
        description=_DESCRIPTION,
        curvature=False,
    )
    parser.set_defaults(run=run)
    kinds = parser.add_subparsers(metavar="WHAT", dest="what", required=True)
    for what, words in _WHAT.items():
        own = kinds.add_parser(what, help=words, description=f"What it takes: {words}.")
        _add_settings(own, what)
        add = own.add_argument
        add("--ranks", type=count, metavar="R", help="processes (default: 1, or the launcher's)")
        add("--sharded", action="store_true", help="parameters are divided among them (FSDP2)")
        add("--batch-size", type=count, metavar="B", help="examples of a batch, if others")
        add("--examples", type=count, metavar="N", help="of the data, where it does not say")
        add("--available", type=positive, metavar="BYTES", help="memory of a rank, if another")
        add_model(own)


def _add_settings(parser: argparse.ArgumentParser, what: str) -> None:
    """The settings that matter to a plan, as the command that computes has them."""
    add = parser.add_argument
    if what in ("spectrum", "trace", "diagonal", "solve"):
        add("--curvature", choices=sorted(OPERATORS), default="hessian", help="default: hessian")
    if what == "spectrum":
        add("--k", type=count, default=10, help="number of eigenvalues (default: 10)")
        add("--steps", type=count, default=64, help="Lanczos steps of the density (default: 64)")
        add("--probes", type=count, default=2, help="its random vectors (default: 2)")
        add("--products", type=count, help="of the eigenpairs (default: to fill the basis once)")
    if what in ("trace", "diagonal"):
        methods = METHODS if what == "trace" else tuple(DIAGONALS)
        add("--method", choices=methods, help="how to estimate it")
        add("--products", type=count, help="at most (default: 100; 1000 with a tolerance)")
        add("--tolerance", type=positive, help="standard error at which to stop")
    if what == "solve":
        add("--columns", type=count, default=1, help="right-hand sides (default: 1)")
        add("--method", choices=tuple(SOLVE_BLOCKS), help="default: by the operator")
        add("--iterations", type=count, help="default: 100")
    if what == "mfac":
        add("--size", type=count, default=32, help="rows (default: 32)")
        types = ("float32", "float64", "bfloat16")
        add("--rows", choices=types, help="type that rows are stored in (default: of vectors)")
        add("--storage", choices=("cpu",), help="keep rows in host memory")
    if what in ("kfac", "influence"):
        kinds = tuple(kind for kind in CURVATURES if what == "influence" or kind != "identity")
        add("--curvature", choices=kinds, default="ekfac", help="default: ekfac")
        add("--fisher", choices=("type2", "mc", "empirical"), help="default: by the outputs")
        add("--samples", type=count, default=1, help="for --fisher mc (default: 1)")
    if what == "influence":
        add("--queries", type=count, default=1, help="how many are explained (default: 1)")
        add("--top", dest="k", type=count, default=50, metavar="K", help="proponents (default: 50)")
        add("--bottom", type=count, metavar="K", help="opponents (default: as --top)")
        add("--rank", type=count, help="of compressed directions")


def run(args: argparse.Namespace, argv: Sequence[str]) -> None:  # noqa: ARG001 (as others)
    """Runs ``curvlib plan``."""
    risk = target_risk(args)
    print(f"{args.target or 'digits demo'}: {risk!r}")
    what, settings = _settings(args, risk)
    measured: dict[str, Any] = {"examples": args.examples}
    if args.what in ("kfac", "influence"):
        measured |= {"fisher": args.fisher, "samples": args.samples}
    elif args.what != "mfac":
        measured["make"] = lambda part: OPERATORS[args.curvature](part, args.seed)
    make = planner(risk, what, **measured)
    plan = make(**settings)
    print(plan)
    available = args.available or available_memory(risk.device)
    if available is not None:
        where = "on a rank" if args.available else f"on {risk.device}"
        print(f"available {where}: {readable(available, 'B')}; {_verdict(plan, available)}")
        if plan.peak > available:
            print(_advice(what_fits(make, what, settings, available)))


def _settings(args: argparse.Namespace, risk: Risk) -> tuple[str, dict[str, Any]]:
    """What is planned, and its settings."""
    found = {
        name: value
        for name, value in vars(args).items()
        if name not in _OTHER and value is not None
    }
    found.setdefault("ranks", 1 if risk.group is None else risk.group.size)
    if args.what == "mfac":
        stored = found.pop("rows", None)
        return "mfac", found | ({} if stored is None else {"dtype": getattr(torch, stored)})
    if args.what in ("kfac", "influence"):
        return args.what, found
    found.pop("curvature")
    if args.what != "trace":
        return args.what, found
    op = OPERATORS[args.curvature](risk, args.seed)
    method = diagonal_method(op, args.method, args.products, args.tolerance)
    if method == "hutchinson":
        return "trace", found | {"method": method}
    found.pop("method", None)
    return "diagonal", found if method == "exact" else found | {"method": method}


def _verdict(plan: Plan, available: float) -> str:
    if plan.peak <= available:
        return "it fits"
    return f"it does not fit by {readable(plan.peak - available, 'B')}"


def _advice(found: Sequence[dict[str, Any]]) -> str:
    """One line for what would fit."""
    if not found:
        return "no setting makes it fit: take part of the parameters with --params"
    return (
        f"what would fit: {', or '.join(' with '.join(map(_option, way.items())) for way in found)}"
    )


def _option(setting: tuple[str, Any]) -> str:
    name, value = setting
    shown = str(value).removeprefix("torch.")
    words = {
        "sharded": "--sharded",
        "dtype": f"--rows {shown}",
        "batch_size": f"batches of {shown} examples",
        "memory": f"memory={shown} of the operator, in Python",
        "block": f"block={shown}, in Python",
    }
    return words.get(name, f"--{name} {shown}")
