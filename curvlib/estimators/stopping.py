r"""Budgets and stopping rules that the stochastic estimators share.

An estimate stops when its standard error is small enough, never because two successive
estimates agree. Standard errors are looked at only at certain numbers of probes
(:func:`next_look`), which depend on nothing else: so results do not depend on how many probes
advance together, and looking often does not spoil the intervals.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from curvlib.core.exhausted import names_what_fits
from curvlib.core.operator import LinearOperator
from curvlib.core.run import Progress, Report, run
from curvlib.estimators.arguments import require_counts
from curvlib.estimators.philox import draw_keys
from curvlib.estimators.probe_kernels import ProbeKernels
from curvlib.estimators.probes import LAWS, fill_probes, fill_signs, generator_of
from curvlib.estimators.rows import finite_everywhere, summed

S = TypeVar("S")

#: Products of an estimate that nobody gave a budget: without a tolerance, and with one.
DEFAULT_PRODUCTS = (100, 1000)
#: Probes before a standard error is trusted to stop an estimate.
LEAST_PROBES = 8
#: From this size on, sketches take Rademacher probes: see :func:`law_of_sketch`.
LARGE = 2**16
#: Methods that keep their probes are chosen unasked only while they keep no more than this.
KEPT_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Plan:
    """What does not change in a run: the operator, the budget and where to save.

    Attributes:
        op: The operator.
        law: Of the probes.
        limit: Most probes.
        block: Probes that advance together.
        tolerance: Relative standard error to stop at.
        seed: What the result says about the seed.
        random: Fresh generator on the operator's device.
        checkpoint: File to save to and to continue from.
        save_every: Seconds between saves.
        progress: Whether to show a bar.
        spare: Memory of probes that no state keeps: fresh memory costs more than a draw.
    """

    op: LinearOperator
    law: str
    limit: int
    block: int
    tolerance: float | None
    seed: int | str
    random: torch.Generator = field(repr=False)
    checkpoint: str | os.PathLike[str] | None
    save_every: float
    progress: Progress
    spare: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def settings(self) -> dict[str, Any]:
        """What the numbers depend on besides the operator; the budget may grow later."""
        return {
            "law": self.law,
            "seed": self.seed,
            "dtype": str(self.op.dtype).removeprefix("torch."),
            "device": self.op.device.type,
        }

    def following(self, count: int) -> int:
        """How many probes the next step takes, when ``count`` are done."""
        stop = self.limit if self.tolerance is None else min(self.limit, next_look(count))
        return min(self.block, stop - count)

    def draw(self, state: Tensor, size: int, *, keep: bool = True) -> tuple[Tensor, Tensor]:
        """The next probes as rows ``[size, n]``, and the generator's state after them.

        Args:
            state: The generator's state.
            size: How many.
            keep: Whether they outlive the next draw.
        """
        generator = torch.Generator(device=self.op.device)
        generator.set_state(state)
        if keep or not self.spare or self.spare[0].shape[0] < size:
            shape = (size, self.op.length)
            rows = torch.empty(shape, dtype=self.op.dtype, device=self.op.device)
            if not keep:
                self.spare[:] = [rows]
        else:
            rows = self.spare[0][:size]
        by_position = self.law == "rademacher" and rows.device.type != "cpu"
        if by_position and self.op.spread is None:
            # so that a kernel that reads their products can make them again
            fill_signs(rows, draw_keys(size, generator), ProbeKernels.of(rows))
        else:
            fill_probes(rows, self.law, generator, self.op.spread)
        return rows, generator.get_state()

    def done(self, count: int, relative_error: Callable[[], float]) -> bool:
        """Whether ``count`` probes are enough."""
        if count >= self.limit:
            return True
        return self.tolerance is not None and is_look(count) and relative_error() <= self.tolerance

    def run(
        self,
        init: Callable[[], S],
        step: Callable[[S], S],
        *,
        state_type: type[S],
        done: Callable[[S], bool],
        report: Callable[[S], Report],
        title: str,
        settings: dict[str, Any],
        problem: Callable[[], str] | None = None,
    ) -> S:
        """:func:`curvlib.core.run.run` with this plan's operator, file and bar."""
        name = f"{title} of {self.op.name}"
        sketch = self.limit if "x" in title or "++" in title else None
        with names_what_fits(name, {"sketch": sketch, "block": self.block}):
            return run(
                init,
                step,
                state_type=state_type,
                done=done,
                report=report,
                title=name,
                checkpoint=self.checkpoint,
                problem=problem or self.op.fingerprint,
                settings=settings,
                device=self.op.device,
                save_every=self.save_every,
                progress=self.progress,
                group=self.op.group,
                spread=self.op.spread,
            )


