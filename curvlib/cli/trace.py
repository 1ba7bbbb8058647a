"""``curvlib trace``: the trace of the curvature, and that of each layer, from the same products."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from curvlib.cli.common import (
    CurvatureJob,
    add_budget,
    add_common,
    job,
    new_parser,
    says_how_to_resume,
)
from curvlib.core.operator import LinearOperator
from curvlib.estimators.diagonal import DiagonalEstimate, choose, diagonal
from curvlib.estimators.joint import Estimate, estimate
from curvlib.estimators.stopping import DEFAULT_PRODUCTS
from curvlib.report.figures import with_error
from curvlib.report.files import number
from curvlib.report.layers import Layer, Layers, table, write

_DESCRIPTION = """\
Estimates the trace of the curvature of a risk and that of each layer's block, which sum to it,
with standard errors, all from the same products. Writes a figure, the numbers and the command
into a folder.

Methods: xtrace and xnystrace (the latter for GGN and Fisher matrices) sketch the operator, which
makes errors several times smaller for the same products. hutchinson keeps no vectors and
estimates the Frobenius norm as well. By default it is used with --tolerance, with very few
products and where the sketch would not fit into memory.
"""
#: The diagonal that sums to the trace of each method.
_DIAGONALS = {"hutchinson": "hutchinson", "xtrace": "xdiag", "xnystrace": "xnysdiag"}
#: How a trace may be estimated.
METHODS = tuple(_DIAGONALS)
_TRACES = {diagonal: trace for trace, diagonal in _DIAGONALS.items()} | {"exact": "exact"}


def add_parser(commands: Any) -> None:
    """Adds the command to the command line's parser."""
    parser = new_parser(
        commands,
        "trace",
        help="trace of a model's curvature, layer by layer",
        description=_DESCRIPTION,
    )
    parser.add_argument("--method", choices=METHODS, help="how to estimate it")
    add_budget(parser, "the trace (with other methods than hutchinson, to the diagonal's norm)")
    add_common(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Runs ``curvlib trace``."""
    work = job(args, argv, "{}-trace")
    method = diagonal_method(work.op, args.method, args.products, args.tolerance)
    settings: dict[str, Any] = {
        "max_products": args.products,
        "tolerance": args.tolerance,
        "seed": args.seed,
        "checkpoint": work.checkpoints / "trace.safetensors",
        "save_every": args.save_every,
    }
    with says_how_to_resume(work):
        if method == "hutchinson":
            of = ["trace", "layers"] if args.tolerance else ["trace", "layers", "frobenius"]
            layers = _sampled(estimate(work.op, of, **settings), work)
        else:
            chosen = None if method == "exact" else method
            whole = {"whole": slice(None)}
            layers = _sketched(diagonal(work.op, method=chosen, blocks=whole, **settings), work)
    print(table(layers))
    work.finish(lambda: write(layers, work.folder, work.command))


def diagonal_method(
    op: LinearOperator, method: str | None, products: int | None, tolerance: float | None
) -> str:
    """How the diagonal is estimated whose parts are summed: see the command's description."""
    if method is not None:
        return _DIAGONALS[method]
    if tolerance is not None:
        return "hutchinson"
    return choose(op, None, products or DEFAULT_PRODUCTS[0], None)


def _sampled(found: Estimate, work: CurvatureJob) -> Layers:
    """From independent probes, which give the Frobenius norm, too."""
    assert found.trace is not None
    assert found.trace_stderr is not None
    facts, numbers = {}, {}
    if found.frobenius is not None and found.frobenius_stderr is not None:
        facts["Frobenius norm"] = with_error(found.frobenius, found.frobenius_stderr)
        numbers["frobenius_norm"] = number(found.frobenius)
        numbers["frobenius_norm_stderr"] = number(found.frobenius_stderr)
    values = {n: (value, found.layers_stderr[n]) for n, value in found.layers.items()}
    total = (found.trace, found.trace_stderr, found.interval["trace"])
    return _report(found, found.method, values, total, work, facts=facts, numbers=numbers)


def _sketched(found: DiagonalEstimate, work: CurvatureJob) -> Layers:
    """From sums of a diagonal."""
    means = found.block_means("layers")
    sums = zip(means.value * means.sizes, means.stderr * means.sizes, strict=True)
    values = {n: (float(v), float(e)) for n, (v, e) in zip(means.counts, sums, strict=True)}
    whole, size = found.block_means("blocks"), work.op.shape[0]
    low, high = (float(end[0]) * size for end in whole.interval)
    total = (float(whole.value[0]) * size, float(whole.stderr[0]) * size, (low, high))
    return _report(found, _TRACES[found.method], values, total, work, facts={}, numbers={})


def _report(
    found: Estimate | DiagonalEstimate,
    method: str,
    values: dict[str, tuple[float, float]],
    total: tuple[float, float, tuple[float, float]],
    work: CurvatureJob,
    *,
    facts: dict[str, str],
    numbers: dict[str, Any],
) -> Layers:
    space, rows = work.op.space, []
    assert space is not None
    for layer, names in space.layers().items():
        size = sum(space.sizes[space.names.index(name)] for name in names)
        value, stderr = values[layer]
        share = value / total[0] if total[0] else float("nan")
        rows.append(
            Layer(layer, size, value, stderr, {"share": share, "mean diagonal": value / size})
        )
    return Layers(
        what="trace",
        heading="trace",
        rows=tuple(rows),
        total=total,
        total_heading="trace",
        facts=facts,
        numbers=numbers,
        result=found,
        method=method,
        products=found.products,
        **work.measured(),
    )
