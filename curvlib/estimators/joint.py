"""Many answers from the same products: trace, traces of layers, diagonal, Frobenius norm."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlib.core.operator import LinearOperator
from curvlib.core.result import Result
from curvlib.core.run import Progress
from curvlib.estimators import sampling
from curvlib.estimators.blocks import BlockMeans, Moments, block_table, blocks_of
from curvlib.estimators.diagonal import DiagonalEstimate, norm_error
from curvlib.estimators.eigenpairs import require_symmetric
from curvlib.estimators.frobenius import root_error
from curvlib.estimators.intervals import mean_and_stderr, mean_interval
from curvlib.estimators.stopping import one_of, plan, products_of, relative

#: What can be estimated.
KINDS = ("trace", "diagonal", "frobenius", "layers")


@dataclass(frozen=True, eq=False, repr=False)
class Estimate(Result):
    """What one pass of products says. What was not asked for is ``None`` or empty.

    Attributes:
        trace: The trace.
        trace_stderr: Its standard error; all are NaN with one probe.
        frobenius: The Frobenius norm.
        frobenius_stderr: Its standard error.
        squared_frobenius: Its square, which is unbiased.
        squared_frobenius_stderr: Its standard error.
        layers: Trace of each layer's block, by name; they sum to the trace.
        layers_stderr: Their standard errors.
        diagonal: The diagonal, ``[P]``.
        diagonal_stderr: Standard errors of its entries, ``[P]``.
        blocks: Block means of the diagonal, by kind: see :meth:`block_means`.
        traces: What each probe says of the trace, ``[m]``, float64.
        squares: What each probe says of the squared norm, ``[m]``.
        layer_traces: What each probe says of the layers' traces, ``[m, L]``.
        products: How many columns the operator multiplied.
        method: ``"hutchinson"``.
        converged: Whether the tolerance was met; true if none was asked for.
        name: What was measured.
        settings: The settings, by name.
    """

    trace: float | None
    trace_stderr: float | None
    frobenius: float | None
    frobenius_stderr: float | None
    squared_frobenius: float | None
    squared_frobenius_stderr: float | None
    layers: dict[str, float]
    layers_stderr: dict[str, float]
    diagonal: Tensor | None
    diagonal_stderr: Tensor | None
    blocks: dict[str, Any]
    traces: Tensor
    squares: Tensor
    layer_traces: Tensor
    products: int
    method: str
    converged: bool
    name: str
    settings: dict[str, Any]

    @property
    def value(self) -> dict[str, Any]:
        """The answers, by name."""
        answers = {
            "trace": self.trace,
            "diagonal": self.diagonal,
            "frobenius": self.frobenius,
            "layers": self.layers or None,
        }
        return {kind: answer for kind, answer in answers.items() if answer is not None}

    @property
    def stderr(self) -> dict[str, Any]:
        """Their standard errors, by name."""
        errors = {
            "trace": self.trace_stderr,
            "diagonal": self.diagonal_stderr,
            "frobenius": self.frobenius_stderr,
            "layers": self.layers_stderr,
        }
        return {kind: errors[kind] for kind in self.value}

    @property
    def interval(self) -> dict[str, Any]:
        """Their 95 % intervals, by name: lower and upper ends."""
        out: dict[str, Any] = {}
        if self.trace is not None:
            out["trace"] = mean_interval(self.traces)
        if self.diagonal is not None:
            out["diagonal"] = self._as_diagonal().interval
        if self.frobenius is not None:
            low, high = (max(end, 0.0) ** 0.5 for end in mean_interval(self.squares))
            out["frobenius"] = (low, high)
        if self.layers:
            columns = zip(self.layers, self.layer_traces.mT, strict=True)
            out["layers"] = {name: mean_interval(column) for name, column in columns}
        return out

    def block_means(self, kind: str = "layers") -> BlockMeans:
        """Means of the diagonal over blocks: see :meth:`DiagonalEstimate.block_means`.

        Raises:
            ValueError: If the diagonal was not asked for, or has no blocks of that kind.
        """
        return self._as_diagonal().block_means(kind)

    def _as_diagonal(self) -> DiagonalEstimate:
        if self.diagonal is None or self.diagonal_stderr is None:
            raise ValueError(
                "this estimate has no diagonal; pass of=['diagonal', ...] to estimate()"
            )
        return DiagonalEstimate(
            value=self.diagonal,
            stderr=self.diagonal_stderr,
            blocks=self.blocks,
            degrees=float(self.products - 1),
            products=self.products,
            method=self.method,
            converged=self.converged,
            name=self.name,
            settings=self.settings,
        )


def estimate(
    op: LinearOperator | Tensor,
    of: Sequence[str] = ("trace", "diagonal", "frobenius"),
    *,
    law: str = "rademacher",
    probes: int | None = None,
    max_products: int | None = None,
    tolerance: float | None = None,
    block: int = 8,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: float = 30.0,
    progress: Progress = None,
) -> Estimate:
    r"""Trace, traces of layers, diagonal and Frobenius norm, from the same products.

    Each probe w and its product A w sample all of them: see
    :mod:`curvlib.estimators.sampling`. The trace of a layer's block is the layer's part of
    :math:`w^\top A w`, so that the layers sum to the trace. With Rademacher probes the
    diagonal sums to it as well.

    Args:
        op: A symmetric operator, or a dense symmetric matrix.
        of: Some of ``"trace"``, ``"diagonal"``, ``"frobenius"`` and ``"layers"``.
        law: Of the probes: ``"rademacher"``, ``"gaussian"`` or ``"sphere"``.
        probes: How many, which is the number of products; or
        max_products: the same. By default 100, or 1,000 with a tolerance.
        tolerance: Stops once everything in ``of`` (layers excepted) has a relative standard
            error of at most this, after 8 probes or more; the diagonal's is that of norms.
        block: Probes that advance together: a matter of speed and memory, not of the result.
        generator: Where the probes come from, or
        seed: their seed. With neither, the seed is 0.
        checkpoint: A file to save to, and to continue from where it exists.
        save_every: Seconds between saves.
        progress: Whether to show a bar: see :data:`curvlib.core.run.Progress`.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If the operator is not symmetric, ``of`` is empty or names something else,
            or layers are asked of an operator that is not indexed by parameters.
        FloatingPointError: If a product is not finite.

    Example:
        >>> A = torch.diag(torch.tensor([3.0, -1.0, 2.0]))
        >>> answers = estimate(A, ["trace", "diagonal"], probes=2)
        >>> answers.trace, answers.diagonal.tolist()
        (4.0, [3.0, -1.0, 2.0])
    """
    op = require_symmetric(op, spread=True)
    wanted = [of] if isinstance(of, str) else list(of)
    if not wanted:
        raise ValueError(f"of= is empty; there are {', '.join(KINDS)}")
    for kind in wanted:
        one_of("quantity", kind, KINDS)
    if "layers" in wanted and op.space is None:
        raise ValueError(f"{op!r} is not indexed by parameters, so it has no layers")
    setup = plan(
        op,
        law=law,
        limit=products_of(probes, max_products, tolerance, 1),
        block=block,
        tolerance=tolerance,
        generator=generator,
        seed=seed,
        checkpoint=checkpoint,
        save_every=save_every,
        progress=progress,
    )
    groups = blocks_of(op, None) if op.space is not None else None
    used = groups if "layers" in wanted or "diagonal" in wanted else None

    def errors(state: sampling.SamplingState) -> list[float]:
        out = []
        if "trace" in wanted:
            out.append(relative(*map(float, mean_and_stderr(state.traces))))
        if state.squares is not None:
            out.append(0.5 * relative(*map(float, mean_and_stderr(state.squares))))
        if state.diagonal is not None and state.residual is not None:
            stderr = sampling.diagonal_stderr(state.residual, state.weight, state.count)
            out.append(norm_error(state.diagonal, stderr, op.spread))
        return out

    last = setup.run(
        lambda: sampling.first_state(
            setup,
            diagonal="diagonal" in wanted,
            blocks=used,
            layers="layers" in wanted,
            squares="frobenius" in wanted,
        ),
        lambda state: sampling.next_state(setup, state, used),
        state_type=sampling.SamplingState,
        done=lambda state: setup.done(state.count, lambda: max(errors(state), default=torch.inf)),
        report=lambda state: (state.count, setup.limit, ""),
        title="estimate",
        settings={**setup.settings, "of": sorted(set(wanted))},
    )
    met = tolerance is None or max(errors(last), default=torch.inf) <= tolerance
    settings = {**setup.settings, "of": wanted, "tolerance": tolerance}
    return _finish(op, last, wanted, met, settings)


def _finish(
    op: LinearOperator,
    last: sampling.SamplingState,
    wanted: list[str],
    met: bool,
    settings: dict[str, Any],
) -> Estimate:
    groups = blocks_of(op, None)
    trace, trace_stderr = (float(x) for x in mean_and_stderr(last.traces))
    none = torch.zeros(0, dtype=torch.float64)
    squared = squared_stderr = root = root_stderr = None
    if last.squares is not None:
        squared, squared_stderr = (float(x) for x in mean_and_stderr(last.squares))
        root, root_stderr = root_error(squared, squared_stderr)
    layers: dict[str, float] = {}
    layers_stderr: dict[str, float] = {}
    if "layers" in wanted:
        means, errors = mean_and_stderr(last.layers)
        layers = dict(zip(groups.groups["layers"], means.tolist(), strict=True))
        layers_stderr = dict(zip(layers, errors.tolist(), strict=True))
        trace = sum(layers.values())
    table: dict[str, Any] = {}
    stderr = None
    if last.diagonal is not None and last.residual is not None:
        stderr = sampling.diagonal_stderr(last.residual, last.weight, last.count)
        moments = Moments(last.count, last.means, last.spreads)
        sizes = sampling.block_sizes(groups, last.diagonal)
        table = block_table(groups, *moments.ratio(), sizes, last.count - 1.0)
    has_trace = "trace" in wanted
    return Estimate(
        trace=trace if has_trace else None,
        trace_stderr=trace_stderr if has_trace else None,
        frobenius=root,
        frobenius_stderr=root_stderr,
        squared_frobenius=squared,
        squared_frobenius_stderr=squared_stderr,
        layers=layers,
        layers_stderr=layers_stderr,
        diagonal=last.diagonal,
        diagonal_stderr=stderr,
        blocks=table,
        traces=last.traces if has_trace else none,
        squares=none if last.squares is None else last.squares,
        layer_traces=last.layers,
        products=last.count,
        method="hutchinson",
        converged=met,
        name=op.name,
        settings=settings,
    )
