"""What the commands share: options, the risk and operator they name, folders, and resuming."""

from __future__ import annotations

import argparse
import contextlib
import math
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from curvlib.cli.target import converted, load, load_object
from curvlib.core.minibatch import example_count
from curvlib.core.operator import LinearOperator
from curvlib.core.ranks.group import group_of
from curvlib.core.ranks.shards import sharded
from curvlib.core.risk import Risk
from curvlib.demo import digits
from curvlib.operators.fisher import fisher
from curvlib.operators.ggn import ggn
from curvlib.operators.hessian import hessian

#: What a description of a command says of TARGET.
TARGET = """\
TARGET is file.py:name or package.module:name, name being a curvlib.Risk or a function that
returns one. Without TARGET, a small network is trained on scikit-learn's handwritten digits.
"""


@dataclass(frozen=True)
class Job:
    """What a command works on.

    Attributes:
        risk: What TARGET names.
        target: What the user pointed at, in words.
        command: The command line.
        folder: Where results go.
        checkpoints: Where unfinished estimates are kept.
        resumed: Whether there were some.
        start: When the command began, on the monotonic clock.
    """

    risk: Risk
    target: str
    command: str
    folder: Path
    checkpoints: Path
    resumed: bool
    start: float

    @property
    def seconds(self) -> float:
        """Wall time since the command began."""
        return time.monotonic() - self.start

    def finish(self, write: Callable[[], Sequence[Path]]) -> None:
        """Writes the results, removes checkpoints, whose place they take, and names the files.

        The first of several processes does it; the others wait.
        """
        group = self.risk.group
        with contextlib.nullcontext() if group is None else group.together("writing results"):
            if group is None or group.first:
                written = write()
                shutil.rmtree(self.checkpoints)
                print("\n".join(f"wrote {path}" for path in written))


@dataclass(frozen=True)
class CurvatureJob(Job):
    """What a command works on that measures an operator.

    Attributes:
        op: The operator.
    """

    op: LinearOperator

    def measured(self) -> dict[str, Any]:
        """What every report says of an estimate, besides its numbers."""
        return {
            "name": self.op.name,
            "target": self.target,
            "parameters": self.op.shape[0],
            "examples": example_count(self.risk),
            "seconds": self.seconds,
            "resumed": self.resumed,
        }


def new_parser(
    commands: Any,
    name: str,
    *,
    help: str,  # noqa: A002 (argparse's word)
    description: str,
    curvature: bool = True,
) -> argparse.ArgumentParser:
    """A command's parser, with the arguments that say what the curvature is of."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=f"{description}\n{TARGET}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("target", nargs="?", metavar="TARGET", help="file.py:name or package.module:name")
    if curvature:
        add("--curvature", choices=sorted(OPERATORS), default="hessian", help="default: hessian")
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that say of what, and how, a risk is made."""
    add = parser.add_argument
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
    add("--debug", action="store_true", help="show the traceback of errors")


