"""``curvlib prune``: a pruned model, what it lost, and how other methods would have fared."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from torch import nn

from curvlib.cli.common import (
    add_common,
    count,
    held_out_risk,
    new_parser,
    risk_job,
    says_how_to_resume,
)
from curvlib.core.minibatch import example_count
from curvlib.core.risk import Risk
from curvlib.operators.accuracy import accuracy
from curvlib.pruning.compare import compare
from curvlib.pruning.methods import METHODS, method_of
from curvlib.pruning.prune import prune
from curvlib.report.pruning import Pruning, table, write

_DESCRIPTION = """\
Prunes the weights of a risk's model by second-order (or other) methods, and compares methods at
several sparsities. Writes the pruned weights (safetensors: load them with load_state_dict), the
masks, a figure, the numbers and the command into a folder. TARGET's own weights stay as they are.
"""
#: Sparsities at which methods are compared by default.
LEVELS = "0.5,0.7,0.8,0.9,0.95,0.98"


def add_parser(commands: Any) -> None:
    """Adds the command to the command line's parser."""
    parser = new_parser(
        commands,
        "prune",
        help="prune a model by second-order methods",
        description=_DESCRIPTION,
        curvature=False,
    )
    add = parser.add_argument
    add("--sparsity", type=_fraction, help="share of the weights that goes, in [0, 1)")
    add("--pattern", metavar="N:M", help="keep N of every M inputs, such as 2:4")
    add("--method", choices=tuple(METHODS), default="obs", help="default: obs")
    add(
        "--scope",
        choices=("global", "layer", "row", "flops", "importance"),
        help="what is compared, or spent (default: the method's)",
    )
    add("--update", choices=("none", "single", "joint"), help="what the other weights do")
    add("--recompute", type=count, help="rounds with fresh curvature (default: the method's)")
    add("--block-size", type=count, help="weights of a Fisher block (default: the method's)")
    add("--rows", type=count, help="gradients of the Fisher (default: at least 512)")
    add("--fisher", choices=("mc", "empirical"), help="labels: the model's (mc), or the true ones")
    add("--damping", type=_damping, help="share of the mean diagonal, or auto (of Fisher blocks)")
    add("--layer-maximum", type=_fraction, help="largest sparsity of any layer")
    add("--test", metavar="TARGET", help="another risk, on which pruned models are evaluated")
    add(
        "--compare",
        default="magnitude,diagonal",
        metavar="NAMES",
        help="methods to compare with, separated by commas; none for no comparison "
        "(default: magnitude,diagonal)",
    )
    add(
        "--sparsities",
        type=_fractions,
        default=_fractions(LEVELS),
        metavar="LIST",
        help=f"where methods are compared (default: {LEVELS})",
    )
    add_common(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Runs ``curvlib prune``."""
    if args.sparsity is None and args.pattern is None:
        raise ValueError("prune needs --sparsity, --pattern or both")
    names = ("scope", "update", "recompute", "block_size", "rows", "fisher", "damping")
    settings = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    method = method_of(args.method, settings)
    others = _others(args.compare)
    work = risk_job(args, argv, "{}-prune")
    test = held_out_risk(args)
    judge = work.risk if test is None else test
    dense = _value(judge, work.risk.model)
    with says_how_to_resume(work):
        found = prune(
            work.risk.model,
            work.risk,
            args.sparsity,
            method=args.method,
            pattern=args.pattern,
            layer_maximum=args.layer_maximum,
            seed=args.seed,
            checkpoint=work.checkpoints / "prune.safetensors",
            save_every=args.save_every,
            **settings,
        )
        curves = None
        if others:
            curves = compare(
                work.risk.model,
                work.risk,
                args.sparsities,
                {name: METHODS[name] for name in others} | {args.method: method},
                evaluate=lambda model: _value(judge, model),
                quantity=_quantity(judge, test),
                layer_maximum=0.999 if args.layer_maximum is None else args.layer_maximum,
                seed=args.seed,
                checkpoint=work.checkpoints / "compare.safetensors",
                save_every=args.save_every,
            )
    assert found.model is not None
    pruning = Pruning(
        result=found,
        comparison=curves,
        quantity=_quantity(judge, test),
        dense=dense,
        pruned=_value(judge, found.model),
        target=work.target,
        examples=example_count(work.risk),
        seconds=work.seconds,
        resumed=work.resumed,
    )
    print(table(pruning))
    work.finish(lambda: write(pruning, work.folder, work.command))


def _others(names: str) -> list[str]:
    """Methods to compare with, from a list with commas."""
    found = [name.strip() for name in names.split(",")]
    found = [name for name in dict.fromkeys(found) if name not in ("", "none")]
    unknown = [name for name in found if name not in METHODS]
    if unknown:
        raise ValueError(
            f"--compare takes names out of {', '.join(METHODS)}, or none, got {', '.join(unknown)}"
        )
    return found


def _classifies(risk: Risk) -> bool:
    return risk.loss.categorical or risk.loss.kind == "bce_with_logits"


def _value(judge: Risk, model: nn.Module) -> float:
    risk = judge.of(model)
    return 100.0 * accuracy(risk) if _classifies(risk) else float(risk.value())


def _quantity(judge: Risk, test: Risk | None) -> str:
    kind = "accuracy (%)" if _classifies(judge) else "loss"
    return kind if test is None else f"test {kind}"


def _fraction(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"expected a share in [0, 1), got {text}")
    return value


def _fractions(text: str) -> list[float]:
    return [_fraction(part) for part in text.split(",")]


def _damping(text: str) -> float | str:
    return text if text == "auto" else float(text)


_damping.__name__ = "number"
_fraction.__name__, _fractions.__name__ = "share", "list of shares"  # what argparse calls them
