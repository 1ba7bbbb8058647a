"""The diagonal of a symmetric operator, with standard errors of entries and of block means."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlib.core.algebra import Index
from curvlib.core.operator import LinearOperator
from curvlib.core.ranks.spread import Spread
from curvlib.core.result import Result
from curvlib.core.run import Progress
from curvlib.estimators import (
    leave_one_out,
    leave_one_out_diagonal,
    leave_one_out_psd,
    sampling,
)
from curvlib.estimators.blocks import BlockMeans, Blocks, Moments, block_table, blocks_of
from curvlib.estimators.diagonal_means import averaged
from curvlib.estimators.differentiable import diagonal_with_graph
from curvlib.estimators.eigenpairs import require_symmetric
from curvlib.estimators.exact import exact
from curvlib.estimators.intervals import t_quantile
from curvlib.estimators.rows import norms
from curvlib.estimators.stopping import (
    KEPT_BYTES,
    Plan,
    one_of,
    plan,
    products_of,
    relative,
)

#: Methods, and the products that a probe costs in each.
METHODS = {"hutchinson": 1, "xdiag": 2, "xnysdiag": 1}
#: Below this size an operator is multiplied out even when a tolerance might stop earlier.
SMALL = 64


@dataclass(frozen=True, eq=False, repr=False)
class DiagonalEstimate(Result):
    """A diagonal. Entries are signed.

    Attributes:
        value: The estimate, ``[P]``.
        stderr: Standard error of each entry, ``[P]``: zeros if exact, NaN with one probe.
        blocks: Means over blocks, by kind: see :meth:`block_means`.
        degrees: Degrees of freedom of the standard errors; 0 if exact.
        products: How many columns the operator multiplied.
        method: ``"exact"``, ``"hutchinson"``, ``"xdiag"`` or ``"xnysdiag"``.
        converged: Whether the tolerance was met; true if none was asked for.
        name: What was measured.
        settings: The settings, by name.
    """

    value: Tensor
    stderr: Tensor
    blocks: dict[str, Any]
    degrees: float
    products: int
    method: str
    converged: bool
    name: str
    settings: dict[str, Any]

    @property
    def interval(self) -> tuple[Tensor, Tensor]:
        """95 % intervals of each entry, by Student's law: lower and upper ends, each ``[P]``."""
        half = self.stderr if self.method == "exact" else t_quantile(self.degrees) * self.stderr
        return self.value - half, self.value + half

    def block_means(self, kind: str = "layers") -> BlockMeans:
        """Means over blocks, with the standard error of each mean.

        That error comes from the block's mean in every probe. It does not follow from the errors
        of the entries, which are correlated.

        Args:
            kind: ``"layers"`` (modules), ``"channels"`` (first index of each parameter),
                ``"kernels"`` (first two indices of parameters with three or more axes), or
                ``"blocks"``, those that were passed as ``blocks=``.

        Raises:
            ValueError: If there are none of that kind.
        """
        if kind not in self.blocks:
            raise ValueError(
                f"this diagonal has no {kind!r}; there are {list(self.blocks)}. Pass "
                "blocks={'name': indices} to diagonal(), or an operator indexed by parameters"
            )
        table = self.blocks[kind]
        return BlockMeans(
            value=table["value"],
            stderr=table["stderr"],
            sizes=table["sizes"],
            counts=dict(zip(table["names"], table["counts"], strict=True)),
            degrees=table["degrees"],
            kind=kind,
            name=self.name,
        )