def add_common(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that every command has that computes, after its own."""
    add_model(parser)
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", help="folder of the results (default: curvlib-out/NAME)")
    add("--resume", action="store_true", help="go on where an interrupted run in DIR stopped")
    add(
        "--save-every",
        type=positive,
        default=30.0,
        metavar="SECONDS",
        help="how often progress is saved (default: 30)",
    )
    add("--no-check", dest="check", action="store_false", help="skip the checks of the risk")


def add_budget(parser: argparse.ArgumentParser, scale: str) -> None:
    """Adds the arguments that say how much may be multiplied.

    Args:
        parser: The command's parser.
        scale: What a tolerance is relative to.
    """
    add = parser.add_argument
    add(
        "--products",
        type=count,
        help="products with one vector, at most (default: 100; 1000 with a tolerance)",
    )
    add(
        "--tolerance",
        type=positive,
        help=f"standard error at which to stop, relative to {scale}",
    )


def job(args: argparse.Namespace, argv: Sequence[str], default: str) -> CurvatureJob:
    """Makes the folder, loads the risk, checks it, and makes the operator.

    Args:
        args: The parsed arguments.
        argv: The arguments as they came.
        default: Folder of the results within ``curvlib-out`` where none is given; ``{}`` is the
            target's name.
    """
    plain = risk_job(args, argv, default)
    return CurvatureJob(**vars(plain), op=OPERATORS[args.curvature](plain.risk, args.seed))


def risk_job(args: argparse.Namespace, argv: Sequence[str], default: str) -> Job:
    """Makes the folder, loads the risk and checks it: see :func:`job`."""
    start = time.monotonic()
    folder = args.out or Path("curvlib-out") / default.format(_short_name(args.target))
    checkpoints, resumed = _prepared(folder, resume=args.resume)
    risk = sharded(target_risk(args))
    print(f"{args.target or 'digits demo'}: {risk!r}")
    if args.check:
        for finding in risk.check(seed=args.seed).findings:
            print(f"check: {finding.kind}: {finding.message}\n  what to do: {finding.remedy}")
    return Job(
        risk=risk,
        target=args.target or "digits demo",
        command=shlex.join(["curvlib", *argv]),
        folder=folder,
        checkpoints=checkpoints,
        resumed=resumed,
        start=start,
    )


@contextlib.contextmanager
def says_how_to_resume(job: Job) -> Iterator[None]:
    """Turns Ctrl-C into the command that goes on."""
    try:
        yield
    except KeyboardInterrupt as stop:
        resumes = "--resume" in shlex.split(job.command)
        again = job.command if resumes else f"{job.command} --resume"
        raise KeyboardInterrupt(f"by Ctrl-C; go on with: {again}") from stop


def _prepared(folder: Path, *, resume: bool) -> tuple[Path, bool]:
    """What :func:`_prepare` returns on the first of several processes, which does it for all."""
    group = group_of()
    if group is None:
        return _prepare(folder, resume=resume)
    found = (folder / "checkpoints", False)
    with group.together("making the folder of the results"):
        if group.first:
            found = _prepare(folder, resume=resume)
    return found[0], bool(group.most([float(found[1])])[0])


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


def target_risk(args: argparse.Namespace) -> Risk:
    """The risk that TARGET names, or the demo's, of the chosen parameters, type and device."""
    risk = digits().risk() if args.target is None else _seeded(args.target, args.seed)
    if args.params:
        risk = risk.restrict(args.params)
    return _converted(risk, args)


def held_out_risk(args: argparse.Namespace) -> Risk | None:
    """The risk of ``--test``, that of the demo's held-out images, or none."""
    if args.test is not None:
        return sharded(_converted(_seeded(args.test, args.seed), args))
    return sharded(_converted(digits().test_risk(), args)) if args.target is None else None


def _converted(risk: Risk, args: argparse.Namespace) -> Risk:
    if not (args.dtype or args.device):
        return risk
    dtype = getattr(torch, args.dtype) if args.dtype else None
    return converted(risk, dtype=dtype, device=args.device)


def _seeded(target: str, seed: int) -> Risk:
    """Loads a TARGET with torch's global generator seeded, and puts the generator back.

    A TARGET that draws its initial parameters there then gives the same risk each time, without
    which no run could be resumed or repeated.
    """
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        return load(target)


def seeded_object(target: str, seed: int, *, option: str, form: str) -> Any:
    """Loads what an option names, with the generator as for TARGET."""
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        return load_object(target, option=option, form=form)


def _short_name(target: str | None) -> str:
    if target is None:
        return "digits"
    place, _, name = target.rpartition(":")
    return f"{Path(place).stem}-{name}" if place.endswith(".py") else f"{place}-{name}"


#: Operators by the name of ``--curvature``, from a risk and a seed.
OPERATORS: dict[str, Callable[[Risk, int], LinearOperator]] = {
    "hessian": lambda risk, seed: hessian(risk),
    "ggn": lambda risk, seed: ggn(risk),
    "fisher": lambda risk, seed: fisher(risk, "type2"),
    "fisher-type2": lambda risk, seed: fisher(risk, "type2"),
    "fisher-mc": lambda risk, seed: fisher(risk, "mc", seed=seed),
    "fisher-empirical": lambda risk, seed: fisher(risk, "empirical"),
}


def count(text: str) -> int:
    """A positive whole number."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text}")
    return value


def positive(text: str) -> float:
    """A positive, finite number."""
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


count.__name__, positive.__name__ = "whole number", "number"  # what argparse calls them
