"""``curvlib rates``: the largest learning rates for each batch size, predicted and measured."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from curvlib.cli.common import (
    add_common,
    count,
    new_parser,
    positive,
    risk_job,
    says_how_to_resume,
)
from curvlib.core.minibatch import example_count
from curvlib.rates.learning_rate import max_learning_rate
from curvlib.rates.measured_edges import TRAINERS, measured_edges
from curvlib.report.rates import Rates, table, write

_DESCRIPTION = """\
Predicts the largest stable learning rate for each batch size from the spectrum of the curvature and
its noise from example to example, with the critical batch size, beyond which larger batches buy no
larger steps. Writes a figure, the numbers and the command into a folder.

--validate trains copies of the model from its parameters as they are, with each batch size and many
learning rates, and draws where training becomes unstable, and where it no longer recovers.
"""
#: Largest batch size by default.
LARGEST = 512


def add_parser(commands: Any) -> None:
    """Adds the command to the command line's parser."""
    parser = new_parser(
        commands,
        "rates",
        help="largest learning rates by batch size",
        description=_DESCRIPTION,
        curvature=False,
    )
    add = parser.add_argument
    add("--curvature", choices=("hessian", "ggn"), default="hessian", help="default: hessian")
    add(
        "--batch-sizes",
        type=_sizes,
        metavar="LIST",
        help=f"such as 1,8,64 (default: powers of two up to {LARGEST}, or all examples)",
    )
    add("--optimizer", choices=TRAINERS, default="sgd", help="default: sgd")
    add("--momentum", type=_share, help="of momentum, or Adam's beta1 (default: 0.9)")
    add(
        "--law",
        choices=("second_moment", "mean_square", "batch_sharpness"),
        default="second_moment",
        help="which law is in use (default: second_moment)",
    )
    add("--examples", type=count, help="take per-example products of so many examples only")
    add("--validate", action="store_true", help="measure where training diverges, too")
    add("--steps", type=count, help="training steps of --validate (default: 200)")
    add("--seeds", type=count, help="orders of the data of --validate (default: 3)")
    add(
        "--rise",
        type=positive,
        help="a loss above so many times that at the start is unstable (default: 2)",
    )
    add_common(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Runs ``curvlib rates``."""
    training = _training(args)
    if args.momentum is not None and args.optimizer == "sgd":
        raise ValueError("--momentum belongs to --optimizer momentum and adam")
    work = risk_job(args, argv, "{}-rates")
    sizes = args.batch_sizes or _default_sizes(example_count(work.risk))
    with says_how_to_resume(work):
        predicted = max_learning_rate(
            work.risk,
            sizes,
            args.optimizer,
            momentum=args.momentum,
            law=args.law,
            kind=args.curvature,
            examples=args.examples,
            seed=args.seed,
            checkpoint=work.checkpoints / "curvature.safetensors",
            save_every=args.save_every,
        )
        measured = None
        if args.validate:
            measured = measured_edges(
                work.risk,
                sizes,
                args.optimizer,
                momentum=0.9 if args.momentum is None else args.momentum,
                guess=float(predicted.value[0]),
                seed=args.seed,
                checkpoint=work.checkpoints / "edges.safetensors",
                save_every=args.save_every,
                **training,
            )
    rates = Rates(
        predicted=predicted,
        measured=measured,
        target=work.target,
        parameters=work.risk.space.size,
        seconds=work.seconds,
        resumed=work.resumed,
    )
    print(table(rates))
    work.finish(lambda: write(rates, work.folder, work.command))


def _training(args: argparse.Namespace) -> dict[str, Any]:
    names = ("steps", "seeds", "rise")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if given and not args.validate:
        raise ValueError(f"--{next(iter(given))} says how to train copies: add --validate")
    return given


def _default_sizes(examples: int) -> list[int]:
    sizes = [2**k for k in range(LARGEST.bit_length()) if 2**k <= min(examples, LARGEST)]
    return sizes if examples > LARGEST or examples in sizes else [*sizes, examples]


def _sizes(text: str) -> list[int]:
    return sorted({count(part) for part in text.split(",")})


def _share(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"expected a number in [0, 1), got {text}")
    return value


_sizes.__name__, _share.__name__ = "list of whole numbers", "number"  # what argparse calls them
