"""``curvlib influence``: which training examples a prediction rests on, as a page."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from curvlib.cli.common import (
    Job,
    add_common,
    count,
    new_parser,
    positive,
    risk_job,
    says_how_to_resume,
    seeded_object,
)
from curvlib.cli.target import TargetError, converted, converted_data
from curvlib.core.risk import Risk
from curvlib.demo import digits
from curvlib.influence.influence import Influence
from curvlib.influence.page import Contents
from curvlib.influence.plan import planned
from curvlib.operators.batch_examples import example_count
from curvlib.report.influence import Search, own_contents, table, write

_DESCRIPTION = """\
Finds the training examples that most raise and most lower the loss on queries when they are removed
(influence functions), and writes a page that shows them, the numbers and the command into a folder.

TARGET is the risk of the training data. --queries names, in the same form, batches of the same kind
or a Risk with the same parameters, of which the data and the loss are taken; the model is TARGET's.

The page shows images, numbers, labels and predictions from the data itself. For texts, --show names
a dictionary (or a function that returns one) with any of the keys queries, train, query_captions
and captions: sequences of strings, lists of tokens, or images, in the order of the data.
"""
_QUERIES = "expected file.py:name or package.module:name, name being batches, a Risk or a function"
_SHOW = "expected file.py:name or package.module:name, name being a dictionary or a function of one"
_KEYS = tuple(field.name for field in dataclasses.fields(Contents))
#: Misread images that the demo explains.
DEMO = 4


def add_parser(commands: Any) -> None:
    """Adds the command to the command line's parser."""
    parser = new_parser(
        commands,
        "influence",
        help="training examples that predictions rest on",
        description=_DESCRIPTION,
        curvature=False,
    )
    add = parser.add_argument
    add("--queries", metavar="TARGET", help="what is explained: file.py:name of batches or a Risk")
    add("--top", type=count, default=50, metavar="K", help="proponents of each (default: 50)")
    add("--bottom", type=_whole, metavar="K", help="opponents of each (default: as --top)")
    add(
        "--curvature",
        choices=("ekfac", "kfac", "diagonal", "identity"),
        default="ekfac",
        help="default: ekfac",
    )
    add("--fisher", choices=("type2", "mc", "empirical"), help="labels (default: by the outputs)")
    add("--damping", type=_damping, help="share of the mean eigenvalue (default: 0.1)")
    add("--absolute", action="store_true", help="--damping is the number itself, not a share")
    add("--unit", choices=("inner_product", "nats"), default="inner_product")
    add("--rank", type=count, help="compress the queries' gradients to this rank")
    add("--tolerance", type=positive, help="or to this relative error, by ranks of their own")
    add("--show", metavar="TARGET", help="file.py:name of what the page shows, by name")
    add("--shown", type=count, default=10, metavar="K", help="examples shown whole (default: 10)")
    add_common(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Runs ``curvlib influence``."""
    _check(args)
    given = _given(args)
    work = risk_job(args, argv, "{}-influence")
    queries = _queries(args, work.risk)
    examples, asked = _count(work.risk), _count(queries)
    bottom = args.top if args.bottom is None else args.bottom
    if max(args.top, bottom) > examples:
        raise ValueError(
            f"--top {args.top} and --bottom {bottom} are more than the {examples} training examples"
        )
    fisher = {} if args.fisher is None or args.curvature == "identity" else {"fisher": args.fisher}
    plan = planned(
        work.risk,
        asked,
        examples=examples,
        curvature=args.curvature,
        rank=args.rank,
        k=args.top,
        bottom=bottom,
        **fisher,
    )
    print(f"\n{plan}\n")
    with says_how_to_resume(work):
        inf = Influence.of(
            work.risk,
            args.curvature,
            damping=args.damping,
            relative=not args.absolute,
            unit=args.unit,
            fit=fisher | _fit(args, work),
        )
        top = inf.top(
            queries,
            args.top,
            bottom,
            rank=args.rank,
            tolerance=args.tolerance,
            checkpoint=work.checkpoints / "scan.safetensors",
            save_every=args.save_every,
        )
        contents = own_contents(top, inf.risk, queries, given)
    search = Search(
        top=top,
        contents=contents,
        target=work.target,
        queries=args.queries or "held-out images that the network misreads",
        parameters=inf.risk.space.size,
        shown=args.shown,
        seconds=work.seconds,
        resumed=work.resumed,
    )
    print(table(search))
    work.finish(lambda: write(search, work.folder, work.command))


def _check(args: argparse.Namespace) -> None:
    """What can be said before anything is loaded."""
    if args.queries is None and args.target is not None:
        raise ValueError("influence needs --queries file.py:name, what is to be explained")
    if args.fisher is not None and args.curvature == "identity":
        raise ValueError("--fisher belongs to --curvature ekfac, kfac and diagonal")
    if args.absolute and args.damping is None:
        raise ValueError("--absolute says what --damping is: add --damping")
    if args.unit == "nats" and args.curvature == "identity":
        raise ValueError("--unit nats needs curvature; use --curvature ekfac")
    if args.tolerance is not None and args.tolerance >= 1.0:
        raise ValueError(f"--tolerance is a relative error below 1, got {args.tolerance:g}")


def _fit(args: argparse.Namespace, work: Job) -> dict[str, Any]:
    """Settings of the fit of each curvature."""
    if args.curvature == "identity":
        return {}
    if args.curvature == "diagonal":
        return {"seed": args.seed}
    checkpoint = work.checkpoints / "fit.safetensors"
    return {"seed": args.seed, "checkpoint": checkpoint, "save_every": args.save_every}


def _queries(args: argparse.Namespace, risk: Risk) -> Risk:
    """The risk of the queries, with the model of the training data's.

    Raises:
        ValueError: If a Risk has other parameters.
        TypeError: If it is no data.
    """
    dtype = getattr(torch, args.dtype) if args.dtype else None
    if args.queries is None:
        demo = digits()
        images, labels = demo.test
        with torch.no_grad():
            wrong = (demo.model(images).argmax(1) != labels).nonzero()[:DEMO, 0]
        found: Any = (images[wrong], labels[wrong])
    else:
        found = seeded_object(args.queries, args.seed, option="--queries", form=_QUERIES)
    if isinstance(found, Risk):
        own = converted(found, dtype=dtype, device=args.device) if dtype or args.device else found
        return own.of(risk.model).restrict(list(risk.params.values()))
    if dtype or args.device:
        found = converted_data(found, dtype=dtype, device=args.device)
    return risk.on(found)


def _given(args: argparse.Namespace) -> Mapping[str, Any]:
    """What ``--show`` gives.

    Raises:
        TargetError: If it is no dictionary, or has another key.
    """
    if args.show is None:
        return {}
    found = seeded_object(args.show, args.seed, option="--show", form=_SHOW)
    if isinstance(found, Contents):
        found = {key: v for key, v in vars(found).items() if v is not None}
    if not isinstance(found, Mapping):
        raise TargetError(f"--show {args.show} is of type {type(found).__name__}; {_SHOW}")
    unknown = [str(key) for key in found if key not in _KEYS]
    if unknown:
        raise TargetError(
            f"--show {args.show} has the keys {', '.join(unknown)}; keys are {', '.join(_KEYS)}"
        )
    return found


def _count(risk: Risk) -> int:
    found = sum(example_count(batch) for batch in risk.batches())
    if found < 1:
        raise ValueError("there is no example in the data; pass some")
    return found


def _whole(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text}")
    return value


def _damping(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text}")
    return value


_whole.__name__, _damping.__name__ = "whole number", "number"  # what argparse calls them
