"""``curvlib spectrum``: the spectrum of one's own model, loss and data, in a folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from curvlib.cli.common import add_common, count, job, new_parser, positive, says_how_to_resume
from curvlib.estimators.density import density
from curvlib.estimators.eigenpairs import eigenpairs
from curvlib.report.spectrum import Spectrum, table, write

_DESCRIPTION = """\
Estimates the spectrum of the curvature of a risk: its extreme eigenvalues with their residuals,
and its density. Writes a figure, the numbers and the command into a folder.
"""


def add_parser(commands: Any) -> None:
    """Adds the command to the command line's parser."""
    parser = new_parser(
        commands,
        "spectrum",
        help="eigenvalues and spectral density of a model's curvature",
        description=_DESCRIPTION,
    )
    add = parser.add_argument
    add("--k", type=count, help="number of eigenvalues (default: 10, or all of fewer)")
    add(
        "--which",
        choices=("LA", "SA", "LM", "BE"),
        default="LA",
        help="which ones: largest, smallest, largest magnitude, both ends (default: LA)",
    )
    add(
        "--tolerance",
        type=positive,
        help="residual at which an eigenvalue is done, relative to the norm of the operator "
        "(default: 3e-4 in float32, 1.5e-8 in float64)",
    )
    add("--steps", type=count, default=64, help="Lanczos steps of the density (default: 64)")
    add("--probes", type=count, default=2, help="random vectors of the density (default: 2)")
    add_common(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Runs ``curvlib spectrum``."""
    work = job(args, argv, "{}")
    k = min(10, work.op.shape[0]) if args.k is None else args.k
    with says_how_to_resume(work):
        pairs = eigenpairs(
            work.op,
            k,
            which=args.which,
            tolerance=args.tolerance,
            seed=args.seed,
            checkpoint=work.checkpoints / "eigenpairs.safetensors",
            save_every=args.save_every,
        )
        estimate = density(
            work.op,
            steps=args.steps,
            probes=args.probes,
            deflate=pairs if k < work.op.shape[0] else None,
            seed=args.seed,
            checkpoint=work.checkpoints / "density.safetensors",
            save_every=args.save_every,
        )
    spectrum = Spectrum(eigenpairs=pairs, density=estimate, **work.measured())
    print(table(spectrum))
    work.finish(lambda: write(spectrum, work.folder, work.command))