def diagonal(
    op: LinearOperator | Tensor,
    *,
    method: str | None = None,
    law: str = "rademacher",
    blocks: Mapping[str, Index] | None = None,
    probes: int | None = None,
    max_products: int | None = None,
    tolerance: float | None = None,
    block: int = 8,
    differentiable: bool = False,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: float = 30.0,
    progress: Progress = None,
) -> DiagonalEstimate:
    r"""The diagonal, by random probes.

    ``"hutchinson"`` averages :math:`w \odot A w`, divided entry by entry by the average of
    :math:`w \odot w`; it keeps two vectors (three unless the law is Rademacher) and is exact on
    diagonal operators. ``"xdiag"`` (two products for each probe) and ``"xnysdiag"`` (one; PSD
    operators only) know the part of the operator that their probes have sketched and average
    only what is left, so that they win where the spectrum decays; they keep three and two blocks
    ``[P, probes]``. All are unbiased. For one seed, ``"xdiag"`` sums to the trace of ``"xtrace"``
    with Rademacher probes, and ``"xnysdiag"`` to that of ``"xnystrace"``.

    Standard errors are per entry, and per block mean (layers, channels, kernels and your own):
    see :meth:`DiagonalEstimate.block_means`. Those of ``"xdiag"`` and ``"xnysdiag"`` include the
    covariance that probes have by sharing a sketch, as it is between each probe and the next.

    Args:
        op: A symmetric operator, or a dense symmetric matrix.
        method: When omitted: exact where the budget allows it, else ``"xnysdiag"`` for operators
            known to be PSD and ``"xdiag"`` for others, unless their memory would exceed 4 GiB or
            the budget is below 8 products; then ``"hutchinson"``, and always with another law.
        law: Of Hutchinson's probes: ``"rademacher"``, ``"gaussian"`` or ``"sphere"``. The others
            take Rademacher probes only.
        blocks: Blocks of entries whose means are wanted too, by name: indices, masks, slices,
            or name globs of parameters.
        probes: How many, or
        max_products: the budget in products. By default 100 products, or 1,000 with a tolerance.
        tolerance: Stops once the norm of the standard errors is at most this share of the
            diagonal's norm, after 8 probes or more.
        block: Probes that advance together: a matter of speed and memory, not of the result.
        differentiable: Whether ``value`` carries a graph to what the operator was built from, so
            that a penalty on it can be trained through (Hutchinson, a fixed number of probes,
            10 by default, held at once; operators such as :func:`curvlib.hessian`'s).
        generator: Where the probes come from, or
        seed: their seed. With neither, the seed is 0.
        checkpoint: A file to save to, and to continue from where it exists.
        save_every: Seconds between saves.
        progress: Whether to show a bar: see :data:`curvlib.core.run.Progress`.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If the operator is not symmetric, is not PSD under ``"xnysdiag"``, or an
            argument does not fit.
        FloatingPointError: If a product is not finite.

    Example:
        >>> A = torch.diag(torch.tensor([3.0, -1.0, 2.0]))
        >>> diagonal(A, method="hutchinson", probes=2).value.tolist()
        [3.0, -1.0, 2.0]

    Source:
        C. Bekas, E. Kokiopoulou and Y. Saad, *An estimator for the diagonal of a matrix*, Appl.
        Numer. Math. 57 (2007); E. N. Epperly, J. A. Tropp and R. J. Webber, *XTrace*,
        arXiv:2301.07825, supplement.
    """
    op = require_symmetric(op, spread=True)
    if differentiable:
        return _with_graph(
            op, method, tolerance, law, probes or max_products or 10, generator, seed, blocks
        )
    if method is not None:
        one_of("method", method, tuple(METHODS))
    if method == "xnysdiag" and not op.psd:
        raise ValueError(
            f"method 'xnysdiag' needs a positive semi-definite operator, got {op!r}; use "
            "'xdiag', or build the operator with psd=True if it is"
        )
    if method in ("xdiag", "xnysdiag") and law != "rademacher":
        raise ValueError(
            f"method {method!r} takes Rademacher probes, got law={law!r}; others only add the "
            "error of the squared probes. method='hutchinson' takes any law"
        )
    if method is None and law != "rademacher":
        method = "hutchinson"
    cost = METHODS[method or ("xnysdiag" if op.psd else "xdiag")]
    budget = products_of(probes, max_products, tolerance, cost)
    chosen = choose(op, method, budget, tolerance)
    limit = budget if chosen in ("hutchinson", "exact") else min(budget, op.shape[0] - 1)
    setup = plan(
        op,
        law=law,
        limit=max(limit // METHODS.get(chosen, 1), 1),
        block=block,
        tolerance=tolerance,
        generator=generator,
        seed=seed,
        checkpoint=checkpoint,
        save_every=save_every,
        progress=progress,
    )
    groups = blocks_of(op, blocks)
    if chosen == "exact":
        value = exact(setup).diagonal
        sums = groups.sums(value)
        sizes = groups.sums(torch.ones_like(value))
        none = torch.zeros_like(sums)
        table = block_table(groups, sums / sizes, none, sizes, 0.0)
        return _result(setup, chosen, value, torch.zeros_like(value), table, 0, op.shape[0])
    return _ESTIMATES[chosen](setup, groups)


def _with_graph(
    op: LinearOperator,
    method: str | None,
    tolerance: float | None,
    law: str,
    count: int,
    generator: torch.Generator | None,
    seed: int | None,
    blocks: Mapping[str, Index] | None,
) -> DiagonalEstimate:
    if method not in (None, "hutchinson") or tolerance is not None or blocks is not None:
        raise ValueError(
            "differentiable=True is for method='hutchinson' with a fixed number of probes; leave "
            "out tolerance= and blocks= (take means of .value yourself)"
        )
    value, stderr = diagonal_with_graph(op, law=law, count=count, generator=generator, seed=seed)
    return DiagonalEstimate(
        value=value,
        stderr=stderr,
        blocks={},
        degrees=count - 1.0,
        products=count,
        method="hutchinson",
        converged=True,
        name=op.name,
        settings={"law": law, "probes": count, "differentiable": True, "seed": seed},
    )


def choose(
    op: LinearOperator,
    method: str | None,
    budget: int,
    tolerance: float | None,
    holders: int | None = None,
) -> str:
    """The method for an operator and a budget of products: see :func:`diagonal`.

    Args:
        op: The operator.
        method: The one that is asked for.
        budget: Products.
        tolerance: See :func:`diagonal`.
        holders: Over how many processes vectors are spread; as those of ``op`` when omitted.
    """
    n = op.shape[0]
    if method == "hutchinson" or (method == "xdiag" and budget == 1):
        return "hutchinson"  # which XDiag with one probe is
    if budget >= n and (tolerance is None or n <= SMALL):
        return "exact"
    if method is not None:
        return method
    pick, copies = ("xnysdiag", 2) if op.psd else ("xdiag", 3)
    kept = (
        copies
        * (min(budget, n) // METHODS[pick])
        * n
        * (torch.finfo(op.dtype).bits // 8)
        / (holders or op.holders)
    )
    return pick if kept <= KEPT_BYTES and budget >= 8 else "hutchinson"


def norm_error(value: Tensor, stderr: Tensor, spread: Spread | None = None) -> float:
    """Norm of the standard errors by norm of the diagonal."""
    return relative(*norms(torch.stack([value, stderr]), spread).tolist())


def _hutchinson(setup: Plan, groups: Blocks) -> DiagonalEstimate:
    def statistics(state: sampling.SamplingState) -> tuple[Tensor, Tensor]:
        assert state.diagonal is not None
        assert state.residual is not None
        stderr = sampling.diagonal_stderr(state.residual, state.weight, state.count)
        return state.diagonal, stderr

    used = groups if groups.groups else None
    last = setup.run(
        lambda: sampling.first_state(setup, diagonal=True, blocks=used),
        lambda state: sampling.next_state(setup, state, used),
        state_type=sampling.SamplingState,
        done=lambda state: setup.done(
            state.count, lambda: norm_error(*statistics(state), setup.op.spread)
        ),
        report=lambda state: (state.count, setup.limit, ""),
        title="diagonal (hutchinson)",
        settings=setup.settings,
        problem=lambda: _problem(setup, groups),
    )
    value, stderr = statistics(last)
    moments = Moments(last.count, last.means, last.spreads)
    sizes = sampling.block_sizes(groups, value)
    table = block_table(groups, *moments.ratio(), sizes, last.count - 1.0)
    return _result(setup, "hutchinson", value, stderr, table, last.count - 1, last.count)


def _xdiag(setup: Plan, groups: Blocks) -> DiagonalEstimate:
    def average(
        state: leave_one_out.SketchState, blocks: Blocks | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        samples = leave_one_out_diagonal.DiagonalSamples.of(state)
        return averaged(setup.op, samples, blocks)

    last = setup.run(
        lambda: leave_one_out.first_state(setup),
        lambda state: leave_one_out.next_state(setup, state, keep_images=True),
        state_type=leave_one_out.SketchState,
        done=lambda state: setup.done(
            state.count, lambda: norm_error(*average(state)[:2], setup.op.spread)
        ),
        report=lambda state: (state.products, 2 * setup.limit, ""),
        title="diagonal (xdiag)",
        settings=setup.settings,
    )
    value, stderr, table = average(last, groups)
    return _result(setup, "xdiag", value, stderr, table, last.count - 1, last.products)


def _xnysdiag(setup: Plan, groups: Blocks) -> DiagonalEstimate:
    def average(
        state: leave_one_out_psd.NystromState, blocks: Blocks | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        samples = leave_one_out_psd.DiagonalSamples.of(setup, state)
        return averaged(setup.op, samples, blocks)

    last = setup.run(
        lambda: leave_one_out_psd.first_state(setup),
        lambda state: leave_one_out_psd.next_state(setup, state),
        state_type=leave_one_out_psd.NystromState,
        done=lambda state: setup.done(
            state.count, lambda: norm_error(*average(state)[:2], setup.op.spread)
        ),
        report=lambda state: (state.count, setup.limit, ""),
        title="diagonal (xnysdiag)",
        settings=setup.settings,
    )
    value, stderr, table = average(last, groups)
    return _result(setup, "xnysdiag", value, stderr, table, last.count - 1, last.count)


_ESTIMATES = {"hutchinson": _hutchinson, "xdiag": _xdiag, "xnysdiag": _xnysdiag}


def _problem(setup: Plan, groups: Blocks) -> str:
    """The operator and the blocks whose moments a state holds."""
    from curvlib.core.digest import digest

    return setup.op.fingerprint() + "".join(
        f"|{name}:{digest([index])}" for name, index in groups.chosen.items()
    )


def _result(
    setup: Plan,
    method: str,
    value: Tensor,
    stderr: Tensor,
    table: dict[str, Any],
    degrees: float,
    products: int,
) -> DiagonalEstimate:
    met = setup.tolerance is None or norm_error(value, stderr, setup.op.spread) <= setup.tolerance
    return DiagonalEstimate(
        value=value,
        stderr=stderr,
        blocks=table,
        degrees=float(degrees),
        products=products,
        method=method,
        converged=met,
        name=setup.op.name,
        settings={**setup.settings, "tolerance": setup.tolerance},
    )
