r"""Low-rank approximations of symmetric operators, with an error estimated from fresh probes."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from curvlib.core.operator import LinearOperator
from curvlib.core.result import Result
from curvlib.core.run import Progress, Report, run
from curvlib.core.structured import LowRankPlusShift
from curvlib.estimators import sketch
from curvlib.estimators.arguments import require_counts
from curvlib.estimators.eigenpairs import require_symmetric
from curvlib.estimators.probes import fill_probes, generator_of

#: Single-pass approximation of positive semi-definite operators, and Rayleigh-Ritz for any.
METHODS = ("nystrom", "eigh")


@dataclass(frozen=True, eq=False, repr=False)
class LowRank(Result):
    r""":math:`\hat A = U \,\mathrm{diag}(\lambda)\, U^\top`, and how far it is from :math:`A`.

    The error comes from probes :math:`w` that the approximation has not seen:
    :math:`\|A - \hat A\|_F^2 = E \|(A - \hat A) w\|^2`, so its square is unbiased.

    Attributes:
        values: :math:`\lambda`, ``[k]``, float64, the largest absolute values first.
        vectors: :math:`U`, ``[P, k]``, orthonormal, column-contiguous.
        squared_error: Estimate of :math:`\|A - \hat A\|_F^2`; NaN without probes.
        squared_error_stderr: Its standard error.
        squared_norm: Estimate of :math:`\|A\|_F^2` from the same probes.
        products: Columns multiplied, those for the error included.
        method: ``"nystrom"`` or ``"eigh"``.
        name: What was approximated.
        settings: The settings, by name.
    """

    values: Tensor
    vectors: Tensor
    squared_error: float
    squared_error_stderr: float
    squared_norm: float
    products: int
    method: str
    name: str
    settings: dict[str, Any]

    @property
    def operator(self) -> LowRankPlusShift:
        r""":math:`\hat A` as an operator with ``solve``, ``logdet`` and the like."""
        name = f"{self.name}, rank {self.values.numel()}"
        return LowRankPlusShift.from_eigenvalues(self.vectors, self.values, name=name)

    @property
    def error(self) -> float:
        r"""Estimate of :math:`\|A - \hat A\|_F`."""
        return math.sqrt(self.squared_error)

    @property
    def error_stderr(self) -> float:
        """Standard error of :attr:`error`, to first order."""
        if self.squared_error == 0.0:
            return 0.0
        return self.squared_error_stderr / (2.0 * self.error)

    @property
    def relative_error(self) -> float:
        r"""Estimate of :math:`\|A - \hat A\|_F / \|A\|_F`, 0 for the zero operator."""
        if self.squared_norm == 0.0:
            return 0.0
        return math.sqrt(self.squared_error / self.squared_norm)


@dataclass(frozen=True)
class SketchState:
    """Where the passes over the block stand.

    Attributes:
        block: The vectors that are multiplied, rows ``[l, P]``.
        product: Their products, of which the first ``column`` are there.
        column: Columns of this pass that are done.
        passes: Whole passes that are done.
        squares: Norms of ``(A - Ahat) w`` and of ``A w`` for the probes, ``[2, probes]``, squared.
        tested: Probes that are done.
        random: State of the generator of the probes.
        products: Columns multiplied.
    """

    block: Tensor
    product: Tensor
    column: int
    passes: int
    values: Tensor
    squares: Tensor
    tested: int
    random: Tensor
    products: int


def low_rank(
    op: LinearOperator | Tensor,
    rank: int,
    *,
    method: str | None = None,
    power: int = 1,
    oversampling: int = 10,
    probes: int = 10,
    block: int = 32,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: float = 30.0,
    progress: Progress = None,
) -> LowRank:
    r"""The dominant part of a symmetric operator from ``(rank + oversampling)`` random vectors.

    Takes ``(rank + oversampling) * (power + 1)`` products by Nyström's method, one pass more by
    ``"eigh"``, and ``probes`` for the error. For the eigenpairs themselves to high accuracy use
    :func:`curvlib.eigenpairs`; this is for approximations, where every product is a block.

    Args:
        op: A symmetric operator, or a dense symmetric matrix.
        rank: Eigenpairs kept, 1 to P.
        method: ``"nystrom"`` for positive semi-definite operators (the better approximation, for
            a pass less), ``"eigh"`` for any: a random subspace and the eigenvalues of the
            operator in it. When omitted, by whether ``op.psd``.
        power: Times that the random vectors are multiplied first: subspace iteration.
        oversampling: Vectors more than ``rank``.
        probes: Fresh Rademacher probes for the error; with 0 the error is NaN, and at least 2 are
            needed for its standard error.
        block: Columns multiplied at a time.
        generator: Where random vectors come from, or
        seed: their seed. With neither, the seed is 0.
        checkpoint: A file to save to, and to continue from where it exists.
        save_every: Seconds between saves.
        progress: Whether to show a bar: see :data:`curvlib.core.run.Progress`.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If the operator is not symmetric, or an argument does not fit.
        RuntimeError: If Nyström's method meets a negative eigenvalue.
        FloatingPointError: If a product is not finite.

    Example:
        >>> A = torch.diag(torch.tensor([5.0, 2.0, 0.0, 0.0], dtype=torch.float64))
        >>> found = low_rank(A, 2)
        >>> [round(v, 6) for v in found.values.tolist()], found.error < 1e-6
        ([5.0, 2.0], True)
        >>> round(found.operator.logdet(damping=1.0), 6) == round(
        ...     torch.tensor(18.0).log().item(), 6
        ... )
        True

    Source:
        N. Halko, P.-G. Martinsson and J. Tropp, *Finding structure with randomness*, SIAM Review
        53 (2011), algorithms 4.4 and 5.3; J. Tropp et al., *Fixed-rank approximation of a
        positive-semidefinite matrix from streaming data*, NeurIPS 2017, algorithm 3.
    """
    op = require_symmetric(op)
    n = op.shape[0]
    require_counts(
        rank=(rank, 1),
        power=(power, 0),
        oversampling=(oversampling, 0),
        probes=(probes, 0),
        block=(block, 1),
    )
    if rank > n:
        raise ValueError(f"expected rank <= {n} (the operator's size), got {rank}")
    method = ("nystrom" if op.psd else "eigh") if method is None else method
    if method not in METHODS:
        raise ValueError(f"unknown method={method!r}; there are {', '.join(METHODS)}")
    settings = {
        "rank": rank,
        "method": method,
        "power": power,
        "oversampling": oversampling,
        "probes": probes,
        "block": block,
        "seed": (seed or 0) if generator is None else "generator",
        "dtype": str(op.dtype).removeprefix("torch."),
        "device": op.device.type,
    }
    width = min(n, rank + oversampling)
    passes = power + (1 if method == "nystrom" else 2)
    total = width * passes + probes
    random = generator_of(generator, seed, op.device)
    state = run(
        lambda: _first_state(op, width, probes, random),
        lambda state: _next_state(op, state, rank, method, passes, block),
        state_type=SketchState,
        done=lambda state: state.passes == passes and state.tested == probes,
        report=lambda state: _report(state, total, passes),
        title=f"low rank of {op.name}",
        checkpoint=checkpoint,
        problem=op.fingerprint,
        settings=settings,
        device=op.device,
        save_every=save_every,
        progress=progress,
    )
    error, norm = state.squares
    many = probes > 1
    return LowRank(
        values=state.values,
        vectors=state.block.mT,
        squared_error=float(error.mean()) if probes else math.nan,
        squared_error_stderr=float(error.std()) / math.sqrt(probes) if many else math.nan,
        squared_norm=float(norm.mean()) if probes else math.nan,
        products=state.products,
        method=method,
        name=op.name,
        settings=settings,
    )


def _first_state(
    op: LinearOperator, width: int, probes: int, random: torch.Generator
) -> SketchState:
    like = torch.empty(op.shape[0], dtype=op.dtype, device=op.device)
    block = sketch.random_rows(width, like, random)
    return SketchState(
        block=block,
        product=torch.empty_like(block),
        column=0,
        passes=0,
        values=torch.zeros(0, dtype=torch.float64),
        squares=torch.zeros((2, probes), dtype=torch.float64),
        tested=0,
        random=random.get_state(),
        products=0,
    )


def _next_state(
    op: LinearOperator, state: SketchState, rank: int, method: str, passes: int, block: int
) -> SketchState:
    """One block product: of the sketch's vectors, or of fresh probes for the error."""
    if state.passes == passes:
        return _test(op, state, block)
    stop = min(state.column + block, state.block.shape[0])
    found = _finite_product(op, state.block[state.column : stop], state.products)
    state.product[state.column : stop].copy_(found)
    state = replace(state, column=stop, products=state.products + found.shape[0])
    if stop < state.block.shape[0]:
        return state
    state = replace(state, column=0, passes=state.passes + 1)
    if state.passes < passes:
        return replace(state, block=sketch.orthonormal(state.product))
    if method == "nystrom":
        vectors, values = sketch.nystrom(state.block, state.product, op.name)
    else:
        vectors, values = sketch.rayleigh_ritz(state.block, state.product)
    none = state.product.new_empty((0, op.shape[0]))
    return replace(state, block=vectors[:rank].contiguous(), product=none, values=values[:rank])


