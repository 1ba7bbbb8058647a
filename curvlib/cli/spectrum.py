"""``curvlib spectrum``: the spectrum of one's own model, loss and data, in a folder."""

from __future__ import annotations

import argparse
import math
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from curvlib.cli.target import converted, load
from curvlib.core.operator import LinearOperator
from curvlib.core.risk import Risk
from curvlib.demo import digits
from curvlib.estimators.density import density
from curvlib.estimators.eigenpairs import eigenpairs
from curvlib.operators.fisher import fisher
from curvlib.operators.ggn import ggn
from curvlib.operators.hessian import hessian
from curvlib.report.spectrum import Spectrum, table, write

_DESCRIPTION = """\
Estimates the spectrum of the curvature of a risk: its extreme eigenvalues with their residuals,
and its density. Writes a figure, the numbers and the command into a folder.

TARGET is file.py:name or package.module:name, name being a curvlib.Risk or a function that
returns one. Without TARGET, a small network is trained on scikit-learn's handwritten digits.
"""


def add_parser(commands: Any) -> None:
    """Adds the command to the command line's parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "spectrum",
        help="eigenvalues and spectral density of a model's curvature",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("target", nargs="?", metavar="TARGET", help="file.py:name or package.module:name")
    add("--curvature", choices=sorted(_OPERATORS), default="hessian", help="default: hessian")
    add("--k", type=_count, help="number of eigenvalues (default: 10, or all of fewer)")
    add(
        "--which",
        choices=("LA", "SA", "LM", "BE"),
        default="LA",
        help="which ones: largest, smallest, largest magnitude, both ends (default: LA)",
    )
    add(
        "--tolerance",
        type=_positive,
        help="residual at which an eigenvalue is done, relative to the norm of the operator "
        "(default: 3e-4 in float32, 1.5e-8 in float64)",
    )
    add("--steps", type=_count, default=64, help="Lanczos steps of the density (default: 64)")
    add("--probes", type=_count, default=2, help="random vectors of the density (default: 2)")
    add(
        "--seed",
        type=int,
        default=0,
        help="of everything random, also of PyTorch's generator while TARGET is made (default: 0)",
    )
    add(
        "--params",
        action="append",
        metavar="GLOB",
        help="only these parameters, by name; may be given several times",
    )
    add("--device", type=_device, help="where to compute, on a copy of the model (cpu, cuda, ...)")
    add(
        "--dtype",
        choices=("float32", "float64", "bfloat16", "float16"),
        help="type to compute in, on a copy of the model",
    )
    add("--out", type=Path, metavar="DIR", help="folder of the results (default: curvlib-out/NAME)")
    add("--resume", action="store_true", help="go on where an interrupted run in DIR stopped")
    add(
        "--save-every",
        type=_positive,
        default=30.0,
        metavar="SECONDS",
        help="how often progress is saved (default: 30)",
    )
    add("--no-check", dest="check", action="store_false", help="skip the checks of the risk")
    add("--debug", action="store_true", help="show the traceback of errors")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Runs ``curvlib spectrum``."""
    start = time.monotonic()
    folder = args.out or Path("curvlib-out") / _short_name(args.target)
    checkpoints, resumed = _prepare(folder, resume=args.resume)
    risk = _risk(args)
    print(f"{args.target or 'digits demo'}: {risk!r}")
    if args.check:
        for finding in risk.check(seed=args.seed).findings:
            print(f"check: {finding.kind}: {finding.message}\n  what to do: {finding.remedy}")
    op = _OPERATORS[args.curvature](risk, args.seed)
    k = min(10, op.shape[0]) if args.k is None else args.k
    command = shlex.join(["curvlib", *argv])
    try:
        pairs = eigenpairs(
            op,
            k,
            which=args.which,
            tolerance=args.tolerance,
            seed=args.seed,
            checkpoint=checkpoints / "eigenpairs.safetensors",
            save_every=args.save_every,
        )
        estimate = density(
            op,
            steps=args.steps,
            probes=args.probes,
            deflate=pairs if k < op.shape[0] else None,
            seed=args.seed,
            checkpoint=checkpoints / "density.safetensors",
            save_every=args.save_every,
        )
    except KeyboardInterrupt as stop:
        again = command if args.resume else f"{command} --resume"
        raise KeyboardInterrupt(f"by Ctrl-C; go on with: {again}") from stop
    spectrum = Spectrum(
        eigenpairs=pairs,
        density=estimate,
        name=op.name,
        target=args.target or "digits demo",
        parameters=op.shape[0],
        examples=sum(batch.examples for batch in risk.batches()),
        seconds=time.monotonic() - start,
        resumed=resumed,
    )
    print(table(spectrum))
    written = write(spectrum, folder, command)
    shutil.rmtree(checkpoints)
    print("\n".join(f"wrote {path}" for path in written))


def _prepare(folder: Path, *, resume: bool) -> tuple[Path, bool]:
    """Makes the folder; returns that of the checkpoints, and whether there are some.

    Raises:
        OSError: If the folder cannot be made or written to.
        ValueError: If an unfinished run is in it that should not be resumed.
    """
    checkpoints = folder / "checkpoints"
    unfinished = checkpoints.is_dir() and any(checkpoints.glob("*.safetensors"))
    if unfinished and not resume:
        raise ValueError(
            f"{folder} holds an unfinished run; pass --resume to go on with it, another --out, "
            f"or delete {checkpoints} to begin anew"
        )
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        probe = checkpoints / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"cannot write to --out {folder} ({error.strerror}); pass a folder that can be written"
        ) from error
    return checkpoints, unfinished


def _risk(args: argparse.Namespace) -> Risk:
    risk = digits().risk() if args.target is None else _seeded(args.target, args.seed)
    if args.params:
        risk = risk.restrict(args.params)
    if args.dtype or args.device:
        dtype = getattr(torch, args.dtype) if args.dtype else None
        risk = converted(risk, dtype=dtype, device=args.device)
    return risk


def _seeded(target: str, seed: int) -> Risk:
    """Loads a TARGET with torch's global generator seeded, and puts the generator back.

    A TARGET that draws its initial parameters there then gives the same risk each time, without
    which no run could be resumed or repeated.
    """
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        return load(target)


def _short_name(target: str | None) -> str:
    if target is None:
        return "digits"
    place, _, name = target.rpartition(":")
    return f"{Path(place).stem}-{name}" if place.endswith(".py") else f"{place}-{name}"


_OPERATORS: dict[str, Callable[[Risk, int], LinearOperator]] = {
    "hessian": lambda risk, seed: hessian(risk),
    "ggn": lambda risk, seed: ggn(risk),
    "fisher": lambda risk, seed: fisher(risk, "type2"),
    "fisher-type2": lambda risk, seed: fisher(risk, "type2"),
    "fisher-mc": lambda risk, seed: fisher(risk, "mc", seed=seed),
    "fisher-empirical": lambda risk, seed: fisher(risk, "empirical"),
}


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text}")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        message = " ".join(str(error).split())
        raise argparse.ArgumentTypeError(f"cannot use device {text!r}: {message}") from error
    return device


_count.__name__, _positive.__name__ = "whole number", "number"  # what argparse calls them