def plan(
    op: LinearOperator,
    *,
    law: str,
    limit: int,
    block: int,
    tolerance: float | None,
    generator: torch.Generator | None,
    seed: int | None,
    checkpoint: str | os.PathLike[str] | None,
    save_every: float,
    progress: Progress,
) -> Plan:
    """A plan from checked arguments.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If a value does not fit.
    """
    if law not in LAWS:
        raise ValueError(f"unknown law of probes {law!r}; there are {', '.join(LAWS)}")
    whole("block", block)
    return Plan(
        op=op,
        law=law,
        limit=limit,
        block=block,
        tolerance=tolerance,
        seed=(seed or 0) if generator is None else "generator",
        random=generator_of(generator, seed, op.device),
        checkpoint=checkpoint,
        save_every=save_every,
        progress=progress,
    )


def products_of(
    probes: int | None, max_products: int | None, tolerance: float | None, cost: int
) -> int:
    """How many products an estimate may use, from what the caller gave.

    Args:
        probes: Number of probes, or
        max_products: the budget; not both.
        tolerance: Relative standard error to stop at.
        cost: Products for each probe.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If a value is not positive, or both budgets are given.
    """
    if tolerance is not None:
        if isinstance(tolerance, bool) or not hasattr(tolerance, "__float__"):
            raise TypeError(f"expected a number for tolerance, got {type(tolerance).__name__}")
        if not 0.0 < tolerance < math.inf:
            raise ValueError(
                f"expected a positive tolerance (relative standard error), got {tolerance}"
            )
    if probes is not None and max_products is not None:
        raise ValueError("pass probes= or max_products=, not both")
    if probes is not None:
        return cost * whole("probes", probes)
    if max_products is not None:
        return whole("max_products", max_products)
    return DEFAULT_PRODUCTS[0 if tolerance is None else 1]


def law_of_sketch(n: int) -> str:
    r"""The law of probes of a sketch for an operator of size ``n``, where none was asked for.

    Of a part :math:`B` of the operator, Rademacher probes leave the variance
    :math:`2 (\|B\|_F^2 - \|\mathrm{diag}\, B\|^2)` and resphered ones, in the ``n - m``
    dimensions that a sketch of ``m`` leaves, about
    :math:`2 (\|B\|_F^2 - (\mathrm{tr}\, B)^2 / (n - m))`, which is less by at most the share
    ``m / n``: nothing where ``n`` is large, where normal numbers take ten times as long to draw
    as signs. Where ``n`` is small, resphering helps on flat spectra.
    """
    return "sphere" if n < LARGE else "rademacher"


def whole(name: str, value: int) -> int:
    """A positive integer argument.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is not positive.
    """
    require_counts(**{name: (value, 1)})
    return value


def one_of(what: str, name: str, known: tuple[str, ...]) -> str:
    """A name out of those that are known.

    Raises:
        ValueError: If it is not.
    """
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; there are {', '.join(known)}")
    return name


def next_look(count: int) -> int:
    """The next number of probes at which the standard error decides.

    Example:
        >>> looks = [next_look(0)]
        >>> while looks[-1] < 40:
        ...     looks.append(next_look(looks[-1]))
        >>> looks
        [8, 12, 16, 20, 25, 31, 38, 47]
    """
    look = LEAST_PROBES
    while look <= count:
        look += max(4, look // 4)
    return look


def is_look(count: int) -> bool:
    """Whether the standard error decides at ``count`` probes."""
    return count >= LEAST_PROBES and next_look(count - 1) == count


def multiply(op: LinearOperator, rows: Tensor, first: int, *, check: bool = True) -> Tensor:
    """Products with the vectors in ``rows`` ``[K, n]``, as rows ``[K, m]``, all finite.

    Args:
        op: The operator.
        rows: The vectors.
        first: How many products came before, for the message.
        check: Whether to look for NaN and infinity, or to leave that to :func:`require_finite`.

    Raises:
        FloatingPointError: If a product is not finite.
    """
    out = op.matmat(rows.mT).mT.contiguous()
    if check:
        require_finite(op, out, summed(out.sum(), op.spread), first)
    return out


def require_finite(op: LinearOperator, products: Tensor, sums: Tensor, first: int) -> None:
    """Checks products ``[K, m]`` of which some sums over all entries are known.

    Raises:
        FloatingPointError: If an entry is NaN or infinite.
    """
    if op.spread is not None and bool(sums.isfinite().all()):
        return  # ranks decide by what they have in common
    if not bool(sums.isfinite().all()) and not finite_everywhere(products, op.spread):
        if op.spread is not None:
            products = sums.view(-1, 1).expand(len(products), 1)
        bad = int((~products.isfinite().all(dim=1)).nonzero()[0, 0])
        raise FloatingPointError(
            f"product {first + bad + 1} with {op!r} has entries that are NaN or infinite, though "
            "its vector is finite; check the loss and its derivatives at these parameters "
            "(risk.check()). With checkpoint=, what came before is saved"
        )


def relative(value: float, stderr: float) -> float:
    """Standard error by absolute value; 0 where there is no error, infinite where unknown."""
    if stderr == 0.0:
        return 0.0
    return stderr / abs(value) if value and not math.isnan(stderr) else math.inf
