"""``curvlib diagonal``: the diagonal of the curvature, and its mean over each layer."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from curvlib.cli.common import (
    CurvatureJob,
    add_budget,
    add_common,
    job,
    new_parser,
    says_how_to_resume,
)
from curvlib.estimators.diagonal import METHODS, DiagonalEstimate, diagonal
from curvlib.report.files import number
from curvlib.report.layers import Layer, Layers, table, write

_DESCRIPTION = """\
Estimates the diagonal of the curvature of a risk, and its mean over each layer, with standard
errors. Writes the diagonal, a figure, the numbers and the command into a folder.
"""


def add_parser(commands: Any) -> None:
    """Adds the command to the command line's parser."""
    parser = new_parser(
        commands,
        "diagonal",
        help="diagonal of a model's curvature, and its mean over each layer",
        description=_DESCRIPTION,
    )
    parser.add_argument(
        "--method",
        choices=tuple(METHODS),
        help="how to estimate it (default: by what is known of the operator and by the budget)",
    )
    add_budget(parser, "the diagonal's norm")
    add_common(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Runs ``curvlib diagonal``."""
    work = job(args, argv, "{}-diagonal")
    with says_how_to_resume(work):
        found = diagonal(
            work.op,
            method=args.method,
            blocks={"whole": slice(None)},
            max_products=args.products,
            tolerance=args.tolerance,
            seed=args.seed,
            checkpoint=work.checkpoints / "diagonal.safetensors",
            save_every=args.save_every,
        )
    layers = _layers(found, work)
    print(table(layers))
    work.finish(lambda: write(layers, work.folder, work.command))


def _layers(found: DiagonalEstimate, work: CurvatureJob) -> Layers:
    space, entries = work.op.space, found.value.cpu()
    assert space is not None
    means = found.block_means("layers")
    rows = []
    for layer, names in space.layers().items():
        own = torch.cat([entries[space.slice(name)] for name in names])
        value, stderr = (float(x[0]) for x in means.of(layer))
        more = {"smallest": float(own.min()), "largest": float(own.max())}
        rows.append(Layer(layer, own.numel(), value, stderr, more))
    whole = found.block_means("blocks")
    low, high = (float(end[0]) for end in whole.interval)
    typical = float(found.stderr.square().mean().sqrt())
    return Layers(
        what="diagonal",
        heading="mean diagonal",
        rows=tuple(rows),
        total=(float(whole.value[0]), float(whole.stderr[0]), (low, high)),
        total_heading="mean diagonal",
        facts={"error of an entry": f"{typical:.3g}  (standard error, root mean square)"},
        numbers={"entry_stderr": number(typical)},
        result=found,
        method=found.method,
        products=found.products,
        **work.measured(),
    )