def _test(op: LinearOperator, state: SketchState, block: int) -> SketchState:
    random = torch.Generator(device=op.device)
    random.set_state(state.random)
    count = min(block, state.squares.shape[1] - state.tested)
    rows = torch.empty((count, op.shape[0]), dtype=op.dtype, device=op.device)
    fill_probes(rows, "rademacher", random)
    found = _finite_product(op, rows, state.products)
    seen = (rows @ state.block.mT) * state.values.to(rows)
    rest = torch.addmm(found, seen, state.block, alpha=-1.0)
    squares = state.squares.clone()
    where = slice(state.tested, state.tested + count)
    squares[0, where] = torch.linalg.vector_norm(rest, dim=1).double().square().cpu()
    squares[1, where] = torch.linalg.vector_norm(found, dim=1).double().square().cpu()
    return replace(
        state,
        squares=squares,
        tested=state.tested + count,
        random=random.get_state(),
        products=state.products + count,
    )


def _finite_product(op: LinearOperator, rows: Tensor, before: int) -> Tensor:
    found = op.matmat(rows.mT).mT
    if not bool(torch.isfinite(found).all()):
        raise FloatingPointError(
            f"the products {before + 1} to {before + rows.shape[0]} with {op!r} have entries that "
            "are NaN or infinite, though the vectors are finite; check the loss and its "
            "derivatives at these parameters (risk.check()). With checkpoint=, what came before "
            "is saved"
        )
    return found


def _report(state: SketchState, total: int, passes: int) -> Report:
    note = "error" if state.passes == passes else f"pass {state.passes + 1} of {passes}"
    return state.products, total, note
